"""What clients compute and what of it the attacker sees.

`observe` is the only way from a Batch to an Observation; `receive` makes one of an update that came from elsewhere.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gi_lib.copies import (
    BatchNorm,
    attackers_copy,
    batch_norms,
    batch_statistics,
    bn_statistics,
    drawing,
    forward,
    functional_copy,
    inputs_of_batch_norms,
    masks,
    number_of_logits,
    own_parameters,
    strange_norms,
    unwrapped,
)
from gi_lib.execution import free_bytes, in_functorch, kept_bytes, second_derivatives
from gi_lib.labels import loss_scale
from gi_lib.models import wrap
from gi_lib.types import (
    Auxiliary,
    Batch,
    Classifier,
    ClientUpdate,
    Gradient,
    Graph,
    Needs,
    Observation,
    Order,
    Parameters,
    Rule,
    Sent,
    Statistics,
    check_shape,
    differing,
    real,
    whole,
)

revision = 1
"""Of what clients compute: raised when it changes, so that all cases run again."""


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

    Every step keeps as much. Where that is more than half of the memory that is free, and where it is less, the steps
    are computed again on the way back: of each only its parameters are kept, and what the optimiser remembers.

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


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker knows or can do besides the shared update and the model. The default is the batch size.

    Each fact grants one field of the Observation. `letter` places it in the taxonomy of Carletti et al. (USENIX
    Security 2025); their H is G with the choice of who takes part, which changes who is attacked, and nothing here.
    """

    knows_labels: bool = False
    """Which labels there are, in ascending order; not whose they are."""
    knows_batch_size: bool = True
    knows_training_details: bool = False
    """Steps, rate, local batch size and optimiser of FedAvg; a FedSGD client has none to know."""
    knows_order: bool = False
    """Which image enters which local step."""
    knows_bn_stats: bool = False
    """Batch-norm statistics of the private batch."""
    knows_buffers: bool = False
    """Running statistics of the batch norms after the round, as an update of the whole state holds them."""
    knows_defense: bool = False
    """What the client does to its data or its update."""
    has_auxiliary_data: bool = False
    malicious_server: bool = False
    """The server may change the model that it sends."""
    many_rounds: bool = False
    """Updates of the same data from several rounds."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise ValueError(f"ThreatModel needs {name}, True or False, got {value!r}")

    @property
    def letter(self) -> str:
        """The weakest of the models A to G that grants all of these facts.

        A eavesdropper; B knows basic facts (here: labels, the defense); C training details; D surrogate data; E
        statistics of the client's data; F changes the model; G that with surrogate data.
        """
        if self.malicious_server:
            return "G" if self.has_auxiliary_data or self.knows_bn_stats or self.knows_buffers else "F"
        if self.knows_bn_stats or self.knows_buffers:
            return "E"
        if self.has_auxiliary_data:
            return "D"
        if self.knows_training_details or self.knows_order:
            return "C"
        return "B" if self.knows_labels or self.knows_defense else "A"


def granted(attack: Any, *, labels: bool = False, details: bool = False) -> ThreatModel:
    """The least threat model under which an attack runs, besides what the caller grants."""
    facts: tuple[str, ...] = getattr(attack, "needs", Needs()).facts
    return ThreatModel(
        knows_labels=labels or "labels" in facts,
        knows_training_details=details,
        knows_order="order" in facts,
        knows_bn_stats="bn_stats" in facts,
        knows_buffers="buffers" in facts,
        knows_defense="defense" in facts,
        has_auxiliary_data="auxiliary" in facts or hasattr(attack, "plant"),
        malicious_server="trapdoor" in facts,
    )


def observe(
    models: nn.Module | Sequence[nn.Module],
    batches: Batch | Sequence[Batch],
    *,
    client: Client = Client(),
    threat: ThreatModel = ThreatModel(),
    defense: Any = None,
    trapdoor: object = None,
    auxiliary: Auxiliary | None = None,
    earlier: Sequence[Observation] = (),
    rng: torch.Generator,
) -> Observation:
    """Let clients compute and defend their updates, and hand the attacker what the threat model grants.

    Batch norm works in the mode that the model is in: running statistics in eval mode, the batch's own in train
    mode. Dropped units, shuffling, sampling layers and a defense's noise draw from `rng` alone.

    Args:
        models: a classifier of images in [0, 1] (models.build or models.wrap), or one for each client.
        batches: the private images and labels, of one client or of several; of several the attacker sees the mean.
        client: what each client computes; FedSGD unless said otherwise.
        threat: by default the batch size and nothing else.
        defense: a gi_lib.defenses.Defense; None sends the update as it is.
        trapdoor: what a malicious attack's `plant` returned beside its model.
        auxiliary: data of the attacker's own.
        earlier: what was observed in other rounds on the same data.
        rng: the clients' randomness, a CPU generator.

    Raises:
        ValueError: a label is out of range, the model can't be attacked (it says why), the update is not finite, or
            the threat model and what is given don't agree.
    """
    batches = [batches] if isinstance(batches, Batch) else list(batches)
    models = [models] * len(batches) if isinstance(models, nn.Module) else list(models)
    _check_request(models, batches, client, threat, defense, trapdoor, auxiliary, earlier)
    shape: tuple[int, int, int] = tuple(batches[0].images.shape[1:])  # type: ignore[assignment]
    client_run = client
    if defense is not None:
        defended = {key: defense.on_model(model) for key, model in {id(model): model for model in models}.items()}
        models, client_run = [defended[id(model)] for model in models], defense.on_client(client)
    probed = _local(client, [len(batch) for batch in batches])
    seen: list[tuple[Classifier, Classifier]] = []  # what the attacker gets, and what trains
    for i, model in enumerate(models):
        if i and model is models[i - 1]:
            seen.append(seen[-1])
            continue
        copy = attackers_copy(model, shape, min(2, *probed))
        own = copy
        if copy.draws or masks(model):
            own = functional_copy(model)
            own.draws = True
        seen.append((copy, own))
    _check_labels(torch.cat([batch.labels for batch in batches]), seen[0][0].num_classes)
    trained = [_trained(batch, copy, defense, rng) for batch, (copy, _) in zip(batches, seen, strict=True)]
    sizes = tuple(len(x) for x, _ in trained)
    labels = torch.cat([_hard(y, batch) for batch, (_, y) in zip(batches, trained, strict=True)]).cpu()
    order = Clients(client_run, sizes).schedule(rng)
    updates, buffers, images = [], [], []
    for i, ((x, y), (_, own)) in enumerate(zip(trained, seen, strict=True)):
        steps = order[i * client_run.steps : (i + 1) * client_run.steps]
        local = tuple(step - sum(sizes[:i]) for step in steps)
        with inputs_of_batch_norms(detached=True) as passes, torch.no_grad():
            update = client_run(own, x, y, order=local, rng=rng)
        updates.append(update if defense is None else defense.on_update(update, Sent(own, x, y), rng))
        buffers.append(_running_statistics(own, passes) if threat.knows_buffers else {})
        images.append(x)
    copy = seen[0][0]
    if (threat.knows_bn_stats or threat.knows_buffers) and (strange := strange_norms(copy)):
        raise ValueError(
            f"the statistics of {', '.join(strange)} can't be read: it is a batch norm of somebody's own; put"
            " torch.nn's in its place, or don't grant knows_bn_stats and knows_buffers"
        )
    with torch.no_grad():
        statistics = bn_statistics(copy, torch.cat(images)) if threat.knows_bn_stats else None
    ranks = labels.argsort(stable=True).argsort()  # image i is slot ranks[i] of the attacker's guess
    known = client_run if threat.knows_defense else client
    several = Clients(known, sizes, _different(seen))
    granted = _granted_client(threat, known, several, copy)
    return Observation(
        gradient=weighted_mean(updates, sizes),
        model=copy,
        client=granted,
        graph=graph_of(granted, copy, images[0]),
        image_shape=shape,
        batch_size=len(labels) if threat.knows_batch_size else None,
        num_classes=copy.num_classes,
        labels=labels.sort().values.to(next(copy.parameters()).device) if threat.knows_labels else None,
        order=tuple(ranks[step] for step in order) if threat.knows_order else None,
        bn_stats=statistics,
        buffers=_mean_statistics(buffers, sizes) if threat.knows_buffers else None,
        defense=defense if threat.knows_defense else None,
        auxiliary=auxiliary if threat.has_auxiliary_data else None,
        earlier=tuple(earlier) if threat.many_rounds else (),
        trapdoor=trapdoor,
    )


def _check_request(
    models: Sequence[nn.Module],
    batches: Sequence[Batch],
    client: Client,
    threat: ThreatModel,
    defense: Any,
    trapdoor: object,
    auxiliary: Auxiliary | None,
    earlier: Sequence[Observation],
) -> None:
    if not isinstance(client, Client) or not isinstance(threat, ThreatModel):
        raise ValueError(f"observe needs a Client and a ThreatModel, got {client!r:.60} and {threat!r:.60}")
    if defense is not None and not hasattr(defense, "on_update"):
        raise ValueError(f"observe needs a Defense of gi_lib.defenses with its settings, or None, got {defense!r:.60}")
    if not batches or not all(isinstance(batch, Batch) for batch in batches):
        raise ValueError("observe needs the private Batch of at least one client")
    if len(models) != len(batches):
        raise ValueError(f"got {len(models)} models for {len(batches)} clients; give one for all, or one for each")
    if len({tuple(batch.images.shape[1:]) for batch in batches}) > 1:
        raise ValueError("the clients' images have different shapes; resize them")
    if trapdoor is not None and not threat.malicious_server:
        raise ValueError(
            "a trapdoor was planted, and the threat model has an honest server; observe with"
            " ThreatModel(malicious_server=True)"
        )
    if threat.has_auxiliary_data and auxiliary is None:
        raise ValueError(
            "the threat model grants auxiliary data, and there is none; pass auxiliary=data.Surrogate(...)"
        )
    if threat.many_rounds and not earlier:
        raise ValueError("the threat model grants many rounds, and there is one; pass earlier=[...]")


def _local(client: Client, sizes: Sequence[int]) -> list[int]:
    """The smallest number of images in a step."""
    return [len(step) for size in sizes for step in client.schedule(size)]


def _check_labels(labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels run from {low} to {high}, but the model has classes 0 to {num_classes - 1}")


def _trained(batch: Batch, copy: Classifier, defense: Any, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images and labels that a client trains on, on its model's device."""
    p = next(copy.parameters())
    x, y = batch.images.to(p.device, p.dtype), batch.labels.to(p.device)
    if defense is None:
        return x, y
    images, labels = defense.on_batch(x, y, rng)
    hard = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    soft = labels.is_floating_point() and labels.shape == (len(images), copy.num_classes)
    if not len(images) or images.shape[1:] != x.shape[1:] or images.dtype != x.dtype or not (hard or soft):
        raise ValueError(
            f"{type(defense).__name__}.on_batch must return images [n, {', '.join(map(str, x.shape[1:]))}] and labels"
            f" int64 [n] or float [n, {copy.num_classes}], got {list(images.shape)} and {list(labels.shape)}"
        )
    return images, labels


