"""Names and places of a run's checkpoints: step_N directories, the pointers to them, the optimizer's pieces."""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from gpt2repro.options import InputError

FORMAT, VERSION = "gpt2repro-checkpoint", 1
STEP_NAME = re.compile(r"step_(\d{6,12})")
PIECE_NAME = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
POINTERS = ("latest", "best", "final")


def list_steps(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every step_N in a checkpoints directory, ascending."""
    paths = Path(directory).iterdir() if Path(directory).is_dir() else ()
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def resolve_pointer(directory: str | Path, name: str) -> Path | None:
    """The step_N that `latest`, `best` or `final` points to, or None if there is no such directory."""
    step = pointed_step(Path(directory), name)
    path = None if step is None else step_path(Path(directory), step)
    return path if path and path.is_dir() else None


def kept_steps(
    steps: list[int], keep_last: int | None, milestone_steps: int | None, *, pointed: set[int | None]
) -> set[int]:
    """Which of the saved `steps` (ascending) are kept: the newest `keep_last` (None: all), milestones, pointed ones."""
    if keep_last is None:
        return set(steps)
    milestones = {step for step in steps if milestone_steps and step % milestone_steps == 0}
    return {*steps[-max(keep_last, 1) :], *milestones, *(pointed & set(steps))}


def find_run(model: str | Path) -> Path | None:
    """The run that a model belongs to: the directory itself, or the one around its checkpoints."""
    path = Path(model).resolve()
    return next((place for place in [path, *list(path.parents)[:2]] if (place / "metrics.jsonl").is_file()), None)


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


def piece_name(rank: int, writers: int) -> str:
    return f"trainer_state/optimizer-{rank:05d}-of-{writers:05d}.safetensors"


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_zero(call: Callable, group=None):
    """Rank 0 alone makes `call()`; every rank returns its result. Raises: the call's InputError, on every rank."""
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = call()
        except InputError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1]:
        raise InputError(answer[1])
    return answer[0]
