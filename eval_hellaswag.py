"""Score a model on HellaSwag under both protocols that people quote, in one pass; and on further tasks.

    python eval_hellaswag.py --model runs/124M --data hellaswag_val.jsonl
    python eval_hellaswag.py --model openai-community/gpt2 --data Rowan/hellaswag --out hellaswag.json
    python eval_hellaswag.py --model runs/124M --task hellaswag arc_easy=arc.jsonl piqa winogrande lambada
    accelerate launch --num_processes 8 eval_hellaswag.py --model runs/124M --data hellaswag_val.jsonl

Takes any causal language model of transformers. Expect about 0.2955 (build-nanogpt's acc_norm, by tokens) and 0.3114
(lm-evaluation-harness' acc_norm, by characters) for OpenAI's 124M on the 10,042 validation examples. fp32 by default,
because that is what the references run in; bf16 moves a few near-ties.
"""

import atexit
import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Literal

from gpt2repro.files import check_outputs, write_output
from gpt2repro.models import ModelOptions
from gpt2repro.options import AtLeastOne, InputError, Problems, parse_options, run_main

SIZES = ("124M", "350M", "774M", "1558M")
SUBSETS = ("clean", "dirty")  # examples without and with 13 words in a row in the training text


@dataclass(kw_only=True)
class Options(ModelOptions):
    task: list[str] = field(default_factory=lambda: ["hellaswag"])
    "hellaswag, arc_easy, piqa, winogrande, lambada; NAME=FILE says where a task's examples lie."
    data: str | None = None
    "Of one task: a .jsonl file, a directory that holds it, or a dataset of the Hub; none: the task's own on the Hub."
    split: Literal["val", "test", "train"] | None = None
    "Which examples; none: those that published numbers are about. Without labels there are predictions only."
    limit: AtLeastOne | None = None
    "Only the first so many examples of each task; none: all."
    contamination: Path | None = None
    "A data set, or its manifest.json, made with --decontaminate: also scores the clean and the dirty examples apart."
    out: Path | None = None
    "Write the accuracies, with what produced them, to this JSON file."
    predictions: Path | None = None
    "Write every example's scores and choices to this JSON-lines file."
    batch_tokens: AtLeastOne | None = None
    "Tokens per forward pass, padding included; none: 512 on a CPU, 32768 elsewhere."
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    "Precision of the weights."

    def problems(self) -> Problems:
        if not self.task:
            yield "--task needs a name"
        elif self.data is not None and (len(self.task) > 1 or "=" in self.task[0]):
            yield "--data belongs to a single --task; of several each can be given as --task NAME=FILE"


def main(argv: list[str]) -> int:
    try:
        return evaluate(parse_options(Options, argv, prog="eval_hellaswag.py", description=__doc__), argv)
    except InputError:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        return 2  # the first process prints the message


