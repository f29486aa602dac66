"""Documents that hold a benchmark's text: found by 13-grams of words while a corpus is tokenised.

    texts of the benchmarks' examples ── 13-grams ──▶ sorted 64-bit hashes ─┐
    documents of the corpus ──────────── 13-grams ──▶ 64-bit hashes ────────┴─▶ pairs (document, example)

A word is a run of letters and digits in lower case. What stands between words never counts: spaces, line ends,
punctuation, underscores. An example is found in every document that holds 13 of its words in a row, wherever
they stand in it, in any case, with any punctuation and any white space between the words.

Not found: an example of fewer than 13 words (counted as `too_short`); a copy that has a word more, less or other at
least every 13 words, such as a paraphrase, a translation, or one with a tag like <b> in it; words that are divided or
joined otherwise ("don't" is the two words of "don t", "dont" is one); a letter and its accent written as one character
here and as two there; languages without spaces between their words.

GPT-3's rule is "a lowercase, whitespace delimited word with no punctuation" (arXiv 2005.14165, appendix C). There
"don't" is the one word "dont". There, too, only 200 characters around a hit are removed, and 13-grams that more than
ten documents share are ignored; here the whole document counts, and the report says how many documents share a hit.

A hit is two equal 64-bit hashes: by chance, 10^10 words and 10^6 13-grams make one with a probability of 0.0005. Equal
are also words whose first 64 letters are, and letters beyond ASCII whose code points are a multiple of 128 apart.
Knows no task, no file of text and no token. Runs in the tokenising processes, as numpy over the characters of a batch.
"""

import functools
import hashlib
import json
import re
from collections import ChainMap, Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2repro.data.shards import MANIFEST
from gpt2repro.files import read_json
from gpt2repro.options import InputError

WORDS = 13  # Source: GPT-3's paper, appendix C; lm-evaluation-harness' decontamination uses the same length
BLOCK_CHARACTERS = 2**17  # are hashed at a time: few calls of numpy, and arrays that fit a cache
BETWEEN_WORDS = re.compile(r"[\W_]")  # exactly the characters that are not isalnum()

MOST_LETTERS = 64  # longer words are told apart by their first letters
POWERS = [np.uint64(pow(0x9E3779B97F4A7C15, i, 2**64)) for i in range(WORDS)]
FIRST_PASS_BITS = 25  # the high bits of a hash that are looked up first, in 4 MiB


