"""PRECODE: its divergence against torch.distributions, what is changed, and the ratio that it does not touch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gi_lib import Batch, Client, ThreatModel, data, evaluate, models, observe
from gi_lib.attacks import BiasRatio
from gi_lib.copies import forward
from gi_lib.defenses import PRECODE
from gi_lib.defenses.precode import VariationalBottleneck, divergences
from gi_lib.federated import loss_gradient
from gi_lib.matching import squared_l2

pytestmark = pytest.mark.filterwarnings("ignore:the forward pass draws random numbers")
KNOWN = ThreatModel(knows_defense=True)


@pytest.fixture
def private():
    batch = data.load("digits").batch([3, 7])
    return models.build("mlp", num_classes=10, image_shape=(1, 8, 8)).double(), batch


def test_the_divergence_is_that_of_torch_in_bits(rng):
    bottleneck, r = VariationalBottleneck(6, 4, rng).double(), torch.randn(3, 6, generator=rng).double()
    mu, s = bottleneck.encoder(r).chunk(2, dim=1)
    own, standard = torch.distributions.Normal(mu, F.softplus(s)), torch.distributions.Normal(0 * mu, 1 + 0 * mu)
    nats = torch.distributions.kl_divergence(own, standard).sum(1).mean()
    with divergences() as seen:
        bottleneck(r)
    torch.testing.assert_close(seen, [nats / torch.log(torch.tensor(2.0).double())])
    assert len(seen) == 1 and bottleneck(r).shape == r.shape


def test_the_bottleneck_stands_before_the_last_layer_of_another_model(private):
    model, _ = private
    before = {name: p.clone() for name, p in model.named_parameters()}
    extended = PRECODE(width=5).on_model(model)
    found = dict(extended.named_parameters())
    assert found["net.7.bottleneck.encoder.weight"].shape == (10, 1024)
    assert found["net.7.bottleneck.decoder.weight"].shape == (1024, 5)
    torch.testing.assert_close(found["net.7.last.weight"], before["net.7.weight"])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert not isinstance(model.net[7], nn.Sequential)


def test_the_same_seed_gives_the_same_bottleneck_and_nothing_global_is_drawn(private):
    model, _ = private
    state = torch.get_rng_state()
    one, same, other = (PRECODE(seed=s).on_model(model).state_dict() for s in (1, 1, 2))
    name = "net.7.bottleneck.encoder.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_sent_is_the_gradient_of_the_loss_and_the_divergence(private):
    """With the client's own draw put back, autograd on the extended model gives the same."""
    model, batch = private
    defense = PRECODE(width=8, beta=0.5)
    obs = observe(model, batch, defense=defense, threat=KNOWN, rng=torch.Generator().manual_seed(4))
    extended = defense.on_model(model)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(4)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with divergences() as seen:
            logits = extended(batch.images.double())
    loss = F.cross_entropy(logits, batch.labels) + 0.5 * seen[0]
    names, parameters = zip(*extended.named_parameters(), strict=True)
    for name, g in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(obs.gradient[name], g)


def test_the_term_of_the_divergence_reaches_the_layers_below(private):
    model, batch = private
    sent = [
        observe(model, batch, defense=PRECODE(beta=beta), rng=torch.Generator().manual_seed(1)).gradient
        for beta in (0.0, 1.0)
    ]
    assert squared_l2(*sent) > 1e-6
    torch.testing.assert_close(sent[0]["net.7.last.weight"], sent[1]["net.7.last.weight"])
    assert not torch.allclose(sent[0]["net.1.weight"], sent[1]["net.1.weight"])


def test_the_attacker_draws_something_else_than_the_client(private):
    model, batch = private
    obs = observe(model, batch, defense=PRECODE(), threat=KNOWN, rng=torch.Generator().manual_seed(1))
    own = obs.simulate(batch.images.double(), batch.labels)
    size = squared_l2({name: 0 * g for name, g in own.items()}, obs.gradient)
    assert (squared_l2(own, obs.gradient) / size).sqrt() > 0.1
    again = obs.simulate(batch.images.double(), batch.labels)
    torch.testing.assert_close(own, again)


@pytest.mark.parametrize("seed", range(3))
def test_the_bias_ratio_is_exact_whatever_is_drawn(private, seed):
    model, _ = private
    batch = data.load("digits").batch([3])
    obs = observe(model, batch, defense=PRECODE(), rng=torch.Generator().manual_seed(seed))
    with pytest.warns(UserWarning, match="the closed form does not hold"):  # as simulated with another draw
        rec = BiasRatio()(obs, torch.Generator())
    assert evaluate(rec, batch, download=False).psnr.item() > 140
    assert rec.labels.tolist() == batch.labels.tolist()


def test_rows_that_are_stacked_have_the_divergence_too(private):
    """Under vmap the rule takes torch.func's path."""
    model, batch = private
    obs = observe(model, batch, defense=PRECODE(beta=1.0), threat=KNOWN, rng=torch.Generator())
    x = torch.stack([batch.images, batch.images.flip(3)]).double()
    stacked = torch.func.vmap(lambda one: obs.simulate(one, batch.labels), randomness="same")(x)
    for i in range(2):
        one = obs.simulate(x[i], batch.labels)
        torch.testing.assert_close({name: g[i] for name, g in stacked.items()}, one)


def test_a_pass_without_its_rule_keeps_nothing(private):
    model, batch = private
    extended = PRECODE().on_model(model)
    with divergences() as seen:
        pass
    forward(extended, batch.images.double())
    assert seen == []


def test_what_it_does_not_apply_to(rng):
    net = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())
    batch = Batch(torch.rand(1, 1, 4, 4, generator=rng), torch.tensor([1]))
    with pytest.raises(ValueError, match="before the last dense layer, and the model has none"):
        observe(models.wrap(net, num_classes=3), batch, defense=PRECODE(), rng=rng)
    with pytest.raises(ValueError, match="adds a term to the loss, and this client has another rule"):
        PRECODE().on_client(Client(rule=lambda *_: {}))
    assert PRECODE().on_client(Client(rule=loss_gradient.of(F.nll_loss))).rule.loss is F.nll_loss


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("beta", -1.0), ("seed", -1)])
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"PRECODE needs {name}"):
        PRECODE(**{name: value})
