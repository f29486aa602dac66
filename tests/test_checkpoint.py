"""Checkpoints: whole or not there, verified, pruned, and the same to any number of processes."""

import json
import math
import shutil
import threading
import time
from pathlib import Path

import pytest
import sharded_worker
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2repro.checkpoint import writer as writing
from gpt2repro.checkpoint.layout import POINTERS, list_steps, resolve_pointer
from gpt2repro.checkpoint.reader import find_checkpoint, read_state, resolve_model, verify_checkpoint
from gpt2repro.checkpoint.restore import restore
from gpt2repro.checkpoint.tensors import named_weights
from gpt2repro.checkpoint.writer import CheckpointWriter, SaveError
from gpt2repro.data.tokenization import char_tokenizer, load_tokenizer
from gpt2repro.options import InputError


@pytest.fixture
def trained(tiny_model):
    """A model and optimizer two steps into training."""
    model, optimizer = sharded_worker.build(tiny_model, "adamw")
    for seed in (0, 1):
        sharded_worker.train_step(model, optimizer, seed)
    return model, optimizer


def save(directory, trained, *steps, state=None, **settings) -> CheckpointWriter:
    writer = CheckpointWriter(directory, **settings)
    for step in steps:
        writer.save(step, model=trained[0], optimizer=trained[1], state=state or {"step": step})
    writer.wait()
    return writer


def names(directory) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


# --- what a checkpoint is


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(tmp_path, tiny_model, optimizer_name):
    model, optimizer = sharded_worker.build(tiny_model, optimizer_name)
    for seed in range(3):
        sharded_worker.train_step(model, optimizer, seed)
    save(tmp_path, (model, optimizer), 3, state={"best": {"val_loss": math.inf}, "list": [1, 2]})

    other, other_optimizer = sharded_worker.build(tiny_model, optimizer_name, seed=9)
    path = find_checkpoint(tmp_path)
    restore(path, other, other_optimizer)
    assert read_state(path) == {"best": {"val_loss": math.inf}, "list": [1, 2]}
    for seed in range(3, 6):
        assert sharded_worker.train_step(model, optimizer, seed) == sharded_worker.train_step(
            other, other_optimizer, seed
        )
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        for kind, value in optimizer.state[parameter].items():
            assert torch.equal(value, other_optimizer.state[twin][kind]), kind


