"""HellaSwag under both protocols that people quote: reading, rendering, scoring, counting.

The two differ in what the model sees and in what an ending's score is divided by; their numbers can't be compared.

`tokens`, build-nanogpt's hellaswag.py: the context is `ctx` as it is and " " + ending is encoded by itself. `acc` picks
    the ending with the largest sum of log p, `acc_norm` the one with the largest mean per token.
`chars`, lm-evaluation-harness' task `hellaswag`: the context is `activity label: ctx_a Ctx_b` with WikiHow's brackets
    stripped, encoded together with the ending and cut at the context's token count. `acc` picks the ending with the
    largest sum of log p, `acc_norm` the one with the largest sum per character.

Cost: the four endings of an example share their context's computation. A row holds `context | ending 1 | … | ending 4`,
a mask hides the endings from each other, and every ending continues the context's positions. The model must take a 4-D
attention mask and position ids; one that doesn't is recognised by a check on a few examples and gets a row per ending.
Only positions that predict an ending go through the vocabulary matrix.

Takes a model and a tokenizer; knows no checkpoint, no run, no accelerator.
"""

import contextlib
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gpt2repro.evaluation.losses import Forward, Reduce, inference, max_length_of, sum_over_ranks, target_log_probs
from gpt2repro.options import InputError

PROTOCOLS = ("tokens", "chars")
PROTOCOL_NAMES = {
    "tokens": "build-nanogpt (raw context, mean loss per token)",
    "chars": "lm-evaluation-harness (activity label, brackets stripped, per character)",
}

# OpenAI's sizes on the 10,042 validation examples. Source: build-nanogpt's hellaswag.py, which quotes both protocols
# for 124M and 1558M; nobody has published the other two sizes under a named protocol.
PUBLISHED = {
    "124M": {"tokens": {"acc": 0.2859, "acc_norm": 0.2955}, "chars": {"acc": 0.2892, "acc_norm": 0.3114}},
    "350M": {},
    "774M": {},
    "1558M": {"tokens": {"acc": 0.3842, "acc_norm": 0.4893}, "chars": {"acc": 0.4004, "acc_norm": 0.5089}},
}

NEAR_TIE = 1e-5  # two best scores closer than this may swap under another order of fp32 additions: listed, not hidden
SHARING_TOLERANCE = 0.01  # relative, between shared-context and plain rows: bf16 noise is below, a wrong mask far above
NEEDED_FIELDS = ("ctx", "ctx_a", "ctx_b", "activity_label", "endings")


# --- reading --------------------------------------------------------------------------------------------------------


def read_examples(data: str | Path, *, split: str = "val", limit: int | None = None) -> list[dict]:
    """Examples in the original format from a .jsonl file, a directory that has one, or a dataset of the Hub.

    `label` becomes an int, or None where the split has no labels (test). Raises InputError.
    """
    path = Path(data)
    if path.is_file():
        examples = _read_jsonl(path)
    elif path.is_dir():
        names = (f"hellaswag_{split}.jsonl", f"{split}.jsonl", f"data/hellaswag_{split}.jsonl")
        files = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.jsonl"))
        if len(files) > 1 and files[0].name not in names:
            raise InputError(f"{path} has {len(files)} .jsonl files, none named hellaswag_{split}.jsonl; name the file")
        examples = _read_jsonl(files[0]) if files else _read_dataset(str(path), split)
    elif path.suffix in (".jsonl", ".json") or str(data).count("/") > 1 or str(data).startswith((".", "/", "~")):
        raise InputError(f"there is no file {path}; give HellaSwag's original .jsonl, a directory, or Rowan/hellaswag")
    else:
        examples = _read_dataset(str(data), split)

    problems = []
    for number, example in enumerate(examples, 1):
        missing = [field for field in NEEDED_FIELDS if field not in example]
        if missing:
            problems.append(f"example {number} has no {', '.join(missing)}")
        elif not isinstance(example["endings"], (list, tuple)) or len(example["endings"]) != 4:
            problems.append(f"example {number} has not four endings")
        else:
            label = example.get("label")
            example["label"] = None if label in (None, "") else int(label)
            if example["label"] not in (None, 0, 1, 2, 3):
                problems.append(f"example {number} has the label {label}, expected 0 to 3")
    if problems:
        raise InputError(f"{data} is not HellaSwag's format: " + "; ".join(problems[:5]))
    kept = [example for example in examples if example.get("split", split) == split]
    if not kept:
        raise InputError(f"{data} has no examples of the split '{split}'" if examples else f"{data} has no examples")
    return kept[:limit]


