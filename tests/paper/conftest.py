import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from m3dist.config import ModelConfig
from m3dist.plan_report import PUBLISHED

if TYPE_CHECKING:
    from gateways import RunningGateway
    from scripted_answers import Script


@pytest.fixture(scope="session")
def published() -> ModelConfig:
    """The configuration of MiniMaxAI/MiniMax-M3."""
    return ModelConfig.from_dict(json.loads((PUBLISHED / "MiniMax-M3.json").read_text()))


@pytest.fixture(scope="module")
def gateway() -> "Iterator[RunningGateway]":
    """A gateway in this process, for clients of the APIs."""
    from gateways import RunningGateway  # not for all who collect this folder

    with RunningGateway() as running:
        yield running


@pytest.fixture(scope="module")
def script(gateway: "RunningGateway") -> "Script":
    """What its ranks answer."""
    from scripted_answers import Script

    return Script(gateway.start_ranks(pace=0.0005))
