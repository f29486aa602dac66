"""`gpt2repro <command>`: the name of a command -> its module, imported when it is called. Nothing else."""

import difflib
import importlib
import importlib.metadata
import sys

from gpt2repro.options import InputError, run_main

COMMANDS = {
    "prepare-text": "text (yours, tiny shakespeare, or Python's own documentation) -> token shards",
    "generate": "write text with a model: one prompt, a conversation, or a file of prompts",
    "plot": "loss, learning rate and tokens/s of one or more runs -> PNG",
    "compare": "two recipes over several seeds: a difference, or chance?",
    "average": "the mean of a run's last checkpoints -> a model of its own",
    "push": "publish a model on the Hugging Face Hub, with its card",
    "import-checkpoint": "nanoGPT, build-nanogpt or llm.c checkpoint -> a directory of ours",
    "export": "a model in another program's form: a plain gpt2, ONNX, CTranslate2, GGUF",
    "demo": "a web page to talk to a model",
    "bench": "measure this machine: train, data, tokenize, hellaswag, generate, checkpoint; or recipes",
    "verify-resume": "kill and resume a run, and compare it with the uninterrupted one",
    "conformance": "a checkpoint in the programs that people use: do they compute the same?",
    "perplexity": "sliding-window perplexity, or last-word accuracy, of a model on a text",
}
BENCHMARKS = {
    "train": "training step: ours against transformers' GPT-2",
    "data": "batches per second from shards and streams",
    "tokenize": "tokens per second of the tokenizers",
    "hellaswag": "examples per second of the HellaSwag evaluation",
    "generate": "tokens per second of generation",
    "checkpoint": "time a save takes, and how long training waits for it",
    "recipes": "small models, one change of the recipe at a time, several seeds",
    "reduction": "a step with the same bits on any number of processes, against plain DDP",
    "all": "the first six, one after the other; --minutes 10 for a borrowed GPU",
    "table": "rewrite the table of results/README.md from the records",
}
# The jobs that stand in the project's root, and are started from there or, after an installation, by these names.
SCRIPTS = {
    "train": ("train_accelerate", "token shards or a stream of text -> a trained model"),
    "eval": ("eval_hellaswag", "model -> accuracies on HellaSwag and other tasks"),
    "prepare": ("prepare_fineweb", "web-scale text (FineWeb, OpenWebText, any Hub dataset) -> token shards"),
}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"gpt2repro {importlib.metadata.version('gpt2repro')}")
        return 0
    if argv[:1] == ["bench"]:
        modules = {name: f"gpt2repro.commands.bench.{name}" for name in BENCHMARKS}
        return dispatch(argv[1:], modules, BENCHMARKS, prog="gpt2repro bench")
    modules = {name: script for name, (script, _) in SCRIPTS.items()}
    modules |= {name: f"gpt2repro.commands.{name.replace('-', '_')}" for name in COMMANDS}
    said = {name: line for name, (_, line) in SCRIPTS.items()} | COMMANDS
    return dispatch(argv, modules, said, prog="gpt2repro")


def dispatch(argv: list[str], modules: dict[str, str], said: dict[str, str], *, prog: str) -> int:
    """Run the command that `argv` begins with; without one, or with --help, list them all. Raises: InputError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(f"usage: {prog} <command> [--help] …\n")
        print("\n".join(f"  {name:18} {line}" for name, line in said.items()))
        return 0 if argv else 2
    name = argv[0]
    if name not in modules:
        near = difflib.get_close_matches(name, [*modules, "--help", "--version"], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the commands are {', '.join(modules)}"
        raise InputError(f"{prog}: unknown command {name!r}{hint}")
    return importlib.import_module(modules[name]).main(argv[1:])


def console_script() -> int:
    """Entry point of the installed `gpt2repro`."""
    return run_main(main)


if __name__ == "__main__":
    sys.exit(console_script())
