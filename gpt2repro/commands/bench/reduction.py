"""What `--reduction fixed` costs: its training step against plain DDP's on 1, 2 and 4 processes, one thread each.

    gpt2repro bench reduction                               # about 7 minutes on two idle cores

Both kinds of step have the same weights and tokens: 4 micro-batches of 2,048 tokens per process and step, fp32, AdamW.
They take turns in the same processes. With fewer cores than processes the seconds say little, but the ratios still
compare the work. The exchange of all gradients is also timed alone, against one all_reduce of as many bytes.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt2repro.commands.bench.harness import CommonOptions, NotEqual, Record, summary, timed
from gpt2repro.options import AtLeastOne, parse_options

PLAIN, FIXED, ALL_REDUCE, EXCHANGE = "plain DDP", "fixed", "all_reduce", "exchange"
SIZES = {
    "1M": {"n_layer": 5, "n_head": 4, "n_embd": 128, "vocab_size": 512, "n_positions": 256},
    "20M": {"n_layer": 6, "n_head": 8, "n_embd": 512, "vocab_size": 512, "n_positions": 256},
}
ACCUMULATION, SEQUENCES = 4, 8  # micro-batches of 8 x 256 tokens
GOAL = 1 / 1.05  # of plain DDP's speed, on 2 processes


@dataclass(kw_only=True)
class Options(CommonOptions):
    rounds: AtLeastOne = 3
    "Steps of each kind; one more on 2 processes, for which there is a goal."
    processes: list[AtLeastOne] = field(default_factory=lambda: [1, 2, 4])
    "Numbers of processes, powers of two."
    sizes: list[Literal["1M", "20M"]] = field(default_factory=lambda: ["1M", "20M"])
    "Models, by their parameters."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench reduction", description=__doc__)
    record = Record("reduction", argv, options)
    for size in options.sizes:
        for processes in options.processes:
            what = f"{size} parameters, {processes} process{'es' if processes > 1 else ''}"
            rounds, goal = (options.rounds + 1, GOAL) if processes == 2 else (options.rounds, None)
            if not record.time_for(what):
                continue
            took = record.attempt(what, lambda: launch(size, processes, rounds))  # noqa: B023 (called at once)
            if took is not None:
                times = {name: summary(seconds) for name, seconds in took.items()}
                record.headline(f"step, {what}: fixed", times, ours=FIXED, baseline=PLAIN, unit="s", goal=goal)
                record.headline(f"exchange, {what}: fixed", times, ours=EXCHANGE, baseline=ALL_REDUCE, unit="s")
                record.save(times=record.results.get("times", {}) | {what: times})
    return record.finish()


def launch(size: str, processes: int, rounds: int) -> dict[str, list[float]]:
    """What `measure` returns in so many processes, started by torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = f"-m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node={processes}".split()
        worker = ["-m", "gpt2repro.commands.bench.reduction", size, str(rounds), f"{folder}/times.json"]
        subprocess.run([sys.executable, *launcher, *worker], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return json.loads(Path(folder, "times.json").read_text())


def measure(sizes: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step of each kind, and of every exchange. Every process calls it.

    Raises: NotEqual where the two kinds of step have different gradients.
    """
    import torch
    import torch.distributed as dist

    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.training.optim import build_optimizer
    from gpt2repro.training.reduction import FixedReduction
    from modeling_gpt2repro import GPT2ReproForCausalLM

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shape = (world, ACCUMULATION, SEQUENCES, sizes["n_positions"] + 1)
    ids = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(0))[rank]

    def build(is_fixed: bool):
        torch.manual_seed(0)
        plain = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes))
        optimizer = build_optimizer(plain, name="adamw", lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        fixed = FixedReduction(plain) if is_fixed else None
        wrap = fixed is None and world > 1
        model = torch.nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=True) if wrap else plain

        def step(micro_batches=ids) -> torch.Tensor:
            tokens = micro_batches[..., 1:].numel() * (1 if wrap else world)  # DDP divides by the ranks
            for number, rows in enumerate(micro_batches, 1):
                with model.no_sync() if wrap and number < len(micro_batches) else contextlib.nullcontext():
                    targets = {"shift_labels": rows[:, 1:], "num_items_in_batch": tokens}
                    loss = model(input_ids=rows[:, :-1], use_cache=False, output_logits=False, **targets).loss
                    loss.backward()
                if fixed is not None:
                    fixed.keep(loss)
            if fixed is not None:
                fixed.finish()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return norm

        return step, fixed

    (plain_step, _), (fixed_step, fixed) = build(False), build(True)
    for size in (1, ACCUMULATION // 2):  # the warm-up is two steps: DDP lays out its buckets anew after the first
        norms = torch.stack([plain_step(ids[:size]), fixed_step(ids[:size])])
        if not torch.isclose(*norms, rtol=1e-3):
            raise NotEqual(f"gradient norms {norms.tolist()} of plain DDP and the fixed reduction")
    candidates = {PLAIN: plain_step, FIXED: fixed_step}
    if world > 1:
        gradients = torch.zeros(sum(size.numel() for size in fixed.gradients.values()))
        candidates |= {ALL_REDUCE: lambda: dist.all_reduce(gradients), EXCHANGE: fixed.exchange}
    took: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in list(candidates)[:: 1 if turn % 2 == 0 else -1]:
            if world > 1:
                dist.barrier()
            took[name].append(timed(candidates[name]))
    return took


if __name__ == "__main__":
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    found = measure(SIZES[sys.argv[1]], int(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[3]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
