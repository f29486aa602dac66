"""One of two gloo processes that train tiny models in shards; `test_fsdp2.py` starts them and judges their numbers.

    python fsdp2_worker.py RANK WORLD PORT FOLDER CASE…

Accelerate enters FSDP2 on accelerator devices only, so a CPU never sees that path. Here the weights are split on a CPU
mesh into the units that Accelerate makes: each block; final layer norm, embeddings and head together (their weight is
tied); the rest. Everything else is what training does, and is compared with the same model in one piece.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.checkpoint.reader import find_checkpoint
from gpt2repro.checkpoint.restore import restore
from gpt2repro.checkpoint.writer import CheckpointWriter
from gpt2repro.evaluation import losses as evaluation
from gpt2repro.evaluation.losses import inference, loss_sum
from gpt2repro.models import compile_model
from gpt2repro.training.averaging import WeightAverage
from gpt2repro.training.optim import build_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM

STEPS, SAVE_AFTER, ROWS, SEQ_LEN = 4, 2, 8, 32
# 500: the head is padded to 512 columns. 512: nothing to pad, the case that died in its first step when compiled.
CASES = {
    "off": {"how": "off", "padded": True},
    "block": {"how": "block", "padded": True},
    "block, vocabulary of 512": {"how": "block", "vocab_size": 512, "padded": True},
    "chunked loss": {"how": "block", "padded": True, "loss_chunk_tokens": 30},
    "block, plain head": {"how": "block"},
    "bf16": {"how": "block", "padded": True, "bf16": True},
    "muon, off": {"how": "off", "vocab_size": 512, "optimizer": "muon"},
    "muon, block": {"how": "block", "padded": True, "optimizer": "muon"},
    "gradient checkpointing": {"how": "block", "padded": True, "gradient_checkpointing": True},
    "checkpointing and chunked loss": {"how": "off", "gradient_checkpointing": True, "loss_chunk_tokens": 30},
    "prepared by accelerate": {"how": "block", "padded": True, "by_accelerate": True},
    "lora on the head": {"how": "off", "padded": True, "lora": True},
    "ddp, block": {"how": "block", "padded": True, "ddp": True},
    "ddp, model": {"how": "model", "padded": True, "ddp": True},
}

graphs_compiled = 0


def compile_without_generating_code() -> None:
    """What dynamo can trace beside FSDP2's hooks is the question here; C++ for each graph would take minutes."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs):
        global graphs_compiled
        graphs_compiled += 1
        return aot_eager(graph, inputs)

    torch.compile = functools.partial(torch.compile, backend=backend)
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend=backend)


def build(case: dict) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=case.get("vocab_size", 500), **sizes, **ends))
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        model.pad_head()  # the adapter takes a padded head for the nn.Linear that it is
        return get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    return model


def optimizer_of(model: nn.Module, case: dict) -> torch.optim.Optimizer:
    options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    return build_optimizer(model, name=case.get("optimizer", "adamw"), **options)


