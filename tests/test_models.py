"""The survey's models: shapes, initialisation, and that an attack can run on each."""

import os

import pytest
import torch
from safetensors.torch import save_file

from gi_lib import Batch, data, models, observe
from gi_lib.attacks import InvertingGradients

SURVEY = ("mlp", "lenet", "cnn6", "convnet", "vgg11", "resnet18", "resnet50", "vit")


def test_the_eight_are_there():
    assert set(SURVEY) <= models.MODELS.keys() and all(entry.about for entry in models.MODELS.values())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("name", SURVEY)
def test_shapes_and_finite_weights(name, shape):
    model = models.build(name, num_classes=7, image_shape=shape)
    with torch.no_grad():
        logits = model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and logits.isfinite().all() and not model.training
    assert all(p.isfinite().all() for p in model.state_dict().values())
    assert (logits[0] - logits[1]).abs().max() > 0


@pytest.mark.parametrize("name", ["cnn6", "resnet18", "vit"])
def test_large_images(name):
    model = models.build(name, num_classes=7, image_shape=(3, 224, 224))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.parametrize("name", SURVEY)
def test_the_seed_is_the_weights_and_the_global_state_is_left_alone(name):
    state = torch.get_rng_state()
    first, again, other = (models.build(name, num_classes=3, image_shape=(1, 16, 16), seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    for (key, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    drawn = [key for key, p in first.named_parameters() if p.std() > 0 and p.ndim > 1]
    assert drawn and all(not torch.equal(first.state_dict()[k], other.state_dict()[k]) for k in drawn)


@pytest.mark.parametrize("name", ["mlp", "cnn6", "vit"])
def test_an_attack_lowers_its_loss_and_stacked_rows_equal_separate_ones(name, rng):
    model = models.build(name, num_classes=5, image_shape=(3, 16, 16), mean=0.5, std=0.25).double()
    obs = observe(model, Batch(torch.rand(1, 3, 16, 16, generator=rng), torch.tensor([4])), rng=rng)
    rec = InvertingGradients(steps=12)(obs, rng)
    assert rec.trace[-1] < rec.trace[0] and rec.labels.tolist() == [4]
    x, y = torch.rand(2, 1, 3, 16, 16, generator=rng).double(), torch.tensor([1])
    for key, stacked in torch.func.vmap(lambda x: obs.simulate(x, y))(x).items():
        for r in range(2):
            torch.testing.assert_close(stacked[r], obs.simulate(x[r], y)[key], rtol=1e-7, atol=1e-10)


def test_cnn6_has_r_gaps_layers():
    model = models.build("cnn6", num_classes=10, image_shape=(3, 32, 32))
    shapes = [list(p.shape) for p in model.parameters()]
    assert shapes == [
        *([12, 3, 4, 4], [36, 12, 3, 3], [36, 36, 3, 3], [36, 36, 3, 3], [64, 36, 3, 3], [128, 64, 3, 3]),
        [10, 3200],
    ]


def test_vit_refuses_what_its_patches_do_not_tile():
    with pytest.raises(ValueError, match="patches of 4 x 4 pixels, which 30 x 30 is not made of"):
        models.build("vit", num_classes=10, image_shape=(3, 30, 30))


def test_lenet5_refuses_another_size():
    with pytest.raises(ValueError, match="32 x 32 pixels, got 28 x 28"):
        models.build("lenet5", num_classes=10, image_shape=(1, 28, 28))


@pytest.mark.parametrize("name", models.WEIGHTS)
def test_untrained_networks_of_the_public_weights_fit_their_images(name):
    entry = models.WEIGHTS[name]
    model = models.build(entry.model, num_classes=entry.num_classes, image_shape=entry.image_shape)
    with torch.no_grad():
        logits = model(torch.rand(1, *entry.image_shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (1, entry.num_classes) and logits.isfinite().all()


ACCURACY = {"cifar10_resnet20": 0.85, "cifar10_resnet56": 0.88, "mnist_lenet5": 0.96, "imagenet_squeezenet": 0.55}


@pytest.mark.skipif("GI_DATA" not in os.environ, reason="needs the data root GI_DATA, with the public weights in it")
@pytest.mark.parametrize("name", models.WEIGHTS)
def test_public_weights_classify(name):
    """Wrong layers, a wrong order or a wrong normalisation would cost far more than the margin left here."""
    entry, root = models.WEIGHTS[name], data.root()
    dataset = data.load(name.partition("_")[0], size=entry.image_shape[1], root=root)
    batch = dataset.batch(range(150))
    with torch.no_grad():
        right = models.pretrained(name, root=root)(batch.images).argmax(1) == batch.labels
    assert right.double().mean() >= ACCURACY[name]


def test_weights_of_another_network_are_refused(tmp_path):
    folder = tmp_path / "weights" / "cifar10"
    folder.mkdir(parents=True)
    save_file(
        models.build("lenet", num_classes=10, image_shape=(3, 32, 32)).net.state_dict(),
        folder / "akamaster_resnet20.safetensors",
    )
    with pytest.raises(RuntimeError, match="conv1.weight"):
        models.pretrained("cifar10_resnet20", root=tmp_path)


def test_a_damaged_file_of_weights_is_named(tmp_path):
    folder = tmp_path / "weights" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "akamaster_resnet20.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RuntimeError, match=r"akamaster_resnet20.safetensors is damaged.*copy it afresh"):
        models.pretrained("cifar10_resnet20", root=tmp_path)


def test_convnet_refuses_what_its_pools_swallow():
    with pytest.raises(ValueError, match="from 9 x 9 pixels on, got 8 x 8"):
        models.build("convnet", num_classes=10, image_shape=(1, 8, 8))


def test_wrap_stays_on_the_device_of_the_module():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).to("meta")
    model = models.wrap(net, mean=(0.5, 0.4, 0.3), std=0.2, num_classes=3)
    assert model(torch.empty(2, 3, 2, 2, device="meta")).shape == (2, 3)
