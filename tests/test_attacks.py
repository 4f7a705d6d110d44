"""The contract that every attack keeps, and the papers' results on their smallest setting."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, WithheldError, data, evaluate, models, observe
from gi_lib.attacks import ATTACKS, DLG, IDLG, BiasRatio, GradInversion, InvertingGradients, RConv, RobbingTheFed
from gi_lib.attacks.gradinversion import registered_mean
from gi_lib.matching import cosine
from gi_lib.optimise import minimise
from gi_lib.types import Needs

CONTRACT = {  # name -> (a small instance, a model that suits it)
    "bias_ratio": (BiasRatio(), "mlp"),
    "dlg": (DLG(steps=2, max_iter=3, restarts=2, frames=2), "lenet"),
    "gradinversion": (GradInversion(steps=3, renew=1, group_start=0.0, restarts=2, frames=2), "convnet"),
    "idlg": (IDLG(steps=2, max_iter=3, restarts=2, frames=2), "lenet"),
    "inverting_gradients": (InvertingGradients(steps=3, restarts=2, frames=2), "convnet"),
    "rconv": (RConv(), "lenet"),
    "robbing_the_fed": (RobbingTheFed(bins=8, surrogates=64), "lenet"),
}
FACTS = {  # field of the Observation -> the fact that grants it
    "client": "knows_training_details",
    "batch_size": "knows_batch_size",
    "labels": "knows_labels",
    "bn_stats": "knows_bn_stats",
    "trapdoor": "malicious_server",
}
pytestmark = pytest.mark.filterwarnings("ignore:the closed form does not hold")


class Noise:
    """Auxiliary data of random images."""

    hash = "noise"

    def __init__(self, *shape):
        self.shape = shape

    def draw(self, n, rng):
        return torch.rand(n, *self.shape, generator=rng), torch.zeros(n, dtype=torch.int64)


@pytest.fixture(params=CONTRACT)
def contract(request):
    return CONTRACT[request.param]


def iterative(attack):
    return hasattr(attack, "steps")


def one_image(attack):
    return attack.needs.batch == 1


@pytest.fixture
def granted(rng):
    """An observation that has all that an attack needs: granted(attack, model name, size, shape, **facts)."""

    def make(attack, name, size=1, shape=(3, 12, 12), train=False, client=None, **facts):
        model = models.build(name, num_classes=4, image_shape=shape).train(train)
        batch = Batch(torch.rand(size, *shape, generator=rng), torch.arange(size) % 4)
        known = {FACTS[field]: True for field in attack.needs.facts} | facts
        trapdoor = None
        if hasattr(attack, "plant"):
            model, trapdoor = attack.plant(model, shape, Noise(*shape), rng)
            trapdoor = trapdoor if known.get("malicious_server") else None
        threat = ThreatModel(**known)
        more = {"client": client or Client(), "threat": threat, "trapdoor": trapdoor}
        return observe(model, batch, **more, rng=rng), batch

    return make


def test_every_attack_has_a_row():
    assert CONTRACT.keys() == ATTACKS.keys()
    assert all(type(attack) is ATTACKS[name] for name, (attack, _) in CONTRACT.items())
    assert all(isinstance(cls.needs, Needs) and isinstance(cls.revision, int) for cls in ATTACKS.values())


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 11, 9)], ids=str)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_shapes_and_ranges(contract, granted, rng, shape, size, train):
    attack, name = contract
    obs, _ = granted(attack, name, size, shape, train=train)
    if size > 1 and one_image(attack):
        with pytest.raises(NotApplicableError, match="takes one image, got batch_size=2; use another attack"):
            attack(obs, rng)
        return
    rec = attack(obs, rng)
    most = attack.at_most(obs) if hasattr(attack, "at_most") else size
    assert len(rec.images) <= most and (len(rec.images) == size or hasattr(attack, "at_most"))
    assert rec.images.shape[1:] == shape and rec.images.dtype == torch.float32
    assert rec.images.min() >= 0 and rec.images.max() <= 1 and not rec.images.requires_grad
    if rec.labels is not None:
        assert rec.labels.shape == (size,) and rec.labels.dtype == torch.int64
        assert ((rec.labels >= 0) & (rec.labels < obs.num_classes)).all()
    assert isinstance(rec.loss, float) and (rec.loss >= -1e-6 or math.isnan(rec.loss))
    if iterative(attack):
        assert rec.trace.shape == (rec.steps, attack.restarts) and rec.losses.shape == (attack.restarts,)
        assert rec.steps <= attack.steps and rec.gradient_evaluations > attack.restarts
        assert rec.frames.shape[1:] == rec.images.shape and len(rec.frames) == len(rec.frame_steps)
        assert rec.frame_evaluations[-1] == rec.gradient_evaluations
        assert sorted(rec.frame_evaluations) == rec.frame_evaluations and rec.frame_seconds[-1] > 0
        torch.testing.assert_close(rec.frames[-1], rec.images)


def test_the_loss_is_that_of_the_returned_images(client, rng):
    obs, _ = client("convnet", 2, (3, 12, 12), knows_labels=True)
    rec = InvertingGradients(steps=3, restarts=2)(obs, rng)
    assert cosine(obs.simulate(rec.images, rec.labels), obs.gradient).item() == pytest.approx(rec.loss, rel=1e-4)
    assert rec.loss == rec.losses.min()


def test_the_same_generator_gives_the_same_result(contract, granted):
    attack, name = contract
    obs, _ = granted(attack, name)
    first, again, other = (attack(obs, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first.images, again.images) and torch.equal(first.trace, again.trace)
    assert torch.equal(first.images, other.images) != iterative(attack)


def test_nothing_of_the_callers_is_changed(contract, granted, rng):
    attack, name = contract
    obs, _ = granted(attack, name, train=True, knows_labels=True)
    before = copy.deepcopy((obs.model.state_dict(), obs.gradient, obs.labels))
    state, training = torch.get_rng_state(), obs.model.training
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.get_num_threads()
    attack(obs, rng)
    torch.testing.assert_close((obs.model.state_dict(), obs.gradient, obs.labels), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and obs.model.training == training
    assert all(p.grad is None for p in obs.model.parameters())
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.get_num_threads()) == flags


def test_known_labels_are_returned_in_ascending_order(contract, rng, granted):
    attack, name = contract
    obs, batch = granted(attack, name, 1 if one_image(attack) else 3, knows_labels=True)
    found = attack(obs, rng).labels
    found = found if iterative(attack) or found is None else found.sort().values  # a closed form knows whose is whose
    assert found is None or found.tolist() == batch.labels.sort().values.tolist()


def test_fedavg_is_attacked_by_the_same_code(contract, granted, rng):
    attack, name = contract
    size = 1 if one_image(attack) else 2
    client = Client(steps=2, lr=0.01)
    obs, _ = granted(attack, name, size, client=client, knows_training_details=True)
    assert attack(obs, rng).images.shape[1:] == (3, 12, 12)


@pytest.mark.parametrize("rows", [1, 2])
def test_how_many_rows_go_at_once_changes_nothing(contract, granted, monkeypatch, rows):
    """In float64; GradInversion's rows meet in a consensus, and even they do so between steps only."""
    attack, name = contract
    obs, _ = granted(attack, "resnet20" if name == "convnet" else name, 1 if one_image(attack) else 2)
    obs = dataclasses.replace(
        obs,
        model=obs.model.double(),
        gradient={name: g.double() for name, g in obs.gradient.items()},
        bn_stats=obs.bn_stats and {k: (m.double(), v.double()) for k, (m, v) in obs.bn_stats.items()},
    )
    attack = dataclasses.replace(attack, restarts=3) if iterative(attack) else attack
    all_at_once = attack(obs, torch.Generator().manual_seed(0))
    size = sum(g.numel() for g in obs.gradient.values())
    monkeypatch.setattr("gi_lib.execution.STACKED_ENTRIES", rows * size)
    parts = attack(obs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts.images, all_at_once.images, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts.trace, all_at_once.trace, rtol=1e-10, atol=1e-12)


