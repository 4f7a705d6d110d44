"""Studies: keys, resuming, failures, interruptions, and the same numbers from every executor."""

import dataclasses
import errno
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch

from gi_lib import Client, NotApplicableError, ThreatModel, bench, checkpoints, data, metrics, results
from gi_lib.attacks import DLG, GradInversion, InvertingGradients, RobbingTheFed
from gi_lib.bench import Case, cost, key, run, text
from gi_lib.bench.cases import identity
from gi_lib.defenses import DPSGD, Defense, GaussianNoise
from gi_lib.matching import squared_l2
from gi_lib.types import Reconstruction

TINY = Case(InvertingGradients(steps=3), "lenet", "digits", (0,), profile="smoke")
CASES = [dataclasses.replace(TINY, indices=(i,)) for i in range(4)]
SCORES = ("psnr", "ssim", "mse", "loss", "label_accuracy", "data_hash", "floor", "identified", "restart_losses")


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    """LPIPS takes seconds and may ask the network; the test that needs it brings its own."""
    monkeypatch.setattr(metrics, "lpips", lambda *args, **kwargs: None)


@pytest.mark.parametrize(("seconds", "passes"), [(0.1, 11), (2.0, 3), (60.0, 1)])
def test_a_long_training_step_is_measured_fewer_times(monkeypatch, seconds, passes):
    times = itertools.count(0, seconds)  # the clock is read at each end of a pass
    calls = []
    monkeypatch.setattr(cost, "clock", lambda device: next(times))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model.register_forward_hook(lambda *_: calls.append(1))
    step = cost.training_step_seconds(model, data.load("digits", size=8).batch([0]), "cpu")
    assert (step, len(calls)) == (pytest.approx(seconds), passes)


def scores(rows):
    return [{name: row[name] for name in SCORES} for row in rows]


def test_a_record_says_everything(tmp_path):
    (row,) = run([dataclasses.replace(TINY, indices=(0, 1))], tmp_path / "s.jsonl", device="cpu")
    assert row == results.rows(tmp_path / "s.jsonl")[0]
    assert row == results.checked(row) and list(row) == list(results.Record.__annotations__)
    assert (row["status"], row["error"], row["attack"]) == ("ok", None, "inverting_gradients")
    assert (row["indices"], row["batch_size"], len(row["psnr"])) == ([0, 1], 2, 2)
    assert (row["steps"], row["restarts"], row["gradient_evaluations"]) == (3, 1, 4)
    assert (row["threat"], row["threat_letter"], row["client"]) == ("ThreatModel()", "A", "FedSGD")
    assert row["training_steps"] == row["cpu_seconds"] / row["training_step_seconds"] > 0
    assert (row["train"], row["clients"], row["rounds"], row["auxiliary"]) == (False, 1, 1, None)
    assert (row["returned"], row["chance"]) == (2, 1 / 500)
    images = data.load("digits").batch([0, 1]).images
    assert row["floor"] == pytest.approx(metrics.floor(images).tolist())
    assert row["restart_losses"] == [row["loss"]]
    assert row["versions"]["torch"] == torch.__version__
    assert row["lpips"] is None and row["device"].endswith("1 thread") and row["budget"] == 3
    truth, images = results.read_picture(results.picture_path(tmp_path / "s.jsonl", row["key"]), 2)
    stored = metrics.psnr(images, truth)
    assert torch.allclose(stored, torch.tensor(row["psnr"], dtype=torch.float64), atol=0.1)


def test_a_record_scores_the_run_at_its_snapshots(tmp_path):
    attack = InvertingGradients(steps=100, restarts=2)
    (row,) = run([dataclasses.replace(TINY, attack=attack)], tmp_path / "s.jsonl", device="cpu")
    curve = row["curve"]
    numbers = curve["evaluations"]
    assert 7 <= len(numbers) <= 10 and numbers == sorted(numbers) and numbers[-1] == row["gradient_evaluations"]
    ratios = [b / a for a, b in itertools.pairwise(numbers[3:])]
    assert all(1.4 < ratio < 2.1 for ratio in ratios)  # geometric
    assert curve["seconds"] == sorted(curve["seconds"]) and curve["seconds"][-1] <= row["cpu_seconds"] + 1e-3
    assert curve["psnr"][-1] == pytest.approx(row["psnr"]) and curve["identified"][-1] == row["identified"]
    assert curve["psnr"][0][0] < curve["psnr"][-1][0]
    first = results.first_identified(row)
    assert first is None or first["evaluations"] in numbers


