"""What a client computes and what of it the attacker sees.

`observe` is the only way from a Batch to an Observation.
"""

import copy
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gi_lib.defenses import Defense
from gi_lib.types import Batch, Gradient, LocalUpdate, Observation


@torch.enable_grad()
def fedsgd(model: nn.Module, images: Tensor, labels: Tensor) -> Gradient:
    """One gradient of the mean cross-entropy: g = d/dtheta 1/B sum_b CE(f_theta(x_b), y_b).

    Args:
        model: left as it is.
        images: [B, C, H, W] in [0, 1].
        labels: int64 [B], or soft labels [B, K] whose rows sum to one.

    Returns:
        One tensor for each trainable parameter, differentiable in images and labels.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(images):
        return _loss_gradient(model, _parameters(model), images, labels)
    theta = _parameters(model)
    loss = F.cross_entropy(model(images), labels)
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))


@dataclass(frozen=True)
class FedAvg:
    """Several local SGD steps (McMahan et al., AISTATS 2017, arXiv:1602.05629).

    The client steps theta_(t+1) = theta_t - lr g(theta_t), through its batch in order and round again, and
    sends theta_T. The result is (theta_0 - theta_T) / lr, so that one step gives exactly `fedsgd`.

    Args:
        local_steps: T, at least 1.
        lr: learning rate of the client, above 0.
        local_batch_size: images a step; None takes the whole batch in every step. It must divide B.
    """

    local_steps: int = 1
    lr: float = 0.01
    local_batch_size: int | None = None

    def __post_init__(self):
        size = self.local_batch_size
        if self.local_steps < 1 or self.lr <= 0 or (size is not None and size < 1):
            raise ValueError(f"{self} needs local_steps >= 1, lr > 0 and local_batch_size >= 1")

    @torch.enable_grad()
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Gradient:
        size = self.local_batch_size or len(images)
        if len(images) % size:
            raise ValueError(f"local_batch_size={size} does not divide the batch of {len(images)}; choose a divisor")
        theta = _parameters(model)
        total = {name: torch.zeros_like(p) for name, p in theta.items()}
        for t in range(self.local_steps):
            start = t * size % len(images)
            g = _loss_gradient(model, theta, images[start : start + size], labels[start : start + size])
            theta = {name: p - self.lr * g[name] for name, p in theta.items()}
            total = {name: p + g[name] for name, p in total.items()}
        return total


_SWAPPED_PARAMETERS = threading.Lock()
"""functional_call swaps the parameters of the one module in place: one thread at a time."""


def _parameters(model: nn.Module) -> Gradient:
    """Name -> trainable parameter; listed once where the model is an attacker's copy."""
    listed = getattr(model, "listed_parameters", None)
    return listed or {name: p for name, p in model.named_parameters() if p.requires_grad}


