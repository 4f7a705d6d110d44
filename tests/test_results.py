"""Records: what is written is read, and no damage goes unnoticed."""

import errno
import io
import json

import numpy as np
import pytest
import torch
from PIL import PngImagePlugin

from gi_lib import results


def record(key="a", status="ok", **fields):
    """A whole row of two images."""
    scores = {
        "psnr": [20.0, 30.0],
        "floor": [15.0, 14.0],
        "ssim": [0.5, 0.7],
        "lpips": [0.1, 0.3],
        "mse": [0.01, 0.001],
    }
    scores |= {"identified": [False, True], "chance": 0.002, "recall": 0.5, "image_precision": 0.5, "returned": 2}
    cost = {"seconds": 2.0, "cpu_seconds": 2.0, "steps": 3, "training_steps": 10.0, "label_accuracy": 1.0}
    case = {"attack": "dlg", "attack_text": "DLG(steps=3)", "model": "lenet", "dataset": "digits", "split": "test"}
    case |= {"indices": [0, 1], "batch_size": 2, "seed": 0, "threat": "ThreatModel()", "threat_letter": "A"}
    case |= {"client": "FedSGD", "train": False, "clients": 1, "rounds": 1, "profile": "smoke", "restarts": 1}
    case |= {"device": "a processor", "precision": "float32", "versions": {"torch": "2.6"}, "started": "2026-01-01"}
    row = dict.fromkeys(results.Record.__annotations__) | case
    row |= scores | cost if status == "ok" else {}
    return row | {"key": key, "case": key, "budget": 3, "status": status} | fields


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new" / "study.jsonl"
    results.append(path, record("a"))
    results.append(path, record("b", status="failed", error="ValueError: no"))
    assert results.rows(path) == [record("a"), record("b", status="failed", error="ValueError: no")]
    frame = results.read(path)
    assert list(frame["key"]) == ["a", "b"]
    assert list(frame["study"]) == ["study", "study"]
    assert len(results.read(tmp_path / "new")) == 2


def test_unlike_settings_are_not_averaged(tmp_path):
    path = tmp_path / "study.jsonl"
    for i, (client, size) in enumerate([("FedSGD", None), ("FedSGD", None), ("FedAvg(steps=2)", None), ("FedSGD", 64)]):
        results.append(path, record(str(i), client=client, size=size))
    frame = results.read(path)
    assert results.usual_groups(frame)[5:] == ["size", "client"]
    assert results.summarise(frame)["n"].tolist() == [2, 1, 1]
    assert results.usual_groups(frame.iloc[:2]) == ["attack", "model", "weights", "dataset", "threat"]
    with pytest.raises(ValueError, match="psnr has a list in each record"):
        results.summarise(frame, ["psnr"])


def test_a_study_that_was_not_run_is_an_empty_table(tmp_path):
    results.append(tmp_path / "run.jsonl", record())
    run, missing = results.study("run", tmp_path), results.study("missing", tmp_path)
    assert list(run["key"]) == ["a"] and missing.empty
    assert list(missing.columns) == list(run.columns)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        results.study("run", tmp_path / "elsewhere")


def test_the_newest_row_of_a_key_counts(tmp_path):
    path = tmp_path / "study.jsonl"
    for row in (record("a", status="failed"), record("b"), record("a", seconds=7.0)):
        results.append(path, row)
    assert [(row["key"], row["status"]) for row in results.rows(path)] == [("a", "ok"), ("b", "ok")]
    assert results.rows(path)[0]["seconds"] == 7.0


def test_a_torn_last_line_is_skipped_with_a_warning_and_written_over(tmp_path):
    path = tmp_path / "study.jsonl"
    results.append(path, record("a"))
    with path.open("a") as file:
        file.write(json.dumps(record("b"))[:50])
    with pytest.warns(UserWarning, match=r"study.jsonl:2: the last line is torn"):
        assert len(results.rows(path)) == 1
    results.append(path, record("c"))
    assert [row["key"] for row in results.rows(path)] == ["a", "c"]


