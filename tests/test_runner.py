"""A runner that nothing can stop: appends that race, cases that kill their process or never end, parents that die."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from gi_lib import bench, metrics, results
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case, run
from tests.test_results import record

TINY = Case(InvertingGradients(steps=2), "lenet", "digits", (0,), profile="smoke")


@dataclasses.dataclass(frozen=True)
class Deadly:
    """An attack that ends in another way for each `how`."""

    how: str

    def __call__(self, obs, rng):
        if self.how == "abort":
            os.abort()
        if self.how == "sleep":
            time.sleep(600)
        if self.how == "exit":
            os._exit(0)
        if self.how == "raise":
            raise ValueError("no")
        rec = InvertingGradients(steps=1)(obs, rng)
        if self.how == "NaN":
            return dataclasses.replace(rec, images=rec.images * float("nan"))
        return rec


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    monkeypatch.setattr(metrics, "lpips", lambda *args, **kwargs: None)


APPENDING = """
import sys, pathlib
from gi_lib import results
from tests.test_results import record
path, name, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    results.append(path, record(f"{name}{i:05d}"))
"""


def appended(path, writers, count):
    """Appends by several processes that start at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDING, str(path), name, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for name in writers
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait() for process in started] == [0] * len(started)


def test_appends_of_several_processes_lose_nothing(tmp_path):
    path = tmp_path / "study.jsonl"
    results.append(path, record("first"))
    path.write_bytes(path.read_bytes() * 500 + b'{"torn')
    appended(path, "abc", 40)
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]
    assert Counter(keys) == {"first": 500, **{f"{name}{i:05d}": 1 for name in "abc" for i in range(40)}}


def test_a_case_that_kills_its_process_or_never_ends_fails_alone(tmp_path):
    hows = ("abort", "sleep", "exit", "raise", "NaN", "fine")
    cases = [TINY, *(dataclasses.replace(TINY, attack=Deadly(how)) for how in hows)]
    cases += [dataclasses.replace(TINY, indices=(i,)) for i in (1, 2)]
    with bench.pool(2, limit=30) as executor:
        rows = run(cases, tmp_path / "s.jsonl", executor=executor)
    status = dict(zip(("first", *hows, "second", "third"), (row["status"] for row in rows), strict=True))
    assert {name for name, said in status.items() if said == "failed"} == {"abort", "sleep", "exit", "raise", "NaN"}
    errors = {how: row["error"] for how, row in zip(hows, rows[1:], strict=False)}
    for how in ("abort", "exit"):
        assert errors[how] == (
            "it killed its process, twice, the second time alone: memory ran out, or a library aborted"
        )
    assert errors["sleep"] == "it took longer than the time limit of a case"
    assert "no" in errors["raise"] and "NaN or infinite pixels" in errors["NaN"]
    assert len(results.rows(tmp_path / "s.jsonl")) == len(cases)


STUDY = """
from gi_lib.attacks import InvertingGradients
from gi_lib.bench import Case

CASES = [Case(InvertingGradients(steps=30), "lenet", "digits", (i,), profile="smoke") for i in range(40)]
"""


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [n for child in found for n in children(int(child))]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(") ")[2][0] != "Z"


def kill_during_a_run(folder, after):
    """SIGKILL a run of two workers when it has written so many rows; returns the workers that outlive it."""
    command = [sys.executable, "-m", "gi_lib.cli", "run", "tiny.py", "--workers", "2"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = folder / "results/tiny.jsonl"
    wait_until(lambda: process.poll() is not None or (out.exists() and out.read_bytes().count(b"\n") >= after))
    workers = children(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 1
    while time.monotonic() < end and any(map(alive, workers)):
        time.sleep(0.02)
    return [pid for pid in workers if alive(pid)]


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for its processes")
def test_a_run_that_is_killed_goes_on_and_leaves_no_orphan(tmp_path):
    (tmp_path / "tiny.py").write_text(STUDY)
    for kills in (3, 9):
        orphans = kill_during_a_run(tmp_path, kills)
        wait_until(lambda orphans=orphans: not any(map(alive, orphans)), 20)  # a busy machine takes its time
    done = subprocess.run(
        [sys.executable, "-m", "gi_lib.cli", "run", "tiny.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "40 ok, of 40 cases" in done.stdout, done.stderr
    lines = (tmp_path / "results/tiny.jsonl").read_bytes().splitlines()
    counts = Counter(json.loads(line)["key"] for line in lines)
    assert len(counts) == 40 and set(counts.values()) == {1}


def test_a_second_run_of_the_study_is_told_who_holds_it(tmp_path):
    out = tmp_path / "s.jsonl"
    with (
        bench._only_run(out),
        pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .* is running this study; wait for it"),
    ):
        run([TINY], out)
    assert run([TINY], out)[0]["status"] == "ok"


GUARDLESS = """
import sys
from pathlib import Path
from gi_lib import bench
from tests.test_runner import TINY
with bench.pool(2) as executor:
    bench.run([TINY], Path(sys.argv[1]), executor=executor)
"""


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GUARDLESS)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "s.jsonl")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    last = done.stderr[done.stderr.rindex("RuntimeError: ") :]
    assert done.returncode != 0 and '`if __name__ == "__main__":`' in last and "memory" not in last


def test_an_attack_of_a_notebook_can_not_go_to_a_process(tmp_path, monkeypatch):
    mine = dataclasses.make_dataclass("Mine", [], frozen=True, namespace={"__call__": lambda self, obs, rng: None})
    mine.__module__ = "__main__"
    main = type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    with (
        bench.pool(1) as executor,
        pytest.raises(ValueError, match=r"Mine\(\) is defined in this notebook.*or run without workers"),
    ):
        run([dataclasses.replace(TINY, attack=mine())], tmp_path / "s.jsonl", executor=executor)


@pytest.mark.parametrize("arguments", [(0,), (2.0,), (True,), (1, 0), (1, -1.0), (1, float("nan")), (1, float("inf"))])
def test_a_bad_pool_is_refused(arguments):
    with pytest.raises(ValueError, match=r"workers, a whole number >= 1|number of seconds > 0"), bench.pool(*arguments):
        pass


def same(rows):
    names = ("psnr", "ssim", "mse", "loss", "restart_losses", "identified", "data_hash", "steps", "key")
    return [{name: row[name] for name in names} for row in rows]


@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_same_records_and_a_killed_worker_loses_nothing(tmp_path):
    cases = [dataclasses.replace(TINY, indices=(i,)) for i in range(6)]
    serial = run(cases, tmp_path / "serial.jsonl")
    with bench.pool(2) as executor:
        pooled = run(cases, tmp_path / "pool.jsonl", executor=executor)
    with bench.cluster("local", 2) as executor:
        client = executor._client
        [victim, _] = client.run(os.getpid).values()
        futures = executor.submit(os.getpid)  # the cluster is at work
        assert futures.result() in client.run(os.getpid).values()
        os.kill(victim, signal.SIGKILL)
        distributed = run(cases, tmp_path / "dask.jsonl", executor=executor)
    assert same(serial) == same(pooled) == same(distributed)
    assert len(results.rows(tmp_path / "dask.jsonl")) == 6


def test_a_scheduler_that_is_not_there_is_said_so():
    with (
        pytest.raises(ValueError, match="no Dask scheduler answers at 'nowhere.json'.*or use --dask local"),
        bench.cluster("nowhere.json", 1),
    ):
        pass
