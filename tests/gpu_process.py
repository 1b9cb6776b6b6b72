"""Ends a test process whose CUDA context is lost, and a worker that is interrupted.

After an error such as an illegal address every call to CUDA fails, and so would every test that follows.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest

#: Set on the test that lost the context: the error.
LOST = pytest.StashKey[str]()


def is_worker(config: pytest.Config) -> bool:
    """Whether this is a worker of pytest-xdist, which replaces a worker that exits."""
    return hasattr(config, "workerinput")


def why_lost() -> str | None:
    """The error of CUDA, if the tests have used it. Neither torch nor CUDA is loaded for the question."""
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
        # Python's handler would wait for a kernel that hangs, and the session for this process. The reports
        # of the tests before are sent already.
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
    """Around all of a test, its reports included."""
    result = yield
    if LOST in item.stash:
        if is_worker(item.config):
            os._exit(1)
        item.session.shouldstop = f"the CUDA context is lost after {item.nodeid}"
    return result
