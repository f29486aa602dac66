"""What a run leaves behind while it trains: metrics.jsonl, samples, status.json, TensorBoard, W&B, tokens/s and MFU.

    record -> metrics.jsonl        the truth: one JSON object per line, cut back to the checkpoint's step on resume
           -> TensorBoard, W&B     views of it: the same names; one that fails is named once and dropped

Owns the files named above. Knows nothing of models, data or checkpoints, and no metric by name but `step`, `val_loss`.
"""

import json
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2repro.files import write_json
from gpt2repro.redaction import scrub

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


class RunLog:
    """The log of one run. Every process may build and call it; only the main one writes.

    `config` is shown in the trackers, scrubbed of secrets. `run_ids` are those of the run that is continued: they go
    into its checkpoints, and a resumed W&B run is the same run. `resume_step` is the step of the checkpoint that is
    continued from, None for a run from the start: whatever was logged after it is dropped and will be logged again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        config: dict,
        trackers: list[str],
        project: str,
        run_ids: dict | None,
        resume_step: int | None,
        is_main: bool,
    ):
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self.run_ids = dict(run_ids or {})
        self._trackers: dict[str, _TensorBoard | _WandB] = {}
        self._lock = threading.Lock()  # checkpoint links come from the thread that writes checkpoints
        if not is_main:
            return
        (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
        self._open_metrics(resume_step)
        if "wandb" in trackers:
            self.run_ids.setdefault("wandb", uuid.uuid4().hex[:8])  # ours, so that it is known even while offline
        for name in trackers:
            try:
                self._trackers[name] = TRACKERS[name](
                    self.run_dir, scrub(config), project=project, run_id=self.run_ids.get(name), resume_step=resume_step
                )
            except Exception as error:
                _say_dropped(name, error)

    def _open_metrics(self, last_step: int | None) -> None:
        cut_metrics(self.run_dir / "metrics.jsonl", last_step)
        # Line-buffered: a killed process leaves every line it logged, and at worst one torn last line.
        self._metrics = open(self.run_dir / "metrics.jsonl", "a", buffering=1, encoding="utf-8", newline="\n")  # noqa: SIM115

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, which the run goes through once more."""
        if self.is_main:
            self._metrics.close()
            self._open_metrics(step)

    def log(self, record: dict) -> None:
        """Append one record; `record["step"]` = optimizer steps done. NaN and infinity become null in the file."""
        if not self.is_main:
            return
        record = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
        self._metrics.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._send("log", record)

    def samples(self, step: int, texts: list[str]) -> None:
        """Keep generated texts: samples/step_N.md and the trackers' tables."""
        if not self.is_main:
            return
        # Four spaces make a block whatever the text holds, fences and headings included.
        blocks = ["\n".join("    " + line for line in text.splitlines()) for text in texts]
        parts = [f"## {number}\n\n{block}\n" for number, block in enumerate(blocks, 1)]
        path = self.run_dir / "samples" / f"step_{step:06d}.md"
        path.write_text(f"# Samples at step {step}\n\n" + "\n".join(parts), encoding="utf-8", newline="\n")
        self._send("samples", step, texts)

    def checkpoint_link(self, step: int, path_or_url: str | Path) -> None:
        """Note in the trackers where the checkpoint of `step` is (metadata only: nothing is uploaded)."""
        if self.is_main:
            self._send("checkpoint_link", step, scrub(str(path_or_url)))

    def status(self, state: str, step: int, exit_code: int | None = None, message: str = "") -> None:
        """Replace status.json, for whoever only sees the launcher's exit code."""
        if not self.is_main:
            return
        content = {"state": state, "step": step, "exit_code": exit_code, "message": scrub(message)}
        write_json(self.run_dir / "status.json", content)

    def close(self) -> None:
        """Finish the trackers. Calling it twice does no harm."""
        if self.is_main and not self._metrics.closed:
            self._send("close")
            self._trackers.clear()
            self._metrics.close()

    def _send(self, method: str, *arguments) -> None:
        """Call `method` of every tracker; one that raises is named once and dropped, and training goes on."""
        with self._lock:
            for name, tracker in list(self._trackers.items()):
                try:
                    getattr(tracker, method)(*arguments)
                except Exception as error:
                    del self._trackers[name]
                    _say_dropped(name, error)


