"""COPA (Chen, Campbell, PriML at NeurIPS 2021, 2111.10178).

As R-GAP from the last layer back, but the input x of a layer also has to fit what the
layer BEFORE it sends (marked '), the pull-back term:

    min |W x - z|^2 + |K(k) x - dL/dW|^2 + |K'(k') x' - dL/dW'|^2

with x = act'(W' x' + b') and k' = (W^T k) * dact'(z'). It gives equations where the
layer's own are too few.

Needs what R-GAP needs. The abstract is read; the terms are from memory of the
literature, no public code is known.

Departs from the paper, as far as it is known: each term is divided by the square of
what it should be, and has weight 1; the search is over x', so that x lies in the range
of the layer before; it starts at R-GAP's solution of both layers, which is where it
ends if that is exact. The image itself has no layer before it, and is R-GAP's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.grad import conv2d_weight

from gi_lib.attacks.rgap import a_chain_to_go_back, invert
from gi_lib.models.chain import Link, undo
from gi_lib.types import Needs, Observation, Reconstruction, whole


@dataclass(frozen=True)
class COPA:
    needs: ClassVar[Needs] = Needs(
        ("batch_size",), model=(a_chain_to_go_back,), batch=1
    )
    revision: ClassVar[int] = 1

    iterations: int = 200  # of L-BFGS, a layer; no value of the paper is known
    history: int = 50  # pairs of L-BFGS

    def __post_init__(self):
        whole(self, "iterations", "history")

    def __call__(self, obs: Observation, rng: torch.Generator) -> Reconstruction:
        obs.need(self)
        return invert(obs, self.pulled_back)

    def pulled_back(
        self, obs: Observation, links: list[Link], z: Tensor, k: Tensor, x: Tensor
    ) -> Tensor:
        """The input of the last of these links that fits the one before it too."""
        if len(links) == 1:
            return x
        before, link = links[-2:]
        g, g_before = (
            obs.gradient[f"{part.name}.weight"].double().reshape(part.weight.shape)
            for part in (link, before)
        )
        act = before.activation
        assert act is not None
        back = link.transposed(k[None])[0].reshape(before.output)

        def terms(at: Tensor) -> tuple[Tensor, Tensor]:
            """x and the sum of the three terms."""
            z_before = before.forward(at[None])[0] + before.bias
            out = act(z_before)
            [slope] = torch.autograd.grad(out.sum(), z_before, create_graph=True)
            x = out.reshape(link.input)
            off = (
                (link.forward(x[None])[0] - z) / z.norm(),
                (gradient(link, x, k) - g) / g.norm(),
                (gradient(before, at, back * slope) - g_before) / g_before.norm(),
            )
            return x.detach(), torch.stack([part.square().sum() for part in off]).sum()

        def value(flat):
            at = torch.from_numpy(flat).to(x).reshape(before.input).requires_grad_()
            with torch.enable_grad():
                loss = terms(at)[1]
                [slope] = torch.autograd.grad(loss, at)
            return loss.item(), slope.cpu().numpy().ravel()

        entering, slope = undo(act, x.reshape(before.output))
        start = before.solve(entering - before.bias, back * slope, g_before)
        found = minimize(
            value,
            start.cpu().numpy().ravel(),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": self.iterations,
                "maxfun": 2 * self.iterations,
                "maxcor": self.history,
                "ftol": 0,
                "gtol": 1e-15,
            },
        )
        at = torch.from_numpy(found.x).to(x).reshape(before.input).requires_grad_()
        with torch.enable_grad():
            return terms(at)[0]


def gradient(link: Link, x: Tensor, k: Tensor) -> Tensor:
    """dL/dW [out, in, height, width] of a layer with input x and dL/dz = k."""
    return conv2d_weight(x[None], link.weight.shape, k[None], **link.geometry)
