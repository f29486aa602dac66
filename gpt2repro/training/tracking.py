"""The log of a run: metrics.jsonl, samples, status.json, and the same records in trackers.

    record -> metrics.jsonl        the truth: one JSON object per line, cut back to the checkpoint's step on resume
           -> TensorBoard, W&B, Trackio   by accelerate.tracking; a tracker that fails is named and dropped

Owns the files named above. Knows no model, data or checkpoint, and no metric by name but `step`.
"""

import contextlib
import json
import math
import threading
import uuid
from pathlib import Path

import yaml
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from gpt2repro.files import write_json
from gpt2repro.options import say
from gpt2repro.redaction import scrub
from gpt2repro.training.metrics_log import cut_metrics


class RunLog:
    """The log of one run. Every process may build and call it; only the main one writes.

    The trackers show `config` without secrets. `run_ids` are the trackers' names of the run, which its checkpoints
    keep: a resumed W&B run is the same run. `resume_step` is the step of the checkpoint that the run continues from,
    None for a run from the start: later records are dropped, and the run logs them again. A branch of another run
    `begins` at the step of its parent's checkpoint.
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
        begins: int = 0,
    ):
        self.run_dir = Path(run_dir)
        self.is_main, self._begins = is_main, begins
        self.run_ids = dict(run_ids or {})
        self._trackers: dict = {}
        self._lock = threading.Lock()  # checkpoint links come from the thread that writes checkpoints
        if not is_main:
            return
        (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
        self._open_metrics(resume_step)
        for name in {"wandb", "trackio"}.intersection(trackers):
            self.run_ids.setdefault(name, uuid.uuid4().hex[:8])  # ours, so that it is known even while offline
        shown = {"config": scrub(config), "project": project, "resume_step": resume_step}
        for name in trackers:
            try:
                self._trackers[name] = _open_tracker(name, self.run_dir, run_id=self.run_ids.get(name), **shown)
            except Exception as error:
                _say_dropped(name, error)

    def _open_metrics(self, last_step: int | None) -> None:
        for first, last in cut_metrics(self.run_dir / "metrics.jsonl", last_step, self._begins):
            say(f"warning: metrics.jsonl has lost the steps {first} to {last}")
        # Line-buffered: a killed process leaves every line it logged, and at worst one torn last line.
        self._metrics = open(self.run_dir / "metrics.jsonl", "a", buffering=1, encoding="utf-8", newline="\n")  # noqa: SIM115

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: the run makes these steps again."""
        if self.is_main:
            self._metrics.close()
            self._open_metrics(step)

    def log(self, record: dict) -> None:
        """Append one record; `record["step"]` = optimizer steps done. NaN and infinity become null in the file."""
        if not self.is_main:
            return
        record = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
        nulls = {name: None for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
        self._metrics.write(json.dumps(record | nulls, ensure_ascii=False, allow_nan=False) + "\n")
        self._send("log", record)

    def samples(self, step: int, texts: list[str]) -> None:
        """Keep generated texts: samples/step_N.md and the trackers' tables."""
        if not self.is_main:
            return
        parts = [f"## {number}\n\n{_code_block(text)}\n" for number, text in enumerate(texts, 1)]
        path = self.run_dir / "samples" / f"step_{step:06d}.md"
        path.write_text(f"# Samples at step {step}\n\n" + "\n".join(parts), encoding="utf-8", newline="\n")
        self._send("samples", step, texts)

    def checkpoint_link(self, step: int, path_or_url: str) -> None:
        """Note in the trackers where the checkpoint of `step` is (metadata only: nothing is uploaded)."""
        if self.is_main:
            self._send("checkpoint_link", step, scrub(path_or_url))

    def status(self, state: str, step: int, exit_code: int | None = None, message: str = "") -> None:
        """Replace status.json, since launchers hide the exit code."""
        if self.is_main:
            write_json(self.run_dir / "status.json", _status(state, step, exit_code, message))

    def failed(self, step: int, exit_code: int, message: str) -> None:
        """Replace status.json from any process that has failed, and also where the disk is full."""
        content, path = _status("failed", step, exit_code, message), self.run_dir / "status.json"
        with contextlib.suppress(OSError):
            try:
                write_json(path, content)
            except OSError:  # no room for a second file: overwrite the first
                path.write_text(json.dumps(content), encoding="utf-8")

    def close(self) -> None:
        """Finish the trackers; a second call does nothing."""
        if self.is_main and not self._metrics.closed:
            self._send("finish")
            self._trackers.clear()
            with contextlib.suppress(OSError):  # every line was written when it was logged, or has ended the run
                self._metrics.close()

    def _send(self, method: str, *arguments) -> None:
        """Call `method` of every tracker; a tracker that raises is named once and dropped, and training goes on."""
        with self._lock:
            for name, tracker in list(self._trackers.items()):
                try:
                    getattr(tracker, method)(*arguments)
                except Exception as error:
                    del self._trackers[name]
                    _say_dropped(name, error)


class _TensorBoard(TensorBoardTracker):
    """Accelerate's tracker with scalars alone as scalars, and texts as code blocks."""

    def log(self, record: dict) -> None:
        numbers = {name: value for name, value in record.items() if type(value) in (int, float) and name != "step"}
        super().log(numbers, step=record["step"])

    def samples(self, step: int, texts: list[str]) -> None:
        super().log({"samples": "\n\n---\n\n".join(map(_code_block, texts))}, step=step)

    def checkpoint_link(self, step: int, location: str) -> None:
        super().log({"checkpoint": location}, step=step)  # and flushes: a resume from here logs what comes after it


class _WandB(WandBTracker):
    """Accelerate's tracker with our step as the x axis: the counter of log calls would count resumed steps twice."""

    def start(self) -> None:
        super().start()
        self.run.define_metric("*", step_metric="step")

    def samples(self, step: int, texts: list[str]) -> None:
        import wandb

        table = wandb.Table(columns=["step", "text"], data=[[step, text] for text in texts])
        self.run.log({"step": step, "samples": table})

    def checkpoint_link(self, step: int, location: str) -> None:
        import wandb

        metadata = {"step": step, "location": location}
        artifact = wandb.Artifact(f"{self.run.id}-checkpoint", type="model", metadata=metadata)
        self.run.log_artifact(artifact, aliases=[f"step-{step}"])


class _Trackio(TrackioTracker):
    """Accelerate's tracker; look at the runs with `trackio show`."""

    def log(self, record: dict) -> None:
        super().log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def samples(self, step: int, texts: list[str]) -> None:
        super().log({f"sample {number}": text for number, text in enumerate(texts, 1)}, step=step)

    def checkpoint_link(self, step: int, location: str) -> None:
        super().log({"checkpoint": location}, step=step)


def _open_tracker(name: str, run_dir: Path, *, config: dict, project: str, run_id: str | None, resume_step: int | None):
    """Accelerate's tracker of this name, started; a resumed run continues where its checkpoint was."""
    run_name = run_dir.resolve().name
    if name == "tensorboard":
        # Events of this step and later, left by the interrupted process, are hidden.
        purge = None if resume_step is None else resume_step + 1
        tracker = _TensorBoard("tensorboard", str(run_dir), purge_step=purge)
    elif name == "wandb":
        import wandb

        # Without a login or a network: give up and train on.
        settings = wandb.Settings(login_timeout=30, init_timeout=60, finish_timeout=60)
        how = {"dir": str(run_dir), "settings": settings, "resume": "allow", "config": config}
        tracker = _WandB(project, name=run_name, id=run_id, **how)
    else:
        tracker = _Trackio(project, name=f"{run_name}-{run_id}", resume="allow", config=config, embed=False)
    tracker.start()
    if name == "tensorboard" and (resume_step is None or "recipes" in config):  # a recipe may have changed
        text = _code_block(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        tracker.tracker.add_text("config", text, resume_step or 0)
    return tracker


def _status(state: str, step: int, exit_code: int | None, message: str) -> dict:
    return {"state": state, "step": step, "exit_code": exit_code, "message": scrub(message)}


def _code_block(text: str) -> str:
    """Markdown, also TensorBoard's: four spaces make a block of any text, with fences and headings in it."""
    return "\n".join("    " + line for line in text.splitlines())


def _say_dropped(name: str, error: Exception) -> None:
    text = " ".join(scrub(str(error)).split())
    say(f"{name} failed and is left out from here on ({type(error).__name__}: {text})")
