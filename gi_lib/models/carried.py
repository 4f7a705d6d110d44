"""Convolutions whose weights carry an image on to the dense layers, and the way back from what arrives there.

A convolution's output channel copies an input channel where one tap of its kernel is 1. Where sides are halved behind
it, by its stride or by a pool, four channels that copy with a shift of their own keep what one would lose.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gi_lib.models.chain import same
from gi_lib.models.layers import Shape, probe, watched
from gi_lib.types import Classifier, NotApplicableError

ONE_SIDED = ((0, 0), (0, 1), (1, 0), (1, 1))
TWO_SIDED = ((-1, -1), (-1, 1), (1, -1), (1, 1))
"""Shifts down and to the right, one for each of four channels. In each channel of the second kind a pool of 2 x 2 cells
to one sees one of them, beside zeros."""
Shifts = tuple[tuple[int, int], ...]
POOLS = {nn.AvgPool2d: "mean", nn.MaxPool2d: "max"}


@dataclass(frozen=True)
class Step:
    """A convolution with its activation and what halves sides behind it.

    Args:
        name: of the convolution.
        room: its number of output channels.
        size: height and width of what it is given.
        halves: "stride", or a "mean" or "max" pool; "" for nothing.
        sigmoid: whether a sigmoid follows it, and not a ReLU or nothing.
        carried: how many of its input channels, as it is planted, carry the image; of the first one, how many of its
            outputs with one shift.
        shifts: one for each copy of them; () for one copy, which is not shifted.
    """

    name: str
    room: int
    size: tuple[int, int]
    halves: str = ""
    sigmoid: bool = False
    carried: int = 0
    shifts: Shifts = ()

    @property
    def out(self) -> int:
        """How many output channels carry the image."""
        return self.carried * max(1, len(self.shifts))

    @property
    def arrives(self) -> tuple[int, int, int]:
        """The shape of what arrives behind it."""
        by = 2 if self.halves else 1
        return self.out, self.size[0] // by, self.size[1] // by


def steps_of(model: Classifier, image_shape: Shape) -> tuple[tuple[Step, ...], list[str]]:
    """The convolutions of a model in order, with what each shall carry, and the names of its dense layers.

    A colour takes a channel, and where the model has a max pool a second one, for one minus it. As many of the last
    steps that halve sides are shifted as there are channels for.

    Raises:
        NotApplicableError: the model is no chain of such layers, or has too few channels; the sentence says where.
    """
    names = {module: name for name, module in model.named_modules()}
    ran: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module, inputs, output):
        ran.append((module, inputs[0].clone(), output.clone()))

    images = probe(model, image_shape)
    logits = watched(model, [m for m in model.modules() if not list(m.children())], images, note)
    value, steps, dense = (images - model.mean) / model.std, list[Step](), list[str]()
    bare = False  # whether the last layer has had no activation so far
    for module, given, output in ran:
        name, kind = names[module], type(module)
        if kind is nn.ReLU and module.inplace and same(output, value.relu()):
            given = value  # which it has written over
        if not same(given, value):
            raise _no(f"what enters {name} is not what the layer before it gives, as in a residual block")
        value = output
        if isinstance(module, nn.Conv2d) and not dense:
            _check(module, name, given, output)
            steps.append(_step(module, name, given))
            bare = True
        elif isinstance(module, nn.Linear) and given.ndim == 2:
            if module.bias is None or (dense and bare):
                raise _no(f"{name} has no bias" if module.bias is None else f"no ReLU follows {dense[-1]}")
            dense.append(name)
            bare = True
        elif bare and (kind is nn.ReLU or (kind is nn.Sigmoid and not dense)):
            bare = False
            if kind is nn.Sigmoid:
                steps[-1] = dataclasses.replace(steps[-1], sigmoid=True)
        elif kind in POOLS and steps and not dense and not steps[-1].halves and _pools(module, given, output):
            steps[-1] = dataclasses.replace(steps[-1], halves=POOLS[kind])
            bare = False
        elif not same(given, output):
            raise _no(f"{name} is a {kind.__name__} from {list(given.shape[1:])} to {list(output.shape[1:])}")
    if not dense or not same(value, logits):
        raise _no("the model does not end in a dense layer that gives a logit for each class")
    for name in dense:
        if (rows := int(model.get_submodule(name).out_features)) < model.num_classes:  # type: ignore[arg-type]
            raise _no(f"{name} has {rows} neurons, and {model.num_classes} classes need one each")
    return _planned(steps, image_shape[0]), dense


def _no(reason: str) -> NotApplicableError:
    return NotApplicableError(
        "weights that carry an image on need a chain of convolutions that keep sides or halve them, with ReLU, sigmoid"
        f" and pools of 2 x 2, and dense layers with ReLU and biases behind it; here {reason}. Plant rows in a front"
        " instead: RobbingTheFed, TrapWeights or QBI"
    )


def _check(layer: nn.Conv2d, name: str, given: Tensor, output: Tensor) -> None:
    (up, left), stride = layer.padding if isinstance(layer.padding, tuple) else (0, 0), layer.stride[0]
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros" and stride in (1, 2)
    taps = 0 < up < layer.kernel_size[0] - 1 and 0 < left < layer.kernel_size[1] - 1  # a neighbour on each side
    if layer.bias is None or not plain or not taps or [stride * n for n in output.shape[2:]] != [*given.shape[2:]]:
        raise _no(
            f"{name} has no bias"
            if layer.bias is None
            else f"{name} is {layer} from {list(given.shape[1:])} to {list(output.shape[1:])}"
        )


def _step(layer: nn.Conv2d, name: str, given: Tensor) -> Step:
    height, width = given.shape[2:]
    return Step(name, layer.out_channels, (height, width), "stride" if layer.stride[0] == 2 else "")


def _pools(pool: nn.Module, given: Tensor, output: Tensor) -> bool:
    kernel, padding = (v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.padding))
    return kernel == (2, 2) and padding == (0, 0) and [2 * n for n in output.shape[2:]] == [*given.shape[2:]]


def _planned(steps: list[Step], colours: int) -> tuple[Step, ...]:
    """With as many shifted steps, the last ones, as there are channels for."""
    halving = [i for i, step in enumerate(steps) if step.halves]
    for first in range(len(halving) + 1):
        planned, carried = list[Step](), colours * (2 if any(step.halves == "max" for step in steps) else 1)
        for i, step in enumerate(steps):
            single = planned and step.halves == "max" and step.size == (2, 2)
            shifts = (TWO_SIDED if single else ONE_SIDED) if i in halving[first:] else ()
            planned.append(dataclasses.replace(step, carried=carried, shifts=shifts))
            carried = planned[-1].out
        if all(step.out <= step.room for step in planned):
            return tuple(planned)
    small = next(step for step in planned if step.out > step.room)
    raise _no(f"{small.name} has {small.room} channels, and the image needs {small.out}")


@torch.no_grad()
def carry(model: Classifier, steps: tuple[Step, ...]) -> None:
    """Write the weights of the first `out` channels of each step; its other channels stay as they are.

    The first step takes the model's normalisation back. A stride without shifts takes the mean of 2 x 2 pixels.
    """
    for i, step in enumerate(steps):
        layer: Any = model.get_submodule(step.name)
        up, left = layer.padding
        copies: list[Shifts] = [(shift,) for shift in step.shifts or ((0, 0),)]
        if step.halves == "stride" and not step.shifts:
            copies = [ONE_SIDED]
        colours = layer.in_channels
        std, mean = (v.flatten().expand(colours) for v in (model.std, model.mean)) if i == 0 else (None, None)
        layer.weight[: step.out] = 0
        layer.bias[: step.out] = 0
        for out in range(step.out):
            copy, k = divmod(out, step.carried)
            j, sign = (k % colours, -1 if k >= colours else 1) if i == 0 else (k, 1)
            for down, right in copies[copy]:
                size = sign * (1.0 if std is None else std[j]) / len(copies[copy])
                layer.weight[out, j, up + down, left + right] = size
            if mean is not None:
                layer.bias[out] = mean[j] if sign > 0 else 1 - mean[j]


def brought_back(model: Classifier, steps: tuple[Step, ...], features: Tensor, image_shape: Shape) -> Tensor:
    """The images [N, C, H, W] float64 that planted convolutions turned into these features [N, D].

    Exact for steps that are shifted or halve nothing, but for those with a max pool. A pixel behind max pools lies
    between the greatest of the minima and the least of the maxima over windows that have it, and is taken for the
    middle. What is halved without shifts is enlarged again, each value to 2 x 2.
    """
    if not steps:
        return (model.mean + model.std * features.reshape(-1, *image_shape)).double()
    x = features.double().unflatten(1, (-1, *steps[-1].arrives[1:]))[:, : steps[-1].out]
    for i, step in reversed(list(enumerate(steps))):
        x = _before(step, x, _beyond(model, step, first=i == 0))
    colours = image_shape[0]
    return (x[:, :colours] + 1 - x[:, colours:]) / 2 if x.shape[1] > colours else x


def _beyond(model: Classifier, step: Step, *, first: bool) -> Tensor:
    """What a step's pool has where a shifted channel copies from outside of its input [carried, 1, 1] float64."""
    padding = torch.zeros(step.carried, dtype=torch.float64, device=model.mean.device)
    if first:  # the zeros that a convolution pads with are the mean, once normalisation is taken back
        colours = model.mean.flatten().double()
        colours = colours.expand(step.carried) if len(colours) == 1 else colours
        padding = torch.cat([colours, 1 - colours])[: step.carried]
    return (padding.sigmoid() if step.sigmoid else padding)[:, None, None]


