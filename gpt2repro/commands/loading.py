"""Loads a model and its tokenizer for inference; what `generate`, `demo`, `perplexity`, `push` and HellaSwag share.

It is the one place that decides which code a name may run: directories and Hub repos of type `gpt2repro` and `gpt2` are
always loaded with this checkout's own class, everything else with transformers' classes. Code that comes with a Hub
repo is executed only when the person who starts the program says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gpt2repro.checkpoint import resolve_model
from gpt2repro.options import InputError

OUR_LAYOUT = ("gpt2repro", "gpt2")  # model types that GPT2ReproForCausalLM loads as they are


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here: CUDA, then MPS, then the CPU. Raises: InputError for an absent one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not usable here; try cpu ({str(error).splitlines()[0]})") from None


def pick_dtype(device: torch.device) -> torch.dtype:
    """bf16 where it is fast (CUDA), fp32 elsewhere: on a CPU without bf16 units half precision is ten times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(name: str, *, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool = False):
    """A causal language model in eval mode on `device`, and its tokenizer.

    `name` is a run, a checkpoint directory or a Hub id; `dtype=None` keeps the stored precision.

    Raises: InputError, in one sentence, for what does not exist, cannot be reached, is damaged, is not a causal
    language model, or would need remote code that was not allowed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import cached_file, logging

    from gpt2repro.tokenization import load_tokenizer

    source = resolve_model(name, any_architecture=True)
    logging.disable_progress_bar()  # a second of weights needs no bar
    try:
        config_file = Path(cached_file(source, "config.json"))  # from the directory, the cache or the Hub
        if json.loads(config_file.read_text(encoding="utf-8")).get("model_type") in OUR_LAYOUT:
            from modeling_gpt2repro import GPT2ReproForCausalLM

            model, loaded = GPT2ReproForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
        else:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise InputError(f"the weights of {name} are damaged ({error}); copy or download them again") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings its own code; if you trust its authors, start again with --trust_remote_code"
        raise InputError(f"cannot load a causal language model from {name}: {reason}") from None
    if loaded["missing_keys"]:
        absent = sorted(loaded["missing_keys"])
        raise InputError(
            f"the weights of {name} are incomplete: {len(absent)} tensors are missing, such as {absent[0]}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns that it does not know the type of a model it need not know here
    try:
        tokenizer = load_tokenizer(source)
    finally:
        logging.set_verbosity(verbosity)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model.to(device).eval(), tokenizer
