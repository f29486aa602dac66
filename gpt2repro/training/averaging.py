"""A running average of the weights, beside the weights that are trained; knows no optimizer and no file."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gpt2repro.checkpoint.tensors import named_parameters


class WeightAverage:
    """The exponential moving average of a model's parameters: after each step, average <- d average + (1 - d) weight.

    d = min(`decay`, t / (t + 9)) after step t, so that the first weights are soon forgotten. It depends on the step
    alone: a checkpoint keeps the averages and nothing else. `averages` has the names of a plain model, and is sharded
    as the model is. Build it after the model is wrapped.
    Source: tf.train.ExponentialMovingAverage with `num_updates` = t - 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self._weights = named_parameters(model)  # under FSDP2 the sharded ones, which the optimizer has as well
        self.averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the optimizer's step number `step`, counted from 1."""
        decay = min(self.decay, step / (step + 9))
        torch._foreach_lerp_([*self.averages.values()], [*self._weights.values()], 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        torch._foreach_copy_([*self.averages.values()], [*self._weights.values()])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the parameters hold the averages, and `averages` the weights; at its end they swap back."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # an evaluation leaves embeddings and head gathered, with the old values
                module.reshard()
        for name, weight in self._weights.items():
            kept = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)
