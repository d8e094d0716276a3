"""No garbage is searched for while much is imported; afterwards as before."""

import gc

import pytest

from fedsam.base.system import importing


@pytest.mark.parametrize("searching", [True, False])
def test_what_searches_for_garbage_is_as_before_also_after_a_failure(searching):
    before = gc.get_freeze_count()
    try:
        if not searching:
            gc.disable()
        with importing("sys"):
            assert not gc.isenabled()
        assert gc.isenabled() == searching
        with pytest.raises(ImportError), importing("a module that is not there"):
            import fedsam.no_such_module  # noqa: F401
        assert gc.isenabled() == searching
        assert gc.get_freeze_count() == before  # what was imported before, or not at all
    finally:
        gc.enable()


def test_what_a_first_import_leaves_is_out_of_later_searches():
    before = gc.get_freeze_count()  # conftest's: taken back by no unfreeze, which tests would pay
    fresh = [[] for _ in range(1000)]
    with importing("a module that is not there"):
        pass
    assert gc.get_freeze_count() >= before + len(fresh)