DAMAGE = {
    "half a line": "{",
    "a list": "[]",
    "no key": '{"no": "key"}',
    "nothing": "",
    "a field less": json.dumps({k: v for k, v in record().items() if k != "seed"}),
    "a field more": json.dumps(record(update="fedsgd")),
    "a field of another type": json.dumps(record(seconds="long")),
    "not a number": json.dumps(record(loss=float("nan"))),
    "infinity": json.dumps(record(psnr=[float("inf"), 1.0])),
    "50 values of two images": json.dumps(record(psnr=[20.0] * 50)),
    "another batch size": json.dumps(record(batch_size=3)),
    "a status of its own": json.dumps(record(status="fine")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damage_elsewhere_is_an_error_with_its_place(tmp_path, damage):
    path = tmp_path / "study.jsonl"
    results.append(path, record("a"))
    path.write_text(damage + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"study.jsonl:1: this line is not a record"):
        results.rows(path)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8-sig"])
def test_another_encoding_is_an_error_with_its_place(tmp_path, encoding):
    path = tmp_path / "study.jsonl"
    path.write_bytes((json.dumps(record(error="ä", status="failed"), ensure_ascii=False) + "\n").encode(encoding))
    with pytest.raises(ValueError, match=r"study.jsonl:1: this line is not a record"):
        results.read(path)


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    """U+2028 and its like: only a line feed ends a row."""
    path = tmp_path / "study.jsonl"
    odd = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g"
    for key in "abc":
        results.append(path, record(key, status="failed", error=odd))
    assert [row["error"] for row in results.rows(path)] == [odd] * 3


def test_a_row_that_is_no_record_is_not_written(tmp_path):
    for change in ({"psnr": [1.0]}, {"seed": None}, {"other": 1}):
        with pytest.raises(ValueError, match="psnr: 1 values for 2 images|seed|other"):
            results.append(tmp_path / "study.jsonl", record(**change))
    assert not (tmp_path / "study.jsonl").exists()


def test_an_append_reads_the_end_of_a_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "study.jsonl"
    for key in "ab":
        results.append(path, record(key))
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    path.write_bytes(path.read_bytes() * 2000)
    monkeypatch.setattr(results, "open", lambda path, mode, buffering: Counting(path, "a+"), raising=False)
    results.append(path, record("c"))
    assert sum(read) <= 65536 < path.stat().st_size


def test_no_records_is_an_error_that_says_where_they_come_from(tmp_path):
    for path in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="gi run"):
            results.read(path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, line):
            return super().write(line[:40])

    path = tmp_path / "study.jsonl"
    results.append(path, record("a"))
    monkeypatch.setattr(results, "open", lambda path, mode, buffering: FullDisk(path, "a+"), raising=False)
    with pytest.raises(OSError, match="No space left") as raised:
        results.append(path, record("b"))
    assert raised.value.errno == errno.ENOSPC
    assert results.rows(path) == [record("a")]


def test_a_number_that_json_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss: Input should be a finite number"):
        results.append(tmp_path / "study.jsonl", record(loss=float("nan")))


def test_summarise_counts_failures_and_keeps_them_out_of_means(tmp_path):
    path = tmp_path / "study.jsonl"
    rows = [record("a"), record("b", psnr=[40.0, 50.0], seconds=4.0), record("c", status="failed")]
    for row in [*rows, record("d", attack="other", status="failed")]:
        results.append(path, row)
    summary = results.summarise(results.read(path), by=["attack"]).set_index("attack")
    dlg, other = summary.loc["dlg"], summary.loc["other"]
    assert (dlg["ok"], dlg["n"], dlg["images"]) == (2, 3, 4)
    assert (dlg["psnr"], dlg["seconds"]) == (35.0, 3.0)
    assert (dlg["above"], dlg["identified"], dlg["chance"]) == (35.0 - 14.5, 0.5, 0.004)  # two returned
    assert dlg["lpips"] == pytest.approx(0.2)
    assert dlg["psnr_low"] < 35 < dlg["psnr_high"]
    assert (other["ok"], other["n"], other["images"]) == (0, 1, 0)
    assert np.isnan(other["psnr"]) and np.isnan(other["psnr_low"])


def test_missing_lpips_is_missing(tmp_path):
    for row in (record("a"), record("b", lpips=None)):
        results.append(tmp_path / "study.jsonl", row)
    summary = results.summarise(results.read(tmp_path), by=["attack"])
    assert np.isnan(summary["lpips"][0])
    assert summary["psnr"][0] == 25.0


def test_a_missed_image_is_in_the_recall_and_in_no_mean_of_decibels(tmp_path):
    missed = {name: [20.0, None] for name in ("psnr", "ssim", "lpips", "mse")}
    row = record(**missed, identified=[True, False], returned=1, recall=0.5, image_precision=1.0, label_accuracy=None)
    results.append(tmp_path / "study.jsonl", row)
    [summary] = results.summarise(results.read(tmp_path), by=["attack"]).to_dict("records")
    assert (summary["images"], summary["psnr"], summary["above"], summary["recall"]) == (2, 20.0, 5.0, 0.5)
    assert (summary["identified"], summary["image_precision"]) == (0.5, 1.0)


def test_the_cost_of_the_first_identified_image():
    curve = {"evaluations": [1, 10, 20], "seconds": [0.1, 1.0, 2.0], "psnr": [[5.0, 5.0]] * 3}
    curve["identified"] = [[False, False], [False, True], [True, True]]
    assert results.first_identified(record(curve=curve)) == {"evaluations": 10, "seconds": 1.0}
    assert results.first_identified(record(curve=curve | {"identified": [[False, False]] * 3})) is None
    assert results.first_identified(record()) is None


@pytest.mark.parametrize(
    ("psnr", "identified", "enough"),
    [
        ([20.3, 30.3], [False, True], True),
        ([20.3, 30.3], [True, True], True),
        ([20.6, 30.6], [False, True], False),
        ([20.0, 30.0], [True, False], True),
    ],
)
def test_a_plateau_is_where_a_third_of_the_budget_gives_the_same(tmp_path, psnr, identified, enough):
    path = tmp_path / "study.jsonl"
    rows = [record("a"), record("b", attack_text="DLG(steps=9)", budget=9, psnr=psnr, identified=identified)]
    rows.append(record("c", attack_text="DLG(steps=9, lr=0.5)", budget=9))  # another setting
    rows.append(record("d", attack_text="DLG(steps=30)", budget=30, seed=1))  # other draws of the network
    for row in rows:
        results.append(path, row)
    found = results.plateau(results.read(path)).set_index(["setting", "budget"])
    nine = found.loc[("DLG()", 9)]
    assert (nine["below"], nine["images"], nine["plateau"]) == (3, 2, enough)
    assert found.loc[("DLG()", 3)]["plateau"] is None and found.loc[("DLG(lr=0.5)", 9)]["plateau"] is None
    assert found.loc[("DLG()", 30)]["images"] == 0 and found.loc[("DLG()", 30)]["plateau"] is None


def test_images_that_flip_are_counted_by_the_difference_of_counts(tmp_path):
    path = tmp_path / "study.jsonl"
    for i in range(2):
        results.append(path, record(f"a{i}", seed=i, identified=[False, False]))
        row = record(f"b{i}", seed=i, attack_text="DLG(steps=9)", budget=9, identified=[False, True])
        results.append(path, row)
    found = results.plateau(results.read(path)).set_index("budget").loc[9]
    assert (found["identified"], found["decibels"], found["plateau"]) == (2, 0, False)


def test_summarise_knows_its_columns(tmp_path):
    results.append(tmp_path / "study.jsonl", record())
    with pytest.raises(ValueError, match="no column atack; known: key, case, status"):
        results.summarise(results.read(tmp_path), by=["atack"])


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [results.bootstrap(rng.normal(5, 2, size=40), resamples=400) for _ in range(200)]
    covered = np.mean([low < 5 < high for low, high in intervals])
    assert 0.88 < covered < 0.99
    values = rng.normal(5, 2, size=400)
    low, high = results.bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert results.bootstrap(values) == (low, high)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_keeps_every_byte(tmp_path, channels):
    truth, images = torch.randint(0, 256, (2, 3, channels, 5, 4), generator=torch.Generator()) / 255
    results.write_picture(tmp_path / "p.png", truth, images)
    above, below = results.read_picture(tmp_path / "p.png", 3)
    assert torch.equal(above, truth)
    assert torch.equal(below, images)


def test_of_a_large_batch_the_images_that_came_back_are_pictured_first(tmp_path):
    truth, images = torch.rand(2, 33, 3, 4, 5)
    images[:22], images[23:30] = 0, 0
    results.write_picture(tmp_path / "p.png", truth, images)
    above, below = results.read_picture(tmp_path / "p.png", 33)
    places = [0, 1, 2, 3, 22, 30, 31, 32]
    assert results.pictured(tmp_path / "p.png", 33) == places
    for shown, all_ in ((above, truth), (below, images)):
        torch.testing.assert_close(shown, all_[places], rtol=0, atol=0.5 / 255 + 1e-6)


def test_an_older_picture_of_a_large_batch_says_how_many_it_has(tmp_path):
    said = PngImagePlugin.PngInfo()
    said.add_text("images", "8")
    results.bitmap(torch.rand(2, 8, 3, 4, 5)).save(tmp_path / "p.png", pnginfo=said)
    assert results.pictured(tmp_path / "p.png", 64) == list(range(8))
    assert len(results.read_picture(tmp_path / "p.png", 64)[0]) == 8


def test_a_picture_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="a failed case has none"):
        results.read_picture(tmp_path / "p.png", 1)


