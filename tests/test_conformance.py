"""Programs that other people use, run for real on a tiny model of ours: on a CPU, without a network.

What needs a package of its own carries the marker `extra`. The model by itself is in test_modeling.py, exports in
test_native_export.py.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    ContinuousBatchingConfig,
    DataCollatorWithFlattening,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import find_labels

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.data.tokenization import bpe_tokenizer
from gpt2repro.publishing import conformance
from gpt2repro.publishing.conformance import rows_of
from gpt2repro.publishing.model_card import card_files
from modeling_gpt2repro import GPT2ReproForCausalLM

TEXTS = [f"the {animal} sat on the mat and looked at the moon" for animal in ("cat", "dog", "owl", "cow", "ant", "fox")]
N_POSITIONS = 48


@pytest.fixture
def tokenizer():
    tokenizer = bpe_tokenizer(TEXTS, 300)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def model(tokenizer) -> GPT2ReproForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_positions": N_POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**sizes, **ends))


class Rows(Dataset):
    """Random rows as a language model is trained on them: the labels are the ids.

    The first is never a target; left in, older Trainers would divide the loss by one target too many for each row.
    """

    def __init__(self, model, lengths):
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids = self.rows[index].tolist()
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def arguments(directory, **options) -> TrainingArguments:
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4}
    common |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "max_steps": 4}
    return TrainingArguments(output_dir=str(directory), **{**common, **options})


# --- transformers


def test_trainer_takes_labels_and_nothing_else_for_the_targets_of_a_batch():
    assert find_labels(GPT2ReproForCausalLM) == ["labels"]


def test_trainer_evaluates_and_returns_to_its_best_checkpoint(model, tmp_path):
    rows = Rows(model, [20] * 8)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 6}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert len(losses) == 3 and losses[-1] < losses[0]
    best = trainer.evaluate()["eval_loss"]
    assert best == pytest.approx(min(losses), rel=1e-6) == pytest.approx(trainer.state.best_metric, rel=1e-6)
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"] for row in rows])
        assert best == pytest.approx(trainer.model(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_free_collator_gives_the_loss_and_logits_of_padded_rows(model, attention):
    """The row of all documents is longer than n_positions; each document keeps its own positions and attention."""
    model = model.double().eval()
    model.set_attn_implementation(attention)
    rows = Rows(model, [30, 5, 17, 40])
    flattened = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(list(rows))
    assert flattened["input_ids"].shape == (1, 92) and N_POSITIONS < 92
    ids, labels = torch.zeros(4, 40, dtype=torch.long), torch.full((4, 40), -100)
    for index, row in enumerate(rows.rows):
        ids[index, : len(row)] = labels[index, : len(row)] = row
    mask = (labels != -100).long()
    padded, packed = model(ids, attention_mask=mask, labels=labels), model(**flattened)
    assert (packed.logits[0] - padded.logits[mask.bool()]).abs().max() < 1e-12
    assert abs(packed.loss - padded.loss) < 1e-12


def test_trainer_learns_from_packed_rows_what_it_learns_from_padded_ones(model, tmp_path):
    rows = Rows(model, [30, 30, 30, 30])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for collator in (None, DataCollatorWithFlattening()):
        model.load_state_dict(state)
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collator)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_pipeline_writes_as_far_as_the_context_reaches(model, tokenizer):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = write(TEXTS[0], do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(ids) <= N_POSITIONS
    with pytest.raises(ValueError, match=f"n_positions={N_POSITIONS}.*generate fewer tokens"):
        write(TEXTS[0], do_sample=False, max_new_tokens=N_POSITIONS, eos_token_id=None)


def test_continuous_batching_writes_what_generate_writes(model):
    pytest.importorskip("psutil")
    prompts = [row.tolist() for row in Rows(model, [6, 11]).rows]
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    found = model.eval().generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(eos_token_id=-1, **options),
        continuous_batching_config=ContinuousBatchingConfig(block_size=32, num_blocks=8, max_batch_tokens=32),
        progress_bar=False,
    )
    written = sorted((tuple(output.prompt_ids), output.generated_tokens) for output in found.values())
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
        expected.append((tuple(prompt), alone[0, len(prompt) :].tolist()))
    assert written == sorted(expected)


# --- TRL


@pytest.mark.extra
@pytest.mark.parametrize("packed", [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}], ids=str)
def test_trl_fine_tunes_on_text(model, tokenizer, tmp_path, packed):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    text = datasets.Dataset.from_list([{"text": text} for text in TEXTS * 4])
    options = arguments(tmp_path, eval_strategy="steps", eval_steps=2).to_dict()
    kept = ("use_cpu", "report_to", "disable_tqdm", "learning_rate", "logging_steps", "save_strategy", "max_steps")
    options = {name: options[name] for name in (*kept, "eval_strategy", "eval_steps", "per_device_train_batch_size")}
    config = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=40, **options, **packed)
    trainer = trl.SFTTrainer(model, config, train_dataset=text, eval_dataset=text, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    if packed == {"packing": True}:
        assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] > N_POSITIONS
        assert (batch["position_ids"] == 0).sum() > 1
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    evaluated = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert losses[-1] < losses[0] and evaluated[-1] < evaluated[0]


# --- PEFT

ALL_MATRICES = ["c_attn", "c_proj", "c_fc"]


@pytest.mark.extra
@pytest.mark.parametrize("padded", [False, True], ids=["plain head", "padded head"])
@pytest.mark.parametrize("targets", [ALL_MATRICES, [*ALL_MATRICES, "lm_head"], ["lm_head"], "all-linear"], ids=str)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_peft_trains_merges_and_loads_an_adapter(model, tmp_path, targets, padded):
    peft = pytest.importorskip("peft")
    if padded:
        model.pad_head()
    ids = torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(ids, labels=ids).loss.item()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids, output_logits=False, use_cache=False).loss  # the loss of training
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    trained = adapted.eval()(input_ids=ids, labels=ids)
    assert trained.loss < before and trained.logits.shape == (2, 20, model.config.vocab_size)
    adapted.save_pretrained(tmp_path)

    fresh = GPT2ReproForCausalLM(model.config)
    fresh.load_state_dict(state)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, trained.logits, atol=1e-6)
    if "lm_head" not in targets:  # a merge into tied weights would change the embeddings as well
        merged = again.merge_and_unload()
        assert type(merged) is GPT2ReproForCausalLM
        assert torch.allclose(merged(ids).logits, trained.logits, atol=1e-5)


# --- `gpt2repro conformance`: the same and more programs, on one checkpoint, as a table


@pytest.fixture
def directory(model, tokenizer, tmp_path):
    """A checkpoint's directory of the tiny model, with larger weights, so that logits differ visibly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


