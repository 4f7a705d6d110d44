"""Label rules against the private batch, brute force and exact identities."""

import itertools

import pytest
import torch
from torch import nn

from gi_lib import Batch, Client, ThreatModel, labels, models, observe
from gi_lib.federated import SGD, Adam
from gi_lib.labels.layer import descent, features, head
from gi_lib.types import NotApplicableError, WithheldError

K, SHAPE = 12, (1, 4, 4)


class Own:
    """Auxiliary data: random images whose brightness tells the class."""

    hash = "own"

    def __init__(self, classes=K):
        self.classes = classes

    def draw(self, n, rng):
        y = torch.randint(self.classes, (n,), generator=rng)
        return images_of(y, rng), y


def images_of(y, rng):
    return (torch.rand(len(y), *SHAPE, generator=rng) + y.view(-1, 1, 1, 1) / K) / 2


def network(activation=nn.ReLU, bias=True, seed=0, classes=K, width=64, mean=0.5):
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 64), activation(), nn.Linear(64, width), activation(), nn.Linear(width, classes)
    )
    if not bias:
        net[-1] = nn.Linear(width, classes, bias=False)
    rng = torch.Generator().manual_seed(seed)
    for layer in net:
        if isinstance(layer, nn.Linear):
            models.torch_default(layer, rng)
    return models.wrap(net, mean=mean, std=0.3, num_classes=classes).double()


def seen(y, rng, *, model=None, client=None, auxiliary=None, **facts):
    """The observation of a batch with labels y."""
    y = torch.as_tensor(y)
    batch = Batch(images_of(y, rng).double(), y)
    threat = ThreatModel(has_auxiliary_data=auxiliary is not None, **facts)
    return observe(model or network(), batch, client=client or Client(), threat=threat, auxiliary=auxiliary, rng=rng)


OWN_WEIGHTS = labels.ZeroShotWeights(inputs=labels.surrogate)
DISTINCT, REPEATED = [1, 4, 7, 9], [0, 0, 0, 1, 3, 3, 8]


def test_the_identity_holds_exactly_and_every_count_is_an_estimate_of_the_mean_softmax(rng):
    y = torch.tensor(REPEATED * 5)
    model, x = network(), images_of(y, rng).double()
    obs = observe(model, Batch(x, y), rng=rng)
    gW, gb = labels.last_layer(obs)
    h, p = features(obs, x)
    n = labels.counts(y, K)
    torch.testing.assert_close(len(y) * (p.mean(0) - gb), n.double(), rtol=0, atol=1e-12)
    onehot = nn.functional.one_hot(y, K).double()
    torch.testing.assert_close(gW, (p - onehot).T @ h / len(y), rtol=0, atol=1e-12)
    own = labels.ZeroShot(images=len(y), inputs=lambda obs, n, rng: x)
    torch.testing.assert_close(own.raw(obs), n.double(), rtol=0, atol=1e-12)
    assert torch.equal(labels.of_counts(n), y.sort().values)


def test_the_identity_holds_of_the_sum_of_local_steps(rng):
    """With the private images themselves only the way between the two ends is estimated."""
    y = torch.tensor(REPEATED * 2)
    x = images_of(y, rng).double()
    client = Client(steps=7, lr=1e-3, local_batch=2)
    obs = observe(network(), Batch(x, y), client=client, threat=ThreatModel(knows_training_details=True), rng=rng)
    raw = labels.ZeroShot(images=len(y), inputs=lambda obs, n, rng: x).raw(obs)
    torch.testing.assert_close(raw, labels.counts(y, K).double(), rtol=0, atol=0.02)


def test_apportion_is_the_nearest_of_all_whole_numbers_with_the_sum(rng):
    """Largest remainders minimise the squared distance; checked by trying all."""
    for total in (3, 5):
        for _ in range(20):
            raw = torch.rand(4, generator=rng, dtype=torch.float64)
            raw = raw / raw.sum() * total
            tried = [n for n in itertools.product(range(total + 1), repeat=4) if sum(n) == total]
            best = min(tried, key=lambda n: (torch.tensor(n) - raw).square().sum().item())
            assert labels.apportion(raw, total).tolist() == list(best)


