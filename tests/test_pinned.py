"""What commit d4aaccb made of small data and how it trained, pinned: identities, orders, formats, losses.

`data/pinned/README.md` says what is stored and how it was made.
"""

import contextlib
import hashlib
import json
import platform
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

import train_accelerate
from gpt2repro.commands import prepare_text
from gpt2repro.data.sources import open_source
from gpt2repro.options import run_main

PINNED = Path(__file__).parent / "data" / "pinned"
EXPECTED = json.loads((PINNED / "expected.json").read_text(encoding="utf-8"))
SOURCES, PREPARED, RUNS = EXPECTED["sources"], EXPECTED["prepare_text"], EXPECTED["runs"]
STORED_RUNS = sorted(path.name for path in (PINNED / "runs").iterdir())
TOLERANCE = {"adamw": 1e-5, "muon": 1e-3}  # on another machine; Muon multiplies in bfloat16
MEASURED = {"tokens_per_second", "step_seconds", "mfu", "memory_gib"}

on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="the losses were recorded on a CPU")


@pytest.fixture(autouse=True)
def copy_of_the_pinned_data(tmp_path, monkeypatch) -> None:
    """The working directory: nothing depends on where the data lie, and nothing is written beside the stored files."""
    shutil.copytree(PINNED, tmp_path / "pinned", symlinks=True)
    monkeypatch.chdir(tmp_path / "pinned")


