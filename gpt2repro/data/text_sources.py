"""Text that can be read in pieces: a name -> its files -> groups of documents, each readable on its own.

| source            | group                                      | needs to be read for one group     |
|-------------------|--------------------------------------------|------------------------------------|
| parquet           | one row group                              | its column of text                 |
| jsonl, ndjson     | the lines that begin in 4 MiB of the file  | those bytes                        |
| txt, md           | the same; a document is 16 KiB of lines    | those bytes                        |
| any other format  | one file, iterated by `datasets`           | the whole file                     |

Groups, and the documents in them, are the same wherever and whenever they are read: a Hub dataset is pinned to one
commit, local files are told apart by name, size and both ends. `datasets` resolves ids, configurations, splits and
lists of files; bytes come through `HfFileSystem`. Knows no tokens, no lanes, no retries.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2repro.data import hub_text
from gpt2repro.data.hub_text import checked, text_of
from gpt2repro.options import InputError

LINES_GROUP_BYTES = 4 << 20  # about a million GPT-2 tokens of English, as in one row group of FineWeb
TEXT_DOCUMENT_BYTES = 16 << 10  # a long text is cut into documents of whole lines: something to shuffle
DOCUMENTS_AT_ONCE = 256
JSON_LINES, PLAIN_TEXT = {".jsonl", ".ndjson"}, {".txt", ".md"}


@dataclass(frozen=True)
class TextSource:
    """A resolved source. A group is [file, row group, rows], [file, first byte, end] or [shard of `datasets`, 0, 0]."""

    name: str  # without the revision, as the user wrote it
    kind: str  # "parquet", "jsonl", "text" or "datasets"
    files: list[str]
    groups: list[list[int]]
    text_column: str
    config: str | None = None
    revision: str | None = None  # the Hub's commit; None for local files
    content: str = ""  # sha256 of what tells local files apart

    @property
    def remote(self) -> bool:
        """True where reading goes through the network."""
        return self.revision is not None

    @property
    def sha256(self) -> str:
        """Names the documents and their groups, wherever the files lie."""
        decisive = asdict(self)
        if self.revision is None:  # local files may be moved
            decisive |= {"name": "", "files": [Path(file).name for file in self.files]}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def read(self, group: int) -> Iterator[list[str]]:
        """The documents of one group in the order of the file, some at a time; empty ones do not count."""
        documents = self._documents(*self.groups[group])
        while some := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
            yield some

    def _documents(self, file: int, start: int, stop: int) -> Iterator[str]:
        if self.kind == "parquet":
            documents = self._parquet_documents(self.files[file], start)
        elif self.kind == "jsonl":
            documents = self._json_documents(self.files[file], start, stop)
        elif self.kind == "text":
            documents = _text_documents(_lines(self.files[file], start, stop))
        else:
            documents = self._shard_documents(file)
        return (document for document in documents if document)

    def _parquet_documents(self, path: str, row_group: int) -> Iterator[str]:
        import pyarrow.parquet as parquet

        # pre_buffer: the column in one request, not page by page; reading ahead would only fetch other columns.
        with (
            _open(path, cache_type="none") as raw,
            parquet.ParquetFile(raw, metadata=_footer(path), pre_buffer=True) as file,
        ):
            for batch in file.iter_batches(DOCUMENTS_AT_ONCE, row_groups=[row_group], columns=[self.text_column]):
                for text in batch.column(0).to_pylist():
                    yield checked(text, self.text_column, path)

    def _shard_documents(self, shard: int) -> Iterator[str]:
        dataset = _iterable_dataset(self.name, self.config, self.revision, self.files)
        for row in dataset.shard(num_shards=len(self.groups), index=shard):
            yield text_of(row, self.text_column, self.name)

    def _json_documents(self, path: str, start: int, stop: int) -> Iterator[str]:
        for first_byte, line in _lines(path, start, stop):
            if line.strip():
                where = f"{path}, the line at byte {first_byte},"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{where} is not JSON: {error}") from error
                yield text_of(row, self.text_column, where)


def resolve(spec: str, *, text_column: str = "text") -> TextSource:
    """`ID[:config][@revision]`, a path, a directory or a glob -> TextSource.

    Raises InputError for what can never be read; errors of the network pass through, for the caller to retry.
    """
    if paths := local_files(spec):
        return _resolve_files(spec, [str(path) for path in paths], text_column)
    match = hub_text.SPEC.fullmatch(spec)
    if match is None or Path(spec).suffix in {".parquet", ".txt", ".md", ".csv", ".gz", ".zst", *JSON_LINES}:
        raise InputError(f"stream:{spec} names no file here, and is no Hub dataset written as ID[:config][@revision]")
    return _resolve_hub(match["id"], match["config"], match["revision"], text_column)


def local_files(spec: str) -> list[Path]:
    """The files that a path, a directory (everything in it that is not hidden) or a glob names, sorted."""
    path = Path(spec)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(spec, recursive=True))
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def _resolve_files(spec: str, files: list[str], text_column: str) -> TextSource:
    content = hashlib.sha256()
    for path in files:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, size - (1 << 16)))
            content.update(json.dumps([Path(path).name, size]).encode() + head + file.read())
    kind = _kind(files, spec)
    return TextSource(
        spec, kind, files, _groups(kind, files, text_column, spec, None, None), text_column, content=content.hexdigest()
    )


def _resolve_hub(name: str, config: str | None, revision: str | None, text_column: str) -> TextSource:
    _need("datasets", name)
    found = hub_text.resolve(name, config, revision)
    kind = _kind(found.files, name)
    groups = _groups(kind, found.files, text_column, name, config, found.revision)
    return TextSource(name, kind, found.files, groups, text_column, config, found.revision)


def _kind(files: list[str], name: str) -> str:
    suffixes = {Path(file).suffix for file in files}
    if suffixes == {".parquet"}:
        return "parquet"
    if suffixes <= JSON_LINES:
        return "jsonl"
    if suffixes <= PLAIN_TEXT:
        return "text"
    if len(suffixes) > 1:
        raise InputError(f"{name} holds files of several formats ({', '.join(sorted(suffixes))}); name one with a glob")
    return "datasets"


def _groups(kind, files, text_column, name, config, revision) -> list[list[int]]:
    if kind == "datasets":
        _need("datasets", name)
        return [[shard, 0, 0] for shard in range(_iterable_dataset(name, config, revision, files).num_shards)]
    with ThreadPoolExecutor(16) as pool:  # a footer, or a size, of thousands of files on the Hub
        if kind == "parquet":
            _need("pyarrow", name)
            rows = pool.map(lambda path: _row_groups(path, text_column), files)
            groups = [[f, g, count] for f, counts in enumerate(rows) for g, count in enumerate(counts) if count]
        else:
            step = LINES_GROUP_BYTES
            sizes = pool.map(_size, files)
            groups = [[f, a, min(a + step, size)] for f, size in enumerate(sizes) for a in range(0, size, step)]
    if not groups:
        raise InputError(f"{name} holds no text: its {len(files)} files are empty")
    return groups


def _need(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{name} can only be read with the package {package}: pip install {package}")


def _row_groups(path: str, text_column: str) -> list[int]:
    footer = _footer(path)
    columns = footer.schema.to_arrow_schema().names
    if text_column not in columns:
        raise InputError(f"{path}: there is no column {text_column!r}, only {', '.join(columns)}; set --text_column")
    return [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]


def _footer(path: str):
    """A parquet file's metadata; a pinned file's, about a megabyte for a thousand row groups, is not read twice."""
    return _pinned_footer(path) if path.startswith("hf://") else _read_footer(path)


@functools.lru_cache(maxsize=64)
def _pinned_footer(path: str):
    return _read_footer(path)


def _read_footer(path: str):
    import pyarrow
    import pyarrow.parquet as parquet

    with _open(path, cache_type="none") as raw:
        try:
            return parquet.read_metadata(raw)
        except pyarrow.ArrowInvalid as error:  # an OSError, since a file on the Hub may be whole the next time
            raise OSError(f"{path} is cut off, damaged or not parquet") from error


def _iterable_dataset(name: str, config: str | None, revision: str | None, files: list[str]):
    """The dataset as `datasets` iterates it; one shard per file."""
    from datasets import load_dataset

    if revision is None:
        where = str(Path(files[0]).resolve().parent)
        paths = [str(Path(file).resolve()) for file in files]
        return load_dataset(where, data_files=paths, split="train", streaming=True)
    return load_dataset(name, config, revision=revision, split="train", streaming=True)


def _lines(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the lines that begin in [start, stop)."""
    with _open(path) as raw:
        raw.seek(max(start - 1, 0))
        file = io.BufferedReader(raw, 1 << 20)
        position = max(start - 1, 0)
        if start:
            position += len(file.readline())  # the rest of a line that begins before; only "\n" if it ends just there
        while position < stop and (line := file.readline()):
            yield position, line
            position += len(line)


def _text_documents(lines: Iterator[tuple[int, bytes]]) -> Iterator[str]:
    piece, number = [], None
    for start, line in lines:
        if piece and start // TEXT_DOCUMENT_BYTES != number:
            yield b"".join(piece).decode("utf-8", "replace")
            piece = []
        number = start // TEXT_DOCUMENT_BYTES
        piece.append(line)
    if piece:
        yield b"".join(piece).decode("utf-8", "replace")


def _open(path: str, *, cache_type: str = "readahead"):
    """A file on the Hub or here, for reading bytes; `cache_type` is fsspec's, for the former."""
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(path, "rb", cache_type=cache_type)
    return open(path, "rb", buffering=0)


def _size(path: str) -> int:
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().info(path)["size"]
    return Path(path).stat().st_size
