"""Text to tokens and back: GPT-2's own tokenizer, a character-level one, and byte-level BPE trained on the corpus.

Every tokenizer is an ordinary fast Hugging Face tokenizer: `save_pretrained` writes it and `AutoTokenizer` reads it,
without remote code. `<|endoftext|>` is its end, begin, unknown and padding token, and always the last id. `Encoder` is
the same tokenizer for bulk work: it returns numpy arrays, finds no special token in a text, and is cheap to send to a
worker process. GPT-2's ids come from tiktoken.

This module knows nothing of files of text or of shards. It imports transformers only where a tokenizer object is made
or loaded, so a worker process starts in a fraction of a second.
"""

import hashlib
import itertools
import json
import re
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gpt2repro.data.shards import TOKENIZER, token_dtype
from gpt2repro.files import refuse_pipes
from gpt2repro.options import InputError, first_line, say

EOT = "<|endoftext|>"
# What every tokenizer has: one special token for all purposes, and the length of GPT-2's context.
SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOT)
SPECIAL |= {"model_max_length": 1024, "clean_up_tokenization_spaces": False}

# fingerprint() of GPT-2's tokenizer: 50,256 tokens, 50,000 merges, `<|endoftext|>` = 50256.
GPT2_FINGERPRINT = "6e90823440e1947fccf4360914621733e44f0382ee0cb03be09a6711c63dab88"

# Source: GPT-2's encoder.py. The parts without lookahead are one group, which tiktoken's regex engine passes to Rust's
# faster `regex`: 0.14 ms per 1,000 tokens of prose, against 0.23 for tiktoken's own form of the same pattern.
GPT2_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""

# Long runs of Unicode's White_Space, which is the \s above (Python's is wider).
_LONG_RUN = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")


class UnknownCharacter(InputError):
    """A text holds a character that the tokenizer has no id for."""


