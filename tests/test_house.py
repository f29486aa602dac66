"""The house rules: which way imports run, every command is there, setup.cfg says what is really needed."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

from gpt2repro.__main__ import BENCHMARKS, COMMANDS

ROOT = Path(__file__).resolve().parent.parent
HUB_PAIR = {"configuration_gpt2repro", "modeling_gpt2repro"}
SCRIPTS = {"prepare_fineweb", "train_accelerate", "eval_hellaswag"}
COMMAND_FILES = sorted((ROOT / "gpt2repro" / "commands").rglob("*.py"))
LIBRARY = sorted({*(ROOT / "gpt2repro").rglob("*.py")} - {*COMMAND_FILES, ROOT / "gpt2repro" / "__main__.py"})
# What is imported under another name than it is installed under.
INSTALLED_AS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "PIL": "pillow", "llama_cpp": "llama-cpp-python"}
# Needed without an import of ours: torch writes through tensorboard, llama.cpp's converter through gguf; make, pytest
# and nbclient run the rest.
NOT_IMPORTED = {
    "gguf",
    "tensorboard",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "ipykernel",
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def names(requirements: str) -> set[str]:
    """Distribution names in a requirement list; the project's own extras are not requirements."""
    lines = [line.strip() for line in requirements.splitlines() if line.strip() and not line.strip().startswith("#")]
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines} - {"gpt2repro"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_a_library_module_imports_neither_commands_nor_scripts_nor_the_hub_pair(path):
    imported = imports_of(path)
    assert not imported & (HUB_PAIR | SCRIPTS)
    assert not {name for name in imported if name.startswith("gpt2repro.commands")}


@pytest.mark.parametrize("path", COMMAND_FILES, ids=lambda path: path.stem)
def test_a_command_imports_no_other_command_and_no_script(path):
    # `bench` is one command: its benchmarks share what they measure. What else commands share is in loading.py.
    others = {f"gpt2repro.commands.{name.replace('-', '_')}" for name in COMMANDS if name != "bench"}
    assert not imports_of(path) & (others | SCRIPTS)


def test_the_hub_pair_needs_transformers_and_torch_only():
    for name in HUB_PAIR:
        roots = {module.split(".")[0] for module in imports_of(ROOT / f"{name}.py")}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers", "configuration_gpt2repro"}


def test_no_root_file_hides_a_library():
    libraries = set(INSTALLED_AS) | names(config()["options"]["install_requires"])
    assert not {path.stem for path in ROOT.glob("*.py")} & libraries


@pytest.mark.parametrize("name", [*COMMANDS, *(f"bench/{name}" for name in BENCHMARKS)])
def test_every_listed_command_has_its_file_with_options_and_a_main(name):
    path = ROOT / "gpt2repro" / "commands" / f"{name.replace('-', '_')}.py"
    if name == "bench":
        path = path.with_suffix("") / "__init__.py"
        assert path.exists()
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert {"Options", "main"} <= defined and ast.get_docstring(tree)


def test_setup_cfg_lists_every_root_module():
    listed = config()["options"]["py_modules"].split("\n")
    assert {line for line in listed if line and not line.startswith("#")} == {path.stem for path in ROOT.glob("*.py")}


def test_every_import_is_a_requirement_and_every_requirement_is_used():
    parser = config()
    required = names(parser["options"]["install_requires"])
    optional = set().union(*(names(text) for text in parser["options.extras_require"].values()))
    installed = [*ROOT.glob("*.py"), *LIBRARY, *COMMAND_FILES]

    def third_party(paths) -> set[str]:
        roots = {module.split(".")[0] for path in paths for module in imports_of(path)}
        own = {
            "gpt2repro",
            *(path.stem for path in ROOT.glob("*.py")),
            *(path.stem for path in ROOT.glob("tests/*.py")),
        }
        return {
            INSTALLED_AS.get(root, root).lower().replace("_", "-")
            for root in roots - own - set(sys.stdlib_module_names)
        }

    assert third_party(installed) <= required | optional
    assert third_party(ROOT.glob("tests/*.py")) <= required | optional
    notebooks = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("notebooks/*.ipynb"))
    used = third_party([*installed, *ROOT.glob("tests/*.py")]) | NOT_IMPORTED
    assert {name for name in required | optional if name not in used and name not in notebooks} == set()
