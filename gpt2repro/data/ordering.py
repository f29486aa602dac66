"""Which window comes at which position: a seeded permutation that is computed, never stored, and ranges to leave out.

Owns integers only. Knows no files, no tokens, no ranks. Uses neither numpy's nor torch's random generators, so the
order stays the same in every later version of numpy and torch.
"""

from __future__ import annotations

import numpy as np

FEISTEL_ROUNDS = 8
SMALLEST_DOMAIN_BITS = 6  # a smaller Feistel network reaches only few of the n! orders

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014
MASK_64 = (1 << 64) - 1


def mix64(value):
    """The 64-bit finaliser of splitmix64, a bijection that flips every output bit with probability 1/2.

    Takes a Python int or an array of uint64, and computes modulo 2^64.
    Source: variant 13 of https://zimbry.blogspot.com/2011/09/better-bit-mixing-improving-on.html (David Stafford).
    """
    value = value & MASK_64
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
        bits = max((n - 1).bit_length(), SMALLEST_DOMAIN_BITS)
        low_bits, high_bits = bits // 2, bits - bits // 2
        self.n = n
        self._constants = [low_bits, (1 << low_bits) - 1, (1 << high_bits) - 1]
        self._constants += [derive_seed(seed, n, number) for number in range(FEISTEL_ROUNDS)]

    def __call__(self, index):
        """The image of an int (as an int) or of an array of ints (as an int64 array of the same shape)."""
        if not isinstance(index, np.ndarray):
            return int(self(np.array([index]))[0])
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n:
            raise IndexError(f"indices {index.min()} to {index.max()} are not all in range({self.n})")
        values = _network(index.astype(np.uint64), *self._constants)
        while (outside := values >= self.n).any():
            values[outside] = _network(values[outside], *self._constants)
        return values.astype(np.int64)


def _network(values: np.ndarray, low_bits: int, low_mask: int, high_mask: int, *round_keys: int) -> np.ndarray:
    """One pass of the Feistel network, over an array of uint64."""
    low, high = values & low_mask, values >> low_bits
    for even, odd in zip(round_keys[::2], round_keys[1::2], strict=True):
        low = low ^ (mix64(high ^ even) & low_mask)
        high = high ^ (mix64(low ^ odd) & high_mask)
    return high << low_bits | low


def skip_ahead(state: dict, start: int, stop: int) -> dict:
    """The state with positions [start, stop) left out on purpose, now and after every resume.

    The ranges are kept sorted and merged. A range before `state["position"]` is recorded and has no other effect.
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

    This is the whole rule of alignment: a batch that meets a skipped range continues after it. So every batch is full
    and no skipped window is seen, even if the range begins in the middle of a batch.
    """
    pieces, missing = [], count
    for start, stop in [*skipped, [2**62, 2**62]]:  # the last range lies after all positions
        free = max(0, min(missing, start - position))
        pieces.append(np.arange(position, position + free, dtype=np.int64))
        position, missing = max(position, stop), missing - free
    return np.concatenate(pieces)
