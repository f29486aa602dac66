"""The order of shard windows: a permutation that is a permutation, and batches that depend on the position alone."""

import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import TEXT, write_tiny_shards

from gpt2repro import files
from gpt2repro.data.ordering import Permutation, mix64, next_positions, skip_ahead
from gpt2repro.data.shards import write_shard
from gpt2repro.data.sources import ShardSource, merge_states, open_data, open_source, prefetch
from gpt2repro.data.tokenization import char_tokenizer, fingerprint, load_tokenizer
from gpt2repro.options import InputError


@dataclass
class ArraySplit:
    """The smallest thing that looks like a split of shards."""

    array: np.ndarray
    vocab_size: int | None = 1 << 20
    sha256: str = "0" * 64

    @property
    def tokens(self):
        return len(self.array)

    def read(self, start, count):
        return self.array[start : start + count]


class TrillionTokens:
    tokens, vocab_size, sha256 = 10**12, 50257, ""


def counting_source(tokens, seq_len=4, seed=7, **options):
    return ShardSource(ArraySplit(np.arange(tokens)), seq_len=seq_len, seed=seed, **options)


def take(source, count, state=None, rank=0, world=1, sequences=4):
    batches = source.batches(state or source.initial_state(), rank=rank, world=world, sequences=sequences)
    return [next(batches) for _ in range(count)]


def first_tokens(batches):
    return torch.cat([x[:, 0] for x, _, _ in batches]).tolist()


