"""`gpt2repro <command>`: the name of a command -> its module, imported when it is called. Nothing else."""

import importlib
import sys

from gpt2repro.options import InputError, run_main

COMMANDS = {
    "prepare-text": "text (yours, tiny shakespeare, or Python's own documentation) -> token shards",
    "generate": "write text with a model: one prompt, a conversation, or a file of prompts",
    "plot": "loss, learning rate and tokens/s of one or more runs -> PNG",
    "push": "publish a model on the Hugging Face Hub, with its card",
    "import-checkpoint": "nanoGPT, build-nanogpt or llm.c checkpoint -> a directory of ours",
    "demo": "a web page to talk to a model",
    "bench": "measure this machine: train, data, tokenize, hellaswag, generate, checkpoint",
    "verify-resume": "kill and resume a run, and compare it with the uninterrupted one",
    "perplexity": "sliding-window perplexity, or last-word accuracy, of a model on a text",
}
BENCHMARKS = {
    "train": "training step: ours against transformers' GPT-2",
    "data": "batches per second from shards and streams",
    "tokenize": "tokens per second of the tokenizers",
    "hellaswag": "examples per second of the HellaSwag evaluation",
    "generate": "tokens per second of generation",
    "checkpoint": "time a save takes, and how long training waits for it",
    "all": "the first six, one after the other; --minutes 10 for a borrowed GPU",
    "table": "rewrite the table of results/README.md from the records",
}
SCRIPTS = """
In the project's root:
  prepare_fineweb.py  web-scale text -> token shards      train_accelerate.py  token shards -> a trained model
  eval_hellaswag.py   model -> HellaSwag accuracies       (each with --help)"""


def main(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:
        return dispatch(argv[1:], BENCHMARKS, prog="gpt2repro bench", package="gpt2repro.commands.bench")
    return dispatch(argv, COMMANDS, prog="gpt2repro", package="gpt2repro.commands", epilogue=SCRIPTS)


def dispatch(argv: list[str], commands: dict[str, str], *, prog: str, package: str, epilogue: str = "") -> int:
    """Run the command that `argv` begins with; without one, or with --help, list them all. Raises: InputError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(f"usage: {prog} <command> [--help] …\n")
        print("\n".join(f"  {name:18} {line}" for name, line in commands.items()))
        if epilogue:
            print(epilogue)
        return 0 if argv else 2
    name = argv[0]
    if name not in commands:
        raise InputError(f"{prog}: unknown command {name!r}; the commands are {', '.join(commands)}")
    return importlib.import_module(f"{package}.{name.replace('-', '_')}").main(argv[1:])


def console_script() -> int:
    """Entry point of the installed `gpt2repro`."""
    return run_main(main)


if __name__ == "__main__":
    sys.exit(console_script())
