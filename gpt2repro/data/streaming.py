"""Text that is tokenised while the model trains: groups of documents -> token cache -> lanes -> batches.

    group          ── the piece of a source that is read at once (text_sources.py); a worker thread tokenises it into
                      one shard of the cache, every document followed by <|endoftext|>
    unit u         ── epoch u // U: the groups in an order keyed by (seed, epoch), each cut into P parts, U = P groups;
                      the rows of a group are shuffled by (seed, epoch, group) before it is cut
    lane v of V    ── units v, v + V, v + 2V, … : an endless stream of tokens, read in windows of T and one more
    global batch b ── positions [bS, (b + 1) S); position k is the next window of lane k mod V; rank r has S / W rows

The state is, for each lane, the unit, document and token where its next window begins. It does not say where the
tokens came from: read from the source, from the cache or from another machine's cache they are the same.

**What is guaranteed.** For parquet, jsonl, txt and md, on the Hub or on local disk: a resumed run sees exactly the
batches that the uninterrupted one would have seen, for any number of processes that divides the batch, in any epoch;
each rank reads only the groups its lanes touch, and a resumed one only those it needs from then on. For every other
format, which `datasets` can only iterate: the same batches just as exactly, but a group is a whole file, so the first
batch waits until V / P files are tokenised. Every document that is trained on comes once per epoch; as documents differ
in length, lanes do not pass from one epoch to the next at the same position. The source must be the same: a Hub
dataset is pinned to its commit, a changed local file has another identity. What is refused: a batch that does not
divide among the ranks, lanes that are not a multiple of the batch (neighbouring windows would meet in one batch), a
source with fewer documents than lanes, a state of another source.

**The cache.** Groups that passed once stay as token shards under `cache_dir`: a second epoch, a restart or an outage
of the Hub reads them, not the source. `cache_gib` bounds it. Faults of the network (429, 5xx, time-outs, dropped
connections, truncated files) are reported and retried with back-off and jitter; meanwhile training goes on as far as
the groups that were read ahead reach, one unit per lane.

Legend: T seq_len, S sequences per batch, V lanes, P parts, W world. Knows no model, no optimizer, no Accelerator.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from gpt2repro.data import hub_text
from gpt2repro.data.ordering import Permutation, derive_seed
from gpt2repro.data.shards import HEADER_BYTES, ShardWriter, TokenSplit
from gpt2repro.data.text_sources import TextSource, local_files, resolve
from gpt2repro.data.tokenization import Encoder, well_formed
from gpt2repro.files import write_json
from gpt2repro.options import InputError

STREAM_ORDER_VERSION = 1  # raise it when the same (source, seed, state) would give another window
FEWEST_LANES = 64
FEWEST_PARTS = 8  # a group feeds at least 8 lanes: with V = 512, only 64 groups are tokenised before the first batch
GROUP_ORDER, ROW_ORDER = 1, 2  # the two uses of the seed

# A source with at least 20 groups holds out 1 % of them, at most 10 (about 10 million tokens of FineWeb, as much as
# llm.c validates on); a smaller one holds out every 20th document, so it is read once before the first batch.
GROUPS_TO_HOLD_OUT_WHOLE, MOST_HELD_OUT, HELD_OUT_ROWS = 20, 10, 20

DAY_SECONDS = 86400
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error

Result = TypeVar("Result")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class StreamSource:
    """Batches from text that is tokenised on the way; the module says how, and what is guaranteed.

    `report` gets a sentence about every fault and wait. `workers` threads tokenise, each about 3 million tokens per
    second with GPT-2's vocabulary (tiktoken releases the interpreter's lock).
    """

    tokens_per_epoch = None  # known only when everything has been read
    directory = None  # no shards of its own

    def __init__(
        self,
        source: TextSource,
        *,
        tokenizer,
        seq_len: int,
        seed: int,
        lanes: int,
        cache_dir: Path,
        cache_gib: float | None = None,
        workers: int = 2,
        report: Callable[[str], None] = say,
    ):
        self.source, self.seq_len, self.seed, self.lanes = source, seq_len, seed, lanes
        self.encoder = Encoder(tokenizer)
        self.vocab_size = self.encoder.vocab_size
        self.workers, self.report = workers, report
        groups = len(source.groups)
        held_out = min(MOST_HELD_OUT, math.ceil(groups / 100)) if groups >= GROUPS_TO_HOLD_OUT_WHOLE else 0
        self._held_out_groups = sorted(Permutation(groups, seed=0)(np.arange(held_out)).tolist())  # for every seed
        self._train_groups = [g for g in range(groups) if g not in set(self._held_out_groups)]
        self.parts = max(FEWEST_PARTS, math.ceil(lanes / len(self._train_groups)))
        self.units = len(self._train_groups) * self.parts
        self.unit_location = functools.lru_cache(maxsize=1 << 14)(self._unit_location)
        self.cache = TokenCache(source, self.encoder, Path(cache_dir), limit_gib=cache_gib, report=report)
        self.validation = self._open_validation()

    def identity(self) -> dict:
        """What must be the same on resume, because another value would mean other batches."""
        return {
            "kind": "stream",
            "order": STREAM_ORDER_VERSION,
            "source": self.source.name,
            "config": self.source.config,
            "revision": self.source.revision,
            "sha256": self.source.sha256,
            "tokenizer": self.encoder.sha256,
            "lanes": self.lanes,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }

    def initial_state(self) -> dict:
        return {"position": 0, "skipped": [], "lanes": {}}

    def check_batch(self, sequences: int, world: int = 1) -> None:
        """Raises InputError where a batch does not divide among the ranks, or the lanes are no multiple of it."""
        if sequences % world:
            raise InputError(f"a batch of {sequences} sequences does not divide among {world} processes")
        if self.lanes % sequences:
            raise InputError(
                f"{self.lanes} lanes are not a multiple of the batch's {sequences} sequences; "
                f"set --stream_lanes {default_lanes(sequences)}"
            )

    def batches(
        self, state: dict, *, rank: int, world: int, sequences: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
        """Endless (x, y, state_after): this rank's rows of each global batch, int64 (sequences / world, T) each.

        `state` must hold all lanes, `state_after` holds those of this rank: `merge_states` joins the ranks' states
        into one that any world size continues from. A batch that touches a skipped range is left out whole.

        Raises InputError as `check_batch` does, for text that cannot be read, and when the source stays unreachable.
        """
        self.check_batch(sequences, world)
        places = state["lanes"].values()
        whole = state["position"] == 0 or len(places) == self.lanes
        if state["position"] % sequences or not whole or any(len(place) != 3 or min(place) < 0 for place in places):
            raise InputError(
                f"the data's state (position {state['position']}, {len(state['lanes'])} lanes) does not belong to "
                f"batches of {sequences} sequences from {self.lanes} lanes; resume with the run's own settings"
            )
        rows, stop = sequences // world, threading.Event()
        return StreamBatches(self._batches(state, range(rank * rows, (rank + 1) * rows), sequences, stop), stop)

    def _batches(self, state: dict, rows: range, sequences: int, stop: threading.Event):
        mine = [start + row for start in range(0, self.lanes, sequences) for row in rows]
        lanes = {lane: tuple(state["lanes"].get(str(lane), (lane, 0, 0))) for lane in mine}
        position, skipped = state["position"], state["skipped"]
        with _Units(self, open_units=2 * len(mine), stop=stop) as units:
            units.expect([unit for unit, _, _ in lanes.values()])
            while True:
                tokens = np.empty((len(rows), self.seq_len + 1), dtype=np.int64)
                for row, lane in zip(tokens, ((position + r) % self.lanes for r in rows), strict=True):
                    lanes[lane] = self._fill(row, lanes[lane], units)
                left_out = any(a < position + sequences and position < b for a, b in skipped)
                position += sequences
                if not left_out:
                    after = {str(lane): list(where) for lane, where in lanes.items()}
                    state_after = {"position": position, "skipped": skipped, "lanes": after}
                    yield torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()), state_after

    def _fill(self, row: np.ndarray, where: tuple[int, int, int], units: _Units) -> tuple[int, int, int]:
        """Fills row (T + 1) from (unit, document, token) on; returns where its last token is: the next one's first."""
        unit, document, token = where
        filled = empty_units = 0
        while True:
            tokens, spans = units[unit]
            empty_units = 0 if len(spans) else empty_units + 1
            for index in range(document, len(spans)):
                start, stop = spans[index]
                piece = tokens[start + token : min(stop, start + token + len(row) - filled)]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                if filled == len(row):
                    return unit, index, token + len(piece) - 1
                token = 0
            if empty_units > self.units:
                raise InputError(f"{self.source.name} holds no document to train on")
            unit, document, token = unit + self.lanes, 0, 0

    def _unit_location(self, unit: int) -> tuple[int, int, int]:
        """(epoch, group, part) of a unit; P neighbouring units, and so lanes, share a group.

        The parts rotate, or a lane would have the same one of every group, and none where a group has few documents.
        """
        epoch, index = divmod(unit, self.units)
        place, part = divmod(index, self.parts)
        order = Permutation(len(self._train_groups), derive_seed(self.seed, GROUP_ORDER, epoch))
        return epoch, self._train_groups[order(place)], (part + place + epoch) % self.parts

    def unit_documents(self, unit: int, ends: np.ndarray) -> np.ndarray:
        """The documents of a unit, shuffled: (start, stop) in its group's tokens, whose documents end at `ends`."""
        epoch, group, part = self.unit_location(unit)
        spans = np.stack([np.append(0, ends[:-1])[: len(ends)], ends], axis=1)
        if not self._held_out_groups:
            spans = spans[~_held_out(np.arange(len(spans)))]
        first, last = part * len(spans) // self.parts, (part + 1) * len(spans) // self.parts
        if first == last:
            return spans[:0]
        return spans[Permutation(len(spans), derive_seed(self.seed, ROW_ORDER, epoch, group))(np.arange(first, last))]

    def _open_validation(self) -> TokenSplit | None:
        """The documents that are never trained on, as a split; None where the source is too small to spare any."""
        path = self.cache.directory / "validation.bin"
        facts = path.with_suffix(".json")
        if not (facts.exists() and path.exists()):
            shard = self.cache.write_shard(path, self._held_out_documents)
            write_json(facts, {**shard, "documents_seen": self._documents_seen})
        found = json.loads(facts.read_text(encoding="utf-8"))
        if not self._held_out_groups and found["documents_seen"] - found["documents"] < self.lanes:
            raise InputError(
                f"{self.source.name} has {found['documents_seen']} documents, too few for {self.lanes} lanes; "
                "lower --batch_tokens, or prepare the text as shards with `gpt2repro prepare-text`"
            )
        if found["tokens"] <= self.seq_len:
            return None
        return TokenSplit(
            "val", [path], [found["tokens"]], self.encoder.dtype, HEADER_BYTES,
            vocab_size=self.encoder.vocab_size, eot_id=self.encoder.eot_id, sha256=found["sha256"],
            documents=found["documents"], text_bytes=found["bytes"],
        )  # fmt: skip

    def _held_out_documents(self) -> Iterator[list[str]]:
        self._documents_seen = 0
        for group in self._held_out_groups or range(len(self.source.groups)):
            row = 0
            for some in self.source.read(group):
                rows = range(row, row := row + len(some))
                self._documents_seen += len(some)
                yield [text for row, text in zip(rows, some, strict=True) if self._held_out_groups or _held_out(row)]


