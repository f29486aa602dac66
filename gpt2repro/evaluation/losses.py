"""Losses of a trained model: how evaluation calls it, how token losses are summed, the validation loss.

Owns the sums over windows and over processes. Knows no checkpoint, no run and no file format: models, tokenizers and
token splits come in as arguments. `perplexity` builds on it for texts, `multiple_choice` for tasks;
`gpt2repro.evaluation.metrics` has the same numbers as `evaluate` modules.

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
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2repro.data.documents import document_positions
from gpt2repro.options import InputError

FINEWEB_VALIDATION_TOKENS = 10_485_760  # 20 batches x 8 processes x 64 sequences x 1024 tokens
# Before 2.13, FSDP2 counts the modules that have run, and a head that is called once per chunk confuses the next pass.
CHUNKS_UNDER_FSDP2 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
LOSS_CHUNK_TOKENS = 8192  # 1.6 GB of fp32 logits for GPT-2's vocabulary
IGNORED = -100  # a target that is not scored: cross_entropy's default ignore_index

Forward = Callable[..., object]


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[Forward]:
    """Put `model` in evaluation mode and yield the function to call: not compiled, not recorded for gradients.

    Evaluation has other shapes than training, so a compiled model would recompile again and again: `model.forward` is
    what an in-place `model.compile()` leaves as it was, and blocks that were compiled one by one run eagerly here.
    Under FSDP the hooks that gather the parameters belong to the call, so there the module itself is called, and every
    process must call it equally often.
    """
    unwrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    unwrapped = getattr(unwrapped, "_orig_mod", unwrapped)  # torch.compile(model) instead of model.compile()
    gathers_parameters = is_fsdp(unwrapped)
    was_training = unwrapped.training
    unwrapped.eval()
    try:
        # Training goes on using FSDP's buffers, so no inference tensor may get into them.
        gradients_off = torch.no_grad() if gathers_parameters else torch.inference_mode()
        with gradients_off, torch.compiler.set_stance("force_eager"):
            yield unwrapped if gathers_parameters else unwrapped.forward
    finally:
        unwrapped.train(was_training)


def is_fsdp(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, so that every process must take part in every forward pass."""
    if not distributed():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def distributed() -> bool:
    """Whether several processes evaluate together: then every one of them must take part in every evaluation."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """The number of this process among those that evaluate together, and how many they are."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed() else (0, 1)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights lie, and its input has to be."""
    return next(model.parameters()).device


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum float64 `values` over all ranks, by an all-reduce on `device` that every rank joins.

    Where every number is zero on all ranks but one, the sum is exact, in whatever order the ranks are added.
    """
    if not distributed():
        return values
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values.cpu()


def loss_sum(forward: Forward, inputs: Tensor, targets: Tensor, eot_id: int | None = None) -> Tensor:
    """Total nats of `targets` (B, T), already shifted; -100 is ignored. Returns a scalar.

    With `eot_id` documents do not see each other, as in `document_positions`.

    Our own model computes the loss in chunks of the (B, T, V) logits, so an evaluation batch never needs more memory
    than a training batch. The argument `loss_chunk_tokens` identifies it: `shift_labels` is not in its signature.
    """
    where = {} if eot_id is None else {"position_ids": document_positions(inputs, eot_id)}
    owner = getattr(forward, "__self__", forward)  # the module behind a bound method, or the module itself
    if "loss_chunk_tokens" in inspect.signature(type(owner).forward).parameters:
        chunk = LOSS_CHUNK_TOKENS if CHUNKS_UNDER_FSDP2 or not is_fsdp(owner) else None
        how = {"use_cache": False, "output_logits": False, "loss_chunk_tokens": chunk}
        # A sum: where all targets are ignored, the mean would be NaN.
        return forward(input_ids=inputs, shift_labels=targets, num_items_in_batch=1, **how, **where).loss
    logits = forward(input_ids=inputs, use_cache=False, **where).logits  # (B, T, V)
    return -target_log_probs(logits, targets).sum()


def padded(windows: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of up to B windows of up to T + 1 tokens; targets of the padding are ignored."""
    inputs, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, window in enumerate(windows):
        ids = torch.from_numpy(np.asarray(window).astype(np.int64))
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
    return inputs, targets


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) for logits (..., V) and targets (...): fp32 at least, 0 where the target is ignored."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view_as(targets)


