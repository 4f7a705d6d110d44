"""An audit: what it finds where the answer is known, what it refuses, and what it writes."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from gi_lib import Batch, Client, Reconstruction, data, evaluate, models, observe
from gi_lib.attacks import BiasRatio, GradInversion, RobbingTheFed
from gi_lib.audit import ANSWERS, Audit, Finding, audit, write, write_failure
from gi_lib.audit.facts import picture_uri, public_images, rank
from gi_lib.defenses import DPSGD, GaussianNoise
from gi_lib.federated import granted

SHAPE = (3, 8, 8)


def own(first="conv", seed=0):
    """A network that the project does not have; with the profile of a first layer."""
    front = {
        "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 5)),
        "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 5)),
        "wide": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 5)),
        "few": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)),
        "norm": lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.wrap(front[first](), num_classes=5)


def asked(report):
    return {finding.question.partition("?")[0]: finding for finding in report.findings}


@pytest.fixture(scope="module")
def dense():
    return audit(own("dense"), SHAPE, name="mine", steps=3)


def test_a_dense_first_layer_is_exposed_by_its_closed_form(dense):
    found = asked(dense)["Does a formula give the images"]
    assert found.answer == "leaks" and found.numbers["recovered"] == found.numbers["images"] == 2
    assert found.numbers["chance"] == 1 / 28 and min(found.numbers["above_floor"]) > 60
    assert dense.headline.startswith("Exposed: images come back")
    assert ("first layer", "Linear, with bias") in [fact[:2] for fact in dense.facts]
    assert len(found.pictures) == 2 and found.pictures[0][0].startswith("simulated client 1: private above, rebuilt")


def test_labels_counts_and_a_malicious_server(dense):
    found = asked(dense)
    labels = found["Which classes are in the batch"]
    assert (labels.answer, labels.numbers["found"]) == ("leaks", 2) and 0 < labels.numbers["chance"] < 0.5
    count = found["Does the update determine the images"]
    assert (count.answer, count.numbers["rank"]) == ("determined nearby", 192)
    planted = found["What does a server get that changes the model"]
    assert planted.answer == "leaks" and "(G)" in planted.attacker
    assert "a server that changes the model gets images" in dense.headline


def test_a_client_asks_whether_the_model_looks_planted(dense, rng):
    found = asked(dense)["Does the model look planted"]
    assert found.answer == "no sign" and "on 1 image, too few" in found.sure
    planted, _ = RobbingTheFed(bins=16, surrogates=40).plant(own("dense"), SHAPE, public_images(SHAPE, "train"), rng)
    report = audit(planted, SHAPE, batch_size=8, clients=1, steps=2)
    found = asked(report)["Does the model look planted"]
    assert found.answer == "refuse it" and "rows measure the same" in found.evidence
    assert report.headline.endswith("the model itself looks planted.") and "rows measure the same" in report.page()


def test_a_recorded_update_is_certified_without_its_images(tmp_path):
    model = own("dense")
    private = Batch(torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([3]))
    sent = Client()(model, private.images, private.labels)
    save_file({name: g.detach() for name, g in sent.items()}, tmp_path / "round.safetensors")
    report = audit(model, SHAPE, update=tmp_path / "round.safetensors", steps=3)
    found = asked(report)
    assert found["Does a formula give the images"].sure.startswith("certain")
    labels = found["Which classes are in the batch"]
    assert labels.numbers["proven"] == [3] and labels.sure.startswith("certain")
    assert "recorded update: the search ended at a matching loss" in found["Does a search find the images"].evidence
    assert [caption for caption, _ in found["Does a formula give the images"].pictures][0] == "recorded update: rebuilt"


def test_what_does_not_apply_is_said_and_nothing_is_called_safe():
    report = audit(own("conv"), SHAPE, steps=2, clients=1)
    untried = dict(report.untried)
    assert "this model begins with Conv2d" in untried["closed form (bias ratio)"]
    formula = asked(report)["Does a formula give the images"]
    assert "R-GAP" in formula.question and formula.answer in ("leaks", "not found")
    assert {what for what, _, _ in report.facts} >= {"rank analysis"}
    assert "learned inversion" in untried
    searches = [f for f in report.findings if f.question.startswith("Does a search")]
    assert ["iDLG" in f.question for f in searches] == [True, False]  # it is smooth
    assert all(f.answer != "not found" or f.sure.startswith("not established") for f in searches)
    assert "safe" not in report.page()


def test_fewer_equations_than_pixels_are_said():
    report = audit(own("few"), SHAPE, steps=2, clients=1)
    count = asked(report)["Does the update determine the images"]
    assert (count.answer, count.numbers["equations"], count.numbers["unknowns"]) == ("too few", 65, 192)
    assert "counted: a prior must supply" in count.sure


def test_batch_norm_brings_its_attack_and_its_mode_is_told():
    report = audit(own("norm").train(), SHAPE, steps=2, clients=1, batch_size=2)
    facts = {what: value for what, value, _ in report.facts}
    assert facts["batch norm"] == "1 layers, 1 in train mode" and facts["batch"] == "2 images"
    told = [f.attacker for f in report.findings if "GradInversion" in f.question]
    assert told == ["an attacker with the update, the model, the batch size and the batch's batch-norm statistics (E)"]


def test_statistics_that_come_back_are_told():
    """In train mode they are the batch's, and a search gets them; in eval mode nothing of the batch is in them."""
    report = audit(own("norm").train(), SHAPE, steps=2, clients=2, batch_size=2)
    found = asked(report)["Do the running statistics that come back tell the batch's"]
    assert found.answer == "leaks" and found.numbers["numbers"] == 8 and found.numbers["apart"] < 1e-4
    assert found.change.startswith("Batch norm: keep the running statistics") and found.change in report.advice
    assert found.attacker.endswith("the running statistics that come back (E)")
    assert "the batch's statistics leak" in report.headline
    assert any("(batch-norm update)" in f.question for f in report.findings)
    calm = audit(own("norm").eval(), SHAPE, steps=2, clients=1)
    assert "in train mode" in dict(calm.untried)["what the returned statistics tell"]
    assert not any(f.numbers.get("kind") == "statistics" for f in calm.findings)


