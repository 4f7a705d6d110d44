"""VGIA's certificate, true of one record and of no two, and ARES, which reads what an inner layer sees."""

import math

import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, data, metrics, models, observe
from gi_lib.attacks import ARES, VGIA, RobbingTheFed, ares
from gi_lib.attacks.vgia import slabs
from gi_lib.defenses import GaussianNoise
from gi_lib.models.planted import act_alike
from tests.test_planted import MALICIOUS, SHAPE, Bright, attacked, batch_of, model_of

pytestmark = pytest.mark.filterwarnings("ignore:the closed form does not hold")


def slab_of(batch, planted, name, families, slabs=64):
    """Which slab each image is in, by the truth: how many thresholds light for it."""
    z = ((batch.images.to(planted.mean) - planted.mean) / planted.std).flatten(1)
    layer = planted.get_submodule(name)
    on = z @ layer.weight.T + layer.bias > 0
    return on[:, : slabs * families : families].sum(1) - 1


# The test itself


def rows_of(deltas, images, above=3):
    """Gradients [2, m, n + 1] of families at two thresholds: `images` in slab 0, and some others above both."""
    rng = torch.Generator().manual_seed(1)
    x = torch.cat([images, torch.rand(above, images.shape[1], generator=rng)])
    d = torch.cat([deltas, torch.randn(above, deltas.shape[1], generator=rng)])
    x1 = torch.cat([x, torch.ones(len(x), 1)], 1)
    return torch.stack([d.T @ x1, d[len(images) :].T @ x1[len(images) :]])


def verdict(deltas, images):
    return slabs(rows_of(torch.tensor(deltas), images)).single[0].item()


@pytest.mark.parametrize("families", [2, 3, 5])
def test_a_slab_of_one_is_certified_and_its_record_exact(families, rng):
    x = torch.rand(1, 300, generator=rng)
    found = slabs(rows_of(torch.randn(1, families, generator=rng), x))
    assert found.single.tolist() == [True, False] and found.lit.all()
    torch.testing.assert_close(found.records[:1], x, rtol=0, atol=1e-5)


def test_a_slab_of_several_is_not_certified(rng):
    for size in (2, 3, 6):
        found = slabs(rows_of(torch.randn(size, 2, generator=rng), torch.rand(size, 300, generator=rng)))
        assert not found.single.any() and found.lit.all()


def test_pairs_that_are_nearly_one_record_are_told_apart(rng):
    """Loss slopes a tenth of a degree apart, of equal size; or images a grey level apart; or one far fainter."""
    x, y = torch.rand(2, 300, generator=rng)
    angle = math.radians(0.1)
    assert not verdict([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], torch.stack([x, y]))
    assert not verdict([[1.0, 0.0], [0.3, 0.8]], torch.stack([x, x + (y - 0.5).sign() / 255]))
    assert not verdict([[1.0, 0.0], [0.0, 1e-3]], torch.stack([x, y]))


def test_what_the_test_cannot_see(rng):
    """A record and its copy pass, as does a pair that the network treats in the same proportion."""
    x, y = torch.rand(2, 300, generator=rng)
    assert verdict([[1.0, 0.2], [0.3, 0.8]], torch.stack([x, x]))
    assert verdict([[1.0, 0.5], [2.0, 1.0]], torch.stack([x, y]))


def test_a_record_under_the_rounding_is_not_certified(rng):
    """It is so faint that its picture would not be exact."""
    x = torch.rand(1, 300, generator=rng)
    assert verdict([[1.0, 0.5]], x) and not verdict([[1e-4, 5e-5]], x)
    assert not slabs(torch.zeros(4, 2, 301)).lit.any()


# In networks


@pytest.mark.parametrize("families", [2, 3])
@pytest.mark.parametrize(
    ("name", "normalised"), [("mlp", {}), ("mlp", {"mean": 0.4, "std": 0.3}), ("lenet", {"mean": 0.4, "std": 0.3})]
)
def test_the_certified_are_those_alone_in_a_slab(name, normalised, families, rng):
    attack, batch = VGIA(slabs=64, families=families), batch_of(24, rng)
    obs, rec, exact = attacked(attack, model_of(name, **normalised), batch, rng, Bright())
    slab = slab_of(batch, obs.model, obs.trapdoor, families)
    alone = slab.bincount(minlength=64)[slab] == 1
    assert 4 <= alone.sum() < 24 and torch.equal(exact, alone)
    assert len(rec.images) == rec.notes["single"] == alone.sum()
    assert rec.notes["lit"] == len(slab.unique()) and rec.notes["slabs"] == 64


