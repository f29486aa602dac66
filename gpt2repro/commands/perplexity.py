"""Perplexity of a model on a text with a sliding window, or its accuracy on the last words of passages (LAMBADA).

    gpt2repro perplexity --model runs/124M --data book.txt --stride 512
    gpt2repro perplexity --model openai-community/gpt2 --data Salesforce/wikitext --subset wikitext-103-raw-v1 \\
        --split test --detokenize wikitext
    gpt2repro perplexity --model runs/124M --data EleutherAI/lambada_openai --split test --last_word

Published for OpenAI's 124M: 37.50 per word on WikiText-103, LAMBADA 35.13 per word and 45.99 % (GPT-2 paper; its
accuracy has a stop-word filter, this one has none). For the tasks of lm-evaluation-harness (extra `harness`):

    lm_eval --model hf --model_args pretrained=runs/124M/checkpoints/final,trust_remote_code=True \\
        --tasks lambada_openai,hellaswag,wikitext
"""

import io
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from gpt2repro.evaluation.rows import read_rows
from gpt2repro.files import check_outputs, write_output
from gpt2repro.models import ModelOptions
from gpt2repro.options import AtLeastOne, InputError, parse_options

# OpenAI's sizes. Source: GPT-2 paper, table 3.
WIKITEXT = {"WikiText-103 perplexity per word": {"124M": 37.50, "350M": 26.37, "774M": 22.05, "1558M": 17.48}}


@dataclass(kw_only=True)
class Options(ModelOptions):
    data: str
    "A text file, a .jsonl file with a text in each line, a directory that holds one, or a dataset of the Hub."
    subset: str | None = None
    "Subset (configuration) of a Hub dataset."
    split: str = "test"
    "Split of a Hub dataset."
    text_column: str = "text"
    "Where a .jsonl line or a dataset's row has its text."
    stride: AtLeastOne | None = None
    "Tokens by which the window advances: smaller is slower and gives every token more context; none: half a window."
    max_length: AtLeastOne | None = None
    "Tokens of a window; none: the longest input of the model."
    last_word: bool = False
    "Each line or row is a passage whose last word is to be predicted."
    detokenize: Literal["wikitext"] | None = None
    "Undo WikiText's word-tokenised form before encoding; perplexity per word still counts the original words."
    limit: AtLeastOne | None = None
    "Only the first so many lines or rows; none: all."
    batch_size: AtLeastOne = 8
    "Windows per forward pass; with --last_word, as many tokens as in so many of the longest passages."
    out: Path | None = None
    "Write the numbers to this JSON file."
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    "Precision of the weights."

    def problems(self) -> list[str]:
        windows_own = {"stride": self.stride, "detokenize": self.detokenize} if self.last_word else {}
        given = [name for name, value in windows_own.items() if value is not None]
        return [f"--{name} belongs to the sliding window, not to --last_word" for name in given]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro perplexity", description=__doc__)
    check_outputs(options.out, read=[options.data])
    texts = read_texts(options)  # before a model is loaded

    from tqdm import tqdm

    from gpt2repro.evaluation import lambada
    from gpt2repro.evaluation.losses import max_length_of

    examples = lambada.TASK.checked([{"text": text} for text in texts], options.data) if options.last_word else []
    model, tokenizer, _ = options.load()
    limit = max_length_of(model, tokenizer)
    if options.max_length is not None and options.max_length > limit:
        raise InputError(f"max_length={options.max_length} is longer than the model's input of {limit} tokens")
    max_length = options.max_length or limit
    how = {"progress": partial(tqdm, unit="batch", file=sys.stderr, disable=None)}
    if options.last_word:
        results = last_words(model, lambada.TASK.prepare(examples, tokenizer, max_length), options, how)
    else:
        results = text_perplexity(model, tokenizer, "".join(texts), max_length, options, how)
    show(results, lambada.PAPER if options.last_word else WIKITEXT, options)
    if options.out:
        record = {"model": options.model, "data": options.data, "subset": options.subset, "split": options.split}
        record |= {"results": results, "dtype": options.dtype, "command": ["gpt2repro", "perplexity", *argv]}
        write_output(options.out, json.dumps(record, indent=2) + "\n")
    return 0


def last_words(model, prepared, options: Options, how: dict) -> dict:
    """The numbers of the task `lambada`, under this command's names."""
    from gpt2repro.evaluation.multiple_choice import score

    batch_tokens = options.batch_size * max(group.length for group in prepared.groups)
    scores = score(model, prepared, batch_tokens=batch_tokens, **how)
    found = prepared.task.summary(prepared.task.predictions(prepared, scores))
    names = ("last_word_accuracy", "last_word_accuracy_stderr", "last_word_perplexity", "last_words")
    return dict(zip(names, found.values(), strict=True))


def text_perplexity(model, tokenizer, text: str, max_length: int, options: Options, how: dict) -> dict:
    """The sliding window's sum of nats per token, per word of the text as given, and per byte of what was read."""
    import numpy as np

    from gpt2repro.data.tokenization import unknown_characters
    from gpt2repro.evaluation.losses import loss_metrics
    from gpt2repro.evaluation.perplexity import detokenize_wikitext, sliding_window_loss

    words = len(text.split())
    if options.detokenize == "wikitext":
        text = detokenize_wikitext(text)
    if unknown := unknown_characters(tokenizer, text):
        raise InputError(
            f"the model's tokenizer knows no {', '.join(map(repr, unknown[:5]))}, so {options.data} has no perplexity "
            "under it; take a model whose tokenizer is not one of characters"
        )
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    window = {"max_length": max_length, "stride": options.stride or max(1, max_length // 2)}
    sums = sliding_window_loss(model, ids, batch_size=options.batch_size, **window, **how)
    metrics = loss_metrics(sums["total_nats"], sums["predicted_tokens"], len(text.encode("utf-8")))
    word_perplexity = math.exp(min(sums["total_nats"] / words, 700)) if words else None
    found = {"loss": metrics.pop("val_loss"), **metrics, "word_perplexity": word_perplexity}
    return found | {"tokens": sums["predicted_tokens"], "words": words, **window}


def read_texts(options: Options) -> list[str]:
    """Lines or rows of text; a text file keeps its line ends. Raises: InputError for a file without text."""
    path = Path(options.data)
    if os.path.isfile(path) and path.suffix != ".jsonl":
        try:
            lines = io.StringIO(path.read_text(encoding="utf-8")).readlines()  # at newlines only
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
    else:
        rows = read_rows(options.data, subset=options.subset, split=options.split)
        lines = [row.get(options.text_column) for row in rows]
        wrong = [number for number, line in enumerate(lines, 1) if not isinstance(line, str)]
        if wrong:
            expected = f'expected an object with "{options.text_column}", a text'
            raise InputError(f"{options.data}, row {wrong[0]}: {expected} (--text_column names another)")
    if options.last_word:
        lines = [line for line in lines if line.strip()]
    lines = lines[: options.limit]
    if not any(line.strip() for line in lines):
        raise InputError(f"{options.data} has no text")
    return lines


def show(results: dict, published: dict, options: Options) -> None:
    print(f"{options.model} on {options.data}")
    for name, value in results.items():
        print(f"  {name:26} {value:,.4f}" if isinstance(value, float) else f"  {name:26} {value}")
    for name, values in published.items():
        print(f"published, {name}: " + ", ".join(f"GPT-2 {size} {value}" for size, value in values.items()))
