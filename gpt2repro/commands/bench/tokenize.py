"""Text to token shards: prepare_fineweb's engine against build-nanogpt's way, on the same parquet file.

The baseline is a process pool that calls tiktoken once per document, builds one numpy array each and copies them into
shards, as build-nanogpt's fineweb.py does: with half the cores (as it ships) and with all. Ours reads, tokenises and
writes with the engine of `preparation`, with tiktoken and, where it is installed, with gigatoken. All read the same
file and must write the same tokens, or nothing is timed.

The text is what is at hand: docstrings of Python and its installed packages and the files of --input, cut into
documents of a web page's length and repeated up to --megabytes. Starting the pools counts; reading GPT-2's vocabulary
and the two seconds that comparing gigatoken with tiktoken takes do not (they are the same for 10B tokens).

    gpt2repro bench tokenize --input texts/*.txt          # goals: 2.5x, 1.8x, and 10x with gigatoken
"""

import functools
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from gpt2repro.commands.bench import harness
from gpt2repro.data.preparation import prepare
from gpt2repro.data.python_docs import docstrings, python_docs
from gpt2repro.data.shards import has_split, open_split
from gpt2repro.data.text import find_text
from gpt2repro.data.tokenization import Encoder, gpt2_tokenizer
from gpt2repro.options import parse_options

PACKAGES = ("torch", "numpy")
DOCUMENT_CHARACTERS = 4700  # FineWeb's mean: 1,030 tokens
ROW_GROUP_DOCUMENTS = 1000  # FineWeb's


@dataclass
class Options:
    input: list[str] = field(default_factory=list)
    "More text: files, directories, globs."
    megabytes: Annotated[int, Field(gt=0)] = 400
    "Text to tokenise; what is at hand is repeated. Less, and the start of the pools is what is measured."
    rounds: Annotated[int, Field(gt=0)] = 3
    "Measurements of each; they take turns."
    shard_tokens: Annotated[int, Field(gt=0)] = 10_000_000
    "Tokens per shard."
    workers: Annotated[int, Field(gt=0)] = os.cpu_count() or 1
    "Processes of ours, and of the baseline with all cores."
    out: Path = harness.RECORDS
    "Directory of the record."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench tokenize", description=__doc__)
    tokenizer = gpt2_tokenizer()
    plain, fast = Encoder(tokenizer), Encoder(tokenizer, fast=True)
    half = max(1, options.workers // 2)
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "text.parquet", Path(scratch) / "out"
        text_bytes = write_text(source, options.input, options.megabytes * 10**6)
        as_ships, all_cores = (
            f"build-nanogpt, {half} of {options.workers} cores",
            f"build-nanogpt, {options.workers} cores",
        )
        candidates = {
            as_ships: functools.partial(build_nanogpt, source, out, options.shard_tokens, half),
            all_cores: functools.partial(build_nanogpt, source, out, options.shard_tokens, options.workers),
            "ours": functools.partial(ours, source, out, options.shard_tokens, options.workers, tokenizer, plain),
        }
        if fast.uses_gigatoken:
            candidates["ours, gigatoken"] = functools.partial(
                ours, source, out, options.shard_tokens, options.workers, tokenizer, fast
            )
        tokens, memory = None, {}
        for name, call in candidates.items():  # the check, and the warm-up
            memory[name] = peak_memory_gib(call)
            written = read_back(out)
            if tokens is not None and not np.array_equal(tokens, written):
                raise harness.NotEqual(f"{name} wrote other tokens than {as_ships}")
            tokens = written
        times = harness.compare(candidates, rounds=options.rounds, warmup=0, units=len(tokens))

    measure = "Tokenising, GPT-2 tokens"
    headlines = [
        harness.headline(measure, times, ours="ours", baseline=as_ships, unit="tokens/s", goal=2.5),
        harness.headline(measure, times, ours="ours", baseline=all_cores, unit="tokens/s", goal=1.8),
    ]
    if fast.uses_gigatoken:
        headlines.append(
            harness.headline(
                f"{measure}, gigatoken", times, ours="ours, gigatoken", baseline=as_ships, unit="tokens/s", goal=10.0
            )
        )
    results = {
        "text": {"bytes": text_bytes, "tokens": len(tokens)},
        "identical": "all candidates wrote the same tokens",
        "times": times,
        "peak_memory_gib": memory,
        "headlines": headlines,
    }
    print(f"{text_bytes / 1e6:,.0f} MB of text, {len(tokens):,} tokens, the same from all")
    for name in candidates:
        print(f"  {name:32} {times[name]['per_second']:>14,.0f} tokens/s  {memory[name]:.2f} GiB at the peak")
    harness.write_record("tokenize", results, argv=argv, out=options.out)
    return 0


def write_text(path: Path, inputs: list[str], text_bytes: int) -> int:
    """Write about `text_bytes` of real text as FineWeb-like parquet. Returns its exact size."""
    import pyarrow
    from pyarrow import parquet

    texts = list(python_docs())
    for package in PACKAGES:
        texts += docstrings(Path(sysconfig.get_paths()["purelib"]) / package)
    if inputs:
        files = find_text(inputs)
        texts += [
            "".join(piece for piece, _ in document) for unit in files.units(10**9) for document in files.read(unit)
        ]
    documents = [
        text[start : start + DOCUMENT_CHARACTERS]
        for text in texts
        for start in range(0, len(text), DOCUMENT_CHARACTERS)
    ]
    np.random.default_rng(0).shuffle(documents)
    written = 0
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())]), compression="zstd") as file:
        while written < text_bytes:
            for start in range(0, len(documents), ROW_GROUP_DOCUMENTS):
                some = documents[start : start + ROW_GROUP_DOCUMENTS]
                file.write_table(pyarrow.table({"text": some}))
                written += sum(len(text.encode()) for text in some)
                if written >= text_bytes:
                    break
    return written


