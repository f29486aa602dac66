"""(data, seed, position) -> the global batch, from token shards or a recipe; `open_data` opens any training data.

    position p ── epoch p // N, index p % N ──> Permutation keyed by (seed, epoch) ──> window w
    window w   ── tokens [wT, wT + T] of all shards as one stream ──> inputs (T), targets (the same, shifted by one)
    batch      ── `sequences` positions in a row; rank r of W keeps rows [r n, (r + 1) n), n = sequences / W

The state is one position and the ranges that were skipped on purpose, so a run that continues with another number of
processes, micro-batches or workers sees the same global batches. Each window comes exactly once per epoch. A batch may
hold the end of one epoch and the start of the next. Only the last (tokens - 1) mod T tokens of a corpus are never used.

With `recut_windows` the tokens of each epoch form a ring, and its windows begin at a place keyed by (seed, epoch):

    window w   ── tokens [o + wT, o + wT + T] modulo `tokens`, o = offset(seed, epoch)

So an epoch has as many windows as without, leaves out as many tokens (elsewhere in each epoch), and at most one of its
windows goes on from the end of the corpus, an <|endoftext|> in our own shards, to its start.

With a recipe (mixture.py) a position first becomes a source and an index, which is a position p in that source alone.

Legend: T seq_len, N windows per epoch = (tokens - 1) // T, W world. Knows no model, no optimizer, no Accelerator.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gpt2repro.data import shards
from gpt2repro.data.mixture import RECIPE_ORDER_VERSION, Recipe, is_recipe, read_recipe
from gpt2repro.data.ordering import Permutation, derive_seed, next_positions
from gpt2repro.data.streaming import open_stream
from gpt2repro.data.tokenization import fingerprint, gpt2_tokenizer, load_tokenizer
from gpt2repro.options import InputError, first_line

SHARD_ORDER_VERSION = 1  # raise it when the same (data, seed, position) would give another window
RECUT_ORDER_VERSION = 1  # the same, where windows are recut
OFFSET = 1  # the second use of the seed, beside the permutation


class ShardSource:
    """Batches from the shards of one split; the module's docstring draws them.

    `split` has .tokens, .vocab_size, .sha256 and .read(start, count). `vocab_size` is the model's, if it is known; one
    that is smaller than the data's is refused. `recut_windows`: cut each epoch's windows elsewhere. `open_source` and
    `open_data` set the other attributes.
    """

    tokenizer = None  # the one that made the tokens
    validation = None  # the split to evaluate on
    directory: Path | None = None  # where the shards lie
    manifest = None  # of a data set made here

    def __init__(self, split, *, seq_len: int, seed: int, vocab_size: int | None = None, recut_windows: bool = False):
        self.windows = (split.tokens - 1) // seq_len
        if self.windows < 1:
            raise InputError(
                f"the data has {split.tokens} tokens, fewer than one window of seq_len + 1 = {seq_len + 1}; "
                "prepare more text or lower --seq_len"
            )
        self.split, self.seq_len, self.seed, self.vocab_size = split, seq_len, seed, split.vocab_size
        check_vocabulary(split.vocab_size, vocab_size)
        self.tokens_per_epoch, self.recut_windows = self.windows * seq_len, recut_windows
        self.sources: dict[str, ShardSource] = {}  # the sources of a recipe, by name
        self._digests: dict[str, str] = {}

    def identity(self) -> dict:
        """What must stay the same on resume: another value would give another order of windows."""
        return {
            "kind": "shards",
            "order": SHARD_ORDER_VERSION,
            "sha256": self.split.sha256,
            "seq_len": self.seq_len,
            "seed": self.seed,
            **({"recut_windows": RECUT_ORDER_VERSION} if self.recut_windows else {}),
        }

    def digests(self) -> dict[str, str]:
        """File name -> sha256 of foreign shards, for the run's state. `identity()` covers shards with a manifest."""
        return self._digests

    def check_digests(self, saved: dict[str, str]) -> None:
        """Raises: InputError naming a foreign shard that has changed since the state was saved."""
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
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = Permutation(self.windows, derive_seed(self.seed, epoch))(indices[here])
        return windows

    def tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """(rows,) positions -> (rows, T + 1) int64: the inputs and the target of the last one."""
        starts = self.windows_at(positions) * self.seq_len
        if self.recut_windows:
            epochs, rows = np.unique(positions // self.windows, return_inverse=True)
            offsets = [derive_seed(self.seed, epoch, OFFSET) % self.split.tokens for epoch in epochs.tolist()]
            starts = (starts + np.array(offsets)[rows]) % self.split.tokens
        return np.stack([self._window(start) for start in starts.tolist()]).astype(np.int64)

    def _window(self, start: int) -> np.ndarray:
        """T + 1 tokens; the start of the corpus follows its end."""
        length = self.seq_len + 1
        tokens = self.split.read(start, min(length, self.split.tokens - start))
        return tokens if len(tokens) == length else np.append(tokens, self.split.read(0, length - len(tokens)))

    def batches(
        self, state: dict, *, rank: int, world: int, sequences: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
        """Endless (x, y, state_after): this rank's rows of each global batch, int64 (sequences / world, T) each.

        Raises: InputError as in `check_batch`, and for a token outside the vocabulary.
        """
        self.check_batch(sequences, world)
        return self._batches(state, rank, sequences // world, sequences)

    def check_batch(self, sequences: int, world: int = 1) -> None:
        """Raises: InputError if `sequences` does not divide among the ranks, or an epoch is shorter than a batch."""
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
            tokens = self.tokens_at(positions[rank * rows : (rank + 1) * rows])
            position = int(positions[-1]) + 1
            state_after = {"position": position, "skipped": skipped}
            yield torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()), state_after


class RecipeSource(ShardSource):
    """Batches from the sources of a recipe: `sources`, each with its own order, epochs and validation split.

    A source's order is the one that it has without a recipe, so a run may begin with one data set and go on with a
    recipe whose first phase is that data set.
    """

    def __init__(self, recipe: Recipe, sources: dict[str, ShardSource]):
        first = next(iter(sources.values()))
        self.recipe, self.sources = recipe, sources
        self.seq_len, self.seed, self.vocab_size = first.seq_len, first.seed, first.vocab_size
        self.recut_windows = first.recut_windows
        self.directory = next((part.directory for part in sources.values() if part.manifest), first.directory)
        self.tokens_per_epoch, self.windows = None, math.inf  # each source has its own epochs

    def identity(self) -> dict:
        """What the order of windows follows from; `mixture.changed_past` says what of it may change on resume."""
        numbers = {"order": RECIPE_ORDER_VERSION, "seq_len": self.seq_len, "seed": self.seed}
        numbers |= {"recut_windows": RECUT_ORDER_VERSION} if self.recut_windows else {}
        return {"kind": "recipe", **numbers, **self.recipe.content()}

    def digests(self) -> dict[str, str]:
        """Source/file name -> sha256 of foreign shards."""
        return {f"{name}/{file}": one for name, part in self.sources.items() for file, one in part.digests().items()}

    def check_digests(self, saved: dict[str, str]) -> None:
        """As in `ShardSource`; names without a source are those of the data set that the run began with."""
        began = next(iter(self.recipe.phases[0].weights))
        for key, digest in saved.items():
            name, _, file = key.rpartition("/")
            if part := self.sources.get(name or began):
                part.check_digests({file: digest})

    def check_length(self, position: int) -> None:
        """Raises: InputError if a source of limited `epochs` ends before this position."""
        windows = {name: part.windows for name, part in self.sources.items()}
        if problem := self.recipe.too_short(position, windows):
            raise InputError(problem)

    def timetable(self, end: int, sequences: int) -> list[str]:
        """`Recipe.timetable` for the sizes of these sources."""
        return self.recipe.timetable(end, sequences, {name: part.windows for name, part in self.sources.items()})

    def tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """As in `ShardSource`, also where a batch touches many epochs of a small source."""
        self.check_length(int(positions[-1]) + 1)  # ranges that were skipped make a run longer
        drawn = [self.recipe.source_at(position) for position in positions.tolist()]
        tokens = np.empty((len(drawn), self.seq_len + 1), dtype=np.int64)
        for name, part in self.sources.items():
            rows = [row for row, (source, _) in enumerate(drawn) if source == name]
            if rows:
                tokens[rows] = part.tokens_at(np.array([drawn[row][1] for row in rows]))
        return tokens

    def mean_losses(self, state: dict, nats: list[float]) -> dict[str, float]:
        """{"loss/web": nats per token, …} of the batch that begins at `state`; `nats` are its rows' sums, in order."""
        sums: dict[str, list[float]] = {}
        for position, row in zip(next_positions(state["position"], state["skipped"], len(nats)), nats, strict=True):
            sums.setdefault(self.recipe.source_at(int(position))[0], []).append(row)
        return {f"loss/{name}": sum(sums[name]) / (len(sums[name]) * self.seq_len) for name in sorted(sums)}


class Prefetch(Iterator):
    """Runs an iterator `depth` items ahead in a thread. `next()` re-raises its error, after the items before it.

    Each item carries its own state_after, so a loop saves the state of the last item that it has consumed, whatever
    waits in the queue. `pin_memory` copies the tensors of an item to page-locked memory, so that their copies to the
    GPU overlap with compute.
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
        except BaseException as error:  # else the loop would wait for ever
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

    def __next__(self):
        if self._stopped.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return item

    def ready(self, seconds: float) -> bool:
        """Wait at most `seconds` for the next item; returns whether `next` would answer at once."""
        with self._queue.not_empty:
            return self._queue.not_empty.wait_for(lambda: self._queue.queue or self._stopped.is_set(), seconds)

    def close(self) -> None:
        """End the thread and close the iterator. A second call does nothing."""
        self._stopped.set()
        if hasattr(self._iterator, "cancel"):  # a stream may be waiting for a network that is down
            self._iterator.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1)  # a daemon: one that hangs does not keep the program


prefetch = Prefetch


def shards_directory(data: str) -> Path:
    """The directory of the shards that `--data` names; those of hf://user/name[@revision] are downloaded once."""
    return download_shards(data.removeprefix("hf://")) if data.startswith("hf://") else Path(data)


def download_shards(repository: str) -> Path:
    """Download a dataset repository of shards, `user/name[@revision]`, into Hugging Face's cache.

    Raises: InputError for a repository that holds no shards, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    version = {"repo_type": "dataset", "revision": revision or None}
    try:
        hf_hub_download(name, shards.MANIFEST, **version)  # first, so that nothing but shards is ever downloaded
        return Path(snapshot_download(name, **version))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"the dataset {repository} holds no token shards (no {shards.MANIFEST}); "
                f"--data stream:{repository} reads text"
            ) from error
        raise InputError(f"cannot get the dataset {repository} from the Hub: {first_line(error)}") from error


def check_vocabulary(data_vocab_size: int, vocab_size: int | None) -> None:
    """Raises: InputError if the data may hold ids outside the model's vocabulary; None stands for an unknown one."""
    if vocab_size is not None and data_vocab_size > vocab_size:
        raise InputError(
            f"the data has a vocabulary of {data_vocab_size}, but the model has vocab_size={vocab_size}; "
            f"set --vocab_size {data_vocab_size}, or prepare the data with the model's tokenizer"
        )


def merge_states(states: list[dict]) -> dict:
    """Join the states of all ranks into one, which a checkpoint holds and from which any world size continues.

    With shards all ranks have the same state; with a stream each rank's state holds the lanes of that rank.
    """
    position = {state["position"] for state in states}
    assert len(position) == 1, f"the ranks' states are of different steps: positions {sorted(position)}"
    if "lanes" not in states[0]:
        return states[0]
    return {**states[0], "lanes": {lane: cursor for state in states for lane, cursor in state["lanes"].items()}}


def open_source(
    data: str,
    *,
    seq_len: int,
    seed: int,
    sequences: int,
    vocab_size: int | None = None,
    recut_windows: bool = False,
    tokenizer=None,
    verify: bool = True,
    **stream_options,
):
    """The training data that `--data` names: a directory of shards, hf://user/name[@revision], stream:… or a recipe.

    `tokenizer` (None: GPT-2's) and `stream_options`, which go to `streaming.open_stream`, are for streams only, which
    cut their windows anew in every epoch without `recut_windows`. Without `verify` no byte is hashed: shards are
    believed to be what their manifest says, and those of others have no digests.

    Raises: InputError for data that is missing, damaged, of another vocabulary, or shorter than one batch.
    """
    if data.startswith("stream:"):
        tokenizer = gpt2_tokenizer() if tokenizer is None else tokenizer
        check_vocabulary(len(tokenizer), vocab_size)
        return open_stream(
            data.removeprefix("stream:"),
            tokenizer=tokenizer, seq_len=seq_len, seed=seed, sequences=sequences, **stream_options,
        )  # fmt: skip
    how = {"seq_len": seq_len, "seed": seed, "vocab_size": vocab_size, "recut_windows": recut_windows}
    if is_recipe(data):
        return open_recipe(read_recipe(data, seq_len), verify=verify, **how)
    directory = shards_directory(data)
    split = shards.open_split(directory, "train")
    source = ShardSource(split, **how)
    source.check_batch(sequences)
    source.directory = directory
    source.validation = shards.open_split(directory, "val") if shards.has_split(directory, "val") else None
    if (directory / shards.MANIFEST).exists():
        source.manifest = shards.verify_dataset(directory, remember=True) if verify else shards.load_manifest(directory)
    elif verify:
        paths = shards.foreign_files(directory, "train") + shards.foreign_files(directory, "val")
        source._digests = shards.digests_of(directory, [path.name for path in paths])
    return source


def open_recipe(recipe: Recipe, **options) -> RecipeSource:
    """The sources of a recipe, opened as `open_source` does, each with the sha256 of its data in the recipe.

    Raises: InputError naming the source that cannot be opened, or does not fit the others.
    """
    sources: dict[str, ShardSource] = {}
    for name, entry in recipe.sources.items():
        place = f"{recipe.name}: sources.{name}"
        try:
            part = sources[name] = open_source(entry.data, sequences=1, **options)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if entry.sha256 not in (None, part.split.sha256):
            raise InputError(f"{place}.sha256 is {entry.sha256}, but {entry.data} has {part.split.sha256}; correct one")
        entry.sha256 = part.split.sha256
        check_alike(place, part, sources)
    return RecipeSource(recipe, sources)


def check_alike(place: str, part: ShardSource, others: dict[str, ShardSource]) -> None:
    """Raises: InputError if a source has another tokenizer or vocabulary than the first one, or another one's data."""
    (first, one), *_ = others.items()
    if part.vocab_size != one.vocab_size:
        raise InputError(
            f"{place} has a vocabulary of {part.vocab_size} and sources.{first} one of {one.vocab_size}; prepare one "
            "of them again with the tokenizer of the other"
        )
    known = [one.manifest["tokenizer"].get("sha256") for one in (part, one) if one.manifest]
    if len(known) == 2 and known[0] != known[1]:
        raise InputError(
            f"{place} was made with another tokenizer than sources.{first}; prepare one of them again with the "
            "tokenizer of the other"
        )
    for name, other in others.items():
        if other is not part and other.split.sha256 == part.split.sha256:
            raise InputError(f"{place} is the same data as sources.{name}; keep one of them and add up the weights")


def open_data(config, sequences: int):
    """The training data of a run as `open_source` opens it, with its tokenizer and the split to evaluate on.

    config: has `data`, `val_data`, `tokenizer`, `seq_len`, `seed`, `vocab_size`, `recut_windows` and the options of
    streams.

    Raises: InputError as in `open_source`, and for a tokenizer that did not make the tokens.
    """
    options = {"seq_len": config.seq_len, "seed": config.seed, "sequences": sequences, "vocab_size": config.vocab_size}
    options["recut_windows"] = config.recut_windows
    if config.data.startswith("stream:"):
        options |= {"tokenizer": _tokenizer(config.tokenizer, None), "text_column": config.text_column}
        options |= {"lanes": config.stream_lanes, "cache_dir": config.cache_dir, "cache_gib": config.cache_gib}
    source = open_source(config.data, **options)
    source.tokenizer = source.tokenizer or _tokenizer(config.tokenizer, source.directory)
    for part in source.sources.values() or [source]:
        _check_tokenizer(source.tokenizer, config.tokenizer, part.directory, part.manifest)
    if config.val_data is not None:
        directory = shards_directory(config.val_data)
        source.validation = shards.open_split(directory, "val")
        check_vocabulary(source.validation.vocab_size, source.vocab_size)
        if (directory / shards.MANIFEST).exists():
            manifest = shards.verify_dataset(directory, remember=True)
            _check_tokenizer(source.tokenizer, f"that of {config.data}", directory, manifest)
    return source


def _tokenizer(name: str | None, directory: Path | None):
    """The named tokenizer, else the one beside the shards, else GPT-2's (for foreign shards and streams)."""
    if name is None and directory is not None and (directory / shards.TOKENIZER).is_dir():
        return load_tokenizer(directory)
    return gpt2_tokenizer() if name in (None, "gpt2") else load_tokenizer(name)


def _check_tokenizer(tokenizer, name: str | None, directory: Path | None, manifest) -> None:
    if not manifest:
        return
    said, found = manifest["tokenizer"], {"vocab_size": len(tokenizer), "eot_id": tokenizer.eos_token_id}
    if said.get("sha256"):
        found["sha256"] = fingerprint(tokenizer)
    if any(said[name] != value for name, value in found.items()):
        remedy = f"prepare {directory} with it, or choose the one that did" if name else "prepare the data again"
        beside = directory / shards.TOKENIZER
        beside = beside if beside.is_dir() else "of GPT-2 (no other lies there)"
        raise InputError(
            f"the tokenizer {name or beside} did not make the tokens of {directory}: its vocabulary, "
            f"merges or special ids are not those that manifest.json names; {remedy}"
        )
