"""GPT-2 written out: embeddings, pre-norm blocks of attention and MLP, a head tied to the embeddings, the loss.

The other half of the Hub pair: it is copied into every checkpoint, and `AutoModelForCausalLM` loads it from there. It
owns forward, initialisation and loss, and knows no data, no training loop and no other file of this project.

State-dict names and the (in, out) weight layout (`Conv1D`) are those of transformers' GPT-2, so OpenAI's weights load
without changes, and an export to type `gpt2` only rewrites config.json.

Shapes: B batch, T time, S cached time + T, C n_embd, H heads, D head size (C / H), V vocabulary.
Sources: Radford et al. 2019 (section 2.3), https://github.com/openai/gpt-2 (src/model.py), Press & Wolf 2017 (tying).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

try:  # inside a checkpoint: transformers imports the pair as a package of its own
    from .configuration_gpt2repro import TANH_GELU, GPT2ReproConfig
except ImportError:  # in this repository: a top-level module
    from configuration_gpt2repro import TANH_GELU, GPT2ReproConfig

# Tensor cores are fast if the head's output dimension is a multiple of 64 (50257 -> 50304), as in llm.c and nanoGPT.
VOCAB_MULTIPLE = 64
# transformers 5.24 renamed `past_key_values` (the keys and values of earlier tokens) to `cache` and accepts both names.
# In earlier versions `cache` is the paged cache of continuous batching, which is passed on to the attention function.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, H, S, D)
    value: torch.Tensor,  # (B, H, S, D)
    attention_mask: torch.Tensor | None,  # (B, 1, T, S), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the only implementation that can return its weights (`output_attentions=True`)."""
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, T, H, D), (B, H, T, S)


class Projection(Conv1D):
    """A linear layer with GPT-2's (in, out) weight, (…, in) -> (…, out); it knows whether its output is a residual."""

    def __init__(self, n_out: int, n_in: int, *, feeds_the_residual_stream: bool = False):
        super().__init__(n_out, n_in)
        self.feeds_the_residual_stream = feeds_the_residual_stream


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention through transformers' attention interface."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.c_attn = Projection(3 * config.n_embd, config.n_embd)  # query, key and value in one matmul
        self.c_proj = Projection(config.n_embd, config.n_embd, feeds_the_residual_stream=True)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, C = hidden_states.shape
        query, key, value = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
            for part in self.c_attn(hidden_states).split(C, dim=-1)
        )
        if past_key_values is not None:  # a paged cache finds the places of each request's tokens in `kwargs`
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)
        # transformers searches the source for this call to learn that set_attn_implementation() has an effect
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            **kwargs,
        )
        return self.resid_dropout(self.c_proj(attended.reshape(B, T, C))), weights


