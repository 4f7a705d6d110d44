"""The batch-norm update: what the returned statistics tell, what they don't, and what each target is."""

import dataclasses

import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, NotApplicableError, ThreatModel, WithheldError, models, observe, receive
from gi_lib.attacks import BatchNormUpdate, InvertingGradients, bn_update
from gi_lib.attacks.bn_update import Exact, Inferred, Proxy, Running
from gi_lib.bench import Case
from gi_lib.bench.cases import text
from gi_lib.copies import bn_statistics, running_statistics

SHAPE = (3, 12, 12)
ONE = Client()
ALL = ThreatModel(knows_bn_stats=True, knows_buffers=True, knows_training_details=True, knows_order=True)


def seen(name="resnet20", size=4, train=True, client=ONE, threat=ALL, change=lambda model: None, labels=None, **given):
    """An observation of random images through a network in train mode, and the batch."""
    model = models.build(name, num_classes=4, image_shape=SHAPE, mean=0.4, std=0.3).train(train)
    change(model)
    rng = torch.Generator().manual_seed(3)
    batch = Batch(torch.rand(size, *SHAPE, generator=rng), torch.arange(size) % 4 if labels is None else labels)
    return observe(model, batch, client=client, threat=threat, rng=rng, **given), batch


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def apart(goal, true):
    assert goal.keys() == true.keys()
    return max((a - b).abs().max().item() for name in goal for a, b in zip(goal[name], true[name], strict=True))


@pytest.mark.parametrize("name", ["convnet", "resnet20"])
@pytest.mark.parametrize("size", [1, 4])
def test_inferred_statistics_are_those_of_the_batch(name, size):
    obs, batch = seen(name, size)
    goal, of_the_guess = Inferred()(obs)
    assert apart(goal, obs.bn_stats) < 1e-4
    assert apart(of_the_guess(batch.images), obs.bn_stats) < 1e-6


@pytest.mark.filterwarnings("ignore:the update is about")  # three labels of four: the estimate is rough
def test_they_are_what_torchs_own_layers_return():
    """Through torch's batch norm, whose running variance is unbiased, and an update of the whole state."""
    model = models.build("resnet20", num_classes=4, image_shape=SHAPE).train()
    for layer, momentum in zip(norms(model), torch.linspace(0.05, 1, len(norms(model))).tolist(), strict=True):
        layer.momentum = momentum
    x, y = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    before = {name: v.clone() for name, v in model.state_dict().items()}
    nn.functional.cross_entropy(model(x), y).backward()
    sent = {name: before[name] - v for name, v in model.state_dict().items() if "running" in name}
    sent |= {name: p.grad for name, p in model.named_parameters()}
    model.load_state_dict(before)
    obs = receive(model, sent, image_shape=SHAPE, batch_size=3)
    assert apart(Inferred()(obs)[0], bn_statistics(obs.model, x)) < 1e-4


