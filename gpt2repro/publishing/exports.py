"""A model of ours in the forms that other programs take, each compared with the model before anybody uses it.

directory --export_native--> a plain `gpt2`: the same weights file, another config.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from gpt2repro.files import read_json
from gpt2repro.options import InputError

# What belongs to a model's directory; anything else there is somebody's own.
MODEL_FILE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|average)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece)\.model|chat_template\.jinja|LICENSE(\.md|\.txt)?"
    r"|(configuration|modeling)_gpt2repro\.py"
)
NATIVE_TOLERANCE = 1e-4  # |logit difference| in fp32; the two classes do the same sums in another order


def export_native(source: str | Path, target: str | Path) -> Path:
    """A directory of ours -> one of type `gpt2` that needs no remote code: same weights file, rewritten config.json.

    `n_ctx` is not read by transformers any more, but by llm.cpp-like converters (llama.cpp).

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
        if MODEL_FILE.fullmatch(path.name) and path.suffix != ".py" and path.name != "config.json":
            link(path.resolve(), target / path.name)  # the Hub's cache keeps links to the files
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy on another filesystem and on one without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def check_native(directory: str | Path, model) -> float:
    """Largest |logit difference| between the native directory in plain transformers and our `model` (fp32, CPU).

    Raises: InputError where they do not compute the same: then nothing should be published.
    """
    import torch
    from transformers import GPT2LMHeadModel

    native, report = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    problems = [f"{kind}: {sorted(map(str, names))[:3]}" for kind, names in report.items() if names]
    T, V = min(64, model.config.n_positions), model.config.vocab_size
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model.eval()(ids).logits, native.eval()(ids).logits
    difference = float((expected - found).abs().max())
    if problems or not difference <= NATIVE_TOLERANCE * max(1.0, float(expected.abs().max())):
        detail = "; ".join(problems) or f"logits differ by {difference:.2e}"
        raise InputError(f"the native export does not compute what the model computes ({detail}); it is not used")
    return difference
