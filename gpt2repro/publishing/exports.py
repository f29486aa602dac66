"""A model of ours in the forms that other programs take, each compared with the model before anybody uses it.

directory --export_native--> a plain `gpt2`: the same weights file, another config.json
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from gpt2repro.files import name_aside, read_json, sha256_of
from gpt2repro.options import InputError

# The names of a model's files; any other file in a model's directory is private.
MODEL_FILE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|average)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece)\.model|chat_template\.jinja|LICENSE(\.md|\.txt)?"
    r"|(configuration|modeling)_gpt2repro\.py"
)
# llama.cpp's converter recognises a tokenizer by the ids of one text, so it does not know an own vocabulary, even one
# with GPT-2's rules. This program starts the converter and names those rules (llama.cpp of 2026: `conversion/`).
AS_GPT2 = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
here = pathlib.Path(sys.argv[0]).resolve().parent
sys.path[:0] = [str(here), str(here / "gguf-py")]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NATIVE_TOLERANCE = 1e-4  # |logit difference| in fp32; the two classes do the same sums in another order


def export_native(source: str | Path, target: str | Path, *, put: Callable | None = None) -> Path:
    """A directory of ours -> one of type `gpt2` that needs no remote code: same weights file, rewritten config.json.

    Files are hard links unless `put` is another way, such as `shutil.copy2` for a directory that its owner may change.
    transformers no longer reads `n_ctx`, but converters such as llama.cpp's do.

    Raises: InputError where `source` is no model of ours or `target` is not empty.
    """
    source, target = Path(source), Path(target)
    config = read_json(source / "config.json")
    if config.get("model_type") not in ("gpt2repro", "gpt2"):
        raise InputError(f"{source} is a model of type {config.get('model_type')!r}; only gpt2repro can become gpt2")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is not empty; choose another directory for the native export")
    target.mkdir(parents=True, exist_ok=True)
    config.pop("auto_map", None)
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": config["n_positions"]}
    for path in sorted(source.iterdir()):
        if is_model_file(path) and path.suffix != ".py" and path.name != "config.json":
            (put or link)(path.resolve(), target / path.name)  # the Hub's cache keeps links to the files
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def is_model_file(path: Path) -> bool:
    """Whether a path of a model's directory is a file of the model; pipes and directories of such names are not."""
    return MODEL_FILE.fullmatch(path.name) is not None and path.is_file()


def link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it to another filesystem, or to one without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def check_native(directory: str | Path, model) -> float:
    """Largest |logit difference| between the native directory in plain transformers and our `model` (fp32, CPU).

    Raises: InputError where they do not compute the same; then nothing may be published.
    """
    import torch
    from transformers import GPT2LMHeadModel

    native, report = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    problems = [f"{kind}: {sorted(map(str, names))[:3]}" for kind, names in report.items() if names]
    difference, largest = difference_of(model, lambda ids: native.eval()(ids).logits, (2, 64))
    if problems or not difference <= NATIVE_TOLERANCE * max(1.0, largest):
        detail = "; ".join(problems) or f"logits differ by {difference:.2e}"
        raise InputError(f"the native export does not compute what the model computes ({detail}); it is not used")
    return difference


def compare(model, logits: Callable, tolerance: float) -> float:
    """Largest |logit difference| between our `model` (fp32, CPU) and a converted one, on one row of random ids.

    Raises: InputError where the difference is more than `tolerance`, or not a number.
    """
    difference, _ = difference_of(model, logits, (1, 32))
    if not difference <= tolerance:
        raise InputError(f"the result computes something else: logits differ by {difference:.2e}; nothing is written")
    return difference


