"""Draw the curves of one or more runs: training and validation loss, learning rate, tokens per second.

gpt2repro plot runs/quickstart runs/other --out curves.png
"""

from dataclasses import dataclass, field
from pathlib import Path

from gpt2repro.options import InputError, parse_options
from gpt2repro.training.plotting import draw_runs


@dataclass
class Options:
    runs: list[str] = field(default_factory=list, metadata={"positional": True})
    "Directories of runs (those that hold a metrics.jsonl)."
    out: Path = Path("loss.png")
    "The picture to write."

    def problems(self) -> list[str]:
        found = [] if self.runs else ["name at least one run: gpt2repro plot runs/quickstart"]
        found += [f"{run} is not a directory" for run in self.runs if not Path(run).is_dir()]
        if self.out.suffix.lower() != ".png" or self.out.is_dir():
            found.append(f"out={self.out} must be a file that ends in .png; the picture is a PNG")
        return found


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro plot", description=__doc__)
    try:
        print(draw_runs(list(dict.fromkeys(options.runs)), options.out))
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {error.strerror}; choose another --out") from None
    return 0
