"""How fast batches come: ours against a loader that only slices one array, and against `datasets`' random access.

gpt2repro bench data

All three give 16 x 1024 tokens at a time from the same 32M tokens. The slicing loader is what build-nanogpt does: the
whole shard in memory, the next B T + 1 tokens, in the order of the file, never shuffled; it is as fast as a loader can
be. `datasets` reads rows of 1025 tokens from an Arrow file on disk in shuffled order; ours reads shuffled windows, also
across shard borders, from disk; both in the thread that feeds a training loop. Two more measures have no rival: the
windows of one batch are chosen among 10^12 simulated tokens; and a stream makes batches of text in one tokenising
thread, with an empty cache and with a full one.
"""

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

from gpt2repro.commands.bench.harness import CommonOptions, NotEqual, Record
from gpt2repro.data.ordering import next_positions
from gpt2repro.data.shards import open_split, write_shard
from gpt2repro.data.sources import ShardSource, open_source, prefetch
from gpt2repro.data.tokenization import Encoder, bpe_tokenizer, gpt2_tokenizer
from gpt2repro.options import AtLeastOne, InputError, parse_options

SEQ_LEN, SEQUENCES = 1024, 16
TOKENS, SHARDS = 32 * 2**20, 4
VOCAB_SIZE = 50257
STREAM_BYTES = 16 * 2**20
GPU_TOKENS_PER_SECOND = 600_000  # what one GPU consumes at the training benchmark's best goal
OURS, SLICING, DATASETS = "ours, shuffled, from disk", "slicing one array in order", "datasets, shuffled, from disk"
EMPTY_CACHE, FULL_CACHE = "stream, empty cache", "stream, full cache"
BATCH = {"rank": 0, "world": 1, "sequences": SEQUENCES}


@dataclass(kw_only=True)
class Options(CommonOptions):
    batches: AtLeastOne = 200
    "Batches per round."


class TrillionTokens:
    """Stands in for a split of 10^12 tokens; only its size is read."""

    tokens, vocab_size, sha256 = 10**12, VOCAB_SIZE, ""


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench data", description=__doc__)
    record = Record("data", argv, options)
    with tempfile.TemporaryDirectory() as folder:
        loaders(record, Path(folder), options.batches)
        indices(record)
        if record.time_for("the stream"):
            stream(record, Path(folder))
    return record.finish()


