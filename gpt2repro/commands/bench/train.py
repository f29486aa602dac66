"""The training step, ours against others in one process: forward, backward, clipping and AdamW on random tokens.

    gpt2repro bench train                                   # a small model on a CPU; 124M, 64 x 1024, bf16 on a GPU
    gpt2repro bench train --size 350M --batch 32 --no-loop

Compared are ours, eager and compiled; transformers' `GPT2LMHeadModel` in an eager Accelerate loop; and a GPT-2 written
by hand as build-nanogpt's is, eager and compiled, in its loop. All have the same weights, tokens, precision, fused
AdamW and SDPA attention, and no dropout. Before any timing, every candidate's loss and gradients are held against
transformers' eager fp32 model. Then `train_accelerate.py` itself runs as a process of its own: its tokens per second
stand beside the bare step's, its way to the first step beside the time that its imports take.
"""

import gc
import json
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

from gpt2repro.commands.bench.handwritten import HandWrittenGPT2
from gpt2repro.commands.bench.harness import (
    GIB,
    RECORDS,
    NotEqual,
    compare,
    figure,
    headline,
    peak_memory_gib,
    speedup,
    synchronize,
    write_record,
)
from gpt2repro.options import parse_options
from gpt2repro.training.meter import flops_per_token, peak_flops
from gpt2repro.training.optim import build_optimizer

# layers, heads, width. Radford et al. 2019, table 2; `small` is for CPUs.
SIZES = {
    "small": (4, 4, 256),
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
RECIPE = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
# Largest accepted distance from the fp32 reference: of the loss in nats, of all gradients as |g - g_ref| / |g_ref|.
# fp32 differs by the order of summation (5e-7 measured); bf16 keeps 8 bits, 0.4 % per rounding.
BOUNDS = {"fp32": {"loss": 1e-4, "gradients": 1e-3}, "bf16": {"loss": 2e-2, "gradients": 5e-2}}
GOAL_H200 = 560_000  # tokens/s of 124M at 64 x 1024 in bf16
OURS, OURS_COMPILED = "ours, eager", "ours, compiled"
TRANSFORMERS = "transformers GPT2LMHeadModel, eager Accelerate loop"
BY_HAND, BY_HAND_COMPILED = "hand-written SDPA GPT-2, eager", "hand-written SDPA GPT-2, compiled"
OURS_BF16_RESIDUAL = "ours, bf16 residual stream, compiled"  # an option of training, off by default
CANDIDATES = (OURS, OURS_COMPILED, OURS_BF16_RESIDUAL, TRANSFORMERS, BY_HAND, BY_HAND_COMPILED)
ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Options:
    size: Literal["small", "124M", "350M", "774M", "1558M"] | None = None
    "Model; none means small on a CPU and 124M on a GPU."
    vocab_size: list[int] | None = None
    "Vocabularies to measure; none means 512 and 50257 on a CPU and 50257 on a GPU."
    seq_len: int | None = None
    "Tokens per sequence; none means 128 on a CPU and 1024 on a GPU."
    batch: int | None = None
    "Sequences per step; none means 8 on a CPU and 64 on a GPU."
    precision: Literal["fp32", "bf16"] | None = None
    "bf16 is autocast; none means fp32 on a CPU and bf16 on a GPU."
    compile: bool = True
    "Measure the compiled candidates as well."
    loop: bool = True
    "Measure train_accelerate.py as a process of its own as well."
    rounds: int = 15
    "Timed steps per candidate."
    warmup: int = 3
    "Untimed steps per candidate before them."
    out: Path = RECORDS
    "Directory of the JSON record."

    def problems(self) -> list[str]:
        names = ("seq_len", "batch", "rounds")
        problems = [f"{name}={getattr(self, name)} must be at least 1" for name in names if getattr(self, name) == 0]
        if self.precision == "bf16" and not torch.cuda.is_available() and self.rounds > 50:
            problems.append("bf16 autocast is about ten times slower than fp32 on most CPUs; lower rounds")
        return problems


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench train", description=__doc__)
    on_gpu = torch.cuda.is_available()
    size = options.size or ("124M" if on_gpu else "small")
    seq_len = options.seq_len or (1024 if on_gpu else 128)
    batch = options.batch or (64 if on_gpu else 8)
    precision = options.precision or ("bf16" if on_gpu else "fp32")
    vocabularies = options.vocab_size or ([50257] if on_gpu else [512, 50257])
    results = {
        "config": {
            "size": size,
            "seq_len": seq_len,
            "batch": batch,
            "precision": precision,
            "bounds": BOUNDS[precision],
        },
        "cases": {},
        "headlines": [],
    }
    for vocab_size in vocabularies:
        shape = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[size], strict=True))
        shape |= {"vocab_size": vocab_size, "n_positions": max(seq_len, 1024)}
        what = f"training step, {size}, vocabulary {vocab_size:,}, {batch} x {seq_len}, {precision}"
        print(f"== {what}", flush=True)
        case = measure(shape, batch=batch, seq_len=seq_len, precision=precision, options=options)
        if options.loop:
            case["loop"] = measure_loop(
                shape, batch=batch, seq_len=seq_len, precision=precision, compile=options.compile
            )
        results["cases"][f"vocabulary {vocab_size}"] = case
        results["headlines"] += headlines(what, case, on_gpu)
        if OURS_COMPILED in case["times"] and on_gpu:
            is_goal = (size, batch, seq_len) == ("124M", 64, 1024) and "H200" in torch.cuda.get_device_name()
            rate = case["times"][OURS_COMPILED]["per_second"]
            row = figure(f"{what}: {OURS_COMPILED}", rate, unit="tokens/s", goal=GOAL_H200 if is_goal else None)
            results["headlines"].append(row)
    if options.loop:
        results["startup"] = measure_startup()
        beyond = results["startup"]["beyond_imports_seconds"]
        results["headlines"].append(
            figure(
                "start of train_accelerate.py to its first step, beyond the imports",
                beyond,
                unit="s",
                goal=3.0,
                at_most=True,
            )
        )
    write_record("train" if options.size is None else f"train-{size.lower()}", results, argv=argv, out=options.out)
    return 0


