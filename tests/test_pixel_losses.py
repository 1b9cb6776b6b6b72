"""`focal_loss`, `ohem_cross_entropy` and `poly1_cross_entropy` against formulas in float64.

The formulas see the valid pixels alone, so void has no part in them. OHEM is mmsegmentation's
`OHEMPixelSampler` in NumPy, with a full sort.
"""

from __future__ import annotations

import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import BACKENDS, DTYPES, EMULATED, KERNELS, device_of, make_logits, make_target, poisoned
from torch.utils._python_dispatch import TorchDispatchMode

from ial_cuda import cross_entropy, focal_loss, ohem_cross_entropy, poly1_cross_entropy

CLASSES, SPATIAL, VOID = 5, (6, 7), 255
WEIGHT = [0.5, 1.0, 2.0, 1.5, 0.25]
FAST = [backend for backend in BACKENDS if backend.values[0] not in EMULATED]
LOSSES = [focal_loss, ohem_cross_entropy, poly1_cross_entropy]
each_loss = pytest.mark.parametrize("loss_of", LOSSES, ids=lambda loss_of: loss_of.__name__)


def problem(*, shape=(2, CLASSES, *SPATIAL), dtype=torch.float32, ignore_index=VOID):
    return make_logits(shape, dtype), make_target((shape[0], *shape[2:]), shape[1], ignore_index=ignore_index)


# ---- formulas: (M,) losses of the valid pixels, and what each adds to the divisor of the mean -----------


def own(values, y):
    return torch.ones(len(y)).double() if values is None else torch.as_tensor(values).double()[y]


def focal(nll, y, images, *, gamma=2.0, alpha=None):
    return own(alpha, y) * (1 - torch.exp(-nll)) ** gamma * nll, torch.ones_like(nll)


def poly1(nll, y, images, *, epsilon=1.0, weight=None):
    return own(weight, y) * (nll + epsilon * (1 - torch.exp(-nll))), own(weight, y)


def ohem(nll, y, images, *, thresh=0.7, min_kept=100_000, weight=None):
    losses, counted, count = own(weight, y) * nll, own(weight, y), len(y)
    keep = int(min_kept * count) if isinstance(min_kept, float) else min_kept * images
    if thresh is None:
        kept = np.zeros(count)
        kept[np.argsort(-losses.detach().numpy(), kind="stable")[:keep]] = 1
    else:
        prob = np.exp(-nll.detach().numpy())
        if count:
            thresh = max(np.sort(prob)[min(keep, count - 1)], thresh)
        kept = prob < thresh
    return losses * torch.tensor(kept), counted * torch.tensor(kept)


FORMULAS = dict(zip(LOSSES, [focal, ohem, poly1], strict=True))


def expected_of(loss_of, logits, target, incoming, reduction, ignore_index, upsample, corners, **options):
    """The loss and its gradient in float64, by autograd through the valid pixels."""
    leaf = logits.detach().double().requires_grad_()
    size = target.shape[1:]
    fine = F.interpolate(leaf, size, mode=upsample, align_corners=corners) if upsample else leaf
    labels = target.long()
    valid = labels != ignore_index
    nll = F.cross_entropy(fine.movedim(1, -1)[valid], labels[valid], reduction="none")
    losses, counted = FORMULAS[loss_of](nll, labels[valid], len(target), **options)
    if reduction == "none":
        loss = torch.zeros(target.shape).double().masked_scatter(valid, losses)
    else:
        loss = losses.sum()
        if reduction == "mean":
            loss = loss / counted.sum() if counted.sum() != 0 else loss * 0
    (grad,) = torch.autograd.grad(loss, leaf, incoming.double())
    return loss.detach(), grad


