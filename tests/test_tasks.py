"""Every task against lm-evaluation-harness' own task definition, example by example; and the command over tasks."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokenization import bpe_tokenizer
from gpt2repro.evaluation.losses import max_length_of
from gpt2repro.evaluation.multiple_choice import NEAR_TIE, score
from gpt2repro.evaluation.tasks import TASKS, prepare_tasks
from gpt2repro.options import InputError, run_main
from modeling_gpt2repro import GPT2ReproForCausalLM

DATA = Path(__file__).parent / "data"
DEFINITIONS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}


def file_of(name: str) -> Path:
    return DATA / f"{name}_synthetic.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer([file_of(name).read_text(encoding="utf-8") for name in TASKS], 400)


def tiny(vocab_size: int, n_positions: int = 384) -> GPT2ReproForCausalLM:
    """Large initial weights, so that scores spread and contexts matter."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=vocab_size, n_positions=n_positions, **sizes)).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(len(tokenizer))


def judged(name: str, model, tokenizer) -> list[dict]:
    prepared = TASKS[name].prepare(TASKS[name].read(file_of(name)), tokenizer, max_length_of(model))
    return TASKS[name].predictions(prepared, score(model, prepared))


def harness_samples(name: str, model, tokenizer) -> tuple[list[dict], dict]:
    """What lm-evaluation-harness makes of its own definition of the task, on the local file instead of the Hub's."""
    pytest.importorskip("lm_eval")
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = load_yaml(Path(importlib.util.find_spec("lm_eval.tasks").origin).parent / DEFINITIONS[name])
    rows = [json.loads(line) for line in file_of(name).read_text(encoding="utf-8").splitlines()]
    scored = definition.get("test_split") or definition["validation_split"]
    task = TASKS[name]
    assert {"validation": "val"}.get(scored, scored) == task.split
    assert definition["dataset_path"] == task.dataset and definition.get("dataset_name") in (task.subset, "default")
    kept = {key: value for key, value in definition.items() if not key.endswith("_split") and key != "tag"}
    kept |= {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
    }
    run = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=[kept],
        task_manager=TaskManager(include_defaults=False),  # reading the definitions of all its tasks takes 10 s
        log_samples=True,
        bootstrap_iters=0 if name == "lambada" else 1,  # 0: no standard errors of accuracies either
    )
    return sorted(run["samples"][name], key=lambda sample: sample["doc_id"]), run["results"][name]


@pytest.mark.extra
@pytest.mark.parametrize("n_positions", [384, 40])  # in 40 positions long contexts lose their beginning
@pytest.mark.parametrize("name", [name for name in TASKS if name != "lambada"])
def test_task_scores_every_example_as_lm_evaluation_harness_does(name, n_positions, tokenizer):
    model = tiny(len(tokenizer), n_positions=n_positions)
    if name == "hellaswag" and n_positions == 40:
        pytest.skip("its endings are longer than that; test_hellaswag has this case")
    rows, (samples, totals) = judged(name, model, tokenizer), harness_samples(name, model, tokenizer)
    assert len(rows) == len(samples) > 4
    for row, sample in zip(rows, samples, strict=True):
        expected = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(row["chars"]["log_likelihoods"], expected, rtol=2e-6, atol=1e-5)
        assert set(TASKS[name].metrics) == set(sample["metrics"]), "the harness counts other metrics"
        for metric in TASKS[name].metrics:
            if row["chars"][f"{metric}_margin"] >= NEAR_TIE or len(set(expected)) < len(expected):
                assert (row["chars"][metric] == row["label"]) == bool(sample[metric]), (row["index"], metric)
    record = TASKS[name].summary(rows)
    for metric in TASKS[name].metrics:
        key = TASKS[name].metric_name(metric, "chars")
        assert record[key] == pytest.approx(totals[f"{metric},none"])
        assert record[f"{key}_stderr"] == pytest.approx(totals[f"{metric}_stderr,none"])