def _read_jsonl(path: Path) -> list[dict]:
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}); expected one example per line") from None
        if not isinstance(examples[-1], dict):
            raise InputError(f"{path}, line {number}: expected an object with ctx, endings, …")
    return examples


def _read_dataset(name: str, split: str) -> list[dict]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"reading {name} needs the package `datasets`; install it or give a .jsonl file") from None
    hub_split = {"val": "validation"}.get(split, split)
    try:
        rows = datasets.load_dataset(name, split=hub_split)
    except Exception as error:  # the Hub, the network and parquet fail in many ways; each is bad input here
        raise InputError(f"cannot read the split '{hub_split}' of {name}: {type(error).__name__}: {error}") from error
    return [{**row, "split": split} for row in rows]


# --- rendering ------------------------------------------------------------------------------------------------------

Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> ids, no special tokens added


@dataclass(frozen=True)
class Rendered:
    """One example under one protocol, as the model will see it."""

    context: list[int]
    endings: list[list[int]]  # the four continuations
    units: list[int]  # what `acc_norm` divides by: tokens or characters of each ending


def encoder(tokenizer) -> Encode:
    """Batched encoding without special tokens added, as both references do."""
    return lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def render_tokens(examples: Sequence[dict], encode: Encode) -> list[Rendered]:
    """build-nanogpt's protocol: the context and " " + ending are encoded separately; the mean is over tokens.

    With an empty context its loss starts at the second token of the ending (nothing predicts the first).
    """
    contexts = encode([example["ctx"] for example in examples])
    endings = encode([" " + ending for example in examples for ending in example["endings"]])
    rendered = []
    for i, context in enumerate(contexts):
        rows = endings[4 * i : 4 * i + 4]
        scored = [len(row) if context else len(row) - 1 for row in rows]
        rendered.append(Rendered(context, rows, scored))
    return rendered


def harness_text(text: str) -> str:
    """lm-evaluation-harness' clean-up: WikiHow's `[title]`, `[step]`, … are artefacts of the data set."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def render_chars(examples: Sequence[dict], encode: Encode) -> list[Rendered]:
    """lm-evaluation-harness' protocol: the whole text is encoded at once and cut at the context's token count.

    Spaces at the context's end belong to the continuation. Where a token spans the border the context keeps its own
    tokens and the continuation starts at that count, whatever these tokens are: the harness does that too.
    """
    contexts, wholes, characters = [], [], []
    for example in examples:
        context = harness_text(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
        stripped = context.rstrip()
        endings = [harness_text(ending) for ending in example["endings"]]
        contexts.append(stripped)
        wholes += [f"{context} {ending}" for ending in endings]
        characters.append([len(ending) for ending in endings])
    context_ids, whole_ids = encode(contexts), encode(wholes)
    rendered = []
    for i, context in enumerate(context_ids):
        endings = [whole[len(context) :] for whole in whole_ids[4 * i : 4 * i + 4]]
        if not all(endings):
            raise InputError(
                f"in HellaSwag example {i + 1} the tokenizer leaves an ending without a token of its own, which "
                "lm-evaluation-harness cannot score either; leave the example out"
            )
        rendered.append(Rendered(context, endings, characters[i]))
    return rendered


RENDER = {"tokens": render_tokens, "chars": render_chars}


# --- scoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A context with the distinct endings that continue it, and where each ending's score belongs."""

    context: list[int]
    endings: list[list[int]]
    slots: list[list[int]]  # per ending: indices into the flat list of scores (equal endings share one)

    @property
    def length(self) -> int:
        """Input positions of the shared row: nobody needs what an ending's last token predicts."""
        return len(self.context) + self.tail

    @property
    def tail(self) -> int:
        """Input positions behind the context."""
        return sum(len(ending) - 1 for ending in self.endings)


