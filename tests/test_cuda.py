"""Tests that need a GPU: streams, no synchronisation, two devices, more than 2**31 elements, CUDA graphs."""

from __future__ import annotations

import math

import pytest
import torch
from cases import GPU_KERNELS, make_logits, make_target

from ial_cuda import CITYSCAPES, Hierarchy, ImportanceAwareLoss, importance_aware_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CLASSES, SPATIAL = CITYSCAPES.num_classes, (96, 168)


def values(seed):
    """Logits and target on the CPU."""
    logits = make_logits((2, CLASSES, *SPATIAL), torch.float32, seed=seed)
    return logits, make_target((2, *SPATIAL), CLASSES, seed=seed)


class Step:
    """Loss and gradient of tensors on a device. `fill` writes new values to the same memory."""

    def __init__(self, backend, device="cuda", inplace=False):
        self.backend, self.inplace = backend, inplace
        self.leaf = torch.full((2, CLASSES, *SPATIAL), torch.nan, device=device).requires_grad_()
        self.target = torch.zeros((2, *SPATIAL), dtype=torch.int64, device=device)
        self.weight = torch.linspace(0.5, 2, CLASSES, device=device)

    def fill(self, logits, target):
        with torch.no_grad():
            self.leaf.copy_(logits)
            self.target.copy_(target)

    def __call__(self):
        logits = self.leaf * 1  # not a leaf, which could not be overwritten
        loss = importance_aware_loss(
            logits, self.target, CITYSCAPES, weight=self.weight, backend=self.backend, inplace=self.inplace
        )
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad


def results(backend, seed, *, device="cuda", inplace=False):
    step = Step(backend, device, inplace)
    step.fill(*values(seed))
    return tuple(tensor.cpu() for tensor in step())


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_no_synchronisation(backend):
    step = Step(backend)
    step.fill(*values(0))
    step()  # compiles and loads what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_the_current_stream_is_used(backend):
    """The logits are NaN until a busy stream has written them. Another stream would read NaN."""
    expected = results(backend, seed=1)
    step, stream = Step(backend), torch.cuda.Stream()
    logits, target = (tensor.cuda() for tensor in values(1))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # tens of milliseconds
        step.fill(logits, target)
        loss, grad = step()
    stream.synchronize()
    assert torch.equal(loss.cpu(), expected[0]) and torch.equal(grad.cpu(), expected[1])


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_a_device_that_is_not_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device, two needed")
    expected = results(backend, seed=2)
    for result, same in zip(results(backend, seed=2, device="cuda:1"), expected, strict=True):
        assert torch.equal(result, same)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("width", [10700, 10701], ids=["vectors", "odd"])
def test_more_than_2_to_the_31_elements(need_gpu_memory, backend, layout, width):
    """One image of 100 equal strips: 100 times the loss of a strip, and its gradient repeated."""
    strips, height = 100, 107
    shape = (1, CLASSES, strips * height, width)
    # logits, gradient, and the copy of it that Triton keeps while it tunes
    need_gpu_memory(3 * 2 * math.prod(shape) + 2**31)
    strip = make_logits((1, CLASSES, height, width), torch.bfloat16).cuda()
    strip_target = make_target((1, height, width), CLASSES, dtype=torch.uint8).cuda()
    logits = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout)
    assert logits.numel() > 2**31
    for i in range(strips):
        logits[:, :, i * height : (i + 1) * height] = strip
    target = strip_target.repeat(1, strips, 1)

    def loss_and_gradient(logits, target):
        logits.requires_grad_()
        loss = importance_aware_loss(logits, target, CITYSCAPES, backend=backend, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, logits)

    expected_loss, expected = loss_and_gradient(strip, strip_target)
    loss, grad = loss_and_gradient(logits, target)
    torch.testing.assert_close(loss, strips * expected_loss, rtol=1e-5, atol=0)
    for i in range(strips):
        # The factors differ in their last digits, so a gradient may round to the next bfloat16.
        part = grad[:, :, i * height : (i + 1) * height]
        torch.testing.assert_close(part, expected, rtol=2**-7, atol=1e-6)


class OnePass(Step):
    """A step with one level, at full size or coarse. The loss is scaled by a number on the device."""

    def __init__(self, backend, upsample=None):
        super().__init__(backend)
        if upsample:
            height, width = SPATIAL
            self.target = torch.zeros((2, 4 * height, 4 * width), dtype=torch.int64, device="cuda")
        self.scale = torch.ones((), device="cuda")
        hierarchy = Hierarchy.flat(CLASSES)
        self.criterion = ImportanceAwareLoss(hierarchy, self.weight, backend=backend, upsample=upsample)

    def fill(self, logits, target, scale=1.0):
        size = self.target.shape[-1] // target.shape[-1]
        target = target.repeat_interleave(size, 1).repeat_interleave(size, 2)
        super().fill(logits, target)
        self.scale.fill_(scale)

    def __call__(self):
        loss = self.criterion(self.leaf * 1, self.target)
        (grad,) = torch.autograd.grad(loss * self.scale, self.leaf)
        return loss.detach(), grad


UPSAMPLE = pytest.mark.parametrize("upsample", [None, "bilinear"], ids=["full size", "coarse"])


@pytest.mark.parametrize("backend", GPU_KERNELS)
@UPSAMPLE
def test_one_pass_does_not_synchronise(backend, upsample):
    step = OnePass(backend, upsample)
    for scale in (1.0, 1024.0):
        step.fill(*values(0), scale)
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Last, since a capture that fails breaks the allocator of its process (torch before 2.12).
@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_graph_repeats_the_step_on_new_values(backend, inplace):
    step = Step(backend, inplace=inplace)
    step.fill(*values(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and loads what it needs
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    for seed in (4, 5):
        step.fill(*values(seed))
        graph.replay()
        expected = results(backend, seed, inplace=inplace)
        assert torch.equal(loss.cpu(), expected[0]) and torch.equal(grad.cpu(), expected[1])


@pytest.mark.parametrize("backend", GPU_KERNELS)
@UPSAMPLE
def test_a_graph_of_one_pass_decides_on_the_device(backend, upsample):
    """Each replay decides whether the incoming gradient is the expected one. Its values differ from those of
    the capture. A number that arrives twice in a row becomes the expected one."""
    step, fresh = OnePass(backend, upsample), OnePass(backend, upsample)
    step.fill(*values(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and loads what it needs
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    for seed, scale, expectation in (
        (4, 1.0, 1.0),
        (5, 0.4, 1.0),
        (6, 0.4, 0.4),
        (7, 0.4, 0.4),
        (8, 1.0, 0.4),
    ):
        step.fill(*values(seed), scale)
        graph.replay()
        fresh.fill(*values(seed), scale)
        expected = fresh()
        assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
        state = step.criterion.expected.on(step.leaf.device)
        assert state.float().tolist() == pytest.approx([expectation, scale])
