"""Checkpoints and models to and from the Hugging Face Hub, so that no fault of a network ever reaches the training.

    runs/x/checkpoints/step_5000 --hard links--> runs/x/uploads/step_005000 --thread--> branch step-5000, branch main
                                                                                        branch native: a plain gpt2
                                                                                        branch ema: averaged weights

* Every revision is one commit: a reader sees a checkpoint whole or not at all.
* `main` is the run's best checkpoint (the newest one, where nothing was evaluated), without the optimizer.
* The optimizer's state lies in the newest `step-N` only; `fetch_checkpoint` finds it there.
* Repositories are private unless asked for. The token comes from HF_TOKEN or the cached login and is never printed.

Large files travel by Xet where the client has it, else by git LFS. Owns the network's errors: `explain` puts each into
a sentence. Models come in as arguments; knows no training loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpt2repro.checkpoint.layout import EMA, STEP_NAME, from_rank_zero, list_steps, resolve_pointer
from gpt2repro.checkpoint.reader import check_model_directory, verify_checkpoint
from gpt2repro.files import read_json, read_json_if_whole, write_json
from gpt2repro.options import InputError
from gpt2repro.publishing.exports import check_native, export_native, is_model_file, link
from gpt2repro.publishing.model_card import card_files
from gpt2repro.redaction import scrub

CHECKSUMS, TRAINER_STATE, STATE = "checksums.json", "trainer_state", "trainer_state/state.json"
STEP_BRANCH = re.compile(r"step-(\d+)")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 2.0, 300.0  # between attempts: doubled each time, with jitter
FETCH_ATTEMPTS = 5  # enough for a broken connection; a user waits, so a Hub that is down is reported soon
FINAL_STATUS = {400, 401, 402, 403, 404, 413, 422}  # another attempt would get the same answer


# --- one repository --------------------------------------------------------------------------------------------------


def open_repo(repo: str, *, private: bool, kind: str = "model", **create):
    """The client, after a check that somebody is logged in; it creates the repository where that is missing.

    Raises: InputError for a name that is not USER/NAME, and the client's own errors: see `explain`.
    """
    from huggingface_hub import HfApi

    if not REPO_ID.fullmatch(repo):
        raise InputError(f"{repo!r} is no repository's name: expected USER/NAME")
    api = HfApi(library_name="gpt2repro")
    api.whoami()
    api.create_repo(repo, private=private, repo_type=kind, exist_ok=True, **create)
    is_private = api.repo_info(repo, repo_type=kind).private
    if is_private != private:
        state = "private" if is_private else "public"
        print(f"note: {repo} exists and stays {state}; its settings page can change that", file=sys.stderr, flush=True)
    return api


def publish(api, repo: str, files: dict[str, Path | bytes], *, revision: str, message: str, kind: str = "model") -> str:
    """Make the branch `revision`, created where missing, consist of `files` by one commit. Returns the commit's id.

    The client sends no file again that the Hub has, so a repeated call costs little.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if revision != "main":
        api.create_branch(repo, branch=revision, repo_type=kind, exist_ok=True)
    present = set(api.list_repo_files(repo, revision=revision, repo_type=kind))
    operations: list = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(content) if isinstance(content, Path) else content)
        for name, content in sorted(files.items())
    ]
    operations += [CommitOperationDelete(name) for name in sorted(present - set(files) - {".gitattributes"})]
    # create_commit, not upload_folder: with Xet the latter makes several commits, and a reader could meet half a model.
    return api.create_commit(repo, operations, commit_message=message, revision=revision, repo_type=kind).oid


