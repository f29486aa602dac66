"""The log of a run: whole after any death, continued on resume, read back from the trackers' files, free of secrets."""

import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time

import pytest

from gpt2repro.redaction import scrub
from gpt2repro.training import tracking
from gpt2repro.training.metrics_log import cut_metrics, read_metrics
from gpt2repro.training.tracking import RunLog


@pytest.fixture(autouse=True)
def accelerate_is_there(fresh_accelerate):
    """A tracker of Accelerate asks which process is the main one."""
    from accelerate import PartialState

    PartialState(cpu=True)


def run_log(run_dir, **changes) -> RunLog:
    arguments = {"config": {}, "trackers": [], "project": "test", "run_ids": None, "resume_step": None, "is_main": True}
    return RunLog(run_dir, **{**arguments, **changes})


def steps(run_dir) -> list[int]:
    train, _ = read_metrics(run_dir)
    return [record["step"] for record in train]


def test_records_come_back_as_they_were_given(tmp_path):
    log = run_log(tmp_path)
    log.log({"step": 1, "loss": 0.1 + 0.2, "lr": 6e-5})
    log.log({"step": 1, "val_loss": 2.5, "note": "below the reference"})
    log.log({"step": 2, "loss": math.nan, "grad_norm": math.inf})
    log.close()
    train, evaluations = read_metrics(tmp_path)
    assert train == [{"step": 1, "loss": 0.1 + 0.2, "lr": 6e-5}, {"step": 2, "loss": None, "grad_norm": None}]
    assert evaluations == [{"step": 1, "val_loss": 2.5, "note": "below the reference"}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # every line is JSON for any reader


def test_resume_cuts_the_log_back_to_the_checkpoint(tmp_path):
    log = run_log(tmp_path)
    for step in range(1, 8):
        log.log({"step": step, "loss": 1 / step})
        log.samples(step, ["text"])
    log.log({"step": 4, "val_loss": 9.0})
    log.close()
    log = run_log(tmp_path, resume_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4] and len(read_metrics(tmp_path)[1]) == 1
    assert sorted(path.name for path in (tmp_path / "samples").iterdir())[-1] == "step_000004.md"
    log.log({"step": 5, "loss": 0.5})
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    run_log(tmp_path, resume_step=None).close()
    assert steps(tmp_path) == []  # from the start: nothing of an earlier attempt stays
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', '{"step"\n', "\x00\x00\x00", "[4]\n", "\xff"]
)
def test_a_torn_last_line_is_left_out_by_the_reader_and_the_cut(tmp_path, torn):
    whole = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((whole + torn).encode("latin-1"))
    assert steps(tmp_path) == [1, 2, 3]
    cut_metrics(path, 9)
    assert path.read_text() == whole


def test_a_killed_process_leaves_every_line_it_logged(tmp_path):
    code = (
        "import sys; from gpt2repro.training.tracking import RunLog\n"
        "log = RunLog(sys.argv[1], config={}, trackers=[], project='', run_ids=None, resume_step=None, is_main=True)\n"
        "for step in range(1, 10**9): log.log({'step': step, 'loss': 1.0}); print(step, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        seen = int(process.stdout.readline())
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    seen = int((process.communicate(timeout=30)[0].splitlines() or [seen])[-1])
    logged = steps(tmp_path)
    assert logged == list(range(1, len(logged) + 1)) and len(logged) >= seen


def test_processes_other_than_the_main_one_write_nothing(tmp_path):
    log = run_log(tmp_path / "run", trackers=["tensorboard", "wandb"], is_main=False, run_ids={"wandb": "kept"})
    log.log({"step": 1, "loss": 1.0})
    log.samples(1, ["text"])
    log.status("running", 1)
    log.checkpoint_link(1, "x")
    log.close()
    assert not (tmp_path / "run").exists() and log.run_ids == {"wandb": "kept"}


def test_status_is_replaced_whole_and_holds_no_secret(tmp_path):
    log = run_log(tmp_path)
    log.status("running", 5)
    log.status("failed", 6, exit_code=4, message="upload with hf_abcdefghijklmnopqrstuvwx was refused")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "failed", "step": 6, "exit_code": 4, "message": "upload with [hidden] was refused"}
    log.close()
    log.close()


class Faulty:
    """A tracker that works once."""

    calls = 0

    def log(self, record):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("disk of hf_abcdefghijklmnopqrstuvwx on fire")

    def finish(self):
        raise AssertionError("a dropped tracker is not called again")


def test_a_failing_rank_leaves_its_message_without_home_directories(tmp_path):
    log = run_log(tmp_path, is_main=False)
    log.status("running", 1)
    assert not (tmp_path / "status.json").exists()
    log.failed(1, 1, "rank 1: no /home/me/data")
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "rank 1: no ~/data"


def test_a_tracker_that_raises_is_named_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    opened = {"tensorboard": Faulty, "wandb": lambda: 1 / 0}
    monkeypatch.setattr(tracking, "_open_tracker", lambda name, *arguments, **named: opened[name]())
    log = run_log(tmp_path, trackers=["tensorboard", "wandb"], run_ids={"wandb": "abc"})
    for step in range(1, 6):
        log.log({"step": step, "loss": 1.0})
    log.close()
    said = capsys.readouterr().err
    assert said.count("tensorboard failed") == 1 and said.count("wandb failed") == 1 and "hf_" not in said
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert log.run_ids == {"wandb": "abc"}  # a later resume tries the same run again


def test_secrets_are_hidden_by_name_by_look_and_by_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    config = {
        "hub_token": "anything",
        "api_key": "short",
        "nested": {
            "password": "p",
            "list": ["see https://me:secret@host/x", "key 0123456789abcdef0123456789abcdef01234567"],
        },
        "note": "hf_abcdefghijklmnopqrstuvwx and sk-abcdefghijklmnopqrstuvwx",
        "batch_tokens": 524288,
        "tokenizer": "gpt2",
        "revision": "89abcdef0123456789abcdef0123456789abcdef",
        "eos_token_id": 50256,
        "none_token": None,
    }
    assert scrub(config) == {
        "hub_token": "[hidden]",
        "api_key": "[hidden]",
        "nested": {"password": "[hidden]", "list": ["see https://[hidden]@host/x", "key [hidden]"]},
        "note": "[hidden] and [hidden]",
        "batch_tokens": 524288,
        "tokenizer": "gpt2",
        "revision": "89abcdef0123456789abcdef0123456789abcdef",
        "eos_token_id": 50256,
        "none_token": None,
    }


@pytest.mark.parametrize(
    "text",
    [
        "https://me:SECRETSECRET@host/x",
        "https://me:SECRET@SECRET@host/x",
        "redis://:SECRETSECRET@host/0",
        "https://SECRETSECRETSECRETSECRET@host/x.git",
        "https://host/x?token=SECRETSECRET&page=2",
        "Authorization: Bearer SECRETSECRETSECRET",
        "glpat-SECRETSECRETSECRETSEC",
        "HF_TOKEN='SECRETSECRET'",
        "api_key=SECRETSECRET",
        '{"password": "SECRETSECRET"}',
        "password: SECRETSECRET",
        "the SECRET-of-the-environment",
    ],
)
def test_a_secret_in_a_text_is_hidden(monkeypatch, text):
    for name in ("PGPASSWORD", "DB_PASS", "SMTP_PWD", "MY_PAT"):
        monkeypatch.setenv(name, "SECRET-of-the-environment")
        assert "SECRET" not in (clean := scrub(text)) and "[hidden]" in clean
        assert scrub(clean) == clean
        monkeypatch.delenv(name)
        if "environment" not in text:
            break


def test_a_short_secret_of_the_environment_is_hidden_as_a_whole_word_unless_it_is_an_ordinary_one(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "hunt3r")
    assert scrub("psql -W hunt3r, user:hunt3r") == "psql -W [hidden], user:[hidden]"
    assert scrub("/data/hunt3rs/my_hunt3r") == "/data/hunt3rs/my_hunt3r"
    for ordinary in ("data", "1234", "v1", ""):
        monkeypatch.setenv("DB_PASSWORD", ordinary)
        assert scrub("data/v1/1234 of data") == "data/v1/1234 of data"


def test_a_text_without_secrets_stays_as_it_is():
    for text in (
        "tokenizer: gpt2",
        "batch_tokens=524288 val_tokens: 10485760",
        "bos_token: <|end|>",
        "http://host:8080/x?page=2",
        "me@host, see https://host/@me",
        "sorted(items, key=itemgetter(1))",
    ):
        assert scrub(text) == text


def test_tensorboard_files_read_back_as_one_run_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run_log(tmp_path, trackers=["tensorboard"], config={"lr": 1e-3, "hub_token": "hidden-thing"})
    for step in range(1, 7):
        log.log({"step": step, "loss": 10.0 + step, "lr": 1e-3, "compiled": True, "note": "text"})
    log.log({"step": 3, "val_loss": 2.0})
    log.samples(3, ["# not a heading"])
    log.checkpoint_link(3, "checkpoints/step_000003")
    again = run_log(tmp_path, trackers=["tensorboard"], run_ids=log.run_ids, resume_step=3)
    for step in range(4, 7):
        again.log({"step": step, "loss": 20.0 + step, "lr": 1e-3})
    again.close()
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert set(scalars) == {"loss", "lr", "val_loss"}
    assert scalars["loss"] == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]
    assert scalars["val_loss"] == [(3, 2.0)]
    texts = {
        tag.split("/")[0]: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert texts["samples"] == "    # not a heading" and texts["checkpoint"] == "checkpoints/step_000003"
    assert "lr: 0.001" in texts["config"] and "hidden-thing" not in texts["config"]


def read_wandb_file(path) -> list:
    """Records of an offline W&B run. wandb 0.31 ships no reader, so this is one.

    The file is LevelDB's log format (32 KiB blocks of chunks: crc32, length, type) behind 7 bytes of W&B's own, each
    record a protobuf message. Source: github.com/google/leveldb, doc/log_format.md.
    """
    record_type = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data = path.read_bytes()
    assert data[:4] == b":W&B", "another file format than that of wandb 0.31"
    records, chunks, position = [], b"", 7
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # a block's end too short for a chunk header is padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunks += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last chunk
            records.append(record_type.FromString(chunks))
            chunks = b""
    return records


def test_an_offline_wandb_run_reads_back_and_a_resume_continues_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    arguments = []
    real_init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **named: arguments.append(named) or real_init(**named))
    run_dir = tmp_path / "my-run"

    log = run_log(run_dir, trackers=["wandb"], project="p", config={"n_layer": 12, "hub_token": "hidden-thing"})
    log.log({"step": 1, "loss": 3.5})
    log.log({"step": 2, "loss": 3.25, "skipped": [[4, 8]]})
    log.samples(2, ["once upon"])
    log.checkpoint_link(2, "https://huggingface.co/me/model/tree/step-2")
    log.close()
    time.sleep(1.1)  # W&B names the directory of an offline run by the second
    again = run_log(
        run_dir, trackers=["wandb"], project="p", run_ids=json.loads(json.dumps(log.run_ids)), resume_step=2
    )
    again.log({"step": 3, "loss": 3.0})
    again.close()

    run_id = log.run_ids["wandb"]
    assert [(named["id"], named["resume"], named["project"]) for named in arguments] == [(run_id, "allow", "p")] * 2
    first, second = sorted(
        run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert b"hidden-thing" not in first.read_bytes()

    def history(records):
        rows = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    records = read_wandb_file(first)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {(update.key or "/".join(update.nested_key)): update.value_json for update in run.config.update}
    assert (run.run_id, run.project, run.display_name) == (run_id, "p", "my-run")
    assert config["n_layer"] == "12" and config["hub_token"] == '"[hidden]"'
    metric = next(record.metric for record in records if record.WhichOneof("record_type") == "metric")
    assert (metric.glob_name, metric.step_metric) == ("*", "step")
    rows = history(records)
    assert rows[:2] == [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 3.25, "skipped": [[4, 8]]}]
    assert rows[2]["step"] == 2 and rows[2]["samples/_type"] == "table-file"
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    link = next(artifact for artifact in artifacts if artifact.type == "model")
    assert json.loads(link.metadata) == {"step": 2, "location": "https://huggingface.co/me/model/tree/step-2"}
    assert "step-2" in link.aliases

    kinds, end = set(), time.monotonic() + 60
    while "run" not in kinds:
        assert time.monotonic() < end  # on a busy machine W&B's own process writes the file after `finish` returned
        time.sleep(0.2)
        records = read_wandb_file(second)
        kinds = {record.WhichOneof("record_type") for record in records}
    assert next(r.run.run_id for r in records if r.WhichOneof("record_type") == "run") == run_id
    assert history(records) == [{"step": 3, "loss": 3.0}]


