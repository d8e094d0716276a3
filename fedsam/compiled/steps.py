"""A client's local step, traced once as one graph and compiled to machine code for all clients.

A step is a pure function of w, a mini-batch and a few numbers, whatever the method: it is run once
on tensors that hold nothing, the operations that it does are written down (gradients and all), and
PyTorch's inductor makes C++ of them. What changes from step to step is an input, also the learning
rate, the round and the step, so that nothing is compiled again. What was compiled lies on the disk
for the next run.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from fedsam.base.errors import UsageError, one_line
from fedsam.base.timers import timed
from fedsam.base.vector import Layout
from fedsam.compiled.convolution import TABLE
from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.batched_gradient import Functional
from fedsam.training.flat_module import FlatModule
from fedsam.training.gradient import Gradients
from fedsam.training.loop import Step, Stepper, one_step
from fedsam.training.method import Local, Loss, Method, Vectors

log = logging.getLogger("fedsam")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # PyTorch's own name for where its compiled code lies
PROGRAMS = 24  # methods and shapes of a run: more, and something is another one in every round
TOLERANCE = {False: 0.01, True: 0.05}  # of an update, without and with bf16
COMPILING = Lock()  # once at a time in a process: what tracers and inductor set is the process's
Compiled = Callable[..., Sequence[Tensor]]


class Program(NamedTuple):
    """A compiled step, and whether it returns a loss."""

    run: Compiled
    has_loss: bool


class CompiledSteps:
    """The steps of a run's clients, compiled when they are needed first; any thread may ask.

    Mini-batches are padded: to the largest of the run, or to its half, a quarter, ..., so that
    there are few programs and at most every second image is in vain.

    Parameters
    ----------
    module : nn.Module
        Taken over; its values do not matter.
    task : Task
        What its output means.
    width : int
        Images of the largest mini-batch.
    bf16 : bool
        Run the forward pass under autocast to bfloat16.
    backend : callable
        From a graph and its inputs to something that computes it; inductor, if None.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        width: int,
        *,
        bf16: bool = False,
        backend: Callable[[Any, list[Tensor]], Compiled] | None = None,
    ) -> None:
        self.network = FlatModule(module, bf16=bf16)
        self.layout = self.network.layout
        self.task = task
        self.width = width
        self.backend = backend or by_inductor
        self.refused = ""  # why steps are not compiled any more
        self._programs: dict[Any, Program] = {}

    def __call__(self, state: Tensor) -> Stepper:
        """Return what does the steps of a client that begins with ``state`` (S,)."""

        def step(
            method: Method,
            gradients: Gradients,
            batch: Batch,
            w: Tensor,
            local: Local,
            base: Vectors,
        ) -> Step:
            done = None if self.refused else self._step(state, method, batch, w, local, base)
            return done or one_step(method, gradients, batch, w, local, base)

        return step

    @timed("compiled steps")
    def _step(
        self, state: Tensor, method: Method, batch: Batch, w: Tensor, local: Local, base: Vectors
    ) -> Step | None:
        padded = self._padded(batch)
        images = tensors_of(padded)
        shapes = tuple((name, t.shape, t.dtype) for name, t in images.items())
        key = method, shapes, self.layout.dtype
        if key not in self._programs:
            self._compile(key, state, method, batch, w, local, base)
        if (program := self._programs.get(key)) is None:
            return None
        inputs = flat_inputs(state, self.layout, images, w, local, base)
        with torch.no_grad():
            outputs = list(program.run(*inputs))
        loss = outputs.pop() if program.has_loss else None
        after = dict(zip(sorted(local.state), outputs[1:], strict=False))
        base = dict(zip(sorted(base), outputs[1 + len(after) :], strict=True))
        return Step(outputs[0], after, base, loss)

    def _padded(self, batch: Batch) -> Batch:
        """Return a mini-batch of one of few lengths, which says which of its images are some."""
        length, width = len(batch.targets), self.width
        while length <= width // 2:
            width //= 2
        valid = torch.arange(width, device=batch.targets.device) < length

        def of_width(tensor: Tensor) -> Tensor:
            if length == width:
                return tensor
            return torch.cat([tensor, tensor[:1].expand(width - length, *tensor.shape[1:])])

        padded = batch.map(of_width)
        images = padded.images.contiguous(memory_format=torch.channels_last)
        return replace(padded, images=images, valid=valid)

    def _compile(
        self,
        key: Any,
        state: Tensor,
        method: Method,
        batch: Batch,
        w: Tensor,
        local: Local,
        base: Vectors,
    ) -> None:
        """Compile the step of a method on a mini-batch's shape; or say why not, once."""
        with COMPILING:
            if key in self._programs or self.refused:
                return
            try:
                if len(self._programs) == PROGRAMS:
                    raise ValueError(f"{PROGRAMS} programs for one run: each round has its own")
                program = self._traced(state, method, self._padded(batch), w, local, base)
                self._check(program, state, method, batch, w, local, base)
            except UsageError:
                raise
            except Exception as error:
                self.refused = one_line(error) or type(error).__name__
                log.warning("compile: steps stay as they are: %s", self.refused)
                log.debug("compile", exc_info=True)
            else:
                self._programs[key] = program

    def _traced(
        self, state: Tensor, method: Method, padded: Batch, w: Tensor, local: Local, base: Vectors
    ) -> Program:
        """Return the step of a method on a mini-batch's shape, compiled."""
        from torch.fx.experimental.proxy_tensor import make_fx

        for axis, part in method.axes.items():
            if not part.batchable:
                raise ValueError(f"{axis} {type(part).__name__} says that it is not batchable")
        has_loss: list[bool] = []
        images, carried = tensors_of(padded), len(state) > self.layout.trainable
        names = (sorted(v) for v in (local.memory, local.sent, local.state, base))
        memory, sent, kept, of_base = names

        def step(*inputs: Tensor) -> list[Tensor]:
            values = iter(inputs)
            w, anchor, lr, round, steps, number = (next(values) for _ in range(6))
            behind = next(values) if carried else None
            vectors = [{name: next(values) for name in of} for of in (memory, sent, kept, of_base)]
            tensors: dict[str, Any] = {name: next(values) for name in images}
            of_step = replace(padded, **tensors)
            known = Local(
                *(self.layout, anchor, round, lr, steps),
                memory=vectors[0],
                sent=vectors[1],
                step=number,
                state=vectors[2],
            )
            gradients = partial(self._gradient, behind)
            done = one_step(method, gradients, of_step, w, known, vectors[3])
            outputs = [done.w, *(done.state[name] for name in kept)]
            outputs += [done.base[name] for name in of_base]
            has_loss.append(done.loss is not None)
            return outputs if done.loss is None else [*outputs, done.loss]

        _ = self.layout.weights, self.layout._sizes  # no tensor is made while others are traced
        # copies: a tracer takes two inputs that are one tensor for one, as w is the anchor once
        inputs = [t.clone() for t in flat_inputs(state, self.layout, images, w, local, base)]
        self.network.module.train()
        table = TABLE if self.layout.device.type == "cpu" else {}
        with torch.no_grad():
            graph = make_fx(
                step,
                tracing_mode="fake",
                decomposition_table=table,
                _allow_non_fake_inputs=True,  # what is frozen, and the layout's own: constants
            )(*inputs)
            return Program(self.backend(graph, inputs), has_loss[0])

    def _gradient(
        self, behind: Tensor | None, w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return loss and gradient (P,) at ``w``, as operations that can be traced."""
        layout = self.layout
        state = w if behind is None else torch.cat([w, behind])
        trained = {entry.name: entry.view(w) for entry in layout.parameters}
        shared = {entry.offset for entry in layout.parameters}
        others = {
            entry.name: entry.read(state)
            for entry in layout.entries
            if entry.offset >= layout.trainable and entry.offset not in shared
        }

        def value(parameters: dict[str, Tensor]) -> Tensor:
            model = Functional(self.network.module, parameters | others, layout, self.network.bf16)
            return loss.value(model, batch, self.task)

        by_name, mean = grad_and_value(value)(trained)
        return mean, layout.concatenate([by_name[entry.name] for entry in layout.parameters])

    def _check(
        self,
        program: Program,
        state: Tensor,
        method: Method,
        batch: Batch,
        w: Tensor,
        local: Local,
        base: Vectors,
    ) -> None:
        """Raise ValueError if a step on the first images is not what it is without the compiler.

        What only Python sees is frozen in a program, and a model that mixes images would see those
        that a short mini-batch is padded with.
        """
        length = len(batch.targets)
        least = max(method.least, len(self._padded(batch).targets) // 2 + 1)
        few = batch.map(lambda tensor: tensor[: max(least, length - 1)])
        network = self.network

        def gradients(
            w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
        ) -> tuple[Tensor, Tensor]:
            return network.gradient(w, lambda m: loss.value(m, batch, self.task), frozen=frozen)

        network.load(state)
        network.module.train()
        plain = one_step(method, gradients, few, w, local, base)
        inputs = flat_inputs(state, self.layout, tensors_of(self._padded(few)), w, local, base)
        with torch.no_grad():
            ours = program.run(*inputs)
        wanted = [plain.w, *(plain.state[name] for name in sorted(plain.state))]
        begun = [w, *(local.state[name] for name in sorted(plain.state))]
        for before, one, other in zip(begun, wanted, ours, strict=False):
            size, apart = float((one - before).norm()), float((one - other).norm())
            if not apart <= TOLERANCE[network.bf16] * size:
                raise ValueError(
                    "model or method mixes images, or has a memory of its own: a step differs by "
                    f"{apart / size if size else 1:.0%}"
                )


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a mini-batch by name."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def flat_inputs(
    state: Tensor,
    layout: Layout,
    images: Mapping[str, Tensor],
    w: Tensor,
    local: Local,
    base: Vectors,
) -> list[Tensor]:
    """Return what a compiled step takes, in its order; a number is a tensor (1,)."""
    whole = partial(torch.tensor, device=layout.device)
    numbers = [
        whole([local.lr], dtype=layout.dtype),
        *(whole([number]) for number in (local.round, local.steps, local.step)),
    ]
    behind = [state[layout.trainable :]] if len(state) > layout.trainable else []
    vectors = [
        of[name] for of in (local.memory, local.sent, local.state, base) for name in sorted(of)
    ]
    return [w, local.anchor, *numbers, *behind, *vectors, *images.values()]


def by_inductor(graph: Any, inputs: list[Tensor]) -> Compiled:
    """Return the compiled graph, from the disk where it was compiled before."""
    from torch._inductor import config, standalone_compile

    # one thread computes, whoever compiles; no pool of compiling processes, which a fork would lose
    with config.patch({"compile_threads": 1, "cpp.threads": 1}):
        compiled: Compiled = standalone_compile(
            graph, [*inputs], dynamic_shapes="from_example_inputs"
        )
    return compiled


def prepare_compiler(device: torch.device) -> None:
    """Let compiled code lie in a folder that survives; call it before anything is compiled.

    That of ``TORCHINDUCTOR_CACHE_DIR``, or ``fedsam/compiled`` in the user's cache folder.

    Raises
    ------
    UsageError
        If nothing can be written there, or this machine has no C++ compiler.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.setdefault(FOLDER, str(home / "fedsam" / "compiled")))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"--compile: cannot write to {folder}; let {FOLDER} name another folder")
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "--compile: there is no C++ compiler; install g++, or let CXX name one"
        ) from error
