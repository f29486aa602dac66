"""Checkpoints to the Hub and back, against a Hub on the loopback that the real clients talk to."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from loopback_hub import TOKEN
from safetensors.torch import load_file
from tiny_run import flags, write_tiny_shards

from gpt2repro.checkpoint.layout import resolve_pointer
from gpt2repro.checkpoint.reader import find_checkpoint, read_state, verify_checkpoint
from gpt2repro.checkpoint.writer import CheckpointWriter
from gpt2repro.commands import export, push
from gpt2repro.options import InputError, run_main
from gpt2repro.publishing import hub as our_hub
from gpt2repro.publishing.hub import Uploader, fetch_checkpoint
from gpt2repro.publishing.model_card import card_files
from gpt2repro.redaction import scrub
from gpt2repro.training.metrics_log import read_metrics

REPO = "user/tiny"
STATE = {
    "step": None,
    "seconds": 7200.0,
    "best": None,
    "identity": {"data": {"kind": "shards", "sha256": "5eed" * 16, "seq_len": 16, "seed": 1}},
    "environment": {
        "command": "train_accelerate.py --data data/tiny --max_steps 4",
        "device": "NVIDIA H200",
        "processes": 8,
        "precision": "bf16",
        "versions": {"torch": "2.13.0"},
    },
}


@pytest.fixture
def hub(loopback_hub, monkeypatch, tmp_path):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    return loopback_hub


@pytest.fixture
def model(tiny_model):
    from configuration_gpt2repro import GPT2ReproConfig
    from modeling_gpt2repro import GPT2ReproForCausalLM

    torch.manual_seed(0)
    return GPT2ReproForCausalLM(GPT2ReproConfig(**tiny_model, bos_token_id=96, eos_token_id=96))


class Run:
    """A run's directory as the trainer leaves it, one checkpoint at a time."""

    def __init__(self, directory: Path, model):
        from gpt2repro.data.tokenization import char_tokenizer

        self.dir, self.model = directory, model
        self.writer = CheckpointWriter(directory / "checkpoints", keep_last=2)
        self.tokenizer = char_tokenizer(["".join(map(chr, range(32, 127))) + "\n"])
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        (directory / "samples").mkdir()
        options = {"data": "data/tiny", "batch_tokens": 4096, "max_steps": 4, "dollars_per_gpu_hour": 2.5}
        (directory / "config.yaml").write_text(yaml.safe_dump(options))
        (directory / "loss.png").write_bytes(b"\x89PNG picture")

    def save(self, step: int, *, best: bool = False, on_written=None, ema: bool = False) -> Path:
        self.model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with (self.dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 3.0, "lr": 1e-3}) + "\n")
            evaluation = {"val_loss": 3.25, "perplexity": 25.79, "bits_per_byte": 1.1, "val_tokens": 512}
            evaluation |= {"val_loss_ema": 3.125, "bits_per_byte_ema": 1.05} if ema else {}
            hellaswag = {"hellaswag_acc_norm_tokens": 0.2955, "hellaswag_acc_norm_tokens_stderr": 0.0046}
            file.write(json.dumps({"step": step, **evaluation, **hellaswag, "hellaswag_examples": 500}) + "\n")
        (self.dir / "samples" / f"step_{step:06d}.md").write_text(
            f"# Samples at step {step}\n\n## 1\n\n    once {step}\n"
        )
        tools = {"model": self.model, "optimizer": self.optimizer, "tokenizer": self.tokenizer}
        if ema:
            tools["averages"] = {name: weight.detach() / 2 for name, weight in self.model.named_parameters()}
            tools["extra_files"] = {"ema/average.json": json.dumps({"kind": "ema", "decay": 0.9, "step": step})}
        self.writer.save(step, **tools, state={**STATE, "step": step}, on_written=on_written)
        if best:
            self.writer.point("best", step)
        self.writer.wait()
        return self.dir / "checkpoints" / f"step_{step:06d}"


@pytest.fixture
def run(tmp_path, model):
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run", model)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(our_hub, "FIRST_WAIT_SECONDS", 0.01)


def uploader_of(run, **options) -> Uploader:
    return Uploader(REPO, run_dir=run.dir, **options)


