"""The README.md of a published model, made from what the run wrote down; what was not written down is not claimed.

    checkpoint/{config.json, trainer_state/state.json}   run/{config.yaml, metrics.jsonl, loss.png, samples/}
        --card_files-->  {"README.md": …, "loss.png": …, "training/config.yaml": …, "training/metrics.jsonl": …}

A directory without a run gives a short card. Knows no network.
Source: https://huggingface.co/docs/hub/model-cards (metadata), huggingface_hub's `ModelCardData` and `EvalResult`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gpt2repro.files import read_json_if_whole, step_in_name
from gpt2repro.redaction import scrub
from gpt2repro.training.metrics_log import read_metrics

LICENSE = "mit"
SAMPLE_CHARACTERS = 4000  # a card shows what the model writes, it is no archive

# Evaluation record's key -> (metric type as the Hub knows it, what it is called in the card)
LOSS_METRICS = {
    "val_loss": ("loss", "validation loss (nats per token)"),
    "perplexity": ("perplexity", "perplexity (per token)"),
    "bits_per_byte": ("bits_per_byte", "bits per byte"),
}
HELLASWAG_METRICS = {
    "hellaswag_acc_tokens": ("acc", "accuracy, build-nanogpt's protocol"),
    "hellaswag_acc_norm_tokens": ("acc_norm", "accuracy normalised by tokens, build-nanogpt's protocol"),
    "hellaswag_acc_chars": ("acc", "accuracy, lm-evaluation-harness' protocol"),
    "hellaswag_acc_norm_chars": ("acc_norm", "accuracy normalised by characters, lm-evaluation-harness' protocol"),
}


@dataclass
class Facts:
    """What is known about one checkpoint. Everything but `model` may be missing."""

    model: dict  # config.json
    parameters: int | None = None
    step: int | None = None
    options: dict = field(default_factory=dict)  # config.yaml
    environment: dict = field(default_factory=dict)  # where it ran, from the trainer's state
    data: dict = field(default_factory=dict)  # what the trainer calls the data's identity
    manifest: dict = field(default_factory=dict)  # the data set's manifest.json, where it is at hand
    seconds: float | None = None  # of training steps
    evaluation: dict = field(default_factory=dict)  # this step's record in metrics.jsonl
    samples: str = ""
    has_picture: bool = False


def card_files(
    directory: str | Path,
    *,
    repo: str,
    run_dir: str | Path | None = None,
    native: bool = False,
    license: str = LICENSE,
    cost_dollars: float | None = None,
    co2_kg: float | None = None,
) -> dict[str, bytes]:
    """Path in the repository -> content: README.md and, from a run, its curve, options, and log up to this step."""
    facts = collect(directory, run_dir)
    card = model_card(facts, repo=repo, native=native, license=license, cost_dollars=cost_dollars, co2_kg=co2_kg)
    files = {"README.md": card.encode()}
    if run_dir is not None:
        run_dir = Path(run_dir)
        if facts.has_picture:
            files["loss.png"] = (run_dir / "loss.png").read_bytes()
        if facts.options:
            files["training/config.yaml"] = yaml.safe_dump(facts.options, sort_keys=False, allow_unicode=True).encode()
        if (run_dir / "metrics.jsonl").is_file():
            files["training/metrics.jsonl"] = _log_until(run_dir / "metrics.jsonl", facts.step)
    return files


def collect(directory: str | Path, run_dir: str | Path | None = None) -> Facts:
    """Everything that the checkpoint and its run say about it."""
    directory = Path(directory)
    facts = Facts(model=(read_json_if_whole(directory / "config.json") or {}))
    weights = directory / "model.safetensors"
    if weights.is_file():
        facts.parameters = _count_parameters(weights)
    header = read_json_if_whole(directory / "trainer_state" / "state.json") or {}
    state = header.get("state") or {}
    facts.step = header.get("step")
    facts.environment = scrub(state.get("environment") or {})
    facts.data = (state.get("identity") or {}).get("data") or {}
    facts.seconds = state.get("seconds")
    if run_dir is None:
        return facts

    run_dir = Path(run_dir)
    if (run_dir / "config.yaml").is_file():
        facts.options = scrub(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")) or {})
    facts.manifest = read_json_if_whole(Path(str(facts.options.get("data", ""))) / "manifest.json") or {}
    _, evaluations = read_metrics(run_dir)
    facts.evaluation = next((r for r in reversed(evaluations) if r["step"] == facts.step), {})
    samples = sorted((run_dir / "samples").glob("step_*.md"), key=step_in_name)
    samples = [path for path in samples if facts.step is None or step_in_name(path) <= facts.step]
    if samples:
        facts.samples = samples[-1].read_text(encoding="utf-8")
    facts.has_picture = (run_dir / "loss.png").is_file()
    return facts


def model_card(
    facts: Facts,
    *,
    repo: str,
    native: bool = False,
    license: str = LICENSE,
    cost_dollars: float | None = None,
    co2_kg: float | None = None,
) -> str:
    """The card as Markdown with its YAML header. `native`: for the branch whose files are a plain `gpt2`."""
    from huggingface_hub import ModelCardData

    results = eval_results(facts)
    hub_data = _hub_dataset(facts)
    start = str(facts.options.get("init_from") or "")
    extra = {}
    if co2_kg is not None:
        hardware = _hardware(facts)
        extra["co2_eq_emissions"] = {"emissions": 1000 * co2_kg, "training_type": "pre-training"}  # the Hub wants grams
        extra["co2_eq_emissions"] |= {
            "source": "stated by the publisher",
            **({"hardware_used": hardware} if hardware else {}),
        }
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=[hub_data] if hub_data else None,
        base_model=start if re.fullmatch(r"[\w.-]+/[\w.-]+", start) and not Path(start).exists() else None,
        model_name=repo.split("/")[-1],
        eval_results=results or None,
        **extra,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        _title(facts, repo, native),
        _how_to_load(repo, native),
        _results_section(facts),
        "## Loss curve\n\n![loss, learning rate and tokens per second](loss.png)" if facts.has_picture else "",
        _samples_section(facts),
        _training_section(facts, cost_dollars, co2_kg),
        _data_section(facts),
        LIMITATIONS,
        f"## Licence\n\nThe weights and the code beside them: {license}. The training text keeps its own licence.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def eval_results(facts: Facts) -> list:
    """This checkpoint's measured results as huggingface_hub's `EvalResult`; a number that is missing is left out."""
    from huggingface_hub import EvalResult

    found = []
    for metrics, dataset in ((LOSS_METRICS, _validation_set(facts)), (HELLASWAG_METRICS, HELLASWAG)):
        for key, (kind, name) in metrics.items():
            value = facts.evaluation.get(key)
            if isinstance(value, (int, float)):
                metric = {"metric_type": kind, "metric_value": round(value, 5), "metric_name": name}
                found.append(EvalResult(task_type="text-generation", task_name="Text generation", **dataset, **metric))
    return found


HELLASWAG = {"dataset_type": "Rowan/hellaswag", "dataset_name": "HellaSwag", "dataset_split": "validation"}

LIMITATIONS = """## Limitations

