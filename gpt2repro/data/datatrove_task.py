"""prepare_fineweb's units as tasks of a datatrove executor (`pip install 'gpt2repro[datatrove]'`).

`PreparePart` is a step of a datatrove pipeline: task `rank` of `world_size` does the units of that node, with the same
code and so the same bytes as without datatrove. Any executor takes it:

    SlurmPipelineExecutor([PreparePart(argv)], tasks=64, time="10:00:00", partition="cpu", cpus_per_task=16)

followed by one more run of prepare_fineweb.py, which finds every unit finished and writes the manifest. The local
executor is tested; Slurm's and Ray's have not been run.
"""

import importlib
import os
from pathlib import Path


class PreparePart:
    """One task: `prepare_fineweb.py ARGV --num_nodes world_size --node_index rank`."""

    def __init__(self, argv: list[str], workers: int = 1):
        self.argv, self.workers = argv, workers

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        script = importlib.import_module("prepare_fineweb")  # by name: a library module imports no script
        options = script.parse_options(script.Options, self.argv, prog="prepare_fineweb.py")
        options.num_nodes, options.node_index, options.workers = world_size, rank, self.workers
        script.prepare_part(options)
        return iter(())


def run_locally(argv: list[str], workers: int | None, out: Path) -> None:
    """All tasks in processes of this machine, each of which works alone."""
    from datatrove.executor import LocalPipelineExecutor

    count = workers or os.cpu_count() or 1
    logs = out.with_name(f"{out.name}.datatrove")  # not in OUT, which holds the data set alone
    LocalPipelineExecutor(
        [PreparePart(argv)],
        tasks=count,
        workers=count,
        logging_dir=str(logs),
        skip_completed=False,
        start_method="spawn",
    ).run()
