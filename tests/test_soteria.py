"""Soteria: the score by plain backward passes, what is pruned, and the attacker who knows it."""

import pytest
import torch
from torch import nn

from gi_lib import Batch, ThreatModel, data, evaluate, models, observe
from gi_lib.attacks import BayesOptimal
from gi_lib.defenses import Soteria
from gi_lib.matching import squared_l2
from gi_lib.types import Sent

LAST = "net.7.weight"


@pytest.fixture
def private():
    model = models.build("lenet", num_classes=10, image_shape=(1, 8, 8)).double()
    batch = data.load("digits").batch([3, 5])
    return model, Batch(batch.images.double(), batch.labels)


def by_backward_passes(model, images, eps):
    """One backward pass a feature, as the card has it."""
    x = images.clone().requires_grad_()
    r = model.net[:-1]((x - model.mean) / model.std)
    score = torch.zeros(r.shape[1], dtype=x.dtype)
    for f in range(r.shape[1]):
        (slope,) = torch.autograd.grad(r[:, f].sum(), x, retain_graph=True)
        for i in range(len(x)):
            score[f] += slope[i].norm() / (r[i, f].detach() + eps)
    return score


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_the_score_is_that_of_one_backward_pass_a_feature(private, eps, monkeypatch):
    monkeypatch.setattr("gi_lib.defenses.soteria.AT_ONCE", 7)
    model, batch = private
    found = Soteria(eps=eps).scores(Sent(model, batch.images, batch.labels), LAST)
    torch.testing.assert_close(found, by_backward_passes(model, batch.images, eps))


def test_the_columns_of_the_lowest_scores_are_zero_and_all_else_stays(private, rng):
    model, batch = private
    plain = observe(model, batch, rng=rng).gradient
    sent = observe(model, batch, defense=Soteria(percentile=60), rng=rng).gradient
    zero = (sent[LAST] == 0).all(0)
    score = by_backward_passes(model, batch.images, 0.1)
    assert 0.55 < zero.double().mean() < 0.65
    assert score[zero].max() < score[~zero].min()
    torch.testing.assert_close(sent[LAST][:, ~zero], plain[LAST][:, ~zero])
    for name in plain.keys() - {LAST}:
        torch.testing.assert_close(sent[name], plain[name])
    distance = squared_l2(sent, plain) / squared_l2({n: 0 * g for n, g in plain.items()}, plain)
    assert distance.sqrt() > 0.01


def test_the_ends_of_the_percentile(private, rng):
    model, batch = private
    plain = observe(model, batch, rng=rng).gradient
    none = observe(model, batch, defense=Soteria(percentile=0), rng=rng).gradient
    most = observe(model, batch, defense=Soteria(percentile=100), rng=rng).gradient
    torch.testing.assert_close(none, plain)
    assert ((most[LAST] != 0).any(0)).sum() == 1


def test_another_layer_may_be_defended(rng):
    model = models.build("mlp", num_classes=4, image_shape=(1, 4, 4))
    batch = Batch(torch.rand(1, 1, 4, 4, generator=rng), torch.tensor([1]))
    plain = observe(model, batch, rng=rng).gradient
    sent = observe(model, batch, defense=Soteria(layer="net.3.weight"), rng=rng).gradient
    changed = [name for name in plain if not torch.equal(plain[name], sent[name])]
    assert changed == ["net.3.weight"]


class Tokens(nn.Module):
    """A dense layer on several vectors an image."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, x):
        return self.dense(x.flatten(0, 2)).reshape(len(x), -1, 3).mean(1)


class Product(nn.Module):
    """A matrix that is no layer's."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.rand(3, 16))

    def forward(self, x):
        return x.flatten(1) @ self.matrix.T


WRONG = [
    (nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), Soteria(), "the update has none; use GaussianNoise"),
    (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), Soteria(layer="last"), "'last' is none of .*: net.1.weight"),
    (Tokens(), Soteria(), "needs one vector of features an image, and 'net.dense.weight' sees 4 for 1 images"),
    (Product(), Soteria(), "'net.matrix', and that parameter is no torch.nn.Linear's"),
]


@pytest.mark.parametrize(("net", "defense", "message"), WRONG)
def test_a_model_without_such_a_layer_is_refused(net, defense, message, rng):
    batch = Batch(torch.rand(1, 1, 4, 4, generator=rng), torch.tensor([1]))
    with pytest.raises(ValueError, match=message):
        observe(models.wrap(net, num_classes=3), batch, defense=defense, rng=rng)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentile": 101}, "at most 100, got 101"),
        ({"percentile": -1}, "percentile"),
        ({"layer": 7}, "layer, the name"),
        ({"eps": 0}, "eps, a finite"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"Soteria needs .*{message}"):
        Soteria(**settings)


def test_the_attacker_who_leaves_the_layer_out_sees_the_image_as_if_undefended(rng):
    """The law ignores the defended weights: nothing that is done to them changes it."""
    model = models.build("lenet", num_classes=10, image_shape=(1, 8, 8))
    batch, known = data.load("digits").batch([3]), ThreatModel(knows_defense=True)
    obs = observe(model, batch, defense=Soteria(), threat=known, rng=rng)
    law = obs.defense.law(obs.gradient)
    truth = obs.simulate(batch.images, batch.labels)
    assert law.surprise(truth, obs.gradient) == 0 < squared_l2(truth, obs.gradient)
    attack = BayesOptimal(tv=1e-3, steps=300, lr=0.1)
    adapted = evaluate(attack(obs, torch.Generator().manual_seed(0)), batch, download=False)
    assert adapted.psnr.item() > 20
