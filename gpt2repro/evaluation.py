"""Numbers about a trained model on plain text: validation loss, perplexity, bits per byte, last-word accuracy.

Owns how token losses are summed, over windows and over processes. Knows no checkpoint, no run and no file format:
models, tokenizers and token splits come in as arguments. `gpt2repro.metrics` has the same numbers as `evaluate`
modules.

**The validation set behind "3.28 on FineWeb".** llm.c, build-nanogpt and modded-nanogpt all score the first 10,485,760
predictions (20 batches of 8 processes x 64 sequences x 1024 tokens) of the first shard:

* documents of `HuggingFaceFW/fineweb`, subset `sample-10BT`, in the dataset's own order, unshuffled;
* GPT-2 tokens with one `<|endoftext|>` between documents; the first 100,000,000 tokens are the validation shard
  (`fineweb_val_000000.bin`, the only one) and everything after it is training data;
* windows of 1024 tokens, back to back from the first token on, no overlap, documents not separated; mean over tokens.

`validation_loss(..., seq_len=1024, tokens=FINEWEB_VALIDATION_TOKENS)` is that number when the shard is that shard;
llm.c's files are read in place. Shards written by `prepare_fineweb.py` put `<|endoftext|>` behind each document and
llm.c in front of it, so there the same windows start one token later: one prediction in 10,485,760 is another one,
and the others see a context that is shifted by one. The dataset on the Hub may change, so compare only across files
with the same sha256. build-nanogpt's FineWeb-Edu figure (3.2924 for OpenAI's 124M) is the same on
`HuggingFaceFW/fineweb-edu`.
Source: llm.c dev/data/fineweb.py and train_gpt2.cu (val_max_steps), modded-nanogpt train_gpt.py (val_tokens).
"""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F

from gpt2repro.options import InputError

FINEWEB_VALIDATION_TOKENS = 10_485_760  # 20 batches x 8 processes x 64 sequences x 1024 tokens
LOSS_CHUNK_TOKENS = 8192  # 1.6 GB of fp32 logits for GPT-2's vocabulary
# Before 2.13, FSDP2 counts the modules that have run, and a head that is called once per chunk confuses the next pass.
CHUNKS_UNDER_FSDP2 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
IGNORED = -100  # a target that counts for nothing: cross_entropy's default ignore_index

Forward = Callable[..., object]
Reduce = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def inference(model: torch.nn.Module) -> Iterator[Forward]:
    """Put `model` in evaluation mode and yield the function to call: not compiled, not recorded for gradients.

    Evaluation has other shapes than training, so a compiled model would recompile again and again: `model.forward` is
    what an in-place `model.compile()` leaves as it was, and blocks that were compiled one by one run eagerly here.
    Under FSDP the hooks that gather the parameters belong to the call, so there the module itself is called, and every
    process must call it equally often.
    """
    unwrapped = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    unwrapped = getattr(unwrapped, "_orig_mod", unwrapped)  # torch.compile(model) instead of model.compile()
    gathers_parameters = is_fsdp(unwrapped)
    was_training = unwrapped.training
    unwrapped.eval()
    try:
        # inference tensors must not get into FSDP's buffers, which training goes on using
        gradients_off = torch.no_grad() if gathers_parameters else torch.inference_mode()
        with gradients_off, torch.compiler.set_stance("force_eager"):
            yield unwrapped if gathers_parameters else unwrapped.forward
    finally:
        unwrapped.train(was_training)


def is_fsdp(model: torch.nn.Module) -> bool:
    """Whether parameters are spread over processes, so that every process must take part in every forward pass."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def sum_over_ranks(
    values: torch.Tensor, *, device: torch.device | str, world: int, reduce: Reduce | None = None
) -> torch.Tensor:
    """Sum float64 `values` over ranks by `reduce`, or else an all-reduce of the default group; every rank joins."""
    if reduce is None and world == 1:
        return values
    values = values.to(device, torch.float32 if torch.device(device).type == "mps" else torch.float64)
    if reduce is not None:
        values = reduce(values)
    else:
        torch.distributed.all_reduce(values)
    return values.cpu().double()


def loss_sum(forward: Forward, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Total nats of `targets` (B, T), already shifted, -100 counts for nothing. Returns a scalar.

    A model of ours computes it itself, a chunk of (B, T, V) logits at a time, so an evaluation batch never needs more
    memory than a training batch.
    """
    owner = getattr(forward, "__self__", forward)  # the module behind a bound method, or the module itself
    accepted = inspect.signature(type(owner).forward).parameters
    if "loss_chunk_tokens" in accepted:
        chunk = LOSS_CHUNK_TOKENS if CHUNKS_UNDER_FSDP2 or not is_fsdp(owner) else None
        options = {"use_cache": False, "output_logits": False, "loss_chunk_tokens": chunk}
        # a sum: the mean of nothing would be NaN
        return forward(input_ids=inputs, shift_labels=targets, num_items_in_batch=1, **options).loss
    logits = forward(input_ids=inputs, use_cache=False).logits  # (B, T, V)
    return -target_log_probs(logits, targets).sum()


