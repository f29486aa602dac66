"""The README.md of a published model, made from the files of its run; it claims nothing that those files do not say.

    checkpoint/{config.json, trainer_state/state.json}   run/{config.yaml, metrics.jsonl, loss.png, samples/}
        --card_files-->  README.md (card.md, filled in), .eval_results/*.yaml and, from a run,
                         loss.png, training/config.yaml, training/metrics.jsonl

A directory without a run gives a short card. Everything is scrubbed; links are not followed. Knows no network.
Source: https://huggingface.co/docs/hub/model-cards (metadata), huggingface_hub's `ModelCard`, `EvalResult` and
`EvalResultEntry`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import yaml

from gpt2repro.checkpoint.tensors import open_tensors
from gpt2repro.files import read_json_if_whole, step_in_name
from gpt2repro.options import InputError
from gpt2repro.redaction import scrub
from gpt2repro.training.metrics_log import read_metrics, whole_lines

SAMPLE_CHARACTERS = 4000  # a card shows what the model writes, it is no archive
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What is known to be English, by Hub id or by the name of our own corpora.
ENGLISH = {"HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb-edu", "Skylion007/openwebtext", "python-docs", "shakespeare"}

BENCHMARKS = {  # task -> (Hub id, title)
    "hellaswag": ("Rowan/hellaswag", "HellaSwag"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "piqa": ("ybisk/piqa", "PIQA"),
    "winogrande": ("allenai/winogrande", "WinoGrande"),
}
METRICS = {  # key in the evaluation's record -> (metric type on the Hub, name in the card, task)
    "val_loss": ("loss", "validation loss (nats per token)", None),
    "val_loss_masked": ("loss", "validation loss, documents that do not see each other (nats per token)", None),
    "perplexity": ("perplexity", "perplexity (per token)", None),
    "bits_per_byte": ("bits_per_byte", "bits per byte", None),
    "val_loss_ema": ("loss", "validation loss of the averaged weights (branch ema)", None),
    "bits_per_byte_ema": ("bits_per_byte", "bits per byte of the averaged weights (branch ema)", None),
}
for _task in BENCHMARKS:  # HellaSwag has two protocols, the others only the second
    for _end, _word, _whose in (
        ("_tokens", "tokens", "build-nanogpt's"),
        ("_chars", "characters", "lm-evaluation-harness'"),
        ("", "characters", "lm-evaluation-harness'"),
    ):
        METRICS[f"{_task}_acc{_end}"] = "acc", f"accuracy, {_whose} protocol", _task
        METRICS[f"{_task}_acc_norm{_end}"] = "acc_norm", f"accuracy normalised by {_word}, {_whose} protocol", _task


@dataclass
class Facts:
    """What is known about one checkpoint. Everything but `model` may be missing."""

    model: dict  # config.json
    step: int | None = None
    options: dict = field(default_factory=dict)  # config.yaml
    state: dict = field(default_factory=dict)  # the trainer's: environment, identity, recipes, seconds, device_seconds
    data: dict = field(default_factory=dict)  # what the trainer calls the data's identity
    manifest: dict = field(default_factory=dict)  # the data set's manifest.json, where it is at hand
    evaluation: dict = field(default_factory=dict)  # this step's record in metrics.jsonl
    losses: dict = field(default_factory=dict)  # loss/NAME of a recipe's sources, each the last until this step
    samples: str = ""
    average: dict = field(default_factory=dict)  # average.json: how averaged weights were made


@contextlib.contextmanager
def _damage_in_a_sentence():
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # what damaged YAML, JSON and text make of the code and of the template
        raise InputError(
            "the model card cannot be made: a file beside the checkpoint (config.yaml, samples, metrics.jsonl, "
            f"conformance.json) or the data's manifest.json is damaged ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); repair it, or move it away"
        ) from error


@_damage_in_a_sentence()
def card_files(
    directory: str | Path,
    *,
    repo: str,
    run_dir: str | Path | None = None,
    native: bool = False,
    license: str = "mit",
    language: str | None = None,
    cost_dollars: float | None = None,
    co2_kg: float | None = None,
) -> dict[str, bytes]:
    """Path in the repository -> content: README.md, results and, from a run, its curve, options and log to this step.

    `native` is for the branch whose files are a plain `gpt2`; `language` is spelled as on the Hub (en).

    Raises: InputError for a file of the run that cannot be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    directory, run_dir = Path(directory), None if run_dir is None else Path(run_dir)
    facts = collect(directory, run_dir)
    results = list(eval_results(facts))
    hub_data = _hub_dataset(facts)
    if language is None and {hub_data, (facts.manifest.get("source") or {}).get("corpus")} & ENGLISH:
        language = "en"
    init_from, name = str(facts.options.get("init_from") or ""), repo.split("/")[-1]
    base, _, _ = init_from.partition("@")
    emissions = {"training_type": "pre-training", "source": "stated by the publisher"}
    emissions |= {"hardware_used": _hardware(facts)} if _hardware(facts) else {}
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2repro"],
        datasets=[hub_data] if hub_data else _hub_sources(facts) or None,
        base_model=base if DATASET_ID.fullmatch(base) and not Path(init_from).exists() else None,
        model_name=name,
        eval_results=[result for result, _ in results] or None,
        co2_eq_emissions=None if co2_kg is None else {"emissions": 1000 * co2_kg, **emissions},  # the Hub wants grams
    )
    weights = directory / "model.safetensors"
    units = {"val_tokens": "validation tokens"}
    units |= {f"{task}_examples": f"{title} examples" for task, (_, title) in BENCHMARKS.items()}
    counts = [f"{facts.evaluation[key]:,} {unit}" for key, unit in units.items() if facts.evaluation.get(key)]
    options = yaml.safe_dump(facts.options, sort_keys=False, allow_unicode=True).strip() if facts.options else ""
    has_picture = run_dir is not None and _is_file(run_dir / "loss.png")
    own_words = [line.split() for line in facts.samples.splitlines() if line.startswith("    ") and line.strip()]
    fitting = " ".join(own_words[0][:4])[:40] if own_words else "Once upon a time"
    prompts = [prompt for prompt in facts.options.get("sample_prompts") or [] if prompt] or [fitting]
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("card.md")),
        name=name,
        repo=repo,
        native=native,
        init_from=init_from,
        parameters=f"{_count_parameters(weights):,}" if weights.is_file() else "",
        step=None if facts.step is None else f"{facts.step:,}",
        prompt=json.dumps(prompts[0], ensure_ascii=False),
        results=results,
        counts=" and ".join(counts),
        has_picture=has_picture,
        samples=_samples(facts),
        facts=facts,
        hardware=_hardware(facts),
        cost_dollars=cost_dollars,
        co2_kg=co2_kg,
        conformance=(read_json_if_whole((run_dir or directory) / "conformance.json") or {}).get("rows", []),
        options=options,
    )
    files = {"README.md": scrub(card.content).rstrip().encode() + b"\n"} | _result_files(facts, results)
    if has_picture:
        files["loss.png"] = (run_dir / "loss.png").read_bytes()
    if options:
        files["training/config.yaml"] = f"{options}\n".encode()
    if recipes := facts.state["recipes"]:
        content = {name: recipes[-1]["data"][name] for name in ("sources", "phases")}
        files["training/recipe.yaml"] = yaml.safe_dump(content, sort_keys=False).encode()
    if run_dir is not None and _is_file(run_dir / "metrics.jsonl"):
        files["training/metrics.jsonl"] = _log_until(run_dir / "metrics.jsonl", facts.step)
    return files


