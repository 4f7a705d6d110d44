"""SPEAR and SPEAR++: exact where lambda is 1, an error or a note where it is not. The cocktail party attack."""

import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, data, evaluate, models, observe
from gi_lib.attacks import SPEAR, CocktailFeatures, CocktailParty, SPEARpp, cocktail, spear
from gi_lib.copies import input_of
from gi_lib.defenses import GaussianNoise

SHAPE = (3, 10, 10)
pytestmark = pytest.mark.filterwarnings("ignore:the closed form does not hold")


def network(width=120, act=nn.ReLU, bias=True, classes=5):
    """Three dense layers on 300 pixels; float64."""
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(300, width, bias=bias),
        act(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )
    rng = torch.Generator().manual_seed(0)
    for layer in net:
        if isinstance(layer, nn.Linear):
            models.torch_default(layer, rng)
    return models.wrap(net, mean=0.5, std=0.3, num_classes=classes).double().eval()


def images(size, rng):
    return Batch(torch.rand(size, *SHAPE, generator=rng).double(), torch.arange(size) % 5)


def seen(size, rng, model=None, dtype=torch.float64, **how):
    batch = images(size, rng)
    model = (model or network()).to(dtype)
    return observe(model, batch, threat=ThreatModel(knows_batch_size=False), rng=rng, **how), batch


@pytest.mark.parametrize("attack", [SPEAR(), SPEARpp()], ids=["spear", "spear_pp"])
@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 140), (torch.float32, 100)])
def test_a_batch_is_exact_and_certified_by_both(attack, size, dtype, least, rng):
    obs, batch = seen(size, rng, dtype=dtype)
    rec = attack(obs, rng)
    assert evaluate(rec, batch, download=False).psnr.min() > least
    assert rec.notes["lambda"] == 1 and rec.notes["certified"]
    assert rec.images.dtype == dtype and rec.notes["relative_error"] < 1e-4


def test_more_images_than_draws_can_separate_are_exact_by_the_dictionary(rng):
    obs, batch = seen(14, rng)
    rec = SPEARpp()(obs, rng)
    assert evaluate(rec, batch, download=False).psnr.min() > 140 and rec.notes["certified"]
    with pytest.raises(ValueError, match="of 14 columns were found in 2000 draws, and an image needs them all"):
        SPEAR(draws=2000)(obs, rng)


def test_null_vectors_are_null_and_unit(rng):
    A = torch.randn(7, 4, 5, generator=rng).double()
    q = spear.null_vectors(A)
    assert (A @ q[..., None]).abs().max() < 1e-12
    torch.testing.assert_close(q.norm(dim=1), torch.ones(7).double())


def test_the_mixture_is_the_gradient_of_the_first_layer(rng):
    """L Q has the zeros of the ReLU, for the Q of the truth; Q 1 = p, since the bias gradient is the sum."""
    obs, batch = seen(4, rng)
    mixed = spear.mixture(obs)
    x = ((batch.images - 0.5) / 0.3).flatten(1)
    Q = mixed.R @ torch.linalg.pinv(x)  # R = Q X
    above = x @ obs.model.net[1].weight.T + obs.model.net[1].bias > 0
    assert mixed.rank == 4 and mixed.dark == (~above).all(0).sum()
    lit = (mixed.L @ Q).abs() > 1e-9
    assert torch.equal(lit.T, above[:, above.any(0)])
    torch.testing.assert_close(Q.sum(1), mixed.p, rtol=1e-4, atol=1e-7)  # mean and std are float32 numbers


def test_a_wrong_column_is_exchanged(rng):
    """The choice begins with the candidates that come first, and lambda finds the better ones behind them."""
    obs, _ = seen(3, rng)
    mixed = spear.mixture(obs)
    draws = torch.stack([torch.randperm(len(mixed.L), generator=rng)[:2] for _ in range(200)])
    q = spear.sparsest(mixed, spear.null_vectors(mixed.L[draws]), 0.34)
    assert len(q) == 3
    wrong = torch.nn.functional.normalize(q[:1] + q[1:2])
    _, share = spear.chosen(mixed, torch.cat([wrong, q]))
    assert share == 1
    _, share = spear.chosen(mixed, torch.cat([wrong, q[1:]]))
    assert share < 1


