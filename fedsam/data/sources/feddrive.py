"""FedDrive's splits of Cityscapes and IDDA: JSON files of users, their frames and their masks.

Fantauzzo et al., "FedDrive: Generalizing Federated Learning to Semantic Segmentation in Autonomous
Driving", IROS 2022, arXiv 2202.13670. The files are those of its repository, without the images.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsam.base.errors import UsageError, nearest, one_line
from fedsam.data.partitions.csv import rank
from fedsam.data.sources.listing import Listing, Part
from fedsam.data.sources.table import check_files, check_once

IGNORED = 255
SPLITS = ("heterogeneous", "uniform", "class_imbalance")
SETTINGS = ("country", "rainy", "bus")
GROUPS = {"test_user_same_domain": "seen", "test_user_diff_domain": "unseen"}  # else a user's name
CITYSCAPES = {  # by the number of their labelIds; the others are ignored
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
IDDA_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "motorcycle", "bicycle"),
)
IDDA = (255, 2, 4, 255, 11, 5, 0, 0, 1, 8, 13, 3, 7, 6, 255, 255, 15, 14, 12, 9, 10)  # of 0 to 20
IDDA_SIZE = (1024, 1856)  # that FedDrive presses its frames to
User = dict[str, list[str]]  # "x", frames, and "y", masks


def cityscapes(path: Path, *, split: str = "heterogeneous") -> Listing:
    """Cityscapes as FedDrive splits it: 19 classes, ``--partition natural`` makes users clients.

    Parameters
    ----------
    path : Path
        FedDrive's ``data/cityscapes/data``: folders ``leftImg8bit``, ``gtFine`` and those of the
        splits.
    split : str
        "heterogeneous" (a client: a part of one city, 144), "uniform" (146) or "class_imbalance"
        (142). What splits and pictures sort by is the city.
    """
    where = f"--dataset cityscapes:{path}"
    return _listing(
        "cityscapes",
        where,
        path / _one_of("split", split, SPLITS),
        (path / "leftImg8bit", path / "gtFine"),
        1,
        tuple(CITYSCAPES),
        {value: number for number, value in enumerate(CITYSCAPES.values())},
    )


def idda(path: Path, *, split: str = "heterogeneous", setting: str = "country") -> Listing:
    """IDDA (its third version) as FedDrive splits it: 16 classes, test groups seen and unseen.

    Parameters
    ----------
    path : Path
        FedDrive's ``data/idda/data``: folders ``IDDAsmall`` and those of the splits.
    split : str
        "heterogeneous" (a client: a part of one domain), "uniform" or "class_imbalance". What
        splits and pictures sort by is the domain: town, weather and car.
    setting : str
        What the unseen domains are: "country" (town 7; 90 clients), "rainy" (hard rain at noon; 69)
        or "bus" (that car; 83).
    """
    where = f"--dataset idda:{path}"
    return _listing(
        "idda",
        where,
        path / _one_of("split", split, SPLITS) / _one_of("setting", setting, SETTINGS),
        (path / "IDDAsmall", path / "IDDAsmall"),
        0,
        IDDA_CLASSES,
        dict(enumerate(IDDA)),
        IDDA_SIZE,
    )


def users_of(path: Path, where: str) -> dict[str, User]:
    """Return the users of a LEAF file, or of all in a folder: ``{users, num_samples, user_data}``.

    Parameters
    ----------
    path : Path
        A .json file, or a folder of some.
    where : str
        What messages begin with.

    Returns
    -------
    dict
        By name, numbers by value: lists "x" and "y" of names of files, of one length.

    Raises
    ------
    UsageError
        If a file cannot be read, is of another form, or has a user of another.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    users: dict[str, User] = {}
    for file in files:
        try:
            said = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else one_line(error)
            raise UsageError(f"{where}: {file}: {reason}") from error
        for user, data in _users_in(said, f"{where}: {file}"):
            if user in users:
                raise UsageError(f"{where}: {file}: user {user!r} is in another file, too")
            users[user] = data
    if not users:
        raise UsageError(f"{where}: {path}: no .json file with users")
    return {user: users[user] for user in sorted(users, key=rank)}


