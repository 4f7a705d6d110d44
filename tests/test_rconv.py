"""R-CONV: exact where its count says so, an error or a note where it does not."""

import math

import pytest
import torch
from torch import nn

from gi_lib import (
    Batch,
    Client,
    NotApplicableError,
    ThreatModel,
    WithheldError,
    evaluate,
    labels,
    models,
    observe,
)
from gi_lib.attacks import RGAP, RConv, rconv
from gi_lib.defenses import GaussianNoise

SHAPE = (3, 12, 12)


def network(*convolutions, act=nn.ReLU, bias=True, head=True, classes=6, shape=SHAPE, mean=0.4, std=0.3):
    """Convolutions (filters, kernel, stride, padding), each with an activation, and a dense classifier; float64."""
    c, h, w = shape
    layers = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for filters, kernel, stride, padding in convolutions:
            layers += [nn.Conv2d(c, filters, kernel, stride, padding, bias=bias), act()]
            c, h, w = filters, *((n + 2 * padding - kernel) // stride + 1 for n in (h, w))
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * h * w, classes, bias=head))
    return models.wrap(net, mean=mean, std=std, num_classes=classes).double().eval()


def images(size, rng, shape=SHAPE):
    return Batch(torch.rand(size, *shape, generator=rng).double(), torch.arange(size))


def attacked(model, batch, **facts):
    obs = observe(model, batch, threat=ThreatModel(**facts), rng=torch.Generator())
    rec = RConv()(obs, torch.Generator())
    return rec, evaluate(rec, batch, download=False)


FULL = (24, 3, 2, 1), (32, 3, 1, 1)
SHORT = (4, 3, 2, 1), (32, 3, 1, 1)
INNER = (16, 3, 1, 1), (4, 3, 2, 1)


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize(("bias", "head"), [(True, True), (False, False), (True, False)])
def test_one_image_is_exact_where_the_count_is_full(act, bias, head, rng):
    model = network(*FULL, act=act, bias=bias, head=head)
    assert max(layer.share for layer in rconv.count(model, SHAPE)) < (0.3 if act is nn.ReLU else 1)
    rec, scores = attacked(model, images(1, rng))
    assert scores.psnr.item() > 140 and rec.notes["certified"] and rec.notes["open"] == 0


@pytest.mark.parametrize("head", [True, False])
def test_a_batch_of_different_labels_is_exact(head, rng):
    model = network((48, 3, 2, 1), (32, 3, 1, 1), head=head)
    rec, scores = attacked(model, images(3, rng))
    assert scores.psnr.min() > 140 and rec.notes["certified"] and scores.label_accuracy == 1


def test_float32_keeps_seven_digits_of_the_pixels_or_nearly(rng):
    batch = images(1, rng)
    batch = Batch(batch.images.float(), batch.labels)
    rec, scores = attacked(network(*FULL).float(), batch)
    assert scores.psnr.item() > 100 and rec.images.dtype == torch.float32


def test_dense_layers_are_links_too(rng):
    model = models.build("mlp", num_classes=5, image_shape=SHAPE, mean=0.4, std=0.3).double()
    _, scores = attacked(model, images(2, rng))
    assert scores.psnr.min() > 140


def test_an_image_that_stays_open_is_the_nearest_to_grey_of_all_solutions(rng):
    """Any other solution is further from grey: moving along what no equation sees."""
    model, batch = network(*SHORT), images(1, rng)
    with pytest.warns(UserWarning, match="the closed form does not hold here"):
        rec, scores = attacked(model, batch)
    unknowns = math.prod(SHAPE)
    assert rec.notes["open"] == unknowns - rec.notes["gradient"] - rec.notes["weight"] > 0
    assert not rec.notes["certified"] and 10 < scores.psnr.item() < 60
    link = rconv.links_of(model, SHAPE)[0]
    equations = _equations(link, *_errors(model, batch)[0])
    grey, truth = torch.full_like(batch.images, 0.5).flatten(), batch.images.flatten()
    nearest = grey + torch.linalg.pinv(equations, rtol=1e-10) @ (equations @ (truth - grey))
    torch.testing.assert_close(rec.images.flatten(), nearest.clamp(0, 1), rtol=0, atol=1e-6)


def test_an_inner_layer_that_stays_open_is_an_error(rng):
    model = network(*INNER)
    assert max(layer.share for layer in rconv.count(model, SHAPE)) > 1
    with pytest.raises(ValueError, match=r"the input of net.2 has 2304 unknowns, of which the gradient con.*fix"):
        attacked(model, images(1, rng))


# Counts


