"""The data set that a Config means, and which client holds which of its images."""

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsam.base.errors import UsageError, nearest
from fedsam.base.randomness import numpy_generator
from fedsam.base.system import expanded
from fedsam.config import plugins
from fedsam.config.schema import Config
from fedsam.data.datasets import Dataset
from fedsam.data.partition import Partition, check
from fedsam.data.partitions.flower_partitioner import Partitioner, partitioned
from fedsam.data.partitions.saved import saved
from fedsam.data.partitions.splits import METHODS
from fedsam.data.sources.load import load
from fedsam.runs import files


def load_dataset(config: Config) -> Dataset:
    """Return the data set, one of ours or the user's."""
    return load(config.dataset, Path(config.data_root), config.dataset_options)


def split(config: Config, dataset: Dataset, places: Tensor | None = None) -> Partition:
    """Return which training images are whose.

    ``places`` (N,) says where the rows of the whole training set are, if some are held out.
    """
    options, labels, clients = config.partition_options, dataset.classes_of_train, config.clients
    method: Any
    if config.partition in METHODS:
        method = METHODS[config.partition]
    elif file := _file_of(config.partition):
        if options:
            raise UsageError(f"--partition-options: {config.partition} is a file and takes none")
        return saved(labels, clients, file, places)
    elif ":" in config.partition:
        method = plugins.imported("partition", config.partition, Partition | Partitioner)
    else:
        raise UsageError(
            f"--partition: no {config.partition!r}{nearest(config.partition, METHODS)}; have "
            f"{', '.join(METHODS)}, a run's folder, a JSON file, or package.module:function"
        )
    seed = config.seed if config.split_seed is None else config.split_seed
    generator = numpy_generator(seed, "partition")
    if inspect.isclass(method) and issubclass(method, Partitioner):
        made = partitioned(method, options, labels, clients, generator, alpha=config.alpha)
    else:
        made = plugins.build(
            "partition",
            method,
            options,
            {
                "labels": labels,
                "clients": clients,
                "generator": generator,
                "owners": dataset.owners,
                "domains": dataset.train_domains,
                "places": places,
            },
            alpha=config.alpha,
        )
    if ":" in config.partition:
        check(made, len(labels), clients, f"--partition {config.partition}")
    return made


def _file_of(partition: str) -> Path | None:
    """Return the file that holds a split, if it is given by a path: a run's folder, or the file."""
    try:
        path = Path(expanded(partition))
    except UsageError as error:
        raise UsageError(f"--partition {partition}: {error}") from error
    if path.is_dir():
        return path / files.PARTITION
    return path if path.is_file() or path.suffix in (".npz", ".json") else None
