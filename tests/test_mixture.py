"""Recipes: the bound over random ones, batches against those of each source alone, and runs of the real program."""

import json
import math
import random
import re
import shutil
import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
import yaml

import train_accelerate
from gpt2repro.checkpoint.reader import find_checkpoint, find_model, read_state
from gpt2repro.commands import verify_resume
from gpt2repro.data.mixture import Recipe, changed_past, read_recipe, same_recipe
from gpt2repro.data.ordering import skip_ahead
from gpt2repro.data.shards import open_split
from gpt2repro.data.sources import open_source
from gpt2repro.data.tokenization import load_tokenizer
from gpt2repro.evaluation.losses import token_byte_lengths, validation_loss
from gpt2repro.models import build_model, load_model
from gpt2repro.options import InputError, parse_options, run_main
from gpt2repro.publishing.model_card import card_files
from gpt2repro.training.plotting import draw_runs, sources_of
from gpt2repro.training.state import refuse_another_run

BOUND = Fraction(168, 100)  # of the docstring, for each phase
TWO = {"web": {"data": "w"}, "code": {"data": "c"}}


def recipe_of(*phases, sources=None, seq_len=4) -> Recipe:
    """A recipe of ({source: weight}, first token) phases."""
    listed = [{"from_tokens": start, "weights": weights} for weights, start in phases]
    names = {name: {"data": name} for weights, _ in phases for name in weights}
    return Recipe({"sources": sources or names, "phases": listed}, seq_len, "r.yaml")


def random_recipe(chance: random.Random) -> Recipe:
    seq_len, start, phases = chance.choice([1, 3, 16]), 0, []
    names = [f"s{number}" for number in range(chance.randint(1, 12))]
    for _ in range(chance.randint(1, 4)):
        some = chance.sample(names, chance.randint(1, len(names)))
        kind = chance.randrange(3)
        weights = {
            name: [chance.random() + 1e-6, round(1.6**number, 3), float(chance.randint(1, 3))][kind]
            for number, name in enumerate(some)
        }
        phases.append((weights, start))
        start += chance.randint(seq_len, 200 * seq_len)
    return recipe_of(*phases, seq_len=seq_len)


# --- the function


@pytest.mark.parametrize("seed", range(24))
def test_every_source_is_near_its_share_after_any_number_of_windows(seed):
    """Counted one by one; and the index of a window is how often its source came before."""
    recipe = random_recipe(random.Random(seed))
    given, phase = Counter(), -1
    for position in range(recipe.starts[-1] + 300):
        if phase + 1 < len(recipe.starts) and position == recipe.starts[phase + 1]:
            phase, in_phase = phase + 1, Counter()
            weights = {name: Fraction(str(weight)) for name, weight in recipe.phases[phase].weights.items()}
            total = sum(weights.values())
        if position % 50 == 0:
            assert recipe.counts(position) == {name: given[name] for name in recipe.sources}
        name, index = recipe.source_at(position)
        assert name in weights and index == given[name]
        given[name] += 1
        in_phase[name] += 1
        done = position + 1 - recipe.starts[phase]
        bound = BOUND if len(weights) > 2 else Fraction(1, 2)
        assert all(abs(in_phase[name] - done * weight / total) <= bound for name, weight in weights.items()), position


@pytest.mark.parametrize("kind", ["equal", "random", "fibonacci", "powers"])
def test_the_sum_in_the_proof_of_the_bound_holds_for_every_leaf_of_large_trees(kind):
    chance, fibonacci = random.Random(1), [1, 1]
    while len(fibonacci) < 80:
        fibonacci.append(sum(fibonacci[-2:]))
    weights = {
        "equal": [1] * 256,
        "random": [chance.random() ** 4 + 1e-9 for _ in range(256)],
        "fibonacci": [1e-9, 1.0, *(f * (1 + k * 1e-6) for k, f in enumerate(fibonacci, 1))],  # the worst there is
        "powers": [2.0**number for number in range(50)],
    }[kind]
    recipe = recipe_of(({f"s{number}": weight for number, weight in enumerate(weights)}, 0))
    largest, waiting = 0.0, [(recipe._trees[0], 1.0, [])]
    while waiting:
        tree, weight, above = waiting.pop()
        if isinstance(tree, str):
            largest = max(largest, sum(weight / one for one in above) / 2)
            continue
        share, whole, left, right = tree
        for child, part in ((left, weight * share / whole), (right, weight * (1 - share / whole))):
            waiting.append((child, part, [*above, part]))
    assert largest <= BOUND and (largest > 1.67 or kind != "fibonacci"), largest


