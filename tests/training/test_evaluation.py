"""Evaluation of groups in one pass: parts add up to the whole, and each is what it is alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsam.config.schema import resolve
from fedsam.data.groups import Places
from fedsam.data.images import Images
from fedsam.engines import threads as engine
from fedsam.engines.threads import ThreadExecutor
from fedsam.simulate.build.trainer import new_trainer


@pytest.fixture(scope="module")
def digits():
    """An executor in float64, its model and the 355 test images."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        trainer, initial = new_trainer(resolve({"device": "cpu", "model": "mlp"}))
    finally:
        torch.set_default_dtype(before)
    executor = ThreadExecutor(trainer, 2)
    yield executor, initial.state, trainer.test
    executor.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**31), st.sampled_from([60, 355, 500]))
def test_the_groups_of_a_partition_add_up_to_the_whole(digits, count, seed, chunk):
    executor, state, images = digits
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, count, (len(images),), generator=generator)
    groups = [(owner == number).nonzero()[:, 0] for number in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "EVALUATION_BATCH", chunk)
        whole, by_group = executor.evaluate_by_group(state, images, Places(groups))
        assert whole == executor.evaluate(state, images)  # to the bit: groups change nothing
    assert set(by_group) == {number for number, rows in enumerate(groups) if len(rows)}
    sizes = [len(groups[number]) for number in by_group]
    for name, value in whole.items():
        total = sum(n * of[name] for n, of in zip(sizes, by_group.values(), strict=True))
        assert total / sum(sizes) == pytest.approx(value, rel=1e-12)


def test_a_group_is_what_it_is_alone_also_where_rows_are_in_two_or_in_none(digits):
    executor, state, images = digits
    groups = [torch.arange(0, 200), torch.arange(150, 300, 2), torch.tensor([3, 350])]
    whole, by_group = executor.evaluate_by_group(state, images, Places(groups))
    for number, rows in enumerate(groups):
        assert by_group[number] == pytest.approx(executor.evaluate(state, images, rows), rel=1e-12)
    # a row in two groups counts once in the whole, one in none counts as well
    network = executor.trainer.new_network()
    network.load(state)
    with torch.no_grad():
        batch = images.rows(torch.arange(len(images)))
        right = network.forward(batch.images).argmax(-1) == batch.targets
    assert whole["accuracy"] == right.double().mean().item()


def test_every_image_goes_through_the_model_once(digits):
    executor, state, images = digits
    seen = []
    trainer = executor.trainer
    forwards = trainer.new_network().module.__class__.forward

    def counted(self, x):
        seen.append(len(x))
        return forwards(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.new_network().module.__class__, "forward", counted)
        executor.evaluate_by_group(state, images, Places([torch.arange(300), torch.arange(355)]))
    assert sum(seen) == len(images)


@pytest.mark.parametrize(
    ("size", "together"),
    [
        *[((8, 8), 500), ((28, 28), 167), ((32, 32), 128), ((64, 64), 32)],
        *[((180, 240), 16), ((1024, 2048), 1)],
    ],
)
def test_what_is_evaluated_together_follows_from_pixels_alone(size, together):
    images = Images(torch.zeros(1, 1, *size, dtype=torch.uint8), torch.zeros(1), (0.5,), (0.5,))
    assert engine.evaluated_at_a_time(images) == together


def test_on_another_device_only_the_memory_bounds_what_is_evaluated_together():
    pixels = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(1), (0.5,), (0.5,), device="meta")
    assert engine.evaluated_at_a_time(images) == engine.EVALUATION_BATCH
