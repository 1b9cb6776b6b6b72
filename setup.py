"""Builds ial_cuda._C against the installed torch. Includes the CUDA kernels if a matching nvcc is installed.

All other package metadata is in pyproject.toml. Environment variables:

IAL_CUDA_FORCE_CPU=1      leaves the CUDA kernels out
IAL_CUDA_PURE_PYTHON=1    leaves the extension out; no compiler is needed, and the loss on the CPU is slow
TORCH_CUDA_ARCH_LIST      GPU architectures in torch's notation ("9.0;12.0+PTX"). Default: those of this
                          machine's GPUs, or DEFAULT_ARCHS. Set it to build wheels for other machines.
MAX_JOBS                  number of compilers that run at the same time
CXX, CUDA_HOME            the compilers to use
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools.command.egg_info import egg_info

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"ial_cuda builds against the torch you run it with, which build isolation hides ({error}). "
        "Install torch first, then run the same command with --no-build-isolation (`python -m build`: "
        "--no-isolation)."
    ) from None

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"ial_cuda needs setuptools>=77 to build, but {setuptools.__version__} is installed and "
        f"--no-build-isolation uses it. Run `{sys.executable} -m pip install 'setuptools>=77'` first."
    )

NAME = "ial_cuda._C"

CUDA_SOURCES = "csrc/cuda/*.cu"

# A binary also runs on later minor versions of its generation (8.0 on 8.9). PTX also serves later
# generations.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")

# The versions of torch that the sources compile against.
TORCH = "torch>=2.11"

OPT_OUT = (
    "IAL_CUDA_PURE_PYTHON=1 leaves the extension out. The loss is then slow on the CPU, and GPUs use Triton."
)


class Nvcc(NamedTuple):
    home: str
    version: str
    archs: frozenset[str]


class Plan(NamedTuple):
    cuda: bool
    arch_list: tuple[str, ...] = ()
    warning: str | None = None


def is_set(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "") not in ("", "0")


def decide(
    env: Mapping[str, str], torch_cuda: str | None, nvcc: Nvcc | None, gpus: tuple[str, ...] = ()
) -> Plan:
    """Decides whether to build for CUDA, for which architectures, and what to warn about.

    The result depends on the arguments alone. ``gpus`` (compute capabilities) only affect the architectures.
    """
    if is_set(env, "IAL_CUDA_FORCE_CPU") or torch_cuda is None:
        return Plan(cuda=False)

    major = torch_cuda.split(".")[0]
    if nvcc is None:
        found = "there is no working nvcc in CUDA_HOME or on PATH"
    elif nvcc.version.split(".")[0] != major:
        found = f"the nvcc in {nvcc.home} is of another major version, CUDA {nvcc.version}"
    else:
        found = None
    if found:
        return Plan(
            cuda=False,
            warning=f"built without the CUDA kernels, because torch is for CUDA {torch_cuda} but {found}: "
            f"install the CUDA {major} toolkit and set CUDA_HOME to its folder",
        )

    listed = env.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    archs = [arch for arch in listed.split(";") if arch]
    if not archs:
        known = nvcc.archs.issuperset(gpus)
        archs = list(gpus if gpus and known else (arch for arch in DEFAULT_ARCHS if arch in nvcc.archs))
        archs[-1] += "+PTX"
    return Plan(cuda=True, arch_list=tuple(archs))


def find_nvcc() -> Nvcc | None:
    torch_home = cpp_extension.CUDA_HOME
    path = (torch_home and shutil.which("nvcc", path=os.path.join(torch_home, "bin"))) or shutil.which("nvcc")
    if path is None:
        return None

    def ask(*question: str) -> str:
        answer = subprocess.run([path, *question], capture_output=True, text=True, check=True)
        return answer.stdout + answer.stderr

    try:
        version = re.search(r"release (\d+\.\d+)", ask("--version"))
        archs = re.findall(r"compute_(\d+)(\d)\b", ask("--list-gpu-arch"))
        # nvcc on PATH may be a script or a link. nvcc itself reports where its libraries are.
        top = re.search(r"TOP=(.+)", ask("--dryrun", "-x", "cu", os.devnull))
    except (OSError, subprocess.CalledProcessError):
        return None
    if version is None or top is None:
        return None
    return Nvcc(
        home=os.path.realpath(top.group(1)),
        version=version.group(1),
        archs=frozenset(f"{major}.{minor}" for major, minor in archs),
    )


def find_gpus() -> tuple[str, ...]:
    """The compute capabilities of this machine's GPUs. Asks the driver, so CUDA is not initialised."""
    question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = set(re.findall(r"^(\d+)\.(\d)$", answer, re.MULTILINE))
    return tuple(".".join(gpu) for gpu in sorted(found, key=lambda gpu: tuple(map(int, gpu))))