def _before(step: Step, x: Tensor, beyond: Tensor) -> Tensor:
    """What entered a step [N, carried, H, W], from what arrives behind it [N, out, h, w]."""
    if step.halves and not step.shifts:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    elif step.shifts:
        x = x.unflatten(1, (2, 2, step.carried)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
        if step.halves == "mean":
            x = _first_of_two(_first_of_two(x, beyond).mT, beyond).mT
        elif step.halves == "max" and step.shifts == ONE_SIDED:
            x = _least_of_two(_least_of_two(x).mT).mT
    return x.logit(eps=torch.finfo(x.dtype).eps) if step.sigmoid else x


def _first_of_two(mean: Tensor, beyond: Tensor) -> Tensor:
    """a from (a_p + a_(p+1)) / 2 along the last dimension, with what lies behind its end."""
    found = [beyond[..., 0].expand(mean.shape[:-1])]
    for value in reversed(mean.unbind(-1)):
        found.append(2 * value - found[-1])
    return torch.stack(found[:0:-1], -1)


def _least_of_two(most: Tensor) -> Tensor:
    """An upper bound of a from max(a_p, a_(p+1)) along the last dimension: the lesser of both that have a_p."""
    return torch.cat([most[..., :1], torch.minimum(most[..., 1:], most[..., :-1])], -1)
