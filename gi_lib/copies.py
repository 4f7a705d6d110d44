"""The attacker's copy of anybody's classifier: unwrapped, made of plain functions, and proven to be the same one.

Everything that can make a model useless for gradient inversion is looked for here, once, before anything runs.
"""

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gi_lib.execution import in_functorch, second_derivatives
from gi_lib.types import Classifier, Gradient, Parameters, Statistics

_Norm = nn.modules.batchnorm._BatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WRAPPERS = {  # class -> the attribute that holds what it wraps; by name, since some are not installed everywhere
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "GradSampleModule": "_module",
}
_MASKS = {  # class, without its number of axes -> where it holds the share that it drops
    **dict.fromkeys(("Dropout", "AlphaDropout", "FeatureAlphaDropout", "StochasticDepth"), ("p",)),
    **dict.fromkeys(("DropPath", "DropBlock"), ("drop_prob", "p")),
    "RReLU": ("upper",),
    "MultiheadAttention": ("dropout",),
}


_SEEN: ContextVar[Callable[["BatchNorm", Tensor], None] | None] = ContextVar("seen", default=None)
"""Where the batch norms of this thread write down what they are given; None where nobody asks."""


_DRAWN = threading.Lock()
"""A model that draws does so from the one global generator: one thread at a time."""


class BatchNorm(nn.Module):
    """nn.BatchNorm as a function of its input alone, with the same parameter names.

    The original writes its running statistics in train mode, and has no batching rule in eval mode, where it is
    the affine map x -> (x - mean) / sqrt(var + eps) * weight + bias.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: _Norm):
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = norm.weight, norm.bias, norm.eps, norm.momentum
        self.num_features, self.training = norm.num_features, norm.training
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)

    @property
    def own_statistics(self) -> bool:
        """Whether it normalises by the batch's own statistics."""
        return self.training or self.running_mean is None

    def forward(self, x: Tensor) -> Tensor:
        if (seen := _SEEN.get()) is not None:
            seen(self, x)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        if self.own_statistics:
            if x.numel() == x.shape[1]:
                raise ValueError(
                    f"batch norm in train mode needs more than one value a channel, got input {list(x.shape)}: no"
                    " client can train so; observe a larger batch, or call .eval() on the model"
                )
            mean, var = batch_statistics(x)
        else:
            assert self.running_mean is not None and self.running_var is not None
            mean, var = self.running_mean, self.running_var
        scale = (var + self.eps).rsqrt()
        if self.weight is None:
            return (x - mean.view(shape)) * scale.view(shape)
        scale = scale * self.weight
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)


class BatchNormAct(BatchNorm):
    """The same of timm's BatchNormAct2d, which drops and activates what it has normalised."""

    def __init__(self, norm: _Norm):
        super().__init__(norm)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[operator]


class _Hardsigmoid(nn.Module):
    """clamp(x / 6 + 1/2, 0, 1), which has a second derivative where torch's own kernel has none."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and biased variance [C] of x [B, C, ...] over all axes but the second."""
    axes = [0, *range(2, x.ndim)]
    return x.mean(axes), x.var(axes, unbiased=False)


def attackers_copy(model: nn.Module, image_shape: tuple[int, int, int], batch_size: int = 2) -> Classifier:
    """`functional_copy`, proven to be the same function as the model, and to have the derivatives that attacks need.

    Where units are dropped at random in train mode, the copy drops none, with a warning: the masks are the client's.

    Args:
        model: a Classifier (models.build, models.wrap), perhaps wrapped.
        image_shape: (C, H, W) of what it will see.
        batch_size: images of the probe.

    Raises:
        ValueError: the model can't be attacked; the sentence says why and what to do.
    """
    mine = functional_copy(model)
    reference = _plain(deep_copy(model))
    if dropping := masks(mine):
        _stop(reference, dropping)
        _stop(mine, dropping)
        warnings.warn(
            f"{', '.join(dropping)} drops units at random in train mode: the client does, and the attacker, who can't"
            " know which, drops none; call .eval() on the model where the client does not drop either",
            stacklevel=3,
        )
    channels = image_shape[0]
    if any(v.numel() not in (1, channels) for v in (mine.mean, mine.std)):
        raise ValueError(
            f"the model was wrapped with a mean of {mine.mean.numel()} channels and a std of {mine.std.numel()}, and"
            f" the images have {channels}; wrap it with one value, or with one a channel"
        )
    _prove(mine, reference, image_shape, batch_size)
    if mine.draws:
        warnings.warn(
            "the forward pass draws random numbers in the mode that the model is in (a dropout function, a sampling"
            " layer): the client draws its own, and what the attacker simulates draws others",
            stacklevel=3,
        )
    mine.attackers_copy = True
    return mine


