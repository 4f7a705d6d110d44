"""What one iteration of an attack costs, beside the least that it can cost. Writes benchmarks/speed.jsonl.

    python benchmarks/speed.py                 # about half an hour on two cores
    python benchmarks/speed.py --device cuda
    python benchmarks/speed.py lenet-b1        # one fixture

The floor of an iteration is a forward pass, the gradient with a graph, the squared distance and the gradient with
respect to the image, written in plain torch for one guess; nothing else. Every measurement is a process of its own,
in which floor and attack take turns, so that a machine that slows down slows both. Times are medians.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

from gi_lib import Batch, Observation, ThreatModel, models, observe, provenance
from gi_lib.attacks import DLG, InvertingGradients
from gi_lib.bench.cost import peak_mb, reset_peak, training_step_seconds
from gi_lib.execution import Evaluator, at_once, second_derivatives
from gi_lib.matching import squared_l2
from gi_lib.parametrisations import Pixels
from gi_lib.types import nearest

OUT = Path(__file__).with_name("speed.jsonl")
RESTARTS = (1, 4, 16, 64)
ITERATIONS = 50  # at least, where an iteration takes less than a second
SECONDS = 60.0  # what a measurement may take, but for its first ten iterations


@dataclass(frozen=True)
class Fixture:
    """A network of 10 classes with a batch of noise; `part` says what the measurement is for."""

    model: str
    batch: int
    pixels: int = 32
    restarts: int = 1
    threads: int = 1
    part: str = "table"

    @property
    def name(self) -> str:
        return f"{self.model}-b{self.batch}" + (f"-{self.pixels}px" if self.pixels != 32 else "")


NETWORKS = (
    *(("lenet", 1, 32), ("lenet", 8, 32), ("convnet", 1, 32), ("convnet", 8, 32)),
    *(("resnet18", 1, 32), ("resnet18", 4, 32), ("resnet18", 1, 224)),
)
FIXTURES = [
    *(Fixture(*network, restarts=r) for network in NETWORKS for r in RESTARTS),
    *(Fixture("resnet18", 1, restarts=r, threads=2, part="two threads") for r in (1, 16)),
    *(Fixture("lenet", b, part="batch") for b in (1, 2, 4, 8, 16, 32)),
    *(Fixture("resnet20", 1, p, part="pixels") for p in (16, 32, 64, 128)),
    *(Fixture(name, 1, part="parameters") for name in models.MODELS),
]


def observed(fixture: Fixture, device: str) -> tuple[Observation, Batch]:
    shape = (3, fixture.pixels, fixture.pixels)
    model = models.build(fixture.model, num_classes=10, image_shape=shape).to(device)
    rng = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(fixture.batch, *shape, generator=rng), torch.arange(fixture.batch) % 10)
    return observe(model, batch, threat=ThreatModel(knows_labels=True), rng=rng), batch


def wait(device: str) -> None:
    """Until a GPU has done what it was given; a processor has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def floor(obs: Observation) -> Callable[[], None]:
    parameters, observed_gradient = list(obs.model.parameters()), list(obs.gradient.values())
    start = torch.randn(obs.batch_size, *obs.image_shape, device=obs.device)

    def iteration() -> None:
        x = start.detach().requires_grad_()
        loss = F.cross_entropy(obs.model(x), obs.labels)
        simulated = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = sum((a - b).square().sum() for a, b in zip(simulated, observed_gradient, strict=True))
        torch.autograd.grad(distance, x)

    return iteration


def attack_seconds(obs: Observation, restarts: int, steps: int) -> list[float]:
    """Seconds of each iteration of Inverting Gradients, read after each projection; on a GPU only their mean."""
    rng = torch.Generator().manual_seed(0)
    if obs.device.type == "cuda":
        totals = []
        for n in (steps, 3 * steps):
            wait("cuda")
            start = time.perf_counter()
            InvertingGradients(steps=n, restarts=restarts)(obs, rng)
            wait("cuda")
            totals.append(time.perf_counter() - start)
        return [(totals[1] - totals[0]) / (2 * steps)]
    moments, project = [], Pixels.project

    def timed(self: Pixels, z: torch.Tensor) -> None:
        project(self, z)
        moments.append(time.perf_counter())

    with mock.patch.object(Pixels, "project", timed):
        InvertingGradients(steps=steps + 1, restarts=restarts)(obs, rng)
    return [after - before for before, after in itertools.pairwise(moments)]


