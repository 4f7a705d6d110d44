"""How the rows of a stacked loss are computed: together or in parts, on threads, or as a replayed CUDA graph.

None of it changes a result beyond the rounding of float32.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from gi_lib.types import Rows


class Evaluator:
    """Losses of stacked rows and the gradients of those, `at_once` rows in one call of the loss.

    On a processor, rows that go one by one are shared out among torch.get_num_threads() threads, each of which
    computes alone: no pool of OpenMP threads waits, spinning, for its next small operation. Where a GPU's memory
    runs out, the number of rows in one call is halved, for this and all later calls.

    Args:
        loss: (*variables, *constants, each [r, ...]) -> [r]; row i depends on row i alone.
        variables: each [R, ...]; read anew by each call.
        constants: each [R, ...].
        at_once: at least 1.

    Attributes:
        evaluations: rows whose loss was computed.
    """

    def __init__(
        self, loss: Callable[..., Rows], variables: Sequence[Tensor], constants: Sequence[Tensor], at_once: int
    ):
        self.loss, self.variables, self.constants = loss, variables, constants
        self.at_once, self.evaluations = at_once, 0
        rows, device = len(variables[0]), variables[0].device.type
        self.own_threads, self.threads = torch.get_num_threads(), None
        threads = min(rows, self.own_threads) if at_once == 1 and device == "cpu" else 1
        if threads > 1:
            self.threads = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
            torch.set_num_threads(self.own_threads)  # what the next new thread gets

    def __call__(self, rows: Tensor | slice = slice(None)) -> tuple[Rows, list[Tensor]]:
        """Losses [r] of the chosen rows and their gradients with respect to each variable [r, ...]."""
        losses, *gradients = self._in_parts(partial(_with_gradient, self.loss, len(self.variables)), rows)
        return losses, gradients

    def losses(self, loss: Callable[..., Rows]) -> Rows:
        """The values [R] of another loss, without a gradient."""

        def compute(*part: Tensor) -> list[Tensor]:
            with torch.no_grad():  # holds for the thread that says it
                return [loss(*part)]

        return self._in_parts(compute, slice(None))[0]

    def _in_parts(self, compute: Callable[..., list[Tensor]], rows: Tensor | slice) -> list[Tensor]:
        chosen = [v.detach()[rows] for v in (*self.variables, *self.constants)]
        self.evaluations += len(chosen[0])
        while True:
            parts = zip(*(v.split(self.at_once) for v in chosen), strict=True)
            try:
                if self.threads is None:
                    done = [compute(*part) for part in parts]
                else:
                    done = list(self.threads.map(lambda part: compute(*part), parts))
            except torch.OutOfMemoryError:
                together = min(self.at_once, len(chosen[0]))
                if together == 1:
                    raise
                self.at_once = together // 2
                torch.cuda.empty_cache()
            else:
                return done[0] if len(done) == 1 else [torch.cat(same) for same in zip(*done, strict=True)]


def _with_gradient(loss: Callable[..., Rows], variables: int, *tensors: Tensor) -> list[Tensor]:
    leaves = [v.detach().requires_grad_() for v in tensors[:variables]]
    losses = loss(*leaves, *tensors[variables:])
    return [losses.detach(), *torch.autograd.grad(losses, leaves, torch.ones_like(losses))]


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
