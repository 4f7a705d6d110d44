"""Shape annotations are checked while the tests run, and no test reaches the network."""

import socket

import pytest
from jaxtyping import install_import_hook

# Not gi_lib.data and the command line: they answer wrong types with messages of their own, which are tested.
CHECKED = ["types", "federated", "matching", "priors", "parametrisations", "labels", "execution", "optimise", "targets"]
CHECKED += ["attacks", "defenses"]
install_import_hook([f"gi_lib.{name}" for name in CHECKED], "beartype.beartype")

import torch  # noqa: E402

from gi_lib import Batch, ThreatModel, models, observe  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Downloads fail at once, as on a machine without a network; local sockets still work."""

    def refuse(*args, **kwargs):
        raise OSError("tests have no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def client(rng):
    """Make an observation of random images: client(model name, batch size, image shape, **facts known)."""

    def make(name="lenet", size=1, shape=(3, 8, 8), num_classes=4, update=None, train=False, **facts):
        model = models.build(name, num_classes=num_classes, image_shape=shape).train(train)
        batch = Batch(torch.rand(size, *shape, generator=rng), torch.arange(size) % num_classes)
        more = {} if update is None else {"update": update}
        return observe(model, batch, threat=ThreatModel(**facts), rng=rng, **more), batch

    return make
