"""Bad numbers: what counts as bad, that a skipped step changes nothing, and what a rewind asks for."""

import json
import math
import statistics

import pytest
import torch

from gpt2repro.training.health import HealthMonitor, step_unless_bad
from gpt2repro.training.optim import build_optimizer


def record(step, loss=2.0, grad_norm=1.0, **more):
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "positions": [8 * (step - 1), 8 * step], **more}


def good_steps(count, first=1):
    """Losses and norms with a little spread, so that a deviation exists."""
    return [record(s, 2 + 0.1 * math.sin(s), math.exp(0.2 * math.cos(s))) for s in range(first, first + count)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_a_number_that_is_not_finite_is_bad_from_the_first_step_on(bad, which):
    monitor = HealthMonitor("stop")
    verdict = monitor.judge([record(1), record(2, **{which: bad}), record(3)])
    assert (verdict.action, verdict.first_step, verdict.last_step) == ("stop", 2, 2)
    assert (verdict.start, verdict.stop) == (8, 16)
    assert str(bad) in verdict.reason


def test_a_spike_is_what_lies_z_deviations_above_the_mean_of_the_window():
    steps = good_steps(50)
    losses = [r["loss"] for r in steps[-20:]]
    limit = statistics.mean(losses) + 6 * statistics.pstdev(losses)

    def judged(loss):
        monitor = HealthMonitor("stop", window=20, z_threshold=6)
        assert monitor.judge(steps) is None
        return monitor.judge([record(51, loss=loss)])

    assert judged(limit - 1e-6) is None
    assert judged(limit + 1e-6).first_step == 51
    assert judged(0.0) is None  # falling is what a loss is for


def test_a_gradient_norm_is_judged_by_its_logarithm():
    logs = [math.log(r["grad_norm"]) for r in good_steps(20)]
    limit = math.exp(statistics.mean(logs) + 6 * statistics.pstdev(logs))
    for grad_norm, expected in ((limit * 0.999, False), (limit * 1.001, True)):
        monitor = HealthMonitor("stop", window=20, z_threshold=6)
        monitor.judge(good_steps(20))
        verdict = monitor.judge([record(21, grad_norm=grad_norm)])
        assert (verdict is not None and "gradient norm" in verdict.reason) == expected


def test_no_spike_is_called_before_the_window_is_full_nor_without_a_threshold():
    assert HealthMonitor("stop", window=50).judge([*good_steps(49), record(50, loss=100.0)]) is None
    off = HealthMonitor("stop", window=5, z_threshold=None)
    assert off.judge(good_steps(50)) is None
    assert off.judge([record(51, loss=1e9)]) is None


def test_a_falling_noisy_loss_like_the_quickstarts_is_never_a_spike():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3000, generator=generator).tolist()
    monitor = HealthMonitor("stop")
    for first in range(0, 3000, 10):
        steps = [
            record(s, 3 + 6 * math.exp(-s / 200) + 0.05 * noise[s], math.exp(0.5 * noise[-s] + 1 - s / 1000))
            for s in range(first, first + 10)
        ]
        assert monitor.judge(steps) is None


def test_the_device_decides_by_the_same_limits_as_the_host():
    monitor = HealthMonitor("skip", window=20)
    monitor.judge(good_steps(20))
    for loss, norm in [(2.0, 1.0), (50.0, 1.0), (2.0, 1e6), (math.nan, 1.0), (2.0, math.nan), (2.0, math.inf)]:
        ok = monitor.allow(torch.tensor(loss), torch.tensor(norm))
        assert ok.dtype == torch.bool and ok.dim() == 0
        host = HealthMonitor("skip", window=20)
        host.load_state(monitor.state())
        assert bool(ok) == (host.judge([record(21, loss, norm)]) is None), (loss, norm)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_ok_changes_nothing_and_the_next_good_one_is_as_if_it_never_was(name):
    def trained(oks):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"h": torch.nn.ModuleList([torch.nn.Linear(8, 8)])})
        model = torch.nn.ModuleDict({"transformer": model})
        optimizer = build_optimizer(
            model, name=name, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, muon_lr_scale=1.0
        )
        for number, ok in enumerate(oks):
            for parameter in model.parameters():
                seed = torch.Generator().manual_seed(sum(oks[:number]))
                parameter.grad = torch.randn(parameter.shape, generator=seed) if ok else parameter.grad * math.nan
            step_unless_bad(optimizer, torch.tensor(ok), None)
        moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [*(p.detach().clone() for p in model.parameters()), *moments]

    with_bad, without = trained([True, False, True, True]), trained([True, True, True])
    assert all(torch.equal(a, b) for a, b in zip(with_bad, without, strict=True))


def test_skipping_gives_up_when_every_step_is_bad(monkeypatch):
    monkeypatch.setattr("gpt2repro.training.health.MOST_SKIPS_IN_A_ROW", 3)
    monitor = HealthMonitor("skip")
    assert monitor.judge([record(s, loss=math.nan) for s in (1, 2, 3)]).action == "skip"
    assert monitor.skipped == 3
    assert monitor.judge([record(4)]) is None
    verdict = monitor.judge([record(s, loss=math.nan) for s in (5, 6, 7, 8)])
    assert verdict.action == "stop" and "in a row" in verdict.reason


def test_rewinds_are_counted_across_the_restored_state_and_limited():
    monitor = HealthMonitor("rewind", max_rewinds=2)
    monitor.judge([record(1)])
    saved = monitor.state()
    for _ in range(2):
        verdict = monitor.judge([record(2), record(3, loss=math.nan), record(4), record(5, grad_norm=math.inf)])
        assert (verdict.action, verdict.first_step, verdict.last_step) == ("rewind", 3, 5)
        assert (verdict.start, verdict.stop) == (16, 40)
        monitor.load_state(saved, rewinding=True)
    verdict = monitor.judge([record(3, loss=math.nan)])
    assert verdict.action == "stop" and "2 rewinds" in verdict.reason


def test_a_resumed_monitor_judges_like_the_uninterrupted_one():
    steps = good_steps(60)
    whole = HealthMonitor("skip", window=30)
    whole.judge(steps)
    first = HealthMonitor("skip", window=30)
    first.judge(steps[:37])
    resumed = HealthMonitor("skip", window=30)
    resumed.load_state(json.loads(json.dumps(first.state())))
    resumed.judge(steps[37:])
    assert resumed.state() == whole.state()
    assert (resumed.loss_limit, resumed.grad_norm_limit) == (whole.loss_limit, whole.grad_norm_limit)


def test_the_scalers_skipped_steps_are_counted_and_excused_until_there_are_too_many():
    monitor = HealthMonitor("stop")
    overflow = [record(s, grad_norm=math.inf, scaler_skipped=True) for s in range(1, 51)]
    assert monitor.judge(overflow) is None
    assert monitor.scaler_skips == 50
    assert "fp16" in monitor.judge([record(51, grad_norm=math.inf, scaler_skipped=True)]).reason
    ok = monitor.allow(torch.tensor(2.0), torch.tensor(math.inf), scaled=True)
    assert bool(ok), "the scaler has to see the step, or it would never lower its scale"


def test_the_metrics_record_is_json_and_stands_at_the_first_bad_step():
    verdict = HealthMonitor("rewind").judge([record(7, loss=math.nan), record(8, loss=math.nan)])
    line = json.loads(json.dumps(verdict.record(), allow_nan=False))
    assert line["step"] == 7 and line["event"] == "rewind" and line["last_step"] == 8
