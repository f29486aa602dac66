"""Files of text, here or on the Hub, as units of work for `preparation`: which stretches, and how to read one.

| format                 | a document is           | a unit is                                                  |
|------------------------|-------------------------|------------------------------------------------------------|
| .parquet               | a row that is not null  | row groups                                                 |
| .jsonl, .ndjson        | a line                  | the lines that begin in a stretch of bytes                 |
| .txt, .md              | a file                  | files, or a stretch of one cut where no token can straddle |
| the last two, packed   | the same                | whole files (.gz, .bz2, .xz, .zst)                         |
| other files of the Hub | a row                   | a file, iterated by the `datasets` library                 |

Only the text column is read, block by block, so memory does not grow with files or row groups. A dataset of the Hub is
pinned to one commit. A fault of the network is retried with growing, jittered pauses and reading goes on behind the
last document that arrived. Knows no tokens.
"""

import codecs
import glob
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from gpt2repro.data import hub_text
from gpt2repro.data.hub_text import first_line, text_of
from gpt2repro.data.preparation import BYTES_PER_TOKEN, Piece, pieces_of, pieces_of_stream
from gpt2repro.files import sha256_of
from gpt2repro.options import InputError

FORMATS = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt", ".md": "txt"
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz", ".zst")
PACKED_RATIO = 3  # of text; only used to guess

BLOCK_BYTES = 2**20
REMOTE_BLOCK_BYTES = 2**24  # one request to the Hub; its latency of about 0.1 s must not count
ROWS_AT_ONCE = 256

_downloads = threading.Lock()


