"""README, its translation and the pages under docs/: in step with each other, with the code and with results/."""

import ast
import configparser
import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from gpt2repro.__main__ import BENCHMARKS, COMMANDS, SCRIPTS

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]
COMMAND_PAGES = [page for page in PAGES if page.parent.name != "results"]  # records keep the commands of their time
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
TRANSLATED = [("README.md", "README.zh-CN.md"), ("docs/faq.md", "docs/faq.zh-CN.md")]
LONGEST_README = 180  # lines that a newcomer still reads to the end


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def table_commands(text: str) -> list[str]:
    """Every `code` in the tables, in order: commands, options, files, names of baselines."""
    rows = [line for line in without_blocks(text).splitlines() if line.startswith("|")]
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row)]


def ratios(text: str) -> list[str]:
    """Every measured `**1.39x** (1.30–1.80)`."""
    return re.findall(r"\*\*[\d.]+x\*\* \([\d.]+–[\d.]+\)", text)


def test_readme_is_short_and_begins_with_a_picture():
    for name in TRANSLATED[0]:
        lines = read(name).splitlines()
        assert len(lines) <= LONGEST_README, f"{name} has {len(lines)} lines"
        picture = re.search(r'src="([^"]+)"', "\n".join(lines[:15]))
        assert picture and (ROOT / picture[1]).stat().st_size < 200_000


@pytest.mark.parametrize("original, translation", TRANSLATED)
def test_translation_has_the_same_headings_commands_tables_and_numbers(original, translation):
    english, chinese = read(original), read(translation)
    assert code_blocks(english) == code_blocks(chinese)
    for pattern in (r"^(#+) ", r"\n\n(\*\*)"):  # headings by level, questions and other bold beginnings
        found = [re.findall(pattern, without_blocks(text), re.MULTILINE) for text in (english, chinese)]
        assert found[0] == found[1]
    assert table_commands(english) == table_commands(chinese)
    assert ratios(english) == ratios(chinese)


def test_readme_quotes_the_records():
    """Its table is a choice from results/benchmarks; a record that is measured again must be quoted again."""
    speedups = []
    for path in ROOT.glob("results/benchmarks/*.json"):
        headlines = json.loads(path.read_text(encoding="utf-8"))["results"].get("headlines", [])
        speedups += [headline["speedup"] for headline in headlines if headline.get("speedup")]
    measured = {f"**{ratio['median']:.2f}x** ({ratio['min']:.2f}–{ratio['max']:.2f})" for ratio in speedups}
    quoted = ratios(read("README.md"))
    assert 6 <= len(quoted) <= 8
    assert set(quoted) <= measured
    assert "benchmarks: generated" not in read("README.md"), "the long table lives in results/README.md"


@pytest.mark.parametrize("preset", ["quickstart", "shakespeare_char_cpu"])
def test_presets_quote_the_results(preset):
    """Losses to four digits and bits per byte to three in a preset's comment are those of its run in results/."""
    comment = "\n".join(line for line in read(f"gpt2repro/presets/{preset}.yaml").splitlines() if line.startswith("#"))
    quoted = re.findall(r"\d\.\d{3,4}\b", comment)
    assert quoted and all(re.search(rf"\b{number}\b", read("results/README.md")) for number in quoted)
    records = [json.loads(line) for line in read(f"results/{preset}/metrics.jsonl").splitlines()]
    assert f"{[r['val_loss'] for r in records if 'val_loss' in r][-1]:.4f}" in quoted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_blocks(text)) + re.findall(r'src="([^"]+)"', text)
    named = re.findall(
        r"`((?:gpt2repro|accelerate_configs|docs|notebooks|tests|results)/[\w./-]*)`", without_blocks(text)
    )
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing + [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [*COMMAND_PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_option_exists(page):
    """Each `gpt2repro NAME --option` and `SCRIPT.py --option` is looked up in the options of that program."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page.name == "CHANGELOG.md":
        text = text.partition("### Removed")[0]
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    modules = {name: module for name, (module, _) in SCRIPTS.items()}
    modules |= {name: f"gpt2repro.commands.{name.replace('-', '_')}" for name in COMMANDS if name != "bench"}
    unknown = []
    for name, rest in re.findall(r"(?:`|^ *|-m |bin/|&& )gpt2repro ([a-z][a-z-]*)([^`\n]*)", text, re.MULTILINE):
        if name == "bench":
            name, rest = re.match(r" *([a-z]*)(.*)", rest).groups()
            unknown += [] if not name or name in BENCHMARKS else [f"bench {name}"]
            module = f"gpt2repro.commands.bench.{name}" if name in BENCHMARKS else None
        else:
            unknown += [] if name in modules else [name]
            module = modules.get(name)
        unknown += unknown_options(module, rest) if module else []
    for script, rest in re.findall(r"(train_accelerate|prepare_fineweb|eval_hellaswag)\.py([^`\n]*)", text):
        unknown += unknown_options(script, rest)
    assert not unknown


def unknown_options(module: str, rest: str) -> list[str]:
    """The options in `rest`, up to ` -- ` and the next command, that the program `module` does not have."""
    found = importlib.import_module(module)
    options = found.TrainConfig if module == "train_accelerate" else found.Options
    known = {field.name for field in dataclasses.fields(options)} | {"config", "help"}
    given = re.findall(r"(?<![\w-])--(?:no-)?(\w+)", re.split(r" -- | && |;|#", rest)[0])
    return [f"{module}: --{option}" for option in given if option not in known]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_what_exists(notebook):
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    missing = []
    for cell in cells:
        source = "\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("gpt2repro", "train_accelerate"):
                names = [alias.name for alias in node.names]
                found = importlib.import_module(node.module)
                missing += [
                    f"{node.module}.{name}"
                    for name in names
                    if not hasattr(found, name) and importlib.util.find_spec(f"{node.module}.{name}") is None
                ]
    assert not missing


def test_constraints_name_every_requirement_and_nothing_else():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line.strip() for text in listed for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "gpt2repro["))]
    named = [re.match(r"[\w.-]+", line)[0].lower() for line in lines]
    pinned = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pinned)
    assert {line.partition("==")[0].replace("_", "-") for line in pinned} == {name.replace("_", "-") for name in named}
