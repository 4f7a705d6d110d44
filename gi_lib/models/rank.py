"""Rank analysis (Zhu, Blaschko, ICLR 2021, 2010.07733): are there enough equations to solve a network layer by layer?

For a layer with n_x inputs, n_z outputs and n_w weights, from the image up:

    RA-i = n_x - n_w - n_z - n_v,     n_v <- n_v + max(0, max(0, n_z - n_x) - max(0, n_x - n_w - n_z))

n_v counts the virtual constraints, from layers that have more outputs than inputs. The index of a network is its
largest RA-i; above zero there are more unknowns than equations. Residual blocks count as one layer, as in E2EGI's
`RGAP.py`: its weights are those of the layers that give the sum. Pools are layers without weights.

The count is an upper bound of the rank: `numeric` tells the rank on one image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gi_lib.copies import deep_copy
from gi_lib.models.chain import Link, chain
from gi_lib.models.layers import Shape
from gi_lib.types import Classifier

WEIGHED = (nn.Conv2d, nn.Linear)
POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class LayerRank:
    """The count of one layer or residual block, for one image.

    Args:
        name: of the layer, or of the block.
        inputs, outputs, weights, virtual: n_x, n_z, n_w and n_v.
    """

    name: str
    inputs: int
    outputs: int
    weights: int
    virtual: int

    @property
    def index(self) -> int:
        """RA-i."""
        return self.inputs - self.weights - self.outputs - self.virtual


def count(model: Classifier, image_shape: Shape) -> list[LayerRank]:
    """The rank analysis of any model whose layers are modules, from the image up. No weight is looked at, so that it
    takes as long for a large network as for a small one; a model on the device "meta" will do.

    Args:
        model: as `wrap` and `build` give it.
        image_shape: (C, H, W).

    Raises:
        ValueError: the model has no dense layer, convolution or pool that runs as a module.
    """
    copy: Classifier = deep_copy(model).to("meta")  # type: ignore[assignment]
    copy.requires_grad_(False)
    graph = _Graph(copy, image_shape)
    if not graph.order:
        raise ValueError("the model runs no dense layer, convolution or pool as a module, so that there is no count")
    rows, virtual = [], 0
    for name, group in graph.groups():
        x, z = graph.sizes[group[0]][0], graph.sizes[name][1]
        w = sum(graph.weights(layer) for layer in graph.last(group))
        rows.append(LayerRank(name, x, z, w, virtual))
        virtual += max(0, max(0, z - x) - max(0, x - w - z))
    return rows


def index(rows: Iterable[LayerRank]) -> int:
    """The index of a network: the largest RA-i."""
    return max(row.index for row in rows)


class _Graph:
    """What one forward pass on the device "meta" tells: which modules run, on how much, and how they hang together.

    Autograd's graph is walked from the logits to the image. A module is on every path if as many paths lead through its
    output as there are.
    """

    def __init__(self, model: Classifier, image_shape: Shape):
        self.modules = {name: module for name, module in model.named_modules() if name}
        self.order: list[str] = []
        self.sizes: dict[str, tuple[int, int]] = {}
        self.ends: dict[str, tuple[Node, Node]] = {}

        def ran(name):
            def note(module, inputs, output):
                given = inputs[0] if inputs else None
                if not isinstance(given, Tensor) or not isinstance(output, Tensor) or name in self.sizes:
                    return
                if given.grad_fn is not None and output.grad_fn is not None:
                    self.sizes[name] = (given.numel(), output.numel())
                    self.ends[name] = (given.grad_fn, output.grad_fn)
                    if isinstance(module, WEIGHED + POOLS):
                        self.order.append(name)

            return note

        handles = [module.register_forward_hook(ran(name)) for name, module in self.modules.items()]
        try:
            logits = model(torch.empty(1, *image_shape, device="meta").requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        above = self._sorted(logits.grad_fn)
        self.paths = {above[0]: 1}  # from the logits to a node, by how many paths
        for node in above:
            for other, _ in node.next_functions:
                if other is not None:
                    self.paths[other] = self.paths.get(other, 0) + self.paths[node]
        self.on: dict[Node, int] = {}  # from a node to the image
        for node in reversed(above):
            nexts = [other for other, _ in node.next_functions if other is not None]
            self.on[node] = sum(self.on[other] for other in nexts) if nexts else 1
        self.all = self.on[above[0]]

    @staticmethod
    def _sorted(start: Node | None) -> list[Node]:
        """The nodes from `start` on, each before those that it leads to."""
        done: dict[Node, None] = {}
        stack = [(start, False)]
        while stack:
            node, ready = stack.pop()
            if node is None or node in done:
                continue
            if ready:
                done[node] = None
            else:
                stack.append((node, True))
                stack += [(other, False) for other, _ in node.next_functions]
        return list(reversed(done))

    def on_every_path(self, name: str) -> bool:
        node = self.ends[name][1]
        return self.paths.get(node, 0) * self.on.get(node, 0) == self.all

    def groups(self) -> list[tuple[str, list[str]]]:
        """Layers on every path alone; the others by the smallest module around them that is."""
        found: dict[str, list[str]] = {}
        for layer in self.order:
            parts = layer.split(".")
            around = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            owner = next(name for name in around if name == "net" or (name in self.ends and self.on_every_path(name)))
            found.setdefault(owner, []).append(layer)
        return list(found.items())

    def last(self, group: list[str]) -> list[str]:
        """The layers of a group on which no other of its layers depends."""
        needed = {node for name in group for node in self._sorted(self.ends[name][0])}
        return [name for name in group if self.ends[name][1] not in needed]

    def weights(self, name: str) -> int:
        module = self.modules[name]
        return module.weight.numel() if isinstance(module, WEIGHED) else 0


@dataclass(frozen=True)
class NumericRank:
    """The equations [K; W; P] of a layer on one image, P picking the border that a convolution pads with zeros.

    Args:
        name: of the layer.
        unknowns: entries of its padded input.
        counted: the smaller of these and the number of equations.
        rank: of the matrix, with both kinds of equations at one scale.
        condition: its largest over its smallest singular value, where the rank is full.
    """

    name: str
    unknowns: int
    counted: int
    rank: int
    condition: float


def numeric(model: Classifier, image: Tensor, label: int) -> list[NumericRank]:
    """The rank of each layer's equations on one image, from the image up, by singular values in float64.

    Args:
        model: a chain, as R-GAP needs it.
        image: [C, H, W] in [0, 1].
        label: its class.

    Raises:
        NotApplicableError: the model is no chain of linear layers and invertible activations.
    """
    links = chain(model, tuple(image.shape))  # type: ignore[arg-type]
    x, outputs = ((image.to(model.mean) - model.mean) / model.std).double(), []
    for link in links:
        outputs.append(link.forward(x.reshape(1, *link.input))[0] + link.bias)
        x = outputs[-1] if link.activation is None else link.activation(outputs[-1])
    k, found = _of_the_loss(outputs[-1], label), list[NumericRank]()
    for link, before in zip(reversed(links), [*reversed(links[:-1]), None], strict=True):
        found.append(_numeric(link, k))
        if before is not None:
            assert before.activation is not None
            z = outputs[links.index(before)].requires_grad_()
            slope = torch.autograd.grad(before.activation(z).sum(), z)[0]
            k = link.transposed(k[None]).reshape(z.shape) * slope
    return found[::-1]


def _of_the_loss(u: Tensor, label: int) -> Tensor:
    """dL/du of the cross-entropy at the last layer's outputs u [K, 1, 1], or [1, 1, 1] for two classes."""
    logits = u.flatten() if len(u) > 1 else torch.cat([u.new_zeros(1), u.flatten()])
    p = logits.softmax(0)
    p[label] -= 1
    return p[-len(u) :].reshape(u.shape)


def _numeric(link: Link, k: Tensor) -> NumericRank:
    K0, n, c = link.gradients(k), torch.Size(link.input).numel(), link.input[0]
    W = link.forward(torch.eye(n, dtype=K0.dtype, device=K0.device).reshape(n, *link.input)).reshape(n, -1).T
    # K = I (x) K0 has the rows of c copies of R, where K0 = Q R
    R = torch.linalg.qr(K0, mode="r").R
    K = torch.kron(torch.eye(c, dtype=K0.dtype, device=K0.device), R.contiguous()) * (W.norm() / (R.norm() * c**0.5))
    values = torch.linalg.svdvals(torch.cat([K, W]))
    rank = int((values > values[0] * max(K.shape[0] + W.shape[0], n) * torch.finfo(K0.dtype).eps).sum())
    equations = len(K0) * c + len(W)
    condition = (values[0] / values[-1]).item() if rank == n else torch.inf
    return NumericRank(link.name, n + link.border, min(n, equations) + link.border, rank + link.border, condition)
