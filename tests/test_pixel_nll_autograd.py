"""`pixel_nll` in torch: incoming gradients, second derivatives, torch.func, torch.compile, autocast, errors."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo
from cases import (
    BACKENDS,
    DOUBLE,
    DTYPES,
    EMULATED,
    JVP,
    arithmetic_of,
    device_of,
    make_logits,
    make_target,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ial_cuda import backends, pixel_nll

FAST = [backend for backend in BACKENDS if backend.values[0] not in EMULATED]
COARSE = pytest.mark.parametrize("upsample", [None, "bilinear"], ids=["full", "coarse"])
WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])


def on_device(backend, upsample=None, dtype=torch.float32):
    """A leaf, its target, and the map as a function of logits."""
    device = device_of(backend)
    leaf = make_logits((2, 5, 4, 8) if upsample else (2, 5, 12, 16), dtype).to(device).requires_grad_()
    target, weight = make_target((2, 12, 16), 5).to(device), WEIGHT.to(device)
    options = dict(ignore_index=255, label_smoothing=0.1, upsample=upsample, backend=backend)
    return leaf, target, lambda logits, labels=target: pixel_nll(logits, labels, weight, **options)


def incoming_of(target):
    """An incoming gradient of both signs."""
    return make_logits(target.shape, torch.float32, spread=1.0, seed=1).to(target.device)


def focal(nll):
    return ((1 - torch.exp(-nll)) ** 2 * nll).sum()


def rounded(backend):
    """The reference adds in another order when it is transformed, a few float32 roundings. Kernels do not."""
    return dict(rtol=1e-5, atol=1e-6) if backend == "reference" else dict(rtol=0, atol=0)


INCOMING = {
    "scalar": lambda full: full[:1, :1, :1].expand_as(full),
    "transposed": lambda full: full.mT.contiguous().mT,
    "sliced": lambda full: torch.stack([full, -full], -1)[..., 0],
    "of one row": lambda full: full[:, :1].expand_as(full),
    "float16": lambda full: full.half(),
    "float64": lambda full: full.double(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("incoming", INCOMING)
@COARSE
def test_every_incoming_gradient(backend, incoming, upsample):
    """Any strides have the bits of a contiguous one. Other dtypes are converted."""
    leaf, target, nll_of = on_device(backend, upsample)
    grad_nll = INCOMING[incoming](incoming_of(target))
    nll = nll_of(leaf)
    (grad,) = torch.autograd.grad(nll, leaf, grad_nll, retain_graph=True)
    (expected,) = torch.autograd.grad(nll, leaf, grad_nll.float().contiguous())
    assert torch.equal(grad, expected) and grad.any()
    if backend != "reference":
        corners = None if upsample is None else False
        rest = (target, WEIGHT.to(leaf.device), 255, 0.1, corners)
        operator = backends.get(backend).operators().pixel_nll_backward
        assert torch.equal(operator(leaf.detach(), grad_nll, *rest), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_several_backward_passes(backend, upsample):
    """Of one map with retain_graph, whose first gradient the caller overwrites, and of two maps."""
    leaf, target, nll_of = on_device(backend, upsample)
    nll, other = nll_of(leaf), nll_of(leaf)
    ones, incoming = torch.ones_like(nll), incoming_of(target)
    (first,) = torch.autograd.grad(nll, leaf, incoming, retain_graph=True)
    expected = first.clone()
    first.fill_(torch.nan)
    assert torch.equal(torch.autograd.grad(nll, leaf, incoming, retain_graph=True)[0], expected)
    (both,) = torch.autograd.grad([nll, other], leaf, [incoming, ones])
    (second,) = torch.autograd.grad(nll_of(leaf), leaf, ones)
    torch.testing.assert_close(both, expected + second, rtol=1e-6, atol=1e-7)  # a sum in float32
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(nll, leaf, incoming)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_graph(backend):
    leaf, _, nll_of = on_device(backend)
    nll = nll_of(leaf)
    with torch.no_grad():
        evaluated = nll_of(leaf)
    assert nll.requires_grad and not evaluated.requires_grad and not nll_of(leaf.detach()).requires_grad
    assert torch.equal(evaluated, nll)


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_the_second_derivative(backend, upsample):
    """With create_graph the gradient has its value. Only the reference differentiates it."""
    leaf, _, nll_of = on_device(backend, upsample, torch.float64)
    (expected,) = torch.autograd.grad(focal(nll_of(leaf)), leaf)
    factor = torch.ones((), dtype=torch.float64, device=leaf.device, requires_grad=True)
    (grad,) = torch.autograd.grad(factor * focal(nll_of(leaf)), leaf, create_graph=True)
    torch.testing.assert_close(grad.detach(), expected, rtol=1e-12, atol=1e-15)
    for variable in (leaf, factor):
        if backend == "reference":
            (second,) = torch.autograd.grad(grad.square().sum(), variable, retain_graph=True)
            assert second.isfinite().all() and second.any()
        else:
            with pytest.raises(NotImplementedError, match=f"^{DOUBLE}$"):
                torch.autograd.grad(grad.square().sum(), variable, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_forward_mode(backend, upsample):
    leaf, _, nll_of = on_device(backend, upsample, torch.float64)
    logits = leaf.detach()
    if backend == "reference":
        _, tangent = torch.func.jvp(lambda x: focal(nll_of(x)), (logits,), (logits,))
        expected = (torch.autograd.grad(focal(nll_of(leaf)), leaf)[0] * logits).sum()
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=0)
        return
    for function in (nll_of, torch.func.grad(lambda x: focal(nll_of(x)))):
        with pytest.raises(NotImplementedError, match=f"^{JVP}$"):
            torch.func.jvp(function, (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{JVP}$"):
        nll_of(torch.autograd.forward_ad.make_dual(logits, logits))


# ---- torch.func, torch.compile, autocast ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_torch_func(backend, upsample):
    """grad, vmap over images, and vmap of grad."""
    leaf, target, nll_of = on_device(backend, upsample)
    images = leaf.detach().unsqueeze(1), target.unsqueeze(1)
    (expected,) = torch.autograd.grad(focal(nll_of(leaf)), leaf)
    close = rounded(backend)
    grad = torch.func.grad(lambda x: focal(nll_of(x)))(leaf.detach())
    torch.testing.assert_close(grad, expected, **close)
    torch.testing.assert_close(torch.vmap(nll_of)(*images).squeeze(1), nll_of(leaf).detach(), **close)
    grads = torch.vmap(torch.func.grad(lambda x, y: focal(nll_of(x, y))))(*images)
    torch.testing.assert_close(grads.squeeze(1), expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(backend, reentrant):
    leaf, _, nll_of = on_device(backend)
    (expected,) = torch.autograd.grad(focal(nll_of(leaf * 2)), leaf)
    checkpoint(lambda x: focal(nll_of(x * 2)), leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@COARSE
def test_compiled_equals_eager(backend, compiler, upsample):
    torch._dynamo.reset()
    leaf, _, nll_of = on_device(backend, upsample)
    compiled = torch.compile(lambda x: focal(nll_of(x * 2)), fullgraph=True, backend=compiler)
    loss, expected = compiled(leaf), focal(nll_of(leaf * 2))
    # float32: the compiler fuses the function of the map, and adds the pixels in another order
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (grad,), (expected,) = (torch.autograd.grad(value, leaf) for value in (loss, expected))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    """Logits of half precision are not converted. The map is float32."""
    leaf, _, nll_of = on_device(backend)
    head = torch.nn.Conv2d(5, 5, 1).to(leaf.device)
    with torch.autocast(leaf.device.type, dtype):
        logits = head(leaf)
        nll = nll_of(logits)
    assert logits.dtype == dtype and nll.dtype == torch.float32
    assert torch.equal(nll, nll_of(logits))
    focal(nll).backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["meta", "fake"])
def test_tensors_without_values(backend, dtype, way):
    mode = FakeTensorMode() if way == "fake" else torch.device("meta")
    device = "meta" if way == "meta" else device_of(backend)
    with mode:
        logits = torch.empty(2, 5, 3, 4, dtype=dtype, device=device, requires_grad=True)
        for size, upsample in (((3, 4), None), ((12, 16), "bilinear")):
            target = torch.empty(2, *size, dtype=torch.int64, device=device)
            nll = pixel_nll(logits, target, upsample=upsample, backend=backend)
            assert nll.shape == target.shape and nll.dtype == arithmetic_of(logits)
            (grad,) = torch.autograd.grad(nll.sum(), logits)
            assert grad.shape == logits.shape and grad.dtype == dtype


# ---- errors ---------------------------------------------------------------------------------------------

LOGITS, TARGET = make_logits((2, 5, 6, 7), torch.float32), make_target((2, 6, 7), 5)
COARSE_LOGITS = "logits has shape (2, 5, 7) and target (2, 6, 7), expected (N, C, h, w) and (N, H, W)"
# (arguments that replace the good ones, exception, message)
BAD = {
    "type": (dict(logits=LOGITS.numpy()), TypeError, "logits is a ndarray, expected a torch.Tensor"),
    "dtype": (dict(logits=TARGET), TypeError, "logits has dtype torch.int64, expected one of torch.float64, "),
    "shape": (dict(logits=LOGITS[:, 0, 0, 0]), ValueError, "logits has shape (2,), expected (N, C, *spatial)"),
    "target type": (dict(target=1), TypeError, "target is a int, expected a torch.Tensor"),
    "target dtype": (dict(target=TARGET.short()), TypeError, "target has dtype torch.int16, expected one of torch.int64, torch.int32, torch.uint8"),
    "probabilities": (dict(target=LOGITS.softmax(1)), TypeError, "target has dtype torch.float32, expected one of torch.int64, torch.int32, torch.uint8: class indices only"),
    "target shape": (dict(target=TARGET[:, :5]), ValueError, "target has shape (2, 5, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7)"),
    "target channel": (dict(target=TARGET[:, None]), ValueError, "target has shape (2, 1, 6, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7): pass target.squeeze(1)"),
    "target device": (dict(target=TARGET.to("meta")), ValueError, "target is on meta, expected cpu like logits"),
    "coarse shape": (dict(logits=LOGITS[:, :, 0], upsample="bilinear"), ValueError, COARSE_LOGITS),
    "weight shape": (dict(weight=[1.0, 2.0]), ValueError, "weight has shape (2,), expected (5,), one per class"),
    "weight dtype": (dict(weight=torch.ones(5).long()), TypeError, "weight has dtype torch.int64, expected one of"),
    "weight type": (dict(weight=1.0), TypeError, "weight is a float, expected a torch.Tensor, an array or a list of numbers"),
    "weight device": (dict(weight=torch.ones(5, device="meta")), ValueError, "weight is on meta, expected cpu like logits"),
    "weight gradient": (dict(weight=torch.ones(5, requires_grad=True)), ValueError, "weight requires a gradient, expected a constant: only logits are differentiated"),
    "ignore_index": (dict(ignore_index=None), TypeError, "ignore_index is None (NoneType), expected an integer"),
    "label_smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected a number from 0 to 1"),
    "label_smoothing type": (dict(label_smoothing="0.1"), TypeError, "label_smoothing is '0.1' (str), expected a number"),
    "upsample": (dict(upsample="nearest"), ValueError, "upsample is 'nearest', expected one of None, 'bilinear'"),
    "align_corners": (dict(align_corners=True), ValueError, "align_corners is True, expected False: upsample is None"),
    "align_corners type": (dict(align_corners=1, upsample="bilinear"), TypeError, "align_corners is 1 (int), expected a bool"),
    "backend": (dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', "),
    "backend device": (dict(backend="cuda"), ValueError, "backend is 'cuda', expected one of 'auto', 'cpu', "),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(backend, case):
    bad, error, message = BAD[case]
    arguments = dict(logits=LOGITS, target=TARGET, ignore_index=255, backend=backend)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        pixel_nll(**arguments | bad)