def _held_out(row):
    """Whether a small source, which holds out no whole groups, keeps this row (or these) of a group for validation."""
    return row % HELD_OUT_ROWS == HELD_OUT_ROWS - 1


class StreamBatches:
    """The iterator that `StreamSource.batches` gives; `cancel` ends, from any thread, its wait for the source."""

    def __init__(self, generator: Iterator, stop: threading.Event):
        self._generator, self._stop = generator, stop

    def __iter__(self):
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, dict]:
        return next(self._generator)

    def cancel(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._generator.close()


class _Units:
    """The tokens of units, tokenised ahead by worker threads; those used last stay open."""

    def __init__(self, stream: StreamSource, *, open_units: int, stop: threading.Event):
        self._stream, self._most, self._stop = stream, open_units, stop
        self._units: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()  # what [unit] gives
        self._groups: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()  # tokens, ends of the documents
        self._pending: dict[int, Future] = {}
        self._pool = ThreadPoolExecutor(stream.workers, thread_name_prefix="tokenise")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def expect(self, units: list[int]) -> None:
        """Start with these units, one per lane, and then with each lane's next one."""
        for unit in [*units, *(unit + self._stream.lanes for unit in units)]:
            self._request(self._stream.unit_location(unit)[1])

    def __getitem__(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of the unit's group, (start, stop) of the unit's documents in reading order)."""
        if unit not in self._units:
            self._request(self._stream.unit_location(unit + self._stream.lanes)[1])
            tokens, ends = self._group(self._stream.unit_location(unit)[1])
            self._units[unit] = tokens, self._stream.unit_documents(unit, ends)
            if len(self._units) > self._most:
                self._units.popitem(last=False)
        self._units.move_to_end(unit)
        return self._units[unit]

    def _group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        if group not in self._groups:
            self._request(group)
            self._pending.pop(group).result()
            self._groups[group] = self._stream.cache.read(group, self._stop)
            if len(self._groups) > self._most:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _request(self, group: int) -> None:
        if group not in self._groups and group not in self._pending:
            self._pending[group] = self._pool.submit(self._stream.cache.fetch, group, self._stop)


class TokenCache:
    """Groups of a source as token shards on disk: `group_000007.bin`, every document followed by <|endoftext|>.

    A file appears whole or not at all, so ranks and runs may share a cache; what two of them write is the same.
    """

    def __init__(self, source: TextSource, encoder: Encoder, root: Path, *, limit_gib: float | None, report):
        self.source, self.encoder, self.report = source, encoder, report
        self.limit_bytes = None if limit_gib is None else limit_gib * 2**30
        key = hashlib.sha256(f"{source.sha256} {encoder.sha256}".encode()).hexdigest()[:16]
        self.directory = root / key
        self.directory.mkdir(parents=True, exist_ok=True)
        for left_behind in self.directory.glob("*.tmp-*"):  # by a process that was killed, unless it is being written
            with contextlib.suppress(OSError):
                if left_behind.stat().st_mtime < time.time() - DAY_SECONDS:
                    left_behind.unlink()

    def path(self, group: int) -> Path:
        return self.directory / f"group_{group:06d}.bin"

    def fetch(self, group: int, stop: threading.Event) -> None:
        """Tokenise the group unless it is there already."""
        if not self.path(group).exists():
            self.write_shard(self.path(group), lambda: self.source.read(group), stop)
            self._make_room(self.path(group))

    def read(self, group: int, stop: threading.Event) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, the end of each document) of a group that was fetched; a damaged file is made again."""
        while True:
            try:
                header = np.fromfile(self.path(group), "<i4", 256)
                count = (self.path(group).stat().st_size - HEADER_BYTES) // self.encoder.dtype.itemsize
                if len(header) == 256 and header[2] == count:
                    tokens = np.empty(0, self.encoder.dtype)
                    if count:  # an empty file cannot be mapped
                        tokens = np.memmap(self.path(group), self.encoder.dtype, "r", offset=HEADER_BYTES)
                    if tokens.max(initial=0) < self.encoder.vocab_size:
                        return tokens, np.flatnonzero(tokens == self.encoder.eot_id) + 1
                self.report(f"{self.path(group)} is damaged; its text is tokenised again")
                self.path(group).unlink()
            except FileNotFoundError:  # made room for another group, perhaps by another process
                self.fetch(group, stop)

    def write_shard(
        self, path: Path, documents: Callable[[], Iterator[list[str]]], stop: threading.Event | None = None
    ) -> dict:
        """Tokenise documents into a shard, again from the start after a fault. Returns its size and sha256."""
        stop = stop or threading.Event()

        def write() -> dict:
            writer, count, text_bytes = ShardWriter(path, self.encoder.vocab_size), 0, 0
            try:
                for some in documents():
                    if _given_up(stop):
                        raise CancelledError
                    texts = [well_formed(text) for text in some]
                    writer.append(self.encoder.encode_joined(texts, [True] * len(texts)))
                    count, text_bytes = count + len(texts), text_bytes + sum(len(text.encode()) for text in texts)
            except BaseException:
                writer.abandon()
                raise
            return {**writer.close(), "documents": count, "bytes": text_bytes}

        what = f"reading {self.source.name}"
        return retried(write, what=what, report=self.report, stop=stop, remote=self.source.remote)

    def _make_room(self, newest: Path) -> None:
        if self.limit_bytes is None:
            return
        files = {path: path.stat() for path in self.directory.glob("group_*.bin") if path != newest}
        total = newest.stat().st_size + sum(facts.st_size for facts in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if total <= self.limit_bytes:
                break
            with contextlib.suppress(PermissionError):  # Windows keeps what is in use
                path.unlink(missing_ok=True)
                total -= files[path].st_size


def retried(
    action: Callable[[], Result], *, what: str, report: Callable[[str], None], stop: threading.Event, remote: bool
) -> Result:
    """The result of `action`, tried again after faults of the network that may pass.

    Raises InputError for what will not pass, and when it has not passed after `hub_text.RETRIES` pauses.
    """
    for attempt in range(hub_text.RETRIES + 1):
        try:
            return action()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise InputError(
                    f"{what}: no space is left for the token cache; free some or set --cache_gib"
                ) from error
            if not is_fault(error):
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            if not (remote and hub_text.may_pass(error)):
                raise InputError(f"{what}: {reason}") from error
            if attempt == hub_text.RETRIES:
                raise InputError(
                    f"{what} failed {hub_text.RETRIES + 1} times, at last with {reason}. "
                    "The same command continues from the last checkpoint when the source is back"
                ) from error
            pause = hub_text.seconds_before_retry(error, attempt)
            report(f"{what}: {reason}; trying again in {pause:.1f} s ({attempt + 1} of {hub_text.RETRIES})")
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline:
                if _given_up(stop):
                    raise CancelledError from error
                stop.wait(min(0.2, max(0.0, deadline - time.monotonic())))
    raise AssertionError("the last attempt returns or raises")


def is_fault(error: Exception) -> bool:
    """True for what goes wrong outside this program: the network, a file, its bytes."""
    outside = (
        "httpx",
        "httpcore",
        "aiohttp",
        "requests",
        "urllib3",
        "fsspec",
        "huggingface_hub",
        "datasets",
        "pyarrow",
    )
    return isinstance(error, (OSError, EOFError, UnicodeDecodeError)) or any(
        kind.__module__.startswith(outside) for kind in type(error).__mro__
    )


def _given_up(stop: threading.Event) -> bool:
    """True when nobody waits for the result any more; the interpreter waits for worker threads before it ends."""
    return stop.is_set() or not threading.main_thread().is_alive()


def default_lanes(sequences: int) -> int:
    """The smallest multiple of the batch that is at least 64."""
    return sequences * math.ceil(FEWEST_LANES / sequences)


def open_stream(
    spec: str,
    *,
    tokenizer,
    seq_len: int,
    seed: int,
    sequences: int,
    text_column: str = "text",
    lanes: int | None = None,
    cache_dir: Path | None = None,
    cache_gib: float | None = None,
    workers: int = 2,
    report: Callable[[str], None] = say,
) -> StreamSource:
    """The stream of `ID[:config][@revision]`, a path, a directory or a glob.

    The groups of a Hub dataset are remembered beside the cache: while the Hub is out of reach, the stream of its last
    known commit is opened and reads what is cached.
    """
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = Path(HF_HOME) / "gpt2repro" / "streams"
    source = _resolve_or_remember(spec, text_column, Path(cache_dir), report)
    stream = StreamSource(
        source,
        tokenizer=tokenizer,
        seq_len=seq_len,
        seed=seed,
        lanes=default_lanes(sequences) if lanes is None else lanes,
        cache_dir=cache_dir,
        cache_gib=cache_gib,
        workers=workers,
        report=report,
    )
    stream.check_batch(sequences)
    if source.kind == "datasets":
        report(
            f"{spec} is read as {len(source.groups)} whole files: those that the first batch needs are tokenised first"
        )
    return stream


def _resolve_or_remember(spec: str, text_column: str, cache_dir: Path, report: Callable[[str], None]) -> TextSource:
    if local_files(spec):
        return retried(
            lambda: resolve(spec, text_column=text_column),
            what=f"reading {spec}", report=report, stop=threading.Event(), remote=False,
        )  # fmt: skip
    remembered = cache_dir / f"source_{hashlib.sha256(f'{spec} {text_column}'.encode()).hexdigest()[:16]}.json"

    def resolve_now() -> TextSource:
        try:
            return resolve(spec, text_column=text_column)
        except Exception as error:
            if not (is_fault(error) and hub_text.may_pass(error) and remembered.exists()):
                raise
            source = TextSource(**json.loads(remembered.read_text(encoding="utf-8")))
            report(f"the Hub is out of reach ({type(error).__name__}); using {source.name} as of {source.revision}")
            return source

    source = retried(resolve_now, what=f"looking up {spec}", report=report, stop=threading.Event(), remote=True)
    cache_dir.mkdir(parents=True, exist_ok=True)
    write_json(remembered, asdict(source))
    return source
