"""The batch-norm update (Hatamizadeh, Yin, Molchanov, Myronenko, Li, Dogra, Feng,
Flores, Kautz, Xu, Roth, IEEE TMI 2023).

arXiv:2202.06924. A client in train mode that returns its running statistics returns
those of its batch. With momentum a, each batch norm has moved its running mean r by

    r' = (1 - a) r + a mu,    so that    mu = (r' - (1 - a) r) / a,

and its running variance by the same rule. The search is GradInversion's for one seed,

    min over x of  a_g sum_l |g_l(x) - g*_l|_2 + a_tv TV(x) + a_l2 |x|_2
                   + a_bn sum_l ( |mu_l(x) - mu_l|_2 + |var_l(x) - var_l|_2 )

by Adam with cosine decay. Its `target` says where mu_l and var_l come from: `Inferred`
(this paper), `Running` (those that the client started from; Huang et al., NeurIPS 2021,
arXiv:2112.00059), `Proxy` (surrogate data), `Exact` (they are told); None leaves the
term out. Huang et al. match by `cosine` with gradient 1, tv .052, bn 1.6e-4 (second
hand).

The returned variance is the unbiased one, n / (n - 1) of that by which the pass
normalises, with n = B H W values a channel: `Inferred` converts. After T local steps

    r' = (1 - a)^T r + sum_t a (1 - a)^(T - 1 - t) mu_t,

a weighted mean over the steps, and a guess's statistics are weighted alike.

Departs from the paper: weights are those of the authors' settings, without their two
that other data would need (a prior image to start from, and its energy); the step has
no warm-up. Their code leaves the variance unbiased. After several steps the guess's
statistics are taken at the weights that the client started from, not at those of each
step. Labels are counted (labels.infer), not sought.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.attacks.gradinversion import normalises_batches
from gi_lib.copies import (
    BatchNorm,
    batch_norms,
    bn_statistics,
    drawing,
    forward,
    inputs_of_batch_norms,
    running_statistics,
)
from gi_lib.matching import Distance, layer_l2, norm
from gi_lib.optimise import adam
from gi_lib.parametrisations import Pixels
from gi_lib.priors import statistics_gap, total_variation
from gi_lib.search import gaussian, search
from gi_lib.types import (
    Needs,
    NotApplicableError,
    Observation,
    Order,
    Reconstruction,
    Statistics,
    displayed,
    function,
    real,
    whole,
)

SLACK = 1e-3
"""How far below 0, in parts of the largest, rounding may take an inferred variance."""

Goal = tuple[Statistics, Callable[[Tensor], Statistics]]
"""What a guess must have, and how that of a guess [B, C, H, W] is taken."""


@runtime_checkable
class Target(Protocol):
    """Where the statistics come from."""

    needs: ClassVar[Needs]

    def __call__(self, obs: Observation, rng: torch.Generator) -> Goal: ...


@dataclass(frozen=True)
class Running:
    """The running statistics that the client started from: of what the model was
    trained on, not of the batch."""

    needs: ClassVar[Needs] = Needs(model=(normalises_batches,))

    def __call__(self, obs: Observation, rng: torch.Generator) -> Goal:
        if not (goal := running_statistics(obs.model)):
            raise NotApplicableError(
                "the model's batch norms keep no running statistics; use another target"
            )
        return goal, partial(bn_statistics, obs.model)


@dataclass(frozen=True)
class Exact:
    """The statistics of the private batch, where the threat model grants them."""

    needs: ClassVar[Needs] = Needs(("bn_stats",), model=(normalises_batches,))

    def __call__(self, obs: Observation, rng: torch.Generator) -> Goal:
        assert obs.bn_stats is not None
        return obs.bn_stats, partial(bn_statistics, obs.model)


@dataclass(frozen=True)
class Proxy:
    """The statistics of so many images of the attacker's own."""

    needs: ClassVar[Needs] = Needs(("auxiliary",), model=(normalises_batches,))

    images: int = 256

    def __post_init__(self):
        whole(self, "images", least=2)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Goal:
        assert obs.auxiliary is not None
        own = rng.clone_state()  # the search starts where it does with any target
        images, _ = obs.auxiliary.draw(self.images, own)
        with torch.no_grad():
            goal = bn_statistics(obs.model, images.to(obs.device, obs.dtype))
        return goal, partial(bn_statistics, obs.model)


