"""mKOR: weights that carry images through convolutions and keep their classes apart, and the way back."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, metrics, models, observe
from gi_lib.attacks import MKOR
from gi_lib.models.carried import ONE_SIDED, TWO_SIDED, steps_of

SHAPE = (3, 12, 12)
MALICIOUS = ThreatModel(malicious_server=True)
NORMALISED = [{}, {"mean": 0.4, "std": 0.3}, {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.25, 0.3)}]


def model_of(name, shape=SHAPE, **normalised):
    return models.build(name, num_classes=5, image_shape=shape, seed=1, **normalised).double()


def wrapped(*layers, **kwargs):
    return models.wrap(nn.Sequential(*layers), num_classes=5, **kwargs).double()


def batch_of(labels, rng, shape=SHAPE):
    images = torch.rand(len(labels), *shape, generator=rng, dtype=torch.float64)
    return Batch(images, torch.tensor(labels))


def attacked(model, batch, rng, **settings):
    planted, trapdoor = MKOR().plant(model, tuple(batch.images.shape[1:]), None, rng)
    threat = settings.pop("threat", MALICIOUS)
    obs = observe(planted, batch, threat=threat, trapdoor=trapdoor, rng=rng, **settings)
    return obs, MKOR()(obs, rng)


def exact(images, truth, dB=100):
    assert images.shape == truth.shape
    assert metrics.psnr(images, truth).min() > dB


# What comes back


@pytest.mark.parametrize("normalised", NORMALISED, ids=["pixels", "normalised", "by channel"])
@pytest.mark.parametrize("name", ["mlp", "fc2", "dense6", "cnn2"])
def test_an_image_alone_in_its_class_is_exact_and_others_are_their_mean(name, normalised, rng):
    batch = batch_of([0, 1, 1, 3, 4], rng)
    _, rec = attacked(model_of(name, **normalised), batch, rng)
    assert rec.labels.tolist() == [0, 1, 3]  # the last class is the price of the others
    x = batch.images
    exact(rec.images, torch.stack([x[0], x[1:3].mean(0), x[3]]))
    assert rec.notes == {"enlarged": 1, "alone": 2, "of": [1, 2, 1], "crowded": True}


def test_grey_images_too(rng):
    batch = batch_of([2, 0], rng, (1, 8, 16))
    _, rec = attacked(model_of("cnn2", (1, 8, 16), mean=0.4, std=0.3), batch, rng)
    exact(rec.images, batch.images.flip(0))


@pytest.mark.parametrize("normalised", NORMALISED, ids=["pixels", "normalised", "by channel"])
def test_lenet_has_channels_for_half_of_the_sides(normalised, rng):
    """12 channels behind strides 2 and 2: the means of 2 x 2 pixels, exactly, through three sigmoids."""
    batch = batch_of([1, 3], rng)
    _, rec = attacked(model_of("lenet", **normalised), batch, rng)
    small = F.avg_pool2d(batch.images, 2)
    exact(rec.images, F.interpolate(small, scale_factor=2))
    assert rec.notes["enlarged"] == 2


def test_strides_with_channels_enough_lose_nothing(rng):
    net = nn.Conv2d(3, 12, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(12, 48, 3, 2, 1), nn.ReLU(), nn.Flatten()
    batch = batch_of([1, 3], rng)
    _, rec = attacked(wrapped(*net, nn.Linear(48 * 9, 5), mean=0.4, std=0.3), batch, rng)
    exact(rec.images, batch.images)


def test_mean_pools_behind_sigmoids_are_solved(rng):
    """The paper's LeNet, but for zeros where it repeats the border."""
    net = nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5, padding=2), nn.Sigmoid()
    net = *net, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * 9, 20), nn.ReLU(), nn.Linear(20, 5)
    batch = batch_of([1, 3], rng, (1, 12, 12))
    _, rec = attacked(wrapped(*net, mean=0.4, std=0.3), batch, rng)
    exact(rec.images, batch.images)


def middle(most, least, spans):
    """By plain loops over windows that have a cell: halfway between the least maximum and the greatest minimum."""
    found = torch.empty_like(most)
    for i, j in itertools.product(range(most.shape[-1]), repeat=2):
        windows = [(..., slice(*r), slice(*c)) for r in spans for c in spans if i in range(*r) and j in range(*c)]
        upper = torch.stack([most[w].amax((-1, -2)) for w in windows]).amin(0)
        lower = torch.stack([least[w].amin((-1, -2)) for w in windows]).amax(0)
        found[..., i, j] = (upper + lower) / 2
    return found


