"""Bytes and rows of text files, here or on the Hub, read again after a fault of the network.

Faults of the network are retried here and nowhere else. `text` decides which bytes and rows are a document.
"""

import functools
import glob
import io
import itertools
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path, PurePosixPath

from gpt2repro.options import InputError, first_line, say

SPEC = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?")

RETRY_SECONDS, LONGEST_RETRY_SECONDS, RETRIES = 1.0, 300.0, 15  # about an hour together
PASSING_STATUS = {408, 425, 429}  # HTTP errors that may pass, besides every 5xx
# The Hub's client has changed its HTTP library twice; pyarrow complains about a reply that was cut short.
NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "pyarrow")
OUTSIDE = (*NETWORK_LIBRARIES, "huggingface_hub", "datasets", "zlib", "_lzma", "zstandard")
NEVER = threading.Event()

FORMATS = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt", ".md": "txt"
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz", ".zst")
BLOCK_BYTES = 2**20
REMOTE_BLOCK_BYTES = 2**24  # one request to the Hub; its latency of about 0.1 s must not count
WHOLE_CHUNK_BYTES = 2**26  # a column of a row group on the Hub is one request up to this size, else page by page
ROWS_AT_ONCE = 256


def resolve_hub(dataset: str, config: str | None, revision: str | None) -> tuple[str, str, list[str]]:
    """(configuration, commit, hf:// URLs of the train split) of a dataset, pinned to that commit.

    Raises: InputError for what can never be read; errors of the network as they are, so that the caller can retry.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
        builder = load_dataset_builder(dataset, config, revision=commit)
    except GatedRepoError as error:
        raise InputError(f"{dataset} is gated: accept its terms on the Hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"the dataset {dataset} has no revision {revision}") from error
    except (RepositoryNotFoundError, DatasetNotFoundError, HFValidationError) as error:
        raise InputError(
            f"there is no file {dataset} here and no dataset {dataset} on the Hub (or it is private)"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no data files, an unknown configuration, a refused login …
        if may_pass(error):
            raise
        raise InputError(f"{dataset} can't be opened: {first_line(error)}") from error
    data_files = builder.config.data_files or {}
    if not data_files.get("train"):
        raise InputError(f"{dataset} has no train split; it has {', '.join(map(str, data_files)) or 'no data files'}")
    return builder.config.name, commit, [str(url) for url in data_files["train"]]


def resuming(
    open_from: Callable[[int], Iterator],
    what: str,
    *,
    size: Callable = lambda item: 1,
    report: Callable[[str], None] = say,
    stop: threading.Event = NEVER,
) -> Iterator:
    """The items of `open_from(0)`, continued after a fault of the network with `open_from(size of all items so far)`.

    what: the file's path or hf:// URL; only a URL is tried again.
    stop: set by a caller that does not want the items any more.

    Raises: InputError for a fault that will not pass, or has not passed after RETRIES pauses; CancelledError.
    """
    given = attempt = 0
    while True:
        try:
            for item in open_from(given):
                yield item
                given, attempt = given + size(item), 0
                if given_up(stop):
                    raise CancelledError
            return
        except Exception as error:
            if not is_fault(error):
                raise
            if not (what.startswith("hf://") and may_pass(error)):
                raise InputError(f"{what} can't be read: {first_line(error)}") from error
            reason = f"{type(error).__name__}: {first_line(error)}"
            if attempt >= RETRIES:
                raise InputError(
                    f"{what} can't be read after {RETRIES} retries ({reason}); "
                    "the same command continues where it was when the source is back"
                ) from error
            seconds = _seconds_before_retry(error, attempt)
            attempt += 1
            report(f"{what}: {reason}; trying again in {seconds:.1f} s ({attempt} of {RETRIES})")
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if given_up(stop):
                raise CancelledError
            stop.wait(min(0.2, left))


def retrying(call: Callable, what: str, *, report: Callable[[str], None] = say):
    """`call()`, repeated after a pause if the network failed; a local file has one attempt."""
    return next(resuming(lambda given: iter([call()]), what, report=report))


def given_up(stop: threading.Event) -> bool:
    """True if nobody waits for the result any more: `stop` is set, or the program ends, which waits for its threads."""
    return stop.is_set() or not threading.main_thread().is_alive()


def is_fault(error: Exception) -> bool:
    """True for an error whose cause lies outside this program: the network, a file, its bytes."""
    return isinstance(error, OSError | EOFError) or any(
        kind.__module__.startswith(OUTSIDE) for kind in type(error).__mro__
    )


def may_pass(error: BaseException | None) -> bool:
    """Whether trying again may help: time-outs, broken connections, 429 and 5xx; not a missing file or permission."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
        return status in PASSING_STATUS or status >= 500
    if isinstance(error, LocalEntryNotFoundError):  # no reply, and no copy here
        return may_pass(error.__cause__)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | OfflineModeIsEnabled):
        return False
    return isinstance(error, OSError | EOFError) or type(error).__module__.startswith(NETWORK_LIBRARIES)


