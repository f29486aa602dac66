"""Every benchmark, one after the other, each in a process of its own; the records land beside each other.

gpt2repro bench all                         # what this machine has: CPU sizes on a CPU, 124M on a GPU
gpt2repro bench all --only train generate
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2repro.commands.bench.harness import RECORDS
from gpt2repro.options import parse_options

NAMES = ("train", "data", "tokenize", "hellaswag", "generate", "checkpoint")


@dataclass
class Options:
    only: list[Literal["train", "data", "tokenize", "hellaswag", "generate", "checkpoint"]] | None = None
    "The benchmarks to run; none runs all six."
    out: Path = RECORDS
    "Directory of the JSON records."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench all", description=__doc__)
    failed = []
    for name in options.only or NAMES:
        print(f"==== bench {name} ====", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "gpt2repro", "bench", name, "--out", str(options.out)]
        if subprocess.run(command).returncode != 0:
            failed.append(name)
        print(f"==== bench {name}: {time.perf_counter() - start:.0f} s ====", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
