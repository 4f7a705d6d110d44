"""The loop and its optimisers against torch's own, row by row."""

import io
import math

import pytest
import torch
from tqdm import tqdm

from gi_lib import optimise
from gi_lib.optimise import Minimum, adam, cosine_decay, hard_sign, lbfgs, minimise, soft_sign, squashed
from gi_lib.search import best_of, generators

RNG = torch.Generator().manual_seed(3)
MATRIX = torch.randn(30, 10, generator=RNG, dtype=torch.float64)
START = torch.randn(5, 10, generator=RNG, dtype=torch.float64)


def rosenbrock(x):
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def convex(x):
    return torch.nn.functional.softplus(x @ MATRIX.T).sum(-1) + 0.5 * x.square().sum(-1)


def torch_lbfgs(loss, start, steps, **settings):
    x = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([x], **settings)

    def closure():
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        return value

    trace = [optimiser.step(closure).item() for _ in range(steps)]
    return x.detach(), trace, optimiser.state[x]["func_evals"]


@pytest.mark.parametrize("history", [3, 100])
@pytest.mark.parametrize(("loss", "lr"), [(rosenbrock, 1e-2), (convex, 0.2)], ids=["rosenbrock", "convex"])
def test_stacked_lbfgs_is_torchs_row_by_row(loss, lr, history):
    found = minimise(loss, [START], optimiser=lbfgs(lr, history=history), steps=8)
    evaluations = 0
    for row, start in enumerate(START):
        x, trace, evals = torch_lbfgs(loss, start, len(found.trace), lr=lr, history_size=history)
        torch.testing.assert_close(found.variables[0][row], x, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.trace[:, row], torch.tensor(trace).double(), rtol=1e-6, atol=1e-6)
        evaluations += evals
    assert found.evaluations <= evaluations + len(START)
    assert found.trace[-1].max() < found.trace[0].min()


def test_lbfgs_moves_several_variables_as_one():
    joint = minimise(convex, [START], optimiser=lbfgs(0.2), steps=4)
    parts = [START[:, :4], START[:, 4:].reshape(5, 2, 3)]
    split = minimise(lambda a, b: convex(torch.cat([a, b.flatten()])), parts, optimiser=lbfgs(0.2), steps=4)
    a, b = split.variables
    torch.testing.assert_close(torch.cat([a, b.flatten(1)], 1), joint.variables[0], rtol=0, atol=1e-9)


def test_a_row_that_blows_up_stops_and_harms_no_other():
    def loss(x):
        return torch.where(x[..., 0] > 50, torch.nan, 1.0) * rosenbrock(x)

    start = torch.stack([START[0], 49.9 * torch.ones(10, dtype=torch.float64)])
    start[1, 1] = 1e4  # its first step leaves the domain
    alone = minimise(loss, [start[:1]], optimiser=lbfgs(1e-2), steps=5)
    both = minimise(loss, [start], optimiser=lbfgs(1e-2), steps=5)
    torch.testing.assert_close(both.variables[0][:1], alone.variables[0])
    assert both.variables[0].isfinite().all() and loss(both.variables[0]).isfinite().all()


@pytest.mark.parametrize("max_iter", [2, 20])
def test_a_row_that_leaves_the_domain_goes_back_to_where_it_last_was(max_iter):
    def loss(x):
        return (torch.where(x < 0, torch.nan, x) ** 3 + 100 * x).sum()

    start = torch.full((1, 1), 3.0, dtype=torch.float64)
    found = minimise(loss, [start], optimiser=lbfgs(0.9, max_iter=max_iter), steps=5)
    assert found.variables[0].item() >= 0 and found.losses.isfinite().all()
    assert found.trace.isfinite().all() and (found.trace.diff(dim=0) <= 0).all()


def test_the_loss_of_a_row_that_has_settled_is_that_of_where_it_is():
    start = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)  # the first is at its minimum
    found = minimise(lambda x: 7 + convex2(x), [start], optimiser=lbfgs(0.1, max_iter=2), steps=4)
    assert (found.trace[:, 0] == 7).all()
    nowhere = minimise(lambda x: x.sum() / 0 * 0, [start], optimiser=lbfgs(), steps=3)
    assert nowhere.trace.isnan().all()


def convex2(x):
    return x.square().sum()


