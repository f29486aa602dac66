"""An outside campaign: seeded inputs and faults thrown at every command; what came of each is counted and recorded.

    python tests/campaign.py --inputs 500 --seed 1 --out results/campaign
    python tests/campaign.py --faults --seed 1 --out results/campaign          mounts small disks, so it needs root

Every input runs in a process of its own, forked from this one, which has imported everything. The number of an input
and the seed decide all about it: what is recorded already is not run again, and `--only 17` shows one once more.

An input is `refused` (exit code 2 and one sentence), `done` (0) or, where signals and bad numbers may end it, `ended`
(3, 4). The rest are findings: `traceback`, `hang`, `crash`, and `wrong` where a damaged input was taken for a whole
one: a case that must be refused was not, or its result is not that of the undamaged input.
Kills have their own tool: gpt2repro verify-resume.
"""

import argparse
import dataclasses
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}

SECONDS = 240  # for one input; all are tiny, but the machine may be busy
TRAIN, PREPARE, EVAL = "train_accelerate", "prepare_fineweb", "eval_hellaswag"
ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "gpt2repro.commands"
NASTY_TEXT = [
    "", " ", "none", "nan", "-1", "0", "1e400", "1e-400", str(2**63), str(10**40), "true", "[]", "{}", "1:30:00",
    "0x10", ".", "..", "/", "~", "/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem", "no/such/place",
    "a" * 300, "x/" * 3000, "a\nb", "\udce9\udc80", "é" * 50, "\u202ex", "$\\frac{", "%s%n", "{0}", "*", "**/*",
    "user/name", "user/name@", "hf://", "hf://user/name", "stream:", "stream:no/such/*.jsonl", "hub:",
    "hub:user/name@x", "http://127.0.0.1:9/x", "--", "a,b", "1,2,", "cuda:99", "meta", "banana",
]  # fmt: skip
NASTY_JSON = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 1.5, -0.0, 1e308, float("nan"), "", "x", "..", "/etc/passwd",
    "a\0b", "\ud800", [], {}, [None], [[]], {"": None}, "x" * 5000,
]  # fmt: skip
NASTY_YAML = [
    "010", "0x10", "0o17", "0b11", "1:30:00", "1:30.5", "1_000", "1e3", "1e400", ".inf", "-.inf", ".nan", "~", "",
    "yes", "off", "2001-01-01", "2001-01-01 10:00:00", "!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]",
    "!!timestamp 1", "!!python/name:os.system", "!!int x", "!!float x", "!!int '5'", "!!str 5", "&a 1", "*a", "[1]",
    "[[]]", "{a: 1}", "'", "|\n  x\n  y", ">-\n  x", "? x", "\t1", "'a\\0b'", '"a\\0b"', '"\\ud800"', "a: b: c", "- 1",
    "%", "@", "1 # 2", "\x00",
]  # fmt: skip
FIELDS = {
    TRAIN: "TrainConfig", PREPARE: "Options", EVAL: "Options",
    **{f"{COMMANDS}.{name}": "Options" for name in (
        "prepare_text", "generate", "plot", "push", "import_checkpoint", "export", "demo", "verify_resume",
        "perplexity", "conformance", "average", "compare",
    )},
}  # fmt: skip
NAMES = ("interval.npy", "train.bin", "val.bin", "x_train_val_1.npy", "TRAIN.npy", "a\nval.npy", "val_\udce9.bin")
BENCHMARKS = ("train", "data", "tokenize", "hellaswag", "generate", "checkpoint", "all", "table")


@dataclass
class Case:
    """One input: a program, its arguments, and how to tell a wrong result from a right one."""

    program: str
    argv: list
    must_refuse: bool = False
    result: Callable[[], object] | None = None  # what an accepted input led to
    expected: object = None  # and what it must have led to
    damage: str = ""
    stdout: Path | None = None
    meanwhile: Callable[[int], None] | None = None  # called with the process' id once it runs
    after: Callable[[], list[str]] = list  # further findings


# --- what the inputs are made of


