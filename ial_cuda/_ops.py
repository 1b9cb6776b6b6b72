"""Loads the compiled operators, tells torch their shapes, and knows why a backend is missing.

``unavailable[backend]`` is None where the backend can be used, else a sentence: the reason and the remedy.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

_PACKAGE = Path(__file__).parent
_PIP = f"{shlex.quote(sys.executable)} -m pip install"


def _is_source_tree() -> bool:
    """Whether this package is the folder in a checkout, as it also is after an editable install."""
    return all((_PACKAGE.parent / name).exists() for name in ("setup.py", "csrc"))


def _installed_from() -> str | None:
    """Where pip found the sources of this package (PEP 610), if they are still there."""
    try:
        found = metadata.distribution("ial_cuda")
    except metadata.PackageNotFoundError:
        return None
    if Path(str(found.locate_file("ial_cuda"))).resolve() != _PACKAGE.resolve():
        return None
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if vcs := origin.get("vcs_info"):
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}{folder}"
    path = Path(url2pathname(urlsplit(url).path))
    is_source = (path / "setup.py").exists() or (path.is_file() and path.suffix != ".whl")
    return str(path) if url.startswith("file:") and is_source else None


def _reinstall() -> str:
    """What to type for an extension that fits this torch."""
    build = f"{_PIP} --no-build-isolation --no-deps"
    if _is_source_tree():
        return f"reinstall it: `{build} -e {shlex.quote(str(_PACKAGE.parent))}`"
    # pip may have kept a wheel that it built before, which is the one that does not fit.
    build += " --no-cache-dir --force-reinstall"
    source = _installed_from()
    if source is None:
        return f"reinstall it, in a checkout of ial_cuda: `{build} .`"
    return f"reinstall it: `{build} {shlex.quote(source)}`"


def _read_build() -> dict[str, Any]:
    """What setup.py left beside the extension: versions of torch, CUDA, nvcc and compiler, archs, warning."""
    try:
        return dict(json.loads((_PACKAGE / "_build.json").read_text()))
    except FileNotFoundError:
        return {}


def _load(build: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none. Versions come first: a foreign torch is an undefined symbol."""
    if build and (build["torch"], build["torch_cuda"]) != (torch.__version__, torch.version.cuda):
        return None, (
            f"the extension was built for torch {build['torch']} (CUDA {build['torch_cuda']}), but torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) is imported; {_reinstall()}"
        )
    # In this folder alone: an editable install would lend the extension of another checkout.
    if PathFinder.find_spec(f"{__package__}._C", [str(_PACKAGE)]) is None:
        return None, _why_no_extension()
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the extension does not load ({error}); {_reinstall()}"
    return _C, None


def _why_no_extension() -> str:
    others = sorted(file.name for file in _PACKAGE.glob("_C.*"))
    if others:
        return f"the extension is for another Python ({', '.join(others)}); {_reinstall()}"
    if _is_source_tree():
        return (
            f"ial_cuda is imported from {_PACKAGE.parent}, a source tree without its extension; start Python "
            f"elsewhere to use the ial_cuda that is installed, or {_reinstall()}"
        )
    return f"ial_cuda is installed without its extension; {_reinstall()}"


def _why_no_cuda(build: dict[str, Any]) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("ial_cuda::reduce", "CUDA"):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with it, then {_reinstall()}"
    if warning := build.get("warning"):
        return f"{warning}, then {_reinstall()}"
    return f"the extension was built without the CUDA kernels; {_reinstall()}"


def _covers(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for these architectures, as torch spells them, run on a GPU of this capability."""
    for arch in arch_list:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            return True  # a name, such as Hopper
        major, minor, feature, ptx = found.groups()
        built = int(major), int(minor)
        # A binary runs on the later minor versions, PTX on all later versions; "a" is for one version.
        if built == capability or (
            built < capability and feature != "a" and (ptx or built[0] == capability[0])
        ):
            return True
    return False


build = _read_build()
_C, _problem = _load(build)
_why_cuda_is_missing = _problem or _why_no_cuda(build)
unavailable: dict[str, str | None] = {
    "cpu": _problem,
    "cuda": _why_cuda_is_missing,
    "fused": _why_cuda_is_missing,
    "triton": None if find_spec("triton") else f"Triton is not installed; `{_PIP} triton`",
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
        f"ial_cuda {__version__} in {_PACKAGE}, Python {platform.python_version()}, {platform.machine()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    ]
    if build:
        kernels = (
            f"nvcc {build['nvcc']} for {', '.join(build['arch_list'])}"
            if build["cuda"]
            else "no CUDA kernels"
        )
        lines.append(f"built with torch {build['torch']}, {build['compiler']}, {kernels}")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(i)
        version = ".".join(map(str, capability))
        line = f"device cuda:{i}: {torch.cuda.get_device_name(i)}, compute capability {version}"
        if unavailable["cuda"] is None and not _covers(build["arch_list"], capability):
            line += ", for which the CUDA kernels are not built; "
            line += f"set TORCH_CUDA_ARCH_LIST={version} and {_reinstall()}"
        lines.append(line)
    lines.append("backends:")
    for backend, reason in unavailable.items():
        detail = " ({cpu}, threads: {threads})".format(**_C.build_info()) if _C and backend == "cpu" else ""
        lines.append(f"  {backend:<9} {'no: ' + reason if reason else 'yes' + detail}")
    for device, backends in preference.items():
        best = next(name for name in backends if unavailable[name] is None)
        if best in one_launch:
            best = f"{one_launch[best]} in training, where an image fits on the chip, else {best}"
        lines.append(f'backend="auto" on {device}: {best}')
    return "\n".join(lines)


def register_fakes(library: str) -> None:
    """Tells torch.compile, meta tensors and fake tensors what the operators return."""
    # Without what torch need not know: schemas, in csrc/library.cpp, have all names.

    @torch.library.register_fake(f"{library}::reduce")
    def _(
        logits: Tensor, target: Tensor, weight: Any, pixel_weight: Any, class_levels: list[int], *_: Any
    ) -> Tensor:
        return logits.new_empty((logits.shape[0], max(class_levels) + 1, 5), dtype=torch.float64)

    @torch.library.register_fake(f"{library}::reduce_backward")
    def _(logits: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(logits)

    @torch.library.register_fake(f"{library}::reduce_backward_")
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

    @torch.library.register_fake(f"{library}::combine_backward")
    def _(stats: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(stats)


if _C is not None:
    register_fakes("ial_cuda")

    @torch.library.register_fake("ial_cuda::rescale_")
    def _(*_: Any) -> None:
        return None

    @torch.library.register_fake("ial_cuda::loss_and_grad")
    def _(
        logits: Tensor, target: Tensor, weight: Any, pixel_weight: Any, class_levels: list[int], *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        images, levels, scope = logits.shape[0], max(class_levels) + 1, rest[-1]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = logits.new_empty((), dtype=dtype)
        stats = logits.new_empty((images, levels, 5), dtype=torch.float64)
        f = stats.new_empty((1 if scope == "batch" else images, levels - 1))
        return loss, f, stats, torch.empty_like(stats), torch.empty_like(logits)

    @torch.library.register_fake("ial_cuda::fits_on_chip")
    def _(*_: Any) -> bool:
        return False
