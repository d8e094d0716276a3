"""The plain loss: the mean of the task's losses over the mini-batch."""

from fedsam.minibatch import Plain

__all__ = ["Plain"]
