"""Questions about a model that only a forward pass answers: which dense layers it runs, and on what."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gi_lib.types import Classifier, NotApplicableError

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense layer as it ran on a probe.

    Args:
        weight: name of its weight [out, in] among the parameters; None where it is computed from others.
        bias: name of its bias [out], or None.
        input: [B, in], what it was given.
        output: [B, out].
    """

    weight: str | None
    bias: str | None
    input: Tensor
    output: Tensor


def probe(model: Classifier, image_shape: Shape, size: int = 2) -> Tensor:
    """`size` images [size, C, H, W] in [0, 1], whose pixels all differ; the same at each call."""
    p = next(model.parameters())
    return torch.rand(size, *image_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        p.device, p.dtype
    )


def watched(
    model: Classifier, layers: Iterable[nn.Module], images: Tensor, ran: Callable[[nn.Module, tuple, Tensor], None]
) -> Tensor:
    """The logits [B, K] of a forward pass; ran(layer, inputs, output) is called as each of these layers has run."""
    hooks = [layer.register_forward_hook(ran) for layer in layers]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            return model(images)
    finally:
        for hook in hooks:
            hook.remove()


def dense_layers(model: Classifier, images: Tensor) -> tuple[list[Dense], Tensor]:
    """The dense layers in the order in which a forward pass runs them, those on flat inputs, and the logits [B, K]."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: list[Dense] = []

    def ran(layer, inputs, output):
        if inputs[0].ndim == 2:
            bias = None if layer.bias is None else names.get(id(layer.bias))
            found.append(Dense(names.get(id(layer.weight)), bias, inputs[0], output))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return found, watched(model, layers, images, ran)


def logit_layer(model: Classifier, image_shape: Shape) -> Dense:
    """The dense layer whose outputs are the logits, or the logits up to a constant as log_softmax leaves them.

    Raises:
        NotApplicableError: the model ends otherwise.
    """
    layers, logits = dense_layers(model, probe(model, image_shape))
    centred = logits - logits.logsumexp(1, keepdim=True)
    for layer in reversed(layers):
        out = layer.output
        if out.shape[1] == 1 and logits.shape[1] == 2:
            out = torch.cat([torch.zeros_like(out), out], 1)
        if out.shape == logits.shape and torch.allclose(
            out - out.logsumexp(1, keepdim=True), centred, rtol=1e-4, atol=1e-5
        ):
            return layer
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4):
        raise NotApplicableError(
            "the model ends in a softmax, so that its outputs are probabilities and not logits; end it with the"
            " dense layer, or tell the attacker the labels: ThreatModel(knows_labels=True)"
        )
    raise NotApplicableError(
        f"no dense layer with {logits.shape[1]} outputs makes the logits; observe with ThreatModel(knows_labels=True)"
    )


def pixel_layer(model: Classifier, image_shape: Shape) -> tuple[str, str, Tensor]:
    """The first dense layer, which must see every pixel once, and their arrangement.

    Returns:
        The names of its weight and its bias, and the arrangement [C H W] int64, where pixel i of the image as the model
        normalises it is input arrangement[i].

    Raises:
        NotApplicableError: the model begins otherwise.
    """
    images = probe(model, image_shape, 2)
    pixels = images[0].numel()
    layers, _ = dense_layers(model, images)
    begins = f"an attack on the first dense layer needs one on all {pixels} pixels, with a bias"
    if not layers or layers[0].input.shape[1] != pixels:
        kind = next((type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))), "nothing")
        raise NotApplicableError(f"{begins}; this model begins with {kind}; use an attack that matches gradients")
    first = layers[0]
    if first.weight is None or first.bias is None:
        raise NotApplicableError(f"{begins}; in this model's it is missing or computed from other parameters")
    seen, given = ((images - model.mean) / model.std).flatten(1), first.input
    mix = torch.tensor([1.0, torch.pi], dtype=torch.float64, device=images.device)  # both images, so that no two agree
    by_value, by_input = (mix @ seen.double()).argsort(), (mix @ given.double()).argsort()
    arrangement = torch.empty_like(by_value)
    arrangement[by_value] = by_input
    if not torch.allclose(given[:, arrangement], seen, rtol=1e-4, atol=1e-6):
        raise NotApplicableError(
            f"{begins}; this model changes the pixels before it, and not their order alone; use an attack that"
            " matches gradients"
        )
    return first.weight, first.bias, arrangement


def zeros_follow(model: Classifier, weight: str, image_shape: Shape) -> bool:
    """Whether the logits do not depend on what the dense layer of this weight gives below zero, as behind a ReLU."""
    kept: list[Tensor] = []
    layer = model.get_submodule(weight.rpartition(".")[0])

    def keep(_, inputs, output):
        kept.append(output)
        return output.clone()  # a ReLU in place overwrites that one

    handle = layer.register_forward_hook(keep)
    images = probe(model, image_shape)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            logits = model(images.requires_grad_())
    finally:
        handle.remove()
    slope = torch.autograd.grad(logits.square().sum(), kept[0])[0]
    return bool((kept[0] <= 0).any() and (slope[kept[0] <= 0] == 0).all() and slope.any())