def test_snapshots_change_no_result_and_no_key(tmp_path):
    shown = dataclasses.replace(TINY, attack=dataclasses.replace(TINY.attack, frames=40))
    assert key(shown) == key(TINY) == key(dataclasses.replace(TINY, profile="survey"))
    plain = bench.attempt(TINY, None, "cpu")[0]
    assert scores([bench.attempt(shown, None, "cpu")[0]]) == scores([plain])


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    first = run(CASES[:2], out)
    ran = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda case, *rest: ran.append(case) or measure(case, *rest))
    rows = run([*CASES[1:3], *CASES[:1], CASES[2]], out)
    assert ran == [CASES[2]]
    assert [row["key"] for row in rows] == [key(CASES[i]) for i in (1, 2, 0)]
    assert rows[2] == first[0]
    assert len(out.read_text().splitlines()) == 3


@dataclasses.dataclass(frozen=True)
class Stops:
    """An attack that raises where the label is `at`."""

    at: int
    error: type[BaseException]

    def __call__(self, obs, rng):
        if int(obs.labels[0]) == self.at:
            raise self.error("stopped")
        return InvertingGradients(steps=1)(obs, rng)


def stopping(error):
    """Four cases; the third, and no other, raises."""
    threat = ThreatModel(knows_labels=True)
    labels = data.load("digits").batch(range(4)).labels.tolist()
    assert labels.count(labels[2]) == 1
    return [Case(Stops(labels[2], error), "lenet", "digits", (i,), threat=threat, profile="smoke") for i in range(4)]


