"""The real training program against a plain PyTorch loop around transformers' GPT-2, 200 steps, loss by loss."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_run import flags, write_tiny_shards

STEPS, WARMUP, LR, MIN_LR = 200, 20, 3e-3, 3e-4
SEQ_LEN, SEQUENCES = 16, 8


def plain_loop(initial, data, dtype: torch.dtype) -> list[float]:
    """What any textbook would write: no accumulation, no Accelerate, nothing of this project but the windows' order."""
    from transformers import GPT2LMHeadModel

    from gpt2repro.data.shards import open_split
    from gpt2repro.data.sources import ShardSource

    model = GPT2LMHeadModel.from_pretrained(initial).to(dtype).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)

    tokens = np.fromfile(data / "train_000000.bin", dtype=np.uint16)[512:].astype(np.int64)  # after 256 int32
    order = ShardSource(open_split(data, "train"), seq_len=SEQ_LEN, seed=1337)
    losses = []
    for step in range(STEPS):
        windows = order.windows_at(np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)).tolist()
        batch = torch.tensor(np.stack([tokens[w * SEQ_LEN : w * SEQ_LEN + SEQ_LEN + 1] for w in windows]))
        if step < WARMUP:
            lr = LR * (step + 1) / WARMUP
        else:
            lr = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_shards(tmp_path_factory.mktemp("fidelity") / "data")


@pytest.fixture(scope="module")
def initial(data, tmp_path_factory):
    """First weights for both, made and written by transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2repro.data.tokenization import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(data / "tokenizer")
    sizes = {"vocab_size": len(tokenizer), "n_positions": SEQ_LEN, "n_embd": 32, "n_layer": 2, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    directory = tmp_path_factory.mktemp("initial")
    GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **ends)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("precision", "dtype", "compared", "tolerance"),
    [("fp64", torch.float64, STEPS, 1e-8), ("fp32", torch.float32, 50, 1e-5)],
)
def test_200_steps_follow_a_plain_loop_around_transformers_gpt2(
    data, initial, tmp_path, run_program, precision, dtype, compared, tolerance
):
    options = {
        "init_from": initial, "precision": precision, "max_steps": STEPS, "warmup_steps": WARMUP, "lr": LR,
        "min_lr": MIN_LR, "seq_len": SEQ_LEN, "batch_tokens": SEQUENCES * SEQ_LEN, "micro_batch_size": 2,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "resid_pdrop": 0.0, "seed": 1337,
        "eval_steps": 1000, "save_steps": 1000, "log_steps": 50,
    }  # fmt: skip
    done = run_program(["train_accelerate.py", *flags(data, tmp_path / "run", **options)])
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    theirs = plain_loop(initial, data, dtype)
    assert len(ours) == len(theirs) == STEPS and theirs[-1] < theirs[0] - 1
    differences = np.abs(np.array(ours) - np.array(theirs))[:compared]
    assert differences.max() <= tolerance, f"first beyond at step {int(np.argmax(differences > tolerance)) + 1}"
    print(f"{precision}: largest difference over {compared} steps {differences.max():.1e}")
