"""Loads the compiled operators, tells torch their shapes, and knows why a backend is missing.

``unavailable[backend]`` is None where the backend can be used, else a sentence with the reason and the mend.
"""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_REBUILD = (
    "reinstall it against this torch: "
    "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall ial_cuda"
)


def _read_build() -> dict[str, Any]:
    """What setup.py left beside the extension: versions of torch, CUDA, nvcc and compiler, archs, warning."""
    try:
        return dict(json.loads((Path(__file__).parent / "_build.json").read_text()))
    except FileNotFoundError:
        return {}


def _load(build: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none. Versions come first: a foreign torch is an undefined symbol."""
    if build and build["compiler"] is None:
        return None, build["warning"]
    if build and (build["torch"], build["torch_cuda"]) != (torch.__version__, torch.version.cuda):
        return None, (
            f"the extension was built for torch {build['torch']} (CUDA {build['torch_cuda']}), but torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) is imported; {_REBUILD}"
        )
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the extension does not load ({error}); {_REBUILD}"
    return _C, None


def _why_no_cuda(build: dict[str, Any]) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("ial_cuda::reduce", "CUDA"):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it, then {_REBUILD}"
    return build.get("warning") or f"the extension was built without the CUDA kernels; {_REBUILD}"


build = _read_build()
_C, _problem = _load(build)
_why_cuda_is_missing = _problem or _why_no_cuda(build)
unavailable: dict[str, str | None] = {
    "cpu": _problem,
    "cuda": _why_cuda_is_missing,
    "fused": _why_cuda_is_missing,
    "triton": None if find_spec("triton") else "Triton is not installed; pip install triton",
    "reference": None,
}
#: The library of operators under torch.ops that a backend with kernels runs.
libraries = {"cpu": "ial_cuda", "cuda": "ial_cuda", "fused": "ial_cuda", "triton": "ial_triton"}
#: The backend that runs the same kernels in one launch, and computes the gradient with the loss.
one_launch = {"cuda": "fused"}
#: The backends for each type of device, best first.
preference: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "fused", "triton", "reference"),
}


def kernels(device: str) -> tuple[str, ...]:
    """The backends with kernels of our own for a type of device, best first, there or not."""
    backends = preference.get(device, ("reference",))
    return backends[: backends.index("reference")]


def operators(backend: str) -> Any:
    """The operators under torch.ops that a backend runs."""
    if backend == "triton":
        from . import triton_ops  # noqa: F401  registers them; Triton takes long to import
    return getattr(torch.ops, libraries[backend])


def describe() -> str:
    """The text of ``python -m ial_cuda info``: versions, the build, every backend, and what "auto" takes."""
    from . import __version__

    lines = [
        f"ial_cuda {__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    ]
    if build:
        kernels = f"nvcc {build['nvcc']} for {', '.join(build['arch_list'])}" if build["cuda"] else "no nvcc"
        lines.append(f"built with torch {build['torch']}, {build['compiler']}, {kernels}")
        if build["warning"]:
            lines.append(f"warning of the build: {build['warning']}")
    if torch.cuda.is_available():
        lines += [
            f"device cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        ]
    lines.append("backends:")
    for backend, reason in unavailable.items():
        detail = f" ({_C.build_info()['cpu']})" if _C and backend == "cpu" else ""
        lines.append(f"  {backend:<9} {'no: ' + reason if reason else 'yes' + detail}")
    for device, backends in preference.items():
        best = next(name for name in backends if unavailable[name] is None)
        if best in one_launch:
            best = f"{one_launch[best]} in training, where an image fits on the chip, else {best}"
        lines.append(f'backend="auto" on {device}: {best}')
    return "\n".join(lines)


def register_fakes(library: str) -> None:
    """Tells torch.compile, meta tensors and fake tensors what the operators return."""
    # Without what torch need not know: schemas, in csrc/ial_ops.cpp, have all names.

    @torch.library.register_fake(f"{library}::reduce")
    def _(
        logits: Tensor, target: Tensor, weight: Any, pixel_weight: Any, class_levels: list[int], *_: Any
    ) -> Tensor:
        return logits.new_empty((logits.shape[0], max(class_levels) + 1, 5), dtype=torch.float64)

    @torch.library.register_fake(f"{library}::gradient")
    def _(logits: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(logits)

    @torch.library.register_fake(f"{library}::gradient_")
    def _(*_: Any) -> None:
        return None

    @torch.library.register_fake(f"{library}::combine")
    def _(
        stats: Tensor,
        lambdas: Any,
        alpha: Any,
        reduction: str,
        normalization: Any,
        scope: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        images, levels, _ = stats.shape
        loss = stats.new_empty((images,) if reduction == "none" else (), dtype=dtype)
        return loss, stats.new_empty((1 if scope == "batch" else images, levels - 1))

    @torch.library.register_fake(f"{library}::table")
    def _(stats: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(stats)


if _C is not None:
    register_fakes("ial_cuda")

    @torch.library.register_fake("ial_cuda::rescale_")
    def _(*_: Any) -> None:
        return None

    @torch.library.register_fake("ial_cuda::fused")
    def _(
        logits: Tensor, target: Tensor, weight: Any, pixel_weight: Any, class_levels: list[int], *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        images, levels, scope = logits.shape[0], max(class_levels) + 1, rest[-1]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = logits.new_empty((), dtype=dtype)
        stats = logits.new_empty((images, levels, 5), dtype=torch.float64)
        f = stats.new_empty((1 if scope == "batch" else images, levels - 1))
        return loss, f, stats, torch.empty_like(stats), torch.empty_like(logits)

    @torch.library.register_fake("ial_cuda::fuses")
    def _(*_: Any) -> bool:
        return False