NEEDS = [(key, field) for key, (attack, _) in CONTRACT.items() for field in attack.needs.facts]


@pytest.mark.parametrize(("key", "field"), NEEDS)
def test_a_withheld_need_is_answered_by_an_error(granted, rng, key, field):
    attack, name = CONTRACT[key]
    fact = FACTS[field]
    client = Client(steps=2) if field == "client" else None
    obs, _ = granted(attack, name, client=client, **{fact: False})
    with pytest.raises(WithheldError, match=rf"{type(attack).__name__} needs .* withholds it; observe with.*{fact}"):
        attack(obs, rng)


BAD_SETTINGS = [
    (DLG, {"steps": 0}, "DLG needs steps, a whole number >= 1, got 0"),
    (DLG, {"restarts": 0}, "DLG needs restarts"),
    (DLG, {"history": 0}, "DLG needs history"),
    (DLG, {"lr": -1.0}, "DLG needs lr, a finite number > 0, got -1.0"),
    (DLG, {"frames": -1}, "DLG needs frames, a whole number >= 0"),
    (InvertingGradients, {"tv": math.nan}, "InvertingGradients needs tv, a finite number >= 0, got nan"),
    (InvertingGradients, {"tv": -1e-3}, "InvertingGradients needs tv"),
    (InvertingGradients, {"lr": math.inf}, "InvertingGradients needs lr, a finite number > 0, got inf"),
    (InvertingGradients, {"steps": -5}, "InvertingGradients needs steps"),
    (GradInversion, {"renew": 0}, "GradInversion needs renew"),
    (GradInversion, {"bn": math.nan}, "GradInversion needs bn"),
    (RobbingTheFed, {"bins": 1}, "RobbingTheFed needs bins, a whole number >= 2"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused_when_the_attack_is_made(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_attacks_are_values(contract):
    attack, _ = contract
    assert attack == dataclasses.replace(attack) and hash(attack) == hash(dataclasses.replace(attack))
    if iterative(attack):
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
    with pytest.raises(
        NotApplicableError, match="BiasRatio does not apply: .* needs one on all 432 pixels.*begins with"
    ):
        BiasRatio()(obs, rng)


def test_the_bias_ratio_needs_no_training_details(rng):
    """Every local step's ratio is the same image; the loss can't be computed then."""
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8)).double()
    batch = data.load("digits").batch([0])
    rec = BiasRatio()(observe(model, batch, client=Client(steps=3, lr=0.1), rng=rng), rng)
    assert evaluate(rec, batch, download=False).psnr.item() > 100
    assert math.isnan(rec.loss) and rec.steps == 0 and rec.notes["certified"] is None


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
    with pytest.raises(
        NotApplicableError, match=r"IDLG does not apply: no dense layer .* ThreatModel\(knows_labels=True\)"
    ):
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


class Flipped(torch.nn.Module):
    """Looks at the pixels from right to left, channels last."""

    def __init__(self):
        super().__init__()
        self.last, self.first = torch.nn.Linear(16, 4), torch.nn.Linear(192, 16)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.flip(3).permute(0, 2, 3, 1).flatten(1))))


