"""Removes secrets and home directories from what leaves the machine: logs, trackers, checkpoints, model cards.

The only scrubber of the project. Knows no file and no format; imports nothing of this project.
"""

import os
import re
from pathlib import Path
from typing import Any

SECRET_NAME = re.compile(r"(^|[_-])(token|secret|key|credentials?)$|passw(or)?d$|[_-](pass|pwd|pat)$", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bwandb_v\d+_\w{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"  # W&B, GitHub, GitLab
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b"  # OpenAI and others, AWS
    r"|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}"  # Google, Slack
    r"|(?<=://)[^/\s:@\"']*:[^/\s\"']+(?=@)|(?<=://)[\w-]{20,}(?=@)"  # https://user:password@host, https://token@host
    r"|(?<=Bearer )[\w.~+/-]{16,}"
    r"|(?:(?<=_TOKEN=)|(?<=_KEY=)|(?<=PASSWORD=)|(?<=SECRET=))[^\s\[\]\"'\\,}]+"  # NAME=value in a command
)
# name=value and "name": "value" in any text, where the value is as long as a secret.
ASSIGNED = re.compile(
    r"""((?:token|api_?key|passw(?:or)?d|secret)["']?(?:=|: ?)["']?)[^\s\[\]"'\\,}&;]{8,}""", re.IGNORECASE
)
SHORT = re.compile(r"(?=.*[A-Za-z])(?=.*\d).{4,7}")
HIDDEN = "[hidden]"
# Linux, macOS, root's, Windows (also with the backslashes doubled, as in JSON); the name must end there.
HOMES = r"/home/[\w.@+-]+|/Users/[\w.@+-]+|/root|[A-Za-z]:\\+Users\\+[\w.@+-]+"


def scrub(value: Any, name: str = "") -> Any:
    """`value` without secrets, and with home directories written as `~`.

    A secret is recognised by its field's name, by its form, or as the value of an environment variable with such a
    name. Such a value of 4 to 7 characters counts only where it has letters and digits and stands as a whole word. A
    shorter one, and a plain word or number, stays: it also stands in texts, paths and options for other reasons, and
    hiding it there would change what they say and show what the secret is. Dicts and lists are scrubbed item by item;
    other values than text and paths stay as they are. Scrubbing twice changes nothing.
    """
    if isinstance(value, dict):
        return {key: scrub(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item, name) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    if value and SECRET_NAME.search(name):
        return HIDDEN
    for variable, secret in os.environ.items():
        # By value, since W&B's older keys look like a commit's id (hexadecimal).
        if SECRET_NAME.search(variable) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
        elif SECRET_NAME.search(variable) and SHORT.fullmatch(secret):
            value = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, value)
    here = os.path.expanduser("~")  # this user's home may be anywhere, such as /data/me
    homes = f"{HOMES}|{re.escape(here)}" if len(Path(here).parts) > 1 else HOMES
    value = ASSIGNED.sub(rf"\1{HIDDEN}", SECRET_TEXT.sub(HIDDEN, value))
    return re.sub(rf"(?<![\w.~-])(?:{homes})(?![\w.-])", "~", value)