def _seconds_before_retry(error: Exception, attempt: int) -> float:
    """The pause that the server asks for, else a doubling one; with jitter, so that ranks do not all come at once."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    pause = float(asked) if asked.isdigit() else RETRY_SECONDS * 2**attempt
    return min(pause, LONGEST_RETRY_SECONDS) * random.SystemRandom().uniform(1.0, 1.5)


def local_files(item: str) -> list[Path]:
    """The files that a path, a directory (everything in it that is not hidden) or a glob names."""
    path = Path(item)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(item, recursive=True))
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


def format_of(path: str | Path) -> tuple[str | None, bool]:
    """(format, packed) by suffix; the format is None where the suffix is unknown."""
    name = PurePosixPath(str(path).lower())
    packed = name.suffix in PACKED
    return FORMATS.get(PurePosixPath(name.stem).suffix if packed else name.suffix), packed


def lines_of(path: str, packed: bool, start: int, stop: int | None, resumed=resuming) -> Iterator[tuple[int, bytes]]:
    """(first byte, line with its end) of the lines that begin in the bytes [start, stop) of a file, unpacked.

    Lines end at a newline only: Unicode's other separators are text.
    """
    ahead = min(REMOTE_BLOCK_BYTES, max(BLOCK_BYTES, (stop or REMOTE_BLOCK_BYTES) - start))
    position, inside, parts = max(start - 1, 0), start == 0, []
    for block in itertools.chain(blocks_of(path, packed, position, None, resumed, ahead), [b""]):
        head, *others = block.split(b"\n")
        parts.append(head)
        for following in others if block else [b""]:
            if stop is not None and position >= stop:
                return
            line = b"".join(parts) + (b"\n" if block else b"")
            if inside and line:
                yield position, line
            inside, position, parts = True, position + len(line), [following]


def blocks_of(path: str, packed: bool, start: int, stop: int | None, resumed=resuming, ahead=REMOTE_BLOCK_BYTES):
    """The bytes [start, stop) of a file, unpacked."""

    def read_from(given: int) -> Iterator[bytes]:
        position = start + given
        with open_bytes(path, block_size=ahead) as raw:
            end = raw.seek(0, io.SEEK_END) if stop is None else stop
            raw.seek(0)
            stream = _unpack(raw, path) if packed else raw
            if position:
                stream.seek(position)
            while block := stream.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position)):
                position += len(block)
                yield block
        if not packed and position < end:
            raise EOFError(f"it ends at byte {position}")  # a connection that closed early

    return resumed(read_from, path, size=len)


def _unpack(raw, path: str):
    import fsspec.utils
    from fsspec.compression import compr

    # fsspec knows the methods whose packages are installed.
    if (method := fsspec.utils.infer_compression(path.lower())) is None:
        raise InputError(f"{path} can't be unpacked here; unpack it first, or pip install zstandard")
    return compr[method](raw, mode="rb")


def open_bytes(path: str, **options):
    """A file, opened for reading bytes; fsspec takes the options for a file on the Hub."""
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(path, "rb", **options)
    return open(path, "rb")


def size_of(path: str) -> int:
    with open_bytes(path) as raw:
        return raw.seek(0, io.SEEK_END)


def row_group(path: str, group: int, column: str, skip: int) -> Iterator[str | None]:
    """The texts of one row group after the first `skip`."""
    from pyarrow import parquet

    footer = _footer(path)
    size = _chunk(footer.row_group(group), column).total_compressed_size
    at_once = path.startswith("hf://") and size <= WHOLE_CHUNK_BYTES
    with open_bytes(path, **({"cache_type": "none"} if at_once else {"block_size": REMOTE_BLOCK_BYTES})) as raw:
        file = parquet.ParquetFile(
            raw, metadata=footer, buffer_size=0 if at_once else BLOCK_BYTES, pre_buffer=at_once,
            page_checksum_verification=True,
        )  # fmt: skip
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
            yield from batch.column(0)[skip:].to_pylist()
            skip = max(0, skip - len(batch))


def row_groups(path: str, column: str) -> list[tuple[int, int]]:
    """(rows, bytes of text) of every row group, from the footer. Raises: InputError if there is no such text column."""
    footer = _footer(path)
    schema = footer.schema.to_arrow_schema()
    if column not in schema.names:
        raise InputError(f"{path}: there is no column {column!r}, only {', '.join(schema.names)}; set --text_column")
    kind = str(schema.field(column).type)
    if "string" not in kind.split("<")[0] and not kind.startswith("dictionary<values=string") and kind != "null":
        raise InputError(f"{path}: {column!r} holds {kind}, not text; set --text_column")
    groups = map(footer.row_group, range(footer.num_row_groups))
    return [(group.num_rows, _chunk(group, column).total_uncompressed_size) for group in groups]


def _chunk(group, column: str):
    """The metadata of one column of a row group."""
    return next(chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema == column)


def _footer(path: str):
    """A parquet file's metadata. That of a pinned file is kept: it has about a megabyte for a thousand row groups."""
    return _pinned_footer(path) if path.startswith("hf://") else _read_footer(path)


