"""What a malicious server plants: imprints, trap weights, QBI; exact where one image lights a row alone."""

import dataclasses

import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, metrics, models, observe
from gi_lib.attacks import QBI, RobbingTheFed, TrapWeights, qbi, robbing_the_fed
from gi_lib.defenses import GaussianNoise
from gi_lib.models.planted import planted_rows
from tests.test_attacks import Noise

SHAPE = (3, 12, 12)
MALICIOUS = ThreatModel(malicious_server=True)
pytestmark = pytest.mark.filterwarnings("ignore:the closed form does not hold")


class Bright(Noise):
    """Noise of random brightness."""

    def __init__(self):
        super().__init__(*SHAPE)

    def draw(self, n, rng):
        images, labels = super().draw(n, rng)
        return images * torch.rand(n, 1, 1, 1, generator=rng), labels


def batch_of(size, rng):
    return Batch(Bright().draw(size, rng)[0], torch.arange(size) % 5)


def model_of(name, **normalised):
    return models.build(name, num_classes=5, image_shape=SHAPE, seed=1, **normalised).double()


def attacked(attack, model, batch, rng, auxiliary=None, **settings):
    """The observation, what came back, and which of the images came back exactly."""
    planted, trapdoor = attack.plant(model, SHAPE, auxiliary, rng)
    obs = observe(planted, batch, threat=settings.pop("threat", MALICIOUS), trapdoor=trapdoor, rng=rng, **settings)
    rec = attack(obs, rng)
    matched = metrics.align(rec.images, batch.images)
    exact = torch.zeros(len(batch), dtype=torch.bool)
    if (hit := matched >= 0).any():
        exact[hit] = metrics.psnr(rec.images[matched[hit]], batch.images[hit]) > 100
    return obs, rec, exact


def lit(obs, batch, rows):
    """Which image lights which row, by the truth."""
    W, b = (p[:rows] for p in planted_rows(obs))
    z = ((batch.images.double() - obs.model.mean) / obs.model.std).flatten(1)
    return z @ W.T + b > 0


# Imprints


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "measurement", [robbing_the_fed.brightness, robbing_the_fed.CosineRow(3), robbing_the_fed.random_row]
)
def test_an_image_alone_in_its_bin_is_exact_whatever_is_measured(measurement, sparse, rng):
    attack = RobbingTheFed(bins=32, surrogates=2000, measurement=measurement, sparse=sparse)
    batch = batch_of(12, rng)
    model = model_of("lenet", mean=0.4, std=0.3)
    obs, rec, exact = attacked(attack, model, batch, rng, Bright())
    h = planted_rows(obs)[0][0]
    rows = planted_rows(obs)[1] / (planted_rows(obs)[0] @ h / (h @ h))  # biases of the unscaled rows
    measured = ((batch.images.double() - obs.model.mean) / obs.model.std).flatten(1) @ h
    bins = torch.bucketize(measured, -rows[1:].contiguous())
    assert torch.equal(exact, bins.bincount(minlength=32)[bins] == 1)
    assert exact.sum() >= 3 and rec.notes["lit_bins"] == len(bins.unique())