class _TensorBoard:
    def __init__(self, run_dir: Path, config: dict, *, project: str, run_id: str | None, resume_step: int | None):
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        # Events of this step and later, left by the interrupted process, are hidden.
        purge = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge, flush_secs=10)
        if resume_step is None:
            self.writer.add_text("config", _code_block(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)), 0)

    def log(self, record: dict) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self.writer.add_scalar(name, value, record["step"])

    def samples(self, step: int, texts: list[str]) -> None:
        self.writer.add_text("samples", "\n\n---\n\n".join(map(_code_block, texts)), step)

    def checkpoint_link(self, step: int, location: str) -> None:
        self.writer.add_text("checkpoint", location, step)
        self.writer.flush()  # whoever resumes from this checkpoint logs only what comes after it

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run_dir: Path, config: dict, *, project: str, run_id: str | None, resume_step: int | None):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=run_id,
            resume="allow",
            config=config,
            dir=str(run_dir),
            # No login and nobody to ask, or no network: give up and train on.
            settings=wandb.Settings(login_timeout=30, init_timeout=60, finish_timeout=60),
        )
        # Our step is the x axis, not the counter of log calls: after a resume some steps are logged a second time.
        self.run.define_metric("*", step_metric="step")

    def log(self, record: dict) -> None:
        self.run.log(record)

    def samples(self, step: int, texts: list[str]) -> None:
        table = self.wandb.Table(columns=["step", "text"], data=[[step, text] for text in texts])
        self.run.log({"step": step, "samples": table})

    def checkpoint_link(self, step: int, location: str) -> None:
        metadata = {"step": step, "location": location}
        artifact = self.wandb.Artifact(f"{self.run.id}-checkpoint", type="model", metadata=metadata)
        self.run.log_artifact(artifact, aliases=[f"step-{step}"])

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WandB}


def read_metrics(run_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """(training records, evaluation records) of a run, in the order they were logged; a torn last line is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    records = [record for _, record in _whole_lines(path)] if path.is_file() else []
    return [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]


def cut_metrics(path: Path, last_step: int | None) -> None:
    """Keep the records up to and including `last_step` (None: none). Atomic; never the whole file in memory."""
    if not path.exists():
        return
    rest = path.with_name(path.name + ".tmp")
    with open(rest, "w", encoding="utf-8", newline="\n") as out:
        if last_step is not None:
            out.writelines(line for line, record in _whole_lines(path) if record["step"] <= last_step)
        out.flush()
        os.fsync(out.fileno())
    os.replace(rest, path)
    for sample in (path.parent / "samples").glob("step_*.md"):
        if last_step is None or int(re.sub(r"\D", "", sample.stem) or 0) > last_step:
            sample.unlink()


def flops_per_token(n_params_without_positions: int, n_layer: int, n_embd: int, seq_len: int) -> int:
    """FLOPs of one token's forward and backward pass: 6 per weight, and attention's 12 L H Q T.

    Source: PaLM, appendix B (Chowdhery et al. 2022), as in nanoGPT; H Q = n_embd.
    """
    return 6 * n_params_without_positions + 12 * n_layer * n_embd * seq_len


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device as torch names it, None where it is unknown (then there is no honest MFU)."""
    if re.search(r"\bMIG\b", device_name):  # a slice of a card
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(name, device_name, re.IGNORECASE)), None)


class Throughput:
    """Tokens per second over all processes, and the share of the devices' peak that makes (MFU, 0..1).

    `peak` is FLOP/s of all devices together, None if unknown. Time in `pause()` (evaluation, saving) does not count.
    """

    def __init__(self, *, flops_per_token: float, peak: float | None):
        self.flops_per_token, self.peak = flops_per_token, peak
        self.start = time.perf_counter()

    def measure(self, tokens: int, steps: int) -> dict[str, float | None]:
        """Rates since the last call, for `tokens` processed in `steps` optimizer steps."""
        now = time.perf_counter()
        seconds, self.start = max(now - self.start, 1e-9), now
        rate = tokens / seconds
        mfu = None if self.peak is None else rate * self.flops_per_token / self.peak
        return {"tokens_per_second": rate, "step_seconds": seconds / max(steps, 1), "mfu": mfu}

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - began


def _whole_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(line, record) of every line that was written whole; a process killed while writing leaves half of the last."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _code_block(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())  # TensorBoard reads markdown


def _say_dropped(name: str, error: Exception) -> None:
    text = " ".join(scrub(str(error)).split())
    print(f"{name} failed and is left out from here on ({type(error).__name__}: {text})", file=sys.stderr, flush=True)
