"""What each of two gloo processes does in the tests of sharded checkpoints; started by test_checkpoint.py."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.checkpoint import writer as writing
from gpt2repro.checkpoint.layout import from_all_ranks, from_rank_zero
from gpt2repro.checkpoint.reader import find_checkpoint
from gpt2repro.checkpoint.restore import restore
from gpt2repro.checkpoint.writer import CheckpointWriter, SaveError
from gpt2repro.options import InputError
from gpt2repro.training.optim import build_optimizer
from modeling_gpt2repro import GPT2ReproForCausalLM


def build(tiny: dict, optimizer: str, seed: int = 0, sharded: bool = False):
    """A model with 97 rows of embeddings (odd on purpose) and its optimizer, as the training loop builds them."""
    torch.manual_seed(seed)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**tiny))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, build_optimizer(model, name=optimizer, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def train_step(model, optimizer, seed: int) -> float:
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def work(rank: int, world: int, folder, tiny: dict, out) -> None:
    """For both optimizers: restore a one-process checkpoint into a sharded model, go on, save sharded, restore that."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    report = {}
    for name in ("adamw", "muon"):
        plain = folder / name / "plain"
        model, optimizer = build(tiny, name, seed=1, sharded=True)
        restore(find_checkpoint(plain, all_ranks=True), model, optimizer)
        writer = CheckpointWriter(folder / name / "sharded", keep_last=1)
        writer.save(
            2, model=model, optimizer=optimizer, state={"world": world}
        )  # before any step here: must equal plain
        writer.point("best", 2)
        report[f"{name} loss"] = train_step(model, optimizer, seed=2)
        writer.save(3, model=model, optimizer=optimizer, state={"world": world})
        report[f"{name} next loss"] = train_step(model, optimizer, seed=3)
        writer.close()
        again, again_optimizer = build(tiny, name, seed=5, sharded=True)
        restore(find_checkpoint(folder / name / "sharded", all_ranks=True), again, again_optimizer)
        report[f"{name} next loss, resumed"] = train_step(again, again_optimizer, seed=3)

    # One rank cannot write its part: every rank is told, and the checkpoint does not exist.
    writer = CheckpointWriter(folder / "broken")
    if rank == 1:
        writing.save_file = full_disk
    writer.save(4, model=model, optimizer=optimizer, state={})
    try:
        writer.close()
        report["broken"] = "no error"
    except SaveError as error:
        report["broken"] = str(error)

    # The nodes do not share the directory.
    writing.VISIBLE_SECONDS = 0.5
    try:
        CheckpointWriter(folder / f"only on node {rank}")
        report["apart"] = "no error"
    except InputError as error:
        report["apart"] = str(error)
    out.put((rank, report))
    dist.destroy_process_group()


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def wait_for_a_slow_rank(rank: int, folder) -> None:
    """One of two processes, of which the first twice takes longer than the default group's timeout."""
    begun = dist.FileStore(str(folder / "begun"), 2)
    begun.set(str(rank), "yes")
    begun.wait(["0", "1"])  # starting may take longer as well
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=5))
    assert from_rank_zero(lambda: time.sleep(8) or "verified") == "verified"
    if rank == 0:
        time.sleep(8)
    assert find_checkpoint(folder / "nothing", all_ranks=True) is None
    assert from_all_ranks(rank) == [0, 1]
    dist.destroy_process_group()
