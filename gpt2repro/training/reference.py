"""Is my curve normal? Reference curves this project produced itself, published milestones, and a live comparison.

A reference curve belongs to one text and one recipe: it is found by the sha256 of the data set's manifest and by every
setting that decides the curve (the documentation that ships with Python differs between Python versions, so the same
preset has one curve per text). Where no curve fits, the field's published numbers are named if tokenizer and data are
theirs; where these don't fit either, nothing is said. The curves are JSON files in `gpt2repro/references/`:

    python -c "from gpt2repro import reference; print(reference.record('runs/quickstart', name='quickstart'))"

makes one from a finished run. Knows runs by their files only; no model, no training loop.
"""

import importlib.metadata
import json
import math
import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from gpt2repro.options import InputError

DIRECTORY = Path(__file__).parents[1] / "references"

# What decides the loss curve, beside the data. Not the seed: curves of different seeds stay within CLOSE of each other.
RECIPE = (
    "n_layer", "n_head", "n_embd", "n_inner", "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "seq_len", "batch_tokens", "optimizer", "lr", "min_lr", "warmup_steps", "max_steps", "weight_decay", "beta1",
    "beta2", "eps", "muon_lr_scale", "grad_clip", "init_from", "val_tokens",
)  # fmt: skip

CLOSE = 0.02  # nats: what another seed or another precision may move
OFF = 0.1  # nats: more than that has a cause

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
    curve: list[tuple[int, float]]
    made: dict  # command, commit, date, versions, machine

    def at(self, step: int) -> float | None:
        """The curve at `step`, straight between its points; None beyond them."""
        for (left, a), (right, b) in zip(self.curve, self.curve[1:], strict=False):
            if left <= step <= right:
                return a + (b - a) * (step - left) / (right - left)
        return None


def load_references(directory: Path = DIRECTORY) -> list[Reference]:
    references = []
    for path in sorted(directory.glob("*.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["curve"] = [(step, loss) for step, loss in fields["curve"]]
        references.append(Reference(**fields))
    return references


class Referee:
    """Compares a run's validation losses with the reference of its data and recipe, one evaluation at a time.

    config: the run's options as a flat dict. manifest: the data set's manifest (a dict with `.sha256`), None where the
    data has none; then there is nothing to compare with, and `comment` stays silent.
    """

    def __init__(self, config: dict, manifest, *, references: list[Reference] | None = None):
        sha256 = getattr(manifest, "sha256", None)
        recipe = recipe_of(config)
        known = load_references() if references is None else references
        self.reference = next((r for r in known if r.manifest_sha256 == sha256 and r.recipe == recipe), None)
        self.warmup_steps = config.get("warmup_steps") or 0
        self.milestones = milestones_for(manifest) if manifest is not None else ()
        self._passed: set[str] = set()

    def comment(self, step: int, val_loss: float) -> str | None:
        """A sentence about `val_loss` after `step` optimizer steps, or None where there is nothing to say."""
        if not math.isfinite(val_loss):
            return None  # the health monitor's business
        expected = self.reference.at(step) if self.reference else None
        if expected is not None:
            return self._against_reference(step, val_loss, expected)
        return self._against_milestones(step, val_loss)

    def _against_reference(self, step: int, val_loss: float, expected: float) -> str:
        difference = val_loss - expected
        name = f"the reference '{self.reference.name}' ({expected:.4f})"
        if abs(difference) <= CLOSE:
            return f"within {CLOSE} of {name} at step {step}"
        side = "above" if difference > 0 else "below"
        text = f"{abs(difference):.3f} {side} {name} at step {step}"
        if abs(difference) <= OFF:
            return text
        return f"warning: the curve is off, {text}. Usual causes: {usual_causes(step, difference, self.warmup_steps)}"

    def _against_milestones(self, step: int, val_loss: float) -> str | None:
        reached = [entry for entry in self.milestones if val_loss <= entry[1] and entry[0] not in self._passed]
        if not reached:
            return None
        self._passed.update(entry[0] for entry in reached)
        passed = ", ".join(f"{who} ({loss}, {source})" for who, loss, source in reached)
        return f"at or below {passed} at step {step}, if this is the same validation text"


def usual_causes(step: int, difference: float, warmup_steps: int) -> str:
    """What usually moves a whole curve, by where it is off."""
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
    """The part of a run's options that decides its curve; numbers compare as numbers, however they were written."""
    return {name: float(v) if isinstance(v := config.get(name), (int, float)) else v for name in RECIPE}


def record(run_dir: str | Path, *, name: str, data: str | Path | None = None, directory: Path = DIRECTORY) -> Path:
    """Write the reference curve of a finished run as `directory/NAME-<first of the sha256>.json`.

    data: the data set's directory, if it is no longer where the run's config.yaml says. Raises InputError.
    """
    import yaml

    from gpt2repro.data.shards import load_manifest
    from gpt2repro.training.metrics_log import read_metrics

    run_dir = Path(run_dir)
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{run_dir} is no run: it has no config.yaml") from None
    manifest = load_manifest(data or config["data"])
    _, evaluations = read_metrics(run_dir)
    curve = [(entry["step"], round(entry["val_loss"], 4)) for entry in evaluations if "val_loss" in entry]
    if not curve or curve[-1][0] < config["max_steps"]:
        raise InputError(f"{run_dir} has not evaluated its last step, {config['max_steps']}; finish the run first")
    reference = {
        "name": name,
        "manifest_sha256": manifest.sha256,
        "recipe": recipe_of(config),
        "curve": curve,
        "made": {
            "command": f"python train_accelerate.py --config {run_dir.as_posix()}/config.yaml",
            "commit": _commit(),
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "machine": f"{platform.system()} {platform.machine()}",
        },
    }
    path = directory / f"{name}-{manifest.sha256[:8]}.json"
    path.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        shown = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return shown.stdout.strip() or "unknown"
