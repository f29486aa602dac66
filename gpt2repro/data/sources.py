"""(data, seed, position) -> the global batch, from token shards; and the door to every kind of training data.

    position p ── epoch p // N, index p % N ──> Permutation keyed by (seed, epoch) ──> window w
    window w   ── tokens [wT, wT + T] of all shards as one stream ──> inputs (T), targets (the same, shifted by one)
    batch      ── `sequences` positions in a row; rank r of W keeps rows [r n, (r + 1) n), n = sequences / W

Nothing is remembered between batches: the state is one position and the ranges skipped on purpose, so a run may
continue with other processes, micro-batches or workers and still sees the same global batches. Each window comes
exactly once per epoch; a batch may hold the end of one epoch and the start of the next; only the last
(tokens - 1) mod T tokens of a corpus are never used.

Legend: T seq_len, N windows per epoch = (tokens - 1) // T, W world. Knows no model, no optimizer, no Accelerator.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gpt2repro.data.ordering import Permutation, derive_seed, next_positions, skip_ahead
from gpt2repro.data.shards import (
    MANIFEST,
    TOKENIZER,
    digests_of,
    foreign_files,
    has_split,
    open_split,
    verify_dataset,
)
from gpt2repro.data.streaming import open_stream
from gpt2repro.data.tokenization import fingerprint, gpt2_tokenizer, load_tokenizer
from gpt2repro.options import InputError

__all__ = [
    "Permutation", "Prefetch", "ShardSource", "merge_states", "open_data", "open_source", "prefetch", "skip_ahead"
]  # fmt: skip

SHARD_ORDER_VERSION = 1  # raise it when the same (data, seed, position) would give another window


class ShardSource:
    """Batches from the shards of one split; see the module's drawing.

    `split` has .tokens, .vocab_size, .sha256 and .read(start, count). `vocab_size` is the model's, where it is known:
    a smaller one than the data's is refused. The other attributes are for the training loop.
    """

    tokenizer = None  # what made the tokens; set by `open_data`
    validation = None  # the split to evaluate on
    directory: Path | None = None  # where the shards lie
    manifest = None  # of a data set made here

    def __init__(self, split, *, seq_len: int, seed: int, vocab_size: int | None = None):
        self.windows = (split.tokens - 1) // seq_len
        if self.windows < 1:
            raise InputError(
                f"the data has {split.tokens} tokens, fewer than one window of seq_len + 1 = {seq_len + 1}; "
                "prepare more text or lower --seq_len"
            )
        self.split, self.seq_len, self.seed, self.vocab_size = split, seq_len, seed, split.vocab_size
        check_vocabulary(split.vocab_size, vocab_size)
        self.tokens_per_epoch = self.windows * seq_len
        self._permutations: dict[int, Permutation] = {}
        self._digests: dict[str, str] = {}

    def identity(self) -> dict:
        """What must be the same on resume, because another value would mean another order of windows."""
        return {
            "kind": "shards",
            "order": SHARD_ORDER_VERSION,
            "sha256": self.split.sha256,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }

    def digests(self) -> dict[str, str]:
        """File name -> sha256 of foreign shards, for the run's state; a manifest's are in `identity()` already."""
        return self._digests

    def check_digests(self, saved: dict[str, str]) -> None:
        """Raises: InputError naming a foreign shard that is not the one it was when the state was saved."""
        for name, digest in saved.items():
            if self._digests.get(name, digest if self.manifest else None) != digest:
                raise InputError(
                    f"{self.directory}/{name} is not the file that this run began with (its sha256 has changed); "
                    "bring the old one back, or start a new run"
                )

    def initial_state(self) -> dict:
        return {"position": 0, "skipped": []}

    def windows_at(self, positions: np.ndarray) -> np.ndarray:
        """Positions -> windows, both int64 of any shape. A batch touches one epoch, or two at their border."""
        epochs, indices = np.divmod(positions, self.windows)
        windows = np.empty_like(indices)
        present = np.unique(epochs).tolist()
        for epoch in present:
            if epoch not in self._permutations:
                self._permutations = {old: p for old, p in self._permutations.items() if old in present}
                self._permutations[epoch] = Permutation(self.windows, derive_seed(self.seed, epoch))
            here = epochs == epoch
            windows[here] = self._permutations[epoch](indices[here])
        return windows

    def batches(
        self, state: dict, *, rank: int, world: int, sequences: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
        """Endless (x, y, state_after): this rank's rows of each global batch, int64 (sequences / world, T) each.

        Raises: InputError as `check_batch` does; `split.read` raises it for a token outside the vocabulary.
        """
        self.check_batch(sequences, world)
        return self._batches(state, rank, sequences // world, sequences)

    def check_batch(self, sequences: int, world: int = 1) -> None:
        """Raises: InputError where `sequences` does not divide among the ranks or an epoch is shorter."""
        if sequences % world:
            raise InputError(f"a batch of {sequences} sequences does not divide among {world} processes")
        if self.windows < sequences:
            raise InputError(
                f"the data has {self.windows} windows of {self.seq_len} tokens, fewer than one batch of {sequences} "
                f"sequences; prepare more text, or lower --batch_tokens to at most {self.windows * self.seq_len}"
            )

    def _batches(self, state: dict, rank: int, rows: int, sequences: int):
        position, skipped = state["position"], state["skipped"]
        while True:
            positions = next_positions(position, skipped, sequences)
            tokens = self._read(self.windows_at(positions[rank * rows : (rank + 1) * rows]))
            position = int(positions[-1]) + 1
            state_after = {"position": position, "skipped": skipped}
            yield torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()), state_after

    def _read(self, windows: np.ndarray) -> np.ndarray:
        """The tokens of these windows with the target of the last one, (rows, T + 1) int64."""
        tokens = np.empty((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, window in zip(tokens, windows.tolist(), strict=True):
            row[:] = self.split.read(window * self.seq_len, self.seq_len + 1)
        return tokens


class Prefetch:
    """Runs an iterator `depth` items ahead in a thread. Re-raises its error from `next()`, after the items before it.

    Each item carries its own state_after, so the state that a loop saves is that of the last item it has consumed,
    whatever is waiting in the queue. `pin_memory` moves tensors of an item to page-locked memory, for copies that
    do not wait.
    """

    def __init__(self, iterator: Iterator, depth: int, *, pin_memory: bool = False):
        self._iterator, self._pin_memory = iterator, pin_memory
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._iterator:
                if self._pin_memory:
                    item = tuple(part.pin_memory() if isinstance(part, torch.Tensor) else part for part in item)
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # whatever ends the thread must reach the loop, or it would wait for ever
            self._put((None, error))
        finally:
            if hasattr(self._iterator, "close"):
                self._iterator.close()

    def _put(self, entry) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        if self._stopped.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return item

    def ready(self, seconds: float) -> bool:
        """Whether `next` would answer at once, after waiting for that for at most `seconds`."""
        with self._queue.not_empty:
            return self._queue.not_empty.wait_for(lambda: self._queue.queue or self._stopped.is_set(), seconds)

    def close(self) -> None:
        """Ends the thread and closes the iterator; safe to call twice."""
        self._stopped.set()
        if hasattr(self._iterator, "cancel"):  # it may wait for a network that is down
            self._iterator.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)


prefetch = Prefetch


def shards_directory(data: str) -> Path:
    """Where the shards lie that `--data` names; those of hf://user/name[@revision] are downloaded once."""
    return download_shards(data.removeprefix("hf://")) if data.startswith("hf://") else Path(data)


