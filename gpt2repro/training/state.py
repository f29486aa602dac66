"""The state that a run keeps from step to step and stores in its checkpoints; a loaded state is checked before its use.

Knows no optimizer and no file format: the checkpoint room owns the tensors.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from typing_extensions import NotRequired, TypedDict  # pydantic wants this one before Python 3.12

from gpt2repro.checkpoint.layout import STEP_NAME, find_run
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.data.mixture import changed_past
from gpt2repro.files import step_in_name
from gpt2repro.options import InputError
from gpt2repro.redaction import scrub
from gpt2repro.training.metrics_log import options_of
from gpt2repro.training.schedules import stable_until

Count = Annotated[int, Field(ge=0)]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Best(TypedDict):
    """The checkpoint with the lowest validation loss."""

    step: Count
    val_loss: float
    rises: NotRequired[Count]  # with stop_when_val_rises: evaluations in a row, up to now, with a higher loss


class Identity(TypedDict):
    """The settings that identify a run: with another value, its remaining steps would belong to another run."""

    data: dict[str, Any]
    batch_tokens: int
    optimizer: str
    architecture: dict[str, Any]
    documents: NotRequired[str]  # "mask"; absent for "cross"
    reduction: NotRequired[dict[str, Any]]  # what decides the bits of `--reduction fixed`, absent for `fast`
    machines: NotRequired[Annotated[list[str], Field(min_length=1)]]  # that made them, one after the other; no bar


class Source(TypedDict):
    """The position in the data: windows consumed, ranges skipped on purpose, and for streams each lane's place."""

    position: Count
    skipped: list[Range]
    lanes: NotRequired[dict[str, list[Count]]]


class HeldRecipe(TypedDict):
    """The data's identity from a step on; `position` is that of the step's first window."""

    step: Count
    position: Count
    data: dict[str, Any]


class Health(TypedDict):
    """The health monitor's window and counts."""

    losses: list[float]
    grad_norms: list[float]
    skipped: Count
    in_a_row: Count
    rewinds: Count
    scaler_skips: Count
    scaler_in_a_row: Count


class RunState(BaseModel, strict=True):
    """The one object that changes from step to step; a checkpoint keeps its `model_dump()`."""

    step: Count = 0  # optimizer steps done
    best: Best | None = None
    run_ids: dict[str, str] | None = None  # the trackers' names of this run
    seconds: float = 0.0  # of training steps
    device_seconds: float | None = None  # their sum over all processes, where the number of processes has changed
    scaler: dict[str, Any] | None = None  # fp16's loss scale
    health: Health | None = None  # None before the first step
    identity: Identity
    source: Source
    parent: dict[str, Any] | None = None  # the checkpoint that a cool-down branched off
    recipes: list[HeldRecipe] = []  # every recipe that the run has had; the last one holds
    digests: dict[str, str] = {}
    environment: dict[str, Any] = {}
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None  # None in checkpoints from before it was kept


def load_run_state(checkpoint: Path, identity: Identity) -> RunState:
    """The state in a verified checkpoint. Raises: InputError where the loop never wrote it, or another run did."""
    content = read_state(checkpoint)
    try:
        state = RunState.model_validate(content)
        wrong = [] if state.health is not None else ["health"]
    except ValidationError as error:
        state, wrong = None, list(dict.fromkeys(str(problem["loc"][0]) for problem in error.errors()))
    if state and checkpoint.name.startswith("step_") and step_in_name(checkpoint) != state.step:
        wrong.append("step")
    if wrong:
        raise InputError(
            f"{checkpoint}: its trainer state has no usable {' and '.join(wrong)}; take another checkpoint"
        )
    refuse_another_run(state.identity, identity, checkpoint, state.source["position"])
    return state


