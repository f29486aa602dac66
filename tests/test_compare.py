"""`gpt2repro compare`: Student's paired t-test against printed tables and closed forms; refusals."""

import json
import math
import random

import pytest
import yaml

from gpt2repro.commands import compare
from gpt2repro.options import run_main
from gpt2repro.training.comparison import paired


def run_with(folder, seed: int, loss: float, *, last_step: int = 10):
    """A directory that looks like a finished run of 10 steps."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "max_steps": 10}))
    records = [{"step": 0, "val_loss": 9.0}, {"step": last_step, "val_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


@pytest.mark.parametrize(
    ("t", "pairs", "p"), [(4.303, 3, 0.05), (2.776, 5, 0.05), (3.250, 10, 0.01), (2.021, 41, 0.05)]
)
def test_p_is_that_of_the_printed_tables(t, pairs, p):
    # Differences with mean t / sqrt(n) and standard deviation 1, so that the statistic is t.
    deviations = [(-1) ** i for i in range(pairs - pairs % 2)] + [0] * (pairs % 2)
    scale = math.sqrt(sum(d * d for d in deviations) / (pairs - 1))
    values = {seed: t / math.sqrt(pairs) + d / scale for seed, d in enumerate(deviations)}
    found = paired(values, dict.fromkeys(values, 0.0))
    assert found["t"] == pytest.approx(t) and found["p"] == pytest.approx(p, rel=2e-3)


def test_p_is_the_closed_form_where_there_is_one():
    chance = random.Random(0)
    closed = {
        3: lambda t: 1 - t / math.sqrt(t * t + 2),
        4: lambda t: 1 - 2 / math.pi * (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3))),
    }
    for pairs, p in closed.items():
        ours, theirs = ({seed: chance.gauss(3, 0.1) for seed in range(pairs)} for _ in range(2))
        found = paired(ours, theirs)
        assert found["p"] == pytest.approx(p(abs(found["t"])), rel=1e-9)


def test_runs_are_paired_by_seed_whatever_their_order(tmp_path, capsys):
    old = [run_with(tmp_path / f"old-{seed}", seed, 4.0 + seed) for seed in (1, 2, 3, 4)]
    # 0.1 better for every seed, give or take 0.01: invisible among losses that differ by 1, plain in pairs.
    new = [run_with(tmp_path / f"new-{s}", s, 3.9 + s + 0.01 * (-1) ** s) for s in (3, 1, 2, 7)]
    out = tmp_path / "found.json"
    assert run_main(compare.main, [*new, "--against", *old, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["pairs"] == 3 and found["mean"] == pytest.approx(-0.1 - 0.01 / 3) and found["p"] < 0.01
    shown = capsys.readouterr().out
    assert "the runs are better by 0.1033" in shown and "left out, since only one side has them: seeds 4, 7" in shown


def test_noise_is_called_noise_and_two_seeds_are_too_few(tmp_path, capsys):
    old = [run_with(tmp_path / f"old-{seed}", seed, 4.0) for seed in (1, 2, 3)]
    new = [run_with(tmp_path / f"new-{s}", s, loss) for s, loss in ((1, 3.9), (2, 4.12), (3, 3.97))]
    assert run_main(compare.main, [*new, "--against", *old]) == 0
    assert "no difference that 3 pairs can show" in capsys.readouterr().out
    assert run_main(compare.main, [*new[:2], "--against", *old]) == 0
    assert "too few seeds to say anything: 2 in common, at least 3 are needed" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    fine, twin = run_with(tmp_path / "a", 1, 4.0), run_with(tmp_path / "b", 1, 4.1)
    unfinished = run_with(tmp_path / "c", 2, 4.0, last_step=5)
    for arguments, sentence in (
        ([fine, twin, "--against", fine], "has seed 1, as another run of its side has"),
        ([fine, "--against", unfinished], "has not evaluated its last step, 10"),
        ([str(tmp_path), "--against", fine], "is no run"),
        (["--against", fine], "name finished runs"),
        *(([damaged], "damaged-") for damaged in damaged_runs(tmp_path)),
    ):
        assert run_main(compare.main, arguments) == 2
        assert sentence in capsys.readouterr().err


def damaged_runs(folder) -> list[str]:
    """Runs whose config.yaml says nothing that could be compared."""
    runs = []
    for content in (b"\xff\xfe", b"[unclosed", b"- 1", b"seed: 1", b"{seed: x, max_steps: 10}", b"seed: !!timestamp x"):
        runs.append(run_with(folder / f"damaged-{len(runs)}", 1, 4.0))
        (folder / f"damaged-{len(runs) - 1}/config.yaml").write_bytes(content)
    return runs


def test_without_another_side_it_says_the_spread(tmp_path, capsys):
    runs = [run_with(tmp_path / f"{seed}", seed, loss) for seed, loss in ((1, 4.0), (2, 4.1), (3, 4.2))]
    assert run_main(compare.main, [*runs, "--out", str(tmp_path / "spread.json")]) == 0
    assert "mean 4.1000 ± 0.0577 (standard error)" in capsys.readouterr().out  # 0.1 / sqrt(3)
    assert json.loads((tmp_path / "spread.json").read_text())["losses"]["runs"] == {"1": 4.0, "2": 4.1, "3": 4.2}


@pytest.mark.parametrize("content", ["seed: 1", "max_steps: [", "- 1", "max_steps: ten\nseed: 1", ""])
def test_a_config_that_no_run_wrote_is_a_sentence(content, tmp_path, capsys):
    run = run_with(tmp_path / "run", 1, 3.0)
    (tmp_path / "run/config.yaml").write_text(content)
    assert run_main(compare.main, [run]) == 2
    assert "config.yaml" in capsys.readouterr().err
