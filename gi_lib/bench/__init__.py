"""Case and run: one Record for each case, resumable, on any concurrent.futures executor.

Every case draws from generators of its own, so that no two of its parts see the same numbers: the model's weights
from `seed`, the attack from `seed` + ATTACK_STREAM, the clients from `seed` + CLIENT_STREAM, a malicious server from
`seed` + SERVER_STREAM. A case is computed by one thread, so that its record is the same however many there are.
"""

import contextlib
import errno
import os
import pickle
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from datetime import UTC, datetime
from pathlib import Path

from gi_lib import data, progress, provenance, results
from gi_lib.bench.cases import PROFILES, Case, key, text
from gi_lib.bench.check import Report, check
from gi_lib.bench.measure import (
    ATTACK_STREAM,
    CLIENT_STREAM,
    DONE,
    SERVER_STREAM,
    AttackError,
    Measured,
    attempt,
    failed,
    measure,
    network,
)
from gi_lib.bench.plan import Cell, Estimate, by_records, plan
from gi_lib.bench.workers import Pool, cluster, pool
from gi_lib.results import Record

__all__ = [
    "ATTACK_STREAM",
    "CLIENT_STREAM",
    "PROFILES",
    "SERVER_STREAM",
    "AttackError",
    "Case",
    "Cell",
    "Estimate",
    "Pool",
    "Report",
    "attempt",
    "by_records",
    "check",
    "cluster",
    "key",
    "measure",
    "missing",
    "network",
    "plan",
    "pool",
    "queue",
    "run",
    "score",
    "text",
]


def run(
    cases: Iterable[Case],
    out: Path,
    *,
    executor: Executor | None = None,
    root: Path | None = None,
    device: str | None = None,
) -> list[Record]:
    """Run what is missing of a study. Each finished case is on the disk before the next is counted.

    A case whose row in `out` is "ok" or "not applicable" is skipped; one whose row says "failed" is tried again. A case
    that fails becomes a row with its error. Ctrl-C leaves what is done and gives up the rest. One run at a time works
    on a file of records.

    Args:
        cases: those with equal keys are run once.
        out: results/<study>.jsonl; the pictures go to results/<study>/<key>.png.
        executor: where cases run: `pool(2)`, whose cases may kill their process or take too long; `cluster(...)`; any
            other. None runs them one after another in this process.
        root: the data root; None as in `data.root`.
        device: None takes a GPU where there is one.

    Returns:
        The rows of all the cases, in the order of `cases`.

    Raises:
        BlockingIOError: another process is running this study; it says which.
        OSError: the disk is full, or `out` can't be written. What is done stays.
        RuntimeError: the workers can't start or have died.
        ValueError: the device is not there, a line of `out` is damaged, or a case can't go to a process.
        FileNotFoundError: the data root is not there.
    """
    return queue({Path(out): list(cases)}, executor=executor, root=root, device=device)[Path(out)]


def queue(
    studies: Mapping[Path, Sequence[Case]],
    *,
    executor: Executor | None = None,
    root: Path | None = None,
    device: str | None = None,
    each: Callable[[], None] = lambda: None,
) -> dict[Path, list[Record]]:
    """`run` for several studies at once, so that no worker waits for the last case of a study.

    Args:
        studies: for each file of records its cases.
        each: called after each case is on the disk; what it raises ends the run.

    Returns:
        For each file of records the rows of its cases.
    """
    wanted = {out: {key(case): case for case in cases} for out, cases in studies.items()}
    device, commit = provenance.choose_device(device), provenance.commit()
    data.root(root)  # a data root that is not there fails now, not once a case
    with contextlib.ExitStack() as held:
        for out in wanted:
            held.enter_context(_only_run(out))
            held.callback(_compact, out)
        known = {out: {row["key"]: row for row in results.rows(out)} if out.exists() else {} for out in wanted}
        todo = [
            (case, out)
            for out, cases in wanted.items()
            for k, case in cases.items()
            if k not in known[out] or known[out][k]["status"] not in DONE
        ]
        if isinstance(executor, Pool):
            _check_importable(case for case, _ in todo)
        total = sum(map(len, wanted.values()))
        done = total - len(todo)
        name = next(iter(wanted)).stem if len(wanted) == 1 else f"{len(wanted)} studies"
        bar = progress.bar(total=total, initial=done, desc=name, unit="case")
        with bar, contextlib.closing(_measure_all(todo, executor, root, device)) as finished:
            for (record, picture), out in finished:
                record["commit"] = commit
                try:
                    if picture is not None:
                        results.write_picture(results.picture_path(out, record["key"]), *picture)
                    results.append(out, record)
                except OSError as error:
                    remedy = {errno.ENOSPC: "make room", errno.EDQUOT: "make room"}.get(
                        error.errno or 0, "see to it that the folder can be written"
                    )
                    raise OSError(
                        error.errno,
                        f"{error.strerror}: a record could not be written; {done} of {total} cases are"
                        f" done and kept; {remedy}, and run the study again to go on",
                        str(out),
                    ) from error
                known[out][record["key"]] = record
                done += 1
                bar.update()
                each()
    return {out: [known[out][k] for k in cases] for out, cases in wanted.items()}


