"""`bench.check`: an honest study passes, and each way of telling something else is found."""

import dataclasses
import importlib
import json
import shutil

import pytest

from gi_lib import bench, metrics, results
from gi_lib.attacks import BiasRatio, InvertingGradients
from gi_lib.bench import Case, check, key, run

MODULE = importlib.import_module("gi_lib.bench.check")  # the function hides it in the package
TINY = Case(InvertingGradients(steps=3), "lenet", "digits", (0,), profile="smoke")
CASES = [
    *(dataclasses.replace(TINY, indices=(i,)) for i in range(3)),
    Case(BiasRatio(), "lenet", "digits", (0,), profile="smoke"),  # does not apply
    Case(InvertingGradients(steps=2), "mlp", "digits", (0, 1), profile="smoke"),
]


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    monkeypatch.setattr(metrics, "lpips", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "lpips", lambda *args, **kwargs: None)
        run(CASES, folder / "tiny.jsonl", device="cpu")
    return folder


@pytest.fixture
def study(made, tmp_path):
    """A copy of the records and pictures, to be changed."""
    shutil.copytree(made, tmp_path / "results")
    return tmp_path / "results" / "tiny.jsonl"


def changed(out, number=0, **fields):
    """Rewrite one row of the file, as a hand could."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rows[number] |= fields
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_honest_study_passes_and_its_reruns_have_the_same_digits(study):
    report = check(CASES, study, sample=9, device="cpu")
    assert report == bench.Report(cases=5, present=5, compared=4, reruns=5, identical=5, problems=())


def test_a_sample_is_spread_over_the_cells_and_another_seed_draws_another(study, monkeypatch):
    ran = []

    def measure(case, root, device):
        ran.append(case)
        return next(row for row in results.rows(study) if row["key"] == key(case)), None

    monkeypatch.setattr(MODULE, "measure", measure)

    def drawn(**settings):
        ran.clear()
        assert not check(CASES, study, device="cpu", **settings).problems
        return [key(case) for case in ran]

    first = drawn(sample=3)
    assert first == drawn(sample=3) and len({(case.model, type(case.attack)) for case in ran}) == 3
    assert len({tuple(drawn(sample=3, seed=seed)) for seed in range(8)}) > 1
    changed(study, 1, seconds=1e-9)
    assert drawn(sample=1, cheapest=True) == [key(CASES[1])]
    assert drawn(sample=0) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"psnr": [45.0]}, "it says PSNR 45.00 dB, its picture has "),
        ({"psnr": [150.0]}, "it says PSNR 150.00 dB, its picture has "),
        ({"floor": [1.0]}, "floor [1.0] is not that of these images"),
        ({"chance": 1e-6}, "chance 1e-06 is 0.002"),
        ({"data_hash": "0" * 12}, "data_hash 000000000000 is not that of these images"),
        ({"model": "resnet50"}, "it says model='resnet50', its case 'lenet'"),
        ({"attack_text": "DLG()"}, "it says attack_text='DLG()'"),
        ({"threat_letter": "G"}, "it says threat_letter='G', its case 'A'"),
        ({"auxiliary": "mnist"}, "it says auxiliary='mnist', its case None"),
        ({"precision": "float64"}, "it says precision='float64', its case double=False"),
        ({"status": "failed", "error": "ValueError: no"}, "1 case: failed: ValueError: no"),
        ({"key": "0" * 12}, "1 case: stale: another revision of the code made the record"),
        ({"case": "0" * 12}, "it is of no case of the study"),
    ],
)
def test_what_a_hand_has_changed_is_found_without_a_rerun(study, fields, message):
    changed(study, **fields)
    problems = check(CASES, study, sample=0, device="cpu").problems
    assert message in " ".join(problems)
    assert len(problems) == (2 if "case" in fields else 1)  # its own case has no record then


def test_a_false_identification_is_found_by_the_picture(study):
    (row, *_) = results.rows(study)
    assert row["identified"] == [False]
    changed(study, identified=[True])
    assert "it says identified, its picture is nearer to another image" in check(CASES, study, sample=0).problems[0]


def test_a_picture_that_is_missing_damaged_or_of_others_is_found(study):
    paths = [results.picture_path(study, row["key"]) for row in results.rows(study)]
    paths[0].unlink()
    paths[1].write_bytes(b"no picture")
    paths[2].write_bytes(paths[4].read_bytes())
    problems = check(CASES, study, sample=0, device="cpu").problems
    assert [problem.partition(" is ")[2] for problem in problems[:2]] == ["missing or damaged"] * 2
    assert problems[2].endswith("shows other private images than these") and len(problems) == 3


def test_cases_without_records_are_counted_by_cell(study):
    more = [dataclasses.replace(TINY, indices=(i,)) for i in range(3, 6)]
    report = check([*CASES, *more], study, sample=0, device="cpu")
    assert (report.cases, report.present) == (8, 5)
    (problem,) = report.problems
    assert problem.startswith("InvertingGradients(steps=3), lenet, ") and "3 cases: no record" in problem


def rerun(study, monkeypatch, tolerance=0.1, **fields):
    """The problems where a rerun of the first case differs from its record in these fields."""

    def measure(case, root, device):
        row = next(row for row in results.rows(study) if row["key"] == key(case))
        return row | fields, None

    monkeypatch.setattr(MODULE, "measure", measure)
    problems = check(CASES[:1], study, sample=1, tolerance=tolerance, device="cpu").problems
    return [problem for problem in problems if "of no case" not in problem]


def test_a_rerun_has_the_same_digits_here_and_nearly_the_same_elsewhere(study, monkeypatch):
    (row, *_) = results.rows(study)
    (psnr,) = row["psnr"]
    other = {"versions": row["versions"] | {"torch": "1.0"}}
    assert not rerun(study, monkeypatch)
    assert "with the same versions and device" in rerun(study, monkeypatch, psnr=[psnr + 0.05])[0]
    assert not rerun(study, monkeypatch, psnr=[psnr + 0.05], **other)
    assert "torch 1.0" in rerun(study, monkeypatch, psnr=[psnr + 0.15], **other)[0]
    assert not rerun(study, monkeypatch, psnr=[psnr + 0.15], tolerance=0.2, **other)
    assert "identified 1 of 1" in rerun(study, monkeypatch, identified=[True], **other)[0]
    assert "missed" in rerun(study, monkeypatch, psnr=[None], **other)[0]
    assert "run again failed: out" in rerun(study, monkeypatch, status="failed", error="out")[0]
    assert "weights None, and run again with net@1" in rerun(study, monkeypatch, checkpoint="net@1")[0]


def test_nearly_exact_images_are_equally_near(study, monkeypatch):
    changed(study, psnr=[150.0])
    monkeypatch.setattr(MODULE, "_untrue", lambda *args: [])
    other = {"versions": {"torch": "1.0"}}
    assert not rerun(study, monkeypatch, psnr=[75.0], **other)
    assert rerun(study, monkeypatch, psnr=[50.0], **other)


def test_what_cannot_be_checked_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records at"):
        check(CASES, tmp_path / "none.jsonl")
    for wrong in ({"sample": -1}, {"tolerance": -1.0}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="a sample and a tolerance >= 0"):
            check(CASES, tmp_path / "none.jsonl", **wrong)