def ours(source: Path, out: Path, shard_tokens: int, workers: int, tokenizer, encoder: Encoder) -> None:
    """The engine of prepare_fineweb.py, first shard for validation and all."""
    shutil.rmtree(out, ignore_errors=True)
    files = find_text([str(source)])
    units = files.units(shard_tokens)
    for index, unit in enumerate(units):
        unit["split"] = "train" if index else "val"
    prepare(
        out, tokenizer, units, files.read, source=files.source, settings={}, workers=workers, encoder=encoder,
        show_progress=False,
    )  # fmt: skip


def build_nanogpt(source: Path, out: Path, shard_tokens: int, processes: int) -> None:
    """A pool, one call of tiktoken and one array per document, copied into shards.

    Source: how build-nanogpt's fineweb.py works, written anew; documents end with `<|endoftext|>` as here.
    """
    from pyarrow import parquet

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    # As it ships where there is fork: the vocabulary is inherited.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    _tiktoken()
    shard, count, index = np.empty(shard_tokens, np.uint16), 0, 0
    rows = (text for batch in parquet.ParquetFile(source).iter_batches(1000) for text in batch.column(0).to_pylist())
    with multiprocessing.get_context(method).Pool(processes) as pool:
        for tokens in pool.imap(_tokenise_document, rows, chunksize=16):
            while len(tokens):
                part = tokens[: shard_tokens - count]
                shard[count : count + len(part)] = part
                count, tokens = count + len(part), tokens[len(part) :]
                if count == shard_tokens:
                    np.save(out / _shard_name(index), shard)
                    count, index = 0, index + 1
    if count:
        np.save(out / _shard_name(index), shard[:count])


def _shard_name(index: int) -> str:
    return f"bench_{'train' if index else 'val'}_{index:06d}.npy"


@functools.cache
def _tiktoken():
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def _tokenise_document(text: str) -> np.ndarray:
    encoding = _tiktoken()
    tokens = encoding.encode_ordinary(text)
    tokens.append(encoding.eot_token)
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all(), "token ids beyond uint16"
    return tokens.astype(np.uint16)


def read_back(out: Path) -> np.ndarray:
    """All tokens that a candidate wrote, in the order of the text."""
    splits = [open_split(out, name) for name in ("val", "train") if has_split(out, name)]
    return np.concatenate([split.read(0, split.tokens) for split in splits])


def peak_memory_gib(call) -> float:
    """Largest memory of a call in a process of its own, with all that it starts; shared pages count once."""
    import psutil

    process = multiprocessing.get_context("spawn").Process(target=call)
    process.start()
    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            try:
                parent = psutil.Process(process.pid)
                peak = max(peak, sum(map(_memory, [parent, *parent.children(recursive=True)])))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    process.join()
    done.set()
    watcher.join()
    assert process.exitcode == 0, f"the candidate ended with {process.exitcode}"
    return peak / harness.GIB


def _memory(process) -> int:
    info = process.memory_full_info()
    return getattr(info, "pss", info.rss)  # pss: Linux; elsewhere shared pages count in every process
