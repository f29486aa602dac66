"""Make a data set of tokens from text: Python's own documentation, tiny shakespeare, or your files.

    gpt2repro prepare-text --corpus python-docs --out data/python-docs
    gpt2repro prepare-text --corpus shakespeare --tokenizer char --out data/shakespeare
    gpt2repro prepare-text --input my/texts 'more/*.jsonl' --text_column content --out data/mine
    gpt2repro prepare-text --input user/dataset --tokenizer gpt2 --out data/theirs
    gpt2repro prepare-text --input my/texts --tokenizer runs/quickstart --out data/more     to go on with a model

Reads .txt and .md (a file is a document), .jsonl and .parquet (a row is a document), from files, directories, globs
or a dataset on the Hub. Takes seconds for a few megabytes. For gigabytes use `prepare_fineweb.py`: it has the same
engine and more options.
"""

import atexit
import hashlib
import heapq
import lzma
import platform
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gpt2repro.data.preparation import check_place, hash_of, prepare, split_of, tokenizer_of_plan
from gpt2repro.data.python_docs import python_docs
from gpt2repro.data.shards import TOKENIZER, Manifest
from gpt2repro.data.text import TEXT_CUT_VERSION, find_text, pieces_of
from gpt2repro.data.tokenization import bpe_tokenizer, char_tokenizer, fingerprint, gpt2_tokenizer, load_tokenizer
from gpt2repro.options import AtLeastOne, Fraction, InputError, Problems, parse_options

# Source: the corpus of nanoGPT's shakespeare examples, public domain.
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

MADE = ("gpt2", "char", "bpe")  # the tokenizers that this program makes; any other name is a place
# The bpe vocabulary is learned from at most this much text; more text changes it little and takes minutes.
TOKENIZER_TRAINING_BYTES = 2**28
# Text up to this size is compressed with xz, which takes about a second per megabyte.
XZ_BYTES = 2**25


@dataclass
class Options:
    out: Path
    "Directory of the data set."
    corpus: Literal["python-docs", "shakespeare"] | None = None
    "A corpus this program knows."
    input: list[str] = field(default_factory=list)
    "Your own text: files, directories, globs, or one dataset id of the Hub (ID[:config][@revision])."
    text_column: str = "text"
    "The field of jsonl and parquet rows that holds the text."
    tokenizer: str = "bpe"
    "gpt2 (50,257 tokens), char, bpe (learned from the train split), or a run, directory or Hub id whose one to take."
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 2048
    "Entries of the vocabulary that bpe learns."
    val_fraction: Fraction = 0.1
    "Part of the text kept for validation."
    split: Literal["auto", "document", "position"] = "auto"
    "Whole documents chosen by hash, or the end of every document; auto: by position below 100 documents."
    text_document_bytes: AtLeastOne | None = None
    "Cut plain text into documents of the lines that begin in so many bytes (streams: 16384); none: a file is one."
    shard_tokens: Annotated[int, Field(gt=0, lt=2**31)] = 100_000_000
    "About how many tokens go into one shard."
    workers: AtLeastOne | None = None
    "Tokenising processes; none: one per core."
    overwrite: bool = False
    "Replace another data set in --out."

    def problems(self) -> Problems:
        if not self.input and self.corpus is None:
            yield "say what to read: --corpus python-docs, --corpus shakespeare, or --input PATH…"
        if self.input and self.corpus == "python-docs":
            yield "--corpus python-docs reads nothing else; drop --input or --corpus"
        if self.tokenizer not in MADE and "/" not in self.tokenizer and not Path(self.tokenizer).exists():
            yield f"--tokenizer {self.tokenizer}: expected {', '.join(MADE)}, a run, a directory or user/name"
        if self.split == "position" and self.corpus == "python-docs":
            yield "--corpus python-docs is split by document; drop --split position"


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro prepare-text", description=__doc__)
    check_place(options.out)
    start = time.perf_counter()
    corpus = _open_corpus(options)
    if corpus.split == "document":
        options.val_fraction = _fraction_of_a_document(corpus, options.val_fraction)
    given = None if options.tokenizer in MADE else load_tokenizer(_place_of_tokenizer(options.tokenizer))
    named = options.tokenizer if given is None else fingerprint(given)  # a model may move
    settings = {"split": corpus.split, "text_column": options.text_column, "tokenizer": named}
    if options.tokenizer == "bpe":
        settings["vocab_size"] = options.vocab_size
    if options.text_document_bytes is not None:
        settings |= {"text_document_bytes": options.text_document_bytes, "text_cut": TEXT_CUT_VERSION}

    def text_of(split: str) -> Iterator[str]:
        """The text of one split in pieces, with the split that `prepare` will make."""
        for unit in corpus.units:
            if unit["split"] in (None, split):
                for document in corpus.read(unit):
                    belongs = unit["split"]
                    for text, _ in document:
                        belongs = belongs or split_of(text, options.val_fraction)
                        if belongs != split:
                            break
                        yield text

    tokenizer = given or tokenizer_of_plan(options.out, corpus.source, settings)
    if tokenizer is None:
        tokenizer = _make_tokenizer(options, text_of)

    def compressed_sizes() -> dict:
        """Sizes of the validation text under xz -9, alone and after the training text: a model should do better."""
        if sum(unit["bytes"] for unit in corpus.units) > XZ_BYTES:
            return {}
        train, val = ("".join(text_of(split)).encode("utf-8", "replace") for split in ("train", "val"))
        size = {name: len(lzma.compress(text, preset=9)) for name, text in (("val", val), ("train", train))}
        given_train = len(lzma.compress(train + val, preset=9)) - size["train"]
        return {"xz_bytes": size["val"], "xz_bytes_given_train": given_train}

    manifest = prepare(
        options.out, tokenizer, corpus.units, corpus.read, source=corpus.source, settings=settings,
        val_fraction=options.val_fraction, workers=options.workers, overwrite=options.overwrite,
        describe_val=compressed_sizes, place=corpus.place,
    )  # fmt: skip
    corpus.tell()
    _report(options.out, manifest, time.perf_counter() - start)
    return 0