def grouped(rendered: Sequence[Rendered], max_length: int, first_slot: int = 0) -> list[Group]:
    """Groups for the model; a row that is longer than `max_length` inputs loses tokens on its left, as in the harness.

    Such a row no longer shares its context with the other endings. An empty context gives its first ending token away.
    """
    groups = []
    for i, item in enumerate(rendered):
        slots_of: dict[tuple, list[int]] = {}
        for j, ending in enumerate(item.endings):
            context = item.context
            if not context:
                context, ending = ending[:1], ending[1:]
            surplus = len(context) + len(ending) - (max_length + 1)
            if surplus >= len(context):
                raise InputError(
                    f"HellaSwag example {i + 1} has an ending of {len(ending)} tokens, more than the model's "
                    f"{max_length} positions; leave the example out"
                )
            context = context[max(surplus, 0) :]
            slots_of.setdefault((tuple(context), tuple(ending)), []).append(first_slot + 4 * i + j)
        contexts = {}
        for (context, ending), slots in slots_of.items():
            if ending:  # a single token without context predicts nothing: its score stays 0
                contexts.setdefault(context, []).append((list(ending), slots))
        for context, pairs in contexts.items():
            group = Group(list(context), [], [])
            for ending, slots in pairs:
                if group.endings and group.length + len(ending) - 1 > max_length:  # models refuse rows beyond it
                    groups.append(group)
                    group = Group(list(context), [], [])
                group.endings.append(ending)
                group.slots.append(slots)
            groups.append(group)
    return groups


