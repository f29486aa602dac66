"""Uploads a prepared data set to a dataset repository of the Hub: shards, tokenizer, a card, and last the manifest."""

import contextlib
from pathlib import Path

from gpt2repro.data.shards import MANIFEST, TOKENIZER, Manifest, verify_dataset
from gpt2repro.data.text_io import first_line, is_fault
from gpt2repro.data.tokenization import fingerprint, load_tokenizer
from gpt2repro.options import InputError
from gpt2repro.redaction import scrub

# The Hub advises against more than 100 files per commit; with fewer an interruption costs less.
FILES_PER_COMMIT = 25
# What a fast tokenizer consists of; whatever else lies beside it stays at home.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@contextlib.contextmanager
def _refusals(repo: str):
    """Errors of the Hub and of the network become an InputError."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {repo} is no USER/NAME: {first_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"uploading to {repo} needs a login: run `hf auth login` or set HF_TOKEN") from error
    except Exception as error:
        if not is_fault(error):
            raise
        raise InputError(
            f"{repo} could not be uploaded: {first_line(error)}; run the same command again to continue"
        ) from error


def check_push(repo: str) -> None:
    """Ask the Hub who is logged in. Raises: InputError, before any work, if that user cannot write to `repo`."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _refusals(repo):
        validate_repo_id(repo)
        user = HfApi().whoami()
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if "/" not in repo or repo.split("/")[0] not in owners:
        raise InputError(
            f"--push_to_hub {repo}: the login may write below {', '.join(owners)} only; choose such a name"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"uploading to {repo} needs a token that may write; this one only reads")


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
    with _refusals(repo):
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
