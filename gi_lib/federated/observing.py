"""What the attacker is told, and `observe`: the only way from a Batch to an Observation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gi_lib.copies import (
    BatchNorm,
    attackers_copy,
    batch_norms,
    batch_statistics,
    bn_statistics,
    functional_copy,
    inputs_of_batch_norms,
    masks,
    strange_norms,
)
from gi_lib.federated.clients import FEDSGD, PLAIN, Client, Clients, graph_of, loss_gradient, weighted_mean
from gi_lib.types import (
    Auxiliary,
    Batch,
    Classifier,
    ClientUpdate,
    Gradient,
    Needs,
    Observation,
    Parameters,
    Sent,
    Statistics,
)


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
    client: Client = FEDSGD,
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
