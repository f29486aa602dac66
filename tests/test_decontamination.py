"""Decontamination against a plain search for 13 equal words in a row; through preparation, the card and evaluation."""

import filecmp
import json
import random
import re
import shutil
from pathlib import Path

import pytest

import eval_hellaswag
import prepare_fineweb
from gpt2repro.data import decontamination, preparation
from gpt2repro.data import text as text_module
from gpt2repro.data.decontamination import Decontamination, contaminated_examples
from gpt2repro.data.preparation import prepare
from gpt2repro.data.shards import load_manifest, open_split
from gpt2repro.data.text import pieces_of
from gpt2repro.data.tokenization import bpe_tokenizer
from gpt2repro.data.upload import dataset_card
from gpt2repro.evaluation.tasks import TASKS
from gpt2repro.options import InputError, run_main

DATA = Path(__file__).parent / "data"
BETWEEN = [" ", "  ", "\n", "\n\n", "\t", "\u00a0", ", ", ".\n", "-", " -- ", "\u2014", "\u2019", '" "', "_", " ** "]


def file_of(name: str) -> Path:
    return DATA / f"{name}_synthetic.jsonl"


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def grams_of(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def found(check: dict, task: str = "task") -> dict[int, int]:
    """{example: documents that hold it}"""
    return {int(name.split()[1]): n for name, n in check["counts"].items() if name.startswith(f"{task} ")}


def disguised(text: str, chance: random.Random) -> str:
    """The same words in another case, with other things between them."""
    words = re.findall(r"[^\W_]+", text)
    cased = [chance.choice([str.upper, str.lower, str.title, str])(word) for word in words]
    return "".join(word + chance.choice(BETWEEN) for word in cased)


# --- what is found


@pytest.mark.parametrize("block", [7, 100, 2**16])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_of_documents_and_examples_are_those_of_a_plain_search(seed, block, monkeypatch):
    monkeypatch.setattr(decontamination, "BLOCK_CHARACTERS", block)
    chance = random.Random(seed)
    vocabulary = ["a", "b", "ab", "ba", "é", "É", "ß", "naïve", "42", "4", "2", "你好", "\U0001d518", "x" * 40]

    def text(most: int) -> str:
        return "".join(chance.choice(vocabulary) + chance.choice(BETWEEN) for _ in range(chance.randrange(most)))

    examples = [[text(50) for _ in range(chance.randrange(4))] for _ in range(30)]
    documents = [text(200) for _ in range(40)] + [""]
    for _ in range(60):  # a stretch of an example, often of just 12 or 13 words, somewhere in a document
        words = words_of(chance.choice(chance.choice(examples) or [""]))
        stretch = words[chance.randrange(len(words) // 2 + 1) :][: chance.choice([12, 13, 14, 30])]
        documents[chance.randrange(40)] += " " + disguised(" ".join(stretch), chance) + text(10)
    expected = {}
    for index, texts in enumerate(examples):
        grams = set().union(*map(grams_of, texts))
        if count := sum(bool(grams & grams_of(document)) for document in documents):
            expected[index] = count
    assert len(expected) > 3

    index = Decontamination({"other": [["x"]], "task": examples}, drop=True)
    facts = index.tasks["task"]
    assert facts["ngrams"] == len(set().union(*(grams_of(text) for texts in examples for text in texts)))
    assert facts["too_short"] == sum(not any(map(grams_of, texts)) for texts in examples)
    texts, ends, check = index.check(documents, [True] * len(documents))
    assert found(check) == expected
    all_grams = set().union(*(grams_of(text) for texts in examples for text in texts))
    assert texts == [document for document in documents if not grams_of(document) & all_grams]
    assert ends == [True] * len(texts)
    assert check["counts"]["documents"] == len(documents)
    assert check["counts"]["documents_hit"] == check["counts"]["task"] == len(documents) - len(texts)
    for name, ngram in check["ngrams"].items():
        assert tuple(ngram.split()) in set().union(*map(grams_of, examples[int(name.split()[1])]))


def test_every_planted_example_of_every_task_is_found_in_any_spelling():
    examples = {name: TASKS[name].texts(TASKS[name].read(file_of(name))) for name in TASKS}
    planted = assert_all_are_found(examples, random.Random(0))
    assert planted > 60


@pytest.mark.parametrize("whole", [True, False])
def test_every_planted_context_of_real_examples_is_found(shared_data, whole):
    rows = TASKS["hellaswag"].read(shared_data / "hellaswag" / "hellaswag_val_500.jsonl")
    texts = TASKS["hellaswag"].texts(rows)
    contexts = None if whole else [[row["ctx"]] for row in rows]
    planted = assert_all_are_found({"hellaswag": texts}, random.Random(1), contexts)
    assert planted > (1000 if whole else 300)


def assert_all_are_found(examples: dict, chance: random.Random, planted: list | None = None) -> int:
    """Plants every text of 13 words or more in a document of its own; returns how many."""
    index = Decontamination(examples, drop=True)
    filler = ["the", "river", "is", "wide", "and", "its", "water", "cold"]
    count = 0
    for task, own in examples.items():
        for number, texts in enumerate(planted or own):
            texts = [text for text in texts if len(words_of(text)) >= 13]
            before, behind = (" ".join(chance.choices(filler, k=chance.randrange(300))) for _ in range(2))
            documents = [f"{before} {disguised(text, chance)}{behind}" for text in texts]
            kept, _, check = index.check(documents, [True] * len(documents))
            assert kept == [] and found(check, task).get(number, 0) == len(texts), (task, number)
            count += len(texts)
    return count


def test_an_example_s_texts_are_those_of_a_page_and_not_the_harness_s_prompt():
    texts = {name: TASKS[name].texts(TASKS[name].read(file_of(name))) for name in TASKS}
    assert texts["arc_easy"][0][1] == "Which of these melts when it is left in a warm room? an ice cube"
    assert texts["piqa"][0][0] == "keep bread from drying out Put it in a closed box or a bag."
    assert texts["winogrande"][0][1] == "The lamp did not fit into the drawer because the drawer was too tall."
    assert texts["hellaswag"][0][0].startswith("A man stands in a kitchen with a bowl of flour. he pours water")
    assert (len(texts["hellaswag"][0]), len(texts["lambada"][0])) == (8, 1)


EXAMPLE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_twelve_words_two_documents_and_other_words_are_no_hit():
    index = Decontamination({"task": [[EXAMPLE], ["too short to be found"]]}, drop=True)
    assert index.tasks["task"] | {"fingerprint": ""} == {
        "examples": 2, "too_short": 1, "ngrams": 2, "fingerprint": "",
    }  # fmt: skip
    words = EXAMPLE.split()
    clean = [" ".join(words[:12]), " ".join(words[12:]), "too short to be found", EXAMPLE.replace("seven", "7")]
    clean += [EXAMPLE.replace("seven", "sev en"), EXAMPLE.replace("seven", "seven seven"), "\ud800 " + clean[0], ""]
    texts, _, check = index.check(clean, [True] * len(clean))
    assert texts == clean and check["counts"]["documents_hit"] == 0 and not check["ngrams"]
    assert index.check(["x " + EXAMPLE + "\ud800"], [True])[0] == []


def test_a_document_in_pieces_is_one_document():
    index = Decontamination({"task": [[EXAMPLE]]}, drop=True)
    first, _, second = EXAMPLE.partition(" nine ")
    second = "nine " + second
    pieces = [f"kept\n{first}\n", second, "clean", f"{first}\n", "x\n", second]
    texts, kept_ends, check = index.check(pieces, [False, True, True, False, False, True])
    assert (texts, kept_ends) == (["clean", f"{first}\n", "x\n", second], [True, False, False, True])
    assert check["counts"]["documents"] == 3 and check["counts"]["documents_hit"] == 1
    assert check["ngrams"] == {"task 0": " ".join(EXAMPLE.split()[:13])}


def test_the_words_of_the_first_document_are_reported_and_the_documents_of_all_parts_counted():
    index = Decontamination({"task": [["other"], [EXAMPLE]]}, drop=False)
    later = EXAMPLE.partition(" ")[2]
    parts = [index.check(texts, [True] * len(texts))[2] for texts in ([later, EXAMPLE], [EXAMPLE, "clean"], ["clean"])]
    report = index.report([decontamination.merged(parts[:2]), json.loads(json.dumps(parts[2]))])
    assert (report["documents"], report["documents_hit"]) == (5, 3)
    assert report["tasks"]["task"]["hits"] == {"1": {"documents": 3, "ngram": later}}


# --- preparation

rng = random.Random(3)
WORDS = ["the", "web", "is", "large\n", "né", "tokens", "of", "all", "kinds,", "river"]
CLEAN = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 120))) for _ in range(300)]
PLANTED = (EXAMPLE.replace("n", "m"), EXAMPLE.upper())
EXAMPLES = {"piqa": [[f"{i} {EXAMPLE}" for i in ("a", "b")], [PLANTED[0]], ["short"]]}
DIRTY = range(0, 300, 23)
DOCUMENTS = [f"{text} {PLANTED[i % 2]}\n{text}" if i in DIRTY else text for i, text in enumerate(CLEAN)]
TOKENIZER = bpe_tokenizer(DOCUMENTS, 400)
UNITS = [{"split": "train" if first else "val", "bytes": 20_000, "first": first} for first in range(0, 300, 100)]


