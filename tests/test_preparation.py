"""Preparation: the same bytes whatever the workers, nodes and interruptions; what can't be prepared gets a sentence."""

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt2repro.data import preparation
from gpt2repro.data import text as text_module
from gpt2repro.data.preparation import prepare, split_of
from gpt2repro.data.shards import ShardWriter, open_split, verify_dataset
from gpt2repro.data.text import PIECE_CHARACTERS, pieces_of, pieces_of_stream
from gpt2repro.data.tokenization import EOT, Encoder, bpe_tokenizer, char_tokenizer
from gpt2repro.options import InputError

rng = random.Random(0)
WORDS = ["the", "token", "shards", "of", "naïve", "models", "é", "\n", "learn", "🙂", EOT]
DOCUMENTS = [" ".join(rng.choices(WORDS, k=rng.randrange(200))) for _ in range(400)]
UNITS = [{"split": None, "bytes": 30_000, "first": first} for first in range(0, 400, 100)]


def read(unit):
    for text in DOCUMENTS[unit["first"] : unit["first"] + 100]:
        yield pieces_of(text)


def make(out, units=UNITS, read=read, tokenizer=None, **options):
    options = {"source": {"name": "test"}, "settings": {}, "val_fraction": 0.1, "show_progress": False, **options}
    return prepare(out, tokenizer or TOKENIZER, units, read, **options)


TOKENIZER = char_tokenizer(DOCUMENTS)


def same(a, b):
    """Whether two directories hold the same files with the same bytes."""
    names = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    return names[0] == names[1] and filecmp.cmpfiles(a, b, names[0], shallow=False)[0] == names[0]


def test_every_document_is_in_its_split_once_and_followed_by_end_of_text(tmp_path):
    manifest = make(tmp_path / "out")
    encoder = Encoder(TOKENIZER)
    for name in ("train", "val"):
        texts = [text for text in DOCUMENTS if split_of(text, 0.1) == name]
        expected = np.concatenate([[*ids, encoder.eot_id] for ids in encoder.encode_batch(texts)])
        split = open_split(tmp_path / "out", name)
        assert np.array_equal(split.read(0, split.tokens), expected)
        assert split.documents == len(texts) and split.bytes == sum(len(text.encode()) for text in texts)
    assert 20 <= manifest["splits"]["val"]["documents"] <= 60  # a tenth of 400
    verify_dataset(tmp_path / "out")


def test_workers_threads_and_processes_give_the_same_bytes(tmp_path, monkeypatch):
    for workers in (1, 4):
        make(tmp_path / f"threads{workers}", workers=workers)
    monkeypatch.setattr(preparation, "PROCESSES_FROM_BYTES", 0)
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 7)
    make(tmp_path / "processes", workers=2)
    assert same(tmp_path / "threads1", tmp_path / "threads4")
    assert same(tmp_path / "threads1", tmp_path / "processes")


def test_nodes_give_one_machine_s_bytes_on_a_common_disk_and_merged_from_several(tmp_path):
    make(tmp_path / "one")
    for index in (2, 0, 1):
        manifest = make(tmp_path / "common", node=(index, 3))
        assert (manifest is not None) == (index == 1)
        assert make(tmp_path / f"disk{index}", node=(index, 3)) is None
    assert same(tmp_path / "one", tmp_path / "common")
    for index in range(3):
        shutil.copytree(tmp_path / f"disk{index}", tmp_path / "merged", dirs_exist_ok=True)
    make(tmp_path / "merged", read=None)  # nothing is left to read
    assert same(tmp_path / "one", tmp_path / "merged")


def test_a_second_run_says_so_and_does_nothing(tmp_path, capsys):
    make(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    make(tmp_path / "out", read=None)
    assert "is already prepared; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_a_lost_or_cut_shard_is_made_again(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    (tmp_path / "b" / "train_000002.bin").unlink()
    os.truncate(tmp_path / "b" / "train_000001.bin", 2000)
    make(tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


def test_token_limit_keeps_the_first_units_that_reach_it(tmp_path):
    everything = make(tmp_path / "all")
    limit = everything["splits"]["train"]["shards"][0]["tokens"] + everything["splits"]["train"]["shards"][1]["tokens"]
    limited = make(tmp_path / "some", token_limit=limit)
    assert [shard["file"] for shard in limited["splits"]["train"]["shards"]] == ["train_000000.bin", "train_000001.bin"]
    assert not (tmp_path / "some" / "train_000003.bin").exists()
    make(tmp_path / "some", token_limit=limit, read=None)  # finished


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"source": {"name": "other"}}, 'source.name: "other", there "test"'),
        ({"settings": {"text_column": "body"}}, "settings.text_column"),
        ({"val_fraction": 0.2}, "settings.val_fraction: 0.2, there 0.1"),
        ({"tokenizer": char_tokenizer([*DOCUMENTS, "ß"])}, "tokenizer.vocab_size: "),
        ({"units": UNITS[:2]}, "units"),
    ],
)
def test_another_data_set_is_not_overwritten_by_accident(tmp_path, options, difference):
    make(tmp_path / "out")
    make(tmp_path / "before")
    with pytest.raises(InputError, match=r"holds another data set .*" + difference):
        make(tmp_path / "out", **options)
    assert same(tmp_path / "out", tmp_path / "before")
    make(tmp_path / "out", **options, overwrite=True)
    make(tmp_path / "fresh", **options)
    assert same(tmp_path / "out", tmp_path / "fresh")