def headlines(what: str, case: dict, on_gpu: bool) -> list[dict]:
    """The rows for the README: eager against eager, compiled against compiled, and the loop against the bare step."""
    times = case["times"]
    # The goals are those of the project: 1x and 1.2x for a CPU; 2x, 1.35x, 1.12x and 560k tokens/s for an H200.
    pairs = [(OURS, TRANSFORMERS, None if on_gpu else 1.0)]
    if OURS_COMPILED in times:
        pairs += [
            (OURS_COMPILED, TRANSFORMERS, 2.0 if on_gpu else 1.2),
            (OURS_COMPILED, BY_HAND, 1.35 if on_gpu else None),
            (OURS_COMPILED, BY_HAND_COMPILED, 1.12 if on_gpu else None),
        ]
    rows = [
        headline(f"{what}: {ours}", times, ours=ours, baseline=baseline, unit="tokens/s", goal=goal)
        for ours, baseline, goal in pairs
    ]
    if case.get("mfu"):
        best = OURS_COMPILED if OURS_COMPILED in times else OURS
        rows.append(figure(f"{what}: MFU of {best}", 100 * case["mfu"][best], unit="%"))
    if "loop" in case:
        percent = 100 * case["loop"]["of_bare_step"]["median"]
        rows.append(
            figure(
                f"{what}: train_accelerate.py, of the bare step's tokens/s",
                percent,
                unit="%",
                goal=98.0 if on_gpu else None,
            )
        )
    return rows


