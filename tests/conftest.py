from __future__ import annotations

from collections.abc import Callable, Iterator

import interpreted  # noqa: F401  before a test imports Triton, be it through torch._dynamo
import pytest
import simt
import torch

from ial_cuda import backends

pytest_plugins = ["gpu_process"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        type=lambda names: names.split(","),
        metavar="NAME,...",
        help="run only the tests whose parameter `backend` or marker `backends` names one of these",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "backends(name, ...): for --backends, of a test that has no parameter `backend`"
    )
    if config.option.backends:
        import cases  # noqa: F401  registers the emulated ones

        for name in config.option.backends:
            if name not in backends.names():
                known = ", ".join(backends.names())
                raise pytest.UsageError(f"--backends has {name!r}, expected some of {known}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.backends:
        kept, others = [], []
        for item in items:
            (others if backends_of(item).isdisjoint(config.option.backends) else kept).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def backends_of(item: pytest.Item) -> set[str]:
    callspec = getattr(item, "callspec", None)
    if callspec and "backend" in callspec.params:
        return {callspec.params["backend"]}
    return {name for marker in item.iter_markers("backends") for name in marker.args}


@pytest.fixture
def need_gpu_memory() -> Iterator[Callable[[int], None]]:
    """Skips the test if the GPU has fewer free bytes. Releases the memory to other processes afterwards."""

    def need(size: int) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"{free >> 20} MiB of GPU memory are free, {size >> 20} needed")

    yield need
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _load_simt(request: pytest.FixtureRequest) -> None:
    """Compiles the CUDA kernels for the CPU before the first test that needs them."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("backend") in ("simt", "simt_one_launch"):
        simt.load()
