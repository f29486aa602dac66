"""What every test may lean on: one thread, no network, no logins, and programs started as a user would start them."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from loopback_hub import loopback_hub as loopback_hub  # a fixture for every test file

ROOT = Path(__file__).resolve().parent.parent
# A home of its own per test process: no cached token, model or remote code of the user's is seen or touched.
HF_HOME = tempfile.mkdtemp(prefix="gpt2repro-tests-hf-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ.update(  # before torch and the Hugging Face libraries are imported; subprocesses inherit it
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HOME=HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    MPLBACKEND="agg",
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(name, None)


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk("600k")`: a directory with a file system of that size, gone after the test."""
    place = tmp_path / "small"

    def mount(size: str) -> Path:
        place.mkdir()
        if os.system(f"mount -t tmpfs -o size={size} tmpfs {place} 2>/dev/null"):
            pytest.skip("mounting a small tmpfs needs root, and a machine that lets it")
        return place

    yield mount
    if os.path.ismount(place):
        os.system(f"umount -l {place}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root directory."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, HellaSwag examples and tiktoken's vocabulary beside the checkout; skips where they are absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision per process: forgotten before a test that chooses one, and behind it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny_model() -> dict:
    """Arguments of GPT2ReproConfig for a model that a CPU runs in milliseconds; vocabulary not a multiple of 64."""
    return {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def run_program():
    """run_program(["train_accelerate.py", …]) or (["-m", "gpt2repro", "plot", …]) -> CompletedProcess with text output.

    Runs with the tests' interpreter; a script's name is taken from the root, whatever the working directory.
    """

    def run(args, timeout: float = 120, env: dict | None = None, cwd: Path | None = None, input: str | None = None):
        args = [str(argument) for argument in args]
        if args[0].endswith(".py"):
            args[0] = str(ROOT / args[0])
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *args],
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **(env or {})},
            cwd=cwd or ROOT,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )

    return run