# -- the permutation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4096, 99_991])
def test_permutation_reaches_every_index_once(n):
    assert sorted(Permutation(n, seed=5)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_of_2_to_the_40_stays_in_range_without_collisions():
    n = (1 << 40) - 87
    indices = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    images = Permutation(n, seed=1)(indices)
    assert images.min() >= 0 and images.max() < n and len(np.unique(images)) == len(indices)


def test_permutation_of_an_int_is_that_of_an_array():
    permutation = Permutation(1000, seed=3)
    assert [permutation(i) for i in range(1000)] == permutation(np.arange(1000)).tolist()


def test_permutation_rejects_an_index_outside_its_range():
    with pytest.raises(IndexError):
        Permutation(10, seed=0)(10)


def test_permutation_is_the_same_today_as_when_it_was_written():
    """A changed order would silently change every resumed run: raise SHARD_ORDER_VERSION with these numbers."""
    assert Permutation(1_000_000_007, seed=1337)(np.arange(4)).tolist() == [739995352, 734656088, 698735293, 861393898]


def test_permutation_places_every_element_uniformly():
    """Over 1000 seeds, each of 12 elements lands on each of 12 places equally often (chi-squared, 121 degrees)."""
    counts = np.zeros((12, 12))
    for seed in range(1000):
        counts[np.arange(12), Permutation(12, seed)(np.arange(12))] += 1
    expected = 1000 / 12
    statistic = ((counts - expected) ** 2 / expected).sum() * 11 / 12  # rows and columns both add up to 1000
    assert statistic < 185  # the 99.99 % quantile


def test_neighbours_are_not_neighbours_after_the_permutation():
    images = Permutation(1 << 20, seed=0)(np.arange(20_000)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03


def test_mix64_of_ints_and_arrays_agree():
    values = [0, 1, 2**63, 2**64 - 1, 123456789]
    assert [mix64(v) for v in values] == mix64(np.array(values, dtype=np.uint64)).tolist()


# -- positions ---------------------------------------------------------------------------------------------------------


def test_next_positions_leaves_out_exactly_the_skipped_ranges():
    skipped = [[2, 5], [9, 10], [12, 20]]
    for position in range(22):
        expected = [p for p in range(position, 60) if not any(a <= p < b for a, b in skipped)][:11]
        assert next_positions(position, skipped, 11).tolist() == expected


def test_skip_ahead_keeps_ranges_sorted_and_merged():
    state = {"position": 0, "skipped": []}
    for start, stop in [(8, 12), (0, 4), (4, 6), (10, 20)]:
        state = skip_ahead(state, start, stop)
    assert state == {"position": 0, "skipped": [[0, 6], [8, 20]]}
    with pytest.raises(ValueError):
        skip_ahead(state, 5, 5)


@pytest.mark.parametrize("recut", [False, True])
def test_skipped_windows_are_never_trained_on_and_all_others_are(recut):
    source = counting_source(4 * 40 + 1, recut_windows=recut)
    plain = first_tokens(take(source, 10))
    state = skip_ahead(source.initial_state(), 6, 19)  # borders of no batch
    assert first_tokens(take(source, 6, state)) == (plain[:6] + plain[19:])[:24]


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [41, 44, 45])
def test_every_window_comes_exactly_once_per_epoch(tokens):
    source = counting_source(tokens)
    windows = (tokens - 1) // 4
    positions = np.arange(3 * windows)
    epochs = source.windows_at(positions).reshape(3, windows)
    assert all(sorted(epoch.tolist()) == list(range(windows)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert source.tokens_per_epoch == 4 * windows


def test_targets_are_the_next_token_of_the_whole_stream():
    for x, y, _ in take(counting_source(4 * 50 + 1), 30):
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 4)
        assert torch.equal(y, x + 1) and (x[:, 0] % 4 == 0).all()


@pytest.mark.parametrize("recut", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batch_is_the_same_for_every_world_size(world, recut):
    source, other = (counting_source(4 * 37 + 1, recut_windows=recut) for _ in range(2))
    expected = take(source, 12, sequences=8)
    ranks = [take(other, 12, rank=r, world=world, sequences=8) for r in range(world)]
    for step, (x, y, state) in enumerate(expected):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), x)
        assert torch.equal(torch.cat([rank[step][1] for rank in ranks]), y)
        assert all(rank[step][2] == state for rank in ranks)


@pytest.mark.parametrize("recut", [False, True])
def test_batches_continue_from_any_saved_state_at_another_world_size(recut):
    source, other = (counting_source(4 * 37 + 1, recut_windows=recut) for _ in range(2))
    plain = take(source, 20)
    state = plain[8][2]
    assert state["position"] == 36
    resumed = [take(other, 11, state, rank=r, world=2) for r in range(2)]
    for (x, _, after), left, right in zip(plain[9:], *resumed, strict=True):
        assert torch.equal(torch.cat([left[0], right[0]]), x) and left[2] == after


def test_identity_names_data_seed_and_length():
    assert counting_source(100).identity() == counting_source(100).identity()
    assert counting_source(100).identity() != counting_source(100, seed=8).identity()
    assert counting_source(100).identity() != counting_source(100, seq_len=5).identity()


@pytest.mark.parametrize("tokens", [5, 41, 44, 45, 201])
def test_recut_windows_are_those_of_the_corpus_rolled_to_where_the_epoch_begins(tokens):
    plain, source = counting_source(tokens), counting_source(tokens, recut_windows=True)
    offsets, used = set(), set()
    for epoch in range(300):
        positions = np.arange(epoch, epoch + 1).repeat(plain.windows) * plain.windows + np.arange(plain.windows)
        order, rows = plain.windows_at(positions), source.tokens_at(positions)
        offset = rows[order == 0][0, 0]
        rolled = np.roll(np.arange(tokens), -offset)
        assert np.array_equal(rows, [rolled[4 * window : 4 * window + 5] for window in order])
        assert len(np.unique(rows[:, :-1])) == source.tokens_per_epoch  # as inputs, each at most once
        offsets.add(int(offset))
        used.update(rows[:, :-1].ravel().tolist())
    assert used == set(range(tokens)) and len(offsets) > min(tokens, 200) / 2  # the tail is left out in turn


def test_recut_windows_are_an_option_that_the_identity_names():
    plain, recut = counting_source(100).identity(), counting_source(100, recut_windows=True).identity()
    assert recut == plain | {"recut_windows": 1}
    found = counting_source(1000, recut_windows=True).tokens_at(np.array([0, 1, 248, 249]))[:, 0].tolist()
    assert found == [370, 222, 286, 518], "another order: raise RECUT_ORDER_VERSION with these numbers"


def test_bad_data_and_impossible_batches_are_sentences():
    with pytest.raises(InputError, match="fewer than one window"):
        counting_source(4)
    with pytest.raises(InputError, match="fewer than one batch of 16"):
        take(counting_source(33), 1, sequences=16)
    with pytest.raises(InputError, match="does not divide among 3"):
        take(counting_source(330), 1, world=3, sequences=16)
    with pytest.raises(InputError, match="--vocab_size 1048576"):
        counting_source(330, vocab_size=50)


def test_nanogpt_shards_are_trained_on_in_place(tmp_path):
    np.arange(4 * 40 + 1, dtype="<u2").tofile(tmp_path / "train.bin")
    source = open_source(str(tmp_path), seq_len=4, seed=7, sequences=4)
    assert first_tokens(take(source, 10)) == first_tokens(take(counting_source(4 * 40 + 1), 10))
    assert source.validation is None and source.vocab_size == 50257


def test_a_token_outside_the_vocabulary_is_named_before_training(tmp_path):
    tokens = np.zeros(200, dtype="<u2")
    tokens[150] = 60000
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(InputError, match=r"train.bin holds token 60000"):
        open_source(str(tmp_path), seq_len=4, seed=7, sequences=4)


def test_a_missing_directory_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no directory"):
        open_source(str(tmp_path / "nothing"), seq_len=4, seed=7, sequences=4)


def test_hub_dataset_of_shards_is_downloaded_once_and_its_checksums_compared(loopback_hub, monkeypatch, tmp_path):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    record = write_shard(tmp_path / "train_000000.bin", np.arange(4 * 40 + 1), 1000)
    train = {"tokens": 161, "documents": 1, "bytes": 161, "shards": [{**record, "documents": 1, "bytes": 161}]}
    tokenizer = {"kind": "char", "vocab_size": 1000, "eot_id": 999, "sha256": ""}
    manifest = {"format": "gpt2repro-shards", "version": 1, "dtype": "uint16", "tokenizer": tokenizer}
    manifest |= {"source": {}, "settings": {}, "splits": {"train": train}}
    content = (tmp_path / "train_000000.bin").read_bytes()
    loopback_hub.add_file("user/shards", "manifest.json", json.dumps(manifest).encode(), "dataset")
    loopback_hub.add_file("user/shards", "train_000000.bin", content, "dataset")
    expected = first_tokens(take(counting_source(4 * 40 + 1), 10))
    for name in ("hf://user/shards", "hf://user/shards@main"):
        assert first_tokens(take(open_source(name, seq_len=4, seed=7, sequences=4), 10)) == expected
    assert len([path for method, path, _ in loopback_hub.requests if method == "GET" and path.endswith(".bin")]) == 1

    damaged = content[:-2] + b"\x00\x00"
    loopback_hub.add_file("user/shards", "train_000000.bin", damaged, "dataset")
    with pytest.raises(InputError, match="is damaged"):
        open_source("hf://user/shards", seq_len=4, seed=7, sequences=4)
    with pytest.raises(InputError, match="cannot get the dataset user/nothing from the Hub"):
        open_source("hf://user/nothing", seq_len=4, seed=7, sequences=4)
    loopback_hub.add_file("user/text", "text.txt", b"not a shard", "dataset")
    with pytest.raises(InputError, match=r"user/text holds no token shards .*--data stream:user/text"):
        open_source("hf://user/text", seq_len=4, seed=7, sequences=4)


@pytest.mark.parametrize(
    ("data", "command"),
    [
        ("data/fineweb-10B", "python prepare_fineweb.py --dataset HuggingFaceFW/fineweb --out data/fineweb-10B"),
        ("data/fineweb-100B", "prepare_fineweb.py --dataset HuggingFaceFW/fineweb --subset sample-100BT --out"),
        ("data/fineweb-edu-10B", "python prepare_fineweb.py --out data/fineweb-edu-10B"),
        ("data/python-docs", "gpt2repro prepare-text --corpus python-docs --out data/python-docs"),
        ("data/shakespeare_char", "gpt2repro prepare-text --corpus shakespeare --tokenizer char --out"),
        ("data/shakespeare", "gpt2repro prepare-text --corpus shakespeare --tokenizer gpt2 --out data/shakespeare"),
        ("user/mine", "prepare-text --input TEXTS --out user/mine`, or write hf://user/mine if it lies on the Hub"),
    ],
)
def test_missing_data_never_asks_the_hub_and_names_the_command_that_makes_it(
    loopback_hub, monkeypatch, tmp_path, data, command
):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    loopback_hub.add_file("user/mine", "manifest.json", b"{}", "dataset")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{data} is no directory; make a data set there with") as error:
        open_source(data, seq_len=4, seed=7, sequences=4)
    assert command in str(error.value) and loopback_hub.requests == []


# -- what a run opens --------------------------------------------------------------------------------------------------


def options(data, **changes):
    """What `open_data` asks of a run's configuration."""
    values = {"val_data": None, "seq_len": 8, "seed": 1, "vocab_size": None, "tokenizer": None, "text_column": "text"}
    values["recut_windows"] = False
    return SimpleNamespace(
        **{"data": str(data), **values, "stream_lanes": 4, "cache_dir": None, "cache_gib": None, **changes}
    )


def test_open_data_gives_source_tokenizer_manifest_and_validation(tmp_path):
    data = write_tiny_shards(tmp_path / "data")
    source = open_data(options(data), sequences=4)
    assert fingerprint(source.tokenizer) == source.manifest["tokenizer"]["sha256"]
    assert source.directory == data and source.validation.tokens == source.manifest["splits"]["val"]["tokens"]
    other = write_tiny_shards(tmp_path / "other", repeats=100)
    assert open_data(options(data, val_data=str(other)), sequences=4).validation.sha256 != source.validation.sha256
    stream = options(f"stream:{tmp_path / 'a.jsonl'}", tokenizer=str(data), cache_dir=tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 200)
    source = open_data(stream, sequences=4)
    assert fingerprint(source.tokenizer) == fingerprint(load_tokenizer(data)) and source.manifest is None
    assert source.digests() == {}


def test_another_tokenizer_than_the_one_that_made_the_tokens_is_refused(tmp_path):
    data = write_tiny_shards(tmp_path / "data")
    path = data / "tokenizer" / "tokenizer.json"
    whole = path.read_text()
    content = json.loads(whole)
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"data/tokenizer did not make the tokens of .*prepare the data again"):
        open_data(options(data), sequences=4)
    path.write_text(whole)
    char_tokenizer([TEXT.upper()]).save_pretrained(tmp_path / "named")
    with pytest.raises(InputError, match=r"named did not make the tokens of .*choose the one that did"):
        open_data(options(data, tokenizer=str(tmp_path / "named")), sequences=4)
    foreign = write_tiny_shards(tmp_path / "foreign")
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"did not make the tokens of .*foreign"):
        open_data(options(data, val_data=str(foreign)), sequences=4)


