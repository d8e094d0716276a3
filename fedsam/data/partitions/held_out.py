"""What clients do not train on: a domain that is left out, and images to validate with.

Who gets the data set that is left cannot see them: no split, no statistics, no measure.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsam.base.errors import UsageError, nearest
from fedsam.base.randomness import torch_generator
from fedsam.data.datasets import Dataset, shape_of
from fedsam.data.groups import Groups
from fedsam.data.store import joined, rows_of

TEST = 0.1  # of each domain's images, where a data set has no test images of its own


class Part(NamedTuple):
    """Some images, their targets, and class and domain (N,) of each, as a data set has them."""

    images: Any
    targets: Any
    classes: Tensor | None
    domains: Tensor | None

    def at(self, rows: Tensor) -> "Part":
        """Return those at some rows, or where a mask holds."""
        return Part(*(None if held is None else rows_of(held, rows) for held in self))

    def and_(self, other: "Part") -> "Part":
        """Return these and then the others."""
        both = zip(self, other, strict=True)
        return Part(*(None if a is None or b is None else joined(a, b) for a, b in both))


@dataclass(frozen=True)
class HeldOut:
    """A data set without what clients do not train on, and what that is.

    Attributes
    ----------
    dataset : Dataset
        What is left for training; its test images are those of the domain that is left out, all of
        them, where one is.
    places : Tensor or None
        int64 (N,), of each row of the whole training set the row that it has now, -1 for none;
        None: all are as they were.
    beside : Part or None
        Images to be evaluated beside the test images.
    validation, seen : Tensor
        int64 (n,), rows of them: held out of training to choose a round by; test images of the
        domains that clients train on.
    domains : mapping
        The rows of ``seen`` by the name of their domain.
    """

    dataset: Dataset
    places: Tensor | None = None
    beside: Part | None = None
    validation: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    seen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    domains: Groups = field(default_factory=dict)


def hold_out(dataset: Dataset, leave_out: str = "", validation: float = 0.0) -> HeldOut:
    """Take out of a data set what clients do not train on; the same whatever a run's seed.

    Parameters
    ----------
    dataset : Dataset
        Not changed.
    leave_out : str
        Name of the domain that nobody trains on: its training and test images are the test images.
        "" for none.
    validation : float
        Share of each other domain's training images (or of all, where there are none) that is held
        out, in [0, 1).

    Raises
    ------
    UsageError
        If there is no such domain, it is the only one, or a domain would keep no image.
    """
    whole = Part(
        dataset.train_images, dataset.train_labels, dataset.train_classes, dataset.train_domains
    )
    test = Part(
        dataset.test_images, dataset.test_labels, dataset.test_classes, dataset.test_domains
    )
    if not (leave_out or validation) and len(test.targets):
        return HeldOut(dataset)
    target = _place(dataset, leave_out) if leave_out else -1
    count = len(whole.targets)
    of_domain = torch.zeros(count, dtype=torch.int64) if whole.domains is None else whole.domains
    left = of_domain != target
    names = dataset.domain_names or (dataset.name,)
    if not len(test.targets):
        drawn = _drawn(of_domain, left, TEST, "test", names)
        test, left = whole.at(drawn), left & ~drawn
    validated = torch.zeros_like(left)
    if validation:
        validated = _drawn(of_domain, left, validation, "validation", names)
        left = left & ~validated
    beside, domains = whole.at(validated), {}
    rows = torch.arange(len(beside.targets))
    seen = torch.empty(0, dtype=torch.int64)
    if leave_out:
        assert test.domains is not None
        sources = test.at(test.domains != target)
        seen = len(rows) + torch.arange(len(sources.targets))
        domains = {name: seen[sources.domains == n] for n, name in enumerate(names) if n != target}
        domains = {name: of_name for name, of_name in domains.items() if len(of_name)}
        beside = beside.and_(sources)
        test = whole.at(of_domain == target).and_(test.at(test.domains == target))
    return HeldOut(
        _left(dataset, whole.at(left), left, test, keep_groups=not leave_out),
        torch.where(left, left.cumsum(0) - 1, -1),
        beside if len(beside.targets) else None,
        rows,
        seen,
        domains,
    )


def _place(dataset: Dataset, leave_out: str) -> int:
    """Return the number of the domain that is left out."""
    names, where = dataset.domain_names, f"--leave-out {leave_out}"
    if dataset.train_domains is None:
        raise UsageError(f"{where}: {dataset.name} does not say of which domain an image is")
    if leave_out not in names:
        raise UsageError(
            f"{where}: {dataset.name} has no such domain{nearest(leave_out, names)}; have "
            f"{', '.join(names)}"
        )
    sizes = [shape_of(images)[1:] for images in (dataset.train_images, dataset.test_images)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{where}: needs images of one size, as it tests on those for training, too; "
            f"{dataset.name} has {sizes[0]} for training and {sizes[1]} for testing"
        )
    if len(names) == 1:
        raise UsageError(f"{where}: it is the only domain of {dataset.name}: nothing is left")
    return names.index(leave_out)


def _drawn(
    domains: Tensor, among: Tensor, share: float, purpose: str, names: tuple[str, ...]
) -> Tensor:
    """Return a mask (N,) of a share of each domain's rows among some, one at least."""
    drawn = torch.zeros_like(among)
    for domain in domains[among].unique().tolist():
        rows = (among & (domains == domain)).nonzero()[:, 0]
        many = max(1, round(share * len(rows)))
        if many >= len(rows):
            raise UsageError(
                f"--validation: {share:g} of the {len(rows)} images of {names[domain]} leaves none "
                "to train on"
            )
        order = torch.randperm(
            len(rows), generator=torch_generator(0, f"held out: {purpose}", domain)
        )
        drawn[rows[order[:many]]] = True
    return drawn


def _left(dataset: Dataset, train: Part, left: Tensor, test: Part, *, keep_groups: bool) -> Dataset:
    """Return the data set of what is left, owners and domains numbered anew."""
    owners = None if dataset.owners is None else dataset.owners[left].unique(return_inverse=True)[1]
    groups = dataset.test_groups if keep_groups else None
    return replace(
        dataset,
        train_images=train.images,
        train_labels=train.targets,
        train_classes=train.classes,
        train_domains=train.domains,
        test_images=test.images,
        test_labels=test.targets,
        test_classes=test.classes,
        test_domains=test.domains,
        owners=owners,
        test_groups=groups,
    )
