"""GPT-2 written out: embeddings, pre-norm blocks of attention and MLP, a head tied to the embeddings, the loss.

The other half of the Hub pair: copied into every checkpoint and loaded from there by `AutoModelForCausalLM`. It owns
forward, initialisation and loss, and knows no data, no training loop and no other file of this project.

State-dict names and the (in, out) weight layout (`Conv1D`) are those of transformers' GPT-2, so OpenAI's weights load
as they are and an export to type `gpt2` only rewrites config.json.

Shapes: B batch, T time, S cached time + T, C n_embd, H heads, D head size (C / H), V vocabulary.
Sources: Radford et al. 2019 (section 2.3), https://github.com/openai/gpt-2 (src/model.py), Press & Wolf 2017 (tying).
"""

from __future__ import annotations

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
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

try:  # inside a checkpoint: transformers imports the pair as a package of its own
    from .configuration_gpt2repro import TANH_GELU, GPT2ReproConfig
except ImportError:  # in this repository: a top-level module
    from configuration_gpt2repro import TANH_GELU, GPT2ReproConfig

# Tensor cores want the head's output dimension to be a multiple of 64 (50257 -> 50304); llm.c and nanoGPT pad alike.
VOCAB_MULTIPLE = 64


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
    """Attention spelled out: the one implementation that can show its weights (`output_attentions=True`)."""
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
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)
        # transformers looks for this very call to learn that set_attn_implementation() has an effect
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
    """x + attention(ln(x)), then x + mlp(ln(x)): GPT-2 moved the layer norms to the inputs of each part."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about both models below."""

    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ReproBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
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

        `residual_dtype=torch.bfloat16` keeps the residual stream in bf16 under autocast, where it would be fp32. Given
        `position_ids` that start again within a row mark documents packed into it, which then don't see each other;
        without them attention crosses documents, as in GPT-2's training.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, or more tokens than n_positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        T = inputs_embeds.shape[1]
        if self.config.n_positions < T:
            raise ValueError(f"{T} tokens, but this model has n_positions={self.config.n_positions}; pass fewer")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        plain = attention_mask is None and position_ids is None and past_key_values is None
        if plain and self.config._attn_implementation == "sdpa":
            # Training: nothing but the triangle, which SDPA's flash kernels know as is_causal. Under torch.compile
            # create_causal_mask writes it out, since there it can't look whether any tokens are masked.
            causal_mask = None
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        if position_ids is None:
            position_ids = self._positions(T, attention_mask, past_key_values, inputs_embeds.device)
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
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    @staticmethod
    def _positions(
        T: int, attention_mask: torch.Tensor | None, past_key_values: Cache | None, device: torch.device
    ) -> torch.Tensor:
        """Position of each new token: its index among the tokens that are not padding. (B, T) or (1, T)"""
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(T, device=device) + seen).unsqueeze(0)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head; `generate`, `pipeline` and `Trainer` work as with any causal LM."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,  # (B, T), the unshifted ids; -100 is ignored
        shift_labels: torch.LongTensor | None = None,  # (B, T), already shifted targets; -100 is ignored
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_logits: bool = True,
        num_items_in_batch: int | torch.Tensor | None = None,
        loss_chunk_tokens: int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """(B, T) ids -> (B, T, V) logits and, given `labels` or `shift_labels`, the loss in nats per token (fp32).

        The loss is a mean over the targets, or their sum divided by `num_items_in_batch` (the tokens of a whole
        optimizer step, where several micro-batches make one). Training passes `output_logits=False`: only the loss
        leaves the graph, and with `loss_chunk_tokens` no more than that many rows of logits exist at a time (they are
        computed again in backward: memory for time).

        Raises:
            ValueError: labels together with shift_labels or with logits_to_keep; no loss and no logits asked for.
        """
        if labels is not None:
            if shift_labels is not None:
                raise ValueError("give labels (unshifted) or shift_labels (shifted), not both")
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # the last position has no target
        if shift_labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("a loss needs the logits of all positions: leave logits_to_keep at 0")
        if shift_labels is None and not output_logits:
            raise ValueError("output_logits=False without labels leaves nothing to return")

        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        loss = logits = None
        if output_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(hidden_states[:, keep])  # (B, T, V)
        if shift_labels is not None:
            total = self.sum_of_losses(hidden_states, logits, shift_labels.to(hidden_states.device), loss_chunk_tokens)
            loss = total / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, C) -> (…, V). The weight is padded inside the matmul only: no id >= V ever has a logit."""
        weight = self.lm_head.weight
        padding = -weight.shape[0] % VOCAB_MULTIPLE
        if padding and hidden_states.is_cuda:
            return F.linear(hidden_states, F.pad(weight, (0, 0, 0, padding)))[..., : weight.shape[0]]
        return self.lm_head(hidden_states)

    def sum_of_losses(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor | None,
        targets: torch.Tensor,
        loss_chunk_tokens: int | None,
    ) -> torch.Tensor:
        """Summed cross-entropy of (B, T) targets, from logits where they exist already, else from hidden states."""

        def from_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

        targets = targets.reshape(-1)  # (B * T,)
        if logits is not None:
            return from_logits(logits.reshape(targets.shape[0], -1), targets)
        hidden_states = hidden_states.reshape(targets.shape[0], -1)  # (B * T, C)
        if loss_chunk_tokens is None:
            return from_logits(self._logits(hidden_states), targets)
        chunks = zip(hidden_states.split(loss_chunk_tokens), targets.split(loss_chunk_tokens), strict=True)
        return sum(
            checkpoint(lambda h, t: from_logits(self._logits(h), t), h, t, use_reentrant=False) for h, t in chunks
        )


__all__ = ["GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproPreTrainedModel"]
