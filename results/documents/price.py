"""What `--documents mask` costs on a CPU: forward and backward passes with and without it, in turns, one thread.

gpt2repro prepare-text --corpus python-docs --out data/python-docs
OMP_NUM_THREADS=1 python results/documents/price.py data/python-docs

CPU time of the process, not wall time: other programs may share the machine. The record lies beside this file.
"""

import sys
import time
from pathlib import Path

import torch

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.commands.bench.harness import hardware, peak_memory_gib, spread
from gpt2repro.data.documents import document_positions
from gpt2repro.data.sources import open_source
from gpt2repro.files import write_json
from gpt2repro.training.reference import commit
from modeling_gpt2repro import GPT2ReproForCausalLM

SIZES = {"4 layers of width 128": (4, 4, 128), "4 layers of width 384": (4, 6, 384)}
ROUNDS = 15


def measure(data: str, size: tuple[int, int, int], seq_len: int, sequences: int) -> dict:
    """Seconds of CPU time of each round, the ratios, and the most memory that a step takes."""
    n_layer, n_head, n_embd = size
    source = open_source(data, seq_len=seq_len, seed=0, sequences=sequences)
    batches = source.batches(source.initial_state(), rank=0, world=1, sequences=sequences)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": seq_len}
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=source.vocab_size, **sizes)).train()
    eot_id = source.split.eot_id

    def step(x, y, eot_id) -> None:
        positions = document_positions(x, eot_id)
        model(x, position_ids=positions, shift_labels=y, use_cache=False, output_logits=False).loss.backward()
        model.zero_grad(set_to_none=True)

    took, borders = {"cross": [], "mask": []}, 0
    for turn in range(-2, ROUNDS):
        x, y, _ = next(batches)
        borders += int((x == eot_id).sum()) if turn >= 0 else 0
        for name in list(took)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            step(x, y, eot_id if name == "mask" else None)
            if turn >= 0:
                took[name].append(time.process_time() - start)
    memory = {
        name: peak_memory_gib(lambda end=end: step(x, y, end)) for name, end in (("cross", None), ("mask", eot_id))
    }
    ratio = spread([mask / cross for cross, mask in zip(*took.values(), strict=True)])
    case = {"seq_len": seq_len, "sequences": sequences, "documents_per_window": borders / (ROUNDS * sequences)}
    return {**case, "mask_over_cross": ratio, "cpu_seconds": took, "step_memory_gib": memory}


def main(data: str) -> None:
    record = {
        "question": "what a training step costs more with --documents mask on a CPU",
        "how": __doc__.splitlines()[0],
        "command": "OMP_NUM_THREADS=1 python results/documents/price.py data/python-docs",
        "commit": commit(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
        "idle": False,
        "cases": {},
    }
    for size, shape in SIZES.items():
        for seq_len, sequences in ((128, 16), (1024, 2)):
            found = record["cases"][f"{size}, {sequences} x {seq_len}"] = measure(data, shape, seq_len, sequences)
            print(size, found["seq_len"], found["mask_over_cross"], found["step_memory_gib"], flush=True)
            write_json(Path(__file__).with_name("price-cpu.json"), record)


if __name__ == "__main__":
    main(*sys.argv[1:])
