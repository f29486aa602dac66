"""Publishes a run or a model directory on the Hugging Face Hub, with its model card; private unless --public is given.

    gpt2repro push --model runs/124M --repo user/gpt2-124M                  every kept checkpoint, `main` = the best
    gpt2repro push --model runs/124M --repo user/gpt2-124M --native         and branch `native`: a plain gpt2
    gpt2repro push --model imported/gpt2 --repo user/gpt2 --space --public  one directory, and a page to talk to it

Each checkpoint of a run becomes a branch `step-N`; the newest one keeps the optimizer's state, so that
`train_accelerate.py --resume hub:user/gpt2-124M` can go on from it. Log in with `hf auth login`, or set HF_TOKEN.
"""

import re
from configparser import ConfigParser
from dataclasses import dataclass
from functools import partial
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

from gpt2repro.checkpoint.layout import find_run, list_steps
from gpt2repro.checkpoint.reader import find_model
from gpt2repro.models import load_for_comparison
from gpt2repro.options import InputError, NotNegativeNumber, Positive, parse_options
from gpt2repro.publishing import hub
from gpt2repro.publishing.model_card import card_files

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    model: str
    "A run's directory, or one directory with a model."
    repo: str
    "USER/NAME of the repository; created where it is missing."
    native: bool = False
    "Also publish the same weights as a plain gpt2, branch `native`, after a comparison of its logits with the model's."
    space: bool = False
    "Also publish a Space of the same name that shows `gpt2repro demo`."
    public: bool = False
    "Let everybody see the repositories that this call creates; those that exist stay as they are."
    revision: str | None = None
    "Publish one model (of a run: the best) as this branch, and nothing else; none: see above."
    license: str = "mit"
    "Licence of the weights, as the Hub spells it."
    language: str | None = None
    "Language of the text as the Hub spells it (en), for the card; none: en where the corpus is known to be English."
    cost_dollars: NotNegativeNumber | None = None
    "What the training cost, for the card."
    co2_kg: NotNegativeNumber | None = None
    "CO2 equivalents of the training in kg, for the card."
    timeout_minutes: Positive = 120
    "Give up after so many minutes; the same command then sends what has not arrived."


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro push", description=__doc__)
    # Checksums are compared as each part is sent: one damaged step does not keep the others back.
    model = Path(find_model(options.model))
    if not model.is_dir():
        raise InputError(f"--model {options.model} is not here: push sends a run's or a model's directory")
    run_dir = find_run(model)
    whole_run = options.revision is None and run_dir is not None and Path(options.model).resolve() == run_dir
    card = {name: getattr(options, name) for name in ("license", "language", "cost_dollars", "co2_kg")}
    try:
        api = hub.open_repo(options.repo, private=not options.public)
        revisions = send_run(run_dir, options, card) if whole_run else send_one(api, model, run_dir, options, card)
        print(f"{api.endpoint}/{options.repo} ({', '.join(revisions)})")
        if options.space:
            send_space(options)
    except Exception as error:
        raise InputError(hub.explain(error, options.repo)) from None
    return 0


def send_run(run_dir: Path, options: Options, card: dict) -> list[str]:
    """Publish every checkpoint of a run as training does. Returns the revisions."""
    how = {"private": not options.public, "comparable": load_for_comparison if options.native else None}
    uploader = hub.Uploader(options.repo, run_dir=run_dir, card=card, quiet=False, **how)
    for _, path in list_steps(run_dir / "checkpoints"):
        uploader.checkpoint(path)
    if missing := uploader.close(timeout=60 * options.timeout_minutes):
        raise InputError(f"not everything arrived: {missing[0]}")
    return [*uploader.published, "main"]


def send_one(api, model: Path, run_dir: Path | None, options: Options, card: dict) -> list[str]:
    """Publish one directory as one revision. The native twin goes first: if it does not agree, nothing is sent."""
    cards = partial(card_files, repo=options.repo, run_dir=run_dir, **card)
    files = hub.weights_only(hub.checkpoint_files(model)) | cards(model)
    revisions = [options.revision or "main"]
    if options.native:
        hub.publish_native(api, options.repo, model, load_for_comparison(model), cards)
        revisions.append("native")
    hub.publish(api, options.repo, files, revision=revisions[0], message=model.name)
    if at_home := sorted({path.name for path in model.iterdir() if path.is_file()} - files.keys() - {hub.CHECKSUMS}):
        print(f"not part of the model, so not sent: {', '.join(at_home)}")
    return revisions


def send_space(options: Options) -> None:
    """Publish the demo as a Space of the model's name."""
    api = hub.open_repo(options.repo, private=not options.public, kind="space", space_sdk="gradio")
    hub.publish(api, options.repo, space_files(options.repo), revision="main", message="The demo", kind="space")
    print(f"{api.endpoint}/spaces/{options.repo}")
    if not options.public:
        print("the model is private: give the Space a secret HF_TOKEN that may read it, or it cannot load it")


def space_files(repo: str) -> dict[str, bytes | Path]:
    """The files of a Gradio Space that runs this demo: the package is among them, and the page loads `repo`."""
    from huggingface_hub import SpaceCardData

    files: dict[str, bytes | Path] = {
        f"gpt2repro/{path.relative_to(PACKAGE).as_posix()}": path
        for path in sorted(path for pattern in SPACE_FILES for path in PACKAGE.glob(pattern))
        if path.is_file() and not path.is_symlink() and "bench" not in path.parts
    }
    for name in ("configuration_gpt2repro", "modeling_gpt2repro"):
        files[f"{name}.py"] = Path(__import__(name).__file__)
    # The version that the page was tried with here, else the oldest that it is written for.
    gradio = version("gradio") if find_spec("gradio") else "6.0.0"
    front = SpaceCardData(title=repo.split("/")[-1], sdk="gradio", sdk_version=gradio, app_file="app.py", models=[repo])
    link = f"[{repo}](https://huggingface.co/{repo})"
    text = f"---\n{front.to_yaml()}\n---\n\nA page to talk to {link}, made by `gpt2repro push --space`.\n"
    files["README.md"] = text.encode()
    files["app.py"] = SPACE_APP.format(repo=repo).encode()
    files["requirements.txt"] = "".join(f"{line}\n" for line in space_requirements()).encode()
    return files


def space_requirements() -> list[str]:
    """The page's requirements, with the bounds of setup.cfg or, without a checkout, of the installed package."""
    checkout = ConfigParser()
    if checkout.read(PACKAGE.parent / "setup.cfg", encoding="utf-8"):
        lines = checkout["options"]["install_requires"].splitlines()
    else:
        lines = [line for line in requires("gpt2repro") or [] if "extra ==" not in line]
    return [line for line in lines if re.split(r"[^\w-]", line)[0] in SPACE_IMPORTS]


SPACE_APP = '''"""Started by the Space: the page of `gpt2repro demo` with one model."""

from gpt2repro.commands.demo import main
from gpt2repro.options import run_main

if __name__ == "__main__":
    raise SystemExit(run_main(main, ["--model", "{repo}", "--host", "0.0.0.0", "--port", "7860"]))
'''

# The package's own files, as setup.cfg packs them: whatever else lies in a checkout stays at home.
SPACE_FILES = "**/*.py presets/*.yaml references/*.json generation/demo_page.* publishing/card.md".split()
# What the page imports; gradio itself is the Space's sdk.
SPACE_IMPORTS = "torch transformers huggingface_hub matplotlib numpy pydantic pyyaml safetensors tiktoken".split()
