"""When a run's numbers go bad: how to notice without making a step wait, and what to do.

A loss or gradient norm is bad if it is not finite, or if it lies more than `z_threshold` standard deviations above the
mean of the last `window` good ones (the gradient norm by its logarithm, since its tail is long). The host computes mean
and deviation in bulk, when the loop fetches its numbers. Between two fetches they are two constants, so the device can
compare each step with them.

    per step            ok = monitor.allow(loss, grad_norm)            only for policy "skip"; a tensor, nothing waits
                        step_unless_bad(optimizer, ok, scaler)
    logging, saving     verdict = monitor.judge(records)               before anything is saved
        stop            name the steps, save nothing, exit code 4
        skip            the steps were left out; go on
        rewind          restore the newest checkpoint before verdict.first_step and skip the windows
                        [verdict.start, verdict.stop) of the data on purpose

Knows no model, no data, no checkpoint.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# A loss that hardly moves has a deviation near zero, and every small change would be an outlier. So one deviation is at
# least this part of the mean; for the gradient norm's logarithm it is at least this number.
SMALLEST_DEVIATION = 0.01
COUNTS = ("skipped", "in_a_row", "rewinds", "scaler_skips", "scaler_in_a_row")
MOST_SKIPS_IN_A_ROW = 10
SCALER_PATIENCE = 50  # skipped steps in a row: the scale, halved from 2^16 on, has then passed every useful value


@dataclass(frozen=True)
class Verdict:
    """The bad steps, first_step to last_step, their windows [start, stop) of the data, and the action to take."""

    action: Literal["stop", "skip", "rewind"]
    first_step: int
    last_step: int
    start: int
    stop: int
    reason: str

    def record(self) -> dict:
        """For metrics.jsonl, at the first bad step: a resume from before that step drops the record and repeats it."""
        event = {name: value for name, value in asdict(self).items() if name != "action"}
        return {"step": self.first_step, "event": self.action, **event}


@dataclass
class HealthMonitor:
    """Judges every step of a run; alike on all ranks that pass the same (reduced) numbers.

    `z_threshold=None` finds only numbers that are not finite. Spikes are found once `window` good steps are known. More
    than MOST_SKIPS_IN_A_ROW skipped steps in a row or `max_rewinds` rewinds stop the run.
    """

    policy: Literal["stop", "skip", "rewind"]
    window: int = 100
    z_threshold: float | None = 10.0
    max_rewinds: int = 3

    def __post_init__(self):
        self.losses: deque[float] = deque(maxlen=self.window)
        self.grad_norms: deque[float] = deque(maxlen=self.window)
        self.skipped = self.in_a_row = self.rewinds = self.scaler_skips = self.scaler_in_a_row = 0
        self._set_limits()

    def allow(self, loss: Tensor, grad_norm: Tensor, *, scaled: bool = False) -> Tensor:
        """Whether the step may be taken, as a 0-dim bool tensor; the host does not wait for it.

        `loss` must be the mean over all ranks. With `scaled` (fp16) the scaler handles gradients that overflow.
        """
        ok = torch.isfinite(loss) & (loss <= self.loss_limit)
        ok_norm = grad_norm <= self.grad_norm_limit  # also false for NaN
        return ok & (ok_norm | ~torch.isfinite(grad_norm) if scaled else ok_norm & torch.isfinite(grad_norm))

    def judge(self, records: list[dict]) -> Verdict | None:
        """The verdict on the steps since the last call; None where all were good.

        A record has "step", "loss", "grad_norm" (floats), "positions" (start, stop) of its windows in the data and,
        with fp16, "scaler_skipped".
        """
        bad, too_many = [], ""
        for record in records:
            scaler_skipped = record.get("scaler_skipped", False)
            if reason := self._reason(record):
                bad.append((record, reason))
                self.in_a_row += 1
                if self.policy == "skip" and self.in_a_row > MOST_SKIPS_IN_A_ROW:
                    too_many = f"; {self.in_a_row} steps in a row were bad, skipping does not help"
            elif not scaler_skipped:
                self.in_a_row = 0
                self.losses.append(record["loss"])
                self.grad_norms.append(max(record["grad_norm"], 1e-30))
            self.scaler_skips += scaler_skipped
            self.scaler_in_a_row = self.scaler_in_a_row + 1 if scaler_skipped else 0
        self._set_limits()
        if not bad:
            return None

        (first, reason), (last, _) = bad[0], bad[-1]
        if self.policy == "rewind" and self.rewinds >= self.max_rewinds:
            too_many = f"; {self.rewinds} rewinds have not helped"
        action = "stop" if too_many else self.policy
        self.rewinds += action == "rewind"
        self.skipped += len(bad) if action == "skip" else 0
        return Verdict(
            action=action,
            first_step=first["step"],
            last_step=last["step"],
            start=first["positions"][0],
            stop=last["positions"][1],
            reason=reason + too_many,
        )

    def state(self) -> dict:
        """The window and the counts, as JSON for the checkpoint."""
        windows = {"losses": list(self.losses), "grad_norms": list(self.grad_norms)}
        return windows | {name: getattr(self, name) for name in COUNTS}

    def load_state(self, state: dict, *, rewinding: bool = False) -> None:
        """Load a checkpoint's state; with `rewinding` the monitor keeps its own count of rewinds."""
        for name in ("losses", "grad_norms"):
            setattr(self, name, deque(state[name], maxlen=self.window))
        for name in COUNTS:
            if not (rewinding and name == "rewinds"):
                setattr(self, name, state[name])
        self._set_limits()

    def _reason(self, record: dict) -> str | None:
        loss, grad_norm = record["loss"], record["grad_norm"]
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if record.get("scaler_skipped"):
            lasts = self.scaler_in_a_row >= SCALER_PATIENCE
            return f"the gradient overflowed fp16 at {self.scaler_in_a_row + 1} steps in a row" if lasts else None
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if loss > self.loss_limit:
            return f"the loss {loss:.4g} is above {self.loss_limit:.4g}, {self.z_threshold:g} deviations over its mean"
        if grad_norm > self.grad_norm_limit:
            limit = f"{self.grad_norm_limit:.4g}, {self.z_threshold:g} deviations over its mean"
            return f"the gradient norm {grad_norm:.4g} is above {limit}"
        return None

    def _set_limits(self) -> None:
        """Compute the two limits of a good step from the window."""
        self.loss_limit = self.grad_norm_limit = math.inf
        if self.z_threshold is None or len(self.losses) < self.window:
            return
        mean = fmean(self.losses)
        deviation = max(pstdev(self.losses, mean), SMALLEST_DEVIATION * abs(mean))
        self.loss_limit = mean + self.z_threshold * deviation
        logs = [math.log(norm) for norm in self.grad_norms]
        mean = fmean(logs)
        deviation = max(pstdev(logs, mean), SMALLEST_DEVIATION)
        self.grad_norm_limit = math.exp(min(mean + self.z_threshold * deviation, 700.0))


def step_unless_bad(optimizer: torch.optim.Optimizer, ok: Tensor, scaler=None) -> None:
    """`optimizer.step()` where `ok`; where not, neither weights nor moments nor step counts change.

    torch's fused AdamW decides on the device (its `found_inf`, made for fp16). Any other optimizer, sharded parameters
    and fp16 need the answer on the host, so this step waits.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    groups = inner.param_groups
    fused = isinstance(inner, torch.optim.AdamW) and all(group.get("fused") for group in groups)
    sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    if fused and not sharded and scaler is None:
        inner.found_inf = (~ok).to(torch.float32)
        try:
            optimizer.step()
        finally:
            del inner.found_inf
    elif ok.item():
        optimizer.step()
    elif scaler is not None:
        scaler.update()  # closes the step that clipping opened by unscaling
