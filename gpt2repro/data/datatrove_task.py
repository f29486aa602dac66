"""prepare_fineweb's units as tasks of a datatrove executor (`pip install 'gpt2repro[datatrove]'`).

`PreparePart` is a step of a datatrove pipeline: task `rank` of `world_size` does the units of that node. The code, and
so every byte, is the same as without datatrove. Any executor takes it:

    options = prepare_fineweb.Options(out=Path("/shared/fineweb"))
    part = PreparePart(prepare_fineweb.prepare_part, options, workers=16)
    SlurmPipelineExecutor([part], tasks=64, time="10:00:00", partition="cpu", cpus_per_task=16)

Afterwards one more run of prepare_fineweb.py finds every unit finished and writes the manifest. The local executor is
tested; Slurm's and Ray's have not been run.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from gpt2repro.options import InputError


class PreparePart:
    """One task: `prepare(options)` as node `rank` of `world_size`, with `workers` processes. datatrove pickles it."""

    def __init__(self, prepare: Callable[[Any], Any], options: Any, workers: int = 1):
        self.prepare, self.options, self.workers = prepare, options, workers

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        node = {"num_nodes": world_size, "node_index": rank, "workers": self.workers}
        self.prepare(dataclasses.replace(self.options, **node))
        return iter(())


def run_locally(prepare: Callable[[Any], Any], options: Any) -> None:
    """Run all tasks on this machine, each in one process. Raises: InputError if datatrove is not installed."""
    try:
        from datatrove.executor import LocalPipelineExecutor
    except ImportError as error:
        raise InputError("--executor datatrove needs a package: pip install 'gpt2repro[datatrove]'") from error
    count = options.workers or os.cpu_count() or 1
    logs = options.out.with_name(f"{options.out.name}.datatrove")  # beside OUT, which holds nothing but the data set
    LocalPipelineExecutor(
        [PreparePart(prepare, options)],
        tasks=count,
        workers=count,
        logging_dir=str(logs),
        skip_completed=False,
        start_method="spawn",
    ).run()
