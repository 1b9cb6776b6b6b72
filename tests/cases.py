"""Shared by the tests of the loss: backends, inputs, and the error rule."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace
from pathlib import Path

import interpreted
import numpy as np
import oracle
import pytest
import simt
import torch

from ial_cuda import Hierarchy, ImportanceAwareLoss, backends


def device_of(backend: str) -> str:
    return "cpu" if backends.get(backend).takes("cpu") else "cuda"


def _backend(name: str):
    reason = backends.get(name).missing or (interpreted.problem if name == "triton" else None)
    if reason is None and device_of(name) == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device"
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


simt.register()
interpreted.register()
# "cuda" chooses between one launch and two by itself. Tests run both.
CUDA = backends.get("cuda")
backends.register(replace(CUDA, name="cuda_two_launches", one_launch=False))
backends.register(replace(CUDA, name="cuda_one_launch", one_launch=True))
NAMES = [name for name in backends.names() if name != "cuda"]

#: Every backend. Those that this machine cannot run are skipped with the reason.
BACKENDS = [_backend(name) for name in NAMES]
#: The backends with kernels.
KERNELS = [_backend(name) for name in NAMES if name != "reference"]
#: The backends with kernels for CUDA tensors.
GPU_KERNELS = [backend for backend in KERNELS if device_of(backend.values[0]) == "cuda"]
#: The backends that run the CUDA sources, on the GPU or on the CPU.
LAUNCHED = [backend for backend in KERNELS if backend.values[0] not in ("cpu", "triton")]
#: The backends that the CPU emulates, slowly.
EMULATED = ["simt", "simt_one_launch", *["triton"] * interpreted.INTERPRETED]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

HIERARCHY = Hierarchy([[3], [0, 4], [1], [2]])
#: With one level the kernels make one pass, and the backward pass returns its gradient.
ONE_AND_FOUR = pytest.mark.parametrize("hierarchy", [Hierarchy.flat(5), HIERARCHY], ids=["one", "four"])
OPTIONS = {
    "alpha": [1.0, 0.3],
    "lambdas": [0.5, (0.2, 0.0, 1.5)],
    "reduction": ["mean", "sum", "none"],
    "factor_normalization": ["mean", "sum"],
    "factor_scope": ["image", "batch"],
    "gradient": ["exact", "paper"],
}

#: What the kernels raise for derivatives that they lack. The texts are written once in C++, once in Python.
DOUBLE = re.escape(
    'ial_cuda: double backward is not implemented; use backend="reference" where gradients of gradients '
    "are needed"
)
JVP = re.escape("ial_cuda: forward-mode derivatives (jvp) are not implemented; backend='reference' has them")


def make_target(shape, num_classes, *, ignore_index=255, ignored=0.15, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = ignore_index
    return target.to(dtype)


def make_logits(shape, dtype=torch.float64, *, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def trained_like(target, num_classes, dtype, *, margin=6.0, seed=0):
    """Logits like those of a trained network: a margin for one class, correct in nine pixels of ten."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(target.shape, generator=generator) < 0.1
    guess = torch.where(
        wrong | (target >= num_classes), torch.randint(num_classes, target.shape, generator=generator), target
    )
    logits = torch.randn(
        (target.shape[0], num_classes, *target.shape[1:]), generator=generator, dtype=torch.float64
    )
    return logits.scatter_add_(
        1, guess.unsqueeze(1).long(), torch.full(guess.shape, margin, dtype=torch.float64).unsqueeze(1)
    ).to(dtype)


