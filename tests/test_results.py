"""Records: what is written is read, and no damage goes unnoticed."""

import errno
import io
import json

import numpy as np
import pytest
import torch

from gi_lib import results


def record(key="a", status="ok", **fields):
    scores = {"psnr": [20.0, 30.0], "ssim": [0.5, 0.7], "lpips": [0.1, 0.3], "mse": [0.01, 0.001]}
    usual = {"attack": "dlg", "seconds": 2.0, "steps": 3, "training_steps": 10.0, "label_accuracy": 1.0}
    row = dict.fromkeys(results.Record.__annotations__) | usual | scores
    if status == "failed":
        row |= {name: None for name in [*scores, *usual] if name != "attack"}
    return row | {"key": key, "status": status} | fields


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
    for i, (update, size) in enumerate(
        [("fedsgd", None), ("fedsgd", None), ("FedAvg(local_steps=2)", None), ("fedsgd", 64)]
    ):
        results.append(path, record(str(i), update=update, size=size))
    frame = results.read(path)
    assert results.usual_groups(frame)[5:] == ["size", "update"]
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


@pytest.mark.parametrize("damage", ["{", "[]", '{"no": "key"}', ""])
def test_damage_elsewhere_is_an_error_with_its_place(tmp_path, damage):
    path = tmp_path / "study.jsonl"
    results.append(path, record("a"))
    path.write_text(damage + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"study.jsonl:1: this line is not a record"):
        results.rows(path)


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
    with pytest.raises(ValueError, match="JSON"):
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


def test_summarise_knows_its_columns(tmp_path):
    results.append(tmp_path / "study.jsonl", record())
    with pytest.raises(ValueError, match="no column atack; known: key, status"):
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


def test_a_picture_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="a failed case has none"):
        results.read_picture(tmp_path / "p.png", 1)