def assert_close(got, expected):
    """Asserts a difference of at most 64 roundings of the tensor's largest value, or of 1.

    The roundings are those of logits of up to 10, of their exponentials and of sums of some hundred terms.
    A gradient in half precision is rounded once more.
    """
    arithmetic = torch.float64 if got.dtype == torch.float64 else torch.float32
    half, limits = got.dtype != arithmetic, torch.finfo(got.dtype)
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.double().cpu(),
        expected.double().cpu(),
        rtol=limits.eps if half else 0,
        atol=64 * torch.finfo(arithmetic).eps * scale + half * limits.smallest_normal,
    )


def ours(backend, loss_of, logits, target, incoming=None, **options):
    """The loss of a backend and its gradient, on the CPU."""
    device = device_of(backend)
    leaf = logits.detach().to(device).requires_grad_()
    with poisoned():
        loss = loss_of(leaf, target.to(device), backend=backend, **options)
        given = torch.ones_like(loss) if incoming is None else incoming.to(loss)
        (grad,) = torch.autograd.grad(loss, leaf, given)
    return loss.detach().cpu(), grad.cpu()


def check(backend, loss_of, logits, target, *, reduction="mean", ignore_index=VOID, **options):
    shape = target.shape if reduction == "none" else ()
    incoming = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    common = dict(reduction=reduction, ignore_index=ignore_index)
    loss, grad = ours(backend, loss_of, logits, target, incoming, **common, **options)
    upsample, corners = options.pop("upsample", None), options.pop("align_corners", False)
    expected, expected_grad = expected_of(
        loss_of, logits, target, incoming, **common, upsample=upsample, corners=corners, **options
    )
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert loss.shape == expected.shape and grad.dtype == logits.dtype
    assert_close(loss, expected)
    assert_close(grad, expected_grad)


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


# ---- focal: saturated pixels, second derivatives --------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_pixels(backend, gamma, dtype):
    """pi is exactly 1 in the first pixel: the limit is 0. In the second it is 0, and the loss -log pi."""
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], dtype=dtype)
    target = torch.zeros(2, dtype=torch.int64)
    loss, grad = ours(backend, focal_loss, logits, target, gamma=gamma, reduction="none")
    assert loss.tolist() == [0, 1000]
    assert grad.tolist() == [[0, 0], [-1, 1]]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("margin", [5.0, 10.0, 15.0, 30.0])
@pytest.mark.parametrize("gamma", [0.5, 2])
def test_certain_pixels_keep_their_precision(backend, margin, gamma):
    """1 - pi is a difference of numbers near 1. It must come from -log pi, without cancellation."""
    logits = torch.tensor([[margin, 0.0]], dtype=torch.float64)
    loss, grad = ours(backend, focal_loss, logits, torch.tensor([0]), gamma=gamma)
    q = 1 / (1 + np.exp(margin))
    n = np.log1p(np.exp(-margin))
    # -log pi itself is rounded at 1 + q: a relative error of half an ulp over q.
    tolerance = (1 + gamma) * torch.finfo(torch.float64).eps / q + 1e-14
    np.testing.assert_allclose(loss.item(), q**gamma * n, rtol=tolerance)
    slope = q ** (gamma - 1) * (q + gamma * (1 - q) * n)
    np.testing.assert_allclose(grad.tolist(), [[-slope * q, slope * q]], rtol=2 * tolerance)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
@each_loss
def test_gradcheck(backend, upsample, loss_of):
    device = device_of(backend)
    leaf = make_logits((2, 3, 2, 3)).to(device).requires_grad_()
    target = make_target((2, 4, 5) if upsample else (2, 2, 3), 3).to(device)
    given = dict(upsample=upsample, ignore_index=VOID, backend=backend)
    if loss_of is ohem_cross_entropy:
        given["min_kept"] = 4
    gammas = (0.0, 0.5, 1.0, 2.0) if loss_of is focal_loss else (None,)
    for gamma in gammas:
        options = given if gamma is None else given | {"gamma": gamma}
        for reduction in ("mean", "none"):
            function = partial(loss_of, target=target, reduction=reduction, **options)
            # gradcheck's nondet_tol is 0: the gradient must have the same bits each time.
            assert torch.autograd.gradcheck(function, leaf)
            if backend == "reference":
                assert torch.autograd.gradgradcheck(function, leaf)


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


