"""Every backend against the float64 oracle: loss, gradient, factors and sums, for all options and layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    DTYPES,
    EMULATED,
    HIERARCHY,
    ONE_AND_FOUR,
    OPTIONS,
    camvid_labels,
    check,
    device_of,
    make_logits,
    make_target,
    run,
    trained_like,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ial_cuda import CAMVID, CITYSCAPES, Hierarchy, importance_aware_loss

WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])
PRESETS = {"flat": Hierarchy.flat(5), "two": Hierarchy([[4, 2], [0, 1, 3]]), "four": HIERARCHY}


def options_of(values):
    options = dict(zip(OPTIONS, values, strict=True))
    return options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "values", list(itertools.product(*OPTIONS.values())), ids=lambda v: "-".join(map(str, v))
)
def test_every_combination_of_options(backend, values):
    options = options_of(values)
    shape = (3, 5, 9, 10)
    target = make_target((3, 9, 10), 5)
    grad_output = torch.tensor([0.7, -1.3, 2.0]) if options["reduction"] == "none" else torch.tensor(-0.6)
    check(
        backend,
        make_logits(shape),
        target,
        weight=WEIGHT,
        pixel_weight=torch.rand(target.shape, generator=torch.Generator().manual_seed(1)),
        grad_output=grad_output,
        **options,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", OPTIONS["gradient"])
@pytest.mark.parametrize("hierarchy", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("spatial", [(), (1,), (17,), (64,), (7, 61), (3, 5, 6), (2, 3, 2, 3)], ids=str)
def test_every_dtype_and_rank(backend, dtype, gradient, hierarchy, spatial):
    check(
        backend,
        make_logits((2, 5, *spatial), dtype),
        make_target((2, *spatial), 5),
        hierarchy,
        weight=WEIGHT,
        gradient=gradient,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", OPTIONS["gradient"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@ONE_AND_FOUR
def test_label_smoothing(backend, dtype, gradient, layout, smoothing, hierarchy):
    target = make_target((2, 7, 61), 5)
    check(
        backend,
        make_logits((2, 5, 7, 61), dtype).contiguous(memory_format=layout),
        target,
        hierarchy,
        weight=WEIGHT,
        pixel_weight=torch.rand(target.shape, generator=torch.Generator().manual_seed(1)),
        gradient=gradient,
        label_smoothing=smoothing,
        grad_output=torch.tensor(-0.6),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 19, 33, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_label_smoothing_of_any_number_of_classes(backend, classes, dtype):
    logits, target = make_logits((1, classes, 5, 64), dtype), make_target((1, 5, 64), classes)
    check(backend, logits, target, Hierarchy.flat(classes), label_smoothing=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", OPTIONS["factor_scope"])
@pytest.mark.parametrize("divisor", [0, 7, 123.25, torch.tensor(311), torch.tensor(0.5)], ids=str)
@ONE_AND_FOUR
def test_divisor(backend, dtype, scope, divisor, hierarchy):
    logits, target = make_logits((3, 5, 9, 16), dtype), make_target((3, 9, 16), 5)
    check(backend, logits, target, hierarchy, weight=WEIGHT, factor_scope=scope, divisor=divisor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("incoming", [1.0, -0.6, 65536.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_level_for_any_incoming_gradient(backend, reduction, incoming, dtype):
    """For a number other than 1 the gradient is computed again: a rounded gradient cannot be scaled."""
    check(
        backend,
        make_logits((2, 5, 8, 64), dtype),
        make_target((2, 8, 64), 5),
        Hierarchy.flat(5),
        weight=WEIGHT,
        reduction=reduction,
        grad_output=torch.tensor(incoming),
    )


# (N, C, *spatial) logits that are views of a larger or permuted tensor. None of them is copied.
LAYOUTS = {
    "contiguous": lambda make: make(2, 5, 20, 37),
    "channels_last": lambda make: make(2, 5, 20, 37).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda make: make(2, 5, 4, 5, 37).to(memory_format=torch.channels_last_3d),
    "cropped": lambda make: make(2, 5, 23, 90)[..., 1:21, 3:75],
    "cropped_channels_last": lambda make: make(2, 5, 23, 41).to(memory_format=torch.channels_last)[
        ..., 1:21, 3:40
    ],
    "transposed": lambda make: make(2, 5, 70, 20).transpose(2, 3),
    "every_other_pixel": lambda make: make(2, 5, 20, 150)[..., ::2],
    "some_channels": lambda make: make(2, 9, 20, 37)[:, 2:7],
    "every_other_channel": lambda make: make(2, 9, 20, 37)[:, ::2],
    "expanded": lambda make: make(1, 5, 20, 37).expand(2, 5, 20, 37),
    "odd_offset": lambda make: make(2 * 5 * 20 * 37 + 3)[3:].view(2, 5, 20, 37),
    "permuted_3d": lambda make: make(2, 5, 4, 9, 7).permute(0, 1, 4, 2, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@ONE_AND_FOUR
def test_every_layout(backend, dtype, layout, hierarchy):
    logits = LAYOUTS[layout](lambda *shape: make_logits(shape, dtype))
    target = make_target((2, *logits.shape[2:]), 5)
    check(backend, logits, target, hierarchy, weight=WEIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [7, 8, 9, 19])
def test_every_number_of_classes_side_by_side(backend, dtype, classes):
    """channels_last pixels with all classes or a slice of them. Vector code reads eight at a time."""
    hierarchy = Hierarchy([range(0, classes, 2), range(1, classes, 2)])
    target = make_target((2, 7, 31), classes)
    whole = make_logits((2, classes + 3, 7, 31), dtype).to(memory_format=torch.channels_last)
    for logits in (whole[:, 3:].contiguous(memory_format=torch.channels_last), whole[:, 2:-1]):
        check(backend, logits, target, hierarchy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@ONE_AND_FOUR
def test_every_target(backend, dtype, strided, hierarchy):
    logits = make_logits((2, 5, 12, 90), torch.float32)
    target = (
        make_target((2, 12, 180), 5, dtype=dtype)[..., ::2]
        if strided
        else make_target((2, 12, 90), 5, dtype=dtype)
    )
    weights = torch.rand(2, 90, 12, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    weight = WEIGHT.repeat_interleave(2)[::2]
    if not strided:
        weight, weights = weight.contiguous(), weights.contiguous()
    check(backend, logits, target, hierarchy, weight=weight, pixel_weight=weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [255, -100, 2, 7, 2**32 + 2])
def test_every_ignore_index(backend, ignore_index):
    target = make_target((2, 30, 31), 5, ignore_index=ignore_index)
    check(backend, make_logits((2, 5, 30, 31), torch.float32), target, ignore_index=ignore_index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 11, 19, 21, 32, 33, 59, 150, 171, 1000])
@pytest.mark.parametrize("most", [1, 4])
def test_every_number_of_classes(backend, dtype, classes, most):
    levels = [list(range(k, classes, most)) for k in range(min(most, classes))]
    logits = make_logits((2, classes, 9, 11), dtype)
    target = make_target((2, 9, 11), classes, ignore_index=-1)
    check(backend, logits, target, Hierarchy(levels), ignore_index=-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_level_for_each_class(backend):
    hierarchy = Hierarchy([[c] for c in reversed(range(40))])
    check(backend, make_logits((2, 40, 8, 9)), make_target((2, 8, 9), 40), hierarchy, lambdas=0.1, alpha=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("present", [0, 1, 2, 4, 5, 9])
@pytest.mark.parametrize("levels", [1, 6])
def test_few_and_many_classes_side_by_side(backend, dtype, present, levels):
    """Pixels of `present` classes next to void ones: mixed, a block per class, and others in each image."""
    generator = torch.Generator().manual_seed(present)
    target = torch.full((2, 2, 150), 255)
    for image in target:
        some = torch.tensor([*torch.randperm(12, generator=generator)[:present].tolist(), 255])
        image[:] = some[torch.randint(len(some), image.shape, generator=generator)]
        image[1] = image[1].sort().values
    check(
        backend,
        make_logits((2, 12, 2, 150), dtype),
        target,
        Hierarchy([[c, 11 - c] for c in range(6)] if levels == 6 else [range(12)]),
        weight=torch.rand(12, generator=generator) + 0.5,
        pixel_weight=torch.rand(target.shape, generator=generator),
        lambdas=0.3,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_camvid(backend, dtype, kind):
    target = camvid_labels(3)
    if backend in EMULATED:
        target = target[:, 120:240].contiguous()
    assert (target == 11).any(), "the images were chosen to have void"
    shape = (3, 11, *target.shape[1:])
    logits = make_logits(shape, dtype) if kind == "random" else trained_like(target, 11, dtype)
    weight = torch.tensor(
        [0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587]
    )
    for options in ({}, {"gradient": "paper", "factor_normalization": "sum", "reduction": "none"}):
        check(backend, logits, target, CAMVID, weight=weight, ignore_index=11, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", OPTIONS["reduction"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_one_level_is_cross_entropy(backend, reduction, weighted):
    logits = make_logits((3, 19, 21, 33)).requires_grad_()
    target = make_target((3, 21, 33), 19)
    weight = (
        torch.rand(19, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) if weighted else None
    )
    loss, grad, _ = run(backend, logits, target, Hierarchy.flat(19), weight=weight, reduction=reduction)
    expected = F.cross_entropy(logits, target, weight, ignore_index=255, reduction=reduction)
    if reduction == "none":
        expected = expected.sum(dim=(1, 2))
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    # both in float64, eps 2.2e-16; sums of 2000 terms and cancellation in p - 1 lose a few digits
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", OPTIONS["factor_normalization"])
@pytest.mark.parametrize("scope", OPTIONS["factor_scope"])
@pytest.mark.parametrize("reduction", OPTIONS["reduction"])
def test_gradcheck(backend, normalization, scope, reduction):
    device = device_of(backend)
    logits = make_logits((2, 5, 4, 3), spread=1.0).to(device).requires_grad_()
    target = make_target((2, 4, 3), 5).to(device)
    assert torch.autograd.gradcheck(
        lambda x: importance_aware_loss(
            x,
            target,
            HIERARCHY,
            weight=WEIGHT.to(device),
            factor_normalization=normalization,
            factor_scope=scope,
            reduction=reduction,
            backend=backend,
        ),
        logits,
        fast_mode=backend in EMULATED,  # one random direction, not each of 120 logits
    )


@st.composite
def problems(draw):
    classes = draw(st.integers(1, 40))
    levels = draw(st.integers(1, min(classes, 6)))
    order = draw(st.permutations(range(classes)))
    cuts = (
        sorted(draw(st.sets(st.integers(1, classes - 1), min_size=levels - 1, max_size=levels - 1)))
        if levels > 1
        else []
    )
    hierarchy = Hierarchy([order[a:b] for a, b in zip([0, *cuts], [*cuts, classes], strict=True)])
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=0, max_size=3)))
    images = draw(st.integers(1, 4))
    options = {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items() if name != "lambdas"}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.2]))
    options["lambdas"] = [draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in range(levels - 1)]
    seed = draw(st.integers(0, 2**20))
    logits = make_logits((images, classes, *shape), draw(st.sampled_from(DTYPES)), seed=seed)
    target = make_target((images, *shape), classes, ignored=draw(st.sampled_from([0.0, 0.3, 1.0])), seed=seed)
    dims = [0, 1, *(2 + torch.randperm(len(shape), generator=torch.Generator().manual_seed(seed))).tolist()]
    logits = logits.permute(dims).contiguous().permute(torch.tensor(dims).argsort().tolist())
    return logits, target, hierarchy, options


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_problems(backend):
    @settings(
        # A case takes a second: interpreted, or compiled on a GPU for its classes, hierarchy and layout.
        max_examples=30 if backend == "triton" else 150,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(problem=problems())
    def anything(problem):
        logits, target, hierarchy, options = problem
        check(backend, logits, target, hierarchy, **options)

    anything()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cityscapes_groups_count(backend):
    """The levels of the preset, from the pixel counts of an image with one pixel of each class."""
    target = torch.arange(19).view(1, 19)
    *_, (_, _, _, count) = run(backend, make_logits((1, 19, 19)), target, CITYSCAPES)
    assert count.tolist() == [[1, 5, 3, 10]]
