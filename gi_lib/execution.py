"""How a loss of one guess is computed for many: stacked or one by one, on threads, or as a replayed CUDA graph.

None of it changes a result beyond rounding.
"""

import contextlib
import math
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gi_lib.types import NotApplicableError, Observation, Rows

OneGuess = Callable[..., Tensor]
"""(*variables, each without the axis of rows) -> a scalar."""

STACKED_ENTRIES = 2**22
"""Entries of the stacked gradient (16 MiB in float32) up to which stacking rows pays on a processor."""


def at_once(obs: Observation) -> int:
    """How many guesses are simulated best in one call.

    On a processor stacking saves calls while a row is small, and loses to memory traffic and grouped
    convolutions when it is not: rows are stacked up to STACKED_ENTRIES of gradient. A GPU takes them all. Several local
    steps are stacked as far as the memory goes, and one by one where each step is computed again.

    Raises:
        NotApplicableError: the local steps of one guess don't fit into the memory that is free.
    """
    rows = 2**31
    if obs.device.type == "cpu":
        rows = max(1, STACKED_ENTRIES // sum(g.numel() for g in obs.gradient.values()))
    if obs.graph is None:
        return rows
    free = free_bytes(obs.device)
    if obs.graph.bytes > free:
        raise NotApplicableError(
            f"to simulate {obs.graph.steps} local steps takes about {obs.graph.bytes / 2**30:.2g} GiB"
            f"{', though each is computed twice' if obs.graph.recompute else ''}, and {free / 2**30:.2g} GiB are free:"
            " use SME or AGIC, which take the update as one gradient, or a machine with more memory"
        )
    return 1 if obs.graph.recompute else int(min(rows, free // obs.graph.bytes))


class _Saved:
    """A tensor that autograd keeps, in something that tells whether it still does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()


def kept_bytes(compute: Callable[[], object]) -> int:
    """What autograd keeps of a computation while its result is held: each piece of memory once."""
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        alive.add(saved := _Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = compute()
    storages = [saved.tensor.untyped_storage() for saved in alive]
    del result
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device; infinite where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:  # not Linux
        return math.inf
    return float(told.partition("MemAvailable:")[2].split()[0]) * 2**10


def lift(loss: OneGuess) -> Callable[..., Rows]:
    """The loss of r stacked rows, each variable [r, ...] -> [r]. One row runs without vmap, which is cheaper.

    What a model draws while it runs is the same in every row, so that stacked rows equal separate ones.
    """
    stacked = torch.func.vmap(loss, randomness="same")
    return lambda *rows: stacked(*rows) if len(rows[0]) > 1 else loss(*(v[0] for v in rows)).unsqueeze(0)


def in_functorch() -> bool:
    """Whether a transform of torch.func is at work, under which parameters are not the model's own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Evaluator:
    """Losses of rows and the gradients of those, `at_once` rows in one call of the lifted loss.

    On a processor, rows that go one by one are shared out among torch.get_num_threads() threads, each of which
    computes alone: no pool of OpenMP threads waits, spinning, for its next small operation. Where a GPU's memory
    runs out, the number of rows in one call is halved, for this and all later calls. Where rows can't be stacked,
    since the model asks for a value or branches on one, they go one by one, with a warning.

    Args:
        loss: of one guess.
        variables: each [R, ...]; read anew by each call.
        at_once: at least 1.

    Attributes:
        evaluations: rows whose loss was computed.
    """

    def __init__(self, loss: OneGuess, variables: Sequence[Tensor], at_once: int):
        self.loss, self.variables = lift(loss), variables
        self.at_once, self.evaluations = at_once, 0
        rows, device = len(variables[0]), variables[0].device.type
        self.own_threads = torch.get_num_threads()
        self.threads: ThreadPoolExecutor | None = None
        threads = min(rows, self.own_threads) if at_once == 1 and device == "cpu" else 1
        if threads > 1:
            self.threads = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
            torch.set_num_threads(self.own_threads)  # what the next new thread gets

    def __call__(self, rows: Tensor | slice = slice(None)) -> tuple[Rows, list[Tensor]]:
        """Losses [r] of the chosen rows and their gradients with respect to each variable [r, ...]."""
        losses, *gradients = self._in_parts(partial(_with_gradient, self.loss), rows)
        return losses, gradients

    def losses(self, loss: OneGuess) -> Rows:
        """The values [R] of another loss, without a gradient."""
        lifted = lift(loss)

        def compute(*part: Tensor) -> list[Tensor]:
            with torch.no_grad():  # holds for the thread that says it
                return [lifted(*part)]

        return self._in_parts(compute, slice(None))[0]

    def _in_parts(self, compute: Callable[..., list[Tensor]], rows: Tensor | slice) -> list[Tensor]:
        chosen = [v.detach()[rows] for v in self.variables]
        self.evaluations += len(chosen[0])
        while True:
            together = min(self.at_once, len(chosen[0]))
            parts = zip(*(v.split(self.at_once) for v in chosen), strict=True)
            try:
                if self.threads is None:
                    done = [compute(*part) for part in parts]
                else:
                    done = list(self.threads.map(lambda part: compute(*part), parts))
            except torch.OutOfMemoryError:
                if together == 1:
                    raise
                self.at_once = together // 2
                torch.cuda.empty_cache()
            except RuntimeError as error:
                if together == 1:
                    raise
                self.at_once = 1
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"{together} guesses of this model can't be stacked, and go one by one: {reason}", stacklevel=2
                )
            else:
                return done[0] if len(done) == 1 else [torch.cat(same) for same in zip(*done, strict=True)]


def _with_gradient(loss: Callable[..., Rows], *variables: Tensor) -> list[Tensor]:
    leaves = [v.detach().requires_grad_() for v in variables]
    with torch.enable_grad():
        losses = loss(*leaves)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, torch.ones_like(losses))]