def test_a_border_is_the_first_window_that_begins_at_or_after_the_token():
    for token, first in ((8, 2), (9, 3), (12, 3)):
        recipe = recipe_of(({"a": 1}, 0), ({"b": 1}, token))
        assert [recipe.source_at(p)[0] for p in range(5)] == ["a"] * first + ["b"] * (5 - first)


def test_the_order_of_lines_and_the_scale_of_weights_decide_nothing():
    one = recipe_of(({"a": 0.2, "b": 0.2, "c": 0.6}, 0))
    other = recipe_of(({"c": 3, "b": 1.0, "a": 1}, 0))
    assert [one.source_at(p) for p in range(300)] == [other.source_at(p) for p in range(300)]


def test_a_position_of_a_trillion_tokens_takes_no_time_and_no_memory():
    phases = [({f"s{s}": 1.0 + (s * 7 + p) % 5 for s in range(20)}, p * 10**10) for p in range(100)]
    recipe = recipe_of(*phases, seq_len=1024)
    chance = random.Random(0)
    positions = [chance.randrange(10**12 // 1024) for _ in range(2000)]
    tracemalloc.start()
    began = time.perf_counter()
    for position in positions:
        recipe.source_at(position)
    each = (time.perf_counter() - began) / len(positions)
    assert each < 1e-3 and tracemalloc.get_traced_memory()[1] < 100_000, each
    tracemalloc.stop()
    counts = recipe.counts(10**12 // 1024)
    assert sum(counts.values()) == 10**12 // 1024
    exact = sum((w["s3"] / Fraction(sum(w.values())) * Fraction(10**10, 1024) for w, _ in phases), Fraction(0))
    assert abs(counts["s3"] - exact) < 2.68 * 100


def test_the_order_is_the_same_today_as_when_it_was_written():
    """Another one would silently change every resumed run: raise RECIPE_ORDER_VERSION with these letters."""
    recipe = recipe_of(({"a": 0.5, "b": 0.3, "c": 0.2}, 0), ({"b": 0.9, "d": 0.1}, 80))
    letters = "".join(recipe.source_at(position)[0] for position in range(40))
    # By hand: a and (b, c) take turns, b and c as 3 to 2; then every tenth window is one of d.
    assert letters == "bacabacaba" * 2 + "bbbbbdbbbb" * 2


# --- the file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phases[0].weights.code": -1.0}, "phases[0].weights.code: should be greater than 0, not -1.0"),
        ({"phases[0].weights.code": 0}, "phases[0].weights.code: should be greater than 0"),
        ({"phases[0].weights.code": ".nan"}, "phases[0].weights.code: should be a finite number"),
        ({"phases[0].weights.code": ".inf"}, "phases[0].weights.code: should be a finite number"),
        ({"phases[0].weights.code": "much"}, "phases[0].weights.code: should be a valid number, not 'much'"),
        ({"phases[0].weights.code": "true"}, "phases[0].weights.code: should be a valid number"),
        (
            {"phases[0].weights": "{web: 1, cod: 1}"},
            "phases[0].weights.cod is none of the sources (web, code); did you",
        ),
        ({"phases[0].weights": "{}"}, "phases[0].weights: Dictionary should have at least 1 item"),
        ({"phases[0].from_tokens": 64}, "phases[0].from_tokens is 64; the first phase begins at 0"),
        ({"phases[1].from_tokens": 0}, "phases[1].from_tokens=0 overlaps phases[0], which begins at 0"),
        ({"phases[2].from_tokens": 128}, "phases[2].from_tokens=128 overlaps phases[1], which begins at 128"),
        ({"phases[2].from_tokens": 129}, None),
        ({"phases[1].from_tokens": -5}, "phases[1].from_tokens: should be greater than or equal to 0"),
        ({"phases[1].from_tokens": 1.5}, "phases[1].from_tokens: should be a valid integer"),
        ({"phases[1].until": 3}, "phases[1].until: Extra inputs are not permitted"),
        ({"sources.web.data": "stream:user/text"}, "sources.web.data is a stream"),
        ({"sources.web.data": "other.yaml"}, "sources.web.data is itself a recipe"),
        ({"sources.web.epochs": 0}, "sources.web.epochs: should be greater than or equal to 1"),
        ({"sources.web/x": "{data: d}"}, "sources.web/x: String should match pattern"),
        ({"sources.more": "{data: d}"}, "sources.more has a weight in no phase"),
        ({"sources": "{}"}, "sources: Dictionary should have at least 1 item"),
        ({"phases": "[]"}, "phases: List should have at least 1 item"),
        ({"surces": "{}"}, "surces: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_meant_is_a_sentence_with_its_place(tmp_path, change, said):
    content = {
        "sources": {"web": {"data": "w"}, "code": {"data": "c"}},
        "phases": [
            {"from_tokens": 0, "weights": {"web": 0.9, "code": 0.1}},
            {"from_tokens": 128, "weights": {"web": 0.5, "code": 0.5}},
            {"from_tokens": 256, "weights": {"web": 1}},
        ],
    }
    ((place, value),) = change.items()
    *path, last = re.findall(r"[^.\[\]]+", place)
    inner = content
    for step in path:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[last if isinstance(inner, dict) else int(last)] = yaml.safe_load(str(value))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    if said is None:
        assert read_recipe(str(file), 4).starts == [0, 32, 33]
        return
    with pytest.raises(InputError) as error:
        read_recipe(str(file), 4)
    assert said in str(error.value) and "recipe.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_unreadable_file_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"--data no.yaml: no such file"):
        read_recipe("no.yaml", 4)
    (tmp_path / "bad.yaml").write_text("sources: [")
    with pytest.raises(InputError, match=r"--data .*bad.yaml is not a readable YAML file"):
        read_recipe(str(tmp_path / "bad.yaml"), 4)
    (tmp_path / "twice.yaml").write_text("sources: {a: {data: x}, a: {data: y}}")
    with pytest.raises(InputError, match="a is given twice"):
        read_recipe(str(tmp_path / "twice.yaml"), 4)


# --- the past


def identity(*phases, shas=None, seq_len=4) -> dict:
    listed = [{"from_tokens": start, "weights": weights} for weights, start in phases]
    names = {name for weights, _ in phases for name in weights}
    sources = {name: {"data": name, "sha256": (shas or {}).get(name, f"of {name}")} for name in names}
    return {"kind": "recipe", "order": 1, "seq_len": seq_len, "seed": 1, "sources": sources, "phases": listed}


WEB, BOTH, CODE = {"web": 1}, {"web": 0.9, "code": 0.1}, {"code": 2}


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        ([(BOTH, 0)], [(BOTH, 0), (CODE, 400)], None),
        ([(BOTH, 0)], [({"web": 9, "code": 1}, 0)], None),
        ([(BOTH, 0), (WEB, 400)], [(BOTH, 0), (CODE, 420)], None),
        ([(BOTH, 0), (WEB, 400)], [(BOTH, 0)], None),
        ([(BOTH, 0)], [(BOTH, 0), (CODE, 396)], r"phases\[1\] .* was no phase before that token and is now code 1"),
        ([(BOTH, 0)], [(CODE, 0)], r"phases\[0\] is trained up to token 400, where it was code 0.1, web 0.9 from"),
        ([(BOTH, 0), (CODE, 99)], [(BOTH, 0), (WEB, 99)], r"phases\[1\] .*: add a phase with from_tokens 400 or more"),
        ([(BOTH, 0), (CODE, 99)], [(BOTH, 0), (CODE, 104)], r"phases\[1\] .*from token 99 and is now code 1"),
        ([(BOTH, 0), (CODE, 99)], [(BOTH, 0)], r"phases\[1\] .* and is now no phase before that token"),
    ],
    ids=str,
)  # fmt: skip
def test_the_past_is_frozen_and_the_rest_is_free(saved, now, said):
    found = changed_past(identity(*saved), identity(*now), 100)
    assert (found == []) if said is None else re.search(said, found[0])
    if said is None:  # then the function itself is the same
        recipes = [recipe_of(*phases) for phases in (saved, now)]
        one, other = ([recipe.source_at(position) for position in range(100)] for recipe in recipes)
        assert one == other


def test_other_data_under_a_source_that_was_trained_on_is_refused_and_a_data_set_may_become_a_recipe():
    now = identity((BOTH, 0), shas={"web": "changed"})
    assert (
        "phases[0].weights.web is trained up to token 40 on other data" in changed_past(identity((BOTH, 0)), now, 10)[0]
    )
    shards = {"kind": "shards", "order": 1, "sha256": "of web", "seq_len": 4, "seed": 1}
    assert changed_past(shards, identity((WEB, 0), (BOTH, 400)), 100) == []
    assert "phases[1]" in changed_past(shards, identity((WEB, 0), (BOTH, 396)), 100)[0]
    assert "phases[0]" in changed_past(shards, identity((CODE, 0), (BOTH, 400)), 100)[0]
    assert "kind was stream" in changed_past({"kind": "stream"}, now, 0)[0]
    assert "kind was recipe" in changed_past(now, shards, 0)[0]


def test_an_order_of_another_version_or_seed_is_refused():
    same = {"batch_tokens": 8, "optimizer": "adamw", "architecture": {}}
    saved, now = ({**same, "data": identity((BOTH, 0))} for _ in range(2))
    refuse_another_run(saved, now, Path("step_000001"), 100)
    for name in ("order", "seed", "seq_len"):
        with pytest.raises(InputError, match=f"data: {name} was [14] and is now 7"):
            refuse_another_run(saved, {**now, "data": now["data"] | {name: 7}}, Path("step_000001"), 100)


def test_recut_windows_stay_what_they_were_also_where_a_data_set_becomes_a_recipe():
    same = {"batch_tokens": 8, "optimizer": "adamw", "architecture": {}}
    shards = {"kind": "shards", "order": 1, "sha256": "of web", "seq_len": 4, "seed": 1}
    recipe, recut = identity((WEB, 0), (BOTH, 400)), {"recut_windows": 1}
    for saved, now in ((shards, shards), (shards, recipe), (recipe, recipe)):
        refuse_another_run({**same, "data": saved | recut}, {**same, "data": now | recut}, Path("step_000001"), 100)
        with pytest.raises(InputError, match="data: recut_windows was None and is now 1"):
            refuse_another_run({**same, "data": saved}, {**same, "data": now | recut}, Path("step_000001"), 100)
        with pytest.raises(InputError, match="data: recut_windows was 1 and is now None"):
            refuse_another_run({**same, "data": saved | recut}, {**same, "data": now}, Path("step_000001"), 100)


# --- batches


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Three data sets of one tokenizer, of other sizes and texts."""
    directory = tmp_path_factory.mktemp("corpora")
    for name, repeats in (("web", 120), ("code", 30), ("small", 3)):
        tiny_run.write_tiny_shards(directory / name, repeats)
    return directory


def write_recipe(path: Path, corpora: Path, *phases, **epochs) -> Path:
    names = dict.fromkeys(name for weights, _ in phases for name in weights)
    sources = {
        name: {"data": str(corpora / name), **({"epochs": epochs[name]} if name in epochs else {})} for name in names
    }
    listed = [{"from_tokens": start, "weights": weights} for weights, start in phases]
    path.write_text(yaml.safe_dump({"sources": sources, "phases": listed}, sort_keys=False))
    return path


PHASES = ({"web": 0.7, "code": 0.3}, 0), ({"web": 0.2, "code": 0.3, "small": 0.5}, 16 * 50)


def take(source, count, state=None, rank=0, world=1, sequences=8):
    batches = source.batches(state or source.initial_state(), rank=rank, world=world, sequences=sequences)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("recut", [False, True])
def test_each_source_gives_its_own_order_into_further_epochs(corpora, tmp_path, recut):
    """Against the order that each data set has alone, dealt out by a count over all positions."""
    how = {"seq_len": 16, "seed": 7, "recut_windows": recut}
    source = open_source(str(write_recipe(tmp_path / "r.yaml", corpora, *PHASES)), sequences=8, **how)
    alone = {name: open_source(str(corpora / name), sequences=1, **how) for name in ("web", "code", "small")}
    assert 16 * alone["small"].windows < 3000  # many epochs of it in what follows
    rows = {
        name: iter([torch.cat([x, y[:, -1:]], 1) for x, y, _ in take(one, 500, sequences=1)])
        for name, one in alone.items()
    }
    for number, (x, y, state) in enumerate(take(source, 60)):
        assert state == {"position": 8 * (number + 1), "skipped": []}
        for row in range(8):
            name, _ = source.recipe.source_at(8 * number + row)
            assert torch.equal(torch.cat([x[row], y[row, -1:]]), next(rows[name])[0]), (number, row, name)


@pytest.mark.parametrize(("world", "recut"), [(2, False), (4, False), (2, True)])
def test_ranks_resume_and_skips_slice_the_same_global_batches(corpora, tmp_path, world, recut):
    def opened():
        path = write_recipe(tmp_path / "r.yaml", corpora, *PHASES)
        return open_source(str(path), seq_len=16, seed=7, sequences=8, recut_windows=recut)

    plain = take(opened(), 20)
    state = plain[4][2]
    ranks = [take(opened(), 15, state, rank=rank, world=world) for rank in range(world)]
    for (x, y, after), *parts in zip(plain[5:], *ranks, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        assert parts[0][2] == after
    every = torch.cat([x for x, _, _ in plain])
    skipped = torch.cat([x for x, _, _ in take(opened(), 10, skip_ahead(opened().initial_state(), 30, 57))])
    assert torch.equal(skipped, torch.cat([every[:30], every[57:]])[:80])


def test_one_source_alone_is_the_data_set_itself(corpora, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", corpora, ({"web": 3}, 0))
    mixed, plain = (open_source(str(data), seq_len=16, seed=7, sequences=8) for data in (path, corpora / "web"))
    for ours, theirs in zip(take(mixed, 80), take(plain, 80), strict=True):
        assert torch.equal(ours[0], theirs[0]) and ours[2] == theirs[2]


def test_a_source_that_ends_is_refused_before_the_run_and_where_skips_made_it_longer(corpora, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", corpora, ({"web": 1, "small": 1}, 0), small=1)
    source = open_source(str(path), seq_len=16, seed=7, sequences=8)
    windows = source.sources["small"].windows
    source.check_length(2 * windows)
    with pytest.raises(InputError, match=r"r.yaml: sources.small.epochs is 1, but the run takes .* epochs; lower its"):
        source.check_length(2 * windows + 2)
    with pytest.raises(InputError, match=r"sources.small.epochs is 1"):
        take(source, windows)


def test_sources_that_do_not_fit_each_other_are_named(corpora, tmp_path):
    def said(*names, **changes) -> str:
        phase = dict.fromkeys(names, 1)
        path = write_recipe(tmp_path / "r.yaml", tmp_path, (phase, 0))
        content = yaml.safe_load(path.read_text())
        content["sources"][names[-1]] |= changes
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(InputError) as error:
            open_source(str(path), seq_len=16, seed=7, sequences=8)
        return str(error.value)

    for name in ("web", "code", "small"):
        shutil.copytree(corpora / name, tmp_path / name)
    shutil.copytree(corpora / "web", tmp_path / "twin")
    assert "sources.twin is the same data as sources.web" in said("web", "twin")
    assert "sources.code.sha256 is 0, but" in said("web", "code", sha256="0")
    assert "sources.code: " in said("web", "code", data="nowhere") and "is no directory" in said("code", data="nowhere")
    manifest = json.loads((tmp_path / "code/manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (tmp_path / "code/manifest.json").write_text(json.dumps(manifest))
    assert "sources.code was made with another tokenizer than sources.web" in said("web", "code")
    manifest["tokenizer"]["vocab_size"] += 1
    (tmp_path / "code/manifest.json").write_text(json.dumps(manifest))
    assert re.search(r"sources.code has a vocabulary of \d+ and sources.web one of \d+", said("web", "code"))
    (tmp_path / "tiny").mkdir()
    np.arange(10, dtype="<u2").tofile(tmp_path / "tiny" / "train.bin")
    assert "sources.tiny: the data has 10 tokens, fewer than one window" in said("tiny")


def test_a_source_on_the_hub_is_the_local_one_and_named_in_the_card(corpora, tmp_path, loopback_hub, monkeypatch):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    for path in (path for path in (corpora / "code").rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = path.relative_to(corpora / "code").as_posix()
        loopback_hub.add_file("user/code", name, path.read_bytes(), "dataset")
    local = write_recipe(tmp_path / "local.yaml", corpora, PHASES[0])
    hub = tmp_path / "hub.yaml"
    hub.write_text(local.read_text().replace(str(corpora / "code"), "hf://user/code@main"))
    ours, theirs = (open_source(str(path), seq_len=16, seed=7, sequences=8) for path in (hub, local))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(take(ours, 20), take(theirs, 20), strict=True))
    assert same_recipe(ours.identity(), theirs.identity()) and ours.identity() != theirs.identity()
    assert train(hub, tmp_path / "run", max_steps=1) == 0
    card = card_files(find_checkpoint(tmp_path / "run"), repo="user/mixed", run_dir=tmp_path / "run")["README.md"]
    assert "datasets:\n- user/code\n" in card.decode()


def test_foreign_shards_in_a_recipe_are_known_by_their_bytes(tmp_path):
    """Also where the run began with one of them alone, under names without a source."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        np.random.default_rng(number).integers(0, 50000, 400).astype("<u2").tofile(tmp_path / name / "train.bin")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, ({"a": 1}, 0), ({"b": 1}, 64))
    source = open_source(str(recipe), seq_len=16, seed=7, sequences=8)
    alone = open_source(str(tmp_path / "a"), seq_len=16, seed=7, sequences=8).digests()
    assert set(source.digests()) == {"a/train.bin", "b/train.bin"} and source.vocab_size == 50257
    source.check_digests(source.digests() | alone | {"gone/train.bin": "0"})
    for key in ("b/train.bin", "train.bin"):
        with pytest.raises(InputError, match=rf"{key[:-9] or 'a/'}train.bin is not the file that this run began with"):
            source.check_digests({key: "0" * 64})


# --- runs


def train(*arguments, **changes) -> int:
    return run_main(train_accelerate.main, [*tiny_run.flags(*arguments, **changes)])


def records(run_dir: Path) -> list[dict]:
    return verify_resume.records(run_dir)


def comments_of(run_dir: Path) -> list[dict]:
    """The recipes in config.yaml's comments."""
    lines = [line[2:] for line in (run_dir / "config.yaml").read_text().splitlines() if line.startswith("# ")]
    return yaml.safe_load("\n".join(lines[1:]))


@pytest.fixture(scope="module")
def finished(corpora, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(directory / "recipe.yaml", corpora, *PHASES)
    assert train(recipe, directory / "run") == 0
    return directory / "run"


def first_batch(run_dir: Path, recipe: Path):
    """The untrained model in fp64, the first global batch, and the source of each of its rows."""
    config = parse_options(train_accelerate.TrainConfig, tiny_run.flags(recipe, run_dir, resid_pdrop=0.0), prog="train")
    source = open_source(str(recipe), seq_len=16, seed=config.seed, sequences=8)
    tokenizer = load_tokenizer(Path(source.sources["web"].directory))
    model = build_model(config, source.vocab_size, tokenizer).double().eval()
    ((x, y, _),) = take(source, 1)
    return model, x, y, np.array([source.recipe.source_at(row)[0] for row in range(8)])


@pytest.mark.parametrize("more", [{}, {"loss_chunk_tokens": 24}, {"reduction": "fixed"}], ids=str)
def test_the_loss_of_a_source_is_that_of_its_windows(finished, tmp_path, fresh_accelerate, more):
    recipe = finished.parent / "recipe.yaml"
    assert train(recipe, tmp_path, resid_pdrop=0.0, max_steps=1, precision="fp64", **more) == 0
    step = next(record for record in records(tmp_path) if "loss" in record)
    model, x, y, names = first_batch(tmp_path, recipe)
    assert {name for name in step if name.startswith("loss/")} == {f"loss/{name}" for name in names}
    with torch.no_grad():
        for name in set(names):
            rows = torch.from_numpy(names == name)
            exact = F.cross_entropy(model(x[rows]).logits.flatten(0, 1), y[rows].flatten()).item()
            assert step[f"loss/{name}"] == pytest.approx(exact, abs=1e-12)


def test_the_losses_of_the_sources_make_up_the_loss_at_every_step(finished):
    recipe = read_recipe(str(finished.parent / "recipe.yaml"), 16)
    steps = [record for record in records(finished) if "loss" in record]
    assert len(steps) == 24
    for step in steps:
        first = 8 * (step["step"] - 1)
        counts = Counter(recipe.source_at(position)[0] for position in range(first, first + 8))
        assert {name for name in step if name.startswith("loss/")} == {f"loss/{name}" for name in counts}
        mean = sum(step[f"loss/{name}"] * count for name, count in counts.items()) / 8
        assert mean == pytest.approx(step["loss"], abs=1e-6)


def test_the_validation_loss_is_that_of_the_last_phase(finished, corpora):
    evaluations = [record for record in records(finished) if "val_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 4, 8, 12, 16, 20, 24]
    model, tokenizer = load_model(str(finished), device="cpu", dtype=None)
    lengths = token_byte_lengths(tokenizer)
    alone = {
        name: validation_loss(
            model, open_split(corpora / name, "val"), seq_len=16, batch_size=4, tokens=256, token_bytes=lengths
        )
        for name in ("web", "code", "small")
    }
    last, weights = evaluations[-1], {"web": 0.2, "code": 0.3, "small": 0.5}
    for name, one in alone.items():
        assert last[f"val_loss/{name}"] == pytest.approx(one["val_loss"], abs=1e-9)
    nats = sum(weight * alone[name]["val_loss"] for name, weight in weights.items())
    assert last["val_loss"] == pytest.approx(nats, abs=1e-9) and last["val_tokens"] == 3 * 256
    text = sum(w * alone[n]["val_loss"] / math.log(2) / alone[n]["bits_per_byte"] for n, w in weights.items())
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / text)


def test_val_data_gives_the_validation_loss_and_the_sources_theirs_beside_it(finished, corpora, tmp_path):
    recipe = finished.parent / "recipe.yaml"
    assert train(recipe, tmp_path, max_steps=1, val_data=corpora / "code") == 0
    first = next(record for record in records(tmp_path) if "val_loss" in record)
    assert first["val_loss"] == first["val_loss/code"] != first["val_loss/web"]


def test_a_run_keeps_its_recipe_and_shows_it(finished, tmp_path):
    state = read_state(find_checkpoint(finished))
    assert [(one["step"], one["position"]) for one in state["recipes"]] == [(0, 0)]
    content = {name: state["recipes"][0]["data"][name] for name in ("sources", "phases")}
    assert Recipe(content, 16, "state").content() == content  # a recipe again, with the sha256 of its data
    assert content["phases"][1] == {"from_tokens": 800, "weights": {"web": 0.2, "code": 0.3, "small": 0.5}}
    assert comments_of(finished)[0]["data"]["phases"] == content["phases"]
    events = [record for record in records(finished) if record.get("event") == "recipe"]
    assert [(one["step"], one["position"]) for one in events] == [(1, 0)] and events[0]["data"]["phases"]
    again = tmp_path / "again"
    assert run_main(train_accelerate.main, ["--config", str(finished / "config.yaml"), "--run_dir", str(again)]) == 0
    assert records(again) == records(finished)

    checkpoint = find_checkpoint(finished)
    files = card_files(checkpoint, repo="user/mixed", run_dir=finished)
    card = files["README.md"].decode()
    for part in ("web 0.2, code 0.3, small 0.5 from token 800", "training loss on code", "validation loss on small"):
        assert part in card
    assert yaml.safe_load(files["training/recipe.yaml"]) == content
    assert draw_runs([finished], tmp_path / "loss.png").is_file()
    assert sources_of(records(finished)) == ["code", "small", "web"]


def test_a_resumed_run_is_the_uninterrupted_one_and_mended_ahead_it_keeps_both_recipes(
    finished, corpora, tmp_path, capsys
):
    """Interrupted after step 16, position 128: what lies ahead may change, what lies behind is refused by its phase."""
    for number in range(2):
        run = tmp_path / f"run{number}"
        shutil.copytree(finished, run, symlinks=True)
        shutil.rmtree(run / "checkpoints" / "step_000024")
        shutil.rmtree(run / "checkpoints" / "step_000020")
    assert train(finished.parent / "recipe.yaml", tmp_path / "run0") == 0
    assert verify_resume.compare(finished, tmp_path / "run0", 0.0) == []

    run, there = tmp_path / "run1", finished.parent / "recipe.yaml"
    past = write_recipe(tmp_path / "past.yaml", corpora, PHASES[0], ({"web": 1}, 16 * 50))
    assert train(past, run) == 2
    error = capsys.readouterr().err
    assert "phases[1] is trained up to token 2,048, where it was code 0.3, small 0.5, web 0.2 from token 800" in error
    assert "add a phase with from_tokens 2048 or more" in error
    assert train(corpora / "web", run) == 2 and "kind was recipe and is now shards" in capsys.readouterr().err
    ahead = write_recipe(tmp_path / "ahead.yaml", corpora, *PHASES, ({"code": 1}, 16 * 140))
    assert train(ahead, run) == 0
    before, after = ([r for r in records(one) if "loss" in r] for one in (finished, run))
    assert after[:16] == before[:16]
    # Step 17 ends at position 136: still the old mixture. From position 140 on there is code alone.
    assert after[16] == before[16] and after[17] != before[17]
    assert [sorted(name for name in r if name.startswith("loss/")) for r in after[18:]] == [["loss/code"]] * 6
    state = read_state(find_checkpoint(run))
    assert [(one["step"], one["position"], len(one["data"]["phases"])) for one in state["recipes"]] == [
        (0, 0, 2),
        (16, 128, 3),
    ]
    assert [(one["step"], one["position"]) for one in comments_of(run)] == [(0, 0), (16, 128)]
    assert [(r["step"], r["position"]) for r in records(run) if r.get("event")] == [(1, 0), (17, 128)]
    assert state["best"]["step"] > 16  # an earlier one was of another mixture
    assert train(there, run) == 2 and "phases[2] is trained up to token 3,072" in capsys.readouterr().err
    card = card_files(find_checkpoint(run), repo="user/mixed", run_dir=run)["README.md"].decode()
    assert "recipe from step 1 on" in card and "recipe from step 17 on" in card


def test_a_run_on_one_data_set_goes_on_with_new_data_and_the_optimizer_kept(corpora, tmp_path, capsys):
    options = {"max_steps": 24}
    assert train(corpora / "web", tmp_path / "plain", **options) == 0
    run = tmp_path / "tuned"
    shutil.copytree(tmp_path / "plain", run, symlinks=True)
    for step in (20, 24):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    early = write_recipe(tmp_path / "early.yaml", corpora, ({"web": 1}, 0), ({"web": 0.5, "code": 0.5}, 16 * 127))
    assert train(early, run, **options) == 2 and "phases[1] is trained up to token 2,048" in capsys.readouterr().err
    recipe = write_recipe(tmp_path / "r.yaml", corpora, ({"web": 1}, 0), ({"web": 0.5, "code": 0.5}, 16 * 136))
    assert train(recipe, run, **options) == 0
    plain, tuned = ([r for r in records(one) if "loss" in r] for one in (tmp_path / "plain", run))
    assert plain[:16] == tuned[:16]
    assert tuned[16]["loss"] == pytest.approx(plain[16]["loss"], abs=1e-6)  # position 128: the same windows
    assert tuned[16]["loss/web"] == pytest.approx(tuned[16]["loss"], abs=1e-6) and "loss/code" in tuned[17]
    kinds = [one["data"]["kind"] for one in read_state(find_checkpoint(run))["recipes"]]
    assert kinds == ["shards", "recipe"]


def test_a_mixture_that_cannot_be_evaluated_has_no_best_from_before(tmp_path):
    """Else eval, push and generate would take a model that has not seen the new data."""
    first, second = tmp_path / "corpora/a", tmp_path / "corpora/b"
    tiny_run.write_tiny_shards(first)
    tiny_run.write_tiny_shards(second, repeats=150)
    manifest = json.loads((second / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (second / "manifest.json").write_text(json.dumps(manifest))
    run, options = tmp_path / "run", {"save_steps": 2, "eval_steps": 2}
    assert train(first, run, max_steps=4, **options) == 0
    recipe = {"sources": {name: {"data": str(path)} for name, path in (("a", first), ("b", second))}}
    recipe["phases"] = [{"from_tokens": 0, "weights": {"a": 1.0}}, {"from_tokens": 512, "weights": {"b": 1.0}}]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert train(tmp_path / "r.yaml", run, max_steps=8, **options) == 0
    assert Path(find_model(str(run))).name == "step_000008"


def test_bad_numbers_rewind_and_skip_as_with_one_source(finished, tmp_path):
    recipe = finished.parent / "recipe.yaml"
    bad = {
        "on_bad_numbers": "rewind",
        "spike_z": 1e-9,
        "spike_window": 6,
        "max_rewinds": 1,
        "log_steps": 1,
        "save_steps": 1,
    }
    assert train(recipe, tmp_path, **bad) in (0, 4)
    rewound = next(record for record in records(tmp_path) if record.get("event") == "rewind")
    state = read_state(find_checkpoint(tmp_path))
    assert state["source"]["skipped"] == [[rewound["start"], rewound["stop"]]]
    step = next(r for r in records(tmp_path) if "loss" in r and r["step"] == rewound["step"])
    mixed = read_recipe(str(recipe), 16)
    start = 8 * (rewound["step"] - 1)
    positions = [p for p in range(start, 10**4) if not rewound["start"] <= p < rewound["stop"]][:8]
    names = {f"loss/{mixed.source_at(position)[0]}" for position in positions}
    assert {name for name in step if name.startswith("loss/")} == names


@pytest.mark.timeout(600)
def test_killed_on_one_and_two_processes_a_fixed_reduction_is_the_uninterrupted_run(finished, tmp_path):
    """Also the losses of the sources, which are summed over the rows of all ranks."""
    flags = tiny_run.flags(finished.parent / "recipe.yaml", tmp_path, reduction="fixed", max_steps=12)
    del flags[flags.index("--run_dir") : flags.index("--run_dir") + 2]
    options = ["--kills", "2", "--processes", "1,2", "--work_dir", str(tmp_path / "work"), "--", *flags]
    assert verify_resume.main(options) == 0


def test_the_plan_prints_the_timetable_and_refuses_what_cannot_be_served(corpora, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", corpora, *PHASES, ({"web": 1}, 16 * 1000), small=6)
    common = tiny_run.flags(recipe, tmp_path / "run")
    assert run_main(train_accelerate.main, [*common, "--plan"]) == 0
    report = capsys.readouterr().out
    # 24 steps of 8 windows of 16: 50 positions of the first phase, 142 of the second
    assert "phases[0] from step 0 (token 0): web 560 tokens, code 240 tokens" in report
    assert "phases[1] from step 6.25 (token 800): " in report and "small 1,136 tokens" in report
    assert "phases[2] from step 125 (token 16,000): after the last step" in report
    windows = {name: (open_split(corpora / name, "train").tokens - 1) // 16 for name in ("web", "code", "small")}
    assert f"small: 1,136 tokens, {71 / windows['small']:.2f} epochs of {16 * windows['small']:,}" in report
    assert run_main(train_accelerate.main, [*common, "--plan", "--max_steps", "240"]) == 2
    assert "sources.small.epochs is 6, but the run takes" in capsys.readouterr().err
    assert run_main(train_accelerate.main, [*common, "--max_steps", "240"]) == 2
    assert "sources.small.epochs is 6, but the run takes" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    recipe.write_text(recipe.read_text().replace("0.7", "-0.7"))
    assert run_main(train_accelerate.main, [*common, "--plan"]) == 2
    assert "phases[0].weights.web: should be greater than 0, not -0.7" in capsys.readouterr().err
