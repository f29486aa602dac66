"""Shards: what was written is what is read, and what is damaged is named."""

import json
import os
import pickle

import numpy as np
import pytest
import tiny_run

from gpt2repro.data.shards import MANIFEST, has_split, load_manifest, open_split, verify_dataset, write_shard
from gpt2repro.files import write_json
from gpt2repro.options import InputError


def make_dataset(directory, shards, vocab_size=300):
    """A data set of given train shards, written the way preparation writes it."""
    records = [
        {**write_shard(directory / f"train_{i:06d}.bin", tokens, vocab_size), "documents": 1, "bytes": 3 * len(tokens)}
        for i, tokens in enumerate(shards)
    ]
    total = sum(len(tokens) for tokens in shards)
    train = {"tokens": total, "documents": len(shards), "bytes": 3 * total, "shards": records}
    write_json(
        directory / MANIFEST,
        {
            "format": "gpt2repro-shards", "version": 1, "dtype": "uint16" if vocab_size <= 65536 else "uint32",
            "tokenizer": {"kind": "bpe", "vocab_size": vocab_size, "eot_id": 0, "sha256": ""},
            "source": {}, "settings": {},
            "splits": {"train": train, "val": {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}},
        },
    )  # fmt: skip
    return directory


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_reading_across_shard_borders_equals_the_concatenated_array(tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, vocab_size, n) for n in (10, 1, 0, 7, 30)]
    split = open_split(make_dataset(tmp_path, shards, vocab_size), "train")
    everything = np.concatenate(shards)
    assert split.tokens == len(everything) and split.bytes == 3 * len(everything) and split.documents == 5
    for start in range(split.tokens + 1):
        for count in range(split.tokens - start + 1):
            assert np.array_equal(split.read(start, count), everything[start : start + count])
    with pytest.raises(IndexError, match="outside the train split of 48"):
        split.read(40, 9)
    with pytest.raises(IndexError):
        split.read(-1, 2)


def test_header_is_llm_c_s(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 2, 65535]), 65536)
    write_shard(tmp_path / "b.bin", np.array([1, 2, 65536]), 65537)
    a, b = (np.fromfile(tmp_path / name, "<i4", 256) for name in ("a.bin", "b.bin"))
    assert a[:3].tolist() == [20240520, 1, 3] and b[:3].tolist() == [20240801, 7, 3]
    assert not a[3:].any() and (tmp_path / "a.bin").stat().st_size == 1024 + 3 * 2
    assert (tmp_path / "b.bin").stat().st_size == 1024 + 3 * 4


def test_an_id_outside_the_vocabulary_is_refused_when_written_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="token 300 does not fit a vocabulary of 300"):
        write_shard(tmp_path / "a.bin", np.array([1, 300]), 300)
    assert list(tmp_path.iterdir()) == []


def test_an_id_outside_the_vocabulary_is_named_before_training(tmp_path):
    make_dataset(tmp_path, [np.arange(100), np.arange(100)])
    with (tmp_path / "train_000001.bin").open("r+b") as file:
        file.seek(1024 + 2 * 50)
        file.write(np.array([5000], "<u2").tobytes())
    with pytest.raises(InputError, match=r"train_000001.bin holds token 5000, but the vocabulary ends at 299"):
        open_split(tmp_path, "train")


def test_an_id_outside_the_vocabulary_deep_in_a_file_is_named_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2repro.data.shards.CHECKED_TOKENS", 16)
    make_dataset(tmp_path, [np.arange(100)])
    with (tmp_path / "train_000000.bin").open("r+b") as file:
        file.seek(1024 + 2 * 50)
        file.write(np.array([5000], "<u2").tobytes())
    split = open_split(tmp_path, "train")
    split.read(0, 50)
    with pytest.raises(InputError, match=r"train_000000.bin holds token 5000"):
        split.read(40, 20)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "train_000001.bin").unlink(), "train_000001.bin is missing"),
        (lambda d: os.truncate(d / "train_000001.bin", 1024 + 198), "truncated or damaged"),
        (lambda d: (d / "train_000001.bin").write_bytes(bytes(1024 + 200)), "does not begin with a shard's header"),
        (lambda d: (d / "train_000001.bin").write_bytes(b""), "does not begin with a shard's header"),
        (lambda d: write_shard(d / "train_000001.bin", np.arange(7), 300), "holds 7 uint16 tokens, manifest.json says"),
        (lambda d: (d / MANIFEST).write_text("{"), "is damaged or not a gpt2repro-shards manifest"),
        (lambda d: (d / MANIFEST).write_text('{"format": "other"}'), "is damaged or not a gpt2repro-shards manifest"),
        (lambda d: write_json(d / MANIFEST, {**load_manifest(d), "version": 2}), "has version 2, this program reads 1"),
    ],
)  # fmt: skip
def test_damaged_data_is_refused_with_a_sentence(tmp_path, damage, sentence):
    damage(make_dataset(tmp_path, [np.arange(100), np.arange(100)]))
    with pytest.raises(InputError, match=sentence):
        open_split(tmp_path, "train")