def test_a_recorded_update_of_the_whole_state_tells_its_batchs_statistics():
    model, x = own("norm").train(), torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    sent, labels = Client()(model, x, torch.tensor([1, 3])), torch.tensor([1, 3])
    before = {name: v.clone() for name, v in model.state_dict().items() if "running" in name}
    with torch.no_grad():
        model(x)
    moved = {name: v - model.state_dict()[name] for name, v in before.items()}
    model.load_state_dict(model.state_dict() | before)
    update = {name: g.detach() for name, g in sent.items()}
    settings = {"labels": labels, "steps": 2, "clients": 1}
    whole = audit(model, SHAPE, update=update | moved, **settings)
    found = asked(whole)["Do the running statistics that come back tell the batch's"]
    assert found.answer == "leaks" and "not of every update" not in found.evidence
    part = asked(audit(model, SHAPE, update=update, **settings))
    said = part["Do the running statistics that come back tell the batch's"].evidence
    assert "the running statistics of the recorded batch are not given" in said


def test_a_search_that_refuses_costs_no_report():
    """The returned statistics of local batches tell nothing without their order, which the attack says when it runs."""
    client = Client(steps=4, lr=0.01, local_batch=2)
    for budget in ({"steps": 2}, {"budget": 20.0}):
        report = audit(own("norm").train(), SHAPE, clients=1, batch_size=4, client=client, **budget)
        assert "which image enters which step" in " ".join(reason for _, reason in report.untried)
        assert any("(SME)" in f.question for f in report.findings)


def test_an_update_that_refuses_hides_nothing_of_the_others():
    model, rng = own("wide"), torch.Generator().manual_seed(3)
    x, y = torch.rand(2, *SHAPE, generator=rng), torch.tensor([1, 3])
    noisy = {name: g + 10 * g.std() * torch.randn(g.shape, generator=rng) for name, g in Client()(model, x, y).items()}
    noisy = {name: g.detach() for name, g in noisy.items()}
    report = audit(model, SHAPE, update=noisy, labels=y, batch_size=2, steps=2, clients=1)
    spear = next(f for f in report.findings if "(SPEAR)" in f.question)
    assert spear.answer == "leaks" and "closed form (SPEAR) on the recorded update" in dict(report.untried)


def test_local_steps_are_a_training_detail():
    report = audit(own("dense"), SHAPE, steps=2, clients=1, client=Client(steps=2, lr=0.1))
    formula = asked(report)["Does a formula give the images"]
    assert formula.answer == "leaks" and formula.attacker.endswith("the client's training details (C)")
    assert "rank of the equations" in dict(report.untried)


