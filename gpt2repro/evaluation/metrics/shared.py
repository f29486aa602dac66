"""What the three metrics share. The loader of `evaluate` copies this file beside the metric that it loads."""

import datasets
import evaluate

# For each text or window: its total nats (a sum, not a mean), and the number that they are divided by.
SUMS = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}


def info(metric, module_docstring: str, features: dict, *urls: str) -> evaluate.MetricInfo:
    """`MetricInfo` of a metric.

    Its module's docstring is the description and, behind "Cite:", the BibTeX entry; the class docstring says what goes
    in and what comes out.
    """
    description, _, citation = module_docstring.partition("\nCite:\n")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=type(metric).__doc__,
        features=datasets.Features(features),
        reference_urls=list(urls),
    )
