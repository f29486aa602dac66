"""training/optim.py against formulas written out here: the groups, Muon's update by a float64 SVD."""

import copy
import math

import pytest
import torch
import torch.multiprocessing
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.training.optim import build_optimizer, newton_schulz
from gpt2repro.training.schedules import set_learning_rate

RECIPE = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def tiny_gpt2(seed: int = 0, n_layer: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "n_positions": 16, "n_embd": 32, "n_layer": n_layer, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def train(model, optimizer, *, first: int, last: int) -> list[float]:
    """Steps first..last-1 on random tokens that depend on the step alone; the losses."""
    losses = []
    for step in range(first, last):
        tokens = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- parameter groups ----


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_applies_to_matrices_only_and_every_parameter_is_in_one_group(name):
    model = tiny_gpt2()
    optimizer = build_optimizer(model, name=name, **RECIPE)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        is_matrix = key.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert decay[parameter] == (0.1 if is_matrix else 0.0), key


def test_learning_rate_reaches_every_group_times_its_scale():
    optimizer = build_optimizer(tiny_gpt2(), name="muon", muon_lr_scale=3.0, **RECIPE)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 1.5, 1.5]


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="sgd"):
        build_optimizer(tiny_gpt2(), name="sgd", **RECIPE)


def test_adamw_equals_the_papers_formula_in_float64():
    layer = nn.Linear(3, 2).double()
    optimizer = build_optimizer(layer, name="adamw", **RECIPE)
    expected = {key: p.detach().clone() for key, p in layer.named_parameters()}
    first = {key: torch.zeros_like(p) for key, p in expected.items()}
    second = copy.deepcopy(first)
    for step in range(1, 6):
        for key, parameter in layer.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            first[key] = 0.9 * first[key] + 0.1 * parameter.grad
            second[key] = 0.95 * second[key] + 0.05 * parameter.grad**2
            update = (first[key] / (1 - 0.9**step)) / ((second[key] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[key] = expected[key] * (1 - 1e-2 * (0.1 if key == "weight" else 0.0)) - 1e-2 * update
        optimizer.step()
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cautious_decay_shrinks_what_the_step_shrinks_and_nothing_else(name):
    models = {how: tiny_gpt2() for how in ("none", "cautious")}
    decays = {"none": {"weight_decay": 0.0}, "cautious": {"weight_decay": 0.1, "cautious_decay": True}}
    optimizers = {how: build_optimizer(models[how], name=name, **{**RECIPE, **decays[how]}) for how in models}
    for step in range(3):
        before = {key: p.detach().clone() for key, p in models["cautious"].named_parameters()}
        for how, model in models.items():
            model.load_state_dict(before, strict=False)  # both take this step from one place
            for key, parameter in model.named_parameters():
                seed = torch.Generator().manual_seed(step * 1000 + len(key))
                parameter.grad = torch.randn(parameter.shape, generator=seed)
            optimizers[how].step()
        for key, plain in models["none"].named_parameters():
            moved = plain.detach() - before[key]
            shrinks = torch.sign(moved) == -torch.sign(before[key])
            expected = plain.detach() - 1e-2 * 0.1 * before[key] * shrinks * (plain.dim() >= 2)
            assert 0.3 < shrinks.float().mean() < 0.7 or plain.dim() == 1
            torch.testing.assert_close(models["cautious"].get_parameter(key).detach(), expected, rtol=0, atol=1e-8)


# ---- Muon ----


def well_conditioned(rows: int, columns: int) -> torch.Tensor:
    """A float64 matrix with random singular vectors and singular values between 1 and 2."""
    draw = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(rows * columns)}
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, **draw), full_matrices=False)
    return u @ torch.diag(1 + torch.rand(min(rows, columns), **draw)) @ vh


