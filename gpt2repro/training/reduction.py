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
the tree is the classical way to sum: with the neighbour at distance 1, then 2, then 4, a rank swaps halves of what it
has, adds, and keeps a half; then all halves travel back. As many bytes as an all-reduce (Thakur et al. 2005, recursive
halving and doubling), the most of them between the nearest ranks. Nobody divides: each loss is already divided by the
tokens of the global batch. Idea: EasyScale (SC '23).

Knows neither the model nor the loop.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

PIECE = 2**24  # numbers that two ranks swap at once, 64 MB: bounds the memory; with gloo, 1 MB was slower


class TreeSum:
    """Sums tensors that arrive one after the other into `place`, along a binary tree: a counter of finished subtrees.

    Before the last of n tensors, a power of two, it holds log2(n) of them, `place` included.
    """

    def __init__(self, place: Tensor):
        self._place = place
        self._finished: list[tuple[int, Tensor]] = []  # (level, sum), the levels descending; the first is in `place`

    def add(self, tensor: Tensor) -> None:
        """Take the next tensor, which may be changed later."""
        level, total = 0, tensor if self._finished else self._place.copy_(tensor)
        while self._finished and self._finished[-1][0] == level:
            total = self._finished.pop()[1].add_(total)  # while the gradient is still in the cache
            level += 1
        self._finished.append((level, total))

    def finish(self) -> None:
        """Complete the sum in `place`, zeros if nothing came, and begin the next one."""
        assert len(self._finished) < 2, "the number of tensors is no power of two"
        if not self._finished:
            self._place.zero_()
        self._finished = []


class FixedReduction:
    """The gradients and the loss of a step, with the same bits on any power-of-two number of processes.

    for … in micro-batches:  backward, no DDP around the model;  reduction.keep(loss)
    loss = reduction.finish()                                    p.grad holds the global sum

    Gradients go into the tree one by one, as backward makes them. Rank 0 gives all ranks its weights.
    """

    def __init__(self, model: nn.Module):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        sizes = [*(parameter.numel() for parameter in parameters), 1]  # the last one is the loss
        padded = -(-sum(sizes) // self._world) * self._world
        self._sums = torch.zeros(padded, dtype=parameters[0].dtype, device=parameters[0].device)
        self._received = torch.empty_like(self._sums[: PIECE if self._world > 1 else 0])
        *places, self._loss = self._sums[: sum(sizes)].split(sizes)
        self.gradients = {p: place.view_as(p) for p, place in zip(parameters, places, strict=True)}
        self._trees = {p: TreeSum(place) for p, place in self.gradients.items()}
        self._loss_tree = TreeSum(self._loss)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)
            if self._world > 1:
                dist.broadcast(parameter.detach(), src=0)

    def _take(self, parameter: Tensor) -> None:
        self._trees[parameter].add(parameter.grad)
        parameter.grad = None  # not zeroed: that would change what the tree holds

    def keep(self, loss: Tensor) -> None:
        """Take the loss of a micro-batch whose backward is done."""
        self._loss_tree.add(loss.detach().clone())

    def finish(self) -> Tensor:
        """Give every parameter its gradient of the whole step; returns the step's loss. Every rank calls it."""
        for tree in (*self._trees.values(), self._loss_tree):
            tree.finish()
        self.exchange()
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        return self._loss.clone().squeeze()

    def exchange(self) -> None:
        """Make every rank's sums those of all ranks, in place."""
        part, swapped, distance = self._sums, [], 1
        while distance < self._world:
            halves = part.chunk(2)
            mine, theirs = reversed(halves) if self._rank & distance else halves
            for kept, sent in zip(mine.split(PIECE), theirs.split(PIECE), strict=True):
                received = self._received[: kept.numel()]
                _swap(sent, received, self._rank ^ distance)
                kept += received
            swapped.append((mine, theirs, distance))
            part, distance = mine, 2 * distance
        for mine, theirs, distance in reversed(swapped):
            _swap(mine, theirs, self._rank ^ distance)


def _swap(sent: Tensor, received: Tensor, partner: int) -> None:
    """Two ranks send each other as many numbers."""
    both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
