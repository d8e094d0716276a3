"""Landmarks-User-160k, and what comes in its format: users, images and classes in CSV files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedsam.base.errors import UsageError, nearest, some
from fedsam.data.sources.listing import TESTING, TRAINING, Columns, Listing, listed
from fedsam.data.sources.table import check_files, check_filled, check_once, read_columns

FILES = (  # of the users' images, and of those for testing
    ("federated_train*.csv", "test.csv"),
    ("mini_gld_train_split.csv", "mini_gld_test.csv"),
)
USER, IMAGE, CLASS = "user_id", "image_id", "class"  # columns
LONGEST = 6  # digits of a class


def landmarks(
    path: Path, *, images: str = "", train: str = "", test: str = "", classes: int = 0
) -> Listing:
    """Landmarks-User-160k: 164,172 photos of 1,262 users and 2,028 places; also gld23k.

    ``federated_train.csv`` (user_id, image_id, class) and ``test.csv`` (image_id, class); images as
    the Google Landmarks Dataset v2 unpacks them, ``train/0/1/2/0123456789abcdef.jpg``, or flat,
    ``images/0123456789abcdef.jpg``. A user is an owner (--partition natural). iNaturalist-User-120k
    and -Geo are read alike where their images lie flat. Not downloaded.

    Parameters
    ----------
    path : Path
        The folder with the CSV files and, unless ``images`` says so, ``train`` or ``images``.
    images : str
        Another folder that holds ``train``, ``images``, or the images themselves.
    train, test : str
        The CSV files; "": those of Landmarks-User-160k or of gld23k, whichever is there.
    classes : int
        Their number; 0: one more than the highest class for training.

    Raises
    ------
    UsageError
        If files or images are missing, an image stands twice, or a class is beyond the range.

    References
    ----------
    Hsu, Qi, Brown, "Federated Visual Classification with Real-World Data Distribution", ECCV 2020,
    arXiv 2003.08082; Weyand et al., "Google Landmarks Dataset v2", CVPR 2020, arXiv 2004.01804.
    """
    where = f"--dataset landmarks:{path}"
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise UsageError(
            f"--dataset-options: classes must be their number, such as 2028, got {classes!r}"
        )
    files = _files(path, where, train, test)
    wanted = {TRAINING: (USER, IMAGE, CLASS), TESTING[0]: (IMAGE, CLASS)}
    tables = {
        part: _table(f"{where}: {file.name}", file, wanted[part]) for part, file in files.items()
    }
    names = [name for table in tables.values() for name in table[IMAGE]]
    check_once(where, names)
    count = classes or 1 + max(map(int, tables[TRAINING][CLASS]))
    for part, table in tables.items():
        _check_classes(f"{where}: {files[part].name}", table, count)
    paths = _paths(path / images, names)
    check_files(where, paths)
    users, tests = tables[TRAINING][USER], len(tables[TESTING[0]][IMAGE])
    columns = Columns(
        paths,
        np.array([str(int(number)) for table in tables.values() for number in table[CLASS]]),
        owners=np.array(users + [""] * tests),
        parts=np.repeat(list(tables), [len(users), tests]),
    )
    return listed(path.name, where, columns, [str(number) for number in range(count)])


def _files(path: Path, where: str, train: str, test: str) -> dict[str, Path]:
    """Return the CSV files of the parts, as they are named or found."""
    usual_train, usual_test = next((names for names in FILES if any(path.glob(names[0]))), FILES[0])
    found = sorted(path.glob(usual_train))
    if not train and len(found) > 1:
        raise UsageError(
            f"{where}: has {some([file.name for file in found])}; choose: --dataset-options "
            f"'{{train: {found[0].name}}}'"
        )
    if not train:
        train = found[0].name if found else usual_train.replace("*", "")
    return {TRAINING: path / train, TESTING[0]: path / (test or usual_test)}


def _table(where: str, file: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of a file, which must be there and filled; its classes are numbers."""
    table = read_columns(file, where)
    for name in wanted:
        if name not in table:
            raise UsageError(f"{where}: its header has no column {name!r}{nearest(name, table)}")
    check_filled(where, {name: table[name] for name in wanted})
    odd = [
        row
        for row, text in enumerate(table[CLASS], 2)
        if not text.isdecimal() or len(text) > LONGEST
    ]
    if odd:
        raise UsageError(
            f"{where}: {len(odd)} classes are no numbers of {LONGEST} digits at most: "
            f"{some([f'{table[CLASS][row - 2]!r} in row {row}' for row in odd])}"
        )
    return table


def _check_classes(where: str, table: Mapping[str, Sequence[str]], count: int) -> None:
    """Raise UsageError for classes beyond the range: the first five, and how many."""
    beyond = [row for row, number in enumerate(table[CLASS], 2) if int(number) >= count]
    if beyond:
        raise UsageError(
            f"{where}: {len(beyond)} classes lie beyond 0..{count - 1}: "
            f"{some([f'{table[CLASS][row - 2]} in row {row}' for row in beyond])}"
        )


def _paths(folder: Path, names: Sequence[str]) -> list[str]:
    """Return where images lie: the layout that has the first of them."""
    layouts = (
        lambda name: os.path.join(folder, "train", *name[:3], f"{name}.jpg"),
        lambda name: os.path.join(folder, "images", f"{name}.jpg"),
        lambda name: os.path.join(folder, f"{name}.jpg"),
    )
    layout = next((path for path in layouts if os.path.isfile(path(names[0]))), layouts[0])
    return [layout(name) for name in names]
