"""Checkpoints of nanoGPT, build-nanogpt and llm.c -> the tensors and config fields of transformers' GPT-2.

    ckpt.pt | model_19072.pt | gpt2_124M.bin  --read_*-->  Imported(config, tensors, notes)

Knows the foreign formats, and no model class: the command builds the model and looks whether it predicts anything.
Nothing in a file is executed: pickles are read with `weights_only=True`, and a class that only holds numbers replaces
build-nanogpt's own configuration class.

Sources: nanoGPT `train.py` and `model.py`; build-nanogpt `train_gpt2.py`, whose format ShallowU/Reproduce-GPT2-124M
keeps; llm.c `train_gpt2.py` (`write_model`) and `train_gpt2.cu` (`gpt2_write_to_checkpoint`).
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gpt2repro.options import InputError, first_line

GPT2_VOCAB_SIZE = 50257
# nn.Linear keeps (out, in), GPT-2's Conv1D (in, out): https://github.com/karpathy/nanoGPT/blob/master/model.py
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

PICKLES = {  # format -> (the file that it writes, the key of the model's sizes, its activation)
    "nanogpt": ("nanoGPT's ckpt.pt", "model_args", "gelu"),  # GELU with erf
    "build-nanogpt": ("build-nanogpt's model_NNNNN.pt", "config", "gelu_new"),  # GELU with tanh
}
LLMC_MAGIC = 20240326
LLMC_OTHER_MAGICS = {
    20240327: "a debug or optimizer state",
    20240328: "a tokenizer",
    20240520: "training tokens",
    20240801: "training tokens",
    20240803: "a Llama 3 model",
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}
LLMC_HEADER_BYTES = 256 * 4


@dataclass
class Imported:
    """A GPT-2 in transformers' names and layout; `notes` name every change beyond a copy."""

    config: dict
    tensors: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)


class _Numbers:
    """Replaces a checkpoint's own GPTConfig: holds the attributes that the pickle sets, runs nothing."""


