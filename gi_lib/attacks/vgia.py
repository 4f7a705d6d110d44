"""VGIA (Diana, Xu, Nusser, Neglia, 2026, 2604.15063): "No more guessing".

The thresholds of parallel ReLU neurons cut the images into slabs, as an imprint's bins
do. A test on the gradient alone says of a slab whether it holds exactly one record;
that one is then read off.

Of every threshold q_s there are m neurons here, one a family f, all with the row h.
Neurons of a family act alike on the network behind, and families act differently. With
d_if how the loss moves with a neuron of family f for image i, the differences of
neighbours in each family are the rows of

    G_s = sum over i in slab s of d_i [x_i, 1]^T,    d_i = (d_i1, ..., d_im),

an m x (n + 1) matrix whose rank is the number of records in the slab, up to m, as long
as no two of the d_i are parallel and no two of the x_i equal. So with singular values
s_1 >= s_2 the slab holds one record if

    s_2(G_s) <= tol_s,    s_1(G_s) >= 1000 tol_s,    u not parallel to (1, ..., 1),

tol_s the rounding of the rows that were subtracted, u and v the first singular vectors.
The record is x = v / v_(n+1). The second condition holds its error under about a
thousandth. The third is for clients of several steps: a step moves the next layer's
columns of two neighbours apart, in all families by the same, so that images above both
come into G_s with d_i || (1, ..., 1). Of slabs that do not pass nothing is returned.

What the test cannot see: a record and its copy, which are one record to it; and images
that the network behind treats in the same proportion, d_i || d_j. So neurons act with
the mean over slabs, which leaves the network's own neurons a say in what d_i is, and a
next layer of two units is refused: if they are logits, all d_i are parallel.

Derived here from the abstract, which was read, and reports of the paper, which say that
a subspace's dimension is tested while the server moves thresholds over several rounds;
the paper's own test was not read. Departs from it: one round and m families in place of
several rounds; thresholds are quantiles of data of the server's own, of mean
brightness; the next layer's weights change too. A model that does not begin with a
dense layer and a ReLU gets a front (models.planted).
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.attacks.robbing_the_fed import brightness, edges
from gi_lib.attacks.trap_weights import unnormalised
from gi_lib.models.planted import (
    act_alike,
    check_alike,
    own_images,
    plant_rows,
    planted_gradient,
    planted_rows,
    rows_of_its_own,
)
from gi_lib.search import certified, no_more
from gi_lib.types import (
    Auxiliary,
    Classifier,
    Needs,
    NotApplicableError,
    Observation,
    Reconstruction,
    whole,
)

ROUNDING = 16.0
"""tol_s, in units of the rounding of one number as large as the rows subtracted."""
RESOLVED = 1000.0
"""How far the first singular value must stand above that."""
APART = 0.01
"""The part of the unit vector u that must be across (1, ..., 1)."""


@dataclass(frozen=True, eq=False)
class Slabs:
    """single [k]: certified to hold one record; lit [k]; records [k, n]."""

    single: Tensor
    lit: Tensor
    records: Tensor


def slabs(rows: Tensor) -> Slabs:
    """The test, on gradients [k, m, n + 1] of m families at k thresholds, bias last."""
    G = (rows - torch.cat([rows[1:], torch.zeros_like(rows[:1])])).double()
    tol = ROUNDING * torch.finfo(rows.dtype).eps * rows.double().flatten(1).norm(dim=1)
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    u, v = U[:, :, 0], V[:, 0]
    apart = (u - u.mean(1, keepdim=True)).norm(dim=1) > APART
    lit = s[:, 0] > tol
    single = lit & (s[:, 1] <= tol) & (s[:, 0] >= RESOLVED * tol) & apart
    return Slabs(single, lit, (v[:, :-1] / v[:, -1:]).to(rows.dtype))


@dataclass(frozen=True)
class VGIA:
    needs: ClassVar[Needs] = Needs(("trapdoor",))
    revision: ClassVar[int] = 1

    slabs: int = 500  # k, ours: 1,000 rows, as trap weights have
    families: int = 2  # m
    surrogates: int = 2000  # images from which the quantiles are read

    def __post_init__(self):
        whole(self, "slabs", "families", "surrogates", least=2)

    def plant(
        self,
        model: Classifier,
        image_shape: tuple[int, int, int],
        auxiliary: Auxiliary | None,
        rng: torch.Generator,
    ) -> tuple[Classifier, str]:
        """The model with slabs, and the name of the layer whose neurons bound them."""
        use = "VGIA's thresholds are quantiles of"
        images, _ = own_images(auxiliary, self.surrogates, rng, use)
        room = rows_of_its_own(model, image_shape)
        k = self.slabs if room is None else self._slabs(room)
        if k < 2:
            raise NotApplicableError(
                f"two slabs of {self.families} families need {2 * self.families} rows,"
                f" and the first layer has {room}; take fewer families, or use"
                " RobbingTheFed"
            )
        images = images.double().flatten(1)
        h = brightness(images.shape[1], rng)
        q = edges(images @ h, k)[:-1].repeat_interleave(self.families)
        W, b = unnormalised(model, h.repeat(len(q), 1), -q, image_shape)
        sent, name = plant_rows(model, image_shape, W, b, rng)
        family = torch.arange(len(q)) % self.families
        if (units := act_alike(sent, name, image_shape, family, 1 / k)) < 3:
            raise NotApplicableError(
                f"behind the slabs is a layer of {units} units, so that all images act"
                " on the families in the same proportion and every slab would pass the"
                " test; use RobbingTheFed"
            )
        return sent, name

    def _slabs(self, rows: int) -> int:
        """As many as so many rows can bound."""
        return min(self.slabs, rows // self.families)

    def at_most(self, obs: Observation) -> int:
        """A slab gives one image, and no more are certified than there are images."""
        return no_more(obs, self.slabs)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        dW, db = planted_gradient(obs)
        k, m = self._slabs(len(db)), self.families
        check_alike(planted_rows(obs)[0][: k * m], obs.trapdoor)
        found = slabs(torch.cat([dW, db[:, None]], 1)[: k * m].reshape(k, m, -1))
        z = found.records[found.single][: self.at_most(obs)]
        x = obs.model.mean + obs.model.std * z.reshape(-1, *obs.image_shape)
        rec = certified(obs, x.clamp(0, 1), labels.infer)
        facts = {"slabs": k, "lit": int(found.lit.sum()), "single": len(x)}
        return dataclasses.replace(rec, notes=rec.notes | facts)
