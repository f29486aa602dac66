"""`evaluate` module: perplexity from sums of nats and numbers of tokens.

exp of the mean nats per predicted token, over all texts together. It depends on the tokenizer; bits per byte does not.
Unlike evaluate-metric/perplexity it loads no model: it takes the sums that the caller's model gave.

Cite:
@article{jelinek1977perplexity,
    title={Perplexity: a measure of the difficulty of speech recognition tasks},
    author={Jelinek, Fred and Mercer, Robert L and Bahl, Lalit R and Baker, James K},
    journal={The Journal of the Acoustical Society of America},
    year={1977}
}
"""

import math

import evaluate

from .shared import SUMS, info


class Perplexity(evaluate.Metric):
    """exp of the mean nats per predicted token.

    Args:
        predictions: total nats of each text or window (sum, not mean).
        references: predicted tokens of each.
    Returns:
        perplexity, and loss, its logarithm.
    Example:
        >>> metric = Perplexity()
        >>> round(metric.compute(predictions=[6.0, 2.0], references=[3, 1])["perplexity"], 3)
        7.389

    Reference values: OpenAI's GPT-2 124M has a loss of 3.425 on FineWeb's validation shard (llm.c) and 3.2924 on
    FineWeb-Edu's (build-nanogpt); llm.c's reproduction of it on 10B tokens of FineWeb has 3.2722.
    """

    def _info(self):
        return info(self, __doc__, SUMS, "https://huggingface.co/docs/transformers/perplexity")

    def _compute(self, predictions, references):
        loss = math.fsum(predictions) / sum(references)
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}
