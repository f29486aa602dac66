"""Raw text, here or on the Hub -> documents: one rule for what a document is, and two functions that apply it.

| format                 | a document is                             | read in one go (unit's span, stream's group)   |
|------------------------|-------------------------------------------|------------------------------------------------|
| .parquet               | a row of the text column that is not null | one row group                                  |
| .jsonl, .ndjson        | a line whose text is not null             | the lines that begin in a stretch of bytes     |
| .txt, .md              | a file, or lines of about 16 KiB          | a stretch of bytes                             |
| the same, packed       | as unpacked                               | a file (.gz, .bz2, .xz, .zst)                  |
| other files of the Hub | a row                                     | a file, iterated by the `datasets` library     |

Preparation calls `find_text` -> `TextFiles`: stretches of any size; bad UTF-8 is refused.
Streams call `resolve` -> `TextSource`: groups that never change; bad UTF-8 becomes U+FFFD and is counted, since a
stream must not end in the middle of a run. Both leave out and count null rows. In a data set an empty text is a
document (a lone `<|endoftext|>`); a stream leaves it out.

Only the text column is read, block by block, so memory does not grow with files or row groups. A dataset of the Hub is
pinned to one commit. Knows no tokens.
"""

import codecs
import functools
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gpt2repro.data import text_io
from gpt2repro.data.text_io import FORMATS, NEVER, format_of, local_files, resuming, retrying
from gpt2repro.files import sha256_of, sha256_of_ends
from gpt2repro.options import InputError, say

PACKED_RATIO = 3  # unpacked bytes per packed byte of text; an estimate
BYTES_PER_TOKEN = 4.5  # of English under GPT-2's tokenizer; an estimate

TEXT_CUT_VERSION = 1  # raise it, and streaming.STREAM_ORDER_VERSION, when the same text would be cut elsewhere
TEXT_DOCUMENT_BYTES = 16 << 10  # a stream cuts a long text into documents of whole lines, to be able to shuffle it
LINES_GROUP_BYTES = 4 << 20  # about a million GPT-2 tokens of English, as in one row group of FineWeb

# A longer document is cut where GPT-2's pre-tokeniser cuts as well, so the pieces give the ids of the whole.
PIECE_CHARACTERS = 2**20
# A newline between visible characters: GPT-2's pre-tokeniser always ends a token after it.
SEAM = re.compile(r"(?<=\S)\n(?=\S)")

# A piece of a document, and whether the document ends with this piece.
Piece = tuple[str, bool]

_downloads = threading.Lock()


@dataclass(frozen=True)
class TextFile:
    """One file. `name` stays the same when the file is copied; `sha256` is None if the Hub does not state it."""

    path: str  # local path or hf:// URL
    name: str
    format: str  # "parquet", "jsonl", "txt" or "datasets"
    packed: bool
    bytes: int
    sha256: str | None


