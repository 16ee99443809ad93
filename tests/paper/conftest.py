import json

import pytest

from m3dist.config import ModelConfig
from m3dist.plan_report import PUBLISHED


@pytest.fixture(scope="session")
def published() -> ModelConfig:
    """The configuration of MiniMaxAI/MiniMax-M3."""
    return ModelConfig.from_dict(json.loads((PUBLISHED / "MiniMax-M3.json").read_text()))
