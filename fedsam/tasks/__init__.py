"""What a model's output means: its loss and its metrics, behind a seam the engine never opens."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # who asks for a headline needs no torch
    from torch import Tensor

HEADLINE = "accuracy"  # of a task that names none
ABBREVIATIONS = {"miou": "mIoU"}  # headlines that are no words


@runtime_checkable
class Task(Protocol):
    """A loss an example, and statistics that add up over examples.

    Three more, which a task may have: ``headline``, the name of the metric that stands for the run
    in tables, early stops and summaries, in [0, 1] and the larger the better ("accuracy" by
    default); ``check(dataset)``, which raises UsageError where the targets are none of this task's;
    and ``answer(output)``, what is said of each pixel (B, H, W), which is drawn beside the truth.
    """

    def loss(self, output: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss of each example, (B,)."""
        ...

    def statistics(self, output: "Tensor", targets: "Tensor") -> "Tensor":
        """Return float64 statistics of a batch that may be summed over batches."""
        ...

    def metrics(self, total: "Tensor") -> dict[str, Any]:
        """Return named metrics from summed statistics; must hold "loss" and the headline.

        Numbers; beside them there may be lists of numbers, which are written and not drawn.
        """
        ...


def headline_of(task: Task) -> str:
    """Return the name of a task's headline."""
    headline: str = getattr(task, "headline", HEADLINE)
    return headline


def check(task: Task, dataset: Any) -> None:
    """Raise UsageError if a data set's targets do not fit a task that says which do."""
    if hasattr(task, "check"):
        task.check(dataset)


def answer_of(task: Task, output: "Tensor") -> "Tensor | None":
    """Return what is said of each pixel (B, H, W) by a task that says such things."""
    answer: Tensor | None = task.answer(output) if hasattr(task, "answer") else None
    return answer