def flags(**options) -> list[str]:
    listed = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [text for name, values in listed.items() for text in (f"--{name}", *map(str, values))]


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [f"model name: {platform.processor()}"]
    return {
        "cpu": [line.replace("\t", "") for line in dict.fromkeys(lines) if line.startswith("model")],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


# --- data: exact everywhere


def opened(*, data: str, tokenizer: str | None, lanes: int | None = None, **_):
    options = {}
    if data.startswith("stream:"):
        options = {"tokenizer": AutoTokenizer.from_pretrained(tokenizer), "lanes": lanes, "cache_dir": Path("cache")}
    return open_source(data, seq_len=32, seed=5, sequences=2, **options)


def hashes(source, state: dict, count: int, *, world: int = 1) -> list[str]:
    """sha256 of the first `count` global batches from `state`, put together from the rows of all ranks."""
    with contextlib.ExitStack() as stack:
        ranks = [source.batches(state, rank=rank, world=world, sequences=2) for rank in range(world)]
        for batches in ranks:
            stack.enter_context(contextlib.closing(batches))
        found = []
        for parts in islice(zip(*ranks, strict=True), count):
            x, y = (torch.cat([part[index] for part in parts]) for index in (0, 1))
            found.append(hashlib.sha256(b"".join(part.numpy().astype("<i8").tobytes() for part in (x, y))).hexdigest())
        return found


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_has_the_identity_and_the_validation_text_it_had(name):
    source = opened(**SOURCES[name])
    assert source.identity() == SOURCES[name]["identity"]
    facts = ("tokens", "documents", "bytes", "sha256")
    found = source.validation and {fact: getattr(source.validation, fact) for fact in facts}
    assert found == SOURCES[name]["validation"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_gives_the_batches_it_gave_into_the_next_epoch(name):
    expected = {int(number): digest for number, digest in SOURCES[name]["batches"].items()}
    source = opened(**SOURCES[name])
    found = hashes(source, source.initial_state(), max(expected) + 1)
    assert {number: found[number] for number in expected} == expected


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SOURCES)
def test_a_stored_position_goes_on_as_it_did_for_any_number_of_ranks(name, world):
    source = opened(**SOURCES[name])
    assert hashes(source, SOURCES[name]["state"], 6, world=world) == SOURCES[name]["goes_on"]


def test_a_large_text_is_cut_into_the_groups_it_was():
    Path("numbers.txt").write_bytes(b"".join(b"%d\n" % number for number in range(1_300_000)))
    source = opened(data="stream:numbers.txt", tokenizer="shards/tokenizer", lanes=2)
    assert source.identity() == EXPECTED["large_text"]["identity"]
    assert hashes(source, source.initial_state(), 1) == [EXPECTED["large_text"]["first_batch"]]


@pytest.mark.parametrize("name", PREPARED)
def test_prepare_text_makes_the_data_set_it_made(name):
    assert run_main(prepare_text.main, flags(**PREPARED[name], out="out")) == 0
    assert Path("out/manifest.json").read_text() == Path(f"manifests/{name}.json").read_text()


def test_prepare_text_knows_a_data_set_of_old_and_finishes_it_where_it_is_not_whole(capsys):
    options = flags(**EXPECTED["shards"], out="shards")
    assert run_main(prepare_text.main, options) == 0
    assert "already prepared" in capsys.readouterr().out
    for lost in ("manifest.json", "units/000002.json", "train_000002.bin"):
        Path("shards", lost).unlink()
    assert run_main(prepare_text.main, options) == 0
    assert "4 of 5 units are finished" in capsys.readouterr().out
    for path in (PINNED / "shards").rglob("*.*"):
        assert Path("shards", path.relative_to(PINNED / "shards")).read_bytes() == path.read_bytes(), path.name


# --- training: exact on the machine that recorded it


def train(name: str, run_dir: str, **changes) -> int:
    options = {**EXPECTED["training"], **RUNS[name]["options"], "cache_dir": "cache", "run_dir": run_dir, **changes}
    return run_main(train_accelerate.main, flags(**options))


def records(run_dir: str) -> list[dict]:
    lines = map(json.loads, Path(run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_recorded(found: list[dict], name: str) -> None:
    tolerance = 0 if machine() == EXPECTED["machine"] else TOLERANCE[RUNS[name]["options"]["optimizer"]]
    assert [list(record) for record in found] == [list(record) for record in RUNS[name]["records"]]
    for ours, theirs in zip(found, RUNS[name]["records"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def structure(value):
    return {key: structure(part) for key, part in value.items()} if isinstance(value, dict) else type(value).__name__


def files(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


@on_cpu
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_dropout_logs_what_it_logged_whole_or_resumed(name, capsys):
    assert train(name, "new", keep_last=2) == 0
    assert_recorded(records("new"), name)
    shutil.rmtree("new/checkpoints/step_000012")
    assert train(name, "new", keep_last=2) == 0
    assert "continuing from new/checkpoints/step_000006 at step 6" in capsys.readouterr().out.replace("\\", "/")
    assert_recorded(records("new"), name)


@on_cpu
@pytest.mark.parametrize("name", STORED_RUNS)
def test_a_run_that_the_old_code_began_goes_on(name, capsys):
    run_dir = f"runs/{name}"
    assert [record["step"] for record in records(run_dir) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert train(name, run_dir) == 0
    assert f"continuing from {run_dir}/checkpoints/step_000006 at step 6" in capsys.readouterr().out.replace("\\", "/")
    assert_recorded(records(run_dir), name)


@on_cpu
@pytest.mark.parametrize("name", STORED_RUNS)
def test_a_checkpoint_holds_what_it_held(name):
    assert train(name, "new", keep_last=2) == 0
    old, new = (Path(run, "checkpoints", "step_000006") for run in (f"runs/{name}", "new"))
    expected = RUNS[name]["checkpoint"]
    assert files(new) == files(old) == expected["files"]
    checksums, old_checksums = (json.loads((path / "checksums.json").read_text()) for path in (new, old))
    assert structure(checksums) == structure(old_checksums)
    state, old_state = (json.loads((path / "trainer_state/state.json").read_text()) for path in (new, old))
    assert state["state"]["environment"].pop("processor")  # a note for the card that later checkpoints hold
    assert state["state"].pop("micro_batch_size")  # as well
    assert structure(state) == expected["state"]
    assert state["state"]["identity"] == expected["identity"]
    assert state["state"]["source"] == old_state["state"]["source"]
    assert {**state, "state": None} == {**old_state, "state": None}  # format, version, step, optimizer
    for file in (file for file in expected["files"] if file.endswith(".safetensors")):
        with safe_open(new / file, "pt") as ours, safe_open(old / file, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
            tensors = {key: (ours.get_tensor(key), theirs.get_tensor(key)) for key in theirs.keys()}  # noqa: SIM118
            assert sorted(ours.keys()) == sorted(tensors)
        for key, (tensor, before) in tensors.items():
            assert (tensor.shape, tensor.dtype) == (before.shape, before.dtype), key
            # Elsewhere Adam's steps along a gradient that is zero but for rounding, such as a key's bias, differ.
            assert machine() != EXPECTED["machine"] or torch.equal(tensor, before), key
