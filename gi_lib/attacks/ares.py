"""ARES (Gong, Zhang, Zhang, Vo, Zhu, Pan, Wang, IEEE S&P 2026, 2603.17623).

An imprint in a dense layer of the model's own, which sees activations and not pixels;
no layer is added. The layers before it get random weights, so that the activations
measure the image at random, and its k neurons bound bins of one number h . a:

    a = A x + c,      relu(h . a - q_j),   j = 0, ..., k - 1,

where neurons act alike on what follows. As in Robbing the Fed, differences of
neighbours divide to the activations a of an image alone in its bin, a share
(1 - 1/k)^(B - 1) of B images in expectation. A has a row for each activation, which may
be fewer than pixels, so that the image is sought where it is sparse, in its cosine
transform x - 1/2 = T alpha, by a generalised Lasso:

    min over alpha of  1/2 |A T alpha - (a - c')|^2 + lambda |D alpha|_1,

c' = A 1/2 + c, what a grey image gives.

D is diagonal, sigma^-p with sigma the spread of each coefficient over data of the
server's own; p = 0 is the plain norm of the public code. It is solved by FISTA (Beck,
Teboulle, 2009) for all images at once, while lambda falls.

The paper's abstract and its public code were read. Departs from the code: biases open
all ReLUs before the imprint, so that every activation is an equation, where the code
uses those that are lit; lambda > 0, where it asks for equality; the transform is of
the whole image and its channels, where it has blocks of 8 x 8; k quantiles are of data
of the server's own, where it takes a normal law; p is ours.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.fft import dctn, idctn
from torch import Tensor, nn

from gi_lib.attacks.robbing_the_fed import edges
from gi_lib.copies import deep_copy
from gi_lib.models.layers import dense_layers, pixel_layer, probe, watched
from gi_lib.models.planted import act_alike, check_alike, own_images
from gi_lib.search import no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    real,
    whole,
)

OPEN = 0.5
"""How far a ReLU's least input is lifted above zero, in units of its inputs' range."""
FIRST, LAST = 1e-1, 1e-6
"""lambda, in units of the least that leaves alpha = 0: where it begins and ends."""
CHUNK = 256
"""Images at once in a forward pass."""


@dataclass(frozen=True, eq=False)
class Imprinted:
    """The layer whose neurons bound the bins, and sigma [C, H, W]."""

    layer: str
    sigma: Tensor


def inner_layer(model: Classifier, image_shape: tuple[int, int, int]) -> str:
    """The first dense layer with a bias and a ReLU that does not see the pixels."""
    try:
        first = pixel_layer(model, image_shape)[0]
    except NotApplicableError:
        first = None
    layers, _ = dense_layers(model, probe(model, image_shape))
    for here, after in itertools.pairwise(layers):
        behind = here.weight not in (None, first) and here.bias is not None
        if behind and torch.equal(after.input, here.output.relu()):
            return here.weight.removesuffix(".weight")  # type: ignore[union-attr]
    raise NotApplicableError(
        "ARES needs a dense layer with a bias behind the layer that sees the pixels,"
        " then a ReLU and another dense layer; this model has none. RobbingTheFed puts"
        " a layer of its own before any model"
    )


def inputs(model: Classifier, layer: str, images: Tensor) -> Tensor:
    """What the layer is given for these images, [N, m]."""
    kept: list[Tensor] = []
    for part in images.split(CHUNK):
        own = [model.get_submodule(layer)]
        watched(model, own, part, lambda _, given, out: kept.append(given[0]))
    return torch.cat(kept)


def measure_at_random(
    model: Classifier, layer: str, images: Tensor, rng: torch.Generator
) -> None:
    """Random weights for all before the layer, and biases that open their ReLUs."""
    kinds = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    order: list[nn.Module] = []
    watched(model, kinds, images[:1], lambda m, given, out: order.append(m))
    for before in order[: order.index(model.get_submodule(layer))]:
        W, b = before.weight, before.bias
        if b is None:
            raise NotApplicableError(
                f"ARES opens the ReLUs before {layer!r} by biases, and a"
                f" {type(before).__name__} among them has none; use RobbingTheFed"
            )
        with torch.no_grad():
            W.copy_(torch.randn(W.shape, generator=rng) / W[0].numel() ** 0.5)  # type: ignore[operator, arg-type, index]
            b.zero_()  # type: ignore[operator]
        ends: list[Tensor] = []

        def ran(m, given, out, ends=ends):
            out = out.transpose(0, 1).flatten(1)
            ends.append(torch.stack([out.amin(1), out.amax(1)]))

        for part in images.split(CHUNK):
            watched(model, [before], part, ran)
        low, high = torch.stack(ends)[:, 0].amin(0), torch.stack(ends)[:, 1].amax(0)
        with torch.no_grad():
            b.copy_(OPEN * (high - low) - low)  # type: ignore[operator]


def affine(
    model: Classifier, layer: str, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """A [m, n] and what a grey image gives [m]: A (x - 1/2) is what x adds to it."""
    grey = torch.full((1, *image_shape), 0.5).to(model.mean)
    step = torch.eye(grey.numel()).to(grey).reshape(-1, *image_shape) / 2
    A = inputs(model, layer, grey + step) - inputs(model, layer, grey - step)
    return A.T, inputs(model, layer, grey)[0]


def cosine(x: Tensor, inverse: bool = False) -> Tensor:
    """Orthonormal cosine transform over channels, rows and columns [..., C, H, W]."""
    transform = idctn if inverse else dctn
    turned = transform(x.numpy(force=True), axes=(-3, -2, -1), norm="ortho")
    return torch.from_numpy(turned).to(x)


def fista(M: Tensor, y: Tensor, D: Tensor, steps: int) -> Tensor:
    """alpha [N, n] of the Lasso with M [m, n], y [N, m] and D [n], all N at once."""
    v = M.sum(0)
    for _ in range(50):  # power iterations
        v = nn.functional.normalize(M.T @ (M @ v), dim=0)
    L = 1.02 * (M @ v).square().sum()
    most = ((y @ M) / D).abs().amax(1, keepdim=True)
    alpha = z = torch.zeros(len(y), M.shape[1]).to(y)
    t = 1.0
    for k in range(steps):
        lam = most * FIRST * (LAST / FIRST) ** (k / max(steps - 1, 1))
        step = z - (z @ M.T - y) @ M / L
        new = step.sign() * (step.abs() - lam * D / L).relu()
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        alpha, z = new, new + (before - 1) / t * (new - alpha)
    return alpha


@dataclass(frozen=True)
class ARES:
    needs: ClassVar[Needs] = Needs(("trapdoor",))
    revision: ClassVar[int] = 1

    bins: int = 1000  # k at most; the public code has 1,024
    p: float = 0.0  # of D = sigma^-p
    iterations: int = 200  # ours
    surrogates: int = 2000  # images of the server's own

    def __post_init__(self):
        whole(self, "bins", "surrogates", least=2)
        whole(self, "iterations")
        real(self, "p", least=0)

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, Imprinted]:
        """The model with random measurements and an imprint, no layer added."""
        use = "ARES fits biases and bins to"
        images, _ = own_images(auxiliary, self.surrogates, rng, use)
        images = images.to(model.mean)
        layer = inner_layer(model, image_shape)
        sent: Classifier = deep_copy(model)  # type: ignore[assignment]
        measure_at_random(sent, layer, images, rng)
        a = inputs(sent, layer, images)
        A, grey = affine(sent, layer, image_shape)
        apart = ((images - 0.5).flatten(1) @ A.T + grey - a).norm() / a.norm()
        if not apart < 1e-3:
            raise NotApplicableError(
                f"the activations that {layer!r} sees are no affine measurement of the"
                f" image: they are {apart:.1g} away from one, as behind a max pool; use"
                " RobbingTheFed"
            )
        imprint = sent.get_submodule(layer)
        k = min(self.bins, len(imprint.weight))  # type: ignore[arg-type]
        measured = a.double().mean(1).cpu()
        spread = measured.std()
        q = edges(measured, k)[:-1]
        with torch.no_grad():
            imprint.weight[:k] = 1 / (spread * a.shape[1])  # type: ignore[operator]
            imprint.bias[:k] = (-q / spread).to(a)  # type: ignore[operator]
        act_alike(sent, layer, image_shape, torch.zeros(k, dtype=torch.int64), 1 / k)
        return sent, Imprinted(layer, cosine(images - 0.5).std(0))

    def at_most(self, obs: Observation) -> int:
        """A bin gives one image, and no more bins are lit than there are images."""
        return no_more(obs, self.bins)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        layer, sigma = obs.trapdoor.layer, obs.trapdoor.sigma
        dW, db = imprinted_gradient(obs, self.bins)
        noise = 64 * torch.finfo(db.dtype).eps * db.abs().max()
        dW, db = (torch.cat([g[:-1] - g[1:], g[-1:]]) for g in (dW, db))
        lit = (db.abs() > noise).nonzero().flatten()
        most = lit[db[lit].abs().argsort(descending=True)[: self.at_most(obs)]]
        A, grey = affine(obs.model, layer, obs.image_shape)
        M = cosine(A.reshape(-1, *obs.image_shape)).flatten(1)
        y = dW[most] / db[most, None] - grey
        alpha = fista(M, y, sigma.flatten().pow(-self.p), self.iterations)
        apart = ((alpha @ M.T - y).norm(dim=1) / y.norm(dim=1)).mean()
        x = 0.5 + cosine(alpha.reshape(-1, *obs.image_shape), inverse=True)
        facts = {"lit_bins": len(lit), "equations": len(M), "misfit": apart.item()}
        return Reconstruction(x.clamp(0, 1), None, torch.nan, notes=facts)


def imprinted_gradient(obs: Observation, bins: int) -> tuple[Tensor, Tensor]:
    """The gradients of the imprint's rows and biases, if this model has the imprint."""
    names = [f"{obs.trapdoor.layer}.{kind}" for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in obs.gradient]:
        raise NotApplicableError(
            f"the update has no {' and no '.join(missing)}: the model that was trained"
            " has no such imprint; let clients train the one that `plant` returned"
        )
    dW, db = (obs.gradient[name][:bins] for name in names)
    check_alike(obs.model.get_parameter(names[0])[:bins], obs.trapdoor.layer)
    return dW, db
