"""Checkpoints and models found by name, and verified before anything in them is used. Nothing is ever unpickled."""

import os
import re
from pathlib import Path

from gpt2repro.checkpoint import layout
from gpt2repro.checkpoint.tensors import open_tensors
from gpt2repro.files import is_plain_name, read_json, read_json_if_whole, refuse_pipes, sha256_of
from gpt2repro.options import InputError, first_line, say

MODEL_TYPES = ("gpt2repro", "gpt2")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
NUMBERS = ("F64", "F32", "F16", "BF16")  # what weights are; others need a scale that nobody would look for
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".msgpack", ".h5")


def find_checkpoint(place: str | Path, *, all_ranks: bool = False, at_most: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run (or of its checkpoints directory), or `place` itself if it is a checkpoint.

    Damaged checkpoints are named on stderr and skipped. None: there is no checkpoint yet. With `all_ranks` every rank
    has to make the call: rank 0 finds and verifies, the other ranks take its answer. `at_most` leaves out later steps.

    Raises: InputError if `place` is a damaged checkpoint, or a run that has only damaged ones.
    """
    if all_ranks:
        return layout.from_rank_zero(lambda: find_checkpoint(place, at_most=at_most))

    place = Path(place)
    directory = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    if place.name in layout.POINTERS and (pointed := layout.resolve_pointer(place.parent, place.name)):
        directory = pointed
    if (directory / "trainer_state").is_dir() or (directory / "checksums.json").is_file():
        verify_checkpoint(directory)
        return directory
    steps = [(step, path) for step, path in layout.list_steps(directory) if at_most is None or step <= at_most]
    for _, path in reversed(steps):
        try:
            verify_checkpoint(path)
        except InputError as error:
            say(f"warning: damaged checkpoint skipped: {error}")
        else:
            return path
    if steps:
        raise InputError(
            f"none of the {len(steps)} checkpoints in {directory} is whole; move them away to start over, or choose "
            "another --run_dir"
        )
    return None


def find_model(model: str, *, any_architecture: bool = False) -> str:
    """RUN | DIR | HUB_ID -> what `from_pretrained` takes: a run's best (else latest) checkpoint, a directory, an id.

    `user/name@revision` becomes the directory of that revision in the Hub's cache.

    Raises: InputError for a directory that holds no model, only pickled weights, or (unless `any_architecture`) a
    model of another architecture.
    """
    path = Path(model)
    if not os.path.lexists(model):
        if HUB_ID.fullmatch(model) and not os.path.exists(model.split("/")[0]):
            return fetch_model(model) if "@" in model else model
        raise InputError(
            f"there is no model {model}: expected a run, a checkpoint's directory, or a Hub id like user/name or "
            "user/name@revision"
        )
    if path.name in layout.POINTERS and not (path / "config.json").is_file():
        path = layout.resolve_pointer(path.parent, path.name) or path
    if path.is_file():
        raise InputError(f"{model} is a file: expected a run's directory, a checkpoint's directory, or a Hub id")
    if not (path / "config.json").is_file():
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        candidates = [layout.resolve_pointer(directory, name) for name in ("best", "latest")]
        candidates += [step for _, step in reversed(layout.list_steps(directory))]
        if (path := next(filter(None, candidates), None)) is None:
            raise InputError(f"{model} holds neither a model (config.json) nor a run's checkpoints")
    check_model_directory(path, any_architecture=any_architecture)
    return str(path)


def resolve_model(model: str, *, any_architecture: bool = False) -> str:
    """`find_model`, whose weights and tokenizer are what was written: the way to everything that loads one.

    Raises: InputError also where model.safetensors or tokenizer.json differs from checksums.json.
    """
    found = find_model(model, any_architecture=any_architecture)
    path = Path(found)
    # What is about to be loaded, and no more: the optimizer's files are several times as large.
    inside = layout.EMA if (path.parent / "checksums.json").is_file() and f"{path.name}/" == layout.EMA else ""
    checksums = read_json_if_whole((path.parent if inside else path) / "checksums.json") or {}
    for name in {"model.safetensors", "tokenizer.json"} & {key.removeprefix(inside) for key in checksums}:
        record = checksums.get(inside + name)
        whole = (path / name).is_file() and isinstance(record, dict) and sha256_of(path / name) == record.get("sha256")
        if not whole:
            raise InputError(
                f"{path}: {name} is not what was written (its sha256 differs); if you changed it, remove checksums.json"
            )
    return found  # a Hub id as it was given: on Windows a path would turn its slash around


def fetch_model(name: str) -> str:
    """`user/name[@revision]` -> the directory of its model in the Hub's cache; no optimizer, no pickles.

    Raises: InputError if the Hub, the repository or the revision cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return snapshot_download(
            repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"], library_name="gpt2repro"
        )
    except Exception as error:  # whatever the client and its HTTP library raise
        raise InputError(f"cannot fetch the model {name}: {first_line(error)}") from None


def verify_checkpoint(path: str | Path, *, strays: bool = False) -> None:
    """Raises: InputError unless every file exists with its recorded size and sha256, and none is pickled.

    `strays` allows files that are not in checksums.json, since publishing leaves them out.
    """
    path = Path(path)
    checksums = read_json(path / "checksums.json")
    if not checksums:
        raise InputError(f"{path}: checksums.json lists no files")
    for name, record in checksums.items():
        if not is_plain_name(name):
            raise InputError(f"{path}: checksums.json names {name!r}, which is not a plain path inside the checkpoint")
        if not isinstance(record, dict) or not isinstance(record.get("bytes"), int) or "sha256" not in record:
            raise InputError(f"{path}: checksums.json has no size and sha256 for {name}")
        if not (path / name).is_file():
            raise InputError(f"{path}: {name} is missing")
        if (path / name).stat().st_size != record["bytes"]:
            raise InputError(f"{path}: {name} has {(path / name).stat().st_size} bytes, expected {record['bytes']}")
    if absent := {"config.json", "model.safetensors", "trainer_state/state.json"} - checksums.keys():
        raise InputError(f"{path}: checksums.json does not list {min(absent)}")
    for file in sorted([path / name for name in checksums] if strays else path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.suffix.lower() in PICKLES:
            raise InputError(f"{path}: {name} may hold pickled objects; a checkpoint has only safetensors and JSON")
        if file.parent.name == "trainer_state" and name not in checksums:
            raise InputError(f"{path}: {name} is not listed in checksums.json")
    for name, record in checksums.items():
        if sha256_of(path / name) != record["sha256"]:
            raise InputError(f"{path}: {name} is not what was written (its sha256 differs)")
    read_state(path)
    check_model_directory(path)


def check_model_directory(path: str | Path, *, any_architecture: bool = False) -> None:
    """Raises: InputError unless a directory can be loaded safely: known architecture, safetensors, plain names."""
    path = Path(path)
    config = read_json(path / "config.json")
    refuse_pipes(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or (model_type not in MODEL_TYPES and not any_architecture):
        raise InputError(f"{path} is a model of type {model_type!r}; expected {' or '.join(MODEL_TYPES)}")
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: expected a weight_map from tensor names to files")
        shards = sorted(set(weight_map.values()))
    else:
        pickled = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
        hint = f"; {pickled[0]} is not read, since unpickling runs code" if pickled else ""
        raise InputError(f"{path} has no model.safetensors{hint}")
    shapes: dict[str, list[int]] = {}
    for shard in shards:
        if not is_plain_name(shard) or "/" in shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: {shard!r} is not a plain name of a safetensors file")
        if not (path / shard).is_file():
            raise InputError(f"{path}: {shard} is missing")
        with open_tensors(path / shard) as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                shapes[name] = tensor.get_shape()
                if model_type in MODEL_TYPES and name.endswith(".weight") and tensor.get_dtype() not in NUMBERS:
                    raise InputError(
                        f"{path / shard}: {name} holds {tensor.get_dtype()}, expected {', '.join(NUMBERS)}: a "
                        "quantised model has to be turned back into numbers first"
                    )
    for name in ("generation_config", "tokenizer_config", "tokenizer", "special_tokens_map", "added_tokens", "vocab"):
        if (path / f"{name}.json").is_file():
            read_json(path / f"{name}.json")
    if model_type in MODEL_TYPES:
        _check_sizes(path, config, shapes)


def _check_sizes(path: Path, config: dict, shapes: dict[str, list[int]]) -> None:
    """Raises: InputError for a configuration whose sizes are not those of the weights, and so may fill the memory."""
    blocks = {match[1] for name in shapes if (match := re.match(r"(?:transformer\.)?h\.(\d+)\.", name))}
    found = {"n_layer": len(blocks)}
    for part, size in (("wte", "vocab_size"), ("wpe", "n_positions")):
        shape = next((shape for name, shape in shapes.items() if name.endswith(f"{part}.weight")), [])
        found[size], found["n_embd"] = shape if len(shape) == 2 else (None, None)
    if wrong := {name: size for name, size in found.items() if config.get(name, size) != size}:
        sizes = ", ".join(f"{name} {config[name]!r} (they have {size})" for name, size in wrong.items())
        raise InputError(f"{path}: config.json does not belong to its weights: {sizes}")


def read_state(path: str | Path) -> dict:
    """The `state` that the training loop passed to `save`. Raises: InputError for another format or version."""
    return read_header(Path(path))["state"]


def read_header(path: Path) -> dict:
    header = read_json(path / "trainer_state/state.json")
    if header.get("format") != layout.FORMAT or not isinstance(header.get("state"), dict):
        raise InputError(f"{path / 'trainer_state/state.json'} is not the state of a {layout.FORMAT}")
    if header.get("version") != layout.VERSION:
        raise InputError(
            f"{path} was written in format version {header.get('version')!r}, this program reads {layout.VERSION}; "
            "use the program that wrote it"
        )
    return header
