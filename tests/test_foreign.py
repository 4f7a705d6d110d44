"""Other people's models and updates: public reports of what went wrong, each with the value that is right.

The numbers are those of the reports' own threads where they have one: P01 to P34 of the cases that were collected.
"""

import copy
import dataclasses
import sys
import types
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from gi_lib import (
    SGD,
    Adam,
    Batch,
    Client,
    NotApplicableError,
    Observation,
    ThreatModel,
    labels,
    loss_gradient,
    metrics,
    models,
    observe,
    receive,
)
from gi_lib.attacks import DLG, BiasRatio, GradInversion, InvertingGradients
from gi_lib.copies import attackers_copy


def G(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(*shape):
    """Images [B, C, H, W] in [0, 1]."""
    small = torch.rand(*shape[:2], 4, 4, generator=G())
    return F.interpolate(small, size=shape[2:], mode="bilinear")


def gradient(model, images, labels, loss=F.cross_entropy):
    theta = dict(model.named_parameters())
    found = torch.autograd.grad(loss(model(images), labels), list(theta.values()))
    return dict(zip(theta, found, strict=True))


def apart(a, b):
    """Relative distance of two gradients."""
    return (sum((a[n] - b[n]).square().sum() for n in b) / sum(g.square().sum() for g in b.values())).sqrt().item()


def dense(*widths):
    torch.manual_seed(0)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def sigmoid_net(channels=1, side=12, classes=10, tail=()):
    torch.manual_seed(0)
    features = 12 * ((side + 1) // 2) ** 2
    net = nn.Sequential(
        nn.Conv2d(channels, 12, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(features, classes), *tail
    )
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return net


ONE = (smooth(1, 3, 8, 8), torch.tensor([3]))
TWO = (smooth(2, 3, 8, 8), torch.tensor([3, 5]))


# What an update may look like


def forms(own):
    """The same gradient in the forms in which people have it."""
    named = dict(own)
    return {
        "dict": named,
        "ordered the other way round": OrderedDict(reversed(named.items())),
        "list of tensors": list(named.values()),
        "list of arrays": [g.numpy() for g in named.values()],
        "tuple": tuple(named.values()),
        "dict of arrays": {k: g.numpy() for k, g in named.items()},
        **{
            f"prefix {prefix}": {prefix + k: g for k, g in named.items()}
            for prefix in ("module.", "_orig_mod.", "_module.", "net.", "net._module.", "module.net.", "net._orig_mod.")
        },
        "requires grad": {k: g.clone().requires_grad_() * 1 for k, g in named.items()},
        "float16": {k: g.half() for k, g in named.items()},
        "bfloat16": {k: g.bfloat16() for k, g in named.items()},
        "float64": {k: g.double() for k, g in named.items()},
    }


FORMS = forms(gradient(dense(192, 16, 10), *ONE))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "not wrapped"])
def test_every_form_of_an_update_is_received(form, wrapped):
    """P01, P02, P21: a list in parameter order, arrays, wrappers' prefixes, other types."""
    net = dense(192, 16, 10)
    model = models.wrap(net, num_classes=10) if wrapped else net
    obs = receive(model, FORMS[form], image_shape=(3, 8, 8), batch_size=1)
    expected = {f"net.{k}": g for k, g in gradient(net, *ONE).items()}
    assert obs.gradient.keys() == expected.keys() and obs.dtype == torch.float32
    assert apart(obs.gradient, expected) < (1e-2 if "16" in form else 1e-6)
    assert obs.num_classes == 10 and not any(g.requires_grad for g in obs.gradient.values())
    if "16" not in form:
        assert labels.infer(obs).tolist() == [3]


def test_an_update_is_received_from_a_safetensors_file(tmp_path):
    net = dense(192, 16, 10)
    path = tmp_path / "update.safetensors"
    save_file({k: g.contiguous() for k, g in gradient(net, *ONE).items()}, path)
    obs = receive(net, path, image_shape=(3, 8, 8), batch_size=1)
    assert apart(obs.gradient, receive(net, gradient(net, *ONE), image_shape=(3, 8, 8)).gradient) == 0
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        receive(net, path, image_shape=(3, 8, 8))


def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("as_list", [False, True])
def test_differences_of_whole_states_give_the_gradient_and_the_buffers(as_list):
    """P03: what Flower, FedLab and FL-bench ship, in train mode."""
    net, lr = with_norm().train(), 0.1
    before = copy.deepcopy(net.state_dict())
    local = copy.deepcopy(net)
    sgd = torch.optim.SGD(local.parameters(), lr=lr)
    F.cross_entropy(local(TWO[0]), TWO[1]).backward()
    sgd.step()
    update = {k: (before[k] - v) / lr for k, v in local.state_dict().items()}
    if as_list:
        update = [v.numpy() for v in update.values()]
    obs = receive(net, update, image_shape=(3, 8, 8), batch_size=2, client=Client(lr=lr))
    expected = gradient(copy.deepcopy(net), *TWO)
    assert apart(obs.gradient, {f"net.{k}": g for k, g in expected.items()}) < 1e-5
    mean, var = obs.buffers["net.1"]
    torch.testing.assert_close(mean, local[1].running_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(var, local[1].running_var, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_parameters_that_got_no_gradient_may_be_none():
    net = dense(192, 16, 10)
    update = gradient(net, *ONE) | {"1.bias": None}
    obs = receive(net, update, image_shape=(3, 8, 8))
    assert not obs.gradient["net.1.bias"].any()


BAD_UPDATES = [
    (lambda g: list(g.values())[:-1], "is a list of 3, the model has 4 trainable parameters"),
    (lambda g: {k: v for k, v in g.items() if k != "1.bias"}, r"missing \['net.1.bias'\]"),
    (lambda g: g | {"other": g["1.bias"]}, r"unknown \['other'\]"),
    (lambda g: g | {"module.1.bias": g["1.bias"]}, "has 'net.1.bias' twice"),
    (lambda g: g | {"1.bias": "no"}, "'1.bias' of the update is str, not a tensor or an array"),
    (lambda g: g | {"1.bias": g["1.bias"][:3]}, "has shape .* the parameter has"),
    (lambda g: g | {"1.bias": g["1.bias"] * torch.nan}, "NaN or infinite"),
    (lambda g: g | {"1.bias": torch.complex(g["1.bias"], g["1.bias"])}, "is complex"),
    (lambda g: {}, "missing"),
    (lambda g: [], "is a list of 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_UPDATES)
def test_an_update_that_does_not_fit_is_refused(change, message):
    """P29 too: a part of a gradient."""
    net = dense(192, 16, 10)
    with pytest.raises(ValueError, match=message):
        receive(net, change(gradient(net, *ONE)), image_shape=(3, 8, 8))


def test_a_partial_gradient_is_received_where_the_rest_is_frozen():
    """P29."""
    net = dense(192, 16, 10)
    net[1].requires_grad_(False)
    theta = {k: p for k, p in net.named_parameters() if p.requires_grad}
    g = dict(zip(theta, torch.autograd.grad(F.cross_entropy(net(ONE[0]), ONE[1]), list(theta.values())), strict=True))
    obs = receive(net, g, image_shape=(3, 8, 8), batch_size=1)
    assert labels.infer(obs).tolist() == [3]


def test_an_observation_by_hand_is_refused():
    """P04: without a wrapper; with one it is no attacker's copy."""
    net = dense(192, 16, 10)
    for model in (net, models.wrap(net, num_classes=10)):
        g = dict(gradient(model, *ONE))
        with pytest.raises(ValueError, match="holds the attacker's copy of a wrapped model.*make it with observe, or"):
            Observation(gradient=g, model=model, client=Client(), image_shape=(3, 8, 8), batch_size=1, num_classes=10)


def test_a_train_mode_client_leaves_the_callers_model_alone_and_restarts_work():
    """P05."""
    net = with_norm().train()
    before = copy.deepcopy(net.state_dict())
    g = gradient(copy.deepcopy(net), *TWO)
    obs = receive(net, g, image_shape=(3, 8, 8), batch_size=2)
    InvertingGradients(steps=2, restarts=2)(obs, G())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert apart(obs.simulate(*TWO), obs.gradient) < 1e-6


# Models


class Aux(nn.Module):
    """A head that the forward pass leaves out."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(F.relu(self.body(x)).mean((2, 3)))


def test_parameters_that_the_pass_does_not_use_have_the_gradient_zero():
    """P07."""
    with pytest.warns(UserWarning, match=r"the forward pass does not use net\.aux\.weight, net\.aux\.bias.*is zero"):
        obs = observe(models.wrap(Aux(), num_classes=10), Batch(*ONE), rng=G())
    assert not obs.gradient["net.aux.weight"].any() and obs.gradient["net.fc.weight"].any()


Out = namedtuple("Out", "logits aux")


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(192, 10), nn.Linear(192, 10), kind

    def forward(self, x):
        a, b = self.a(x.flatten(1)), self.b(x.flatten(1))
        return {
            "namedtuple": Out(a, b),
            "dict": {"logits": a, "aux": b},
            "object": types.SimpleNamespace(logits=a),
            "tuple": (a, b),
            "sum": a.sum(),
        }[self.kind]


@pytest.mark.filterwarnings("ignore:the forward pass does not use")
@pytest.mark.parametrize("kind", ["namedtuple", "dict", "object"])
def test_the_logits_of_an_output_are_taken(kind):
    """P08: transformers' ModelOutput, torchvision's InceptionOutputs."""
    torch.manual_seed(0)
    net = Heads(kind)
    obs = observe(models.wrap(net, num_classes=10), Batch(*ONE), rng=G())
    expected = torch.autograd.grad(F.cross_entropy(net.a(ONE[0].flatten(1)), ONE[1]), [net.a.weight])[0]
    torch.testing.assert_close(obs.gradient["net.a.weight"], expected)


@pytest.mark.parametrize(("kind", "said"), [("tuple", "got tuple"), ("sum", r"got a tensor \[\]")])
def test_an_output_without_logits_is_refused(kind, said):
    with pytest.raises(ValueError, match=rf"the model must return logits \[1, 10\], {said}"):
        observe(models.wrap(Heads(kind), num_classes=10), Batch(*ONE), rng=G())


def test_weight_norm_works_after_a_forward_pass():
    """P09."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    net = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))
    net(ONE[0])
    obs = observe(models.wrap(net, num_classes=10), Batch(*ONE), rng=G())
    assert apart(obs.gradient, {f"net.{k}": g for k, g in gradient(net, *ONE).items()}) < 1e-6
    steps = observe(
        models.wrap(net, num_classes=10),
        Batch(*ONE),
        client=Client(steps=2, lr=0.1),
        threat=ThreatModel(knows_training_details=True),
        rng=G(),
    )
    rec = InvertingGradients(steps=3, restarts=2)(steps, G())
    assert rec.images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("where", ["root", "inside", "around the wrapper"])
@pytest.mark.parametrize("wrapper", ["compile", "parallel", "opacus"])
def test_wrappers_are_taken_off(wrapper, where):
    """P10, P11: torch.compile has no second derivative; Opacus counts its passes on the parameters."""
    from opacus import GradSampleModule

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))
    expected = gradient(net, *ONE)
    wrap = {
        "compile": lambda m: torch.compile(m, backend="aot_eager"),
        "parallel": nn.DataParallel,
        "opacus": GradSampleModule,
    }[wrapper]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if where == "root":
            model = models.wrap(wrap(net), num_classes=10)
        elif where == "inside":
            net = nn.Sequential(*list(net)[:3], wrap(nn.Sequential(*list(net)[3:])))
            model = models.wrap(net, num_classes=10)
        else:
            model = wrap(models.wrap(net, num_classes=10))
    obs = observe(model, Batch(*ONE), rng=G())
    assert [g.shape for g in obs.gradient.values()] == [g.shape for g in expected.values()]
    mine = dict(zip(expected, obs.gradient.values(), strict=True))
    assert apart(mine, expected) < 1e-6
    assert InvertingGradients(steps=3)(obs, G()).trace[-1] < 1


class Chopped(nn.Module):
    """An operation without a second derivative, in the function and not as a layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 10)

    def forward(self, x):
        return self.fc(F.hardsigmoid(self.conv(x)).flatten(1))


def test_hardsigmoid_is_written_out():
    """P13."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(144, 10))
    obs = observe(models.wrap(net, num_classes=10), Batch(*ONE), rng=G())
    assert apart(obs.gradient, {f"net.{k}": g for k, g in gradient(net, *ONE).items()}) < 1e-6
    assert InvertingGradients(steps=20)(obs, G()).trace[-1] < 0.9


def test_an_operation_without_a_second_derivative_is_named():
    """P13."""
    with pytest.raises(ValueError, match="can't be differentiated twice.*hardsigmoid_backward.*replace that operation"):
        observe(models.wrap(Chopped(), num_classes=10), Batch(*ONE), rng=G())


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.encode, self.fc = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.encode(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def test_a_transformer_in_the_readers_own_loop():
    """P14."""
    torch.manual_seed(0)
    batch = Batch(smooth(1, 3, 16, 16), torch.tensor([3]))
    obs = observe(models.wrap(Transformer(), num_classes=10).eval(), batch, rng=G())
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    g = obs.simulate(x, batch.labels)
    assert torch.autograd.grad(sum((g[n] - obs.gradient[n]).square().sum() for n in g), x)[0].any()


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 2.0), ("half", 0.5), ("mean", None)])
@pytest.mark.parametrize("size", [1, 2])
def test_another_scale_of_the_loss_is_noticed(reduction, scale, size):
    """P16: for one image, and for a batch with absent classes."""
    if reduction == "sum" and size == 1:
        scale = None
    net, x, y = sigmoid_net(), smooth(size, 1, 12, 12), torch.tensor([3, 5])[:size]

    def loss(logits, target):
        value = F.cross_entropy(logits, target, reduction="sum" if reduction == "sum" else "mean")
        return value / 2 if reduction == "half" else value

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        obs = receive(net, gradient(net, x, y, loss), image_shape=(1, 12, 12), batch_size=size)
    told = [str(w.message) for w in seen if "times a gradient of the mean cross-entropy" in str(w.message)]
    assert len(told) == (scale is not None)
    if scale is not None:
        assert labels.loss_scale(obs) == pytest.approx(scale, rel=0.05)
        client = Client(rule=loss_gradient.of(loss))
        told_so = receive(net, gradient(net, x, y, loss), image_shape=(1, 12, 12), batch_size=size, client=client)
        rec = DLG(steps=40)(told_so, G())
        assert metrics.psnr(rec.images[metrics.align(rec.images, x)], x).min() > 40


def test_a_model_that_ends_in_a_softmax_is_refused_by_the_label_rules():
    """P17."""
    model = models.wrap(sigmoid_net(tail=(nn.Softmax(1),)), num_classes=10)
    obs = observe(model, Batch(smooth(1, 1, 12, 12), torch.tensor([3])), rng=G())
    with pytest.raises(NotApplicableError, match="ends in a softmax, so that its outputs are probabilities"):
        labels.infer(obs)


def test_log_softmax_and_nll_are_the_cross_entropy():
    """P34."""
    model = models.wrap(sigmoid_net(tail=(nn.LogSoftmax(1),)), num_classes=10)
    for label in range(10):
        obs = observe(model, Batch(smooth(1, 1, 12, 12), torch.tensor([label])), rng=G())
        assert labels.infer(obs).tolist() == [label]


class HeadFirst(nn.Module):
    """The classifier is registered first; K wide is the hidden layer too."""

    def __init__(self):
        super().__init__()
        self.fc, self.body = nn.Linear(10, 10), nn.Linear(192, 10)

    def forward(self, x):
        return self.fc(F.relu(self.body(x.flatten(1))))


def test_the_layer_that_makes_the_logits_is_found_whatever_is_registered_first():
    """P19."""
    torch.manual_seed(0)
    model = models.wrap(HeadFirst(), num_classes=10)
    found = [labels.infer(observe(model, Batch(ONE[0], torch.tensor([c])), rng=G())).item() for c in range(10)]
    assert found == list(range(10))


def one_logit(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Sigmoid(), nn.Linear(width, 1))


@pytest.mark.parametrize("label", [0, 1])
def test_one_logit_is_two_classes(label):
    """P20: the logistic loss of one logit."""
    net = one_logit()
    y = torch.tensor([float(label)])
    g = gradient(net, ONE[0], y, lambda out, t: F.binary_cross_entropy_with_logits(out.squeeze(1), t))
    obs = receive(models.wrap(net, num_classes=2), g, image_shape=(3, 8, 8), batch_size=1)
    assert apart(obs.simulate(ONE[0], torch.tensor([label])), obs.gradient) < 1e-6
    assert labels.infer(obs).tolist() == [label]
    assert receive(net, g, image_shape=(3, 8, 8)).num_classes == 2


def test_one_class_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"num_classes, a whole number >= 2, got 1; a model with one logit has two"):
        models.wrap(one_logit(), num_classes=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_half_precision_is_searched_in_the_models_type(dtype, scale):
    """P21."""
    net = sigmoid_net(3, 8)
    g = {k: (v * scale).to(dtype) for k, v in gradient(net, *ONE).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the scale
        obs = receive(net, g, image_shape=(3, 8, 8), batch_size=1, labels=ONE[1])
    rec = InvertingGradients(steps=300, tv=0.0)(obs, G())
    assert rec.images.dtype == torch.float32 and metrics.psnr(rec.images, ONE[0]).item() > 25


def test_batch_norm_of_one_value_a_channel_is_refused_as_torch_refuses_it():
    """P23."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.raises(ValueError, match=r"needs more than one value a channel, got input \[1, 16\].*call \.eval\(\)"):
        observe(models.wrap(net, num_classes=10).train(), Batch(*ONE), rng=G())
    observe(models.wrap(net, num_classes=10).train(), Batch(*TWO), rng=G())
    with pytest.raises(ValueError, match="more than one value a channel"):
        client = Client(local_batch=1, steps=2)
        observe(models.wrap(net, num_classes=10).train(), Batch(*TWO), client=client, rng=G())


def test_a_jit_module_is_refused_by_name():
    """P24."""
    net = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10)))
    with pytest.raises(ValueError, match="net is a torch.jit module.*pass the Python module"):
        observe(models.wrap(net, num_classes=10), Batch(*ONE), rng=G())


def test_num_classes_must_be_the_number_of_logits():
    """P26."""
    for given in (10, 7, 1001):
        model = models.wrap(dense(192, 1000), num_classes=given)
        with pytest.raises(ValueError, match=rf"gives 1000 logits, and it was wrapped with num_classes={given}"):
            observe(model, Batch(ONE[0], torch.tensor([1])), rng=G())


@pytest.mark.filterwarnings("ignore:net.3 drops units")
def test_dropout_is_the_clients_alone_and_the_attacker_drops_nothing():
    """P27: the true image's gradient differs, by the client's masks alone."""
    torch.manual_seed(0)
    layers = nn.Linear(192, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)
    net = nn.Sequential(nn.Flatten(), *layers)
    model = models.wrap(net, num_classes=10)
    eval_mode = observe(model.eval(), Batch(*ONE), rng=G())
    one, two = (observe(model.train(), Batch(*ONE), rng=G()) for _ in range(2))
    assert apart(one.gradient, two.gradient) == 0
    assert apart(one.gradient, eval_mode.gradient) > 0.3
    assert apart(one.simulate(*ONE), eval_mode.gradient) < 1e-6
    assert model.training and net[3].training


def test_more_images_than_classes_are_counted_and_refused_by_the_rule_that_sees_no_repeats():
    """P28."""
    model = models.wrap(dense(192, 16, 10), num_classes=10)
    obs = observe(model, Batch(smooth(12, 3, 8, 8), torch.arange(12) % 10), rng=G())
    assert labels.infer(obs).tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(NotApplicableError, match="column_min finds no repeats, but 12 images of 10 classes must"):
        labels.column_min(obs)


@pytest.mark.parametrize("optimiser", [SGD(momentum=0.9), SGD(momentum=0.9, weight_decay=1e-3), Adam()], ids=str)
def test_clients_with_momentum_or_adam_are_simulated_exactly(optimiser):
    """P30: against torch's own optimiser, received as foreign."""
    net, lr = sigmoid_net(3, 8), 0.05
    local = copy.deepcopy(net)
    settings = {"momentum": 0.9, "weight_decay": getattr(optimiser, "weight_decay", 0)}
    kinds = {SGD: lambda p: torch.optim.SGD(p, lr=lr, **settings), Adam: lambda p: torch.optim.Adam(p, lr=lr)}
    torchs = kinds[type(optimiser)](local.parameters())
    for _ in range(3):
        torchs.zero_grad()
        F.cross_entropy(local(ONE[0]), ONE[1]).backward()
        torchs.step()
    before, after = net.state_dict(), local.state_dict()
    client = Client(steps=3, lr=lr, optimiser=optimiser)
    obs = receive(net, {k: (before[k] - after[k]) / lr for k in before}, image_shape=(3, 8, 8), client=client)
    assert apart(obs.simulate(*ONE), obs.gradient) < 1e-4


def test_tables_are_refused():
    """P31."""
    with pytest.raises(ValueError, match=r"float tensor \[B, C, H, W\]"):
        Batch(torch.rand(1, 14), torch.tensor([1]))


class Logging(nn.Module):
    """A hook that asks for a value."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(192, 10), []

    def forward(self, x):
        self.seen.append(x.mean().item())
        return self.fc(x.flatten(1))


@pytest.mark.filterwarnings("ignore:.*can't be stacked")
def test_a_model_that_asks_for_values_takes_restarts_one_by_one():
    """P32."""
    obs = observe(models.wrap(Logging(), num_classes=10), Batch(*ONE), rng=G())
    two, one = (InvertingGradients(steps=3, restarts=r)(obs, G()) for r in (2, 1))
    assert two.trace.shape == (3, 2)
    torch.testing.assert_close(two.trace[:, :1], one.trace)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 10)

    def forward(self, x):
        h = self.a(x)
        h += x
        return self.b(F.relu(h, inplace=True).flatten(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.again, self.b = self.a, nn.Linear(192, 10)

    def forward(self, x):
        return self.b(self.again(self.a(x).tanh()).flatten(1))


class TiedWeights(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(192, 192), nn.Linear(192, 192)
        self.b.weight, self.c = self.a.weight, nn.Linear(192, 10)

    def forward(self, x):
        return self.c(self.b(self.a(x.flatten(1)).tanh()).tanh())


class Frozen(nn.BatchNorm2d):
    """A batch norm of somebody's own: it is left as it is."""

    def forward(self, x):
        shape = (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) * self.weight.view(shape) + self.bias.view(shape)


def frozen_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))


