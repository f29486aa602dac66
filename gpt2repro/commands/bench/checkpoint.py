"""How long training waits for a checkpoint: ours against Accelerate's `save_state` and a plain `torch.save`.

gpt2repro bench checkpoint

All three write the weights and AdamW's two moments. The stall is the time that the training loop waits for a save.
Since a thread that writes also slows the steps beside it, the record has the whole cost too: training steps with one
save among them against as many without. Ours also hashes, fsyncs and renames what it writes; the others do not.
On a GPU the model is the 124M (1.5 GB per checkpoint), on a CPU one of 17M parameters.
"""

import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.checkpoint.reader import find_checkpoint
from gpt2repro.checkpoint.restore import restore
from gpt2repro.checkpoint.writer import CheckpointWriter
from gpt2repro.commands.bench.harness import CommonOptions, NotEqual, Record, summary, timed
from gpt2repro.options import AtLeastOne, parse_options
from gpt2repro.training.optim import build_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM

OURS, ACCELERATE, TORCH = "ours, asynchronous", "accelerator.save_state", "torch.save"
CPU_SIZES = {"vocab_size": 8192, "n_positions": 256, "n_embd": 384, "n_layer": 8, "n_head": 6}


@dataclass(kw_only=True)
class Options(CommonOptions):
    rounds: AtLeastOne = 5
    "Saves of each kind."
    directory: Path | None = None
    "Disk to write to; none: the system's directory for temporary files."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench checkpoint", description=__doc__)
    record = Record("checkpoint", argv, options)
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        measure(record, Path(folder))
    return record.finish()


def measure(record: Record, folder: Path) -> None:
    """Check, then time the saves, and fill the record.

    Raises: NotEqual where a checkpoint of ours does not hold what torch.save wrote.
    """
    accelerator = Accelerator()
    on_gpu = accelerator.device.type == "cuda"
    config, batch = (GPT2ReproConfig(), (8, 1024)) if on_gpu else (GPT2ReproConfig(**CPU_SIZES), (2, 128))

    def build():
        model = GPT2ReproForCausalLM(config).to(accelerator.device)
        return model, build_optimizer(model, name="adamw", lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)

    model, optimizer = accelerator.prepare(*build())
    tokens = torch.randint(0, config.vocab_size, batch, device=accelerator.device)

    def step() -> None:
        accelerator.backward(model(tokens, labels=tokens, use_cache=False, output_logits=False).loss)
        optimizer.step()
        optimizer.zero_grad()

    ours = CheckpointWriter(folder / "ours", keep_last=1)
    numbers = itertools.count(1)
    candidates = {
        OURS: lambda: ours.save(next(numbers), model=model, optimizer=optimizer, state={}),
        ACCELERATE: lambda: accelerator.save_state(str(folder / "accelerate")),
        TORCH: lambda: torch.save([part.state_dict() for part in (model, optimizer)], folder / "torch.pt"),
    }

    # --- the same content comes back
    step()
    for save in candidates.values():
        save()
    ours.wait()
    newest = find_checkpoint(folder / "ours")
    twin, twin_optimizer = build()
    restore(newest, twin, twin_optimizer)
    stored = torch.load(folder / "torch.pt", map_location=accelerator.device, weights_only=True)
    restored = [part.state_dict() for part in (twin, twin_optimizer)]
    try:
        torch.testing.assert_close(restored, stored, rtol=0, atol=0, check_device=False)
    except AssertionError as error:
        raise NotEqual(f"ours and torch.save give different weights or optimizer states: {error}") from None
    del twin, twin_optimizer, stored, restored
    bytes_written = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    record.save(checks={"weights and optimizer restored": "equal to torch.save's, bit by bit"})

    # --- the stall of one save, the candidates in turns; the clock stands while our thread writes the rest
    times = record.compare(candidates, after=ours.wait)
    record.headline("training waits for a save", times, ours=OURS, baseline=ACCELERATE, unit="s")

    # --- the whole cost: steps with a save before the first, and without; as many as the writing takes, or more
    writing = [timed(lambda: (candidates[OURS](), ours.wait())) for _ in range(3)]
    step_seconds = timed(lambda: [step() for _ in range(3)]) / 3
    steps = max(3, min(60, round(1.2 * statistics.median(writing) / step_seconds) + 1))
    saves = {"no save": lambda: None, OURS: candidates[OURS], ACCELERATE: candidates[ACCELERATE]}
    loops = {name: lambda save=save: (save(), [step() for _ in range(steps)]) for name, save in saves.items()}
    loop_times = record.compare(loops, rounds=min(record.rounds, 3), warmup=0, after=ours.wait)
    ours.close()
    config = {"parameters": model.num_parameters(), "checkpoint_bytes": bytes_written, "steps_beside_a_save": steps}
    measured = {"times": times, "writing_seconds": summary(writing), "step_seconds": step_seconds}
    record.save(config=config, **measured, loop_seconds=loop_times)
    if {OURS, "no save"} <= loop_times.keys():
        cost = loop_times[OURS]["median_seconds"] - loop_times["no save"]["median_seconds"]
        record.figure("whole cost of a save, slower steps included", cost, unit="s")
