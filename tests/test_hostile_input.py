"""Broken and hostile input, thrown at the programs: each ends with exit code 2 and one clear sentence, nothing damaged.

Every case is one wrong thing: an option, a preset, a manifest, a shard, a checkpoint, a text, a foreign file. They
run in this process through `run_main`, as the programs themselves do; a few go through real processes as well.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import typing
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_run
import torch

from gpt2repro.data.shards import CHECKED
from gpt2repro.options import run_main

# --- how a case is judged


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A whole, tiny data set."""
    return tiny_run.write_tiny_shards(tmp_path_factory.mktemp("hostile") / "data")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, shards) -> Path:
    """A run with one whole checkpoint, after two steps."""
    directory = tmp_path_factory.mktemp("hostile-run") / "run"
    code, output = call("train_accelerate", tiny_run.flags(shards, directory, max_steps=2, save_steps=2))
    assert code == 0, output
    return directory


def call(program: str, argv: list) -> tuple[int, str]:
    """Exit code and all output of a program that is called in this process."""
    from accelerate.state import AcceleratorState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run_main(importlib.import_module(program).main, [str(argument) for argument in argv])
    except SystemExit as ending:  # argparse's --help
        code = ending.code
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, output.getvalue()


def fingerprints(folder: Path) -> dict[str, str]:
    """What lies in a folder: name -> sha256. Without the remembered hashes: a new link to a shard renews them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKED)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(program: str, argv: list, *, keep: Path | None = None, trace: Path | None = None) -> str:
    """Call the program, check that it refuses cleanly, and return its sentence."""
    before = fingerprints(keep) if keep else None
    code, output = call(program, argv)
    messages = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, f"exit code {code}\n{output[-3000:]}"
    assert len(messages) == 1, output[-3000:]
    assert "Traceback" not in output
    said = output[output.index("error: ") :]
    assert len(messages[0]) > 15 and len(said) < 2500, said
    assert not any(word in said for word in ("Error(", "object at 0x", "NoneType", "Errno", "Traceback")), said
    assert before is None or {name: sha for name, sha in fingerprints(keep).items() if name in before} == before
    assert trace is None or not trace.exists(), "a pickle was run"
    return said


# --- options: a wrong type in every field of every program, as a flag and in a YAML file

PROGRAMS = {
    "train_accelerate": "TrainConfig",
    "prepare_fineweb": "Options",
    "eval_hellaswag": "Options",
    "gpt2repro.commands.prepare_text": "Options",
    "gpt2repro.commands.generate": "Options",
    "gpt2repro.commands.push": "Options",
    "gpt2repro.commands.perplexity": "Options",
    "gpt2repro.commands.import_checkpoint": "Options",
    "gpt2repro.commands.demo": "Options",
    "gpt2repro.commands.verify_resume": "Options",
}


def typed_fields(program: str) -> list[tuple[str, str]]:
    """(field, a value that cannot be meant) of every field that is more than text."""
    cls = getattr(importlib.import_module(program), PROGRAMS[program])
    kinds = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        text = str(kinds[field.name])
        if "Literal" in text:
            found.append((field.name, "banana"))
        elif kinds[field.name] is bool:
            found.append((field.name, "perhaps"))
        elif "int" in text:
            found.append((field.name, "1.5"))
        elif "float" in text:
            found.append((field.name, "nan"))
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_value_of_the_wrong_type_is_refused_in_every_field_of_every_program(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = typed_fields(program)
    assert fields
    for name, value in fields:
        if value != "perhaps":
            assert name in refused(program, [f"--{name}", value])
        yaml = tmp_path / "wrong.yaml"
        yaml.write_text(f"{name}: [[{value}]]\n")
        if program != "gpt2repro.commands.verify_resume":  # its --config is the run's
            assert name in refused(program, ["--config", yaml])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong.yaml"]


OPTION_CASES = [
    ["--no_such_option", 1], ["--lrr", 1], ["positional"], ["--config", "no_such_preset"], ["--config", "."],
    ["--batch_tokens", 1000], ["--batch_tokens", 0], ["--batch_tokens", -128], ["--n_embd", 30, "--n_head", 4],
    ["--seq_len", 2048], ["--max_steps", 0], ["--lr", -1], ["--lr", "inf"], ["--min_lr", 1], ["--warmup_steps", -1],
    ["--weight_decay", -0.1], ["--beta1", 1.0], ["--beta2", -0.5], ["--eps", 0], ["--grad_clip", 0],
    ["--resid_pdrop", 1],
    ["--attn_pdrop", -1], ["--keep_last", 0], ["--log_steps", 0], ["--eval_steps", 0], ["--save_steps", 0],
    ["--val_tokens", 0], ["--milestone_steps", 0], ["--resume", "hub:"], ["--resume", "no/such/dir/anywhere"],
    ["--spike_z", 0], ["--spike_window", 1], ["--max_rewinds", -1], ["--loss_chunk_tokens", 0], ["--profile", 0],
    ["--data", "no/such/dir"], ["--data", ""], ["--data", "/dev/null"], ["--tokenizer", "./nowhere"],
    ["--init_from", "no/such/model/dir"], ["--vocab_size", 5], ["--vocab_size", 10**12], ["--n_positions", 10**12],
    ["--vocab_size", 0], ["--batch_tokens", 2**20],
    ["--n_layer", -3], ["--n_layer", "1e3"], ["--n_layer", "99999999999999999999999"], ["--seed", "x"],
    ["--precision", "fp8"], ["--optimizer", "sgd"], ["--trackers", "mlflow"],
    ["--bf16_residual", "--precision", "fp32"],
    ["--hellaswag", "no/such/file.jsonl"], ["--val_data", "no/such/dir"], ["--activation_function", "relu"],
    ["--lr", ""], ["--data"], ["--micro_batch_size", 3], ["--max_steps", "1e3"], ["--sample_tokens", -1],
    ["--collective_timeout_minutes", "1e13"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", OPTION_CASES, ids=lambda a: " ".join(map(str, a)))
def test_an_impossible_option_of_a_run_is_refused(arguments, shards, tmp_path):
    directory = tmp_path / "run"
    refused("train_accelerate", [*tiny_run.flags(shards, directory, max_steps=1), *arguments], keep=shards)
    assert not list(directory.rglob("metrics.jsonl")), "refused only after the run had begun"


def test_all_problems_are_reported_together(shards, tmp_path):
    wrong = ["--n_layer", "x", "--lrr", "1", "--beta1", "2", "--precision", "fp8"]
    said = refused("train_accelerate", [*tiny_run.flags(shards, tmp_path / "run"), *wrong])
    assert all(name in said for name in ("n_layer", "lrr", "precision"))


# --- presets

PRESETS = {
    "tab": b"n_layer:\t1\n\t- x", "unclosed": b"{n_layer: [1, 2", "list": b"- 1\n- 2\n", "scalar": b"42\n",
    "binary": bytes(range(256)), "not utf-8": b"run_dir: \xff\xfe\xfa\n", "unknown key": b"n_layers: 3\n",
    "nested": b"n_layer: {a: {b: 1}}\n", "object": b"n_layer: !!python/object/apply:os.system ['true']\n",
    "no timestamp": b"project: !!timestamp x\n", "no boolean": b"project: !!bool banana\n",
    "tuple key": b"? [a, b]\n: 1\n", "number key": b"7: 1\n", "date": b"n_layer: 2020-01-01\n",
    "null": b"n_layer: null\n",
    "two documents": b"n_layer: 1\n---\nn_layer: 2\n", "resume inside": b"resume: never\n",
    "anchor loop": b"n_layer: &a [*a]\n",
    "laughs": b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % ((98 + i, 98 + i) + (97 + i,) * 8) for i in range(9)
    ) + b"n_layer: *j\n",
    "deep": b"n_layer: " + b"[" * 3000, "infinite": b"lr: .inf\n", "not a number": b"lr: .nan\n",
    "bool": b"n_layer: yes\n",
    "text for number": b"n_head: many\n", "json": b'{"n_layer": "one"}', "nul": b"n_layer: 1\0\n",
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_broken_preset_is_refused(name, shards, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_bytes(PRESETS[name])
    refused("train_accelerate", ["--data", shards, "--run_dir", tmp_path / "run", "--config", preset], keep=shards)
    assert not (tmp_path / "run").exists()


# --- manifests and shards

MANIFEST_CHANGES = [
    *[((key,), "delete") for key in ("format", "version", "dtype", "tokenizer", "splits")],
    *[(("splits",), value) for value in (None, [], {}, 7, {"train": None}, {"train": {}})],
    *[(("splits", "train"), value) for value in ("delete", None, [], {}, {"tokens": 5})],
    *[(("splits", "train", "shards"), value) for value in ("delete", None, [], {}, [None], [{}], [[]], "x")],
    *[(("splits", "train", "shards", 0, "file"), value) for value in (
        None, 3, "", ".", "missing.bin", "../data/train_000000.bin", "/etc/passwd", "a\0b", "x" * 5000, ["a"],
    )],
    *[(("splits", "train", "shards", 0, "tokens"), value) for value in (None, -1, 0, 1, "many", 2**70, 1.5, [])],
    *[(("splits", "train", "tokens"), value) for value in (None, "many", -5, [], {})],
    *[(("dtype",), value) for value in (None, "uint8", "float32", "object", "uint32", 16, "O", [], "uint16,uint16")],
    *[(("version",), value) for value in (None, 99, "1", -1)],
    *[(("format",), value) for value in (None, "other", 5)],
    *[(("tokenizer",), value) for value in (None, [], {}, "gpt2")],
    *[(("tokenizer", "vocab_size"), value) for value in (None, -1, 0, "many", 3, [], 65_537)],
    *[(("tokenizer", "eot_id"), value) for value in (-1, 0, 10**6)],
]  # fmt: skip


@pytest.mark.parametrize("where, value", MANIFEST_CHANGES, ids=lambda part: str(part)[:50])
def test_a_manifest_that_says_something_impossible_is_refused(where, value, shards, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    manifest = json.loads((data / "manifest.json").read_text())
    owner = manifest
    for key in where[:-1]:
        owner = owner[key]
    if value == "delete":
        del owner[where[-1]]
    else:
        owner[where[-1]] = value
    (data / "manifest.json").write_text(json.dumps(manifest))
    refused("train_accelerate", tiny_run.flags(data, tmp_path / "run", max_steps=1), keep=data)


def test_a_shard_that_the_manifest_lists_twice_is_refused(shards, tmp_path):
    """Such as validation data that are training data."""
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["val"] = manifest["splits"]["train"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    said = refused("train_accelerate", tiny_run.flags(data, tmp_path / "run", max_steps=1), keep=data)
    assert "train_000000.bin is listed twice" in said


@pytest.mark.parametrize("content", [b"", b"\0", b"[]", b"{}", b"{"])
def test_first_weights_with_a_damaged_tokenizer_are_refused(content, run_dir, shards, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(run_dir / "checkpoints/step_000002", model, ignore=lambda *_: ["trainer_state", "checksums.json"])
    (model / "tokenizer.json").write_bytes(content)
    refused("train_accelerate", tiny_run.flags(shards, tmp_path / "run", max_steps=1, init_from=model))


UNKNOWN = "the \u00e9 fox"
ASKED = {
    "gpt2repro.commands.generate": ["--prompt", UNKNOWN],
    "gpt2repro.commands.perplexity": ["--data", "text.txt"],
    "train_accelerate": ["--sample_prompts", UNKNOWN, "--sample_tokens", "2"],
}


@pytest.mark.parametrize("program", ASKED)
def test_a_character_that_the_tokenizer_does_not_know_is_refused(program, run_dir, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(UNKNOWN, encoding="utf-8")
    model = ["--model", run_dir, "--device", "cpu"]
    model = tiny_run.flags(shards, tmp_path / "run", max_steps=1) if program == "train_accelerate" else model
    assert "knows no '\u00e9'" in refused(program, [*model, *ASKED[program]])


def whole_shard() -> bytes:
    tokens = np.arange(2000, dtype="<u2") % 30
    return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.tobytes()


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


SHARDS = {
    "empty": b"", "one byte": b"\x01", "header only half": whole_shard()[:512], "no tokens": whole_shard()[:1024],
    "cut": whole_shard()[:-3], "cut by one token": whole_shard()[:-2], "too long": whole_shard() + b"\0\0",
    "other magic": b"\0" * 4 + whole_shard()[4:],
    "other version": whole_shard()[:4] + b"\x63\0\0\0" + whole_shard()[8:],
    "negative count": whole_shard()[:8] + struct.pack("<i", -5) + whole_shard()[12:],
    "huge count": whole_shard()[:8] + struct.pack("<i", 2**31 - 1) + whole_shard()[12:],
    "zeros": bytes(len(whole_shard())), "text": b"once upon a time " * 300,
    "a token outside the vocabulary": whole_shard()[:-2] + struct.pack("<H", 60000),
}  # fmt: skip
FOREIGN = {
    "objects": npy(np.array([{"a": 1}, None], dtype=object), allow_pickle=True),
    "floats": npy(np.zeros(5000)), "two dimensions": npy(np.zeros((50, 100), dtype=np.uint16)),
    "no dimension": npy(np.uint16(3)), "negative": npy(np.full(5000, -1, dtype=np.int16)),
    "strings": npy(np.array(["a"])),
    "huge header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31 - 1) + b"{" * 100, "magic only": b"\x93NUMPY",
    "open bracket": npy(np.zeros(9, dtype=np.uint16)).replace(b"(9,)", b"(9,("),
    "lying shape": npy(np.zeros(9, dtype=np.uint16)).replace(b"(9,)", b"(9999999,)"),
    "a byte too many": npy(np.zeros(5000, dtype=np.uint16)).replace(b"\0" * 99, b"\0" * 100, 1),
    "a smaller shape": npy(np.zeros(5000, dtype=np.uint16)).replace(b"(5000,)", b"(4000,)"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", SHARDS)
def test_a_broken_shard_is_refused(name, split, shards, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    (data / f"{split}_000000.bin").write_bytes(SHARDS[name])
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"][split]["shards"][0]["tokens"] = manifest["splits"][split]["tokens"] = 2000
    (data / "manifest.json").write_text(json.dumps(manifest))
    refused("train_accelerate", tiny_run.flags(data, tmp_path / "run", max_steps=1), keep=data)


@pytest.mark.parametrize("name", [*FOREIGN, *(f"bin: {name}" for name in ("empty", "one byte", "text"))])
def test_a_broken_foreign_shard_is_refused(name, shards, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    content = SHARDS[name.removeprefix("bin: ")] if name.startswith("bin: ") else FOREIGN[name]
    for split in ("train", "val"):
        file = f"{split}.bin" if name.startswith("bin: ") else f"edufineweb_{split}_000000.npy"
        (data / file).write_bytes(content)
    arguments = tiny_run.flags(data, tmp_path / "run", max_steps=1, tokenizer=shards / "tokenizer")
    if name == "bin: text":
        arguments += ["--vocab_size", "300"]  # without a header the bytes are tokens: only the vocabulary can tell
    refused("train_accelerate", arguments, keep=data)


@pytest.mark.parametrize("place", ["foreign/train.bin", "foreign/a_train_1.npy", "data/tokenizer/x", "model/x"])
def test_a_pipe_is_not_waited_for(place, run_dir, shards, tmp_path):
    (tmp_path / "foreign").mkdir()
    shutil.copytree(shards, tmp_path / "data")
    shutil.copytree(run_dir / "checkpoints/step_000002", tmp_path / "model")
    os.mkfifo(tmp_path / place)
    data = tmp_path / "foreign" if place.startswith("foreign") else tmp_path / "data"
    refused("train_accelerate", tiny_run.flags(data, tmp_path / "run", max_steps=1, init_from=tmp_path / "model"))


def test_a_foreign_shard_whose_name_is_no_text_is_refused(tmp_path):
    np.save(tmp_path / "a_train_\udce9.npy", np.arange(5000, dtype=np.uint16))
    refused("train_accelerate", tiny_run.flags(tmp_path, tmp_path / "run", max_steps=1))


# --- checkpoints

CONFIGS = [
    {"n_layer": "x"}, {"n_layer": -1}, {"n_embd": 0}, {"n_head": 0}, {"n_head": 3}, {"n_embd": [1]}, {"vocab_size": -7},
    {"vocab_size": None}, {"model_type": None}, {"model_type": ["gpt2"]},
    {"activation_function": "swish"}, {"activation_function": 5}, {"n_positions": "many"},
    {"add_cross_attention": True},
    {"scale_attn_by_inverse_layer_idx": True}, {"n_layer": 7}, {"n_embd": 32}, {"vocab_size": 31}, {"n_inner": -4},
    {"attn_pdrop": "x"}, {"resid_pdrop": None}, {"dtype": "float9"}, {"n_inner": "x"}, {"eos_token_id": 1.5},
    {"pad_token_id": "x"}, {"layer_norm_epsilon": "x"}, {"initializer_range": []},
]  # fmt: skip
BROKEN_JSON = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b'"text"', b"{}"]
BROKEN_TENSORS = [
    b"", b"\0" * 7, b"\0" * 8, b"\x80\x04K\x01.", (1 << 62).to_bytes(8, "little") + b"{}",
    (200 << 20).to_bytes(8, "little") + b"{" * 64, (2).to_bytes(8, "little") + b"{}", b"PK\x03\x04" + b"\0" * 100,
]  # fmt: skip


def copied(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run; returns its one checkpoint."""
    shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    return tmp_path / "run/checkpoints/step_000002"


