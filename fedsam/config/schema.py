"""The one frozen, typed description of a run; flags, YAML keys and defaults are its fields."""

import math
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

from pydantic import ValidationError, model_validator

from fedsam.base.errors import UsageError, flag, nearest
from fedsam.config import text
from fedsam.config.keys import Client, Data, Federation, Key, Run, Server
from fedsam.config.presets import OF_TASK, located, over, preset, read, usual

GROUPS = (Data, Federation, Client, Server, Run)
# what the whole config of a run holds, and no method's file: all of a method, and how it was run
WHOLE = {"algorithm", "seed", "rounds"} | {
    key + part for key in ("minimizer", "client", "strategy") for part in ("", "_options")
}
LOCAL_PATHS = ("data_root", "weights", "out", "node_keys")
WITHOUT_ALPHA = ("iid", "shards", "csv", "natural")  # splits
# kinds of data sets that a path follows
PATHS = ("folder", "csv", "hf", "landmarks", "camvid", "cityscapes", "idda")
TRACED = range(3, 6)  # rounds that --trace shows


class Config(Run, Server, Client, Federation, Data):
    """A run of federated training.

    Every field is a flag (``clients_per_round`` is ``--clients-per-round``) and a YAML key; the
    descriptions below are what ``--help`` prints. "A name or import path" is a file's name in the
    folder that is named, or ``package.module:Class``.
    """

    @model_validator(mode="before")
    @classmethod
    def _all_of_few(cls, values: Any) -> Any:
        """Let a round be of all clients, where they are fewer than a round usually has."""
        if isinstance(values, dict) and "clients_per_round" not in values:
            usual, many = cls.model_fields["clients_per_round"].default, str(values.get("clients"))
            if many.isdecimal() and 0 < int(many) < usual:
                return values | {"clients_per_round": int(many)}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"--clients-per-round {self.clients_per_round}: at most --clients {self.clients}"
            )
        if self.min_clients > self.clients_per_round:
            raise ValueError(
                f"--min-clients {self.min_clients}: at most --clients-per-round "
                f"{self.clients_per_round}"
            )
        if self.swa and self.average not in ("none", "swa"):
            raise ValueError(f"--swa is --average swa: leave out one of it and {self.average!r}")
        if self.optimizer == "nesterov" and not self.momentum:
            raise ValueError("--optimizer nesterov: needs a --momentum above 0")
        if self.optimizer == "adamw" and (self.momentum or self.decay_in_loss):
            raise ValueError("--optimizer adamw: goes without --momentum and --decay-in-loss")
        if self.update_bn == 1:
            raise ValueError("--update-bn 1: one image has no variance; give 2 or more, or 0")
        if self.bn == "local" and not self.update_bn:
            raise ValueError(
                "--bn local: the global model has no statistics to be evaluated with; give "
                "--update-bn, such as 1000"
            )
        if self.trace and self.rounds < TRACED[-1]:
            raise ValueError(f"--trace: shows rounds {TRACED[0]} to {TRACED[-1]}: more --rounds")
        if self.averaging != "none" and self.averages_from >= self.rounds:
            raise ValueError(
                f"--swa-start {self.swa_start:g}: must lie before the end of --rounds {self.rounds}"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> "Config":
        others = {
            "engine ray": self.engine == "ray",
            f"cohort {self.cohort}": self.cohort in ("slots", "vmap"),
            "debug": self.debug,
        }
        if self.processes and (other := next((o for o, is_on in others.items() if is_on), "")):
            raise ValueError(
                f"--processes {self.processes}: goes without --{other}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> "Config":
        for key, needed in (
            ("weights_sha256", "weights"),
            ("lora_targets", "lora"),
            ("lora_options", "lora"),
        ):
            if getattr(self, key) and not getattr(self, needed):
                raise ValueError(f"{flag(key)}: needs {flag(needed)}")
        return self

    @model_validator(mode="after")
    def _lifelong_fits(self) -> "Config":
        if self.lifelong == 1 or self.lifelong > self.rounds:
            raise ValueError(
                f"--lifelong {self.lifelong}: needs two tasks at least, and a round for each"
            )
        if self.lifelong and (self.target_accuracy or self.patience):
            raise ValueError("--lifelong: goes without --target-accuracy and --patience")
        if self.lifelong and self.update_bn:
            raise ValueError("--update-bn: goes without --lifelong: it would see later tasks")
        if self.lifelong and (self.leave_out or self.validation):
            raise ValueError("--lifelong: goes without --leave-out and --validation")
        if self.lifelong_options and not self.lifelong:
            raise ValueError("--lifelong-options: needs --lifelong")
        return self

    @model_validator(mode="after")
    def _leaving_out_fits(self) -> "Config":
        if self.leave_out and not self.validation and (self.target_accuracy or self.patience):
            key = "target_accuracy" if self.target_accuracy else "patience"
            raise ValueError(
                f"{flag(key)}: with --leave-out it would go by images that stand for unknown ones; "
                "give --validation, such as 0.1"
            )
        if self.leave_out and self.client_tests:
            raise ValueError("--client-tests: no client has a share of what --leave-out tests on")
        return self

    @property
    def averaging(self) -> str:
        """The average that is used: ``average``, or swa by its short flag."""
        return "swa" if self.swa else self.average

    @property
    def by_alpha(self) -> bool:
        """Whether ``alpha`` says anything of the split."""
        if self.partition == "domains":
            return self.partition_options.get("within") == "dirichlet"
        return self.partition not in WITHOUT_ALPHA

    @property
    def averages_from(self) -> int:
        """Rounds before the averaging starts."""
        start = self.swa_start * self.rounds if self.swa_start < 1 else self.swa_start
        return int(start)

    def rate(self, round: int) -> float:
        """Return the clients' learning rate in ``round``, from 1, before any average's cycle.

        Cosine annealing without restarts (Loshchilov and Hutter, ICLR 2017), by rounds::

            lr (1 + cos(pi (round - 1) / rounds)) / 2
        """
        if self.lr_schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (round - 1) / self.rounds)) / 2

    @property
    def task_ends(self) -> tuple[int, ...]:
        """The last round of each task of ``lifelong``."""
        return tuple(k * self.rounds // self.lifelong for k in range(1, self.lifelong + 1))

    def evaluates(self, round: int) -> bool:
        """Return whether the model after ``round`` is evaluated.

        Every ``eval_every`` rounds and after the last; runs of 1000 rounds or more also after
        each of the last 100, over which the paper takes its mean. And at the end of each task.
        """
        last = self.rounds - round < 100 and self.rounds >= 1000
        return (
            last or round % self.eval_every == 0 or round == self.rounds or round in self.task_ends
        )


def keys(mark: str) -> tuple[str, ...]:
    """Return the keys that carry a mark, an attribute of ``Key``, by its value and then in order.

    ``keys("how")``, ``keys("shared")``, ``keys("column")``, ...
    """
    values = {}
    for name, field in Config.model_fields.items():
        for key in field.metadata:
            if isinstance(key, Key) and getattr(key, mark):
                values[name] = getattr(key, mark)
    return tuple(sorted(values, key=lambda name: values[name]))


def groups() -> dict[str, tuple[str, ...]]:
    """Return the keys of each group, in the order of the flags, by what the group says."""
    return {
        (group.__doc__ or "").strip().removesuffix("."): tuple(group.model_fields)
        for group in GROUPS
    }


def resolve(given: Mapping[str, Any], file: str | PathLike[str] = "") -> Config:
    """Return the config of these values over a file's, over its algorithm's preset, over defaults.

    Below them all is what the data set is trained with (``configs/datasets``), which a task may
    choose. Options are merged key by key (``presets.over``). A preset is no layer below what is the
    whole config of a run, its config.yaml: nothing comes back that the run did not have. Of a
    preset that is among these values, ``clients``, ``clients_per_round`` and ``partition`` stand
    over the file's, too: a central run of a federated file's setting.

    Parameters
    ----------
    given : mapping
        Config keys, from flags, keyword arguments or Flower's run config: what YAML can say, and
        paths, NumPy's numbers, and None for what is not given.
    file : str or Path
        A YAML file, or the name of one in ``configs/`` ("paper/cifar10"); "" for none.

    Raises
    ------
    UsageError
        One line that names the flag and says what would be right.
    """
    of_file = read(located(file)) if file else {}
    values = {key: _plain(key, value) for key, value in given.items() if value is not None}
    algorithm = values.get("algorithm", of_file.get("algorithm"))
    task = values.get("task", of_file.get("task"))
    dataset = values.get("dataset", of_file.get("dataset", OF_TASK.get(str(task))))
    method = preset(algorithm or Config.model_fields["algorithm"].default, str(dataset))
    chosen = {key: method[key] for key in keys("who") if key in method and "algorithm" in values}
    layers = [usual(str(dataset)), method, of_file, chosen, values]
    begin = max((i for i, layer in enumerate(layers) if set(layer) >= WHOLE), default=0)
    merged = over(*layers[begin:])
    unknown = [key for key in merged if key not in Config.model_fields]
    if unknown:
        raise UsageError(
            f"{flag(unknown[0])}: no such key{nearest(unknown[0], Config.model_fields)}"
        )
    try:
        return Config(**merged)
    except ValidationError as error:
        raise UsageError(_one_line(error)) from error


def from_run_config(run_config: Mapping[str, bool | int | float | str]) -> Config:
    """Return the config of a Flower run, whose keys are the flags' names without dashes in front.

    Flower knows no missing keys, so in its table in pyproject.toml each is an empty text: not
    given. A key that is given at its default is given.

    Raises
    ------
    UsageError
        As ``resolve``; also for keys that say nothing to Flower's runtime, and for relative
        paths, as Flower runs an app in a folder of its own.
    """
    given = {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}
    for key in keys("engine"):
        if key in given:
            raise UsageError(f"{flag(key)}: on Flower's runtime nodes train; leave it out")
    config = resolve(given)
    paths: dict[str, str] = {k: getattr(config, k) for k in LOCAL_PATHS if k in given}
    if config.partition == "csv":
        paths["partition_options"] = str(config.partition_options.get("path", ""))
    kind, _, place = config.dataset.partition(":")
    if (place and kind in PATHS) or "/" in config.dataset:
        paths["dataset"] = place or config.dataset
    for key, path in paths.items():
        if path and not os.path.isabs(path):
            raise UsageError(
                f"{flag(key)} {path}: Flower runs an app in a folder of its own; give an absolute "
                "path"
            )
    return config


def of_ours(
    run_config: Mapping[str, bool | int | float | str],
) -> dict[str, bool | int | float | str]:
    """Return what a run config, of this app or another's, says to our ClientApp.

    That writes nothing and asks nobody for a key, so another app's ``out`` may be what it likes.
    """
    ours = set(Config.model_fields) - set(keys("engine")) - {"out", "node_keys"}
    return {key: value for key, value in run_config.items() if key.replace("-", "_") in ours}


def empty_run_config() -> dict[str, str]:
    """Return Flower's run config, in which no key is given."""
    return {flag(key).removeprefix("--"): "" for key in Config.model_fields}


def dump(config: Config) -> str:
    """Return the YAML from which ``resolve`` makes the same config."""
    return text.write(config.model_dump())


def _plain(key: str, value: Any) -> Any:
    """Return what YAML could say in place of a path or a number of NumPy's, inside options, too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(key, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, inner) for inner in value]
    if callable(value):
        name, module = getattr(value, "__qualname__", ""), getattr(value, "__module__", "__main__")
        if not name.isidentifier() or module == "__main__":
            name, module = name if name.isidentifier() else "NAME", "mine"
            raise UsageError(
                f"{flag(key)}: takes a name, not the object: put it into a file, mine.py, and "
                f"give {key}='{module}:{name}'"
            )
        raise UsageError(f"{flag(key)}: takes a name, not the object: {key}='{module}:{name}'")
    return value


def _one_line(error: ValidationError) -> str:
    """Return the first thing that is wrong, as "--flag value: what would be right"."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    return f"{flag(str(first['loc'][0]))} {first['input']}: {message[0].lower()}{message[1:]}"
