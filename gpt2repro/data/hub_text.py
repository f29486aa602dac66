"""Text datasets of the Hub: which files one commit of a dataset holds, and which faults on the way to them may pass.

What `text_files` (preparation) and `text_sources` (streams) share; neither splitting nor reading files happens here.
"""

import random
import re
from dataclasses import dataclass

from gpt2repro.options import InputError

SPEC = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?")

RETRY_SECONDS, LONGEST_RETRY_SECONDS, RETRIES = 1.0, 300.0, 15  # in all about an hour
PASSING_STATUS = {408, 425, 429}  # and every 5xx
# The Hub's client has changed its HTTP library twice; pyarrow complains about a reply that was cut short.
NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "pyarrow")


@dataclass(frozen=True)
class HubText:
    """The train split of a dataset at one commit."""

    dataset: str
    config: str
    revision: str  # the commit
    files: list[str]  # hf:// URLs


def resolve(dataset: str, config: str | None, revision: str | None) -> HubText:
    """Pin a dataset to a commit and list its files.

    Raises InputError for what can never be read; faults of the network pass through, for the caller to retry.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
        builder = load_dataset_builder(dataset, config, revision=commit)
    except GatedRepoError as error:
        raise InputError(f"{dataset} is gated: accept its terms on the Hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"the dataset {dataset} has no revision {revision}") from error
    except (RepositoryNotFoundError, DatasetNotFoundError, HFValidationError) as error:
        raise InputError(
            f"there is no file {dataset} here and no dataset {dataset} on the Hub (or it is private)"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # no data files, an unknown configuration, a refused login …
        if may_pass(error):
            raise
        raise InputError(f"{dataset} can't be opened: {first_line(error)}") from error
    data_files = builder.config.data_files or {}
    if not data_files.get("train"):
        raise InputError(f"{dataset} has no train split; it has {', '.join(map(str, data_files)) or 'no data files'}")
    return HubText(dataset, builder.config.name, commit, [str(url) for url in data_files["train"]])


def may_pass(error: BaseException | None) -> bool:
    """Whether trying again may help: time-outs, broken connections, 429 and 5xx; not a missing file or permission."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in PASSING_STATUS or status >= 500
    if isinstance(error, LocalEntryNotFoundError):  # no reply, and no copy here
        return may_pass(error.__cause__)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | OfflineModeIsEnabled):
        return False
    return isinstance(error, OSError | EOFError) or type(error).__module__.startswith(NETWORK_LIBRARIES)


def seconds_before_retry(error: Exception, attempt: int) -> float:
    """What the server asks for, or twice as long each time; with jitter, so that many ranks do not come at once."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    pause = float(asked) if asked.isdigit() else RETRY_SECONDS * 2**attempt
    return min(pause, LONGEST_RETRY_SECONDS) * random.SystemRandom().uniform(1.0, 1.5)


def text_of(row, column: str, where: str) -> str | None:
    """The text of a row, None where it has none. Raises InputError, with `where` it stands, for a row without text."""
    if not isinstance(row, dict) or column not in row:
        have = ", ".join(row) if isinstance(row, dict) else f"no columns but {type(row).__name__}"
        raise InputError(f"{where}: there is no column {column!r}, only {have}; set --text_column")
    return checked(row[column], column, where)


def checked(text, column: str, where: str) -> str | None:
    """`text`, if it is text or None. Raises InputError."""
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: {column!r} holds {type(text).__name__}, not text; set --text_column")
    return text


def first_line(error: Exception) -> str:
    """What an error says, for a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0]
