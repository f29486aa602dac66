"""A run on paper: memory, batch, time, money and disk before a single step. Arithmetic; knows no torch and no loop.

All byte counts are per process. The memory is that of eager execution and so an upper bound: torch.compile fuses much
of what is counted as activations and logits away.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from gpt2repro.training.tracking import flops_per_token, peak_flops

# Devices to quote hours for; their peaks are those of tracking.PEAK_FLOPS.
DEVICES = ("RTX 4090", "A100", "H100 PCIe", "H100", "H200")
GIB = 2**30
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
# At the loss: logits, their fp32 copy and its log-softmax (2 + 4 + 4); fp32 needs no copy (4 + 4).
LOGIT_BYTES = {"fp64": 16, "fp32": 8, "bf16": 10, "fp16": 10}


def parameter_count(*, vocab_size: int, n_positions: int, n_embd: int, n_layer: int, n_inner: int | None = None) -> int:
    """Parameters of GPT-2 with tied embeddings: 124,439,808 for the 124M model."""
    inner = n_inner or 4 * n_embd
    attention = n_embd * 3 * n_embd + 3 * n_embd + n_embd * n_embd + n_embd
    mlp = n_embd * inner + inner + inner * n_embd + n_embd
    norms = 4 * n_embd
    return (vocab_size + n_positions) * n_embd + n_layer * (attention + mlp + norms) + 2 * n_embd


def memory_by_part(
    *,
    n_params: int,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    seq_len: int,
    micro_batch_size: int,
    processes: int,
    precision: str,
    gradient_checkpointing: bool,
    sharded: bool,
    optimizer: str,
    loss_chunk_tokens: int | None,
) -> dict[str, int]:
    """Bytes of one process at its peak, the beginning of the backward pass."""
    share = processes if sharded else 1
    width = STATE_BYTES[precision]
    matrices = min(n_params, 12 * n_layer * n_embd**2)  # of the blocks: what Muon takes, with one moment instead of two
    moments = 2 * n_params - (matrices if optimizer == "muon" else 0)
    tokens = micro_batch_size * seq_len
    block = tokens * n_embd * BLOCK_BYTES[precision]
    stream = tokens * n_embd * STREAM_BYTES[precision]
    loss_tokens = min(tokens, loss_chunk_tokens or tokens)
    parts = {
        "weights": n_params * width // share,
        "gradients": n_params * width // share,
        f"optimizer ({optimizer})": moments * width // share,
    }
    if sharded:
        # FSDP2 gathers a block while it computes on the last one, and the embeddings for the whole pass.
        gathered = (n_params - matrices) + min(2, n_layer) * matrices // max(1, n_layer)
        # While micro-batches add up, gradients stay whole: they are reduced once, after the last.
        parts["gradients"] = n_params * width
        parts["gathered weights"] = gathered * (2 if precision in ("bf16", "fp16") else width)
    elif precision in ("bf16", "fp16"):
        parts[f"{precision} copies of the weights"] = 2 * n_params
    # Recomputing, a process holds every block's input and the tensors of the one block that it recomputes.
    parts["activations"] = stream + (n_layer * stream + block if gradient_checkpointing else n_layer * block)
    parts["logits"] = loss_tokens * vocab_size * LOGIT_BYTES[precision]
    parts["context, workspaces (estimate)"] = RESERVE_BYTES
    return parts


@dataclass
class Plan:
    """What `plan` found. `report()` is for people; `problems` are the sentences that say what would not work."""

    n_params: int
    memory: dict[str, int]
    gpu_memory_gib: float | None
    layout: str
    max_steps: int
    tokens: int
    epochs: float | None
    flops_per_token: int
    mfu: float
    processes: int
    hours: dict[str, float]
    dollars_per_gpu_hour: float | None
    checkpoint_bytes: dict[str, int]
    keep_checkpoints: int | None
    disk_free_bytes: int
    run_dir: Path
    hub: str | None
    problems: list[str]

    def report(self) -> str:
        total = sum(self.memory.values())
        card = f" of {self.gpu_memory_gib:,.0f} GiB" if self.gpu_memory_gib else ""
        each = sum(self.checkpoint_bytes.values())
        kept = "all kept" if self.keep_checkpoints is None else f"{self.keep_checkpoints} kept"
        price = self.dollars_per_gpu_hour
        stated = f"{self.mfu:.0%} MFU" + (f", ${price:.2f} per GPU and hour" if price is not None else "")
        epochs = "epochs n/a (stream)" if self.epochs is None else f"{self.epochs:,.2f} epochs"
        lines = [
            f"parameters   {self.n_params:,}",
            f"batch        {self.layout}",
            f"length       {self.max_steps:,} steps, {self.tokens:,} tokens, {epochs}, "
            f"{self.tokens / self.n_params:,.1f} tokens per parameter",
            f"work         {self.flops_per_token / 1e6:,.1f} MFLOP per token, "
            f"{self.flops_per_token * self.tokens:.3g} FLOP in all",
            f"memory       {_gib(total)}{card} per process, at most (torch.compile needs less)",
            *(f"  {_gib(size):>11}  {part}" for part, size in self.memory.items()),
            f"time         at {stated}, {self.processes} process{'es' if self.processes > 1 else ''}",
        ]
        for device, hours in self.hours.items():
            cost = "" if price is None else f"  ${hours * self.processes * price:,.2f}"
            lines.append(f"  {_duration(hours):>11}  {device}{cost}")
        lines += [
            f"checkpoint   {_gib(each)} each ("
            + ", ".join(f"{part} {_gib(size)}" for part, size in self.checkpoint_bytes.items())
            + f"), {kept}; {_gib(self.disk_free_bytes)} free at {self.run_dir}",
        ]
        if self.hub:
            lines.append(f"hub          {self.hub}")
        lines += ["", *(f"PROBLEM: {text}" for text in self.problems)] if self.problems else ["", "nothing in the way"]
        return "\n".join(lines)


def plan(
    *,
    n_params: int,
    n_layer: int,
    n_head: int,
    n_embd: int,
    vocab_size: int,
    seq_len: int,
    batch_tokens: int,
    micro_batch_size: int,
    processes: int,
    max_steps: int,
    epoch_tokens: int | None,
    precision: str,
    gradient_checkpointing: bool,
    sharded: bool,
    optimizer: str,
    keep_checkpoints: int | None,
    run_dir: str | Path,
    gpu_memory_gib: float | None,
    mfu: float = 0.4,
    dollars_per_gpu_hour: float | None = None,
    push_to_hub: str | None = None,
    n_positions: int | None = None,
    loss_chunk_tokens: int | None = None,
    hub_revisions: int = 1,
) -> Plan:
    """Work a run out without running it.

    `epoch_tokens` is None for a stream, `keep_checkpoints` the number that will lie on the disk (None: no limit),
    `gpu_memory_gib` None where there is no GPU. Asks the disk for its free space and, with `push_to_hub`, the Hub for
    the account; nothing else leaves this function.
    """
    problems: list[str] = []
    if n_embd % n_head:
        problems.append(f"n_embd={n_embd} is not a multiple of n_head={n_head}")
    per_pass = micro_batch_size * seq_len * processes
    multiply = f"{micro_batch_size} sequences x {seq_len} tokens x {processes} processes"
    if batch_tokens % per_pass:
        nearest = max(1, round(batch_tokens / per_pass)) * per_pass
        problems.append(f"batch_tokens={batch_tokens} is not a multiple of {per_pass} ({multiply}); try {nearest}")
    passes = max(1, batch_tokens // per_pass)
    layout = f"{batch_tokens:,} tokens = {multiply} x {passes} forward passes"
    if epoch_tokens is not None and epoch_tokens < batch_tokens:
        problems.append(f"the data has {epoch_tokens:,} tokens, fewer than one batch of {batch_tokens:,}")

    sizes = {
        "n_params": n_params,
        "n_layer": n_layer,
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "processes": processes,
        "precision": precision,
        "optimizer": optimizer,
        "loss_chunk_tokens": loss_chunk_tokens,
    }
    choice = {
        "micro_batch_size": micro_batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "sharded": sharded,
    }
    memory = memory_by_part(**sizes, **choice)
    if gpu_memory_gib is not None and sum(memory.values()) > gpu_memory_gib * GIB:
        problems.append(
            f"about {_gib(sum(memory.values()))} per process do not fit into {gpu_memory_gib:,.0f} GiB; "
            + _what_would_fit(sizes, choice, gpu_memory_gib)
        )

    run_dir = Path(run_dir)
    width = STATE_BYTES[precision]
    moments = memory[f"optimizer ({optimizer})"] * (processes if sharded else 1)
    checkpoint = {"model": n_params * width, "optimizer": moments}
    each = sum(checkpoint.values())
    free = shutil.disk_usage(next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())).free
    # A new checkpoint is whole before an old one goes; without a limit at least two must find room.
    needed = each * ((keep_checkpoints or 1) + 1)
    if needed > free:
        count = "two checkpoints" if not keep_checkpoints else f"{keep_checkpoints} checkpoints and one being written"
        problems.append(f"{count} need {_gib(needed)}, but only {_gib(free)} are free at {run_dir}")

    hub = None
    if push_to_hub:
        account, complaint = hub_permission(push_to_hub)
        stored = n_params * width * hub_revisions + moments  # optimizer state for the newest revision only
        hub = f"{push_to_hub}: about {_gib(stored)} in {hub_revisions} revisions" + (account and f", as {account}")
        problems += [complaint] if complaint else []

    tokens = max_steps * batch_tokens
    work = flops_per_token(n_params - (n_positions or seq_len) * n_embd, n_layer, n_embd, seq_len)
    return Plan(
        n_params=n_params,
        memory=memory,
        gpu_memory_gib=gpu_memory_gib,
        layout=layout,
        max_steps=max_steps,
        tokens=tokens,
        epochs=None if not epoch_tokens else tokens / epoch_tokens,
        flops_per_token=work,
        mfu=mfu,
        processes=processes,
        hours={name: work * tokens / (peak_flops(name) * mfu * processes) / 3600 for name in DEVICES},
        dollars_per_gpu_hour=dollars_per_gpu_hour,
        checkpoint_bytes=checkpoint,
        keep_checkpoints=keep_checkpoints,
        disk_free_bytes=free,
        run_dir=run_dir,
        hub=hub,
        problems=problems,
    )


def hub_permission(repo: str) -> tuple[str, str | None]:
    """(account name or "", complaint or None): whether the login at hand may write to the Hub repository `repo`."""
    from huggingface_hub import HfApi

    owner, slash, _ = repo.partition("/")
    try:
        account = HfApi().whoami()
    except Exception as error:  # no login, no network, a server's bad day: all the same to a plan
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return "", f"the Hub does not say who you are, so {repo} may not be writable (`hf auth login`): {reason}"
    name = account.get("name", "")
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    mine = {name, *(group.get("name") for group in account.get("orgs", []))}
    if slash and owner not in mine:
        return name, f"{repo} belongs to {owner}, but this login is {name} and may write for {', '.join(sorted(mine))}"
    if role == "read":
        return name, f"the token of {name} may only read; pushing to {repo} needs one with write permission"
    return name, None


def _what_would_fit(sizes: dict, choice: dict, gpu_memory_gib: float) -> str:
    """The mildest changes that make the run fit, none of which changes its result."""

    def fits(**change) -> bool:
        return sum(memory_by_part(**sizes, **{**choice, **change}).values()) <= gpu_memory_gib * GIB

    def largest(**change) -> int | None:
        halves = [choice["micro_batch_size"] >> shift for shift in range(choice["micro_batch_size"].bit_length())]
        return next((size for size in halves if fits(micro_batch_size=size, **change)), None)

    offers = []
    if largest():
        offers.append(f"micro_batch_size={largest()}")
    if not choice["gradient_checkpointing"] and (size := largest(gradient_checkpointing=True)):
        offers.append(f"gradient_checkpointing with micro_batch_size={size}")
    if not choice["sharded"] and sizes["processes"] > 1 and (size := largest(sharded=True)):
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
