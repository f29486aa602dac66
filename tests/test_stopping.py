"""Signals that ask for a checkpoint: who gets them, what is given back, and the wait for data that they end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

import train_accelerate
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.checkpoint.writer import CheckpointWriter
from gpt2repro.data.sources import prefetch
from gpt2repro.options import InputError, run_main
from gpt2repro.training.run import Run
from gpt2repro.training.stopping import StopSignal, lost_a_process, said_to_the_user

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_noticed_and_its_old_handler_is_given_back(name):
    number, seen = getattr(signal, name), []
    before = signal.signal(number, lambda *_: seen.append(name))
    try:
        mine = signal.getsignal(number)
        with StopSignal(world=1) as stop:
            assert not stop.agreed()
            os.kill(os.getpid(), number)
            assert stop.agreed() and stop.name == name
        assert signal.getsignal(number) is mine and seen == []
        os.kill(os.getpid(), number)
        assert seen == [name]  # after a run in a notebook an interrupt interrupts again
    finally:
        signal.signal(number, before)


def test_a_second_interrupt_is_the_systems():
    with StopSignal(world=1):
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_an_interrupt_is_answered_inside_a_call_that_does_not_return_and_a_second_one_ends_it():
    """Python itself would wait: hashing leaves the interpreter alone for hours, as a backward pass does for minutes."""
    code = """import hashlib
from gpt2repro.options import InputError
from gpt2repro.training.stopping import StopSignal
with StopSignal(world=1):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout.readline() == "begun\n"
        for said in ("stopping after this step; Ctrl-C again quits now", ""):
            time.sleep(0.5)  # it is inside the call
            process.send_signal(signal.SIGINT)
            if said:
                assert process.stdout.readline() + process.stdout.readline() == f"\n{said}\n"
        assert process.wait(10) == 130 and process.stdout.read() == ""
    finally:
        process.kill()


def test_a_compilation_that_an_interrupt_broke_is_a_sentence():
    for error in (RuntimeError("CppCompileError: C++ compile error"), RuntimeError("something else")):
        with pytest.raises(RuntimeError), StopSignal(world=1):
            raise error  # nobody asked the run to stop
    with pytest.raises(InputError, match="stopped by SIGINT while torch"), StopSignal(world=1):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("CppCompileError: C++ compile error")


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(world=1) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_the_wait_for_data_that_does_not_come():
    comes_never = threading.Event()

    def stuck():
        yield 1
        comes_never.wait(30)

    batches = prefetch(stuck(), 2)
    try:
        with StopSignal(world=1) as stop:
            assert stop.next_of(batches) == 1
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            began = time.monotonic()
            assert stop.next_of(batches) is None
            assert time.monotonic() - began < 2
    finally:
        comes_never.set()
        batches.close()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4611686018427387904 bytes."),
    ],
    ids=["python", "cuda", "cpu", "windows"],
)
def test_memory_that_runs_out_becomes_a_sentence(error):
    assert "halve --micro_batch_size" in str(said_to_the_user(error))


def test_the_memory_of_this_machine_runs_out_in_these_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert said_to_the_user(caught.value) is not None
    assert said_to_the_user(RuntimeError("shapes do not match")) is None
    assert not lost_a_process(caught.value)


def train(run_dir, **options) -> int:
    data = run_dir.parent / "data"
    if not data.exists():
        tiny_run.write_tiny_shards(data)
    return run_main(train_accelerate.main, tiny_run.flags(data, run_dir, **options))


def calling_first(monkeypatch, owner, name: str, what):
    """Let `what()` happen before each call of a method."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *a, **k: (what(), original(self, *a, **k))[1])


def stop_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_between_bad_steps_and_their_reading_saves_no_bad_weights(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    assert train(run_dir, max_steps=4, save_steps=4) == 0
    bad = {"lr": 1e30, "min_lr": 1e30, "warmup_steps": 0, "grad_clip": "none", "on_bad_numbers": "rewind"}
    seldom = {"max_steps": 500, "log_steps": 500, "eval_steps": 500, "save_steps": 500}
    with monkeypatch.context() as patch:
        batches = iter(range(9))
        calling_first(patch, StopSignal, "next_of", lambda: stop_signal() if next(batches) == 5 else None)
        assert train(run_dir, **bad, **seldom) == 3
    found = find_checkpoint(run_dir)
    assert found.name == "step_000004" and read_state(found)["source"]["skipped"] == [[40, 80]]
    assert all(tensor.isfinite().all() for tensor in load_file(found / "model.safetensors").values())
    assert train(run_dir, max_steps=8, on_bad_numbers="rewind") == 0


def test_a_signal_during_an_evaluation_does_not_save_its_step_twice(tmp_path, monkeypatch):
    saved, evaluations = [], iter(range(3))
    calling_first(monkeypatch, Run, "evaluate", lambda: stop_signal() if next(evaluations) == 1 else None)
    calling_first(monkeypatch, CheckpointWriter, "save", lambda: saved.append("once"))
    assert train(tmp_path / "run", save_steps=4) == 3
    assert saved == ["once"] and find_checkpoint(tmp_path / "run").name == "step_000004"


def test_the_time_before_the_first_step_is_no_step_s(tmp_path, monkeypatch):
    calling_first(monkeypatch, Run, "_write_config", lambda: time.sleep(1.5))
    assert train(tmp_path / "run", max_steps=2, log_steps=1) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(step["step_seconds"] < 1 for step in steps if "loss" in step)


def test_the_time_of_a_rewind_is_no_step_s(tmp_path, monkeypatch):
    assert train(tmp_path / "run", max_steps=4, save_steps=4) == 0
    calling_first(monkeypatch, Run, "rewind", lambda: time.sleep(1.5))
    bad = {"lr": 1e30, "min_lr": 1e30, "warmup_steps": 0, "grad_clip": "none", "on_bad_numbers": "rewind"}
    assert train(tmp_path / "run", max_steps=8, log_steps=1, max_rewinds=1, **bad) == 4
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"rewind"} <= {step.get("event") for step in steps}
    assert all(step["step_seconds"] < 1 for step in steps if "loss" in step)


def test_a_process_that_dies_while_it_starts_leaves_the_options_whole(tmp_path):
    """They are replaced and not written over, since the first lines of a YAML file are valid YAML as well."""
    assert train(tmp_path / "run", max_steps=2) == 0
    os.link(tmp_path / "run/config.yaml", tmp_path / "before")
    before = (tmp_path / "before").read_text()
    assert train(tmp_path / "run", max_steps=3) == 0
    assert (tmp_path / "before").read_text() == before != (tmp_path / "run/config.yaml").read_text()


def test_a_run_whose_last_step_spoils_the_weights_ends_without_a_traceback(tmp_path, capsys):
    options = {"lr": 1e30, "min_lr": 1e30, "warmup_steps": 0, "grad_clip": "none"}
    assert train(tmp_path / "run", max_steps=1, **options) == 0
    assert "validation loss  no number nats per token (untrained: 3." in capsys.readouterr().out
