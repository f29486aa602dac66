"""training/meter.py: the formula of nanoGPT and PaLM, the datasheets, and the clock; averages come from real ranks."""

import time
from types import SimpleNamespace

import pytest
import torch

from gpt2repro.training.meter import Meter, flops_per_token, peak_flops


def test_flops_per_token_of_124m_are_those_of_the_formula():
    # 6 x (124,439,808 - 1024 x 768) + 12 x 12 x 768 x 1024 = 741,920,256 + 113,246,208
    assert flops_per_token(124_439_808 - 1024 * 768, 12, 768, 1024) == 855_166_464


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Apple M3", None),
        ("cpu", None),
    ],
)
def test_peak_flops_are_the_datasheets_or_unknown(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_speed_counts_training_time_only(monkeypatch, fresh_accelerate):
    from accelerate import Accelerator

    accelerator, clock = Accelerator(cpu=True), SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter = Meter(accelerator, batch_tokens=25, flops_per_token=100.0, device_peak=1e4)
    numbers = {"loss": torch.tensor(3.0), "grad_norm": torch.tensor(0.5)}
    clock.now += 2
    with meter.pause():
        clock.now += 50
    for step in range(4):
        meter.add(step=step, **numbers)
    read = meter.read()[-1]
    assert (read["tokens_per_second"], read["step_seconds"], read["mfu"]) == (50.0, 0.5, 0.5)
    clock.now += 0.25
    meter.add(step=5, **numbers)
    assert meter.read()[0]["tokens_per_second"] == 100.0


def test_a_reading_holds_every_step_since_the_last_one_in_order(fresh_accelerate):
    from accelerate import Accelerator

    meter = Meter(Accelerator(cpu=True), batch_tokens=10, flops_per_token=1.0, device_peak=None)
    for step in (1, 2):
        meter.add(step=step, lr=0.1, loss=torch.tensor(3.0 / step), grad_norm=torch.tensor(0.5), positions=[step, step])
    first, second = meter.read()
    assert (first["step"], first["loss"], first["tokens"]) == (1, 3.0, 10)
    assert (second["step"], second["loss"], second["tokens"], second["grad_norm"]) == (2, 1.5, 20, 0.5)
    assert second["mfu"] is None and second["tokens_per_second"] > 0 and "scaler_skipped" not in second
    assert meter.read() == []


def test_numbers_that_all_ranks_share_are_not_averaged():
    """Eight equal numbers, added one after the other as gloo does, and divided by eight, are another number."""
    accelerator = SimpleNamespace(num_processes=8, device=torch.device("cpu"), scaler=None)
    accelerator.reduce = lambda numbers, reduction: sum([numbers] * 8) / 8
    loss, read = torch.tensor(3.1815037727355957), {}
    for same in (True, False):
        meter = Meter(accelerator, batch_tokens=10, flops_per_token=1.0, device_peak=None, same=same)
        meter.add(step=1, loss=loss, grad_norm=loss)
        read[same] = meter.read()[0]["loss"]
    assert read[True] == loss.item() != read[False]