def _read_footer(path: str):
    import pyarrow
    from pyarrow import parquet

    with open_bytes(path, cache_type="none") as raw:
        try:
            return parquet.read_metadata(raw)
        except pyarrow.ArrowInvalid as error:  # a file on the Hub may be whole the next time
            kind = OSError if path.startswith("hf://") else InputError
            raise kind(f"{path} is cut off, damaged or not parquet") from error


_pinned_footer = functools.lru_cache(maxsize=64)(_read_footer)


def iterable_dataset(name: str, config: str | None, revision: str | None, files: list[str]):
    from datasets import load_dataset

    if revision is None:
        paths = [str(Path(file).resolve()) for file in files]
        return load_dataset(str(Path(paths[0]).parent), data_files=paths, split="train", streaming=True)
    return load_dataset(name, config, revision=revision, split="train", streaming=True)


def character_start(path: str, at: int) -> int:
    """The first byte from `at` on that begins a character."""
    with open_bytes(path) as raw:
        raw.seek(at)
        return at + next((i for i, byte in enumerate(raw.read(4)) if byte & 0xC0 != 0x80), 0)


def after_seam(path: str, at: int, stop: int) -> int:
    """The first place from `at` on where a text can be cut without changing a token, or `stop`."""
    with open_bytes(path) as raw:
        raw.seek(at)
        while len(block := raw.read(min(BLOCK_BYTES, stop - at))) > 2:
            if match := re.search(rb"[!-~]\n(?=[!-~])", block):
                return at + match.end()
            at += len(block) - 2  # a seam may lie across the border of two blocks
            raw.seek(at)
    return stop
