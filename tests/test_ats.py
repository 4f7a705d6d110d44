"""ATS: its operations against Pillow, by which the public code does them, and what the attacker sees."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from gi_lib import Client, ThreatModel, data, evaluate, models, observe
from gi_lib.attacks import BiasRatio
from gi_lib.defenses import ATS
from gi_lib.defenses.ats import OPERATIONS
from gi_lib.matching import squared_l2
from gi_lib.types import Batch


def pillow(image):
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def back(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def shifted(image, along, strength, sign):
    reach = np.linspace(0, 150 / 331, 10)[strength]
    offset = reach * image.size[0 if along == "x" else 1] * sign
    matrix = (1, 0, offset, 0, 1, 0) if along == "x" else (1, 0, 0, 0, 1, offset)
    return image.transform(image.size, Image.AFFINE, matrix, fillcolor=(0, 0, 0))


def contrasted(image, strength, sign):
    return ImageEnhance.Contrast(image).enhance(1 + np.linspace(0, 0.5, 10)[strength] * sign)


THEIRS = {  # by `policy.py` of the public code: the operation and the index of its strength
    1: lambda image, sign: contrasted(image, 6, sign),
    3: lambda image, sign: shifted(image, "x", 9, sign),
    7: lambda image, sign: shifted(image, "y", 2, sign),
    18: lambda image, sign: contrasted(image, 7, sign),
    43: lambda image, sign: shifted(image, "y", 3, sign),
}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("number", OPERATIONS)
def test_each_operation_is_pillows(number, sign):
    image = data.load("photos", size=32).batch([8]).images[0]
    ours, theirs = OPERATIONS[number](image, sign), back(THEIRS[number](pillow(image), sign))
    assert THEIRS.keys() == OPERATIONS.keys()
    assert (ours - theirs).abs().max() <= 2 / 255  # eight bits, and a mean that Pillow rounds
    assert (ours - image).abs().mean() > 0.02


def test_what_is_sent_is_the_gradient_of_the_transformed_images():
    batch = data.load("photos", size=16).batch([8, 23])
    model = models.build("lenet", num_classes=100, image_shape=(3, 16, 16))
    plain = observe(model, batch, rng=torch.Generator()).gradient
    sent = observe(model, batch, defense=ATS(), rng=torch.Generator().manual_seed(3)).gradient
    images, labels = ATS().on_batch(batch.images, batch.labels, torch.Generator().manual_seed(3))
    expected = Client()(model, images, labels)
    for name, g in sent.items():
        torch.testing.assert_close(g, expected[name])
    assert torch.equal(labels, batch.labels) and images.min() >= 0 and images.max() <= 1
    size = squared_l2({name: 0 * g for name, g in plain.items()}, plain)
    assert (squared_l2(sent, plain) / size).sqrt() > 0.05


def test_each_image_draws_its_policy_and_signs():
    images = data.load("photos", size=16).batch([8] * 64).images
    rng = torch.Generator().manual_seed(0)
    found = ATS(((3,),)).on_batch(images, torch.zeros(64), rng)[0]
    assert len({tuple(image.flatten().tolist()) for image in found}) == 2  # to the left and to the right
    both = ATS(((3,), (7,))).on_batch(images, torch.zeros(64), rng)[0]
    assert len({tuple(image.flatten().tolist()) for image in both}) == 4


def test_one_policy_is_the_other_of_the_mixture():
    image = data.load("photos", size=16).batch([8]).images[0]
    alone = ATS(((43, 18, 18),)).transform(image, torch.Generator().manual_seed(2))
    again = ATS(((43, 18, 18),)).transform(image, torch.Generator().manual_seed(2))
    assert torch.equal(alone, again) and not torch.equal(alone, image)


def test_the_attacker_finds_what_was_trained_on_and_not_the_original():
    batch = data.load("digits").batch([3])
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8))
    obs = observe(model, batch, defense=ATS(), rng=torch.Generator().manual_seed(1))
    rec = BiasRatio()(obs, torch.Generator())
    trained, _ = ATS().on_batch(batch.images, batch.labels, torch.Generator().manual_seed(1))
    assert evaluate(rec, Batch(trained, batch.labels), download=False).psnr.item() > 100
    assert evaluate(rec, batch, download=False).psnr.item() < 20
    known = observe(model, batch, defense=ATS(), threat=ThreatModel(knows_defense=True), rng=torch.Generator())
    assert known.defense.law(known.gradient) is None


@pytest.mark.parametrize("policies", [(), ((3, 2),), ((50,),), ((),), (3, 1, 7), 7, "3-1-7", (("3",),), ((1.0,),)])
def test_operations_that_are_not_here_are_refused(policies):
    with pytest.raises(ValueError, match="ATS needs policies, tuples of the operations 1, 3, 7, 18, 43; got"):
        ATS(policies)
