"""Kill a training run again and again, resume it by the same command, and compare it with the uninterrupted one.

gpt2repro verify-resume --config quickstart --kills 20 -- --max_steps 60 --save_steps 10

Runs the training program once uninterrupted and then with SIGKILL at random moments: while it starts, between steps,
and in the middle of a save. Compared are every loss, gradient norm, learning rate and evaluation of metrics.jsonl, the
sha256 of the final weights and the optimizer's state, the position in the data, and the pointers best, latest, final.

On a CPU, and with --deterministic on a GPU, all of it must be equal to the last bit. On a GPU without it two
uninterrupted runs already differ; then the run is done twice without interruption, and a resumed loss may differ from
the first by at most twice what the second does. Exit code 0: the same run; 1: not.
"""

import contextlib
import importlib.util
import json
import random
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2repro.checkpoint.layout import POINTERS, list_steps, resolve_pointer
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.options import InputError, parse_options

MEASURED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")  # what no two runs have in common
POLL_SECONDS = 0.001  # a tiny save takes about 10 ms, and some kills are to hit its middle
# Where the kills aim: half of them into a save, since that is where a half-written checkpoint could come from.
AIMS = {"saving": 5, "training": 4, "starting": 1}


@dataclass
class Options:
    config: str | None = None
    "Preset or YAML of the run, handed on to train_accelerate.py; more of its options after `--`."
    kills: int = 5
    "How often to kill. When a run is finished before that, another one is begun."
    processes: int = 1
    "Processes of every launch; more than one are started by torchrun on this machine."
    seed: int = 0
    "Seeds the moments of the kills."
    work_dir: Path = Path("runs/verify-resume")
    "Where the runs are put; must not exist yet. Runs that came out equal are removed."

    def problems(self) -> list[str]:
        counts = {"kills": self.kills, "processes": self.processes}
        found = [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]
        if self.work_dir.exists() and (not self.work_dir.is_dir() or any(self.work_dir.iterdir())):
            found.append(f"work_dir={self.work_dir} exists already; remove it, or name another one")
        return found


def main(argv: list[str]) -> int:
    argv, train_options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = parse_options(Options, argv, prog="gpt2repro verify-resume", description=__doc__)
    taken = [one for one in train_options if one.split("=")[0].replace("-", "_") in ("__run_dir", "__resume", "__plan")]
    if taken:
        raise InputError(
            f"{', '.join(taken)} cannot be given: verify-resume decides where the runs lie and how they start"
        )
    if options.config is not None:
        train_options = ["--config", options.config, *train_options]
    options.work_dir.mkdir(parents=True, exist_ok=True)
    return verify(options, train_options)


def verify(options: Options, train_options: list[str]) -> int:
    """The whole campaign; prints the report and returns the exit code."""
    chance = random.Random(options.seed)
    reference = options.work_dir / "uninterrupted"
    print(f"uninterrupted run: {shlex.join(command(options, train_options, reference))}", flush=True)
    timing = Timing()
    run_whole(options, train_options, reference, timing)
    print(
        f"  {timing.startup:.1f} s to the first step, {timing.training:.1f} s of training, {timing.save:.3f} s per save"
    )

    tolerance, twin = 0.0, None
    if not bit_identical_expected(reference):
        twin = options.work_dir / "uninterrupted-twin"
        print("GPU without --deterministic: one more uninterrupted run, to know what is equal here", flush=True)
        run_whole(options, train_options, twin, Timing())
        tolerance = 2 * max(differences(reference, twin).values(), default=0.0)

    killed = hit_save = rounds = 0
    different: list[str] = []
    while killed < options.kills:
        rounds += 1
        run_dir = options.work_dir / f"killed-{rounds}"
        while killed < options.kills:
            moment = kill_once(options, train_options, run_dir, chance, timing)
            if moment is None:
                break  # it was faster than the kill
            killed += 1
            hit_save += "in the middle of a save" in moment
            print(f"  kill {killed:3d}  round {rounds}: {moment}", flush=True)
        finish(options, train_options, run_dir)
        found = compare(reference, run_dir, tolerance)
        print(f"round {rounds}: {'; '.join(found) if found else 'equal to the uninterrupted run'}", flush=True)
        different += [f"round {rounds}: {one}" for one in found]
        if not found:
            shutil.rmtree(run_dir)

    how = "bit by bit" if tolerance == 0 else f"within {tolerance:.3g}, twice what two uninterrupted runs differ by"
    print(f"\n{killed} kills ({hit_save} in the middle of a save) in {rounds} runs of {options.processes} process(es)")
    print(f"losses, evaluations, weights, optimizer, data position, best: {how}")
    if different:
        print(f"DIFFERENT: {len(different)} finding(s); the runs lie in {options.work_dir}")
        return 1
    print("EQUAL: every killed and resumed run is the uninterrupted one")
    return 0


