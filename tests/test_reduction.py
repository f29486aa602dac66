"""One order of additions: the same bits on one, two and four processes, and a tree that is written out by hand."""

import json
from pathlib import Path

import pytest
import tiny_run
import torch

import train_accelerate
from gpt2repro.files import sha256_of
from gpt2repro.options import run_main
from gpt2repro.training.reduction import TreeSum

SPEED = {"tokens_per_second", "step_seconds", "mfu", "memory_gib"}


def test_the_tree_adds_neighbours_first():
    """A sum whose every order of additions gives another result, against the tree written out by hand."""
    numbers = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    tree = TreeSum()
    for number in numbers:
        tree.add([number.clone()])
    a, b, c, d, e, f, g, h = numbers
    (total,) = tree.total()
    assert torch.equal(total, ((a + b) + (c + d)) + ((e + f) + (g + h)))
    assert not torch.equal(total, sum(numbers)), "these numbers tell the orders apart"


def run(data: Path, directory: Path, processes: int, run_program, **options) -> dict:
    """Everything that a run computed: its log without the clock, and the sha256 of weights and optimizer."""
    options = {"reduction": "fixed", "max_steps": 6, "save_steps": 6, "eval_steps": 3, "sample_tokens": 4, **options}
    flags = tiny_run.flags(data, directory, **options)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    done = run_program([*launch, "-m", "gpt2repro", "train", *flags], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    checkpoint = directory / "checkpoints/step_000006"
    samples = (directory / "samples/step_000006.md").read_text()
    names = ["model.safetensors", "trainer_state/optimizer-00000-of-00001.safetensors"]
    found = {name: sha256_of(checkpoint / name) for name in names}
    return found | {"log": [{k: v for k, v in line.items() if k not in SPEED} for line in lines], "samples": samples}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_run.write_tiny_shards(tmp_path_factory.mktemp("data") / "shards")


def test_two_processes_with_dropout_give_the_bits_of_one(data, tmp_path, run_program):
    # 8 sequences in micro-batches of 1: a tree of 8 leaves
    one, two = (run(data, tmp_path / str(n), n, run_program, micro_batch_size=1) for n in (1, 2))
    assert one == two


def test_the_plain_reduction_does_not_so_the_test_above_can_fail(data, tmp_path, run_program):
    options = {"micro_batch_size": 1, "resid_pdrop": 0, "reduction": "fast"}
    one, two = (run(data, tmp_path / str(n), n, run_program, **options) for n in (1, 2))
    assert one["log"] != two["log"] or one["model.safetensors"] != two["model.safetensors"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon"},
        {"precision": "bf16"},
        {"resid_pdrop": 0, "compile": "block"},
        {"optimizer": "muon", "precision": "bf16", "attn_pdrop": 0.1, "compile": "model"},
    ],
    ids=str,
)
def test_four_processes_give_the_bits_of_one(data, tmp_path, run_program, options):
    one, two, four = (run(data, tmp_path / str(n), n, run_program, micro_batch_size=1, **options) for n in (1, 2, 4))
    assert one == two == four


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stream_of_text_gives_the_same_bits_too(data, tmp_path, run_program):
    words = tiny_run.TEXT.split()
    lines = [
        json.dumps({"text": " ".join(words[(n * 7 + i * i) % len(words)] for i in range(5 + n % 30))})
        for n in range(3000)
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    stream = {"tokenizer": data / "tokenizer", "val_data": data, "micro_batch_size": 1, "cache_dir": tmp_path / "cache"}
    source = f"stream:{tmp_path / 'documents.jsonl'}"
    one, two = (run(source, tmp_path / str(n), n, run_program, **stream) for n in (1, 2))
    assert one == two


def test_what_decides_the_bits_may_not_change_on_resume(data, tmp_path, capsys):
    def train(**options) -> int:
        flags = tiny_run.flags(
            data, tmp_path / "run", **{"max_steps": 4, "reduction": "fixed", "micro_batch_size": 2, **options}
        )
        return run_main(train_accelerate.main, flags)

    assert train() == 0
    for change, said in (
        ({"micro_batch_size": 1}, "reduction: micro_batch_size was 2 and is now 1"),
        ({"reduction": "fast"}, "reduction: kind was fixed and is now None"),
    ):
        assert train(max_steps=8, **change) == 2
        assert said in capsys.readouterr().err
    assert train(max_steps=8) == 0


@pytest.mark.parametrize("options", [{"batch_tokens": 192}, {"batch_tokens": 96, "micro_batch_size": 2}], ids=str)
def test_numbers_that_are_no_power_of_two_are_refused(data, tmp_path, capsys, options):
    flags = tiny_run.flags(data, tmp_path / "run", **{"reduction": "fixed", "micro_batch_size": 4, **options})
    assert run_main(train_accelerate.main, flags) == 2
    assert "reduction=fixed needs powers of two, not 3 micro-batches" in capsys.readouterr().err
