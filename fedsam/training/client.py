"""All that a client needs to train, in one place, so that any engine can host any client."""

import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedsam.base.errors import TrainingError, UsageError
from fedsam.base.randomness import global_streams, numpy_generator, torch_generator
from fedsam.base.timers import timed
from fedsam.base.vector import Layout
from fedsam.data.groups import Groups
from fedsam.data.images import Images
from fedsam.data.lifelong import Lifelong
from fedsam.data.partition import Partition
from fedsam.data.plan import Plan, Work, make_plan
from fedsam.tasks import Task
from fedsam.training.evaluation import statistics_by_group
from fedsam.training.flat_module import FlatModule
from fedsam.training.loop import Result, Stepper, one_step, train_client
from fedsam.training.method import Method, Vectors

log = logging.getLogger("fedsam")
STATISTICS = "statistics"  # in a client's memory: its own values behind w


class ClientJob(NamedTuple):
    """One client's round: who, from which global state (S,), which round, at what rate.

    ``memory`` is what the client kept from its last round (None: it has not trained yet), ``sent``
    what came beside the state (None: the first round); vectors (P,) by name, but for those that
    stay with the client behind w (S - P,).
    """

    client: int
    state: Tensor
    round: int
    lr: float
    memory: Vectors | None = None
    sent: Vectors | None = None


class Asked(NamedTuple):
    """What a client is asked for in a round: how many images it trains on, how many steps."""

    examples: int
    steps: int


class Failed(NamedTuple):
    """A client that did not come to return anything, and why; with what its own code raised."""

    reason: str
    error: Exception | None = None


class Beside(NamedTuple):
    """Images that are neither trained on nor of the test set, and groups of their rows by name."""

    images: Images
    groups: Groups


