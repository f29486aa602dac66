"""One checkpoint in the programs that people use: each computes the logits and writes the tokens of GPT2LMHeadModel.

    checkpoint --+-> "own": its directory as it is, with the code that travels in it
                 +-> "native": export_native's plain gpt2
    each form x each consumer -> a row {consumer, version, form, state, difference, tokens_equal, seconds, detail}

The reference for both forms is `GPT2LMHeadModel` on the native files: whole forward passes, no cache, no `generate`.
A consumer is a function of a `Subject`; it returns (largest |logit difference| or None, whether the greedy tokens are
equal or None) and raises `Skip` where it cannot take the form or is not installed. Everything runs on the CPU in fp32
and without the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from gpt2repro.files import read_json
from gpt2repro.options import InputError
from gpt2repro.publishing import exports

NEW_TOKENS = 64
TOLERANCE = 1e-3  # |logit difference| in fp32, or of a log-likelihood that was summed over a few tokens
# What computes in less than fp32 may differ further, and an int8 model may choose other tokens.
TOLERANCES = {"llama.cpp": 0.1, "torchao int8": 0.5, "bitsandbytes int8": 0.5}
LOSSY = {"torchao int8", "bitsandbytes int8"}
CONVERTER = "convert_hf_to_gguf.py"
# The first one is taken whose greedy continuation does not end the document.
PROMPTS = ("The import statement", "Once upon a time", "The first line of the", "A", "In the beginning", "Hello")
CHOICE = " of the module is not the same as the name of"  # scored behind the prompt, as a benchmark scores an answer
SERVER_SECONDS = 180


class Skip(Exception):
    """This consumer does not run here, or does not take this form; the message says why."""


@dataclass(frozen=True)
class Subject:
    """One form of a checkpoint, and what every consumer has to find."""

    place: Path
    own: bool
    work: Path
    "An empty directory that one consumer may write into."
    converter: Path | None
    prompt: str
    ids: torch.Tensor  # (1, T)
    logits: torch.Tensor  # (T, V)
    written: list[int]
    reference: GPT2LMHeadModel

    def load(self, **how):
        """The model in transformers, as its user loads it."""
        how |= {"trust_remote_code": True} if self.own else {}
        return AutoModelForCausalLM.from_pretrained(self.place, dtype=torch.float32, **how).eval()

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.place, trust_remote_code=False)

    @torch.inference_mode()
    def difference(self, logits) -> float:
        return float((torch.as_tensor(logits).float().reshape(self.logits.shape) - self.logits).abs().max())

    @torch.inference_mode()
    def compare(self, model) -> tuple[float, bool]:
        """What a consumer returns whose result is a model of transformers."""
        return self.difference(model(input_ids=self.ids).logits), self.writes(model)

    @torch.inference_mode()
    def writes(self, model, **how) -> bool:
        """Whether `model.generate` writes the reference's tokens."""
        how |= {"do_sample": False, "max_new_tokens": len(self.written), "eos_token_id": None, "pad_token_id": 0}
        ids = model.generate(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), **how)
        return ids[0, self.ids.shape[1] :].tolist() == self.written

    def text(self) -> str:
        """What the reference writes, as a program that speaks text returns it."""
        return self.tokenizer().decode(self.written, skip_special_tokens=True)

    @torch.inference_mode()
    def log_likelihood(self, continuation: str) -> float:
        """ln P(continuation | prompt) by the reference."""
        ids = self.tokenizer()(self.prompt + continuation, return_tensors="pt").input_ids
        scores = self.reference(ids).logits[0, :-1].log_softmax(-1)
        start = self.ids.shape[1]
        return float(scores[start - 1 :].gather(1, ids[0, start:, None]).sum())

    def texts(self) -> list[str]:
        """A few short documents to train on."""
        size = max(2, self.reference.config.n_positions // 4)
        ids = [*self.ids[0].tolist(), *self.written]
        return [self.tokenizer().decode(ids[i : i + size]) for i in range(0, max(1, len(ids) - size), 3)][:8]


def transformers_pipeline(subject: Subject):
    how = {"trust_remote_code": True} if subject.own else {}
    write = pipeline("text-generation", str(subject.place), tokenizer=subject.tokenizer(), dtype="float32", **how)
    options = {"do_sample": False, "max_new_tokens": len(subject.written), "eos_token_id": None}
    ids = write(subject.prompt, return_tensors=True, **options)[0]["generated_token_ids"]
    return subject.compare(write.model)[0], list(ids)[subject.ids.shape[1] :] == subject.written


def generate_batch(subject: Subject):
    options = {"do_sample": False, "max_new_tokens": len(subject.written), "eos_token_id": -1, "pad_token_id": 0}
    found = subject.load().generate_batch(
        inputs=[subject.ids[0].tolist()] * 2,
        generation_config=GenerationConfig(**options),
        continuous_batching_config=ContinuousBatchingConfig(block_size=32, num_blocks=16, max_batch_tokens=64),
        progress_bar=False,
    )
    return None, [output.generated_tokens for output in found.values()] == [subject.written] * 2


def transformers_serve(subject: Subject):
    """An OpenAI client of `transformers serve` on a free port of the loopback."""
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address, port = probe.getsockname()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(subject.place), "--host", address]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32", *["--trust-remote-code"] * subject.own]
    http = openai.DefaultHttpxClient(trust_env=False, timeout=SERVER_SECONDS)  # no proxy leads to the loopback
    where = {"base_url": f"http://{address}:{port}/v1", "api_key": "none", "http_client": http, "max_retries": 0}
    options = {"model": str(subject.place), "max_tokens": len(subject.written), "temperature": 0}
    client, until = openai.OpenAI(**where), time.monotonic() + SERVER_SECONDS
    with open(subject.work / "serve.log", "w+b") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            while server.poll() is None and time.monotonic() < until:
                with contextlib.suppress(openai.APIConnectionError):  # it is not there yet
                    answer = client.completions.create(prompt=subject.prompt, **options)
                    return None, answer.choices[0].text == subject.text()
                time.sleep(0.2)
        finally:
            server.terminate()
        log.seek(0)
        said = log.read().decode(errors="replace")[-500:]
    if subject.own and "has no attribute" in said:  # transformers 5.24
        raise Skip("it looks the class up in transformers and takes no other; serve the native form")
    raise RuntimeError(f"transformers serve did not start: {said}")