def test_the_cosine_row_is_that_of_the_transform():
    from scipy.fft import dct

    row = robbing_the_fed.CosineRow(5)(48, torch.Generator())
    x = torch.rand(48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (row @ x).item() == pytest.approx(dct(x.numpy())[5] / 2 / 48)


def test_local_steps_leave_a_sparse_row_to_its_own_bin(rng):
    """The plain rows move across each other, so that their differences are of several images."""
    batch, client = batch_of(12, rng), Client(steps=6, lr=0.1, local_batch=4, shuffle=True)
    lit_bins, found = {}, {}
    for sparse in (False, True):
        attack, own = RobbingTheFed(bins=64, sparse=sparse), torch.Generator().manual_seed(3)
        _, rec, exact = attacked(attack, model_of("lenet"), batch, own, Bright(), client=client)
        lit_bins[sparse], found[sparse] = rec.notes["lit_bins"], int(exact.sum())
    assert lit_bins[True] <= 12 < lit_bins[False] and found[True] == 8 > found[False]


def test_more_images_than_bins_are_noted(rng):
    for size, crowded in ((4, None), (5, True)):
        _, rec, _ = attacked(
            RobbingTheFed(bins=4, surrogates=64), model_of("lenet"), batch_of(size, rng), rng, Bright()
        )
        assert rec.notes.get("crowded") is crowded


def test_bins_without_width_are_refused(rng):
    class Same(Noise):
        def draw(self, n, rng):
            return torch.full((n, *SHAPE), 0.5), torch.zeros(n, dtype=torch.int64)

    with pytest.raises(ValueError, match="62 of 64 bins are empty of width.*take fewer bins, or another measurement"):
        RobbingTheFed(bins=64).plant(model_of("lenet"), SHAPE, Same(*SHAPE), rng)


def test_a_planted_model_is_not_planted_again(rng):
    planted, _ = RobbingTheFed(bins=4, surrogates=64).plant(model_of("lenet"), SHAPE, Bright(), rng)
    for attack in (RobbingTheFed(bins=4, surrogates=64), TrapWeights(rows=8)):
        with pytest.raises(ValueError, match="the model is planted already.*plant on the model as it was"):
            attack.plant(planted, SHAPE, Bright(), rng)


@pytest.mark.parametrize("attack", [RobbingTheFed(bins=8, surrogates=64), TrapWeights(rows=8)])
def test_a_trapdoor_of_another_model_is_an_error(attack, rng):
    _, trapdoor = attack.plant(model_of("lenet"), SHAPE, Bright(), rng)
    for name in ("lenet", "mlp"):
        obs = observe(model_of(name), batch_of(2, rng), threat=MALICIOUS, trapdoor=trapdoor, rng=rng)
        with pytest.raises(
            NotApplicableError, match=r"let clients train the .* that `plant` returned|no gradient|begins"
        ):
            attack(obs, rng)


# Rows


ROWS = [
    (TrapWeights(rows=200, scale=0.9), None),
    (QBI(rows=200, batch=8, mean=0.25, std=0.25), None),
    (QBI(rows=200, batch=8, rule=qbi.quantiles), Bright()),
    (QBI(rows=200, batch=8, rule=qbi.pairs, surrogates=400), Bright()),
]


@pytest.mark.parametrize(("attack", "auxiliary"), ROWS, ids=["trap", "qbi", "quantiles", "pairs"])
@pytest.mark.parametrize(
    ("name", "normalised"), [("mlp", {}), ("mlp", {"mean": 0.4, "std": 0.3}), ("lenet", {"mean": 0.4, "std": 0.3})]
)
def test_an_image_alone_in_a_row_is_exact(attack, auxiliary, name, normalised, rng):
    batch = batch_of(8, rng)
    obs, rec, exact = attacked(attack, model_of(name, **normalised), batch, rng, auxiliary)
    on = lit(obs, batch, 200)
    alone = (on & (on.sum(0) == 1)).any(1)
    assert alone.sum() >= 2
    assert torch.equal(exact, alone) and rec.notes["lit_rows"] >= on.any(0).sum()
    assert rec.notes["agreed"] <= exact.sum() <= len(rec.images) <= 8


def test_parameters_alone_change_where_the_first_layer_is_dense(rng):
    model = model_of("mlp")
    planted, name = TrapWeights(rows=200).plant(model, SHAPE, None, rng)
    changed = [k for k, v in planted.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert name == "net.1" and changed == ["net.1.weight", "net.1.bias"]
    own, theirs = (dict(m.named_parameters())["net.1.weight"] for m in (model, planted))
    assert torch.equal(own[200:], theirs[200:]) and (own[:200] != theirs[:200]).any(1).all()
    assert planted.state_dict().keys() == model.state_dict().keys()


def test_a_relu_in_place_is_a_relu(rng):
    layers = [nn.Flatten(), nn.Linear(432, 40), nn.ReLU(inplace=True), nn.Linear(40, 5)]
    _, name = TrapWeights(rows=10).plant(models.wrap(nn.Sequential(*layers), num_classes=5), SHAPE, None, rng)
    assert name == "net.1"


@pytest.mark.parametrize("first", [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(432, 40), nn.Sigmoid())])
def test_any_other_model_gets_a_front(first, rng):
    """Without a dense first layer, or without its ReLU."""
    net = nn.Sequential(first, nn.Flatten(), nn.LazyLinear(5))
    net(torch.zeros(1, *SHAPE))
    planted, name = TrapWeights(rows=10).plant(models.wrap(net, num_classes=5), SHAPE, None, rng)
    assert name == "net.front.measure"
    x = torch.rand(2, *SHAPE, generator=rng)
    assert planted(x).shape == (2, 5) and len(planted.net.front.measure.weight) == 10


def test_a_dense_layer_with_fewer_rows_takes_as_many_as_it_has(rng):
    _, rec, exact = attacked(TrapWeights(rows=5000, scale=0.9), model_of("mlp"), batch_of(4, rng), rng)
    assert exact.any() and rec.notes["lit_rows"] <= 1024


def test_trap_weights_are_mirrored(rng):
    """Half of the pixels -m, half s m with the same m, whatever the model normalises by."""
    model = model_of("mlp", mean=0.4, std=0.3)
    planted, _ = TrapWeights(rows=50, scale=0.8, sigma=2.0).plant(model, SHAPE, None, rng)
    row = (planted.net[1].weight[:50] / 0.3).detach()
    minus, plus = (
        torch.stack([r[keep].abs().sort().values for r, keep in zip(row, k, strict=True)]) for k in (row < 0, row > 0)
    )
    torch.testing.assert_close(plus, 0.8 * minus)
    assert minus.shape == (50, 216) and minus.square().mean().sqrt().item() == pytest.approx(2.0, rel=0.03)
    raw = planted.net[1].bias[:50] - (planted.net[1].weight[:50] * 0.4 / 0.3).sum(1)
    assert raw.abs().max() < 1e-5  # the model's mean and std are of float32


def test_qbi_lights_a_row_once_a_batch(rng):
    """On pixels that are independent, as its equation has it; so do the quantiles on any data."""
    x = Noise(*SHAPE).draw(2000, rng)[0].double()
    for attack, auxiliary in (
        (QBI(batch=20, mean=0.5, std=12**-0.5), None),
        (QBI(batch=20, rule=qbi.quantiles), Noise(*SHAPE)),
    ):
        planted, _ = attack.plant(model_of("mlp"), SHAPE, auxiliary, rng)
        rate = (planted.net[1](x.flatten(1))[:, :1000] > 0).double().mean().item()
        assert rate == pytest.approx(1 / 20, rel=0.05)


def test_pairs_light_more_batches_by_exactly_one_image(rng):
    x = Bright().draw(4000, rng)[0].double()
    share = {}
    for rule in (qbi.quantiles, qbi.pairs):
        attack = QBI(rows=100, batch=10, rule=rule)
        planted, _ = attack.plant(model_of("mlp"), SHAPE, Bright(), torch.Generator().manual_seed(1))
        on = (planted.net[1](x.flatten(1))[:, :100] > 0).reshape(-1, 10, 100).sum(1)
        share[rule] = (on == 1).double().mean().item()
    assert share[qbi.pairs] > share[qbi.quantiles]


def test_qbi_says_what_it_must_know(rng):
    with pytest.raises(ValueError, match="this model does not normalise by them; give mean and std"):
        QBI().plant(model_of("mlp"), SHAPE, None, rng)
    with pytest.raises(ValueError, match="this rule of QBI fits biases to images of the server's own"):
        QBI(rule=qbi.quantiles).plant(model_of("mlp"), SHAPE, None, rng)
    with pytest.raises(ValueError, match="PAIRS needs a batch of 100 images of the server's own, got 50"):
        QBI(rule=qbi.pairs, surrogates=50).plant(model_of("mlp"), SHAPE, Bright(), rng)


def test_where_nothing_is_an_image_nothing_comes_back(rng):
    """Noise lights every row, and its ratios are no images."""
    noise = {"defense": GaussianNoise(1.0)}
    _, rec, _ = attacked(TrapWeights(rows=50), model_of("mlp"), batch_of(4, rng), rng, **noise)
    assert rec.images.shape == (0, *SHAPE) and rec.notes["agreed"] == 0 and rec.notes["lit_rows"] == 50


def test_the_batch_size_may_be_unknown(rng):
    threat = dataclasses.replace(MALICIOUS, knows_batch_size=False)
    _, rec, exact = attacked(TrapWeights(rows=200, scale=0.9), model_of("mlp"), batch_of(4, rng), rng, threat=threat)
    assert exact.any() and len(rec.images) <= 200