def target_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) for logits (..., V) and targets (...): fp32 at least, 0 where the target is ignored."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view_as(targets)


def token_byte_lengths(tokenizer) -> torch.Tensor:
    """UTF-8 bytes of each id, (vocab_size,) int64; 0 for special tokens, which stand for no text."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = set(tokenizer.all_special_ids)
    byte_level_alphabet = set(ByteLevel.alphabet())  # one printable character per byte
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    is_byte_level = "Ġ" in tokenizer.get_vocab() or "Ċ" in tokenizer.get_vocab()
    lengths = torch.zeros(len(pieces), dtype=torch.int64)
    for token_id, piece in enumerate(pieces):
        if piece is None or token_id in special:
            continue
        if is_byte_level and byte_level_alphabet.issuperset(piece):
            lengths[token_id] = len(piece)
        else:
            lengths[token_id] = len(piece.encode("utf-8", errors="surrogatepass"))
    return lengths


def loss_metrics(total_nats: float, predicted_tokens: int, predicted_bytes: float | None) -> dict:
    """The three spellings of one number: nats per token, its exponential, and bits per UTF-8 byte of the same text.

    The nats of `<|endoftext|>` count although it has no bytes: who reads the bits must also learn where documents end.
    """
    loss = total_nats / predicted_tokens
    bits_per_byte = total_nats / math.log(2) / predicted_bytes if predicted_bytes else None
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) is beyond a double
    return {"val_loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}


def validation_loss(
    model: torch.nn.Module,
    split,
    *,
    seq_len: int,
    batch_size: int,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    token_bytes: torch.Tensor | None = None,
) -> dict:
    """Mean loss over the first `tokens` predictions of `split` (None: all), in windows of `seq_len` back to back.

    split: anything with `.tokens`, `.bytes` and `.read(start, count)`. Each rank scores its own windows; the sums meet
    in one all-reduce (`reduce(tensor) -> tensor`, default torch's) that every rank joins, and every rank makes the same
    number of forward passes. token_bytes: the bytes of each id (see `token_byte_lengths`), needed where the split does
    not know its bytes or only a part of it is scored; without it the bytes are the split's average per token.

    Returns {"val_loss", "perplexity", "bits_per_byte" (None if the split knows no bytes), "val_tokens"}.
    """
    predicted = split.tokens - 1 if tokens is None else min(tokens, split.tokens - 1)
    if predicted < 1:
        raise InputError(f"the validation split has {split.tokens} tokens and needs 2; prepare more validation text")
    if split.bytes and predicted == split.tokens - 1:
        token_bytes = None  # the split's own count is exact, also for characters the tokenizer doesn't know
    windows = math.ceil(predicted / seq_len)  # the last one may be shorter
    passes = math.ceil(windows / (batch_size * world))
    nats, scored_bytes = [], 0
    with inference(model) as forward:
        for step in range(passes):
            first = (step * world + rank) * batch_size
            x = np.zeros((batch_size, seq_len), dtype=np.int64)
            y = np.full((batch_size, seq_len), IGNORED, dtype=np.int64)
            for row in range(batch_size):
                start = (first + row) * seq_len
                count = min(seq_len, predicted - start)
                if count <= 0:
                    break  # past the end: the row stays ignored, the pass still happens
                window = np.asarray(split.read(start, count + 1)).astype(np.int64)
                x[row, :count], y[row, :count] = window[:-1], window[1:]
            inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
            if token_bytes is not None:
                scored_bytes += token_bytes[targets[targets != IGNORED]].sum().item()
            with autocast():
                nats.append(loss_sum(forward, inputs.to(device), targets.to(device)))
    totals = torch.tensor([sum(torch.stack(nats).tolist()), scored_bytes], dtype=torch.float64)
    total_nats, total_bytes = sum_over_ranks(totals, device=device, world=world, reduce=reduce).tolist()
    if token_bytes is None:
        total_bytes = split.bytes * predicted / split.tokens if split.bytes else None
    return {**loss_metrics(total_nats, predicted, total_bytes), "val_tokens": predicted}


# --- perplexity of a text -------------------------------------------------------------------------------------------


def sliding_window_loss(
    model: torch.nn.Module,
    ids: np.ndarray,
    *,
    max_length: int,
    stride: int,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict:
    """Nats of ids[1:], each predicted once, from at least `max_length - stride` tokens before it where there are any.

    Windows of `max_length` advance by `stride`; of each only the tokens behind the previous window count. `stride` =
    `max_length` is the cheap extreme (blocks), 1 the dear one (full context for every token).

    Returns {"total_nats", "predicted_tokens"}. Source: transformers' docs, "Perplexity of fixed-length models".
    """
    if not 1 <= stride <= max_length:
        raise InputError(f"stride={stride} must be between 1 and the window of {max_length} tokens")
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens; a perplexity needs at least 2")
    starts = [0]
    while starts[-1] + max_length < len(ids) - 1:  # a window of inputs [start, start + max_length) predicts one further
        starts.append(starts[-1] + stride)
    nats = []
    with inference(model) as forward:
        for first in progress(range(0, len(starts), batch_size)):
            batch = starts[first : first + batch_size]
            x = np.zeros((len(batch), max_length), dtype=np.int64)
            y = np.full((len(batch), max_length), IGNORED, dtype=np.int64)
            for row, start in enumerate(batch):
                window = ids[start : start + max_length + 1]
                x[row, : len(window) - 1] = window[:-1]
                known = 0 if start == 0 else max_length - stride  # the previous window has predicted these
                y[row, known : len(window) - 1] = window[1 + known :]
            width = len(ids[batch[0] : batch[0] + max_length + 1]) - 1  # shorter for a text shorter than a window
            with autocast():
                inputs, targets = torch.from_numpy(x[:, :width]), torch.from_numpy(y[:, :width])
                nats.append(loss_sum(forward, inputs.to(device), targets.to(device)))
    return {"total_nats": sum(torch.stack(nats).tolist()), "predicted_tokens": len(ids) - 1}


def detokenize_wikitext(text: str) -> str:
    """WikiText's word-tokenised form as ordinary text, so that a byte-level model is not charged for the form.

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


# --- last words -----------------------------------------------------------------------------------------------------


def last_word_scores(
    model: torch.nn.Module,
    tokenizer,
    passages: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[dict]:
    """LAMBADA: per passage the log p of its last word given the rest, and whether greedy decoding would write it.

    The word and the space before it are the target. Passage and context are encoded separately and the target is what
    the passage has behind the context's token count; a passage that is too long loses its beginning. As in
    lm-evaluation-harness' `lambada_openai`, without the stop-word filter that GPT-2's paper adds for its accuracies.

    Returns [{"word", "log_likelihood", "greedy"}, …].
    """
    passages = [passage.strip() for passage in passages]
    contexts = [passage.rpartition(" ")[0].rstrip() for passage in passages]
    if not all(contexts):
        index = contexts.index("")
        raise InputError(f"passage {index + 1} has no word before its last one: {passages[index][:60]!r}")
    whole = tokenizer(passages, add_special_tokens=False)["input_ids"]
    before = [len(ids) for ids in tokenizer(contexts, add_special_tokens=False)["input_ids"]]
    rows = []
    for index, (ids, length) in enumerate(zip(whole, before, strict=True)):
        target = len(ids) - length
        if not 0 < target <= max_length:
            raise InputError(f"the last word of passage {index + 1} is {target} tokens; expected 1 to {max_length}")
        rows.append((ids[-(max_length + 1) :], target))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]), reverse=True)
    scores: list[dict] = [{} for _ in rows]
    with inference(model) as forward:
        for first in progress(range(0, len(order), batch_size)):
            batch = order[first : first + batch_size]
            width = len(rows[batch[0]][0]) - 1
            inputs = torch.zeros(len(batch), width, dtype=torch.long)
            targets = torch.full((len(batch), width), IGNORED)
            for row, index in enumerate(batch):
                ids, count = rows[index]
                inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                targets[row, len(ids) - 1 - count : len(ids) - 1] = torch.tensor(ids[-count:])
            targets = targets.to(device)
            with autocast():
                logits = forward(input_ids=inputs.to(device), use_cache=False).logits  # (B, T, V)
            log_likelihoods = target_log_probs(logits, targets).sum(dim=1).tolist()
            greedy = ((logits.argmax(dim=-1) == targets) | (targets == IGNORED)).all(dim=1).tolist()
            for row, index in enumerate(batch):
                word = passages[index].rpartition(" ")[2]
                scores[index] = {"word": word, "log_likelihood": log_likelihoods[row], "greedy": greedy[row]}
    return scores


def last_word_summary(scores: Sequence[dict]) -> dict:
    """Accuracy, its standard error (deviation / sqrt n), and exp of the mean nats per last *word*, as published."""
    n = len(scores)
    accuracy = sum(score["greedy"] for score in scores) / n
    return {
        "last_word_accuracy": accuracy,
        "last_word_accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        "last_word_perplexity": math.exp(-sum(score["log_likelihood"] for score in scores) / n),
        "last_words": n,
    }


def max_length_of(model: torch.nn.Module, tokenizer=None) -> int:
    """The longest input, by the rule of lm-evaluation-harness."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(getattr(model.config, name, None), int):
            return getattr(model.config, name)
    length = getattr(tokenizer, "model_max_length", None)
    return length if length and length < 10**9 else 2048
