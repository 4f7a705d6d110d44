"""`receive`: an Observation of an update that came from elsewhere."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gi_lib.copies import BatchNorm, attackers_copy, batch_norms, functional_copy, number_of_logits, unwrapped
from gi_lib.federated.clients import FEDSGD, Client, graph_of, loss_gradient
from gi_lib.labels import loss_scale
from gi_lib.models import wrap
from gi_lib.types import Auxiliary, Classifier, Gradient, Observation, Statistics, check_shape

_PREFIXES = {"module", "_orig_mod", "_module"}
"""Names that DataParallel, torch.compile and Opacus put before a parameter's own."""

Update = Mapping[str, object] | Sequence[object] | str | Path
"""Name -> tensor or array; or a list of them in the order of the parameters; or a safetensors file of such names."""


def receive(
    model: nn.Module,
    update: Update,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    mean: object = 0.0,
    std: object = 1.0,
    batch_size: int | None = None,
    labels: Tensor | None = None,
    client: Client | None = FEDSGD,
    defense: Any = None,
    bn_stats: Statistics | None = None,
    auxiliary: Auxiliary | None = None,
    earlier: Sequence[Observation] = (),
    trapdoor: object | None = None,
) -> Observation:
    """An Observation from an update that came from elsewhere. Neither the model nor the update is changed.

    Names are matched with and without `net.`, `module.`, `_orig_mod.` and `_module.`; the order of a mapping means
    nothing. A list may hold the trainable parameters, all parameters, or the whole state, in the model's own order
    (Flower sends the last). A safetensors file holds one tensor a name. Values are cast to the model's type.

    Args:
        model: with the weights that the client started from, in the mode in which it trained; a module that is not
            wrapped is wrapped with `num_classes`, `mean` and `std`.
        update: the gradient, or (before - after) / lr for each entry of the state. Differences of running statistics,
            in the same unit, become `buffers`; other buffers are left out.
        image_shape: (C, H, W) of the private images.
        num_classes: K; None asks the model.
        mean, std: the normalisation that the module expects of [0, 1] images, where it is not wrapped.
        batch_size, labels, defense, bn_stats, auxiliary, earlier, trapdoor: what else is known; see Observation.
        client: what the client did; None where that is unknown.

    Raises:
        ValueError: the model can't be attacked, or the update does not fit it; the sentence says why.
    """
    image_shape = check_shape(image_shape)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"receive needs batch_size, a whole number >= 1, or None, got {batch_size!r:.60}")
    if labels is not None and not (isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype == torch.int64):
        raise ValueError("receive needs labels as a tensor of int64 [B], or None")
    bare = not isinstance(unwrapped(model), Classifier)
    if bare:
        model = _wrapped(model, image_shape, num_classes, mean, std)
    if None not in (batch_size, labels) and len(labels) != batch_size:  # type: ignore[arg-type]
        raise ValueError(f"got {len(labels)} labels for a batch of {batch_size}; give one for each image")  # type: ignore[arg-type]
    size = batch_size if labels is None else len(labels)
    copy = attackers_copy(model, image_shape, min(2, size or 2))
    gradient, state = _matched(copy, bare, update)
    lr = 1.0 if client is None else client.lr
    buffers: Statistics = {}
    for name, norm in batch_norms(copy).items():
        moved = [state.get(f"{name}.running_{kind}") for kind in ("mean", "var")]
        if norm.running_mean is not None and norm.running_var is not None and all(m is not None for m in moved):
            mean, var = moved
            _check_statistics(f"the running statistics of {name!r}", norm, (mean, var))  # type: ignore[arg-type]
            buffers[name] = norm.running_mean - lr * mean, norm.running_var - lr * var  # type: ignore[operator]
    p = next(copy.parameters())
    some = torch.rand(size or 1, *image_shape, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    obs = Observation(
        gradient=gradient,
        model=copy,
        client=client,
        graph=graph_of(client, copy, some),
        image_shape=image_shape,
        batch_size=size,
        num_classes=copy.num_classes,
        labels=None if labels is None else labels.sort().values.to(p.device),
        bn_stats=None if bn_stats is None else _statistics(copy, bare, bn_stats),
        buffers=buffers or None,
        defense=defense,
        auxiliary=auxiliary,
        earlier=tuple(earlier),
        trapdoor=trapdoor,
    )
    if client is not None and client.steps == 1 and client.rule == loss_gradient:
        scale = loss_scale(obs)
        if scale is not None and not 0.8 < scale < 1.25:
            warnings.warn(
                f"the update is about {scale:.3g} times a gradient of the mean cross-entropy: the client may have"
                " summed or halved its loss, or divided by another batch size; divide the update by it, or say"
                " client=Client(rule=loss_gradient.of(loss))",
                stacklevel=2,
            )
    return obs


def _statistics(copy: Classifier, wrapped: bool, given: Statistics) -> Statistics:
    """Statistics of the batch norms by the copy's names."""
    norms = batch_norms(copy)
    if not isinstance(given, Mapping):
        raise ValueError(f"bn_stats are a mean and a variance by the name of each batch norm, got {given!r:.60}")
    found = {next((n for n in _spellings(name, wrapped) if n in norms), name): pair for name, pair in given.items()}
    if found.keys() != norms.keys():
        raise ValueError(f"bn_stats are of {sorted(given)}, and the batch norms of the model are {sorted(norms)}")
    device = next(copy.parameters())
    for name, pair in found.items():
        _check_statistics(f"bn_stats of {name!r}", norms[name], pair)
        if (pair[1] < 0).any():
            raise ValueError(f"bn_stats of {name!r} have a negative variance, {pair[1].min():.3g}: they are damaged")
    return {name: (mean.to(device), var.to(device)) for name, (mean, var) in found.items()}


def _check_statistics(what: str, layer: BatchNorm, pair: Sequence[Tensor]) -> None:
    """ValueError unless it is a mean and a variance, finite, one number a channel."""
    C = layer.num_features
    right = [isinstance(v, Tensor) and v.shape == (C,) and bool(v.isfinite().all()) for v in pair]
    if len(right) != 2 or not all(right):
        got = [str(list(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in pair]
        raise ValueError(
            f"{what} must be a mean and a variance, tensors [{C}] of finite numbers, one a channel, got"
            f" {' and '.join(got)}; they come from another model, or are damaged"
        )


def _wrapped(
    model: nn.Module, image_shape: tuple[int, int, int], num_classes: int | None, mean: object, std: object
) -> Classifier:
    if num_classes is None:
        wrapped = functional_copy(wrap(model, mean=mean, std=std, num_classes=2))
        num_classes = number_of_logits(wrapped, image_shape)
    return wrap(model, mean=mean, std=std, num_classes=num_classes)


def _matched(copy: Classifier, wrapped: bool, update: Update) -> tuple[Gradient, Gradient]:
    """The gradient by the copy's names, and what there is besides of its floating-point state.

    Args:
        wrapped: whether the caller's own model is bare, and was wrapped for the copy.
    """
    if isinstance(update, str | Path):
        try:
            update = load_file(update)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{update} is not a readable safetensors file ({error})") from error
    wanted = {name: p.shape for name, p in copy.named_parameters() if p.requires_grad}
    if not isinstance(update, Mapping):
        if not isinstance(update, Iterable):
            said = type(update).__name__
            raise ValueError(f"an update is a mapping by name, a list, or a safetensors file, got {said}")
        update, wrapped = _named(list(update), copy), False
    names = {name: name for name in copy.state_dict()}
    names = {_stripped(name): name for name in names} | names
    p = next(copy.parameters())
    found: Gradient = {}
    for name, value in update.items():
        own = next((names[said] for said in _spellings(name, wrapped) if said in names), name)
        if value is None and own in wanted:  # as torch leaves .grad of a parameter that the pass does not use
            value = torch.zeros(wanted[own])
        tensor = _as_tensor(name, value)
        if own in found:
            raise ValueError(f"the update has {own!r} twice, under two names; leave one out")
        found[own] = tensor.to(p.device, p.dtype).detach().clone()
    missing = wanted.keys() - found.keys()
    extra = [name for name in found if name not in names]
    if missing or extra:
        raise ValueError(
            f"the update does not fit the model: missing {sorted(missing)}, unknown {sorted(extra)}; it needs one"
            " entry for each trainable parameter, by its name or in their order"
        )
    rest = {name: value for name, value in found.items() if name not in wanted}
    return {name: found[name] for name in wanted}, rest


def _named(values: list, copy: Classifier) -> dict[str, object]:
    """A list in the order of the trainable parameters, of all parameters, or of the state without the wrapper's own."""
    orders = [
        [name for name, p in copy.named_parameters() if p.requires_grad],
        [name for name, _ in copy.named_parameters()],
        [name for name in copy.state_dict() if name not in ("mean", "std")],
        list(copy.state_dict()),
    ]
    for names in orders:
        if len(names) == len(values):
            return dict(zip(names, values, strict=True))
    raise ValueError(
        f"the update is a list of {len(values)}, the model has {len(orders[0])} trainable parameters, {len(orders[1])}"
        f" parameters and {len(orders[2])} entries of state; pass one list of these, or a dict by name"
    )


def _stripped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)


def _spellings(name: str, wrapped: bool) -> list[str]:
    """How the copy may call a parameter: in a Classifier, all that a bare module holds lies at `net`."""
    spellings = [name, f"net.{name}", _stripped(name), f"net.{_stripped(name)}"]
    return [spellings[i] for i in ((1, 0, 3, 2) if wrapped else (0, 1, 2, 3))]


def _as_tensor(name: str, value: object) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name!r} of the update is {type(value).__name__}, not a tensor or an array") from error
    if tensor.is_complex():
        raise ValueError(f"{name!r} of the update is complex")
    return tensor
