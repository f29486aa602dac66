"""Train GPT-2 with Accelerate: one configuration, one loop, read from top to bottom.

    accelerate launch train_accelerate.py --config gpt2repro/presets/quickstart.yaml      (2 CPU cores: minutes)
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml train_accelerate.py --data data/fineweb-edu-10B

The defaults are the 124M recipe: 19,073 steps of 524,288 tokens (10B tokens). Expect a loss near 3.28 on FineWeb's
validation set (llm.c measured 3.27 with the same recipe). `python` and `torchrun` start it as well.

    data.open_source ──> (x, y, state_after) ──> micro-batches ──> loss, backward ──> clip, optimizer.step
                                    every log_steps: metrics.jsonl · eval_steps: validation · save_steps: checkpoint

`accelerator.prepare` sees the model and the optimizer only. Not the data, which it would shard a second time; not the
schedule, which it would step once per process: the learning rate is a pure function of the step.

Random numbers are a pure function as well: every step seeds torch with (seed, step, rank), so dropout is the same after
a resume without any generator state being stored, and whatever evaluation draws does not disturb training.

Exit codes: 0 done, 2 bad input, 3 stopped by a signal after saving, 4 the numbers went bad.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gpt2repro.options import InputError, parse_options, run_main, to_yaml

EXIT_DONE, EXIT_STOPPED, EXIT_BAD_NUMBERS = 0, 3, 4
UPLOAD_SECONDS_AT_EXIT = (
    1800  # a finished run waits so long for its uploads; a stopped one leaves them to the next start
)
LARGEST_MODEL = 10**12  # parameters: more is a typing mistake, and building it would fill the memory
ARCHITECTURE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function")


@dataclass
class TrainConfig:
    """Every option of a run. Field = flag = YAML key = tracker column."""

    data: str
    "Token shards to train on: a directory, hf://user/name[@revision], or stream:<dataset id or files>."
    run_dir: Path = Path("runs/124M")
    "Where the run lives: config.yaml, metrics.jsonl, loss.png, samples/, checkpoints/. Same directory = same run."
    max_steps: int = 19073
    "Optimizer steps in all; also the length of the learning-rate schedule."
    seed: int = 1337
    "Seeds the weights, the order of the data and dropout."

    # --- model (the names of GPT2ReproConfig)
    n_layer: int = 12
    "Transformer blocks."
    n_head: int = 12
    "Attention heads per block; must divide n_embd."
    n_embd: int = 768
    "Width of the residual stream."
    n_inner: int | None = None
    "Width of the MLP; none: 4 n_embd."
    n_positions: int = 1024
    "Longest sequence the model can read."
    vocab_size: int | None = None
    "Entries of the vocabulary; none: the data's own."
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu"] = "gelu_new"
    "GELU by tanh (OpenAI) or by erf (nanoGPT)."
    resid_pdrop: float = 0.0
    "Dropout on what attention and MLP add to the residual stream."
    embd_pdrop: float = 0.0
    "Dropout on the embeddings."
    attn_pdrop: float = 0.0
    "Dropout on the attention weights."
    init_from: str | None = None
    "Start from this model (run, directory or Hub id, also of type gpt2) instead of random weights; its sizes win."
    tokenizer: str | None = None
    "Directory or Hub id of the tokenizer, for data that brings none; none: the data's own."

    # --- batch
    batch_tokens: int = 524288
    "Tokens per optimizer step over all processes; gradient accumulation follows from it."
    seq_len: int = 1024
    "Tokens per sequence; at most n_positions."
    micro_batch_size: int = 16
    "Sequences per process and forward pass. Halve it when memory runs out: the result stays the same."

    # --- streams (data = stream:…)
    text_column: str = "text"
    "Column, or key, of the text."
    stream_lanes: int | None = None
    "Streams that are read side by side; a multiple of the batch's sequences; none: the first one that is at least 64."
    cache_dir: Path | None = None
    "Where tokenised text is kept for a second epoch, a restart or an outage; none: gpt2repro/streams in HF_HOME."
    cache_gib: float | None = None
    "Most that a stream's cache may hold, in GiB; none: everything that passed."

    # --- optimization
    optimizer: Literal["adamw", "muon"] = "adamw"
    "AdamW, or Muon for the matrices of the blocks with AdamW for the rest."
    lr: float = 6e-4
    "Learning rate after warm-up."
    min_lr: float = 6e-5
    "Learning rate at the end of the cosine."
    warmup_steps: int = 715
    "Steps of linear warm-up."
    weight_decay: float = 0.1
    "Decoupled weight decay, on matrices only."
    beta1: float = 0.9
    "AdamW's first momentum."
    beta2: float = 0.95
    "AdamW's second momentum."
    eps: float = 1e-8
    "AdamW's epsilon."
    muon_lr_scale: float = 1.0
    "Muon's learning rate as a multiple of lr."
    grad_clip: float | None = 1.0
    "Clip the gradient's norm to this; none: measure it only."

    # --- machine
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    "auto: what accelerate's configuration says, else bf16 on a GPU that has it, fp16 on older ones, fp32 on a CPU."
    compile: Literal["auto", "model", "block", "off"] = "auto"
    "torch.compile: whole model with its loss, each block by itself, or nothing; auto: on GPUs, model on one process."
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    "Attention kernel, through transformers' attention interface."
    gradient_checkpointing: bool = False
    "Recompute each block in the backward pass: about a third more time, a fraction of the memory."
    loss_chunk_tokens: int | None = None
    "Hold the logits of at most this many tokens at a time, recomputing them in backward; none: all at once."
    bf16_residual: bool = False
    "Keep the residual stream in bf16 under bf16 autocast: faster, slightly less exact."
    deterministic: bool = False
    "Only deterministic kernels: bit-identical repeats on a GPU, slower."

    # --- when the numbers go bad
    on_bad_numbers: Literal["stop", "skip", "rewind"] = "stop"
    "NaN, infinity or a spike: stop (exit code 4), leave the step out, or return to a checkpoint and skip the data."
    spike_z: float | None = None
    "A spike is this many deviations above the mean of the last good steps (10, say); none: only NaN and infinity."
    spike_window: int = 100
    "Good steps that the mean and the deviation are taken over."
    max_rewinds: int = 3
    "Stop when so many rewinds have not helped."

    # --- evaluation
    val_data: str | None = None
    "Directory of shards whose val split to use; none: the training data's own."
    eval_steps: int = 250
    "Evaluate every so many steps, and before the first and after the last."
    val_tokens: int | None = 10_485_760
    "Validation tokens per evaluation (llm.c's and modded-nanogpt's number); none: all."
    hellaswag: str | None = None
    "HellaSwag examples to score at every evaluation: a .jsonl file, a directory or a Hub id; none: off."
    hellaswag_limit: int | None = None
    "Only the first so many HellaSwag examples."
    sample_prompts: list[str] = field(default_factory=lambda: [""])
    "Prompts to continue at every evaluation; an empty one starts a new document."
    sample_tokens: int = 64
    "Tokens per sample; 0 turns samples off."

    # --- log and checkpoints
    log_steps: int = 10
    "Fetch the numbers of the last steps from the device every so many steps."
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    "Trackers beside metrics.jsonl."
    project: str = "gpt2repro"
    "Project name in the trackers."
    save_steps: int = 1000
    "Checkpoint every so many steps, and after the last."
    keep_last: int | None = 3
    "Newest checkpoints to keep (best, final and milestones stay as well); none: all."
    milestone_steps: int | None = None
    "Never delete checkpoints of multiples of this; none: no milestones."
    resume: str = field(default="auto", metadata={"config": False})
    "auto: continue the run that run_dir holds; never: refuse to; a checkpoint directory; hub:user/name[@revision]."
    push_to_hub: str | None = None
    "user/name: publish every kept checkpoint there, in the background."
    hub_public: bool = False
    "Make the repository public when it is created."
    profile: int | None = field(default=None, metadata={"config": False})
    "Profile this many steps after warm-up (torch.profiler): trace and table in the run directory; none: off."

    # --- before it starts
    plan: bool = field(default=False, metadata={"config": False})
    "Print what the run would need and cost, and stop."
    gpu_memory_gib: float | None = None
    "For --plan: memory of one GPU; none: this machine's, if it has one, else 80."
    assumed_mfu: float = 0.4
    "For --plan: model FLOPs utilisation to assume."
    dollars_per_gpu_hour: float = 2.5
    "For --plan: price of one GPU for an hour."

    def problems(self) -> list[str]:
        """Everything about the options that cannot work, before anything is loaded."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        at_least_one = [
            "max_steps", "n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size", "batch_tokens",
            "seq_len", "micro_batch_size", "eval_steps", "val_tokens", "hellaswag_limit", "log_steps", "save_steps",
            "keep_last", "milestone_steps", "max_rewinds", "loss_chunk_tokens", "profile",
        ]  # fmt: skip
        not_negative = ["warmup_steps", "min_lr", "weight_decay", "sample_tokens"]
        positive = [
            "spike_z",
            "lr",
            "eps",
            "grad_clip",
            "muon_lr_scale",
            "assumed_mfu",
            "gpu_memory_gib",
            "dollars_per_gpu_hour",
        ]
        value = {name: getattr(self, name) for name in at_least_one + not_negative + positive}
        found = [f"{n}={value[n]} must be at least 1" for n in at_least_one if value[n] is not None and value[n] < 1]
        found += [f"{name}={value[name]} must not be negative" for name in not_negative if value[name] < 0]
        found += [f"{n}={value[n]} must be positive" for n in positive if value[n] is not None and value[n] <= 0]
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.spike_window < 2:
            found.append(f"spike_window={self.spike_window} must be at least 2")
        if self.assumed_mfu > 1:
            found.append(f"assumed_mfu={self.assumed_mfu} is a fraction and must be at most 1")
        if (blocks := 12 * self.n_layer * self.n_embd**2) > LARGEST_MODEL:
            found.append(f"n_layer={self.n_layer} and n_embd={self.n_embd} would make {blocks:.2g} parameters")
        if self.n_head >= 1 and self.n_embd % self.n_head and self.init_from is None:
            found.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.seq_len > self.n_positions and self.init_from is None:
            found.append(f"seq_len={self.seq_len} is longer than n_positions={self.n_positions}")
        if self.min_lr > self.lr:
            found.append(f"min_lr={self.min_lr} is above lr={self.lr}")
        per_pass = self.micro_batch_size * self.seq_len * world
        if min(per_pass, self.batch_tokens) >= 1 and self.batch_tokens % per_pass:
            nearest = max(1, round(self.batch_tokens / per_pass)) * per_pass
            found.append(
                f"batch_tokens={self.batch_tokens} is not a multiple of {per_pass} ({self.micro_batch_size} sequences "
                f"x {self.seq_len} tokens x {world} processes); try {nearest}, or another micro_batch_size"
            )
        if self.bf16_residual and self.precision not in ("auto", "bf16"):
            found.append(f"bf16_residual needs precision bf16, not {self.precision}")
        if self.resume.startswith("hub:") and len(self.resume) == len("hub:"):
            found.append("resume=hub: needs a repository: hub:user/name[@revision]")
        return found


