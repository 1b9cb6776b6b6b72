"""The memory of a large CPU gradient: kept from one step to the next, and never used by two tensors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import make_logits, make_target

import ial_cuda
from ial_cuda import CrossEntropyLoss, Hierarchy, backends, importance_aware_loss

resource = pytest.importorskip("resource", reason="page faults are counted on Unix only")
pytestmark = [
    pytest.mark.skipif(backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's own memory is taken"),
]

CLASSES, SIDE = 11, 512  # 11.5 MB in float32
HIERARCHY = Hierarchy([[0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10]])


def gradient(side=SIDE, dtype=torch.float32, seed=0):
    logits = make_logits((1, CLASSES, side, side), dtype, seed=seed).requires_grad_()
    loss = importance_aware_loss(logits, make_target((1, side, side), CLASSES), HIERARCHY, backend="cpu")
    return torch.autograd.grad(loss, logits)[0]


def resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmRSS:\s+(\d+) kB$", status, re.M)[1])


def test_the_next_gradient_has_the_memory_of_the_last():
    first = gradient()
    expected, place = first.clone(), first.data_ptr()
    first.fill_(float("nan"))
    del first
    second = gradient()
    assert second.data_ptr() == place
    assert torch.equal(second, expected)


def faults_of_gradients(count):
    """Page faults of consecutive gradients of 46 MB each: 22 huge pages, or 11264 small ones."""
    logits = make_logits((1, CLASSES, 1024, 1024), torch.float32)
    target = make_target((1, 1024, 1024), CLASSES)
    table = torch.ones(1, HIERARCHY.num_levels, 5, dtype=torch.float64)
    faults = []
    for _ in range(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ops.ial_cuda.reduce_backward(
            logits, table, target, None, None, HIERARCHY.class_levels, 255, "exact", 0.0, None
        )
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


def test_memory_that_is_kept_need_not_be_found_again():
    assert min(faults_of_gradients(4)[1:]) < 11


def test_a_process_that_is_forked():
    """Like a DataLoader worker: it shares no kept page and allocates its own gradients."""
    alive = gradient(seed=1)
    expected = alive.clone()
    faults_of_gradients(1)  # leaves memory for the next one
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        right = False
        try:  # the child must not continue the test run, whatever is raised
            os.close(writing)
            torch.set_num_threads(1)  # a fork has no OpenMP threads
            right = torch.equal(alive, expected) and torch.equal(gradient(seed=1), expected)
            os.read(reading, 1)  # until the parent is ready
        finally:
            os._exit(0 if right else 1)
    os.close(reading)
    (faults,) = faults_of_gradients(1)
    again = gradient(seed=1)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(again, expected)
    assert faults < 1000, "faults of the stack and the heap, which are shared"


def test_gradients_alive_at_once_have_memory_of_their_own():
    first, second = gradient(seed=1), gradient(seed=2)
    expected = first.clone()
    assert first.data_ptr() != second.data_ptr()
    second.fill_(float("nan"))
    assert torch.equal(first, expected)


@pytest.mark.parametrize(("dtype", "half"), [(torch.float64, 256), (torch.bfloat16, 512)], ids=str)
def test_smaller_gradients_fit_and_larger_ones_do_not(dtype, half):
    whole = 2 * half
    large = gradient(whole, dtype)
    place = large.data_ptr()
    del large
    small = gradient(half, dtype)
    assert small.data_ptr() == place
    expected = small.clone()
    large = gradient(whole, dtype)
    assert large.data_ptr() != place
    del large
    assert torch.equal(small, expected)
    del small  # it also uses the memory of a large one
    assert gradient(2 * whole, dtype).isfinite().all()


def test_no_more_than_the_largest_is_kept():
    gradient(1024)
    before = resident()
    for side in (256, 512, 1024) * 5:
        several = [gradient(side, seed=seed) for seed in range(3)]
        del several
    most = 4 * CLASSES * 1024**2
    # All pages may be new if the kept memory was released. A second gradient has at least 2.9 MB.
    assert resident() - before < most + 2**21


def test_layouts_and_resizing():
    """The gradient is an ordinary tensor: it has the strides of the logits, and its storage can grow."""
    logits = make_logits((2, CLASSES, 300, 200), torch.float32)
    for given in (logits.contiguous(memory_format=torch.channels_last), logits.transpose(2, 3)):
        leaf = given.clone().requires_grad_()
        loss = importance_aware_loss(leaf, make_target(leaf[:, 0].shape, CLASSES), HIERARCHY, backend="cpu")
        (grad,) = torch.autograd.grad(loss, leaf)
        assert grad.stride() == torch.empty_like(leaf).stride()
        shared = grad.clone().share_memory_()
        assert torch.equal(shared, grad)
    flat = grad.as_strided((grad.numel(),), (1,))
    expected = flat.clone()
    flat.resize_(4 * grad.numel())
    assert torch.equal(flat[: expected.numel()], expected)


def test_threads_at_once():
    """A thread may reuse memory that another one frees. Values do not change."""
    expected = [gradient(256, seed=seed) for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(10):
            if not torch.equal(gradient(256, seed=seed), expected[seed]):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_memory_that_there_is_not():
    """An out-of-memory error is raised, and the process is not killed."""
    logits = torch.zeros(1, 1, 1, 1).expand(1, 1 << 20, 1 << 20, 1 << 10)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for a gradient of 4503599627370496 bytes"):
        torch.ops.ial_cuda.reduce_backward(
            logits,
            torch.zeros(1, 1, 5, dtype=torch.float64),
            torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 1 << 20, 1 << 10),
            None,
            None,
            [0] * (1 << 20),
            255,
            "exact",
            0.0,
            None,
        )


def test_memory_that_is_kept_can_be_released():
    del_me = gradient()
    size = del_me.nbytes
    del del_me
    assert ial_cuda.release_gradient_memory() >= size
    assert ial_cuda.release_gradient_memory() == 0


def test_keeping_memory_can_be_switched_off():
    gradient()
    assert ial_cuda.keep_gradient_memory(False) is True
    try:
        assert ial_cuda.release_gradient_memory() == 0, "what was kept is released"
        gradient()
        assert ial_cuda.release_gradient_memory() == 0, "nothing is kept"
    finally:
        assert ial_cuda.keep_gradient_memory(True) is False
    gradient()
    assert ial_cuda.release_gradient_memory() > 0
    with pytest.raises(TypeError, match=r"enabled is 1 \(int\), expected a bool"):
        ial_cuda.keep_gradient_memory(1)


CHILD = """
import torch, resource, ial_cuda
logits = torch.zeros(1, 11, 512, 512, requires_grad=True)
labels = torch.zeros(1, 512, 512, dtype=torch.uint8)
loss = ial_cuda.importance_aware_loss(logits, labels, ial_cuda.Hierarchy.flat(11), backend="cpu")
if LIMIT:
    resource.setrlimit(getattr(resource, LIMIT), (2**40, resource.RLIM_INFINITY))