@pytest.mark.parametrize(
    ("raw", "total", "expected"),
    [
        ([-3.0, 1.2, 4.9], 3, [0, 0, 3]),  # the sum of what is not negative is too large: taken from the smallest rests
        ([0.2, 0.1, 0.3], 7, [2, 2, 3]),  # more are missing than there are classes
        ([2.0, 1.0, 0.0], 3, [2, 1, 0]),
        ([1e30, -1e30, 3.0], 4, [4, 0, 0]),  # an absurd estimate: not one step for each image too many
    ],
)
def test_apportion_keeps_the_total(raw, total, expected):
    found = labels.apportion(torch.tensor(raw), total).tolist()
    assert sum(found) == total and found == expected


COUNTING = {
    "LLBG": labels.LLBG(),
    "zero-shot": labels.ZeroShot(),
    "zero-shot, own images": labels.ZeroShot(inputs=labels.surrogate),
    "iLRG": labels.ILRG(),
    "RLU": labels.RLU(),
}


@pytest.mark.parametrize("rule", COUNTING.values(), ids=COUNTING)
@pytest.mark.parametrize("y", [DISTINCT, REPEATED, [5] * 6, list(range(K))], ids=["distinct", "repeated", "one", "all"])
def test_rules_that_count_find_a_small_batch_of_an_untrained_network(rule, y, rng):
    obs = seen(y, rng, auxiliary=Own())
    assert rule(obs).tolist() == sorted(y)


@pytest.mark.parametrize("rule", [labels.LLGStar(), labels.LLGPlus()])
def test_llg_star_and_plus_count_but_for_the_spread_of_the_features(rule, rng):
    for y in (DISTINCT, REPEATED, [5] * 6, list(range(K))):
        n = labels.counts(rule(seen(y, rng, auxiliary=Own())), K)
        assert torch.minimum(n, labels.counts(torch.tensor(y), K)).sum() >= len(y) - 2


@pytest.mark.parametrize("rule", [labels.llg, labels.bias_greedy, labels.column_min, labels.ZeroShotWeights()])
def test_the_other_rules_find_labels_that_differ(rule, rng):
    assert rule(seen(DISTINCT, rng)).tolist() == DISTINCT


@pytest.mark.parametrize("name", labels.RULES)
def test_every_rule_returns_labels_in_order_and_changes_nothing(name, rng):
    size = 1 if name.startswith("iDLG") else 4
    obs = seen(DISTINCT[:size], rng, auxiliary=Own(), knows_labels=name == "known")
    before = {key: value.clone() for key, value in obs.model.state_dict().items()}
    global_state = torch.get_rng_state()
    found, again = labels.RULES[name](obs), labels.RULES[name](obs)
    assert found.dtype == torch.int64 and found.shape == (size,) and torch.equal(found, found.sort().values)
    assert torch.equal(found, again) and torch.equal(global_state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in obs.model.state_dict().items())


@pytest.mark.parametrize("name", labels.PRESENCE)
def test_presence_of_classes(name, rng):
    found = labels.PRESENCE[name](seen(REPEATED[3:], rng))
    assert found.dtype == torch.bool and found.nonzero().flatten().tolist() == [1, 3, 8]


def test_a_negative_bias_gradient_proves_a_class_whatever_the_network(rng):
    for seed in range(20):
        y = torch.randint(K, (40,), generator=rng)
        found = labels.negative_bias(seen(y, rng, model=network(nn.Tanh, seed=seed, mean=0.0)))
        assert not (found & (labels.counts(y, K) == 0)).any()


