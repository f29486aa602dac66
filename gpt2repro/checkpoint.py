"""Checkpoints: written aside and renamed, verified before use, found, restored on any number of processes, pruned.

    checkpoints/step_000500/
        config.json  generation_config.json  model.safetensors  tokenizer files  the Hub pair's two .py files
        trainer_state/state.json                                 what the training loop wants back, as JSON
        trainer_state/optimizer-RRRRR-of-WWWWW.safetensors       tensors "parameter name/kind", rows [start, stop)
        checksums.json                                           size and sha256 of every file above
    checkpoints/latest, best, final -> step_N                    relative symlinks, or text files where there are none

A save copies everything to host memory (that is all the training loop waits for) and a thread writes the copy into
`.step_000500.tmp-<random>`, fsyncs it and renames it. So a directory named step_N is whole at every instant. Of a
replicated model rank 0 writes all; of a sharded one (FSDP2) every rank writes its own rows of the optimizer's tensors
and rank 0 the gathered weights. Both are one format: whoever restores reads the rows it needs.

Nothing here is ever pickled or unpickled. Knows no data, no schedule, no Accelerator; reads no model code.
"""

import contextlib
import copy
import errno
import hashlib
import inspect
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from gpt2repro.options import InputError

FORMAT, VERSION = "gpt2repro-checkpoint", 1
STEP_NAME = re.compile(r"step_(\d{6,12})")
PIECE_NAME = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
POINTERS = ("latest", "best", "final")
MODEL_TYPES = ("gpt2repro", "gpt2")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".msgpack", ".h5")
LARGEST_JSON = 64 << 20  # bytes: ours are a few kB; a hostile one must not fill the memory
VISIBLE_SECONDS = 30  # how long a network filesystem may take to show one node what another wrote


class SaveError(InputError):
    """A checkpoint could not be written: the message says why and what is still whole."""


