"""WinoGrande, which of two names fits a gap, as lm-evaluation-harness' `winogrande`.

Partial evaluation (Trinh and Le 2018): each name is put into the gap, and only the text behind the gap is scored.
"""

from gpt2repro.evaluation.multiple_choice import Protocol, Task, index_of


def choices(example: dict) -> list[tuple[str, str]]:
    before, gap, after = example["sentence"].partition("_")
    if not gap:
        raise ValueError("no gap, written _, in its sentence")
    return [(before + example[name], " " + after.strip()) for name in ("option1", "option2")]


TASK = Task(
    name="winogrande",
    title="WinoGrande",
    dataset="allenai/winogrande",
    subset="winogrande_xl",
    split="val",
    fields={"sentence": str, "option1": str, "option2": str},
    label=lambda example: index_of(example.get("answer"), "12"),
    protocols={"chars": Protocol("lm-evaluation-harness (winogrande, partial evaluation)", choices)},
    metrics=("acc",),
    published={"1558M": {"chars": {"acc": 0.5940}}},
    source="OpenAI's weights under lm-evaluation-harness of 2021, in GPT-Neo's README.",
)