@dataclass(frozen=True)
class Inferred:
    """The statistics of the private batch, told by the running ones that came back.

    Args:
        momentum: a, of every batch norm; None takes what each layer of the model says.
    """

    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "buffers"), model=(normalises_batches,)
    )

    momentum: float | None = None

    def __post_init__(self):
        if self.momentum is not None:
            real(self, "momentum", above=0, most=1)

    def __call__(self, obs: Observation, rng: torch.Generator | None = None) -> Goal:
        """mu and the biased variance, [C] each, of every batch norm in train mode.

        Raises:
            WithheldError: the running statistics, the client or its batch size are.
            NotApplicableError: none of them moved, how far is not said, or which images
                entered which local step is not.
        """
        obs.need(self)
        assert obs.buffers is not None
        clients, values = _clients(obs), _values(obs)
        slots = [tuple(step.tolist()) for _, steps in clients for step in steps]
        goal: Statistics = {}
        mixes: dict[str, tuple[Tensor, Tensor]] = {}  # of means, of biased variances
        for name, layer in _moved(obs).items():
            added = self._shares(name, layer, clients)
            moved = added.sum()
            mean, var = (
                (after - (1 - moved) * before) / moved
                for after, before in zip(obs.buffers[name], _before(layer), strict=True)
            )
            if var.min() < -SLACK * var.abs().max():
                raise NotApplicableError(
                    f"the returned variance of {name} asks for a negative variance of"
                    " the batch: the client has another momentum, or took other steps,"
                    " than is said; say Inferred(momentum=...), or receive the update"
                    " with client=Client(steps=...)"
                )
            n = torch.tensor([len(step) * values[name] for step in slots]).to(added)
            unbiased = added / moved * n / (n - 1)
            goal[name] = mean, (var / unbiased.sum()).clamp_min(0)
            mixes[name] = added / moved, unbiased / unbiased.sum()

        def of_the_steps(x: Tensor) -> Statistics:
            seen = {
                step: bn_statistics(obs.model, x[list(step)]) for step in set(slots)
            }
            found = {}
            for name, mix in mixes.items():
                pairs = zip(*(seen[step][name] for step in slots), strict=True)
                means, variances = (torch.stack(of_steps) for of_steps in pairs)
                found[name] = mix[0] @ means, mix[1] @ variances
            return found

        return goal, of_the_steps

    def _shares(
        self, name: str, layer: BatchNorm, clients: list[tuple[float, Order]]
    ) -> Tensor:
        """The share of each local step's statistics in what came back, [steps]."""
        momentum = layer.momentum if self.momentum is None else self.momentum
        counted = layer.num_batches_tracked
        if momentum is None and counted is None:
            raise NotApplicableError(
                f"the momentum of {name} is not said, nor how many batches it has seen;"
                " say Inferred(momentum=...)"
            )
        if momentum is not None and not 0 < momentum <= 1:
            raise NotApplicableError(
                f"{name} has momentum {momentum:g}, with which running statistics don't"
                " tell the batch's; say Inferred(momentum=...), or use another target"
            )
        before = 0 if counted is None else int(counted)
        found: list[float] = []
        for weight, steps in clients:
            own: list[float] = []
            for t in range(len(steps)):
                a = 1 / (before + t + 1) if momentum is None else momentum
                own = [w * (1 - a) for w in own] + [a]
            found += [weight * w for w in own]
        return _before(layer)[0].new_tensor(found)


