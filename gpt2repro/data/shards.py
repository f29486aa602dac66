"""The on-disk token format: shards, their manifest, and one way to read any of them.

A data set is a directory:

    train_000000.bin, val_000000.bin, …   256 int32 of header (llm.c's: magic, version, token count), then the tokens
    manifest.json                         the shards with their sha256; written last, so its data set is complete
    tokenizer/                            the tokenizer that made the tokens (`AutoTokenizer.from_pretrained` loads it)

Tokens are `uint16`, or `uint32` where the vocabulary has more than 65,536 entries. Shards of nanoGPT
(`train.bin`, `val.bin`), build-nanogpt (`*_train_*.npy`) and llm.c (`*_train_*.bin`) are recognised by their headers
and used in place.

`digests_of` reads every byte before a run begins, and again only when a file's size, times or inode have changed.

This module knows nothing of text, tokenizers or batches; it never writes anything but finished files.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from gpt2repro import files
from gpt2repro.options import InputError

FORMAT, VERSION = "gpt2repro-shards", 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "val")

HEADER_BYTES = 256 * 4
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
# Source: llm.c's dataloader (uint16: version 1; uint32: the Llama 3 variant, version 7).
MAGIC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}

# Foreign shards carry no vocabulary; all three projects write GPT-2's.
GPT2_VOCAB_SIZE, GPT2_EOT_ID = 50257, 50256

CHECKED = ".sha256.json"  # what was hashed before: name -> size, times, inode and sha256
HASHING_THREADS, BAR_FROM_BYTES = 8, 2**31
READ_BYTES = 2**24  # of one call, at most
OPEN_FILES = 128  # of one split, at most; a corpus of 10^12 tokens has 10,000 shards

# Tokens of a split that are checked when it is opened (about 0.1 s); `read` checks all the tokens that it returns.
CHECKED_TOKENS = 2**26


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of the two dtypes that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Writes one shard piece by piece; the file appears under its name at `close()`, complete and on the disk.

    It is a context manager: leaving the block without `close()` deletes what was written.

    Tokens go into `NAME.tmp-<random>`, which is synced and then renamed. (An interrupted `np.memmap(mode="w+")` would
    leave a file of full size, full of zeros, that loads without complaint.)
    """

    def __init__(self, path: str | Path, vocab_size: int):
        self.path, self.vocab_size, self.dtype = Path(path), vocab_size, token_dtype(vocab_size)
        self.tokens = self.documents = self.bytes = 0
        self._temporary = files.name_aside(self.path)
        with self._disk():
            self._file = self._temporary.open("wb")
            self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray, documents: int = 0, text_bytes: int = 0) -> None:
        """Add a 1-D array of ids; `documents` and `text_bytes` say how much text they are, and are summed.

        Raises: InputError for an id outside the vocabulary, for more than 2^31 - 1 tokens, and for a full disk.
        """
        if len(tokens) and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            raise InputError(
                f"{self.path.name}: token {int(tokens.max())} does not fit a vocabulary of {self.vocab_size}; "
                "tokenizer and data do not belong together"
            )
        self.tokens += len(tokens)
        self.documents += documents
        self.bytes += text_bytes
        if self.tokens > MAX_SHARD_TOKENS:
            raise InputError(f"{self.path.name} would pass 2^31 - 1 tokens, the format's limit; lower --shard_tokens")
        with self._disk():
            self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)

    def close(self) -> dict:
        """Finish the shard. Returns `{"file", "tokens", "documents", "bytes", "sha256"}`."""
        with self._disk():
            self._file.seek(0)
            self._file.write(_header(self.dtype, self.tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            digest = files.sha256_of(self._temporary)
            files.publish(self._temporary, self.path)
        record = {"file": self.path.name, "tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {**record, "sha256": digest}

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        """Delete the shard unless it was finished."""
        with contextlib.suppress(OSError):  # close() writes the rest of the buffer, which may not fit on the disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} can't be written ({error.strerror}); free some space, or set --cache_gib where it is a "
                "stream's cache, and run the same command again"
            ) from error


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> dict:
    """Write `tokens` (1-D, ids below `vocab_size`) as one shard, atomically. Returns `ShardWriter.close()`'s record."""
    with ShardWriter(path, vocab_size) as writer:
        writer.append(np.asarray(tokens))
        return writer.close()


Count = Annotated[int, Field(strict=True, ge=0, lt=2**62)]


def _file_name(name: str) -> str:
    if not files.is_plain_name(name) or name != Path(name).name or len(name) > 255:
        raise ValueError(f"{name[:80]!r} is no file name")
    return name


class ShardRecord(BaseModel):
    """One shard, in a manifest."""

    file: Annotated[str, AfterValidator(_file_name)]
    tokens: Annotated[int, Field(strict=True, ge=0, le=MAX_SHARD_TOKENS)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Split(BaseModel):
    tokens: Count
    documents: Count | None
    bytes: Count | None
    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _add_up(self):
        if sum(shard.tokens for shard in self.shards) != self.tokens:
            raise ValueError(f"the shards do not add up to {self.tokens} tokens")
        return self


class _Tokenizer(BaseModel):
    vocab_size: Annotated[int, Field(strict=True, ge=1, lt=2**31)]
    eot_id: Count
    kind: str = ""
    sha256: str = ""

    @model_validator(mode="after")
    def _has_its_end(self):
        if self.eot_id >= self.vocab_size:
            raise ValueError(f"eot_id={self.eot_id} is outside the vocabulary of {self.vocab_size}")
        return self


class _Content(BaseModel):
    dtype: Literal["uint16", "uint32"]
    tokenizer: _Tokenizer
    source: dict = {}
    settings: dict = {}
    splits: Annotated[dict[str, _Split], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_each_once(self):
        names = [shard.file for split in self.splits.values() for shard in split.shards]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise ValueError(f"{twice} is listed twice")
        return self


class Manifest(dict):
    """The content of `manifest.json`; `sha256`, the hash of the file, names the data set."""

    sha256: str

    def digests(self) -> dict[str, str]:
        """File name -> sha256 of all shards."""
        return {shard["file"]: shard["sha256"] for split in self["splits"].values() for shard in split["shards"]}


def load_manifest(directory: str | Path) -> Manifest:
    """Read `DIR/manifest.json`.

    Raises: InputError for a manifest that is missing, damaged or of another format version.
    """
    path = Path(directory) / MANIFEST
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} does not exist or can't be read: {directory} is no finished data set")
    manifest = Manifest(files.read_json_if_whole(path) or {})
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is damaged or not a {FORMAT} manifest; prepare the data again")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has version {manifest.get('version')}, this program reads {VERSION}; prepare the data again"
        )
    try:
        _Content.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg'].removeprefix('Value error, ')}"
        raise InputError(f"{path} is damaged: {problem.lstrip(': ')}; prepare the data again") from None
    manifest.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return manifest


class TokenSplit:
    """The shards of one split as one long array of tokens, in O(1) memory.

    `tokens`, `documents` and `bytes` (of the text, in UTF-8) are its size; foreign shards know only the first.
    `sha256` names the whole data set. The files are read, not mapped: if a mapped file is cut, the process is killed
    (SIGBUS) without a message.
    """

    def __init__(
        self, name, paths, counts, dtype, offset, *, vocab_size, eot_id, sha256, documents=None, text_bytes=None
    ):
        self.name, self.vocab_size, self.eot_id, self.sha256 = name, vocab_size, eot_id, sha256
        self.documents, self.bytes = documents, text_bytes
        self.tokens = sum(counts)
        self._paths, self._counts, self._dtype, self._offset = paths, counts, dtype, offset
        self._starts = np.concatenate([[0], np.cumsum(counts)]).tolist()  # first token of every shard, and the end
        self._open, self._lock = {}, threading.Lock()
        for shard, count in enumerate(counts):
            self._read(shard, 0, np.empty(min(count, CHECKED_TOKENS // len(counts) + 1), dtype))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as a new array, across shard borders.

        Raises: InputError for a file that has become shorter or unreadable, and for an id outside the vocabulary.
        """
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens [{start}, {start + count}) lie outside the {self.name} split of {self.tokens}")
        out = np.empty(count, self._dtype)
        filled, shard = 0, bisect_right(self._starts, start) - 1
        while filled < count:
            first = start + filled - self._starts[shard]
            piece = out[filled : filled + self._counts[shard] - first]
            self._read(shard, first, piece)
            filled, shard = filled + len(piece), shard + 1
        return out

    def _read(self, shard: int, first: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens of one shard from `first` on."""
        path, position, left = self._paths[shard], self._offset + first * out.itemsize, memoryview(out).cast("B")
        try:
            while len(left):
                with self._lock:  # for the table of files, and for systems without pread
                    content = self._pread(shard, min(len(left), READ_BYTES), position)
                if not content:
                    raise InputError(f"{path} ends at byte {position}: it was cut since the run began; bring it back")
                left[: len(content)] = content
                left, position = left[len(content) :], position + len(content)
        except OSError as error:
            raise InputError(f"{path} can't be read any more ({error.strerror}); bring it back") from error
        if len(out) and out.max() >= self.vocab_size:
            raise InputError(
                f"{path} holds token {int(out[np.argmax(out >= self.vocab_size)])}, but the vocabulary ends at "
                f"{self.vocab_size - 1}: the file is damaged or was made with another tokenizer; prepare the data again"
            )

    def _pread(self, shard: int, size: int, position: int) -> bytes:
        if shard not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = open(self._paths[shard], "rb", buffering=0)  # noqa: SIM115 - stays open
        file = self._open[shard]
        if hasattr(os, "pread"):
            return os.pread(file.fileno(), size, position)
        file.seek(position)
        return file.read(size)

    def __getstate__(self):  # open files stay in their process
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


def open_split(directory: str | Path, split: str) -> TokenSplit:
    """Open "train" or "val" of a data set made here or by nanoGPT, build-nanogpt or llm.c.

    This check is quick; `verify_dataset` is the complete one.

    Raises: InputError for a missing directory or split, a file of the wrong size or with the wrong header, and an id
    outside the vocabulary.
    """
    directory = Path(directory)
    if not directory.is_dir():
        bare_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)) and not directory.parent.exists()
        raise InputError(
            f"{directory} is no directory; make a data set there with `{how_to_prepare(directory)}`"
            f"{f', or write hf://{directory} if it lies on the Hub' if bare_id else ''}"
        )
    if (directory / MANIFEST).exists():
        return _open_own(directory, split)
    if (directory / "plan.json").exists() or (directory / TOKENIZER).exists():  # ours, not somebody's bare shards
        raise InputError(
            f"{directory} has no {MANIFEST}: it is not finished; run the command that prepares it again, it continues "
            "where it was"
        )
    return _open_foreign(directory, split)


def has_split(directory: str | Path, split: str) -> bool:
    """Whether `open_split` would find any shard of this name."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        return bool(load_manifest(directory)["splits"].get(split, {}).get("tokens"))
    return bool(foreign_files(directory, split))


def how_to_prepare(directory: Path) -> str:
    """The command that prepares the data set of this directory, guessed from the directory's name."""
    name = directory.name.lower()
    size = re.search(r"(100|350)b$", name)  # of tokens; the default is sample-10BT
    subset = f" --subset sample-{size[1]}BT" if size else ""
    texts = {
        "fineweb-edu": f"python prepare_fineweb.py{subset}",
        "fineweb": f"python prepare_fineweb.py --dataset HuggingFaceFW/fineweb{subset}",
        "openwebtext": "python prepare_fineweb.py --dataset Skylion007/openwebtext --subset none",
        "shakespeare_char": "gpt2repro prepare-text --corpus shakespeare --tokenizer char",
        "shakespeare": "gpt2repro prepare-text --corpus shakespeare --tokenizer gpt2",
        "python-docs": "gpt2repro prepare-text --corpus python-docs",
    }
    known = next((command for word, command in texts.items() if word in name), "gpt2repro prepare-text --input TEXTS")
    return f"{known} --out {directory}"


def verify_dataset(directory: str | Path, *, remember: bool = False) -> Manifest:
    """Compare every byte of the shards with the manifest.

    remember: as in `digests_of`.

    Raises: InputError naming the first bad file.
    """
    directory, manifest = Path(directory), load_manifest(directory)
    expected = manifest.digests()
    for name, digest in digests_of(directory, list(expected), remember=remember).items():
        if digest != expected[name]:
            raise InputError(
                f"{directory / name} is damaged (its sha256 is not the manifest's); delete it and prepare or download "
                "again"
            )
    return manifest


def digests_of(directory: Path, names: list[str], *, remember: bool = True) -> dict[str, str]:
    """File name -> sha256 of files in a directory, hashed by several threads; long work shows a bar.

    remember: keep each hash with the file's size, times and inode in `.sha256.json` beside the files (below HF_HOME
        if that directory is read-only). A file is hashed again only after a change; of several processes, one hashes
        and the others wait.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HOME
    from tqdm import tqdm

    _refuse_missing(directory / name for name in names)
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    at_home = not os.access(directory, os.W_OK)
    place = Path(HF_HOME) / "gpt2repro" / "sha256" / f"{key}.json" if at_home else directory / CHECKED
    user = os.getuid() if hasattr(os, "getuid") else 0
    lock = FileLock(Path(tempfile.gettempdir()) / f"gpt2repro-{user}-{key}.lock")
    with lock if remember else contextlib.nullcontext():
        known = (files.read_json_if_whole(place) if remember else None) or {}
        stats = {name: (directory / name).stat() for name in names}
        facts = {name: [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino] for name, now in stats.items()}
        found = {
            name: known[name][-1]
            for name in names
            if isinstance(known.get(name), list) and known[name][:-1] == facts[name]
        }
        new = [name for name in names if name not in found]
        total = sum(facts[name][0] for name in new)
        with (
            ThreadPoolExecutor(HASHING_THREADS) as pool,
            tqdm(
                total=total, unit="B", unit_scale=True, desc="checking", disable=total < BAR_FROM_BYTES or None
            ) as bar,
        ):
            for name, digest in zip(new, pool.map(lambda name: files.sha256_of(directory / name), new), strict=True):
                found[name] = digest
                bar.update(facts[name][0])
        if new and remember:
            with contextlib.suppress(OSError):  # then it is hashed again the next time
                place.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(place, {**known, **{name: [*facts[name], found[name]] for name in names}})
    return {name: found[name] for name in names}


def _open_own(directory: Path, split: str) -> TokenSplit:
    manifest = load_manifest(directory)
    content = manifest["splits"].get(split)
    if content is None or not content["tokens"]:
        others = ", ".join(name for name, other in manifest["splits"].items() if other["tokens"])
        raise InputError(f"{directory} has no {split} split (it has {others}); prepare it with a larger --val_fraction")
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    paths, counts = zip(*((directory / record["file"], record["tokens"]) for record in content["shards"]), strict=True)
    _refuse_missing(paths)
    for path, count in zip(paths, counts, strict=True):
        found, tokens = _read_header(path)
        if (found, tokens) != (dtype, count):
            raise InputError(
                f"{path} holds {tokens} {found} tokens, manifest.json says {count} {dtype}; "
                "the files do not belong together, prepare the data again"
            )
    return TokenSplit(
        split, paths, counts, dtype, HEADER_BYTES,
        vocab_size=manifest["tokenizer"]["vocab_size"], eot_id=manifest["tokenizer"]["eot_id"],
        sha256=manifest.sha256, documents=content["documents"], text_bytes=content["bytes"],
    )  # fmt: skip


def _refuse_missing(paths: Iterable[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing, though manifest.json lists it; prepare or download the data again")


def foreign_files(directory: Path, split: str) -> list[Path]:
    """Shards of others: nanoGPT's `train.bin`, build-nanogpt's `*_train_000001.npy`, llm.c's `*_train_000001.bin`."""
    one = directory / f"{split}.bin"
    if one.is_file():
        return [one]
    # The split is the last separate word "train" or "val" in the name; "interval" and "retrieval" do not count.
    words = {path: re.findall(r"(?<![a-z])(?:train|val)(?![a-z])", path.stem.lower()) for path in directory.iterdir()}
    found = [path for path, found in words.items() if path.suffix in (".npy", ".bin") and found[-1:] == [split]]
    if strange := next((path for path in found if re.search("[\ud800-\udfff]", path.name)), None):
        raise InputError(f"{directory}: the file name {strange.name!a} is not UTF-8; rename it")
    return sorted(path for path in found if path.is_file())  # a pipe never ends


def _open_foreign(directory: Path, split: str) -> TokenSplit:
    paths = foreign_files(directory, split)
    if not paths:
        raise InputError(
            f"{directory} has no manifest.json and no {split} shards (looked for {split}.bin, *_{split}_*.npy, "
            f"*_{split}_*.bin); make a data set with `gpt2repro prepare-text` or prepare_fineweb.py"
        )
    if (directory / "meta.pkl").exists():
        raise InputError(
            f"{directory} holds nanoGPT's character-level tokens, whose vocabulary is pickled in meta.pkl and never "
            "read here; prepare the text again with `gpt2repro prepare-text --tokenizer char`"
        )
    shapes = {path: _foreign_shape(path) for path in paths}
    layouts = {(dtype, offset) for dtype, offset, _ in shapes.values()}
    if len(layouts) > 1:
        listing = ", ".join(f"{path.name}: {dtype} at byte {offset}" for path, (dtype, offset, _) in shapes.items())
        raise InputError(f"the {split} shards of {directory} are of different formats ({listing}); keep one kind")
    # Names and both ends identify the data set quickly; `digests_of` reads every byte.
    dtype, offset = layouts.pop()
    return TokenSplit(
        split, paths, [count for _, _, count in shapes.values()], dtype, offset,
        vocab_size=GPT2_VOCAB_SIZE, eot_id=GPT2_EOT_ID, sha256=files.sha256_of_ends(paths),
    )  # fmt: skip


def _foreign_shape(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, offset in bytes, tokens) of a shard without manifest."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header can make numpy raise anything
            raise InputError(f"{path} can't be read as .npy: {' '.join(str(error).split())[:200]}") from None
        if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")):
            raise InputError(
                f"{path} holds {array.dtype} of shape {array.shape}; token shards are 1-D uint16 or uint32"
            )
        if (size := path.stat().st_size) != (expected := array.offset + array.nbytes):
            raise InputError(f"{path} has {size} bytes but its header promises {expected}: damaged")
        # A negative int32 becomes a large id, which is refused.
        return np.dtype(f"<u{array.itemsize}"), array.offset, len(array)
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic in MAGIC:
        dtype, count = _read_header(path)
        return dtype, HEADER_BYTES, count
    size = path.stat().st_size  # nanoGPT's: bare uint16
    if size == 0 or size % 2:
        raise InputError(
            f"{path} has {size} bytes, no llm.c header and is not a whole number of uint16 tokens (nanoGPT)"
        )
    return np.dtype("<u2"), 0, size // 2


def _header(dtype: np.dtype, tokens: int) -> bytes:
    magic, version = next((magic, version) for magic, (version, kind) in MAGIC.items() if kind == dtype)
    return np.array([magic, version, tokens] + [0] * 253, "<i4").tobytes()


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """(dtype, tokens) from a shard's header, with which the file's size must agree."""
    header, size = np.fromfile(path, "<i4", 256).tolist(), path.stat().st_size
    version, dtype = MAGIC.get(header[0], (0, None)) if len(header) == 256 else (0, None)
    if dtype is None or header[1] != version:
        raise InputError(
            f"{path} does not begin with a shard's header (magic 20240520 or 20240801): damaged or not a shard"
        )
    tokens = header[2]
    expected = HEADER_BYTES + tokens * dtype.itemsize
    if size != expected:
        raise InputError(
            f"{path} has {size} bytes but its header promises {tokens} tokens = {expected} bytes: truncated or damaged"
        )
    return dtype, tokens
