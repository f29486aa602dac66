"""Web-scale text -> token shards: FineWeb-Edu, FineWeb, OpenWebText, any Hub dataset, or local parquet, jsonl and txt.

    python prepare_fineweb.py --out data/fineweb-edu-10B                                # sample-10BT, 10B tokens
    python prepare_fineweb.py --dataset HuggingFaceFW/fineweb --out data/fineweb-10B
    python prepare_fineweb.py --dataset Skylion007/openwebtext --subset none --out data/owt
    python prepare_fineweb.py --dataset 'dump/*.parquet' --val 0.001 --out data/mine    # local files
    python prepare_fineweb.py --tokens 100_000_000 --out data/taste                     # the first 100M tokens
    python train_accelerate.py --config 124M --data data/fineweb-edu-10B

After an interruption at any moment the same command continues: finished units are never tokenised again, and the
result is byte for byte that of an uninterrupted run. When all is done, the command says so and does nothing.

Many machines: give each the same command with `--num_nodes N --node_index I`. With a common --out the last machine to
finish writes the manifest. With separate disks, copy all directories into one (no two nodes write the same file name)
and run the command there once more with `--num_nodes 1`; it finds every unit finished and writes the manifest. Both
ways make the data set that a single machine makes. As a Slurm array:

    sbatch --array=0-15 --cpus-per-task=32 --wrap \\
        'python prepare_fineweb.py --out /shared/fineweb --num_nodes 16 --node_index $SLURM_ARRAY_TASK_ID'

`--decontaminate hellaswag,piqa=FILE` leaves out the training documents that hold 13 words in a row of a benchmark's
example (`--decontaminate_action report`: keeps and counts them). The manifest and the card list the examples;
`eval_hellaswag.py --contamination OUT` then scores the clean and the contaminated ones apart. What counts as the same
words: `gpt2repro/data/decontamination.py`; docs/data.md has the rate of false alarms.

`--executor datatrove` runs the same units as tasks of datatrove's local executor (its Slurm and Ray executors take the
same `gpt2repro.data.datatrove_task.PreparePart`).

Needs: cores, network, 2 bytes of disk per token, and about 0.2 GB of memory per core. `gpt2repro bench tokenize`
measures the tokens per second of a machine; 10B tokens take 10^10 divided by this number of seconds. 1T tokens (2 TB,
10,000 shards) need the same command on dozens of machines; it has not been run at that size.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gpt2repro.data.decontamination import Decontamination
from gpt2repro.data.preparation import check_place, prepare
from gpt2repro.data.text import find_text
from gpt2repro.data.tokenization import Encoder, gpt2_tokenizer, load_tokenizer
from gpt2repro.data.upload import push_dataset
from gpt2repro.options import AtLeastOne, InputError, NotNegative, Problems, parse_options, run_main


@dataclass
class Options:
    out: Path
    "Directory of the data set."
    dataset: str = "HuggingFaceFW/fineweb-edu"
    "A dataset id of the Hub, or a local file, directory or glob."
    subset: str | None = "sample-10BT"
    "Configuration of the Hub dataset; none for its default."
    revision: str | None = None
    "Branch, tag or commit; its commit is recorded."
    text_column: str = "text"
    "The column of text."
    tokenizer: str = "gpt2"
    "gpt2, or a directory with a tokenizer (another data set, a checkpoint)."
    fast_tokenizer: bool = False
    "Use gigatoken (pip install 'gpt2repro[fast-tokenizer]') where it gives tiktoken's ids; checked at the start."
    val: str = "first-shard"
    "The first shard is for validation, as in build-nanogpt; or a fraction of the documents, chosen by hash."
    decontaminate: list[str] = field(default_factory=list)
    "Compare the training documents with hellaswag, arc_easy, piqa, winogrande, lambada; NAME=FILE: examples in a file."
    decontaminate_action: Literal["drop", "report"] = "drop"
    "Leave a document with 13 words in a row of an example out, or only count it."
    tokens: AtLeastOne | None = None
    "Stop with the shard that reaches so many tokens; none: everything."
    shard_tokens: Annotated[int, Field(gt=0, lt=2**31)] = 100_000_000
    "About how many tokens go into one shard."
    workers: AtLeastOne | None = None
    "Tokenising processes; none: one per core."
    num_nodes: AtLeastOne = 1
    "Machines that share the work."
    node_index: NotNegative = 0
    "This machine, from 0."
    executor: Literal["processes", "datatrove"] = "processes"
    "The own process pool, or datatrove's local executor with --workers tasks at a time."
    verify_source: bool = False
    "Download whole files into OUT/source, compare each with the Hub's sha256, read it there; removed at the end."
    push_to_hub: str | None = None
    "USER/NAME: upload shards, manifest, tokenizer and a card; continues an interrupted upload."
    overwrite: bool = False
    "Replace another data set in --out."

    def problems(self) -> Problems:
        if self.node_index >= self.num_nodes:
            yield f"node_index={self.node_index} must be below num_nodes={self.num_nodes} (it counts from 0)"
        if self.num_nodes > 1 and self.tokens is not None:
            yield "tokens needs one machine: which shards reach the limit is known in order only"
        if self.num_nodes > 1 and self.overwrite:
            yield "overwrite with num_nodes > 1 would remove what the other machines write; empty --out first"
        if self.decontaminate_action == "report" and not self.decontaminate:
            yield "decontaminate_action=report needs --decontaminate hellaswag, or another benchmark's name"
        if self.executor == "datatrove" and (self.num_nodes > 1 or self.tokens is not None or self.overwrite):
            yield "executor=datatrove splits the work itself; leave num_nodes, tokens and overwrite"
        if self.val != "first-shard":
            try:
                if not 0 <= float(self.val) < 1:
                    yield f"val={self.val} must be first-shard or a fraction from 0 to below 1"
            except ValueError:
                yield f"val={self.val!r} must be first-shard or a fraction such as 0.001"


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="prepare_fineweb.py", description=__doc__)
    check_place(options.out)
    if options.push_to_hub:
        from gpt2repro.publishing.hub import may_write  # imports torch

        if complaint := may_write(options.push_to_hub)[1]:
            raise InputError(complaint)
    if options.executor == "datatrove":
        from gpt2repro.data.datatrove_task import run_locally

        run_locally(prepare_part, options)
    manifest = prepare_part(options)
    if manifest is not None and options.push_to_hub:
        push_dataset(options.out, options.push_to_hub)
    return 0


def prepare_part(options: Options):
    """Do this node's share of the work. Returns the manifest if all nodes are done, else None."""
    decontamination = _decontamination(options) if options.decontaminate else None
    tokenizer = gpt2_tokenizer() if options.tokenizer == "gpt2" else load_tokenizer(options.tokenizer)
    copies = options.out / "source" if options.verify_source else None
    origin = {"config": options.subset, "revision": options.revision, "copies": copies}
    files = find_text([options.dataset], text_column=options.text_column, **origin)
    shard_tokens = min(options.shard_tokens, options.tokens or options.shard_tokens)
    units = files.units(shard_tokens)
    first_shard = options.val == "first-shard"
    if first_shard:
        if len(units) < 2:
            raise InputError(
                f"{options.dataset} is one shard of about {shard_tokens:,} tokens, none would be left to train on; "
                "lower --shard_tokens or set --val to a fraction such as 0.05"
            )
        for index, unit in enumerate(units):
            unit["split"] = "train" if index else "val"
    manifest = prepare(
        options.out, tokenizer, units, files.read,
        source=files.source,
        settings={"text_column": options.text_column, "val": options.val, "shard_tokens": options.shard_tokens},
        val_fraction=0.0 if first_shard else float(options.val),
        workers=options.workers, encoder=Encoder(tokenizer, fast=options.fast_tokenizer), token_limit=options.tokens,
        node=(options.node_index, options.num_nodes), overwrite=options.overwrite, place=files.place,
        decontamination=decontamination,
    )  # fmt: skip
    files.reading.tell()
    if manifest is not None:
        if copies is not None:
            shutil.rmtree(copies, ignore_errors=True)
        for name, split in manifest["splits"].items():
            sizes = f"{split['tokens']:>15,} tokens {split['documents']:>11,} documents {split['bytes']:>15,} bytes"
            print(f"  {name:5} {sizes}")
        for name, found in manifest.get("decontamination", {}).get("tasks", {}).items():
            examples = f"{len(found['hits']):,} of {found['examples']:,} examples ({found['too_short']:,} too short)"
            print(f"  {name}: {examples} in {found['documents_hit']:,} training documents")
    return manifest


def _decontamination(options: Options) -> Decontamination:
    from gpt2repro.evaluation.tasks import parse_specs  # imports torch

    specs = ",".join(options.decontaminate).replace(",,", ",").strip(",").split(",")
    examples = {task.name: task.texts(task.read(data)) for task, data in parse_specs(specs)}
    return Decontamination(examples, drop=options.decontaminate_action == "drop")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