def no_affine():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)
    )


def sync():
    return nn.SyncBatchNorm.convert_sync_batchnorm(with_norm())


def parametrized():
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))


@pytest.mark.parametrize("make", [InPlace, Tied, TiedWeights, frozen_norm, no_affine, sync, parametrized])
@pytest.mark.parametrize("steps", [1, 2])
def test_other_peoples_layers_have_the_gradient_of_autograd(make, steps):
    """P34, and FedAvg equal to torch.optim.SGD on the caller's own module."""
    torch.manual_seed(0)
    net = make().eval()
    client = Client(steps=steps, lr=0.1)
    obs = observe(models.wrap(net, num_classes=10), Batch(*ONE), client=client, rng=G())
    local = copy.deepcopy(net)
    sgd = torch.optim.SGD(local.parameters(), lr=0.1)
    for _ in range(steps):
        sgd.zero_grad()
        F.cross_entropy(local(ONE[0]), ONE[1]).backward()
        sgd.step()
    before = dict(net.named_parameters())
    expected = {f"net.{k}": (before[k] - p).detach() / 0.1 for k, p in local.named_parameters()}
    assert apart(obs.gradient, expected) < 1e-5


class Listed(nn.Module):
    """Reads a parameter from a plain list: functional_call does not replace it there."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(192, 10) / 14), nn.Parameter(torch.zeros(10))
        self.mine = [self.a]

    def forward(self, x):
        return x.flatten(1) @ self.mine[0] + self.b


def test_parameters_past_the_attributes_are_refused_by_name():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"the model reads net\.a past its attributes.*nn\.ParameterList"):
        observe(models.wrap(Listed(), num_classes=10), Batch(*ONE), rng=G())


class Choosy(nn.Module):
    """Looks at the class of its layers, and the copy's batch norm has another."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(192, 10)

    def forward(self, x):
        return self.fc((self.norm(x) if isinstance(self.norm, nn.BatchNorm2d) else -x).flatten(1))