def download_shards(repository: str) -> Path:
    """A dataset repository of shards, `user/name[@revision]`, as a directory in Hugging Face's cache."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    where = {"repo_type": "dataset", "revision": revision or None}
    try:
        hf_hub_download(name, MANIFEST, **where)  # before terabytes of something else
        return Path(snapshot_download(name, **where))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"the dataset {repository} holds no token shards (no {MANIFEST}); --data stream:{repository} reads text"
            ) from error
        raise InputError(f"cannot get the dataset {repository} from the Hub: {str(error).splitlines()[0]}") from error


def check_vocabulary(data_vocab_size: int, vocab_size: int | None) -> None:
    """Raises: InputError where the data may hold ids that the model, if its vocabulary is known, does not have."""
    if vocab_size is not None and data_vocab_size > vocab_size:
        raise InputError(
            f"the data has a vocabulary of {data_vocab_size}, but the model has vocab_size={vocab_size}; "
            f"set --vocab_size {data_vocab_size}, or prepare the data with the model's tokenizer"
        )


def merge_states(states: list[dict]) -> dict:
    """One state for all ranks from each rank's own: what a checkpoint holds, and `batches` of any world size takes.

    The states of shards are all the same; those of a stream hold each rank's own lanes.
    """
    position = {state["position"] for state in states}
    assert len(position) == 1, f"the ranks' states are of different steps: positions {sorted(position)}"
    if "lanes" not in states[0]:
        return states[0]
    return {**states[0], "lanes": {lane: where for state in states for lane, where in state["lanes"].items()}}


def open_source(
    data: str,
    *,
    seq_len: int,
    seed: int,
    sequences: int,
    vocab_size: int | None = None,
    tokenizer=None,
    **stream_options,
):
    """The training data that `--data` names: a directory of shards, hf://user/name[@revision] or stream:….

    `tokenizer` (None: GPT-2's) and `stream_options`, which are `streaming.open_stream`'s, are for streams only.
    Raises: InputError where the data is missing, damaged, of another vocabulary, or shorter than one batch.
    """
    if data.startswith("stream:"):
        tokenizer = gpt2_tokenizer() if tokenizer is None else tokenizer
        check_vocabulary(len(tokenizer), vocab_size)
        return open_stream(
            data.removeprefix("stream:"),
            tokenizer=tokenizer, seq_len=seq_len, seed=seed, sequences=sequences, **stream_options,
        )  # fmt: skip
    directory = shards_directory(data)
    split = open_split(directory, "train")
    source = ShardSource(split, seq_len=seq_len, seed=seed, vocab_size=vocab_size)
    source.check_batch(sequences)
    source.directory = directory
    source.validation = open_split(directory, "val") if has_split(directory, "val") else None
    if (directory / MANIFEST).exists():
        source.manifest = verify_dataset(directory, remember=True)
    else:
        paths = foreign_files(directory, "train") + foreign_files(directory, "val")
        source._digests = digests_of(directory, [path.name for path in paths])
    return source


def open_data(config, sequences: int):
    """The training data of a run as `open_source` opens it, with its tokenizer and the split to evaluate on.

    config: has `data`, `val_data`, `tokenizer`, `seq_len`, `seed`, `vocab_size` and the options of streams.

    Raises: InputError where a tokenizer is not the one that made the tokens, and as `open_source` does.
    """
    options = {"seq_len": config.seq_len, "seed": config.seed, "sequences": sequences, "vocab_size": config.vocab_size}
    if config.data.startswith("stream:"):
        options |= {"tokenizer": _tokenizer(config.tokenizer, None), "text_column": config.text_column}
        options |= {"lanes": config.stream_lanes, "cache_dir": config.cache_dir, "cache_gib": config.cache_gib}
    source = open_source(config.data, **options)
    source.tokenizer = source.tokenizer or _tokenizer(config.tokenizer, source.directory)
    _check_tokenizer(source.tokenizer, config.tokenizer, source.directory, source.manifest)
    if config.val_data is not None:
        directory = shards_directory(config.val_data)
        source.validation = open_split(directory, "val")
        check_vocabulary(source.validation.vocab_size, source.vocab_size)
        if (directory / MANIFEST).exists():
            manifest = verify_dataset(directory, remember=True)
            _check_tokenizer(source.tokenizer, f"that of {config.data}", directory, manifest)
    return source


def _tokenizer(name: str | None, directory: Path | None):
    """The tokenizer that made the data: named, or lying beside the shards; foreign shards and streams are GPT-2's."""
    if name is None and directory is not None and (directory / TOKENIZER).is_dir():
        return load_tokenizer(directory)
    return gpt2_tokenizer() if name in (None, "gpt2") else load_tokenizer(name)


def _check_tokenizer(tokenizer, name: str | None, directory: Path | None, manifest) -> None:
    expected = manifest["tokenizer"].get("sha256") if manifest else None
    if expected and fingerprint(tokenizer) != expected:
        remedy = f"prepare {directory} with it, or choose the one that did" if name else "prepare the data again"
        beside = directory / TOKENIZER if (directory / TOKENIZER).is_dir() else "of GPT-2 (no other lies there)"
        raise InputError(
            f"the tokenizer {name or beside} did not make the tokens of {directory}: its vocabulary, "
            f"merges or special ids are not those that manifest.json names; {remedy}"
        )