def token_byte_lengths(tokenizer) -> Tensor:
    """UTF-8 bytes of each id, (vocab_size,) int64; 0 for special tokens, which stand for no text."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = set(tokenizer.all_special_ids)
    byte_level_alphabet = set(ByteLevel.alphabet())  # one printable character per byte
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    is_byte_level = "Ġ" in tokenizer.get_vocab() or "Ċ" in tokenizer.get_vocab()
    lengths = torch.zeros(len(pieces), dtype=torch.int64)
    for token_id, piece in enumerate(pieces):
        if piece is not None and token_id not in special:
            in_bytes = is_byte_level and byte_level_alphabet.issuperset(piece)
            lengths[token_id] = len(piece if in_bytes else piece.encode("utf-8", errors="surrogatepass"))
    return lengths


def loss_metrics(total_nats: float, predicted_tokens: int, predicted_bytes: float | None) -> dict:
    """The three spellings of one number: nats per token, its exponential, and bits per UTF-8 byte of the same text.

    The nats of `<|endoftext|>` count although it has no bytes, since a decoder must also learn where documents end.
    """
    loss = total_nats / predicted_tokens
    bits_per_byte = total_nats / math.log(2) / predicted_bytes if predicted_bytes else None
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) is beyond a double
    return {"val_loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}


def validation_loss(
    model: nn.Module,
    split,
    *,
    seq_len: int,
    batch_size: int,
    tokens: int | None = None,
    token_bytes=None,
    eot_id: int | None = None,
) -> dict:
    """Mean loss over the first `tokens` predictions of `split` (None: all), in windows of `seq_len` back to back.

    `split` has `.tokens`, `.bytes` and `.read(start, count)`. `token_bytes` is the bytes of each id (see
    `token_byte_lengths`), for a split that does not know its bytes, or of which only a part is scored; without it the
    bytes are the split's average per token. With `eot_id` the same windows are scored, but the documents in them do not
    see each other.

    Batches of `batch_size` windows are formed first and dealt out to the ranks then; their sums meet in one all-reduce
    and are added in the order of the batches. So the loss is the same to the last bit on any number of ranks. Every
    rank makes equally many forward passes.

    Returns {"val_loss", "perplexity", "bits_per_byte" (None if the split knows no bytes), "val_tokens"}.

    Raises: InputError for a split of less than 2 tokens.
    """
    predicted = split.tokens - 1 if tokens is None else min(tokens, split.tokens - 1)
    if predicted < 1:
        raise InputError(f"the validation split has {split.tokens} tokens and needs 2; prepare more validation text")
    if split.bytes and predicted == split.tokens - 1:
        token_bytes = None  # the split's own count is exact, also for characters the tokenizer doesn't know
    batches = math.ceil(predicted / (seq_len * batch_size))  # the last window and the last batch may be shorter
    sums = torch.zeros(batches, 2, dtype=torch.float64)  # nats and bytes of each batch
    nats, device, (rank, world) = {}, device_of(model), rank_and_world()
    with inference(model) as forward:
        for step in range(math.ceil(batches / world)):
            batch = step * world + rank  # past the last batch all targets are ignored: a padding pass
            starts = range(batch * batch_size * seq_len, predicted, seq_len)[:batch_size]
            windows = [split.read(start, min(seq_len, predicted - start) + 1) for start in starts]
            inputs, targets = padded(windows, (batch_size, seq_len))
            loss = loss_sum(forward, inputs.to(device), targets.to(device), eot_id)
            if batch < batches:
                nats[batch] = loss
                if token_bytes is not None:
                    sums[batch, 1] = token_bytes[targets[targets != IGNORED]].sum()
    if nats:
        # Read only here, so that no forward pass waits for a number.
        sums[list(nats), 0] = torch.stack(list(nats.values())).double().cpu()
    per_batch = sum_over_ranks(sums, device).tolist()
    total_nats, total_bytes = (sum(column) for column in zip(*per_batch, strict=True))
    if token_bytes is None:
        total_bytes = split.bytes * predicted / split.tokens if split.bytes else None
    return {**loss_metrics(total_nats, predicted, total_bytes), "val_tokens": predicted}


def max_length_of(model: nn.Module, tokenizer=None) -> int:
    """The longest input, by the rule of lm-evaluation-harness."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(getattr(model.config, name, None), int):
            return getattr(model.config, name)
    length = getattr(tokenizer, "model_max_length", None)
    return length if length and length < 10**9 else 2048
