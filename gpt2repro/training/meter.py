"""The numbers of a step: kept on the device while steps run, fetched in bulk, tokens per second and MFU beside them.

Owns the arithmetic of speed. Knows no file and no model class.
"""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 tensor-core FLOP/s of one device (fp16 where it has no bf16), without the datasheets' 2x for sparsity.
# Source: the makers' datasheets. First match wins; word borders keep "A10" from matching "A100" and "A10G".
PEAK_FLOPS = {
    r"\bB200\b": 2250e12,
    r"\bH200 NVL\b": 835.5e12,
    r"\bG?H200\b": 989.5e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835.5e12,
    r"\bH100\b": 989.5e12,  # SXM: "NVIDIA H100 80GB HBM3"
    r"\bA100\b": 312e12,
    r"\bA40\b": 149.7e12,
    r"\bA10\b": 125e12,
    r"\bL40S\b": 362e12,
    r"\bL40\b": 181e12,
    r"\bL4\b": 121e12,
    r"\bRTX 5090\b": 209.5e12,
    r"\bRTX 4090\b": 165.2e12,
    r"\bRTX 3090\b": 71e12,
    r"\bRTX A6000\b": 154.8e12,
    r"\bV100-PCIE\b": 112e12,
    r"\bV100\b": 125e12,
    r"\bT4\b": 65e12,
    r"\bMI300X\b": 1307.4e12,
}


def flops_per_token(n_params_without_positions: int, n_layer: int, n_embd: int, seq_len: int) -> int:
    """FLOPs of one token's forward and backward pass: 6 per weight, and attention's 12 L H Q T.

    Source: PaLM, appendix B (Chowdhery et al. 2022), as in nanoGPT; H Q = n_embd.
    """
    return 6 * n_params_without_positions + 12 * n_layer * n_embd * seq_len


def flops_per_token_of(model, seq_len: int) -> int:
    """`flops_per_token` of one of our models, without its position embeddings: they are looked up, not multiplied."""
    sizes = model.config
    n_params = model.num_parameters() - sizes.n_positions * sizes.n_embd
    return flops_per_token(n_params, sizes.n_layer, sizes.n_embd, seq_len)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device as torch names it, None where it is unknown (then there is no honest MFU)."""
    if re.search(r"\bMIG\b", device_name):  # a slice of a card
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(name, device_name, re.IGNORECASE)), None)


class Meter:
    """A run's steps between two readings: what they computed stays on the device until `read`.

    `accelerator` averages over the ranks, unless all have the `same` numbers: a sum of eight equal ones is rounded on
    its way, so their mean is another number. `device_peak` is one device's FLOP/s, None if unknown. Time in `pause()`
    (evaluation, saving) does not count.
    """

    def __init__(
        self, accelerator, *, batch_tokens: int, flops_per_token: float, device_peak: float | None, same: bool = False
    ):
        self.accelerator, self.batch_tokens, self._same = accelerator, batch_tokens, same
        self.flops_per_token = flops_per_token
        self.peak = device_peak * accelerator.num_processes if device_peak else None
        self._steps: list[dict] = []
        self._rows: list[torch.Tensor] = []  # of the step that is being made
        self._start = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock inside the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began

    def keep(self, losses: torch.Tensor, divisor: int) -> None:
        """Keep the losses of a micro-batch's rows, (B,) nats / divisor, for the next step; nothing of a scalar."""
        if losses.dim():
            self._rows.append(losses.detach() * divisor)

    def add(self, **numbers) -> None:
        """Keep one step: "step" and "lr", "loss" and "grad_norm" as 0-dim tensors, "positions" of its windows."""
        if self._rows:
            numbers["row_nats"], self._rows = torch.cat(self._rows), []
        self._steps.append(numbers)

    def read(self) -> list[dict]:
        """The steps since the last reading, oldest first, with numbers averaged over the ranks, and their speed.

        `tokens_per_second` counts all ranks, and `mfu` (0..1) is that speed's share of `peak`. "row_nats", where rows
        were kept, are those of the whole batch, in the order of the ranks. Every rank has to call `read`. Here, and
        nowhere else, the loop waits for the device.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        numbers = torch.stack([torch.stack([step["loss"], step["grad_norm"]]) for step in steps])  # (steps, 2)
        numbers = (numbers if self._same else self.accelerator.reduce(numbers, reduction="mean")).tolist()
        if "row_nats" in steps[0]:
            rows = self.accelerator.gather(torch.stack([step["row_nats"] for step in steps]))  # (W steps, rows)
            for number, step in enumerate(steps):
                step["row_nats"] = rows[number :: len(steps)].flatten().tolist()
        now = time.perf_counter()
        seconds, self._start = max(now - self._start, 1e-9), now
        rate = self.batch_tokens * len(steps) / seconds
        mfu = None if self.peak is None else rate * self.flops_per_token / self.peak
        rates = {"tokens_per_second": rate, "step_seconds": seconds / len(steps), "mfu": mfu}
        rates["memory_gib"] = peak_memory_gib(self.accelerator.device)
        for step, (loss, grad_norm) in zip(steps, numbers, strict=True):
            step |= {"loss": loss, "grad_norm": grad_norm, "tokens": step["step"] * self.batch_tokens, **rates}
            if self.accelerator.scaler is not None:  # Accelerate's step_was_skipped misses a fused optimizer's skip
                step["scaler_skipped"] = not math.isfinite(grad_norm)
        return steps


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory that tensors took on the device so far; None on a device that does not count it."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
