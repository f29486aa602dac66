"""The plan against hand arithmetic, published counts, and the tensors that the real model saves for backward."""

import contextlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import yaml

from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.data.shards import MANIFEST
from gpt2repro.files import write_json
from gpt2repro.options import InputError
from gpt2repro.training import planning
from gpt2repro.training.planning import GIB, parameter_count, plan
from train_accelerate import TrainConfig, main

# Source: Radford et al. 2019 and the published checkpoints.
SIZES = {
    "124M": (12, 12, 768, 124_439_808),
    "350M": (24, 16, 1024, 354_823_168),
    "774M": (36, 20, 1280, 774_030_080),
    "1558M": (48, 25, 1600, 1_557_611_200),
}


SEQ_LEN = 64  # of what is counted here


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024 * GIB))


@pytest.fixture(scope="module")
def ten_billion(tmp_path_factory) -> Path:
    """A data set of 10B tokens that takes no room: sparse files, full of token 0."""
    directory = tmp_path_factory.mktemp("data") / "10B"
    tiny_run.write_tiny_shards(directory)
    manifest = json.loads((directory / MANIFEST).read_text())
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 1_000_000_000
    shards = []
    for number in range(10):
        path = directory / f"train_{number:06d}.bin"
        path.write_bytes(header.tobytes())
        os.truncate(path, 1024 + 2 * 1_000_000_000)
        shards.append({"file": path.name, "tokens": 1_000_000_000, "documents": 1, "bytes": 1, "sha256": "0" * 64})
    manifest["splits"]["train"] |= {"tokens": 10_000_000_000, "shards": shards}
    manifest["tokenizer"] |= {"vocab_size": 50257, "eot_id": 50256}
    write_json(directory / MANIFEST, manifest)
    return directory


def config_of(size: str, data, run_dir, **changes) -> TrainConfig:
    n_layer, n_head, n_embd, _ = SIZES[size]
    options = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "data": str(data), "run_dir": run_dir}
    options |= {"keep_last": 1, "gpu_memory_gib": 80.0, "assumed_mfu": 0.5, "dollars_per_gpu_hour": 2.0}
    return TrainConfig(**{**options, **changes})


def plan_of(size: str, data, run_dir, *, processes: int = 8, may_write=None, **changes) -> planning.Plan:
    return plan(config_of(size, data, run_dir, **changes), processes=processes, may_write=may_write)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    n_layer, _, n_embd, n_params = SIZES[size]
    assert parameter_count(vocab_size=50257, n_positions=1024, n_embd=n_embd, n_layer=n_layer) == n_params


def test_the_124m_recipe_in_numbers_worked_out_by_hand(ten_billion, tmp_path):
    found = plan_of("124M", ten_billion, tmp_path)
    assert found.problems == []
    batch = "524,288 tokens = 64 sequences x 1024 tokens x 8 processes x 1 forward passes"
    assert found.tokens == 9_999_745_024 and found.epochs == pytest.approx(0.999975, abs=1e-6)
    assert found.flops_per_token == 855_166_464
    # 855,166,464 x 9,999,745,024 = 8.5515e18 FLOP; 8 x 312e12 x 0.5 = 1.248e15 FLOP/s; 6852.1 s = 1.9034 h
    assert found.hours["A100"] == pytest.approx(1.9034, abs=1e-3)
    memory = found.layout.memory()
    assert memory["weights"] == memory["gradients"] == 497_759_232  # 4 bytes each
    assert memory["optimizer (adamw)"] == 995_518_464  # two moments of 4 bytes
    assert memory["logits"] == 64 * 1024 * 50257 * 4  # compiled blocks: bf16, and a gradient of bf16
    eager = plan_of("124M", ten_billion, tmp_path, compile="off").layout.memory()
    assert eager == memory | {"logits": 64 * 1024 * 50257 * 10}
    alone = plan_of("124M", ten_billion, tmp_path, processes=1).layout.memory()
    # What an H200 needed at its peak (results/h200/adamw, without the context that torch does not count).
    assert (sum(alone.values()) - planning.RESERVE_BYTES) / GIB == pytest.approx(28.48, rel=0.02)
    assert found.checkpoint_bytes == {"model": 497_759_232, "optimizer": 995_518_464}
    report = found.report()
    for part in ("124,439,808", batch, "9,999,745,024 tokens", "1.00 epochs", "855.2 MFLOP", "$30.45", "50% MFU"):
        assert part in report
    assert "nothing in the way" in report and "2 kept" in report  # the newest is the last, and the best another one
    assert "$" not in plan_of("124M", ten_billion, tmp_path, dollars_per_gpu_hour=None).report()


