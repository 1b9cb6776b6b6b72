"""`focal_loss`: saturated pixels, and the focal losses of other libraries with their differences.

Its values are tested against a formula in test_pixel_losses.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, DTYPES
from formulas import FAST, VOID, WEIGHT, assert_close, ours, problem

from ial_cuda import focal_loss, pixel_nll, poly1_cross_entropy

# ---- saturated pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_pixels(backend, gamma, dtype):
    """pi is exactly 1 in the first pixel: the limit is 0. In the second it is 0, and the loss -log pi."""
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], dtype=dtype)
    target = torch.zeros(2, dtype=torch.int64)
    loss, grad = ours(backend, focal_loss, logits, target, gamma=gamma, reduction="none")
    # 1 - pi is computed as 1 + eps - pi, and has that relative error twice at gamma = 2, thrice in the slope.
    precision = dict(rtol=4 * torch.finfo(loss.dtype).eps)
    assert loss[0] == 0 and grad[0].tolist() == [0, 0]
    np.testing.assert_allclose(loss[1], 1000, **precision)
    rounding = torch.finfo(dtype).eps / 2  # of the gradient, in the dtype of the logits
    np.testing.assert_allclose(grad[1].double(), [-1, 1], rtol=precision["rtol"] + rounding)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("margin", [0.0, 5.0, 10.0])
@pytest.mark.parametrize("gamma", [0.5, 2])
def test_certain_pixels(backend, margin, gamma):
    """1 - pi has the rounding of numbers near 1, as in every library."""
    logits, target = torch.tensor([[margin, 0.0]]), torch.tensor([0])
    loss, grad = ours(backend, focal_loss, logits, target, gamma=gamma)
    nll, grad_nll = ours(backend, pixel_nll, logits, target)
    n = nll.item()
    q = -np.expm1(-n)
    slope = q ** (gamma - 1) * (q + gamma * (1 - q) * n)
    # Ten operations, each of half an ulp. 1 - pi and its power: eps / q for each power, and once for 1 + eps.
    precision = dict(rtol=(5 + 2 * (gamma + 1) / q) * torch.finfo(torch.float32).eps)
    np.testing.assert_allclose(loss.item(), q**gamma * n, **precision)
    # Of the other class: the gradient of the own class, p - 1, has that error in the map already.
    np.testing.assert_allclose(grad[0, 1], slope * grad_nll[0, 1], **precision)


# ---- other libraries: x logits, y labels, v whether a pixel is valid, g gamma ---------------------------


def kornia(x, y, g, alpha=None, **options):
    losses = pytest.importorskip("kornia.losses")
    return losses.focal_loss(x, y, alpha, g, ignore_index=VOID, **options)


def monai(x, y, g, **options):
    losses = pytest.importorskip("monai.losses")
    criterion = losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=g, ignore_index=VOID, **options)
    return criterion(x, y.unsqueeze(1))


def smp(mode, x, y, g, **options):
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    return losses.FocalLoss(mode, gamma=g, ignore_index=VOID, **options)(x, y)


def smp_softmax(x, y, g, reduction="sum"):
    """A private function of segmentation_models_pytorch. Its void label is always -100."""
    functional = pytest.importorskip("segmentation_models_pytorch.losses._functional")
    return functional.softmax_focal_loss_with_logits(x, y.where(y != VOID, -100), g, reduction)


def torchvision(x, labels, g, **options):
    ops = pytest.importorskip("torchvision.ops")
    return ops.sigmoid_focal_loss(x, labels.to(x), gamma=g, **options)


def between(x):
    """The logit of the sigmoid that equals the softmax of two classes."""
    return x[:, 1] - x[:, 0]


TENSOR, FIRST, QUARTER = torch.tensor(WEIGHT), [0.75, 0.25, 0.25, 0.25, 0.25], [0.75, 0.25]
# Our mean, from another library: our alpha, one value for each class, and its call.
EQUAL = {
    "kornia": ([1] * 5, lambda x, y, v, g: kornia(x, y, g).sum() / v.sum()),
    "kornia weight": (WEIGHT, lambda x, y, v, g: kornia(x, y, g, weight=TENSOR).sum() / v.sum()),
    "kornia alpha": (FIRST, lambda x, y, v, g: kornia(x, y, g, 0.25).sum() / v.sum()),
    "MONAI": ([1] * 5, lambda x, y, v, g: monai(x, y, g)),
    "MONAI weight": (WEIGHT, lambda x, y, v, g: monai(x, y, g, weight=WEIGHT)),
    "MONAI alphas": (WEIGHT, lambda x, y, v, g: monai(x, y, g, alpha=WEIGHT)),
    "MONAI alpha": (FIRST, lambda x, y, v, g: monai(x, y, g, alpha=0.25)),
    "smp binary": ([1] * 2, lambda x, y, v, g: smp("binary", between(x), y, g)),
    "smp binary alpha": (QUARTER, lambda x, y, v, g: smp("binary", between(x), y, g, alpha=0.25)),
    "smp softmax": ([1] * 5, lambda x, y, v, g: smp_softmax(x, y, g) / v.sum()),
    "torchvision": ([1] * 2, lambda x, y, v, g: torchvision(between(x)[v], y[v], g, alpha=-1).mean()),
    "torchvision alpha": (QUARTER, lambda x, y, v, g: torchvision(between(x)[v], y[v], g, alpha=0.25).mean()),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("case", EQUAL)
def test_equal_to_other_libraries(backend, gamma, case):
    alpha, call = EQUAL[case]
    logits, target = problem(shape=(2, len(alpha), 6, 7))
    leaf = logits.clone().requires_grad_()
    expected = call(leaf, target, target != VOID, gamma)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    loss, grad = ours(backend, focal_loss, logits, target, gamma=gamma, alpha=alpha, ignore_index=VOID)
    assert_close(loss, expected.detach())
    assert_close(grad, expected_grad)


# ---- their differences ----------------------------------------------------------------------------------

X, Y = problem()
VALID = Y != VOID
ONE_HOT = F.one_hot(Y.where(VALID, 0), 5).movedim(-1, 1).float()


def own(x=X, y=Y, **options):
    return focal_loss(x, y, ignore_index=VOID, backend="reference", **options)


def against_all(g=2):
    """(N, H, W) the summed focal losses of a sigmoid for each class."""
    nll = F.binary_cross_entropy_with_logits(X, ONE_HOT, reduction="none")
    return ((1 - torch.exp(-nll)) ** g * nll).sum(1)


def assert_differs(theirs, formula, ours):
    assert_close(theirs, formula)
    assert abs(theirs - ours) > 0.1 * ours


def test_the_mean_of_kornia_divides_by_all_pixels_and_classes():
    assert_differs(kornia(X, Y, 2.0, reduction="mean"), own(reduction="sum") / X.numel(), own())


def test_the_sum_of_monai_adds_the_means_of_the_images():
    means = own(reduction="none").sum((1, 2)) / VALID.sum((1, 2))
    assert_differs(monai(X, Y, 2.0, reduction="sum"), means.sum(), own(reduction="sum"))


def test_monai_computes_in_float32():
    assert monai(X.double(), Y, 2.0).dtype == torch.float32 and own(X.double()).dtype == torch.float64


def test_the_classes_of_smp_are_sigmoids():
    assert_differs(smp("multiclass", X, Y, 2.0), against_all()[VALID].mean() / 5, own())


def test_the_mean_of_smp_softmax_divides_by_all_pixels():
    assert_differs(smp_softmax(X, Y, 2.0, "mean"), own(reduction="sum") / Y.numel(), own())


def test_half_precision_of_kornia_and_smp():
    x = X.bfloat16()
    assert kornia(x, Y, 2.0).dtype == smp_softmax(x, Y, 2.0).dtype == torch.bfloat16
    assert own(x).dtype == torch.float32


def test_the_classes_of_torchvision_are_sigmoids():
    theirs = torchvision(X, ONE_HOT, 2.0, alpha=-1).sum(1)[VALID].mean()
    assert_differs(theirs, against_all()[VALID].mean(), own())


def test_the_default_alpha_of_torchvision_is_a_quarter():
    x, y = X[:, :2], Y.where(~VALID, Y % 2)
    theirs = torchvision(between(x)[VALID], y[VALID], 2.0).mean()
    assert_differs(theirs, own(x, y, alpha=QUARTER), own(x, y))


def test_no_valid_pixel():
    """The mean is 0 in kornia, MONAI and here. smp gives NaN."""
    y = torch.full_like(Y, VOID)
    assert own(y=y) == kornia(X, y, 2.0, reduction="mean") == monai(X, y, 2.0) == 0
    assert smp("multiclass", X, y, 2.0).isnan() and smp("binary", between(X), y, 2.0).isnan()


@pytest.mark.parametrize("call", [own, kornia, monai, smp_softmax], ids=lambda call: call.__name__)
def test_logits_that_are_not_finite_beneath_void(call):
    """kornia selects, as we do. MONAI multiplies by a mask, and NaN times 0 is NaN."""
    leaf = torch.where(VALID.unsqueeze(1), X, torch.nan).requires_grad_()
    loss = (call(leaf) if call is own else call(leaf, Y, 2.0)).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isnan() == (call is monai)
    assert grad.isnan().any() == (call in (monai, smp_softmax))


def test_saturated_pixels_in_other_libraries():
    """At gamma < 1 the plain power has the derivative infinity times 0. kornia has the limit, as we do."""
    x, y = torch.tensor([[100.0, 0.0]], requires_grad=True), torch.tensor([0])
    for call, is_nan in ((kornia, False), (smp_softmax, True), (monai, True)):
        (grad,) = torch.autograd.grad(call(x, y, 0.5).sum(), x)
        assert grad.isnan().any() == is_nan
    (grad,) = torch.autograd.grad(own(x, y, gamma=0.5), x)
    assert grad.tolist() == [[0, 0]]


# ---- poly-1 ---------------------------------------------------------------------------------------------


def test_poly1_is_that_of_timm():
    """timm takes rows without void. Its default epsilon is 2, ours is the 1 of the paper's code."""
    timm = pytest.importorskip("timm.loss")
    rows, labels = X.movedim(1, -1)[VALID], Y[VALID]

    def poly1(**options):
        return poly1_cross_entropy(X, Y, ignore_index=VOID, backend="reference", **options)

    for epsilon in (-1.0, 0.0, 1.0, 2.5):
        assert_close(poly1(epsilon=epsilon), timm.PolyCrossEntropy(epsilon)(rows, labels))
    assert_differs(timm.PolyCrossEntropy()(rows, labels), poly1(epsilon=2), poly1())
