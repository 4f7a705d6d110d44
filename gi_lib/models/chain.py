"""A model as a chain: dense layers and convolutions one after another, each followed by an activation of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gi_lib.models.layers import Shape, probe
from gi_lib.types import Classifier, NotApplicableError


@dataclass(frozen=True, eq=False)
class Link:
    """One layer of a chain and the activation behind it.

    Args:
        name: of the layer in the model.
        weight: name of its weight among the parameters.
        bias: name of its bias, or None.
        layer: the layer itself.
        activation: what follows it, or None.
        shape: (C, H, W) of its input; a dense layer sees (features, 1, 1).
        output: (F, H', W') of its output.
    """

    name: str
    weight: str
    bias: str | None
    layer: nn.Conv2d | nn.Linear
    activation: nn.Module | None
    shape: Shape
    output: Shape

    @property
    def kernel(self) -> Tensor:
        """The weight as a convolution's, [F, C, kh, kw]."""
        W = self.layer.weight.detach()
        return W if W.ndim == 4 else W[:, :, None, None]

    def convolve(self, x: Tensor, W: Tensor) -> Tensor:
        """W * x without a bias, at this layer's stride and padding, for any W [F, C, kh, kw] and x [B, C, H, W]."""
        stride, padding = self._geometry
        return F.conv2d(x, W, stride=stride, padding=padding)

    def transposed(self, k: Tensor, W: Tensor) -> Tensor:
        """W^T k [B, C, H, W], the adjoint of `convolve`, for k [B, F, H', W']: what an error sends back."""
        stride, padding = self._geometry
        left = [
            n + 2 * p - t - (m - 1) * s
            for n, m, s, p, t in zip(self.shape[1:], self.output[1:], stride, padding, W.shape[2:], strict=True)
        ]
        return F.conv_transpose2d(k, W, stride=stride, padding=padding, output_padding=left)

    @property
    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if isinstance(self.layer, nn.Linear):
            return (1, 1), (0, 0)
        assert not isinstance(self.layer.padding, str)
        return self.layer.stride, self.layer.padding


PLAIN = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
"""Layers that change no number where no unit is dropped."""


def chain(model: Classifier, image_shape: Shape, activations: tuple[type[nn.Module], ...]) -> list[Link]:
    """The layers of a model from its input to its logits, if they are a chain.

    A forward pass tells: what each layer is given must be what the one before it has returned.

    Args:
        activations: the kinds that may stand between two layers.

    Raises:
        NotApplicableError: a layer is of another kind, or the model does something between two layers.
    """
    ran: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def hook(name):
        return lambda layer, inputs, output: ran.append((name, layer, inputs[0].detach(), output.detach()))

    leaves = [(name, layer) for name, layer in model.net.named_modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(hook(name or "net")) for name, layer in leaves]
    try:
        x = probe(model, image_shape)
        with torch.no_grad():
            logits = model(x)
    finally:
        for handle in hooks:
            handle.remove()
    names = {id(p): name for name, p in model.named_parameters()}
    links: list[Link] = []
    value, before = (x - model.mean) / model.std, "the image"
    for name, layer, given, output in ran:
        if not isinstance(layer, (nn.Conv2d, nn.Linear, *PLAIN, *activations)):
            raise NotApplicableError(
                f"layer {name!r} is a {type(layer).__name__}, and what came before it can't be told from what comes"
                " after it; use an attack that matches gradients"
            )
        if not torch.equal(given.flatten(1), value.flatten(1)):
            raise NotApplicableError(
                f"the model does something between {before} and {name!r} that is no layer, such as a sum of two"
                " branches or a pool, so that it is no chain of layers; use an attack that matches gradients"
            )
        if isinstance(layer, nn.Conv2d | nn.Linear):
            links.append(_link(name, layer, given, output, names))
        elif isinstance(layer, activations):
            if not links or links[-1].activation is not None:
                raise NotApplicableError(f"activation {name!r} follows no layer of its own; give it one")
            last = links[-1]
            links[-1] = Link(last.name, last.weight, last.bias, last.layer, layer, last.shape, last.output)
        value, before = output, repr(name)
    if not torch.equal(value, logits) or not links or not isinstance(links[-1].layer, nn.Linear):
        raise NotApplicableError(f"the model ends in {before} and no dense layer; use an attack that matches gradients")
    return links


def _link(name: str, layer: nn.Conv2d | nn.Linear, given: Tensor, output: Tensor, names: dict[int, str]) -> Link:
    if isinstance(layer, nn.Conv2d):
        odd = layer.groups != 1 or layer.padding_mode != "zeros" or set(layer.dilation) != {1}
        if odd or isinstance(layer.padding, str):
            raise NotApplicableError(
                f"convolution {name!r} has groups, dilation, a padding by name or one that is not of zeros; only plain"
                " ones are solved"
            )
    elif given.ndim != 2:
        raise NotApplicableError(f"dense layer {name!r} runs at several positions; only flat inputs are solved")
    weight, bias = names.get(id(layer.weight)), None if layer.bias is None else names.get(id(layer.bias))
    if weight is None or (layer.bias is not None and bias is None):
        raise NotApplicableError(
            f"the weight or bias of {name!r} is computed from other parameters; only plain ones are solved"
        )
    shape, out = ((*t.shape[1:], 1, 1)[:3] for t in (given, output))
    return Link(name, weight, bias, layer, None, shape, out)