def call_seconds(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        with second_derivatives():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            seconds.append(time.perf_counter() - start)
    return seconds


def measure(fixture: Fixture, device: str) -> dict:
    torch.set_num_threads(1)
    obs, batch = observed(fixture, device)
    at_floor = floor(obs)
    once = statistics.median(call_seconds(at_floor, device, 3))
    guess = once * fixture.restarts
    row = {**asdict(fixture), "fixture": fixture.name, "parameters": sum(g.numel() for g in obs.gradient.values())}
    if guess > SECONDS:
        return {**row, "skipped": f"an iteration would take about {guess:.0f} s"}
    rounds = 5
    per_round = min(max(2, round(SECONDS / guess / rounds)), 40)
    reset_peak(device)
    floors, iterations = [], []
    for _ in range(rounds):
        torch.set_num_threads(1)
        floors += call_seconds(at_floor, device, per_round)
        torch.set_num_threads(fixture.threads)
        iterations += attack_seconds(obs, fixture.restarts, per_round)
    torch.set_num_threads(1)
    seconds, floor_seconds = statistics.median(iterations), statistics.median(floors)
    row |= {
        "at_once": min(at_once(obs), fixture.restarts),
        "iterations": rounds * per_round,
        "iteration_ms": 1e3 * seconds,
        "floor_ms": 1e3 * floor_seconds,
        "ratio": seconds / floor_seconds,
        "restarts_per_second": fixture.restarts / seconds,
        "training_step_ms": 1e3 * training_step_seconds(obs.model, batch, device),
        "peak_memory_mb": peak_mb(device),
    }
    if fixture.restarts == 1 and fixture.part == "table" and fixture.model == "lenet":
        row |= lbfgs(obs, at_floor, device)
    return row


def lbfgs(obs: Observation, at_floor: Callable[[], None], device: str) -> dict:
    """One evaluation of DLG's loss, and one whole iteration of its L-BFGS with a full history, over the floor."""

    def loss(x):
        return squared_l2(obs.simulate(x, obs.labels), obs.gradient)

    start = torch.randn(1, obs.batch_size, *obs.image_shape).to(obs.device)
    evaluate = Evaluator(loss, [start], 1)
    attack, closures, floors, wholes = DLG(steps=10), [], [], []
    for _ in range(5):
        floors += call_seconds(at_floor, device, 40)
        closures += call_seconds(evaluate, device, 40)
        start_of_all = time.perf_counter()
        rec = attack(obs, torch.Generator().manual_seed(0))
        wait(device)
        wholes.append((time.perf_counter() - start_of_all) / rec.gradient_evaluations)
    base = statistics.median(floors)
    return {
        "closure_ratio": statistics.median(closures) / base,
        "lbfgs_iteration_ratio": statistics.median(wholes) / base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixtures", nargs="*", help="names such as lenet-b1; all where none is given")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for name in options.fixtures:
        if name not in (known_names := {f.name for f in FIXTURES}):
            parser.error(nearest(name, known_names, "fixture"))
    device = provenance.choose_device(options.device)
    wanted = [f for f in FIXTURES if not options.fixtures or f.name in options.fixtures]
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    known = [json.loads(line) for line in lines]
    what = {"versions": provenance.versions(), "commit": provenance.commit(), "precision": provenance.precision(device)}
    print(f"{'fixture':20} {'R':>3} {'iteration':>12} {'floor':>12} {'ratio':>7} {'restarts/s':>11} {'peak':>9}")
    for fixture in tqdm(wanted, disable=None):
        if fixture.threads > 1 and device != "cpu":
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            row = process.submit(measure, fixture, device).result()
        row |= {"device": provenance.device_name(device).partition(",")[0], **what}
        mine = {key: row[key] for key in (*asdict(fixture), "device")}
        known = [old for old in known if any(old[key] != value for key, value in mine.items())] + [row]
        options.out.write_text("".join(json.dumps(old) + "\n" for old in known), encoding="utf-8")
        tqdm.write(text(row))


def text(row: dict) -> str:
    label = f"{row['fixture']:20} {row['restarts']:3}"
    if "skipped" in row:
        return f"{label} {row['skipped']}"
    return (
        f"{label} {row['iteration_ms']:9.2f} ms {row['floor_ms']:9.2f} ms {row['ratio']:7.2f}"
        f" {row['restarts_per_second']:11.2f} {row['peak_memory_mb']:6.0f} MB  {row['part']}"
        + "".join(f" {key} {row[key]:.2f}" for key in ("closure_ratio", "lbfgs_iteration_ratio") if key in row)
    )


if __name__ == "__main__":
    main()
