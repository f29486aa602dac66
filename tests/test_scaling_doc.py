"""docs/scaling.md computes its own table: the printed numbers are those of the printed program."""

import re
from pathlib import Path

import pytest

DOC = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
PROGRAM = re.search(r"```python\n(.*?)```", DOC, re.DOTALL).group(1)
OUTPUT = re.search(r"```text\n(.*?)```", DOC, re.DOTALL).group(1)


def test_table_of_the_scaling_page_is_the_output_of_its_program(capsys):
    exec(PROGRAM, {})
    assert capsys.readouterr().out == OUTPUT


def test_bandwidth_of_the_scaling_page_gives_097_in_the_formula_beside_it():
    names: dict = {}
    exec(PROGRAM, names)
    step, _, _, bandwidth, _ = names["needed"]("124M", 8, 64 * 1024)
    embedding_bytes = 2 * 7 / 8 * 4 * (50257 + 1024) * 768  # of the gradients that nothing can hide
    assert step / (step + embedding_bytes / (bandwidth * 1e9)) == pytest.approx(0.97)


def test_parameters_of_the_scaling_page_are_gpt2s():
    names: dict = {}
    exec(PROGRAM, names)
    _, ddp_gb, fsdp_gb, _, _ = names["needed"]("1558M", 8, 1024)
    assert ddp_gb == pytest.approx(2 * 7 / 8 * 4 * 1_557_611_200 / 1e9, rel=1e-5)
    assert fsdp_gb == pytest.approx(7 / 8 * 8 * 1_557_611_200 / 1e9, rel=1e-5)
