"""The training script end to end: small runs of the real thing, compared with other runs of it and with formulas."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

import train_accelerate
from gpt2repro.checkpoint.layout import resolve_pointer
from gpt2repro.data.sources import open_source
from gpt2repro.data.tokenization import load_tokenizer
from gpt2repro.models import build_model
from gpt2repro.options import run_main
from gpt2repro.training.machine import environment, keep_sums_exact
from gpt2repro.training.run import lock_run

SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32,
    "seq_len": 32, "batch_tokens": 256, "micro_batch_size": 4,
    "max_steps": 12, "warmup_steps": 3, "lr": 0.01, "min_lr": 0.001, "eval_steps": 6, "save_steps": 6, "log_steps": 4,
    "val_tokens": 512, "sample_tokens": 4, "keep_last": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared data set: the files of this test folder as text, a vocabulary of 300."""
    from gpt2repro.commands.prepare_text import main

    directory = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        shutil.copy(path, directory / f"{path.stem}.txt")
    out = directory / "data"
    options = flags(input=directory, vocab_size=300, val_fraction=0.2, out=out)
    assert run_main(main, options) == 0
    return out


def flags(**options) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def train(run_dir: Path, corpus: Path, **options) -> int:
    return run_main(train_accelerate.main, flags(**{**SETTINGS, "data": corpus, "run_dir": run_dir, **options}))


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir) if "loss" in record}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(run_dir, corpus) == 0
    return run_dir


def test_a_run_leaves_its_log_picture_samples_and_loadable_checkpoints(finished):
    from transformers import AutoTokenizer

    from modeling_gpt2repro import GPT2ReproForCausalLM

    assert json.loads((finished / "status.json").read_text())["exit_code"] == 0
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [r["step"] for r in records(finished) if "val_loss" in r] == [0, 6, 12]
    assert set(losses(finished)) == set(range(1, 13))
    assert sorted(path.name for path in (finished / "samples").iterdir()) == [f"step_{n:06d}.md" for n in (0, 6, 12)]
    for name in ("latest", "best", "final"):
        checkpoint = resolve_pointer(finished / "checkpoints", name)
        model = GPT2ReproForCausalLM.from_pretrained(checkpoint)
        assert model.config.n_embd == 32
        assert len(AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)) == model.config.vocab_size


def test_training_lowers_the_loss_and_logs_what_it_did(finished):
    first, last = (r["val_loss"] for r in records(finished) if "val_loss" in r and r["step"] in (0, 12))
    assert abs(first - math.log(300)) < 0.1  # an untrained model knows nothing
    assert last < first - 0.5
    record = next(r for r in records(finished) if r["step"] == 3 and "loss" in r)
    assert record["lr"] == pytest.approx(0.01)  # the third of three warm-up steps
    assert record["tokens"] == 3 * 256
    assert record["tokens_per_second"] > 0 and record["grad_norm"] > 0


def test_the_saved_config_is_itself_a_config_that_repeats_the_run(finished, tmp_path):
    again = tmp_path / "again"
    assert run_main(train_accelerate.main, flags(config=finished / "config.yaml", run_dir=again)) == 0
    assert losses(again) == losses(finished)


