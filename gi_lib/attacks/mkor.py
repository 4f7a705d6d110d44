"""mKOR (Wang, Velipasalar, Gursoy, WACV 2024, 2310.19222): maximum knowledge
orthogonality reconstruction.

A malicious server changes parameters alone. Convolutions carry the image on: a kernel
with one 1 copies a channel, and where a pool halves the sides, four kernels with the 1
in four places keep what one copy would lose; behind a max pool, copies of 1 - x give a
lower bound beside the upper one. Dense layers keep the classes apart. Each neuron of
the first takes the mean of the features h, with weights 1/D; the next pass neuron c on
to neuron c alone, up to logit c. So all logits are equal, and with the bias s on the
logit of the last class K, p_K = 1 and p_c = 0 for every image, and

    dL/dW_c = -1/B sum_(i: y_i = c) h_i,     dL/db_c = -n_c / B,        c < K,

in the first dense layer: the bias ratio of row c is the mean of h over the images of
class c, which is an image's own where its class has no other. From h the way back
through the convolutions is in models.carried: exact for a stride or a mean pool with
shifts, half of the sides for one without, bounds for a max pool.

Departs from the paper, of which its figures, README and code were read: its code has
the negative logit as loss, without a softmax, where every class is read and no s is
needed; under cross-entropy row c would have p_c sum_i h_i too, and the K rows, which
sum to zero, would leave one sum open: s takes class K for it. Kernels undo the model's
normalisation. Behind a mean pool shifted means are solved for the pixels, where the
code takes means for pixels; the code pads by repeating the border, and pools of 2 x 2
cells to one are shifted to both sides here, so that zeros behind the border let each
cell through. The smoothing of what comes back is left out, and so are the paper's ways
to hide the plant.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gi_lib.attacks.trap_weights import unnormalised
from gi_lib.copies import deep_copy
from gi_lib.models.carried import Step, brought_back, carry, steps_of
from gi_lib.search import no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    Observation,
    Reconstruction,
    real,
)

THERE = 1e-6
"""Minus the bias gradient from which a class is taken for present; the public code."""


@dataclass(frozen=True)
class Carried:
    """What was planted: the convolutions' steps, and the first dense layer's name."""

    steps: tuple[Step, ...]
    dense: str


def alike(weight: Tensor, classes: int) -> bool:
    """Whether a dense layer has the same row for each class."""
    rows = weight[:classes]
    return torch.equal(rows, rows[:1].expand_as(rows))


def separates(obs: Observation) -> str | None:
    """A model that MKOR has planted, whose first dense layer the client trains."""
    if obs.trapdoor is None:
        return None  # it is withheld, which is said elsewhere
    own, trap = dict(obs.model.named_parameters()), obs.trapdoor
    if isinstance(trap, Carried):
        weight, bias = f"{trap.dense}.weight", f"{trap.dense}.bias"
        sent = {weight, bias} <= obs.gradient.keys()
        if sent and weight in own and alike(own[weight], obs.num_classes):
            return None
    return (
        "the update is not of a model that MKOR has planted, or its first dense layer"
        " is frozen; observe with the model and the trapdoor that `plant` returned"
    )


@dataclass(frozen=True)
class MKOR:
    needs: ClassVar[Needs] = Needs(("trapdoor",), model=(separates,))
    revision: ClassVar[int] = 1

    sink: float = 20.0  # s, ours: p_c is 2e-9

    def __post_init__(self):
        real(self, "sink", above=0)

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, Carried]:
        """The model with other parameters, and what they do."""
        steps, dense = steps_of(model, image_shape)
        planted: Any = deep_copy(model)
        first, *further = (planted.get_submodule(name) for name in dense)
        if alike(first.weight, model.num_classes):
            raise ValueError(
                f"{dense[0]} has the same row for each class: the model is planted"
                " already; plant on the model as it was"
            )
        with torch.no_grad():
            W = torch.full_like(first.weight, 1 / first.in_features)
            b = torch.zeros_like(first.bias)
            if not steps:
                W, b = (
                    v.to(W) for v in unnormalised(model, W.cpu(), b.cpu(), image_shape)
                )
            first.weight.copy_(W)
            first.bias.copy_(b)
            for layer in further:
                layer.weight.copy_(torch.eye(*layer.weight.shape))
                layer.bias.zero_()
            (first, *further)[-1].bias[-1] = self.sink
        carry(planted, steps)
        return planted, Carried(steps, dense[0])

    def at_most(self, obs: Observation) -> int:
        """A class gives one picture, the last class none."""
        return no_more(obs, obs.num_classes - 1)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        trap, B = obs.trapdoor, obs.batch_size
        dW, db = (
            obs.gradient[f"{trap.dense}.{kind}"][: obs.num_classes - 1]
            for kind in ("weight", "bias")
        )
        there = (db < -THERE).nonzero().flatten()
        most = db[there].argsort()[: self.at_most(obs)]
        c = there[most].sort().values
        h = dW[c] / db[c, None]
        x = brought_back(obs.model, trap.steps, h, obs.image_shape)
        blocks = sum(bool(s.halves) and not s.shifts for s in trap.steps)
        notes: dict[str, Any] = {"enlarged": 2**blocks}
        if B is not None:
            steps = getattr(obs.each_client, "steps", 1)
            n = (-B / steps * db[c]).round()
            notes |= {"alone": int((n == 1).sum()), "of": n.int().tolist()}
            if obs.num_classes - 1 < B:
                notes["crowded"] = True  # more images than classes
        images = x.clamp(0, 1).to(obs.dtype)
        return Reconstruction(images, c, torch.nan, notes=notes)