def _before(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def _clients(obs: Observation) -> list[tuple[float, Order]]:
    """Each client's share of the images, and the slots of its local steps."""
    client: Any = obs.client
    if (sizes := getattr(client, "sizes", None)) is None:
        order = obs.order or client.schedule(obs.batch_size)
        found = [(1.0, order)]
    else:
        order, steps = obs.order or client.schedule(), client.client.steps
        starts = range(0, len(order), steps)
        parts = [order[start : start + steps] for start in starts]
        found = [(n / sum(sizes), part) for n, part in zip(sizes, parts, strict=True)]
    if obs.order is None and any(len(step) != obs.batch_size for step in order):
        raise NotApplicableError(
            f"the returned statistics are a weighted mean over {len(order)} local steps"
            " on different images, and which image enters which step is withheld;"
            " observe with ThreatModel(knows_order=True), or use another target"
        )
    return found


def _moved(obs: Observation) -> dict[str, BatchNorm]:
    """The batch norms in train mode whose running statistics came back."""
    norms, back = batch_norms(obs.model), obs.buffers or {}
    found = {
        name: norm for name, norm in norms.items() if norm.training and name in back
    }
    if not found:
        raise NotApplicableError(
            "no batch norm that keeps running statistics was in train mode, so that"
            " nothing of the batch is in those that came back; call .train() on the"
            " model if the client did, or use the target Running()"
        )
    pairs = [
        zip(back[name], _before(norm), strict=True) for name, norm in found.items()
    ]
    if all(torch.equal(after, before) for pair in pairs for after, before in pair):
        raise NotApplicableError(
            "the running statistics that came back are those that were sent: the client"
            " trained in eval mode, or keeps its own; use another target"
        )
    return found


def _values(obs: Observation) -> dict[str, int]:
    """H W: the values that each batch norm gets in a channel of one image."""
    x = torch.zeros(2, *obs.image_shape, device=obs.device, dtype=obs.dtype)
    names = {id(layer): name for name, layer in batch_norms(obs.model).items()}
    with torch.no_grad(), inputs_of_batch_norms() as seen, drawing(obs.model, None):
        forward(obs.model, x)
    return {names[id(layer)]: x[0, 0].numel() for layer, x in seen}


@dataclass(frozen=True)
class BatchNormUpdate:
    """Its needs are those of its target, and the client's code, batch size and labels.

    Args:
        target: Inferred, Running, Proxy, Exact, or None for no statistics, as bn=0.
    """

    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "buffers"), model=(normalises_batches,), labels=True
    )
    revision: ClassVar[int] = 1

    target: Target | None = Inferred()
    steps: int = 40_000  # authors' settings; so are the weights
    lr: float = 0.1
    gradient: float = 1e-3  # a_g
    tv: float = 1e-4
    l2: float = 1e-5
    bn: float = 0.1
    restarts: int = 1
    distance: Distance = layer_l2
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "restarts")
        whole(self, "frames", least=0)
        real(self, "lr", above=0)
        real(self, "gradient", "tv", "l2", "bn")
        function(self, "distance", "label_rule")
        more = Needs()
        if self.target is not None:
            function(self, "target")
            more = self.target.needs if self.bn else more
        facts = tuple(dict.fromkeys(("client", "batch_size", *more.facts)))
        object.__setattr__(self, "needs", Needs(facts, more.model, labels=True))

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        asked = self.target if self.bn else None
        goal, statistics = asked(obs, rng) if asked else ({}, None)

        def match(z):
            return self.distance(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z):
            natural = self.tv * total_variation(z) + self.l2 * norm(z)
            total = self.gradient * match(z) + natural
            if statistics is None:
                return total
            return total + self.bn * statistics_gap(statistics(pixels.image(z)), goal)

        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=gaussian(obs),
            loss=loss,
            match=match,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=adam(self.lr, cosine=True),
            project=pixels.project,
            frames=self.frames,
        )
