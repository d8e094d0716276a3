"""The server's side of the algorithm that a Config means."""

import inspect
from typing import Any, Protocol, runtime_checkable

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsam.base.errors import UsageError
from fedsam.base.strategy import Average, ServerMethod
from fedsam.config import plugins
from fedsam.config.schema import Config
from fedsam.messages import LOSS
from fedsam.server.adapter import MethodStrategy
from fedsam.server.wrapped import Averaged, Statistics

# those of Flower that choose or trim clients' values, or add noise to what they send: a mean beside
# them would let in what they keep out
OWN_STATISTICS = (
    flower.FedMedian
    | flower.FedTrimmedAvg
    | flower.Krum
    | flower.MultiKrum
    | flower.Bulyan
    | flower.DifferentialPrivacyServerSideAdaptiveClipping
    | flower.DifferentialPrivacyServerSideFixedClipping
)
# and those whose clients must do something that ours do not, each with what to do instead
OF_OTHER_CLIENTS: dict[Any, str] = {
    flower.FedProx: "needs clients with a proximal term; give --client fedprox and "
    "--client-options '{mu: 0.01}', with any strategy",
    flower.FedXgbBagging | flower.FedXgbCyclic: "needs clients that grow trees with XGBoost",
    flower.DifferentialPrivacyClientSideAdaptiveClipping
    | flower.DifferentialPrivacyClientSideFixedClipping: "needs clients that clip their updates "
    "themselves; give the server-side one of that name",
}


@runtime_checkable
class FormerStrategy(Protocol):
    """A strategy of Flower's former API."""

    def configure_fit(self, *arguments: Any, **keywords: Any) -> Any:
        """Return which clients train."""
        ...


def new_strategy(config: Config) -> Strategy:
    """Return the server's side: a strategy that trains every node it is shown, maybe averaged.

    A method of ours is put into its adapter, a Flower Strategy is taken as it is.
    """
    make = plugins.find(
        "strategy", config.strategy, "fedsam.strategies", ServerMethod | Strategy | FormerStrategy
    )
    if inspect.isclass(make) and issubclass(make, FormerStrategy):
        raise UsageError(
            f"--strategy {config.strategy}: is of Flower's former API (configure_fit); give a "
            "Strategy of flwr.serverapp.strategy"
        )
    # not all hold a task's images, or stay
    fewest = 1 if config.lifelong or config.dropout_rate else config.clients_per_round
    # a strategy is shown a round's clients alone, and must take them all
    sampling: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": fewest,
        "min_available_nodes": fewest,
    }
    run = {"clients": config.clients, "momentum": config.momentum}
    if inspect.isclass(make) and issubclass(make, ServerMethod):
        options = dict(config.strategy_options)
        of_flower = options.keys() & inspect.signature(FedAvg).parameters.keys()
        sampling |= {name: options.pop(name) for name in of_flower}
        method = plugins.build("strategy", make, options, **run)
        strategy: Strategy = MethodStrategy(method, **sampling)
    else:
        facts = sampling | {"train_loss_key": LOSS}  # as QFedAvg calls what it reads of the replies
        strategy = plugins.build("strategy", make, config.strategy_options, facts, **run)
    if not isinstance(strategy, Strategy):
        raise UsageError(
            f"--strategy {config.strategy}: returns a {type(strategy).__name__}, no Flower Strategy"
        )
    _check_strategy(config, strategy)
    pooled = config.bn == "pooled"
    if pooled or not isinstance(strategy, MethodStrategy | OWN_STATISTICS):
        strategy = Statistics(strategy, pooled=pooled)
    if config.averaging == "none":
        return strategy
    rule = plugins.find(
        "average", config.averaging, "fedsam.strategies.averages", Average, functions=False
    )
    values = {"start": config.averages_from, "cycle": config.swa_cycle, "lr": config.swa_lr}
    return Averaged(strategy, plugins.build("average", rule, config.average_options, **values))


def _check_strategy(config: Config, strategy: Strategy) -> None:
    """Raise UsageError if a Flower strategy wants other clients than there are, or more of them."""
    for kind, instead in OF_OTHER_CLIENTS.items():
        if isinstance(strategy, kind):
            raise UsageError(f"--strategy {config.strategy}: {instead}")
    if inside := getattr(strategy, "strategy", None):
        _check_strategy(config, inside)
    for name in ("min_train_nodes", "min_available_nodes"):
        if (least := getattr(strategy, name, 0)) > config.clients_per_round:
            raise UsageError(
                f"--strategy-options: {name} {least}: a strategy sees a round's clients alone, "
                f"--clients-per-round {config.clients_per_round}; leave it out"
            )
