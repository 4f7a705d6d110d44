"""Attacks on clients of several local steps, and the memory that simulating these takes."""

import dataclasses
import itertools
import math

import pytest
import torch

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, WithheldError, data, execution, models, observe
from gi_lib.attacks import AGIC, SME, FedAvgEpochs, InvertingGradients
from gi_lib.attacks.fedavg_epochs import agreed, brightest, interpolated, mean_image, same_images
from gi_lib.attacks.sme import between
from gi_lib.defenses import DPSGD
from gi_lib.federated import SGD, Adam, graph_of, loss_gradient
from gi_lib.matching import cosine, fading_l2, layer_cosine, layers

KNOWN = ThreatModel(knows_labels=True, knows_training_details=True)
CLIENTS = [
    Client(steps=6, lr=0.01, local_batch=2),
    Client(steps=3, lr=0.01, optimiser=SGD(momentum=0.9, nesterov=True)),
    Client(steps=3, lr=0.01, optimiser=Adam()),
]
each_client = pytest.mark.parametrize("client", CLIENTS, ids=str)


@pytest.fixture
def digits(rng):
    """What four digits' update shows: digits(client, model, threat, **more)."""

    def make(client=None, name="cnn2", threat=KNOWN, size=4, **more):
        batch = data.load("digits").batch(range(size))
        model = models.build(name, num_classes=10, image_shape=(1, 8, 8)).double()
        return observe(model, batch, client=client or Client(), threat=threat, rng=rng, **more), batch

    return make


def derivative(obs, x):
    x = x.to(obs.dtype).clone().requires_grad_()
    loss = torch.stack([g.square().sum() for g in obs.simulate(x, obs.labels).values()]).sum()
    return torch.autograd.grad(loss, x)[0]


# --- memory


@each_client
def test_steps_that_are_computed_again_give_the_same_derivative_and_keep_less(digits, client, monkeypatch):
    client = dataclasses.replace(client, local_batch=client.local_batch and 32)
    plain, batch = digits(client, size=64)
    assert not plain.graph.recompute
    monkeypatch.setattr("gi_lib.federated.clients.free_bytes", lambda device: 1e5)
    again, _ = digits(client, size=64)
    assert again.graph.recompute and execution.at_once(again) == 1
    assert again.graph.bytes < plain.graph.bytes
    torch.testing.assert_close(derivative(again, batch.images), derivative(plain, batch.images), rtol=1e-12, atol=0)
    kept = [
        execution.kept_bytes(lambda obs=obs: obs.simulate(batch.images.double().requires_grad_(), obs.labels))
        for obs in (again, plain)
    ]
    assert kept[0] < 0.7 * kept[1] and kept[0] <= again.graph.bytes  # and one step, while it is computed


def test_steps_are_not_computed_again_where_that_keeps_more(digits, monkeypatch):
    """Two small images leave less behind than the weights that they are sent through."""
    monkeypatch.setattr("gi_lib.federated.clients.free_bytes", lambda device: 1e5)
    obs, _ = digits(Client(steps=6, lr=0.01, local_batch=2), name="mlp")
    assert not obs.graph.recompute


@each_client
def test_a_client_keeps_no_graph_of_its_earlier_steps(client, rng):
    """Where nobody takes a derivative; what it sends is the same."""
    starts = []

    def rule(model, theta, images, labels):
        starts.append(all(p.is_leaf for p in theta.values()))
        return loss_gradient(model, theta, images, labels)

    batch = data.load("digits").batch(range(4))
    model = models.wrap(models.build("cnn2", num_classes=10, image_shape=(1, 8, 8)), num_classes=10, mean=0, std=1)
    client = dataclasses.replace(client, rule=rule)
    obs = observe(model, batch, client=client, threat=KNOWN, rng=rng)
    assert len(starts) >= client.steps and all(starts[: client.steps])
    sent = client(obs.model, batch.images, batch.labels)
    assert not all(starts[-client.steps :])
    torch.testing.assert_close({k: g.detach() for k, g in sent.items()}, obs.gradient, rtol=0, atol=0)


@each_client
def test_the_estimate_of_the_graph_is_what_it_keeps(digits, client):
    obs, batch = digits(client)
    kept = execution.kept_bytes(lambda: obs.simulate(batch.images.double().requires_grad_(), obs.labels))
    assert obs.graph.steps == client.steps and obs.graph.bytes == pytest.approx(kept, rel=0.2)


