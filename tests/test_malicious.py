"""A malicious server: what fishing and LOKI recover, and what they refuse."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, data, evaluate, models, observe
from gi_lib.attacks import LOKI, BiasRatio, Fishing, InvertingGradients, RobbingTheFed
from gi_lib.bench import Case
from gi_lib.bench.measure import attempt
from gi_lib.matching import cosine

SERVER = ThreatModel(malicious_server=True)
ROUNDS = ThreatModel(malicious_server=True, many_rounds=True)
OWN = ThreatModel(malicious_server=True, has_auxiliary_data=True)
DIGITS = data.load("digits")
pytestmark = pytest.mark.filterwarnings("ignore:the closed form does not hold")


def network(name=None):
    if name:
        return models.build(name, num_classes=10, image_shape=DIGITS.image_shape).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    return models.wrap(nn.Sequential(*dense), num_classes=10).double()


def fish(attack, model, batches, most=12):
    """Round after round, until the server has one image."""
    rng = torch.Generator().manual_seed(0)
    sent, hook = attack.plant(model, tuple(batches[0].images.shape[1:]), None, rng)
    earlier = []
    while True:
        threat = ROUNDS if earlier else SERVER
        obs = observe([sent] * len(batches), batches, threat=threat, trapdoor=hook, earlier=earlier, rng=rng)
        asked = attack.again(obs, rng) if len(earlier) + 1 < most else None
        if asked is None:
            return obs
        earlier.append(obs)
        sent, hook = asked


def test_a_class_with_one_image_is_fished_out_of_a_batch_in_one_round():
    batch = DIGITS.batch(range(16))
    labels = [0, *[y if y else 1 for y in batch.labels.tolist()[1:]]]
    batch = Batch(batch.images, torch.tensor(labels))
    obs = fish(Fishing(target=0), network(), [batch])
    assert not obs.earlier
    rec = Fishing(target=0)(obs, torch.Generator())
    assert rec.notes["certified"] and rec.labels.tolist() == [0] and len(rec.images) == 1
    assert evaluate(rec, Batch(batch.images[:1], batch.labels[:1]), download=False).psnr.item() > 140


def test_what_is_handed_on_is_the_gradient_of_one_image_of_the_planted_model():
    batch = DIGITS.batch(range(64))
    attack, seen = Fishing(target=3), []

    def inner(obs, rng):
        seen.append(obs)
        return BiasRatio()(obs, rng)

    obs = fish(attack, network(), [DIGITS.batch(range(first, first + 16)) for first in range(0, 64, 16)])
    assert 3 <= 1 + len(obs.earlier) <= 8
    rec = dataclasses.replace(attack, attack=inner)(obs, torch.Generator())
    assert rec.labels is None and rec.notes["caught"] == pytest.approx(1, abs=0.01) and len(rec.images) == 1
    (caught,) = seen
    images = batch.images.double()
    apart = [cosine(caught.simulate(x[None], torch.tensor([3])), caught.gradient).item() for x in images]
    assert min(apart) < 1e-6 and sorted(apart)[1] > 1e-3
    chosen = batch.images[apart.index(min(apart))]
    assert (rec.images[0] - chosen).abs().max() < 1e-6


def test_without_further_rounds_all_images_of_the_class_are_handed_on():
    batch = DIGITS.batch(range(64))
    obs, seen = fish(Fishing(target=3), network(), [batch], most=1), []

    def inner(caught, rng):
        seen.append(caught)
        return InvertingGradients(steps=1)(caught, rng)

    attack, count = Fishing(target=3, attack=inner), int((batch.labels == 3).sum())
    rec = attack(obs, torch.Generator().manual_seed(0))
    assert len(rec.images) == attack.at_most(obs) == count and rec.notes["caught"] == pytest.approx(count)
    mine = batch.images[batch.labels == 3].double()
    assert cosine(seen[0].simulate(mine, seen[0].labels), seen[0].gradient) < 1e-9


def test_a_silent_target_gives_nothing_and_says_so():
    batch = DIGITS.batch(range(16))
    batch = Batch(batch.images, batch.labels.clamp_min(1))
    obs = fish(Fishing(target=0), network(), [batch])
    rec = Fishing(target=0)(obs, torch.Generator())
    assert not len(rec.images) and "class 0 is not in the batch" in rec.notes["why"]
    scores = evaluate(rec, batch, download=False)
    assert scores.returned == 0 and not scores.recovered.any()


def test_one_shot_takes_the_darkest_feature_of_a_client_with_one_class():
    own, rng = data.load("digits", split="train"), torch.Generator().manual_seed(0)
    same = [i for i, y in enumerate(DIGITS.labels.tolist()) if y == 4][:12]
    attack, model, batch = Fishing(target=4, one_shot=12), network(), DIGITS.batch(same)
    sent, hook = attack.plant(model, DIGITS.image_shape, data.Surrogate(own), rng)
    h = batch.images.double().flatten(1)
    for layer in list(model.net)[1:-1]:
        h = layer(h)
    below = h @ model.net[-1].weight[4] < hook.cut
    obs = observe(sent, batch, threat=OWN, trapdoor=hook, auxiliary=data.Surrogate(own), rng=rng)
    rec = attack(obs, rng)
    assert attack.again(obs, rng) is None
    assert rec.notes["caught"] == pytest.approx(int(below.sum()), abs=0.05) and 0 <= below.sum() < 6
    with pytest.raises(ValueError, match="one_shot reads its cut from images of the server's own"):
        attack.plant(model, DIGITS.image_shape, None, rng)


def test_fishing_refuses_what_it_can_not_change(rng):
    shape = DIGITS.image_shape
    attack = Fishing(target=2)
    sent, hook = attack.plant(network(), shape, None, rng)
    with pytest.raises(ValueError, match="the last layer has no row but one: it is planted already"):
        attack.plant(sent, shape, None, rng)
    with pytest.raises(ValueError, match="no class 12 to fish for: the model has classes 0 to 9"):
        Fishing(target=12).plant(network(), shape, None, rng)
    pooled = models.wrap(nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), num_classes=10)
    with pytest.raises(NotApplicableError, match="a dense last layer, and this model does not end in one"):
        attack.plant(pooled, shape, None, rng)
    with pytest.raises(NotApplicableError, match="the last layer has no bias"):
        attack.plant(network("cnn6"), shape, None, rng)
    batch = DIGITS.batch(range(4))
    obs = observe(network(), batch, threat=SERVER, trapdoor="net.0", rng=rng)
    with pytest.raises(NotApplicableError, match="not of a model that Fishing has planted"):
        attack(obs, rng)
    assert hook.cut is None


def test_fishing_refuses_a_batch_norm_that_mixes_images(rng):
    attack, batch = Fishing(target=0), DIGITS.batch(range(4))
    sent, hook = attack.plant(network("resnet20"), DIGITS.image_shape, None, rng)
    obs = observe(sent.train(), batch, threat=SERVER, trapdoor=hook, rng=rng)
    with pytest.raises(NotApplicableError, match="no image has a gradient of its own"):
        attack(obs, rng)


def test_a_study_asks_until_one_image_is_left():
    attack = Fishing(target=3, surrogates=64)
    case = Case(attack, "mlp", "digits", tuple(range(40)), threat=ROUNDS, rounds=10, clients=4, double=True)
    record, _ = attempt(case, None, "cpu")
    assert record["notes"]["rounds"] < 10 and record["returned"] == 1
    assert max(v for v in record["psnr"] if v is not None) > 100
    once = dataclasses.replace(case, rounds=2)
    assert attempt(once, None, "cpu")[0]["notes"]["rounds"] == 2


# LOKI


def share(k, B, T):
    """Of B images a client, in T steps, those that come back from k bins of equal mass."""
    b, free = B / T, 1 - 1 / k
    return b * free ** (b - 1) * (1 - free**B) / (1 - free**b) / B


def test_the_share_of_the_formula():
    assert share(256, 64, 8) == pytest.approx(0.875, abs=1e-3)  # the demo's 560 of 640
    assert share(256, 64, 1) == pytest.approx((255 / 256) ** 63)


class Uniform:
    """Images of one brightness each, U(.1, .9), and a little noise."""

    hash = "uniform"

    def draw(self, n, rng):
        shape = (n, 3, 8, 8)
        noise = torch.rand(*shape, generator=rng) - 0.5
        noise -= noise.mean((1, 2, 3), keepdim=True)
        images = 0.1 + 0.8 * torch.rand(n, 1, 1, 1, generator=rng) + 0.1 * noise
        return images, torch.arange(n) % 4


def loki(steps, size=16, clients=4, bins=64, attack=None, lr=1e-2, seed=0, mean=0.45, std=0.25):
    rng, attack = torch.Generator().manual_seed(seed), attack or LOKI(clients=clients, bins=bins)
    model = models.build("lenet", num_classes=4, image_shape=(3, 8, 8), seed=seed, mean=mean, std=std).double()
    sent, trap = attack.plant(model, (3, 8, 8), Uniform(), rng)
    batches = [Batch(*Uniform().draw(size, rng)) for _ in range(clients)]
    client = Client(steps=steps, lr=lr, local_batch=size // steps) if steps > 1 else Client()
    obs = observe(sent, batches, client=client, threat=OWN, trapdoor=trap, auxiliary=Uniform(), rng=rng)
    truth = Batch(torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]))
    return attack, obs, truth, rng


@pytest.mark.parametrize("steps", [1, 4])
def test_loki_recovers_the_share_of_the_formula_from_the_mean_over_clients(steps):
    found, expected = [], share(64, 16, steps)
    for seed in range(4):
        attack, obs, truth, rng = loki(steps, seed=seed)
        rec = attack(obs, rng)
        scores = evaluate(rec, truth, download=False)
        found += [p > 30 for p in scores.psnr.nan_to_num().tolist()]
        assert rec.notes["clients_seen"] == 4 and len(rec.images) <= attack.at_most(obs) == 64
    spread = math.sqrt(expected * (1 - expected) / len(found))
    assert abs(sum(found) / len(found) - expected) < 3 * spread


def test_a_small_scale_lets_clients_mix():
    small, large = (loki(4, attack=LOKI(clients=4, bins=64, scale=s)) for s in (1.0, 500.0))
    lit = [attack(obs, rng).notes["lit_bins"] for attack, obs, _, rng in (small, large)]
    assert lit[0] > 64 >= lit[1]


def test_loki_refuses(rng):
    model = models.build("lenet", num_classes=4, image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="LOKI's bins are quantiles of the brightness"):
        LOKI().plant(model, (3, 8, 8), None, rng)
    planted, trapdoor = RobbingTheFed(bins=4, surrogates=16).plant(model, (3, 8, 8), Uniform(), rng)
    with pytest.raises(ValueError, match="the model is planted already"):
        LOKI().plant(planted, (3, 8, 8), Uniform(), rng)

    class Same(Uniform):
        def draw(self, n, rng):
            return torch.full((n, 3, 8, 8), 0.5), torch.zeros(n, dtype=torch.int64)

    with pytest.raises(ValueError, match="256 bins have no width on 10000 images"):
        LOKI().plant(model, (3, 8, 8), Same(), rng)
    batch = Batch(*Uniform().draw(4, rng))
    obs = observe(planted, batch, threat=SERVER, trapdoor=trapdoor, rng=rng)
    with pytest.raises(NotApplicableError, match="not of a model that LOKI has planted"):
        LOKI()(obs, rng)
