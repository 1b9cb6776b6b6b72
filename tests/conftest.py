from __future__ import annotations

import interpreted  # noqa: F401  before a test imports Triton, be it through torch._dynamo
import pytest
import simt


@pytest.fixture(autouse=True)
def _load_simt(request: pytest.FixtureRequest) -> None:
    """The CUDA kernels are compiled for the CPU when the first test wants them."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "simt":
        simt.load()