def loaders(record: Record, folder: Path, batches: int) -> None:
    """Tokens per second of the three loaders, after a check of the windows and tokens of ours."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, TOKENS, dtype=np.uint16)
    for number, piece in enumerate(np.array_split(tokens, SHARDS)):  # llm.c's layout, which needs no manifest
        (folder / "shards").mkdir(exist_ok=True)
        write_shard(folder / "shards" / f"bench_train_{number:06d}.bin", piece, VOCAB_SIZE)
    source = ShardSource(open_split(folder / "shards", "train"), seq_len=SEQ_LEN, seed=0)

    positions = np.arange(source.windows)
    if sorted(source.windows_at(positions).tolist()) != positions.tolist():
        raise NotEqual("an epoch does not hold every window exactly once")
    sample = next(source.batches(source.initial_state(), **BATCH))
    starts = source.windows_at(positions[:SEQUENCES]) * SEQ_LEN
    expected = np.stack([tokens[start : start + SEQ_LEN + 1] for start in starts]).astype(np.int64)
    if not (np.array_equal(sample[0], expected[:, :-1]) and np.array_equal(sample[1], expected[:, 1:])):
        raise NotEqual("a batch from the shards does not hold the tokens of its windows")

    def slices():  # build-nanogpt's DataLoaderLite
        array, step = torch.from_numpy(tokens.astype(np.int64)), SEQUENCES * SEQ_LEN
        for start in itertools.cycle(range(0, TOKENS - step, step)):
            buffer = array[start : start + step + 1]
            yield buffer[:-1].view(SEQUENCES, SEQ_LEN), buffer[1:].view(SEQUENCES, SEQ_LEN)

    def take(loader) -> None:
        for x, y, *_ in itertools.islice(loader, batches):
            x.clone(), y.clone()  # training copies a batch to its GPU; a view alone would read no token

    feeds = {OURS: prefetch(source.batches(source.initial_state(), **BATCH), depth=4), SLICING: slices()}
    feeds[DATASETS] = prefetch(arrow_batches(folder / "arrow", tokens), depth=4)
    calls = {name: lambda feed=feed: take(feed) for name, feed in feeds.items()}
    times = record.compare(calls, units=batches * SEQUENCES * SEQ_LEN)
    for feed in feeds.values():
        feed.close()
    record.results["loading"] = times
    for rival, goal in ((SLICING, None), (DATASETS, 1.0)):
        record.headline("loading tokens", times, ours=OURS, baseline=rival, unit="tokens/s", goal=goal)
    record.figure("loading tokens", times[OURS]["per_second"], unit="tokens/s", goal=GPU_TOKENS_PER_SECOND)


def arrow_batches(directory: Path, tokens: np.ndarray):
    """Endless (x, y) in one shuffled order from an Arrow dataset on disk, T + 1 tokens in each row."""
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    windows = (len(tokens) - 1) // SEQ_LEN
    rows = np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[: windows * SEQ_LEN : SEQ_LEN]
    Dataset.from_dict({"tokens": rows}).save_to_disk(str(directory))
    rows = load_from_disk(str(directory)).with_format("numpy")
    order = itertools.cycle(np.random.default_rng(1).permutation(len(rows)).tolist())
    while True:
        batch = np.stack(rows[list(itertools.islice(order, SEQUENCES))]["tokens"]).astype(np.int64)
        yield torch.from_numpy(batch[:, :-1].copy()), torch.from_numpy(batch[:, 1:].copy())


def indices(record: Record) -> None:
    """Milliseconds for the windows of a batch of 512 sequences, in a corpus that no disk here could hold."""
    source = ShardSource(TrillionTokens(), seq_len=SEQ_LEN, seed=0)
    position = itertools.count(source.windows // 3, 512)
    calls = {"indices": lambda: [source.windows_at(next_positions(next(position), [], 512)) for _ in range(100)]}
    milliseconds = 10 * record.compare(calls)["indices"]["median_seconds"]
    measure = "the windows of a batch of 512 among 10^12 tokens"
    record.figure(measure, milliseconds, unit="ms", goal=1.0, at_most=True)


def stream(record: Record, folder: Path) -> None:
    """Tokens per second from text to batches, one tokenising thread, from an empty and from a full cache."""
    texts = list(topics.values())  # the documents of `help()`: about 465 KB that every CPython brings
    try:
        tokenizer = gpt2_tokenizer()
    except (InputError, ImportError):  # no network and no cached vocabulary, or no tiktoken: a bare GPU image
        tokenizer = bpe_tokenizer(texts, 8192)
    lines, repeats = [json.dumps({"text": text}) for text in texts], STREAM_BYTES // sum(map(len, texts)) + 1
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines * repeats), encoding="utf-8")
    tokens = repeats * sum(map(len, Encoder(tokenizer).encode_batch(texts)))
    batches = max(1, int(0.8 * tokens / (SEQUENCES * SEQ_LEN)))  # a second epoch would come from the cache
    caches = (folder / f"cache-{number}" for number in itertools.count())
    how = {"tokenizer": tokenizer, "seq_len": SEQ_LEN, "seed": 0, "sequences": SEQUENCES, "workers": 1}

    def read(cache: Path) -> None:
        source = open_source(f"stream:{path}", cache_dir=cache, **how)
        ahead = prefetch(source.batches(source.initial_state(), **BATCH), depth=4)
        for _ in range(batches):
            next(ahead)
        ahead.close()

    full = next(caches)
    candidates = {EMPTY_CACHE: lambda: read(next(caches)), FULL_CACHE: lambda: read(full)}
    times = record.compare(candidates, rounds=min(3, record.rounds), units=batches * SEQUENCES * SEQ_LEN)
    record.results["streaming"] = times
    measure, rate = f"streaming text, one thread, vocabulary {len(tokenizer):,}", times[EMPTY_CACHE]["per_second"]
    record.figure(measure, rate, unit="tokens/s", goal=GPU_TOKENS_PER_SECOND)
    record.headline("a second epoch", times, ours=FULL_CACHE, baseline=EMPTY_CACHE, unit="tokens/s")
