"""The harness on made-up work of known duration, the table on made-up records, the guard on a wrong model."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from gpt2repro.commands.bench import all as bench_all
from gpt2repro.commands.bench import harness, hellaswag, recipes, reduction, table, train, whole
from gpt2repro.commands.bench.harness import CommonOptions, Record, peak_memory_gib, speedup, summary
from gpt2repro.data.shards import open_split
from gpt2repro.data.sources import open_data
from gpt2repro.options import InputError, parse_options
from train_accelerate import TrainConfig


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("train", ["--rounds", "3"], CommonOptions(rounds=3, out=tmp_path))


def read(record: Record) -> dict:
    return json.loads(record.path.read_text(encoding="utf-8"))


def test_rounds_are_interleaved_in_alternating_order_after_the_warmup(record):
    calls = []
    times = record.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "baabba"
    assert len(times["a"]["rounds"]) == len(times["b"]["rounds"]) == 2


def test_times_and_speedup_are_those_of_the_work(record):
    fast, slow = (lambda: time.sleep(0.01)), (lambda: time.sleep(0.03))
    times = record.compare({"fast": fast, "slow": slow}, warmup=0, units=100, after=lambda: time.sleep(0.02))
    assert 0.01 <= times["fast"]["median_seconds"] < 0.02  # what comes after is not timed
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


def test_record_holds_command_commit_date_hardware_and_versions(record, tmp_path: Path, capsys):
    times = {"ours": summary([1.0], units=10), "theirs": summary([2.0], units=10)}
    record.headline("a step", times, ours="ours", baseline="theirs", unit="tokens/s", goal=1.5)
    record.figure("start-up", 4.0, unit="s", goal=3.0, at_most=True)
    assert not read(record)["complete"]  # written as the rows come
    assert [row["measure"] for row in read(record)["results"]["headlines"]] == ["a step", "start-up"]
    assert record.finish() == 0
    content = read(record)
    assert content["complete"] and record.path == tmp_path / f"train-{harness.host_kind()}.json"
    assert content["command"] == "gpt2repro bench train --rounds 3"
    assert content["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"commit", "date", "hardware"} <= set(content)
    printed = capsys.readouterr().out
    assert "goal >= 1.5x ✓" in printed
    assert "goal <= 3 s ✗ not met" in printed


def test_commit_comes_from_the_environment_only_where_git_knows_none(monkeypatch, tmp_path):
    place = Path(harness.__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True)
    monkeypatch.setenv("GPT2REPRO_COMMIT", "carried")
    if head.returncode == 0:
        assert head.stdout.startswith(harness.commit().partition("+")[0])
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert harness.commit() == "carried"
    monkeypatch.delenv("GPT2REPRO_COMMIT")
    assert harness.commit() == "unknown"


def test_a_bare_gpu_image_lacks_packages_and_loses_only_what_needs_them(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "PACKAGES", ("torch", "no-such-package"))
    record = Record("data", [], CommonOptions(rounds=1, out=tmp_path))

    def theirs():
        raise ModuleNotFoundError("No module named 'datasets'")

    times = record.compare({"ours": lambda: None, "theirs": theirs})
    assert list(times) == ["ours"] and record.finish() == 1
    assert read(record)["versions"].keys() == {"python", "torch"}
    assert read(record)["results"]["lost"] == {"theirs": "ModuleNotFoundError: No module named 'datasets'"}


def test_candidate_without_memory_is_lost_alone_and_the_record_says_so(record):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26 GiB.")

    times = record.compare({"ours": lambda: None, "theirs": too_large})
    assert list(times) == ["ours"] and len(times["ours"]["rounds"]) == 3
    record.headline("a step", times, ours="ours", baseline="theirs", unit="s")
    assert record.finish() == 1
    results = read(record)["results"]
    assert results["headlines"] == [] and "Tried to allocate 26 GiB" in results["lost"]["theirs"]
    assert "theirs lost (OutOfMemoryError" in table.render([read(record)])


def test_what_does_not_fit_into_the_minutes_is_dropped_and_named(tmp_path):
    record = Record("train", [], CommonOptions(rounds=50, minutes=0.1 / 60, out=tmp_path))
    times = record.compare({"ours": lambda: time.sleep(0.15)}, warmup=0)
    assert len(times["ours"]["rounds"]) == harness.LEAST_ROUNDS  # cut short, not lost, and with a spread
    assert not record.time_for("a longer run")
    record.finish()
    assert read(record)["results"]["dropped"] == ["a longer run"] and not read(record)["complete"]
    assert "no time for a longer run" in table.render([read(record)])


def test_a_place_that_cannot_hold_the_record_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / f"train-{harness.host_kind()}.json").mkdir()
    for out in (tmp_path / "file", tmp_path):
        with pytest.raises(InputError, match=r"cannot write .*; choose another place"):
            Record("train", [], CommonOptions(out=out))
    with pytest.raises(InputError, match="cannot write /dev/null/x"):
        hellaswag.main(["--out", "/dev/null/x"])


def test_all_gives_each_benchmark_its_share_of_the_minutes_and_goes_on_after_one_that_fails(tmp_path, monkeypatch):
    """Real programs, told an impossible vocabulary and sizes by a place that cannot hold their records."""
    started = []
    run = subprocess.run

    def watched(command, **how):
        started.append((command[4], float(command[command.index("--minutes") + 1]), how["timeout"]))
        return run([*command[:6], "/dev/null/x"], stderr=subprocess.DEVNULL, **how)

    monkeypatch.setattr(bench_all.subprocess, "run", watched)
    assert bench_all.main(["--only", "data", "hellaswag", "--minutes", "10", "--out", str(tmp_path)]) == 1
    assert [name for name, *_ in started] == ["hellaswag", "data"]  # what a GPU measures comes first
    (_, first, limit), (_, second, _) = started
    assert first == pytest.approx(10 * 1.0 / 1.5, abs=0.1) and 9 < second < 10 and 60 * first < limit <= 600


def made_up_record(gpu: str | None) -> dict:
    """As records of old look: without `complete`, `lost` and `dropped`."""
    row = {"measure": "a step", "unit": "tokens/s", "ours": 1000.0, "baseline": 400.0, "baseline_name": "theirs"}
    return {
        "name": "train",
        "command": "gpt2repro bench train",
        "commit": "abc",
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": {"gpu": gpu, "cpu": "some CPU", "cores": 2, "load_average": 0.5},
        "versions": {"torch": "2.13.0"},
        "results": {"headlines": [{**row, "speedup": {"median": 2.5, "min": 2.0, "max": 3.0}, "goal": 2.0}]},
    }


def test_table_is_rewritten_between_its_markers_from_the_records(tmp_path: Path):
    (tmp_path / "train-cpu.json").write_text(json.dumps(made_up_record(gpu=None)))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main(["--records", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| a step [1] | 2 CPU cores | 1,000 tokens/s | 400 (theirs) | **2.50x** (2.00–3.00) | >= 2x ✓ |" in text
    page.write_text("no markers here")
    with pytest.raises(InputError, match="has no place for the table"):
        table.main(["--records", str(tmp_path), "--page", str(page)])


def test_table_of_the_results_page_is_that_of_its_records(tmp_path):
    root = Path(__file__).parents[1]
    page = (root / "results/README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    table.main(["--records", str(root / "results/benchmarks"), "--page", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page


def test_table_says_not_run_where_no_record_comes_from_a_gpu():
    assert "| GPU | not run |" in table.render([made_up_record(gpu=None)])
    assert "not run" not in table.render([made_up_record(gpu="NVIDIA H200")])


SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 97}
TINY = {**SMALL, "n_positions": 64}


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
    config = parse_options(TrainConfig, command[2:], prog="train")
    assert len(open_data(config, sequences=2).tokenizer) == 97  # else training would refuse the data


@pytest.mark.parametrize("name", [train.OURS, train.TRANSFORMERS, train.BY_HAND])
def test_step_in_two_passes_changes_the_weights_as_one_pass_does(name):
    x, y = torch.randint(0, 97, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    models = []
    for passes in (1, 2):
        _, step, model = train.candidate(name, TINY, torch.device("cpu"), "fp32")
        step(x, y, passes)
        models.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*models, rtol=1e-4, atol=2e-6)


def test_a_training_record_of_a_small_model_has_its_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "small", SMALL)
    few = ["--vocab_size", "97", "--seq_len", "16", "--batch", "4", "--rounds", "2", "--no-compile", "--no-loop"]
    assert train.main([*few, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"train-{harness.host_kind()}.json").read_text())
    case = content["results"]["cases"]["vocabulary 97"]
    assert content["complete"] and set(case["times"]) == {train.OURS, train.TRANSFORMERS, train.BY_HAND}
    (row,) = content["results"]["headlines"]
    assert row["baseline_name"] == train.TRANSFORMERS and row["goal"] == 1.0


@pytest.mark.slow
def test_the_price_of_a_fixed_reduction_is_measured_on_two_processes(tmp_path):
    assert reduction.main(["--rounds", "1", "--processes", "2", "--sizes", "1M", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"reduction-{harness.host_kind()}.json").read_text())
    (times,) = content["results"]["times"].values()
    assert content["complete"] and {name: len(found["rounds"]) for name, found in times.items()} == dict.fromkeys(
        (reduction.PLAIN, reduction.FIXED, reduction.ALL_REDUCE, reduction.EXCHANGE), 2
    )
    assert [row["goal"] for row in content["results"]["headlines"]] == [reduction.GOAL, None]


@pytest.mark.slow
def test_checkpoint_benchmark_compares_equals_and_says_what_a_save_costs(tmp_path):
    from gpt2repro.commands.bench import checkpoint

    sizes = {"vocab_size": 97, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CPU_SIZES", sizes)
        assert checkpoint.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"checkpoint-{harness.host_kind()}.json").read_text())["results"]
    assert len(results["headlines"]) == 2 and set(results["loop_seconds"]) > {"no save"}


def test_a_fixed_reduction_is_timed_against_the_same_step_without_it():
    took = reduction.measure({"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 97, "n_positions": 8}, 2)
    assert {name: len(seconds) for name, seconds in took.items()} == {reduction.PLAIN: 2, reduction.FIXED: 2}


def test_hellaswag_benchmark_gives_the_loops_choices(tmp_path, monkeypatch):
    monkeypatch.setitem(hellaswag.SIZES, "small", SMALL)
    assert hellaswag.main(["--size", "small", "--examples", "4", "--rounds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"hellaswag-{harness.host_kind()}.json").read_text())["results"]
    assert results["largest_score_difference"] < 1e-3 and results["flops_ratio"] > 1.5


def test_a_whole_run_needs_a_checkout_of_nanogpt_with_its_data(tmp_path):
    for options in (["--whole"], ["--whole", "--nanogpt", str(tmp_path)]):
        with pytest.raises(InputError, match="a checkout of nanoGPT"):
            train.main([*options, "--out", str(tmp_path)])
    (tmp_path / "train.py").write_text("")
    with pytest.raises(InputError, match=r"has no train\.bin; make it there: python .*prepare\.py"):
        train.main(["--whole", "--nanogpt", str(tmp_path), "--out", str(tmp_path)])


def test_evaluations_of_a_whole_run_read_as_many_tokens_in_both_programs():
    flags = dict(flag.removeprefix("--").split("=") for flag in whole.RECIPE.split())
    per_split = int(flags["eval_iters"]) * int(flags["batch_size"]) * int(flags["block_size"])
    assert whole.VAL_TOKENS == 2 * per_split == 30_720
    assert whole.our_command(Path("x"), "run")[-1] == "30720"


def test_recipes_are_measured_cell_by_cell_and_a_second_start_does_the_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "GRIDS", {"AdamW": (0.002, 0.004), "Muon": (0.01,)})
    chosen = ("AdamW", "AdamW, linear to 0", "Muon", "Muon, all together")
    monkeypatch.setattr(recipes, "RECIPES", {name: recipes.RECIPES[name] for name in chosen})
    monkeypatch.setattr(recipes, "LENGTHS", (0.5,))
    done = []

    def training(arguments):
        """Stands in for minutes of training: a loss that falls with the steps, by an amount for each option."""
        given = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        steps, seed = given["--max_steps"], given["--seed"]
        loss = 4 - steps / 100 + seed / 10 + abs(given["--lr"] - 0.004) - 0.1 * ("--zero_init" in arguments)
        run_dir = Path(given["--run_dir"])
        run_dir.mkdir(parents=True)
        record = {"step": steps, "val_loss": loss, "val_loss_ema": loss - 0.01 * seed, "bits_per_byte": 1.0}
        lines = [{"step": steps, "loss": loss, "step_seconds": 0.5}, record]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done.append(arguments)
        if len(done) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "program", training)
    (tmp_path / "data").mkdir()
    arguments = ["--widths", "24", "--seeds", "3", "--steps", "40", "--data", str(tmp_path / "data")]
    arguments += ["--work_dir", str(tmp_path / "work"), "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        recipes.main(arguments)
    shutil.rmtree(tmp_path / "work")
    assert recipes.main(arguments) == 0
    cells = 3 * 2 + (3 * 4 - 2 * 2) + 2 * 3 + 3 * 2  # grids; seeds 1-3 but what the grids have; two more; shorter runs
    assert len(done) == cells + 1, "only the cell that was interrupted is trained again"

    content = json.loads((tmp_path / f"recipes-{harness.host_kind()}.json").read_text())
    rows = {row["recipe"]: row for row in content["results"]["comparisons"]}
    assert content["complete"] and content["results"]["rates"] == {"24, AdamW": 0.004, "24, Muon": 0.01}
    assert rows["AdamW"]["mean"] == pytest.approx(4 - 0.4 + 0.3) and rows["AdamW"]["seeds"] == 5
    assert rows["Muon, all together"]["against_plain"]["mean"] == pytest.approx(-0.1)
    assert rows["AdamW, linear to 0"]["against_adamw"]["pairs"] == 3
    # The finalist's loss is 0.094 lower at 40 steps and 0.2 higher at 20; in between straight in the tokens' logarithm.
    needed = content["results"]["tokens_needed"]["Muon, all together, to the loss of AdamW, width 24"]
    assert needed == pytest.approx(2 ** -(0.094 / 0.2), rel=1e-2)
    assert "| 24 | AdamW, linear to 0 + EMA |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_is_a_run_of_the_real_program(tmp_path):
    options = recipes.Options(widths=[24], seeds=1, steps=8, work_dir=tmp_path / "work", out=tmp_path)
    bench = recipes.Bench(Record("recipes", [], options), options)
    bench.cell(24, "Muon, all together", 0.01, 1, 8)
    (cell,) = bench.cells.values()
    assert 4 < cell["val_loss"] < 6.5 and [step for step, _ in cell["curve"]][-1] == 8
