"""A picture of one or more runs: loss, learning rate, tokens per second. Reads metrics.jsonl; knows no training."""

import itertools
from pathlib import Path

from gpt2repro.files import atomic_file
from gpt2repro.options import InputError
from gpt2repro.training.metrics_log import read_metrics

MOST_POINTS = 4000  # of a curve: three for every pixel of the picture's width


LARGEST = 1e100  # matplotlib cannot divide an axis that is longer


def draw_runs(run_dirs: list[str | Path], out_png: str | Path) -> Path:
    """Draw the runs into one PNG, which appears whole or not at all.

    Raises: InputError for a run without a logged loss.
    """
    # Without pyplot: no window system, no global state, and it may be called from any thread.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    run_dirs = [Path(run) for run in run_dirs]
    runs = {
        name: read_metrics(run, at_most=MOST_POINTS) for name, run in zip(run_names(run_dirs), run_dirs, strict=True)
    }
    for name, (train, evaluations) in runs.items():
        if not series(train, "loss")[0] and not series(evaluations, "val_loss")[0]:
            raise InputError(f"{name} has no metrics.jsonl with a loss; give the directory of a run that has trained")

    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[2.2, 1])
    loss_axes = figure.add_subplot(grid[0, :])
    lr_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    speed_axes = figure.add_subplot(grid[1, 1], sharex=loss_axes)

    more_colours = itertools.count(len(runs))  # for the sources of a recipe
    for number, (name, (train, evaluations)) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        name = name.replace("$", r"\$")  # or matplotlib reads it as mathematics
        name = f" {name}" if name.startswith("_") else name  # or it leaves the curve out of the legend
        steps, losses = series(train, "loss")
        loss_axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        loss_axes.plot(steps, smooth(losses), color=colour, linewidth=1.4, label=f"{name}: training, smoothed")
        draw_evaluations(loss_axes, evaluations, "val_loss", f"{name}: validation", "o--", colour)
        draw_evaluations(loss_axes, evaluations, "val_loss_masked", f"{name}: documents apart", "^-.", colour)
        draw_evaluations(loss_axes, evaluations, "val_loss_ema", f"{name}: averaged weights", "s:", colour)
        for source in sources_of(train + evaluations):
            of_source, label = f"C{next(more_colours) % 10}", f"{name}: {source}"
            steps, losses = series(train, f"loss/{source}")
            loss_axes.plot(
                steps, smooth(losses), ":", color=of_source, linewidth=1, label=f"{label}, training, smoothed"
            )
            draw_evaluations(loss_axes, evaluations, f"val_loss/{source}", f"{label}, validation", "s--", of_source)
        lr_axes.plot(*series(train, "lr"), color=colour)
        steps, rates = series(train, "tokens_per_second")
        speed_axes.plot(steps, rates, color=colour, alpha=0.25, linewidth=0.8)
        speed_axes.plot(steps, smooth(rates), color=colour, linewidth=1.4)

    loss_axes.set(title="Loss", ylabel="nats per token")
    loss_axes.legend(fontsize="small")
    lr_axes.set(title="Learning rate", xlabel="step")
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lr_axes.set_ylim(bottom=0)
    speed_axes.set(title="Tokens per second", xlabel="step")
    speed_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed_axes.set_ylim(bottom=0)
    for axes in (loss_axes, lr_axes, speed_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out_png, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    return out_png


def sources_of(records: list[dict]) -> list[str]:
    """The names of a recipe's sources, from loss/NAME and val_loss/NAME."""
    return sorted({name.partition("/")[2] for r in records for name in r if name.startswith(("loss/", "val_loss/"))})


def draw_evaluations(axes, evaluations: list[dict], metric: str, label: str, style: str, colour: str) -> None:
    """A line with a mark at each evaluation and its last value in the legend; nothing where nothing was measured."""
    steps, values = series(evaluations, metric)
    if steps:
        label = f"{label}, last {values[-1]:.4f}"
        axes.plot(steps, values, style, color=colour, markersize=4 if style[0] == "o" else 3, linewidth=1, label=label)


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have a finite number under `name`."""
    numbers = (r for r in records if isinstance(r.get(name), (int, float)) and abs(r[name]) < LARGEST)  # no NaN is
    points = [(r["step"], r[name]) for r in numbers if abs(r["step"]) < LARGEST]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> list[float]:
    """Mean over about a fiftieth of the run, centred on each point: a running mean would lag behind a fall."""
    half = len(values) // 100
    sums = [0.0, *itertools.accumulate(values)]
    borders = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in borders]


def run_names(run_dirs: list[Path]) -> list[str]:
    """The directories' names, with as few parents in front as tell them apart."""
    paths = [run.resolve() for run in run_dirs]
    for depth in itertools.count(1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
