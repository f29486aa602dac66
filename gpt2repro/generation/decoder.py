"""Prompts -> tokens, one step at a time.

    prompts --left-pad--> prefill --> logits (B, V) --> choose --> token (B,) --+--> yielded, still on the device
                                         ^                                      |
                                         +---------- one step, static cache ----+

A plain GPT-2 (ours or transformers') is decoded straight from its weights: a static key-value cache, fixed shapes, no
Python module in between. On CUDA the whole step (forward, sampling, bookkeeping) is one captured graph. Every other
causal language model, an edited GPT-2 included, is called as a module. Nothing waits for the device between two tokens,
except to check at intervals whether every row has ended, and where a caller reads a token while it streams.

Knows no file, no command and no Hub. Shapes: B batch, T prompt, L cache slots, C n_embd, H heads, D head size, V
vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import PretrainedConfig

from gpt2repro.generation.sampling import Sampling, choose, uniforms
from gpt2repro.models import plain_twin
from gpt2repro.options import InputError

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # config.activation_function -> F.gelu's name
STEPS_BETWEEN_CHECKS = 16  # asking a GPU "has every row ended?" costs an idle gap of some 20 µs; a step takes 250 µs
CACHE_BLOCK = 64  # caches grow in blocks, so that neighbouring lengths share a captured graph
EXACT_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # all the same function
PLAIN = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
PLAIN |= {"add_cross_attention": False}
HOOKS = ("ward_hooks", "ward_pre_hooks")  # forward and backward; those of state dicts change no logit
DECISIVE = (int, float, str, tuple, PretrainedConfig)  # types of attributes that a forward may look at
NO_PART_OF_FORWARD = {"name_or_path", "gradient_checkpointing"}
Prompts = Sequence[Sequence[int]]  # token ids, one sequence per row, of any lengths


class Step(NamedTuple):
    """One more token in every row. `logits` is a buffer that the next step overwrites."""

    tokens: Tensor  # (B,), the end token again in rows that have ended
    logits: Tensor  # (B, V), what the tokens were chosen from


class Decoder:
    """Calls the model with a growing cache: right for every causal language model, also an edited one."""

    def __init__(self, model, *, batch_size: int, length: int):
        self.model, self.batch_size, self.length = model, batch_size, length
        device = self.device = next(model.parameters()).device
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.end_token = torch.zeros((), dtype=torch.long, device=device)  # -1: there is none
        self.uniform = torch.zeros(length, batch_size, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # tokens chosen so far
        self.logits: Tensor | None = None

    @torch.inference_mode()
    def tokens(
        self, prompts: Prompts, *, max_new_tokens: int, sampling: Sampling, end_token: int | None, seed=0, rows=None
    ) -> Iterator[Step]:
        """Yield up to `max_new_tokens` steps; stop early once every row has ended.

        Each prompt has at least one id; shorter ones are padded on the left. `rows` numbers each prompt's stream of
        random numbers, which begins with `seed`; None takes the prompts' positions.
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

    def _choose(self, logits: Tensor, sampling: Sampling) -> None:
        """Choose the next token of every row from (B, V) logits; rows that have ended repeat the end token."""
        chosen = choose(logits, sampling, self.uniform[self.step][0])
        self.token.copy_(torch.where(self.ended, self.end_token, chosen))
        self.ended |= self.token == self.end_token
        self.step += 1

    def _prefill(self, ids: Tensor, padding: list[int], sampling: Sampling) -> None:
        self.mask = (torch.arange(ids.size(1)) >= torch.tensor(padding)[:, None]).long().to(self.device)  # (B, T)
        self.cache = None
        self.ids = ids
        self._forward(ids, sampling)

    def _advance(self, slot: int, sampling: Sampling) -> None:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.ids = torch.cat([self.ids, self.token[:, None]], dim=1)
        self._forward(self.ids if self.cache is None else self.token[:, None], sampling)

    def _forward(self, ids: Tensor, sampling: Sampling) -> None:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.size(1) :]
        known = inspect.signature(self.model.forward).parameters
        renamed = "cache" in known and "past_key_values" not in known  # by transformers 5.24
        cache = "cache" if renamed else "past_key_values"
        inputs = {"attention_mask": self.mask, "position_ids": positions, cache: self.cache}
        # A state-space model's memory is no cache of keys and values; such a model reads all tokens again at each step.
        inputs |= {"use_cache": not getattr(self.model, "_is_stateful", False), "logits_to_keep": 1}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            inputs = {name: value for name, value in inputs.items() if name in known}
        result = self.model(ids, **inputs)  # a call, so that the model's hooks run, as in `generate`
        self.cache = getattr(result, "cache", None) or getattr(result, "past_key_values", None)
        self.logits = result.logits[:, -1]
        self._choose(self.logits, sampling)


Affine = tuple[Tensor, Tensor]  # weight and bias; a matrix is (in, out)


