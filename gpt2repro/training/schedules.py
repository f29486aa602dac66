"""The learning rate as a pure function of the steps already done: a checkpoint need not hold it."""

import math

import torch

COOLDOWN_PART = 0.2  # of all steps, where nobody says more. Source: Hägele et al. 2024, arXiv:2405.18392


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    schedule: str = "cosine",
    cooldown_steps: int | None = None,
) -> float:
    """The learning rate of the step that follows `step` finished ones.

    All schedules begin with a linear warm-up, `lr (step + 1) / warmup_steps`: the first step is never at zero, and
    `step = warmup_steps - 1` and the one after it both run at `lr`. From `step = max_steps` on all stay at `min_lr`.
    In between, with p = (step - a) / (max_steps - a) from 0 to 1:

    cosine  min_lr + (lr - min_lr) (1 + cos(pi p)) / 2, a = warmup_steps. Source: build-nanogpt's `get_lr`.
    linear  lr + (min_lr - lr) p, a = warmup_steps. Source: Bergsma et al. 2025, arXiv:2502.15938.
    wsd     `lr` (stable), then linear from a = max_steps - cooldown_steps on, a fifth of all steps where
            `cooldown_steps` is None. Source: Hu et al. 2024, arXiv:2404.06395.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    begin = warmup_steps
    if schedule == "wsd":
        begin = max(warmup_steps, stable_until(max_steps, cooldown_steps))
        if step < begin:
            return lr
    progress = (step - begin) / (max_steps - begin)
    if schedule == "cosine":
        return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)
    return lr + (min_lr - lr) * progress


def stable_until(max_steps: int, cooldown_steps: int | None) -> int:
    """The step at which `wsd` begins to cool down."""
    return max_steps - (round(COOLDOWN_PART * max_steps) if cooldown_steps is None else cooldown_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group `lr` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