def make(out, documents=DOCUMENTS, *, drop=None, **options):
    def read(unit):
        return map(pieces_of, (d for d in documents[unit["first"] : unit["first"] + 100] if d is not None))

    index = None if drop is None else Decontamination(EXAMPLES, drop=drop)
    options = {"source": {}, "settings": {}, "workers": 1, "show_progress": False, **options}
    return prepare(out, TOKENIZER, UNITS, read, decontamination=index, **options)


def same(a, b, *, but=()):
    names = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    kept = [name for name in names[0] if not name.startswith(tuple(but))]
    return names[0] == names[1] and filecmp.cmpfiles(a, b, kept, shallow=False)[0] == kept


def test_dropping_gives_the_shards_of_the_text_without_those_documents_and_leaves_val_alone(tmp_path):
    hit = [i for i in DIRTY if i >= 100]  # the first hundred are for validation
    manifest = make(tmp_path / "dropped", drop=True)
    make(tmp_path / "clean", [None if i in hit else text for i, text in enumerate(DOCUMENTS)])
    assert same(tmp_path / "dropped", tmp_path / "clean", but=("manifest", "plan", "units"))
    report = manifest["decontamination"]
    assert (report["documents"], report["documents_hit"]) == (200, len(hit))
    odd, even = [i for i in hit if i % 2], [i for i in hit if not i % 2]
    assert report["tasks"]["piqa"] == {
        "examples": 3,
        "too_short": 1,
        "ngrams": 2 + 2 + 2,
        "fingerprint": decontamination.fingerprint(EXAMPLES["piqa"]),
        "documents_hit": len(hit),
        "hits": {
            "0": {"documents": len(odd), "ngram": " ".join(EXAMPLE.split()[:13])},
            "1": {"documents": len(even), "ngram": " ".join(PLANTED[0].split()[:13])},
        },
    }
    assert manifest["settings"]["decontaminate_action"] == "drop"


