"""The training step, ours against others in one process: forward, backward, clipping and AdamW on random tokens.

    gpt2repro bench train                                   # a small model on a CPU; 124M, 64 x 1024, bf16 on a GPU
    gpt2repro bench train --size 350M --batch 32 --no-loop
    gpt2repro bench train --whole --nanogpt DIR             # a whole run on a CPU against nanoGPT's own train.py

Compared are ours, eager and compiled; transformers' `GPT2LMHeadModel` in an eager Accelerate loop; and a GPT-2 written
by hand as build-nanogpt's is, eager and compiled, in its loop. All have the same weights, tokens, precision, fused
AdamW and SDPA attention, and no dropout. Before any timing, every candidate's loss and gradients are compared with
those of transformers' eager fp32 model. Then `train_accelerate.py` runs as a process of its own: its tokens per second
are compared with the bare step's, and its time to the first step with the time of its imports.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from gpt2repro.commands.bench import baselines, harness
from gpt2repro.commands.bench.harness import SIZES, NotEqual, Record
from gpt2repro.data.shards import FORMAT, MANIFEST, TOKENIZER, VERSION, write_shard
from gpt2repro.data.tokenization import char_tokenizer
from gpt2repro.files import write_json
from gpt2repro.models import compile_model
from gpt2repro.options import AtLeastOne, parse_options
from gpt2repro.training.meter import flops_per_token, peak_flops
from gpt2repro.training.metrics_log import read_metrics
from gpt2repro.training.optim import build_optimizer

RECIPE = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
# Largest accepted distance from the fp32 reference: of the loss in nats, of all gradients as |g - g_ref| / |g_ref|.
# fp32 differs by the order of summation (5e-7 measured); bf16 keeps 8 bits, 0.4 % per rounding.
BOUNDS = {"fp32": {"loss": 1e-4, "gradients": 1e-3}, "bf16": {"loss": 2e-2, "gradients": 5e-2}}
OURS, OURS_COMPILED = "ours, eager", "ours, compiled"
OURS_BF16_RESIDUAL = "ours, bf16 residual stream, compiled"  # an option of training, off by default
TRANSFORMERS = "transformers GPT2LMHeadModel, eager Accelerate loop"
BY_HAND, BY_HAND_COMPILED = "hand-written SDPA GPT-2, eager", "hand-written SDPA GPT-2, compiled"
# They are built in this order: where the minutes are over early, the last ones are missing.
CANDIDATES = (OURS_COMPILED, BY_HAND_COMPILED, OURS_BF16_RESIDUAL, TRANSFORMERS, BY_HAND, OURS)
# (ours, baseline) -> goals of the speed-up on a CPU and on a GPU; None: no goal. A compiled loop that does the same
# arithmetic is as fast as ours, so the goal against it is below 1.
GOALS = {
    (OURS, TRANSFORMERS): (1.0, None),
    (OURS_COMPILED, TRANSFORMERS): (1.2, 2.0),
    (OURS_COMPILED, BY_HAND): (None, 1.35),
    (OURS_COMPILED, BY_HAND_COMPILED): (None, 0.99),
    (OURS_BF16_RESIDUAL, BY_HAND_COMPILED): (None, 1.05),
}
GOAL_H200, MOONSHOT_H200 = 560_000, 600_000  # tokens/s of 124M at 64 x 1024 in bf16
ROOT = Path(__file__).resolve().parents[3]


@dataclass(kw_only=True)
class Options(harness.CommonOptions):
    size: harness.Size | None = None
    "Model; none: small on a CPU and 124M on a GPU."
    vocab_size: list[AtLeastOne] | None = None
    "Vocabularies to measure; none: 512 and 50257 on a CPU and 50257 on a GPU."
    seq_len: AtLeastOne | None = None
    "Tokens per sequence; none: 128 on a CPU and 1024 on a GPU."
    batch: AtLeastOne | None = None
    "Sequences per step; none: 8 on a CPU and 64 on a GPU."
    precision: Literal["fp32", "bf16"] | None = None
    "bf16 is autocast; none: fp32 on a CPU and bf16 on a GPU."
    compile: bool = True
    "Measure the compiled candidates as well."
    loop: bool = True
    "Measure train_accelerate.py as a process of its own as well."
    rounds: AtLeastOne = 15
    "Timed steps per candidate; the candidates take turns."
    whole: bool = False
    "Instead: whole runs of nanoGPT's shakespeare CPU recipe, by its train.py and by train_accelerate.py."
    nanogpt: Path | None = None
    "For --whole: your checkout of nanoGPT, with data/shakespeare_char prepared."

    def problems(self) -> list[str]:
        if not self.whole:
            return []
        if self.nanogpt is None or not (self.nanogpt / "train.py").is_file():
            return [f"--whole needs --nanogpt, a checkout of nanoGPT; nanogpt={self.nanogpt} holds no train.py"]
        data = self.nanogpt / "data" / "shakespeare_char"
        missing = [name for name in ("train.bin", "val.bin", "meta.pkl") if not (data / name).is_file()]
        return [f"{data} has no {name}; make it there: python data/shakespeare_char/prepare.py" for name in missing[:1]]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench train", description=__doc__)
    variant = "-whole" if options.whole else "" if options.size is None else f"-{options.size.lower()}"
    record = Record(f"train{variant}", argv, options)
    if options.whole:
        from gpt2repro.commands.bench import whole

        whole.measure(record, options.nanogpt)
        return record.finish()
    on_gpu = torch.cuda.is_available()
    size = options.size or ("124M" if on_gpu else "small")
    seq_len, batch = options.seq_len or (1024 if on_gpu else 128), options.batch or (64 if on_gpu else 8)
    precision = options.precision or ("bf16" if on_gpu else "fp32")
    names = [name for name in CANDIDATES if options.compile or not name.endswith("compiled")]
    names = [name for name in names if precision == "bf16" or name != OURS_BF16_RESIDUAL]
    config = {"size": size, "seq_len": seq_len, "batch": batch, "precision": precision, "bounds": BOUNDS[precision]}
    cases: dict[str, dict] = {}
    record.results |= {"config": config, "cases": cases}
    for vocab_size in options.vocab_size or ([50257] if on_gpu else [512, 50257]):
        shape = {**SIZES[size], "vocab_size": vocab_size, "n_positions": max(seq_len, 1024)}
        what = f"training step, {size}, vocabulary {vocab_size:,}, {batch} x {seq_len}, {precision}"
        print(f"== {what}", flush=True)
        case = cases[f"vocabulary {vocab_size}"] = {}
        times = measure(record, case, names, shape, batch=batch, seq_len=seq_len, precision=precision)
        for (ours, baseline), goals in GOALS.items():
            goal = goals[on_gpu]
            record.headline(f"{what}: {ours}", times, ours=ours, baseline=baseline, unit="tokens/s", goal=goal)
        best = OURS_COMPILED if OURS_COMPILED in times else OURS
        if on_gpu and best in times:
            is_goal = (size, batch, seq_len) == ("124M", 64, 1024) and "H200" in torch.cuda.get_device_name()
            for goal, kind in ((GOAL_H200, ""), (MOONSHOT_H200, ", moonshot")) if is_goal else ((None, ""),):
                record.figure(f"{what}: {best}{kind}", times[best]["per_second"], unit="tokens/s", goal=goal)
        if best in case.get("mfu", {}):
            record.figure(f"{what}: MFU of {best}", 100 * case["mfu"][best], unit="%")
        if options.loop and record.time_for("train_accelerate.py beside the bare step"):
            how = (OURS_COMPILED if options.compile else OURS, shape, batch, seq_len, precision)
            if loop := record.attempt("train_accelerate.py", lambda how=how: measure_loop(record, *how)):
                case["loop"], percent = loop, 100 * loop["of_bare_step"]["median"]
                name, goal = f"{what}: train_accelerate.py, of the bare step's tokens/s", 98.0 if on_gpu else None
                record.figure(name, percent, unit="%", goal=goal)
    if options.loop and record.time_for("the way to the first step"):
        startup = record.results["startup"] = measure_startup(rounds=1 if options.minutes else 3)
        name, seconds = "start of train_accelerate.py to its first step, beyond the imports", "beyond_imports_seconds"
        record.figure(name, startup[seconds], unit="s", goal=3.0, at_most=True)
    return record.finish()


def measure(
    record: Record, case: dict, names: list[str], shape: dict, *, batch: int, seq_len: int, precision: str
) -> dict[str, dict]:
    """Check, then time, all candidates with one shape of model; fills `case` and returns the times."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a GPU the hand-written model pads its stored vocabulary to a multiple of 64, as build-nanogpt does.
    padded = {**shape, "vocab_size": shape["vocab_size"] + (-shape["vocab_size"] % 64 if device.type == "cuda" else 0)}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, shape["vocab_size"], (batch, seq_len + 1), generator=generator).to(device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) ids and already shifted targets

    torch.set_float32_matmul_precision("highest")
    checks, steps = {}, {}
    references = {sizes["vocab_size"]: reference(sizes, x, y, device) for sizes in (padded, shape)}

    def ready(name: str, sizes: dict) -> Callable:
        """A candidate's checked step; where the batch does not fit into the memory, in as few micro-batches as fit."""
        start = time.perf_counter()
        loss_of, step, model = candidate(name, sizes, device, precision)
        # The first candidate is ours or transformers', without the padded vocabulary.
        case.setdefault("parameters", sum(p.numel() for p in model.parameters()))
        for passes in (count for count in range(1, batch + 1) if batch % count == 0):
            try:
                rows = [tokens.chunk(passes)[0] for tokens in (x, y)]
                found = guard(name, loss_of, model, references[sizes["vocab_size"]], *rows, BOUNDS[precision])
                step(x, y, passes)
                # Building, compiling and the first step.
                checks[name] = {**found, "passes": passes, "seconds_to_ready": time.perf_counter() - start}
                print(f"  {name}: {checks[name]}", flush=True)
                return lambda: step(x, y, passes)
            except torch.OutOfMemoryError:
                model.zero_grad()
            harness.free_memory()  # outside the handler, which holds the failed pass' tensors
        raise torch.OutOfMemoryError("not even one sequence at a time fits")

    for name in names:
        if record.time_for(name):
            sizes = padded if name.startswith("hand-written") else shape
            if step := record.attempt(name, lambda name=name, sizes=sizes: ready(name, sizes)):
                steps[name] = step
    references.clear()

    torch.set_float32_matmul_precision("high")  # what all of the loops use: TF32 for what autocast leaves in fp32
    times = record.compare(steps, warmup=3, units=batch * seq_len)
    case |= {
        "checks": checks,
        "times": times,
        "step_memory_gib": {name: harness.peak_memory_gib(steps[name]) for name in times},  # gradients and activations
    }
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if peak is not None and times:
        without_positions = case["parameters"] - shape["n_positions"] * shape["n_embd"]
        flops = flops_per_token(without_positions, shape["n_layer"], shape["n_embd"], seq_len)
        case["mfu"] = {name: took["per_second"] * flops / peak for name, took in times.items()}
    for name, took in times.items():
        print(f"  {name}: {took['per_second']:,.0f} tokens/s, {case['step_memory_gib'][name]:.2f} GiB", flush=True)
    record.save()
    return times


