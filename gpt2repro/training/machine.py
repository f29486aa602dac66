"""The machine of a run: Accelerate with the run's precision, the seeds of the steps, and the devices' names."""

import os
import platform
import re
import shlex
import sys
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch

from gpt2repro.evaluation.losses import CHUNKS_UNDER_FSDP2
from gpt2repro.options import InputError
from gpt2repro.redaction import scrub


def build_accelerator(config):
    """Accelerate with this run's precision; deterministic kernels are chosen before the device is initialised.

    `config` is a TrainConfig.

    Raises: InputError where the precision does not work on this machine.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    torch.use_deterministic_algorithms(config.deterministic)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32 on a GPU; no effect elsewhere
    precision = {"fp32": "no", "fp64": "no"}.get(config.precision, config.precision)
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
        if precision == "no" and on_gpu:
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if config.collective_timeout_minutes is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=config.collective_timeout_minutes)))
    try:
        # Without `cpu`, Accelerate takes two processes that torchrun starts on a CPU for two runs.
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)
    except (ValueError, ImportError) as error:  # such as fp16 on a CPU
        raise InputError(f"precision={config.precision} does not work on this machine: {error}") from error
    if config.bf16_residual and accelerator.mixed_precision != "bf16":
        raise InputError(f"bf16_residual needs mixed precision bf16, and this run has {accelerator.mixed_precision}")
    if accelerator.distributed_type == "FSDP" and config.reduction == "fixed":
        raise InputError(
            "reduction=fixed does not work with FSDP2, whose reduce-scatter adds in another order on another number of "
            "processes; take DDP (accelerate_configs/multi_gpu.yaml), or reduction=fast"
        )
    if config.attn_implementation == "flex_attention" and (config.attn_pdrop or accelerator.device.type == "cpu"):
        raise InputError("attn_implementation=flex_attention trains only on a GPU and without attn_pdrop; take sdpa")
    if accelerator.distributed_type == "FSDP" and config.loss_chunk_tokens is not None and not CHUNKS_UNDER_FSDP2:
        raise InputError(
            f"loss_chunk_tokens does not work with FSDP2 in torch {torch.__version__}; take torch 2.13, or halve "
            "micro_batch_size instead"
        )
    keep_sums_exact(getattr(accelerator.state, "fsdp_plugin", None))
    accelerator.gradient_accumulation_steps = 1  # whatever its environment says: it would divide the loss once more
    return accelerator


def keep_sums_exact(fsdp_plugin) -> None:
    """Keep outputs and gradient sums in fp32 under FSDP2, as DDP does; Accelerate's default rounds them to bf16.

    A loss of 3.3 in bf16 moves in steps of 0.016, and gradients summed over many micro-batches in bf16 lose digits.
    """
    policy = getattr(fsdp_plugin, "mixed_precision_policy", None)
    if hasattr(policy, "output_dtype"):
        fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's generators, different for every step and rank (Weyl-like steps by large odd numbers)."""
    return (seed + 0x9E3779B97F4A7C15 * (step + 1) + 0xC2B2AE3D27D4EB4F * rank) % 2**63


def whole(norm: torch.Tensor) -> torch.Tensor:
    """The gradient norm as an ordinary tensor; FSDP2 returns a DTensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The processor's name, as precisely as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def origin_of_bits(device: torch.device) -> str:
    """What a number's last bits depend on beside the program and its options: torch and the kind of processor."""
    cpu = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"torch {torch.__version__} on {cpu if device.type == 'cpu' else device_name(device)}"


def environment(accelerator) -> dict:
    """Where and how a run runs, for the model card."""
    program, *words = sys.orig_argv
    if words and Path(words[0]).stem == "gpt2repro":  # the installed command is a script that Python is given
        program, *words = words
    return {
        "command": shlex.join(scrub([Path(program).name, *words])),  # before quotes stand inside a secret
        "device": device_name(accelerator.device),
        "processor": cpu_name() if accelerator.device.type == "cpu" else None,
        "processes": accelerator.num_processes,
        "distributed": str(accelerator.distributed_type).removeprefix("DistributedType."),
        "precision": accelerator.mixed_precision,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }
