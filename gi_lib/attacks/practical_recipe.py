"""The practical recipe, "modern" of breaching (Geiping, Fowl, Wen, 2022), a framework.

No paper has these settings. This file follows the choices of the public framework;
none of its code is here.

    x* = argmin over x in [0, 1]^n of  1 - <g(x), g*> / (|g(x)| |g*|)
             + a_tv TV_c(x) + a_h mean (h(x) - h*)^2,     h*_i = gW*_y / gb*_y, y = y_i

by Adam with warm-up and cosine decay on the soft sign tanh(s g) / s of the gradient g,
s = 1 - k / steps, from a patch of N(0, 1) that is tiled over the image. TV_c is the
total variation of the channels and of their differences. h(x) is what the last layer is
given, and gW*_y and gb*_y are row y of its observed gradient: for one image the ratio
is h of the private image, exactly; for more it is a mixture over the batch. The
optimiser moves z = (x - mean) / std, where TV_c is taken and the box is clamped, as in
Inverting Gradients. The iterate of the least objective is returned.

Labels are known, or inferred. The fields take the recipe apart: `squash` (`hard_sign`,
or None for the gradient itself), `prior` (`isotropic_total_variation` for channels
alone), `patch` (the image's side for plain N(0, 1)), `feature` (0 for none).
Departs from the framework: the total variation has no step across the border of the
image; a last layer without a bias, or one whose gradient is 0 at the label, is refused
unless `feature` is 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib import labels
from gi_lib.matching import Distance, cosine
from gi_lib.models.layers import logit_layer
from gi_lib.optimise import Squash, adam, soft_sign, squashed
from gi_lib.parametrisations import Pixels
from gi_lib.priors import Prior, colour_total_variation, feature_distance
from gi_lib.search import patterned, search
from gi_lib.types import (
    Labels,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    displayed,
    function,
    real,
    whole,
)


def features_of(obs: Observation, y: Labels) -> Float[Tensor, "B N"]:
    """h*: what the last layer was given for an image of each label of y.

    Raises:
        NotApplicableError: the layer's bias, or its gradient at a label, is missing.
    """
    gW, gb = labels.last_layer(obs)
    if gb is None:
        raise NotApplicableError(
            "the feature prior divides by the gradient of the last layer's bias, and"
            " the model has none there; set feature=0"
        )
    if (absent := y[gb[y] == 0]).numel():
        raise NotApplicableError(
            "the feature prior divides by the gradient of the last layer's bias, which"
            f" is 0 at label {absent[0].item()}; set feature=0"
        )
    return gW[y] / gb[y, None]


@dataclass(frozen=True)
class PracticalRecipe:
    needs: ClassVar[Needs] = Needs(("client", "batch_size"), labels=True)
    revision: ClassVar[int] = 1

    steps: int = 24_000  # breaching, modern.yaml; so are all values here
    lr: float = 0.1
    warm_up: int = 50
    squash: Squash | None = soft_sign
    tv: float = 0.1  # a_tv
    prior: Prior = colour_total_variation
    patch: int = 4  # side in pixels
    feature: float = 0.1  # a_h
    restarts: int = 1
    distance: Distance = cosine
    label_rule: labels.LabelRule = labels.infer
    frames: int = displayed(0)

    def __post_init__(self):
        whole(self, "steps", "patch", "restarts")
        whole(self, "warm_up", "frames", least=0)
        real(self, "lr", above=0)
        real(self, "tv", "feature")
        function(self, "prior", "distance", "label_rule")
        if self.squash is not None:
            function(self, "squash")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        y, pixels = self.label_rule(obs), Pixels(obs.model.mean, obs.model.std)
        last, h = None, None
        if self.feature:
            last, h = (
                logit_layer(obs.model, obs.image_shape).weight,
                features_of(obs, y),
            )

        def match(z):
            return self.distance(obs.simulate(pixels.image(z), y), obs.gradient)

        def loss(z):
            total = match(z) + self.tv * self.prior(z)
            if last is None or h is None:
                return total
            apart = feature_distance(obs.model, pixels.image(z), last, h)
            return total + self.feature * apart

        optimiser = adam(self.lr, cosine=True, warm_up=self.warm_up)
        return search(
            obs,
            rng,
            restarts=self.restarts,
            steps=self.steps,
            start=patterned(obs, self.patch, torch.randn),
            loss=loss,
            match=match,
            image=pixels.image,
            labels=lambda z: y,
            optimiser=squashed(optimiser, self.squash) if self.squash else optimiser,
            project=pixels.project,
            best=True,
            frames=self.frames,
        )
