"""The one loop that every iterative attack runs, and its optimisers.

Restarts are rows: every variable has a leading axis R, the loss is that of one guess, and rows never mix.
"""

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib.execution import Evaluator, OneGuess, Replayed, clock, second_derivatives
from gi_lib.progress import bar
from gi_lib.types import Rows

revision = 1
"""Of the solvers and the loop: raised when their results change, so that all cases run again."""

Evaluate = Callable[[Tensor | slice], tuple[Rows, list[Tensor]]]
"""Rows (an index) -> their losses [r] and the gradients of those with respect to each variable [r, ...]."""

Each = Callable[[int, list[Tensor], dict[str, list[Tensor]]], None]
"""(step k, the variables [R, ...], the optimiser's memory of them by name), all changed in place."""


@dataclass(frozen=True)
class Method:
    """An optimiser at work on some variables.

    Args:
        step: moves the variables in place; returns the losses [R] before it, and whether no row can move on.
        between: called after each step, for what belongs on the host.
        capturable: whether `step` evaluates every row once and waits for no result, so that a GPU can replay it.
        memory: what it remembers of each variable, [R, ...], by name.
        pairs: whether it compares gradients of one and the same loss at points that it chose itself.
        failed: [R], NaN for a row that has met a loss or a gradient that is not finite, else 0.
    """

    step: Callable[[Evaluate], tuple[Rows, bool]]
    between: Callable[[], None] = lambda: None
    capturable: bool = False
    memory: dict[str, list[Tensor]] = field(default_factory=dict)
    pairs: bool = False
    failed: Tensor | None = None


Optimiser = Callable[[list[Tensor], int], Method]
"""(variables, number of steps) -> Method."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where `minimise` ended.

    Args:
        variables: each [R, ...].
        trace: [steps, R], losses before each step.
        losses: [R], at the end, by which restarts are compared; NaN for a row that failed.
        frames: at each of `frame_steps` the images of all rows [R, ...], on the CPU.
        frame_steps, frame_evaluations, frame_seconds: when that was.
        evaluations: losses computed, one for each row.
        seconds: by `execution.clock`.
    """

    variables: list[Tensor]
    trace: Float[Tensor, "steps R"]
    losses: Rows
    frames: list[Tensor] = field(default_factory=list)
    frame_steps: list[int] = field(default_factory=list)
    frame_evaluations: list[int] = field(default_factory=list)
    frame_seconds: list[float] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0


