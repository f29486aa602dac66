"""Write text with a model: one prompt, a conversation, or a file of prompts.

    gpt2repro generate --model runs/quickstart --prompt "The import statement" --num_samples 3
    gpt2repro generate --model runs/quickstart --interactive
    gpt2repro generate --model openai-community/gpt2 --prompts_file prompts.txt --out samples.jsonl

A prompts file is .txt (one prompt a line, empty lines skipped) or .jsonl ({"prompt": "..."} a line). The text goes to
stdout or --out, everything else to stderr. The same seed gives the same text, whatever the batch.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gpt2repro.files import atomic_file, read_json_lines
from gpt2repro.generation.prompts import TextStream, encode_prompt, room_for
from gpt2repro.models import ModelOptions
from gpt2repro.options import AtLeastOne, InputError, NotNegativeNumber, Problems, parse_options, say

MOST_SAMPLES = 1_000_000  # of one call: all of them are kept until the file is written
MOST_CHARACTERS = 64 << 20  # of a prompts file


@dataclass(kw_only=True)
class Options(ModelOptions):
    prompt: str | None = field(default=None, metadata={"free_text": True})
    'The text to continue; "" begins a new document.'
    interactive: bool = False
    "Read one prompt a line from the keyboard and stream what follows."
    prompts_file: Path | None = field(default=None, metadata={"config": False})
    "Continue every prompt of this .txt or .jsonl file; needs --out."
    out: Path | None = field(default=None, metadata={"config": False})
    "Where the samples of a prompts file go, one JSON object a line."
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    "Stop after this many tokens, or at the end-of-text token."
    temperature: NotNegativeNumber = 0.8
    "Below 1 bolder, above 1 wilder; 0 always takes the likeliest token."
    top_k: AtLeastOne | None = 50
    "Choose among the k likeliest tokens; none: among all."
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    "Choose among the likeliest tokens that together have this probability; none: no such cut."
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 1337
    "The same seed, prompt and options give the same text."
    num_samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    "How many continuations of each prompt."
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    "Sequences decoded at a time."
    compile: bool = False
    "Fuse the decode step with torch.compile: slower to start, faster for many tokens on a GPU."

    def problems(self) -> Problems:
        sources = [self.prompt is not None, self.interactive, self.prompts_file is not None]
        if sum(sources) != 1:
            yield "give exactly one of --prompt TEXT, --interactive and --prompts_file FILE"
        if self.prompts_file is not None and self.out is None:
            yield "--prompts_file needs --out FILE.jsonl for the samples"
        if self.prompts_file is None and self.out is not None:
            yield "--out belongs to --prompts_file; redirect the output of --prompt with > FILE"
        if self.interactive and self.num_samples > 1:
            yield f"--interactive streams one text at a time; num_samples={self.num_samples} needs --prompt"


def main(argv: list[str]) -> int:
    options = parse_options(Options, argv, prog="gpt2repro generate", description=__doc__)
    try:
        if options.prompts_file:
            write_samples(options)
            return 0
        model, tokenizer, _ = options.load()
        (converse if options.interactive else print_samples)(model, tokenizer, options)
        return 0
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        raise InputError(
            f"batch_size={options.batch_size} sequences do not fit into the memory; lower --batch_size or "
            "--max_new_tokens, or try --dtype bf16"
        ) from None


def print_samples(model, tokenizer, options: Options) -> None:
    """`--prompt`: a single sample streams; several are made together and printed one after the other."""
    if options.num_samples == 1:
        stream(model, tokenizer, options.prompt, options)
        return
    ids = encode_prompt(tokenizer, options.prompt)
    samples = sample(model, tokenizer, [ids], shorten(model, len(ids), options.max_new_tokens), options)
    for number, tokens in enumerate(samples, 1):
        print(f"--- sample {number} of {options.num_samples}")
        print(options.prompt + tokenizer.decode(tokens, skip_special_tokens=True))


def converse(model, tokenizer, options: Options) -> None:
    """`--interactive`: every line is a prompt of its own; an empty line or end of input ends the program."""
    with contextlib.suppress(ImportError):  # arrow keys and history, where Python has them
        import readline  # noqa: F401
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused like any bad prompt

    decoder = None
    row = 0
    say("Write the beginning of a text; an empty line ends the program.")
    while prompt := read_line("\n> "):
        try:
            decoder = stream(model, tokenizer, prompt, options, decoder=decoder, row=row)
        except InputError as error:  # a prompt that is too long is no reason to lose the model
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("\n(stopped; an empty line ends the program)")
        row += 1


def read_line(question: str) -> str:
    """A line from the keyboard; empty at the end of input or Ctrl-C."""
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return ""


def write_samples(options: Options) -> None:
    """`--prompts_file`: all samples of all prompts in left-padded batches -> JSON lines, in the prompts' order."""
    out = options.out
    prompts = read_prompts(options.prompts_file)  # what can be wrong is found before a model is loaded
    if len(prompts) * options.num_samples > MOST_SAMPLES:
        raise InputError(
            f"{len(prompts)} prompts with num_samples={options.num_samples} each make more than "
            f"{MOST_SAMPLES:,} samples; use several files"
        )
    if out.exists() and (not out.is_file() or out.samefile(options.prompts_file)):
        raise InputError(f"--out {out} is {'--prompts_file' if out.is_file() else 'no file'}; name a new .jsonl file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            model, tokenizer, _ = options.load()
            encoded = encode_all(model, tokenizer, prompts, options)
            samples = sample(model, tokenizer, encoded, options.max_new_tokens, options)
            for index, tokens in enumerate(samples):
                number, repetition = divmod(index, options.num_samples)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                record = {"index": number, "sample": repetition, "prompt": prompts[number]}
                record |= {"text": text, "tokens": len(tokens), "seed": options.seed}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    say(f"{len(samples)} samples in {out}")


def sample(model, tokenizer, prompts: list[list[int]], new_tokens: int, options: Options) -> list[list[int]]:
    """The new tokens of `num_samples` texts for each prompt, in the prompts' order; a bar and the speed on stderr."""
    from tqdm import tqdm

    from gpt2repro.generation.decoder import complete

    jobs = [ids for ids in prompts for _ in range(options.num_samples)]
    how = {"max_new_tokens": new_tokens, "batch_size": options.batch_size, "compiled": options.compile}
    done, start = complete(model, jobs, **how, **chance(tokenizer, options)), time.perf_counter()
    samples = dict(tqdm(done, total=len(jobs), unit="sample", disable=None))  # the shortest prompts come first
    report(sum(map(len, samples.values())), time.perf_counter() - start)
    return [samples[index] for index in range(len(jobs))]


def encode_all(model, tokenizer, prompts: list[str], options: Options) -> list[list[int]]:
    """The ids of every prompt. Raises: InputError naming the first that leaves no room for the wanted length."""
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
            room = room_for(model, len(encoded[-1]))
        except InputError as error:
            raise InputError(f"prompt {number} of {options.prompts_file}: {error}") from None
        if room is not None and room < options.max_new_tokens:
            raise InputError(
                f"prompt {number} of {options.prompts_file} has {len(encoded[-1])} tokens, which leaves room for "
                f"{room} new ones, not {options.max_new_tokens}; shorten it or lower --max_new_tokens"
            )
    return encoded


def stream(model, tokenizer, prompt: str, options: Options, *, decoder=None, row: int = 0):
    """Print one continuation while it is made, then its speed. Returns the decoder for the next text."""
    from gpt2repro.generation.decoder import decoder_for

    ids = encode_prompt(tokenizer, prompt)
    limit = shorten(model, len(ids), options.max_new_tokens)
    if decoder is None or decoder.length < len(ids) + limit:
        decoder = decoder_for(model, batch_size=1, length=len(ids) + limit, compiled=options.compile)
    print(prompt, end="", flush=True)
    text = TextStream(tokenizer)
    count, start = 0, time.perf_counter()
    try:
        for step in decoder.tokens([ids], max_new_tokens=limit, rows=[row], **chance(tokenizer, options)):
            token = step.tokens.item()
            if token == tokenizer.eos_token_id:
                break
            count += 1
            print(text.push(token), end="", flush=True)
    finally:
        print(text.flush(), flush=True)
    report(count, time.perf_counter() - start)
    return decoder


def chance(tokenizer, options: Options) -> dict:
    """The arguments of the decode engine that decide how tokens are chosen."""
    from gpt2repro.generation.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    return {"sampling": sampling, "end_token": tokenizer.eos_token_id, "seed": options.seed}


def shorten(model, prompt_tokens: int, wanted: int) -> int:
    """`wanted` tokens, or as many as fit behind the prompt, with a note on stderr."""
    room = room_for(model, prompt_tokens)
    if room is None or room >= wanted:
        return wanted
    say(f"note: behind {prompt_tokens} prompt tokens there is room for {room} new ones, not {wanted}")
    return room


def report(tokens: int, seconds: float) -> None:
    say(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt or .jsonl file. Raises: InputError naming the line that is wrong."""
    prompts = []
    try:
        if path.suffix.lower() == ".jsonl":
            for number, value in read_json_lines(path):
                prompts.append(value.get("prompt") if isinstance(value, dict) else None)
                if not isinstance(prompts[-1], str):
                    found = json.dumps(value)[:60]
                    raise InputError(f'{path} line {number}: expected {{"prompt": "text"}}, found {found}')
        else:
            with path.open(encoding="utf-8") as file:
                text = file.read(MOST_CHARACTERS + 1)
            if len(text) > MOST_CHARACTERS:
                raise InputError(f"{path} has more than {MOST_CHARACTERS} characters; use several files")
            prompts = [line for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read prompts from {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read prompts from {path}: {error}; save it as UTF-8") from None
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts
