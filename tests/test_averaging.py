"""Averaged weights: beside the training (EMA) against the formula in float64, and over a run's checkpoints."""

import json
import math
import shutil

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import train_accelerate
from gpt2repro.commands import average
from gpt2repro.data.sources import open_source
from gpt2repro.files import sha256_of
from gpt2repro.options import run_main
from gpt2repro.publishing.exports import export_native
from gpt2repro.publishing.model_card import card_files

DECAY = 0.6


def train(data, run_dir, **options) -> int:
    return run_main(train_accelerate.main, tiny_run.flags(data, run_dir, **options))


def evaluations(run_dir) -> dict[int, dict]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in lines if "val_loss" in record}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("averaging")
    data = tiny_run.write_tiny_shards(folder / "data")
    options = {"max_steps": 12, "save_steps": 1, "eval_steps": 4, "keep_last": "none", "ema_decay": DECAY}
    assert train(data, folder / "run", **options) == 0
    return folder / "run"


def weights(run_dir, step: int, folder: str = "") -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/step_{step:06d}/{folder}model.safetensors")


def test_the_average_follows_the_formula_over_the_saved_weights(run):
    expected = {name: tensor.double() for name, tensor in weights(run, 1, "ema/").items()}
    for step in range(2, 13):
        decay = min(DECAY, step / (step + 9))  # 2/11 at first
        expected = {n: decay * expected[n] + (1 - decay) * w.double() for n, w in weights(run, step).items()}
        found = weights(run, step, "ema/")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(found["transformer.wte.weight"], weights(run, 12)["transformer.wte.weight"])


def loss_of(model, split) -> float:
    """Mean loss over the run's validation tokens, by transformers' own shift and cross-entropy."""
    tokens = torch.tensor(split.read(0, 257).astype("int64"))
    inputs, targets = tokens[:-1].view(-1, 16), tokens[1:].view(-1, 16)
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()


def test_the_average_is_a_model_of_its_own_with_the_logged_loss(run, tmp_path):
    split = open_source(str(run.parent / "data"), seq_len=16, seed=0, sequences=1).validation
    ema = run / "checkpoints/step_000012/ema"
    native = GPT2LMHeadModel.from_pretrained(export_native(ema, tmp_path / "native")).eval()
    logged = evaluations(run)[12]
    assert loss_of(native, split) == pytest.approx(logged["val_loss_ema"], abs=1e-5)
    assert logged["val_loss_ema"] != pytest.approx(logged["val_loss"], abs=1e-4)
    ours = AutoModelForCausalLM.from_pretrained(ema, trust_remote_code=True).eval()
    assert loss_of(ours, split) == pytest.approx(logged["val_loss_ema"], abs=1e-5)
    assert json.loads((ema / "average.json").read_text()) == {"kind": "ema", "decay": DECAY, "step": 12}


def test_a_resumed_run_has_the_same_average_and_training_is_as_without(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again, symlinks=True)
    for step in range(8, 13):
        shutil.rmtree(again / f"checkpoints/step_{step:06d}")
    options = {"max_steps": 12, "save_steps": 1, "eval_steps": 4, "keep_last": "none"}
    assert train(run.parent / "data", again, ema_decay=DECAY, **options) == 0
    for name in ("model.safetensors", "ema/model.safetensors"):
        paths = [directory / "checkpoints/step_000012" / name for directory in (run, again)]
        assert sha256_of(paths[0]) == sha256_of(paths[1]), name
    assert evaluations(again)[12] == evaluations(run)[12]

    without = tmp_path / "without"
    assert train(run.parent / "data", without, **options) == 0
    plain = without / "checkpoints/step_000012"
    assert sha256_of(plain / "model.safetensors") == sha256_of(run / "checkpoints/step_000012/model.safetensors")
    assert not (plain / "ema").exists() and "val_loss_ema" not in evaluations(without)[12]


