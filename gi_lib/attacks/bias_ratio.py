"""Bias ratio (Phong, Aono, Hayashi, Wang, Moriai, IEEE TIFS 2018).

    x = (dL/dW_k) / (dL/db_k)   for every neuron k of a layer W x + b, dL/db_k != 0,

since dL/dW_k = (dL/da_k) x and dL/db_k = dL/da_k, where a = W x + b. It is an identity,
not an approximation: one image comes back exactly, up to rounding. A batch of B images
makes row k a mixture, x_k = sum_i c_ki x_i with weights c_ki that sum to one; it shows
a single image where one alone lights neuron k.

The layer is found by a forward pass, and so is the order in which it sees the pixels.
Departs from the paper: for one image the ratio is averaged over neurons, weighted by
|dL/db_k|, so that the well-conditioned ones count most; for a batch the B neurons with
the largest |dL/db_k| give the B images.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gi_lib import labels
from gi_lib.models.layers import pixel_layer
from gi_lib.search import certified
from gi_lib.types import (
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    function,
)


def dense_on_pixels(obs: Observation) -> str | None:
    """A first layer that is dense on the pixels and has a bias."""
    try:
        *names, _ = pixel_layer(obs.model, obs.image_shape)
    except NotApplicableError as error:
        return str(error)
    frozen = [name for name in names if name not in obs.gradient]
    return f"{', '.join(frozen)} of the first layer are frozen" if frozen else None


@dataclass(frozen=True)
class BiasRatio:
    needs: ClassVar[Needs] = Needs(("batch_size",), model=(dense_on_pixels,))
    revision: ClassVar[int] = 1

    label_rule: labels.LabelRule = labels.infer

    def __post_init__(self):
        function(self, "label_rule")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        B = obs.batch_size or 1
        W, b, pixels = pixel_layer(obs.model, obs.image_shape)
        dW, db = obs.gradient[W][:, pixels], obs.gradient[b]
        active = int(db.count_nonzero())
        if active < B:
            raise ValueError(
                f"{active} neurons of the first layer have a gradient, and {B} images"
                " need as many; the ratio of the others is 0 / 0. Nothing more can be"
                " read from this update"
            )
        if B == 1:
            x = (db.sign() @ dW) / db.abs().sum()
        else:
            rows = db.abs().topk(B).indices
            x = dW[rows] / db[rows].unsqueeze(1)
        x = obs.model.mean + obs.model.std * x.reshape(B, *obs.image_shape)
        return certified(obs, x.clamp(0, 1), self.label_rule)
