"""One order of additions: the same bits on one, two, four and eight processes, and a tree written out by hand."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import tiny_run
import torch

import train_accelerate
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.commands.bench.harness import peak_memory_gib
from gpt2repro.files import sha256_of
from gpt2repro.options import InputError, run_main
from gpt2repro.publishing.model_card import card_files
from gpt2repro.training import run as training_run
from gpt2repro.training.machine import build_accelerator
from gpt2repro.training.planning import Layout
from gpt2repro.training.reduction import FixedReduction, TreeSum

SPEED = {"tokens_per_second", "step_seconds", "mfu", "memory_gib"}
HELLASWAG = Path(__file__).parent / "data/hellaswag_synthetic.jsonl"
NAMES = ("processes", "compile", "optimizer", "precision", "dropout", "data", "micro_batches")
# Every pair of values stands in some row.
PAIRWISE = [
    (2, "off", "muon", "fp32", 0.1, "stream", 8),
    (2, "block", "muon", "fp32", 0.0, "shards", 16),
    (2, "model", "adamw", "bf16", 0.0, "shards", 8),
    (4, "off", "adamw", "bf16", 0.0, "shards", 16),
    (4, "block", "adamw", "fp32", 0.1, "stream", 16),
    (4, "model", "muon", "bf16", 0.1, "stream", 8),
    (8, "off", "muon", "fp32", 0.0, "shards", 16),
    (8, "block", "muon", "bf16", 0.1, "shards", 8),
    (8, "model", "adamw", "fp32", 0.0, "stream", 16),
]


def test_the_tree_adds_neighbours_first():
    """A sum whose every order of additions gives another result, against the tree written out by hand."""
    numbers = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    total = torch.full((1000,), math.nan)
    tree = TreeSum(total)
    for _ in range(2):  # steps
        for number in numbers:
            tree.add(number.clone())
        tree.finish()
        a, b, c, d, e, f, g, h = numbers
        assert torch.equal(total, ((a + b) + (c + d)) + ((e + f) + (g + h)))
    assert not torch.equal(total, sum(numbers)), "these numbers tell the orders apart"


@pytest.mark.parametrize("passes", [1, 2, 4, 16])
def test_the_plan_counts_the_sets_of_gradients_that_are_held(passes):
    """Against the memory that a real step takes: the sets, and less than a layer's gradient beside them."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(16)))

    def step():
        reduction = FixedReduction(layers)
        for _ in range(passes):
            loss = layers(torch.ones(1, 256)).sum()
            loss.backward()
            reduction.keep(loss)
        reduction.finish()

    n_params = 16 * 256**2
    sizes = {"n_params": n_params, "n_layer": 1, "n_embd": 64, "vocab_size": 64, "seq_len": 1, "micro_batch_size": 1}
    layout = Layout(**sizes, processes=2, precision="fp32", optimizer="adamw", fixed_batch_tokens=2 * passes)
    planned = layout.memory()["gradients"]
    assert planned / (4 * n_params) == max(1, math.log2(passes))
    assert planned <= peak_memory_gib(step) * 2**30 <= planned + 1.5 * 4 * 256**2


def run(data: Path, directory: Path, processes: int, run_program, **options) -> dict:
    """Everything that a run computed: its log without the clock, and the sha256 of weights and optimizer."""
    options = {"reduction": "fixed", "max_steps": 6, "save_steps": 6, "eval_steps": 3, "sample_tokens": 4, **options}
    flags = tiny_run.flags(data, directory, **options)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    done = run_program([*launch, "-m", "gpt2repro", "train", *flags], timeout=800)
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


