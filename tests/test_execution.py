"""Every way to run an attack gives what the plain way gives: one row, one step, one torch call after another."""

import threading

import pytest
import torch
import torch.nn.functional as F

from gi_lib import Batch, Client, ThreatModel, execution, models, observe
from gi_lib.attacks import DLG, InvertingGradients
from gi_lib.execution import Evaluator, lift, second_derivatives
from gi_lib.matching import cosine, layer_l2, squared_l2
from gi_lib.optimise import adam, minimise

R, B, SHAPE = 4, 2, (3, 12, 12)


def observed(name, *, seed=0, **threat):
    model = models.build(name, num_classes=5, image_shape=SHAPE, mean=0.4, std=0.3).double()
    rng = torch.Generator().manual_seed(seed)
    batch = Batch(torch.rand(B, *SHAPE, generator=rng), torch.tensor([3, 1]))
    return observe(model, batch, threat=ThreatModel(knows_labels=True, **threat), rng=rng)


def plain_inverting_gradients(obs, start, steps, lr, tv):
    """The images [R, B, C, H, W] by nothing but torch.optim.Adam, autograd and textbook formulas."""
    found = []
    for row in start:
        z = row.clone().requires_grad_()
        optimiser = torch.optim.Adam([z], lr=lr)
        low, high = ((edge - obs.model.mean) / obs.model.std for edge in (0, 1))
        for k in range(steps):
            optimiser.param_groups[0]["lr"] = lr * 0.1 ** sum(k >= int(steps * cut) for cut in (3 / 8, 5 / 8, 7 / 8))
            x = obs.model.mean + obs.model.std * z
            loss = F.cross_entropy(obs.model(x), obs.labels)
            simulated = torch.autograd.grad(loss, list(obs.model.parameters()), create_graph=True)
            a, b = (torch.cat([g.flatten() for g in gradient]) for gradient in (simulated, obs.gradient.values()))
            down, across = (z[..., 1:, :] - z[..., :-1, :]).abs(), (z[..., 1:] - z[..., :-1]).abs()
            total = 1 - F.cosine_similarity(a, b, dim=0) + tv * (down.mean() + across.mean())
            (z.grad,) = torch.autograd.grad(total, [z])
            z.grad.sign_()
            optimiser.step()
            with torch.no_grad():
                z.copy_(torch.minimum(torch.maximum(z, low), high))
        found.append((obs.model.mean + obs.model.std * z).detach())
    return torch.stack(found)


