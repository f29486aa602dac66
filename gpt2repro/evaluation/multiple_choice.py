"""The engine of the multiple-choice tasks: which of several texts does a model find most likely?

Owns rendering to tokens, grouping, batching, scoring over processes, choosing and counting. A task brings its examples
and the texts of their choices (see `hellaswag`, `arc_easy`, …); this module names none of them. Takes a model and a
tokenizer; knows no checkpoint, no run, no accelerator.

Cost: the choices of an example share their context's computation. A row holds `context | choice 1 | … | choice n`, a
mask hides the choices from each other, and each of them continues the context's positions. The model must take a 4-D
attention mask and position ids; one that doesn't is recognised by a check on a few examples and gets a row per choice.
Only positions that predict a choice go through the vocabulary matrix.

The scores of a batch do not depend on the number of processes, since the batches are formed before they are dealt out.
"""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gpt2repro.data.tokenization import unknown_characters
from gpt2repro.evaluation.losses import IGNORED, inference, padded, rank_and_world, sum_over_ranks, target_log_probs
from gpt2repro.evaluation.rows import read_rows
from gpt2repro.options import InputError

NEAR_TIE = 1e-5  # two best scores closer than this may swap under another order of fp32 additions: listed, not hidden
SHARING_TOLERANCE = 0.01  # relative, between shared-context and plain rows: bf16 noise is below, a wrong mask far above