def minimise(
    loss: OneGuess,
    start: Sequence[Tensor] | Minimum,
    *,
    optimiser: Optimiser,
    steps: int,
    project: Callable[..., None] | None = None,
    each: Each | None = None,
    rank: OneGuess | None = None,
    best: bool = False,
    image: OneGuess | None = None,
    frames: int = 0,
    at_once: int | None = None,
) -> Minimum:
    """Minimise the loss of one guess from each of R starts.

    Args:
        loss: (*variables of one row) -> a scalar. If it has a parameter `now`, it is given k / steps at step k, a
            scalar on the device: a schedule made of it by torch.where is replayed in a CUDA graph too.
        start: variables [R, ...], not changed; or where an earlier stage ended, whose report this one continues.
        optimiser: `adam(...)` or `lbfgs(...)`.
        steps: upper bound; the loop ends early when no row can move on.
        project: (*variables [R, ...]), called after each step to make them feasible in place.
        each: called on the host after each step, before `project`, always with all rows: where rows meet (a
            consensus that stays fixed within a step), and noise is added, drawn from one generator a row.
        rank: as `loss`; its values at the end are the `losses` of the result. None takes `loss`.
        best: whether each row ends at the iterate of its smallest loss, instead of its last.
        image: (*variables of one row) -> what a frame keeps; None takes the first variable.
        frames: snapshots to keep, the last at the end and closer together at the beginning; 0 keeps none.
        at_once: rows in one call of the loss (execution.at_once); None takes all.

    Raises:
        ValueError: there is no restart or no step to run; or L-BFGS, whose memory compares gradients of one loss
            between its own points, is asked for `now`, `each` or `project`.
    """
    earlier = start if isinstance(start, Minimum) else None
    begin = earlier.variables if earlier else start
    assert not isinstance(begin, Minimum)
    if len(begin[0]) < 1 or steps < 1:
        raise ValueError(f"nothing to minimise: restarts={len(begin[0])}, steps={steps}; both must be at least 1")
    variables = [v.detach().clone(memory_format=torch.contiguous_format) for v in begin]
    rows, device = len(variables[0]), variables[0].device
    now = None
    if "now" in inspect.signature(loss).parameters:
        now = torch.zeros((), dtype=variables[0].dtype, device=device)
        loss = partial(loss, now=now)
    method = optimiser(variables, steps)
    if method.pairs and (now is not None or each or project):
        raise ValueError(
            "L-BFGS compares gradients of one loss between its own points: it takes no `now`, `each` or `project`;"
            " use adam, or write the loss without a schedule"
        )
    evaluate = Evaluator(loss, variables, at_once or rows)
    wanted = set(np.geomspace(1, steps, frames).astype(int).tolist()[:-1]) if frames else set()
    trace: list[Tensor] = []
    kept: list[Tensor] = []
    kept_steps: list[int] = []
    kept_evaluations: list[int] = []
    kept_seconds: list[float] = []
    settled = False
    lowest = torch.full((rows,), torch.inf, dtype=variables[0].dtype, device=device)
    lowest_at = [v.clone() for v in variables] if best else variables

    def iterate() -> Rows:
        nonlocal settled
        before = [v.clone() for v in variables] if best else []
        losses, settled = method.step(evaluate)
        if best:
            remember(losses, before)
        if project and not each:
            project(*variables)
        return losses

    def remember(losses: Rows, there: list[Tensor]) -> None:
        better = losses < lowest
        lowest.copy_(torch.where(better, losses, lowest))
        for old, new in zip(lowest_at, there, strict=True):
            old.copy_(torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old))

    def evaluations() -> int:
        return len(trace) * rows if method.capturable else evaluate.evaluations

    started = clock(device)

    def keep(k: int, images_of: list[Tensor]) -> None:
        with torch.no_grad():
            shown = [image(*(v[r] for v in images_of)) for r in range(rows)] if image else images_of[0].unbind()
        kept.append(torch.stack(list(shown)).cpu().clone())
        kept_steps.append(k)
        kept_evaluations.append(evaluations())
        kept_seconds.append(clock(device) - started)

    advance = Replayed(iterate) if method.capturable and device.type == "cuda" else iterate
    with contextlib.closing(evaluate), second_derivatives(), bar(range(steps), desc="steps", leave=False) as steps_bar:
        said = time.monotonic()
        for k in steps_bar:
            if now is not None:
                now.fill_(k / steps)
            if k + 1 in wanted:
                keep(k, lowest_at if best and k else variables)
            trace.append(advance())
            method.between()
            if each:
                with torch.no_grad():
                    each(k, variables, method.memory)
                    if project:
                        project(*variables)
            if settled or (k % 100 == 99 and method.failed is not None and bool(method.failed.isnan().all())):
                break
            if not steps_bar.disable and time.monotonic() - said > 0.5:
                steps_bar.set_postfix_str(f"loss {trace[-1].min().item():.3g}", refresh=False)
                said = time.monotonic()
        if now is not None:
            now.fill_(1)
        counted = evaluations()
        if best:
            remember(evaluate.losses(loss), variables)
            variables, counted = lowest_at, counted + rows
            evaluate.variables = variables
        losses = evaluate.losses(rank or loss)
        if method.failed is not None:
            losses = losses + method.failed
        counted += len(losses)
    if frames:
        keep(len(trace), variables)
        kept_evaluations[-1] = counted
    found = Minimum(
        variables,
        torch.stack(trace),
        losses,
        kept,
        kept_steps,
        kept_evaluations,
        kept_seconds,
        counted,
        clock(device) - started,
    )
    return _joined(earlier, found) if earlier else found


def _joined(first: Minimum, then: Minimum) -> Minimum:
    """Two stages as one run; a stage with fewer rows than the other has infinite losses in their place."""
    rows = max(first.trace.shape[1], then.trace.shape[1])

    def wide(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, rows - values.shape[-1]), value=torch.inf)

    return Minimum(
        variables=then.variables,
        trace=torch.cat([wide(first.trace), wide(then.trace)]),
        losses=wide(then.losses),
        frames=first.frames + then.frames,
        frame_steps=first.frame_steps + [len(first.trace) + k for k in then.frame_steps],
        frame_evaluations=first.frame_evaluations + [first.evaluations + n for n in then.frame_evaluations],
        frame_seconds=first.frame_seconds + [first.seconds + s for s in then.frame_seconds],
        evaluations=first.evaluations + then.evaluations,
        seconds=first.seconds + then.seconds,
    )


def cosine_decay(now: float) -> float:
    """(1 + cos(pi now)) / 2, from 1 to 0 as `now` goes from 0 to 1."""
    return (1 + math.cos(math.pi * now)) / 2