def test_a_biased_variance_would_be_another():
    obs, _ = seen("resnet20", 1)
    name, layer = list(obs.bn_stats)[-1], obs.model.get_submodule(list(obs.bn_stats)[-1])
    plain = (obs.buffers[name][1] - 0.9 * layer.running_var) / 0.1
    n = 3 * 3  # of one image at the last stage
    torch.testing.assert_close(plain * (n - 1) / n, obs.bn_stats[name][1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(plain, obs.bn_stats[name][1], rtol=1e-2)


def test_a_cumulative_average_tells_them_too():
    def cumulative(model):
        for layer in norms(model):
            layer.momentum = None
            layer.num_batches_tracked.fill_(6)

    obs, _ = seen(change=cumulative)
    assert apart(Inferred()(obs)[0], obs.bn_stats) < 1e-4


@pytest.mark.parametrize("local", [None, 3])
def test_several_steps_give_a_weighted_mean_over_them(local):
    """The guess's are weighted alike; they are taken at the weights sent, which a small rate hardly moves."""
    client = Client(steps=3, lr=1e-6, local_batch=local)
    obs, batch = seen(client=client, labels=torch.tensor([3, 0, 2, 1]))
    goal, of_the_guess = Inferred()(obs)
    slots = batch.images[batch.labels.argsort()]
    assert apart(of_the_guess(slots), goal) < 1e-3
    if local:
        assert apart(bn_statistics(obs.model, slots), goal) > 1e-3
        first = bn_statistics(obs.model, batch.images[:3]), bn_statistics(obs.model, batch.images[3:])
        share = [0.1 * 0.9**2 + 0.1, 0.1 * 0.9]  # steps 0 and 2 see the first three images
        name = next(iter(goal))
        mean = sum(s * part[name][0] for s, part in zip(share, first, strict=True)) / sum(share)
        torch.testing.assert_close(goal[name][0], mean, rtol=1e-3, atol=1e-4)


def test_the_mean_over_clients_is_one_of_their_statistics():
    model = models.build("resnet20", num_classes=4, image_shape=SHAPE).train()
    rng = torch.Generator().manual_seed(0)
    batches = [Batch(torch.rand(n, *SHAPE, generator=rng), torch.arange(n)) for n in (1, 3)]
    obs = observe(model, batches, threat=ALL, rng=rng)
    goal, of_the_guess = Inferred()(obs)
    slots = torch.cat([batch.images for batch in batches])
    slots = slots[torch.cat([batch.labels for batch in batches]).argsort(stable=True)]
    assert apart(of_the_guess(slots), goal) < 1e-3


class Own:
    """Data of the attacker's own."""

    hash = "own"

    def draw(self, n, rng):
        return torch.rand(n, *SHAPE, generator=rng), torch.zeros(n, dtype=torch.int64)


def test_each_target_is_what_it_says():
    obs, _ = seen()
    obs = dataclasses.replace(obs, auxiliary=Own())
    rng = torch.Generator().manual_seed(0)
    running, exact, proxy = (target(obs, rng)[0] for target in (Running(), Exact(), Proxy(images=64)))
    assert all((mean == 0).all() and (var == 1).all() for mean, var in running.values())
    assert exact is obs.bn_stats
    drawn = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert apart(proxy, bn_statistics(obs.model, drawn)) == 0


def test_the_search_starts_alike_with_every_target(monkeypatch):
    starts, begin = [], bn_update.search

    def kept(obs, rng, **settings):
        starts.append(rng.get_state())
        return begin(obs, rng, **settings)

    monkeypatch.setattr(bn_update, "search", kept)
    threat = dataclasses.replace(ALL, has_auxiliary_data=True)
    obs, _ = seen(threat=threat, auxiliary=Own())
    for target in (None, Running(), Proxy(images=8), Inferred(), Exact()):
        BatchNormUpdate(target, steps=1)(obs, torch.Generator().manual_seed(0))
    assert all(torch.equal(state, starts[0]) for state in starts)


def test_each_target_asks_for_its_own_facts():
    facts = [set(BatchNormUpdate(target).needs.facts) for target in (None, Running(), Exact(), Proxy(), Inferred())]
    least = {"client", "batch_size"}
    assert facts == [least, least, least | {"bn_stats"}, least | {"auxiliary"}, least | {"buffers"}]
    obs, _ = seen(threat=ThreatModel(), train=False)
    assert BatchNormUpdate(Running(), steps=1)(obs, torch.Generator()).images.shape == (4, *SHAPE)
    for target, fact in ((Exact(), "knows_bn_stats"), (Proxy(), "has_auxiliary_data"), (Inferred(), "knows_buffers")):
        with pytest.raises(WithheldError, match=f"BatchNormUpdate needs .* observe with.*{fact}"):
            BatchNormUpdate(target, steps=1)(obs, torch.Generator())


def test_the_term_is_added_and_without_it_no_batch_norm_is_needed():
    obs, _ = seen()
    start = torch.randn(1, 4, *SHAPE, generator=torch.Generator().manual_seed(5))[0]
    plain, whole = (
        BatchNormUpdate(target, steps=1, bn=0.5)(obs, torch.Generator().manual_seed(5)).trace.item()
        for target in (None, Exact())
    )
    found = bn_statistics(obs.model, obs.model.mean + obs.model.std * start)
    term = sum((a - b).norm() for name in found for a, b in zip(found[name], obs.bn_stats[name], strict=True))
    assert whole - plain == pytest.approx(0.5 * term.item(), rel=1e-3)
    obs, _ = seen("lenet", train=False)
    assert BatchNormUpdate(None, steps=1)(obs, torch.Generator()).images.shape == (4, *SHAPE)


def test_a_target_is_in_the_key():
    cases = [
        Case(BatchNormUpdate(target, steps=2), "convnet", "cifar10", (0,))
        for target in (Inferred(), Inferred(momentum=0.2), Running(), None)
    ]
    assert len({text(case) for case in cases}) == 4


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({"name": "lenet"}, Running(), "BatchNormUpdate does not apply: the model has no batch norm"),
        ({"train": False}, Inferred(), r"was in train mode.*call .train\(\).*or use the target Running\(\)"),
        (
            {"client": Client(steps=2, lr=0.1, local_batch=2), "threat": dataclasses.replace(ALL, knows_order=False)},
            Inferred(),
            r"a weighted mean over 2 local steps on different images.*ThreatModel\(knows_order=True\)",
        ),
    ],
)
def test_what_can_not_be_told_is_said(settings, target, message):
    obs, _ = seen(**settings)
    with pytest.raises(NotApplicableError, match=message):
        BatchNormUpdate(target, steps=1)(obs, torch.Generator())


