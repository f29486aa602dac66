"""A model of ours as a plain `gpt2`: the same numbers in programs that know nothing of this project."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from gpt2repro.commands import export
from gpt2repro.options import InputError, run_main
from gpt2repro.publishing.exports import check_native, compare, export_native

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


def greedy_ids(model, ids: list[int], count: int) -> list[int]:
    """`model`'s most probable continuation, one whole forward pass per token: no cache, no generate()."""
    for _ in range(count):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def exported(directory, tmp_path, format: str, *more: str):
    out = tmp_path / format
    assert run_main(export.main, ["--model", str(directory), "--out", str(out), "--format", format, *more]) == 0
    record = json.loads((out / "export.json").read_text())
    assert record["native_difference"] < 1e-4 and record["format"] == format
    assert format == "gpt2" or record["difference"] < export.TOLERANCE[format]
    return out, record


def test_the_command_writes_a_plain_gpt2_of_a_run(model, directory, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(directory, tmp_path / "run" / "checkpoints" / "step_000007")
    out, _ = exported(tmp_path / "run", tmp_path, "gpt2")
    assert sorted(path.name for path in out.iterdir() if "token" not in path.name) == [
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors",
    ]
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert type(plain).__name__ == "GPT2LMHeadModel"
    assert greedy_ids(plain, [40, 41], 16) == greedy_ids(model, [40, 41], 16)
    weights = tmp_path / "run" / "checkpoints" / "step_000007" / "model.safetensors"
    before = weights.read_bytes()
    (out / "model.safetensors").write_bytes(b"what its owner saves there")
    assert weights.read_bytes() == before


@pytest.mark.slow
def test_onnxruntime_computes_our_logits_for_any_batch_and_length(model, directory, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, record = exported(directory, tmp_path, "onnx")
    assert record["converter"] == f"torch.onnx {torch.__version__}"
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (2, 20), (3, 64)):
        ids = torch.randint(97, shape)
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(logits), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.extra
def test_ctranslate2_writes_our_greedy_tokens(model, directory, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import AutoTokenizer

    out, record = exported(directory, tmp_path, "ct2")
    assert record["converter"] == f"ctranslate2 {ctranslate2.__version__}"
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(SENTENCES[0]).input_ids
    (found,) = ctranslate2.Generator(str(out), device="cpu").generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)],
        max_length=16,
        min_length=16,
        include_prompt_in_result=False,
    )
    assert found.sequences_ids[0] == greedy_ids(model, ids, 16)


@pytest.mark.extra
def test_llama_cpp_writes_our_greedy_tokens(tmp_path, shared_data, monkeypatch):
    """Where its converter is on the PATH; it knows GPT-2's own tokenizer and none of a few characters."""
    llama_cpp = pytest.importorskip("llama_cpp")
    if shutil.which("convert_hf_to_gguf.py") is None:
        pytest.skip("llama.cpp's convert_hf_to_gguf.py is not on the PATH")
    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.data.tokenization import gpt2_tokenizer
    from modeling_gpt2repro import GPT2ReproForCausalLM

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    gpt2_tokenizer().save_pretrained(tmp_path / "model")
    out, record = exported(tmp_path / "model", tmp_path, "gguf")
    assert "gguf" in record["converter"]
    llm = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=64, verbose=False)
    ids = llm.tokenize(SENTENCES[0].encode(), add_bos=False)
    assert ids == gpt2_tokenizer()(SENTENCES[0]).input_ids
    found = [token for _, token in zip(range(16), llm.generate(ids, temp=0.0, repeat_penalty=1.0), strict=False)]
    assert found == greedy_ids(model, ids, 16)


def test_a_converted_model_that_computes_something_else_is_noticed(model):
    assert compare(model, lambda ids: model(ids).logits[0], 0.0) == 0.0
    for wrong in (0.01, torch.nan):
        with pytest.raises(InputError, match="computes something else: logits differ by"):
            compare(model, lambda ids, wrong=wrong: model(ids).logits[0] + wrong, 1e-3)


def test_what_cannot_be_exported_is_refused_in_a_sentence(directory, tmp_path, monkeypatch, capsys):
    def refused(sentence: str, *arguments: str, model=directory):
        assert run_main(export.main, ["--model", str(model), *arguments, "--out", str(tmp_path / "out")]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and sentence in said[0], said
        assert not (tmp_path / "out").exists()

    monkeypatch.setenv("PATH", "")
    refused("needs --converter PATH/convert_hf_to_gguf.py", "--format", "gguf")
    refused("--converter belongs to --format gguf", "--format", "onnx", "--converter", __file__)
    converter = tmp_path / "convert.py"
    converter.write_text("import a_package_that_is_not_there")
    refused("'a_package_that_is_not_there'; its packages", "--format", "gguf", "--converter", str(converter))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as if it were not installed
    refused("needs ctranslate2: pip install 'gpt2repro[export]'", "--format", "ct2")
    refused("there is no model", model=tmp_path / "absent")
    bare = shutil.copytree(directory, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    refused("has none (tokenizer.json)", "--format", "gguf", "--converter", str(converter), model=bare)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert run_main(export.main, ["--model", str(directory), "--out", str(tmp_path / "full")]) == 2
    assert "not an empty directory" in capsys.readouterr().err
