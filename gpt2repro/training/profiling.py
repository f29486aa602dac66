"""`--profile STEPS`: a torch profiler trace of some training steps, and a page that says what to look at in it.

    with profiling(run_dir / "profile", steps=5, logits=(rows, vocab_size)) as profiler:
        for … in …:
            … one optimizer step …
            profiler.step()

Knows neither the model nor the loop. Writes `trace.json.gz` (open it at https://ui.perfetto.dev) and `summary.txt`:
which attention kernel ran, whether a float32 tensor of the logits' size was ever allocated, the table of operators.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile, schedule

WAIT_STEPS = 3  # the first steps compile and fill caches
WARMUP_STEPS = 2  # the profiler's own start-up
ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|sdpa|mha_|cudnn.*attn", re.IGNORECASE)
TABLE_ROWS = 30


@contextlib.contextmanager
def profiling(out: Path, steps: int | None, *, logits: tuple[int, int]) -> Iterator[profile | SimpleNamespace]:
    """Profile `steps` steps after the first five into the directory `out`; `steps=None` profiles nothing.

    `logits` is the shape (rows of one micro-batch = B*T, vocab_size). A run shorter than `steps + 5` leaves no profile,
    only a sentence in `summary.txt` that says so.
    """
    if steps is None:
        yield SimpleNamespace(step=lambda: None)
        return

    out.mkdir(parents=True, exist_ok=True)
    summary = out / "summary.txt"
    needed = WAIT_STEPS + WARMUP_STEPS + steps
    summary.write_text(
        f"No profile: the run ended before step {needed} ({steps} steps after {needed - steps} others).\n"
    )

    def finished(profiler: profile) -> None:
        profiler.export_chrome_trace(str(out / "trace.json.gz"))
        summary.write_text(describe(profiler, steps, logits), encoding="utf-8")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(
        activities=activities,
        schedule=schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=steps, repeat=1),
        on_trace_ready=finished,
        record_shapes=True,
        profile_memory=True,
    ) as profiler:
        yield profiler


def describe(profiler: profile, steps: int, logits: tuple[int, int]) -> str:
    """The summary page of a finished profile."""
    averages = profiler.key_averages()
    on_gpu = any(event.device_type == DeviceType.CUDA for event in averages)
    sort_by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=sort_by, row_limit=TABLE_ROWS, max_name_column_width=80)
    reports = attention_report(averages, steps), logits_report(allocations(profiler), steps, logits)
    return "\n\n".join([f"{steps} steps profiled", *reports, table])


def attention_report(averages, steps: int) -> str:
    """Every attention operator and kernel by name, with its calls and milliseconds per step."""
    lines = ["attention (calls and milliseconds per step):"]
    for event in averages:
        if ATTENTION.search(event.key):
            microseconds = event.device_time_total or event.cpu_time_total
            kind = "kernel" if event.device_type == DeviceType.CUDA else "operator"
            lines.append(f"  {kind:8} {event.count / steps:6.1f} {microseconds / steps / 1000:9.3f} ms  {event.key}")
    none = "  no fused attention ran: it is computed as matrix products and a softmax (eager), or by Inductor"
    return "\n".join(lines if len(lines) > 1 else [*lines, none])


def allocations(profiler: profile) -> list[int]:
    """The size in bytes of every allocation of the profiled steps, as torch's allocators reported them."""
    events = profiler.profiler.kineto_results.events()  # profiler.events() drops those blamed on an operator
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def logits_report(sizes: list[int], steps: int, logits: tuple[int, int]) -> str:
    """Whether tensors of the logits' size (also padded to 64) were allocated in float32, and in 2-byte precision."""
    rows, vocab_size = logits

    def count(bytes_each: int) -> float:
        smallest, largest = rows * vocab_size * bytes_each, rows * (vocab_size + 63) * bytes_each + 512
        return sum(smallest <= size <= largest for size in sizes) / steps

    single, half = count(4), count(2)
    verdict = "no float32 tensor of that size was allocated" if single == 0 else "a float32 copy of the logits EXISTS"
    if single and not half:
        verdict = "the logits themselves are float32"
    return (
        f"logits ({rows:,} x {vocab_size:,}): {verdict}\n"
        f"  {single:.1f} allocations per step of their size in float32 ({rows * vocab_size * 4 / 2**30:.3f} GiB each), "
        f"{half:.1f} in 2-byte precision\n"
        f"  largest single allocation: {max(sizes, default=0) / 2**30:.3f} GiB"
    )