def test_each_checkpoint_becomes_a_revision_and_main_is_the_best(hub, run):
    uploader = uploader_of(run)
    first = run.save(1, best=True, on_written=uploader.checkpoint)
    weights = (first / "model.safetensors").read_bytes()
    run.save(2, on_written=uploader.checkpoint)
    run.save(3, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    assert {"main", "step-1", "step-2", "step-3"} == set(hub.repo(REPO).branches)
    assert hub.repo(REPO).private
    assert hub.files(REPO, "main")["model.safetensors"] == hub.files(REPO, "step-1")["model.safetensors"] == weights
    assert hub.files(REPO, "step-3")["model.safetensors"] != weights
    for file in (
        "README.md",
        "loss.png",
        "config.json",
        "modeling_gpt2repro.py",
        "tokenizer.json",
        "training/config.yaml",
    ):
        assert file in hub.files(REPO, "main"), file
    assert not (run.dir / "uploads" / "step_000003").exists()


def test_averaged_weights_are_a_revision_of_their_own_with_their_own_numbers(hub, run, tmp_path):
    uploader = uploader_of(run)
    for step in (1, 2):
        uploader.checkpoint(run.save(step, ema=True))
        wait_for(lambda step=step: f"step-{step}" in uploader.published)
    assert uploader.close(timeout=60) == [] and "ema" in uploader.published
    average = run.dir / "checkpoints/step_000002/ema"
    files = hub.files(REPO, "ema")
    assert files["model.safetensors"] == (average / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "modeling_gpt2repro.py", "average.json"} <= files.keys()
    assert not [name for name in {**hub.files(REPO, "main"), **files} if name.startswith(("ema/", "trainer_state"))]
    assert "ema/model.safetensors" in hub.files(REPO, "step-2")  # a resumed run needs it
    assert not [name for name in hub.files(REPO, "step-1") if name.startswith("ema/")]  # as the optimizer's state
    older = (run.dir / "checkpoints/step_000001/ema/model.safetensors").read_bytes()
    stored = hub.repo(REPO).lfs.values()
    assert older not in stored and files["model.safetensors"] in stored
    card = files["README.md"].decode()
    assert "exponential moving average over the steps until then (decay 0.9)" in card and "This is step 2" in card
    assert "| 3.1250 |" in card and "| 3.2500 |" not in card and "HellaSwag" not in card
    main = hub.files(REPO, "main")["README.md"].decode()
    assert "| 3.2500 |" in main and "validation loss of the averaged weights (branch ema) | 3.1250 |" in main

    fetched = fetch_checkpoint(f"hub:{REPO}", tmp_path / "fetched")
    assert load_file(fetched / "ema/model.safetensors").keys() == load_file(average / "model.safetensors").keys()


def test_only_the_newest_revision_keeps_the_optimizer_and_the_hub_forgets_the_others(hub, run):
    uploader = uploader_of(run)
    optimizers = []
    for step in (1, 2, 3):
        path = run.save(step)
        uploader.checkpoint(path)
        wait_for(lambda step=step, uploader=uploader: f"step-{step}" in uploader.published)
        optimizers.append((path / "trainer_state" / "optimizer-00000-of-00001.safetensors").read_bytes())
    assert uploader.close(timeout=60) == []
    holders = [
        branch for branch in hub.repo(REPO).branches if any("trainer_state" in f for f in hub.files(REPO, branch))
    ]
    assert holders == ["step-3"]
    stored = hub.repo(REPO).lfs.values()
    assert optimizers[2] in stored and optimizers[0] not in stored and optimizers[1] not in stored
    assert "model.safetensors" in hub.files(REPO, "step-1")


def test_a_checkpoint_may_be_deleted_while_it_waits(hub, run):
    hub.fail(r"POST .*/commit/step-1", status=503, times=2)
    uploader = uploader_of(run)
    for step in (1, 2, 3, 4):  # keep_last=2: the first ones go
        run.save(step, on_written=uploader.checkpoint)
    assert not (run.dir / "checkpoints" / "step_000001").exists()
    assert uploader.close(timeout=60) == []
    assert uploader.published == ["step-1", "step-2", "step-3", "step-4"]


@pytest.mark.parametrize(
    "fault",
    [
        {"pattern": r"POST .*/commit/", "status": 503},
        {"pattern": r"POST .*/commit/", "status": 429, "times": 2},
        {"pattern": r"POST .*/commit/", "drop_after": 100},
        {"pattern": r"POST .*/branch/", "status": 500},
        {"pattern": r"PUT /lfs/", "drop_after": 1000},
    ],
    ids=str,
)
def test_faults_of_the_network_are_retried_until_everything_is_there(hub, run, fault):
    hub.fail(**fault)
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    assert "model.safetensors" in hub.files(REPO, "step-1") and "README.md" in hub.files(REPO)


def test_a_hub_that_is_down_at_the_start_does_not_stop_training(hub, run, capfd):
    hub.fail("GET /api/whoami-v2", status=503, times=1)
    uploader = uploader_of(run)
    assert "Training starts all the same" in capfd.readouterr().err
    run.save(1, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    assert uploader.published == ["step-1"]


def test_what_did_not_arrive_is_named_kept_and_sent_by_the_next_start(hub, run, capfd):
    hub.fail(r"POST .*/commit/", status=503, times=10_000)
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    missing = uploader.close(timeout=1)
    assert len(missing) == 1 and "step_000001" in missing[0] and "503" in missing[0]
    assert f"gpt2repro push --model {run.dir} --repo {REPO}" in capfd.readouterr().err
    hub.forgive()
    assert uploader_of(run).close(timeout=60) == []
    assert "model.safetensors" in hub.files(REPO, "step-1")


@pytest.mark.parametrize("request_", ["POST .*/preupload/", "PUT /lfs/"])
def test_a_refusal_ends_the_attempts_and_says_what_to_do(hub, run, request_):
    uploader = uploader_of(run)
    hub.fail(request_, status=403, times=10_000)
    run.save(1, on_written=uploader.checkpoint)
    started = time.monotonic()
    missing = uploader.close(timeout=60)
    assert time.monotonic() - started < 10
    assert "the token may not write to user/tiny" in missing[0]


@pytest.mark.parametrize(
    ("token", "repo", "sentence"),
    [
        (None, REPO, "nobody is logged in"),
        ("hf_wrongwrongwrongwrong", REPO, "does not accept the token"),
        ("hf_wröngwröngwröngwröng", REPO, "a character that no token has"),
        (TOKEN, "someone-else/model", "the token may not write to someone-else/model"),
        (TOKEN, "no-slash", "expected USER/NAME"),
    ],
)
def test_a_wrong_login_or_name_is_refused_before_the_first_step(hub, monkeypatch, tmp_path, run, token, repo, sentence):
    hub.adopt_clients(monkeypatch, tmp_path / "home", token=token)
    with pytest.raises(InputError, match=sentence):
        Uploader(repo, run_dir=run.dir)


def test_the_cached_login_will_do(hub, monkeypatch, tmp_path, run):
    hub.adopt_clients(monkeypatch, tmp_path / "home", token=None)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == [] and uploader.published == ["step-1"]


def test_a_step_that_is_saved_anew_while_it_is_sent_is_sent_again(hub, run, monkeypatch):
    """What a rewound run does: the same step, other weights."""
    uploader = uploader_of(run)
    first = run.save(1)
    real = our_hub.publish

    def publish_and_save_anew(*arguments, **options):
        monkeypatch.setattr(our_hub, "publish", real)
        commit = real(*arguments, **options)
        uploader.checkpoint(run.save(1))
        return commit

    monkeypatch.setattr(our_hub, "publish", publish_and_save_anew)
    uploader.checkpoint(first)
    wait_for(lambda: uploader.published == ["step-1", "step-1"])
    assert uploader.close(timeout=60) == []
    assert hub.files(REPO, "step-1")["model.safetensors"] == (first / "model.safetensors").read_bytes()


def test_the_token_never_appears_in_messages(hub, run, capfd):
    hub.fail(r"POST .*/commit/", status=500, headers={"X-Error-Message": f"bad thing with {TOKEN} in it"}, times=10_000)
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    missing = uploader.close(timeout=1)
    output = capfd.readouterr()
    assert TOKEN not in output.out + output.err + "".join(missing)
    assert "bad thing" in missing[0]


def test_uploading_does_not_hold_up_the_training(hub, run):
    hub.fail(r"POST .*/commit/", status=503, times=10_000)
    uploader = uploader_of(run)
    path = run.save(1)
    started = time.perf_counter()
    uploader.checkpoint(path)
    assert time.perf_counter() - started < 0.5
    uploader.close(timeout=0.1)


def test_a_run_is_resumed_from_the_newest_revision_that_has_its_optimizer(hub, run, tmp_path):
    uploader = uploader_of(run)
    for step in (1, 2):
        path = run.save(step, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    fetched = fetch_checkpoint(f"hub:{REPO}", tmp_path / "elsewhere")
    verify_checkpoint(fetched)
    assert find_checkpoint(fetched) == fetched
    assert read_state(fetched)["step"] == 2
    optimizer = "trainer_state/optimizer-00000-of-00001.safetensors"
    assert (fetched / optimizer).read_bytes() == (path / optimizer).read_bytes()
    requests = len(hub.requests)
    assert fetch_checkpoint(f"hub:{REPO}@step-2", tmp_path / "elsewhere") == fetched  # a restart fetches nothing again
    assert len(hub.requests) - requests < 5


def test_a_broken_download_is_mended(hub, run, tmp_path):
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    hub.fail("GET .*/resolve/.*model.safetensors", drop_after=1000)
    verify_checkpoint(fetch_checkpoint(f"hub:{REPO}", tmp_path / "elsewhere"))


def test_resuming_from_a_revision_without_the_optimizer_is_refused_with_advice(hub, run, tmp_path):
    uploader = uploader_of(run)
    for step in (1, 2):
        run.save(step, on_written=uploader.checkpoint)
    uploader.close(timeout=60)
    with pytest.raises(InputError, match=r"no optimizer state.*step-1, step-2.*--init_from user/tiny"):
        fetch_checkpoint(f"hub:{REPO}@step-1", tmp_path / "a")
    with pytest.raises(InputError, match="has no user/none"):
        fetch_checkpoint("hub:user/none", tmp_path / "b")
    with pytest.raises(InputError, match=r"has no user/tiny@step-9|holds no optimizer state"):
        fetch_checkpoint(f"hub:{REPO}@step-9", tmp_path / "c")
    with pytest.raises(InputError, match="hub:user/name"):
        fetch_checkpoint("hub:nonsense", tmp_path / "d")


def test_a_tampered_revision_is_not_resumed_from(hub, run, tmp_path):
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    uploader.close(timeout=60)
    hub.add_file(REPO, "trainer_state/payload.bin", b"pickle", revision="step-1")
    with pytest.raises(InputError):
        find_checkpoint(fetch_checkpoint(f"hub:{REPO}", tmp_path / "elsewhere"))


def test_the_card_is_valid_for_the_librarys_own_parser_and_says_what_the_run_knows(run):
    from huggingface_hub import ModelCard

    path = run.save(3)
    (run.dir / "metrics.jsonl").open("a").write('{"step": 4, "loss": 2.0}\n{"step": 4, "val')  # it goes on meanwhile
    files = card_files(path, repo=REPO, run_dir=run.dir, co2_kg=12.5)
    card = ModelCard(files["README.md"].decode())
    card.validate = None  # the rest of validation is the Hub's own, online
    assert card.data.model_name == "tiny" and card.data.license == "mit" and card.data.library_name == "transformers"
    results = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {
        ("tiny", "loss"): 3.25,
        ("tiny", "perplexity"): 25.79,
        ("tiny", "bits_per_byte"): 1.1,
        ("Rowan/hellaswag", "acc_norm"): 0.2955,
    }
    assert card.data.co2_eq_emissions["emissions"] == 12_500
    text = card.text
    for said in (
        "train_accelerate.py --data data/tiny --max_steps 4",
        "8 x NVIDIA H200, precision bf16",
        "12,288 (3 steps of 4,096)",
        "2.00 hours of training steps, 16.00 device hours",
        "$40.00 at the $2.50 per GPU hour",
        "5eed" * 16,
        "batch_tokens: 4096",
        "![loss, learning rate and tokens per second](loss.png)",
        "once 3",
        'generate("once 3", max_new_tokens=50)',  # no prompts were set: the model's own words fit its text
        'branches named by their step (`revision="step-3"`)',
        "trust_remote_code=True)\n",
        "## Limitations",
        "| HellaSwag | accuracy normalised by tokens, build-nanogpt's protocol | 0.2955 ± 0.0046 |",
    ):
        assert said in text, said
    assert json.loads(files["training/metrics.jsonl"].splitlines()[-1])["step"] == 3


def test_the_card_sets_prompts_apart_and_names_language_base_and_processor(run, monkeypatch):
    from huggingface_hub import ModelCard

    environment = {**STATE["environment"], "device": "cpu", "processor": "AMD EPYC 9R14", "processes": 1}
    monkeypatch.setitem(STATE, "environment", environment)
    options = {"data": "hf://HuggingFaceFW/fineweb-edu@abc", "init_from": "openai-community/gpt2@main"}
    options |= {"sample_prompts": ["", "The import (1.*) statement"], "dollars_per_gpu_hour": None}
    (run.dir / "config.yaml").write_text(yaml.safe_dump(options))
    path = run.save(2)
    blocks = "## 1\n\n    once upon\n\n## 2\n\n    The import (1.*) statement loads\n    {{ 7 * 7 }}\n"
    (run.dir / "samples" / "step_000002.md").write_text(f"# Samples at step 2\n\n{blocks}")
    files = card_files(path, repo=REPO, run_dir=run.dir)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.language, card.data.base_model) == ("en", "openai-community/gpt2")
    for said in (
        "### 2\n\nPrompt:\n\n    The import (1.*) statement\n\nContinuation:\n\n     loads\n    {{ 7 * 7 }}",
        "### 1\n\n    once upon",
        "# tiny\n",
        "1 x AMD EPYC 9R14",
        "build-nanogpt",
        "began from the weights of `openai-community/gpt2@main`",
        "Language: en.",
        'generate("The import (1.*) statement", max_new_tokens=50)',
    ):
        assert said in card.text, said
    assert "cost" not in card.text and "$" not in card.text


def test_results_are_also_files_that_the_library_reads_back(run):
    from huggingface_hub import parse_eval_result_entries

    (run.dir / "config.yaml").write_text(yaml.safe_dump({"data": "hf://HuggingFaceFW/fineweb-edu@abc"}))
    files = card_files(run.save(2), repo=REPO, run_dir=run.dir)
    found = {
        (entry.dataset_id, entry.task_id): entry.value
        for name, content in files.items()
        if re.fullmatch(r"\.eval_results/[\w-]+\.yaml", name)
        for entry in parse_eval_result_entries(yaml.safe_load(content))
    }
    # One protocol a file: a second score of the same benchmark and metric would hide the first.
    assert files.keys() >= {".eval_results/hellaswag_build-nanogpt.yaml", ".eval_results/fineweb-edu.yaml"}
    assert found == {
        ("Rowan/hellaswag", "acc_norm"): 0.2955,
        ("HuggingFaceFW/fineweb-edu", "loss"): 3.25,
        ("HuggingFaceFW/fineweb-edu", "perplexity"): 25.79,
        ("HuggingFaceFW/fineweb-edu", "bits_per_byte"): 1.1,
    }


def test_a_bare_directory_gets_a_card_that_claims_nothing(tmp_path, model):
    from huggingface_hub import ModelCard

    model.save_pretrained(tmp_path / "bare")
    files = card_files(tmp_path / "bare", repo=REPO)
    assert list(files) == ["README.md"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results is None
    assert (
        "2 layers, 4 heads, width 32" in card.text and "## Training" not in card.text and "## Results" not in card.text
    )
    assert 'generate("Once upon a time"' in card.text and "step-" not in card.text


def test_the_push_command_sends_a_whole_run_with_its_native_twin(hub, run, capsys):
    run.save(1, best=True)
    run.save(2)
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO, "--native", "--cost_dollars", "20"]) == 0
    said = capsys.readouterr().out
    assert f"{hub.url}/{REPO} (step-1, step-2, native, main)" in said
    native = hub.files(REPO, "native")
    config = json.loads(native["config.json"])
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert not [name for name in native if name.endswith(".py") or "trainer_state" in name]
    assert native["model.safetensors"] == hub.files(REPO, "main")["model.safetensors"]
    assert 'revision="native"' in native["README.md"].decode() and "$20.00" in native["README.md"].decode()


def test_the_push_command_sends_one_directory_to_a_revision(hub, run, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "bare")
    arguments = ["--model", str(tmp_path / "bare"), "--repo", REPO, "--revision", "imported", "--public"]
    assert run_main(push.main, arguments) == 0
    assert not hub.repo(REPO).private
    assert "model.safetensors" in hub.files(REPO, "imported") and not hub.files(REPO, "main")
    assert run_main(push.main, ["--model", "user/elsewhere", "--repo", REPO]) == 2
    assert "is not here" in capsys.readouterr().err


def test_a_model_whose_native_twin_differs_is_not_published(hub, run, monkeypatch, capsys):
    path = run.save(1)
    (path / "checksums.json").unlink()  # a model's directory like any other, which may be edited
    shutil.rmtree(path / "trainer_state")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.1}))
    real = push.load_for_comparison

    def with_the_right_epsilon(model):
        loaded = real(model)
        for module in loaded.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        return loaded

    monkeypatch.setattr(push, "load_for_comparison", with_the_right_epsilon)
    assert run_main(push.main, ["--model", str(path), "--repo", REPO, "--native"]) == 2
    assert "does not compute what the model computes" in capsys.readouterr().err
    assert set(hub.repo(REPO).branches) == {"main"} and not hub.files(REPO)


