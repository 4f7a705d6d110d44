"""Distances, priors, parametrisations and label rules against plain loops and known cases."""

import pytest
import torch

from gi_lib import Batch, labels, models, observe
from gi_lib.copies import bn_statistics
from gi_lib.matching import cosine, l1, layer_l2, norm, squared_l2
from gi_lib.parametrisations import Pixels, TanhBox
from gi_lib.priors import l2, statistics_distance, total_variation
from gi_lib.types import WithheldError


def gradients(rng):
    shapes = {"a": (2, 3), "b": (4,), "scale": ()}
    return [{name: torch.randn(shape, generator=rng) for name, shape in shapes.items()} for _ in range(2)]


def test_distances_against_loops(rng):
    mine, theirs = gradients(rng)
    total = dot = a2 = b2 = norms = apart = 0.0
    for name in theirs:
        layer = 0.0
        for x, y in zip(mine[name].flatten().tolist(), theirs[name].flatten().tolist(), strict=True):
            layer, dot, a2, b2 = layer + (x - y) ** 2, dot + x * y, a2 + x * x, b2 + y * y
            apart += abs(x - y)
        total, norms = total + layer, norms + layer**0.5
    assert squared_l2(mine, theirs).item() == pytest.approx(total, rel=1e-5)
    assert layer_l2(mine, theirs).item() == pytest.approx(norms, rel=1e-5)
    assert l1(mine, theirs).item() == pytest.approx(apart, rel=1e-5)
    assert cosine(mine, theirs).item() == pytest.approx(1 - dot / (a2 * b2) ** 0.5, rel=1e-5)


def test_cosine_ignores_scale_and_survives_small_and_zero_gradients(rng):
    mine, theirs = gradients(rng)
    small, tiny = ({name: 1e-12 * g for name, g in gradient.items()} for gradient in (mine, theirs))
    torch.testing.assert_close(cosine(small, tiny), cosine(mine, theirs))
    zero = {name: torch.zeros_like(g) for name, g in mine.items()}
    assert cosine(zero, theirs).item() == 1


def test_distances_are_zero_only_at_the_gradient(rng):
    mine, theirs = gradients(rng)
    for distance in (squared_l2, l1, cosine, layer_l2):
        assert distance(mine, mine).item() == pytest.approx(0, abs=1e-6) and distance(mine, theirs).item() > 0.1


def test_a_norm_has_the_derivative_0_at_0():
    d = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(norm(d), d)[0].tolist() == [0, 0, 0]


def test_total_variation_against_three_loops(rng):
    x = torch.rand(2, 3, 4, 5, generator=rng)
    down, across = [], []
    for plane in x.flatten(0, 1).tolist():
        for i in range(4):
            for j in range(5):
                if i < 3:
                    down.append(abs(plane[i + 1][j] - plane[i][j]))
                if j < 4:
                    across.append(abs(plane[i][j + 1] - plane[i][j]))
    expected = sum(down) / len(down) + sum(across) / len(across)
    assert total_variation(x).item() == pytest.approx(expected, rel=1e-5)
    assert l2(x).item() == pytest.approx((x**2).mean().item())
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(total_variation, x)


def test_the_statistics_distance_is_zero_at_the_batch_and_has_its_derivative(client):
    obs, batch = client("convnet", 2, (3, 12, 12), train=True, knows_bn_stats=True)
    assert statistics_distance(obs.model, batch.images, obs.bn_stats).item() == 0
    x = torch.rand(2, 3, 12, 12)
    found = bn_statistics(obs.model, x)
    by_hand = sum(
        (a - b).square().sum().sqrt() for name in found for a, b in zip(found[name], obs.bn_stats[name], strict=True)
    )
    torch.testing.assert_close(statistics_distance(obs.model, x, obs.bn_stats), by_hand)


@pytest.mark.parametrize(
    "p", [Pixels(), Pixels(torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.full((3, 1, 1), 0.2)), TanhBox()], ids=str
)
def test_parametrisations_return_the_image_they_start_from(p, rng):
    x = torch.rand(2, 1, 3, 4, 4, generator=rng) * 0.98 + 0.01
    torch.testing.assert_close(p.image(p.start(x)), x)
    z = p.start(x) + 100 * torch.randn(x.shape, generator=rng)
    p.project(z)
    assert p.image(z).min() >= -1e-6 and p.image(z).max() <= 1 + 1e-6


def test_pixels_that_are_not_boxed_stay_where_they_are():
    z = torch.full((1, 1, 1, 2, 2), 7.0)
    Pixels(boxed=False).project(z)
    assert (z == 7).all()


def observation(name, label, rng, num_classes=5, size=1, seed=0):
    model = models.build(name, num_classes=num_classes, image_shape=(3, 9, 9), seed=seed)
    batch = Batch(torch.rand(size, 3, 9, 9, generator=rng), torch.as_tensor(label).reshape(size))
    return observe(model, batch, rng=rng)


@pytest.mark.parametrize("name", ["mlp", "lenet", "convnet"])
def test_idlg_is_exact_for_one_image(name, rng):
    for label in range(5):
        assert labels.idlg(observation(name, label, rng, seed=label)).tolist() == [label]


@pytest.mark.parametrize("num_classes", [2, 5])
def test_idlg_needs_no_bias_and_no_sign_of_the_features(num_classes, rng):
    for label in range(num_classes):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, num_classes, bias=False))
        with torch.no_grad():
            net[1].weight.normal_(generator=rng)
        model = models.wrap(net, mean=0.0 if num_classes == 2 else 0.5, num_classes=num_classes)
        obs = observe(model, Batch(torch.rand(1, 3, 2, 2, generator=rng), torch.tensor([label])), rng=rng)
        assert labels.idlg(obs).tolist() == [label]


def test_idlg_needs_no_bias_where_the_network_is_sure(rng):
    """A wrong class with p = 1 has nearly as long a row as the label's own."""
    for label in range(5):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False))
        with torch.no_grad():
            net[1].weight.normal_(std=10, generator=rng)
        image = torch.rand(1, 3, 2, 2, generator=rng)
        model = models.wrap(net, num_classes=5)
        if model(image).argmax().item() != label:  # else the gradient underflows: there is nothing to read
            assert labels.idlg(observe(model, Batch(image, torch.tensor([label])), rng=rng)).tolist() == [label]


def test_column_min_finds_a_batch_without_repeats(rng):
    for wanted in ([0, 3], [4, 1, 2]):
        obs = observation("mlp", wanted, rng, size=len(wanted))
        assert labels.column_min(obs).tolist() == sorted(wanted)


def test_label_rules_say_what_they_need(client, rng):
    with pytest.raises(ValueError, match=r"one label from one image, got batch_size=2; use labels\.column_min"):
        labels.idlg(observation("mlp", [0, 1], rng, size=2))
    with pytest.raises(ValueError, match="finds no repeats, but 6 images of 5 classes must"):
        labels.column_min(observation("mlp", [0, 1, 2, 3, 4, 0], rng, size=6))
    obs, _ = client(knows_batch_size=False)
    for rule in (labels.idlg, labels.column_min):
        with pytest.raises(WithheldError, match=f"{rule.__name__} needs the batch size"):
            rule(obs)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Flatten())
    obs = observe(models.wrap(net, num_classes=4), Batch(torch.rand(1, 3, 2, 2), torch.tensor([1])), rng=rng)
    with pytest.raises(ValueError, match="no dense layer with 4 outputs"):
        labels.idlg(obs)
