"""`cross_entropy` and `CrossEntropyLoss`: PyTorch's own samples, differences from PyTorch, scaled losses."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import (
    BACKENDS,
    DTYPES,
    EMULATED,
    GPU_KERNELS,
    KERNELS,
    device_of,
    make_logits,
    make_target,
    poisoned,
)
from torch.utils.checkpoint import checkpoint

from ial_cuda import CrossEntropyLoss, backends, cross_entropy, importance_aware_loss

CLASSES, SPATIAL = 5, (6, 7)
#: Their sums are exact, so a divisor is bitwise equal for any order of summation.
WEIGHT = (0.5, 1.0, 2.0, 1.5, 0.25)
FAST = [backend for backend in BACKENDS if backend.values[0] not in EMULATED]


def problem(*, shape=(2, CLASSES, *SPATIAL), dtype=torch.float32, ignore_index=-100, seed=0):
    """Logits and target. Some pixels are ignored."""
    target = make_target((shape[0], *shape[2:]), shape[1], ignore_index=ignore_index, seed=seed)
    return make_logits(shape, dtype, seed=seed), target


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def ours(backend, logits, target, *args, grad_output=None, call=cross_entropy, **options):
    """The loss of a backend and its gradient, on the CPU."""
    device = device_of(backend)
    leaf = logits.detach().to(device).requires_grad_()
    options = {name: moved(value, device) for name, value in options.items()}
    with poisoned():
        loss = call(leaf, target.to(device), *args, backend=backend, **options)
        given = torch.ones_like(loss) if grad_output is None else moved(grad_output, device)
        (grad,) = torch.autograd.grad(loss, leaf, given)
    return loss.detach().cpu(), grad.cpu()


def pytorchs(logits, target, weight=None, *, pixel_weight=None, divisor=None, **options):
    """The loss of F.cross_entropy and its gradient, in float64. 0 if no pixel is valid."""
    leaf = logits.detach().double().requires_grad_()
    weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float64)
    if pixel_weight is None and divisor is None:
        loss = F.cross_entropy(leaf, target, weight, **options)
    else:
        reduction = options.pop("reduction", "mean")
        scale = torch.ones_like(target, dtype=torch.float64) if pixel_weight is None else pixel_weight
        loss = F.cross_entropy(leaf, target, weight, reduction="none", **options) * scale
        if reduction == "mean" and divisor is None:
            own = torch.ones(logits.shape[1]).double() if weight is None else weight
            valid = target != options.get("ignore_index", -100)
            divisor = (own[target.where(valid, 0)] * scale).where(valid, 0).sum()
        loss = loss if reduction == "none" else loss.sum() / (divisor if reduction == "mean" else 1)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    if (target == options.get("ignore_index", -100)).all():
        return torch.zeros_like(loss), torch.zeros_like(grad)
    return loss.detach(), grad


def assert_close(got, expected, *, condition=1.0):
    """Asserts a difference of at most 64 roundings of the tensor's largest value.

    The roundings are those of the exponentials, and of sums of some hundred terms, which PyTorch adds in
    another order. A gradient in half precision is rounded once more.

    condition: the factor by which cancellation increases the rounding.
    """
    arithmetic = torch.float64 if got.dtype == torch.float64 else torch.float32
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.double(),
        expected,
        rtol=0 if got.dtype == arithmetic else torch.finfo(got.dtype).eps,
        atol=64 * torch.finfo(arithmetic).eps * scale * condition
        + (0 if got.dtype == arithmetic else torch.finfo(got.dtype).smallest_normal),
    )


def assert_pytorchs(backend, logits, target, *args, **options):
    """Asserts that loss and gradient of a backend are those of F.cross_entropy."""
    loss, grad = ours(backend, logits, target, *args, **options)
    expected, expected_grad = pytorchs(logits, target, *args, **options)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert grad.dtype == logits.dtype
    assert_close(loss, expected)
    assert_close(grad, expected_grad)


# ---- PyTorch's own samples ------------------------------------------------------------------------------


def samples(dtype):
    """The samples of PyTorch's own tests of cross-entropy: input, target and options."""
    pytest.importorskip("expecttest", reason="torch's own tests need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_inputs_torch_nn_CrossEntropyLoss

    torch.manual_seed(0)
    (operator,) = (operator for operator in op_db if operator.name == "nn.functional.cross_entropy")
    for sample in operator.sample_inputs("cpu", dtype):
        yield sample.input, *sample.args, sample.kwargs
    for sample in module_inputs_torch_nn_CrossEntropyLoss(None, "cpu", dtype, False, True):
        yield *sample.forward_input.args, sample.constructor_input.kwargs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pytorchs_own_samples(backend, dtype):
    """Samples with class indices have the same value and gradient. Those with probabilities raise."""
    equal, refused, options_seen, ranks = 0, 0, set(), set()
    given = list(samples(dtype))
    for logits, target, options in given:
        if target.is_floating_point():
            with pytest.raises(TypeError, match=r"target has dtype .*: class indices only; torch.nn.functio"):
                cross_entropy(logits, target, backend=backend, **options)
            refused += 1
            continue
        loss, grad = ours(backend, logits, target, **options)
        expected, expected_grad = pytorchs(logits, target, **options)
        # Some of their weights are negative, and cancellation in the divisor increases the rounding.
        own = options.get("weight", torch.ones(3)).double()[target]
        condition = (own.abs().sum() / own.sum().abs()).item()
        assert_close(loss, expected, condition=condition)
        assert_close(grad, expected_grad, condition=condition)
        equal += 1
        options_seen |= options.keys()
        ranks.add(logits.dim())
    assert equal == sum(not target.is_floating_point() for _, target, _ in given) and equal + refused == len(
        given
    )
    assert options_seen == {"weight", "ignore_index", "reduction", "label_smoothing"}
    assert {1, 2, 3, 4, 5} <= ranks


# ---- arguments ------------------------------------------------------------------------------------------


def test_signatures_are_pytorchs():
    """Names, order and defaults are equal, except for deprecated arguments."""
    old = {"size_average", "reduce"}
    for theirs, mine in ((F.cross_entropy, cross_entropy), (torch.nn.CrossEntropyLoss, CrossEntropyLoss)):
        parameters = inspect.signature(mine).parameters
        expected = [p for name, p in inspect.signature(theirs).parameters.items() if name not in old]
        assert [(p.name, p.default) for p in expected] == [
            (name, parameters[name].default) for name in list(parameters)[: len(expected)]
        ]
        rest = list(parameters.values())[len(expected) :]
        assert all(p.kind == p.KEYWORD_ONLY for p in rest)


POSITIONAL = [(), (WEIGHT,), (WEIGHT, 3), (WEIGHT, 3, "sum"), (WEIGHT, 3, "sum", 0.2)]
NAMES_OF = ("weight", "ignore_index", "reduction", "label_smoothing")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", POSITIONAL, ids=len)
def test_arguments_by_place_and_by_name(backend, arguments):
    logits, target = problem()
    target = target if len(arguments) < 2 else target.where(target != -100, 3)
    named = dict(zip(NAMES_OF, arguments, strict=False))
    weight = torch.tensor(WEIGHT) if arguments else None
    theirs = torch.nn.CrossEntropyLoss(**{**named, "weight": weight})
    expected = theirs(logits, target).double()
    losses = [ours(backend, logits, target, *arguments)[0], ours(backend, logits, target, **named)[0]]
    for criterion in (
        CrossEntropyLoss(*arguments, backend=backend),
        CrossEntropyLoss(**named, backend=backend),
    ):
        device = device_of(backend)
        losses.append(criterion.to(device)(logits.to(device), target.to(device)).cpu())
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert_close(losses[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_dtype(backend, dtype, smoothing):
    logits, target = problem(dtype=dtype)
    assert_pytorchs(backend, logits, target, WEIGHT, label_smoothing=smoothing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [torch.int32, torch.uint8], ids=str)
def test_labels_of_fewer_bits(backend, labels):
    logits, target = problem(ignore_index=255)
    loss, grad = ours(backend, logits, target.to(labels), ignore_index=255)
    expected, expected_grad = pytorchs(logits, target, ignore_index=255)
    assert_close(loss, expected)
    assert_close(grad, expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spatial", [(), (7,), (6, 7), (2, 3, 4)], ids=len)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_rank_with_and_without_a_batch(backend, spatial, reduction):
    logits, target = problem(shape=(3, CLASSES, *spatial))
    options = dict(reduction=reduction, label_smoothing=0.1)
    assert_pytorchs(backend, logits, target, WEIGHT, **options)
    if len(spatial) == 1:
        return  # (C, P) would be (N, C)
    loss, grad = ours(backend, logits[0], target[0], WEIGHT, **options)
    expected, expected_grad = pytorchs(logits[:1], target[:1], WEIGHT, **options)
    assert_close(loss, expected.squeeze(0) if reduction == "none" else expected)
    assert_close(grad, expected_grad[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_coarse_logits_without_a_batch(backend):
    logits, target = problem(shape=(2, CLASSES, 3, 4))[0], problem()[1]
    for reduction in ("mean", "none"):
        options = dict(upsample="bilinear", reduction=reduction, label_smoothing=0.1)
        one, one_grad = ours(backend, logits[0], target[0], **options)
        loss, grad = ours(backend, logits[:1], target[:1], **options)
        assert torch.equal(one, loss.squeeze(0) if reduction == "none" else loss)
        assert torch.equal(one_grad, grad[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_dimensions_are_a_batch_and_classes(backend):
    """As in PyTorch, a batch that does not fit its target is not taken as an image of P pixels."""
    logits, target = make_logits((8, 5), torch.float32), torch.arange(5)
    device = device_of(backend)
    message = r"target has shape \(5,\), expected \(N, \*spatial\) = \(8,\) for input \(8, 5\)"
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits.to(device), target.to(device), backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if device_of(b.values[0]) == "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("shape", "position"), [((7, 5), r"\(3,\)"), ((5, 2, 7), r"\(0, 3\)"), ((5,), r"\(\)")], ids=str
)
def test_positions_of_bad_labels_are_the_callers(backend, reduction, shape, position):
    """The error has the position in the caller's target, not in the reshaped one."""
    if backend in ("simt", "simt_one_launch", "triton"):
        pytest.skip("as on CUDA, a bad label makes the loss NaN")
    logits = make_logits(shape, torch.float32).requires_grad_()
    target = torch.zeros(shape[:1] if len(shape) == 2 else shape[1:], dtype=torch.int64)
    target.view(-1)[3 if target.dim() else 0] = 9
    with pytest.raises(ValueError, match=f"target has label 9 at {position}, the first of 1 bad pixels"):
        cross_entropy(logits, target, reduction=reduction, backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] not in EMULATED])
def test_export_leaves_the_batch_open(backend):
    device = device_of(backend)
    criterion = CrossEntropyLoss(backend=backend)
    logits, target = (value.to(device) for value in problem())
    dynamic = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(
            criterion, (logits, target), dynamic_shapes={"input": dynamic, "target": dynamic}
        )
        more = torch.cat([logits, logits]), torch.cat([target, target])
        assert torch.equal(program.module()(*more), criterion(*more))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "hierarchy", [CLASSES, [range(0, CLASSES, 2), range(1, CLASSES, 2)]], ids=["one", "two"]
)
def test_several_incoming_gradients_at_once(backend, hierarchy):
    logits, target = (value.to(device_of(backend)) for value in problem(ignore_index=255))
    leaf = logits.requires_grad_()

    def loss():
        return importance_aware_loss(leaf, target, hierarchy, backend=backend)

    incoming = torch.tensor([1.0, 0.25], device=leaf.device)
    (grads,) = torch.autograd.grad(loss(), leaf, incoming, is_grads_batched=True)
    for grad, factor in zip(grads, incoming, strict=True):
        (expected,) = torch.autograd.grad(loss(), leaf, factor)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "hierarchy", [CLASSES, [range(0, CLASSES, 2), range(1, CLASSES, 2)]], ids=["one", "two"]
)
@pytest.mark.parametrize("again", [False, True], ids=["first", "second"])
def test_an_infinite_incoming_gradient(backend, hierarchy, again):
    """0 times infinity is NaN, so a derivative of 0 must stay 0."""
    results = []
    for name in (backend, "reference"):
        logits, target = (value.to(device_of(name)) for value in problem(ignore_index=255))
        leaf = logits.requires_grad_()
        loss = importance_aware_loss(leaf, target, hierarchy, backend=name)
        for _ in range(1 + again):
            (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, torch.inf), retain_graph=True)
        results.append(grad.cpu())
    assert results[0].isinf().any() and torch.equal(*(grad.nan_to_num(7.0) for grad in results))


def test_where_a_shape_has_both_meanings_the_first_dimension_is_the_batch():
    logits = make_logits((3, 3, 3), torch.float32)
    target = make_target((3, 3), 3, ignore_index=-100)
    assert_pytorchs("reference", logits, target)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 300])