def sent_anywhere(hub) -> dict[str, bytes]:
    """Every file of every revision."""
    return {
        f"{branch}: {name}": content
        for branch in hub.repo(REPO).branches
        for name, content in hub.files(REPO, branch).items()
    }


@pytest.mark.parametrize("kind", ["a file", "a named file", "a directory"])
def test_what_a_link_points_to_never_leaves(hub, run, tmp_path, capsys, kind):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text("PRIVATE KEY")
    path = run.save(1)
    if kind == "a named file":
        shutil.move(path / "tokenizer.json", tmp_path / "private" / "tokenizer.json")
        (path / "tokenizer.json").symlink_to(tmp_path / "private" / "tokenizer.json")  # its checksum is right
    else:
        (path / "notes.json").symlink_to(tmp_path / "private" / ("id_rsa" if kind == "a file" else ""))
    for model in (run.dir, path):
        assert run_main(push.main, ["--model", str(model), "--repo", REPO, "--native"]) == 2
        assert "is a link to" in capsys.readouterr().err
    assert not sent_anywhere(hub)


def test_linked_steps_and_queue_entries_are_not_followed_and_hold_up_nothing(hub, run, tmp_path, capfd):
    foreign = Path(shutil.move(run.save(1), tmp_path / "foreign"))
    second = run.save(2)
    (run.dir / "checkpoints" / "step_000001").symlink_to(foreign)
    (run.dir / "uploads").mkdir()
    (run.dir / "uploads" / "step_000003").symlink_to(foreign)
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO]) == 2
    said = capfd.readouterr().err
    assert "step_000001 is not on the Hub: not queued" in said and "step_000003 is not on the Hub" in said
    assert "is a link to" in said
    assert set(hub.repo(REPO).branches) == {"main", "step-2"}
    weights = (second / "model.safetensors").read_bytes()
    assert hub.files(REPO, "main")["model.safetensors"] == hub.files(REPO, "step-2")["model.safetensors"] == weights
    assert "trainer_state/state.json" in hub.files(REPO, "step-2"), "the newest that may be sent keeps the optimizer"
    assert (foreign / "model.safetensors").exists()


