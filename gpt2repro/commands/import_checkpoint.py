"""Turns a checkpoint of nanoGPT, build-nanogpt or llm.c into a directory that every command here and transformers load.

    gpt2repro import-checkpoint --format build-nanogpt --input log/model_19072.pt --out imported/gpt2-124M

ShallowU's Reproduce-GPT2-124M writes build-nanogpt's format. The optimizer is not taken over: continue training with
`train_accelerate.py --init_from DIR`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2repro.options import InputError, Problems, parse_options, taken

# Ordinary English of our own. A trained GPT-2 has 3 to 5 nats per token; a wrongly read one more than ln(V) = 10.8.
ENGLISH = (
    "The river runs through the middle of the old town, and every spring the people who live beside it wait for the "
    "water to rise. Last year it came up to the doors of the houses in the main street. This year the weather has been "
    "dry, and most of them think that nothing will happen."
)


@dataclass
class Options:
    format: Literal["nanogpt", "build-nanogpt", "llm.c"]
    "Who wrote the file; ShallowU's files are build-nanogpt's."
    input: Path
    "The checkpoint: ckpt.pt, model_NNNNN.pt, or a .bin of llm.c (version 3 or 5)."
    out: Path
    "New directory for the model and its tokenizer."
    meta: Path | None = None
    "nanoGPT's meta.pkl, for a model over characters; without it such a model comes without a tokenizer."

    def problems(self) -> Problems:
        yield from taken(self.out)
        if self.meta is not None and self.format != "nanogpt":
            yield "--meta belongs to --format nanogpt"


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro import-checkpoint", description=__doc__)
    from gpt2repro.data.tokenization import gpt2_tokenizer, tokenizer_of_characters
    from gpt2repro.publishing.exports import new_directory
    from gpt2repro.publishing.importers import GPT2_VOCAB_SIZE, read_checkpoint, read_nanogpt_characters

    imported = read_checkpoint(options.format, options.input)
    model = build_model(imported)
    tokenizer = None
    if options.meta is not None:
        characters = read_nanogpt_characters(options.meta)
        if len(characters) != model.config.vocab_size:
            raise InputError(
                f"--meta {options.meta} has {len(characters)} characters, the model {model.config.vocab_size} tokens"
            )
        unknown = " " if " " in characters else characters[0]  # nanoGPT's tokenizer has no special token
        how = {"model_max_length": model.config.n_positions, "clean_up_tokenization_spaces": False}
        tokenizer = tokenizer_of_characters(characters, unknown=unknown, **how)
    elif model.config.vocab_size == GPT2_VOCAB_SIZE:
        tokenizer = gpt2_tokenizer()

    for note in imported.notes:
        print(note)
    print(verify(model, tokenizer))
    with new_directory(options.out) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    print(f"{model.num_parameters():,} parameters -> {options.out}")
    if tokenizer is None:
        V = model.config.vocab_size
        print(f"no tokenizer: a vocabulary of {V} is not GPT-2's; nanoGPT keeps its characters in meta.pkl (--meta)")
    return 0


def build_model(imported):
    """Our model in eval mode with exactly the imported tensors, in their precision."""
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    try:
        config = GPT2ReproConfig(**imported.config)
    except ValueError as error:
        raise InputError(str(error)) from None
    dtype = imported.tensors["transformer.wte.weight"].dtype
    model, report = GPT2ReproForCausalLM.from_pretrained(
        None, config=config, state_dict=imported.tensors, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), f"importer and model disagree: {report}"
    return model


def verify(model, tokenizer) -> str:
    """A forward pass over English (over ascending ids where there is no tokenizer) -> one line about its loss.

    Raises: InputError where the logits are not finite numbers.
    """
    import copy

    import torch

    model = copy.deepcopy(model).float()
    V, T = model.config.vocab_size, model.config.n_positions
    if tokenizer is not None:
        ids, what = tokenizer(ENGLISH, return_tensors="pt").input_ids[:, :T], "a paragraph of English"
    else:
        ids, what = torch.arange(min(V, T)).unsqueeze(0), "the ids in ascending order"
    with torch.inference_mode():
        output = model(ids, labels=ids)
    if not output.logits.isfinite().all():
        raise InputError("the imported model computes NaN or infinite logits: the file's numbers are damaged")
    line = f"forward pass: {output.loss:.3f} nats per token on {what} (chance: {math.log(V):.2f})"
    if tokenizer is not None and output.loss > math.log(V):
        line += "; worse than chance: an untrained model, or not written by what --format says"
    return line
