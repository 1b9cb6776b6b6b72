"""Builds ial_cuda._C against the torch installed here, with the CUDA kernels where nvcc fits that torch.

Everything else about the package stands in pyproject.toml. Environment:

IAL_CUDA_FORCE_CPU=1      leaves the CUDA kernels out
IAL_CUDA_REQUIRE_EXT=1    makes a failed build an error; else it leaves pure Python and a warning
TORCH_CUDA_ARCH_LIST      the architectures, as torch spells them ("9.0;12.0+PTX"); default: DEFAULT_ARCHS
MAX_JOBS                  how many compilers run at once
CXX, CUDA_HOME            which compilers
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

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"ial_cuda builds against the torch you run it with, which build isolation hides ({error}): install "
        "torch first, then `pip install --no-build-isolation ial_cuda` (in a checkout, `.` for `ial_cuda`)."
    ) from None

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"ial_cuda needs setuptools>=77 to build, and {setuptools.__version__} is installed, which "
        "--no-build-isolation uses as it is: `pip install --upgrade setuptools` first."
    )

NAME = "ial_cuda._C"

# A binary serves the later minor versions of its generation too (8.0 runs on 8.9); PTX, what is yet to come.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")

# pip keeps the wheels that it builds: without --no-cache-dir it would bring back the one complained about.
REINSTALL = "`pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall ial_cuda`"


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


def decide(env: Mapping[str, str], torch_cuda: str | None, nvcc: Nvcc | None) -> Plan:
    """CUDA or not, for which architectures, and what the user must hear; from its arguments alone."""
    if is_set(env, "IAL_CUDA_FORCE_CPU") or torch_cuda is None:
        return Plan(cuda=False)

    major = torch_cuda.split(".")[0]
    if nvcc is None:
        found = "no working nvcc is in CUDA_HOME or on PATH"
    elif nvcc.version.split(".")[0] != major:
        found = f"the nvcc in {nvcc.home} is of CUDA {nvcc.version}, another major version"
    else:
        found = None
    if found:
        return Plan(
            cuda=False,
            warning=f"built without the CUDA kernels: torch is for CUDA {torch_cuda}, and {found}. To have "
            f"them, install the CUDA {major} toolkit, point CUDA_HOME at it and reinstall with {REINSTALL}; "
            "IAL_CUDA_FORCE_CPU=1 does without them and without this warning.",
        )

    listed = env.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    archs = [arch for arch in listed.split(";") if arch]
    if not archs:
        archs = [arch for arch in DEFAULT_ARCHS if arch in nvcc.archs]
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
        # What PATH has may be a script or a link; nvcc itself knows where its libraries lie.
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


def compile_flags(plan: Plan) -> dict[str, list[str]]:
    """No -std among them: torch adds the one that its headers need, which differs between its versions."""
    if os.name == "nt":
        cxx = ["/O2"]
    else:
        # torch's own headers leave parameters unused. -g, which Python's flags often bring along, makes the
        # compile half as long again and the objects forty times as large.
        cxx = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
        # What the vectoriser needs, and no more: results stay IEEE's, with NaN and infinity.
        cxx += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "linux" and "clang" not in compiler():
        # at::parallel_for is a header and, included without OpenMP, runs on one thread. The linker is not
        # told: the runtime must be the one that torch brings, whose threads torch.set_num_threads sets. It is
        # libgomp, which lacks what clang calls.
        cxx.append("-fopenmp")
        # A loop that clears a few hundred bytes is to stay one: "rep stos" takes long to start.
        cxx.append("-fno-tree-loop-distribute-patterns")
    # Files are compiled side by side; where that leaves cores idle, so are a file's architectures.
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = max(1, min(jobs // len(glob("csrc/*.cu")), len(plan.arch_list))) if plan.cuda else 1
    return {"cxx": cxx, "nvcc": ["-O3", f"--threads={threads}"]}


def compiler() -> str:
    """The first line that the C++ compiler has to say about itself."""
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
        sources=sorted(glob("csrc/*.cpp") + (glob("csrc/*.cu") if plan.cuda else [])),
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.cuh")),
        define_macros=[("IAL_WITH_CUDA", None)] if plan.cuda else [],
        extra_compile_args=compile_flags(plan),
    )


class BuildExt(cpp_extension.BuildExtension):
    """torch's build_ext that records what it built (ial_cuda/_build.json) and survives what it could not."""

    plan: Plan
    nvcc: Nvcc | None

    def initialize_options(self) -> None:
        super().initialize_options()
        # Kept from one editable install to the next, where setuptools would take a fresh temporary folder.
        # One per torch: objects compiled for another must not be linked again.
        self.build_temp = os.path.join("build", f"torch-{torch.__version__}")

    def run(self) -> None:
        inplace = self.inplace
        warning = self.plan.warning
        built = True
        try:
            command = shlex.split(cpp_extension.get_cxx_compiler())[0]
            if os.name != "nt" and shutil.which(command) is None:
                raise FileNotFoundError(
                    f"no C++ compiler, {command!r} is not on PATH: install g++ or set CXX"
                )
            super().run()
        except Exception as error:
            if is_set(os.environ, "IAL_CUDA_REQUIRE_EXT"):
                raise
            built = False
            warning = (
                f"BUILT WITHOUT ITS C++ EXTENSION, with its backends in Python alone: {error} (all that "
                f"the compilers said: `pip install -v`). Mend this and reinstall with {REINSTALL}; "
                "IAL_CUDA_REQUIRE_EXT=1 makes it an error."
            )
            # super().run() stopped half way: `inplace` is still cleared, and an old build may be lying there.
            self.inplace = inplace
            Path(self.get_ext_fullpath(NAME)).unlink(missing_ok=True)
        self.record(built, warning)
        if not built:
            self.extensions = []
        if warning:
            print(f"\n{'*' * 80}\nial_cuda: {warning}\n{'*' * 80}\n", file=sys.stderr)

    def record(self, built: bool, warning: str | None) -> None:
        with_cuda = built and self.plan.cuda
        facts = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if with_cuda else None,
            "torch_cuda": torch.version.cuda,
            "nvcc": self.nvcc.version if self.nvcc else None,
            "arch_list": self.plan.arch_list if with_cuda else [],
            "compiler": compiler() if built else None,
            "warning": warning,
        }
        path = Path(self.get_ext_fullpath(NAME)).with_name("_build.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    with contextlib.suppress(ImportError):
        import ninja

        # torch looks on PATH alone, which an environment that is used without being activated is not on.
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])

    BuildExt.nvcc = find_nvcc()
    # Without kernels to compile (csrc/*.cu), a torch for CUDA is as good as one without.
    BuildExt.plan = decide(os.environ, torch.version.cuda if glob("csrc/*.cu") else None, BuildExt.nvcc)
    if BuildExt.plan.cuda:
        cpp_extension.CUDA_HOME = BuildExt.nvcc.home
        # Without a list torch asks the GPUs of this machine, and fails where there is none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(BuildExt.plan.arch_list)
    setuptools.setup(ext_modules=[extension(BuildExt.plan)], cmdclass={"build_ext": BuildExt})


# PEP 517's setuptools.build_meta runs this file as __main__; the tests import it.
if __name__ == "__main__":
    main()
