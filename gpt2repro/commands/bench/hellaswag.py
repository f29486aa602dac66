"""HellaSwag examples per second: contexts shared and examples batched, against build-nanogpt's loop.

The loop scores one example at a time as four padded rows with all their logits. Both run the same GPT-2 with random
weights in the same precision on the same examples, and must give the same predictions, or nothing is timed.

On a CPU arithmetic is everything, so the goal is 80 % of the ratio of both ways' FLOPs (about 2.4 at 124M); on a GPU
the loop mostly waits for kernels to start, and the goal is 10x.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from gpt2repro.commands.bench import harness
from gpt2repro.options import parse_options

AtLeastOne = Annotated[int, Field(ge=1)]

# Deciles of the lengths in GPT-2 tokens, build-nanogpt's rendering. Measured on 500 examples of the validation set.
CONTEXT_TOKENS = (9, 14, 18, 21, 24, 26, 29, 32, 36, 45, 87)
ENDING_TOKENS = (2, 7, 9, 10, 11, 13, 15, 17, 21, 30, 73)
BASELINE = "build-nanogpt's loop"


@dataclass
class Options:
    n_layer: AtLeastOne = 12
    "Transformer blocks."
    n_head: AtLeastOne = 12
    "Attention heads."
    n_embd: AtLeastOne = 768
    "Width."
    vocab_size: AtLeastOne = 50257
    "Rows of the vocabulary matrix."
    data: Path | None = None
    "HellaSwag's original .jsonl (needs GPT-2's vocabulary); none: random tokens with the lengths of 500 real examples."
    examples: AtLeastOne | None = None
    "How many, spread over the data; none: 32 on a CPU, 500 on a GPU."
    batch_tokens: AtLeastOne | None = None
    "Tokens per forward pass of ours; none: what eval_hellaswag.py takes."
    rounds: AtLeastOne = 3
    "Measurements of each; they take turns."
    device: str | None = None
    "cuda, mps or cpu; none: the best one here."
    dtype: Literal["fp32", "bf16"] = "fp32"
    "Precision of the weights of both; fp32 products may run in TF32 on a GPU, as in build-nanogpt."
    out: Path = harness.RECORDS
    "Directory of the record."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench hellaswag", description=__doc__)
    import torch

    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.evaluation.hellaswag import TASK
    from gpt2repro.evaluation.multiple_choice import Prepared, grouped, score
    from gpt2repro.models import pick_device
    from modeling_gpt2repro import GPT2ReproForCausalLM

    device = pick_device(options.device)
    on_gpu = device.type != "cpu"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    count = options.examples or (500 if on_gpu else 32)
    rendered = read_rendered(options.data, count) if options.data else random_rendered(count, options.vocab_size)
    torch.manual_seed(0)
    sizes = {"n_layer": options.n_layer, "n_head": options.n_head, "n_embd": options.n_embd}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=options.vocab_size, **sizes)).eval()
    model.to(device, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    prepared = Prepared(TASK, [], {"tokens": rendered}, grouped({"tokens": rendered}, 1024), {})

    def ours() -> np.ndarray:
        scores = score(model, prepared, device=device, batch_tokens=options.batch_tokens)["tokens"]
        return np.stack(scores)[:, :, 0]  # (examples, 4)

    def loop() -> np.ndarray:
        return np.array([score_four_rows(model, example, device) for example in rendered])

    mine, theirs = ours(), loop()  # the warm-up as well
    assert_equal_choices(mine, theirs, rendered, tolerance=1e-5 if not on_gpu and options.dtype == "fp32" else 1e-2)
    times = harness.compare({"gpt2repro": ours, BASELINE: loop}, rounds=options.rounds, warmup=0, units=count)
    ratio = flops_of_the_loop(rendered, options) / flops_of_ours(prepared.groups, options)
    goal = 10.0 if on_gpu else 0.8 * ratio
    results = {
        "headlines": [
            harness.headline(
                f"HellaSwag, {count} examples", times, ours="gpt2repro", baseline=BASELINE, unit="examples/s", goal=goal
            ),
            harness.figure("HellaSwag, ratio of FLOPs", ratio, unit="x"),
        ],
        "times": times,
        "flops_ratio": ratio,
        "device": device.type,
        "dtype": options.dtype,
        "largest_score_difference": float(np.abs(mine - theirs).max()),
    }
    harness.write_record("hellaswag", results, argv=argv, out=options.out)
    return 0


def read_rendered(path: Path, count: int) -> list:
    """`count` examples of a real file, evenly spread over it."""
    from gpt2repro.data.tokenization import gpt2_tokenizer
    from gpt2repro.evaluation.hellaswag import TASK
    from gpt2repro.evaluation.multiple_choice import render

    examples = TASK.read(path)
    chosen = [examples[i] for i in np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)]
    return render(TASK.protocols["tokens"], chosen, gpt2_tokenizer())


def random_rendered(count: int, vocab_size: int) -> list:
    """Random tokens with the lengths of real examples."""
    from gpt2repro.evaluation.multiple_choice import Rendered

    rng = np.random.default_rng(0)

    def lengths(deciles: tuple, n: int) -> list[int]:
        return np.interp(rng.random(n), np.linspace(0, 1, len(deciles)), deciles).round().astype(int).tolist()

    rendered = []
    for length in lengths(CONTEXT_TOKENS, count):
        endings = [rng.integers(vocab_size, size=n).tolist() for n in lengths(ENDING_TOKENS, 4)]
        context = rng.integers(vocab_size, size=length).tolist()
        rendered.append(Rendered([(context, ending) for ending in endings], [len(e) for e in endings]))
    return rendered


def score_four_rows(model, example, device) -> list[float]:
    """build-nanogpt's evaluate() for one example: four rows, all logits, the mask picks the ending's losses."""
    import torch
    import torch.nn.functional as F

    start = len(example.choices[0][0])
    width = max(len(context) + len(ending) for context, ending in example.choices)
    tokens, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
    for row, (context, ending) in enumerate(example.choices):
        tokens[row, : start + len(ending)] = torch.tensor(context + ending)
        mask[row, start : start + len(ending)] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()  # (4, T, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
    return (-losses * mask[:, 1:]).sum(dim=1).tolist()


def assert_equal_choices(mine: np.ndarray, theirs: np.ndarray, rendered: list, tolerance: float) -> None:
    """Raises NotEqual where scores differ by more than `tolerance` of themselves, or a clear choice is another one."""
    difference = np.abs(mine - theirs) / np.abs(theirs)
    if not (difference <= tolerance).all():
        raise harness.NotEqual(
            f"HellaSwag scores differ from the loop's by {difference.max():.1e}, allowed {tolerance}"
        )
    units = np.array([example.units for example in rendered])
    for divisor in (1, units):
        a, b = mine / divisor, theirs / divisor
        best_two = np.sort(b, axis=1)[:, -2:]
        clear = best_two[:, 1] - best_two[:, 0] > 2 * tolerance * np.abs(best_two[:, 1])
        if (a.argmax(axis=1) != b.argmax(axis=1))[clear].any():
            raise harness.NotEqual("HellaSwag choices differ from the loop's")


def flops_of_the_loop(rendered: list, options: Options) -> float:
    """Matrix products of four padded rows per example, logits at every position."""
    total = 0.0
    for example in rendered:
        width = max(len(context) + len(ending) for context, ending in example.choices)
        total += 4 * flops(options, positions=width, keys=width * (width + 1) / 2, logits=width)
    return total


def flops_of_ours(groups: list, options: Options) -> float:
    """Matrix products that the shared rows need: each position once, logits where an ending's token is predicted."""
    total = 0.0
    for group in groups:
        c = len(group.context)
        keys = c * (c + 1) / 2 + sum((len(e) - 1) * (c + len(e) / 2) for e in group.endings)
        total += flops(options, positions=group.length, keys=keys, logits=sum(map(len, group.endings)))
    return total


def flops(options: Options, *, positions: float, keys: float, logits: float) -> float:
    """2 per multiply-add: 12 C^2 weights per block and position, 2 C products per query-key pair, C V per logit row."""
    C = options.n_embd
    blocks = options.n_layer * (24 * C * C * positions + 4 * C * keys)
    return blocks + 2 * C * options.vocab_size * logits