def test_a_damaged_average_is_noticed_by_whoever_loads_it(run, tmp_path, capsys):
    again = tmp_path / "run"
    shutil.copytree(run, again, symlinks=True)
    path = again / "checkpoints/step_000012/ema/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_main(average.main, [str(again), "--last", "2", "--out", str(tmp_path / "mean")]) == 2
    assert "ema/model.safetensors is not what was written" in capsys.readouterr().err
    from gpt2repro.checkpoint.reader import resolve_model
    from gpt2repro.options import InputError

    with pytest.raises(InputError, match="not what was written"):
        resolve_model(str(path.parent))


def test_the_mean_of_the_last_checkpoints_is_a_model_with_tokenizer_and_provenance(run, tmp_path, capsys):
    out = tmp_path / "mean"
    assert run_main(average.main, [str(run), "--last", "3", "--out", str(out)]) == 0
    found = load_file(out / "model.safetensors")
    for name, tensor in found.items():
        expected = sum(weights(run, step)[name].double() for step in (10, 11, 12)) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-7, atol=1e-9)
    made = json.loads((out / "average.json").read_text())
    assert made["kind"] == "mean" and made["steps"] == [10, 11, 12] and made["run"] == "run"
    assert made["validation"]["step_000012"]["val_loss"] == pytest.approx(evaluations(run)[12]["val_loss"], abs=1e-6)
    split = open_source(str(run.parent / "data"), seq_len=16, seed=0, sequences=1).validation
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert loss_of(model, split) == pytest.approx(made["validation"]["mean"]["val_loss"], abs=1e-5)
    assert math.isfinite(loss_of(model, split)) and (out / "tokenizer.json").is_file()
    assert f"{made['validation']['mean']['val_loss']:.4f}" in capsys.readouterr().out
    card = card_files(out, repo="user/mean")["README.md"].decode()
    assert "mean of the checkpoints of steps 10, 11, 12" in card
    assert f"validation loss (nats per token) | {made['validation']['mean']['val_loss']:.4f} |" in card

    assert run_main(average.main, [str(run), "--last", "30", "--out", str(tmp_path / "more")]) == 2
    assert "has 12 checkpoints, not 30" in capsys.readouterr().err and not (tmp_path / "more").exists()

    shutil.copytree(run, tmp_path / "damaged", symlinks=True)
    cut = (run / "config.yaml").read_text().replace("tokenizer:", "# tokenizer:")
    for content, sentence in (("seq_len: [", "is not a readable YAML file"), (cut, "is damaged")):
        (tmp_path / "damaged/config.yaml").write_text(content)
        assert run_main(average.main, [str(tmp_path / "damaged"), "--last", "2", "--out", str(tmp_path / "more")]) == 2
        assert f"config.yaml {sentence}" in capsys.readouterr().err and not (tmp_path / "more").exists()


@pytest.mark.parametrize("kind", ["recipe", "no validation split"])
def test_a_mean_is_compared_as_the_run_was_and_not_at_all_without_validation_data(kind, tmp_path, capsys):
    data = tiny_run.write_tiny_shards(tmp_path / "data")
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 4}
    if kind == "recipe":
        recipe = {"sources": {"words": {"data": str(data)}}, "phases": [{"from_tokens": 0, "weights": {"words": 1.0}}]}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    else:
        (data / "val_000000.bin").unlink()
        manifest = json.loads((data / "manifest.json").read_text())
        del manifest["splits"]["val"]
        (data / "manifest.json").write_text(json.dumps(manifest))
    trained_on = tmp_path / "recipe.yaml" if kind == "recipe" else data
    assert train(trained_on, tmp_path / "run", **options) == 0
    assert run_main(average.main, [str(tmp_path / "run"), "--last", "2", "--out", str(tmp_path / "mean")]) == 0
    compared = json.loads((tmp_path / "mean/average.json").read_text())["validation"]
    if kind == "recipe":
        expected = {name: value for name, value in evaluations(tmp_path / "run")[4].items() if name != "step"}
        assert compared["step_000004"] == pytest.approx(expected) and compared["mean"].keys() == expected.keys()
    else:
        assert compared == {} and "the data has no validation split" in capsys.readouterr().out