@pytest.mark.parametrize(("dataset", "size"), [("digits", 24), ("photos", 16)])
def test_real_images_in_float32(dataset, size, rng):
    """A share near that of the formula comes back, and nothing else."""
    own, batch = data.Surrogate(data.load(dataset, split="train")), data.load(dataset).batch(range(size))
    shape = tuple(batch.images.shape[1:])
    model = models.build("mlp", num_classes=10, image_shape=shape, seed=1)
    attack = VGIA(slabs=100, surrogates=1000)
    sent, hook = attack.plant(model, shape, own, rng)
    batch = Batch(batch.images, batch.labels % 10)
    rec = attack(observe(sent, batch, threat=MALICIOUS, trapdoor=hook, rng=rng), rng)
    hit = metrics.align(rec.images, batch.images) >= 0
    dB = metrics.psnr(rec.images[metrics.align(rec.images, batch.images)[hit]], batch.images[hit])
    assert hit.sum() == len(rec.images) == rec.notes["single"] >= size / 2 and (dB > 60).all()


def test_mirrored_pairs_of_one_class_are_never_certified(rng):
    """The same brightness, the same label, a share of the same pixels: no slab holds one."""
    half = data.load("digits").batch(range(11))
    batch = Batch(torch.cat([half.images, half.images.flip(3)]), half.labels.repeat(2))
    own, shape = data.Surrogate(data.load("digits", split="train")), (1, 8, 8)
    model = models.build("mlp", num_classes=10, image_shape=shape, seed=1)
    attack = VGIA(slabs=100)
    sent, hook = attack.plant(model, shape, own, rng)
    slab = slab_of(batch, sent, hook, 2, slabs=100)
    assert torch.equal(slab[:11], slab[11:])  # no pair is split by rounding
    rec = attack(observe(sent, batch, threat=MALICIOUS, trapdoor=hook, rng=rng), rng)
    assert rec.notes["lit"] == len(slab.unique()) >= 8
    assert rec.notes["single"] == 0 and rec.images.shape == (0, *shape)


def test_noise_is_not_certified(rng):
    _, rec, _ = attacked(VGIA(slabs=64), model_of("mlp"), batch_of(8, rng), rng, Bright(), defense=GaussianNoise(1e-6))
    assert rec.notes["single"] == 0 < rec.notes["lit"]


@pytest.mark.parametrize("lr", [0.1, 0.001])
@pytest.mark.parametrize("steps", [2, 4])
def test_what_local_steps_mix_is_not_certified(lr, steps, rng):
    """After a step the columns of neighbours have moved apart, by the same in every family: a mixture of rank one."""
    batch, client = batch_of(8, rng), Client(steps=steps, lr=lr, local_batch=4, shuffle=True)
    _, rec, _ = attacked(VGIA(slabs=64), model_of("mlp"), batch, rng, Bright(), client=client)
    matched = metrics.align(rec.images, batch.images)
    hit = matched >= 0
    assert hit.sum() == len(rec.images) == rec.notes["single"]
    assert (metrics.psnr(rec.images[matched[hit]], batch.images[hit]) > 60).all()


def test_a_shared_direction_is_not_certified(rng):
    x = torch.rand(1, 300, generator=rng)
    assert not verdict([[1.0, 1.0]], x) and verdict([[1.0, 0.9]], x)


