"""Is my curve normal? Reference curves of this project, published milestones, and a comparison while a run trains.

A reference curve belongs to one text and one recipe: the sha256 of the data set's manifest and every setting that
decides the curve find it. (Python's documentation differs between Python versions, so the same preset has one curve per
text.) Where no curve fits, `comment` names the published numbers for this tokenizer and data; where there are none, it
says nothing. The curves are JSON files in `gpt2repro/references/`. A finished run makes one:

    python -c "from gpt2repro.training import reference as r; print(r.record('runs/quickstart', name='quickstart'))"

Knows runs by their files only; no model, no training loop.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from gpt2repro.data.shards import load_manifest
from gpt2repro.files import write_json
from gpt2repro.training.metrics_log import finished_run

DIRECTORY = Path(__file__).parents[1] / "references"

# What decides the loss curve, beside the data. Not the seed: curves of different seeds stay within CLOSE of each other.
RECIPE = (
    "n_layer", "n_head", "n_embd", "n_inner", "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "seq_len", "batch_tokens", "optimizer", "lr", "min_lr", "warmup_steps", "max_steps", "weight_decay", "beta1",
    "beta2", "eps", "muon_lr_scale", "grad_clip", "init_from", "val_tokens", "schedule", "cooldown_steps", "zero_init",
    "cautious_decay", "documents", "recut_windows",
)  # fmt: skip

CLOSE = 0.02  # nats: another seed or precision may move a curve by so much
OFF = 0.1  # nats: a larger difference has a cause

# Validation loss over the first 10,485,760 predictions (see evaluation/losses.py) of models with GPT-2's tokenizer.
MILESTONES = {
    "HuggingFaceFW/fineweb": (
        ("OpenAI's 124M", 3.425, "llm.c"),
        ("the speed-run target", 3.28, "modded-nanogpt"),
        ("llm.c's 124M on 10B tokens", 3.2722, "llm.c"),
    ),
    "HuggingFaceFW/fineweb-edu": (("OpenAI's 124M", 3.2924, "build-nanogpt"),),
}


@dataclass(frozen=True)
class Reference:
    """One curve: (steps done, validation loss), ascending, and what made it."""

    name: str
    manifest_sha256: str
    recipe: dict
    curve: list  # of [step, loss]
    made: dict  # command, commit, date, versions, machine

    def at(self, step: int) -> float | None:
        """The curve at `step`, straight between its points; None beyond them."""
        for (left, a), (right, b) in zip(self.curve, self.curve[1:], strict=False):
            if left <= step <= right:
                return a + (b - a) * (step - left) / (right - left)
        return None


def load_references(directory: Path = DIRECTORY) -> list[Reference]:
    return [Reference(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(directory.glob("*.json"))]


class Referee:
    """Compares a run's validation losses with the reference of its data and recipe, one evaluation at a time.

    `config` is the run's options as a flat dict. `manifest` is the data set's manifest (a dict with `.sha256`), None
    where the data has none; then `comment` has nothing to compare with and returns None.
    """

    def __init__(self, config: dict, manifest, *, references: list[Reference] | None = None):
        sha256 = getattr(manifest, "sha256", None)
        recipe = recipe_of(config)
        known = load_references() if references is None else references
        self.reference = next((r for r in known if r.manifest_sha256 == sha256 and r.recipe == recipe), None)
        self.warmup_steps = config.get("warmup_steps") or 0
        self.milestones = milestones_for(manifest) if manifest is not None else ()
        self._passed: set[tuple] = set()  # milestones

    def comment(self, step: int, val_loss: float) -> str | None:
        """A sentence about `val_loss` after `step` optimizer steps, or None where there is nothing to say."""
        if not math.isfinite(val_loss):
            return None  # the health monitor reports it
        expected = self.reference.at(step) if self.reference else None
        if expected is None:
            reached = [entry for entry in self.milestones if val_loss <= entry[1] and entry not in self._passed]
            self._passed.update(reached)
            passed = ", ".join(f"{who} ({loss}, {source})" for who, loss, source in reached)
            return f"at or below {passed} at step {step}, if this is the same validation text" if reached else None
        difference = val_loss - expected
        name = f"the reference '{self.reference.name}' ({expected:.4f})"
        if abs(difference) <= CLOSE:
            return f"within {CLOSE} of {name} at step {step}"
        text = f"{abs(difference):.3f} {'above' if difference > 0 else 'below'} {name} at step {step}"
        if abs(difference) <= OFF:
            return text
        return f"warning: the curve is off, {text}. Usual causes: {usual_causes(step, difference, self.warmup_steps)}"


def usual_causes(step: int, difference: float, warmup_steps: int) -> str:
    """The usual causes of a curve that is off, by the step and the side where it is off."""
    if step == 0:
        return (
            "initial weights (a fresh model starts near ln(vocabulary size)), another tokenizer, labels shifted twice"
        )
    if difference < 0:
        return "validation text that is also in the training text, targets that are not shifted, another validation set"
    if step <= warmup_steps:
        return "a learning rate stepped once per process or per micro-batch, gradients not averaged over micro-batches"
    return (
        "another lr or batch_tokens than the preset's in effect, unshuffled data, weight decay on biases and layer "
        "norms, missing gradient clipping, half precision without autocast"
    )


def milestones_for(manifest) -> tuple:
    """Published losses on this data set's validation split; none unless the tokens are GPT-2's."""
    if manifest["tokenizer"].get("kind") != "gpt2":
        return ()
    source = json.dumps(manifest.get("source"))
    return next((losses for name, losses in MILESTONES.items() if f'"{name}"' in source), ())


def recipe_of(config: dict) -> dict:
    """The options that decide a run's curve; numbers become floats, so that 500 and 500.0 are equal."""
    return {name: float(v) if isinstance(v := config.get(name), (int, float)) else v for name in RECIPE}


def record(run_dir: str | Path, *, name: str, directory: Path = DIRECTORY) -> Path:
    """Write the reference curve of a finished run as `directory/NAME-<start of the sha256>.json`.

    Raises: InputError as `finished_run` does.
    """
    config, evaluations = finished_run(run_dir)
    manifest = load_manifest(config["data"])
    reference = {
        "name": name,
        "manifest_sha256": manifest.sha256,
        "recipe": recipe_of(config),
        "curve": [(entry["step"], round(entry["val_loss"], 4)) for entry in evaluations],
        "made": {
            "command": f"python train_accelerate.py --config {Path(run_dir).as_posix()}/config.yaml",
            "commit": commit(),
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "machine": f"{platform.system()} {platform.machine()}",
        },
    }
    path = directory / f"{name}-{manifest.sha256[:8]}.json"
    write_json(path, reference)
    return path


def commit() -> str:
    """The checkout's commit, `+changes` where files differ from it; without git GPT2REPRO_COMMIT, else `unknown`."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        found = ""
    return found or os.environ.get("GPT2REPRO_COMMIT", "unknown")
