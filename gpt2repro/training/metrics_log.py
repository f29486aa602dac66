"""metrics.jsonl, read and cut: one JSON object a line; a killed process leaves at worst half of its last line.

Knows no metric by name but `step`, `loss` and `val_loss`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from gpt2repro.files import atomic_file, step_in_name


def read_metrics(run_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """(training records, evaluation records) of a run in the order of the log, without a torn last line."""
    path = Path(run_dir) / "metrics.jsonl"
    records = [record for _, record in whole_lines(path)] if path.is_file() else []
    return [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]


def cut_metrics(path: Path, last_step: int | None) -> None:
    """Keep the records and samples up to and including `last_step` (None: none), atomically, a line at a time."""
    if not path.exists():
        return
    with atomic_file(path) as out:
        if last_step is not None:
            out.writelines(line for line, record in whole_lines(path) if record["step"] <= last_step)
    for sample in (path.parent / "samples").glob("step_*.md"):
        if last_step is None or step_in_name(sample) > last_step:
            sample.unlink()


def whole_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(line, record) of every whole line; a process that was killed while writing leaves half of a line."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record
