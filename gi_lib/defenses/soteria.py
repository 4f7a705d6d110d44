"""Soteria (Sun, Li, Wang, Yang, Li, Chen, CVPR 2021, arXiv:2012.06043).

Of a dense layer with the input r, the representation, each feature f has the score

    s_f = sum_i |d r_f / d x_i|_2 / (r_f(x_i) + eps)

over the images x_i. Columns f of the layer's weight gradient whose |s_f| is under a
percentile are set to 0. They are those on which the image leaves most of its trace for
the least change of the features.

Departs from the public code: |s_f| is compared with the percentile of |s_f|, not of
s_f, which is the same for features that are not negative. The code's eps is 0.1, which
matters for the zeros of ReLU; ports that leave it out divide by zero. The score of all
features is one vectorised derivative in place of a backward pass each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gi_lib.defenses.base import Defense, Law
from gi_lib.defenses.noise import GaussianNoise
from gi_lib.types import Gradient, Sent, real

AT_ONCE = 256
"""Features whose derivatives are computed in one pass."""


@dataclass(frozen=True)
class Soteria(Defense):
    """Prunes a dense layer's weight gradient where the features tell most of the image.

    Args:
        percentile: of the features' columns that are set to 0, in percent.
        layer: name of the defended weight; None takes the update's last matrix.
        eps: added to the features.
    """

    percentile: float = 80.0  # GGL's setting; the authors' demos have 1 and 60
    layer: str | None = None
    eps: float = 0.1  # public code
    revision = 1

    def __post_init__(self):
        real(self, "percentile")
        real(self, "eps", above=0)
        if not isinstance(self.layer, str | None):
            raise ValueError(
                f"Soteria needs layer, the name of a weight or None, got {self.layer!r}"
            )
        if self.percentile > 100:
            raise ValueError(
                f"Soteria needs percentile, at most 100, got {self.percentile!r}"
            )

    def on_update(
        self, gradient: Gradient, sent: Sent, rng: torch.Generator
    ) -> Gradient:
        name = self.defended(gradient)
        score = self.scores(sent, name).abs()
        kept = score >= torch.quantile(score, self.percentile / 100)
        return {**gradient, name: gradient[name] * kept.to(gradient[name])}

    def law(self, sent: Gradient) -> Law:
        """That of an update without noise; the defended weights say nothing."""
        name = self.defended(sent)
        surprise, spread = GaussianNoise(0).law(sent)

        def rest(gradient: Gradient) -> Gradient:
            return {n: g for n, g in gradient.items() if n != name}

        return Law(lambda g, observed: surprise(rest(g), rest(observed)), spread)

    def defended(self, gradient: Gradient) -> str:
        """Name of the defended weight."""
        found = [name for name, g in gradient.items() if g.ndim == 2]
        if self.layer is not None and self.layer not in found:
            raise ValueError(
                f"Soteria defends the weight of a dense layer, and {self.layer!r} is"
                f" none of the update's: {', '.join(found) or 'there is none'}"
            )
        if not found:
            raise ValueError(
                "Soteria defends the weight of a dense layer, and the update has none;"
                " use GaussianNoise, or another defense"
            )
        return self.layer or found[-1]

    def scores(self, sent: Sent, name: str) -> Tensor:
        """s [D] of the features that enter the layer with this weight."""
        own = dict(sent.model.named_parameters())[name]
        layer = next(
            (m for m in sent.model.modules() if getattr(m, "weight", None) is own), None
        )
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"Soteria needs the input of the dense layer that has {name!r}, and"
                " that parameter is no torch.nn.Linear's; name one that is by `layer`"
            )

        def features(x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            hook = layer.register_forward_pre_hook(
                lambda _, given: seen.append(given[0])
            )
            try:
                sent.model(x)
            finally:
                hook.remove()
            return seen[0].flatten(0, -2)  # [B, D]

        slopes = torch.func.jacrev(lambda x: features(x).sum(0), chunk_size=AT_ONCE)
        length = slopes(sent.images).flatten(2).norm(dim=2)  # [D, B]
        with torch.no_grad():
            r = features(sent.images)
        if len(r) != len(sent.images):
            raise ValueError(
                f"Soteria needs one vector of features an image, and {name!r} sees"
                f" {len(r)} for {len(sent.images)} images; name another layer"
            )
        return (length.T / (r + self.eps)).sum(0).detach()
