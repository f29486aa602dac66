"""Kill a training run again and again, resume it by the same command, and compare it with the uninterrupted one.

    gpt2repro verify-resume --config quickstart --kills 20 -- --max_steps 60 --save_steps 10
    gpt2repro verify-resume --config quickstart --processes 1,2,4 -- --reduction fixed --micro_batch_size 8
                                                                           # another number of processes at every start

Runs the training program once uninterrupted and then with SIGKILL at random moments: while it starts, between steps,
and in the middle of a save. Compared are every loss, gradient norm, learning rate and evaluation of metrics.jsonl, the
sha256 of the final weights and the optimizer's state, the position in the data, and the pointers best, latest, final.

On a CPU, and with --deterministic on a GPU, all of it must be equal to the last bit. On a GPU without it two
uninterrupted runs already differ, and so do runs on one and on two processes without --reduction fixed, since they add
up in another order. Then the run is done again without interruption, once for each number of processes, and a resumed
loss may differ from the first by at most twice what those do. (Without --reduction fixed, dropout's masks depend on the
rank: use several numbers without dropout.)
Exit code 0: the same run; 1: not.
"""

import contextlib
import itertools
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from gpt2repro.checkpoint.layout import POINTERS, list_steps, resolve_pointer
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.files import read_json
from gpt2repro.options import AtLeastOne, InputError, Problems, Seed, parse_options
from gpt2repro.training.metrics_log import whole_lines

MEASURED = ("tokens_per_second", "step_seconds", "mfu", "memory_gib")  # numbers that differ in every run
POLL_SECONDS = 0.001  # a tiny save takes about 10 ms, and part of the kills must hit its middle
# What the kills aim at: half of them at a save, since only a save can leave a half-written checkpoint.
AIMS = {"saving": 5, "training": 4, "starting": 1}


@dataclass
class Options:
    config: str | None = None
    "Preset or YAML of the run, handed on to train_accelerate.py; more of its options after `--`."
    kills: AtLeastOne = 5
    "How often to kill. When a run is finished before that, another one is begun."
    processes: str = "1"
    "Processes of every launch, started by torchrun on this machine; several numbers, 1,2,4, take turns."
    seed: Seed = 0
    "Seeds the moments of the kills."
    work_dir: Path = Path("runs/verify-resume")
    "Where the runs are put; must not exist yet. Runs that came out equal are removed."

    def problems(self) -> Problems:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.processes):
            yield f"processes={self.processes} must be numbers of at least 1 with commas between, such as 1,2,4"
        if self.work_dir.exists() and (not self.work_dir.is_dir() or any(self.work_dir.iterdir())):
            yield f"work_dir={self.work_dir} exists already; remove it, or name another one"


def main(argv: list[str]) -> int:
    argv, train_options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = parse_options(Options, argv, prog="gpt2repro verify-resume", description=__doc__)
    taken = [one for one in train_options if one.split("=")[0].replace("-", "_") in ("__run_dir", "__resume", "__plan")]
    if taken:
        raise InputError(f"{', '.join(taken)} cannot be given: verify-resume decides where runs lie and how they start")
    if options.config is not None:
        train_options = ["--config", options.config, *train_options]
    options.work_dir.mkdir(parents=True, exist_ok=True)
    return verify(options, train_options)