# --- what a task brings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """One published way to score a task; numbers of two protocols can't be compared."""

    name: str
    choices: Callable[[dict], list[tuple[str, str]]]  # an example -> (context, continuation) of each choice
    by_tokens: bool = False
    """True: both parts are encoded separately and `acc_norm` divides by tokens, as in build-nanogpt. False: the whole
    is encoded and cut at the context's token count, and `acc_norm` divides by the continuation's characters without the
    space in front, as in lm-evaluation-harness."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of examples and the protocols under which they are scored."""

    name: str  # of its numbers: `name_acc`
    title: str
    dataset: str  # of the Hub
    subset: str | None = None
    split: str  # the one that published numbers are about
    fields: dict[str, type]  # that a row must have
    label: Callable[[dict], int | None]  # index of the right choice; None where the split has no answers
    protocols: dict[str, Protocol]
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    greedy: bool = False  # also count the tokens of a choice that greedy decoding would not have written
    published: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # size -> protocol -> metric
    source: str = ""  # of the published numbers

    def read(self, data: str | Path | None = None, *, split: str | None = None, limit: int | None = None) -> list[dict]:
        """Examples of a .jsonl file, a directory or a dataset of the Hub (None: the task's own).

        Raises: InputError for a split without examples, and as `checked` does.
        """
        split = split or self.split
        own = data is None or str(data) == self.dataset
        names = [f"{self.name}_{split}.jsonl", f"{split}.jsonl", f"data/{self.name}_{split}.jsonl", "*.jsonl"]
        rows = read_rows(data or self.dataset, subset=self.subset if own else None, split=split, names=names)
        examples = self.checked(rows, str(data or self.dataset))
        spellings = ("val", "validation") if split == "val" else (split,)
        kept = [example for example in examples if example.get("split", split) in spellings]
        if not kept:
            about = f" of the split '{split}'" if examples else ""
            raise InputError(f"{data or self.dataset} has no examples{about}")
        return kept[:limit]

    def checked(self, rows: Sequence[dict], data: str) -> list[dict]:
        """The rows with an int or None as `label`. Raises: InputError that lists what is wrong with up to five."""
        examples, problems = [], []
        for number, row in enumerate(rows, 1):
            try:
                if missing := [name for name, kind in self.fields.items() if not isinstance(row.get(name), kind)]:
                    raise ValueError(f"no {', '.join(missing)}")
                for protocol in self.protocols.values():
                    protocol.choices(row)
                examples.append({**row, "label": self.label(row)})
            except ValueError as error:  # also a task's own
                problems.append(f"example {number} has {error}")
            except (LookupError, TypeError, AttributeError):
                problems.append(f"example {number} has choices of another form")
        if problems:
            raise InputError(f"{data} is not {self.title}'s format: " + "; ".join(problems[:5]))
        return examples

    def texts(self, examples: Sequence[dict]) -> list[list[str]]:
        """Per example what a page may hold of it: each context with each choice, without "Question:" and "Answer:"."""

        def texts_of(example: dict) -> list[str]:
            pairs = (pair for protocol in self.protocols.values() for pair in protocol.choices(example))
            texts = (context.removeprefix("Question: ").removesuffix("\nAnswer:") + choice for context, choice in pairs)
            return list(dict.fromkeys(texts))

        return list(map(texts_of, examples))

    def prepare(self, examples: Sequence[dict], tokenizer, max_length: int) -> "Prepared":
        """Render and group `examples` under each protocol, for models with `max_length` input positions."""
        rendered = {name: render(protocol, examples, tokenizer) for name, protocol in self.protocols.items()}
        truncated = {
            name: sum(max(len(context) + len(ids) for context, ids in item.choices) > max_length + 1 for item in items)
            for name, items in rendered.items()
        }
        return Prepared(self, list(examples), rendered, grouped(rendered, max_length), truncated)

    def predictions(self, prepared: "Prepared", scores: dict[str, list[np.ndarray]]) -> list[dict]:
        """Per example its label and, under each protocol, scores, choices and the distance of the two best."""
        rows = []
        for i, example in enumerate(prepared.examples):
            row = {"index": i, "ind": example.get("ind", example.get("id")), "label": example["label"]}
            for protocol, items in prepared.rendered.items():
                sums = scores[protocol][i][:, 0]
                with np.errstate(divide="ignore", invalid="ignore"):  # an empty choice has 0 characters
                    means = sums / np.array(items[i].units, dtype=np.float64)
                row[protocol] = {"log_likelihoods": sums.tolist(), "units": items[i].units}
                values = {"acc": sums, "acc_norm": means}
                for metric in self.metrics:
                    second, best = np.sort(values[metric])[-2:]
                    row[protocol][metric] = int(np.argmax(values[metric]))  # the first of equals, as in both references
                    row[protocol][f"{metric}_margin"] = float(best - second)
            rows.append(row)
        return rows

    def near_ties(self, rows: Sequence[dict]) -> list[dict]:
        """Choices that another order of fp32 additions could turn over: the two best differ by less than `NEAR_TIE`."""
        return [
            {"index": row["index"], "ind": row["ind"], "protocol": protocol, "metric": metric, "margin": margin}
            for row in rows
            for protocol in self.protocols
            for metric in self.metrics
            if (margin := row[protocol][f"{metric}_margin"]) < NEAR_TIE
        ]

    def summary(self, rows: Sequence[dict]) -> dict:
        """Flat record: `NAME_acc`, `NAME_acc_stderr`, …, `NAME_examples`; {} without labels.

        A task of several protocols names them: `NAME_acc_tokens`, `NAME_acc_chars`. stderr is the sample's standard
        deviation / sqrt(n), as in lm-evaluation-harness.
        """
        labelled = [row for row in rows if row["label"] is not None]
        record = {}
        for protocol in self.protocols if labelled else ():
            for metric in self.metrics:
                name = self.metric_name(metric, protocol)
                mean = sum(row[protocol][metric] == row["label"] for row in labelled) / len(labelled)
                record |= {name: mean, f"{name}_stderr": standard_error(mean, len(labelled))}
        return {**record, f"{self.name}_examples": len(labelled)} if labelled else {}

    def metric_name(self, metric: str, protocol: str) -> str:
        """What the record calls a number."""
        return f"{self.name}_{metric}" + (f"_{protocol}" if len(self.protocols) > 1 else "")


def index_of(answer, answers: Sequence[str]) -> int | None:
    """The index of `answer`, a text or an int, in `answers`; None without an answer. Raises: ValueError."""
    if answer in (None, ""):
        return None
    spellings = list(answers)
    if (shown := str(answer) if type(answer) is int else answer) not in spellings:
        raise ValueError(f"the label {answer!r}, expected {answers[0]} to {answers[-1]}")
    return spellings.index(shown)