def test_a_copy_that_is_another_function_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"computes other logits than the model itself.*its layers Choosy"):
        observe(models.wrap(Choosy(), num_classes=10), Batch(*ONE), rng=G())


def test_a_model_without_parameters_or_with_all_frozen_is_refused():
    empty = nn.Sequential(nn.Flatten())
    for net in (empty, dense(192, 10).requires_grad_(False)):
        with pytest.raises(ValueError, match="no trainable parameter"):
            observe(models.wrap(net, num_classes=192), Batch(*ONE), rng=G())


def test_images_that_the_model_can_not_take_are_said_so():
    with pytest.raises(ValueError, match=r"does not take images \[1, 3, 9, 9\]"):
        observe(models.wrap(dense(192, 10), num_classes=10), Batch(smooth(1, 3, 9, 9), torch.tensor([3])), rng=G())


BAD_WRAPS = [
    ({"std": float("nan")}, "finite std > 0"),
    ({"std": [0.1, 0.0]}, "finite std > 0"),
    ({"mean": float("inf")}, "finite mean"),
    ({"mean": "grey"}, "mean and std as numbers"),
    ({"num_classes": 2.5}, "num_classes, a whole number >= 2, got 2.5"),
    ({"num_classes": True}, "num_classes, a whole number"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_WRAPS)
def test_bad_wrappers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        models.wrap(dense(192, 10), **{"num_classes": 10} | settings)


def test_what_is_no_module_is_not_wrapped():
    with pytest.raises(ValueError, match=r"wrap needs a torch\.nn\.Module, got function"):
        models.wrap(lambda x: x, num_classes=10)


def test_the_copy_of_a_copy_is_a_copy():
    obs = observe(models.wrap(with_norm(), num_classes=10).train(), Batch(*TWO), rng=G())
    again = attackers_copy(obs.model, (3, 8, 8))
    assert apart(Client()(again, *TWO), obs.gradient) < 1e-7


# Models by another's name


@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [
        ("torchvision:resnet18", (3, 32, 32), 0.485),
        ("timm:resnet10t", (1, 32, 32), (0.485 + 0.456 + 0.406) / 3),
        ("tests_own_factory:make", (3, 8, 8), 0.0),
    ],
)
def test_models_of_libraries_and_factories_are_built_from_the_seed(name, shape, mean, monkeypatch):
    module = types.ModuleType("tests_own_factory")
    module.make = lambda num_classes, image_shape: nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    monkeypatch.setitem(sys.modules, "tests_own_factory", module)
    state = torch.get_rng_state()
    first, again, other = (models.build(name, num_classes=7, image_shape=shape, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and not first.training
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert first(torch.rand(2, *shape)).shape == (2, 7)
    assert first.mean.flatten()[0].item() == pytest.approx(mean, abs=1e-3)
    observe(first, Batch(torch.rand(1, *shape), torch.tensor([3])), rng=G())


BAD_NAMES = [
    ("torchvision:resnet19", "no classifier of torchvision is called 'resnet19'; did you mean 'resnet18'"),
    ("torchvision:resnet18", "takes 3 channels, the images have 1"),
    ("timm:resnet10", "no model of timm is called 'resnet10'"),
    ("nowhere:make", "there is no make in a module nowhere"),
    ("os:getcwd", r"os:getcwd\(7, \(1, 32, 32\)\) failed: TypeError"),
    ("builtins:print", "returned NoneType, not a torch.nn.Module"),
    ("a b:c", "names no model; write torchvision:NAME"),
    ("resnett", "no model is called 'resnett'"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES)
def test_bad_names_of_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, num_classes=7, image_shape=(1, 32, 32))


def test_a_dead_certificate_tells_the_bias_ratio_of_an_adam_client():
    """P30: the first step of Adam looks like a gradient, and is none."""
    net = dense(192, 16, 10)
    local = copy.deepcopy(net)
    adam = torch.optim.Adam(local.parameters(), lr=0.1)
    F.cross_entropy(local(ONE[0]), ONE[1]).backward()
    adam.step()
    before, after = net.state_dict(), local.state_dict()
    obs = receive(net, {k: (before[k] - after[k]) / 0.1 for k in before}, image_shape=(3, 8, 8), batch_size=1)
    with pytest.warns(UserWarning, match="the closed form does not hold here"):
        rec = BiasRatio()(obs, G())
    assert rec.notes["certified"] is False


def test_what_is_known_besides_is_passed_on():
    net = dense(192, 16, 10)
    obs = receive(net, gradient(net, *TWO), image_shape=(3, 8, 8), labels=torch.tensor([5, 3]), client=None)
    assert obs.labels.tolist() == [3, 5] and obs.batch_size == 2 and obs.client is None
    assert dataclasses.replace(obs, labels=None).batch_size == 2


class Inner(nn.Module):
    """A module whose own attribute has the name that a wrapper uses."""

    def __init__(self, attribute):
        super().__init__()
        setattr(self, attribute, dense(192, 16, 10))
        self.attribute = attribute

    def forward(self, x):
        return getattr(self, self.attribute)(x)


@pytest.mark.parametrize("attribute", ["net", "module", "_module"])
def test_the_callers_own_names_are_received_whatever_they_are(attribute):
    net, x, y = Inner(attribute), smooth(1, 3, 8, 8), torch.tensor([3])
    own = gradient(net, x, y)
    obs = receive(net, own, image_shape=(3, 8, 8))
    assert apart(obs.simulate(x, y), obs.gradient) < 1e-5
    with_prefix = {f"module.{name}": g for name, g in own.items()}
    assert apart(receive(net, with_prefix, image_shape=(3, 8, 8)).gradient, obs.gradient) == 0


def test_what_received_things_must_agree_in():
    net, x, y = dense(192, 16, 10), smooth(2, 3, 8, 8), torch.tensor([3, 1])
    own = gradient(net, x, y)
    with pytest.raises(ValueError, match="got 2 labels for a batch of 4"):
        receive(net, own, image_shape=(3, 8, 8), batch_size=4, labels=y)
    with pytest.raises(ValueError, match="an update is a mapping by name, a list, or a safetensors file, got NoneType"):
        receive(net, None, image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="bn_stats are of .'1'., and the batch norms of the model are"):
        receive(net, own, image_shape=(3, 8, 8), bn_stats={"1": (torch.zeros(1), torch.ones(1))})


def test_statistics_are_received_by_the_callers_names():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).eval()
    own = gradient(net, smooth(1, 3, 8, 8), torch.tensor([3]))
    obs = receive(net, own, image_shape=(3, 8, 8), bn_stats={"1": (torch.zeros(4), torch.ones(4))})
    assert list(obs.bn_stats) == ["net.1"]
    for wrong in ((torch.zeros(3), torch.ones(3)), (torch.zeros(4), torch.full((4,), torch.nan))):
        with pytest.raises(
            ValueError, match=r"bn_stats of 'net.1' must be a mean and a variance, tensors \[4\] of finite"
        ):
            receive(net, own, image_shape=(3, 8, 8), bn_stats={"1": wrong})


def test_timms_batch_norm_with_an_activation_is_a_batch_norm():
    pytest.importorskip("timm")
    model = models.build("timm:mobilenetv3_small_050", num_classes=10, image_shape=(3, 64, 64))
    threat = ThreatModel(knows_bn_stats=True, knows_buffers=True)
    obs = observe(model, Batch(torch.rand(2, 3, 64, 64), torch.tensor([1, 2])), threat=threat, rng=G())
    assert len(obs.bn_stats) == len(obs.buffers) == 34


def test_statistics_of_a_batch_norm_of_ones_own_are_refused_by_name():
    model = models.wrap(frozen_norm(), num_classes=10)
    batch = Batch(torch.rand(2, 3, 8, 8), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="the statistics of Frozen can't be read"):
        observe(model, batch, threat=ThreatModel(knows_bn_stats=True), rng=G())


def test_a_planted_model_keeps_the_modes_and_types_of_its_layers():
    norm = nn.BatchNorm2d(4).eval()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.5).eval(), nn.Flatten(), nn.Linear(144, 10).double())
    planted = models.with_front(models.wrap(net, num_classes=10), nn.Identity())
    assert [layer.training for layer in planted.net.back] == [True, False, False, True, True]
    assert planted.net.back[4].weight.dtype == torch.float64 and planted.net.back[0].weight.dtype == torch.float32


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)

    def forward(self, x):
        return self.head(F.dropout(self.norm(self.conv(x)), 0.5, self.training).flatten(1))


