"""README, its translation and the pages under docs/: in step with each other and with the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def table_commands(text: str) -> list[str]:
    """Every `code` in the tables, in order: commands, options, files, numbers of parameters."""
    rows = [line for line in without_blocks(text).splitlines() if line.startswith("|")]
    return [code for row in rows if "results/" not in row and "×" not in row for code in re.findall(r"`([^`]+)`", row)]


def test_translation_has_the_same_headings_commands_and_tables():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    generated = re.compile(r"<!-- benchmarks: generated.*?<!-- benchmarks: end -->", re.DOTALL)
    english = generated.sub("", english)
    assert code_blocks(english) == code_blocks(chinese)
    levels = [
        [len(mark) for mark in re.findall(r"^(#+) ", without_blocks(t), re.MULTILINE)] for t in (english, chinese)
    ]
    assert levels[0] == levels[1]
    assert table_commands(english) == table_commands(chinese)
    questions = [
        len(re.findall(r"^\*\*.+?\*\*", t[t.index("## FAQ" if t is english else "## 常见问题") :], re.MULTILINE))
        for t in (english, chinese)
    ]
    assert questions[0] == questions[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_blocks(text)) if "://" not in link]
    named = re.findall(r"`((?:gpt2repro|accelerate_configs|docs|notebooks|tests)/[\w./-]*)`", without_blocks(text))
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_every_command_and_option_in_the_readme_exists():
    """Each `gpt2repro NAME --option` and `SCRIPT.py --option` is looked up in the options of that program."""
    import importlib

    from gpt2repro.__main__ import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?:python -m )?gpt2repro ([a-z-]+)((?: --?\w+)?[^`\n]*)", text)
    for name, rest in lines:
        if name in COMMANDS and name != "bench":
            options = importlib.import_module(f"gpt2repro.commands.{name.replace('-', '_')}").Options
            check(options, rest, name)
    scripts = {"train_accelerate": "TrainConfig", "prepare_fineweb": "Options", "eval_hellaswag": "Options"}
    for name, rest in re.findall(r"(train_accelerate|prepare_fineweb|eval_hellaswag)\.py([^`\n]*)", text):
        check(getattr(importlib.import_module(name), scripts[name]), rest, name)


def check(options: type, rest: str, name: str) -> None:
    import dataclasses

    known = {field.name for field in dataclasses.fields(options)} | {"config"}
    unknown = [option for option in re.findall(r"--(\w+)", rest.split(" -- ")[0]) if option not in known]
    assert not unknown, f"{name} has no {unknown}"
