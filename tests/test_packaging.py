"""setup.py: its decisions, its errors when it cannot build, and the contents of the sdist and the wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ial_cuda
from ial_cuda import extension

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {".gitignore", ".ci/run"}


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ial_cuda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return load_setup()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources of a build, with nothing built."""
    tree = tmp_path / "tree"
    built = shutil.ignore_patterns("_C*.so", "_C*.pyd", "_build.json", "__pycache__")
    for folder in ("ial_cuda", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=built)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    return tree


def python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with `env` and without the build variables of the test run."""
    ours = ("IAL_", "TORCH_CUDA_ARCH_LIST", "CC", "CXX")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=300
    )


def without_compiler(tmp_path: Path) -> dict[str, str]:
    nowhere = tmp_path / "empty"
    nowhere.mkdir()
    return {"PATH": str(nowhere), "CC": "no-such-cc", "CXX": "no-such-c++", "IAL_CUDA_FORCE_CPU": "1"}


# ---------------------------------------------------------------------------------------------- decisions

ARCHS = frozenset({"7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"})
ALL = ("8.0", "9.0", "10.0", "12.0+PTX")


@pytest.mark.parametrize(
    ("env", "torch_cuda", "version", "archs", "expected"),
    [
        pytest.param({}, "13.0", "13.0", ARCHS, ALL, id="default list"),
        pytest.param({}, "13.1", "13.0", ARCHS, ALL, id="minor versions may differ"),
        pytest.param({}, "12.8", "12.4", ARCHS - {"10.0", "12.0"}, ("8.0", "9.0+PTX"), id="old nvcc"),
        pytest.param({}, "14.0", "14.0", ARCHS - {"8.0"}, ALL[1:], id="new nvcc"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": ""}, "13.0", "13.0", ARCHS, ALL, id="empty list is no list"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "7.5"}, "13.0", "13.0", ARCHS, ("7.5",), id="list"),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "8.9 9.0;12.0+PTX"},
            "13.0",
            "13.0",
            ARCHS,
            ("8.9", "9.0", "12.0+PTX"),
            id="list with both separators",
        ),
        pytest.param({"IAL_CUDA_FORCE_CPU": "0"}, "13.0", "13.0", ARCHS, ALL, id="0 forces nothing"),
    ],
)
def test_decides_for_cuda(setup, env, torch_cuda, version, archs, expected):
    plan = setup.decide(env, torch_cuda, setup.Nvcc("/cuda", version, archs))
    assert plan == setup.Plan(cuda=True, arch_list=expected, warning=None)


@pytest.mark.parametrize(
    ("env", "torch_cuda", "version", "said"),
    [
        pytest.param({"IAL_CUDA_FORCE_CPU": "1"}, "13.0", "13.0", (), id="forced"),
        pytest.param({"IAL_CUDA_FORCE_CPU": "1"}, "13.0", None, (), id="forced, no nvcc"),
        pytest.param({}, None, "13.0", (), id="torch for the CPU"),
        pytest.param({}, "13.0", None, ("CUDA 13.0", "no working nvcc", "CUDA 13 toolkit"), id="no nvcc"),
        pytest.param({}, "13.0", "12.4", ("CUDA 13.0", "CUDA 12.4", "CUDA 13 toolkit"), id="major, older"),
        pytest.param({}, "12.8", "13.0", ("CUDA 12.8", "CUDA 13.0", "CUDA 12 toolkit"), id="major, newer"),
        pytest.param({}, "1.0", "10.0", ("CUDA 1.0", "CUDA 10.0"), id="major, not a prefix"),
    ],
)
@pytest.mark.parametrize("gpus", [(), ("9.0",)])
def test_decides_for_the_cpu(setup, env, torch_cuda, version, said, gpus):
    nvcc = setup.Nvcc("/cuda", version, ARCHS) if version else None
    plan = setup.decide(env, torch_cuda, nvcc, gpus)
    assert (plan.cuda, plan.arch_list) == (False, ())
    assert (plan.warning is None) == (not said)
    for words in said:
        assert words in plan.warning


@pytest.mark.parametrize(
    ("env", "gpus", "expected"),
    [
        pytest.param({}, ("9.0",), ("9.0+PTX",), id="one"),
        pytest.param({}, ("8.6", "12.0"), ("8.6", "12.0+PTX"), id="two"),
        pytest.param({}, ("9.0", "13.0"), ALL, id="one that nvcc does not know"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "8.0"}, ("9.0",), ("8.0",), id="the list goes first"),
    ],
)
def test_builds_for_the_gpus_of_the_machine(setup, env, gpus, expected):
    plan = setup.decide(env, "13.0", setup.Nvcc("/cuda", "13.0", ARCHS), gpus)
    assert plan == setup.Plan(cuda=True, arch_list=expected, warning=None)


@pytest.mark.skipif(os.name == "nt", reason="the nvidia-smi of this test is a shell script")
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("printf '9.0\\n12.0\\n8.6\\n9.0\\n'", ("8.6", "9.0", "12.0")),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9", ()),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", ()),
        ("echo '[N/A]'", ()),
        (None, ()),
    ],
    ids=["three kinds", "no driver", "old driver", "unknown", "no nvidia-smi"],
)
def test_asks_the_driver_for_the_gpus(setup, script, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert setup.find_gpus() == expected


@pytest.mark.skipif(os.name == "nt", reason="the nvcc of this test is a shell script")
def test_finds_nvcc(setup, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.131';;\n"
        "--list-gpu-arch) printf 'compute_90\\ncompute_120\\n';;\n"
        "--dryrun) echo '#$ TOP=/opt/toolkit/bin/..' >&2;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setattr(setup.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() == setup.Nvcc("/opt/toolkit", "12.4", frozenset({"9.0", "12.0"}))

    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert setup.find_nvcc() is None, "an nvcc that does not run counts as missing"


# ---------------------------------------------------------------------------------- what cannot be built


def test_without_torch_one_sentence(tree, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('No module named torch')")
    hook = "from setuptools import build_meta; build_meta.get_requires_for_build_wheel()"
    done = python("-c", hook, cwd=tree, PYTHONPATH=str(hidden))
    assert done.returncode != 0
    assert done.stdout == ""
    sentence, newline, rest = done.stderr.partition("\n")
    assert (newline, rest) == ("\n", ""), done.stderr
    assert sentence.startswith("ial_cuda builds against the torch you run it with")
    assert "which build isolation hides" in sentence
    assert "run the same command with --no-build-isolation" in sentence


def test_old_setuptools_one_sentence(monkeypatch):
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools>=77 .* 65\.5\.0 is installed"):
        load_setup()


def test_without_compiler_an_error_with_the_remedy(tree, tmp_path):
    hook = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = python("-c", hook, cwd=tree, **without_compiler(tmp_path))
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()[-1]
    assert "'no-such-c++' is not on PATH: install g++ or set CXX. IAL_CUDA_PURE_PYTHON=1 leaves" in last
    assert not list(tree.glob("dist/*.whl"))


@pytest.mark.skipif(os.name == "nt", reason="the failing compiler of this test is POSIX's `false`")
def test_failed_compile_is_an_error_and_touches_nothing(tree):
    old = tree / "ial_cuda" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_bytes(b"the last build")
    (tree / "ial_cuda" / "_build.json").write_text("its record")
    false = shutil.which("false")
    hook = "from setuptools import build_meta; build_meta.build_editable('dist')"
    done = python("-c", hook, cwd=tree, CC=false, CXX=false, IAL_CUDA_FORCE_CPU="1")
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("ial_cuda's extension does not build (") and "IAL_CUDA_PURE_PYTHON=1" in last
    assert old.read_bytes() == b"the last build"
    assert (tree / "ial_cuda" / "_build.json").read_text() == "its record"


def test_pure_python_on_request(tree, tmp_path):
    with (tree / "ial_cuda" / "__init__.py").open("a") as file:
        file.write("\nraise RuntimeError('a build must not import the package')\n")
    hook = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = python("-c", hook, cwd=tree, IAL_CUDA_PURE_PYTHON="1", **without_compiler(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    name = f"ial_cuda-{ial_cuda.__version__}"
    assert path.name == f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        requires = message_from_bytes(archive.read(f"{name}.dist-info/METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ial_cuda"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ial_cuda").rglob("*.py")}
    assert modules | {"ial_cuda/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("ial_cuda/_C", "ial_cuda/_build"))]
    assert torch_of(requires) == "torch>=2.11"


# ------------------------------------------------------------------------------------ for which torch


def torch_of(metadata: Message) -> str:
    (requirement,) = (line for line in metadata.get_all("Requires-Dist") if re.match(r"torch\b", line))
    return requirement


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_wheel_with_the_extension_requires_its_torch(tree, kind):
    (tree / "meta").mkdir()
    hook = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_{kind}('meta')"
    done = python("-c", hook, cwd=tree, IAL_CUDA_FORCE_CPU="1")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "meta").glob("*.dist-info/METADATA")
    metadata = message_from_bytes(path.read_bytes())
    public = torch.__version__.partition("+")[0]
    assert torch_of(metadata) == f"torch=={public}"
    version, _, local = metadata["Version"].partition("+")
    assert version == ial_cuda.__version__
    assert local == f"torch{torch.__version__.replace('+', '.')}"


def stub_extension(tree: Path) -> None:
    """Sources that compile in a second: a module that has the version of its torch."""
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "stub.cpp").write_text(
        "#include <Python.h>\n"
        'static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};\n'
        'extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() '
        "{ return PyModule_Create(&module); }\n"
    )


def test_what_another_torch_left_is_not_packed(tree):
    """Without ninja, setuptools would take a newer file in build/lib* as up to date."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    stub_extension(tree)
    hook = (
        "from torch.utils import cpp_extension; cpp_extension.is_ninja_available = lambda: False; "
        "from setuptools import build_meta; build_meta.build_wheel('dist')"
    )
    assert python("-c", hook, cwd=tree).returncode == 0
    (stale,) = (tree / "build").glob("lib*/ial_cuda/_C*")
    stale.write_bytes(b"for another torch")
    assert python("-c", hook, cwd=tree).returncode == 0
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"ial_cuda/{stale.name}").startswith(b"\x7fELF")


