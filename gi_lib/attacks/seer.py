"""SEER (Garov, Dimitrov, Jovanovic, Vechev, ICLR 2024, 2306.03013): "Hiding in plain
sight".

A malicious server trains, on data of its own, the network theta that it sends together
with a linear decoder R that it keeps, so that R reads one image x+ out of the sum of a
batch's gradients: the one that is largest in a property, such as the brightest. With
g+ the gradient of the loss of x+ alone, and for the other B - 1 images once a random
combination of their gradients, of norm 1, and once their sum over sqrt(B - 1), g-,

    min over theta, R of   1 / (1 + a)  |R(g+) - x+|^2
                         + a / (1 + a)  mean over both g- of |R(g-) - R(0)|^2,

a mean over pixels, with a = 2^r and r rising linearly from -2 to log2(B) in the first
half of the training. R sees some entries of the gradient alone, drawn at random. Then

    x+  ~  R(B times the mean gradient),

as R(g+ + sum of the others) = R(g+) + R(sum) - R(0). At the end R alone is fitted once
more to what it will read, by ridge regression of x+ on the sum over the whole batch.
All gradients are those of the model in the mode that it was given in. Where batch norm
has the batch's own statistics, an image can be measured against the others of its
batch; elsewhere against numbers alone, and "the brightest" is then known only roughly.

Departs from the paper, of which the public code was read: it has a ResNet-18, B from 64
on and a million batches, here the network is whatever is given, and training takes
minutes of a CPU on a small one; the decoder is one layer, as there by default. The fit
at the end is ours. A step takes the mean over several batches, which are differentiated
together. Entries are scaled to unit size before Adam sees their weights, the rates are
larger, rise for a twentieth of the steps and fall to 0. The property is always looked
for inside the batch, not by a threshold; so of several clients, of whom the mean is
seen, their batches are not kept apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from gi_lib.copies import attackers_copy, deep_copy, forward
from gi_lib.models import check_unplanted
from gi_lib.models.planted import own_images
from gi_lib.progress import bar
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Gradient,
    Needs,
    Observation,
    Parameters,
    Reconstruction,
    function,
    real,
    whole,
)

FIRST = -2.0
"""log2 of a at the first step (the public code)."""
RIDGE = 1e-3
"""Of the fit at the end, over the mean variance of an entry."""

Property = Callable[[Tensor], Tensor]
"""Images [N, C, H, W] in [0, 1] -> what the largest of is sought [N]."""


def brightest(images: Tensor) -> Tensor:
    return images.flatten(1).mean(1)


def darkest(images: Tensor) -> Tensor:
    return -images.flatten(1).mean(1)


Entries = dict[str, Tensor]
"""Parameter name -> which entries of its gradient, flattened."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """R(z) = W z + b, W [C H W, d], of the d entries of a gradient that are kept.

    Args:
        batch: B, of the batches that it was trained for.
        sought, others: both terms of the loss at the end of the training.
    """

    entries: Entries
    weight: Tensor
    bias: Tensor
    batch: int
    sought: float
    others: float


def kept(entries: Entries, g: Gradient) -> Tensor:
    """z [d]."""
    return torch.cat([g[name].flatten()[chosen] for name, chosen in entries.items()])


def combinations(n: int, B: int, rng: torch.Generator) -> Tensor:
    """[n, 3, B]: weights of the images' gradients in g+ and in both g-. x+ is last."""
    others = torch.ones(B)
    others[-1] = 0
    some = F.normalize(torch.randn(n, B, generator=rng) * others, dim=1)
    alone = (1 - others).expand(n, B)
    return torch.stack([alone, some, F.normalize(others, dim=0).expand(n, B)], 1)


def alpha(progress: float, B: int) -> float:
    """a, at this share of the training."""
    return 2 ** (FIRST + (math.log2(B) - FIRST) * min(1.0, 2 * progress))


def terms(R: Tensor, x: Tensor, nothing: Tensor) -> tuple[Tensor, Tensor]:
    """What is asked of x+, and of the others.

    Args:
        R: what the decoder says [n, 3, C H W].
        x: the images that are sought [n, C H W].
        nothing: R(0) [C H W].
    """
    return (R[:, 0] - x).square().mean(), (R[:, 1:] - nothing).square().mean()