@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.SiLU, nn.Tanh])
def test_signed_features_break_the_column_minimum_and_not_the_bias(activation, rng):
    obs = seen(DISTINCT, rng, model=network(activation))
    assert labels.negative_column(obs).all()  # it says "all present"
    assert labels.negative_bias(obs).nonzero().flatten().tolist() == DISTINCT
    assert labels.rlg(obs).nonzero().flatten().tolist() == DISTINCT
    assert labels.ZeroShot()(obs).tolist() == DISTINCT


def test_greedy_is_the_loop_that_the_papers_write(rng):
    from gi_lib.labels.greedy import greedy

    for size in (2, 5, 9):
        score = torch.randn(5, generator=rng, dtype=torch.float64)
        impact = torch.tensor(-0.3, dtype=torch.float64)
        s, found = score.tolist(), []
        for k in sorted(range(5), key=lambda k: s[k]):
            if score[k] < 0 and len(found) < size:
                found.append(k)
                s[k] += 0.3
        while len(found) < size:
            k = min(range(5), key=lambda k: s[k])
            found.append(k)
            s[k] += 0.3
        assert greedy(score, impact, score < 0, size).tolist() == sorted(found)


def test_llg_plus_takes_the_gradients_of_batches_of_one_class(rng):
    """The impact and the offset in closed form are what gradients of the client's own code give."""
    obs = seen(REPEATED, rng, auxiliary=Own())
    x, y = Own().draw(20 * K, torch.Generator().manual_seed(0))
    name = next(key for key in obs.gradient if key.endswith("5.weight"))
    rows = torch.stack([obs.simulate(x[y == c].double(), y[y == c])[name].sum(1) for c in range(K)])
    m = (1 + 1 / K) * rows.diagonal().mean() / len(REPEATED)
    o = (rows.sum(0) - rows.diagonal()) / (K - 1)
    s = obs.gradient[name].sum(1)
    from gi_lib.labels.greedy import greedy

    assert torch.equal(labels.LLGPlus()(obs), greedy(s - o, m, s < 0, len(REPEATED)))


def test_ilrg_is_exact_where_its_approximations_are(rng):
    """One image of each class, drawn apart so far that each row's ratio is its own image's features."""
    obs = seen([5] * 4, rng, model=network(seed=3))
    x = images_of(torch.tensor([5]), rng).double()
    obs = observe(network(seed=3), Batch(x.repeat(4, 1, 1, 1), torch.tensor([5] * 4)), rng=rng)
    torch.testing.assert_close(labels.ILRG().raw(obs), 4.0 * torch.eye(K, dtype=torch.float64)[5], rtol=0, atol=1e-6)


def test_rlg_says_what_brute_force_over_combinations_says(rng):
    """With B = 2 the span is a plane: all its directions are tried, by angle."""
    for _ in range(5):
        U = torch.linalg.qr(torch.randn(6, 2, generator=rng, dtype=torch.float64)).Q
        U = U - U.mean(0)
        angle = torch.linspace(0, 2 * torch.pi, 20001, dtype=torch.float64)
        v = U @ torch.stack([angle.cos(), angle.sin()])  # [6, angles]
        lone = (v < -1e-3) & ((v < -1e-9).sum(0) == 1)
        assert torch.equal(labels.separable(U), lone.any(1))


def test_rlg_needs_the_rank_below_that_of_all_classes(rng):
    with pytest.raises(NotApplicableError, match=r"rank 11 with 12 classes.*use labels\.infer"):
        labels.rlg(seen(torch.arange(40) % K, rng))
    with pytest.raises(NotApplicableError, match="rank 3 with 12 classes and 3 features"):
        labels.rlg(seen(DISTINCT, rng, model=network(nn.Tanh, width=3)))


def test_rlu_and_own_images_count_with_a_trained_network_where_noise_does_not(rng):
    model = network()
    x, y = Own().draw(600, rng)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimiser.step()
    model.requires_grad_(True)
    wrong = dict.fromkeys(("zero-shot", "zero-shot, own images", "RLU"), 0)
    for _ in range(10):
        y = torch.randint(K, (12,), generator=rng)
        obs = seen(y, rng, model=model, auxiliary=Own())
        for name in wrong:
            n = labels.counts(labels.RULES[name](obs), K)
            wrong[name] += (n - labels.counts(y, K)).clamp(min=0).sum().item()
    assert wrong["RLU"] < wrong["zero-shot"] and wrong["zero-shot, own images"] < wrong["zero-shot"]