@pytest.fixture(params=["vmap", "in parts", "one by one", "threads"])
def mode(request, monkeypatch):
    """A way to run stacked rows: how many entries of gradient are stacked, and on how many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "threads" else 1)
    stacked = {"vmap": lambda P: R * P, "in parts": lambda P: 3 * P}.get(request.param, lambda P: 0)
    yield lambda obs: monkeypatch.setattr(
        execution, "STACKED_ENTRIES", stacked(sum(g.numel() for g in obs.gradient.values()))
    )
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_every_mode_is_the_plain_loop(mode, name):
    obs = observed(name)
    mode(obs)
    attack = InvertingGradients(steps=16, restarts=R, lr=0.05, tv=1e-2)
    rec = attack(obs, torch.Generator().manual_seed(7))
    start = torch.randn(R, B, *SHAPE, generator=torch.Generator().manual_seed(7)).double()
    plain = plain_inverting_gradients(obs, start, attack.steps, attack.lr, attack.tv)
    simulated = [obs.simulate(x.clamp(0, 1), obs.labels) for x in plain]
    losses = torch.stack([cosine(g, obs.gradient) for g in simulated])
    best = losses.argmin()
    assert rec.loss == pytest.approx(losses[best].item(), rel=1e-6)
    torch.testing.assert_close(rec.images, plain[best].clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("client", [Client(), Client(steps=2, lr=0.05)], ids=str)
@pytest.mark.parametrize(
    "attack", [DLG(steps=2, max_iter=4, restarts=R), InvertingGradients(steps=4, restarts=R)], ids=str
)
def test_every_mode_gives_the_same(mode, attack, client, monkeypatch):
    model = models.build("lenet", num_classes=5, image_shape=SHAPE).double()
    rng = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(B, *SHAPE, generator=rng), torch.tensor([3, 1]))
    obs = observe(model, batch, client=client, threat=ThreatModel(knows_training_details=True), rng=rng)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "STACKED_ENTRIES", 0)
        expected = attack(obs, torch.Generator().manual_seed(1))
    mode(obs)
    rec = attack(obs, torch.Generator().manual_seed(1))
    torch.testing.assert_close(rec.images, expected.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(rec.trace, expected.trace, rtol=1e-6, atol=1e-9)
    assert rec.gradient_evaluations == expected.gradient_evaluations
    assert not rec.images.requires_grad and not rec.trace.requires_grad


def test_losses_at_the_end_have_no_graph(mode):
    obs = observed("lenet")
    mode(obs)
    found = minimise(
        lambda x: cosine(obs.simulate(x, obs.labels), obs.gradient),
        [torch.rand(R, B, *SHAPE).double()],
        optimiser=adam(0.1),
        steps=1,
        at_once=execution.at_once(obs),
    )
    assert found.losses.shape == (R,) and not found.losses.requires_grad


def test_threads_share_the_rows_and_leave_no_trace():
    threads, seen = torch.get_num_threads(), set()
    together = threading.Barrier(3, timeout=20)

    def loss(x):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        together.wait()  # only if three rows run at the same time do all get past it
        return x.square().sum()

    torch.set_num_threads(3)
    try:
        found = minimise(loss, [torch.ones(3, 2)], optimiser=adam(0.1), steps=2, at_once=1)
        fresh = []
        later = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert torch.get_num_threads() == 3 and fresh == [3]
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 3 and {own for _, own in seen} == {1}
    assert found.evaluations == 9


def test_memory_that_runs_out_halves_the_rows_of_a_call(monkeypatch):
    sizes = []

    def vmapped(loss, **settings):
        def stacked(x):
            sizes.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.stack([loss(row) for row in x])

        return stacked

    monkeypatch.setattr(torch.func, "vmap", vmapped)
    evaluate = Evaluator(lambda x: x.square().sum(), [torch.arange(10.0).reshape(10, 1)], 10)
    losses, (gradient,) = evaluate()
    assert losses.tolist() == [k * k for k in range(10)] and gradient.flatten().tolist() == [2 * k for k in range(10)]
    assert sizes == [10, 5, 2, 2, 2, 2, 2] and evaluate.at_once == 2
    evaluate()
    assert set(sizes[7:]) == {2} and evaluate.evaluations == 20


def test_memory_for_less_than_one_row_is_an_error():
    def loss(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Evaluator(loss, [torch.ones(3, 1)], 2)()


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(6, 18), torch.nn.Linear(6, 5)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(x.flatten(1, 2)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("restarts", [1, 3])
def test_attention_can_be_differentiated_twice(restarts):
    torch.manual_seed(0)
    model = models.wrap(Attention(), num_classes=5)
    batch = Batch(torch.rand(1, 2, 6, 6), torch.tensor([2]))
    obs = observe(model, batch, rng=torch.Generator())
    rec = InvertingGradients(steps=30, restarts=restarts)(obs, torch.Generator().manual_seed(0))
    assert rec.trace[-1].min() < 0.5 * rec.trace[0].min()


def flags():
    return [enabled() for enabled, _, _ in execution._FLAGS]


def test_attacks_in_threads_leave_torchs_attention_as_it_was():
    """The first to come is the first to go: what it would restore is not what the second needs."""
    before, inside = flags(), threading.Barrier(2, timeout=20)
    seen = []

    def attack(first):
        with second_derivatives():
            inside.wait()
            if not first:
                gone.wait(20)
                seen.append(flags())
        if first:
            gone.set()

    gone = threading.Event()
    threads = [threading.Thread(target=attack, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[False, False, False, True]] and flags() == before


def test_a_readers_own_loop_over_attention_works():
    torch.manual_seed(0)
    obs = observe(
        models.wrap(Attention(), num_classes=5), Batch(torch.rand(1, 2, 6, 6), torch.tensor([2])), rng=torch.Generator()
    )
    x = torch.rand(1, 2, 6, 6, requires_grad=True)
    g = obs.simulate(x, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(squared_l2(g, obs.gradient), x)
    assert gradient.abs().max() > 0 and flags() == [True, True, True, True]


@pytest.mark.parametrize("size", [5, 2**17])
def test_cosine_has_the_gradient_of_its_formula(size, rng):
    """Stacked, by autograd, and one by one, by hand."""
    a = torch.randn(3, size, generator=rng, dtype=torch.float64, requires_grad=True)
    small = torch.randn(3, 4, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    b = {"w": torch.randn(size, generator=rng, dtype=torch.float64), "v": torch.randn(4, 2, generator=rng).double()}
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    joined, target = torch.cat([a, small.flatten(1)], 1), torch.cat([b["w"], b["v"].flatten()])
    plain = 1 - torch.nn.functional.cosine_similarity(joined, target[None], dim=1)

    def loss(a, v):
        return cosine({"w": a, "v": v}, b)

    expected = torch.autograd.grad(plain @ weights, [a, small])
    for mine in (lift(loss)(a, small), torch.stack([loss(*row) for row in zip(a, small, strict=True)])):
        torch.testing.assert_close(mine, plain)
        torch.testing.assert_close(torch.autograd.grad(mine @ weights, [a, small]), expected)


@pytest.mark.parametrize("distance", [cosine, squared_l2, layer_l2])
def test_distances_of_stacked_guesses_are_those_of_each(distance, rng):
    mine = {"w": torch.randn(3, 4, 2, generator=rng), "b": torch.randn(3, 5, generator=rng)}
    observed_gradient = {name: torch.randn(g.shape[1:], generator=rng) for name, g in mine.items()}
    each = [distance({k: g[i] for k, g in mine.items()}, observed_gradient) for i in range(3)]
    stacked = torch.func.vmap(lambda w, b: distance({"w": w, "b": b}, observed_gradient))(mine["w"], mine["b"])
    torch.testing.assert_close(stacked, torch.stack(each))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["lenet", "resnet20"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_a_replayed_graph_is_the_eager_loop(name, restarts, monkeypatch):
    model = models.build(name, num_classes=5, image_shape=SHAPE).double().cuda()
    rng = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(B, *SHAPE, generator=rng), torch.tensor([3, 1]))
    obs = observe(model, batch, rng=rng)
    attack = InvertingGradients(steps=20, restarts=restarts)
    replayed = attack(obs, torch.Generator().manual_seed(1))
    monkeypatch.setattr(execution, "WARM_UP", 100)
    eager = attack(obs, torch.Generator().manual_seed(1))
    torch.testing.assert_close(replayed.trace, eager.trace, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(replayed.images, eager.images, rtol=0, atol=1e-6)
    assert replayed.gradient_evaluations == eager.gradient_evaluations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_schedules_and_what_happens_between_steps_are_replayed_too(monkeypatch):
    def loss(x, now):
        return torch.where(now < 0.5, x.square().sum(), (x - 3).square().sum()) * (1 + now)

    def each(k, variables, memory):
        variables[0].add_(1e-3 * k)

    found = []
    for warm_up in (3, 100):
        monkeypatch.setattr(execution, "WARM_UP", warm_up)
        start = [torch.ones(2, 3, device="cuda", dtype=torch.float64)]
        found.append(minimise(loss, start, optimiser=adam(0.1, cosine=True), steps=40, each=each, best=True))
    torch.testing.assert_close(found[0].trace, found[1].trace)
    torch.testing.assert_close(found[0].variables[0], found[1].variables[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_can_not_be_captured_runs_on_with_the_reason():
    def loss(x):
        return x.square().sum() * (1 if x.sum().item() > 1e9 else 2)  # .item() waits for the GPU

    with pytest.warns(UserWarning, match="can't be replayed as a CUDA graph"):
        found = minimise(loss, [torch.ones(1, 3, device="cuda")], optimiser=adam(0.01), steps=8)
    assert len(found.trace) == 8 and found.trace[-1].max() < found.trace[0].max()