def saved_bytes(
    tiny_model: dict,
    *,
    n_layer: int,
    precision: str,
    sequences: int,
    checkpointing: bool = False,
    how: str = "off",
    masked: bool = False,
) -> int:
    """Bytes of the distinct tensors, parameters aside, that autograd keeps for the backward pass of our model.

    A compiled model is cut into a forward and a backward graph as for Inductor, which then only fuses what it finds.
    """
    import torch

    from configuration_gpt2repro import GPT2ReproConfig
    from gpt2repro.data.documents import document_positions
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    torch.compiler.reset()
    sizes = {**tiny_model, "n_layer": n_layer, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiling = {"fullgraph": True, "dynamic": False, "backend": "aot_eager_decomp_partition"}
    if how != "off":
        model.pad_head()
    if how == "model":
        model.compile(**compiling)
    elif how == "block":
        for block in model.transformer.h:
            block.compile(**compiling)
        model.cross_entropy = torch.compile(model.cross_entropy, **compiling)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, sizes["vocab_size"], (sequences, SEQ_LEN))
    ids[0, SEQ_LEN // 2] = 0
    positions = document_positions(ids, 0 if masked else None)
    context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        model(ids, position_ids=positions, shift_labels=ids, output_logits=False, use_cache=False)
    return sum(size for size, _ in saved.values())


def saved_per_token(tiny_model: dict, **measure) -> float:
    """What grows with the tokens; a copy of a weight in bf16 does not, and is counted with the weights."""
    more, fewer = (saved_bytes(tiny_model, sequences=sequences, **measure) for sequences in (6, 3))
    return (more - fewer) / (3 * SEQ_LEN)


@pytest.mark.parametrize(
    ("how", "precision", "checkpointing", "expected"),
    [
        *(("off", precision, False, planning.BLOCK_BYTES[precision]) for precision in ("fp32", "bf16")),
        *(("off", precision, True, planning.STREAM_BYTES[precision]) for precision in ("fp32", "bf16")),
        ("model", "bf16", False, planning.BLOCK_BYTES["bf16"]),
        ("block", "fp32", False, planning.BLOCK_BYTES["fp32"]),
        ("block", "bf16", False, 34),
    ],
)
def test_activations_are_what_autograd_really_saves(tiny_model, how, precision, checkpointing, expected):
    model = {**tiny_model, "n_embd": 128, "n_head": 2}
    measure = {"how": how, "precision": precision, "checkpointing": checkpointing}
    two, one = (saved_per_token(model, n_layer=n_layer, **measure) for n_layer in (2, 1))
    # The formula leaves out 4-byte statistics: 2 x 2 per token for layer norms, 1 per head for attention.
    assert (two - one) / 128 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("how", "precision", "copies"), [("off", "fp32", 2), ("off", "bf16", 2), ("block", "bf16", 2), ("model", "bf16", 1)]
)
def test_masks_of_documents_are_what_autograd_really_saves(tiny_model, how, precision, copies):
    """Compiled as one graph, all layers share a copy. Recomputation makes one at a time, from a byte each."""
    measure = {"n_layer": 2, "sequences": 3, "precision": precision, "how": how}
    masked, crossed = (saved_bytes(tiny_model, masked=masked, **measure) for masked in (True, False))
    pairs, width, positions = 3 * SEQ_LEN**2, 2 if precision == "bf16" else 4, 3 * SEQ_LEN * 8
    assert masked - crossed == pytest.approx(pairs * copies * width, abs=2 * positions)
    layout = replace(LAYOUT_124M, n_layer=2, seq_len=SEQ_LEN, micro_batch_size=3, precision=precision, masked=True)
    for checkpointing, planned in ((False, 2), (True, 1)):
        memory = replace(layout, gradient_checkpointing=checkpointing).memory()
        assert memory["attention masks (at most)"] == pairs * (1 + planned * width)