@dataclass
class Base:
    """Whole inputs, made once: every case damages a copy of one."""

    root: Path

    def __post_init__(self):
        import tiny_run

        self.shards, self.run, self.texts = self.root / "shards", self.root / "run", self.root / "texts"
        self.flags = {"max_steps": 2, "save_steps": 2, "eval_steps": 2, "val_tokens": 128}
        if not self.run.is_dir():
            tiny_run.write_tiny_shards(self.shards)
            code, said = forked(Case(TRAIN, self.train(self.shards, self.run)), self.root)
            assert code == 0, said
            self.texts.mkdir()
            rows = [{"text": f"the lazy dog number {n} jumps over the fox", "prompt": "the dog"} for n in range(30)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (self.texts / "rows.jsonl").write_text(lines)
            (self.texts / "prose.txt").write_text("\n".join(row["text"] for row in rows))
            shutil.copy(ROOT / "tests/data/pinned/texts/packed.jsonl.gz", self.texts)
            shutil.copy(ROOT / "tests/data/pinned/texts/rows.parquet", self.texts)
            example = {
                "ind": 0,
                "activity_label": "x",
                "ctx_a": "the lazy",
                "ctx_b": "",
                "ctx": "the lazy",
                "endings": [" dog", " fox", " box", " jug"],
                "label": 0,
            }
            (self.texts / "examples.jsonl").write_text(
                "".join(json.dumps({**example, "ind": n}) + "\n" for n in range(9))
            )
            write_foreign(self.root / "foreign.pt")
            foreign = self.root / "foreign"
            foreign.mkdir()
            tokens = np.random.default_rng(0).integers(29, size=4000)
            np.save(foreign / "some_train_000001.npy", tokens.astype("<u2"))
            np.save(foreign / "some_val_000000.npy", tokens[:500].astype("<u2"))
        self.losses = losses(self.run)
        self.bare = self.root / "bare"
        if not self.bare.is_dir():
            leave = shutil.ignore_patterns("trainer_state", "checksums.json")
            shutil.copytree(self.run / "checkpoints/step_000002", self.bare, ignore=leave)
        self.checkpoint = self.run / "checkpoints/step_000002"

    def train(self, data, run_dir, **changes) -> list[str]:
        import tiny_run

        return tiny_run.flags(data, run_dir, **{**self.flags, **changes})


def write_foreign(path: Path) -> None:
    import torch
    from test_importers import linear_state, sizes

    torch.save({"model": linear_state(97), "model_args": sizes(97)}, path)


def losses(run_dir: Path) -> list:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[one["step"], one.get("loss"), one.get("val_loss")] for one in lines]


KINDS = ("missing", "directory", "link", "device", "dangling", "pipe")  # what may stand in a file's place


def damaged(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """The content with one thing wrong, and what."""
    if content[:1] == b"{" and chance.random() < 0.5:
        try:
            value = json.loads(content)
            what = twist(chance, value)
            return json.dumps(value).encode(), what
        except ValueError:
            pass
    at, length = chance.randrange(max(1, len(content))), chance.choice([1, 2, 8, 100])
    kind = chance.choice(["flip", "cut", "drop", "repeat", "insert", "number", "empty"])
    if kind == "flip":
        content = (
            content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :] if content else b"x"
        )
    elif kind == "cut":
        content = content[:at]
    elif kind == "drop":
        content = content[:at] + content[at + length :]
    elif kind == "repeat":
        content = content[: at + length] + content[at:]
    elif kind == "insert":
        junk = [
            b"\0",
            b"\xff\xfe",
            b"\n",
            b"\r",
            b"{" * 5000,
            b"\xe2\x80\xa8",
            b'"',
            b"\\ud800",
            b"9" * 5000,
            b"!!python/object:x ",
        ]
        content = content[:at] + chance.choice(junk) + content[at:]
    elif kind == "number":
        digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
        at = chance.choice(digits) if digits else 0
        content = (
            content[:at] + chance.choice([b"-1", b"1e999", b"NaN", b"99999999999999999999", b"0"]) + content[at + 1 :]
        )
    else:
        content = b""
    return content, f"{kind} at {at}"


def twist(chance: random.Random, value) -> str:
    """Replace or remove one value somewhere in a JSON value, in place."""
    path = ""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(list(keys))
        path += f".{key}"
        if isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        if chance.random() < 0.15:
            del value[key]
            return f"without {path}"
        value[key] = chance.choice(NASTY_JSON)
        return f"{path} = {str(value[key])[:20]!r}"


def damage_file(chance: random.Random, path: Path, *, kinds: tuple = KINDS) -> str:
    """Damage one file of a copied input, or put something of another kind into its place."""
    content = path.read_bytes()
    if chance.random() < 0.1:
        path.unlink()
        how = chance.choice(kinds)
        if how == "directory":
            path.mkdir()
        elif how == "link":
            path.symlink_to("/etc/hostname")
        elif how == "device":
            path.symlink_to("/dev/null")
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "dangling":
            path.symlink_to("nowhere")
        return f"{path.name} {how}"
    new, what = damaged(chance, content)
    path.write_bytes(new)
    return f"{path.name} {what}" + (" (unchanged)" if new == content else "")


# --- families of inputs: (chance, base, a directory of its own) -> Case


