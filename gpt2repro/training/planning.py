"""A run on paper: memory, batch, time, money and disk before a single step. Arithmetic on a TrainConfig; no loop.

All byte counts are per process. A run without `micro_batch_size` chooses its own by them.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from gpt2repro.checkpoint.layout import from_all_ranks, kept_steps
from gpt2repro.data.shards import open_split
from gpt2repro.data.sources import is_recipe, open_source, shards_directory
from gpt2repro.data.text import files_or_id
from gpt2repro.models import architecture_of, compile_mode
from gpt2repro.options import InputError
from gpt2repro.training.meter import flops_per_token, peak_flops

# Devices to quote hours for; their peaks are those of meter.PEAK_FLOPS.
DEVICES = ("RTX 4090", "A100", "H100 PCIe", "H100", "H200")
SIZES = ("n_layer", "n_embd", "vocab_size")  # of a model's configuration that its memory follows from
GIB = 2**30
DEFAULT_GPU_GIB = 80.0
# CUDA context, cuBLAS and NCCL workspaces, fragmentation: an estimate, not measured.
RESERVE_BYTES = round(1.5 * GIB)
STATE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}  # weights, gradients and moments of one parameter, each
# Bytes per token and unit of n_embd that one block keeps for its backward pass (dropout 0, attention that stores no
# T x T matrix). bf16 under autocast, residual stream fp32: inputs of the two layer norms 4 + 4; inputs of the four
# matmuls 2 + 2 + 2 + 8; q, k, v 6; input of the GELU 8. fp32: everything 4 bytes wide, where a matmul's input that
# autocast would have copied is the layer norm's own output: 64. Layer norm statistics and log-sum-exp left out.
# Derived as in Korthikanti et al. 2022, section 4.1; test_planning.py counts the tensors that our model really saves.
BLOCK_BYTES = {"fp64": 128, "fp32": 64, "bf16": 36, "fp16": 36}
STREAM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}  # the residual stream, all that recomputation keeps
# A block keeps 36 bytes in bf16 if the whole model is compiled too, and 34 where each block is; the tests count both.
# At the loss: logits, their fp32 copy and its log-softmax (2 + 4 + 4); fp32 needs no copy (4 + 4). With compiled
# blocks copy and log-softmax are never written, which leaves the logits and their gradient (2 + 2). In one graph with
# the model the gradient takes the logits' place (2): an H200 needed 28.5 GiB for 64 x 1024 tokens of 124M, and without
# its last part the plan says 28.7 (results/h200).
LOGIT_BYTES = {
    "off": {"fp64": 16, "fp32": 8, "bf16": 10, "fp16": 10},
    "block": {"fp64": 16, "fp32": 8, "bf16": 4, "fp16": 4},
    "model": {"fp64": 16, "fp32": 8, "bf16": 2, "fp16": 2},
}
# Without `micro_batch_size`: at most so many tokens per forward pass (64 x 1024; more would hardly be faster), in so
# much of the card. The rest is for what is not counted.
MOST_TOKENS, SHARE_OF_CARD = 65_536, 0.9
SEQUENCES_WITHOUT_CARD = 16
# More passes over one corpus than this are a forgotten --max_steps, or another corpus than was meant.
MOST_EPOCHS = 1000
MOST_SAVES = 1_000_000  # that a plan counts
# On a CPU a run that would take longer than this was meant for a GPU.
MOST_CPU_HOURS = 24
SMALL_RUN_FLOPS = 1e15  # below, no CPU needs a day, and none is measured
CPU_SHARE = 0.5  # of a matmul's speed that a whole training step reaches there; measured on two cores, 0.4 to 0.6


@dataclass(frozen=True)
class Layout:
    """The sizes that a process' memory follows from."""

    n_params: int
    n_layer: int
    n_embd: int
    vocab_size: int
    seq_len: int
    micro_batch_size: int
    processes: int
    precision: str
    optimizer: str
    gradient_checkpointing: bool = False
    sharded: bool = False
    loss_chunk_tokens: int | None = None
    compiled: str = "off"  # or "block" or "model"
    averaged: bool = False
    masked: bool = False
    fixed_batch_tokens: int | None = None  # tokens per step of a run with reduction=fixed

    @classmethod
    def of(cls, config, *, on_gpu: bool, processes: int, sharded: bool, **sizes) -> "Layout":
        """The layout of a TrainConfig's run; `sizes` are the fields that the config does not settle."""
        return cls(
            **sizes,
            processes=processes,
            sharded=sharded,
            seq_len=config.seq_len,
            micro_batch_size=config.micro_batch_size or 1,
            optimizer=config.optimizer,
            averaged=config.ema_decay is not None,
            masked=config.documents == "mask" and config.attn_implementation == "sdpa",
            gradient_checkpointing=config.gradient_checkpointing,
            loss_chunk_tokens=config.loss_chunk_tokens,
            compiled=compile_mode(config.compile, "cuda" if on_gpu else "cpu", processes, sharded=sharded),
            fixed_batch_tokens=config.batch_tokens if config.reduction == "fixed" else None,
        )

    def memory(self) -> dict[str, int]:
        """Part -> bytes of one process at its peak, the beginning of the backward pass."""
        share = self.processes if self.sharded else 1
        width = STATE_BYTES[self.precision]
        half = self.precision in ("bf16", "fp16")
        tokens = self.micro_batch_size * self.seq_len
        block = tokens * self.n_embd * BLOCK_BYTES[self.precision]
        stream = tokens * self.n_embd * STREAM_BYTES[self.precision]
        parts = {
            "weights": self.n_params * width // share,
            "gradients": self.n_params * width // share,
            f"optimizer ({self.optimizer})": self.moments() * width // share,
        }
        if self.averaged:
            parts["averaged weights"] = self.n_params * width // share
        if self.sharded:
            # FSDP2 gathers a block while it computes on the last one, and the embeddings for the whole pass.
            gathered = (self.n_params - self.matrices()) + min(2, self.n_layer) * self.matrices() // self.n_layer
            # While micro-batches add up, gradients stay whole: they are reduced once, after the last.
            parts["gradients"] = self.n_params * width
            parts["gathered weights"] = gathered * (2 if half else width)
        elif self.fixed_batch_tokens is not None:
            # reduction.TreeSum: before the last of n micro-batches one set of gradients for each of log2(n) subtrees.
            passes = self.fixed_batch_tokens // (tokens * self.processes)
            parts["gradients"] = self.n_params * width * max(1, (passes - 1).bit_length())
        if half and not self.sharded:
            parts[f"{self.precision} copies of the weights"] = 2 * self.n_params
        # Recomputing, a process holds every block's input and the tensors of the one block that it recomputes.
        recomputed = self.n_layer * stream + block
        parts["activations"] = stream + (recomputed if self.gradient_checkpointing else self.n_layer * block)
        if self.masked:
            # (B, 1, T, T), a byte each; every layer makes a copy as wide as its queries and keeps it for its backward
            # pass. A model that is compiled as one graph keeps one copy for all layers.
            copies = 1 if self.gradient_checkpointing else self.n_layer
            parts["attention masks (at most)"] = tokens * self.seq_len * (1 + copies * (2 if half else width))
        logits = min(tokens, self.loss_chunk_tokens or tokens) * self.vocab_size
        parts["logits"] = logits * LOGIT_BYTES[self.compiled][self.precision]
        parts["context, workspaces (estimate)"] = RESERVE_BYTES
        return parts

    def needs(self, **changes) -> int:
        """Bytes of one process at its peak, with some of the sizes changed."""
        return sum(replace(self, **changes).memory().values())

    def matrices(self) -> int:
        """Parameters in the blocks' matrices: what Muon takes, with one moment instead of two."""
        return min(self.n_params, 12 * self.n_layer * self.n_embd**2)

    def moments(self) -> int:
        """Numbers that the optimizer keeps."""
        return 2 * self.n_params - (self.matrices() if self.optimizer == "muon" else 0)


