"""The hardware and software that a time depends on, and the file that records it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ial_cuda
from ial_cuda import extension


def describe_machine() -> dict[str, Any]:
    """Hardware and software, without anything that identifies the owner of the machine."""
    machine = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": _huge_pages(),
        "torch_asks_for_huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ial_cuda": ial_cuda.__version__,
        "compiler": extension.build.get("compiler"),
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
        machine["nvcc"] = extension.build.get("nvcc")
        machine["archs"] = extension.build.get("arch_list")
        machine["triton"] = _version("triton")
        machine |= _nvidia_smi("driver_version")
    return machine


def describe_gpu_state() -> dict[str, str]:
    """Current clocks in MHz, power in W and temperature in °C of the GPU in use."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def describe_hardware(machine: Mapping[str, Any], device: str | None = None) -> str:
    """One line for the caption of a picture: the device, its instruction set or the GPU, and torch.

    Args:
        machine: what `describe_machine` returned.
        device: "cpu" or "cuda"; default: the GPU if the machine has one.
    """
    if "gpu" in machine and device != "cpu":
        return f"{machine['gpu']}, torch {machine['torch']}"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{machine['cpu']}, {machine['instruction_set']}, {threads}, torch {machine['torch']}"


def write_json(file: Path, data: Any) -> None:
    """Replaces the file in one step: an interrupted program leaves the old file or the new one."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=2) + "\n")
    new.replace(file)


def _nvidia_smi(*fields: str) -> dict[str, str]:
    """Fields of nvidia-smi for the current device. This only reads the state of the GPU."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    answer = _first_line(
        "nvidia-smi", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"
    )
    return dict(zip(fields, answer.split(", "), strict=False)) if answer else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    """Linux's setting of transparent huge pages: without them a large new tensor costs several times more."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return found[1] if found else None


def _first_line(*command: str) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(output.splitlines()), None)
