"""Uploads a prepared data set to a dataset repository of the Hub: shards, tokenizer, a card, and last the manifest."""

from pathlib import Path

from gpt2repro.data.shards import MANIFEST, TOKENIZER, Manifest, verify_dataset
from gpt2repro.data.text_io import is_fault
from gpt2repro.data.tokenization import fingerprint, load_tokenizer
from gpt2repro.options import InputError, first_line
from gpt2repro.redaction import scrub

# The Hub advises against more than 100 files per commit; with fewer an interruption costs less.
FILES_PER_COMMIT = 25
# What a fast tokenizer consists of; whatever else lies beside it stays at home.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def push_dataset(directory: str | Path, repo: str) -> None:
    """Upload the data set to `USER/NAME`. After an interruption a second call skips every shard that the Hub has.

    The manifest comes last, so nobody mistakes a half-uploaded repository for a data set.

    Raises: InputError for damaged shards, another tokenizer, links, secrets, and if the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory, api = Path(directory), HfApi()
    manifest = verify_dataset(directory)
    if scrub(dict(manifest)) != manifest:  # it cannot be published without: its hash names the data set
        raise InputError(f"{directory / MANIFEST} holds a secret or a home directory; prepare the data again without")
    if link := next((path for path in (directory / TOKENIZER).rglob("*") if path.is_symlink()), None):
        raise InputError(f"{link} is a link, and links are not published: replace it by a copy, or delete it")
    if fingerprint(load_tokenizer(directory)) != manifest["tokenizer"].get("sha256"):
        raise InputError(f"{directory / TOKENIZER} is not the tokenizer that {MANIFEST} names; prepare the data again")
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
        names = [f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES if (directory / TOKENIZER / name).is_file()]
        last += [CommitOperationAdd(name, str(directory / name)) for name in [*names, MANIFEST]]
        api.create_commit(repo, last, commit_message="Manifest, tokenizer and card", repo_type="dataset")
    except Exception as error:
        if not is_fault(error):
            raise
        message = f"{repo} could not be uploaded: {first_line(error)}; run the same command again to continue"
        raise InputError(message) from error
    print(f"{repo}: {len(digests)} shards, sha256 {manifest.sha256}; train with --data hf://{repo}")


def dataset_card(manifest: Manifest, repo: str) -> str:
    """The README.md of the repository: dataset_card.md, filled in."""
    from huggingface_hub import DatasetCard, DatasetCardData

    origin = manifest["source"].get("dataset")
    metadata = DatasetCardData(tags=["gpt2repro", "pretokenized"], source_datasets=[origin] if origin else None)
    template = str(Path(__file__).with_name("dataset_card.md"))
    card = DatasetCard.from_template(metadata, template_path=template, repo=repo, sha256=manifest.sha256, **manifest)
    return card.content
