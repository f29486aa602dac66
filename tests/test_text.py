"""Files of text: every document once, in order, whatever the stretches; faults of the network and of the files."""

import gzip
import hashlib
import json
import random
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from gpt2repro.data import text as raw_text
from gpt2repro.data import text_io
from gpt2repro.data.preparation import prepare
from gpt2repro.data.shards import open_split
from gpt2repro.data.streaming import StreamSource
from gpt2repro.data.text import find_text
from gpt2repro.data.tokenization import char_tokenizer
from gpt2repro.options import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

chance = random.Random(0)
TEXTS = ["", "é🙂\u2028\r\n x\n", *("".join(chance.choices("abc é\n\t", k=chance.randrange(300))) for _ in range(500))]


def write_parquet(path, texts, rows=50, column="text"):
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=rows)
    return path


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(files, shard_tokens=1000, **options):
    units = files.units(shard_tokens, **options)
    units = json.loads(json.dumps(units))  # as they come back from plan.json
    return ["".join(text for text, _ in document) for unit in units for document in files.read(unit)], units


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
@pytest.mark.parametrize("shard_tokens", [1, 100, 3000, 10**9])
def test_every_row_is_read_once_and_in_order_whatever_the_stretches(tmp_path, write, shard_tokens, monkeypatch):
    monkeypatch.setattr(text_io, "BLOCK_BYTES", 97)
    suffix = write.__name__.removeprefix("write_")
    write(tmp_path / f"b.{suffix}", TEXTS[200:])
    write(tmp_path / f"a.{suffix}", TEXTS[:200])
    found, units = documents(find_text([str(tmp_path)]), shard_tokens)
    assert found == TEXTS
    assert (len(units) == 1) == (shard_tokens == 10**9)