class Reading:
    """How text is read, and a record of what was left out or replaced.

    strict: refuse bad UTF-8 instead of replacing it.
    document_bytes: cut plain text into documents of the lines that begin in so many bytes; None: a file is a document.
    """

    def __init__(self, column: str, *, strict: bool, document_bytes: int | None, report: Callable[[str], None] = say):
        self.column, self.strict, self.document_bytes, self.report = column, strict, document_bytes, report
        self._found: dict[tuple, list[int]] = {}  # stretch -> [null rows, bad sequences, where the first one is]
        self._told: dict[str, int] = {}

    def documents(
        self, path: str, format: str, packed: bool, start: int, stop: int | None, cancel: threading.Event = NEVER
    ) -> Iterator[str]:
        """The texts of row groups [start, stop) of parquet, else of the lines that begin in these bytes, in order."""
        found = [0, 0, 0]
        resumed = functools.partial(resuming, report=self.report, stop=cancel)
        if format == "parquet":
            groups = (functools.partial(text_io.row_group, path, group, self.column) for group in range(start, stop))
            texts = itertools.chain.from_iterable(resumed(group, path) for group in groups)
        else:
            lines = text_io.lines_of(path, packed, start, stop, resumed)
            texts = (self._cut if format == "txt" else self._rows)(lines, path, found)
        yield from self.present(texts, (path, start), found)

    def dataset(self, path: str, name, config, revision, files, shards, index, cancel=NEVER) -> Iterator[str]:
        """The texts of one shard (mostly a file) of a dataset, as the `datasets` library iterates it."""

        def rows_from(given: int) -> Iterator:
            dataset = text_io.iterable_dataset(name, config, revision, files)
            return iter(dataset.shard(num_shards=shards, index=index).skip(given))

        rows = resuming(rows_from, path, report=self.report, stop=cancel)
        return self.present((text_of(row, self.column, path) for row in rows), (path, index), [0, 0, 0])

    def present(self, texts: Iterable[str | None], stretch: tuple, found: list[int]) -> Iterator[str]:
        """The texts that are not null. Records what is missing in a stretch, once however often it is read."""
        for text in texts:
            if text is None:
                found[0] += 1
            else:
                yield text
        if any(found):
            self._found[stretch] = found

    def _rows(self, lines: Iterator[tuple[int, bytes]], path: str, found: list[int]) -> Iterator[str | None]:
        for position, line in lines:
            if line.strip():
                place = f"{path}, the line at byte {position}"
                try:
                    try:
                        row = json.loads(line)
                    except UnicodeDecodeError:
                        row = json.loads(self._decode(line, path, position, found))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{place}, is not JSON ({error})") from None
                yield text_of(row, self.column, place)

    def _cut(self, lines: Iterator[tuple[int, bytes]], path: str, found: list[int]) -> Iterator[str]:
        for _, document in itertools.groupby(lines, lambda line: line[0] // self.document_bytes):
            starts, pieces = zip(*document, strict=True)
            yield self._decode(b"".join(pieces), path, starts[0], found)

    def _decode(self, raw: bytes, path: str, position: int, found: list[int]) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            if self.strict:
                raise _undecodable(error, path, position + error.start) from None
            text = raw.decode("utf-8", "replace")
            found[2] = found[2] if found[1] else position + error.start
            found[1] += text.count("\ufffd") - raw.count("\ufffd".encode())
            return text

    def tell(self, *others: tuple[int, str]) -> None:
        """Report each count (of what was left out or replaced, and `others`) that has doubled since its last report."""
        found = list(self._found.items())
        nulls, bad = (sum(numbers[index] for _, numbers in found) for index in (0, 1))
        path, first = next(((stretch[0], numbers[2]) for stretch, numbers in found if numbers[1]), ("", 0))
        counts = [
            (nulls, "rows without text (null) were left out"),
            (bad, f"times U+FFFD stands for what is no UTF-8, first at byte {first} of {path}"),
            *others,
        ]
        for count, sentence in counts:
            if count > 2 * self._told.get(sentence, 0):
                self._told[sentence] = count
                self.report(f"{count} {sentence}")


# --- for preparation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles:
    """A resolved source: its files in order, and `source`, the JSON that names exactly this text.

    copies: a directory into which the Hub's files are downloaded whole. Each copy is compared with the Hub's sha256 and
        then read instead of the original.
    """

    files: list[TextFile]
    source: dict
    reading: Reading
    copies: Path | None = None

    def units(self, shard_tokens: int, *, val_fraction: float | None = None) -> list[dict]:
        """Stretches of about `shard_tokens` tokens, in the order of the files.

        val_fraction: the end of every text file is for validation (nanoGPT's split); None: units belong to no split.

        Raises: InputError for a `val_fraction` of text that is not plain, whole files.
        """
        plain = all(file.format == "txt" and not file.packed for file in self.files)
        if val_fraction is not None and not (plain and self.reading.document_bytes is None):
            raise InputError("--split position needs whole, plain text files; use --split document for other text")
        target_bytes = shard_tokens * BYTES_PER_TOKEN
        with ThreadPoolExecutor(16) as pool:  # footers of thousands of files on the Hub
            own = pool.map(lambda index: self._spans(index, target_bytes, val_fraction), range(len(self.files)))
            spans = list(itertools.chain.from_iterable(own))
        units: list[dict] = []
        for span in sorted(spans, key=lambda span: span["split"] == "val"):  # stable: the val spans last
            full = not units or units[-1]["bytes"] + span["bytes"] > target_bytes
            if full or units[-1]["split"] != span["split"]:
                units.append({"bytes": 0, "split": span["split"], "spans": []})
            units[-1]["bytes"] += span["bytes"]
            units[-1]["spans"].append(span["span"])
        return units

    def read(self, unit: dict) -> Iterator[Iterable[Piece]]:
        """The documents of a unit, each as pieces of text."""
        for index, start, stop, ends in unit["spans"]:
            file, path = self.files[index], self._path(self.files[index])
            if file.format == "txt" and self.reading.document_bytes is None:
                yield _whole_text(file, path, start, stop, ends)
                continue
            if file.format == "datasets":
                dataset = [self.source[key] for key in ("dataset", "config", "revision")]
                dataset += [[file.path for file in self.files], len(self.files), index]
                documents = self.reading.dataset(path, *dataset)
            else:
                documents = self.reading.documents(path, file.format, file.packed, start, stop)
            yield from map(pieces_of, documents)

    def place(self, unit: dict) -> str:
        """The files that hold a unit's text, for a message."""
        paths = [self.files[index].path for index, *_ in unit["spans"]]
        return paths[0] + (f" or one of the {len(paths) - 1} next files" if len(paths) > 1 else "")

    def _spans(self, index: int, target_bytes: float, val_fraction: float | None) -> list[dict]:
        """The smallest stretches of one file that may become separate units."""
        file, document_bytes = self.files[index], self.reading.document_bytes

        def span(start, stop, size, split=None, ends=True):
            return {"span": [index, start, stop, ends], "bytes": size, "split": split}

        if file.format == "parquet":
            groups = retrying(lambda: text_io.row_groups(file.path, self.reading.column), file.path)
            return [span(group, group + 1, size) for group, (_, size) in enumerate(groups)]
        if file.packed or file.format == "datasets":
            return [span(0, None, file.bytes if file.format == "datasets" else file.bytes * PACKED_RATIO)]
        parts = [(0, file.bytes, None)]
        if val_fraction is not None:
            cut = text_io.character_start(file.path, int(file.bytes * (1 - val_fraction)))
            parts = [(0, cut, "train"), (cut, file.bytes, "val")]
        spans = []
        for start, stop, split in parts:
            # A text file whose split is not known yet stays whole, since all of a document belongs to one split.
            whole = file.format == "txt" and split is None and document_bytes is None
            while not whole and stop - start > 1.5 * target_bytes:
                cut = start + int(target_bytes)
                if file.format == "txt" and document_bytes is not None:
                    cut = min(stop, max(cut - cut % document_bytes, start + document_bytes))
                elif file.format == "txt":
                    cut = text_io.after_seam(file.path, cut, stop)
                spans.append(span(start, cut, cut - start, split, ends=cut == stop))
                start = cut
            if stop > start:
                spans.append(span(start, stop, stop - start, split))
        return spans

    def _path(self, file: TextFile) -> str:
        """The path to read: the file's own, or that of a copy whose checksum was compared."""
        if self.copies is None or not file.path.startswith("hf://") or file.format == "datasets":
            return file.path
        from huggingface_hub import hf_hub_download

        verified = self.copies / f"{file.name}.verified"
        with _downloads:  # one at a time, since one download uses the whole bandwidth
            if not verified.exists():
                copy = {"repo_type": "dataset", "revision": self.source["revision"], "local_dir": self.copies}
                path = retrying(lambda: hf_hub_download(self.source["dataset"], file.name, **copy), file.path)
                if file.sha256 is not None and sha256_of(path) != file.sha256:
                    Path(path).unlink()
                    raise InputError(f"{file.path} arrived damaged (sha256); run the same command again")
                verified.touch()
        return str(self.copies / file.name)


def find_text(
    inputs: list[str],
    *,
    text_column: str = "text",
    config: str | None = None,
    revision: str | None = None,
    document_bytes: int | None = None,
    copies: Path | None = None,
) -> TextFiles:
    """Resolve paths, directories and globs, or the one id of a Hub dataset.

    Raises: InputError if nothing matches, the Hub refuses, or the text column is missing.
    """
    reading = Reading(text_column, strict=True, document_bytes=document_bytes)
    chosen = [[path for path in local_files(item) if Path(item).is_file() or format_of(path)[0]] for item in inputs]
    paths = [path for found in chosen for path in sorted(found, key=Path.as_posix)]
    is_local = paths or len(inputs) > 1 or Path(inputs[0]).exists()
    if not is_local and (match := text_io.SPEC.fullmatch(inputs[0])):
        return _find_on_hub(match["id"], match["config"] or config, match["revision"] or revision, reading, copies)
    if missing := [item for item, found in zip(inputs, chosen, strict=True) if not found]:
        raise InputError(f"no files matched {', '.join(missing)} (looked for {', '.join(FORMATS)}, packed or not)")

    def describe(path: Path) -> TextFile:
        format, packed = format_of(path)  # a file that the user named is text, whatever its suffix
        digest = retrying(lambda: sha256_of(path), str(path))
        return TextFile(str(path), path.name, format or "txt", packed, path.stat().st_size, digest)

    with ThreadPoolExecutor() as pool:
        files = list(pool.map(describe, paths))
    if not sum(file.bytes for file in files):
        raise InputError(f"{', '.join(inputs)}: there is no text, the {len(files)} files are empty")
    return TextFiles(files, {"files": _listed(files)}, reading)


def _find_on_hub(dataset, config, revision, reading: Reading, copies: Path | None) -> TextFiles:
    from huggingface_hub import HfFileSystem

    url = f"hf://datasets/{dataset}"
    config, commit, urls = retrying(lambda: text_io.resolve_hub(dataset, config, revision), url)
    system = HfFileSystem()

    def describe(url: str) -> TextFile:
        info = retrying(lambda: system.info(url), url)
        digest = (info.get("lfs") or {}).get("sha256")
        format, packed = format_of(url)
        name = url.split(f"@{commit}/", 1)[-1]
        return TextFile(url, name, format or "datasets", packed, info["size"], digest)

    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(describe, urls))
    source = {"dataset": dataset, "config": config, "revision": commit, "files": _listed(files)}
    return TextFiles(files, source, reading, copies)


