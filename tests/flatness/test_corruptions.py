"""Corrupted images: the published files as written by NumPy, and those made here."""

import json
import math

import little
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, zoom

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.flatness.measures.corruptions import corruptions
from fedsam.flatness.measures.made_corruptions import (
    MADE,
    corrupt,
    disk,
    elastic_transform,
    glass_blur,
    plasma,
)
from fedsam.flatness.measures.published_corruptions import BENCHMARK, EXTRA, read_published

N = 12


@pytest.fixture
def subject():
    return little.subject(test=N)


@pytest.fixture
def folder(tmp_path, subject):
    """Return a folder like CIFAR-10-C, of 12 images of 8 x 8 pixels and three corruptions."""
    rng = np.random.default_rng(0)
    for name in ("snow", "gaussian_noise", "fog"):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (5 * N, 8, 8, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(subject.test.targets.numpy(), 5).astype(np.uint8))
    return tmp_path


def test_published_files_are_evaluated_image_by_image(subject, folder):
    found = corruptions(subject, folder=str(folder))
    module = little.module_of(subject)
    assert list(found["accuracies"]) == ["gaussian_noise", "snow", "fog"]  # the published order
    for name, accuracies in found["accuracies"].items():
        pixels = np.load(folder / f"{name}.npy")
        labels = np.load(folder / "labels.npy")
        for severity in range(5):
            right = 0
            for row in range(N * severity, N * (severity + 1)):
                x = torch.from_numpy(pixels[row]).double().permute(2, 0, 1)[None] / 255
                right += int(module((x - 0.4) / 0.3).argmax()) == labels[row]
            assert accuracies[severity] == right / N
    scalars, table = found["scalars"], np.array(list(found["accuracies"].values()))
    assert scalars["partial_corruption_accuracy"] == pytest.approx(table.mean())
    assert scalars["partial_corruption_accuracy_severity_4"] == pytest.approx(table[:, 3].mean())
    assert scalars["accuracy"] == little.naive_accuracy(module, subject.test)
    assert "corruption_accuracy" not in scalars  # that is of all 15
    settings = found["settings"]
    assert settings["source"] == "published files"
    assert not settings["official_count"]
    assert len(settings["missing"]) == 16
    assert len(set(table.flatten())) > 2


@pytest.fixture
def whole(folder):
    """All 15 of the benchmark, one of the 4 others, and a file that is neither."""
    for name in (*BENCHMARK, "speckle_noise", "sunflare"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (5 * N, 8, 8, 3), np.uint8)
        np.save(folder / f"{name}.npy", pixels)
    return folder


def test_the_headline_is_of_the_15_whatever_lies_in_the_folder(subject, whole):
    found = corruptions(subject, folder=str(whole))
    scalars, accuracies = found["scalars"], found["accuracies"]
    mean = np.mean([accuracies[name] for name in BENCHMARK])
    assert scalars["corruption_accuracy"] == pytest.approx(mean)
    worst = np.mean([accuracies[name][4] for name in BENCHMARK])
    assert scalars["corruption_accuracy_severity_5"] == pytest.approx(worst)
    extra = np.mean(accuracies["speckle_noise"])
    assert scalars["extra_corruption_accuracy"] == pytest.approx(extra)
    assert extra != pytest.approx(mean)
    assert set(accuracies) == {*BENCHMARK, "speckle_noise"}
    settings = found["settings"]
    assert settings["unknown_files"] == ["sunflare"]
    assert settings["missing"] == ["gaussian_blur", "spatter", "saturate"]


def test_the_clean_accuracy_is_on_the_same_images(subject, folder):
    module, few = little.module_of(subject), 7
    save(folder, "labels", np.tile(subject.test.targets.numpy()[:few], 5))
    for name in ("snow", "gaussian_noise", "fog"):
        save(folder, name, np.zeros((5 * few, 8, 8, 3), "u1"))
    found = corruptions(subject, folder=str(folder))
    assert found["scalars"]["accuracy"] == little.naive_accuracy(module, subject.test, range(few))
    assert found["scalars"]["accuracy"] != little.naive_accuracy(module, subject.test)
    assert found["errors"]["images"]["accuracy"] > 0  # 7 of 12
    save(folder, "labels", np.tile(subject.test.targets.numpy()[1 : few + 1], 5))
    other = corruptions(subject, folder=str(folder))
    assert math.isnan(other["scalars"]["accuracy"])  # nobody says which images these are