def test_a_function_that_drops_is_warned_of_and_leaves_the_global_generator(rng):
    model = models.wrap(FunctionalDropout().train(), num_classes=10)
    batch, before = Batch(torch.rand(2, 3, 8, 8), torch.tensor([1, 2])), torch.get_rng_state()
    with pytest.warns(UserWarning, match="draws random numbers in the mode that the model is in"):
        obs = observe(model, batch, threat=ThreatModel(knows_bn_stats=True, knows_labels=True), rng=rng)
    attack = GradInversion(steps=2, restarts=1)
    assert torch.equal(attack(obs, G()).images, attack(obs, G()).images)
    receive(model, obs.gradient, image_shape=(3, 8, 8), labels=batch.labels)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_nothing_is_not_warned_of(rng):
    model = models.wrap(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(192, 10)).train(), num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(model, Batch(torch.rand(1, 3, 8, 8), torch.tensor([1])), rng=rng)


def test_labels_of_ones_own_rule_serve_a_model_from_which_none_can_be_read(rng):
    net = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    obs = observe(models.wrap(net, num_classes=10), Batch(torch.rand(1, 3, 8, 8), torch.tensor([3])), rng=rng)
    with pytest.raises(NotApplicableError, match="no dense layer"):
        InvertingGradients(steps=2)(obs, rng)
    rec = InvertingGradients(steps=2, label_rule=lambda obs: torch.tensor([3]))(obs, rng)
    assert rec.labels.tolist() == [3]


