from __future__ import annotations

import interpreted  # noqa: F401  before a test imports Triton, be it through torch._dynamo
import pytest
import simt


@pytest.fixture(autouse=True)
def _load_simt(request: pytest.FixtureRequest) -> None:
    """The CUDA kernels are compiled for the CPU when the first test wants them."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("backend") in ("simt", "simt_fused"):
        simt.load()