def test_parameters_alone_change_where_the_first_layer_is_dense(rng):
    for attack, changes in (
        (VGIA(slabs=64), {"net.1.weight", "net.1.bias", "net.3.weight"}),
        (ARES(bins=64), {f"net.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")} | {"net.5.weight"}),
    ):
        model = model_of("mlp")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        sent, _ = attack.plant(model, SHAPE, Bright(), rng)
        after = sent.state_dict()
        assert after.keys() == before.keys()
        assert {k for k, v in after.items() if not torch.equal(v, before[k])} == changes
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_neurons_of_a_family_act_alike(rng):
    model = model_of("mlp")
    before = model.net[3].weight.detach().clone()
    assert act_alike(model, "net.1", SHAPE, torch.arange(6) % 2, 0.5) == 1024
    after = model.net[3].weight
    assert torch.equal(after[:, :6], 0.5 * before[:, [0, 1, 0, 1, 0, 1]]) and torch.equal(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("attack", [VGIA(slabs=5000), ARES(bins=5000)])
def test_a_layer_with_fewer_rows_takes_as_many_as_it_has(attack, rng):
    _, rec, _ = attacked(attack, model_of("mlp"), batch_of(4, rng), rng, Bright())
    assert 1 <= len(rec.images) <= 4 and rec.notes.get("slabs", 512) == 512


@pytest.mark.parametrize("attack", [VGIA(slabs=4), ARES(bins=4)])
def test_a_batch_of_more_images_than_slabs(attack, rng):
    """Hardly any is alone; the certificate returns nothing then, and nothing returns more than there are slabs."""
    _, rec, exact = attacked(attack, model_of("mlp"), batch_of(40, rng), rng, Bright())
    assert len(rec.images) <= 4
    assert not isinstance(attack, VGIA) or len(rec.images) == exact.sum() == 0


def test_a_planted_model_is_not_planted_again(rng):
    """A second front is refused, and a front of a server's own is no layer of the model's."""
    model = model_of("lenet")
    for sent in (attack.plant(model, SHAPE, Bright(), rng)[0] for attack in (RobbingTheFed(bins=4), VGIA(slabs=4))):
        with pytest.raises(ValueError, match="the model is planted already.*plant on the model as it was"):
            VGIA(slabs=8).plant(sent, SHAPE, Bright(), rng)
        with pytest.raises(NotApplicableError, match="this model has none"):
            ARES(bins=8).plant(sent, SHAPE, Bright(), rng)


def test_what_is_missing_is_said(rng):
    for attack in (VGIA(), ARES()):
        with pytest.raises(ValueError, match="images of the server's own; give it auxiliary data"):
            attack.plant(model_of("mlp"), SHAPE, None, rng)
    with pytest.raises(NotApplicableError, match="a layer of 2 units, so that all images act .* the same proportion"):
        VGIA(slabs=8).plant(models.build("fc2", num_classes=2, image_shape=SHAPE), SHAPE, Bright(), rng)
    with pytest.raises(NotApplicableError, match="need 600 rows, and the first layer has 256; take fewer families"):
        VGIA(families=300).plant(models.build("fc2", num_classes=5, image_shape=SHAPE), SHAPE, Bright(), rng)
    tail = [nn.Flatten(), nn.Linear(432, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 5)]
    with pytest.raises(NotApplicableError, match="what follows is not a ReLU and a dense layer; plant rows that"):
        VGIA(slabs=8).plant(models.wrap(nn.Sequential(*tail), num_classes=5), SHAPE, Bright(), rng)


def convolutions(*first, bias=True):
    """Convolutions, two dense layers and a ReLU between them."""
    return nn.Sequential(*first, nn.Flatten(), nn.LazyLinear(64, bias=bias), nn.ReLU(), nn.Linear(64, 5))


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (models.build("lenet", num_classes=5, image_shape=SHAPE).net, "this model has none"),
        (models.build("fc2", num_classes=5, image_shape=SHAPE).net, "this model has none"),
        (convolutions(nn.Conv2d(3, 8, 3), nn.ReLU(), bias=False), "this model has none"),
        (convolutions(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU()), "a Conv2d among them has none"),
        (convolutions(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)), "no affine measurement .* behind a max pool"),
    ],
    ids=["no inner layer", "no hidden layer behind", "no bias", "no bias before", "max pool"],
)
def test_ares_says_what_it_must_have(net, says, rng):
    net(torch.zeros(1, *SHAPE))
    with pytest.raises(NotApplicableError, match=says):
        ARES(bins=8).plant(models.wrap(net, num_classes=5), SHAPE, Bright(), rng)


@pytest.mark.parametrize("attack", [VGIA(slabs=8), ARES(bins=8)])
def test_a_model_without_the_plant_is_an_error(attack, rng):
    _, trapdoor = attack.plant(model_of("mlp"), SHAPE, Bright(), rng)
    for name in ("lenet", "mlp"):
        obs = observe(model_of(name), batch_of(2, rng), threat=MALICIOUS, trapdoor=trapdoor, rng=rng)
        with pytest.raises(NotApplicableError, match="let clients train the (one|model) that `plant` returned|begins"):
            attack(obs, rng)


# ARES


