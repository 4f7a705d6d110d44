"""R-GAP and the rank analysis, against plain linear algebra and autograd."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, data, evaluate, models, observe
from gi_lib.attacks import COPA, RGAP, rgap
from gi_lib.defenses import GaussianNoise
from gi_lib.models import rank
from gi_lib.models.chain import INVERSES, chain, undo

SIDE = 16


def small(outputs, *, bias=False, activation=None, widths=(12, 20, 20), seed=0):
    """Three convolutions on 16 x 16 pixels, LeakyReLU, a dense layer."""
    a, b, c = widths
    act = (lambda: nn.LeakyReLU(0.2)) if activation is None else activation
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(3, a, 4, 2, 2, bias=False), act(), nn.Conv2d(a, b, 3, 2, 1, bias=False), act()),
            *(nn.Conv2d(b, c, 3, 1, 1, bias=False), act(), nn.Flatten(), nn.Linear(c * 25, outputs, bias=bias)),
        )
    return models.wrap(net.double(), mean=0.4, std=0.3, num_classes=max(outputs, 2))


def photo(index=8, label=0):
    """An embedded photograph at 16 x 16 pixels."""
    return Batch(data.load("photos", size=SIDE).batch([index]).images, torch.tensor([label]))


def attacked(model, batch, attack=None, **facts):
    rng = torch.Generator().manual_seed(0)
    obs = observe(model, batch, threat=ThreatModel(**facts), rng=rng)
    rec = (attack or RGAP())(obs, rng)
    return rec, evaluate(rec, batch, download=False).psnr.item()


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_head_of_one_number_gives_the_image_and_the_label(outputs, known, label):
    rec, psnr = attacked(small(outputs), photo(label=label), knows_labels=known)
    assert psnr > 100 and rec.labels.tolist() == [label] and rec.notes["certified"]


def softplus():
    return nn.Softplus(beta=3)


@pytest.mark.parametrize("activation", [None, nn.Sigmoid, nn.Tanh, nn.ELU, softplus])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_k_classes_gives_the_image(bias, activation):
    rec, psnr = attacked(small(7, bias=bias, activation=activation), photo(label=4))
    assert psnr > 100 and rec.labels.tolist() == [4] and rec.notes["certified"]


def test_dense_layers_and_biases_are_gone_back_through():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(2048, 900), nn.LeakyReLU(0.1)
    model = models.wrap(nn.Sequential(*layers, nn.Linear(900, 5)).double(), num_classes=5)
    assert attacked(model, photo(label=3))[1] > 100


@pytest.mark.parametrize("hidden", [(), (nn.Linear(40, 30), nn.LeakyReLU(0.3))], ids=["one more", "two more"])
def test_a_network_that_begins_with_a_dense_layer_is_gone_back_through(hidden):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(768, 40), nn.Tanh(), *hidden
    model = models.wrap(nn.Sequential(*layers, nn.Linear(30 if hidden else 40, 5)).double(), num_classes=5)
    assert attacked(model, photo(label=3))[1] > 100


def test_in_float32_the_image_is_found_too():
    rng = torch.Generator()
    obs = observe(small(7).float(), photo(label=4), rng=rng)
    rec = RGAP()(obs, rng)
    assert rec.images.dtype == torch.float32
    assert evaluate(rec, photo(label=4), download=False).psnr.item() > 80


@pytest.mark.parametrize("c", [-0.27, -0.1, -1e-3, -1e-9, 0.0, 0.3, 40.0])
def test_the_margins_are_all_roots(c):
    """Against a fine grid's changes of sign."""
    found = rgap.margins(c)
    assert found == sorted(found)
    for v in found:
        assert -v / (1 + math.exp(v)) == pytest.approx(c, rel=1e-9, abs=1e-15)
    grid = np.concatenate([-np.logspace(3, -12, 4000), np.logspace(-12, 2, 4000)])
    values = -grid / (1 + np.exp(grid)) - c
    assert len(found) == max(1, int((np.sign(values[1:]) * np.sign(values[:-1]) < 0).sum()))


def test_below_its_minimum_the_equation_has_no_root():
    assert rgap.margins(-0.3) == []
    least = -rgap.TURN / (1 + math.exp(rgap.TURN))
    assert least == pytest.approx(-0.2784645, abs=1e-7)


