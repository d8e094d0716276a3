"""A domain left out, from the config to the summary: what is trained, tested, told and chosen."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fedsam
from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.partitions.held_out import hold_out
from fedsam.data.sources.embedded import rotated_digits
from fedsam.data.sources.load import LOADERS
from fedsam.flatness.subject import subject_of_run
from fedsam.runs import metrics
from fedsam.runs.run import load
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run

TURNED = {"dataset": "rotated-digits", "partition": "domains", "lr": 0.3, "leave_out": "75"}
VALIDATED = TURNED | {"validation": 0.1}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(quick):
    return quick(**VALIDATED, rounds=6, save_every=2).folder


def accuracy(module, dataset, images, labels):
    mean, std = (torch.tensor(value)[:, None, None] for value in (dataset.mean, dataset.std))
    with torch.no_grad():
        answers = module((images / 255 - mean) / std).argmax(-1)
    return (answers == labels).float().mean().item()


def test_lines_tell_of_seen_unseen_each_domain_and_validation(folder):
    whole, module = rotated_digits(None), fedsam.load(folder).model()
    line = lines_of(folder)[-1]
    assert list(line["groups"]) == ["unseen", "75", "seen", "0", "15", "30", "45", "60"]
    parts = {
        name: (
            whole.test_images[whole.test_domains == number],
            whole.test_labels[whole.test_domains == number],
        )
        for number, name in enumerate(whole.domain_names)
    }
    of_train = whole.train_domains == 5
    parts["75"] = (
        torch.cat([whole.train_images[of_train], parts["75"][0]]),
        torch.cat([whole.train_labels[of_train], parts["75"][1]]),
    )
    naive = {name: accuracy(module, whole, *part) for name, part in parts.items()}
    seen = [parts[name] for name in whole.domain_names[:5]]
    naive["seen"] = accuracy(module, whole, *(torch.cat(kind) for kind in zip(*seen, strict=True)))
    naive["unseen"] = naive["75"]
    for name, told in line["groups"].items():
        assert told["accuracy"] == pytest.approx(naive[name], abs=1e-6)
    assert line["accuracy"] == line["groups"]["unseen"]["accuracy"]
    assert line["worst"] == min(told["accuracy"] for told in line["groups"].values())
    assert line["gap"] == pytest.approx(naive["seen"] - naive["unseen"], abs=1e-6)
    held = hold_out(whole, "75", 0.1)
    images, labels = (part[held.validation] for part in held.beside[:2])
    assert line["validation_accuracy"] == pytest.approx(accuracy(module, whole, images, labels))
    assert len(labels) == 24 + 24 + 24 + 24 + 24


def test_what_lies_in_the_folder_is_without_the_domain(folder):
    left = hold_out(rotated_digits(None), "75", 0.1).dataset
    with np.load(folder / "partition.npz") as archive:
        indices, counts = archive["indices"], archive["counts"]
    assert sorted(indices.tolist()) == list(range(len(left.train_labels)))
    assert counts.sum(0).tolist() == left.train_labels.bincount().tolist()
    subject = subject_of_run(folder)  # measures neither see the other images
    assert len(subject.train) == len(left.train_labels)
    assert torch.equal(subject.test.targets, left.test_labels)


def test_the_summary_tells_the_test_result_of_the_best_validation(folder):
    lines, summary = lines_of(folder), load(folder).summary
    tests = lines[2::2]
    assert [line["round"] for line in tests] == [2, 4, 6]
    best = max(line["validation_accuracy"] for line in tests)
    chosen = next(line for line in tests if line["validation_accuracy"] == best)
    assert summary["selected_round"] == chosen["round"]
    assert summary["validation_accuracy"] == best
    assert summary["selected_accuracy"] == chosen["accuracy"]
    means = summary["groups"]
    assert summary["gap"] == pytest.approx(means["seen"] - means["unseen"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=1, max_size=8), st.data())
def test_the_choice_does_not_depend_on_the_test_results(numbers, data):
    def lines(tests):
        return [{"round": 0, "accuracy": 1.0, "validation_accuracy": 1.0}] + [
            {"round": r, "accuracy": test / 5, "validation_accuracy": held / 5}
            for r, (test, (_, held)) in enumerate(zip(tests, numbers, strict=True), 1)
        ]

    first = metrics.summary_of(lines([test for test, _ in numbers]))
    others = data.draw(st.lists(st.integers(0, 5), min_size=len(numbers), max_size=len(numbers)))
    second = metrics.summary_of(lines(others))
    assert first["selected_round"] == second["selected_round"]
    held = [held for _, held in numbers]
    assert first["selected_round"] == 1 + held.index(max(held))
    assert second["selected_accuracy"] == others[held.index(max(held))] / 5


def test_early_stops_go_by_validation(quick):
    never = quick(**VALIDATED, rounds=30, target_accuracy=0.3, eval_every=1)
    last = lines_of(never.folder)[-1]
    assert last["validation_accuracy"] >= 0.3
    assert all(line["validation_accuracy"] < 0.3 for line in lines_of(never.folder)[:-1])
    assert last["round"] < 30


def test_it_goes_on_to_the_same_bytes(quick, tmp_path):
    whole = quick(**VALIDATED, rounds=6, patience=9)
    part = quick(**VALIDATED, rounds=3, patience=9, eval_every=2)
    config, snapshot = resumed(part.folder, {"rounds": 6})
    run(config, snapshot=snapshot)
    both = (load_file(one.folder / "model.safetensors") for one in (whole, part))
    for one, other in zip(*(tensors.values() for tensors in both), strict=True):
        assert torch.equal(one, other)
    ours, theirs = (lines_of(one.folder)[-1] for one in (whole, part))
    for key in ("accuracy", "validation_accuracy", "groups", "gap"):
        assert ours[key] == theirs[key]
    with pytest.raises(UsageError, match=r"^--leave-out 60: the run in .* has 75"):
        resumed(part.folder, {"leave_out": "60"})


def test_the_domain_that_is_left_out_changes_nothing(quick, monkeypatch):
    """Other pixels there, the same model: it is trained on nowhere, BatchNorm's images included."""
    given = VALIDATED | {"model": "resnet20", "model_options": {"norm": "batch"}, "update_bn": 50}
    ours = quick(**given, rounds=2)

    def inverted(root):
        whole = rotated_digits(root)
        images = whole.train_images.clone()
        images[whole.train_domains == 5] = 255 - images[whole.train_domains == 5]
        return type(whole)(**{**vars(whole), "train_images": images})

    monkeypatch.setitem(LOADERS, "rotated-digits", inverted)
    theirs = quick(**given, rounds=2)
    ours_model, theirs_model = (load_file(o.folder / "model.safetensors") for o in (ours, theirs))
    assert all(torch.equal(t, theirs_model[name]) for name, t in ours_model.items())
    assert lines_of(ours.folder)[-1]["accuracy"] != lines_of(theirs.folder)[-1]["accuracy"]