# ---- OHEM: ties, one pixel, no sort ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [1, 7, 41])
def test_equal_pixels_share_the_last_place(backend, keep):
    """The sum and the mean are those of topk, whichever pixels it takes. The gradient is symmetric."""
    logits = torch.zeros(1, CLASSES, *SPATIAL)
    logits[0, 1, 0, 0] = 3.0  # one pixel with a larger loss
    target = torch.zeros((1, *SPATIAL), dtype=torch.int64)
    options = dict(thresh=None, min_kept=keep)
    losses, _ = ours(backend, ohem_cross_entropy, logits, target, reduction="none", **options)
    mean, grad = ours(backend, ohem_cross_entropy, logits, target, **options)
    exact = F.cross_entropy(logits.double(), target, reduction="none").flatten()
    assert_close(losses.sum(), exact.topk(keep).values.sum())
    assert_close(mean, exact.topk(keep).values.mean())
    shared = losses.flatten()[1:]
    assert (shared == shared[0]).all() and (grad.flatten(2)[..., 1:] == grad.flatten(2)[..., 1:2]).all()
    assert_close(shared[0], exact[1] * (keep - 1) / 41)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("keep", [3, 10, 50])
def test_equal_pixels_at_the_threshold_are_dropped(backend, keep):
    """As by mmsegmentation, which keeps what is strictly below."""
    logits, target = torch.zeros(1, 2, 40), torch.zeros(1, 40, dtype=torch.int64)
    logits[0, 1, :5] = 1.0  # harder: pi = 0.27, the others have pi = 0.5
    for thresh, kept in ((0.4, 5), (0.5, 5), (0.6, 40), (0.2, 5 if keep >= 5 else 0)):
        losses, _ = ours(
            backend, ohem_cross_entropy, logits, target, thresh=thresh, min_kept=keep, reduction="none"
        )
        assert (losses > 0).sum() == kept
        check(backend, ohem_cross_entropy, logits, target, thresh=thresh, min_kept=keep)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("min_kept", [0, 1, 5, 0.5, 1.0])
@pytest.mark.parametrize("thresh", [0.01, 0.7, None])
def test_one_valid_pixel(backend, min_kept, thresh):
    logits, target = problem()
    target = torch.full_like(target, VOID)
    target[1, 2, 3] = 1
    check(backend, ohem_cross_entropy, logits, target, thresh=thresh, min_kept=min_kept)


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("options", [dict(min_kept=20), dict(thresh=None, min_kept=0.5)], ids=str)
def test_nothing_is_sorted(backend, options):
    logits, target = (tensor.to(device_of(backend)) for tensor in problem())
    with Recorder() as ran:
        ohem_cross_entropy(logits, target, ignore_index=VOID, backend=backend, **options)
    selects = "aten::kthvalue" if device_of(backend) == "cpu" else "aten::topk"
    assert selects in ran.names and not any("sort" in name for name in ran.names)


# ---- transforms -----------------------------------------------------------------------------------------


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


# ---- errors ---------------------------------------------------------------------------------------------

