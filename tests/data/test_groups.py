"""Groups of test rows: where they lie in any run of rows, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.data.groups import Places, by_class, check

GROUPS = st.lists(st.sets(st.integers(0, 39), max_size=40), max_size=6)


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(1, 45), st.randoms(use_true_random=False))
def test_every_row_of_a_group_is_found_once_in_the_chunk_it_lies_in(groups, size, random):
    rows = [random.sample(sorted(group), len(group)) for group in groups]  # in any order
    places = Places([torch.tensor(group, dtype=torch.int64) for group in rows])
    found = [[] for _ in groups]
    for start in range(0, 40, size):
        inside = places.within(start, min(start + size, 40))
        assert list(inside) == sorted(inside)
        for group, at in inside.items():
            assert int(at.min()) >= 0
            assert int(at.max()) < size
            found[group] += (at + start).tolist()
    assert found == [sorted(group) for group in groups]


def test_classes_are_groups_of_those_that_there_are():
    groups = by_class(torch.tensor([2, 0, 2, 3]), 5)
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "class 0": [1],
        "class 2": [0, 2],
        "class 3": [3],
    }
    with pytest.raises(UsageError, match="--test-groups classes: needs one class an image"):
        by_class(torch.zeros(3, 4, 4, dtype=torch.uint8), 5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([torch.tensor([1])], "must be a mapping from names to rows"),
        ({}, "must be a mapping from names to rows"),
        ({3: torch.tensor([1])}, "3 is no name"),
        ({"a": [1, 2]}, "'a' must hold rows, an int64 tensor"),
        ({"a": torch.tensor([0.5])}, "'a' must hold rows, an int64 tensor"),
        ({"a": torch.tensor([1]), "b": torch.empty(0, dtype=torch.int64)}, "'b' holds no row"),
        ({"a": torch.tensor([9, 10])}, r"'a' holds rows that are not in 0\.\.9"),
        ({"a": torch.tensor([-1])}, r"'a' holds rows that are not in 0\.\.9"),
        ({"a": torch.tensor([4, 4])}, "'a' holds a row twice"),
    ],
)
def test_what_are_no_groups_is_one_line(groups, message):
    with pytest.raises(UsageError, match=f"^here:? {message}"):
        check(groups, 10, "here")
    check({"a": torch.tensor([0, 9]), "b": torch.tensor([9])}, 10, "here")  # they may overlap
