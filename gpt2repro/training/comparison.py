"""Is it a difference, or the seed? Two recipes over several seeds; knows runs by their files only."""

import math
import statistics
from pathlib import Path

from mpmath import betainc

from gpt2repro.training.metrics_log import finished_run

LEAST_PAIRS = 3  # with two, only a difference of 12.7 standard errors would count
SIGNIFICANT = 0.05


def final_loss(run_dir: str | Path) -> tuple[int, float]:
    """(seed, validation loss after the last step) of a finished run; with `stop_when_val_rises` its lowest one.

    Raises: InputError as `finished_run` does.
    """
    config, evaluations = finished_run(run_dir)
    losses = [evaluation["val_loss"] for evaluation in evaluations if evaluation["val_loss"] is not None]
    return config["seed"], min(losses) if config.get("stop_when_val_rises") else losses[-1]


def paired(ours: dict[int, float], theirs: dict[int, float]) -> dict:
    """Seed -> value, twice: the differences ours - theirs over the seeds that both have, and Student's paired t-test.

    Returns {"pairs", "mean", "standard_error", "t", "p"}; p is two-sided. The last three are None for fewer than
    LEAST_PAIRS pairs, and t is None where all differences are equal.
    Source: p = I_x(n/2, 1/2), x = n / (n + t^2), n degrees of freedom: Abramowitz and Stegun, 26.5.27 and 26.7.1.
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, error = mean_and_error(differences) if differences else (None, None)
    found = {"pairs": len(differences), "mean": mean, "standard_error": None, "t": None, "p": None}
    if len(differences) >= LEAST_PAIRS:
        found |= {"standard_error": error, "p": 1.0 if mean == 0 else 0.0}
        if error:
            freedom, t = len(differences) - 1, mean / error
            x = freedom / (freedom + t * t)
            found |= {"t": t, "p": float(betainc(freedom / 2, 0.5, 0, x, regularized=True))}
    return found


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error