def difference_of(model, logits: Callable, shape: tuple[int, int]) -> tuple[float, float]:
    """(largest |difference| between `model`'s logits and `logits(ids)`, largest |logit|) on random ids of `shape`."""
    import torch

    rows, length = shape
    size = (rows, min(length, model.config.n_positions))
    ids = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.eval()(ids).logits
        return float((expected - torch.as_tensor(logits(ids))).abs().max()), float(expected.abs().max())


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends without an error.

    Raises: InputError where it cannot be written.
    """
    aside = name_aside(out)
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.is_dir():
            out.rmdir()  # empty, as checked: Windows renames onto nothing
        aside.rename(out)
    except OSError as error:
        raise InputError(f"--out {out} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def to_onnx(native: Path, out: Path) -> tuple[str, Callable]:
    """Write model.onnx for any batch and length, beside the tokenizer; returns the converter's name and its logits."""
    import onnx  # noqa: F401 - torch.onnx writes with it and with onnxscript
    import onnxruntime
    import onnxscript  # noqa: F401
    import torch
    from transformers import GPT2LMHeadModel

    how = {"dtype": torch.float32, "attn_implementation": "eager", "use_cache": False}
    plain = GPT2LMHeadModel.from_pretrained(native, **how).eval()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", max=plain.config.n_positions)
    torch.onnx.export(
        plain,
        (torch.zeros(2, min(8, plain.config.n_positions), dtype=torch.long),),
        out / "model.onnx",
        input_names=["input_ids"],
        output_names=["logits"],  # (B, T, V)
        dynamic_shapes={"input_ids": {0: batch, 1: time}},
        dynamo=True,
        verbose=False,
    )
    for path in native.glob("*.*"):
        if path.suffix != ".safetensors":
            shutil.copy2(path, out / path.name)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return f"torch.onnx {torch.__version__}", lambda ids: session.run(None, {"input_ids": ids.numpy()})[0][0]


def to_ct2(native: Path, out: Path) -> tuple[str, Callable]:
    """Write CTranslate2's files in fp32, beside the tokenizer; returns as `to_onnx` does."""
    import ctranslate2
    import numpy as np

    need_tokenizer(native)
    files = [path.name for path in native.iterdir() if re.search(r"token|^vocab\.json$|^merges\.txt$", path.name)]
    converter = ctranslate2.converters.TransformersConverter(str(native), copy_files=files)
    with tempfile.TemporaryDirectory(dir=native.parent) as work:  # it would first empty `out`
        for path in Path(converter.convert(work, force=True)).iterdir():
            path.rename(out / path.name)
    generator = ctranslate2.Generator(str(out), device="cpu", compute_type="float32")
    logits = lambda ids: np.array(generator.forward_batch(ids.tolist()))[0]  # noqa: E731
    return f"ctranslate2 {ctranslate2.__version__}", logits


def to_gguf(native: Path, out: Path, converter: Path) -> tuple[str, Callable | None]:
    """Write model.gguf in fp32 by llama.cpp's convert_hf_to_gguf.py; no logits where llama-cpp-python is missing."""
    need_tokenizer(native)
    gguf = out / "model.gguf"
    start = ["-c", AS_GPT2] if _splits_as_gpt2(native) else []
    command = [sys.executable, *start, str(converter), str(native), "--outfile", str(gguf), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not gguf.is_file():
        reason = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        hint = "; its packages come with pip install 'gpt2repro[gguf]'" if "ModuleNotFoundError" in reason else ""
        raise InputError(f"{converter} refused the model: {reason}{hint}")
    # The version of the package that the converter imports: in llama.cpp's tree its own one.
    own = converter.parent / "gguf-py" / "pyproject.toml"
    found = re.search(r'^version\s*=\s*"(.+?)"', own.read_text(), re.MULTILINE) if own.is_file() else None
    gguf_version = found[1] if found else version("gguf")
    name = f"{converter.name} (sha256 {sha256_of(converter)[:12]}), gguf {gguf_version}"
    try:
        import llama_cpp
    except ImportError:
        return name, None
    llm = llama_cpp.Llama(str(gguf), n_ctx=0, logits_all=True, verbose=False)

    def logits(ids):
        llm.reset()
        llm.eval(ids[0].tolist())
        return llm.scores[: ids.shape[1]]

    return name, logits


def _splits_as_gpt2(native: Path) -> bool:
    """Whether the tokenizer is byte-level BPE with GPT-2's own pre-tokenisation, as `prepare-text` makes it."""
    tokenizer = read_json(native / "tokenizer.json")
    rules = tokenizer.get("pre_tokenizer") or {}
    plain = rules.get("type") == "ByteLevel" and rules.get("use_regex", True) and not rules.get("add_prefix_space")
    return bool(plain and tokenizer.get("normalizer") is None and tokenizer["model"].get("type") == "BPE")


def need_tokenizer(native: Path) -> None:
    if not (native / "tokenizer.json").is_file():
        raise InputError("this format holds the tokenizer, and the model has none (tokenizer.json); try gpt2 or onnx")
