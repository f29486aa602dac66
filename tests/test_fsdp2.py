"""Training in shards (FSDP2) and under DDP on two processes, compiled and not, against the same model in one piece."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fsdp2_worker import CASES, SAVE_AFTER, STEPS

from gpt2repro.evaluation.losses import CHUNKS_UNDER_FSDP2
from gpt2repro.options import InputError

ROOT = Path(__file__).parent.parent
QUICK = ["off", "block, vocabulary of 512", "chunked loss"]
SLOW = [name for name in CASES if name not in QUICK]


def missing(name: str) -> str | None:
    """What a case needs and this environment does not have."""
    if CASES[name].get("lora") and importlib.util.find_spec("peft") is None:
        return "peft"
    return "torch 2.13" if CASES[name].get("loss_chunk_tokens") and not CHUNKS_UNDER_FSDP2 else None


def train(names: list[str], folder: Path, port: int) -> dict:
    """What two processes found in these cases, one after the other."""
    workers = [
        subprocess.Popen(
            [sys.executable, "tests/fsdp2_worker.py", str(rank), "2", str(port), folder, *names],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=540)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def expect_one_piece(case: dict, found: dict) -> None:
    """Losses, gradients, evaluation, samples, weights and what continues from the checkpoint are those of one piece."""
    # Muon rounds to bf16 within its step, where the last bit of a gradient becomes a bit of bf16.
    loose = 1e-4 if case.get("optimizer") == "muon" else 2e-2 if case.get("bf16") else 5e-6
    assert len(found["losses"]) == STEPS and found["losses"][-1] < found["losses"][0]
    assert found["losses"] == pytest.approx(found["whole_losses"], abs=loose)
    assert found["norms"] == pytest.approx(found["whole_norms"], rel=loose)
    assert found["evaluated"] == pytest.approx(found["whole_evaluated"], rel=loose)
    if not case.get("lora"):
        assert found["averaged"] == pytest.approx(found["whole_averaged"], rel=loose)
        assert found["averaged"] != pytest.approx(found["evaluated"], rel=1e-4)
        assert found["average_saved"] < (5e-3 if case.get("bf16") else 5e-4)
    assert found["weights"] < (5e-3 if case.get("bf16") else 5e-4)  # of four steps at a learning rate of 1e-3
    if not case.get("bf16"):
        assert found["sample"] == found["whole_sample"]
    if not case.get("lora"):  # an adapter is no checkpoint of ours
        assert found["continued_whole"] == pytest.approx(found["losses"][SAVE_AFTER:], abs=loose)
    if case["how"] != "model":
        vocab_size = case.get("vocab_size", 500)
        padded = case.get("padded") and not case.get("lora")  # a wrapped head is called as any other
        assert set(found["columns"]) == ({vocab_size, 512} if padded else {vocab_size})  # to callers, to the loss
    if case["how"] == "block":
        assert found["graphs"] >= 2  # the blocks share one, the cross-entropy has its own


@pytest.fixture(scope="module")
def quick(tmp_path_factory, free_ports) -> dict:
    return train([n for n in QUICK if not missing(n)], tmp_path_factory.mktemp("quick"), next(free_ports))


@pytest.fixture(scope="module")
def slow(tmp_path_factory, free_ports) -> dict:
    return train([n for n in SLOW if not missing(n)], tmp_path_factory.mktemp("slow"), next(free_ports))


@pytest.fixture(scope="module")
def free_ports():
    """TCP ports on 127.0.0.1 that nothing listens on."""
    import socket

    def ports():
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            yield port

    return ports()


@pytest.mark.parametrize("name", QUICK)
def test_shards_train_like_one_piece(name, quick):
    if missing(name):
        pytest.skip(f"needs {missing(name)}")
    expect_one_piece(CASES[name], quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_combination_trains_like_one_piece(name, slow):
    if missing(name):
        pytest.skip(f"needs {missing(name)}")
    expect_one_piece(CASES[name], slow[name])


def test_one_graph_of_a_sharded_model_is_refused_with_the_reason(tiny_model):
    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.models import compile_model
    from modeling_gpt2repro import GPT2ReproForCausalLM

    model = GPT2ReproForCausalLM(GPT2ReproConfig(**tiny_model))
    with pytest.raises(InputError, match=r"compile=model does not work with FSDP2.*--compile block"):
        compile_model(model, "model", "cpu", 2, sharded=True)
