"""Uploads a prepared data set to a dataset repository of the Hub: shards, tokenizer, a card, and last the manifest."""

from pathlib import Path

from gpt2repro.data.shards import MANIFEST, TOKENIZER, Manifest, verify_dataset
from gpt2repro.data.text_io import first_line, is_fault
from gpt2repro.options import InputError

# The Hub advises against more than 100 files per commit; with fewer an interruption costs less.
FILES_PER_COMMIT = 25


def push_dataset(directory: str | Path, repo: str) -> None:
    """Upload the data set to `USER/NAME`. After an interruption a second call skips every shard that the Hub has.

    The manifest comes last, so nobody mistakes a half-uploaded repository for a data set.

    Raises: InputError for damaged shards, and if the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory, api = Path(directory), HfApi()
    manifest = verify_dataset(directory)
    digests = manifest.digests()
    try:
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        present = {
            entry.path: entry.lfs.sha256
            for entry in api.list_repo_tree(repo, repo_type="dataset", recursive=True)
            if getattr(entry, "lfs", None)
        }
        missing = [name for name, digest in digests.items() if present.get(name) != digest]
        for start in range(0, len(missing), FILES_PER_COMMIT):
            names = missing[start : start + FILES_PER_COMMIT]
            print(f"uploading shards {start + 1} to {start + len(names)} of {len(missing)} to {repo}", flush=True)
            operations = [CommitOperationAdd(name, str(directory / name)) for name in names]
            api.create_commit(repo, operations, commit_message=f"Shards {names[0]} to {names[-1]}", repo_type="dataset")
        last = [CommitOperationAdd("README.md", dataset_card(manifest, repo).encode())]
        names = [f"{TOKENIZER}/{path.name}" for path in sorted((directory / TOKENIZER).iterdir())] + [MANIFEST]
        last += [CommitOperationAdd(name, str(directory / name)) for name in names]
        api.create_commit(repo, last, commit_message="Manifest, tokenizer and card", repo_type="dataset")
    except Exception as error:
        if not is_fault(error):
            raise
        message = f"{repo} could not be uploaded: {first_line(error)}; run the same command again to continue"
        raise InputError(message) from error
    print(f"{repo}: {len(digests)} shards, sha256 {manifest.sha256}; train with --data hf://{repo}")


def dataset_card(manifest: Manifest, repo: str) -> str:
    """The README.md of the repository."""
    source, tokenizer, splits = manifest["source"], manifest["tokenizer"], manifest["splits"]
    front, text = "tags: [gpt2repro, pretokenized]", source.get("corpus", "local files")
    if origin := source.get("dataset"):
        front += f"\nsource_datasets: [{origin}]"
        text = f"[{origin}](https://huggingface.co/datasets/{origin}) ({source['config']})"
        text += f", revision `{source['revision']}`"
    rows = "\n".join(
        f"| {name} | {split['tokens']:,} | {split['documents']:,} | {split['bytes']:,} | {len(split['shards'])} |"
        for name, split in splits.items()
    )
    return f"""---
{front}
---
# {repo}: token shards

Text: {text}. Tokenizer: {tokenizer.get("kind")}, {tokenizer["vocab_size"]:,} entries, in `tokenizer/`; every document
is followed by token {tokenizer["eot_id"]} (`<|endoftext|>`).

| split | tokens | documents | bytes of text | shards |
|---|---|---|---|---|
{rows}

Each `.bin` is 256 int32 of header (llm.c's: magic, version, token count) and then {manifest["dtype"]} tokens;
`manifest.json` lists them with their sha256. Its own sha256 is `{manifest.sha256}`.

    python train_accelerate.py --config 124M --data hf://{repo}
"""
