"""A model as a chain of linear layers with invertible activations between them, and the equations of each layer.

Of one image: x enters a layer, z = W x + b leaves it, k = dL/dz. Then W x = z - b and, since the weights' gradient is
linear in x too, K x = dL/dW, where K has the entries of k.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from gi_lib.models.layers import Shape, probe, watched
from gi_lib.types import Classifier, NotApplicableError

REFINEMENTS, SHIFTS = 30, 14
"""How often a solution is refined at most, and how often the diagonal of a singular matrix is raised."""
INVERSES: dict[type, Callable[[Any, Tensor], Tensor]] = {
    nn.LeakyReLU: lambda act, x: torch.where(x > 0, x, x / act.negative_slope),
    nn.Sigmoid: lambda act, x: _inside(x, 0, 1).logit(),
    nn.Tanh: lambda act, x: _inside(x, -1, 1).atanh(),
    nn.ELU: lambda act, x: torch.where(x > 0, x, (_inside(x, -act.alpha, torch.inf) / act.alpha).log1p()),
    nn.Softplus: lambda act, x: _inside(x * act.beta, 0, torch.inf).expm1().log() / act.beta,
}
"""Activation -> (module, what left it) -> what entered it."""


def _inside(x: Tensor, low: float, high: float) -> Tensor:
    """x, moved by rounding errors alone into the open interval of an activation's values."""
    eps = torch.finfo(x.dtype).eps
    return x.clamp(low + eps * max(1, abs(low)), high - eps if high < torch.inf else high)


@dataclass(frozen=True, eq=False)
class Link:
    """One dense layer or convolution of a chain.

    Args:
        name: of the layer.
        layer: the module; its weight and bias are named `name`.weight and `name`.bias.
        input, output: shapes (C, H, W) of a convolution; (n, 1, 1) of a dense layer.
        activation: what follows, one of INVERSES; None at the end.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    input: Shape
    output: Shape
    activation: nn.Module | None

    @property
    def weight(self) -> Tensor:
        """[out, in, height, width] float64; 1 x 1 of a dense layer."""
        w = self.layer.weight.detach().double()
        return w if w.ndim == 4 else w[:, :, None, None]

    @property
    def bias(self) -> Tensor:
        """[out, 1, 1] float64; 0 where there is none."""
        b = self.layer.bias
        return torch.zeros(1, 1, 1).to(self.weight) if b is None else b.detach().double()[:, None, None]

    @property
    def geometry(self) -> dict[str, Any]:
        if isinstance(self.layer, nn.Linear):
            return {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        return {name: getattr(self.layer, name) for name in ("stride", "padding", "dilation")}

    @property
    def border(self) -> int:
        """How many zeros the layer pads its input with."""
        (c, h, w), (up, left) = self.input, self.geometry["padding"]
        return c * ((h + 2 * up) * (w + 2 * left) - h * w)

    def forward(self, x: Tensor) -> Tensor:
        """W x, for x [N, *input]."""
        return F.conv2d(x, self.weight, **self.geometry)

    def transposed(self, z: Tensor) -> Tensor:
        """W^T z, for z [N, *output]."""
        return conv2d_input((len(z), *self.input), self.weight, z, **self.geometry)

    def gradients(self, k: Tensor) -> Tensor:
        """The block K0 of K for k [*output]: row (o, i, j) of dL/dW[:, c] is K0 times channel c of x, for every c.

        Returns:
            [out * height * width of the kernel, H * W of the input].
        """
        _, h, w = self.input
        positions = torch.arange(1, h * w + 1, dtype=torch.float64, device=k.device).reshape(1, 1, h, w)
        seen = F.unfold(positions, self.weight.shape[2:], **self.geometry)[0].long()  # [height * width, outputs]
        out, (size, count) = len(k), seen.shape
        K = k.new_zeros(out, size, 1 + h * w)
        K.scatter_(2, seen.expand(out, size, count), k.reshape(out, 1, count).expand(out, size, count))
        return K[:, :, 1:].reshape(out * size, h * w)  # the first column is the border's

    def of_weights(self, g: Tensor) -> Tensor:
        """dL/dW in the order of `gradients`: [in, out * height * width of the kernel] float64."""
        return g.double().reshape(self.weight.shape).transpose(0, 1).flatten(1)

    def gram(self, K0: Tensor, scale: float | None = None) -> tuple[Tensor, float]:
        """W^T W + scale K^T K, [n, n] for the n entries of x, and the scale; by default that which makes both traces
        equal."""
        n, c = torch.Size(self.input).numel(), self.input[0]
        unit = torch.eye(n, dtype=K0.dtype, device=K0.device).reshape(n, *self.input)
        N = torch.cat([self.transposed(self.forward(part)).reshape(-1, n) for part in unit.split(512)])
        of_k = K0.T @ K0
        if scale is None:
            scale = (N.diagonal().mean() / of_k.diagonal().mean()).item()
        blocks = N.reshape(c, n // c, c, n // c).diagonal(dim1=0, dim2=2)  # [H W, H W, c]
        blocks.add_(of_k[:, :, None], alpha=scale)
        return N, scale

    def solve(self, z: Tensor, k: Tensor, g: Tensor) -> Tensor:
        """The x of least |W x - z|^2 + s |K x - g|^2, s as in `gram`; of several the one of least norm.

        The normal equations are solved by Cholesky's factor, and the result is refined from zero on, so that it stays
        in the span of the equations.

        Args:
            z: [*output], what the layer put out, without its bias.
            k: [*output], dL/dz.
            g: dL/dW in the layer's own shape.

        Returns:
            [*input] float64.
        """
        if isinstance(self.layer, nn.Linear):  # g = k x^T has it alone
            return torch.tensordot(k.flatten(), g.double(), 1)[:, None, None] / k.square().sum()
        K0, G = self.gradients(k), self.of_weights(g)
        N, s = self.gram(K0)
        out = len(self.weight)
        independent = z.numel() + G.numel() - out * out  # sum_p k_p z_p^T is dL/dW W^T
        shift = (1e-13 if independent >= len(N) else 1e-9) * N.diagonal().max().item()
        for _ in range(SHIFTS):
            N.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(N)
            if not info:
                break
            shift *= 10
        x, before = z.new_zeros(self.input), torch.inf
        for _ in range(REFINEMENTS):
            right = self.transposed((z - self.forward(x[None])[0])[None])[0].flatten(1)
            right = right + s * (G - x.flatten(1) @ K0.T) @ K0
            step = torch.cholesky_solve(right.reshape(-1, 1), factor).reshape(self.input)
            if not step.norm() < before:
                break
            x, before = x + step, step.norm()
        return x


def homogeneous(links: list[Link]) -> bool:
    """Whether c x in place of x makes every layer's output c times as large, for any c > 0."""
    return all(link.layer.bias is None and isinstance(link.activation, nn.LeakyReLU | None) for link in links)