def verify(options: Options, train_options: list[str]) -> int:
    """The whole campaign; prints the report and returns the exit code."""
    counts = [int(count) for count in options.processes.split(",")]
    if max(counts) > 1:  # torchrun's default, also for starts of one process: the bits depend on the threads
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    campaign, reference = Campaign(train_options, options.seed), options.work_dir / "uninterrupted"
    print(f"uninterrupted run: {shlex.join(campaign.command(reference, counts[0]))}", flush=True)
    campaign.startup, campaign.training, campaign.saving = campaign.run(reference, counts[0])
    times = f"{campaign.startup:.1f} s to the first step, {campaign.training:.1f} s of training"
    print(f"  {times}, {campaign.saving:.3f} s per save")

    tolerance = 0.0
    if not bit_identical_expected(reference, counts):
        print("no two such runs are equal to the last bit; more uninterrupted ones tell what is equal here", flush=True)
        for count in sorted({*counts} - {counts[0]}) or counts:
            twin = options.work_dir / f"uninterrupted-on-{count}"
            campaign.run(twin, count)
            tolerance = max(tolerance, 2 * max(differences(reference, twin).values(), default=0.0))

    killed = hit_save = rounds = 0
    different, turns = [], itertools.cycle(counts)
    while killed < options.kills:
        rounds += 1
        run_dir = options.work_dir / f"killed-{rounds}"
        # Without a moment the run was faster than the kill.
        while killed < options.kills and (moment := campaign.kill_once(run_dir, count := next(turns))):
            killed += 1
            hit_save += "in the middle of a save" in moment
            print(f"  kill {killed:3d}  round {rounds}, {count} process(es): {moment}", flush=True)
        campaign.run(run_dir, next(turns))
        found = compare(reference, run_dir, tolerance)
        print(f"round {rounds}: {'; '.join(found) if found else 'equal to the uninterrupted run'}", flush=True)
        different += [f"round {rounds}: {one}" for one in found]
        if not found:
            shutil.rmtree(run_dir)

    how = "bit by bit" if tolerance == 0 else f"within {tolerance:.3g}, twice what uninterrupted runs differ by"
    print(f"\n{killed} kills ({hit_save} in the middle of a save) in {rounds} runs of {options.processes} process(es)")
    print(f"losses, evaluations, weights, optimizer, data position, best: {how}")
    if different:
        print(f"DIFFERENT: {len(different)} finding(s); the runs lie in {options.work_dir}")
        return 1
    print("EQUAL: every killed and resumed run is the uninterrupted one")
    return 0


# --- running


class Campaign:
    """Launches of one training program, and how long its parts take in seconds, as seen from outside."""

    startup, training, saving = 0.0, 0.0, 0.01

    def __init__(self, train_options: list[str], seed: int):
        self.train_options, self.chance = train_options, random.Random(seed)

    def command(self, run_dir: Path, processes: int) -> list[str]:
        launcher = f"-m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node={processes}".split()
        program = ["-m", "gpt2repro", "train", *self.train_options, "--run_dir", str(run_dir)]
        return [sys.executable, *(launcher if processes > 1 else []), *program]

    def start(self, run_dir: Path, processes: int) -> subprocess.Popen:
        command = self.command(run_dir, processes)
        with log_of(run_dir).open("ab") as out:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

    def run(self, run_dir: Path, processes: int) -> tuple[float, float, float]:
        """Run to the end. Returns the seconds to the first step, from there to the end, and of a save."""
        began = time.perf_counter()
        process = self.start(run_dir, processes)
        first, saves, since = None, [], None
        while process.poll() is None:
            now = time.perf_counter()
            first = first or (now if log_size(run_dir) else None)
            if saving(run_dir):
                since = since or now
            elif since is not None:
                saves, since = [*saves, now - since], None
            time.sleep(POLL_SECONDS)
        ended = time.perf_counter()
        check_exit(process, run_dir)
        return (first or ended) - began, ended - (first or ended), statistics.median(saves or [self.saving])

    def kill_once(self, run_dir: Path, processes: int) -> str | None:
        """Start the run, kill it at a random moment; returns what it was doing, or None where it ended by itself."""
        (aim,) = self.chance.choices(list(AIMS), weights=list(AIMS.values()))
        skipped_saves, fraction = self.chance.randrange(2), self.chance.random()
        before = log_size(run_dir)
        process = self.start(run_dir, processes)

        def until(condition) -> None:
            while not condition() and process.poll() is None:
                time.sleep(POLL_SECONDS)

        seconds = {"starting": self.startup, "training": self.training / 2, "saving": self.saving}[aim]
        if aim == "training":
            until(lambda: log_size(run_dir) not in (0, before))
        elif aim == "saving":
            for _ in range(skipped_saves + 1):  # the new start removes a half-written checkpoint of the last kill
                until(lambda: not saving(run_dir))
                until(lambda: saving(run_dir))
        deadline = time.perf_counter() + fraction * seconds
        until(lambda: time.perf_counter() >= deadline)

        if process.poll() is not None:
            check_exit(process, run_dir)
            return None
        kill_all(process)
        # While the program starts, a half-written checkpoint is still that of the kill before.
        doing = "in the middle of a save" if aim != "starting" and saving(run_dir) else f"while {aim}"
        whole = list_steps(run_dir / "checkpoints")
        logged = max((record["step"] for record in records(run_dir)), default=0)
        return f"{doing}; step {logged} logged, newest checkpoint {whole[-1][1].name if whole else 'none'}"