def _hard(labels: Tensor, batch: Batch) -> Tensor:
    """Labels [n] of what a client trains on: its own where a defense has made them soft and none were added."""
    if labels.ndim == 1:
        return labels
    return batch.labels.to(labels.device) if len(labels) == len(batch) else labels.argmax(1)


def _different(seen: Sequence[tuple[Classifier, Classifier]]) -> tuple[Gradient, ...]:
    """The parameters of each client's model, where these differ."""
    copies = [copy for copy, _ in seen]
    if all(copy is copies[0] for copy in copies):
        return ()
    thetas = [dict(Parameters(copy)) for copy in copies]
    first, *others = ({n: v for n, v in copy.state_dict().items() if n not in thetas[0]} for copy in copies)
    fits = all(
        theta.keys() == thetas[0].keys() and all(p.shape == thetas[0][n].shape for n, p in theta.items())
        for theta in thetas
    )
    if not fits or any(
        rest.keys() != first.keys() or not all(torch.equal(rest[n], v) for n, v in first.items()) for rest in others
    ):
        raise ValueError(
            "the clients' models may differ in the values of their trainable parameters, and in nothing else"
        )
    return tuple(thetas)


def _granted_client(threat: ThreatModel, client: Client, several: Clients, model: Classifier) -> ClientUpdate | None:
    """FedSGD has no details to know. The mean over several such clients is one client's with all images where a
    gradient is a mean over images; elsewhere how many images each has is a detail too."""
    one_step = client.steps == 1 and client.optimiser == PLAIN
    one_step &= (client.local_batch or max(several.sizes)) >= max(several.sizes)
    if len(several.sizes) == 1:
        return client if one_step or threat.knows_training_details else None
    if threat.knows_training_details or (one_step and threat.knows_order):
        return several
    mixes = bool(strange_norms(model)) or any(norm.own_statistics for norm in batch_norms(model).values())
    return client if one_step and client.rule == loss_gradient and not mixes and not several.thetas else None


