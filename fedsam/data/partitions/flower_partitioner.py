"""The split that one of flwr-datasets' partitioners makes of the training images.

Such a class takes a ``datasets.Dataset`` and returns parts of it. All that it is shown here is
each image's row number and label; the row numbers of its parts are the split.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError, flag, one_line
from fedsam.config import plugins
from fedsam.data.partition import Partition, cut, even_sizes

WRONG_OPTION = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError)


@runtime_checkable
class Partitioner(Protocol):
    """What a ``flwr_datasets.partitioner.Partitioner`` has; importing that takes seconds."""

    def load_partition(self, partition_id: int) -> Any:
        """Return one client's part."""
        ...

    def is_dataset_assigned(self) -> bool:
        """Return whether it has a data set to share out."""
        ...


def partitioned(
    cls: type,
    options: Mapping[str, Any],
    labels: Tensor,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: float,
) -> Partition:
    """Split as ``FederatedDataset`` does: shuffle, then ask the partitioner for its partitions.

    Parameters
    ----------
    cls : type
        A subclass of ``flwr_datasets.partitioner.Partitioner``.
    options : mapping
        Its arguments. Those that it takes and that are not given are ``num_partitions`` (clients),
        ``partition_by`` ("label"), ``partition_sizes`` (balanced), ``alpha`` and ``seed``.
    labels : Tensor
        int64 (n,).
    clients : int
        N.
    generator : numpy.random.Generator
        Draws the seed of the shuffle and of the partitioner, unless ``options`` has it.
    alpha : float
        Concentration, as the partitioner means it.

    Returns
    -------
    Partition
        Client k holds partition k, in the partitioner's order.

    Raises
    ------
    UsageError
        If the partitioner refuses its options, or shares out something else than images.
    """
    from datasets import Dataset

    where = flag("partition_options" if options else "partition")
    seed = options.get("seed", int(generator.integers(2**32)))
    partitioner = plugins.build(
        "partition",
        cls,
        options,
        {
            "num_partitions": clients,
            "partition_by": "label",
            "partition_sizes": even_sizes(len(labels), clients).tolist(),
            "seed": seed,
        },
        alpha=alpha,
    )
    images = Dataset.from_dict({"image": np.arange(len(labels)), "label": labels.numpy()})
    try:
        partitioner.dataset = images.shuffle(seed=seed)
        parts = [_images(partitioner.load_partition(k)) for k in range(partitioner.num_partitions)]
    except WRONG_OPTION as error:
        raise UsageError(f"{where}: {cls.__name__}: {one_line(error)}") from error
    return cut(np.concatenate(parts), np.array([len(part) for part in parts]))


def _images(part: Any) -> NDArray[np.int64]:
    """Return the row numbers in one part, a ``datasets.Dataset``."""
    if "image" not in part.column_names:
        raise ValueError("it shares out columns, not images")
    return np.array(part[:]["image"], dtype=np.int64)
