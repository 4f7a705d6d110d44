"""The contract that every attack keeps, and the papers' results on their smallest setting."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch

from gi_lib import (
    Batch,
    Client,
    NotApplicableError,
    ThreatModel,
    WithheldError,
    data,
    evaluate,
    labels,
    models,
    observe,
)
from gi_lib.attacks import (
    AGIC,
    ARES,
    ATTACKS,
    COPA,
    CPL,
    DLG,
    E2EGI,
    IDLG,
    LOKI,
    MKOR,
    QBI,
    RGAP,
    SAPAG,
    SEER,
    SME,
    SPEAR,
    VGIA,
    BatchNormUpdate,
    BayesOptimal,
    BiasRatio,
    CocktailFeatures,
    CocktailParty,
    FedAvgEpochs,
    FedLeak,
    Fishing,
    GradInversion,
    HFGradInv,
    InvertingGradients,
    Multiscale,
    PracticalRecipe,
    RConv,
    RobbingTheFed,
    SPEARpp,
    TrapWeights,
)
from gi_lib.attacks.e2egi import best_seed, minimum_loss
from gi_lib.attacks.gradinversion import change_places, plain_mean, registered_mean
from gi_lib.attacks.hf_gradinv import quantised
from gi_lib.attacks.multiscale import enlarge, focus
from gi_lib.attacks.practical_recipe import features_of
from gi_lib.attacks.robbing_the_fed import CosineRow
from gi_lib.copies import running_statistics
from gi_lib.defenses import GaussianNoise
from gi_lib.matching import cosine, gaussian_kernel
from gi_lib.optimise import hard_sign, minimise
from gi_lib.priors import feature_distance, isotropic_total_variation, statistics_distance
from gi_lib.search import gaussian, patterned, search
from gi_lib.types import Needs

CONTRACT = {  # name -> (a small instance, a model that suits it)
    "agic": (AGIC(steps=3, restarts=2, frames=2), "lenet"),
    "ares": (ARES(bins=8, surrogates=64, iterations=20), "mlp"),
    "bayes": (BayesOptimal(steps=3, restarts=2, frames=2), "convnet"),
    "bias_ratio": (BiasRatio(), "mlp"),
    "bn_update": (BatchNormUpdate(steps=3, restarts=2, frames=2), "resnet20"),
    "cocktail": (CocktailParty(iterations=4, frames=2), "mlp"),
    "cocktail_features": (CocktailFeatures(iterations=4, steps=4, restarts=2, frames=2), "cnn2"),
    "copa": (COPA(iterations=3), "cnn6"),
    "cpl": (CPL(steps=2, max_iter=3, restarts=2, label=0.1, frames=2), "lenet"),
    "dlg": (DLG(steps=2, max_iter=3, restarts=2, frames=2), "lenet"),
    "fedleak": (FedLeak(steps=3, restarts=2, frames=2), "lenet"),
    "fedavg_epochs": (FedAvgEpochs(steps=3, restarts=2, frames=2), "lenet"),
    "e2egi": (E2EGI(steps=4, blocks=1, restarts=2, frames=2), "convnet"),
    "fishing": (Fishing(), "mlp"),
    "gradinversion": (GradInversion(steps=3, renew=1, group_start=0.0, restarts=2, frames=2), "convnet"),
    "hf_gradinv": (HFGradInv(steps=3, restarts=2, frames=2), "convnet"),
    "idlg": (IDLG(steps=2, max_iter=3, restarts=2, frames=2), "lenet"),
    "inverting_gradients": (InvertingGradients(steps=3, restarts=2, frames=2), "convnet"),
    "rgap": (RGAP(), "cnn6"),
    "loki": (LOKI(clients=1, bins=8, surrogates=64), "lenet"),
    "mkor": (MKOR(), "mlp"),
    "multiscale": (Multiscale(steps=6, stages=3, restarts=2, frames=3), "lenet"),
    "practical_recipe": (PracticalRecipe(steps=3, restarts=2, frames=2), "lenet"),
    "qbi": (QBI(rows=64, batch=2, mean=0.5, std=0.3), "mlp"),
    "rconv": (RConv(), "lenet"),
    "robbing_the_fed": (RobbingTheFed(bins=8, surrogates=64), "lenet"),
    "sapag": (SAPAG(steps=3, restarts=2, tv=1e-3, frames=2), "lenet"),
    "seer": (SEER(updates=2, batch=2, batches=2, entries=50, fit=8, surrogates=32), "lenet"),
    "sme": (SME(steps=3, restarts=2, bend=0.01, frames=2), "lenet"),
    "trap_weights": (TrapWeights(rows=64), "lenet"),
    "vgia": (VGIA(slabs=8, surrogates=64), "lenet"),
    "spear": (SPEAR(draws=400, chunk=200), "mlp"),
    "spear_pp": (SPEARpp(rounds=3, starts=20), "mlp"),
}
FACTS = {  # field of the Observation -> the fact that grants it
    "client": "knows_training_details",
    "batch_size": "knows_batch_size",
    "labels": "knows_labels",
    "bn_stats": "knows_bn_stats",
    "buffers": "knows_buffers",
    "defense": "knows_defense",
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
        moves = "buffers" in attack.needs.facts  # running statistics move in train mode alone
        model = models.build(name, num_classes=4, image_shape=shape).train(train or moves)
        batch = Batch(torch.rand(size, *shape, generator=rng), torch.arange(size) % 4)
        known = {FACTS[field]: True for field in attack.needs.facts} | facts
        trapdoor = None
        if hasattr(attack, "plant"):
            model, trapdoor = attack.plant(model, shape, Noise(*shape), rng)
            trapdoor = trapdoor if known.get("malicious_server") else None
        threat = ThreatModel(**known)
        more = {"client": client or Client(), "threat": threat, "trapdoor": trapdoor}
        more["defense"] = GaussianNoise(1e-4) if "defense" in attack.needs.facts else None
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
        assert rec.labels.shape == (len(rec.images),) and rec.labels.dtype == torch.int64
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
    whole = batch.labels.sort().values[: None if found is None else len(found)]  # fishing takes one, of class 0
    assert found is None or found.tolist() == whole.tolist()


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
    (ARES, {"bins": 1}, "ARES needs bins, a whole number >= 2, got 1"),
    (ARES, {"p": -0.5}, "ARES needs p, a finite number >= 0, got -0.5"),
    (ARES, {"iterations": 0}, "ARES needs iterations, a whole number >= 1, got 0"),
    (VGIA, {"families": 1}, "VGIA needs families, a whole number >= 2, got 1"),
    (VGIA, {"slabs": 1}, "VGIA needs slabs, a whole number >= 2, got 1"),
    (AGIC, {"last": 0.0}, "AGIC needs last, a finite number > 0, got 0.0"),
    (FedAvgEpochs, {"copies": -1}, "FedAvgEpochs needs copies, a whole number >= 0, got -1"),
    (FedAvgEpochs, {"invariance": -1.0}, "FedAvgEpochs needs invariance, a finite number >= 0"),
    (FedAvgEpochs, {"factor": (0.0, 1.0)}, "FedAvgEpochs needs factor, two numbers > 0"),
    (SEER, {"batch": 1}, "SEER needs batch, a whole number >= 2, got 1"),
    (SEER, {"updates": 0}, "SEER needs updates, a whole number >= 1, got 0"),
    (SEER, {"decoder_lr": 0.0}, "SEER needs decoder_lr, a finite number > 0, got 0.0"),
    (SEER, {"property": "brightest"}, "SEER needs property, a function, got 'brightest'"),
    (SME, {"alpha": 1.5}, "SME needs alpha, a share of the way from 0 to 1, got 1.5"),
    (SME, {"lr_a": -0.1}, "SME needs lr_a, a finite number >= 0"),
    (SME, {"bend": math.nan}, "SME needs bend, a finite number >= 0"),
    (CocktailFeatures, {"w_sign": -1.0}, "CocktailFeatures needs w_sign, a finite number >= 0"),
    (COPA, {"iterations": 0}, "COPA needs iterations, a whole number >= 1, got 0"),
    (CPL, {"pattern": 0}, "CPL needs pattern, a whole number >= 1, got 0"),
    (CPL, {"label": -1.0}, "CPL needs label, a finite number >= 0, got -1.0"),
    (CPL, {"lr": 0.0}, "CPL needs lr"),
    (BayesOptimal, {"start": 0.0}, "BayesOptimal needs start, a finite number > 0"),
    (BayesOptimal, {"tv": math.inf}, "BayesOptimal needs tv, a finite number >= 0"),
    (DLG, {"steps": 0}, "DLG needs steps, a whole number >= 1, got 0"),
    (DLG, {"restarts": 0}, "DLG needs restarts"),
    (DLG, {"history": 0}, "DLG needs history"),
    (DLG, {"lr": -1.0}, "DLG needs lr, a finite number > 0, got -1.0"),
    (DLG, {"frames": -1}, "DLG needs frames, a whole number >= 0"),
    (InvertingGradients, {"tv": math.nan}, "InvertingGradients needs tv, a finite number >= 0, got nan"),
    (InvertingGradients, {"tv": -1e-3}, "InvertingGradients needs tv"),
    (InvertingGradients, {"lr": math.inf}, "InvertingGradients needs lr, a finite number > 0, got inf"),
    (InvertingGradients, {"steps": -5}, "InvertingGradients needs steps"),
    (BatchNormUpdate, {"bn": -1.0}, "BatchNormUpdate needs bn, a finite number >= 0"),
    (BatchNormUpdate, {"steps": 0}, "BatchNormUpdate needs steps"),
    (FedLeak, {"fraction": 0.0}, "FedLeak needs fraction, a finite number > 0, got 0.0"),
    (FedLeak, {"fraction": 1.5}, "FedLeak needs fraction and mix of at most 1, got 1.5 and 0.5"),
    (FedLeak, {"mix": -0.1}, "FedLeak needs mix, a finite number >= 0"),
    (FedLeak, {"rho": 0.0}, "FedLeak needs rho"),
    (E2EGI, {"steps": 1}, "E2EGI needs steps, a whole number >= 2, got 1"),
    (E2EGI, {"alone": 0.6, "together": 0.4}, r"E2EGI needs alone \+ together < 1, since the last phase"),
    (GradInversion, {"renew": 0}, "GradInversion needs renew"),
    (GradInversion, {"bn": math.nan}, "GradInversion needs bn"),
    (Fishing, {"target": -1}, "Fishing needs target, a whole number >= 0, got -1"),
    (Fishing, {"attack": "dlg"}, "Fishing needs attack, a function, got 'dlg'"),
    (Fishing, {"scale": 0.0}, "Fishing needs scale, a finite number > 0"),
    (LOKI, {"clients": 0}, "LOKI needs clients, a whole number >= 1, got 0"),
    (LOKI, {"bins": 1}, "LOKI needs bins, a whole number >= 2, got 1"),
    (LOKI, {"scale": -1.0}, "LOKI needs scale, a finite number > 0, got -1.0"),
    (MKOR, {"sink": 0.0}, "MKOR needs sink, a finite number > 0, got 0.0"),
    (HFGradInv, {"keep": 1.5}, "HFGradInv needs keep <= 1 and deep <= shallow < 1"),
    (HFGradInv, {"deep": 0.5, "shallow": 0.4}, "HFGradInv needs keep <= 1 and deep <= shallow < 1"),
    (HFGradInv, {"tv_start": -0.1}, "HFGradInv needs tv_start"),
    (Multiscale, {"stages": 0}, "Multiscale needs stages, a whole number >= 1, got 0"),
    (Multiscale, {"stages": 7, "steps": 6}, "Multiscale needs steps, a whole number >= 7, got 6"),
    (PracticalRecipe, {"patch": 0}, "PracticalRecipe needs patch, a whole number >= 1, got 0"),
    (PracticalRecipe, {"warm_up": -1}, "PracticalRecipe needs warm_up, a whole number >= 0"),
    (PracticalRecipe, {"feature": -0.1}, "PracticalRecipe needs feature, a finite number >= 0"),
    (RobbingTheFed, {"bins": 1}, "RobbingTheFed needs bins, a whole number >= 2"),
    (CosineRow, {"mode": -1}, "CosineRow needs mode, a whole number >= 0"),
    (QBI, {"rows": 0}, "QBI needs rows, a whole number >= 1, got 0"),
    (QBI, {"batch": 1}, "QBI needs batch, a whole number >= 2, got 1"),
    (QBI, {"mean": 0.5}, "QBI needs mean and std of a pixel, both or neither"),
    (QBI, {"mean": 0.5, "std": 0.0}, "QBI needs std, a finite number > 0"),
    (TrapWeights, {"rows": 0}, "TrapWeights needs rows, a whole number >= 1, got 0"),
    (TrapWeights, {"sigma": 0.0}, "TrapWeights needs sigma, a finite number > 0"),
    (TrapWeights, {"scale": 1.0}, "TrapWeights needs scale < 1, got 1.0: from 1 on half of all images light a row"),
    (CocktailParty, {"w_tv": -1.0}, "CocktailParty needs w_tv, a finite number >= 0"),
    (CocktailParty, {"iterations": 0}, "CocktailParty needs iterations"),
    (SPEAR, {"draws": 0}, "SPEAR needs draws, a whole number >= 1, got 0"),
    (SPEAR, {"tau": 0.0}, "SPEAR needs tau, a finite number > 0"),
    (SPEARpp, {"starts": -1}, "SPEARpp needs starts, a whole number >= 1"),
    (SAPAG, {"wide": 0.5}, "SAPAG needs wide, a finite number >= 1, got 0.5"),
    (SAPAG, {"decay": -0.1}, "SAPAG needs decay"),
    (SAPAG, {"tv": math.nan}, "SAPAG needs tv"),
    (SAPAG, {"lr": 0.0}, "SAPAG needs lr"),
    (SAPAG, {"steps": 0}, "SAPAG needs steps"),
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


def test_cpl_begins_with_its_pattern_and_its_label_term_is_added(client):
    """Before the first step the loss is that of the pattern, by hand; with the term it is larger by alpha |p - y|^2."""
    obs, batch = client("lenet", 1, (3, 12, 12))
    plain, termed = (CPL(steps=1, max_iter=1, pattern=5, label=alpha, frames=1) for alpha in (0.0, 0.7))
    traces = [attack(obs, torch.Generator().manual_seed(4)).trace.item() for attack in (plain, termed)]
    patch = torch.rand(1, 1, 3, 5, 5, generator=torch.Generator().manual_seed(4))[0]
    pattern = torch.cat([torch.cat([patch] * 3, 2)] * 3, 3)[..., :12, :12]
    apart = sum((obs.simulate(pattern, batch.labels)[k] - g).square().sum() for k, g in obs.gradient.items()).item()
    p = obs.model(pattern).softmax(1).squeeze(0)
    term = sum((v - (k == batch.labels.item())) ** 2 for k, v in enumerate(p.tolist()))
    assert traces[0] == pytest.approx(apart, rel=1e-5) and traces[1] == pytest.approx(apart + 0.7 * term, rel=1e-5)


def test_cpl_without_its_term_is_idlg_from_another_start(client, monkeypatch):
    obs, _ = client("lenet", 1, (3, 12, 12))
    monkeypatch.setattr("gi_lib.attacks.cpl.patterned", lambda obs, width: gaussian(obs))
    mine, idlg = (attack(steps=2, max_iter=3)(obs, torch.Generator().manual_seed(3)) for attack in (CPL, IDLG))
    assert torch.equal(mine.images, idlg.images) and torch.equal(mine.trace, idlg.trace)


def test_a_wrong_label_ruins_cpl(client):
    obs, batch = client("lenet", 1, (3, 12, 12))
    wrong = dataclasses.replace(obs, labels=(batch.labels + 1) % 4)
    attack = CPL(steps=8, pattern=6)
    right, misled = (attack(view, torch.Generator().manual_seed(3)) for view in (obs, wrong))
    assert right.loss < 1e-3 * misled.loss


def test_the_kernel_of_sapag_narrows_to_its_width(client):
    obs, batch = client("lenet", 1, (3, 12, 12))
    rec = SAPAG(steps=4, wide=7.0)(obs, torch.Generator().manual_seed(3))
    start = torch.randn(1, 1, 3, 12, 12, generator=torch.Generator().manual_seed(3))[0]
    assert rec.trace[0].item() == pytest.approx(
        gaussian_kernel(obs.simulate(start, batch.labels), obs.gradient, 7.0).item(), rel=1e-5
    )
    end = gaussian_kernel(obs.simulate(rec.images, batch.labels), obs.gradient, 1.0)
    assert rec.loss == pytest.approx(end.item(), rel=1e-5)


@pytest.mark.parametrize("attack", [DLG(steps=2, max_iter=4), CPL(steps=2, max_iter=4)], ids=lambda a: type(a).__name__)
def test_l_bfgs_seeks_what_the_network_sees(attack):
    """A network that normalises, on images that are scaled to meet it, is the same search."""
    batch, plain = data.load("digits").batch([0]), models.build("lenet", num_classes=10, image_shape=(1, 8, 8)).double()
    scaled = models.wrap(plain.net, mean=0.2, std=0.5, num_classes=10)
    traces = []
    for model, images in ((plain, batch.images), (scaled, 0.2 + 0.5 * batch.images)):
        obs = observe(model, Batch(images, batch.labels), threat=ThreatModel(knows_labels=True), rng=torch.Generator())
        traces.append(attack(obs, torch.Generator().manual_seed(0)).trace)
    torch.testing.assert_close(*traces)


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
    """Seeds that hold one picture, each shifted, agree after registration; one that is too far off stays in place."""
    picture = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6, generator=rng), size=(32, 32), mode="bicubic")
    shifts = [(0, 0), (2, -1), (-1, 1), (1, 2), (-2, 0)]
    seeds = torch.stack([picture.roll(shift, (2, 3)) for shift in shifts])
    E = registered_mean(seeds)
    aligned = [E.roll((a, b), (2, 3)) for a in range(-4, 5) for b in range(-4, 5)]
    errors = torch.stack([(e - picture).abs().amax((1, 2, 3)) for e in aligned])
    assert errors.min(0).values.max() < 1e-5
    assert (seeds.mean(0) - picture).abs().max() > 0.1
    far = torch.stack([picture, picture, picture.roll(9, 3)])
    torch.testing.assert_close(registered_mean(far), plain_mean(far))


@pytest.mark.parametrize("shifts", [[(0, 0), (2, -1)], [(0, 0), (0, 2), (2, 0), (2, 2)], [*[(0, 0)] * 3, (2, 2)]])
def test_seeds_with_noise_of_their_own_are_registered(shifts, rng):
    """The mean of all, with an image in it, would hold the image in place by its own noise."""
    photos = data.load("photos", size=32).batch(range(6)).images
    seeds = torch.stack([photos.roll(shift, (2, 3)) for shift in shifts])
    seeds += 0.1 * torch.randn(seeds.shape, generator=rng)

    def apart(E):
        moved = [E.roll((a, b), (2, 3)) for a in range(-2, 3) for b in range(-2, 3)]
        errors = torch.stack([(e - photos).square().mean((1, 2, 3)) for e in moved])
        return errors.min(0).values.mean().item() - 0.1**2 / len(seeds)

    assert apart(registered_mean(seeds)) < 0.3 * apart(plain_mean(seeds))


def test_slots_of_one_label_change_places_with_their_memory(rng):
    images = torch.rand(3, 1, 4, 4, generator=rng)
    swapped = torch.stack([images, images[[1, 0, 2]]])
    memory = {"m": [10 * swapped], "v": [swapped.square()]}
    change_places(swapped, torch.tensor([1, 1, 2]), memory)
    assert torch.equal(swapped[1], images)
    assert torch.equal(memory["m"][0][1], 10 * images) and torch.equal(memory["v"][0][1], images.square())
    crossed = torch.stack([images, images[[2, 1, 0]]])
    change_places(crossed, torch.tensor([1, 1, 2]), {})
    assert torch.equal(crossed[1][2], images[0]), "slots of different labels"


def test_gradinversion_reads_distinct_labels_by_the_column_minimum(client, rng):
    obs, batch = client("resnet20", 3, (3, 8, 8), num_classes=6)
    attack = GradInversion(steps=1, restarts=1, bn=0.0)
    assert attack(obs, rng).labels.tolist() == labels.column_min(obs).tolist() == batch.labels.tolist()
    known = dataclasses.replace(obs, labels=torch.tensor([4, 4, 5]))
    assert attack(known, rng).labels.tolist() == [4, 4, 5]
    many, _ = client("resnet20", 5, (3, 8, 8), num_classes=3)
    with pytest.raises(NotApplicableError, match="GradInversion does not apply: column_min finds no repeats.*infer"):
        attack(many, rng)


def test_a_seed_that_is_lost_does_not_spoil_the_consensus(client, rng):
    """The other seeds end where they end without it."""
    obs, _ = client("resnet20", 2, (3, 8, 8), knows_bn_stats=True)
    seeds = []

    def watched(x):
        seeds.append(len(x))
        return plain_mean(x)

    attack = GradInversion(steps=3, renew=1, group_start=0.0, restarts=3, consensus=watched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gi_lib.attacks.gradinversion.gaussian", lambda obs: spoiled(gaussian(obs)))
        rec = attack(obs, rng)
    assert seeds == [2, 2, 2] and rec.losses.isfinite().tolist() == [False, True, True]


def spoiled(start):
    def begin(rows, rng):
        z = start(rows, rng)
        z[0] = torch.nan
        return z

    return begin


WITHOUT = [GradInversion(steps=2, restarts=2, bn=0.0), E2EGI(steps=2, restarts=2, bn=0.0), HFGradInv(steps=2, bn=0.0)]


@pytest.mark.parametrize("attack", WITHOUT, ids=lambda attack: type(attack).__name__)
def test_without_their_term_nothing_of_batch_norm_is_needed(attack, client, rng):
    obs, _ = client("lenet", 2, (3, 8, 8))
    assert attack(obs, rng).images.shape == (2, 3, 8, 8)
    with pytest.raises(NotApplicableError, match="has no batch norm, whose statistics are matched; set bn=0"):
        dataclasses.replace(attack, bn=0.1)(obs, rng)


def distance_of(tensors):
    """To the nearest of them, of one batch [B, ...]."""
    return lambda z: min((z - t).square().sum() for t in tensors)


@pytest.mark.parametrize("seed", range(5))
def test_the_combined_loss_never_exceeds_the_best_seeds(seed):
    """With any loss of a batch, slots that interact included; and the control is the best seed itself."""
    rng = torch.Generator().manual_seed(seed)
    x, goal = (torch.rand(n, 3, 1, 4, 4, generator=rng) for n in (4, 2))
    loss = distance_of(goal)
    best, combined = best_seed(x, loss), minimum_loss(x, loss)
    own = torch.stack([loss(batch) for batch in x])
    assert best.loss == own.min() and torch.equal(best.x, x[own.argmin()]) and torch.equal(best.losses, own)
    assert combined.loss <= best.loss and combined.loss == loss(combined.x).item()
    slots = [any(torch.equal(image, other) for other in x[:, i]) for i, image in enumerate(combined.x)]
    assert all(slots) and 4 + 3 * 3 <= combined.evaluations <= 4 + 3 * 4


def test_a_combination_takes_each_image_from_the_seed_that_has_it(rng):
    truth = torch.rand(3, 1, 4, 4, generator=rng)
    x = torch.rand(3, 3, 1, 4, 4, generator=rng)
    for s, i in ((2, 0), (0, 1), (1, 2)):
        x[s, i] = truth[i]
    found = minimum_loss(x, distance_of([truth]))
    assert torch.equal(found.x, truth) and found.loss == 0
    x[1] = torch.nan  # a seed that is lost gives nothing, and does no harm
    found = minimum_loss(x, distance_of([truth]))
    assert torch.equal(found.x[:2], truth[:2]) and math.isfinite(found.loss)


def test_e2egi_ends_from_the_last_combination_of_its_seeds(client, monkeypatch):
    obs, _ = client("resnet20", 2, (3, 8, 8), knows_bn_stats=True, knows_labels=True)
    made, starts = [], []

    def watched(x, match):
        made.append(minimum_loss(x, match))
        return made[-1]

    def last(obs, rng, **settings):
        starts.append(settings["start"].variables[0])
        return search(obs, rng, **settings)

    monkeypatch.setattr("gi_lib.attacks.e2egi.search", last)
    attack = E2EGI(steps=20, blocks=3, restarts=3, combine=watched)
    rec = attack(obs, torch.Generator().manual_seed(0))
    assert len(made) == 4 and torch.equal(starts[0][0], made[-1].x)
    assert torch.equal(rec.losses, made[-1].losses)
    assert rec.notes == {"combined": made[-1].loss, "best_seed": rec.losses.min().item()}
    assert rec.notes["combined"] <= rec.notes["best_seed"]
    assert rec.trace[:12].isfinite().all() and rec.trace[12:, 1:].isinf().all() and rec.trace[12:, 0].isfinite().all()
    assert rec.gradient_evaluations == 12 * 3 + 3 + 8 + 2 + sum(one.evaluations for one in made)


def test_hf_gradinv_begins_with_the_deepest_parameters_and_lets_more_in(client, monkeypatch):
    attack = HFGradInv(steps=15_000)
    assert [attack.left_out(k, 110) for k in (0, 499, 500, 3999, 4000, 14_999)] == [100, 100, 90, 34, 25, 25]
    obs, _ = client("resnet20", 2, (3, 8, 8))
    seen = []

    def watched(mine, theirs):
        if any((g == 0).any() for g in theirs.values()):
            seen.append(theirs)
        return cosine(mine, theirs)

    monkeypatch.setattr("gi_lib.attacks.hf_gradinv.cosine", watched)
    HFGradInv(steps=4, growths=2, grown=0.5)(obs, torch.Generator().manual_seed(0))
    names = list(obs.gradient)
    there = [[name for name in names if bool(theirs[name].any())] for theirs in seen]
    left_out = [int(share * len(names)) for share in (100 / 110, 62.5 / 110, 25 / 110, 25 / 110)]
    assert there[:4] == [names[n:] for n in left_out]
    kept = [theirs[names[-2]] != 0 for theirs in seen[:4]]
    assert all(0.5 < some.double().mean() < 0.9 for some in kept)
    assert not torch.equal(kept[0], kept[1]), "the mask is drawn anew"


def test_hf_gradinv_takes_the_running_statistics_where_the_batchs_are_withheld(client, monkeypatch):
    taken = []

    def watched(model, x, target, first):
        taken.append((target, first))
        return statistics_distance(model, x, target, first)

    monkeypatch.setattr("gi_lib.attacks.hf_gradinv.statistics_distance", watched)
    for known in (True, False):
        obs, _ = client("resnet20", 2, (3, 8, 8), knows_bn_stats=known)
        HFGradInv(steps=1)(obs, torch.Generator().manual_seed(0))
        target, first = taken[-1]
        expected = obs.bn_stats if known else running_statistics(obs.model)
        torch.testing.assert_close(target, expected)
        assert first == (1.3, 3.0)
    for module in obs.model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean = module.running_var = None
    with pytest.raises(NotApplicableError, match="the model keeps no running ones; set bn=0"):
        HFGradInv(steps=1)(obs, torch.Generator())


def test_quantised_steps_are_of_the_gradients_own_size():
    v = torch.tensor([[0.01, -0.02, 0.04, -0.08, 0.0], [1.0, -2.0, 4.0, -8.0, 0.0]])
    expected = torch.tensor([0.5, -1.0, 1.0, -1.0, 0.0])  # steps of half a median, at most one
    late, early = (quantised(v, torch.tensor(now)) for now in (0.5, 0.0))
    torch.testing.assert_close(late, (0.8 * expected + 0.2 * expected.sign()).expand(2, 5))
    torch.testing.assert_close(early, 2 * late)
    torch.testing.assert_close(
        quantised(torch.tensor([[0.0, 0.0, 0.0, 3.0, -1e-9]]), torch.tensor(0.5)),
        torch.tensor([[0.0, 0.0, 0.0, 1.0, -1.0]]),
    )


def test_gradinversion_is_pulled_to_its_consensus(monkeypatch):
    """With the group term alone, the seeds end near each other."""
    shape, ends = (3, 8, 8), []
    model = models.build("resnet20", num_classes=4, image_shape=shape).double()
    batch = Batch(torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))
    obs = observe(model, batch, threat=ThreatModel(knows_bn_stats=True), rng=torch.Generator())

    def kept(*arguments, **settings):
        ends.append(minimise(*arguments, **settings))
        return ends[-1]

    monkeypatch.setattr("gi_lib.search.minimise", kept)
    alone = {"gradient": 0.0, "tv": 0.0, "l2": 0.0, "bn": 0.0, "group_start": 0.0, "renew": 5, "warm_up": 0}
    for group in (0.0, 1.0):
        GradInversion(steps=20, restarts=2, group=group, **alone)(obs, torch.Generator().manual_seed(0))
    free, pulled = (end.variables[0].std(0).mean() for end in ends)
    assert pulled < 0.3 * free


def test_the_recipes_features_are_those_of_the_private_image(client):
    obs, batch = client("lenet", 1, knows_labels=True)
    last, h = "net.7.weight", features_of(obs, obs.labels)
    torch.testing.assert_close(h, obs.model.net[:7]((batch.images - obs.model.mean) / obs.model.std).detach())
    assert feature_distance(obs.model, batch.images, last, h).item() < 1e-10
    assert feature_distance(obs.model, batch.images.roll(1, 3), last, h).item() > 1e-6


def test_the_recipes_features_of_a_batch_are_the_mixture_of_the_bias_ratio(client):
    obs, batch = client("lenet", 3, knows_labels=True)
    features, logits = obs.model.net[:7](batch.images), obs.model(batch.images)
    mix = logits.softmax(1) - torch.nn.functional.one_hot(batch.labels, 4)
    expected = [(mix[:, y, None] * features).sum(0) / mix[:, y].sum() for y in obs.labels]
    torch.testing.assert_close(features_of(obs, obs.labels), torch.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [{"squash": hard_sign}, {"prior": isotropic_total_variation}, {"patch": 12}, {"feature": 0.0}, {"tv": 0.0}],
    ids=lambda other: next(iter(other)),
)
def test_each_part_of_the_recipe_has_an_effect(client, other):
    obs, _ = client("lenet", 2, (3, 12, 12), knows_labels=True)
    full = PracticalRecipe(steps=5, warm_up=0)
    ends = [
        attack(obs, torch.Generator().manual_seed(0)).images for attack in (full, dataclasses.replace(full, **other))
    ]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_the_recipe_from_one_patch_as_large_as_the_image_starts_from_noise(client):
    obs, _ = client("lenet", 2, (3, 12, 12))
    draw = lambda start: start(3, torch.Generator().manual_seed(0))  # noqa: E731
    assert torch.equal(draw(patterned(obs, 12, torch.randn)), draw(gaussian(obs)))
    tiled = draw(patterned(obs, 4, torch.randn))
    assert torch.equal(tiled, tiled.roll(4, -1)) and torch.equal(tiled, tiled.roll(4, -2))
    assert tiled.shape == (3, 2, 3, 12, 12) and not torch.equal(tiled[..., :4, :4], tiled[..., 1:5, :4])


def test_the_recipe_says_where_it_can_read_no_features(client, rng):
    obs, _ = client("cnn6", 1, (3, 12, 12), knows_labels=True)
    with pytest.raises(
        NotApplicableError, match="gradient of the last layer's bias, and the model has none.*feature=0"
    ):
        PracticalRecipe(steps=1)(obs, rng)
    assert PracticalRecipe(steps=1, feature=0.0)(obs, rng).images.shape == (1, 3, 12, 12)
    obs, _ = client("lenet", 1, (3, 12, 12), knows_labels=True)
    gradient = obs.gradient | {"net.7.bias": torch.zeros(4)}
    with pytest.raises(NotApplicableError, match="which is 0 at label 0; set feature=0"):
        PracticalRecipe(steps=1)(dataclasses.replace(obs, gradient=gradient), rng)


def test_a_focus_holds_the_image_at_half_of_the_sides_in_fresh_noise(rng):
    z = torch.full((2, 1, 3, 5, 5), 7.0)
    larger = focus(z, (12, 8), rng)
    assert larger.shape == (2, 1, 3, 12, 8) and (larger[..., 3:9, 2:6] == 7).all()
    assert (larger == 7).sum() == 2 * 3 * 6 * 4
    around = larger[larger != 7]
    assert around.mean().abs() < 0.2 and 0.8 < around.std() < 1.2


def test_enlarging_is_bilinear(rng):
    z = torch.rand(3, 1, 2, 4, 4, generator=rng)
    expected = [torch.nn.functional.interpolate(x, (9, 6), mode="bilinear") for x in z]
    torch.testing.assert_close(enlarge(z, (9, 6), rng), torch.stack(expected))
    assert torch.equal(enlarge(z, (4, 4), rng), z)


def test_multiscale_of_one_stage_is_inverting_gradients_that_keeps_its_best(client):
    obs, _ = client("lenet", 1, (3, 12, 12), knows_labels=True)
    one, plain = (
        attack(obs, torch.Generator().manual_seed(0))
        for attack in (Multiscale(steps=8, stages=1, tv=1e-4), InvertingGradients(steps=8))
    )
    torch.testing.assert_close(one.trace, plain.trace)


def test_the_stages_of_multiscale_see_larger_images_and_share_the_steps(client, monkeypatch):
    obs, _ = client("lenet", 1, (3, 12, 12), knows_labels=True)
    sides, steps = [], []

    def watched(loss, start, **settings):
        sides.append((start.variables if hasattr(start, "variables") else start)[0].shape[-1])
        steps.append(settings["steps"])
        return minimise(loss, start, **settings)

    monkeypatch.setattr("gi_lib.search.minimise", watched)
    monkeypatch.setattr("gi_lib.attacks.multiscale.minimise", watched)
    rec = Multiscale(steps=11, stages=4)(obs, torch.Generator().manual_seed(0))
    assert sides == [3, 6, 9, 12] and steps == [2, 2, 2, 5] and rec.steps == 11


def test_inverting_gradients_seeks_labels_that_no_rule_gives(rng):
    """A batch with a repeated label, which column_min misses."""
    model = models.build("lenet", num_classes=4, image_shape=(1, 8, 8))
    obs = observe(model, Batch(torch.rand(2, 1, 8, 8, generator=rng), torch.tensor([2, 2])), rng=rng)
    rec = InvertingGradients(steps=150, label_rule=None)(obs, torch.Generator().manual_seed(0))
    assert rec.labels.tolist() == [2, 2]
    assert labels.column_min(obs).tolist() != [2, 2]


def test_known_labels_are_not_sought(client):
    obs, batch = client("lenet", 3, (3, 12, 12), knows_labels=True)
    sought, given = (
        InvertingGradients(steps=3, label_rule=rule)(obs, torch.Generator().manual_seed(0))
        for rule in (None, labels.infer)
    )
    assert torch.equal(sought.images, given.images) and sought.labels.tolist() == batch.labels.tolist()


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


def test_sapag_needs_no_weights_of_dlgs_scale():
    """The LeNet with PyTorch's own start: there L-BFGS on the squared distance hardly moves."""
    _, kernel, _ = attacked("lenet_default", SAPAG(steps=120))
    _, squared, _ = attacked("lenet_default", IDLG(steps=6))
    assert kernel.psnr.item() > 20 and squared.psnr.item() < 10


def test_inverting_gradients_recovers_a_digit_from_an_mlp():
    _, scores, _ = attacked("mlp", InvertingGradients(steps=100))
    assert scores.psnr.item() > 15


def test_labels_that_are_known_stay_known_where_nothing_can_be_certified(rng):
    batch = Batch(torch.rand(1, 1, 8, 8), torch.tensor([3]))
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8))
    obs = observe(model, batch, client=Client(steps=2), threat=ThreatModel(knows_labels=True), rng=rng)
    rec = BiasRatio()(obs, rng)
    assert rec.labels.tolist() == [3] and rec.notes["certified"] is None
