"""What a run prints: a progress bar on a terminal, plain lines in a file, and a summary."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from gpt2repro.training.machine import device_name
from gpt2repro.training.metrics_log import read_metrics

SECONDS_BETWEEN_LINES = 10


class Console:
    """Progress of `total` steps on stderr; prints nothing where `shown` is false (on all ranks but the first)."""

    def __init__(self, *, total: int, step: int, shown: bool):
        self.total, self.shown = total, shown
        self.on_terminal = sys.stderr.isatty()
        disable = not (shown and self.on_terminal)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=disable, dynamic_ncols=True, mininterval=0.5)
        self._first_step, self._began = step, time.monotonic()
        self._next_line = self._began + SECONDS_BETWEEN_LINES

    def progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that the run has reached `step`."""
        text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if not self.on_terminal and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            left = (now - self._began) / max(step - self._first_step, 1) * (self.total - step)
            self.say(f"step {step:,} of {self.total:,} | {text} | {tqdm.format_interval(left)} left")

    def back_to(self, step: int) -> None:
        """Show that the run goes on from an earlier step."""
        self.bar.n = self._first_step = step
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()


def opening(config, accelerator, source, model, checkpoint: Path | None, step: int) -> str:
    """Model, data, batch, machine and run, in five lines."""
    world, device = accelerator.num_processes, device_name(accelerator.device)
    passes = config.batch_tokens // (config.micro_batch_size * config.seq_len * world)
    per_pass = f"{config.micro_batch_size} sequences x {config.seq_len} tokens x {world} processes"
    sizes = f"{model.config.n_layer} layers, {model.config.n_head} heads, width {model.config.n_embd}"
    epochs = config.max_steps * config.batch_tokens / source.tokens_per_epoch if source.tokens_per_epoch else None
    start = f", continuing from {checkpoint} at step {step}" if checkpoint is not None else ""
    return (
        f"model    {model.num_parameters():,} parameters, {sizes}, vocabulary {model.config.vocab_size:,}\n"
        f"data     {config.data}" + (f", {epochs:.2f} epochs" if epochs else "") + "\n"
        f"batch    {config.batch_tokens:,} tokens = {per_pass} x {passes} passes\n"
        f"machine  {world} x {device}, mixed precision {accelerator.mixed_precision}\n"
        f"run      {config.run_dir}{start}"
    )


def evaluation_line(record: dict) -> str:
    """An evaluation's record in one line."""
    parts = [f"step {record['step']}"]
    if "val_loss" in record:
        parts.append(f"validation loss {record['val_loss']:.4f}")
        if record["bits_per_byte"] is not None:
            parts.append(f"{record['bits_per_byte']:.3f} bits per byte")
    others = {"val_loss_masked": "documents apart", "val_loss_ema": "averaged weights"}
    parts += [f"{said} {record[name]:.4f}" for name, said in others.items() if name in record]
    parts += [f"{name[9:]} {value:.4f}" for name, value in record.items() if name.startswith("val_loss/")]
    accuracies = {name: value for name, value in record.items() if "_acc" in name and not name.endswith("_stderr")}
    return " | ".join([*parts, *(f"{name} {value:.4f}" for name, value in accuracies.items())])


def closing(config, source, step: int) -> str:
    """The end of a run, after `step`: losses before and after, xz beside bits per byte, samples, where all of it is."""
    _, evaluations = read_metrics(config.run_dir, at_most=1)
    lines = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        untrained = first["step"] == 0 and config.init_from is None
        numbers = ["no number" if r["val_loss"] is None else f"{r['val_loss']:.4f}" for r in (first, last)]
        before = f" ({'untrained' if untrained else 'before'}: {numbers[0]})" if first["step"] == 0 else ""
        lines.append(f"validation loss  {numbers[1]} nats per token{before}")
        if last["bits_per_byte"] is not None:
            lines.append(f"bits per byte    {last['bits_per_byte']:.3f}{compressed_size(source.manifest)}")
    samples = config.run_dir / "samples" / f"step_{step:06d}.md"
    places = {
        "curve": config.run_dir / "loss.png",
        "samples": samples,
        "checkpoint": config.run_dir / "checkpoints" / "final",
    }
    lines += [f"{name:16} {path}" for name, path in places.items() if path.exists()]
    lines.append(f"talk to it       python -m gpt2repro generate --model {config.run_dir} --interactive")
    if samples.exists():
        lines = [samples.read_text(encoding="utf-8").strip(), "", *lines]
    return "\n" + "\n".join(lines)


def compressed_size(manifest: dict | None) -> str:
    """`xz -9` on the validation text, in bits per byte, where the data's manifest holds it; else ""."""
    split = manifest["splits"].get("val", {}) if manifest is not None else {}
    if "xz_bytes" not in split:
        return ""
    alone, after_training_text = (8 * split[name] / split["bytes"] for name in ("xz_bytes", "xz_bytes_given_train"))
    return f" (xz -9 on the same text: {alone:.3f}, and {after_training_text:.3f} behind the training text)"
