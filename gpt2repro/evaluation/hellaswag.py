"""HellaSwag under both protocols that people quote: which of four endings continues a text?

The two differ in what the model sees and in what an ending's score is divided by; their numbers can't be compared.

`tokens`, build-nanogpt's hellaswag.py: the context is `ctx` as it is and " " + ending is encoded by itself. `acc` picks
    the ending with the largest sum of log p, `acc_norm` the one with the largest mean per token.
`chars`, lm-evaluation-harness' task `hellaswag`: the context is `activity label: ctx_a Ctx_b` with WikiHow's brackets
    stripped, encoded together with the ending and cut at the context's token count. `acc` picks the ending with the
    largest sum of log p, `acc_norm` the one with the largest sum per character.
"""

import re

from gpt2repro.evaluation.multiple_choice import Protocol, Task, index_of


def raw_choices(example: dict) -> list[tuple[str, str]]:
    """build-nanogpt's texts."""
    return [(example["ctx"], " " + ending) for ending in _endings(example)]


def harness_choices(example: dict) -> list[tuple[str, str]]:
    """lm-evaluation-harness' texts."""
    context = harness_text(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
    return [(context, " " + harness_text(ending)) for ending in _endings(example)]


def harness_text(text: str) -> str:
    """lm-evaluation-harness' clean-up: WikiHow's `[title]`, `[step]`, … are artefacts of the data set."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _endings(example: dict) -> list[str]:
    if len(example["endings"]) != 4:
        raise ValueError("not four endings")
    return example["endings"]


TASK = Task(
    name="hellaswag",
    title="HellaSwag",
    dataset="Rowan/hellaswag",
    split="val",
    fields={"ctx": str, "ctx_a": str, "ctx_b": str, "activity_label": str, "endings": list},
    label=lambda example: index_of(example.get("label"), "0123"),
    protocols={
        "tokens": Protocol("build-nanogpt (raw context, mean loss per token)", raw_choices, by_tokens=True),
        "chars": Protocol("lm-evaluation-harness (activity label, brackets stripped, per character)", harness_choices),
    },
    # Source: build-nanogpt's hellaswag.py, which quotes both protocols for 124M and 1558M.
    published={
        "124M": {"tokens": {"acc": 0.2859, "acc_norm": 0.2955}, "chars": {"acc": 0.2892, "acc_norm": 0.3114}},
        "1558M": {"tokens": {"acc": 0.3842, "acc_norm": 0.4893}, "chars": {"acc": 0.4004, "acc_norm": 0.5089}},
    },
    source="OpenAI's weights on all 10,042 validation examples; n/a: not published by protocol.",
)