@pytest.mark.parametrize(("how", "precision"), [("model", "bf16"), ("block", "bf16"), ("block", "fp32")])
def test_compiled_the_loss_keeps_the_logits_in_one_copy(tiny_model, how, precision):
    """With compiled blocks their gradient takes as much again; in one graph it takes their place (seen on an H200)."""
    measure = {"how": how, "precision": precision, "n_layer": 1}
    large, small = (saved_per_token(tiny_model | {"vocab_size": size}, **measure) for size in (4096, 2048))
    planned = planning.LOGIT_BYTES[how][precision]
    assert (large - small) / 2048 == pytest.approx(planned if how == "model" else planned / 2, rel=0.01)


def test_sharding_divides_the_states_and_muon_keeps_one_moment_of_the_matrices():
    layout = planning.Layout(
        n_params=SIZES["124M"][3], n_layer=12, n_embd=768, vocab_size=50257, seq_len=1024, micro_batch_size=4,
        processes=8, precision="bf16", optimizer="adamw",
    )  # fmt: skip
    whole, split, muon, chunked = (
        replace(layout, **change).memory()
        for change in ({}, {"sharded": True}, {"optimizer": "muon"}, {"loss_chunk_tokens": 512})
    )
    for part in ("weights", "optimizer (adamw)"):
        assert split[part] == whole[part] // 8
    assert split["gradients"] == whole["gradients"]  # until the last micro-batch has been added
    assert whole["activations"] == split["activations"]
    assert whole["optimizer (adamw)"] - muon["optimizer (muon)"] == 4 * 12 * 12 * 768 * 768
    assert chunked["logits"] == whole["logits"] // 8


LAYOUT_124M = planning.Layout(
    n_params=SIZES["124M"][3], n_layer=12, n_embd=768, vocab_size=50257, seq_len=1024, micro_batch_size=1,
    processes=8, precision="bf16", optimizer="adamw", compiled="block",
)  # fmt: skip


@pytest.mark.parametrize(
    ("memory_gib", "rows", "changes", "expected"),
    [
        # (2.09 + 1.5) GiB of states, copies and reserve, and 0.511 GiB per sequence; eager 0.799
        (79.2, 512, {}, 64),  # 36.3 GiB would fit twice, but 64 x 1024 tokens are enough
        (39.5, 512, {}, 32),  # 36.3 of 39.5 is more than 90 %
        (23.6, 512, {}, 32),  # 19.9
        (23.6, 512, {"compiled": "off"}, 16),
        (39.5, 512, {"compiled": "model"}, 64),  # 30.2
        (23.6, 512, {"loss_chunk_tokens": 1024}, 32),
        (16, 512, {}, 16),
        (3, 512, {}, 1),  # not even one fits: the run will say that the memory ran out
        (79.2, 480, {}, 4),  # 60 sequences per process
        (79.2, 8, {}, 1),
        (79.2, 512, {"processes": 2, "seq_len": 2048}, 32),
        (79.2, 4096, {"seq_len": 128}, 512),
        (None, 512, {}, 16),
        (None, 512, {"processes": 64}, 8),
        (None, 30, {"processes": 1}, 2),
    ],
)
def test_the_micro_batch_is_the_largest_power_of_two_that_fits_and_divides(memory_gib, rows, changes, expected):
    assert planning.choose_micro_batch(replace(LAYOUT_124M, **changes), memory_gib, rows) == expected


