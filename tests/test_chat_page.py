"""docs/chat.md, command for command, on a quickstart model."""

import contextlib
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "chat.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def block(language: str, holding: str) -> str:
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.S) if holding in text]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, run_program):
    """A directory with a quickstart run: its data, its preset, as many steps as make it write words."""
    place = tmp_path_factory.mktemp("chat")
    corpus = ["--corpus", "python-docs", "--out", "data/python-docs", "--workers", "1"]
    for command in (["prepare-text", *corpus], ["train", "--config", "quickstart", "--max_steps", "150"]):
        done = run_program(["-m", "gpt2repro", *command], cwd=place, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    return place


def gpt2repro(run_program, place: Path, name: str, *more: str, **options):
    """The page's line that begins with `gpt2repro NAME`."""
    (line,) = [line for line in COMMANDS if line.startswith(f"gpt2repro {name} ")]
    done = run_program(["-m", *shlex.split(line), *more], cwd=place, timeout=600, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_three_commands_fine_tune_on_ones_own_text(place, run_program):
    (place / "my" / "texts").mkdir(parents=True)
    (place / "my" / "texts" / "mine.txt").write_text("A carrot is orange, and a leek is green.\n" * 300)
    gpt2repro(run_program, place, "prepare-text", "--workers", "1")
    gpt2repro(run_program, place, "train", "--max_steps", "20")
    gpt2repro(run_program, place, "generate", "--temperature", "0", "--max_new_tokens", "12", input="A carrot is\n")
    records = [json.loads(line) for line in (place / "runs" / "finetune" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[0] > 3 and losses[-1] < 1.5


def test_a_quickstart_model_learns_to_answer_and_answers_through_the_server(place, run_program, free_port):
    for module in ("trl", "datasets"):
        pytest.importorskip(module)
    gpt2repro(run_program, place, "export")
    (place / "chat" / "conversations.jsonl").write_text(block("json", "messages"))
    (place / "chat" / "sft.py").write_text(block("python", "SFTTrainer"))
    done = run_program([place / "chat" / "sft.py"], cwd=place, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    ask = "from transformers import pipeline\nwrite = pipeline('text-generation', 'chat/model')\n"
    ask += "said = write([{'role': 'user', 'content': 'How big are you?'}], max_new_tokens=40, do_sample=False)\n"
    ask += "print('SAID', said[0]['generated_text'][-1]['content'])"
    done = run_program(["-c", ask], cwd=place)
    assert done.stdout.partition("SAID ")[2].strip() == "One million parameters.", done.stderr[-2000:]
    demo = [line for line in COMMANDS if line.startswith("gpt2repro demo")]
    assert demo == ["gpt2repro demo --model chat/model"]
    prompt = ["--prompt", "Question: Who are you?\nAnswer:", "--temperature", "0"]
    done = run_program(["-m", "gpt2repro", "generate", "--model", "chat/model", *prompt], cwd=place)
    assert done.stdout.strip().endswith("Answer: I am a small GPT-2."), done.stderr[-2000:]

    pytest.importorskip("openai")  # needs transformers[serving]
    (line,) = [line for line in COMMANDS if line.startswith("transformers serve")]
    command = ["transformers.cli.transformers", *shlex.split(line.replace("8000", str(free_port)))[1:]]
    (place / "chat" / "ask.py").write_text(block("python", "from openai").replace("8000", str(free_port)))
    with subprocess.Popen([sys.executable, "-m", *command], cwd=place) as server:
        try:
            until = time.monotonic() + 300
            while server.poll() is None and time.monotonic() < until:
                with contextlib.suppress(OSError):  # it does not listen yet
                    socket.create_connection(("127.0.0.1", free_port)).close()
                    break
                time.sleep(0.2)
            done = run_program([place / "chat" / "ask.py"], cwd=place, timeout=300)
        finally:
            server.terminate()
    assert done.stdout.strip() == "I am a small GPT-2.", done.stderr[-2000:]
