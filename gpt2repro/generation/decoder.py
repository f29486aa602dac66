"""Prompts -> tokens, one step at a time: sampling, the decode engine, and text that streams.

    prompts --left-pad--> prefill --> logits (B, V) --> choose --> token (B,) --+--> yielded, still on the device
                                         ^                                      |
                                         +---------- one step, static cache ----+

GPT-2 (ours and transformers') is decoded straight from its weights: a static key-value cache, fixed shapes, no Python
module in between, and on CUDA the whole step - forward, sampling, bookkeeping - is one captured graph. Every other
causal language model goes through its own `forward`. Nothing waits for the device between two tokens, except to see now
and then whether every row has ended, and where somebody reads a token while it streams.

Chance comes from outside: each row has its own stream of uniform numbers, drawn before the first token from
(seed, row). So a seed gives the same text in every batch, and the captured step holds no random state.

Knows no file, no command and no Hub. Shapes: B batch, T prompt, L cache slots, C n_embd, H heads, D head size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gpt2repro.options import InputError

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # config.activation_function -> F.gelu's name
STEPS_BETWEEN_CHECKS = 16  # asking a GPU "has every row ended?" costs an idle gap of some 20 µs; a step takes 250 µs
CACHE_BLOCK = 64  # caches grow in blocks, so that neighbouring lengths share a captured graph


# ---------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: `temperature=0` is greedy; `top_k` and `top_p` cut the tail, None leaves it."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature={self.temperature} must be a number of at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k={self.top_k} must be at least 1; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie in (0, 1]; leave it out to keep every token")
        return found


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `top_k` best logits in descending order and their ids; all of them, unsorted, without a cut (ids None)."""
    if sampling.top_k is None and sampling.top_p is None:
        return logits, None
    count = min(sampling.top_k or logits.size(-1), logits.size(-1))
    return torch.topk(logits, count)  # (B, V) -> (B, k), (B, k)


def keep_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero what lies behind the first `top_p` of the mass; `probs` descend. The likeliest token always stays.

    Source: Holtzman et al. 2020, section 3.1.
    """
    return probs * (probs.cumsum(-1) - probs < top_p)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Temperature, then top-k, then top-p -> unnormalised probabilities (B, k) and the ids they belong to."""
    best, ids = candidates(logits.float() / sampling.temperature, sampling)
    probs = best.softmax(-1)
    return (probs if sampling.top_p is None else keep_nucleus(probs, sampling.top_p)), ids


def pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The inverse of the distribution function at `uniform` (B,) in [0, 1): an index (B,) that is never impossible."""
    mass = probs.cumsum(-1)
    # The factor keeps the target below the last step of the sum, whatever order a parallel sum rounded in.
    target = uniform[:, None] * mass[:, -1:] * (1 - 1e-6)
    return ((mass > target) & (probs > 0)).int().argmax(-1)  # argmax: the first of equals


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) and one uniform number per row -> token ids (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs, ids = probabilities(logits, sampling)
    index = pick(probs, uniform)
    return index if ids is None else ids.gather(-1, index[:, None])[:, 0]


def uniforms(seed: int, rows: Sequence[int], steps: int) -> torch.Tensor:
    """(steps, rows) uniform numbers in [0, 1); a row's column depends on (seed, row) alone."""
    streams = [np.random.Generator(np.random.Philox(key=(row << 64) + seed)) for row in rows]
    return torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams], axis=1))


# ------------------------------------------------------------------------------------------------------------ decoding


class Step(NamedTuple):
    """One more token in every row. `logits` is a buffer that the next step overwrites."""

    tokens: torch.Tensor  # (B,), the end token again in rows that have ended
    logits: torch.Tensor  # (B, V), what the tokens were chosen from