def shard(model: nn.Module, mesh, *, bf16: bool = False) -> nn.Module:
    """The units that Accelerate 1.15 makes of a model with tied embeddings, and its policy for bf16 as a run has it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in core.transformer.h:
        fully_shard(block, **options)
    fully_shard([core.transformer.ln_f, core.transformer.wte, core.lm_head], reshard_after_forward=False, **options)
    return fully_shard(model, **options)


def shard_by_accelerate(model: nn.Module, mesh) -> nn.Module:
    """The same by Accelerate's own function, which asks for no more of an Accelerator than this."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2ReproBlock"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp_shard"]),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def no_sync(model: nn.Module, last: bool) -> None:
    """What `accelerator.no_sync` does: gradients travel with the last micro-batch of a step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = last
    else:
        model.set_requires_gradient_sync(last)


def train_step(model, optimizer, x, y, case: dict, micro_batches: int) -> tuple[float, float]:
    """One optimizer step as the training loop makes it. Returns this process' loss and the gradient's norm."""
    total = 0.0
    for index, (inputs, targets) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)):
        if micro_batches > 1:
            no_sync(model, index == micro_batches - 1)
        loss = model(
            input_ids=inputs,
            shift_labels=targets,
            use_cache=False,
            output_logits=False,
            num_items_in_batch=x.numel(),
            loss_chunk_tokens=case.get("loss_chunk_tokens"),
        ).loss
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.item()


def run(case: dict, folder: Path, rank: int, world: int) -> dict:
    """Train in shards, evaluate, sample and save in the middle; the same in one piece; compare."""
    global graphs_compiled
    torch._dynamo.reset()
    graphs_compiled = 0
    model, whole = build(case), build(case)
    if case.get("gradient_checkpointing"):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if case.get("padded") and not case.get("lora"):
        model.pad_head()  # compile_model does it for a GPU
    columns = set()
    if case["how"] != "model":  # a hook that notes something has no place in the one graph
        head = model.get_base_model().lm_head if case.get("lora") else model.lm_head
        head.register_forward_hook(lambda module, inputs, logits: columns.add(logits.shape[-1]))
    sharded = not case.get("ddp")
    compile_model(model, case["how"], "cpu", world, sharded=sharded)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    if case.get("ddp"):
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        by_accelerate, bf16 = case.get("by_accelerate"), case.get("bf16", False)
        model = shard_by_accelerate(model, mesh) if by_accelerate else shard(model, mesh, bf16=bf16)
    optimizer, whole_optimizer = optimizer_of(model, case), optimizer_of(whole, case)
    averages = [WeightAverage(one, 0.9) for one in (model.module if case.get("ddp") else model, whole)]
    if case.get("lora"):  # which the training loop does not make; its generate calls the model inside, past FSDP's hook
        averages = []

    tokens = torch.randint(0, 500, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(5))
    x, y = tokens[:, :-1], tokens[:, 1:]
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    found = {"losses": [], "whole_losses": [], "norms": [], "whole_norms": []}
    for step in range(STEPS):
        loss, norm = train_step(model, optimizer, x[mine], y[mine], case, micro_batches=2)
        mean = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(mean)
        whole_loss, whole_norm = train_step(whole, whole_optimizer, x, y, {}, micro_batches=1)
        found["losses"].append(mean.item() / world)
        found["whole_losses"].append(whole_loss)
        found["norms"].append(norm)
        found["whole_norms"].append(whole_norm)
        for average in averages:
            average.update(step + 1)
        if step + 1 == SAVE_AFTER:
            found |= in_the_middle(model, whole, optimizer, averages, x, y, case, folder)
    weights = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.named_parameters()}
    found["weights"] = max(
        (weights[("module." if case.get("ddp") else "") + n] - p).abs().max().item()
        for n, p in whole.named_parameters()
    )
    found["graphs"], found["columns"] = graphs_compiled, sorted(columns)
    if not case.get("lora"):
        found["continued_whole"] = continued_whole(folder, x, y, case)
    return found


def in_the_middle(model, whole, optimizer, averages, x, y, case: dict, folder: Path) -> dict:
    """Evaluation, a sample and a checkpoint, as between two steps of a run."""
    with inference(model) as forward, inference(whole) as whole_forward:
        found = {"evaluated": loss_sum(forward, x, y).item(), "whole_evaluated": loss_sum(whole_forward, x, y).item()}
    with contextlib.ExitStack() as stack:
        for average in averages:
            stack.enter_context(average.in_place())
        with inference(model) as forward, inference(whole) as whole_forward:
            pair = loss_sum(forward, x, y).item(), loss_sum(whole_forward, x, y).item()
            found["averaged"], found["whole_averaged"] = pair if averages else (None, None)
    core = model.module if case.get("ddp") else model
    prompt = {"input_ids": x[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    options = {"max_length": 10, "do_sample": False, "pad_token_id": 0}
    with inference(model):
        found["sample"] = core.generate(**prompt, **options, synced_gpus=not case.get("ddp")).tolist()
    with inference(whole):
        found["whole_sample"] = whole.generate(**prompt, **options).tolist()
    if not case.get("lora"):
        writer = CheckpointWriter(folder, keep_last=1)
        state = {"step": SAVE_AFTER}
        writer.save(SAVE_AFTER, model=model, optimizer=optimizer, state=state, averages=averages[0].averages)
        writer.close()
        if dist.get_rank() == 0:  # written whole, as the one piece has it
            saved = load_file(folder / f"step_{SAVE_AFTER:06d}/ema/model.safetensors")
            found["average_saved"] = max((saved[n] - a).abs().max().item() for n, a in averages[1].averages.items())
    return found


def continued_whole(folder: Path, x, y, case: dict) -> list[float]:
    """The losses of the steps after the checkpoint, in one piece from what the shards have saved."""
    model = build(case)
    optimizer = optimizer_of(model, case)
    restore(find_checkpoint(folder, all_ranks=True), model, optimizer)
    return [train_step(model, optimizer, x, y, {}, micro_batches=1)[0] for _ in range(SAVE_AFTER, STEPS)]


def main(rank: int, world: int, port: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    compile_without_generating_code()
    evaluation.LOSS_CHUNK_TOKENS = 100  # so that an evaluation calls the head more than once, as a real one does
    found = {}
    for index, name in enumerate(names):
        found[name] = run(CASES[name], folder / str(index), rank, world)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
