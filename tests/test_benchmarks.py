"""The benchmark runs and writes what the book reads. How fast anything is, no test says."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    return runpy.run_path(str(SPEED))


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_measurement_has_every_column(speed, restarts):
    speed["measure"].__globals__["SECONDS"] = 1e6  # a busy machine leaves nothing out
    row = speed["measure"](speed["Fixture"]("lenet", 2, pixels=8, restarts=restarts), "cpu")
    assert row["fixture"] == "lenet-b2-8px" and row["iterations"] >= 10
    times = ("iteration_ms", "floor_ms", "ratio", "restarts_per_second", "training_step_ms", "peak_memory_mb")
    assert all(row[name] > 0 for name in times)
    assert ("closure_ratio" in row) == (restarts == 1)
    assert f"{row['ratio']:.2f}" in speed["text"](row)


def test_what_would_take_too_long_is_said_and_left_out(speed, monkeypatch):
    monkeypatch.setitem(speed["measure"].__globals__, "SECONDS", 0.0)
    row = speed["measure"](speed["Fixture"]("lenet", 1, pixels=8), "cpu")
    assert "an iteration would take about" in row["skipped"] and "ratio" not in row


def test_an_unknown_fixture_is_refused(speed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "lenet-b3"])
    with pytest.raises(SystemExit):
        speed["main"]()
    assert "no fixture is called 'lenet-b3'; did you mean 'lenet-b" in capsys.readouterr().err


def test_the_stored_table_is_what_the_book_expects(speed):
    rows = [json.loads(line) for line in SPEED.with_name("speed.jsonl").read_text().splitlines()]
    keys = [
        tuple(row[name] for name in ("model", "batch", "pixels", "restarts", "threads", "part", "device"))
        for row in rows
    ]
    assert len(set(keys)) == len(keys)
    assert {row["part"] for row in rows} == {fixture.part for fixture in speed["FIXTURES"]}