def compile_flags(plan: Plan) -> dict[str, list[str]]:
    """The flags of the compilers. There is no -std: torch adds the one that its headers need."""
    if os.name == "nt":
        cxx = ["/O2"]
    else:
        # torch's headers have unused parameters. Python's own flags often include -g, which makes compilation
        # 1.5 times as slow and objects forty times as large.
        cxx = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
        # The vectoriser needs these flags. Results still follow IEEE 754, including NaN and infinity.
        cxx += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
        if "clang" not in compiler():
            # The first flag keeps loops that clear a few hundred bytes, because "rep stos" is slow to start.
            # The second flag keeps loops over pixels inside loops over classes, which the compiler
            # vectorises.
            cxx += ["-fno-tree-loop-distribute-patterns", "-fno-loop-unroll-and-jam"]
    # Files are compiled in parallel. If that leaves cores idle, nvcc also compiles a file's architectures in
    # parallel.
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = max(1, min(jobs // len(glob(CUDA_SOURCES)), len(plan.arch_list))) if plan.cuda else 1
    return {"cxx": cxx, "nvcc": ["-O3", f"--threads={threads}"]}


def compiler() -> str:
    """The first line of the C++ compiler's --version."""
    command = shlex.split(cpp_extension.get_cxx_compiler())
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return command[0]
    return answer.partition("\n")[0]


def extension(plan: Plan) -> setuptools.Extension:
    make = cpp_extension.CUDAExtension if plan.cuda else cpp_extension.CppExtension
    return make(
        name=NAME,
        sources=sorted(glob("csrc/**/*.cpp", recursive=True) + (glob(CUDA_SOURCES) if plan.cuda else [])),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        extra_compile_args=compile_flags(plan),
    )


class BuildExt(cpp_extension.BuildExtension):
    """torch's build_ext. Writes a record of the build to ial_cuda/_build.json."""

    plan: Plan
    nvcc: Nvcc | None

    def initialize_options(self) -> None:
        super().initialize_options()
        # Kept between editable installs, where setuptools would use a new temporary folder. Each torch has
        # its own folder, because objects that were compiled for different versions must not be linked.
        self.build_temp = os.path.join("build", f"torch-{torch.__version__}")

    def finalize_options(self) -> None:
        super().finalize_options()
        # Without ninja, setuptools compares only times. A file for another torch would then count as up to
        # date.
        self.force = True

    def run(self) -> None:
        command = shlex.split(cpp_extension.get_cxx_compiler())[0]
        if os.name != "nt" and shutil.which(command) is None:
            raise SystemExit(
                f"ial_cuda needs a C++ compiler, but {command!r} is not on PATH: install g++ or set CXX. "
                + OPT_OUT
            )
        try:
            super().run()
        except Exception as error:
            raise SystemExit(
                f"ial_cuda's extension does not build ({type(error).__name__}: {error}). "
                f"IAL_CUDA_FORCE_CPU=1 leaves out the CUDA kernels. {OPT_OUT}"
            ) from error
        self.record()
        if self.plan.warning:
            text = f"{self.plan.warning}, then build again. IAL_CUDA_FORCE_CPU=1 avoids this warning."
            print(f"\n{'*' * 80}\nial_cuda: {text}\n{'*' * 80}\n", file=sys.stderr)

    def record(self) -> None:
        facts = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if self.plan.cuda else None,
            "torch_cuda": torch.version.cuda,
            "nvcc": self.nvcc.version if self.nvcc else None,
            "arch_list": self.plan.arch_list,
            "compiler": compiler(),
            "warning": self.plan.warning,
        }
        path = Path(self.get_ext_fullpath(NAME)).with_name("_build.json")
        path.write_text(json.dumps(facts, indent=2) + "\n")


class EggInfo(egg_info):
    """Appends torch's version to the package's, so that one folder can hold wheels for several torches."""

    def finalize_options(self) -> None:
        self.tag_build = "+torch" + re.sub(r"[^0-9a-zA-Z]+", ".", torch.__version__)
        super().finalize_options()


def main() -> None:
    with contextlib.suppress(ImportError):
        import ninja

        # torch looks for ninja on PATH. An environment that is not activated is not on PATH.
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])

    BuildExt.nvcc = find_nvcc()
    # Without CUDA_SOURCES there is nothing to compile for CUDA, so torch counts as built for the CPU.
    torch_cuda = torch.version.cuda if glob(CUDA_SOURCES) else None
    BuildExt.plan = decide(os.environ, torch_cuda, BuildExt.nvcc, find_gpus())
    if BuildExt.plan.cuda:
        cpp_extension.CUDA_HOME = BuildExt.nvcc.home
        # Without a list, torch queries this machine's GPUs and fails if there is none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(BuildExt.plan.arch_list)
    pure = is_set(os.environ, "IAL_CUDA_PURE_PYTHON")
    # The extension works with one version of torch. The sources, and a package without it, work with many.
    one_torch = not pure and "sdist" not in sys.argv
    setuptools.setup(
        install_requires=[f"torch=={torch.__version__.partition('+')[0]}" if one_torch else TORCH, "numpy"],
        ext_modules=[] if pure else [extension(BuildExt.plan)],
        cmdclass={"build_ext": BuildExt} | ({"egg_info": EggInfo} if one_torch else {}),
    )


# PEP 517's setuptools.build_meta runs this file as __main__. The tests import it.
if __name__ == "__main__":
    main()
