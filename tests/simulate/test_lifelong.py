"""A lifelong run: a plain twin, who is sampled, what it leaves, and what is refused."""

import json

import pytest
import torch
from conftest import quick_config
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.config.schema import resolve
from fedsam.data.plan import make_plan
from fedsam.simulate.__main__ import main
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed

SPLIT = {"lifelong": 5, "rounds": 10, "partition": "dirichlet-per-class", "alpha": 0.3}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain_twin(config, cohorts, heads):
    """FedAvg by a loop over clients and mini-batches: the digits 2t and 2t + 1 in turn t."""
    trainer, initial = new_trainer(config)
    module, images = trainer.new_module(), trainer.train
    state = initial.layout.read(initial.state.clone())
    for number, clients in cohorts.items():
        turn = (number - 1) // 2
        total, weight = {name: torch.zeros_like(t) for name, t in state.items()}, 0
        for client in clients:
            mine = [i for i in trainer.partition[client].tolist() if images.targets[i] // 2 == turn]
            generator = torch_generator(config.seed, "plan", number, client)
            plan = make_plan(torch.tensor(mine), trainer.work, (8, 8), generator)
            module.load_state_dict(state)
            descent = torch.optim.SGD(module.parameters(), config.lr, weight_decay=4e-4)
            for step in range(len(plan)):
                batch = images.batch(plan, step)
                output, targets = module(batch.images), batch.targets
                if heads == "multi":
                    output, targets = output[:, 2 * turn : 2 * turn + 2], targets - 2 * turn
                descent.zero_grad()
                F.cross_entropy(output, targets).backward()
                descent.step()
            for name, tensor in module.state_dict().items():
                total[name] += len(mine) * tensor
            weight += len(mine)
        state = {name: tensor / weight for name, tensor in total.items()}
    return state


@pytest.mark.parametrize("heads", ["single", "multi"])
@pytest.mark.parametrize("cohort", ["off", "vmap"])
def test_a_run_is_what_plain_loops_make_of_it(tmp_path, quick, heads, cohort):
    keys = SPLIT | {"batch_size": 16, "lifelong_options": {"heads": heads}}
    config = quick_config(tmp_path / "unused", **keys)
    folder = quick(**keys, cohort=cohort).folder
    cohorts = {line["round"]: line["clients"] for line in lines_of(folder)[1:]}
    twin = plain_twin(config, cohorts, heads)
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, twin[name], rtol=1e-3, atol=1e-4)


def test_only_clients_with_images_of_the_task_are_asked(quick, caplog):
    folder = quick(lifelong=5, rounds=10, alpha=0, partition="dirichlet").folder  # a class each
    trainer, _ = new_trainer(resolve({}, folder / "config.yaml"))
    for line in lines_of(folder)[1:]:
        turn = (line["round"] - 1) // 2
        held = [set(trainer.train.targets[trainer.partition[k]].tolist()) for k in range(20)]
        able = [k for k in range(20) if {2 * turn, 2 * turn + 1} & held[k]]
        assert line["clients"] == able  # four of them, and --clients-per-round is five
    assert "left out" not in caplog.text


@pytest.mark.usefixtures("pictures")
def test_the_files_hold_accuracy_by_task(quick):
    outcome = quick(**SPLIT, lifelong_options={"memory": 2, "order": 1})
    lines = {line["round"]: line for line in lines_of(outcome.folder)}
    begun = {number: len(line.get("task_accuracy", [])) for number, line in lines.items()}
    assert [begun[number] for number in (0, 1, 2, 4, 6, 8, 10)] == [1, 0, 1, 2, 3, 4, 5]
    found = outcome.summary["lifelong"]
    a = found["accuracy_matrix"]
    assert a == [lines[end]["task_accuracy"] for end in (2, 4, 6, 8, 10)]
    assert found["average_accuracy"] == pytest.approx(sum(a[4]) / 5)
    best = [max(a[k][j] for k in range(j, 4)) for j in range(4)]
    assert found["forgetting"] == pytest.approx(sum(b - a[4][j] for j, b in enumerate(best)) / 4)
    back = sum(a[4][j] - a[j][j] for j in range(4)) / 4
    assert found["backward_transfer"] == pytest.approx(back)
    unseen = {number: line.get("unseen_accuracy") for number, line in lines.items()}
    assert [len(unseen[number]) for number in (0, 2, 4, 6, 8, 10)] == [4, 4, 3, 2, 1, 0]
    forth = sum(unseen[end][0] - unseen[0][j] for j, end in enumerate((2, 4, 6, 8))) / 4
    assert found["forward_transfer"] == pytest.approx(forth)
    trainer, _ = new_trainer(resolve({}, outcome.folder / "config.yaml"))
    sizes = [len(rows) for rows in trainer.lifelong.rows_by_task(trainer.test.targets)]
    whole = sum(n * accuracy for n, accuracy in zip(sizes, a[4], strict=True)) / sum(sizes)
    assert lines[10]["accuracy"] == pytest.approx(whole)
    with Image.open(outcome.folder / "lifelong.png") as image:
        assert len(image.convert("L").getcolors()) > 20


def test_runs_in_one_program_end_where_they_end_alone(tmp_path, quick):
    keys = SPLIT | {"cohort": "vmap", "lifelong_options": {"heads": "multi"}}
    configs = [quick_config(tmp_path / f"pair{seed}", **keys, seed=seed) for seed in (0, 1)]
    for seed, outcome in enumerate(run_together(configs)):
        alone = load_file(quick(**keys, seed=seed).folder / "model.safetensors")
        for name, tensor in load_file(outcome.folder / "model.safetensors").items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("memory", "low", "high"), [(0, 0.9, 1.0), (20, 0.0, 0.4)])
def test_the_shipped_digits_are_forgotten_and_with_replay_less(tmp_path, capsys, memory, low, high):
    words = ["--rounds", "50", "--eval-every", "50", "--out", str(tmp_path / "run")]
    options = ["--lifelong-options", json.dumps({"memory": memory})]
    assert main(["--config", "lifelong-digits", *words, *options]) == 0
    assert "average accuracy after the last of 5 tasks" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # a single head without replay answers with the last two digits alone
    assert low <= summary["lifelong"]["forgetting"] <= high


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lifelong": 1}, "--lifelong 1: needs two tasks at least"),
        ({"lifelong": 5, "rounds": 4}, "a round for each"),
        ({"lifelong": 11, "rounds": 20}, "11 tasks: there are only 10 classes"),
        ({"lifelong": 2, "patience": 3}, "goes without --target-accuracy and --patience"),
        ({"lifelong_options": {"memory": 3}}, "--lifelong-options: needs --lifelong"),
        ({"lifelong": 2, "lifelong_options": {"head": 1}}, "--lifelong-options.*did you mean"),
        ({"lifelong": 5, "rounds": 5, "alpha": 0, "min_clients": 5}, "4 clients hold images of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, quick, given, message):
    with pytest.raises(UsageError, match=message):
        quick(**given, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_goes_on_with_its_own_rounds_only(quick):
    folder = quick(**SPLIT).folder
    with pytest.raises(
        UsageError, match=r"--rounds 20: --lifelong of the run in .* goes by its 10"
    ):
        resumed(folder, {"rounds": 20})
