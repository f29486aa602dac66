"""`gpt2repro prepare-text`: the corpora and one's own text, as a user calls it."""

import gzip
import hashlib
import json
import logging
import lzma
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2repro.commands.prepare_text import main
from gpt2repro.data.preparation import split_of
from gpt2repro.data.python_docs import python_docs
from gpt2repro.data.shards import load_manifest, open_split, verify_dataset
from gpt2repro.data.tokenization import Encoder, load_tokenizer
from gpt2repro.options import InputError

PROSE = "It was the best of times, it was the worst of times.\nIt was the age of wisdom.\n"


def prepare_text(out, *arguments):
    assert main(["--out", str(out), *map(str, arguments)]) == 0
    return verify_dataset(out)


def decoded(out, split):
    tokens = open_split(out, split)
    return load_tokenizer(out).decode(tokens.read(0, tokens.tokens))


@pytest.fixture(scope="module")
def python_docs_data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "python-docs"
    return out, prepare_text(out, "--corpus", "python-docs", "--vocab_size", 512), list(python_docs())


def test_python_docs_hold_every_document_of_this_python(python_docs_data):
    out, manifest, documents = python_docs_data
    assert len(documents) > 400 and sum(map(len, documents)) > 1_500_000
    for name in ("train", "val"):
        texts = [text for text in documents if split_of(text, 0.1) == name]
        content = manifest["splits"][name]
        assert content["documents"] == len(texts) and content["bytes"] == sum(len(text.encode()) for text in texts)
        assert decoded(out, name) == "".join(f"{text}<|endoftext|>" for text in texts)
    assert manifest["tokenizer"]["vocab_size"] == 512 == open_split(out, "train").vocab_size