def test_missing_directory_split_and_unfinished_preparation_are_named(tmp_path):
    with pytest.raises(InputError, match="is no directory; make a data set there with"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match=r"has no manifest.json and no train shards"):
        open_split(tmp_path, "train")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="is not finished"):
        open_split(tmp_path, "train")
    make_dataset(tmp_path, [np.arange(100)])
    with pytest.raises(InputError, match=r"has no val split \(it has train\)"):
        open_split(tmp_path, "val")
    assert has_split(tmp_path, "train") and not has_split(tmp_path, "val")


def test_verify_finds_one_flipped_bit(tmp_path):
    make_dataset(tmp_path, [np.arange(100), np.arange(100)])
    assert verify_dataset(tmp_path).sha256 == load_manifest(tmp_path).sha256
    raw = bytearray((tmp_path / "train_000001.bin").read_bytes())
    raw[1100] ^= 1
    (tmp_path / "train_000001.bin").write_bytes(raw)
    open_split(tmp_path, "train")  # sizes and headers are still right
    with pytest.raises(InputError, match=r"train_000001.bin is damaged"):
        verify_dataset(tmp_path)


def test_nanogpt_files_are_used_in_place(tmp_path):
    tokens = np.arange(1000, dtype="<u2")
    tokens.tofile(tmp_path / "train.bin")
    tokens[:100].tofile(tmp_path / "val.bin")
    split = open_split(tmp_path, "train")
    assert (split.tokens, split.vocab_size, split.eot_id, split.bytes) == (1000, 50257, 50256, None)
    assert np.array_equal(split.read(990, 10), tokens[990:]) and open_split(tmp_path, "val").tokens == 100


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4"])
def test_build_nanogpt_shards_are_used_in_place(tmp_path, dtype):
    tokens = np.arange(1000).astype(dtype)
    np.save(tmp_path / "edufineweb_train_000001.npy", tokens[:600])
    np.save(tmp_path / "edufineweb_train_000002.npy", tokens[600:])
    np.save(tmp_path / "edufineweb_val_000000.npy", tokens[:100])
    split = open_split(tmp_path, "train")
    assert np.array_equal(split.read(550, 100), tokens[550:650]) and open_split(tmp_path, "val").tokens == 100


def test_llm_c_shards_without_manifest_are_used_in_place(tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(600), 50257)
    write_shard(tmp_path / "fineweb_train_000002.bin", np.arange(600, 1000), 50257)
    split = open_split(tmp_path, "train")
    assert np.array_equal(split.read(0, 1000), np.arange(1000))
    with pytest.raises(InputError, match="no val shards"):
        open_split(tmp_path, "val")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.bin", b"abc", "not a whole number of uint16"),
        ("x_train_0.npy", b"abc", "can't be read as .npy"),
        ("x_train_0.bin", np.array([20240520, 1, 99], "<i4").tobytes() + bytes(1012), "promises 99 tokens"),
    ],
)
def test_damaged_foreign_files_are_refused_with_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        open_split(tmp_path, "train")


