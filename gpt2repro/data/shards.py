"""The on-disk token format: shards, their manifest, and one way to read any of them.

A data set is a directory:

    train_000000.bin, val_000000.bin, …   256 int32 of header (llm.c's: magic, version, token count), then the tokens
    manifest.json                         what is in it, with a sha256 per shard; written last: where it is, all is
    tokenizer/                            the tokenizer that made the tokens (`AutoTokenizer.from_pretrained` loads it)

Tokens are `uint16`, or `uint32` where the vocabulary has more than 65,536 entries. Shards of nanoGPT
(`train.bin`, `val.bin`), build-nanogpt (`*_train_*.npy`) and llm.c (`*_train_*.bin`) are recognised by their headers
and used in place.

This module knows nothing of text, tokenizers or batches; it never writes anything but finished files.
"""

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from pathlib import Path

import numpy as np

from gpt2repro.files import name_aside, publish, sha256_of
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

# Tokens per split that are looked at when it is opened (about 0.1 s); what is read later is checked as it is read.
CHECKED_TOKENS = 2**26


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of the two dtypes that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Writes one shard piece by piece; it appears under its name, whole and on the disk, at `close()`.

    A file made by `np.memmap(mode="w+")` and interrupted is full-sized, full of zeros and loads without complaint. Here
    the tokens go into `NAME.tmp-<random>`, and only a synced file is renamed.
    """

    def __init__(self, path: str | Path, vocab_size: int):
        self.path, self.vocab_size, self.dtype = Path(path), vocab_size, token_dtype(vocab_size)
        self.tokens = self.documents = self.bytes = 0
        self._temporary = name_aside(self.path)
        self._file = self._temporary.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray, documents: int = 0, text_bytes: int = 0) -> None:
        """Add a 1-D array of ids, and to the record how much text it is.

        Raises: InputError for ids outside the vocabulary, beyond 2^31 - 1 tokens and where the disk is full.
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
            digest = sha256_of(self._temporary)
            publish(self._temporary, self.path)
        record = {"file": self.path.name, "tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {**record, "sha256": digest}

    def abandon(self) -> None:
        """Throw the unfinished shard away."""
        with contextlib.suppress(OSError):  # what was not yet written does not fit on the disk
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
    writer = ShardWriter(path, vocab_size)
    try:
        writer.append(np.asarray(tokens))
        return writer.close()
    except InputError:
        writer.abandon()
        raise


class Manifest(dict):
    """The content of `manifest.json`, and `sha256`: the one number that names the data set."""

    sha256: str


def load_manifest(directory: str | Path) -> Manifest:
    """Read `DIR/manifest.json`. Raises InputError where it is missing, damaged or of another format version."""
    path = Path(directory) / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError:
        raise InputError(f"{path} does not exist or can't be read: {directory} is no finished data set") from None
    try:
        manifest = Manifest(json.loads(raw))
        known = manifest["format"] == FORMAT
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise InputError(f"{path} is damaged or not a {FORMAT} manifest; prepare the data again")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has version {manifest.get('version')}, this program reads {VERSION}; prepare the data again"
        )
    if problem := _manifest_problem(manifest):
        raise InputError(f"{path} is damaged: {problem}; prepare the data again")
    manifest.sha256 = hashlib.sha256(raw).hexdigest()
    return manifest


def _manifest_problem(manifest: dict) -> str | None:
    """What in a manifest cannot be, so that whatever reads it later need not ask."""

    def is_count(value, least=0) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    tokenizer, splits = manifest.get("tokenizer"), manifest.get("splits")
    if manifest.get("dtype") not in ("uint16", "uint32"):
        return f"its dtype is {manifest.get('dtype')!r}"
    if not isinstance(tokenizer, dict) or not is_count(tokenizer.get("vocab_size"), 1):
        return "its tokenizer has no vocab_size"
    if not isinstance(splits, dict) or not splits:
        return "it has no splits"
    for name, split in splits.items():
        if (
            not isinstance(split, dict)
            or not is_count(split.get("tokens"))
            or not isinstance(split.get("shards"), list)
        ):
            return f"its split {name} has no tokens and shards"
        for shard in split["shards"]:
            if not isinstance(shard, dict) or not is_count(shard.get("tokens")):
                return f"a shard of its split {name} has no number of tokens"
            file = shard.get("file")
            if (
                not isinstance(file, str)
                or not file
                or file != Path(file).name
                or set(file) & set("/\\:\0")
                or len(file) > 255
            ):
                return f"a shard of its split {name} is called {str(file)[:80]!r}, which is no file name"
        if sum(shard["tokens"] for shard in split["shards"]) != split["tokens"]:
            return f"the shards of its split {name} do not add up to its {split['tokens']} tokens"
    return None