def standard_error(mean: float, n: int) -> float | None:
    """The standard error of a mean of n zeros and ones: their sample deviation / sqrt(n); None for n = 1."""
    return math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


# --- rendering ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """One example under one protocol, as the model will see it."""

    choices: list[tuple[list[int], list[int]]]  # (context, continuation) of each
    units: list[int]  # what `acc_norm` divides by: tokens or characters of each continuation


def render(protocol: Protocol, examples: Sequence[dict], tokenizer) -> list[Rendered]:
    """Every example's choices as tokens, without special ones."""
    texts = [protocol.choices(example) for example in examples]
    pairs = [pair for choices in texts for pair in choices]
    contexts = [context if protocol.by_tokens else context.rstrip() for context, _ in pairs]
    # Spaces at the context's end belong to the continuation.
    targets = [target if protocol.by_tokens else context + target for context, target in pairs]
    unique = list(dict.fromkeys([*contexts, *targets]))
    if unknown := unknown_characters(tokenizer, "".join(unique)):
        warnings.warn(f"{len(unknown)} characters are unknown to the tokenizer: {unknown[:5]} …", stacklevel=2)
    encoded = dict(zip(unique, tokenizer(unique, add_special_tokens=False)["input_ids"], strict=True))
    encoded_pairs = zip(map(encoded.__getitem__, contexts), map(encoded.__getitem__, targets), strict=True)
    rendered = []
    for number, choices in enumerate(texts, 1):
        ids = list(itertools.islice(encoded_pairs, len(choices)))
        if protocol.by_tokens:  # without a context nothing predicts the first token
            rendered.append(Rendered(ids, [len(target) - (not context) for context, target in ids]))
            continue
        # Where a token spans the border, the continuation still starts at the context's token count, as in the harness.
        ids = [(context, whole[len(context) :]) for context, whole in ids]
        if not all(continuation for _, continuation in ids):
            raise InputError(
                f"in example {number} the tokenizer leaves a choice without a token of its own, which "
                "lm-evaluation-harness cannot score either; leave the example out"
            )
        rendered.append(Rendered(ids, [len(target) - 1 for _, target in choices]))
    return rendered


# --- grouping -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A context with its distinct continuations, and the slots of their scores."""

    context: list[int]
    endings: list[list[int]]
    slots: list[list[int]]  # per ending: indices into the flat list of scores (equal endings share one)

    @property
    def length(self) -> int:
        """Input positions of the shared row, without each ending's last token, whose prediction is not needed."""
        return len(self.context) + self.tail

    @property
    def tail(self) -> int:
        """Input positions behind the context."""
        return sum(len(ending) - 1 for ending in self.endings)


def grouped(rendered: dict[str, list[Rendered]], max_length: int) -> list[Group]:
    """The groups of all protocols; slots number the choices in order.

    A row that is longer than `max_length` inputs loses tokens on its left, as in the harness, and no longer shares its
    context. An empty context takes the first token of its continuation.

    Raises: InputError for an ending that is longer than `max_length`.
    """
    groups, slot = [], 0
    for number, item in ((number, item) for items in rendered.values() for number, item in enumerate(items, 1)):
        endings_of: dict[tuple, dict[tuple, list[int]]] = {}  # context -> ending -> slots
        for context, ending in item.choices:
            if not context:
                context, ending = ending[:1], ending[1:]
            surplus = len(context) + len(ending) - (max_length + 1)
            if surplus >= len(context):
                raise InputError(
                    f"example {number} has an ending of {len(ending)} tokens, more than the model's "
                    f"{max_length} positions; leave the example out"
                )
            if ending:  # a single token without context predicts nothing: its score stays 0
                endings = endings_of.setdefault(tuple(context[max(surplus, 0) :]), {})
                endings.setdefault(tuple(ending), []).append(slot)
            slot += 1
        for context, endings in endings_of.items():
            group = Group(list(context), [], [])
            for ending, slots in endings.items():
                if group.endings and group.length + len(ending) - 1 > max_length:  # models refuse rows beyond it
                    groups.append(group)
                    group = Group(list(context), [], [])
                group.endings.append(list(ending))
                group.slots.append(slots)
            groups.append(group)
    return groups