def test_lbfgs_ends_when_every_row_is_settled():
    found = minimise(lambda x: x.square().sum(), [START], optimiser=lbfgs(), steps=50)
    assert len(found.trace) < 10 and found.variables[0].abs().max() < 1e-7


@pytest.mark.parametrize(
    "optimiser", [adam(0.1, signed=True, drops=(0.5,)), squashed(adam(0.1), soft_sign), adam(0.01), lbfgs(0.2)]
)
def test_stacked_restarts_equal_separate_ones(optimiser):
    together = minimise(convex, [START], optimiser=optimiser, steps=6)
    for row in range(len(START)):
        alone = minimise(convex, [START[row : row + 1]], optimiser=optimiser, steps=6)
        torch.testing.assert_close(together.variables[0][row], alone.variables[0][0], rtol=0, atol=1e-9)


def test_signed_adam_is_torchs_on_the_sign_with_the_steps_cut():
    found = minimise(convex, [START], optimiser=adam(0.1, signed=True, drops=(3 / 8, 5 / 8, 7 / 8)), steps=16)
    x = START.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    rates = []
    for k in range(16):
        rates.append(0.1 * 0.1 ** sum(k >= cut for cut in (6, 10, 14)))
        optimiser.param_groups[0]["lr"] = rates[-1]
        (g,) = torch.autograd.grad(convex(x).sum(), [x])
        x.grad = g.sign()
        optimiser.step()
    torch.testing.assert_close(found.variables[0], x.detach())
    assert sorted(set(rates), reverse=True) == pytest.approx([0.1, 0.01, 0.001, 0.0001])


@pytest.mark.parametrize("drops", [(), (0.5,)])
def test_adam_with_decay_is_torchs_adamw(drops):
    found = minimise(convex, [START], optimiser=adam(0.1, decay=0.3, drops=drops), steps=8)
    x = START.clone().requires_grad_()
    optimiser = torch.optim.AdamW([x], lr=0.1, weight_decay=0.3)
    for k in range(8):
        optimiser.param_groups[0]["lr"] = 0.01 if drops and k >= 4 else 0.1
        (x.grad,) = torch.autograd.grad(convex(x).sum(), [x])
        optimiser.step()
    torch.testing.assert_close(found.variables[0], x.detach())


def test_projection_frames_and_counts():
    found = minimise(convex, [START], optimiser=adam(0.5), steps=20, project=lambda x: x.clamp_(-0.1, 0.1), frames=5)
    assert found.variables[0].abs().max() <= 0.1
    assert found.trace.shape == (20, 5) and found.evaluations == 105
    assert found.frame_steps[0] == 0 and found.frame_steps[-1] == 20
    assert len(found.frames) == len(found.frame_steps) <= 5
    torch.testing.assert_close(found.frames[0], START)
    torch.testing.assert_close(found.frames[-1], found.variables[0])
    assert found.frame_evaluations[:2] == [0, 5] and found.frame_evaluations[-1] == 105
    shown = minimise(convex, [START], optimiser=adam(0.5), steps=3, frames=2, image=lambda x: x[:2] + 1)
    torch.testing.assert_close(shown.frames[0], START[:, :2] + 1)


def test_a_schedule_is_told_how_far_the_run_is():
    seen = []

    def loss(x, now):
        seen.append(now.item())
        return ((x - now) ** 2).sum()

    found = minimise(loss, [START[:1]], optimiser=adam(0.1), steps=4)
    assert seen == [0, 0.25, 0.5, 0.75, 1] and found.losses.shape == (1,)


def test_the_bar_shows_the_loss(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        optimise, "bar", lambda steps, **more: tqdm(steps, file=shown, mininterval=0, disable=False, **more)
    )
    monkeypatch.setattr(optimise.time, "monotonic", iter(range(100)).__next__)
    minimise(convex, [START], optimiser=adam(0.1), steps=4)
    assert "loss " in shown.getvalue() and "4/4" in shown.getvalue()


