"""The house rules: which way imports run, every command is there, setup.cfg says what is really needed."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

from gpt2repro.__main__ import BENCHMARKS, COMMANDS
from gpt2repro.__main__ import SCRIPTS as SCRIPTS_BY_NAME

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gpt2repro"
HUB_PAIR = {"configuration_gpt2repro", "modeling_gpt2repro"}
SCRIPTS = {"prepare_fineweb", "train_accelerate", "eval_hellaswag"}
ROOMS = {"data", "checkpoint", "evaluation", "generation", "training", "publishing"}
# What a room may import of others: the way of the data, never against it.
MAY_IMPORT = {
    "data": set(),
    "checkpoint": set(),
    "evaluation": {"data"},
    "generation": {"data", "training"},  # the page shows the curve of the model's run
    "training": {"data", "checkpoint", "evaluation"},
    "publishing": {"data", "checkpoint", "training"},
}
MOST_IMPORTS_BETWEEN_ROOMS = 40
LONGEST_LOOP, LONGEST_SCRIPT = 200, 469  # lines of train(), and of train_accelerate.py
COMMAND_FILES = sorted((PACKAGE / "commands").rglob("*.py"))
MAIN = PACKAGE / "__main__.py"
LIBRARY = sorted({*PACKAGE.rglob("*.py")} - {*COMMAND_FILES, MAIN})
# What is imported under another name than it is installed under.
INSTALLED_AS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "PIL": "pillow", "llama_cpp": "llama-cpp-python"}
# Needed without an import of ours: transformers quantises with bitsandbytes, torch writes through tensorboard,
# Accelerate through trackio, llama.cpp's converter through gguf;
# make, pytest and nbclient run the rest.
NOT_IMPORTED = {
    "bitsandbytes",
    "gguf",
    "tensorboard",
    "trackio",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "ipykernel",
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports: at its top, inside its functions, or by name."""
    found = set()
    by_name = ("import_module", "importorskip", "__import__", "find_spec")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in by_name:
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 and parts[0] == "gpt2repro" and parts[1] in ROOMS else None


def library_imports() -> dict[str, set[str]]:
    """Library module -> the library modules that it imports."""
    modules = {module_name(path): path for path in LIBRARY}
    return {name: {other for other in imports_of(path) if other in modules and other != name}
            for name, path in modules.items()}  # fmt: skip


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def names(requirements: str) -> set[str]:
    """Distribution names in a requirement list; the project's own extras are not requirements."""
    lines = [line.strip() for line in requirements.splitlines() if line.strip() and not line.strip().startswith("#")]
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines} - {"gpt2repro"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_library_module_imports_neither_commands_nor_scripts_and_only_one_the_hub_pair(path):
    imported = imports_of(path)
    assert not imported & SCRIPTS
    assert not {name for name in imported if name.startswith("gpt2repro.commands")}
    if path != PACKAGE / "models.py":
        assert not {name.split(".")[0] for name in imported} & HUB_PAIR


def test_rooms_import_along_the_way_of_the_data_and_seldom():
    between = {
        (name, other)
        for name, others in library_imports().items()
        for other in others
        if room_of(name) and room_of(other) and room_of(name) != room_of(other)
    }
    against = {(name, other) for name, other in between if room_of(other) not in MAY_IMPORT[room_of(name)]}
    assert not against
    assert len(between) <= MOST_IMPORTS_BETWEEN_ROOMS, sorted(between)


def test_no_library_module_imports_itself_through_others():
    imports = library_imports()

    def reachable(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for other in imports[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    assert [name for name in imports if name in reachable(name)] == []


def test_the_foundations_import_no_room():
    for name in ("files", "options", "redaction"):
        path = PACKAGE / f"{name}.py"
        if path.exists():
            assert not {room_of(module) for module in imports_of(path)} & ROOMS, name


def test_the_loop_is_read_in_ten_minutes():
    source = (ROOT / "train_accelerate.py").read_text(encoding="utf-8")
    (loop,) = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "train"]
    assert loop.end_lineno - loop.lineno + 1 <= LONGEST_LOOP
    assert len(source.splitlines()) <= LONGEST_SCRIPT
    closures = (ast.FunctionDef, ast.Lambda, ast.Nonlocal, ast.Global)
    assert not [node for node in ast.walk(loop) if isinstance(node, closures) and node is not loop]


@pytest.mark.parametrize("path", COMMAND_FILES, ids=lambda path: path.stem)
def test_a_command_imports_no_other_command_and_no_script(path):
    # `bench` is one command: its benchmarks share what they measure.
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


@pytest.mark.parametrize("name", SCRIPTS_BY_NAME)
def test_the_scripts_are_commands_too(name, run_program):
    script = run_program([f"{SCRIPTS_BY_NAME[name][0]}.py", "--help"])
    command = run_program(["-m", "gpt2repro", name, "--help"])
    assert script.returncode == command.returncode == 0 and command.stdout == script.stdout


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