@pytest.mark.extra
def test_lambada_scores_every_passage_as_lm_evaluation_harness_does(model, tokenizer):
    rows, (samples, totals) = judged("lambada", model, tokenizer), harness_samples("lambada", model, tokenizer)
    for row, sample in zip(rows, samples, strict=True):
        ((log_likelihood, greedy),) = sample["filtered_resps"]
        assert row["log_likelihood"] == pytest.approx(log_likelihood, abs=1e-5)
        assert row["greedy"] == greedy
    record = TASKS["lambada"].summary(rows)
    assert record["lambada_perplexity"] == pytest.approx(totals["perplexity,none"])
    assert record["lambada_acc"] == totals["acc,none"]


def test_greedy_word_is_the_one_that_the_model_would_write(tokenizer):
    """A model trained on one passage writes its last word; a random one does not."""
    passages = [json.loads(line)["text"] for line in file_of("lambada").read_text(encoding="utf-8").splitlines()]
    model = tiny(len(tokenizer)).train()
    ids = torch.tensor([tokenizer(passages[0])["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    greedy = [row["greedy"] for row in judged("lambada", model.eval(), tokenizer)]
    assert greedy[0] and not all(greedy)


# --- in training


def test_prepared_tasks_give_one_flat_record(model, tokenizer):
    prepared = prepare_tasks([f"{name}={file_of(name)}" for name in TASKS], tokenizer, model)
    record = {}
    for task in prepared:
        record |= task.evaluate(model)
    names = {"arc_easy_acc", "arc_easy_acc_norm", "piqa_acc", "winogrande_acc", "lambada_acc", "lambada_perplexity"}
    names |= {"hellaswag_acc_norm_tokens", "hellaswag_acc_norm_chars", "piqa_acc_norm_stderr", "arc_easy_examples"}
    assert names <= record.keys() and "winogrande_acc_norm" not in record
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in record.values())
    (limited,) = prepare_tasks([f"piqa={file_of('piqa')}"], tokenizer, model, limit=2)
    assert limited.evaluate(model)["piqa_examples"] == 2


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["arc"], "no task 'arc'; known are hellaswag, arc_easy, piqa, winogrande, lambada"),
        (["piqa=a.jsonl", "piqa=b.jsonl"], "piqa is given twice"),
        (["piqa=nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_wrong_task_is_refused_in_a_sentence(specs, message, model, tokenizer):
    with pytest.raises(InputError, match=message):
        prepare_tasks(specs, tokenizer, model)


# --- rows that are none

WRONG = {
    "arc_easy": [
        ({"answerKey": "E"}, "the label 'E', expected A to D"),
        ({"question": None}, "has no question"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "a label each"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "two or more answers"),
        ({"choices": {"text": ["a", 3], "label": ["A", "B"]}}, "another form"),
        ({"choices": {}}, "another form"),
    ],
    "piqa": [
        ({"label": 2}, "the label 2, expected 0 to 1"),
        ({"label": 0.0}, "the label 0.0"),
        ({"sol2": 7}, "no sol2"),
    ],
    "winogrande": [({"sentence": "no gap"}, "no gap"), ({"answer": "12"}, "the label '12', expected 1 to 2")],
    "lambada": [({"text": "word"}, "no word before its last one: 'word'"), ({"text": None}, "no text")],
    "hellaswag": [
        ({"label": 9}, "the label 9, expected 0 to 3"),
        ({"label": -1}, "the label -1"),
        ({"label": 1.7}, "the label 1.7"),
        ({"label": True}, "the label True"),
        ({"label": "01"}, "the label '01'"),
        ({"label": [1]}, "the label"),
        ({"endings": ["a", "b"]}, "not four endings"),
        ({"endings": ["a", "b", "c", None]}, "another form"),
        ({"ctx": "half of a pair: \ud800"}, "half of a surrogate pair"),
    ],
}


@pytest.mark.parametrize(("name", "change", "message"), [(n, *case) for n, cases in WRONG.items() for case in cases])
def test_row_of_another_form_is_refused_in_a_sentence(name, change, message, tmp_path):
    row = json.loads(file_of(name).read_text(encoding="utf-8").splitlines()[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, **change}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        TASKS[name].read(tmp_path / "rows.jsonl")


def test_answers_may_be_absent_as_in_test_splits(tmp_path):
    for name, answer in (("piqa", {"label": -1}), ("winogrande", {"answer": ""}), ("arc_easy", {"answerKey": ""})):
        row = json.loads(file_of(name).read_text(encoding="utf-8").splitlines()[0])
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, **answer}), encoding="utf-8")
        assert [example["label"] for example in TASKS[name].read(tmp_path / "rows.jsonl")] == [None]


def test_lines_end_at_newlines_only(tmp_path):
    row = json.loads(file_of("piqa").read_text(encoding="utf-8").splitlines()[0])
    text = json.dumps({**row, "goal": "one\u2028two\u0085three\u000cfour"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes((text + "\r\n" + text + "\n").encode())
    assert [example["goal"] for example in TASKS["piqa"].read(tmp_path / "rows.jsonl")] == [
        "one\u2028two\u0085three\u000cfour"
    ] * 2


# --- the command


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_command_scores_several_tasks_in_one_call(checkpoint, model, tokenizer, tmp_path, capsys):
    import eval_hellaswag

    specs = [f"{name}={file_of(name)}" for name in TASKS]
    arguments = ["--model", str(checkpoint), "--task", *specs, "--limit", "4", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "new" / "out.json"), "--predictions", str(tmp_path / "rows.jsonl")]
    assert run_main(eval_hellaswag.main, arguments) == 0
    tasks = json.loads((tmp_path / "new" / "out.json").read_text(encoding="utf-8"))["tasks"]
    for prepared in prepare_tasks(specs, tokenizer, model, limit=4):
        assert tasks[prepared.task.name]["results"] == prepared.evaluate(model)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["task"] for row in rows] == [name for name in TASKS for _ in range(4)]
    shown = capsys.readouterr().out
    assert all(task.title in shown for task in TASKS.values()) and "0.7078" in shown and "40.0554" in shown


def test_command_takes_data_for_one_task_only(checkpoint, tmp_path, capsys):
    import eval_hellaswag

    common = ["--model", str(checkpoint), "--device", "cpu"]
    out = ["--out", str(tmp_path / "out.json")]
    assert run_main(eval_hellaswag.main, [*common, "--task", "piqa", "--data", str(file_of("piqa")), *out]) == 0
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert record["task"] == "piqa" and record["split"] == "val" and record["results"]["piqa_examples"] == 9
    for tasks in (["piqa", "arc_easy"], [f"piqa={file_of('piqa')}"], []):
        assert run_main(eval_hellaswag.main, [*common, "--task", *tasks, "--data", "x.jsonl"]) == 2
    assert "--data belongs to a single --task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "{tmp}"], ": Is a directory; choose another place"),
        (["--out", "/dev/null/x"], "cannot write /dev/null/x: "),
        (["--out", "{tmp}/a", "--predictions", "{tmp}/b/../a"], "two results would be written to"),
        (["--predictions", "{tmp}/" + "x" * 300], ": File name too long"),
    ],
)
def test_place_that_cannot_be_written_is_refused_before_the_work(flags, message, tmp_path, capsys):
    import eval_hellaswag

    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    started = ["--model", "no/such/model", "--data", str(file_of("hellaswag")), *flags]
    assert run_main(eval_hellaswag.main, started) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("eval_hellaswag", ["--data", "{data}", "--out", "{data}"]),
        ("eval_hellaswag", ["--data", "{data}", "--predictions", "{link}"]),
        ("eval_hellaswag", ["--task", "piqa={data}", "hellaswag", "--out", "{data}"]),
        ("perplexity", ["--data", "{data}", "--out", "{link}"]),
    ],
)
def test_what_is_read_is_not_written_over(program, flags, checkpoint, tmp_path, capsys):
    import eval_hellaswag
    from gpt2repro.commands import perplexity

    data, link = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    data.write_bytes(file_of("piqa").read_bytes())
    link.symlink_to(data)
    flags = [flag.replace("{data}", str(data)).replace("{link}", str(link)) for flag in flags]
    main = {"eval_hellaswag": eval_hellaswag.main, "perplexity": perplexity.main}[program]
    assert run_main(main, ["--model", str(checkpoint), "--device", "cpu", *flags]) == 2
    assert "is what is read" in capsys.readouterr().err
    assert data.read_bytes() == file_of("piqa").read_bytes()
