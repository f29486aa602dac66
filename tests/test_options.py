"""Options: defaults < YAML < flags, every problem in one message, and a configuration that reads back as itself."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from gpt2repro import __main__ as program
from gpt2repro import options as options_module
from gpt2repro.options import InputError, parse_options, run_main, to_yaml


@dataclass
class Options:
    data: str = "data/x"
    "Where the 100% real shards are."
    batch_tokens: Annotated[int, Field(gt=0)] = 524_288
    """Tokens per optimizer step,
    over all processes."""
    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    compile: bool = False
    precision: Literal["bf16", "fp32"] = "fp32"
    out: Path | None = None
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    force: bool = field(default=False, metadata={"config": False})

    def problems(self) -> list[str]:
        return [] if self.batch_tokens % 2 == 0 else [f"batch_tokens={self.batch_tokens} is odd"]


@dataclass
class Runs:
    model: str
    runs: list[str] = field(default_factory=list, metadata={"positional": True})
    width: int = 5
    wide: bool = False


def parse(*argv, cls=Options):
    return parse_options(cls, list(argv), prog="prog", description="What it does.")


def refusal(*argv, cls=Options) -> str:
    with pytest.raises(InputError) as error:
        parse(*argv, cls=cls)
    return str(error.value)


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flags_win_over_yaml_which_wins_over_defaults(config):
    options = parse("--config", config("lr: 3e-4\nbatch_tokens: 1024\n"), "--batch_tokens", "2048")
    assert (options.lr, options.batch_tokens, options.data) == (3e-4, 2048, "data/x")


def test_every_kind_of_field_is_read_from_flags():
    options = parse(
        *"--compile --clip none --betas 0.8 0.9 --out a/b --precision bf16 --lr 1e-3".split(),
        *"--trackers wandb tensorboard".split(),
    )
    assert options.compile is True and options.clip is None and options.betas == (0.8, 0.9)
    assert options.out == Path("a/b") and options.trackers == ["wandb", "tensorboard"]
    assert options.precision == "bf16" and options.lr == 1e-3
    assert parse("--no-compile").compile is False and parse("--no_compile").compile is False
    assert parse("--trackers").trackers == []
    assert parse("--batch-tokens=64").batch_tokens == 64


def test_all_problems_are_reported_in_one_message(config):
    path = config("lr: fast\nn_layers: 12\nforce: true\nclip: true\n")
    message = refusal("--config", path, "--bach_tokens", "3", "--precision", "fp8", "--batch_tokens", "7", "--data")
    assert message.startswith("8 problems")
    for part in (
        "unknown option --bach_tokens; did you mean --batch_tokens?",
        "unknown option 'n_layers'",
        "force cannot be set in",
        f"lr in {path}: should be a valid number",
        f"clip in {path}: should be number, not True",
        "--precision: should be 'bf16' or 'fp32', not 'fp8'",
        "--data needs a value",
        "batch_tokens=7 is odd",
    ):
        assert part in message


def test_a_mistyped_field_is_not_judged_by_its_default():
    @dataclass
    class Strict:
        size: int = 7

        def problems(self):
            return [f"size={self.size} is odd"]

    assert refusal("--size", "big", cls=Strict).count("size") == 1


@pytest.mark.parametrize("text", ["- a\n- b\n", "lr: [1", "just words", "\x00", "a: *b", "[" * 3000, "? [1, 2]\n: 3\n"])
def test_a_broken_yaml_file_gets_a_sentence(config, text):
    assert "config" in refusal("--config", config(text))


def test_a_yaml_file_over_the_limit_is_refused_and_not_cut(config):
    """Two bytes a character: its first 2^20 bytes are whole YAML, and what follows them would be lost."""
    text = "seed: 1\n#" + "é" * 600_000 + "\nlr: 1.0\n"
    assert "more than 1048576 bytes" in refusal("--config", config(text))


def test_a_config_that_is_neither_file_nor_preset_names_the_presets(tmp_path, monkeypatch):
    monkeypatch.setattr(options_module, "PRESETS", tmp_path)
    (tmp_path / "small.yaml").write_text("lr: 0.5\n")
    assert "no such file, and the packaged presets are small; did you mean small?" in refusal("--config", "smal")
    assert parse("--config", "small").lr == 0.5
    assert "--config needs a value" in refusal("--config")
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9\n")
    assert "not a readable YAML file" in refusal("--config", "latin")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(value):
    assert "finite" in refusal(f"--lr={value}")


def test_positionals_may_stand_anywhere_and_required_fields_are_required():
    options = parse("runs/a", "--wide", "runs/b", "--model", "m", "runs/c", "--width", "-3", cls=Runs)
    assert options.runs == ["runs/a", "runs/b", "runs/c"] and options.wide and options.width == -3
    assert "--model is required" in refusal("runs/a", cls=Runs)
    assert "unexpected argument 'stray'" in refusal("stray")


@pytest.mark.parametrize("words", ["runs/a --olny y", "--olny y runs/a", "runs/a --olny x y", "runs/a --zzz=3"])
def test_the_word_after_an_unknown_option_is_not_taken_for_another_argument(words):
    """`conformance RUN --olny trl` named the typing mistake, and besides "expected one model, found 2"."""

    @dataclass
    class One:
        model: list[str] = field(metadata={"positional": True})
        only: str | None = None

        def problems(self):
            return [f"found {self.model}"] if self.model != ["runs/a"] else []

    assert refusal(*words.split(), cls=One).startswith("unknown option --")
    assert "unknown option --olny; did you mean --only?" in refusal("a", "--olny", "y", "--only", cls=One)


def test_resolved_yaml_reads_back_as_the_same_options(config):
    options = parse(*"--clip none --out a/b --betas 0.8 0.9 --lr 6e-5 --data 007 --trackers".split(), "--force")
    text = to_yaml(options)
    again = parse("--config", config(text))
    assert "force" not in text and not again.force
    again.force = True
    assert again == options and again.data == "007"


def test_help_shows_every_field_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0
    assert "Where the 100% real shards are. (default: data/x)" in text
    assert "Tokens per optimizer step, over all processes. (default: 524288)" in text
    for name in Options.__dataclass_fields__:
        assert f"--{name}" in text
    assert "{bf16,fp32}" in text and "--no-compile" in text


def test_exit_codes_of_a_program(capsys):
    def refuses(argv):
        raise InputError(f"bad {argv[0]}")

    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_main(lambda argv: 3, []) == 3
    assert run_main(refuses, ["thing"]) == 2
    assert capsys.readouterr().err == "error: bad thing\n"
    assert run_main(interrupted, []) == 130


def test_an_absent_package_is_named_and_a_missing_module_of_ours_is_a_fault(capsys):
    """A bare GPU image has no pyarrow, tiktoken or datasets."""

    def imports(argv):
        raise ModuleNotFoundError(f"No module named {argv[0]!r}", name=argv[0])

    assert run_main(imports, ["pyarrow.parquet"]) == 2
    assert capsys.readouterr().err.endswith("not installed here: pip install pyarrow\n")
    with pytest.raises(ModuleNotFoundError):
        run_main(imports, ["gpt2repro.no_such_module"])


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals to send")
def test_ctrl_c_while_a_program_ends_says_nothing():
    """The interpreter waits for a thread, as it does for torch.compile's; its own handler would show that wait."""
    code = """import threading, time
from gpt2repro.options import run_main
def main(argv):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return 0
code = run_main(main)
print("ending", flush=True)
raise SystemExit(code)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout.readline() == "ending\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT and process.stdout.read() == ""
    finally:
        process.kill()


def test_the_command_list_is_shown_without_importing_a_command(run_program):
    # The third line proves the laziness: nothing heavy is loaded for a list of names.
    code = (
        "import sys; from gpt2repro.__main__ import main; code = main(['--help']);"
        "assert not {'torch', 'transformers', 'gpt2repro.commands.plot'} & set(sys.modules); sys.exit(code)"
    )
    result = run_program(["-c", code])
    assert result.returncode == 0, result.stderr
    for name in program.COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_an_unknown_command_is_named_and_ends_with_exit_code_2(capsys):
    assert run_main(program.main, ["trian"]) == 2
    assert "unknown command 'trian'; did you mean train?" in capsys.readouterr().err
    assert run_main(program.main, ["xyzzy"]) == 2
    assert "unknown command 'xyzzy'; the commands are train, eval, prepare, prepare-text" in capsys.readouterr().err
    assert run_main(program.main, ["bench", "speed"]) == 2
    assert "gpt2repro bench: unknown command 'speed'" in capsys.readouterr().err
    assert run_main(program.main, []) == 2


@pytest.mark.parametrize(
    "line, said",
    [
        ("steps: 1\nsteps: 2", "steps is given twice"),
        ("steps: 1:30:00", "1:30:00 is no plain number"),
        ("steps: 010", "010 is no plain number"),
        ("lr: 1:30.5", "1:30.5 is no plain number"),
    ],
)
def test_what_yaml_would_read_as_something_else_is_refused(line, said, tmp_path):
    (tmp_path / "preset.yaml").write_text(line)
    with pytest.raises(InputError, match=said):
        parse_options(Numbers, ["--config", str(tmp_path / "preset.yaml")], prog="test")


@dataclass
class Numbers:
    steps: int = 1
    lr: float = 0.1
    place: Path = Path("here")
    text: str = field(default="x", metadata={"free_text": True})


def test_a_config_without_an_end_is_refused():
    with pytest.raises(InputError, match="more than"):
        parse_options(Numbers, ["--config", "/dev/zero"], prog="test")


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(InputError, match="--place: should be UTF-8 text"):
        parse_options(Numbers, ["--place", "\udce9"], prog="test")


def test_an_empty_value_is_refused_where_it_can_mean_nothing():
    with pytest.raises(InputError, match="--place: should not be empty"):
        parse_options(Numbers, ["--place", "", "--text", ""], prog="test")
    assert parse_options(Numbers, ["--text", ""], prog="test").text == ""


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; make room"),
        (NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/dev/null/x"), "/dev/null/x: Not a directory"),
        (MemoryError(), "the memory ran out"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "the memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "the memory"),
        (SystemError("error return without exception set"), "the memory ran out; take smaller batches (for training: "),
        (RuntimeError("can't start new thread"), "the memory ran out"),
    ],
)
def test_what_the_machine_cannot_do_is_a_sentence(error, said, capsys):
    def fails(argv):
        raise error

    assert run_main(fails, []) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(lambda argv: (_ for _ in ()).throw(RuntimeError("a bug")), [])


def test_a_reader_that_has_seen_enough_is_no_error(root):
    """`gpt2repro --help | head` ended with "error: Broken pipe"."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "gpt2repro", "--help"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, cwd=root, timeout=60)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_a_sentence(root):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gpt2repro", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=root)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: No space left on device; make room and start the same command again"]