@pytest.mark.parametrize(
    ("momentum", "counted", "message"),
    [
        (None, None, r"the momentum of net.bn1 is not said, nor how many batches.*say Inferred\(momentum=...\)"),
        (0.0, 0, r"net.bn1 has momentum 0, with which running statistics don't tell the batch's; say Inferred"),
        (0.9, 0, r"asks for a negative variance of the batch: the client has another momentum.*Inferred\(momentum"),
    ],
)
def test_a_momentum_that_is_not_that_of_the_client_is_refused(momentum, counted, message):
    obs, _ = seen()
    if momentum == 0.9:  # the client's was 0.9, the model says 0.02
        obs, _ = seen(change=lambda model: [setattr(layer, "momentum", 0.9) for layer in norms(model)])
        momentum = 0.02
    for layer in [layer for layer in obs.model.modules() if hasattr(layer, "momentum")]:
        layer.momentum, layer.num_batches_tracked = momentum, counted if counted is None else torch.tensor(counted)
    with pytest.raises(NotApplicableError, match=message):
        Inferred()(obs)


def test_a_momentum_of_ones_own_is_taken():
    obs, _ = seen(change=lambda model: [setattr(layer, "momentum", 0.3) for layer in norms(model)])
    for layer in [layer for layer in obs.model.modules() if hasattr(layer, "momentum")]:
        layer.momentum = None
    assert apart(Inferred(momentum=0.3)(obs)[0], obs.bn_stats) < 1e-4
    for wrong in (0.0, 2.0):
        with pytest.raises(ValueError, match=f"Inferred needs momentum, a finite number > 0 and <= 1, got {wrong}"):
            Inferred(momentum=wrong)


def test_running_statistics_that_did_not_move_tell_nothing():
    obs, _ = seen()
    kept = dataclasses.replace(obs, buffers=running_statistics(obs.model))
    with pytest.raises(NotApplicableError, match="are those that were sent: the client trained in eval mode, or keeps"):
        Inferred()(kept)


def test_without_its_term_nothing_of_batch_norm_is_needed():
    obs, _ = seen("lenet", train=False)
    assert BatchNormUpdate(Running(), steps=1, bn=0.0)(obs, torch.Generator()).images.shape == (4, *SHAPE)
    with pytest.raises(NotApplicableError, match="BatchNormUpdate does not apply: the model has no batch norm"):
        BatchNormUpdate(Exact(), steps=1)(dataclasses.replace(obs, bn_stats=None), torch.Generator())


def test_statistics_of_the_wrong_shape_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 5))
    model = models.wrap(net.train(), num_classes=5)
    sent = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    given = {"image_shape": SHAPE, "client": None}
    with pytest.raises(
        ValueError, match=r"bn_stats of 'net.1' must be a mean and a variance, tensors \[4\].*\[3\] and \[4\]"
    ):
        receive(model, sent, bn_stats={"net.1": (torch.zeros(3), torch.ones(4))}, **given)
    back = {"net.1.running_mean": torch.zeros(1), "net.1.running_var": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"the running statistics of 'net.1' must be .*\[1\] and \[4\]"):
        receive(model, sent | back, **given)
    for wrong, message in (
        ({"net.1": ([0.0] * 4, torch.ones(4))}, r"tensors \[4\] of finite numbers, one a channel, got list and \[4\]"),
        ([torch.zeros(4)], "bn_stats are a mean and a variance by the name of each batch norm"),
        ({"net.1": (torch.zeros(4), -torch.ones(4))}, "bn_stats of 'net.1' have a negative variance, -1"),
    ):
        with pytest.raises(ValueError, match=message):
            receive(model, sent, bn_stats=wrong, **given)
    net[1] = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    model = models.wrap(net.train(), num_classes=5)
    sent = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"bn_stats of 'net.1' must be .*\[1\] and \[1\]"):
        receive(model, sent, bn_stats={"net.1": (torch.zeros(1), torch.ones(1))}, **given)


def test_group_norm_mixes_no_images():
    """The network of the comparison: its gradient of a batch is the mean of its images' own."""
    model = models.build("resnet18_group", num_classes=4, image_shape=SHAPE).train()
    assert not norms(model) and sum(isinstance(layer, nn.GroupNorm) for layer in model.modules()) == 20
    x, y = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    both, first, second = (Client()(model, x[i], y[i]) for i in (slice(None), slice(1), slice(1, 2)))
    name = "net.conv1.weight"
    torch.testing.assert_close(both[name], (first[name] + second[name]) / 2, rtol=1e-3, atol=1e-5)
    obs = observe(model, Batch(x, y), rng=torch.Generator())
    assert InvertingGradients(steps=1)(obs, torch.Generator()).images.shape == (2, *SHAPE)
