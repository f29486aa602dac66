"""`evaluate` module: bits per byte from sums of nats and numbers of bytes."""

import math

import datasets
import evaluate

DESCRIPTION = """
Bits per byte: total nats / ln 2 / UTF-8 bytes of the text. It doesn't depend on the tokenizer, so models with different
vocabularies can be compared on the same text.
"""
KWARGS_DESCRIPTION = """
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
CITATION = """
@article{gao2020pile,
    title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
    author={Gao, Leo and Biderman, Stella and Black, Sid and others},
    journal={arXiv preprint arXiv:2101.00027},
    year={2020}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions, references):
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / sum(references)}