def test_vgg_bounds_cells_of_4_by_4_pixels(rng):
    """Its first two pools leave the extremes of 4 x 4 pixels, and the last three have channels for shifts."""
    batch = batch_of([1, 3], rng, (3, 32, 32))
    obs, rec = attacked(model_of("vgg11", (3, 32, 32), mean=0.4, std=0.3).float(), batch, rng)
    assert [step.shifts for step in obs.trapdoor.steps if step.halves] == [(), (), ONE_SIDED, ONE_SIDED, TWO_SIDED]
    most, least = F.max_pool2d(batch.images, 4), -F.max_pool2d(-batch.images, 4)
    cells = middle(most, least, [(a, min(a + 4, 8)) for a in range(8)])
    exact(rec.images, F.interpolate(cells, scale_factor=4))
    assert rec.notes["enlarged"] == 4


def test_a_pool_to_one_cell_lets_each_of_four_through(rng):
    net = nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 96, 3, padding=1), nn.ReLU()
    batch = batch_of([1, 3], rng, (3, 4, 4))
    _, rec = attacked(wrapped(*net, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5), mean=0.4, std=0.3), batch, rng)
    padded = F.pad(batch.images, (0, 1, 0, 1), value=0.4)  # what a model that normalises pads with
    windows = padded.unfold(2, 2, 1).unfold(3, 2, 1).flatten(4)  # each pixel with those right and below
    most, least = windows.amax(-1), windows.amin(-1)
    above, left = (torch.arange(4) - 1).clamp_min(0), (torch.arange(4) - 1).clamp_min(0)
    four = [(most[:, :, r][..., c], least[:, :, r][..., c]) for r in (slice(None), above) for c in (slice(None), left)]
    upper, lower = torch.stack([m for m, _ in four]).amin(0), torch.stack([v for _, v in four]).amax(0)
    exact(rec.images, (upper + lower) / 2)


def test_the_last_class_alone_gives_nothing(rng):
    _, rec = attacked(model_of("lenet"), batch_of([4, 4], rng), rng)
    assert rec.images.shape == (0, *SHAPE) and rec.labels.tolist() == [] and rec.notes["of"] == []


def test_the_steps_of_a_client_are_no_images(rng):
    batch, threat = batch_of([0, 1, 1], rng), dataclasses.replace(MALICIOUS, knows_training_details=True)
    once, often = (
        attacked(model_of("cnn2"), batch, rng, threat=threat, client=Client(steps=T, lr=1e-6))[1].notes for T in (1, 4)
    )
    assert once["alone"] == often["alone"] == 1 and sorted(once["of"]) == sorted(often["of"][:2]) == [1, 2]


def test_the_batch_size_may_be_unknown(rng):
    batch = batch_of([0, 3], rng)
    threat = dataclasses.replace(MALICIOUS, knows_batch_size=False)
    _, rec = attacked(model_of("cnn2"), batch, rng, threat=threat)
    exact(rec.images, batch.images)
    assert rec.notes == {"enlarged": 1}