IN_CI = ["transformers pipeline", "generate_batch", "Trainer", "TRL SFT", "TRL SFT, packed", "PEFT LoRA"]
IN_CI += ["torch.export", "ONNX, onnxruntime", "CTranslate2"]


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_both_forms_compute_the_same_in_every_program_that_is_installed(directory):
    for module in ("trl", "peft", "onnxscript", "ctranslate2"):
        pytest.importorskip(module)
    rows = list(rows_of(directory, IN_CI))
    assert len(rows) == 2 * len(IN_CI)
    wrong = [row for row in rows if row["state"] != "ok" and (row["consumer"], row["form"]) != ("CTranslate2", "own")]
    assert wrong == []


def test_a_form_that_computes_something_else_fails(model, directory, tmp_path, monkeypatch):
    """The checkpoint is exchanged behind the reference's back: every number and every token must be looked at."""
    export = conformance.exports.export_native

    def other_weights_afterwards(source, target):
        native = export(source, target)
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(-1)
        (source / "model.safetensors").unlink()  # a second name of the native form's file
        model.save_pretrained(source)
        return native

    monkeypatch.setattr(conformance.exports, "export_native", other_weights_afterwards)
    rows = {(row["consumer"], row["form"]): row for row in rows_of(directory, ["Trainer", "generate_batch"])}
    assert [rows["Trainer", form]["state"] for form in ("own", "native")] == ["failed", "ok"]
    assert "difference is above" in rows["Trainer", "own"]["detail"]
    assert [rows["generate_batch", form]["tokens_equal"] for form in ("own", "native")] == [False, True]