def test_what_happens_between_steps_sees_all_rows_and_the_memory_whatever_goes_at_once():
    def run(at_once):
        rngs, shapes = generators(torch.Generator().manual_seed(0), len(START)), []

        def each(k, variables, memory):
            [x] = variables
            shapes.append((k, len(x), len(memory["m"][0])))
            x -= 0.1 * (x - x.mean(0))
            for row, own in zip(x, rngs, strict=True):
                row += 0.01 * torch.randn(row.shape, generator=own, dtype=row.dtype)

        project = lambda x: x.clamp_(-1, 1)  # noqa: E731
        found = minimise(convex, [START], optimiser=adam(0.1), steps=5, each=each, project=project, at_once=at_once)
        assert shapes == [(k, 5, 5) for k in range(5)] and found.variables[0].abs().max() <= 1
        return found

    for rows in (1, 2):
        torch.testing.assert_close(run(rows).variables[0], run(5).variables[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "asked",
    [
        {"each": lambda k, variables, memory: None},
        {"project": lambda x: None},
        {"loss": lambda x, now: convex(x)},
    ],
)
def test_lbfgs_refuses_what_would_spoil_its_pairs(asked):
    loss = asked.pop("loss", convex)
    with pytest.raises(ValueError, match="takes no `now`, `each` or `project`; use adam"):
        minimise(loss, [START], optimiser=lbfgs(), steps=1, **asked)


def test_the_best_iterate_is_kept_where_it_is_asked_for():
    """A step far too long: the loss goes down, then up."""
    last = minimise(convex, [START], optimiser=adam(3.0), steps=12)
    best = minimise(convex, [START], optimiser=adam(3.0), steps=12, best=True)
    seen = torch.cat([last.trace, last.losses[None]])
    torch.testing.assert_close(best.losses, seen.min(0).values)
    torch.testing.assert_close(torch.stack([convex(x) for x in best.variables[0]]), best.losses)
    assert (best.losses <= last.losses).all() and (best.losses < last.losses).any()
    assert best.evaluations == last.evaluations + len(START)


def test_stages_are_reported_as_one_run():
    first = minimise(convex, [START], optimiser=adam(0.1), steps=3, frames=2)
    both = minimise(rosenbrock, first, optimiser=adam(0.01), steps=4, frames=3)
    alone = minimise(rosenbrock, first.variables, optimiser=adam(0.01), steps=4)
    torch.testing.assert_close(both.variables[0], alone.variables[0])
    torch.testing.assert_close(both.trace, torch.cat([first.trace, alone.trace]))
    assert both.evaluations == first.evaluations + alone.evaluations
    assert both.frame_steps == [*first.frame_steps, *(3 + k for k in (0, 1, 4))]
    assert both.frame_evaluations[-1] == both.evaluations and both.seconds >= first.seconds
    assert both.frame_evaluations == sorted(both.frame_evaluations)
    assert len(both.frames) == len(both.frame_steps) == len(both.frame_seconds)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_row_that_was_not_finite_once_has_failed_and_harms_no_other(signed, what):
    """The sign of NaN is 0: without a check the row would go on as if nothing had been."""

    def loss(x, now):
        bad = (now == 0.25) & (x[0] > 0)
        if what == "loss":
            return torch.where(bad, torch.nan, convex(x))
        return convex(x) + torch.where(bad, torch.inf, 0.0) * (x.sum() - x.sum().detach())

    start = START.abs() * torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)[:, None]
    found = minimise(loss, [start], optimiser=adam(1e-3, signed=signed), steps=4)
    assert found.losses.isnan().tolist() == [True, False, False, True, False]
    alone = minimise(loss, [start[[1, 2, 4]]], optimiser=adam(1e-3, signed=signed), steps=4)
    torch.testing.assert_close(found.variables[0][[1, 2, 4]], alone.variables[0])
    assert best_of(found.losses) in (1, 2, 4)


def test_a_run_whose_rows_have_all_failed_ends_early():
    found = minimise(lambda x: x.sum() * torch.nan, [START], optimiser=adam(0.1), steps=1000)
    assert len(found.trace) == 100 and found.losses.isnan().all()
    with pytest.raises(FloatingPointError, match="no restart ended with a finite loss"):
        best_of(found.losses)


def test_a_stage_with_fewer_rows_has_infinite_losses_in_the_others_place():
    first = minimise(convex, [START], optimiser=adam(0.1), steps=3)
    then = minimise(convex, Minimum([START[:1]], first.trace, first.losses), optimiser=adam(0.1), steps=2)
    assert then.trace.shape == (5, len(START)) and then.trace[:3].isfinite().all()
    assert then.trace[3:, 0].isfinite().all() and then.trace[3:, 1:].isinf().all()
    assert then.losses[0].isfinite() and then.losses[1:].isinf().all() and len(then.variables[0]) == 1


