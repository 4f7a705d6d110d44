"""What an attack costs: the processor's time, in units of a training step too, and memory."""

import statistics
import sys

import torch
from torch import nn

from gi_lib.execution import clock
from gi_lib.types import Batch

ENOUGH = 5.0  # seconds of steps after which no other is measured


def training_step_seconds(model: nn.Module, batch: Batch, device: str, repeats: int = 10) -> float:
    """Median time of a forward and a backward pass of `model` on `batch`, by `clock`.

    Of `repeats` passes after one to warm up; of fewer where these come to ENOUGH, and of the first alone where it does.
    """
    p = next(model.parameters())
    images, labels = batch.images.to(p.device, p.dtype), batch.labels.to(p.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds: list[float] = []
    while len(seconds) <= repeats and sum(seconds) < ENOUGH:
        start = clock(device)
        torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), parameters, allow_unused=True)
        seconds.append(clock(device) - start)
    return statistics.median(seconds[1:] or seconds)


def reset_peak(device: str) -> None:
    """Forget the peak so far, where that can be done: on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: str) -> float | None:
    """Peak memory in MiB: on a GPU since `reset_peak`, else of the process so far; None where unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