def _listed(files: list[TextFile]) -> list[dict]:
    return [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in files]


# --- for streams -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSource:
    """A resolved source. A group is [file, row group, rows], [file, first byte, end] or [file, 0, 0]: all of it.

    Groups, and the documents in them, are the same wherever and whenever they are read: local files are told apart by
    name, size and both ends.
    """

    name: str  # as the user wrote it, without the revision
    kind: str  # "parquet", "jsonl", "text", "packed text" or "datasets"
    files: list[str]
    groups: list[list[int]]
    text_column: str
    config: str | None = None
    revision: str | None = None  # the Hub's commit; None for local files
    content: str = ""  # sha256 of the names, sizes and ends of local files

    @property
    def sha256(self) -> str:
        """Names the documents and their groups, wherever the files lie."""
        decisive = {**vars(self)}
        if self.revision is None:  # local files may be moved
            decisive |= {"name": "", "files": [Path(file).name for file in self.files]}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def read(self, group: int, reading: Reading, cancel: threading.Event = NEVER) -> Iterator[str]:
        """The documents of one group in the order of the file, without empty ones."""
        index, start, stop = self.groups[group]
        path = self.files[min(index, len(self.files) - 1)]
        format, packed = format_of(path)
        if self.kind == "datasets" and not (packed and format == "jsonl"):
            dataset = self.name, self.config, self.revision, self.files, len(self.groups), index
            documents = reading.dataset(path, *dataset, cancel=cancel)
        else:
            stop = start + 1 if self.kind == "parquet" else stop or None
            documents = reading.documents(path, format, packed, start, stop, cancel)
        return (document for document in documents if document)


