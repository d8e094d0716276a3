"""The local loop of a whole cohort as one program: K clients, one step at a time, as (K, P).

A client with fewer steps stands still at the end, a short mini-batch is masked, so every tensor
keeps its shape and a step can be captured in a CUDA graph. The clients may belong to several
runs: whatever their methods differ in becomes a column with one number a client.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedsam.base.errors import UsageError
from fedsam.base.timers import timed
from fedsam.data.packed import Packing
from fedsam.data.partition import Partition
from fedsam.data.plan import Plan
from fedsam.training import batchnorm
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import ClientJob, Failed, Trainer, attempt
from fedsam.training.loop import Result, one_step
from fedsam.training.method import Local, Method, Vectors

log = logging.getLogger("fedsam")
Thing = TypeVar("Thing")
PLAIN = (bool, int, float, str, type(None))


class Program:
    """The round of K clients on fixed buffers.

    Parameters
    ----------
    trainers : sequence of Trainer
        Of each client's run; all with one model, task, data set and mini-batch shape.
    gradients : type
        How gradients are computed: ``Slots`` or ``Vmapped``.
    capture : bool
        Replay the step from a CUDA graph.

    Raises
    ------
    UsageError
        If the runs' methods differ in more than numbers.
    """

    def __init__(
        self, trainers: Sequence[Trainer], gradients: type[Slots | Vmapped], *, capture: bool
    ) -> None:
        first = trainers[0]
        self.trainers = trainers
        self.source = first.train
        self.layout = first.layout
        self.packing = Packing(first.work)
        self.augmentations = first.work.augmentations
        clients = len(trainers)
        steps, width = (max(sizes) for sizes in zip(*map(_shape, trainers), strict=True))
        most = max(int(trainer.partition.sizes.max()) for trainer in trainers)
        self.images = self.source.room(clients * min(most, steps * width))  # a graph knows where
        device, dtype, P = self.layout.device, self.layout.dtype, self.layout.trainable
        shape = (self.packing.planes, clients, steps, width)
        pinned = device.type == "cuda"
        # two: the next round's plans are drawn while the copy of this round's may be under way
        self._drawn = [torch.zeros(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self.plans = torch.zeros(shape, dtype=torch.int32, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.steps = torch.zeros(clients, 1, dtype=torch.int64, device=device)
        self.round = torch.zeros(clients, 1, dtype=torch.int64, device=device)
        self.lr = torch.zeros(clients, 1, dtype=dtype, device=device)
        self.states = torch.zeros(clients, self.layout.size, dtype=dtype, device=device)
        self.w = torch.zeros(clients, P, dtype=dtype, device=device)
        self.anchor = torch.zeros_like(self.w)
        self.losses = torch.zeros(clients, dtype=dtype, device=device)
        self.methods = [t.method for t in trainers]
        self.method = stacked(self.methods, self.w)
        self.memory = {name: torch.zeros_like(self.w) for name in self.method.memory}
        self.sent = {name: torch.zeros_like(self.w) for name in self.method.exchanged}
        self.local = Local(
            *(self.layout, self.anchor, self.round, self.lr),
            *(self.steps, self.memory, self.sent, self.step),
        )
        self.gradients = gradients(first, clients)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._captures = capture
        self._phase: list[Method] = []
        self._jobs: Sequence[ClientJob] = []

    @timed("hand a cohort to the device")
    def begin(self, jobs: Sequence[ClientJob], plans: Sequence[Plan]) -> None:
        """Hand all steps of a round to the device; does not wait for a GPU."""
        self._jobs = jobs
        self._drawn.reverse()
        self.packing.pack(self._at_hand(plans), self._drawn[0])
        lengths = [len(plan) for plan in plans]
        phase = [method.at(job.round) for method, job in zip(self.methods, jobs, strict=True)]
        if phase != self._phase:
            self._take_up(phase)
            if self._captures:
                self._load(jobs, lengths)
                self._record()
        self._load(jobs, lengths)
        for _ in range(max(lengths)):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()

    @timed("wait for the device")
    def end(self) -> list[Result]:
        """Return what each client of the round that was begun returns; waits for the device."""
        states = torch.cat([self.w, self.states[:, self.layout.trainable :]], 1)
        memory, reply = self.method.finish(self.w, replace(self.local, state=self.state))
        losses, steps = (self.losses / self.steps[:, 0]).tolist(), self.steps[:, 0].tolist()
        return [
            Result(
                *(states[k], len(trainer.rows(job.client, job.round)), steps[k]),
                *(losses[k], _row(memory, k), _row(reply, k)),
            )
            for k, (trainer, job) in enumerate(zip(self.trainers, self._jobs, strict=True))
        ]

    def _at_hand(self, plans: Sequence[Plan]) -> Sequence[Plan]:
        """Bring the images that plans take to the device; return the plans by their new rows."""
        if self.images is self.source:
            return plans
        moved, begin = [], 0
        for plan in plans:
            images, at_hand = self.source.at_hand(plan)
            self.images.put(begin, images)
            moved.append(at_hand.at(at_hand.indices + begin))
            begin += len(images)
        return moved

    def _take_up(self, phase: list[Method]) -> None:
        """Train by these methods from now on: the first round's, or those after a switch."""
        self._phase, self.graph = phase, None
        self.method = stacked(phase, self.w)
        self.base = self.method.base_state(self.w)
        self.state = self.method.minimizer_state(self.w)

    def _load(self, jobs: Sequence[ClientJob], lengths: Sequence[int]) -> None:
        self.plans.copy_(self._drawn[0], non_blocking=True)
        self.step.zero_()
        for buffer, numbers in (
            (self.steps, lengths),
            (self.round, [job.round for job in jobs]),
            (self.lr, [job.lr for job in jobs]),
        ):
            column = torch.tensor(numbers, dtype=buffer.dtype)[:, None]
            buffer.copy_(column, non_blocking=True)
        torch.stack([job.state for job in jobs], out=self.states)
        self.w.copy_(self.states[:, : self.layout.trainable])
        self.anchor.copy_(self.w)
        for buffer in (*self.base.values(), *self.state.values()):
            buffer.zero_()
        self.losses.zero_()
        for name, buffer in self.memory.items():
            _fill(buffer, name, [job.memory for job in jobs])
        for name, buffer in self.sent.items():
            _fill(buffer, name, [job.sent for job in jobs])
        self.gradients.load(self.states)

    def _step(self) -> None:
        """Do one step of every client that still has one."""
        rows = self.plans.index_select(2, self.step).squeeze(2)
        batch = self.images.take(self.packing.choices(rows), self.augmentations)
        local = replace(self.local, state=MappingProxyType(self.state))
        w, state, base, loss = one_step(
            self.method, self.gradients, batch, self.w, local, self.base
        )
        active = self.step < self.steps
        self.w.copy_(torch.where(active, w, self.w))
        for name, buffer in self.base.items():
            buffer.copy_(base[name])
        for name, buffer in self.state.items():  # what it ends with may be remembered
            buffer.copy_(torch.where(active, state[name], buffer))
        if loss is not None:
            self.losses.add_(torch.where(active[:, 0], loss, 0))
        self.step.add_(1)

    def _record(self) -> None:
        """Capture the step, after a few on a side stream as PyTorch asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.step.zero_()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("cohort: without a CUDA graph, step by step: %s", reason)
        else:
            self.graph = graph


def why_not(trainers: Sequence[Trainer], gradients: type[Slots | Vmapped], round: int = 1) -> str:
    """Return why clients cannot be trained as one program in a round; "" if they can.

    First what says so: a part of the method, or a layer of the model. Neither can say that a
    formula is not over the last dimension, or that a forward pass of the user's mixes images, and
    then the numbers would be wrong in silence; so what nothing speaks against is compared once.

    Parameters
    ----------
    trainers : sequence of Trainer
        One of each run that shares the program.
    gradients : type
        How gradients are to be computed.
    round : int
        Whose method is meant.
    """
    return declared(trainers[0], round) or compared(trainers, gradients, round)


def declared(trainer: Trainer, round: int) -> str:
    """Return which part of the method, or layer of the model, says that it trains one by one."""
    for axis, part in trainer.method.at(round).axes.items():
        if not part.batchable:
            return f"{axis} {type(part).__name__} says that it is not batchable"
    if trainer.draws:
        return "the model draws random numbers (dropout): clients would draw others than one by one"
    if trainer.changes:
        return "the model changes its buffers in training: padding would enter them (BatchNorm)"
    for layer in trainer.new_network().module.modules():
        if isinstance(layer, _BatchNorm) and not batchnorm.frozen(layer):
            return "BatchNorm: the padding of a short mini-batch would enter its statistics"
        if not getattr(layer, "batchable", True):  # of the user's own: PyTorch's have no such thing
            return f"--model: {type(layer).__name__} says that it is not batchable"
    return ""


def compared(trainers: Sequence[Trainer], gradients: type[Slots | Vmapped], round: int) -> str:
    """Return how the results of two steps differ from those one by one, or why there are none.

    Two clients or more, at least one of each run, one of them with a short mini-batch and one step
    less than the next.
    """
    images = min(5, len(trainers[0].train))
    rows = torch.arange(images)
    partition = Partition(rows, torch.tensor([0, (images + 1) // 2, images]))
    work = replace(trainers[0].work, batch_size=2, local_epochs=1.0, local_steps=0, drop_last=False)
    pair = trainers if len(trainers) > 1 else [trainers[0]] * 2
    small = [replace(t, partition=partition, work=work, lifelong=None, compiled=None) for t in pair]
    network = small[0].new_network()
    state = network.state.clone()
    jobs = [ClientJob(number % 2, state, round, 0.01) for number in range(len(small))]
    plans = [t.plan(job.client, job.round) for t, job in zip(small, jobs, strict=True)]
    alone = []
    for trainer, job in zip(small, jobs, strict=True):
        result = attempt(trainer, network, job)
        if isinstance(result, Failed):
            return result.reason
        alone.append(result)
    program = Program(small, gradients, capture=False)
    try:
        program.begin(jobs, plans)
        together = program.end()
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        # no such operator under vmap, or what (K, P) brings where (P,) was meant
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if program.method is program.methods[0]:
            return reason
        return (
            f"{reason} (a number in which the runs differ is a column: no formula may branch on it)"
        )
    for one, other in zip(_vectors(alone, state), _vectors(together, state), strict=True):
        size, apart = float(one.norm()), float((one - other).norm())
        if apart > (0.05 if trainers[0].bf16 else 0.01) * size:
            return (
                "its model or method mixes what is separate: a result differs by "
                f"{apart / size if size else 1:.0%} (batch statistics, dropout, or a formula not "
                "over the last dimension)"
            )
    return ""


def _vectors(results: Sequence[Result], start: Tensor) -> list[Tensor]:
    """Return the updates of clients that began at ``start``, and all else that they return."""
    names = [[r.state - start, *r.memory.values(), *r.reply.values()] for r in results]
    return [torch.stack(vectors) for vectors in zip(*names, strict=True)]


def stacked(things: Sequence[Thing], like: Tensor) -> Thing:
    """Return one object for K: numbers in which they differ become (K, 1) tensors.

    Parameters
    ----------
    things : sequence
        K objects of one class.
    like : Tensor
        Whose dtype and device the tensors get.

    Raises
    ------
    UsageError
        If they differ in more than numbers.
    """
    first = things[0]
    if all(thing is first for thing in things):
        return first
    kinds = {type(thing) for thing in things}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UsageError(f"runs in one program: their methods are of different kinds: {names}")
    merged = copy.copy(first)
    for name, value in vars(first).items():
        values = [vars(thing)[name] for thing in things]
        if all(v is value or (isinstance(v, PLAIN) and v == value) for v in values):
            continue
        if isinstance(value, float):
            column: object = torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
        elif isinstance(value, PLAIN):
            raise UsageError(
                f"runs in one program: {type(first).__name__} has {name} {values}; only real "
                "numbers may differ"
            )
        else:
            column = stacked(values, like)
        object.__setattr__(merged, name, column)  # a Method is frozen
    return merged


def _row(vectors: Vectors, k: int) -> dict[str, Tensor]:
    return {name: vector[k].clone() for name, vector in vectors.items()}


def _fill(buffer: Tensor, name: str, given: Sequence[Vectors | None]) -> None:
    """Write a vector of each client into the rows of a buffer; zeros where it has none."""
    for row, vectors in zip(buffer, given, strict=True):
        row.copy_(vectors[name]) if vectors else row.zero_()


def _shape(trainer: Trainer) -> tuple[int, int]:
    """Return the steps and the mini-batch of a run's largest client."""
    most = int(trainer.partition.sizes.max())
    return trainer.work.steps(most), max(trainer.work.cut(most), default=0)
