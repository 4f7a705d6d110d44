"""Studies: keys, resuming, failures, interruptions, and the same numbers from every executor."""

import dataclasses
import errno
import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from gi_lib import FedAvg, ThreatModel, bench, metrics, results
from gi_lib.attacks import DLG, InvertingGradients
from gi_lib.bench import Case, key, run, text
from gi_lib.defenses import Defense, GaussianNoise
from gi_lib.matching import squared_l2
from gi_lib.types import Reconstruction

TINY = Case(InvertingGradients(steps=3), "lenet", "digits", (0,), profile="smoke")
CASES = [dataclasses.replace(TINY, indices=(i,)) for i in range(4)]
SCORES = ("psnr", "ssim", "mse", "loss", "label_accuracy", "data_hash")


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    """LPIPS takes seconds and may ask the network; the test that needs it brings its own."""
    monkeypatch.setattr(metrics, "lpips", lambda *args, **kwargs: None)


def scores(rows):
    return [{name: row[name] for name in SCORES} for row in rows]


def test_a_record_says_everything(tmp_path):
    (row,) = run([dataclasses.replace(TINY, indices=(0, 1))], tmp_path / "s.jsonl", device="cpu")
    assert row == results.rows(tmp_path / "s.jsonl")[0]
    assert list(row) == list(results.Record.__annotations__)
    assert (row["status"], row["error"], row["attack"]) == ("ok", None, "inverting_gradients")
    assert (row["indices"], row["batch_size"], len(row["psnr"])) == ([0, 1], 2, 2)
    assert (row["steps"], row["restarts"], row["gradient_evaluations"]) == (3, 1, 4)
    assert (row["threat"], row["threat_letter"], row["update"]) == ("ThreatModel()", "A", "fedsgd")
    assert row["training_steps"] == row["seconds"] / row["training_step_seconds"] > 0
    assert row["versions"]["torch"] == torch.__version__
    assert row["lpips"] is None
    truth, images = results.read_picture(results.picture_path(tmp_path / "s.jsonl", row["key"]), 2)
    stored = metrics.psnr(images, truth)
    assert torch.allclose(stored, torch.tensor(row["psnr"], dtype=torch.float64), atol=0.1)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    first = run(CASES[:2], out)
    ran = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda cases, *rest: ran.extend(cases) or measure(cases, *rest))
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
    labels = bench.data.load("digits").batch(range(4)).labels.tolist()
    assert labels.count(labels[2]) == 1
    return [Case(Stops(labels[2], error), "lenet", "digits", (i,), threat=threat, profile="smoke") for i in range(4)]


def test_a_failure_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    rows = run(stopping(FloatingPointError), out)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    assert (rows[2]["error"], rows[2]["psnr"]) == ("FloatingPointError: stopped", None)
    assert rows[2]["attack"] == "Stops"
    assert not results.picture_path(out, rows[2]["key"]).exists()
    summary = results.summarise(results.read(out), by=["attack"])
    assert (summary["ok"][0], summary["n"][0]) == (3, 4)
    monkeypatch.setattr(Stops, "__call__", lambda self, obs, rng: InvertingGradients(steps=1)(obs, rng))
    assert [row["status"] for row in run(stopping(FloatingPointError), out)] == ["ok"] * 4
    assert len(out.read_text().splitlines()) == 5


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
        with pytest.raises(OSError, match=r"1 of 4 cases are done and kept. Make room") as raised:
            run(CASES, out)
    assert raised.value.errno == errno.ENOSPC
    assert len(results.rows(out)) == 1
    assert len(run(CASES, out)) == 4


def test_a_worker_s_full_disk_is_not_a_failed_case(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bench.data, "load", full)
    with pytest.raises(OSError, match="No space left"):
        bench.measure([TINY], None, "cpu")


def test_cases_that_run_together_give_the_same_records(tmp_path):
    cases = [*CASES, dataclasses.replace(TINY, seed=1), dataclasses.replace(TINY, indices=(0, 1))]
    assert [len(group) for group in bench.groups(cases, 3)] == [3, 1, 1, 1]
    alone = run(cases, tmp_path / "alone.jsonl")
    stacked = run(cases, tmp_path / "stacked.jsonl", together=3)
    assert [row["together"] for row in stacked] == [3, 3, 3, 1, 1, 1]
    assert [row["key"] for row in stacked] == [row["key"] for row in alone]
    for one, other in zip(alone, stacked, strict=True):
        assert one["data_hash"] == other["data_hash"] and one["gradient_evaluations"] == other["gradient_evaluations"]
        assert other["psnr"] == pytest.approx(one["psnr"], rel=1e-3)
        assert other["seconds"] > 0 and other["evaluation_training_steps"] > 0