@pytest.mark.filterwarnings("ignore:the closed form does not hold")
def test_labels_that_are_known_are_put_in_order_and_never_replaced():
    for seed in range(4):
        torch.manual_seed(seed)
        batch = Batch(torch.rand(4, 3, 8, 8), torch.randint(10, (4,)))
        obs = observe(
            models.wrap(dense(192, 16, 10), num_classes=10), batch, threat=ThreatModel(knows_labels=True), rng=G()
        )
        assert BiasRatio()(obs, G()).labels.sort().values.tolist() == obs.labels.tolist()


class Hooked(nn.Module):
    """Keeps what a layer has computed, as feature hooks do."""

    def __init__(self):
        super().__init__()
        self.dense, self.acts = nn.Linear(192, 10), {"list": []}

    def forward(self, x):
        h = self.dense(x.flatten(1))
        self.acts["list"] = [h]
        return h


def test_a_model_that_keeps_its_activations_is_copied(rng):
    net = Hooked()
    net(torch.rand(1, 3, 8, 8))
    observe(models.wrap(net, num_classes=10), Batch(torch.rand(1, 3, 8, 8), torch.tensor([1])), rng=rng)


def test_a_normalisation_of_other_channels_is_refused(rng):
    model = models.wrap(dense(64, 10), num_classes=10, mean=(0.1, 0.2, 0.3), std=1.0)
    with pytest.raises(ValueError, match="a mean of 3 channels and a std of 1, and the images have 1"):
        observe(model, Batch(torch.rand(1, 1, 8, 8), torch.tensor([1])), rng=rng)


def test_a_head_of_zeros_hides_no_parameters():
    net = nn.Sequential(Listed(), nn.Linear(10, 4))
    nn.init.zeros_(net[1].weight)
    with pytest.raises(ValueError, match="past its attributes"):
        attackers_copy(models.wrap(net, num_classes=4), (3, 8, 8))


def test_timm_models_that_take_no_size_are_built():
    pytest.importorskip("timm")
    models.build("timm:fastvit_t8", num_classes=10, image_shape=(3, 64, 64))
