"""Models as flat vectors: the layout of w, and the few vector operations every formula uses.

The state of a model is one tensor whose LAST dimension holds first the P trainable parameters,
called w, and behind them the values that are carried but never trained (BatchNorm statistics).
One client's state is (S,), that of a cohort of K clients (K, S). Norms and dot products are taken
over the last dimension with ``keepdim``, so that one text serves both. Parameters that need no
gradient are frozen: the module holds them, no state does, so that nothing sends or averages them.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

CLIPPING = 1e-6  # added to a norm that is clipped; the constant of PyTorch's clip_grad_norm_
MEAN, VAR = "running_mean", "running_var"  # PyTorch's names of a norm layer's statistics
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
TINY = 1e-16  # keeps 0 / 0 at 0; the constant of the official SAM, ASAM and FedSAM code


def norm(v: Tensor) -> Tensor:
    """Return the l2 norm of ``v`` (..., P) over its last dimension, as (..., 1)."""
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """Return the inner product of ``u`` and ``v`` (..., P) over the last dimension, as (..., 1)."""
    return (u * v).sum(-1, keepdim=True)


def unit(v: Tensor) -> Tensor:
    """Return ``v / ||v||`` over the last dimension; the zero vector stays zero."""
    return v / (norm(v) + TINY)


def clipped(v: Tensor, length: float | Tensor) -> Tensor:
    """Return ``v`` (..., P), scaled down to ``length`` where its l2 norm is larger.

    The numbers of ``torch.nn.utils.clip_grad_norm_``. A length for each client of a cohort is
    (K, 1); where it is 0, ``v`` is as it was.
    """
    share = (length / (norm(v) + CLIPPING)).clamp(max=1)
    if isinstance(length, Tensor):
        share = torch.where(length > 0, share, 1.0)
    return share * v


def choose(condition: bool | Tensor, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """Return ``yes()`` where the condition holds, else ``no()``.

    A bool computes only one of them. A tensor, as in a batched cohort, costs both: a captured step
    is the same program every time.
    """
    if isinstance(condition, Tensor):
        return torch.where(condition, yes(), no())
    return yes() if condition else no()


def along(w: Tensor, step: float | Tensor, v: Tensor) -> Tensor:
    """Return ``w + step v`` in one pass; a step for each client of a cohort is (K, 1)."""
    if isinstance(step, Tensor):
        return torch.addcmul(w, v, step)
    return torch.add(w, v, alpha=step)


def weighted_mean(vectors: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    """Return ``sum_k n_k v_k / sum_k n_k``.

    Parameters
    ----------
    vectors : sequence of Tensor, or Tensor
        K vectors (S,), or the rows of a (K, S) tensor.
    weights : sequence of float
        K non-negative weights, e.g. numbers of examples; not all zero.

    Returns
    -------
    Tensor
        A new tensor (S,). The vectors are added in their order, element by element, so the result
        does not depend on how a matrix product would block the sum.
    """
    total = math.fsum(weights)
    mean = vectors[0] * (weights[0] / total)
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        mean.add_(vector, alpha=weight / total)
    return mean


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean (S,) of K vectors that count the same, a new tensor."""
    return weighted_mean(vectors, [1.0] * len(vectors))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of tensors' names, dtypes, shapes and values; "" of none."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest() if tensors else ""


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: where it lies in the state vector and what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def channels_last(self) -> bool:
        """Convolution weights lie in the vector as (out, height, width, in)."""
        return len(self.shape) == 4

    def view(self, state: Tensor) -> Tensor:
        """Return this tensor as a view of ``state`` (..., S), in the state's dtype."""
        flat = state[..., self.offset : self.offset + self.size]
        lead = state.shape[:-1]
        if not self.channels_last:
            return flat.view((*lead, *self.shape))
        out, into, height, width = self.shape
        return flat.view((*lead, out, height, width, into)).movedim(-1, -3)

    def flat(self, tensor: Tensor) -> Tensor:
        """Return the elements of ``tensor`` (..., shape) in the vector's order, (..., size)."""
        lead = tensor.shape[: tensor.dim() - len(self.shape)]
        return (tensor.movedim(-3, -1) if self.channels_last else tensor).reshape(*lead, self.size)

    def read(self, state: Tensor) -> Tensor:
        """Return this tensor in its own dtype; integers come back as integers, rounded."""
        view = self.view(state)
        if self.dtype.is_floating_point:
            return view.to(self.dtype)
        return view.round().to(self.dtype)