loss.backward()
del loss
logits.grad = None
print(ial_cuda.release_gradient_memory() > 0)
"""


@pytest.mark.parametrize(
    "limit, keep, expected",
    [
        (None, None, "True"),
        (None, "1", "True"),
        (None, "0", "False"),
        ("RLIMIT_AS", None, "False"),
        ("RLIMIT_DATA", None, "False"),
    ],
)
def test_nothing_is_kept_where_addresses_are_limited_or_the_environment_says_so(limit, keep, expected):
    environment = {key: value for key, value in os.environ.items() if key != "IAL_CUDA_KEEP_GRADIENT"}
    if keep:
        environment["IAL_CUDA_KEEP_GRADIENT"] = keep
    code = CHILD.replace("LIMIT:", f"{limit!r}:").replace("LIMIT)", f"{limit!r})")
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == expected


# ---- the peak of a training step ------------------------------------------------------------------------


class Head(torch.autograd.Function):
    """Full-size logits from one parameter: a layer that needs no other memory of their size."""

    @staticmethod
    def forward(ctx, parameter):
        return parameter.expand(1, CLASSES, 256, 256).clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.sum()


def peak_of_step(criterion, heads, at_once):
    """The peak of allocated bytes in forward and backward pass, in units of one head's logits.

    at_once: whether all heads are computed before the first loss, as in a network. Otherwise the logits of
    a head are freed after its loss is computed.
    """
    parameters = [torch.zeros((), requires_grad=True) for _ in range(heads)]
    target = make_target((1, 256, 256), CLASSES, ignore_index=-100)

    def step():
        outputs = (Head.apply(parameter) for parameter in parameters)
        outputs = list(outputs) if at_once else outputs
        sum(criterion(logits, target) for logits in outputs).backward()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (4 * CLASSES * 256 * 256)


#: For one head and for three, at once and one after another.
PEAKS = {
    "F.cross_entropy": (
        torch.nn.CrossEntropyLoss(),
        {(1, True): 4, (1, False): 3, (3, True): 8, (3, False): 5},
    ),
    "in forward": (
        CrossEntropyLoss(backend="cpu"),
        {(1, True): 2, (1, False): 2, (3, True): 6, (3, False): 6},
    ),
    "in backward": (
        CrossEntropyLoss(backend="cpu", grad_in_forward=False),
        {(1, True): 2, (1, False): 2, (3, True): 6, (3, False): 4},
    ),
    "in place": (
        CrossEntropyLoss(backend="cpu", inplace=True),
        {(1, True): 1, (1, False): 1, (3, True): 3, (3, False): 3},
    ),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_training_step(name):
    """The logits, and: for us a gradient, one per head if the forward pass computes it; for PyTorch the
    log-softmax of each head and, one head at a time, two tensors of its backward pass."""
    criterion, expected = PEAKS[name]
    found = {case: peak_of_step(criterion, *case) for case in expected}
    # Sums, and the data that PyTorch stores per pixel, are under a tenth of the logits.
    assert all(expected[case] <= peak < expected[case] + 0.1 for case, peak in found.items()), found