def test_python_docs_do_without_the_help_topics(monkeypatch, capsys, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_a.py").write_text('"""Left out."""')
    (tmp_path / "broken.py").write_text("print 'Python 2'")
    (tmp_path / "module.py").write_text(
        '"""A module."""\nclass A:\n  """A class."""\n  def f(self):\n    """A method."""\n    raise SystemExit\n'
        'def g(): "Another function."\nraise SystemExit("never imported")\n'
    )
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    monkeypatch.setattr("gpt2repro.data.python_docs.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(python_docs()) == ["A module.\n\nA class.\n\nA method.\n\nAnother function.\n"]
    assert "pydoc_data is not installed, so the corpus is the docstrings alone" in capsys.readouterr().err


def test_xz_sizes_are_those_of_the_split_s_text(python_docs_data):
    _, manifest, documents = python_docs_data
    train, val = ("".join(text for text in documents if split_of(text, 0.1) == s).encode() for s in ("train", "val"))
    assert manifest["splits"]["val"]["xz_bytes"] == len(lzma.compress(val, preset=9))
    given_train = len(lzma.compress(train + val, preset=9)) - len(lzma.compress(train, preset=9))
    assert manifest["splits"]["val"]["xz_bytes_given_train"] == given_train < len(lzma.compress(val, preset=9))


def test_the_vocabulary_is_learned_from_the_train_split_alone(tmp_path):
    chance = random.Random(0)
    rows = ["".join(chance.choices("abcdefgh ", k=200)) for _ in range(300)]
    rows = [row + (" zyzzyva" * 30 if split_of(row + " zyzzyva" * 30, 0.1) == "val" else "") for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepare_text(tmp_path / "out", "--input", tmp_path / "a.jsonl", "--vocab_size", 400)
    assert "zy" not in load_tokenizer(tmp_path / "out").get_vocab()
    assert "zyzzyva" in decoded(tmp_path / "out", "val")


def test_shakespeare_in_characters_is_nanogpt_s_data(tmp_path, shared_data):
    path = shared_data / "text" / "tiny_shakespeare.txt"
    manifest = prepare_text(tmp_path / "out", "--corpus", "shakespeare", "--input", path, "--tokenizer", "char")
    data = path.read_text()
    stoi = {ch: i for i, ch in enumerate(sorted(set(data)))}
    expected = {"train": data[: int(len(data) * 0.9)], "val": data[int(len(data) * 0.9) :]}
    for name, text in expected.items():
        split = open_split(tmp_path / "out", name)
        assert split.read(0, split.tokens).tolist() == [*(stoi[c] for c in text), 65]
    assert manifest["tokenizer"] == {**manifest["tokenizer"], "kind": "char", "vocab_size": 66, "eot_id": 65}


def test_gpt2_tokens_of_own_text(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    (tmp_path / "a.txt").write_text(PROSE * 20)
    prepare_text(tmp_path / "out", "--input", tmp_path, "--tokenizer", "gpt2")
    split = open_split(tmp_path / "out", "train")
    assert (split.vocab_size, split.eot_id) == (50257, 50256)
    encoder = Encoder(load_tokenizer(tmp_path / "out"))
    text = (PROSE * 20)[: int(len(PROSE) * 20 * 0.9)]
    assert np.array_equal(split.read(0, split.tokens), [*encoder.encode_batch([text])[0], 50256])


def test_many_files_are_split_by_document_and_few_by_position(tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(f"{i} {PROSE}")
    many = prepare_text(tmp_path / "many", "--input", tmp_path / "*.txt", "--tokenizer", "char")
    few = prepare_text(tmp_path / "few", "--input", tmp_path / "1?.txt", "--tokenizer", "char")
    assert many["settings"]["split"] == "document" and few["settings"]["split"] == "position"
    assert many["splits"]["train"]["documents"] + many["splits"]["val"]["documents"] == 120
    assert few["splits"]["train"]["documents"] == few["splits"]["val"]["documents"] == 10


@pytest.mark.parametrize("count", range(2, 9))
def test_of_few_documents_at_least_one_is_for_validation(tmp_path, capsys, count):
    """The one of the lowest hash, where the hash of none lies below the fraction."""
    texts = [f"{count} {number} {PROSE}" for number in range(count)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    arguments = ["--input", tmp_path / "a.jsonl", "--tokenizer", "char", "--val_fraction", 0.02]
    manifest = prepare_text(tmp_path / "out", *arguments)
    hashed = {int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16): text for text in texts}
    few = [text for number, text in sorted(hashed.items()) if number < 0.02 * 2**64] or [hashed[min(hashed)]]
    assert decoded(tmp_path / "out", "val") == "".join(f"{text}<|endoftext|>" for text in texts if text in few)
    assert manifest["splits"]["train"]["documents"] == count + 1 - len(few)
    prepare_text(tmp_path / "out", *arguments)
    assert "is already prepared; nothing to do" in capsys.readouterr().out


def test_running_again_does_nothing_and_other_settings_are_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(PROSE * 50)
    arguments = ["--input", tmp_path / "a.txt", "--vocab_size", 300]
    first = prepare_text(tmp_path / "out", *arguments)
    assert prepare_text(tmp_path / "out", *arguments).sha256 == first.sha256
    assert "is already prepared; nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"holds another data set .*settings.vocab_size: 280, there 300"):
        prepare_text(tmp_path / "out", "--input", tmp_path / "a.txt", "--vocab_size", 280)
    (tmp_path / "a.txt").write_text(PROSE * 51)
    with pytest.raises(InputError, match=r"holds another data set .*source.files"):
        prepare_text(tmp_path / "out", *arguments)
    assert prepare_text(tmp_path / "out", *arguments, "--overwrite").sha256 != first.sha256


def test_two_directories_prepared_alike_are_the_same_data_set(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 50)
    both = [prepare_text(tmp_path / name, "--input", tmp_path / "a.txt", "--vocab_size", 300) for name in "xy"]
    assert both[0].sha256 == both[1].sha256 == hashlib.sha256((tmp_path / "x/manifest.json").read_bytes()).hexdigest()


def test_a_dataset_of_the_hub(tmp_path, loopback_hub, monkeypatch):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    rows = "".join(json.dumps({"body": f"{i} {PROSE}"}) + "\n" for i in range(200))
    loopback_hub.add_file("user/rows", "rows.jsonl", rows.encode(), "dataset")
    arguments = ["--input", "user/rows", "--text_column", "body", "--tokenizer", "char"]
    manifest = prepare_text(tmp_path / "out", *arguments)
    assert manifest["source"]["dataset"] == "user/rows" and len(manifest["source"]["revision"]) == 40
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["val"]["documents"] == 200


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say what to read: --corpus python-docs"),
        (["--corpus", "python-docs", "--input", "a"], "python-docs reads nothing else"),
        (["--corpus", "python-docs", "--split", "position"], "python-docs is split by document"),
        (["--input", "a", "--tokenizer", "word"], "--tokenizer"),
        (["--input", "a", "--val_fraction", "1"], "--val_fraction"),
        (["--input", "a", "--vocab_size", "100"], "--vocab_size"),
        (["--input", "{tmp}/none.txt"], "no files matched"),
        (["--input", "{tmp}/empty.txt"], "there is no text"),
        (["--input", "{tmp}/empty.jsonl"], "needs text|holds no text|hardly any"),
        (["--input", "/dev/zero"], "no files matched"),
        (["--input", "{tmp}/empty.txt", "--out", "/dev/null/x"], "is a file; --out names a directory"),
        (
            ["--input", "{tmp}/a.txt", "--split", "position", "--text_document_bytes", "64"],
            "needs whole, plain text files",
        ),
    ],
)
def test_bad_input_gets_a_sentence(tmp_path, arguments, sentence):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text(PROSE)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=sentence):
        main(["--out", str(tmp_path / "out"), *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)])


def test_a_packed_text_is_split_by_document_unless_asked_otherwise(tmp_path, capsys):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(PROSE.encode() * 50))
    manifest = prepare_text(tmp_path / "out", "--input", tmp_path / "a.txt.gz", "--tokenizer", "char")
    assert manifest["settings"]["split"] == "document"
    assert "split is empty, all 1 documents are in" in capsys.readouterr().out


def test_a_long_text_is_cut_into_documents_where_that_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 200)
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer", "char", "--text_document_bytes", 1000]
    manifest = prepare_text(tmp_path / "out", *arguments)
    documents = manifest["splits"]["train"]["documents"] + manifest["splits"]["val"]["documents"]
    assert documents == -(-len(PROSE) * 200 // 1000)
    assert {"split": "document", "text_document_bytes": 1000, "text_cut": 1}.items() <= manifest["settings"].items()


def test_manifest_names_what_made_it(python_docs_data):
    out, _, _ = python_docs_data
    manifest = load_manifest(out)
    assert manifest["source"]["corpus"] == "python-docs" and len(manifest["source"]["sha256"]) == 64
    assert manifest["settings"]["val_fraction"] == 0.1 and manifest["settings"]["tokenizer"] == "bpe"


@pytest.mark.parametrize("source", ["data", "run", "checkpoint"])
def test_the_tokenizer_of_a_model_or_data_set_is_taken_as_it_is(tmp_path, source, caplog, monkeypatch):
    """A character that it does not know is not learned but refused."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "a.txt").write_text(PROSE * 20)
    (tmp_path / "b.txt").write_text("It was the worst of times.\n" * 20)
    prepare_text(tmp_path / "data", "--input", tmp_path / "a.txt", "--tokenizer", "char")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000007"
    load_tokenizer(tmp_path / "data").save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": "gpt2repro"}')
    save_file({"weight": np.zeros(1)}, checkpoint / "model.safetensors")
    place = {"data": tmp_path / "data", "run": tmp_path / "run", "checkpoint": checkpoint}[source]
    manifest = prepare_text(tmp_path / "more", "--input", tmp_path / "b.txt", "--tokenizer", place)
    first = verify_dataset(tmp_path / "data")
    assert manifest["tokenizer"]["sha256"] == first["tokenizer"]["sha256"]
    assert decoded(tmp_path / "more", "train").startswith("It was the worst of times.")
    assert not caplog.messages  # transformers does not know our type, and need not for a tokenizer
    (tmp_path / "b.txt").write_text("Ça alors!\n" * 20)
    with pytest.raises(InputError, match="'Ç'"):
        prepare_text(tmp_path / "refused", "--input", tmp_path / "b.txt", "--tokenizer", place)


def test_a_tokenizer_that_is_nowhere_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    for name, said in {
        "bqe": "expected gpt2, char, bpe, a run",
        str(tmp_path / "runs/no"): "there is no model",
    }.items():
        with pytest.raises(InputError, match=said):
            prepare_text(tmp_path / "out", "--input", tmp_path / "a.txt", "--tokenizer", name)


def test_away_from_a_terminal_progress_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gpt2repro.data.preparation.SECONDS_BETWEEN_LINES", 0)
    (tmp_path / "a.txt").write_text(PROSE * 20)
    prepare_text(tmp_path / "out", "--input", tmp_path / "a.txt")
    said = capsys.readouterr().err
    assert "\r" not in said and said.startswith("tokenising: ") and "tokens/s" in said.splitlines()[0]
