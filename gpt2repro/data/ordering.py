"""Which window comes at which position: a seeded permutation that is computed, never stored, and ranges to leave out.

Owns integers only. Knows no files, no tokens, no ranks; nothing here touches numpy's or torch's random generators, so
an order written down today is the same in every later version of either.
"""

from __future__ import annotations

import numpy as np

FEISTEL_ROUNDS = 8
SMALLEST_DOMAIN_BITS = 6  # below that a Feistel network reaches only few of the n! orders; cycle walking does the rest

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014
MASK_64 = (1 << 64) - 1


def mix64(value):
    """The 64-bit finaliser of splitmix64, a bijection that flips every output bit with probability 1/2.

    Takes a Python int (mixed modulo 2^64) or an array of uint64 (which wraps by itself).
    Source: variant 13 of https://zimbry.blogspot.com/2011/09/better-bit-mixing-improving-on.html (David Stafford).
    """
    if isinstance(value, np.ndarray):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
    value &= MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def derive_seed(seed: int, *names: int) -> int:
    """One 64-bit seed for each path of integers below `seed`, for example (epoch,) or (epoch, row group)."""
    for name in names:
        seed = mix64(mix64(seed + GOLDEN_GAMMA) + name)
    return mix64(seed + GOLDEN_GAMMA)


class Permutation:
    """A seeded bijection of range(n), evaluated at any index in O(1) time and memory; n up to 2^62.

    An alternating Feistel network permutes the smallest power of two that holds n; an image outside range(n) is sent
    through the network again until it falls inside ("cycle walking", fewer than 2 passes on average for n >= 64).
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, got n={n}")
        bits = max((n - 1).bit_length(), SMALLEST_DOMAIN_BITS)
        low_bits, high_bits = bits // 2, bits - bits // 2
        self.n = n
        self._constants = [low_bits, (1 << low_bits) - 1, (1 << high_bits) - 1]
        self._constants += [derive_seed(seed, n, number) for number in range(FEISTEL_ROUNDS)]
        self._array_constants = [np.uint64(constant) for constant in self._constants]

    def __call__(self, index):
        """The image of an int (as an int) or of an array of ints (as an int64 array of the same shape)."""
        if not isinstance(index, np.ndarray):
            return self._image_of(int(index))
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise IndexError(f"indices {index.min()} to {index.max()} are not all in range({self.n})")
        values = _network(index.astype(np.uint64), *self._array_constants)
        while (outside := values >= self.n).any():
            values[outside] = _network(values[outside], *self._array_constants)
        return values.astype(np.int64)

    def _image_of(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside range({self.n})")
        value = _network(index, *self._constants)
        while value >= self.n:
            value = _network(value, *self._constants)
        return value


def _network(values, low_bits, low_mask, high_mask, *round_keys):
    """One pass of the Feistel network, over an int or an array of uint64."""
    low, high = values & low_mask, values >> low_bits
    for even, odd in zip(round_keys[::2], round_keys[1::2], strict=True):
        low = low ^ (mix64(high ^ even) & low_mask)
        high = high ^ (mix64(low ^ odd) & high_mask)
    return high << low_bits | low


def skip_ahead(state: dict, start: int, stop: int) -> dict:
    """The state with positions [start, stop) left out on purpose, now and on every later resume.

    Ranges are kept sorted and merged. A range behind `state["position"]` changes nothing but the record.
    """
    if not 0 <= start < stop:
        raise ValueError(f"cannot skip positions [{start}, {stop}): expected 0 <= start < stop")
    merged: list[list[int]] = []
    for a, b in sorted([*state["skipped"], [start, stop]]):
        if merged and a <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], b)
        else:
            merged.append([int(a), int(b)])
    return {**state, "skipped": merged}


def next_positions(position: int, skipped: list[list[int]], count: int) -> np.ndarray:
    """The first `count` positions at or after `position` that lie in no skipped range, ascending, int64.

    This is the whole rule of alignment: a batch that meets a skipped range continues behind it. So no batch is ever
    short and no skipped window is ever seen, whether or not the range begins at a batch's border.
    """
    pieces, missing = [], count
    for start, stop in [*skipped, [None, None]]:
        if start is None or start > position:
            free = missing if start is None else min(missing, start - position)
            pieces.append(np.arange(position, position + free, dtype=np.int64))
            missing -= free
            if not missing:
                break
        position = max(position, stop)
    return np.concatenate(pieces)
