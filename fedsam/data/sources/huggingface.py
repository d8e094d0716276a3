"""A data set of Hugging Face's that lies on the disk, as its ``save_to_disk`` wrote it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedsam.base.errors import UsageError, nearest, one_line, some
from fedsam.data.sources.listing import TESTING, TRAINING, Columns, Listing, listed
from fedsam.data.sources.pictures import Encoded, Picture

WITHOUT = -1  # Hugging Face's label of a row that has none


def hugging_face(
    path: Path,
    *,
    image: str = "",
    label: str = "",
    owner: str = "",
    domain: str = "",
    train: str = TRAINING,
    test: str = "",
    classes: Sequence[str] = (),
) -> Listing:
    """Pictures of a Hugging Face data set on the disk, as its save_to_disk wrote them.

    Parameters
    ----------
    path : Path
        The folder. Needs the package ``datasets``, which the extra flwr-datasets installs.
    image, label : str
        Columns with pictures and with their classes; "": the only one whose feature is an Image,
        and the only ClassLabel. Other labels than ClassLabels are numbered in the order of their
        names.
    owner, domain : str
        Columns with whose a picture is (--partition natural: {owner: writer_id}), and of which
        domain; "": nothing says so.
    train, test : str
        Splits; test "": the first of test, val, valid, validation, and where there is none a fifth
        of each class.
    classes : sequence of str
        Classes that are taken, in the order of their numbers; none: all.

    Raises
    ------
    UsageError
        If there is no such data set, split or column, or rows have no label.
    """
    where = f"--dataset hf:{path}"
    splits = _splits(path, where, train, test)
    features = splits[TRAINING].features
    image = _column(where, features, "image", image, "Image")
    label = _column(where, features, "label", label, "ClassLabel")
    for option, name in (("owner", owner), ("domain", domain)):
        if name:
            _column(where, features, option, name, "")
    names = getattr(features[label], "names", None)
    texts = {
        option: np.concatenate([_texts(where, part, split, name) for part, split in splits.items()])
        for option, name in (("label", label), ("owner", owner), ("domain", domain))
        if name
    }
    columns = Columns(
        _Pictures(splits, image),
        texts["label"],
        texts.get("owner"),
        texts.get("domain"),
        np.repeat(list(splits), [len(split) for split in splits.values()]),
    )
    return listed(path.name, where, columns, names or (), classes)


class _Pictures(Sequence[Picture]):
    """The pictures of several splits, read when they are asked for, in the order of the splits."""

    def __init__(self, splits: Mapping[str, Any], column: str) -> None:
        from datasets import Image

        self.column = column
        self.names = list(splits)
        self.splits = [
            split.select_columns([column]).cast_column(column, Image(decode=False))
            for split in splits.values()
        ]
        self.begins = np.cumsum([0, *map(len, self.splits)])

    def __len__(self) -> int:
        return int(self.begins[-1])

    @overload
    def __getitem__(self, row: int) -> Picture: ...
    @overload
    def __getitem__(self, row: slice) -> list[Picture]: ...
    def __getitem__(self, row: int | slice) -> Picture | list[Picture]:
        """Return one, encoded as it lies, or several."""
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(f"picture {row} of {len(self)}")
        split = int(np.searchsorted(self.begins, row, side="right")) - 1
        place = row - int(self.begins[split])
        held = self.splits[split][place][self.column] or {}
        if held.get("bytes") is None and held.get("path"):
            return str(held["path"])
        return Encoded(f"{self.names[split]} row {place}", held.get("bytes") or b"")


def _splits(path: Path, where: str, train: str, test: str) -> dict[str, Any]:
    """Return the splits that are taken, as "train" and "test"; one that stands alone trains."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise UsageError(
            f"{where}: needs the package datasets; pip install 'fedsam[flwr-datasets]'"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    # pyarrow's errors of damaged files are OSErrors and ValueErrors, those of JSON ValueErrors
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where}: is no data set that save_to_disk wrote: {one_line(error)}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return {TRAINING: found}
    test = test or next((name for name in TESTING if name in found), "")
    for option, name in (("train", train), ("test", test)):
        if name and name not in found:
            raise UsageError(
                f"{where}: has no split {name!r}{nearest(name, found)}, but {some(list(found))}; "
                f"choose: --dataset-options '{{{option}: {next(iter(found))}}}'"
            )
    return {TRAINING: found[train]} | ({TESTING[0]: found[test]} if test else {})


def _column(where: str, features: Mapping[str, Any], option: str, name: str, feature: str) -> str:
    """Return the column that an option names, or else the only one of its kind of feature."""
    if name:
        if name not in features:
            have = ", ".join(features)
            raise UsageError(
                f"{where}: has no column {name!r}{nearest(name, features)}, but {have}"
            )
        return name
    fitting = [key for key, value in features.items() if type(value).__name__ == feature]
    if len(fitting) != 1:
        several = f"has the {feature} columns {', '.join(fitting)}"
        none = f"has no {feature} column, but {', '.join(features)}"
        raise UsageError(
            f"{where}: {several if fitting else none}; choose: --dataset-options "
            f"'{{{option}: {(fitting or list(features))[0]}}}'"
        )
    return fitting[0]


def _texts(where: str, part: str, split: Any, column: str) -> NDArray[np.str_]:
    """Return a column as texts, a ClassLabel's numbers as their names."""
    if column not in split.features:
        raise UsageError(f"{where}: its split for {part} has no column {column!r}")
    feature = split.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint", "string", "large_string")):
        raise UsageError(
            f"{where}: its column {column!r} must hold whole numbers or texts: {feature}"
        )
    values = list(split[column])
    names = getattr(feature, "names", None)
    if without := [row for row, value in enumerate(values) if value in (None, WITHOUT)]:
        rows = some([f"{part} row {row}" for row in without])
        raise UsageError(f"{where}: {len(without)} rows have no {column}: {rows}")
    return np.array([names[value] for value in values] if names else list(map(str, values)))
