"""Ends a test process after its CUDA context is lost, and a worker after an interrupt.

After an error such as an illegal address, every call to CUDA fails, and all later tests would fail.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest

#: The error, stored on the test that lost the context.
LOST = pytest.StashKey[str]()


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of pytest-xdist, which replaces a worker that exits."""
    return hasattr(config, "workerinput")


def why_lost() -> str | None:
    """The CUDA error, if the tests have used CUDA. This loads neither torch nor CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if is_worker(config):
        # Python's handler would wait for a hanging kernel, and the session for this process. The reports
        # of earlier tests have already been sent.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> object:
    try:
        return (yield)
    finally:
        error = why_lost()
        if error is not None:
            item.stash[LOST] = error
            pytest.fail(f"the CUDA context is lost: {error}", pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> object:
    """Wraps a whole test with its reports."""
    result = yield
    if LOST in item.stash:
        if is_worker(item.config):
            os._exit(1)
        item.session.shouldstop = f"the CUDA context is lost after {item.nodeid}"
    return result
