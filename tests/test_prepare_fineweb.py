"""prepare_fineweb.py: from a Hub (on 127.0.0.1) or local files to shards, in parts, and up to the Hub again."""

import filecmp
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

import prepare_fineweb
from gpt2repro.data.shards import load_manifest, open_split, verify_dataset
from gpt2repro.data.sources import download_shards
from gpt2repro.data.tokenization import EOT, Encoder, bpe_tokenizer, load_tokenizer
from gpt2repro.data.upload import push_dataset
from gpt2repro.options import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

chance = random.Random(0)
WORDS = ["the", "web", "is", "large\n", "né", "🙂", EOT, "\x00", "tokens"]
TEXTS = [" ".join(chance.choices(WORDS, k=chance.randrange(120))) for _ in range(600)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    bpe_tokenizer(TEXTS, 400).save_pretrained(directory)
    return directory


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    for i in range(3):
        table = pyarrow.table({"id": range(200), "text": TEXTS[200 * i : 200 * (i + 1)]})
        parquet.write_table(table, tmp_path / "files" / f"{i:03d}_00000.parquet", row_group_size=40)
    return tmp_path / "files"


def run(dataset, out, tokenizer, *arguments):
    options = ["--dataset", dataset, "--out", out, "--tokenizer", tokenizer, "--shard_tokens", 4000, "--workers", 2]
    assert prepare_fineweb.main([str(argument) for argument in [*options, *arguments]]) == 0
    return verify_dataset(out) if (out / "manifest.json").exists() else None


def same(a, b):
    names = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    return names[0] == names[1] and filecmp.cmpfiles(a, b, names[0], shallow=False)[0] == names[0]


def test_first_shard_is_for_validation_and_the_rest_for_training_in_order(tmp_path, files, tokenizer):
    manifest = run(files, tmp_path / "out", tokenizer)
    encoder = Encoder(load_tokenizer(tokenizer))
    expected = np.concatenate([[*ids, encoder.eot_id] for ids in encoder.encode_batch(TEXTS)])
    val, train = open_split(tmp_path / "out", "val"), open_split(tmp_path / "out", "train")
    assert np.array_equal(np.concatenate([val.read(0, val.tokens), train.read(0, train.tokens)]), expected)
    assert [shard["file"] for shard in manifest["splits"]["val"]["shards"]] == ["val_000000.bin"]
    assert len(manifest["splits"]["train"]["shards"]) > 3


def test_a_fraction_of_the_documents_for_validation(tmp_path, files, tokenizer):
    manifest = run(files, tmp_path / "out", tokenizer, "--val", 0.1)
    assert 30 <= manifest["splits"]["val"]["documents"] <= 90


def test_three_machines_give_the_bytes_of_one(tmp_path, files, tokenizer):
    run(files, tmp_path / "one", tokenizer)
    for index in (1, 2, 0):
        run(files, tmp_path / "three", tokenizer, "--num_nodes", 3, "--node_index", index)
    assert same(tmp_path / "one", tmp_path / "three")


def test_token_limit_ends_with_the_shard_that_reaches_it(tmp_path, files, tokenizer):
    manifest = run(files, tmp_path / "out", tokenizer, "--tokens", 10_000)
    counts = [shard["tokens"] for split in ("val", "train") for shard in manifest["splits"][split]["shards"]]
    assert sum(counts) >= 10_000 > sum(counts[:-1])


def test_a_hub_dataset_is_pinned_and_its_configuration_is_chosen(tmp_path, files, tokenizer, loopback_hub, monkeypatch):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n"
    card += "- config_name: sample-10BT\n  data_files: sample/10BT/*\n---\n"
    loopback_hub.add_file("user/web", "README.md", card.encode(), "dataset")
    loopback_hub.add_file("user/web", "data/0.parquet", (files / "000_00000.parquet").read_bytes(), "dataset")
    for path in sorted(files.iterdir()):
        loopback_hub.add_file("user/web", f"sample/10BT/{path.name}", path.read_bytes(), "dataset")
    remote = run("user/web", tmp_path / "remote", tokenizer)
    local = run(files, tmp_path / "local", tokenizer)
    assert remote["splits"] == local["splits"]
    assert remote["source"]["config"] == "sample-10BT" and len(remote["source"]["files"]) == 3
    copied = run("user/web", tmp_path / "copied", tokenizer, "--verify_source")
    assert copied.sha256 == remote.sha256 and not (tmp_path / "copied" / "source").exists()


def test_upload_continues_where_it_was_cut_and_trains_from_the_hub(
    tmp_path, files, tokenizer, loopback_hub, monkeypatch
):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("gpt2repro.data.upload.FILES_PER_COMMIT", 2)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    manifest = run(files, tmp_path / "out", tokenizer)
    shards = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
    posts = []
    with monkeypatch.context() as cut:
        from huggingface_hub import HfApi

        create_commit = HfApi.create_commit

        def third_time_unlucky(self, *arguments, **options):
            posts.append(options["commit_message"])
            if len(posts) == 3:
                raise KeyboardInterrupt
            return create_commit(self, *arguments, **options)

        cut.setattr(HfApi, "create_commit", third_time_unlucky)
        with pytest.raises(KeyboardInterrupt):
            push_dataset(tmp_path / "out", "user/shards")
    present = loopback_hub.files("user/shards", kind="dataset")
    assert set(shards) & set(present) and "manifest.json" not in present
    before = len(loopback_hub.requests)
    run(files, tmp_path / "out", tokenizer, "--push_to_hub", "user/shards")
    uploads = [path for method, path, _ in loopback_hub.requests[before:] if method == "PUT"]
    assert len(uploads) == len(shards) - 4  # two commits of two were there
    present = loopback_hub.files("user/shards", kind="dataset")
    assert set(present) >= {*shards, "manifest.json", "README.md", "tokenizer/tokenizer.json"}
    assert "plan.json" not in present
    directory = download_shards("user/shards")
    assert load_manifest(directory).sha256 == manifest.sha256
    train = open_split(directory, "train")
    assert np.array_equal(train.read(0, train.tokens), open_split(tmp_path / "out", "train").read(0, train.tokens))


@pytest.mark.parametrize(
    ("repo", "sentence", "token"),
    [
        ("user/shards", "nobody is logged in to", None),
        ("user/shards", "set HF_TOKEN, or run `hf auth login`", None),
        ("somebody/shards", "belongs to somebody, but this login is user and may write for user", "right"),
        ("shards", "'shards' is no repository's name: expected USER/NAME", "right"),
        ("user/a b", "'user/a b' is no repository's name: expected USER/NAME", "right"),
    ],
)
def test_name_and_login_of_an_upload_are_checked_before_any_work(
    tmp_path, files, tokenizer, loopback_hub, monkeypatch, repo, sentence, token
):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home", token=token and loopback_hub.token)
    with pytest.raises(InputError) as error:
        run(files, tmp_path / "out", tokenizer, "--push_to_hub", repo)
    assert sentence in str(error.value) and not (tmp_path / "out").exists()


def test_a_damaged_data_set_is_not_uploaded(tmp_path, files, tokenizer, loopback_hub, monkeypatch):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    run(files, tmp_path / "out", tokenizer)
    with (tmp_path / "out" / "train_000001.bin").open("r+b") as file:
        file.seek(1100)
        file.write(b"\x01")
    with pytest.raises(InputError, match=r"train_000001.bin is damaged"):
        push_dataset(tmp_path / "out", "user/shards")


def test_strangers_links_and_secrets_beside_the_shards_are_not_uploaded(
    tmp_path, files, tokenizer, loopback_hub, monkeypatch
):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    out = tmp_path / "out"
    run(files, out, tokenizer)
    (out / "tokenizer/id_rsa").write_text("PRIVATE KEY")
    push_dataset(out, "user/shards")
    assert not [name for name in loopback_hub.files("user/shards", kind="dataset") if "id_rsa" in name]

    (out / "tokenizer/special_tokens_map.json").symlink_to(out / "tokenizer/id_rsa")
    with pytest.raises(InputError, match=r"special_tokens_map.json is a link"):
        push_dataset(out, "user/other")
    (out / "tokenizer/special_tokens_map.json").unlink()

    path = out / "tokenizer/tokenizer.json"
    whole, content = path.read_text(), json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[:2]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"is not the tokenizer that manifest.json names"):
        push_dataset(out, "user/other")
    path.write_text(whole)

    manifest = json.loads((out / "manifest.json").read_text())
    manifest["source"]["url"] = "https://me:opensesame@host/text"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest.json holds a secret"):
        push_dataset(out, "user/other")
    assert ("dataset", "user/other") not in loopback_hub.repos


