"""The numbers that define a GPT-2: one half of the Hub pair, copied into every checkpoint.

Knows transformers and nothing else: no data, no training, no other file of this project.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. The field names are
those of transformers' `GPT2Config`, so a `config.json` of type `gpt2` is read without changes.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of GPT-2's activation
ERF_GELU = ("gelu",)

# Options of transformers' GPT-2 that this architecture does not have: field -> the only accepted value.
FIXED_BY_THE_ARCHITECTURE = {
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}

# Written into every config.json, so that all three Auto classes find their class whichever of the two models was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2repro.GPT2ReproConfig",
    "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
    "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
}


class GPT2ReproConfig(PreTrainedConfig):
    """Architecture of one GPT-2; the defaults are the 124M model (124,439,808 parameters).

    Dropout defaults to 0, since every published reproduction trains on web text in a single epoch. OpenAI's own files
    say 0.1, which is kept when they are loaded.

    Raises: ValueError for an impossible size, and for an option of transformers' GPT-2 that this architecture lacks.
    """

    model_type = "gpt2repro"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  (transformers reads it as a plain list)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    }
    _auto_class = "AutoConfig"  # save_pretrained copies this file beside the weights

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        problems = []
        for name, understood in FIXED_BY_THE_ARCHITECTURE.items():
            value = kwargs.pop(name, understood)
            if value != understood:
                problems.append(f"{name}={value!r} (this architecture knows only {understood!r})")
        if self.activation_function not in TANH_GELU + ERF_GELU:
            known = ", ".join(TANH_GELU + ERF_GELU)
            problems.append(f"activation_function={self.activation_function!r} (known: {known})")
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", *["n_inner"] * (self.n_inner is not None))
        problems += [
            f"{name}={getattr(self, name)!r} (must be a whole number, at least 1)"
            for name in sizes
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if not problems and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} (must be a multiple of n_head={self.n_head})")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)!r} (must be in [0, 1))")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            if not all(one is None or type(one) is int for one in (ids if isinstance(ids, list) else [ids])):
                problems.append(f"{name}={ids!r} (must be a whole number)")
        if not isinstance(self.tie_word_embeddings, bool):
            problems.append(f"tie_word_embeddings={self.tie_word_embeddings!r} (must be true or false)")
        if problems:
            raise ValueError("not a GPT-2 that GPT2ReproConfig implements: " + "; ".join(problems))
        kwargs["auto_map"] = dict(AUTO_MAP)  # also undoes the "user/repo--" prefix of a config loaded from the Hub
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json. Type `gpt2` becomes `gpt2repro`, without the fields that only other heads use."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config.pop("num_labels", None)  # a language model has none, and a number of 2^63 would fill the memory
        if config.get("model_type") == "gpt2":
            unused = ("architectures", "task_specific_params", "n_ctx", "reorder_and_upcast_attn")
            config = {k: v for k, v in config.items() if k not in unused and not k.startswith("summary_")}
            config["model_type"] = cls.model_type
        return config, kwargs


__all__ = ["GPT2ReproConfig"]