def test_null_rows_are_no_documents_and_counted_and_empty_ones_are_documents(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", ["a", None, "", "b"])
    write_jsonl(tmp_path / "b.jsonl", ["c", None, "", "d"])
    files = find_text([str(tmp_path)])
    for _ in range(2):  # the text is read twice: for a vocabulary, then for the tokens
        assert documents(files)[0] == ["a", "", "b", "c", "", "d"]
    files.reading.tell()
    assert capsys.readouterr().err == "2 rows without text (null) were left out\n"


def written(path, texts):
    """The texts in a file, however it is called."""
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if path.suffix == ".parquet":
        return write_parquet(path, texts, rows=7)
    content = rows.encode() if "json" in path.name else "".join(text for text in texts if text).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def cut_by_hand(texts, size):
    """The documents of a plain text: its lines, by the stretch of `size` bytes in which each begins."""
    found, position = {}, 0
    for line in "".join(text for text in texts if text).encode().split(b"\n")[:-1]:
        found[position // size] = found.get(position // size, b"") + line + b"\n"
        position += len(line) + 1
    return [document.decode() for document in found.values()]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.ndjson", "a.parquet", "a.txt.gz", "a.jsonl.gz"])
def test_both_doors_give_the_same_documents_and_tokens_in_file_order(tmp_path, monkeypatch, name):
    monkeypatch.setattr(raw_text, "TEXT_DOCUMENT_BYTES", 256)
    monkeypatch.setattr(raw_text, "LINES_GROUP_BYTES", 1024)
    texts = [f"{i}: é🙂\u2028\x85 line\r\nand another {'word ' * (i % 60)}\n" for i in range(200)]
    texts[3:3] = [None, "x" * 3000 + "\n"]
    path = written(tmp_path / name, texts)
    rows = "txt" not in name and "md" not in name
    expected = [row for row in texts if row is not None] if rows else cut_by_hand(texts, 256)

    files = find_text([str(path)], document_bytes=256)
    prepared, units = documents(files, 300)
    assert prepared == expected and (len(units) > 3 or name.endswith("gz"))
    tokenizer = char_tokenizer(expected)
    source = {"source": files.source, "settings": {}, "show_progress": False}
    prepare(tmp_path / "out", tokenizer, units, files.read, **source)
    shards = open_split(tmp_path / "out", "train")

    stream = StreamSource(
        raw_text.resolve(str(path)), tokenizer=tokenizer, seq_len=8, seed=0, lanes=1, cache_dir=tmp_path / "cache"
    )
    never, groups = threading.Event(), range(len(stream.source.groups))
    for group in groups:
        stream.cache.fetch(group, never)
    tokens = np.concatenate([stream.cache.read(group, never)[0] for group in groups])
    assert np.array_equal(tokens, shards.read(0, shards.tokens))
    ends = np.concatenate([np.array([*map(ord, document), 0]) for document in expected])
    assert len(tokens) == len(ends)  # a character is a token, and one more ends each document


def test_the_facts_that_name_a_stream_are_frozen_and_a_remembered_source_loads(tmp_path):
    path = written(tmp_path / "a.jsonl", TEXTS)
    source = raw_text.resolve(str(path))
    names = {"name", "kind", "files", "groups", "text_column", "config", "revision", "content"}
    decisive = {name: getattr(source, name) for name in names} | {"name": "", "files": ["a.jsonl"]}
    assert source.sha256 == hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    assert raw_text.TextSource(**json.loads(json.dumps(vars(source)))).sha256 == source.sha256


def test_json_lines_without_a_last_newline_and_with_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert documents(find_text([str(tmp_path)]), 1)[0] == ["a", "b"]


def test_text_files_are_documents_with_their_line_ends(tmp_path):
    (tmp_path / "b.txt").write_bytes("zwei\r\nné".encode())
    (tmp_path / "a.md").write_bytes(b"one")
    (tmp_path / "c.csv").write_bytes(b"not,text")
    (tmp_path / ".hidden.txt").write_bytes(b"no")
    found, units = documents(find_text([str(tmp_path)]))
    assert found == ["one", "zwei\r\nné"] and len(units) == 1


def test_packed_files_are_unpacked(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("né\n".encode() * 1000))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "x"}\n' * 3)
    assert documents(find_text([str(tmp_path)]))[0] == ["né\n" * 1000, "x", "x", "x"]


def test_a_packed_file_whose_package_is_missing_is_never_read_as_it_is(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(b"these bytes are no zstd frame")
    with pytest.raises(InputError, match=r"a.txt.zst can't be (unpacked here|read)"):
        documents(find_text([str(tmp_path)]))


def test_globs_and_several_inputs_are_sorted_each(tmp_path):
    for name in ("b.txt", "a.txt", "z.md"):
        (tmp_path / name).write_text(name)
    assert documents(find_text([str(tmp_path / "z.md"), str(tmp_path / "*.txt")]))[0] == ["z.md", "a.txt", "b.txt"]


@pytest.mark.parametrize("shard_tokens", [10, 200, 10**9])
def test_split_by_position_is_nanogpt_s_and_divides_large_files_without_changing_the_text(tmp_path, shard_tokens):
    text = "".join(chance.choices(["word", " ", "\n", "a\nb", "\n\n"], k=5000))
    (tmp_path / "a.txt").write_text(text)
    files = find_text([str(tmp_path / "a.txt")])
    units = files.units(shard_tokens, val_fraction=0.1)
    parts = {"train": "", "val": ""}
    ends = {"train": [], "val": []}
    for unit in units:
        for document in files.read(unit):
            for piece, end in document:
                parts[unit["split"]] += piece
                ends[unit["split"]].append(end)
    assert parts == {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    assert all(sum(flags) == 1 and flags[-1] for flags in ends.values())  # one document each
    assert (len(units) > 5) == (shard_tokens < 10**9)


def test_split_by_position_never_cuts_a_character(tmp_path):
    for length in range(10, 30):
        (tmp_path / "a.txt").write_text("🙂" * length, encoding="utf-8")
        found, _ = documents(find_text([str(tmp_path / "a.txt")]), val_fraction=0.1)
        assert "".join(found) == "🙂" * length


def test_memory_stays_small_for_a_row_group_of_any_size(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["some words of text " * 500] * 10_000, rows=10_000)  # 95 MB of text
    files = find_text([str(tmp_path)])
    (unit,) = files.units(10**9)
    next(iter(files.read(unit)))
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    count, most = 0, 0
    for document in files.read(unit):
        for text, _ in document:
            count += len(text)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert count == 95_000_000
    assert tracemalloc.get_traced_memory()[1] < 20_000_000 and most < 20_000_000
    tracemalloc.stop()


def test_renaming_a_directory_keeps_the_source_s_name_and_an_edit_changes_it(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    assert find_text([str(tmp_path / "x")]).source == find_text([str(tmp_path / "y")]).source
    (tmp_path / "y" / "a.txt").write_text("sane")
    assert find_text([str(tmp_path / "x")]).source != find_text([str(tmp_path / "y")]).source


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"good \xff bad", r"a.txt: byte 5 \(0xff\) is not UTF-8 .*convert the file to UTF-8"),
        ("a.txt", b"x" * 3_000_000 + b"\xe4", r"a.txt: byte 3000000 \(0xe4\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a.jsonl: byte 24 \(0xff\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{oops', r"line at byte 14, is not JSON"),
        ("a.jsonl", b'{"body": "a", "n": 1}', r"no column 'text', only body, n; set --text_column"),
        ("a.jsonl", b"[1]", r"no column 'text', only no columns but list"),
        ("a.jsonl", b'{"text": 7}', r"'text' holds int, not text"),
        ("a.parquet", b"PAR1 no", r"a.parquet is cut off, damaged or not parquet"),
        ("a.txt.gz", b"not gzip", r"a.txt.gz can't be read"),
        ("a.txt", b"", r"there is no text, the 1 files are empty"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        documents(find_text([str(tmp_path / name)]), 10**9)


def test_parquet_without_the_column_or_with_numbers_is_refused_before_any_work(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"], column="body")
    with pytest.raises(InputError, match=r"no column 'text', only id, body; set --text_column"):
        find_text([str(tmp_path)]).units(1000)
    with pytest.raises(InputError, match=r"'id' holds int64, not text"):
        find_text([str(tmp_path)], text_column="id").units(1000)
    assert documents(find_text([str(tmp_path)], text_column="body"))[0] == ["a"]


def test_a_damaged_page_is_a_sentence(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["word " * 2000] * 50)
    raw = bytearray(path.read_bytes())
    raw[400:480] = b"\xff" * 80
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"a.parquet"):
        documents(find_text([str(path)]))


def test_a_directory_without_text_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "texts").mkdir(parents=True)
    (tmp_path / "my" / "texts" / "thesis.docx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"no files matched my/texts .*looked for .parquet, .jsonl"):
        find_text(["my/texts"])


def test_nothing_matched_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"pdf")
    for inputs in ([str(tmp_path)], [str(tmp_path / "*.txt")], [str(tmp_path / "no.txt"), str(tmp_path / "a.pdf")]):
        with pytest.raises(InputError, match=r"no files matched .*looked for .parquet, .jsonl"):
            find_text(inputs)


# The Hub, on 127.0.0.1.


@pytest.fixture
def hub(loopback_hub, monkeypatch, tmp_path):
    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.001)))  # the clients wait as well
    monkeypatch.setattr(text_io, "RETRY_SECONDS", 0.001)
    return loopback_hub


def publish(hub, tmp_path, name="user/texts"):
    for i in range(2):
        path = write_parquet(tmp_path / f"{i}.parquet", TEXTS[250 * i : 250 * (i + 1)])
        hub.add_file(name, f"data/train-0000{i}-of-00002.parquet", path.read_bytes(), "dataset")
    return TEXTS[:500]


def test_a_hub_dataset_is_read_by_row_group_at_one_commit(hub, tmp_path):
    expected = publish(hub, tmp_path)
    files = find_text(["user/texts"])
    commit = files.source["revision"]
    assert len(commit) == 40 and files.source["dataset"] == "user/texts"
    assert all(len(file["sha256"]) == 64 and file["bytes"] for file in files.source["files"])
    hub.add_file("user/texts", "data/train-00000-of-00002.parquet", b"something new", "dataset")
    assert documents(files)[0] == expected
    assert documents(find_text([f"user/texts@{commit}"]))[0] == expected


def test_faults_of_the_network_are_retried_and_no_row_is_lost_or_doubled(hub, tmp_path, capsys):
    expected = publish(hub, tmp_path)
    files = find_text(["user/texts"])
    units = files.units(1000)
    hub.fail(r"GET .*resolve.*parquet", status=429, times=2)
    hub.fail(r"GET .*resolve.*parquet", status=503, times=7)
    hub.fail(r"GET .*resolve.*parquet", drop_after=100, times=3)
    found = ["".join(text for text, _ in document) for unit in units for document in files.read(unit)]
    assert found == expected


def test_copies_are_compared_with_the_hub_s_checksum(hub, tmp_path):
    expected = publish(hub, tmp_path)
    files = find_text(["user/texts"], copies=tmp_path / "copies")
    assert documents(files)[0] == expected
    others = [replace(file, sha256="0" * 64) for file in files.files]
    wrong = replace(files, files=others, copies=tmp_path / "others")
    with pytest.raises(InputError, match="arrived damaged"):
        documents(wrong)


def test_json_lines_of_the_hub_are_read_by_stretches(hub, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    hub.add_file("user/lines", "a.jsonl", path.read_bytes(), "dataset")
    found, units = documents(find_text(["user/lines"]), 1000)
    assert found == TEXTS and len(units) > 5


def test_other_formats_of_the_hub_come_through_datasets(hub, tmp_path):
    hub.add_file("user/table", "a.csv", b"id,text\n1,one\n2,two\n", "dataset")
    assert documents(find_text(["user/table"]))[0] == ["one", "two"]


def test_what_the_hub_refuses_is_a_sentence(hub, tmp_path):
    publish(hub, tmp_path)
    with pytest.raises(InputError, match=r"no file user/nothing here and no dataset user/nothing on the Hub"):
        find_text(["user/nothing"])
    with pytest.raises(InputError, match=r"the dataset user/texts has no revision v9"):
        find_text(["user/texts@v9"])
    with pytest.raises(InputError, match=r"user/texts can't be opened: .*sample-10BT"):
        find_text(["user/texts"], config="sample-10BT")


def test_a_network_that_stays_away_ends_with_a_sentence(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path)
    monkeypatch.setattr(text_io, "RETRIES", 2)
    files = find_text(["user/texts"])
    units = files.units(10**9)
    hub.fail(r"GET .*resolve.*parquet", status=503, times=10_000)
    with pytest.raises(InputError, match=r"can't be read after 2 retries .*503.*the same command continues"):
        [list(document) for document in files.read(units[0])]


def test_faults_that_may_pass_and_those_that_never_do():
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    unreachable, offline, absent = (LocalEntryNotFoundError("no copy here") for _ in range(3))
    unreachable.__cause__, offline.__cause__ = ConnectionError("no route"), OfflineModeIsEnabled("HF_HUB_OFFLINE")
    assert all(map(text_io.may_pass, (TimeoutError(), ConnectionResetError(), EOFError(), unreachable)))
    never = (FileNotFoundError(), PermissionError(), ValueError(), offline, absent, offline.__cause__)
    assert not any(map(text_io.may_pass, never))
