"""Interruption is a non-event: real processes are killed, signalled, cut off from disk and node, and go on exactly.

Every run here is `train_accelerate.py` itself on a tiny model; what one start costs is mostly its imports, so the fast
tests are few and the campaigns are marked slow.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import loopback_hub as loopback_hub_module
import pytest
import tiny_run

from gpt2repro.checkpoint.layout import list_steps
from gpt2repro.checkpoint.reader import find_checkpoint, read_state, verify_checkpoint
from gpt2repro.commands import verify_resume

ENDLESS = {"max_steps": 1_000_000, "save_steps": 1_000_000, "eval_steps": 1_000_000}
SCRIPT = Path(__file__).resolve().parent.parent / "train_accelerate.py"
PLAIN = [sys.executable, str(SCRIPT)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes"]

posix_signals = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, shards) -> Path:
    """An uninterrupted run on one process, without dropout, that kept all its checkpoints."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finished(PLAIN, tiny_run.flags(shards, run_dir, keep_last="none", resid_pdrop=0))
    return run_dir


def start(launcher: list[str], flags: list[str], **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    return subprocess.Popen([*launcher, *flags], stdin=subprocess.DEVNULL, **options)


def finished(launcher: list[str], flags: list[str], code: int = 0, timeout: float = 120) -> str:
    """Run to the end, check the exit code and return the output."""
    process = start(launcher, flags)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        verify_resume.kill_all(process)
    assert process.returncode == code, output[-3000:]
    return output


def training(process: subprocess.Popen, run_dir: Path, timeout: float = 100) -> None:
    """Return when the run has logged its first steps."""
    deadline = time.monotonic() + timeout
    while verify_resume.log_size(run_dir) == 0 or not losses(run_dir):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.02)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    found = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(found[1], 16) >> (number - 1) & 1)


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in verify_resume.records(run_dir) if "loss" in record}


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def cut_back(run_dir: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was when `step` had been saved and nothing after it."""
    copy.mkdir()
    shutil.copy(run_dir / "metrics.jsonl", copy)
    (copy / "checkpoints").mkdir()
    for at, path in list_steps(run_dir / "checkpoints"):
        if at <= step:
            shutil.copytree(path, copy / "checkpoints" / path.name)
    return copy


# --- killed


def campaign(shards: Path, work_dir: Path, kills: int, *more: str, seed: int = 0, **changes) -> None:
    flags = tiny_run.flags(shards, work_dir, **changes)
    del flags[flags.index("--run_dir") : flags.index("--run_dir") + 2]
    arguments = ["--kills", str(kills), "--seed", str(seed), "--work_dir", str(work_dir), *more]
    assert verify_resume.main([*arguments, "--", *flags]) == 0


def test_a_run_killed_three_times_is_the_uninterrupted_run(shards, tmp_path, capsys):
    campaign(shards, tmp_path / "work", 3, seed=2)
    assert "3 kills" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_twenty_times_is_the_uninterrupted_run(shards, tmp_path, capsys):
    campaign(shards, tmp_path / "work", 20, seed=1)
    report = capsys.readouterr().out
    assert "EQUAL" in report and report.count("in the middle of a save;") >= 3, report


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_killed_are_the_uninterrupted_two(shards, tmp_path):
    campaign(shards, tmp_path / "work", 3, "--processes", "2", seed=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_on_one_and_two_processes_in_turn_is_the_uninterrupted_one(shards, tmp_path, capsys):
    # Four micro-batches: one process adds them one by one, two add two sums of two, so the last bits differ.
    campaign(shards, tmp_path / "work", 3, "--processes", "1,2", seed=2, resid_pdrop=0, micro_batch_size=2)
    report = capsys.readouterr().out
    assert (
        "1 process(es)" in report and "2 process(es)" in report and "twice what uninterrupted runs differ by" in report
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_a_stream_of_text_killed_is_the_uninterrupted_one(tmp_path):
    data = tiny_run.write_tiny_shards(tmp_path / "shards")
    words = tiny_run.TEXT.split()
    with (tmp_path / "documents.jsonl").open("w") as file:
        for number in range(3000):
            text = " ".join(words[(number * 7 + i * i) % len(words)] for i in range(5 + number % 30))
            file.write(json.dumps({"text": text}) + "\n")
    stream = {"data": f"stream:{tmp_path / 'documents.jsonl'}", "tokenizer": data / "tokenizer", "val_data": data}
    campaign(data, tmp_path / "work", 3, seed=4, **stream)


def test_a_difference_is_found_and_named(whole_run, tmp_path):
    """The tool must be able to fail: each kind of difference is put into a copy of a run."""
    copy = tmp_path / "copy"
    shutil.copytree(whole_run, copy, symlinks=True)
    assert verify_resume.compare(whole_run, copy, 0.0) == []
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(index for index, line in enumerate(lines) if '"loss"' in line)
    changed = json.loads(lines[at])
    assert changed["step"] == 1
    changed["loss"] *= 1 + 1e-9
    (copy / "metrics.jsonl").write_text("".join([*lines[:at], json.dumps(changed) + "\n", *lines[at + 1 :]]))
    assert "first differs" in verify_resume.compare(whole_run, copy, 0.0)[0]
    assert verify_resume.compare(whole_run, copy, 1e-6) == []
    (copy / "metrics.jsonl").write_text("".join([*lines[:at], *lines[at - 1 :]]))
    assert "records" in verify_resume.compare(whole_run, copy, 0.0)[0]
    shutil.rmtree(copy / "checkpoints/step_000024")
    assert any("last checkpoint" in one for one in verify_resume.compare(whole_run, copy, 0.0))


# --- damaged, and elastic


def test_a_damaged_newest_checkpoint_is_named_and_the_run_ends_as_if_it_had_been_whole(whole_run, shards, tmp_path):
    run_dir = cut_back(whole_run, tmp_path / "run", 16)
    victim = run_dir / "checkpoints/step_000016/model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    output = finished(PLAIN, tiny_run.flags(shards, run_dir, keep_last="none", resid_pdrop=0))
    assert "damaged checkpoint skipped" in output and "step_000016: model.safetensors" in output
    assert verify_resume.compare(whole_run, run_dir, 0.0) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_from_one_process_to_two_and_back_with_the_same_losses(whole_run, shards, tmp_path):
    options = {"keep_last": "none", "resid_pdrop": 0}
    two = cut_back(whole_run, tmp_path / "two", 8)
    finished(TORCHRUN, tiny_run.flags(shards, two, **options))
    one = cut_back(two, tmp_path / "one", 16)
    finished(PLAIN, tiny_run.flags(shards, one, **options))
    expected, states = verify_resume.records(whole_run), []
    for run_dir in (two, one):
        found = verify_resume.records(run_dir)
        assert [r["step"] for r in found] == [r["step"] for r in expected]
        assert [r.get("lr") for r in found] == [r.get("lr") for r in expected]
        assert max(verify_resume.differences(whole_run, run_dir).values()) < 1e-5
        states.append(read_state(find_checkpoint(run_dir)))
    assert states[0]["source"] == states[1]["source"]
    assert losses(two)[9] == pytest.approx(losses(whole_run)[9], abs=1e-6)


# --- signals


def stopped_cleanly(run_dir: Path, name: str) -> None:
    """Saved at the step where it stopped, logged up to it, and says so."""
    said = status(run_dir)
    assert (said["state"], said["exit_code"]) == ("stopped", 3), said
    newest = find_checkpoint(run_dir)
    assert read_state(newest)["step"] == said["step"] == max(losses(run_dir))
    assert name in said["message"] or "another process" in said["message"], said


@posix_signals
@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), pytest.param("SIGUSR1", marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_with_exit_code_3(name, shards, tmp_path):
    process = start(PLAIN, tiny_run.flags(shards, tmp_path / "run", **ENDLESS))
    training(process, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert name in output and "Traceback" not in output
    stopped_cleanly(tmp_path / "run", name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' list of caught signals")
@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(shards, tmp_path):
    endless_step = {**ENDLESS, "batch_tokens": 16 * 1000, "micro_batch_size": 1, "n_layer": 24}
    process = start(PLAIN, tiny_run.flags(shards, tmp_path / "run", **endless_step))
    deadline = time.monotonic() + 100
    while not catches(process.pid, signal.SIGTERM):  # it belongs to the run as soon as the loop begins
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    while "again quits now" not in (line := process.stdout.readline()):
        assert line, "one interrupt waits for the step to end, and says so at once"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(5)
    assert process.returncode in (-signal.SIGINT, 130)


def compiling(cache: Path) -> bool:
    """Whether a C++ compiler is at work on a kernel of torch.compile's. Source: proc(5)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command = path.read_bytes()
            if b"cc1plus" in command and b".main.cpp" in command and str(cache).encode() in command:
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists() or not shutil.which("g++"), reason="finds g++ in /proc")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_on_a_terminal_during_a_first_compilation(times, shards, tmp_path):
    """A terminal sends it to the compiler as well, which then fails: a sentence, and after a second one nothing."""
    pty = pytest.importorskip("pty")
    flags = tiny_run.flags(shards, tmp_path / "run", **ENDLESS, compile="model")
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        os.execve(sys.executable, [*PLAIN, *flags], environment)
    said = ""

    def read() -> bool:
        """Take what the run has said so far; False when it has ended."""
        nonlocal said
        with contextlib.suppress(OSError):  # Linux: the other side is closed
            while select.select([terminal], [], [], 0.1)[0]:
                if not (part := os.read(terminal, 1 << 16)):
                    return False
                said += part.decode(errors="replace")
            return True
        return False

    try:
        while not compiling(tmp_path / "cache"):
            assert read(), said
        os.write(terminal, b"\x03")
        asked = time.monotonic()
        while "Ctrl-C again quits now" not in said:
            assert read() and time.monotonic() - asked < 5, said
        if times == 2:
            os.write(terminal, b"\x03")
        while read():
            assert time.monotonic() - asked < (10 if times == 2 else 300), said
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    assert "Traceback" not in said
    if times == 2:
        assert code in (-signal.SIGINT, 130)
    else:
        assert code == 2 and "stopped by SIGINT while torch.compile was at work" in said.splitlines()[-1]