def test_the_bias_ratio_finds_the_order_of_the_pixels_and_of_the_layers(rng):
    model = models.wrap(Flipped().double(), mean=[0.4, 0.5, 0.6], std=0.2, num_classes=4)
    batch = Batch(torch.rand(1, 3, 8, 8, generator=rng), torch.tensor([2]))
    rec = BiasRatio()(observe(model, batch, rng=rng), rng)
    assert evaluate(rec, batch, download=False).psnr.item() > 140
    assert rec.notes["certified"] and rec.notes["relative_error"] < 1e-12


def test_the_bias_ratio_of_pixels_that_are_changed_does_not_apply(rng):
    net = torch.nn.Sequential(torch.nn.Sigmoid(), torch.nn.Flatten(), torch.nn.Linear(192, 4))
    obs = observe(models.wrap(net, num_classes=4), Batch(torch.rand(1, 3, 8, 8), torch.tensor([1])), rng=rng)
    with pytest.raises(NotApplicableError, match="changes the pixels before it, and not their order alone"):
        BiasRatio()(obs, rng)


def test_the_bias_ratio_of_a_frozen_layer_does_not_apply(rng):
    model = models.build("mlp", num_classes=4, image_shape=(3, 8, 8))
    model.net[1].requires_grad_(False)
    obs = observe(model, Batch(torch.rand(1, 3, 8, 8), torch.tensor([1])), rng=rng)
    with pytest.raises(NotApplicableError, match=r"net\.1\.weight, net\.1\.bias of the first layer are frozen"):
        BiasRatio()(obs, rng)


