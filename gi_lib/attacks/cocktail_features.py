"""The cocktail party attack behind convolutions (Kariyappa, Guo, Maeng, Xiong, Suh,
Qureshi, Lee, ICML 2023, arXiv:2209.05578).

The first dense layer of a convolutional network mixes features and not pixels: its
weight gradient is gW = A Z, with features Z [B, n] that are not negative behind a ReLU.
They are separated as images are in `cocktail`, with other terms in the place of total
variation, for sources z = V W gW:

    + w_sign mean_i min(|z_i^-|, |z_i^+|) / sqrt(n)         of one sign
    + w_l1 mean |z|                                         sparse

The sign of a source is that of its larger part. Then an image is sought for each:

    x* = argmin over x in [0, 1]^n of  1 - mean_i <h(x_i), z_i> / (|h(x_i)| |z_i|)
             + w_tv TV(x),      h(x) the input of that layer.

The gradient is not asked again: an image is as good as its source. A source has no
scale, and the cosine needs none.

Needs a dense layer behind other layers, at least as wide as the batch, and the batch's
size. Departs from the code, whose weights are of VGG-16 and 256 images of ImageNet:
the weights of the terms are ours, chosen on eight images of CIFAR-10's train split;
the iterations are fewer; its variant that matches the gradient as well is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib.attacks.bias_ratio import dense_on_pixels
from gi_lib.attacks.cocktail import correlation, negentropy, unit, whitened
from gi_lib.copies import input_of
from gi_lib.models.layers import dense_layers, probe
from gi_lib.optimise import adam, minimise
from gi_lib.priors import total_variation
from gi_lib.search import search
from gi_lib.types import (
    Needs,
    Observation,
    Reconstruction,
    displayed,
    real,
    whole,
)


def dense_on_features(obs: Observation) -> str | None:
    """A first dense layer that is trained, behind other layers."""
    layers, _ = dense_layers(obs.model, probe(obs.model, obs.image_shape))
    if not layers or layers[0].weight not in obs.gradient:
        return (
            "features are unmixed from the gradient of the first dense layer, and this"
            " model has none, or has it frozen; use an attack that matches gradients"
        )
    if dense_on_pixels(obs) is None:
        return "the first dense layer is given the pixels; use CocktailParty"
    return None


@dataclass(frozen=True)
class CocktailFeatures:
    needs: ClassVar[Needs] = Needs(("batch_size",), model=(dense_on_features,))
    revision: ClassVar[int] = 1

    iterations: int = 2000  # of the separation; the README: 25,000
    lr: float = 0.005
    w_ne: float = 10.0
    a: float = 1.0
    w_dec: float = 5.3  # the README
    T: float = 7.7  # the README
    w_sign: float = 5.0  # the README: 0.13
    w_l1: float = 1.0  # the README: 5
    steps: int = 1000  # of the search; the README: 25,000
    lr_x: float = 0.1  # the README
    w_tv: float = 0.1  # the README
    restarts: int = 1  # of the search
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "iterations", "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", "lr_x", "a", above=0)
        real(self, "w_ne", "w_dec", "T", "w_sign", "w_l1", "w_tv")

    def sources(self, gW: Tensor, B: int) -> Tensor:
        """z [B, n], with their sign and without a scale."""
        G, Zw = whitened(gW, B)
        root = G.shape[1] ** 0.5

        def loss(V: Tensor) -> Tensor:
            v = unit(V)
            z = v @ G
            sides = z.clamp(max=0).norm(dim=1), z.clamp(min=0).norm(dim=1)
            return (
                -self.w_ne * negentropy(v @ Zw, self.a)
                + self.w_dec * correlation(v, self.T)
                + self.w_sign * torch.minimum(*sides).mean() / root
                + self.w_l1 * z.abs().mean()
            )

        found = minimise(
            loss,
            [torch.eye(B, dtype=G.dtype, device=G.device)[None]],
            optimiser=adam(self.lr),
            steps=self.iterations,
            image=lambda V: V,
        )
        z = unit(found.variables[0][0]) @ G
        positive = z.clamp(min=0).norm(dim=1) >= z.clamp(max=0).norm(dim=1)
        return torch.where(positive, 1, -1)[:, None] * z

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        layers, _ = dense_layers(obs.model, probe(obs.model, obs.image_shape))
        weight = str(layers[0].weight)
        z = self.sources(obs.gradient[weight], obs.batch_size or 1)

        def apart(x: Tensor) -> Tensor:
            h = input_of(obs.model, weight, x)
            return 1 - torch.nn.functional.cosine_similarity(h, z).mean()

        def begin(rows: int, rng: torch.Generator) -> Tensor:
            x = torch.rand(rows, len(z), *obs.image_shape, generator=rng)
            return x.to(obs.device, obs.dtype)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=begin,
            loss=lambda x: apart(x) + self.w_tv * total_variation(x),
            match=apart,
            image=lambda x: x,
            labels=None,
            optimiser=adam(self.lr_x, cosine=True),
            project=lambda x: x.clamp_(0, 1),
            frames=self.frames,
        )
