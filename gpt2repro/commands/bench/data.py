"""How fast batches come: ours against a loader that only slices one array, and against `datasets`' random access.

gpt2repro bench data

All three give 16 x 1024 tokens at a time from the same 32M tokens. The slicing loader is what build-nanogpt does: the
whole shard in memory, the next B T + 1 tokens, in the order of the file, never shuffled; it is as fast as a loader can
be. `datasets` reads rows of 1025 tokens from an Arrow file on disk in shuffled order; ours reads shuffled windows, also
across shard borders, from disk; both in the thread that feeds a training loop. Then the indices of one batch at a
simulated 10^12 tokens, and a stream: text to batches through a tokenising thread, from an empty cache and a full one.
"""

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2repro.commands.bench.harness import RECORDS, NotEqual, compare, figure, headline, write_record
from gpt2repro.options import InputError, parse_options

SEQ_LEN, SEQUENCES = 1024, 16
TOKENS, SHARDS = 32 * 2**20, 4
VOCAB_SIZE = 50257
TRILLION = 10**12
STREAM_BYTES = 16 * 2**20
GPU_TOKENS_PER_SECOND = 600_000  # what one GPU consumes at the training benchmark's best goal
OURS, SLICING, DATASETS = "ours, shuffled, from disk", "slicing one array in order", "datasets, shuffled, from disk"
EMPTY_CACHE, FULL_CACHE = "stream, empty cache", "stream, full cache"


@dataclass
class Options:
    out: Path = RECORDS
    "Directory of the JSON records."
    rounds: int = 7
    "Rounds per candidate."
    batches: int = 200
    "Batches per round."

    def problems(self) -> list[str]:
        return [f"{n}={getattr(self, n)} must be at least 1" for n in ("rounds", "batches") if getattr(self, n) < 1]


class TrillionTokens:
    """Stands in for a split of 10^12 tokens; only its size is asked for."""

    tokens, vocab_size, sha256 = TRILLION, VOCAB_SIZE, ""


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench data", description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        loaders = bench_loaders(Path(folder), options)
        stream = bench_stream(Path(folder), options)
    indices = bench_indices(options)
    results = {"headlines": [*loaders.pop("headlines"), indices, *stream.pop("headlines")], **loaders, **stream}
    write_record("data", results, argv=argv, out=options.out)
    return 0


def bench_loaders(folder: Path, options: Options) -> dict:
    """Batches per second of the three loaders, after a look at whether ours holds what it should."""
    import torch

    from gpt2repro.data.shards import open_split
    from gpt2repro.data.sources import ShardSource, prefetch

    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, TOKENS, dtype=np.uint16)
    write_dataset(folder / "shards", tokens)
    source = ShardSource(open_split(folder / "shards", "train"), seq_len=SEQ_LEN, seed=0)

    positions = np.arange(source.windows)
    if sorted(source.windows_at(positions).tolist()) != positions.tolist():
        raise NotEqual("an epoch does not hold every window exactly once")
    sample = next(source.batches(source.initial_state(), rank=0, world=1, sequences=SEQUENCES))
    starts = source.windows_at(positions[:SEQUENCES]) * SEQ_LEN
    expected = np.stack([tokens[start : start + SEQ_LEN + 1] for start in starts]).astype(np.int64)
    if not (np.array_equal(sample[0], expected[:, :-1]) and np.array_equal(sample[1], expected[:, 1:])):
        raise NotEqual("a batch from the shards does not hold the tokens of its windows")

    ours = prefetch(source.batches(source.initial_state(), rank=0, world=1, sequences=SEQUENCES), depth=4)
    array = torch.from_numpy(tokens.astype(np.int64))  # build-nanogpt's load_tokens
    step = SEQUENCES * SEQ_LEN
    starting_points = itertools.cycle(range(0, TOKENS - step, step))

    def slice_next() -> tuple:
        start = next(starting_points)
        buffer = array[start : start + step + 1]
        return buffer[:-1].view(SEQUENCES, SEQ_LEN), buffer[1:].view(SEQUENCES, SEQ_LEN)

    def touch(x, y) -> None:
        """Copy, as the copy to a GPU does: a view costs nothing and holds nothing yet."""
        x.clone(), y.clone()

    candidates = {
        OURS: lambda: [touch(*next(ours)[:2]) for _ in range(options.batches)],
        SLICING: lambda: [touch(*slice_next()) for _ in range(options.batches)],
    }
    if rows := arrow_rows(folder / "arrow", tokens):
        theirs = prefetch(arrow_batches(rows), depth=4)
        candidates[DATASETS] = lambda: [touch(*next(theirs)) for _ in range(options.batches)]
    times = compare(candidates, rounds=options.rounds, warmup=1, units=options.batches * step)
    ours.close()
    if rows:
        theirs.close()
    rivals = [(SLICING, None), (DATASETS, 1.0)]
    headlines = [
        headline("loading tokens", times, ours=OURS, baseline=rival, unit="tokens/s", goal=goal)
        for rival, goal in rivals
        if rival in times
    ]
    enough = figure("loading tokens", times[OURS]["per_second"], unit="tokens/s", goal=GPU_TOKENS_PER_SECOND)
    return {"headlines": [*headlines, enough], "loading": times}