@pytest.mark.parametrize("schedule", [{"cosine": True}, {"drops": (0.25, 0.5, 0.75)}], ids=str)
def test_a_schedule_goes_on_over_stages(schedule):
    """Of a constant gradient Adam takes steps of the rate itself, with any memory of it."""
    rates = []
    for part, steps in (((0.0, 1.0), 8), ((0.0, 0.5), 4), ((0.5, 1.0), 4)):
        path = []
        minimise(
            lambda x: x.sum(),
            [torch.zeros(1, 1, dtype=torch.float64)],
            optimiser=adam(0.1, part=part, **schedule),
            steps=steps,
            each=lambda k, variables, memory, path=path: path.append(variables[0].item()),
        )
        rates.append(torch.tensor([0.0, *path]).diff())
    torch.testing.assert_close(rates[0], torch.cat(rates[1:]), rtol=1e-4, atol=1e-6)


def test_cosine_decay_with_a_warm_up_is_torchs_on_a_lambda():
    found = minimise(convex, [START], optimiser=adam(0.1, cosine=True, warm_up=3), steps=10)
    x = START.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    rate = lambda k: cosine_decay(k / 10) * min(1, (k + 1) / 4)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for _ in range(10):
        (x.grad,) = torch.autograd.grad(convex(x).sum(), [x])
        optimiser.step()
        scheduler.step()
    torch.testing.assert_close(found.variables[0], x.detach())


def test_a_soft_sign_is_the_gradient_at_the_end_and_bounded_before():
    g = torch.tensor([-50.0, -0.3, 0.0, 1e-4, 2.0], dtype=torch.float64)
    now = lambda k: torch.tensor(k, dtype=torch.float64)  # noqa: E731
    torch.testing.assert_close(soft_sign(g, now(1.0)), g, rtol=1e-8, atol=0)
    torch.testing.assert_close(soft_sign(g, now(1 - 1e-4)), g, rtol=1e-4, atol=0)
    torch.testing.assert_close(soft_sign(g, now(0.0)), torch.tensor([math.tanh(v) for v in g.tolist()]).double())
    for k in (0.0, 0.5, 0.9):
        assert (soft_sign(g, now(k)).abs() <= 1 / (1 - k) + 1e-9).all()
        assert torch.equal(soft_sign(g, now(k)).sign(), g.sign())


def test_adam_on_a_squashed_gradient_is_torchs_on_it():
    found = minimise(convex, [START], optimiser=squashed(adam(0.1, cosine=True, warm_up=2), soft_sign), steps=8)
    x = START.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: cosine_decay(k / 8) * min(1, (k + 1) / 3))
    for k in range(8):
        (g,), s = torch.autograd.grad(convex(x).sum(), [x]), 1 - k / 8
        x.grad = torch.tanh(s * g) / s
        optimiser.step()
        scheduler.step()
    torch.testing.assert_close(found.variables[0], x.detach())
    hard = [
        minimise(convex, [START], optimiser=o, steps=5)
        for o in (squashed(adam(0.1), hard_sign), adam(0.1, signed=True))
    ]
    assert torch.equal(hard[0].variables[0], hard[1].variables[0])


@pytest.mark.parametrize("squash", [hard_sign, soft_sign])
def test_a_squash_hides_no_gradient_that_is_not_finite(squash):
    def loss(x, now):
        return convex(x) + torch.where((now == 0.25) & (x[0] > 0), torch.inf, 0.0) * (x.sum() - x.sum().detach())

    start = START.abs() * torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)[:, None]
    found = minimise(loss, [start], optimiser=squashed(adam(1e-3), squash), steps=4)
    assert found.losses.isnan().tolist() == [True, False, False, True, False]


def test_best_of_counts_nan_as_infinite():
    assert best_of(torch.tensor([math.nan, 2.0, 1.0])) == 2
    assert best_of(torch.tensor([math.inf, math.nan, 5.0])) == 2
    with pytest.raises(FloatingPointError, match="no restart ended with a finite loss"):
        best_of(torch.tensor([math.nan, math.inf]))


@pytest.mark.parametrize(("rows", "steps"), [(0, 1), (1, 0)])
def test_nothing_to_minimise_is_refused(rows, steps):
    with pytest.raises(ValueError, match=f"restarts={rows}, steps={steps}; both must be at least 1"):
        minimise(convex, [START[:rows]], optimiser=adam(0.1), steps=steps)
