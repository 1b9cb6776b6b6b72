"""Loads the compiled extension. If it cannot be loaded, gives the reason and the remedy."""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from .fakes import register_fakes

_PACKAGE = Path(__file__).parent
PIP = f"{shlex.quote(sys.executable)} -m pip install"


def _is_source_tree() -> bool:
    """Whether this package is imported from a source tree, as it is after an editable install."""
    return all((_PACKAGE.parent / name).exists() for name in ("setup.py", "csrc"))


def _installed_from() -> str | None:
    """The sources that pip installed this package from (PEP 610), if they still exist."""
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
    """The command that builds the extension for this torch."""
    build = f"{PIP} --no-build-isolation --no-deps"
    if _is_source_tree():
        return f"reinstall it: `{build} -e {shlex.quote(str(_PACKAGE.parent))}`"
    # pip may have cached a wheel for another torch.
    build += " --no-cache-dir --force-reinstall"
    source = _installed_from()
    if source is None:
        return f"reinstall it, in a checkout of ial_cuda: `{build} .`"
    return f"reinstall it: `{build} {shlex.quote(source)}`"


def _read_build() -> dict[str, Any]:
    """What setup.py recorded: versions of torch, CUDA, nvcc and the compiler, architectures, a warning."""
    try:
        return dict(json.loads((_PACKAGE / "_build.json").read_text()))
    except FileNotFoundError:
        return {}


def _load(build: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """The extension, or why it cannot be loaded.

    Versions are compared first: with another torch the import fails with an undefined symbol.
    """
    if build and (build["torch"], build["torch_cuda"]) != (torch.__version__, torch.version.cuda):
        return None, (
            f"the extension was built for torch {build['torch']} (CUDA {build['torch_cuda']}), but torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) is imported; {_reinstall()}"
        )
    # Search this folder only: with an editable install, Python would find the extension of another checkout.
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
            f"in another folder to use the installed ial_cuda, or {_reinstall()}"
        )
    return f"ial_cuda is installed without its extension; {_reinstall()}"


def _why_no_cuda(build: dict[str, Any]) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("ial_cuda::reduce", "CUDA"):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build, then {_reinstall()}"
    if warning := build.get("warning"):
        return f"{warning}, then {_reinstall()}"
    return (
        "the extension was built without the CUDA kernels, as IAL_CUDA_FORCE_CPU=1 asks or for lack of nvcc; "
        f"to have them, {_reinstall()}"
    )


def _covers(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for these architectures (in torch's notation) run on a GPU of this capability."""
    for arch in arch_list:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            return True  # the name of an architecture, such as Hopper
        major, minor, feature, ptx = found.groups()
        built = int(major), int(minor)
        # A binary also runs on later minor versions, PTX on all later versions, and "a" on one version only.
        if built == capability or (
            built < capability and feature != "a" and (ptx or built[0] == capability[0])
        ):
            return True
    return False


def describe() -> list[str]:
    """Lines with the versions, the build, and the GPUs of this machine."""
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
        if why_no_cuda is None and not _covers(build["arch_list"], capability):
            line += ", for which the CUDA kernels were not built; "
            line += f"set TORCH_CUDA_ARCH_LIST={version} and {_reinstall()}"
        lines.append(line)
    return lines


#: What setup.py recorded about the build.
build = _read_build()
#: The extension, and why it cannot be loaded. One of the two is None.
module, problem = _load(build)
#: Why the CUDA kernels are missing, or None.
why_no_cuda = problem or _why_no_cuda(build)

if module is not None:
    register_fakes("ial_cuda")