def test_resumed_run_equals_uninterrupted_run(finished, corpus, tmp_path, capsys):
    resumed = tmp_path / "resumed"
    shutil.copytree(finished, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step_000012")  # as if it had been killed between the two saves
    assert train(resumed, corpus) == 0
    assert "continuing from" in capsys.readouterr().out
    assert losses(resumed) == losses(finished)
    weights = [run / "checkpoints" / "step_000012" / "model.safetensors" for run in (finished, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_finished_run_is_left_as_it_is(finished, corpus):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train(finished, corpus) == 0
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_saved_checkpoint_is_always_an_evaluated_one(corpus, tmp_path):
    assert train(tmp_path, corpus, max_steps=8, save_steps=3, eval_steps=4, log_steps=100) == 0
    assert [r["step"] for r in records(tmp_path) if "val_loss" in r] == [0, 3, 4, 6, 8]
    best = min(
        (r for r in records(tmp_path) if "val_loss" in r and r["step"] in (3, 6, 8)), key=lambda r: r["val_loss"]
    )
    assert resolve_pointer(tmp_path / "checkpoints", "best").name == f"step_{best['step']:06d}"


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_micro_batches_do_not_change_the_result(finished, corpus, tmp_path, micro_batch_size):
    assert train(tmp_path, corpus, micro_batch_size=micro_batch_size) == 0
    expected, got = losses(finished), losses(tmp_path)
    assert max(abs(expected[step] - got[step]) for step in expected) < 1e-5


def test_two_processes_agree_with_one_over_50_steps(corpus, tmp_path, run_program):
    options = {**SETTINGS, "data": corpus, "max_steps": 50, "save_steps": 50, "eval_steps": 50, "lr": 0.003}
    assert run_main(train_accelerate.main, flags(**options, run_dir=tmp_path / "one")) == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(Path(train_accelerate.__file__))]
    done = run_program([*launch, *flags(**options, run_dir=tmp_path / "two")], timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 50
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    state = json.loads((tmp_path / "two/checkpoints/step_000050/trainer_state/state.json").read_text())["state"]
    assert state["environment"]["processes"] == 2


def test_dropout_is_a_function_of_seed_and_step(corpus, tmp_path):
    """Resuming after step 6 draws the same masks as going on would have, and no evaluation disturbs them."""
    options = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "max_steps": 9}
    assert train(tmp_path / "a", corpus, **options) == 0
    assert train(tmp_path / "b", corpus, **options, sample_tokens=0, eval_steps=9) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    shutil.rmtree(tmp_path / "a/checkpoints/step_000009")
    expected = losses(tmp_path / "a")
    assert train(tmp_path / "a", corpus, **options) == 0
    assert losses(tmp_path / "a") == expected


def test_fine_tuning_starts_from_the_given_weights(finished, corpus, tmp_path, capfd):
    """The sizes of the given model are those that config.yaml, and with it the model card, states."""
    others = {"init_from": finished, "n_layer": 12, "n_embd": 768, "n_positions": 1024}
    assert train(tmp_path, corpus, **others, lr=1e-4, min_lr=1e-5, max_steps=2) == 0
    assert "Loading weights" not in capfd.readouterr().err
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [config[name] for name in ("n_layer", "n_embd", "n_positions", "vocab_size")] == [2, 32, 32, 300]
    assert train(tmp_path, corpus, config=tmp_path / "config.yaml", max_steps=3) == 0
    start = next(r["val_loss"] for r in records(tmp_path) if "val_loss" in r)
    end = [r["val_loss"] for r in records(finished) if "val_loss" in r][-1]
    assert start == pytest.approx(end, abs=1e-5)


@pytest.mark.parametrize(
    ("started", "said"),
    [
        ("/opt/v/bin/python3.11 /opt/v/bin/gpt2repro train --lr 1e-3", "gpt2repro train --lr 1e-3"),
        ("/opt/v/bin/python -u -m gpt2repro train", "python -u -m gpt2repro train"),
        ("python", "python"),
    ],
)
def test_the_command_that_is_kept_has_no_places_of_this_machine(monkeypatch, fresh_accelerate, started, said):
    monkeypatch.setattr(sys, "orig_argv", started.split())
    assert environment(Accelerator(cpu=True))["command"] == said


def test_loss_options_do_not_change_the_result(finished, corpus, tmp_path):
    options = ["--gradient_checkpointing", *flags(loss_chunk_tokens=50)]
    common = flags(**{**SETTINGS, "data": corpus, "run_dir": tmp_path})
    assert run_main(train_accelerate.main, [*common, *options]) == 0
    expected, got = losses(finished), losses(tmp_path)
    assert max(abs(expected[step] - got[step]) for step in expected) < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-3), ("bf16", 0.1)])
def test_precisions_train_alike(finished, corpus, tmp_path, fresh_accelerate, precision, tolerance):
    assert train(tmp_path, corpus, precision=precision, max_steps=12) == 0
    expected, got = losses(finished), losses(tmp_path)
    assert max(abs(expected[step] - got[step]) for step in expected) < tolerance


@pytest.mark.slow
def test_two_processes_with_compiled_blocks_agree_with_one_that_compiles_nothing(
    finished, corpus, tmp_path, run_program
):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(Path(train_accelerate.__file__))]
    options = flags(**SETTINGS, data=corpus, run_dir=tmp_path, compile="block")
    done = run_program([*launch, *options], timeout=400)
    assert done.returncode == 0, done.stderr
    expected, got = losses(finished), losses(tmp_path)
    assert max(abs(expected[step] - got[step]) for step in expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "block"])
