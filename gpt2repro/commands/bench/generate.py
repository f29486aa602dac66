"""Writing text: our decode engine against transformers' `generate` with its dynamic and its static cache.

    gpt2repro bench generate                          # small and 124M on a CPU; 124M, batch 1 and 64, bf16 on a GPU
    gpt2repro bench generate --size 1558M --batch 1

All candidates have the same weights, prompts, precision and sampling (temperature 1, top-k 50) and write the same
number of tokens. Reading the prompt is part of the time; loading, packing and compiling are not. Before any timing,
our greedy text in fp32 must equal transformers', token by token, also for prompts that are padded on the left.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpt2repro.commands.bench import baselines, harness
from gpt2repro.commands.bench.harness import SIZES, CommonOptions, NotEqual, Record
from gpt2repro.generation.decoder import decoder_for
from gpt2repro.generation.sampling import Sampling
from gpt2repro.options import AtLeastOne, parse_options

OURS, OURS_COMPILED = "ours", "ours, compiled"
DYNAMIC, STATIC = "transformers generate, dynamic cache", "transformers generate, static cache"
SAMPLING = {"temperature": 1.0, "top_k": 50}
GOALS_H200 = {1: 4_000, 64: 60_000}  # batch -> tokens/s of 124M; the memory's bandwidth allows 16k and 189k


@dataclass(kw_only=True)
class Options(CommonOptions):
    size: list[harness.Size] | None = None
    "Models; none: small and 124M on a CPU, 124M on a GPU."
    batch: list[AtLeastOne] | None = None
    "Sequences at a time; none: 1 and 8 on a CPU, 1 and 64 on a GPU."
    prompt_tokens: AtLeastOne = 32
    "Length of every prompt."
    new_tokens: AtLeastOne | None = None
    "Tokens written per sequence; none: 64 on a CPU, 256 on a GPU."
    static: bool = True
    "Measure transformers' static cache too (on a GPU it compiles for minutes, so --minutes leaves it out there)."

    def problems(self) -> list[str]:
        longest = self.prompt_tokens + (self.new_tokens or 256)
        return [f"prompt_tokens and new_tokens together, {longest}, exceed 1024 positions"] if longest > 1024 else []


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench generate", description=__doc__)
    record = Record("generate", argv, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    new_tokens = options.new_tokens or (256 if on_gpu else 64)
    sizes = options.size or (["124M"] if on_gpu else ["small", "124M"])
    record.save(measured=[])
    for size, batch in itertools.product(sizes, options.batch or ([1, 64] if on_gpu else [1, 8])):
        kind = f"generation, {size}, batch {batch}"
        if not record.time_for(kind):
            continue
        print(f"{kind}: {options.prompt_tokens} + {new_tokens} tokens", flush=True)
        # Both have the same random weights, in fp32.
        reference = baselines.transformers_gpt2(SIZES[size]).to(device).eval()
        ours = baselines.our_gpt2(SIZES[size]).to(device).eval()
        check_greedy(reference, ours)
        if on_gpu:
            reference, ours = reference.bfloat16(), ours.bfloat16()
        prompts = torch.randint(reference.config.vocab_size, (batch, options.prompt_tokens), device=device)
        calls = candidates(reference, ours, prompts, new_tokens)
        if not options.static or (on_gpu and options.minutes):
            del calls[STATIC]
        times = record.compare(calls, units=batch * new_tokens)
        best = OURS_COMPILED if on_gpu else OURS
        for name in (DYNAMIC, STATIC):
            goal = None if on_gpu else 1.0
            record.headline(kind, times, ours=best, baseline=name, unit="tokens/s", goal=goal)
        if on_gpu and size == "124M" and batch in GOALS_H200 and best in times:
            record.figure(kind, times[best]["per_second"], unit="tokens/s", goal=GOALS_H200[batch])
        case = {"size": size, "batch": batch, "prompt_tokens": options.prompt_tokens, "new_tokens": new_tokens}
        case |= {"dtype": str(ours.dtype).removeprefix("torch."), "times": times}
        case["peak_memory_gib"] = {name: harness.peak_memory_gib(calls[name]) for name in times}
        record.results["measured"].append(case)
        del reference, ours, calls
        harness.free_memory()
    return record.finish()


def check_greedy(reference, ours) -> None:
    """Raises: NotEqual unless greedy fp32 text of left-padded prompts equals transformers'."""
    lengths, new_tokens = (3, 9, 16), 24
    prompts = [torch.randint(reference.config.vocab_size, (length,)).tolist() for length in lengths]
    ids = torch.tensor([[0] * (16 - len(prompt)) + prompt for prompt in prompts], device=reference.device)
    mask = torch.tensor([[0] * (16 - length) + [1] * length for length in lengths], device=reference.device)
    how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    expected = reference.generate(ids, **how)[:, 16:]
    decoder = decoder_for(ours, batch_size=3, length=16 + new_tokens)
    steps = decoder.tokens(prompts, max_new_tokens=new_tokens, sampling=Sampling(temperature=0), end_token=None)
    found = torch.stack([step.tokens for step in steps], dim=1)
    if not torch.equal(found, expected):
        share = (found != expected).float().mean().item()
        raise NotEqual(f"greedy text differs from transformers' in {100 * share:.1f} % of the tokens")


def candidates(reference, ours, prompts: torch.Tensor, new_tokens: int) -> dict[str, Callable]:
    """Name -> a call that continues all prompts and reads the tokens back."""
    batch, length = prompts.size(0), prompts.size(1) + new_tokens
    names, size = [OURS, OURS_COMPILED] if prompts.is_cuda else [OURS], {"batch_size": batch, "length": length}
    decoders = {name: decoder_for(ours, **size, compiled=name == OURS_COMPILED) for name in names}

    def decode(decoder):
        how = {"max_new_tokens": new_tokens, "sampling": Sampling(**SAMPLING), "end_token": None, "seed": 0}
        return torch.stack([step.tokens for step in decoder.tokens(prompts.tolist(), **how)], dim=1).cpu()

    def generate(cache: str):
        how = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": new_tokens, "pad_token_id": 0}
        return reference.generate(prompts, **how, do_sample=True, cache_implementation=cache, **SAMPLING).cpu()

    calls: dict[str, Callable] = {name: lambda decoder=decoder: decode(decoder) for name, decoder in decoders.items()}
    return {**calls, DYNAMIC: lambda: generate("dynamic"), STATIC: lambda: generate("static")}