def _errors(model, batch):
    """(k, z) of each layer of the chain, [B, ...], by autograd on the truth."""
    x, outputs = (batch.images - model.mean) / model.std, []
    for layer in model.net:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            outputs.append(x)
    ks = torch.autograd.grad(nn.functional.cross_entropy(x, batch.labels), outputs)
    return [(k.reshape(len(batch), k.shape[1], *(k.shape[2:] or (1, 1))), z) for k, z in zip(ks, outputs, strict=True)]


def _equations(link, k, z):
    """All constraints on one layer's input, one row each, of one image: the Jacobians of gW and of the known z."""
    layer = link.layer

    def gradient(x):
        W = layer.weight.detach()
        _, back = torch.func.vjp(lambda W: nn.functional.conv2d(x, W, None, layer.stride, layer.padding), W)
        return back(k)[0]

    def output(x):
        return layer(x)[z > 0] if rconv.one_sided(link) else layer(x)

    x = torch.zeros(1, *link.input, dtype=torch.float64)
    rows = [torch.func.jacrev(f)(x) for f in (gradient, output)]
    return torch.cat([r.reshape(-1, x.numel()).detach() for r in rows])


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize(
    "convolutions",
    [FULL, SHORT, INNER, ((12, 4, 2, 2), (9, 3, 1, 0)), ((5, 5, 3, 1), (16, 3, 2, 1)), ((8, 3, 1, 1), (6, 2, 2, 0))],
    ids=str,
)
def test_the_count_is_the_numeric_rank(act, convolutions, rng):
    """Of the gradient constraints where no filter is dead, and of both kinds together."""
    model, batch = network(*convolutions, act=act), images(1, rng)
    links, counts = rconv.links_of(model, SHAPE), rconv.count(model, SHAPE)
    for link, counted, (k, z) in list(zip(links, counts, _errors(model, batch), strict=True))[:-1]:
        A = rconv.gradient_matrix(link, k)
        alone = link.input[0] * int(torch.linalg.matrix_rank(A))
        assert alone <= counted.gradient <= counted.unknowns
        if act is nn.LeakyReLU:
            assert alone == counted.gradient
        k, known = (t[0].flatten(1) for t in (k, z > 0 if act is nn.ReLU else z.isfinite()))
        apart = [int(torch.linalg.matrix_rank(k[:, ~seen])) if not seen.all() else 0 for seen in known]
        ties = sum(int(torch.linalg.matrix_rank(k)) - r for r in apart)  # of filter g: m^T k, zero where z_g is unknown
        both = int(torch.linalg.matrix_rank(_equations(link, k.reshape(z.shape), z)))
        assert both == min(counted.unknowns, alone + int(known.sum()) - ties)
        assert ties == counted.ties or (act is nn.ReLU and ties >= (k != 0).any(1).sum())


def test_the_gradient_matrix_is_what_autograd_computes(rng):
    model, batch = network((7, 4, 3, 2), (5, 3, 2, 1)), images(2, rng)
    observed = Client()(model, batch.images, batch.labels)
    x = (batch.images - model.mean) / model.std
    for link, (k, z) in zip(rconv.links_of(model, SHAPE), _errors(model, batch), strict=True):
        x = x.reshape(2, *link.input)
        A = rconv.gradient_matrix(link, k)
        computed = (A @ x.transpose(0, 1).reshape(link.input[0], -1).T).T
        expected = observed[f"{link.name}.weight"].reshape(link.weight.shape).transpose(0, 1).flatten(1)
        torch.testing.assert_close(computed, expected, rtol=1e-9, atol=1e-12)
        x = z.relu()


def test_ties_of_a_one_sided_layer_need_its_support():
    counts = {
        name: rconv.count(models.build(name, num_classes=10, image_shape=(3, 32, 32)), (3, 32, 32))
        for name in ("cnn6", "cnn6_relu", "cnn6_relu_wide")
    }
    assert [layer.ties for layer in counts["cnn6"]][:2] == [12**2, 36**2]
    assert [layer.ties for layer in counts["cnn6_relu"]][:2] == [12, 36]
    first = counts["cnn6_relu"][0]
    assert (first.unknowns, first.gradient, first.weight) == (3072, 576, 12 * 17 * 17)
    assert first.share > 0.5 > counts["cnn6_relu_wide"][0].share


# Errors