# What is planted


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn2"])
def test_parameters_alone_change_and_only_the_last_logit_differs(name, rng):
    model = model_of(name, mean=0.4, std=0.3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    planted, trapdoor = MKOR(sink=7.0).plant(model, SHAPE, None, rng)
    after = planted.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    for step in trapdoor.steps:
        for kind in ("weight", "bias"):
            key = f"{step.name}.{kind}"
            assert torch.equal(after[key][step.out :], before[key][step.out :])
    logits = planted(torch.rand(3, *SHAPE, generator=rng, dtype=torch.float64))
    torch.testing.assert_close(logits - logits[:, :1], torch.tensor([0, 0, 0, 0, 7.0]).double().expand(3, 5))


def test_as_many_steps_are_shifted_as_there_are_channels_for():
    found = {}
    for colours, name in itertools.product((1, 3), ("lenet", "cnn2")):
        steps, _ = steps_of(model_of(name, (colours, 12, 12)), (colours, 12, 12))
        found[colours, name] = [step.out for step in steps]
    assert found == {
        (1, "lenet"): [1, 4, 4],  # 16 would not fit into 12
        (1, "cnn2"): [4, 16],
        (3, "lenet"): [3, 12, 12],
        (3, "cnn2"): [12, 48],
    }


# What is refused


def conv(*after, bias=True, out=8, features=8 * 36, **settings):
    layers = nn.Conv2d(3, out, **({"kernel_size": 3, "padding": 1} | settings), bias=bias), nn.ReLU(), *after
    return *layers, nn.Flatten(), nn.Linear(features, 5)


REFUSED = {
    "cnn6": (model_of, "net.0 has no bias"),
    "convnet": (model_of, "net.1 is a BatchNorm2d"),
    "resnet20": (model_of, "net.conv1 has no bias"),
    "vit": (model_of, r"net.patches is Conv2d\(3, 192"),
    "vgg11": (model_of, r"net.features.10 is a MaxPool2d from \[256, 3, 3\] to \[256, 2, 2\]"),
    "no bias behind": ((nn.Flatten(), nn.Linear(432, 5, bias=False)), "net.1 has no bias"),
    "few channels": (conv(out=2, features=288), "net.0 has 2 channels, and the image needs 3"),
    "few for a max pool": (conv(nn.MaxPool2d(2), out=5, features=180), "net.0 has 5 channels, and the image needs 6"),
    "pool of 3": (conv(nn.AvgPool2d(3), features=128), r"net.2 is a AvgPool2d from \[8, 12, 12\] to \[8, 4, 4\]"),
    "pool with a border": (conv(nn.AvgPool2d(2, 2, 1), features=8 * 49), "net.2 is a AvgPool2d"),
    "two pools": (conv(nn.AvgPool2d(2), nn.AvgPool2d(2), features=72), "net.3 is a AvgPool2d"),
    "no border": (conv(padding=0, features=800), r"net.0 is Conv2d.* from \[3, 12, 12\] to \[8, 10, 10\]"),
    "1 x 1": (conv(kernel_size=1, padding=0, features=8 * 144), "net.0 is Conv2d"),
    "groups": ((nn.Conv2d(3, 9, 3, padding=1, groups=3), nn.Flatten(), nn.Linear(9 * 144, 5)), "net.0 is Conv2d"),
    "narrow": ((nn.Flatten(), nn.Linear(432, 4), nn.ReLU(), nn.Linear(4, 5)), "net.1 has 4 neurons, and 5 classes"),
    "sigmoid": ((nn.Flatten(), nn.Linear(432, 9), nn.Sigmoid(), nn.Linear(9, 5)), "net.2 is a Sigmoid"),
    "none": ((nn.Flatten(), nn.Linear(432, 9), nn.Linear(9, 5)), "no ReLU follows net.1"),
    "tanh": ((nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(1152, 5)), "net.1 is a Tanh"),
    "softmax": ((nn.Flatten(), nn.Linear(432, 5), nn.Softmax(1)), "net.2 is a Softmax"),
    "no dense": ((nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "net.1 is a Adaptive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_carries_no_image_is_refused_with_the_reason(name, rng):
    net, message = REFUSED[name]
    model = net(name) if callable(net) else wrapped(*net)
    with pytest.raises(NotApplicableError, match=f"need a chain of convolutions.*; here {message}.*Plant rows in a"):
        MKOR().plant(model, SHAPE, None, rng)


def test_sides_that_do_not_halve_are_refused(rng):
    with pytest.raises(NotApplicableError, match=r"net.2 is Conv2d.* from \[12, 7, 7\] to \[12, 4, 4\]"):
        MKOR().plant(model_of("lenet", (3, 14, 14)), (3, 14, 14), None, rng)


def test_a_planted_model_is_not_planted_again(rng):
    for name in ("mlp", "lenet", "cnn2"):
        planted, _ = MKOR().plant(model_of(name), SHAPE, None, rng)
        with pytest.raises(ValueError, match="net.* has the same row for each class: the model is planted already"):
            MKOR().plant(planted, SHAPE, None, rng)


def test_the_update_of_another_model_is_refused(rng):
    batch = batch_of([0, 1], rng)
    planted, trapdoor = MKOR().plant(model_of("lenet"), SHAPE, None, rng)
    frozen, own = MKOR().plant(model_of("lenet"), SHAPE, None, rng)
    frozen.get_submodule(own.dense).bias.requires_grad_(False)
    for sent, trap in ((model_of("lenet"), trapdoor), (planted, "net.7"), (model_of("cnn2"), trapdoor), (frozen, own)):
        obs = observe(sent, batch, threat=MALICIOUS, trapdoor=trap, rng=rng)
        with pytest.raises(NotApplicableError, match="not of a model that MKOR has planted, or its first dense layer"):
            MKOR()(obs, rng)
