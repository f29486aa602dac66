"""Losses against float64 arithmetic and transformers, on one process and two; the metrics as modules of `evaluate`."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_worker import Tokens, build, evaluate

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokenization import bpe_tokenizer, char_tokenizer
from gpt2repro.evaluation import hellaswag, lambada
from gpt2repro.evaluation import losses as evaluation
from gpt2repro.evaluation.multiple_choice import score
from gpt2repro.evaluation.perplexity import detokenize_wikitext, sliding_window_loss
from gpt2repro.options import InputError
from gpt2repro.training.evaluator import Evaluator
from modeling_gpt2repro import GPT2ReproForCausalLM

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    return GPT2ReproForCausalLM(GPT2ReproConfig(**tiny_model, initializer_range=0.2))


def transformers_gpt2(model):
    """The same weights in transformers' own class."""
    from transformers import GPT2Config, GPT2LMHeadModel

    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    config = GPT2Config(**{name: getattr(model.config, name) for name in names}, bos_token_id=None, eos_token_id=None)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def reference_nats(model, tokens: np.ndarray, seq_len: int) -> float:
    """Windows one after the other through transformers' GPT-2 in float64."""
    theirs = transformers_gpt2(model).double()
    nats = 0.0
    for start in range(0, len(tokens) - 1, seq_len):
        window = torch.from_numpy(tokens[start : start + seq_len + 1].astype(np.int64))
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return nats


# --- validation loss


@pytest.mark.parametrize("tokens", [None, 500, 10**9])
def test_validation_loss_is_the_mean_over_every_token_of_transformers_gpt2(model, tokens):
    split = Tokens(1001, 97, text_bytes=4004)
    found = evaluation.validation_loss(model, split, seq_len=32, batch_size=7, tokens=tokens)
    count = min(tokens or 1000, 1000)
    nats = reference_nats(model, split.values[: count + 1], 32)
    assert found["val_tokens"] == count
    assert found["val_loss"] == pytest.approx(nats / count, abs=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=5e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (4004 * count / 1001), rel=2e-6)


def test_models_without_shift_labels_have_the_same_loss(model):
    split = Tokens(300, 97)
    a = evaluation.validation_loss(model, split, seq_len=32, batch_size=4)
    b = evaluation.validation_loss(transformers_gpt2(model), split, seq_len=32, batch_size=4)
    assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-6)
    assert a["bits_per_byte"] is None  # the split knows no bytes


