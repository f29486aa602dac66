"""Documents that do not see each other, against transformers' GPT-2 that reads one document at a time."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
import torch.nn.functional as F
import yaml
from test_reduction import SPEED, run
from transformers import GPT2Config, GPT2LMHeadModel

import train_accelerate
from gpt2repro.checkpoint.reader import find_checkpoint, read_state
from gpt2repro.commands import prepare_text
from gpt2repro.data.documents import document_positions
from gpt2repro.data.sources import open_data
from gpt2repro.data.tokenization import load_tokenizer
from gpt2repro.models import ARCHITECTURE, build_model
from gpt2repro.options import parse_options, run_main
from gpt2repro.publishing.model_card import card_files
from gpt2repro.training.plotting import draw_runs

MASK = {"documents": "mask", "n_layer": 2, "micro_batch_size": 2, "resid_pdrop": 0.0, "sample_tokens": 4}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Two data sets of many short documents with some long ones between them, and their text; one tokenizer."""
    directory, chance = tmp_path_factory.mktemp("corpora"), random.Random(0)
    for name, count in (("web", 500), ("code", 200)):
        texts = (" ".join(chance.choices(tiny_run.TEXT.split(), k=chance.choice((1, 2, 3, 40)))) for _ in range(count))
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        flags = ["--input", str(directory / f"{name}.jsonl"), "--out", str(directory / name)]
        tokenizer = "char" if name == "web" else str(directory / "web")
        assert run_main(prepare_text.main, [*flags, "--tokenizer", tokenizer]) == 0
    sources = {name: {"data": str(directory / name)} for name in ("web", "code")}
    phases = [{"from_tokens": 0, "weights": {"web": 0.5, "code": 0.5}}]
    (directory / "recipe.yaml").write_text(yaml.safe_dump({"sources": sources, "phases": phases}))
    return directory


@pytest.fixture
def train(corpora, tmp_path, fresh_accelerate):
    """train(option=…) -> exit code of a run in tmp_path/run."""

    def train(data: str = "web", **options) -> int:
        torch._dynamo.reset()
        return run_main(train_accelerate.main, flags(corpora, tmp_path, data, **options))

    return train


def flags(corpora: Path, directory: Path, data: str = "web", **options) -> list[str]:
    if data == "stream":
        data = f"stream:{corpora / 'web.jsonl'}"
        options |= {"tokenizer": corpora / "web/tokenizer", "cache_dir": directory / "cache", "stream_lanes": 8}
    else:
        data = str(corpora / data)
    return tiny_run.flags(data, directory / "run", **{**MASK, **options})


def records(run_dir: Path, name: str) -> list[dict]:
    return [record for line in (run_dir / "metrics.jsonl").open() if name in (record := json.loads(line))]


def test_positions_start_again_at_every_end_of_text():
    ids = torch.tensor([[5, 1, 9, 9, 2, 3, 9], [9, 1, 2, 3, 4, 5, 6], [1, 9, 2, 3, 4, 5, 6]])
    positions = [[0, 1, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5]]
    assert document_positions(ids, 9).tolist() == positions
    assert document_positions(ids, None) is None


# --- one document at a time: the reference


def losses_alone(reference, x: torch.Tensor, y: torch.Tensor, eot_id: int) -> list[torch.Tensor]:
    """The loss of each target of (B, T), from a forward pass per document; a document begins with its `eot_id`."""
    losses = []
    for ids, targets in zip(x, y, strict=True):
        borders = sorted({0, *(ids == eot_id).nonzero().flatten().tolist(), len(ids)})
        for start, stop in itertools.pairwise(borders):
            logits = reference(ids[None, start:stop]).logits[0]
            losses += F.cross_entropy(logits, targets[start:stop], reduction="none")
    return losses


def first_step(arguments: list[str]):
    """What the run of these options begins with: transformers' twin of its model in fp64, its data, its first batch."""
    config = parse_options(train_accelerate.TrainConfig, arguments, prog="train")
    source = open_data(config, sequences=8)
    ours = build_model(config, source.vocab_size, source.tokenizer)
    sizes = {name: getattr(ours.config, name) for name in ARCHITECTURE}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    reference = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=None, eos_token_id=None)).double()
    reference.load_state_dict(ours.double().state_dict())
    batches = source.batches(source.initial_state(), rank=0, world=1, sequences=8)
    x, y, _ = next(batches)
    batches.close()
    return reference, source, x, y


def mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(losses).mean()


