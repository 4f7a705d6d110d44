"""The one loop that every iterative attack runs, its optimisers, and the choice among restarts.

Restarts are stacked: every variable has a leading axis R, the loss returns [R], and rows never mix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from gi_lib.types import Rows

Evaluate = Callable[[Tensor | slice], tuple[Rows, list[Tensor]]]
"""Rows (an index) -> their losses [r] and the gradients of those with respect to each variable [r, ...]."""

Step = Callable[[Evaluate], tuple[Rows, bool]]
"""One step: moves the variables in place; returns the losses [R] before it, and whether no row can move on."""

Optimiser = Callable[[list[Tensor], int], Step]
"""(variables, number of steps) -> Step."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where `minimise` ended.

    Args:
        variables: each [R, ...].
        trace: [steps, R], losses before each step.
        frames: the variables at `frame_steps`, on the CPU.
        evaluations: loss gradients computed, one for each row.
    """

    variables: list[Tensor]
    trace: Float[Tensor, "steps R"]
    frames: list[list[Tensor]] = field(default_factory=list)
    frame_steps: list[int] = field(default_factory=list)
    evaluations: int = 0


def minimise(
    loss: Callable[..., Rows],
    start: Sequence[Tensor],
    *,
    optimiser: Optimiser,
    steps: int,
    project: Callable[..., None] | None = None,
    frames: int = 0,
) -> Minimum:
    """Minimise each row of a stacked loss.

    Args:
        loss: (*variables, each [r, ...]) -> [r], for any number r of rows; row i depends on row i alone.
        start: variables [R, ...]; not changed.
        optimiser: `adam(...)` or `lbfgs(...)`.
        steps: upper bound; the loop ends early when no row can move on.
        project: (*variables), called after each step to make them feasible in place.
        frames: snapshots to keep, closer together at the beginning; 0 keeps none.

    Raises:
        ValueError: there is no restart or no step to run.
    """
    if len(start[0]) < 1 or steps < 1:
        raise ValueError(f"nothing to minimise: restarts={len(start[0])}, steps={steps}; both must be at least 1")
    variables = [v.detach().clone(memory_format=torch.contiguous_format) for v in start]
    evaluations = 0

    def evaluate(rows: Tensor | slice) -> tuple[Rows, list[Tensor]]:
        nonlocal evaluations
        chosen = [v[rows].detach().requires_grad_() for v in variables]
        losses = loss(*chosen)
        evaluations += len(losses)
        return losses.detach(), list(torch.autograd.grad(losses.sum(), chosen))

    step = optimiser(variables, steps)
    wanted = set(np.unique(np.geomspace(1, steps, frames).astype(int) - 1).tolist()) if frames else set()
    trace, kept, kept_steps = [], [], []

    def keep(k: int) -> None:
        kept.append([v.detach().cpu().clone() for v in variables])
        kept_steps.append(k)

    for k in tqdm(range(steps), desc="steps", leave=False, disable=None):
        if k in wanted:
            keep(k)
        losses, settled = step(evaluate)
        if project:
            project(*variables)
        trace.append(losses)
        if settled:
            break
    if frames:
        keep(len(trace))
    return Minimum(variables, torch.stack(trace), kept, kept_steps, evaluations)


def adam(lr: float, *, signed: bool = False, drops: Sequence[float] = ()) -> Optimiser:
    """Adam (Kingma, Ba, ICLR 2015), element by element, so that stacked rows stay independent.

    Args:
        lr: step size in the units of the variables.
        signed: whether only the sign of the gradient enters.
        drops: fractions of the steps after which lr is cut by ten.
    """

    def begin(variables: list[Tensor], steps: int) -> Step:
        optimiser = torch.optim.Adam(variables, lr=lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(steps * d) for d in drops], gamma=0.1)

        def step(evaluate: Evaluate) -> tuple[Rows, bool]:
            losses, gradients = evaluate(slice(None))
            for v, g in zip(variables, gradients, strict=True):
                v.grad = g.sign() if signed else g
            optimiser.step()
            schedule.step()
            return losses, False

        return step

    return begin


def lbfgs(lr: float = 1.0, *, max_iter: int = 20, history: int = 100) -> Optimiser:
    """L-BFGS on every row at once, as torch.optim.LBFGS runs on one: same steps, same stopping rules.

    One step is up to `max_iter` iterations of step length `lr` without a line search; the memory of the last
    `history` pairs goes on from step to step. A row whose loss is no longer finite stops where it last was.
    The direction comes from the compact form of Byrd, Nocedal and Schnabel (Math. Programming, 1994,
    theorem 2.2), so that a row costs a few matrix products and no loop over the history.
    """

    def begin(variables: list[Tensor], steps: int) -> Step:
        return _LBFGS(variables, lr, max_iter, history).step

    return begin


class _LBFGS:
    """State of the stacked L-BFGS: x, gradient g, direction d, pairs S and Y in slots [R, m, N]."""

    TOLERANCE_GRAD, TOLERANCE_CHANGE, TOLERANCE_CURVATURE = 1e-7, 1e-9, 1e-10  # torch.optim.LBFGS's own

    def __init__(self, variables: list[Tensor], lr: float, max_iter: int, history: int):
        self.variables, self.lr, self.max_iter, self.m = variables, lr, max_iter, history
        x = _join(variables)
        rows, n = x.shape
        self.iterations = x.new_zeros(rows, dtype=torch.long)
        self.pairs = x.new_zeros(rows, dtype=torch.long)
        self.d, self.t = torch.zeros_like(x), x.new_zeros(rows, 1)
        self.g, self.loss = torch.zeros_like(x), x.new_zeros(rows)
        self.gamma = x.new_ones(rows, 1)
        self.memory = x.new_zeros(rows, 2 * history, n)  # slots of S, then slots of Y
        self.sy = x.new_zeros(rows, history, history, dtype=torch.float64)  # s_i . y_j
        self.yy = x.new_zeros(rows, history, history, dtype=torch.float64)  # y_i . y_j
        self.settled = x.new_zeros(rows, dtype=torch.bool)

    def step(self, evaluate: Evaluate) -> tuple[Rows, bool]:
        loss, g = self._evaluate(evaluate, ~self.settled, self.loss, self.g)
        before = loss
        finite = loss.isfinite() & g.isfinite().all(1)
        self.settled |= ~finite | (g.abs().amax(1) <= self.TOLERANCE_GRAD)
        active = ~self.settled
        for n in range(1, self.max_iter + 1):
            if not active.any():
                break
            self._direct(active, g, loss)
            downhill = (self.g * self.d).sum(1) <= -self.TOLERANCE_CHANGE
            self.settled |= active & ~downhill
            active &= downhill
            self._move(active, +1)
            if n == self.max_iter or not active.any():
                break
            loss, g = self._evaluate(evaluate, active, loss, g)
            finite = loss.isfinite() & g.isfinite().all(1)
            self._move(active & ~finite, -1)
            self.settled |= active & ~finite
            active &= finite
            active &= g.abs().amax(1) > self.TOLERANCE_GRAD
            active &= (self.t * self.d).abs().amax(1) > self.TOLERANCE_CHANGE
            active &= (loss - self.loss).abs() >= self.TOLERANCE_CHANGE
        return before, bool(self.settled.all())

    @staticmethod
    def _evaluate(evaluate: Evaluate, active: Tensor, loss: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and gradients of the active rows, and for the others what they had; no more rows are computed."""
        if active.all():
            losses, gradients = evaluate(slice(None))
            return losses, _join(gradients)
        rows, loss, g = active.nonzero().squeeze(1), loss.clone(), g.clone()
        losses, gradients = evaluate(rows)
        loss[rows], g[rows] = losses, _join(gradients)
        return loss, g

    def _direct(self, active: Tensor, g: Tensor, loss: Tensor) -> None:
        """Take the pair (s, y) of the last move into the memory, and set the direction d = -H g and length t.

        The memory is far larger than everything else, so that it is read for all rows and written in one slot.
        """
        first = (self.iterations == 0).unsqueeze(1)
        s, y = self.d * self.t, g - self.g
        curvature = (s * y).sum(1, keepdim=True)
        accept = active.unsqueeze(1) & ~first & (curvature > self.TOLERANCE_CURVATURE)
        r, m = torch.arange(len(g), device=g.device), self.m
        slot = self.pairs % m
        self.memory[r, slot] = torch.where(accept, s, self.memory[r, slot])
        self.memory[r, m + slot] = torch.where(accept, y, self.memory[r, m + slot])
        products = (torch.stack([s, y, g], dim=1) @ self.memory.mT).double()  # [R, 3, 2m]
        (_, Sy, Sg), (Ys, Yy, Yg) = products[..., :m].unbind(1), products[..., m:].unbind(1)
        self.sy[r, slot] = torch.where(accept, Ys, self.sy[r, slot])
        self.sy[r, :, slot] = torch.where(accept, Sy, self.sy[r, :, slot])
        self.yy[r, slot] = torch.where(accept, Yy, self.yy[r, slot])
        self.yy[r, :, slot] = torch.where(accept, Yy, self.yy[r, :, slot])
        self.pairs += accept.squeeze(1)
        self.gamma = torch.where(accept, curvature / y.square().sum(1, keepdim=True), self.gamma)

        # slots from the oldest pair to the newest; empty slots come last and get a one on the diagonal
        age = (torch.where(self.pairs > m, self.pairs, 0).unsqueeze(1) + torch.arange(m, device=g.device)) % m
        empty = age >= self.pairs.clamp(max=m).unsqueeze(1)
        by_age = r[:, None, None], age[:, :, None], age[:, None, :]
        sy, yy = self.sy[by_age], self.yy[by_age]
        U = sy.triu() + torch.diag_embed(empty.double())  # s_i . y_j for i <= j
        p, q, c = Sg.gather(1, age), Yg.gather(1, age), self.gamma.double()
        u = torch.linalg.solve_triangular(U, p.unsqueeze(2), upper=True)
        w = sy.diagonal(dim1=1, dim2=2).unsqueeze(2) * u + c.unsqueeze(2) * (yy @ u) - (c * q).unsqueeze(2)
        v = torch.linalg.solve_triangular(U.mT, w, upper=False)
        by_slot = [torch.zeros_like(p).scatter(1, age, part) for part in (v.squeeze(2), -c * u.squeeze(2))]
        weights = torch.cat(by_slot, dim=1)
        Hg = self.gamma * g + (weights.to(g.dtype).unsqueeze(1) @ self.memory).squeeze(1)

        row = active.unsqueeze(1)
        length = torch.where(first, (1 / g.abs().sum(1, keepdim=True)).clamp(max=1) * self.lr, self.lr)
        self.d, self.g = torch.where(row, -Hg, self.d), torch.where(row, g, self.g)
        self.t, self.loss = torch.where(row, length, self.t), torch.where(active, loss, self.loss)
        self.iterations += active

    def _move(self, rows: Tensor, sign: int) -> None:
        step = torch.where(rows.unsqueeze(1), sign * self.t * self.d, 0)
        sizes = [v[0].numel() for v in self.variables]
        for v, part in zip(self.variables, step.split(sizes, dim=1), strict=True):
            v += part.view_as(v)


def _join(tensors: Sequence[Tensor]) -> Float[Tensor, "R N"]:
    return torch.cat([t.flatten(1) for t in tensors], dim=1)


def best_of(losses: Rows) -> int:
    """The restart with the smallest loss, which is all that an attacker can go by; NaN counts as +inf.

    Raises:
        FloatingPointError: no loss is finite.
    """
    losses = torch.where(losses.isnan(), torch.inf, losses)
    if not losses.isfinite().any():
        raise FloatingPointError("no restart ended with a finite loss; lower lr, or start from other seeds")
    return int(losses.argmin())
