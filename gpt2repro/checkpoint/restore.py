"""Puts a checkpoint's tensors back into a model and an optimizer, on any number of processes, sharded or not."""

import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt2repro.checkpoint.layout import PIECE_NAME
from gpt2repro.checkpoint.reader import read_header
from gpt2repro.checkpoint.tensors import named_parameters, named_weights, open_tensors, rows_of, unwrap
from gpt2repro.options import InputError


@torch.no_grad()
def restore(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill the model's weights and the optimizer's state in place; any number of processes, sharded or not.

    `path` comes from `find_checkpoint`, which has verified it.

    Raises: InputError naming the tensor that is missing, too many, or of another shape.
    """
    path, model = Path(path), unwrap(model)
    weights = named_weights(model)
    with open_tensors(path / "model.safetensors") as file:
        _same_names(path / "model.safetensors", set(file.keys()), set(weights), "the model")
        for name, tensor in weights.items():
            _fill(tensor, [(0, tensor.shape[0], file.get_slice(name))], f"{path}: {name}")
    if optimizer is not None:
        _restore_optimizer(path, model, getattr(optimizer, "optimizer", optimizer))


def _restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if (written_by := read_header(path).get("optimizer")) != type(optimizer).__name__:
        raise InputError(
            f"{path} has the state of {written_by}, this run uses {type(optimizer).__name__}; "
            "resume with the --optimizer that the run began with"
        )
    with contextlib.ExitStack() as stack:
        pieces: dict[str, dict[str, list]] = {}  # parameter -> kind -> [(start, stop, slice)]; a scalar is [tensor]
        for file_path in _piece_files(path):
            file = stack.enter_context(open_tensors(file_path))
            rows = _piece_rows(file_path, file)
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                name, _, kind = key.rpartition("/")
                part = (*rows[key], file.get_slice(key)) if key in rows else file.get_tensor(key)
                pieces.setdefault(name, {}).setdefault(kind, []).append(part)
        if not pieces:
            optimizer.state.clear()  # saved before the first step
            return

        names = {id(parameter): name for name, parameter in named_parameters(model).items()}
        expected = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
        _same_names(path / "trainer_state", set(pieces), set(expected), "the optimizer")
        for name, (parameter, group) in expected.items():
            state = {}
            for kind, parts in pieces[name].items():
                if isinstance(parts[0], Tensor):  # AdamW's step count, on the device where AdamW keeps it
                    on_device = group.get("fused") or group.get("capturable")
                    state[kind] = parts[0].to(parameter.device if on_device else "cpu")
                else:
                    state[kind] = torch.zeros_like(parameter, requires_grad=False)
                    _fill(state[kind], parts, f"{path}: {kind} of {name}")
            optimizer.state[parameter] = state


def _piece_files(path: Path) -> list[Path]:
    """The optimizer's files. Raises: InputError unless their names agree on the number W of writers."""
    found = sorted((path / "trainer_state").glob("optimizer-*.safetensors"))
    matches = [PIECE_NAME.fullmatch(file.name) for file in found]
    counts = {match[2] for match in matches if match}
    if not found or None in matches or len(counts) != 1 or len(found) > int(next(iter(counts))):
        raise InputError(f"{path}/trainer_state: expected optimizer-RRRRR-of-WWWWW.safetensors, one W for all")
    return found


def _piece_rows(path: Path, file) -> dict[str, list[int]]:
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError, RecursionError):
        rows = json.loads((file.metadata() or {})["rows"])
        if all(0 <= start < stop for start, stop in rows.values()):
            return rows
    raise InputError(f"{path}: its header does not say which rows it holds")


def _fill(tensor: Tensor, parts: list, name: str) -> None:
    """Copy this rank's rows of `tensor` from pieces (start, stop, safetensors slice), which must cover it."""
    parts = sorted(parts, key=lambda part: part[:2])
    row_shape, end = list(tensor.shape[1:]), 0
    for start, stop, piece in parts:
        if start != end or piece.get_shape() != [stop - start, *row_shape]:
            found = f"rows {start} to {stop} of shape {piece.get_shape()}" if len(parts) > 1 else f"{piece.get_shape()}"
            raise InputError(f"{name} has shape {found}, expected {list(tensor.shape)}")
        end = stop
    if end != tensor.shape[0]:
        raise InputError(f"{name} has {end} rows, expected {tensor.shape[0]}")

    first, last, local = 0, tensor.shape[0], tensor
    if isinstance(tensor, DTensor):
        first, last, _ = rows_of(tensor)
        local = tensor.to_local()
    for start, stop, piece in parts:
        low, high = max(start, first), min(stop, last)
        if low < high:
            local[low - first : high - first].copy_(piece[low - start : high - start])


def _same_names(place: Path, found: set[str], expected: set[str], owner: str) -> None:
    for difference, has, verb in ((expected - found, "lacks", "needs"), (found - expected, "has", "does not know")):
        if difference:
            more = f" and {len(difference) - 1} more" if len(difference) > 1 else ""
            raise InputError(f"{place} {has} {min(difference)}{more}, which {owner} {verb}")
