"""`--reduction fixed`: gradients summed in one order, so that 1, 2, 4 or 8 processes give the same bits.

    micro-batch 0   1   2   3   4   5   6   7        one process: all of them; two: 0 to 3 and 4 to 7; …
                 \\ /     \\ /     \\ /     \\ /
                  +       +       +       +          level 1      summed inside a rank, as soon as both are there
                    \\   /           \\   /
                      +               +              level 2      inside a rank or across ranks: the same sum
                          \\       /
                              +                      level 3

Floating-point addition depends on the order, and a + b is the same bits as b + a: so only the shape of the tree counts,
not who adds. A rank's micro-batches are neighbours and a power of two in number, so they are one subtree. Across ranks
every rank gets one slice of everybody's sum, finishes the tree on it, and hands it to all. Nobody divides: each loss is
already divided by the tokens of the global batch. Idea: EasyScale (SC '23).

Knows neither the model nor the loop.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TreeSum:
    """Sums lists of tensors that arrive one after the other, along a binary tree: a counter of finished subtrees.

    It holds at most log2(number of lists) + 1 lists.
    """

    def __init__(self):
        self._finished: list[tuple[int, list[Tensor]]] = []  # (level, sum), the levels descending

    def add(self, tensors: list[Tensor]) -> None:
        """Take the next list; its tensors are changed in place."""
        level = 0
        while self._finished and self._finished[-1][0] == level:
            torch._foreach_add_(tensors, self._finished.pop()[1])
            level += 1
        self._finished.append((level, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all lists, and forget it. Their number is a power of two."""
        ((_, tensors),) = self._finished
        self._finished = []
        return tensors


class FixedReduction:
    """The gradients and the loss of a step, with the same bits on any power-of-two number of processes.

    for … in micro-batches:  backward without any exchange;  reduction.keep(loss)
    loss = reduction.finish()                                  p.grad holds the global sum
    """

    def __init__(self, model: nn.Module):
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sum = TreeSum()
        self._world = dist.get_world_size() if dist.is_initialized() else 1

    def keep(self, loss: Tensor) -> None:
        """Move the gradients of a finished micro-batch, and its loss, into the tree."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None  # not zeroed: that would change what the tree holds
        self._sum.add([*gradients, loss.detach().clone()])

    def finish(self) -> Tensor:
        """Give every parameter its gradient of the whole step; returns the step's loss. Every rank calls it."""
        tensors = self._sum.total()
        if self._world > 1:
            for dtype in {tensor.dtype for tensor in tensors}:
                alike = [tensor for tensor in tensors if tensor.dtype == dtype]
                whole = self._over_ranks(torch.cat([tensor.reshape(-1) for tensor in alike]))
                for tensor, values in zip(alike, whole.split([tensor.numel() for tensor in alike]), strict=True):
                    tensor.copy_(values.view_as(tensor))
        *gradients, loss = tensors
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _over_ranks(self, mine: Tensor) -> Tensor:
        """(N,) of every rank -> their sum along the tree, on every rank: as many bytes as an all-reduce."""
        slice_size = -(-mine.numel() // self._world)
        sent = torch.cat([mine, mine.new_zeros(slice_size * self._world - mine.numel())])
        received = torch.empty_like(sent)  # everybody's values of this rank's slice
        dist.all_to_all_single(received, sent)
        tree = TreeSum()
        for values in received.split(slice_size):
            tree.add([values])
        dist.all_gather_into_tensor(sent, tree.total()[0].clone())
        return sent[: mine.numel()]
