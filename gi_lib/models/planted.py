"""Rows of a malicious server's own where they see every pixel, and the gradient that comes back in them."""

import torch
from torch import Tensor, nn

from gi_lib.copies import deep_copy
from gi_lib.models import with_front
from gi_lib.models.layers import Shape, dense_layers, pixel_layer, probe, zeros_follow
from gi_lib.types import Auxiliary, Classifier, Images, Labels, NotApplicableError, Observation


def own_images(auxiliary: Auxiliary | None, number: int, rng: torch.Generator, use: str) -> tuple[Images, Labels]:
    """So many images of a server's own, with their labels.

    Raises:
        ValueError: it has none; `use` begins the sentence that says what for.
    """
    if auxiliary is None:
        raise ValueError(f"{use} images of the server's own; give it auxiliary data")
    return auxiliary.draw(number, rng)


class DenseFront(nn.Module):
    """x + U relu(W x + b), for images x [B, C, H, W].

    U [H, k] adds to each line of pixels a mixture of its own, so that neurons act on the network behind it in different
    ways, as they do in a network that begins with a dense layer.

    Args:
        weight: W [k, C H W].
        bias: b [k].
        lines: H.
        rng: draws U from N(0, 1 / k^2).
    """

    def __init__(self, weight: Tensor, bias: Tensor, lines: int, rng: torch.Generator):
        super().__init__()
        rows, pixels = weight.shape
        self.measure, self.spread = nn.Linear(pixels, rows), nn.Linear(rows, lines, bias=False)
        with torch.no_grad():
            self.measure.weight.copy_(weight)
            self.measure.bias.copy_(bias)
            self.spread.weight.copy_(torch.randn(lines, rows, generator=rng) / rows)

    def forward(self, x: Tensor) -> Tensor:
        a = self.measure(x.flatten(1)).relu()
        return x + self.spread(a)[:, None, :, None]


def plant_rows(
    model: Classifier, image_shape: Shape, weight: Tensor, bias: Tensor, rng: torch.Generator
) -> tuple[Classifier, str]:
    """A copy of the classifier with rows relu(W x + b) on its normalised pixels, and the name of their layer.

    A first layer that is dense on the pixels, with a bias and a ReLU behind it, takes them in place of its own
    first rows, as many as it has: parameters change, and nothing else. Any other model gets a DenseFront before it.

    Args:
        weight: W [k, C H W], bias: b [k].

    Raises:
        ValueError: the model has a front already.
    """
    p = next(model.parameters())
    weight, bias = weight.to(p.device, p.dtype), bias.to(p.device, p.dtype)
    name = _dense_with_relu(model, image_shape)
    if name is None:
        front = DenseFront(weight, bias, image_shape[1], rng).to(p.device, p.dtype)
        return with_front(model, front), "net.front.measure"
    planted: Classifier = deep_copy(model)  # type: ignore[assignment]
    layer, (_, _, pixels) = planted.get_submodule(name), pixel_layer(model, image_shape)
    k = min(len(weight), len(layer.weight))  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight[:k, pixels] = weight[:k]  # type: ignore[operator]
        layer.bias[:k] = bias[:k]  # type: ignore[operator]
    return planted, name


def rows_of_its_own(model: Classifier, image_shape: Shape) -> int | None:
    """How many rows `plant_rows` can replace; None where it puts a front before the model, which has all of them."""
    name = _dense_with_relu(model, image_shape)
    return None if name is None else len(model.get_submodule(name).weight)  # type: ignore[arg-type]


def act_alike(model: Classifier, name: str, image_shape: Shape, family: Tensor, gain: float) -> int:
    """Let neurons of a family act alike on what follows: each as the first of its family did, times `gain`.

    Changes the model itself. Neurons act alike if the next dense layer, which must read their ReLU, has the same column
    for them.

    Args:
        name: the dense layer.
        family: [k] from 0 on, of its first k neurons.

    Returns:
        How many units the next layer has.

    Raises:
        NotApplicableError: something else than a ReLU and a dense layer follows.
    """
    layers, _ = dense_layers(model, probe(model, image_shape))
    names = [layer.weight for layer in layers]
    i = names.index(f"{name}.weight")
    if i + 1 == len(layers) or not torch.equal(layers[i + 1].input, layers[i].output.relu()) or names[i + 1] is None:
        raise NotApplicableError(
            f"neurons of {name!r} are to act alike on the layer after them, and what follows is not a ReLU and a dense"
            " layer; plant rows that need not act alike (TrapWeights, QBI), or a front of its own (RobbingTheFed)"
        )
    weight = dict(model.named_parameters())[names[i + 1]]  # type: ignore[index]
    first = torch.stack([(family == f).nonzero()[0, 0] for f in range(int(family.max()) + 1)])
    with torch.no_grad():
        weight[:, : len(family)] = gain * weight[:, first][:, family]
    return len(weight)


def check_alike(weight: Tensor, name: str) -> None:
    """Raises:
    NotApplicableError: not all rows of this part of the layer's weight measure the same, as planted ones do.
    """
    if (weight != weight[0]).any():
        raise NotApplicableError(
            f"the rows of {name!r} do not measure the same, as they did when they were planted; let clients train the"
            " model that `plant` returned"
        )


def _dense_with_relu(model: Classifier, image_shape: Shape) -> str | None:
    try:
        weight = pixel_layer(model, image_shape)[0]
    except NotApplicableError:
        return None
    return weight.removesuffix(".weight") if zeros_follow(model, weight, image_shape) else None


def planted_rows(obs: Observation) -> tuple[Tensor, Tensor]:
    """The weight [k, C H W], in the order of the pixels, and the bias [k] of the planted layer."""
    return _planted(obs, dict(obs.model.named_parameters()))


def planted_gradient(obs: Observation) -> tuple[Tensor, Tensor]:
    """Their gradients.

    Raises:
        NotApplicableError: the model is not the one that was planted, or the client has frozen the layer.
    """
    return _planted(obs, obs.gradient)


def _planted(obs: Observation, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    *names, pixels = pixel_layer(obs.model, obs.image_shape)
    if names != [f"{obs.trapdoor}.weight", f"{obs.trapdoor}.bias"]:
        raise NotApplicableError(
            f"the trapdoor is the layer {obs.trapdoor!r}, and the first dense layer on the pixels is that of {names};"
            " let clients train the model that `plant` returned beside this trapdoor"
        )
    if frozen := [name for name in names if name not in tensors]:
        raise NotApplicableError(
            f"{', '.join(frozen)} of the planted layer are frozen, and no gradient of theirs is sent; plant where the"
            " client trains"
        )
    return tensors[names[0]][:, pixels], tensors[names[1]]