def room_for(model, prompt_tokens: int) -> int | None:
    """How many tokens fit behind a prompt; None where the model sets no limit. Raises: InputError if none does."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens >= limit:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, the model sees {limit} and needs room for at least one more; "
            "shorten the prompt"
        )
    return None if limit is None else limit - prompt_tokens


class Decoder:
    """Decodes with the model's own `forward` and a growing cache: right for every causal language model."""

    def __init__(self, model, *, batch_size: int, length: int):
        self.model, self.batch_size, self.length = model, batch_size, length
        device = next(model.parameters()).device
        self.device = device
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.end_token = torch.zeros((), dtype=torch.long, device=device)  # -1: there is none
        self.uniform = torch.zeros(length, batch_size, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # tokens chosen so far
        self.logits: torch.Tensor | None = None

    @torch.inference_mode()
    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        end_token: int | None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        """Yield up to `max_new_tokens` steps; stops early once every row has ended.

        prompts: one non-empty list of ids per row, of any lengths (padded on the left). rows: the number of each
        prompt's stream of chance, its position by default.
        """
        longest = max(map(len, prompts))
        assert len(prompts) == self.batch_size, f"{len(prompts)} prompts in a decoder for {self.batch_size}"
        assert min(map(len, prompts)) > 0, "an empty prompt: start it with the end-of-text token"
        assert longest + max_new_tokens <= self.length, f"{longest} + {max_new_tokens} tokens in {self.length} slots"
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])  # (B, T)
        chance = uniforms(seed, range(len(prompts)) if rows is None else rows, max_new_tokens)
        self.uniform[:max_new_tokens] = chance.to(self.device)
        self.ended.zero_()
        self.step.zero_()
        self.end_token.fill_(-1 if end_token is None else end_token)

        every = STEPS_BETWEEN_CHECKS if self.device.type == "cuda" else 1
        self._prefill(ids.to(self.device), padding, sampling)
        yield Step(self.token.clone(), self.logits)
        for done in range(1, max_new_tokens):
            if end_token is not None and done % every == 0 and bool(self.ended.all()):
                return
            self._advance(longest + done - 1, sampling)
            yield Step(self.token.clone(), self.logits)

    def _choose(self, logits: torch.Tensor, sampling: Sampling) -> None:
        """Choose the next token of every row from (B, V) logits; rows that have ended repeat the end token."""
        chosen = choose(logits, sampling, self.uniform[self.step][0])
        self.token.copy_(torch.where(self.ended, self.end_token, chosen))
        self.ended |= self.token == self.end_token
        self.step += 1

    def _prefill(self, ids: torch.Tensor, padding: list[int], sampling: Sampling) -> None:
        self.mask = (torch.arange(ids.size(1)) >= torch.tensor(padding)[:, None]).long().to(self.device)  # (B, T)
        self.cache = None
        self._forward(ids, sampling)

    def _advance(self, slot: int, sampling: Sampling) -> None:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self._forward(self.token[:, None], sampling)

    def _forward(self, ids: torch.Tensor, sampling: Sampling) -> None:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.size(1) :]
        result = self.model.forward(
            ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.logits = result.past_key_values, result.logits[:, -1]
        self._choose(self.logits, sampling)


class Layer(NamedTuple):
    """One block's weights; matrices are (in, out)."""

    ln_1: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    attn_out: tuple[torch.Tensor, torch.Tensor]
    ln_2: tuple[torch.Tensor, torch.Tensor]
    fc: tuple[torch.Tensor, torch.Tensor]
    mlp_out: tuple[torch.Tensor, torch.Tensor]


class Weights(NamedTuple):
    """GPT-2's weights as the decode step reads them."""

    layers: list[Layer]
    ln_f: tuple[torch.Tensor, torch.Tensor]
    wte: torch.Tensor  # (V, C)
    wpe: torch.Tensor  # (n_positions, C)
    head: torch.Tensor  # (C, V padded to a multiple of 64)
    vocab_size: int
    epsilon: float
    gelu: str


def has_gpt2_layout(model) -> bool:
    """Whether `pack` understands the model: plain GPT-2, whole on one device (a sharded one needs its own forward)."""
    config = model.config
    return (
        config.model_type in ("gpt2repro", "gpt2")
        and config.activation_function in GELU
        and getattr(config, "scale_attn_weights", True)
        and not getattr(config, "scale_attn_by_inverse_layer_idx", False)
        and not getattr(config, "reorder_and_upcast_attn", False)
        and not getattr(config, "add_cross_attention", False)
        and all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    )


@torch.no_grad()
def pack(model) -> Weights:
    """Lay the weights out for matrices times a few vectors.

    A GPU reads a matrix best along its inputs, a CPU along its outputs (measured: 6.5 ms instead of 11.7 ms for the
    50,257-word head at batch 1), so the other one of head and blocks is transposed here, once, in memory of its own.
    """
    on_gpu = next(model.parameters()).is_cuda
    body = model.transformer

    def matrix(linear) -> tuple[torch.Tensor, torch.Tensor]:  # Conv1D stores (in, out)
        weight = linear.weight.detach()
        return (weight.t().contiguous().t() if on_gpu else weight), linear.bias.detach()

    def norm(layer_norm) -> tuple[torch.Tensor, torch.Tensor]:
        return layer_norm.weight.detach(), layer_norm.bias.detach()

    layers = [
        Layer(
            norm(block.ln_1),
            matrix(block.attn.c_attn),
            matrix(block.attn.c_proj),
            norm(block.ln_2),
            matrix(block.mlp.c_fc),
            matrix(block.mlp.c_proj),
        )
        for block in body.h
    ]
    head = model.lm_head.weight.detach()  # (V, C)
    vocab_size = head.size(0)
    head = F.pad(head, (0, 0, 0, -vocab_size % 64)).t() if on_gpu else head.t().contiguous()
    return Weights(
        layers=layers,
        ln_f=norm(body.ln_f),
        wte=body.wte.weight.detach(),
        wpe=body.wpe.weight.detach(),
        head=head,
        vocab_size=vocab_size,
        epsilon=model.config.layer_norm_epsilon,
        gelu=GELU[model.config.activation_function],
    )


def gpt2_logits(
    weights: Weights,
    ids: torch.Tensor,
    positions: torch.Tensor,
    cache: list[torch.Tensor],
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool = False,
    plain_attention: bool = False,
) -> torch.Tensor:
    """Write (B, T) tokens into `slots` (T,) of every layer's cache (2, B, H, L, D) -> the last one's logits (B, V).

    mask: (B, 1, T, L), True where a slot is seen; None sees all L. plain_attention: three matrix steps in place of the
    fused kernel, which has too few blocks to fill a GPU when T is 1; a compiler turns them into reductions that do.
    """
    batch, length = ids.shape
    heads, head_size = cache[0].size(2), cache[0].size(4)
    x = (weights.wte[ids] + weights.wpe[positions]).view(batch * length, -1)  # (B T, C)
    norm = partial(F.layer_norm, normalized_shape=x.shape[-1:], eps=weights.epsilon)
    for layer, layer_cache in zip(weights.layers, cache, strict=True):
        h = norm(x, weight=layer.ln_1[0], bias=layer.ln_1[1])
        qkv = torch.addmm(layer.qkv[1], h, layer.qkv[0])
        qkv = qkv.view(batch, length, 3, heads, head_size).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        layer_cache.index_copy_(3, slots, qkv[1:])
        query, (keys, values) = qkv[0], layer_cache.unbind(0)  # (B, H, T, D), (B, H, L, D)
        if causal:
            keys, values = qkv[1], qkv[2]
        if plain_attention:
            scores = (query @ keys.transpose(-1, -2)).float() * head_size**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            y = scores.softmax(-1).to(values.dtype) @ values
        else:
            y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)
        y = y.transpose(1, 2).reshape(batch * length, -1)  # (B, H, T, D) -> (B T, C)
        x = x + torch.addmm(layer.attn_out[1], y, layer.attn_out[0])
        h = norm(x, weight=layer.ln_2[0], bias=layer.ln_2[1])
        h = F.gelu(torch.addmm(layer.fc[1], h, layer.fc[0]), approximate=weights.gelu)
        x = x + torch.addmm(layer.mlp_out[1], h, layer.mlp_out[0])
    last = norm(x.view(batch, length, -1)[:, -1], weight=weights.ln_f[0], bias=weights.ln_f[1])
    return (last @ weights.head)[:, : weights.vocab_size]


