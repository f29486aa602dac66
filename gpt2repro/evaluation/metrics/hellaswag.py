"""`evaluate` module: HellaSwag accuracies from the four endings' log-likelihoods, under the protocol that made them.

Which of four endings continues a text? `acc` takes the ending with the largest log-likelihood, `acc_norm` the one with
the largest log-likelihood per unit. Scores and units come from one of two protocols, which can't be compared:
build-nanogpt's (raw context, units are the ending's tokens) and lm-evaluation-harness' (activity label, brackets
stripped, units are the ending's characters).

Cite:
@inproceedings{zellers2019hellaswag,
    title={HellaSwag: Can a Machine Really Finish Your Sentence?},
    author={Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
    booktitle={Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year={2019}
}
"""

import datasets
import evaluate
import numpy as np

from .shared import info


class HellaSwag(evaluate.Metric):
    """The share of examples whose right ending has the best score.

    Args:
        predictions: per example the four sums of log p, in nats.
        references: per example the label (0 to 3) and the four units: {"label": int, "units": [int, int, int, int]}.
    Returns:
        acc, acc_norm and their standard errors (sample deviation / sqrt(n); None for one example).
    Example:
        >>> metric = HellaSwag()
        >>> metric.compute(
        ...     predictions=[[-4.0, -9.0, -8.0, -7.0], [-4.0, -3.0, -8.0, -7.0]],
        ...     references=[{"label": 0, "units": [2, 3, 4, 5]}, {"label": 3, "units": [1, 1, 4, 7]}],
        ... )["acc_norm"]
        0.5

    Reference values on the 10,042 validation examples (build-nanogpt's hellaswag.py; acc / acc_norm):
        GPT-2 124M    tokens .2859 / .2955    characters .2892 / .3114
        GPT-2 1558M   tokens .3842 / .4893    characters .4004 / .5089
    """

    def _info(self):
        four_sums = datasets.Sequence(datasets.Value("float64"), length=4)
        four_units = datasets.Sequence(datasets.Value("int64"), length=4)
        features = {"predictions": four_sums, "references": {"label": datasets.Value("int64"), "units": four_units}}
        urls = "https://rowanzellers.com/hellaswag/", "https://github.com/karpathy/build-nanogpt"
        return info(self, __doc__, features, *urls)

    def _compute(self, predictions, references):
        scores = np.array(predictions, dtype=np.float64)  # (examples, 4)
        labels = np.array([reference["label"] for reference in references])
        units = np.array([reference["units"] for reference in references])
        results = {}
        with np.errstate(divide="ignore"):  # an empty ending has 0 characters
            choices = {"acc": scores.argmax(axis=1), "acc_norm": (scores / units).argmax(axis=1)}
        for name, chosen in choices.items():
            correct = (chosen == labels).astype(np.float64)
            stderr = float(correct.std(ddof=1) / np.sqrt(len(correct))) if len(correct) > 1 else None
            results |= {name: float(correct.mean()), f"{name}_stderr": stderr}
        return results