def test_mixtures_of_images_that_leave_the_same_rows_dark_do_not_keep_columns_out():
    """Pixels that are all positive light the same rows; vectors in the plane of two columns then have many zeros."""
    rng, model = torch.Generator().manual_seed(0), network(400)
    model.mean.fill_(0)
    model.std.fill_(1)
    obs, batch = seen(6, rng, model=model)
    rec = SPEAR(draws=20_000)(obs, rng)
    assert evaluate(rec, batch, download=False).psnr.min() > 140 and rec.notes["certified"]


def test_two_equal_images_are_one(rng):
    one = images(3, rng)
    twice = Batch(torch.cat([one.images, one.images[:1]]), torch.cat([one.labels, one.labels[:1]]))
    rec = SPEAR()(observe(network(), twice, rng=rng), rng)
    scores = evaluate(rec, one, download=False)
    assert len(rec.images) == 3 and rec.notes["lambda"] == 1 and scores.psnr.min() > 140


def refused(attack, model, batch, match, **how):
    obs = observe(model, batch, threat=ThreatModel(knows_batch_size=False), rng=torch.Generator(), **how)
    with pytest.raises(NotApplicableError, match=match):
        attack(obs, torch.Generator())


@pytest.mark.parametrize("attack", [SPEAR(), SPEARpp()], ids=["spear", "spear_pp"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: network(act=nn.Sigmoid), "no ReLU follows the first layer"),
        (lambda: network(act=nn.LeakyReLU), "no ReLU follows the first layer"),
        (lambda: network(bias=False), "needs one on all 300 pixels, with a bias"),
        (lambda: models.build("lenet", num_classes=5, image_shape=SHAPE), "this model begins with Conv2d"),
    ],
    ids=["sigmoid", "leaky", "bias", "convolution"],
)
def test_models_of_another_kind_are_refused(attack, make, match, rng):
    refused(attack, make(), images(2, rng), f"{type(attack).__name__} does not apply: .*{match}")


def test_a_batch_as_large_as_the_layer_is_wide_is_refused(rng):
    refused(SPEAR(), network(width=6), images(8, rng), "6 x 300, has rank 6: the batch is as large as that")


def test_noise_is_refused_or_not_certified(rng):
    refused(SPEAR(), network(), images(2, rng), "or noise was added", defense=GaussianNoise(1e-3))
    obs = observe(network(), images(2, rng), defense=GaussianNoise(1e-3), rng=rng)  # the batch size is known
    assert not SPEAR(draws=4000)(obs, rng).notes["certified"]
    obs = observe(network(), images(2, rng), defense=GaussianNoise(0.1), rng=rng)
    with pytest.raises(NotApplicableError, match="noise hides the zeros that tell the images apart"):
        SPEAR()(obs, rng)


def test_a_frozen_first_layer_is_refused(rng):
    model = network()
    model.net[1].weight.requires_grad_(False)
    refused(SPEAR(), model, images(2, rng), "of the first layer are frozen")


def test_without_the_clients_code_lambda_is_what_certifies(rng):
    client = Client(steps=2, lr=1e-3)
    obs = observe(network(), images(2, rng), client=client, rng=rng)
    rec = SPEAR()(obs, rng)
    assert rec.notes["lambda"] == 1 and rec.notes["certified"] is None


# Cocktail party


def photographs(size):
    own = data.load("photos", size=16)
    batch = own.batch(range(0, 3 * size, 3))
    model = models.build("fc2", num_classes=own.num_classes, image_shape=(3, 16, 16), mean=own.mean, std=own.std)
    return observe(model, batch, rng=torch.Generator()), batch