@dataclass(frozen=True)
class TextFile:
    """One file. `name` is what stays the same when it is copied; `sha256` is None where the Hub does not tell it."""

    path: str  # local path or hf:// URL
    name: str
    format: str  # "parquet", "jsonl", "txt" or "datasets"
    packed: bool
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class TextFiles:
    """A resolved source: its files in order, and `source`, the JSON that names exactly this text."""

    files: list[TextFile]
    text_column: str
    source: dict
    copies: Path | None = None

    def with_copies(self, directory: Path | None) -> "TextFiles":
        """The same files, but those of the Hub are downloaded whole, compared with its sha256 and read from there."""
        return replace(self, copies=directory)

    def few_documents(self, limit: int) -> bool:
        """Whether these are fewer than `limit` text files, each one document."""
        return len(self.files) < limit and all(file.format == "txt" for file in self.files)

    def units(self, shard_tokens: int, *, val_fraction: float | None = None) -> list[dict]:
        """Stretches of about `shard_tokens` tokens, in the order of the files.

        val_fraction: the end of every text file is for validation (nanoGPT's split); None leaves units undivided.
        """
        if val_fraction is not None and not all(file.format == "txt" and not file.packed for file in self.files):
            raise InputError("--split position needs plain text files; use --split document for rows and packed files")
        spans = []
        with ThreadPoolExecutor(16) as pool:  # footers of thousands of files on the Hub
            for own in pool.map(
                lambda i: self._spans(i, shard_tokens * BYTES_PER_TOKEN, val_fraction), range(len(self.files))
            ):
                spans += own
        units: list[dict] = []
        for span in sorted(spans, key=lambda span: span["split"] == "val"):  # stable: the val spans last
            full = not units or units[-1]["bytes"] + span["bytes"] > shard_tokens * BYTES_PER_TOKEN
            if full or units[-1]["split"] != span["split"]:
                units.append({"bytes": 0, "split": span["split"], "spans": []})
            units[-1]["bytes"] += span["bytes"]
            units[-1]["spans"].append([span["file"], span["start"], span["stop"], span["ends"]])
        return units

    def read(self, unit: dict) -> Iterator[Iterable[Piece]]:
        """The documents of a unit, each as pieces of text."""
        for index, start, stop, ends in unit["spans"]:
            file = self.files[index]
            if file.format == "txt":
                yield self._text_document(file, start, stop, ends)
            else:
                rows = {"parquet": self._parquet_rows, "jsonl": self._json_rows, "datasets": self._dataset_rows}
                for text in rows[file.format](file, start, stop):
                    yield pieces_of(text)

    def _spans(self, index: int, target_bytes: float, val_fraction: float | None) -> list[dict]:
        """The smallest stretches of one file that may become units of their own."""
        file = self.files[index]

        def span(start, stop, size, split=None, ends=True):
            return {"file": index, "start": start, "stop": stop, "bytes": size, "split": split, "ends": ends}

        if file.format == "parquet":
            sizes = retrying(lambda: _row_group_bytes(file.path, self.text_column), file.path)
            return [span(group, group + 1, size) for group, size in enumerate(sizes)]
        if file.format == "datasets":
            return [span(0, None, file.bytes)]
        if file.packed:
            return [span(0, None, file.bytes * PACKED_RATIO)]
        if val_fraction is not None:
            cut = _character_start(file.path, int(file.bytes * (1 - val_fraction)))
            parts = [(0, cut, "train"), (cut, file.bytes, "val")]
        else:
            parts = [(0, file.bytes, None)]
        find_cut = _after_seam if file.format == "txt" else lambda path, at, stop: at
        spans = []
        for start, stop, split in parts:
            # A text file is divided only where its split is known beforehand: a document belongs to one split.
            whole = file.format == "txt" and split is None
            while not whole and stop - start > 1.5 * target_bytes:
                cut = find_cut(file.path, start + int(target_bytes), stop)
                spans.append(span(start, cut, cut - start, split, ends=cut == stop))
                start = cut
            if stop > start:
                spans.append(span(start, stop, stop - start, split))
        return spans

    def _text_document(self, file: TextFile, start: int, stop: int | None, ends: bool) -> Iterator[Piece]:
        """A text file, or a stretch of it, with which the document ends or not."""
        decoder = codecs.getincrementaldecoder("utf-8")()

        def decoded():
            position = start
            for block in _blocks(file, self._path(file), start, stop):
                position += len(block)
                yield _decode(decoder, block, file.path, position)
            yield _decode(decoder, b"", file.path, position, final=True)

        for text, end in pieces_of_stream(decoded()):
            yield text, end and ends

    def _json_rows(self, file: TextFile, start: int, stop: int | None) -> Iterator[str]:
        for position, line in _lines(file, self._path(file), start, stop):
            if line.strip():
                where = f"{file.path}, the line at byte {position}"
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    raise InputError(_undecodable(file.path, position + error.start, error)) from None
                except ValueError as error:
                    raise InputError(f"{where}, is not JSON ({error})") from None
                text = text_of(row, self.text_column, where)
                if text is not None:
                    yield text

    def _dataset_rows(self, file: TextFile, start: int, stop: int | None) -> Iterator[str]:
        from datasets import load_dataset

        source = self.source

        def rows(skip):
            data = load_dataset(
                source["dataset"], source["config"], revision=source["revision"], data_files=file.name,
                split="train", streaming=True,
            )  # fmt: skip
            return iter(data.skip(skip))

        for row in resuming(rows, file.path):
            text = text_of(row, self.text_column, file.path)
            if text is not None:
                yield text

    def _parquet_rows(self, file: TextFile, start: int, stop: int) -> Iterator[str]:
        path = self._path(file)
        for group in range(start, stop):
            for text in resuming(lambda skip, g=group: _row_group(path, g, self.text_column, skip), path):
                if text is not None:
                    yield text

    def _path(self, file: TextFile) -> str:
        """Where to read the file: where it is, or a copy whose checksum was compared."""
        if self.copies is None or not file.path.startswith("hf://") or file.format == "datasets":
            return file.path
        from huggingface_hub import hf_hub_download

        verified = self.copies / f"{file.name}.verified"
        with _downloads:  # one at a time; the client uses the whole line
            if not verified.exists():
                where = {"repo_type": "dataset", "revision": self.source["revision"], "local_dir": self.copies}
                path = retrying(lambda: hf_hub_download(self.source["dataset"], file.name, **where), file.path)
                if file.sha256 is not None and sha256_of(path) != file.sha256:
                    Path(path).unlink()
                    raise InputError(f"{file.path} arrived damaged (sha256); run the same command again")
                verified.touch()
        return str(self.copies / file.name)


