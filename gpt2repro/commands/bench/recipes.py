"""Which changes of the training recipe are worth it: small GPT-2s, one change at a time, several seeds, all listed.

    gpt2repro bench recipes --minutes 60            again and again, until all cells are done
    OMP_NUM_THREADS=1 gpt2repro bench recipes --workers 2
    gpt2repro bench recipes --widths 72 --seeds 5   the smallest width, with more seeds

Every cell is a run of the real training program: one width, one recipe, one seed. All recipes of a width see the same
tokens. Runs of one seed begin with the same weights and see the tokens in the same order, so they are compared in
pairs. The learning rates of AdamW and of Muon are tuned first, each on a grid with a cosine schedule, so that both
baselines are as good as they can be; the changes keep that rate. The grid has two seeds, because the best rate of one
seed can be one at which the next seed's loss jumps up. Every run also keeps a moving average of its weights (EMA),
whose loss is listed beside its own.

The tokens that a recipe needs are not read off the middle of a long run, where the learning rate has not fallen yet.
Shorter runs are trained to their end, and the length that reaches AdamW's loss lies between two of them: the loss of
tuned AdamW, and that of the best of its variants, which was not known before the runs. The record is written cell by
cell, and the next start goes on with what is missing.
"""

import itertools
import math
import os
import shutil
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gpt2repro.commands.bench.harness import CommonOptions, Record, finished
from gpt2repro.files import read_json_if_whole
from gpt2repro.options import AtLeastOne, parse_options
from gpt2repro.training.comparison import mean_and_error, paired
from gpt2repro.training.metrics_log import read_metrics

HEAD_SIZE, LAYERS, SEQ_LEN, BATCH_TOKENS, VOCABULARY = 24, 4, 128, 1024, 512
EMA_DECAY = 0.98  # about the last 50 steps
GRIDS = {"AdamW": (0.001, 0.002, 0.004, 0.008), "Muon": (0.004, 0.008, 0.016, 0.032)}
GRID_SEEDS = (1, 2)
MUON, TO_ZERO = ["--optimizer", "muon"], ["--min_lr", "0"]
LINEAR, WSD = ["--schedule", "linear", *TO_ZERO], ["--schedule", "wsd", *TO_ZERO]
# Recipe -> (the plain recipe whose tuned rate it takes and that it is compared with, its options).
RECIPES = {
    "AdamW": ("AdamW", []),
    "AdamW, linear to 0": ("AdamW", LINEAR),
    "AdamW, wsd to 0": ("AdamW", WSD),
    "AdamW, zero init": ("AdamW", ["--zero_init"]),
    "AdamW, cautious decay": ("AdamW", ["--cautious_decay"]),
    "Muon": ("Muon", MUON),
    "Muon, linear to 0": ("Muon", [*MUON, *LINEAR]),
    "Muon, wsd to 0": ("Muon", [*MUON, *WSD]),
    "Muon, zero init": ("Muon", [*MUON, "--zero_init"]),
    "Muon, cautious decay": ("Muon", [*MUON, "--cautious_decay"]),
    "Muon, all together": ("Muon", [*MUON, *LINEAR, "--zero_init", "--cautious_decay"]),
    "Muon at AdamW's rate, matrices at 4 times it": ("AdamW", [*MUON, "--muon_lr_scale", "4"]),
}
FINALISTS = ("Muon", "Muon, all together")
LENGTHS = (0.2, 0.35, 0.5, 0.7)  # of the whole run, for the finalists
# The goals of the best recipe, at the smallest and the largest width.
GOALS = {
    f"{name}, to the loss of AdamW, width {width}": goal
    for name in FINALISTS
    for width, goal in ((72, 0.45), (240, 0.55))
}
MORE_SEEDS = 2  # for the finalists, and for AdamW, with which they are compared


@dataclass(kw_only=True)
class Options(CommonOptions):
    widths: list[AtLeastOne] = field(default_factory=lambda: [72, 144, 240])
    "Widths (n_embd) of the models of 4 layers, multiples of 24: about 0.3M, 1M and 3M parameters."
    seeds: AtLeastOne = 3
    "Seeds of each recipe."
    steps: AtLeastOne = 400
    "Steps of a whole run, of 1,024 tokens."
    data: Path | None = None
    "Token shards; none: the text that ships with Python, with a vocabulary of 512."
    workers: AtLeastOne = 1
    "Cells that are trained at a time; give each its threads with OMP_NUM_THREADS."
    work_dir: Path = Path("runs/recipes")
    "Where the data and the runs are put; a finished run is removed."

    def problems(self) -> list[str]:
        wrong = [width for width in self.widths if width % HEAD_SIZE]
        return [f"widths must be multiples of {HEAD_SIZE}, not {', '.join(map(str, wrong))}"] if wrong else []


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro bench recipes", description=__doc__)
    bench = Bench(Record("recipes", argv, options), options)
    for width in options.widths:
        bench.measure(width)
    bench.summarise()
    return bench.record.finish()