# ------------------------------------------------------------------------- messages without an extension


def why_no_cpu(cwd: Path, **env: str) -> tuple[str, list[str]]:
    """Why a Python started in `cwd` has no "cpu" backend, and the command at the end of the reason."""
    done = python("-c", "from ial_cuda import extension; print(extension.problem)", cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    reason, command, rest = done.stdout.split("`")
    assert rest == "\n"
    return reason, shlex.split(command)


def assert_installs(command: list[str], cwd: Path) -> None:
    interpreter, *arguments = command
    assert interpreter == sys.executable and arguments[:3] == ["-m", "pip", "install"]
    done = python(*arguments, "--dry-run", "--no-index", cwd=cwd, IAL_CUDA_FORCE_CPU="1")
    assert done.returncode == 0, done.stderr
    assert f"Would install ial_cuda-{ial_cuda.__version__}" in done.stdout


def test_a_source_tree_is_named(tree):
    pytest.importorskip("pip")
    reason, command = why_no_cpu(tree)
    assert (
        f"imported from {tree}, a source tree without its extension; start Python in another folder" in reason
    )
    assert_installs(command, tree.parent)


@pytest.mark.parametrize("origin", ["folder", "folder gone", "git", "wheel", "unknown"])
def test_what_is_installed_names_its_sources(tree, tmp_path, origin):
    """Each command is run as printed, with --dry-run added."""
    pytest.importorskip("pip")
    site = tmp_path / "site"
    shutil.copytree(tree / "ial_cuda", site / "ial_cuda")
    info = site / f"ial_cuda-{ial_cuda.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: ial_cuda\nVersion: {ial_cuda.__version__}\n"
    )
    wheel = tmp_path / "ial_cuda-1-py3-none-any.whl"
    wheel.touch()
    direct_url = {
        "folder": {"url": tree.as_uri(), "dir_info": {}},
        "folder gone": {"url": (tmp_path / "gone").as_uri(), "dir_info": {}},
        "git": {"url": tree.as_uri(), "vcs_info": {"vcs": "git", "commit_id": ""}},
        "wheel": {"url": wheel.as_uri(), "archive_info": {}},
        "unknown": None,
    }[origin]
    if origin == "git":
        direct_url["vcs_info"]["commit_id"] = commit(tree)
    if direct_url:
        (info / "direct_url.json").write_text(json.dumps(direct_url))

    reason, command = why_no_cpu(tmp_path, PYTHONPATH=str(site))
    known = origin in ("folder", "git")
    where = "" if known else ", in a checkout of ial_cuda"
    assert reason == f"ial_cuda is installed without its extension; reinstall it{where}: "
    assert_installs(command, tmp_path if known else tree)