class GPT2ReproMLP(nn.Module):
    """C -> 4C -> C with GELU; tanh approximation in OpenAI's models, erf in nanoGPT's."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Projection(n_inner, config.n_embd)
        self.c_proj = Projection(config.n_embd, n_inner, feeds_the_residual_stream=True)
        self.gelu_approximation = "tanh" if config.activation_function in TANH_GELU else "none"
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.gelu(self.c_fc(hidden_states), approximate=self.gelu_approximation)
        return self.dropout(self.c_proj(hidden_states))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """x + attention(ln(x)), then x + mlp(ln(x)): GPT-2 moved the layer norms to the inputs of both parts."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class PaddedHead(nn.Linear):
    """`nn.Linear` that multiplies by a multiple of 64 columns; see `GPT2ReproForCausalLM.pad_head`.

    Every caller gets the V columns of `nn.Linear`. Only the loss asks for the padded columns, which it masks. A slice
    of V = 50257 columns would be slower: its rows start at odd addresses, so they are read in small pieces.
    """

    def forward(self, hidden_states: torch.Tensor, padded: bool = False) -> torch.Tensor:
        """(…, C) -> (…, V), or (…, V rounded up to 64) with `padded=True`."""
        vocab_size = self.weight.shape[0]  # `out_features` stays behind when the tied embeddings are resized
        padding = -vocab_size % VOCAB_MULTIPLE
        ordinary = type(self.weight) in (nn.Parameter, torch.Tensor)  # a quantised weight has only its own matmul
        if not padding or not ordinary:
            return super().forward(hidden_states)
        logits = F.linear(hidden_states, F.pad(self.weight, (0, 0, 0, padding)))
        return logits if padded else logits[..., :vocab_size]


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the two models below."""

    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ReproBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GPT2ReproBlock,
        "attentions": OutputRecorder(GPT2ReproAttention, index=1),
    }
    # OpenAI's files carry their causal masks as buffers
    _keys_to_ignore_on_load_unexpected = [r"h\.\d+\.attn\.(masked_)?bias$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); projections into the residual stream scaled by 1/sqrt(2 * n_layer); biases 0, layer norms 1.

        "We scale the weights of residual layers at initialization by a factor of 1/sqrt(N) where N is the number of
        residual layers" (GPT-2 paper, section 2.3); each block adds two.
        """
        super()._init_weights(module)
        if isinstance(module, Projection):
            std = self.config.initializer_range
            if module.feeds_the_residual_stream:
                std /= math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """Token ids -> hidden states."""

    _auto_class = "AutoModel"

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,  # (B, S), 0 where a token is padding; None: no padding (fast)
        position_ids: torch.LongTensor | None = None,  # (B, T) or (1, T)
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,  # (B, T, C) instead of input_ids
        use_cache: bool | None = None,
        residual_dtype: torch.dtype | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """(B, T) ids -> (B, T, C) hidden states, after the final layer norm.

        `residual_dtype=torch.bfloat16` keeps the residual stream in bf16 under autocast, which would keep it in fp32.

        `position_ids` that start again within a row mark packed documents, which do not see each other; such a row may
        be longer than n_positions. Without `position_ids` attention crosses documents, as in GPT-2's training, and
        cached and new tokens together must fit into n_positions.

        Raises: ValueError for both or neither of input_ids and inputs_embeds, and for a token after the last position.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        past_key_values = kwargs.pop(CACHE, past_key_values)
        plain = attention_mask is None and position_ids is None and past_key_values is None
        if plain and self.config._attn_implementation == "sdpa":
            # In training the mask is only the triangle, which SDPA's flash kernels know as is_causal. Under
            # torch.compile create_causal_mask would write the triangle out, since it cannot look for masked tokens.
            causal_mask = None
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: past_key_values},
            )
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, past_key_values)
        else:
            self._refuse_positions_past_the_end(position_ids, past_key_values)
        if use_cache and past_key_values is None:
            # After the mask is made, since create_causal_mask looks for packed documents only without a cache.
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        if residual_dtype is not None:
            hidden_states = hidden_states.to(residual_dtype)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), **{CACHE: past_key_values if use_cache else None}
        )

    def _positions(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Position of each new token, (B, T) or (1, T): its index among the tokens that are not padding."""
        T = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
            self._refuse_positions_past_the_end(position_ids, past_key_values)
            return position_ids
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(seen, torch.Tensor) and seen + T > self.config.n_positions:
            raise ValueError(
                f"{seen + T} tokens, but this model has n_positions={self.config.n_positions}; pass fewer, or "
                "position_ids that start again at each document"
            )
        return (torch.arange(T, device=inputs_embeds.device) + seen).unsqueeze(0)

    def _refuse_positions_past_the_end(self, position_ids: torch.Tensor, past_key_values: Cache | None) -> None:
        """Raises: ValueError for a position that does not exist, if the check costs nothing.

        Reading the positions breaks a traced graph, and on a GPU it waits for all queued kernels. On a GPU the check is
        therefore made only in a decode that has cached more tokens than there are positions: there the kernel's own
        error would kill the process.
        """
        if is_tracing(position_ids):
            return
        n_positions = self.config.n_positions
        # other caches may hold their length on the device only
        past_the_end = isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() >= n_positions
        if not past_the_end and position_ids.device.type != "cpu":
            return
        if (last := int(position_ids.max())) >= n_positions:
            raise ValueError(
                f"a token at position {last}, but this model has n_positions={n_positions} (0 to {n_positions - 1}); "
                "shorten the prompt or generate fewer tokens"
            )


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head; `generate`, `pipeline` and `Trainer` work as with any causal LM."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
        if config.n_positions < 1024:
            # Without a given length transformers' pipeline writes 256 tokens after the prompt, which would pass the
            # last position of a short context.
            self.generation_config.max_length = config.n_positions

    def pad_head(self) -> None:
        """Let the head compute a multiple of 64 columns, for the tensor cores of a GPU.

        The stored weights and the logits that callers get stay the same. The constructor does not call this, because
        quantisers, adapters and other programs expect an ordinary `nn.Linear`. A head that was replaced (LoRA, int8)
        stays as it is.
        """
        if type(self.lm_head) is nn.Linear:
            self.lm_head.__class__ = PaddedHead

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,  # (B, T), the unshifted ids; -100 is ignored
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_logits: bool = True,
        num_items_in_batch: int | torch.Tensor | None = None,
        loss_chunk_tokens: int | None = None,
        loss_per_row: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """(B, T) ids -> (B, T, V) logits and, given `labels` or `shift_labels`, the loss in nats per token (fp32).

        `shift_labels` (B, T) are targets that are already shifted; -100 is ignored. They win over `labels`, since
        sequence parallelism passes both. They are not in the signature, because `Trainer` expects every parameter with
        "label" in its name in its batches.

        The loss is a mean over the targets, or their sum divided by `num_items_in_batch` (the tokens of an optimizer
        step of several micro-batches). Training passes `output_logits=False`: only the loss leaves the graph. With
        `loss_chunk_tokens` at most that many rows of logits exist at a time; backward computes them again, which trades
        time for memory. With `loss_per_row` the loss is (B,), the part of each row; their sum is the loss.

        Raises: ValueError for labels together with logits_to_keep, and if neither loss nor logits are asked for.
        """
        targets = kwargs.pop("shift_labels", None)
        if targets is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # the last position has no target
        if targets is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("a loss needs the logits of all positions: leave logits_to_keep at 0")
        if targets is None and not output_logits:
            raise ValueError("output_logits=False without labels leaves nothing to return")

        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=kwargs.pop(CACHE, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        loss = logits = None
        if output_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])  # (B, T, V)
        if targets is not None:
            how = "none" if loss_per_row else "sum"
            total = self._losses(hidden_states, logits, targets.to(hidden_states.device), loss_chunk_tokens, how)
            if loss_per_row:
                total = total.view(targets.shape).sum(-1)  # (B * T,) -> (B,)
            loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _losses(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        logits: torch.Tensor | None,  # (B, T, V)
        targets: torch.Tensor,  # (B, T)
        loss_chunk_tokens: int | None,
        how: str,
    ) -> torch.Tensor:
        """Cross-entropy, from the logits if there are any, else from the hidden states: `how` is "sum" or "none".

        The head is called as a module and outside `cross_entropy`: FSDP2 gathers its weight in a hook of that call,
        LoRA and quantisers replace the module, and a compiled cross-entropy must trace none of these.
        """

        def from_hidden_states(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if isinstance(self.lm_head, PaddedHead):
                vocab_size = self.lm_head.weight.shape[0]
                return self.cross_entropy(self.lm_head(hidden_states, padded=True), targets, vocab_size, how)
            return self.cross_entropy(self.lm_head(hidden_states), targets, None, how)

        targets = targets.reshape(-1)  # (B * T,)
        if logits is not None:
            return self.cross_entropy(logits.reshape(targets.shape[0], -1), targets, None, how)
        hidden_states = hidden_states.reshape(targets.shape[0], -1)  # (B * T, C)
        if loss_chunk_tokens is None:
            return from_hidden_states(hidden_states, targets)
        chunks = zip(hidden_states.split(loss_chunk_tokens), targets.split(loss_chunk_tokens), strict=True)
        losses = [checkpoint(from_hidden_states, h, t, use_reentrant=False) for h, t in chunks]
        return sum(losses) if how == "sum" else torch.cat(losses)

    @staticmethod
    def cross_entropy(
        logits: torch.Tensor, targets: torch.Tensor, vocab_size: int | None = None, how: str = "sum"
    ) -> torch.Tensor:
        """Sum over (N,) targets of (N, V) logits, or (N,) with "none"; at least in fp32; targets of -100 are ignored.

        Only the first `vocab_size` columns of padded logits are real; the others are masked, not cut off.
        """
        if vocab_size is not None and vocab_size < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= vocab_size
            logits = logits.masked_fill(padding, -torch.inf)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction=how)


__all__ = ["GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproPreTrainedModel"]
