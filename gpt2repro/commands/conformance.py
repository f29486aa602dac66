"""Runs a checkpoint in the programs that people use, and compares what each computes with transformers' GPT-2.

    gpt2repro conformance runs/quickstart
    gpt2repro conformance user/name@step-5000 --out conformance.json
    gpt2repro conformance runs/quickstart --only lm-evaluation-harness CTranslate2 --out conformance.json

Both forms are tried: the checkpoint as it is, with its own class, and its native gpt2 export. What is not installed is
skipped; `make conformance` installs it. An --out of the same weights keeps the rows of programs that this call does not
run, so that programs whose requirements disagree can be run from several environments. The exit code is 0 where nothing
failed.
"""

import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from gpt2repro.options import InputError, Problems, parse_options


@dataclass
class Options:
    model: list[str] = field(metadata={"positional": True})
    "A run, a model's directory, or a Hub id (also user/name@revision)."
    out: Path | None = None
    "JSON file for the rows; none: only the table."
    only: list[str] = field(default_factory=list)
    "Names of the programs to run; empty: all."
    converter: Path | None = None
    "llama.cpp's convert_hf_to_gguf.py; none: the one on the PATH."

    def problems(self) -> Problems:
        if len(self.model) != 1:
            yield f"expected one model, found {len(self.model)}"
        if self.converter is not None and not self.converter.is_file():
            yield f"--converter {self.converter} is no file"


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro conformance", description=__doc__)
    if Path(options.model[0]).exists():  # before a library reads it: nothing here needs the network
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gpt2repro.checkpoint.reader import fetch_model, resolve_model
    from gpt2repro.files import check_outputs, read_json_if_whole, sha256_of_ends, write_json
    from gpt2repro.publishing.conformance import CONSUMERS, CONVERTER, rows_of

    if strangers := sorted(set(options.only) - set(CONSUMERS)):
        raise InputError(f"--only: unknown {', '.join(strangers)}; the programs are {', '.join(CONSUMERS)}")
    check_outputs(options.out)
    source = resolve_model(options.model[0])
    source = Path(source if Path(source).is_dir() else fetch_model(source))
    found = options.converter or shutil.which(CONVERTER)
    rows = []
    for row in rows_of(source, options.only or list(CONSUMERS), found and Path(found)):
        print(line(row), flush=True)
        rows.append(row)
    if options.out is not None:
        key = lambda row: (list(CONSUMERS).index(row["consumer"]), row["form"] == "native")  # noqa: E731
        weights = sha256_of_ends(sorted(source.glob("*.safetensors")))
        before = read_json_if_whole(options.out) or {}
        rows_before = before.get("rows", []) if before.get("weights", weights) == weights else []
        kept = [row for row in rows_before if row["consumer"] in CONSUMERS]
        merged = {key(row): row for row in kept}
        for row in rows:
            # A program that was not installed has no version: any other row says more than such a one.
            if row["state"] != "skipped" or not merged.get(key(row), {}).get("version"):
                merged[key(row)] = row
        name = Path(options.model[0]).name if Path(options.model[0]).exists() else options.model[0]
        when = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.system()}-{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
        }
        write_json(
            options.out, {"model": name, "weights": weights, **when, "rows": [merged[one] for one in sorted(merged)]}
        )
    states = [row["state"] for row in rows]
    print(", ".join(f"{states.count(state)} {state}" for state in ("ok", "failed", "skipped")))
    return 0 if "failed" not in states else 1


def line(row: dict) -> str:
    """One row of the table."""
    difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
    tokens = {True: "equal", False: "differ", None: ""}[row["tokens_equal"]]
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f} s"
    cells = f"{row['consumer']:22} {row['version'] or '':10} {row['form']:7} {row['state']:8}"
    return f"{cells} {difference:>8} {tokens:7} {seconds:>7}  {row['detail']}".rstrip()
