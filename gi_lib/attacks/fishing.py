"""Fishing for user data in large-batch federated learning (Wen, Geiping, Fowl,
Goldblum, Goldstein, ICML 2022, 2202.00580).

A malicious server changes the last layer W h + b alone, so that one image of a batch
keeps a gradient, through secure aggregation too; any attack on one image then takes it.

Class attack, for a class c: the rows of all other classes are zero and their biases
1000, so that p_c = 0 for every image, and at the features

    dL_i/dh = W^T (p - y_i) = -w  if y_i = c,  0 otherwise,         w = W_c.

The body's gradient is that of the images of class c, of which there are n = -B dL/db_c.

Feature attack, for n > 1: logit c becomes s (w . h - theta) and the others 0, so that
p_c is 1 where w . h > theta and 0 elsewhere. By this round, over s, less the first,

    d(theta) - d(infinity) = 1/B sum_i [w . h_i > theta] J_i^T w,   J_i = dh_i / d body,

which the labels have left. The last layer tells how many images are above the cut, and
their mean of w . h is the next cut, until one is left. With `one_shot` the first and
only round has the cut, at a quantile of w . h on the server's own images; this takes a
client whose images are all of class c, of which those below the cut keep their
gradient.

What is handed on, times B, is the gradient of one image of class c at the model of the
first round, with the rows that the other classes would then have. It needs a batch norm
that does not mix images. Departs from the paper: w is the target's own row instead of
one feature; the cut is made between two rounds, since in one round images of other
classes above the cut keep a gradient too; s is larger.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gi_lib.attacks.bias_ratio import BiasRatio, dense_on_pixels
from gi_lib.attacks.inverting_gradients import InvertingGradients
from gi_lib.copies import batch_norms, deep_copy
from gi_lib.labels.layer import descent
from gi_lib.models.layers import dense_layers, logit_layer
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Gradient,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    function,
    real,
    whole,
)

ALONE = 0.05
"""How far the number of images above a cut may be from one."""


@dataclass(frozen=True)
class Hook:
    """What was planted: the last layer by its names, the class, this round's cut.

    `scale` is s; a `cut` of None is the class attack.
    """

    weight: str
    bias: str
    target: int
    scale: float = 1.0
    cut: float | None = None


def no_batch_statistics(obs: Observation) -> str | None:
    """A model whose batch norms, if it has any, use running statistics."""
    if any(norm.own_statistics for norm in batch_norms(obs.model).values()):
        return (
            "batch norm normalises by the batch's own statistics here, so that no image"
            " has a gradient of its own; send the model in eval mode, or use an imprint"
        )
    return None


def fished(obs: Observation) -> str | None:
    """A last layer that was planted by Fishing."""
    hook = obs.trapdoor
    if hook is None:
        return None  # it is withheld, which is said elsewhere
    if (
        not isinstance(hook, Hook)
        or not {hook.weight, hook.bias} <= obs.gradient.keys()
    ):
        return (
            "the update is not of a model that Fishing has planted, or its last layer"
            " is frozen; observe with the model and the trapdoor that `plant` returned"
        )
    return None


@dataclass(frozen=True)
class Fishing:
    needs: ClassVar[Needs] = Needs(
        ("client", "batch_size", "trapdoor"), model=(fished, no_batch_statistics)
    )
    revision: ClassVar[int] = 1

    target: int = 0  # c
    attack: Any = None  # on what is caught; None: bias ratio, or Inverting Gradients
    bias: float = 1000.0  # of the other classes, public code
    scale: float = 1e5  # s, over |w|; public code: 300 or 1,000 on one feature
    one_shot: int = 0  # B of a single round with a cut; 0 takes rounds as they come
    surrogates: int = 2000  # images from which the quantile is read

    def __post_init__(self):
        whole(self, "target", "one_shot", least=0)
        whole(self, "surrogates", least=2)
        real(self, "bias", "scale", above=0)
        if self.attack is not None:
            function(self, "attack")

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, Hook]:
        """The model with a last layer for the class attack or the cut, and its hook."""
        hook, own = self._hook(model, image_shape), dict(model.named_parameters())
        others = torch.arange(model.num_classes) != self.target
        if not own[hook.weight][others].any():
            raise ValueError(
                "the last layer has no row but one: it is planted already; plant on the"
                " model that was agreed on"
            )
        w = own[hook.weight][self.target].detach()
        if self.one_shot:
            if auxiliary is None:
                raise ValueError(
                    "one_shot reads its cut from images of the server's own; give it"
                    " auxiliary data, or take several rounds"
                )
            images, _ = auxiliary.draw(self.surrogates, rng)
            p = own[hook.weight]
            layers, _ = dense_layers(model, images.to(p.device, p.dtype))
            h = next(layer.input for layer in layers if layer.weight == hook.weight)
            cut = (h @ w).double().quantile(1 / self.one_shot).item()
            hook = replace(hook, scale=self._sharp(w), cut=cut)
        return self._with_row(model, hook, w), hook

    def again(
        self, obs: Observation, rng: torch.Generator
    ) -> tuple[Classifier, Hook] | None:
        """What the server sends in the next round; None where one image is caught."""
        n, g = self._caught(obs)
        first, hook = (*obs.earlier, obs)[0], obs.trapdoor
        if self.one_shot or n < 1 + ALONE:
            return None
        w = dict(first.model.named_parameters())[hook.weight][hook.target].detach()
        cut = (w @ g[hook.weight][hook.target] / g[hook.bias][hook.target]).item()
        if hook.cut is not None and cut <= hook.cut:
            return None  # images with the same features
        hook = replace(hook, scale=self._sharp(w), cut=cut)
        return self._with_row(obs.model, hook, w), hook

    def at_most(self, obs: Observation) -> int:
        """As many images as were caught; one, where the cut is done."""
        return max(1, round(self._caught(obs)[0])) if fished(obs) is None else 1

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        n, g = self._caught(obs)
        first, count = (*obs.earlier, obs)[0], round(n)
        told = {"caught": n, "rounds": 1 + len(obs.earlier)}
        if count < 1:
            why = (
                f"class {self.target} is not in the batch, and no image has a gradient"
            )
            none = torch.empty(0, *obs.image_shape, dtype=obs.dtype, device=obs.device)
            labels = torch.empty(0, dtype=torch.int64, device=obs.device)
            return Reconstruction(none, labels, torch.nan, notes=told | {"why": why})
        caught = replace(
            first.one_gradient(),
            gradient={name: v / n for name, v in g.items()},
            batch_size=count,
            labels=torch.full((count,), obs.trapdoor.target, device=obs.device),
            bn_stats=None,
            buffers=None,
            trapdoor=None,
        )
        dense = dense_on_pixels(caught) is None
        attack = self.attack or (BiasRatio() if dense else InvertingGradients())
        rec = attack(caught, rng)
        cut = obs.trapdoor.cut is not None and not self.one_shot
        return replace(  # above a cut the class is unknown
            rec, labels=None if cut else rec.labels, notes=rec.notes | told
        )

    def _hook(self, model: Classifier, image_shape: tuple[int, int, int]) -> Hook:
        try:
            layer = logit_layer(model, image_shape)
        except NotApplicableError as error:
            raise NotApplicableError(
                "fishing changes the rows of a dense last layer, and this model does"
                " not end in one; plant an imprint before it instead"
            ) from error
        own = dict(model.named_parameters())
        W, b = layer.weight, layer.bias
        if W is None or b is None or len(own[W]) < 2:
            raise NotApplicableError(
                "fishing sets a row and a bias for each class, and the last layer"
                " has no bias, or one row for two classes; plant an imprint before"
                " it instead"
            )
        if self.target >= model.num_classes:
            raise ValueError(
                f"there is no class {self.target} to fish for: the model has classes 0"
                f" to {model.num_classes - 1}"
            )
        return Hook(W, b, self.target)

    def _sharp(self, w: Tensor) -> float:
        return self.scale / w.norm().item()

    def _with_row(self, model: Classifier, hook: Hook, w: Tensor) -> Classifier:
        sent: Any = deep_copy(model)
        own = dict(sent.named_parameters())
        with torch.no_grad():
            b = 0.0 if hook.cut is None else -hook.scale * hook.cut
            own[hook.weight].zero_()[hook.target] = hook.scale * w
            own[hook.bias].fill_(self.bias if hook.cut is None else 0)[hook.target] = b
        return sent

    def _caught(self, obs: Observation) -> tuple[float, Gradient]:
        """How many images were caught, and the sum of their gradients as the first
        model's, had they the target's label."""
        rounds, hook = (*obs.earlier, obs), obs.trapdoor
        ends, own = rounds[:: max(1, len(rounds) - 1)], rounds[0].trapdoor.scale
        parts = [self._summed(end, end.trapdoor.scale / own) for end in ends]
        g = {name: -v for name, v in parts[0].items()}
        if len(parts) > 1:  # above the cut
            g = {name: parts[1][name] + v for name, v in g.items()}
        c, others = hook.target, torch.arange(obs.num_classes) != hook.target
        n = g[hook.bias][c].item()
        for name in (hook.weight, hook.bias):
            g[name] = g[name].clone()
            g[name][others] = -g[name][c] / (obs.num_classes - 1)
        return n, {name: -v for name, v in g.items()}

    def _summed(self, obs: Observation, scale: float) -> Gradient:
        """The sum of the images' gradients; the body's over a scale."""
        hook, times = (
            obs.trapdoor,
            (obs.batch_size or 1) / descent(obs, "fishing").steps,
        )
        last = (hook.weight, hook.bias)
        return {
            name: times * (g if name in last else g / scale)
            for name, g in obs.gradient.items()
        }
