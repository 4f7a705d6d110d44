"""What the client computes, what the attacker is given, and the errors for bad input."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gi_lib import Batch, FedAvg, Observation, ThreatModel, WithheldError, fedsgd, models, observe
from gi_lib.defenses import Defense, GaussianNoise
from gi_lib.federated import attackers_copy


def build(name="convnet", shape=(3, 18, 18)):
    model = models.build(name, num_classes=4, image_shape=shape).double()
    rng = torch.Generator().manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(generator=rng)
        norm.running_var.uniform_(0.5, 2, generator=rng)
    return model


def images(size, shape=(3, 18, 18)):
    return torch.rand(size, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("train", [False, True])
def test_fedsgd_is_the_gradient_of_the_mean_cross_entropy(train):
    model, x, y = build().train(train), images(3), torch.tensor([0, 3, 1])
    found = fedsgd(attackers_copy(model), x, y)
    F.cross_entropy(model(x), y).backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


def test_soft_labels_that_are_hard_give_the_same_gradient():
    model, x, y = build("lenet"), images(2), torch.tensor([1, 2])
    hard, soft = fedsgd(model, x, y), fedsgd(model, x, F.one_hot(y, 4).double())
    for name in hard:
        torch.testing.assert_close(hard[name], soft[name])


def test_fedavg_with_one_step_is_fedsgd():
    model, x, y = build("lenet"), images(2), torch.tensor([1, 2])
    one, many = fedsgd(model, x, y), FedAvg(local_steps=1, lr=0.3)(model, x, y)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=0, atol=0)


def test_fedavg_is_torch_sgd_over_minibatches():
    model, x, y = build("lenet"), images(4), torch.tensor([0, 1, 2, 3])
    found = FedAvg(local_steps=3, lr=0.1, local_batch_size=2)(model, x, y)
    local = copy.deepcopy(model)
    sgd = torch.optim.SGD(local.parameters(), lr=0.1)
    for part in (slice(0, 2), slice(2, 4), slice(0, 2)):
        sgd.zero_grad()
        F.cross_entropy(local(x[part]), y[part]).backward()
        sgd.step()
    for (name, before), after in zip(model.named_parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(found[name], (before - after) / 0.1, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("update", [fedsgd, FedAvg(local_steps=2, lr=0.1)], ids=str)
def test_updates_are_differentiable_in_the_images(update):
    model, y = build("lenet", (3, 8, 8)), torch.tensor([1])

    def norm(x):
        return sum(g.square().sum() for g in update(model, x, y).values())

    assert torch.autograd.gradcheck(norm, images(1, (3, 8, 8)).requires_grad_())


@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet18", "resnet20"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("update", [fedsgd, FedAvg(local_steps=2, lr=0.1)], ids=["fedsgd", "fedavg"])
def test_stacked_rows_equal_separate_ones(name, train, update):
    model = build(name).train(train)
    obs = observe(
        model,
        Batch(images(2), torch.tensor([0, 1])),
        update=update,
        threat=ThreatModel(knows_training_details=True),
        rng=torch.Generator(),
    )
    x, y = torch.stack([images(2), 1 - images(2)]), torch.tensor([[0, 1], [2, 2]])
    stacked = obs.simulate_rows(x, y)
    for r in range(2):
        for key, g in obs.simulate(x[r], y[r]).items():
            torch.testing.assert_close(stacked[key][r], g, rtol=1e-7, atol=1e-10)


def test_observing_changes_nothing_of_the_callers():
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    batch = Batch(images(2).float(), torch.tensor([0, 1]))
    obs = observe(model, batch, threat=ThreatModel(knows_bn_stats=True), rng=torch.Generator())
    assert model.training and obs.model is not model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_threat_model_withholds_is_none(client):
    obs, batch = client("convnet", size=2, shape=(3, 18, 18))
    assert (obs.labels, obs.bn_stats, obs.batch_size) == (None, None, 2)
    obs, _ = client("convnet", size=2, shape=(3, 18, 18), knows_labels=True, knows_batch_size=False)
    assert obs.labels.tolist() == batch.labels.tolist() and obs.batch_size is None
    obs, _ = client(update=FedAvg(2))
    assert obs.update is None
    with pytest.raises(WithheldError, match=r"training details.*knows_training_details=True"):
        obs.simulate(batch.images, batch.labels)


def test_bn_stats_are_those_of_the_private_batch(client):
    obs, batch = client("convnet", size=2, shape=(3, 18, 18), knows_bn_stats=True)
    first = obs.model.net[0](batch.images)
    mean, var = obs.bn_stats["net.1"]
    torch.testing.assert_close(mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(var, first.var((0, 2, 3), unbiased=False))
    assert len(obs.bn_stats) == 8


LETTERS = {
    "A": {},
    "B": {"knows_labels": True},
    "C": {"knows_training_details": True, "knows_labels": True},
    "D": {"has_auxiliary_data": True},
    "E": {"knows_bn_stats": True, "has_auxiliary_data": True},
    "F": {"malicious_server": True},
    "G": {"malicious_server": True, "has_auxiliary_data": True},
    "H": {"malicious_server": True, "selects_clients": True},
}


@pytest.mark.parametrize("letter", LETTERS)
def test_letters(letter):
    assert ThreatModel(**LETTERS[letter]).letter == letter


def test_defenses_act_where_they_say(rng):
    model, batch = build("lenet").float(), Batch(images(1).float(), torch.tensor([1]))
    plain = observe(model, batch, rng=rng).gradient

    @dataclasses.dataclass(frozen=True)
    class Grey(Defense):
        def on_batch(self, batch, rng):
            return Batch(torch.full_like(batch.images, 0.5), batch.labels)

    grey = observe(model, batch, defense=Grey(), rng=rng).gradient
    torch.testing.assert_close(grey, fedsgd(model, torch.full_like(batch.images, 0.5), batch.labels))
    noisy = observe(model, batch, defense=GaussianNoise(0.01), rng=rng).gradient
    noise = torch.cat([(noisy[name] - plain[name]).flatten() for name in plain])
    assert noise.std().item() == pytest.approx(0.01, rel=0.05) and abs(noise.mean()) < 1e-3


# Errors


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.long), "the batch is empty"),
        (torch.rand(3, 8, 8), torch.tensor([1]), r"must be a float tensor \[B, C, H, W\].*unsqueeze"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([1]), "float tensor"),
        (torch.rand(2, 3, 8, 8), torch.tensor([1]), r"labels must be int64 \[2\]"),
        (torch.rand(1, 3, 8, 8), torch.tensor([1.0]), "labels must be int64"),
        (torch.rand(1, 3, 8, 8) + 1, torch.tensor([1]), r"must lie in \[0, 1\].*divide bytes by 255"),
        (torch.full((1, 3, 8, 8), torch.nan), torch.tensor([1]), r"must lie in \[0, 1\]"),
    ],
)
def test_a_bad_batch_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Batch(images, labels)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(client, rng, label):
    obs, batch = client()
    bad = Batch(batch.images, torch.tensor([label]))
    with pytest.raises(ValueError, match=rf"run from {label} to {label}.*classes 0 to 3"):
        observe(models.build("lenet", num_classes=4, image_shape=(3, 8, 8)), bad, rng=rng)


def test_a_model_that_is_not_wrapped_is_refused(client, rng):
    _, batch = client()
    with pytest.raises(ValueError, match=r"no num_classes; wrap it: models\.wrap"):
        observe(torch.nn.Linear(3, 4), batch, rng=rng)


def damage(obs, **changes):
    return lambda: Observation(**{**{f.name: getattr(obs, f.name) for f in dataclasses.fields(obs)}, **changes})


def test_a_damaged_gradient_is_refused(client):
    obs, _ = client()
    g, name = obs.gradient, "net.7.weight"
    short = {k: v for k, v in g.items() if k != name}
    with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
        damage(obs, gradient=short)()
    with pytest.raises(ValueError, match=r"unknown \['other'\]"):
        damage(obs, gradient={**g, "other": g[name]})()
    with pytest.raises(ValueError, match=rf"'{name}' has shape.*another model"):
        damage(obs, gradient={**g, name: g[name][:1]})()
    with pytest.raises(ValueError, match=rf"'{name}' has NaN or infinite"):
        damage(obs, gradient={**g, name: g[name] * torch.nan})()
    for labels in (torch.tensor([1, 2]), torch.tensor([4])):
        with pytest.raises(ValueError, match="labels must be 1 classes from 0 to 3"):
            damage(obs, labels=labels)()


@pytest.mark.parametrize("arguments", [{"local_steps": 0}, {"lr": 0.0}, {"local_batch_size": 0}])
def test_bad_local_training_is_refused(arguments):
    with pytest.raises(ValueError, match="needs local_steps >= 1"):
        FedAvg(**arguments)


def test_a_local_batch_must_divide_the_batch(client):
    with pytest.raises(ValueError, match="local_batch_size=2 does not divide the batch of 3"):
        client(size=3, update=FedAvg(2, local_batch_size=2))


def test_a_model_that_cannot_be_stacked_says_so(client, rng):
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(4, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.dense(x if x.sum().item() > 0 else -x)

    batch = Batch(torch.rand(1, 1, 2, 2), torch.tensor([1]))
    obs = observe(models.wrap(Branch(), num_classes=2), batch, rng=rng)
    with pytest.raises(RuntimeError, match="2 restarts of this model can't be stacked; use restarts=1"):
        obs.simulate_rows(torch.rand(2, 1, 1, 2, 2), torch.tensor([[1], [0]]))
