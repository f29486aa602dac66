"""Score a model on HellaSwag under both protocols that people quote, in one pass.

    python eval_hellaswag.py --model runs/124M --data hellaswag_val.jsonl
    python eval_hellaswag.py --model openai-community/gpt2 --data Rowan/hellaswag --out hellaswag.json
    accelerate launch --num_processes 8 eval_hellaswag.py --model runs/124M --data hellaswag_val.jsonl

Takes any causal language model of transformers. Expect about 0.2955 (build-nanogpt's acc_norm, by tokens) and 0.3114
(lm-evaluation-harness' acc_norm, by characters) for OpenAI's 124M on the 10,042 validation examples. fp32 by default,
because that is what the references run in; bf16 moves a few near-ties.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gpt2repro.models import ModelOptions
from gpt2repro.options import InputError, parse_options, run_main

AtLeastOne = Annotated[int, Field(ge=1)]


@dataclass(kw_only=True)
class Options(ModelOptions):
    data: str = "Rowan/hellaswag"
    "HellaSwag in its original .jsonl format, a directory that holds it, or a dataset of the Hub."
    split: Literal["val", "test", "train"] = "val"
    "Which examples; `test` has no labels, so it gives predictions only."
    limit: AtLeastOne | None = None
    "Only the first so many examples; none: all."
    out: Path | None = None
    "Write the accuracies, with what produced them, to this JSON file."
    predictions: Path | None = None
    "Write every example's scores and choices to this JSON-lines file."
    batch_tokens: AtLeastOne | None = None
    "Tokens per forward pass, padding included; none: 512 on a CPU, 32768 elsewhere."
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    "Precision of the weights."


def main(argv: list[str]) -> int:
    try:
        with ExitStack() as at_exit:
            return evaluate(parse_options(Options, argv, prog="eval_hellaswag.py", description=__doc__), argv, at_exit)
    except InputError:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        return 2  # the first process has said it


def evaluate(options: Options, argv: list[str], at_exit: ExitStack) -> int:
    from gpt2repro.evaluation import hellaswag  # after the options: a typing error should not wait for torch

    examples = hellaswag.read_examples(options.data, split=options.split, limit=options.limit)
    has_labels = any(example["label"] is not None for example in examples)
    if not has_labels and options.predictions is None:
        raise InputError(f"the split '{options.split}' has no labels, so there is no accuracy; give --predictions FILE")

    import torch
    from tqdm import tqdm

    rank, world, device = 0, 1, options.device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=options.device == "cpu" or not torch.cuda.is_available())
        at_exit.callback(state.destroy_process_group)
        rank, world, device = state.process_index, state.num_processes, str(state.device)
    model, tokenizer, device = options.load(device=device)
    start = time.perf_counter()
    prepared = hellaswag.prepare(examples, tokenizer, hellaswag.max_length_of(model, tokenizer))
    scores = hellaswag.score(
        model,
        prepared,
        device=device,
        batch_tokens=options.batch_tokens,
        rank=rank,
        world=world,
        progress=lambda steps: tqdm(steps, desc="HellaSwag", unit="batch", disable=rank > 0, file=sys.stderr),
    )
    seconds = time.perf_counter() - start
    if rank > 0:
        return 0

    rows = hellaswag.predictions(prepared, scores)
    results, near_ties = hellaswag.summary(rows), hellaswag.near_ties(rows)
    print(report(options, results, near_ties, prepared.truncated, len(rows), seconds))
    if options.predictions:
        lines = [json.dumps(row, allow_nan=True) for row in rows]
        write(options.predictions, "\n".join(lines) + "\n")
    if options.out:
        record = {
            "model": options.model,
            "data": options.data,
            "split": options.split,
            "examples": len(rows),
            "results": results,
            "protocols": hellaswag.PROTOCOL_NAMES,
            "published": hellaswag.PUBLISHED,
            "near_ties": near_ties,
            "truncated": prepared.truncated,
            "dtype": options.dtype,
            "device": device.type,
            "processes": world,
            "seconds": round(seconds, 2),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": ["eval_hellaswag.py", *argv],
            "torch": torch.__version__,
        }
        write(options.out, json.dumps(record, indent=2) + "\n")
    return 0


def report(
    options: Options, results: dict, near_ties: list[dict], truncated: dict[str, int], examples: int, seconds: float
) -> str:
    """The table for people: both protocols, standard errors, and the published numbers of the same protocol."""
    from gpt2repro.evaluation.hellaswag import PROTOCOL_NAMES, PUBLISHED

    lines = [f"HellaSwag, split '{options.split}', {examples:,} examples, {options.model} ({seconds:.1f} s)"]
    if not results:
        lines.append(f"no labels, so no accuracies; predictions are in {options.predictions}")
    for protocol, name in PROTOCOL_NAMES.items() if results else ():
        lines += ["", name, f"{'':10}{'this model':>18}" + "".join(f"{'GPT-2 ' + size:>13}" for size in PUBLISHED)]
        for metric in ("acc", "acc_norm"):
            value, stderr = (results[f"hellaswag_{metric}_{protocol}{suffix}"] for suffix in ("", "_stderr"))
            shown = f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
            published = (PUBLISHED[size].get(protocol, {}).get(metric) for size in PUBLISHED)
            lines.append(f"{metric:10}{shown:>18}" + "".join(f"{x:13.4f}" if x else f"{'n/a':>13}" for x in published))
    if results:
        lines += ["", "Published: OpenAI's weights on all 10,042 validation examples; n/a: not published by protocol."]
    for protocol, count in truncated.items():
        if count:
            lines.append(f"{count} examples were longer than the model's input and lost their beginning ({protocol})")
    if near_ties:
        lines.append(f"{len(near_ties)} choices are near-ties (another order of additions may turn them over):")
        lines += [
            f"  example {tie['index']} (ind {tie['ind']}), {tie['protocol']} {tie['metric']}: by {tie['margin']:.1e}"
            for tie in near_ties
        ]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None


if __name__ == "__main__":
    raise SystemExit(run_main(main))