def test_local_steps_bring_their_attacks():
    """SME for all of them, and copies of the epochs where these have several batches."""
    whole = audit(own("conv"), SHAPE, steps=2, clients=1, batch_size=2, client=Client(steps=2, lr=0.1))
    asks = [f.question for f in whole.findings]
    assert any("(SME)" in q for q in asks) and not any("(copies of epochs)" in q for q in asks)
    batches = Client(steps=4, lr=0.1, local_batch=1, shuffle=True)
    told = audit(own("conv"), SHAPE, steps=2, clients=1, batch_size=2, client=batches).findings
    copies = next(f for f in told if "(copies of epochs)" in f.question)
    assert copies.answer != "not tried" and copies.attacker.endswith("the client's training details (C)")


def test_local_steps_that_are_no_whole_epochs_are_simulated_without_copies():
    client = Client(steps=3, lr=0.1, local_batch=1)
    report = audit(own("conv"), SHAPE, steps=2, clients=1, batch_size=2, client=client)
    assert "no whole number of epochs" in dict(report.untried)["copies of epochs on the simulated client 1"]
    assert any("(Inverting Gradients)" in f.question for f in report.findings)


def test_a_defense_is_of_the_clients_and_nobody_is_told():
    report = audit(own("dense"), SHAPE, steps=2, defense=DPSGD(clip=0.01, noise=5.0))
    assert asked(report)["Does a formula give the images"].answer == "not found"
    slight = audit(own("dense"), SHAPE, steps=2, defense=GaussianNoise(1e-9))
    assert asked(slight)["Does a formula give the images"].answer == "leaks"


def test_attacks_see_no_truth(monkeypatch):
    """Whatever the private images are, what attacks are given is an Observation without them."""
    seen = []
    call = BiasRatio.__call__
    monkeypatch.setattr(BiasRatio, "__call__", lambda self, obs, rng: seen.append(obs) or call(self, obs, rng))
    audit(own("dense"), SHAPE, steps=1)
    held = [v for obs in seen for v in vars(obs).values() if isinstance(v, Batch)]
    assert len(seen) == 2 and held == [] and all(obs.labels is None and obs.auxiliary is None for obs in seen)


def test_a_server_never_holds_the_private_images(monkeypatch):
    given, plant = [], RobbingTheFed.plant
    monkeypatch.setattr(
        RobbingTheFed, "plant", lambda self, m, s, aux, rng: given.append(aux) or plant(self, m, s, aux, rng)
    )
    for channels in (3, 2):
        private = Batch(torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4))
        net = models.wrap(nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 5)), num_classes=5)
        audit(net, (channels, 8, 8), images=private, steps=1)
    assert given and not any(
        torch.equal(image, own_image) for aux in given for image in aux.images for own_image in private.images
    )


def test_what_is_not_there_or_does_not_fit_is_refused_before_the_budget_is_spent(tmp_path):
    pair = Batch(torch.rand(4, 3, 9, 9), torch.arange(4))
    with pytest.raises(ValueError, match="give image_shape, or resize"):
        audit(own("dense"), SHAPE, images=pair, steps=1)
    with pytest.raises(ValueError, match="give the update too"):
        audit(own("dense"), SHAPE, labels=torch.tensor([1]), steps=1)
    with pytest.raises(ValueError, match="an audit needs steps"):
        audit(own("dense"), SHAPE, steps=0)
    with pytest.raises(ValueError, match="name the page"):
        write(tmp_path / "report.json", "", {})


def test_the_same_audit_gives_the_same_numbers(dense):
    again = audit(own("dense"), SHAPE, name="mine", steps=3)
    numbers = [[{**f.numbers, "spent": None} for f in report.findings] for report in (dense, again)]
    assert numbers[0] == numbers[1]


def test_the_least_budget_is_said_and_a_budget_is_kept_to():
    with pytest.raises(ValueError, match=r"a budget of 1e-06 s is too small for any search: .* give at least \d+ s"):
        audit(own("conv"), SHAPE, budget=1e-6)
    report = audit(own("conv"), SHAPE, budget=4.0, clients=1)
    assert any("steps on each update" in f.numbers.get("spent", "") for f in report.findings)
    assert float(report.made["time"].split()[0]) < 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "a budget in seconds, a finite number > 0"),
        ({"clients": 0}, "clients, a whole number >= 1"),
        ({"batch_size": 29}, "a batch of 29 needs as many images, and there are 28"),
        ({"update": {"net.0.weight": torch.zeros(2)}}, "the update does not fit the model: missing"),
        ({"update": "nowhere.safetensors"}, "nowhere.safetensors is not a readable safetensors file"),
    ],
)
def test_bad_input_is_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        audit(own("conv"), SHAPE, steps=1, **settings)