def _users_in(said: Any, where: str) -> list[tuple[str, User]]:
    """Return the users of what a file says, checked."""
    data = said.get("user_data") if isinstance(said, dict) else None
    users, counts = (said.get(key) for key in ("users", "num_samples")) if data else (None, None)
    if not isinstance(data, dict) or not isinstance(users, list) or not isinstance(counts, list):
        raise UsageError(f"{where}: must hold users, num_samples and user_data, as LEAF's do")
    if missing := sorted(set(map(str, users)) ^ set(data)):
        raise UsageError(f"{where}: user {missing[0]!r} is not in both users and user_data")
    for user, pair in data.items():
        lists = [pair.get(key) for key in "xy"] if isinstance(pair, dict) else []
        texts = [all(isinstance(n, str) for n in of) for of in lists if isinstance(of, list)]
        if texts != [True, True]:
            raise UsageError(f"{where}: user {user!r} must have lists x and y of names of files")
        if len(pair["x"]) != len(pair["y"]):
            raise UsageError(
                f"{where}: user {user!r} has {len(pair['x'])} in x and {len(pair['y'])} in y"
            )
    for user, count in zip(users, counts, strict=False):
        if (many := len(data[user]["x"])) != count:
            raise UsageError(f"{where}: user {user!r} has {many} in x and num_samples {count}")
    return [(user, data[user]) for user in users]


def _listing(
    name: str,
    where: str,
    split: Path,
    roots: tuple[Path, Path],
    part_of_path: int,
    classes: Sequence[str],
    values: dict[int, int],
    size: tuple[int, int] | None = None,
) -> Listing:
    """Return a data set; the part of a frame's path that names its domain splits sort by."""
    of_part = [users_of(split / part, where) for part in ("train", "test")]
    frames, masks, domains = (
        [[read(user) for user in users.values()] for users in of_part]
        for read in (
            lambda user: [str(roots[0] / frame) for frame in user["x"]],
            lambda user: [str(roots[1] / mask) for mask in user["y"]],
            lambda user: [Path(frame).parts[part_of_path] for frame in user["x"]],
        )
    )
    numbers = {
        domain: n for n, domain in enumerate(sorted({*_flat(domains[0]), *_flat(domains[1])}))
    }
    parts = []
    for part in range(2):
        images, targets = _flat(frames[part]), _flat(masks[part])
        check_once(where, images)
        check_files(where, [*images, *targets])
        whose = np.repeat(np.arange(len(frames[part])), [len(user) for user in frames[part]])
        kinds = np.array([numbers[domain] for domain in _flat(domains[part])], np.int64)
        parts.append((images, targets, whose, kinds))
    (images, targets, owners, kinds), (tests, test_targets, tested, test_kinds) = parts
    groups = tuple(GROUPS.get(user, user) for user in of_part[1])
    several = len(groups) > 1
    return Listing(
        name,
        Part(images, targets, owners, classes=kinds),
        Part(tests, test_targets, classes=test_kinds, groups=tested if several else None),
        tuple(classes),
        tuple(of_part[0]),
        task="segmentation",
        ignore=IGNORED,
        mask_values=_table(values),
        groups=groups if several else (),
        size=size,
    )


def _flat(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for names in lists for name in names]


def _table(values: dict[int, int]) -> NDArray[np.uint8]:
    """Return what each byte of a mask means, uint8 (256,): a class, or that it is ignored."""
    table = np.full(256, IGNORED, np.uint8)
    for value, number in values.items():
        table[value] = number
    return table


def _one_of(option: str, value: object, known: Sequence[str]) -> str:
    if value not in known:
        raise UsageError(
            f"--dataset-options: {option} must be one of {', '.join(known)}, got {value!r}"
            f"{nearest(str(value), known)}"
        )
    return str(value)
