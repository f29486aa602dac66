"""Small corpora: windows that are cut anew in every epoch, and runs that end when the validation loss rises."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run

import train_accelerate
from gpt2repro.checkpoint.layout import resolve_pointer
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.commands import verify_resume
from gpt2repro.options import run_main
from gpt2repro.training.comparison import final_loss

# Learned by heart within a few epochs, so that the validation loss rises.
OVERFITS = {
    "n_embd": 32,
    "lr": 0.03,
    "min_lr": 0.03,
    "resid_pdrop": 0.0,
    "max_steps": 36,
    "eval_steps": 3,
    "save_steps": 99,
}


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """A few sentences: two steps of 128 characters are an epoch."""
    return tiny_run.write_tiny_shards(tmp_path_factory.mktemp("book") / "data", repeats=3)


def train(*arguments, **changes) -> int:
    return run_main(train_accelerate.main, tiny_run.flags(*arguments, **changes))


def evaluations(run_dir: Path) -> list[dict]:
    return [record for record in verify_resume.records(run_dir) if "val_loss" in record]


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after it saved `step`."""
    shutil.copytree(run, copy, symlinks=True)
    for path in (copy / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return copy


# --- recut windows


def test_a_resumed_run_with_recut_windows_is_the_uninterrupted_one_and_stays_recut(book, tmp_path, capsys):
    options = {"recut_windows": [], "keep_last": 9}
    assert train(book, tmp_path / "plain", keep_last=9) == 0 and train(book, tmp_path / "recut", **options) == 0
    assert verify_resume.records(tmp_path / "plain")[1] != verify_resume.records(tmp_path / "recut")[1]
    for name in ("plain", "recut"):
        state = read_state(find_checkpoint(tmp_path / name))
        assert state["source"]["position"] == 8 * 24  # twelve epochs
        assert state["identity"]["data"].get("recut_windows") == {"plain": None, "recut": 1}[name]
    resumed = cut_back(tmp_path / "recut", tmp_path / "resumed", 12)
    assert train(book, resumed, **options) == 0
    assert verify_resume.compare(tmp_path / "recut", resumed, 0.0) == []
    for name, change in (("recut", {}), ("plain", {"recut_windows": []})):
        assert train(book, cut_back(tmp_path / name, tmp_path / f"other-{name}", 12), **change) == 2
        assert "cannot continue" in (said := capsys.readouterr().err) and "data: recut_windows was" in said


def test_the_plan_counts_the_same_epochs_and_a_stream_is_refused_with_the_reason(book, tmp_path, capsys):
    flags = [*tiny_run.flags(book, tmp_path / "run"), "--plan"]
    assert run_main(train_accelerate.main, flags) == 0
    report = capsys.readouterr().out
    assert run_main(train_accelerate.main, [*flags, "--recut_windows"]) == 0
    without_disk = [
        [line for line in text.splitlines() if "free at" not in line] for text in (report, capsys.readouterr().out)
    ]
    assert without_disk[0] == without_disk[1]
    stopping = [*flags, "--keep_last", "none", "--save_steps", "1000", "--stop_when_val_rises", "3"]
    assert run_main(train_accelerate.main, stopping) == 0
    assert "3 kept" in capsys.readouterr().out  # at each evaluation
    for more in ([], ["--plan"]):
        stream = tiny_run.flags(f"stream:{tmp_path / 'a.txt'}", tmp_path / "run", recut_windows=[])
        assert run_main(train_accelerate.main, [*stream, *more]) == 2
        assert "recut_windows is for token shards: a stream shuffles its documents" in capsys.readouterr().err


# --- early stopping


@pytest.fixture(scope="module")
def overfitted(book, tmp_path_factory) -> Path:
    """A run to its last step, which saved and kept every evaluation."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(book, run, **OVERFITS | {"save_steps": 3, "keep_last": "none"}) == 0
    return run


def end_by_hand(run: Path, patience: int) -> tuple[int, dict]:
    """(step of the evaluation that would be the last, the lowest one so far), by a plain loop over all of them."""
    losses = {record["step"]: record for record in evaluations(run)[1:]}
    for step in losses:
        best = min((losses[at] for at in losses if at <= step), key=lambda record: record["val_loss"])
        later = [losses[at]["val_loss"] for at in losses if best["step"] < at <= step]
        if len(later) == patience and min(later) > best["val_loss"]:
            return step, best
    raise AssertionError("the validation loss never rises")


@pytest.fixture(scope="module")
def stopped(book, overfitted) -> Path:
    run = overfitted.parent / "stopped"
    assert train(book, run, stop_when_val_rises=3, **OVERFITS, keep_last="none") == 0
    return run


def test_a_run_ends_after_three_rises_and_says_so(overfitted, stopped, book, capsys):
    step, best = end_by_hand(overfitted, 3)
    assert step < 36
    status = json.loads((stopped / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, step)
    sentence = f"its lowest, {best['val_loss']:.4f} after step {best['step']}, in 3 evaluations in a row"
    assert sentence in status["message"] and f"ended after step {step}" in status["message"]
    pointers = {name: resolve_pointer(stopped / "checkpoints", name).name for name in ("best", "final", "latest")}
    last = f"step_{step:06d}"
    assert pointers == {"best": f"step_{best['step']:06d}", "final": last, "latest": last}
    whole = [record for record in verify_resume.records(overfitted) if record["step"] <= step]
    ours = [{n: v for n, v in record.items() if n != "val_rises"} for record in verify_resume.records(stopped)]
    assert ours == whole  # until there it is the run without the option
    assert [record["val_rises"] for record in evaluations(stopped)[-4:]] == [0, 1, 2, 3]
    assert final_loss(stopped) == (1337, best["val_loss"])  # what `compare` takes
    before = (stopped / "metrics.jsonl").read_bytes()
    assert train(book, stopped, stop_when_val_rises=3, **OVERFITS, keep_last="none") == 0
    assert (stopped / "metrics.jsonl").read_bytes() == before and sentence in capsys.readouterr().out


@pytest.mark.parametrize("rises", [0, 2])
def test_the_count_goes_on_where_a_killed_run_had_it(stopped, book, tmp_path, rises):
    last = evaluations(stopped)[-1]["step"]
    run = cut_back(stopped, tmp_path / "run", last - 3 * (3 - rises))
    assert read_state(find_checkpoint(run))["best"].get("rises", 0) == rises
    assert train(book, run, stop_when_val_rises=3, **OVERFITS, keep_last="none") == 0
    assert verify_resume.compare(stopped, run, 0.0) == []
    assert json.loads((run / "status.json").read_text()) == json.loads((stopped / "status.json").read_text())


def test_a_run_that_ended_early_goes_on_with_more_patience_or_none(stopped, overfitted, book, tmp_path):
    more = cut_back(stopped, tmp_path / "more", 36)
    assert train(book, more, stop_when_val_rises=4, **OVERFITS, keep_last="none") == 0
    assert evaluations(more)[-1]["step"] == end_by_hand(overfitted, 4)[0]
    assert train(book, more, **OVERFITS, keep_last="none") == 0
    last = [record["val_loss"] for record in evaluations(more)][-1]
    assert evaluations(more)[-1]["step"] == 36 and last == evaluations(overfitted)[-1]["val_loss"]
    assert "rises" not in read_state(find_checkpoint(more))["best"]


def test_without_validation_data_it_is_refused_before_the_first_step(tmp_path, capsys):
    data = tiny_run.write_tiny_shards(tmp_path / "data", repeats=3)
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert train(data, tmp_path / "run", stop_when_val_rises=1) == 2
    assert "stop_when_val_rises needs a validation split" in capsys.readouterr().err
    assert verify_resume.records(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recut_and_stopped_early_it_is_the_same_run_killed_and_on_one_and_two_processes(book, tmp_path):
    options = OVERFITS | {"recut_windows": [], "stop_when_val_rises": 2, "reduction": "fixed", "resid_pdrop": 0.1}
    options["max_steps"] = 75  # recut, it learns more before the loss rises
    flags = tiny_run.flags(book, tmp_path, **options)
    del flags[flags.index("--run_dir") : flags.index("--run_dir") + 2]
    work = ["--kills", "3", "--processes", "1,2", "--work_dir", str(tmp_path / "work")]
    assert verify_resume.main([*work, "--", *flags]) == 0
    ended = evaluations(tmp_path / "work" / "uninterrupted")
    assert ended[-1]["val_rises"] == 2 and ended[-1]["step"] < 75
