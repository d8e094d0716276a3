"""The golden record: what some sixty small runs end in, to see that a refactoring changes nothing.

    python tests/golden/record.py bytes FILE      # sha256 of each final model: one machine only
    python tests/golden/record.py numbers         # numbers.json, in float64: any machine, tested
    python tests/golden/record.py said            # said.json: what some of them wrote down, alike

A refactoring is measured by ``bytes`` before and after it. ``numbers`` is written anew only where a
meaning is changed on purpose; the commit says so.
"""

import hashlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedsam.simulate.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = Path(__file__).with_name("numbers.json")
SAID = NUMBERS.with_name("said.json")
PRESETS = sorted(path.stem for path in ROOT.glob("configs/algorithms/*.yaml"))
SMALL = "--rounds 3 --clients 20 --clients-per-round 5 --alpha 1 --eval-every 3 --quiet"
# one client's round is 72 images: two mini-batches, the second one short
STEADY = "--lr 0.05 --device cpu --batch-size 48"
CENTRAL = "--rounds 3 --eval-every 3 --quiet"  # those presets say how many clients there are

NORM = "--model resnet20 --model-options '{norm: batch}'"
FURTHER = {
    "momentum": "--momentum 0.9",
    "nesterov": "--optimizer nesterov --momentum 0.9",
    "adamw": "--optimizer adamw --lr 0.001 --weight-decay 0.01",
    "cosine": "--lr-schedule cosine",
    "decay-in-loss": "--algorithm fedsam --decay-in-loss --weight-decay 0.01",
    "augmented": "--augment crop+flip --cutout 2 --mixup 0.4",
    "local-steps": "--local-steps 3",
    "bf16": "--precision bf16",
    "shards": "--partition shards",
    "per-class": "--partition dirichlet-per-class --clients 10",
    "batchnorm": NORM,
    "batchnorm-pooled": f"{NORM} --bn pooled",
    "batchnorm-local": f"{NORM} --bn local --update-bn 100",
    "batchnorm-first-pass": f"{NORM} --algorithm fedsam --bn-first-pass",
    "lifelong": "--lifelong 3 --lifelong-options '{heads: multi, memory: 2}'",
    "swa": "--average swa --swa-start 1 --swa-cycle 2",
    "swa-fedasam": "--algorithm fedasam --rho 0.05 --swa --swa-start 1 --swa-cycle 1",
    "ema": "--average ema --swa-start 1",
    "wima": "--average wima --average-options '{window: 2}' --swa-start 0",
    "pgd-at": "--loss pgd_at --loss-options '{steps: 2}'",
    "trades": "--loss trades --loss-options '{steps: 2}'",
    "clip-norm": "--clip-norm 0.05",
    "clip-gradient": "--algorithm scaffold --clip-gradient 0.5",
    "flower-fedadam": "--strategy flwr.serverapp.strategy:FedAdam",
    "flower-median": "--strategy flwr.serverapp.strategy:FedMedian",
    "asam-on-scaffold": "--minimizer asam --client scaffold --rho 0.05",
    "slots": "--cohort slots --algorithm fedsam",
    "vmap": "--cohort vmap --algorithm fedsam",
    "slots-augmented": "--cohort slots --augment crop+flip --cutout 2 --mixup 0.4",
    "slots-scaffold": "--cohort slots --algorithm scaffold",
    "one-thread": "--algorithm fedsam --threads 1",
}
TALKING = {  # runs whose metrics.jsonl and summary.json are recorded, key by key
    "clients": "--client-tests --eval-every 2 --lr 0.3",
    "lifelong": "--lifelong 3 --client-tests --eval-every 1 --lr 0.3",
    "heads": FURTHER["lifelong"],
    "target": "--target-accuracy 0.1 --eval-every 1 --lr 0.3",
}
TIMES = {"seconds", "rounds_per_second", "versions", "seals", "seal"}
RAY = {"ray": "--engine ray --workers 2 --algorithm fedgamma"}


