"""The plain loss: the mean of the task's losses over the mini-batch.

The local loop has it by default, so it is at home there.
"""

from fedsam.minibatch import Plain

__all__ = ["Plain"]
