"""DP-SGD (Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, CCS 2016).

arXiv:1607.00133.

    g = 1/L ( sum_i g_i min(1, S / |g_i|) + N(0, nu^2 S^2 I) )

in every local step: g_i is the gradient of one image alone, S the norm to which it is
clipped, L the expected batch size. With nu = 0 it is clipping. The privacy that it buys
is a matter of accounting over rounds (opacus.accountants), which is not done here.

Departs from the paper: a step's images are those of the client's schedule, where the
paper draws each image with a probability (Poisson sampling), on which its accounting
rests. As in Opacus, 1e-6 is added to the norm before the division.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gi_lib.copies import batch_norms, forward, strange_norms
from gi_lib.defenses.base import Defense
from gi_lib.federated import Client, LossGradient
from gi_lib.types import Gradient, real, whole


@dataclass(frozen=True)
class ClippedGradients:
    """The rule of one step. Without a generator, as if simulated, it adds no noise."""

    clip: float
    noise: float
    expected_batch: int | None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    """Of one image: (logits [1, K], label [1] or soft label [1, K]) -> a scalar."""
    revision = 1

    def __call__(
        self,
        model: nn.Module,
        theta: Gradient,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator | None = None,
    ) -> Gradient:
        mixing = any(norm.own_statistics for norm in batch_norms(model).values())
        if mixing or (strange_norms(model) and model.training):
            raise ValueError(
                "DP-SGD needs the gradient of each image alone, and batch norm in train"
                " mode mixes the images; call .eval() on the model, or use group norm"
            )

        def one(theta: Gradient, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(forward(model, x.unsqueeze(0), theta), y.unsqueeze(0))

        each = torch.func.vmap(
            torch.func.grad(one),
            in_dims=(None, 0, 0),
            randomness="same" if rng is None else "different",
        )(dict(theta), images, labels)
        square = sum(g.flatten(1).square().sum(1) for g in each.values())
        assert isinstance(square, Tensor)
        share = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1)
        total = {
            name: torch.einsum("b...,b->...", g, share) for name, g in each.items()
        }
        if rng is not None and self.noise:
            std = self.noise * self.clip
            total = {
                name: g
                + torch.normal(0, std, g.shape, generator=rng, dtype=g.dtype).to(
                    g.device
                )
                for name, g in total.items()
            }
        return {
            name: g / (self.expected_batch or len(images)) for name, g in total.items()
        }


@dataclass(frozen=True)
class DPSGD(Defense):
    """Clip each image's gradient to the norm S, and add noise, in every local step.

    Args:
        clip: S.
        noise: nu, the noise's standard deviation over S.
        expected_batch: L; None takes the number of images in the step.
    """

    clip: float = 1.0
    noise: float = 1.0
    expected_batch: int | None = None
    revision = 1

    def __post_init__(self):
        real(self, "clip", above=0)
        real(self, "noise")
        if self.expected_batch is not None:
            whole(self, "expected_batch")

    def on_client(self, client: Client) -> Client:
        if not isinstance(client.rule, LossGradient):
            raise ValueError(
                "DP-SGD clips the gradient of each image's loss, and this client has"
                f" another rule, {client.rule!r:.60}; give it loss_gradient.of(loss)"
            )
        settings = (self.clip, self.noise, self.expected_batch, client.rule.loss)
        return dataclasses.replace(client, rule=ClippedGradients(*settings))
