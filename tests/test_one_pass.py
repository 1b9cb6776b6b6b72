"""One level on the CPU: loss and gradient in one pass over the logits, and label smoothing."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, make_logits, make_target, poisoned

from ial_cuda import backends

CLASSES = 19
EXPECTED = [None, 0.37, 65536.0]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[..., 1:],
    "cropped": lambda x: x[..., 1:],
    "step 2": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def ops():
    return backends.get("cpu").operators()


class Case:
    """The arguments of the operators for one level."""

    def __init__(self, logits, *, size=None, labels=torch.int64, weights=True, eps=0.0):
        n, classes = logits.shape[:2]
        shape = (n, *(size or logits.shape[2:]))
        self.logits, self.corners = logits, None if size is None else False
        self.target = make_target(shape, classes, dtype=labels)
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.rand(classes, generator=generator) + 0.1 if weights else None
        self.pixel_weight = torch.rand(shape, generator=generator) if weights else None
        self.eps = eps

    @property
    def pixels(self):
        levels = [0] * self.logits.shape[1]
        return self.target, self.weight, self.pixel_weight, levels, 255, "exact", self.eps

    def one_pass(self, *, reduction="mean", divisor=None, expected=None):
        state = None if expected is None else torch.tensor([expected, 1.0], dtype=torch.float64)
        combine = (divisor, [], 1.0, reduction, "mean", "image")
        with poisoned():
            return ops().loss_and_grad(self.logits, *self.pixels, *combine, self.corners, state)

    def reduce(self):
        return ops().reduce(self.logits, *self.pixels, False, self.corners)

    def reduce_backward(self, grad_stats):
        return ops().reduce_backward(self.logits, grad_stats, *self.pixels, self.corners)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def check(case, expected=None, **options):
    """Asserts that the gradient is bitwise that of reduce_backward, and that the sums are those of reduce."""
    loss, factors, stats, grad_stats, grad, computed_for = case.one_pass(expected=expected, **options)
    factor = 1.0 if expected is None else expected
    assert computed_for.item() == factor
    assert factors.shape[1] == 0
    with poisoned():
        assert same_bits(grad, case.reduce_backward(grad_stats * factor))
    two = case.reduce()
    # Both add float32 to float64, in different orders.
    rtol = 1e-13 if case.logits.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(stats[..., [0, 3, 4]], two[..., [0, 3, 4]], rtol=rtol, atol=0)
    assert (stats[..., [1, 2]] == 0).all()
    given = options.get("divisor")
    divisor = two[..., 4].sum() if given is None else given
    if options.get("reduction") == "sum":
        divisor = 1
    torch.testing.assert_close(grad_stats[..., 0], torch.ones_like(two[..., 0]) / divisor, rtol=rtol, atol=0)
    torch.testing.assert_close(loss.double(), two[..., 0].sum() / divisor, rtol=max(rtol, 3e-7), atol=0)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_has_the_bits_of_two_passes(dtype, layout, eps):
    logits = LAYOUTS[layout](make_logits((2, CLASSES, 9, 131), dtype))
    for expected in EXPECTED if dtype != torch.float16 else EXPECTED[1:]:
        check(Case(logits, eps=eps), expected)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(37, 150), (9, 70), (5, 31), (9, 800)], ids=str)
def test_coarse_logits(dtype, size, eps):
    logits = make_logits((2, 5, 9, 70), dtype)
    for expected in EXPECTED if dtype != torch.float16 else EXPECTED[1:]:
        check(Case(logits, size=size, eps=eps), expected)


@pytest.mark.parametrize("size", [None, (24, 40)], ids=["full size", "coarse"])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_labels_and_reductions(labels, size):
    for weights in (True, False):
        case = Case(make_logits((2, 7, 12, 33), torch.float32), size=size, labels=labels, weights=weights)
        check(case)
        check(case, reduction="sum")
        check(case, divisor=torch.tensor(123.0, dtype=torch.float64))
    case.target.fill_(255)
    loss, *_, grad, _ = case.one_pass()
    assert loss == 0
    assert not grad.any()


# Streaming stores from 2 MiB on, few and many classes, and every remainder of a row.
SIZES = [
    *[(1, 2, 512, 520), (1, 19, 200, 256), (1, 1, 3, 3), (3, 4, 1), (2, 300, 5, 64), (5, 8, 7, 7), (7, 9)],
    *[(1, 3, 4, width) for width in (1, 15, 16, 17, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129)],
]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes(shape):
    check(Case(make_logits(shape, torch.float32), labels=torch.int32))
    if len(shape) == 4:  # rows that are not contiguous
        check(Case(make_logits((*shape[:3], shape[3] + 1), torch.bfloat16)[..., 1:]))


def test_logits_that_are_not_finite():
    logits = make_logits((1, 5, 8, 80), torch.float32)
    case = Case(logits)
    ignored = case.target[0] == 255
    for value in (float("nan"), float("inf"), -float("inf")):
        logits[0, 2, 0:2, 3:50] = value
        loss, _, _, grad_stats, grad, _ = case.one_pass()
        assert same_bits(grad, case.reduce_backward(grad_stats))
        assert not grad[0, :, ignored].any()
        assert not loss.isfinite()


def test_the_first_bad_label_is_the_first_of_the_target():
    case = Case(LAYOUTS["transposed"](make_logits((2, 5, 20, 32), torch.float32)))
    case.target[1, 7, 9], case.target[1, 8, 1] = 77, -3
    with pytest.raises(ValueError, match=r"label 77 at \(1, 7, 9\), the first of 2 bad pixels"):
        case.one_pass()


@pytest.mark.parametrize("size", [None, (40, 64)], ids=["full size", "coarse"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["mean", "sum"])
def test_a_bad_label_is_an_error(size, options):
    case = Case(make_logits((2, 5, 20, 32), torch.float32), size=size)
    case.target[1, 7, 9], case.target[1, 8, 1] = 77, -3
    with pytest.raises(ValueError, match=r"label 77 at \(1, 7, 9\), the first of 2 bad pixels"):
        case.one_pass(**options)


def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    cases = [
        Case(make_logits((2, CLASSES, 96, 130), torch.float32), eps=0.1),
        Case(make_logits((2, CLASSES, 40, 33), torch.float32), size=(160, 132)),
        Case(make_logits((1, 2, 300, 300), torch.bfloat16)),
    ]
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([case.one_pass() for case in cases])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------
# rescale_


@pytest.mark.parametrize("size", [None, (40, 64)], ids=["full size", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rescale_recomputes_for_another_gradient(dtype, size):
    case = Case(make_logits((2, 5, 20, 32), dtype), size=size)
    state = torch.tensor([1.0, 1.0], dtype=torch.float64)
    *_, grad_stats, grad, computed_for = case.one_pass(expected=1.0)

    def rescale(incoming):
        given = torch.tensor(incoming)
        ops().rescale_(grad, given, computed_for, case.logits, grad_stats, *case.pixels, case.corners, state)
        return state.tolist()

    grad[0, 0, 0, 0] = 12
    assert rescale(1.0) == [1.0, 1.0]
    assert grad[0, 0, 0, 0] == 12  # not written
    assert rescale(1024.0) == [1.0, 1024.0]
    assert same_bits(grad, case.reduce_backward(grad_stats * 1024))
    assert rescale(1024.0) == [1024.0, 1024.0]
    assert rescale(0.5) == [1024.0, 0.5]
    assert rescale(float("inf"))[0] == rescale(float("inf"))[0] == 1024.0
    assert rescale(float("nan"))[0] == rescale(float("nan"))[0] == 1024.0


# -------------------------------------------------------------------------------------------------
# Label smoothing


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("weights", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("size", [None, (37, 150)], ids=["full size", "coarse"])
def test_label_smoothing_is_that_of_torch(size, weights, eps):
    logits = make_logits((2, 7, 9, 70)).requires_grad_()
    case = Case(logits.detach(), size=size, weights=weights, eps=eps)
    case.pixel_weight = None
    weight = None if case.weight is None else case.weight.double()
    fine = logits if size is None else F.interpolate(logits, size, mode="bilinear")
    for reduction in ("mean", "sum"):
        options = {"ignore_index": 255, "label_smoothing": eps, "reduction": reduction}
        loss = F.cross_entropy(fine, case.target, weight, **options)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        ours, *_, grad_stats, ours_grad, _ = case.one_pass(reduction=reduction)
        stats = case.reduce()
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(ours_grad, grad, rtol=1e-11, atol=1e-15 * len(case.target.flatten()))
        torch.testing.assert_close(stats[..., 0].sum() * grad_stats[0, 0, 0], ours, rtol=1e-12, atol=0)


def test_label_smoothing_of_several_levels():
    """S of each level is smoothed; P2, Q2 and the weights are not. Also the gradient of a sum of all."""
    logits = make_logits((2, 6, 7, 70)).requires_grad_()
    case = Case(logits.detach(), eps=0.2)
    levels = [0, 1, 2, 0, 1, 2]
    pixels = case.target, case.weight, case.pixel_weight, levels, 255, "exact"
    stats = ops().reduce(case.logits, *pixels, 0.2, False, None)
    plain = ops().reduce(case.logits, *pixels, 0.0, False, None)
    assert torch.equal(stats[..., 1:], plain[..., 1:])

    options = {"weight": case.weight.double(), "ignore_index": 255, "reduction": "none"}
    losses = case.pixel_weight * F.cross_entropy(logits, case.target, label_smoothing=0.2, **options)
    level = torch.tensor(levels)[case.target.where(case.target != 255, 0)]
    S = torch.stack([(losses * (level == k)).sum((1, 2)) for k in range(3)], 1)
    torch.testing.assert_close(stats[..., 0], S.detach(), rtol=1e-12, atol=0)

    pi = logits.softmax(1).gather(1, case.target.where(case.target != 255, 0).unsqueeze(1)).squeeze(1)
    valid = case.target != 255
    sums = [
        (value * (valid & (level == k))).sum((1, 2)) for k in range(3) for value in (pi**2, (1 - pi) ** 2)
    ]
    grad_stats = torch.zeros(2, 3, 5, dtype=torch.float64)
    grad_stats[..., :3] = make_logits((2, 3, 3), seed=1)
    total = (grad_stats[..., 0] * S).sum()
    total = total + (grad_stats[..., 1:3].flatten(1) * torch.stack(sums, 1)).sum()
    (expected,) = torch.autograd.grad(total, logits)
    grad = ops().reduce_backward(case.logits, grad_stats, *pixels, 0.2, None)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("this is such a run")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    chosen = "not float64 and not threads and not rescale"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
