"""The contract that every attack keeps, and the papers' results on their smallest setting."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch

from gi_lib import Batch, FedAvg, NotApplicableError, ThreatModel, WithheldError, data, evaluate, models, observe
from gi_lib.attacks import ATTACKS, DLG, IDLG, BiasRatio, InvertingGradients
from gi_lib.matching import cosine

CONTRACT = {  # name -> (a small instance, a model that suits it)
    "bias_ratio": (BiasRatio(), "mlp"),
    "dlg": (DLG(steps=2, max_iter=3, restarts=2, frames=2), "lenet"),
    "idlg": (IDLG(steps=2, max_iter=3, restarts=2, frames=2), "lenet"),
    "inverting_gradients": (InvertingGradients(steps=3, restarts=2, frames=2), "convnet"),
}


@pytest.fixture(params=CONTRACT)
def contract(request):
    return CONTRACT[request.param]


ONE_IMAGE = {IDLG}
"""Attacks that take no batch."""


@pytest.fixture(params=[name for name, (attack, _) in CONTRACT.items() if hasattr(attack, "many")])
def iterative(request):
    """Those of the contract that minimise."""
    return CONTRACT[request.param]


def test_every_attack_has_a_row():
    assert CONTRACT.keys() == ATTACKS.keys()
    assert all(type(attack) is ATTACKS[name] for name, (attack, _) in CONTRACT.items())


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 11, 9)], ids=str)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_shapes_and_ranges(contract, client, rng, shape, size, train):
    attack, name = contract
    obs, _ = client(name, size, shape, train=train)
    if size > 1 and type(attack) in ONE_IMAGE:
        with pytest.raises(NotApplicableError, match="got batch_size=2; use"):
            attack(obs, rng)
        return
    rec = attack(obs, rng)
    assert rec.images.shape == (size, *shape) and rec.images.dtype == torch.float32
    assert rec.images.min() >= 0 and rec.images.max() <= 1 and not rec.images.requires_grad
    assert rec.labels.shape == (size,) and rec.labels.dtype == torch.int64
    assert ((rec.labels >= 0) & (rec.labels < obs.num_classes)).all()
    assert isinstance(rec.loss, float) and rec.loss >= 0
    assert rec.trace.shape == (rec.steps, getattr(attack, "restarts", 1))
    if hasattr(attack, "many"):
        assert rec.steps <= attack.steps and rec.gradient_evaluations > attack.restarts
        assert rec.frames.shape[1:] == rec.images.shape and len(rec.frames) == len(rec.frame_steps)
        torch.testing.assert_close(rec.frames[-1], rec.images)


def test_the_loss_is_that_of_the_returned_images(client, rng):
    obs, _ = client("convnet", 2, (3, 12, 12), knows_labels=True)
    rec = InvertingGradients(steps=3, restarts=2)(obs, rng)
    simulated = obs.simulate_rows(rec.images[None], rec.labels[None])
    assert cosine(simulated, obs.gradient).item() == pytest.approx(rec.loss, rel=1e-4)


def test_the_same_generator_gives_the_same_result(iterative, client):
    attack, name = iterative
    obs, _ = client(name, 1, (3, 12, 12))
    first, again, other = (attack(obs, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first.images, again.images) and torch.equal(first.trace, again.trace)
    assert not torch.equal(first.images, other.images)


def test_nothing_of_the_callers_is_changed(contract, client, rng):
    attack, name = contract
    obs, _ = client(name, 1, (3, 12, 12), train=True, knows_labels=True)
    before = copy.deepcopy((obs.model.state_dict(), obs.gradient, obs.labels))
    state, training = torch.get_rng_state(), obs.model.training
    attack(obs, rng)
    torch.testing.assert_close((obs.model.state_dict(), obs.gradient, obs.labels), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and obs.model.training == training
    assert all(p.grad is None for p in obs.model.parameters())


def test_known_labels_are_returned(contract, client, rng):
    attack, name = contract
    obs, batch = client(name, 1 if type(attack) in ONE_IMAGE else 3, (3, 12, 12), knows_labels=True)
    assert attack(obs, rng).labels.tolist() == batch.labels.tolist()


def test_fedavg_is_attacked_by_the_same_code(contract, client, rng):
    attack, name = contract
    size = 1 if type(attack) in ONE_IMAGE else 2
    obs, _ = client(name, size, (3, 12, 12), update=FedAvg(2, lr=0.01), knows_training_details=True)
    assert attack(obs, rng).images.shape == (size, 3, 12, 12)


@pytest.mark.parametrize("known", [False, True])
def test_several_observations_together_are_as_each_alone(iterative, rng, known):
    attack, name = iterative
    size = 1 if type(attack) in ONE_IMAGE else 2
    name = "lenet" if name == "convnet" else name  # the wide network takes its time in float64
    model = models.build(name, num_classes=4, image_shape=(3, 12, 12)).double()
    batches = [Batch(torch.rand(size, 3, 12, 12, generator=rng), torch.arange(k, k + size)) for k in range(3)]
    observations = [observe(model, b, threat=ThreatModel(knows_labels=known), rng=rng) for b in batches]
    together = attack.many(observations, [torch.Generator().manual_seed(k) for k in range(3)])
    for k, rec in enumerate(together):
        alone = attack(observations[k], torch.Generator().manual_seed(k))
        torch.testing.assert_close(rec.images, alone.images, rtol=0, atol=1e-6)
        torch.testing.assert_close(rec.trace, alone.trace, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(rec.frames, alone.frames, rtol=0, atol=1e-6)
        assert torch.equal(rec.labels, alone.labels) and rec.loss == pytest.approx(alone.loss, rel=1e-6)
        assert rec.gradient_evaluations == alone.gradient_evaluations


def test_observations_that_do_not_go_together_are_refused(client):
    attack, name = InvertingGradients(steps=1), "convnet"
    obs, _ = client(name, 2, (3, 12, 12))
    rngs = [torch.Generator(), torch.Generator()]
    for other, fact in (
        (client(name, 1, (3, 12, 12))[0], "batch_size"),
        (client(name, 2, (3, 12, 12), knows_labels=True)[0], "labels"),
        (client(name, 2, (3, 12, 12), num_classes=5)[0], "num_classes, model"),
        (client(name, 2, (3, 12, 12), train=True)[0], "model"),
    ):
        with pytest.raises(ValueError, match=f"together differ in {fact}; attack them apart"):
            attack.many([obs, other], rngs)
    with pytest.raises(ValueError, match="got 1 observations and 2 generators"):
        attack.many([obs], rngs)


NEEDS = [(key, field) for key, (attack, _) in CONTRACT.items() for field in attack.needs]


@pytest.mark.parametrize(("key", "field"), NEEDS)
def test_a_withheld_need_is_answered_by_an_error(client, rng, key, field):
    attack, name = CONTRACT[key]
    withheld = {"batch_size": {"knows_batch_size": False}, "update": {"update": FedAvg(2)}}[field]
    obs, _ = client(name, 1, (3, 12, 12), **withheld)
    with pytest.raises(WithheldError, match=rf"{type(attack).__name__} needs .* withholds it; observe with"):
        attack(obs, rng)


def test_attacks_are_values(contract):
    attack, _ = contract
    assert attack == dataclasses.replace(attack) and hash(attack) == hash(dataclasses.replace(attack))
    if hasattr(attack, "steps"):
        assert attack != dataclasses.replace(attack, steps=99) and f"steps={attack.steps}" in repr(attack)


def test_dlg_warns_of_relu_and_only_then(client, rng):
    attack = DLG(steps=1, max_iter=2)
    obs, _ = client("mlp", 1, (3, 12, 12))
    with pytest.warns(UserWarning, match="second derivatives.*ReLU-like layers have none"):
        attack(obs, rng)
    obs, _ = client("lenet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(obs, rng)


@pytest.mark.parametrize("attack", [DLG(restarts=0), InvertingGradients(steps=0)], ids=str)
def test_no_restarts_or_steps_are_refused(attack, client, rng):
    obs, _ = client()
    with pytest.raises(ValueError, match="both must be at least 1"):
        attack(obs, rng)


# Papers


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 140), (torch.float32, 100)])
def test_the_bias_ratio_is_exact_for_one_image(dtype, least, rng):
    model = models.build("mlp", num_classes=7, image_shape=(3, 32, 32), mean=0.4, std=0.3).to(dtype)
    batch = data.load("photos").batch([8])
    rec = BiasRatio()(observe(model, batch, rng=rng), rng)
    assert evaluate(rec, batch, download=False).psnr.item() > least
    assert rec.labels.tolist() == batch.labels.tolist()


def test_the_bias_ratio_of_a_batch_is_a_mixture_of_its_images(rng):
    model = models.build("mlp", num_classes=4, image_shape=(1, 8, 8)).double()
    batch = data.load("digits").batch([0, 1])
    obs = observe(model, Batch(batch.images, batch.labels % 4), rng=rng)
    dW, db = obs.gradient["net.1.weight"], obs.gradient["net.1.bias"]
    ratios = dW[db.abs() > 1e-9] / db[db.abs() > 1e-9, None]
    basis = batch.images.double().flatten(1)
    weights = torch.linalg.lstsq(basis.T, ratios.T).solution
    torch.testing.assert_close(basis.T @ weights, ratios.T, rtol=0, atol=1e-8)
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["lenet", "vit", "resnet20"])
def test_the_bias_ratio_says_where_it_does_not_apply(name, client, rng):
    obs, _ = client(name, 1, (3, 12, 12))
    with pytest.raises(NotApplicableError, match="needs a first layer that is dense on all 432 pixels"):
        BiasRatio()(obs, rng)


def test_the_bias_ratio_needs_no_training_details(rng):
    """Every local step's ratio is the same image; the loss can't be computed then."""
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8)).double()
    batch = data.load("digits").batch([0])
    rec = BiasRatio()(observe(model, batch, update=FedAvg(3, lr=0.1), rng=rng), rng)
    assert evaluate(rec, batch, download=False).psnr.item() > 100
    assert math.isnan(rec.loss) and rec.steps == 0


def test_the_bias_ratio_of_a_dead_layer_is_an_error(rng):
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8))
    with torch.no_grad():
        model.net[1].bias.fill_(-100)
    obs = observe(model, data.load("digits").batch([0]), rng=rng)
    with pytest.raises(ValueError, match="0 neurons of the first layer have a gradient, and 1 images need as many"):
        BiasRatio()(obs, rng)


def test_idlg_takes_a_known_label_where_it_can_read_none(rng):
    layers = torch.nn.Conv2d(1, 10, 3), torch.nn.Sigmoid(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    model, batch = models.wrap(torch.nn.Sequential(*layers), num_classes=10), data.load("digits").batch([3])
    with pytest.raises(NotApplicableError, match=r"no dense layer .* ThreatModel\(knows_labels=True\)"):
        IDLG(steps=1)(observe(model, batch, rng=rng), rng)
    known = observe(model, batch, threat=ThreatModel(knows_labels=True), rng=rng)
    assert IDLG(steps=1)(known, rng).labels.tolist() == batch.labels.tolist()


def test_idlg_is_dlg_with_the_label_read_off(client):
    obs, batch = client("lenet", 1, (3, 12, 12))
    known = dataclasses.replace(obs, labels=batch.labels)
    mine, dlg = (
        attack(o, torch.Generator().manual_seed(3))
        for attack, o in ((IDLG(steps=2, max_iter=3), obs), (DLG(steps=2, max_iter=3), known))
    )
    assert torch.equal(mine.images, dlg.images) and mine.labels.tolist() == batch.labels.tolist()


def attacked(model_name, attack, *, dataset="digits", index=0, seed=0, **facts):
    dataset = data.load(dataset)
    model = models.build(model_name, num_classes=dataset.num_classes, image_shape=dataset.image_shape, seed=seed)
    batch = dataset.batch([index])
    obs = observe(model, batch, threat=ThreatModel(**facts), rng=torch.Generator())
    rec = attack(obs, torch.Generator().manual_seed(seed))
    return rec, evaluate(rec, batch, download=False), batch


@pytest.mark.parametrize("index", [0, 1, 2])
def test_dlg_is_pixel_exact_on_its_lenet_and_finds_the_label(index):
    rec, scores, batch = attacked("lenet", DLG(steps=40, restarts=4), index=index, seed=index)
    assert scores.psnr.item() > 60 and rec.labels.tolist() == batch.labels.tolist()


def test_dlg_fails_when_relu_takes_the_sigmoids_place(monkeypatch):
    monkeypatch.setattr(torch.nn, "Sigmoid", torch.nn.ReLU)
    with pytest.warns(UserWarning, match="second derivatives"):
        _, scores, _ = attacked("lenet", DLG(steps=15, restarts=2), knows_labels=True)
    assert scores.psnr.item() < 10


def test_inverting_gradients_recovers_a_digit_from_an_mlp():
    _, scores, _ = attacked("mlp", InvertingGradients(steps=100))
    assert scores.psnr.item() > 15
