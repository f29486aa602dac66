"""Perplexity of a text with a sliding window over its tokens, and the detokenizer of WikiText.

Knows no file and no tokenizer.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from gpt2repro.evaluation.losses import IGNORED, device_of, inference, loss_sum, padded
from gpt2repro.options import InputError


def sliding_window_loss(
    model: nn.Module, ids: np.ndarray, *, max_length: int, stride: int, batch_size: int = 8, progress: Callable = iter
) -> dict:
    """Nats of ids[1:], each predicted once, from at least `max_length - stride` tokens before it where there are any.

    Windows of `max_length` advance by `stride`; in each window only the tokens behind the previous window count.
    `stride=max_length` is the cheapest (separate blocks), `stride=1` the most expensive (full context for every token).

    Returns {"total_nats", "predicted_tokens"}.

    Raises: InputError for a stride beyond the window, or a text of less than 2 tokens.

    Source: transformers' docs, "Perplexity of fixed-length models". There a window of `max_length` tokens predicts all
    but its first; our window has as many inputs and predicts one token further.
    """
    if not 1 <= stride <= max_length:
        raise InputError(f"stride={stride} must be between 1 and the window of {max_length} tokens")
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens; a perplexity needs at least 2")
    # A window of inputs [start, start + max_length) predicts one further.
    starts = range(0, max(1, len(ids) - 1 - max_length + stride), stride)
    nats, device = [], device_of(model)
    with inference(model) as forward:
        for first in progress(range(0, len(starts), batch_size)):
            batch = starts[first : first + batch_size]
            windows = [ids[start : start + max_length + 1] for start in batch]
            width = len(windows[0]) - 1  # less than max_length in a text shorter than a window
            inputs, targets = padded(windows, (len(batch), width))
            targets[int(first == 0) :, : max_length - stride] = IGNORED  # the previous window has predicted these
            nats.append(loss_sum(forward, inputs.to(device), targets.to(device)))
    return {"total_nats": sum(torch.stack(nats).tolist()), "predicted_tokens": len(ids) - 1}


def detokenize_wikitext(text: str) -> str:
    """WikiText's word-tokenised form -> ordinary text, so that the form does not raise a byte-level model's loss.

    GPT-2's paper uses such "invertible de-tokenizers" and still divides by the words of the original form. Rules as in
    Megatron-LM's WikiText evaluation: joiners (`@-@`), punctuation, brackets, quotes, headings, contractions.
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"\( ([^()]*?) \)", r"(\1)", text)
    text = re.sub(r"\[ ([^\[\]]*?) \]", r"[\1]", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"(?<!\w)' ([^'\n]*?) '(?!\w)", r"'\1'", text)
    text = re.sub(r" ([,.:;!?])(?=\s|$)", r"\1", text)
    text = re.sub(r" '(s|t|re|ve|m|ll|d)\b", r"'\1", text)
    text = text.replace("s ' ", "s' ").replace(" ° ", "°")
    text = re.sub(r"=(?: =)+", lambda run: run[0].replace(" ", ""), text)  # = = Heading = =
    return re.sub(r" *\n *", "\n", text)