def test_rows_are_the_pixels_of_an_image(backend, size):
    logits, target = problem(shape=(size, CLASSES), seed=1)
    pixel_weight = torch.rand(size, generator=torch.Generator().manual_seed(0))
    options = dict(weight=WEIGHT, pixel_weight=pixel_weight, label_smoothing=0.1)
    loss, grad = ours(backend, logits, target, **options)
    expected, expected_grad = pytorchs(logits, target, **options)
    assert_close(loss, expected)
    assert_close(grad, expected_grad)
    options["pixel_weight"] = pixel_weight.unsqueeze(0)
    image, image_grad = ours(backend, logits.t().unsqueeze(0), target.unsqueeze(0), **options)
    assert_close(loss, image.double())
    assert_close(grad, image_grad[0].t().double())


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_of_a_channels_last_image_have_its_bits(backend):
    """`logits.permute(0, 2, 3, 1).reshape(-1, C)` shares its memory."""
    logits, target = problem(shape=(1, CLASSES, *SPATIAL))
    image = logits.contiguous(memory_format=torch.channels_last)
    rows = image.permute(0, 2, 3, 1).reshape(-1, CLASSES)
    assert rows.data_ptr() == image.data_ptr()
    loss, grad = ours(backend, rows, target.flatten(), WEIGHT)
    expected, expected_grad = ours(backend, image.flatten(2), target.flatten(1), WEIGHT)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad[0].t())


