"""Data Leakage in Federated Averaging (Dimitrov, Balunovic, Konstantinov, Vechev,
TMLR 2022).

arXiv:2206.12395.

A client trains on N images for E epochs of batches of B, in an order of its own in each
epoch. Since the order is not known, epoch e has a copy X_e [N] of the images:

    min over X_1, ..., X_E of  f D(g(X_1, ..., X_E), g*) / T
        + a_tv TV(X) + a_clip |X - clip(X)|^2 + a_inv mean_{e,e'} |P(X_e) - P(X_e')|^2

by Adam. g takes the client's T local steps on the copies in turn. D = sum_l e^(1-l)
|g'_l - g*_l|^2 over the layers. P, the mean of an epoch's images (or their maximum),
is the same in any order: so the last term, a mean over pixels, asks for the same images
and leaves their order open. f goes from the first of `factor` to the second, in equal
ratios over half of the steps. At the end the copies are put in the order of X_1 by an
assignment of most PSNR, and their mean is returned. The reported loss is that of the
copies.

Labels are known, or counted by the paper's rule, which takes the probabilities before
and after the round and interpolates in between (labels.ZeroShot). Which image has which
label in which step is drawn once. `copies=1` is the paper's simulation with images that
all epochs share, and `copies=0` its baseline, one gradient at the start times T. Where
the order is known, one copy is enough, and is the default.

Departs from the paper: the rate stays as it is, where the authors' code cuts it by a
fifth over the whole run. P has no random convolution before it. The total variation is
ours, a mean. The settings are those of the authors' script for FEMNIST.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib import labels
from gi_lib.matching import Distance, fading_l2
from gi_lib.optimise import adam
from gi_lib.parametrisations import Pixels
from gi_lib.priors import total_variation
from gi_lib.search import gaussian, search
from gi_lib.types import (
    Images,
    Labels,
    Needs,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)

Copies = Float[Tensor, "E N C H W"]


def whole_epochs(obs: Observation) -> str | None:
    """One client whose local steps are whole epochs."""
    client: Any = obs.client
    if not hasattr(client, "local_batch"):
        return (
            "it copies the epochs of one client, and there are several, or one whose"
            " epochs are not told; use InvertingGradients, which simulates any client"
        )
    each = steps_an_epoch(obs)
    if client.steps % each == 0:
        return None
    whole = max(1, round(client.steps / each)) * each
    return (
        f"{client.steps} local steps are no whole number of epochs: {obs.batch_size}"
        f" images in batches of {client.local_batch} take {each} steps an epoch; use"
        " InvertingGradients, which simulates any number of steps, or a client of"
        f" {whole} steps"
    )


def steps_an_epoch(obs: Observation) -> int:
    client: Any = obs.client
    n = obs.batch_size or 1
    return -(-n // min(client.local_batch or n, n))


def interpolated(obs: Observation) -> Labels:
    """Labels that are known, or zero-shot counts, interpolated over the local steps."""
    if obs.labels is not None:
        return obs.labels
    bias = labels.last_layer(obs)[1]
    return (labels.ZeroShotWeights() if bias is None else labels.ZeroShot())(obs)


def mean_image(x: Float[Tensor, "E N C H W"]) -> Float[Tensor, "E C H W"]:
    """P(X_e), the mean over an epoch's images."""
    return x.mean(1)


def brightest(x: Float[Tensor, "E N C H W"]) -> Float[Tensor, "E C H W"]:
    """P(X_e), the maximum over an epoch's images."""
    return x.amax(1)


def same_images(p: Float[Tensor, "E C H W"]) -> Float[Tensor, ""]:
    """Mean over all pairs of epochs, and over pixels, of (P(X_e) - P(X_e'))^2.

    It is twice the variance over the epochs.
    """
    return 2 * p.var(0, unbiased=False).mean()


def agreed(x: Copies) -> Images:
    """The mean of the copies [N, C, H, W], each first put in the order of copy one."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    found = [x[0]]
    for other in x[1:]:
        error = (x[0][:, None] - other[None]).square().flatten(2).mean(2)
        minus_psnr = error.clamp_min(1e-10).log10()
        found.append(other[linear_sum_assignment(minus_psnr.cpu().numpy())[1]])
    return torch.stack(found).mean(0)


@dataclass(frozen=True)
class FedAvgEpochs:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size"), model=(whole_epochs,), labels=True
    )
    revision: ClassVar[int] = 1

    steps: int = 400  # authors' script; so are all values here
    lr: float = 0.4  # in the model's units
    tv: float = 1e-3
    clip: float = 2.0
    invariance: float = 1000.0  # a_inv
    project: Callable[[Copies], Tensor] = mean_image  # P
    factor: tuple[float, float] = (1.0, 2.0)  # f, at the start and at half of the steps
    copies: int | None = None  # None: one an epoch; 1: all share it; 0: one gradient
    distance: Distance = fading_l2
    restarts: int = 1
    label_rule: labels.LabelRule = interpolated
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        real(self, "tv", "clip", "invariance")
        function(self, "project", "distance", "label_rule")
        if self.copies is not None:
            whole(self, "copies", least=0)
        if len(self.factor) != 2 or not all(f > 0 for f in self.factor):
            raise ValueError(
                f"FedAvgEpochs needs factor, two numbers > 0, got {self.factor!r:.60}"
            )

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        client: Any = obs.client
        N, T, each = len(y), client.steps, steps_an_epoch(obs)
        E = T // each
        wanted = (E if obs.order is None else 1) if self.copies is None else self.copies
        copies = max(1, min(E, wanted))
        order = obs.order
        if order is None:
            once = torch.randperm(N, generator=rng).split(client.local_batch or N)
            order = once * E
        turns = tuple(N * (t // each) + part for t, part in enumerate(order))
        unrolled = replace(obs, batch_size=E * N, labels=None, order=turns)
        at_start = obs.one_gradient()
        f0, f1 = self.factor

        def match(z):
            if wanted == 0:
                g = at_start.simulate(pixels.image(z[0]), y)
                total = {name: T * v for name, v in g.items()}
                return self.distance(total, obs.gradient)
            x = pixels.image(z)[torch.arange(E) % copies]
            sent = unrolled.simulate(x.flatten(0, 1), y.repeat(E))
            return self.distance(sent, obs.gradient)

        def loss(z, now):
            f = f0 * (f1 / f0) ** (2 * now).clamp(max=1)
            x = pixels.image(z)
            outside = (x - x.clamp(0, 1)).square().mean((0, 1)).sum()
            total = f * match(z) / T + self.tv * total_variation(z.flatten(0, 1))
            if copies > 1:
                total = total + self.invariance * same_images(self.project(z))
            return total + self.clip * outside

        return search(
            unrolled if wanted else at_start,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=gaussian(obs, copies, N, *obs.image_shape),
            loss=loss,
            match=match,
            image=lambda z: agreed(pixels.image(z)),
            labels=lambda z: y,
            optimiser=adam(self.lr),
            frames=self.frames,
        )
