"""What the three modules tell `evaluate` in the same way; its loader copies this file beside the module it loads."""

import datasets
import evaluate

# of a text or window: total nats (sum, not mean), and what they are divided by
SUMS = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}


def info(metric, description: str, citation: str, features: dict, *urls: str) -> evaluate.MetricInfo:
    """`MetricInfo` of a metric whose class docstring says what goes in and what comes out."""
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=type(metric).__doc__,
        features=datasets.Features(features),
        reference_urls=list(urls),
    )