def find(
    inputs: list[str], *, text_column: str = "text", config: str | None = None, revision: str | None = None
) -> TextFiles:
    """Resolve paths, directories and globs, or the one id of a Hub dataset.

    Raises InputError where nothing matches, the Hub refuses, or the text column is missing.
    """
    paths = [path for item in inputs for path in _local(item)]
    if not paths and len(inputs) == 1 and (match := hub_text.SPEC.fullmatch(inputs[0])):
        return _find_on_hub(match["id"], match["config"] or config, match["revision"] or revision, text_column)
    missing = [item for item in inputs if not _local(item)]
    if missing:
        raise InputError(f"no files matched {', '.join(missing)} (looked for {', '.join(FORMATS)}, packed or not)")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_of, paths)
        files = [
            TextFile(str(path), path.name, *_named_format(path.name), path.stat().st_size, digest)
            for path, digest in zip(paths, digests, strict=True)
        ]
    if not sum(file.bytes for file in files):
        raise InputError(f"{', '.join(inputs)}: there is no text, the {len(files)} files are empty")
    listed = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in files]
    return TextFiles(files, text_column, {"files": listed})


def retrying(call: Callable, what: str):
    """`call()`, again after a pause where the network failed; local files get one attempt."""
    for attempt in range(hub_text.RETRIES + 1):
        try:
            return call()
        except Exception as error:
            wait_or_raise(error, attempt, what)


def resuming(open_rows: Callable[[int], Iterator], what: str) -> Iterator:
    """The rows of `open_rows(0)`; after a fault of the network, those of `open_rows(rows already given)`."""
    given, attempt = 0, 0
    while True:
        try:
            for row in open_rows(given):
                yield row
                given, attempt = given + 1, 0
            return
        except Exception as error:
            wait_or_raise(error, attempt, what)
            attempt += 1


def wait_or_raise(error: Exception, attempt: int, what: str) -> None:
    """Pause before the next attempt, or raise: InputError when the network stays away, the error itself otherwise."""
    if isinstance(error, InputError) or not hub_text.may_pass(error):
        raise error
    if not what.startswith("hf://"):
        raise InputError(f"{what} can't be read: {first_line(error)}") from error
    if attempt >= hub_text.RETRIES:
        raise InputError(
            f"{what} can't be read after {hub_text.RETRIES} retries ({type(error).__name__}: {first_line(error)}); "
            "finished units are kept, run the same command again later"
        ) from error
    seconds = hub_text.seconds_before_retry(error, attempt)
    print(f"{what}: {type(error).__name__}, again in {seconds:.1f} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


def _local(item: str) -> list[Path]:
    path = Path(item)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(item, recursive=True))
    chosen = [file for file in found if file.is_file() and not file.name.startswith(".") and _format(file.name)[0]]
    return sorted(chosen, key=Path.as_posix)


def _format(name: str) -> tuple[str | None, bool]:
    """(format, packed) by suffix; the format is None where the suffix is unknown."""
    path = PurePosixPath(name.lower())
    packed = path.suffix in PACKED
    suffix = PurePosixPath(path.stem).suffix if packed else path.suffix
    return FORMATS.get(suffix), packed


def _named_format(name: str) -> tuple[str, bool]:
    """The same for a file that was named one by one: with an unknown suffix it is text."""
    file_format, packed = _format(name)
    return file_format or "txt", packed


def _find_on_hub(dataset: str, config: str | None, revision: str | None, text_column: str) -> TextFiles:
    from huggingface_hub import HfFileSystem

    found = retrying(lambda: hub_text.resolve(dataset, config, revision), f"hf://datasets/{dataset}")
    system = HfFileSystem()
    with ThreadPoolExecutor(16) as pool:
        infos = list(pool.map(lambda url: retrying(lambda: system.info(url), url), found.files))
    files = []
    for url, info in zip(found.files, infos, strict=True):
        name = url.split(f"@{found.revision}/", 1)[-1]
        file_format, packed = _format(name)
        lfs = info.get("lfs") or {}
        digest = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        files.append(TextFile(url, name, file_format or "datasets", packed, info["size"], digest))
    listed = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in files]
    source = {"dataset": dataset, "config": found.config, "revision": found.revision, "files": listed}
    return TextFiles(files, text_column, source)