class Decontamination:
    """The 13-grams of benchmarks, sorted by hash. Pickling copies it to a spawned process.

    examples: task -> its examples, each as the texts that it may appear as.
    drop: leave documents with a hit out; else they are only counted.
    """

    def __init__(self, examples: dict[str, list[list[str]]], *, drop: bool):
        self.drop, self.tasks = drop, {}
        self._examples = [(task, index) for task, own in examples.items() for index in range(len(own))]
        all_texts = [texts for own in examples.values() for texts in own]
        texts = [text for texts in all_texts for text in texts]
        hashes, starts, stops = map(np.concatenate, zip(*_ngrams("\n".join(texts)), strict=True))
        first, last = _text_at(texts, starts), _text_at(texts, stops)
        owners = np.repeat(np.arange(len(all_texts)), list(map(len, all_texts)))[first]
        hashes, owners = hashes[first == last], owners[first == last]
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        new = (np.diff(hashes, prepend=~hashes[:1]) != 0) | (np.diff(owners, prepend=owners[:1]) != 0)
        self._hashes, self._owners = hashes, owners = hashes[new], owners[new]
        known = np.zeros(2**FIRST_PASS_BITS, bool)  # is there a hash that begins with these bits?
        known[hashes >> (64 - FIRST_PASS_BITS)] = True
        self._known = np.packbits(known, bitorder="little")
        start = 0
        for task, own in examples.items():
            mine = (start <= owners) & (owners < start + len(own))
            start += len(own)
            facts = {"examples": len(own), "too_short": len(own) - len(np.unique(owners[mine]))}
            self.tasks[task] = {**facts, "ngrams": len(np.unique(hashes[mine])), "fingerprint": fingerprint(own)}

    @property
    def settings(self) -> dict:
        """What decides which documents are dropped or counted, for the data set's identity."""
        names = {task: facts["fingerprint"] for task, facts in self.tasks.items()}
        return {"decontaminate": names, "decontaminate_action": "drop" if self.drop else "report"}

    def check(self, texts: list[str], ends: list[bool]) -> tuple[list[str], list[bool], dict]:
        """(texts, ends, found) of whole documents, without those that are dropped; `found` is for `merged`.

        texts: pieces of documents; `ends` says which of them end one.
        """
        hits = self._hits(texts, ends)
        hit = {document for document, _, _ in hits}
        counts = Counter(documents=sum(ends), documents_hit=len(hit))
        counts.update(task for _, task in dict.fromkeys((document, task) for document, task, _ in hits))
        counts.update(f"{task} {index}" for _, task, index in hits)
        ngrams = {f"{task} {index}": ngram for (_, task, index), ngram in reversed(hits.items())}  # the first one stays
        if self.drop and hit:
            kept = [i for i, document in enumerate(np.cumsum([0, *ends])[:-1].tolist()) if document not in hit]
            texts, ends = [texts[i] for i in kept], [ends[i] for i in kept]
        return texts, ends, {"counts": counts, "ngrams": ngrams}

    def report(self, parts: list[dict]) -> dict:
        """The manifest's entry, of what `check` found in all parts of the corpus.

        Of each example with a hit it says in how many documents, and the 13-gram of the first one.
        """
        counts, ngrams = merged(parts).values()
        tasks = {task: {**facts, "documents_hit": counts[task], "hits": {}} for task, facts in self.tasks.items()}
        for name in sorted(ngrams):
            task, index = name.split()
            tasks[task]["hits"][index] = {"documents": counts[name], "ngram": ngrams[name]}
        return {"documents": counts["documents"], "documents_hit": counts["documents_hit"], "tasks": tasks}

    def _hits(self, texts: list[str], ends: list[bool]) -> dict[tuple[int, str, int], str]:
        """{(number of the document, task, example): the first 13-gram that they share}, in the order of the text."""
        text, parts, hits = "\n".join(texts), [], {}
        for hashes, starts, stops in _ngrams(text):
            begins = hashes >> (64 - FIRST_PASS_BITS)
            few = np.flatnonzero(self._known[begins >> 3] >> (begins & 7).astype(np.uint8) & 1)
            parts.append((hashes[few], starts[few], stops[few]))
        hashes, starts, stops = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(hashes)  # so the index is searched from its front to its end, which caches like
        at = np.searchsorted(self._hashes[:-1], hashes[order])
        few = np.sort(order[self._hashes[at] == hashes[order]])
        hashes, starts, stops = hashes[few], starts[few], stops[few]
        first, last = (np.searchsorted(self._hashes, hashes, side) for side in ("left", "right"))
        document, other = (np.cumsum([0, *ends])[_text_at(texts, places)] for places in (starts, stops))
        for i in np.flatnonzero(document == other).tolist():
            ngram = " ".join(filter(None, BETWEEN_WORDS.split(text[starts[i] : stops[i]].lower())))
            for owner in self._owners[first[i] : last[i]].tolist():
                hits.setdefault((int(document[i]), *self._examples[owner]), ngram)
        return hits


def merged(parts: list[dict]) -> dict:
    """What `check` found in several parts, in their order, as one."""
    counts = sum((Counter(part["counts"]) for part in parts), Counter())
    return {"counts": counts, "ngrams": dict(ChainMap(*(part["ngrams"] for part in parts)))}


def fingerprint(examples: list[list[str]]) -> str:
    """A hash of the texts of a task's examples, in their order."""
    return hashlib.blake2b(json.dumps(examples).encode(), digest_size=8).hexdigest()


