"""Rows of a data set for evaluation: from a JSON-lines file, a directory, or a dataset of the Hub.

Knows no task and no text column.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from gpt2repro.files import read_json_lines
from gpt2repro.options import InputError, first_line

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.jsonl)(?<!\.json)(?<!\.txt)")


def read_rows(
    source: str | Path, *, split: str, subset: str | None = None, names: Sequence[str] = ("*.jsonl",)
) -> list[dict]:
    """Every row as a dict; in a directory, of the first file that matches one of `names`, else of the dataset's files.

    `split` is the Hub's name, or "val", which the Hub calls "validation". `subset` is a dataset's configuration.

    Raises: InputError for a source that is missing, unreadable or not JSON, or holds text that is not Unicode.
    """
    path = Path(source)
    if os.path.isdir(source):  # unlike Path.is_dir it also answers for a name that is too long to exist
        found = next(filter(None, (sorted(path.glob(name)) for name in names)), [])
        if len(found) > 1:
            raise InputError(f"{path} has {len(found)} .jsonl files, none named {names[0]}; name the file")
        path = found[0] if found else path
    if os.path.isfile(path):
        return _read_file(path)
    if not os.path.isdir(source) and not HUB_ID.fullmatch(str(source)):
        raise InputError(f"there is no file {source}; give a .jsonl file, a directory or a dataset of the Hub")
    import datasets

    split = {"val": "validation"}.get(split, split)
    try:
        return list(datasets.load_dataset(str(source), subset, split=split))
    except Exception as error:  # the Hub, the network and parquet fail in many ways; each is bad input here
        kind = type(error).__name__
        raise InputError(f"cannot read the split '{split}' of {source}: {kind}: {first_line(error)}") from error


def _read_file(path: Path) -> list[dict]:
    rows = []
    try:
        for number, row in read_json_lines(path):
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected an object, found a JSON {type(row).__name__}")
            json.dumps(row, ensure_ascii=False).encode()  # "\ud800" is valid JSON, but no tokenizer takes it
            rows.append(row)
    except UnicodeEncodeError:
        raise InputError(f"{path}, line {number}: half of a surrogate pair is no character; repair the text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return rows