def test_a_linked_queue_is_neither_sent_nor_emptied(hub, run, tmp_path, capsys):
    run.save(1)
    foreign = tmp_path / "foreign"
    shutil.copytree(run.save(2), foreign / "step_000009")
    (run.dir / "uploads").symlink_to(foreign)
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO]) == 2
    assert "uploads is a link" in capsys.readouterr().err
    assert not sent_anywhere(hub) and (foreign / "step_000009").is_dir()


def test_strangers_in_a_checkpoint_or_a_models_directory_stay_at_home(hub, run, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "bare")
    path = run.save(1)
    for directory in (path, tmp_path / "bare"):
        for name in ("evil.pkl", "patients.csv", "credentials.json", "extra.py"):
            (directory / name).write_text("of nobody's business")
    (path / "trainer_state" / "notes.json").write_text("{}")
    run.writer.point("best", 1)
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO, "--native"]) == 0
    assert run_main(push.main, ["--model", str(path), "--repo", REPO, "--revision", "one"]) == 0
    assert run_main(push.main, ["--model", str(tmp_path / "bare"), "--repo", REPO, "--revision", "bare"]) == 0
    assert "not sent: credentials.json, evil.pkl, extra.py, patients.csv" in capsys.readouterr().out
    names = sent_anywhere(hub)
    assert not [name for name in names if name.endswith((".pkl", ".csv", "credentials.json", "extra.py", "notes.json"))]
    assert {"bare: modeling_gpt2repro.py", "main: modeling_gpt2repro.py", "one: tokenizer.json"} <= set(names)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_not_published_and_the_others_are(hub, run, capfd):
    first = run.save(1)
    flip_a_bit(run.save(2, best=True) / "model.safetensors")
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO]) == 2
    assert "its sha256 differs" in capfd.readouterr().err
    assert set(hub.repo(REPO).branches) == {"main", "step-1"}
    assert not hub.files(REPO, "main"), "what is best is damaged, and nothing else takes its place"
    assert hub.files(REPO, "step-1")["model.safetensors"] == (first / "model.safetensors").read_bytes()