def contaminated_examples(path: Path, task: str, examples: list[list[str]]) -> set[int]:
    """The indices of a task's examples that a data set's manifest, or a file with its report, lists as hit.

    Raises: InputError for a file without a report about this task, and for a report about other examples.
    """
    path = path / MANIFEST if path.is_dir() else path
    try:
        found = read_json(path)["decontamination"]["tasks"][task]
        indices, theirs, known = set(map(int, found["hits"])), found["fingerprint"], int(found["examples"])
    except (LookupError, TypeError, ValueError, OverflowError):
        raise InputError(
            f"{path} has no report about {task}; prepare the data with prepare_fineweb.py --decontaminate {task}"
        ) from None
    if theirs != fingerprint(examples):
        raise InputError(
            f"{path} is about other examples of {task} ({known:,}; here are {len(examples):,}); name the file or the "
            "split that it was made with"
        )
    return indices


def _text_at(texts: list[str], places: np.ndarray) -> np.ndarray:
    """The index of the text at each place of "\\n".join(texts); the end of a text belongs to it."""
    return np.searchsorted(np.cumsum([len(text) + 1 for text in texts]), places, side="right")


def _ngrams(text: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(hashes, starts, stops) of every 13 words in a row, a block of text at a time; they are text[start:stop]."""
    place, words, borders = 0, np.zeros(0, np.uint64), np.zeros(0, np.int64)
    while place < len(text) or not place:
        cut = BETWEEN_WORDS.search(text, place + BLOCK_CHARACTERS)
        end = cut.end() if cut else len(text)
        codes = np.frombuffer((text[place:end] + "\0" * 8).encode("utf-32-le", "surrogatepass"), "<u4")
        letters = _letters().take(codes)
        new = np.flatnonzero(np.diff(letters != 0, prepend=False))  # start, stop, start, stop, …
        # The last 12 words of the block before begin the 13-grams that end in this one.
        words = np.concatenate([words[1 - WORDS :], _word_hashes(letters, new[::2], new[1::2] - new[::2])])
        borders = np.concatenate([borders[2 * (1 - WORDS) :], new + place])
        count = max(len(words) - WORDS + 1, 0)
        # sum over i of words[i] * BASE^i modulo 2^64, for 13 = 8 + 4 + 1 words
        two = words[:-1] + words[1:] * POWERS[1]
        four = two[:-2] + two[2:] * POWERS[2]
        eight = four[:-4] + four[4:] * POWERS[4]
        hashes = eight[:count] + four[8 : 8 + count] * POWERS[8] + words[12:] * POWERS[12]
        yield hashes, borders[::2][:count], borders[1::2][WORDS - 1 :]
        place = max(end, 1)


def _word_hashes(letters: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A hash of each word, of its first MOST_LETTERS letters."""
    eights = np.ndarray(len(letters) - 7, "<u8", letters, strides=(1,))  # the eight letters from each place on
    masks = np.array([2 ** (8 * count) - 1 for count in range(9)], np.uint64)
    hashes, longer = eights[starts] & masks[np.minimum(lengths, 8)], np.flatnonzero(lengths > 8)
    place = 8
    while len(longer) and place < MOST_LETTERS:
        more = eights[starts[longer] + place] & masks[np.minimum(lengths[longer] - place, 8)]
        hashes[longer] = _mixed(hashes[longer]) + more
        place += 8
        longer = longer[lengths[longer] > place]
    return _mixed(hashes)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of the 64-bit numbers that looks random. Source: splitmix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * np.uint64(factor)
    return x ^ (x >> 31)


@functools.cache
def _letters() -> np.ndarray:
    """(1,114,112,) uint8: of each code point a number for its lower-case letter or its digit; 0: stands between words.

    Letters beyond ASCII whose code points are 128 apart share a number, so that a number is a byte.
    """
    lower = (ord(c.lower()[0]) if c.isalnum() else 0 for c in map(chr, range(0x110000)))
    return np.fromiter((code if code < 128 else 128 + code % 128 for code in lower), np.uint8, 0x110000)
