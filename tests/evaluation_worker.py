"""One of several processes that evaluate a model as training does; `test_evaluation.py` compares it with one process.

python evaluation_worker.py RANK WORLD PORT OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokenization import bpe_tokenizer
from gpt2repro.evaluation import hellaswag
from gpt2repro.evaluation.losses import validation_loss
from gpt2repro.evaluation.multiple_choice import score
from modeling_gpt2repro import GPT2ReproForCausalLM

EXAMPLES = Path(__file__).parent / "data" / "hellaswag_synthetic.jsonl"


class Tokens:
    """A split in memory: `count` random tokens."""

    def __init__(self, count: int, vocab_size: int, text_bytes: int | None = None):
        self.values = np.random.default_rng(0).integers(vocab_size, size=count).astype(np.uint16)
        self.tokens, self.bytes = count, text_bytes

    def read(self, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= self.tokens
        return self.values[start : start + count]


def build():
    """The same model, tokenizer and examples in every process.

    In float64: sums of a few fp32 numbers are exact in float64, so the order of their addition would not show.
    """
    examples = hellaswag.TASK.read(EXAMPLES)
    tokenizer = bpe_tokenizer([example["ctx"] + " ".join(example["endings"]) for example in examples], 300)
    torch.manual_seed(0)
    sizes = {"n_positions": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=len(tokenizer), **sizes)).double(), tokenizer, examples


def evaluate(model, tokenizer, examples) -> dict:
    """What a run logs at an evaluation, and each example's scores. 1000 tokens and 3 rows per pass: uneven work."""
    split = Tokens(1000, len(tokenizer), text_bytes=4000)
    record = validation_loss(model, split, seq_len=32, batch_size=3, tokens=900)
    record["masked"] = validation_loss(model, split, seq_len=32, batch_size=3, tokens=900, eot_id=5)["val_loss"]
    prepared = hellaswag.TASK.prepare(examples, tokenizer, 384)
    scores = score(model, prepared)
    record = record | hellaswag.TASK.summary(hellaswag.TASK.predictions(prepared, scores))
    return record | {f"{name} of each": [one.tolist() for one in examples] for name, examples in scores.items()}


def train_one_step(model, rank: int) -> float:
    """The evaluation must leave a model that trains on."""
    ids = torch.arange(32).reshape(2, 16) + rank
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def wrapped(model, way: str, world: int):
    """The model as a run on several processes has it: whole, compiled in place, or in shards with compiled blocks."""
    if way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in model.transformer.h:
            block.compile(backend="eager")
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if way == "compiled":
        model.compile(backend="eager")
    return torch.nn.parallel.DistributedDataParallel(model)


def main(rank: int, world: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = {}
    for way in ("ddp", "compiled", "fsdp"):
        model, tokenizer, examples = build()
        model = wrapped(model, way, world)
        found[way] = [evaluate(model, tokenizer, examples)]  # before training: nothing is gathered yet
        model.train()
        train_one_step(model, rank)
        found[way].append(evaluate(model, tokenizer, examples))
        train_one_step(model, rank)
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