def _running_statistics(model: Classifier, passes: Sequence[tuple[BatchNorm, Tensor]]) -> Statistics:
    """What the running statistics are after these passes: in train mode each moves them, by its own batch's."""
    after: Statistics = {}
    names = {id(norm): name for name, norm in batch_norms(model).items()}
    counted = dict.fromkeys(names.values(), 0)
    for name, norm in batch_norms(model).items():
        if norm.running_mean is not None and norm.running_var is not None:
            after[name] = norm.running_mean, norm.running_var
            counted[name] = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    for norm, x in passes:
        name, n = names[id(norm)], x.numel() // x.shape[1]
        if norm.own_statistics and name in after:
            mean, var = batch_statistics(x)
            counted[name] += 1
            share = 1 / counted[name] if norm.momentum is None else norm.momentum
            old = after[name]
            after[name] = torch.lerp(old[0], mean, share), torch.lerp(old[1], var * n / (n - 1), share)
    return after


def _mean_statistics(each: Sequence[Statistics], sizes: Sequence[int]) -> Statistics:
    means, variances = (
        weighted_mean([{name: pair[i] for name, pair in after.items()} for after in each], sizes) for i in (0, 1)
    )
    return {name: (means[name], variances[name]) for name in means}


_PREFIXES = {"module", "_orig_mod", "_module"}
"""Names that DataParallel, torch.compile and Opacus put before a parameter's own."""