@dataclass(frozen=True)
class Trainer:
    """Data, split, model and method of a run's clients.

    Attributes
    ----------
    train, test : Images
        On the training device.
    partition : Partition
        Which images are whose.
    new_module : callable
        Returns a new model on the training device; its values do not matter.
    layout : Layout
        Of that model.
    method : Method
        Minimizer, correction, loss and base optimiser.
    task : Task
        What the model's output means.
    work : Work
        How much a client trains in a round.
    seed : int
        The run's.
    precision : str
        Of forward passes: fp32, tf32 (a GPU's products) or bf16 (autocast).
    draws : bool
        The model draws random numbers of its own (dropout): each step gets a key's.
    changes : bool
        What lies behind the model's parameters changes while it trains.
    stragglers : float
        Chance that a client does only a part of its plan, one to all of its steps.
    lifelong : Lifelong, optional
        Which classes are learnt when; None: all, always.
    groups : mapping
        Rows of the test set, int64 (n,), by the name of what they have in common.
    beside : Beside, optional
        Further images that the model is evaluated on.
    local_statistics : bool
        What lies behind w (BatchNorm statistics) stays with each client, which begins with the
        global state's; SiloBN (Andreux et al., DCL 2020).
    debug : bool
        What a client's own code raises ends the run.
    compiled : callable, optional
        From the state (S,) that a client begins with to what does its steps; None: Python does.
    """

    train: Images
    test: Images
    partition: Partition
    new_module: Callable[[], nn.Module]
    layout: Layout
    method: Method
    task: Task
    work: Work
    seed: int
    precision: str = "fp32"
    draws: bool = False
    changes: bool = False
    stragglers: float = 0.0
    lifelong: Lifelong | None = None
    groups: Groups = field(default_factory=dict)
    beside: Beside | None = None
    local_statistics: bool = False
    debug: bool = False
    compiled: Callable[[Tensor], Stepper] | None = None

    @property
    def bf16(self) -> bool:
        """Whether forward passes are under autocast to bfloat16."""
        return self.precision == "bf16"

    def new_network(self) -> FlatModule:
        """Return a model to compute with; each thread needs its own."""
        return FlatModule(self.new_module(), bf16=self.bf16)

    def examples(self, client: int) -> int:
        """Return how many images ``client`` holds."""
        return self.partition.size(client)

    def steps(self, client: int) -> int:
        """Return how many mini-batches ``client`` takes a round."""
        return self.work.steps(self.examples(client))

    def rows(self, client: int, round: int) -> Tensor:
        """Return the images that ``client`` trains on in a round, rows of the training set."""
        images = self.partition[client]
        return images if self.lifelong is None else self.lifelong.rows(images, round)

    def asked(self, client: int, round: int) -> Asked:
        """Return how much a client is to train in a round."""
        examples = self._trained_on(client, round)
        return Asked(examples, self._taken(client, round, self.work.steps(examples)))

    def _trained_on(self, client: int, round: int) -> int:
        """Return how many images ``client`` trains on in a round."""
        return self.examples(client) if self.lifelong is None else len(self.rows(client, round))

    def _taken(self, client: int, round: int, steps: int) -> int:
        """Return how many of its steps a client takes: a straggler one to all."""
        if not (self.stragglers and steps):
            return steps
        drawn = numpy_generator(self.seed, "straggler", round, client)
        late = drawn.random() < self.stragglers
        return int(drawn.integers(1, steps + 1)) if late else steps

    @timed("draw plans")
    def plan(self, client: int, round: int) -> Plan:
        """Return the plan of one client's round, on the CPU."""
        generator = torch_generator(self.seed, "plan", round, client)
        shape = (self.train.height, self.train.width)
        plan = make_plan(self.rows(client, round), self.work.of(client), shape, generator)
        taken = self._taken(client, round, len(plan))
        return plan.first(taken) if taken < len(plan) else plan

    def expect(self, clients: Sequence[int], round: int) -> None:
        """Let the images that clients train on in a round to come be read meanwhile."""
        order = [clients[n] for n in longest_first([self.steps(client) for client in clients])]
        self.train.expect(self.plan(client, round).indices for client in order)

    def drawing(self, purpose: str, *numbers: int) -> AbstractContextManager[None]:
        """Return what a forward pass runs in: the key's numbers, if the model draws any."""
        return global_streams(self.seed, purpose, *numbers) if self.draws else nullcontext()

    def own_state(self, state: Tensor, memory: Vectors | None) -> Tensor:
        """Return the global ``state`` (S,) as a client sees it: maybe with its own statistics."""
        if not self.local_statistics or not memory:
            return state
        return torch.cat([state[: self.layout.trainable], memory[STATISTICS]])

    @timed("rest of local training")
    def train_client(self, network: FlatModule, job: ClientJob) -> Result:
        """Train one client for one round; the global state is not changed."""
        client, state, round, lr, memory, sent = job
        images, plan = self.train.at_hand(self.plan(client, round))
        P, begun = self.layout.trainable, self.own_state(state, memory)
        result = train_client(
            network,
            begun,
            plan.to(self.layout.device),
            images,
            self.task,
            self.method,
            round=round,
            lr=lr,
            memory=memory,
            sent=sent,
            examples=self._trained_on(client, round),
            drawing=partial(self.drawing, "model", round, client),
            advance=self.compiled(begun) if self.compiled else one_step,
        )
        if not self.local_statistics:
            return result
        return result._replace(
            state=torch.cat([result.state[:P], state[P:]]),
            memory={**result.memory, STATISTICS: result.state[P:].clone()},
        )

    @timed("evaluate")
    def statistics(
        self,
        network: FlatModule,
        state: Tensor,
        images: Images,
        rows: Tensor,
        groups: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return the task's statistics of the model ``state`` on some images, in eval mode.

        And after them those of each group's places among ``rows``.
        """
        network.load(state)
        device = self.layout.device
        places = [group.to(device) for group in groups]
        with self.drawing("evaluation", int(rows[0])):
            return statistics_by_group(network, self.task, images.rows(rows.to(device)), places)


def attempt(trainer: Trainer, network: FlatModule, job: ClientJob) -> Result | Failed:
    """Train one client; whatever its own code raises costs the round this client, not the run."""
    try:
        return trainer.train_client(network, job)
    except (UsageError, TrainingError):
        raise
    except Exception as error:
        if trainer.debug:
            raise
        log.debug("client %d", job.client, exc_info=True)
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        said = " ".join(str(error).split())
        return Failed(f"{type(error).__name__}: {said} ({place})", error)


def longest_first(steps: Sequence[int]) -> list[int]:
    """Return the numbers of jobs by falling steps, so that no core idles at the end."""
    return sorted(range(len(steps)), key=lambda number: -steps[number])
