"""What clients compute: the rule of one step, its optimiser, one client and several, and the memory that steps take."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gi_lib.copies import drawing, forward, own_parameters
from gi_lib.execution import free_bytes, in_functorch, kept_bytes, second_derivatives
from gi_lib.types import Classifier, ClientUpdate, Gradient, Graph, Order, Parameters, Rule, differing, real, whole


@dataclass(frozen=True)
class LossGradient:
    """The rule of one step: g = d/dtheta 1/B sum_b loss(f_theta(x_b), y_b); the loss is the cross-entropy.

    `loss_gradient` is this rule; `loss_gradient.of(loss)` takes another loss: (logits [B, K], labels [B] or soft
    labels [B, K]) -> a scalar.
    """

    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    """The mean over the batch of one scalar an image, as the cross-entropy's."""
    revision = 1

    def of(self, loss: Callable[[Tensor, Tensor], Tensor]) -> "LossGradient":
        return LossGradient(loss)

    def value(self, model: nn.Module, theta: Gradient, images: Tensor, labels: Tensor) -> Tensor:
        """What is differentiated, a scalar."""
        return self.loss(forward(model, images, theta), labels)

    def __call__(self, model: nn.Module, theta: Gradient, images: Tensor, labels: Tensor) -> Gradient:
        """Under vmap only torch.func.grad works; outside it plain autograd is 1.5 to 1.9 times faster on a CPU."""
        if in_functorch():
            return torch.func.grad(lambda theta: self.value(model, theta, images, labels))(dict(theta))
        value = self.value(model, theta, images, labels)
        found = torch.autograd.grad(
            value, list(theta.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(theta, found, strict=True))


loss_gradient = LossGradient()


@dataclass(frozen=True)
class SGD:
    """A client's stochastic gradient descent, as torch.optim.SGD has it."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self):
        real(self, "momentum", "dampening", "weight_decay")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(f"Nesterov's momentum needs momentum > 0 and no dampening, got {self}")

    def direction(self, theta: Gradient, g: Gradient, state: list[Gradient], step: int) -> Gradient:
        """What is subtracted from theta, over the rate; `state` goes from step to step."""
        if self.weight_decay:
            g = {name: d + self.weight_decay * theta[name] for name, d in g.items()}
        if not self.momentum:
            return g
        if step:
            [velocity] = state
            velocity = {name: self.momentum * velocity[name] + (1 - self.dampening) * d for name, d in g.items()}
        else:
            velocity = g
        state[:] = [velocity]
        return {n: d + self.momentum * velocity[n] for n, d in g.items()} if self.nesterov else velocity


PLAIN = SGD()


@dataclass(frozen=True)
class Adam:
    """A client's Adam (Kingma, Ba, ICLR 2015), as torch.optim.Adam has it; `decoupled` as AdamW."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self):
        real(self, "beta1", "beta2", "weight_decay")
        real(self, "eps", above=0)
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ValueError(f"Adam needs beta1 < 1 and beta2 < 1, got {self}")

    def direction(self, theta: Gradient, g: Gradient, state: list[Gradient], step: int) -> Gradient:
        """As SGD's."""
        if self.weight_decay and not self.decoupled:
            g = {name: d + self.weight_decay * theta[name] for name, d in g.items()}
        m, v = state or ({name: torch.zeros_like(d) for name, d in g.items()},) * 2
        m = {name: self.beta1 * m[name] + (1 - self.beta1) * d for name, d in g.items()}
        v = {name: self.beta2 * v[name] + (1 - self.beta2) * d * d for name, d in g.items()}
        state[:] = [m, v]
        bias1, bias2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
        found = {}
        for name in g:
            # The square root has no derivative at 0, where a gradient is exactly 0.
            some = v[name] > 0
            root = torch.where(some, torch.where(some, v[name], 1.0).sqrt(), 0.0) / bias2**0.5
            found[name] = m[name] / bias1 / (root + self.eps)
            if self.weight_decay and self.decoupled:
                found[name] = found[name] + self.weight_decay * theta[name]
        return found


@dataclass(frozen=True)
class Client:
    """What one client computes: a rule of one step, and how often and on what it is applied.

    Client() is FedSGD: it sends one gradient. Client(steps=8, lr=0.01) is FedAvg (McMahan et al., AISTATS 2017,
    arXiv:1602.05629): theta_(t+1) = theta_t - lr d_t for T steps, through the batch in order and round again. What is
    sent is (theta_0 - theta_T) / lr, so that one step of plain descent gives exactly the rule's gradient.

    Args:
        rule: the gradient of one step; `loss_gradient`, that of the mean cross-entropy.
        steps: T, at least 1.
        lr: learning rate, above 0.
        local_batch: images a step; None takes the whole batch in every step. The last of an epoch may be smaller.
        shuffle: whether each epoch takes the images in a new order, drawn from the client's generator.
        optimiser: SGD or Adam.
    """

    rule: Rule = loss_gradient
    steps: int = 1
    lr: float = 1.0
    local_batch: int | None = None
    shuffle: bool = False
    optimiser: SGD | Adam = PLAIN

    def __post_init__(self):
        whole(self, "steps")
        real(self, "lr", above=0)
        if self.local_batch is not None:
            whole(self, "local_batch")
        if not callable(self.rule) or not isinstance(self.optimiser, SGD | Adam) or not isinstance(self.shuffle, bool):
            raise ValueError(
                f"a client needs a rule, SGD or Adam as optimiser, and shuffle True or False, got {self!r}"
            )

    def __str__(self) -> str:
        more = differing(self)
        name = "FedAvg" if self.steps > 1 or "optimiser" in more else "FedSGD"
        if self.steps == 1 and "optimiser" not in more:
            more.pop("lr", None)
        if "optimiser" in more:
            settings = ", ".join(f"{k}={v}" for k, v in differing(self.optimiser).items())
            more["optimiser"] = f"{type(self.optimiser).__name__}({settings})"
        return f"{name}({', '.join(f'{k}={v}' for k, v in more.items())})" if more else name

    def schedule(self, size: int, rng: torch.Generator | None = None) -> Order:
        """Which of `size` images enter each step; shuffled where the client does so and `rng` is given."""
        n = min(self.local_batch or size, size)
        order: list[Tensor] = []
        while len(order) < self.steps:
            epoch = torch.randperm(size, generator=rng) if self.shuffle and rng else torch.arange(size)
            order += epoch.split(n)
        return tuple(order[: self.steps])

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        theta: Gradient | None = None,
        order: Order | None = None,
        rng: torch.Generator | None = None,
        recompute: bool = False,
    ) -> Gradient:
        """What the client sends for images [B, C, H, W] in [0, 1] and labels [B] or soft labels [B, K].

        Args:
            theta: where it starts; None takes the model's own parameters.
            order: the images of each step; None takes them in turn.
            rng: what the client's own randomness draws from. Without it, as in an attacker's simulation, a rule's
                noise is left out, and what the model draws is the same at each call.
            recompute: whether autograd keeps the parameters of each step alone, and computes the rest of it again when
                it goes back: less memory for about a third more time, and first derivatives only. Stacked guesses don't
                do so.
        """
        theta = own_parameters(model) if theta is None else theta
        if not in_functorch() and not all(p.requires_grad for p in theta.values()):
            theta = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in theta.items()}
        graph = torch.is_grad_enabled()
        state: list[Gradient] = []
        noisy = {"rng": rng} if rng is not None and _takes(self.rule, "rng") else {}
        whole_batch = order is None and (self.local_batch or len(images)) >= len(images)
        parts = () if whole_batch else order or self.schedule(len(images))
        total: Gradient | None = None

        def directed(t: int, x: Tensor, y: Tensor, theta: Gradient, state: list[Gradient]) -> tuple[Gradient, list]:
            g = self.rule(model, theta, x, y, **noisy)
            if not isinstance(g, Mapping) or g.keys() != theta.keys():
                raise ValueError("a client's rule returns one gradient for each name in theta, in a dict")
            state = list(state)
            return g if self.optimiser == PLAIN else self.optimiser.direction(theta, g, state, t), state

        if recompute and not in_functorch():
            directed = partial(_computed_twice, directed)
        with torch.enable_grad(), second_derivatives(), drawing(model, rng):
            for t in range(self.steps):
                x, y = (images, labels) if whole_batch else (v[parts[t].to(v.device)] for v in (images, labels))
                d, state = directed(t, x, y, theta, state)
                total = d if total is None else {name: total[name] + d[name] for name in d}
                if t + 1 < self.steps:
                    theta = {name: p - self.lr * d[name] for name, p in theta.items()}
                if not graph and not in_functorch():  # no step needs the graph of those before it
                    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
                    total, *state = ({name: v.detach() for name, v in some.items()} for some in (total, *state))
        assert total is not None
        if graph and images.requires_grad and not any(g.requires_grad for g in total.values()):
            raise RuntimeError(
                "the client's rule returned a gradient that does not depend on the images for autograd; compute it"
                " with create_graph=True, and don't detach it"
            )
        return total if graph else {name: g.detach() for name, g in total.items()}

    def one_gradient(self) -> "Client":
        """A client of one plain step on the whole batch, by the same rule: what stands in for many steps."""
        return Client(rule=self.rule)