def test_reporting_changes_no_shard_and_without_the_option_nothing_changes(tmp_path):
    plain, reported = make(tmp_path / "plain"), make(tmp_path / "reported", drop=False)
    assert same(tmp_path / "plain", tmp_path / "reported", but=("manifest", "plan", "units"))
    assert reported["splits"] == plain["splits"]
    assert reported["decontamination"]["documents_hit"] == len([i for i in DIRTY if i >= 100])
    assert "decontamination" not in plain
    assert not {name for name in plain["settings"] if name.startswith("decontaminate")}


def test_workers_processes_nodes_and_a_restart_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 7)
    make(tmp_path / "one", drop=True)
    make(tmp_path / "threads", drop=True, workers=3)
    for index in (1, 0):
        make(tmp_path / "nodes", drop=True, node=(index, 2))
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    for lost in ("manifest.json", "units/000001.json", "train_000001.bin"):
        (tmp_path / "again" / lost).unlink()
    make(tmp_path / "again", drop=True)
    monkeypatch.setattr(preparation, "PROCESSES_FROM_BYTES", 0)
    make(tmp_path / "processes", drop=True, workers=2)
    for other in ("threads", "nodes", "again", "processes"):
        assert same(tmp_path / "one", tmp_path / other), other


def test_a_long_document_is_dropped_whole_though_it_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 40)
    long = "some lines\n" * 20 + EXAMPLE.replace(" ", "\n") + "\nmore lines" * 20
    documents = [*CLEAN[:150], long, *CLEAN[151:]]
    make(tmp_path / "dropped", documents, drop=True)
    make(tmp_path / "clean", [*CLEAN[:150], None, *CLEAN[151:]])
    assert same(tmp_path / "dropped", tmp_path / "clean", but=("manifest", "plan", "units"))


