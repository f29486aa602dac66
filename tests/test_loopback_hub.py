"""The loopback Hub answers the clients' own code as the real one does; every other Hub test stands on that."""

import http.client
import subprocess
import sys

import pytest

ROWS = "\n".join(f'{{"text": "document {i}"}}' for i in range(20)).encode()


@pytest.fixture
def hub(loopback_hub, monkeypatch, tmp_path):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    return loopback_hub


@pytest.fixture
def api(hub):
    from huggingface_hub import HfApi

    return HfApi()


def test_a_commit_with_large_and_small_files_comes_back_whole(hub, api, tmp_path):
    from huggingface_hub import CommitOperationAdd, snapshot_download

    weights = bytes(range(256)) * 4000
    assert api.create_repo("user/model", private=True) == f"{hub.url}/user/model"
    operations = [CommitOperationAdd("model.safetensors", weights), CommitOperationAdd("sub/config.json", b"{}")]
    api.create_commit("user/model", operations, commit_message="first")
    assert hub.files("user/model") == {"model.safetensors": weights, "sub/config.json": b"{}"}
    local = snapshot_download("user/model", local_dir=tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == weights, local


def test_a_private_repository_is_invisible_without_the_token(hub, api):
    from huggingface_hub.errors import RepositoryNotFoundError

    api.create_repo("user/model", private=True)
    assert api.model_info("user/model").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/model", token=False)


def test_an_upload_survives_a_busy_server(hub, api):
    from huggingface_hub import CommitOperationAdd

    api.create_repo("user/model")
    hub.fail("PUT /lfs/", status=503)
    api.create_commit("user/model", [CommitOperationAdd("w.bin", b"x" * 100_000)], commit_message="first")
    assert [status for method, _, status in hub.requests if method == "PUT"] == [503, 200]


def test_a_dropped_upload_leaves_nothing_behind(hub):
    hub.add_repo("user/model")
    hub.fail("PUT /lfs/", drop_after=1000)
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    with pytest.raises(OSError):
        connection.request("PUT", f"/lfs/model/user/model/{'0' * 64}", body=b"x" * 10_000_000)
        connection.getresponse().read()
    assert hub.requests[-1][2] == 0 and not hub.repo("user/model").lfs


def test_a_download_that_breaks_off_is_made_good(hub, api, tmp_path):
    from huggingface_hub import hf_hub_download

    content = bytes(range(250)) * 400
    hub.add_file("user/model", "w.bin", content)
    hub.fail("GET .*/resolve/", drop_after=5000)
    path = hf_hub_download("user/model", "w.bin")
    with open(path, "rb") as file:
        assert file.read() == content
    assert len([path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]) == 2


def test_branches_and_tags_name_commits(hub, api):
    hub.add_file("user/model", "a.txt", b"one")
    api.create_tag("user/model", tag="v1")
    api.create_branch("user/model", branch="step-5")
    hub.add_file("user/model", "a.txt", b"two")
    assert hub.files("user/model", "v1") == hub.files("user/model", "step-5") == {"a.txt": b"one"}
    refs = api.list_repo_refs("user/model")
    assert ({b.name for b in refs.branches}, {t.name for t in refs.tags}) == ({"main", "step-5"}, {"v1"})


def test_datasets_streams_from_it_and_file_system_reads_ranges(hub, api):
    import datasets
    from huggingface_hub import HfFileSystem

    hub.add_file("user/corpus", "data/train.jsonl", ROWS, kind="dataset")
    rows = list(datasets.load_dataset("user/corpus", split="train", streaming=True))
    assert [row["text"] for row in rows] == [f"document {i}" for i in range(20)]
    with HfFileSystem().open("datasets/user/corpus/data/train.jsonl", "rb") as file:
        file.seek(100)
        assert file.read(20) == ROWS[100:120]


def test_a_fresh_process_reaches_it_through_hf_endpoint_alone(loopback_hub, tmp_path):
    loopback_hub.add_file("user/model", "config.json", b'{"model_type": "gpt2"}')
    code = "from huggingface_hub import hf_hub_download as d; print(open(d('user/model', 'config.json')).read())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=loopback_hub.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == '{"model_type": "gpt2"}', done.stderr
