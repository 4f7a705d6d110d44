"""What a client can do to its model, data, training or update before it sends."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gi_lib.federated import Client
from gi_lib.matching import Distance
from gi_lib.types import Gradient, Sent


class Law(NamedTuple):
    """How what a client sends scatters around what it would have sent undefended."""

    surprise: Distance
    """(g', g) -> -log p(g | g') in nats, up to a constant: g is what was sent, where g'
    would have been sent undefended."""
    spread: float
    """Of one entry: the standard deviation of a normal, the scale b of a Laplace."""


@dataclass(frozen=True)
class Defense:
    """A defense overrides the hook where it acts; every hook is the identity."""

    def on_model(self, model: nn.Module) -> nn.Module:
        """Before a round: the model that all train and the attacker sees; a new one."""
        return model

    def on_batch(
        self, images: Tensor, labels: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Before the update is computed.

        images are [B, C, H, W] in [0, 1], labels [B] or soft [B, K].
        """
        return images, labels

    def on_client(self, client: Client) -> Client:
        """Within the update: another rule, rate or schedule."""
        return client

    def on_update(
        self, gradient: Gradient, sent: Sent, rng: torch.Generator
    ) -> Gradient:
        """Before the update is sent; `sent` is what it was computed from."""
        return gradient

    def law(self, sent: Gradient) -> Law | None:
        """What an attacker who knows of the defense can say of the update `sent`.

        Of one client's update. None where a defense states no law.
        """
        return None