class Weights(NamedTuple):
    """GPT-2's weights as the decode step reads them; a layer is (ln_1, qkv, attn_out, ln_2, fc, mlp_out)."""

    layers: list[tuple[Affine, ...]]
    ln_f: Affine
    wte: Tensor  # (V, C)
    wpe: Tensor  # (n_positions, C)
    head: Tensor  # (C, V padded to a multiple of 64)
    vocab_size: int
    epsilon: float
    gelu: str


def is_plain_gpt2(model) -> bool:
    """Whether config and weights determine the model, so that `pack` may read them and ignore its code.

    True for GPT-2 (ours or transformers') exactly as its class builds it from its config, in eval mode, on one device.
    Every edit that could change a logit gives False: another class anywhere (an adapter, a quantised or parametrised
    layer, a copy of our code), an added, shared or missing module, a hook, a patched `forward`, a changed attribute.
    """
    twin = plain_twin(model)
    if twin is None or _has_any_global_hook():
        return False
    config, modules = model.config, dict(model.named_modules())
    return (
        config.activation_function in GELU
        and config._attn_implementation in EXACT_ATTENTION
        and all(getattr(config, name, plain) == plain for name, plain in PLAIN.items())
        and len({(parameter.device, parameter.dtype) for parameter in model.parameters()}) == 1
        and {name: behaviour(module) for name, module in modules.items()}
        == {name: behaviour(module) for name, module in twin.named_modules()}
        and all(has_its_own_forward(type(module)) for module in modules.values())
    )


def behaviour(module: torch.nn.Module) -> tuple:
    """All that decides a module's function, without the weights' values: class, attributes, kinds of weights, hooks."""
    own = vars(module).items()
    attributes = {name: value for name, value in own if name[0] != "_" and name not in NO_PART_OF_FORWARD}
    attributes = {name: value for name, value in attributes.items() if callable(value) or isinstance(value, DECISIVE)}
    weights = {name: (type(weight), getattr(weight, "shape", None)) for name, weight in module._parameters.items()}
    return type(module), attributes, weights, any(value for name, value in own if name.endswith(HOOKS))