def test_several_local_epochs(rng):
    y = torch.tensor(REPEATED * 2)
    client = Client(steps=21, lr=0.01, local_batch=2)
    obs = seen(y, rng, client=client, auxiliary=Own(), knows_training_details=True)
    for name in ("RLU", "zero-shot", "zero-shot, own images", "LLBG"):
        assert labels.RULES[name](obs).tolist() == sorted(y.tolist()), name
    obs = seen(y, rng, client=client)
    with pytest.raises(WithheldError, match=r"ZeroShot must know how many steps.*knows_training_details=True"):
        labels.ZeroShot()(obs)


def test_soft_labels_and_the_last_features_of_one_image(rng):
    for target in (torch.full((K,), 0.1 / K), torch.zeros(K)):
        target = target.double()
        target[3], target[7] = target[3] + 0.6, 1 - target.sum() - 0.6 + target[7]
        loss = lambda u, y, t=target: -(t * u.log_softmax(1)).sum(1).mean()  # noqa: E731
        from gi_lib import loss_gradient

        obs = seen([3], rng, model=network(nn.Tanh), client=Client(rule=loss_gradient.of(loss)))
        found = labels.soft_label(obs)
        torch.testing.assert_close(found.label, target, rtol=0, atol=1e-10)
    rng = torch.Generator().manual_seed(5)
    obs = seen([3], rng)
    x = images_of(torch.tensor([3]), torch.Generator().manual_seed(5)).double()
    torch.testing.assert_close(labels.soft_label(obs).features, features(obs, x)[0][0], rtol=0, atol=1e-10)


def test_infer_takes_the_best_that_is_granted_and_says_which(rng):
    repeated = sorted(REPEATED)
    for facts, own, expected in (
        ({"knows_labels": True}, None, "known"),
        ({}, None, "bias greedy"),
        ({}, Own(), "RLU"),
    ):
        obs = seen(REPEATED, rng, auxiliary=own, **facts)
        assert (labels.chosen(obs), labels.infer(obs).tolist()) == (expected, repeated)
    assert labels.chosen(seen([4], rng)) == "iDLG"
    many = list(range(K)) * 2
    assert labels.chosen(seen(many, rng)) == "zero-shot"
    for y, own, expected in (
        (DISTINCT, None, "LLG"),
        (many, None, "zero-shot, weights"),
        (many, Own(), "zero-shot, weights, own images"),
    ):
        assert labels.chosen(seen(y, rng, model=network(bias=False), auxiliary=own)) == expected
    assert labels.chosen(seen(DISTINCT, rng, client=Client(steps=2))) == "column minimum"


def test_one_logit_stands_for_two_classes(rng):
    y = torch.tensor([0, 0, 1, 0])
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    obs = seen(y, rng, model=models.wrap(net, num_classes=2).double())
    W, b = head(obs)
    assert W.shape == (2, 8) and not W[0].any() and not b[0]
    assert labels.ZeroShot()(obs).tolist() == [0, 0, 0, 1]