def simplest(base: Base, at: Path) -> dict[str, list]:
    """Every program's shortest meaningful arguments."""
    model, rows = ["--model", base.run, "--device", "cpu"], base.texts / "rows.jsonl"
    prepare = ["--out", at / "out", "--workers", "1"]
    return {
        TRAIN: base.train(base.shards, at / "run"),
        PREPARE: [
            *prepare,
            "--dataset",
            rows,
            "--subset",
            "none",
            "--val",
            "0.5",
            "--tokenizer",
            base.shards / "tokenizer",
        ],
        EVAL: [*model, "--data", base.texts / "examples.jsonl", "--limit", "2"],
        f"{COMMANDS}.prepare_text": [*prepare, "--input", rows, "--tokenizer", "char"],
        f"{COMMANDS}.generate": [*model, "--prompt", "the", "--max_new_tokens", "3"],
        f"{COMMANDS}.plot": [base.run, "--out", at / "x.png"],
        f"{COMMANDS}.push": ["--model", base.run, "--repo", "user/name"],
        f"{COMMANDS}.import_checkpoint": [
            "--out",
            at / "out",
            "--format",
            "nanogpt",
            "--input",
            base.root / "foreign.pt",
        ],
        f"{COMMANDS}.export": ["--model", base.run, "--out", at / "out"],
        f"{COMMANDS}.demo": ["--model", "no/such/model"],
        f"{COMMANDS}.verify_resume": ["--kills", "1", "--work_dir", at / "work", "--", "--data", "no/such/data"],
        f"{COMMANDS}.perplexity": [*model, "--data", base.texts / "prose.txt"],
        f"{COMMANDS}.conformance": [base.run, "--only", "no-such-program"],
        f"{COMMANDS}.average": [base.run, "--last", "1", "--device", "cpu", "--out", at / "out"],
        f"{COMMANDS}.compare": [base.run, "--out", at / "out.json"],
    }


def an_option(chance, base, at) -> Case:
    program = chance.choice(list(FIELDS))
    cls = getattr(importlib.import_module(program), FIELDS[program])
    field = chance.choice([field.name for field in dataclasses.fields(cls)] + ["config"])
    value = chance.choice(NASTY_TEXT)
    argv = simplest(base, at)[program]
    given = [f"--{field}={value}"] if chance.random() < 0.5 else [f"--{field}", value]
    heavy = {"max_steps", "kills", "n_layer", "n_embd", "max_new_tokens", "num_samples"}  # a right value may take hours
    if field in heavy and value.isdecimal() and int(value) > 10:
        value, given = "x", [f"--{field}", "x"]
    where = argv.index("--") if "--" in argv else len(argv)
    return Case(program, [*argv[:where], *given, *argv[where:]], damage=f"{field}={value[:30]!r}")


def a_benchmark(chance, base, at) -> Case:
    name = chance.choice(BENCHMARKS)
    cls = importlib.import_module(f"{COMMANDS}.bench.{name}")
    kinds = typing.get_type_hints(cls.Options) if hasattr(cls, "Options") else {}
    field = chance.choice([*kinds, "nothing"])
    value = chance.choice(["-1", "nan", "x", "1.5.2", "/dev/null/x", ""])
    value = value if "int" in str(kinds.get(field)) or "float" in str(kinds.get(field)) else "/dev/null/x"
    return Case("gpt2repro.__main__", ["bench", name, f"--{field}", value, "--no_such", "1"], must_refuse=True)


def a_preset(chance, base, at) -> Case:
    content, what = damaged(chance, (base.run / "config.yaml").read_bytes())
    (at / "preset.yaml").write_bytes(content)
    argv = ["--config", at / "preset.yaml", "--data", base.shards, "--run_dir", at / "run", "--max_steps", "2"]
    return Case(TRAIN, argv, damage=what)


def a_yaml_value(chance, base, at) -> Case:
    """One option of a run, or two lines for it, with a value that YAML reads in a way of its own."""
    lines = (base.run / "config.yaml").read_text().splitlines()
    number = chance.choice([n for n, line in enumerate(lines) if line[0].isalpha()])
    name, value = lines[number].partition(":")[0], chance.choice(NASTY_YAML)
    lines[number : number + chance.choice([0, 1, 1, 1])] = [f"{name}: {value}"]
    (at / "preset.yaml").write_text("\n".join(lines) + "\n")
    argv = ["--config", at / "preset.yaml", "--data", base.shards, "--run_dir", at / "run", "--max_steps", "2"]
    return Case(TRAIN, argv, damage=f"{name}: {value}")