def test_a_directory_of_something_else_is_left_alone_even_with_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is not empty and was not made by this command \(it holds thesis.tex\)"):
            make(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_character_that_the_tokenizer_does_not_know_is_refused_with_the_place(tmp_path):
    def place(unit):
        return f"book {unit['first']}"

    with pytest.raises(InputError, match=r"book \d+: the character 'ï' \(U\+00EF\) behind '.*na' is not in"):
        make(tmp_path / "out", tokenizer=char_tokenizer([text.replace("ï", "i") for text in DOCUMENTS]), place=place)


@pytest.mark.parametrize(
    ("change", "value"),
    [("unit", 7), ("splits", []), ("file", "../x"), ("tokens", "many"), ("tokens", 10**12), ("documents", None)],
)
def test_a_note_that_cannot_be_is_no_note_and_its_unit_is_done_again(tmp_path, change, value):
    make(tmp_path / "a")
    make(tmp_path / "b")
    path = tmp_path / "b" / "units" / "000001.json"
    note = json.loads(path.read_text())
    (note if change in note else note["splits"]["train"])[change] = value
    path.write_text(json.dumps(note))
    make(tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("content", ["[]", "{", '{"settings": 3}', '{"format": null}'])
def test_a_plan_that_cannot_be_gets_a_sentence(tmp_path, content):
    make(tmp_path / "out")
    (tmp_path / "out" / "plan.json").write_text(content)
    with pytest.raises(InputError, match=r"holds another data set|was not made by this command"):
        make(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="/dev/null")
@pytest.mark.parametrize("out", ["/dev/null", "/dev/null/x", "{tmp}/file", "{tmp}/file/x/y", "{tmp}/" + "x" * 300])
def test_a_place_that_cannot_be_is_refused_before_any_work(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"is a file; --out names a directory|File name too long"):
        make(out.replace("{tmp}", str(tmp_path)), read=None)


def test_text_without_content_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no text: every document is empty"):
        make(tmp_path / "out", read=lambda unit: [pieces_of("")])


def test_an_error_while_reading_ends_the_run_and_keeps_finished_units(tmp_path):
    def broken(unit):
        if unit["first"] == 200:
            raise InputError("byte 17 is not UTF-8")
        return read(unit)

    with pytest.raises(InputError, match="byte 17"):
        make(tmp_path / "out", read=broken, workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob("*.tmp-*"))
    make(tmp_path / "out")
    make(tmp_path / "fresh")
    assert same(tmp_path / "out", tmp_path / "fresh")


def test_reading_waits_for_writing(tmp_path, monkeypatch):
    """Back-pressure: what was read and not yet written stays within a few batches, however long the unit."""
    monkeypatch.setattr(preparation, "BATCH_DOCUMENTS", 10)
    handed, written, most = 0, 0, 0
    append = ShardWriter.append

    def counting_append(self, tokens, documents, text_bytes):
        nonlocal written
        written += documents
        append(self, tokens, documents, text_bytes)

    def counting_read(unit):
        nonlocal handed, most
        for _ in range(2000):
            handed += 1
            most = max(most, handed - written)
            yield pieces_of("some text")

    monkeypatch.setattr(ShardWriter, "append", counting_append)
    make(tmp_path / "out", units=[UNITS[0]], read=counting_read, val_fraction=0.0, workers=1)
    assert written == 2000 and most <= 10 * (preparation.BATCHES_AHEAD + 1)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_a_long_document_give_the_ids_of_the_whole(monkeypatch, seed):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 20)
    chance = random.Random(seed)
    text = "".join(chance.choices(["a", "b1", " ", "\n", "\n", "\n\n", " \n", "\t", "'s", "é", "\u00a0", "!"], k=4000))
    pieces = list(pieces_of(text))
    assert "".join(piece for piece, _ in pieces) == text and len(pieces) > 10
    assert [end for _, end in pieces] == [False] * (len(pieces) - 1) + [True]
    encoder = Encoder(bpe_tokenizer(DOCUMENTS, 400))
    whole = encoder.encode_batch([text])[0]
    assert np.array_equal(np.concatenate(encoder.encode_batch([piece for piece, _ in pieces])), whole)
    parts = [text[i : i + 7] for i in range(0, len(text), 7)]
    assert list(pieces_of_stream(parts)) == pieces


def test_a_document_without_a_seam_stays_whole():
    text = "x" * (3 * PIECE_CHARACTERS)
    assert list(pieces_of(text)) == [(text, True)]
    assert list(pieces_of_stream(text[i : i + 2**16] for i in range(0, len(text), 2**16))) == [(text, True)]


# A process that prepares the same small data set, without importing transformers (half a second instead of six).
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from tokenizers import Tokenizer
from gpt2repro.data import preparation
from gpt2repro.data.text import pieces_of

class Saved:
    def __init__(self, path):
        self.backend_tokenizer, self.text = Tokenizer.from_file(path), Path(path).read_text(encoding="utf-8")
        self.eos_token_id = len(self) - 1
    def __len__(self): return self.backend_tokenizer.get_vocab_size()
    def get_vocab(self): return self.backend_tokenizer.get_vocab()
    def save_pretrained(self, path): Path(path, "tokenizer.json").write_text(self.text, encoding="utf-8")

def main():
    out, tokenizer, documents, die_at, after, processes = json.loads(sys.argv[1])
    texts = json.loads(Path(documents).read_text(encoding="utf-8"))
    renames, replace = 0, os.replace
    def counted(*names):
        nonlocal renames
        renames += 1
        if renames == die_at and not after: os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if renames == die_at: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = counted
    preparation.UNITS_AT_ONCE = 1 if die_at else 2
    preparation.BATCH_DOCUMENTS = 5
    if processes: preparation.PROCESSES_FROM_BYTES = 0
    units = [{"split": None, "bytes": 9000, "first": i} for i in range(0, len(texts), len(texts) // 2)]
    def read(unit):
        return map(pieces_of, texts[unit["first"] : unit["first"] + len(texts) // 2])
    preparation.prepare(out, Saved(tokenizer), units, read, source={}, settings={}, val_fraction=0.2, workers=2,
                        show_progress=False)
    print("renames", renames)

if __name__ == "__main__":
    main()
"""


def start(tmp_path, out, documents=20, *, die_at=0, after=False, processes=False):
    program, texts, tokenizer = tmp_path / "program.py", tmp_path / "documents.json", tmp_path / "tokenizer.json"
    program.write_text(PROGRAM, encoding="utf-8")
    texts.write_text(json.dumps((DOCUMENTS * 100)[:documents]), encoding="utf-8")
    TOKENIZER.backend_tokenizer.save(str(tokenizer))
    argument = json.dumps([str(tmp_path / out), str(tokenizer), str(texts), die_at, after, processes])
    return subprocess.Popen(
        [sys.executable, str(program), argument], env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.timeout(120)
def test_killed_around_every_rename_and_started_again_gives_identical_bytes(tmp_path):
    out, error = start(tmp_path, "whole").communicate()
    assert "renames" in out, error
    renames = int(out.split()[-1])
    assert renames >= 1 + 2 * 2 + 1  # plan; shards and a note per unit; manifest
    for die_at in range(1, renames + 1):
        for after in (False, True):
            killed = start(tmp_path, f"{die_at}{after}", die_at=die_at, after=after)
            killed.communicate()
            assert killed.returncode == -signal.SIGKILL
            assert (tmp_path / f"{die_at}{after}" / "manifest.json").exists() == (die_at == renames and after)
            start(tmp_path, f"{die_at}{after}").communicate()
            assert same(tmp_path / "whole", tmp_path / f"{die_at}{after}"), (die_at, after)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_any_time_with_its_processes_gives_identical_bytes(tmp_path):
    start(tmp_path, "whole", 20_000, processes=True).communicate()
    chance = random.Random(5)
    for _ in range(8):
        process = start(tmp_path, "killed", 20_000, processes=True)
        time.sleep(chance.uniform(0.5, 3))
        process.kill()
        process.communicate()
    _, error = start(tmp_path, "killed", 20_000, processes=True).communicate()
    assert not error and same(tmp_path / "whole", tmp_path / "killed")
    time.sleep(1)
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in listing  # no worker outlives a killed parent
