"""The picture of a run: every run and curve in it, whatever the log holds, and a sentence where there is none."""

import json
import math
import time

import pytest

from gpt2repro.commands import plot
from gpt2repro.options import run_main
from gpt2repro.training.metrics_log import read_metrics
from gpt2repro.training.plotting import draw_runs, run_names, series, smooth


@pytest.fixture
def make_run(tmp_path):
    def make(name: str, steps: int = 200, offset: float = 0.0):
        run = tmp_path / name
        run.mkdir(parents=True)
        with open(run / "metrics.jsonl", "w", encoding="utf-8") as out:
            for step in range(1, steps + 1):
                loss = offset + 2 + 3 * math.exp(-step / 40) + 0.2 * math.sin(step * 7.3)
                record = {
                    "step": step,
                    "loss": loss,
                    "lr": 1e-3 * min(1, step / 20),
                    "tokens_per_second": 5e4 + step % 9,
                }
                out.write(json.dumps(record) + "\n")
                if step % 50 == 0:
                    out.write(json.dumps({"step": step, "val_loss": loss + 0.1}) + "\n")
        return run

    return make


def texts_of(figure) -> set[str]:
    import matplotlib.text

    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def test_the_picture_holds_every_run_and_panel(make_run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    out = draw_runs([make_run("first"), make_run("second", offset=0.5)], tmp_path / "new" / "curves.png")
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 20_000
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
    texts = texts_of(figures[0])
    assert {"Loss", "Learning rate", "Tokens per second", "nats per token"} <= texts
    assert {"first: training, smoothed", "second: training, smoothed"} <= texts
    assert any(text.startswith("second: validation, last ") for text in texts)
    loss_axes = figures[0].axes[0]
    raw, smoothed, validation = loss_axes.lines[:3]
    assert len(raw.get_xdata()) == len(smoothed.get_xdata()) == 200 and list(validation.get_xdata()) == [
        50,
        100,
        150,
        200,
    ]


def test_a_log_with_gaps_bad_numbers_and_a_torn_end_is_drawn(make_run, tmp_path):
    run = make_run("run", steps=3)
    with open(run / "metrics.jsonl", "a") as out:
        out.write('{"step": 4, "loss": null}\n{"step": 5, "loss": NaN, "lr": "fast"}\n{"step": 6, "lo')
    draw_runs([run], tmp_path / "a.png")
    one = tmp_path / "one"
    one.mkdir()
    (one / "metrics.jsonl").write_text('{"step": 0, "val_loss": 4.5}\n')
    draw_runs([one], tmp_path / "b.png")
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_series_leaves_out_what_is_no_number():
    records = [
        {"step": 1, "x": 1.0},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 4, "x": math.inf},
        {"step": 5, "x": 2},
    ]
    assert series(records, "x") == ([1, 5], [1.0, 2])


def test_smoothing_keeps_constants_short_runs_and_straight_lines_and_removes_noise():
    assert smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert smooth([5.0, 1.0, 3.0]) == pytest.approx([5.0, 1.0, 3.0])
    assert smooth([]) == []
    line = [9.0 - 0.01 * i for i in range(500)]
    assert smooth(line)[5:-5] == pytest.approx(line[5:-5])  # no lag
    assert max(map(abs, smooth([(-1.0) ** i for i in range(1000)]))) < 0.1


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path):
    assert run_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert run_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]


def test_the_command_writes_the_picture_and_names_what_is_wrong(make_run, tmp_path, capsys):
    run = make_run("run")
    assert run_main(plot.main, [str(run), "--out", str(tmp_path / "c.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c.png") and (tmp_path / "c.png").exists()
    (tmp_path / "empty").mkdir()
    for arguments, sentence in (
        ([], "name at least one run"),
        ([str(tmp_path / "nowhere")], "nowhere is not a directory"),
        ([str(tmp_path / "empty")], "has no metrics.jsonl with a loss"),
        ([str(run), "--out", str(run / "metrics.jsonl" / "x.png")], "cannot write"),
        ([str(run), "--out", str(tmp_path / "x.xyz")], "must be a file that ends in .png"),
    ):
        assert run_main(plot.main, arguments) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["$x_{$", "_first", "$a$ and $b^$"])
def test_a_run_may_have_any_name(name, make_run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    draw_runs([make_run(name)], tmp_path / "a.png")
    legend = figures[0].axes[0].get_legend()
    assert len(legend.get_texts()) == 2 and all(
        text.get_text().startswith((name, f" {name}", name.replace("$", r"\$"))) for text in legend.get_texts()
    )


@pytest.mark.slow
def test_a_million_lines_cost_seconds_and_little_memory(tmp_path):
    import resource

    record = {
        "step": 1,
        "loss": 3.1,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 5e4,
        "step_seconds": 0.1,
        "mfu": 0.4,
    }
    with (tmp_path / "metrics.jsonl").open("w") as out:
        for step in range(1, 1_000_001):
            out.write(json.dumps(record | {"step": step}) + "\n")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    draw_runs([tmp_path], tmp_path / "a.png")
    assert time.process_time() - began < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_numbers_beyond_any_axis_are_left_out(tmp_path):
    lines = [
        {"step": 1, "loss": 1e308},
        {"step": 2, "loss": -1e308},
        {"step": 3, "loss": 2.5},
        {"step": 10**400, "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_runs([tmp_path], tmp_path / "a.png").is_file()


def test_a_log_with_as_many_evaluations_as_steps_keeps_its_training_curve(tmp_path):
    lines = [{"step": 0, "val_loss": 3.0}]
    for step in range(1, 3001):
        lines += [{"step": step, "loss": 3.0}, {"step": step, "val_loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training, evaluations = read_metrics(tmp_path, at_most=4000)  # every second line was an evaluation
    assert len(training) == 1500 and len(evaluations) == 3001
