"""Several observations of one model, sought from several starts each, as the rows of one stacked problem."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gi_lib.optimise import Minimum, best_of
from gi_lib.types import Gradient, Images, Labels, Observation, Reconstruction


class Targets:
    """T observations, each sought from R starts: row t R + r is start r of target t.

    Args:
        attack: its `restarts` are R; its `needs` must be granted.
        observations: of the same weights and the same client code, with the same batch size.
        rngs: one CPU generator for each observation.

    Attributes:
        index: [T R] int64, the target of each row.

    Raises:
        ValueError: there is none, their number is not that of the generators, or they differ in more than what the
            client sent.
        WithheldError: the threat model withholds something that the attack needs.
    """

    def __init__(self, attack: Any, observations: Sequence[Observation], rngs: Sequence[torch.Generator]):
        if not observations or len(observations) != len(rngs):
            raise ValueError(f"got {len(observations)} observations and {len(rngs)} generators; give one for each")
        first = observations[0]
        for obs in observations:
            obs.need(attack, *attack.needs)
            _same(first, obs)
        self.observations, self.rngs, self.restarts = observations, rngs, attack.restarts
        self.index = torch.arange(len(observations), device=first.device).repeat_interleave(self.restarts)
        self._gradient = first.gradient
        if len(observations) > 1:
            self._gradient = {
                name: torch.stack([obs.gradient[name] for obs in observations]) for name in first.gradient
            }

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) for every row, [T R, *shape], each target's from its own generator."""
        obs = self.observations[0]
        rows = [torch.randn(self.restarts, *shape, generator=rng) for rng in self.rngs]
        return torch.cat(rows).to(obs.device, obs.dtype)

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """One value a target, repeated for each of its rows: [T R, ...]."""
        return torch.stack(list(values)).repeat_interleave(self.restarts, dim=0)

    def gradient(self, index: Tensor) -> Gradient:
        """What was observed, for rows with these targets; without the leading axis where there is one target."""
        if len(self.observations) == 1:
            return self._gradient
        return {name: g[index] for name, g in self._gradient.items()}

    def reconstructions(
        self, found: Minimum, image: Callable[[Tensor], Images], labels: Callable[..., Labels]
    ) -> list[Reconstruction]:
        """Of each target the start with the smallest loss.

        Args:
            found: whose first variable makes the image.
            image: the first variable of a row, or its frames [F, ...] -> image, in [0, 1].
            labels: (row, *its variables) -> labels [B].
        """
        results: list[Reconstruction] = []
        for losses, trace in zip(found.losses.split(self.restarts), found.trace.split(self.restarts, 1), strict=True):
            row = len(results) * self.restarts + best_of(losses)
            chosen = [v[row] for v in found.variables]
            frames = [frame[0][row].to(chosen[0]) for frame in found.frames]
            results.append(
                Reconstruction(
                    images=image(chosen[0]),
                    labels=labels(row, *chosen),
                    loss=found.losses[row].item(),
                    trace=trace,
                    frames=image(torch.stack(frames)) if frames else None,
                    frame_steps=found.frame_steps,
                    gradient_evaluations=found.evaluations // len(self.observations),
                )
            )
        return results


def _same(first: Observation, other: Observation) -> None:
    facts = ("image_shape", "batch_size", "num_classes", "update")
    differ = [name for name in facts if getattr(first, name) != getattr(other, name)]
    if (first.labels is None) != (other.labels is None):
        differ.append("labels")
    weights = zip(first.model.state_dict().values(), other.model.state_dict().values(), strict=False)
    same = first.gradient.keys() == other.gradient.keys() and first.model.training == other.model.training
    if not (same and all(torch.equal(a, b) for a, b in weights)):
        differ.append("model")
    if differ:
        raise ValueError(f"observations that are attacked together differ in {', '.join(differ)}; attack them apart")
