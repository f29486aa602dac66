"""files.py: whole or not there, and suspicious of what others wrote."""

import hashlib
import json
import os

import pytest

from gpt2repro.files import (
    atomic_file,
    check_outputs,
    is_plain_name,
    read_json,
    read_json_if_whole,
    read_json_lines,
    sha256_of,
    step_in_name,
    write_json,
)
from gpt2repro.options import InputError


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have a name")
def test_a_device_or_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """As root, `gpt2repro compare … --out /dev/null` left an ordinary file in the place of the device."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [1])
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 100) == b"[\n 1\n]\n"
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write("half of the new")
        raise RuntimeError("the disk is full")
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    with atomic_file(tmp_path / "b", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("other", ["a", "x/../a", "linked/a", "link", "hard", "dangling"])
def test_two_results_for_one_file_are_refused_whatever_it_is_called(tmp_path, other):
    if other == "dangling":
        (tmp_path / "dangling").symlink_to("a")
    else:
        (tmp_path / "a").write_text("kept")
        (tmp_path / "linked").symlink_to(tmp_path)
        (tmp_path / "link").symlink_to("a")
        (tmp_path / "hard").hardlink_to(tmp_path / "a")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="two results would be written"):
        check_outputs(tmp_path / "a", tmp_path / other)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_sha256_is_that_of_hashlib_over_several_blocks(tmp_path):
    content = bytes(range(256)) * 10_000  # 2.5 blocks
    (tmp_path / "x").write_bytes(content)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"a": ' * 100_000, "1" * 5000, "\xff", '{"a": NaN'],
    ids=["empty", "torn", "list", "deep", "digits", "latin-1", "torn NaN"],
)
def test_json_that_is_none_gets_a_sentence_with_the_files_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(path)
    assert read_json_if_whole(path) is None


def test_a_json_file_larger_than_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2repro.files.LARGEST_JSON_BYTES", 100)
    write_json(tmp_path / "x.json", {"a": "b" * 100})
    with pytest.raises(InputError, match="more than 100 are not read"):
        read_json(tmp_path / "x.json")


def test_json_lines_end_at_a_newline_and_nowhere_else(tmp_path):
    texts = ["one\u2028line", "next\u0085line", "carriage\rreturn"]
    path = tmp_path / "x.jsonl"
    path.write_text(
        "\n".join(json.dumps({"t": text}, ensure_ascii=False) for text in texts) + "\n\n", "utf-8", newline=""
    )
    assert [value["t"] for _, value in read_json_lines(path)] == texts


@pytest.mark.parametrize(
    "line", ["{", '{"a": ' * 100_000, "9" * 5000, "\xff"], ids=["torn", "deep", "digits", "latin-1"]
)
def test_a_line_that_is_no_json_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=r"x\.jsonl, line 2"):
        list(read_json_lines(path))


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2repro.files.LARGEST_LINE_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b" " * 5000)
    with pytest.raises(InputError, match="longer than 1000 bytes"):
        list(read_json_lines(tmp_path / "x.jsonl"))


def test_plain_names_stay_inside_and_mean_the_same_everywhere():
    assert all(map(is_plain_name, ["a", "a/b.txt", "..a", "a..b/c"]))
    assert not any(map(is_plain_name, ["", "/a", "../a", "a/../b", "a\\b", "c:x", "a\0"]))


def test_a_step_is_read_from_directories_and_files(tmp_path):
    assert [step_in_name(tmp_path / name) for name in ("step_000500", "step_1234567.md", "best")] == [500, 1234567, 0]