class TokenSplit:
    """The shards of one split as one long array of tokens.

    `tokens`, `documents`, `bytes` (UTF-8 bytes of the text) are its size; the last two are None for foreign shards.
    `sha256` names the whole data set. Memory stays O(1): the files are mapped, and only what is read is touched.
    """

    def __init__(
        self, name, files, counts, dtype, offset, *, vocab_size, eot_id, sha256, documents=None, text_bytes=None
    ):
        self.name, self.vocab_size, self.eot_id, self.sha256 = name, vocab_size, eot_id, sha256
        self.documents, self.bytes = documents, text_bytes
        self.tokens = sum(counts)
        self._files, self._counts, self._dtype, self._offset = files, counts, dtype, offset
        self._starts = np.concatenate([[0], np.cumsum(counts)]).tolist()  # first token of every shard, and the end
        self._maps = {}
        self._check_some_tokens()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as a new array, across shard borders.

        Raises InputError for an id outside the vocabulary, which only a damaged file can hold.
        """
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens [{start}, {start + count}) lie outside the {self.name} split of {self.tokens}")
        out = np.empty(count, self._dtype)
        filled, shard = 0, bisect_right(self._starts, start) - 1
        while filled < count:
            first = start + filled - self._starts[shard]
            piece = self._shard(shard)[first : first + count - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1
        if count and out.max() >= self.vocab_size:
            at = start + int(np.argmax(out >= self.vocab_size))
            raise InputError(self._outside(bisect_right(self._starts, at) - 1, at - start, out))
        return out

    def _shard(self, index: int) -> np.ndarray:
        if index not in self._maps:
            self._maps[index] = np.memmap(
                self._files[index], self._dtype, "r", offset=self._offset, shape=(self._counts[index],)
            )
        return self._maps[index]

    def _check_some_tokens(self) -> None:
        for index, count in enumerate(self._counts):
            tokens = self._shard(index)[: min(count, CHECKED_TOKENS // len(self._counts) + 1)] if count else ()
            if len(tokens) and tokens.max() >= self.vocab_size:
                raise InputError(self._outside(index, int(np.argmax(tokens >= self.vocab_size)), tokens))

    def _outside(self, shard: int, at: int, tokens: np.ndarray) -> str:
        return (
            f"{self._files[shard]} holds token {int(tokens[at])}, but the vocabulary ends at {self.vocab_size - 1}: "
            "the file is damaged or was made with another tokenizer; prepare the data again"
        )

    def __getstate__(self):  # mappings stay in their process
        return {**self.__dict__, "_maps": {}}


def open_split(directory: str | Path, split: str) -> TokenSplit:
    """Open "train" or "val" of a data set made here or by nanoGPT, build-nanogpt or llm.c.

    Raises InputError, before anything is trained on it, for a missing directory or split, a file of the wrong size or
    with the wrong header, and ids outside the vocabulary. `verify_dataset` is the slow, complete check.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"{directory} is no directory; make a data set there with "
            f"`gpt2repro prepare-text --corpus python-docs --out {directory}`"
        )
    if (directory / MANIFEST).exists():
        return _open_own(directory, split)
    if (directory / "plan.json").exists():
        raise InputError(
            f"{directory} is not finished; run the command that prepares it again, it continues where it was"
        )
    return _open_foreign(directory, split)


def has_split(directory: str | Path, split: str) -> bool:
    """Whether `open_split` would find any shard of this name."""
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        return bool(load_manifest(directory)["splits"].get(split, {}).get("tokens"))
    return bool(_foreign_files(directory, split))


def verify_dataset(directory: str | Path) -> Manifest:
    """Compare every shard with the manifest's sha256. Raises InputError naming the first bad file."""
    directory = Path(directory)
    manifest = load_manifest(directory)
    for split in manifest["splits"].values():
        for record in split["shards"]:
            path = directory / record["file"]
            if not path.exists():
                raise InputError(
                    f"{path} is missing, though manifest.json lists it; prepare or download the data again"
                )
            if sha256_of(path) != record["sha256"]:
                raise InputError(
                    f"{path} is damaged (its sha256 is not the manifest's); delete it and prepare or download again"
                )
    return manifest