def read_checkpoint(kind: str, path: str | Path) -> Imported:
    """The checkpoint at `path`, which `kind` (nanogpt, build-nanogpt or llm.c) wrote.

    Raises: InputError naming what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--input {path}: no such file")
    return read_llmc(path) if kind == "llm.c" else read_pickle(path, *PICKLES[kind])


def read_pickle(path: Path, file: str, sizes_key: str, activation: str) -> Imported:
    """A file of torch.save by nanoGPT (biases optional), build-nanogpt or ShallowU; the vocabulary may be padded."""
    checkpoint = _load_pickle(path)
    if not isinstance(checkpoint, dict) or not {"model", sizes_key} <= checkpoint.keys():
        keys = f"a dict with {sorted(map(str, checkpoint))}" if isinstance(checkpoint, dict) else ""
        raise InputError(f"{path}: {file} has 'model' and '{sizes_key}', found {keys or type(checkpoint).__name__}")
    state, sizes = checkpoint["model"], checkpoint[sizes_key]
    if not isinstance(state, dict):
        raise InputError(f"{path}: 'model' should be a state dict, found {type(state).__name__}")
    sizes = vars(sizes) if isinstance(sizes, _Numbers) else sizes
    if not isinstance(sizes, dict):
        raise InputError(f"{path}: expected the model's sizes in a dict or a GPTConfig, found {type(sizes).__name__}")
    imported = _from_linear_layout(path, state, sizes, activation)
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, RuntimeError):  # a file may say anything
        step, val_loss = checkpoint["step"], float(checkpoint["val_loss"])
        imported.notes.append(f"the file says: step {step:d}, val_loss {val_loss:.4f}")
    return imported


def read_llmc(path: Path) -> Imported:
    """llm.c's `model_NNNNNNNN.bin`: 256 int32 of header, then each tensor of all layers; fp32 (v3) or bf16 (v5)."""
    size = path.stat().st_size
    if size < LLMC_HEADER_BYTES:
        raise InputError(f"{path} has {size} bytes, less than llm.c's header of {LLMC_HEADER_BYTES}")
    magic, version, T, V, L, H, C, padded_V = np.fromfile(path, dtype="<i4", count=8).tolist()
    if magic != LLMC_MAGIC:
        what = f"llm.c marks {LLMC_OTHER_MAGICS[magic]} so" if magic in LLMC_OTHER_MAGICS else "not llm.c's"
        raise InputError(f"{path} begins with {magic} ({what}); a GPT-2 of llm.c begins with {LLMC_MAGIC}")
    if version not in LLMC_DTYPES:
        raise InputError(
            f"{path} is llm.c's version {version}; 3 (fp32) and 5 (bf16) can be read: write it again with them"
        )
    if min(T, V, L, H, C) < 1 or padded_V < V:
        raise InputError(
            f"{path}: impossible sizes in the header: {T=} {V=} {L=} {H=} {C=} padded_vocab_size={padded_V}"
        )

    dtype = LLMC_DTYPES[version]
    block = _block_shapes(C)  # in the file's order
    numbers = (padded_V + T + 2) * C + L * sum(math.prod(shape) for shape in block.values())
    expected = LLMC_HEADER_BYTES + numbers * dtype.itemsize
    if size != expected:
        raise InputError(f"{path} has {size:,} bytes, its header promises {expected:,}: cut off, or not a GPT-2 model")

    shapes = {"wte.weight": (padded_V, C), "wpe.weight": (T, C)}
    shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items() for layer in range(L)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    # "c", copy on write: torch warns of arrays that nobody may write to.
    integers = np.memmap(path, dtype=f"<i{dtype.itemsize}", mode="c", offset=LLMC_HEADER_BYTES)
    parts = torch.from_numpy(integers).view(dtype).split([math.prod(shape) for shape in shapes.values()])
    state = {f"transformer.{name}": part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    sizes = {"block_size": T, "vocab_size": V, "n_layer": L, "n_head": H, "n_embd": C}
    return _from_linear_layout(path, state, sizes, "gelu_new")


def read_nanogpt_characters(path: Path) -> list[str]:
    """The characters of nanoGPT's `meta.pkl` in the order of their ids. Raises: InputError."""
    try:
        with path.open("rb") as file:
            itos = _DataOnly(file).load()["itos"]
        characters = [itos[id] for id in range(len(itos))]
    except FileNotFoundError:
        raise InputError(f"--meta {path}: no such file") from None
    except Exception as error:  # a hostile pickle can raise anything
        raise InputError(f"--meta {path} is not nanoGPT's meta.pkl: {type(error).__name__}: {error}") from None
    if not all(isinstance(character, str) and len(character) == 1 for character in characters):
        raise InputError(f"--meta {path}: 'itos' should map each id to one character")
    return characters


class _DataOnly(pickle.Unpickler):
    """Reads dicts, lists, text and numbers; refuses every class and function."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain data is read")


def _load_pickle(path: Path):
    """The object in a file of torch.save; nothing of the file is executed. Raises: InputError."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file, or a damaged one: torch.load says it better
        named = []
    configs = [name for name in named if name.rpartition(".")[2] == "GPTConfig"]
    if refused := sorted(set(named) - set(configs)):
        raise _would_run(path, refused)
    try:
        with torch.serialization.safe_globals([(_Numbers, name) for name in configs]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling a damaged or hostile file can raise anything
        if refused := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):  # a file from before torch 1.6
            raise _would_run(path, [refused[1]]) from None
        raise InputError(f"{path} is not a readable PyTorch checkpoint: {first_line(error)}") from None


def _would_run(path: Path, names: list[str]) -> InputError:
    return InputError(
        f"{path} would run {', '.join(names)} while being unpickled, so it is not read; a GPT checkpoint names nothing "
        "but its GPTConfig"
    )


def _from_linear_layout(path: Path, state: dict, sizes: dict, activation: str) -> Imported:
    """A state dict of nanoGPT's family -> GPT-2's names, (in, out) matrices, biases, and no padded vocabulary rows."""
    notes: list[str] = []
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    if wrong := [name for name in names if type(sizes.get(name)) is not int or sizes[name] < 1]:
        raise InputError(f"{path}: the model's sizes lack a positive {', '.join(wrong)}")
    dropout = sizes.get("dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise InputError(f"{path}: the model's dropout is {str(dropout)[:80]!r}, expected a number from 0 to below 1")
    T, V, L, H, C = (sizes[name] for name in names)
    if len(state) < L:
        raise InputError(f"{path} has {len(state)} tensors, too few for its n_layer={L}")
    # torch.compile and DistributedDataParallel put these words before each name.
    state = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}

    for name, value in state.items():
        found = type(value).__name__
        if isinstance(value, torch.Tensor):
            dense = value.layout == torch.strided and not value.is_nested and not value.is_meta
            if dense and value.dtype in DTYPES and value.dim() > 0:
                continue
            shape = "varying shape" if value.is_nested else f"shape {tuple(value.shape)}"
            found = f"{value.dtype} of {shape} and layout {value.layout} on {value.device}"
        raise InputError(
            f"{path}: {name} is not a tensor of floating-point numbers that can be read but {found}: save it dense, as "
            "fp32, bf16 or fp16"
        )

    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.double(), state.setdefault("transformer.wte.weight", head).double()):
        raise InputError(
            f"{path}: lm_head differs from the token embeddings; GPT-2 ties them, so this is another model"
        )

    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    shapes |= {f"h.{layer}.{name}": shape for layer in range(L) for name, shape in _block_shapes(C).items()}
    shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}

    if missing := [name for name in shapes if name not in state and not name.endswith(".bias")]:
        raise InputError(f"{path} lacks {missing[0]}{_and_more(missing)}")
    if unknown := [name for name in state if name not in shapes]:
        raise InputError(f"{path} has {unknown[0]}{_and_more(unknown)}, which a GPT-2 of these sizes has not")
    dtype = state["transformer.wte.weight"].dtype
    if absent := [name for name in shapes if name not in state]:
        notes.append(f"{len(absent)} biases are absent (bias=False) and become zeros: the same function")
        state |= {name: torch.zeros(shapes[name], dtype=dtype) for name in absent}

    rows = state["transformer.wte.weight"].shape[0]
    if rows > V and rows - V < 128:  # llm.c states the true size and pads the tensor
        shapes["transformer.wte.weight"] = (rows, C)
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise InputError(f"{path}: {name} has shape {tuple(state[name].shape)}, its sizes promise {shape}")
    vocab_size = GPT2_VOCAB_SIZE if GPT2_VOCAB_SIZE < V <= 50304 else V
    if rows > vocab_size:
        notes.append(f"{rows - vocab_size} padding rows of the vocabulary were dropped: {rows} -> {vocab_size}")
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]

    tensors = {}
    for name in shapes:
        tensor = state[name].t() if name.endswith(TRANSPOSED) else state[name]
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # the file's memory map can go
    config = {"vocab_size": vocab_size, "n_positions": T, "n_embd": C, "n_layer": L, "n_head": H}
    config |= {"activation_function": activation, "embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
    if vocab_size != GPT2_VOCAB_SIZE:
        config |= {"bos_token_id": None, "eos_token_id": None}
    return Imported(config, tensors, notes)


def _block_shapes(C: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer of nanoGPT's family and of llm.c, whose matrices are (out, in)."""
    return {
        "ln_1.weight": (C,), "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,), "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C), "mlp.c_proj.bias": (C,),
    }  # fmt: skip


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
