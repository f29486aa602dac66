"""A data set and options so small that a run of the real training program takes little more than its imports."""

from pathlib import Path

import numpy as np

from gpt2repro.data.shards import FORMAT, MANIFEST, TOKENIZER, VERSION, write_shard
from gpt2repro.data.tokenization import char_tokenizer, fingerprint
from gpt2repro.files import write_json

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
OPTIONS = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "seq_len": 16, "batch_tokens": 128,
    "micro_batch_size": 4, "max_steps": 24, "warmup_steps": 2, "lr": 0.01, "min_lr": 0.001, "log_steps": 2,
    "eval_steps": 8, "save_steps": 4, "keep_last": 3, "val_tokens": 256, "sample_tokens": 0, "resid_pdrop": 0.1,
    "trackers": [],
}  # fmt: skip


def write_tiny_shards(directory: Path, repeats: int = 200) -> Path:
    """Characters of a few sentences in shuffled order, as `gpt2repro prepare-text` lays them out."""
    directory.mkdir(parents=True)
    tokenizer = char_tokenizer([TEXT])
    generator = np.random.default_rng(0)
    words = TEXT.split()
    splits = {}
    for split, count in (("train", repeats), ("val", 20)):
        text = " ".join(words[i] for i in generator.integers(len(words), size=count * len(words)))
        tokens = np.array(tokenizer(text)["input_ids"])
        record = write_shard(directory / f"{split}_000000.bin", tokens, len(tokenizer))
        record |= {"documents": 1, "bytes": len(text)}
        splits[split] = {"tokens": len(tokens), "documents": 1, "bytes": len(text), "shards": [record]}
    tokenizer.save_pretrained(directory / TOKENIZER)
    content = {"kind": "char", "vocab_size": len(tokenizer), "eot_id": tokenizer.eos_token_id}
    manifest = {"format": FORMAT, "version": VERSION, "dtype": "uint16", "source": {}, "settings": {}, "splits": splits}
    write_json(directory / MANIFEST, manifest | {"tokenizer": {**content, "sha256": fingerprint(tokenizer)}})
    return directory


def flags(shards: Path, run_dir: Path, **changes) -> list[str]:
    """Command-line options of a tiny run; `data=` for another source than the shards."""
    arguments = []
    for name, value in {"data": shards, "run_dir": run_dir, **OPTIONS, **changes}.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(str(one) for one in values)]
    return arguments