@pytest.mark.slow
def test_datatrove_tasks_give_the_bytes_of_one_process(tmp_path, files, tokenizer, root):
    pytest.importorskip("datatrove")
    run(files, tmp_path / "one", tokenizer)
    command = ["--dataset", files, "--tokenizer", tokenizer, "--shard_tokens", 4000, "--workers", 2]
    command += ["--out", tmp_path / "two", "--executor", "datatrove"]
    result = subprocess.run(
        [sys.executable, root / "prepare_fineweb.py", *map(str, command)], capture_output=True, text=True, timeout=240
    )  # there the script is __main__
    assert result.returncode == 0, result.stderr
    assert same(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two")
    program = "import sys, prepare_fineweb; sys.exit(prepare_fineweb.main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert same(tmp_path / "one", tmp_path / "two")


def test_without_datatrove_its_executor_is_refused(tmp_path, files, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(InputError, match=r"--executor datatrove needs a package: pip install 'gpt2repro\[datatrove\]'"):
        run(files, tmp_path / "out", tokenizer, "--executor", "datatrove")


@pytest.mark.extra
def test_fast_tokenizer_gives_the_same_bytes(tmp_path, files, shared_data, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    run(files, tmp_path / "plain", "gpt2")
    run(files, tmp_path / "fast", "gpt2", "--fast_tokenizer")
    assert same(tmp_path / "plain", tmp_path / "fast")


def test_without_the_fast_tokenizer_s_package_tiktoken_does_the_work(tmp_path, files, shared_data, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    run(files, tmp_path / "out", "gpt2", "--fast_tokenizer")
    assert "gigatoken is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (["--num_nodes", "2", "--node_index", "2"], ["node_index=2 must be below num_nodes=2"]),
        (
            ["--num_nodes", "2", "--tokens", "9", "--val", "x"],
            ["tokens needs one machine", "val='x' must be first-shard"],
        ),
        (["--val", "1.5"], ["a fraction from 0 to below 1"]),
        (["--shard_tokens", "0"], ["--shard_tokens"]),
        (["--dataset", "{files}"], ["is one shard of about", "lower --shard_tokens or set --val to a fraction"]),
        (["--dataset", "{files}", "--text_column", "body"], ["no column 'body', only id, text"]),
        (["--tokenizer", "{files}"], ["no tokenizer could be loaded"]),
    ],
)
def test_bad_input_gets_a_sentence(tmp_path, files, tokenizer, arguments, sentences):
    defaults = [] if "--tokenizer" in arguments else ["--tokenizer", str(tokenizer)]
    arguments = [argument.replace("{files}", str(files)) for argument in arguments]
    with pytest.raises(InputError) as error:
        prepare_fineweb.main([*arguments, *defaults, "--out", str(tmp_path / "out")])
    assert all(sentence in str(error.value) for sentence in sentences)
    assert not (tmp_path / "out").exists()


def test_help_shows_the_commands(root):
    result = subprocess.run([sys.executable, root / "prepare_fineweb.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--num_nodes" in result.stdout and "sample-10BT" in result.stdout