def test_validation_alone_leaves_the_test_set_as_it_is(quick):
    outcome = quick(validation=0.2, rounds=2, dataset="digits")
    line = lines_of(outcome.folder)[-1]
    assert "groups" not in line
    assert outcome.summary["selected_round"] == 2
    with np.load(outcome.folder / "partition.npz") as archive:
        assert len(archive["indices"]) == 1442 - 288


def test_domains_are_groups_where_none_is_left_out(quick):
    outcome = quick(dataset="rotated-digits", rounds=2)
    assert list(outcome.summary["groups"]) == ["0", "15", "30", "45", "60", "75"]
    line = lines_of(outcome.folder)[-1]
    sizes = rotated_digits(None).test_domains.bincount()
    of_domain = torch.tensor([told["accuracy"] for told in line["groups"].values()])
    assert line["accuracy"] * int(sizes.sum()) == pytest.approx(float(of_domain @ sizes.float()))
    classes = quick(**VALIDATED, rounds=2, test_groups="classes")
    assert list(classes.summary["groups"]) == [f"class {digit}" for digit in range(10)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"leave_out": "7"}, r"--leave-out 7: rotated-digits has no such domain.*75.*; have 0, 15"),
        ({"dataset": "digits"}, "--leave-out 75: digits does not say of which domain"),
        ({"clients": 4, "clients_per_round": 2}, "--clients 4: --partition domains needs one"),
        ({"dataset": "digits", "leave_out": ""}, "--partition domains: this data set does not say"),
        ({"validation": 0.999}, r"--validation: 0\.999 of the \d+ images of 0 leaves none"),
    ],
)
def test_what_cannot_be_left_out_ends_before_a_folder_is_made(tmp_path, changed, message):
    given = {**VALIDATED, "rounds": 1, "clients": 10, "clients_per_round": 2, "device": "cpu"}
    with pytest.raises(UsageError, match=f"^{message}"):
        run(resolve(given | changed | {"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patience": 3}, "--patience: with --leave-out it would go by images that stand"),
        ({"target_accuracy": 0.5}, "--target-accuracy: with --leave-out it would go by images"),
        ({"client_tests": True}, "--client-tests: no client has a share of what --leave-out"),
        ({"lifelong": 2}, "--lifelong: goes without --leave-out and --validation"),
        ({"validation": 1.0}, r"--validation 1\.0: input should be less than 1"),
        ({"validation": -0.1}, r"--validation -0\.1: input should be greater than or equal to 0"),
    ],
)
def test_keys_that_do_not_go_together_are_one_line(given, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        resolve(TURNED | given)


def test_a_name_may_be_a_number():
    assert resolve({"dataset": "rotated-digits", "leave_out": 75}).leave_out == "75"
    with pytest.raises(UsageError, match="--leave-out True: must be a number or a text"):
        resolve({"dataset": "rotated-digits", "leave_out": True})


def test_a_domain_called_as_a_group_is_refused(quick):
    with pytest.raises(UsageError, match=r"^--leave-out: a domain of turned is called 'seen'"):
        quick(
            **{
                **VALIDATED,
                "dataset": f"{__name__}:called_seen",
                "leave_out": "seen",
                "model": "mlp",
            }
        )


def called_seen():
    whole = rotated_digits(None)
    names = ("seen", *whole.domain_names[1:])
    return type(whole)(**{**vars(whole), "name": "turned", "domain_names": names})