def commit(tree: Path) -> str:
    git = shutil.which("git")
    if git is None:
        pytest.skip("no git")

    def run(*arguments: str) -> str:
        command = [git, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()

    run("init")
    run("add", ".")
    run("commit", "-m", "all")
    return run("rev-parse", "HEAD")


def test_an_extension_for_another_python_is_named(tree):
    (tree / "ial_cuda" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    reason, _ = why_no_cpu(tree)
    assert reason.startswith(
        "the extension is for another Python (_C.cpython-39-x86_64-linux-gnu.so); reinstall"
    )


def test_an_extension_for_another_torch_is_named(tree):
    (tree / "ial_cuda" / "_build.json").write_text(json.dumps({"torch": "1.0", "torch_cuda": None}))
    reason, command = why_no_cpu(tree)
    assert reason.startswith("the extension was built for torch 1.0 (CUDA None), but torch")
    assert command[-2:] == ["-e", str(tree)]


def test_no_remedy_asks_an_index_for_this_package():
    asks = re.compile(r"pip install[^`\n]*[ '\"]ial_cuda\b")
    found = [f"{name}: {asks.search(text).group()}" for name, text in texts() if asks.search(text)]
    assert not found


def texts() -> Iterator[tuple[str, str]]:
    """The files with commands for users."""
    for name in source_files():
        if name.endswith((".py", ".md", ".toml", "Makefile")) and not name.startswith("tests/"):
            yield name, (ROOT / name).read_text()


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        (["9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0+PTX"], (8, 9), False),
        (["8.0", "9.0", "10.0", "12.0+PTX"], (12, 1), True),
        (["8.0", "9.0", "10.0", "12.0+PTX"], (7, 5), False),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        (["10.0f"], (10, 3), True),
        (["Hopper"], (9, 0), True),
    ],
)
def test_which_gpus_the_kernels_run_on(arch_list, capability, expected):
    assert extension._covers(arch_list, capability) == expected


