"""FedAvg in FedJAX (arXiv 2108.02117) on what benchmarks/engines.py hands over; needs FedJAX.

FedJAX's own algorithm, optimisers and backends (jit; pmap over devices that share the cores); the
networks are fedsam's, written for JAX: channels last, weights of convolutions (H, W, I, O), of
layers (I, O).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from contest import serve
from fedjax.algorithms import fed_avg
from handed import Client, Handed

Weights = Mapping[str, Any]
Network = Callable[[Weights, Any], Any]


def convolved(w: Weights, name: str, x: Any, padding: str) -> Any:
    kernel, axes = w[f"{name}.weight"], ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=axes)
    return y + w[f"{name}.bias"]


def pooled(x: Any) -> Any:
    """Return the maxima of squares of 2 x 2; of equal ones the first has the gradient."""

    def larger(a: Any, b: Any) -> Any:
        return jnp.where(a >= b, a, b)

    columns = larger(x[:, :, ::2], x[:, :, 1::2])
    return larger(columns[:, ::2], columns[:, 1::2])


def dense(w: Weights, name: str, x: Any) -> Any:
    return x.reshape(len(x), -1) @ w[f"{name}.weight"] + w[f"{name}.bias"]


def cnn(w: Weights, x: Any) -> Any:
    for name in ("conv1", "conv2"):
        x = jax.nn.relu(pooled(convolved(w, name, x, "VALID")))
    for name in ("fc1", "fc2"):
        x = jax.nn.relu(dense(w, name, x))
    return dense(w, "fc3", x)


def digits_cnn(w: Weights, x: Any) -> Any:
    x = jax.nn.relu(convolved(w, "conv1", x, "SAME"))
    x = jax.nn.relu(pooled(convolved(w, "conv2", x, "SAME")))
    return dense(w, "fc2", jax.nn.relu(dense(w, "fc1", x)))


def mlp(w: Weights, x: Any) -> Any:
    for name in ("fc1", "fc2"):
        x = jax.nn.relu(dense(w, name, x))
    return dense(w, "fc3", x)


NETWORKS: dict[str, Network] = {"CNN": cnn, "DigitsCNN": digits_cnn, "MLP": mlp}


class Axes:
    """Which axes of weights change places between PyTorch and JAX.

    Parameters
    ----------
    weights : mapping
        A ``state_dict`` as NumPy arrays. The layer "fc1" reads flattened images: (C, H, W) in
        PyTorch, (H, W, C) in JAX.
    channels : int
        Channels of an image.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], channels: int) -> None:
        convolutions = [w for w in weights.values() if w.ndim == 4]
        self.channels = len(convolutions[-1]) if convolutions else channels

    def to_jax(self, name: str, weight: np.ndarray) -> np.ndarray:
        if name == "fc1.weight":
            split = weight.reshape(len(weight), self.channels, -1)
            return split.transpose(2, 1, 0).reshape(-1, len(weight))
        return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T

    def to_torch(self, name: str, weight: np.ndarray) -> np.ndarray:
        if name == "fc1.weight":
            units = weight.shape[1]
            return weight.reshape(-1, self.channels, units).transpose(2, 1, 0).reshape(units, -1)
        return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T


class Images:
    """One client's images of one round, as FedJAX asks for them.

    Parameters
    ----------
    client : Client
        Whose.
    alike : bool
        Fill all mini-batches up to the full size; otherwise to the next power of two. Each size is
        compiled once; what fills up has no weight.
    """

    def __init__(self, client: Client, *, alike: bool) -> None:
        self.client, self.alike = client, alike

    def __len__(self) -> int:
        return len(self.client)

    def shuffle_repeat_batch(
        self, hparams: fedjax.ShuffleRepeatBatchHParams
    ) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.client:
            images, labels = batch.images.permute(0, 2, 3, 1).numpy(), batch.targets.numpy()
            full, many = hparams.batch_size, len(labels)
            size = full if self.alike else min(full, 1 << (many - 1).bit_length())
            filler = size - many
            yield {
                "x": np.pad(images, ((0, filler), (0, 0), (0, 0), (0, 0))),
                "y": np.pad(labels, (0, filler)),
                fedjax.EXAMPLE_MASK_KEY: np.arange(size) < many,
            }


def compete(folder: Path, way: str, workers: int) -> None:
    """Serve rounds: jit on XLA's own threads, or pmap over devices, as many as workers."""
    devices = way == "devices"
    if devices:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={workers}"
    fedjax.set_for_each_client_backend("pmap" if devices else "jit")
    handed = Handed(folder)
    assert not handed.bf16
    network = NETWORKS[handed.network.__name__]
    weights = {name: tensor.numpy() for name, tensor in handed.weights.items()}
    axes = Axes(weights, handed.shape[0])

    def losses(w: Weights, batch: Mapping[str, Any], rng: Any) -> Any:
        scores = jax.nn.log_softmax(network(w, batch["x"]))
        return -jnp.take_along_axis(scores, batch["y"][:, None], 1)[:, 0]

    decay = handed.weight_decay / 2  # its gradient is then the weight's decay
    algorithm = fed_avg.federated_averaging(
        fedjax.grad(losses, fedjax.regularizers.l2_regularizer(decay) if decay else None),
        fedjax.optimizers.sgd(handed.lr),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=handed.work.batch_size),
    )
    start = {name: jnp.array(axes.to_jax(name, w)) for name, w in weights.items()}
    state, number, key = algorithm.init(start), 0, jax.random.PRNGKey(0)

    def play() -> float:
        nonlocal state, number
        begin = time.perf_counter()
        number += 1
        clients = [
            (str(c).encode(), Images(handed.client(number, c), alike=devices), key)
            for c in handed.cohort(number)
        ]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        return time.perf_counter() - begin

    def save(path: str) -> None:
        named: dict[str, Any] = {
            k: axes.to_torch(k, np.asarray(v)) for k, v in state.params.items()
        }
        np.savez(path, **named)  # of a NumPy before 2.1, which knows no allow_pickle

    serve(play, save)
