"""Checkpoints and models to and from the Hugging Face Hub, so that no fault of a network ever reaches the training.

    runs/x/checkpoints/step_5000 --hard links--> runs/x/uploads/step_005000 --thread--> branch step-5000, branch main
                                                                                        branch native: a plain gpt2

* Every revision is one commit: a reader sees a checkpoint whole or not at all.
* `main` is the run's best checkpoint (the newest one, where nothing was evaluated), without the optimizer.
* The optimizer's state lies in the newest `step-N` only; `fetch_checkpoint` finds it there.
* Repositories are private unless asked for. The token comes from HF_TOKEN or the cached login and is never printed.

Large files travel by Xet where the client has it, else by git LFS. Owns the network's errors: what leaves this module
is an InputError or a sentence. Models come in as arguments; knows no training loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from gpt2repro.checkpoint.layout import STEP_NAME, list_steps, resolve_pointer
from gpt2repro.checkpoint.reader import verify_checkpoint
from gpt2repro.options import InputError
from gpt2repro.publishing.model_card import card_files
from gpt2repro.training.tracking import scrub

TRAINER_STATE = "trainer_state"
STEP_BRANCH = re.compile(r"step-(\d+)")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
KEPT_BY_THE_HUB = (".gitattributes",)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 2.0, 300.0  # between attempts; doubled each time, with jitter
LONGEST_FETCH_HOURS = 6  # 19 GB of the 1558M over a slow line
FETCH_ATTEMPTS = 5  # whoever resumes is waiting: a broken line is mended, a Hub that is down is reported
FINAL_STATUS = {400, 401, 402, 403, 404, 413, 422}  # asking again will not change the answer
NATIVE_TOLERANCE = 1e-4  # |logit difference| in fp32; the two classes do the same sums in another order


# --- one repository --------------------------------------------------------------------------------------------------


def open_repo(repo: str, *, private: bool = True, kind: str = "model", **create):
    """The client, after making sure that somebody is logged in and that the repository is there to be written.

    Raises: InputError where the name, the login or the permission is wrong, or the Hub cannot be reached.
    """
    try:
        return _connect(repo, private=private, kind=kind, **create)
    except Exception as error:
        raise InputError(explain(error, repo)) from None


def _connect(repo: str, *, private: bool, kind: str = "model", **create):
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
    """Make `revision` (a branch, created where missing) consist of `files`: one commit. Returns the commit's id.

    What is there already is not sent again, so a repeated call costs little.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if revision != "main":
        api.create_branch(repo, branch=revision, repo_type=kind, exist_ok=True)
    present = set(api.list_repo_files(repo, revision=revision, repo_type=kind))
    operations: list = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(content) if isinstance(content, Path) else content)
        for name, content in sorted(files.items())
    ]
    operations += [CommitOperationDelete(name) for name in sorted(present - set(files) - set(KEPT_BY_THE_HUB))]
    # create_commit, not upload_folder: with Xet the latter makes several commits, and a reader could meet half a model.
    return api.create_commit(repo, operations, commit_message=message, revision=revision, repo_type=kind).oid