_ATTENTION = threading.Lock()
_FLAGS = tuple(
    (getattr(torch.backends.cuda, f"{name}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{name}_sdp"), keep)
    for name, keep in (("flash", False), ("mem_efficient", False), ("cudnn", False), ("math", True))
)
_users = 0
_before: list[bool] = []


@contextlib.contextmanager
def second_derivatives() -> Iterator[None]:
    """Attention takes the only path that has a second derivative, until the last of all threads has left.

    torch.nn.attention.sdpa_kernel does so for one thread: of two that overlap, one restores what the other had set.
    """
    global _users
    with _ATTENTION:
        _users += 1
        if _users == 1:
            _before[:] = [enabled() for enabled, _, _ in _FLAGS]
            for _, enable, keep in _FLAGS:
                enable(keep)
    try:
        yield
    finally:
        with _ATTENTION:
            _users -= 1
            if _users == 0:
                for (_, enable, _), value in zip(_FLAGS, _before, strict=True):
                    enable(value)


def clock(device: torch.device | str) -> float:
    """Seconds of this processor's time; on a GPU wall seconds, once it has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time() if torch.get_num_threads() == 1 else time.process_time()


WARM_UP = 3  # iterations before a capture, as torch's notes on CUDA graphs ask for


class Replayed:
    """An iteration on a GPU, captured after a few calls as a CUDA graph and replayed from then on.

    A replay starts all kernels of an iteration at once, where small kernels otherwise wait for the processor that
    launches them. Where the capture fails, the iterations go on one by one, and a warning says why.

    Args:
        iterate: () -> a tensor; works in place on tensors that stay where they are, and never waits for the GPU.
    """

    def __init__(self, iterate: Callable[[], Tensor]):
        self.iterate, self.calls, self.stream = iterate, 0, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._aside()
        if self.calls == WARM_UP + 1:
            self._capture()
        if self.graph is None or self.result is None:
            return self.iterate()
        self.graph.replay()
        return self.result.clone()

    def _aside(self) -> Tensor:
        """On a stream of its own, as a capture must be prepared for."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.iterate()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.result = self.iterate()
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"the iteration can't be replayed as a CUDA graph, and runs step by step: {reason}", stacklevel=4
            )
        else:
            self.graph = graph
