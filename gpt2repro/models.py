"""The only module of this library that imports the Hub pair: builds, loads and compiles models, picks device and dtype.

It decides which code a model's name may run. Models of type `gpt2repro` and `gpt2` are loaded with this checkout's own
class, all others with transformers' classes. The code of a Hub repo runs only with `--trust_remote_code`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2repro.options import InputError, first_line, say, sentence_for

if TYPE_CHECKING:  # commands take ModelOptions from here before they know whether they will need torch
    import torch

OUR_LAYOUT = ("gpt2repro", "gpt2")  # model types that GPT2ReproForCausalLM loads as they are
ARCHITECTURE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function")
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(kw_only=True)
class ModelOptions:
    """The options of every command that loads one model."""

    model: str
    "A run, a checkpoint directory, or a Hub id."
    device: str | None = None
    "cuda, cuda:1, mps or cpu; none: the best one here."
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    "Precision of the weights; none: bf16 on CUDA, fp32 elsewhere."
    trust_remote_code: bool = False
    "Run the Python code that a Hub repo of another architecture brings along."

    def load(self, *, device: str | None = None):
        """(model, tokenizer, device) of these options; a `device` that a launcher has chosen wins over the option."""
        chosen = pick_device(device or self.device)
        dtype = pick_dtype(chosen, self.dtype)
        return *load_model(self.model, device=chosen, dtype=dtype, trust_remote_code=self.trust_remote_code), chosen


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one here: CUDA, then MPS, then the CPU. Raises: InputError if it is absent."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name.startswith("meta"):
            raise RuntimeError("it holds no numbers")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not usable here; try cpu ({first_line(error)})") from None


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The named precision, else bf16 on CUDA and fp32 elsewhere, where bf16 may be ten times slower."""
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return named[name or ("bf16" if device.type == "cuda" else "fp32")]


def architecture_of(name: str) -> dict:
    """The sizes in a model's config.json, by the names of ARCHITECTURE; `name` as in `load_model`. Reads no weights.

    Raises: InputError if there is no GPT-2 of that name.
    """
    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.checkpoint.reader import find_model

    source = find_model(name)
    try:
        found = GPT2ReproConfig.from_pretrained(source)
    except Exception as error:
        raise _not_loaded(f"init_from={name}", error) from error
    return {size: getattr(found, size) for size in ARCHITECTURE if size != "activation_function"}


def _not_loaded(what: str, error: Exception) -> InputError:
    """The sentence for an error while a model was loaded; a damaged file can make the libraries raise anything."""
    known = None if isinstance(error, OSError) else sentence_for(error)
    return known or InputError(f"{what}: {first_line(error)}")


