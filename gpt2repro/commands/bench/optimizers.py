"""Muon beside AdamW on a small model, tuned alike: same data order, schedule and learning rates to choose from.

    gpt2repro prepare-text --corpus shakespeare --tokenizer char --out data/shakespeare_char
    gpt2repro bench optimizers --data data/shakespeare_char

Every run is 600 steps of the `shakespeare_char_cpu` preset's model and batch, in eager fp32. Then Muon runs once more
at its best learning rate with half the steps. Writes the losses to results/benchmarks and the curves to results/.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from gpt2repro.commands.bench.harness import RECORDS, figure, host_kind, write_record
from gpt2repro.data.shards import open_split
from gpt2repro.data.sources import ShardSource
from gpt2repro.options import InputError, parse_options
from gpt2repro.training.optim import build_optimizer, learning_rate, set_learning_rate

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64}
SEQUENCES = 12
EVALUATIONS = 12  # per run


@dataclass
class Options:
    data: str
    "Directory of token shards with a validation split; a small vocabulary, if a CPU is to do it."
    steps: int = 600
    "Steps of each run, and of its schedule."
    lr: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    "Learning rates that both optimizers may choose from."
    seed: int = 1337
    "Seeds weights and data order."
    val_windows: int = 512
    "Validation windows per evaluation."
    out: Path = RECORDS
    "Directory of the JSON record."
    figures: Path = Path("results")
    "Directory of the figure."

    def problems(self) -> list[str]:
        return [] if self.lr and min(self.lr) > 0 and self.steps > 1 else ["lr must be positive and steps at least 2"]


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench optimizers", description=__doc__)
    runs = [run(options, name, lr, options.steps) for lr in options.lr for name in ("adamw", "muon")]
    adamw, muon = (
        min((run for run in runs if run["optimizer"] == name), key=lambda run: run["curve"][-1][1])
        for name in ("adamw", "muon")
    )
    half = run(options, "muon", muon["lr"], options.steps // 2)
    target = adamw["curve"][-1][1]
    reached_at = next((step for step, loss in muon["curve"] if loss <= target), None)
    rows = [
        figure(f"validation loss, {options.steps} steps, AdamW at its best rate {adamw['lr']:g}", target, unit="nats"),
        figure(
            f"validation loss, {options.steps} steps, Muon at its best rate {muon['lr']:g}",
            muon["curve"][-1][1],
            unit="nats",
        ),
        figure(
            f"validation loss, {options.steps // 2} steps, Muon at {muon['lr']:g} (goal: AdamW's in twice the steps)",
            half["curve"][-1][1],
            unit="nats",
            goal=target,
            at_most=True,
        ),
    ]
    options.figures.mkdir(parents=True, exist_ok=True)
    picture = options.figures / f"optimizers-{host_kind()}.png"
    draw([*runs, half], {"adamw": adamw["lr"], "muon": muon["lr"]}, picture)
    results = {
        "config": {**SHAPE, "sequences": SEQUENCES, "seed": options.seed, "lr": options.lr},
        "runs": [*runs, half],
        "best_lr": {"adamw": adamw["lr"], "muon": muon["lr"]},
        "muon_step_that_reaches_adamws_final_loss": reached_at,
        "figure": picture.as_posix(),
        "headlines": rows,
    }
    write_record("optimizers", results, argv=argv, out=options.out)
    return 0


def run(options: Options, name: str, lr: float, steps: int) -> dict:
    """Train once; returns the setting and the curve [[step, validation loss], …]. Raises: InputError for no data."""
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    train, validation = open_split(options.data, "train"), open_split(options.data, "val")
    seq_len = SHAPE["n_positions"]
    windows = min(options.val_windows, (validation.tokens - 1) // seq_len)
    if windows < 1:
        raise InputError(
            f"{options.data} has {validation.tokens} validation tokens, fewer than one window of {seq_len}"
        )
    tokens = torch.from_numpy(validation.read(0, windows * seq_len + 1).astype("int64"))
    val_x, val_y = tokens[:-1].view(-1, seq_len), tokens[1:].view(-1, seq_len)

    torch.manual_seed(options.seed)
    ends = {"bos_token_id": train.eot_id, "eos_token_id": train.eot_id}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPE, vocab_size=train.vocab_size, **ends))
    optimizer = build_optimizer(model, name=name, lr=lr, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    source = ShardSource(train, seq_len=seq_len, seed=options.seed)
    batches = source.batches(source.initial_state(), rank=0, world=1, sequences=SEQUENCES)
    schedule = {"lr": lr, "min_lr": lr / 10, "warmup_steps": steps // 12, "max_steps": steps}
    every = max(1, steps // EVALUATIONS)
    curve = []
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(step, **schedule))
        x, y, _ = next(batches)
        model(input_ids=x, shift_labels=y, output_logits=False, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            with torch.inference_mode():
                loss = model(input_ids=val_x, shift_labels=val_y, output_logits=False, use_cache=False).loss.item()
            curve.append([step + 1, loss])
    print(f"  {name}, lr {lr:g}, {steps} steps: validation loss {curve[-1][1]:.4f}", flush=True)
    return {"optimizer": name, "lr": lr, "steps": steps, "curve": curve}


def draw(runs: list[dict], best_lr: dict[str, float], out: Path) -> None:
    """Every run's validation loss over its steps; the best rate of each optimizer drawn bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for one in runs:
        is_best = one["lr"] == best_lr[one["optimizer"]]
        steps, losses = zip(*one["curve"], strict=True)
        style = {"color": "tab:blue" if one["optimizer"] == "adamw" else "tab:orange", "marker": "."}
        label = f"{one['optimizer']}, lr {one['lr']:g}, {one['steps']} steps" if is_best else None
        axis.plot(steps, losses, **style, linewidth=2.5 if is_best else 0.8, alpha=1 if is_best else 0.4, label=label)
    axis.set_xlabel(f"steps of {SEQUENCES * SHAPE['n_positions']} tokens")
    axis.set_ylabel("validation loss, nats per token")
    axis.set_title("Muon and AdamW, every learning rate tried (best ones bold)")
    axis.grid(alpha=0.3)
    axis.legend()
    picture.savefig(out, dpi=120)
    plt.close(picture)
    print(f"figure: {out}", flush=True)
