"""Writing text: our decode engine against transformers' `generate` with its dynamic and its static cache.

    gpt2repro bench generate                          # small and 124M on a CPU; 124M, batch 1 and 64, bf16 on a GPU
    gpt2repro bench generate --size 1558M --batch 1

All candidates have the same weights, prompts, precision and sampling (temperature 1, top-k 50) and write the same
number of tokens; prefill is part of the time, loading, packing and compiling are not (see `first_call_seconds`).
Before any timing, greedy text in fp32 must be transformers', token by token, with prompts padded on the left.
"""

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gpt2repro.commands.bench.harness import (
    RECORDS,
    NotEqual,
    compare,
    figure,
    headline,
    peak_memory_gib,
    write_record,
)
from gpt2repro.generation.decoder import decoder_for
from gpt2repro.generation.sampling import Sampling
from gpt2repro.options import parse_options

# layers, heads, width, vocabulary. Radford et al. 2019, table 2; `small` is for CPUs.
SIZES = {
    "small": (4, 4, 256, 512),
    "124M": (12, 12, 768, 50257),
    "350M": (24, 16, 1024, 50257),
    "774M": (36, 20, 1280, 50257),
    "1558M": (48, 25, 1600, 50257),
}
OURS, OURS_COMPILED = "ours", "ours, compiled"
DYNAMIC, STATIC = "transformers generate, dynamic cache", "transformers generate, static cache"
TOP_K = 50
GOALS_H200 = {1: 4_000, 64: 60_000}  # tokens/s at 124M; rooflines 16k and 189k


@dataclass
class Options:
    size: list[Literal["small", "124M", "350M", "774M", "1558M"]] | None = None
    "Models; none means small and 124M on a CPU, 124M on a GPU."
    batch: list[int] | None = None
    "Sequences at a time; none means 1 and 8 on a CPU, 1 and 64 on a GPU."
    prompt_tokens: int = 32
    "Length of every prompt."
    new_tokens: int | None = None
    "Tokens written per sequence; none means 64 on a CPU, 256 on a GPU."
    rounds: int = 7
    "Timed calls per candidate."
    static: bool = True
    "Measure transformers' static cache as well (on a GPU it compiles, which takes minutes)."
    out: Path = RECORDS
    "Directory of the JSON record."

    def problems(self) -> list[str]:
        numbers = [*(self.batch or [1]), self.prompt_tokens, self.new_tokens or 1, self.rounds]
        found = [] if min(numbers) >= 1 else ["batch, prompt_tokens, new_tokens and rounds must be at least 1"]
        if self.prompt_tokens + (self.new_tokens or 256) > 1024:
            found.append(f"prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} exceed 1024 positions")
        return found


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench generate", description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    new_tokens = options.new_tokens or (256 if on_gpu else 64)
    sizes = options.size or (["124M"] if on_gpu else ["small", "124M"])
    batches = options.batch or ([1, 64] if on_gpu else [1, 8])
    headlines, measured = [], []
    for size, batch in itertools.product(sizes, batches):
        print(f"{size}, batch {batch}: {options.prompt_tokens} + {new_tokens} tokens", flush=True)
        reference, ours = build_pair(size, device)
        check_greedy(reference, ours)
        if on_gpu:
            reference, ours = reference.bfloat16(), ours.bfloat16()
        prompts = torch.randint(reference.config.vocab_size, (batch, options.prompt_tokens), device=device)
        calls = candidates(reference, ours, prompts, new_tokens, static=options.static)
        first = {name: seconds_of(call) for name, call in calls.items()}
        times = compare(calls, rounds=options.rounds, warmup=1, units=batch * new_tokens)
        best = OURS_COMPILED if OURS_COMPILED in calls else OURS
        kind = f"generation, {size}, batch {batch}"
        headlines += [
            headline(kind, times, ours=best, baseline=name, unit="tokens/s", goal=None if on_gpu else 1.0)
            for name in (DYNAMIC, STATIC)
            if name in calls
        ]
        if on_gpu and size == "124M" and batch in GOALS_H200:
            headlines.append(figure(kind, times[best]["per_second"], unit="tokens/s", goal=GOALS_H200[batch]))
        measured.append(
            {
                "size": size,
                "batch": batch,
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": new_tokens,
                "dtype": str(ours.dtype).removeprefix("torch."),
                "first_call_seconds": first,
                "peak_memory_gib": {name: peak_memory_gib(call) for name, call in calls.items()},
                "times": times,
            }
        )
        del reference, ours, calls
        gc.collect()
    write_record("generate", {"headlines": headlines, "measured": measured}, argv=argv, out=options.out)
    return 0


def build_pair(size: str, device: torch.device):
    """transformers' GPT-2 and ours with the same random weights, in fp32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

    n_layer, n_head, n_embd, vocab_size = SIZES[size]
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).to(device).eval()
    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=None, eos_token_id=None)).to(device).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases that matter, positions that change the text
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def check_greedy(reference, ours) -> None:
    """Raises NotEqual unless greedy fp32 text of left-padded prompts equals transformers'."""
    lengths, new_tokens = (3, 9, 16), 24
    prompts = [torch.randint(reference.config.vocab_size, (length,)).tolist() for length in lengths]
    ids = torch.tensor([[0] * (16 - len(prompt)) + prompt for prompt in prompts], device=reference.device)
    mask = torch.tensor([[0] * (16 - length) + [1] * length for length in lengths], device=reference.device)
    expected = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)[
        :, 16:
    ]
    decoder = decoder_for(ours, batch_size=3, length=16 + new_tokens)
    steps = decoder.tokens(prompts, max_new_tokens=new_tokens, sampling=Sampling(temperature=0), end_token=None)
    found = torch.stack([step.tokens for step in steps], dim=1)
    if not torch.equal(found, expected):
        share = (found != expected).float().mean().item()
        raise NotEqual(f"greedy text differs from transformers' in {100 * share:.1f} % of the tokens")


def candidates(reference, ours, prompts: torch.Tensor, new_tokens: int, *, static: bool) -> dict[str, Callable]:
    """Name -> a call that continues all prompts and reads the tokens back."""
    batch, length = prompts.size(0), prompts.size(1) + new_tokens
    rows = prompts.tolist()

    def decode_with(decoder):
        steps = decoder.tokens(
            rows, max_new_tokens=new_tokens, sampling=Sampling(1.0, top_k=TOP_K), end_token=None, seed=0
        )
        return torch.stack([step.tokens for step in steps], dim=1).cpu()

    def generate_with(cache: str):
        torch.manual_seed(0)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": TOP_K, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        return reference.generate(
            prompts, attention_mask=mask, max_new_tokens=new_tokens, cache_implementation=cache, **sampling
        ).cpu()

    calls: dict[str, Callable] = {}
    variants = {OURS: False, OURS_COMPILED: True} if prompts.is_cuda else {OURS: False}
    for name, compiled in variants.items():
        decoder = decoder_for(ours, batch_size=batch, length=length, compiled=compiled)
        calls[name] = lambda decoder=decoder: decode_with(decoder)
    calls[DYNAMIC] = lambda: generate_with("dynamic")
    if static:
        calls[STATIC] = lambda: generate_with("static")
    return calls


def seconds_of(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
