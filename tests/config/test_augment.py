"""The text of --augment: what it says, and what is refused in one line."""

import pytest

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.augment import Crop, Double, Flip, Jitter, Mirror, ResizedCrop, Scale
from fedsam.data.datasets import Dataset
from fedsam.simulate.build.data import load_dataset
from fedsam.simulate.build.work import new_work


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("none", ()),
        ("crop+flip", (Crop(4), Flip())),
        ("flip+crop", (Crop(4), Flip())),  # in the order of what they do, not of the text
        ("jitter(0.4) + scale(0.5, 1.5)", (Scale(0.5, 1.5), Jitter(0.4))),
        ("scale(1,2,4,6)", (Scale(1, 2, (4, 6)),)),
        ("jitter(0.4)+mirror", (Mirror(), Jitter(0.4))),
        ("double+flip", (Flip(), Double())),
        ("resized_crop(0.5,2,4,6)", (ResizedCrop(0.5, 2, (4, 6)),)),
        (["flip", "jitter(1)"], (Flip(), Jitter(1.0))),
    ],
)
def test_a_text_is_what_it_says(text, means):
    config = resolve({"augment": text})
    dataset = load_dataset(config)
    assert isinstance(dataset, Dataset)
    assert new_work(config, dataset, draws=False).augmentations == means
    assert resolve({"augment": config.augment}) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("turn", "'turn' must be one of crop, flip, mirror, double, scale, resized_crop, jitter"),
        ("crop+crop", "'crop' must be one of .* and come once"),
        ("crop(4)", "crop, without numbers"),
        ("jitter", r"jitter\(strength\)"),
        ("jitter(2)", r"jitter\(strength\), in \[0, 1\]"),
        ("jitter(nan)", r"jitter\(strength\)"),
        ("scale(2,1)", r"scale\(low,high\)"),
        ("scale(1,2,3)", r"scale\(low,high\)"),
        ("scale(1,inf)", r"scale\(low,high\)"),
        ("scale(1,2,3.5,4)", r"scale\(low,high\)"),
        ("scale(0.5,1.5", "is no name with numbers"),
        ("scale(a,b)", "is no name with numbers"),
        ("resized_crop(0.5,2)", r"resized_crop\(low,high,height,width\)"),
        ("mirror(2)", "mirror, without numbers"),
        ("flip+mirror", "flip and mirror: give one of them"),
        ("scale(1,2)+resized_crop(1,2,3,4)", "scale and resized_crop: give one of them"),
        ("", "must be one of"),
        (3, "valid string"),
    ],
)
def test_what_is_no_augmentation_is_refused_in_one_line(text, said):
    with pytest.raises(UsageError, match=f"^--augment .*{said}") as caught:
        resolve({"augment": text})
    assert "\n" not in str(caught.value)
