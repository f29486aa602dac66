"""Writes a model in the form of another program: a plain gpt2, ONNX, CTranslate2, or GGUF for llama.cpp.

    gpt2repro export --model runs/124M --out exported/gpt2
    gpt2repro export --model user/name@step-5000 --out exported/ct2 --format ct2
    gpt2repro export --model runs/124M --out exported/gguf --format gguf --converter llama.cpp/convert_hf_to_gguf.py

Every form is made from the plain gpt2, after a comparison of its logits with the model's; then the result is loaded and
compared too. export.json beside it names the converter, its version and the differences.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2repro.models import load_for_comparison
from gpt2repro.options import InputError, Problems, parse_options, taken

# |logit difference| in fp32; llama.cpp keeps its cache in fp16.
TOLERANCE = {"onnx": 1e-3, "ct2": 1e-3, "gguf": 0.1}
CONVERTER = "convert_hf_to_gguf.py"


@dataclass
class Options:
    model: str
    "A run, a model's directory, or a Hub id (also user/name@revision)."
    out: Path
    "New directory for the result."
    format: Literal["gpt2", "gguf", "onnx", "ct2"] = "gpt2"
    "gpt2: transformers' own class. onnx and ct2 need `pip install 'gpt2repro[export]'`, gguf `'gpt2repro[gguf]'`."
    converter: Path | None = None
    "gguf: llama.cpp's convert_hf_to_gguf.py; none: the one on the PATH."

    def problems(self) -> Problems:
        yield from taken(self.out)
        if self.converter is not None and self.format != "gguf":
            yield "--converter belongs to --format gguf"
        if self.format == "gguf" and not (self.converter or Path(shutil.which(CONVERTER) or "nowhere")).is_file():
            yield (
                f"--format gguf needs --converter PATH/{CONVERTER} (it lies in llama.cpp, and in vendor/llama.cpp of "
                "llama-cpp-python's source package), and pip install 'gpt2repro[gguf]'"
            )


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro export", description=__doc__)
    from gpt2repro.checkpoint.reader import fetch_model, resolve_model
    from gpt2repro.files import write_json
    from gpt2repro.publishing import exports

    source = resolve_model(options.model)
    source = source if Path(source).is_dir() else fetch_model(source)
    model = load_for_comparison(source)
    with exports.new_directory(options.out) as out, tempfile.TemporaryDirectory(dir=out.parent) as work:
        # A copy, since whoever saves a fine-tuned model there would write through a link into the run's checkpoint.
        plain = options.format == "gpt2"
        native = exports.export_native(source, out if plain else Path(work), put=shutil.copy2 if plain else None)
        record = {"model": options.model, "format": options.format}
        record["native_difference"] = exports.check_native(native, model)
        print(f"plain gpt2: logits differ by at most {record['native_difference']:.1e}")
        if options.format != "gpt2":
            convert = {"onnx": exports.to_onnx, "ct2": exports.to_ct2, "gguf": exports.to_gguf}[options.format]
            tool = [options.converter or Path(shutil.which(CONVERTER))] if options.format == "gguf" else []
            try:
                record["converter"], logits = convert(native, out, *tool)
            except ImportError as error:
                raise InputError(f"this format needs {error.name}: pip install 'gpt2repro[export]'") from None
            record["difference"] = None if logits is None else exports.compare(model, logits, TOLERANCE[options.format])
            result = "not run: pip install 'gpt2repro[gguf]'"
            result = result if logits is None else f"logits differ by at most {record['difference']:.1e}"
            print(f"{options.format}, by {record['converter']}: {result}")
        write_json(out / "export.json", record)
    print(options.out)
    return 0