def camvid_labels(count: int) -> torch.Tensor:
    """The first label maps of CamVid's test set, (count, 360, 480) uint8, void = 11."""
    root = os.environ.get("IAL_CAMVID")
    if not root:
        pytest.skip("IAL_CAMVID is not set: the CamVid label maps are not here")
    image = pytest.importorskip("PIL.Image")
    files = sorted((Path(root) / "testannot").glob("*.png"))[:: 233 // count][:count]
    return torch.from_numpy(np.stack([np.asarray(image.open(file)) for file in files]))


@contextlib.contextmanager
def poisoned():
    """Fills uninitialised memory with NaN. IAL_UNPOISONED disables this, for tools that detect such reads."""
    torch.use_deterministic_algorithms("IAL_UNPOISONED" not in os.environ, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def move(tensor, device):
    """The tensor on a device with its strides and offset, which `Tensor.to` does not keep."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run(backend, logits, target, hierarchy=HIERARCHY, *, grad_output=None, **options):
    """Loss, gradient and components of one backend, moved to the CPU in their dtypes."""
    device = device_of(backend)
    leaf = move(logits, device).requires_grad_()
    weight, pixel_weight, divisor = (
        move(value, device) if isinstance(value, torch.Tensor) else value
        for value in (options.pop(name, None) for name in ("weight", "pixel_weight", "divisor"))
    )
    # The module, since the function makes two passes for float16 logits: it expects no incoming gradient.
    criterion = ImportanceAwareLoss(hierarchy, weight, backend=backend, return_components=True, **options)
    with poisoned():
        loss, components = criterion(leaf, move(target, device), pixel_weight, divisor=divisor)
        upstream = torch.ones_like(loss) if grad_output is None else grad_output.to(loss)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach().cpu(), grad.cpu(), tuple(value.cpu() for value in components)


def truth(logits, target, hierarchy=HIERARCHY, *, grad_output=None, **options):
    """The result of the float64 oracle for the values of the tensors."""
    arrays = {
        name: options.pop(name).double().numpy()
        for name in ("weight", "pixel_weight")
        if options.get(name) is not None
    }
    if options.get("divisor") is not None:
        options["divisor"] = float(options["divisor"])
    return oracle.importance_aware_loss(
        logits.detach().double().numpy(),
        target.numpy(),
        hierarchy.levels,
        grad_output=None if grad_output is None else grad_output.double().numpy(),
        **arrays,
        **options,
    )


def scales(logits, target, expected, plain=None, *, weight=None, pixel_weight=None, **options):
    """The scale of each result's rounding: its size, and a term for pixels that are nearly correct.

    In such a pixel 1 - pi and -log pi are small differences of numbers near 1 and have their rounding. The
    term is sqrt(2 f_t (1 + lambda_t)) for f_t, by Cauchy's inequality; the weight of the pixels for S_k; that
    weight times the factors for the loss; and the factor of (p - 1) for the gradient. The factor is computed
    from the gradient of `plain`, the result without label smoothing.
    """
    plain = expected if plain is None else plain
    pixels = target.numel()
    weights = pixels * (1 if weight is None else largest(weight.double().numpy()))
    if pixel_weight is not None and pixels:
        weights *= largest(pixel_weight.double().numpy())
    mean, divisor = options.get("reduction", "mean") == "mean", options.get("divisor")
    divisor = None if divisor is None else float(divisor)
    compared = 1 if options.get("factor_normalization", "mean") == "mean" else pixels
    f = largest(expected.f)
    f_scale = np.sqrt(2 * f * (1 + np.max(options.get("lambdas", 0.5), initial=0)) * compared)
    lead = np.fmax(np.abs(expected.F), 1).max(axis=0, initial=1).prod()

    target = target.long()  # a uint8 cannot represent 300 classes
    is_class = (target >= 0) & (target < logits.shape[1])
    y = target.where(is_class, 0).unsqueeze(1)
    missing = (1 - torch.softmax(logits.double(), 1).gather(1, y).squeeze(1)).numpy()
    at_target = torch.from_numpy(plain.grad).gather(1, y).squeeze(1).abs().numpy()
    counts = is_class.numpy() & (missing > 0)
    added = {
        "loss": lead * (1 if mean and divisor is None else weights / (divisor or 1)),
        "grad": largest(at_target[counts] / missing[counts]),
        "f": f_scale,
        "F": f_scale,
        "S": weights,
    }
    return {name: largest(getattr(expected, name)) + more for name, more in added.items()}


def largest(values):
    """The largest finite magnitude."""
    return np.abs(values[np.isfinite(values)]).max(initial=0)


def check(backend, logits, target, hierarchy=HIERARCHY, **options):
    """Asserts the error rule: the error against the oracle is at most that of eager PyTorch plus a few ulp.

    |ours - truth| <= max |eager - truth| + 4 ulp of the arithmetic + 1/2 ulp of the output. Eager PyTorch
    uses the same arithmetic. The first term is a maximum over the tensor, since single elements of the eager
    result may be exact by chance. The second term is at the tensor's scale (`scales`). In float64 it is 64
    ulp, since there the oracle has the same rounding errors as the result. The third term, the rounding of a
    half-precision gradient, is at the element's own value. Beyond the range of float16 it is infinity.

    An element that is not finite must have the same value in the truth or in the eager result.
    """
    expected = truth(logits, target, hierarchy, **options)
    plain = truth(logits, target, hierarchy, **options | {"label_smoothing": 0.0})
    scale = scales(logits, target, expected, plain, **options)
    judge(backend, logits, target, hierarchy, expected, scale, **options)


def check_upsampled(backend, logits, target, hierarchy=HIERARCHY, *, align_corners=False, **options):
    """`check` for coarse logits.

    The interpolation rounds the logits, and this adds to the rounding of all results. The scale of a gradient
    is the largest sum that the pixels around a coarse logit can add to it.
    """
    size = target.shape[1:]
    y, x = (oracle.interpolation(*sizes, align_corners) for sizes in zip(logits.shape[2:], size, strict=True))
    fine = torch.from_numpy(oracle.upsample(logits.detach().double().numpy(), y, x))
    expected = truth(fine, target, hierarchy, **options)
    plain = truth(fine, target, hierarchy, **options | {"label_smoothing": 0.0})
    scale = scales(fine, target, expected, plain, **options)
    scale = {name: value * (1 + largest(fine.numpy())) for name, value in scale.items()}
    scale["grad"] *= y.sum(0).max() * x.sum(0).max()
    expected = replace(expected, grad=oracle.upsample(expected.grad, y.T, x.T))
    corners = dict(upsample="bilinear", align_corners=align_corners)
    judge(backend, logits, target, hierarchy, expected, scale, **options, **corners)


def same(a, b):
    return (a == b) | (np.isnan(a) & np.isnan(b))


def judge(backend, logits, target, hierarchy, expected, scale, /, **options):
    """The rule of `check` for one result whose rounding is relative to `scale`."""
    loss, grad, (f, F, S, count) = run(backend, logits, target, hierarchy, **options)
    arithmetic = arithmetic_of(logits)
    eager_loss, eager_grad, (eager_f, eager_F, eager_S, _) = run(
        "reference", logits.to(arithmetic), target, hierarchy, **options
    )
    assert loss.dtype == arithmetic
    assert grad.dtype == logits.dtype and grad.shape == logits.shape

    for name, ours, eager, true in (
        ("loss", loss, eager_loss, expected.loss),
        ("grad", grad, eager_grad, expected.grad),
        ("f", f, eager_f, expected.f),
        ("F", F, eager_F, expected.F),
        ("S", S, eager_S, expected.S),
    ):
        assert_rule(f"{name} of {backend}", ours, eager, true, scale[name], backend=backend)
    np.testing.assert_array_equal(count.numpy(), expected.count)


def arithmetic_of(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def assert_rule(name, ours, eager, true, scale, *, backend):
    """The rule of `check` for one tensor. `eager` has the dtype of the arithmetic.

    scale: a number, or one for each element.
    """
    arithmetic = eager.dtype
    assert tuple(ours.shape) == true.shape, name
    if true.size == 0:
        return
    limits = torch.finfo(ours.dtype)
    got, eager = ours.double().numpy(), eager.double().numpy()
    both = np.isfinite(eager) & np.isfinite(true)
    rounding = (64 if arithmetic == torch.float64 else 4) * torch.finfo(arithmetic).eps * scale
    with np.errstate(invalid="ignore"):
        allowed = np.where(both, np.abs(eager - true), 0)
    # Otherwise an error of the reference would allow the same error in every backend.
    assert arithmetic == torch.float32 or (allowed <= rounding).all(), f"{name}, eager: {allowed.max():.3g}"
    allowed = allowed.max() + rounding
    if ours.dtype != arithmetic:
        # Triton's interpreter, unlike a GPU, truncates to bfloat16.
        truncates = backend == "triton" and interpreted.INTERPRETED and ours.dtype == torch.bfloat16
        ulp = limits.eps if truncates else limits.eps / 2
        size = np.where(np.isfinite(true), np.abs(true), 0)
        allowed = allowed + ulp * np.maximum(1.01 * size, limits.smallest_normal)
    overflows = np.isinf(got) & (np.abs(true) >= limits.max) & (np.sign(got) == np.sign(true))
    alike = same(got, true) | (same(got, eager) & ~np.isfinite(eager))
    with np.errstate(invalid="ignore"):
        error = np.where(overflows | alike, 0, np.abs(got - true))
    error[np.isnan(error)] = np.inf
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), (
        f"{name} at {worst}: {ours[worst].item()}, expected {true[worst]}, "
        f"error {error[worst]:.3g}, allowed {np.broadcast_to(allowed, error.shape)[worst]:.3g}"
    )
