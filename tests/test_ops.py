"""The operators in torch: opcheck, torch.compile, autocast, in place, memory, threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from cases import (
    BACKENDS,
    DOUBLE,
    DTYPES,
    EMULATED,
    GPU_KERNELS,
    HIERARCHY,
    JVP,
    KERNELS,
    check,
    device_of,
    make_logits,
    make_target,
    run,
)
from torch._inductor.utils import run_and_get_code

from ial_cuda import (
    CITYSCAPES,
    ImportanceAwareLoss,
    backends,
    cross_entropy,
    importance_aware_loss,
)

SPATIAL = (24, 40)
LAMBDAS = [0.5, 0.5, 0.5]
LEVELS = list(HIERARCHY.class_levels)


def problem(backend, dtype=torch.float32, requires_grad=True):
    """Logits that are not a leaf, so that `inplace` can overwrite them, and their target."""
    device = device_of(backend)
    leaf = make_logits((2, 5, *SPATIAL), dtype).to(device).requires_grad_(requires_grad)
    return leaf, leaf * 1, make_target((2, *SPATIAL), 5).to(device)


def op_arguments(backend):
    device = device_of(backend)
    logits = make_logits((2, 5, *SPATIAL), torch.float32).to(device)
    target = make_target((2, *SPATIAL), 5).to(device)
    weight = torch.rand(5, device=device)
    pixel_weight = torch.rand(2, *SPATIAL, device=device)
    ops = backends.get(backend).operators()
    stats = ops.reduce(logits, target, weight, pixel_weight, LEVELS, 255, "exact", 0.1, False)
    pooled = (torch.full((), 70.0, device=device).double(), LAMBDAS, 1.0, "mean", "mean", "batch")
    one, incoming = torch.ones((), device=device).double(), torch.tensor(0.5, device=device)
    grad_stats = ops.combine_backward(stats, one, *pooled)
    rest = (target, weight, pixel_weight, LEVELS, 255)
    flat = (target, weight, None, [0] * 5, 255, "exact", 0.0)
    smoothed, grad_nll = (target, weight, 255, 0.1), pixel_weight[:, :1].expand_as(pixel_weight)
    expected = torch.ones(2, device=device).double()
    leaf = logits.clone().requires_grad_()
    return {
        "reduce": (ops.reduce, (leaf, *rest, "exact", 0.1, False)),
        "reduce_plain": (ops.reduce, (leaf, target, None, None, LEVELS, 255, "paper", 0.0, False)),
        "reduce_backward": (ops.reduce_backward, (logits, grad_stats, *rest, "exact", 0.1)),
        "reduce_backward_": (ops.reduce_backward_, (logits.clone(), grad_stats, *rest, "paper", 0.0)),
        "combine": (ops.combine, (stats.clone().requires_grad_(), *pooled, torch.float32)),
        "combine_none": (
            ops.combine,
            (stats.clone().requires_grad_(), None, LAMBDAS, 1.0, "none", "sum", "image", torch.float64),
        ),
        "combine_backward": (ops.combine_backward, (stats, one, *pooled)),
        "loss_and_grad": (ops.loss_and_grad, (leaf, *rest, "exact", 0.1, *pooled, None, None, False)),
        "loss_and_grad_flat": (
            ops.loss_and_grad,
            (leaf, *flat, None, [], 1.0, "mean", "mean", "image", None, expected, None),
        ),
        "rescale_": (
            ops.rescale_,
            (logits.clone(), incoming, one, logits, grad_stats[:, :1].contiguous(), *flat, None, expected),
        ),
        "pixel_nll": (ops.pixel_nll, (leaf, target, None, 255, 0.0)),
        "pixel_nll_smoothed": (ops.pixel_nll, (leaf, *smoothed)),
        "pixel_nll_coarse": (ops.pixel_nll, (leaf[:, :, ::4, ::2], *smoothed, True)),
        "pixel_nll_backward": (ops.pixel_nll_backward, (logits, grad_nll, target, None, 255, 0.0)),
        "pixel_nll_backward_smoothed": (ops.pixel_nll_backward, (logits, grad_nll, *smoothed)),
        "pixel_nll_backward_coarse": (
            ops.pixel_nll_backward,
            (logits[:, :, ::4, ::2], grad_nll.half(), *smoothed, False),
        ),
    }


#: The backends that torch can trace. "simt" has no fake kernels, and interpreted kernels cannot be traced.
TRACEABLE = [b for b in BACKENDS if b.values[0] not in EMULATED]


@pytest.mark.parametrize("backend", [b for b in TRACEABLE if b.values[0] != "reference"])
@pytest.mark.parametrize(
    "name",
    [
        "reduce",
        "reduce_plain",
        "reduce_backward",
        "reduce_backward_",
        "combine",
        "combine_none",
        "combine_backward",
        "loss_and_grad",
        "loss_and_grad_flat",
        "rescale_",
        "pixel_nll",
        "pixel_nll_smoothed",
        "pixel_nll_coarse",
        "pixel_nll_backward",
        "pixel_nll_backward_smoothed",
        "pixel_nll_backward_coarse",
    ],
)
def test_opcheck(backend, name):
    op, arguments = op_arguments(backend)[name]
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", TRACEABLE)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(backend, dynamic):
    torch._dynamo.reset()
    device = device_of(backend)
    criterion = ImportanceAwareLoss(HIERARCHY, torch.rand(5), backend=backend, inplace=True).to(device)

    def step(leaf, target):
        return criterion(leaf * 1.5, target)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for height in (24, 31):
        leaf = make_logits((2, 5, height, 40), torch.float32).to(device).requires_grad_()
        target = make_target((2, height, 40), 5).to(device)
        loss, expected = compiled(leaf, target), step(leaf, target)
        (grad,) = torch.autograd.grad(loss, leaf)
        (expected_grad,) = torch.autograd.grad(expected, leaf)
        # Inductor calls the C++ operators and the Triton kernels unchanged, so results are bitwise equal.
        # But Triton does not know by which powers of two dynamic sizes are divisible. The threads of a kernel
        # then have other pixels, and sums another order.
        rounded = backend == "reference" or (backend == "triton" and dynamic)
        tolerance = dict(rtol=1e-5, atol=1e-9) if rounded else dict(rtol=0, atol=0)
        torch.testing.assert_close(loss, expected, **tolerance)
        torch.testing.assert_close(grad, expected_grad, **tolerance)


NUMBERS = {
    "ignore_index": lambda logits, target, value, backend: importance_aware_loss(
        logits, target, HIERARCHY, ignore_index=value, backend=backend
    ),
    "alpha": lambda logits, target, value, backend: importance_aware_loss(
        logits, target, HIERARCHY, alpha=value, backend=backend
    ),
    "lambdas": lambda logits, target, value, backend: importance_aware_loss(
        logits, target, HIERARCHY, lambdas=value, backend=backend
    ),
    "hierarchy": lambda logits, target, value, backend: importance_aware_loss(
        logits, target, logits.shape[1], alpha=value, backend=backend
    ),
    "classes": lambda logits, target, value, backend: cross_entropy(
        logits[:, : 4 + value], target, ignore_index=255, upsample="bilinear", backend=backend
    ),
}


@pytest.mark.parametrize("backend", TRACEABLE)
@pytest.mark.parametrize("name", NUMBERS)
def test_compiled_for_any_number(backend, name):
    """Dynamo makes an int symbolic if it differs from the first call's. A symbolic int has no attributes."""
    torch._dynamo.reset()
    device = device_of(backend)
    logits = make_logits((2, 7 if name == "classes" else 5, *SPATIAL), torch.float32).to(device)
    target = make_target((2, *SPATIAL), 5).to(device)
    compiled = torch.compile(NUMBERS[name], backend="aot_eager", fullgraph=True)
    for value in (1, 2, 3):
        # Labels 255 are void, except if the void label is the number.
        labels = target.clamp(max=4) if name == "ignore_index" else target
        expected = NUMBERS[name](logits, labels, value, backend)
        torch.testing.assert_close(compiled(logits, labels, value, backend), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "cpu"])