def test_the_certificate_of_a_batch_knows_whose_label_is_whose(rng):
    """Two images of which each lights a neuron of its own: the ratio is exact, and the labels come in another order."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 5.0, 0, 0]]))
        net[1].bias.fill_(-0.5)
    images = torch.tensor([[[[0.9, 0.0], [0.3, 0.2]]], [[[0.0, 0.8], [0.1, 0.7]]]])
    obs = observe(models.wrap(net.double(), num_classes=3), Batch(images, torch.tensor([2, 0])), rng=rng)
    rec = BiasRatio()(obs, rng)
    assert evaluate(rec, Batch(images, torch.tensor([2, 0])), download=False).psnr.min() > 100
    assert rec.notes["certified"] and sorted(rec.labels.tolist()) == [0, 2]


@pytest.mark.filterwarnings("default:the closed form does not hold")
def test_a_closed_form_says_where_it_does_not_hold(rng):
    model = models.build("mlp", num_classes=4, image_shape=(1, 8, 8))
    batch = Batch(torch.rand(2, 1, 8, 8, generator=rng), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="the closed form does not hold here: the gradient of what it returns is"):
        rec = BiasRatio()(observe(model, batch, rng=rng), rng)
    assert rec.notes["certified"] is False and rec.notes["relative_error"] > 1e-3


def test_a_consensus_registers_what_is_shifted(rng):
    """Seeds that hold one picture, each shifted, agree after registration, and with repeated labels after matching."""
    picture = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6, generator=rng), size=(32, 32), mode="bicubic")
    shifts = [(0, 0), (2, -3), (-1, 1), (1, 2), (-2, 0)]
    seeds = torch.stack([picture.roll(shift, (2, 3)) for shift in shifts])
    E = registered_mean(seeds, torch.tensor([0, 1, 2]))
    aligned = [E.roll((a, b), (2, 3)) for a in range(-4, 5) for b in range(-4, 5)]
    assert min((e - picture).abs().max().item() for e in aligned) < 1e-5
    assert (seeds.mean(0) - picture).abs().max() > 0.1
    swapped = torch.stack([picture, picture[[1, 0, 2]]])
    torch.testing.assert_close(registered_mean(swapped, torch.tensor([1, 1, 2])), picture)


def test_gradinversion_is_pulled_to_its_consensus(monkeypatch):
    """With the group term alone, the seeds end near each other."""
    shape, ends = (3, 12, 12), []
    model = models.build("resnet20", num_classes=4, image_shape=shape).double()
    batch = Batch(torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))
    obs = observe(model, batch, threat=ThreatModel(knows_bn_stats=True), rng=torch.Generator())

    def kept(*arguments, **settings):
        ends.append(minimise(*arguments, **settings))
        return ends[-1]

    monkeypatch.setattr("gi_lib.search.minimise", kept)
    alone = {"gradient": 0.0, "tv": 0.0, "l2": 0.0, "bn": 0.0, "group_start": 0.0, "renew": 5, "warm_up": 0}
    for group in (0.0, 1.0):
        GradInversion(steps=30, restarts=3, group=group, **alone)(obs, torch.Generator().manual_seed(0))
    free, pulled = (end.variables[0].std(0).mean() for end in ends)
    assert pulled < 0.3 * free


def expected_share(bins, size):
    return (1 - 1 / bins) ** (size - 1)


def test_robbing_the_fed_recovers_the_share_of_the_formula():
    """64 bins, batches of 16 of random brightness: images alone in their bin come back exactly."""
    shape, bins, size, batches = (1, 8, 8), 64, 16, 20

    class Uniform(Noise):
        def draw(self, n, rng):
            brightness = torch.rand(n, 1, 1, 1, generator=rng)
            return brightness * torch.rand(n, *shape, generator=rng), torch.zeros(n, dtype=torch.int64)

    rng, attack = torch.Generator().manual_seed(0), RobbingTheFed(bins=bins, surrogates=20_000)
    model = models.build("lenet", num_classes=4, image_shape=shape, mean=0.4, std=0.3).double()
    planted, trapdoor = attack.plant(model, shape, Uniform(*shape), rng)
    alone = 0
    for _ in range(batches):
        images, _ = Uniform(*shape).draw(size, rng)
        threat = ThreatModel(malicious_server=True)
        obs = observe(planted, Batch(images, torch.arange(size) % 4), threat=threat, trapdoor=trapdoor, rng=rng)
        rec = attack(obs, rng)
        scores = evaluate(rec, Batch(images, torch.arange(size) % 4), download=False)
        exact = scores.psnr.nan_to_num(0) > 100
        alone += int(exact.sum())
        assert len(rec.images) <= size and rec.notes["lit_bins"] <= size
    assert alone / (batches * size) == pytest.approx(expected_share(bins, size), abs=0.07)


def test_robbing_the_fed_needs_data_of_its_own(rng):
    model = models.build("lenet", num_classes=4, image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="quantiles of images of the server's own; give it auxiliary data"):
        RobbingTheFed().plant(model, (3, 8, 8), None, rng)


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


def test_labels_that_are_known_stay_known_where_nothing_can_be_certified(rng):
    batch = Batch(torch.rand(1, 1, 8, 8), torch.tensor([3]))
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8))
    obs = observe(model, batch, client=Client(steps=2), threat=ThreatModel(knows_labels=True), rng=rng)
    rec = BiasRatio()(obs, rng)
    assert rec.labels.tolist() == [3] and rec.notes["certified"] is None