def has_its_own_forward(cls: type) -> bool:
    """Whether the class still has the `forward` of the file that defines it; some libraries replace it."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return owner.forward.__module__ == owner.__module__


@torch.no_grad()
def pack(model) -> Weights:
    """Lay the weights out for matrices times a few vectors.

    A GPU reads a matrix best along its inputs, a CPU along its outputs (measured: 6.5 ms instead of 11.7 ms for the
    50,257-word head at batch 1). So `pack` makes one transposed copy: of the blocks' matrices on a GPU, of the head on
    a CPU.
    """
    on_gpu = next(model.parameters()).is_cuda
    body = model.transformer

    def matrix(linear) -> Affine:  # Conv1D stores (in, out)
        weight = linear.weight.detach()
        return (weight.t().contiguous().t() if on_gpu else weight), linear.bias.detach()

    def norm(layer_norm) -> Affine:
        return layer_norm.weight.detach(), layer_norm.bias.detach()

    layers = []
    for block in body.h:
        attention = norm(block.ln_1), matrix(block.attn.c_attn), matrix(block.attn.c_proj)
        layers.append((*attention, norm(block.ln_2), matrix(block.mlp.c_fc), matrix(block.mlp.c_proj)))
    head = model.lm_head.weight.detach()  # (V, C)
    vocab_size = head.size(0)
    head = F.pad(head, (0, 0, 0, -vocab_size % 64)).t() if on_gpu else head.t().contiguous()
    wte, wpe = body.wte.weight.detach(), body.wpe.weight.detach()
    epsilon, gelu = model.config.layer_norm_epsilon, GELU[model.config.activation_function]
    return Weights(layers, norm(body.ln_f), wte, wpe, head, vocab_size, epsilon, gelu)


def gpt2_logits(
    weights: Weights, ids: Tensor, positions: Tensor, cache: list[Tensor], slots: Tensor, mask: Tensor | None, fuse=True
) -> Tensor:
    """Write (B, T) tokens into `slots` (T,) of every layer's cache (2, B, H, L, D) -> the last token's logits (B, V).

    `mask` (B, 1, T, L) is True where a token sees a slot; None means all slots up to its own, which is the last one if
    T is 1. `fuse=False` computes attention in three steps instead of one kernel, whose few blocks cannot fill a GPU
    when T is 1; a compiler turns the steps into reductions that can.
    """
    batch, length = ids.shape
    causal = mask is None and length > 1
    heads, head_size = cache[0].size(2), cache[0].size(4)
    x = (weights.wte[ids] + weights.wpe[positions]).view(batch * length, -1)  # (B T, C)

    def norm(x: Tensor, affine: Affine) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *affine, weights.epsilon)

    def times(x: Tensor, affine: Affine) -> Tensor:
        return torch.addmm(affine[1], x, affine[0])

    for (ln_1, qkv, attn_out, ln_2, fc, mlp_out), layer_cache in zip(weights.layers, cache, strict=True):
        qkv = times(norm(x, ln_1), qkv)
        qkv = qkv.view(batch, length, 3, heads, head_size).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        layer_cache.index_copy_(3, slots, qkv[1:])
        query, (keys, values) = qkv[0], layer_cache.unbind(0)  # (B, H, T, D), (B, H, L, D)
        if causal:
            keys, values = qkv[1], qkv[2]
        if not fuse:
            scores = (query @ keys.transpose(-1, -2)).float() * head_size**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            y = scores.softmax(-1).to(values.dtype) @ values
        else:
            y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)
        y = y.transpose(1, 2).reshape(batch * length, -1)  # (B, H, T, D) -> (B T, C)
        x = x + times(y, attn_out)
        x = x + times(F.gelu(times(norm(x, ln_2), fc), approximate=weights.gelu), mlp_out)
    last = norm(x.view(batch, length, -1)[:, -1], weights.ln_f)
    return (last @ weights.head)[:, : weights.vocab_size]


class GPT2Decoder(Decoder):
    """Decodes GPT-2 from packed weights with a static cache; on CUDA one step is one graph launch.

    `compiled` fuses the step with torch.compile (a minute, once per batch size and length; for long work on a GPU).
    """

    def __init__(self, model, *, batch_size: int, length: int, compiled: bool = False):
        super().__init__(model, batch_size=batch_size, length=length)
        config = model.config
        self.weights = pack(model)
        head_size = config.n_embd // config.n_head
        dtype, shape = self.weights.wte.dtype, (2, batch_size, config.n_head, length, head_size)
        # A tensor per layer: if all layers shared one, a compiler would copy the whole tensor to change a slot.
        self.cache = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(config.n_layer)]
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)
        self.padding = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)
        self.all_slots = torch.arange(length, device=self.device)
        self.fixed_shapes = compiled or self.device.type == "cuda"
        self.compiled = compiled
        self.logits = torch.zeros(batch_size, self.weights.vocab_size, dtype=dtype, device=self.device)
        self._steps: dict[Sampling, object] = {}  # what runs one step: a function, or a captured graph's replay

    def _prefill(self, ids: Tensor, padding: list[int], sampling: Sampling) -> None:
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
        self.logits.copy_(gpt2_logits(self.weights, ids, positions, cache, slots, mask))
        self._choose(self.logits, sampling)

    def _advance(self, slot: int, sampling: Sampling) -> None:
        if not self.fixed_shapes:  # attend to what is there; nothing to mask unless prompts were padded
            seen = (self.all_slots[: slot + 1] >= self.padding)[:, None, None] if self.padded else None
            self._step(sampling, [layer[:, :, :, : slot + 1] for layer in self.cache], seen)
            return
        if sampling not in self._steps:
            self._steps[sampling] = self._prepare_step(sampling)
        self._steps[sampling]()

    def _step(self, sampling: Sampling, cache: list[Tensor], seen: Tensor | None) -> None:
        ids, positions, fuse = self.token[:, None], self.slot - self.padding, not self.compiled
        self.logits.copy_(gpt2_logits(self.weights, ids, positions, cache, self.slot, seen, fuse))
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

    Raises: InputError if the model has fewer positions than `length`.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"prompt and new text make {length} tokens, the model sees {limit}; ask for fewer")
    if not is_plain_gpt2(model):
        return Decoder(model, batch_size=batch_size, length=length)
    length = min(-(-length // CACHE_BLOCK) * CACHE_BLOCK, model.config.n_positions)
    return GPT2Decoder(model, batch_size=batch_size, length=length, compiled=compiled)


def complete(
    model, prompts: Prompts, *, max_new_tokens: int, end_token: int | None, batch_size=64, compiled=False, **how
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt -> (index of the prompt, its new tokens up to the end token), shortest prompts first.

    A prompt's text depends on (seed, index), not on the other prompts of its batch. `how` holds `sampling` and `seed`,
    as in `Decoder.tokens`.
    """
    how |= {"max_new_tokens": max_new_tokens, "end_token": end_token}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batch_size = min(batch_size, len(prompts))
    length = max(map(len, prompts)) + max_new_tokens
    decoder = decoder_for(model, batch_size=batch_size, length=length, compiled=compiled)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        filled = batch + batch[-1:] * (batch_size - len(batch))  # a short last batch keeps the decoder's shape
        steps = decoder.tokens([prompts[index] for index in filled], rows=filled, **how)
        texts = torch.stack([step.tokens for step in steps], dim=1).tolist()  # B lists of ids
        for index, tokens in zip(batch, texts, strict=False):
            yield index, tokens[: tokens.index(end_token)] if end_token in tokens else tokens