def functional_copy(model: nn.Module) -> Classifier:
    """A deep copy of a classifier that can be differentiated twice and stacked. The caller's is untouched.

    Wrappers (torch.compile, DataParallel, Opacus) are taken off. Batch norms, and of their subclasses timm's alone,
    become plain functions of their input, activations stop working in place, Hardsigmoid is written out.

    Raises:
        ValueError: the model is not wrapped, was compiled by torch.jit, or has nothing to train.
    """
    original = unwrapped(model)
    if not isinstance(original, Classifier):
        raise ValueError(
            f"{type(original).__name__} is not wrapped: it has no num_classes; wrap it:"
            " models.wrap(net, mean=..., std=..., num_classes=...)"
        )
    for name, module in original.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'} is a torch.jit module, which can't be copied layer by layer; pass the Python"
                " module that it was made from"
            )
    if not any(p.requires_grad for p in original.parameters()):
        raise ValueError(
            "the model has no trainable parameter, and there is no gradient to share; if its parameters are frozen,"
            " call requires_grad_(True) on those that the client trains"
        )
    mine = _plain(deep_copy(model))
    for parent in list(mine.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in BATCH_NORMS:
                assert isinstance(child, _Norm)
                setattr(parent, name, BatchNorm(child))
            elif isinstance(child, _Norm) and type(child).__module__.startswith("timm."):
                setattr(parent, name, BatchNormAct(child))
            elif type(child) is nn.Hardsigmoid:
                setattr(parent, name, _Hardsigmoid())
            elif type(child).__module__.startswith("torch.nn.") and getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]
    mine.tied = ties(mine)
    return mine


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel or Opacus have wrapped."""
    while isinstance(model, nn.Module) and (inner := _WRAPPERS.get(type(model).__name__)) and hasattr(model, inner):
        model = getattr(model, inner)
    return model


def deep_copy(model: nn.Module) -> nn.Module:
    """copy.deepcopy, also where a layer holds a tensor that it has computed (torch.nn.utils.weight_norm).

    Only what Opacus wraps is copied with its wrapper, which alone knows its hooks.
    """
    while type(model).__name__ in _WRAPPERS and type(model).__name__ != "GradSampleModule":
        model = getattr(model, _WRAPPERS[type(model).__name__])
    memo: dict[int, Tensor] = {}
    held: list[object] = [value for module in model.modules() for value in vars(module).values()]
    seen: set[int] = set()
    while held:
        value = held.pop()
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            held += value.values() if isinstance(value, dict) else value
    return copy.deepcopy(model, memo)


def _plain(model: nn.Module) -> Classifier:
    """Take the wrappers off a copy and inside it, and the hooks that Opacus has put on the layers."""
    for module in list(model.modules()):
        if type(module).__name__ == "GradSampleModule" and hasattr(module, "remove_hooks"):
            module.remove_hooks()  # type: ignore[operator]
    model = unwrapped(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (inner := unwrapped(child)) is not child:
                setattr(parent, name, inner)
    assert isinstance(model, Classifier)
    return model


def masks(model: nn.Module) -> list[str]:
    """Names of the layers that drop units at random, in the mode that the model is in."""
    return [
        name
        for name, module in model.named_modules()
        if module.training
        and any(getattr(module, share, 0) != 0 for share in _MASKS.get(type(module).__name__.rstrip("123d"), ()))
    ]


def _stop(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_submodule(name).eval()


def _prove(mine: Classifier, reference: Classifier, image_shape: tuple[int, int, int], batch_size: int) -> None:
    """Every property that an attack relies on, each with the sentence for the case that it does not hold."""
    first = next(mine.parameters())
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, *image_shape, generator=draw).to(first.device, first.dtype)
    theta = Parameters(mine)
    with torch.random.fork_rng(devices=[first.device] if first.is_cuda else []), second_derivatives():
        before = torch.get_rng_state()
        logits = _logits(mine, images)
        mine.draws = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
        with torch.no_grad():
            theirs = _logits(reference, images)
        if not torch.allclose(logits, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(
                "the attacker's copy of this model computes other logits than the model itself (up to"
                f" {(logits - theirs).abs().max():.2g} apart); {_custom(reference)}"
            )
        # What the pass reads past the modules' attributes, functional_call does not replace.
        moved = {name: _moved(p.detach(), draw) for name, p in theta.items()}
        _refuse_hidden_parameters(mine, reference, moved, images, before)
        torch.set_rng_state(before)
        _differentiate_twice(mine, theta, images)


def _moved(p: Tensor, rng: torch.Generator) -> Tensor:
    """Other values of this kind; of a constant, such as a head that starts at zero, random ones."""
    size = p.std(correction=0)
    if size > 0:
        return 0.9 * p + 0.01 * size
    return p + 0.05 * torch.randn(p.shape, generator=rng).to(p)


def number_of_logits(model: Classifier, image_shape: tuple[int, int, int]) -> int:
    """What a model gives whose number of classes is not known."""
    p = next(model.parameters())
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[p.device] if p.is_cuda else []):
        return _output(model, images).shape[1]


def _logits(model: Classifier, images: Tensor) -> Tensor:
    out = _output(model, images)
    if out.shape[1] != model.num_classes:
        raise ValueError(
            f"the model gives {out.shape[1]} logits, and it was wrapped with num_classes={model.num_classes};"
            f" wrap it with num_classes={max(2, out.shape[1])}"
        )
    return out


def _output(model: Classifier, images: Tensor) -> Tensor:
    try:
        out = model(images)
    except ValueError as error:
        raise ValueError(str(error)) from error
    except (RuntimeError, TypeError, AttributeError, IndexError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the model does not take images {list(images.shape)} of {images.dtype} ({reason}); check the image"
            " shape, the normalisation and the device"
        ) from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
        said = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"the model must return logits [{len(images)}, {model.num_classes}], got {said}; return the logits alone,"
            " or an object with the attribute `logits`"
        )
    return out


def _refuse_hidden_parameters(
    mine: Classifier, reference: Classifier, moved: Gradient, images: Tensor, before: Tensor
) -> None:
    own = Parameters(reference)

    def agree(names: list[str]) -> bool:
        theta = {name: moved[name] if name in names else own[name].detach().clone() for name in moved}
        kept = {name: p.detach().clone() for name, p in own.items()}
        with torch.no_grad():
            torch.set_rng_state(before)
            mine_now = forward(mine, images, theta)
            for name in names:
                own[name].copy_(moved[name])
            torch.set_rng_state(before)
            theirs_now = reference(images)
            for name, p in own.items():
                p.copy_(kept[name])
        return torch.allclose(mine_now, theirs_now, rtol=1e-2, atol=1e-3, equal_nan=True)

    if not agree(list(moved)):
        hidden = [name for name in moved if not agree([name])]
        raise ValueError(
            f"the model reads {', '.join(hidden) or 'some parameter'} past its attributes (from a list, a dict or a"
            " closure), so that a local step can't be simulated; hold parameters in nn.ParameterList or ParameterDict"
        )


def _differentiate_twice(model: Classifier, theta: Gradient, images: Tensor) -> None:
    x = images.clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64, device=x.device))
        names, leaves = list(theta), list(theta.values())
        try:
            found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the model has no gradient: torch says {reason}") from error
        unused = [name for name, g in zip(names, found, strict=True) if g is None]
        if len(unused) == len(names):
            raise ValueError(
                "no trainable parameter takes part in the forward pass; unfreeze those that the client trains"
            )
        if unused:
            warnings.warn(f"the forward pass does not use {', '.join(unused)}: their gradient is zero", stacklevel=5)
        try:
            size = torch.stack([g.square().sum() for g in found if g is not None]).sum()
            torch.autograd.grad(size, x, allow_unused=True)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the model can't be differentiated twice, as an attack must ({reason}); replace that operation by one"
                " that torch differentiates twice, for example a clamp"
            ) from error


def _custom(model: nn.Module) -> str:
    """Which layers may be why."""
    names = {type(m).__name__ for m in model.modules() if not type(m).__module__.startswith("torch.nn.")}
    return f"its layers {', '.join(sorted(names))} may change with each pass, or depend on what was passed before"


class _Passes:
    """Plain passes through a model run side by side; one that swaps its parameters in place runs alone."""

    def __init__(self) -> None:
        self.free, self.plain_ones, self.swapping = threading.Condition(), 0, False

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        with self.free:
            self.free.wait_for(lambda: not self.swapping)
            self.plain_ones += 1
        try:
            yield
        finally:
            with self.free:
                self.plain_ones -= 1
                self.free.notify_all()

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        with self.free:
            self.free.wait_for(lambda: not self.swapping and not self.plain_ones)
            self.swapping = True
        try:
            yield
        finally:
            with self.free:
                self.swapping = False
                self.free.notify_all()


_PASSES = _Passes()


def forward(model: nn.Module, images: Tensor, theta: Gradient | None = None) -> Tensor:
    """The logits at the parameters theta; None takes the model's own. Threads may share the model."""
    own = theta is None or (isinstance(theta, Parameters) and theta.model is model and not in_functorch())
    if own:
        with _PASSES.plain():
            return model(images)
    assert theta is not None
    tied = getattr(model, "tied", None)
    others = {alias: theta[name] for alias, name in (ties(model) if tied is None else tied).items() if name in theta}
    with _PASSES.swapped():  # torch's own search for ties breaks a model that holds one layer under two names
        return functional_call(model, {**theta, **others}, (images,), tie_weights=False)