FEDSGD = Client()
"""One gradient of the whole batch."""


@dataclass(frozen=True)
class Clients:
    """The mean of what several clients send, each weighted by its number of images, as secure aggregation lets it be.

    Args:
        client: what each of them computes.
        sizes: how many images each has, in turn.
        thetas: what each starts from, where a server has sent them different models.
    """

    client: Client
    sizes: tuple[int, ...]
    thetas: tuple[Gradient, ...] = field(default=(), compare=False, repr=False)

    def schedule(self, rng: torch.Generator | None = None) -> Order:
        """The steps of the first client, then of the second, and so on."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        parts = zip(self.sizes, starts, strict=True)
        return tuple(start + step for size, start in parts for step in self.client.schedule(size, rng))

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        theta: Gradient | None = None,
        order: Order | None = None,
        recompute: bool = False,
    ) -> Gradient:
        if self.thetas and theta is not None:
            raise ValueError("each of these clients starts from a model of its own; theta can't replace them")
        order, steps = order or self.schedule(), self.client.steps
        sent = []
        for i in range(len(self.sizes)):
            own = self.thetas[i] if self.thetas else theta
            mine = order[i * steps : (i + 1) * steps]
            sent.append(self.client(model, images, labels, theta=own, order=mine, recompute=recompute))
        return weighted_mean(sent, self.sizes)

    @property
    def steps(self) -> int:
        """Of all of them together."""
        return self.client.steps * len(self.sizes)

    @property
    def lr(self) -> float:
        """Of each of them."""
        return self.client.lr

    def one_gradient(self) -> Client:
        """As Client's, with the images of all."""
        return self.client.one_gradient()


