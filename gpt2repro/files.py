"""Files on a disk: hashed, written so that a reader sees either the old or the new content, and read with limits.

Owns bytes, JSON and JSON lines. Knows no format of this project; text and tokens have their own modules in `data/`.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from gpt2repro.options import InputError

LARGEST_JSON_BYTES = 64 << 20  # ours have a few kB; a hostile file must not fill the memory
LARGEST_LINE_BYTES = 16 << 20


def sha256_of(path: str | Path) -> str:
    """The file's sha256 in hexadecimal, in O(1) memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):  # hashlib releases the interpreter's lock for such blocks
            digest.update(block)
    return digest.hexdigest()


def sha256_of_ends(paths: Iterable[str | Path]) -> str:
    """One sha256 of the names, sizes and both ends of files, in this order: it identifies them without reading all."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, size - (1 << 16)))
            digest.update(json.dumps([path.name, size]).encode() + head + file.read())
    return digest.hexdigest()


def is_plain_name(name: str) -> bool:
    """Whether a name from outside is relative, stays inside its directory, and means the same on every system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & set("\\:\0")


def step_in_name(path: Path) -> int:
    """The optimizer step in a name such as step_000500 or step_000500.md; 0 where there is none."""
    return int(re.sub(r"\D", "", path.stem) or 0)


# --- writing ---------------------------------------------------------------------------------------------------------


def name_aside(path: Path) -> Path:
    """A temporary name beside `path`, different for every writer on every machine."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file that appears under `path`, whole and on the disk, when the block ends; an error leaves no file.

    A device or a pipe (/dev/null, /dev/stdout) is written to: a rename would put an ordinary file in its place.
    """
    path = Path(path)
    aside = name_aside(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open(mode, **text) as file:
            yield file
        return
    try:
        with aside.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write a small JSON file atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_outputs(*paths: Path | None, read: Iterable[str | Path | None] = ()) -> None:
    """Check, before the work, that a result can be written to each path. Raises: InputError if not.

    `read` are the names of what the work reads; those that are files here are not written over.
    """
    given = [Path(os.path.abspath(path)) for path in paths if path is not None]
    places = [os.stat(path)[1:3] if os.path.exists(path) else os.path.realpath(path) for path in given]
    sources = [Path(name) for name in read if name is not None and os.path.isfile(name)]
    for path, place in zip(given, places, strict=True):
        if os.path.exists(path) and any(path.samefile(source) for source in sources):
            raise InputError(f"{path} is what is read, so no result is written to it; choose another place")
        if places.count(place) > 1:  # also behind a link
            raise InputError(f"two results would be written to {path}; choose another place for one of them")
        is_new = not os.path.lexists(path)
        write_output(path, "", mode="a")
        if is_new:
            path.unlink(missing_ok=True)


def write_output(path: Path, text: str, mode: str = "w") -> None:
    """Write a result to a path that a user named. Raises: InputError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None


def publish(aside: Path, path: Path) -> None:
    """Rename a finished, synced file to its name, and sync the rename."""
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the renames inside a folder to the disk."""
    if os.name == "posix":  # Windows cannot open a folder, and journals renames
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading what others wrote ---------------------------------------------------------------------------------------


def refuse_pipes(directory: Path) -> None:
    """Raises: InputError for a pipe or a device in a directory, from which a library would read without an end."""
    for path in directory.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is no ordinary file; replace it, or move it away")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises: InputError for a file that is missing, too large, damaged or no object."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes; more than {LARGEST_JSON_BYTES} are not read")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_json_if_whole(path: Path) -> dict | None:
    """The object in a JSON file, or None if it cannot be read."""
    try:
        return read_json(path)
    except (InputError, OSError):
        return None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank, one line in memory at a time.

    Lines end at a newline only: U+2028 and U+0085 may stand inside a JSON string.

    Raises: InputError naming file and line, for a line that is no JSON, no UTF-8, too deep or longer than 16 MiB.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE_BYTES + 1), b""), start=1):
            if len(line) > LARGEST_LINE_BYTES:
                raise InputError(f"{path}, line {number}: longer than {LARGEST_LINE_BYTES} bytes")
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from None