def a_manifest(chance, base, at) -> Case:
    """A manifest that is well-formed and wrong: every one of these has to be refused."""
    shutil.copytree(base.shards, at / "data")
    manifest = json.loads((at / "data/manifest.json").read_text())
    train, val, tokenizer = manifest["splits"]["train"], manifest["splits"]["val"], manifest["tokenizer"]
    first, last = train["shards"][0], val["shards"][0]
    what, change = chance.choice(
        [
            ("val is train", lambda: val.update(train)),
            ("a shard twice", lambda: train.update(shards=[first, first], tokens=2 * train["tokens"])),
            ("names exchanged", lambda: (first.update(file=last["file"]), last.update(file="train_000000.bin"))),
            ("hashes exchanged", lambda: (first.update(sha256=last["sha256"]), last.update(sha256=first["sha256"]))),
            ("no training", lambda: manifest["splits"].pop("train")),
            ("no shards", lambda: train.update(shards=[], tokens=0)),
            ("a token more", lambda: (first.update(tokens=train["tokens"] + 1), train.update(tokens=first["tokens"]))),
            ("another dtype", lambda: manifest.update(dtype="uint32")),
            ("another end", lambda: tokenizer.update(eot_id=chance.randrange(tokenizer["eot_id"]))),
            ("a larger vocabulary", lambda: tokenizer.update(vocab_size=chance.choice([100, 50257, 2**30]))),
            ("a smaller vocabulary", lambda: tokenizer.update(vocab_size=chance.randrange(tokenizer["vocab_size"]))),
            ("another tokenizer", lambda: tokenizer.update(sha256=first["sha256"])),
            ("a place", lambda: first.update(file=chance.choice(["./", "../", "a/", "/"]) + first["file"])),
        ]
    )  # fmt: skip
    change()
    (at / "data/manifest.json").write_text(json.dumps(manifest))
    return Case(TRAIN, base.train(at / "data", at / "run"), must_refuse=True, damage=what)


