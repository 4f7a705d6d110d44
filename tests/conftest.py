"""Shape annotations are checked while the tests run, and no test reaches the network."""

import ipaddress
import socket

import pytest
from jaxtyping import install_import_hook

# Not where wrong types have messages of their own, which are tested: the nouns, the client, the data, the commands.
CHECKED = ["matching", "priors", "parametrisations", "labels", "execution", "optimise", "search", "attacks", "copies"]
install_import_hook([f"gi_lib.{name}" for name in CHECKED], "beartype.beartype")

import torch  # noqa: E402

from gi_lib import Batch, Client, ThreatModel, models, observe  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Downloads fail at once, as on a machine without a network; addresses of this machine still work."""
    look_up = socket.getaddrinfo

    def refuse(host, *args, **kwargs):
        try:
            local = host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if local:
            return look_up(host, *args, **kwargs)
        raise OSError("tests have no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def client(rng):
    """Make an observation of random images: client(model name, batch size, image shape, **facts known)."""

    def make(name="lenet", size=1, shape=(3, 8, 8), num_classes=4, client=None, train=False, **facts):
        model = models.build(name, num_classes=num_classes, image_shape=shape).train(train)
        batch = Batch(torch.rand(size, *shape, generator=rng), torch.arange(size) % num_classes)
        return observe(model, batch, client=client or Client(), threat=ThreatModel(**facts), rng=rng), batch

    return make
