"""Parameter groups and optimizers; knows neither Accelerate nor the training loop.

    optimizer = build_optimizer(model, name="adamw", lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer.step()

Both optimizers are ordinary `torch.optim.Optimizer`s to whoever saves or shards them: `param_groups`, and per parameter
a `state` of `exp_avg`, `exp_avg_sq`, `step` (AdamW) or `momentum_buffer` (Muon). They look the parameters up in their
groups at every step, so that a wrapper may exchange them for sharded ones (`DTensor`) after construction.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2repro.training.schedules import set_learning_rate

FUSED_DEVICES = {"cpu", "cuda", "mps"}  # devices with a fused AdamW kernel in every torch that setup.cfg admits
MUON_MOMENTUM = 0.95  # Keller Jordan, https://kellerjordan.github.io/posts/muon, and torch.optim.Muon's default


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    muon_lr_scale: float = 1.0,
    cautious_decay: bool = False,
    processes: int = 1,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of the blocks beside AdamW for the rest; `model` is not yet wrapped by DDP.

    Weight decay applies to matrices (embeddings included), not to biases and layer norms. `muon_lr_scale` is the factor
    from AdamW's learning rate to Muon's; its update is already scaled to AdamW's usual size, so 1 is a good start.
    `cautious_decay` lets weights decay only where the step shrinks them as well.
    So many `processes` of the default group, which all hold the same gradients, share Muon's work; `compiled` is for
    GPUs.

    Raises:
        ValueError: for an unknown `name`.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"unknown optimizer {name!r}; known are adamw and muon")
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    fused = all(p.device.type in FUSED_DEVICES for p in parameters.values())

    # dim() is the logical one also for a DTensor, so a sharded matrix stays a matrix.
    matrices = {key: p for key, p in parameters.items() if p.dim() >= 2}
    plain = [p for key, p in parameters.items() if key not in matrices]
    hidden = {key: p for key, p in matrices.items() if ".h." in key} if name == "muon" else {}
    fused_qkv = [p for key, p in hidden.items() if key.endswith("attn.c_attn.weight")]
    single = [p for key, p in hidden.items() if not key.endswith("attn.c_attn.weight")]
    others = [p for key, p in matrices.items() if key not in hidden]

    decays = (others, weight_decay), (plain, 0.0)
    adamw_groups = [{"params": own, "weight_decay": decay, "lr_scale": 1.0} for own, decay in decays if own]
    optimizer = adamw = torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=fused)
    if name == "muon":
        muon = {"weight_decay": weight_decay, "momentum": MUON_MOMENTUM, "lr_scale": muon_lr_scale}
        parts = (single, 1), (fused_qkv, 3)
        muon_groups = [{"params": own, "matrices": count, **muon} for own, count in parts if own]
        optimizer = MuonWithAdamW(muon_groups, adamw, processes, compiled)
        set_learning_rate(optimizer, lr)
    if cautious_decay:
        decay_cautiously(optimizer)
    return optimizer


def decay_cautiously(optimizer: torch.optim.Optimizer) -> None:
    """Let weight decay act only on the numbers that the step itself moves towards zero.

    x <- x - lr (u + weight_decay x) where u x > 0, else x - lr u, for any step lr u. Costs a copy of the matrices
    during a step. Source: Chen et al. 2025, arXiv:2510.12402, algorithm 1.
    """
    for group in optimizer.param_groups:
        group["cautious_decay"], group["weight_decay"] = group["weight_decay"], 0.0
    before: dict[Tensor, Tensor] = {}

    def remember(optimizer, args, kwargs) -> None:
        groups = [group for group in optimizer.param_groups if group["cautious_decay"]]
        before.update({p: p.detach().clone() for group in groups for p in group["params"]})

    @torch.no_grad()
    def decay(optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["cautious_decay"] else ():
                old = before.pop(parameter)
                shrinks = (old - parameter) * old > 0
                parameter.sub_(old * shrinks, alpha=group["lr"] * group["cautious_decay"])

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(decay)


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on some groups and `torch.optim.AdamW` on the others, seen from outside as one optimizer.

    A Muon group says in `matrices` how many equally wide matrices lie side by side in each of its parameters: 3 in a
    fused query-key-value projection of GPT-2's Conv1D layout, (C, 3C). Each is orthogonalised by itself, since the
    orthogonal factor of the three together is a different update. The layout's transposition alone changes nothing:
    a transposed matrix has the transposed factor, and the step size 0.2 sqrt(max(rows, columns)) of `match_rms_adamw`
    (Liu et al. 2025, arXiv:2502.16982) is symmetric, which `torch.optim.Muon`'s default is not.

    The update of a sharded parameter is gathered whole before it is orthogonalised; each process keeps its own rows.
    """

    def __init__(self, muon_groups: list[dict], adamw: torch.optim.AdamW, processes: int = 1, compiled: bool = False):
        self.adamw, self.processes = adamw, processes
        self._newton_schulz = torch.compile(newton_schulz, dynamic=False) if compiled else newton_schulz
        super().__init__([*adamw.param_groups, *muon_groups], adamw.defaults)
        self.adamw.param_groups = []  # given anew at every step: these may be replaced by sharded ones meanwhile

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step; parameters without a gradient are left alone."""
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "matrices" not in group]
        loss = self.adamw.step(closure)

        updates = {
            parameter: (group, self._update(parameter, group["momentum"]).chunk(group["matrices"], dim=1))
            for group in self.param_groups
            if "matrices" in group
            for parameter in group["params"]
            if parameter.grad is not None
        }
        stacks: dict[torch.Size, list[Tensor]] = {}  # matrices of one shape, whichever parameters they are part of
        for _, pieces in updates.values():
            stacks.setdefault(pieces[0].shape, []).extend(pieces)
        factors = {shape: iter(self._orthogonalised(stack)) for shape, stack in stacks.items()}
        for parameter, (group, pieces) in updates.items():
            shape, lr = pieces[0].shape, group["lr"]
            change = torch.cat([next(factors[shape]) for _ in pieces], dim=1).to(parameter.dtype)
            change *= -lr * (0.2 * math.sqrt(max(shape)))
            if isinstance(parameter, DTensor):
                change = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.mul_(1 - lr * group["weight_decay"]).add_(change)
        return loss

    def _update(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's look-ahead: whole, and in bfloat16 as Newton-Schulz wants it, which halves what travels."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum_buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        update = parameter.grad.lerp(momentum_buffer, momentum).bfloat16()
        return update.full_tensor() if isinstance(update, DTensor) else update

    def _orthogonalised(self, matrices: list[Tensor]) -> Tensor:
        """`newton_schulz` of equally shaped matrices, each process taking an equal share of them."""
        share = -(-len(matrices) // self.processes)
        first = share * dist.get_rank() if self.processes > 1 else 0
        mine = [matrices[index % len(matrices)] for index in range(first, first + share)]  # the last shares wrap around
        factors = self._newton_schulz(torch.stack(mine)).contiguous()
        if self.processes > 1:
            shares = [torch.empty_like(factors) for _ in range(self.processes)]
            dist.all_gather(shares, factors)
            factors = torch.cat(shares)
        return factors


def newton_schulz(matrices: Tensor) -> Tensor:
    """(N, rows, columns) in bfloat16: near each matrix' orthogonal factor, its singular values between 0.7 and 1.2.

    `torch.optim.Muon` does the same to one matrix at a time, equal to the last bit on a CPU.
    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon.
    """
    if len(matrices) > 1 and min(matrices.shape[1:]) <= 16:
        # Up to 16^3 a CPU multiplies with another kernel, by the size of the whole stack.
        return torch.cat([newton_schulz(matrix) for matrix in matrices.split(1)])
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT  # (N, short side, short side)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
