"""The plan against hand arithmetic, published counts, and the tensors that the real model saves for backward."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest

from gpt2repro.training import planning
from gpt2repro.training.planning import GIB, hub_permission, memory_by_part, parameter_count, plan

# Source: Radford et al. 2019 and the published checkpoints.
SIZES = {
    "124M": (12, 12, 768, 124_439_808),
    "350M": (24, 16, 1024, 354_823_168),
    "774M": (36, 20, 1280, 774_030_080),
    "1558M": (48, 25, 1600, 1_557_611_200),
}


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1024 * GIB))


def plan_of(size: str = "124M", run_dir=".", **changes) -> planning.Plan:
    n_layer, n_head, n_embd, n_params = SIZES[size]
    arguments = {
        "n_params": n_params,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "vocab_size": 50257,
        "seq_len": 1024,
        "batch_tokens": 524_288,
        "micro_batch_size": 16,
        "processes": 8,
        "max_steps": 19_073,
        "epoch_tokens": 9_999_994_880,
        "precision": "bf16",
        "gradient_checkpointing": False,
        "sharded": False,
        "optimizer": "adamw",
        "keep_checkpoints": 2,
        "run_dir": run_dir,
        "gpu_memory_gib": 80,
        "mfu": 0.5,
        "dollars_per_gpu_hour": 2.0,
        "push_to_hub": None,
    }
    return plan(**{**arguments, **changes})


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    n_layer, _, n_embd, n_params = SIZES[size]
    assert parameter_count(vocab_size=50257, n_positions=1024, n_embd=n_embd, n_layer=n_layer) == n_params


def test_the_124m_recipe_in_numbers_worked_out_by_hand(tmp_path):
    found = plan_of(run_dir=tmp_path)
    assert found.problems == []
    assert found.layout == "524,288 tokens = 16 sequences x 1024 tokens x 8 processes x 4 forward passes"
    assert found.tokens == 9_999_745_024 and found.epochs == pytest.approx(0.999975, abs=1e-6)
    assert found.flops_per_token == 855_166_464
    # 855,166,464 x 9,999,745,024 = 8.5515e18 FLOP; 8 x 312e12 x 0.5 = 1.248e15 FLOP/s; 6852.1 s = 1.9034 h
    assert found.hours["A100"] == pytest.approx(1.9034, abs=1e-3)
    assert found.memory["weights"] == found.memory["gradients"] == 497_759_232  # 4 bytes each
    assert found.memory["optimizer (adamw)"] == 995_518_464  # two moments of 4 bytes
    assert found.memory["logits"] == 16 * 1024 * 50257 * 10
    assert found.checkpoint_bytes == {"model": 497_759_232, "optimizer": 995_518_464}
    report = found.report()
    for part in (
        "124,439,808",
        "9,999,745,024 tokens",
        "1.00 epochs",
        "855.2 MFLOP",
        "$30.45",
        "50% MFU",
        "nothing in the way",
    ):
        assert part in report


def saved_bytes(
    tiny_model: dict, *, n_layer: int, precision: str, checkpointing: bool, sequences: int, seq_len: int
) -> int:
    """Bytes of the distinct tensors, parameters aside, that autograd keeps for the backward pass of our model."""
    import torch

    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    sizes = {**tiny_model, "n_layer": n_layer, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        # A copy of a weight in bf16 is counted with the weights: it does not grow with the batch.
        grows = tensor.dim() > 0 and tensor.shape[0] in (sequences, sequences * seq_len)
        if grows and storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, sizes["vocab_size"], (sequences, seq_len))
    context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        model(ids, shift_labels=ids, output_logits=False, use_cache=False)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_really_saves(tiny_model, precision, checkpointing):
    sequences, seq_len, n_embd = 3, 64, 128
    model = {**tiny_model, "n_embd": n_embd, "n_head": 2}
    measure = {"precision": precision, "checkpointing": checkpointing, "sequences": sequences, "seq_len": seq_len}
    two_blocks = saved_bytes(model, n_layer=4, **measure) - saved_bytes(model, n_layer=2, **measure)
    table = planning.STREAM_BYTES if checkpointing else planning.BLOCK_BYTES
    # The formula leaves out 4-byte statistics: 2 x 2 per token for layer norms, 1 per head for attention.
    assert two_blocks / (2 * sequences * seq_len * n_embd) == pytest.approx(table[precision], rel=0.01)


def test_sharding_divides_the_states_and_muon_keeps_one_moment_of_the_matrices():
    sizes = {"n_params": SIZES["124M"][3], "n_layer": 12, "n_embd": 768, "vocab_size": 50257, "seq_len": 1024}
    choice = {"micro_batch_size": 4, "precision": "bf16", "gradient_checkpointing": False, "loss_chunk_tokens": None}
    whole = memory_by_part(**sizes, **choice, processes=8, sharded=False, optimizer="adamw")
    split = memory_by_part(**sizes, **choice, processes=8, sharded=True, optimizer="adamw")
    muon = memory_by_part(**sizes, **choice, processes=8, sharded=False, optimizer="muon")
    for part in ("weights", "optimizer (adamw)"):
        assert split[part] == whole[part] // 8
    assert split["gradients"] == whole["gradients"]  # until the last micro-batch has been added
    assert whole["activations"] == split["activations"]
    assert whole["optimizer (adamw)"] - muon["optimizer (muon)"] == 4 * 12 * 12 * 768 * 768
    chunked = memory_by_part(
        **sizes, **{**choice, "loss_chunk_tokens": 512}, processes=1, sharded=False, optimizer="adamw"
    )
    assert chunked["logits"] == whole["logits"] // 8


def test_1558m_on_one_80_gb_card_says_what_would_fit(tmp_path):
    # 16 bytes x 1.56e9 of states alone are 23 GiB; 32 x 1024 x 48 x 1600 x 36 of activations are 84 GiB.
    found = plan_of("1558M", tmp_path, processes=1, micro_batch_size=32)
    (problem,) = [text for text in found.problems if "do not fit" in text]
    assert "do not fit into 80 GiB" in problem
    assert "these would: micro_batch_size=16; or gradient_checkpointing with micro_batch_size=32" in problem
    assert problem in found.report()
    for change in ({"micro_batch_size": 16}, {"micro_batch_size": 32, "gradient_checkpointing": True}):
        assert not [text for text in plan_of("1558M", tmp_path, processes=1, **change).problems if "fit" in text]
    on_24 = plan_of("1558M", tmp_path, processes=8, gpu_memory_gib=24)
    assert "sharding (fsdp2.yaml) with micro_batch_size=" in on_24.problems[0]
    alone = plan_of("1558M", tmp_path, processes=1, gpu_memory_gib=24)
    assert "neither smaller micro-batches nor recomputation help" in alone.problems[0]


def test_impossible_batches_are_named_with_a_number_that_works(tmp_path):
    found = plan_of(run_dir=tmp_path, batch_tokens=500_000, micro_batch_size=8, n_head=7, epoch_tokens=1000)
    assert found.problems == [
        "n_embd=768 is not a multiple of n_head=7",
        "batch_tokens=500000 is not a multiple of 65536 (8 sequences x 1024 tokens x 8 processes); try 524288",
        "the data has 1,000 tokens, fewer than one batch of 500,000",
    ]
    assert plan_of(run_dir=tmp_path, epoch_tokens=None).epochs is None
    assert "epochs n/a (stream)," in plan_of(run_dir=tmp_path, epoch_tokens=None).report()


def test_a_disk_too_small_is_named_before_the_run(tmp_path, monkeypatch):
    # Three checkpoints of 12 bytes x 124,439,808 parameters = 4.17 GiB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * GIB))
    (problem,) = plan_of(run_dir=tmp_path / "not" / "yet").problems
    assert problem.startswith("2 checkpoints and one being written need 4.17 GiB, but only 4.00 GiB are free at")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * GIB))
    assert plan_of(run_dir=tmp_path / "not" / "yet").problems == []


def account(name="me", role="write", orgs=("lab",)):
    return {"name": name, "orgs": [{"name": org} for org in orgs], "auth": {"accessToken": {"role": role}}}


def test_hub_permission_is_asked_before_the_run(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    def answer(reply):
        monkeypatch.setattr(HfApi, "whoami", reply)

    answer(lambda self: account())
    assert hub_permission("me/model") == hub_permission("lab/model") == hub_permission("model") == ("me", None)
    found = plan_of(run_dir=tmp_path, push_to_hub="me/model", hub_revisions=3)
    # 3 x 4 bytes + 8 bytes per parameter = 2.32 GiB
    assert found.problems == [] and "me/model: about 2.32 GiB in 3 revisions, as me" in found.report()
    assert "belongs to other, but this login is me" in hub_permission("other/model")[1]
    answer(lambda self: account(role="read"))
    assert "may only read" in hub_permission("me/model")[1]
    answer(lambda self: (_ for _ in ()).throw(OSError("no route to host\nmore")))
    assert hub_permission("me/model")[1].endswith("(`hf auth login`): no route to host")
    assert plan_of(run_dir=tmp_path, push_to_hub="me/model").problems


def test_without_login_or_network_the_hub_question_is_a_sentence():
    name, complaint = hub_permission("me/model")  # the tests run with HF_HUB_OFFLINE and without a token
    assert name == "" and "the Hub does not say who you are" in complaint and "\n" not in complaint