def test_the_table_below_has_every_pair():
    levels = [sorted(set(column), key=str) for column in zip(*PAIRWISE, strict=True)]
    pairs = {
        (a, b, x, y)
        for a, b in itertools.combinations(range(len(NAMES)), 2)
        for x, y in itertools.product(levels[a], levels[b])
    }
    assert pairs == {(a, b, row[a], row[b]) for row in PAIRWISE for a, b in itertools.combinations(range(len(row)), 2)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", PAIRWISE, ids=str)
def test_several_processes_give_the_bits_of_one(data, tmp_path, run_program, row):
    row = dict(zip(NAMES, row, strict=True))
    options = {name: row[name] for name in ("compile", "optimizer", "precision")}
    options |= {"micro_batch_size": 1, "batch_tokens": 16 * row["micro_batches"], "attn_pdrop": row["dropout"]}
    options |= {"resid_pdrop": row["dropout"], "n_positions": 600, "hellaswag": HELLASWAG, "hellaswag_limit": 5}
    source = data
    if row["data"] == "stream":
        words = tiny_run.TEXT.split()
        texts = (" ".join(words[(n * 7 + i * i) % len(words)] for i in range(5 + n % 30)) for n in range(3000))
        (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        source = f"stream:{tmp_path / 'documents.jsonl'}"
        options |= {"tokenizer": data / "tokenizer", "val_data": data, "cache_dir": tmp_path / "cache"}
    one, several = (run(source, tmp_path / str(n), n, run_program, **options) for n in (1, row["processes"]))
    assert one == several


@pytest.fixture
def train(data, tmp_path, fresh_accelerate):
    """train(option=…) -> exit code of the same run, on one process."""
    from accelerate.state import AcceleratorState

    def train(**options) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)  # each start may have another precision
        options = {"max_steps": 4, "reduction": "fixed", "micro_batch_size": 2, **options}
        return run_main(train_accelerate.main, tiny_run.flags(data, tmp_path / "run", **options))

    return train


def test_what_decides_the_bits_may_not_change_on_resume(train, capsys):
    assert train() == 0
    for change, said in (
        ({"reduction": "fast"}, "reduction was fixed and is now fast"),
        ({"micro_batch_size": 1}, "reduction: micro_batch_size was 2 and is now 1"),
        ({"batch_tokens": 256}, "batch_tokens was 128 and is now 256"),  # and with it the number of micro-batches
        ({"compile": "block"}, "reduction: compile was off and is now block"),
        ({"precision": "bf16"}, "reduction: precision was fp32 and is now bf16"),
        ({"precision": "fp64"}, "reduction: precision was fp32 and is now fp64"),
        ({"attn_implementation": "eager"}, "reduction: attn_implementation was sdpa and is now eager"),
        ({"loss_chunk_tokens": 16}, "reduction: loss_chunk_tokens was None and is now 16"),
    ):
        assert train(max_steps=8, **change) == 2
        error = capsys.readouterr().err
        assert said in error and "Set them back, or start a new --run_dir" in error
    torch.set_num_threads(2)
    try:
        assert train(max_steps=8) == 2
    finally:
        torch.set_num_threads(1)
    assert "reduction: OMP_NUM_THREADS was 1 and is now 2. Set them back" in capsys.readouterr().err
    assert train(max_steps=8) == 0
    assert "warning" not in capsys.readouterr().err


def card_of(run_dir: Path) -> str:
    return card_files(find_checkpoint(run_dir), repo="user/tiny", run_dir=run_dir)["README.md"].decode()


def test_a_run_that_was_fast_does_not_become_fixed(train, tmp_path, capsys):
    assert train(reduction="fast") == 0
    assert "| gradients | summed in the order of this number of processes (`--reduction fast`) |" in card_of(
        tmp_path / "run"
    )
    assert train(max_steps=8) == 2
    assert "reduction was fast and is now fixed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["shards", "recipe"])
def test_another_torch_or_processor_is_warned_of_and_stays_in_the_state(
    kind, train, data, tmp_path, capsys, monkeypatch
):
    if kind == "recipe":
        recipe = {"sources": {"all": {"data": str(data)}}, "phases": [{"from_tokens": 0, "weights": {"all": 1.0}}]}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        train = functools.partial(train, data=tmp_path / "recipe.yaml")
    assert train() == 0
    here = training_run.origin_of_bits(torch.device("cpu"))
    assert f"torch {torch.__version__} on " in here
    monkeypatch.setattr(training_run, "origin_of_bits", lambda device: "torch 9.9 on another CPU")
    assert train(max_steps=8) == 0
    assert f"was made by {here}, and this is torch 9.9 on another CPU" in capsys.readouterr().err
    assert train(max_steps=12) == 0
    assert "another CPU" not in capsys.readouterr().err  # said where it changes
    assert read_state(find_checkpoint(tmp_path / "run"))["identity"]["machines"] == [here, "torch 9.9 on another CPU"]
    assert "\nreduction: fixed\n" in (tmp_path / "run/config.yaml").read_text()
    decided = "micro_batch_size 2, attn_implementation sdpa, loss_chunk_tokens None, bf16_residual False"
    made = f"made on {here}, then on torch 9.9 on another CPU |"
    (row,) = [line for line in card_of(tmp_path / "run").splitlines() if line.startswith("| gradients")]
    assert "(`--reduction fixed`)" in row and decided in row and row.endswith(made)


@pytest.mark.parametrize("options", [{"batch_tokens": 192}, {"batch_tokens": 96, "micro_batch_size": 2}], ids=str)
def test_numbers_of_micro_batches_that_are_no_power_of_two_are_refused(train, capsys, options):
    assert train(**{"micro_batch_size": 4, **options}) == 2
    assert "reduction=fixed needs powers of two, not 3 micro-batches" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [3, 6])
def test_numbers_of_processes_that_are_no_power_of_two_are_refused(train, capsys, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert train() == 2
    assert f"not 4 micro-batches in the batch and {processes} processes; take 1, 2, 4 or 8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_takes_the_embeddings_backward_that_adds_in_one_order(deterministic):
    """In Inductor's code for a CPU. A GPU's comes from the same branch; without it, additions come in any order."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    torch._dynamo.reset()
    torch.use_deterministic_algorithms(deterministic)
    try:
        embedding, ids = torch.nn.Embedding(97, 16), torch.arange(64) % 7
        _, (_, backward) = run_fw_bw_and_get_code(lambda: torch.compile(embedding)(ids).sin())
    finally:
        torch.use_deterministic_algorithms(False)
    assert ("aten.index_put_" in backward) == deterministic


def test_fsdp2_is_refused_with_the_reason(data, tmp_path, monkeypatch, fresh_accelerate):
    from accelerate import Accelerator

    # On a CPU, Accelerate never enters FSDP2 by itself.
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    config = train_accelerate.TrainConfig(data=str(data), run_dir=tmp_path, reduction="fixed", micro_batch_size=4)
    with pytest.raises(
        InputError, match=r"reduction=fixed does not work with FSDP2, whose reduce-scatter .*; take DDP"
    ):
        build_accelerator(config)
