"""flwr-datasets' partitioners: their own partitions, keyed by the run's seed, or one line."""

import socket
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr_datasets import FederatedDataset
from flwr_datasets import partitioner as theirs

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.config.schema import resolve
from fedsam.data import datasets
from fedsam.simulate.build.data import split

# every class of images is one label; flwr-datasets warns where it leaves images out or tries again
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LABELS = torch.from_numpy(np.random.default_rng(3).permutation(np.arange(1000) % 10))
IMAGES = datasets.Dataset(
    "thousand", torch.zeros(1000, 1, 8, 8, dtype=torch.uint8), LABELS,
    torch.zeros(1, 1, 8, 8, dtype=torch.uint8), LABELS[:1], 10, (0.5,), (0.5,),
)  # fmt: skip
SIZES = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


class Distribution(theirs.DistributionPartitioner):
    """Two labels a client, in shares of 1 to 9: its array cannot be given on a command line."""

    def __init__(self, num_partitions, partition_by, seed):
        shares = np.tile([1.0, 9.0], (10, 1))
        super().__init__(shares, num_partitions, 2, partition_by, 1, seed=seed)


class Rising(theirs.IdToSizeFncPartitioner):
    """Client k has a share of k^1.5: neither can its function."""

    def __init__(self, num_partitions):
        super().__init__(num_partitions, lambda k: k**1.5)


def partition_of(name, options=None, clients=10, seed=0, alpha=0.5):
    name = name if ":" in name else f"flwr_datasets.partitioner:{name}"
    given = {"partition": name, "partition_options": options or {}, "alpha": alpha}
    config = resolve({"clients": clients, "clients_per_round": 1, "seed": seed} | given)
    return split(config, IMAGES)


# name, what is given, what flwr-datasets is given by hand beside a seed, every image?
BY_LABEL = {"num_partitions": 10, "partition_by": "label"}
EACH = {"partition_by": "label", "alpha": 0.5, "partition_sizes": [100] * 10}
CASES = [
    ("IidPartitioner", {}, {"num_partitions": 10}, True),
    ("LinearPartitioner", {}, {"num_partitions": 10}, True),
    ("SquarePartitioner", {}, {"num_partitions": 10}, True),
    ("ExponentialPartitioner", {}, {"num_partitions": 6}, True),
    (f"{__name__}:Rising", {}, {"num_partitions": 10}, True),
    ("SizePartitioner", {}, {"partition_sizes": [100] * 10}, True),
    ("SizePartitioner", {"partition_sizes": SIZES}, {"partition_sizes": SIZES}, False),
    ("DirichletPartitioner", {}, BY_LABEL | {"alpha": 0.5}, True),
    (
        "DirichletPartitioner",
        {"alpha": 2, "self_balancing": True, "min_partition_size": 30},
        BY_LABEL | {"alpha": 2, "self_balancing": True, "min_partition_size": 30},
        True,
    ),
    ("InnerDirichletPartitioner", {}, EACH, True),
    ("InnerDirichletPartitioner", {"partition_sizes": SIZES}, EACH | {"partition_sizes": SIZES}, 0),
    (
        "PathologicalPartitioner",
        {"num_classes_per_partition": 2, "class_assignment_mode": "deterministic"},
        BY_LABEL | {"num_classes_per_partition": 2, "class_assignment_mode": "deterministic"},
        True,
    ),
    (
        "PathologicalPartitioner",
        {"num_classes_per_partition": 1},  # random: some classes are nobody's
        BY_LABEL | {"num_classes_per_partition": 1},
        False,
    ),
    (
        "ShardPartitioner",
        {"num_shards_per_partition": 2},
        BY_LABEL | {"num_shards_per_partition": 2},
        True,
    ),
    ("ShardPartitioner", {"shard_size": 30}, BY_LABEL | {"shard_size": 30}, False),
    ("ContinuousPartitioner", {"strictness": 0.7}, BY_LABEL | {"strictness": 0.7}, True),
    (f"{__name__}:Distribution", {}, BY_LABEL, True),
    ("NaturalIdPartitioner", {}, {"partition_by": "label"}, True),
    (
        "GroupedNaturalIdPartitioner",
        {"group_size": 3},
        {"group_size": 3, "partition_by": "label"},
        1,
    ),
]
CLIENTS = {"ExponentialPartitioner": 6, "GroupedNaturalIdPartitioner": 4}


