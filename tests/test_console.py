"""What a run says: plain lines where nobody watches, and a summary that names only what is there."""

from types import SimpleNamespace

from gpt2repro.training import console
from gpt2repro.training.console import Console, closing, compressed_size, evaluation_line


def test_away_from_a_terminal_progress_is_plain_lines_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    shown = Console(total=100, step=0, shown=True)
    shown.progress(25, 3.25, 12_000)
    shown.say("step 25 | validation loss 3.3")
    shown.close()
    said = capsys.readouterr().err
    assert "step 25 of 100 | loss 3.250, 12,000 tokens/s | 00:00 left" in said
    assert "\r" not in said and said.endswith("validation loss 3.3\n")


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    silent = Console(total=10, step=0, shown=False)
    silent.progress(5, 1.0, 1.0)
    silent.say("x")
    silent.close()
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_is_one_line():
    record = {
        "step": 8,
        "val_loss": 2.5,
        "perplexity": 12.2,
        "bits_per_byte": None,
        "piqa_acc": 0.5,
        "piqa_acc_stderr": 0.1,
    }
    assert evaluation_line(record) == "step 8 | validation loss 2.5000 | piqa_acc 0.5000"


def test_the_summary_names_only_files_that_exist(tmp_path):
    config = SimpleNamespace(run_dir=tmp_path, init_from=None)
    source = SimpleNamespace(manifest=None)
    lines = ['{"step": 0, "val_loss": 6.0, "bits_per_byte": 3.0}', '{"step": 4, "val_loss": 2.0, "bits_per_byte": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = closing(config, source, 4)
    assert "2.0000 nats per token (untrained: 6.0000)" in text and "loss.png" not in text and "samples" not in text
    (tmp_path / "loss.png").touch()
    assert "loss.png" in closing(config, source, 4)
    config.init_from = "gpt2"
    assert "(before: 6.0000)" in closing(config, source, 4)  # a model that was given is not untrained


def test_xz_stands_beside_bits_per_byte_where_the_manifest_knows_it():
    manifest = {"splits": {"val": {"bytes": 1000, "xz_bytes": 250, "xz_bytes_given_train": 125}}}
    assert "2.000, and 1.000 behind" in compressed_size(manifest)
    assert compressed_size(None) == compressed_size({"splits": {}}) == ""