@pytest.mark.parametrize("gain", [1.0, 200.0])
def test_both_roots_have_the_same_gradient_and_the_box_of_pixels_chooses(gain):
    """A sample that is classified right: two positive multiples of one image explain the update exactly.

    At a small margin the other root is the brighter one, at a large margin the darker one.
    """
    model = models.wrap(small(1).net, num_classes=2)  # pixels as they are: a multiple of an image is one
    with torch.no_grad():
        model.net[-1].weight.mul_(gain)
    x = photo().images.double()
    label = int(model(x).argmax())
    rec, psnr = attacked(model, photo(label=label), knows_labels=True)
    assert rec.notes["roots"] == 2 and psnr > 100
    u = (model(x)[0, 1] - model(x)[0, 0]).item() * (2 * label - 1)
    own, *_ = [v for v in rgap.margins(-u / (1 + math.exp(u))) if abs(v - u) > 1e-6]
    g, other = (Client()(model, scale * x, torch.tensor([label])) for scale in (1.0, own / u))
    torch.testing.assert_close(other, g, rtol=1e-8, atol=1e-12)
    assert (own > u) == (gain == 1.0)


@pytest.mark.parametrize("kind", INVERSES)
def test_activations_are_undone(kind):
    z = torch.linspace(-3, 3, 40, dtype=torch.float64).requires_grad_()
    x = kind()(z)
    slope = torch.autograd.grad(x.sum(), z)[0]
    found, steepness = undo(kind(), x.detach())
    torch.testing.assert_close(found, z.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(steepness, slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.ELU, nn.Softplus])
def test_what_rounding_took_out_of_an_activations_range_is_undone_to_a_finite_value(activation):
    z, slope = undo(activation(), torch.tensor([-1.5, 0.0, 1.0, 1.5], dtype=torch.float64))
    assert z.isfinite().all() and slope.isfinite().all()


GEOMETRIES = [(4, 2, 2, 1), (3, 1, 1, 1), (3, 2, 0, 1), ((3, 2), (1, 2), (2, 0), (2, 1)), (1, 1, 0, 1)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_links_equations_are_those_of_autograd(geometry, rng):
    """W x is what the layer gives, K x its gradient; their normal matrix is built of dense ones."""
    net = nn.Sequential(nn.Conv2d(2, 3, *geometry), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)).double()
    net(torch.zeros(1, 2, 7, 6).double())
    link, _ = chain(models.wrap(net, num_classes=4), (2, 7, 6))
    x = torch.rand(1, 2, 7, 6, generator=rng, dtype=torch.float64).requires_grad_()
    z = net[0](x)
    torch.testing.assert_close(link.forward(x) + link.bias, z)
    k = torch.randn(z.shape, generator=rng, dtype=torch.float64)
    g, back = torch.autograd.grad(z, [net[0].weight, x], k)
    K0 = link.gradients(k[0])
    torch.testing.assert_close(x[0].flatten(1) @ K0.T, link.of_weights(g))
    torch.testing.assert_close(link.transposed(k), back)
    W = torch.autograd.functional.jacobian(lambda x: link.forward(x).flatten(), x.detach()).reshape(z.numel(), -1)
    K = torch.kron(torch.eye(2).double(), K0)
    N, scale = link.gram(K0)
    torch.testing.assert_close(N, W.T @ W + scale * K.T @ K)
    assert (scale * K.square().sum()).item() == pytest.approx(W.square().sum().item())