def test_channels_without_public_images_need_an_update():
    model = models.wrap(nn.Sequential(nn.Flatten(), nn.Linear(128, 5)), num_classes=5)
    with pytest.raises(ValueError, match="no images of 2 channels are embedded; give a recorded"):
        audit(model, (2, 8, 8), steps=1)
    x = torch.rand(1, 2, 8, 8)
    report = audit(model, (2, 8, 8), steps=1, update=Client()(model, x, torch.tensor([1])))
    assert asked(report)["Does a formula give the images"].sure.startswith("certain")
    assert "simulated clients" in dict(report.untried)


def test_rank_against_the_whole_jacobian():
    model, batch = own("few"), Batch(torch.rand(1, *SHAPE), torch.tensor([1]))

    def g(x):
        parameters = [p.double() for p in model.parameters()]
        loss = nn.functional.cross_entropy(
            nn.functional.linear(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1), *parameters), batch.labels
        )
        return torch.cat([v.flatten() for v in torch.autograd.grad(loss, parameters, create_graph=True)])

    jacobian = torch.autograd.functional.jacobian(g, batch.images.double()).reshape(65, -1)
    assert rank(model, batch, seconds=60) == torch.linalg.matrix_rank(jacobian) == 12
    assert rank(own("conv"), batch, seconds=0) is None


def test_public_images_take_any_shape():
    assert public_images((1, 9, 14)).images.shape == (28, 1, 9, 14)
    assert public_images((2, 8, 8)) is None
    test, train = public_images(SHAPE), public_images(SHAPE, split="train")
    assert test.hash != train.hash and test.images.equal(data.load("photos", size=8).batch(range(28)).images)


def test_the_least_threat_model():
    assert granted(BiasRatio()).letter == "A" and granted(BiasRatio(), details=True).letter == "C"
    assert granted(RobbingTheFed()).letter == "G" and granted(GradInversion()).letter == "E"


def page_of(answer):
    finding = Finding(
        "Q <b>?", answer, "sure", "evidence", "A", {"kind": "images"}, (("a 'quoted' caption", "data:x"),)
    )
    return Audit("my<net>", (("what", "value", "means"),), (finding,), (("x", "why"),), ("care & more",), {"seed": "0"})


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_page_asks_nobody_and_escapes_what_it_is_given(answer):
    page = page_of(answer).page()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page) and "url(" not in page and "<script" not in page
    assert "my&lt;net&gt;" in page and "Q &lt;b&gt;?" in page and "a &#x27;quoted&#x27; caption" in page
    assert "care &amp; more" in page
    assert page.startswith("<!doctype html>") and 'name="viewport"' in page and "color-scheme" in page
    assert page.count("<h1>") == 1 and "<h1" not in page_of(answer)._repr_html_()


def found(answer, kind="images", change="", pictures=(), **numbers):
    return Finding(kind, answer, "sure", "evidence", "A", {"kind": kind} | numbers, pictures, change)


def test_the_first_screen_says_what_leaks_how_sure_that_is_and_what_to_change():
    picture = (("a caption", "data:y"), ("another", "data:z"))
    report = Audit(
        "net",
        (),
        (
            found("leaks", "labels", "Labels: less."),
            found("leaks", change="Server: less.", pictures=(("the server's", "data:x"),), malicious=True),
            found("leaks in part", change="Search: less.", pictures=picture),
            found("not found", change="Nothing: more."),
        ),
        (),
        (),
        {},
    )
    assert report.answer == "leaks in part" and report.shown == (("images a caption", "data:y"),)
    assert report.advice[:3] == ("Labels: less.", "Server: less.", "Search: less.") and "DP-SGD" in report.advice[3]
    assert report.as_dict()["what_to_change"] == list(report.advice)
    top = report.page().partition("What leaks, and how")[0].partition("<p class='gi-said")[2]
    assert top.startswith(" gi-part'>Exposed in part") and "data:y" in top and "data:z" not in top
    assert re.findall("<b>(.*?)</b>", top) == ["leaks", "leaks", "leaks in part", "not found"]
    assert re.findall("<li>(.*?)</li>", top) == list(report.advice)
    blind = dataclasses.replace(report, findings=report.findings[3:])
    assert (blind.answer, blind.shown, blind.advice[0]) == ("not found", (), "Nothing: more.")
    half = dataclasses.replace(report, findings=(report.findings[1], report.findings[3]))
    assert half.answer == "not found" and half.advice[:2] == ("Server: less.", "Nothing: more.")
    assert dataclasses.replace(report, findings=()).answer == "not tried"