def gpt2_tokenizer():
    """GPT-2's tokenizer, rebuilt from tiktoken's ranks.

    Raises: InputError if tiktoken can neither download its two vocabulary files nor find them in its cache.
    """
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    # The many errors of requests, a full disk, another hash: the user can do the same about each.
    except Exception as error:
        raise InputError(
            f"GPT-2's vocabulary can't be downloaded ({type(error).__name__}). Set TIKTOKEN_CACHE_DIR to a directory "
            "that holds tiktoken's cache (filled by `tiktoken.get_encoding('gpt2')` on a machine with network), "
            "or choose --tokenizer bpe or char, which need no download"
        ) from error
    symbols = bytes_to_unicode()  # the printable character that stands for each byte in a byte-level vocabulary
    text = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    vocab = {text[token]: rank for token, rank in ranks.items()}
    # The merge that makes a token joins the two parts which the merges of lower rank leave.
    pairs = (_split_by_ranks(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1)
    return _byte_level_tokenizer(vocab, [(text[left], text[right]) for left, right in pairs])


def char_tokenizer(texts: Iterable[str]):
    """One token per character of `texts`, numbered as in nanoGPT; all other characters are unknown.

    Raises: InputError for empty texts.
    """
    characters = set()
    for text in texts:
        characters.update(well_formed(text))
    if not characters:
        raise InputError("a character tokenizer needs text, and there is none")
    return tokenizer_of_characters([*sorted(characters), EOT], unknown=EOT, **SPECIAL)


def tokenizer_of_characters(tokens: list[str], *, unknown: str, **how):
    """One token per character, with its place in `tokens` as id; a character that is not there becomes `unknown`.

    `how` is for the tokenizer's class: special tokens, the model's length.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: id for id, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **how)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE with GPT-2's pre-tokenisation, trained on `texts`.

    Every text can be encoded, since all 256 bytes are tokens. A small corpus may give fewer than `vocab_size` entries.

    Raises: InputError for an impossible `vocab_size`, and for a corpus without pairs.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if not 257 <= vocab_size <= 2**20:
        raise InputError(
            f"vocab_size={vocab_size}: a byte-level vocabulary has 257 (bytes and {EOT}) to 1,048,576 entries"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # and <|endoftext|>
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((well_formed(text) for text in texts), trainer)
    model = json.loads(backend.to_str())["model"]
    if len(model["vocab"]) == 256:
        raise InputError(
            "a BPE tokenizer needs text to be trained on, and there is hardly any; choose --tokenizer char"
        )
    return _byte_level_tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])


def load_tokenizer(source: str | Path):
    """The tokenizer of a data set, a checkpoint, a directory or a Hub id (also `user/name@revision`).

    Raises: InputError if there is none, or it is damaged.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    source = Path(source) / TOKENIZER if (Path(source) / TOKENIZER).is_dir() else source
    name, _, revision = (str(source), "", "") if Path(source).exists() else str(source).partition("@")
    if Path(source).is_dir():
        refuse_pipes(Path(source))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns that it does not know the type of a model it need not know here
    try:
        # Without trust_remote_code=False transformers asks a question on stdin if a checkpoint carries model code.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"its model_max_length is {str(tokenizer.model_max_length)[:80]!r}, expected a number")
        return tokenizer
    except Exception as error:  # a damaged file can make the libraries raise anything
        raise InputError(f"no tokenizer could be loaded from {source}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def fingerprint(tokenizer) -> str:
    """sha256 of what decides the ids: vocabulary, merges, special ids; the same after saving and loading.

    Two tokenizers with the same fingerprint mean the same by every id, even if their files differ.

    Raises: InputError for a tokenizer that is not a fast one.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{tokenizer.name_or_path} is no fast tokenizer (no tokenizer.json), which this program needs")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    vocab = model["vocab"]
    decisive = [
        model["type"],
        sorted(vocab.items()) if isinstance(vocab, dict) else vocab,
        model.get("merges", []),
        sorted((token["content"], token["id"]) for token in content["added_tokens"]),
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(decisive, ensure_ascii=True).encode()).hexdigest()


def well_formed(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate, which UTF-8 cannot encode. Source: tiktoken's own rule."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def unknown_characters(tokenizer, text: str) -> list[str]:
    """The characters of `text` that a character tokenizer would read as `<|endoftext|>`; others know every text."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if type(model).__name__ != "WordLevel":
        return []
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    return [] if any(len(word) > 1 for word in words) else sorted(set(text.replace(EOT, "")) - words)


class Encoder:
    """A tokenizer for bulk work: `encode_batch(texts)` gives one array of ids per text.

    No special token is added and none is recognised: the characters `<|endoftext|>` in a document are ordinary text.
    Pickling copies it to a spawned process. `fast=True` uses the `gigatoken` package (GPT-2 only) if a check finds that
    it gives tiktoken's ids; `uses_gigatoken` is the result. A character tokenizer refuses an unknown character
    (UnknownCharacter); with `count_unknown` it becomes `<|endoftext|>` and is counted in `unknown`.
    """

    def __init__(self, tokenizer, *, fast: bool = False, count_unknown: bool = False):
        self.count_unknown, self.unknown = count_unknown, Counter()
        self.sha256 = fingerprint(tokenizer)
        by_character = type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel"
        self.kind = "gpt2" if self.sha256 == GPT2_FINGERPRINT else "char" if by_character else "bpe"
        self.vocab_size, self.eot_id = len(tokenizer), tokenizer.eos_token_id
        if self.eot_id is None or not 0 <= self.eot_id < self.vocab_size:
            raise InputError(
                f"the tokenizer's end-of-text token is {self.eot_id}, outside its vocabulary of {self.vocab_size}; "
                "every document ends with one"
            )
        self.dtype = token_dtype(self.vocab_size)
        if self.kind == "gpt2":
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            values = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
            vocab = {token: id for token, id in tokenizer.get_vocab().items() if token != EOT}
            self._ranks = {bytes(map(values.get, token)): id for token, id in vocab.items()}
        elif self.kind == "char":
            self._vocab = tokenizer.get_vocab()
        else:
            self._json = tokenizer.backend_tokenizer.to_str()
        self.uses_gigatoken, self._strange = False, None
        self._prepare()
        if fast and self.kind == "gpt2":
            self._strange, why_not = _gigatoken_disagreements(self._tiktoken)
            self.uses_gigatoken = self._strange is not None
            if why_not:
                say(f"{why_not}; tiktoken does the work")
            self._prepare()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, as arrays of `self.dtype`."""
        return [ids.astype(self.dtype, copy=False) for ids in self._encode([well_formed(text) for text in texts])]

    def encode_joined(self, texts: list[str], ends: list[bool]) -> tuple[np.ndarray, int]:
        """(ids of all texts as one array of `self.dtype`, size of the texts in UTF-8 bytes).

        `eot_id` follows every text that ends a document, as `ends` says.
        """
        texts = [well_formed(text) for text in texts]
        end = np.array([self.eot_id], self.dtype)
        parts = [part for ids, last in zip(self._encode(texts), ends, strict=True) for part in (ids, end[:last])]
        tokens = np.concatenate([end[:0], *parts], dtype=self.dtype, casting="unsafe")
        return tokens, sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

    def _prepare(self) -> None:
        """Build the parts that cannot be pickled, or are quicker to build than to send."""
        if self.kind == "gpt2":
            import tiktoken

            self._tiktoken = tiktoken.Encoding(
                "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=self._ranks, special_tokens={EOT: self.eot_id}
            )
            self._gigatoken = _gigatoken(self._ranks) if self.uses_gigatoken else None
        elif self.kind == "char":
            ids = {ord(token): id for token, id in self._vocab.items() if len(token) == 1}
            self._table = np.full(max(ids) + 2, self.eot_id, self.dtype)  # the last entry: all higher code points
            self._table[list(ids)] = list(ids.values())
        else:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(self._json)
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of well-formed texts, of any integer type."""
        if self.kind != "bpe":
            return list(map(self._encode_gpt2 if self.kind == "gpt2" else self._encode_characters, texts))
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _encode_gpt2(self, text: str) -> np.ndarray:
        if self.uses_gigatoken and (text.isascii() or not self._strange[_code_points(text)].any()):
            return self._gigatoken.encode(text)
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the stack of the regex engine is too small for a run of a million spaces
            # The pattern ends a token before the last space of a run (and after a run that ends the text).
            cuts = [0, *(run.end() - 1 for run in _LONG_RUN.finditer(text) if run.end() < len(text)), len(text)]
            parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
            return np.concatenate([self._tiktoken.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def _encode_characters(self, text: str) -> np.ndarray:
        ids = self._table[np.minimum(_code_points(text), len(self._table) - 1)]
        if (unknown := ids == self.eot_id).any():
            if not self.count_unknown:
                at = int(np.argmax(unknown))
                raise UnknownCharacter(
                    f"the character {text[at]!r} (U+{ord(text[at]):04X}) behind {text[max(0, at - 20) : at]!r} "
                    "is not in the tokenizer's vocabulary; choose gpt2's, or one made of this text"
                )
            self.unknown.update(text[at] for at in np.flatnonzero(unknown))
        return ids

    def __getstate__(self):
        built = ("_tiktoken", "_gigatoken", "_table", "_backend")
        return {name: value for name, value in self.__dict__.items() if name not in built}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._prepare()


def _byte_level_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]):
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast(vocab={**vocab, EOT: len(vocab)}, merges=merges, **SPECIAL)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _split_by_ranks(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of `token` after every merge of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        first = merged.index(min(merged))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _gigatoken(ranks: dict[bytes, int]):
    """A gigatoken tokenizer with tiktoken's ranks and no special tokens."""
    import gigatoken

    lines = [b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "gpt2.tiktoken")
        path.write_bytes(b"".join(lines))
        return gigatoken.Tokenizer.from_tiktoken(str(path), pretokenizer="gpt2", special_tokens={})


def _gigatoken_disagreements(encoding) -> tuple[np.ndarray | None, str | None]:
    """(table over all code points: True sends a text to tiktoken, None), or (None, why gigatoken cannot be used).

    gigatoken and tiktoken carry different versions of Unicode, so they disagree about letters that only one of them
    knows. Every code point of the planes in use is probed between a letter, a digit, a space and a contraction, which
    reveals its class (about two seconds). Texts of the empty and private planes always go to tiktoken.
    """
    try:
        fast = _gigatoken(encoding._mergeable_ranks)
    except ImportError:
        return None, "gigatoken is not installed (pip install 'gpt2repro[fast-tokenizer]')"

    def differs(text: str) -> bool:
        return not np.array_equal(fast.encode(text), encoding.encode_to_numpy(text, disallowed_special=()))

    def probe(code: int) -> str:
        c = chr(code)
        return f"a{c}'s{c}1 {c}!{c}"

    if differs("It's  10 o'clock\n\n\tIT'S <|endoftext|> naïve 你好 🙂🙂  \r\n" + "x" * 1000 + " " * 1000):
        return None, "this version of gigatoken does not give tiktoken's ids"
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    blocks = [codes[i : i + 512] for i in range(0, len(codes), 512)]
    suspects = [code for block in blocks if differs("".join(map(probe, block))) for code in block]
    strange = [code for code in suspects if differs(probe(code))]
    if any(code < 128 for code in strange):
        return None, "this version of gigatoken does not give tiktoken's ids for ASCII"
    table = np.ones(0x110000, bool)
    table[codes] = False
    table[strange] = True
    return table, None