def set_consistently(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file and correct the checksums, as an attacker would."""
    (checkpoint / name).write_bytes(content)
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    checksums[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "checksums.json").write_text(json.dumps(checksums))


def readers(checkpoint: Path, shards: Path, tmp_path: Path) -> dict[str, tuple[str, list]]:
    """The programs that read checkpoints."""
    return {
        "resume": ("train_accelerate", tiny_run.flags(shards, checkpoint.parents[1], max_steps=3)),
        "init_from": (
            "train_accelerate",
            [*tiny_run.flags(shards, tmp_path / "new", max_steps=1), "--init_from", checkpoint],
        ),
        "generate": ("gpt2repro.commands.generate", ["--model", checkpoint, "--prompt", "the", "--device", "cpu"]),
    }


@pytest.mark.parametrize("reader", ["init_from", "generate"])
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_configuration_that_cannot_be_is_refused(change, reader, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    content = {**json.loads((checkpoint / "config.json").read_text()), **change}
    set_consistently(checkpoint, "config.json", json.dumps(content).encode())
    refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint)


@pytest.mark.parametrize("file", ["config.json", "checksums.json", "trainer_state/state.json"])
@pytest.mark.parametrize("content", BROKEN_JSON, ids=lambda c: repr(c[:12]))
def test_broken_json_in_a_checkpoint_is_refused_on_resume(file, content, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    if file == "checksums.json":
        (checkpoint / file).write_bytes(content)
    else:
        set_consistently(checkpoint, file, content)
    said = refused(*readers(checkpoint, shards, tmp_path)["resume"], keep=checkpoint)
    assert "none of the 1 checkpoints" in said


READ_BY = [("init_from", "config.json")]  # a run takes its tokenizer from the data
READ_BY += [("generate", f"{name}.json") for name in ("config", "tokenizer", "tokenizer_config", "generation_config")]


@pytest.mark.parametrize("reader, file", READ_BY)
@pytest.mark.parametrize("content", [BROKEN_JSON[i] for i in (0, 1, 4)], ids=lambda c: repr(c[:12]))
def test_broken_json_in_a_model_is_refused_where_it_is_read(content, file, reader, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    (checkpoint / file).write_bytes(content)
    refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint)


@pytest.mark.parametrize("reader", ["init_from", "generate"])
def test_a_tokenizer_whose_length_is_no_number_is_refused(reader, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    content = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"model_max_length": [[]]}
    set_consistently(checkpoint, "tokenizer_config.json", json.dumps(content).encode())
    assert "model_max_length" in refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint)


@pytest.mark.parametrize("reader", ["resume", "init_from", "generate"])
@pytest.mark.parametrize("content", BROKEN_TENSORS, ids=lambda c: repr(c[:10]))
def test_broken_weights_are_refused(content, reader, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    set_consistently(checkpoint, "model.safetensors", content)
    refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint)


@pytest.mark.parametrize("reader", ["init_from", "generate"])
@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn"])
def test_weights_that_are_no_plain_numbers_are_refused(dtype, reader, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    set_consistently(checkpoint, "model.safetensors", with_matrix(checkpoint, lambda w: w.to(getattr(torch, dtype))))
    assert "c_fc.weight holds" in refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint)


def test_weights_that_are_not_finite_are_refused(run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    set_consistently(checkpoint, "model.safetensors", with_matrix(checkpoint, lambda w: w / 0))
    assert "NaN or infinity" in refused(*readers(checkpoint, shards, tmp_path)["generate"], keep=checkpoint)


def with_matrix(checkpoint: Path, change) -> bytes:
    """The checkpoint's weights with one matrix changed."""
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    return safetensors.torch.save(tensors | {name: change(tensors[name])}, metadata={"format": "pt"})


@pytest.mark.parametrize("content", BROKEN_TENSORS, ids=lambda c: repr(c[:10]))
def test_a_broken_optimizer_state_is_refused(content, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    set_consistently(checkpoint, "trainer_state/optimizer-00000-of-00001.safetensors", content)
    refused(*readers(checkpoint, shards, tmp_path)["resume"], keep=checkpoint)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(seed, run_dir, shards, tmp_path):
    checkpoint, chance = copied(run_dir, tmp_path), random.Random(seed)
    listed = sorted(json.loads((checkpoint / "checksums.json").read_text()))
    victim = checkpoint / chance.choice([name for name in listed if (checkpoint / name).stat().st_size])
    content = bytearray(victim.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    victim.write_bytes(content)
    said = refused(*readers(checkpoint, shards, tmp_path)["resume"], keep=checkpoint)
    assert "none of the 1 checkpoints" in said


@pytest.mark.parametrize(
    "change",
    [
        {"state": None}, {"state": {}}, {"state": {"step": 2}}, {"version": 2}, {"format": "x"}, {"optimizer": "Lion"},
        {"optimizer": None}, {"step": "two"},
    ],
    ids=str,
)  # fmt: skip
def test_a_trainer_state_that_lacks_what_a_run_needs_is_refused(change, run_dir, shards, tmp_path):
    if change == {"step": "two"}:
        change = {"state": "step"}
    checkpoint = copied(run_dir, tmp_path)
    content = json.loads((checkpoint / "trainer_state/state.json").read_text())
    set_consistently(checkpoint, "trainer_state/state.json", json.dumps({**content, **change}).encode())
    refused(*readers(checkpoint, shards, tmp_path)["resume"], keep=checkpoint)


STATE_CHANGES = [
    ("step", None), ("step", "two"), ("step", -1), ("step", [2]), ("source", None), ("source", {}), ("source", []),
    ("source", {"position": "x", "skipped": []}), ("source", {"position": -8, "skipped": []}),
    ("source", {"position": 8, "skipped": [[3]]}), ("source", {"position": 8, "skipped": None}), ("best", 7),
    ("best", {}),
    ("identity", None), ("identity", {}), ("health", None), ("health", {}), ("health", {"losses": 3}), ("seconds", "x"),
    ("run_ids", [1]), ("health", {"class": "x", "__dict__": 1}),
]  # fmt: skip


@pytest.mark.parametrize("name, value", STATE_CHANGES, ids=str)
def test_a_trainer_state_of_the_wrong_kind_is_refused(name, value, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    content = json.loads((checkpoint / "trainer_state/state.json").read_text())
    content["state"][name] = value
    set_consistently(checkpoint, "trainer_state/state.json", json.dumps(content).encode())
    refused(*readers(checkpoint, shards, tmp_path)["resume"], keep=checkpoint)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "trainer_state/optimizer.pt", "trainer_state/random_states_0.pkl"]
)
def test_a_pickle_in_a_checkpoint_is_never_run(name, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    set_consistently(checkpoint, name, pickle.dumps(Bomb(tmp_path / "trace")))
    refused(*readers(checkpoint, shards, tmp_path)["resume"], keep=checkpoint, trace=tmp_path / "trace")


def test_a_model_of_nothing_but_pickles_is_refused_and_never_run(run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    for reader in ("init_from", "generate"):
        refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint, trace=tmp_path / "trace")


@pytest.mark.parametrize("name", ["../../../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 5, None])
def test_an_index_that_leaves_the_model_is_refused(name, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    (checkpoint / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    for reader in ("init_from", "generate"):
        refused(*readers(checkpoint, shards, tmp_path)[reader], keep=checkpoint)


@pytest.mark.parametrize(
    "other", [{"n_embd": 8}, {"n_layer": 2}, {"seq_len": 8}, {"batch_tokens": 256}, {"seed": 1}], ids=str
)
def test_a_run_is_not_continued_as_another_run(other, run_dir, shards, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    said = refused(
        "train_accelerate", tiny_run.flags(shards, checkpoint.parents[1], max_steps=3, **other), keep=checkpoint
    )
    assert next(iter(other)) in said


# --- the other programs

TEXTS = {
    "nothing.txt": b"", "half.jsonl": b'{"text": "a"}\n{"text": ', "number.jsonl": b'{"text": 5}\n',
    "other.jsonl": b'{"body": "x"}\n', "list.jsonl": b"[1, 2]\n", "garbage.parquet": b"PAR1garbagePAR1",
    "empty.parquet": b"",
    "noise.txt.gz": b"not gzip", "unknown.docx": b"PK\x03\x04\xff\xfe\0", "broken.jsonl.gz": b"\x1f\x8b\x08broken",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_without_text_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(TEXTS[name])
    arguments = ["--input", tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "char", "--workers", 1]
    refused("gpt2repro.commands.prepare_text", arguments, keep=tmp_path)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_data_set_is_not_overwritten_by_another(shards, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    (tmp_path / "text.txt").write_text(tiny_run.TEXT * 50)
    refused(
        "gpt2repro.commands.prepare_text",
        ["--input", tmp_path / "text.txt", "--out", data, "--tokenizer", "char", "--workers", 1],
        keep=data,
    )


FOREIGN_CHECKPOINTS = {
    "empty": b"", "text": b"hello", "zip": b"PK\x03\x04" + b"\0" * 60, "safetensors": (2).to_bytes(8, "little") + b"{}",
    "llm.c magic only": struct.pack("<i", 20240326), "zeros": bytes(4096),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["nanogpt", "build-nanogpt", "llm.c"])
@pytest.mark.parametrize("name", [*FOREIGN_CHECKPOINTS, "bomb", "missing", "directory"])
def test_a_foreign_checkpoint_that_is_none_is_refused_and_never_run(name, kind, tmp_path):
    file = tmp_path / "input.pt"
    if name == "directory":
        file.mkdir()
    elif name == "bomb":
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    elif name != "missing":
        file.write_bytes(FOREIGN_CHECKPOINTS[name])
    arguments = ["--format", kind, "--input", file, "--out", tmp_path / "out"]
    refused("gpt2repro.commands.import_checkpoint", arguments, trace=tmp_path / "trace")
    assert not (tmp_path / "out").exists()


EXAMPLES = {
    "empty": b"", "not json": b"hello\n", "list": b"[]\n", "no endings": b'{"ctx": "a", "label": 0}\n',
    "label outside": b'{"ind": 1, "ctx": "a", "activity_label": "x", "label": 9, "endings": ["a","b","c","d"]}\n',
    "endings no list": b'{"ind": 1, "ctx": "a", "activity_label": "x", "label": 0, "endings": "abcd"}\n',
    "binary": bytes(range(256)), "deep": b"[" * 100_000, "digits": b'{"ind": ' + b"9" * 5000 + b"}\n",
}  # fmt: skip
EXAMPLE = {"ctx": "a", "ctx_a": "a", "ctx_b": "", "activity_label": "x", "label": 0, "endings": ["a", "b", "c", "d"]}
CHANGES = {
    "surrogate": {"ctx": "\ud800"}, "label float": {"label": 1.7}, "label true": {"label": True},
    "label -1": {"label": -1},
    "label list": {"label": [0]}, "label text": {"label": "01"}, "ending null": {"endings": ["a", "b", "c", None]},
}  # fmt: skip
EXAMPLES |= {name: json.dumps({**EXAMPLE, **change}).encode() for name, change in CHANGES.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_hellaswag_examples_that_are_none_are_refused(name, run_dir, tmp_path):
    (tmp_path / "examples.jsonl").write_bytes(EXAMPLES[name])
    refused(
        "eval_hellaswag", ["--model", run_dir, "--data", tmp_path / "examples.jsonl", "--device", "cpu"], keep=run_dir
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_texts_that_are_none_are_refused(name, run_dir, tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(EXAMPLES[name])
    arguments = ["--model", run_dir, "--data", tmp_path / "texts.jsonl", "--device", "cpu", "--last_word"]
    refused("gpt2repro.commands.perplexity", [*arguments, "--text_column", "none"], keep=run_dir)


@pytest.mark.parametrize("program", ["eval_hellaswag", "gpt2repro.commands.perplexity"])
@pytest.mark.parametrize("place", [".", "/dev/null/x", "x" * 300, "file/x"])
def test_a_place_where_no_result_can_be_written_is_refused_before_the_model_is_read(program, place, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "texts.jsonl").write_bytes(b'{"text": "a b"}\n')
    arguments = ["--model", "no/such/dir", "--data", tmp_path / "texts.jsonl", "--out", tmp_path / place]
    assert "cannot write" in refused(program, arguments)


@pytest.mark.parametrize("content", [b"", b"not json\n", b'{"step": 1, "loss": "x"}\n', b"\xff\xfe\n"], ids=repr)
def test_a_log_without_curves_is_refused(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_bytes(content)
    refused("gpt2repro.commands.plot", [tmp_path / "run", "--out", tmp_path / "x.png"], keep=tmp_path)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "program, arguments",
    [
        ("gpt2repro.commands.generate", ["--model", "no/such/dir", "--prompt", "x"]),
        ("gpt2repro.commands.generate", ["--model", "/dev/null", "--prompt", "x"]),
        ("gpt2repro.commands.generate", ["--model", ".", "--prompt", "x"]),
        ("gpt2repro.commands.generate", ["--prompt", "x"]),
        ("gpt2repro.commands.generate", ["--model", "x", "--temperature", "-1", "--prompt", "x"]),
        ("gpt2repro.commands.generate", ["--model", "x", "--top_p", "7", "--prompt", "x"]),
        ("gpt2repro.commands.push", ["--model", "no/such/dir", "--repo", "user/name"]),
        ("gpt2repro.commands.push", ["--model", "no/such/dir", "--repo", "a/b/c"]),
        ("gpt2repro.commands.perplexity", ["--model", "no/such/dir", "--data", "x.txt"]),
        ("gpt2repro.commands.demo", ["--model", "no/such/dir"]),
        ("gpt2repro.commands.demo", ["--model", "x", "--port", "99999999"]),
        ("gpt2repro.commands.plot", []),
        ("gpt2repro.commands.plot", ["no/such/run"]),
        ("gpt2repro.commands.verify_resume", ["--kills", "0"]),
        ("gpt2repro.commands.verify_resume", ["--", "--run_dir", "x"]),
        ("gpt2repro.commands.verify_resume", ["--processes", "-1"]),
        ("gpt2repro.commands.verify_resume", ["--work_dir", "tests"]),
        ("gpt2repro.__main__", ["no-such-command"]),
        ("gpt2repro.__main__", ["bench", "no-such-benchmark"]),
        ("eval_hellaswag", ["--model", "no/such/dir", "--data", "x.jsonl"]),
        ("gpt2repro.commands.generate", ["--model", "x" * 300, "--prompt", "x"]),
        ("prepare_fineweb", ["--out", "/tmp/never", "--num_nodes", "2", "--node_index", "2"]),
        ("prepare_fineweb", ["--out", "/dev/null/x", "--dataset", "no/such/dir/at/all"]),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_what_is_not_there_is_said_not_to_be_there(program, arguments):
    assert "cannot write" not in refused(program, arguments)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("program", ["generate", "export", "perplexity"])
def test_a_flipped_bit_in_what_is_loaded_is_refused_by_every_command(program, name, run_dir, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    content = bytearray((checkpoint / name).read_bytes())
    at = content.rindex(b"z") if name == "tokenizer.json" else len(content) - 1
    content[at] ^= 2
    (checkpoint / name).write_bytes(content)
    (tmp_path / "text.txt").write_text("the lazy dog")
    more = {
        "generate": ["--prompt", "x"],
        "export": ["--out", tmp_path / "out"],
        "perplexity": ["--data", tmp_path / "text.txt"],
    }
    assert name in refused(f"gpt2repro.commands.{program}", ["--model", checkpoint, *more[program]])


def test_a_config_that_others_would_refuse_is_refused_by_export(run_dir, tmp_path):
    checkpoint = copied(run_dir, tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": "x"}))
    said = refused("gpt2repro.commands.export", ["--model", checkpoint, "--out", tmp_path / "out"])
    assert "tie_word_embeddings='x'" in said


WRONG_KINDS = [
    ("samples", Path.touch), ("checkpoints", Path.touch), (".lock", Path.mkdir), ("config.yaml", Path.mkdir),
    ("metrics.jsonl", Path.mkdir), ("status.json", Path.mkdir), ("loss.png", Path.mkdir), ("metrics.jsonl", os.mkfifo),
    ("checkpoints/latest", Path.mkdir), ("checkpoints/best", Path.mkdir),
    ("checkpoints/step_000001", Path.touch), ("checkpoints/step_000001", os.mkfifo),
]  # fmt: skip


@pytest.mark.parametrize("name, make", WRONG_KINDS)
def test_what_stands_in_the_way_of_a_run_is_named_before_it_begins(name, make, shards, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    make(path)
    assert str(path) in refused("train_accelerate", tiny_run.flags(shards, tmp_path / "run", max_steps=1))


@pytest.mark.parametrize("place", ["file", "file/run", "x" * 300, "/dev/null", "/proc/run"])
def test_a_place_where_no_run_can_be_is_named(place, shards, tmp_path):
    (tmp_path / "file").touch()
    refused("train_accelerate", tiny_run.flags(shards, tmp_path / place, max_steps=1))


@pytest.mark.parametrize(
    "kernel, more", [("flash_attention_2", []), ("flex_attention", []), ("flex_attention", ["--attn_pdrop", "0.1"])]
)
def test_a_kernel_that_does_not_work_here_is_named(kernel, more, shards, tmp_path):
    flags = [*tiny_run.flags(shards, tmp_path / "run"), "--attn_implementation", kernel, *more]
    assert f"attn_implementation={kernel}" in refused("train_accelerate", flags)


def test_a_rewind_without_a_checkpoint_says_so(shards, tmp_path):
    bad = {"lr": 1e30, "min_lr": 1e30, "warmup_steps": 0, "grad_clip": "none", "on_bad_numbers": "rewind"}
    code, said = call("train_accelerate", tiny_run.flags(shards, tmp_path / "run", **bad))
    message = json.loads((tmp_path / "run/status.json").read_text())["message"]
    assert code == 4 and "there is none to rewind to" in message and "--on_bad_numbers rewind" not in message
    assert message in said


def test_a_device_that_holds_no_numbers_is_refused(run_dir):
    arguments = ["--model", run_dir, "--device", "meta", "--prompt", "x"]
    assert "'meta' is not usable" in refused("gpt2repro.commands.generate", arguments)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["ours", "another"])
def test_a_models_directory_does_not_choose_the_attention_kernel(kind, key, run_dir, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from gpt2repro.models import load_model

    checkpoint = copied(run_dir, tmp_path)
    if kind == "another":
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, **size)).save_pretrained(checkpoint)
        (checkpoint / "checksums.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {key: "somebody/kernel"}))
    model, _ = load_model(str(checkpoint), device="cpu", dtype=None)
    assert model.config._attn_implementation == "sdpa"


# --- real processes: the same through the doors that users take


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["train_accelerate.py", "--no_such_option", "1"],
        ["train_accelerate.py", "--data", "no/such/dir"],
        ["train_accelerate.py", "--config", "no_such_preset"],
        ["eval_hellaswag.py", "--model", "no/such/dir"],
        ["prepare_fineweb.py"],
        ["-m", "gpt2repro", "no-such-command"],
        ["-m", "gpt2repro", "generate", "--model", "no/such/dir", "--prompt", "x"],
        ["-m", "gpt2repro", "plot", "no/such/run"],
        ["-m", "gpt2repro", "verify-resume", "--kills", "0"],
        ["-m", "gpt2repro", "verify-resume", "--", "--data", "no/such/dir"],
        ["-m", "gpt2repro", "prepare-text", "--input", "no/such/file", "--out", "data/never"],
        ["-m", "gpt2repro", "import-checkpoint", "--format", "nanogpt", "--input", "no/such/file", "--out", "never"],
    ],
    ids=" ".join,
)
def test_real_processes_end_with_exit_code_2_and_one_sentence(args, run_program, tmp_path):
    done = run_program(args, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_launcher_does_not_bury_the_sentence(run_program, tmp_path):
    args = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = Path(__file__).resolve().parent.parent / "train_accelerate.py"
    done = run_program([*args, script, "--data", "no/such/dir", "--run_dir", tmp_path / "run"], timeout=120)
    assert done.returncode != 0
    messages = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(messages) == 1 and "no/such/dir" in messages.pop(), done.stderr  # each rank may say it, all say the same
