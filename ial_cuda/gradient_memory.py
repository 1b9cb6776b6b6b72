"""Controls the memory that CPU gradients reuse."""

from __future__ import annotations

from . import extension
from .arguments import as_bool


def release_gradient_memory() -> int:
    """Releases the memory that the "cpu" backend keeps for the next gradient.

    When a gradient of 2 MiB or more is freed, its memory is kept for the next one, as torch's caching
    allocator does on a GPU. At most one gradient is kept, the largest so far. Linux may reclaim its pages
    when it needs memory; its addresses stay reserved. After a release, the next gradient allocates memory.

    Returns:
        The number of bytes released, 0 if nothing was kept.

    Examples:
        >>> import ial_cuda
        >>> _ = ial_cuda.release_gradient_memory()
        >>> ial_cuda.release_gradient_memory()
        0
    """
    return 0 if extension.module is None else int(extension.module.release_gradient_memory())


def keep_gradient_memory(enabled: bool) -> bool:
    """Sets whether the "cpu" backend keeps the memory of a gradient for the next one.

    IAL_CUDA_KEEP_GRADIENT=0 in the environment disables it from the start. Nothing is kept if the address
    space of the process is limited (``ulimit -v``, ``ulimit -d``), if Linux is set to never overcommit
    memory, and on systems other than Linux.

    Args:
        enabled: whether to keep memory from now on. False also releases what is kept.

    Returns:
        The previous setting.

    Raises:
        TypeError: ``enabled`` is not a bool.

    Examples:
        >>> import ial_cuda
        >>> before = ial_cuda.keep_gradient_memory(False)
        >>> ial_cuda.keep_gradient_memory(before)
        False
    """
    enabled = as_bool(enabled, "enabled")
    return False if extension.module is None else bool(extension.module.keep_gradient_memory(enabled))