def test_a_shard_or_a_corpus_of_which_nothing_is_left(tmp_path):
    manifest = make(tmp_path / "shard", [*CLEAN[:100], *[EXAMPLE] * 100, *CLEAN[200:]], drop=True)
    assert [shard["file"] for shard in manifest["splits"]["train"]["shards"]] == ["train_000002.bin"]
    assert open_split(tmp_path / "shard", "train").documents == 100
    with pytest.raises(InputError, match="every document is empty or was dropped"):
        make(tmp_path / "corpus", [*[None] * 100, *[EXAMPLE] * 200], drop=True)


def test_another_action_or_benchmark_is_another_data_set(tmp_path):
    make(tmp_path, drop=True)
    with pytest.raises(InputError, match=r'settings.decontaminate_action: "report", there "drop"'):
        make(tmp_path, drop=False)
    with pytest.raises(InputError, match=r'settings.decontaminate: null, there \{"piqa"'):
        make(tmp_path)


# --- the commands


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """jsonl whose training part holds two HellaSwag contexts and a goal of PIQA, in their own spelling."""
    directory = tmp_path_factory.mktemp("corpus")
    TOKENIZER.save_pretrained(directory / "tokenizer")
    documents = list(CLEAN)
    for task, index, place in (("hellaswag", 1, 150), ("hellaswag", 5, 200), ("hellaswag", 5, 210), ("piqa", 0, 220)):
        documents[place] += " " + TASKS[task].texts(TASKS[task].read(file_of(task)))[index][0] + " The end."
    lines = (json.dumps({"text": text}) for text in documents)
    (directory / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


def arguments(corpus: Path, out: Path) -> list[str]:
    options = {"dataset": corpus / "corpus.jsonl", "tokenizer": corpus / "tokenizer", "out": out}
    options |= {"shard_tokens": 5000, "workers": 1}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


SPECS = f"hellaswag={file_of('hellaswag')},piqa={file_of('piqa')}"


@pytest.fixture(scope="module")
def reported(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reported") / "out"
    action = ["--decontaminate", SPECS, "--decontaminate_action", "report"]
    assert run_main(prepare_fineweb.main, [*arguments(corpus, out), *action]) == 0
    return out


def test_command_reports_in_manifest_output_and_card(corpus, reported, tmp_path, capsys):
    specs = SPECS.split(",")
    assert run_main(prepare_fineweb.main, [*arguments(corpus, tmp_path / "out"), "--decontaminate", *specs]) == 0
    dropped, manifest = load_manifest(tmp_path / "out"), load_manifest(reported)
    assert dropped["decontamination"] == manifest["decontamination"]
    tasks = manifest["decontamination"]["tasks"]
    assert {index: hit["documents"] for index, hit in tasks["hellaswag"]["hits"].items()} == {"1": 1, "5": 2}
    assert list(tasks["piqa"]["hits"]) == ["0"]
    splits = [m["splits"] for m in (manifest, dropped)]
    assert splits[0]["val"] == splits[1]["val"]
    assert splits[0]["train"]["documents"] - splits[1]["train"]["documents"] == 4
    assert "hellaswag: 2 of 8 examples" in capsys.readouterr().out
    card = dataset_card(dropped, "user/shards")
    assert "Decontamination (drop): 4 of " in card and "were left out" in card
    rows = r"\| hellaswag \| 8 \| \d \| 2 \(25.00%\) \| 3 \|\n\| piqa \| 9 \| \d \| 1 \(11.11%\) \| 1 \|\n\n"
    assert re.search(rows, card)
    assert "were kept" in dataset_card(manifest, "user/shards")


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        (["arc_esay"], "there is no task 'arc_esay'; known are hellaswag, arc_easy, piqa, winogrande, lambada, each "
                         "alone or as NAME=FILE; did you mean arc_easy?"),
        (["hellaswag=x.jsonl,piqa"], "there is no file x.jsonl"),
        (["piqa=a", "piqa=b"], "the task piqa is given twice"),
        ([","], "there is no task ''"),
        ([f"piqa={file_of('hellaswag')}"], "is not PIQA's format"),
        (["hellaswag"], "cannot read the split 'validation' of Rowan/hellaswag"),  # there is no network
    ],
)  # fmt: skip
def test_a_benchmark_that_cannot_be_read_is_refused_before_any_work(corpus, tmp_path, specs, sentence, capsys):
    assert run_main(prepare_fineweb.main, [*arguments(corpus, tmp_path / "out"), "--decontaminate", *specs]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_action_without_a_benchmark_is_refused(capsys):
    assert run_main(prepare_fineweb.main, ["--out", "x", "--decontaminate_action", "report"]) == 2
    assert "decontaminate_action=report needs --decontaminate" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    import torch

    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 384, "initializer_range": 0.2}
    directory = tmp_path_factory.mktemp("model")
    GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=len(TOKENIZER), **sizes)).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def scored(checkpoint: Path, out: Path, *flags) -> dict:
    flags = ["--model", checkpoint, "--device", "cpu", "--out", out, *flags]
    assert run_main(eval_hellaswag.main, list(map(str, flags))) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_evaluation_scores_clean_and_dirty_examples_as_files_of_their_own(checkpoint, reported, tmp_path, capsys):
    lines = file_of("hellaswag").read_text(encoding="utf-8").splitlines()
    expected = {}
    for name, kept in (("clean", [0, 2, 3, 4, 6, 7]), ("dirty", [1, 5])):
        (tmp_path / name).write_text("\n".join(lines[i] for i in kept), encoding="utf-8")
        expected[name] = scored(checkpoint, tmp_path / "out", "--data", tmp_path / name)["results"]
    capsys.readouterr()
    specs = ["--task", *SPECS.split(","), "--contamination", reported]
    record = scored(checkpoint, tmp_path / "out", *specs)["tasks"]
    assert record["hellaswag"]["contamination"] == expected
    assert record["piqa"]["contamination"]["dirty"]["piqa_examples"] == 1
    shown = capsys.readouterr().out
    assert "6 examples are clean, 2 dirty" in shown and re.search(r"this model +clean +dirty +GPT-2 124M", shown)
    row = f"{expected['clean']['hellaswag_acc_tokens']:.4f} ± {expected['clean']['hellaswag_acc_tokens_stderr']:.4f}"
    assert re.search(rf"^acc .*{re.escape(row)}.*{expected['dirty']['hellaswag_acc_tokens']:.4f}", shown, re.MULTILINE)

    flags = ["--data", file_of("hellaswag"), "--limit", 1, "--contamination", reported / "manifest.json"]
    record = scored(checkpoint, tmp_path / "out", *flags)
    assert record["contamination"] == {"clean": record["results"], "dirty": {}}
    assert "n/a" in capsys.readouterr().out


REPORT = '{"decontamination": {"tasks": {"hellaswag": {"hits": %s, "fingerprint": "", "examples": 500}}}}'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "holds a JSON list, expected an object"),
        ("{}", "has no report about hellaswag; prepare the data with prepare_fineweb.py --decontaminate hellaswag"),
        ('{"decontamination": {"tasks": []}}', "has no report about hellaswag"),
        (REPORT % '{"x": 1}', "has no report about hellaswag"),
        (REPORT % "[1e999]", "has no report about hellaswag"),
        (REPORT % "{}", "is about other examples of hellaswag (500; here are 8)"),
        (None, "is missing"),
    ],
)
def test_a_file_without_the_report_is_refused_in_a_sentence(content, sentence, tmp_path, capsys):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        contaminated_examples(tmp_path, "hellaswag", [["text"]] * 8)
    assert sentence in str(error.value)
    flags = ["--model", "no/model", "--data", str(file_of("hellaswag")), "--contamination", str(path)]
    assert run_main(eval_hellaswag.main, flags) == 2
    assert sentence in capsys.readouterr().err