def batches_of(groups: Sequence[Group], batch_tokens: int) -> list[list[Group]]:
    """Groups of like length together, longest first, each batch at most `batch_tokens` padded positions (or one group).

    Measured on 500 examples of HellaSwag: 2 % padding at 512 positions, 4 % at 1024, 18 % at 8192.
    """
    ordered = sorted(groups, key=lambda group: (group.length // 4, group.tail), reverse=True)
    batches: list[list[Group]] = []
    for group in ordered:
        if batches and max(g.length for g in [*batches[-1], group]) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


# --- scoring --------------------------------------------------------------------------------------------------------

# For every token of the endings: its logits (N, V) and its id (N,), on the device; the number of its ending (N,).
Predicted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def predict_shared(forward: Callable, groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> Predicted:
    """Logits of every token of every group's endings; each group's context is computed once.

    Row: `padding | context | endings`, aligned on the right, so that the needed logits are in the last columns.
    """
    B, T = len(groups), max(group.length for group in groups)
    first_kept = T - max(group.tail for group in groups) - 1  # the column of the leftmost last context token
    ids = np.zeros((B, T), dtype=np.int64)
    positions = np.zeros((B, T), dtype=np.int64)
    segment = np.full((B, T), -1, dtype=np.int64)  # -1 padding, 0 context, 1… endings
    wanted = []  # for every token of the endings: the row and column that predict it, its id, the number of its ending
    number = itertools.count()
    for b, group in enumerate(groups):
        length = len(group.context)
        start, stop = T - group.length, T - group.tail
        ids[b, start:stop], segment[b, start:stop] = group.context, 0
        positions[b, start:stop] = np.arange(length)
        last_of_context = stop - 1
        for s, ending in enumerate(group.endings, 1):
            start, stop = stop, stop + len(ending) - 1
            ids[b, start:stop], segment[b, start:stop] = ending[:-1], s
            positions[b, start:stop] = np.arange(length, length + len(ending) - 1)
            columns, owner = [last_of_context, *range(start, stop)], next(number)
            wanted += [(b, column, token, owner) for column, token in zip(columns, ending, strict=True)]
    # A query sees the context and its own ending, up to itself. Padding sees itself, or its softmax would be 0 / 0.
    segment = torch.from_numpy(segment).to(device)
    query, key = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    seen = (causal & (key >= 0) & ((key == 0) | (key == query))) | torch.eye(T, dtype=torch.bool, device=device)
    mask = torch.zeros(B, 1, T, T, dtype=dtype, device=device)
    mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)

    inputs = {"attention_mask": mask, "position_ids": torch.from_numpy(positions).to(device)}
    owner = getattr(forward, "__self__", forward)  # the module behind a bound method, or the module itself
    if "logits_to_keep" in inspect.signature(type(owner).forward).parameters:
        inputs["logits_to_keep"] = T - first_kept
    logits = forward(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **inputs).logits
    logits = logits[:, first_kept - T :]  # (B, T - first_kept, V)
    rows, columns, targets, owners = torch.tensor(wanted).T
    return logits[rows, columns - first_kept], targets.to(device), owners


def predict_rows(forward: Callable, groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> Predicted:
    """The same logits with a row of its own for every ending: plain causal input, padded on the right."""
    sequences = [(group.context, ending) for group in groups for ending in group.endings]
    width = max(len(context) + len(ending) - 1 for context, ending in sequences)
    inputs, targets = padded([[*context, *ending] for context, ending in sequences], (len(sequences), width))
    for row, (context, _) in enumerate(sequences):
        targets[row, : len(context) - 1] = IGNORED
    index = (targets != IGNORED).nonzero(as_tuple=True)  # rows, columns
    logits = forward(input_ids=inputs.to(device), use_cache=False).logits
    return logits[index], targets[index].to(device), index[0]


def token_scores(predicted: Predicted, greedy: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Columns (N,) on the device: log p and, if asked, whether another token is the likeliest; the ending's number."""
    logits, targets, owners = predicted
    columns = [target_log_probs(logits, targets)]
    if greedy:
        columns.append(logits.argmax(dim=-1) != targets)
    return columns, owners


def ending_sums(columns: Sequence[torch.Tensor], owners: torch.Tensor, endings: int) -> torch.Tensor:
    """Sum over each ending's tokens, (endings, columns) float64 on the CPU.

    The sum is the same in every run; with a GPU's atomic additions it would not be.
    """
    values = torch.stack([column.cpu().double() for column in columns], dim=1)
    return torch.zeros(endings, len(columns), dtype=torch.float64).index_add_(0, owners, values)


def contexts_can_be_shared(forward: Callable, groups: Sequence[Group], *place) -> bool:
    """Whether the model's scores with shared contexts are those with a row per ending; `place`: device and dtype."""
    endings = sum(len(group.endings) for group in groups)
    expected = ending_sums(*token_scores(predict_rows(forward, groups, *place), False), endings)
    try:
        found = ending_sums(*token_scores(predict_shared(forward, groups, *place), False), endings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every architecture and attention kernel refuses a 4-D mask in its own way
        warnings.warn(f"contexts are not shared: {type(error).__name__}: {error}", stacklevel=2)
        return False
    close = torch.allclose(found, expected, rtol=SHARING_TOLERANCE, atol=SHARING_TOLERANCE)
    if expected.isfinite().all() and not close:
        warnings.warn("contexts are not shared: the model ignores 4-D attention masks or position ids", stacklevel=2)
        return False
    return True


@dataclass(frozen=True)
class Prepared:
    """Examples rendered for one tokenizer and one input length: made once, scored as often as the model changes."""

    task: Task
    examples: list[dict]
    rendered: dict[str, list[Rendered]]  # per protocol
    groups: list[Group]
    truncated: dict[str, int]  # examples that lost context on the left, per protocol

    def evaluate(self, model: nn.Module) -> dict:
        """The task's `summary` of one pass. Every rank gets it."""
        return self.task.summary(self.task.predictions(self, score(model, self)))


def score(
    model: nn.Module, prepared: Prepared, *, batch_tokens: int | None = None, share_contexts=None, progress=iter
) -> dict[str, list[np.ndarray]]:
    """{protocol: per example an array (choices, 1)}, sums of log p, the same on every rank.

    A `greedy` task has a second column: how many tokens greedy decoding would not have written.

    Rank r takes every `world`-th batch; all make the same number of forward passes (FSDP needs them all) and all join
    one all-reduce at the end. `batch_tokens` is positions per forward pass, padding included (default 512 on a CPU,
    32768 elsewhere). `share_contexts=None` checks whether the model can share contexts; True and False decide it.
    """
    weight, (rank, world) = next(model.parameters()), rank_and_world()
    device, dtype = weight.device, weight.dtype
    batches = batches_of(prepared.groups, batch_tokens or (512 if device.type == "cpu" else 32768))
    counts = [len(item.choices) for items in prepared.rendered.values() for item in items]
    greedy = prepared.task.greedy
    scores = torch.zeros(sum(counts), 1 + greedy, dtype=torch.float64)
    results = []
    with inference(model) as forward:
        if share_contexts is None:
            share_contexts = contexts_can_be_shared(forward, batches[-1][:2], device, dtype)
            refusals = torch.tensor([float(not share_contexts)], dtype=torch.float64)
            share_contexts = sum_over_ranks(refusals, device).item() == 0
        predict = predict_shared if share_contexts else predict_rows
        for step in progress(range(math.ceil(len(batches) / world))):
            index = step * world + rank
            groups = batches[min(index, len(batches) - 1)]
            scored = token_scores(predict(forward, groups, device, dtype), greedy)
            if index < len(batches):  # else a padding pass: every rank makes equally many forward passes
                results.append(([slots for group in groups for slots in group.slots], scored))
    for slots, scored in results:  # read only here, so that no forward pass waits for a number
        for own_slots, value in zip(slots, ending_sums(*scored, len(slots)), strict=True):
            scores[own_slots] = value
    per_example = iter(sum_over_ranks(scores, device).split(counts))
    return {name: [next(per_example).numpy() for _ in items] for name, items in prepared.rendered.items()}
