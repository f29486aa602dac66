"""HellaSwag examples per second: contexts shared and examples batched, against build-nanogpt's loop.

gpt2repro bench hellaswag                          # random tokens with the lengths of real examples: no download

The loop scores one example at a time as four padded rows with all their logits. Both run the same GPT-2 with random
weights in the same precision on the same examples. Both must choose the same endings; otherwise nothing is timed.

On a CPU the arithmetic takes the time: the loop needs about 2.4 times our FLOPs at 124M, and the goal is 80 % of that
ratio. On a GPU the loop mostly waits for kernels to start, and the goal is 10x.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from gpt2repro.commands.bench import baselines
from gpt2repro.commands.bench.harness import SIZES, CommonOptions, NotEqual, Record, Size
from gpt2repro.data.tokenization import gpt2_tokenizer
from gpt2repro.evaluation.hellaswag import TASK
from gpt2repro.evaluation.multiple_choice import Prepared, Rendered, grouped, render, score
from gpt2repro.models import pick_device, pick_dtype
from gpt2repro.options import AtLeastOne, parse_options

# Deciles of the lengths in GPT-2 tokens, build-nanogpt's rendering. Measured on 500 examples of the validation set.
CONTEXT_TOKENS = (9, 14, 18, 21, 24, 26, 29, 32, 36, 45, 87)
ENDING_TOKENS = (2, 7, 9, 10, 11, 13, 15, 17, 21, 30, 73)
OURS, LOOP = "gpt2repro", "build-nanogpt's loop"


@dataclass(kw_only=True)
class Options(CommonOptions):
    size: Size = "124M"
    "Model."
    data: Path | None = None
    "HellaSwag's original .jsonl (needs GPT-2's vocabulary); none: random tokens with the lengths of 500 real examples."
    examples: AtLeastOne | None = None
    "How many examples, spread over the data; none: 32 on a CPU, 500 on a GPU."
    batch_tokens: AtLeastOne | None = None
    "Tokens per forward pass of ours; none: what eval_hellaswag.py takes."
    rounds: AtLeastOne = 3
    "Measurements of each way; the two take turns."
    device: str | None = None
    "cuda, mps or cpu; none: the best one here."
    dtype: Literal["fp32", "bf16"] = "fp32"
    "Precision of the weights of both; fp32 products may run in TF32 on a GPU, as in build-nanogpt."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench hellaswag", description=__doc__)
    record = Record("hellaswag", argv, options)
    device = pick_device(options.device)
    on_gpu = device.type != "cpu"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    shape = SIZES[options.size]
    count = options.examples or (500 if on_gpu else 32)
    rendered = read_rendered(options.data, count) if options.data else random_rendered(count, shape["vocab_size"])
    model = baselines.our_gpt2(shape).eval().to(device, pick_dtype(device, options.dtype))
    prepared = Prepared(TASK, [], {"tokens": rendered}, grouped({"tokens": rendered}, 1024), {})

    def ours(**how) -> np.ndarray:
        scores = score(model, prepared, batch_tokens=options.batch_tokens, **how)["tokens"]
        return np.stack(scores)[:, :, 0]  # (examples, 4)

    def loop() -> np.ndarray:
        return np.array([score_four_rows(model, example, device) for example in rendered])

    # The warm-up as well. FLOPs of matrix products, without the few examples that `ours` scores twice as a check.
    with FlopCounterMode(display=False) as our_work:
        mine = ours(share_contexts=True)
    with FlopCounterMode(display=False) as loops_work:
        theirs = loop()
    units = np.array([example.units for example in rendered])
    check_choices(mine, theirs, units, tolerance=1e-5 if not on_gpu and options.dtype == "fp32" else 1e-2)
    ratio = loops_work.get_total_flops() / our_work.get_total_flops()
    largest = float(np.abs(mine - theirs).max())
    record.save(flops_ratio=ratio, device=device.type, dtype=options.dtype, largest_score_difference=largest)
    times = record.compare({OURS: ours, LOOP: loop}, warmup=0, units=len(rendered))
    record.save(times=times)
    what, goal = f"HellaSwag, {len(rendered)} examples", 10.0 if on_gpu else 0.8 * ratio
    record.headline(what, times, ours=OURS, baseline=LOOP, unit="examples/s", goal=goal)
    record.figure("HellaSwag, ratio of FLOPs", ratio, unit="x")
    return record.finish()


def read_rendered(path: Path, count: int) -> list[Rendered]:
    """`count` examples of a real file, evenly spread over it."""
    examples = TASK.read(path)
    chosen = [examples[i] for i in np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)]
    return render(TASK.protocols["tokens"], chosen, gpt2_tokenizer())


def random_rendered(count: int, vocab_size: int) -> list[Rendered]:
    """Random tokens with the lengths of real examples."""
    rng = np.random.default_rng(0)

    def tokens(deciles: tuple) -> list[int]:
        length = round(np.interp(rng.random(), np.linspace(0, 1, len(deciles)), deciles))
        return rng.integers(vocab_size, size=length).tolist()

    rendered = []
    for _ in range(count):
        context, endings = tokens(CONTEXT_TOKENS), [tokens(ENDING_TOKENS) for _ in range(4)]
        rendered.append(Rendered([(context, ending) for ending in endings], [len(ending) for ending in endings]))
    return rendered


def score_four_rows(model, example, device) -> list[float]:
    """build-nanogpt's evaluate() for one example: four rows, all logits; the mask picks the losses of the endings."""
    rows = [torch.tensor(context + ending) for context, ending in example.choices]
    masks = [torch.tensor([0] * len(context) + [1] * len(ending)) for context, ending in example.choices]
    tokens, mask = (pad_sequence(tensors, batch_first=True).to(device) for tensors in (rows, masks))  # (4, T)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()  # (4, T, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
    return (-losses * mask[:, 1:]).sum(dim=1).tolist()


def check_choices(mine: np.ndarray, theirs: np.ndarray, units: np.ndarray, tolerance: float) -> None:
    """Raises: NotEqual where scores differ by more than `tolerance` of themselves, or a clear choice differs."""
    difference = (np.abs(mine - theirs) / np.abs(theirs)).max()
    if not difference <= tolerance:
        raise NotEqual(f"HellaSwag scores differ from the loop's by {difference:.1e}, allowed {tolerance}")
    for divisor in (1, units):
        a, b = mine / divisor, theirs / divisor
        second, best = np.sort(b, axis=1)[:, -2:].T
        clear = best - second > 2 * tolerance * np.abs(best)
        if (a.argmax(axis=1) != b.argmax(axis=1))[clear].any():
            raise NotEqual("HellaSwag choices differ from the loop's")
