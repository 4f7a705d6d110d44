"""The ratio of weight and bias gradients (Phong, Aono, Hayashi, Wang, Moriai, IEEE TIFS 2018).

    x = (dL/dW_k) / (dL/db_k)      for every neuron k of a dense layer W x + b with dL/db_k != 0

since dL/dW_k = (dL/da_k) x and dL/db_k = dL/da_k, where a = W x + b. It is an identity, not an
approximation: one image comes back exactly, up to rounding. A batch of B images makes row k a mixture,
x_k = sum_i c_ki x_i with weights c_ki that sum to one; it shows a single image where one alone lights neuron k.

Needs: the batch size; a model whose first layer is dense on the pixels, with a bias. Labels are inferred for the
loss that is reported, which is NaN where the client's code is withheld; the images don't depend on them.
Departs from the paper: for one image the ratio is averaged over neurons, weighted by |dL/db_k|, so that the
well-conditioned ones count most; for a batch the B neurons with the largest |dL/db_k| give the B images.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gi_lib import labels
from gi_lib.matching import squared_l2
from gi_lib.types import NotApplicableError, Observation, Reconstruction


@dataclass(frozen=True)
class BiasRatio:
    needs: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self, *self.needs)
        dW, db = _dense_on_pixels(obs)
        active = int(db.count_nonzero())
        if active < obs.batch_size:
            raise ValueError(
                f"{active} neurons of the first layer have a gradient, and {obs.batch_size} images need as many;"
                " the ratio of the others is 0 / 0. Nothing more can be read from this update"
            )
        if obs.batch_size == 1:
            x = (db.sign() @ dW) / db.abs().sum()
        else:
            rows = db.abs().topk(obs.batch_size).indices
            x = dW[rows] / db[rows].unsqueeze(1)
        x = x.reshape(obs.batch_size, *obs.image_shape)
        images = (obs.model.mean + obs.model.std * x).clamp(0, 1)
        y = labels.infer(obs)
        if obs.update is None:
            return Reconstruction(images=images, labels=y, loss=math.nan, trace=x.new_empty(0, 1))
        loss = squared_l2(obs.simulate_rows(images.unsqueeze(0), y.unsqueeze(0)), obs.gradient).detach()
        return Reconstruction(
            images=images, labels=y, loss=loss.item(), trace=loss.unsqueeze(0), gradient_evaluations=1
        )


def _dense_on_pixels(obs: Observation) -> tuple[Tensor, Tensor]:
    """Gradients of the first layer's weight [N, C H W] and bias [N]."""
    layers = [(name, layer) for name, layer in obs.model.named_modules() if list(layer.parameters(recurse=False))]
    name, first = layers[0]
    pixels = torch.Size(obs.image_shape).numel()
    if not isinstance(first, nn.Linear) or first.in_features != pixels or first.bias is None:
        raise NotApplicableError(
            f"the bias ratio needs a first layer that is dense on all {pixels} pixels and has a bias; this model"
            f" begins with {type(first).__name__}; use an attack that matches gradients"
        )
    return obs.gradient[f"{name}.weight"], obs.gradient[f"{name}.bias"]