def evaluate(options: Options, argv: list[str]) -> int:
    named = [task.partition("=")[2] for task in options.task]
    check_outputs(options.out, options.predictions, read=[options.data, options.contamination, *named])
    from gpt2repro.data.decontamination import contaminated_examples
    from gpt2repro.evaluation.losses import max_length_of  # after the options: a typing error should not wait for torch
    from gpt2repro.evaluation.multiple_choice import score
    from gpt2repro.evaluation.tasks import parse_specs

    tasks = []  # (task, where its examples lie, split, examples, dirty ones), all read before a model is loaded
    for task, data in parse_specs(options.task):
        data, split = data or options.data or task.dataset, options.split or task.split
        examples, dirty = task.read(data, split=split), None
        if options.contamination is not None:
            dirty = contaminated_examples(options.contamination, task.name, task.texts(examples))
        examples = examples[: options.limit]
        if options.predictions is None and all(example["label"] is None for example in examples):
            raise InputError(f"the split '{split}' has no labels, so there is no accuracy; give --predictions FILE")
        tasks.append((task, data, split, examples, dirty))

    import torch
    from tqdm import tqdm

    rank, world, device = 0, 1, options.device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=options.device == "cpu" or not torch.cuda.is_available())
        atexit.register(state.destroy_process_group)
        rank, world, device = state.process_index, state.num_processes, str(state.device)
    model, tokenizer, device = options.load(device=device)
    bar = partial(tqdm, unit="batch", disable=rank > 0, file=sys.stderr)
    records, lines = [], []
    for task, data, split, examples, dirty in tasks:
        start = time.perf_counter()
        prepared = task.prepare(examples, tokenizer, max_length_of(model, tokenizer))
        scores = score(model, prepared, batch_tokens=options.batch_tokens, progress=partial(bar, desc=task.title))
        rows = task.predictions(prepared, scores)
        lines += [json.dumps({"task": task.name, **row} if len(tasks) > 1 else row) for row in rows]
        record = {"task": task.name, "data": data, "split": split, "examples": len(rows)}
        record |= {"results": task.summary(rows), "published": task.published, "near_ties": task.near_ties(rows)}
        if dirty is not None:
            parts = {name: [row for row in rows if (row["index"] in dirty) == (name == "dirty")] for name in SUBSETS}
            record["contamination"] = {name: task.summary(part) if part else {} for name, part in parts.items()}
        record["protocols"] = {name: protocol.name for name, protocol in task.protocols.items()}
        record |= {"truncated": prepared.truncated, "seconds": round(time.perf_counter() - start, 2)}
        records.append(record)
        if rank == 0:
            print(report(options, task, record), end="\n\n" if len(records) < len(tasks) else "\n")
    if rank > 0:
        return 0
    if options.predictions:
        write_output(options.predictions, "\n".join(lines) + "\n")
    if options.out:
        # one task: its record; several: {"tasks": {name: record}}
        found = records[0] if len(records) == 1 else {"tasks": {record["task"]: record for record in records}}
        found = {"model": options.model, **found, "dtype": options.dtype, "device": device.type, "processes": world}
        found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        found |= {"command": ["eval_hellaswag.py", *argv], "torch": torch.__version__}
        write_output(options.out, json.dumps(found, indent=2) + "\n")
    return 0


def report(options: Options, task, record: dict) -> str:
    """The table for people: every protocol, standard errors, and the published numbers of the same protocol."""
    results, near_ties = record["results"], record["near_ties"]
    about = f"split '{record['split']}', {record['examples']:,} examples, {options.model} ({record['seconds']:.1f} s)"
    lines = [f"{task.title}, {about}"]
    if not results:
        lines.append(f"no labels, so no accuracies; predictions are in {options.predictions}")
    columns = {"this model": results, **record.get("contamination", {})}
    for protocol, name in record["protocols"].items() if results else ():
        head = "".join(f"{column:>18}" for column in columns)
        lines += ["", name, f"{'':10}{head}" + "".join(f"{'GPT-2 ' + size:>13}" for size in SIZES)]
        for metric in task.metrics:
            key = task.metric_name(metric, protocol)
            shown = "".join(f"{_with_error(column, key):>18}" for column in columns.values())
            published = (task.published.get(size, {}).get(protocol, {}).get(metric) for size in SIZES)
            lines.append(f"{metric:10}{shown}" + "".join(f"{x:13.4f}" if x else f"{'n/a':>13}" for x in published))
    if results and "contamination" in record:
        counts = (columns[name].get(f"{task.name}_examples", 0) for name in SUBSETS)
        lines += ["", "{:,} examples are clean, {:,} dirty, by {}".format(*counts, options.contamination)]
    if results and task.source:
        lines += ["", f"Published: {task.source}"]
    for protocol, count in record["truncated"].items():
        if count:
            lines.append(f"{count} examples were longer than the model's input and lost their beginning ({protocol})")
    if near_ties:
        lines.append(f"{len(near_ties)} choices are near-ties (another order of additions may turn them over):")
        for tie in near_ties:
            ind = "" if tie["ind"] is None else f" (ind {tie['ind']})"
            lines.append(f"  example {tie['index']}{ind}, {tie['protocol']} {tie['metric']}: by {tie['margin']:.1e}")
    return "\n".join(lines)


def _with_error(results: dict, key: str) -> str:
    if key not in results:
        return "n/a"
    stderr = results.get(f"{key}_stderr")
    return f"{results[key]:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
