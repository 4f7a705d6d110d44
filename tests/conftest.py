"""Shape annotations are checked while the tests run, and no test reaches the network."""

import functools
import http.server
import ipaddress
import os
import socket
import threading
from pathlib import Path

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


@pytest.fixture(scope="session")
def site():
    """The folder of the built site: the one in $GI_SITE, which then has to be there, or `_build/html`."""
    given = os.environ.get("GI_SITE")
    folder = (Path(__file__).parent.parent / (given or "_build/html")).resolve()
    if not (folder / "index.html").exists():
        if given:
            pytest.fail(f"GI_SITE={given} holds no site; `make test` builds it first")
        pytest.skip("no site is built: make book")
    return folder


@pytest.fixture(scope="session")
def origin(site):
    """The address of a server of the built site, for a browser."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
