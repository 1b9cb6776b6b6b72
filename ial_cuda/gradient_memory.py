"""Controls the memory of a CPU gradient that the next one reuses."""

from __future__ import annotations

from . import extension
from .arguments import as_bool


def release_gradient_memory() -> int:
    """Returns the memory that the "cpu" backend keeps to the system. The next backward pass allocates anew.

    The memory of a gradient of 2 MiB or more is reused by the next one, as torch's allocator does on a GPU.
    The largest gradient so far is kept. Linux may reclaim its pages when it needs memory; its addresses stay
    reserved.

    Returns:
        The number of bytes released, 0 if nothing was kept.
    """
    return 0 if extension.module is None else int(extension.module.release_gradient_memory())


def keep_gradient_memory(enabled: bool) -> bool:
    """Sets whether the "cpu" backend keeps the memory of a gradient for the next one; False releases it, too.

    IAL_CUDA_KEEP_GRADIENT=0 in the environment disables it from the start. Nothing is kept where the
    addresses of a process are limited (``ulimit -v``, ``ulimit -d``), where Linux never overcommits memory,
    and on systems other than Linux.

    Returns:
        Whether memory was kept before.

    Raises:
        TypeError: ``enabled`` is not a bool.
    """
    enabled = as_bool(enabled, "enabled")
    return False if extension.module is None else bool(extension.module.keep_gradient_memory(enabled))
