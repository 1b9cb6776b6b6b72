"""Random inputs against the float64 oracle: values, dtypes, classes, layouts, coarse logits, weights, labels.

Values that must not affect the result are infinite or NaN. The number of a case is its seed, and a failure
prints the number. IAL_ATTACK=n tries n cases on each backend.
"""

from __future__ import annotations

import math
import os
from random import Random

import pytest
import torch
from cases import BACKENDS, DTYPES, OPTIONS, check, check_upsampled, make_logits, make_target, run

from ial_cuda import Hierarchy

#: One case takes a second or two on the emulated backends.
CASES = {"reference": 30, "cpu": 80, "triton": 8, "simt": 16, "simt_one_launch": 8}

# (N, C, *spatial) logits that the function returns, or a part of them.
LAYOUTS = {
    "contiguous": lambda make, n, c, *s: make(n, c, *s),
    "channels_last": lambda make, n, c, *s: make(n, *s, c).movedim(-1, 1),
    "expanded": lambda make, n, c, *s: make(1, c, *s).expand(n, c, *s),
    "every other pixel": lambda make, n, c, *s: make(n, c, *s, 2)[..., 1],
    "some channels": lambda make, n, c, *s: make(n, c + 3, *s)[:, 2:-1],
    "pixels first": lambda make, n, c, *s: make(*s, n, c).permute(len(s), len(s) + 1, *range(len(s))),
    "odd offset": lambda make, *shape: make(math.prod(shape) + 3)[3:].view(shape),
}
#: The kinds of logits. With those in capitals the loss may be infinite or NaN.
VALUES = ("normal", "huge", "tiny", "ties", "masked", "LIMIT", "INFINITE", "MINUS INFINITE", "NAN")
RATIOS = (None, None, None, 1, 2, 3, 4, 7.3, 75, 0.5, 0.03)
ANYTHING = (0.0, math.inf, -math.inf, math.nan)


