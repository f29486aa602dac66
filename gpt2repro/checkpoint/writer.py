"""Checkpoints: written aside and renamed, verified before use, found, restored on any number of processes, pruned.

    checkpoints/step_000500/
        config.json  generation_config.json  model.safetensors  tokenizer files  the Hub pair's two .py files
        trainer_state/state.json                                 the training loop's state, as JSON
        trainer_state/optimizer-RRRRR-of-WWWWW.safetensors       tensors "parameter name/kind", rows [start, stop)
        ema/                                                     the averaged weights as a model of their own, if any
        checksums.json                                           size and sha256 of every file above
    checkpoints/latest, best, final -> step_N                    relative symlinks, or text files where there are none

A save copies everything to host memory; the training loop waits for this copy only. A thread writes the copy into
`.step_000500.tmp-<random>`, fsyncs it and renames it, so a directory named step_N is whole at every instant. Of a
replicated model rank 0 writes everything. Of a sharded model (FSDP2) every rank writes its own rows of the optimizer's
tensors, and rank 0 the gathered weights. Both are one format; each rank that restores reads the rows it needs.

Nothing here is ever pickled or unpickled. Knows no data, no schedule, no Accelerator; reads no model code.
"""

import copy
import errno
import functools
import inspect
import itertools
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gpt2repro.checkpoint import layout
from gpt2repro.checkpoint.tensors import named_parameters, named_weights, rows_of, unwrap
from gpt2repro.files import sha256_of, sync_folder
from gpt2repro.options import InputError, say
from gpt2repro.redaction import scrub

VISIBLE_SECONDS = 30  # how long a network filesystem may take to show one node what another wrote


class SaveError(InputError):
    """A checkpoint could not be written. The message says why, and what is still whole."""


