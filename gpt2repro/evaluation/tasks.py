"""The tasks by name. A new task is a file like `piqa.py`, and its name in the import and in TASKS here."""

import torch

from gpt2repro.evaluation import arc_easy, hellaswag, lambada, piqa, winogrande
from gpt2repro.evaluation.losses import max_length_of
from gpt2repro.evaluation.multiple_choice import Prepared, Task
from gpt2repro.options import InputError, nearest

TASKS = {module.TASK.name: module.TASK for module in (hellaswag, arc_easy, piqa, winogrande, lambada)}


def parse_specs(specs: list[str]) -> list[tuple[Task, str | None]]:
    """`NAME` or `NAME=DATA` -> the task and where its examples lie (None: its own dataset on the Hub).

    Raises: InputError for an unknown name and for one that is given twice.
    """
    named = [(name, data or None) for name, _, data in (spec.partition("=") for spec in specs)]
    names = [name for name, _ in named]
    for name in names:
        if name not in TASKS:
            known = ", ".join(TASKS) + ", each alone or as NAME=FILE"
            raise InputError(f"there is no task {name!r}; known are {known}{nearest(name, TASKS)}")
        if names.count(name) > 1:
            raise InputError(f"the task {name} is given twice; its numbers would have the same names")
    return [(TASKS[name], data) for name, data in named]


def prepare_tasks(specs: list[str], tokenizer, model: torch.nn.Module, limit: int | None = None) -> list[Prepared]:
    """Read and render the tasks that `specs` name, once for a whole run; `Prepared.evaluate` then scores a model.

    `limit` takes the first so many examples of each task; None takes all.
    """
    max_length = max_length_of(getattr(model, "module", model), tokenizer)
    return [task.prepare(task.read(data, limit=limit), tokenizer, max_length) for task, data in parse_specs(specs)]