def measure(shape: dict, *, batch: int, seq_len: int, precision: str, options: Options) -> dict:
    """Guard, then time, one shape of model with all candidates. Raises: NotEqual."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On a GPU the hand-written model pads its stored vocabulary to a multiple of 64, as build-nanogpt does.
    padded = {**shape, "vocab_size": shape["vocab_size"] + (-shape["vocab_size"] % 64 if device.type == "cuda" else 0)}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, shape["vocab_size"], (batch, seq_len + 1), generator=generator).to(device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) ids and already shifted targets

    torch.set_float32_matmul_precision("highest")
    names = [name for name in CANDIDATES if options.compile or not name.endswith("compiled")]
    names = [name for name in names if precision == "bf16" or name != OURS_BF16_RESIDUAL]
    checks, steps, states, parameters = {}, {}, {}, {}
    references = {
        vocab: reference({**shape, "vocab_size": vocab}, x, y, device)
        for vocab in {shape["vocab_size"], padded["vocab_size"]}
    }
    for name in names:
        sizes = padded if name.startswith("hand-written") else shape
        start = time.perf_counter()
        loss_of, step, model = candidate(name, sizes, device, precision)
        passes = 1
        while True:  # a candidate whose batch does not fit takes it in as few micro-batches as do
            try:
                rows = [tokens.chunk(passes)[0] for tokens in (x, y)]
                found = guard(name, loss_of, model, references[sizes["vocab_size"]], *rows, BOUNDS[precision])
                step(x, y, passes)
                break
            except torch.OutOfMemoryError:
                if passes == batch:
                    raise
                passes = next(count for count in range(passes + 1, batch + 1) if batch % count == 0)
                model.zero_grad()
            gc.collect()  # outside the handler, which holds the failed pass' tensors
            torch.cuda.empty_cache()
        steps[name] = lambda step=step, passes=passes: step(x, y, passes)
        ready = time.perf_counter() - start  # building, compiling, first step
        checks[name] = {**found, "passes": passes, "seconds_to_ready": ready}
        parameters[name] = sum(p.numel() for p in model.parameters())
        states[name] = parameters[name] * 12 / GIB  # fp32 weights and AdamW's two moments
        print(f"  {name}: {checks[name]}", flush=True)
    del references
    gc.collect()

    torch.set_float32_matmul_precision("high")  # what all of the loops use: TF32 for what autocast leaves in fp32
    times = compare(steps, rounds=options.rounds, warmup=options.warmup, units=batch * seq_len)
    result = {
        "checks": checks,
        "times": times,
        "step_memory_gib": {name: peak_memory_gib(step) for name, step in steps.items()},  # gradients and activations
        "state_memory_gib": states,
        "parameters": parameters[OURS],
    }
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if peak is not None:
        without_positions = parameters[OURS] - shape["n_positions"] * shape["n_embd"]
        flops = flops_per_token(without_positions, shape["n_layer"], shape["n_embd"], seq_len)
        result["mfu"] = {name: times[name]["per_second"] * flops / peak for name in names}
    for name in names:
        ratio = speedup(times, ours=name, baseline=TRANSFORMERS)["median"]
        memory = result["step_memory_gib"][name]
        print(
            f"  {name}: {times[name]['per_second']:,.0f} tokens/s, {ratio:.2f}x transformers, {memory:.2f} GiB",
            flush=True,
        )
    return result


def candidate(
    name: str, shape: dict, device: torch.device, precision: str
) -> tuple[Callable, Callable, torch.nn.Module]:
    """A candidate with the weights of `weights()`: its loss of (x, y), its step on (x, y) in some passes, its model."""
    if name in (BY_HAND, BY_HAND_COMPILED):
        model = HandWrittenGPT2(**shape)
        model.load_state_dict(as_linear(weights(shape)))
        model.to(device)
        optimizer = fused_adamw(model)
        forward = torch.compile(model, dynamic=False) if name == BY_HAND_COMPILED else model

        def loss_of(x, y):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                _, loss = forward(x, y)
            return loss

        def step(x, y, passes=1):
            optimizer.zero_grad()
            for rows, targets in zip(x.chunk(passes), y.chunk(passes), strict=True):
                (loss_of(rows, targets) / passes).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return loss_of, step, model

    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    if name == TRANSFORMERS:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel(transformers_config(shape, attention="sdpa"))
        model.load_state_dict(weights(shape), strict=False)  # the tied head is not stored twice
        optimizer = fused_adamw(model)
    else:
        from configuration_gpt2repro import GPT2ReproConfig
        from modeling_gpt2repro import GPT2ReproForCausalLM

        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=None, eos_token_id=None))
        model.load_state_dict(weights(shape), strict=False)
        optimizer = build_optimizer(model, name="adamw", **RECIPE)
        if name.endswith("compiled"):
            model.compile(fullgraph=True, dynamic=False)
    model.train()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    # transformers' loss takes already shifted targets too, beside labels that only ask for a loss.
    ours = {"output_logits": False} | ({"residual_dtype": torch.bfloat16} if name == OURS_BF16_RESIDUAL else {})

    def loss_of(x, y):
        arguments = {"labels": x} if name == TRANSFORMERS else ours
        return prepared(input_ids=x, shift_labels=y, use_cache=False, **arguments).loss

    def step(x, y, passes=1):
        for rows, targets in zip(x.chunk(passes), y.chunk(passes), strict=True):
            accelerator.backward(loss_of(rows, targets) / passes)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return loss_of, step, model


def transformers_config(shape: dict, attention: str):
    from transformers import GPT2Config

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**shape, **no_dropout, attn_implementation=attention, bos_token_id=None, eos_token_id=None)


def fused_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW as both baselines' users have it: decay on matrices, fused kernels."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": RECIPE["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RECIPE["lr"], betas=RECIPE["betas"], eps=RECIPE["eps"], fused=True)


def weights(shape: dict) -> dict[str, torch.Tensor]:
    """Random weights under GPT-2's names; biases and layer norms random too, so that a dropped one shows."""
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        names = {key: p.shape for key, p in GPT2LMHeadModel(transformers_config(shape, "sdpa")).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {key: 0.02 * torch.randn(size, generator=generator) for key, size in names.items()}
    return {key: tensor + 1 if ".ln_" in key and key.endswith("weight") else tensor for key, tensor in tensors.items()}


def as_linear(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Conv1D's (in, out) matrices of the blocks as nn.Linear's (out, in), and the tied head spelled out."""
    state = {key: t.T if ".h." in key and t.dim() == 2 else t for key, t in state.items()}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def reference(shape: dict, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> tuple[float, dict]:
    """Loss and gradients of transformers' model in fp32 with attention written out, on the guard's few sequences."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(transformers_config(shape, attention="eager"))
    model.load_state_dict(weights(shape), strict=False)
    model.to(device)
    logits = model(input_ids=few(x), use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), few(y).flatten())
    loss.backward()
    return loss.item(), {key: p.grad.cpu() for key, p in model.named_parameters()}


def few(tokens: torch.Tensor) -> torch.Tensor:
    """The guard's sequences: two, or one where the batch has an odd number of them."""
    return tokens[: 1 + (tokens.shape[0] % 2 == 0)]


def guard(
    name: str, loss_of: Callable, model: torch.nn.Module, expected: tuple[float, dict], x, y, bounds: dict
) -> dict:
    """Loss and gradients of a candidate beside the reference's. Raises: NotEqual beyond the bounds."""
    # A compiled candidate is compiled for its batch: it sees the guard's sequences repeated, with the same mean loss.
    loss = loss_of(*(few(t).repeat(x.shape[0] // few(t).shape[0], 1) for t in (x, y)))
    loss.backward()
    reference_loss, reference_gradients = expected
    gradients = {key: p.grad.cpu() for key, p in model.named_parameters()}
    if isinstance(model, HandWrittenGPT2):
        gradients = {key: g.T if ".h." in key and g.dim() == 2 else g for key, g in gradients.items()}
    model.zero_grad()
    # The hand-written model's first name of the tied matrix is the same as GPT-2's.
    differences = {key: (gradients[key] - g).norm() for key, g in reference_gradients.items()}
    total = (
        torch.stack(list(differences.values())).norm()
        / torch.stack([g.norm() for g in reference_gradients.values()]).norm()
    )
    found = {"loss_difference": abs(loss.item() - reference_loss), "gradient_difference": total.item()}
    if not (found["loss_difference"] <= bounds["loss"] and found["gradient_difference"] <= bounds["gradients"]):
        raise NotEqual(f"{name} differs from the fp32 reference: {found}, allowed are {bounds}; nothing was timed")
    return found


def measure_loop(shape: dict, *, batch: int, seq_len: int, precision: str, compile: bool) -> dict:
    """Tokens per second of train_accelerate.py as its users start it, on shards of random tokens, from its own log.

    Each run stands beside the bare step's mean just before and just after it: a machine's speed drifts.
    """
    gc.collect()
    torch.compiler.reset()  # forget the compiled candidates, so that their memory can go back
    torch.cuda.empty_cache()
    on_gpu = torch.cuda.is_available()
    rounds, steps, log_steps = (1, 60, 10) if on_gpu else (3, 24, 4)
    name = OURS_COMPILED if compile else OURS
    device = torch.device("cuda" if on_gpu else "cpu")
    _, step, _ = candidate(name, shape, device, precision)
    x, y = torch.randint(0, shape["vocab_size"], (2, batch, seq_len), device=device)

    def bare_rate(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step(x, y)
        synchronize()
        torch.cuda.empty_cache()
        return count * x.numel() / (time.perf_counter() - start)

    bare_rate(3)  # compiles and warms up
    bare, loop = [bare_rate(steps // 2)], []
    for _ in range(rounds):
        loop.append(loop_rate(shape, batch, seq_len, precision, "model" if compile else "off", steps, log_steps))
        bare.append(bare_rate(steps // 2))
    ratios = [2 * rate / (before + after) for rate, before, after in zip(loop, bare, bare[1:], strict=False)]
    print(f"  train_accelerate.py: {statistics.median(loop):,.0f} tokens/s", flush=True)
    return {
        "compared_with": name,
        "tokens_per_second": loop,
        "bare_tokens_per_second": bare,
        "of_bare_step": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def loop_rate(shape: dict, batch: int, seq_len: int, precision: str, compile: str, steps: int, log_steps: int) -> float:
    """Median tokens per second of one run of train_accelerate.py, its first half aside, which compiles and warms up."""
    with tempfile.TemporaryDirectory() as directory:
        command = training_command(Path(directory), shape, batch=batch, seq_len=seq_len, steps=steps)
        command += ["--precision", precision, "--compile", compile, "--log_steps", str(log_steps)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (Path(directory) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [record["tokens_per_second"] for record in map(json.loads, lines) if "tokens_per_second" in record]
    return statistics.median(rates[len(rates) // 2 :])


def measure_startup(rounds: int = 3) -> dict:
    """Seconds from starting train_accelerate.py to its first optimizer step, and of a process that only imports."""
    imports = (
        "import numpy, yaml, pydantic, torch, accelerate\nfrom transformers import PreTrainedModel, GenerationMixin"
    )
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512, "n_positions": 64}
    only_imports, first_steps = [], []
    for turn in range(rounds + 1):  # the first turn fills the file cache and does not count
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", imports], check=True, cwd=ROOT)
        imported = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as directory:
            command = [*training_command(Path(directory), shape, batch=8, seq_len=64, steps=1), "--compile", "off"]
            metrics = Path(directory) / "run" / "metrics.jsonl"
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text(encoding="utf-8")):
                time.sleep(0.01)
            first_step = time.perf_counter() - start
            _, errors = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"train_accelerate.py ended with exit code {process.returncode}: {errors[-2000:]}")
        if turn > 0:
            only_imports.append(imported)
            first_steps.append(first_step)
    beyond = [step - imported for step, imported in zip(first_steps, only_imports, strict=True)]
    return {
        "imports_seconds": only_imports,
        "first_step_seconds": first_steps,
        "beyond_imports_seconds": statistics.median(beyond),
    }


def training_command(directory: Path, shape: dict, *, batch: int, seq_len: int, steps: int) -> list[str]:
    """A command line of train_accelerate.py for `steps` steps on random tokens, which are written into `directory`."""
    from gpt2repro.data.shards import FORMAT, MANIFEST, TOKENIZER, VERSION, write_shard
    from gpt2repro.data.tokenization import char_tokenizer
    from gpt2repro.files import write_json

    data = directory / "data"
    char_tokenizer(["any"]).save_pretrained(data / TOKENIZER)  # never used, but a run has one
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", (steps + 2) * batch * seq_len + 1), ("val", 2 * batch * seq_len + 1)):
        tokens = rng.integers(0, shape["vocab_size"], count, dtype=np.uint16)
        shard = write_shard(data / f"{split}.bin", tokens, shape["vocab_size"])
        splits[split] = {"tokens": count, "documents": 1, "bytes": None, "shards": [shard]}
    tokenizer = {"vocab_size": shape["vocab_size"], "eot_id": 0}
    manifest = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "tokenizer": tokenizer, "splits": splits}
    write_json(data / MANIFEST, manifest)
    options = {
        **shape,
        "data": data,
        "run_dir": directory / "run",
        "max_steps": steps,
        "batch_tokens": batch * seq_len,
        "micro_batch_size": batch,
        "seq_len": seq_len,
        "val_tokens": batch * seq_len,
        "sample_tokens": 0,
        "warmup_steps": 1,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "train_accelerate.py", *flags, "--trackers"]