class _Again(torch.autograd.Function):
    """A computation of which its inputs alone are kept, so that it is done again on the way back.

    torch.utils.checkpoint keeps more where gradients are taken inside.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., list[Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        with torch.enable_grad():
            return tuple(v.detach() for v in compute(*(v.detach().requires_grad_(v.requires_grad) for v in inputs)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [v.detach().requires_grad_(need) for v, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad(), second_derivatives():
            results = zip(ctx.compute(*inputs), grads, strict=True)
        outputs, grads = zip(*((v, g) for v, g in results if v.requires_grad), strict=True)
        found = iter(torch.autograd.grad(outputs, [v for v in inputs if v.requires_grad], grads, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


def _computed_twice(
    directed: Callable, t: int, x: Tensor, y: Tensor, theta: Gradient, state: list[Gradient]
) -> tuple[Gradient, list[Gradient]]:
    """A step of a client, (direction, state), whose graph is not kept."""
    names = list(theta)

    def flat(parts: Iterable[Gradient]) -> list[Tensor]:
        return [part[name] for part in parts for name in names]

    def apart(values: Sequence[Tensor]) -> list[Gradient]:
        starts = range(0, len(values), len(names))
        return [dict(zip(names, values[start : start + len(names)], strict=True)) for start in starts]

    def compute(x: Tensor, y: Tensor, *values: Tensor) -> list[Tensor]:
        theta, *state = apart(values)
        d, state = directed(t, x, y, theta, state)
        return flat((d, *state))

    d, *state = apart(_Again.apply(compute, x, y, *flat((theta, *state))))
    return d, state


def graph_of(client: ClientUpdate | None, model: Classifier, images: Tensor) -> Graph | None:
    """What autograd keeps of one guess while local steps are simulated, measured on one of them.

    Every step keeps as much. Where that is more than half of the memory that is free, the steps are computed again on
    the way back, if less is kept so: of each step its parameters, and what the optimiser remembers.

    Args:
        images: as many as the client has.

    Returns:
        None for one step, and where it can't be told.
    """
    if not isinstance(client, Client | Clients) or client.steps == 1:
        return None
    own = client if isinstance(client, Client) else client.client
    part = images[: own.local_batch].clone().requires_grad_()
    labels = torch.zeros(len(part), dtype=torch.int64, device=part.device)
    try:
        step = kept_bytes(lambda: replace(own, steps=1, optimiser=PLAIN)(model, part, labels))
    except (RuntimeError, ValueError):  # a rule by torch.func lets nobody look; batch norm refuses a single value
        return None
    theta = sum(p.numel() * p.element_size() for p in Parameters(model).values())
    adam = isinstance(own.optimiser, Adam)
    whole = client.steps * (step + 6 * adam * theta)  # m, v, and what their quotient keeps
    again = client.steps * (3 if adam else 1) * theta + step
    if again < whole and whole > free_bytes(images.device) / 2 and not model.draws:
        return Graph(client.steps, again, recompute=True)
    return Graph(client.steps, whole)


def weighted_mean(updates: Sequence[Gradient], sizes: Sequence[int]) -> Gradient:
    """sum_i n_i g_i / sum_i n_i."""
    if len(updates) == 1:
        return updates[0]
    total = sum(sizes)
    return {
        name: torch.stack([n / total * update[name] for n, update in zip(sizes, updates, strict=True)]).sum(0)
        for name in updates[0]
    }


def _takes(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
