"""Text to token shards: prepare_fineweb's engine against build-nanogpt's way, on the same parquet file.

gpt2repro bench tokenize                              # goals: 2.5x, 1.8x, and 10x with gigatoken
gpt2repro bench tokenize --input texts/*.txt

The baseline works as build-nanogpt's fineweb.py: a process pool calls tiktoken once per document, makes a numpy array
of each, and copies the arrays into shards. It runs with half of the cores, as it ships, and with all of them. Ours
reads, tokenises and writes with the engine of `preparation`: with tiktoken and, where it is installed, with gigatoken.
All candidates read the same file and must write the same tokens; otherwise nothing is timed.

The text is Python's documentation, the docstrings of torch and numpy, and the files of --input. It is cut into
documents as long as a web page and repeated until it has --megabytes. The time to start the pools counts. The time to
read GPT-2's vocabulary and to compare gigatoken with tiktoken (two seconds) does not: it is the same for 10B tokens.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import tiktoken
from pyarrow import parquet

from gpt2repro.commands.bench import harness
from gpt2repro.data.preparation import prepare
from gpt2repro.data.python_docs import docstrings, python_docs
from gpt2repro.data.shards import has_split, open_split
from gpt2repro.data.text import find_text
from gpt2repro.data.tokenization import Encoder, gpt2_tokenizer
from gpt2repro.options import AtLeastOne, parse_options

PACKAGES = ("torch", "numpy")
DOCUMENT_CHARACTERS = 4700  # FineWeb's mean: 1,030 tokens
ROW_GROUP_DOCUMENTS = 1000  # FineWeb's


@dataclass(kw_only=True)
class Options(harness.CommonOptions):
    input: list[Path] = field(default_factory=list)
    "More text: UTF-8 files."
    megabytes: AtLeastOne = 400
    "How much text to tokenise; with much less, the pools take most of the time to start."
    rounds: AtLeastOne = 3
    "Measurements of each candidate; the candidates take turns."
    shard_tokens: AtLeastOne = 10_000_000
    "Tokens per shard."
    workers: AtLeastOne = os.cpu_count() or 1
    "Processes of ours, and of the baseline with all cores."

    def problems(self) -> list[str]:
        return [f"input={path} does not exist" for path in self.input if not path.exists()]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench tokenize", description=__doc__)
    record = harness.Record("tokenize", argv, options)
    tokenizer = gpt2_tokenizer()
    plain, fast = Encoder(tokenizer), Encoder(tokenizer, fast=True)
    half, workers = max(1, options.workers // 2), options.workers
    as_ships, all_cores = f"build-nanogpt, {half} of {workers} cores", f"build-nanogpt, {workers} cores"
    with tempfile.TemporaryDirectory() as scratch:
        place = (Path(scratch) / "text.parquet", Path(scratch) / "out", options.shard_tokens)
        text_bytes = write_text(place[0], options.input, options.megabytes * 10**6)
        candidates = {
            as_ships: partial(build_nanogpt, *place, half),
            all_cores: partial(build_nanogpt, *place, workers),
            "ours": partial(ours, *place, workers, tokenizer, plain),
        }
        if fast.uses_gigatoken:
            candidates["ours, gigatoken"] = partial(ours, *place, workers, tokenizer, fast)
        memory, written = {}, {}
        for name, call in candidates.items():  # compares the tokens, and warms up
            memory[name] = peak_memory_gib(call)
            written[name] = read_back(place[1])
            if not np.array_equal(written[name], written[as_ships]):
                raise harness.NotEqual(f"{name} wrote other tokens than {as_ships}")
        count = len(written[as_ships])
        print(f"{text_bytes / 1e6:,.0f} MB of text, {count:,} tokens, the same from all", flush=True)
        times = record.compare(candidates, warmup=0, units=count)

    text, same = {"bytes": text_bytes, "tokens": count}, "all candidates wrote the same tokens"
    record.save(text=text, identical=same, times=times, peak_memory_gib=memory)
    measure = "Tokenising, GPT-2 tokens"
    for baseline, goal in ((as_ships, 2.5), (all_cores, 1.8)):
        record.headline(measure, times, ours="ours", baseline=baseline, unit="tokens/s", goal=goal)
    how = {"ours": "ours, gigatoken", "baseline": as_ships, "unit": "tokens/s", "goal": 10.0}
    record.headline(f"{measure}, gigatoken", times, **how)
    return record.finish()


def write_text(path: Path, inputs: list[Path], text_bytes: int) -> int:
    """Write about `text_bytes` of real text as FineWeb-like parquet. Returns its exact size."""
    libraries = Path(sysconfig.get_paths()["purelib"])
    texts = [*python_docs(), *(text for package in PACKAGES for text in docstrings(libraries / package))]
    if inputs:
        files = find_text([str(path) for path in inputs])
        documents = (document for unit in files.units(10**9) for document in files.read(unit))
        texts += ["".join(piece for piece, _ in document) for document in documents]
    size = DOCUMENT_CHARACTERS
    documents = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    np.random.default_rng(0).shuffle(documents)
    endless, chosen, written = itertools.cycle(documents), [], 0
    while written < text_bytes:
        chosen.append(next(endless))
        written += len(chosen[-1].encode())
    table = pyarrow.table({"text": chosen})
    parquet.write_table(table, path, row_group_size=ROW_GROUP_DOCUMENTS, compression="zstd")
    return written


def ours(source: Path, out: Path, shard_tokens: int, workers: int, tokenizer, encoder: Encoder) -> None:
    """The engine of prepare_fineweb.py; as there, the first shard is for validation."""
    shutil.rmtree(out, ignore_errors=True)
    files = find_text([str(source)])
    units = [unit | {"split": "train" if index else "val"} for index, unit in enumerate(files.units(shard_tokens))]
    how = {"workers": workers, "encoder": encoder, "show_progress": False}
    prepare(out, tokenizer, units, files.read, source=files.source, settings={}, **how)


def build_nanogpt(source: Path, out: Path, shard_tokens: int, processes: int) -> None:
    """The baseline: a pool makes one array per document with one call of tiktoken; the arrays are copied into shards.

    Source: the method of build-nanogpt's fineweb.py, written anew. Documents end with `<|endoftext|>`, as ours do.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    names = (out / f"bench_{'train' if index else 'val'}_{index:06d}.npy" for index in itertools.count())
    # As it ships, where the system can fork: the processes inherit the vocabulary that is read here.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    tiktoken.get_encoding("gpt2")
    shard, count = np.empty(shard_tokens, np.uint16), 0
    rows = (text for batch in parquet.ParquetFile(source).iter_batches(1000) for text in batch.column(0).to_pylist())
    with multiprocessing.get_context(method).Pool(processes) as pool:
        for tokens in pool.imap(_tokenise_document, rows, chunksize=16):
            while len(tokens):
                part = tokens[: shard_tokens - count]
                shard[count : count + len(part)] = part
                count, tokens = count + len(part), tokens[len(part) :]
                if count == shard_tokens:
                    np.save(next(names), shard)
                    count = 0
    if count:
        np.save(next(names), shard[:count])