def refuse_another_run(saved: Identity, now: Identity, checkpoint: Path, position: int = 0) -> None:
    """Raises: InputError where an option changed that would make the rest of the run another run.

    Free to change on resume: processes, micro_batch_size, precision, workers, trackers, intervals; max_steps, lr and
    the rest of the schedule change lr(step) from here on. Not free: the data and its order (data, seed, seq_len,
    batch_tokens: they say which windows each step sees), whether documents see each other, the architecture and the
    kind of optimizer state; with a fixed reduction, all that decides the last bits but the machine. A recipe may change
    for positions that lie ahead of `position`.
    """
    saved, now = scrub(saved), scrub(now)  # a checkpoint is written without home directories
    pairs = {name: (saved[name], now[name]) for name in ("batch_tokens", "optimizer")}
    has_recipe = "recipe" in (saved["data"].get("kind"), now["data"].get("kind"))
    pairs["documents"] = tuple(identity.get("documents", "cross") for identity in (saved, now))
    pairs["reduction"] = tuple("fixed" if "reduction" in identity else "fast" for identity in (saved, now))
    for part in ("architecture", "data", *(["reduction"] if pairs["reduction"] == ("fixed", "fixed") else [])):
        old, new = saved[part], now[part]
        names = sorted({*old, *new})
        if part == "data" and old.get("revision") is None:
            names = [name for name in names if name != "source"]  # local files may lie elsewhere: their sha256 decides
        if part == "data" and has_recipe:
            # The rest is compared below, up to `position`. Shards that become a recipe had another kind of order.
            names = ["seed", "seq_len", "recut_windows", *(["order"] if old.get("kind") == new.get("kind") else [])]
        pairs |= {f"{part}: {name}": (old.get(name), new.get(name)) for name in names}
    changed = [f"{name} was {before} and is now {after}" for name, (before, after) in pairs.items() if before != after]
    if has_recipe and not changed:
        changed = changed_past(saved["data"], now["data"], position)
    if changed:
        raise InputError(
            f"cannot continue {checkpoint} with other settings: {'; '.join(changed)}. Set them back, or start a new "
            "--run_dir (with --init_from to begin from these weights)"
        )


def cooled_down(config):
    """The TrainConfig of a run that branches off `cooldown_from`: from its step on, linearly down to `min_lr`.

    The parent run is only read, and no more once the branch has a checkpoint of its own: it may have gone on, or away.

    Raises: InputError where there is no checkpoint, its learning rate was not stable, or `run_dir` is another branch.
    """
    own = find_checkpoint(config.run_dir)
    if own is not None and (begun := read_state(own).get("parent")):
        named = STEP_NAME.fullmatch(Path(config.cooldown_from).name)
        if named and int(named[1]) != begun["step"]:
            raise InputError(f"{config.run_dir} holds the branch of step {begun['step']}; choose another --run_dir")
        return replace(config, schedule="wsd", max_steps=begun["step"] + config.cooldown_steps, resume="auto")
    if (checkpoint := find_checkpoint(config.cooldown_from)) is None:
        raise InputError(f"cooldown_from={config.cooldown_from}: no checkpoint there")
    step, run = read_state(checkpoint)["step"], find_run(checkpoint)
    if run is not None and run.resolve() == config.run_dir.resolve():
        raise InputError(f"cooldown_from={config.cooldown_from} lies in run_dir={config.run_dir}; name a new --run_dir")
    options = options_of(run, "max_steps", "warmup_steps") if run is not None else {}
    parent = {"schedule": "cosine", "cooldown_steps": None, **options}
    end = stable_until(parent["max_steps"], parent["cooldown_steps"]) if run is not None else step
    if run is not None and not (parent["schedule"] == "wsd" and parent["warmup_steps"] <= step <= end):
        raise InputError(
            f"{checkpoint} does not lie in the stable phase of a wsd schedule (it has {parent['schedule']}, steps "
            f"{parent['warmup_steps']} to {end}); take another checkpoint, or train with --schedule wsd"
        )
    return replace(config, schedule="wsd", max_steps=step + config.cooldown_steps, resume=str(checkpoint))


def find_resume(run_dir: Path, resume: str, *, fetch: Callable[[str, Path], Path], is_main: bool) -> Path | None:
    """The checkpoint that `--resume` means, None for a new run. Every rank calls it; `fetch` gets one from the Hub.

    A run that started from another run's checkpoint and was interrupted continues from its own checkpoints, by the same
    command. With an earlier checkpoint of the run itself, it goes back to that step and abandons the later ones.
    """
    own = find_checkpoint(run_dir, all_ranks=True)
    if resume == "auto":
        return own
    if resume == "never":
        if own is not None:
            raise InputError(f"{run_dir} already holds a run; choose another --run_dir, or drop --resume never")
        return None
    place: str | Path = resume
    if resume.startswith("hub:"):
        place = fetch(resume, run_dir / "from_hub")  # by the first process; the others wait
        curve = Path(place) / "training/metrics.jsonl"
        if is_main and own is None and curve.is_file():  # the log then begins at step 0
            shutil.copy(curve, run_dir / "metrics.jsonl")
    if (found := find_checkpoint(place, all_ranks=True)) is None:
        raise InputError(f"resume={resume}: no checkpoint there")
    elsewhere = own is not None and found.resolve().parent != own.resolve().parent
    return own if elsewhere and read_state(own)["step"] >= read_state(found)["step"] else found
