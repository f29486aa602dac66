"""Every machine file is one that `accelerate launch` itself accepts, and says when and how to use it."""

import re
from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
EXPECTED = {  # distributed type, processes, machines
    "cpu": ("NO", 1, 1),
    "single_gpu": ("NO", 1, 1),
    "multi_gpu": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
}


def launch_arguments(path: Path, *extra: str):
    """What `accelerate launch` would run with, after its own parsing, loading and checking."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), *extra, "train_accelerate.py", "--plan"]
    )
    return _validate_launch_command(arguments)[0]


def test_every_machine_has_its_file():
    assert {path.stem for path in CONFIGS} == set(EXPECTED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_the_file(path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load_config_from_file(str(path))
    kind, processes, machines = EXPECTED[path.stem]
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    arguments = launch_arguments(path)
    assert arguments.multi_gpu == (kind == "MULTI_GPU") and arguments.use_fsdp == (kind == "FSDP")
    assert arguments.use_cpu == (path.stem == "cpu")
    assert arguments.mixed_precision == ("no" if path.stem in ("cpu", "single_gpu") else "bf16")


def test_fsdp2_wraps_the_block_of_our_model(root, monkeypatch):
    arguments = launch_arguments(root / "accelerate_configs" / "fsdp2.yaml")
    assert arguments.fsdp_version == 2 and arguments.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    block = arguments.fsdp_transformer_layer_cls_to_wrap
    assert re.search(rf"^class {block}\(", (root / "modeling_gpt2repro.py").read_text(encoding="utf-8"), re.M)


def test_the_flags_of_the_multi_node_comment_win_over_the_file(root):
    flags = "--num_machines 4 --num_processes 32 --machine_rank 3 --main_process_ip 10.0.0.7".split()
    arguments = launch_arguments(root / "accelerate_configs" / "multi_node.yaml", *flags)
    assert (arguments.num_machines, arguments.num_processes, int(arguments.machine_rank)) == (4, 32, 3)
    assert arguments.main_process_ip == "10.0.0.7" and arguments.main_process_port == 29500


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_file_begins_with_its_purpose_and_the_command(path):
    comment = path.read_text(encoding="utf-8").split("compute_environment")[0]
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in comment
