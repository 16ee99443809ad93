"""The network of a module's tests: its hosts are the module's SPECS."""

from collections.abc import Iterator

import pytest
from network import Network


@pytest.fixture(scope="module")
def network(request) -> Iterator[Network]:
    with Network(*request.module.SPECS) as network:
        yield network


@pytest.fixture
def net(network) -> Iterator[Network]:
    """The module's network, without processes and with all links up and fast when the test begins."""
    yield network
    network.reset()