def orthogonal_factor(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def torchs_change(update: torch.Tensor) -> torch.Tensor:
    """What torch.optim.Muon adds to one matrix at a learning rate of 1, momentum and decay off."""
    change = torch.zeros_like(update)
    change.grad = update
    how = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([change], 1.0, **how).step()
    return change


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (32, 128), (128, 32)])
def test_muon_steps_along_the_orthogonal_factor_of_a_float64_svd(rows, columns):
    update = well_conditioned(rows, columns)
    factor = newton_schulz(update[None].bfloat16())[0].double()
    # Newton-Schulz with Muon's coefficients sends singular values to about 0.7 .. 1.2, not to 1, and keeps the vectors.
    u, _, vh = torch.linalg.svd(update, full_matrices=False)
    inner = u.T @ factor @ vh.T
    assert torch.linalg.svdvals(factor).min() > 0.6 and torch.linalg.svdvals(factor).max() < 1.3
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.05
    cosine = (factor * orthogonal_factor(update)).sum() / factor.norm() / orthogonal_factor(update).norm()
    assert cosine > 0.98


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(32, 32), (32, 128), (128, 32), (128, 128), (1, 64), (8, 32), (16, 16), (16, 64), (64, 16), (12, 48), (17, 17)],
)
@pytest.mark.parametrize("split", [1, 2, 3, 7])
def test_a_stack_in_whatever_parts_equals_torchs_muon_on_one_matrix_at_a_time(rows, columns, split):
    many = 420 if min(rows, columns) <= 16 else 7  # other kernels round differently, but seldom
    stack = torch.randn(many, rows, columns, generator=torch.Generator().manual_seed(0))
    stack[3] = 0  # as of a block that learns nothing
    factors = torch.cat([newton_schulz(part.bfloat16()) for part in stack.split(split)])
    changes = factors.float() * -(0.2 * math.sqrt(max(rows, columns)))
    assert torch.equal(changes, torch.stack([torchs_change(matrix) for matrix in stack]))


def test_compiled_newton_schulz_differs_by_bfloat16s_rounding_only():
    stack = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = torch.compile(newton_schulz, dynamic=False)(stack)
    torch.testing.assert_close(compiled, newton_schulz(stack), rtol=0.02, atol=0.02)


def test_muon_treats_conv1d_and_linear_layouts_alike():
    update = well_conditioned(32, 128)[None].bfloat16()
    torch.testing.assert_close(newton_schulz(update), newton_schulz(update.mT.contiguous()).mT, rtol=0.02, atol=0.02)


def per_matrix_step(parameters: dict, moments: dict, lr: float) -> None:
    """One Muon step as it was before the stacks: torch.optim.Muon on each matrix, the fused projection cut in three."""
    for key, parameter in parameters.items():
        momentum_buffer = moments.setdefault(key, torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - 0.95)
        update = parameter.grad.lerp(momentum_buffer, 0.95)
        pieces = []
        for piece in update.chunk(3 if key.endswith("attn.c_attn.weight") else 1, dim=1):
            change = torch.zeros_like(piece)
            change.grad = piece
            how = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
            torch.optim.Muon([change], lr, **how).step()
            pieces.append(change)
        parameter.mul_(1 - lr * 0.1).add_(torch.cat(pieces, dim=1))


def test_muon_equals_torchs_muon_on_one_matrix_at_a_time_to_the_last_bit():
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    optimizer = build_optimizer(ours, name="muon", muon_lr_scale=0.3, **RECIPE)
    reference = {key: p.detach() for key, p in theirs.named_parameters() if ".h." in key and p.dim() == 2}
    moments = {}
    for step in range(4):
        for number, (key, parameter) in enumerate(ours.named_parameters()):
            seed = torch.Generator().manual_seed(step * 1000 + number)
            parameter.grad = torch.randn(parameter.shape, generator=seed)
            if step == 1 and key.endswith("0.mlp.c_fc.weight"):
                parameter.grad = None
            if key in reference:
                reference[key].grad = parameter.grad
        optimizer.step()
        per_matrix_step({key: p for key, p in reference.items() if p.grad is not None}, moments, lr=0.3e-2)
    for key, expected in reference.items():
        assert torch.equal(ours.get_parameter(key), expected), key
        assert torch.equal(optimizer.state[ours.get_parameter(key)]["momentum_buffer"], moments[key]), key