def test_the_plan_chooses_as_the_run_would(ten_billion, tmp_path):
    import torch

    sizes = {memory: plan_of("124M", ten_billion, tmp_path, gpu_memory_gib=memory) for memory in (79.2, 23.6)}
    assert [found.layout.micro_batch_size for found in sizes.values()] == [64, 32]
    assert all(found.problems == [] for found in sizes.values())
    assert plan_of("124M", ten_billion, tmp_path, micro_batch_size=8).layout.micro_batch_size == 8
    if not torch.accelerator.is_available():
        here = plan_of("124M", ten_billion, tmp_path, gpu_memory_gib=None).layout
        assert here.micro_batch_size == 16 and here.compiled == "off"


def test_a_run_on_a_cpu_chooses_16_or_what_divides_and_keeps_what_it_had(tmp_path):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    shards = tiny_run.write_tiny_shards(tmp_path / "shards")

    def micro_batch_of(run_dir, **changes) -> int:
        """What config.yaml and the newest checkpoint say after a run."""
        options = {"micro_batch_size": "none", "eval_steps": 100, "batch_tokens": 16 * 48, **changes}
        assert main(tiny_run.flags(shards, tmp_path / run_dir, **options)) == 0
        found = yaml.safe_load((tmp_path / run_dir / "config.yaml").read_text())["micro_batch_size"]
        assert read_state(find_checkpoint(tmp_path / run_dir))["micro_batch_size"] == found
        return found

    assert micro_batch_of("divides", max_steps=2) == 16
    assert micro_batch_of("clipped", max_steps=2, batch_tokens=16 * 12) == 4
    assert micro_batch_of("given", max_steps=2, micro_batch_size=2) == 2
    assert micro_batch_of("given", max_steps=4) == 2  # as it was
    assert micro_batch_of("given", max_steps=6, micro_batch_size=4) == 4
    with pytest.raises(InputError, match=r"batch_tokens=100 is not a multiple of 16 \(1 sequences x 16 tokens"):
        micro_batch_of("odd", batch_tokens=100)


def test_1558m_on_one_80_gb_card_says_what_would_fit(ten_billion, tmp_path):
    # 16 bytes x 1.56e9 of states alone are 23 GiB; 32 x 1024 x 48 x 1600 x 36 of activations are 84 GiB.
    one = {"processes": 1, "batch_tokens": 2**19}
    found = plan_of("1558M", ten_billion, tmp_path, micro_batch_size=32, **one)
    (problem,) = found.problems
    assert "do not fit into 80 GiB" in problem
    assert "these would: micro_batch_size=16; or gradient_checkpointing with micro_batch_size=32" in problem
    assert problem in found.report()
    for change in ({"micro_batch_size": 16}, {"micro_batch_size": 32, "gradient_checkpointing": True}):
        assert plan_of("1558M", ten_billion, tmp_path, **one, **change).problems == []
    on_24 = plan_of("1558M", ten_billion, tmp_path, gpu_memory_gib=24.0)
    assert "sharding (fsdp2.yaml) with micro_batch_size=" in on_24.problems[0]
    alone = plan_of("1558M", ten_billion, tmp_path, gpu_memory_gib=24.0, **one)
    assert "neither smaller micro-batches nor recomputation help" in alone.problems[0]


def test_data_that_is_missing_too_small_or_read_a_thousand_times_is_a_problem(tmp_path):
    small = tiny_run.write_tiny_shards(tmp_path / "small")
    sizes = {**tiny_run.OPTIONS, "gpu_memory_gib": 80.0, "run_dir": tmp_path, "data": str(small)}
    assert plan(TrainConfig(**sizes)).problems == []
    (missing,) = plan(TrainConfig(**{**sizes, "data": str(tmp_path / "nowhere")})).problems
    assert "nowhere is no directory" in missing
    (too_few,) = plan(TrainConfig(**{**sizes, "batch_tokens": 2**20, "max_steps": 1})).problems
    assert "fewer than one batch of 1,048,576" in too_few
    (epochs,) = plan(TrainConfig(**{**sizes, "max_steps": 10_000_000})).problems
    assert "epochs of" in epochs and "lower --max_steps" in epochs
    assert plan(TrainConfig(**{**sizes, "data": "stream:anything"})).epochs is None


