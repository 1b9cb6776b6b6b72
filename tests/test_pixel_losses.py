"""`focal_loss`, `ohem_cross_entropy` and `poly1_cross_entropy` against their formulas; void, errors."""

from __future__ import annotations

import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
from cases import BACKENDS, DTYPES, KERNELS, device_of, make_logits, make_target
from formulas import (
    CLASSES,
    FAST,
    LOSSES,
    VOID,
    WEIGHT,
    Recorder,
    assert_close,
    check,
    ours,
    problem,
)

from ial_cuda import cross_entropy, focal_loss, ohem_cross_entropy, poly1_cross_entropy

each_loss = pytest.mark.parametrize("loss_of", LOSSES, ids=lambda loss_of: loss_of.__name__)


# ---- values and gradients -------------------------------------------------------------------------------

CASES = [
    *((focal_loss, dict(gamma=gamma)) for gamma in (0, 0.5, 1, 1.5, 2, 5)),
    *((focal_loss, dict(alpha=alpha)) for alpha in (WEIGHT, np.array(WEIGHT), torch.tensor(WEIGHT))),
    *((poly1_cross_entropy, dict(epsilon=epsilon)) for epsilon in (-1, 0, 1.0, 2.5)),
    (poly1_cross_entropy, dict(epsilon=2, weight=WEIGHT)),
    *((ohem_cross_entropy, dict(min_kept=kept)) for kept in (0, 1, 30, 35, 36, 10**6, 0.25, 0.9, 1.0)),
    *((ohem_cross_entropy, dict(thresh=thresh, min_kept=0)) for thresh in (0.05, 0.3, 1.0)),
    *((ohem_cross_entropy, dict(thresh=None, min_kept=kept)) for kept in (0, 1, 20, 10**6, 0.25, 0.9, 1.0)),
    (ohem_cross_entropy, dict(thresh=0.2, min_kept=15, weight=WEIGHT)),
    (ohem_cross_entropy, dict(thresh=None, min_kept=15, weight=WEIGHT)),
    (ohem_cross_entropy, dict(thresh=None, min_kept=0.5, weight=[0.0, 0.0, 2.0, 1.5, 0.25])),
]


