"""metrics.jsonl, read and cut: one JSON object a line; a killed process leaves at worst half of its last line.

Knows no metric by name but `step`, `loss`, `val_loss` and `val_rises`.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from gpt2repro.files import atomic_file, step_in_name
from gpt2repro.options import InputError, read_yaml


def read_metrics(run_dir: str | Path, *, at_most: int | None = None) -> tuple[list[dict], list[dict]]:
    """(training records, evaluation records) of a run, in the order they were logged; a torn last line is left out.

    `at_most` so many training records, spread evenly, are enough for a picture: a million lines then take a second.
    """
    path, every = Path(run_dir) / "metrics.jsonl", 1
    if not path.is_file():
        return [], []
    if at_most is not None:
        with path.open("rb") as lines:
            every = 1 + sum(1 for _ in lines) // at_most
    records = [record for _, record in whole_lines(path, every)]
    return [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]


def finished_run(run_dir: str | Path) -> tuple[dict, list[dict]]:
    """(options, evaluation records) of a run that has ended.

    Raises: InputError for a directory that is no run, or a run that has not evaluated its last step.
    """
    config = options_of(run_dir, "seed", "max_steps")
    _, evaluations = read_metrics(run_dir, at_most=1)
    last = evaluations[-1] if evaluations else {"step": -1, "val_loss": None}
    early = last.get("val_rises", 0) >= (config.get("stop_when_val_rises") or math.inf)
    if not isinstance(last["val_loss"], float) or not (early or last["step"] >= config["max_steps"]):
        raise InputError(f"{run_dir} has not evaluated its last step, {config['max_steps']}; finish the run first")
    return config, evaluations


def options_of(run_dir: str | Path, *numbers: str) -> dict:
    """What a run's config.yaml says. Raises: InputError for none, or one that is damaged or lacks one of `numbers`."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir} is no run: it has no config.yaml")
    options = read_yaml(str(path), "the file")
    if wrong := next((name for name in numbers if type(options.get(name)) is not int), None):
        raise InputError(f"{path} is damaged: {wrong} is {options.get(wrong)!r}, expected a whole number")
    return options


def cut_metrics(path: Path, last_step: int | None, begins: int = 0) -> list[tuple[int, int]]:
    """Keep the records up to and including `last_step` (None: none). Atomic; never the whole file in memory.

    Returns the steps (first, last) of the training that the log has lost, of those after the step where it `begins`.
    """
    lost, expected = [], begins + 1
    if path.exists():
        with atomic_file(path) as out:
            for line, record in whole_lines(path) if last_step is not None else ():
                if record["step"] > last_step:
                    continue
                out.write(line)
                if "loss" in record:
                    if record["step"] > expected:
                        lost.append((expected, record["step"] - 1))
                    expected = max(expected, record["step"] + 1)
    for sample in (path.parent / "samples").glob("step_*.md"):
        if last_step is None or step_in_name(sample) > last_step:
            sample.unlink()
    return [*lost, (expected, last_step)] if last_step is not None and expected <= last_step else lost


def whole_lines(path: Path, every: int = 1) -> Iterator[tuple[str, dict]]:
    """(line, record) of every line that was written whole; a process killed while writing leaves half of the last.

    With `every` all evaluations, and of the other lines the first of so many.
    """
    number = itertools.count()
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if '"val_loss"' not in line and next(number) % every:
                continue
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record