def checkpoint_files(directory: str | Path, *, with_trainer_state: bool) -> dict[str, Path | bytes]:
    """Path in the repository -> file, of a checkpoint or any model directory.

    The checksums cover the trainer's state, so they go with it; the Hub has its own.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(Path(directory).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(directory).parts):
            continue
        if not with_trainer_state and (name.startswith(f"{TRAINER_STATE}/") or name == "checksums.json"):
            continue
        files[name] = path
    return files


def explain(error: BaseException, repo: str) -> str:
    """What went wrong and what to do, in one sentence and without any token."""
    if isinstance(error, InputError):
        return str(error)
    status = _status(error)
    hub = os.environ.get("HF_ENDPOINT", "the Hub")
    if type(error).__name__ in ("LocalTokenNotFoundError", "NoTokenError"):
        return f"nobody is logged in to {hub}: set HF_TOKEN, or run `hf auth login`, with a token that may write"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if status == 401:
        return f"{hub} does not accept the token (401): run `hf auth login` with one that may write to {repo}"
    if status in (402, 403):
        return f"{hub} refuses this ({status}): the token may not write to {repo}, or its plan does not include it"
    if status == 404:
        return f"{hub} has no {repo} (404), or the token may not see it"
    if status == 429:
        return f"{hub} asks to slow down (429) while writing to {repo}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was deleted while it was being sent"
    reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:400]
    if status is not None:
        return scrub(f"{hub} answers {status} for {repo}: {reason}")
    return scrub(f"{hub} could not be reached for {repo}: {type(error).__name__}: {reason}")


def is_final(error: BaseException) -> bool:
    """Whether trying again is pointless: a refusal, or a mistake of ours; not a busy Hub or a broken line."""
    names = ("InputError", "LocalTokenNotFoundError", "NoTokenError", "OfflineModeIsEnabled", "HFValidationError")
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
    """Publishes a run's checkpoints from a thread of its own. Nothing it meets is ever raised into the training.

        uploader = Uploader("user/name", run_dir=run_dir)        # InputError here, before the first step
        uploader.checkpoint(path)                                # returns at once; the files may be deleted afterwards
        missing = uploader.close(timeout=600)                    # sentences about what did not arrive

    A checkpoint that waits lies in `run_dir/uploads` as hard links. One that a fault or the end of the process leaves
    there is sent by the next Uploader of the same run: the same training command, or `gpt2repro push`.

    `comparable` loads a checkpoint with our class in fp32 on the CPU; given it, `close` publishes the native twin of
    `main` as well. `card` holds further arguments of `card_files`.
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
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ):
        from huggingface_hub.utils import disable_progress_bars, logging

        self.repo, self.run_dir, self.private = repo, Path(run_dir), private
        self.published: list[str] = []  # revisions that arrived, in order
        self._card, self._comparable = dict(card or {}), comparable
        self._first_wait = first_wait_seconds
        self._said: set[str] = set()
        self._errors: dict[str, str] = {}  # name of what waits -> why it has not arrived
        self._stripped: set[str] = set()  # branches known to hold no trainer state
        self._wake = threading.Condition()
        self._closing_at: float | None = None  # the deadline, once close() was called
        logging.set_verbosity_error()  # its warnings are about attempts that fail; this class says what comes of them
        if quiet:
            disable_progress_bars()  # they would run through the training's own
        self.api = None
        try:
            self.api = _connect(repo, private=private)
        except Exception as error:
            if is_final(error):
                raise InputError(explain(error, repo)) from None
            self._say(f"{explain(error, repo)}. Training starts all the same; uploads follow when it answers")
        for left_over in self.uploads.glob(".*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        self._news = bool(self._waiting())
        # A daemon, so that an interpreter that dies without close() does not hang on a network.
        self._thread = threading.Thread(target=self._work, name="hub-uploader", daemon=True)
        self._thread.start()

    @property
    def uploads(self) -> Path:
        return self.run_dir / "uploads"

    def checkpoint(self, path: str | Path) -> None:
        """Queue a written checkpoint. Called by the main process only, from whichever thread."""
        path = Path(path)
        try:
            _link_tree(path, self.uploads / path.name)
        except OSError as error:
            self._say(f"{path.name} cannot be queued for upload: {error.strerror or error}")
            self._errors[path.name] = f"not queued: {error.strerror or error}"
            return
        with self._wake:
            self._errors.pop(path.name, None)
            self._news = True
            self._wake.notify()

    def close(self, timeout: float | None = None) -> list[str]:
        """Finish what waits, for at most `timeout` seconds; returns one sentence per checkpoint that did not arrive."""
        with self._wake:
            self._closing_at = time.monotonic() + (timeout if timeout is not None else float("inf"))
            self._wake.notify()
        self._thread.join(timeout)
        waiting = [path.name for path in self._waiting()]
        missing = [f"{name} is not on the Hub: {self._errors.get(name, 'still being sent')}" for name in waiting]
        missing += [f"{name} is not on the Hub: {why}" for name, why in self._errors.items() if name not in waiting]
        if missing:
            again = f"gpt2repro push --model {self.run_dir} --repo {self.repo}"
            self._say("; ".join(missing) + f". Send it later: {again}")
        return missing

    def _work(self) -> None:
        """The thread: send what waits; after a fault try again, each time later, after a refusal wait for news."""
        wait = self._first_wait
        while True:
            with self._wake:
                while not self._news and self._closing_at is None:
                    self._wake.wait()
                self._news = False
            error = self._send_what_waits()
            with self._wake:
                closing = self._closing_at is not None
                if error is None:
                    wait = self._first_wait
                    if closing and not self._waiting():
                        return
                elif is_final(error):
                    if closing:
                        return
                else:
                    pause = wait * random.uniform(0.5, 1.5)  # jitter: many runs meet one busy Hub
                    if closing and time.monotonic() + pause > self._closing_at:
                        return
                    self._wake.wait(pause)
                    wait, self._news = min(2 * wait, LONGEST_WAIT_SECONDS), True

    def _send_what_waits(self) -> Exception | None:
        """Oldest first, up to the first fault: the others would fare alike, and the newest has to come last."""
        name = ""
        try:
            for staged in self._waiting():
                name = staged.name
                self._publish(staged)
                self._errors.pop(name, None)
            closing = self._closing_at is not None and time.monotonic() < self._closing_at
            if closing and self._comparable is not None and not self._waiting():
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
            self.api = _connect(self.repo, private=self.private)
        return self.api

    def _best(self) -> Path | None:
        """The checkpoint that belongs on `main`."""
        checkpoints = self.run_dir / "checkpoints"
        return resolve_pointer(checkpoints, "best") or resolve_pointer(checkpoints, "latest")

    def _publish(self, staged: Path) -> None:
        """One checkpoint: its branch, then `main`, then room where the optimizer's state has become old."""
        api = self._connected()
        step = int(STEP_NAME.fullmatch(staged.name)[1])
        branch, inode = f"step-{step}", staged.stat().st_ino
        newest = staged == self._waiting()[-1]
        files = checkpoint_files(staged, with_trainer_state=newest)
        publish(api, self.repo, files | self._cards(staged), revision=branch, message=f"Step {step}")
        best = self._best() or staged
        files = checkpoint_files(best, with_trainer_state=False) | self._cards(best)
        publish(api, self.repo, files, revision="main", message=f"{best.name.replace('_', ' ')} of the run")
        self.published.append(branch)
        if newest:
            self._stripped.discard(branch)
            try:
                self._strip_older(branch)
            except Exception as error:  # costs space, loses nothing
                self._say(f"older optimizer states stay on the Hub for now: {explain(error, self.repo)}")
        if staged.stat().st_ino == inode:  # else a rewound run has saved this step anew meanwhile
            shutil.rmtree(staged)

    def _cards(self, directory: Path, *, native: bool = False) -> dict[str, bytes]:
        return card_files(directory, repo=self.repo, run_dir=self.run_dir, native=native, **self._card)

    def _strip_older(self, newest: str) -> None:
        """Take the optimizer's state out of every other step's branch, and its files out of the Hub's storage."""
        from huggingface_hub import CommitOperationDelete

        def stored(branch: str) -> set[str]:
            entries = self.api.list_repo_tree(self.repo, TRAINER_STATE, revision=branch)
            return {entry.lfs.sha256 for entry in entries if getattr(entry, "lfs", None)}

        branches = {ref.name for ref in self.api.list_repo_refs(self.repo).branches if STEP_BRANCH.fullmatch(ref.name)}
        old: set[str] = set()
        for branch in sorted(branches - self._stripped - {newest}):
            if self.api.file_exists(self.repo, f"{TRAINER_STATE}/state.json", revision=branch):
                old |= stored(branch)
                removed = [
                    CommitOperationDelete(f"{TRAINER_STATE}/", is_folder=True),
                    CommitOperationDelete("checksums.json"),
                ]
                message = f"Weights only: the optimizer's state is in {newest}"
                self.api.create_commit(self.repo, removed, commit_message=message, revision=branch)
                self.api.super_squash_history(self.repo, branch=branch)  # else the history keeps what was deleted
            self._stripped.add(branch)
        if old := old - stored(newest):
            # Named one by one by what was just taken out: nothing else can be hit.
            unused = [file for file in self.api.list_lfs_files(self.repo) if file.file_oid in old]
            self.api.permanently_delete_lfs_files(self.repo, unused, rewrite_history=False)

    def _waiting(self) -> list[Path]:
        """What is queued, by step."""
        return [path for _, path in list_steps(self.uploads)]

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            print(f"upload: {scrub(message)}", file=sys.stderr, flush=True)


def _link_tree(source: Path, target: Path) -> None:
    """A copy of a directory that costs no space where the filesystem has hard links; appears by one rename."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = aside / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(path, place)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem, or one without hard links
        shutil.copy2(source, target)


# --- back from the Hub -----------------------------------------------------------------------------------------------


def fetch_checkpoint(name: str, into: str | Path) -> Path:
    """`hub:user/name[@revision]` -> a local directory with model, optimizer and data state, ready to be resumed from.

    Without a revision the newest one that holds the optimizer's state is taken. In a distributed run every rank calls
    it; rank 0 downloads.

    Raises: InputError where there is no such repository or revision, or it holds weights only.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return _fetch_checkpoint(name, Path(into))
    # The other ranks wait for the download, and NCCL would give up after 10 minutes.
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=LONGEST_FETCH_HOURS))
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = _fetch_checkpoint(name, Path(into))
        except InputError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=patient)
    if answer[1]:
        raise InputError(answer[1])
    return answer[0]


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
            if api.file_exists(repo, f"{TRAINER_STATE}/state.json", revision=commit):
                break
        else:
            known = ", ".join(steps[step] for step in sorted(steps)) or "none"
            where = f"revision {revision} of {repo}" if revision else repo
            raise InputError(
                f"{where} holds no optimizer state to resume from (steps there: {known}; only the newest keeps it). "
                f"To begin a new run from its weights: --init_from {repo}"
            )
        place = into / f"{repo.replace('/', '--')}-{commit[:12]}"
        if (place / "checksums.json").is_file():  # an earlier start of this command fetched it
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
    except InputError:
        raise
    except Exception as error:
        raise InputError(explain(error, f"{repo}@{revision}" if revision else repo)) from None
    shutil.rmtree(place / ".cache", ignore_errors=True)  # the download's own notes, which are no checkpoint's
    return place


