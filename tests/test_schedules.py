"""training/schedules.py against formulas written out here, and a model that is branched off a stable phase."""

import json
import math
import shutil

import pytest
import tiny_run

import train_accelerate
from gpt2repro.checkpoint.layout import resolve_pointer
from gpt2repro.checkpoint.reader import read_state
from gpt2repro.files import sha256_of
from gpt2repro.options import run_main
from gpt2repro.training.schedules import learning_rate

SCHEDULE = {"lr": 6e-4, "min_lr": 6e-5, "warmup_steps": 10, "max_steps": 100}


def test_schedule_starts_above_zero_peaks_at_the_end_of_warmup_and_ends_at_min_lr():
    assert learning_rate(0, **SCHEDULE) == pytest.approx(6e-5)  # 1/10 of the peak
    assert learning_rate(9, **SCHEDULE) == pytest.approx(6e-4)
    assert learning_rate(10, **SCHEDULE) == pytest.approx(6e-4)
    assert learning_rate(55, **SCHEDULE) == pytest.approx((6e-4 + 6e-5) / 2)  # halfway down the cosine
    assert learning_rate(100, **SCHEDULE) == 6e-5
    assert learning_rate(10_000, **SCHEDULE) == 6e-5


def test_schedule_equals_build_nanogpts_formula_at_every_step():
    def peer(step):
        if step < 10:
            return 6e-4 * (step + 1) / 10
        if step > 100:
            return 6e-5
        return 6e-5 + 0.5 * (1.0 + math.cos(math.pi * (step - 10) / 90)) * (6e-4 - 6e-5)

    for step in range(120):
        assert learning_rate(step, **SCHEDULE) == pytest.approx(peer(step), rel=1e-12)


@pytest.mark.parametrize(("warmup_steps", "max_steps"), [(0, 1), (0, 10), (10, 10), (20, 10)])
def test_schedule_has_no_gap_when_warmup_is_nothing_or_everything(warmup_steps, max_steps):
    rates = [learning_rate(s, lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, max_steps=max_steps) for s in range(30)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == 0.1


def test_linear_goes_straight_from_the_end_of_warmup_to_min_lr():
    linear = {**SCHEDULE, "schedule": "linear"}
    assert learning_rate(5, **linear) == learning_rate(5, **SCHEDULE)
    for step in range(10, 101):
        assert learning_rate(step, **linear) == pytest.approx(6e-4 - (6e-4 - 6e-5) * (step - 10) / 90)


@pytest.mark.parametrize(("cooldown_steps", "length"), [(30, 30), (None, 20), (100, 90)])
def test_wsd_is_stable_and_then_linear(cooldown_steps, length):
    wsd = {**SCHEDULE, "schedule": "wsd", "cooldown_steps": cooldown_steps}
    assert learning_rate(3, **wsd) == learning_rate(3, **SCHEDULE)
    assert {learning_rate(step, **wsd) for step in range(10, 101 - length)} == {6e-4}
    for step in range(100 - length, 101):
        assert learning_rate(step, **wsd) == pytest.approx(6e-4 - (6e-4 - 6e-5) * (step - (100 - length)) / length)
    assert learning_rate(1000, **wsd) == 6e-5


def records(run_dir) -> dict[int, dict]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in lines if "loss" in record}


def fingerprints(directory) -> dict:
    return {path: sha256_of(path) for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def test_finished_models_branch_off_one_stable_phase(tmp_path, capsys):
    data = tiny_run.write_tiny_shards(tmp_path / "data")

    def train(run_dir, **options) -> int:
        return run_main(train_accelerate.main, tiny_run.flags(data, run_dir, keep_last="none", **options))

    parent = tmp_path / "parent"
    assert train(parent, schedule="wsd", max_steps=24, cooldown_steps=8) == 0
    before = fingerprints(parent)
    branch = {"cooldown_from": parent / "checkpoints/step_000008", "cooldown_steps": 6}
    capsys.readouterr()
    assert run_main(train_accelerate.main, [*tiny_run.flags(data, tmp_path / "child", **branch), "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "6 steps, 768 tokens" in planned and "2 kept" in planned  # not those of the parent: steps 12 and 14
    assert train(tmp_path / "child", **branch) == 0
    assert "has lost" not in capsys.readouterr().err, "the steps before are in the parent's log"
    assert fingerprints(parent) == before, "the parent is only read"

    child = records(tmp_path / "child")
    assert sorted(child) == list(range(9, 15))
    assert [child[step]["lr"] for step in child] == pytest.approx([0.01 - 0.009 * k / 6 for k in range(6)])
    assert child[9]["loss"] == records(parent)[9]["loss"], "the same weights, data and dropout"
    state = read_state(resolve_pointer(tmp_path / "child/checkpoints", "final"))
    assert (
        state["best"]["step"] > 8
        and state["parent"]["step"] == 8
        and state["parent"]["sha256"] == before[branch["cooldown_from"] / "checksums.json"]
    )

    shutil.rmtree(tmp_path / "child/checkpoints/step_000014")  # as if it had been killed after step 12
    assert train(tmp_path / "child", **branch) == 0
    assert {step: record["loss"] for step, record in records(tmp_path / "child").items()} == {
        step: record["loss"] for step, record in child.items()
    }

    shutil.rmtree(tmp_path / "child/checkpoints/step_000014")
    aside = parent.rename(tmp_path / "aside")  # the branch needs it no more
    assert train(tmp_path / "child", **branch) == 0 and records(tmp_path / "child").keys() == child.keys()
    aside.rename(parent)
    assert train(tmp_path / "child", **{**branch, "cooldown_from": parent / "checkpoints/step_000012"}) == 2
    assert "child holds the branch of step 8; choose another --run_dir" in capsys.readouterr().err
    other = {**branch, "cooldown_from": tmp_path / "growing"}  # a run: its newest checkpoint then
    shutil.copytree(parent, other["cooldown_from"], symlinks=True)
    for step in (12, 16, 20, 24):
        shutil.rmtree(other["cooldown_from"] / f"checkpoints/step_{step:06d}")
    assert train(tmp_path / "second", **other) == 0
    shutil.copytree(parent / "checkpoints/step_000016", other["cooldown_from"] / "checkpoints/step_000016")
    shutil.rmtree(tmp_path / "second/checkpoints/step_000014")
    assert train(tmp_path / "second", **other) == 0 and max(records(tmp_path / "second")) == 14

    for step in (20, 24):
        assert train(tmp_path / "late", **{**branch, "cooldown_from": parent / f"checkpoints/step_{step:06d}"}) == 2
        assert "does not lie in the stable phase" in capsys.readouterr().err
    assert train(parent, **branch) == 2
    assert "name a new --run_dir" in capsys.readouterr().err
    assert fingerprints(parent) == before
    (parent / "config.yaml").write_text("max_steps: many")
    assert train(tmp_path / "damaged", **branch) == 2 and "max_steps is 'many'" in capsys.readouterr().err
