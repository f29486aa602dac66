"""Documents -> tokens -> shards: parallel, bounded in memory, and continuable after any interruption.

    files ──plan──▶ units ──read──▶ pieces of text ──batches──▶ pool of tokenisers ──in order──▶ shards, a note per unit
                                                                                           all notes ──▶ manifest

A *unit* is a stretch of the input (row groups of parquet, bytes of text) that becomes one shard of each split. The
shard appears by a rename, then a note about it (`units/000012.json`); `manifest.json` is written last, from the notes
alone. So an interruption costs only the unfinished units, and a run that was killed and started again, on one machine
or on several that share the units, makes the same bytes. With a finished manifest another run does nothing.

Memory holds only a few batches: a unit stops reading while its oldest batches wait to be written. This module does not
know where the text comes from (`text`, `python_docs` and the commands do), nor what is trained on it.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from gpt2repro.data import shards
from gpt2repro.data.decontamination import Decontamination, merged
from gpt2repro.data.text import BYTES_PER_TOKEN, Piece
from gpt2repro.data.tokenization import Encoder, UnknownCharacter, load_tokenizer
from gpt2repro.files import name_aside, read_json_if_whole, write_json
from gpt2repro.options import InputError

PLAN = "plan.json"
UNITS = "units"
# Shards, and what a killed run was writing.
SHARDS = re.compile(
    rf"(train|val)_\d{{6}}\.bin(\.tmp-.+)?|({PLAN}|{shards.MANIFEST}|{shards.TOKENIZER}|README\.md)\.tmp-.+"
)

# One batch is one message to a worker: so large that the 0.3 ms of a message do not count, so small that there are
# enough batches for many workers.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 2**20
# Reads of several units overlap: while one waits for the network or the disk, the tokenisers work for the others.
UNITS_AT_ONCE = 4
SECONDS_BETWEEN_LINES = 30  # of progress, where no terminal shows a bar
BATCHES_AHEAD = 8  # of each unit, at least: they are read while the workers start
# For less text a process pool costs more time than it saves (each process takes about a second to start).
PROCESSES_FROM_BYTES = 30_000_000


def prepare(
    out: str | Path,
    tokenizer,
    units: list[dict],
    read: Callable[[dict], Iterable[Iterable[Piece]]],
    *,
    source: dict,
    settings: dict,
    val_fraction: float = 0.0,
    workers: int | None = None,
    encoder: Encoder | None = None,
    token_limit: int | None = None,
    node: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    describe_val: Callable[[], dict] = dict,
    decontamination: Decontamination | None = None,
    place: Callable[[dict], str] = lambda unit: "the text",
    show_progress: bool = True,
) -> shards.Manifest | None:
    """Turn `units` into a data set in `out`. Returns its manifest, or None while units of other nodes are missing.

    units: JSON objects with "bytes" (about how much text) and "split" ("train", "val", or None: by document);
        `read(unit)` gives its documents, each as pieces of text. `source` and `settings` (JSON) name the data set: a
        directory that was begun with others is refused. `describe_val()` adds keys to the manifest's val split;
        `place(unit)` names the place of its text in a message.
    decontamination: compares the documents of the train split; val stays as it is, so its losses stay comparable.
    val_fraction: of the documents of a unit with split None, chosen by a hash of their text.
    encoder: the tokenizer's bulk form, if it is at hand or of another kind than the default.
    token_limit: the data set ends with the unit that reaches it.
    node: (index, number of nodes); this process does the units with `unit % number == index`.

    Raises: InputError for another data set in `out`, text that can't be read, or no text at all.
    """
    out, encoder = Path(out), encoder or Encoder(tokenizer)
    identity = {
        "format": shards.FORMAT,
        "version": shards.VERSION,
        "dtype": str(encoder.dtype),
        "tokenizer": {
            "kind": encoder.kind, "vocab_size": encoder.vocab_size, "eot_id": encoder.eot_id, "sha256": encoder.sha256
        },
        "source": source,
        "settings": {**settings, "val_fraction": val_fraction, "token_limit": token_limit},
    }  # fmt: skip
    if decontamination is not None:
        identity["settings"] |= decontamination.settings
    claim(out, identity, units, tokenizer, overwrite=overwrite)
    notes = {index: note for index in range(len(units)) if (note := _read_note(out, index))}
    if (out / shards.MANIFEST).exists() and len(notes) >= len(_kept(notes, token_limit, len(units)) or units):
        print(f"{out} is already prepared; nothing to do")
        return shards.load_manifest(out)
    mine = [index for index in range(len(units)) if index % node[1] == node[0] and index not in notes]
    if notes:
        print(f"{out}: {len(notes)} of {len(units)} units are finished, continuing with the others")
    work = _Work(out, units, read, encoder, val_fraction, token_limit, notes, decontamination, place, show_progress)
    work.run(mine, workers or os.cpu_count() or 1)
    notes = {index: note for index in range(len(units)) if (note := _read_note(out, index))}  # and the other nodes'
    if (kept := _kept(notes, token_limit, len(units))) is None:
        print(f"{out}: {len(notes)} of {len(units)} units are finished; the other nodes' are still to come")
        return None
    return _finish(out, identity, [notes[index] for index in kept], describe_val, decontamination)


def claim(out: Path, identity: dict, units: list[dict], tokenizer, *, overwrite: bool) -> None:
    """Make `out` the directory of this data set. Raises: InputError if it is that of another, or holds other files."""
    check_place(out)
    plan = {**identity, "units": units}
    if overwrite and (out / PLAN).exists():
        _remove_dataset(out)
    if (found := read_json_if_whole(out / PLAN)) is not None:
        if different := [key for key in plan if json.loads(json.dumps(plan[key])) != found.get(key)]:
            raise InputError(
                f"{out} holds another data set (it differs in {_differences(plan, found, different)}); "
                "choose another --out, or --overwrite to replace it"
            )
        return
    # A run killed before its plan was written leaves these behind.
    begun = re.compile(rf"{UNITS}|{shards.TOKENIZER}|({PLAN}|{shards.TOKENIZER})\.tmp-.*")
    if strangers := sorted(path.name for path in out.glob("*") if not begun.fullmatch(path.name)):
        raise InputError(
            f"{out} is not empty and was not made by this command (it holds {', '.join(strangers[:3])}); "
            "choose another --out"
        )
    (out / UNITS).mkdir(parents=True, exist_ok=True)
    temporary = name_aside(out / shards.TOKENIZER)
    temporary.mkdir()
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(out / shards.TOKENIZER, ignore_errors=True)
    try:
        temporary.rename(out / shards.TOKENIZER)
    except OSError:  # another node was quicker
        shutil.rmtree(temporary)
    write_json(out / PLAN, plan)


def check_place(out: Path) -> None:
    """Raises: InputError, before any work, if `out` cannot become a directory to write to."""
    try:
        place = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    if not place.is_dir():
        raise InputError(f"{place} is a file; --out names a directory")
    if not os.access(place, os.W_OK):
        raise InputError(f"nothing can be written to {place}; choose another --out")


def tokenizer_of_plan(out: str | Path, source: dict, settings: dict):
    """The tokenizer of a data set begun in `out` from the same source with the same settings, else None.

    With it a continued run does not train its tokenizer again.
    """
    plan = read_json_if_whole(Path(out) / PLAN)
    begun = (plan or {}).get("settings")
    if not isinstance(begun, dict) or plan.get("source") != source or not settings.items() <= begun.items():
        return None
    return load_tokenizer(out)


def split_of(text: str, val_fraction: float) -> str:
    """The split of the document that begins with this piece; only the text decides, so copies stay together."""
    return "val" if hash_of(text) < val_fraction * 2**64 else "train"


def hash_of(text: str) -> int:
    """A number below 2^64."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class _Work:
    """The units of this process on their way through the pool."""

    def __init__(
        self, out, units, read, encoder, val_fraction, token_limit, notes, decontamination, place, show_progress
    ):
        self.out, self.units, self.read, self.encoder = out, units, read, encoder
        self.decontamination, self.val_fraction = decontamination, val_fraction
        self.token_limit, self.notes, self.place = token_limit, notes, place
        self.show_progress, self.stop, self.lock = show_progress, threading.Event(), threading.Lock()

    def run(self, indices: list[int], workers: int) -> None:
        if not indices:
            return
        from tqdm import tqdm

        total_bytes = sum(self.units[index]["bytes"] for index in indices)
        tokenise = partial(_tokenise, self.encoder, self.decontamination)
        if total_bytes < PROCESSES_FROM_BYTES:
            self.pool, self.tokenise = ThreadPoolExecutor(workers), tokenise
        else:
            spawn = multiprocessing.get_context("spawn")  # a fork copies the locks of other threads, and may deadlock
            self.pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(tokenise,))
            self.tokenise = _tokenise_in_worker
        self.bytes_left, self.bytes_done = total_bytes, 0
        # Away from a terminal the bar is drawn nowhere and said as a line now and then.
        self.next_line = None if sys.stderr.isatty() else time.monotonic() + SECONDS_BETWEEN_LINES
        self.bar = tqdm(
            total=int(total_bytes / BYTES_PER_TOKEN), unit=" tokens", unit_scale=True, smoothing=0.05,
            desc="tokenising", disable=not self.show_progress, file=self.next_line and io.StringIO(),
        )  # fmt: skip
        self.in_flight = max(BATCHES_AHEAD, 2 * workers // min(UNITS_AT_ONCE, len(indices)) + 1)  # per unit
        with self.bar, self.pool, ThreadPoolExecutor(UNITS_AT_ONCE) as readers:
            try:
                list(readers.map(self._unit, indices))
            except BrokenProcessPool:
                raise InputError(
                    "a tokenising process was killed, most likely for want of memory; run the same command again with "
                    "fewer --workers, finished units are kept"
                ) from None
            finally:
                self.stop.set()

    def _unit(self, index: int) -> None:
        """Read, tokenise and write one unit, then its note."""
        with self.lock:
            done = sum(map(_note_tokens, self.notes.values()))
        if self.stop.is_set() or (self.token_limit is not None and done >= self.token_limit):
            return
        writers: dict[str, shards.ShardWriter] = {}  # per split that has any text
        unfinished = contextlib.ExitStack()  # deletes the shards of a unit that was not finished
        waiting: deque[tuple[str, Future]] = deque()  # the unit's batches in order
        found: list[dict] = []  # by decontamination, in each batch

        def write_oldest():
            split, future = waiting.popleft()
            try:
                tokens, documents, text_bytes, hits = future.result()
            except UnknownCharacter as error:
                raise InputError(f"{self.place(self.units[index])}: {error}") from None
            if hits is not None:
                found.append(hits)
                if not documents:  # all of them were dropped
                    return
            if split not in writers:
                writer = shards.ShardWriter(self.out / f"{split}_{index:06d}.bin", self.encoder.vocab_size)
                writers[split] = unfinished.enter_context(writer)
            writers[split].append(tokens, documents, text_bytes)
            self._show(len(tokens), text_bytes)

        with unfinished:
            for split, texts, ends in self._batches(self.units[index]):
                if self.stop.is_set():
                    return
                waiting.append((split, self.pool.submit(self.tokenise, split, texts, ends)))
                while len(waiting) >= self.in_flight or (waiting and waiting[0][1].done()):
                    write_oldest()
            while waiting:
                if self.stop.is_set():
                    return
                write_oldest()
            records = {split: writers[split].close() for split in shards.SPLITS if split in writers}
        note = {"unit": index, "splits": records}
        if self.decontamination is not None:
            note["found"] = merged(found)
        write_json(self.out / UNITS / f"{index:06d}.json", note)
        with self.lock:
            self.notes[index] = note

    def _batches(self, unit: dict) -> Iterator[tuple[str, list[str], list[bool]]]:
        """(split, texts, whether each ends its document) of a unit; where batches end depends on the text alone."""
        open_batches: dict[str, tuple[list[str], list[bool]]] = {}
        characters = dict.fromkeys(shards.SPLITS, 0)
        for document in self.read(unit):
            split = unit["split"]
            for text, end in document:
                if split is None:  # the first piece decides for its document
                    split = split_of(text, self.val_fraction)
                texts, ends = open_batches.setdefault(split, ([], []))
                texts.append(text)
                ends.append(end)
                characters[split] += len(text)
                full = len(texts) >= BATCH_DOCUMENTS or characters[split] >= BATCH_CHARACTERS
                if full and (end or self.decontamination is None):  # which takes or drops a document as a whole
                    yield split, *open_batches.pop(split)
                    characters[split] = 0
        for split in shards.SPLITS:
            if split in open_batches:
                yield split, *open_batches[split]

    def _show(self, tokens: int, text_bytes: int) -> None:
        with self.lock:
            self.bytes_done += text_bytes
            if self.bytes_done and self.bytes_done < self.bytes_left:  # bytes per token are known now, so not a guess
                self.bar.total = int((self.bar.n + tokens) * self.bytes_left / self.bytes_done)
            self.bar.update(tokens)
            if self.show_progress and self.next_line is not None and time.monotonic() >= self.next_line:
                print(self.bar, file=sys.stderr, flush=True)
                self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES


def _finish(out: Path, identity: dict, notes: list[dict], describe_val, decontamination) -> shards.Manifest:
    """Write the manifest from the notes, and remove the files of other units."""
    splits, report = {}, {}
    if decontamination is not None:
        report = {"decontamination": decontamination.report([note["found"] for note in notes])}
    for split in shards.SPLITS:
        records = [note["splits"][split] for note in notes if split in note["splits"]]
        sums = {key: sum(record[key] for record in records) for key in ("tokens", "documents", "bytes")}
        splits[split] = {**sums, "shards": records}
    if not splits["train"]["bytes"] + splits["val"]["bytes"]:
        raise InputError("the source holds no text: every document is empty" + " or was dropped" * bool(report))
    for split, other in (("train", "val"), ("val", "train")):
        if not splits[split]["bytes"]:
            print(f"warning: the {split} split is empty, all {splits[other]['documents']} documents are in {other}")
    if splits["val"]["tokens"]:
        splits["val"].update(describe_val())
    _sweep(out, {record["file"] for split in splits.values() for record in split["shards"]})
    kept_notes = {f"{note['unit']:06d}.json" for note in notes}
    for path in (out / UNITS).iterdir():
        if path.name not in kept_notes:  # of a unit beyond the limit
            path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another node ended at the same moment and removed our temporary file
        write_json(out / shards.MANIFEST, {**identity, "splits": splits, **report})
    return shards.load_manifest(out)


def _kept(notes: dict[int, dict], token_limit: int | None, units: int) -> list[int] | None:
    """The units of the finished data set: all, or the first ones that reach the limit. None while one is missing."""
    kept, tokens = [], 0
    for index in range(units):
        if token_limit is not None and tokens >= token_limit:
            break
        if index not in notes:
            return None
        kept.append(index)
        tokens += _note_tokens(notes[index])
    return kept


def _note_tokens(note: dict) -> int:
    return sum(record["tokens"] for record in note["splits"].values())


class _UnitRecord(shards.ShardRecord):
    documents: shards.Count
    bytes: shards.Count


class _Note(BaseModel):
    unit: shards.Count
    splits: dict[Literal["train", "val"], _UnitRecord]


def _read_note(out: Path, index: int) -> dict | None:
    """The note of a finished unit whose shards exist in full size; else None, and the unit is done again."""
    try:
        note = read_json_if_whole(out / UNITS / f"{index:06d}.json")
        sizes = {out / record.file: record.tokens for record in _Note.model_validate(note).splits.values()}
        whole = all(path.stat().st_size - shards.HEADER_BYTES in (2 * n, 4 * n) for path, n in sizes.items())
    except (ValidationError, OSError):
        return None
    return note if whole and note["unit"] == index else None


def _differences(plan: dict, found: dict, keys: list[str]) -> str:
    """`tokenizer.kind: char, found gpt2` … for the first few that differ."""
    texts = []
    for key in sorted(keys, key=("settings", "source", "tokenizer", "units", "dtype", "version", "format").index):
        ours, theirs = plan[key], found.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            texts += [f"{key}.{name}: {_short(ours.get(name))}, there {_short(theirs.get(name))}" for name in names]
        else:
            texts.append(key)
    return "; ".join(texts[:2])


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _remove_dataset(out: Path) -> None:
    """Remove what this module writes, and nothing else."""
    for name in (shards.MANIFEST, shards.CHECKED):  # the manifest first: from here on it is no data set
        (out / name).unlink(missing_ok=True)
    for name in (UNITS, shards.TOKENIZER):
        shutil.rmtree(out / name, ignore_errors=True)
    _sweep(out, set())
    (out / PLAN).unlink()


def _sweep(out: Path, kept: set[str]) -> None:
    """Remove the shards that are not `kept`, and what was half-written when a run was killed."""
    for path in out.iterdir():
        if SHARDS.fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _tokenise(encoder, decontamination, split, texts, ends) -> tuple[np.ndarray, int, int, dict | None]:
    """(tokens, documents, size of the text in bytes, what decontamination found) of a batch."""
    found = None
    if decontamination is not None and split == "train":
        texts, ends, found = decontamination.check(texts, ends)
    tokens, text_bytes = encoder.encode_joined(texts, ends)
    return tokens, sum(ends), text_bytes, found


_of_worker: Callable | None = None  # `_tokenise` with what a worker process has


def _tokenise_in_worker(*batch):
    return _of_worker(*batch)


def _start_worker(tokenise: Callable) -> None:
    global _of_worker
    _of_worker = tokenise
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # ends with a killed parent