# -- damaged data ------------------------------------------------------------------------------------------------------


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_changed_byte_of_our_shards_is_found_before_training_and_nothing_is_hashed_twice(tmp_path, monkeypatch):
    data = write_tiny_shards(tmp_path / "data")
    hashed = []
    original = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path.name) or original(path))
    for _ in range(2):
        open_data(options(data), sequences=4)
    assert sorted(hashed) == ["train_000000.bin", "val_000000.bin"]
    flip(data / "train_000000.bin", 5000)
    with pytest.raises(InputError, match=r"train_000000.bin is damaged \(its sha256 is not the manifest's\)"):
        open_data(options(data), sequences=4)
    flip(data / "train_000000.bin", 5000)
    open_data(options(data), sequences=4)
    flip(data / "val_000000.bin", 1100)
    with pytest.raises(InputError, match=r"val_000000.bin is damaged"):
        open_data(options(data), sequences=4)
    with pytest.raises(InputError, match=r"val_000000.bin is damaged"):
        open_data(options(write_tiny_shards(tmp_path / "whole"), val_data=str(data)), sequences=4)


@pytest.mark.skipif(os.name != "posix", reason="a directory that cannot be written to")
def test_what_was_hashed_of_read_only_data_is_kept_at_home(tmp_path, monkeypatch):
    data = write_tiny_shards(tmp_path / "data")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != data and access(path, mode))  # root may all
    open_data(options(data), sequences=4)
    (kept,) = (tmp_path / "home/gpt2repro/sha256").glob("*.json")
    assert sorted(json.loads(kept.read_text())) == ["train_000000.bin", "val_000000.bin"]
    assert not (data / ".sha256.json").exists()


