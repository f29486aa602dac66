"""How every benchmark measures and what its record holds; knows no benchmark.

    record = Record("tokenize", argv, options)
    times = record.compare({"ours": ours, "theirs": theirs}, units=tokens_per_call)
    record.headline("tokenising", times, ours="ours", baseline="theirs", unit="tokens/s", goal=2.0)
    return record.finish()

A benchmark first shows that its candidates compute the same thing, on random input, and raises `NotEqual` where they
do not: a fast wrong answer is never timed. Candidates run in one process and take turns round by round, so that a
change in the machine's speed meets all of them, and speed-ups are medians of the rounds' own ratios.

The JSON record is written again after every row, so a run that is cut off leaves what it has measured. A candidate that
runs out of memory is lost, the others are measured, and the record says so.
"""

import datetime
import gc
import importlib.metadata
import itertools
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from gpt2repro.files import check_outputs, write_json
from gpt2repro.options import AtLeastOne, InputError, Positive, first_line
from gpt2repro.training.reference import commit

LEAST_ROUNDS = 3  # also where the minutes are over: one round has no spread
RECORDS = Path("results/benchmarks")  # seen from the project's root, where the commands are run
# A record names their versions, since speed depends on them.
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "tiktoken", "datasets")
GIB = 2**30
# Radford et al. 2019, table 2; `small` is for CPUs.
SIZES = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 512},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "350M": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "vocab_size": 50257},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "vocab_size": 50257},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50257},
}
Size = Literal["small", "124M", "350M", "774M", "1558M"]


@dataclass(kw_only=True)
class CommonOptions:
    """The options of every benchmark."""

    rounds: AtLeastOne = 7
    "Measurements of each candidate; the candidates take turns."
    minutes: Positive | None = None
    "Begin nothing new after so many minutes; none: no limit."
    out: Path = RECORDS
    "Directory of the JSON record."


class NotEqual(Exception):
    """Two candidates of a benchmark do not compute the same thing; the wrong one is not timed."""