def files_or_id(spec: str) -> tuple[list[str], re.Match | None]:
    """(the files here, None) or ([], the Hub's id), as a stream's name means it. Raises: InputError for neither."""
    if files := [str(path) for path in sorted(local_files(spec))]:
        return files, None
    match = text_io.SPEC.fullmatch(spec)
    if match is None or format_of(spec)[0] or PurePosixPath(spec).suffix in {".csv", *text_io.PACKED}:
        raise InputError(f"stream:{spec} names no file here, and is no Hub dataset written as ID[:config][@revision]")
    return [], match


def resolve(spec: str, *, text_column: str = "text") -> TextSource:
    """`ID[:config][@revision]`, a path, a directory or a glob -> TextSource.

    Raises: InputError for what can never be read; errors of the network as they are, so that the caller can retry.
    """
    files, match = files_or_id(spec)
    if match is None:
        groups = _groups(kind := _kind(files, spec), files, text_column, spec, None, None)
        return TextSource(spec, kind, files, groups, text_column, content=sha256_of_ends(files))
    name, config = match["id"], match["config"]
    _, commit, urls = text_io.resolve_hub(name, config, match["revision"])
    groups = _groups(kind := _kind(urls, name), urls, text_column, name, config, commit)
    return TextSource(name, kind, urls, groups, text_column, config, commit)


