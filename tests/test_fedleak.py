"""FedLeak: its parts against oracles, and what it is without them."""

import dataclasses

import pytest
import torch

from gi_lib.attacks import FedLeak, InvertingGradients
from gi_lib.attacks.fedleak import at_random, largest, part, regularised
from gi_lib.matching import cosine
from gi_lib.optimise import adam, minimise


def test_the_largest_entries_of_each_parameter_are_kept():
    g = {"a": torch.tensor([[3.0, -5.0], [0.1, 1.0]]), "b": torch.tensor([0.2])}
    m = part(g, 0.5, largest, torch.Generator())
    assert m["a"].tolist() == [[1, 1], [0, 0]] and m["b"].tolist() == [1]  # at least one of each


def test_random_entries_are_as_many_and_those_of_the_generator():
    g = {"a": torch.randn(40, 5)}
    first, again, other = (part(g, 0.1, at_random, torch.Generator().manual_seed(s))["a"] for s in (1, 1, 2))
    assert first.sum() == other.sum() == 20 and torch.equal(first, again) and not torch.equal(first, other)


def test_the_ahead_gradient_is_that_of_the_penalised_loss():
    """On a quadratic the derivative of L + lambda |dL/dx| is known: d + lambda H d / |d|, lambda = mix rho |x|."""
    H = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
    given = []

    def spy(variables, steps):
        method = adam(0.1)(variables, steps)

        def step(evaluate):
            losses, gradients = evaluate(slice(None))
            given.append((losses, gradients[0]))
            return losses, True

        return dataclasses.replace(method, step=step)

    found = minimise(lambda x: x @ H @ x / 2, [x], optimiser=regularised(spy, 0.3, 0.05), steps=1)
    losses, ahead = given[0]
    d = x @ H
    weight = 0.3 * 0.05 * x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ahead, d + weight * (d @ H) / d.norm(dim=1, keepdim=True))
    torch.testing.assert_close(losses, (x * d).sum(1) / 2)
    assert torch.equal(found.variables[0], x) and found.evaluations == 2 * 2 + 2


def test_without_its_parts_it_is_inverting_gradients(client):
    obs, _ = client("lenet", 2, (3, 12, 12), knows_labels=True)
    mine, plain = (
        attack(obs, torch.Generator().manual_seed(0))
        for attack in (FedLeak(steps=5, fraction=1.0, mix=0.0), InvertingGradients(steps=5))
    )
    assert torch.equal(mine.images, plain.images) and torch.equal(mine.trace, plain.trace)
    assert mine.gradient_evaluations == plain.gradient_evaluations == 6


def test_each_part_has_an_effect_and_its_cost(client):
    obs, _ = client("lenet", 2, (3, 12, 12), knows_labels=True)
    ends = {
        (fraction, mix): FedLeak(steps=4, fraction=fraction, mix=mix)(obs, torch.Generator().manual_seed(0))
        for fraction in (1.0, 0.2)
        for mix in (0.0, 0.5)
    }
    images = [rec.images for rec in ends.values()]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(images) for b in images[:i])
    assert [rec.gradient_evaluations for rec in ends.values()] == [5, 9, 5, 9]


def test_its_loss_is_the_match_of_the_chosen_part(client):
    obs, _ = client("lenet", 1, (3, 12, 12), knows_labels=True)
    rec = FedLeak(steps=3, fraction=0.3)(obs, torch.Generator().manual_seed(0))
    m = part(obs.gradient, 0.3, largest, torch.Generator())
    mine, theirs = (
        {name: m[name] * g[name] for name in m} for g in (obs.simulate(rec.images, obs.labels), obs.gradient)
    )
    assert cosine(mine, theirs).item() == pytest.approx(rec.loss, rel=1e-4)