def undo(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What entered an activation of INVERSES that gave x, and its derivative there."""
    z = INVERSES[type(activation)](activation, x).requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(activation(z).sum(), z)[0]
    return z.detach(), slope


def chain(model: Classifier, image_shape: Shape, further: tuple[type[nn.Module], ...] = ()) -> list[Link]:
    """The layers of a model in the order in which a forward pass runs them, the image's first.

    Args:
        further: activations that may follow a layer besides those of INVERSES.

    Raises:
        NotApplicableError: the model is not such a chain; the sentence says where.
    """
    names = {module: name for name, module in model.named_modules()}
    ran: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module, inputs, output):
        ran.append((module, inputs[0].clone(), output.clone()))

    leaves = [module for module in model.modules() if not list(module.children())]
    images = probe(model, image_shape)
    logits = watched(model, leaves, images, note)
    value, links = (images - model.mean) / model.std, list[Link]()
    for module, given, output in ran:
        name = names[module]
        if not same(given, value):
            raise NotApplicableError(
                f"what enters {name} is not what the layer before it gives, as in a residual block or behind a function"
                " that is no module; the way back needs a chain of modules. Use an attack that matches gradients"
            )
        value = output
        if same(given, output):
            continue
        if isinstance(module, nn.Conv2d | nn.Linear):
            _check(module, name, given, {link.name for link in links})
            shapes = [tuple(t.shape[1:]) if t.ndim == 4 else (t.shape[1], 1, 1) for t in (given, output)]
            links.append(Link(name, module, shapes[0], shapes[1], None))  # type: ignore[arg-type]
        elif links and links[-1].activation is None and (_invertible(module) or type(module) in further):
            links[-1] = dataclasses.replace(links[-1], activation=module)
        else:
            known = ", ".join(kind.__name__ for kind in (*further, *INVERSES))
            raise NotApplicableError(
                f"{name} is a {type(module).__name__}, which can't be undone here: the way back needs {known} behind"
                " each dense layer or convolution, and nothing else. Use an attack that matches gradients"
            )
    if (
        not links
        or not isinstance(links[-1].layer, nn.Linear)
        or not (same(value, logits) or same(torch.cat([torch.zeros_like(value), value], 1), logits))
    ):
        raise NotApplicableError(
            "the model does not end in a dense layer that gives its logits; use an attack that matches gradients"
        )
    return links


def same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.flatten(1), b.flatten(1))


def _invertible(module: nn.Module) -> bool:
    return type(module) in INVERSES and getattr(module, "negative_slope", 1) > 0


def _check(layer: nn.Conv2d | nn.Linear, name: str, given: Tensor, earlier: set[str]) -> None:
    """NotApplicableError where a layer's equations are not those of Link."""
    reason = None
    if name in earlier:
        reason = "runs twice"
    elif isinstance(layer, nn.Linear) and given.ndim != 2:
        reason = f"is dense on inputs {list(given.shape[1:])}, and not on flat ones"
    elif isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            reason = f"has {layer.groups} groups"
        elif layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            reason = f"pads by {layer.padding!r} {layer.padding_mode}, and not by a number of zeros"
    if reason:
        raise NotApplicableError(
            f"{name} {reason}, and its equations are not written out here; use an attack that matches gradients"
        )