def refused(model, batch, match, error=NotApplicableError, client=None, **facts):
    obs = observe(model, batch, client=client or Client(), threat=ThreatModel(**facts), rng=torch.Generator())
    with pytest.raises(error, match=match):
        RConv()(obs, torch.Generator())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("convnet", "RConv does not apply: net.1 is a BatchNorm, which can't be undone here"),
        ("resnet20", "RConv does not apply: net.bn1 is a BatchNorm"),
        ("vit", "RConv does not apply: net.tokens is a Tokens"),
    ],
)
def test_other_models_are_refused(name, match, rng):
    model = models.build(name, num_classes=4, image_shape=SHAPE).double()
    refused(model, images(1, rng), match)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        self.head = nn.Linear(8 * 144, 4)

    def forward(self, x):
        x = self.relu(self.first(x))
        return self.head((x + self.relu(self.second(x))).flatten(1))


def wrapped(*layers, classes=4):
    return models.wrap(nn.Sequential(*layers), num_classes=classes).double().eval()


def dense(features, classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: models.wrap(Residual(), num_classes=4).double(), "what enters net.head is not what the layer before"),
        (lambda: wrapped(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), dense(100)), "net.1 is a MaxPool2d"),
        (lambda: wrapped(nn.Conv2d(3, 4, 3), nn.SiLU(), dense(400)), "net.1 is a SiLU, .* needs ReLU, LeakyReLU"),
        (lambda: wrapped(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), dense(600)), "net.0 has 3 groups"),
        (lambda: wrapped(nn.Conv2d(3, 6, 3, padding="same"), nn.ReLU(), dense(864)), "net.0 pads by 'same'"),
        (lambda: wrapped(dense(432), nn.Sigmoid()), "the model does not end in a dense layer of 4 logits"),
        (lambda: wrapped(nn.Conv2d(3, 4, 12), nn.Flatten()), "the model does not end in a dense layer that gives its"),
    ],
    ids=["residual", "pool", "silu", "groups", "padding", "last", "head"],
)
def test_what_is_no_chain_is_refused(make, match, rng):
    refused(make(), images(1, rng), match)


def test_a_frozen_layer_is_refused(rng):
    model = network(*FULL)
    model.net[0].weight.requires_grad_(False)
    refused(model, images(1, rng), "the weights of net.0 are not in the update")


def test_large_images_are_refused(rng):
    shape = (3, 96, 96)
    model = network((4, 8, 8, 0), shape=shape)
    refused(
        model,
        images(1, rng, shape),
        "the input of net.0 has 96 x 96 positions, more than 8192; take smaller or fewer images",
    )


@pytest.mark.parametrize("labels", [[1, 1], [0, 1, 2, 3, 4, 5]], ids=["repeated", "all classes"])
def test_batches_that_labels_do_not_tell_apart_are_refused(labels, rng):
    batch = Batch(images(len(labels), rng).images, torch.tensor(labels))
    refused(network(*FULL), batch, "tells the images of a batch apart by their labels, got", knows_labels=True)


def test_labels_that_repeat_are_refused_and_unseen_told_by_the_error_or_the_certificate(rng):
    batch = Batch(images(3, rng).images, torch.tensor([1, 1, 2]))
    obs = observe(network((48, 3, 2, 1), (32, 3, 1, 1), act=nn.Sigmoid), batch, rng=torch.Generator())
    with pytest.raises(NotApplicableError, match="labels, got .1, 1, 2. of 6 classes"):
        RConv()(obs, torch.Generator())
    unseen = RConv(label_rule=labels.column_min)
    with pytest.warns(UserWarning, match="the closed form does not hold here"):
        assert not unseen(obs, torch.Generator()).notes["certified"]
    obs = observe(network(*INNER), batch, rng=torch.Generator())
    with pytest.raises(ValueError, match="equations are off by 1: .* a label is wrong or repeats"):
        unseen(obs, torch.Generator())


def test_a_batch_of_more_images_than_an_inner_layer_has_equations_for_is_an_error(rng):
    model = network((16, 3, 2, 1), (24, 3, 1, 1), (6, 3, 1, 1))
    _, scores = attacked(model, images(1, rng))
    assert scores.psnr.item() > 140
    refused(model, images(5, rng), "without the rest all before it would be wrong", error=ValueError)


def test_the_batch_size_is_needed(rng):
    refused(network(*FULL), images(1, rng), "RConv needs the batch size", WithheldError, knows_batch_size=False)


def test_noise_is_answered_by_a_warning_or_an_error(rng):
    obs = observe(network(*FULL), images(1, rng), defense=GaussianNoise(1e-4), rng=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="the closed form does not hold here"):
        assert not RConv()(obs, torch.Generator()).notes["certified"]


def test_rgap_has_no_way_back_through_relu(rng):
    obs = observe(
        models.build("cnn6_relu", num_classes=10, image_shape=(3, 32, 32)), images(1, rng, (3, 32, 32)), rng=rng
    )
    with pytest.raises(NotApplicableError, match="is a ReLU, which can't be undone"):
        RGAP()(obs, rng)