def test_muon_equals_torchs_own_on_matrices_and_torchs_adamw_on_the_rest():
    ours, theirs = tiny_gpt2(), tiny_gpt2()
    optimizer = build_optimizer(ours, name="muon", **RECIPE)
    named = dict(theirs.named_parameters())
    hidden = {key: p for key, p in named.items() if ".h." in key and p.dim() == 2}
    fused = {key for key in hidden if key.endswith("c_attn.weight")}
    muon = torch.optim.Muon(
        [p for key, p in hidden.items() if key not in fused], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [p for key, p in named.items() if key not in hidden and p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        for (key, a), b in zip(ours.named_parameters(), named.values(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step * 1000 + len(key)))
            b.grad = a.grad.clone()
        optimizer.step(), muon.step(), adamw.step()
    for (key, a), b in zip(ours.named_parameters(), named.values(), strict=True):
        if key not in fused:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_holds_only_named_tensors_of_the_parameters_shape(name):
    model = tiny_gpt2()
    optimizer = build_optimizer(model, name=name, **RECIPE)
    train(model, optimizer, first=0, last=1)
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        is_muon = name == "muon" and ".h." in key and parameter.dim() == 2
        assert set(state) == ({"momentum_buffer"} if is_muon else {"exp_avg", "exp_avg_sq", "step"}), key
        assert all(tensor.shape in (parameter.shape, torch.Size([])) for tensor in state.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_restored_from_its_state_dict_goes_on_exactly(name):
    model = tiny_gpt2()
    optimizer = build_optimizer(model, name=name, **RECIPE)
    train(model, optimizer, first=0, last=3)
    resumed = tiny_gpt2(seed=1)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = build_optimizer(resumed, name=name, **RECIPE)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(resumed, resumed_optimizer, first=3, last=6) == train(model, optimizer, first=3, last=6)


def sharded_training(rank: int, name: str, rendezvous: str, out: str) -> None:
    """One of two gloo processes: trains with fully_shard and with DDP, and saves the whole parameters of both."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    model = tiny_gpt2()
    for block in model.transformer.h:
        fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = build_optimizer(model, name=name, processes=2, **RECIPE)
    sharded_losses = train(model, optimizer, first=0, last=4)
    whole = {key: p.full_tensor().detach() for key, p in model.named_parameters()}

    replica = tiny_gpt2()
    optimizer = build_optimizer(replica, name=name, processes=2, **RECIPE)
    ddp_losses = train(nn.parallel.DistributedDataParallel(replica), optimizer, first=0, last=4)

    # Three matrices of a shape do not divide by two.
    alone, shared = tiny_gpt2(n_layer=3), tiny_gpt2(n_layer=3)
    for model, processes in ((alone, 1), (shared, 2)):
        optimizer = build_optimizer(model, name=name, processes=processes, **RECIPE)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    exact = all(torch.equal(a, b) for a, b in zip(alone.parameters(), shared.parameters(), strict=True))
    assert exact, f"rank {rank}: shared work gives other parameters"
    if rank == 0:
        torch.save({"sharded": whole, "losses": [sharded_losses, ddp_losses], "ddp": replica.state_dict()}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_sharded_processes_and_two_replicas_equal_one_process(name, tmp_path):
    rendezvous, out = (tmp_path / "rendezvous").as_uri(), tmp_path / "out.pt"
    torch.multiprocessing.spawn(sharded_training, args=(name, rendezvous, str(out)), nprocs=2)
    seen = torch.load(out, weights_only=True)

    model = tiny_gpt2()
    losses = train(model, build_optimizer(model, name=name, **RECIPE), first=0, last=4)
    torch.testing.assert_close(seen["losses"], [losses, losses], rtol=1e-5, atol=1e-5)
    for key, parameter in model.named_parameters():
        # A gradient summed over two processes may round differently, and AdamW's first steps magnify a tiny one's sign.
        for other in (seen["sharded"][key], seen["ddp"][key]):
            torch.testing.assert_close(other, parameter.detach(), rtol=1e-3, atol=1e-4, msg=key)