def own_parameters(model: nn.Module) -> Parameters:
    """The model's own parameters; waits while a thread has put others in their place."""
    with _PASSES.plain():
        return Parameters(model)


def ties(model: nn.Module) -> dict[str, str]:
    """Where a parameter is shared by several layers: its other names -> the one in model.named_parameters()."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for prefix, layer in model.named_modules():
        for name, p in layer.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{prefix}.{name}" if prefix else name
            if names[id(p)] != full:
                found[full] = names[id(p)]
    return found


@contextlib.contextmanager
def drawing(model: nn.Module, rng: torch.Generator | None) -> Iterator[None]:
    """What the model draws from torch's global generator comes from `rng`, or is always the same; nothing is left."""
    if not getattr(model, "draws", False):
        yield
        return
    seed = 0 if rng is None else int(torch.randint(2**62, (), generator=rng))
    cuda = [p.device for p in model.parameters() if p.is_cuda][:1]
    with _DRAWN, torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


def strange_norms(model: nn.Module) -> list[str]:
    """Classes of batch norm in an attacker's copy whose input nobody writes down, since they are somebody's own."""
    return sorted({type(layer).__name__ for layer in model.modules() if isinstance(layer, _Norm)})


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms of an attacker's copy by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchNorm)}


@contextlib.contextmanager
def inputs_of_batch_norms(*, detached: bool = False) -> Iterator[list[tuple[BatchNorm, Tensor]]]:
    """Each batch norm that this thread runs, with its input, in order; `detached` keeps no graph alive."""
    seen: list[tuple[BatchNorm, Tensor]] = []
    token = _SEEN.set(lambda norm, x: seen.append((norm, x.detach() if detached else x)))
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def bn_statistics(model: nn.Module, images: Tensor) -> Statistics:
    """Mean and biased variance of each batch norm's input over the images, differentiable in them."""
    names = {id(layer): name for name, layer in batch_norms(model).items()}
    with inputs_of_batch_norms() as seen, drawing(model, None):
        forward(model, images)
    return {names[id(layer)]: batch_statistics(x) for layer, x in seen if id(layer) in names}


def running_statistics(model: nn.Module) -> Statistics:
    """The running mean and variance of each batch norm that keeps them, which come with the model."""
    norms = batch_norms(model).items()
    kept = {name: (layer.running_mean, layer.running_var) for name, layer in norms}
    return {name: (mean, var) for name, (mean, var) in kept.items() if mean is not None and var is not None}


def input_of(model: nn.Module, weight: str, images: Tensor) -> Tensor:
    """What the layer with a weight of this name is given [B, ...], differentiable in the images.

    Threads may share the model: the hook looks at the pass of its own thread alone.
    """
    layer, mine = model.get_submodule(weight.rpartition(".")[0]), threading.get_ident()
    found: list[Tensor] = []

    def runs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == mine:
            found.append(inputs[0])

    hook = layer.register_forward_pre_hook(runs)
    try:
        with drawing(model, None):
            forward(model, images)
    finally:
        hook.remove()
    return found[-1]