def batches_of(groups: Sequence[Group], batch_tokens: int) -> list[list[Group]]:
    """Groups of like length together, longest first, each batch at most `batch_tokens` padded positions (or one group).

    Measured on 500 validation examples: 2 % padding at 512 positions, 4 % at 1024, 18 % at 8192.
    """
    ordered = sorted(groups, key=lambda group: (group.length // 4, group.tail), reverse=True)
    batches: list[list[Group]] = []
    for group in ordered:
        if batches and max(g.length for g in [*batches[-1], group]) * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


TokenScores = tuple[torch.Tensor, list[int]]  # log p (N,) of every ending token on the device, the ending's number (N,)


def score_shared(forward: Forward, groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> TokenScores:
    """log p of every token of every group's endings; each group's context is computed once.

    Row: `padding | context | endings`, aligned on the right, so that the logits anybody needs are in the last columns.
    """
    B, T = len(groups), max(group.length for group in groups)
    first_kept = T - max(group.tail for group in groups) - 1  # the column of the leftmost last context token
    ids = np.zeros((B, T), dtype=np.int64)
    positions = np.zeros((B, T), dtype=np.int64)
    segment = np.full((B, T), -1, dtype=np.int64)  # -1 padding, 0 context, 1… endings
    # for every token of every ending: row and column that predict it, the token, the ending's number
    rows, columns, targets, owners = [], [], [], []
    number = 0
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
            rows += [b] * len(ending)
            columns += [last_of_context, *range(start, stop)]
            targets += ending
            owners += [number] * len(ending)
            number += 1
    # a query sees what precedes it in the row and is context or its own ending; and itself, or padding would be 0 / 0
    segment = torch.from_numpy(segment).to(device)
    query, key = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    seen = (causal & (key >= 0) & ((key == 0) | (key == query))) | torch.eye(T, dtype=torch.bool, device=device)
    mask = torch.zeros(B, 1, T, T, dtype=dtype, device=device)
    mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)

    logits = _last_logits(
        forward,
        T - first_kept,
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=mask,
        position_ids=torch.from_numpy(positions).to(device),
    )  # (B, T - first_kept, V)
    index = torch.tensor([rows, columns, targets], device=device)
    return target_log_probs(logits[index[0], index[1] - first_kept], index[2]), owners


def score_rows(forward: Forward, groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> TokenScores:
    """The same numbers with a row of its own for every ending: plain causal input, padded on the right."""
    sequences = [(group.context, ending) for group in groups for ending in group.endings]
    width = max(len(context) + len(ending) - 1 for context, ending in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    rows, columns, targets = [], [], []
    for row, (context, ending) in enumerate(sequences):
        length = len(context) + len(ending) - 1
        ids[row, :length] = [*context, *ending[:-1]]
        rows += [row] * len(ending)
        columns += range(len(context) - 1, length)
        targets += ending
    logits = forward(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits
    index = torch.tensor([rows, columns, targets], device=device)
    return target_log_probs(logits[index[0], index[1]], index[2]), rows


def ending_sums(scores: TokenScores, endings: int) -> torch.Tensor:
    """Sum over each ending's tokens, (endings,) float64 on the CPU: unlike atomic additions the same in every run."""
    log_probs, owners = scores
    sums = torch.zeros(endings, dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(owners), log_probs.cpu().double())


def _last_logits(forward: Forward, count: int, **inputs) -> torch.Tensor:
    """Logits of the last `count` columns, and only these where the model can leave out the others."""
    owner = getattr(forward, "__self__", forward)
    if "logits_to_keep" in inspect.signature(type(owner).forward).parameters:
        inputs["logits_to_keep"] = count
    return forward(use_cache=False, **inputs).logits[:, -count:]


def contexts_can_be_shared(forward: Forward, groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model's scores with shared contexts are those with a row per ending."""
    endings = sum(len(group.endings) for group in groups)
    expected = ending_sums(score_rows(forward, groups, device, dtype), endings)
    try:
        found = ending_sums(score_shared(forward, groups, device, dtype), endings)
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

    examples: list[dict]
    rendered: dict[str, list[Rendered]]  # per protocol
    groups: list[Group]  # of all protocols; slots count through them in the order of `rendered`
    truncated: dict[str, int]  # examples that lost context on the left, per protocol


def prepare(examples: Sequence[dict], tokenizer, max_length: int, protocols: Sequence[str] = PROTOCOLS) -> Prepared:
    """Render and group `examples` under each of `protocols`."""
    encode = encoder(tokenizer)
    rendered = {protocol: RENDER[protocol](examples, encode) for protocol in protocols}
    groups = []
    for number, items in enumerate(rendered.values()):
        groups += grouped(items, max_length, first_slot=4 * number * len(examples))
    truncated = {
        protocol: sum(len(r.context) + max(map(len, r.endings)) > max_length + 1 for r in items)
        for protocol, items in rendered.items()
    }
    return Prepared(list(examples), rendered, groups, truncated)


def score(
    model: torch.nn.Module,
    prepared: Prepared,
    *,
    device: torch.device | str = "cpu",
    batch_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    share_contexts: bool | None = None,
    progress: Callable[[Iterator], Iterator] = iter,
) -> dict[str, np.ndarray]:
    """Sum of log p of every ending: {protocol: (examples, 4) float64}, the same on every rank.

    Rank r takes every `world`-th batch; all make the same number of forward passes (FSDP needs them all) and all join
    one all-reduce at the end. batch_tokens: positions per forward pass, padding included (default 512 on a CPU, 32768
    elsewhere). share_contexts: None tries it and checks; True and False insist.
    """
    device = torch.device(device)
    if batch_tokens is None:
        batch_tokens = 512 if device.type == "cpu" else 32768
    dtype = next(model.parameters()).dtype
    batches = batches_of(prepared.groups, batch_tokens)
    scores = torch.zeros(4 * sum(map(len, prepared.rendered.values())), dtype=torch.float64)
    results = []
    with inference(model) as forward:
        if share_contexts is None:
            with autocast():
                share_contexts = contexts_can_be_shared(forward, batches[-1][:2], device, dtype)
            refusals = torch.tensor([float(not share_contexts)], dtype=torch.float64)
            share_contexts = sum_over_ranks(refusals, device=device, world=world, reduce=reduce).item() == 0
        score_batch = score_shared if share_contexts else score_rows
        for step in progress(range(math.ceil(len(batches) / world))):
            index = step * world + rank
            groups = batches[min(index, len(batches) - 1)]
            with autocast():
                scored = score_batch(forward, groups, device, dtype)
            if index < len(batches):  # else it only kept the others company
                results.append(([slots for group in groups for slots in group.slots], scored))
    for slots, scored in results:  # only now, so that no forward pass waited for a number
        for where, value in zip(slots, ending_sums(scored, len(slots)), strict=True):
            scores[where] = value
    scores = sum_over_ranks(scores, device=device, world=world, reduce=reduce).view(-1, 4).numpy()
    result, first = {}, 0
    for protocol, items in prepared.rendered.items():
        result[protocol] = scores[first : first + len(items)]
        first += len(items)
    return result


# --- counting -------------------------------------------------------------------------------------------------------


def predictions(prepared: Prepared, scores: dict[str, np.ndarray]) -> list[dict]:
    """Per example: its label and under each protocol the scores, both choices and the distance of the two best."""
    rows = []
    for i, example in enumerate(prepared.examples):
        row = {"index": i, "ind": example.get("ind"), "label": example["label"]}
        for protocol, items in prepared.rendered.items():
            sums = scores[protocol][i]
            with np.errstate(divide="ignore", invalid="ignore"):  # an empty ending has 0 characters, as in the harness
                means = sums / np.array(items[i].units, dtype=np.float64)
            row[protocol] = {
                "log_likelihoods": sums.tolist(),
                "units": items[i].units,
                "acc": int(np.argmax(sums)),  # the first of equals, as in both references
                "acc_norm": int(np.argmax(means)),
                "acc_margin": _margin(sums),
                "acc_norm_margin": _margin(means),
            }
        rows.append(row)
    return rows


def _margin(values: np.ndarray) -> float:
    best, second = np.sort(values)[::-1][:2]
    return float(best - second)


def near_ties(rows: Sequence[dict]) -> list[dict]:
    """Choices that another order of fp32 additions could turn over: the two best differ by less than `NEAR_TIE`."""
    ties = []
    for row in rows:
        for protocol in filter(row.__contains__, PROTOCOLS):
            for metric in ("acc", "acc_norm"):
                margin = row[protocol][f"{metric}_margin"]
                if margin < NEAR_TIE:
                    ties.append({"index": row["index"], "ind": row["ind"], "protocol": protocol, "metric": metric})
                    ties[-1]["margin"] = margin
    return ties


def summary(rows: Sequence[dict]) -> dict:
    """Flat record: `hellaswag_{acc,acc_norm}_{tokens,chars}` and `…_stderr`, `hellaswag_examples`; {} without labels.

    stderr is the sample's standard deviation / sqrt(n), as in lm-evaluation-harness.
    """
    labelled = [row for row in rows if row["label"] is not None]
    if not labelled:
        return {}
    record = {}
    for protocol in PROTOCOLS:
        if protocol not in labelled[0]:
            continue
        for metric in ("acc", "acc_norm"):
            mean = sum(row[protocol][metric] == row["label"] for row in labelled) / len(labelled)
            record[f"hellaswag_{metric}_{protocol}"] = mean
            stderr = math.sqrt(mean * (1 - mean) / (len(labelled) - 1)) if len(labelled) > 1 else None
            record[f"hellaswag_{metric}_{protocol}_stderr"] = stderr
    return {**record, "hellaswag_examples": len(labelled)}


def evaluate(model: torch.nn.Module, tokenizer, examples: Sequence[dict] | Prepared, **how) -> dict:
    """`summary` of one pass; `how` as in `score`. A `Prepared` instead of examples saves rendering them every time."""
    if not isinstance(examples, Prepared):
        unwrapped = getattr(model, "module", model)
        examples = prepare(examples, tokenizer, max_length_of(unwrapped, tokenizer))
    return summary(predictions(examples, score(model, examples, **how)))
