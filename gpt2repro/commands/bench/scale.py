"""How cost grows: step time and memory against model size and batch, data time against corpus size.

    gpt2repro bench scale      # -> results/benchmarks/scale-<host>.json and results/scale-<host>.png

Our eager training step on random tokens, fp32 on a CPU and bf16 on a GPU. The corpora are simulated: a token split of
any length that reads from one small array, so that what is measured is finding and gathering a batch's windows.
"""

import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gpt2repro.commands.bench.harness import GIB, RECORDS, figure, host_kind, peak_memory_gib, summary, write_record
from gpt2repro.commands.bench.train import OURS, SIZES, candidate
from gpt2repro.data.sources import ShardSource
from gpt2repro.options import parse_options

# (n_layer, n_head, n_embd) and, for the sweep over batches, sequences per step
CPU_MODELS, CPU_BATCHES = [(2, 2, 128), (4, 4, 192), (4, 4, 256), (6, 6, 384), (8, 8, 512)], [1, 2, 4, 8, 16, 32]
GPU_MODELS, GPU_BATCHES = [SIZES[name] for name in ("124M", "350M", "774M", "1558M")], [1, 2, 4, 8, 16, 32, 64]
CORPUS_TOKENS = [10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12]


@dataclass
class Options:
    rounds: int = 7
    "Timed steps or batches per point."
    out: Path = RECORDS
    "Directory of the JSON record."
    figures: Path = Path("results")
    "Directory of the figure."


class SimulatedSplit:
    """A token split of any length whose content repeats one small array."""

    vocab_size, sha256 = 50257, "simulated"

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._content = np.random.default_rng(0).integers(0, self.vocab_size, 2**20, dtype=np.uint16)

    def read(self, start: int, count: int) -> np.ndarray:
        first = start % (len(self._content) - count)
        return self._content[first : first + count]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench scale", description=__doc__)
    on_gpu = torch.cuda.is_available()
    models, batches = (GPU_MODELS, GPU_BATCHES) if on_gpu else (CPU_MODELS, CPU_BATCHES)
    vocab_size, seq_len, batch = (50257, 1024, 8) if on_gpu else (512, 128, 8)
    middle = models[0] if on_gpu else models[2]

    by_model = [measure_step(model, vocab_size, seq_len, batch, options.rounds) for model in models]
    by_batch = [measure_step(middle, vocab_size, seq_len, size, options.rounds) for size in batches]
    by_corpus = [measure_batch(tokens, options.rounds) for tokens in CORPUS_TOKENS]
    growth = {
        "step seconds / parameters": slope(by_model, "parameters", "seconds"),
        "step memory / parameters": slope(by_model, "parameters", "step_memory_gib"),
        "step seconds / batch tokens": slope(by_batch, "batch_tokens", "seconds"),
        "step memory / batch tokens": slope(by_batch, "batch_tokens", "step_memory_gib"),
        "batch seconds / corpus tokens": slope(by_corpus, "corpus_tokens", "seconds"),
    }
    options.figures.mkdir(parents=True, exist_ok=True)
    picture = options.figures / f"scale-{host_kind()}.png"
    draw(by_model, by_batch, by_corpus, picture)
    rows = [figure(f"growth of {name}", value, unit="(exponent; 1 is linear)") for name, value in growth.items()]
    results = {
        "config": {"vocab_size": vocab_size, "seq_len": seq_len, "batch": batch, "model_of_the_batch_sweep": middle},
        "by_model": by_model,
        "by_batch": by_batch,
        "by_corpus": by_corpus,
        "growth": growth,
        "figure": picture.as_posix(),
        "headlines": rows,
    }
    write_record("scale", results, argv=argv, out=options.out)
    return 0


def measure_step(model: tuple[int, int, int], vocab_size: int, seq_len: int, batch: int, rounds: int) -> dict:
    """Seconds and memory of one eager optimizer step of ours."""
    gc.collect()  # the point before this one goes first
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = dict(zip(("n_layer", "n_head", "n_embd"), model, strict=True))
    shape |= {"vocab_size": vocab_size, "n_positions": seq_len}
    x, y = torch.randint(0, vocab_size, (2, batch, seq_len), device=device)
    _, step, network = candidate(OURS, shape, device, "bf16" if device.type == "cuda" else "fp32")
    parameters = sum(p.numel() for p in network.parameters())
    seconds = timed(lambda: step(x, y), rounds)
    point = {
        "model": model,
        "parameters": parameters,
        "batch_tokens": batch * seq_len,
        "step_memory_gib": peak_memory_gib(lambda: step(x, y)),  # gradients and activations
        "state_memory_gib": parameters * 12 / GIB,  # fp32 weights and AdamW's two moments
        "seconds": summary(seconds)["median_seconds"],
        "rounds": seconds,
    }
    print(f"  {parameters:,} parameters, {batch} x {seq_len}: {point['seconds']:.4f} s", flush=True)
    return point


def measure_batch(corpus_tokens: int, rounds: int, *, sequences: int = 64, seq_len: int = 1024) -> dict:
    """Seconds to find and gather one batch of 64 x 1024 tokens from a corpus of this size."""
    source = ShardSource(SimulatedSplit(corpus_tokens), seq_len=seq_len, seed=1)
    batches = source.batches(source.initial_state(), rank=0, world=1, sequences=sequences)
    seconds = timed(lambda: next(batches), 5 * rounds)
    point = {"corpus_tokens": corpus_tokens, "seconds": summary(seconds)["median_seconds"], "rounds": seconds}
    print(f"  corpus of {corpus_tokens:,} tokens: {1000 * point['seconds']:.3f} ms per batch", flush=True)
    return point


def timed(call, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls after two untimed ones."""
    seconds = []
    for turn in range(2 + rounds):
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds


def slope(points: list[dict], x: str, y: str) -> float:
    """Exponent of growth: the least-squares slope of log y over log x."""
    logs = np.log([[point[x], point[y]] for point in points])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def draw(by_model: list[dict], by_batch: list[dict], by_corpus: list[dict], out: Path) -> None:
    """Five log-log panels; the dotted line through the last point grows linearly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (by_model, "parameters", "seconds", "step, s"),
        (by_model, "parameters", "step_memory_gib", "gradients and activations, GiB"),
        (by_batch, "batch_tokens", "seconds", "step, s"),
        (by_batch, "batch_tokens", "step_memory_gib", "gradients and activations, GiB"),
        (by_corpus, "corpus_tokens", "seconds", "data of one batch, s"),
    ]
    picture, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), constrained_layout=True)
    for axis, (points, x, y, label) in zip(axes, panels, strict=True):
        xs, ys = [point[x] for point in points], [point[y] for point in points]
        axis.loglog(xs, ys, "o-", label="measured")
        if x != "corpus_tokens":
            axis.loglog([xs[0], xs[-1]], [ys[-1] * xs[0] / xs[-1], ys[-1]], ":", color="grey", label="linear")
        else:
            axis.set_ylim(10 ** math.floor(math.log10(min(ys)) - 1), 10 ** math.ceil(math.log10(max(ys)) + 1))
        axis.set_xlabel(x.replace("_", " "))
        axis.set_ylabel(label)
        axis.minorticks_off()  # their labels would overlap
        axis.grid(alpha=0.3)
        axis.legend()
    picture.suptitle(f"Cost of scale on {host_kind()}")
    picture.savefig(out, dpi=120)
    plt.close(picture)
    print(f"figure: {out}", flush=True)
