"""The tensors of a model under the names of a plain one, without the wrappers of DDP, FSDP2 and torch.compile."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from gpt2repro.options import InputError


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once (a tied head is its embedding) and every persistent buffer, as a plain model names them."""
    model = unwrap(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # state_dict() is called first, since under FSDP2 it reshards a root that an evaluation left gathered.
    buffers = {_clean(name): tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {**named_parameters(model), **buffers}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_clean(name): parameter for name, parameter in model.named_parameters()}


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")  # what torch.compile(block) puts into the names


def unwrap(model: nn.Module) -> nn.Module:
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def rows_of(tensor: DTensor) -> tuple[int, int, bool]:
    """(start, stop) of this rank's rows of a sharded tensor, and whether this rank is the one to write them.

    FSDP2 shards dim 0 in pieces of ceil(rows / ranks); with two mesh dimensions (HSDP) the other one replicates.
    """
    sharded = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    if any(tensor.placements[dim] != Shard(0) for dim in sharded) or len(sharded) > 1:
        raise InputError(f"a tensor is sharded as {tensor.placements}; checkpoints know only FSDP2's Shard(0)")
    coordinate = tensor.device_mesh.get_coordinate()
    writes = all(coordinate[dim] == 0 for dim in range(len(coordinate)) if dim not in sharded)
    if not sharded:
        return 0, tensor.shape[0], writes
    per_rank = -(-tensor.shape[0] // tensor.device_mesh.size(sharded[0]))
    start = min(per_rank * coordinate[sharded[0]], tensor.shape[0])
    stop = min(start + per_rank, tensor.shape[0])
    assert tensor.to_local().shape[0] == stop - start, "FSDP2 no longer shards like torch.chunk"
    return start, stop, writes


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None
