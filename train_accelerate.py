"""Train GPT-2 with Accelerate: one configuration, one loop, read from top to bottom.

    accelerate launch train_accelerate.py --config gpt2repro/presets/quickstart.yaml      (2 CPU cores: minutes)
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml train_accelerate.py --data data/fineweb-edu-10B

The defaults are the 124M recipe: 19,073 steps of 524,288 tokens (10B tokens). Expect a loss near 3.28 on FineWeb's
validation set (llm.c measured 3.27 with the same recipe). `python` and `torchrun` start it as well.

    data.sources ──> (x, y, state) ──> micro-batches ──> loss, backward ──> clip, optimizer.step
                            every log_steps: metrics.jsonl · eval_steps: validation · save_steps: checkpoint

`accelerator.prepare` sees the model and the optimizer only. Not the data, which it would shard a second time; not the
schedule, which it would step once per process: the learning rate is a pure function of the step.

Random numbers are a pure function as well: every step seeds torch with (seed, step, rank), so dropout is the same after
a resume without any generator state being stored, and whatever evaluation draws does not disturb training.

Exit codes: 0 done, 2 bad input, 3 stopped by a signal after saving, 4 the numbers went bad.

Shapes: T seq_len, rows = this rank's sequences of the global batch, B micro_batch_size.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gpt2repro.options import (
    AtLeastOne,
    Fraction,
    InputError,
    NotNegative,
    NotNegativeNumber,
    Positive,
    Seed,
    parse_options,
    run_main,
)  # fmt: skip

CONFIGS = (
    f"\nLauncher configs, also after pip install: {Path(__file__).resolve().with_name('accelerate_configs')}/*.yaml\n"
)
SCHEDULE = ("lr", "min_lr", "warmup_steps", "max_steps", "schedule", "cooldown_steps")
LARGEST_MODEL = 10**12  # parameters: more is a typing mistake, and building it would fill the memory


@dataclass
class TrainConfig:
    """Every option of a run. Field = flag = YAML key = tracker column."""

    data: str
    "Token shards, a directory or hf://user/name[@revision]; stream:<dataset id or files>; or a recipe.yaml of several."
    run_dir: Path = Path("runs/124M")
    "Where the run lives: config.yaml, metrics.jsonl, loss.png, samples/, checkpoints/. Same directory = same run."
    max_steps: AtLeastOne = 19073
    "Optimizer steps in all; also the length of the learning-rate schedule."
    seed: Seed = 1337
    "Seeds the weights, the order of the data and dropout."

    # --- model (the names of GPT2ReproConfig)
    n_layer: AtLeastOne = 12
    "Transformer blocks."
    n_head: AtLeastOne = 12
    "Attention heads per block; must divide n_embd."
    n_embd: AtLeastOne = 768
    "Width of the residual stream."
    n_inner: AtLeastOne | None = None
    "Width of the MLP; none: 4 n_embd."
    n_positions: AtLeastOne = 1024
    "Longest sequence the model can read."
    vocab_size: AtLeastOne | None = None
    "Entries of the vocabulary; none: the data's own."
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu"] = "gelu_new"
    "GELU by tanh (OpenAI) or by erf (nanoGPT)."
    resid_pdrop: Fraction = 0.0
    "Dropout on what attention and MLP add to the residual stream."
    embd_pdrop: Fraction = 0.0
    "Dropout on the embeddings."
    attn_pdrop: Fraction = 0.0
    "Dropout on the attention weights."
    zero_init: bool = False
    "Begin with zeros in the projections into the residual stream, so that each block first passes its input on."
    init_from: str | None = None
    "Start from this model (run, directory or Hub id, also of type gpt2) instead of random weights; its sizes win."
    tokenizer: str | None = None
    "Directory or Hub id of the tokenizer, for data that brings none; none: the data's own."

    # --- batch
    batch_tokens: AtLeastOne = 524288
    "Tokens per optimizer step over all processes; gradient accumulation follows from it."
    seq_len: AtLeastOne = 1024
    "Tokens per sequence; at most n_positions."
    documents: Literal["cross", "mask"] = "cross"
    "mask: the documents of a sequence do not see each other; cross: they do, as in GPT-2's training."
    recut_windows: bool = False
    "Cut each epoch into sequences at other tokens than the epoch before; for token shards and recipes."
    micro_batch_size: AtLeastOne | None = None
    "Sequences per process and forward pass; none: what the card's memory holds, 16 on a CPU. No part of the result."

    # --- streams (data = stream:…)
    text_column: str = "text"
    "Column, or key, of the text."
    stream_lanes: AtLeastOne | None = None
    "Streams that are read side by side; a multiple of the batch's sequences; none: the first one that is at least 64."
    cache_dir: Path | None = None
    "Where tokenised text is kept for a second epoch, a restart or an outage; none: gpt2repro/streams in HF_HOME."
    cache_gib: Positive | None = None
    "Most that a stream's cache may hold, in GiB; none: everything that passed."

    # --- optimization
    optimizer: Literal["adamw", "muon"] = "adamw"
    "AdamW, or Muon for the matrices of the blocks with AdamW for the rest."
    lr: Positive = 6e-4
    "Learning rate after warm-up."
    min_lr: NotNegativeNumber = 6e-5
    "Learning rate at the end of the schedule."
    warmup_steps: NotNegative = 715
    "Steps of linear warm-up."
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    "Way from lr to min_lr: cosine, linear, or wsd (stable, then a linear cool-down)."
    cooldown_steps: AtLeastOne | None = None
    "Steps of wsd's cool-down; none: a fifth of max_steps."
    cooldown_from: str | None = None
    "Checkpoint of a wsd run's stable phase: a new run that continues it and cools down over cooldown_steps."
    weight_decay: NotNegativeNumber = 0.1
    "Decoupled weight decay, on matrices only."
    cautious_decay: bool = False
    "Let weights decay only where the optimizer's step shrinks them as well."
    beta1: Fraction = 0.9
    "AdamW's first momentum."
    beta2: Fraction = 0.95
    "AdamW's second momentum."
    eps: Positive = 1e-8
    "AdamW's epsilon."
    muon_lr_scale: Positive = 1.0
    "Muon's learning rate as a multiple of lr."
    grad_clip: Positive | None = 1.0
    "Clip the gradient's norm to this; none: measure it only."
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    "Keep an exponential moving average of the weights (0.999, say), evaluated and saved beside them; none: off."

    # --- machine
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    "auto: what accelerate's configuration says, else bf16 on a GPU that has it, fp16 on older ones, fp32 on a CPU."
    compile: Literal["auto", "model", "block", "off"] = "auto"
    "torch.compile: whole model with its loss, each block by itself, or nothing; auto: on GPUs, model on one process."
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    "Attention kernel, through transformers' attention interface."
    gradient_checkpointing: bool = False
    "Recompute each block in the backward pass: about a third more time, a fraction of the memory."
    loss_chunk_tokens: AtLeastOne | None = None
    "Hold the logits of at most this many tokens at a time, recomputing them in backward; none: all at once."
    bf16_residual: bool = False
    "Keep the residual stream in bf16 under bf16 autocast: less memory, slightly less exact, no faster on an H200."
    reduction: Literal["fast", "fixed"] = "fast"
    "How gradients are summed; fixed: the same bits on 1, 2, 4 or 8 processes (on GPUs with deterministic)."
    deterministic: bool = False
    "Only deterministic kernels: bit-identical repeats on a GPU, slower."
    collective_timeout_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    "Minutes after which a frozen rank ends the run; none: torch's own, 10 for NCCL and 30 for gloo."

    # --- when the numbers go bad
    on_bad_numbers: Literal["stop", "skip", "rewind"] = "stop"
    "NaN, infinity or a spike: stop (exit code 4), leave the step out, or return to a checkpoint and skip the data."
    spike_z: Positive | None = None
    "A spike is this many deviations above the mean of the last good steps (10, say); none: only NaN and infinity."
    spike_window: Annotated[int, Field(ge=2)] = 100
    "Good steps that the mean and the deviation are taken over."
    max_rewinds: AtLeastOne = 3
    "Stop when so many rewinds have not helped."

    # --- evaluation
    val_data: str | None = None
    "Directory of shards whose val split to use; none: the training data's own."
    eval_steps: AtLeastOne = 250
    "Evaluate every so many steps, and before the first and after the last."
    val_tokens: AtLeastOne | None = 10_485_760
    "Validation tokens per evaluation (llm.c's and modded-nanogpt's number); none: all."
    hellaswag: str | None = None
    "HellaSwag examples to score at every evaluation: a .jsonl file, a directory or a Hub id; none: off."
    hellaswag_limit: AtLeastOne | None = None
    "Only the first so many examples of HellaSwag and of eval_tasks; none: all."
    eval_tasks: list[str] = field(default_factory=list)
    "Tasks to score at every evaluation: NAME or NAME=FILE; hellaswag, arc_easy, piqa, winogrande, lambada."
    stop_when_val_rises: AtLeastOne | None = None
    "End the run after so many evaluations in a row with a val_loss above that of `best`; each is saved; none: off."
    sample_prompts: list[str] = field(default_factory=lambda: [""])
    "Prompts to continue at every evaluation; an empty one starts a new document."
    sample_tokens: NotNegative = 64
    "Tokens per sample; 0 turns samples off."

    # --- log and checkpoints
    log_steps: AtLeastOne = 10
    "Fetch the numbers of the last steps from the device every so many steps."
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    "Trackers beside metrics.jsonl."
    project: str = "gpt2repro"
    "Project name in the trackers."
    save_steps: AtLeastOne = 1000
    "Checkpoint every so many steps, and after the last."
    keep_last: AtLeastOne | None = 3
    "Newest checkpoints to keep (best, final and milestones stay as well); none: all."
    milestone_steps: AtLeastOne | None = None
    "Never delete checkpoints of multiples of this; none: no milestones."
    resume: str = field(default="auto", metadata={"config": False})
    "auto: continue the run that run_dir holds; never: refuse to; a checkpoint directory; hub:user/name[@revision]."
    push_to_hub: str | None = None
    "user/name: publish every kept checkpoint there, in the background."
    hub_public: bool = False
    "Make the repository public when it is created."
    profile: AtLeastOne | None = field(default=None, metadata={"config": False})
    "Profile this many steps after warm-up (torch.profiler): trace and table in the run directory; none: off."

    # --- before it starts
    plan: bool = field(default=False, metadata={"config": False})
    "Print what the run would need and cost, and stop."
    gpu_memory_gib: Positive | None = None
    "For --plan: memory of one GPU; none: this machine's, if it has one, else 80."
    assumed_mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    "For --plan: model FLOPs utilisation to assume."
    dollars_per_gpu_hour: Positive | None = None
    "Price of one GPU for an hour, for --plan and the model card; none: no cost is stated."

    def problems(self) -> list[str]:
        """What the options' types cannot say, found before anything is loaded."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        sequences = self.micro_batch_size or 1  # none: the choice will divide the batch
        per_pass = sequences * self.seq_len * world
        nearest = max(1, round(self.batch_tokens / per_pass)) * per_pass
        leaves = max(1, self.batch_tokens // (sequences * self.seq_len))
        parameters = 12 * self.n_layer * self.n_embd**2 + ((self.vocab_size or 0) + self.n_positions) * self.n_embd
        fresh = self.init_from is None  # else the given model's sizes win
        checks = [
            (parameters > LARGEST_MODEL, f"n_layer, n_embd, vocab_size, n_positions make {parameters:.2g} parameters"),
            (fresh and self.n_embd % self.n_head, f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}"),
            (
                fresh and self.seq_len > self.n_positions,
                f"seq_len={self.seq_len} is longer than n_positions={self.n_positions}",
            ),
            (
                self.reduction == "fixed" and (leaves & (leaves - 1) or world & (world - 1)),
                f"reduction=fixed needs powers of two, not {leaves} micro-batches in the batch and {world} processes; "
                "take 1, 2, 4 or 8 processes, and change batch_tokens or micro_batch_size",
            ),
            (self.reduction == "fixed" and self.micro_batch_size is None, "reduction=fixed needs micro_batch_size"),
            (self.cooldown_from is not None and self.cooldown_steps is None, "cooldown_from needs cooldown_steps"),
            (
                self.schedule == "wsd" and (self.cooldown_steps or 0) > self.max_steps and self.cooldown_from is None,
                f"cooldown_steps={self.cooldown_steps} is more than max_steps={self.max_steps}",
            ),
            (
                self.documents == "mask" and self.attn_implementation == "flash_attention_2",
                "documents=mask and flash_attention_2: transformers has it for one sequence per pass only; take sdpa",
            ),
            (self.min_lr > self.lr, f"min_lr={self.min_lr} is above lr={self.lr}"),
            (
                self.batch_tokens % per_pass,
                f"batch_tokens={self.batch_tokens} is not a multiple of {per_pass} ({sequences} sequences "
                f"x {self.seq_len} tokens x {world} processes); try {nearest}, or another micro_batch_size",
            ),
            (
                self.bf16_residual and self.precision not in ("auto", "bf16"),
                f"bf16_residual needs precision bf16, not {self.precision}",
            ),
            (self.zero_init and not fresh, "zero_init is for random weights, not for init_from; leave one of them out"),
            (
                self.recut_windows and self.data.startswith("stream:"),
                "recut_windows is for token shards: a stream shuffles its documents, so each epoch has other windows",
            ),
            (self.resume == "hub:", "resume=hub: needs a repository: hub:user/name[@revision]"),
        ]
        return [sentence for is_wrong, sentence in checks if is_wrong]


def main(argv: list[str]) -> int:
    """Options, then the plan or the run."""
    # OpenMP's threads spin while they wait, which slows others on a busy CPU; threads that sleep at once wake up late.
    # The quickstart on two cores, alone and beside two busy processes: 12,100 and 5,000 tokens/s with 1000 turns,
    # 16,000 and 5,700 with 10,000, 16,000 and 5,200 (3,400 on average) with 300,000. The import of torch reads it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    is_first = int(os.environ.get("RANK", 0)) == 0
    try:
        config = parse_options(TrainConfig, argv, prog="train_accelerate.py", description=__doc__ + CONFIGS)
    except InputError:
        if is_first:  # the other processes would print the same
            raise
        return 2
    if config.cooldown_from is not None:
        from gpt2repro.training.state import cooled_down

        config = cooled_down(config)
    if config.plan:
        from gpt2repro.publishing.hub import may_write
        from gpt2repro.training.planning import print_plan

        return print_plan(config, may_write) if is_first else 0
    return train(config)


def train(config: TrainConfig) -> int:
    """One run, from its first step or from its newest checkpoint to `max_steps`. Returns the exit code."""
    import torch

    from gpt2repro.data.documents import document_positions
    from gpt2repro.data.sources import open_data
    from gpt2repro.models import build_model, compile_model, load_for_comparison
    from gpt2repro.publishing.hub import Uploader, fetch_checkpoint
    from gpt2repro.training.health import step_unless_bad
    from gpt2repro.training.machine import build_accelerator, device_name, step_seed, whole
    from gpt2repro.training.meter import Meter, flops_per_token_of, peak_flops
    from gpt2repro.training.optim import build_optimizer
    from gpt2repro.training.profiling import profiling
    from gpt2repro.training.reduction import FixedReduction
    from gpt2repro.training.run import Run
    from gpt2repro.training.schedules import learning_rate, set_learning_rate
    from gpt2repro.training.stopping import StopSignal

    # The machine, the data and the model. Every rank builds the same weights from the same seed, on the CPU.
    accelerator = build_accelerator(config)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    source = open_data(config, sequences=config.batch_tokens // config.seq_len)
    model = build_model(config, source.vocab_size, source.tokenizer)

    # Compile first, wrap second: so autocast lies inside the graph and the state dict keeps its names.
    ranks = world if config.reduction == "fast" else 1  # that exchange gradients during the backward pass
    compiled = compile_model(model, config.compile, device.type, ranks, sharded=accelerator.distributed_type == "FSDP")
    # The processes of one machine share Muon's work. Between machines the results may travel longer than they compute.
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
    recipe = {name: getattr(config, name) for name in ("lr", "weight_decay", "eps", "muon_lr_scale", "cautious_decay")}
    recipe |= {"name": config.optimizer, "betas": (config.beta1, config.beta2)}
    recipe |= {"processes": world if one_machine else 1, "compiled": compiled != "off" and device.type == "cuda"}
    optimizer = build_optimizer(model, **recipe)
    schedule = {name: getattr(config, name) for name in SCHEDULE}

    # What one token costs and what the devices could do at most: together they are the MFU that the log shows.
    flops, peak = flops_per_token_of(model, config.seq_len), peak_flops(device_name(device))
    speed = {"batch_tokens": config.batch_tokens, "flops_per_token": flops, "device_peak": peak}
    if config.reduction == "fixed":
        model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP: `fixed` exchanges the gradients
    model, optimizer = accelerator.prepare(model, optimizer)  # nothing else: the module's first lines say why
    fixed = FixedReduction(model) if config.reduction == "fixed" else None
    eot_id = source.tokenizer.eos_token_id if config.documents == "mask" else None
    forward_options = {"use_cache": False, "output_logits": False, "loss_chunk_tokens": config.loss_chunk_tokens}
    forward_options |= {"residual_dtype": torch.bfloat16} if config.bf16_residual else {}

    with (
        Run(config, accelerator, model, optimizer, source, compiled=compiled, fetch=fetch_checkpoint) as run,
        StopSignal(world) as stop,
        profiling(
            config.run_dir / "profile",
            config.profile if accelerator.is_main_process else None,
            logits=(config.micro_batch_size * config.seq_len, run.plain_model.config.vocab_size),
        ) as profiler,
    ):
        if config.push_to_hub is not None and accelerator.is_main_process:
            where = {"run_dir": config.run_dir, "private": not config.hub_public}
            run.uploader = Uploader(config.push_to_hub, **where, comparable=load_for_comparison)
        batches, verdict, failed, evaluated = run.batches(), None, False, {}
        meter = Meter(accelerator, **speed, same=config.reduction == "fixed")  # from here on time counts
        model.train()  # dropout is on; every evaluation turns it off and on again

        # An untrained model should score ln(V): the cheapest test of data, labels and initialisation there is.
        if run.state.step == 0:
            with meter.pause():
                evaluated = run.evaluate()

        while not run.is_over() and not stop.agreed():
            state = run.state  # what changes from step to step, and what a checkpoint keeps

            # The learning rate is a pure function of the step: nothing to save, nothing to step once per process.
            lr = learning_rate(state.step, **schedule)
            set_learning_rate(optimizer, lr)

            # This rank's rows of the global batch, inputs and shifted targets, (rows, T) each. The batch is a pure
            # function of (data, seed, position), so `source` is all that a resumed run has to know about its data.
            start = state.source["position"]
            if (batch := stop.next_of(batches)) is None:  # a signal came while the data kept the run waiting
                break
            x, y, state.source = batch
            x, y = (part.to(device, non_blocking=device.type == "cuda") for part in (x, y))  # `prefetch` pinned them
            # Dropout's masks depend on (seed, step, rank) alone, whatever evaluation or a restart drew in between; with
            # a fixed reduction on the micro-batch's number in the global batch, whoever computes it.
            torch.manual_seed(step_seed(config.seed, state.step, rank))
            divisor = x.numel() if fixed is None else config.batch_tokens

            # Gradients add up over micro-batches of (B, T). Only the last one lets DDP or FSDP exchange them.
            loss = torch.zeros((), device=device, dtype=torch.float64 if config.precision == "fp64" else None)
            for first in range(0, len(x), config.micro_batch_size):
                rows = slice(first, first + config.micro_batch_size)
                if fixed is not None:
                    leaf = (rank * len(x) + first) // config.micro_batch_size
                    torch.manual_seed(step_seed(config.seed, state.step, leaf))
                with contextlib.nullcontext() if rows.stop >= len(x) else accelerator.no_sync(model):
                    # Only the loss leaves the graph, not (B, T, V) logits in fp32: this rank's sum over the tokens of
                    # the step: micro-batches weigh alike. The average over the ranks is DDP's and FSDP's part.
                    row_losses = model(
                        input_ids=x[rows],
                        position_ids=document_positions(x[rows], eot_id),  # None: documents see each other
                        shift_labels=y[rows],
                        num_items_in_batch=divisor,
                        loss_per_row=bool(source.sources),
                        **forward_options,
                    ).loss
                    accelerator.backward(micro_loss := row_losses.sum())  # a recipe's losses come row by row, (B,)
                loss += micro_loss.detach()  # stays on the device: no step waits for a number
                meter.keep(row_losses, divisor)  # for the loss of each source of a recipe
                if fixed is not None:
                    fixed.keep(micro_loss)  # its gradients went into the tree as backward made them
            loss = loss if fixed is None else fixed.finish()

            # Clip to one global norm. Without clipping the norm is still the best early sign of trouble.
            grad_norm = whole(accelerator.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))

            # Step; with `skip`, a bad loss or norm leaves weights and moments as they are, decided on the device.
            if config.on_bad_numbers == "skip":
                mean_loss = accelerator.reduce(loss, reduction="mean") if fixed is None else loss
                fine = run.monitor.allow(mean_loss, grad_norm, scaled=accelerator.scaler is not None)
                step_unless_bad(optimizer, fine, accelerator.scaler)
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # the next backward writes instead of adding to zeros
            profiler.step()
            state.step += 1
            if run.average is not None:
                run.average.update(state.step)
            meter.add(
                step=state.step, lr=lr, loss=loss, grad_norm=grad_norm, positions=[start, state.source["position"]]
            )

            # Log. The numbers of many steps come from the device in one transfer; bad ones are found before any save.
            due, is_last = state.step % config.eval_steps == 0, state.step == config.max_steps
            saving = is_last or state.step % config.save_steps == 0 or (due and config.stop_when_val_rises is not None)
            evaluating = due or saving  # unevaluated, a checkpoint could not become `best`
            if state.step % config.log_steps == 0 or evaluating:
                verdict = run.record(meter.read())
                with meter.pause():
                    if verdict is not None and verdict.action == "rewind" and run.rewind(verdict):
                        batches.close()  # they were read ahead on the way that is given up
                        batches = run.batches()
                        continue
                if verdict is not None and verdict.action != "skip":
                    failed = True
                    break

            # Evaluate and save, outside the measured time.
            with meter.pause():
                if evaluating:
                    evaluated = run.evaluate()
                if saving:
                    run.save(evaluated.get("val_loss", math.inf))

        # The end of the run, or of this process' part in it. Bad weights are never saved, also where a signal came.
        if not failed and (verdict := run.record(meter.read())) is not None:
            failed = verdict.action == "stop" or (verdict.action == "rewind" and not run.rewind(verdict))
        run.finish(verdict if failed else None, stop)
    accelerator.end_training()
    return run.exit_code


if __name__ == "__main__":
    sys.exit(run_main(main))