def test_a_failure_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    rows = run(stopping(FloatingPointError), out)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    assert (rows[2]["error"], rows[2]["psnr"]) == ("FloatingPointError: stopped", None)
    assert rows[2]["attack"] == "Stops"
    assert rows[2]["seconds"] > 0 and rows[2]["cpu_seconds"] > 0
    assert not results.picture_path(out, rows[2]["key"]).exists()
    summary = results.summarise(results.read(out), by=["attack"])
    assert (summary["ok"][0], summary["n"][0]) == (3, 4)
    monkeypatch.setattr(Stops, "__call__", lambda self, obs, rng: InvertingGradients(steps=1)(obs, rng))
    assert [row["status"] for row in run(stopping(FloatingPointError), out)] == ["ok"] * 4
    assert len(out.read_text().splitlines()) == 4  # of each case the last


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    cases = stopping(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(cases, out)
    before = results.rows(out)
    assert [row["key"] for row in before] == [key(case) for case in cases[:2]]
    monkeypatch.setattr(Stops, "__call__", lambda self, obs, rng: InvertingGradients(steps=1)(obs, rng))
    after = run(cases, out)
    assert [row["status"] for row in after] == ["ok"] * 4
    assert after[:2] == before


def test_a_full_disk_stops_with_what_is_done(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    run(CASES[:1], out)

    def full(path, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(results, "append", full)
        with pytest.raises(OSError, match=r"1 of 4 cases are done and kept; make room") as raised:
            run(CASES, out)
    assert raised.value.errno == errno.ENOSPC
    assert len(results.rows(out)) == 1
    assert len(run(CASES, out)) == 4


def test_a_worker_s_full_disk_is_not_a_failed_case(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data, "load", full)
    with pytest.raises(OSError, match="No space left"):
        bench.measure(TINY, None, "cpu")


def test_a_folder_that_can_not_be_written_is_not_a_full_disk(tmp_path, monkeypatch):
    def refused(path, record):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(results, "append", refused)
    with pytest.raises(OSError, match=r"0 of 1 cases are done and kept; see to it that the folder can be written"):
        run([TINY], tmp_path / "s.jsonl")


def test_processes_give_the_same_records(tmp_path):
    serial = run(CASES[:3], tmp_path / "serial.jsonl")
    with bench.pool(2) as executor:
        stacked = run(CASES[:3], tmp_path / "pool.jsonl", executor=executor)
    assert scores(stacked) == scores(serial)
    assert {row["device"].rpartition(", ")[2] for row in stacked} == {"1 thread"}
    for row in serial:
        pictures = [results.picture_path(tmp_path / name, row["key"]) for name in ("serial.jsonl", "pool.jsonl")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (BrokenProcessPool("died"), RuntimeError, "worker processes could not start, or died.*fewer workers"),
        (pickle.PicklingError("no such module"), ValueError, "can't be sent to a worker.*beside the study"),
    ],
)
def test_a_broken_executor_says_what_to_do(tmp_path, error, kind, message):
    class Broken:
        def submit(self, function, case, *rest):
            future = Future()
            if case == CASES[0]:
                future.set_result(function(case, *rest))
            else:
                future.set_exception(error)
            return future

    with pytest.raises(kind, match=message):
        run(CASES, tmp_path / "s.jsonl", executor=Broken())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_record(tmp_path, threads):
    """InvertingGradients takes signs, so that a single rounding would show."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = dataclasses.replace(TINY, model="mlp", attack=InvertingGradients(steps=20))
        (row,) = run([case], tmp_path / "s.jsonl")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    try:
        alone = bench.attempt(case, None, "cpu")[0]
    finally:
        torch.set_num_threads(before)
    assert scores([row]) == scores([alone])


@dataclasses.dataclass(frozen=True)
class Listening(Defense):
    """Keeps the seed of the client's generator."""

    def on_update(self, gradient, sent, rng):
        SEEDS["client"] = rng.initial_seed()
        return gradient


@dataclasses.dataclass(frozen=True)
class Plain:
    """An attack in closed form, which reports no losses and no evaluations, and keeps its generator's seed."""

    def __call__(self, obs, rng):
        SEEDS["attack"] = rng.initial_seed()
        images = torch.full((obs.batch_size, *obs.image_shape), 0.5)
        return Reconstruction(images, torch.zeros(obs.batch_size, dtype=torch.int64), math.nan)


SEEDS = {}


def test_model_attack_and_client_draw_from_different_streams(tmp_path):
    case = dataclasses.replace(TINY, attack=Plain(), defense=Listening(), seed=7)
    assert run([case], tmp_path / "s.jsonl")[0]["status"] == "ok"
    assert SEEDS == {"attack": 7 + bench.ATTACK_STREAM, "client": 7 + bench.CLIENT_STREAM}
    assert len({0, bench.ATTACK_STREAM, bench.CLIENT_STREAM, bench.SERVER_STREAM}) == 4


def test_an_attack_without_steps_has_a_record(tmp_path):
    row = run([dataclasses.replace(TINY, attack=Plain())], tmp_path / "s.jsonl")[0]
    assert (row["status"], row["steps"], row["restart_losses"], row["loss"]) == ("ok", 0, None, None)
    assert row["evaluation_training_steps"] is None and row["training_steps"] > 0


def test_a_seed_gives_the_same_scores_and_another_seed_others(tmp_path):
    first, second = (run([TINY], tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert scores(first) == scores(second)
    third = run([dataclasses.replace(TINY, seed=1)], tmp_path / "a.jsonl")
    assert third[0]["psnr"] != first[0]["psnr"]


def test_the_key_is_the_same_in_another_process_and_names_no_address():
    code = "from tests.test_bench import TINY, key, text; print(key(TINY)); print(text(TINY))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "GI_DATA": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [key(TINY), text(TINY)]
    assert "0x" not in text(TINY)
    assert text(TINY) == "Case(attack=inverting_gradients(steps=3)#1, model='lenet', dataset='digits', indices=[0])"
    assert len(key(TINY)) == 12
    other = dataclasses.replace(TINY, attack=InvertingGradients(steps=3, distance=squared_l2))
    assert "distance=gi_lib.matching.squared_l2" in text(other)


@dataclasses.dataclass(frozen=True)
class Mine(DLG):
    """An attack of a user's own."""


def test_an_attack_of_somebodys_own_has_no_key_of_ours():
    theirs = dataclasses.make_dataclass("DLG", [("steps", int, 300)], frozen=True, namespace={"__call__": DLG.__call__})
    assert text(DLG()) == "dlg()#3" and text(Mine()) == f"{__name__}.Mine()#3"
    keys = {key(dataclasses.replace(TINY, attack=attack)) for attack in (DLG(), Mine(), theirs())}
    assert len(keys) == 3


@pytest.mark.parametrize("module", ["optimise", "metrics", "labels", "federated"])
def test_a_revision_makes_the_cases_run_again(module, monkeypatch):
    before = key(TINY), key(dataclasses.replace(TINY, threat=ThreatModel(knows_labels=True)))
    monkeypatch.setattr(f"gi_lib.{module}.revision", 2)
    after = key(TINY), key(dataclasses.replace(TINY, threat=ThreatModel(knows_labels=True)))
    assert after[0] != before[0]
    assert (after[1] != before[1]) == (module != "labels")  # which are known


def test_a_revision_of_attack_or_model_makes_its_cases_run_again(monkeypatch):
    before = key(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(InvertingGradients, "revision", 2)
        assert key(TINY) != before
    lenet = dataclasses.replace(bench.cases.models.MODELS["lenet"], revision=2)
    monkeypatch.setitem(bench.cases.models.MODELS, "lenet", lenet)
    assert key(TINY) != before


CHANGES = {
    "attack": {"attack": InvertingGradients(steps=3, distance=squared_l2)},
    "model": {"model": "mlp"},
    "dataset": {"dataset": "photos"},
    "indices": {"indices": (1,)},
    "seed": {"seed": 1},
    "weights": {"weights": "lenet_digits@0123abcd"},
    "size": {"size": 16},
    "split": {"split": "train"},
    "threat": {"threat": ThreatModel(knows_labels=True)},
    "client": {"client": Client(steps=2)},
    "defense": {"defense": GaussianNoise()},
    "train": {"train": True},
    "clients": {"indices": (0, 1), "clients": 2},
    "rounds": {"rounds": 2, "threat": ThreatModel(many_rounds=True)},
    "auxiliary": {"auxiliary": "digits", "threat": ThreatModel(has_auxiliary_data=True)},
    "double": {"double": True},
}


def test_the_identity_of_a_case_outlives_its_revision(monkeypatch):
    before = key(TINY), identity(TINY)
    monkeypatch.setattr(InvertingGradients, "revision", 2)
    assert key(TINY) != before[0] and identity(TINY) == before[1]


def test_a_float_of_numpy_is_a_float():
    assert text(DLG(lr=np.float64(0.5))) == text(DLG(lr=0.5))


def test_every_field_that_does_not_only_display_changes_the_key():
    assert CHANGES.keys() | {"profile", "stage"} == {field.name for field in dataclasses.fields(Case)}
    cases = [dataclasses.replace(TINY, **change) for change in CHANGES.values()]
    assert len({key(case) for case in [TINY, *cases]}) == len(cases) + 1
    assert key(dataclasses.replace(TINY, indices=(0, 1))) != key(dataclasses.replace(TINY, **CHANGES["clients"]))


def test_brief_text_leaves_defaults_out():
    assert text(DLG(restarts=8), brief=True) == "DLG(restarts=8)"
    assert text(DPSGD(noise=0.5), brief=True) == "DPSGD(noise=0.5)"


def test_a_lambda_has_no_text():
    with pytest.raises(ValueError, match="no stable text.*named function"):
        key(dataclasses.replace(TINY, attack=InvertingGradients(distance=lambda a, b: 0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lenett"}, "no model is called 'lenett'; did you mean 'lenet'"),
        ({"dataset": "digit"}, "no dataset is called 'digit'; did you mean 'digits'"),
        ({"profile": "quik"}, "did you mean 'quick'"),
        ({"weights": "cifar10_resnet"}, "did you mean 'cifar10_resnet"),
        ({"weights": "cifar10_resnet20"}, "belong to 'resnet20', not to 'lenet'"),
        ({"indices": ()}, "at least one index"),
        ({"indices": [0]}, "at least one index, in a tuple"),
        ({"indices": (-1,)}, "whole numbers >= 0"),
        ({"indices": (0.5,)}, "whole numbers >= 0"),
        ({"seed": -1}, "Case needs seed, a whole number >= 0"),
        ({"clients": 2}, "2 clients can't share 1 images"),
        ({"rounds": 2}, "the threat model says many_rounds=False, and the case says otherwise"),
        ({"auxiliary": "digits"}, "the threat model says has_auxiliary_data=False"),
        ({"auxiliary": "digit"}, "did you mean 'digits'"),
        ({"weights": "mine@xyz"}, "'mine@xyz' names no checkpoint; write name@hash"),
        ({"attack": DLG}, "needs an attack with its settings, such as DLG"),
        ({"attack": "dlg"}, "needs an attack with its settings"),
        ({"client": "fedavg"}, "needs a ThreatModel and a Client"),
        ({"model": "torchvision:"}, "names no model"),
    ],
)
def test_a_case_checks_its_names(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_weights_for_other_images_are_a_failure_with_its_reason(tmp_path):
    case = dataclasses.replace(TINY, model="resnet20", weights="cifar10_resnet20")
    (row,) = run([case], tmp_path / "s.jsonl")
    assert row["status"] == "failed"
    assert "expects images (3, 32, 32) of 10 classes, 'digits' has (1, 8, 8) of 10" in row["error"]


def test_a_data_root_that_is_not_there_fails_before_any_case(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        run([TINY], tmp_path / "s.jsonl", root=tmp_path / "nowhere")
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(tmp_path, device):
    with pytest.raises(ValueError, match=f"the device '{device}' can't be used"):
        run([TINY], tmp_path / "s.jsonl", device=device)


def test_score_fills_in_lpips_from_the_pictures(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    run(CASES[:2], out)
    assert bench.score(out) == (0, 2)
    monkeypatch.setattr(metrics, "lpips", lambda a, b, root=None, download=False: metrics.mse(a, b) * 2)
    assert bench.score(out) == (2, 0)
    rows = results.rows(out)
    assert len(rows) == 2
    for row in rows:
        assert row["lpips"][0] == pytest.approx(2 * row["mse"][0], rel=0.05)
    assert bench.score(out) == (0, 0)


# What a case may be


def row_of(tmp_path, **change):
    (row,) = run([dataclasses.replace(TINY, **change)], tmp_path / "s.jsonl")
    return row


def test_a_case_of_several_clients_and_of_train_mode(tmp_path):
    setting = {"model": "resnet20", "indices": (0, 1, 2, 3), "clients": 2, "train": True}
    row = row_of(tmp_path, **setting, threat=ThreatModel(knows_training_details=True))
    assert (row["status"], row["clients"], row["train"], row["returned"]) == ("ok", 2, True, 4)
    assert row_of(tmp_path, **setting)["status"] == "not applicable"  # how many images each has is a detail


@dataclasses.dataclass(frozen=True)
class Looks:
    """Keeps the observation."""

    def __call__(self, obs, rng):
        SEEN.append(obs)
        return Plain()(obs, rng)


SEEN = []


def test_a_case_of_several_rounds(tmp_path):
    """The server moves the model by the rate times the update in between."""
    client = Client(steps=2, lr=0.1)
    threat = ThreatModel(many_rounds=True, knows_training_details=True)
    row = row_of(tmp_path, attack=Looks(), rounds=3, client=client, threat=threat)
    obs = SEEN.pop()
    assert row["status"] == "ok" and len(obs.earlier) == 2 and row["rounds"] == 3
    first, second = obs.earlier
    for name, p in second.model.named_parameters():
        torch.testing.assert_close(p, dict(first.model.named_parameters())[name] - 0.1 * first.gradient[name])
    assert (obs.model.net[0].weight != second.model.net[0].weight).any()


def test_a_case_with_auxiliary_data(tmp_path):
    """They are of the train split, and so never what is attacked."""
    row_of(tmp_path, attack=Looks(), auxiliary="digits", threat=ThreatModel(has_auxiliary_data=True))
    auxiliary = SEEN.pop().auxiliary
    images, labels = auxiliary.draw(5, torch.Generator().manual_seed(0))
    assert images.shape == (5, 1, 8, 8) and labels.shape == (5,) and len(auxiliary.hash) == 12
    train = data.load("digits", split="train").batch(range(1200)).images
    assert all((train == image).flatten(1).all(1).any() for image in images)


def test_a_case_of_a_malicious_server(tmp_path):
    threat = ThreatModel(malicious_server=True, has_auxiliary_data=True)
    attack = RobbingTheFed(bins=64, surrogates=1000)
    row = row_of(tmp_path, attack=attack, indices=tuple(range(8)), threat=threat, auxiliary="digits", double=True)
    assert row["status"] == "ok" and row["threat_letter"] == "G" and row["returned"] <= 8
    exact = [value for value in row["psnr"] if value is not None and value > 100]
    assert len(exact) >= 4 and row["recall"] == row["image_precision"] * row["returned"] / 8
    assert row["psnr"].count(None) == 8 - row["returned"]
    assert row["label_accuracy"] == (1.0 if row["returned"] == 8 else None)
    denied = row_of(tmp_path, attack=attack, threat=ThreatModel(malicious_server=True))
    assert denied["status"] == "failed" and "give it auxiliary data" in denied["error"]


def test_a_case_of_trained_weights_of_our_own(tmp_path, monkeypatch):
    model = bench.network(TINY, data.load("digits"), None)
    with torch.no_grad():
        model.net[0].weight.fill_(0.25)
    reference = checkpoints.save("lenet_digits", model.state_dict(), tmp_path)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    trained = bench.network(dataclasses.replace(TINY, weights=reference), data.load("digits"), None)
    assert (trained.net[0].weight == 0.25).all()
    row = row_of(tmp_path, weights=reference)
    assert (row["status"], row["weights"]) == ("ok", reference)
    wrong = row_of(tmp_path, weights=reference, model="mlp")
    assert wrong["status"] == "failed" and "holds another network than mlp on digits" in wrong["error"]


def test_a_case_of_somebody_elses_model(tmp_path):
    row = row_of(tmp_path, model="torchvision:squeezenet1_1", dataset="photos", attack=InvertingGradients(steps=1))
    assert row["status"] == "not applicable" and "makes the logits" in row["error"]
    known = ThreatModel(knows_labels=True)
    row = row_of(
        tmp_path, model="torchvision:squeezenet1_1", dataset="photos", attack=InvertingGradients(steps=1), threat=known
    )
    assert (row["status"], row["model"]) == ("ok", "torchvision:squeezenet1_1")


# What an attack may do wrong


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@dataclasses.dataclass(frozen=True)
class Wrong:
    """An attack that does one thing wrong."""

    how: str

    def __call__(self, obs, rng):
        images = torch.full((obs.batch_size, *obs.image_shape), 0.5)
        y = torch.zeros(obs.batch_size, dtype=torch.int64)
        if self.how == "float":
            return 0.5
        if self.how == "tensor for a float":
            return Reconstruction(images, y, torch.tensor(0.5))
        if self.how == "NaN":
            return Reconstruction(images * math.nan, y, 0.0)
        if self.how == "range":
            return Reconstruction(images * 3, y, 0.0)
        if self.how == "too many":
            return Reconstruction(images.repeat(2, 1, 1, 1), None, 0.0)
        if self.how == "other size":
            return Reconstruction(images[..., 1:], y, 0.0)
        if self.how == "labels":
            return Reconstruction(images, y.float(), 0.0)
        if self.how == "evaluations":
            return Reconstruction(images, y, 0.0, gradient_evaluations=torch.tensor(5))
        raise {
            "surrogate": ValueError("bad name \udcff"),
            "exit": SystemExit(3),
            "OSError": OSError(errno.ENOSPC, "No space left on device"),
            "unspeakable": Unspeakable(),
            "not applicable": NotApplicableError("not to this"),
        }[self.how]


WRONG = {
    "float": "an attack must return a Reconstruction, got float",
    "tensor for a float": "the loss must be a number, got torch.float32",
    "NaN": "NaN or infinite pixels",
    "range": r"images in \[0, 1\], got 1.5 to 1.5; clamp them",
    "too many": "returned 2 images, and may return 1: the best of many guesses flatters",
    "other size": r"returned images \[1, 8, 7\], the private ones are \[1, 8, 8\]",
    "labels": r"labels must be int64 \[1\]",
    "evaluations": "gradient_evaluations: Input should be a valid integer",
    "surrogate": "bad name ",
    "exit": "SystemExit: 3",
    "OSError": "OSError: .*No space left",
    "unspeakable": "Unspeakable, whose text can't be had",
    "not applicable": "not to this",
}


@pytest.mark.parametrize("how", WRONG)
def test_what_an_attack_does_wrong_is_a_failed_row_with_a_sentence(tmp_path, how):
    cases = [TINY, dataclasses.replace(TINY, attack=Wrong(how)), CASES[1]]
    first, wrong, last = run(cases, tmp_path / "s.jsonl")
    assert (first["status"], last["status"]) == ("ok", "ok")
    assert wrong["status"] == ("not applicable" if how == "not applicable" else "failed")
    assert re.search(WRONG[how], wrong["error"])


def test_what_an_attack_lacks_is_said(tmp_path):
    row = row_of(tmp_path, attack=GradInversion(steps=2, restarts=1))
    assert row["status"] == "not applicable" and "the model has no batch norm" in row["error"]
    row = row_of(tmp_path, attack=GradInversion(steps=2, restarts=1), model="convnet", dataset="photos")
    assert row["status"] == "not applicable" and "GradInversion needs the batch-norm statistics" in row["error"]
    assert row["seconds"] is None and row["cpu_seconds"] is None


@dataclasses.dataclass(frozen=True)
class Conceal(Defense):
    """Trains on an image beside the private one."""

    def on_batch(self, images, labels, rng):
        return torch.cat([images, 1 - images]), torch.cat([labels, (labels + 1) % 10])


def test_a_defense_may_add_images_to_the_batch(tmp_path):
    row = row_of(tmp_path, defense=Conceal())
    assert (row["status"], row["batch_size"], row["returned"], len(row["psnr"])) == ("ok", 1, 2, 1)