def commands() -> dict[str, str]:
    """Return the command line of each run, by its name."""
    runs = {}
    for name in PRESETS:
        population = CENTRAL if name.startswith("central") else SMALL
        runs[name] = f"{population} {STEADY} --algorithm {name}"
    return runs | {name: f"{SMALL} {STEADY} {more}" for name, more in FURTHER.items()}


def ended(words: str, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the model that a command line ends in."""

    code = main([*shlex.split(words), "--out", str(folder)])
    if code != 0:
        raise RuntimeError(f"{words}: exit code {code}")
    return load_file(folder / "model.safetensors")


def resumed(folder: Path) -> dict[str, Tensor]:
    """Return the model of a run that ended after two rounds and went on."""
    ended(f"{SMALL} {STEADY} --algorithm fedgloss --rounds 2", folder)
    if main(["--resume", str(folder), "--rounds", "3", "--quiet"]) != 0:
        raise RuntimeError("a finished run does not go on")
    return load_file(folder / "model.safetensors")


def joint(folder: Path) -> dict[str, Tensor]:
    """Return the models of two runs that were trained as one program."""
    folder.mkdir()
    files = []
    for number, rho in enumerate((0.02, 0.1)):
        file = folder / f"{number}.yaml"
        file.write_text(f"algorithm: fedsam\nrho: {rho}\nseed: {number}\nout: {folder}/{number}\n")
        files += ["--config", str(file)]
    words = f"{SMALL} {STEADY} --cohort slots".split()
    if main([*words, *files]) != 0:
        raise RuntimeError("two runs do not train as one program")
    models = [load_file(folder / f"{number}" / "model.safetensors") for number in (0, 1)]
    return {f"{k}.{name}": t for k, model in enumerate(models) for name, t in model.items()}


def models(folder: Path, *, ray: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of each run, and the model that it ends in."""
    chosen = commands()
    if ray:
        chosen |= {name: f"{SMALL} {STEADY} {words}" for name, words in RAY.items()}
    for name, words in chosen.items():
        yield name, ended(words, folder / name)
    yield "resumed", resumed(folder / "resumed")
    yield "joint", joint(folder / "joint")


def said(words: str, folder: Path) -> list[object]:
    """Return the lines and the summary of a run, without times, versions and seals."""
    ended(words, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    every = [json.loads(text) for text in [*lines, (folder / "summary.json").read_text()]]
    return [{key: value for key, value in one.items() if key not in TIMES} for one in every]


def talking() -> dict[str, str]:
    """Return the command line of each run whose words are recorded, by its name."""
    return {name: f"{SMALL} {STEADY} {more}" for name, more in TALKING.items()}


def digest(model: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a model's names and values."""
    sha = hashlib.sha256()
    for name in sorted(model):
        sha.update(name.encode())
        sha.update(model[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


def summary(model: Mapping[str, Tensor]) -> list[float]:
    """Return a model's l2 norm and its products with three fixed random directions."""
    w = torch.cat([model[name].double().flatten() for name in sorted(model)])
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, len(w), dtype=torch.float64, generator=generator)
    return [float(w.norm()), *(directions @ w).tolist()]


@contextmanager
def float64() -> Iterator[None]:
    """Let models that are made inside compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def record(kind: str, file: Path) -> None:
    """Write a record into a file."""
    folder = Path(tempfile.mkdtemp())
    try:
        if kind == "bytes":
            found: dict[str, object] = {n: digest(m) for n, m in models(folder, ray=True)}
        elif kind == "said":
            with float64():
                found = {name: said(words, folder / name) for name, words in talking().items()}
        else:
            with float64():
                found = {n: summary(m) for n, m in models(folder, ray=False)}
    finally:
        shutil.rmtree(folder)
    # the order of the keys that a run writes is recorded, too
    file.write_text(json.dumps(found, indent=1, sort_keys=kind != "said") + "\n")


if __name__ == "__main__":
    what = sys.argv[1]
    record(what, Path(sys.argv[2]) if what == "bytes" else {"numbers": NUMBERS, "said": SAID}[what])
