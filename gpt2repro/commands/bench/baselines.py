"""The models that benchmarks compare: GPT-2 as tutorials write it by hand, transformers' own, and ours.

The hand-written one (nn.Linear, fused SDPA, all logits returned) has the architecture of build-nanogpt's model and is
written anew here. All three get the same random weights.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def transformers_gpt2(shape: dict, attention: str = "sdpa"):
    """transformers' GPT-2 without dropout. Biases and layer norms are random as well: a candidate without one fails."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **off, attn_implementation=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@functools.lru_cache(maxsize=2)  # of two shapes: with the vocabulary as it is, and padded
def _weights(**shape) -> dict[str, torch.Tensor]:
    return transformers_gpt2(shape).state_dict()


def our_gpt2(shape: dict):
    """Ours, with the weights of `transformers_gpt2`."""
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=None, eos_token_id=None))
    model.load_state_dict(_weights(**shape))
    return model


def hand_written_gpt2(shape: dict) -> "HandWrittenGPT2":
    """The hand-written model with the same weights: Conv1D's (in, out) matrices become nn.Linear's (out, in)."""
    model = HandWrittenGPT2(**shape)
    model.load_state_dict({key: t.T if ".h." in key and t.dim() == 2 else t for key, t in _weights(**shape).items()})
    return model


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(n_embd, 3 * n_embd), "c_proj": nn.Linear(n_embd, n_embd)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n_embd, 4 * n_embd), "c_proj": nn.Linear(4 * n_embd, n_embd)})

    def forward(self, x):
        B, T, C = x.size()
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class HandWrittenGPT2(nn.Module):
    """`forward(ids, targets)` -> (logits, loss), ids and already shifted targets (B, T)."""

    def __init__(self, *, n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int = 1024):
        super().__init__()
        embeddings = {"wte": nn.Embedding(vocab_size, n_embd), "wpe": nn.Embedding(n_positions, n_embd)}
        blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.transformer = nn.ModuleDict({**embeddings, "h": blocks, "ln_f": nn.LayerNorm(n_embd)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids, targets):
        positions = torch.arange(ids.size(1), device=ids.device)
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