@contextlib.contextmanager
def _only_run(out: Path) -> Iterator[None]:
    held = out.with_name(f"{out.stem}.run.lock")
    try:
        with results.lock(held, wait=False):
            with contextlib.suppress(OSError):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                held.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}", encoding="utf-8")
            yield
    except BlockingIOError as error:
        holder = "another process"
        with contextlib.suppress(OSError):
            holder = held.read_text(encoding="utf-8") or holder
        raise BlockingIOError(
            errno.EAGAIN, f"{holder} is running this study; wait for it, or stop it, and run it again", str(out)
        ) from error


def _compact(out: Path) -> None:
    """A file that rests has one line a case."""
    if out.exists():
        with contextlib.suppress(OSError, ValueError):  # a full disk or a damaged line is told of by the run itself
            results.compact(out)


def missing(cases: Iterable[Case], out: Path) -> list[Case]:
    """The cases that a run would run."""
    known = {row["key"]: row["status"] for row in results.rows(out)} if Path(out).exists() else {}
    return [case for k, case in {key(case): case for case in cases}.items() if known.get(k) not in DONE]


def _check_importable(cases: Iterable[Case]) -> None:
    """What a notebook or a prompt has defined, a process can't import; a script's process imports the script."""
    if hasattr(sys.modules["__main__"], "__file__"):
        return
    for case in cases:
        if "__main__." in text(case):
            raise ValueError(
                f"{text(case.attack, brief=True)} is defined in this notebook, from where a worker process can't import"
                " it; define it in a module that can be imported, or run without workers"
            )


def _measure_all(
    cases: Sequence[tuple[Case, Path]], executor: Executor | None, root: Path | None, device: str
) -> Generator[tuple[Measured, Path]]:
    """Of each case what it came to, and the file that its record belongs to."""
    if executor is None:
        for case, out in cases:
            yield measure(case, root, device), out
        return
    running = {executor.submit(measure, case, root, device): (case, out) for case, out in cases}
    died: list[tuple[Case, Path]] = []
    started = not isinstance(executor, Pool)  # there a case that kills its process is told from a pool that can't start
    try:
        for future in as_completed(running):
            case, out = running[future]
            measured = _result(future, case, device, started)
            started = True
            if measured is None:
                died.append((case, out))
            else:
                yield measured, out
        for case, out in died:  # alone: memory may have run out because of a neighbour
            again = executor.submit(measure, case, root, device)
            running[again] = case, out
            reason = "it killed its process, twice, the second time alone: memory ran out, or a library aborted"
            yield _result(again, case, device, started) or failed(case, device, reason), out
    finally:
        for future in running:
            future.cancel()


def _result(future: Future, case: Case, device: str, started: bool) -> Measured | None:
    """What a future has come to; None where the case killed its process.

    Args:
        started: whether workers may have been there and died.

    Raises:
        RuntimeError: the executor can't go on.
        ValueError: the case can't be sent to a process.
    """
    try:
        return future.result()
    except TimeoutError:
        return failed(case, device, "it took longer than the time limit of a case")
    except (BrokenExecutor, CancelledError) as error:
        raise RuntimeError(
            "the worker processes could not start, or died; what is done is kept. In a script, start the run below"
            ' `if __name__ == "__main__":`; else run the study again, with fewer workers where memory ran out'
            if started
            else "no worker process could start; a worker imports the script that started it, so in a script start the"
            ' run below `if __name__ == "__main__":`'
        ) from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"a case can't be sent to a worker process ({error}); define its attack in a module that can be"
            " imported, such as a file beside the study"
        ) from error
    except Exception as error:
        if type(error).__name__ == "ProcessExpired":  # Pebble's, of the one process that ran this case
            return None
        if type(error).__name__ == "KilledWorker":  # Dask's, after it has tried again elsewhere
            return failed(case, device, "it killed the workers that ran it: memory ran out, or a library aborted")
        raise


def score(out: Path, root: Path | None = None) -> tuple[int, int]:
    """Fill in LPIPS where it is missing, from the saved 8-bit pictures, as new rows of the same keys.

    Returns:
        How many rows were filled in, and how many are still missing.
    """
    from gi_lib import metrics

    empty = [row for row in results.rows(out) if row["status"] == "ok" and row["lpips"] is None and row["psnr"]]
    filled = 0
    for row in progress.bar(empty, desc="lpips", unit="case"):
        truth, images = results.read_picture(results.picture_path(out, row["key"]), row["batch_size"])
        if truth.shape[1] not in (1, 3) or len(truth) < row["batch_size"]:
            continue
        values = metrics.lpips(images, truth, root=root, download=True)
        if values is None:
            break
        missed = [value is None for value in row["psnr"] or ()]
        found = [None if gone else value for gone, value in zip(missed, values.tolist(), strict=True)]
        filled_in = row.copy()
        filled_in["lpips"] = found
        results.append(out, filled_in)
        filled += 1
    return filled, len(empty) - filled
