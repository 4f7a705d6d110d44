"""Distances, priors, parametrisations, starts and label rules against plain loops and known cases."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gi_lib import Batch, labels, models, observe
from gi_lib.copies import batch_norms, bn_statistics, input_of, running_statistics
from gi_lib.matching import cosine, cosine_on_support, gaussian_kernel, l1, layer_l2, norm, squared_l2
from gi_lib.parametrisations import Pixels, TanhBox
from gi_lib.priors import (
    colour_total_variation,
    isotropic_total_variation,
    l2,
    label_distance,
    statistics_distance,
    total_variation,
)
from gi_lib.search import patterned
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


@pytest.mark.parametrize("width", [1.0, 0.5, 3.0])
def test_the_gaussian_kernel_against_loops(width, rng):
    mine, theirs = gradients(rng)
    total = 0.0
    for name in theirs:
        ours, seen = mine[name].flatten().tolist(), theirs[name].flatten().tolist()
        n, mean = len(seen), sum(seen) / len(seen)
        spread = sum((y - mean) ** 2 for y in seen) / n
        if n == 1:  # one number has no spread: its square
            spread = seen[0] ** 2
        apart = sum((x - y) ** 2 for x, y in zip(ours, seen, strict=True)) / n
        total += 1 - math.exp(-apart / (width**2 * spread))
    assert gaussian_kernel(mine, theirs, width).item() == pytest.approx(total, rel=1e-5)
    assert gaussian_kernel(mine, theirs, torch.tensor(width)).item() == pytest.approx(total, rel=1e-5)


def test_the_gaussian_kernel_measures_each_layer_by_its_own_spread(rng):
    """A layer whose gradients are all a million times smaller counts as before; one of zeros adds 0, or 1 if missed."""
    mine, theirs = gradients(rng)
    small = [{**gradient, "a": 1e-6 * gradient["a"]} for gradient in (mine, theirs)]
    torch.testing.assert_close(gaussian_kernel(*small), gaussian_kernel(mine, theirs))
    dead = {**theirs, "a": torch.zeros(2, 3)}
    assert gaussian_kernel(dead, dead).item() == 0
    assert gaussian_kernel({**dead, "a": mine["a"]}, dead).item() == pytest.approx(1)


def test_the_gaussian_kernel_saturates_far_away_and_a_wider_one_does_not(rng):
    mine, theirs = gradients(rng)
    mine = {name: (100 + g).requires_grad_() for name, g in mine.items()}

    def slope(width):
        found = torch.autograd.grad(gaussian_kernel(mine, theirs, width), list(mine.values()))
        return max(g.abs().max().item() for g in found)

    assert slope(1.0) == 0 and slope(1000.0) > 0


def test_cosine_ignores_scale_and_survives_small_and_zero_gradients(rng):
    mine, theirs = gradients(rng)
    small, tiny = ({name: 1e-12 * g for name, g in gradient.items()} for gradient in (mine, theirs))
    torch.testing.assert_close(cosine(small, tiny), cosine(mine, theirs))
    zero = {name: torch.zeros_like(g) for name, g in mine.items()}
    assert cosine(zero, theirs).item() == 1


def test_cosine_on_the_support_looks_at_no_entry_that_was_pruned(rng):
    mine, theirs = gradients(rng)
    pruned = {name: torch.where(g.abs() > 0.5, g, 0) for name, g in theirs.items()}
    kept = torch.cat([(g != 0).flatten() for g in pruned.values()])
    a, b = (torch.cat([g.flatten() for g in some.values()])[kept] for some in (mine, theirs))
    assert 0.1 < kept.double().mean() < 0.9
    expected = 1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    assert cosine_on_support(mine, pruned).item() == pytest.approx(expected, rel=1e-5)
    assert cosine_on_support(theirs, pruned).item() == pytest.approx(0, abs=1e-6)
    assert cosine(theirs, pruned).item() > 1e-3


def test_distances_are_zero_only_at_the_gradient(rng):
    mine, theirs = gradients(rng)
    for distance in (squared_l2, l1, cosine, layer_l2, gaussian_kernel):
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


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_total_variation_against_plain_loops(channels, rng):
    x = torch.rand(2, channels, 4, 5, generator=rng)
    plain, coloured = [], []
    for image in x.tolist():
        planes = list(image)
        for a in range(channels):
            for b in range(a + 1, channels):
                planes.append(
                    [[p - q for p, q in zip(r, s, strict=True)] for r, s in zip(image[a], image[b], strict=True)]
                )
        assert len(planes) == {1: 1, 3: 6}[channels]
        for number, plane in enumerate(planes):
            for i in range(4):
                for j in range(5):
                    right = plane[i][j + 1] - plane[i][j] if j < 4 else 0.0
                    down = plane[i + 1][j] - plane[i][j] if i < 3 else 0.0
                    coloured.append((right**2 + down**2) ** 0.5)
                    if number < channels:
                        plain.append(coloured[-1])
    assert isotropic_total_variation(x).item() == pytest.approx(sum(plain) / len(plain), rel=1e-5)
    assert colour_total_variation(x).item() == pytest.approx(sum(coloured) / len(coloured), rel=1e-5)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(colour_total_variation, x)


def test_an_edge_of_brightness_costs_less_than_an_edge_of_colour_and_a_flat_image_nothing():
    grey, flat = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    grey[..., 2:] = 1
    red_and_green = grey * torch.tensor([1.0, -1, 1]).view(3, 1, 1)
    assert isotropic_total_variation(grey) == isotropic_total_variation(red_and_green)
    assert colour_total_variation(grey) < colour_total_variation(red_and_green)
    value = colour_total_variation(flat)
    assert value.item() == 0 and torch.autograd.grad(value, flat)[0].abs().max() == 0


def test_the_input_of_a_layer_is_that_of_ones_own_pass(client, rng):
    """Threads share the model, and its hooks."""
    obs, _ = client("lenet")
    images = [torch.rand(1, 3, 8, 8, generator=rng) for _ in range(40)]
    alone = [input_of(obs.model, "net.7.weight", x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: input_of(obs.model, "net.7.weight", x), images))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not obs.model.get_submodule("net.7")._forward_pre_hooks


def test_the_statistics_distance_is_zero_at_the_batch_and_has_its_derivative(client):
    obs, batch = client("convnet", 2, (3, 12, 12), train=True, knows_bn_stats=True)
    assert statistics_distance(obs.model, batch.images, obs.bn_stats).item() == 0
    x = torch.rand(2, 3, 12, 12)
    found = bn_statistics(obs.model, x)
    by_hand = sum(
        (a - b).square().sum().sqrt() for name in found for a, b in zip(found[name], obs.bn_stats[name], strict=True)
    )
    torch.testing.assert_close(statistics_distance(obs.model, x, obs.bn_stats), by_hand)
    only = dict(list(obs.bn_stats.items())[:1])
    weighted = statistics_distance(obs.model, x, obs.bn_stats, (3.0,))
    torch.testing.assert_close(weighted, by_hand + 2 * statistics_distance(obs.model, x, only))


def test_running_statistics_are_those_that_come_with_the_model(client):
    obs, _ = client("convnet", 2, (3, 12, 12))
    kept = running_statistics(obs.model)
    assert kept.keys() == batch_norms(obs.model).keys()
    mean, var = kept["net.1"]
    assert torch.equal(mean, torch.zeros_like(mean)) and torch.equal(var, torch.ones_like(var))
    obs.model.get_submodule("net.1").running_var = None
    assert "net.1" not in running_statistics(obs.model)


def test_the_label_distance_against_loops(client):
    obs, batch = client("lenet", 2, (3, 12, 12))
    logits = obs.model(batch.images).tolist()
    total = 0.0
    for u, y in zip(logits, batch.labels.tolist(), strict=True):
        e = [math.exp(v) for v in u]
        total += sum((v / sum(e) - (k == y)) ** 2 for k, v in enumerate(e))
    assert label_distance(obs.model, batch.images, batch.labels).item() == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.parametrize("width", [1, 4, 5, 12, 40])
def test_a_pattern_is_one_patch_tiled_from_the_upper_left(width, client):
    obs, _ = client("lenet", 2, (3, 12, 10))
    x = patterned(obs, width)(3, torch.Generator().manual_seed(2))
    assert x.shape == (3, 2, 3, 12, 10) and x.min() >= 0 and x.max() <= 1
    for i in range(12):
        for j in range(10):
            assert torch.equal(x[..., i, j], x[..., i % width, j % width])
    patch = x[..., : min(width, 12), : min(width, 10)]
    assert len(patch.unique()) > 0.99 * patch.numel()  # of each row, image and channel its own


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
    with pytest.raises(ValueError, match=r"one label from one image, got batch_size=2; use labels\.infer"):
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