def test_bits_per_byte_counts_the_bytes_of_exactly_the_scored_tokens(model):
    text = "naïve café — 雪 and 🌿, again and again: naïve café — 雪 and 🌿."
    for tokenizer in (bpe_tokenizer([text], 290), char_tokenizer([text])):
        lengths = evaluation.token_byte_lengths(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert lengths[ids].sum() == len(text.encode("utf-8"))
        assert lengths[tokenizer.eos_token_id] == 0

    split = Tokens(200, 97)
    lengths = torch.arange(97)
    found = evaluation.validation_loss(model, split, seq_len=32, batch_size=2, tokens=100, token_bytes=lengths)
    expected_bytes = int(split.values[1:101].sum())
    assert found["bits_per_byte"] == pytest.approx(found["val_loss"] * 100 / math.log(2) / expected_bytes)


def test_bits_per_byte_is_the_same_for_two_tokenizers_of_a_uniform_model():
    """Bits per byte of a model that knows nothing is log2(V) x tokens / bytes, whatever its tokens are."""
    metrics = evaluation.loss_metrics(total_nats=8 * math.log(2) * 10, predicted_tokens=10, predicted_bytes=10)
    assert metrics["bits_per_byte"] == pytest.approx(8) and metrics["perplexity"] == pytest.approx(256)


def test_too_little_validation_text_is_refused_in_a_sentence(model):
    with pytest.raises(InputError, match="prepare more validation text"):
        evaluation.validation_loss(model, Tokens(1, 97), seq_len=32, batch_size=1)


def test_validation_set_behind_the_published_numbers_is_the_trainings_default():
    import dataclasses

    from train_accelerate import TrainConfig

    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert defaults["val_tokens"] == evaluation.FINEWEB_VALIDATION_TOKENS == 20 * 8 * 64 * 1024
    assert defaults["seq_len"] == 1024


def test_evaluation_runs_in_bf16_autocast_as_training_does(model):
    exact = evaluation.validation_loss(model, Tokens(300, 97), seq_len=32, batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = evaluation.validation_loss(model, Tokens(300, 97), seq_len=32, batch_size=4)
    assert rounded["val_loss"] == pytest.approx(exact["val_loss"], rel=0.02)
    assert rounded["val_loss"] != exact["val_loss"]


# --- in training, on two processes


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (4, 8))])
def test_several_processes_evaluate_like_one_and_go_on_training(tmp_path, free_port, world):
    """Under DDP, DDP with a compiled model, and FSDP2 with compiled blocks, one after the other."""
    workers = [
        subprocess.Popen(
            [sys.executable, *f"tests/evaluation_worker.py {rank} {world} {free_port}".split(), tmp_path / "out.json"],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    errors = [worker.communicate(timeout=900)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)
    expected = evaluate(*build())
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found.keys() == {"ddp", "compiled", "fsdp"}
    for way, records in found.items():
        for record in records:
            assert record.keys() == expected.keys()
            for name, value in expected.items():
                assert record[name] == value, (way, name)  # to the last bit, whatever the number of processes


def test_run_on_two_processes_logs_every_number_of_an_evaluation(tmp_path):
    from tiny_run import flags, write_tiny_shards

    data = write_tiny_shards(tmp_path / "data")
    options = {"n_positions": 600, "max_steps": 4, "eval_steps": 2, "save_steps": 4, "precision": "fp32"}
    options |= {"hellaswag": ROOT / "tests" / "data" / "hellaswag_synthetic.jsonl", "hellaswag_limit": 5}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["train_accelerate.py", *flags(data, tmp_path / "run", **options)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [record for record in map(json.loads, lines) if "val_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    for record in evaluations:
        assert record["perplexity"] == pytest.approx(math.exp(record["val_loss"]))
        assert record["bits_per_byte"] == pytest.approx(record["val_loss"] / math.log(2), rel=0.01)  # a byte a token
        assert record["hellaswag_examples"] == 5
        for protocol in ("tokens", "chars"):
            for metric in ("acc", "acc_norm"):
                assert 0 <= record[f"hellaswag_{metric}_{protocol}"] <= 1
                assert record[f"hellaswag_{metric}_{protocol}_stderr"] is not None


def environment() -> dict:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(("eos", "seq_len"), [(True, 32), (False, 32), (True, 1), (False, 1)])
def test_samples_need_neither_an_end_of_text_nor_a_long_window(fresh_accelerate, eos, seq_len):
    from accelerate import Accelerator

    model, tokenizer, _ = build()
    if not eos:
        tokenizer.eos_token = None
    evaluator = Evaluator.__new__(Evaluator)  # what it prepares for losses and tasks is not needed
    evaluator.config = SimpleNamespace(sample_tokens=4, sample_prompts=["The dogs pull"], seq_len=seq_len, seed=1)
    evaluator.accelerator, evaluator.model = Accelerator(cpu=True), model
    evaluator.source = SimpleNamespace(tokenizer=tokenizer)
    (text,) = evaluator.samples()
    assert ("The dogs pull" in text) == (seq_len == 32)


# --- perplexity of a text, last words


@pytest.mark.parametrize(("length", "stride"), [(200, 7), (200, 64), (33, 16), (65, 64), (10, 5)])
def test_sliding_window_gives_every_token_its_promised_context(model, length, stride):
    ids = np.random.default_rng(1).integers(97, size=length)
    found = sliding_window_loss(model, ids, max_length=64, stride=stride, batch_size=3)
    nats = 0.0
    model.eval()
    for target in range(1, length):  # one forward pass per token
        windows_before = max(0, math.ceil((target - 64) / stride))
        context = torch.from_numpy(ids[windows_before * stride : target])
        assert len(context) >= min(target, 64 - stride + 1)
        with torch.no_grad():
            nats -= F.log_softmax(model(context[None]).logits[0, -1], dim=-1)[ids[target]].item()
    assert found["predicted_tokens"] == length - 1
    assert found["total_nats"] == pytest.approx(nats, rel=1e-6)


@pytest.mark.extra
def test_last_words_are_scored_as_in_lm_evaluation_harness():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, examples = build()
    passages = [f"{example['ctx_a']} {example['endings'][0]}".strip() for example in examples]
    prepared = lambada.TASK.prepare([{"text": passage} for passage in passages], tokenizer, 48)
    found = lambada.TASK.predictions(prepared, score(model, prepared, batch_tokens=100))
    pairs = [tuple(passage.rsplit(" ", 1)) for passage in passages]
    requests = [Instance("loglikelihood", {}, (a, " " + b), i) for i, (a, b) in enumerate(pairs)]
    harness = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, max_length=48)
    for mine, (log_likelihood, greedy), (_, word) in zip(found, harness.loglikelihood(requests), pairs, strict=True):
        assert mine["log_likelihood"] == pytest.approx(log_likelihood, abs=1e-4)
        assert (mine["greedy"], mine["word"]) == (greedy, word)


def test_last_word_perplexity_is_per_word_and_accuracy_is_greedy():
    scores = [{"log_likelihood": -1.0, "greedy": True}, {"log_likelihood": -3.0, "greedy": False}]
    summary = lambada.TASK.summary(scores)
    assert summary["lambada_perplexity"] == pytest.approx(math.exp(2))
    assert summary["lambada_acc"] == 0.5 and summary["lambada_acc_stderr"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("tokenised", "text"),
    [
        (" = = Early life = = \n", "\n== Early life ==\n"[1:]),
        ("a well @-@ known 1 @,@ 000 m ( 3 @.@ 5 ft )", "a well-known 1,000 m (3.5 ft)"),
        ('He said , " no " ; then : yes ?', 'He said, "no"; then: yes?'),
        ("the lobster 's claws , it isn 't", "the lobster's claws, it isn't"),
        ("the lobsters ' claws", "the lobsters' claws"),
        ("20 ° C", "20°C"),
        ("one . \n two", "one.\ntwo"),
    ],
)
def test_wikitext_becomes_ordinary_text(tokenised, text):
    assert detokenize_wikitext(tokenised).strip() == text.strip()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model, tokenizer, _ = build()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_perplexity_command_reports_tokens_words_and_bytes(checkpoint, tmp_path, capsys):
    from gpt2repro.commands import perplexity

    text = "The dogs pull at their leads .\nThe woman stops and talks to them .\n" * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = ["--model", str(checkpoint), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out.json")]
    assert perplexity.main([*arguments, "--stride", "50"]) == 0
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    total_nats = results["loss"] * results["tokens"]
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert results["words"] == len(text.split())
    assert results["word_perplexity"] == pytest.approx(math.exp(total_nats / results["words"]))
    assert results["bits_per_byte"] == pytest.approx(total_nats / math.log(2) / len(text))
    assert "37.5" in capsys.readouterr().out


def test_perplexity_command_scores_last_words_of_lines_and_of_json_lines(checkpoint, tmp_path):
    from gpt2repro.commands import perplexity

    passages = ["The dogs pull at their leads.", "The woman stops and talks to them."]
    (tmp_path / "a.txt").write_text("\n".join(passages), encoding="utf-8")
    lines = [json.dumps({"passage": passage}) for passage in passages]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    results = []
    for name in ("a.txt", "a.jsonl"):
        out = tmp_path / f"{name}.json"
        arguments = ["--model", str(checkpoint), "--data", str(tmp_path / name), "--last_word", "--out", str(out)]
        assert perplexity.main([*arguments, "--text_column", "passage"]) == 0
        results.append(json.loads(out.read_text(encoding="utf-8"))["results"])
    assert results[0] == results[1] and results[0]["last_words"] == 2


def test_perplexity_command_splits_lines_at_newlines_only(checkpoint, tmp_path):
    from gpt2repro.commands import perplexity

    passages = ["The dogs pull\u2028at their leads.", "The woman\u0085stops and\x0ctalks to them."]
    (tmp_path / "a.txt").write_text("\n".join(passages) + "\n", encoding="utf-8")
    (tmp_path / "dir").mkdir()
    lines = [json.dumps({"text": passage}, ensure_ascii=False) for passage in passages]
    (tmp_path / "dir" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("a.txt", "dir"):  # a directory gives its only .jsonl file
        arguments = ["--model", str(checkpoint), "--data", str(tmp_path / name), "--last_word"]
        assert perplexity.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
        assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]["last_words"] == 2


def test_perplexity_command_refuses_what_it_cannot_read(checkpoint, tmp_path, capsys):
    from gpt2repro.commands import perplexity
    from gpt2repro.options import run_main

    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    for data, message in (("no/where/at/all", "there is no file"), (tmp_path / "bad.jsonl", 'object with "text"')):
        assert run_main(perplexity.main, ["--model", str(checkpoint), "--data", str(data)]) == 2
        assert message in capsys.readouterr().err
    assert run_main(perplexity.main, ["--model", "x", "--data", "y", "--last_word", "--stride", "3"]) == 2
    assert "--stride belongs to" in capsys.readouterr().err


# --- modules of `evaluate`


@pytest.fixture
def metrics(tmp_path):
    pytest.importorskip("evaluate")
    from gpt2repro.evaluation.metrics.bits_per_byte import BitsPerByte
    from gpt2repro.evaluation.metrics.hellaswag import HellaSwag
    from gpt2repro.evaluation.metrics.perplexity import Perplexity

    def make(name: str, **how):
        known = {"hellaswag": HellaSwag, "perplexity": Perplexity, "bits_per_byte": BitsPerByte}
        return known[name](cache_dir=str(tmp_path / "cache"), **how)

    return make


def test_hellaswag_metric_counts_like_the_evaluation_itself(metrics):
    model, tokenizer, examples = build()
    prepared = hellaswag.TASK.prepare(examples, tokenizer, 384)
    rows = hellaswag.TASK.predictions(prepared, score(model, prepared))
    record = hellaswag.TASK.summary(rows)
    for protocol in hellaswag.TASK.protocols:
        metric = metrics("hellaswag")
        for row in rows:
            reference = {"label": row["label"], "units": row[protocol]["units"]}
            metric.add_batch(predictions=[row[protocol]["log_likelihoods"]], references=[reference])
        for name, value in metric.compute().items():
            kind, _, suffix = name.partition("_stderr")
            expected = record[f"hellaswag_{kind}_{protocol}" + ("_stderr" if name.endswith("stderr") else "")]
            assert suffix == "" and value == pytest.approx(expected), name


def test_perplexity_and_bits_per_byte_metrics_weigh_texts_by_their_length(metrics):
    found = metrics("perplexity").compute(predictions=[6.0, 2.0], references=[3, 1])
    assert found["perplexity"] == pytest.approx(math.exp(2)) and found["loss"] == pytest.approx(2)
    found = metrics("bits_per_byte").compute(predictions=[6.0, 2.0], references=[10, 30])
    assert found["bits_per_byte"] == pytest.approx(8 / math.log(2) / 40)


@pytest.mark.parametrize("name", ["hellaswag", "perplexity", "bits_per_byte"])
def test_metrics_describe_themselves_and_load_by_path_without_network(metrics, name, monkeypatch):
    import evaluate

    info = metrics(name).info
    assert "predictions" in info.features and info.description and "@" in info.citation
    assert "Example" in info.inputs_description and info.reference_urls
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    loaded = evaluate.load(str(ROOT / "gpt2repro" / "evaluation" / "metrics" / f"{name}.py"))
    assert loaded.description == metrics(name).description


ACCUMULATE = """
import sys
from gpt2repro.evaluation.metrics.perplexity import Perplexity
metric = Perplexity(num_process=2, process_id=1, experiment_id="two", cache_dir=sys.argv[1], timeout=240)
metric.add_batch(predictions=[2.0], references=[1])
assert metric.compute() is None  # the first process has the result
"""


def test_metrics_accumulate_over_two_processes(metrics, tmp_path):
    cache = tmp_path / "cache"
    other = subprocess.Popen([sys.executable, "-c", ACCUMULATE, cache], cwd=ROOT, env=environment())
    metric = metrics("perplexity", num_process=2, process_id=0, experiment_id="two", timeout=240)
    metric.add_batch(predictions=[6.0], references=[3])
    assert metric.compute() == metrics("perplexity").compute(predictions=[6.0, 2.0], references=[3, 1])
    assert other.wait(timeout=240) == 0
