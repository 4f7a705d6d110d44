"""The laws that defenses state, and the attack that asks for them."""

import dataclasses

import pytest
import torch

from gi_lib import (
    Batch,
    NotApplicableError,
    Reconstruction,
    ThreatModel,
    WithheldError,
    data,
    evaluate,
    models,
    observe,
)
from gi_lib.attacks import BayesOptimal
from gi_lib.defenses import DPSGD, Defense, GaussianNoise, LaplaceNoise
from gi_lib.defenses.noise import NARROW
from gi_lib.matching import l1, squared_l2
from gi_lib.priors import total_variation

ZERO = torch.zeros((), dtype=torch.float64)
KNOWN = ThreatModel(knows_defense=True)


def gradients(rng):
    shapes = {"a": (2, 3), "b": (4,), "scale": ()}
    return [{name: torch.randn(shape, generator=rng).double() for name, shape in shapes.items()} for _ in range(3)]


@pytest.mark.parametrize(
    ("defense", "law"),
    [
        (GaussianNoise(0.3), torch.distributions.Normal(ZERO, ZERO + 0.3)),
        (LaplaceNoise(0.3), torch.distributions.Laplace(ZERO, ZERO + 0.3)),
        (GaussianNoise(0), torch.distributions.Normal(ZERO, ZERO + NARROW)),
        (LaplaceNoise(0), torch.distributions.Laplace(ZERO, ZERO + NARROW)),
    ],
    ids=str,
)
def test_a_law_is_the_log_likelihood_up_to_a_constant(defense, law, rng):
    sent, one, other = gradients(rng)
    stated = defense.law(sent)

    def log_p(guess):
        return sum(law.log_prob(sent[name] - g).sum() for name, g in guess.items())

    assert stated.spread == law.scale.item()
    torch.testing.assert_close(stated.surprise(one, sent) - stated.surprise(other, sent), log_p(other) - log_p(one))
    assert stated.surprise(sent, sent) == 0


def test_the_noise_is_of_the_law_that_it_states(rng):
    model, batch = models.build("lenet", num_classes=4, image_shape=(1, 16, 16)), torch.rand(1, 1, 16, 16)
    plain, noisy = (
        observe(model, Batch(batch, torch.tensor([2])), defense=defense, rng=rng).gradient
        for defense in (None, LaplaceNoise(0.02))
    )
    noise = torch.cat([(noisy[name] - g).flatten() for name, g in plain.items()])
    assert noise.abs().mean().item() == pytest.approx(0.02, rel=0.05)  # E|n| = b
    assert noise.var().item() == pytest.approx(2 * 0.02**2, rel=0.1)
    assert abs(noise.mean().item()) < 2e-3


class Unspoken(Defense):
    """It states no law."""


class Foreign:
    """Not of this package, without the method."""

    def on_model(self, model):
        return model

    def on_batch(self, images, labels, rng):
        return images, labels

    def on_client(self, client):
        return client

    def on_update(self, gradient, sent, rng):
        return gradient


@pytest.mark.parametrize("defense", [Unspoken(), Foreign(), DPSGD(noise=0.1)], ids=lambda d: type(d).__name__)
def test_a_law_that_was_not_said_is_asked_for(defense, rng):
    model = models.build("lenet", num_classes=4, image_shape=(1, 8, 8))
    batch = Batch(torch.rand(1, 1, 8, 8), torch.tensor([2]))
    obs = observe(model, batch, defense=defense, threat=KNOWN, rng=rng)
    name = type(defense).__name__
    with pytest.raises(NotApplicableError, match=f"BayesOptimal does not apply: {name} states no law .* InvertingGr"):
        BayesOptimal(steps=1)(obs, rng)


def test_a_defense_that_is_not_known_is_asked_for(rng):
    model = models.build("lenet", num_classes=4, image_shape=(1, 8, 8))
    batch = Batch(torch.rand(1, 1, 8, 8), torch.tensor([2]))
    for defense, threat in ((GaussianNoise(0.1), ThreatModel()), (None, KNOWN)):
        obs = observe(model, batch, defense=defense, threat=threat, rng=rng)
        with pytest.raises(WithheldError, match=r"BayesOptimal needs the defense, .*ThreatModel\(knows_defense=True\)"):
            BayesOptimal(steps=1)(obs, rng)


@pytest.fixture
def seen(rng):
    """A digit's update under noise, in float64."""
    model = models.build("lenet", num_classes=10, image_shape=(1, 8, 8)).double()
    return observe(model, data.load("digits").batch([3]), defense=GaussianNoise(0.05), threat=KNOWN, rng=rng)


def test_the_likelihood_grows_by_a_constant_factor_up_to_the_middle(seen, monkeypatch):
    caught = {}

    def kept(obs, rng, *, loss, **settings):
        caught.update(settings, loss=loss)
        return Reconstruction(torch.zeros(1, 1, 8, 8), None, 0.0)

    monkeypatch.setattr("gi_lib.attacks.bayes.search", kept)
    BayesOptimal(tv=0.0)(seen, torch.Generator())
    z = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    whole = caught["match"](z)
    shares = [(caught["loss"](z, torch.tensor(now)) / whole).item() for now in (0, 0.125, 0.25, 0.5, 0.9)]
    assert shares == pytest.approx([2.5e-4, 2.5e-4**0.75, 2.5e-4**0.5, 1, 1])  # from 0.1 sigma^2
    prior = BayesOptimal(tv=2.0)
    prior(seen, torch.Generator())
    torch.testing.assert_close(caught["match"](z), whole + 2 * total_variation(z))


def test_the_loss_is_minus_the_log_posterior_of_the_returned_image(seen):
    rec = BayesOptimal(steps=3, tv=2.0, restarts=2)(seen, torch.Generator().manual_seed(0))
    surprise = seen.defense.law(seen.gradient).surprise(seen.simulate(rec.images, rec.labels), seen.gradient)
    assert rec.loss == pytest.approx((surprise + 2 * total_variation(rec.images)).item())
    assert rec.loss == rec.losses.min()


def test_the_law_is_the_distance_and_a_mistaken_one_may_be_said(seen):
    """Noise of std 0.05: minus the log-likelihood is 200 times the squared distance."""

    def scaled(g, observed):
        return 200 * squared_l2(g, observed)

    own, same, other = (
        BayesOptimal(steps=5, distance=D)(seen, torch.Generator().manual_seed(0)) for D in (None, scaled, l1)
    )
    torch.testing.assert_close(own.images, same.images, rtol=0, atol=1e-9)
    assert not torch.allclose(own.images, other.images, atol=1e-3)


def test_the_right_law_comes_nearer_than_a_mistaken_one():
    """Laplace noise: its own law comes nearer to the digits than the squared distance."""
    digits, found = data.load("digits"), []
    for distance in (None, squared_l2):
        total = 0.0
        for i in range(3):
            batch = digits.batch([i])
            model = models.build("lenet", num_classes=10, image_shape=(1, 8, 8), seed=i)
            rng = torch.Generator().manual_seed(i)
            obs = observe(model, batch, defense=LaplaceNoise(0.1), threat=KNOWN, rng=rng)
            attack = BayesOptimal(steps=80, tv=30.0 if distance is None else 0.6, distance=distance)
            total += evaluate(attack(obs, rng), batch, download=False).psnr.item()
        found.append(total / 3)
    assert found[0] > found[1]


def test_settings_are_values():
    assert dataclasses.replace(BayesOptimal(), distance=l1) == BayesOptimal(distance=l1)