def test_what_rules_need(rng):
    bare, full = seen(DISTINCT, rng, model=network(bias=False)), seen(DISTINCT, rng)
    for rule, instead in (
        (labels.bias_greedy, r"labels\.llg"),
        (labels.LLBG(), r"labels\.LLGStar\(\)"),
        (labels.ZeroShot(), r"labels\.ZeroShotWeights\(\)"),
        (labels.ILRG(), r"labels\.ZeroShotWeights\(\)"),
        (labels.RLU(), r"labels\.ZeroShotWeights"),
        (labels.negative_bias, r"labels\.negative_column"),
    ):
        with pytest.raises(NotApplicableError, match=rf"reads the bias of the last layer, which has none.*{instead}"):
            rule(bare)
    for rule in (labels.LLGPlus(), labels.RLU(), labels.ZeroShot(inputs=labels.surrogate), OWN_WEIGHTS):
        with pytest.raises(WithheldError, match="needs auxiliary data; observe with"):
            rule(full)
    with pytest.raises(NotApplicableError, match=r"of 240 there are none of class 10, 11; draw more"):
        labels.RLU()(seen(DISTINCT, rng, auxiliary=Own(classes=10)))
    with pytest.raises(NotApplicableError, match="row_sum infers one label from one image, got batch_size=4"):
        labels.row_sum(full)
    with pytest.raises(NotApplicableError, match="soft_label infers one label from one image"):
        labels.soft_label(full)
    with pytest.raises(NotApplicableError, match="soft_label takes the scale of the features from the bias"):
        labels.soft_label(seen([3], rng, model=network(bias=False)))
    with pytest.raises(NotApplicableError, match="the labels are not known"):
        labels.known(full)
    negative = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(), nn.Hardtanh(-2, -1), nn.Linear(8, K))
    with pytest.raises(NotApplicableError, match="impact of one image does not come out negative.*ZeroShot"):
        labels.LLGStar()(seen(DISTINCT, rng, model=models.wrap(negative, num_classes=K).double()))
    hidden = seen(DISTINCT, rng, knows_batch_size=False)
    for name in set(labels.RULES) - {"known"}:
        with pytest.raises(WithheldError, match="needs the batch size"):
            labels.RULES[name](hidden)
    with pytest.raises(WithheldError, match="needs the batch size"):
        labels.infer(hidden)


@pytest.mark.parametrize("optimiser", [Adam(), SGD(momentum=0.9), SGD(weight_decay=0.1)])
def test_counts_need_a_sum_of_gradients(optimiser, rng):
    obs = seen(DISTINCT, rng, client=Client(steps=2, lr=0.1, optimiser=optimiser), knows_training_details=True)
    with pytest.raises(NotApplicableError, match=r"bias_greedy reads a sum of gradients, and the client's optimiser"):
        labels.infer(obs)
    plain = seen(DISTINCT, rng, client=Client(steps=2, lr=0.1), knows_training_details=True)
    assert descent(plain, "x").steps == 2 and descent(plain, "x").lr == 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: labels.ZeroShot(images=0),
        lambda: labels.ZeroShotWeights(images=-1),
        lambda: labels.RLU(ridge=-1.0),
        lambda: labels.LLGStar(seed=-1),
        lambda: labels.LLGPlus(images=0),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(ValueError, match="needs"):
        make()


def test_a_new_rule_for_batches_leaves_records_of_one_image_valid(monkeypatch):
    from gi_lib import bench
    from gi_lib.attacks import InvertingGradients

    one, two = (bench.Case(InvertingGradients(), "lenet", "digits", tuple(range(n))) for n in (1, 2))
    told = bench.Case(InvertingGradients(), "lenet", "digits", (0, 1), threat=ThreatModel(knows_labels=True))
    before = [bench.key(case) for case in (one, two, told)]
    monkeypatch.setattr(labels, "batch_revision", labels.batch_revision + 1)
    same = [bench.key(case) == key for case, key in zip((one, two, told), before, strict=True)]
    assert same == [True, False, True]


def test_auxiliary_data_of_other_classes_are_refused_by_name_and_not_counted_with(rng):
    obs = seen(REPEATED, rng, auxiliary=Own(K + 3))
    with pytest.raises(NotApplicableError, match=f"images of the model's {K} classes, and there is one of class"):
        labels.RULES["RLU"](obs)
    without = seen(REPEATED, torch.Generator().manual_seed(0))
    assert labels.chosen(obs) == labels.chosen(without) != "RLU"
    assert labels.infer(obs).shape == (len(REPEATED),)
