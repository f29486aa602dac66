"""How long training waits for a checkpoint: ours against Accelerate's `save_state` and a plain `torch.save`.

gpt2repro bench checkpoint

All four write the weights and AdamW's two moments. "Stall" is the time the training loop is held up. Since a thread
that writes also takes something from the steps beside it, the record has the whole cost as well: training steps with
one save among them against as many without. Ours also hashes, fsyncs and renames what it writes; the others do not.
On a GPU the model is the 124M (1.5 GB per checkpoint), on a CPU one of 17M parameters.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpt2repro.commands.bench.harness import RECORDS, NotEqual, figure, headline, summary, synchronize, write_record
from gpt2repro.options import parse_options

OURS, SYNCHRONOUS = "ours, asynchronous", "ours, synchronous"
ACCELERATE, TORCH = "accelerator.save_state", "torch.save"
CPU_SIZES = {"vocab_size": 8192, "n_positions": 256, "n_embd": 384, "n_layer": 8, "n_head": 6}


@dataclass
class Options:
    out: Path = RECORDS
    "Directory of the JSON records."
    rounds: int = 5
    "Saves of each kind."
    directory: Path | None = None
    "Disk to write to; none: the system's directory for temporary files."

    def problems(self) -> list[str]:
        return [] if self.rounds >= 1 else [f"rounds={self.rounds} must be at least 1"]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench checkpoint", description=__doc__)
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        results = measure(Path(folder), options.rounds)
    write_record("checkpoint", results, argv=argv, out=options.out)
    return 0


def measure(folder: Path, rounds: int) -> dict:
    import torch
    from accelerate import Accelerator

    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.checkpoint.reader import find_checkpoint
    from gpt2repro.checkpoint.restore import restore
    from gpt2repro.checkpoint.writer import CheckpointWriter
    from gpt2repro.training.optim import build_optimizer
    from modeling_gpt2repro import GPT2ReproForCausalLM

    accelerator = Accelerator()
    on_gpu = accelerator.device.type == "cuda"
    config = GPT2ReproConfig() if on_gpu else GPT2ReproConfig(**CPU_SIZES)
    rows, length = (8, 1024) if on_gpu else (2, 128)

    def build(seed: int):
        torch.manual_seed(seed)
        model = GPT2ReproForCausalLM(config).to(accelerator.device)
        return model, build_optimizer(model, name="adamw", lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)

    model, optimizer = accelerator.prepare(*build(0))
    tokens = torch.randint(0, config.vocab_size, (rows, length + 1), device=accelerator.device)

    def step() -> None:
        with accelerator.autocast():
            loss = model(
                input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False, output_logits=False
            ).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    ours = CheckpointWriter(folder / "ours", keep_last=1)
    blocking = CheckpointWriter(folder / "blocking", keep_last=1, asynchronous=False)
    counter = iter(range(1, 10**6))

    def save_with(writer: CheckpointWriter) -> None:
        writer.save(next(counter), model=model, optimizer=optimizer, state={})

    def save_by_torch() -> None:
        content = {"model": accelerator.unwrap_model(model).state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, folder / "torch.pt")

    candidates = {
        OURS: lambda: save_with(ours),
        SYNCHRONOUS: lambda: save_with(blocking),
        ACCELERATE: lambda: accelerator.save_state(str(folder / "accelerate")),
        TORCH: save_by_torch,
    }

    # --- the same content comes back
    step()
    for save in candidates.values():
        save()
    ours.wait()
    twin, twin_optimizer = build(1)
    restore(find_checkpoint(folder / "ours"), twin, twin_optimizer)
    by_torch = torch.load(folder / "torch.pt", map_location=accelerator.device, weights_only=True)
    moments = list(by_torch["optimizer"]["state"].values())
    parameters = [parameter for group in twin_optimizer.param_groups for parameter in group["params"]]
    for name, weight in twin.state_dict().items():
        if not torch.equal(weight, by_torch["model"][name]):
            raise NotEqual(f"ours and torch.save give different weights: {name}")
    for parameter, theirs in zip(parameters, moments, strict=True):
        for kind, value in twin_optimizer.state[parameter].items():
            if not torch.equal(value.cpu(), theirs[kind].cpu()):
                raise NotEqual(f"ours and torch.save give different optimizer states: {kind}")
    del twin, twin_optimizer, by_torch, moments, parameters

    # --- the stall of one save, in turns; what the thread still has to write is waited for outside the clock
    stalls: dict[str, list[float]] = {name: [] for name in candidates}
    writing = []
    for turn in range(rounds):
        for name in candidates if turn % 2 == 0 else reversed(candidates):
            synchronize()
            began = time.perf_counter()
            candidates[name]()
            stalls[name].append(time.perf_counter() - began)
            ours.wait()
            if name == OURS:
                writing.append(time.perf_counter() - began)
    times = {name: summary(seconds) for name, seconds in stalls.items()}

    # --- the whole cost: so many steps that the writing fits beside them, with and without a save before the first
    synchronize()
    began = time.perf_counter()
    for _ in range(3):
        step()
    synchronize()
    step_seconds = (time.perf_counter() - began) / 3
    steps = max(3, min(60, round(1.2 * statistics.median(writing) / step_seconds) + 1))
    loops: dict[str, list[float]] = {"no save": [], OURS: [], ACCELERATE: []}
    for _ in range(min(rounds, 3)):
        for name, seconds in loops.items():
            synchronize()
            began = time.perf_counter()
            if name in candidates:
                candidates[name]()
            for _ in range(steps):
                step()
            synchronize()
            seconds.append(time.perf_counter() - began)
            ours.wait()
    ours.close()
    medians = {name: statistics.median(seconds) for name, seconds in loops.items()}
    size = sum(file.stat().st_size for file in find_checkpoint(folder / "ours").rglob("*") if file.is_file())
    return {
        "config": {"parameters": model.num_parameters(), "checkpoint_bytes": size, "steps_beside_a_save": steps},
        "checks": {"weights and optimizer restored": "equal to torch.save's, bit by bit"},
        "times": times,
        "writing_seconds": summary(writing),
        "step_seconds": step_seconds,
        "loop_seconds": {name: summary(seconds) for name, seconds in loops.items()},
        "headlines": [
            headline("training waits for a save", times, ours=OURS, baseline=ACCELERATE, unit="s", goal=None),
            figure("whole cost of a save, slower steps included", medians[OURS] - medians["no save"], unit="s"),
        ],
    }
