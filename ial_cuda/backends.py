"""The backends of the loss: their devices, their operators, and why one is missing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from . import extension
from .warn import warn


@dataclass(frozen=True)
class Backend:
    """An implementation of the loss.

    Attributes:
        name: its value in ``backend=``.
        devices: the device types that it supports; None for all.
        library: the namespace of its operators in `torch.ops`; None for plain PyTorch.
        load: imports the module that registers the operators, and is called before each use. None if the
            extension registers them. It uses an import statement, since torch.compile cannot trace importlib.
        missing: the reason and the remedy in one sentence if the backend cannot be used, else None.
        fallback: a description for the warning when "auto" has to choose this backend. None for no warning.
        one_launch: whether one cooperative launch computes the loss and the gradient of several levels where
            that is possible.
    """

    name: str
    devices: tuple[str, ...] | None
    library: str | None = None
    load: Callable[[], None] | None = None
    missing: str | None = None
    fallback: str | None = None
    one_launch: bool = False

    def takes(self, device_type: str) -> bool:
        return self.devices is None or device_type in self.devices

    def operators(self) -> Any:
        """The operators under torch.ops."""
        if self.load is not None:
            self.load()
        return getattr(torch.ops, str(self.library))


_backends: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Adds a backend at the end and replaces one of the same name. "auto" prefers earlier ones."""
    _backends.pop(backend.name, None)
    _backends[backend.name] = backend


@contextlib.contextmanager
def only(*backends: Backend) -> Iterator[None]:
    """Replaces all backends within the context, for tests."""
    before = dict(_backends)
    _backends.clear()
    try:
        for backend in backends:
            register(backend)
        yield
    finally:
        _backends.clear()
        _backends.update(before)


def names() -> tuple[str, ...]:
    return tuple(_backends)


def get(name: str) -> Backend:
    return _backends[name]


def suitable(device_type: str) -> list[Backend]:
    """The backends that support a device type, best first, including missing ones."""
    return [backend for backend in _backends.values() if backend.takes(device_type)]


def _best(device_type: str) -> Backend:
    """The first backend that is not missing. The reference supports every device."""
    return next(b for b in _backends.values() if b.missing is None and b.takes(device_type))


def choose(name: str, device: torch.device) -> Backend:
    """The backend for logits on ``device``. "auto" is the best one that is not missing.

    Raises:
        ValueError: the backend does not support the device.
        RuntimeError: the backend is missing.
    """
    device_type = device.type
    if device_type == "meta":  # only shapes are computed, which all backends share
        return get("reference" if name == "reference" or get("cpu").missing else "cpu")
    if name == "auto":
        backend = _best(device_type)
        if backend.fallback is not None:
            _warn_of_fallback(backend, device_type)
        return backend
    backend = get(name)
    if not backend.takes(device_type):
        expected = ", ".join(map(repr, ("auto", *(other.name for other in suitable(device_type)))))
        raise ValueError(f"backend is {name!r}, expected one of {expected} for logits on {device}")
    if backend.missing is not None:
        raise RuntimeError(f"backend is {name!r}, which is missing: {backend.missing}")
    return backend


_warned: set[str] = set()


def _warn_of_fallback(chosen: Backend, device_type: str) -> None:
    if device_type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device_type)
    missing = [f"{other.name}: {other.missing}" for other in suitable(device_type) if other.missing]
    reasons = "; ".join(missing) or "there are no kernels for this device"
    warn(f"ial_cuda uses its {chosen.fallback} on {device_type} ({reasons})")


def describe() -> str:
    """The text of ``python -m ial_cuda info``: versions, the build, backends, and the choice of "auto"."""
    lines = extension.describe()
    lines.append("backends:")
    for backend in _backends.values():
        lines.append(f"  {backend.name:<9} {'no: ' + backend.missing if backend.missing else 'yes'}")
        if backend.name == "cpu" and extension.module:
            lines[-1] += " ({cpu}, threads: {threads})".format(**extension.module.build_info())
    for device_type in ("cpu", "cuda"):
        lines.append(f'backend="auto" on {device_type}: {_best(device_type).name}')
    return "\n".join(lines)


def _load_triton() -> None:
    from . import triton  # noqa: F401


register(Backend("cpu", ("cpu",), "ial_cuda", missing=extension.problem))
register(
    Backend(
        "cuda",
        ("cuda",),
        "ial_cuda",
        missing=extension.why_no_cuda,
        one_launch=os.environ.get("IAL_CUDA_ONE_LAUNCH") == "1",
    )
)
register(
    Backend(
        "triton",
        ("cuda",),
        "ial_triton",
        load=_load_triton,
        missing=None if find_spec("triton") else f"Triton is not installed; `{extension.PIP} triton`",
        fallback="Triton kernels",
    )
)
register(Backend("reference", None, fallback="slow reference in plain PyTorch"))