def test_foreign_shards_are_those_that_the_run_began_with(tmp_path):
    np.arange(2000, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(200, dtype="<u2").tofile(tmp_path / "val.bin")
    where = {"seq_len": 4, "seed": 7, "sequences": 4}
    saved = open_source(str(tmp_path), **where).digests()
    assert saved == {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in ("train.bin", "val.bin")}
    open_source(str(tmp_path), **where).check_digests(saved)
    (np.arange(100_000) % 50_000).astype("<u2").tofile(tmp_path / "train.bin")
    saved = open_source(str(tmp_path), **where).digests()
    flip(tmp_path / "train.bin", 100_000)  # far from both ends, which the identity is made of
    with pytest.raises(InputError, match=r"train.bin is not the file that this run began with"):
        open_source(str(tmp_path), **where).check_digests(saved)
    with pytest.raises(InputError, match=r"gone.bin is not the file that this run began with"):
        open_source(str(tmp_path), **where).check_digests({"gone.bin": "0" * 64})


@pytest.mark.parametrize("file", ["train_000000.bin", "train.bin"])
def test_a_shard_that_is_cut_while_training_is_a_sentence(tmp_path, file):
    data = tmp_path / "data"
    if file == "train.bin":
        data.mkdir()
        np.arange(50_000, dtype="<u2").tofile(data / file)
    else:
        write_tiny_shards(data)
    source = open_source(str(data), seq_len=4, seed=7, sequences=4)
    batches = source.batches(source.initial_state(), rank=0, world=1, sequences=4)
    next(batches)
    os.truncate(data / file, 1200)
    with pytest.raises(InputError, match=rf"{file} ends at byte \d+: it was cut since the run began"):
        for _ in range(1000):
            next(batches)


def test_merged_states_of_shards_are_the_state_of_one_rank():
    state = {"position": 12, "skipped": [[1, 2]]}
    assert merge_states([state, dict(state)]) == state
    with pytest.raises(AssertionError, match="different steps"):
        merge_states([state, {"position": 8, "skipped": []}])


def test_indices_of_a_batch_at_a_trillion_tokens_take_less_than_a_millisecond():
    source = ShardSource(TrillionTokens(), seq_len=1024, seed=0)
    seconds = []
    for batch in range(30):
        begin = time.perf_counter()
        source.windows_at(next_positions(7_000_000_000 + 512 * batch, [], 512))
        seconds.append(time.perf_counter() - begin)
    assert np.median(seconds) < 1e-3


# -- prefetch ----------------------------------------------------------------------------------------------------------


def test_prefetch_gives_the_same_items_and_the_state_of_the_last_consumed():
    source = counting_source(4 * 40 + 1)
    ahead = prefetch(source.batches(source.initial_state(), rank=0, world=1, sequences=4), depth=3)
    for (x, y, state), (px, py, pstate) in zip(take(source, 8), ahead, strict=False):
        assert torch.equal(x, px) and torch.equal(y, py) and state == pstate
    ahead.close()
    ahead.close()


def test_prefetch_raises_the_error_of_its_thread_in_turn():
    def three_then_fail():
        yield from range(3)
        raise InputError("the shard is gone")

    ahead = prefetch(three_then_fail(), depth=1)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="the shard is gone"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_prefetch_ends_with_its_iterator_and_leaves_no_thread():
    before = threading.active_count()
    assert list(prefetch(iter(range(10)), depth=2)) == list(range(10))
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    ahead = prefetch(endless(), depth=2)
    next(ahead)
    ahead.close()
    assert closed == [True] and threading.active_count() == before


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_benchmark_writes_a_record_with_its_goals(tmp_path, monkeypatch):
    from pydoc_data.topics import topics

    from gpt2repro.commands.bench import data as bench
    from gpt2repro.data.tokenization import char_tokenizer

    monkeypatch.setattr(bench, "TOKENS", 2**17)
    monkeypatch.setattr(bench, "STREAM_BYTES", 2**19)
    monkeypatch.setattr("gpt2repro.data.tokenization.gpt2_tokenizer", lambda: char_tokenizer(list(topics.values())))
    assert bench.main(["--rounds", "1", "--batches", "3", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("data-*.json")
    measures = {row["measure"] for row in json.loads(path.read_text())["results"]["headlines"]}
    assert {"loading tokens", "the windows of a batch of 512 among 10^12 tokens", "a second epoch"} <= measures
