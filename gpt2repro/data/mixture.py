"""A recipe: from which source the window at a position comes, and which window of that source's own order it is.

    recipe.yaml      sources: {web: {data: data/fineweb}, code: {data: hf://user/name, epochs: 4}}
                     phases:
                       - {from_tokens: 0, weights: {web: 0.9, code: 0.1}}
                       - {from_tokens: 8_000_000_000, weights: {web: 0.5, code: 0.5}}

    position p       ── the last phase that begins at or before p; n = p - its first position
    n, the phase     ── down the phase's tree ──> a source, and how many windows it gave in this phase before
    + the windows that the source gave in earlier phases ──> index in the source's own order (epochs, permutation)

Positions count windows of the global order, T tokens each. A phase begins with the first window that begins at or after
`from_tokens`: at position ceil(from_tokens / T). Weights are taken as the decimals that are written, as exact fractions
of their sum; nothing is rounded. Neither the seed nor the order of the lines decides anything here: the seed shuffles
the windows inside each source.

**The tree.** A phase's sources are the leaves of a Huffman tree over their weights. Of a node's first m windows, the
child with the share f of the node's weight gets round(f m), halves up, and the other child gets the rest. Both counts
grow by 0 or 1 with m, so window m belongs to one child, and its index there is that child's count before it. Going down
costs O(sources) integer operations, whatever the position.

**The bound.** After any number n of windows of a phase, the count of each source differs from n times its share by at
most ψ/2 < 1.68 windows (ψ = 3.3599…, the sum of the reciprocal Fibonacci numbers), with any sources and weights; with
two sources by at most 1/2. Proof: on the path root = v0, v1, …, vd = leaf, let c_t be the count of v_t and w_t its
weight, w_0 = 1. Then c_t = (w_t / w_(t-1)) c_(t-1) + e_t with |e_t| <= 1/2, and c_0 = n exactly. So c_d - w_d n is the
sum over t = 1 … d of e_t w_d / w_t. In a Huffman tree the sibling of v_(t-1) weighs at least as much as v_t: when v_t
and its sibling were joined, no other node weighed less than either. So w_(t-2) >= w_(t-1) + w_t: upwards from the leaf
the weights grow at least as the Fibonacci numbers 1, 1, 2, 3, 5, … times w_d. Hence the sum is at most ψ/2. A new phase
starts a new count, so over k phases the bound is k times as large.

Knows no files but the recipe, no tokens, no ranks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from fractions import Fraction
from itertools import zip_longest
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from gpt2repro.options import LARGEST_COUNT, InputError, nearest, read_yaml

# Raise it when the same (recipe, seed, position) would give another window: also with sources.SHARD_ORDER_VERSION.
RECIPE_ORDER_VERSION = 1
MOST_SOURCES, MOST_PHASES = 256, 10_000

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]{0,63}$")]  # a part of metrics' names, such as val_loss/web
Weight = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=LARGEST_COUNT)]
Tree = str | tuple  # a source, or (a, b, left, right): `left` has the share a / b of the node


class SourceEntry(BaseModel, extra="forbid"):
    """`data` as in `--data`, but no stream; `epochs`: most passes over it; `sha256`: what the data must have."""

    data: Annotated[str, Field(min_length=1)]
    epochs: Annotated[int, Field(strict=True, ge=1)] | None = None
    sha256: str | None = None


class Phase(BaseModel, extra="forbid"):
    """Weights that hold from a token of the run on; they need not add up to 1."""

    from_tokens: Tokens
    weights: Annotated[dict[str, Weight], Field(min_length=1)]

    def shares(self) -> dict[str, Fraction]:
        """Source -> its exact part of the phase; they add up to 1."""
        weights = {name: Fraction(repr(weight)) for name, weight in self.weights.items()}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {float(share):.4g}" for name, share in sorted(self.shares().items()))
        return f"{shown} from token {self.from_tokens:,}"


class _Content(BaseModel, extra="forbid"):
    sources: Annotated[dict[Name, SourceEntry], Field(min_length=1, max_length=MOST_SOURCES)]
    phases: Annotated[list[Phase], Field(min_length=1, max_length=MOST_PHASES)]


class Recipe:
    """What a recipe's YAML says, and the two functions of it that the module explains: `source_at` and `counts`.

    Raises: InputError naming the place in the YAML, for every recipe that cannot be meant. `name` is the file's.
    """

    def __init__(self, content: dict, seq_len: int, name: str):
        try:
            content = _Content.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place, wanted = _place(*first["loc"]), first["msg"].removeprefix("Input ")
            found = f", not {first['input']!r:.80}" if first["type"] not in ("missing", "extra_forbidden") else ""
            raise InputError(f"{name}: {place}: {wanted}{found}; see the example in docs/data.md") from None
        self.name, self.seq_len = name, seq_len
        self.sources, self.phases = content.sources, content.phases
        self.starts = [-(-phase.from_tokens // seq_len) for phase in self.phases]  # first positions
        if problem := self._problem():
            raise InputError(f"{name}: {problem}")
        self._trees = [_tree(phase.shares()) for phase in self.phases]
        self._before = [dict.fromkeys(self.sources, 0)]  # of each phase: what the sources gave before it
        for start in self.starts[1:]:
            self._before.append(self.counts(start))  # which looks only at the phases before it

    def _problem(self) -> str | None:
        """What types cannot say, as a sentence that names the place."""
        for name, source in self.sources.items():
            if source.data.startswith("stream:"):
                return (
                    f"sources.{name}.data is a stream, which has no order of its own that a recipe could draw from: a "
                    "lane belongs to one process and gives every k-th window, and a share is no whole number of lanes; "
                    "make token shards of the text (prepare_fineweb.py, gpt2repro prepare-text)"
                )
            if is_recipe(source.data):
                return f"sources.{name}.data is itself a recipe; list its sources here"
            if not any(name in phase.weights for phase in self.phases):
                return f"sources.{name} has a weight in no phase; give it one, or remove it"
        for number, phase in enumerate(self.phases):
            place = f"phases[{number}]"
            for name in phase.weights:
                if name not in self.sources:
                    hint = nearest(name, self.sources) or "; add it to sources"
                    return f"{place}.weights.{name} is none of the sources ({', '.join(self.sources)}){hint}"
            if number == 0 and phase.from_tokens != 0:
                return f"{place}.from_tokens is {phase.from_tokens}; the first phase begins at 0"
            if number and self.starts[number] <= self.starts[number - 1]:
                return (
                    f"{place}.from_tokens={phase.from_tokens} overlaps phases[{number - 1}], which begins at "
                    f"{self.phases[number - 1].from_tokens}; sort the phases, at least {self.seq_len} tokens (one "
                    "window) apart"
                )
        return None

    def source_at(self, position: int) -> tuple[str, int]:
        """(source, index in that source's own order) of the window at a position."""
        phase = bisect_right(self.starts, position) - 1
        tree, index = self._trees[phase], position - self.starts[phase]
        while not isinstance(tree, str):
            share, whole, left, right = tree
            before = _part(index, share, whole)
            is_left = _part(index + 1, share, whole) > before
            tree, index = (left, before) if is_left else (right, index - before)
        return tree, self._before[phase][tree] + index

    def counts(self, position: int) -> dict[str, int]:
        """Source -> how many of the windows before `position` it gave."""
        phase = max(0, bisect_left(self.starts, position) - 1)
        given, windows = self._before[phase], position - self.starts[phase]
        return given | {source: given[source] + count for source, count in _counts(self._trees[phase], windows)}

    def too_short(self, position: int, windows: dict[str, int]) -> str | None:
        """The sentence for a source that ends before `position`, by its `epochs`; `windows` are those of one epoch."""
        limits = {name: source.epochs for name, source in self.sources.items() if source.epochs is not None}
        given = self.counts(position) if limits else {}
        for source, epochs in limits.items():
            if (count := given[source]) > epochs * windows[source]:
                return (
                    f"{self.name}: sources.{source}.epochs is {epochs}, but the run takes {count * self.seq_len:,} "
                    f"tokens from it, {count / windows[source]:.2f} epochs; lower its weights or --max_steps, or raise "
                    "epochs"
                )
        return None

    def timetable(self, end: int, sequences: int, windows: dict[str, int]) -> list[str]:
        """Lines for people: what each phase takes from each source before position `end`, and each source's epochs.

        `sequences` is the windows of a step. A border inside a step has decimals.
        """
        lines = []
        for number, (phase, start) in enumerate(zip(self.phases, self.starts, strict=True)):
            stop = min([end, *self.starts[number + 1 : number + 2]])
            given = _counts(self._trees[number], max(0, stop - start))
            takes = ", ".join(f"{name} {count * self.seq_len:,} tokens" for name, count in given if count)
            step = f"{start / sequences:,.2f}".removesuffix(".00")
            border = f"phases[{number}] from step {step} (token {phase.from_tokens:,})"
            lines.append(f"{border}: {takes or 'after the last step'}")
        for name, count in self.counts(end).items():
            passes = f"{count / windows[name]:,.2f} epochs of {windows[name] * self.seq_len:,}"
            lines.append(f"{name}: {count * self.seq_len:,} tokens, {passes}")
        return lines

    def content(self) -> dict:
        """The recipe as plain values, from which an equal one can be made."""
        sources = {name: source.model_dump(exclude_none=True) for name, source in self.sources.items()}
        return {"sources": sources, "phases": [phase.model_dump() for phase in self.phases]}


def same_recipe(one: dict, other: dict) -> bool:
    """Whether two identities of data are equal but for where the data lie."""
    first, second = (
        {**data, "sources": {name: {**source, "data": None} for name, source in data.get("sources", {}).items()}}
        for data in (one, other)
    )
    return first == second


def is_recipe(data: str) -> bool:
    """Whether `--data` names a recipe."""
    return data.endswith((".yaml", ".yml")) and not data.startswith(("stream:", "hf://"))


def read_recipe(path: str, seq_len: int) -> Recipe:
    """Raises: InputError for a file that is missing, no YAML, or no recipe."""
    return Recipe(read_yaml(path, "--data"), seq_len, path)


def changed_past(saved: dict, now: dict, position: int) -> list[str]:
    """What two identities of data say differently about the positions before `position`; [] where the past is the same.

    Both are of recipes, or the saved one is of shards: it stands for a recipe of one source and one phase. What comes
    at `position` or later may differ.
    """
    if saved["kind"] == "shards" and now["kind"] == "recipe":
        named = [name for name, source in now["sources"].items() if source["sha256"] == saved["sha256"]]
        name = named[0] if named else "data"  # of one source alone the name decides nothing
        sources = {name: {"data": name, "sha256": saved["sha256"]}}
        saved = {"kind": "recipe", "sources": sources, "phases": [{"from_tokens": 0, "weights": {name: 1.0}}]}
    if not saved["kind"] == now["kind"] == "recipe":
        return [f"data: kind was {saved['kind']} and is now {now['kind']}"]
    contents = [{name: one.get(name) for name in ("sources", "phases")} for one in (saved, now)]
    pair = [Recipe(content, now["seq_len"], "recipe") for content in contents]
    pasts = [
        [(start, phase) for start, phase in zip(recipe.starts, recipe.phases, strict=True) if start < position]
        for recipe in pair
    ]
    trained = position * now["seq_len"]
    for number, (was, is_now) in enumerate(zip_longest(*pasts)):
        same = was and is_now and was[0] == is_now[0] and was[1].shares() == is_now[1].shares()
        if not same:
            shown = [str(one[1]) if one else "no phase before that token" for one in (was, is_now)]
            return [
                f"phases[{number}] is trained up to token {trained:,}, where it was {shown[0]} and is now {shown[1]}; "
                f"only what comes from there on may change: add a phase with from_tokens {trained} or more"
            ]
        for name in was[1].weights:
            old, new = (recipe.sources[name].sha256 for recipe in pair)
            if old != new:
                place = f"phases[{number}].weights.{name}"
                return [f"{place} is trained up to token {trained:,} on other data: sha256 was {old} and is now {new}"]
    return []


def _place(*parts: str | int) -> str:
    """("phases", 1, "weights", "code") -> phases[1].weights.code."""
    shown = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts if part != "[key]")
    return "".join(shown).lstrip(".") or "the file"


def _tree(shares: dict[str, Fraction]) -> Tree:
    """The Huffman tree over sources; equal weights are taken in the order of their names."""
    heap = [(share, number, name) for number, (name, share) in enumerate(sorted(shares.items()))]
    heapq.heapify(heap)
    for number in range(len(heap), 2 * len(heap) - 1):
        (light, _, right), (heavy, _, left) = heapq.heappop(heap), heapq.heappop(heap)
        share = heavy / (light + heavy)
        heapq.heappush(heap, (light + heavy, number, (share.numerator, share.denominator, left, right)))
    return heap[0][2]


def _part(windows: int, share: int, whole: int) -> int:
    """round(windows share / whole), halves up."""
    return (2 * windows * share + whole) // (2 * whole)


def _counts(tree: Tree, windows: int) -> list[tuple[str, int]]:
    """(source, its count) of the first `windows` windows of a tree."""
    if isinstance(tree, str):
        return [(tree, windows)]
    share, whole, left, right = tree
    part = _part(windows, share, whole)
    return _counts(left, part) + _counts(right, windows - part)