@posix_signals
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_torchrun_hands_a_signal_on_and_every_rank_saves_the_same_step(name, shards, tmp_path):
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # docs/launching.md: USR1 has to be named to torchrun
    environment = {**os.environ, "PET_SIGNALS_TO_HANDLE": handled, "TORCHELASTIC_SIGNALS_TO_HANDLE": handled}
    process = start(TORCHRUN, tiny_run.flags(shards, tmp_path / "run", **ENDLESS), env=environment)
    training(process, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode != 0, "torchrun hides the 3 but not that the run did not end"
    stopped_cleanly(tmp_path / "run", name)


@posix_signals
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_accelerate_launch_lets_a_signal_to_its_process_group_through(shards, tmp_path):
    """Its launcher for one process forwards nothing; a terminal and Slurm signal the whole group."""
    process = start(
        [*ACCELERATE, "1", str(SCRIPT)], tiny_run.flags(shards, tmp_path / "run", **ENDLESS), start_new_session=True
    )
    try:
        training(process, tmp_path / "run")
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)  # until the run itself has closed its output
        stopped_cleanly(tmp_path / "run", "SIGTERM")
    finally:
        if status(tmp_path / "run")["state"] == "running":
            os.killpg(process.pid, signal.SIGKILL)


@posix_signals
@pytest.mark.slow
def test_a_signal_ends_a_run_that_waits_for_data_within_two_seconds(shards, tmp_path, loopback_hub, monkeypatch):
    answer = loopback_hub_module._Handler._resolve

    def silent(self, repo, revision, path):
        if path.endswith(".jsonl") and (tmp_path / "run/status.json").exists():
            time.sleep(60)
        return answer(self, repo, revision, path)

    monkeypatch.setattr(loopback_hub_module._Handler, "_resolve", silent)
    text = b"".join(b'{"text": "the lazy dog, number %d"}\n' % number for number in range(3000))
    loopback_hub.add_repo("user/text", "dataset")
    loopback_hub.add_file("user/text", "train.jsonl", text, "dataset")
    stream = {"data": "stream:user/text", "tokenizer": shards / "tokenizer", "val_data": shards}
    flags = tiny_run.flags(shards, tmp_path / "run", **stream, cache_dir=tmp_path / "cache", **ENDLESS)
    process = start(PLAIN, flags, env=loopback_hub.environment(tmp_path / "home"))
    try:
        while not (tmp_path / "run/status.json").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 3, output
        assert time.monotonic() - began < 4, "two seconds, and what a busy machine adds"
    finally:
        verify_resume.kill_all(process)
    assert status(tmp_path / "run")["state"] == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_rank_that_fails_says_why_in_the_status(shards, tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import train_accelerate\n"
        "from gpt2repro.options import run_main\n"
        "from gpt2repro.training import meter\n"
        "add = meter.Meter.add\n"
        "def fails(self, **numbers):\n"
        "    if os.environ['RANK'] == '1' and numbers['step'] == 5:\n"
        "        raise ArithmeticError('a cosmic ray')\n"
        "    return add(self, **numbers)\n"
        "meter.Meter.add = fails\n"
        "sys.exit(run_main(train_accelerate.main))\n"
    )
    finished([*TORCHRUN[:-1], str(program)], tiny_run.flags(shards, tmp_path / "run", **ENDLESS), code=1, timeout=150)
    said = status(tmp_path / "run")
    assert (said["state"], said["exit_code"], said["step"]) == ("failed", 1, 5)
    assert said["message"] == "rank 1: ArithmeticError: a cosmic ray"