def checkpoint_files(directory: str | Path) -> dict[str, Path | bytes]:
    """Path in the repository -> file, of a checkpoint or any other model's directory; the files are verified first.

    A checkpoint's files are those that checksums.json names; another directory's are those of a model's names.
    No other file is published. A state.json that was written before states were scrubbed is scrubbed here, and its
    checksum is corrected.

    Raises: InputError for damage, and for links: nobody chose to publish the files that links point to.
    """
    directory = Path(directory)
    refuse_links(directory)
    if not (directory / CHECKSUMS).exists() and not (directory / TRAINER_STATE).exists():
        check_model_directory(directory)
        return {path.name: path for path in sorted(directory.iterdir()) if is_model_file(path)}
    verify_checkpoint(directory, strays=True)
    checksums = read_json(directory / CHECKSUMS)
    files: dict[str, Path | bytes] = {name: directory / name for name in (*checksums, CHECKSUMS)}
    state = read_json(directory / STATE)
    if (clean := scrub(state)) != state:
        files[STATE] = content = json.dumps(clean, indent=1).encode()
        checksums[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[CHECKSUMS] = json.dumps(checksums, indent=1, sort_keys=True).encode()
    return files


def weights_only(files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """`files` without the trainer's state, the averages, and the checksums of those; the Hub has its own checksums."""
    left_out = (TRAINER_STATE, EMA, CHECKSUMS)
    return {name: file for name, file in files.items() if not name.startswith(left_out)}


def refuse_links(directory: Path) -> None:
    """Raises: InputError where `directory` is a link or holds one."""
    for path in (directory, *sorted(directory.rglob("*"))):
        if path.is_symlink():
            raise InputError(
                f"{path} is a link to {os.readlink(path)}, and links are not published: replace it by a copy of what "
                "you mean to publish, or delete it"
            )


def may_write(repo: str) -> tuple[str, str | None]:
    """(account name or "", complaint or None): whether the login at hand may write to the Hub repository `repo`."""
    from huggingface_hub import HfApi

    if not REPO_ID.fullmatch(repo):
        return "", f"{repo!r} is no repository's name: expected USER/NAME"
    try:
        account = HfApi().whoami()
    except Exception as error:  # no login, no network, a server's bad day: all the same to a plan
        return "", f"the Hub does not say who you are, so {repo} may not be writable: {explain(error, repo)}"
    name, owner = account.get("name", ""), repo.split("/")[0]
    mine = {name, *(group.get("name") for group in account.get("orgs", []))}
    if owner not in mine:
        return name, f"{repo} belongs to {owner}, but this login is {name} and may write for {', '.join(sorted(mine))}"
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return name, f"the token of {name} may only read; pushing to {repo} needs one with write permission"
    return name, None


def explain(error: BaseException, repo: str) -> str:
    """What went wrong and what to do, in one sentence and without any token."""
    if isinstance(error, InputError):
        return str(error)
    status, kind = _status(error), type(error).__name__
    hub = os.environ.get("HF_ENDPOINT", "the Hub")
    login = f"nobody is logged in to {hub}: set HF_TOKEN, or run `hf auth login`, with a token that may write"
    refused = f"{hub} refuses this ({status}): the token may not write to {repo}, or its plan does not include it"
    known = {
        "LocalTokenNotFoundError": login,
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it to reach the Hub",
        401: f"{hub} does not accept the token (401): run `hf auth login` with one that may write to {repo}",
        402: refused,
        403: refused,
        404: f"{hub} has no {repo} (404), or the token may not see it",
        429: f"{hub} asks to slow down (429) while writing to {repo}",
    }
    if sentence := known.get(kind) or known.get(status):
        return sentence
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was deleted while it was being sent"
    reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:400]
    if status is not None:
        return scrub(f"{hub} answers {status} for {repo}: {reason}")
    return scrub(f"{hub} could not be reached for {repo}: {type(error).__name__}: {reason}")


def is_final(error: BaseException) -> bool:
    """Whether another attempt is pointless: true for a refusal or our mistake, false for a fault of the network."""
    names = ("InputError", "LocalTokenNotFoundError", "OfflineModeIsEnabled", "HFValidationError")
    return type(error).__name__ in names or _status(error) in FINAL_STATUS


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error; the client wraps what happens to a large file in a RuntimeError."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response.status_code
        error = error.__cause__
    return None


# --- in the background of a training run -----------------------------------------------------------------------------


class Uploader:
    """Publishes a run's checkpoints from a thread of its own; only the constructor raises errors into the training.

        uploader = Uploader("user/name", run_dir=run_dir)        # InputError here, before the first step
        uploader.checkpoint(path)                                # returns at once; the files may be deleted afterwards
        missing = uploader.close(timeout=600)                    # sentences about what did not arrive

    A checkpoint waits in `run_dir/uploads` as hard links. If a fault or the end of the process leaves a checkpoint
    there, the next Uploader of the same run sends it: that of the same training command, or of `gpt2repro push`. A
    damaged checkpoint stays there too; the uploader names it and sends the others.

    `comparable` loads a checkpoint with our class in fp32 on the CPU; with it `close` also publishes the native twin
    of `main`. `card` holds further arguments of `card_files`.
    """

    def __init__(
        self,
        repo: str,
        *,
        run_dir: str | Path,
        private: bool = True,
        card: dict | None = None,
        comparable: Callable[[Path], object] | None = None,
        quiet: bool = True,
    ):
        from huggingface_hub.utils import disable_progress_bars, logging

        self.repo, self.run_dir, self.private = repo, Path(run_dir), private
        self.uploads = self.run_dir / "uploads"
        self.published: list[str] = []  # revisions that arrived, in order
        self._cards = partial(card_files, repo=repo, run_dir=self.run_dir, **(card or {}))
        self._comparable = comparable
        self._said: set[str] = set()
        self._errors: dict[str, str] = {}  # name of what has not arrived -> the reason
        self._refused: set[str] = set()  # names in the queue that are not sent: damaged checkpoints and links
        self._verified: dict[tuple, dict] = {}  # (name, inode and time of each file) -> files: hashed once
        self._before: dict[str, str | None] = {}  # branch -> its commit before this process published it
        self._wake = threading.Condition()
        self._closing_at: float | None = None  # the deadline, once close() was called
        logging.set_verbosity_error()  # its warnings are about single attempts; this class reports their outcome
        if quiet:
            disable_progress_bars()  # they would disturb the training's own bar
        if self.uploads.is_symlink():
            raise InputError(f"{self.uploads} is a link, and what lies behind it would be published; remove the link")
        self.api = None
        try:
            self._connected()
        except Exception as error:
            if is_final(error):
                raise InputError(explain(error, repo)) from None
            self._say(f"{explain(error, repo)}. Training starts all the same; uploads follow when it answers")
        for left_over in self.uploads.glob(".*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        self._news = bool(self._queue())
        # A daemon, so that an interpreter that dies without close() does not hang on a network.
        self._thread = threading.Thread(target=self._work, name="hub-uploader", daemon=True)
        self._thread.start()

    def checkpoint(self, path: str | Path) -> None:
        """Queue a written checkpoint. Only the main process calls it, from any thread."""
        path = Path(path)
        queued = self.uploads / path.name
        try:
            if _inodes(queued) != _inodes(path):  # else it waits already
                _link_tree(path, queued)
        except (OSError, InputError) as error:
            reason = str(error) if isinstance(error, InputError) else error.strerror or str(error)
            self._say(f"{path.name} cannot be queued for upload: {reason}")
            self._errors[path.name] = f"not queued: {reason}"
            return
        with self._wake:
            self._errors.pop(path.name, None)
            self._refused.discard(path.name)
            self._news = True
            self._wake.notify()

    def waiting(self) -> list[str]:
        """Names of what is still to be sent, oldest first."""
        native = self._closing_at is not None and self._comparable is not None
        return [path.name for path in self._queue()] + ["branch native"] * native

    def close(self, timeout: float, *, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Send what waits, for at most `timeout` seconds; returns one sentence per checkpoint that did not arrive.

        `close` calls `stop` about five times a second and ends at once when `stop` returns True. What was not sent
        stays in the queue for the next start.
        """
        with self._wake:
            self._closing_at = time.monotonic() + timeout
            if timeout == 0:
                self._comparable = None  # no time for the native twin
            self._wake.notify()
        while self._thread.is_alive() and (left := self._closing_at - time.monotonic()) > 0 and not stop():
            self._thread.join(min(0.2, left))
        reasons = dict.fromkeys(self.waiting(), "still being sent") | self._errors
        missing = [f"{name} is not on the Hub: {reason}" for name, reason in reasons.items()]
        with self._wake:
            self._closing_at = time.monotonic()
            self._wake.notify()
        if missing:
            again = f"gpt2repro push --model {self.run_dir} --repo {self.repo}"
            self._say("; ".join(missing) + f". Send it later: {again}")
        return missing

    def _work(self) -> None:
        """The thread: send what waits; after a fault try again, each time later; after a refusal wait for news."""
        wait = FIRST_WAIT_SECONDS
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._news or self._closing_at is not None)
                self._news = False
            error = self._send_what_waits()
            with self._wake:
                closing = self._closing_at is not None
                if error is None or is_final(error):
                    wait = FIRST_WAIT_SECONDS
                    if closing and not (error is None and self._queue()):
                        return
                    continue
                pause = wait * random.uniform(0.5, 1.5)  # jitter: many runs meet one busy Hub
                if closing and time.monotonic() + pause > self._closing_at:
                    return
                self._wake.wait(pause)
                wait, self._news = min(2 * wait, LONGEST_WAIT_SECONDS), True

    def _send_what_waits(self) -> Exception | None:
        """Send the oldest first, so that the newest comes last; stop at the first fault: the next would meet it too."""
        name = ""
        try:
            ready = {}
            for staged in self._queue():
                name, inode = staged.name, staged.lstat().st_ino
                stats = [path.lstat() for path in sorted(staged.rglob("*"))]
                key = (name, *((stat.st_ino, stat.st_mtime_ns) for stat in stats))
                try:
                    self._verified[key] = ready[staged] = self._verified.get(key) or checkpoint_files(staged)
                except InputError as error:
                    if not staged.exists() or staged.lstat().st_ino != inode:  # replaced while it was read
                        self._news = True
                        continue
                    self._refused.add(name)
                    self._errors[name] = str(error)
                    self._say(f"{name} is not sent: {error}")
            for staged, files in ready.items():
                name = staged.name
                self._publish(staged, files, newest=staged == [*ready][-1])
                self._errors.pop(name, None)
            closing = self._closing_at is not None and time.monotonic() < self._closing_at
            if closing and self._comparable is not None and not self._queue():
                name = "branch native"
                if best := self._best():
                    publish_native(self._connected(), self.repo, best, self._comparable(best), self._cards)
                    self.published.append("native")
                self._comparable = None
                self._errors.pop(name, None)
        except Exception as error:
            if STEP_NAME.fullmatch(name) and not (self.uploads / name).exists():
                self._news = True  # another Uploader of this run, such as `gpt2repro push` beside it, has sent it
                return None
            self._errors[name] = explain(error, self.repo)
            self._say(f"{name} did not arrive: {self._errors[name]}")
            return error
        return None

    def _connected(self):
        if self.api is None:
            self.api = open_repo(self.repo, private=self.private)
        return self.api

    def _best(self) -> Path | None:
        """The checkpoint that belongs on `main`."""
        checkpoints = self.run_dir / "checkpoints"
        return resolve_pointer(checkpoints, "best") or resolve_pointer(checkpoints, "latest")

    def _publish(self, staged: Path, files: dict[str, Path | bytes], *, newest: bool) -> None:
        """Publish one checkpoint: its branch, then `main`; then delete older optimizer states."""
        api = self._connected()
        step = int(STEP_NAME.fullmatch(staged.name)[1])
        branch, inode = f"step-{step}", staged.stat().st_ino
        kept = files if newest else weights_only(files)
        heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(self.repo).branches}
        before = self._before.setdefault(branch, heads.get(branch))  # a second attempt meets what the first one made
        before = None if before == heads.get("main") else before  # a branch begins there
        commit = publish(api, self.repo, kept | self._cards(staged), revision=branch, message=f"Step {step}")
        self._publish_main(api, self._best() or staged)
        self.published.append(branch)
        average = {name.removeprefix(EMA): file for name, file in files.items() if name.startswith(EMA)}
        if newest and average:
            average |= self._cards(staged / EMA)
            publish(api, self.repo, average, revision="ema", message=f"Averaged weights, step {step}")
            self.published.append("ema")
        if newest:
            try:
                self._strip_older(branch, commit, before)
            except Exception as error:  # costs space, loses nothing
                self._say(f"older optimizer states stay on the Hub for now: {explain(error, self.repo)}")
        if staged.stat().st_ino == inode:  # else a rewound run has saved this step anew meanwhile
            shutil.rmtree(staged)

    def _publish_main(self, api, best: Path) -> None:
        copy = self.uploads / f".main-{secrets.token_hex(4)}.tmp"  # the run may prune the original meanwhile
        try:
            _link_tree(best, copy)
            files = weights_only(checkpoint_files(copy)) | self._cards(copy)
            publish(api, self.repo, files, revision="main", message=f"{best.name.replace('_', ' ')} of the run")
            self._errors.pop("branch main", None)
        except InputError as error:
            self._errors["branch main"] = str(error)
            self._say(f"main does not become {best.name}: {error}")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _strip_older(self, newest: str, commit: str, before: str | None) -> None:
        """Delete optimizer's state and averages from this run's older branches, and their files from the Hub's storage.

        `uploads/optimizer_states.json` names the branches that this run has published with an optimizer's state, and
        their commits. A branch that has another commit now, or that another run has made, stays as it is. `before` is
        the commit that `newest` had before `commit`: of another run, it would be lost with the branch's history.
        """
        from huggingface_hub import CommitOperationDelete

        def stored(revision: str) -> dict[str, str]:
            """Path -> sha256 of a revision's large files."""
            entries = self.api.list_repo_tree(self.repo, revision=revision, recursive=True)
            return {entry.path: entry.lfs.sha256 for entry in entries if getattr(entry, "lfs", None)}

        log = self.uploads / "optimizer_states.json"
        repos = read_json_if_whole(log) or {}
        ours = repos.get(self.repo)
        ours = ours if isinstance(ours, dict) else {}
        known = ours.pop(newest, None)
        ours |= {newest: commit} if before in (None, known) else {}
        write_json(log, {**repos, self.repo: ours})
        refs = self.api.list_repo_refs(self.repo)
        heads = {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]}
        old: set[str] = set()
        for branch in sorted(ours.keys() - {newest}):
            if heads.get(branch) == ours.pop(branch):
                extra = {
                    path: sha256 for path, sha256 in stored(branch).items() if path.startswith((TRAINER_STATE, EMA))
                }
                old |= {*extra.values()}
                folders = sorted({f"{path.split('/')[0]}/" for path in extra})
                removed = [CommitOperationDelete(folder, is_folder=True) for folder in folders]
                removed.append(CommitOperationDelete(CHECKSUMS))
                message = f"Weights only: the optimizer's state is in {newest}"
                self.api.create_commit(self.repo, removed, commit_message=message, revision=branch)
                self.api.super_squash_history(self.repo, branch=branch)  # else the history keeps what was deleted
                heads.pop(branch)
        # Equal files of other revisions stay.
        if old and (old := old.difference(*(stored(head).values() for head in heads))):
            # Named one by one by what was just taken out: nothing else can be hit.
            unused = [file for file in self.api.list_lfs_files(self.repo) if file.file_oid in old]
            self.api.permanently_delete_lfs_files(self.repo, unused, rewrite_history=False)
        write_json(log, {**repos, self.repo: ours})

    def _queue(self) -> list[Path]:
        """What is queued and may be sent, by step."""
        return [path for _, path in list_steps(self.uploads) if path.name not in self._refused]

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            print(f"upload: {scrub(message)}", file=sys.stderr, flush=True)


def _inodes(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.lstat().st_ino for path in folder.rglob("*") if path.is_file()}


def _link_tree(source: Path, target: Path) -> None:
    """Copy a directory by hard links, where the filesystem has them; the copy appears by one rename.

    Raises: InputError for symbolic links.
    """
    refuse_links(source)
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, copy_function=link)
    target.unlink() if target.is_symlink() else shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


# --- back from the Hub -----------------------------------------------------------------------------------------------


def fetch_checkpoint(name: str, into: str | Path) -> Path:
    """`hub:user/name[@revision]` -> a local directory with model, optimizer and data state, ready to be resumed from.

    Without a revision it takes the newest one that holds the optimizer's state. In a distributed run every rank calls
    it, and rank 0 downloads.

    Raises: InputError where there is no such repository or revision, or it holds weights only.
    """
    return from_rank_zero(lambda: _fetch_checkpoint(name, Path(into)))


def _fetch_checkpoint(name: str, into: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = name.removeprefix("hub:").partition("@")
    if not REPO_ID.fullmatch(repo):
        raise InputError(f"{name!r} should be hub:user/name or hub:user/name@revision")
    api = HfApi(library_name="gpt2repro")
    try:
        refs = api.list_repo_refs(repo)
        commits = {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}
        steps = {int(match[1]): ref for ref in commits if (match := STEP_BRANCH.fullmatch(ref))}
        wanted = [revision] if revision else [steps[step] for step in sorted(steps, reverse=True)] + ["main"]
        for candidate in wanted:
            commit = commits.get(candidate, candidate)
            if api.file_exists(repo, STATE, revision=commit):
                break
        else:
            known = ", ".join(steps[step] for step in sorted(steps)) or "none"
            asked = f"revision {revision} of {repo}" if revision else repo
            raise InputError(
                f"{asked} holds no optimizer state to resume from (steps there: {known}; only the newest keeps it). "
                f"To begin a new run from its weights: --init_from {repo}"
            )
        place = into / f"{repo.replace('/', '--')}-{commit[:12]}"
        if (place / CHECKSUMS).is_file():  # an earlier start of this command fetched it
            with contextlib.suppress(InputError):
                verify_checkpoint(place)
                return place
        print(f"fetching {repo}@{candidate} …", file=sys.stderr, flush=True)
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                snapshot_download(repo, revision=commit, local_dir=place)  # continues what is there already
                break
            except Exception as error:
                if is_final(error) or attempt == FETCH_ATTEMPTS:
                    raise
                time.sleep(FIRST_WAIT_SECONDS * attempt)
    except Exception as error:
        raise InputError(explain(error, f"{repo}@{revision}" if revision else repo)) from None
    shutil.rmtree(place / ".cache", ignore_errors=True)  # the download's own notes, which are no checkpoint's
    return place


# --- the same weights as a plain gpt2 --------------------------------------------------------------------------------


def publish_native(api, repo: str, source: Path, model, cards: Callable[..., dict[str, bytes]]) -> None:
    """Export `source`, compare the result with `model`, publish it as branch `native`.

    `cards(source, native=True)` gives the files that describe the model.

    Raises: InputError where the two do not agree.
    """
    checkpoint_files(source)  # verifies it
    with tempfile.TemporaryDirectory() as work:
        directory = export_native(source, Path(work) / "native")
        check_native(directory, model)
        files = checkpoint_files(directory) | cards(source, native=True)
        publish(api, repo, files, revision="native", message="The same weights as a plain gpt2")