def main(argv: list[str]) -> int:
    # OpenMP's threads turn in circles while they wait, which starves others on a busy CPU; if they sleep at once, they
    # wake up late. The quickstart on two cores, alone and beside two busy processes: 10,400 and 2,300 tokens/s with
    # OpenMP's default, 7,700 and 5,500 with none, 10,000 and 4,500 with a thousand turns. It is read with torch.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        config = parse_options(TrainConfig, argv, prog="train_accelerate.py", description=__doc__)
    except InputError:
        if int(os.environ.get("RANK", 0)) == 0:  # the other processes have nothing to add
            raise
        return 2
    if config.plan:
        return print_plan(config) if int(os.environ.get("RANK", 0)) == 0 else EXIT_DONE
    return train(config)


def train(config: TrainConfig) -> int:
    """One run, from its first step or from its newest checkpoint to `max_steps`. Returns the exit code."""
    import torch
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from gpt2repro import checkpoint, data, hellaswag
    from gpt2repro.evaluation import token_byte_lengths, validation_loss
    from gpt2repro.health import HealthMonitor, step_unless_bad
    from gpt2repro.optim import build_optimizer, learning_rate, set_learning_rate
    from gpt2repro.profiling import profiling
    from gpt2repro.reference import Referee
    from gpt2repro.shards import open_split
    from gpt2repro.tracking import RunLog, Throughput, flops_per_token, peak_flops

    # --- the machine, the data, the model, the optimizer
    accelerator = build_accelerator(config)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    sequences = config.batch_tokens // config.seq_len  # rows of the global batch
    source = open_data(config, sequences)
    validation = open_split(config.val_data, "val") if config.val_data else source.validation
    tokenizer = find_tokenizer(config, source.directory)
    model = build_model(config, source.vocab_size, tokenizer)
    optimizer = build_optimizer(
        model,
        name=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        muon_lr_scale=config.muon_lr_scale,
    )
    model_config, n_params = model.config, model.num_parameters()
    token_flops = flops_per_token(
        n_params - model_config.n_positions * model_config.n_embd,
        n_layer=model_config.n_layer,
        n_embd=model_config.n_embd,
        seq_len=config.seq_len,
    )
    sharded = accelerator.distributed_type == "FSDP"
    compile_model(model, config.compile, device.type, world, sharded=sharded)
    model, optimizer = accelerator.prepare(model, optimizer)

    knows_all_tokens = len(tokenizer) >= source.vocab_size  # else bytes are the split's average per token
    token_bytes = token_byte_lengths(tokenizer) if knows_all_tokens else None
    examples = prepare_hellaswag(config, model, tokenizer)

    # --- a new run, or the one that run_dir holds
    run_lock = lock_run(config.run_dir) if accelerator.is_main_process else None  # held until the process ends
    writer = checkpoint.CheckpointWriter(
        config.run_dir / "checkpoints", keep_last=config.keep_last, milestone_steps=config.milestone_steps
    )
    identity = {
        "data": source.identity(),
        "batch_tokens": config.batch_tokens,
        "optimizer": config.optimizer,
        "architecture": {name: getattr(model_config, name) for name in ARCHITECTURE},
    }
    monitor = HealthMonitor(
        config.on_bad_numbers, window=config.spike_window, z_threshold=config.spike_z, max_rewinds=config.max_rewinds
    )
    state = {"step": 0, "source": source.initial_state(), "best": None, "run_ids": None, "seconds": 0.0}

    def restore(path: Path, *, rewinding: bool = False) -> dict:
        """Put everything back to what it was when `path` was saved; checkpoints of later steps are abandoned."""
        state = checkpoint.read_state(path)
        refuse_foreign_state(state, path)
        refuse_another_run(state["identity"], identity, path)
        checkpoint.restore(path, model, optimizer)
        if state["scaler"] is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        monitor.load_state(state["health"], rewinding=rewinding)
        writer.discard_after(state["step"])
        if state["best"] is not None:
            writer.point("best", state["best"]["step"])
        return state

    resumed_from = find_resume(config, accelerator)
    if resumed_from is not None:
        state = restore(resumed_from)
    log = RunLog(
        config.run_dir,
        config=flat_config(config) | {"n_params": n_params, "processes": world},
        trackers=config.trackers,
        project=config.project,
        run_ids=state["run_ids"],
        resume_step=state["step"] if resumed_from is not None else None,
        is_main=accelerator.is_main_process,
    )
    if accelerator.is_main_process:
        (config.run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    print_run(accelerator, config, source, model_config, n_params, resumed_from, state["step"])

    uploader = None
    if config.push_to_hub is not None and accelerator.is_main_process:
        from gpt2repro.hub import Uploader

        private = not config.hub_public
        uploader = Uploader(config.push_to_hub, run_dir=config.run_dir, private=private, comparable=load_on_cpu)

    step, best = state["step"], state["best"]
    referee = Referee(flat_config(config), manifest_of(source.directory))
    stop = StopSignal(world)
    peak = peak_flops(device_name(device))
    forward_options = {"loss_chunk_tokens": config.loss_chunk_tokens}
    if config.bf16_residual:
        forward_options["residual_dtype"] = torch.bfloat16
    bar = tqdm(
        total=config.max_steps,
        initial=step,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    log.status("running", step)

    def flush(pending: list[dict]):
        """Fetch what the last steps left on the device in one transfer, average it over the ranks, log and judge it."""
        if not pending:
            return None
        numbers = torch.stack([torch.stack([entry.pop("loss"), entry.pop("grad_norm")]) for entry in pending])
        numbers = accelerator.reduce(numbers, reduction="mean").tolist()  # the one moment that waits for the device
        rates = throughput.measure(config.batch_tokens * len(pending), len(pending))
        for entry, (loss, grad_norm) in zip(pending, numbers, strict=True):
            entry |= {"loss": loss, "grad_norm": grad_norm}
            if accelerator.scaler is not None:  # Accelerate's step_was_skipped never notices a fused optimizer's skip
                entry["scaler_skipped"] = not math.isfinite(grad_norm)
            shown = {name: value for name, value in entry.items() if name != "positions"}
            tokens = entry["step"] * config.batch_tokens
            log.log(shown | {"tokens": tokens, **rates, "memory_gib": peak_memory_gib(device)})
        verdict = monitor.judge(pending)
        if verdict is not None:
            log.log(verdict.record())
            bar.write(f"{verdict.action}: {bad_steps(verdict)}", file=sys.stderr)
        state["seconds"] += rates["step_seconds"] * len(pending)
        bar.set_postfix_str(f"loss {loss:.3f}, {rates['tokens_per_second']:,.0f} tokens/s", refresh=False)
        bar.update(entry["step"] - bar.n)
        pending.clear()
        return verdict

    def evaluate() -> dict:
        """Validation loss, HellaSwag and samples of the model as it is now, by all ranks together."""
        common = {"device": device, "rank": rank, "world": world}
        record = {"step": step}
        if validation is not None:
            batch = {"seq_len": config.seq_len, "batch_size": config.micro_batch_size, "tokens": config.val_tokens}
            record |= validation_loss(model, validation, token_bytes=token_bytes, **batch, **common)
        if examples is not None:
            record |= hellaswag.evaluate(model, tokenizer, examples, **common)
        if len(record) > 1:
            log.log(record)
            comment = referee.comment(step, record["val_loss"]) if "val_loss" in record else None
            bar.write(evaluation_line(record) + (f" | {comment}" if comment else ""), file=sys.stderr)
        if config.sample_tokens:
            log.samples(step, write_samples(accelerator, model, tokenizer, config, step))
        return record

    def save() -> None:
        """Start writing checkpoint `step`; what the loop itself must know again goes into its state."""
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        kept = {"step": step, "best": best, "run_ids": log.run_ids, "seconds": state["seconds"], "scaler": scaler}
        kept |= {"health": monitor.state(), "identity": identity}
        kept["source"] = data.merge_states(gather_object([state["source"]]))  # a stream's ranks each know their lanes
        kept["environment"] = environment(accelerator)
        writer.save(
            step,
            model=model,
            optimizer=optimizer,
            tokenizer=tokenizer,
            state=kept,
            on_written=written,
        )
        if best is not None and best["step"] == step:
            writer.point("best", step)

    def written(path: Path) -> None:
        """What follows a checkpoint; called by the thread that wrote it, so that the loop does not wait for it."""
        draw(config)
        if uploader is not None:
            uploader.checkpoint(path)
            log.checkpoint_link(step_of(path), f"https://huggingface.co/{config.push_to_hub}/tree/step-{step_of(path)}")
        else:
            log.checkpoint_link(step_of(path), path)

    def open_batches():
        """This rank's batches from the current position on, made ahead of time in a thread."""
        batches = source.batches(state["source"], rank=rank, world=world, sequences=sequences)
        return data.prefetch(batches, 4, pin_memory=device.type == "cuda")

    def rewind(verdict) -> bool:
        """Back to the newest checkpoint before the bad steps, their windows passed over; False if there is none."""
        nonlocal state, step, best, batches
        writer.wait()  # first: a save that is under way may be the one to return to, and prunes older ones
        path = checkpoint.find_checkpoint(config.run_dir, all_ranks=True, at_most=verdict.first_step - 1)
        if path is None:
            return False
        state = restore(path, rewinding=True)
        state["source"] = data.skip_ahead(state["source"], verdict.start, verdict.stop)
        step, best = state["step"], state["best"]
        batches.close()
        batches = open_batches()
        log.rewind(step)
        # At the first step of the new way: a resume from before it meets the bad steps again and logs them itself.
        log.log(verdict.record() | {"step": step + 1})
        bar.n = step
        return True

    # --- the loop
    batches = open_batches()
    failure = None
    model.train()
    pending, evaluated = [], {"step": step}
    throughput = Throughput(flops_per_token=token_flops, peak=peak * world if peak else None)
    micro_batch_logits = (config.micro_batch_size * config.seq_len, model_config.vocab_size)
    profiled_steps = config.profile if accelerator.is_main_process else None
    profiler_of_run = profiling(config.run_dir / "profile", profiled_steps, logits=micro_batch_logits)
    with profiler_of_run as profiler, failures_noted(log, lambda: step):
        if step == 0:
            with throughput.pause():
                evaluated = evaluate()
        while step < config.max_steps and not stop.agreed():
            lr = learning_rate(
                step, lr=config.lr, min_lr=config.min_lr, warmup_steps=config.warmup_steps, max_steps=config.max_steps
            )
            set_learning_rate(optimizer, lr)
            start = state["source"]["position"]
            x, y, state["source"] = next(batches)  # this rank's rows of the global batch, (rows, T) each
            x, y = (part.to(device, non_blocking=device.type == "cuda") for part in (x, y))  # there they are pinned
            torch.manual_seed(step_seed(config.seed, step, rank))

            loss = torch.zeros((), device=device, dtype=torch.float64 if config.precision == "fp64" else None)
            for first in range(0, len(x), config.micro_batch_size):
                rows = slice(first, first + config.micro_batch_size)
                with contextlib.nullcontext() if rows.stop >= len(x) else accelerator.no_sync(model):
                    # This rank's sum over its tokens of the step, by their number; DDP and FSDP average over the ranks.
                    micro_loss = model(
                        input_ids=x[rows],
                        shift_labels=y[rows],
                        use_cache=False,
                        output_logits=False,
                        num_items_in_batch=x.numel(),
                        **forward_options,
                    ).loss
                    accelerator.backward(micro_loss)
                loss += micro_loss.detach()
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            if config.on_bad_numbers == "skip":
                mean_loss = accelerator.reduce(loss, reduction="mean")
                fine = monitor.allow(mean_loss, whole(grad_norm), scaled=accelerator.scaler is not None)
                step_unless_bad(optimizer, fine, accelerator.scaler)
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            profiler.step()
            step += 1
            entry = {"step": step, "lr": lr, "loss": loss, "grad_norm": whole(grad_norm)}
            entry["positions"] = [start, state["source"]["position"]]
            pending.append(entry)

            is_last = step == config.max_steps
            evaluating, saving = (step % every == 0 or is_last for every in (config.eval_steps, config.save_steps))
            if step % config.log_steps == 0 or evaluating or saving:
                verdict = flush(pending)
                if verdict is not None and verdict.action != "skip":
                    if verdict.action == "stop" or not rewind(verdict):
                        failure = verdict
                        break
                    continue
            with throughput.pause():
                if evaluating or saving:  # a saved checkpoint is always an evaluated one, or `best` would mean little
                    evaluated = evaluate()
                if saving:
                    if evaluated.get("val_loss", math.inf) < (best["val_loss"] if best else math.inf):  # NaN never is
                        best = {"step": step, "val_loss": evaluated["val_loss"]}
                    save()

        # --- the end: of the run, or of this process' part in it
        batches.close()
        if failure is None and step < config.max_steps:
            verdict = flush(pending)
            if verdict is None or verdict.action == "skip":
                save()
            elif verdict.action == "stop":
                failure = verdict  # to rewind is left to the next start, which meets the bad steps again
        elif failure is None:
            writer.point("final", step)
        writer.close()
    bar.close()
    if uploader is not None:
        uploader.close(timeout=UPLOAD_SECONDS_AT_EXIT if step == config.max_steps else 0)
    if failure is not None:
        message = f"{bad_steps(failure)}; the checkpoints before are kept. Try a lower lr, or --on_bad_numbers rewind"
        accelerator.print(message, file=sys.stderr)
        code = EXIT_BAD_NUMBERS
        log.status("failed", step, code, message)
    elif step < config.max_steps:
        message = f"stopped by {stop.name} after step {step}; the same command continues from there"
        accelerator.print(message)
        code = EXIT_STOPPED
        log.status("stopped", step, code, message)
    else:
        if accelerator.is_main_process:
            draw(config)
            print_result(config, source)
        code = EXIT_DONE
        log.status("done", step, code)
    log.close()
    if run_lock is not None:
        run_lock.release()
    accelerator.end_training()
    return code


# --- the parts, in the order of their use


def build_accelerator(config: TrainConfig):
    """Accelerate with this run's precision; deterministic kernels are chosen before the device wakes up."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    from gpt2repro.evaluation import CHUNKS_UNDER_FSDP2

    torch.use_deterministic_algorithms(config.deterministic)
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32 on a GPU; no effect elsewhere
    precision = {"fp32": "no", "fp64": "no"}.get(config.precision, config.precision)
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
        if precision == "no" and on_gpu:
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    try:
        # Without `cpu`, Accelerate takes two processes that torchrun starts on a CPU for two runs.
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])
    except (ValueError, ImportError) as error:  # such as fp16 on a CPU
        raise InputError(f"precision={config.precision} does not work on this machine: {error}") from error
    if config.bf16_residual and accelerator.mixed_precision != "bf16":
        raise InputError(f"bf16_residual needs mixed precision bf16, and this run has {accelerator.mixed_precision}")
    if accelerator.distributed_type == "FSDP" and config.loss_chunk_tokens is not None and not CHUNKS_UNDER_FSDP2:
        raise InputError(
            f"loss_chunk_tokens does not work with FSDP2 in torch {torch.__version__}; take torch 2.13, or halve "
            "micro_batch_size instead"
        )
    keep_sums_exact(getattr(accelerator.state, "fsdp_plugin", None))
    accelerator.gradient_accumulation_steps = 1  # whatever its environment says: it would divide the loss once more
    return accelerator


def keep_sums_exact(fsdp_plugin) -> None:
    """Under FSDP2 Accelerate rounds more to bf16 than DDP does; the weights' bf16 copies are enough.

    A loss of 3.3 in bf16 moves in steps of 0.016, and gradients summed over many micro-batches in bf16 lose digits.
    """
    import torch

    policy = getattr(fsdp_plugin, "mixed_precision_policy", None)
    if hasattr(policy, "output_dtype"):
        exact = {"output_dtype": None, "reduce_dtype": torch.float32}
        fsdp_plugin.mixed_precision_policy = replace(policy, **exact)


def build_model(config: TrainConfig, vocab_size: int, tokenizer):
    """The model with its first weights, random or those of `init_from`, on the CPU: the same on every machine.

    Raises InputError where `init_from` is no GPT-2 or too small for the data.
    """
    import torch

    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(config.seed)
    if config.init_from is not None:
        from gpt2repro.checkpoint import resolve_model

        dropout = {name: getattr(config, name) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        try:
            model = GPT2ReproForCausalLM.from_pretrained(
                resolve_model(config.init_from),
                dtype=torch.float32,
                use_safetensors=True,  # nothing is ever unpickled
                attn_implementation=config.attn_implementation,
                **dropout,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"init_from={config.init_from}: {str(error).splitlines()[0]}") from error
        if vocab_size > model.config.vocab_size:
            raise InputError(
                f"the data has a vocabulary of {vocab_size}, but {config.init_from} only of {model.config.vocab_size}; "
                "prepare the data with its tokenizer"
            )
        if config.seq_len > model.config.n_positions:
            raise InputError(
                f"seq_len={config.seq_len} is longer than n_positions={model.config.n_positions} of init_from"
            )
    else:
        names = [*ARCHITECTURE, "resid_pdrop", "embd_pdrop", "attn_pdrop"]
        sizes = {name: getattr(config, name) for name in names} | {"vocab_size": config.vocab_size or vocab_size}
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = GPT2ReproForCausalLM._from_config(
            GPT2ReproConfig(**sizes, **ends), attn_implementation=config.attn_implementation, dtype=torch.float32
        )
    if config.precision == "fp64":
        model = model.double()
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def compile_model(model, how: str, device_type: str, world: int, *, sharded: bool = False) -> None:
    """torch.compile in place, before `prepare`: state-dict keys stay clean and autocast ends up inside the graph.

    "model" traces forward and loss as one graph. Under DDP torch splits its backward at the borders of the gradient
    buckets, so the exchange can overlap with computing; FSDP2's hooks cannot be traced, so there it is refused.

    "block" makes a graph of every block and one of the cross-entropy; the head between them stays a module that is
    called, since FSDP2 gathers its weight in a hook. It is the default of several processes until a GPU has compared.

    Raises:
        InputError: "model" with sharded weights.
    """
    import torch

    if device_type == "cuda":
        model.pad_head()
    if how == "auto":
        can_compile = device_type == "cuda" and sys.platform != "win32"  # Triton has no build for Windows
        how = "off" if not can_compile else "model" if world == 1 and not sharded else "block"
    if how == "model":
        if sharded:
            raise InputError(
                "compile=model does not work with FSDP2: hooks gather the weights of each block when it is called, and "
                "one graph of the whole model has no room for them; try --compile block"
            )
        model.compile(fullgraph=True, dynamic=False)
    elif how == "block":
        # Torch would split the graph of a block whose gradients do not fit into one bucket of DDP (25 MB; a block of
        # 124M has 28), and lose what it has fused. Blocks are small enough to overlap as they are.
        torch._dynamo.config.optimize_ddp = False
        for block in model.transformer.h:
            block.compile(fullgraph=True, dynamic=False)
        # Uncompiled, it would write the logits out in fp32, twice: 26 GB at 64 x 1024 tokens.
        model.cross_entropy = torch.compile(model.cross_entropy, fullgraph=True, dynamic=False)


def lock_run(run_dir: Path):
    """A lock that dies with its process. Raises InputError where another process already trains this run."""
    from filelock import FileLock, Timeout

    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is training in {run_dir}; wait for it, or choose another --run_dir"
        ) from None
    return lock


def find_resume(config: TrainConfig, accelerator) -> Path | None:
    """The checkpoint to continue from; None for a new run. Every rank calls it.

    A run that was started from elsewhere and interrupted continues from its own checkpoints: the same command again.
    Naming an earlier checkpoint of the run itself goes back to it and abandons the later ones.
    """
    from gpt2repro import checkpoint

    own = checkpoint.find_checkpoint(config.run_dir, all_ranks=True)
    if config.resume == "auto":
        return own
    if config.resume == "never":
        if own is not None:
            raise InputError(f"{config.run_dir} already holds a run; choose another --run_dir, or drop --resume never")
        return None
    place = config.resume
    if place.startswith("hub:"):
        from gpt2repro.hub import fetch_checkpoint

        place = fetch_checkpoint(place, config.run_dir / "from_hub")  # by the first process; the others wait
        curve = Path(place) / "training/metrics.jsonl"
        if accelerator.is_main_process and own is None and curve.is_file():  # the log then begins at step 0
            shutil.copy(curve, config.run_dir / "metrics.jsonl")
    found = checkpoint.find_checkpoint(place, all_ranks=True)
    if found is None:
        raise InputError(f"resume={config.resume}: no checkpoint there")
    elsewhere = own is not None and found.resolve().parent != own.resolve().parent
    is_newer = elsewhere and checkpoint.read_state(own)["step"] >= checkpoint.read_state(found)["step"]
    return own if is_newer else found


def refuse_foreign_state(state: dict, path: Path) -> None:
    """Raises InputError where a checkpoint's state lacks a part, or has one of a kind, that this loop never wrote."""
    number = (int, float)

    def fits(value, kinds) -> bool:
        if isinstance(kinds, dict):
            return isinstance(value, dict) and all(fits(value.get(name), kind) for name, kind in kinds.items())
        return isinstance(value, kinds) and not isinstance(value, bool)

    health = {name: list for name in ("losses", "grad_norms")} | {
        name: int for name in ("skipped", "rewinds", "in_a_row")
    }
    expected = {"step": int, "seconds": number, "source": {"position": int, "skipped": list}, "health": health}
    expected |= {"identity": {"batch_tokens": int, "optimizer": str, "data": dict, "architecture": dict}}
    wrong = [name for name, kinds in expected.items() if not fits(state.get(name), kinds)]
    optional = {"best": {"step": int, "val_loss": number}, "run_ids": dict, "scaler": dict}
    wrong += [name for name, kinds in optional.items() if state.get(name) is not None and not fits(state[name], kinds)]
    if not wrong:
        ranges = [pair for pair in state["source"]["skipped"] if not (isinstance(pair, list) and len(pair) == 2)]
        numbers = [value for name in ("losses", "grad_norms") for value in state["health"][name]]
        if ranges or state["source"]["position"] < 0:
            wrong.append("source")
        if not all(fits(value, number) for value in numbers):
            wrong.append("health")
        if path.name != f"step_{state['step']:06d}" and path.name.startswith("step_"):
            wrong.append("step")
    if wrong:
        raise InputError(f"{path}: its trainer state has no usable {' and '.join(wrong)}; take another checkpoint")


def refuse_another_run(saved: dict, now: dict, path: Path) -> None:
    """Raises InputError where an option changed that would make the rest of the run another run.

    Free to change on resume: processes, micro_batch_size, precision, workers, trackers, intervals; max_steps, lr and
    the rest of the schedule change lr(step) from here on. Not free: the data and its order (data, seed, seq_len,
    batch_tokens: they say which windows each step sees), the architecture and the kind of optimizer state.
    """
    pairs = {"batch_tokens": (saved["batch_tokens"], now["batch_tokens"])}
    pairs["optimizer"] = (saved["optimizer"], now["optimizer"])
    for part in ("architecture", "data"):
        names = {*saved[part], *now[part]}
        pairs |= {f"{part}: {name}": (saved[part].get(name), now[part].get(name)) for name in sorted(names)}
    changed = [f"{name} was {before} and is now {after}" for name, (before, after) in pairs.items() if before != after]
    if changed:
        raise InputError(
            f"cannot continue {path} with other settings: {'; '.join(changed)}. Set them back, or start a new "
            "--run_dir (with --init_from to begin from these weights)"
        )


def bad_steps(verdict) -> str:
    return f"{verdict.reason} (steps {verdict.first_step} to {verdict.last_step})"


@contextlib.contextmanager
def failures_noted(log, step):
    """Whatever ends the loop early also ends up in status.json, since launchers hide exit codes."""
    try:
        yield
    except BaseException as error:
        if lost_a_process(error):
            message = "another process of this run is gone; the same command goes on from the last checkpoint"
            log.status("failed", step(), 1, message)
            print(f"error: {message}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        code = 2 if isinstance(error, InputError) else 1
        log.status("failed", step(), code, f"{type(error).__name__}: {error}" if code == 1 else str(error))
        raise


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed since another process has ended: gloo's RuntimeError, or NCCL's DistError."""
    import torch.distributed

    by_gloo = isinstance(error, RuntimeError) and ("gloo" in str(error) or "by peer" in str(error))
    return by_gloo or isinstance(error, torch.distributed.DistError)


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) ask for a checkpoint; a second SIGINT leaves at once.

    Whichever rank it reaches, all ranks stop after the same step: each step's answer travels while the next step
    computes, so agreeing costs no waiting.
    """

    def __init__(self, world: int):
        import torch

        self._received: int | None = None
        self._group = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self._answer, self._work = torch.zeros(1), None
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def name(self) -> str:
        return signal.Signals(self._received).name if self._received is not None else "a signal to another process"

    def agreed(self) -> bool:
        """Whether to stop before the next step. Every rank must ask equally often."""
        import torch

        if self._group is None:
            return self._received is not None
        if self._work is not None:
            self._work.wait()
        stop = bool(self._answer.item())
        self._answer = torch.tensor([float(self._received is not None)])
        self._work = torch.distributed.all_reduce(
            self._answer, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's generators, different for every step and rank (Weyl-like steps by large odd numbers)."""
    return (seed + 0x9E3779B97F4A7C15 * (step + 1) + 0xC2B2AE3D27D4EB4F * rank) % 2**63


def whole(norm):
    """The gradient norm as an ordinary tensor; FSDP2 hands out a DTensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def write_samples(accelerator, model, tokenizer, config: TrainConfig, step: int) -> list[str]:
    """Continuations of `sample_prompts`. Under FSDP every rank must take part; the main process writes them down."""
    import torch

    from gpt2repro.evaluation import inference, is_fsdp

    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not (accelerator.is_main_process or is_fsdp(unwrapped)):
        return []
    texts = []
    with inference(model):
        for index, prompt in enumerate(config.sample_prompts):
            torch.manual_seed(step_seed(config.seed, index, 0))
            ids = [tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]][-(config.seq_len // 2) :]
            length = min(config.sample_tokens, unwrapped.config.n_positions - len(ids))
            inputs = torch.tensor([ids], device=accelerator.device)
            output = unwrapped.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=length,
                do_sample=True,
                top_k=50,
                pad_token_id=tokenizer.eos_token_id,
                synced_gpus=is_fsdp(unwrapped),  # no rank stops while another still gathers; FSDP2 goes unnoticed else
            )
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def open_data(config: TrainConfig, sequences: int):
    """The source of the batches; a stream also needs a tokenizer, and a place for what it has tokenised."""
    from gpt2repro.data import open_source

    options = {"seq_len": config.seq_len, "seed": config.seed, "sequences": sequences, "vocab_size": config.vocab_size}
    if config.data.startswith("stream:"):
        options |= {"tokenizer": find_tokenizer(config, None), "text_column": config.text_column}
        options |= {"lanes": config.stream_lanes, "cache_dir": config.cache_dir, "cache_gib": config.cache_gib}
    return open_source(config.data, **options)


def find_tokenizer(config: TrainConfig, directory: Path | None):
    """The tokenizer that made the data: named, or lying beside the shards; foreign shards and streams are GPT-2's."""
    from gpt2repro.shards import TOKENIZER
    from gpt2repro.tokenization import gpt2_tokenizer, load_tokenizer

    if config.tokenizer not in (None, "gpt2"):
        return load_tokenizer(config.tokenizer)
    if config.tokenizer is None and directory is not None and (directory / TOKENIZER).is_dir():
        return load_tokenizer(directory)
    return gpt2_tokenizer()


def prepare_hellaswag(config: TrainConfig, model, tokenizer):
    """HellaSwag's examples, rendered once for the whole run; None where it is off."""
    if config.hellaswag is None:
        return None
    from gpt2repro import hellaswag

    unwrapped = getattr(model, "module", model)
    examples = hellaswag.read_examples(config.hellaswag, limit=config.hellaswag_limit)
    return hellaswag.prepare(examples, tokenizer, hellaswag.max_length_of(unwrapped, tokenizer))


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_gib(device) -> float | None:
    """Most memory that tensors took on the device so far; None where nobody counts."""
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def environment(accelerator) -> dict:
    """Where and how this run runs, for the model card."""
    import accelerate
    import torch
    import transformers

    return {
        "command": shlex.join(sys.orig_argv),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "distributed": str(accelerator.distributed_type).removeprefix("DistributedType."),
        "precision": accelerator.mixed_precision,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def flat_config(config: TrainConfig) -> dict:
    import yaml

    return yaml.safe_load(to_yaml(config))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def draw(config: TrainConfig) -> None:
    """Refresh the run's picture; no picture is a reason to end a run."""
    try:
        from gpt2repro.plotting import draw_runs

        draw_runs([config.run_dir], config.run_dir / "loss.png")
    except Exception as error:
        print(f"loss.png was not drawn: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def load_on_cpu(directory: Path):
    """A checkpoint as our class, in fp32: what its native twin on the Hub has to agree with."""
    import torch

    from modeling_gpt2repro import GPT2ReproForCausalLM

    return GPT2ReproForCausalLM.from_pretrained(directory, dtype=torch.float32)


def print_run(accelerator, config: TrainConfig, source, model_config, n_params: int, resumed_from, step: int) -> None:
    """What is about to happen, in five lines."""
    world, device = accelerator.num_processes, device_name(accelerator.device)
    passes = config.batch_tokens // (config.micro_batch_size * config.seq_len * world)
    per_pass = f"{config.micro_batch_size} sequences x {config.seq_len} tokens x {world} processes"
    sizes = f"{model_config.n_layer} layers, {model_config.n_head} heads, width {model_config.n_embd}"
    epochs = config.max_steps * config.batch_tokens / source.tokens_per_epoch if source.tokens_per_epoch else None
    start = f", continuing from {resumed_from} at step {step}" if resumed_from is not None else ""
    accelerator.print(
        f"model    {n_params:,} parameters, {sizes}, vocabulary {model_config.vocab_size:,}\n"
        f"data     {config.data}" + (f", {epochs:.2f} epochs" if epochs else "") + "\n"
        f"batch    {config.batch_tokens:,} tokens = {per_pass} x {passes} passes\n"
        f"machine  {world} x {device}, mixed precision {accelerator.mixed_precision}\n"
        f"run      {config.run_dir}{start}"
    )


def evaluation_line(record: dict) -> str:
    """One line for the terminal."""
    parts = [f"step {record['step']}"]
    if "val_loss" in record:
        parts.append(f"validation loss {record['val_loss']:.4f}")
        if record["bits_per_byte"] is not None:
            parts.append(f"{record['bits_per_byte']:.3f} bits per byte")
    parts += [
        f"{name} {value:.4f}"
        for name, value in record.items()
        if name.startswith("hellaswag_acc") and "stderr" not in name
    ]
    return " | ".join(parts)


def print_result(config: TrainConfig, source) -> None:
    """The end of a finished run: losses before and after, xz beside bits per byte, samples, where everything is."""
    from gpt2repro.tracking import read_metrics

    _, evaluations = read_metrics(config.run_dir)
    lines = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        before = f" (untrained: {first['val_loss']:.4f})" if first["step"] == 0 else ""
        lines.append(f"validation loss  {last['val_loss']:.4f} nats per token{before}")
        if last["bits_per_byte"] is not None:
            lines.append(f"bits per byte    {last['bits_per_byte']:.3f}{compressed_size(source)}")
    samples = config.run_dir / "samples" / f"step_{config.max_steps:06d}.md"
    lines += [
        f"curve            {config.run_dir / 'loss.png'}",
        f"samples          {samples}",
        f"checkpoint       {config.run_dir / 'checkpoints' / 'final'}",
        f"talk to it       python -m gpt2repro generate --model {config.run_dir} --interactive",
    ]
    if samples.exists():
        lines = [samples.read_text(encoding="utf-8").strip(), "", *lines]
    print("\n" + "\n".join(lines))


def manifest_of(directory: Path | None):
    """The manifest of a data set made here; None for streams and foreign shards."""
    from gpt2repro.shards import MANIFEST, load_manifest

    return load_manifest(directory) if directory is not None and (directory / MANIFEST).exists() else None


def compressed_size(source) -> str:
    """What `xz -9` makes of the same text, where the data's manifest knows it."""
    manifest = manifest_of(source.directory)
    split = manifest["splits"].get("val", {}) if manifest is not None else {}
    if "xz_bytes" not in split:
        return ""
    alone, after_training_text = (8 * split[name] / split["bytes"] for name in ("xz_bytes", "xz_bytes_given_train"))
    return f" (xz -9 on the same text: {alone:.3f}, and {after_training_text:.3f} behind the training text)"


def print_plan(config: TrainConfig) -> int:
    """`--plan`: what the run would need and cost, without training. Raises InputError where something does not fit."""
    import torch

    from gpt2repro import planning
    from gpt2repro.shards import has_split, open_split

    processes = int(os.environ.get("WORLD_SIZE", 1))
    directory = Path(config.data)
    split = open_split(directory, "train") if directory.is_dir() and has_split(directory, "train") else None
    vocab_size = config.vocab_size or (split.vocab_size if split else 50257)
    names = ("n_positions", "n_embd", "n_layer", "n_inner")
    n_params = planning.parameter_count(vocab_size=vocab_size, **{name: getattr(config, name) for name in names})
    gpu_memory_gib = config.gpu_memory_gib
    if gpu_memory_gib is None:
        on_gpu = torch.cuda.is_available()
        gpu_memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 80.0
    kept = None
    if config.keep_last is not None:  # besides them: best, final and the milestones
        kept = config.keep_last + 2 + (config.max_steps // config.milestone_steps if config.milestone_steps else 0)
    plan = planning.plan(
        n_params=n_params,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        vocab_size=vocab_size,
        seq_len=config.seq_len,
        batch_tokens=config.batch_tokens,
        micro_batch_size=config.micro_batch_size,
        processes=processes,
        max_steps=config.max_steps,
        epoch_tokens=(split.tokens - 1) // config.seq_len * config.seq_len if split else None,
        precision="bf16" if config.precision == "auto" else config.precision,
        gradient_checkpointing=config.gradient_checkpointing,
        sharded=os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true",
        optimizer=config.optimizer,
        keep_checkpoints=kept,
        run_dir=config.run_dir,
        gpu_memory_gib=gpu_memory_gib,
        mfu=config.assumed_mfu,
        dollars_per_gpu_hour=config.dollars_per_gpu_hour,
        push_to_hub=config.push_to_hub,
        n_positions=config.n_positions,
        loss_chunk_tokens=config.loss_chunk_tokens,
        hub_revisions=math.ceil(config.max_steps / config.save_steps),
    )
    print(plan.report())
    if plan.problems:
        raise InputError("this run would not work as it is: " + "; ".join(plan.problems))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