def _open_own(directory: Path, split: str) -> TokenSplit:
    manifest = load_manifest(directory)
    content = manifest["splits"].get(split)
    if content is None or not content["tokens"]:
        have = ", ".join(name for name, other in manifest["splits"].items() if other["tokens"])
        raise InputError(f"{directory} has no {split} split (it has {have}); prepare it with a larger --val_fraction")
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    files, counts = [directory / record["file"] for record in content["shards"]], []
    for path, record in zip(files, content["shards"], strict=True):
        if not path.exists():
            raise InputError(f"{path} is missing, though manifest.json lists it; prepare or download the data again")
        found, count = _read_header(path)
        if found != dtype or count != record["tokens"]:
            raise InputError(
                f"{path} holds {count} {found} tokens, manifest.json says {record['tokens']} {dtype}; "
                "the files do not belong together, prepare the data again"
            )
        counts.append(count)
    return TokenSplit(
        split, files, counts, dtype, HEADER_BYTES,
        vocab_size=manifest["tokenizer"]["vocab_size"], eot_id=manifest["tokenizer"]["eot_id"],
        sha256=manifest.sha256, documents=content["documents"], text_bytes=content["bytes"],
    )  # fmt: skip


def _foreign_files(directory: Path, split: str) -> list[Path]:
    """nanoGPT's `train.bin`, build-nanogpt's `edufineweb_train_000001.npy`, llm.c's `fineweb_train_000001.bin`."""
    one = directory / f"{split}.bin"
    named = sorted(path for end in ("npy", "bin") for path in directory.glob(f"*{split}*.{end}"))
    return [one] if one.exists() else named


def _open_foreign(directory: Path, split: str) -> TokenSplit:
    files = _foreign_files(directory, split)
    if not files:
        raise InputError(
            f"{directory} has no manifest.json and no {split} shards (looked for {split}.bin, *{split}*.npy, "
            f"*{split}*.bin); make a data set with `gpt2repro prepare-text` or prepare_fineweb.py"
        )
    if (directory / "meta.pkl").exists():
        raise InputError(
            f"{directory} holds nanoGPT's character-level tokens, whose vocabulary is pickled in meta.pkl and never "
            "read here; prepare the text again with `gpt2repro prepare-text --tokenizer char`"
        )
    shapes = {path: _foreign_shape(path) for path in files}
    layouts = {(dtype, offset) for dtype, offset, _ in shapes.values()}
    if len(layouts) > 1:
        listing = ", ".join(f"{path.name}: {dtype} at byte {offset}" for path, (dtype, offset, _) in shapes.items())
        raise InputError(f"the {split} shards of {directory} are of different formats ({listing}); keep one kind")
    # Hashing 20 GB at every start would be too much; names, sizes and both ends of every file tell data sets apart.
    identity = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            head = file.read(2**16)
            file.seek(max(0, path.stat().st_size - 2**16))
            identity.update(json.dumps([path.name, path.stat().st_size]).encode() + head + file.read())
    dtype, offset = layouts.pop()
    return TokenSplit(
        split, files, [count for _, _, count in shapes.values()], dtype, offset,
        vocab_size=GPT2_VOCAB_SIZE, eot_id=GPT2_EOT_ID, sha256=identity.hexdigest(),
    )  # fmt: skip


def _foreign_shape(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, offset in bytes, tokens) of a shard without manifest."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path} can't be read as .npy: {error}") from None
        if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")):
            raise InputError(
                f"{path} holds {array.dtype} of shape {array.shape}; token shards are 1-D uint16 or uint32"
            )
        dtype = (
            np.dtype("<u4") if array.itemsize == 4 else np.dtype("<u2")
        )  # a negative int32 becomes a large id: refused
        return dtype, array.offset, len(array)
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
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, tokens
    return header.tobytes()


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """(dtype, tokens) of a shard with header; the file's size must agree with it."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), "<i4", count=-1 if path.stat().st_size >= HEADER_BYTES else 0)
    if not len(header) or int(header[0]) not in MAGIC or int(header[1]) != MAGIC[int(header[0])][0]:
        raise InputError(
            f"{path} does not begin with a shard's header (magic 20240520 or 20240801): damaged or not a shard"
        )
    dtype, tokens = MAGIC[int(header[0])][1], int(header[2])
    expected, size = HEADER_BYTES + tokens * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise InputError(
            f"{path} has {size} bytes but its header promises {tokens} tokens = {expected} bytes: truncated or damaged"
        )
    return dtype, tokens
