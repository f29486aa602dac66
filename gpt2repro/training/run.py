"""A training run around its steps: lock, log, checkpoints, health, status; opened and closed together.

    with Run(config, accelerator, model, optimizer, source, fetch=fetch_checkpoint) as run:
        … one step …            run.state.step += 1
        verdict = run.record(meter.read())          log, judge, show
        run.evaluate(); run.save()                  metrics, samples; a checkpoint, written by a thread
    return run.exit_code

Owns the run's directory and state. Knows neither how a step is made nor which data or model it uses.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout

from gpt2repro.checkpoint.layout import EMA, POINTERS, from_all_ranks
from gpt2repro.checkpoint.reader import find_checkpoint
from gpt2repro.checkpoint.restore import restore
from gpt2repro.checkpoint.writer import CheckpointWriter
from gpt2repro.data.mixture import same_recipe
from gpt2repro.data.ordering import skip_ahead
from gpt2repro.data.sources import merge_states, prefetch
from gpt2repro.files import atomic_file, read_json_if_whole, sha256_of, step_in_name
from gpt2repro.models import ARCHITECTURE
from gpt2repro.options import InputError, say, to_yaml
from gpt2repro.redaction import scrub
from gpt2repro.training import console
from gpt2repro.training.averaging import WeightAverage
from gpt2repro.training.evaluator import Evaluator
from gpt2repro.training.health import HealthMonitor, Verdict
from gpt2repro.training.machine import environment, origin_of_bits
from gpt2repro.training.meter import flops_per_token_of
from gpt2repro.training.planning import doubts, micro_batch_of_run
from gpt2repro.training.plotting import draw_runs
from gpt2repro.training.reference import Referee
from gpt2repro.training.state import Best, HeldRecipe, Identity, RunState, find_resume, load_run_state
from gpt2repro.training.stopping import StopSignal, lost_a_process, said_to_the_user
from gpt2repro.training.tracking import RunLog

# Options that change a gradient's last bits, and nothing else, beside those that Run resolves.
DECIDE_BITS = ("micro_batch_size", "attn_implementation", "loss_chunk_tokens", "bf16_residual", "deterministic")
BATCHES_AHEAD = 4  # made in a thread while the device computes
# Seconds that a finished run waits for uploads. A stopped run does not wait; the next start sends them.
UPLOAD_SECONDS_AT_EXIT = 1800
EXIT_DONE, EXIT_STOPPED, EXIT_BAD_NUMBERS = 0, 3, 4


class Run:
    """A context manager, used as the module shows. Every rank opens a Run; only the main rank writes files.

    `compiled` is how the model was (model, block, off), `fetch(place, directory)` brings a checkpoint from the Hub.
    `state` changes from step to step. `uploader` (None: no uploads) is set by whoever opens the run.

    Raises: InputError where another process trains in the directory, or its checkpoints belong to another run.
    """

    def __init__(
        self, config, accelerator, model, optimizer, source, *, compiled: str, fetch: Callable[[str, Path], Path]
    ):
        self.config, self.accelerator, self.source = config, accelerator, source
        self.model, self.optimizer = model, optimizer
        self.plain_model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.uploader = None
        self.exit_code: int | None = None
        self._hurried, self._saved = False, None  # the last checkpoint's step and place in the data
        self._fetch, self._compiled = fetch, compiled
        self._at_exit = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        config, is_main = self.config, self.accelerator.is_main_process
        with contextlib.ExitStack() as opened:  # closed again where the opening fails
            if is_main:
                lock = lock_run(config.run_dir)
                opened.callback(lock.release)
            self.writer = CheckpointWriter(
                config.run_dir / "checkpoints", keep_last=config.keep_last, milestone_steps=config.milestone_steps
            )
            self.monitor = HealthMonitor(
                config.on_bad_numbers,
                window=config.spike_window,
                z_threshold=config.spike_z,
                max_rewinds=config.max_rewinds,
            )
            self.identity = self._identity()
            for name, size in self.identity["architecture"].items() if config.init_from is not None else ():
                setattr(config, name, size)  # config.yaml, the trackers and the card state the given model's sizes
            self.evaluator = Evaluator(config, self.accelerator, self.model, self.source)
            self.average = WeightAverage(self.plain_model, config.ema_decay) if config.ema_decay else None
            checkpoint = find_resume(config.run_dir, config.resume, fetch=self._fetch, is_main=is_main)
            self.state = RunState(identity=self.identity, source=self.source.initial_state())
            if checkpoint is not None:
                self._restore(checkpoint)
                if self.state.step > config.max_steps:
                    raise InputError(
                        f"{checkpoint} has made {self.state.step} steps, more than max_steps={config.max_steps}; raise "
                        "--max_steps, or go back to an earlier checkpoint with --resume"
                    )
                self.source.check_digests(self.state.digests)
                if config.cooldown_from is not None and self.state.parent is None:
                    digest = sha256_of(checkpoint / "checksums.json")
                    self.state.parent = {"checkpoint": str(checkpoint), "step": self.state.step, "sha256": digest}
                    self.state.best = self.state.run_ids = None  # the branch is a run of its own
            self.state.digests = self.source.digests()
            self._note_recipe()
            if self.source.sources:
                left = (config.max_steps - self.state.step) * (config.batch_tokens // config.seq_len)
                self.source.check_length(self.state.source["position"] + left)
            if config.micro_batch_size is None:
                kept = self.state.micro_batch_size
                config.micro_batch_size = micro_batch_of_run(config, self.accelerator, self.plain_model, kept)
            options = yaml.safe_load(to_yaml(config))
            shown = options | {"n_params": self.plain_model.num_parameters()}
            shown |= {"processes": self.accelerator.num_processes}
            shown |= {"recipes": self.state.recipes} if self.state.recipes else {}
            self.log = RunLog(
                config.run_dir,
                config=shown,
                trackers=config.trackers,
                project=config.project,
                run_ids=self.state.run_ids,
                resume_step=self.state.step if checkpoint is not None else None,
                is_main=is_main,
                begins=(self.state.parent or {}).get("step", 0),
            )
            opened.callback(self.log.close)
            if is_main:
                self._write_config()
                step = self.state.step
                print(console.opening(config, self.accelerator, self.source, self.plain_model, checkpoint, step))
                tokens, epoch = config.max_steps * config.batch_tokens, self.source.tokens_per_epoch
                work = flops_per_token_of(self.plain_model, config.seq_len) * tokens
                for doubt in doubts(config, tokens / epoch if epoch else None, work):
                    say(f"warning: {doubt}")
            self._referee = Referee(options, self.source.manifest)
            self._console = console.Console(total=config.max_steps, step=self.state.step, shown=is_main)
            opened.callback(self._console.close)
            from_all_ranks()  # the first one opens the log and the trackers: no wait for the training's own group
            self._at_exit = opened.pop_all()
        self._log_recipe()
        self.log.status("running", self.state.step)
        return self

    def _identity(self) -> Identity:
        """What a resumed run must have in common with the run that it continues: see `refuse_another_run`."""
        config = self.config
        identity: Identity = {
            "data": self.source.identity(),
            "batch_tokens": config.batch_tokens,
            "optimizer": config.optimizer,
            "architecture": {name: getattr(self.plain_model.config, name) for name in ARCHITECTURE},
        }
        if config.documents == "mask":
            identity["documents"] = config.documents
            if self.source.tokenizer.eos_token_id is None:
                raise InputError("documents=mask needs a tokenizer with an end-of-text token; name it: --tokenizer")
        if config.reduction == "fixed":  # what else decides the bits; the number of processes does not
            precision = config.precision if config.precision == "fp64" else self.accelerator.mixed_precision
            identity["reduction"] = {
                **{name: getattr(config, name) for name in DECIDE_BITS},
                "compile": self._compiled,
                "precision": "fp32" if precision == "no" else precision,
                "OMP_NUM_THREADS": torch.get_num_threads(),
            }
            machine = ", ".join(sorted({*from_all_ranks(origin_of_bits(self.accelerator.device))}))
            identity["machines"] = [machine]
        return identity

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        """Close everything; an error also goes into status.json, since launchers hide exit codes.

        Raises: InputError in place of an error that a sentence explains better than a traceback.
        """
        with self._at_exit:
            if error is None:
                return
            if lost_a_process(error):
                message = "another process of this run is gone; the same command goes on from the last checkpoint"
                known = read_json_if_whole(self.config.run_dir / "status.json") or {}
                if known.get("state") != "failed":  # the process that failed knows better why
                    self.log.status("failed", self.state.step, 1, message)
                say(f"error: {message}")
                raise SystemExit(1) from None
            sentence = said_to_the_user(error)
            message = f"{type(error).__name__}: {error}" if sentence is None else str(sentence)
            if not self.accelerator.is_main_process:  # the main rank only learns that a process has gone
                message = f"rank {self.accelerator.process_index}: {message}"
            self.log.failed(self.state.step, 1 if sentence is None else 2, message)
            if sentence is not None and sentence is not error:
                raise sentence from error

    def batches(self):
        """This rank's batches from the current position on, made ahead of time in a thread."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        sequences = self.config.batch_tokens // self.config.seq_len
        batches = self.source.batches(self.state.source, rank=rank, world=world, sequences=sequences)
        made_ahead = prefetch(batches, BATCHES_AHEAD, pin_memory=self.accelerator.device.type == "cuda")
        self._at_exit.callback(made_ahead.close)
        return made_ahead

    def record(self, steps: list[dict]) -> Verdict | None:
        """Log, judge and show the steps that the meter has read; returns the verdict where steps were bad."""
        if not steps:
            return None
        for step in steps:
            if nats := step.pop("row_nats", None):
                before = self.state.source | {"position": step["positions"][0]}
                step |= self.source.mean_losses(before, nats)
            self.log.log({name: value for name, value in step.items() if name != "positions"})
        if (verdict := self.monitor.judge(steps)) is not None:
            self.log.log(verdict.record())
            self._console.say(f"{verdict.action}: {bad_steps(verdict)}")
        last = steps[-1]
        seconds = last["step_seconds"] * len(steps)
        self.state.seconds += seconds
        if self.state.device_seconds is not None:
            self.state.device_seconds += seconds * self.accelerator.num_processes
        self._console.progress(last["step"], last["loss"], last["tokens_per_second"])
        self.log.status("running", last["step"])
        return verdict

    def is_over(self) -> bool:
        """Whether no step is left: `max_steps` are done, or `stop_when_val_rises` says so. The same on all ranks."""
        patience, best = self.config.stop_when_val_rises, self.state.best or {}
        return self.state.step >= self.config.max_steps or best.get("rises", 0) >= (patience or math.inf)

    def evaluate(self) -> dict:
        """Measure the model as it is now; log, compare with the reference, keep samples. Every rank calls it."""
        step, best = self.state.step, self.state.best
        record = {"step": step, **self.evaluator.measure()}
        if self.config.stop_when_val_rises and "val_loss" not in record:
            raise InputError(
                "stop_when_val_rises needs a validation split, and the data has none; prepare it with a larger "
                "--val_fraction, or name another one's with --val_data"
            )
        if self.config.stop_when_val_rises and best is not None:
            best["rises"] = 0 if record["val_loss"] <= best["val_loss"] else best.get("rises", 0) + 1  # NaN is a rise
            record["val_rises"] = best["rises"]
        if self.average is not None:
            with self.average.in_place():
                record |= self.evaluator.measure_average()
        if len(record) > 1:
            self.log.log(record)
            comment = self._referee.comment(step, record["val_loss"]) if "val_loss" in record else None
            self._console.say(console.evaluation_line(record) + (f" | {comment}" if comment else ""))
        if samples := self.evaluator.samples():
            self.log.samples(step, samples)
        from_all_ranks()  # the samples are the first one's alone
        return record

    def save(self, val_loss: float = math.inf) -> None:
        """Start writing a checkpoint of this step, which becomes `best` if `val_loss` is the lowest so far."""
        state, scaler = self.state, self.accelerator.scaler
        self._saved = state.step, state.source
        # NaN compares false, so a diverged model never becomes `best`.
        if val_loss < (state.best["val_loss"] if state.best else math.inf):
            state.best = Best(step=state.step, val_loss=val_loss)
        state.run_ids, state.micro_batch_size = self.log.run_ids, self.config.micro_batch_size
        state.scaler = scaler.state_dict() if scaler is not None else None
        state.health = self.monitor.state()
        state.environment = environment(self.accelerator)
        optional = ("digests", "parent", "recipes", "device_seconds")
        content = state.model_dump(exclude={name for name in optional if not getattr(state, name)})
        content["source"] = merge_states(from_all_ranks(state.source))  # a stream's ranks each know their own lanes
        average = {}
        if self.average is not None:
            made = {"kind": "ema", "decay": self.config.ema_decay, "step": state.step}
            average = {"averages": self.average.averages, "extra_files": {f"{EMA}average.json": json.dumps(made)}}
        self.writer.save(
            state.step,
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=self.source.tokenizer,
            state=content,
            on_written=self._written,
            **average,
        )
        if state.best is not None and state.best["step"] == state.step:
            self.writer.point("best", state.step)

    def rewind(self, verdict: Verdict) -> bool:
        """Return to the newest checkpoint before the bad steps and skip their data; False without a checkpoint."""
        self.writer.wait()  # first: the save that is under way may be that checkpoint, and it deletes older ones
        checkpoint = find_checkpoint(self.config.run_dir, all_ranks=True, at_most=verdict.first_step - 1)
        if checkpoint is None:
            return False
        self._restore(checkpoint, rewinding=True)
        self.state.source = skip_ahead(self.state.source, verdict.start, verdict.stop)
        self.log.rewind(self.state.step)
        if self.state.recipes:
            self._write_config()
            self._log_recipe()
        # Logged at the first new step: a resume from an earlier step makes the bad steps again and logs them again.
        self.log.log(verdict.record() | {"step": self.state.step + 1})
        self._console.back_to(self.state.step)
        return True

    def finish(self, verdict: Verdict | None, stop: StopSignal) -> None:
        """End the run, or this process' part of it: last checkpoint, uploads, status and exit code.

        `verdict` is given where bad numbers ended the run. A signal ends the wait for uploads; the next start or
        `gpt2repro push` sends the rest.
        """
        config, state, done = self.config, self.state, self.is_over()
        if verdict is None and not done:
            self._hurried = True
            if self._saved != (state.step, state.source):
                self.save()
        elif verdict is None:
            self.writer.point("final", state.step)
        self.writer.close()
        self._console.close()
        missing: list[str] = []
        if self.uploader is not None:
            waiting = ", ".join(self.uploader.waiting())
            message = f"training has ended; uploading {waiting}" if waiting else ""
            self.log.status("running", state.step, message=message)
            seconds = UPLOAD_SECONDS_AT_EXIT if done else 0
            missing = self.uploader.close(timeout=seconds, stop=lambda: stop.received)
        if verdict is not None:
            advice = "try a lower lr" + (", or --on_bad_numbers rewind" if config.on_bad_numbers != "rewind" else "")
            if verdict.action == "rewind":
                advice = "there is none to rewind to: lower the lr, or --save_steps"
            message = f"{bad_steps(verdict)}; the checkpoints before are kept; {advice}"
            self._end(EXIT_BAD_NUMBERS, "failed", message, file=sys.stderr)
        elif not done:
            message = f"stopped by {stop.name} after step {state.step}; the same command continues from there"
            self._end(EXIT_STOPPED, "stopped", message)
        else:
            if self.accelerator.is_main_process:
                self._draw()
            shown = console.closing(config, self.source, state.step)
            if state.step < config.max_steps:
                why = "val_loss was above its lowest, {val_loss:.4f} after step {step}, in {rises} evaluations in a row"
                early = f"ended after step {state.step}: {why.format(**state.best)}; `best` is the lowest"
                missing, shown = [early, *missing], f"\n{early}{shown}"
            self._end(EXIT_DONE, "done", "; ".join(missing), shown=shown)

    def _end(self, code: int, state: str, message: str, *, shown: str | None = None, file=None) -> None:
        self.exit_code = code
        self.accelerator.print(message if shown is None else shown, file=file)
        self.log.status(state, self.state.step, code, message)

    def _restore(self, checkpoint: Path, *, rewinding: bool = False) -> None:
        """Restore everything that `checkpoint` holds, and discard the checkpoints of later steps."""
        self.state = load_run_state(checkpoint, self.identity)
        state, processes = self.state, self.accelerator.num_processes
        if state.device_seconds is None and (before := state.environment.get("processes", processes)) != processes:
            state.device_seconds = state.seconds * before
        if "machines" in self.identity:
            (here,) = self.identity["machines"]
            machines = self.state.identity.setdefault("machines", [here])
            if machines[-1] != here:
                if self.accelerator.is_main_process:
                    say(
                        f"warning: {checkpoint} was made by {machines[-1]}, and this is {here}: from here on the last "
                        "bits may differ, and with them the run"
                    )
                machines.append(here)  # the next checkpoints say so
        restore(checkpoint, self.model, self.optimizer)
        if self.average is not None and (checkpoint / EMA).is_dir():
            with self.average.in_place():
                restore(checkpoint / EMA, self.model)
        elif self.average is not None:  # the run had none until here
            self.average.restart()
        if self.state.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        self.monitor.load_state(self.state.health, rewinding=rewinding)
        self.writer.discard_after(self.state.step)
        if self.state.best is not None:
            self.writer.point("best", self.state.best["step"])
            if self.config.stop_when_val_rises is None:  # were it given again later, the count would be an old one
                self.state.best.pop("rises", None)
        if rewinding:
            self._note_recipe()

    def _note_recipe(self) -> None:
        """Keep a recipe that the state has not; `best` was of another mixture, with which nothing compares."""
        if not self.source.sources:
            return
        state, data = self.state, self.identity["data"]
        state.recipes = state.recipes or [HeldRecipe(step=0, position=0, data=state.identity["data"])]
        if not same_recipe(state.recipes[-1]["data"], data):
            state.recipes.append(HeldRecipe(step=state.step, position=state.source["position"], data=data))
            if self.config.val_data is None:
                state.best = None
                self.writer.point("best", None)
        state.identity["data"] = data

    def _log_recipe(self) -> None:
        """Log a recipe that begins here, at the first step that it gives: a resume from here logs it again."""
        for recipe in self.state.recipes[-1:]:
            if recipe["step"] == self.state.step:
                self.log.log({**scrub(recipe), "step": recipe["step"] + 1, "event": "recipe"})

    def _write_config(self) -> None:
        """Write config.yaml; the recipes follow as comments, so that it stays a `--config`."""
        if self.accelerator.is_main_process:
            text = to_yaml(self.config)
            if self.state.recipes:
                listed = yaml.safe_dump(scrub(self.state.recipes), sort_keys=False, allow_unicode=True)
                text += "# Recipes that the run has had, each from a step and a position (in windows) on:\n"
                text += "".join(f"# {line}\n" for line in listed.splitlines())
            with atomic_file(self.config.run_dir / "config.yaml") as file:  # half of it would still be valid YAML
                file.write(text)

    def _written(self, checkpoint: Path) -> None:
        """Draw, upload and log a written checkpoint, in the thread that wrote it: the loop does not wait."""
        if not self._hurried:  # by whoever sent a signal and may kill in a moment
            self._draw()
        step, place = step_in_name(checkpoint), str(checkpoint)
        if self.uploader is not None:
            self.uploader.checkpoint(checkpoint)
            place = f"https://huggingface.co/{self.config.push_to_hub}/tree/step-{step}"
        self.log.checkpoint_link(step, place)

    def _draw(self) -> None:
        """Draw the run's picture again; a failure is printed and does not end the run."""
        try:
            draw_runs([self.config.run_dir], self.config.run_dir / "loss.png")
        except Exception as error:
            say(f"loss.png was not drawn: {type(error).__name__}: {error}")


def lock_run(run_dir: Path) -> FileLock:
    """A lock that ends with its process. Raises: InputError where another process already trains this run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    steps = (f"checkpoints/{path.name}" for path in (run_dir / "checkpoints").glob("step_*"))
    kinds = dict.fromkeys(("checkpoints", "samples", *steps), Path.is_dir)
    kinds |= dict.fromkeys((".lock", "config.yaml", "metrics.jsonl", "status.json", "loss.png"), Path.is_file)
    kinds |= {f"checkpoints/{name}": lambda path: path.is_symlink() or path.is_file() for name in POINTERS}
    for name, fits in kinds.items():
        if (run_dir / name).exists() and not fits(run_dir / name):
            what = "directory" if fits is Path.is_dir else "file"
            raise InputError(
                f"{run_dir / name} is no {what}, as a run needs; move it away, or choose another --run_dir"
            )
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is training in {run_dir}; wait for it, or choose another --run_dir"
        ) from None
    return lock


def bad_steps(verdict: Verdict) -> str:
    return f"{verdict.reason} (steps {verdict.first_step} to {verdict.last_step})"
