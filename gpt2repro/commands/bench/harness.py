"""How every benchmark measures and what it writes down; knows no benchmark.

    times = compare({"ours": ours, "theirs": theirs}, rounds=10, warmup=2, units=tokens_per_call)
    results = {"headlines": [headline("tokenising", times, ours="ours", baseline="theirs", unit="tokens/s", goal=2.0)]}
    write_record("tokenize", results, argv=argv, out=options.out)

A benchmark first shows that its candidates compute the same thing, on random input, and raises `NotEqual` where they
do not: a fast wrong answer is never timed. Candidates run in one process and take turns round by round, so that a
change in the machine's speed meets all of them, and speed-ups are medians of the rounds' own ratios.
"""

import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RECORDS = Path("results/benchmarks")  # seen from the project's root, where the commands are run
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "tiktoken", "datasets")
GIB = 2**30


class NotEqual(Exception):
    """Two candidates of a benchmark do not compute the same thing; nothing was timed."""


def compare(
    candidates: dict[str, Callable[[], object]], *, rounds: int, warmup: int, units: float | None = None
) -> dict[str, dict]:
    """Time the candidates in interleaved rounds: each is called once per round, in alternating order.

    Returns per candidate `median_seconds`, `min`, `max`, `rounds` (seconds of every call) and, where `units` says how
    much work one call does, `per_second` (units by the median). `median_cpu_seconds` is the processor time of this
    process over all threads: where it is far below the seconds, something else kept the machine busy.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    for turn in range(rounds):
        for name in candidates if turn % 2 == 0 else reversed(candidates):
            synchronize()
            start, cpu_start = time.perf_counter(), time.process_time()
            candidates[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    return {
        name: {**summary(seconds[name], units), "median_cpu_seconds": statistics.median(cpu_seconds[name])}
        for name in candidates
    }


def summary(seconds: list[float], units: float | None = None) -> dict:
    """Median, spread and the single measurements, in seconds; with `units` also the units per second."""
    median = statistics.median(seconds)
    result = {"median_seconds": median, "min": min(seconds), "max": max(seconds), "rounds": seconds}
    return result if units is None else {**result, "per_second": units / median}


def speedup(times: dict[str, dict], *, ours: str, baseline: str) -> dict[str, float]:
    """How many times faster `ours` is than `baseline`: median, min and max of the rounds' ratios."""
    pairs = zip(times[ours]["rounds"], times[baseline]["rounds"], strict=True)
    ratios = [theirs / mine for mine, theirs in pairs]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def headline(measure: str, times: dict[str, dict], *, ours: str, baseline: str, unit: str, goal: float | None) -> dict:
    """One row of the README's table: a measure, both figures in `unit`, the speed-up with its spread, and its goal."""
    return {
        "measure": measure,
        "unit": unit,
        "ours": times[ours].get("per_second", times[ours]["median_seconds"]),
        "baseline": times[baseline].get("per_second", times[baseline]["median_seconds"]),
        "baseline_name": baseline,
        "speedup": speedup(times, ours=ours, baseline=baseline),
        "goal": goal,
    }


def figure(measure: str, value: float, *, unit: str, goal: float | None = None, at_most: bool = False) -> dict:
    """One row of the README's table without a baseline: a figure and its goal, an upper bound if `at_most`."""
    return {"measure": measure, "unit": unit, "ours": value, "goal": goal, "at_most": at_most}


def peak_memory_gib(call: Callable[[], object]) -> float:
    """What one call needs at its peak above what was allocated before it, counted by torch's allocator, in GiB."""
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
    """Wait for the accelerator, if one is in use, so that a clock read next tells of finished work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def write_record(name: str, results: dict, *, argv: list[str], out: Path) -> Path:
    """Write `out/NAME-<host kind>.json`: results, command, commit, date, hardware, versions. Print the headlines."""
    record = {
        "name": name,
        "command": shlex.join(["gpt2repro", "bench", name, *argv]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": _versions(),
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{host_kind()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in results.get("headlines", []):
        print(describe(row))
    print(f"record: {path}", flush=True)
    return path


def describe(row: dict) -> str:
    """A headline or figure as one line of text."""
    text = f"{row['measure']}: {row['ours']:,.4g} {row['unit']}"
    if "speedup" in row:
        ratio = row["speedup"]
        spread = f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"
        text += f", {spread} of {row['baseline_name']} ({row['baseline']:,.4g})"
    if row["goal"] is not None:
        text += f"; goal {goal_text(row)}: {'reached' if reached(row) else 'NOT reached'}"
    return text


def goal_text(row: dict) -> str:
    """The goal as it is written in the table, for example `>= 1.2x` or `<= 3 s`."""
    if "speedup" in row:
        return f">= {row['goal']:g}x"
    return f"{'<=' if row['at_most'] else '>='} {row['goal']:,g} {row['unit']}"


def reached(row: dict) -> bool:
    """Whether a row with a goal meets it."""
    value = row["speedup"]["median"] if "speedup" in row else row["ours"]
    return value <= row["goal"] if row.get("at_most") else value >= row["goal"]


def host_kind() -> str:
    """The machine in a word that fits into a file name, such as `nvidia-h200` or `cpu-2-cores`."""
    gpu = hardware()["gpu"]
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else f"cpu-{os.cpu_count()}-cores"


def hardware() -> dict:
    """Processor, cores, memory, GPU, and how busy the machine was, since a busy one measures badly."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    has_load = hasattr(os, "getloadavg")  # not on Windows
    return {
        "gpu": gpu,
        "gpus": torch.cuda.device_count() if gpu else 0,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if has_load else None,
        "system": platform.system(),
    }


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The checkout's commit, with `+changes` where files differ from it."""
    root = Path(__file__).resolve().parents[3]
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return (commit.stdout.strip() or "unknown") + ("+changes" if changed.stdout.strip() else "")