Update = Mapping[str, object] | Sequence[object] | str | Path
"""Name -> tensor or array; or a list of them in the order of the parameters; or a safetensors file of such names."""


def receive(
    model: nn.Module,
    update: Update,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    mean: object = 0.0,
    std: object = 1.0,
    batch_size: int | None = None,
    labels: Tensor | None = None,
    client: Client | None = Client(),
    defense: Any = None,
    bn_stats: Statistics | None = None,
    auxiliary: Auxiliary | None = None,
    earlier: Sequence[Observation] = (),
    trapdoor: object | None = None,
) -> Observation:
    """An Observation from an update that came from elsewhere. Neither the model nor the update is changed.

    Names are matched with and without `net.`, `module.`, `_orig_mod.` and `_module.`; the order of a mapping means
    nothing. A list may hold the trainable parameters, all parameters, or the whole state, in the model's own order
    (Flower sends the last). A safetensors file holds one tensor a name. Values are cast to the model's type.

    Args:
        model: with the weights that the client started from, in the mode in which it trained; a module that is not
            wrapped is wrapped with `num_classes`, `mean` and `std`.
        update: the gradient, or (before - after) / lr for each entry of the state. Differences of running statistics,
            in the same unit, become `buffers`; other buffers are left out.
        image_shape: (C, H, W) of the private images.
        num_classes: K; None asks the model.
        mean, std: the normalisation that the module expects of [0, 1] images, where it is not wrapped.
        batch_size, labels, defense, bn_stats, auxiliary, earlier, trapdoor: what else is known; see Observation.
        client: what the client did; None where that is unknown.

    Raises:
        ValueError: the model can't be attacked, or the update does not fit it; the sentence says why.
    """
    image_shape = check_shape(image_shape)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"receive needs batch_size, a whole number >= 1, or None, got {batch_size!r:.60}")
    if labels is not None and not (isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype == torch.int64):
        raise ValueError("receive needs labels as a tensor of int64 [B], or None")
    bare = not isinstance(unwrapped(model), Classifier)
    if bare:
        model = _wrapped(model, image_shape, num_classes, mean, std)
    if None not in (batch_size, labels) and len(labels) != batch_size:  # type: ignore[arg-type]
        raise ValueError(f"got {len(labels)} labels for a batch of {batch_size}; give one for each image")  # type: ignore[arg-type]
    size = batch_size if labels is None else len(labels)
    copy = attackers_copy(model, image_shape, min(2, size or 2))
    gradient, state = _matched(copy, bare, update)
    lr = 1.0 if client is None else client.lr
    buffers: Statistics = {}
    for name, norm in batch_norms(copy).items():
        moved = [state.get(f"{name}.running_{kind}") for kind in ("mean", "var")]
        if norm.running_mean is not None and norm.running_var is not None and all(m is not None for m in moved):
            mean, var = moved
            _check_statistics(f"the running statistics of {name!r}", norm, (mean, var))  # type: ignore[arg-type]
            buffers[name] = norm.running_mean - lr * mean, norm.running_var - lr * var  # type: ignore[operator]
    p = next(copy.parameters())
    some = torch.rand(size or 1, *image_shape, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    obs = Observation(
        gradient=gradient,
        model=copy,
        client=client,
        graph=graph_of(client, copy, some),
        image_shape=image_shape,
        batch_size=size,
        num_classes=copy.num_classes,
        labels=None if labels is None else labels.sort().values.to(p.device),
        bn_stats=None if bn_stats is None else _statistics(copy, bare, bn_stats),
        buffers=buffers or None,
        defense=defense,
        auxiliary=auxiliary,
        earlier=tuple(earlier),
        trapdoor=trapdoor,
    )
    if client is not None and client.steps == 1 and client.rule == loss_gradient:
        scale = loss_scale(obs)
        if scale is not None and not 0.8 < scale < 1.25:
            warnings.warn(
                f"the update is about {scale:.3g} times a gradient of the mean cross-entropy: the client may have"
                " summed or halved its loss, or divided by another batch size; divide the update by it, or say"
                " client=Client(rule=loss_gradient.of(loss))",
                stacklevel=2,
            )
    return obs


def _statistics(copy: Classifier, wrapped: bool, given: Statistics) -> Statistics:
    """Statistics of the batch norms by the copy's names."""
    norms = batch_norms(copy)
    if not isinstance(given, Mapping):
        raise ValueError(f"bn_stats are a mean and a variance by the name of each batch norm, got {given!r:.60}")
    found = {next((n for n in _spellings(name, wrapped) if n in norms), name): pair for name, pair in given.items()}
    if found.keys() != norms.keys():
        raise ValueError(f"bn_stats are of {sorted(given)}, and the batch norms of the model are {sorted(norms)}")
    device = next(copy.parameters())
    for name, pair in found.items():
        _check_statistics(f"bn_stats of {name!r}", norms[name], pair)
        if (pair[1] < 0).any():
            raise ValueError(f"bn_stats of {name!r} have a negative variance, {pair[1].min():.3g}: they are damaged")
    return {name: (mean.to(device), var.to(device)) for name, (mean, var) in found.items()}


def _check_statistics(what: str, layer: BatchNorm, pair: Sequence[Tensor]) -> None:
    """ValueError unless it is a mean and a variance, finite, one number a channel."""
    C = layer.num_features
    right = [isinstance(v, Tensor) and v.shape == (C,) and bool(v.isfinite().all()) for v in pair]
    if len(right) != 2 or not all(right):
        got = [str(list(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in pair]
        raise ValueError(
            f"{what} must be a mean and a variance, tensors [{C}] of finite numbers, one a channel, got"
            f" {' and '.join(got)}; they come from another model, or are damaged"
        )


def _wrapped(
    model: nn.Module, image_shape: tuple[int, int, int], num_classes: int | None, mean: object, std: object
) -> Classifier:
    if num_classes is None:
        wrapped = functional_copy(wrap(model, mean=mean, std=std, num_classes=2))
        num_classes = number_of_logits(wrapped, image_shape)
    return wrap(model, mean=mean, std=std, num_classes=num_classes)


def _matched(copy: Classifier, wrapped: bool, update: Update) -> tuple[Gradient, Gradient]:
    """The gradient by the copy's names, and what there is besides of its floating-point state.

    Args:
        wrapped: whether the caller's own model is bare, and was wrapped for the copy.
    """
    if isinstance(update, str | Path):
        try:
            update = load_file(update)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{update} is not a readable safetensors file ({error})") from error
    wanted = {name: p.shape for name, p in copy.named_parameters() if p.requires_grad}
    if not isinstance(update, Mapping):
        if not isinstance(update, Iterable):
            said = type(update).__name__
            raise ValueError(f"an update is a mapping by name, a list, or a safetensors file, got {said}")
        update, wrapped = _named(list(update), copy), False
    names = {name: name for name in copy.state_dict()}
    names = {_stripped(name): name for name in names} | names
    p = next(copy.parameters())
    found: Gradient = {}
    for name, value in update.items():
        own = next((names[said] for said in _spellings(name, wrapped) if said in names), name)
        if value is None and own in wanted:  # as torch leaves .grad of a parameter that the pass does not use
            value = torch.zeros(wanted[own])
        tensor = _as_tensor(name, value)
        if own in found:
            raise ValueError(f"the update has {own!r} twice, under two names; leave one out")
        found[own] = tensor.to(p.device, p.dtype).detach().clone()
    missing = wanted.keys() - found.keys()
    extra = [name for name in found if name not in names]
    if missing or extra:
        raise ValueError(
            f"the update does not fit the model: missing {sorted(missing)}, unknown {sorted(extra)}; it needs one"
            " entry for each trainable parameter, by its name or in their order"
        )
    rest = {name: value for name, value in found.items() if name not in wanted}
    return {name: found[name] for name in wanted}, rest


def _named(values: list, copy: Classifier) -> dict[str, object]:
    """A list in the order of the trainable parameters, of all parameters, or of the state without the wrapper's own."""
    orders = [
        [name for name, p in copy.named_parameters() if p.requires_grad],
        [name for name, _ in copy.named_parameters()],
        [name for name in copy.state_dict() if name not in ("mean", "std")],
        list(copy.state_dict()),
    ]
    for names in orders:
        if len(names) == len(values):
            return dict(zip(names, values, strict=True))
    raise ValueError(
        f"the update is a list of {len(values)}, the model has {len(orders[0])} trainable parameters, {len(orders[1])}"
        f" parameters and {len(orders[2])} entries of state; pass one list of these, or a dict by name"
    )


def _stripped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)


def _spellings(name: str, wrapped: bool) -> list[str]:
    """How the copy may call a parameter: in a Classifier, all that a bare module holds lies at `net`."""
    spellings = [name, f"net.{name}", _stripped(name), f"net.{_stripped(name)}"]
    return [spellings[i] for i in ((1, 0, 3, 2) if wrapped else (0, 1, 2, 3))]


def _as_tensor(name: str, value: object) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name!r} of the update is {type(value).__name__}, not a tensor or an array") from error
    if tensor.is_complex():
        raise ValueError(f"{name!r} of the update is complex")
    return tensor