class GPT2Decoder(Decoder):
    """Decodes GPT-2 from packed weights with a static cache; on CUDA one step is one graph launch.

    compiled: fuse the step with torch.compile first (a minute, once per batch size and length; for long work on a GPU).
    """

    def __init__(self, model, *, batch_size: int, length: int, compiled: bool = False):
        super().__init__(model, batch_size=batch_size, length=length)
        config = model.config
        self.weights = pack(model)
        head_size = config.n_embd // config.n_head
        dtype, shape = self.weights.wte.dtype, (2, batch_size, config.n_head, length, head_size)
        # A tensor per layer: a compiler that sees one for all would copy it whole to change a slot.
        self.cache = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(config.n_layer)]
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)
        self.padding = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)
        self.all_slots = torch.arange(length, device=self.device)
        self.fixed_shapes = compiled or self.device.type == "cuda"
        self.compiled = compiled
        self.logits = torch.zeros(batch_size, self.weights.vocab_size, dtype=dtype, device=self.device)
        self._steps: dict[Sampling, object] = {}  # what runs one step: a function, or a captured graph's replay

    def _prefill(self, ids: torch.Tensor, padding: list[int], sampling: Sampling) -> None:
        length = ids.size(1)
        self.padding.copy_(torch.tensor(padding)[:, None])
        self.slot.fill_(length)
        slots = self.all_slots[:length]
        self.padded = any(padding)
        if self.padded:
            # A padded position sees only itself: seeing nothing would be a softmax over nothing, NaN.
            seen = (slots >= self.padding)[:, None, None] & (slots <= slots[:, None]) | (slots == slots[:, None])
        positions = (slots - self.padding).clamp(min=0)  # (B, T)
        cache = [layer[:, :, :, :length] for layer in self.cache]
        mask = seen if self.padded else None
        self.logits.copy_(gpt2_logits(self.weights, ids, positions, cache, slots, mask, causal=not self.padded))
        self._choose(self.logits, sampling)

    def _advance(self, slot: int, sampling: Sampling) -> None:
        if not self.fixed_shapes:  # attend to what is there; nothing to mask unless prompts were padded
            seen = (self.all_slots[: slot + 1] >= self.padding)[:, None, None] if self.padded else None
            self._step(sampling, [layer[:, :, :, : slot + 1] for layer in self.cache], seen)
            return
        if sampling not in self._steps:
            self._steps[sampling] = self._prepare_step(sampling)
        self._steps[sampling]()

    def _step(self, sampling: Sampling, cache: list[torch.Tensor], seen: torch.Tensor | None) -> None:
        logits = gpt2_logits(
            self.weights,
            self.token[:, None],
            self.slot - self.padding,
            cache,
            self.slot,
            seen,
            plain_attention=self.compiled,
        )
        self.logits.copy_(logits)
        self._choose(self.logits, sampling)
        self.slot += 1

    def _fixed_step(self, sampling: Sampling) -> None:
        seen = (self.all_slots >= self.padding) & (self.all_slots <= self.slot)  # (B, L)
        self._step(sampling, self.cache, seen[:, None, None])

    def _prepare_step(self, sampling: Sampling):
        """The step as one call: compiled if asked for, captured as a CUDA graph where there is CUDA."""
        step = partial(self._fixed_step, sampling)
        if self.compiled:
            # Coordinate descent tuning also turns matrix times vector into a reduction: full bandwidth at batch 1.
            tuning = {"coordinate_descent_tuning": True} if self.device.type == "cuda" else None
            step = torch.compile(step, fullgraph=True, dynamic=False, options=tuning)
        if self.device.type != "cuda":
            return step

        state = (self.token, self.ended, self.step, self.slot)
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()  # warm up where it leaves no trace in the graph's memory
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def decoder_for(model, *, batch_size: int, length: int, compiled: bool = False) -> Decoder:
    """The fastest decoder that is right for the model, with room for `length` tokens a row, prompt included.

    Raises: InputError if the model has fewer positions than that.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"prompt and new text make {length} tokens, the model sees {limit}; ask for fewer")
    if not has_gpt2_layout(model):
        return Decoder(model, batch_size=batch_size, length=length)
    length = min(-(-length // CACHE_BLOCK) * CACHE_BLOCK, model.config.n_positions)
    return GPT2Decoder(model, batch_size=batch_size, length=length, compiled=compiled)


def complete(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end_token: int | None,
    seed: int = 0,
    batch_size: int = 64,
    compiled: bool = False,
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt -> (index of the prompt, its new tokens up to the end token), shortest prompts first.

    A prompt's text depends on (seed, index), not on what it is batched with.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batch_size = min(batch_size, len(prompts))
    length = max(map(len, prompts)) + max_new_tokens
    decoder = decoder_for(model, batch_size=batch_size, length=length, compiled=compiled)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        filled = batch + batch[-1:] * (batch_size - len(batch))  # a short last batch keeps the decoder's shape
        steps = decoder.tokens(
            [prompts[index] for index in filled],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_token=end_token,
            seed=seed,
            rows=filled,
        )
        texts = torch.stack([step.tokens for step in steps], dim=1).tolist()  # B lists of ids
        yield from ((index, until(tokens, end_token)) for index, tokens in zip(batch, texts, strict=False))


def until(tokens: list[int], end_token: int | None) -> list[int]:
    """The tokens before the first end token."""
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens


# ---------------------------------------------------------------------------------------------------------------- text


def encode_prompt(tokenizer, text: str) -> list[int]:
    """A prompt's ids; the empty prompt is the end-of-text token, behind which GPT-2 begins a new document."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # too long is said by `room_for`
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("the prompt is empty and this tokenizer has no token to start from; write a prompt")
    return [start]


class TextStream:
    """Tokens one by one -> text as soon as it is certain; never half a UTF-8 character.

    A token may end inside a character. Decoding then ends with U+FFFD, which is held back until the next tokens
    complete it, or `flush` admits that nothing will.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.context: list[int] = []  # a token before the pending ones: some tokenizers drop a leading space without
        self.pending: list[int] = []
        self.shown = 0  # characters of the pending tokens' text that were given out

    def push(self, token: int) -> str:
        """The characters that `token` makes certain; often its text, sometimes none."""
        self.pending.append(token)
        return self._new_text(final=False)

    def flush(self) -> str:
        """What was held back, at the end."""
        return self._new_text(final=True)

    def _new_text(self, *, final: bool) -> str:
        text = self._decode(self.context + self.pending)[len(self._decode(self.context)) :]
        certain = text if final or not text.endswith("\ufffd") else text[:-1]
        new, self.shown = certain[self.shown :], max(self.shown, len(certain))
        if certain == text and self.pending:
            self.context, self.pending, self.shown = self.pending[-1:], [], 0
        return new

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