def make_case(number):
    """Logits, target, and the arguments of `check` or, if align_corners is one, of `check_upsampled`."""
    random, generator = Random(number), torch.Generator().manual_seed(number)
    classes, images = random.choice((1, 2, 3, 11, 19, 33, 150)), random.choice((1, 2, 3))
    ratio, arguments = random.choice(RATIOS), {}
    if ratio is None:
        fine = coarse = [random.choice((1, 3, 8, 17, 40)) for _ in range(random.choice((0, 1, 2, 3)))]
    else:
        widths = (70, 90) if ratio < 0.1 else (1, 2) if ratio > 8 else (1, 2, 5, 9, 35)
        coarse = [random.choice((1, 2, 5)), random.choice(widths)]
        fine = [max(1, round(coarse[0] * min(ratio, 4))), max(1, round(coarse[1] * ratio))]
        arguments["align_corners"] = random.random() < 0.5

    # labels of some classes; -100 and 2**32 + 1 do not fit every dtype, and 7 may be a class
    label = random.choice((torch.int64, torch.int32, torch.uint8))
    ignored = random.choice((255, -100, 7, 2**32 + 1))
    present = random.sample(range(classes), random.randint(1, classes))
    target = torch.tensor(present)[torch.randint(len(present), (images, *fine), generator=generator)]
    if torch.iinfo(label).min <= ignored <= torch.iinfo(label).max:
        target[torch.rand(target.shape, generator=generator) < random.choice((0, 0.2, 0.9))] = ignored
    void = target == ignored
    absent = sorted(set(range(classes)) - set(target[~void].tolist()))

    if random.random() < 0.6:
        weight = torch.rand(classes, generator=generator) + 0.1
        weight[random.choice(present)] = 0
        weight[absent] = random.choice(ANYTHING)
        arguments["weight"] = weight
    if random.random() < 0.4:
        pixel_weight = torch.rand(target.shape, generator=generator)
        arguments["pixel_weight"] = pixel_weight.masked_fill(void, random.choice(ANYTHING))

    dtype, values, layout = random.choice(DTYPES), random.choice(VALUES), random.choice(tuple(LAYOUTS))
    limits = torch.finfo(dtype)

    def make(*shape):
        logits = make_logits(shape, torch.float64, seed=number)
        if values == "huge":
            logits *= min(random.choice((1e4, 1e30)), limits.max / 100)
        elif values == "tiny":
            logits *= limits.smallest_normal
        elif values == "ties":
            logits = logits.sign()
        elif values == "LIMIT":
            logits = 0.6 * limits.max * logits.sign()
        return logits.to(dtype)

    logits = LAYOUTS[layout](make, images, classes, *coarse)
    own = logits[:1] if layout == "expanded" else logits  # elements that are no other's
    if values == "masked":
        own[:, absent] = -math.inf
    elif values in ("INFINITE", "MINUS INFINITE", "NAN"):
        value = {"INFINITE": math.inf, "MINUS INFINITE": -math.inf, "NAN": math.nan}[values]
        for _ in range(2):
            own[tuple(random.randrange(size) for size in own.shape)] = value
    if ratio is None and (layout != "expanded" or images == 1):
        own.masked_fill_(void.unsqueeze(1), random.choice(ANYTHING))

    # With several levels an infinite S_k is multiplied by factors of 0, in an order that is not defined.
    levels = 1 if values.isupper() else random.randint(1, min(4, classes))
    order = random.sample(range(classes), classes)
    for name, choices in OPTIONS.items():
        if name != "lambdas":
            arguments[name] = random.choice(choices)
    arguments |= dict(hierarchy=Hierarchy([order[k::levels] for k in range(levels)]), ignore_index=ignored)
    description = f"{dtype} {tuple(logits.shape)} {layout}, {values}, target {label} {tuple(target.shape)}, "
    return logits, target.to(label), arguments, description + str(arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd offset"])
@pytest.mark.parametrize("scope", OPTIONS["factor_scope"])
def test_void_pixels_and_absent_classes_have_no_effect(backend, dtype, value, layout, scope):
    """Results are bitwise equal for any logits and weights of theirs."""
    target = make_target((3, 6, 40), 5, ignored=0.3)
    target[target == 4] = 255
    target[1] = 255  # an image without a pixel
    void = target == 255
    options = dict(factor_scope=scope, gradient="paper" if layout == "channels_last" else "exact")
    results = []
    for filling in (0.0, value):
        logits = LAYOUTS[layout](lambda *shape: make_logits(shape, dtype), 3, 5, 6, 40)
        weight = torch.tensor([0.3, 1.0, 2.5, 0.7, filling])
        pixel_weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
        logits.masked_fill_(void.unsqueeze(1), filling)
        pixel_weight.masked_fill_(void, filling)
        results.append(run(backend, logits, target, weight=weight, pixel_weight=pixel_weight, **options))
    (loss, grad, components), (expected, expected_grad, expected_components) = results[1], results[0]
    assert loss.isfinite() and (grad.movedim(1, -1)[void] == 0).all()
    assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
    assert all(map(torch.equal, components, expected_components))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(backend):
    for number in range(int(os.environ.get("IAL_ATTACK", CASES.get(backend, 80)))):
        logits, target, arguments, description = make_case(number)
        try:
            (check_upsampled if "align_corners" in arguments else check)(backend, logits, target, **arguments)
        except Exception as error:
            raise AssertionError(f"case {number}: {description}: {error}") from error


def test_random_cases_cover_every_kind():
    """Otherwise a change of `make_case` could leave kinds out."""
    descriptions = [make_case(number)[-1] for number in range(CASES["cpu"])]
    arguments = ["uint8", "align_corners': True", "'weight'", "'pixel_weight'"]
    for some in (LAYOUTS, VALUES, map(str, DTYPES), arguments):
        for one in some:
            assert sum(one in description for description in descriptions) >= 3, one
