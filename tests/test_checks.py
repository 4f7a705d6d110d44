"""What a client notices of planted models, and what it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gi_lib import Batch, ThreatModel, checks, data, models, observe
from gi_lib.attacks import ARES, LOKI, MKOR, QBI, VGIA, Fishing, RobbingTheFed, TrapWeights

DIGITS = data.load("digits")
OWN = data.Surrogate(data.load("digits", split="train"))
SHAPE = DIGITS.image_shape


def network(width=64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = [nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10)]
    return models.wrap(nn.Sequential(*dense), num_classes=10)


@pytest.fixture
def batch():
    """Sixteen digits, of which one is a nought."""
    some = DIGITS.batch(range(16))
    return Batch(some.images, torch.tensor([0, *some.labels.clamp_min(1).tolist()[1:]]))


def refusals(model, batch):
    return {finding.check for finding in checks.received(model, batch).findings if finding.refused}


def test_an_honest_model_is_not_refused(batch):
    model = network()
    assert not refusals(model, batch)
    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train = data.load("digits", split="train")
    for step in range(60):
        some = train.batch(range(16 * step, 16 * step + 16))
        descent.zero_grad()
        F.cross_entropy(model(some.images), some.labels).backward()
        descent.step()
    assert not refusals(model, batch)
    said = str(checks.received(model, batch))
    assert said.startswith("no check refuses this model, which does not prove it honest: D-SNR")
    checks.received(model, batch).insist()


def test_each_plant_is_refused_by_its_checks(batch, rng):
    model = network(256)
    imprint, _ = RobbingTheFed(bins=16, surrogates=200).plant(model, SHAPE, OWN, rng)
    assert "rank-one rows" in refusals(imprint, batch)
    own, _ = LOKI(clients=3, bins=32, surrogates=1000).plant(model, SHAPE, OWN, rng)
    assert {"rank-one rows", "lit by one"} <= refusals(own[1], batch)
    fished, hook = Fishing(target=0).plant(model, SHAPE, None, rng)
    assert {"D-SNR", "last layer's range", "lit by one"} <= refusals(fished, batch)
    several, hook = Fishing(target=1).plant(model, SHAPE, None, rng)
    obs = observe(several, batch, threat=ThreatModel(malicious_server=True), trapdoor=hook, rng=rng)
    cut, _ = Fishing(target=1).again(obs, rng)
    assert "last layer's range" in refusals(cut, batch)
    traps, _ = TrapWeights().plant(model, SHAPE, None, rng)
    assert "mirrored halves" in refusals(traps, batch)
    solved, _ = QBI(batch=16, mean=0.3, std=0.37).plant(model, SHAPE, None, rng)
    assert "biases at quantiles" in refusals(solved, batch)
    carried, _ = MKOR().plant(model, SHAPE, None, rng)
    assert {"rank-one rows", "last layer's range"} <= refusals(carried, batch)
    for attack in (VGIA(slabs=100), ARES(bins=32)):
        assert "rank-one rows" in refusals(attack.plant(model, SHAPE, OWN, rng)[0], batch)


def test_a_relu_in_place_hides_no_neuron_and_a_frozen_layer_is_no_error(batch, rng):
    model = network()
    planted, _ = QBI(batch=16, mean=0.3, std=0.37).plant(model, SHAPE, None, rng)
    value, at = checks.lit_by_one(planted, batch)
    for layer in planted.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    assert checks.lit_by_one(planted, batch) == (value, at) and value > 0
    model.net[1].requires_grad_(False)
    assert not checks.received(model, batch).refused


def test_a_refusal_says_why_and_what_to_do(batch, rng):
    fished, _ = Fishing(target=0).plant(network(), SHAPE, None, rng)
    verdict = checks.received(fished, batch)
    assert verdict.refused and len(verdict.reasons) == 3
    assert "a class is set against all others (last layer's range 1e+03 at net.5, threshold" in str(verdict)
    with pytest.raises(checks.PlantedError, match="refuse this model: one image alone .*; send no update, and ask for"):
        verdict.insist()


def test_d_snr_by_hand(batch):
    model = network()
    value, where = checks.d_snr(model, batch)
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    each = []
    for x, y in zip(batch.images, batch.labels, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        each.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.ndim > 1]))
    found = {
        name: max((g[i].norm() / sum(o[i] for o in each if o is not g).norm()).item() for g in each)
        for i, name in enumerate(names)
    }
    assert value == pytest.approx(max(found.values()), rel=1e-4) and where == max(found, key=found.get)


def test_d_snr_at_its_ends(batch, rng):
    one = Batch(batch.images[:1], batch.labels[:1])
    assert checks.d_snr(network(), one) == (0.0, "") and checks.lit_by_one(network(), one) == (0.0, "")
    fished, _ = Fishing(target=0).plant(network(), SHAPE, None, rng)
    assert checks.d_snr(fished, batch)[0] == math.inf


def test_batch_norm_of_the_batch_itself_leaves_the_model_as_it_is(batch):
    model = models.build("resnet20", num_classes=10, image_shape=SHAPE).train()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    state = torch.get_rng_state()
    verdict = checks.received(model, batch)
    assert not verdict.refused and verdict.findings[0].value > 0
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_d_snr_where_batch_norm_mixes_images_is_of_each_loss_in_the_whole_batch(batch):
    model = models.build("cnn2_norm", num_classes=10, image_shape=SHAPE).train()
    weights = [p for p in model.parameters() if p.ndim > 1]
    losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
    each = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    expected = max((g.norm() / (sum(layer) - g).norm()).item() for layer in zip(*each, strict=True) for g in layer)
    assert checks.d_snr(model, batch)[0] == pytest.approx(expected, rel=1e-3)


def test_a_model_without_dense_layers_or_biases_is_asked_what_it_has(batch):
    net = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = {f.check: f.value for f in checks.received(models.wrap(net, num_classes=10), batch).findings}
    assert found.pop("D-SNR") > 0 and set(found.values()) == {0.0}
    assert not refusals(models.build("cnn6", num_classes=10, image_shape=SHAPE), batch)


def test_a_batch_of_other_classes_is_refused(batch):
    few = models.build("mlp", num_classes=3, image_shape=SHAPE)
    with pytest.raises(ValueError, match="the batch has labels from 0 to 8, and the model classes 0 to 2"):
        checks.received(few, DIGITS.batch(range(16)))