def _tokenise_document(text: str) -> np.ndarray:
    encoding = tiktoken.get_encoding("gpt2")  # made once per process
    tokens = np.array([*encoding.encode_ordinary(text), encoding.eot_token])
    assert (tokens >= 0).all() and (tokens < 2**16).all(), "token ids beyond uint16"
    return tokens.astype(np.uint16)


def read_back(out: Path) -> np.ndarray:
    """All tokens that a candidate wrote, in the order of the text."""
    splits = [open_split(out, name) for name in ("val", "train") if has_split(out, name)]
    return np.concatenate([split.read(0, split.tokens) for split in splits])


def peak_memory_gib(call) -> float:
    """Largest memory of a call in a process of its own, and of those it starts; shared pages count once."""
    process = multiprocessing.get_context("spawn").Process(target=call)
    process.start()
    peak, parent = 0, psutil.Process(process.pid)
    while process.is_alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            # Only Linux knows pss; elsewhere shared pages count in every process.
            infos = [one.memory_full_info() for one in [parent, *parent.children(recursive=True)]]
            peak = max(peak, sum(getattr(info, "pss", info.rss) for info in infos))
        process.join(0.1)
    assert process.exitcode == 0, f"the candidate ended with {process.exitcode}"
    return peak / harness.GIB