@pytest.mark.parametrize("arch_list", [["9.0+PTX"], ["8.0", "9.0"]])
def test_info_names_a_gpu_that_the_kernels_are_not_built_for(arch_list, monkeypatch):
    build = {"torch": "2", "compiler": "g++", "nvcc": "13.0", "cuda": "13.0", "arch_list": arch_list}
    monkeypatch.setattr(extension, "build", build)
    monkeypatch.setattr(extension, "why_no_cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 6))
    (line,) = (line for line in extension.describe() if line.startswith("device cuda:0: "))
    assert line.startswith("device cuda:0: A GPU, compute capability 8.6")
    assert ("not built; set TORCH_CUDA_ARCH_LIST=8.6 and reinstall it" in line) == ("8.0" not in arch_list)


def test_make_help_has_the_whole_of_each_text():
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    texts = re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = [make, "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in done.stdout.split("\n\n")[0].splitlines()]
    assert lines == [["make", target, text] for target, text in texts]


# ----------------------------------------------------------------------------------------- what was built


def test_record_beside_the_extension():
    package = Path(importlib.util.find_spec("ial_cuda").origin).parent
    if not (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        pytest.skip("ial_cuda is installed without its extension here")
    record = json.loads((package / "_build.json").read_text())
    assert set(record) == {"torch", "cuda", "torch_cuda", "nvcc", "arch_list", "compiler", "warning"}
    assert record["torch"] == torch.__version__
    assert record["torch_cuda"] == torch.version.cuda
    assert record["cuda"] in (None, torch.version.cuda)
    assert bool(record["arch_list"]) == (record["cuda"] is not None)
    assert any(digit in record["compiler"] for digit in "0123456789")


def test_loops_run_on_torchs_threads():
    if extension.module is None:
        pytest.skip(extension.problem)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert extension.module.build_info()["threads"] == threads
    finally:
        torch.set_num_threads(before)


def source_files() -> list[str]:
    """The files in git, including those that `git add .` would add."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not there to say which files are sources")
    top = subprocess.run([git, "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
    if top.returncode != 0 or Path(top.stdout.strip()).resolve() != ROOT:
        pytest.skip(f"not the top of a git checkout: {top.stderr.strip() or top.stdout.strip()}")
    listing = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


def test_sdist_holds_the_sources_and_nothing_else(tmp_path):
    sources = source_files()
    strangers = [
        "ial_cuda/_C.cpython-310-x86_64-linux-gnu.so",
        "ial_cuda/_build.json",
        "build/torch-2.11.0/csrc/library.o",
        "tests/__pycache__/test_packaging.cpython-310.pyc",
        "tests/simt.so",
        "camvid/0001TP_006690.png",
        ".venv/pyvenv.cfg",
    ]
    for name in sources + strangers:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for name in sources:
        shutil.copy(ROOT / name, tmp_path / name)
    for name in strangers:
        (tmp_path / name).write_text("not a source")

    hook = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    done = python("-c", hook, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
        metadata = message_from_bytes(
            archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO").read()
        )
    written = {
        name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("ial_cuda.egg-info/")
    }
    assert names - written == set(sources) - NOT_SHIPPED
    assert metadata["Version"] == ial_cuda.__version__
    assert torch_of(metadata) == "torch>=2.11"
