"""SEER: the loss against plain autograd, what comes back after a short training, and what it refuses."""

import dataclasses
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gi_lib import Batch, NotApplicableError, ThreatModel, data, models, observe
from gi_lib.attacks import SEER, RobbingTheFed, seer
from gi_lib.bench import Case
from gi_lib.bench.measure import attempt

OWN = ThreatModel(malicious_server=True, has_auxiliary_data=True)
DIGITS = data.load("digits")
TRAIN = data.load("digits", split="train")
SURROGATE = data.Surrogate(TRAIN)
SHAPE = DIGITS.image_shape
FEW = {"batch": 8, "updates": 3, "batches": 2, "fit": 8, "surrogates": 64}


class Dimmed:
    """Digits, each under a light of its own."""

    hash = "dimmed"

    def __init__(self, digits):
        self.digits = data.Surrogate(digits)

    def draw(self, n, rng):
        images, labels = self.digits.draw(n, rng)
        return images * (0.1 + 0.9 * torch.rand(len(images), 1, 1, 1, generator=rng)), labels


def network(name="cnn2_norm", train=True):
    shape = {"num_classes": 10, "image_shape": SHAPE, "mean": DIGITS.mean, "std": DIGITS.std}
    return models.build(name, **shape).train(train)


def gradient(model, entries, x, y, weights):
    """The kept entries of sum_i c_i dL_i/dtheta, by plain autograd."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    named = dict(model.named_parameters())
    found = torch.autograd.grad(losses @ weights, [named[name] for name in entries])
    return torch.cat([g.flatten()[i] for g, i in zip(found, entries.values(), strict=True)])


def test_the_combinations_are_of_norm_one_and_leave_the_last_image_to_itself(rng):
    c = seer.combinations(5, 16, rng)
    assert c.shape == (5, 3, 16)
    torch.testing.assert_close(c.norm(dim=2), torch.ones(5, 3))
    assert torch.equal(c[:, 0], F.one_hot(torch.full((5,), 15), 16).float()) and not c[:, 1:, -1].any()
    torch.testing.assert_close(c[:, 2, :-1], torch.full((5, 15), 15**-0.5))


def test_alpha_rises_from_a_quarter_to_the_batch_size_in_half_of_the_training():
    assert seer.alpha(0.0, 64) == 0.25 and seer.alpha(0.25, 64) == pytest.approx(4.0)
    assert seer.alpha(0.5, 64) == seer.alpha(1.0, 64) == pytest.approx(64)


def test_the_loss_by_hand(rng):
    R, x, nothing = torch.randn(4, 3, 6, generator=rng), torch.randn(4, 6, generator=rng), torch.rand(6, generator=rng)
    wanted, null = seer.terms(R, x, nothing)
    by_hand = [((R[i, 0] - x[i]) ** 2).mean() for i in range(4)]
    of_others = [((R[i, k] - nothing) ** 2).mean() for i in range(4) for k in (1, 2)]
    assert wanted.item() == pytest.approx(torch.stack(by_hand).mean().item())
    assert null.item() == pytest.approx(torch.stack(of_others).mean().item())


def test_the_fit_is_ridge_regression(rng):
    z, true = torch.randn(500, 7, generator=rng).double(), torch.randn(3, 7, generator=rng).double()
    W, b = seer.ridge(z, z @ true.T + 2)
    torch.testing.assert_close(W, true / (1 + seer.RIDGE), rtol=0.05, atol=5e-3)
    torch.testing.assert_close(b, torch.full((3,), 2.0).double(), rtol=0, atol=0.01)


@pytest.mark.parametrize("train", [True, False])
def test_what_is_read_is_the_decoder_on_the_sum_of_the_batchs_gradients(rng, train):
    attack = SEER(**FEW, entries=40)
    sent, trap = attack.plant(network(train=train), SHAPE, SURROGATE, rng)
    batch = DIGITS.batch(range(8))
    obs = observe(sent, batch, threat=OWN, trapdoor=trap, auxiliary=SURROGATE, rng=rng)
    rec = attack(obs, rng)
    assert all(len(i) <= 40 and len(i.unique()) == len(i) for i in trap.entries.values())
    z = gradient(sent, trap.entries, batch.images, batch.labels, torch.ones(8))
    by_hand = (trap.weight @ z + trap.bias).clamp(0, 1)
    torch.testing.assert_close(rec.images.flatten(), by_hand, rtol=1e-3, atol=1e-4)
    assert len(rec.images) == attack.at_most(obs) == 1 and rec.labels is None


def test_the_model_keeps_its_architecture_and_the_callers_is_left_alone(rng):
    model = network()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    sent, trap = SEER(**FEW).plant(model, SHAPE, SURROGATE, rng)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert sent.state_dict().keys() == before.keys() and sent.training
    moved = [name for name, p in sent.named_parameters() if not torch.equal(p, before[name])]
    assert {"net.0.weight", "net.13.weight"} <= set(moved)
    again = pickle.loads(pickle.dumps(trap))
    assert torch.equal(again.weight, trap.weight) and again.batch == 8


@pytest.mark.parametrize("prop", [seer.brightest, seer.darkest])
def test_an_image_comes_back_after_a_short_training(prop):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU()]
        layers += [nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10)]
    model = models.wrap(nn.Sequential(*layers), mean=DIGITS.mean, std=DIGITS.std, num_classes=10).train()
    attack = SEER(property=prop, batch=8, updates=150, entries=200, fit=2400)
    own, private, hits, trials = Dimmed(TRAIN), Dimmed(DIGITS), 0, 40
    sent, trap = attack.plant(model, SHAPE, own, torch.Generator().manual_seed(0))
    for k in range(trials):
        rng = torch.Generator().manual_seed(k)
        batch = Batch(*private.draw(8, rng))
        rec = attack(observe(sent, batch, threat=OWN, trapdoor=trap, auxiliary=own, rng=rng), rng)
        apart = (batch.images - rec.images).flatten(1).norm(dim=1)
        hits += int(apart.argmin() == prop(batch.images).argmax())
    assert hits > trials / 2  # five by chance


def test_seer_refuses(rng):
    with pytest.raises(ValueError, match="SEER trains on images of the server's own; give it auxiliary data"):
        SEER(**FEW).plant(network(), SHAPE, None, rng)
    planted, _ = RobbingTheFed(bins=4, surrogates=64).plant(network(), SHAPE, SURROGATE, rng)
    with pytest.raises(ValueError, match="the model is planted already.*plant on the model as it was"):
        SEER(**FEW).plant(planted, SHAPE, SURROGATE, rng)
    with pytest.raises(ValueError, match="needs a batch of 100 images of the server's own, got 64; give more"):
        SEER(batch=100, surrogates=64).plant(network(), SHAPE, SURROGATE, rng)
    with pytest.raises(FloatingPointError, match="diverged; lower lr and decoder_lr"):
        SEER(**{**FEW, "lr": 1e30}).plant(network(train=False), SHAPE, SURROGATE, rng)
    _, trap = SEER(**FEW).plant(network(), SHAPE, SURROGATE, rng)
    batch = DIGITS.batch(range(4))
    for name, trapdoor in (("lenet", trap), ("cnn2_norm", "net.0")):
        obs = observe(network(name), batch, threat=OWN, trapdoor=trapdoor, auxiliary=SURROGATE, rng=rng)
        with pytest.raises(NotApplicableError, match="not of a model that SEER has planted"):
            SEER(**FEW)(obs, rng)
    with pytest.raises(ValueError, match="malicious_server"):
        observe(network(), batch, threat=ThreatModel(), trapdoor=trap, rng=rng)


def test_the_batch_size_may_be_unknown(rng):
    attack = SEER(**FEW)
    sent, trap = attack.plant(network(), SHAPE, SURROGATE, rng)
    known, unknown = (
        attack(
            observe(
                sent,
                DIGITS.batch(range(8)),
                threat=dataclasses.replace(OWN, knows_batch_size=knows),
                trapdoor=trap,
                auxiliary=SURROGATE,
                rng=rng,
            ),
            rng,
        )
        for knows in (True, False)
    )
    assert torch.equal(known.images, unknown.images)


def test_a_study_plants_once_for_cases_that_differ_in_their_batch(monkeypatch):
    """Where a plant takes long; and it is the same as if each case had planted anew."""
    made: list[int] = []
    monkeypatch.setattr(sys.modules["gi_lib.bench.measure"], "_kept", {})
    plant = SEER.plant
    monkeypatch.setattr(SEER, "plant", lambda *given: made.append(1) or plant(*given))
    cases = [
        Case(SEER(**FEW), "cnn2_norm", "digits", batch, seed=seed, threat=OWN, auxiliary="digits", train=True)
        for batch, seed in ((tuple(range(8)), 0), (tuple(range(8, 16)), 0), (tuple(range(8)), 1))
    ]
    each = [attempt(case, None, "cpu")[1][1] for case in cases]
    assert len(made) == 3
    monkeypatch.setattr(sys.modules["gi_lib.bench.measure"], "LONG", 0.0)
    kept = [attempt(case, None, "cpu")[1][1] for case in cases]
    assert len(made) == 5 and all(torch.equal(a, b) for a, b in zip(each, kept, strict=True))


@pytest.mark.skipif("GI_DATA" not in os.environ, reason="needs MNIST in the data root GI_DATA")
def test_the_study_knows_the_brightest_image_of_each_batch():
    study = runpy.run_path(str(Path(__file__).parents[1] / "experiments/malicious.py"))
    for size, cases in study["HIDDEN"].items():
        images = data.load("mnist", size=16)
        found = [int(seer.brightest(images.batch(case.indices).images).argmax()) for case in cases]
        assert tuple(found) == study["BRIGHTEST"][size]
