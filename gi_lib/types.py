"""The nouns: what a client holds, what an attacker gets, what an attack returns, how it is scored."""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Gradient = dict[str, Tensor]
"""Parameter name -> tensor of that parameter's shape."""

Rule = Callable[[nn.Module, Gradient, Tensor, Tensor], Gradient]
"""(model, theta, images [B, C, H, W], labels [B] or soft labels [B, K]) -> the gradient at the parameters theta,
differentiable in theta, images and labels. A rule that draws at random takes a fifth, `rng`."""


class Parameters(Gradient):
    """The trainable parameters of a model as they stand in it, by name: a pass at these is a plain call of it."""

    def __init__(self, model: nn.Module):
        super().__init__((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.model = model


Images = Float[Tensor, "B C H W"]
Labels = Int[Tensor, "B"]
Presence = Bool[Tensor, "K"]
"""Which classes are there."""
Counts = Int[Tensor, "K"]
"""How many images of each class."""
PerClass = Float[Tensor, "K"]
Rows = Float[Tensor, "R"]
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Batch-norm layer -> (mean [C], variance [C])."""


class NotApplicableError(ValueError):
    """An attack does not apply to this model or batch, whatever its settings."""


class WithheldError(NotApplicableError):
    """An attack needs something that the threat model withholds."""


def nearest(name: str, known: Iterable[str], kind: str) -> str:
    """The message for an unknown `name` of a `kind` ("attack", "model", ...), with the nearest known name."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"no {kind} is called {name!r}{hint} Known: {', '.join(known)}"


def whole(owner: object, *names: str, least: int = 1) -> None:
    """ValueError unless these attributes of `owner` are whole numbers of at least `least`."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{type(owner).__name__} needs {name}, a whole number >= {least}, got {value!r}")


def displayed(default: int) -> Any:
    """A field for the number of snapshots: it only displays, so that it changes no result and no key."""
    return field(default=default, metadata={"display": True})


def real(owner: object, *names: str, least: float = 0.0, above: float | None = None, most: float = math.inf) -> None:
    """ValueError unless these are finite numbers of `owner`, >= `least` or, where it is given, > `above`; <= `most`."""
    for name in names:
        value = getattr(owner, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (value < least if above is None else value <= above) or value > most:
            bound = f">= {least:g}" if above is None else f"> {above:g}"
            bound += f" and <= {most:g}" if most < math.inf else ""
            raise ValueError(f"{type(owner).__name__} needs {name}, a finite number {bound}, got {value!r}")


def function(owner: object, *names: str) -> None:
    """ValueError unless these attributes of `owner` can be called."""
    for name in names:
        if not callable(getattr(owner, name)):
            raise ValueError(f"{type(owner).__name__} needs {name}, a function, got {getattr(owner, name)!r:.60}")


def check_shape(shape: object) -> tuple[int, int, int]:
    """(C, H, W), if it is three whole numbers >= 1; else ValueError."""
    sides = list(shape) if isinstance(shape, tuple | list) else []
    if len(sides) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise ValueError(f"image_shape must be (C, H, W), three whole numbers >= 1, got {shape!r:.80}")
    return sides[0], sides[1], sides[2]


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
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
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


class Classifier(nn.Module):
    """net((x - mean) / std), for images x [B, C, H, W] in [0, 1].

    A network that returns its logits in an object or a dict named `logits` is taken at these. One logit u stands for
    two classes, (0, u): the cross-entropy of those is the logistic loss of u.

    Attributes:
        mean, std: [C, 1, 1].
        num_classes: K.
    """

    mean: Tensor
    std: Tensor
    num_classes: int
    attackers_copy = False
    """Whether copies.attackers_copy has made and proven it."""
    draws = False
    """Whether its forward pass draws from torch's global generator."""
    tied: dict[str, str] | None = None
    """Other names of its parameters, in other layers -> the name that counts (copies.ties); None: not looked for."""

    def __init__(self, net: nn.Module, *, mean: object, std: object, num_classes: int):
        super().__init__()
        self.net, self.num_classes = net, num_classes
        device = next((p.device for p in net.parameters()), None)
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32, device=device)
            self.register_buffer(name, value.reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net((x - self.mean) / self.std)
        if not isinstance(out, Tensor):
            out = out.get("logits", out) if isinstance(out, dict) else getattr(out, "logits", out)
        if self.num_classes == 2 and isinstance(out, Tensor) and out.shape[1:] == (1,):
            return torch.cat([torch.zeros_like(out), out], dim=1)
        return out


class ClientUpdate(Protocol):
    """What clients compute and send, differentiable in images, labels and theta (federated.Client, Clients)."""

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        theta: Gradient | None = None,
        order: "Order | None" = None,
    ) -> Gradient: ...


Order = tuple[Tensor, ...]
"""For each local step, the images [n] int64 that enter it."""


class Graph(NamedTuple):
    """What autograd keeps of one guess, so that the end of several local steps has a derivative.

    Args:
        steps: T, of all clients together.
        bytes: in all.
        recompute: whether each step is computed a second time on the way back, so that less is kept.
    """

    steps: int
    bytes: int
    recompute: bool = False


class Sent(NamedTuple):
    """What an update was computed from, for a defense that looks at it."""

    model: nn.Module
    images: Tensor
    labels: Tensor


@runtime_checkable
class Auxiliary(Protocol):
    """Data of the attacker's own, of the same domain, never what is attacked (data.Surrogate)."""

    @property
    def hash(self) -> str: ...

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images [n, C, H, W] in [0, 1] and their labels [n]."""
        ...


Fact = Literal[
    "client", "batch_size", "labels", "order", "bn_stats", "buffers", "defense", "auxiliary", "earlier", "trapdoor"
]

_FACTS: dict[str, tuple[str, str]] = {  # field of the Observation -> what it is, and what grants it
    "client": ("the client's training details", "knows_training_details=True"),
    "batch_size": ("the batch size", "knows_batch_size=True"),
    "labels": ("the labels", "knows_labels=True"),
    "order": ("which image enters which local step", "knows_order=True"),
    "bn_stats": ("the batch-norm statistics of the private batch", "knows_bn_stats=True"),
    "buffers": ("the running statistics after the round", "knows_buffers=True"),
    "defense": ("the defense", "knows_defense=True"),
    "auxiliary": ("auxiliary data", "has_auxiliary_data=True"),
    "earlier": ("earlier rounds on the same data", "many_rounds=True"),
    "trapdoor": ("a model that the server has planted", "malicious_server=True"),
}


@dataclass(frozen=True)
class Needs:
    """What an attack can't do without. It is said here, and checked by `Observation.need`; `gi list` shows it.

    Args:
        facts: fields of the Observation that may not be withheld.
        model: tests of the Observation, each the reason why the attack does not apply, or None; the first line of
            its docstring says what is needed.
        labels: whether the attack's `label_rule` must find the labels; None in its place seeks them with the images.
        batch: the largest batch; None takes any.
    """

    facts: tuple[Fact, ...] = ()
    model: tuple[Callable[["Observation"], str | None], ...] = ()
    labels: bool = False
    batch: int | None = None

    def __str__(self) -> str:
        said = [_FACTS[name][0] for name in self.facts]
        said += [(test.__doc__ or test.__name__).partition("\n")[0].rstrip(".") for test in self.model]
        if self.labels:
            said.append("labels that are known, or a last layer from which they can be read")
        if self.batch is not None:
            said.append("one image" if self.batch == 1 else f"at most {self.batch} images")
        return ", ".join(said) or "nothing but the update"


@dataclass(frozen=True, eq=False)
class Observation:
    """Everything the attacker has. What the threat model withholds is None. Made by `observe` and `receive`.

    Args:
        gradient: what was sent: (theta_0 - theta_T) / lr of one client, or the mean over several.
        model: the weights that the client started from; a copy (copies.attackers_copy), never the caller's.
        client: the client's own code, differentiable; None where its training details are withheld.
        image_shape: (C, H, W).
        batch_size: B, of all clients together, or None.
        num_classes: K.
        labels: [B] int64 in ascending order, or None; slot i of a guess has label i.
        order: the slots of each local step, or None where it is withheld: then `simulate` takes them in turn.
        bn_stats: mean and biased variance of each batch norm's input over the batch, or None.
        buffers: running mean and variance of each batch norm after the round, or None.
        defense: what the client did to its data or update, or None.
        auxiliary: data of the attacker's own, or None.
        earlier: observations of other rounds on the same data, the oldest first.
        trapdoor: what a malicious server planted, or None.
        graph: what autograd keeps while `simulate` takes several local steps; None where nobody has estimated it.

    Raises:
        ValueError: the model is no attacker's copy, or the gradient or the labels don't fit it.
    """

    gradient: Gradient
    model: Classifier
    client: ClientUpdate | None
    image_shape: tuple[int, int, int]
    batch_size: int | None
    num_classes: int
    labels: Tensor | None = None
    order: Order | None = None
    bn_stats: Statistics | None = None
    buffers: Statistics | None = None
    defense: Any = None
    auxiliary: Auxiliary | None = None
    earlier: tuple["Observation", ...] = ()
    trapdoor: Any = None
    graph: "Graph | None" = None

    def __post_init__(self):
        if not getattr(self.model, "attackers_copy", False):
            raise ValueError(
                f"an Observation holds the attacker's copy of a wrapped model, got {type(self.model).__name__}; make it"
                " with observe, or with receive from a foreign update"
            )
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
    def each_client(self) -> Any:
        """What each of several clients runs, or the one client; None where its training details are withheld."""
        return getattr(self.client, "client", self.client)

    @property
    def device(self) -> torch.device:
        return next(iter(self.gradient.values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.gradient.values())).dtype

    def need(self, attack: object) -> None:
        """Raise unless all is there that the attack declares in `needs`.

        Raises:
            WithheldError: the threat model withholds something.
            NotApplicableError: the model or the batch is not of the kind.
        """
        name, needs = type(attack).__name__, getattr(attack, "needs", Needs())
        of_norms = {"bn_stats", "buffers"}  # asked for last: a model without batch norm has none
        self._granted(name, [fact for fact in needs.facts if fact not in of_norms])
        if needs.batch is not None and self.batch_size is not None and self.batch_size > needs.batch:
            most = "one image" if needs.batch == 1 else f"at most {needs.batch} images"
            raise NotApplicableError(f"{name} takes {most}, got batch_size={self.batch_size}; use another attack")
        for test in needs.model:
            if reason := test(self):
                raise NotApplicableError(f"{name} does not apply: {reason}")
        self._granted(name, [fact for fact in needs.facts if fact in of_norms])
        if needs.labels and (rule := attack.label_rule) is not None:  # type: ignore[attr-defined]
            try:
                rule(self)
            except NotApplicableError as error:
                raise NotApplicableError(f"{name} does not apply: {error}") from error

    def _granted(self, name: str, facts: Sequence[Fact]) -> None:
        for fact in facts:
            if getattr(self, fact) in (None, ()):
                what, grants = _FACTS[fact]
                raise WithheldError(
                    f"{name} needs {what}, and the threat model withholds it; observe with ThreatModel({grants}),"
                    " give receive(...) what tells it, or choose another attack"
                )

    def simulate(self, images: Tensor, labels: Tensor, theta: Gradient | None = None) -> Gradient:
        """The forward operator of one guess: what would be sent for these images [B, C, H, W] and labels.

        Args:
            images: in [0, 1].
            labels: int64 [B], or soft [B, K].
            theta: the parameters at which the client starts; None takes the model's.

        Returns:
            A gradient that is differentiable in all three, and detached where the caller computes no gradients.

        Raises:
            WithheldError: the training details are withheld.
            ValueError: the images or labels are not of this kind.
            RuntimeError: the client's code returns a result that can't be differentiated.
        """
        if self.client is None:
            what, grants = _FACTS["client"]
            raise WithheldError(f"simulate needs {what}; observe with ThreatModel({grants})")
        self._check_guess(images, labels)
        how: dict[str, Any] = {"recompute": True} if self.graph is not None and self.graph.recompute else {}
        try:
            return self.client(self.model, images, labels, theta=theta, order=self.order, **how)
        except IndexError as error:  # the labels' values are not looked at: on a GPU that would wait for it
            raise ValueError(f"labels must be classes from 0 to {self.num_classes - 1} ({error})") from error

    def one_gradient(self) -> "Observation":
        """The same update, taken for one gradient of all images at once, up to a factor.

        Raises:
            WithheldError: the training details are withheld.
            NotApplicableError: what the client did is not told by a Client of this package.
        """
        if self.client is None:
            what, grants = _FACTS["client"]
            raise WithheldError(f"one_gradient needs {what}; observe with ThreatModel({grants})")
        if not hasattr(self.client, "one_gradient"):
            raise NotApplicableError(
                f"what the client did is said by {type(self.client).__name__}, which tells no rule of one step; say it"
                " as gi_lib.Client(rule=..., steps=..., lr=...)"
            )
        return replace(self, client=self.client.one_gradient(), order=None, graph=None)

    def _check_guess(self, images: Tensor, labels: Tensor) -> None:
        shape = (len(images), *self.image_shape) if isinstance(images, Tensor) and images.ndim else None
        if shape is None or images.shape != shape or images.dtype != self.dtype or not len(images):
            said = f"a tensor [B, {', '.join(map(str, self.image_shape))}] of {self.dtype}"
            raise ValueError(f"simulate takes images as {said}, got {_said(images)}")
        if (self.order is not None or hasattr(self.client, "sizes")) and self.batch_size not in (None, len(images)):
            raise ValueError(f"simulate takes all {self.batch_size} images, whose steps are known, got {len(images)}")
        hard = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == shape[:1]
        soft = isinstance(labels, Tensor) and labels.is_floating_point()
        if not (hard or (soft and labels.shape == (shape[0], self.num_classes))):
            raise ValueError(
                f"simulate takes labels as int64 [{shape[0]}] or soft as float [{shape[0]}, {self.num_classes}],"
                f" got {_said(labels)}"
            )


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack returns.

    Args:
        images: [N, C, H, W] in [0, 1]. N may differ from B, up to the number that the attack declares (`at_most`).
        labels: [N] int64, or None where they are unknown.
        loss: matching loss at the returned images; NaN where it can't be had.
        trace: [steps, R], the loss of every restart before each step.
        losses: [R], of every restart at the end; NaN for one that failed.
        frames: [F, N, C, H, W], what the attack would have returned after `frame_steps`, or None.
        frame_steps: F step numbers, one for each frame.
        frame_evaluations: the gradient evaluations up to each frame, all restarts together.
        frame_seconds: the CPU seconds (on a GPU: wall seconds) up to each frame.
        gradient_evaluations: guesses whose update was computed, all its steps and rounds at once; of all restarts.
        notes: what else there is to say: the layer that was chosen, checkpoints by hash, a certificate.

    Raises:
        ValueError: a shape or a type is wrong, or a pixel is outside [0, 1] or not finite.
    """

    images: Tensor
    labels: Tensor | None
    loss: float
    trace: Tensor = field(default_factory=lambda: torch.empty(0, 1))
    losses: Tensor | None = None
    frames: Tensor | None = None
    frame_steps: list[int] = field(default_factory=list)
    frame_evaluations: list[int] = field(default_factory=list)
    frame_seconds: list[float] = field(default_factory=list)
    gradient_evaluations: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    SLACK: ClassVar[float] = 1e-5
    """How far rounding may take a pixel out of [0, 1]."""

    def __post_init__(self):
        images, labels = self.images, self.labels
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"an attack must return images as a float tensor [N, C, H, W], got {_said(images)}")
        if not torch.isfinite(images).all():
            raise ValueError(
                "the attack returned NaN or infinite pixels; lower its learning rate, or give it more restarts"
            )
        if images.numel() and not (images.min() >= -self.SLACK and images.max() <= 1 + self.SLACK):
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"an attack must return images in [0, 1], got {low:.4g} to {high:.4g}; clamp them")
        if labels is not None and not (
            isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
        ):
            raise ValueError(f"labels must be int64 [{len(images)}], or None where unknown, got {_said(labels)}")
        if isinstance(self.loss, bool) or not isinstance(self.loss, int | float):
            raise ValueError(f"the loss must be a number, got {_said(self.loss)}; use .item()")
        if not isinstance(self.trace, Tensor) or self.trace.ndim != 2:
            raise ValueError(f"the trace must be a tensor [steps, R], got {_said(self.trace)}")
        if self.frames is not None and self.frames.shape != (len(self.frame_steps), *images.shape):
            raise ValueError(
                f"frames must be [{len(self.frame_steps)}, {', '.join(map(str, images.shape))}], one for each of"
                f" frame_steps, got {_said(self.frames)}"
            )

    @property
    def steps(self) -> int:
        return len(self.trace)


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"