def load_model(name: str, *, device: torch.device | str, dtype: torch.dtype | None, trust_remote_code: bool = False):
    """A causal language model in eval mode on `device`, and its tokenizer.

    `name` is a run, a checkpoint directory or a Hub id; `dtype=None` keeps the stored precision.

    Raises: InputError for a model that does not exist, cannot be reached, is damaged, is not a causal language model,
    or needs remote code that was not allowed.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import cached_file, logging

    from gpt2repro.checkpoint.reader import resolve_model
    from gpt2repro.data.tokenization import load_tokenizer
    from gpt2repro.files import read_json

    source = resolve_model(name, any_architecture=True)
    logging.disable_progress_bar()  # in `_ours` as well: a second of weights needs no bar
    how = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}  # nothing is ever unpickled
    how["attn_implementation"] = None  # transformers' choice: a config.json could name a kernel to be fetched and run
    try:
        config = read_json(Path(cached_file(source, "config.json")))  # from the directory, the cache or the Hub
        if config.get("model_type") in OUR_LAYOUT:
            from modeling_gpt2repro import GPT2ReproForCausalLM

            model, loaded = GPT2ReproForCausalLM.from_pretrained(source, **how)
        else:
            how |= {"trust_remote_code": trust_remote_code}
            how["config"] = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            how["config"]._attn_implementation = None  # see above: this name is not overridden by the argument
            model, loaded = AutoModelForCausalLM.from_pretrained(source, **how)
    except SafetensorError as error:
        raise InputError(f"the weights of {name} are damaged ({error}); copy or download them again") from None
    except Exception as error:
        what = f"cannot load a causal language model from {name}"
        if "trust_remote_code" in str(error):
            advice = "it brings its own code; if you trust its authors, start again with --trust_remote_code"
            raise InputError(f"{what}: {advice}") from None
        raise _not_loaded(what, error) from None
    if loaded["missing_keys"]:
        absent = sorted(loaded["missing_keys"])
        raise InputError(
            f"the weights of {name} are incomplete: {len(absent)} tensors are missing, such as {absent[0]}"
        )
    tokenizer = load_tokenizer(source)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    model = model.to(device).eval()
    if config["model_type"] in OUR_LAYOUT and not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(f"the weights of {name} hold NaN or infinity, so it computes nothing; take another checkpoint")
    if model.device.type == "cuda" and hasattr(model, "pad_head"):
        model.pad_head()
    return model, tokenizer


def plain_twin(model):
    """The GPT-2 (ours or transformers') of the same configuration on the meta device: `model` before any edit.

    None if `model` is of any other class, also of a subclass.
    """
    import copy

    import torch
    from transformers import GPT2LMHeadModel

    from modeling_gpt2repro import GPT2ReproForCausalLM

    if type(model) not in (GPT2ReproForCausalLM, GPT2LMHeadModel):
        return None
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).eval()
    if hasattr(twin, "pad_head") and type(model.lm_head) is not type(twin.lm_head):
        twin.pad_head()  # `pad_head` changes the class of a head, not what it computes
    return twin


def load_for_comparison(name: str | Path):
    """A model of ours in fp32 on the CPU, without a tokenizer: the reference for its native export.

    Its checksums are the caller's part: export and push have compared them.
    """
    from gpt2repro.checkpoint.reader import find_model

    return _ours(find_model(str(name)), f"cannot load a GPT-2 from {name}", attn_implementation=None).eval()


def _ours(source: str, said: str, **how):
    """The model at `source` in fp32. Raises: InputError that begins as `said`, where it cannot be loaded."""
    import torch
    from transformers.utils import logging

    from modeling_gpt2repro import GPT2ReproForCausalLM

    logging.disable_progress_bar()
    try:  # nothing is ever unpickled
        return GPT2ReproForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **how)
    except Exception as error:
        raise _not_loaded(said, error) from error


def build_model(config, vocab_size: int, tokenizer):
    """A training run's model on the CPU, with random weights (the same on all machines) or those of `init_from`.

    `config` is a TrainConfig; `vocab_size` is that of the data.

    Raises: InputError if `init_from` is no GPT-2, or too small for the data.
    """
    import torch

    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(config.seed)
    if config.init_from is not None:
        model = _first_weights(config, vocab_size, tokenizer)
    else:
        sizes = {name: getattr(config, name) for name in (*ARCHITECTURE, *DROPOUT)}
        sizes |= {"vocab_size": config.vocab_size or vocab_size}
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        kernel = {"attn_implementation": config.attn_implementation}
        try:
            model = GPT2ReproForCausalLM._from_config(GPT2ReproConfig(**sizes, **ends), dtype=torch.float32, **kernel)
        except ImportError as error:
            raise InputError(
                f"attn_implementation={config.attn_implementation}: {first_line(error)}; try sdpa"
            ) from None
        if config.zero_init:
            for module in model.modules():
                if getattr(module, "feeds_the_residual_stream", False):
                    torch.nn.init.zeros_(module.weight)
    if config.precision == "fp64":
        model = model.double()
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def _first_weights(config, vocab_size: int, tokenizer):
    """The model that `init_from` names, with the run's dropout. Raises: InputError as in `build_model`."""
    from gpt2repro.checkpoint.reader import resolve_model
    from gpt2repro.data.tokenization import fingerprint, load_tokenizer

    source = resolve_model(config.init_from)
    how = {name: getattr(config, name) for name in ("attn_implementation", *DROPOUT)}
    model = _ours(source, f"init_from={config.init_from}", **how)
    if vocab_size > model.config.vocab_size:
        raise InputError(
            f"the data has a vocabulary of {vocab_size}, but {config.init_from} only of {model.config.vocab_size}; "
            "prepare the data with its tokenizer"
        )
    if config.seq_len > model.config.n_positions:
        raise InputError(f"seq_len={config.seq_len} is longer than n_positions={model.config.n_positions} of init_from")
    try:
        own = load_tokenizer(source)
    except InputError:
        if (Path(source) / "tokenizer.json").exists():
            raise
        say(f"warning: {config.init_from} has no tokenizer to compare with that of the data")
        return model
    # Fingerprints, not bytes of files: OpenAI's own files and our rebuilt ones are the same tokenizer.
    if fingerprint(own) != fingerprint(tokenizer):
        raise InputError(
            f"init_from={config.init_from} has another tokenizer than data={config.data}, so its weights would see "
            f"nonsense; prepare the data with it: gpt2repro prepare-text --tokenizer {config.init_from}"
        )
    return model


def compile_mode(how: str, device_type: str, world: int, *, sharded: bool) -> str:
    """What `--compile` comes to, "model", "block" or "off"; see `compile_model`."""
    if how != "auto":
        return how
    can_compile = device_type == "cuda" and sys.platform != "win32"  # Triton has no build for Windows
    return "off" if not can_compile else "model" if world == 1 and not sharded else "block"


def compile_model(model, how: str, device_type: str, world: int, *, sharded: bool = False) -> str:
    """torch.compile in place, before `prepare`: state-dict keys stay clean and autocast ends up inside the graph.

    Returns the mode that was used: "model", "block" or "off"; `how` may also be "auto".

    "model" traces forward and loss as one graph. Under DDP torch splits the backward pass at the borders of the
    gradient buckets, so communication overlaps with compute. FSDP2's hooks cannot be traced, so "model" is refused
    there.

    "block" makes one graph of every block and one of the cross-entropy. The head between them is called as a module,
    since FSDP2 gathers its weight in a hook. "block" is the default of several processes until both are compared on
    GPUs.

    Raises: InputError for "model" with sharded weights.
    """
    import torch

    if device_type == "cuda":
        model.pad_head()
    how = compile_mode(how, device_type, world, sharded=sharded)
    if how == "model":
        if sharded:
            raise InputError(
                "compile=model does not work with FSDP2: hooks gather the weights of each block when it is called, and "
                "one graph of the whole model has no room for them; try --compile block"
            )
        model.compile(fullgraph=True, dynamic=False)
    elif how == "block":
        # Torch splits the graph of a block whose gradients do not fit into one bucket of DDP (25 MB; a block of 124M
        # has 28 MB), and the split undoes fusions. Whole blocks are small enough to overlap with communication.
        torch._dynamo.config.optimize_ddp = False
        for block in model.transformer.h:
            block.compile(fullgraph=True, dynamic=False)
        # Uncompiled, the cross-entropy writes the logits in fp32 twice: 26 GB at 64 x 1024 tokens.
        model.cross_entropy = torch.compile(model.cross_entropy, fullgraph=True, dynamic=False)
    return how