def test_every_finding_that_can_leak_says_what_to_change(dense):
    assert all(f.change for f in dense.findings if f.numbers["kind"] != "count")
    assert dense.advice[1].startswith("First layer") and dense.advice[2].startswith("The server")
    ((caption, uri),), (first, *_) = dense.shown, asked(dense)["Does a formula give the images"].pictures
    assert (caption, uri) == (f"Does a formula give the images? (bias ratio) {first[0]}", first[1])


def test_a_picture_keeps_private_and_rebuilt_apart():
    uri = picture_uri([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)])
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    pixels = torch.from_numpy(np.array(image.convert("L")))
    assert pixels.unique().tolist() == [0, 128, 255]
    assert (pixels[[0, 5, 6, 11]] == 128).all() and (pixels[1:5, 1:5] == 0).all() and (pixels[7:11, 7:11] == 255).all()


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    report = page_of("leaks")
    beside = write(tmp_path / "deep" / "r.html", report.page(), report.as_dict())
    assert json.loads(beside.read_text(encoding="utf-8"))["headline"].startswith("Exposed")
    before = (tmp_path / "deep" / "r.html").read_bytes()
    with pytest.raises(TypeError):
        write(tmp_path / "deep" / "r.html", "other", {"not for JSON": object()})
    assert (tmp_path / "deep" / "r.html").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["r.html", "r.json"]
    (tmp_path / "deep" / "s.json").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "deep" / "s.html", "a page", {})
    assert not (tmp_path / "deep" / "s.html").exists()


def test_a_failure_is_written_where_no_report_of_an_earlier_audit_is(tmp_path):
    page = tmp_path / "r.html"
    assert write_failure(page, "net", "because") and "The audit did not run." in page.read_text(encoding="utf-8")
    assert write_failure(page, "net", "again") and "again" in page.read_text(encoding="utf-8")
    report = page_of("leaks")
    write(page, report.page(), report.as_dict())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert not write_failure(page, "net", "because")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    page.with_suffix(".json").unlink()
    assert not write_failure(page, "net", "because")


def test_what_an_attack_returns_that_is_no_image_fails_that_attack_alone(monkeypatch):
    broken = Reconstruction(torch.zeros(1, 3, 4, 4), None, 0.0)
    monkeypatch.setattr(BiasRatio, "__call__", lambda self, obs, rng: broken)
    found = asked(audit(own("dense"), SHAPE, steps=1, clients=1))
    formula = found["Does a formula give the images"]
    assert formula.answer == "not tried" and "of one size" in formula.evidence
    assert "0 of 1 images" in found["Does a search find the images"].evidence


def test_a_batch_through_a_dense_layer_is_unmixed():
    report = audit(own("wide"), SHAPE, steps=1, clients=1, batch_size=4)
    [formula] = [f for f in report.findings if "(SPEAR)" in f.question]
    assert "4 of 4 images" in formula.evidence and min(formula.numbers["above_floor"]) > 60


def test_an_audit_scores_as_a_study_does(dense):
    """One judge: what the report says of an image, metrics.evaluate says."""
    public = public_images(SHAPE)
    batch = public.batch(torch.randperm(28, generator=torch.Generator().manual_seed(0))[:1], 5)
    obs = observe(own("dense"), batch, rng=torch.Generator().manual_seed(0))
    rec = BiasRatio()(obs, torch.Generator().manual_seed(0))
    scores = evaluate(rec, batch, candidates=public.images)
    found = asked(dense)["Does a formula give the images"]
    assert found.numbers["above_floor"][0] == pytest.approx((scores.psnr - scores.floor).item())
    assert scores.identified.tolist() == [True] and found.numbers["identified"] == 2


def test_chance_counts_the_pictures_that_came_back():
    report = audit(own("dense"), SHAPE, steps=1, clients=2, batch_size=4)
    planted = asked(report)["What does a server get that changes the model"]
    search = asked(report)["Does a search find the images"]
    assert search.numbers["chance"] == 4 / 28
    assert 0 < planted.numbers["chance"] <= 1 and planted.numbers["chance"] * 28 * 2 == pytest.approx(
        round(planted.numbers["chance"] * 28 * 2)
    )
