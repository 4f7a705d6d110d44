"""Worker processes for a study."""

import contextlib
import io
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm import tqdm


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes for `run`, each with one thread; Ctrl-C ends them at once.

    They are started afresh (spawn), so that a script which calls this needs `if __name__ == "__main__":`.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            time.sleep(0.2)  # its thread drops the cancelled cases; on those a worker's end would be an error
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which a worker that is ended would leak
    sys.stderr = _NoTerminal(io.FileIO(2, "w", closefd=False), write_through=True)


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a worker: its warnings are seen, its progress bars are not."""

    def isatty(self) -> bool:
        return False
