"""A model of ours as a plain `gpt2`: the same numbers in programs that know nothing of this project."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from gpt2repro.options import InputError
from gpt2repro.publishing.exports import check_native, export_native

SENTENCES = ["the cat sat on the mat", "a dog ran", "birds can fly over the hill", "the sun is warm today"]


@pytest.fixture(scope="module")
def model():
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 96, "eos_token_id": 96}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**sizes, **ends, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """A directory of ours with a tokenizer, as training and the importers write it."""
    from gpt2repro.data.tokenization import char_tokenizer

    path = tmp_path_factory.mktemp("ours") / "model"
    model.save_pretrained(path)
    char_tokenizer(["".join(map(chr, range(32, 127))) + "\n"]).save_pretrained(path)
    (path / "trainer_state").mkdir()
    (path / "trainer_state" / "state.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def native(directory, tmp_path_factory):
    return export_native(directory, tmp_path_factory.mktemp("native") / "model")


def test_native_files_are_a_plain_gpt2(directory, native):
    config = json.loads((native / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["n_ctx"]) == ("gpt2", ["GPT2LMHeadModel"], 64)
    assert "auto_map" not in config
    assert (native / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert not [path.name for path in native.rglob("*") if path.suffix == ".py" or path.name == "trainer_state"]


def test_native_logits_equal_ours_without_remote_code(model, native):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(native, trust_remote_code=False, dtype=torch.float64)
    assert type(plain).__name__ == "GPT2LMHeadModel"
    ids = AutoTokenizer.from_pretrained(native)(SENTENCES[0], return_tensors="pt").input_ids
    with torch.inference_mode():
        ours = model.double()(ids).logits
        torch.testing.assert_close(plain(ids).logits, ours, rtol=1e-12, atol=1e-12)
    model.float()
    assert check_native(native, model) < 1e-5


def test_a_model_that_computes_something_else_is_noticed(model, native, tmp_path):
    shutil.copytree(native, tmp_path / "other")
    config = json.loads((native / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(InputError, match="logits differ by"):
        check_native(tmp_path / "other", model)


def test_another_architecture_and_a_full_target_are_refused(directory, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="'llama'; only gpt2repro"):
        export_native(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="is not empty"):
        export_native(directory, directory)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "native"])
def test_lm_evaluation_harness_computes_our_log_likelihoods(model, directory, native, tmp_path, kind):
    """The harness in a process of its own, on a task from local files: accuracy from the log-likelihoods we compute."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed")
    choices = [[" mat", " fly", " sun"], [" ran", " hill", " warm"], [" cat", " hill", " today"], [" mat", " a", " on"]]
    rows = [{"context": text, "choices": options, "gold": 0} for text, options in zip(SENTENCES, choices, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    place = {"ours": directory, "native": native}[kind]
    arguments = f"pretrained={place},dtype=float32,trust_remote_code={kind == 'ours'}"
    code = f"""
import json, lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path={str(tmp_path)!r}, include_defaults=False)
done = lm_eval.simple_evaluate(
    "hf", {arguments!r}, tasks=["tiny"], task_manager=manager, device="cpu", batch_size=2, bootstrap_iters=0
)
scores = [[float(one[0]) for one in sample["filtered_resps"]] for sample in done["samples"]["tiny"]]
print("RESULT", json.dumps([done["results"]["tiny"]["acc,none"], scores]))
"""
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy, scores = json.loads(done.stdout.split("RESULT ")[1])
    expected = [[log_likelihood(model, directory, row["context"], choice) for choice in row["choices"]] for row in rows]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert accuracy == sum(one.index(max(one)) == 0 for one in expected) / len(expected)


def log_likelihood(model, directory, context: str, continuation: str) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    context, continuation = tokenizer(context).input_ids, tokenizer(continuation).input_ids
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.slow
def test_onnxruntime_computes_our_logits_for_any_batch_and_length(model, native, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from transformers import GPT2LMHeadModel

    class Logits(torch.nn.Module):
        def __init__(self, plain):
            super().__init__()
            self.plain = plain

        def forward(self, input_ids):  # (B, T) -> (B, T, V)
            return self.plain(input_ids, use_cache=False).logits

    plain = GPT2LMHeadModel.from_pretrained(native, dtype=torch.float32, attn_implementation="eager").eval()
    torch.onnx.export(
        Logits(plain),
        (torch.randint(97, (2, 20)),),
        tmp_path / "model.onnx",
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=64)}},
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((2, 20), (3, 33)):
        ids = torch.randint(97, shape)
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(logits), model(ids).logits, rtol=1e-4, atol=1e-4)