def _open(path: str):
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(path, "rb", block_size=REMOTE_BLOCK_BYTES)
    return open(path, "rb")


def _row_group_bytes(path: str, text_column: str) -> list[int]:
    """Bytes of text per row group, from the footer."""
    import pyarrow
    from pyarrow import parquet

    with _open(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path} is damaged or not parquet: {first_line(error)}") from error
        names = file.schema_arrow.names
        if text_column not in names:
            raise InputError(f"{path}: there is no column {text_column!r}, only {', '.join(names)}; set --text_column")
        kind = file.schema_arrow.field(text_column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(f"{path}: {text_column!r} holds {kind}, not text; set --text_column")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = (
            next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == text_column)
            for group in groups
        )
        return [column.total_uncompressed_size for column in columns]


def _row_group(path: str, group: int, text_column: str, skip: int) -> Iterator[str | None]:
    """The texts of one row group behind the first `skip`, page by page: buffer_size keeps the rest on the disk."""
    from pyarrow import parquet

    with _open(path) as raw:
        file = parquet.ParquetFile(raw, buffer_size=BLOCK_BYTES, pre_buffer=False, page_checksum_verification=True)
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[text_column], use_threads=False):
            if skip < len(batch):
                yield from batch.column(0)[skip:].to_pylist()
            skip = max(0, skip - len(batch))


def _blocks(file: TextFile, path: str, start: int, stop: int | None) -> Iterator[bytes]:
    """The bytes [start, stop) of a file, unpacked."""
    position = start
    attempt = 0
    while True:
        try:
            with _open(path) as raw:
                stream = _unpack(raw, path) if file.packed else raw
                if position:
                    stream.seek(position)
                while block := stream.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position)):
                    position, attempt = position + len(block), 0
                    yield block
            if not file.packed and position < (file.bytes if stop is None else stop):
                raise EOFError(f"it ends at byte {position}")  # a connection that closed early
            return
        except Exception as error:
            wait_or_raise(error, attempt, path)
            attempt += 1


def _unpack(raw, path: str):
    import fsspec.utils
    from fsspec.compression import compr

    return compr[fsspec.utils.infer_compression(path)](raw, mode="rb")


def _lines(file: TextFile, path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the lines that begin in [start, stop)."""
    position, rest, inside = max(start - 1, 0), b"", start == 0
    for block in _blocks(file, path, position, None):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if inside:
                yield position, line
            inside, position = True, position + len(line) + 1
            if stop is not None and position >= stop:
                return
    if rest and inside:
        yield position, rest


def _decode(decoder, block: bytes, path: str, position: int, *, final: bool = False) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise InputError(_undecodable(path, position - len(error.object) + error.start, error)) from None


def _undecodable(path: str, offset: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{path}: byte {offset} (0x{byte:02x}) is not UTF-8 ({error.reason}); convert the file to UTF-8"


def _character_start(path: str, at: int) -> int:
    """The first byte from `at` on that begins a character."""
    with _open(path) as raw:
        raw.seek(at)
        return at + next((i for i, byte in enumerate(raw.read(4)) if byte & 0xC0 != 0x80), 0)


def _after_seam(path: str, at: int, stop: int) -> int:
    """The first place from `at` on where a text can be cut without changing a token, or its end."""
    with _open(path) as raw:
        raw.seek(at)
        while len(block := raw.read(min(BLOCK_BYTES, stop - at))) > 2:
            if match := re.search(rb"[!-~]\n(?=[!-~])", block):
                return at + match.end()
            at += len(block) - 2  # the seam may lie across the border
            raw.seek(at)
    return stop
