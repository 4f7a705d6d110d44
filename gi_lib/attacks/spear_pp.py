"""SPEAR++ (Bakarsky, Dimitrov, Baader, Vechev, 2025, arXiv:2510.24200).

The number of SPEAR's draws doubles with each image. But G^T = L Q, with known L [m, B]
and sparse rows of G, is a problem with a name, complete dictionary learning: find the
directions q in which L q is sparse. With U, an orthonormal basis of L's columns,

    minimise |U q|_1 over |q| = 1

from many starts; a local minimum is a column as a rule. Each step is a linear system,
q <- H^-1 q with H = U^T diag(w) U, where the weights w = 1 / sqrt((U q)^2 + mu^2) make
the square an absolute value, and mu falls. What then has at least tau m zeros is kept.
The choice, the scale and both certificates are SPEAR's, by its functions.

From the second round on each start runs a second time, projected in each step to the
complement of the columns chosen so far, of which none is then a fixed point; once
there are B of them with lambda < 1, of a random half. The rows where L q is smallest,
2 B of them, give the null vector.

Needs what SPEAR does, and neurons in a number that grows with B. Departs from the
paper: we know its abstract alone, so that the solver and the projected starts are ours;
that it stands noise and local steps is not attempted.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gi_lib import labels
from gi_lib.attacks.spear import (
    Mixture,
    chosen,
    dense_before_relu,
    images_of,
    incomplete,
    independent,
    mixture,
    sparsest,
)
from gi_lib.types import (
    Needs,
    Observation,
    Reconstruction,
    function,
    real,
    whole,
)

MU = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
"""The smoothing mu, relative to the root mean square of U q."""


def reweighted(U: Tensor, q: Tensor, P: Tensor, steps: int) -> Tensor:
    """From each start q [N, B] a local minimum of |U q|_1; P [B, B] projects steps."""
    m = len(U)
    q = q @ P
    for mu in MU:
        for _ in range(steps):
            q = q / q.norm(dim=1, keepdim=True)
            w = (m * (q @ U.T).square() + mu**2).rsqrt()  # [N, m]
            H = (U.T * w[:, None]) @ U  # [N, B, B]
            q = torch.linalg.solve(H, q @ P)
    return q


@dataclass(frozen=True)
class SPEARpp:
    needs: ClassVar[Needs] = Needs(model=(dense_before_relu,))
    revision: ClassVar[int] = 1

    rounds: int = 20  # at most
    starts: int = 40  # a round
    steps_a_mu: int = 10
    tau: float = 0.34
    complete: bool = True  # whether starts are projected too
    label_rule: labels.LabelRule = labels.infer

    def __post_init__(self):
        whole(self, "rounds", "starts", "steps_a_mu")
        real(self, "tau", above=0)
        function(self, "label_rule")

    def at_most(self, obs: Observation) -> int:
        """The rank of the gradient, which two equal images lower."""
        return mixture(obs).rank if obs.batch_size is None else obs.batch_size

    def more(self, seen: Mixture, q: Tensor, rng: torch.Generator) -> Tensor:
        """Candidates [K, B]: those known, those from new starts, those made sparser."""
        U, T = torch.linalg.qr(seen.L)  # L q = U T q
        start = U[torch.randperm(len(U), generator=rng)[: self.starts]]
        eye = torch.eye(seen.rank, dtype=U.dtype)
        tries = [reweighted(U, start, eye, self.steps_a_mu)]
        known = q[independent(q)] @ T.T
        if self.complete and len(known):
            if len(known) == seen.rank:  # one of them may be wrong
                known = known[torch.randperm(seen.rank, generator=rng)[::2]]
            basis = torch.linalg.qr(known.T).Q
            tries += [reweighted(U, start, eye - basis @ basis.T, self.steps_a_mu)]
        small = (torch.cat(tries) @ U.T).abs().argsort(1)[:, : 2 * seen.rank]
        new = torch.linalg.svd(seen.L[small]).Vh[:, -1]
        return sparsest(seen, torch.cat([q, new]), self.tau)

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        seen = mixture(obs)
        q, rounds = seen.L[:0], 0
        found: tuple[Tensor, float] | None = None
        while rounds < self.rounds and (found is None or found[1] < 1):
            rounds += 1
            q = self.more(seen, q, rng)
            found = chosen(seen, q) or found
        if found is None:
            spent = f"{rounds} rounds of {self.starts} starts"
            raise incomplete(len(independent(q)), seen.rank, spent)
        rec = images_of(obs, seen, found, self.label_rule)
        return dataclasses.replace(rec, notes=rec.notes | {"rounds": rounds})
