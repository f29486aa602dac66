"""The harness on made-up work of known duration, the table on made-up records, the guard on a wrong model."""

import json
import time
from pathlib import Path

import pytest
import torch

from gpt2repro.commands.bench import harness, optimizers, scale, table, train
from gpt2repro.commands.bench.harness import compare, figure, headline, peak_memory_gib, speedup, summary
from gpt2repro.data.shards import open_split
from gpt2repro.options import InputError


def test_rounds_are_interleaved_in_alternating_order_after_the_warmup():
    calls = []
    times = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ababba"
    assert len(times["a"]["rounds"]) == len(times["b"]["rounds"]) == 2


def test_times_and_speedup_are_those_of_the_work():
    fast, slow = (lambda: time.sleep(0.01)), (lambda: time.sleep(0.03))
    times = compare({"fast": fast, "slow": slow}, rounds=3, warmup=0, units=100)
    assert times["fast"]["median_seconds"] >= 0.01
    assert times["fast"]["per_second"] == pytest.approx(100 / times["fast"]["median_seconds"])
    assert 1.5 < speedup(times, ours="fast", baseline="slow")["median"] < 4


def test_speedup_is_the_median_of_the_rounds_own_ratios():
    # The machine was three times slower in the second round: the ratio of that round says so to both.
    times = {"ours": summary([1.0, 3.0, 1.0]), "theirs": summary([2.0, 6.0, 4.0])}
    assert speedup(times, ours="ours", baseline="theirs") == {"median": 2.0, "min": 2.0, "max": 4.0}


def test_peak_memory_counts_what_lives_at_once():
    mebibytes = 8

    def call():
        for _ in range(3):  # one after the other: the peak is that of one
            torch.ones(mebibytes * 2**18)

    assert peak_memory_gib(call) == pytest.approx(mebibytes / 1024, rel=0.01)


def test_record_holds_command_commit_date_hardware_and_versions(tmp_path: Path, capsys):
    times = {"ours": summary([1.0], units=10), "theirs": summary([2.0], units=10)}
    rows = [
        headline("a step", times, ours="ours", baseline="theirs", unit="tokens/s", goal=1.5),
        figure("start-up", 4.0, unit="s", goal=3.0, at_most=True),
    ]
    path = harness.write_record("train", {"headlines": rows}, argv=["--rounds", "1"], out=tmp_path)
    record = json.loads(path.read_text())
    assert path.name == f"train-{harness.host_kind()}.json"
    assert record["command"] == "gpt2repro bench train --rounds 1"
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"commit", "date", "hardware"} <= set(record)
    printed = capsys.readouterr().out
    assert "goal >= 1.5x: reached" in printed
    assert "goal <= 3 s: NOT reached" in printed


def made_up_record(gpu: str | None) -> dict:
    times = {"ours": summary([1.0, 1.0], units=1000), "theirs": summary([2.0, 3.0], units=1000)}
    return {
        "name": "train",
        "command": "gpt2repro bench train",
        "commit": "abc",
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": {"gpu": gpu, "cpu": "some CPU", "cores": 2, "load_average": 0.5},
        "versions": {"torch": "2.13.0"},
        "results": {
            "headlines": [headline("a step", times, ours="ours", baseline="theirs", unit="tokens/s", goal=2.0)]
        },
    }


def test_table_is_rewritten_between_its_markers_from_the_records(tmp_path: Path):
    (tmp_path / "train-cpu.json").write_text(json.dumps(made_up_record(gpu=None)))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main(["--records", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| a step [1] | 2 CPU cores | 1,000 tokens/s | 400 (theirs) |" in text
    assert "**2.50x** (2.00–3.00)" in text
    assert ">= 2x ✓" in text


def test_table_says_not_run_where_no_record_comes_from_a_gpu():
    assert "| GPU | not run |" in table.render([made_up_record(gpu=None)])
    assert "not run" not in table.render([made_up_record(gpu="NVIDIA H200")])


def test_readme_without_markers_is_told_what_to_add(tmp_path: Path):
    with pytest.raises(InputError, match="has no place for the table"):
        table.replace("no markers here", "table", where="README.md")


TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 97, "n_positions": 64}


def test_every_candidate_of_the_training_benchmark_has_the_references_loss_and_gradients():
    x, y = torch.randint(0, 97, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    expected = train.reference(TINY, x, y, cpu)
    for name in (train.OURS, train.TRANSFORMERS, train.BY_HAND):
        loss_of, step, model = train.candidate(name, TINY, cpu, "fp32")
        train.guard(name, loss_of, model, expected, x, y, {"loss": 1e-5, "gradients": 1e-5})
        step(x, y)
        assert loss_of(x, y).item() < expected[0]  # the step was one downhill


def test_candidate_that_computes_something_else_is_not_timed():
    x, y = torch.randint(0, 97, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    expected = train.reference(TINY, x, y, cpu)
    loss_of, _, model = train.candidate(train.BY_HAND, TINY, cpu, "fp32")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias.zero_()
    with pytest.raises(harness.NotEqual, match="hand-written"):
        train.guard(train.BY_HAND, loss_of, model, expected, x, y, train.BOUNDS["fp32"])


def test_random_data_of_the_loop_measurement_is_a_data_set(tmp_path: Path):
    command = train.training_command(tmp_path, TINY, batch=2, seq_len=16, steps=3)
    split = open_split(tmp_path / "data", "train")
    assert split.vocab_size == 97 and split.tokens >= 3 * 2 * 16 + 1
    assert command[command.index("--max_steps") + 1] == "3"


def test_growth_is_the_exponent_of_a_power_law():
    points = [{"x": x, "y": 3 * x**1.5} for x in (1, 10, 100)]
    assert scale.slope(points, "x", "y") == pytest.approx(1.5)


def test_simulated_corpus_of_a_trillion_tokens_gives_batches():
    point = scale.measure_batch(10**12, rounds=1, sequences=4, seq_len=16)
    assert point["seconds"] < 0.1


@pytest.mark.parametrize("name", [train.OURS, train.TRANSFORMERS, train.BY_HAND])
def test_step_in_two_passes_changes_the_weights_as_one_pass_does(name):
    x, y = torch.randint(0, 97, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    models = []
    for passes in (1, 2):
        _, step, model = train.candidate(name, TINY, torch.device("cpu"), "fp32")
        step(x, y, passes)
        models.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*models, rtol=1e-4, atol=2e-6)


def test_optimizers_are_compared_on_the_same_data_and_the_best_rates_drawn(tmp_path: Path):
    train.training_command(tmp_path, {**TINY, "n_positions": 64}, batch=12, seq_len=64, steps=4)
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path), "--figures", str(tmp_path)]
    assert optimizers.main([*places, "--steps", "4", "--lr", "1e-3", "1e-2", "--val_windows", "4"]) == 0
    results = json.loads((tmp_path / f"optimizers-{harness.host_kind()}.json").read_text())["results"]
    settings = [(run["optimizer"], run["lr"], run["steps"]) for run in results["runs"]]
    both = [(name, lr, 4) for lr in (1e-3, 1e-2) for name in ("adamw", "muon")]
    assert settings == [*both, ("muon", results["best_lr"]["muon"], 2)]
    assert (tmp_path / f"optimizers-{harness.host_kind()}.png").stat().st_size > 10_000
