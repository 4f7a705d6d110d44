"""The nouns: what a client holds, what an attacker gets, what an attack returns, how it is scored."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Gradient = dict[str, Tensor]
"""Parameter name -> tensor of that parameter's shape (with a leading axis R where rows are stacked)."""

LocalUpdate = Callable[[nn.Module, Tensor, Tensor], Gradient]
"""(model, images [B, C, H, W], labels [B] or soft labels [B, K]) -> Gradient, differentiable in both."""

Images = Float[Tensor, "B C H W"]
Labels = Int[Tensor, "B"]
Rows = Float[Tensor, "R"]


STACKED_ENTRIES = 2**22
"""Entries of the stacked gradient (16 MiB in float32) up to which stacking rows pays on a processor."""


class NotApplicableError(ValueError):
    """An attack does not apply to this model or batch, whatever its settings."""


class WithheldError(NotApplicableError):
    """An attack needs something that the threat model withholds."""


def nearest(name: str, known: Iterable[str], kind: str) -> str:
    """The message for an unknown `name` of a `kind` ("attack", "model", ...), with the nearest known name."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"no {kind} is called {name!r}{hint} Known: {', '.join(known)}"


@dataclass(frozen=True, eq=False)
class Batch:
    """What is private to the client.

    Args:
        images: [B, C, H, W], float, in [0, 1].
        labels: [B], int64.

    Raises:
        ValueError: the batch is empty, a shape is wrong, or a pixel lies outside [0, 1] or is not finite.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                f"images must be a float tensor [B, C, H, W], got {images.dtype} {list(images.shape)};"
                " one image needs a batch axis: image.unsqueeze(0)"
            )
        if images.numel() == 0:
            raise ValueError(f"the batch is empty, {list(images.shape)}; give at least one image")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [{len(images)}], one for each image, got {labels.dtype} {list(labels.shape)}"
            )
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}; divide bytes by 255,"
                " and leave normalisation to the model (models.wrap takes mean and std)"
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Observation:
    """Everything the attacker has. What the threat model withholds is None.

    Args:
        gradient: what the client sent (for FedAvg: the weight difference over the learning rate).
        model: the weights that the client started from; a copy, never the caller's.
        update: the client's own code, differentiable; None where its training details are withheld.
        image_shape: (C, H, W).
        batch_size: B, or None.
        num_classes: K.
        labels: [B] int64, or None.
        bn_stats: batch-norm layer -> (mean [C], biased variance [C]) of its input over the batch, or None.
    """

    gradient: Gradient
    model: nn.Module
    update: LocalUpdate | None
    image_shape: tuple[int, int, int]
    batch_size: int | None
    num_classes: int
    labels: Tensor | None = None
    bn_stats: dict[str, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self):
        expected = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}
        missing, extra = expected.keys() - self.gradient.keys(), self.gradient.keys() - expected.keys()
        if missing or extra:
            raise ValueError(
                f"the gradient does not fit the model: missing {sorted(missing)}, unknown {sorted(extra)};"
                " pass one tensor for each trainable parameter, by its name in model.named_parameters()"
            )
        for name, shape in expected.items():
            g = self.gradient[name]
            if g.shape != shape:
                raise ValueError(
                    f"the gradient of {name!r} has shape {list(g.shape)}, the parameter has {list(shape)};"
                    " it comes from another model"
                )
            if not torch.isfinite(g).all():
                raise ValueError(
                    f"the gradient of {name!r} has NaN or infinite entries; the client's training diverged,"
                    " or the file is damaged"
                )
        if self.labels is not None:
            size = self.batch_size or len(self.labels)
            if self.labels.shape != (size,) or not ((self.labels >= 0) & (self.labels < self.num_classes)).all():
                raise ValueError(
                    f"labels must be {size} classes from 0 to {self.num_classes - 1},"
                    f" got {self.labels.tolist()} of shape {list(self.labels.shape)}"
                )

    @property
    def device(self) -> torch.device:
        return next(iter(self.gradient.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.gradient.values())).dtype

    @property
    def at_once(self) -> int:
        """How many guesses `simulate_rows` computes best in one call.

        On a processor stacking saves calls while a row is small, and loses to memory traffic and grouped
        convolutions when it is not: rows are stacked up to STACKED_ENTRIES of gradient. A GPU takes them all.
        """
        if self.device.type != "cpu":
            return 2**31
        return max(1, STACKED_ENTRIES // sum(g.numel() for g in self.gradient.values()))

    def need(self, attack: object, *names: Literal["update", "batch_size", "labels", "bn_stats"]) -> None:
        """Raise WithheldError unless every named field is there."""
        for name in names:
            if getattr(self, name) is None:
                raise WithheldError(
                    f"{type(attack).__name__} needs {_MEANING[name]}, and the threat model withholds it;"
                    f" observe with ThreatModel({_FACT[name]}=True), or choose another attack"
                )

    def simulate(self, images: Tensor, labels: Tensor) -> Gradient:
        """The forward operator: what the client would send for these images [B, C, H, W] and labels.

        Labels are int64 [B], or soft [B, K].
        """
        self.need(self, "update")
        assert self.update is not None
        return self.update(self.model, images, labels)

    def simulate_rows(self, images: Tensor, labels: Tensor) -> Gradient:
        """`simulate` on R stacked guesses: images [R, B, C, H, W], labels [R, B] or [R, B, K].

        Every entry of the result has a leading axis R. One row runs without vmap, which is cheaper.
        """
        if len(images) == 1:
            return {name: g.unsqueeze(0) for name, g in self.simulate(images.squeeze(0), labels[0]).items()}
        try:
            return torch.func.vmap(self.simulate, randomness="different")(images, labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{len(images)} restarts of this model can't be stacked; use restarts=1. torch.func.vmap said: {error}"
            ) from error


_MEANING = {
    "update": "the client's training details (local steps, learning rate)",
    "batch_size": "the batch size",
    "labels": "the labels",
    "bn_stats": "the batch-norm statistics of the private batch",
}
_FACT = {
    "update": "knows_training_details",
    "batch_size": "knows_batch_size",
    "labels": "knows_labels",
    "bn_stats": "knows_bn_stats",
}


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack returns.

    Args:
        images: [B, C, H, W] in [0, 1].
        labels: [B] int64.
        loss: matching loss at the returned images.
        trace: [steps, R], the loss of every restart before each step.
        frames: [F, B, C, H, W], snapshots of the returned restart, or None.
        frame_steps: F step numbers, one for each frame.
        gradient_evaluations: gradients of the client's loss that were computed, all restarts together.
    """

    images: Tensor
    labels: Tensor
    loss: float
    trace: Tensor
    frames: Tensor | None = None
    frame_steps: list[int] = field(default_factory=list)
    gradient_evaluations: int = 0

    @property
    def steps(self) -> int:
        return len(self.trace)


@dataclass(frozen=True, eq=False)
class Scores:
    """How close a reconstruction is, one value an image [B], matched one to one.

    Args:
        mse: mean squared error, lower is better.
        psnr: in dB, higher is better, capped at `metrics.PSNR_CAP`.
        ssim: in [-1, 1], higher is better.
        lpips: lower is better; None where the network's weights could not be had.
        label_accuracy: share of the labels, as a multiset, that were found.
        permutation: image `permutation[i]` of the reconstruction goes with image i of the truth.
    """

    mse: Tensor
    psnr: Tensor
    ssim: Tensor
    lpips: Tensor | None
    label_accuracy: float
    permutation: Tensor

    def __str__(self) -> str:
        lpips = "missing" if self.lpips is None else f"{self.lpips.mean():.3f}"
        return (
            f"PSNR {self.psnr.mean():.2f} dB, SSIM {self.ssim.mean():.3f}, LPIPS {lpips},"
            f" MSE {self.mse.mean():.2e}, labels {self.label_accuracy:.0%} (mean over {len(self.mse)} images)"
        )
