"""What every iterative attack calls: start, minimise, choose by the matching loss, report."""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gi_lib.execution import OneGuess, at_once
from gi_lib.labels import LabelRule, of_images
from gi_lib.matching import squared_l2
from gi_lib.optimise import Each, Minimum, Optimiser, minimise
from gi_lib.types import NotApplicableError, Observation, Reconstruction, Rows

CERTAIN = 1e-3
"""Relative distance of gradients under which a closed form counts as certified."""

Start = Callable[[int, torch.Generator], Tensor]
"""(R, generator) -> one variable of R starts [R, ...]."""


def search(
    obs: Observation,
    rng: torch.Generator,
    *,
    restarts: int,
    steps: int,
    start: Start | Sequence[Start] | Minimum,
    loss: OneGuess,
    match: OneGuess,
    image: OneGuess,
    labels: OneGuess | None,
    optimiser: Optimiser,
    project: Callable[..., None] | None = None,
    each: Each | None = None,
    best: bool = False,
    notes: Callable[..., dict[str, Any]] | None = None,
    frames: int = 0,
) -> Reconstruction:
    """Seek a guess from several starts, and return the one that matches best. All functions are of one guess.

    Args:
        start: how each variable begins; or where an earlier stage ended.
        loss: what is minimised; see `minimise`, which takes `project`, `each` and `best` too.
        match: the distance to the observed gradient at the image that is returned: by it restarts are compared.
        image: the variables -> images [B, C, H, W]; what lies outside [0, 1] is clipped.
        labels: the variables -> labels [B]; None seeks none.
        notes: the variables -> what else there is to say of the guess that is returned.
        frames: snapshots to keep.

    Raises:
        FloatingPointError: no start ends with a finite loss.
    """
    begin: Sequence[Tensor] | Minimum
    if isinstance(start, Minimum):
        begin = start
    else:
        begin = [draw(restarts, rng) for draw in ([start] if callable(start) else start)]
    found = minimise(
        loss,
        begin,
        optimiser=optimiser,
        steps=steps,
        project=project,
        each=each,
        rank=match,
        best=best,
        image=image,
        frames=frames,
        at_once=at_once(obs),
    )
    row = best_of(found.losses)
    chosen = [v[row] for v in found.variables]
    with torch.no_grad():
        images = image(*chosen).clamp(0, 1)
    return Reconstruction(
        images=images,
        labels=labels(*chosen) if labels else None,
        loss=found.losses[row].item(),
        trace=found.trace,
        losses=found.losses,
        frames=_frames(found, row, best).to(images).clamp(0, 1) if frames else None,
        frame_steps=found.frame_steps,
        frame_evaluations=found.frame_evaluations,
        frame_seconds=found.frame_seconds,
        gradient_evaluations=found.evaluations,
        notes=notes(*chosen) if notes else {},
    )


def _frames(found: Minimum, row: int, best: bool) -> Tensor:
    """Of each snapshot the row whose loss was the smallest then: what the attack would have returned."""
    losses = found.trace.nan_to_num(torch.inf)
    losses = losses.cummin(0).values if best else losses
    each = zip(found.frame_steps, found.frames, strict=True)  # a later stage may have fewer rows
    return torch.stack([frame[int(losses[k, : len(frame)].argmin()) if k < len(losses) else row] for k, frame in each])


def gaussian(obs: Observation, *shape: int) -> Start:
    """N(0, 1) of a shape, by default that of the images [B, C, H, W]."""
    size = shape or (obs.batch_size or 1, *obs.image_shape)
    return lambda rows, rng: torch.randn(rows, *size, generator=rng).to(obs.device, obs.dtype)


def patterned(obs: Observation, width: int, draw: Callable[..., Tensor] = torch.rand) -> Start:
    """One patch of `width` x `width` pixels, U(0, 1) or what `draw` gives, tiled and cropped to [B, C, H, W].

    The start of Wei et al. (ESORICS 2020). Width 1 is one colour; from the image's longer side on there is one tile,
    and so plain U(0, 1). A width that does not divide a side leaves a cut tile at the end.
    """
    (c, h, w), size = obs.image_shape, obs.batch_size or 1

    def begin(rows: int, rng: torch.Generator) -> Tensor:
        patch = draw(rows, size, c, width, width, generator=rng)
        tiled = patch.repeat(1, 1, 1, -(-h // width), -(-w // width))[..., :h, :w]
        return tiled.to(obs.device, obs.dtype)

    return begin


def no_more(obs: Observation, most: int) -> int:
    """So many images, or as many as the batch has, where its size is known and smaller."""
    return most if obs.batch_size is None else min(most, obs.batch_size)


def certified(obs: Observation, images: Tensor, label_rule: LabelRule) -> Reconstruction:
    """What a closed form found, with its certificate: whether these images have the observed gradient.

    Its `notes` hold "relative_error", |g(x) - g*| / |g*|, and "certified", whether that is under CERTAIN. A warning
    says when it does not hold. Both are None where the labels or the client's code are unknown.
    """
    try:
        if obs.batch_size not in (None, len(images)):  # before labels are sought, which takes longer
            raise NotApplicableError(f"{len(images)} images came back, of {obs.batch_size}")
        found = [label_rule(obs)]
        if len(found[0]) != len(images):
            raise NotApplicableError(f"{len(images)} images came back, of {len(found[0])}")
        if len(images) > 1:  # whose label is whose
            with contextlib.suppress(NotApplicableError):
                found.append(of_images(obs, images))
        losses = [squared_l2(obs.simulate(images, y), obs.gradient).detach() for y in found]
    except NotApplicableError as error:
        reason = {"certified": None, "relative_error": None, "why": str(error)}
        known = None if obs.labels is None or len(obs.labels) != len(images) else obs.labels
        return Reconstruction(images=images, labels=known, loss=math.nan, notes=reason)
    loss, y = min(zip(losses, found, strict=True), key=lambda pair: pair[0].nan_to_num(torch.inf).item())
    size = squared_l2({name: torch.zeros_like(g) for name, g in obs.gradient.items()}, obs.gradient)
    apart = (loss / size).sqrt().item()
    if not apart < CERTAIN:
        warnings.warn(
            f"the closed form does not hold here: the gradient of what it returns is {apart:.2g} of the observed one's"
            " norm away from it; the batch has several images, the update is defended, or the client did something"
            " else than is assumed",
            stacklevel=3,
        )
    return Reconstruction(
        images=images,
        labels=y,
        loss=loss.item(),
        trace=loss.reshape(1, 1),
        losses=loss.reshape(1),
        gradient_evaluations=1,
        notes={"certified": apart < CERTAIN, "relative_error": apart},
    )


def generators(rng: torch.Generator, rows: int) -> list[torch.Generator]:
    """One generator a row, for what is drawn between steps: stacked rows then see what separate ones see."""
    seeds = torch.randint(2**62, (rows,), generator=rng).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def best_of(losses: Rows) -> int:
    """The restart with the smallest loss, which is all that an attacker can go by; NaN counts as +inf.

    Raises:
        FloatingPointError: no loss is finite.
    """
    losses = torch.where(losses.isnan(), torch.inf, losses)
    if not losses.isfinite().any():
        raise FloatingPointError("no restart ended with a finite loss; lower lr, or start from other seeds")
    return int(losses.argmin())
