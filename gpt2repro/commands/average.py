"""The mean of a run's last checkpoints as a model of its own, beside the newest of them in validation loss.

    gpt2repro average runs/124M --last 5 --out averaged
    gpt2repro push --model averaged --repo user/gpt2-124M --revision averaged

Weights under a high learning rate scatter around a better point, so an average helps most where the rate has not
fallen yet (Izmailov et al. 2018, arXiv:1803.05407). One tensor of a checkpoint is read at a time; the mean is held in
memory.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from gpt2repro.checkpoint.layout import list_steps
from gpt2repro.checkpoint.reader import verify_checkpoint
from gpt2repro.options import AtLeastOne, InputError, Problems, first_line, parse_options, taken


@dataclass(kw_only=True)
class Options:
    run: list[str] = field(metadata={"positional": True})
    "Directory of the run whose checkpoints are averaged."
    last: AtLeastOne = 5
    "How many of the newest checkpoints."
    out: Path
    "New directory for the model."
    device: str | None = None
    "Where the two losses are measured: cuda, cuda:1, mps or cpu; none: the best one here."

    def problems(self) -> Problems:
        if len(self.run) != 1:
            yield f"expected one run, found {len(self.run)}"
        yield from taken(self.out)


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro average", description=__doc__)
    run = Path(options.run[0])
    checkpoints = dict(list_steps(run / "checkpoints")[-options.last :])
    if len(checkpoints) < options.last:
        raise InputError(
            f"{run} has {len(checkpoints)} checkpoints, not {options.last}; lower --last, or train with a larger "
            "--keep_last and smaller --save_steps"
        )
    for path in checkpoints.values():
        verify_checkpoint(path)

    from safetensors.torch import save_file

    from gpt2repro.files import sha256_of, write_json
    from gpt2repro.publishing.exports import MODEL_FILE, new_directory

    newest = [*checkpoints.values()][-1]
    with new_directory(options.out) as out:
        for path in newest.iterdir():
            if MODEL_FILE.fullmatch(path.name):
                shutil.copyfile(path, out / path.name)
        save_file(mean([*checkpoints.values()]), out / "model.safetensors", metadata={"format": "pt"})
        sums = {path.name: sha256_of(path / "checksums.json") for path in checkpoints.values()}
        made = {"kind": "mean", "run": run.resolve().name, "steps": [*checkpoints], "sha256_of_checksums": sums}
        made["validation"] = losses(run, {newest.name: newest, "mean": out}, options.device)
        write_json(out / "average.json", made)
    for name, loss in made["validation"].items():
        print(f"{name:16} validation loss {loss['val_loss']:.4f}, bits per byte {loss['bits_per_byte'] or 0:.4f}")
    print(options.out)
    return 0


def mean(checkpoints: list[Path]) -> dict:
    """Name -> the mean of a weight over the checkpoints, added up in fp64, in the stored precision."""
    import contextlib

    from gpt2repro.checkpoint.tensors import open_tensors

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path / "model.safetensors")) for path in checkpoints]
        means = {}
        for name in files[0].keys():  # noqa: SIM118 - an open file, not a dict
            total = sum(file.get_tensor(name).double() for file in files)
            means[name] = (total / len(files)).to(files[0].get_tensor(name).dtype)
        return means


def losses(run: Path, models: dict[str, Path], device: str | None) -> dict[str, dict]:
    """Validation loss of each model on the run's own validation split, measured as the run does; {} without one."""
    from gpt2repro.data.sources import open_data
    from gpt2repro.models import load_model, pick_device
    from gpt2repro.training.evaluator import bytes_of_tokens, validation_losses
    from gpt2repro.training.metrics_log import options_of

    options = options_of(run, "seed", "batch_tokens", "seq_len", "micro_batch_size")
    config = SimpleNamespace(**{"documents": "cross", "recut_windows": False, **options})  # older runs have neither
    try:
        source = open_data(config, sequences=config.batch_tokens // config.seq_len)
    except InputError as error:
        print(f"not compared: {error}")
        return {}
    except (AttributeError, TypeError) as error:  # an option that is missing, or of another type
        raise InputError(f"{run / 'config.yaml'} is damaged: {first_line(error)}") from error
    found, token_bytes, chosen = {}, bytes_of_tokens(source), pick_device(device)
    for name, path in models.items():
        model, _ = load_model(str(path), device=chosen, dtype=None)
        found[name] = validation_losses(model, config, source, token_bytes)
        if "val_loss" not in found[name]:
            print("not compared: the data has no validation split")
            return {}
    return found
