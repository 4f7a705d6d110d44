"""What the client computes, what the attacker is given, and the errors for bad input."""

import copy
import dataclasses
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from gi_lib import SGD, Adam, Batch, Client, Observation, ThreatModel, WithheldError, loss_gradient, models, observe
from gi_lib.attacks import InvertingGradients
from gi_lib.copies import attackers_copy
from gi_lib.defenses import DPSGD, Defense, GaussianNoise, Pruning
from gi_lib.execution import lift


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
    found = Client()(attackers_copy(model, (3, 18, 18)), x, y)
    F.cross_entropy(model(x), y).backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


def test_soft_labels_that_are_hard_give_the_same_gradient():
    model, x, y = build("lenet"), images(2), torch.tensor([1, 2])
    hard, soft = Client()(model, x, y), Client()(model, x, F.one_hot(y, 4).double())
    for name in hard:
        torch.testing.assert_close(hard[name], soft[name])


def test_fedavg_with_one_step_is_fedsgd():
    model, x, y = build("lenet"), images(2), torch.tensor([1, 2])
    one, many = Client()(model, x, y), Client(steps=1, lr=0.3)(model, x, y)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=0, atol=0)


OPTIMISERS = [
    (SGD(), torch.optim.SGD, {}),
    (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (SGD(momentum=0.9, dampening=0.3), torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (SGD(momentum=0.9, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD(momentum=0.5, weight_decay=0.1), torch.optim.SGD, {"momentum": 0.5, "weight_decay": 0.1}),
    (Adam(), torch.optim.Adam, {}),
    (Adam(beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.1), torch.optim.Adam)
    + ({"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},),
    (Adam(weight_decay=0.1, decoupled=True), torch.optim.AdamW, {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("mine", "theirs", "settings"), OPTIMISERS, ids=lambda o: str(o) if o else "plain")
def test_a_client_is_torchs_optimiser_over_minibatches(mine, theirs, settings):
    """Five images in steps of two: the third step of an epoch has one, and the fourth begins the next epoch."""
    model, x, y = build("lenet"), images(5), torch.tensor([0, 1, 2, 3, 0])
    found = Client(steps=4, lr=0.1, local_batch=2, optimiser=mine)(model, x, y)
    local = copy.deepcopy(model)
    optimiser = theirs(local.parameters(), lr=0.1, **settings)
    for part in (slice(0, 2), slice(2, 4), slice(4, 5), slice(0, 2)):
        optimiser.zero_grad()
        F.cross_entropy(local(x[part]), y[part]).backward()
        optimiser.step()
    for (name, before), after in zip(model.named_parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(found[name], (before - after) / 0.1, rtol=1e-6, atol=1e-9)


def test_a_client_takes_another_loss():
    model, x, y = build("lenet"), images(2), torch.tensor([1, 2])

    def summed(logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum")

    twice = Client(rule=loss_gradient.of(summed))(model, x, y)
    for name, g in Client()(model, x, y).items():
        torch.testing.assert_close(twice[name], 2 * g)


@pytest.mark.parametrize(
    ("client", "said"),
    [
        (Client(), "FedSGD"),
        (Client(lr=0.3), "FedSGD"),
        (Client(steps=8, lr=0.01), "FedAvg(steps=8, lr=0.01)"),
        (Client(lr=0.1, optimiser=Adam(eps=0.1)), "FedAvg(lr=0.1, optimiser=Adam(eps=0.1))"),
    ],
)
def test_clients_print_as_what_they_are(client, said):
    assert str(client).startswith(said)


def test_a_shuffling_client_takes_each_image_once_an_epoch_in_an_order_of_its_generator():
    client = Client(steps=6, local_batch=2, shuffle=True)
    first, again, other = (client.schedule(5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert [len(step) for step in first] == [2, 2, 1, 2, 2, 1]
    for epoch in (first[:3], first[3:]):
        assert torch.cat(epoch).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.cat(first).tolist() != torch.cat(other).tolist()
    assert torch.cat(client.schedule(5)).tolist() == [0, 1, 2, 3, 4] * 2


def test_the_order_is_told_in_the_attackers_slots_and_simulates_the_update_exactly():
    model, x, y = build("lenet"), images(5), torch.tensor([3, 0, 2, 0, 1])
    client = Client(steps=3, lr=0.1, local_batch=2, shuffle=True)
    facts = {"knows_labels": True, "knows_training_details": True}
    obs = observe(
        model,
        Batch(x, y),
        client=client,
        threat=ThreatModel(**facts, knows_order=True),
        rng=torch.Generator().manual_seed(3),
    )
    assert obs.labels.tolist() == [0, 0, 1, 2, 3]
    slots = x[y.argsort(stable=True)]
    for name, g in obs.simulate(slots, obs.labels).items():
        torch.testing.assert_close(g, obs.gradient[name], rtol=1e-9, atol=1e-12)
    guess = dataclasses.replace(obs, order=None)
    other = guess.simulate(slots, obs.labels)
    assert any((other[name] - g).abs().max() > 1e-4 for name, g in obs.gradient.items())


CLIENTS = [Client(), Client(steps=2, lr=0.1), Client(steps=2, lr=0.1, optimiser=Adam(eps=0.1))]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_updates_are_differentiable_in_the_images(client):
    model, y = build("lenet", (3, 8, 8)), torch.tensor([1])

    def norm(x):
        return sum(g.square().sum() for g in client(model, x, y).values())

    assert torch.autograd.gradcheck(norm, images(1, (3, 8, 8)).requires_grad_())


def test_simulate_starts_where_it_is_told_and_is_differentiable_in_it():
    obs = observe(build("lenet"), Batch(images(1), torch.tensor([1])), rng=torch.Generator())
    theta = {name: (p + 0.01).detach().requires_grad_() for name, p in obs.model.named_parameters()}
    g = obs.simulate(images(1), torch.tensor([1]), theta)
    moved = copy.deepcopy(obs.model)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.01
    for name, expected in Client()(moved, images(1), torch.tensor([1])).items():
        torch.testing.assert_close(g[name], expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(g["net.0.weight"].sum(), theta["net.0.weight"])[0].abs().max() > 0


@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet18", "resnet20"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("client", [Client(), Client(steps=2, lr=0.1)], ids=str)
def test_stacked_guesses_equal_separate_ones(name, train, client):
    model = build(name).train(train)
    threat = ThreatModel(knows_training_details=True)
    obs = observe(model, Batch(images(2), torch.tensor([0, 1])), client=client, threat=threat, rng=torch.Generator())
    x, y = torch.stack([images(2), 1 - images(2)]), torch.tensor([2, 1])
    stacked = torch.func.vmap(lambda x: obs.simulate(x, y))(x)
    for r in range(2):
        for key, g in obs.simulate(x[r], y).items():
            torch.testing.assert_close(stacked[key][r], g, rtol=1e-7, atol=1e-10)


SEVERAL = [Client(), Client(steps=2, lr=0.1, local_batch=1)]


@pytest.mark.parametrize("client", SEVERAL, ids=str)
def test_of_several_clients_the_attacker_sees_the_mean(client):
    model = build("lenet")
    x, y = images(3), torch.tensor([2, 0, 1])
    batches = [Batch(x[:1], y[:1]), Batch(x[1:], y[1:])]
    threat = ThreatModel(knows_labels=True, knows_training_details=True, knows_order=True)
    obs = observe(model, batches, client=client, threat=threat, rng=torch.Generator())
    alone = [client(model, batch.images, batch.labels) for batch in batches]
    assert obs.batch_size == 3 and obs.labels.tolist() == [0, 1, 2]
    for name, g in obs.gradient.items():
        torch.testing.assert_close(g, (alone[0][name] + 2 * alone[1][name]) / 3)
    for name, g in obs.simulate(x[y.argsort()], obs.labels).items():
        torch.testing.assert_close(g, obs.gradient[name], rtol=1e-9, atol=1e-12)


def test_the_mean_of_fedsgd_clients_is_the_gradient_of_all_their_images():
    model, x, y = build("lenet"), images(3), torch.tensor([2, 0, 1])
    batches = [Batch(x[:1], y[:1]), Batch(x[1:], y[1:])]
    together = observe(model, batches, rng=torch.Generator())
    one = observe(model, Batch(x, y), rng=torch.Generator())
    for name, g in one.gradient.items():
        torch.testing.assert_close(together.gradient[name], g)
    assert together.client == Client()  # it can be simulated as one client's


def test_clients_may_be_sent_different_models(rng):
    sent = [models.build("lenet", num_classes=4, image_shape=(3, 8, 8), seed=s).double() for s in (0, 1)]
    batches = [Batch(images(1, (3, 8, 8)), torch.tensor([k])) for k in (0, 1)]
    threat = ThreatModel(malicious_server=True, knows_labels=True, knows_training_details=True)
    obs = observe(sent, batches, threat=threat, trapdoor="planted", rng=rng)
    alone = [Client()(model, b.images, b.labels) for model, b in zip(sent, batches, strict=True)]
    simulated = obs.simulate(torch.cat([b.images for b in batches]), obs.labels)
    for name, g in obs.gradient.items():
        torch.testing.assert_close(g, (alone[0][name] + alone[1][name]) / 2)
        torch.testing.assert_close(simulated[name], g)


class Noisy(torch.nn.Module):
    """A layer that samples, and one that drops units: both draw from torch's global generator."""

    def __init__(self):
        super().__init__()
        self.drop, self.dense = torch.nn.Dropout(0.5), torch.nn.Linear(12, 4)

    def forward(self, x):
        x = self.drop(x.flatten(1))
        return self.dense(x + 0.1 * torch.randn_like(x))


@pytest.mark.filterwarnings("ignore:net.drop drops units")
def test_the_clients_randomness_comes_from_its_generator():
    torch.manual_seed(0)
    model, batch = models.wrap(Noisy(), num_classes=4).train(), Batch(torch.rand(2, 3, 2, 2), torch.tensor([1, 2]))
    state = torch.get_rng_state()
    first, again, other = (observe(model, batch, rng=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    name = "net.dense.weight"
    assert torch.equal(first.gradient[name], again.gradient[name])
    assert not torch.equal(first.gradient[name], other.gradient[name])
    one, two = (first.simulate(batch.images, batch.labels)[name] for _ in range(2))
    stacked = torch.func.vmap(lambda x: first.simulate(x, batch.labels)[name], randomness="same")
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(stacked(batch.images.expand(3, -1, -1, -1, -1))[2], one)


def test_dropped_units_are_warned_of():
    model, batch = models.wrap(Noisy(), num_classes=4).train(), Batch(torch.rand(2, 3, 2, 2), torch.tensor([1, 2]))
    with pytest.warns(UserWarning, match=r"net\.drop drops units at random in train mode.*call \.eval\(\)"):
        observe(model, batch, rng=torch.Generator())


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
    obs, _ = client(client=Client(steps=2))
    assert obs.client is None
    with pytest.raises(
        WithheldError, match=r"simulate needs the client's training details.*knows_training_details=True"
    ):
        obs.simulate(batch.images, batch.labels)


def test_bn_stats_are_those_of_the_private_batch(client):
    obs, batch = client("convnet", size=2, shape=(3, 18, 18), knows_bn_stats=True)
    first = obs.model.net[0](batch.images)
    mean, var = obs.bn_stats["net.1"]
    torch.testing.assert_close(mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(var, first.var((0, 2, 3), unbiased=False))
    assert len(obs.bn_stats) == 8


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_are_the_running_statistics_after_the_round(train, momentum):
    """Against torch's own batch norm in torch's own SGD."""
    model, x, y = build().train(train), images(4), torch.tensor([0, 1, 2, 3])
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = momentum
    client = Client(steps=3, lr=0.1, local_batch=2)
    obs = observe(model, Batch(x, y), client=client, threat=ThreatModel(knows_buffers=True), rng=torch.Generator())
    local = copy.deepcopy(model)
    sgd = torch.optim.SGD(local.parameters(), lr=0.1)
    for part in (slice(0, 2), slice(2, 4), slice(0, 2)):
        sgd.zero_grad()
        F.cross_entropy(local(x[part]), y[part]).backward()
        sgd.step()
    assert len(obs.buffers) == 8
    for name, (mean, var) in obs.buffers.items():
        norm = local.get_submodule(name)
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(var, norm.running_var)


class Few:
    """Auxiliary data of one grey image."""

    hash = "grey"

    def draw(self, n, rng):
        return torch.full((n, 3, 8, 8), 0.5), torch.zeros(n, dtype=torch.int64)


GRANTS = {  # fact -> (field of the Observation, what is given to observe)
    "knows_labels": ("labels", {}),
    "knows_training_details": ("client", {"client": Client(steps=2)}),
    "knows_order": ("order", {}),
    "knows_bn_stats": ("bn_stats", {}),
    "knows_buffers": ("buffers", {}),
    "knows_defense": ("defense", {"defense": GaussianNoise()}),
    "has_auxiliary_data": ("auxiliary", {"auxiliary": Few()}),
    "many_rounds": ("earlier", {"earlier": ["a round"]}),
    "malicious_server": ("trapdoor", {"trapdoor": "planted"}),
}


def test_every_fact_is_in_the_table():
    facts = {f.name for f in dataclasses.fields(ThreatModel)}
    assert facts == GRANTS.keys() | {"knows_batch_size"}


@pytest.mark.parametrize("fact", GRANTS)
def test_each_fact_grants_one_field_and_no_fact_changes_nothing(fact, rng):
    name, given = GRANTS[fact]
    model, batch = build("convnet").float(), Batch(images(1).float(), torch.tensor([1]))
    granted = observe(model, batch, threat=ThreatModel(**{fact: True}), rng=rng, **given)
    assert getattr(granted, name) not in (None, ())
    if fact == "malicious_server":
        with pytest.raises(ValueError, match="a trapdoor was planted, and the threat model has an honest server"):
            observe(model, batch, rng=rng, **given)
    else:
        assert getattr(observe(model, batch, rng=rng, **given), name) in (None, ())


LETTERS = {
    "A": {},
    "B": {"knows_labels": True},
    "C": {"knows_training_details": True, "knows_labels": True},
    "D": {"has_auxiliary_data": True},
    "E": {"knows_bn_stats": True, "has_auxiliary_data": True},
    "F": {"malicious_server": True},
    "G": {"malicious_server": True, "has_auxiliary_data": True},
}


@pytest.mark.parametrize("letter", LETTERS)
def test_letters(letter):
    assert ThreatModel(**LETTERS[letter]).letter == letter


def test_defenses_act_where_they_say(rng):
    model, batch = build("lenet").float(), Batch(images(2).float(), torch.tensor([1, 3]))
    plain = observe(model, batch, rng=rng).gradient

    @dataclasses.dataclass(frozen=True)
    class Everywhere(Defense):
        def on_model(self, model):
            wider = copy.deepcopy(model)
            with torch.no_grad():
                wider.net[0].bias += 1
            return wider

        def on_batch(self, images, labels, rng):
            return torch.full_like(images, 0.5), F.one_hot(labels, 4).float()

        def on_client(self, client):
            return dataclasses.replace(client, steps=2, lr=0.1)

        def on_update(self, gradient, sent, rng):
            assert sent.images.unique().tolist() == [0.5] and sent.labels.shape == (2, 4)
            return {name: -g for name, g in gradient.items()}

    obs = observe(model, batch, defense=Everywhere(), rng=rng)
    shifted = Everywhere().on_model(model)
    expected = Client(steps=2, lr=0.1)(shifted, torch.full_like(batch.images, 0.5), batch.labels)
    for name, g in obs.gradient.items():
        torch.testing.assert_close(g, -expected[name])
    assert obs.client == Client() and obs.defense is None
    told = observe(model, batch, defense=Everywhere(), threat=ThreatModel(knows_defense=True), rng=rng)
    assert told.client is None and told.defense == Everywhere()  # two local steps are training details
    noisy = observe(model, batch, defense=GaussianNoise(0.01), rng=rng).gradient
    noise = torch.cat([(noisy[name] - plain[name]).flatten() for name in plain])
    assert noise.std().item() == pytest.approx(0.01, rel=0.05) and abs(noise.mean()) < 1e-3


@pytest.mark.filterwarnings("ignore")  # of Opacus
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_pruning_keeps_the_largest_entries_of_each_tensor(share):
    model, batch = build("lenet"), Batch(images(2), torch.tensor([0, 1]))
    plain = observe(model, batch, rng=torch.Generator().manual_seed(0)).gradient
    pruned = observe(model, batch, defense=Pruning(share), rng=torch.Generator().manual_seed(0)).gradient
    for name, g in plain.items():
        entries, sent = g.flatten(), pruned[name].flatten()
        order = entries.abs().argsort(stable=True)
        dropped = min(int(Fraction(str(share)) * len(entries)), len(entries) - 1)
        assert len(entries.unique()) == len(entries), "ties would be kept"
        assert (sent[order[:dropped]] == 0).all() and sent[order[dropped:]].equal(entries[order[dropped:]])
    apart = sum((plain[name] - g).square().sum() for name, g in pruned.items()).sqrt()
    whole = sum(g.square().sum() for g in plain.values()).sqrt()
    assert (apart == 0) if share == 0 else (0 < apart < whole * share**0.5)


def test_pruning_keeps_ties_and_zeros_and_single_entries():
    some = {
        "ties": [2.0, -2.0, 1.0, 2.0],
        "equal": [1.0, 1.0],
        "zeros": [0.0, 0.0],
        "one": [3.0],
        "sparse": [0.0, 0.0, 5.0],
    }
    pruned = Pruning(0.5).on_update({k: torch.tensor(v) for k, v in some.items()}, None, torch.Generator())
    assert {k: v.tolist() for k, v in pruned.items()} == some | {"ties": [2.0, -2.0, 0.0, 2.0]}
    assert Pruning(0.9).pruned(torch.tensor(-4.0)).item() == -4.0


@pytest.mark.parametrize("share", [1, 1.5, -0.1, "half", float("nan")])
def test_pruning_refuses_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="Pruning needs share"):
        Pruning(share)


def test_dp_sgd_is_opacus_on_the_same_noise():
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, x, y = build("lenet").float(), images(3).float(), torch.tensor([0, 3, 1])
    client = DPSGD(clip=0.7, noise=1.3, expected_batch=5).on_client(Client())
    mine = client(model, x, y, rng=torch.Generator().manual_seed(4))
    theirs = GradSampleModule(copy.deepcopy(model).train())  # it looks at nothing in eval mode
    sgd = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=1.0),
        noise_multiplier=1.3,
        max_grad_norm=0.7,
        expected_batch_size=5,
        generator=torch.Generator().manual_seed(4),
    )
    F.cross_entropy(theirs(x), y).backward()
    sgd.pre_step()
    for (name, g), p in zip(mine.items(), theirs.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_dp_sgd_clips_inside_every_step_and_is_simulated_without_its_noise():
    model, x, y = build("lenet"), images(3), torch.tensor([0, 3, 1])
    client = DPSGD(clip=1e-2, noise=1.0).on_client(Client(steps=2, lr=0.1, local_batch=2))
    silent = client(model, x, y)
    again, noisy = client(model, x, y), client(model, x, y, rng=torch.Generator().manual_seed(0))
    assert all(torch.equal(g, again[name]) for name, g in silent.items())
    assert any((g - noisy[name]).abs().max() > 1e-3 for name, g in silent.items())
    norm = sum(g.square().sum() for g in silent.values()).sqrt()
    assert norm <= 2 * 1e-2  # two steps, each the mean of gradients of that norm at most
    whole = dataclasses.replace(client, rule=dataclasses.replace(client.rule, clip=1e9))(model, x, y)
    plain = Client(steps=2, lr=0.1, local_batch=2)(model, x, y)
    for name, g in plain.items():
        torch.testing.assert_close(whole[name], g, rtol=1e-7, atol=1e-10)


def test_dp_sgd_can_be_attacked_through_its_rule():
    model, batch = build("lenet"), Batch(images(2), torch.tensor([0, 3]))
    threat = ThreatModel(knows_defense=True, knows_labels=True)
    obs = observe(model, batch, defense=DPSGD(clip=0.1, noise=0.0), threat=threat, rng=torch.Generator())
    x = batch.images.clone().requires_grad_()
    g = obs.simulate(x, obs.labels)
    for name, value in obs.gradient.items():
        torch.testing.assert_close(g[name], value)
    assert torch.autograd.grad(sum(v.sum() for v in g.values()), x)[0].abs().max() > 0


def test_dp_sgd_refuses_batch_norm_that_mixes_images():
    model = build("convnet").train()
    with pytest.raises(ValueError, match=r"batch norm in train mode mixes the images; call \.eval\(\)"):
        observe(model, Batch(images(2), torch.tensor([0, 3])), defense=DPSGD(), rng=torch.Generator())


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
    with pytest.raises(ValueError, match=r"Linear is not wrapped: it has no num_classes; wrap it: models\.wrap"):
        observe(torch.nn.Linear(3, 4), batch, rng=rng)


REQUESTS = [
    ({"threat": ThreatModel(has_auxiliary_data=True)}, r"grants auxiliary data, and there is none; pass auxiliary"),
    ({"threat": ThreatModel(many_rounds=True)}, r"grants many rounds, and there is one; pass earlier"),
    ({"batches": []}, "needs the private Batch of at least one client"),
    ({"batches": ["a"]}, "needs the private Batch of at least one client"),
    ({"models": ["twice"]}, "got 2 models for 1 clients"),
    ({"batches": ["other size"]}, "images have different shapes; resize them"),
    ({"client": None}, "observe needs a Client and a ThreatModel, got None"),
    ({"threat": "A"}, "observe needs a Client and a ThreatModel"),
    ({"defense": "dp_sgd"}, "observe needs a Defense of gi_lib.defenses with its settings, or None, got 'dp_sgd'"),
]


@pytest.mark.parametrize(("change", "message"), REQUESTS)
def test_a_request_that_does_not_fit_is_refused(client, rng, change, message):
    obs, batch = client()
    models_, batches = obs.model, batch
    if change.get("batches") == ["other size"]:
        batches = [batch, Batch(torch.rand(1, 3, 9, 9), batch.labels)]
    elif "batches" in change:
        batches = change["batches"]
    if "models" in change:
        models_ = [obs.model, obs.model]
        batches = [batch]
    with pytest.raises(ValueError, match=message):
        observe(models_, batches, **{k: v for k, v in change.items() if k not in ("models", "batches")}, rng=rng)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_fact_is_true_or_false(value):
    with pytest.raises(ValueError, match="ThreatModel needs knows_labels, True or False"):
        ThreatModel(knows_labels=value)


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


BAD_CLIENTS = [
    ({"steps": 0}, "Client needs steps, a whole number >= 1, got 0"),
    ({"steps": 2.0}, "Client needs steps, a whole number >= 1"),
    ({"lr": 0.0}, "Client needs lr, a finite number > 0"),
    ({"lr": float("nan")}, "Client needs lr, a finite number > 0, got nan"),
    ({"local_batch": 0}, "Client needs local_batch, a whole number >= 1"),
    ({"rule": None}, "a client needs a rule"),
    ({"optimiser": "adam"}, "SGD or Adam as optimiser"),
    ({"shuffle": "yes"}, "shuffle True or False"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CLIENTS)
def test_bad_local_training_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Client(**arguments)


@pytest.mark.parametrize(
    ("optimiser", "settings", "message"),
    [
        (SGD, {"momentum": -0.1}, "SGD needs momentum, a finite number >= 0"),
        (SGD, {"nesterov": True}, "Nesterov's momentum needs momentum > 0"),
        (Adam, {"eps": 0.0}, "Adam needs eps, a finite number > 0"),
        (Adam, {"beta1": 1.0}, "Adam needs beta1 < 1"),
    ],
)
def test_bad_local_optimisers_are_refused(optimiser, settings, message):
    with pytest.raises(ValueError, match=message):
        optimiser(**settings)


def test_a_rule_that_detaches_is_refused_when_it_is_made(client, rng):
    def detached(model, theta, images, labels):
        return {name: g.detach() for name, g in loss_gradient(model, theta, images, labels).items()}

    obs, batch = client(client=Client(rule=detached))
    x = batch.images.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not depend on the images for autograd; compute it with create_graph"):
        obs.simulate(x, batch.labels)


def test_simulate_has_a_graph_where_the_caller_wants_one_and_none_elsewhere(client):
    obs, batch = client()
    x = batch.images.clone().requires_grad_()
    assert all(g.requires_grad for g in obs.simulate(x, batch.labels).values())
    with torch.no_grad():
        assert not any(g.requires_grad for g in obs.simulate(x, batch.labels).values())


def test_what_can_not_be_stacked_goes_one_by_one_with_the_reason(rng):
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(4, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.dense(x if x.sum().item() > 0 else -x)

    batch = Batch(torch.rand(1, 1, 2, 2), torch.tensor([1]))
    obs = observe(models.wrap(Branch(), num_classes=2), batch, threat=ThreatModel(knows_labels=True), rng=rng)
    with pytest.warns(UserWarning, match="2 guesses of this model can't be stacked, and go one by one"):
        two = InvertingGradients(steps=3, restarts=2)(obs, torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="can't be stacked"):
        again = InvertingGradients(steps=3, restarts=2)(obs, torch.Generator().manual_seed(0))
    assert torch.equal(two.images, again.images)
    with pytest.raises(RuntimeError):
        lift(lambda x: obs.simulate(x, batch.labels)["net.dense.bias"].sum())(torch.rand(2, 1, 1, 2, 2))


def test_replacing_or_freezing_a_layer_of_the_copy_and_observing_again_works(client, rng):
    obs, batch = client("mlp", 1, (3, 8, 8))
    obs.model.net[-1] = torch.nn.Linear(1024, 4)
    obs.model.net[1].requires_grad_(False)
    again = observe(obs.model, batch, rng=rng)
    assert "net.1.weight" not in again.gradient
    for name, g in Client()(obs.model, batch.images, batch.labels).items():
        torch.testing.assert_close(again.gradient[name], g)


def small_norms(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Flatten(), torch.nn.Linear(192, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU()
    return models.wrap(torch.nn.Sequential(*layers, torch.nn.Linear(32, 5)), num_classes=5).double().eval()


def summed(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize(
    ("train", "client", "defense"),
    [
        (True, Client(), None),
        (False, Client(rule=loss_gradient.of(summed)), None),
        (False, Client(), DPSGD(clip=100.0, noise=0.0, expected_batch=4)),
    ],
)
def test_how_many_images_each_client_has_is_a_detail_where_a_gradient_is_no_mean(train, client, defense):
    x, y = images(3, (3, 8, 8)), torch.tensor([0, 1, 2])
    batches, model = [Batch(x[:1].repeat(2, 1, 1, 1), y[[0, 0]]), Batch(x[1:], y[1:])], small_norms().train(train)
    facts = {"knows_defense": defense is not None}
    given = {"client": client, "defense": defense, "rng": torch.Generator()}
    withheld = observe(model, batches, threat=ThreatModel(**facts), **given)
    assert withheld.client is None
    obs = observe(model, batches, threat=ThreatModel(knows_training_details=True, **facts), **given)
    found = obs.simulate(torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]))
    for name, g in obs.gradient.items():
        torch.testing.assert_close(found[name], g)


@pytest.mark.parametrize("what", ["buffers", "frozen", "architecture"])
def test_the_clients_models_differ_in_trainable_values_alone(what):
    sent = [small_norms(), small_norms()]
    if what == "buffers":
        sent[1].net[2].running_mean += 1
    elif what == "frozen":
        for model in sent:
            model.net[1].weight.requires_grad_(False)
        sent[1].net[1].weight += 1
    else:
        sent[1].net[4] = torch.nn.Linear(32, 5, bias=False).double()
    batches = [Batch(images(1, (3, 8, 8)), torch.tensor([k])) for k in (0, 1)]
    with pytest.raises(ValueError, match="may differ in the values of their trainable parameters, and in nothing else"):
        observe(sent, batches, rng=torch.Generator())


class Conceal(Defense):
    """Trains on random images beside the private ones."""

    def on_batch(self, images, labels, rng):
        more = torch.rand(2, *images.shape[1:], generator=rng, dtype=images.dtype)
        return torch.cat([images, more]), torch.cat([labels, torch.tensor([3, 3])])


class Fewer(Defense):
    def on_batch(self, images, labels, rng):
        return images[:1], labels[:1]


class Wrong(Defense):
    def on_batch(self, images, labels, rng):
        return images, labels[:1]


def test_a_client_trains_on_what_its_defense_makes_of_the_batch():
    model, batch = build("lenet"), Batch(images(2), torch.tensor([1, 2]))
    obs = observe(model, batch, defense=Conceal(), threat=ThreatModel(knows_labels=True), rng=torch.Generator())
    plain = observe(model, batch, rng=torch.Generator())
    name = next(iter(plain.gradient))
    assert not torch.allclose(obs.gradient[name], plain.gradient[name])
    assert obs.batch_size == 4 and obs.labels.tolist() == [1, 2, 3, 3]
    first = observe(model, Batch(images(2)[:1], torch.tensor([1])), rng=torch.Generator())
    fewer = observe(model, batch, defense=Fewer(), rng=torch.Generator())
    torch.testing.assert_close(fewer.gradient[name], first.gradient[name])
    with pytest.raises(ValueError, match=r"Wrong.on_batch must return images \[n, 3, 18, 18\] and labels"):
        observe(model, batch, defense=Wrong(), rng=torch.Generator())


def test_clients_of_one_model_share_the_defended_one():
    class Other(Defense):
        def on_model(self, model):
            made.append(copy.deepcopy(model))
            return made[-1]

    made, model = [], build("lenet")
    batches = [Batch(images(1), torch.tensor([k])) for k in (0, 1, 2)]
    assert observe(model, batches, defense=Other(), rng=torch.Generator()).client == Client()
    assert len(made) == 1


def test_dp_sgd_clips_the_clients_own_loss():
    def squares(logits, labels):
        return (logits - torch.eye(4, dtype=logits.dtype)[labels]).square().sum(1).mean()

    model, batch, client = (
        build("lenet"),
        Batch(images(2), torch.tensor([1, 2])),
        Client(rule=loss_gradient.of(squares)),
    )
    plain = observe(model, batch, client=client, rng=torch.Generator())
    wide = observe(model, batch, client=client, defense=DPSGD(clip=1e9, noise=0.0), rng=torch.Generator())
    for name, g in plain.gradient.items():
        torch.testing.assert_close(wide.gradient[name], g, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="this client has another rule"):
        observe(model, batch, client=Client(rule=lambda *_: {}), defense=DPSGD(), rng=torch.Generator())


@pytest.mark.filterwarnings("ignore")
def test_dp_sgd_drops_other_units_for_each_image():
    layers = torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(192, 4)
    model = models.wrap(torch.nn.Sequential(*layers), num_classes=4).double().train()
    batch = Batch(images(1, (3, 8, 8)).repeat(2, 1, 1, 1), torch.tensor([1, 1]))
    obs = observe(model, batch, defense=DPSGD(clip=1e9, noise=0.0), rng=torch.Generator())
    assert (obs.gradient["net.2.weight"][1] != 0).double().mean() > 0.6  # .5 if both had the same mask


def test_a_replaced_layer_or_mode_of_the_attackers_copy_counts_at_once():
    batch = Batch(images(3, (3, 8, 8)), torch.tensor([0, 1, 2]))
    obs = observe(small_norms(), batch, rng=torch.Generator())
    before = obs.simulate(batch.images, batch.labels)
    obs.model.net[4] = torch.nn.Linear(32, 5).double()
    after = obs.simulate(batch.images, batch.labels)
    assert after["net.4.weight"].norm() > 0 and not torch.equal(before["net.1.weight"], after["net.1.weight"])
    train = obs.simulate(batch.images, batch.labels) if obs.model.train() else {}
    again = observe(obs.model, batch, rng=torch.Generator())
    assert not torch.allclose(train["net.1.weight"], after["net.1.weight"])
    torch.testing.assert_close(again.gradient["net.1.weight"], train["net.1.weight"].detach())


def test_simulate_takes_any_theta_and_all_images_whose_steps_are_known():
    model, batch = build("lenet"), Batch(images(2), torch.tensor([1, 2]))
    threat = ThreatModel(knows_order=True, knows_training_details=True)
    obs = observe(model, batch, client=Client(steps=2, local_batch=1), threat=threat, rng=torch.Generator())
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    found, own = (obs.simulate(batch.images, batch.labels, t) for t in (theta, None))
    for name, g in own.items():
        torch.testing.assert_close(found[name], g)
    with pytest.raises(ValueError, match="simulate takes all 2 images, whose steps are known, got 1"):
        obs.simulate(batch.images[:1], batch.labels[:1])


def test_an_attack_works_where_the_caller_computes_no_gradients(rng):
    obs = observe(build("lenet"), Batch(images(1), torch.tensor([1])), rng=rng)
    with torch.no_grad():
        rec = InvertingGradients(steps=2)(obs, torch.Generator())
    assert torch.equal(rec.images, InvertingGradients(steps=2)(obs, torch.Generator()).images)


@pytest.mark.parametrize("returned", [[torch.zeros(2)], {}])
def test_a_rule_that_returns_no_gradient_is_refused(returned):
    with pytest.raises(ValueError, match="a client's rule returns one gradient for each name in theta"):
        Client(rule=lambda *_: returned)(build("lenet"), images(1), torch.tensor([1]))
