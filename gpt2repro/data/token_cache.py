"""The text of a stream as token shards on disk, which a second epoch, a restart or an outage of the Hub reads.

    group 7 of a source ── read, tokenise ──> group_000007.bin, every document followed by <|endoftext|>

Ranks and runs may share a cache: a file appears whole or not at all, and all of them write the same bytes. Knows no
lanes and no batches.
"""

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2repro.data.shards import HEADER_BYTES, ShardWriter
from gpt2repro.data.text import Reading, TextSource
from gpt2repro.data.tokenization import Encoder
from gpt2repro.options import InputError

DOCUMENTS_AT_ONCE = 256
DAY_SECONDS = 86400


def make_directory(path: Path) -> None:
    """Make a directory and its parents. Raises: InputError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the cache {path} can't be made ({error.strerror}); choose another --cache_dir") from error


class TokenCache:
    """The groups of a source as shards below `root`. `limit_gib` bounds their size; the oldest are deleted first."""

    def __init__(self, source: TextSource, encoder: Encoder, reading: Reading, root: Path, limit_gib: float | None):
        self.source, self.encoder, self.reading = source, encoder, reading
        self.limit_bytes = None if limit_gib is None else limit_gib * 2**30
        key = hashlib.sha256(f"{source.sha256} {encoder.sha256}".encode()).hexdigest()[:16]
        self.directory = root / key
        make_directory(self.directory)
        for left_behind in self.directory.glob("*.tmp-*"):  # a killed process left it, unless it is being written
            with contextlib.suppress(OSError):
                if left_behind.stat().st_mtime < time.time() - DAY_SECONDS:
                    left_behind.unlink()

    def path(self, group: int) -> Path:
        return self.directory / f"group_{group:06d}.bin"

    def fetch(self, group: int, stop: threading.Event) -> None:
        """Tokenise the group, unless its shard exists."""
        if not self.path(group).exists():
            self.write_shard(self.path(group), self.source.read(group, self.reading, stop))
            self._make_room(self.path(group))

    def read(self, group: int, stop: threading.Event) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, end of each document) of a group that was fetched; a damaged shard is made again."""
        while True:
            try:
                header = np.fromfile(self.path(group), "<i4", 256)
                count = (self.path(group).stat().st_size - HEADER_BYTES) // self.encoder.dtype.itemsize
                if len(header) == 256 and header[2] == count:
                    tokens = np.empty(0, self.encoder.dtype)
                    if count:  # an empty file cannot be mapped
                        tokens = np.memmap(self.path(group), self.encoder.dtype, "r", offset=HEADER_BYTES)
                    if tokens.max(initial=0) < self.encoder.vocab_size:
                        return tokens, np.flatnonzero(tokens == self.encoder.eot_id) + 1
                self.reading.report(f"{self.path(group)} is damaged; its text is tokenised again")
                self.path(group).unlink()
            except FileNotFoundError:  # this or another process deleted it to make room
                self.fetch(group, stop)

    def write_shard(self, path: Path, documents: Iterator[str]) -> dict:
        """Tokenise documents into a shard. Returns its size and sha256. Raises: InputError, also for a full disk."""
        try:
            with ShardWriter(path, self.encoder.vocab_size) as writer:
                while texts := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
                    tokens, text_bytes = self.encoder.encode_joined(texts, [True] * len(texts))
                    writer.append(tokens, len(texts), text_bytes)
                return writer.close()
        finally:
            first = next(iter(self.encoder.unknown), "")
            sentence = f"characters that the tokenizer does not know became <|endoftext|>, the first is {first!r}"
            self.reading.tell((self.encoder.unknown.total(), sentence))

    def _make_room(self, newest: Path) -> None:
        if self.limit_bytes is None:
            return
        files = {}
        for path in self.directory.glob("group_*.bin"):
            with contextlib.suppress(FileNotFoundError):  # another thread or rank made room
                files[path] = path.stat()
        total = sum(facts.st_size for facts in files.values())
        for path in sorted(files.keys() - {newest}, key=lambda path: files[path].st_mtime):
            if total <= self.limit_bytes:
                break
            with contextlib.suppress(PermissionError):  # Windows keeps what is in use
                path.unlink(missing_ok=True)
                total -= files[path].st_size