def adam(
    lr: float,
    *,
    signed: bool = False,
    drops: Sequence[float] = (),
    cosine: bool = False,
    warm_up: int = 0,
    decay: float = 0.0,
    part: tuple[float, float] = (0.0, 1.0),
) -> Optimiser:
    """Adam (Kingma, Ba, ICLR 2015, algorithm 1), element by element, so that stacked rows stay independent.

    Written out, since on a small network torch.optim.Adam spends a tenth of the iteration in its Python code. A row
    whose loss or gradient is not finite has failed, even where later ones are finite again: the sign of NaN is 0.

    Args:
        lr: step size in the units of the variables.
        signed: whether only the sign of the gradient enters.
        drops: fractions of the steps after which lr is cut by ten.
        cosine: whether lr falls to 0 by `cosine_decay`.
        warm_up: steps over which lr rises to its value.
        decay: each step first multiplies the variables by 1 - lr decay: AdamW (Loshchilov, Hutter, ICLR 2019).
        part: which shares of the schedule these steps run between, where it goes on over several stages.
    """

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def begin(variables: list[Tensor], steps: int) -> Method:
        m, v = ([torch.zeros_like(x) for x in variables] for _ in range(2))
        # lr_k m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps) = m / (offset + scale sqrt(v)), on the device
        offset, scale, kept = (torch.empty((), dtype=variables[0].dtype, device=variables[0].device) for _ in range(3))
        failed = torch.zeros(len(variables[0]), dtype=variables[0].dtype, device=variables[0].device)
        first, last = part
        cuts = [int(steps * (d - first) / (last - first)) for d in drops]
        k = 0

        def prepare() -> None:
            nonlocal k
            rate = lr * 0.1 ** sum(k >= cut for cut in cuts) / (1 - beta1 ** (k + 1))
            if cosine:
                rate *= max(1e-6, cosine_decay(first + (last - first) * k / steps))
            rate *= min(1, (k + 1) / (warm_up + 1))
            kept.fill_(1 - rate * (1 - beta1 ** (k + 1)) * decay)
            offset.fill_(eps / rate)
            scale.fill_((1 - beta2 ** (k + 1)) ** -0.5 / rate)
            k += 1

        def step(evaluate: Evaluate) -> tuple[Rows, bool]:
            losses, gradients = evaluate(slice(None))
            sound = losses
            for x, g, m_x, v_x in zip(variables, gradients, m, v, strict=True):
                sound = sound + g.flatten(1).sum(1)
                g = g.sign() if signed else g
                m_x.lerp_(g, 1 - beta1)
                v_x.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                if decay:
                    x.mul_(kept)
                x.addcdiv_(m_x, torch.addcmul(offset, scale, v_x.sqrt()), value=-1)
            failed.add_(sound, alpha=0)
            return losses, False

        prepare()
        return Method(step, prepare, capturable=True, memory={"m": m, "v": v}, failed=failed)

    return begin


Squash = Callable[[Tensor, Tensor], Tensor]
"""(gradient g, now = k / steps) -> what the optimiser sees in its place, element by element."""


def hard_sign(g: Tensor, now: Tensor) -> Tensor:
    """The sign of g: -1, 0 or 1."""
    return g.sign()


def soft_sign(g: Tensor, now: Tensor) -> Tensor:
    """tanh(s g) / s with s = 1 - now: within 1 / s of 0, and g itself at the end (public framework breaching).

    Entries of g much smaller than 1 / s are left as they are.
    """
    s = (1 - now).clamp_min(1e-6)
    return (s * g).tanh() / s


def squashed(optimiser: Optimiser, squash: Squash) -> Optimiser:
    """The optimiser that sees squash(g, now) of each gradient g; what is not finite stays, so that its row fails."""

    def begin(variables: list[Tensor], steps: int) -> Method:
        method, k = optimiser(variables, steps), 0
        now = torch.zeros((), dtype=variables[0].dtype, device=variables[0].device)

        def step(evaluate: Evaluate) -> tuple[Rows, bool]:
            def seen(rows: Tensor | slice) -> tuple[Rows, list[Tensor]]:
                losses, gradients = evaluate(rows)
                return losses, [torch.where(g.isfinite(), squash(g, now), g) for g in gradients]

            return method.step(seen)

        def between() -> None:
            nonlocal k
            method.between()
            k += 1
            now.fill_(k / steps)

        return dataclasses.replace(method, step=step, between=between)

    return begin


def lbfgs(lr: float = 1.0, *, max_iter: int = 20, history: int = 100) -> Optimiser:
    """L-BFGS on every row at once, as torch.optim.LBFGS runs on one: same steps, same stopping rules.

    One step is up to `max_iter` iterations of step length `lr` without a line search; the memory of the last
    `history` pairs goes on from step to step. A row whose loss is no longer finite stops where it last was.
    The direction comes from the compact form of Byrd, Nocedal and Schnabel (Math. Programming, 1994,
    theorem 2.2), so that a row costs a few matrix products and no loop over the history.
    """

    def begin(variables: list[Tensor], steps: int) -> Method:
        return Method(_LBFGS(variables, lr, max_iter, history).step, pairs=True)

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
