"""HellaSwag against independent references: lm-evaluation-harness itself, and one example at a time in plain torch."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokenization import bpe_tokenizer, char_tokenizer, gpt2_tokenizer
from gpt2repro.evaluation import hellaswag
from gpt2repro.evaluation.losses import max_length_of
from gpt2repro.evaluation.multiple_choice import NEAR_TIE, score
from gpt2repro.options import InputError
from modeling_gpt2repro import GPT2ReproForCausalLM

TASK = hellaswag.TASK
SYNTHETIC = Path(__file__).parent / "data" / "hellaswag_synthetic.jsonl"
METRICS = ("acc", "acc_norm")


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    return TASK.read(SYNTHETIC)


@pytest.fixture(scope="module")
def tokenizer(examples):
    return bpe_tokenizer([all_text(example) for example in examples], 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(len(tokenizer))


def all_text(example: dict) -> str:
    return " ".join([example["activity_label"], example["ctx"], *example["endings"]])


def tiny(vocab_size: int, n_positions: int = 384) -> GPT2ReproForCausalLM:
    """Large initial weights, so that scores spread and contexts matter."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=vocab_size, n_positions=n_positions, **sizes)).eval()


def judged(model, tokenizer, examples, **how) -> list[dict]:
    prepared = TASK.prepare(examples, tokenizer, max_length_of(model, tokenizer))
    return TASK.predictions(prepared, score(model, prepared, **how))


def evaluated(model, tokenizer, examples) -> dict:
    return TASK.prepare(examples, tokenizer, max_length_of(model, tokenizer)).evaluate(model)


def build_nanogpt_way(model, tokenizer, examples) -> list[dict]:
    """The other reference: one example at a time, four padded rows, all logits, no cleverness."""
    results = []
    for example in examples:
        context = tokenizer.encode(example["ctx"], add_special_tokens=False)
        endings = [tokenizer.encode(" " + ending, add_special_tokens=False) for ending in example["endings"]]
        width = len(context) + max(map(len, endings))
        tokens = torch.zeros(4, width, dtype=torch.long)
        mask = torch.zeros(4, width)
        for row, ending in enumerate(endings):
            tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        with torch.no_grad():
            logits = model(tokens).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(dim=1)
        means = sums / mask[:, 1:].sum(dim=1)
        results.append({"sums": sums, "acc": sums.argmin().item(), "acc_norm": means.argmin().item()})
    return results