def test_rows_of_several_environments_are_collected_in_one_file(directory, run_program, tmp_path):
    out = tmp_path / "conformance.json"
    row = {"consumer": "lighteval", "version": "0.13.0", "form": "own", "state": "ok", "difference": 0.0}
    row |= {"tokens_equal": True, "seconds": 1.0, "detail": ""}
    known = {**row, "consumer": "llama.cpp", "version": "0.3.36", "state": "skipped", "detail": "takes the native form"}
    out.write_text(json.dumps({"model": "model", "rows": [row, known]}))
    command = ["-m", "gpt2repro", "conformance", directory, "--out", out, "--only"]
    done = run_program([*command, "transformers pipeline", "llama.cpp"])
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    found = [(row["consumer"], row["form"], row["state"]) for row in rows]
    pipelines = [("transformers pipeline", form, "ok") for form in ("own", "native")]
    assert found[:3] == [*pipelines, ("lighteval", "own", "ok")]
    assert found[3:] == [("llama.cpp", form, "skipped") for form in ("own", "native")]
    assert rows[3]["detail"] == "takes the native form"  # says more than "not installed"
    assert done.stdout.count("transformers pipeline  ") == 2 and "2 ok, 0 failed, 2 skipped" in done.stdout
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(out.read_text()), "weights": "those of another model"}))
    assert run_program([*command[:-2], other, "--only", "llama.cpp"]).returncode == 0
    assert {row["consumer"] for row in json.loads(other.read_text())["rows"]} == {"llama.cpp"}
    assert "unknown lama" in run_program([*command, "lama"]).stderr
    shutil.copy(out, directory)
    card = card_files(directory, repo="user/tiny")["README.md"].decode()
    assert "| lighteval | 0.13.0 | own | ok | 0.0e+00 | equal |" in card and "llama.cpp" not in card


def test_the_files_and_the_class_are_what_vllm_and_sglang_ask_for(model, directory):
    """Neither is run here. Both load `auto_map`'s AutoModel, put their attention and embeddings in, and call it so.

    Source: vLLM's "Writing custom models" and model_executor/models/transformers/base.py, SGLang's "Transformers
    fallback" and srt/models/transformers.py.
    """
    config = json.loads((directory / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].endswith("GPT2ReproModel")
    base = AutoModel.from_pretrained(directory, trust_remote_code=True, attn_implementation="eager").eval()
    assert type(base).is_backend_compatible() and base.get_decoder() is base
    assert (base.config.hidden_size, base.config.max_position_embeddings) == (32, N_POSITIONS)
    assert (base.config.num_attention_heads, base.config.num_hidden_layers) == (4, 2)
    # The names in the file, as both map them: without the base model's prefix they are the base model's own.
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = {name.removeprefix(f"{base.base_model_prefix}.") for name in file.keys()}  # noqa: SIM118
    assert names == set(base.state_dict())

    seen = []

    def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        seen.append(attention_instances[module.layer_idx])
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return attended.transpose(1, 2), None

    ids = Rows(model, [20]).rows[0][None]  # (1, T): they flatten all requests into one row
    ALL_ATTENTION_FUNCTIONS["of_a_server"] = attention
    try:
        base.config._attn_implementation = "of_a_server"
        embeddings = base.get_input_embeddings()
        base.set_input_embeddings(torch.nn.Sequential(embeddings))
        how = {"position_ids": torch.arange(20)[None], "use_cache": False, "return_dict": False}
        with torch.no_grad():
            hidden = base(input_ids=ids, inputs_embeds=None, attention_instances={0: "first", 1: "second"}, **how)[0]
    finally:
        del ALL_ATTENTION_FUNCTIONS["of_a_server"]
    assert seen == ["first", "second"]
    assert (hidden - model.eval().transformer(ids).last_hidden_state).abs().max() < 1e-5