def test_sources_are_white_and_a_rotation_of_them_is_the_batch():
    obs, batch = photographs(4)
    G, Xw = cocktail.whitened(obs.gradient["net.1.weight"], 4)
    torch.testing.assert_close(Xw @ Xw.T / Xw.shape[1], torch.eye(4), rtol=0, atol=1e-4)
    x = ((batch.images - obs.model.mean) / obs.model.std).flatten(1)
    V = torch.linalg.lstsq(G.T, x.T).solution.T
    torch.testing.assert_close(V @ G, x, rtol=0, atol=1e-3)


def test_signs_come_from_the_bias_gradient():
    obs, batch = photographs(4)
    x = (batch.images - obs.model.mean) / obs.model.std
    flips = torch.tensor([1.0, -2.0, -0.5, 1.0]).view(-1, 1, 1, 1)
    shown = cocktail.told_apart(obs, x * flips)
    torch.testing.assert_close(shown, cocktail.stretched(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "attack",
    [CocktailParty(fast_ica=200), CocktailParty(iterations=600, lr=0.01, w_tv=0.0, w_ne=30.0)],
    ids=["fastica", "party"],
)
def test_independent_pixels_are_separated(attack, rng):
    """Uniform noise is what independent components are: no prior is needed."""
    batch = Batch(torch.rand(4, 3, 16, 16, generator=rng), torch.arange(4))
    model = models.build("fc2", num_classes=5, image_shape=(3, 16, 16), mean=0.5, std=0.3)
    obs = observe(model, batch, rng=rng)
    rec, mixed = attack(obs, rng), CocktailParty(iterations=1)(obs, rng)
    scores, before = (evaluate(r, batch, download=False) for r in (rec, mixed))
    assert scores.psnr.mean() > 15 and scores.psnr.mean() > before.psnr.mean() + 4
    assert rec.labels is None


def test_too_low_a_rank_is_refused(rng):
    one = data.load("digits").batch([0, 0])
    model = models.build("fc2", num_classes=10, image_shape=(1, 8, 8))
    obs = observe(model, Batch(one.images, one.labels), rng=rng)
    with pytest.raises(NotApplicableError, match="has rank 1, and 2 images need as much"):
        CocktailParty()(obs, rng)


def test_features_behind_convolutions_are_separated_and_inverted(rng):
    """One image has one source, its features; two are told apart better than their mixtures are."""
    own = data.load("photos", size=16)
    model = models.build("cnn2", num_classes=own.num_classes, image_shape=(3, 16, 16), mean=own.mean, std=own.std)
    one = own.batch([0])
    rec = CocktailFeatures(iterations=1, steps=400, w_tv=0.01)(observe(model, one, rng=rng), rng)
    assert evaluate(rec, one, download=False).psnr.item() > 15 and rec.labels is None

    four = own.batch(range(0, 12, 3))
    obs = observe(model, four, rng=rng)
    h = input_of(model, "net.7.weight", four.images)
    mixed, separated = (CocktailFeatures(iterations=n).sources(obs.gradient["net.7.weight"], 4) for n in (1, 1000))

    def agree(z):
        return torch.corrcoef(torch.cat([z, h]))[:4, 4:].abs().amax(1).mean()

    assert agree(separated) > agree(mixed) + 0.05
    assert (separated.clamp(min=0).norm(dim=1) >= separated.clamp(max=0).norm(dim=1)).all()


def test_features_need_a_dense_layer_behind_others(rng):
    model, batch = network(), images(2, rng)
    with pytest.raises(NotApplicableError, match="is given the pixels; use CocktailParty"):
        CocktailFeatures()(observe(model, batch, rng=rng), rng)
    for layer in model.net[1::2]:
        layer.weight.requires_grad_(False)
    with pytest.raises(NotApplicableError, match="has none, or has it frozen"):
        CocktailFeatures()(observe(model, batch, rng=rng), rng)