def test_a_trackio_run_is_local_and_a_resume_continues_it(tmp_path):
    """In a process of its own: trackio reads its directory when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import json, sys; from gpt2repro.training.tracking import RunLog; from accelerate import PartialState\n"
        "PartialState(cpu=True); ids, step = json.loads(sys.argv[2]), int(sys.argv[3])\n"
        "named = {'config': {'lr': 1e-3, 'hub_token': 'hidden-thing'}, 'trackers': ['trackio'], 'project': 'p'}\n"
        "log = RunLog(sys.argv[1], **named, run_ids=ids, resume_step=step or None, is_main=True)\n"
        "log.log({'step': step + 1, 'loss': 3.5}); log.samples(step + 1, ['once upon']); log.close()\n"
        "print('ids:' + json.dumps(log.run_ids), file=sys.stderr)"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    ids = "null"
    for step in (0, 1):
        command = [sys.executable, "-c", code, str(tmp_path / "my-run"), ids, str(step)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
        ids = next(line for line in done.stderr.splitlines() if line.startswith("ids:")).removeprefix("ids:")
    (database,) = (tmp_path / "trackio").glob("p*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {f"my-run-{json.loads(ids)['trackio']}"}
    records = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, record["loss"]) for step, record in records if "loss" in record] == [(1, 3.5), (2, 3.5)]
    assert b"hidden-thing" not in database.read_bytes()


def test_links_from_the_writing_thread_do_not_disturb_the_log(tmp_path):
    log = run_log(tmp_path, trackers=["tensorboard"])
    thread = threading.Thread(target=lambda: [log.checkpoint_link(step, "x") for step in range(50)])
    thread.start()
    for step in range(1, 51):
        log.log({"step": step, "loss": 1.0})
    thread.join()
    log.close()
    assert steps(tmp_path) == list(range(1, 51))


def test_a_resume_says_which_steps_the_log_has_lost(tmp_path, capsys):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 3, 6, 7, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    run_log(tmp_path, resume_step=9).close()
    lost = [
        line.removeprefix("warning: metrics.jsonl has lost the steps ") for line in capsys.readouterr().err.splitlines()
    ]
    assert lost == ["1 to 1", "4 to 5", "9 to 9"]
    (tmp_path / "metrics.jsonl").unlink()
    run_log(tmp_path, resume_step=3).close()
    assert "has lost the steps 1 to 3" in capsys.readouterr().err
    run_log(tmp_path, resume_step=None).close()
    assert capsys.readouterr().err == ""


def test_a_long_log_is_read_thinly_with_all_its_evaluations(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as out:
        for step in range(1, 10_001):
            out.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            if step % 997 == 0:
                out.write(json.dumps({"step": step, "val_loss": 2.0}) + "\n")
    train, evaluations = read_metrics(tmp_path, at_most=100)
    assert 90 <= len(train) <= 101 and train[0]["step"] == 1 and train[-1]["step"] > 9_800
    assert [record["step"] for record in evaluations] == [997 * n for n in range(1, 11)]
