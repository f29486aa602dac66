"""PIQA, two ways to reach an everyday goal, as lm-evaluation-harness' `piqa`."""

from gpt2repro.evaluation.multiple_choice import Protocol, Task, index_of


def choices(example: dict) -> list[tuple[str, str]]:
    return [(f"Question: {example['goal']}\nAnswer:", " " + example[name]) for name in ("sol1", "sol2")]


def label(example: dict) -> int | None:
    return None if example.get("label") == -1 else index_of(example.get("label"), "01")  # -1 in the test split


TASK = Task(
    name="piqa",
    title="PIQA",
    dataset="baber/piqa",
    split="val",
    fields={"goal": str, "sol1": str, "sol2": str},
    label=label,
    protocols={"chars": Protocol("lm-evaluation-harness (piqa, per character)", choices)},
    published={"1558M": {"chars": {"acc": 0.7078}}},
    source="OpenAI's weights under lm-evaluation-harness of 2021, in GPT-Neo's README.",
)