def choose_micro_batch(layout: Layout, memory_gib: float | None, batch_rows: int) -> int:
    """The largest power of two that divides each process' share of `batch_rows` sequences and fits, at least 1.

    It fits into MOST_TOKENS and 90 % of a card of `memory_gib`; without a card (None), 16 is the most.
    """
    most = SEQUENCES_WITHOUT_CARD if memory_gib is None else max(1, MOST_TOKENS // layout.seq_len)
    room = SHARE_OF_CARD * GIB * (memory_gib or float("inf"))
    for size in (2**power for power in reversed(range(1, most.bit_length()))):
        if batch_rows % (size * layout.processes) == 0 and layout.needs(micro_batch_size=size) <= room:
            return size
    return 1


def micro_batch_of_run(config, accelerator, model, kept: int | None) -> int:
    """What a run without `micro_batch_size` takes: what it `kept` where that still divides the batch, else its choice.

    Every process calls it; the card with the least memory decides.
    """
    processes, rows = accelerator.num_processes, config.batch_tokens // config.seq_len
    if kept is not None and rows % (kept * processes) == 0:
        return kept
    on_gpu, precision = accelerator.device.type == "cuda", accelerator.mixed_precision
    if precision not in STATE_BYTES:
        precision = "fp64" if config.precision == "fp64" else "fp32"
    sizes = {name: getattr(model.config, name) for name in SIZES} | {"n_params": model.num_parameters()}
    sharded = accelerator.distributed_type == "FSDP"
    layout = Layout.of(config, on_gpu=on_gpu, processes=processes, precision=precision, sharded=sharded, **sizes)
    memory_gib = min(from_all_ranks(_memory_of_this_gpu(accelerator.device))) if on_gpu else None
    return choose_micro_batch(layout, memory_gib, rows)


@dataclass
class Plan:
    """What `plan` found about a TrainConfig's run. `report()` is for people; `problems` say what would not work."""

    config: Any
    layout: Layout
    gpu_memory_gib: float
    tokens: int
    epochs: float | None
    flops_per_token: int
    hours: dict[str, float]
    checkpoint_bytes: dict[str, int]
    kept_checkpoints: int
    disk_free_bytes: int
    hub: str | None
    problems: list[str]
    timetable: list[str]  # of a recipe

    def report(self) -> str:
        config, layout, memory = self.config, self.layout, self.layout.memory()
        processes, price, n_params = layout.processes, config.dollars_per_gpu_hour, layout.n_params
        passes = config.batch_tokens // (layout.micro_batch_size * config.seq_len * processes)
        stated = f"{config.assumed_mfu:.0%} MFU" + (f", ${price:.2f} per GPU and hour" if price is not None else "")
        epochs = "epochs n/a" if self.epochs is None else f"{self.epochs:,.2f} epochs"
        lines = [
            f"parameters   {n_params:,}",
            f"batch        {config.batch_tokens:,} tokens = {layout.micro_batch_size} sequences x "
            f"{config.seq_len} tokens x {processes} processes x {passes} forward passes",
            f"length       {self.tokens // config.batch_tokens:,} steps, {self.tokens:,} tokens, {epochs}, "
            f"{self.tokens / n_params:,.1f} tokens per parameter",
            *(f"{'recipe' if number == 0 else '':12} {line}" for number, line in enumerate(self.timetable)),
            f"work         {self.flops_per_token / 1e6:,.1f} MFLOP per token, "
            f"{self.flops_per_token * self.tokens:.3g} FLOP in all",
            f"memory       {_gib(layout.needs())} of {self.gpu_memory_gib:,.0f} GiB per process, "
            f"{'not compiled' if layout.compiled == 'off' else 'compiled'}",
            *(f"  {_gib(size):>11}  {part}" for part, size in memory.items()),
            f"time         at {stated}, {processes} process{'es' if processes > 1 else ''}",
        ]
        for device, hours in self.hours.items():
            cost = "" if price is None else f"  ${hours * processes * price:,.2f}"
            lines.append(f"  {_duration(hours):>11}  {device}{cost}")
        parts = ", ".join(f"{part} {_gib(size)}" for part, size in self.checkpoint_bytes.items())
        lines.append(
            f"checkpoint   {_gib(sum(self.checkpoint_bytes.values()))} each ({parts}), {self.kept_checkpoints} kept; "
            f"{_gib(self.disk_free_bytes)} free at {config.run_dir}"
        )
        if self.hub:
            lines.append(f"hub          {self.hub}")
        lines += ["", *(f"PROBLEM: {text}" for text in self.problems)] if self.problems else ["", "nothing in the way"]
        return "\n".join(lines)


def plan(config, *, processes: int = 1, sharded: bool = False, may_write: Callable | None = None) -> Plan:
    """Work the run of a TrainConfig out without running it.

    It asks the disk for its free space, the data and `init_from` for their sizes and, with `push_to_hub`,
    `may_write(repo)` for (account, complaint or None). What cannot be had becomes a problem, not an error.
    """
    problems: list[str] = []
    vocab_size = 50257  # of a stream's own tokenizer
    split, timetable, passes = None, [], None
    try:
        if is_recipe(config.data):
            sequences, options = config.batch_tokens // config.seq_len, {"seq_len": config.seq_len, "seed": config.seed}
            options |= {"vocab_size": config.vocab_size, "verify": False}
            mixed = open_source(config.data, sequences=sequences, **options)
            vocab_size, end = mixed.vocab_size, config.max_steps * sequences
            timetable = mixed.timetable(end, sequences)
            passes = max(count / mixed.sources[name].windows for name, count in mixed.recipe.counts(end).items())
            mixed.check_length(end)
        elif config.data.startswith("stream:"):
            files_or_id(config.data.removeprefix("stream:"))  # the Hub is not asked
        else:
            split = open_split(shards_directory(config.data), "train")
            vocab_size = split.vocab_size
    except InputError as error:
        problems.append(str(error))
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_inner", "n_positions")}
    sizes["vocab_size"] = config.vocab_size or vocab_size
    if config.init_from is not None:
        try:
            sizes |= architecture_of(config.init_from)
        except InputError as error:
            problems.append(str(error))
    n_params = parameter_count(**{name: size for name, size in sizes.items() if name != "n_head"})
    gpu_memory_gib, on_gpu = config.gpu_memory_gib or _memory_of_this_gpu(), not _on_cpu(config)
    precision = "bf16" if config.precision == "auto" else config.precision
    how = {"on_gpu": on_gpu, "processes": processes, "precision": precision, "sharded": sharded}
    layout = Layout.of(config, n_params=n_params, **how, **{name: sizes[name] for name in SIZES})
    if config.micro_batch_size is None:
        rows = config.batch_tokens // config.seq_len
        size = choose_micro_batch(layout, gpu_memory_gib if on_gpu else None, rows)
        layout = replace(layout, micro_batch_size=size)
    steps = config.max_steps if config.cooldown_from is None else config.cooldown_steps  # a branch makes its own only
    tokens = steps * config.batch_tokens
    multiplied = n_params - sizes["n_positions"] * layout.n_embd  # the positions are looked up
    work = flops_per_token(multiplied, layout.n_layer, layout.n_embd, config.seq_len)

    epochs = tokens / ((split.tokens - 1) // config.seq_len * config.seq_len or 1) if split else None
    if split and split.tokens <= config.batch_tokens:
        problems.append(f"the data has {split.tokens:,} tokens, fewer than one batch of {config.batch_tokens:,}")
    problems += doubts(config, passes or epochs, work * tokens)

    if (needed := layout.needs()) > gpu_memory_gib * GIB:
        problems.append(
            f"about {_gib(needed)} per process do not fit into {gpu_memory_gib:,.0f} GiB; "
            + _what_would_fit(layout, gpu_memory_gib)
        )

    width = STATE_BYTES[layout.precision]
    checkpoint = {"model": n_params * width, "optimizer": layout.moments() * width}
    if layout.averaged:
        checkpoint["averages"] = checkpoint["model"]
    each = sum(checkpoint.values())
    begins, gaps = config.max_steps - steps, [config.save_steps]
    if config.stop_when_val_rises is not None:
        gaps.append(config.eval_steps)
    due = {step for gap in gaps for step in range(gap, config.max_steps, gap)[-MOST_SAVES:] if step > begins}
    saves = sorted({*due, config.max_steps})
    kept = len(kept_steps(saves, config.keep_last, config.milestone_steps, pointed={saves[0], saves[-1]}))
    run_dir = Path(config.run_dir)
    free = shutil.disk_usage(next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())).free
    if each * (kept + 1) > free:  # a new checkpoint is whole before an old one goes
        problems.append(
            f"{kept} checkpoints and one being written need {_gib(each * (kept + 1))}, but only {_gib(free)} are free "
            f"at {run_dir}; lower --keep_last or choose another --run_dir"
        )

    hub = None
    if config.push_to_hub and may_write is not None:
        account, complaint = may_write(config.push_to_hub)
        stored = sum(checkpoint.values()) + checkpoint["model"] * (len(saves) - 1)  # all else for the newest one only
        hub = f"{config.push_to_hub}: about {_gib(stored)} in {len(saves)} revisions" + (account and f", as {account}")
        problems += [complaint] if complaint else []

    rates = {name: peak_flops(name) * config.assumed_mfu * processes for name in DEVICES}  # FLOP/s
    return Plan(
        config=config,
        layout=layout,
        gpu_memory_gib=gpu_memory_gib,
        tokens=tokens,
        epochs=epochs,
        flops_per_token=work,
        hours={name: work * tokens / rate / 3600 for name, rate in rates.items()},
        checkpoint_bytes=checkpoint,
        kept_checkpoints=kept,
        disk_free_bytes=free,
        hub=hub,
        problems=problems,
        timetable=timetable,
    )


def print_plan(config, may_write: Callable) -> int:
    """`--plan`. Raises: InputError where something does not fit."""
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    found = plan(config, processes=int(os.environ.get("WORLD_SIZE", 1)), sharded=sharded, may_write=may_write)
    print(found.report())
    if found.problems:
        raise InputError("this run would not work as it is: " + "; ".join(found.problems))
    return 0


def doubts(config, epochs: float | None, flops: float) -> Iterator[str]:
    """What about a run is possible but can hardly be meant: many epochs, or a GPU's work on a CPU."""
    if epochs is not None and epochs > MOST_EPOCHS:
        yield f"{epochs:,.0f} epochs of {config.data}; lower --max_steps, or take a larger corpus"
    if _on_cpu(config) and flops > SMALL_RUN_FLOPS:
        rate = matmul_flops()
        if (hours := flops / rate / CPU_SHARE / 3600) > MOST_CPU_HOURS:
            yield (
                f"about {_duration(hours)} on this CPU ({rate / 1e9:,.0f} GFLOP/s in a matmul, measured now); take "
                "a GPU, or a smaller preset such as quickstart (to plan for a GPU elsewhere: --gpu_memory_gib 80)"
            )


def matmul_flops() -> float:
    """FLOP/s of this CPU in fp32 matrix products, measured for a tenth of a second."""
    timer = Timer("a @ a", globals={"a": torch.rand(1024, 1024)}, num_threads=torch.get_num_threads())
    return 2 * 1024**3 / timer.blocked_autorange(min_run_time=0.1).median


def parameter_count(*, vocab_size: int, n_positions: int, n_embd: int, n_layer: int, n_inner: int | None = None) -> int:
    """Parameters of GPT-2 with tied embeddings: 124,439,808 for the 124M model."""
    inner = n_inner or 4 * n_embd
    attention = n_embd * 3 * n_embd + 3 * n_embd + n_embd * n_embd + n_embd
    mlp = n_embd * inner + inner + inner * n_embd + n_embd
    norms = 4 * n_embd
    return (vocab_size + n_positions) * n_embd + n_layer * (attention + mlp + norms) + 2 * n_embd


def _on_cpu(config) -> bool:
    """Whether the run would be on this machine's CPU; `gpu_memory_gib` speaks of a GPU elsewhere."""
    return not torch.accelerator.is_available() and config.gpu_memory_gib is None


def _memory_of_this_gpu(device=0) -> float:
    on_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).total_memory / GIB if on_gpu else DEFAULT_GPU_GIB


def _what_would_fit(layout: Layout, gpu_memory_gib: float) -> str:
    """The mildest changes that make the run fit, none of which changes its result."""

    def largest(**change) -> int | None:
        halves = [layout.micro_batch_size >> shift for shift in range(layout.micro_batch_size.bit_length())]
        room = gpu_memory_gib * GIB
        return next((size for size in halves if layout.needs(micro_batch_size=size, **change) <= room), None)

    offers = []
    if size := largest():
        offers.append(f"micro_batch_size={size}")
    if not layout.gradient_checkpointing and (size := largest(gradient_checkpointing=True)):
        offers.append(f"gradient_checkpointing with micro_batch_size={size}")
    if not layout.sharded and layout.processes > 1 and (size := largest(sharded=True)):
        offers.append(f"sharding (fsdp2.yaml) with micro_batch_size={size}")
    if offers:
        return "these would: " + "; or ".join(offers)
    return "neither smaller micro-batches nor recomputation help: use more memory or several GPUs with fsdp2.yaml"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:,.2f} MiB"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
