"""The one loop that every iterative attack runs, its optimisers, and the choice among restarts.

Restarts are stacked: every variable has a leading axis R, the loss returns [R], and rows never mix.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gi_lib.execution import Evaluator, Replayed
from gi_lib.types import Rows

Evaluate = Callable[[Tensor | slice], tuple[Rows, list[Tensor]]]
"""Rows (an index) -> their losses [r] and the gradients of those with respect to each variable [r, ...]."""


@dataclass(frozen=True)
class Method:
    """An optimiser at work on some variables.

    Args:
        step: moves the variables in place; returns the losses [R] before it, and whether no row can move on.
        between: called after each step, for what belongs on the host.
        capturable: whether `step` evaluates every row once and waits for no result, so that a GPU can replay it.
    """

    step: Callable[[Evaluate], tuple[Rows, bool]]
    between: Callable[[], None] = lambda: None
    capturable: bool = False


Optimiser = Callable[[list[Tensor], int], Method]
"""(variables, number of steps) -> Method."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where `minimise` ended.

    Args:
        variables: each [R, ...].
        trace: [steps, R], losses before each step.
        losses: [R], at the end, by which restarts are compared.
        frames: the variables at `frame_steps`, on the CPU.
        evaluations: losses computed, one for each row.
    """

    variables: list[Tensor]
    trace: Float[Tensor, "steps R"]
    losses: Rows
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
    rank: Callable[..., Rows] | None = None,
    constants: Sequence[Tensor] = (),
    frames: int = 0,
    at_once: int | None = None,
) -> Minimum:
    """Minimise each row of a stacked loss.

    Args:
        loss: (*variables, *constants, each [r, ...]) -> [r], for any r rows; row i depends on row i alone.
        start: variables [R, ...]; not changed.
        optimiser: `adam(...)` or `lbfgs(...)`.
        steps: upper bound; the loop ends early when no row can move on.
        project: (*variables), called after each step to make them feasible in place.
        rank: as `loss`; its values at the end are the `losses` of the result. None takes `loss`.
        constants: [R, ...], which of every row stay as they are.
        frames: snapshots to keep, closer together at the beginning; 0 keeps none.
        at_once: rows in one call of the loss (`Observation.at_once`); None takes all.

    Raises:
        ValueError: there is no restart or no step to run.
    """
    if len(start[0]) < 1 or steps < 1:
        raise ValueError(f"nothing to minimise: restarts={len(start[0])}, steps={steps}; both must be at least 1")
    variables = [v.detach().clone(memory_format=torch.contiguous_format) for v in start]
    evaluate = Evaluator(loss, variables, constants, at_once or len(variables[0]))
    method = optimiser(variables, steps)
    wanted = set(np.unique(np.geomspace(1, steps, frames).astype(int) - 1).tolist()) if frames else set()
    trace, kept, kept_steps = [], [], []
    settled = False

    def iterate() -> Rows:
        nonlocal settled
        losses, settled = method.step(evaluate)
        if project:
            project(*variables)
        return losses

    def keep(k: int) -> None:
        kept.append([v.detach().cpu().clone() for v in variables])
        kept_steps.append(k)

    advance = Replayed(iterate) if method.capturable and variables[0].is_cuda else iterate
    # only this path of scaled dot-product attention has a second derivative
    with contextlib.closing(evaluate), sdpa_kernel(SDPBackend.MATH):
        for k in tqdm(range(steps), desc="steps", leave=False, disable=None):
            if k in wanted:
                keep(k)
            trace.append(advance())
            method.between()
            if settled:
                break
        evaluations = len(trace) * len(variables[0]) if method.capturable else evaluate.evaluations
        losses = evaluate.losses(rank or loss)
    if frames:
        keep(len(trace))
    return Minimum(variables, torch.stack(trace), losses, kept, kept_steps, evaluations + len(losses))


def adam(lr: float, *, signed: bool = False, drops: Sequence[float] = ()) -> Optimiser:
    """Adam (Kingma, Ba, ICLR 2015, algorithm 1), element by element, so that stacked rows stay independent.

    Written out, since on a small network torch.optim.Adam spends a tenth of the iteration in its Python code.

    Args:
        lr: step size in the units of the variables.
        signed: whether only the sign of the gradient enters.
        drops: fractions of the steps after which lr is cut by ten.
    """

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def begin(variables: list[Tensor], steps: int) -> Method:
        m, v = ([torch.zeros_like(x) for x in variables] for _ in range(2))
        # lr_k m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps) = m / (offset + scale sqrt(v)), on the device
        offset, scale = (torch.empty((), dtype=variables[0].dtype, device=variables[0].device) for _ in range(2))
        cuts = [int(steps * d) for d in drops]
        k = 0

        def prepare() -> None:
            nonlocal k
            rate = lr * 0.1 ** sum(k >= cut for cut in cuts) / (1 - beta1 ** (k + 1))
            offset.fill_(eps / rate)
            scale.fill_((1 - beta2 ** (k + 1)) ** -0.5 / rate)
            k += 1

        def step(evaluate: Evaluate) -> tuple[Rows, bool]:
            losses, gradients = evaluate(slice(None))
            for x, g, m_x, v_x in zip(variables, gradients, m, v, strict=True):
                g = g.sign() if signed else g
                m_x.lerp_(g, 1 - beta1)
                v_x.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                x.addcdiv_(m_x, torch.addcmul(offset, scale, v_x.sqrt()), value=-1)
            return losses, False

        prepare()
        return Method(step, prepare, capturable=True)

    return begin


def lbfgs(lr: float = 1.0, *, max_iter: int = 20, history: int = 100) -> Optimiser:
    """L-BFGS on every row at once, as torch.optim.LBFGS runs on one: same steps, same stopping rules.

    One step is up to `max_iter` iterations of step length `lr` without a line search; the memory of the last
    `history` pairs goes on from step to step. A row whose loss is no longer finite stops where it last was.
    The direction comes from the compact form of Byrd, Nocedal and Schnabel (Math. Programming, 1994,
    theorem 2.2), so that a row costs a few matrix products and no loop over the history.
    """

    def begin(variables: list[Tensor], steps: int) -> Method:
        return Method(_LBFGS(variables, lr, max_iter, history).step)

    return begin


class _LBFGS:
    """State of the stacked L-BFGS: x, gradient g, direction d, and the pairs (s, y) of each row.

    The vectors lie in slots, `memory` [R, 2m, N], where a new pair takes the place of the oldest. The small matrices
    S^T Y and Y^T Y [R, m, m] are kept in the order of age, the newest pair last; a row that has fewer pairs
    has zeros before its oldest.
    """

    TOLERANCE_GRAD, TOLERANCE_CHANGE, TOLERANCE_CURVATURE = 1e-7, 1e-9, 1e-10  # torch.optim.LBFGS's own

    def __init__(self, variables: list[Tensor], lr: float, max_iter: int, history: int):
        self.variables, self.lr, self.max_iter, self.m = variables, lr, max_iter, history
        x = _join(variables)
        rows, n = x.shape
        self.iterations = x.new_zeros(rows, dtype=torch.long)
        self.pairs = x.new_zeros(rows, dtype=torch.long)
        self.directions = 0  # how often a direction was computed: no row has more pairs
        self.d, self.t = torch.zeros_like(x), x.new_zeros(rows, 1)
        self.g, self.loss = torch.zeros_like(x), x.new_zeros(rows)
        self.gamma = x.new_ones(rows, 1)
        self.memory = x.new_zeros(rows, 2, history, n)  # slots of S, and of Y
        self.sy = x.new_zeros(rows, history, history, dtype=torch.float64)  # s_i . y_j
        self.yy = x.new_zeros(rows, history, history, dtype=torch.float64)  # y_i . y_j
        self.settled = x.new_zeros(rows, dtype=torch.bool)

    def step(self, evaluate: Evaluate) -> tuple[Rows, bool]:
        loss, g = self._evaluate(evaluate, ~self.settled, self.loss, self.g)
        finite = loss.isfinite() & g.isfinite().all(1)
        astray = ~finite & ~self.settled & (self.iterations > 0)  # by the last move of the step before
        self._move(astray, -1)
        before = loss = torch.where(astray, self.loss, loss)
        self.settled |= ~finite | (g.abs().amax(1) <= self.TOLERANCE_GRAD)
        self.loss = torch.where(self.settled, loss, self.loss)
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

        Only the k newest of the m ages can hold a pair yet. The memory is far larger than all the rest together:
        it is read twice, and written in one slot.
        """
        first = (self.iterations == 0).unsqueeze(1)
        s, y = self.d * self.t, g - self.g
        curvature = (s * y).sum(1, keepdim=True)
        accept = active.unsqueeze(1) & ~first & (curvature > self.TOLERANCE_CURVATURE)
        r, m = torch.arange(len(g), device=g.device), self.m
        k = min(self.directions, m)
        self.directions += 1
        slot = self.pairs % m
        self.memory[r, :, slot] = torch.where(accept.unsqueeze(2), torch.stack([s, y], 1), self.memory[r, :, slot])
        self.pairs += accept.squeeze(1)
        self.gamma = torch.where(accept, curvature / y.square().sum(1, keepdim=True), self.gamma)
        Hg = self.gamma * g
        if k:
            age = (self.pairs.unsqueeze(1) - k + torch.arange(k, device=g.device)) % k  # slots, the oldest pair first
            pairs = self.memory[:, :, :k].flatten(1, 2)
            products = (torch.stack([s, y, g], 1) @ pairs.mT).unflatten(2, (2, k))
            products = products.gather(3, age[:, None, None].expand(-1, 3, 2, -1)).double()
            (_, sY), (yS, yY), (p, q) = (vector.unbind(1) for vector in products.unbind(1))
            sy, yy = self.sy[:, -k:, -k:], self.yy[:, -k:, -k:]
            for matrix, newest_row, newest_column in ((sy, sY, yS), (yy, yY, yY)):
                moved = torch.nn.functional.pad(matrix[:, 1:, 1:], (0, 1, 0, 1))
                moved[:, -1], moved[:, :, -1] = newest_row, newest_column
                torch.where(accept.unsqueeze(2), moved, matrix, out=matrix)
            empty = torch.arange(k, device=g.device) < k - self.pairs.unsqueeze(1)
            U = sy.triu() + torch.diag_embed(empty.double())  # s_i . y_j for i <= j
            c = self.gamma.double()
            u = torch.linalg.solve_triangular(U, p.unsqueeze(2), upper=True)
            w = sy.diagonal(dim1=1, dim2=2).unsqueeze(2) * u + c.unsqueeze(2) * (yy @ u) - (c * q).unsqueeze(2)
            v = torch.linalg.solve_triangular(U.mT, w, upper=False)
            weights = torch.stack([v.squeeze(2), -c * u.squeeze(2)], 1)
            weights = torch.empty_like(weights).scatter_(2, age[:, None].expand(-1, 2, -1), weights)
            Hg += (weights.to(g.dtype).flatten(1).unsqueeze(1) @ pairs).squeeze(1)

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
