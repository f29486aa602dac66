"""A profile of made-up steps: its trace opens, its summary names the attention and finds a float32 logits copy."""

import gzip
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt2repro.training.profiling import WAIT_STEPS, WARMUP_STEPS, profiling

ROWS, VOCABULARY = 64, 1000


def made_up_step(*, copy_logits: bool) -> None:
    q = torch.randn(1, 2, 8, 16)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    logits = torch.randn(ROWS, VOCABULARY, dtype=torch.bfloat16)
    if copy_logits:
        logits.float()


def profile_steps(out: Path, *, steps: int, run: int, copy_logits: bool = False) -> str:
    with profiling(out, steps, logits=(ROWS, VOCABULARY)) as profiler:
        for _ in range(run):
            made_up_step(copy_logits=copy_logits)
            profiler.step()
    return (out / "summary.txt").read_text()


def test_profile_leaves_a_trace_and_names_the_attention_that_ran(tmp_path: Path):
    summary = profile_steps(tmp_path, steps=2, run=WAIT_STEPS + WARMUP_STEPS + 2)
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert any(event.get("name", "").startswith("aten::scaled_dot_product") for event in trace["traceEvents"])
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in summary
    assert "Self CPU" in summary


def test_float32_copy_of_the_logits_is_found_and_its_absence_is_stated(tmp_path: Path):
    run = WAIT_STEPS + WARMUP_STEPS + 1
    assert "no float32 tensor of that size" in profile_steps(tmp_path / "without", steps=1, run=run)
    assert "copy of the logits EXISTS" in profile_steps(tmp_path / "with", steps=1, run=run, copy_logits=True)


def test_run_too_short_to_profile_says_so(tmp_path: Path):
    assert "the run ended before step 9" in profile_steps(tmp_path, steps=4, run=3)


def test_no_profile_is_written_where_none_is_asked_for(tmp_path: Path):
    with profiling(tmp_path / "profile", None, logits=(ROWS, VOCABULARY)) as profiler:
        profiler.step()
    assert not (tmp_path / "profile").exists()