def test_cases_run_in_the_order_in_which_they_are_given():
    other = dataclasses.replace(TINY, model="mlp")
    cases = [
        case
        for i in range(3)
        for case in (dataclasses.replace(TINY, indices=(i,)), dataclasses.replace(other, indices=(i,)))
    ]
    assert bench.groups(cases, 1) == [[case] for case in cases]
    assert bench.groups(cases, 2) == [[cases[0], cases[2]], [cases[1], cases[3]], [cases[4]], [cases[5]]]


def test_a_failure_of_one_that_runs_with_others_is_its_own(tmp_path):
    cases = [*CASES[:2], dataclasses.replace(TINY, indices=(10**6,))]
    rows = run(cases, tmp_path / "s.jsonl", together=3)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert [row["together"] for row in rows] == [1, 1, None]


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
        (BrokenProcessPool("died"), RuntimeError, "a worker process died.*fewer workers"),
        (pickle.PicklingError("no such module"), ValueError, "can't be sent to a worker.*or use one worker"),
    ],
)
def test_a_broken_executor_says_what_to_do(tmp_path, error, kind, message):
    class Broken:
        def submit(self, function, case, *rest):
            future = Future()
            if case == [CASES[0]]:
                future.set_result(function(case, *rest))
            else:
                future.set_exception(error)
            return future

    with pytest.raises(kind, match=message):
        run(CASES, tmp_path / "s.jsonl", executor=Broken())
    if kind is RuntimeError:  # what is done is kept, in whatever order the futures come
        assert [row["key"] for row in results.rows(tmp_path / "s.jsonl")] == [key(CASES[0])]


@dataclasses.dataclass(frozen=True)
class Listening(Defense):
    """Keeps the seed of the client's generator."""

    def on_update(self, gradient, rng):
        SEEDS["client"] = rng.initial_seed()
        return gradient


@dataclasses.dataclass(frozen=True)
class Plain:
    """An attack in closed form, which reports no losses and no evaluations, and keeps its generator's seed."""

    def __call__(self, obs, rng):
        SEEDS["attack"] = rng.initial_seed()
        images = torch.full((obs.batch_size, *obs.image_shape), 0.5)
        return Reconstruction(images, torch.zeros(obs.batch_size, dtype=torch.int64), math.nan, torch.empty(0, 1))


SEEDS = {}


def test_model_attack_and_client_draw_from_different_streams(tmp_path):
    case = dataclasses.replace(TINY, attack=Plain(), defense=Listening(), seed=7)
    assert run([case], tmp_path / "s.jsonl")[0]["status"] == "ok"
    assert SEEDS == {"attack": 7 + bench.ATTACK_STREAM, "client": 7 + bench.CLIENT_STREAM}
    assert len({0, bench.ATTACK_STREAM, bench.CLIENT_STREAM}) == 3


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
    assert "distance=gi_lib.matching.cosine" in text(TINY)
    assert "update=gi_lib.federated.fedsgd" in text(TINY)
    assert len(key(TINY)) == 12


CHANGES = {
    "attack": InvertingGradients(steps=3, distance=squared_l2),
    "model": "mlp",
    "dataset": "photos",
    "indices": (1,),
    "seed": 1,
    "weights": None,
    "size": 16,
    "split": "train",
    "threat": ThreatModel(knows_labels=True),
    "update": FedAvg(2),
    "defense": GaussianNoise(),
    "double": True,
    "profile": "quick",
}


def test_every_field_changes_the_key():
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(Case)}
    cases = [dataclasses.replace(TINY, **{name: value}) for name, value in CHANGES.items() if name != "weights"]
    cases += [dataclasses.replace(TINY, model="resnet20", weights=w) for w in (None, "cifar10_resnet20")]
    assert len({key(case) for case in [TINY, *cases]}) == len(cases) + 1


def test_brief_text_leaves_defaults_out():
    assert text(DLG(restarts=8), brief=True) == "DLG(restarts=8)"
    assert text(FedAvg(2), brief=True) == "FedAvg(local_steps=2)"


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
    monkeypatch.setattr(metrics, "lpips", lambda a, b, root=None: metrics.mse(a, b) * 2)
    assert bench.score(out) == (2, 0)
    rows = results.rows(out)
    assert len(rows) == 2
    for row in rows:
        assert row["lpips"][0] == pytest.approx(2 * row["mse"][0], rel=0.05)
    assert bench.score(out) == (0, 0)
