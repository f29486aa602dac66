"""Runs every benchmark, one after the other, each in a process of its own; all records go into one directory.

gpt2repro bench all                           # small models on a CPU, 124M on a GPU
gpt2repro bench all --minutes 10              # for a borrowed GPU: what does not fit into the minutes is dropped
gpt2repro bench all --only train generate

Needs no download: most benchmarks take random token ids. `tokenize` needs GPT-2's vocabulary, and ends with an error
message where it is neither cached nor within reach.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2repro.commands.bench.harness import RECORDS
from gpt2repro.options import Positive, parse_options

# How ten minutes are divided. The first four measure the GPU. Time that one of them leaves goes to those behind it.
SHARES = {"train": 5.0, "generate": 2.0, "hellaswag": 1.0, "checkpoint": 1.0, "data": 0.5, "tokenize": 0.5}
GRACE_SECONDS = 20  # beyond its share a benchmark may finish a measurement that it has begun
LEAST_SECONDS = 10  # in less time a benchmark only imports torch


@dataclass
class Options:
    only: list[Literal["train", "generate", "hellaswag", "checkpoint", "data", "tokenize"]] | None = None
    "The benchmarks to run; none runs all six."
    minutes: Positive | None = None
    "Be done in so many minutes: what does not fit is dropped, what was measured is kept; none: no limit."
    out: Path = RECORDS
    "Directory of the JSON records."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench all", description=__doc__)
    began, failed = time.monotonic(), []
    names = [name for name in SHARES if name in (options.only or SHARES)]
    for index, name in enumerate(names):
        command, limit = [sys.executable, "-m", "gpt2repro", "bench", name, "--out", str(options.out)], None
        if options.minutes:
            left = 60 * options.minutes - (time.monotonic() - began)
            share = left * SHARES[name] / sum(SHARES[later] for later in names[index:])
            if share < LEAST_SECONDS:
                failed.append(f"{name} (no time)")
                continue
            command, limit = [*command, "--minutes", f"{share / 60:.2f}"], min(left, share + GRACE_SECONDS)
        print(f"==== bench {name} ====", flush=True)
        start = time.monotonic()
        try:
            code = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = "stopped, out of time"
        failed += [f"{name} ({code})"] if code else []
        print(f"==== bench {name}: {time.monotonic() - start:.0f} s ====", flush=True)
    if failed:
        print(f"not whole: {', '.join(failed)}; a record has what was measured until then", file=sys.stderr)
    return 1 if failed else 0