def test_a_damaged_directory_is_not_published(hub, run, model, tmp_path, capsys):
    path = run.save(1)
    (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[:-1])
    model.save_pretrained(tmp_path / "bare")
    with (tmp_path / "bare" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    for damaged in (path, tmp_path / "bare"):
        assert run_main(push.main, ["--model", str(damaged), "--repo", REPO, "--native"]) == 2
        assert "is not valid JSON" in (said := capsys.readouterr().err) or "not a whole safetensors file" in said
    assert not hub.repos


def test_a_checkpoint_without_its_checksums_is_not_taken_for_a_bare_model(hub, run, capsys):
    path = run.save(1)
    (path / "checksums.json").unlink()
    assert run_main(push.main, ["--model", str(path), "--repo", REPO]) == 2
    assert "checksums.json is missing" in capsys.readouterr().err
    assert not sent_anywhere(hub)


@pytest.mark.parametrize("kind", ["a pipe", "a directory", "a hard link"])
def test_only_model_files_of_a_models_directory_are_sent(hub, model, tmp_path, capsys, kind):
    bare, place = tmp_path / "bare", tmp_path / "bare/vocab.json"
    model.save_pretrained(bare)
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    {
        "a pipe": os.mkfifo, "a directory": os.mkdir, "a hard link": lambda path: os.link(tmp_path / "id_rsa", path),
    }[kind](place)  # fmt: skip
    code = run_main(push.main, ["--model", str(bare), "--repo", REPO, "--native"])
    said = capsys.readouterr().err
    if kind == "a directory":
        assert code == 0 and not [name for name in sent_anywhere(hub) if "vocab.json" in name], said
    else:
        assert code == 2 and not hub.repos, "nothing is sent, and no repository is made"
        assert f"vocab.json is {'no ordinary file' if kind == 'a pipe' else 'not valid JSON'}" in said


def test_revisions_of_an_earlier_run_keep_their_optimizer(hub, run, model, tmp_path):
    """Two runs publish into one repository; each clears up behind itself only."""
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    hub.repo(REPO).tags["v1"] = hub.repo(REPO).branches["step-1"]
    before = hub.files(REPO, "step-1")
    (tmp_path / "later").mkdir()
    later = Run(tmp_path / "later", model)
    for steps in ((10, 11), (12,)):  # the second time in another process
        uploader = uploader_of(later)
        for step in steps:
            uploader.checkpoint(later.save(step))
            wait_for(lambda sent=uploader.published, name=f"step-{step}": name in sent)
        assert uploader.close(timeout=60) == []
    assert hub.files(REPO, "step-1") == hub.files(REPO, "v1") == before
    assert before["trainer_state/optimizer-00000-of-00001.safetensors"] in hub.repo(REPO).lfs.values()
    holders = {branch for branch in hub.repo(REPO).branches if "checksums.json" in hub.files(REPO, branch)}
    assert holders == {"step-1", "step-12"}


def test_another_runs_revision_of_the_same_step_stays_in_the_history(hub, run, model, tmp_path):
    uploader = uploader_of(run)
    run.save(2, on_written=uploader.checkpoint)
    assert uploader.close(timeout=60) == []
    theirs = hub.repo(REPO).branches["step-2"]
    (tmp_path / "later").mkdir()
    later = Run(tmp_path / "later", model)
    uploader = uploader_of(later)
    for step in (2, 4):
        uploader.checkpoint(later.save(step))
        wait_for(lambda name=f"step-{step}": name in uploader.published)
    assert uploader.close(timeout=60) == []
    head = hub.repo(REPO).resolve("step-2")
    assert theirs in [commit.oid for commit in hub.repo(REPO).history(head)]


def test_what_waits_already_is_not_queued_again(hub, run):
    hub.fail(r"POST .*/commit/", status=503, times=10_000)
    uploader = uploader_of(run)
    path = run.save(1, on_written=uploader.checkpoint)
    queued = (run.dir / "uploads/step_000001").stat().st_ino
    uploader.checkpoint(path)
    assert (run.dir / "uploads/step_000001").stat().st_ino == queued
    uploader.close(timeout=0)


def test_a_checkpoint_that_is_damaged_while_the_hub_is_down_is_not_sent(hub, run, monkeypatch):
    monkeypatch.setattr("gpt2repro.publishing.hub.FIRST_WAIT_SECONDS", 600.0)  # the next attempt is that of close()
    hub.fail(r"POST .*/commit/", status=503, times=10_000)
    uploader = uploader_of(run)
    run.save(1, on_written=uploader.checkpoint)
    wait_for(lambda: any("/commit/" in path for _, path, _ in hub.requests))
    flip_a_bit(run.dir / "uploads/step_000001/model.safetensors")
    hub.forgive()
    assert "its sha256 differs" in uploader.close(timeout=60)[0]
    assert "step-1" not in hub.repo(REPO).branches or not hub.files(REPO, "step-1")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b"- a list"),
        ("config.yaml", b"{unclosed"),
        ("samples/step_000001.md", b"\xff\xfe"),
        ("conformance.json", b'{"rows": [1]}'),
        ("data/manifest.json", b'{"source": {"corpus": []}, "splits": {"train": 5}, "tokenizer": {}}'),
    ],
)
def test_a_damaged_file_beside_the_checkpoints_is_not_called_a_fault_of_the_network(hub, run, capsys, name, content):
    run.save(1)
    (run.dir / "data").mkdir()
    (run.dir / "config.yaml").write_text(yaml.safe_dump({"data": str(run.dir / "data")}))
    (run.dir / name).write_bytes(content)
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO, "--timeout_minutes", "0.1"]) == 2
    assert "the model card cannot be made" in capsys.readouterr().err


