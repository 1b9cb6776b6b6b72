"""Controls the memory of a CPU gradient that the next one reuses."""

from __future__ import annotations

from . import extension
from .arguments import as_bool


def release_gradient_memory() -> int:
    """Gives the memory that the "cpu" backend keeps back to the system; the next backward pass asks anew.

    A gradient of 2 MiB or more leaves its memory to the next one, as torch does on a GPU. What is kept is one
    gradient, the largest, whose pages Linux may take whenever it needs memory; its addresses stay taken.

    Returns:
        The number of bytes released: 0 where nothing was kept.
    """
    return 0 if extension.module is None else int(extension.module.release_gradient_memory())


def keep_gradient_memory(enabled: bool) -> bool:
    """Whether the "cpu" backend keeps the memory of a gradient for the next one. If not, it is released.

    The environment variable IAL_CUDA_KEEP_GRADIENT=0 switches it off from the start. Nothing is kept in any
    case where the addresses of a process are limited (``ulimit -v``, ``ulimit -d``), where Linux never
    overcommits memory, and on other systems than Linux.

    Returns:
        Whether memory was kept before.

    Raises:
        TypeError: ``enabled`` is not a bool.
    """
    enabled = as_bool(enabled, "enabled")
    return False if extension.module is None else bool(extension.module.keep_gradient_memory(enabled))