def a_tokenizer(chance, base, at) -> Case:
    """Two ids exchanged, in the tokenizer of the data or of the first weights."""
    shutil.copytree(base.shards, at / "data")
    shutil.copytree(base.bare, at / "bare")
    place = chance.choice([at / "data/tokenizer", at / "bare"])
    content = json.loads((place / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = chance.sample(sorted(vocab), 2)
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (place / "tokenizer.json").write_text(json.dumps(content))
    argv = base.train(at / "data", at / "run", init_from=at / "bare")
    return Case(TRAIN, argv, must_refuse=True, damage=f"{place.name}: {one!r} and {other!r} exchanged")


def a_bare_model(chance, base, at) -> Case:
    """A model's directory without checksums: any of its files damaged, up to three of them."""
    shutil.copytree(base.bare, at / "bare")
    files = sorted((at / "bare").iterdir())
    what = "; ".join(damage_file(chance, path) for path in chance.sample(files, chance.choice([1, 1, 2, 3])))
    model = ["--model", at / "bare", "--device", "cpu"]
    programs = {
        TRAIN: base.train(base.shards, at / "run", init_from=at / "bare"),
        f"{COMMANDS}.generate": [*model, "--prompt", "the", "--max_new_tokens", "3"],
        EVAL: [*model, "--data", base.texts / "examples.jsonl", "--limit", "2"],
        f"{COMMANDS}.export": ["--model", at / "bare", "--out", at / "out"],
        f"{COMMANDS}.prepare_text": [
            "--input", base.texts / "rows.jsonl", "--tokenizer", at / "bare", "--out", at / "out", "--workers", "1",
        ],
    }  # fmt: skip
    program = chance.choice(list(programs))
    return Case(program, programs[program], damage=what)


def a_foreign_data_set(chance, base, at) -> Case:
    shutil.copytree(base.root / "foreign", at / "data")
    path = chance.choice(sorted((at / "data").iterdir()))
    size = path.stat().st_size
    what = damage_file(chance, path)
    sure = path.is_file() and path.stat().st_size != size  # its header says how long it is
    if path.exists() and chance.random() < 0.3:
        what += f"; renamed to {path.rename(at / 'data' / chance.choice(NAMES)).name}"
        sure = False
    argv = base.train(at / "data", at / "run", tokenizer=base.shards / "tokenizer")
    return Case(TRAIN, argv, must_refuse=sure, damage=what)


def a_data_set(chance, base, at) -> Case:
    shutil.copytree(base.shards, at / "data")
    files = sorted(path for path in (at / "data").rglob("*") if path.is_file() and path.name != "checked.json")
    manifests = [path for path in files if path.name == "manifest.json"]
    what = damage_file(chance, chance.choice(files + manifests * len(files)))
    argv = base.train(at / "data", at / "run")
    return Case(TRAIN, argv, result=lambda: losses(at / "run"), expected=base.losses, damage=what)


def a_checkpoint(chance, base, at) -> Case:
    shutil.copytree(base.run, at / "old", symlinks=True)
    checkpoint = at / "old/checkpoints/step_000002"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    what = damage_file(chance, chance.choice(files))
    programs = {
        TRAIN: base.train(base.shards, at / "run", max_steps=3, resume=checkpoint),
        f"{COMMANDS}.push": ["--model", checkpoint, "--repo", "user/name"],
        f"{COMMANDS}.generate": ["--model", checkpoint, "--prompt", "the", "--device", "cpu", "--max_new_tokens", "3"],
        EVAL: ["--model", checkpoint, "--device", "cpu", "--data", base.texts / "examples.jsonl", "--limit", "2"],
        f"{COMMANDS}.export": ["--model", checkpoint, "--out", at / "out"],
        f"{COMMANDS}.perplexity": ["--model", checkpoint, "--device", "cpu", "--data", base.texts / "prose.txt"],
    }
    program = chance.choice([TRAIN, TRAIN, *programs])
    sure = program in (TRAIN, f"{COMMANDS}.push") and "unchanged" not in what
    # Of a model's files all that is loaded is under checksums; the others may be anything.
    sure = sure or (what.startswith(("model.safetensors", "tokenizer.json")) and "unchanged" not in what)
    return Case(program, programs[program], must_refuse=sure, damage=what)


def a_run(chance, base, at) -> Case:
    shutil.copytree(base.run, at / "run", symlinks=True)
    files = [at / "run" / name for name in ("metrics.jsonl", "status.json", "config.yaml", ".lock")]
    what = damage_file(chance, chance.choice([path for path in files if path.exists()]))
    if chance.random() < 0.5:
        return Case(TRAIN, base.train(base.shards, at / "run", max_steps=3), damage=what)
    programs = {
        f"{COMMANDS}.plot": [at / "run", "--out", at / "x.png"],
        f"{COMMANDS}.average": [at / "run", "--last", "1", "--device", "cpu", "--out", at / "out"],
        f"{COMMANDS}.compare": [at / "run"],
    }
    program = chance.choice(list(programs))
    return Case(program, programs[program], damage=what)


def a_trainer_state(chance, base, at) -> Case:
    """By somebody who also corrects the checksums."""
    from gpt2repro.files import sha256_of

    shutil.copytree(base.run, at / "run", symlinks=True)
    checkpoint = at / "run/checkpoints/step_000002"
    name = chance.choice(
        ["trainer_state/state.json", "config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
    )
    path = checkpoint / name
    content, what = damaged(chance, path.read_bytes())
    path.write_bytes(content)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums[name] = {"bytes": len(content), "sha256": sha256_of(path)}
    (checkpoint / "checksums.json").write_text(json.dumps(sums))
    programs = {
        TRAIN: base.train(base.shards, at / "run", max_steps=3),
        f"{COMMANDS}.generate": ["--model", checkpoint, "--prompt", "the", "--device", "cpu", "--max_new_tokens", "3"],
        f"{COMMANDS}.export": ["--model", checkpoint, "--out", at / "out"],
    }
    program = chance.choice([TRAIN, TRAIN, *programs])
    return Case(program, programs[program], damage=f"{name} {what}")


def a_text(chance, base, at) -> Case:
    path = Path(shutil.copy(chance.choice(sorted(base.texts.iterdir())), at))
    what = damage_file(chance, path, kinds=KINDS[:-1])  # a text may be a pipe: <(command) in a shell
    model = ["--model", base.run, "--device", "cpu"]
    known = simplest(base, at)
    task = chance.choice(["hellaswag", "piqa", "lambada", "arc_easy", "winogrande"])
    stream = {"tokenizer": base.shards / "tokenizer", "val_data": base.shards, "cache_dir": at / "cache"}
    programs = [
        (f"{COMMANDS}.prepare_text", [*known[f"{COMMANDS}.prepare_text"], "--input", path]),
        (PREPARE, [*known[PREPARE], "--dataset", path]),
        (TRAIN, base.train(f"stream:{path}", at / "run", **stream)),
        (f"{COMMANDS}.perplexity", [*model, "--data", path, *chance.choice([[], ["--last_word"]])]),
        (EVAL, [*model, "--data", path, "--task", task]),
        (f"{COMMANDS}.generate", [*model, "--prompts_file", path, "--out", at / "out.jsonl", "--max_new_tokens", "3"]),
    ]
    program, argv = chance.choice(programs)
    return Case(program, argv, damage=what)


def a_foreign_checkpoint(chance, base, at) -> Case:
    path = Path(shutil.copy(base.root / "foreign.pt", at))
    what = damage_file(chance, path)
    kind = chance.choice(["nanogpt", "nanogpt", "build-nanogpt", "llm.c"])
    return Case(f"{COMMANDS}.import_checkpoint", ["--format", kind, "--input", path, "--out", at / "out"], damage=what)


FAMILIES = (
    an_option, a_text, a_data_set, a_checkpoint, an_option, a_preset, a_run, a_trainer_state, a_text, an_option,
    a_foreign_checkpoint, a_benchmark, a_yaml_value, a_bare_model, a_manifest, a_foreign_data_set, a_yaml_value,
    a_bare_model, a_tokenizer,
)  # fmt: skip


# --- faults of files, disks and machines


def with_results(base: Base, at: Path, place: Path) -> dict[str, list]:
    """Every program that writes, writing to `place`."""
    model = ["--model", base.run, "--device", "cpu"]
    found = {name: argv for name, argv in simplest(base, at).items() if "--out" in argv or name == TRAIN}
    for argv in found.values():
        flag = "--out" if "--out" in argv else "--run_dir"
        argv[argv.index(flag) + 1] = (
            place / "x.png" if f"{COMMANDS}.plot" in found and argv is found[f"{COMMANDS}.plot"] else place / "new"
        )
    found[f"{COMMANDS}.generate"] = [
        *model,
        "--prompts_file",
        base.texts / "rows.jsonl",
        "--max_new_tokens",
        "3",
        "--out",
        place / "new.jsonl",
    ]
    found[EVAL] = [
        *model,
        "--data",
        base.texts / "examples.jsonl",
        "--limit",
        "2",
        "--predictions",
        place / "new.jsonl",
    ]
    found[f"{COMMANDS}.perplexity"] = [*model, "--data", base.texts / "prose.txt", "--out", place / "new.json"]
    return found  # fmt: skip


def disk(at: Path, options: str) -> Path:
    small = at / "small"
    small.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=True)
    return small


def fill(folder: Path, leave: int = 0) -> None:
    """Take all room on a disk but `leave` bytes."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            file.truncate(max(0, file.tell() - leave) // 4096 * 4096)


LONG = {"max_steps": 6, "save_steps": 1, "eval_steps": 3, "keep_last": "none"}
ENDLESS = {"max_steps": 10**6, "save_steps": 10**6, "eval_steps": 10**6}


def a_disk_that_fills(options: str, leave: int | None = None, **changes):
    """A run on a small disk ends in a sentence, keeps whole checkpoints, says so, and goes on when there is room."""

    def make(chance, base, at) -> Case:
        small = disk(at, options)
        if leave is not None:
            fill(small, leave)
        flags = base.train(base.shards, small / "run", **{**LONG, **changes})

        def after() -> list[str]:
            from gpt2repro.checkpoint.layout import list_steps
            from gpt2repro.checkpoint.reader import verify_checkpoint
            from gpt2repro.files import read_json_if_whole

            for _, path in list_steps(small / "run/checkpoints"):
                verify_checkpoint(path)
            status = small / "run/status.json"
            found = []
            if status.exists() and (read_json_if_whole(status) or {}).get("state") != "failed":
                found.append(f"status.json says {status.read_text()!r}")
            (small / "filler").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=60m,nr_inodes=9999", small], check=True)
            whole = base.train(base.shards, at / "whole", **{**LONG, **changes, "max_steps": 6})
            resumed = base.train(base.shards, small / "run", **{**LONG, **changes, "max_steps": 6})
            codes = [forked(Case(TRAIN, argv), at) for argv in (resumed, whole)]
            if [code for code, _ in codes] != [0, 0]:
                found.append(f"with room it ends with {codes}")
            elif losses(small / "run") != losses(at / "whole"):
                found.append("with room it is another run")
            return found

        return Case(TRAIN, flags, must_refuse=True, after=after, damage=f"tmpfs {options}, {leave} bytes left")

    return make


def a_place(program: str, what: str):
    """A result that cannot be written: a full or read-only disk, a name too long, a loop of links, a device."""

    def make(chance, base, at) -> Case:
        if what in ("full", "read-only"):
            place = disk(at, "size=64k")
            fill(place) if what == "full" else subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        elif what == "long":
            place = at / ("x" * 300)
        elif what == "loop":
            place = at / "loop"
            place.symlink_to("loop")
        else:
            place = Path("/dev/null")
        return Case(program, with_results(base, at, place)[program], must_refuse=True, damage=what)

    return make


def a_full_stdout(program: str):
    def make(chance, base, at) -> Case:
        return Case(
            program, simplest(base, at)[program], must_refuse=True, stdout=Path("/dev/full"), damage="/dev/full"
        )

    return make


def a_change(what: str, act: Callable[[Base, Path], object], code: int | None = 2, **changes):
    """Something happens to the files of a run while it runs; afterwards SIGTERM, where it is not refused by itself."""

    def make(chance, base, at) -> Case:
        shutil.copytree(base.shards, at / "data")
        small = disk(at, "size=20m")

        def meanwhile(child: int) -> None:
            log = small / "run/metrics.jsonl"
            deadline = time.monotonic() + SECONDS
            while not (log.is_file() and log.stat().st_size > 3000) and time.monotonic() < deadline:
                time.sleep(0.01)
            act(at, small)
            if code == 3:
                time.sleep(1)
                os.kill(child, signal.SIGTERM)

        flags = base.train(at / "data", small / "run", **{**ENDLESS, **changes})
        return Case(TRAIN, flags, must_refuse=code == 2, meanwhile=meanwhile, damage=what)

    return make


def too_little_memory(program: str, argv: list[str], mib: int):
    def make(chance, base, at) -> Case:
        def limit(child: int) -> None:
            used = int(Path(f"/proc/{child}/statm").read_text().split()[0]) * 4096
            resource.prlimit(child, resource.RLIMIT_AS, (used + (mib << 20),) * 2)

        return Case(
            program, [*simplest(base, at)[program], *argv], must_refuse=True, meanwhile=limit, damage="ulimit -v"
        )

    return make


def a_kind(name: str, make_it: Callable[[Path], object], data: bool = False):
    """Something of another kind where a run, or a data set, has a file or a directory."""

    def make(chance, base, at) -> Case:
        shutil.copytree(base.shards, at / "data")
        path = at / ("data" if data else "run") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        make_it(path)
        return Case(TRAIN, base.train(at / "data", at / "run"), must_refuse=True, damage=f"{name}: {make_it.__name__}")

    return make


def an_endless_input(program: str, flag: str):
    def make(chance, base, at) -> Case:
        def limit(child: int) -> None:
            resource.prlimit(child, resource.RLIMIT_AS, (24 << 30, 24 << 30))

        argv = with_results(base, at, at)[program]
        argv[argv.index(flag) + 1] = "/dev/zero"
        return Case(program, argv, must_refuse=True, meanwhile=limit, damage=f"{flag} /dev/zero")

    return make


def flip_all_weights(at: Path) -> None:
    for path in (at / "run/checkpoints").glob("step_*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def a_run_of_damaged_checkpoints(chance, base, at) -> Case:
    shutil.copytree(base.run, at / "run", symlinks=True)
    flip_all_weights(at)
    return Case(
        TRAIN, base.train(base.shards, at / "run", max_steps=3), must_refuse=True, damage="every checkpoint flipped"
    )


def a_second_process(chance, base, at) -> Case:
    from filelock import FileLock

    (at / "run").mkdir()
    lock = FileLock(at / "run/.lock")
    lock.acquire()
    return Case(
        TRAIN,
        base.train(base.shards, at / "run"),
        must_refuse=True,
        damage="locked",
        after=lambda: lock.release() or [],
    )


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # while somebody writes into it


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FILES = (".lock", "metrics.jsonl", "status.json", "config.yaml", "checkpoints/latest")
PRINTERS = (TRAIN, EVAL, *(f"{COMMANDS}.{name}" for name in ("generate", "plot", "perplexity")))
WRITERS = (TRAIN, PREPARE, EVAL, *(f"{COMMANDS}.{name}" for name in (
    "prepare_text", "generate", "plot", "import_checkpoint", "export", "perplexity")))  # fmt: skip
FAULTS = [
    *(a_disk_that_fills(f"size={kib}k") for kib in (16, 40, 80, 120, 160, 200, 260, 320)),
    *(a_disk_that_fills(f"size=2m,nr_inodes={inodes}") for inodes in (4, 9, 20, 30)),
    *(a_disk_that_fills("size=1m", leave, save_steps=10**6, eval_steps=10**6, max_steps=10**6, sample_tokens=4)
      for leave in (8 << 10, 20 << 10, 60 << 10)),
    *(a_place(program, what) for program in WRITERS for what in ("full", "read-only")),
    *(a_place(program, chance) for program, chance in zip(WRITERS, ["long", "loop", "device"] * 3, strict=True)),
    *(a_full_stdout(program) for program in PRINTERS),
    a_change("a shard is cut", lambda at, small: truncate(at / "data/train_000000.bin")),
    a_change("the status becomes a directory", lambda at, small: to_directory(small / "run/status.json")),
    a_change("the disk is filled", lambda at, small: fill(small)),
    a_change("the run is removed", lambda at, small: remove(small / "run")),
    a_change("the log is removed", lambda at, small: (small / "run/metrics.jsonl").unlink(), 3),
    a_change("the data are removed", lambda at, small: shutil.rmtree(at / "data"), 3),
    a_change("the checkpoints are removed", lambda at, small: remove(small / "run/checkpoints"), 3, save_steps=50),
        too_little_memory(TRAIN, ["--n_embd", "2048", "--n_layer", "4"], 600),
    too_little_memory(f"{COMMANDS}.generate", ["--num_samples", "60000", "--batch_size", "60000"], 100),
    *(a_kind(name, Path.mkdir) for name in FILES),
    *(a_kind(name, Path.touch) for name in ("samples", "checkpoints")),
    *(a_kind(name, Path.mkdir, data=True) for name in ("manifest.json", "train_000000.bin")),
    a_kind("tokenizer/tokenizer.json", Path.mkdir, data=True),
    *(a_kind(name, os.mkfifo, data=True) for name in ("manifest.json", "train_000000.bin")),
    a_kind("tokenizer", Path.touch, data=True),
    a_run_of_damaged_checkpoints,
    a_second_process,
    an_endless_input(f"{COMMANDS}.prepare_text", "--input"), an_endless_input(f"{COMMANDS}.generate", "--prompts_file"),
    an_endless_input(f"{COMMANDS}.perplexity", "--data"), an_endless_input(EVAL, "--data"),
    an_endless_input(f"{COMMANDS}.import_checkpoint", "--input"), an_endless_input(PREPARE, "--dataset"),
]  # fmt: skip


# --- running and judging


def forked(case: Case, at: Path, seconds: float = SECONDS) -> tuple[int, str]:
    """(exit code, output) of a case in a process of its own; a negative code is the signal that ended it."""
    output = at / "output.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.chdir(at)
            streams = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(os.open(case.stdout, os.O_WRONLY) if case.stdout else streams, 1)
            os.dup2(streams, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            from gpt2repro.options import run_main

            sys.argv = [case.program]
            code = run_main(importlib.import_module(case.program).main, [str(one) for one in case.argv])
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        try:
            import threading

            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            sys.stdout and sys.stdout.flush()
        finally:
            os._exit(code)
    if case.meanwhile:
        case.meanwhile(child)
    deadline, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < deadline:
        done, how = os.waitpid(child, os.WNOHANG)
        status = how if done else time.sleep(0.02)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def judge(case: Case, code: int, said: str) -> str:
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == -signal.SIGKILL:
        return "hang"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if code == 2 and len(sentences) == 1:
        return "refused"
    if code not in (0, 3, 4):
        return "crash"
    if case.must_refuse or (code == 0 and case.result and case.result() != case.expected):
        return "wrong"
    return "done" if code == 0 else "ended"


def one(number: int, seed: int, base: Base, make) -> dict:
    """Run one case -> its record."""
    at = Path(tempfile.mkdtemp(prefix=f"case-{number}-", dir=base.root))
    chance = random.Random(f"{seed}-{number}")
    try:
        case = make(chance, base, at)
        began = time.monotonic()
        code, said = forked(case, at)
        outcome, more = judge(case, code, said), case.after()
        last = next((line for line in said.splitlines() if line.startswith("error: ")), said.strip()[-300:])
        short = [str(one).replace(str(at), "AT").replace(str(base.root), "BASE") for one in case.argv]
        return {
            "number": number, "family": make.__name__, "program": case.program.split(".")[-1], "damage": case.damage,
            "code": code, "outcome": "wrong" if more else outcome, "seconds": round(time.monotonic() - began, 2),
            "said": "; ".join([*more, last]).replace(str(at), "AT").replace(str(base.root), "BASE")[:400],
            **({"argv": short, "output": said[-3000:]} if more or outcome not in ("refused", "done", "ended") else {}),
        }  # fmt: skip
    finally:
        for line in Path("/proc/mounts").read_text().splitlines():
            if line.split()[1].startswith(str(at)):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(at, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("results/campaign"))
    options = parser.parse_args()

    for module in ("torch", "accelerate", "datasets", "matplotlib.figure", "models", "safetensors.torch", *FIELDS):
        importlib.import_module(f"gpt2repro.{module}" if module == "models" else module)
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import modeling_gpt2repro  # noqa: F401

    base = Base(Path(tempfile.mkdtemp(prefix="campaign-")))
    os.environ["HF_HOME"] = str(base.root / "hf")
    jobs = (
        list(enumerate(FAULTS)) if options.faults else [(n, FAMILIES[n % len(FAMILIES)]) for n in range(options.inputs)]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / f"{'faults' if options.faults else 'inputs'}-seed-{options.seed}.json"
    known = json.loads(record.read_text())["cases"] if record.is_file() and options.only is None else []
    cases = {case["number"]: case for case in known}
    try:
        for number, make in jobs:
            if number in cases or (options.only is not None and number not in options.only):
                continue
            case = cases[number] = one(number, options.seed, base, make)
            if options.only is not None or "output" in case:
                print(json.dumps(case, indent=1).replace("\\n", "\n"), flush=True)
            if options.only is None:
                write(record, options.seed, cases)
    finally:
        shutil.rmtree(base.root, ignore_errors=True)
    print(dict(Counter(case["outcome"] for case in cases.values())))
    return 0


def write(path: Path, seed: int, cases: dict) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    content = {
        "command": f"python tests/campaign.py --seed {seed}",
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "outcomes": dict(Counter(case["outcome"] for case in cases.values())),
        "inputs_per_command": dict(Counter(case["program"] for case in cases.values())),
    }
    rows = ",\n  ".join(json.dumps(cases[number]) for number in sorted(cases))
    path.write_text(json.dumps(content, indent=1)[:-2] + f',\n "cases": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