def test_a_revision_that_somebody_changed_since_is_left_alone(hub, run):
    uploader = uploader_of(run)
    uploader.checkpoint(run.save(1))
    wait_for(lambda: "step-1" in uploader.published)
    hub.add_file(REPO, "trainer_state/mine.json", b"{}", revision="step-1")
    uploader.checkpoint(run.save(2))
    assert uploader.close(timeout=60) == []
    assert {"trainer_state/mine.json", "trainer_state/state.json"} <= hub.files(REPO, "step-1").keys()


def test_the_last_wait_can_be_ended_and_says_what_is_still_waiting(hub, run, capfd):
    hub.fail(r"POST .*/commit/", status=503, times=10_000)
    uploader = uploader_of(run, comparable=push.load_for_comparison)
    run.save(1, on_written=uploader.checkpoint)
    seen = []

    def stop() -> bool:
        seen.append(uploader.waiting())
        return len(seen) == 3

    started = time.monotonic()
    missing = uploader.close(timeout=600, stop=stop)
    assert time.monotonic() - started < 10
    assert seen == 3 * [["step_000001", "branch native"]]
    assert [sentence.split(" is not")[0] for sentence in missing] == ["step_000001", "branch native"]
    hub.forgive()
    assert uploader_of(run).close(timeout=60) == []
    assert "model.safetensors" in hub.files(REPO, "step-1")


SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("old", [False, True], ids=["written by this version", "written before states were scrubbed"])
def test_no_secret_and_no_home_directory_leaves(hub, run, monkeypatch, old):
    monkeypatch.setenv("OTHER_TOKEN", "correct-horse-battery")
    said = f"train.py --data /home/alice/corpus --note {SECRET} correct-horse-battery /root/x /Users/bob/y"
    environment = {**STATE["environment"], "command": said}
    monkeypatch.setitem(STATE, "environment", environment)
    options = {"data": "/home/alice/corpus", "project": SECRET, "api_key": "opensesame"}
    (run.dir / "config.yaml").write_text(yaml.safe_dump(options))
    path = run.save(1)
    (run.dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0, "note": said}) + "\n")
    (run.dir / "samples" / "step_000001.md").write_text(f"# Samples\n\n## 1\n\n    {said}\n")
    if old:
        header = json.loads((path / "trainer_state/state.json").read_text())
        header["state"]["environment"]["command"] = said
        content = json.dumps(header).encode()
        (path / "trainer_state/state.json").write_bytes(content)
        checksums = json.loads((path / "checksums.json").read_text())
        checksums["trainer_state/state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / "checksums.json").write_text(json.dumps(checksums))
    verify_checkpoint(path)
    assert run_main(push.main, ["--model", str(run.dir), "--repo", REPO, "--native"]) == 0
    for name, content in sent_anywhere(hub).items():
        for secret in (SECRET, "correct-horse", "alice", "/Users/bob", "/root/x", "opensesame"):
            assert secret.encode() not in content, (name, secret)
    assert "~/corpus" in hub.files(REPO)["README.md"].decode()
    assert json.loads(hub.files(REPO)["training/metrics.jsonl"])["loss"] == 3.0
    fetched = fetch_checkpoint(f"hub:{REPO}", run.dir / "again")
    verify_checkpoint(fetched)
    assert "correct-horse" in json.dumps(read_state(path)) or not old, "what lies here is left as it was written"
    assert read_state(fetched)["environment"]["command"].startswith("train.py --data ~/corpus --note [hidden]")


def test_a_long_log_of_numbers_is_published_in_less_time_than_its_search_for_secrets_takes(run, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "correct-horse")
    path, log = run.save(9), run.dir / "metrics.jsonl"
    numbers = "".join(json.dumps({"step": 1, "loss": n / 7, "lr": 1e-3, "mfu": None}) + "\n" for n in range(20_000))
    secrets = [
        '{"step": 1, "a": "correct-horse", "a": 1}',
        '{"step": 1, "a": {"correct-horse": 1}}',
        '{"step": 1, "a": 1}',
    ]
    log.write_text(numbers + "\n".join([*secrets, '{"step": 10, "loss": 1}']) + "\n")
    start = time.perf_counter()
    sent = card_files(path, repo=REPO, run_dir=run.dir)["training/metrics.jsonl"].decode()
    middle = time.perf_counter()
    scrub(numbers)
    assert middle - start < time.perf_counter() - middle
    assert sent == numbers + "\n".join(secrets).replace("correct-horse", "[hidden]") + "\n"


def test_links_beside_the_checkpoints_are_not_part_of_the_card(hub, run, tmp_path):
    path = run.save(1)
    for name in ("loss.png", "metrics.jsonl", "config.yaml", "samples/step_000001.md"):
        shutil.move(run.dir / name, tmp_path / "moved")
        (run.dir / name).symlink_to(tmp_path / "moved")
    files = card_files(path, repo=REPO, run_dir=run.dir)
    assert list(files) == ["README.md"] and "once 1" not in files["README.md"].decode()


def test_a_revision_names_a_model_for_every_command(hub, run, tmp_path):
    from gpt2repro.data.tokenization import load_tokenizer
    from gpt2repro.models import load_model

    uploader = uploader_of(run)
    first = run.save(1, best=True)
    weights = (first / "model.safetensors").read_bytes()
    uploader.checkpoint(first)
    wait_for(lambda: "step-1" in uploader.published)
    uploader.checkpoint(run.save(2, best=True))
    assert uploader.close(timeout=60) == []
    loaded, tokenizer = load_model(f"{REPO}@step-1", device="cpu", dtype=torch.float32)
    expected = load_file(first / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(loaded.transformer.wte.weight, expected)
    assert load_tokenizer(f"{REPO}@step-1").get_vocab() == tokenizer.get_vocab() == run.tokenizer.get_vocab()
    assert run_main(export.main, ["--model", f"{REPO}@step-1", "--out", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == weights
    assert run_main(export.main, ["--model", REPO, "--out", str(tmp_path / "newest")]) == 0
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() != weights
    with pytest.raises(InputError, match=r"cannot fetch the model user/tiny@step-9"):
        load_model(f"{REPO}@step-9", device="cpu", dtype=None)


def test_whether_a_login_may_write_is_asked_before(hub, monkeypatch, tmp_path):
    assert our_hub.may_write(REPO) == ("user", None)
    assert our_hub.may_write("bare") == ("", "'bare' is no repository's name: expected USER/NAME")
    assert "belongs to other, but this login is user" in our_hub.may_write("other/model")[1]
    hub.adopt_clients(monkeypatch, tmp_path / "home", token=None)
    name, complaint = our_hub.may_write(REPO)
    assert name == "" and "the Hub does not say who you are" in complaint and "\n" not in complaint


@pytest.mark.parametrize(
    "repo", ["user/a--b", "user/a..b", "user/x.", "user/x-", "user/x.git", "user-/x", "user/" + "x" * 97, "user/a b"]
)
def test_a_name_that_the_hub_would_refuse_is_refused_before_the_work(repo):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with pytest.raises(HFValidationError):
        validate_repo_id(repo)
    assert "is no repository's name" in our_hub.may_write(repo)[1]
    for fine in ("user/gpt2-124M", "a/b", "user/x.y_z", "u.s-er/x.gitter"):
        validate_repo_id(fine)
        assert our_hub.REPO_ID.fullmatch(fine)


def test_a_space_carries_the_demo_and_names_the_model(hub, run, capsys):
    path = run.save(1)
    assert run_main(push.main, ["--model", str(path), "--repo", REPO, "--space"]) == 0
    files = hub.files(REPO, kind="space")
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [REPO])
    assert '["--model", "user/tiny", "--host", "0.0.0.0"' in files["app.py"].decode()
    for name in ("modeling_gpt2repro.py", "gpt2repro/commands/demo.py", "gpt2repro/options.py", "requirements.txt"):
        assert name in files
    required = files["requirements.txt"].decode().split()
    assert "torch>=2.11,<2.14" in required and not [line for line in required if re.match("wandb|datasets", line)]
    assert hub.repo(REPO, "space").settings["sdk"] == "gradio" and hub.repo(REPO, "space").private
    assert "secret HF_TOKEN" in capsys.readouterr().out


def test_strangers_in_the_package_stay_at_home(tmp_path, monkeypatch):
    package = tmp_path / "gpt2repro"
    shutil.copytree(push.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(push, "PACKAGE", package)
    whole = push.space_files(REPO).keys()
    for name in (".env", "presets/.netrc", "commands/notes.txt", "publishing/token"):
        (package / name).write_text("of nobody's business")
    assert push.space_files(REPO).keys() == whole
    assert {"gpt2repro/presets/124M.yaml", "gpt2repro/publishing/card.md"} < whole
    assert {"gpt2repro/generation/demo_page.css", "gpt2repro/generation/demo_page.js"} < whole


@pytest.mark.slow
def test_the_spaces_files_alone_serve_the_page_with_the_model_from_the_hub(hub, run, free_port, tmp_path):
    path = run.save(1)
    assert run_main(push.main, ["--model", str(path), "--repo", REPO, "--space"]) == 0
    for name, content in hub.files(REPO, kind="space").items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    app = tmp_path / "space" / "app.py"
    app.write_text(app.read_text().replace("7860", str(free_port)))
    environment = hub.environment(tmp_path / "empty") | {"GRADIO_ANALYTICS_ENABLED": "False"}
    environment.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=app.parent, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "the page is at" not in (tmp_path / "log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/", timeout=30) as answer:
            assert answer.status == 200 and b"gradio" in answer.read()
    finally:
        server.kill()
        server.wait()


def test_the_circle_closes_train_push_load_elsewhere_and_resume(hub, tmp_path):
    """A run that publishes itself; its text from an empty cache; going on from the Hub equals going on locally."""
    import train_accelerate

    data = write_tiny_shards(tmp_path / "data")
    train = partial(run_main, train_accelerate.main)
    assert train(flags(data, tmp_path / "run", max_steps=8, push_to_hub=REPO, sample_tokens=4)) == 0
    assert {"main", "native", "step-4", "step-8"} == set(hub.repo(REPO).branches)
    assert "val_loss" in hub.files(REPO)["training/metrics.jsonl"].decode()

    prompt = "the fox"
    code = f"""
from transformers import pipeline
for revision, trust in (("main", True), ("native", False), ("step-4", True)):
    write = pipeline("text-generation", model="{REPO}", revision=revision, trust_remote_code=trust)
    print(type(write.model).__name__, write({prompt!r}, max_new_tokens=9, do_sample=False)[0]["generated_text"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path / "empty"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    best = greedy_text(resolve_pointer(checkpoints, "best"), prompt, 9)
    fourth = greedy_text(checkpoints / "step_000004", prompt, 9)
    names = ["GPT2ReproForCausalLM", "GPT2LMHeadModel", "GPT2ReproForCausalLM"]
    assert done.stdout.splitlines() == [
        f"{name} {text}" for name, text in zip(names, [best, best, fourth], strict=True)
    ]

    resume = {"max_steps": 16, "resume": f"hub:{REPO}"}
    assert train(flags(data, tmp_path / "elsewhere", **resume)) == 0
    assert train(flags(data, tmp_path / "run", max_steps=16)) == 0
    there, here = (read_metrics(tmp_path / name)[0] for name in ("elsewhere", "run"))
    losses = [record["loss"] for record in here if record["step"] > 8]
    assert len(losses) == 8 and [record["loss"] for record in there if record["step"] > 8] == losses


def greedy_text(directory: Path, prompt: str, tokens: int) -> str:
    from gpt2repro.data.tokenization import load_tokenizer
    from modeling_gpt2repro import GPT2ReproForCausalLM

    model, tokenizer = GPT2ReproForCausalLM.from_pretrained(directory), load_tokenizer(directory)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