def test_a_layer_short_of_equations_is_solved_with_least_norm():
    """Against numpy's least squares of both kinds of equations at the same scale."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)).double()
    link, _ = chain(models.wrap(net, num_classes=4), (3, 8, 8))
    x, k = torch.rand(3, 8, 8).double(), torch.randn(2, 4, 4).double()
    K0, z = link.gradients(k), link.forward(x[None])[0]
    g = (x.flatten(1) @ K0.T).reshape(3, 2, 3, 3).transpose(0, 1)
    found = link.solve(z, k, g)
    W = link.forward(torch.eye(192).double().reshape(192, 3, 8, 8)).reshape(192, -1).T.detach()
    K = torch.kron(torch.eye(3).double(), K0) * link.gram(K0)[1] ** 0.5
    matrix = torch.cat([W, K]).numpy()
    # sum_p k_p z_p^T is dL/dW W^T: as many equations as pairs of outputs follow from the others
    assert np.linalg.matrix_rank(matrix) == 32 + 54 - 2 * 2 < 192
    expected = np.linalg.lstsq(matrix, matrix @ x.flatten().numpy(), rcond=1e-10)[0]
    torch.testing.assert_close(found.flatten(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert (found - x).norm() > 0.1 * x.norm()


# What stops it


def with_layer(*layers, outputs=4):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    net = nn.Sequential(conv, *layers, nn.Flatten(), nn.LazyLinear(outputs))
    net(torch.zeros(1, 3, SIDE, SIDE))
    return models.wrap(net.double().eval(), num_classes=outputs)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Linear(768, 4)

    def forward(self, x):
        return self.last((x + self.act(self.conv(x))).flatten(1))


class Functional(Residual):
    def forward(self, x):
        return self.last(torch.tanh(self.conv(x)).flatten(1))


class Twice(Residual):
    def forward(self, x):
        return self.last(self.act(self.conv(self.act(self.conv(x)))).flatten(1))


REFUSED = [
    (lambda: with_layer(nn.ReLU()), r"net\.1 is a ReLU, which can't be undone here: .*LeakyReLU.*matches gradients"),
    (lambda: with_layer(nn.LeakyReLU(0.0)), r"net\.1 is a LeakyReLU, which can't be undone"),
    (lambda: with_layer(nn.BatchNorm2d(4), nn.Tanh()), r"net\.1 is a BatchNorm, which can't be undone"),
    (lambda: with_layer(nn.Tanh(), nn.AvgPool2d(2)), r"net\.2 is a AvgPool2d, which can't be undone"),
    (lambda: models.wrap(Residual().double(), num_classes=4), r"what enters net\.last is not what .* residual block"),
    (lambda: models.wrap(Functional().double(), num_classes=4), r"what enters net\.last .* no module"),
    (lambda: models.wrap(Twice().double(), num_classes=4), r"net\.conv runs twice"),
    (lambda: with_layer(nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh()), r"net\.2 has 2 groups"),
    (lambda: with_layer(nn.Tanh(), nn.Conv2d(4, 4, 3, padding="same"), nn.Tanh()), r"pads by 'same' zeros"),
    (
        lambda: models.build("vit", num_classes=4, image_shape=(3, SIDE, SIDE)),
        r"what enters net\.tokens|can't be undone",
    ),
    (lambda: models.build("mlp", num_classes=4, image_shape=(3, SIDE, SIDE)), r"net\.2 is a ReLU"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_a_model_without_a_way_back_is_refused_by_name(make, message):
    with pytest.raises(NotApplicableError, match=f"RGAP does not apply: .*(?:{message})"):
        attacked(make(), photo())


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(784, 4)
    last = nn.LogSoftmax(1)
    model = models.wrap(nn.Sequential(*layers, last).double(), num_classes=4)
    with pytest.raises(NotApplicableError, match="net.4 is a LogSoftmax, which can't be undone"):
        attacked(model, photo())
    model = models.wrap(nn.Sequential(nn.Flatten(), nn.Identity()).double(), num_classes=768)
    model.net.extra = nn.Parameter(torch.zeros(1).double())
    with pytest.raises(NotApplicableError, match="does not end in a dense layer that gives its logits"):
        chain(model, (3, SIDE, SIDE))


def test_frozen_weights_are_refused_by_name():
    model = small(4)
    model.net[2].requires_grad_(False)
    with pytest.raises(NotApplicableError, match=r"the weights of net\.2 are not in the update"):
        attacked(model, photo())


def test_a_batch_is_refused():
    batch = Batch(torch.rand(2, 3, SIDE, SIDE), torch.tensor([0, 1]))
    with pytest.raises(NotApplicableError, match="RGAP takes one image, got batch_size=2"):
        attacked(small(4), batch)


def test_a_gradient_of_zero_is_an_error():
    model = small(4)
    with torch.no_grad():
        model.net[-1].weight.zero_()[0].add_(1e4 * model.net[:-1]((photo().images.double() - 0.4) / 0.3)[0])
    with pytest.raises(ValueError, match="the gradient of the last layer is zero"):
        attacked(model, photo(label=0), knows_labels=True)


def test_noise_breaks_it_and_the_certificate_says_so():
    rng = torch.Generator().manual_seed(0)
    obs = observe(small(7, bias=True), photo(label=4), defense=GaussianNoise(1e-3), rng=rng)
    with pytest.warns(UserWarning, match="the closed form does not hold here"):
        rec = RGAP()(obs, rng)
    scores = evaluate(rec, photo(label=4), download=False)
    assert scores.psnr < scores.floor


def test_rows_that_one_image_does_not_give_are_an_error():
    rng = torch.Generator().manual_seed(0)
    obs = observe(small(4), photo(), threat=ThreatModel(knows_labels=True), rng=rng)
    name = "net.7.weight"
    obs.gradient[name].copy_(obs.gradient[name][:1].clone())
    with pytest.raises(ValueError, match="the last layer's gradient is not that of one image"):
        RGAP()(obs, rng)


def test_an_equation_without_a_root_is_an_error():
    rng = torch.Generator().manual_seed(0)
    model = small(1)
    obs = observe(model, photo(), threat=ThreatModel(knows_labels=True), rng=rng)
    w = model.net[-1].weight.detach()
    obs.gradient["net.7.weight"].copy_(-w / (w * w).sum())
    with pytest.raises(ValueError, match="no margin solves the last layer's equation"):
        RGAP()(obs, rng)


# COPA

SHORT = (12, 5, 20)
"""Widths with which the second layer has fewer equations than unknowns."""


def test_copa_is_rgap_where_there_are_enough_equations():
    rgap, copa = (attacked(small(7), photo(label=4), attack)[0] for attack in (RGAP(), COPA()))
    torch.testing.assert_close(copa.images, rgap.images, rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [2, 8])
def test_copa_is_exact_where_the_layer_before_gives_the_equations_that_rgap_is_short_of(index):
    model, batch = small(7, activation=nn.Tanh, widths=SHORT), photo(index, label=4)
    assert rank.index(rank.count(model, (3, SIDE, SIDE))) > 0
    with pytest.warns(UserWarning, match="the closed form does not hold"):
        rec, psnr = attacked(model, batch)
    assert psnr < 30 and not rec.notes["certified"]
    rec, psnr = attacked(model, batch, COPA(iterations=2000))
    assert psnr > 100 and rec.notes["certified"]


@pytest.mark.filterwarnings("ignore:the closed form does not hold")
def test_copa_is_ahead_of_rgap_where_kinks_keep_it_from_converging():
    model = small(7, widths=SHORT)
    rgap, copa = (attacked(model, photo(label=4), attack)[1] for attack in (RGAP(), COPA()))
    assert copa > rgap + 0.3


# Rank


def by_hand(layers):
    """(n_x, n_z, n_w) of each layer -> RA-i of each."""
    found, virtual = [], 0
    for x, z, w in layers:
        found.append(x - w - z - virtual)
        virtual += max(0, max(0, z - x) - max(0, x - w - z))
    return found


def on_meta(name, side):
    with torch.device("meta"):
        net = models.MODELS[name].make(10, (3, side, side))
    return models.wrap(net, num_classes=10).eval()


def test_the_count_of_cnn6_is_that_of_the_paper():
    rows = rank.count(models.build("cnn6", num_classes=10, image_shape=(3, 32, 32)), (3, 32, 32))
    sizes = [(3072, 3468, 576), (3468, 2916, 3888), (2916, 2916, 11664), (2916, 2916, 11664), (2916, 1600, 20736)]
    sizes += [(1600, 3200, 73728), (3200, 10, 32000)]
    assert [(r.inputs, r.outputs, r.weights) for r in rows] == sizes
    assert [r.index for r in rows] == by_hand(sizes) and rank.index(rows) == 3072 - 576 - 3468


def test_residual_blocks_and_pools_count_as_one_layer():
    """ResNet-18 at 64 px by hand: stem, pool, eight blocks, pool, dense layer."""
    rows = rank.count(on_meta("resnet18", 64), (3, 64, 64))
    sizes = [(3 * 64**2, 64 * 32**2, 9408), (64 * 32**2, 64 * 16**2, 0), *[(64 * 16**2, 64 * 16**2, 9 * 64**2)] * 2]
    for c, side in ((128, 8), (256, 4), (512, 2)):
        shortcut = c // 2 * c
        sizes += [(c // 2 * (2 * side) ** 2, c * side**2, 9 * c**2 + shortcut), (c * side**2, c * side**2, 9 * c**2)]
    sizes += [(512 * 4, 512, 0), (512, 10, 5120)]
    assert [(r.inputs, r.outputs, r.weights) for r in rows] == sizes
    assert [r.index for r in rows] == by_hand(sizes)
    assert [r.name for r in rows[2:4]] == ["net.layer1.0", "net.layer1.1"]


@pytest.mark.parametrize("name", ["resnet50", "vit", "squeezenet", "convnet"])
def test_the_count_needs_no_weights(name):
    rows = rank.count(on_meta(name, 64), (3, 64, 64))
    assert len(rows) > 5 and all(r.inputs > 0 and r.outputs > 0 for r in rows)
    names = [r.name for r in rows]
    assert len(set(names)) == len(names)


def test_the_count_leaves_the_model_as_it_was():
    model = small(4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rank.count(model, (3, SIDE, SIDE))
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_a_model_without_layers_has_no_count():
    class Sum(nn.Module):
        def forward(self, x):
            return x.sum(1).flatten(1)[:, :4]

    with pytest.raises(ValueError, match="runs no dense layer, convolution or pool as a module"):
        rank.count(models.wrap(Sum(), num_classes=4), (3, 8, 8))


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("widths", [(8, 12, 12), (3, 6, 4)], ids=str)
def test_the_numeric_rank_is_numpys_of_the_whole_matrix(widths, outputs):
    """[K; W; P] over the padded input, with W and K from autograd."""
    model, batch = small(outputs, widths=widths), photo(label=1)
    rows = rank.numeric(model, batch.images[0], 1)
    y, seen, z = (batch.images.double() - 0.4) / 0.3, [], []
    for layer in model.net:
        if isinstance(layer, nn.Conv2d):
            seen.append(nn.functional.pad(y.detach(), [layer.padding[0]] * 4))
        y = layer(y)
        if isinstance(layer, nn.Conv2d):
            z.append(y)
    logits = torch.cat([torch.zeros_like(y), y], 1) if outputs == 1 else y
    ks = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.labels), z)
    convolutions = [layer for layer in model.net if isinstance(layer, nn.Conv2d)]
    for row, conv, padded, k_i in zip(rows, convolutions, seen, ks, strict=False):
        weight, stride = conv.weight.detach(), conv.stride
        n = padded.numel()
        unit = torch.eye(n, dtype=torch.float64).reshape(n, *padded.shape[1:])
        W = nn.functional.conv2d(unit, weight, stride=stride).reshape(n, -1).T
        K = torch.stack(
            [torch.nn.grad.conv2d_weight(e[None], weight.shape, k_i, stride=stride).flatten() for e in unit], 1
        )
        p = conv.padding[0]
        border = torch.ones_like(padded, dtype=torch.bool)
        border[:, :, p:-p, p:-p] = False
        border = border.flatten()
        P = torch.eye(n, dtype=torch.float64)[border]
        matrix = torch.cat([K * (W.norm() / K.norm()), W, P]).numpy()
        assert row.unknowns == n and row.rank == np.linalg.matrix_rank(matrix)
        assert row.counted == min(n - len(P), len(K) + len(W)) + len(P)
    assert all(math.isfinite(row.condition) == (row.rank == row.unknowns) for row in rows)
    assert (rank.index(rank.count(model, (3, SIDE, SIDE))) < 0) == all(row.rank == row.unknowns for row in rows)


# The account


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "closed_forms_account.py"))


class Colours:
    """Of a dataset what the account's networks ask for."""

    image_shape, num_classes = (3, 32, 32), 10


def test_the_networks_of_the_account(script):
    """CNN6 with one logit has the convolutions of CNN6; the other network is short of equations."""
    one, two = script["one_logit"](3, Colours), models.build("cnn6", num_classes=2, image_shape=(3, 32, 32), seed=3)
    assert one.net[-1].out_features == 1 and one(torch.rand(2, 3, 32, 32).double()).shape == (2, 2)
    for mine, theirs in zip(one.net[:-1].parameters(), two.net[:-1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.double())
    for activation in (nn.Tanh, nn.LeakyReLU):
        rows = rank.count(script["short"](0, activation, 10), (3, SIDE, SIDE))
        assert [row.index > 0 for row in rows] == [False, True, False, False]


def test_a_row_of_the_account_that_is_there_is_not_computed_again(script, tmp_path, monkeypatch):
    out, calls = tmp_path / "account.jsonl", []
    monkeypatch.setitem(
        script["main"].__globals__, "copa", lambda data, i: calls.append(i) or [{"part": "copa", "image": i}]
    )
    for images in ("1", "3"):
        script["main"](["--images", images, "--parts", "copa", "--dataset", "digits", "--out", str(out)])
    assert calls == [0, 1, 2]
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == [0, 1, 2]