def test_pickled_npy_is_never_loaded(tmp_path):
    np.save(tmp_path / "x_train_0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"can't be read as .npy"):
        open_split(tmp_path, "train")


def test_our_own_data_without_its_manifest_is_not_taken_for_foreign_shards(tmp_path):
    data = tiny_run.write_tiny_shards(tmp_path / "data")
    (data / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json: it is not finished"):
        open_split(data, "train")


@pytest.mark.parametrize("known", [True, None, "x", {}, [1]])
def test_remembered_hashes_that_are_none_are_taken_again(known, tmp_path):
    data = tiny_run.write_tiny_shards(tmp_path / "data")
    (data / ".sha256.json").write_text(json.dumps({"train_000000.bin": known}))
    verify_dataset(data, remember=True)
    assert len(json.loads((data / ".sha256.json").read_text())["train_000000.bin"]) == 5


def test_mixed_foreign_formats_are_refused(tmp_path):
    np.save(tmp_path / "a_train_0.npy", np.arange(10, dtype="<u2"))
    write_shard(tmp_path / "a_train_1.bin", np.arange(10), 50257)
    with pytest.raises(InputError, match="are of different formats"):
        open_split(tmp_path, "train")


def test_foreign_identity_follows_the_content(tmp_path):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    first = open_split(tmp_path, "train").sha256
    assert open_split(tmp_path, "train").sha256 == first
    np.arange(1, 1001, dtype="<u2").tofile(tmp_path / "train.bin")
    assert open_split(tmp_path, "train").sha256 != first


def test_a_split_travels_to_a_spawned_worker(tmp_path):
    split = open_split(make_dataset(tmp_path, [np.arange(100)]), "train")
    copy = pickle.loads(pickle.dumps(split))
    assert np.array_equal(copy.read(3, 5), [3, 4, 5, 6, 7])
    assert len(pickle.dumps(split)) < 2000  # paths and counts, no tokens


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("retrieval_train_000001.npy", "retrieval_val_000000.npy"),
        ("interval_train_1.npy", "interval_val_1.npy"),
        ("medieval-train.npy", "medieval.val.npy"),
        ("train_evaluation_000.npy", "train_val_000.npy"),
        ("fineweb_train_000001.npy", "fineweb_val_000000.npy"),
        ("trainset_train00.npy", "trainset_val00.npy"),
    ],
)
def test_the_split_of_a_foreign_shard_is_a_word_of_its_own(tmp_path, train, val):
    np.save(tmp_path / train, np.arange(600, dtype="<u2"))
    with pytest.raises(InputError, match="no val shards"):
        open_split(tmp_path, "val")
    np.save(tmp_path / val, np.arange(100, dtype="<u2"))
    assert open_split(tmp_path, "train").tokens == 600 and open_split(tmp_path, "val").tokens == 100


@pytest.mark.parametrize(
    ("where", "value", "problem"),
    [
        (("splits", "train", "shards", 0, "file"), "..", "splits.train.shards.0.file: '..' is no file name"),
        (("splits", "train", "shards", 0, "file"), "a/b", "is no file name"),
        (("splits", "train", "shards", 0, "file"), 7, "splits.train.shards.0.file: Input should be a valid string"),
        (("splits", "train", "shards", 0, "tokens"), 10**12, "splits.train.shards.0.tokens: Input should be less"),
        (("splits", "train", "shards", 0, "tokens"), 99, "splits.train: the shards do not add up to 100 tokens"),
        (("splits", "train", "shards", 0, "sha256"), None, "splits.train.shards.0.sha256: Input should be a valid"),
        (("splits", "train", "documents"), "many", "splits.train.documents: Input should be a valid integer"),
        (("splits", "train", "bytes"), 1.5, "splits.train.bytes: Input should be a valid integer"),
        (("splits",), {}, "splits: Dictionary should have at least 1 item"),
        (("tokenizer", "vocab_size"), 10**12, "tokenizer.vocab_size: Input should be less than"),
        (("tokenizer", "vocab_size"), True, "tokenizer.vocab_size: Input should be a valid integer"),
        (("tokenizer", "eot_id"), 300, "tokenizer: eot_id=300 is outside the vocabulary of 300"),
        (("tokenizer", "eot_id"), -1, "tokenizer.eot_id: Input should be greater"),
        (("source",), "a book", "source: Input should be a valid dictionary"),
        (("dtype",), "object", "dtype: Input should be 'uint16' or 'uint32'"),
    ],
)
def test_a_manifest_that_cannot_be_gets_the_sentence_with_the_place(tmp_path, where, value, problem):
    make_dataset(tmp_path, [np.arange(100)])
    manifest = owner = json.loads((tmp_path / MANIFEST).read_text())
    for key in where[:-1]:
        owner = owner[key]
    for missing in (False, True):
        if missing:
            owner.pop(where[-1])
            problem = "Field required" if where != ("source",) else None
        else:
            owner[where[-1]] = value
        write_json(tmp_path / MANIFEST, manifest)
        if problem is None:
            load_manifest(tmp_path)
        else:
            with pytest.raises(InputError, match=r"manifest.json is damaged: .*prepare the data again") as error:
                open_split(tmp_path, "train")
            assert problem in str(error.value)


def test_a_split_of_more_shards_than_may_be_open_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2repro.data.shards.OPEN_FILES", 2)
    split = open_split(make_dataset(tmp_path, [np.arange(i, i + 10) for i in range(8)]), "train")
    for start in (0, 70, 35, 5):
        expected = np.concatenate([np.arange(i, i + 10) for i in range(8)])[start : start + 10]
        assert np.array_equal(split.read(start, 10), expected)


def test_manifest_is_plain_json(tmp_path):
    make_dataset(tmp_path, [np.arange(100)])
    assert load_manifest(tmp_path) == json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
