"""PRECODE (Scheliga, Maeder, Seeland, WACV 2022, arXiv:2108.04725).

A variational bottleneck stands before the last dense layer, in the model and in its
training. Of the features r it computes a mean mu and a deviation s, draws

    b = mu + s eps,    eps ~ N(0, 1),

and gives the last layer what a second dense layer makes of b. The loss has the term
beta KL, the divergence of N(mu, s^2) from N(0, 1) in bits, a mean over the images. The
client draws its own eps; an attacker who simulates it draws another.

Departs from the public code: none; the weights of the bottleneck are PyTorch's own
start, from a seed.
"""

import contextlib
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gi_lib.copies import deep_copy, forward
from gi_lib.defenses.base import Defense
from gi_lib.federated import Client, LossGradient
from gi_lib.models import torch_default
from gi_lib.types import Gradient, real, whole

_SEEN: ContextVar[list[Tensor] | None] = ContextVar("divergences", default=None)


@contextlib.contextmanager
def divergences() -> Iterator[list[Tensor]]:
    """KL in bits of each bottleneck that this thread runs, a mean over the images."""
    seen: list[Tensor] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


class VariationalBottleneck(nn.Module):
    """[..., features] -> [..., features], by way of a random vector of `width`."""

    def __init__(self, features: int, width: int, rng: torch.Generator):
        super().__init__()
        self.encoder = nn.utils.skip_init(nn.Linear, features, 2 * width)
        self.decoder = nn.utils.skip_init(nn.Linear, width, features)
        for layer in (self.encoder, self.decoder):
            torch_default(layer, rng)

    def forward(self, r: Tensor) -> Tensor:
        mu, s = self.encoder(r).chunk(2, dim=-1)
        s = F.softplus(s)
        if (seen := _SEEN.get()) is not None:
            nats = 0.5 * (mu.square() + s.square() - 1 - 2 * s.log()).sum(-1)
            seen.append(nats.mean() / math.log(2))
        return self.decoder(mu + s * torch.randn_like(s))


@dataclass(frozen=True)
class BottleneckGradient(LossGradient):
    """The rule of one step: the gradient of loss + beta KL."""

    beta: float = 1e-3

    def value(
        self, model: nn.Module, theta: Gradient, images: Tensor, labels: Tensor
    ) -> Tensor:
        with divergences() as seen:
            logits = forward(model, images, theta)
        return self.loss(logits, labels) + self.beta * torch.stack(seen).sum()


@dataclass(frozen=True)
class PRECODE(Defense):
    """Puts a variational bottleneck before the last dense layer.

    Args:
        width: of b.
        beta: weight of KL in bits.
        seed: of the bottleneck's weights.
    """

    width: int = 256  # public code
    beta: float = 1e-3  # public code
    seed: int = 0
    revision = 1

    def __post_init__(self):
        whole(self, "width")
        whole(self, "seed", least=0)
        real(self, "beta")

    def on_model(self, model: nn.Module) -> nn.Module:
        extended = deep_copy(model)
        names = [n for n, layer in extended.named_modules() if type(layer) is nn.Linear]
        if not names:
            raise ValueError(
                "PRECODE puts its bottleneck before the last dense layer, and the model"
                " has none; use another defense"
            )
        parent, _, name = names[-1].rpartition(".")
        last = extended.get_submodule(names[-1])
        assert isinstance(last, nn.Linear)
        rng = torch.Generator().manual_seed(self.seed)
        own = VariationalBottleneck(last.in_features, self.width, rng).to(last.weight)
        both = nn.Sequential(OrderedDict(bottleneck=own, last=last))
        setattr(extended.get_submodule(parent), name, both)
        return extended

    def on_client(self, client: Client) -> Client:
        if type(client.rule) is not LossGradient:
            raise ValueError(
                "PRECODE adds a term to the loss, and this client has another rule,"
                f" {client.rule!r:.60}; give it loss_gradient.of(loss)"
            )
        rule = BottleneckGradient(client.rule.loss, self.beta)
        return dataclasses.replace(client, rule=rule)
