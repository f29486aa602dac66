"""Two recipes over several seeds: is the difference in final validation loss larger than the seeds' own?

    gpt2repro compare runs/new-1 runs/new-2 runs/new-3 --against runs/old-1 runs/old-2 runs/old-3
    gpt2repro compare runs/old-1 runs/old-2 runs/old-3        how much the seed alone changes

Runs are paired by the seed in their config.yaml, since runs of one seed begin with the same weights and see the same
batches; Student's paired t-test judges the differences. One pair of runs proves nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path

from gpt2repro.files import check_outputs, write_json
from gpt2repro.options import InputError, parse_options
from gpt2repro.training.comparison import LEAST_PAIRS, SIGNIFICANT, final_loss, mean_and_error, paired


@dataclass
class Options:
    runs: list[str] = field(default_factory=list, metadata={"positional": True})
    "Directories of finished runs of one recipe, with a seed each."
    against: list[str] = field(default_factory=list)
    "Directories of finished runs of the other recipe, with the same seeds; none: only the spread of the first."
    out: Path | None = None
    "Write the numbers to this JSON file."

    def problems(self) -> list[str]:
        return [] if self.runs else ["name finished runs: gpt2repro compare a1 a2 a3 --against b1 b2 b3"]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro compare", description=__doc__)
    check_outputs(options.out)
    losses = {"runs": by_seed(options.runs), "against": by_seed(options.against)}
    record: dict = {"losses": losses}
    for side, found in losses.items():
        if found:
            mean, error = mean_and_error([*found.values()])
            record[f"mean of {side}"], record[f"standard error of {side}"] = mean, error
            spread = "" if error is None else f" ± {error:.4f} (standard error)"
            seeds = ", ".join(f"{seed}: {loss:.4f}" for seed, loss in found.items())
            print(f"{side:8} mean {mean:.4f}{spread}; by seed: {seeds}")
    if options.against:
        result = paired(losses["runs"], losses["against"])
        record |= {**result, "verdict": verdict(result)}
        print(record["verdict"])
        if alone := sorted(losses["runs"].keys() ^ losses["against"].keys()):
            print(f"left out, since only one side has them: seeds {', '.join(map(str, alone))}")
    if options.out:
        write_json(options.out, record)
    return 0


def by_seed(runs: list[str]) -> dict[int, float]:
    """Seed -> final validation loss. Raises: InputError where two runs have one seed."""
    found: dict[int, float] = {}
    for run in runs:
        seed, loss = final_loss(run)
        if seed in found:
            raise InputError(f"{run} has seed {seed}, as another run of its side has; give runs of different seeds")
        found[seed] = loss
    return found


def verdict(result: dict) -> str:
    """What the test says, in one sentence."""
    if result["pairs"] < LEAST_PAIRS:
        return (
            f"too few seeds to say anything: {result['pairs']} in common, at least {LEAST_PAIRS} are needed; "
            "train both recipes with more values of --seed"
        )
    p, size = result["p"], f"{abs(result['mean']):.4f} ± {result['standard_error']:.4f} nats"
    if p >= SIGNIFICANT:
        return f"no difference that {result['pairs']} pairs can show: {size}, p = {p:.3f}"
    return (
        f"the runs are {'better' if result['mean'] < 0 else 'worse'} by {size}, p = {p:.3g} ({result['pairs']} pairs)"
    )
