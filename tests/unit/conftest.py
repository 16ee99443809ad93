"""What several tests of this folder share."""

from collections.abc import Iterator

import pytest

from m3dist.model import cpu, decode


@pytest.fixture(scope="module", params=["numpy", "MLX"])
def library(request) -> Iterator[None]:
    """Both ways to compute on the CPU: by numpy, and by MLX's own operations, which are all that a GPU has."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "MLX":
            monkeypatch.setattr(cpu, "usable", lambda *arrays: False)
        monkeypatch.setattr(decode, "FEW", 0)
        yield