def test_compiled_run_equals_eager_run_with_evaluation_and_samples(finished, corpus, tmp_path, how):
    assert train(tmp_path, corpus, compile=how) == 0
    expected, got = losses(finished), losses(tmp_path)
    assert max(abs(expected[step] - got[step]) for step in expected) < 1e-5
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoints/step_000012/model.safetensors", "pt") as file:
        assert not any("_orig_mod" in name or "module." in name for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_python_torchrun_and_accelerate_launch_all_start_it(finished, corpus, tmp_path, run_program):
    script = str(Path(train_accelerate.__file__))
    launchers = {
        "python": [script],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "1", script],
        "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", script],
    }
    for name, start in launchers.items():
        options = flags(**{**SETTINGS, "data": corpus, "run_dir": tmp_path / name})
        done = run_program([*start, *options], timeout=240)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert losses(tmp_path / name) == losses(finished), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "nowhere"}, "nowhere is no directory"),
        ({"batch_tokens": 250}, "batch_tokens=250 is not a multiple of 128"),
        ({"n_embd": 33}, "n_embd=33 is not a multiple of n_head=2"),
        ({"seq_len": 64}, "seq_len=64 is longer than n_positions=32"),
        ({"batch_tokens": 2**24}, "fewer than one batch"),
        ({"vocab_size": 200}, "vocabulary of 300"),
        ({"init_from": "nowhere/at/all"}, "nowhere/at/all"),
        ({"resume": "never"}, "already holds a run"),
        ({"seed": 2}, "seed was 1337 and is now 2"),
        ({"n_layer": 3}, "n_layer was 2 and is now 3"),
        ({"optimizer": "muon"}, "optimizer was adamw and is now muon"),
        ({"precision": "fp16"}, "precision=fp16"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence_and_harms_no_run(finished, corpus, capsys, options, said):
    before = {path: path.read_bytes() for path in finished.rglob("*.json*")}
    assert train(finished, corpus, **options) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in before} == before


def test_two_processes_cannot_train_in_one_run_directory(finished, corpus, capsys):
    lock = lock_run(finished)
    try:
        assert train(finished, corpus) == 2
        assert "another process is training" in capsys.readouterr().err
    finally:
        lock.release()


def test_plan_prints_the_run_and_says_what_does_not_fit(corpus, tmp_path, capsys):
    common = flags(**{**SETTINGS, "data": corpus, "run_dir": tmp_path})
    assert run_main(train_accelerate.main, [*common, "--plan"]) == 0
    report = capsys.readouterr().out
    assert "parameters" in report and "256 tokens = 4 sequences x 32 tokens" in report
    assert run_main(train_accelerate.main, [*common, "--plan", "--gpu_memory_gib", "0.1"]) == 2
    assert "do not fit" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_every_preset_is_a_valid_configuration():
    from gpt2repro.options import parse_options, preset_names

    for name in preset_names():
        config = parse_options(train_accelerate.TrainConfig, ["--config", name], prog=sys.argv[0])
        assert config.run_dir == Path("runs") / name


def test_an_overflow_of_fp16_is_the_scalers_business_and_no_bad_number(corpus, tmp_path, monkeypatch, fresh_accelerate):
    """Accelerate knows fp16 on GPUs only, so a scaler of torch is put into a run on the CPU; the optimizer is fused."""
    import torch
    from accelerate import Accelerator

    def with_a_scaler(config):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the first losses overflow
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    monkeypatch.setattr("gpt2repro.training.machine.build_accelerator", with_a_scaler)
    assert train(tmp_path, corpus, max_steps=6, sample_tokens=0) == 0
    steps = [record for record in records(tmp_path) if "loss" in record]
    assert steps[0]["scaler_skipped"] and steps[0]["grad_norm"] is None
    assert not steps[-1]["scaler_skipped"] and steps[-1]["loss"] < steps[0]["loss"]


def test_accumulation_set_in_accelerates_environment_divides_nothing(finished, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(tmp_path, corpus) == 0
    assert losses(tmp_path) == losses(finished)


def test_a_failure_in_the_first_evaluation_is_in_status_json(corpus, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("gpt2repro.training.evaluator.validation_loss", fails)
    with pytest.raises(RuntimeError):
        train(tmp_path, corpus)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1) and "no memory left" in status["message"]


def test_a_bf16_residual_without_bf16_autocast_is_refused(corpus, tmp_path, capsys):
    options = flags(**{**SETTINGS, "data": corpus, "run_dir": tmp_path})
    assert run_main(train_accelerate.main, [*options, "--bf16_residual"]) == 2
    assert "mixed precision bf16" in capsys.readouterr().err


def test_fsdp2_does_not_round_the_loss_to_bf16():
    import torch
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype is torch.bfloat16, "Accelerate's default has changed"
    keep_sums_exact(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype) == (torch.bfloat16, None)
    keep_sums_exact(None)  # no FSDP


def test_zero_init_changes_the_projections_into_the_stream_and_nothing_else(corpus):
    source = open_source(str(corpus), seq_len=16, seed=0, sequences=1)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "seq_len": 16}
    plain, zeroed = (
        build_model(train_accelerate.TrainConfig(data="", zero_init=zero, **sizes), source.vocab_size, tokenizer)
        for zero in (False, True)
    )
    for (name, before), after in zip(plain.named_parameters(), zeroed.parameters(), strict=True):
        assert torch.equal(after, torch.zeros_like(before) if name.endswith("c_proj.weight") else before), name
    ids = torch.arange(16)[None]
    entered = zeroed.transformer.wte(ids) + zeroed.transformer.wpe(ids)
    assert torch.equal(zeroed.transformer(ids).last_hidden_state, zeroed.transformer.ln_f(entered))
