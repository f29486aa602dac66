"""`evaluate` module: bits per byte from sums of nats and numbers of bytes.

Total nats / ln 2 / UTF-8 bytes of the text. It doesn't depend on the tokenizer, so models with different vocabularies
can be compared on the same text.

Cite:
@article{gao2020pile,
    title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
    author={Gao, Leo and Biderman, Stella and Black, Sid and others},
    journal={arXiv preprint arXiv:2101.00027},
    year={2020}
}
"""

import math

import evaluate

from .shared import SUMS, info


class BitsPerByte(evaluate.Metric):
    """Bits per UTF-8 byte, over all texts together.

    Args:
        predictions: total nats of each text or window (sum, not mean).
        references: UTF-8 bytes of what was predicted in each.
    Returns:
        bits_per_byte.
    Example:
        >>> metric = BitsPerByte()
        >>> round(metric.compute(predictions=[2.772588722239781], references=[4])["bits_per_byte"], 3)
        1.0
    """

    def _info(self):
        return info(self, __doc__, SUMS, "https://arxiv.org/abs/2101.00027")

    def _compute(self, predictions, references):
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / sum(references)}