def test_a_gpu_preset_on_a_cpu_is_a_problem_with_its_days(ten_billion, tmp_path):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    (problem,) = plan_of("124M", ten_billion, tmp_path, gpu_memory_gib=None).problems
    assert "days on this CPU" in problem and "quickstart" in problem


def test_the_plan_takes_its_sizes_from_the_model_it_starts_from(ten_billion, tmp_path):
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    config = GPT2ReproConfig(n_layer=3, n_head=2, n_embd=32, n_positions=64, vocab_size=50257)
    model = GPT2ReproForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    found = plan_of("124M", ten_billion, tmp_path, init_from=str(tmp_path / "model"), seq_len=64, micro_batch_size=64)
    assert found.problems == [] and found.layout.n_params == model.num_parameters()
    (problem,) = plan_of("124M", ten_billion, tmp_path, init_from=str(tmp_path / "none")).problems
    assert "there is no model" in problem


def test_averaged_weights_are_counted(ten_billion, tmp_path):
    plain, averaged = (plan_of("124M", ten_billion, tmp_path, **how) for how in ({}, {"ema_decay": 0.999}))
    weights = 4 * 124_439_808
    assert sum(averaged.layout.memory().values()) - sum(plain.layout.memory().values()) == weights
    assert sum(averaged.checkpoint_bytes.values()) - sum(plain.checkpoint_bytes.values()) == weights


def test_a_disk_too_small_is_named_before_the_run(ten_billion, tmp_path, monkeypatch):
    # Three checkpoints of 12 bytes x 124,439,808 parameters = 4.17 GiB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * GIB))
    (problem,) = plan_of("124M", ten_billion, tmp_path / "not" / "yet").problems
    assert problem.startswith("2 checkpoints and one being written need 4.17 GiB, but only 4.00 GiB are free at")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * GIB))
    assert plan_of("124M", ten_billion, tmp_path / "not" / "yet").problems == []


def test_the_plan_keeps_what_the_writer_keeps(ten_billion, tmp_path):
    """Newest, best, final and milestones, by the rule that prunes them; test_checkpoint.py looks at the files."""
    changes = {"max_steps": 1000, "save_steps": 100, "milestone_steps": 500, "keep_last": 2}
    assert plan_of("124M", ten_billion, tmp_path, **changes).kept_checkpoints == 4  # 100 (best), 500, 900, 1000


def test_a_plan_of_more_steps_than_anybody_makes_is_made_at_once(ten_billion, tmp_path):
    start = time.perf_counter()
    found = plan_of("124M", ten_billion, tmp_path, max_steps=10**12, save_steps=1)
    assert any("epochs of" in problem for problem in found.problems) and time.perf_counter() - start < 60


def test_a_streams_missing_files_are_a_problem(tmp_path):
    (problem,) = plan_of("124M", "stream:no/such/*.jsonl", tmp_path).problems
    assert problem.startswith("stream:no/such/*.jsonl names no file here, and is no Hub dataset")


def test_the_hub_is_asked_before_the_run(ten_billion, tmp_path):
    changes = {"push_to_hub": "me/model", "save_steps": 6358}  # three revisions
    found = plan_of("124M", ten_billion, tmp_path, may_write=lambda repo: ("me", None), **changes)
    # 3 x 4 bytes + 8 bytes per parameter = 2.32 GiB
    assert found.problems == [] and "me/model: about 2.32 GiB in 3 revisions, as me" in found.report()
    refused = plan_of("124M", ten_billion, tmp_path, may_write=lambda repo: ("", f"{repo} is not yours"), **changes)
    assert refused.problems == ["me/model is not yours"]