# --- the same weights as a plain gpt2 --------------------------------------------------------------------------------


def export_native(source: str | Path, target: str | Path) -> Path:
    """A directory of ours -> one of type `gpt2` that needs no remote code: same weights file, rewritten config.json.

    `n_ctx` is not read by transformers any more, but by llm.cpp-like converters (llama.cpp).

    Raises: InputError where `source` is no model of ours or `target` is not empty.
    """
    source, target = Path(source), Path(target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in ("gpt2repro", "gpt2"):
        raise InputError(f"{source} is a model of type {config.get('model_type')!r}; only gpt2repro can become gpt2")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; choose another directory for the native export")
    target.mkdir(parents=True, exist_ok=True)
    config.pop("auto_map", None)
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": config["n_positions"]}
    for name, path in checkpoint_files(source, with_trainer_state=False).items():
        assert isinstance(path, Path), "a checkpoint's files are files"
        if "/" not in name and path.suffix in (".safetensors", ".json", ".txt", ".model") and name != "config.json":
            _link(path, target / name)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def check_native(directory: str | Path, model) -> float:
    """Largest |logit difference| between the native directory in plain transformers and our `model` (fp32, CPU).

    Raises: InputError where they do not compute the same: then nothing should be published.
    """
    import torch
    from transformers import GPT2LMHeadModel

    native, report = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    problems = [f"{kind}: {sorted(map(str, names))[:3]}" for kind, names in report.items() if names]
    T, V = min(64, model.config.n_positions), model.config.vocab_size
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model.eval()(ids).logits, native.eval()(ids).logits
    difference = float((expected - found).abs().max())
    if problems or not difference <= NATIVE_TOLERANCE * max(1.0, float(expected.abs().max())):
        detail = "; ".join(problems) or f"logits differ by {difference:.2e}"
        raise InputError(f"the native export does not compute what the model computes ({detail}); it is not published")
    return difference


def publish_native(api, repo: str, source: Path, model, cards: Callable[..., dict[str, bytes]]) -> float:
    """Export `source`, compare the result with `model`, publish it as branch `native`; returns the largest difference.

    `cards(source, native=True)` gives the files that describe it. Raises: InputError where the two do not agree.
    """
    with tempfile.TemporaryDirectory() as work:
        directory = export_native(source, Path(work) / "native")
        difference = check_native(directory, model)
        files = checkpoint_files(directory, with_trainer_state=False) | cards(source, native=True)
        publish(api, repo, files, revision="native", message="The same weights as a plain gpt2")
    return difference
