"""Text tokenised while training: which window comes when, from every format, at every world size, after stops."""

import functools
import gzip
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from gpt2repro.data import streaming, text, text_io
from gpt2repro.data.ordering import skip_ahead
from gpt2repro.data.sources import merge_states, open_source, prefetch
from gpt2repro.data.text import Reading, TextSource, resolve
from gpt2repro.options import InputError

SEQ_LEN, SEQUENCES = 16, 4
FORMATS = ["parquet", "jsonl", "txt", "jsonl.gz", "csv"]


def documents(count):
    """Documents of 5 to 60 characters, each one recognisable."""
    return [f"[{number}]" + "abcdefghij klmnop"[number % 7 :] * (1 + number * 37 % 5) for number in range(count)]


def write(path, texts, rows_per_group=20):
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(
            pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=rows_per_group
        )
    elif path.name.endswith(".csv"):
        path.write_text("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)))
    elif path.name.endswith(".txt"):
        path.write_text("".join(text + "\n" for text in texts))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    from gpt2repro.data.tokenization import char_tokenizer

    return char_tokenizer(["".join(map(chr, range(32, 127))) + "\n"])


@pytest.fixture
def open_stream(tokenizer, tmp_path, monkeypatch):
    """open_stream(spec, …) with small groups, a cache of its own, and short pauses; collects what is reported."""
    monkeypatch.setattr("gpt2repro.data.text.LINES_GROUP_BYTES", 1024)
    monkeypatch.setattr("gpt2repro.data.text.TEXT_DOCUMENT_BYTES", 64)
    monkeypatch.setattr(streaming, "FEWEST_LANES", 8)
    monkeypatch.setattr(text_io, "RETRY_SECONDS", 0.01)
    reports = []

    def open_stream(spec, cache="cache", sequences=SEQUENCES, **options):
        options = {"seq_len": SEQ_LEN, "seed": 3, "workers": 1, "report": reports.append, **options}
        return open_source(
            f"stream:{spec}", tokenizer=tokenizer, sequences=sequences, cache_dir=tmp_path / cache, **options
        )

    open_stream.reports = reports
    return open_stream


@pytest.fixture(params=FORMATS)
def local_source(request, tmp_path):
    """Five files of one format, 300 documents."""
    texts, folder = documents(300), tmp_path / "text"
    folder.mkdir()
    for number in range(5):
        write(folder / f"part-{number}.{request.param}", texts[number * 60 : (number + 1) * 60])
    return folder


@pytest.fixture
def parquet_file(tmp_path):
    return write(tmp_path / "text.parquet", documents(300))


def take(source, count, state=None, world=1, sequences=SEQUENCES):
    """`count` global batches as (x, y, merged state), put together from `world` ranks with an iterator each."""
    state = json.loads(json.dumps(state or source.initial_state()))  # as a checkpoint keeps it
    ranks = [source.batches(state, rank=r, world=world, sequences=sequences) for r in range(world)]
    batches = []
    for _ in range(count):
        xs, ys, states = zip(*(next(rank) for rank in ranks), strict=True)
        batches.append((torch.cat(xs), torch.cat(ys), merge_states(list(states))))
    for rank in ranks:
        rank.close()
    return batches


def assert_same(some, others):
    assert len(some) == len(others)
    for (x, y, state), (other_x, other_y, other_state) in zip(some, others, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y) and state == other_state


def read_all(source, reading=None):
    """The documents of a source in file order."""
    reading = reading or Reading("text", strict=False, document_bytes=text.TEXT_DOCUMENT_BYTES)
    return [document for group in range(len(source.groups)) for document in source.read(group, reading)]


def lane_texts(source, batches, tokenizer):
    """What each lane said, from the batches alone."""
    rows = torch.cat([x for x, _, _ in batches])
    return [tokenizer.decode(rows[lane :: source.lanes].flatten().tolist()) for lane in range(source.lanes)]


def split_documents(text):
    """The documents that are complete in a lane's text."""
    return text.split("<|endoftext|>")[:-1]


# -- order -------------------------------------------------------------------------------------------------------------


def test_every_document_comes_once_per_epoch_and_never_a_held_out_one(open_stream, parquet_file, tokenizer):
    source = open_stream(parquet_file)
    held_out = split_documents(tokenizer.decode(source.validation.read(0, source.validation.tokens).tolist()))
    assert held_out == [text for row, text in enumerate(documents(300)) if row % 20 == 19]
    assert source.validation.documents == 15 and source.validation.bytes == sum(map(len, held_out))

    texts = lane_texts(source, take(source, 520), tokenizer)
    units_per_lane = source.units // source.lanes
    assert source.units % source.lanes == 0  # so that every lane has as many units in each epoch
    expected = set(documents(300)) - set(held_out)
    lanes = [split_documents(text) for text in texts]
    assert {document for lane in lanes for document in lane} == expected
    for epoch in range(2):
        seen = []
        for lane in range(source.lanes):
            units = [lane + source.lanes * (epoch * units_per_lane + i) for i in range(units_per_lane)]
            count = sum(len(source.unit_documents(u, ends_of(source, u))) for u in units)
            seen += lanes[lane][:count]
            del lanes[lane][:count]
        assert sorted(seen) == sorted(expected)


def ends_of(source, unit):
    return source.cache.read(source.unit_location(unit)[1], threading.Event())[1]


def test_documents_of_a_group_are_spread_over_lanes_and_shuffled(open_stream, parquet_file, tokenizer):
    source = open_stream(parquet_file)
    first = [text.split("<|endoftext|>")[0] for text in lane_texts(source, take(source, 8), tokenizer)]
    numbers = [int(text[1 : text.index("]")]) for text in first]
    assert len({number // 20 for number in numbers}) == 1  # 8 lanes share the first row group
    assert numbers != sorted(numbers)
    other_seed = open_stream(parquet_file, seed=4)
    assert not torch.equal(take(source, 1)[0][0], take(other_seed, 1)[0][0])


def test_targets_are_the_next_token_of_the_lane(open_stream, parquet_file):
    source = open_stream(parquet_file)
    batches = take(source, 30)
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    for lane in range(source.lanes):
        x, y = inputs[lane :: source.lanes].flatten(), targets[lane :: source.lanes].flatten()
        assert torch.equal(x[1:], y[:-1])


# -- exact resume, for every format ------------------------------------------------------------------------------------


def test_resumed_stream_equals_the_uninterrupted_one_at_every_world_size(open_stream, local_source):
    plain = take(open_stream(local_source), 60)  # more than one epoch
    state = plain[6][2]
    first = take(open_stream(local_source), 7, world=4)
    assert_same(first, plain[:7])
    for world in (1, 2, 4):  # an empty cache: everything is tokenised again
        resumed = take(open_stream(local_source, cache=f"cache-{world}"), 8, state, world=world)
        assert_same(resumed, plain[7:15])
        again = take(open_stream(local_source), 5, resumed[-1][2], world=4 // world)
        assert_same(again, plain[15:20])
    assert_same(take(open_stream(local_source), 10, plain[49][2], world=2), plain[50:])


def test_identity_follows_the_text_the_seed_and_the_lanes_but_not_the_place(open_stream, parquet_file, tmp_path):
    identity = open_stream(parquet_file).identity()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / parquet_file.name).write_bytes(parquet_file.read_bytes())
    assert json.loads(json.dumps(identity)) == identity
    assert open_stream(moved / parquet_file.name).identity() | {"source": identity["source"]} == identity
    assert open_stream(parquet_file, seed=9).identity() != identity
    assert open_stream(parquet_file, lanes=16).identity() != identity
    write(parquet_file, documents(299))
    assert open_stream(parquet_file).identity() != identity


def test_a_rank_reads_only_the_groups_of_its_lanes(open_stream, tmp_path, monkeypatch):
    path = write(tmp_path / "large.parquet", documents(1200), rows_per_group=20)
    read = []
    original = TextSource.read
    monkeypatch.setattr(TextSource, "read", lambda self, group, *how: read.append(group) or original(self, group, *how))
    source = open_stream(path, lanes=16, sequences=16)  # lanes 0-7 share a group, lanes 8-15 another
    read.clear()
    batches = source.batches(source.initial_state(), rank=0, world=2, sequences=16)
    next(batches)
    batches.close()
    assert len(read) == 2  # the group of the rank's first units and that of its next ones


def test_skipped_batches_are_left_out_and_the_others_stay(open_stream, parquet_file):
    source = open_stream(parquet_file)
    plain = take(source, 12)
    state = skip_ahead(plain[1][2], 4 * SEQUENCES, 6 * SEQUENCES + 1)  # touches a third batch
    rest = take(source, 7, state)
    expected = plain[2:4] + plain[7:12]
    for (x, _, after), (plain_x, _, plain_after) in zip(rest, expected, strict=True):
        assert torch.equal(x, plain_x) and after["position"] == plain_after["position"]
        assert after["lanes"] == plain_after["lanes"]


def test_prefetched_stream_publishes_the_state_of_the_last_consumed_batch(open_stream, parquet_file):
    source = open_stream(parquet_file)
    plain = take(source, 6)
    ahead = prefetch(source.batches(source.initial_state(), rank=0, world=1, sequences=SEQUENCES), depth=3)
    assert_same([next(ahead) for _ in range(6)], plain)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


def test_a_source_of_many_groups_holds_out_whole_ones(open_stream, tmp_path, tokenizer):
    path = write(tmp_path / "many.parquet", documents(500), rows_per_group=5)
    source = open_stream(path)
    assert source.validation.documents == 5
    held_out = split_documents(tokenizer.decode(source.validation.read(0, source.validation.tokens).tolist()))
    lanes = lane_texts(source, take(source, 600), tokenizer)
    seen = {document for lane in lanes for document in split_documents(lane)}
    assert seen == set(documents(500)) - set(held_out)


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_second_run_reads_the_cache_and_not_the_source(open_stream, parquet_file, monkeypatch):
    plain = take(open_stream(parquet_file), 40)

    def unreachable(self, group, *how):
        raise AssertionError("the source was read")

    monkeypatch.setattr(TextSource, "read", unreachable)
    assert_same(take(open_stream(parquet_file), 40), plain)


def test_damaged_cache_is_made_again_and_said_aloud(open_stream, parquet_file):
    source = open_stream(parquet_file)
    plain = take(source, 10)
    for number, path in enumerate(sorted(source.cache.directory.glob("group_*.bin"))):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else content[:-20] + b"\xff" * 20)
    assert_same(take(open_stream(parquet_file), 10), plain)
    assert any("is damaged" in report for report in open_stream.reports)


def test_bounded_cache_gives_the_same_batches(open_stream, parquet_file):
    plain = take(open_stream(parquet_file), 40)
    source = open_stream(parquet_file, cache="small", cache_gib=8e3 / 2**30)
    assert_same(take(source, 40), plain)
    assert sum(path.stat().st_size for path in source.cache.directory.glob("group_*.bin")) <= 8e3


def test_a_cached_file_that_another_process_removes_meanwhile_is_no_fault(open_stream, parquet_file, monkeypatch):
    source, stat = open_stream(parquet_file, cache="small", cache_gib=8e3 / 2**30), Path.stat
    take(source, 20)

    def gone(path, **how):
        if path.name.startswith("group_") and path.suffix == ".bin" and gone.path in (None, path):
            gone.path = path
            raise FileNotFoundError(path)
        return stat(path, **how)

    gone.path = None
    monkeypatch.setattr(Path, "stat", gone)
    source.cache._make_room(source.cache.directory / "group_none.bin")
    assert gone.path is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, where every write finds the disk full")
def test_full_disk_is_a_sentence(open_stream, parquet_file, monkeypatch):
    source = open_stream(parquet_file)
    aside = source.cache.directory / "group.bin.tmp-full"
    aside.symlink_to("/dev/full")
    monkeypatch.setattr("gpt2repro.files.name_aside", lambda path: aside)
    with pytest.raises(InputError, match=r"can't be written \(No space left on device\); .*set --cache_gib"):
        take(source, 1)
    assert not list(source.cache.directory.glob("*.tmp*"))


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="/dev/null, where no directory can be made")
def test_a_cache_that_cannot_be_made_is_a_sentence(open_stream, parquet_file):
    with pytest.raises(InputError, match=r"the cache /dev/null/.* can't be made \(Not a directory\); choose another"):
        open_stream(parquet_file, cache="/dev/null")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_sources_are_sentences(open_stream, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"broken.parquet is cut off, damaged or not parquet"):
        open_stream(tmp_path / "broken.parquet")
    with pytest.raises(InputError, match="names no file here"):
        open_stream(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="no column 'body', only id, text; set --text_column"):
        open_stream(write(tmp_path / "text.parquet", documents(50)), text_column="body")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(InputError, match="the line at byte 17, is not JSON"):
        open_stream(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no text"):
        open_stream(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="has 5 documents, too few for 8 lanes"):
        open_stream(write(tmp_path / "few.jsonl", documents(5)))
    with pytest.raises(InputError, match="several formats"):
        open_stream(tmp_path)


def test_impossible_batches_and_foreign_states_are_sentences(open_stream, parquet_file):
    with pytest.raises(
        InputError, match="10 lanes are not a multiple of the batch's 4 sequences; set --stream_lanes 8"
    ):
        open_stream(parquet_file, lanes=10)
    source = open_stream(parquet_file)
    with pytest.raises(InputError, match="does not divide among 3 processes"):
        source.batches(source.initial_state(), rank=0, world=3, sequences=SEQUENCES)
    half = next(source.batches(source.initial_state(), rank=0, world=2, sequences=SEQUENCES))[2]
    with pytest.raises(InputError, match="does not belong to"):
        source.batches(half, rank=0, world=1, sequences=SEQUENCES)
    with pytest.raises(InputError, match="set --vocab_size"):
        open_stream(parquet_file, vocab_size=50)


def test_empty_documents_and_null_rows_do_not_count(open_stream, tmp_path):
    texts = documents(100)
    write(tmp_path / "plain.jsonl", texts)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[10:10] = ["", '{"text": ""}', '{"text": null}']
    (tmp_path / "holes.jsonl").write_text("\n".join(lines))
    plain, holes = (read_all(resolve(str(tmp_path / name))) for name in ("plain.jsonl", "holes.jsonl"))
    assert plain == holes == texts


def test_lines_are_cut_into_groups_without_loss_at_any_border(tmp_path, monkeypatch):
    texts = [*documents(50), "x" * 500, "ü" * 40]
    path = write(tmp_path / "text.jsonl", texts)
    for size in (1, 7, 64, 65, 1000, 100_000):
        monkeypatch.setattr("gpt2repro.data.text.LINES_GROUP_BYTES", size)
        source = resolve(str(path))
        assert read_all(source) == texts
    text_file = write(tmp_path / "text.txt", texts)
    assert "".join(read_all(resolve(str(text_file)))) == text_file.read_text(encoding="utf-8")


def test_null_rows_are_counted_and_bad_utf_8_is_replaced_and_located_once_however_often_it_is_read(tmp_path):
    bad = b'{"text": "caf\xe9 \xff \xef\xbf\xbd"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": null}\n' + bad + b'{"text": null}\n')
    (tmp_path / "b.txt").write_bytes(b"plain\n" * 20 + b"\xff" + b"plain\n" * 20)
    reports = []
    reading = Reading("text", strict=False, document_bytes=64, report=reports.append)
    for _ in range(2):
        assert read_all(resolve(str(tmp_path / "a.jsonl")), reading) == ["good", "caf\ufffd \ufffd \ufffd"]
        reading.tell()
    assert reports == [
        "2 rows without text (null) were left out",
        f"2 times U+FFFD stands for what is no UTF-8, first at byte 45 of {tmp_path / 'a.jsonl'}",
    ]
    assert "".join(read_all(resolve(str(tmp_path / "b.txt")), reading)).count("\ufffd") == 1


def test_a_stream_goes_on_over_bad_utf_8_and_says_so(open_stream, tmp_path):
    lines = [json.dumps({"text": text}).encode() for text in documents(300)]
    lines[100] = lines[100].replace(b"]", b"]\xff")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    take(open_stream(tmp_path / "a.jsonl"), 10)
    assert any("1 times U+FFFD stands for what is no UTF-8, first at byte" in report for report in open_stream.reports)


# -- the Hub and its faults --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(loopback_hub, monkeypatch, tmp_path, parquet_file):
    """A Hub with 300 documents in user/text; its clients do not pause, and do not retry, on their own."""
    pytest.importorskip("datasets")
    from huggingface_hub import hf_file_system
    from huggingface_hub.utils import http_backoff

    loopback_hub.adopt_clients(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(hf_file_system, "http_backoff", functools.partial(http_backoff, max_retries=0))
    loopback_hub.add_file("user/text", "data/train-0.parquet", parquet_file.read_bytes(), "dataset")
    return loopback_hub


def test_hub_dataset_is_pinned_and_gives_the_batches_of_the_same_local_file(hub, open_stream, parquet_file):
    source = open_stream("user/text")
    revision = source.identity()["revision"]
    plain = take(source, 30)
    assert_same(take(open_stream(parquet_file), 30), plain)
    hub.add_file("user/text", "data/train-1.parquet", parquet_file.read_bytes(), "dataset")
    assert open_stream("user/text").identity()["sha256"] != source.identity()["sha256"]
    again = open_stream(f"user/text@{revision}", cache="another")
    assert again.identity()["sha256"] == source.identity()["sha256"]
    assert_same(take(again, 30), plain)


@pytest.mark.parametrize(
    "fault", [{"status": 429, "headers": {"Retry-After": "0"}}, {"status": 503}, {"drop_after": 100}, {"drop_after": 0}]
)
def test_faults_of_the_hub_are_retried_reported_and_change_nothing(hub, open_stream, parquet_file, fault):
    plain = take(open_stream(parquet_file), 30)
    hub.fail(r"GET .*/(revision|resolve)/.*", times=2, **fault)
    source = open_stream("user/text")
    hub.fail(r"GET .*parquet", times=3, **fault)
    assert_same(take(source, 30), plain)
    assert len([report for report in open_stream.reports if "trying again in" in report]) >= 4


def test_an_outage_does_not_stop_a_run_whose_groups_are_cached(hub, open_stream):
    source = open_stream("user/text")
    plain = take(source, 30)
    hub.fail("", status=503, times=10**6)
    restarted = open_stream("user/text")
    assert restarted.identity() == source.identity()
    assert_same(take(restarted, 25, plain[4][2], world=2), plain[5:])
    assert any("the Hub is out of reach" in report for report in open_stream.reports)


def test_an_endless_outage_ends_with_a_sentence(hub, open_stream, monkeypatch):
    monkeypatch.setattr(text_io, "RETRIES", 3)
    source = open_stream("user/text")
    hub.fail("GET .*parquet", status=502, times=10**6)
    with pytest.raises(InputError, match=r"after 3 retries .*the same command continues where it was"):
        take(source, 1)


def test_closing_a_stream_that_waits_for_the_hub_is_prompt(hub, open_stream, monkeypatch):
    monkeypatch.setattr(text_io, "RETRY_SECONDS", 60.0)
    source = open_stream("user/text")
    hub.fail("GET .*parquet", status=502, times=10**6)
    ahead = prefetch(source.batches(source.initial_state(), rank=0, world=1, sequences=SEQUENCES), depth=1)
    while not open_stream.reports:
        time.sleep(0.01)
    begin = time.monotonic()
    ahead.close()
    assert time.monotonic() - begin < 5


def test_missing_datasets_configurations_and_revisions_are_sentences(hub, open_stream):
    with pytest.raises(InputError, match="no dataset user/nothing on the Hub"):
        open_stream("user/nothing")
    with pytest.raises(InputError, match="no revision v9"):
        open_stream("user/text@v9")
    with pytest.raises(InputError, match="sample-10BT"):
        open_stream("user/text:sample-10BT")
    hub.add_file("user/tables", "train.csv", b"a,b\n1,2\n3,4\n", "dataset")
    with pytest.raises(InputError, match="no column 'text'"):
        open_stream("user/tables")


def test_jsonl_and_csv_on_the_hub_give_the_batches_of_local_files(hub, open_stream, tmp_path):
    for name in ("text.jsonl", "text.csv"):
        path = write(tmp_path / name, documents(200))
        hub.add_file(f"user/{path.suffix[1:]}", "train" + path.suffix, path.read_bytes(), "dataset")
        assert_same(take(open_stream(f"user/{path.suffix[1:]}"), 20), take(open_stream(path), 20))


# -- through the training script ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_on_a_stream_continues_exactly_on_two_processes(tokenizer, parquet_file, run_program, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    numbers = {"max_steps": 8, "save_steps": 4, "eval_steps": 4, "batch_tokens": 256, "seq_len": 32, "n_positions": 32}
    numbers |= {"micro_batch_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 32, "warmup_steps": 2, "sample_tokens": 0}
    options = [
        f"--data=stream:{parquet_file}",
        f"--tokenizer={tmp_path / 'tokenizer'}",
        f"--cache_dir={tmp_path}/cache",
    ]
    options += [f"--run_dir={tmp_path / 'run'}", *(f"--{name}={value}" for name, value in numbers.items())]

    def losses():
        records = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    once = run_program(["train_accelerate.py", *options])
    assert once.returncode == 0, once.stderr
    uninterrupted = losses()
    for path in (tmp_path / "run/checkpoints").iterdir():
        if path.name != "step_000004":
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    script = Path(__file__).parent.parent / "train_accelerate.py"
    again = run_program(["-m", "torch.distributed.run", "--nproc_per_node=2", script, *options])
    assert again.returncode == 0, again.stderr
    assert "at step 4" in again.stdout + again.stderr
    assert losses() == pytest.approx(uninterrupted, abs=1e-5) and len(uninterrupted) == 8