# --- a full disk


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_a_sentence_and_it_goes_on_when_there_is_room(shards, small_disk):
    small = small_disk("600k")
    flags = tiny_run.flags(shards, small / "run", keep_last="none", save_steps=1, eval_steps=8)
    output = finished(PLAIN, flags, code=2)
    assert "could not be written" in output and "o space left" in output and "Traceback" not in output, output
    steps = [step for step, _ in list_steps(small / "run/checkpoints")]
    assert steps == list(range(1, len(steps) + 1)) and steps
    for _, path in list_steps(small / "run/checkpoints"):
        verify_checkpoint(path)
    for line in (small / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert status(small / "run")["state"] == "failed"
    os.system(f"mount -o remount,size=20m {small}")
    finished(PLAIN, flags)
    assert sorted(losses(small / "run")) == list(range(1, 25))


@pytest.mark.slow
def test_a_disk_that_the_log_fills_ends_the_run_with_a_sentence_and_a_status(shards, small_disk):
    small = small_disk("64k")
    output = finished(PLAIN, tiny_run.flags(shards, small / "run", **ENDLESS), code=2)
    assert "error: the run stopped: No space left on device; make room" in output and "Traceback" not in output
    said = status(small / "run")
    assert (said["state"], said["exit_code"]) == ("failed", 2) and "No space left" in said["message"]
    for line in (small / "run/metrics.jsonl").read_text().splitlines()[:-1]:
        json.loads(line)


# --- more than one node


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_loses_its_rank_ends_the_job_on_all_and_the_job_resumes(shards, tmp_path, free_port):
    import psutil

    def nodes(**changes) -> list[subprocess.Popen]:
        flags = tiny_run.flags(shards, tmp_path / "run", **changes)
        common = [
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(free_port),
        ]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *common]
        return [start([*torchrun, "--node_rank", str(rank), str(SCRIPT)], flags) for rank in (0, 1)]

    endless = {**ENDLESS, "save_steps": 5}
    jobs = nodes(**endless)
    try:
        training(jobs[0], tmp_path / "run")
        while find_checkpoint(tmp_path / "run") is None:
            time.sleep(0.1)
        workers = [p for p in psutil.Process(jobs[1].pid).children(recursive=True) if str(SCRIPT) in p.cmdline()]
        workers[0].kill()
        began = time.monotonic()
        outputs = [job.communicate(timeout=90)[0] for job in jobs]
        assert time.monotonic() - began < 60, "the job has to end promptly"
        assert all(job.returncode != 0 for job in jobs)
        assert "SIGKILL" in outputs[1] or "exitcode  : -9" in outputs[1], outputs[1][-2000:]
        assert "another process of this run is gone" in outputs[0], outputs[0][-3000:]
    finally:
        for job in jobs:
            verify_resume.kill_all(job)

    newest = read_state(find_checkpoint(tmp_path / "run"))["step"]
    jobs = nodes(**{**endless, "max_steps": newest + 10})
    try:
        outputs = [job.communicate(timeout=120)[0] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    finally:
        for job in jobs:
            verify_resume.kill_all(job)
    assert sorted(losses(tmp_path / "run")) == list(range(1, newest + 11))


# --- numbers that go bad


@pytest.mark.slow
def test_a_run_whose_loss_is_no_number_stops_with_exit_code_4_and_keeps_its_good_checkpoints(shards, tmp_path):
    run_dir = tmp_path / "run"
    finished(PLAIN, tiny_run.flags(shards, run_dir, max_steps=8, resid_pdrop=0))
    bad = {"max_steps": 40, "lr": 1e30, "min_lr": 1e30, "warmup_steps": 0, "grad_clip": "none", "resid_pdrop": 0}
    output = finished(PLAIN, tiny_run.flags(shards, run_dir, **bad), code=4)
    assert "Traceback" not in output and "steps" in output
    assert status(run_dir)["exit_code"] == 4
    assert find_checkpoint(run_dir).name == "step_000008", "nothing poisoned was saved"
    events = [record for record in verify_resume.records(run_dir) if "event" in record]
    assert [event["event"] for event in events] == ["stop"]


def shards_with_one_bad_stretch(directory: Path) -> Path:
    """Two words in turn, easily learned, and one stretch of windows that is nothing like them."""
    import numpy as np

    from gpt2repro.data.shards import MANIFEST, write_shard
    from gpt2repro.files import write_json

    tiny_run.write_tiny_shards(directory)
    manifest = json.loads((directory / MANIFEST).read_text())
    tokens = np.tile(np.array([3, 4, 5, 6]), 4000)
    tokens[8000:8096] = np.random.default_rng(0).integers(10, 29, 96)  # 6 of the 1000 windows
    record = write_shard(directory / "train_000000.bin", tokens, manifest["tokenizer"]["vocab_size"])
    split = manifest["splits"]["train"]
    split["shards"][0] |= record
    split["tokens"] = len(tokens)
    write_json(directory / MANIFEST, manifest)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["rewind", "skip"])
def test_a_bad_stretch_of_data_is_left_out_and_a_killed_run_leaves_out_the_same(policy, tmp_path):
    data = shards_with_one_bad_stretch(tmp_path / "data")
    options = {"max_steps": 120, "save_steps": 10, "eval_steps": 40, "resid_pdrop": 0, "spike_window": 10, "spike_z": 6}
    options |= {"on_bad_numbers": policy, "max_rewinds": 20, "n_embd": 32}
    finished(PLAIN, tiny_run.flags(data, tmp_path / "run", **options))
    events = [record for record in verify_resume.records(tmp_path / "run") if "event" in record]
    assert events and {event["event"] for event in events} == {policy}, events
    assert sorted(losses(tmp_path / "run")) == list(range(1, 121))
    state = read_state(find_checkpoint(tmp_path / "run"))
    if policy == "rewind":
        assert state["source"]["skipped"], "the windows stay skipped for good"
        assert state["health"]["rewinds"] == len(events)
        skipped = sum(b - a for a, b in state["source"]["skipped"])
        assert state["source"]["position"] == 120 * 8 + skipped
    else:
        assert state["health"]["skipped"] >= len(events)
    campaign(data, tmp_path / "work", 3, seed=5, **options)