class Bench:
    """The cells that are done, by name; trains those that are missing, and compares them."""

    def __init__(self, record: Record, options: Options):
        self.record, self.options = record, options
        before = (read_json_if_whole(record.path) or {}).get("results", {})
        self.data = options.data or options.work_dir / "data"
        if not self.data.exists():
            program(["prepare-text", "--corpus", "python-docs", "--vocab_size", VOCABULARY, "--out", self.data])
        sizes = {"layers": LAYERS, "head_size": HEAD_SIZE, "seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS}
        splits = (read_json_if_whole(self.data / "manifest.json") or {}).get("splits", {})
        epochs = round(options.steps * BATCH_TOKENS / splits["train"]["tokens"], 3) if splits else None
        sizes |= {"steps": options.steps, "epochs": epochs, "ema_decay": EMA_DECAY, "data": str(self.data)}
        self.writing = threading.Lock()
        self.cells: dict[str, dict] = before.get("cells", {}) if before.get("settings") == sizes else {}
        record.save(settings=sizes, widths_not_run=[], cells=self.cells)

    def measure(self, width: int) -> None:
        """All cells of one width: the grids, then seed by seed; so a bench that is cut off has whole comparisons."""
        whole = self.options.steps
        grid = [(name, lr) for name, rates in GRIDS.items() for lr in rates]
        self.train([(width, name, lr, seed, whole) for (name, lr), seed in itertools.product(grid, GRID_SEEDS)])
        rates = {name: self.best_rate(width, name) for name in GRIDS}
        if None in rates.values():
            return
        seeds = range(1, self.options.seeds + 1)
        more_seeds = range(seeds.stop, seeds.stop + MORE_SEEDS)
        jobs = [(name, seed, 1.0) for seed in seeds for name in RECIPES]
        jobs += [(name, seed, part) for seed in seeds for name in FINALISTS for part in LENGTHS]
        jobs += [(name, seed, 1.0) for seed in more_seeds for name in ("AdamW", *FINALISTS)]
        self.train([(width, name, rates[RECIPES[name][0]], seed, round(part * whole)) for name, seed, part in jobs])

    def train(self, cells: list[tuple]) -> None:
        """Train the cells in their order, `workers` at a time."""
        with ThreadPoolExecutor(self.options.workers) as pool:
            list(pool.map(lambda cell: self.cell(*cell), cells))  # what a cell raises comes out here

    def cell(self, width: int, name: str, lr: float, seed: int, steps: int) -> None:
        """Train one run, unless the record has it or the time is over."""
        key = cell_name(width, name, lr, seed, steps)
        if key in self.cells or self.record.results["dropped"] or not self.record.time_for(f"{key} and what follows"):
            return
        run_dir = self.options.work_dir / key.replace(", ", "-").replace(" ", "_")
        flags = {"data": self.data, "run_dir": run_dir, "seed": seed, "lr": lr}
        flags |= {"n_layer": LAYERS, "n_head": width // HEAD_SIZE, "n_embd": width, "n_positions": SEQ_LEN}
        flags |= {"seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS, "micro_batch_size": BATCH_TOKENS // SEQ_LEN}
        flags |= {"max_steps": steps, "warmup_steps": steps // 20, "min_lr": lr / 10, "ema_decay": EMA_DECAY}
        flags |= {"eval_steps": max(1, steps // 8), "save_steps": steps, "val_tokens": 32768, "sample_tokens": 0}
        command = ["train", *(part for flag, value in flags.items() for part in (f"--{flag}", value)), "--trackers"]
        program([*command, *RECIPES[name][1]])
        training, evaluations = read_metrics(run_dir)
        last = evaluations[-1]
        found = {
            "val_loss": last["val_loss"],
            "val_loss_ema": last["val_loss_ema"],
            "bits_per_byte": last["bits_per_byte"],
            "curve": [[one["step"], round(one["val_loss"], 4)] for one in evaluations],
            "seconds": round(sum(step["step_seconds"] for step in training), 1),
            "load": round(os.getloadavg()[0], 1),
        }
        with self.writing:
            self.cells[key] = found
            self.record.save(cells=self.cells)
        print(f"{key}: {last['val_loss']:.4f}, averaged {last['val_loss_ema']:.4f}", flush=True)
        shutil.rmtree(run_dir)

    def best_rate(self, width: int, name: str) -> float | None:
        """The rate of the grid with the lowest mean loss; None before the whole grid is done."""
        keys = {lr: [cell_name(width, name, lr, seed, self.options.steps) for seed in GRID_SEEDS] for lr in GRIDS[name]}
        if not self.cells.keys() >= set(itertools.chain(*keys.values())):
            return None
        return min(keys, key=lambda lr: sum(self.cells[key]["val_loss"] for key in keys[lr]))

    def losses(self, width: int, name: str, steps: int, what: str = "val_loss") -> dict[int, float]:
        """Seed -> loss of one recipe at its tuned rate; {} before the rate is known."""
        lr = self.best_rate(width, RECIPES[name][0])
        seeds = range(1, self.options.seeds + MORE_SEEDS + 1)
        keys = {seed: cell_name(width, name, lr, seed, steps) for seed in seeds}
        return {seed: self.cells[key][what] for seed, key in keys.items() if lr and key in self.cells}

    def summarise(self) -> None:
        """Put the comparisons of all widths and recipes into the record, print them, and add the table's rows."""
        rows, steps = [], self.options.steps
        for width in self.options.widths:
            for name, what in itertools.product(RECIPES, ("val_loss", "val_loss_ema")):
                if found := self.losses(width, name, steps, what):
                    rows.append(self.row(width, name, what, found))
        widths = self.options.widths
        needed = {
            f"{name}, to the loss of {baseline}, width {width}": self.tokens_needed(width, name, baseline)
            for width in widths
            for baseline in dict.fromkeys(("AdamW", self.best_of_adamw(width)))
            for name in FINALISTS
        }
        rates = {f"{width}, {name}": self.best_rate(width, name) for width in widths for name in GRIDS}
        missing = [width for width in widths if not self.losses(width, "AdamW", steps)]
        self.record.save(comparisons=rows, tokens_needed=needed, rates=rates, widths_not_run=missing)
        print("\n".join(["", *markdown(rows)]))
        for key, part in needed.items():
            if part is not None:
                self.record.figure(f"part of the tokens: {key}", part, unit="", goal=GOALS.get(key), at_most=True)

    def row(self, width: int, name: str, what: str, found: dict[int, float]) -> dict:
        """One recipe against the plain recipe of its rate and against tuned AdamW, at equal tokens."""
        mean, error = mean_and_error([*found.values()])
        steps = self.options.steps
        seconds = [self.losses(width, one, steps, "seconds") for one in (name, "AdamW")]
        both = seconds[0].keys() & seconds[1].keys()
        ratio = statistics.median(seconds[0][seed] / seconds[1][seed] for seed in both) if both else None
        return {
            "width": width, "recipe": name + (" + EMA" if what == "val_loss_ema" else ""), "seeds": len(found),
            "mean": mean, "standard_error": error, "seconds_ratio": ratio,
            "against_plain": paired(found, self.losses(width, RECIPES[name][0], steps)),
            "against_adamw": paired(found, self.losses(width, "AdamW", steps)),
        }  # fmt: skip

    def best_of_adamw(self, width: int) -> str:
        """The recipe without Muon whose mean loss is lowest; AdamW itself before there is a variant."""
        names = [name for name, (_, flags) in RECIPES.items() if "muon" not in flags]
        losses = {name: self.losses(width, name, self.options.steps) for name in names}
        return min(filter(losses.get, names), key=lambda name: statistics.mean(losses[name].values()), default="AdamW")

    def tokens_needed(self, width: int, name: str, baseline: str) -> float | None:
        """The part of the tokens with which a recipe reaches a baseline's loss: log-linear between two lengths.

        None where no length was run on one side of that loss.
        """
        steps = self.options.steps
        whole = self.losses(width, baseline, steps)
        runs = {part: self.losses(width, name, round(part * steps)) for part in (*LENGTHS, 1.0)}
        seeds = set(whole).intersection(*runs.values())
        if not seeds:
            return None
        goal = statistics.mean(whole[seed] for seed in seeds)
        means = [(math.log(part), statistics.mean(found[seed] for seed in seeds)) for part, found in runs.items()]
        for (left, above), (right, below) in itertools.pairwise(means):
            if above > goal >= below:
                return math.exp(left + (right - left) * (above - goal) / (above - below))
        return None


def cell_name(width: int, name: str, lr: float, seed: int, steps: int) -> str:
    return f"width {width}, {name}, lr {lr}, seed {seed}, {steps} steps"


def markdown(rows: list[dict]) -> list[str]:
    """The comparisons as a Markdown table: negative differences are gains."""
    names = ("width", "recipe", "loss", "against the plain recipe", "against AdamW", "seconds, ratio")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        cells = [str(row["width"]), row["recipe"], f"{row['mean']:.4f}{error} ({row['seeds']})"]
        for test in (row["against_plain"], row["against_adamw"]):
            if test["mean"] is None:
                cells.append("")
            elif test["p"] is None:
                cells.append(f"{test['mean']:+.4f} ({test['pairs']} seeds: too few)")
            else:
                cells.append(f"{test['mean']:+.4f} ± {test['standard_error']:.4f}, p = {test['p']:.3f}")
        cells.append("" if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def program(arguments: list) -> None:
    """Run one of this project's commands. Raises: InputError with its own message where it failed."""
    finished([sys.executable, "-m", "gpt2repro", *arguments])