def joint_training(
    attack: "SEER",
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
) -> tuple[Gradient, Decoder]:
    """The parameters to send, and the decoder to keep.

    Args:
        model: an attacker's copy.
        images, labels: the server's own.
    """
    B, n = attack.batch, attack.batches
    theta = {
        k: p.detach().clone().requires_grad_() for k, p in Parameters(model).items()
    }
    entries: Entries = {
        name: torch.randperm(p.numel(), generator=rng)[: attack.entries].to(p.device)
        for name, p in theta.items()
    }

    def gradient(theta: Gradient, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        def weighted(theta: Gradient) -> Tensor:
            logits = forward(model, x, theta)
            return F.cross_entropy(logits, y, reduction="none") @ c

        return kept(entries, grad(weighted)(theta))

    each = vmap(vmap(gradient, (None, None, None, 0)), (None, 0, 0, 0))
    order = attack.property(images).cpu()

    def batches() -> tuple[Tensor, Tensor, Tensor]:
        drawn = [torch.randperm(len(images), generator=rng)[:B] for _ in range(n)]
        i = torch.stack(drawn)
        i = i.gather(1, order[i].argsort(1)).to(images.device)
        c = combinations(n, B, rng).to(images)
        return images[i], labels[i], c

    with torch.no_grad():
        some = torch.cat([each(theta, *batches())[:, 0] for _ in range(4)])
    scale = some.square().mean(0).sqrt()  # of an entry in g+
    scale = scale.clamp_min(1e-3 * scale.max()) * scale.numel() ** 0.5
    weight = images.new_zeros(images[0].numel(), scale.numel(), requires_grad=True)
    bias = images.flatten(1).mean(0).requires_grad_()
    adam = torch.optim.Adam(
        [
            {"params": list(theta.values()), "lr": attack.lr},
            {"params": [weight, bias], "lr": attack.decoder_lr},
        ]
    )
    rates = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: rate(k / attack.updates))
    ends = images.new_zeros(2)
    for k in bar(range(attack.updates), desc="SEER", leave=False):
        x, y, c = batches()
        R = each(theta, x, y, c) / scale @ weight.T + bias
        wanted, null = terms(R, x[:, -1].flatten(1), bias)
        a = alpha(k / attack.updates, B)
        adam.zero_grad()
        ((wanted + a * null) / (1 + a)).backward()
        adam.step()
        rates.step()
        now = torch.stack([wanted, null]).detach()
        ends = now if k == 0 else torch.lerp(ends, now, 0.05)
    if not ends.isfinite().all():
        raise FloatingPointError("SEER's training diverged; lower lr and decoder_lr")
    theta = {name: p.detach() for name, p in theta.items()}
    seen, sought = [], []
    for _ in range(-(-attack.fit // n)):
        x, y, c = batches()
        seen.append(each(theta, x, y, torch.ones_like(c[:, :1]))[:, 0] / scale)
        sought.append(x[:, -1].flatten(1))
    W, b = ridge(torch.cat(seen), torch.cat(sought))
    return theta, Decoder(entries, W / scale, b, B, *ends.tolist())


def ridge(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """W [n, d] and b [n] with x ~ W z + b, of z [N, d] and x [N, n]."""
    A = z - z.mean(0)
    K = A.T @ A
    K.diagonal().add_(RIDGE * K.trace() / len(K))
    W = torch.linalg.solve(K, A.T @ (x - x.mean(0))).T
    return W, x.mean(0) - W @ z.mean(0)


def rate(progress: float) -> float:
    """Rises for a twentieth of the training, then falls as half a cosine."""
    return min(1.0, 20 * progress + 1e-3) * (1 + math.cos(math.pi * progress)) / 2


def trained_together(obs: Observation) -> str | None:
    """A model that SEER has planted."""
    trap = obs.trapdoor
    if trap is None or (
        isinstance(trap, Decoder)
        and len(trap.bias) == torch.Size(obs.image_shape).numel()
        and trap.entries.keys() <= obs.gradient.keys()
        and all(
            i.max() < obs.gradient[name].numel() for name, i in trap.entries.items()
        )
    ):
        return None
    return (
        "the update is not of a model that SEER has planted; observe with the model and"
        " the trapdoor that `plant` returned"
    )


@dataclass(frozen=True)
class SEER:
    needs: ClassVar[Needs] = Needs(("trapdoor",), model=(trained_together,))
    revision: ClassVar[int] = 2

    property: Any = brightest  # a Property
    batch: int = 64  # B, the smallest of the paper
    updates: int = 200  # steps of Adam; the code has 100,000
    batches: int = 16  # batches a step; the public code accumulates 10
    entries: int = 600  # most of a tensor; the public code: 8,400 or .1 %
    lr: float = 1e-2  # of the network; the public code: 1e-4
    decoder_lr: float = 2e-2  # the same there
    fit: int = 6400  # batches of the fit at the end
    surrogates: int = 20_000  # images of the server's own

    def __post_init__(self):
        whole(self, "updates", "batches", "entries", "fit", "surrogates")
        whole(self, "batch", least=2)
        real(self, "lr", "decoder_lr", above=0)
        function(self, "property")

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, Decoder]:
        """The model with parameters that were trained, and their decoder."""
        use = "SEER trains on"
        images, labels = own_images(auxiliary, self.surrogates, rng, use)
        check_unplanted(model)
        if len(images) < self.batch:
            raise ValueError(
                f"SEER needs a batch of {self.batch} images of the server's own, got"
                f" {len(images)}; give more surrogates"
            )
        copy = attackers_copy(model, image_shape, self.batch)
        p = next(copy.parameters())
        images, labels = images.to(p.device, p.dtype), labels.to(p.device)
        theta, decoder = joint_training(self, copy, images, labels, rng)
        planted: Classifier = deep_copy(model)  # type: ignore[assignment]
        with torch.no_grad():
            for name, own in planted.named_parameters():
                if name in theta:
                    own.copy_(theta[name])
        return planted, decoder

    def at_most(self, obs: Observation) -> int:
        """One image, of any batch."""
        return 1

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        trap = obs.trapdoor
        z = (obs.batch_size or trap.batch) * kept(trap.entries, obs.gradient)
        x = trap.weight.to(z) @ z + trap.bias.to(z)
        images = x.clamp(0, 1).reshape(1, *obs.image_shape)
        notes = {"sought": trap.sought, "others": trap.others}
        return Reconstruction(images, None, torch.nan, notes=notes)
