"""A whole run on a CPU: nanoGPT's own train.py against ours, on nanoGPT's shakespeare recipe.

Both train on the tokens that the checkout's prepare.py made, and evaluate as many tokens as often. None of nanoGPT's
code is here. The record has the seconds of the whole run and of its parts: start-up (from `python` to the first step),
steps, evaluation and saving. It also has what `accelerate launch` adds to our start-up.
"""

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt2repro.commands.bench.harness import Record, finished, summary
from gpt2repro.commands.bench.train import ROOT, seconds_to_first_step, write_dataset
from gpt2repro.options import InputError
from gpt2repro.training.metrics_log import read_metrics

# nanoGPT's README, "I only have a macbook". The preset shakespeare_char_cpu is the same recipe for ours.
RECIPE = "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4"
RECIPE += " --n_head=4 --n_embd=128 --dropout=0.0"
STEPS, EVAL_STEPS = 2000, 250
# Each of nanoGPT's evaluations reads 20 batches of 12 x 64 of the training data and as many of the validation data.
VAL_TOKENS = 2 * 20 * 12 * 64
OURS, NANOGPT = "train_accelerate.py", "nanoGPT's train.py"
PARTS = ("whole run", "start-up", "steps", "evaluation and saving")
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--cpu"]


def measure(record: Record, nanogpt: Path) -> None:
    """Run both programs in turns, at most three times; fill and save the record."""
    data = {name: np.fromfile(nanogpt / f"data/shakespeare_char/{name}.bin", np.uint16) for name in ("train", "val")}
    runs: dict[str, list] = {OURS: [], NANOGPT: []}  # (seconds of each part, validation loss) of each run
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder, "data"), data, vocab_size=1 + int(max(ids.max() for ids in data.values())))
        for turn in range(min(record.rounds, 3)):
            if turn and not record.time_for(f"round {turn + 1}"):
                break
            for name, run in ((OURS, run_ours), (NANOGPT, run_nanogpt)):
                seconds, loss = run(nanogpt, Path(folder), turn)
                print(f"  {name}: {[round(s, 2) for s in seconds]} s, validation loss {loss:.4f}", flush=True)
                runs[name].append((seconds, loss))
        launched = [first_step(Path(folder), how, launcher) for how, launcher in (("plain", []), ("launched", LAUNCH))]
    config = {"nanogpt": RECIPE, "steps": STEPS, "val_tokens": VAL_TOKENS}
    losses = {name: [loss for _, loss in done] for name, done in runs.items()}
    record.save(config=config, validation_loss=losses, seconds={})
    for number, part in enumerate(PARTS):
        taken = record.results["seconds"][part] = {name: [s[number] for s, _ in done] for name, done in runs.items()}
        times = {name: summary(seconds) for name, seconds in taken.items()}
        measure, goal = f"nanoGPT's shakespeare recipe, {part}", None if number else 1.0
        record.headline(measure, times, ours=OURS, baseline=NANOGPT, unit="s", goal=goal)
    record.figure("nanoGPT's shakespeare recipe, what accelerate launch adds", launched[1] - launched[0], unit="s")


def run_ours(_, folder: Path, turn: int) -> tuple[list[float], float]:
    """Seconds of the PARTS, and the last validation loss."""
    start = time.perf_counter()
    finished(our_command(folder, f"ours-{turn}", "--max_steps", STEPS), ROOT)
    total = time.perf_counter() - start
    training, evaluations = read_metrics(folder / f"ours-{turn}")
    startup, steps = first_step(folder, f"start-{turn}", []), sum(step["step_seconds"] for step in training)
    return [total, startup, steps, total - startup - steps], evaluations[-1]["val_loss"]


def run_nanogpt(checkout: Path, folder: Path, turn: int) -> tuple[list[float], float]:
    """The same of nanoGPT, from its output, where an iteration's time includes the evaluation before it."""
    steps = [f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", f"--eval_interval={EVAL_STEPS}"]
    config = ["config/train_shakespeare_char.py", *RECIPE.split(), *steps, f"--out_dir={folder}/nanogpt-{turn}"]
    start = time.perf_counter()
    output = finished([sys.executable, "train.py", *config], checkout)
    total = time.perf_counter() - start
    iterations = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", output, re.MULTILINE)]
    losses = re.findall(r"^step \d+: .* val loss ([\d.]+)", output, re.MULTILINE)
    if not iterations or not losses:
        raise InputError(f"{checkout / 'train.py'} printed no 'iter N: … time …ms'; is this a checkout of nanoGPT?")
    evaluation = sum(iterations[::EVAL_STEPS]) - len(iterations[::EVAL_STEPS]) * statistics.median(iterations)
    steps = sum(iterations) - evaluation
    return [total, total - sum(iterations), steps, evaluation], float(losses[-1])


def first_step(folder: Path, name: str, launcher: list[str]) -> float:
    """Seconds from `python` to our first step."""
    command = our_command(folder, name, "--max_steps", 1, "--warmup_steps", 0, "--sample_tokens", 0, launcher=launcher)
    return seconds_to_first_step(command, folder / name)


def our_command(folder: Path, run: str, *options, launcher: list[str] = ()) -> list[str]:
    """Our program on the preset of this recipe, as a user starts it, in `folder`."""
    flags = ["--data", folder / "data", "--run_dir", folder / run, "--val_tokens", VAL_TOKENS, *options]
    return [sys.executable, *launcher, "train_accelerate.py", "--config", "shakespeare_char_cpu", *map(str, flags)]