@pytest.mark.parametrize(("name", "options", "by_hand", "whole"), CASES)
def test_it_is_the_partition_that_flwr_datasets_makes(name, options, by_hand, whole):
    clients = CLIENTS.get(name, 10)
    mine = partition_of(name, options, clients)
    again = partition_of(name, options, clients)
    other = partition_of(name, options, clients, seed=1)

    seed = int(numpy_generator(0, "partition").integers(2**32))
    cls = getattr(sys.modules[__name__] if ":" in name else theirs, name.rpartition(":")[2])
    takes_seed = "seed" in cls.__init__.__code__.co_varnames
    partitioner = cls(**by_hand, **({"seed": seed} if takes_seed else {}))
    rows = Dataset.from_dict({"label": LABELS.tolist(), "at": range(1000)}).shuffle(seed=seed)
    partitioner.dataset = rows
    assert partitioner.num_partitions == len(mine) == clients
    for client in range(clients):
        assert mine[client].tolist() == list(partitioner.load_partition(client)["at"])

    images = mine.indices.tolist()
    assert len(set(images)) == len(images)
    assert (len(images) == 1000) == bool(whole)
    assert torch.equal(mine.indices, again.indices)
    assert torch.equal(mine.offsets, again.offsets)
    assert not torch.equal(mine.indices, other.indices)


def test_with_a_seed_of_ones_own_it_is_what_a_federated_dataset_gives(tmp_path):
    lines = [f"{label},{at}" for at, label in enumerate(LABELS.tolist())]
    (tmp_path / "rows.csv").write_text("\n".join(["label,at", *lines]))
    flower = FederatedDataset(
        dataset="csv",
        partitioners={"train": theirs.DirichletPartitioner(10, "label", 0.5, seed=42)},
        seed=42,
        data_files=str(tmp_path / "rows.csv"),
        cache_dir=str(tmp_path),
    )
    mine = partition_of("DirichletPartitioner", {"seed": 42}, seed=5)
    for client in range(10):
        assert mine[client].tolist() == list(flower.load_partition(client)["at"])


def test_no_partitioner_is_forgotten():
    columns = {"VerticalEvenPartitioner", "VerticalSizePartitioner"}
    bases = {"Partitioner", "DistributionPartitioner", "IdToSizeFncPartitioner"}
    tested = {name for name, *_ in CASES if ":" not in name}
    assert tested | columns | bases == set(theirs.__all__)


def test_nothing_is_asked_of_the_network_nor_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    partition_of("ShardPartitioner", {"num_shards_per_partition": 2})
    assert not list(tmp_path.iterdir())


REFUSED = [
    (
        "DirichletPartitioner",
        {"alfa": 1},
        "--partition-options: DirichletPartitioner has no option",
    ),
    (
        "DirichletPartitioner",
        {"alpha": "x"},
        "--partition-options: DirichletPartitioner: The given",
    ),
    ("DirichletPartitioner", {"alpha": -1}, "--partition-options: DirichletPartitioner: Alpha val"),
    ("DirichletPartitioner", {"partition_by": "size"}, "--partition-options: DirichletPartitioner"),
    ("DirichletPartitioner", {"min_partition_size": 99}, "--partition-options: DirichletPartition"),
    ("DirichletPartitioner", {"alpha": [1, 2]}, "--partition-options: DirichletPartitioner: If pa"),
    ("DirichletPartitioner", {"seed": "x"}, "--partition-options: DirichletPartitioner: "),
    ("ShardPartitioner", {}, "--partition: ShardPartitioner: The shard_size needs to be specified"),
    (
        "ShardPartitioner",
        {"shard_size": 2.5},
        "--partition-options: ShardPartitioner: The expected",
    ),
    ("PathologicalPartitioner", {}, "--partition-options: PathologicalPartitioner needs num_class"),
    ("GroupedNaturalIdPartitioner", {"group_size": 0}, "--partition-options: GroupedNaturalIdPart"),
    ("GroupedNaturalIdPartitioner", {"group_size": 5}, "--clients 10: --partition flwr_datasets"),
    ("SizePartitioner", {"partition_sizes": [5, 6]}, "--clients 10: --partition flwr_datasets"),
    ("IdToSizeFncPartitioner", {}, "--partition-options: IdToSizeFncPartitioner needs partition_"),
    ("VerticalEvenPartitioner", {}, "--partition: VerticalEvenPartitioner: it shares out columns"),
    ("VerticalSizePartitioner", {}, "--partition: VerticalSizePartitioner: Sum of partition sizes"),
    ("DirichletPartitione", {}, "--partition flwr_datasets.partitioner:DirichletPartitione: flwr_"),
]


@pytest.mark.parametrize(("name", "options", "says"), REFUSED)
def test_wrong_options_are_refused_in_one_line(name, options, says):
    with pytest.raises(UsageError) as caught:
        partition_of(name, options)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


def test_another_number_of_clients_says_what_to_give():
    with pytest.raises(UsageError, match=r"NaturalIdPartitioner makes 10; give --clients 10$"):
        partition_of("NaturalIdPartitioner", clients=20)


def test_a_client_without_images_is_refused():
    with pytest.raises(UsageError, match=r"client \d+ has no images"):
        partition_of("DirichletPartitioner", {"min_partition_size": 0}, alpha=0.01)


def test_without_flwr_datasets_the_extra_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("flwr_datasets")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(UsageError, match=r"; pip install 'fedsam\[flwr-datasets\]'$"):
        partition_of("IidPartitioner")


class Missing:
    """An import system without flwr-datasets."""

    def find_spec(self, name, path=None, target=None):
        if name == "flwr_datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