def test_an_image_alone_in_its_bin_comes_back_where_equations_are_enough(rng):
    """1,024 activations of 432 pixels in `mlp`; a mean pool behind a convolution leaves details to more iterations."""
    net = convolutions(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    net(torch.zeros(1, *SHAPE))
    batch = batch_of(8, rng)
    pooled = models.wrap(net, mean=0.4, std=0.3, num_classes=5).double()
    for model, least in ((model_of("mlp", mean=0.4, std=0.3), 60), (pooled, 30)):
        own = torch.Generator().manual_seed(2)
        obs, rec, _ = attacked(ARES(bins=256, iterations=1000), model, batch, own, Bright())
        a = ares.inputs(obs.model, obs.trapdoor.layer, batch.images.double())
        layer = obs.model.get_submodule(obs.trapdoor.layer)
        bins = (a @ layer.weight.T + layer.bias > 0)[:, :256].sum(1)
        alone = bins.bincount()[bins] == 1
        assert rec.notes["lit_bins"] == len(bins.unique()) and rec.notes["equations"] == a.shape[1]
        dB = torch.zeros(8).double()
        matched = metrics.align(rec.images, batch.images)
        dB[matched >= 0] = metrics.psnr(rec.images[matched[matched >= 0]], batch.images[matched >= 0])
        assert alone.sum() >= 4 and (dB[alone] > least).all(), dB


def test_the_transform_is_orthonormal_and_that_of_scipy(rng):
    from scipy.fft import dctn

    x = torch.rand(2, 3, 8, 12, generator=rng, dtype=torch.float64)
    alpha = ares.cosine(x)
    torch.testing.assert_close(ares.cosine(alpha, inverse=True), x)
    expected = torch.from_numpy(dctn(x.numpy(), axes=(1, 2, 3), norm="ortho"))
    torch.testing.assert_close(alpha, expected)


def test_fista_finds_sparse_coefficients_of_all_images_at_once(rng):
    """12 of 200 coefficients from 80 equations; each as it is found alone."""
    M = torch.randn(80, 200, generator=rng, dtype=torch.float64) / 80**0.5
    alpha = torch.zeros(3, 200, dtype=torch.float64)
    alpha[:, :12] = torch.randn(3, 12, generator=rng, dtype=torch.float64)
    alpha = torch.stack([row[torch.randperm(200, generator=rng)] for row in alpha])
    found = ares.fista(M, alpha @ M.T, torch.ones(200).double(), 3000)
    assert (found - alpha).norm() < 1e-3 * alpha.norm()
    alone = ares.fista(M, alpha[1:2] @ M.T, torch.ones(200).double(), 3000)
    torch.testing.assert_close(alone, found[1:2])


def test_fista_meets_the_conditions_of_the_lasso(rng):
    """At the last lambda the residual's correlation is lambda D where alpha is not zero, and no more elsewhere."""
    M, y = torch.randn(30, 60, generator=rng).double(), torch.randn(2, 30, generator=rng).double()
    D = 0.5 + torch.rand(60, generator=rng).double()
    before = ares.LAST
    try:
        ares.LAST = ares.FIRST  # one lambda throughout
        alpha = ares.fista(M, y, D, 5000)
    finally:
        ares.LAST = before
    lam = ares.FIRST * (y @ M / D).abs().amax(1, keepdim=True)
    slope = (y - alpha @ M.T) @ M / (lam * D)
    torch.testing.assert_close(slope[alpha != 0], alpha[alpha != 0].sign(), rtol=0, atol=1e-6)
    assert (slope.abs() <= 1 + 1e-6).all() and 0 < (alpha != 0).sum() < alpha.numel()


def test_own_spectra_help_where_equations_are_few():
    """p = 1 weighs a coefficient by how large it is in the server's own photographs; 200 equations of 768 pixels."""
    photos = data.load("photos", size=16)
    own, batch = data.Surrogate(data.load("photos", split="train", size=16)), photos.batch([1, 8, 15, 22])
    model = models.build("dense6", num_classes=photos.num_classes, image_shape=photos.image_shape, seed=1)
    dB = {}
    for p in (0.0, 1.0):
        attack, rng = ARES(p=p), torch.Generator().manual_seed(1)
        sent, hook = attack.plant(model, photos.image_shape, own, rng)
        rec = attack(observe(sent, batch, threat=MALICIOUS, trapdoor=hook, rng=rng), rng)
        matched = metrics.align(rec.images, batch.images)
        dB[p] = metrics.psnr(rec.images[matched], batch.images).mean().item()
    assert dB[1.0] > dB[0.0] + 2 and dB[0.0] > 15, dB