def _kind(files: list[str], name: str) -> str:
    suffixes = {PurePosixPath(file).suffix for file in files}
    if len(suffixes) > 1 and not any(suffixes <= kind for kind in ({".jsonl", ".ndjson"}, {".txt", ".md"})):
        raise InputError(f"{name} holds files of several formats ({', '.join(sorted(suffixes))}); name one with a glob")
    kinds = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".md": "text"}
    if {("txt", True)} <= set(map(format_of, files)) <= {("txt", True), ("jsonl", True)}:
        return "packed text"  # `datasets`, which read these once, made a document of every line
    return kinds.get(suffixes.pop(), "datasets")


def _groups(kind: str, files: list[str], text_column: str, name: str, config, revision) -> list[list[int]]:
    with ThreadPoolExecutor(16) as pool:  # a footer, or a size, of thousands of files on the Hub
        if kind == "parquet":
            rows = pool.map(lambda path: text_io.row_groups(path, text_column), files)
            groups = [[f, g, count] for f, own in enumerate(rows) for g, (count, _) in enumerate(own) if count]
        elif kind in ("jsonl", "text"):
            step, sizes = LINES_GROUP_BYTES, pool.map(text_io.size_of, files)
            groups = [[f, a, min(a + step, size)] for f, size in enumerate(sizes) for a in range(0, size, step)]
        else:
            own = set(map(format_of, files)) <= {("txt", True), ("jsonl", True)}
            shards = len(files) if own else text_io.iterable_dataset(name, config, revision, files).num_shards
            groups = [[shard, 0, 0] for shard in range(shards)]
    if not groups:
        raise InputError(f"{name} holds no text: its {len(files)} files are empty")
    return groups


# --- documents -------------------------------------------------------------------------------------------------------


def text_of(row, column: str, place: str) -> str | None:
    """The text of a row, or None for null. Raises: InputError, naming the `place`, for a row without such a column."""
    if not isinstance(row, dict) or column not in row:
        columns = ", ".join(row) if isinstance(row, dict) else f"no columns but {type(row).__name__}"
        raise InputError(f"{place}: there is no column {column!r}, only {columns}; set --text_column")
    if row[column] is not None and not isinstance(row[column], str):
        raise InputError(f"{place}: {column!r} holds {type(row[column]).__name__}, not text; set --text_column")
    return row[column]


def pieces_of(text: str) -> Iterator[Piece]:
    """A document as pieces of about PIECE_CHARACTERS that give the same ids as the whole.

    GPT-2's pre-tokeniser never joins across a single newline with something visible on both sides. A text without one
    stays whole.
    """
    return pieces_of_stream([text])


def pieces_of_stream(parts: Iterable[str]) -> Iterator[Piece]:
    """`pieces_of` for a document that arrives in parts; no more than one piece is held in memory."""
    text, searched = "", PIECE_CHARACTERS
    for part in parts:
        text += part
        start = 0
        while len(text) - start > PIECE_CHARACTERS and (cut := SEAM.search(text, start + searched - 1)):
            yield text[start : cut.end()], False
            start, searched = cut.end(), PIECE_CHARACTERS
        text = text[start:]
        searched = max(PIECE_CHARACTERS, len(text) - 1)  # text without a seam is searched only once
    yield text, True


def _whole_text(file: TextFile, path: str, start: int, stop: int | None, ends: bool) -> Iterator[Piece]:
    """The pieces of a text file, or of a stretch of one; `ends`: the document ends with this stretch."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), start

    def decoded() -> Iterator[str]:
        nonlocal position
        for block in itertools.chain(text_io.blocks_of(path, file.packed, start, stop), [b""]):
            position += len(block)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _undecodable(error, file.path, position - len(error.object) + error.start) from None

    for text, end in pieces_of_stream(decoded()):
        yield text, end and ends


def _undecodable(error: UnicodeDecodeError, path: str, offset: int) -> InputError:
    byte = error.object[error.start]
    return InputError(f"{path}: byte {offset} (0x{byte:02x}) is not UTF-8 ({error.reason}); convert the file to UTF-8")