def collect(directory: Path, run_dir: Path | None) -> Facts:
    """All facts that the checkpoint and its run state."""
    facts = Facts(model=(read_json_if_whole(directory / "config.json") or {}))
    header = read_json_if_whole(directory / "trainer_state" / "state.json") or {}
    facts.state = {"environment": {}, "identity": {}, "recipes": [], **scrub(header.get("state") or {})}
    facts.average = read_json_if_whole(directory / "average.json") or {}
    facts.evaluation = (facts.average.get("validation") or {}).get("mean", {})  # of `gpt2repro average`
    facts.step = header.get("step", facts.average.get("step"))
    facts.data = facts.state["identity"].get("data") or {}
    if run_dir is None:
        return facts
    if _is_file(run_dir / "config.yaml"):
        options = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")) or {}
        facts.options = scrub(options)
        facts.manifest = read_json_if_whole(Path(str(options.get("data", ""))) / "manifest.json") or {}
    if _is_file(run_dir / "metrics.jsonl"):
        _, evaluations = read_metrics(run_dir, at_most=1)
        facts.evaluation = next((r for r in reversed(evaluations) if r["step"] == facts.step), {})
        if facts.average:  # the numbers of these weights, not of those that were trained
            ours = {name: value for name, value in facts.evaluation.items() if name.endswith(("_ema", "val_tokens"))}
            facts.evaluation = {name.removesuffix("_ema"): value for name, value in ours.items()}
        for _, record in whole_lines(run_dir / "metrics.jsonl") if facts.state["recipes"] else ():
            if facts.step is None or record["step"] <= facts.step:
                facts.losses |= {name: value for name, value in record.items() if name.startswith("loss/") and value}
    samples = sorted((run_dir / "samples").glob("step_*.md"), key=step_in_name)
    samples = [path for path in samples if _is_file(path) and (facts.step is None or step_in_name(path) <= facts.step)]
    if samples and not (run_dir / "samples").is_symlink():
        facts.samples = samples[-1].read_text(encoding="utf-8")
    return facts


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def eval_results(facts: Facts) -> Iterator[tuple]:
    """(huggingface_hub's `EvalResult`, " ± standard error" or "") of each number that was measured."""
    from huggingface_hub import EvalResult

    sources = [key for key in facts.evaluation if key.startswith("val_loss/")]
    of_sources = {key: ("loss", f"validation loss on {key[9:]} (nats per token)", None) for key in sources}
    for key, (kind, name, task) in {**METRICS, **of_sources}.items():
        value, stderr = facts.evaluation.get(key), facts.evaluation.get(f"{key}_stderr")
        if isinstance(value, (int, float)):
            dataset = _validation_set(facts)
            if task is not None:
                hub_id, title = BENCHMARKS[task]
                dataset = {"dataset_type": hub_id, "dataset_name": title, "dataset_split": "validation"}
            result = EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                metric_type=kind,
                metric_value=round(value, 5),
                metric_name=name,
                **dataset,
            )
            yield result, f" ± {stderr:.4f}" if isinstance(stderr, (int, float)) else ""


