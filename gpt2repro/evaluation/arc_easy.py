"""ARC-Easy, science questions of school exams with three to five answers, as lm-evaluation-harness' `arc_easy`."""

from gpt2repro.evaluation.multiple_choice import Protocol, Task, index_of


def choices(example: dict) -> list[tuple[str, str]]:
    answers = example["choices"]["text"]
    if not 2 <= len(answers) == len(example["choices"]["label"]):
        raise ValueError("not two or more answers with a label each")
    return [(f"Question: {example['question']}\nAnswer:", " " + answer) for answer in answers]


TASK = Task(
    name="arc_easy",
    title="ARC-Easy",
    dataset="allenai/ai2_arc",
    subset="ARC-Easy",
    split="test",
    fields={"question": str, "choices": dict},
    label=lambda example: index_of(example.get("answerKey"), example["choices"]["label"]),
    protocols={"chars": Protocol("lm-evaluation-harness (arc_easy, per character)", choices)},
)