def windows_of(split, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(split.read(0, tokens + 1).astype("int64"))
    return ids[:-1].view(-1, 16), ids[1:].view(-1, 16)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("web", {}),
        ("stream", {}),
        ("recipe.yaml", {}),
        ("web", {"reduction": "fixed"}),
        ("web", {"attn_implementation": "eager", "gradient_checkpointing": [], "loss_chunk_tokens": 24}),
        pytest.param("web", {"compile": "block"}, marks=pytest.mark.slow),
        pytest.param("web", {"compile": "model"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_has_the_loss_gradient_and_validation_of_one_document_at_a_time(corpora, tmp_path, train, data, options):
    options |= {"precision": "fp64", "max_steps": 1}
    reference, source, x, y = first_step(flags(corpora, tmp_path, data, **options))
    assert train(data, **options) == 0
    eot_id = source.tokenizer.eos_token_id
    assert (x == eot_id).any(1).sum() >= 3 and (x == eot_id)[:, 1:].any()

    alone = mean(losses_alone(reference, x, y, eot_id))
    alone.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
    (step,) = records(tmp_path / "run", "loss")
    assert step["loss"] == pytest.approx(alone.item(), abs=1e-10)
    assert step["grad_norm"] == pytest.approx(norm.item(), abs=1e-10)
    crossed = F.cross_entropy(reference(x).logits.flatten(0, 1), y.flatten())
    assert abs(crossed.item() - alone.item()) > 1e-6  # so a run that does not mask would be seen

    first = records(tmp_path / "run", "val_loss")[0]  # of the untrained model
    splits = {f"/{name}": part.validation for name, part in source.sources.items()} or {"": source.validation}
    for name, split in splits.items():
        x, y = windows_of(split, 256)
        with torch.no_grad():
            exact = mean(losses_alone(reference, x, y, eot_id)).item()
            crossed = F.cross_entropy(reference(x).logits.flatten(0, 1), y.flatten()).item()
        assert first[f"val_loss_masked{name}"] == pytest.approx(exact, abs=1e-10)
        assert first[f"val_loss{name}"] == pytest.approx(crossed, abs=1e-10) != exact


# --- the run


def test_a_run_shows_both_validation_losses_and_crosses_documents_unless_asked(corpora, train, tmp_path, capsys):
    assert train(ema_decay=0.9, max_steps=4, eval_steps=4) == 0
    last = records(tmp_path / "run", "val_loss")[-1]
    assert {name for name in last if name.startswith("val_loss")} == {
        "val_loss", "val_loss_masked", "val_loss_ema", "val_loss_masked_ema"
    }  # fmt: skip
    best = read_state(find_checkpoint(tmp_path / "run"))["best"]
    assert best == {"step": 4, "val_loss": last["val_loss"]}
    assert f"documents apart {last['val_loss_masked']:.4f}" in capsys.readouterr().err
    card = card_files(find_checkpoint(tmp_path / "run"), repo="user/tiny", run_dir=tmp_path / "run")
    shown = f"documents that do not see each other (nats per token) | {round(last['val_loss_masked'], 5):.4f} |"
    assert shown in card["README.md"].decode() and "\ndocuments: mask\n" in card["README.md"].decode()
    assert draw_runs([tmp_path / "run"], tmp_path / "loss.png").is_file()
    assert parse_options(train_accelerate.TrainConfig, ["--data", "x"], prog="train").documents == "cross"


@pytest.mark.parametrize(("before", "after"), [("mask", "cross"), ("cross", "mask")])
def test_a_run_goes_on_as_it_began_or_not_at_all(train, tmp_path, capsys, before, after):
    assert train(documents=before, max_steps=4) == 0
    assert ("documents" in read_state(find_checkpoint(tmp_path / "run"))["identity"]) == (before == "mask")
    assert ("val_loss_masked" in records(tmp_path / "run", "val_loss")[0]) == (before == "mask")
    assert train(documents=after, max_steps=8) == 2
    assert f"documents was {before} and is now {after}. Set them back" in capsys.readouterr().err
    assert train(documents=before, max_steps=8) == 0


def test_a_resumed_run_equals_the_uninterrupted_one(train, tmp_path):
    assert train(max_steps=8, resid_pdrop=0.1) == 0
    whole = [{k: v for k, v in record.items() if k not in SPEED} for record in records(tmp_path / "run", "step")]
    shutil.rmtree(tmp_path / "run/checkpoints/step_000008")
    assert train(max_steps=8, resid_pdrop=0.1) == 0
    assert [
        {k: v for k, v in record.items() if k not in SPEED} for record in records(tmp_path / "run", "step")
    ] == whole


def test_two_processes_give_the_bits_of_one(corpora, tmp_path, run_program):
    """Under `--reduction fixed`, with dropout; the log has both validation losses."""
    options = {**MASK, "resid_pdrop": 0.1, "micro_batch_size": 1}
    one, two = (run(corpora / "web", tmp_path / str(n), n, run_program, **options) for n in (1, 2))
    assert one == two
    assert "val_loss_masked" in one["log"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "block"])
def test_no_batch_compiles_again(train, how):
    """Batches with and without a border, evaluation between them: as many graphs after 12 steps as after one."""
    from torch._dynamo.utils import counters

    made = []
    for steps in (1, 12):  # the second run goes on from the first, in graphs of its own
        counters.clear()
        assert train(max_steps=steps, compile=how, micro_batch_size=1) == 0
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] > 0


def test_what_cannot_tell_documents_apart_is_refused(train, corpora, tmp_path, capsys):
    assert train(attn_implementation="flash_attention_2") == 2
    assert "documents=mask and flash_attention_2" in capsys.readouterr().err
    (tmp_path / "train.bin").write_bytes(bytes(2000))  # nanoGPT's, and a tokenizer that ends no document
    tokenizer = load_tokenizer(corpora / "web/tokenizer")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    assert train(str(tmp_path), tokenizer=tmp_path / "endless") == 2
    assert "documents=mask needs a tokenizer with an end-of-text token" in capsys.readouterr().err
