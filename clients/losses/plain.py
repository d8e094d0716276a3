"""The plain loss: the mean of the task's losses over the mini-batch.

The local loop has it by default, so it is at home there.
"""

from fedsam.training.gradient import Plain

__all__ = ["Plain"]