A base model: it continues text. It was not tuned to follow instructions or to refuse, and it states falsehoods as
fluently as facts. It repeats the biases and the offensive language of its training text; do not put it in front of
people without measures of your own. It sees only as many tokens as its context holds, and knows nothing beyond its
data."""


def _title(facts: Facts, repo: str, native: bool) -> str:
    sizes = facts.model
    shape = f"{sizes.get('n_layer')} layers, {sizes.get('n_head')} heads, width {sizes.get('n_embd')}, "
    shape += f"context {sizes.get('n_positions')}, vocabulary {sizes.get('vocab_size')}"
    parameters = f"{facts.parameters:,} parameters: " if facts.parameters else ""
    step = f" This is step {facts.step:,}." if facts.step is not None else ""
    kind = (
        "Plain files of transformers' own `gpt2`: no remote code is needed. The branch `main` holds the same weights "
        "with gpt2repro's own class."
        if native
        else "It comes with its own class (`trust_remote_code=True`, two short files in this repository)."
    )
    return f"# {repo.split('/')[-1]}\n\nA GPT-2 trained with gpt2repro. {parameters}{shape}.{step} {kind}"


def _how_to_load(repo: str, native: bool) -> str:
    option = 'revision="native"' if native else "trust_remote_code=True"
    return f"""## How to load

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{repo}", {option})
print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```

Every kept checkpoint is a branch (`revision="step-5000"`); the branch `native`, where it exists, holds the same weights
as a plain `gpt2` for programs that run no remote code."""


def _results_section(facts: Facts) -> str:
    rows = []
    for key, (_, name) in {**LOSS_METRICS, **HELLASWAG_METRICS}.items():
        value = facts.evaluation.get(key)
        if isinstance(value, (int, float)):
            stderr = facts.evaluation.get(f"{key}_stderr")
            spread = f" ± {stderr:.4f}" if isinstance(stderr, (int, float)) else ""
            what = "HellaSwag" if key in HELLASWAG_METRICS else _validation_set(facts)["dataset_name"]
            rows.append(f"| {what} | {name} | {value:.4f}{spread} |")
    if not rows:
        return ""
    counts = [f"{facts.evaluation[key]:,} {unit}" for key, unit in COUNTS.items() if facts.evaluation.get(key)]
    measured = f"\n\nMeasured on {' and '.join(counts)}, in training, at this step." if counts else ""
    return "## Results\n\n| data | metric | value |\n|---|---|---|\n" + "\n".join(rows) + measured


COUNTS = {"val_tokens": "validation tokens", "hellaswag_examples": "HellaSwag examples"}


def _samples_section(facts: Facts) -> str:
    if not facts.samples:
        return ""
    text = facts.samples.strip()
    if len(text) > SAMPLE_CHARACTERS:
        text = text[:SAMPLE_CHARACTERS].rsplit("\n", 1)[0] + "\n\n    […]"
    lines = [re.sub(r"^(#+) ", r"##\1 ", line) for line in text.splitlines() if not line.startswith("# ")]
    return "## Samples\n\nUnselected, as the run wrote them at this step.\n\n" + "\n".join(lines).strip()


def _training_section(facts: Facts, cost_dollars: float | None, co2_kg: float | None) -> str:
    rows, environment, options = [], facts.environment, facts.options
    if hardware := _hardware(facts):
        rows.append(("hardware", hardware))
    if facts.step is not None and options.get("batch_tokens"):
        rows.append(
            (
                "tokens",
                f"{facts.step * options['batch_tokens']:,} ({facts.step:,} steps of {options['batch_tokens']:,})",
            )
        )
    if facts.seconds:
        hours = facts.seconds / 3600
        devices = environment.get("processes", 1)
        time = f"{hours:,.2f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        total = f", {hours * devices:,.2f} device hours" if devices > 1 and hours >= 1 else ""
        rows.append(("time", f"{time} of training steps{total} (evaluation not counted)"))
        price = options.get("dollars_per_gpu_hour")
        if cost_dollars is None and price and environment.get("device", "cpu") not in ("cpu", "mps"):
            rows.append(
                (
                    "cost",
                    f"${hours * devices * price:,.2f} at the ${price:,.2f} per GPU hour that the run was planned with",
                )
            )
    if cost_dollars is not None:
        rows.append(("cost", f"${cost_dollars:,.2f}, stated by the publisher"))
    if rows or co2_kg is not None:
        carbon = "not measured" if co2_kg is None else f"{co2_kg:,.3f} kg CO2 equivalents, stated by the publisher"
        rows.append(("carbon", carbon))
    if versions := environment.get("versions"):
        rows.append(("software", ", ".join(f"{name} {version}" for name, version in versions.items())))
    parts = []
    if rows:
        parts.append("| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows))
    if command := environment.get("command"):
        parts.append(f"The command:\n\n```\n{command}\n```")
    if options:
        resolved = yaml.safe_dump(options, sort_keys=False, allow_unicode=True).strip()
        parts.append(f"All options, resolved (itself a `--config`):\n\n```yaml\n{resolved}\n```")
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _data_section(facts: Facts) -> str:
    rows = []
    if facts.options.get("data"):
        rows.append(("given as", f"`{facts.options['data']}`"))
    identity, manifest = facts.data, facts.manifest
    for name in ("source", "config", "revision"):
        if identity.get(name):
            rows.append((name, f"`{identity[name]}`"))
    if identity.get("sha256"):
        rows.append(("sha256 of its manifest", f"`{identity['sha256']}`"))
    for name, value in (manifest.get("source") or {}).items():
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            rows.append((f"source: {name}", f"`{str(value)[:200]}`"))
    for name, split in (manifest.get("splits") or {}).items():
        rows.append(
            (name, ", ".join(f"{split[unit]:,} {unit}" for unit in ("tokens", "documents", "bytes") if split.get(unit)))
        )
    if tokenizer := manifest.get("tokenizer"):
        rows.append(("tokenizer", f"{tokenizer.get('kind')}, {tokenizer.get('vocab_size'):,} entries"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Data\n\n| | |\n|---|---|\n{table}" if rows else ""


def _validation_set(facts: Facts) -> dict:
    """The fields of an EvalResult that name the text on which the losses were measured."""
    own = facts.options.get("val_data")
    name = None if own else _hub_dataset(facts)
    name = name or Path(str(own or facts.options.get("data") or "")).name
    revision = (facts.data or {}).get("revision") or (facts.data or {}).get("sha256")
    known = {"dataset_revision": str(revision)} if revision else {}
    return {"dataset_type": name or "text", "dataset_name": name or "validation split", "dataset_split": "val", **known}


def _hub_dataset(facts: Facts) -> str | None:
    """The Hub id of the training data, where the run names one; `user/name` alone might as well be a directory."""
    source = facts.manifest.get("source") or {}
    stream = facts.data.get("source") if facts.data.get("revision") else None  # local files have no revision
    download = re.match(r"hf://(?:datasets/)?([^@]+)", str(facts.options.get("data") or ""))
    for name in (source.get("dataset"), stream, download and download[1]):
        if name and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)):
            return str(name)
    return None


def _hardware(facts: Facts) -> str:
    environment = facts.environment
    if not environment.get("device"):
        return ""
    device = "CPU" if environment["device"] == "cpu" else environment["device"]
    precision = {"no": "fp32"}.get(environment.get("precision"), environment.get("precision"))
    return f"{environment.get('processes', 1)} x {device}" + (f", precision {precision}" if precision else "")


def _count_parameters(weights: Path) -> int:
    from math import prod

    from safetensors import safe_open

    with safe_open(weights, framework="np") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict


def _log_until(path: Path, step: int | None) -> bytes:
    """metrics.jsonl up to and including `step`: a run goes on while its checkpoint is being published."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # a torn last line
            continue
        if step is None or record_step <= step:
            kept.append(line)
    return b"".join(kept)
