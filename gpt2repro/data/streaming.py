"""Text that is tokenised while the model trains: groups of documents -> token cache -> lanes -> batches.

    group          ── the piece of a source that is read in one go (text.py); a worker thread tokenises it into one
                      shard of the cache (token_cache.py), every document followed by <|endoftext|>
    unit u         ── epoch u // U: the groups in an order keyed by (seed, epoch), each cut into P parts, U = P groups;
                      the rows of a group are shuffled by (seed, epoch, group) before it is cut
    lane v of V    ── units v, v + V, v + 2V, … : an endless stream of tokens, read in windows of T and one more
    global batch b ── positions [bS, (b + 1) S); position k is the next window of lane k mod V; rank r has S / W rows

The state holds, for each lane, the unit, document and token where the lane's next window begins. The tokens are the
same whether they are read from the source, from the cache or from another machine's cache.

**What is guaranteed.** A resumed run sees exactly the batches of the uninterrupted run, in any epoch and for any number
of processes that divides the batch. Of parquet, jsonl, txt and md, on the Hub or on local disk, each rank reads only
the groups that its lanes touch, and after a resume only the groups that are still needed. Other formats can only be
iterated (by `datasets`): a group is a whole file, so the first batch waits until V / P files are tokenised. Every
training document comes once per epoch; as documents differ in length, lanes change to the next epoch at different
positions. The source must stay the same: a Hub dataset is pinned to its commit, and a changed local file has another
identity. Refused are: a batch that does not divide among the ranks, lanes that are not a multiple of the batch
(neighbouring windows would meet in one batch), a source with fewer documents than lanes, a state of another source.

**The cache.** Every tokenised group stays as a token shard under `cache_dir`; a second epoch, a restart or an outage of
the Hub reads the shards instead of the source. `cache_gib` bounds the cache. Faults of the network (429, 5xx,
time-outs, dropped connections, truncated files) are reported and retried with back-off and jitter; meanwhile training
continues with the groups that were read ahead, one unit per lane.

Legend: T seq_len, S sequences per batch, V lanes, P parts, W world. Knows no model, no optimizer, no Accelerator.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from gpt2repro.data import text, text_io
from gpt2repro.data.ordering import Permutation, derive_seed
from gpt2repro.data.shards import HEADER_BYTES, TokenSplit
from gpt2repro.data.token_cache import TokenCache, make_directory
from gpt2repro.data.tokenization import Encoder
from gpt2repro.files import read_json_if_whole, write_json
from gpt2repro.options import InputError

STREAM_ORDER_VERSION = 1  # raise it when the same (source, seed, state) would give another window
FEWEST_LANES = 64
SECONDS_TO_END = 1.0  # how long threads are waited for that may hang in a request
FEWEST_PARTS = 8  # a group feeds at least 8 lanes: with V = 512, only 64 groups are tokenised before the first batch
GROUP_ORDER, ROW_ORDER = 1, 2  # the two uses of the seed

# A source with at least 20 groups holds out 1 % of them, at most 10 (about 10 million tokens of FineWeb, as many as
# llm.c validates on). A smaller source holds out every 20th document, so all of it is read before the first batch.
GROUPS_TO_HOLD_OUT_WHOLE, MOST_HELD_OUT, HELD_OUT_ROWS = 20, 10, 20


class StreamSource:
    """Batches from text that is tokenised while the model trains; the module's docstring says how.

    `report` is called with a sentence about every fault and wait. `workers` threads tokenise, each about 3 million
    tokens per second with GPT-2's vocabulary (tiktoken releases the interpreter's lock).
    """

    tokens_per_epoch = None  # unknown until everything has been read
    directory = manifest = None  # no shards of its own

    def __init__(
        self,
        source: text.TextSource,
        *,
        tokenizer,
        seq_len: int,
        seed: int,
        lanes: int,
        cache_dir: Path,
        cache_gib: float | None = None,
        workers: int = 2,
        report: Callable[[str], None] = text_io.say,
    ):
        self.source, self.seq_len, self.seed, self.lanes = source, seq_len, seed, lanes
        self.sources = {}  # no recipe
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer, count_unknown=True)
        self.vocab_size = self.encoder.vocab_size
        self.workers = workers
        groups = len(source.groups)
        held_out = min(MOST_HELD_OUT, math.ceil(groups / 100)) if groups >= GROUPS_TO_HOLD_OUT_WHOLE else 0
        self._held_out_groups = sorted(Permutation(groups, seed=0)(np.arange(held_out)).tolist())  # for every seed
        self._train_groups = [g for g in range(groups) if g not in set(self._held_out_groups)]
        self.parts = max(FEWEST_PARTS, math.ceil(lanes / len(self._train_groups)))
        self.units = len(self._train_groups) * self.parts
        self.unit_location = functools.lru_cache(maxsize=1 << 14)(self._unit_location)
        document_bytes = text.TEXT_DOCUMENT_BYTES
        reading = text.Reading(source.text_column, strict=False, document_bytes=document_bytes, report=report)
        self.cache = TokenCache(source, self.encoder, reading, Path(cache_dir), cache_gib)
        self.validation = self._open_validation()

    def identity(self) -> dict:
        """What must stay the same on resume: another value would give other batches."""
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

    def digests(self) -> dict[str, str]:
        """Empty: `identity()` names the content completely."""
        return {}

    def check_digests(self, saved: dict[str, str]) -> None:
        """Nothing to compare."""

    def initial_state(self) -> dict:
        return {"position": 0, "skipped": [], "lanes": {}}

    def check_batch(self, sequences: int, world: int = 1) -> None:
        """Raises: InputError if a batch does not divide among the ranks, or the lanes are no multiple of the batch."""
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

        `state` must hold all lanes; `state_after` holds the lanes of this rank. `merge_states` joins the states of all
        ranks into one from which any world size continues. A batch that touches a skipped range is left out completely.

        Raises: InputError as in `check_batch`, for text that cannot be read, and if the source stays out of reach.
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
                # A skipped batch is read as well: only its tokens tell where the next one begins.
                left_out = any(a < position + sequences and position < b for a, b in skipped)
                position += sequences
                if not left_out:
                    after = {str(lane): list(cursor) for lane, cursor in lanes.items()}
                    state_after = {"position": position, "skipped": skipped, "lanes": after}
                    yield torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()), state_after

    def _fill(self, row: np.ndarray, cursor: tuple[int, int, int], units: _Units) -> tuple[int, int, int]:
        """Fill `row` (T + 1) from the cursor (unit, document, token) on. Returns the cursor of the row's last token.

        The lane's next row begins with that token.
        """
        unit, document, token = cursor
        filled = empty_units = 0
        while True:
            tokens, spans = units.unit(unit)
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
        """(epoch, group, part) of a unit; P neighbouring units, and so P neighbouring lanes, share a group.

        The parts rotate. Otherwise a lane would read the same part of every group, which is empty in small groups.
        """
        epoch, index = divmod(unit, self.units)
        place, part = divmod(index, self.parts)
        order = Permutation(len(self._train_groups), derive_seed(self.seed, GROUP_ORDER, epoch))
        return epoch, self._train_groups[order(place)], (part + place + epoch) % self.parts

    def unit_documents(self, unit: int, ends: np.ndarray) -> np.ndarray:
        """(start, stop) of each document of a unit, shuffled; `ends` are the ends of all documents of its group."""
        epoch, group, part = self.unit_location(unit)
        spans = np.stack([np.append(0, ends[:-1])[: len(ends)], ends], axis=1)
        if not self._held_out_groups:
            spans = spans[~_held_out(np.arange(len(spans)))]
        first, last = part * len(spans) // self.parts, (part + 1) * len(spans) // self.parts
        return spans[Permutation(len(spans), derive_seed(self.seed, ROW_ORDER, epoch, group))(np.arange(first, last))]

    def _open_validation(self) -> TokenSplit | None:
        """The held-out documents as a split, or None if they are shorter than one window."""
        path = self.cache.directory / "validation.bin"
        found = read_json_if_whole(path.with_suffix(".json"))
        if found is None or not path.exists():
            self._documents_seen = 0
            shard = self.cache.write_shard(path, self._held_out_documents())
            found = {**shard, "documents_seen": self._documents_seen}
            write_json(path.with_suffix(".json"), found)
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

    def _held_out_documents(self) -> Iterator[str]:
        for group in self._held_out_groups or range(len(self.source.groups)):
            for row, document in enumerate(self.source.read(group, self.cache.reading)):
                self._documents_seen += 1
                if self._held_out_groups or _held_out(row):
                    yield document


def _held_out(row):
    """Whether a small source holds out this row of a group; `row` is an int or an array of ints."""
    return row % HELD_OUT_ROWS == HELD_OUT_ROWS - 1


class StreamBatches(Iterator):
    """The iterator that `StreamSource.batches` returns. Any thread may call `cancel` to end a wait for the source."""

    def __init__(self, generator: Iterator, stop: threading.Event):
        self._generator, self._stop = generator, stop

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, dict]:
        return next(self._generator)

    def cancel(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._generator.close()


class _Units:
    """The tokens of units, tokenised ahead by worker threads; the units and groups used last stay open."""

    def __init__(self, stream: StreamSource, *, open_units: int, stop: threading.Event):
        self._stream, self._most, self._stop = stream, open_units, stop
        self.unit = functools.lru_cache(maxsize=open_units)(self._unit)
        self._groups: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()  # tokens, ends of the documents
        self._pending: dict[int, Future] = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()  # of (future, group), or None: no more
        # Daemons, unlike an executor's: one may hang in a request that nobody answers while the program ends.
        self._threads = [
            threading.Thread(target=self._work, name="tokenise", daemon=True) for _ in range(stream.workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop.set()
        for future in self._pending.values():
            future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(SECONDS_TO_END / len(self._threads))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, group = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._stream.cache.fetch(group, self._stop))
                except BaseException as error:  # is raised where the result is asked for
                    future.set_exception(error)

    def expect(self, units: list[int]) -> None:
        """Request the groups of these units, one per lane, and then those of each lane's next unit."""
        for unit in [*units, *(unit + self._stream.lanes for unit in units)]:
            self._request(self._stream.unit_location(unit)[1])

    def _unit(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of the unit's group, (start, stop) of the unit's documents in reading order)."""
        self._request(self._stream.unit_location(unit + self._stream.lanes)[1])
        tokens, ends = self._group(self._stream.unit_location(unit)[1])
        return tokens, self._stream.unit_documents(unit, ends)

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
            self._pending[group] = Future()
            self._jobs.put((self._pending[group], group))


def default_lanes(sequences: int) -> int:
    """The smallest multiple of the batch that is at least 64."""
    return sequences * math.ceil(FEWEST_LANES / sequences)


def open_stream(
    spec: str, *, sequences: int, text_column="text", lanes=None, cache_dir=None, report=text_io.say, **options
) -> StreamSource:
    """The stream of `ID[:config][@revision]`, a path, a directory or a glob; `options` go to `StreamSource`.

    The groups of a Hub dataset are remembered beside the cache. While the Hub is out of reach, a stream of the last
    known commit is opened, which reads the cache.
    """
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = Path(HF_HOME) / "gpt2repro" / "streams"
    source = _resolve_or_remember(spec, text_column, Path(cache_dir), report)
    lanes = default_lanes(sequences) if lanes is None else lanes
    stream = StreamSource(source, lanes=lanes, cache_dir=cache_dir, report=report, **options)
    stream.check_batch(sequences)
    if source.kind == "datasets":
        files = f"{spec} is read as {len(source.groups)} whole files"
        report(f"{files}: those that the first batch needs are tokenised first")
    return stream


def _resolve_or_remember(spec: str, text_column: str, cache_dir: Path, report) -> text.TextSource:
    if text_io.local_files(spec):
        return text_io.retrying(lambda: text.resolve(spec, text_column=text_column), spec, report=report)
    remembered = cache_dir / f"source_{hashlib.sha256(f'{spec} {text_column}'.encode()).hexdigest()[:16]}.json"

    def resolve_now() -> text.TextSource:
        try:
            return text.resolve(spec, text_column=text_column)
        except Exception as error:
            if not (text_io.is_fault(error) and text_io.may_pass(error) and remembered.exists()):
                raise
            source = text.TextSource(**json.loads(remembered.read_text(encoding="utf-8")))
            report(f"the Hub is out of reach ({type(error).__name__}); using {source.name} as of {source.revision}")
            return source

    source = text_io.retrying(resolve_now, f"hf://datasets/{spec}", report=report)
    make_directory(cache_dir)
    write_json(remembered, vars(source))
    return source