# --- running


@dataclass
class Timing:
    """How long the parts of a launch take, in seconds, as seen from outside."""

    startup: float = 0.0
    training: float = 0.0
    save: float = 0.01


def command(options: Options, train_options: list[str], run_dir: Path) -> list[str]:
    found = importlib.util.find_spec("train_accelerate")
    if found is None or found.origin is None:
        raise InputError("train_accelerate.py is not importable: install the project, or start from its root")
    program = [found.origin, *train_options, "--run_dir", str(run_dir)]
    if options.processes == 1:
        return [sys.executable, *program]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["--nproc_per_node", options.processes, "--master_addr", "127.0.0.1", "--master_port", port]
    return [sys.executable, "-m", "torch.distributed.run", *map(str, launcher), *program]


def start(options: Options, train_options: list[str], run_dir: Path) -> subprocess.Popen:
    log = run_dir.with_name(f"{run_dir.name}.log")
    with log.open("ab") as out:
        arguments = command(options, train_options, run_dir)
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def end_of_log(run_dir: Path) -> str:
    lines = run_dir.with_name(f"{run_dir.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else "\n".join(lines[-5:])


def run_whole(options: Options, train_options: list[str], run_dir: Path, timing: Timing) -> None:
    """An uninterrupted run. Raises: InputError with the program's own message where it fails."""
    began = time.perf_counter()
    process = start(options, train_options, run_dir)
    first, saves, saving_since = None, [], None
    while process.poll() is None:
        now = time.perf_counter()
        if first is None and log_size(run_dir):
            first = now
        if saving(run_dir):
            saving_since = saving_since or now
        elif saving_since is not None:
            saves.append(now - saving_since)
            saving_since = None
        time.sleep(POLL_SECONDS)
    ended = time.perf_counter()
    if process.returncode != 0:
        raise InputError(f"the uninterrupted run ended with exit code {process.returncode}: {end_of_log(run_dir)}")
    timing.startup, timing.training = (first or ended) - began, ended - (first or ended)
    timing.save = statistics.median(saves) if saves else timing.save


def kill_once(
    options: Options, train_options: list[str], run_dir: Path, chance: random.Random, timing: Timing
) -> str | None:
    """Start the run, kill it at a random moment; returns what it was doing, or None where it ended by itself."""
    (aim,) = chance.choices(list(AIMS), weights=list(AIMS.values()))
    skipped_saves, fraction = chance.randrange(2), chance.random()
    before = log_size(run_dir)
    process = start(options, train_options, run_dir)
    began = time.perf_counter()

    def until(condition) -> bool:
        while not condition() and process.poll() is None:
            time.sleep(POLL_SECONDS)
        return process.poll() is None

    if aim == "starting":
        deadline = began + fraction * timing.startup
        until(lambda: time.perf_counter() >= deadline)
    elif aim == "training":
        until(lambda: log_size(run_dir) not in (0, before))
        deadline = time.perf_counter() + fraction * timing.training / 2
        until(lambda: time.perf_counter() >= deadline)
    else:
        until(lambda: not saving(run_dir))  # what the last kill left behind is removed by the new start
        for _ in range(skipped_saves):
            until(lambda: saving(run_dir)) and until(lambda: not saving(run_dir))
        until(lambda: saving(run_dir))
        deadline = time.perf_counter() + fraction * timing.save
        until(lambda: time.perf_counter() >= deadline)

    if process.poll() is not None:
        if process.returncode != 0:
            raise InputError(f"a resumed run ended with exit code {process.returncode}: {end_of_log(run_dir)}")
        return None
    kill_all(process)
    # While starting, what lies there half written is still the trace of the kill before.
    doing = "in the middle of a save" if aim != "starting" and saving(run_dir) else f"while {aim}"
    whole = list_steps(run_dir / "checkpoints")
    logged = max((record["step"] for record in records(run_dir)), default=0)
    return f"{doing}; step {logged} logged, newest checkpoint {whole[-1][1].name if whole else 'none'}"


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all that it started (torchrun's workers are in sessions of their own)."""
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def finish(options: Options, train_options: list[str], run_dir: Path) -> None:
    process = start(options, train_options, run_dir)
    if process.wait() != 0:
        raise InputError(f"a resumed run ended with exit code {process.returncode}: {end_of_log(run_dir)}")


def saving(run_dir: Path) -> bool:
    """Whether a checkpoint is half written just now."""
    try:
        return any(path.name.startswith(".step_") for path in (run_dir / "checkpoints").iterdir())
    except OSError:
        return False


def log_size(run_dir: Path) -> int:
    """Bytes of metrics.jsonl, 0 where there is none yet."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


# --- comparing


def bit_identical_expected(run_dir: Path) -> bool:
    """On a CPU always; on a GPU with --deterministic."""
    import yaml

    device = read_state(find_checkpoint(run_dir))["environment"]["device"]
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    return device == "cpu" or bool(config.get("deterministic"))


def records(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what is measured in time; a line that is being written is left out."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in whole]


def differences(first: Path, second: Path) -> dict[str, float]:
    """Number's name -> by how much it differs at most, over records in the same place."""
    found: dict[str, float] = {}
    for ours, theirs in zip(records(first), records(second), strict=False):
        for name in ours.keys() & theirs.keys():
            if isinstance(ours[name], float) and isinstance(theirs[name], float):
                found[name] = max(found.get(name, 0.0), abs(ours[name] - theirs[name]))
    return found


def compare(reference: Path, run_dir: Path, tolerance: float) -> list[str]:
    """What is not as in the uninterrupted run, in words; empty where all is."""
    return list(_compare(reference, run_dir, tolerance))


def _compare(reference: Path, run_dir: Path, tolerance: float) -> Iterator[str]:
    expected, found = records(reference), records(run_dir)
    if [(r["step"], sorted(r)) for r in expected] != [(r["step"], sorted(r)) for r in found]:
        yield f"metrics.jsonl has {len(found)} records, expected {len(expected)} of the same steps"
    elif tolerance == 0:
        wrong = next(((a, b) for a, b in zip(expected, found, strict=True) if a != b), None)
        if wrong is not None:
            yield f"metrics.jsonl first differs at step {wrong[0]['step']}: {wrong[1]}, expected {wrong[0]}"
    else:
        for name, difference in differences(reference, run_dir).items():
            if difference > tolerance:
                yield f"{name} differs by {difference:.3g}"

    for name in POINTERS:
        targets = [resolve_pointer(directory / "checkpoints", name) for directory in (reference, run_dir)]
        if tolerance == 0 and len({target and target.name for target in targets}) > 1:
            yield f"the pointer {name} is {targets[1] and targets[1].name}, expected {targets[0] and targets[0].name}"
    theirs, ours = find_checkpoint(reference), find_checkpoint(run_dir)
    if theirs is None or ours is None or theirs.name != ours.name:
        yield f"the last checkpoint is {ours and ours.name}, expected {theirs and theirs.name}"
        return
    for name in ("step", "source", "identity", *(("best", "health") if tolerance == 0 else ())):
        if read_state(theirs).get(name) != read_state(ours).get(name):
            yield f"{name} in the state is {read_state(ours).get(name)}, expected {read_state(theirs).get(name)}"
    if tolerance == 0:
        listed = [json.loads((path / "checksums.json").read_bytes()) for path in (theirs, ours)]
        for name in sorted(name for name in listed[0] if name.endswith(".safetensors")):
            if listed[0][name] != listed[1].get(name):
                yield f"{name} of {ours.name} has another sha256"
