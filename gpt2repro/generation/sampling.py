"""Logits -> token ids: temperature, top-k, top-p, and the random numbers that choose.

The caller passes the random numbers: each row has its own stream of uniform numbers, drawn from (seed, row) before the
first token. So a seed gives the same text in every batch, and a captured decode step holds no random state.

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

    Limits: temperature at least 0, top_k at least 1, top_p in (0, 1]. The code that reads them from a user checks them.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def probabilities(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Temperature, then top-k, then top-p -> unnormalised probabilities (B, k) and their ids.

    With a cut the probabilities descend; without one they are all V in the order of the ids, and the ids are None.
    Source: for top-p Holtzman et al. 2020, section 3.1; the likeliest token always stays.
    """
    best, ids = logits.float() / sampling.temperature, None
    if sampling.top_k is not None or sampling.top_p is not None:
        best, ids = torch.topk(best, min(sampling.top_k or best.size(-1), best.size(-1)))  # (B, V) -> (B, k), (B, k)
    probs = best.softmax(-1)
    if sampling.top_p is not None:
        probs = probs * (probs.cumsum(-1) - probs < sampling.top_p)  # 0 behind the first `top_p` of the mass
    return probs, ids


def pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index (B,) where the sum of `probs` (B, k) passes `uniform` (B,) in [0, 1); its probability is never 0."""
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