def test_a_graph_that_would_not_fit_is_refused_before_it_is_built(digits, rng, monkeypatch):
    obs, _ = digits(Client(steps=6, lr=0.01, local_batch=2))
    monkeypatch.setattr("gi_lib.execution.free_bytes", lambda device: 1e4)
    with pytest.raises(NotApplicableError, match=r"to simulate 6 local steps takes about .* GiB are free: use SME or"):
        InvertingGradients(steps=1)(obs, rng)


def test_what_does_not_fit_for_steps_fits_for_one_gradient(digits, rng, monkeypatch):
    obs, batch = digits(Client(steps=6, lr=0.01, local_batch=2))
    monkeypatch.setattr("gi_lib.execution.free_bytes", lambda device: 1e4)
    assert SME(steps=1)(obs, rng).images.shape == batch.images.shape


def test_as_many_guesses_are_stacked_as_fit(digits, monkeypatch):
    obs, _ = digits(Client(steps=6, lr=0.01, local_batch=2))
    monkeypatch.setattr("gi_lib.execution.free_bytes", lambda device: 2.5 * obs.graph.bytes)
    assert execution.at_once(obs) == 2


def test_a_client_of_one_step_has_no_long_graph(digits):
    obs, batch = digits()
    assert obs.graph is None and graph_of(None, obs.model, batch.images) is None


def test_a_rule_that_lets_nobody_look_has_no_estimate(digits):
    threat = dataclasses.replace(KNOWN, knows_defense=True)
    obs, _ = digits(Client(steps=2, lr=0.01), threat=threat, defense=DPSGD(clip=1.0, noise=0.0))
    assert obs.graph is None


# --- one gradient in place of many


def test_one_gradient_is_that_of_all_images_at_the_start(digits):
    obs, _ = digits(Client(steps=4, lr=1e-6, local_batch=2, optimiser=SGD(momentum=0.5)))
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    one = obs.one_gradient().simulate(x, obs.labels)
    plain = Client()(obs.model, x, obs.labels)
    torch.testing.assert_close(one, {name: g.detach() for name, g in plain.items()})


def test_with_small_steps_the_update_is_the_gradient_times_their_number(digits):
    obs, batch = digits(Client(steps=4, lr=1e-7, local_batch=2))
    one = obs.one_gradient().simulate(batch.images.double(), batch.labels)
    torch.testing.assert_close({name: 4 * g for name, g in one.items()}, obs.gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("attack", [SME(steps=1), AGIC(steps=1), FedAvgEpochs(steps=1)], ids=lambda a: type(a).__name__)
def test_an_unknown_rate_or_number_of_steps_is_an_error(digits, rng, attack):
    obs, _ = digits(Client(steps=2, lr=0.1), threat=ThreatModel(knows_labels=True))
    with pytest.raises(WithheldError, match=r"needs the client's training details.*knows_training_details=True"):
        attack(obs, rng)


def test_one_gradient_needs_the_training_details(digits):
    obs, _ = digits(Client(steps=2, lr=0.1), threat=ThreatModel(knows_labels=True))
    with pytest.raises(WithheldError, match="one_gradient needs the client's training details"):
        obs.one_gradient()


def test_code_of_somebodys_own_tells_no_rule(digits):
    obs, _ = digits()
    own = dataclasses.replace(obs, client=lambda *args, **kwargs: {})
    with pytest.raises(NotApplicableError, match="tells no rule of one step; say it as"):
        own.one_gradient()


# --- distances


def gradients():
    draw = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 3)}
    return [{name: torch.randn(shape, generator=draw).double() for name, shape in shapes.items()} for _ in range(2)]


def test_layer_cosine_is_the_weighted_mean_of_each_layers_cosine():
    mine, theirs = gradients()
    assert layers(mine) == [["a.weight", "a.bias"], ["b.weight"]]
    a, b = (torch.cat([g[n].flatten() for n in ("a.weight", "a.bias")]) for g in (mine, theirs))
    first = 1 - torch.nn.functional.cosine_similarity(a, b, dim=0)
    last = 1 - torch.nn.functional.cosine_similarity(*(g["b.weight"].flatten() for g in (mine, theirs)), dim=0)
    torch.testing.assert_close(layer_cosine(mine, theirs, 3.0), (first + 3 * last) / 4)
    torch.testing.assert_close(layer_cosine(mine, mine), torch.zeros(()).double(), rtol=0, atol=1e-12)