def bench_indices(options: Options) -> dict:
    """Milliseconds for the windows of a batch of 512 sequences, at a corpus that no disk here would hold."""
    from gpt2repro.data.ordering import next_positions
    from gpt2repro.data.sources import ShardSource

    source = ShardSource(TrillionTokens(), seq_len=SEQ_LEN, seed=0)
    position = itertools.count(source.windows // 3, 512)
    batches = {"indices": lambda: [source.windows_at(next_positions(next(position), [], 512)) for _ in range(100)]}
    seconds = compare(batches, rounds=options.rounds, warmup=1)["indices"]["median_seconds"] / 100
    measure = "the windows of a batch of 512 among 10^12 tokens"
    return figure(measure, 1000 * seconds, unit="ms", goal=1.0, at_most=True)


def bench_stream(folder: Path, options: Options) -> dict:
    """Tokens per second from text to batches, one tokenising thread, from an empty and from a full cache."""
    from gpt2repro.data.sources import open_source, prefetch
    from gpt2repro.data.tokenization import Encoder, bpe_tokenizer, gpt2_tokenizer

    texts = python_topics()
    try:
        tokenizer = gpt2_tokenizer()
    except InputError:  # no network and no cached vocabulary
        tokenizer = bpe_tokenizer(texts, 8192)
    path, size = folder / "text.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        for text in itertools.cycle(texts):
            size += file.write(json.dumps({"text": text}) + "\n")
            if size > STREAM_BYTES:
                break
    tokens = sum(map(len, Encoder(tokenizer).encode_batch(texts))) * size / sum(map(len, texts))
    batches = max(1, int(0.8 * tokens / (SEQUENCES * SEQ_LEN)))  # most of an epoch, so that the cache cannot help
    caches = (folder / f"cache-{number}" for number in itertools.count())

    def read(cache: Path) -> None:
        stream = open_source(
            f"stream:{path}",
            tokenizer=tokenizer,
            seq_len=SEQ_LEN,
            seed=0,
            sequences=SEQUENCES,
            cache_dir=cache,
            workers=1,
        )
        ahead = prefetch(stream.batches(stream.initial_state(), rank=0, world=1, sequences=SEQUENCES), depth=4)
        for _ in range(batches):
            next(ahead)
        ahead.close()

    full = next(caches)
    candidates = {EMPTY_CACHE: lambda: read(next(caches)), FULL_CACHE: lambda: read(full)}
    times = compare(candidates, rounds=min(3, options.rounds), warmup=1, units=batches * SEQUENCES * SEQ_LEN)
    measure = f"streaming text, one thread, vocabulary {len(tokenizer):,}"
    rate = figure(measure, times[EMPTY_CACHE]["per_second"], unit="tokens/s", goal=GPU_TOKENS_PER_SECOND)
    cached = headline("a second epoch", times, ours=FULL_CACHE, baseline=EMPTY_CACHE, unit="tokens/s", goal=None)
    return {"headlines": [rate, cached], "streaming": times}


def python_topics() -> list[str]:
    """The documents of `help()`: about 465 KB that every CPython brings."""
    from pydoc_data.topics import topics

    return list(topics.values())


def write_dataset(directory: Path, tokens: np.ndarray) -> None:
    """Token shards in llm.c's layout, which are used in place."""
    from gpt2repro.data.shards import write_shard

    directory.mkdir()
    for number, piece in enumerate(np.array_split(tokens, SHARDS)):
        write_shard(directory / f"bench_train_{number:06d}.bin", piece, VOCAB_SIZE)


def arrow_rows(directory: Path, tokens: np.ndarray):
    """The tokens as an Arrow dataset on disk, T + 1 of them in each row; None where `datasets` is absent."""
    try:
        from datasets import Dataset, disable_progress_bars, load_from_disk
    except ImportError:
        return None
    disable_progress_bars()
    windows = (len(tokens) - 1) // SEQ_LEN
    rows = np.lib.stride_tricks.sliding_window_view(tokens, SEQ_LEN + 1)[: windows * SEQ_LEN : SEQ_LEN]
    Dataset.from_dict({"tokens": rows}).save_to_disk(str(directory))
    return load_from_disk(str(directory)).with_format("numpy")


def arrow_batches(rows):
    """Endless (x, y) from rows in one shuffled order."""
    import torch

    order = itertools.cycle(np.random.default_rng(1).permutation(len(rows)).tolist())
    while True:
        batch = np.stack(rows[list(itertools.islice(order, SEQUENCES))]["tokens"]).astype(np.int64)
        yield torch.from_numpy(batch[:, :-1].copy()), torch.from_numpy(batch[:, 1:].copy())