class Record:
    """A benchmark's JSON record, `out/NAME-<host kind>.json`, and the measurements that go into it.

    Raises: InputError where nothing can be written to `out`, before anything is measured.
    """

    def __init__(self, name: str, argv: list[str], options: CommonOptions):
        self.path, self.rounds = options.out / f"{name}-{host_kind()}.json", options.rounds
        self.deadline = time.monotonic() + 60 * (options.minutes or math.inf)
        check_outputs(self.path)
        # A bare GPU image lacks some of them.
        distributions = {package: list(importlib.metadata.distributions(name=package)) for package in PACKAGES}
        versions = {package: found[0].version for package, found in distributions.items() if found}
        self.results: dict = {"headlines": [], "lost": {}, "dropped": []}
        self.content = {
            "name": name,
            "command": shlex.join(["gpt2repro", "bench", name.partition("-")[0], *argv]),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": {"python": platform.python_version(), **versions},
            "complete": False,
            "results": self.results,
        }

    def save(self, **results) -> None:
        """Put `results` into the record and write it."""
        self.results.update(results)
        write_json(self.path, self.content)

    def finish(self) -> int:
        """Write the whole record. Returns the exit code: 1 where a candidate was lost."""
        self.content["complete"] = not self.results["dropped"]
        self.save()
        print(f"record: {self.path}", flush=True)
        return 1 if self.results["lost"] else 0

    def time_for(self, what: str) -> bool:
        """Whether there is time left for `what`; if not, the record says so."""
        if time.monotonic() < self.deadline:
            return True
        self.results["dropped"].append(what)
        print(f"  no time left for {what}", flush=True)
        return False

    def seconds_left(self) -> float | None:
        """Seconds until the minutes are over, at least one; None without a limit."""
        return None if math.isinf(self.deadline) else max(1.0, self.deadline - time.monotonic())

    def attempt(self, name: str, call: Callable):
        """The result of `call`; None where it failed, from lack of memory or otherwise: then the record says so."""
        try:
            return call()
        # torch's OutOfMemoryError and its compiler's errors are RuntimeErrors; a bare GPU image lacks some packages.
        except (RuntimeError, ImportError, subprocess.SubprocessError, NotEqual) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"  LOST {name}: {reason}", flush=True)
        self.results["lost"][name] = reason
        self.save()
        free_memory()  # outside the handler, which holds the failed call's tensors
        return None

    def compare(
        self, candidates: dict[str, Callable], *, rounds=0, warmup=1, units: float | None = None, after=lambda: None
    ) -> dict[str, dict]:
        """Time the candidates in interleaved rounds: each is called once per round, in alternating order.

        `rounds=0` takes the options' own. `after` is called after each measurement, outside the clock. Returns the
        `summary` of each candidate that was not lost.
        """
        candidates, took = dict(candidates), {name: [] for name in candidates}
        gc.collect()
        for turn in range(-warmup, rounds or self.rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() > self.deadline:
                break
            for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
                seconds = self.attempt(name, lambda name=name: timed(candidates[name]))
                after()
                if seconds is None:
                    del candidates[name]
                elif turn >= 0:
                    took[name].append(seconds)
        return {name: summary(took[name], units) for name in candidates}

    def headline(
        self, measure: str, times: dict[str, dict], *, ours: str, baseline: str, unit: str, goal: float | None = None
    ) -> None:
        """A row of the table: both figures in `unit`, the speed-up, and its goal. No row where a candidate was lost."""
        if not {ours, baseline} <= times.keys():
            return
        mine, theirs = (times[name].get("per_second", times[name]["median_seconds"]) for name in (ours, baseline))
        ratios = speedup(times, ours=ours, baseline=baseline)
        self._add(
            {"measure": measure, "unit": unit, "ours": mine, "baseline": theirs, "baseline_name": baseline}
            | {"speedup": ratios, "goal": goal}
        )

    def figure(self, measure: str, value: float, *, unit: str, goal: float | None = None, at_most=False) -> None:
        """A row of the table without a baseline: a figure and its goal, an upper bound if `at_most`."""
        self._add({"measure": measure, "unit": unit, "ours": value, "goal": goal, "at_most": at_most})

    def _add(self, row: dict) -> None:
        self.results["headlines"].append(row)
        measure, *rest, goal = cells(row)
        print(f"{measure}: {', '.join(filter(None, rest))}{goal and f'; goal {goal}'}", flush=True)
        self.save()


def cells(row: dict) -> list[str]:
    """A row's measure, figure, baseline, ratio with its spread, and goal (met or not): the columns of the table."""
    value, unit, baseline, ratio, goal = row["ours"], f" {row['unit']}", "", "", ""
    shown = f"{value:,.4g}{unit}"
    if "speedup" in row:
        value, unit = row["speedup"]["median"], "x"
        baseline = f"{row['baseline']:,.4g} ({row['baseline_name']})"
        ratio = f"**{value:.2f}x** ({row['speedup']['min']:.2f}–{row['speedup']['max']:.2f})"
    if row["goal"] is not None:
        at_most = row.get("at_most", False)
        met = value <= row["goal"] if at_most else value >= row["goal"]
        goal = f"{'<=' if at_most else '>='} {row['goal']:,g}{unit} {'✓' if met else '✗ not met'}"
    return [row["measure"], shown, baseline, ratio, goal]


def finished(command: list, directory: Path | None = None) -> str:
    """The output of a program. Raises: InputError with the last line of stderr where the program failed."""
    done = subprocess.run(list(map(str, command)), cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        words = (done.stderr.strip() or "nothing on stderr").splitlines()[-1]
        raise InputError(f"{shlex.join(map(str, command[:5]))} … ended with exit code {done.returncode}: {words}")
    return done.stdout


def timed(call: Callable) -> float:
    """Seconds of one call, the accelerator's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def summary(seconds: list[float], units: float | None = None) -> dict:
    """Median, spread and the single measurements, in seconds; with `units` of work per call also units per second."""
    median = statistics.median(seconds)
    result = {"median_seconds": median, "min": min(seconds), "max": max(seconds), "rounds": seconds}
    return result if units is None else {**result, "per_second": units / median}


def speedup(times: dict[str, dict], *, ours: str, baseline: str) -> dict[str, float]:
    """How many times faster `ours` is than `baseline`: median, min and max of the rounds' ratios."""
    pairs = zip(times[ours]["rounds"], times[baseline]["rounds"], strict=True)
    return spread([theirs / mine for mine, theirs in pairs])


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak_memory_gib(call: Callable) -> float:
    """The most memory that one call allocates at a time, as torch's allocator counts it, in GiB."""
    import torch

    if torch.cuda.is_initialized():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / GIB

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # events() drops the allocations that it could blame on an operator; the raw list has every change in order.
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0) / GIB


def synchronize() -> None:
    """Wait for the accelerator, if one is in use, so that the clock measures finished work."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Free the memory of objects without a reference, on the device as well."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def host_kind() -> str:
    """The machine in a word that fits into a file name, such as `nvidia-h200` or `cpu-2-cores`."""
    gpu = hardware()["gpu"]
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else f"cpu-{os.cpu_count()}-cores"


def hardware() -> dict:
    """Processor, cores, memory, GPU, and how busy the machine was, since a busy one measures badly."""
    import torch

    from gpt2repro.training.machine import cpu_name

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "system": platform.system(),
    }