@dataclass(frozen=True, eq=False)
class Scores:
    """How close a reconstruction is: one value for each private image [B], matched one to one with what was returned.

    A private image with which nothing is matched is missed: its entries are NaN.

    Args:
        mse: mean squared error, lower is better.
        psnr: in dB, higher is better, capped at `metrics.PSNR_CAP`.
        floor: PSNR of the image's own mean colour, in dB.
        ssim: in [-1, 1], higher is better; None where images are too small for it.
        lpips: lower is better; None where the network's weights could not be had, or for other than 1 or 3 channels.
        recovered: whether the PSNR is at least `metrics.RECOVERED` dB above the floor.
        returned: number of images that the attack returned, N.
        label_accuracy: share of the labels, as a multiset, that were found; None where none were returned.
        matched: int64, image `matched[i]` of the reconstruction goes with image i of the truth; -1 where it is missed.
        identified: whether no candidate is nearer to the reconstruction than its own image; None without candidates.
    """

    mse: Tensor
    psnr: Tensor
    floor: Tensor
    ssim: Tensor | None
    lpips: Tensor | None
    recovered: Tensor
    returned: int
    label_accuracy: float | None
    matched: Tensor
    identified: Tensor | None = None

    @property
    def recall(self) -> float:
        """Share of the private images that were recovered."""
        return self.recovered.double().mean().item()

    @property
    def precision(self) -> float | None:
        """Share of the returned images that recover a private one; None where nothing was returned."""
        return self.recovered.sum().item() / self.returned if self.returned else None

    def __str__(self) -> str:
        found = self.matched >= 0

        def mean(values: Tensor | None, digits: str) -> str:
            return "missing" if values is None or not found.any() else format(values[found].mean().item(), digits)

        labels = "unknown" if self.label_accuracy is None else f"{self.label_accuracy:.0%}"
        return (
            f"PSNR {mean(self.psnr, '.2f')} dB ({mean(self.psnr - self.floor, '+.2f')} dB from the floor),"
            f" SSIM {mean(self.ssim, '.3f')}, LPIPS {mean(self.lpips, '.3f')}, MSE {mean(self.mse, '.2e')},"
            f" labels {labels} (mean over {int(found.sum())} of {len(found)} images; recovered"
            f" {int(self.recovered.sum())}, returned {self.returned})"
        )


def differing(value: Any, *, shown: bool = False) -> dict[str, Any]:
    """Fields of a dataclass that are not at their default; what only displays is left out, unless `shown`."""
    found = {}
    for f in fields(value):
        default = f.default_factory() if callable(f.default_factory) else f.default
        mine = getattr(value, f.name)
        if (shown or not f.metadata.get("display")) and not (type(mine) is type(default) and mine == default):
            found[f.name] = mine
    return found