def test_compiled_convolutions_need_no_copies(backend):
    """Inductor makes them channels_last, and transposes their output for operators that need strides."""
    torch._dynamo.reset()
    convolution = torch.nn.Conv2d(3, 19, 3, padding=1)
    images, target = torch.randn(2, 3, *SPATIAL), make_target((2, *SPATIAL), 19)

    def step(images):
        return importance_aware_loss(convolution(images), target, CITYSCAPES, backend=backend)

    loss, codes = run_and_get_code(lambda: torch.compile(step, fullgraph=True)(images))
    (read,) = re.findall(r"(\w+) = extern_kernels.convolution", codes[0])
    assert f"torch.ops.ial_cuda.reduce.default({read}," in codes[0]
    gradient = torch.autograd.grad(loss, convolution.weight)[0]
    (expected,) = torch.autograd.grad(step(images), convolution.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # pixels are added in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """Half-precision logits of an autocast region are not converted. The loss is float32."""
    device = device_of(backend)
    x = torch.randn(2, 8, *SPATIAL, device=device)
    head = torch.nn.Conv2d(8, 5, 1, device=device)
    target = make_target((2, *SPATIAL), 5).to(device)
    with torch.autocast(device, torch.bfloat16):
        logits = head(x)
        loss = importance_aware_loss(logits, target, HIERARCHY, backend=backend)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    outside = importance_aware_loss(logits.detach(), target, HIERARCHY, backend=backend)
    torch.testing.assert_close(loss, outside, rtol=0, atol=0)
    loss.backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward_is_an_error(backend):
    leaf, logits, target = problem(backend)
    loss = importance_aware_loss(logits, target, HIERARCHY, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{DOUBLE}$"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_no_gradient_no_graph(backend):
    _, logits, target = problem(backend, requires_grad=False)
    assert not importance_aware_loss(logits, target, HIERARCHY, backend=backend).requires_grad
    _, logits, target = problem(backend)
    with torch.no_grad():
        assert not importance_aware_loss(logits, target, HIERARCHY, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_valid_is_zero_and_connected(backend):
    leaf, logits, target = problem(backend)
    loss = importance_aware_loss(logits, torch.full_like(target, 255), HIERARCHY, backend=backend)
    assert loss.item() == 0
    loss.backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("factor_scope", ["image", "batch"])
def test_empty(backend, shape, reduction, factor_scope):
    loss, grad, (f, _, S, count) = run(
        backend,
        torch.zeros(shape),
        torch.zeros((shape[0], *shape[2:]), dtype=torch.int64),
        reduction=reduction,
        factor_scope=factor_scope,
    )
    assert loss.shape == ((shape[0],) if reduction == "none" else ()) and (loss == 0).all()
    assert grad.shape == shape
    assert f.shape == (1 if factor_scope == "batch" else shape[0], 3) and S.shape == count.shape == (
        shape[0],
        4,
    )
    assert (f == 0).all() and (S == 0).all() and (count == 0).all()


# ---- extreme logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(backend, dtype):
    logits = make_logits((2, 5, *SPATIAL), dtype, spread=1.0).sign() * 1e4
    target = make_target((2, *SPATIAL), 5)
    loss, grad, _ = run(backend, logits, target)
    assert loss.isfinite() and grad.isfinite().all()
    check(backend, logits, target)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("whole_pixel", [False, True], ids=["one", "all"])
def test_what_is_not_finite_is_where_eager_has_it(backend, dtype, value, whole_pixel):
    logits = make_logits((2, 5, *SPATIAL), dtype)
    target = make_target((2, *SPATIAL), 5, ignored=0.0)
    logits[1, slice(None) if whole_pixel else 2, 3, 4] = value
    target[1, 3, 4] = 0
    loss, grad, (f, _, S, _) = run(backend, logits, target, reduction="none")
    eager_loss, eager_grad, (eager_f, _, eager_S, _) = run("reference", logits, target, reduction="none")
    for ours, eager in ((loss, eager_loss), (f, eager_f), (S, eager_S), (grad, eager_grad)):
        assert torch.equal(ours.isnan(), eager.isnan())
        assert torch.equal(ours.isinf(), eager.isinf())
    assert grad[0].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_ignored_pixels_have_no_effect(backend, dtype, value, layout):
    target = make_target((2, *SPATIAL), 5, ignored=0.3)
    clean = make_logits((2, 5, *SPATIAL), dtype).contiguous(memory_format=layout)
    changed = (
        torch.where((target == 255).unsqueeze(1), value, clean).to(dtype).contiguous(memory_format=layout)
    )
    loss, grad, _ = run(backend, changed, target)
    expected, expected_grad, _ = run(backend, clean, target)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
    assert (grad.movedim(1, -1)[target == 255] == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("spatial", [(), (1,), (61,), (7, 64), (3, 5, 9)], ids=str)
def test_every_element_is_written(backend, spatial):
    """In deterministic mode torch fills uninitialised memory with NaN."""
    logits, target = make_logits((3, 19, *spatial), torch.float32), make_target((3, *spatial), 19)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1000).isnan().all()
        loss, grad, components = run(backend, logits, target, CITYSCAPES)
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite() and grad.isfinite().all()
    assert all(value.isfinite().all() for value in components)


# ---- in place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inplace_is_the_same_gradient_in_the_logits(backend, dtype, layout):
    _, logits, target = problem(backend, dtype)
    logits = logits.contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(
        importance_aware_loss(logits, target, HIERARCHY, backend=backend), logits, retain_graph=True
    )
    before = logits.detach().clone()
    loss = importance_aware_loss(logits, target, HIERARCHY, backend=backend, inplace=True)
    assert torch.equal(logits, before), "between forward and backward the logits are unchanged"
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("backend", KERNELS)
def test_inplace_gradient_of_the_leaf(backend):
    leaf, logits, target = problem(backend)
    importance_aware_loss(logits, target, HIERARCHY, backend=backend, inplace=True).backward()
    copy, logits, target = problem(backend)
    importance_aware_loss(logits, target, HIERARCHY, backend=backend).backward()
    assert torch.equal(leaf.grad, copy.grad)


@pytest.mark.parametrize("backend", KERNELS)
def test_inplace_old_values_raise_later(backend):
    stale = "modified by an inplace operation"
    leaf, logits, target = problem(backend)
    loss = importance_aware_loss(logits, target, HIERARCHY, backend=backend, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=stale):
        loss.backward()

    leaf, _, target = problem(backend)
    logits = leaf.exp()  # its backward reads its result
    with pytest.raises(RuntimeError, match=stale):
        importance_aware_loss(logits, target, HIERARCHY, backend=backend, inplace=True).backward()


def several_views(logits):
    return torch.cat([logits, logits]).split(2)[0]


def view_of_a_function(logits):
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    return Identity.apply(logits)


NOT_IN_PLACE = {
    "leaf": (lambda leaf, logits: leaf, "logits is a leaf"),
    "view of a leaf": (lambda leaf, logits: leaf[:], "logits is a view of a leaf"),
    "view of a view": (
        lambda leaf, logits: leaf[:1].view(-1)[:].view(1, *leaf.shape[1:]),
        "logits is a view of",
    ),
    "expanded": (
        lambda leaf, logits: logits[:1].expand(2, *leaf.shape[1:]),
        "elements of logits share memory",
    ),
    "one of several": (lambda leaf, logits: several_views(logits), "logits is one of several views"),
    "of a function": (lambda leaf, logits: view_of_a_function(logits), "logits is one of several views"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", NOT_IN_PLACE)
def test_inplace_refuses_what_torch_refuses(backend, case):
    leaf, logits, target = problem(backend)
    make, message = NOT_IN_PLACE[case]
    logits = make(leaf, logits)
    values = leaf.detach().clone()
    with pytest.raises(ValueError, match=f"inplace is True, expected False: {message}"):
        importance_aware_loss(logits, target[: len(logits)], HIERARCHY, backend=backend, inplace=True)
    assert torch.equal(leaf, values)
    with pytest.raises(RuntimeError):
        logits.mul_(2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_takes_what_torch_takes(backend):
    leaf, logits, target = problem(backend)
    with torch.no_grad():
        importance_aware_loss(leaf, target, HIERARCHY, backend=backend, inplace=True)
    importance_aware_loss(leaf.detach(), target, HIERARCHY, backend=backend, inplace=True)
    importance_aware_loss(logits[1:], target[1:], HIERARCHY, backend=backend, inplace=True).backward()
    assert not leaf.grad[0].any() and leaf.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_reads_nothing_that_it_overwrites(backend):
    _, logits, target = problem(backend)
    message = "inplace is True, expected False: logits shares memory with target, weight or pixel_weight"
    with pytest.raises(ValueError, match=message):
        importance_aware_loss(
            logits, target, HIERARCHY, pixel_weight=logits[:, 0].detach(), backend=backend, inplace=True
        )
    with pytest.raises(ValueError, match=message):
        labels = logits.detach().view(torch.int32)[:, 0]
        importance_aware_loss(logits, labels, HIERARCHY, backend=backend, inplace=True)


# ---- derivatives of the gradient, and torch.func ---------------------------------------------------------

NOT_CONSTANT = "weight requires a gradient, expected a constant: only logits are differentiated"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("way", ["plain", "inplace", "upsample", "retained", "hook", "checkpoint", "offload"])
def test_gradients_of_gradients_raise(backend, way):
    leaf, _, target = problem(backend)
    factor = torch.tensor(1.3, device=leaf.device, requires_grad=True)
    options = {"inplace": {"inplace": True}, "upsample": {"upsample": "bilinear"}}.get(way, {})

    def forward(leaf):
        logits = leaf * factor
        if way == "hook":
            logits.register_hook(lambda grad: grad * 2)
        return importance_aware_loss(logits, target, HIERARCHY, backend=backend, **options)

    if way == "checkpoint":
        loss = torch.utils.checkpoint.checkpoint(forward, leaf, use_reentrant=False)
    elif way == "offload":
        with torch.autograd.graph.save_on_cpu():
            loss = forward(leaf)
    else:
        loss = forward(leaf)
    if way == "retained":
        torch.autograd.grad(loss, leaf, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (expected,) = torch.autograd.grad(
        importance_aware_loss(leaf * factor, target, HIERARCHY, backend=backend, **options), leaf
    )
    torch.testing.assert_close(grad.detach(), expected * (2 if way == "hook" else 1), rtol=1e-6, atol=0)
    with pytest.raises(NotImplementedError, match=f"^{DOUBLE}$"):
        torch.autograd.grad(grad.square().sum(), factor)


@pytest.mark.parametrize("backend", KERNELS)
def test_operators_that_write_a_derivative_are_not_differentiated(backend):
    op, (logits, grad_stats, *rest) = op_arguments(backend)["reduce_backward_"]
    factor = torch.ones((), device=logits.device, requires_grad=True)
    written = logits * factor
    op(written, grad_stats, *rest)
    with pytest.raises(NotImplementedError, match=f"^{DOUBLE}$"):
        written.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        op(logits.clone().requires_grad_(), grad_stats, *rest)


@pytest.mark.parametrize("backend", KERNELS)
def test_operators_take_no_weights_that_require_a_gradient(backend):
    op, (logits, target, weight, *rest) = op_arguments(backend)["reduce"]
    with pytest.raises(ValueError, match=f"^{NOT_CONSTANT}$"):
        op(logits, target, weight.requires_grad_(), *rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"upsample": "bilinear"}, {"reduction": "sum"}])
def test_torch_func_grad(backend, options):
    leaf, logits, target = problem(backend)
    expected = torch.autograd.grad(
        importance_aware_loss(logits, target, HIERARCHY, backend=backend, **options), leaf
    )[0]

    def loss(logits):
        return importance_aware_loss(logits * 1, target, HIERARCHY, backend=backend, **options)

    grad, value = torch.func.grad_and_value(loss)(leaf.detach())
    assert torch.equal(grad, expected)
    assert torch.equal(value, loss(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_vmap(backend):
    leaf, _, target = problem(backend)
    images = leaf.detach().unsqueeze(1)

    def loss(logits, target):
        return importance_aware_loss(logits, target, HIERARCHY, backend=backend)

    grads = torch.vmap(torch.func.grad(loss))(images, target.unsqueeze(1))
    losses = torch.vmap(loss)(images, target.unsqueeze(1))
    for i in range(len(images)):
        grad, value = torch.func.grad_and_value(loss)(images[i], target[i : i + 1])
        # The reference sums a batch in another order.
        torch.testing.assert_close(grads[i], grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(losses[i], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_func_raises_what_is_not_implemented(backend):
    leaf, _, target = problem(backend)
    logits = leaf.detach()

    def loss(logits):
        return importance_aware_loss(logits, target, HIERARCHY, backend=backend)

    for transform in (
        lambda: torch.func.jvp(loss, (logits,), (logits,)),
        lambda: torch.func.jvp(torch.func.grad(loss), (logits,), (logits,)),
    ):
        with pytest.raises(NotImplementedError, match=f"^{JVP}$"):
            transform()
    with pytest.raises(NotImplementedError, match=f"^{DOUBLE}$"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(logits)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{JVP}$"):
        loss(torch.autograd.forward_ad.make_dual(logits, logits))


@pytest.mark.parametrize("backend", TRACEABLE)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
def test_export_leaves_the_batch_and_the_size_open(backend, upsample):
    device = device_of(backend)
    criterion = ImportanceAwareLoss(HIERARCHY, backend=backend, upsample=upsample).to(device)
    leaf, _, target = problem(backend)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    labels = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    if upsample:
        sizes = labels = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(
            criterion, (leaf.detach(), target), dynamic_shapes={"logits": sizes, "target": labels}
        )
        logits = make_logits((3, 5, SPATIAL[0] + (7 if upsample is None else 0), SPATIAL[1]), torch.float32)
        target = make_target((3, *logits.shape[2:]), 5).to(device)
        assert torch.equal(program.module()(logits.to(device), target), criterion(logits.to(device), target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_symbolic_trace_and_jit_trace(backend):
    _, logits, target = problem(backend)
    criterion = ImportanceAwareLoss(HIERARCHY, torch.rand(5), ignore_index=255, backend=backend)
    criterion.to(logits.device)
    expected = criterion(logits, target)
    assert torch.equal(torch.fx.symbolic_trace(criterion)(logits, target), expected)

    def function(logits, target):
        options = {"weight": criterion.weight, "ignore_index": 255, "backend": backend}
        return importance_aware_loss(logits, target, HIERARCHY, **options)

    assert torch.equal(torch.fx.symbolic_trace(function)(logits, target), expected)
    logits = logits.detach()  # torch.jit checks a trace without gradients
    assert torch.equal(torch.jit.trace(criterion, (logits, target))(logits, target), expected)


def test_script_names_alternatives():
    with pytest.raises(NotImplementedError, match=r"use torch.compile, torch.export or torch.jit.trace"):
        torch.jit.script(torch.nn.Sequential(ImportanceAwareLoss(HIERARCHY)))


# ---- memory, threads, instruction sets ------------------------------------------------------------------


def allocated(backend, size=(512, 1024), **options):
    """The peak of additionally allocated bytes, of forward and backward on labels of 512 x 1024."""
    device = device_of(backend)
    leaf = torch.randn(1, 19, *size, device=device).requires_grad_()
    logits, target = leaf * 1, make_target((1, 512, 1024), 19).to(device)

    def step():
        loss = importance_aware_loss(logits, target, CITYSCAPES, backend=backend, **options)
        torch.autograd.grad(loss, logits)

    if device == "cuda":
        step()  # Triton tunes a kernel in its first call, which needs memory
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before, logits.nbytes
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, logits.nbytes


@pytest.mark.parametrize("backend", [*(b for b in KERNELS if b.values[0] == "cpu"), *GPU_KERNELS])
def test_memory(backend):
    peak, logits = allocated(backend)
    assert logits <= peak < logits + 2**20, "the gradient and less than 1 MiB"
    peak, _ = allocated(backend, inplace=True)
    assert peak < 2**20


@pytest.mark.parametrize("backend", [*(b for b in KERNELS if b.values[0] == "cpu"), *GPU_KERNELS])
def test_memory_of_coarse_logits(backend):
    peak, logits = allocated(backend, size=(128, 256), upsample="bilinear")
    most = 4 if backend == "triton" else 2  # the gradient is first two float32 halves
    assert logits <= peak < most * logits, "the gradient and less than the same again"


def test_memory_of_the_reference():
    peak, logits = allocated("reference")
    assert peak > 2 * logits, "otherwise the profiler has missed allocations"
    peak, logits = allocated("reference", size=(128, 256), upsample="bilinear")
    assert peak > 32 * logits, "full-size logits and their gradient"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_bits_every_time_and_for_any_number_of_threads(backend, layout):
    size = (50, 83) if backend in EMULATED else (200, 333)
    logits = make_logits((2, 19, *size), torch.float32).contiguous(memory_format=layout)
    target = make_target((2, *size), 19)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(
                run(
                    backend,
                    logits,
                    target,
                    CITYSCAPES,
                    weight=torch.rand(19, generator=torch.Generator().manual_seed(0)),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for loss, grad, components in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(components, results[0][2], strict=True))


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "cpu"])
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(backend, capability):
    """The tests of layouts, dtypes and extremes with the kernels of another instruction set."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    here = Path(__file__).parent
    question = "from ial_cuda import extension; print(extension.module.build_info()['cpu'])"
    answer = subprocess.run([sys.executable, "-c", question], env=environment, capture_output=True, text=True)
    assert answer.stdout.strip() == {"default": "baseline", "avx2": "AVX2"}[capability] or (
        capability == "avx2" and not torch.cpu._is_avx2_supported()
    )
    chosen = "cpu and (layout or dtype_and_rank or number_of_classes or ignored_pixels or not_finite or huge)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    tests = subprocess.run(
        [*command, *(str(here / f"test_{name}.py") for name in ("oracle", "ops", "upsample"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout[-3000:]
