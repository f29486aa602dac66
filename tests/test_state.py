"""What a run carries: checked before it is used, and refused where another run wrote it."""

import json
import shutil

import pytest
import tiny_run

import train_accelerate
from gpt2repro.checkpoint.layout import resolve_pointer
from gpt2repro.checkpoint.reader import read_state
from gpt2repro.options import InputError, run_main
from gpt2repro.publishing.model_card import card_files
from gpt2repro.training import state as states


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("state")
    data = tiny_run.write_tiny_shards(directory / "data")
    assert run_main(train_accelerate.main, tiny_run.flags(data, directory / "run", max_steps=4)) == 0
    return resolve_pointer(directory / "run/checkpoints", "latest")


def with_state(monkeypatch, content: dict):
    monkeypatch.setattr(states, "read_state", lambda path: content)


def test_the_state_of_a_checkpoint_comes_back_as_it_was(checkpoint):
    content = read_state(checkpoint)
    state = states.load_run_state(checkpoint, content["identity"])
    assert (state.step, state.source["position"]) == (4, 4 * 8)
    assert (
        state.model_dump(exclude={"digests", "parent", "recipes", "device_seconds"}) == content
    )  # kept only where there are any
    assert json.loads(json.dumps(state.model_dump())) == state.model_dump()  # what JSON can hold, and nothing else


def test_a_run_that_goes_on_with_another_number_of_processes_counts_the_time_of_each(checkpoint, tmp_path, monkeypatch):
    run_dir, content = tmp_path / "run", read_state(checkpoint)
    shutil.copytree(checkpoint.parents[1], run_dir, symlinks=True)
    on_two = {**content, "seconds": 7200.0, "environment": {**content["environment"], "processes": 2}}
    with_state(monkeypatch, on_two)
    assert run_main(train_accelerate.main, tiny_run.flags(checkpoint.parents[2] / "data", run_dir, max_steps=8)) == 0
    monkeypatch.undo()
    state = read_state(resolve_pointer(run_dir / "checkpoints", "latest"))
    assert state["seconds"] > 7200
    assert state["device_seconds"] - 2 * 7200 == pytest.approx(state["seconds"] - 7200)
    card = card_files(resolve_pointer(run_dir / "checkpoints", "latest"), repo="user/tiny", run_dir=run_dir)
    assert b"2.00 hours of training steps, 4.00 device hours" in card["README.md"]
    assert "device_seconds" not in content


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("step", -1), ("step", True), ("step", 2.5), ("step", 9), ("seconds", "1"), ("best", {"step": 1}),
        ("source", {"position": -1, "skipped": []}), ("source", {"position": 1, "skipped": [[1]]}), ("source", []),
        ("health", None), ("health", {"losses": ["x"]}), ("identity", {"data": {}}), ("run_ids", {"wandb": 1}),
        ("scaler", "x"),
    ],
    ids=str,
)  # fmt: skip
def test_a_part_that_this_loop_never_wrote_is_named(checkpoint, monkeypatch, part, value):
    content = read_state(checkpoint)
    with_state(monkeypatch, {**content, part: value})
    with pytest.raises(InputError, match=rf"has no usable {part}; take another checkpoint"):
        states.load_run_state(checkpoint, content["identity"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_tokens": 64}, "batch_tokens was 128 and is now 64"),
        ({"optimizer": "muon"}, "optimizer was adamw and is now muon"),
        ({"architecture": {"n_layer": 9}}, "architecture: n_layer was 1 and is now 9"),
        ({"data": {"seed": 5}}, "data: seed was 1337 and is now 5"),
    ],
    ids=str,
)
def test_another_run_is_refused_with_what_differs(checkpoint, change, said):
    identity = read_state(checkpoint)["identity"]
    now = {name: {**identity[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
    with pytest.raises(InputError, match=said):
        states.load_run_state(checkpoint, {**identity, **now})


def test_text_files_may_move_but_not_change(checkpoint):
    identity = read_state(checkpoint)["identity"]
    stream = {"kind": "stream", "source": "/home/me/text.txt", "revision": None, "sha256": "a"}
    moved, changed, pinned = {"source": "here.txt"}, {"sha256": "b"}, {"source": "other/set", "revision": "c0ffee"}
    saved = {**identity, "data": stream}
    states.refuse_another_run(saved, {**identity, "data": stream | moved}, checkpoint)
    with pytest.raises(InputError, match="sha256 was a and is now b"):
        states.refuse_another_run(saved, {**identity, "data": stream | changed}, checkpoint)
    of_the_hub = {**identity, "data": stream | {"revision": "c0ffee"}}
    with pytest.raises(InputError, match="source was"):
        states.refuse_another_run(of_the_hub, {**identity, "data": stream | pinned}, checkpoint)
