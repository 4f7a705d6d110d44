"""What an audit knows without an attack: what the model is, public images for it, and how many equations there are."""

import base64
import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gi_lib import data, results
from gi_lib.copies import batch_norms, deep_copy, masks
from gi_lib.defenses import Defense
from gi_lib.federated import Client, observe
from gi_lib.models import rank as rank_analysis
from gi_lib.models.chain import chain
from gi_lib.models.layers import logit_layer, probe
from gi_lib.types import Batch, Classifier, Images, NotApplicableError, Observation

PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh)
SMOOTH = (nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Softplus, nn.Mish, nn.Hardswish)
MOST_UNKNOWNS = 5000
"""In a layer's equations, so that R-GAP takes a minute or less."""
MOST_DRAWS = 20_000
"""Of SPEAR, for as long."""
MARGIN = 8
"""More random directions than unknowns, so that their rank is that of the Jacobian."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images [N, C, H, W] in [0, 1] with labels [N], from which clients or an attacker's own data are drawn."""

    images: Images
    labels: Tensor
    about: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()[:12]

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images and their labels, none twice; fewer where there are no more."""
        chosen = torch.randperm(len(self.images), generator=rng)[:n]
        return self.images[chosen], self.labels[chosen]

    def batch(self, indices: Tensor, num_classes: int) -> Batch:
        """Those at the indices; labels beyond the model's classes start again at 0."""
        return Batch(self.images[indices], self.labels[indices] % num_classes)


def public_images(shape: tuple[int, int, int], split: str = "test") -> Pictures | None:
    """The embedded photographs in this shape (C, H, W); None for other than 1 or 3 channels."""
    channels, height, width = shape
    if channels not in (1, 3):
        return None
    side = min(max(height, width, data.SMALLEST), data.LARGEST_PHOTO)
    photos = data.load("photos", split=split, size=side)
    batch = photos.batch(range(len(photos)))
    images = batch.images if channels == 3 else batch.images.mean(1, keepdim=True)
    if (height, width) != (side, side):
        images = nn.functional.interpolate(images, size=(height, width), mode="bilinear", antialias=True).clamp(0, 1)
    return Pictures(images, batch.labels, f"the {len(photos)} embedded photographs at {height} x {width}")


def picture_uri(rows: Sequence[Images]) -> str:
    """Rows of images [B, C, H, W], one below the other, a grey line between, as the data URI of a lossless PNG."""
    buffer = io.BytesIO()
    apart = [nn.functional.pad(images, (1, 1, 1, 1), value=0.5) for images in rows]
    results.bitmap(apart).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def rank(model: Classifier, batch: Batch, seconds: float) -> int | None:
    """Rank of the Jacobian of one step's gradient in the images' pixels, in float64; None where the derivatives take
    longer.

    n + MARGIN random combinations of the gradient's entries are differentiated in the n pixels: their rank is that of
    all entries, almost surely, up to the tolerance of torch.linalg.matrix_rank.
    """
    rng = torch.Generator().manual_seed(0)
    double: Classifier = deep_copy(model).double()  # type: ignore[assignment]
    images = batch.images.double()
    obs = observe(double, Batch(images, batch.labels), rng=rng)
    x = images.to(obs.device).requires_grad_()
    y = batch.labels.to(obs.device)
    g = torch.cat([part.reshape(-1) for part in obs.simulate(x, y).values()])
    rows: list[Tensor] = []
    begun = time.perf_counter()
    while len(rows) < x.numel() + MARGIN:
        mix = torch.randn(len(g), generator=rng, dtype=torch.float64).to(obs.device)
        rows.append(torch.autograd.grad(g @ mix, x, retain_graph=True)[0].reshape(-1))
        taken = time.perf_counter() - begun
        if taken / len(rows) * (x.numel() + MARGIN) > seconds and len(rows) >= 3:
            return None
    return int(torch.linalg.matrix_rank(torch.stack(rows)))


def largest_system(obs: Observation) -> int:
    """The unknowns of the largest convolution that R-GAP would solve; 0 where it does not apply."""
    try:
        links = chain(obs.model, obs.image_shape)
    except NotApplicableError:
        return 0
    return max([torch.Size(link.input).numel() for link in links if isinstance(link.layer, nn.Conv2d)], default=0)