def test_mce_is_in_units_of_the_baselines_errors(subject, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsam.flatness.measures.corruptions.name_of", lambda *_: "fedavg")
    found = corruptions(subject, folder=str(whole))
    base = tmp_path / "base"
    base.mkdir()

    def measured(result):
        (base / "flatness.json").write_text(json.dumps({"model": {"corruptions": result}}))

    measured(found)
    same = corruptions(subject, folder=str(whole), baseline=str(base))
    assert same["scalars"]["mce"] == pytest.approx(1)
    assert same["settings"]["baseline"] == f"fedavg in {base}"
    times = dict(zip(BENCHMARK, np.linspace(0.5, 2, 15), strict=True))
    other = {
        name: [1 - (1 - a) * times.get(name, 9) for a in row]
        for name, row in found["accuracies"].items()
    }
    measured(found | {"accuracies": other})
    mce = corruptions(subject, folder=str(whole), baseline=str(base))["scalars"]["mce"]
    assert mce == pytest.approx(np.mean([1 / factor for factor in times.values()]))
    measured(found | {"settings": found["settings"] | {"images": 3}})
    with pytest.raises(UsageError, match=r"--baseline .*: its corruptions have images 3, not 12"):
        corruptions(subject, folder=str(whole), baseline=str(base))
    (base / "flatness.json").unlink()
    with pytest.raises(UsageError, match=r"--baseline .*: measure its corruptions first"):
        corruptions(subject, folder=str(whole), baseline=str(base))


def save(folder, name, array):
    np.save(folder / f"{name}.npy", array)


SPOILED = {
    "no such file": lambda f: (f / "labels.npy").unlink(),
    r"must hold 5 n integers, not uint8 \(11,\)": lambda f: save(f, "labels", np.zeros(11, "u1")),
    "must hold 5 n integers, not float64": lambda f: save(f, "labels", np.zeros(10)),
    r"not int64 \(0,\)": lambda f: save(f, "labels", np.zeros(0, int)),
    "severities differ": lambda f: save(f, "labels", np.arange(5 * N) % 5),
    "not the labels of the run": lambda f: save(f, "labels", np.ones(5 * N, int)),
    r"labels must lie in 0\.\.4": lambda f: save(f, "labels", np.full(10, 7)),
    r"fog\.npy: must be uint8 \(60, 8, 8, 3\), not uint8 \(60, 3, 8, 8\)": lambda f: save(
        f, "fog", np.zeros((60, 3, 8, 8), "u1")
    ),
    r"not float32 \(60, 8, 8, 3\)": lambda f: save(f, "fog", np.zeros((60, 8, 8, 3), "f4")),
    r"snow\.npy: not a NumPy array": lambda f: (f / "snow.npy").write_bytes(b"\x93NUMPY\x01"),
    "no corruption beside": lambda f: [p.unlink() for p in f.glob("*[!s].npy")],
}


@pytest.mark.parametrize(("message", "spoil"), SPOILED.items(), ids=SPOILED)
def test_files_that_are_something_else_are_named(subject, folder, message, spoil):
    spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        corruptions(subject, folder=str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_pickled_files_are_refused_unread(subject, folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    np.save(folder / "fog.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"fog\.npy"):
        corruptions(subject, folder=str(folder))
    assert not (tmp_path / "exploded").exists()


def test_only_labels_and_headers_are_read_at_first(subject, folder):
    shape = (5 * N, 8, 8, 3)
    published = read_published(folder, shape[1:], subject.test.targets)
    new = np.full(shape, 9, np.uint8)
    save(folder, "fog", new)  # what is read is what lies there when it is asked for
    assert torch.equal(published.images("fog", 2), torch.from_numpy(new[:N]))


# --- made here

RNG = np.random.default_rng
PICTURES = RNG(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
GREY = np.full((60, 32, 32, 3), 128, np.uint8)


def test_which_are_made_and_which_are_missing():
    assert sorted(set(BENCHMARK + EXTRA) - set(MADE)) == ["frost", "motion_blur", "snow", "spatter"]
    assert set(MADE) < set(BENCHMARK + EXTRA)
    assert all(len(parameters) == 5 for _, parameters in MADE.values())


@pytest.mark.parametrize("name", MADE)
def test_made_images_are_keyed_bytes_that_leave_the_clean_ones_alone(name):
    before = PICTURES.copy()
    for severity in (1, 5):
        made = corrupt(name, PICTURES[:4], severity, RNG(1))
        assert made.shape == (4, 32, 32, 3)
        assert made.dtype == np.uint8
        assert np.array_equal(made, corrupt(name, PICTURES[:4], severity, RNG(1)))
        assert not np.array_equal(made, PICTURES[:4])
    assert np.array_equal(PICTURES, before)


@pytest.mark.parametrize("severity", range(1, 6))
def test_noises_have_the_published_strength(severity):
    """On grey, far from the ends: the variance of each law, in units of the pixel range."""
    scale = [0.04, 0.06, 0.08, 0.09, 0.10][severity - 1]
    photons = [500, 250, 100, 75, 50][severity - 1]
    speckle = [0.06, 0.1, 0.12, 0.16, 0.2][severity - 1]
    amount = [0.01, 0.02, 0.03, 0.05, 0.07][severity - 1]
    x = 128 / 255
    variances = {
        "gaussian_noise": scale**2,
        "shot_noise": x / photons,
        "speckle_noise": (x * speckle) ** 2,
        "impulse_noise": amount * (0.5 * (1 - x) ** 2 + 0.5 * x**2),
    }
    for name, variance in variances.items():
        made = corrupt(name, GREY, severity, RNG(severity)) / 255
        assert made.var() == pytest.approx(variance, rel=0.03), name
        assert made.mean() == pytest.approx(x, abs=0.004), name  # cut off: half a level less


def test_contrast_and_pixelate_by_hand():
    made = corrupt("contrast", PICTURES, 5, RNG(0))
    x = PICTURES[7, :, :, 2] / 255
    expected = np.floor(255 * (x.mean() + 0.15 * (x - x.mean())) + 1e-9)
    assert np.abs(made[7, :, :, 2] - expected).max() <= 1
    assert (made[7, :, :, 2] == expected).mean() > 0.999
    # 32 * 0.65 = 20.8: 20 boxes a side, all of one colour on a plain image
    assert np.array_equal(corrupt("pixelate", GREY[:1], 5, RNG(0)), GREY[:1])
    assert len(np.unique(corrupt("pixelate", PICTURES[:1], 5, RNG(0))[0, :, 0], axis=0)) <= 20


def test_brightness_and_saturation_by_hand():
    red = np.tile(np.array([200, 100, 100], np.uint8), (1, 32, 32, 1))  # V 200/255, S 1/2
    brighter = corrupt("brightness", red, 2, RNG(0))[0, 0, 0]  # V + 0.1, S as it was
    assert brighter == pytest.approx([225.5, 112.75, 112.75], abs=1)
    paler = corrupt("saturate", red, 1, RNG(0))[0, 0, 0]  # S 0.15
    assert paler == pytest.approx([200, 170, 170], abs=1)
    deeper = corrupt("saturate", red, 5, RNG(0))[0, 0, 0]  # 1.25 + 0.2, clipped to 1
    assert deeper == pytest.approx([200, 0, 0], abs=1)


def test_a_disk_that_is_one_pixel_is_the_bell_it_is_softened_by():
    e = np.exp(-1 / (2 * 0.4**2))
    bell = np.array([e, 1, e]) / (1 + 2 * e)
    np.testing.assert_allclose(disk(0.3, 0.4), np.outer(bell, bell))
    plus = disk(1, 0.01)  # hardly softened: the pixel and its four neighbours
    assert plus[2, 2] == pytest.approx(0.2)
    assert plus.sum() == pytest.approx(1)
    assert (plus > 0.1).sum() == 5
    assert disk(1.5, 0.1).sum() == pytest.approx(1)
    assert (disk(1.5, 0.1) > 0.1).sum() == 9


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "zoom_blur", "glass_blur"])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_blurs_keep_a_plain_image_and_calm_noise_more_with_severity(name, severity):
    plain = corrupt(name, GREY[:2], severity, RNG(0))
    assert int(np.abs(plain.astype(int) - 128).max()) <= 2  # cut off twice
    if severity > 1 and name != "glass_blur":  # it alone trades sharpness for disorder
        milder = corrupt(name, PICTURES, severity - 1, RNG(0))
        assert corrupt(name, PICTURES, severity, RNG(0)).std() < milder.std()


def test_defocus_is_a_naive_convolution_with_a_mirrored_border():
    made = corrupt("defocus_blur", PICTURES[:2], 5, RNG(0))
    kernel = disk(1.5, 0.1)
    reach = len(kernel) // 2
    for row, column in [(0, 0), (31, 5), (16, 16)]:
        total = np.zeros(3)
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                r, c = (31 - abs(31 - abs(at)) for at in (row + i, column + j))
                total += kernel[i + reach, j + reach] * PICTURES[1, r, c] / 255
        assert np.abs(made[1, row, column] - np.floor(total * 255)).max() <= 1


def test_zoom_blur_is_the_mean_of_scipys_zooms():
    x = PICTURES[3] / 255
    total = x.copy()
    factors = np.arange(1, 1.16, 0.01)
    for factor in factors:
        kept = int(np.ceil(32 / factor))
        top = (32 - kept) // 2
        large = zoom(x[top : top + kept, top : top + kept], (factor, factor, 1), order=1)
        trim = (len(large) - 32) // 2
        total += large[trim : trim + 32, trim : trim + 32]
    expected = np.floor(total / (len(factors) + 1) * 255)
    made = corrupt("zoom_blur", PICTURES, 3, RNG(0))[3]
    assert np.abs(made - expected).max() <= 1
    assert (made == expected).mean() > 0.999


def test_glass_copies_as_an_exchange_of_views_does():
    """The published loop for one image: ``a, b = b, a`` on views of one array."""

    class Shared:
        def __init__(self):
            self.rng, self.drawn = RNG(2), []

        def integers(self, low, high, size):
            one = self.rng.integers(low, high, size=2)
            self.drawn.append(one)
            return np.broadcast_to(one[:, None], size)

    shared = Shared()
    made = glass_blur(PICTURES[:3], (0.05, 1, 2), shared)  # so small a blur changes nothing
    steps = iter(shared.drawn)
    x = np.uint8(PICTURES[2] / 255 * 255)
    for _ in range(2):
        for h in range(31, 1, -1):
            for w in range(31, 1, -1):
                dx, dy = next(steps)
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
    assert len(shared.drawn) == 2 * 30 * 30
    np.testing.assert_allclose(made[2], x / 255)


def naive_plasma(wobble_over, draw):
    """Return one fractal, point by point, with ``draw(kind, row, column)`` for the noise."""
    height, step, wobble = np.zeros((32, 32)), 32, 100.0
    while step > 1:
        half = step // 2
        for r in range(0, 32, step):
            for c in range(0, 32, step):
                four = [height[i % 32, j % 32] for i in (r, r + step) for j in (c, c + step)]
                height[r + half, c + half] = sum(four) / 4 + wobble * draw(wobble)
        for kind in (0, 1):  # first between corners of a row, then of a column
            for r in range(0, 32, step):
                for c in range(0, 32, step):
                    y, x = (r, c + half) if kind == 0 else (r + half, c)
                    near = [(y - half, x), (y + half, x), (y, x - half), (y, x + half)]
                    four = [height[i % 32, j % 32] for i, j in near]
                    height[y, x] = sum(four) / 4 + wobble * draw(wobble)
        step, wobble = half, wobble / wobble_over
    height -= height.min()
    return height / height.max()


def test_the_fractal_is_diamonds_and_squares_on_a_torus():
    rng = RNG(4)
    expected = naive_plasma(2.5, lambda wobble: rng.uniform(-wobble, wobble))
    np.testing.assert_allclose(plasma(1, 2.5, RNG(4))[0], expected, atol=1e-12)


def test_fog_keeps_the_brightest_value_at_most():
    dark = PICTURES // 3
    made = corrupt("fog", dark, 5, RNG(0))
    assert int(made.max()) <= int(dark.max())
    assert made.std() < dark.std()


def test_elastic_is_the_affine_map_that_moves_three_points():
    assert np.abs(corrupt("elastic_transform", GREY, 5, RNG(0)).astype(int) - 128).max() <= 1
    rows, columns = np.mgrid[:32, :32]
    ramps = np.stack([8 * columns, 8 * rows, 0 * rows], -1).astype(np.uint8)
    made = corrupt("elastic_transform", np.stack([ramps] * 5), 1, RNG(3)) / 8  # no field at 1
    points = np.array([[26, 26], [26, 6], [6, 6]])
    moved = points + RNG(3).uniform(-0.08 * 32, 0.08 * 32, (5, 3, 2))
    inner = rows[8:24, 8:24].ravel(), columns[8:24, 8:24].ravel()
    seen = np.stack([inner[1], inner[0], np.ones(256)], -1)
    for image, corners in zip(made, moved, strict=True):
        source = image[8:24, 8:24, :2].reshape(-1, 2) + 0.5 / 8  # of cutting off
        back, *_ = np.linalg.lstsq(seen, source, rcond=None)
        found = np.column_stack([corners, np.ones(3)]) @ back
        np.testing.assert_allclose(found, points, atol=0.05)


def test_elastic_fields_are_smooth_and_of_the_given_strength():
    ramp = np.stack([np.tile((8 * np.arange(32)).astype(np.uint8)[:, None], (32, 1, 3))] * 40)
    ramp = ramp.reshape(40, 32, 32, 3)
    _, parameters = MADE["elastic_transform"]
    given = (parameters[4][0], parameters[4][1], 0.0)  # without the affine map
    made = elastic_transform(ramp, given, RNG(5))
    moved = (made - ramp / 255)[:, 8:24, 8:24, 0] * 255 / 8  # in pixels
    bell = gaussian_filter(np.eye(1, 31, 15)[0], 0.03 * 32, truncate=3)  # U(-1, 1) has 1/3
    deviation = 0.1 * 32 * (bell @ bell) / 3**0.5
    assert moved.std() == pytest.approx(deviation, rel=0.1)


def test_jpeg_loses_more_with_severity():
    smooth = corrupt("gaussian_blur", PICTURES, 5, RNG(0))
    lost = [
        np.abs(corrupt("jpeg_compression", smooth, s, RNG(0)) - smooth.astype(int)).mean()
        for s in range(1, 6)
    ]
    assert lost == sorted(lost)
    assert lost[0] > 0.5


def test_made_accuracies_are_those_of_the_made_images_and_say_so():
    subject = little.subject(test=30, side=32)
    found = corruptions(subject, images=0)
    module = little.module_of(subject)
    rng = numpy_generator(subject.seed, "corruption fog", 4)
    pixels = torch.from_numpy(corrupt("fog", subject.test.raw.numpy(), 4, rng))
    other = subject.test.with_raw(pixels, subject.test.targets)
    assert found["accuracies"]["fog"][3] == little.naive_accuracy(module, other)
    assert found["settings"]["source"] == "made here, not CIFAR-10-C"
    assert found["settings"]["missing"] == ["motion_blur", "snow", "frost", "spatter"]
    names = set(found["scalars"]) - {"accuracy"}
    assert all(name.startswith("made_") for name in names)
    of_the_15 = [found["accuracies"][name] for name in BENCHMARK if name in MADE]
    assert len(of_the_15) == 12
    assert found["scalars"]["made_corruption_accuracy"] == pytest.approx(np.mean(of_the_15))


def test_nothing_is_made_of_other_sizes_than_the_parameters_are_for(subject):
    with pytest.raises(UsageError, match="32 x 32"):
        corruptions(subject)