def is_frozen(tensor: Tensor) -> bool:
    """Return whether it is a parameter that needs no gradient."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


class Layout:
    """Name, shape, dtype and offset of every tensor in a state vector.

    Parameters
    ----------
    entries : sequence of Entry
        In the order of the model's ``state_dict``; two names of one shared tensor have one offset.
    trainable : int
        P: the first P elements of the state are w.
    dtype : torch.dtype
        Of the state vector.
    device : torch.device
        Where state vectors live.
    frozen : mapping
        The tensors that no state holds, by name: all modules of a process share them.

    Attributes
    ----------
    size : int
        S, the length of the state.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        trainable: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        frozen: Mapping[str, Tensor] = NOTHING,
    ) -> None:
        self.entries = tuple(entries)
        self.trainable = trainable
        self.dtype = dtype
        self.device = torch.device(device)
        self.frozen = frozen
        self.size = max((e.offset + e.size for e in self.entries), default=0)

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        """Return the layout of ``module``: trainable parameters first, buffers behind them."""
        every = module.state_dict(keep_vars=True)
        frozen = {name: t.detach() for name, t in every.items() if is_frozen(t)}
        tensors = {name: t for name, t in every.items() if name not in frozen}
        trained = [t for t in tensors.values() if t.requires_grad]
        if not trained:
            raise ValueError("the model has no trainable parameter")
        offsets: dict[int, int] = {}
        end = 0
        for wanted in (True, False):
            for tensor in tensors.values():
                if tensor.requires_grad is wanted and id(tensor) not in offsets:
                    offsets[id(tensor)] = end
                    end += tensor.numel()
            if wanted:
                trainable = end
        entries = [
            Entry(name, tuple(t.shape), t.dtype, offsets[id(t)]) for name, t in tensors.items()
        ]
        return cls(entries, trainable, trained[0].dtype, trained[0].device, frozen)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and self.entries == other.entries
            and self.trainable == other.trainable
            and self.dtype == other.dtype
        )

    def __hash__(self) -> int:
        return hash((self.entries, self.trainable))

    @cached_property
    def weights(self) -> Tensor:
        """Boolean (P,): True where the parameter's NAME holds "weight".

        The rule of the official ASAM and FedSAM code: convolutions, linear layers and the scales
        of norm layers are weights; biases, class tokens and position embeddings are not.
        """
        mask = torch.zeros(self.trainable, dtype=torch.bool)
        for entry in self.entries:
            if "weight" in entry.name and entry.offset < self.trainable:
                mask[entry.offset : entry.offset + entry.size] = True
        return mask.to(self.device)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Where in a state the running means lie, int64 (C,), and where their variances do."""
        carried = {e.name: e for e in self.entries if e.offset >= self.trainable}
        layers = [name.removesuffix(MEAN) for name in carried if name.rpartition(".")[2] == MEAN]
        both = [layer for layer in layers if layer + VAR in carried]
        means, variances = ([carried[layer + name] for layer in both] for name in (MEAN, VAR))
        return self._places(means), self._places(variances)

    @cached_property
    def carried(self) -> Tensor:
        """Where in a state the floating numbers behind w lie, int64 (C,): no counters."""
        behind = {e.offset: e for e in self.entries if e.offset >= self.trainable}
        return self._places([e for e in behind.values() if e.dtype.is_floating_point])

    def _places(self, entries: Sequence[Entry]) -> Tensor:
        places = [torch.arange(e.offset, e.offset + e.size) for e in entries]
        return torch.cat([torch.empty(0, dtype=torch.long), *places]).to(self.device)

    @cached_property
    def parameters(self) -> tuple[Entry, ...]:
        """The trainable entries in order of offset; a shared tensor stands once."""
        trainable = {e.offset: e for e in self.entries if e.offset < self.trainable}
        return tuple(trainable[offset] for offset in sorted(trainable))

    def sum_by_tensor(self, v: Tensor) -> Tensor:
        """Sum ``v`` (..., P) within each parameter tensor; returns (..., number of tensors)."""
        parts = v.split([e.size for e in self.parameters], dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1)

    def filter_norms(self, w: Tensor) -> Tensor:
        """Return for each element of ``w`` (..., P) the l2 norm of its convolution filter.

        Where it is not part of one, its absolute value.
        """
        parts = []
        for entry in self.parameters:
            part = w[..., entry.offset : entry.offset + entry.size]
            if entry.channels_last:  # a filter lies in one piece
                filters = part.unflatten(-1, (entry.shape[0], -1))
                parts.append(norm(filters).expand_as(filters).flatten(-2))
            else:
                parts.append(part.abs())
        return torch.cat(parts, -1)

    def adaptive_scale(
        self, w: Tensor, eta: float, *, weights_only: bool = True, filterwise: bool = False
    ) -> Tensor:
        """Return ASAM's T (..., P) at ``w`` (..., P): what its ball is stretched by, |w| + eta.

        Parameters
        ----------
        w : Tensor
            (..., P).
        eta : float or Tensor
            Added to |w|, in units of w.
        weights_only : bool
            Let T be 1 on what is no weight by its name.
        filterwise : bool
            Let the l2 norm of its convolution filter stand for |w|.
        """
        T = (self.filter_norms(w) if filterwise else w.abs()) + eta
        return torch.where(self.weights, T, 1.0) if weights_only else T

    def filter_normalised(self, d: Tensor, w: Tensor) -> Tensor:
        """Return ``d`` (P,) with each filter as long as that of ``w`` (P,).

        A filter is what leads to one output: a slice of a tensor's first dimension, so the kernels
        of a convolution's channel or the row of a linear layer. Biases and the parameters of norm
        layers, which are vectors, become zero ("biasbn" in the official code of Li et al., NeurIPS
        2018).
        """
        parts = []
        for entry in self.parameters:
            end = entry.offset + entry.size
            if len(entry.shape) < 2:
                parts.append(torch.zeros_like(d[entry.offset : end]))
                continue
            filters = [v[entry.offset : end].view(entry.shape[0], -1) for v in (d, w)]
            parts.append((unit(filters[0]) * norm(filters[1])).flatten())
        return torch.cat(parts)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat one value a parameter tensor (..., tensors) over its elements, (..., P)."""
        return values.repeat_interleave(self._sizes, dim=-1, output_size=self.trainable)

    @cached_property
    def _sizes(self) -> Tensor:
        """Elements of each parameter tensor, on the device: a captured step may not make it."""
        return torch.tensor([e.size for e in self.parameters], device=self.device)

    @cached_property
    def digest(self) -> str:
        """Of what is frozen: the same in all processes of a run; "" where nothing is."""
        return digest(self.frozen)

    def read(self, state: Tensor) -> dict[str, Tensor]:
        """Return the part of the ``state_dict`` that ``state`` (S,) holds: views where they can be.

        In the state's dtype they are, others are copies.
        """
        return {entry.name: entry.read(state) for entry in self.entries}

    def whole(self, state: Tensor) -> dict[str, Tensor]:
        """Return the ``state_dict`` of the model ``state`` (S,), with what is frozen."""
        return {**self.read(state), **self.frozen}

    def write(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a new state (S,) with the values of a ``state_dict``; it holds nothing frozen.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a shape differs.
        """
        names = {entry.name for entry in self.entries}
        if wrong := sorted(names.symmetric_difference(set(tensors) - set(self.frozen))):
            raise ValueError(f"the model's tensors and the given ones differ in {wrong[0]!r}")
        state = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for entry in self.entries:
            tensor = tensors[entry.name]
            if tuple(tensor.shape) != entry.shape:
                shape = tuple(tensor.shape)
                raise ValueError(f"{entry.name!r} has shape {shape}, the model's is {entry.shape}")
            entry.view(state).copy_(tensor)
        return state

    def concatenate(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return one gradient for each of ``parameters`` as one new vector (P,)."""
        pairs = zip(self._channels_last, gradients, strict=True)
        return torch.cat([(g.movedim(1, -1) if last else g).reshape(-1) for last, g in pairs])

    @cached_property
    def _channels_last(self) -> tuple[bool, ...]:
        """Which of ``parameters`` lie as channels-last."""
        return tuple(entry.channels_last for entry in self.parameters)