def facts_of(
    obs: Observation, model: Classifier, client: Client, defense: Defense | None
) -> tuple[tuple[str, str, str], ...]:
    """What the setting is, its value, and what that means."""
    norms = batch_norms(obs.model)
    own = sum(norm.own_statistics for norm in norms.values())
    dropping = masks(model)
    kinds = [type(layer).__name__ for layer in obs.model.modules() if isinstance(layer, (*PIECEWISE_LINEAR, *SMOOTH))]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = torch.stack([g.square().sum() for g in obs.gradient.values()]).sum().sqrt().item()
    c, h, w = obs.image_shape
    return (
        ("images", f"{c} x {h} x {w}, {obs.num_classes} classes", "more pixels are harder to search"),
        ("parameters", f"{count:,}", "each gives a number of the update"),
        ("first layer", *_first_layer(obs)),
        ("last layer", *_last_layer(obs)),
        ("rank analysis", *_rank_analysis(obs)),
        (
            "activation",
            ", ".join(dict.fromkeys(kinds)) or "no layer of its own",
            "attacks by L-BFGS want a smooth one"
            if any(isinstance(layer, PIECEWISE_LINEAR) for layer in obs.model.modules())
            else "no kink was seen: attacks by L-BFGS can run",
        ),
        (
            "batch norm",
            f"{len(norms)} layers, {own} in train mode" if norms else "none",
            "in train mode it mixes the images of a batch, and an update of the whole state tells their statistics"
            if own
            else "in eval mode it is a fixed map, as attackers like it"
            if norms
            else "nothing mixes images before the loss",
        ),
        (
            "dropout",
            ", ".join(dropping) or "none in this mode",
            "the attacker does not know which units were dropped" if dropping else "nothing random to guess",
        ),
        ("client", str(client), "steps at weights that nobody has seen" if client.steps > 1 else "one gradient"),
        (
            "batch",
            f"{obs.batch_size} image{'s' if obs.batch_size != 1 else ''}",
            "the update is their mean" if obs.batch_size != 1 else "nothing to mix",
        ),
        (
            "defense of simulated clients",
            "none" if defense is None else str(defense),
            "what leaks, leaks undefended" if defense is None else "the attacker is not told of it",
        ),
        ("norm of the update", f"{size:.3g}", "noise counts in relation to it"),
    )


def _rank_analysis(obs: Observation) -> tuple[str, str]:
    """The index of the architecture, for one image."""
    try:
        index = rank_analysis.index(rank_analysis.count(obs.model, obs.image_shape))
    except (ValueError, RuntimeError, NotImplementedError) as error:  # a model that can't run without its numbers
        return "not counted", str(error).partition("\n")[0]
    if index > 0:
        return f"index {index:,}", "for one image a layer has more unknowns than equations: R-GAP can't be exact"
    return (
        f"index {index:,}",
        "for one image each layer has as many equations as unknowns, if it can be gone back through",
    )


def _first_layer(obs: Observation) -> tuple[str, str]:
    """The first layer with parameters that a pass runs, and what its kind means."""
    ran: list[nn.Module] = []
    layers = [m for m in obs.model.modules() if list(m.parameters(recurse=False)) and not list(m.children())]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: ran.append(layer)) for layer in layers]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            obs.model(probe(obs.model, obs.image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        return "not a module of its own", "it can't be told from outside"
    first = ran[0]
    bias = "with" if getattr(first, "bias", None) is not None else "without"
    if isinstance(first, nn.Linear):
        return (
            f"{type(first).__name__}, {bias} bias",
            "dense: with a bias, its input for one image is a ratio of its gradients",
        )
    if isinstance(first, nn.Conv2d):
        kernel = "x".join(map(str, first.kernel_size))
        return f"{type(first).__name__} {kernel}, {bias} bias", "it mixes patches: the bias ratio does not apply"
    return f"{type(first).__name__}, {bias} bias", "the bias ratio does not apply"


def _last_layer(obs: Observation) -> tuple[str, str]:
    try:
        layer = logit_layer(obs.model, obs.image_shape)
    except NotApplicableError as error:
        return "not dense", str(error)
    if layer.bias is None:
        return "dense, without bias", "its rows tell the label of one image"
    return "dense, with bias", "the signs of its bias gradient tell the label of one image"