def log_of(run_dir: Path) -> Path:
    """The file of all that the program printed, over all its starts."""
    return run_dir.with_name(f"{run_dir.name}.log")


def check_exit(process: subprocess.Popen, run_dir: Path) -> None:
    """Raises: InputError with the program's own message where it failed."""
    if process.returncode != 0:
        lines = log_of(run_dir).read_text(encoding="utf-8", errors="replace").splitlines()
        message = ([line for line in lines if line.startswith("error: ")] or ["\n".join(lines[-5:])])[-1]
        raise InputError(f"the run in {run_dir} ended with exit code {process.returncode}: {message}")


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL the launcher and all processes that it started (torchrun's workers have sessions of their own)."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        family = [launcher, *launcher.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def saving(run_dir: Path) -> bool:
    """Whether a checkpoint is half written just now."""
    return any((run_dir / "checkpoints").glob(".step_*"))


def log_size(run_dir: Path) -> int:
    """Bytes of metrics.jsonl, 0 where there is none yet."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


# --- comparing


def bit_identical_expected(run_dir: Path, counts: list[int]) -> bool:
    """On a CPU, and on a GPU with --deterministic; on several numbers of processes only with a fixed reduction."""
    device = read_state(find_checkpoint(run_dir))["environment"]["device"]
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    same_order = len({*counts}) == 1 or config.get("reduction") == "fixed"
    return same_order and (device == "cpu" or bool(config.get("deterministic")))


def records(run_dir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without the numbers that are measured in time."""
    path = run_dir / "metrics.jsonl"
    logged = [record for _, record in whole_lines(path)] if path.is_file() else []
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in logged]


def differences(first: Path, second: Path) -> dict[str, float]:
    """Name of a number -> its largest difference, over the pairs of records in the same place."""
    found: dict[str, float] = {}
    for ours, theirs in zip(records(first), records(second), strict=False):
        for name in ours.keys() & theirs.keys():
            if isinstance(ours[name], float) and isinstance(theirs[name], float):
                found[name] = max(found.get(name, 0.0), abs(ours[name] - theirs[name]))
    return found


def compare(reference: Path, run_dir: Path, tolerance: float) -> list[str]:
    """A sentence for each difference from the uninterrupted run; [] where there is none."""
    expected, found = records(reference), records(run_dir)
    if [(r["step"], sorted(r)) for r in expected] != [(r["step"], sorted(r)) for r in found]:
        wrong = [f"metrics.jsonl has {len(found)} records, expected {len(expected)} of the same steps"]
    elif tolerance == 0:
        pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a != b]
        wrong = [f"metrics.jsonl first differs at step {a['step']}: {b}, expected {a}" for a, b in pairs[:1]]
    else:
        largest = differences(reference, run_dir)
        wrong = [f"{name} differs by {size:.3g}" for name, size in largest.items() if size > tolerance]
    theirs, ours = (ending(directory, exact=tolerance == 0) for directory in (reference, run_dir))
    other = [name for name in theirs if ours.get(name) != theirs[name]]
    return wrong + [f"{name} is {ours.get(name)}, expected {theirs[name]}" for name in other]


def ending(run_dir: Path, *, exact: bool) -> dict:
    """The facts of a run's last checkpoint that must be equal in every repetition; more of them where `exact`."""
    last = find_checkpoint(run_dir)
    if last is None:
        return {"the last checkpoint": None}
    state = read_state(last)
    names = ("step", "source", "identity", *(("best", "health") if exact else ()))
    facts = {"the last checkpoint": last.name, **{f"{name} in the state": state.get(name) for name in names}}
    if exact:
        targets = {name: resolve_pointer(run_dir / "checkpoints", name) for name in POINTERS}
        facts |= {f"the pointer {name}": target and target.name for name, target in targets.items()}
        sums = read_json(last / "checksums.json")
        facts |= {f"the sha256 of {name}": sums[name] for name in sorted(sums) if name.endswith(".safetensors")}
    return facts
