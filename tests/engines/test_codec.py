"""What goes through the codec comes back as it was, to the bit and the dtype."""

import numpy as np
import torch
from torch import Tensor

from fedsam.engines.codec import to_arrays, to_tensors
from fedsam.training.client import ClientJob, Result

CPU = torch.device("cpu")
W, C = torch.tensor([0.1, -0.0, float("inf")]), torch.tensor([1e-45, 3.0], dtype=torch.float64)


def check(back, value):
    assert type(back) is type(value)
    if isinstance(value, Tensor):
        assert back.dtype == value.dtype
        assert back.numpy().tobytes() == value.numpy().tobytes()
    elif isinstance(value, dict):
        assert list(back) == list(value)
        for name in value:
            check(back[name], value[name])
    else:
        assert back == value


def test_jobs_and_results_come_back_from_numpy_arrays():
    for value in (
        ClientJob(3, W, 2, 0.1, None, {}),
        ClientJob(3, W, 2, 0.1, {"c": C}, {"c": W, "d": C}),
        Result(W, 12, 4, 0.5, {}, {"c": C}),
    ):
        sent = to_arrays(value._asdict())
        assert isinstance(sent["state"], np.ndarray)
        check(type(value)(**to_tensors(sent, CPU))._asdict(), value._asdict())


def test_tensors_are_copies_of_arrays_that_may_not_be_written_to():
    array = np.ones(3, np.float32)
    array.flags.writeable = False  # as Ray's are
    tensor = to_tensors({"state": array}, CPU)["state"]
    tensor += 1
    assert array.tolist() == [1, 1, 1]
