"""How a run gets onto other people's machines: the package as it is installed, launchers, and the files under launch/.

What only the service itself can do (Slurm's queue, spot machines, jobs) is played by small scripts of the same names.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import tiny_run
import yaml

from gpt2repro.checkpoint.layout import list_steps
from gpt2repro.commands import verify_resume
from gpt2repro.training.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def shims(tmp_path, monkeypatch):
    """shims(name, text): a program of that name, found before all others; beside it this interpreter's programs."""
    directory = tmp_path / "shims"
    directory.mkdir()

    def write(name: str, text: str) -> None:
        path = directory / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    # `torchrun` and `python` of this very environment, and the package that is tested.
    write("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    write("python", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("SHIMS", str(directory))
    return write


def steps_of(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)[0]]


def wait_for(condition, process: subprocess.Popen, what: str, timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended without {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def words(shards: Path, run_dir: Path | None, **changes) -> list[str]:
    """Options of a tiny run; without its directory where the launcher gives it."""
    flags = tiny_run.flags(shards, run_dir or Path("unused"), **changes)
    if run_dir is None:
        del flags[flags.index("--run_dir") : flags.index("--run_dir") + 2]
    return flags


# --- as it is installed


def test_accelerate_launch_starts_the_installed_command(shards, run_program, tmp_path):
    """From a directory without a checkout, with one of the launcher configs that are installed beside the module."""
    shown = run_program(["-m", "gpt2repro", "train", "--help"], cwd=tmp_path).stdout
    configs = Path(
        next(line for line in shown.splitlines() if "Launcher configs" in line).split(": ")[1].strip()
    ).parent
    assert {path.stem for path in configs.glob("*.yaml")} == {"cpu", "fsdp2", "multi_gpu", "multi_node", "single_gpu"}
    command = ["-m", "accelerate.commands.launch", "--config_file", configs / "cpu.yaml", "-m", "gpt2repro", "train"]
    done = run_program([*command, *words(shards, tmp_path / "run", max_steps=4)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_and_sdist_are_whole_and_the_installed_wheel_trains(run_program, tmp_path):
    copy = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    files = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()]
    for name in files:  # building leaves traces, so not in the checkout
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    code = "from setuptools import build_meta as b; print(b.build_sdist('out')); print(b.build_wheel('out'))"
    built = run_program(["-c", code], cwd=copy)
    assert built.returncode == 0, built.stderr[-2000:]
    sdist, wheel = sorted((copy / "out").iterdir(), key=lambda path: path.suffix)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert set(files) - inside <= {".gitignore"}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    wanted = {name for name in files if name.startswith(("gpt2repro/", "accelerate_configs/"))}
    assert wanted <= installed and not {name for name in installed if name.startswith(("tests", "launch", "docs"))}

    # A fresh environment that sees this one's packages, but neither this checkout nor its editable installation.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def gpt2repro(*arguments):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [tmp_path / "venv" / "bin" / "python", "-m", "gpt2repro", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert gpt2repro("--version") == "gpt2repro 0.1.0\n"
    assert f"{site}/accelerate_configs/*.yaml" in gpt2repro("train", "--help")
    (tmp_path / "mine.txt").write_text(tiny_run.TEXT * 50)
    gpt2repro("prepare-text", "--input", "mine.txt", "--tokenizer", "char", "--out", "data", "--workers", 1)
    gpt2repro("train", *words(tmp_path / "data", tmp_path / "run", max_steps=4))
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


# --- launch/


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slurm_script_saves_at_the_warning_stands_in_the_queue_again_and_ends(shards, shims, free_port, tmp_path):
    """srun warns the first start as Slurm does, by SIGUSR1 to its processes; scontrol notes what is requeued."""
    run = tmp_path / "run"
    shims("scontrol", 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SHIMS/requeued"; fi')
    shims(
        "srun",
        """[ "$1" = --kill-on-bad-exit=1 ] && shift
export SLURM_NODEID=0
"$@" & child=$!
if [ ! -e "$SHIMS/warned" ]; then
  until grep -q '"loss"' "$RUN/metrics.jsonl" 2>/dev/null; do kill -0 $child || exit 9; sleep 0.1; done
  touch "$SHIMS/warned"; kill -USR1 $child
fi
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
exit $code""",
    )
    env = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "2"}
    env |= {"RUN": str(run), "PORT": str(free_port), **os.environ}
    requeued = tmp_path / "shims" / "requeued"

    def sbatch(**changes) -> int:
        # The warning must find the run in the middle: the first start is endless.
        command = ["bash", LAUNCH / "slurm.sh", *words(shards, None, micro_batch_size=2, **changes)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert (run / "status.json").exists(), done.stderr[-2000:]
        return done.returncode

    assert sbatch(max_steps=1_000_000, save_steps=1_000_000, eval_steps=1_000_000) != 0
    assert requeued.read_text() == "requeue 17\n"
    status = json.loads((run / "status.json").read_text())
    ((saved, _),) = list_steps(run / "checkpoints")
    assert status["exit_code"] == 3 and status["step"] == saved > 0
    last = saved + 6
    assert sbatch(max_steps=last) == 0
    assert requeued.read_text() == "requeue 17\n"  # once: the second start was done
    assert steps_of(run) == list(range(1, last + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_elastic_restarts_a_killed_worker_and_the_run_goes_on(shards, shims, free_port, tmp_path):
    run = tmp_path / "run"
    env = {**os.environ, "PROCESSES": "2", "PORT": str(free_port)}
    flags = words(shards, run, micro_batch_size=2, max_steps=200, save_steps=50, eval_steps=1000)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["bash", LAUNCH / "elastic.sh", *flags], env=env, stdout=log, stderr=log)
        try:
            wait_for(lambda: list_steps(run / "checkpoints"), process, "checkpoint")
            os.kill(worker_of(process.pid), signal.SIGKILL)
            assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            verify_resume.kill_all(process)
    assert "continuing from" in (tmp_path / "log").read_text()
    assert steps_of(run) == list(range(1, 201))


def worker_of(launcher: int) -> int:
    """The second of the launcher's training processes. Source: proc(5)."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if parent == launcher and "train" in command:
            children.append(int(path.parent.name))
    assert len(children) == 2
    return max(children)


def killed_and_rerun(start, runs: list[Path], hub, shards: Path) -> None:
    """Start a run, take its machine away once a checkpoint is on the Hub, and start it on a new one: it goes on."""
    flags = words(shards.resolve(), None, max_steps=1_000_000, save_steps=20, eval_steps=1_000_000)
    process = start(runs[0], flags)
    try:
        published = lambda: any(name.startswith("step-") for name in branches(hub))  # noqa: E731
        wait_for(published, process, "branch on the Hub")
        time.sleep(1)
    finally:
        verify_resume.kill_all(process)
    step = max(int(name.removeprefix("step-")) for name in branches(hub) if name.startswith("step-"))
    flags = words(shards.resolve(), None, max_steps=step + 100, save_steps=50, eval_steps=1_000_000)
    process = start(runs[1], flags)
    assert process.wait(timeout=300) == 0
    assert "continuing from runs/job/from_hub/user--tiny-" in (runs[1] / "log").read_text()
    assert steps_of(runs[1] / "runs" / "job") == list(range(1, step + 101))  # the log came along
    assert f"step-{step + 100}" in branches(hub)


def branches(hub) -> list[str]:
    repo = hub.repos.get(("model", "user/tiny"))
    return list(repo.branches) if repo else []


@pytest.fixture
def hub_process(loopback_hub, shims, tmp_path, monkeypatch):
    """hub_process(command, cwd): a process that talks to the loopback Hub, in a session of its own."""

    def start(command: list, cwd: Path, **env) -> subprocess.Popen:
        cwd.mkdir(parents=True, exist_ok=True)
        env = loopback_hub.environment(tmp_path / "home") | env
        log = open(cwd / "log", "w")  # noqa: SIM115 - the process' own
        return subprocess.Popen([str(word) for word in command], cwd=cwd, env=env, stdout=log, stderr=log)

    return start


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hf_job_begins_and_goes_on_from_the_hub(loopback_hub, hub_process, shards, tmp_path):
    header = (LAUNCH / "hf_job.py").read_text().split("# ///")[1]
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    script = tomllib.loads("\n".join(line.removeprefix("# ") for line in header.splitlines()[1:]))
    assert script == {"dependencies": [], "requires-python": ">=3.10"}  # the project comes by --with
    alone = subprocess.run([sys.executable, "-S", LAUNCH / "hf_job.py", "tiny"], env={}, capture_output=True, text=True)
    assert alone.returncode == 1 and "add --with 'gpt2repro @ git+https" in alone.stderr

    def start(machine: Path, flags: list[str]) -> subprocess.Popen:  # the token's account is `user`
        return hub_process([sys.executable, LAUNCH / "hf_job.py", "tiny", *flags], machine)

    killed_and_rerun(start, [tmp_path / "first", tmp_path / "second"], loopback_hub, shards)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_skypilot_task_is_set_up_killed_and_rerun_on_another_machine(
    loopback_hub, hub_process, shims, shards, tmp_path
):
    """`setup` and `run` as bash on two machines, one after the other: two home directories with the project."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    # `python3 -m venv DIR` makes an environment whose pip only notes what it should install.
    python = '[ "$2" = pip ] && echo "$@" >> ~/installed && exit; exec ' + sys.executable + ' "$@"'
    shims("python-of-venv", python)
    shims("python3", '[ "$2" = venv ] && mkdir -p "$3/bin" && cp "$SHIMS/python-of-venv" "$3/bin/python"')

    def start(machine: Path, flags: list[str]) -> subprocess.Popen:
        machine.mkdir()
        (machine / "launch").symlink_to(LAUNCH)
        env = {"HOME": str(machine), "REPO": "user/tiny", "OPTIONS": " ".join(flags)}
        assert hub_process(["bash", "-c", task["setup"]], machine, **env).wait(timeout=60) == 0
        assert (machine / "installed").read_text() == "-m pip install --quiet -e . -c constraints.txt\n"
        return hub_process(["bash", "-c", task["run"]], machine, **env)

    assert task["envs"].keys() == {"REPO", "OPTIONS"} and task["secrets"] == {"HF_TOKEN": None}
    killed_and_rerun(start, [tmp_path / "first", tmp_path / "second"], loopback_hub, shards)