def _loss_gradient(model: nn.Module, theta: Gradient, images: Tensor, labels: Tensor) -> Gradient:
    """d/dtheta of the mean cross-entropy at theta, differentiable in theta, images and labels.

    Under vmap only torch.func.grad works; outside it plain autograd is 1.5 to 1.9 times faster on a CPU.
    """

    def loss(parameters):
        with _SWAPPED_PARAMETERS:
            logits = functional_call(model, parameters, (images,))
        return F.cross_entropy(logits, labels)

    if torch._C._functorch.is_functorch_wrapped_tensor(images):
        return torch.func.grad(loss)(theta)
    gradients = torch.autograd.grad(loss(theta), list(theta.values()), create_graph=True)
    return dict(zip(theta, gradients, strict=True))


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker knows or can do besides the shared update and the model. The default is the batch size.

    `letter` places it in the taxonomy A to H of Carletti et al. (USENIX Security 2025).
    """

    knows_labels: bool = False
    knows_batch_size: bool = True
    knows_training_details: bool = False
    """Local steps, local batch size and learning rate of FedAvg; a FedSGD client has none to know."""
    knows_bn_stats: bool = False
    """Batch-norm statistics of the private batch."""
    has_auxiliary_data: bool = False
    malicious_server: bool = False
    """The server may change the model that it sends."""
    selects_clients: bool = False
    """The server chooses who takes part in a round."""
    many_rounds: bool = False
    """Updates of the same data from several rounds."""

    @property
    def letter(self) -> str:
        """The weakest of the models A to H that grants all of these facts.

        A eavesdropper; B knows basic facts (here: labels); C training details; D surrogate data; E statistics of
        the client's data; F changes the model; G that with surrogate data; H that and chooses the clients.
        """
        if self.selects_clients:
            return "H"
        if self.malicious_server:
            return "G" if self.has_auxiliary_data or self.knows_bn_stats else "F"
        if self.knows_bn_stats:
            return "E"
        if self.has_auxiliary_data:
            return "D"
        if self.knows_training_details:
            return "C"
        return "B" if self.knows_labels else "A"


def observe(
    model: nn.Module,
    batch: Batch,
    *,
    update: LocalUpdate = fedsgd,
    threat: ThreatModel | None = None,
    defense: Defense | None = None,
    rng: torch.Generator,
) -> Observation:
    """Let the client compute its update, defend it, and hand the attacker what the threat model grants.

    Batch norm works in the mode that the model is in: running statistics in eval mode, the batch's own in
    train mode. Dropout is left to the model's mode too.

    Args:
        model: a classifier of images in [0, 1], with attribute `num_classes` (models.build or models.wrap).
        batch: the private images and labels.
        update: `fedsgd` or a FedAvg.
        threat: by default ThreatModel(): the batch size and nothing else.
        defense: applied by the client; None sends the update as it is.
        rng: the client's randomness, a CPU generator; only a defense draws from it.

    Raises:
        ValueError: a label is out of range, the model is not wrapped, or the update is not finite.
    """
    threat, defense = threat or ThreatModel(), defense or Defense()
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError("the model has no num_classes; wrap it: models.wrap(net, mean=..., std=..., num_classes=...)")
    low, high = int(batch.labels.min()), int(batch.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels run from {low} to {high}, but the model has classes 0 to {num_classes - 1}")
    model = attackers_copy(model)
    device = next(model.parameters()).device
    sent = defense.on_batch(batch, rng)
    images = sent.images.to(device, next(model.parameters()).dtype)
    labels = sent.labels.to(device)
    statistics = _bn_statistics(model, images) if threat.knows_bn_stats else None
    gradient = {name: g.detach() for name, g in update(model, images, labels).items()}
    return Observation(
        gradient=defense.on_update(gradient, rng),
        model=model,
        update=update if threat.knows_training_details or update is fedsgd else None,
        image_shape=(batch.images.shape[1], batch.images.shape[2], batch.images.shape[3]),
        batch_size=len(batch) if threat.knows_batch_size else None,
        num_classes=num_classes,
        labels=labels if threat.knows_labels else None,
        bn_stats=statistics,
    )


class _BatchNorm(nn.Module):
    """nn.BatchNorm as a function of its input alone, with the same parameter names.

    The original writes its running statistics in train mode, and has no batching rule in eval mode, where it is
    the affine map x -> (x - mean) / sqrt(var + eps) * weight + bias.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.own_statistics = norm.training or norm.running_mean is None
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, var = batch_statistics(x) if self.own_statistics else (self.running_mean, self.running_var)
        scale = (var + self.eps).rsqrt()
        if self.weight is None:
            return (x - mean.view(shape)) * scale.view(shape)
        scale = scale * self.weight
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and biased variance [C] of x [B, C, ...] over all axes but the second."""
    axes = [0, *range(2, x.ndim)]
    return x.mean(axes), x.var(axes, unbiased=False)


def attackers_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose batch norms are plain functions of their input, and whose ReLUs don't work in place."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, _BatchNorm(child))
            elif getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]
    model.listed_parameters = _parameters(model)  # type: ignore[assignment]
    return model


def _bn_statistics(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: found.update({name: batch_statistics(x[0])}))
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found
