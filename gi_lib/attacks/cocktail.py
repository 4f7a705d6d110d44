"""Cocktail party attack (Kariyappa, Guo, Maeng, Xiong, Suh, Qureshi, Lee, ICML 2023,
arXiv:2209.05578).

The weight gradient of a dense layer is gW = A X, a mixture of the images X [B, n] with
unknown weights A [m, B]: voices in a room, each row of gW a microphone. Independent
component analysis separates them. The rows are centred and whitened, Xw [B, n] with
covariance 1, and V [B, B] with rows of norm 1 makes sources s = V Xw. V minimises

    - w_ne mean_i (mean_p log cosh(a s_ip) / a)^2           negentropy
    + w_dec mean_ij (exp(T |v_i . v_j|) - 1), i != j        each source another one
    + w_tv TV(s + V W mean)                                 smooth as images are

with W the whitening and `mean` that of the rows: the last term sees whole images.

Scale and sign of a source cannot be told from the mixture: each image is stretched to
[0, 1]. The sign is that of the image's weight in the bias gradient, gb = A 1.

Needs a dense layer on the pixels, at least as wide as the batch, with a bias (the
paper's needs none, and has no signs), and the batch's size.

The constants are from the README of the authors' code (Tiny-ImageNet, B = 128, 25,000
iterations), which tries both signs. That code, as published, computes the negentropy
and puts zero in its place: w_ne = 0 is what it runs. `fast_ica` has independence alone,
without a prior, and is there to compare. Departs from the code: the pairs i = j, a
constant, are left out, and the iterations are fewer. The route through the features of
a convolutional network is in cocktail_features.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib.attacks.bias_ratio import dense_on_pixels
from gi_lib.models.layers import pixel_layer
from gi_lib.optimise import adam, minimise
from gi_lib.priors import total_variation
from gi_lib.types import (
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    displayed,
    real,
    whole,
)


def whitened(gW: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """W gW and W (gW - mean), both [B, n], where the second has covariance 1.

    Raises:
        NotApplicableError: the rank is under B.
    """
    centred = gW - gW.mean(1, keepdim=True)
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    rank = int((torch.finfo(gW.dtype).eps ** 0.75 * S[0] < S).sum())
    if rank < B:
        raise NotApplicableError(
            f"the gradient of the first dense layer has rank {rank}, and {B} images"
            " need as much; take a wider layer or a smaller batch"
        )
    W = U[:, :B].T * (gW.shape[1] ** 0.5 / S[:B, None])
    return W @ gW, W @ centred


def unit(V: Tensor) -> Tensor:
    """Rows of norm 1."""
    return V / V.norm(dim=1, keepdim=True)


def negentropy(s: Tensor, a: float) -> Tensor:
    """mean_i (mean_p log cosh(a s_ip) / a)^2 of sources s [B, n]."""
    y = (a * s).abs()
    log_cosh = y + torch.log1p(torch.exp(-2 * y)) - math.log(2)
    return (log_cosh.mean(1) / a).square().mean()


def correlation(v: Tensor, T: float) -> Tensor:
    """mean_ij (exp(T |v_i . v_j|) - 1), i != j, of rows v [B, B] of norm 1."""
    B = len(v)
    return ((T * (v @ v.T).abs()).exp() - 1).triu(1).sum() * 2 / B**2


def stretched(s: Tensor) -> Tensor:
    """Each image to [0, 1]."""
    flat = s.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low)).reshape(s.shape)


def told_apart(obs: Observation, x: Tensor) -> Tensor:
    """Sources [B, C, H, W] with the sign that the attacker can know, in [0, 1]."""
    weight, bias, pixels = pixel_layer(obs.model, obs.image_shape)
    gW, gb = obs.gradient[weight][:, pixels], obs.gradient[bias]
    A = torch.linalg.lstsq(x.flatten(1).T, gW.T).solution.T  # gW = A x
    sign = torch.linalg.lstsq(A, gb[:, None]).solution[:, 0]
    return stretched(x * torch.where(sign < 0, -1, 1).view(-1, 1, 1, 1))


def fixed_point(Xw: Tensor, iterations: int, rng: torch.Generator) -> Tensor:
    """V [B, B] of independence alone: Hyvarinen's FastICA (IEEE Trans. Neural Networks,
    1999) with log cosh and symmetric orthogonalisation."""
    V = torch.randn(len(Xw), len(Xw), generator=rng).to(Xw)
    for _ in range(iterations):
        U, _, Vh = torch.linalg.svd(V)
        V = U @ Vh
        y = (V @ Xw).tanh()
        V = y @ Xw.T / Xw.shape[1] - (1 - y.square()).mean(1, keepdim=True) * V
    return V


@dataclass(frozen=True)
class CocktailParty:
    needs: ClassVar[Needs] = Needs(("batch_size",), model=(dense_on_pixels,))
    revision: ClassVar[int] = 1

    iterations: int = 5000  # the README: 25,000
    lr: float = 1e-3
    w_ne: float = 1.0
    a: float = 1.0
    w_dec: float = 1.47
    T: float = 12.4
    w_tv: float = 3.1
    fast_ica: int = 0  # > 0: so many of FastICA's iterations in place of the loss
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "iterations")
        whole(self, "fast_ica", "frames", least=0)
        real(self, "lr", "a", above=0)
        real(self, "w_ne", "w_dec", "T", "w_tv")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        B = obs.batch_size or 1
        weight, _, pixels = pixel_layer(obs.model, obs.image_shape)
        G, Xw = whitened(obs.gradient[weight][:, pixels], B)

        def images(V: Tensor) -> Tensor:
            return (unit(V) @ G).reshape(B, *obs.image_shape)

        def loss(V: Tensor) -> Tensor:
            v = unit(V)
            apart = self.w_dec * correlation(v, self.T)
            tv = total_variation(images(V))
            return -self.w_ne * negentropy(v @ Xw, self.a) + apart + self.w_tv * tv

        def rebuilt(V: Tensor) -> Tensor:
            return told_apart(obs, images(V))

        if self.fast_ica:
            x = rebuilt(fixed_point(Xw, self.fast_ica, rng))
            return Reconstruction(images=x, labels=None, loss=math.nan)
        found = minimise(
            loss,
            [torch.eye(B, dtype=G.dtype, device=G.device)[None]],
            optimiser=adam(self.lr),
            steps=self.iterations,
            image=rebuilt,
            frames=self.frames,
        )
        return Reconstruction(
            images=rebuilt(found.variables[0][0]),
            labels=None,
            loss=found.losses.item(),
            trace=found.trace,
            losses=found.losses,
            frames=torch.stack(found.frames)[:, 0] if self.frames else None,
            frame_steps=found.frame_steps,
            frame_evaluations=[0] * len(found.frame_steps),
            frame_seconds=found.frame_seconds,
        )