def harness_way(model, tokenizer, examples) -> list[dict]:
    """lm-evaluation-harness' own run of its task `hellaswag`, on these examples instead of the Hub's."""
    pytest.importorskip("lm_eval")
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import process_docs

    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
    task = {
        "task": "hellaswag_local",
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(examples)},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": metrics,
    }
    run = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # reading the definitions of all its tasks takes 10 s
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(run["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    return [
        {"sums": [score for score, _ in sample["filtered_resps"]], **{name: sample[name] for name in METRICS}}
        for sample in samples
    ]


def assert_like_build_nanogpt(rows: list[dict], references: list[dict]) -> None:
    for row, reference in zip(rows, references, strict=True):
        np.testing.assert_allclose(row["tokens"]["log_likelihoods"], -reference["sums"].numpy(), rtol=2e-6, atol=2e-5)
        for name in METRICS:
            if row["tokens"][f"{name}_margin"] >= NEAR_TIE:
                assert row["tokens"][name] == reference[name], (row["index"], name)


def assert_like_the_harness(rows: list[dict], references: list[dict]) -> None:
    for row, reference in zip(rows, references, strict=True):
        np.testing.assert_allclose(row["chars"]["log_likelihoods"], reference["sums"], rtol=2e-6, atol=2e-5)
        for name in METRICS:
            if row["chars"][f"{name}_margin"] >= NEAR_TIE:
                assert (row["chars"][name] == row["label"]) == bool(reference[name]), (row["index"], name)


# --- the two references


def test_shipped_examples_score_as_one_example_at_a_time(model, tokenizer, examples):
    assert_like_build_nanogpt(judged(model, tokenizer, examples), build_nanogpt_way(model, tokenizer, examples))


@pytest.mark.extra
def test_shipped_examples_score_as_in_lm_evaluation_harness(model, tokenizer, examples):
    assert_like_the_harness(judged(model, tokenizer, examples), harness_way(model, tokenizer, examples))


@pytest.mark.extra
def test_context_that_is_too_long_loses_its_left_side_as_in_lm_evaluation_harness(tokenizer, examples):
    longest_ending = max(len(ids) for e in examples for ids in tokenizer([" " + t for t in e["endings"]])["input_ids"])
    model = tiny(len(tokenizer), n_positions=longest_ending + 4)
    prepared = TASK.prepare(examples, tokenizer, max_length_of(model))
    assert prepared.truncated["chars"] >= 2
    assert_like_the_harness(judged(model, tokenizer, examples), harness_way(model, tokenizer, examples))


@pytest.mark.extra
def test_token_across_the_border_of_context_and_ending_is_cut_as_in_lm_evaluation_harness(examples):
    tokenizer = merging_tokenizer(examples)
    contexts = [f"{e['activity_label']}: {e['ctx_a']} {e['ctx_b'].capitalize()}".strip() for e in examples]
    spans = [
        tokenizer.encode(f"{context} {e['endings'][0]}")[: len(tokenizer.encode(context))] != tokenizer.encode(context)
        for context, e in zip(contexts, examples, strict=True)
    ]
    assert any(spans)  # or this test would test nothing
    model = tiny(len(tokenizer))
    assert_like_the_harness(judged(model, tokenizer, examples), harness_way(model, tokenizer, examples))


def merging_tokenizer(examples):
    """A BPE without pre-tokenizer: its tokens span spaces, so they merge across the border."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    texts = [hellaswag.harness_text(all_text(example)) for example in examples]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=1024
    )


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_real_examples_score_as_both_references(shared_data, count):
    examples = TASK.read(shared_data / "hellaswag" / "hellaswag_val_500.jsonl", limit=count)
    tokenizer = bpe_tokenizer([all_text(example) for example in examples], 500)
    model = tiny(len(tokenizer))
    rows = judged(model, tokenizer, examples)
    assert_like_build_nanogpt(rows, build_nanogpt_way(model, tokenizer, examples))
    assert_like_the_harness(rows, harness_way(model, tokenizer, examples))


@pytest.mark.slow
def test_real_examples_score_as_both_references_with_gpt2s_vocabulary(shared_data, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    tokenizer = gpt2_tokenizer()
    examples = TASK.read(shared_data / "hellaswag" / "hellaswag_val_500.jsonl", limit=60)
    model = tiny(len(tokenizer), n_positions=1024)
    rows = judged(model, tokenizer, examples)
    assert_like_build_nanogpt(rows, build_nanogpt_way(model, tokenizer, examples))
    assert_like_the_harness(rows, harness_way(model, tokenizer, examples))


# --- edges


def test_equal_endings_tie_exactly_and_the_first_one_wins(model, tokenizer, examples):
    row = judged(model, tokenizer, examples)[1]
    for protocol in TASK.protocols:
        scores = row[protocol]["log_likelihoods"]
        assert scores[0] == scores[1]
        assert row[protocol]["acc"] != 1 and row[protocol]["acc_norm"] != 1


def test_near_ties_are_listed(tokenizer, examples):
    model = tiny(len(tokenizer))
    torch.nn.init.zeros_(model.transformer.wte.weight)  # every token equally likely: the mean per token ties everywhere
    rows = judged(model, tokenizer, examples)
    listed = {(tie["index"], tie["protocol"], tie["metric"]) for tie in TASK.near_ties(rows)}
    assert {(index, "tokens", "acc_norm") for index in range(len(examples))} <= listed
    assert all(row["tokens"]["acc_norm"] == 0 for row in rows)


def test_empty_context_scores_from_the_endings_second_token_as_build_nanogpt_does(model, tokenizer, examples):
    empty = [{**examples[0], "ctx": ""}]
    assert_like_build_nanogpt(judged(model, tokenizer, empty), build_nanogpt_way(model, tokenizer, empty))


def test_ending_longer_than_the_model_is_refused_in_a_sentence(tokenizer, examples):
    with pytest.raises(InputError, match=r"example 1 has an ending of \d+ tokens, more than the model's 4 positions"):
        TASK.prepare(examples, tokenizer, 4)


def test_standard_error_is_that_of_lm_evaluation_harness(model, tokenizer, examples):
    record = evaluated(model, tokenizer, examples)
    accuracy, n = record["hellaswag_acc_norm_chars"], len(examples)
    sample = [1.0] * round(accuracy * n) + [0.0] * round((1 - accuracy) * n)
    assert record["hellaswag_acc_norm_chars_stderr"] == pytest.approx(np.std(sample, ddof=1) / math.sqrt(n))
    assert record["hellaswag_examples"] == n


# --- the way of computing must not matter


@pytest.mark.parametrize("batch_tokens", [1, 300, 10**6])
def test_batch_size_and_sharing_do_not_change_scores(model, tokenizer, examples, batch_tokens):
    expected = judged(model, tokenizer, examples, share_contexts=False, batch_tokens=1)
    found = judged(model, tokenizer, examples, share_contexts=True, batch_tokens=batch_tokens)
    assert_same_scores(found, expected)


def assert_same_scores(found: list[dict], expected: list[dict]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for protocol in TASK.protocols:
            np.testing.assert_allclose(
                mine[protocol]["log_likelihoods"], theirs[protocol]["log_likelihoods"], rtol=2e-6, atol=2e-5
            )


def other_model(name: str, vocab_size: int):
    import transformers as t

    common = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"initializer_range": 0.2, "max_position_embeddings": 384, "bos_token_id": None, "eos_token_id": None}
    configs = {
        "gpt2": lambda: t.GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=384),
        "llama": lambda: t.LlamaConfig(**common, intermediate_size=64),
        "gpt_neox": lambda: t.GPTNeoXConfig(**common, intermediate_size=64),
        "opt": lambda: t.OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=None),
        "bloom": lambda: t.BloomConfig(
            vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4
        ),  # ALiBi: no positions
    }
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(configs[name]()).eval()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt", "bloom"])
def test_any_causal_language_model_scores_as_one_example_at_a_time(name, tokenizer, examples):
    model = other_model(name, len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model that refuses shared contexts says so, and is scored all the same
        rows = judged(model, tokenizer, examples)
    assert_like_build_nanogpt(rows, build_nanogpt_way(model, tokenizer, examples))


def test_model_that_ignores_the_mask_is_recognised(model, tokenizer, examples):
    class Forgetful(GPT2ReproForCausalLM):
        def forward(self, input_ids, **kwargs):
            kwargs.pop("attention_mask", None)
            return super().forward(input_ids, **kwargs)

    forgetful = Forgetful(model.config).eval()
    forgetful.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="contexts are not shared"):
        rows = judged(forgetful, tokenizer, examples)
    assert_like_build_nanogpt(rows, build_nanogpt_way(model, tokenizer, examples))


def test_compiled_model_is_scored_without_compiling_anything(model, tokenizer, examples):
    def refuse(graph, inputs):
        raise AssertionError("HellaSwag compiled something")

    expected = judged(model, tokenizer, examples)
    compiled = tiny(len(tokenizer))
    compiled.compile(backend=refuse)
    for block in compiled.transformer.h:
        block.compile(backend=refuse)
    assert judged(compiled, tokenizer, examples) == expected


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bf16_scores_are_near_those_in_fp32(tokenizer, examples, way):
    model = tiny(len(tokenizer))
    exact = judged(model, tokenizer, examples)
    if way == "weights":
        rounded = judged(model.bfloat16(), tokenizer, examples, share_contexts=True)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rounded = judged(model, tokenizer, examples, share_contexts=True)
    for mine, theirs in zip(rounded, exact, strict=True):
        for protocol in TASK.protocols:
            np.testing.assert_allclose(
                mine[protocol]["log_likelihoods"], theirs[protocol]["log_likelihoods"], rtol=0.03, atol=0.3
            )


def test_training_mode_and_gradients_are_as_before(tokenizer, examples):
    model = tiny(len(tokenizer)).train()
    evaluated(model, tokenizer, examples[:2])
    assert model.training and model.transformer.training
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, labels=ids).loss.backward()


def test_character_tokenizer_is_scored_like_any_other(examples):
    tokenizer = char_tokenizer([all_text(example) for example in examples])
    model = tiny(len(tokenizer), n_positions=600)
    assert_like_build_nanogpt(judged(model, tokenizer, examples), build_nanogpt_way(model, tokenizer, examples))


# --- reading


def test_labels_of_the_hubs_test_split_are_absent_and_others_may_be_text(tmp_path):
    example = json.loads(SYNTHETIC.read_text(encoding="utf-8").splitlines()[0])
    lines = [json.dumps({**example, "label": label}) for label in ("2", 1, "")]
    (tmp_path / "hellaswag_val.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [example["label"] for example in TASK.read(tmp_path)] == [2, 1, None]
    assert len(TASK.read(tmp_path, limit=2)) == 2


def test_dataset_in_the_hubs_form_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in SYNTHETIC.read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "label": str(row["label"])} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert TASK.read(tmp_path) == TASK.read(SYNTHETIC)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"ctx": "x"}', "example 1 has no ctx_a, ctx_b, activity_label, endings"),
        ("", "has no examples"),
    ],
)
def test_file_of_another_format_is_refused_in_a_sentence(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        TASK.read(path)


def test_missing_file_and_absent_split_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        TASK.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="no examples of the split 'test'"):
        TASK.read(SYNTHETIC, split="test")


# --- the command


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_command_on_two_processes_writes_what_one_process_writes(checkpoint, model, tokenizer, examples, tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["eval_hellaswag.py", "--model", checkpoint, "--data", SYNTHETIC]
    command += ["--out", tmp_path / "two.json", "--predictions", tmp_path / "two.jsonl"]
    done = subprocess.run(list(map(str, command)), cwd=Path(__file__).parent.parent, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    written = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()]
    assert_same_scores(written, judged(model, tokenizer, examples))
    results = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    assert results["results"] == evaluated(model, tokenizer, examples)
    assert results["published"]["124M"]["tokens"]["acc_norm"] == 0.2955
    shown = done.stdout.decode()
    assert "build-nanogpt" in shown and "lm-evaluation-harness" in shown and "0.2955" in shown and "0.3114" in shown


def test_command_refuses_bad_input_with_exit_code_2(checkpoint, capsys):
    import eval_hellaswag
    from gpt2repro.options import run_main

    assert run_main(eval_hellaswag.main, ["--model", str(checkpoint), "--data", "nowhere.jsonl"]) == 2
    assert "there is no file nowhere.jsonl" in capsys.readouterr().err
    assert run_main(eval_hellaswag.main, ["--model", str(checkpoint / "no"), "--data", str(SYNTHETIC)]) == 2


@pytest.mark.slow
def test_documented_harness_command_agrees_on_a_checkpoint(checkpoint, model, tokenizer, examples, tmp_path):
    """docs/evaluation.md's `lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True`, on a local task."""
    import os
    import subprocess
    import sys

    pytest.importorskip("lm_eval")
    (tmp_path / "task.yaml").write_text(
        f"""task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{SYNTHETIC.as_posix()}"}}}}
validation_split: validation
output_type: multiple_choice
process_docs: !function from_the_harness.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
        encoding="utf-8",
    )
    (tmp_path / "from_the_harness.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "hellaswag_local", "--include_path", tmp_path, "--output_path", tmp_path / "out"]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text(encoding="utf-8"))["results"]["hellaswag_local"]
    expected = evaluated(model, tokenizer, examples)
    assert found["acc,none"] == expected["hellaswag_acc_chars"]
    assert found["acc_norm,none"] == expected["hellaswag_acc_norm_chars"]
    assert found["acc_stderr,none"] == pytest.approx(expected["hellaswag_acc_chars_stderr"])
