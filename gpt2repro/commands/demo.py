"""A web page to talk to a model: tokens stream as they come, each with how likely the model found it.

    gpt2repro demo --model runs/quickstart
    gpt2repro demo --model runs/a runs/b openai-community/gpt2 --port 7861

Listens on this machine only unless --host says otherwise. Visitors choose among these models and set numbers; they
cannot name files or other models. Needs the extra `demo`: pip install "gpt2repro[demo]". A Hugging Face Space runs
the same page from an `app.py` that calls `main(["--model", "user/name", "--host", "0.0.0.0"])`.
"""

import dataclasses
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gpt2repro.models import ModelOptions
from gpt2repro.options import InputError, first_line, parse_options

AtLeastOne = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(kw_only=True)
class Options(ModelOptions):
    model: list[str]
    "Runs, checkpoint directories or Hub ids that visitors can choose from; the first is shown first."
    host: str = "127.0.0.1"
    "The address to listen on; 0.0.0.0 lets other machines in."
    port: Annotated[int, Field(ge=1, le=65535)] = 7860
    "The port to listen on."
    max_new_tokens: AtLeastOne = 400
    "The longest text a visitor can ask for."
    concurrency: AtLeastOne = 1
    "Texts written at the same time; the others wait in line."
    queue: AtLeastOne = 20
    "Visitors that may wait in line; further ones are asked to come back later."

    def problems(self) -> list[str]:
        return [] if self.model and all(self.model) else ["--model needs a run, a checkpoint directory or a Hub id"]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro demo", description=__doc__)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is reported anywhere
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError('the page needs Gradio; install it with: pip install "gpt2repro[demo]"') from None

    from gpt2repro.checkpoint.layout import find_run
    from gpt2repro.generation.demo_page import Served, build

    place = f"{options.host}:{options.port}"
    try:  # before models are loaded; Gradio itself would say it at the end, and at length
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        socket.create_server((options.host, options.port), family=family).close()
    except OSError as error:
        reason = error.strerror.partition(" (")[0]  # Python repeats the address behind it
        raise InputError(f"cannot listen on {place} ({reason}); choose another --port or --host") from None
    models = {}
    for name, label in zip(options.model, labels(options.model), strict=True):
        print(f"loading {name}", flush=True)
        model, tokenizer, _ = dataclasses.replace(options, model=name).load()
        models[label] = Served(model, tokenizer, find_run(name))
    limits = {"concurrency": options.concurrency, "queue": options.queue}
    page, how = build(models, most_new_tokens=options.max_new_tokens, **limits)
    # Gradio looks at its own page before it says that it is there: that must not go through a proxy.
    os.environ["no_proxy"] = ",".join([os.environ.get("no_proxy", ""), "localhost", options.host])
    try:
        page.launch(server_name=options.host, server_port=options.port, prevent_thread_lock=True, **how)
    except Exception as error:  # Gradio raises what its web server, its client and itself raise
        raise InputError(
            f"the page does not answer at http://{place} ({first_line(error)}); check that this machine may "
            "connect to itself, or try --host 127.0.0.1"
        ) from None
    print(f"the page is at http://{place} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def labels(names: list[str]) -> list[str]:
    """The models' names on the page: the last parts of a directory that tell it apart; a Hub id as it is."""
    from gpt2repro.training.plotting import run_names

    if len(set(names)) < len(names):
        raise InputError(f"a model is named twice in --model {' '.join(names)}")
    paths = [name for name in names if Path(name).exists()]
    short = dict(zip(paths, run_names([Path(path) for path in paths]), strict=True)) if paths else {}
    return [short.get(name, name) for name in names]