@dataclass
class Corpus:
    """What `prepare` needs to know about a source."""

    units: list[dict]
    read: object  # unit -> iterable of documents, each an iterable of pieces
    source: dict
    split: str
    "document or position"
    place: Callable[[dict], str] = lambda unit: "the corpus"
    tell: Callable[[], None] = lambda: None


def _open_corpus(options: Options) -> Corpus:
    if options.corpus == "python-docs":
        texts = list(python_docs())
        if not texts:
            raise InputError("this Python has neither help topics nor the standard library's sources; use --input")
        unit = {"split": None, "bytes": sum(map(len, texts))}
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        source = {"corpus": "python-docs", "python": platform.python_version(), "sha256": digest}
        return Corpus([unit], lambda unit: map(pieces_of, texts), source, "document")
    inputs = options.input or [str(_shakespeare())]
    files = find_text(inputs, text_column=options.text_column, document_bytes=options.text_document_bytes)
    split = options.split
    if split == "auto":
        few = len(files.files) < 100 and all(file.format == "txt" and not file.packed for file in files.files)
        split = "position" if few and options.text_document_bytes is None else "document"
    units = files.units(options.shard_tokens, val_fraction=options.val_fraction if split == "position" else None)
    return Corpus(units, files.read, files.source, split, files.place, files.reading.tell)


def _fraction_of_a_document(corpus: Corpus, val_fraction: float) -> float:
    """`val_fraction`, or a larger one that the hash of one document falls below, where that of none does."""
    hashes = set()
    for unit in corpus.units if val_fraction else ():
        for document in corpus.read(unit):
            text, _ = next(iter(document))
            if (number := hash_of(text)) < val_fraction * 2**64:
                return val_fraction
            if text:
                hashes.add(number)
    if len(hashes) < 2:
        return val_fraction
    lowest, next_lowest = heapq.nsmallest(2, hashes)
    print(f"the hashes of these few documents leave none to --val_fraction {val_fraction}; the lowest one is taken")
    return (lowest + next_lowest) / 2**65


def _place_of_tokenizer(name: str) -> str:
    """Where a model's or a data set's tokenizer lies: of a run, in its best checkpoint."""
    from gpt2repro.checkpoint.reader import resolve_model  # imports torch

    has_one = (Path(name) / "tokenizer.json").is_file() or (Path(name) / TOKENIZER).is_dir()
    return name if has_one else resolve_model(name, any_architecture=True)


def _make_tokenizer(options: Options, text_of):
    if options.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if options.tokenizer == "char":  # from both splits, as in nanoGPT: each character of val needs an id
        return char_tokenizer(text for split in ("train", "val") for text in text_of(split))
    return bpe_tokenizer(_first_bytes(text_of("train"), TOKENIZER_TRAINING_BYTES), options.vocab_size)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def _shakespeare() -> Path:
    """Download tiny shakespeare (1.1 MB) and compare its checksum. Raises: InputError if that fails."""
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
            content = response.read()
    except OSError as error:
        raise InputError(f"{SHAKESPEARE} can't be downloaded ({error}); give a copy of it with --input FILE") from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise InputError(f"{SHAKESPEARE} is not the text it was; give a copy of it with --input FILE")
    path = Path(tempfile.mkdtemp(prefix="gpt2repro-")) / "tiny_shakespeare.txt"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    path.write_bytes(content)
    return path


def _report(out: Path, manifest: Manifest, seconds: float) -> None:
    tokenizer = manifest["tokenizer"]
    print(f"{out}: {tokenizer['kind']} tokenizer, {tokenizer['vocab_size']:,} entries, {seconds:.1f} s")
    for name, split in manifest["splits"].items():
        sizes = f"{split['tokens']:>13,} tokens {split['documents']:>9,} documents {split['bytes']:>13,} bytes"
        known = "xz_bytes" in split and split["bytes"]
        xz = f", xz -9: {8 * split['xz_bytes'] / split['bytes']:.3f} bits per byte" if known else ""
        print(f"  {name:5} {sizes}{xz}")