# ---- reductions, void -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_reductions_void_and_weights(backend, ignore_index, reduction, smoothing):
    logits, target = problem(ignore_index=ignore_index)
    pixel_weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(0))
    options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)
    assert_pytorchs(backend, logits, target, **options)
    assert_pytorchs(backend, logits, target, WEIGHT, pixel_weight=pixel_weight, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("align_corners", [False, True])
def test_each_pixel_of_coarse_logits(backend, smoothing, align_corners):
    """The sum of `reduction="none"` is the loss of the kernels."""
    logits, target = problem(shape=(2, CLASSES, 3, 4))[0], problem()[1]
    options = dict(upsample="bilinear", align_corners=align_corners, label_smoothing=smoothing)
    losses, grad = ours(backend, logits, target, WEIGHT, reduction="none", **options)
    total, total_grad = ours(backend, logits, target, WEIGHT, reduction="sum", **options)
    fine = F.interpolate(logits.double(), target.shape[1:], mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(
        fine, target, torch.tensor(WEIGHT).double(), reduction="none", label_smoothing=smoothing
    )
    assert losses.shape == target.shape and (losses[target == -100] == 0).all()
    assert_close(losses, expected)
    assert_close(total, expected.sum())
    assert_close(grad, total_grad.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_valid_is_zero(backend, smoothing, reduction):
    """The mean of F.cross_entropy is NaN there."""
    logits, target = problem()
    options = dict(reduction=reduction, label_smoothing=smoothing)
    loss, grad = ours(backend, logits, torch.full_like(target, -100), WEIGHT, **options)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_void_pixels_have_no_effect(backend, value, smoothing, reduction):
    clean, target = problem()
    void = target == -100
    changed = torch.where(void.unsqueeze(1), value, clean)
    pixel_weight = torch.ones(target.shape).masked_fill(void, value)
    options = dict(reduction=reduction, label_smoothing=smoothing)
    loss, grad = ours(backend, changed, target, WEIGHT, pixel_weight=pixel_weight, **options)
    expected, expected_grad = ours(backend, clean, target, WEIGHT, pixel_weight=void.float(), **options)
    clean_loss, clean_grad = ours(
        backend, clean, target, WEIGHT, pixel_weight=torch.ones(target.shape), **options
    )
    assert (expected == 0).all() and (expected_grad == 0).all(), "only void pixels have a weight here"
    assert torch.equal(loss, clean_loss) and torch.equal(grad, clean_grad)
    assert (grad.movedim(1, -1)[void] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bad_labels(backend, smoothing):
    logits, target = problem()
    target[1, 2, 3] = CLASSES
    for reduction in ("mean", "none"):
        options = dict(reduction=reduction, label_smoothing=smoothing)
        if device_of(backend) == "cpu" and backend not in EMULATED:
            with pytest.raises(ValueError, match=r"target has label 5 at \(1, 2, 3\)"):
                ours(backend, logits, target, **options)
        else:
            loss, grad = ours(backend, logits, target, **options)
            assert loss.isnan().any() and (grad[1, :, 2, 3] == 0).all()


# ---- label smoothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [1e-6, 0.1, 0.5, 1.0, 1])
@pytest.mark.parametrize(
    "weight", [None, WEIGHT, (1.0, 0.0, 0.0, 3.0, 0.5)], ids=["ones", "weights", "zeros"]
)
def test_label_smoothing(backend, smoothing, weight):
    logits, target = problem()
    assert_pytorchs(backend, logits, target, weight, label_smoothing=smoothing)
    assert_pytorchs(backend, logits, target, weight, label_smoothing=smoothing, reduction="sum")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_smoothing_is_bitwise_no_smoothing(backend, dtype):
    logits, target = problem(dtype=dtype)
    plain = ours(backend, logits, target, WEIGHT)
    for smoothing in (0, 0.0, np.float32(0), torch.tensor(0.0)):
        again = ours(backend, logits, target, WEIGHT, label_smoothing=smoothing)
        assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


# ---- divisor --------------------------------------------------------------------------------------------

NUMBERS = [17, 17.0, np.float32(17), np.int64(17)]
NUMBERS += [torch.tensor(17, dtype=dtype) for dtype in (*DTYPES, torch.int64, torch.int32, torch.uint8)]


def describe(value):
    return f"{type(value).__name__}-{getattr(value, 'dtype', '')}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divisor", NUMBERS, ids=describe)
def test_divisors(backend, divisor):
    logits, target = problem()
    assert_pytorchs(backend, logits, target, WEIGHT, divisor=divisor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_of_the_valid_pixels_is_the_divisor_by_default(backend, dtype):
    logits, target = problem(dtype=dtype)
    pixel_weight = torch.full(target.shape, 0.5)
    total = (torch.tensor(WEIGHT)[target.clamp(min=0)] * 0.5).where(target != -100, 0).sum()
    options = dict(weight=WEIGHT, pixel_weight=pixel_weight)
    loss, grad = ours(backend, logits, target, divisor=total, **options)
    expected, expected_grad = ours(backend, logits, target, **options)
    assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divisor", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=describe)
def test_a_divisor_of_zero_gives_zero(backend, divisor):
    logits, target = problem()
    loss, grad = ours(backend, logits, target, divisor=divisor)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensor", [False, True])
def test_accumulated_batches_of_uneven_void_are_the_whole(backend, tensor):
    """The divisor is the number of pixels of all parts. The mean of their means is another loss."""
    logits, target = problem(shape=(4, CLASSES, *SPATIAL))
    target[0], target[1, :4], target[2] = 1, -100, -100
    count = (target != -100).sum()
    divisor = count if tensor else count.item()
    whole, whole_grad = ours(backend, logits, target)
    parts = [ours(backend, logits[i : i + 1], target[i : i + 1], divisor=divisor) for i in range(4)]
    means = [ours(backend, logits[i : i + 1], target[i : i + 1])[0] for i in range(4)]
    assert_close(sum(loss for loss, _ in parts), whole.double())
    assert_close(torch.cat([grad for _, grad in parts]), whole_grad.double())
    assert abs(sum(means) / 4 - whole) > 0.01 * whole


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_synchronisation(backend, reduction):
    """For every kind of divisor, a CPU tensor included, and for every incoming gradient."""
    logits, target = (tensor.cuda() for tensor in problem())
    criterion = CrossEntropyLoss(WEIGHT, reduction=reduction, label_smoothing=0.1, backend=backend).cuda()
    divisors = [None, 17, 17.0, torch.tensor(17), torch.tensor(17, device="cuda")]
    scale = torch.full((), 0.25, device="cuda")

    def step(divisor):
        leaf = logits.detach().requires_grad_()
        loss = criterion(leaf, target, divisor=divisor).sum()
        torch.autograd.grad(loss * scale, leaf)

    step(None)  # compiles and loads what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        for divisor in divisors if reduction == "mean" else divisors[:1]:
            step(divisor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- errors ---------------------------------------------------------------------------------------------

LOGITS, TARGET = problem()
BAD = {
    "probabilities": ((LOGITS, LOGITS.softmax(1)), {}, TypeError, "target has dtype torch.float32, expected one of torch.int64, torch.int32, torch.uint8: class indices only; torch.nn.functional.cross_entropy takes probabilities"),
    "0-d": ((torch.tensor(1.0), torch.tensor(0)), {}, ValueError, "input has shape (), expected (N, C, *spatial), (C, *spatial) or (C,)"),
    "array": ((LOGITS.numpy(), TARGET), {}, TypeError, "input is a ndarray, expected a torch.Tensor"),
    "integers": ((TARGET, TARGET), {}, TypeError, "input has dtype torch.int64, expected one of"),
    "target type": ((LOGITS, TARGET.numpy()), {}, TypeError, "target is a ndarray, expected a torch.Tensor"),
    "target shape": ((LOGITS, TARGET[:, :3]), {}, ValueError, "target has shape (2, 3, 7), expected (N, *spatial) = (2, 6, 7) for input (2, 5, 6, 7)"),
    "one-hot": ((LOGITS, torch.zeros_like(LOGITS).long()), {}, ValueError, "target has shape (2, 5, 6, 7), expected (N, *spatial) = (2, 6, 7) for input (2, 5, 6, 7): class indices only, pass target.argmax(1)"),
    "unbatched": ((LOGITS[0], TARGET[0, :3]), {}, ValueError, "target has shape (3, 7), expected"),
    "one pixel": ((LOGITS[0, :, 0, 0], TARGET[0, 0, :1]), {}, ValueError, "target has shape"),
    "coarse": ((LOGITS[:, :, 0], TARGET), dict(upsample="bilinear"), ValueError, "input has shape (2, 5, 7) and target (2, 6, 7), expected (N, C, h, w) and (N, H, W)"),
    "weight": ((LOGITS, TARGET, [1.0, 2.0]), {}, ValueError, "weight has shape (2,), expected (5,), one per class"),
    "pixel_weight": ((LOGITS, TARGET), dict(pixel_weight=torch.ones(6, 7)), ValueError, "pixel_weight has shape (6, 7), expected (N, *spatial) = (2, 6, 7)"),
    "ignore_index": ((LOGITS, TARGET), dict(ignore_index=None), TypeError, "ignore_index is None (NoneType), expected an integer"),
    "reduction": ((LOGITS, TARGET), dict(reduction="max"), ValueError, "reduction is 'max', expected one of 'mean', 'sum', 'none'"),
    "smoothing 1.5": ((LOGITS, TARGET), dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected a number from 0 to 1"),
    "smoothing -0.1": ((LOGITS, TARGET), dict(label_smoothing=-0.1), ValueError, "label_smoothing is -0.1, expected a number from 0 to 1"),
    "smoothing NaN": ((LOGITS, TARGET), dict(label_smoothing=np.nan), ValueError, "label_smoothing is nan, expected a number from 0 to 1"),
    "divisor, sum": ((LOGITS, TARGET), dict(divisor=2, reduction="sum"), ValueError, "divisor is given, expected None: reduction is 'sum', not 'mean'"),
    "divisor, none": ((LOGITS, TARGET), dict(divisor=2, reduction="none"), ValueError, "divisor is given, expected None: reduction is 'none', not 'mean'"),
    "divisor -1": ((LOGITS, TARGET), dict(divisor=-1), ValueError, "divisor is -1, expected a non-negative number"),
    "divisor NaN": ((LOGITS, TARGET), dict(divisor=np.nan), ValueError, "divisor is nan, expected a finite number"),
    "divisor inf": ((LOGITS, TARGET), dict(divisor=np.inf), ValueError, "divisor is inf, expected a finite number"),
    "divisor text": ((LOGITS, TARGET), dict(divisor="batch"), TypeError, "divisor is 'batch' (str), expected a number"),
    "divisor bool": ((LOGITS, TARGET), dict(divisor=True), TypeError, "divisor is True (bool), expected a number"),
    "divisor shape": ((LOGITS, TARGET), dict(divisor=torch.ones(2)), ValueError, "divisor has shape (2,), expected () or a number"),
    "divisor grad": ((LOGITS, TARGET), dict(divisor=torch.ones((), requires_grad=True)), ValueError, "divisor requires a gradient, expected a constant: only logits are differentiated"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in FAST if b.values[0] in ("cpu", "reference")])
@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(backend, case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        cross_entropy(*arguments, **options, backend=backend)
    rest = {name: value for name, value in options.items() if name not in ("divisor", "pixel_weight")}
    called = {name: value for name, value in options.items() if name not in rest}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        CrossEntropyLoss(*arguments[2:], **rest, backend=backend)(*arguments[:2], **called)


def test_none_is_no_ignore_index_of_the_module():
    criterion = CrossEntropyLoss()
    with pytest.raises(TypeError, match=re.escape("ignore_index is None (NoneType), expected an integer")):
        criterion.ignore_index = None
    criterion.ignore_index = 255
    assert criterion.ignore_index == 255


# ---- scaled losses --------------------------------------------------------------------------------------

#: Powers of two scale a derivative without rounding, so the order of scaling does not matter.
INCOMING = [1.0, 0.25, 65536.0, 0.0, torch.nan]


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def losses(backend, **options):
    """The function, and the module, which remembers the incoming gradient."""
    device = device_of(backend)
    weight = torch.tensor(WEIGHT, device=device)
    yield lambda *given: cross_entropy(*given, weight, backend=backend, **options)
    yield CrossEntropyLoss(WEIGHT, backend=backend, **options).to(device)


def gradient(loss_of, leaf, target, incoming):
    loss = loss_of(leaf, target)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))
    return loss.detach(), grad


#: Fewer cases for emulated kernels.
SMOOTHED = [
    pytest.param(*backend.values, smoothing, marks=backend.marks)
    for backend in KERNELS
    for smoothing in ((0.1,) if backend.values[0] in EMULATED else (0.0, 0.1))
]


@pytest.mark.parametrize(("backend", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
def test_scaled_losses_have_the_gradient_of_two_passes(backend, dtype, smoothing, upsample):
    device = device_of(backend)
    logits, target = problem(dtype=dtype)
    if upsample:
        logits = logits[:, :, ::2, ::2].contiguous()
    leaf, target = logits.to(device).requires_grad_(), target.to(device)
    options = dict(label_smoothing=smoothing, upsample=upsample)
    # The gradients of coarse logits are rounded by torch or by Triton. Triton's interpreter truncates them.
    truncated = backend == "triton" and backend in EMULATED and upsample and dtype == torch.bfloat16
    same = partial(torch.allclose, rtol=2**-7, equal_nan=True) if truncated else same_bits
    scales = INCOMING if backend in EMULATED else [*INCOMING, *INCOMING]
    for loss_of, two_passes in zip(
        losses(backend, **options), losses(backend, grad_in_forward=False, **options), strict=True
    ):
        for scale in scales:  # some are expected, some are not
            expected, expected_grad = gradient(two_passes, leaf, target, scale)
            for _ in range(3):
                loss, grad = gradient(loss_of, leaf, target, scale)
                assert same(grad, expected_grad), scale
            assert_close(loss.cpu(), expected.double().cpu())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", [0.4, 3.0, 0.25])
def test_the_operators_give_the_bits_of_reduce_backward(backend, dtype, incoming):
    """For any incoming gradient, whether it is expected or the gradient is computed again."""
    device = device_of(backend)
    logits, target = (tensor.to(device) for tensor in problem(dtype=dtype))
    ops = backends.get(backend).operators()
    given = torch.tensor(incoming, dtype=torch.promote_types(dtype, torch.float32), device=device)
    incoming = given.item()  # in the precision of the loss
    weight = torch.tensor(WEIGHT, device=device)
    pixels = (target, weight, None, [0] * CLASSES, -100, "exact", 0.1)
    combine = (None, [], 1.0, "mean", "mean", "image")

    def expecting(*values):
        return torch.tensor(values, dtype=torch.float64, device=device)

    state = expecting(incoming, 1.0)
    _, _, _, grad_stats, grad, computed_for = ops.loss_and_grad(logits, *pixels, *combine, None, state)
    scaled = ops.reduce_backward(logits, grad_stats * incoming, *pixels)
    assert computed_for.item() == incoming and computed_for.dtype == torch.float64
    assert same_bits(grad, scaled)

    state = expecting(1.0, incoming)
    *_, grad_stats, grad, computed_for = ops.loss_and_grad(logits, *pixels, *combine, None, state)
    assert computed_for.item() == 1 and same_bits(grad, ops.reduce_backward(logits, grad_stats, *pixels))
    ops.rescale_(grad, given, computed_for, logits, grad_stats, *pixels, None, state)
    assert same_bits(grad, scaled)
    assert state.tolist() == [incoming, incoming]


def in_training(backend, criterion, dtype=torch.float32):
    """A step with an incoming gradient. It also returns the expected and the last incoming gradient."""
    device = device_of(backend)
    logits, target = problem(dtype=dtype)
    leaf, target = logits.to(device).requires_grad_(), target.to(device)

    def step(incoming):
        result = gradient(criterion, leaf, target, incoming)
        return *result, criterion.expected.on(leaf.device).tolist()

    return step


@pytest.mark.parametrize("backend", KERNELS)
def test_the_module_expects_what_came_in_twice(backend):
    criterion = CrossEntropyLoss(backend=backend)
    step = in_training(backend, criterion)
    expected = [step(incoming)[2][0] for incoming in (1.0, 0.4, 0.4, 0.4, 1.0, 0.4, 1.0, 0.4, 2.0, 2.0)]
    fraction = torch.tensor(0.4).item()  # float32, like the loss
    assert expected == [1.0, 1.0, *[fraction] * 7, 2.0]


@pytest.mark.parametrize("backend", KERNELS)
def test_the_module_never_expects_what_is_not_finite(backend):
    step = in_training(backend, CrossEntropyLoss(backend=backend))
    assert [step(value)[2][0] for value in (torch.nan, torch.nan, torch.inf, torch.inf, 8.0, 8.0)] == [
        *[1.0] * 5,
        8.0,
    ]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_result_depends_on_the_history(backend, dtype):
    scales = (1.0, 0.4, 0.4, 0.4, 1.0, 1.0, 65536.0, 0.4)
    step = in_training(backend, CrossEntropyLoss(WEIGHT, backend=backend).to(device_of(backend)), dtype)
    for scale in scales:
        loss, grad, _ = step(scale)
        fresh = CrossEntropyLoss(WEIGHT, backend=backend).to(device_of(backend))
        first_loss, first_grad, _ = in_training(backend, fresh, dtype)(scale)
        assert same_bits(loss, first_loss) and same_bits(grad, first_grad), scale


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_the_module(backend, again):
    criterion = CrossEntropyLoss(WEIGHT, label_smoothing=0.1, backend=backend).to(device_of(backend))
    step = in_training(backend, criterion)
    for _ in range(2):
        loss, grad, state = step(0.25)
    assert state == [0.25, 0.25]
    other = again(criterion)
    assert repr(other) == repr(criterion) and other.options == criterion.options
    other_step = in_training(backend, other)
    loss_of_other, grad_of_other, _ = other_step(0.25)
    assert same_bits(loss, loss_of_other) and same_bits(grad, grad_of_other)
    other_step(8.0), other_step(8.0)
    if again is not copy.copy:
        assert next(iter(criterion.expected.states.values())).tolist() == [0.25, 0.25], (
            "each learns by itself"
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_expected_is_not_pickled(backend):
    """Its device may not exist in another process."""
    criterion = CrossEntropyLoss(backend=backend)
    in_training(backend, criterion)(1.0)
    assert criterion.expected.states
    assert not pickle.loads(pickle.dumps(criterion)).expected.states
    assert criterion.state_dict() == {}


# ---- autograd -------------------------------------------------------------------------------------------


@pytest.fixture(params=["function", "module"])
def loss_of(request, backend):
    return list(losses(backend, label_smoothing=0.1))[request.param == "module"]


def on_device(backend, seed=0, dtype=torch.float32):
    device = device_of(backend)
    logits, target = problem(seed=seed, dtype=dtype)
    return logits.to(device).requires_grad_(), target.to(device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forward_passes_before_a_backward_pass(backend, loss_of):
    """Two heads in one step, each with its own incoming gradient."""
    (main, target), (auxiliary, _) = on_device(backend), on_device(backend, seed=1)
    for _ in range(3):
        expected = [gradient(loss_of, main, target, 1.0)[1], gradient(loss_of, auxiliary, target, 0.5)[1]]
        total = loss_of(main, target) + 0.5 * loss_of(auxiliary, target)
        got = torch.autograd.grad(total, [main, auxiliary])
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_set_of_logits_in_two_losses(backend, loss_of):
    leaf, target = on_device(backend)
    _, expected = gradient(loss_of, leaf, target, 1.0)
    (grad,) = torch.autograd.grad(loss_of(leaf, target) + loss_of(leaf, target), leaf)
    assert_close(grad.cpu(), 2 * expected.double().cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass(backend, loss_of):
    """The caller owns the gradient of the first pass and may change it."""
    leaf, target = on_device(backend)
    loss = loss_of(leaf, target)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    expected = first.clone()
    first.fill_(torch.nan)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert same_bits(second, expected)
    (scaled,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.25))
    assert same_bits(scaled, gradient(loss_of, leaf, target, 0.25)[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_create_graph(backend, loss_of):
    leaf, target = on_device(backend)
    _, expected = gradient(loss_of, leaf, target, 1.0)
    (grad,) = torch.autograd.grad(loss_of(leaf, target), leaf, create_graph=True)
    assert same_bits(grad.detach(), expected) and grad.requires_grad
    if backend == "reference":
        grad.square().sum().backward()
        assert leaf.grad.isfinite().all() and leaf.grad.any()
    else:
        with pytest.raises(NotImplementedError, match="double backward is not implemented"):
            grad.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["copy", "same", "offload"])
def test_hooks_of_saved_tensors(backend, loss_of, way):
    leaf, target = on_device(backend)
    hooks = {
        "copy": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
        "same": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "offload": torch.autograd.graph.save_on_cpu,
    }[way]
    for incoming in (1.0, 0.25, 0.25, 0.25, 1.0):
        expected, expected_grad = gradient(loss_of, leaf, target, incoming)
        with hooks():
            loss = loss_of(leaf, target)
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming), retain_graph=True)
        assert same_bits(loss.detach(), expected) and same_bits(grad, expected_grad)
        grad.fill_(torch.nan)
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))
        assert same_bits(grad, expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(backend, loss_of, reentrant):
    leaf, target = on_device(backend)
    for incoming in (1.0, 0.25, 0.25, 0.25):
        _, expected = gradient(lambda x, y: loss_of(x * 2, y), leaf, target, incoming)
        loss = checkpoint(lambda x: loss_of(x * 2, target), leaf, use_reentrant=reentrant)
        leaf.grad = None
        loss.backward(torch.full_like(loss, incoming))
        assert same_bits(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_graph(backend, loss_of):
    leaf, target = on_device(backend)
    loss = loss_of(leaf, target)
    with torch.no_grad():
        evaluated = loss_of(leaf, target)
    assert not evaluated.requires_grad and not loss_of(leaf.detach(), target).requires_grad
    assert_close(evaluated.cpu(), loss.detach().double().cpu())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rows", [False, True])
def test_in_place(backend, rows):
    leaf, target = on_device(backend)
    if rows:
        leaf, target = leaf.detach().movedim(1, -1).reshape(-1, CLASSES).requires_grad_(), target.flatten()
    expected, expected_grad = gradient(lambda *g: cross_entropy(*g, backend=backend), leaf, target, 1.0)
    logits = leaf * 1
    loss = cross_entropy(logits, target, backend=backend, inplace=True)
    (grad,) = torch.autograd.grad(loss, logits)
    assert same_bits(grad, expected_grad) and grad.data_ptr() == logits.data_ptr()
    assert_close(loss.detach().cpu(), expected.double().cpu())


# ---- torch.compile and torch.func -----------------------------------------------------------------------

COMPILED = {
    "plain": ({}, {}),
    "smoothed": (dict(weight=WEIGHT, label_smoothing=0.1, ignore_index=255), {}),
    "divisor": ({}, dict(divisor=17)),
    "tensor": ({}, dict(divisor=torch.tensor(17))),
    "pixels": (dict(reduction="none", label_smoothing=0.1), {}),
    "coarse": (dict(upsample="bilinear", label_smoothing=0.1), {}),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_compiled_equals_eager(backend, case, batched, recwarn):
    torch._dynamo.reset()
    device = device_of(backend)
    options, called = COMPILED[case]
    called = {name: moved(value, device) for name, value in called.items()}
    logits, target = problem(ignore_index=options.get("ignore_index", -100))
    if "upsample" in options:
        logits = logits[:, :, ::2, ::2].contiguous()
    if not batched:
        logits, target = logits[0], target[0]
    leaf, target = logits.to(device).requires_grad_(), target.to(device)
    criterion = CrossEntropyLoss(backend=backend, **options).to(device)
    weight = criterion.weight
    named = {name: value for name, value in options.items() if name != "weight"}

    def function(leaf, target):
        return cross_entropy(leaf * 2, target, weight, backend=backend, **named, **called)

    def module(leaf, target):
        return criterion(leaf * 2, target, **called)

    for step in (function, module):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        loss, expected = compiled(leaf, target), step(leaf, target)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
        assert loss.shape == expected.shape
        assert_close(loss.detach().cpu(), expected.detach().double().cpu())
        assert_close(grad.cpu(), expected_grad.double().cpu())
    assert [str(w.message) for w in recwarn if "ial_" in w.filename + str(w.message)] == []


@pytest.mark.parametrize("backend", FAST)
def test_compiled_for_any_divisor_and_smoothing(backend):
    """Dynamo makes a number symbolic if it differs from the first call's."""
    torch._dynamo.reset()
    leaf, target = on_device(backend)

    def step(leaf, target, divisor, smoothing):
        return cross_entropy(leaf * 2, target, divisor=divisor, label_smoothing=smoothing, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for divisor, smoothing in ((17, 0.0), (18, 0.1), (19, 0.2), (3.5, 0.3), (4.5, 0.3)):
        expected = step(leaf, target, divisor, smoothing).detach()
        assert_close(compiled(leaf, target, divisor, smoothing).detach().cpu(), expected.double().cpu())


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "cpu"])
def test_compiled_by_inductor(backend):
    torch._dynamo.reset()
    leaf, target = on_device(backend)
    criterion = CrossEntropyLoss(WEIGHT, label_smoothing=0.1, backend=backend)
    compiled = torch.compile(lambda leaf: criterion(leaf * 2, target), fullgraph=True)
    loss = compiled(leaf)
    (grad,) = torch.autograd.grad(loss, leaf)
    expected, expected_grad = gradient(lambda x, y: criterion(x * 2, y), leaf, target, 1.0)
    assert_close(loss.detach(), expected.double())
    assert_close(grad, expected_grad.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, dict(label_smoothing=0.1), dict(upsample="bilinear"), dict(divisor=17)]
)
def test_torch_func(backend, options):
    leaf, target = on_device(backend)
    logits = leaf.detach()

    def loss(logits, target):
        return cross_entropy(logits, target, backend=backend, **options)

    _, expected_grad = gradient(loss, leaf, target, 1.0)
    grad, value = torch.func.grad_and_value(loss)(logits, target)
    assert_close(grad.cpu(), expected_grad.double().cpu())
    assert_close(value.cpu(), loss(logits, target).double().cpu())
    images = logits.unsqueeze(1), target.unsqueeze(1)
    grads, values = torch.vmap(torch.func.grad_and_value(loss))(*images)
    for i in range(len(logits)):
        grad, value = torch.func.grad_and_value(loss)(images[0][i], images[1][i])
        assert_close(grads[i].cpu(), grad.double().cpu())
        assert_close(values[i].cpu(), value.double().cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_of_each_pixel(backend):
    leaf, target = on_device(backend)
    logits = leaf.detach()

    def loss(logits, target):
        return cross_entropy(logits, target, reduction="none", backend=backend)

    per_image = torch.vmap(loss)(logits, target)
    assert_close(per_image.cpu(), loss(logits, target).double().cpu())