def describe(case):
    options = ((name, type(v).__name__ if np.ndim(v) else v) for name, v in case[1].items())
    return "-".join([case[0].__name__, *(f"{name}={value}" for name, value in options)])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=describe)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients(backend, case, reduction):
    loss_of, options = case
    for name in ("alpha", "weight"):
        if isinstance(options.get(name), torch.Tensor):
            options = options | {name: options[name].to(device_of(backend))}
    check(backend, loss_of, *problem(), reduction=reduction, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_loss
def test_dtypes(backend, dtype, loss_of):
    given = {"thresh": 0.3, "min_kept": 20} if loss_of is ohem_cross_entropy else {}
    check(backend, loss_of, *problem(dtype=dtype), reduction="none", **given)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        check(backend, loss_of, *problem(dtype=dtype), **given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@each_loss
def test_coarse_logits(backend, align_corners, loss_of):
    logits, target = make_logits((2, CLASSES, 3, 4), torch.float32), problem()[1]
    given = {"alpha" if loss_of is focal_loss else "weight": WEIGHT}
    for reduction in ("mean", "none"):
        options = dict(upsample="bilinear", align_corners=align_corners, reduction=reduction)
        check(backend, loss_of, logits, target, **options, **given)


@pytest.mark.parametrize("backend", BACKENDS)
@each_loss
def test_rows(backend, loss_of):
    """The pixels (M, C) of a point cloud or of one image. OHEM counts each row as an image."""
    logits, target = make_logits((60, CLASSES), torch.float32), make_target((60,), CLASSES)
    given = {"thresh": 0.2, "min_kept": 0.5} if loss_of is ohem_cross_entropy else {}
    for reduction in ("mean", "none"):
        check(backend, loss_of, logits, target, reduction=reduction, **given)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("loss_of", "options"),
    [
        (focal_loss, dict(gamma=0)),
        (poly1_cross_entropy, dict(epsilon=0)),
        (ohem_cross_entropy, dict(thresh=1.0)),
        (ohem_cross_entropy, dict(thresh=None, min_kept=1.0)),
    ],
    ids=["focal", "poly1", "ohem", "ohem all"],
)
def test_limits_are_cross_entropy(backend, loss_of, options):
    logits, target = problem()
    loss, grad = ours(backend, loss_of, logits, target, ignore_index=VOID, **options)
    expected, expected_grad = ours(backend, cross_entropy, logits, target, ignore_index=VOID)
    assert_close(loss, expected)
    assert_close(grad, expected_grad)


# ---- void and labels that are no class ------------------------------------------------------------------

LABELS = [
    *((torch.int64, label) for label in (255, -100, 2)),
    (torch.int32, -100),
    # A comparison in the labels' dtype would wrap around to classes: 156, 44, 1.
    (torch.uint8, 255),
    (torch.uint8, -100),
    (torch.uint8, 300),
    (torch.int32, 2**32 + 1),
]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dtype", "ignore_index"), LABELS, ids=str)
@each_loss
def test_void_labels(backend, dtype, ignore_index, loss_of):
    logits, target = make_logits((1, 160, 8, 8), torch.float32), make_target((1, 8, 8), 160, ignored=0)
    target[0, 0] = torch.tensor([0, 1, 2, 44, 156, 159, 1, 2])
    if torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        target[0, 1] = ignore_index
    given = {"alpha" if loss_of is focal_loss else "weight": [0.5, 1.0] * 80}
    for options in ({}, given):
        check(backend, loss_of, logits, target.to(dtype), ignore_index=ignore_index, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@each_loss
def test_void_pixels_have_no_effect(backend, value, loss_of):
    clean, target = problem()
    changed = torch.where((target == VOID).unsqueeze(1), value, clean)
    given = dict(alpha=WEIGHT, gamma=0.5) if loss_of is focal_loss else dict(weight=WEIGHT)
    for reduction in ("mean", "none"):
        options = dict(ignore_index=VOID, reduction=reduction, **given)
        loss, grad = ours(backend, loss_of, changed, target, **options)
        expected, expected_grad = ours(backend, loss_of, clean, target, **options)
        assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
        assert (grad.movedim(1, -1)[target == VOID] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("images", [2, 0], ids=["void", "empty"])
@each_loss
def test_no_valid_pixel_gives_zero(backend, reduction, images, loss_of):
    logits, target = make_logits((images, CLASSES, 3, 4), torch.float32), torch.full((images, 3, 4), VOID)
    ways = [dict(thresh=t, min_kept=k) for t in (0.7, None) for k in (0, 10, 0.5)]
    for options in ways if loss_of is ohem_cross_entropy else [{}]:
        loss, grad = ours(backend, loss_of, logits, target, reduction=reduction, ignore_index=VOID, **options)
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [CLASSES, -1, 2**32])
@each_loss
def test_bad_labels(backend, label, loss_of):
    logits, target = problem()
    target[1, 2, 3] = label
    options = dict(thresh=None, min_kept=3) if loss_of is ohem_cross_entropy else {}
    for given in (options, options | {"alpha" if loss_of is focal_loss else "weight": WEIGHT}):
        if backend in ("cpu", "reference") and device_of(backend) == "cpu":
            with pytest.raises(ValueError, match=rf"target has label {label} at \(1, 2, 3\), the first of 1"):
                ours(backend, loss_of, logits, target, ignore_index=VOID, **given)
        else:
            loss, grad = ours(backend, loss_of, logits, target, ignore_index=VOID, **given)
            assert loss.isnan() and (grad[1, :, 2, 3] == 0).all()


# ---- derivatives, transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
@each_loss
def test_gradcheck(backend, upsample, loss_of):
    device = device_of(backend)
    leaf = make_logits((2, 3, 1, 2)).to(device).requires_grad_()
    target = make_target((2, 2, 3) if upsample else (2, 1, 2), 3).to(device)
    given = dict(upsample=upsample, ignore_index=VOID, backend=backend)
    if loss_of is ohem_cross_entropy:
        given |= dict(thresh=0.3, min_kept=1)
    gammas = (0.0, 0.5, 1.0, 2.0) if loss_of is focal_loss else (None,)
    for gamma in gammas:
        options = given if gamma is None else given | {"gamma": gamma}
        for reduction in ("mean", "none"):
            function = partial(loss_of, target=target, reduction=reduction, **options)
            # gradcheck's nondet_tol is 0: the gradient must have the same bits each time.
            assert torch.autograd.gradcheck(function, leaf)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(function, leaf)  # of each pixel


@pytest.mark.parametrize("backend", KERNELS)
@each_loss
def test_second_derivatives_of_kernels_raise(backend, loss_of):
    device = device_of(backend)
    logits, target = problem()
    leaf = logits.to(device).requires_grad_()
    loss = loss_of(leaf, target.to(device), ignore_index=VOID, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
@each_loss
def test_compiled_equals_eager(backend, upsample, loss_of):
    torch._dynamo.reset()
    device = device_of(backend)
    logits, target = problem(shape=(2, CLASSES, 3, 4))[0] if upsample else problem()[0], problem()[1]
    leaf, target = logits.to(device).requires_grad_(), target.to(device)
    given = {"alpha" if loss_of is focal_loss else "weight": torch.tensor(WEIGHT, device=device)}
    if loss_of is ohem_cross_entropy:
        given |= dict(thresh=0.3, min_kept=20)

    def step(leaf, target):
        return loss_of(leaf * 2, target, ignore_index=VOID, upsample=upsample, backend=backend, **given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(leaf, target), step(leaf, target)
    assert_close(loss.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(value, leaf)[0] for value in (loss, expected)))


@pytest.mark.parametrize("backend", FAST)
@each_loss
def test_torch_func(backend, loss_of):
    """PyTorch warns of each operator that it cannot batch. Of its own operators there is none."""
    device = device_of(backend)
    logits, target = (tensor.to(device) for tensor in problem())
    ways = [dict(thresh=t, min_kept=9) for t in (0.3, None)] if loss_of is ohem_cross_entropy else [{}]
    for options in ways:
        function = partial(loss_of, ignore_index=VOID, backend=backend, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            grads, values = torch.vmap(torch.func.grad_and_value(function))(
                logits.unsqueeze(1), target.unsqueeze(1)
            )
        slow = [str(warning.message) for warning in caught if "batching rule" in str(warning.message)]
        assert [text for text in slow if "for ial_" not in text] == []
        for i in range(len(logits)):
            leaf = logits[i : i + 1].clone().requires_grad_()
            value = function(leaf, target[i : i + 1])
            assert_close(values[i], value.detach())
            assert_close(grads[i], torch.autograd.grad(value, leaf)[0])


@pytest.mark.parametrize("backend", FAST)
def test_symbolic_trace_of_poly1(backend):
    logits, target = (tensor.to(device_of(backend)) for tensor in problem(ignore_index=-100))
    traced = torch.fx.symbolic_trace(lambda x, y: poly1_cross_entropy(x, y, backend=backend))
    assert torch.equal(traced(logits, target), poly1_cross_entropy(logits, target, backend=backend))


# ---- errors ---------------------------------------------------------------------------------------------

LOGITS, TARGET = problem()
GRADIENT = "requires a gradient, expected a constant: only logits are differentiated"
THRESH = "expected None or a number above 0 and at most 1"
KEPT = "expected an integer from 0 on, or a float above 0 and at most 1"
LABELS_OF = "expected one of torch.int64, torch.int32, torch.uint8"
BAD = {
    "logits": (LOGITS.numpy(), "logits is a ndarray, expected a torch.Tensor"),
    "target": (TARGET.short(), f"target has dtype torch.int16, {LABELS_OF}"),
    "reduction": ("max", "reduction is 'max', expected one of 'mean', 'sum', 'none'"),
    "ignore_index": (None, "ignore_index is None (NoneType), expected an integer"),
    "upsample": ("nearest", "upsample is 'nearest', expected one of None, 'bilinear'"),
    "align_corners": (True, "align_corners is True, expected False: upsample is None"),
    "backend": ("gpu", "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', "),
}
BAD_OF = [
    (focal_loss, "gamma", -0.5, "gamma is -0.5, expected a number that is at least 0"),
    (focal_loss, "gamma", np.nan, "gamma is nan, expected a finite number"),
    (focal_loss, "gamma", np.inf, "gamma is inf, expected a finite number"),
    (focal_loss, "gamma", "2", "gamma is '2' (str), expected a number"),
    (focal_loss, "gamma", torch.ones((), requires_grad=True), f"gamma {GRADIENT}"),
    (focal_loss, "alpha", 0.25, "alpha is a float, expected a torch.Tensor, an array or a list of numbers"),
    (focal_loss, "alpha", [0.25, 0.75], "alpha has shape (2,), expected (5,), one per class"),
    (focal_loss, "alpha", ["1"] * 5, "alpha[0] is '1' (str), expected a number"),
    (focal_loss, "alpha", torch.ones(5, device="meta"), "alpha is on meta, expected cpu like logits"),
    (focal_loss, "alpha", torch.ones(5, requires_grad=True), f"alpha {GRADIENT}"),
    (poly1_cross_entropy, "weight", [1.0], "weight has shape (1,), expected (5,), one per class"),
    (poly1_cross_entropy, "epsilon", np.inf, "epsilon is inf, expected a finite number"),
    (poly1_cross_entropy, "epsilon", None, "epsilon is None (NoneType), expected a number"),
    (ohem_cross_entropy, "weight", [1.0], "weight has shape (1,), expected (5,), one per class"),
    *((ohem_cross_entropy, "thresh", value, f"thresh is {value}, {THRESH}") for value in (0.0, 1.5, np.nan)),
    (ohem_cross_entropy, "thresh", "0.7", "thresh is '0.7' (str), expected a number"),
    *((ohem_cross_entropy, "min_kept", v, f"min_kept is {v}, {KEPT}") for v in (-1, 0.0, 1.5, np.nan)),
    (ohem_cross_entropy, "min_kept", True, "min_kept is True (bool), expected a number"),
    (ohem_cross_entropy, "min_kept", "9", "min_kept is '9' (str), expected a number"),
]
CASES_OF_ERRORS = [(loss_of, name, *BAD[name]) for loss_of in LOSSES for name in BAD] + BAD_OF


@pytest.mark.parametrize("case", CASES_OF_ERRORS, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_errors_name_the_argument_before_a_kernel_runs(case):
    loss_of, name, value, message = case
    arguments = dict(logits=LOGITS, target=TARGET, ignore_index=VOID)
    with Recorder() as ran:
        loss_of(**arguments)
        computes = ran.names & {"ial_cuda::pixel_nll", "aten::_log_softmax"}
        ran.names.clear()
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            loss_of(**arguments | {name: value})
    assert computes and not computes & ran.names
