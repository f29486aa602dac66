"""Logits -> token ids: temperature, top-k, top-p, and the random numbers that choose.

Random numbers come from outside: each row has its own stream of uniform numbers, drawn before the first token from
(seed, row). So a seed gives the same text in every batch, and a captured decode step holds no random state.

Knows no model and no tokenizer. Shapes: B batch (rows), V vocabulary, k candidates of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SMALLEST_TEMPERATURE = 1e-30  # below it, logits / temperature overflow fp32; the text is greedy long before


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: `temperature=0` is greedy; `top_k` and `top_p` cut the tail, None leaves it.

    Limits: temperature at least 0, top_k at least 1, top_p in (0, 1]. Whoever takes them from a user checks them.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `top_k` best logits in descending order and their ids; all of them, unsorted, without a cut (ids None)."""
    if sampling.top_k is None and sampling.top_p is None:
        return logits, None
    count = min(sampling.top_k or logits.size(-1), logits.size(-1))
    return torch.topk(logits, count)  # (B, V) -> (B, k), (B, k)


def keep_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero what lies behind the first `top_p` of the mass; `probs` descend. The likeliest token always stays.

    Source: Holtzman et al. 2020, section 3.1.
    """
    return probs * (probs.cumsum(-1) - probs < top_p)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Temperature, then top-k, then top-p -> unnormalised probabilities (B, k) and the ids they belong to."""
    best, ids = candidates(logits.float() / sampling.temperature, sampling)
    probs = best.softmax(-1)
    return (probs if sampling.top_p is None else keep_nucleus(probs, sampling.top_p)), ids


def pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the sum of `probs` (B, k) passes `uniform` (B,) in [0, 1): an index (B,), never one without mass."""
    mass = probs.cumsum(-1)
    # The factor keeps the target below the last step of the sum, whatever order a parallel sum rounded in.
    target = uniform[:, None] * mass[:, -1:] * (1 - 1e-6)
    return ((mass > target) & (probs > 0)).int().argmax(-1)  # argmax: the first of equals


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) and one uniform number per row -> token ids (B,)."""
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return logits.argmax(-1)
    probs, ids = probabilities(logits, sampling)
    index = pick(probs, uniform)
    return index if ids is None else ids.gather(-1, index[:, None])[:, 0]


def uniforms(seed: int, rows: Sequence[int], steps: int) -> torch.Tensor:
    """(steps, rows) uniform numbers in [0, 1); a row's column depends on (seed, row) alone."""
    streams = [np.random.Generator(np.random.Philox(key=(row << 64) + seed)) for row in rows]
    return torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams], axis=1))