def test_a_checkpoint_loads_with_from_pretrained_and_has_the_model_once(tmp_path, trained):
    writer = CheckpointWriter(tmp_path)
    char_tokenizer(["to be or not"]).save_pretrained(tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data")  # as a run reads it, beside its shards
    writer.save(
        7, model=trained[0], optimizer=trained[1], tokenizer=tokenizer, state={}, extra_files={"README.md": "hi"}
    )
    writer.close()
    path = tmp_path / "step_000007"
    assert {"README.md", "configuration_gpt2repro.py", "modeling_gpt2repro.py", "generation_config.json"} <= set(
        names(path)
    )
    assert {"tokenizer.json", "checksums.json", "trainer_state"} <= set(names(path))
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    context = trained[0].config.n_positions
    assert AutoTokenizer.from_pretrained(path, trust_remote_code=False).model_max_length == context
    assert not {"is_local", "local_files_only"} & json.loads((path / "tokenizer_config.json").read_text()).keys()
    loaded = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    for name, weight in trained[0].state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_everything_in_a_checkpoint_is_safetensors_json_or_text(tmp_path, trained):
    save(tmp_path, trained, 1)
    suffixes = {path.suffix for path in (tmp_path / "step_000001").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".py"}


def test_a_native_gpt2_is_saved_and_restored_like_our_own(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    save(tmp_path, (model, optimizer), 1)
    assert "modeling_gpt2repro.py" not in names(tmp_path / "step_000001")
    twin = GPT2LMHeadModel(model.config)
    restore(find_checkpoint(tmp_path), twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_compiled_model_saves_the_names_of_a_plain_one(tmp_path, trained):
    model, optimizer = trained
    plain = set(named_weights(model))
    model.transformer.h[0] = torch.compile(model.transformer.h[0])
    save(tmp_path, (torch.compile(model), optimizer), 1)
    assert set(load_file(tmp_path / "step_000001/model.safetensors")) == plain


# --- asynchronous


def test_a_save_returns_before_the_files_are_written_and_the_next_one_waits(tmp_path, trained, monkeypatch):
    go_on, running, overlaps = threading.Event(), [], []

    def slow(*args, **kwargs):
        overlaps.append(len(running))
        running.append(1)
        go_on.wait(20)
        running.pop()
        save_file(*args, **kwargs)

    monkeypatch.setattr(writing, "save_file", slow)
    writer = CheckpointWriter(tmp_path)
    began = time.perf_counter()
    writer.save(1, model=trained[0], optimizer=trained[1], state={})
    assert time.perf_counter() - began < 5 and find_checkpoint(tmp_path) is None
    threading.Timer(0.5, go_on.set).start()
    began = time.perf_counter()
    writer.save(2, model=trained[0], optimizer=trained[1], state={})
    assert time.perf_counter() - began > 0.2, "it has to wait for the save before"
    writer.close()
    assert max(overlaps) == 0, "two saves at once"
    assert [step for step, _ in list_steps(tmp_path)] == [1, 2]


def test_what_is_saved_is_the_moment_of_the_call_not_of_the_writing(tmp_path, trained, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(writing, "save_file", lambda *a, **k: (go_on.wait(20), save_file(*a, **k)))
    before = {name: weight.clone() for name, weight in named_weights(trained[0]).items()}
    state = {"list": [1]}
    writer = CheckpointWriter(tmp_path)
    writer.save(1, model=trained[0], optimizer=trained[1], state=state)
    sharded_worker.train_step(*trained, seed=5)
    state["list"].append(2)
    go_on.set()
    writer.close()
    saved = load_file(tmp_path / "step_000001/model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert read_state(tmp_path / "step_000001") == {"list": [1]}


def test_on_written_sees_the_whole_checkpoint(tmp_path, trained):
    seen = []
    writer = CheckpointWriter(tmp_path, keep_last=1)
    for step in (1, 2):
        writer.save(
            step,
            model=trained[0],
            optimizer=trained[1],
            state={},
            on_written=lambda path: seen.append((path.name, verify_checkpoint(path))),
        )
    writer.close()
    assert seen == [("step_000001", None), ("step_000002", None)]


def test_what_follows_a_save_may_fail_without_ending_the_run(tmp_path, trained, capsys):
    writer = CheckpointWriter(tmp_path)
    failing = {"state": {}, "on_written": lambda path: sharded_worker.full_disk()}
    writer.save(1, model=trained[0], optimizer=trained[1], **failing)
    writer.close()
    verify_checkpoint(tmp_path / "step_000001")
    assert "after saving" in capsys.readouterr().err


def test_a_full_disk_leaves_earlier_checkpoints_whole_and_ends_with_a_sentence(tmp_path, trained, monkeypatch):
    writer = save(tmp_path, trained, 1)
    monkeypatch.setattr(writing, "save_file", sharded_worker.full_disk)
    with pytest.raises(SaveError, match=r"step 2 could not be written .*No space left.*are whole; make room.*MB"):
        writer.save(2, model=trained[0], optimizer=trained[1], state={})
        writer.wait()
    assert names(tmp_path) == ["latest", "step_000001"]
    monkeypatch.undo()
    writer.save(3, model=trained[0], optimizer=trained[1], state={})  # room was made: it goes on
    writer.close()
    assert find_checkpoint(tmp_path).name == "step_000003"


def test_a_really_full_filesystem_does_the_same(small_disk, trained):
    small = small_disk("700k")
    writer = save(small, trained, 1)
    with pytest.raises(SaveError, match=r"(?i)no space left"):
        for step in (2, 3, 4):
            writer.save(step, model=trained[0], optimizer=trained[1], state={})
            writer.wait()
    verify_checkpoint(small / "step_000001")
    assert not list(small.glob(".*tmp*"))


# --- pointers and pruning


def test_keep_last_best_final_and_milestones_stay_and_the_rest_goes(tmp_path, trained):
    writer = CheckpointWriter(tmp_path, keep_last=2, milestone_steps=4)
    for step in range(1, 10):
        writer.save(step, model=trained[0], optimizer=trained[1], state={})
        if step == 3:
            writer.point("best", 3)
    writer.point("final", 9)
    writer.close()
    assert [step for step, _ in list_steps(tmp_path)] == [3, 4, 8, 9]
    assert {name: resolve_pointer(tmp_path, name).name for name in POINTERS} == {
        "latest": "step_000009",
        "best": "step_000003",
        "final": "step_000009",
    }


@pytest.mark.parametrize("links", [True, False])
def test_pointers_work_with_and_without_symbolic_links(tmp_path, trained, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "symlink_to", lambda *a, **k: (_ for _ in ()).throw(OSError("no privilege")))
    writer = save(tmp_path / "checkpoints", trained, 1, 2)
    writer.point("best", 1)
    assert (tmp_path / "checkpoints/best").is_symlink() == links
    assert resolve_model(str(tmp_path)).endswith("step_000001")
    assert resolve_model(str(tmp_path / "checkpoints/latest")).endswith(("step_000002", "latest"))
    assert find_checkpoint(tmp_path / "checkpoints/best").name in ("step_000001", "best")
    writer.point("best", 2)
    assert resolve_model(str(tmp_path)).endswith("step_000002")


def test_the_checkpoints_of_an_abandoned_way_are_not_continued_and_go_at_the_next_pruning(tmp_path, trained):
    writer = save(tmp_path, trained, 1, 2, 3, keep_last=3)
    writer.point("best", 3)
    writer.discard_after(1)
    assert find_checkpoint(tmp_path).name == "step_000001"
    assert resolve_pointer(tmp_path, "latest").name == "step_000001"
    assert resolve_pointer(tmp_path, "best") is None
    writer.save(2, model=trained[0], optimizer=trained[1], state={"way": "new"})
    writer.close()
    assert names(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_the_newest_checkpoint_before_a_step_is_found(tmp_path, trained):
    save(tmp_path, trained, 10, 20, 30)
    assert find_checkpoint(tmp_path, at_most=29).name == "step_000020"
    assert find_checkpoint(tmp_path, at_most=30).name == "step_000030"
    assert find_checkpoint(tmp_path, at_most=9) is None


def test_what_a_killed_save_left_behind_is_removed_at_the_next_start(tmp_path, trained):
    save(tmp_path, trained, 1)
    left_over = tmp_path / ".step_000002.tmp-0123456789abcdef"
    shutil.copytree(tmp_path / "step_000001", left_over)
    assert find_checkpoint(tmp_path).name == "step_000001"
    CheckpointWriter(tmp_path)
    assert not left_over.exists()


# --- damage


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "trainer_state/state.json",
        "trainer_state/optimizer-00000-of-00001.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_taken(tmp_path, trained, capsys, file, damage):
    save(tmp_path, trained, 1, 2)
    victim = tmp_path / "step_000002" / file
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flipped bit": lambda: victim.write_bytes(content),
        "cut short": lambda: victim.write_bytes(content[:-1]),
        "missing": victim.unlink,
    }[damage]()
    assert find_checkpoint(tmp_path).name == "step_000001"
    warning = capsys.readouterr().err
    assert "step_000002" in warning and file in warning and len(warning.splitlines()) == 1
    with pytest.raises(InputError, match="step_000002"):
        find_checkpoint(tmp_path / "step_000002")
    (tmp_path / "step_000001" / file).unlink()
    with pytest.raises(InputError, match="none of the 2 checkpoints"):
        find_checkpoint(tmp_path)


def hostile(path: Path, name: str, content: bytes, listed: bool = True) -> None:
    """Put a file into a checkpoint and make the checksums agree: an attacker can do that too."""
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    if listed:
        import hashlib

        checksums = json.loads((path / "checksums.json").read_text())
        checksums[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / "checksums.json").write_text(json.dumps(checksums))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\windows", "..\\x", "nul\0", ""])
def test_a_path_that_leaves_the_checkpoint_is_refused(tmp_path, trained, name):
    save(tmp_path, trained, 1)
    path = tmp_path / "step_000001"
    checksums = json.loads((path / "checksums.json").read_text())
    checksums[name] = {"bytes": 1, "sha256": "0"}
    (path / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(InputError, match="not a plain path"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "trainer_state/optimizer.pt", "x.PKL", "trainer_state/a.ckpt"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_pickle_in_a_checkpoint_is_refused_and_never_run(tmp_path, trained, name, listed):
    save(tmp_path, trained, 1)
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    hostile(tmp_path / "step_000001", name, bomb, listed)
    with pytest.raises(InputError, match="pickle"):
        verify_checkpoint(tmp_path / "step_000001")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (200 << 20).to_bytes(8, "little") + b"{" * 100,
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}',
        b"",
        b"\x80\x04K\x01.",
    ],
)
def test_a_safetensors_file_with_an_impossible_header_is_refused(tmp_path, trained, content):
    save(tmp_path, trained, 1)
    hostile(tmp_path / "step_000001", "model.safetensors", content)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        verify_checkpoint(tmp_path / "step_000001")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/hosts", "pytorch_model.bin", "a/b.safetensors"])
def test_an_index_of_shards_may_only_name_files_beside_it(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(InputError, match="plain name"):
        resolve_model(str(tmp_path))


def test_wrong_shapes_and_names_are_refused_by_tensor(tmp_path, trained, tiny_model):
    save(tmp_path, trained, 1)
    path = tmp_path / "step_000001"
    other = sharded_worker.build({**tiny_model, "n_embd": 16}, "adamw")
    with pytest.raises(InputError, match=r"h\.0\.\w+.*shape|wte.*shape"):
        restore(path, *other)
    with pytest.raises(InputError, match=r"lacks transformer\.h\.2"):
        restore(path, *sharded_worker.build({**tiny_model, "n_layer": 3}, "adamw"))
    with pytest.raises(InputError, match=r"has transformer\.h\.1"):
        restore(path, *sharded_worker.build({**tiny_model, "n_layer": 1}, "adamw"))
    with pytest.raises(InputError, match="state of AdamW, this run uses MuonWithAdamW"):
        restore(path, *sharded_worker.build(tiny_model, "muon"))

    optimizer_file = path / "trainer_state/optimizer-00000-of-00001.safetensors"
    tensors = load_file(optimizer_file)
    rows = {key: [0, value.shape[0]] for key, value in tensors.items() if value.dim()}
    tensors["transformer.wpe.weight/exp_avg"] = tensors["transformer.wpe.weight/exp_avg"][:, :3].clone()
    save_file(tensors, optimizer_file, metadata={"rows": json.dumps(rows)})
    with pytest.raises(InputError, match=r"exp_avg of transformer\.wpe\.weight has shape"):
        restore(path, *sharded_worker.build(tiny_model, "adamw"))


@pytest.mark.parametrize("header", [{"version": 99}, {"format": "other"}, {"state": []}, {"state": None}])
def test_a_state_of_another_format_is_refused(tmp_path, trained, header):
    save(tmp_path, trained, 1)
    path = tmp_path / "step_000001/trainer_state/state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **header}))
    with pytest.raises(InputError, match=r"state\.json|format version"):
        read_state(tmp_path / "step_000001")


# --- which model a name means


def test_a_run_means_its_best_checkpoint_or_else_its_latest(tmp_path, trained):
    writer = save(tmp_path / "checkpoints", trained, 1, 2)
    assert resolve_model(str(tmp_path)).endswith("step_000002")
    writer.point("best", 1)
    assert resolve_model(str(tmp_path)).endswith("step_000001")
    (tmp_path / "checkpoints/best").unlink()
    (tmp_path / "checkpoints/latest").unlink()
    assert resolve_model(str(tmp_path)).endswith("step_000002"), "pointers may be lost"
    assert resolve_model(str(tmp_path / "checkpoints/step_000001")).endswith("step_000001")


def test_a_hub_id_stays_as_it_is_and_a_mistyped_path_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert resolve_model("openai-community/gpt2") == "openai-community/gpt2"
    for wrong in ("runs/missing", "./x", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(InputError, match="there is no model"):
            resolve_model(wrong)


def test_another_architecture_or_a_pickled_model_is_refused_by_name(tmp_path):
    for config, extra, message in [
        ({"model_type": "llama"}, "model.safetensors", "'llama'"),
        ({}, "model.safetensors", "None"),
        ({"model_type": "gpt2"}, "pytorch_model.bin", "unpickling"),
        ({"model_type": "gpt2"}, "README.md", "no model.safetensors"),
    ]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"a": torch.zeros(1)}, folder / extra)
        with pytest.raises(InputError, match=message):
            resolve_model(str(folder))
    with pytest.raises(InputError, match="neither a model"):
        resolve_model(str(tmp_path))


# --- sharded


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Reports of both ranks, the folder, and the one-process model of each optimizer after the same steps."""
    tiny = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    folder = tmp_path_factory.mktemp("sharded")
    plain = {}
    for name in ("adamw", "muon"):
        model, optimizer = sharded_worker.build(tiny, name)
        for seed in (0, 1):
            sharded_worker.train_step(model, optimizer, seed)
        save(folder / name / "plain", (model, optimizer), 2)
        losses = [sharded_worker.train_step(model, optimizer, seed) for seed in (2, 3)]
        plain[name] = losses
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [
        context.Process(target=sharded_worker.work, args=(rank, 2, folder, tiny, out), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    reports: dict[int, dict] = {}
    while len(reports) < 2 and time.monotonic() < deadline:
        if not out.empty():
            rank, report = out.get()
            reports[rank] = report
        elif any(process.exitcode not in (None, 0) for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        process.join(10)
    assert len(reports) == 2, f"exit codes {[process.exitcode for process in processes]}"
    return reports, folder, plain, tiny


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_sharded_model_continues_a_one_process_checkpoint(two_processes, name):
    reports, _, plain, _ = two_processes
    for report in reports.values():
        assert report[f"{name} loss"] == pytest.approx(plain[name][0], abs=1e-5)
        assert report[f"{name} next loss"] == pytest.approx(plain[name][1], abs=1e-4)
        assert report[f"{name} next loss, resumed"] == report[f"{name} next loss"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_process_reads_the_pieces_of_two_bit_by_bit(two_processes, name):
    _, folder, plain, tiny = two_processes
    sharded = find_checkpoint(folder / name / "sharded/step_000002")
    pieces = sorted(path.name for path in (sharded / "trainer_state").glob("*.safetensors"))
    assert pieces == ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    ours, theirs = sharded_worker.build(tiny, name, seed=3), sharded_worker.build(tiny, name, seed=4)
    restore(sharded, *ours)
    restore(folder / name / "plain/step_000002", *theirs)
    for parameter, twin in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(parameter, twin)
        assert ours[1].state[parameter].keys() == theirs[1].state[twin].keys()
        for kind, value in ours[1].state[parameter].items():
            assert torch.equal(value, theirs[1].state[twin][kind]), kind
    assert [sharded_worker.train_step(*ours, seed) for seed in (2, 3)] == plain[name]
    AutoModelForCausalLM.from_pretrained(sharded, trust_remote_code=True)


def test_a_missing_piece_of_a_sharded_checkpoint_is_noticed(two_processes, tmp_path):
    _, folder, _, tiny = two_processes
    copy = tmp_path / "step_000002"
    shutil.copytree(folder / "adamw/sharded/step_000002", copy)
    (copy / "trainer_state/optimizer-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"optimizer-00001-of-00002.safetensors is missing"):
        verify_checkpoint(copy)
    with pytest.raises(InputError, match="rows"):
        restore(copy, *sharded_worker.build(tiny, "adamw"))


def test_where_one_rank_cannot_write_every_rank_is_told_and_nothing_is_left(two_processes):
    reports, folder, _, _ = two_processes
    assert "No space left" in reports[1]["broken"]
    assert "rank 1 could not write its part" in reports[0]["broken"]
    assert names(folder / "broken") == []


def test_nodes_that_do_not_share_the_run_directory_are_refused_on_every_rank(two_processes):
    reports, _, _, _ = two_processes
    for report in reports.values():
        assert "ranks [1] do not see what rank 0 writes" in report["apart"]


def test_slow_work_of_one_rank_outlasts_the_default_groups_timeout(tmp_path):
    torch.multiprocessing.spawn(sharded_worker.wait_for_a_slow_rank, args=(tmp_path,), nprocs=2)
