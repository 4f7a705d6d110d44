"""Worker processes for a study, which outlive a case that kills one, and end with their parent."""

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

EX_GONE = 70


class Pool(Executor):
    """Processes of one thread each. A case that kills its process fails alone; one that takes too long is killed.

    Args:
        workers: number of processes.
        limit: wall seconds a case may take; None sets none.
    """

    def __init__(self, workers: int, limit: float | None = None):
        from pebble import ProcessPool

        self.limit = limit
        context = multiprocessing.get_context("spawn")
        self._processes = ProcessPool(workers, context=context, initializer=_start_worker)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        return self._processes.schedule(_trimmed, args=(fn, *args), kwargs=kwargs, timeout=self.limit)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._processes.stop() if cancel_futures else self._processes.close()
        self._processes.join()


@contextlib.contextmanager
def pool(workers: int, limit: float | None = None) -> Iterator[Pool]:
    """Worker processes for `run`; Ctrl-C and errors end them at once.

    They are started afresh (spawn), so that a script which calls this needs `if __name__ == "__main__":`.

    Args:
        workers: number of processes, each with one thread.
        limit: wall seconds a case may take; None sets none.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"a pool needs workers, a whole number >= 1, got {workers!r}")
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"a time limit is a number of seconds > 0, got {limit!r}")
    processes = Pool(workers, limit)
    try:
        yield processes
    except BaseException:
        processes.shutdown(cancel_futures=True)
        raise
    processes.shutdown()


def _trimmed(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    """fn(...); then glibc gives back what it keeps, which cases of many sizes would leave in ever more pieces."""
    try:
        return fn(*args, **kwargs)
    finally:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _start_worker() -> None:
    import torch
    from tqdm import tqdm

    import gi_lib.bench.measure  # noqa: F401 - now, and not within the time limit of the first case

    with contextlib.suppress(ImportError, OSError, ValueError):  # a case that aborts leaves no core
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Pebble takes a process that ends with 0 for one that has done its work, and would wait for its case for ever.
    ended = os._exit
    os._exit = lambda code: ended(code or EX_GONE)  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which a worker that is ended would leak
    sys.stderr = _NoTerminal(io.FileIO(2, "w", closefd=False), write_through=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        signal.raise_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a worker: its warnings are seen, its progress bars are not."""

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def cluster(address: str, workers: int) -> Iterator[Executor]:
    """Dask's workers as an executor for `run` (extra gi_lib[dask]). Each takes one case at a time and should have one
    thread; what it returns is written by this process alone.

    Args:
        address: of a scheduler, such as tcp://host:8786; a scheduler file; or "local" for processes of this machine.
        workers: of a local cluster.

    Raises:
        ValueError: Dask is not installed, or there is no scheduler.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError("--dask needs the package distributed (pip install 'gi_lib[dask]')") from error
    with contextlib.ExitStack() as stack:
        try:
            if address == "local":
                local = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
                client = stack.enter_context(Client(stack.enter_context(local)))
            elif address.endswith(".json"):
                if not Path(address).is_file():  # Dask would wait for it
                    raise FileNotFoundError(f"there is no scheduler file {address}")
                client = stack.enter_context(Client(scheduler_file=address, timeout=10))
            else:
                client = stack.enter_context(Client(address, timeout=10))
        except (OSError, ValueError, TimeoutError) as error:
            raise ValueError(
                f"no Dask scheduler answers at {address!r} ({error}); start one with `dask scheduler`, or use"
                " --dask local"
            ) from error
        yield stack.enter_context(client.get_executor(pure=False))
