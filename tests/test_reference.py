"""The curve referee: what it says beside its reference, far from it, and where it knows nothing."""

import json

import pytest
import yaml

from gpt2repro.data.shards import Manifest, load_manifest
from gpt2repro.options import InputError
from gpt2repro.training import reference

CONFIG = {"n_layer": 4, "n_embd": 192, "lr": 0.003, "max_steps": 500, "warmup_steps": 30, "seed": 1}


def manifest_of(sha256: str = "a" * 64, kind: str = "bpe", source: dict | None = None) -> Manifest:
    manifest = Manifest({"tokenizer": {"kind": kind}, "source": source or {}})
    manifest.sha256 = sha256
    return manifest


@pytest.fixture
def curve() -> reference.Reference:
    points = [(0, 7.6), (100, 4.0), (500, 3.0)]
    return reference.Reference("quickstart", "a" * 64, reference.recipe_of(CONFIG), points, {})


def comment(curve, step, val_loss, config=CONFIG, manifest=None):
    return reference.Referee(config, manifest or manifest_of(), references=[curve]).comment(step, val_loss)


def test_run_on_its_curve_is_told_so(curve):
    assert comment(curve, 100, 4.019) == "within 0.02 of the reference 'quickstart' (4.0000) at step 100"


def test_reference_is_read_between_its_points(curve):
    assert "(3.7500)" in comment(curve, 200, 3.76)  # a quarter of the way from 4.0 to 3.0


def test_small_distance_is_named_and_large_one_is_a_warning_with_causes(curve):
    assert comment(curve, 500, 3.06) == "0.060 above the reference 'quickstart' (3.0000) at step 500"
    warning = comment(curve, 500, 3.3)
    assert warning.startswith("warning: the curve is off, 0.300 above")
    assert "batch_tokens" in warning


def test_causes_depend_on_where_the_curve_is_off(curve):
    assert "ln(vocabulary size)" in comment(curve, 0, 9.0)
    assert "once per process" in comment(curve, 20, 9.0)
    assert "also in the training text" in comment(curve, 500, 2.0)


@pytest.mark.parametrize(
    ("config", "manifest"),
    [
        ({**CONFIG, "lr": 0.001}, manifest_of()),
        (CONFIG, manifest_of(sha256="b" * 64)),
    ],
)
def test_another_recipe_or_another_text_has_no_reference(curve, config, manifest):
    assert comment(curve, 100, 4.0, config, manifest) is None


def test_seed_does_not_choose_the_reference_and_numbers_compare_as_numbers(curve):
    assert "within" in comment(curve, 100, 4.0, {**CONFIG, "seed": 2, "max_steps": 500.0})


def test_steps_beyond_the_curve_and_broken_losses_get_no_comment(curve):
    assert comment(curve, 501, 3.0) is None
    assert comment(curve, 100, float("nan")) is None


def test_published_milestones_are_named_once_and_only_for_their_data_and_tokenizer():
    fineweb = {"dataset": "HuggingFaceFW/fineweb", "subset": "sample-10BT"}
    referee = reference.Referee({}, manifest_of(kind="gpt2", source=fineweb), references=[])
    assert referee.comment(1000, 3.9) is None
    assert "OpenAI's 124M (3.425, llm.c) at step 9000" in referee.comment(9000, 3.42)
    assert referee.comment(9250, 3.41) is None
    assert "3.28" in referee.comment(19000, 3.27)
    for other in (manifest_of(kind="bpe", source=fineweb), manifest_of(kind="gpt2", source={"dataset": "other"})):
        assert reference.Referee({}, other, references=[]).comment(9000, 3.0) is None
    edu = manifest_of(kind="gpt2", source={"dataset": "HuggingFaceFW/fineweb-edu"})
    assert "3.2924" in reference.Referee({}, edu, references=[]).comment(9000, 3.2)


def test_run_on_data_without_manifest_is_not_compared(curve):
    assert reference.Referee(CONFIG, None, references=[curve]).comment(100, 4.0) is None


def test_recorded_run_is_its_own_reference(tmp_path):
    from tiny_run import write_tiny_shards

    data = write_tiny_shards(tmp_path / "data")
    run = tmp_path / "run"
    run.mkdir()
    config = {**CONFIG, "data": str(data), "max_steps": 20}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [{"step": 1, "loss": 3.2}, {"step": 10, "val_loss": 2.5}, {"step": 20, "val_loss": 2.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    reference.record(run, name="tiny", directory=tmp_path)
    referee = reference.Referee(config, load_manifest(data), references=reference.load_references(tmp_path))
    assert referee.comment(20, 2.25).startswith("within 0.02 of the reference 'tiny' (2.2500)")
    with pytest.raises(InputError, match="has not evaluated its last step, 30"):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "max_steps": 30}), encoding="utf-8")
        reference.record(run, name="tiny", directory=tmp_path)


def test_shipped_references_can_be_read():
    for shipped in reference.load_references():
        assert len(shipped.manifest_sha256) == 64 and len(shipped.curve) > 1
        assert [step for step, _ in shipped.curve] == sorted(step for step, _ in shipped.curve)
        assert shipped.recipe.keys() == set(reference.RECIPE)
        assert shipped.made["commit"] and shipped.made["command"]