# --- writing ---------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Saves checkpoints under `directory`. Every rank builds one and makes the same calls in the same order.

    `keep_last` newest are kept (None keeps all), besides the best, the final and every `milestone_steps`-th step.
    `asynchronous=False` waits for each save, for comparison and for debugging.

    Raises: InputError where the ranks do not see one common `directory`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int | None = None,
        milestone_steps: int | None = None,
        asynchronous: bool = True,
    ):
        self.directory = Path(directory)
        self.keep_last, self.milestone_steps, self.asynchronous = keep_last, milestone_steps, asynchronous
        self.rank, self.world = _rank_and_world()
        # The writing threads talk through a group of their own: the training loop's may be NCCL, and is busy.
        self._group = dist.new_group(backend="gloo") if self.world > 1 else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._in_flight: int | None = None  # the step being written
        self._awaiting: list[str] = []  # pointers to set as soon as it is whole
        self._lock = threading.Lock()
        self._host: dict[str, Tensor] = {}  # copies, reused by every save: pinned memory is expensive to get
        self._constant_files: dict[str, bytes] = {}  # config, tokenizer, model code: the same in every checkpoint

        self.directory.mkdir(parents=True, exist_ok=True)
        self._token = self._common_token()
        if self.rank == 0:
            for left_over in self.directory.glob(".*.tmp-*"):
                if left_over.name.endswith(self._token):
                    continue
                shutil.rmtree(left_over) if left_over.is_dir() and not left_over.is_symlink() else left_over.unlink()

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer=None,
        state: dict,
        extra_files: dict[str, bytes | str] | None = None,
        on_written: Callable[[Path], None] | None = None,
    ) -> float:
        """Write step_N; returns the seconds that the caller was held up, an unfinished earlier save included.

        `state` comes back from `read_state`. `extra_files` lie beside config.json. `on_written` is called on
        rank 0, in the writing thread, when the checkpoint is whole; where it fails, that is said and nothing else.

        Raises: SaveError where this save (synchronous) or the one before (asynchronous) could not be written.
        """
        started = time.perf_counter()
        self.wait()
        model, optimizer = _unwrap(model), getattr(optimizer, "optimizer", optimizer)
        header = {"format": FORMAT, "version": VERSION, "step": step, "optimizer": type(optimizer).__name__}
        small_files = {"trainer_state/state.json": json.dumps({**header, "state": state}, indent=1).encode()}
        for name, content in (extra_files or {}).items():
            if not _is_plain(name):
                raise ValueError(f"extra file {name!r}: expected a relative path inside the checkpoint")
            small_files[name] = content.encode() if isinstance(content, str) else content
        weights, pieces, rows = self._host_copy(model, optimizer)

        self._in_flight = step
        work = (step, model, tokenizer, weights, pieces, rows, small_files, on_written)
        # Not a daemon: an interpreter that ends finishes writing first.
        self._thread = threading.Thread(target=self._write, args=work, name=f"checkpoint-{step}")
        self._thread.start()
        if not self.asynchronous:
            self.wait()
        return time.perf_counter() - started

    def point(self, name: str, step: int) -> None:
        """Let `name` (best, final) point to step_N: at once, or as soon as that step is written."""
        if name not in POINTERS:
            raise ValueError(f"no pointer is called {name!r}; there are {', '.join(POINTERS)}")
        with self._lock:
            if self._in_flight == step:
                self._awaiting.append(name)
                return
        if self.rank == 0 and _step_path(self.directory, step).is_dir():
            _set_pointer(self.directory, name, step)

    def discard_after(self, step: int) -> None:
        """Set aside the checkpoints of later steps as abandoned_step_N: the run goes on from `step` another way.

        Call it after resuming or rewinding to `step`, else the next start would continue from the abandoned ones.
        They are deleted at the next pruning.
        """
        self.wait()
        if self.rank == 0:
            for later, path in list_steps(self.directory):
                if later > step:
                    aside = path.with_name(f"abandoned_{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
            for name in POINTERS:
                target = _pointed_step(self.directory, name)
                if target is not None and target > step:
                    (self.directory / name).unlink()
            if remaining := list_steps(self.directory):
                _set_pointer(self.directory, "latest", remaining[-1][0])

    def wait(self) -> None:
        """Return when nothing is being written. Raises: SaveError, where the writing failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finish what is being written and let go of the host copies."""
        self.wait()
        self._host.clear()

    def _common_token(self) -> str:
        """A random name part that all ranks share, after making sure that they also share the directory."""
        token = torch.frombuffer(bytearray(secrets.token_bytes(8)), dtype=torch.uint8)
        if self._group is None:
            return bytes(token.tolist()).hex()
        dist.broadcast(token, src=0, group=self._group)
        name = bytes(token.tolist()).hex()
        mark = self.directory / f".shared.tmp-{name}"
        if self.rank == 0:
            mark.touch()
        dist.barrier(group=self._group)
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
            os.listdir(self.directory)  # makes a network filesystem look again
        blind = [rank for rank, record in enumerate(self._exchange([int(seen)])) if not record[0]]
        if self.rank == 0:
            mark.unlink()
        if blind:
            raise InputError(
                f"ranks {blind} do not see what rank 0 writes in {self.directory.absolute()}: --run_dir must lie on a "
                "filesystem that all nodes share"
            )
        return name

    def _exchange(self, record: list[int]) -> list[list[int]]:
        """Every rank's record, in the order of ranks. Only between writing threads, or where none is running."""
        if self._group is None:
            return [record]
        gathered = [torch.empty(len(record), dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(gathered, torch.tensor(record, dtype=torch.int64), group=self._group)
        return [one.tolist() for one in gathered]

    @torch.no_grad()
    def _host_copy(self, model: nn.Module, optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
        """(weights, optimizer tensors, rows of each of those) that this rank writes, in host memory."""
        weights, pieces, rows = {}, {}, {}
        for name, tensor in named_weights(model).items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective: all ranks come here
            if self.rank == 0:
                weights[name] = self._to_host(name, whole)

        names = {id(parameter): name for name, parameter in _named_parameters(model).items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for kind, value in optimizer.state.get(parameter, {}).items():
                    key = f"{names[id(parameter)]}/{kind}"
                    if isinstance(value, DTensor):
                        start, stop, writes = _rows_of(value)
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
            pinned = tensor.device.type == "cuda"
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._host[key] = copied
        return copied.copy_(tensor, non_blocking=tensor.is_cuda)  # elsewhere nobody would wait for it

    def _write(self, step, model, tokenizer, weights, pieces, rows, small_files, on_written) -> None:
        """The thread's work. Whatever goes wrong is kept for the next `wait`, on every rank."""
        target = _step_path(self.directory, step)
        aside = self.directory / f".{target.name}.tmp-{self._token}"
        writers = self.world if any(isinstance(weight, DTensor) for weight in model.parameters()) else 1
        size = sum(t.numel() * t.element_size() for t in (*weights.values(), *pieces.values()))
        try:
            failure, checksums, record = None, {}, [0] * 34  # failed, bytes, sha256 of this rank's piece
            try:
                if pieces or self.rank == 0:
                    (aside / "trainer_state").mkdir(parents=True, exist_ok=True)
                    piece = _piece_name(self.rank, writers)
                    # One entry only: safetensors writes several in random order, and equal states have equal files.
                    save_file(pieces, aside / piece, metadata={"rows": json.dumps(rows, sort_keys=True)})
                    checksums[piece] = _settle(aside / piece)
                    record[1:] = [checksums[piece]["bytes"], *bytes.fromhex(checksums[piece]["sha256"])]
                if self.rank == 0:
                    save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
                    checksums["model.safetensors"] = _settle(aside / "model.safetensors")
                    if not self._constant_files:
                        self._constant_files = _model_files(model, tokenizer)
                    for name, content in {**self._constant_files, **small_files}.items():
                        (aside / name).parent.mkdir(parents=True, exist_ok=True)
                        (aside / name).write_bytes(content)
                        checksums[name] = _settle(aside / name)
            except Exception as error:
                failure, record[0] = error, 1
            records = self._exchange(record)

            if self.rank == 0 and not any(one[0] for one in records):
                try:
                    for rank, (_, length, *digest) in enumerate(records):
                        if length:  # the ranks of a replicated model other than 0 wrote nothing
                            checksums[_piece_name(rank, writers)] = {"bytes": length, "sha256": bytes(digest).hex()}
                    (aside / "checksums.json").write_text(json.dumps(checksums, indent=1, sort_keys=True))
                    _settle(aside / "checksums.json")
                    self._publish(aside, target, step)
                except Exception as error:
                    failure = error
            outcome = self._exchange([int(failure is not None)])
            failed = [rank for rank, one in enumerate(outcome) if one[0]]
            if failed:
                if self.rank == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                raise _save_error(failure, failed, step, self.directory, size)
            if self.rank == 0 and on_written is not None:
                try:
                    on_written(target)
                except Exception as error:  # a picture or an upload that fails is no reason to end a run
                    print(
                        f"warning: after saving {target}: {type(error).__name__}: {error}", file=sys.stderr, flush=True
                    )
        except Exception as error:
            self._error = error
        finally:
            with self._lock:
                self._in_flight = None
                self._awaiting.clear()

    def _publish(self, aside: Path, target: Path, step: int) -> None:
        """Rename, point, prune: from the first rename on the checkpoint counts."""
        for folder in {path.parent for path in aside.rglob("*")}:
            _sync_folder(folder)
        if target.exists():  # a damaged one, or one from before a rewind
            target.rename(self.directory / f".{target.name}.tmp-old-{self._token}")
        aside.rename(target)
        _sync_folder(self.directory)
        shutil.rmtree(self.directory / f".{target.name}.tmp-old-{self._token}", ignore_errors=True)
        _set_pointer(self.directory, "latest", step)
        with self._lock:
            self._in_flight = None
            for name in self._awaiting:
                _set_pointer(self.directory, name, step)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        if self.keep_last is None:
            return
        steps = [step for step, _ in list_steps(self.directory)]
        keep = {newest, *steps[-max(self.keep_last, 1) :]}
        keep |= {_pointed_step(self.directory, name) for name in POINTERS}
        if self.milestone_steps:
            keep |= {step for step in steps if step % self.milestone_steps == 0}
        for step in set(steps) - keep:
            doomed = self.directory / f".{_step_path(self.directory, step).name}.tmp-old-{self._token}"
            _step_path(self.directory, step).rename(doomed)  # never half a directory under its own name
            shutil.rmtree(doomed, ignore_errors=True)
        for abandoned in self.directory.glob("abandoned_step_*"):
            shutil.rmtree(abandoned, ignore_errors=True)


def _piece_name(rank: int, writers: int) -> str:
    return f"trainer_state/optimizer-{rank:05d}-of-{writers:05d}.safetensors"


def _model_files(model: nn.Module, tokenizer) -> dict[str, bytes]:
    """What makes a directory a Hub repo besides the weights: name -> content."""
    kind = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # fully_shard makes a subclass
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(model.config)
        config.architectures = [kind.__name__]
        config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    for reference in (getattr(model.config, "auto_map", None) or {}).values():
        module = reference.split("--")[-1].split(".")[0]  # "modeling_gpt2repro.GPT2ReproForCausalLM"
        files[f"{module}.py"] = Path(inspect.getfile(kind)).with_name(f"{module}.py").read_bytes()
    return files


def _settle(path: Path) -> dict:
    """Bring a written file to the disk; returns its size and sha256."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are journalled
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _save_error(failure: Exception | None, failed: list[int], step: int, directory: Path, size: int) -> Exception:
    if failure is None:
        reason = f"rank {failed[0]} could not write its part, and says why"
    elif isinstance(failure, OSError):
        reason = os.strerror(failure.errno) if failure.errno else str(failure)
    elif isinstance(failure, SafetensorError):
        reason = str(failure)
    else:
        return failure  # a bug of ours: with its traceback
    advice = "make room" if failure is None or "space" in reason or "large" in reason else "see to it"
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(directory).free
        advice = f"make room (it needs about {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free)"
    return SaveError(
        f"the checkpoint of step {step} could not be written to {directory}: {reason}. Earlier checkpoints and the log "
        f"are whole; {advice} and start the same command again to go on from the last one"
    )


# --- finding ---------------------------------------------------------------------------------------------------------


def find_checkpoint(place: str | Path, *, all_ranks: bool = False, at_most: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run (or of its checkpoints directory), or `place` itself where it is one.

    Damaged ones are named on stderr and skipped. None where there is no checkpoint yet. With `all_ranks` every rank
    has to call it: rank 0 looks and verifies, the others take its answer. `at_most` leaves out later steps.

    Raises: InputError where `place` is a damaged checkpoint, or a run with nothing but damaged ones.
    """
    rank, world = _rank_and_world()
    if all_ranks and world > 1:
        answer: list = [None, None]
        if rank == 0:
            try:
                answer[0] = find_checkpoint(place, at_most=at_most)
            except InputError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1]:
            raise InputError(answer[1])
        return answer[0]

    place = Path(place)
    directory = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    if place.name in POINTERS and (pointed := resolve_pointer(place.parent, place.name)):
        directory = pointed
    if (directory / "trainer_state").is_dir() or (directory / "checksums.json").is_file():
        verify_checkpoint(directory)
        return directory
    steps = [(step, path) for step, path in list_steps(directory) if at_most is None or step <= at_most]
    for _, path in reversed(steps):
        try:
            verify_checkpoint(path)
        except InputError as error:
            print(f"warning: damaged checkpoint skipped: {error}", file=sys.stderr, flush=True)
        else:
            return path
    if steps:
        raise InputError(
            f"none of the {len(steps)} checkpoints in {directory} is whole; move them away to start over, or choose "
            "another --run_dir"
        )
    return None


def list_steps(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every step_N in a checkpoints directory, ascending."""
    found = []
    if Path(directory).is_dir():
        for path in Path(directory).iterdir():
            match = STEP_NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found)


def resolve_pointer(directory: str | Path, name: str) -> Path | None:
    """The step_N that `latest`, `best` or `final` points to, if that exists."""
    step = _pointed_step(Path(directory), name)
    if step is None or not _step_path(Path(directory), step).is_dir():
        return None
    return _step_path(Path(directory), step)


def resolve_model(model: str, *, any_architecture: bool = False) -> str:
    """RUN | DIR | HUB_ID -> what `from_pretrained` takes: a run's best (else latest) checkpoint, a directory, an id.

    Raises: InputError for a directory that holds no model, nothing but pickled weights, or (unless
    `any_architecture`) a model of another architecture.
    """
    path = Path(model)
    if not path.exists() and not path.is_symlink():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model) and not Path(model.split("/")[0]).exists():
            return model
        raise InputError(
            f"there is no model {model}: expected a run, a checkpoint's directory, or a Hub id like user/name"
        )
    if path.name in POINTERS and not (path / "config.json").is_file():
        path = resolve_pointer(path.parent, path.name) or path
    if path.is_file():
        raise InputError(f"{model} is a file: expected a run's directory, a checkpoint's directory, or a Hub id")
    if not (path / "config.json").is_file():
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        candidates = [resolve_pointer(directory, name) for name in ("best", "latest")]
        candidates += [step for _, step in reversed(list_steps(directory))]
        path = next((candidate for candidate in candidates if candidate), None)
        if path is None:
            raise InputError(f"{model} holds neither a model (config.json) nor a run's checkpoints")
    check_model_directory(path, any_architecture=any_architecture)
    return str(path)


# --- verifying -------------------------------------------------------------------------------------------------------


def verify_checkpoint(path: str | Path) -> None:
    """Raises InputError unless every file is there, of its recorded size and sha256, and none is pickled."""
    path = Path(path)
    checksums = _read_json(path / "checksums.json")
    if not checksums:
        raise InputError(f"{path}: checksums.json lists no files")
    for name, record in checksums.items():
        if not _is_plain(name):
            raise InputError(f"{path}: checksums.json names {name!r}, which is not a plain path inside the checkpoint")
        if not isinstance(record, dict) or not isinstance(record.get("bytes"), int) or "sha256" not in record:
            raise InputError(f"{path}: checksums.json has no size and sha256 for {name}")
        if not (path / name).is_file():
            raise InputError(f"{path}: {name} is missing")
        if (path / name).stat().st_size != record["bytes"]:
            raise InputError(f"{path}: {name} has {(path / name).stat().st_size} bytes, expected {record['bytes']}")
    for name in ("config.json", "model.safetensors", "trainer_state/state.json"):
        if name not in checksums:
            raise InputError(f"{path}: checksums.json does not list {name}")
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.suffix.lower() in PICKLES:
            raise InputError(f"{path}: {name} may hold pickled objects; a checkpoint has only safetensors and JSON")
        if file.parent.name == "trainer_state" and name not in checksums:
            raise InputError(f"{path}: {name} is not listed in checksums.json")
    for name, record in checksums.items():
        if _sha256(path / name) != record["sha256"]:
            raise InputError(f"{path}: {name} is not what was written (its sha256 differs)")
    read_state(path)
    check_model_directory(path)


def check_model_directory(path: str | Path, *, any_architecture: bool = False) -> None:
    """Raises InputError unless a directory can be loaded safely: known architecture, safetensors, plain names."""
    path = Path(path)
    config = _read_json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or (model_type not in MODEL_TYPES and not any_architecture):
        raise InputError(f"{path} is a model of type {model_type!r}; expected {' or '.join(MODEL_TYPES)}")
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: expected a weight_map from tensor names to files")
        shards = sorted(set(weight_map.values()))
    else:
        pickled = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
        hint = f"; {pickled[0]} is not read, since unpickling runs code" if pickled else ""
        raise InputError(f"{path} has no model.safetensors{hint}")
    shapes: dict[str, list[int]] = {}
    for shard in shards:
        if not _is_plain(shard) or "/" in shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: {shard!r} is not a plain name of a safetensors file")
        if not (path / shard).is_file():
            raise InputError(f"{path}: {shard} is missing")
        with _open_tensors(path / shard) as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            _read_json(path / name)
    if model_type in MODEL_TYPES:
        _check_sizes(path, config, shapes)


def _check_sizes(path: Path, config: dict, shapes: dict[str, list[int]]) -> None:
    """A configuration of other sizes than the weights would build another model, or one that fills the memory."""
    blocks = {match[1] for name in shapes if (match := re.match(r"(?:transformer\.)?h\.(\d+)\.", name))}
    found = {"n_layer": len(blocks)}
    for part, size in (("wte", "vocab_size"), ("wpe", "n_positions")):
        shape = next((shape for name, shape in shapes.items() if name.endswith(f"{part}.weight")), [])
        found[size], found["n_embd"] = shape if len(shape) == 2 else (None, None)
    wrong = [
        f"{name} {config[name]!r} (they have {size})" for name, size in found.items() if config.get(name, size) != size
    ]
    if wrong:
        raise InputError(f"{path}: config.json does not belong to its weights: {', '.join(wrong)}")


def read_state(path: str | Path) -> dict:
    """What the training loop gave to `save` as `state`."""
    return _read_header(Path(path))["state"]


def _read_header(path: Path) -> dict:
    header = _read_json(path / "trainer_state/state.json")
    if header.get("format") != FORMAT or not isinstance(header.get("state"), dict):
        raise InputError(f"{path / 'trainer_state/state.json'} is not the state of a {FORMAT}")
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} was written in format version {header.get('version')!r}, this program reads {VERSION}; "
            "use the program that wrote it"
        )
    return header


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path} has {path.stat().st_size} bytes; more than {LARGEST_JSON} are not read")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def _is_plain(name: str) -> bool:
    """Relative, inside, and meaning the same on every system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & set("\\:\0")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # a block this size is hashed without the interpreter's lock
            digest.update(block)
    return digest.hexdigest()


# --- restoring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill the model's weights and the optimizer's state in place; any number of processes, sharded or not.

    `path` comes from `find_checkpoint`, which has verified it.

    Raises: InputError naming the tensor that is missing, too many, or of another shape.
    """
    path, model = Path(path), _unwrap(model)
    weights = named_weights(model)
    with _open_tensors(path / "model.safetensors") as file:
        _same_names(path / "model.safetensors", set(file.keys()), set(weights), "the model")
        for name, tensor in weights.items():
            _fill(tensor, [(0, tensor.shape[0], file.get_slice(name))], f"{path}: {name}")
    if optimizer is not None:
        _restore_optimizer(path, model, getattr(optimizer, "optimizer", optimizer))


def _restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    written_by = _read_header(path).get("optimizer")
    if written_by != type(optimizer).__name__:
        raise InputError(
            f"{path} has the state of {written_by}, this run uses {type(optimizer).__name__}; "
            "resume with the --optimizer that the run began with"
        )
    with contextlib.ExitStack() as stack:
        pieces: dict[str, dict[str, list]] = {}  # parameter -> kind -> [(start, stop, slice)]; a scalar is [tensor]
        for file_path in _piece_files(path):
            file = stack.enter_context(_open_tensors(file_path))
            rows = _piece_rows(file_path, file)
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                name, _, kind = key.rpartition("/")
                part = (*rows[key], file.get_slice(key)) if key in rows else file.get_tensor(key)
                pieces.setdefault(name, {}).setdefault(kind, []).append(part)
        if not pieces:
            optimizer.state.clear()  # saved before the first step
            return

        names = {id(parameter): name for name, parameter in _named_parameters(model).items()}
        expected = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
        _same_names(path / "trainer_state", set(pieces), set(expected), "the optimizer")
        for name, (parameter, group) in expected.items():
            state = {}
            for kind, parts in pieces[name].items():
                if isinstance(parts[0], Tensor):  # AdamW's step count: where AdamW itself would put it
                    on_device = group.get("fused") or group.get("capturable")
                    state[kind] = parts[0].to(parameter.device if on_device else "cpu")
                else:
                    state[kind] = torch.zeros_like(parameter, requires_grad=False)
                    _fill(state[kind], parts, f"{path}: {kind} of {name}")
            optimizer.state[parameter] = state


def _piece_files(path: Path) -> list[Path]:
    """The optimizer's files, all of the W that their names promise."""
    found = sorted((path / "trainer_state").glob("optimizer-*.safetensors"))
    matches = [PIECE_NAME.fullmatch(file.name) for file in found]
    counts = {match[2] for match in matches if match}
    if not found or None in matches or len(counts) != 1 or len(found) > int(next(iter(counts))):
        raise InputError(f"{path}/trainer_state: expected optimizer-RRRRR-of-WWWWW.safetensors, one W for all")
    return found


def _piece_rows(path: Path, file) -> dict[str, list[int]]:
    try:
        rows = json.loads((file.metadata() or {})["rows"])
        ordered = all(0 <= start < stop for start, stop in rows.values())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        ordered = False
    if not ordered:
        raise InputError(f"{path}: its header does not say which rows it holds")
    return rows


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
        first, last, _ = _rows_of(tensor)
        local = tensor.to_local()
    for start, stop, piece in parts:
        low, high = max(start, first), min(stop, last)
        if low < high:
            local[low - first : high - first].copy_(piece[low - start : high - start])


def _same_names(where: Path, found: set[str], expected: set[str], owner: str) -> None:
    for difference, what in ((expected - found, "lacks"), (found - expected, "has")):
        if difference:
            more = f" and {len(difference) - 1} more" if len(difference) > 1 else ""
            ending = f", which {owner} needs" if what == "lacks" else f", which {owner} does not know"
            raise InputError(f"{where} {what} {min(difference)}{more}{ending}")


# --- names and places ------------------------------------------------------------------------------------------------


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once (a tied head is its embedding) and every persistent buffer, as a plain model names them."""
    model = _unwrap(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # state_dict() comes first: under FSDP2 it reshards a root that an evaluation left gathered.
    buffers = {_clean(name): tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {**_named_parameters(model), **buffers}


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_clean(name): parameter for name, parameter in model.named_parameters()}


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")  # what torch.compile(block) puts into the names


def _unwrap(model: nn.Module) -> nn.Module:
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _rows_of(tensor: DTensor) -> tuple[int, int, bool]:
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


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def _set_pointer(directory: Path, name: str, step: int) -> None:
    """Replace the pointer in one rename, so that a reader sees the old one or the new one."""
    aside = directory / f".{name}.tmp-{secrets.token_hex(4)}"
    try:
        if os.name == "nt":  # a rename there cannot replace a link to a directory
            raise OSError
        aside.symlink_to(_step_path(directory, step).name, target_is_directory=True)
    except OSError:  # such as a filesystem without links
        aside.write_text(_step_path(directory, step).name + "\n")
    os.replace(aside, directory / name)


def _pointed_step(directory: Path, name: str) -> int | None:
    path = directory / name
    try:
        target = os.readlink(path) if path.is_symlink() else path.read_text()[:64]
    except (OSError, UnicodeDecodeError):
        return None
    match = STEP_NAME.fullmatch(target.strip())
    return int(match[1]) if match else None
