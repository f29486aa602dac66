"""LAMBADA: the last word of a passage, given the rest, as lm-evaluation-harness' `lambada_openai`.

The one choice is the last word with the space before it; `acc` says how often greedy decoding would write it. GPT-2's
paper filters stop words for its accuracies, so only its perplexities can be compared with ours.
"""

import math
from collections.abc import Sequence

import numpy as np

from gpt2repro.evaluation.multiple_choice import Prepared, Protocol, Task, standard_error

# OpenAI's sizes. Source: GPT-2 paper, table 3.
PAPER = {
    "LAMBADA perplexity": {"124M": 35.13, "350M": 15.60, "774M": 10.87, "1558M": 8.63},
    "LAMBADA accuracy (with stop-word filter)": {"124M": 0.4599, "350M": 0.5548, "774M": 0.6012, "1558M": 0.6324},
}


def choices(example: dict) -> list[tuple[str, str]]:
    context, _, word = example["text"].strip().rpartition(" ")
    if not context:
        raise ValueError(f"no word before its last one: {word[:60]!r}")
    return [(context, " " + word)]


class LastWords(Task):
    """A task with a single choice, so it has numbers of its own."""

    def predictions(self, prepared: Prepared, scores: dict[str, list[np.ndarray]]) -> list[dict]:
        """Per passage the last word, its log p, and whether greedy decoding would write it."""
        words = [example["text"].strip().rpartition(" ")[2] for example in prepared.examples]
        return [
            {"index": i, "word": word, "log_likelihood": float(score[0, 0]), "greedy": bool(score[0, 1] == 0)}
            for i, (word, score) in enumerate(zip(words, scores["chars"], strict=True))
        ]

    def near_ties(self, rows: Sequence[dict]) -> list[dict]:
        """None: one choice has no rival."""
        return []

    def summary(self, rows: Sequence[dict]) -> dict:
        """Accuracy, its standard error, and exp of the mean nats per last *word*, as published."""
        n = len(rows)
        accuracy = sum(row["greedy"] for row in rows) / n
        perplexity = math.exp(min(-sum(row["log_likelihood"] for row in rows) / n, 700))  # exp(710) is no double
        return {
            "lambada_acc": accuracy,
            "lambada_acc_stderr": standard_error(accuracy, n),
            "lambada_perplexity": perplexity,
            "lambada_examples": n,
        }


TASK = LastWords(
    name="lambada",
    title="LAMBADA",
    dataset="EleutherAI/lambada_openai",
    split="test",
    fields={"text": str},
    label=lambda example: 0,
    protocols={"chars": Protocol("lm-evaluation-harness (lambada_openai, greedy last word)", choices)},
    metrics=("acc", "perplexity"),
    greedy=True,
    published={
        "124M": {"chars": {"acc": 0.3256, "perplexity": 40.0554}},
        "1558M": {"chars": {"acc": 0.5121, "perplexity": 10.634}},
    },
    source="OpenAI's weights; 124M: lm-evaluation-harness, issue 2159; 1558M: GPT-Neo's README.",
)
