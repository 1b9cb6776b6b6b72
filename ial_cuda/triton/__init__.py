"""The Triton backend. The import loads Triton and registers the operators under torch.ops.ial_triton."""

from . import autograd, operators  # noqa: F401