def test_fading_l2_divides_each_layer_by_e_once_more():
    mine, theirs = gradients()
    square = {name: (mine[name] - theirs[name]).square().sum() for name in mine}
    expected = square["a.weight"] + square["a.bias"] + square["b.weight"] / math.e
    torch.testing.assert_close(fading_l2(mine, theirs), expected)


# --- copies of epochs


def test_the_prior_is_the_mean_over_pairs_of_epochs_and_knows_no_order():
    x = torch.rand(3, 4, 1, 2, 2, dtype=torch.float64)
    for project in (mean_image, brightest):
        p = project(x)
        pairs = [(p[i] - p[j]).square().mean() for i, j in itertools.product(range(3), repeat=2)]
        torch.testing.assert_close(same_images(p), torch.stack(pairs).mean())
        shuffled = torch.stack([images[torch.randperm(4)] for images in x])
        torch.testing.assert_close(same_images(project(shuffled)), same_images(p))


def test_copies_are_put_in_one_order_before_they_are_averaged():
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    shuffled = torch.stack([x, x[torch.tensor([4, 2, 0, 1, 3])], x.flip(0)])
    torch.testing.assert_close(agreed(shuffled), x)


def test_steps_that_are_no_whole_epochs_are_refused(digits, rng):
    obs, _ = digits(Client(steps=5, lr=0.01, local_batch=2))
    with pytest.raises(
        NotApplicableError,
        match=r"5 local steps are no whole number of epochs: 4 images in batches of 2 take 2 steps an epoch; use"
        r" InvertingGradients, .* or a client of 4 steps",
    ):
        FedAvgEpochs(steps=1)(obs, rng)


def test_the_epochs_of_several_clients_are_refused(rng):
    batches = [data.load("digits").batch([i, i + 1]) for i in (0, 2)]
    model = models.build("cnn2", num_classes=10, image_shape=(1, 8, 8))
    obs = observe(model, batches, client=Client(steps=2, lr=0.1), threat=KNOWN, rng=rng)
    with pytest.raises(NotApplicableError, match="there are several, or one whose epochs are not told; use Inverting"):
        FedAvgEpochs(steps=1)(obs, rng)
    assert SME(steps=1)(obs, rng).images.shape == (4, 1, 8, 8)


def test_where_the_order_is_known_the_true_images_have_the_observed_update(digits, rng, monkeypatch):
    """One copy serves all epochs; N = 4 in batches of 3 leaves a batch of one image."""
    client = Client(steps=4, lr=0.1, local_batch=3, shuffle=True)
    obs, batch = digits(client, threat=dataclasses.replace(KNOWN, knows_order=True))
    attack = FedAvgEpochs(steps=1, lr=1e-9)
    assert attack(obs, rng).loss > 0.1  # of noise
    truth = batch.images[batch.labels.argsort(stable=True)].double()
    begin = ((truth - obs.model.mean) / obs.model.std)[None, None]
    monkeypatch.setattr("gi_lib.attacks.fedavg_epochs.gaussian", lambda obs, *shape: lambda rows, rng: begin)
    assert attack(obs, rng).loss < 1e-12


def test_one_copy_is_the_simulation_with_shared_images(digits, monkeypatch):
    """Its matching loss is that of a client that takes the images in an order drawn once."""
    client = Client(steps=4, lr=0.1, local_batch=2, shuffle=True)
    obs, batch = digits(client)
    start = torch.rand(1, 1, 4, 1, 8, 8, dtype=torch.float64)
    monkeypatch.setattr("gi_lib.attacks.fedavg_epochs.gaussian", lambda obs, *shape: lambda rows, rng: start)
    rec = FedAvgEpochs(steps=1, lr=1e-12, copies=1)(obs, torch.Generator().manual_seed(3))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).split(2) * 2
    sent = client(obs.model, start[0, 0], obs.labels, order=order)
    assert rec.loss == pytest.approx(fading_l2(sent, obs.gradient).item(), rel=1e-6)


def test_no_copy_is_one_gradient_times_the_steps(digits, monkeypatch):
    obs, batch = digits(Client(steps=4, lr=0.1, local_batch=2))
    start = torch.rand(1, 1, 4, 1, 8, 8, dtype=torch.float64)
    monkeypatch.setattr("gi_lib.attacks.fedavg_epochs.gaussian", lambda obs, *shape: lambda rows, rng: start)
    rec = FedAvgEpochs(steps=1, lr=1e-12, copies=0)(obs, torch.Generator().manual_seed(3))
    one = Client()(obs.model, start[0, 0], obs.labels)
    expected = fading_l2({name: 4 * g for name, g in one.items()}, obs.gradient)
    assert rec.loss == pytest.approx(expected.item(), rel=1e-6)