LOGITS, TARGET = problem()
KEPT = "expected an integer from 0 on, or a float above 0 and at most 1"
GRADIENT = "requires a gradient, expected a constant: only logits are differentiated"
BAD = [
    *((loss_of, dict(logits=LOGITS.numpy()), TypeError, "logits is a ndarray, expected a torch.Tensor") for loss_of in LOSSES),
    *((loss_of, dict(target=TARGET.short()), TypeError, "target has dtype torch.int16, expected one of torch.int64, torch.int32, torch.uint8") for loss_of in LOSSES),
    *((loss_of, dict(target=TARGET[:, :3]), ValueError, "target has shape (2, 3, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7)") for loss_of in LOSSES),
    *((loss_of, dict(reduction="max"), ValueError, "reduction is 'max', expected one of 'mean', 'sum', 'none'") for loss_of in LOSSES),
    *((loss_of, dict(ignore_index=None), TypeError, "ignore_index is None (NoneType), expected an integer") for loss_of in LOSSES),
    *((loss_of, dict(ignore_index=2**63), ValueError, "ignore_index is 9223372036854775808, expected a 64-bit integer") for loss_of in LOSSES),
    *((loss_of, dict(upsample="nearest"), ValueError, "upsample is 'nearest', expected one of None, 'bilinear'") for loss_of in LOSSES),
    *((loss_of, dict(align_corners=True), ValueError, "align_corners is True, expected False: upsample is None") for loss_of in LOSSES),
    *((loss_of, dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', ") for loss_of in LOSSES),
    (focal_loss, dict(gamma=-0.5), ValueError, "gamma is -0.5, expected a number that is at least 0"),
    (focal_loss, dict(gamma=np.nan), ValueError, "gamma is nan, expected a finite number"),
    (focal_loss, dict(gamma=np.inf), ValueError, "gamma is inf, expected a finite number"),
    (focal_loss, dict(gamma="2"), TypeError, "gamma is '2' (str), expected a number"),
    (focal_loss, dict(gamma=torch.tensor(2.0, requires_grad=True)), ValueError, f"gamma {GRADIENT}"),
    (focal_loss, dict(alpha=0.25), TypeError, "alpha is a float, expected a torch.Tensor, an array or a list of numbers"),
    (focal_loss, dict(alpha=[0.25, 0.75]), ValueError, "alpha has shape (2,), expected (5,), one per class"),
    (focal_loss, dict(alpha=["1"] * 5), TypeError, "alpha[0] is '1' (str), expected a number"),
    (focal_loss, dict(alpha=torch.ones(5, device="meta")), ValueError, "alpha is on meta, expected cpu like logits"),
    (focal_loss, dict(alpha=torch.ones(5, requires_grad=True)), ValueError, f"alpha {GRADIENT}"),
    *((loss_of, dict(weight=[1.0]), ValueError, "weight has shape (1,), expected (5,), one per class") for loss_of in LOSSES[1:]),
    *((loss_of, dict(weight=torch.ones(5, requires_grad=True)), ValueError, f"weight {GRADIENT}") for loss_of in LOSSES[1:]),
    (poly1_cross_entropy, dict(epsilon=np.inf), ValueError, "epsilon is inf, expected a finite number"),
    (poly1_cross_entropy, dict(epsilon=None), TypeError, "epsilon is None (NoneType), expected a number"),
    *((ohem_cross_entropy, dict(thresh=thresh), ValueError, f"thresh is {thresh}, expected None or a number above 0 and at most 1") for thresh in (0.0, 1.5, -0.7, np.nan)),
    (ohem_cross_entropy, dict(thresh="0.7"), TypeError, "thresh is '0.7' (str), expected a number"),
    *((ohem_cross_entropy, dict(min_kept=kept), ValueError, f"min_kept is {kept}, {KEPT}") for kept in (-1, 0.0, 1.5, np.nan)),
    *((ohem_cross_entropy, dict(min_kept=kept), TypeError, f"min_kept is {kept!r} ({type(kept).__name__}), expected an integer") for kept in (True, None, "9")),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0].__name__}-{'-'.join(case[1])}")
def test_errors_name_the_argument_before_a_kernel_runs(case):
    loss_of, bad, error, message = case
    arguments = dict(logits=LOGITS, target=TARGET, ignore_index=VOID) | bad
    with Recorder() as ran, pytest.raises(error, match=f"^{re.escape(message)}"):
        loss_of(**arguments)
    assert not any("pixel_nll" in name or "log_softmax" in name for name in ran.names)