def candidate(name: str, shape: dict, device: torch.device, precision: str) -> tuple:
    """A candidate: its loss as a function of (x, y), its step as a function of (x, y, passes), and its model."""
    if name in (BY_HAND, BY_HAND_COMPILED):
        model = baselines.hand_written_gpt2(shape).to(device)
        optimizer = build_optimizer(model, name="adamw", **RECIPE)
        forward = torch.compile(model, dynamic=False) if name == BY_HAND_COMPILED else model
        backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_

        def loss_of(x, y):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return forward(x, y)[1]
    else:
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
        model = baselines.transformers_gpt2(shape) if name == TRANSFORMERS else baselines.our_gpt2(shape)
        optimizer = build_optimizer(model, name="adamw", **RECIPE)
        if name != TRANSFORMERS:  # as the training script does it: on a GPU the head is padded, compiled or not
            compile_model(model, "model" if name.endswith("compiled") else "off", device.type, world=1)
        prepared, optimizer = accelerator.prepare(model.train(), optimizer)
        backward, clip = accelerator.backward, accelerator.clip_grad_norm_
        ours = {"output_logits": False} | ({"residual_dtype": torch.bfloat16} if name == OURS_BF16_RESIDUAL else {})

        def loss_of(x, y):
            # transformers' loss takes already shifted targets too, beside labels that only ask for a loss.
            arguments = {"labels": x} if name == TRANSFORMERS else ours
            return prepared(input_ids=x, shift_labels=y, use_cache=False, **arguments).loss

    def step(x, y, passes=1):
        for rows, targets in zip(x.chunk(passes), y.chunk(passes), strict=True):
            backward(loss_of(rows, targets) / passes)
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return loss_of, step, model