class CheckpointWriter:
    """Saves checkpoints under `directory`. Every rank builds one and makes the same calls in the same order.

    The newest `keep_last` are kept (None keeps all), and also the best, the final and every `milestone_steps`-th step.

    Raises: InputError if the ranks do not see one common `directory`.
    """

    def __init__(self, directory: str | Path, *, keep_last: int | None = None, milestone_steps: int | None = None):
        self.directory = Path(directory)
        self.keep_last, self.milestone_steps = keep_last, milestone_steps
        self.rank, self.world = layout.rank_and_world()
        # The writing threads have a process group of their own: the training loop's is busy, and may be NCCL.
        group = layout.patient_group() if self.world > 1 else None
        self._exchange = functools.partial(layout.from_all_ranks, group=group)  # others only while none is running
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._in_flight: int | None = None  # the step being written
        self._awaiting: list[str] = []  # pointers to set as soon as that step is written
        self._lock = threading.Lock()
        self._host: dict[str, Tensor] = {}  # copies, reused by every save, since pinned memory is slow to allocate
        self._constant_files: dict[str, bytes] = {}  # config, tokenizer, model code: the same in every checkpoint

        self.directory.mkdir(parents=True, exist_ok=True)
        self._token = self._common_token()
        if self.rank == 0:
            for left_over in self.directory.glob(".*.tmp-*"):
                shutil.rmtree(left_over) if left_over.is_dir() and not left_over.is_symlink() else left_over.unlink()

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer=None,
        state: dict,
        averages: dict[str, Tensor] | None = None,
        extra_files: dict[str, str] | None = None,
        on_written: Callable[[Path], None] | None = None,
    ) -> None:
        """Write step_N. The caller waits for the copy to host memory, and for an unfinished earlier save.

        `read_state` returns `state`, scrubbed, since checkpoints are published. `averages`, by the parameters' names,
        become the model in ema/. `extra_files` are written beside config.json. `on_written` is called on rank 0, in the
        writing thread, when the checkpoint is whole; its errors are printed and do not end the run.

        Raises: SaveError if the save before could not be written; `wait` says it of the last one.
        """
        self.wait()
        model, optimizer = unwrap(model), getattr(optimizer, "optimizer", optimizer)
        header = {"format": layout.FORMAT, "version": layout.VERSION, "step": step}
        header |= {"optimizer": type(optimizer).__name__, "state": scrub(state)}
        texts = {"trainer_state/state.json": json.dumps(header, indent=1), **(extra_files or {})}
        small_files = {name: text.encode() for name, text in texts.items()}
        models = {"": named_weights(model)}
        if averages:
            models[layout.EMA] = {**models[""], **averages}
        weights, pieces, rows = self._host_copy(model, optimizer, models)

        self._in_flight = step
        work = (step, model, tokenizer, weights, pieces, rows, small_files, on_written)
        # Not a daemon, so the interpreter finishes the writing before it ends.
        self._thread = threading.Thread(target=self._write, args=work, name=f"checkpoint-{step}")
        self._thread.start()

    def point(self, name: str, step: int | None) -> None:
        """Let the pointer `name` (best, final) point to step_N: at once, or as soon as that step is written.

        None: there is no such checkpoint any more.
        """
        if step is None:
            if self.rank == 0:
                (self.directory / name).unlink(missing_ok=True)
            return
        with self._lock:
            if self._in_flight == step:
                self._awaiting.append(name)
                return
        if self.rank == 0 and layout.step_path(self.directory, step).is_dir():
            layout.set_pointer(self.directory, name, step)

    def discard_after(self, step: int) -> None:
        """Rename the checkpoints of later steps to abandoned_step_N, since the run continues from `step`.

        Call it after resuming from or rewinding to `step`; else the next start would continue from a later one. The
        next pruning deletes the abandoned checkpoints.
        """
        self.wait()
        if self.rank == 0:
            for later, path in layout.list_steps(self.directory):
                if later > step:
                    aside = path.with_name(f"abandoned_{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
            for name in layout.POINTERS:
                if (layout.pointed_step(self.directory, name) or 0) > step:
                    (self.directory / name).unlink()
            if remaining := layout.list_steps(self.directory):
                layout.set_pointer(self.directory, "latest", remaining[-1][0])

    def wait(self) -> None:
        """Wait until nothing is being written. Raises: SaveError if the writing failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the writing and free the host copies. Raises: SaveError if the writing failed."""
        self.wait()
        self._host.clear()

    def _common_token(self) -> str:
        """A random part of names, the same on all ranks. Raises: InputError if the ranks do not share the directory."""
        token = self._exchange(secrets.token_hex(8))[0]
        mark = self.directory / f".shared.tmp-{token}"
        if self.rank == 0:
            mark.touch()
        self._exchange()  # from here on it is there
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
            os.listdir(self.directory)  # makes a network filesystem look again
        blind = [rank for rank, sees in enumerate(self._exchange(seen)) if not sees]
        if self.rank == 0:
            mark.unlink()
        if blind:
            raise InputError(
                f"ranks {blind} do not see what rank 0 writes in {self.directory.absolute()}: --run_dir must lie on a "
                "filesystem that all nodes share"
            )
        return token

    @torch.no_grad()
    def _host_copy(self, model: nn.Module, optimizer, models: dict[str, dict[str, Tensor]]) -> tuple[dict, dict, dict]:
        """(weights of each of `models`, optimizer tensors, rows of those) that this rank writes, in host memory."""
        weights, pieces, rows = {}, {}, {}
        for folder, tensors in models.items():
            for name, tensor in tensors.items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective of all ranks
                if self.rank == 0:
                    weights.setdefault(folder, {})[name] = self._to_host(folder + name, whole)

        names = {id(parameter): name for name, parameter in named_parameters(model).items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for kind, value in optimizer.state.get(parameter, {}).items():
                    key = f"{names[id(parameter)]}/{kind}"
                    if isinstance(value, DTensor):
                        start, stop, writes = rows_of(value)
                        value = value.to_local()
                    else:
                        start, stop, writes = 0, value.shape[0] if value.dim() else 0, self.rank == 0
                    if writes and (value.dim() == 0 or stop > start):
                        pieces[key] = self._to_host(key, value)
                        if value.dim():
                            rows[key] = [start, stop]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the one wait for all the copies
        return weights, pieces, rows

    def _to_host(self, key: str, tensor: Tensor) -> Tensor:
        copied = self._host.get(key)
        if copied is None or copied.shape != tensor.shape or copied.dtype != tensor.dtype:
            copied = self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return copied.copy_(tensor, non_blocking=tensor.is_cuda)  # elsewhere nobody would wait for it

    def _write(self, step, model, tokenizer, weights, pieces, rows, small_files, on_written) -> None:
        """The work of the thread. On every rank the next `wait` raises what went wrong."""
        target = layout.step_path(self.directory, step)
        aside = self.directory / f".{target.name}.tmp-{self._token}"
        writers = self.world if any(isinstance(weight, DTensor) for weight in model.parameters()) else 1
        tensors = itertools.chain(pieces.values(), *(model.values() for model in weights.values()))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        try:
            failure, checksums = None, {}  # of the files that this rank has written
            try:
                if pieces or self.rank == 0:
                    (aside / "trainer_state").mkdir(parents=True, exist_ok=True)
                    piece = f"trainer_state/optimizer-{self.rank:05d}-of-{writers:05d}.safetensors"
                    # One entry only: safetensors writes several in random order, and equal states have equal files.
                    save_file(pieces, aside / piece, metadata={"rows": json.dumps(rows, sort_keys=True)})
                    checksums[piece] = _settle(aside / piece)
                if self.rank == 0:
                    if not self._constant_files:
                        self._constant_files = _model_files(model, tokenizer)
                    for folder, tensors in weights.items():
                        name = f"{folder}model.safetensors"
                        (aside / folder).mkdir(exist_ok=True)
                        save_file(tensors, aside / name, metadata={"format": "pt"})
                        checksums[name] = _settle(aside / name)
                        small_files |= {folder + name: content for name, content in self._constant_files.items()}
                    for name, content in small_files.items():
                        (aside / name).parent.mkdir(parents=True, exist_ok=True)
                        (aside / name).write_bytes(content)
                        checksums[name] = _settle(aside / name)
            except Exception as error:
                failure = error
            written = self._exchange(checksums if failure is None else None)  # every rank's; None of a rank that failed

            if self.rank == 0 and None not in written:
                try:
                    checksums = {name: record for files in written for name, record in files.items()}
                    (aside / "checksums.json").write_text(json.dumps(checksums, indent=1, sort_keys=True))
                    _settle(aside / "checksums.json")
                    self._publish(aside, target, step)
                except Exception as error:
                    failure = error
            if failed := [rank for rank, fails in enumerate(self._exchange(failure is not None)) if fails]:
                if self.rank == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                raise _save_error(failure, failed, step, self.directory, size)
            if self.rank == 0 and on_written is not None:
                try:
                    on_written(target)
                except Exception as error:  # a failed picture or upload does not end a run
                    say(f"warning: after saving {target}: {type(error).__name__}: {error}")
        except Exception as error:
            self._error = error
        finally:
            with self._lock:
                self._in_flight = None
                self._awaiting.clear()

    def _publish(self, aside: Path, target: Path, step: int) -> None:
        """Rename, point, prune: from the first rename on the checkpoint counts."""
        for folder in {path.parent for path in aside.rglob("*")}:
            sync_folder(folder)
        if target.exists():  # a damaged one, or one from before a rewind
            target.rename(self.directory / f".{target.name}.tmp-old-{self._token}")
        aside.rename(target)
        sync_folder(self.directory)
        shutil.rmtree(self.directory / f".{target.name}.tmp-old-{self._token}", ignore_errors=True)
        layout.set_pointer(self.directory, "latest", step)
        with self._lock:
            self._in_flight = None
            for name in self._awaiting:
                layout.set_pointer(self.directory, name, step)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        steps = [step for step, _ in layout.list_steps(self.directory)]
        pointed = {newest, *(layout.pointed_step(self.directory, name) for name in layout.POINTERS)}
        keep = layout.kept_steps(steps, self.keep_last, self.milestone_steps, pointed=pointed)
        for step in set(steps) - keep:
            doomed = self.directory / f".{layout.step_path(self.directory, step).name}.tmp-old-{self._token}"
            layout.step_path(self.directory, step).rename(doomed)  # never half a directory under its own name
            shutil.rmtree(doomed, ignore_errors=True)
        for abandoned in self.directory.glob("abandoned_step_*"):
            shutil.rmtree(abandoned, ignore_errors=True)


def _model_files(model: nn.Module, tokenizer) -> dict[str, bytes]:
    """The files of a Hub repo besides the weights: name -> content."""
    kind = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # fully_shard makes a subclass
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(model.config)
        config.architectures = [kind.__name__]
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        for part in (config, getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        if tokenizer is not None:
            # It was made for the data: it does not know the model's context, and remembers where it was read from.
            written = Path(folder) / "tokenizer_config.json"
            settings = json.loads(written.read_text(encoding="utf-8"))
            settings = {name: settings[name] for name in settings if name not in ("is_local", "local_files_only")}
            settings["model_max_length"] = model.config.n_positions
            written.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    for reference in (getattr(model.config, "auto_map", None) or {}).values():
        module = reference.split("--")[-1].split(".")[0]  # "modeling_gpt2repro.GPT2ReproForCausalLM"
        files[f"{module}.py"] = Path(inspect.getfile(kind)).with_name(f"{module}.py").read_bytes()
    return files


def _settle(path: Path) -> dict:
    """Sync a written file to the disk. Returns its size and sha256."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _save_error(failure: Exception | None, failed: list[int], step: int, directory: Path, size: int) -> Exception:
    if not isinstance(failure, OSError | SafetensorError | None):
        return failure  # a bug of ours: with its traceback
    elsewhere = f"rank {failed[0]} could not write its part, and says why"
    reason = elsewhere if failure is None else getattr(failure, "strerror", None) or str(failure)
    advice = "make room" if failure is None or "space" in reason or "large" in reason else "see to it"
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(directory).free
        advice = f"make room (it needs about {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free)"
    return SaveError(
        f"the checkpoint of step {step} could not be written to {directory}: {reason}. Earlier checkpoints and the log "
        f"are whole; {advice} and start the same command again to go on from the last one"
    )
