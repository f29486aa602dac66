"""Names and places of a run's checkpoints: step_N directories, the pointers to them, the optimizer's pieces."""

import functools
import os
import re
import secrets
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpt2repro.options import InputError

FORMAT, VERSION = "gpt2repro-checkpoint", 1
STEP_NAME = re.compile(r"step_(\d{6,12})")
PIECE_NAME = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
POINTERS = ("latest", "best", "final")
EMA = "ema/"  # in a checkpoint: the averaged weights, as a model's directory
LONGEST_WAIT = timedelta(hours=6)  # for one process' slow work: 19 GB of the 1558M over a slow line


def list_steps(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every step_N in a checkpoints directory, ascending."""
    paths = Path(directory).iterdir() if Path(directory).is_dir() else ()
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def resolve_pointer(directory: str | Path, name: str) -> Path | None:
    """The step_N that `latest`, `best` or `final` points to, or None if there is no such directory."""
    return dict(list_steps(directory)).get(pointed_step(Path(directory), name))


def kept_steps(
    steps: list[int], keep_last: int | None, milestone_steps: int | None, *, pointed: set[int | None]
) -> set[int]:
    """Which of the saved `steps` (ascending) are kept: the newest `keep_last` (None: all), milestones, pointed ones."""
    if keep_last is None:
        return set(steps)
    milestones = {step for step in steps if milestone_steps and step % milestone_steps == 0}
    return {*steps[-max(keep_last, 1) :], *milestones, *(pointed & set(steps))}


def find_run(model: str | Path) -> Path | None:
    """The run that a model belongs to: the directory itself, or the one around its checkpoints and their ema/."""
    path = Path(model).resolve()
    return next((place for place in [path, *list(path.parents)[:3]] if (place / "metrics.jsonl").is_file()), None)


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def set_pointer(directory: Path, name: str, step: int) -> None:
    """Replace the pointer by one rename, so that a reader sees either the old or the new one."""
    aside = directory / f".{name}.tmp-{secrets.token_hex(4)}"
    try:
        if os.name == "nt":  # on Windows a rename cannot replace a link to a directory
            raise OSError
        aside.symlink_to(step_path(directory, step).name, target_is_directory=True)
    except OSError:  # such as a filesystem without links
        aside.write_text(step_path(directory, step).name + "\n")
    os.replace(aside, directory / name)


def pointed_step(directory: Path, name: str) -> int | None:
    path = directory / name
    try:
        target = os.readlink(path) if path.is_symlink() else path.read_text()[:64]
    except (OSError, UnicodeDecodeError):
        return None
    match = STEP_NAME.fullmatch(target.strip())
    return int(match[1]) if match else None


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def patient_group():
    """A new gloo group of all ranks, for waiting on slow work of one of them; NCCL would give up after 10 minutes."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


@functools.lru_cache(maxsize=1)
def _group_for_waiting(world):
    return patient_group()


def from_all_ranks(value: Any = None, group=None) -> list:
    """Every rank's `value`, in the order of ranks. Every rank calls it, and waits hours for the slowest.

    A thread that calls it beside the training loop has a `group` of its own.
    """
    values = [value] * rank_and_world()[1]
    if group is not None or len(values) > 1:
        dist.all_gather_object(values, value, group=group or _group_for_waiting(dist.group.WORLD))
    return values


def from_rank_zero(call: Callable):
    """Rank 0 alone makes `call()`; every rank returns its result. Raises: the call's InputError, on every rank."""
    answer = None
    if rank_and_world()[0] == 0:
        try:
            answer = call()
        except InputError as error:
            answer = error
    answer = from_all_ranks(answer)[0]
    if isinstance(answer, InputError):
        raise answer
    return answer