def test_of_two_revisions_of_a_case_the_later_counts(tmp_path):
    path = tmp_path / "study.jsonl"
    results.append(path, record("old", case="c"))
    results.append(path, record("new", case="c", psnr=[40.0, 50.0]))
    assert [row["key"] for row in results.rows(path)] == ["new"]
    assert results.summarise(results.read(path)).iloc[0]["n"] == 1


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "study.jsonl"
    for key in "ab":
        results.append(path, record(key))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [row["key"] for row in results.rows(path)] == ["a", "b"]
    results.append(path, record("c"))
    assert [row["key"] for row in results.rows(path)] == ["a", "b", "c"]


def test_a_plateau_is_of_the_budgets_and_not_of_the_steps_that_were_taken(tmp_path):
    path = tmp_path / "study.jsonl"
    for seed in range(4):
        for budget in (30, 90):  # it settles early, whatever it was allowed
            text = f"DLG(steps={budget})"
            results.append(
                path, record(f"{budget}-{seed}", seed=seed, attack_text=text, budget=budget, steps=4 + 2 * seed)
            )
        results.append(path, record(f"closed-{seed}", seed=seed, attack_text="BiasRatio()", budget=None, steps=0))
    found = results.plateau(results.read(path)).set_index("budget")
    assert sorted(found.index) == [30, 90]
    assert (found.loc[90]["below"], found.loc[90]["images"], found.loc[90]["plateau"]) == (30, 8, True)


def test_splits_are_kept_apart(tmp_path):
    path = tmp_path / "study.jsonl"
    for split in ("train", "test"):
        results.append(path, record(split, split=split))
    assert len(results.summarise(results.read(path))) == 2


CURVE = {"evaluations": [0, 1], "seconds": [0.0, 1.0], "psnr": [[1.0, 2.0]] * 2, "identified": [[True, False]] * 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"started": "yesterday"}, "started: Invalid isoformat"),
        ({"psnr": None}, "psnr: missing, and the status is ok"),
        ({"curve": CURVE | {"seconds": [0.0]}}, "curve: its lists have different lengths"),
        ({"curve": CURVE | {"psnr": [[1.0]] * 2}}, "curve: not 2 values for each snapshot"),
    ],
)
def test_what_would_stop_a_reader_is_refused_with_its_line(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        results.append(tmp_path / "s.jsonl", record() | wrong)