def reference(shape: dict, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> tuple[float, dict]:
    """Loss and gradients of transformers' model in fp32 with attention written out, on the guard's few sequences."""
    model = baselines.transformers_gpt2(shape, attention="eager").to(device)
    logits = model(input_ids=few(x), use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), few(y).flatten())
    loss.backward()
    return loss.item(), {key: p.grad.cpu() for key, p in model.named_parameters()}


def few(tokens: torch.Tensor) -> torch.Tensor:
    """The guard's sequences: two, or one where the batch has an odd number of them."""
    return tokens[: 1 + (tokens.shape[0] % 2 == 0)]


def guard(name: str, loss_of: Callable, model, expected: tuple[float, dict], x, y, bounds: dict) -> dict:
    """Loss and gradients of a candidate beside the reference's. Raises: NotEqual beyond the bounds."""
    # A compiled candidate takes its own batch size only, so it sees the guard's sequences repeated: the same mean loss.
    loss = loss_of(*(few(t).repeat(x.shape[0] // few(t).shape[0], 1) for t in (x, y)))
    loss.backward()
    reference_loss, reference_gradients = expected
    gradients = {key: p.grad.cpu() for key, p in model.named_parameters()}
    if isinstance(model, baselines.HandWrittenGPT2):
        gradients = {key: g.T if ".h." in key and g.dim() == 2 else g for key, g in gradients.items()}
    model.zero_grad()
    # The tied matrix has one name among the parameters, the same in the hand-written model as in GPT-2.
    differences = torch.stack([(gradients[key] - g).norm() for key, g in reference_gradients.items()])
    total = differences.norm() / torch.stack([g.norm() for g in reference_gradients.values()]).norm()
    found = {"loss_difference": abs(loss.item() - reference_loss), "gradient_difference": total.item()}
    if not (found["loss_difference"] <= bounds["loss"] and found["gradient_difference"] <= bounds["gradients"]):
        raise NotEqual(f"{name} differs from the fp32 reference: {found}, allowed are {bounds}; nothing was timed")
    return found


def measure_loop(record: Record, name: str, shape: dict, batch: int, seq_len: int, precision: str) -> dict:
    """Tokens per second of train_accelerate.py as its users start it, on shards of random tokens, from its own log.

    Each run is compared with the bare step's mean just before and just after it, since a machine's speed drifts.
    """
    torch.compiler.reset()  # forget the compiled candidates, so that their memory can go back
    harness.free_memory()
    on_gpu = torch.cuda.is_available()
    rounds, steps, log_steps = (1, 60, 10) if on_gpu else (3, 24, 4)
    how = {"precision": precision, "compile": "model" if name == OURS_COMPILED else "off", "log_steps": log_steps}
    device = torch.device("cuda" if on_gpu else "cpu")
    _, step, _ = candidate(name, shape, device, precision)
    x, y = torch.randint(0, shape["vocab_size"], (2, batch, seq_len), device=device)

    def bare_rate(count: int) -> float:
        seconds = harness.timed(lambda: [step(x, y) for _ in range(count)])
        harness.free_memory()
        return count * x.numel() / seconds

    bare_rate(3)  # compiles and warms up
    bare, loop = [bare_rate(steps // 2)], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = training_command(Path(folder), shape, batch=batch, seq_len=seq_len, steps=steps, **how)
            subprocess.run(command, cwd=ROOT, check=True, timeout=record.seconds_left(), capture_output=True)
            rates = [logged["tokens_per_second"] for logged in read_metrics(Path(folder) / "run")[0]]
        loop.append(statistics.median(rates[len(rates) // 2 :]))  # the first half compiles and warms up
        bare.append(bare_rate(steps // 2))
    ratios = [2 * rate / (before + after) for rate, before, after in zip(loop, bare, bare[1:], strict=False)]
    print(f"  train_accelerate.py: {statistics.median(loop):,.0f} tokens/s", flush=True)
    rates = {"tokens_per_second": loop, "bare_tokens_per_second": bare, "of_bare_step": harness.spread(ratios)}
    return {"compared_with": name, **rates}


def measure_startup(rounds: int) -> dict:
    """Seconds from starting train_accelerate.py to its first optimizer step, and of a process that only imports."""
    code = "import numpy, yaml, pydantic, torch, accelerate; from transformers import PreTrainedModel, GenerationMixin"
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512, "n_positions": 64}
    only_imports, first_steps = [], []
    for _ in range(rounds + 1):  # the first turn fills the file cache and does not count
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        only_imports.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            command = training_command(Path(folder), shape, batch=8, seq_len=64, steps=1, compile="off")
            first_steps.append(seconds_to_first_step(command, Path(folder) / "run"))
    beyond = [step - imported for step, imported in zip(first_steps[1:], only_imports[1:], strict=True)]
    seconds = {"imports_seconds": only_imports[1:], "first_step_seconds": first_steps[1:]}
    return {**seconds, "beyond_imports_seconds": statistics.median(beyond)}


def seconds_to_first_step(command: list[str], run_dir: Path) -> float:
    """Seconds from the start of a training program to the first step in its log; waits for the program's end."""
    metrics = run_dir / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text(encoding="utf-8")):
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"train_accelerate.py ended with exit code {process.returncode}: {errors[-2000:]}")
    return seconds


def training_command(directory: Path, shape: dict, *, batch: int, seq_len: int, steps: int, **options) -> list[str]:
    """A command line of train_accelerate.py for `steps` steps on random tokens, which are written into `directory`."""
    rng = np.random.default_rng(0)
    counts = {"train": (steps + 2) * batch * seq_len + 1, "val": 2 * batch * seq_len + 1}
    tokens = {name: rng.integers(0, shape["vocab_size"], n, dtype=np.uint16) for name, n in counts.items()}
    write_dataset(directory / "data", tokens, shape["vocab_size"])
    options |= {"data": directory / "data", "run_dir": directory / "run", "max_steps": steps, "warmup_steps": 1}
    options |= {"batch_tokens": batch * seq_len, "micro_batch_size": batch, "seq_len": seq_len}
    options |= {"val_tokens": batch * seq_len, "sample_tokens": 0, **shape}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "train_accelerate.py", *flags, "--trackers"]


def write_dataset(directory: Path, tokens: dict[str, np.ndarray], vocab_size: int) -> None:
    """Tokens of each split as a data set of ours, whose tokenizer has one character for every id."""
    char_tokenizer("".join(chr(0x10000 + id) for id in range(vocab_size - 1))).save_pretrained(directory / TOKENIZER)
    splits = {}
    for name, ids in tokens.items():
        shard = write_shard(directory / f"{name}.bin", ids, vocab_size)
        splits[name] = {"tokens": len(ids), "documents": 1, "bytes": None, "shards": [shard]}
    tokenizer = {"vocab_size": vocab_size, "eot_id": vocab_size - 1}
    manifest = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "tokenizer": tokenizer, "splits": splits}
    write_json(directory / MANIFEST, manifest)