def test_labels_are_known_or_interpolated_over_the_steps(digits):
    client = Client(steps=4, lr=0.01, local_batch=2)
    obs, batch = digits(client, threat=ThreatModel(knows_training_details=True))
    assert interpolated(obs).shape == (4,)
    known, _ = digits(client)
    assert interpolated(known).tolist() == batch.labels.sort().values.tolist()


# --- the surrogate


def test_the_surrogate_lies_between_the_weights_before_and_after(digits):
    obs, _ = digits(Client(steps=3, lr=0.1))
    w0 = dict(obs.model.named_parameters())
    wT = {name: w0[name] - 0.1 * g for name, g in obs.gradient.items()}
    bend = {name: torch.ones_like(g) for name, g in obs.gradient.items()}
    for a, end in ((0.0, w0), (1.0, wT)):
        for c in (None, bend):
            found = between(obs, torch.tensor(a, dtype=torch.float64), c)
            torch.testing.assert_close(found, {name: p.detach() for name, p in end.items()})
    half = between(obs, torch.tensor(0.5, dtype=torch.float64), bend)
    torch.testing.assert_close(half["net.0.bias"], ((w0["net.0.bias"] + wT["net.0.bias"]) / 2 + 0.5).detach())


def test_the_share_of_the_way_is_learned_and_stays_in_its_bounds(digits, rng):
    obs, _ = digits(Client(steps=3, lr=0.1))
    assert SME(steps=5, lr_a=0.1)(obs, rng).notes["alpha"] != 0.5
    assert 0 <= SME(steps=30, lr_a=1.0)(obs, rng).notes["alpha"] <= 1
    assert SME(steps=5, alpha=0.3, lr_a=0.0)(obs, rng).notes["alpha"] == pytest.approx(0.3)


def test_a_client_of_one_step_was_at_its_start(digits, rng):
    obs, _ = digits()
    assert SME(steps=3, lr_a=0.1)(obs, rng).notes["alpha"] == 0


def test_clients_of_one_step_were_at_their_start_too(rng):
    images, labels = torch.rand(4, 1, 8, 8, generator=rng, dtype=torch.float64), torch.tensor([0, 3, 5, 9])
    model = models.build("mlp", num_classes=10, image_shape=(1, 8, 8), seed=0).double()
    parts = [Batch(images[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    obs = observe(model, parts, threat=KNOWN, rng=rng)
    assert obs.client.steps == 2 and SME(steps=3, lr_a=0.1)(obs, rng).notes["alpha"] == 0


def test_without_a_bend_or_a_share_it_is_one_gradient_by_plain_adam(digits):
    """Before the first step, with several rounds: the mean of the cosines at the weights of each."""
    first, batch = digits(Client(steps=2, lr=0.05))
    threat = dataclasses.replace(KNOWN, many_rounds=True)
    obs, _ = digits(Client(steps=2, lr=0.05), threat=threat, earlier=[first])
    start = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(3)).double()[0]
    x = obs.model.mean + obs.model.std * start
    for attack in (SME(steps=1, alpha=0.0, lr_a=0.0), AGIC(steps=1)):
        rec = attack(obs, torch.Generator().manual_seed(3))
        by = cosine if isinstance(attack, SME) else lambda a, b: layer_cosine(a, b, 2.0)
        each = [by(Client()(o.model, x, obs.labels), o.gradient).item() for o in (first, obs)]
        prior = rec.trace[0].item() - sum(each) / 2
        assert 0 < prior < 0.1  # the total variation


def test_sme_is_ahead_of_one_gradient_where_the_weights_go_far(rng):
    """At equal evaluations, by more than two decibels."""
    batch = data.load("digits").batch(range(4))
    model = models.build("cnn2", num_classes=10, image_shape=(1, 8, 8), seed=1, mean=0.3, std=0.4)
    obs = observe(model, batch, client=Client(steps=20, lr=0.04, local_batch=2, shuffle=True), threat=KNOWN, rng=rng)
    truth = Batch(batch.images[batch.labels.argsort()], batch.labels.sort().values)

    def dB(attack):
        rec = attack(obs, torch.Generator().manual_seed(0))
        error = (rec.images - truth.images).square().mean((1, 2, 3))
        return (-10 * error.log10()).mean().item()

    assert dB(SME(steps=150)) > dB(SME(steps=150, alpha=0.0, lr_a=0.0)) + 2