def trainer(subject: Subject):
    """Predicts what the reference computes; a few steps lower the loss; what is saved loads again."""
    # Of transformers' own GPT-2 the Trainer counts the first label as a target, which it never is; so it is left out.
    rows = [{"input_ids": subject.ids[0].tolist(), "labels": [-100, *subject.ids[0, 1:].tolist()]}] * 4
    job = Trainer(subject.load(), TrainingArguments(**_how_to_train(subject)), train_dataset=rows, eval_dataset=rows)
    same, before = subject.writes(job.model), job.evaluate()["eval_loss"]
    away = abs(before - subject.reference(subject.ids, labels=subject.ids).loss.item())
    difference = max(away, subject.difference(job.predict(rows[:1]).predictions[0]))
    job.train()
    _learned(job, before)
    job.save_model(subject.work / "trained")
    again = type(job.model).from_pretrained(subject.work / "trained").eval()
    if not torch.equal(again(subject.ids).logits, job.model.eval()(subject.ids).logits):
        raise AssertionError("the saved model computes something else than the trained one")
    return difference, same


def trl_sft(subject: Subject, packing: bool = False):
    """Its loss on whole documents is the reference's, packed or not; a few steps lower it."""
    import datasets
    import trl

    tokenizer, texts = subject.tokenizer(), subject.texts()
    data, longest = datasets.Dataset.from_dict({"text": texts}), subject.reference.config.n_positions
    options = _how_to_train(subject) | {"bf16": False, "packing": packing, "max_length": longest}
    job = trl.SFTTrainer(
        subject.load(), trl.SFTConfig(**options), train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    before, total, count = job.evaluate()["eval_loss"], 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])  # TRL ends a document so
        total += subject.reference(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    job.train()
    _learned(job, before)
    return abs(before - total / count), None


def peft_lora(subject: Subject):
    """A fresh adapter changes nothing; trained, merged and loaded again it is the same model."""
    import peft

    targets = ["c_attn", "c_proj", "c_fc"]  # of GPT-2's layout: (in, out)
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(subject.load(), config).eval()
    found = subject.compare(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=subject.ids, labels=subject.ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(subject.work / "adapter")
    trained = adapted(input_ids=subject.ids).logits
    merged = peft.PeftModel.from_pretrained(subject.load(), subject.work / "adapter").eval().merge_and_unload()
    if (away := (merged(subject.ids).logits - trained).abs().max().item()) > TOLERANCE:
        raise AssertionError(f"the merged adapter differs by {away:.1e}")
    if subject.difference(trained) < 10 * TOLERANCE:
        raise AssertionError("training the adapter changed nothing")
    return found


def torchao_int8(subject: Subject):
    """The head alone: like everybody's GPT-2, the blocks are Conv1D, which torchao leaves as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = subject.load()
    quantize_(model, Int8WeightOnlyConfig())
    if type(model.lm_head.weight) is torch.nn.Parameter:
        raise AssertionError("nothing was quantised")
    return subject.compare(model)


def bitsandbytes_int8(subject: Subject):
    """Every matrix of the blocks: transformers' integration takes Conv1D."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every matrix that fp32 becomes fp16
    model = subject.load(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    if type(model.transformer.h[0].attn.c_attn).__name__ != "Linear8bitLt":
        raise AssertionError("nothing was quantised")
    return subject.compare(model)


def torch_export(subject: Subject):
    return subject.difference(_exported(subject).module()(subject.ids).detach()), None


def onnxruntime(subject: Subject):
    if not subject.own:
        return subject.difference(exports.to_onnx(subject.place, subject.work)[1](subject.ids)), None
    import onnxruntime

    path = subject.work / "model.onnx"
    torch.onnx.export(_exported(subject), f=path, input_names=["input_ids"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return subject.difference(session.run(None, {"input_ids": subject.ids.numpy()})[0]), None


def lm_evaluation_harness(subject: Subject):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(str(subject.place), device="cpu", dtype="float32", batch_size=1, trust_remote_code=subject.own)
    ((score, _),) = model.loglikelihood([Instance("loglikelihood", {}, (subject.prompt, CHOICE), 0)], disable_tqdm=True)
    how = {"until": [], "max_gen_toks": len(subject.written), "do_sample": False}
    (text,) = model.generate_until([Instance("generate_until", {}, (subject.prompt, how), 0)], disable_tqdm=True)
    return abs(score - subject.log_likelihood(CHOICE)), text == subject.text()


def lighteval(subject: Subject):
    from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
    from lighteval.tasks.requests import Doc

    how = {"device": "cpu", "dtype": "float32", "batch_size": 1, "trust_remote_code": subject.own}
    model = TransformersModel(
        TransformersModelConfig(model_name=str(subject.place), cache_dir=str(subject.work), **how)
    )
    common = {"query": subject.prompt, "choices": [CHOICE], "gold_index": 0, "task_name": "conformance", "id": "0"}
    (scored,) = model.loglikelihood([Doc(**common)])
    (written,) = model.greedy_until([Doc(**common, generation_size=len(subject.written), stop_sequences=[])])
    return abs(scored.logprobs[0] - subject.log_likelihood(CHOICE)), written.text[0] == subject.text()


def ctranslate2(subject: Subject):
    import ctranslate2

    _, logits = exports.to_ct2(subject.place, subject.work)
    tokens = subject.tokenizer().convert_ids_to_tokens(subject.ids[0].tolist())
    options = {"max_length": len(subject.written), "include_prompt_in_result": False, "end_token": []}
    (found,) = ctranslate2.Generator(str(subject.work)).generate_batch([tokens], **options)
    return subject.difference(logits(subject.ids)), found.sequences_ids[0] == subject.written


def llama_cpp(subject: Subject):
    if subject.converter is None:
        raise Skip(f"no {CONVERTER} on the PATH or by --converter")
    import llama_cpp

    _, logits = exports.to_gguf(subject.place, subject.work, subject.converter)
    difference = subject.difference(logits(subject.ids))
    program = llama_cpp.Llama(str(subject.work / "model.gguf"), n_ctx=0, verbose=False)
    found = program.generate(subject.ids[0].tolist(), temp=0)
    return difference, [next(found) for _ in subject.written] == subject.written


# Name -> (function, the distribution whose version is shown, other modules that it needs)
CONSUMERS: dict[str, tuple[Callable, str, tuple[str, ...]]] = {
    "transformers pipeline": (transformers_pipeline, "transformers", ()),
    "generate_batch": (generate_batch, "transformers", ("psutil",)),
    "transformers serve": (transformers_serve, "transformers", ("openai", "fastapi", "uvicorn", "rich")),
    "Trainer": (trainer, "transformers", ()),
    "TRL SFT": (trl_sft, "trl", ()),
    "TRL SFT, packed": (partial(trl_sft, packing=True), "trl", ()),
    "PEFT LoRA": (peft_lora, "peft", ()),
    "torchao int8": (torchao_int8, "torchao", ()),
    "bitsandbytes int8": (bitsandbytes_int8, "bitsandbytes", ()),
    "torch.export": (torch_export, "torch", ()),
    "ONNX, onnxruntime": (onnxruntime, "onnxruntime", ("onnx", "onnxscript")),
    "lm-evaluation-harness": (lm_evaluation_harness, "lm_eval", ()),
    "lighteval": (lighteval, "lighteval", ()),
    "CTranslate2": (ctranslate2, "ctranslate2", ()),
    "llama.cpp": (llama_cpp, "llama-cpp-python", ()),
}
# What reads the weights by itself and knows GPT-2's own names only.
NATIVE_ONLY = {"CTranslate2", "llama.cpp"}


def rows_of(source: Path, consumers: list[str], converter: Path | None = None) -> Iterator[dict]:
    """One row for each form of the model in `source` and each consumer.

    Raises: InputError where the directory holds no model of ours, or no tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2repro-conformance-") as work:
        native = exports.export_native(source, Path(work) / "native")
        exports.need_tokenizer(native)
        subject = _subject(native, Path(work), converter)
        forms = {"native": subject}
        if read_json(source / "config.json")["model_type"] == "gpt2repro":
            forms = {"own": replace(subject, place=source.resolve(), own=True), **forms}
        for name in consumers:
            function, distribution, needs = CONSUMERS[name]
            for form, one in forms.items():
                place = Path(work) / "consumer"
                place.mkdir()
                row = {"consumer": name, "version": None, "form": form, "state": "skipped", "difference": None,
                       "tokens_equal": None, "seconds": None, "detail": ""}  # fmt: skip
                began = time.perf_counter()
                try:
                    row["version"] = version(distribution)
                    if form == "own" and name in NATIVE_ONLY:
                        raise Skip("takes the native form")
                    if absent := [module for module in needs if importlib.util.find_spec(module) is None]:
                        raise Skip(f"not installed: {', '.join(absent)}")
                    # lighteval turns gradients off when it is imported; stdout belongs to the table.
                    with torch.enable_grad(), contextlib.redirect_stdout(sys.stderr):
                        row["difference"], row["tokens_equal"] = function(replace(one, work=place))
                    row |= _judge(name, row)
                except (Skip, PackageNotFoundError) as reason:
                    row["detail"] = str(reason) if isinstance(reason, Skip) else "not installed"
                except Exception as error:  # whatever other people's programs raise is a finding
                    said = (str(error).strip().splitlines() or [""])[-1][:200]
                    row |= {"state": "failed", "detail": f"{type(error).__name__}: {said}"}
                if row["state"] != "skipped":
                    row["seconds"] = round(time.perf_counter() - began, 1)
                shutil.rmtree(place)
                yield row


def _judge(name: str, row: dict) -> dict:
    """ok, or failed with the reason."""
    limit = TOLERANCES.get(name, TOLERANCE)
    if row["difference"] is not None and not row["difference"] <= limit:
        return {"state": "failed", "detail": f"the difference is above {limit}"}
    if row["tokens_equal"] is False and name not in LOSSY:
        return {"state": "failed", "detail": "the tokens differ"}
    return {"state": "ok"}


def _subject(native: Path, work: Path, converter: Path | None) -> Subject:
    """The native form, with what the reference computes: logits of a prompt and its greedy continuation."""
    reference = GPT2LMHeadModel.from_pretrained(native, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(native)
    count = min(NEW_TOKENS, reference.config.n_positions // 2)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        if ids.shape[1] > reference.config.n_positions - count:
            continue
        row, written = ids, []
        with torch.inference_mode():
            for _ in range(count):
                written.append(int(reference(row).logits[0, -1].argmax()))
                row = torch.cat([row, row.new_tensor([written[-1:]])], dim=1)
            if tokenizer.eos_token_id not in [*ids[0].tolist(), *written]:
                return Subject(
                    native, False, work, converter, prompt, ids, reference(ids).logits[0], written, reference
                )  # fmt: skip
    raise InputError("the model ends the document at once after every prompt that was tried; train it for longer")


def _how_to_train(subject: Subject) -> dict:
    """The options that transformers' Trainer and TRL's have in common: a few steps on the CPU."""
    return {
        "output_dir": str(subject.work), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "max_steps": 3, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 64, "learning_rate": 1e-3,
    }  # fmt: skip


def _learned(job, before: float) -> None:
    if not (after := job.evaluate()["eval_loss"]) < before:
        raise AssertionError(f"the loss was {before:.4f} before training and is {after:.4f} after it")


def _exported(subject: Subject):
    """The model without its cache as an ExportedProgram."""

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):  # (B, T) -> (B, T, V)
            return self.model(input_ids, use_cache=False).logits

    return torch.export.export(Logits(subject.load()).eval(), (subject.ids,))