def _result_files(facts: Facts, results: list) -> dict[str, bytes]:
    """The same results as `.eval_results/*.yaml`, one file per dataset of the Hub and protocol."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list] = {}
    for result, _ in results:
        if DATASET_ID.fullmatch(result.dataset_type):
            notes = f"{result.metric_name}; measured in training, at step {facts.step}"
            entry = EvalResultEntry(result.dataset_type, result.metric_type, result.metric_value, notes=notes)
            protocol = "_build-nanogpt" * ("build-nanogpt" in result.metric_name)
            entries.setdefault(result.dataset_type.split("/")[-1] + protocol, []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False).encode()
        for name, found in entries.items()
    }


def _samples(facts: Facts) -> str:
    """The text of samples/step_N.md with each prompt apart from its continuation, and with lower headings."""
    text = facts.samples.strip()
    if len(text) > SAMPLE_CHARACTERS:
        text = text[:SAMPLE_CHARACTERS].rsplit("\n", 1)[0] + "\n\n    […]"
    for number, prompt in enumerate(facts.options.get("sample_prompts") or [], 1):
        block = "\n".join("    " + line for line in prompt.splitlines())
        apart = f"## {number}\n\nPrompt:\n\n{block}\n\nContinuation:\n\n    "
        text = text.replace(f"## {number}\n\n{block}", apart, 1) if prompt else text
    return re.sub(r"^(#+) ", r"#\1 ", re.sub(r"^# .*\n*", "", text, flags=re.M), flags=re.M).strip()


def _validation_set(facts: Facts) -> dict:
    """The fields of an EvalResult that name the text on which the losses were measured."""
    own = facts.options.get("val_data")
    name = (None if own else _hub_dataset(facts)) or Path(str(own or facts.options.get("data") or "")).name
    revision = facts.data.get("revision") or facts.data.get("sha256")
    known = {"dataset_revision": str(revision)} if revision else {}
    return {"dataset_type": name or "text", "dataset_name": name or "validation split", "dataset_split": "val", **known}


def _hub_dataset(facts: Facts) -> str | None:
    """The Hub id of the training data, where the run names one; `user/name` alone might as well be a directory."""
    source = facts.manifest.get("source") or {}
    stream = facts.data.get("source") if facts.data.get("revision") else None  # local files have no revision
    download = re.match(r"hf://(?:datasets/)?([^@]+)", str(facts.options.get("data") or ""))
    names = (source.get("dataset"), stream, download and download[1])
    return next((name for name in map(str, names) if DATASET_ID.fullmatch(name)), None)


def _hub_sources(facts: Facts) -> list[str]:
    """The Hub ids of the sources of a recipe."""
    found = [source["data"] for one in facts.state["recipes"] for source in one["data"].get("sources", {}).values()]
    names = [data.removeprefix("hf://").partition("@")[0] for data in found if data.startswith("hf://")]
    return [name for name in dict.fromkeys(names) if DATASET_ID.fullmatch(name)]


def _hardware(facts: Facts) -> str:
    environment = facts.state["environment"]
    # A CPU by its name, where the run noted it.
    if not (device := environment.get("processor") or environment.get("device")):
        return ""
    precision = {"no": "fp32"}.get(environment.get("precision"), environment.get("precision"))
    device = "CPU" if device == "cpu" else device
    return f"{environment.get('processes', 1)} x {device}" + (f", precision {precision}" if precision else "")


def _count_parameters(weights: Path) -> int:
    with open_tensors(weights) as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict


def _log_until(path: Path, step: int | None) -> bytes:
    """metrics.jsonl up to and including `step`, scrubbed: a run goes on while its checkpoint is being published."""
    kept, clean = bytearray(), set()  # names of numbers that hold no secret: a million lines have few of them
    for line, record in whole_lines(path):
        if step is None or record["step"] <= step:
            names = tuple(record) if line.count('"') == 2 * len(record) else None  # None: it holds more than numbers
            if names not in clean and (scrubbed := scrub(line)) == line and names is not None:
                clean.add(names)
            kept += (line if names in clean else scrubbed).encode()
    return bytes(kept)
