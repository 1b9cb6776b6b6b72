"""Losses that are split over processes, compared with those of one process. torchrun starts this file.

    torchrun --nproc-per-node 4 tests/distributed_cases.py CASE.BACKEND ...

Every process knows the whole input and computes the whole loss without a group, too.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import EMULATED, device_of, make_logits, make_target
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import ial_cuda
from ial_cuda import Hierarchy, calls

TIMEOUT = timedelta(minutes=5)  # of every collective: an error instead of a hanging test
LEVELS = {"four": Hierarchy([[3], [0, 4], [1], [2]]), "one": Hierarchy.flat(5)}
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.25], dtype=torch.float64)
SIZE = (6, 7)
# float64: the sums of all ranks are added in another order than in one process.
CLOSE = dict(rtol=1e-12, atol=1e-12)

#: By number of ranks: the images of each rank. One has only void (the first), some have none.
IMAGES = {1: [5], 2: [1, 4], 3: [1, 0, 4], 4: [1, 2, 0, 2]}
#: By number of ranks: the rows, or columns, of each rank.
ROWS = {1: [6], 2: [5, 1], 3: [2, 4, 0], 4: [1, 0, 3, 2]}
COLUMNS = {1: [7], 2: [2, 5], 3: [0, 1, 6], 4: [3, 1, 2, 1]}


def make_input(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target and pixel weights of five images."""
    target = make_target((5, *SIZE), 5)
    target[0] = 255
    pixel_weight = 0.5 + make_logits((5, *SIZE), seed=1).abs()
    return make_logits((5, 5, *SIZE), dtype).to(device), target.to(device), pixel_weight.to(device)


def loss_of(
    part: Callable[[Tensor, int], Tensor], device: str, options: dict, backend: str, upstream: Tensor | float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Loss, gradient and components of a part of the input.

    ``part`` takes a tensor and its first spatial dimension.
    """
    logits, target, pixel_weight = make_input(device)
    leaf = part(logits, 2).clone().requires_grad_()
    loss, components = ial_cuda.importance_aware_loss(
        leaf,
        part(target, 1),
        weight=WEIGHT.to(device),
        pixel_weight=part(pixel_weight, 1),
        backend=backend,
        return_components=True,
        **options,
    )
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), leaf)
    return loss.detach(), gradient, tuple(components)


def whole(tensor: Tensor, _: int) -> Tensor:
    return tensor


def assert_same(found: Sequence, expected: Sequence, case: object) -> None:
    """Compares results of `loss_of`."""
    for name, ours, theirs in zip(("loss", "gradient", "components"), found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=f"{name}, {case}")


def images_of(group: dist.ProcessGroup) -> slice:
    """This rank's images."""
    rank, numbers = group.rank(), IMAGES[group.size()]
    return slice(sum(numbers[:rank]), sum(numbers[: rank + 1]))


def option_sets(backend: str = "cpu") -> Iterator[dict]:
    """Options of importance_aware_loss. An emulated backend gets few, since each takes seconds."""
    if backend in EMULATED:
        yield dict(hierarchy=LEVELS["four"])
        yield dict(hierarchy=LEVELS["four"], reduction="none", factor_scope="batch")
        return
    for levels, reduction, scope in itertools.product(
        LEVELS.values(), ("mean", "sum", "none"), ("image", "batch")
    ):
        yield dict(hierarchy=levels, reduction=reduction, factor_scope=scope)
    yield dict(hierarchy=LEVELS["four"], factor_normalization="sum", lambdas=(0.2, 0.0, 1.5), alpha=0.3)
    yield dict(hierarchy=LEVELS["four"], gradient="paper", label_smoothing=0.1, factor_scope="batch")
    yield dict(hierarchy=LEVELS["four"], divisor=3.5)
    yield dict(hierarchy=LEVELS["four"], divisor=3.5, factor_scope="batch")
    yield dict(hierarchy=LEVELS["one"], divisor=0.0)


def check_images(group: dist.ProcessGroup, device: str, backend: str) -> None:
    """The images are split unevenly. Each rank multiplies its loss by another number."""
    rank, world = group.rank(), group.size()
    own = images_of(group)
    for options in option_sets(backend):
        # What reaches the gradient is the sum over ranks, 1 + 2 + ..., of one replicated loss. With "none"
        # each image's loss is on one rank.
        upstream, total = torch.tensor(rank + 1.0, device=device), world * (world + 1) / 2
        if options.get("reduction") == "none":
            total = torch.arange(1.0, 6.0, device=device)
            upstream = total[own]
        split = options | dict(process_group=group)
        found = loss_of(lambda x, _: x[own], device, split, backend, upstream)
        loss, gradient, parts = loss_of(whole, device, options, backend, total)
        if options.get("reduction") == "none":
            loss = loss[own]
        parts = tuple(part if part.shape[0] == 1 else part[own] for part in parts)
        assert_same(found, (loss, gradient[own], parts), options)


def check_pixels(group: dist.ProcessGroup, device: str, backend: str) -> None:
    """The pixels are split: unequal slabs of rows or of columns, or any pixels."""
    rank, world = group.rank(), group.size()

    def rows(tensor: Tensor, dim: int) -> Tensor:
        return tensor.split(ROWS[world], dim)[rank]

    def columns(tensor: Tensor, dim: int) -> Tensor:
        return tensor.split(COLUMNS[world], dim + 1)[rank]

    def scattered(tensor: Tensor, dim: int) -> Tensor:
        order = torch.randperm(42, generator=torch.Generator().manual_seed(0))
        mine = order.split([n * SIZE[1] for n in ROWS[world]])[rank]
        return tensor.flatten(dim).index_select(dim, mine.to(tensor.device))

    every = itertools.cycle((rows, columns, scattered))
    for part, options in zip(every, option_sets(backend), strict=False):
        upstream, total = torch.tensor(rank + 1.0, device=device), world * (world + 1) / 2
        if options.get("reduction") == "none":
            upstream = torch.arange(1.0, 6.0, device=device) * (rank + 1)
            total = torch.arange(1.0, 6.0, device=device) * total
        split = options | dict(spatial_group=group)
        loss, gradient, parts = loss_of(whole, device, options, backend, total)
        found = loss_of(part, device, split, backend, upstream)
        assert_same(found, (loss, part(gradient, 2), parts), options)


def check_both(device: str, backend: str) -> None:
    """A 2x2 mesh: images over its first dimension, rows over its second."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("images", "rows"))
    image, row = mesh.get_coordinate()
    images = slice(0, 3) if image == 0 else slice(3, 5)

    def part(tensor: Tensor, dim: int) -> Tensor:
        return tensor[images].split([2, 4], dim)[row]

    for options in option_sets(backend):
        upstream = torch.tensor(dist.get_rank() + 1.0, device=device)
        total = torch.tensor(10.0, device=device)
        if options.get("reduction") == "none":
            upstream = torch.arange(1.0, 6.0, device=device)[images] * (row + 1)
            total = torch.arange(1.0, 6.0, device=device) * 3
        groups = dict(process_group=mesh["images"], spatial_group=mesh["rows"].get_group())
        loss, gradient, parts = loss_of(whole, device, options, backend, total)
        if options.get("reduction") == "none":
            loss = loss[images]
        parts = tuple(x if x.shape[0] == 1 else x[images] for x in parts)
        found = loss_of(part, device, options | groups, backend, upstream)
        assert_same(found, (loss, part(gradient, 2), parts), options)


#: Placements of the logits, by the shape of the mesh.
PLACEMENTS = {
    (4,): [[Shard(0)], [Shard(2)], [Shard(-1)], [Replicate()]],
    (2, 2): [
        [Shard(0), Shard(2)],
        [Shard(3), Shard(2)],
        [Shard(0), Shard(0)],
        [Replicate(), Shard(2)],
        [Shard(0), Replicate()],
    ],
}


def of_target(placements: list, *, rank: int = 3) -> list:
    """The placements of a tensor without the dimension of the classes."""
    dims = [p.dim % (rank + 1) if isinstance(p, Shard) else None for p in placements]
    return [Replicate() if d is None else Shard(max(d - 1, 0)) for d in dims]


def check_dtensors(backend: str) -> None:
    device = device_of(backend)
    for shape, every in PLACEMENTS.items():
        mesh = init_device_mesh(device, shape)
        logits, target, pixel_weight = make_input(device)
        # Each placement with a third of the options, in turn: DTensor takes a millisecond for each operation.
        cases = [
            (placements, options)
            for n, placements in enumerate(every)
            for options in itertools.islice(option_sets(), n % 3, None, 3)
        ]
        for placements, options in cases:
            # Targets of other placements are redistributed.
            labels = distribute_tensor(target, mesh, of_target(placements))
            weights = distribute_tensor(pixel_weight, mesh, [Replicate()] * len(shape))
            leaf = distribute_tensor(logits, mesh, placements).requires_grad_()
            loss, parts = ial_cuda.importance_aware_loss(
                leaf,
                labels,
                weight=WEIGHT.to(device),
                pixel_weight=weights,
                backend=backend,
                return_components=True,
                **options,
            )
            upstream = torch.tensor(3.0, device=device)
            if none := options.get("reduction") == "none":
                upstream = torch.arange(1.0, 6.0, device=device)
            expected = loss_of(whole, device, options, backend, upstream)
            scaled = (loss * distribute_tensor(upstream, mesh, loss.placements)).sum()
            # Not backward: torch 2.11 accumulates the gradient of uneven shards as replicas.
            (gradient,) = torch.autograd.grad(scaled, leaf)
            case = f"{placements}, {options}"
            images = [p if p == Shard(0) else Replicate() for p in placements]
            assert list(loss.placements) == (images if none else [Replicate()] * len(shape)), case
            assert gradient.placements == leaf.placements, case
            found = (loss, gradient, *parts)
            loss, gradient, *parts = (result.full_tensor() for result in found)
            assert_same((loss, gradient, tuple(parts)), expected, case)


def check_split(backend: str) -> None:
    """Four processes and a mesh of 2x2; on the CPU also one, two and three."""
    device = device_of(backend)
    for world in (1, 2, 3, 4) if backend == "cpu" else (4,):
        group = dist.new_group(range(world))
        if dist.get_rank() < world:
            check_images(group, device, backend)
            check_pixels(group, device, backend)
    check_both(device, backend)


def check_nccl(backend: str) -> None:
    """One process, one GPU."""
    check_images(dist.group.WORLD, "cuda", backend)
    check_pixels(dist.group.WORLD, "cuda", backend)


# ---- other arguments, and results that must be the same bits --------------------------------------------


def check_arguments(backend: str) -> None:
    """Modules, cross_entropy, dtypes, layouts and mesh dimensions; images split over two of four ranks."""
    device = device_of(backend)
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("images", "rows"))
    group, rank = mesh["images"].get_group(), mesh.get_coordinate()[0]
    own = slice(0, 2) if rank == 0 else slice(2, 5)
    for dtype, tolerance in (
        (torch.float64, CLOSE),
        (torch.float32, dict(rtol=1e-5, atol=1e-6)),  # float32 sums of other groups of pixels
        (torch.bfloat16, dict(rtol=1e-2, atol=1e-3)),  # a gradient rounded to bfloat16, twice: 2^-8
    ):
        logits, target, _ = make_input(device, dtype)
        for criterion in (
            ial_cuda.CrossEntropyLoss(WEIGHT, 255, label_smoothing=0.1),
            ial_cuda.CrossEntropyLoss(ignore_index=255, upsample="bilinear"),
            ial_cuda.CrossEntropyLoss(ignore_index=255, reduction="none"),
            ial_cuda.ImportanceAwareLoss(LEVELS["four"], inplace=True, factor_scope="batch"),
        ):
            criterion.to(device)
            whole_leaf, leaf = (
                x.detach().clone().to(memory_format=torch.channels_last).requires_grad_()
                for x in (logits, logits[own])
            )
            labels = target
            if criterion.upsample:
                labels = target.repeat_interleave(2, 1).repeat_interleave(3, 2)
            expected = criterion(whole_leaf * 1, labels)
            expected.sum().backward()
            for given in (group, mesh["images"]):
                criterion.process_group = given
                leaf.grad = None
                loss = copy.deepcopy(criterion)(leaf * 1, labels[own])
                loss.sum().backward()
                criterion.process_group = None
                none = criterion.reduction == "none"
                torch.testing.assert_close(loss, expected[own] if none else expected, **tolerance)
                ours = leaf.grad if none else leaf.grad / 2
                torch.testing.assert_close(ours, whole_leaf.grad[own], **tolerance)

    # A float32 loss in float32, too: the ranks' decisions that depend on it must not differ.
    logits, target, _ = make_input(device, torch.float32)
    for options in option_sets():
        if options.get("reduction") != "none":
            loss = ial_cuda.importance_aware_loss(logits[own], target[own], process_group=group, **options)
            losses = [None] * 2
            dist.all_gather_object(losses, loss.item(), group)
            assert losses[0] == losses[1], options

    # Rows (M, C), and one image of cross_entropy.
    rows, labels, _ = make_input(device)
    rows, labels = rows[:, :, 0, 0], labels[:, 0, 0]
    expected = F.cross_entropy(rows, labels, ignore_index=255)
    loss = ial_cuda.cross_entropy(rows[own], labels[own], ignore_index=255, process_group=group)
    torch.testing.assert_close(loss, expected, **CLOSE)
    cached = calls._cached_of_classes.cache_info()
    ial_cuda.cross_entropy(rows[own], labels[own], ignore_index=255, process_group=group)
    assert calls._cached_of_classes.cache_info() == cached, "a cache would keep the group alive"
    image, label = make_input(device)[0][1], make_input(device)[1][1]
    expected = F.cross_entropy(image[None], label[None], ignore_index=255)
    slab = slice(0, 5) if rank == 0 else slice(5, 6)
    options = dict(ignore_index=255, spatial_group=group)
    loss = ial_cuda.cross_entropy(image[None, :, slab], label[None, slab], **options)
    torch.testing.assert_close(loss, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"input has shape \(5, 6, 7\), expected \(N, C, \*spatial\) with"):
        ial_cuda.cross_entropy(image, label, **options)
    shards = [distribute_tensor(x, mesh["images"], [Shard(d)]) for x, d in ((image, 1), (label, 0))]
    loss = ial_cuda.cross_entropy(*shards, ignore_index=255)
    torch.testing.assert_close(loss.full_tensor(), expected, **CLOSE)


def check_groups(backend: str) -> None:
    """What is no group of this process, or no dimension of a mesh, is an error."""
    logits, target, _ = make_input(device_of(backend))
    world, outside = dist.group.WORLD, (dist.get_rank() + 1) % dist.get_world_size()
    alone = [DeviceMesh("cpu", [rank], mesh_dim_names=("one",)) for rank in range(dist.get_world_size())]

    def check(message: str, **groups: object) -> None:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            ial_cuda.importance_aware_loss(logits, target, LEVELS["four"], backend=backend, **groups)

    names = ("images", "rows")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    message = (
        f"a DeviceMesh with 2 dimensions {names}, expected one: pass one of its dimensions, such as mesh"
    )
    check(f"process_group is {message}['images']", process_group=mesh)
    message = (
        "is a DeviceMesh with 2 dimensions, expected one: pass one of its dimensions, such as mesh['NAME']"
    )
    check(f"spatial_group {message}", spatial_group=init_device_mesh("cpu", (2, 2)))
    message = "is a group without this process, expected one of its own groups"
    check(f"spatial_group {message}", spatial_group=alone[outside])
    check(f"process_group {message}", process_group=dist.GroupMember.NON_GROUP_MEMBER)
    message = "process_group and spatial_group share the ranks"
    check(f"{message} [0, 1, 2, 3], expected this process alone", process_group=world, spatial_group=world)
    ial_cuda.importance_aware_loss(
        logits,
        target,
        LEVELS["four"],
        backend=backend,
        process_group=alone[dist.get_rank()],
        spatial_group=world,
    )
    message = "spatial_group is given, expected None: with upsample='bilinear'"
    check(message, spatial_group=world, upsample="bilinear")


def check_dtensor_arguments(backend: str) -> None:
    """cross_entropy and pixel_nll of DTensors, coarse ones, results of layers, and bad arguments."""
    device = device_of(backend)
    mesh = init_device_mesh(device, (4,))
    logits, target, _ = make_input(device)

    def shards(dim: int, target: Tensor = target) -> tuple[DTensor, DTensor]:
        return (
            distribute_tensor(logits, mesh, [Shard(dim)]).requires_grad_(),
            distribute_tensor(target, mesh, [Shard(max(dim - 1, 0))]),
        )

    def check(function: Callable[..., Tensor], leaf: DTensor, labels: DTensor, **options: object) -> None:
        whole_leaf = logits.clone().requires_grad_()
        expected = function(whole_leaf, labels.full_tensor(), **options)
        result = function(leaf, labels, **options)
        torch.testing.assert_close(result.full_tensor(), expected, **CLOSE)
        result.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), whole_leaf.grad, **CLOSE)

    for dim in (0, 2, 3):
        for reduction in ("mean", "none"):
            check(ial_cuda.cross_entropy, *shards(dim), ignore_index=255, reduction=reduction)
        check(ial_cuda.pixel_nll, *shards(dim), ignore_index=255)
    check(
        ial_cuda.cross_entropy,
        *shards(0, target.repeat_interleave(2, 1).repeat_interleave(3, 2)),
        ignore_index=255,
        upsample="bilinear",
    )
    # A shard may be a leaf's memory and is not overwritten.
    leaf, labels = shards(0)
    ial_cuda.importance_aware_loss(leaf, labels, LEVELS["four"], inplace=True, backend=backend).backward()
    assert torch.equal(leaf.full_tensor(), logits)
    # A count of pixels is a partial sum of each rank.
    expected = F.cross_entropy(logits, target, ignore_index=255)
    leaf, labels = shards(2)
    loss = ial_cuda.cross_entropy(leaf, labels, ignore_index=255, divisor=(labels != 255).sum())
    torch.testing.assert_close(loss.full_tensor(), expected, **CLOSE)
    # The result of a redistribution may still be on its way when the loss is called.
    leaf, labels = shards(0)
    check(
        lambda x, y: ial_cuda.cross_entropy(
            x.redistribute(mesh, [Shard(2)]) if isinstance(x, DTensor) else x, y, ignore_index=255
        ),
        leaf,
        labels,
    )

    def error_of(
        *args: object, function: Callable[..., Tensor] = ial_cuda.cross_entropy, **kw: object
    ) -> str:
        try:
            function(*args, ignore_index=255, **kw)
        except (TypeError, ValueError) as error:
            return str(error)
        raise AssertionError("no error")

    leaf, labels = shards(2)
    split_classes = distribute_tensor(logits, mesh, [Shard(1)])
    assert "input has placements (Shard(dim=1),), expected all classes of a pixel on one rank" in error_of(
        split_classes, labels
    )
    # One image, whose classes are its first dimension.
    image = distribute_tensor(logits[1], mesh, [Shard(0)])
    label = distribute_tensor(target[1], mesh, [Replicate()])
    assert "input has placements (Shard(dim=1),), expected all classes" in error_of(image, label)
    assert "divisor is a DTensor, expected a plain tensor or a number like input" in error_of(
        logits, target, divisor=distribute_tensor(torch.tensor(3.0, device=device), mesh, [Replicate()])
    )
    assert "expected whole images with upsample" in error_of(leaf, labels, upsample="bilinear")
    partial = DTensor.from_local(logits, mesh, [Partial()])
    assert "expected Replicate(), Shard(0) or Shard(d)" in error_of(partial, labels)
    strided = DTensor.from_local(logits, mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    assert "expected Replicate(), Shard(0) or Shard(d)" in error_of(strided, labels)
    assert "target is a plain tensor, expected a DTensor like input" in error_of(leaf, target)
    assert "target is a DTensor, expected a plain tensor like input" in error_of(logits, labels)
    other = distribute_tensor(target, init_device_mesh(device, (2, 2)), [Shard(0), Shard(1)])
    assert "target is on DeviceMesh" in error_of(leaf, other)
    assert "process_group or spatial_group is given, expected None" in error_of(
        leaf, labels, process_group=dist.group.WORLD
    )
    assert "target has shape (5, 5, 7), expected (N, *spatial) = (5, 6, 7)" in error_of(leaf, labels[:, 1:])
    for function in (ial_cuda.level_statistics, ial_cuda.focal_loss, ial_cuda.ohem_cross_entropy):
        more = dict(hierarchy=5) if function is ial_cuda.level_statistics else {}
        assert "logits is a DTensor, expected a plain tensor" in error_of(
            leaf, labels, function=function, **more
        )


def check_derivatives(backend: str) -> None:
    """Gradients of the gradient, two backward passes, and transforms equal those of one process."""
    world, mesh = dist.get_world_size(), init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target, _ = make_input("cpu")
    direction = make_logits(logits.shape, seed=2)
    group = dist.group.WORLD
    own = images_of(group)

    def second(leaf: Tensor, along: Tensor, labels: Tensor, **options: object) -> Tensor:
        leaf = leaf.detach().requires_grad_()
        loss = ial_cuda.importance_aware_loss(leaf, labels, LEVELS["four"], backend="reference", **options)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad((gradient * along).sum(), leaf)[0]

    def gradient(leaf: Tensor, labels: Tensor, **options: object) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return ial_cuda.importance_aware_loss(x, labels, LEVELS["four"], backend=backend, **options)

        return torch.vmap(torch.func.grad(loss))(torch.stack([leaf, 2 * leaf]))

    for scope in ("image", "batch"):
        expected = second(logits, direction, target, factor_scope=scope)
        options = dict(factor_scope=scope, process_group=group)
        ours = second(logits[own], direction[own], target[own], **options)
        torch.testing.assert_close(ours / world, expected[own], **CLOSE)
        # torch 2.11 has no second derivative of to_local(), and raises.
        for dim in (0, 2) if torch.__version__ >= (2, 14) else ():
            x, v, y = (
                distribute_tensor(tensor, mesh, [Shard(d)])
                for tensor, d in ((logits, dim), (direction, dim), (target, max(dim - 1, 0)))
            )
            ours = second(x, v, y, factor_scope=scope).full_tensor()
            torch.testing.assert_close(ours, expected, **CLOSE)
        expected = gradient(logits, target, factor_scope=scope)[:, own]
        ours = gradient(logits[own], target[own], **options)
        torch.testing.assert_close(ours / world, expected, **CLOSE)
    criterion = ial_cuda.ImportanceAwareLoss(LEVELS["four"], process_group=group)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace of a loss over processes"):
        torch.jit.trace(criterion, (logits[own], target[own]))


# ---- torch.compile, the wire, and training ---------------------------------------------------------------


def check_compiled(backend: str) -> None:
    """fullgraph=True equals eager mode. The second of two ranks has most images."""
    device = device_of(backend)
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("images",))
    group, rank = mesh.get_group(), mesh.get_rank()
    logits, target, _ = make_input(device)
    images, rows = (slice(0, 2), slice(2, 5))[rank], (slice(0, 4), slice(4, 6))[rank]
    levels = LEVELS["four"]

    def check(
        criterion: Callable[..., Tensor],
        leaf: Tensor,
        labels: Tensor,
        compiler: str,
        dynamic: bool | None = None,
    ) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(criterion, fullgraph=True, backend=compiler, dynamic=dynamic)
        results = []
        for function in (criterion, compiled):
            leaf = leaf.detach().requires_grad_()
            loss = function(leaf, labels)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert gradient.abs().sum() > 0
            results.append([getattr(x, "to_local", lambda x=x: x)() for x in (loss, gradient)])
        # The same operators run on the same sums. Inductor may round the few operations between differently.
        torch.testing.assert_close(*results, **CLOSE)

    for compiler, options in (
        ("aot_eager", dict(process_group=group)),
        ("aot_eager", dict(process_group=mesh["images"], factor_scope="batch")),
        ("aot_eager", dict(process_group=mesh, factor_scope="batch", reduction="none")),
    ):
        criterion = ial_cuda.ImportanceAwareLoss(levels, WEIGHT, **options).to(device)
        check(criterion, logits[images], target[images], compiler)
    check(
        lambda x, y: ial_cuda.importance_aware_loss(x, y, levels, spatial_group=group),
        logits[:, :, rows],
        target[:, rows],
        "aot_eager",
    )
    criterion = ial_cuda.CrossEntropyLoss(ignore_index=255, process_group=group)
    check(criterion, logits[images], target[images], "inductor")
    for dim, reduction in itertools.product((0, 2), ("mean", "none")):
        pairs = ((logits, dim), (target, max(dim - 1, 0)))
        shards = [distribute_tensor(x, mesh, [Shard(d)]) for x, d in pairs]
        criterion = ial_cuda.ImportanceAwareLoss(levels, reduction=reduction)
        if dim == 0:
            criterion = ial_cuda.CrossEntropyLoss(ignore_index=255, reduction=reduction)
        check(criterion, *shards, "aot_eager", dynamic=(dim, reduction) == (2, "mean") or None)


class Wire(TorchDispatchMode):
    """The bytes of each collective."""

    LOCAL = (  # they wait for a collective or wrap its result
        torch.ops._c10d_functional.wait_tensor.default,
        getattr(torch.ops._c10d_functional, "_wrap_tensor_autograd", torch.ops.aten.detach).default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace and function not in self.LOCAL:
            self.sent.append(args[0].nbytes)
        return function(*args, **kwargs or {})


def check_wire(backend: str) -> None:
    """One collective of a few numbers in each direction, whatever the size of the images."""
    group, g, number = dist.group.WORLD, 4, 8
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for side in (8, 64):
        logits = torch.randn(3, 5, side, side, requires_grad=True)
        target = make_target((3, side, side), 5)

        def sent(x: Tensor = logits, y: Tensor = target, **options: object) -> tuple[list[int], list[int]]:
            with Wire() as forward:
                loss = ial_cuda.importance_aware_loss(x, y, LEVELS["four"], **options).sum()
            with Wire() as backward:
                torch.autograd.grad(loss, x)
            return forward.sent, backward.sent

        images, pixels = dict(process_group=group), dict(spatial_group=group)
        for reduction in ("mean", "sum"):
            assert sent(**images, reduction=reduction) == ([5 * number],) * 2
            assert sent(**images, reduction=reduction, factor_scope="batch") == ([g * 5 * number],) * 2
        assert sent(**images, reduction="none") == ([], [])
        assert sent(**images, reduction="none", factor_scope="batch") == ([g * 5 * number],) * 2
        for reduction, scope in itertools.product(("mean", "sum", "none"), ("image", "batch")):
            assert sent(**pixels, reduction=reduction, factor_scope=scope) == ([3 * g * 5 * number],) * 2
        # The gradient of one DTensor loss needs no collective.
        leaf = DTensor.from_local(logits.detach(), mesh, [Shard(2)]).requires_grad_()
        labels = DTensor.from_local(target, mesh, [Shard(1)])
        assert sent(leaf, labels) == ([3 * g * 5 * number], [])


def check_training(backend: str) -> None:
    """Three SGD steps under DDP and FSDP2 equal those of one process. With F.cross_entropy they do not."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 3, *SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (3, 4, *SIZE), generator=generator)
    labels[:, 0, 1:] = labels[:, 1, :5] = 255  # rank 0 has little that is valid
    own = (slice(0, 2), slice(2, 4))[rank]

    def trained(loss: Callable[..., Tensor], part: slice, wrap: Callable = lambda network: network) -> list:
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)
        ).double()
        wrapped = wrap(network)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
        for batch, label in zip(images, labels, strict=True):
            optimizer.zero_grad()
            loss(wrapped(batch[part]), label[part]).backward()
            optimizer.step()
        return [p.full_tensor() if isinstance(p, DTensor) else p for p in network.parameters()]

    mesh = init_device_mesh("cpu", (world,))
    wrappers = (torch.nn.parallel.DistributedDataParallel, lambda network: fully_shard(network, mesh=mesh))
    criteria = [
        ial_cuda.ImportanceAwareLoss(LEVELS["four"]),
        ial_cuda.ImportanceAwareLoss(LEVELS["four"], WEIGHT, factor_scope="batch"),
        ial_cuda.CrossEntropyLoss(WEIGHT, 255),
    ]
    for criterion, wrap in itertools.product(criteria, wrappers):
        expected = trained(criterion, slice(None))
        criterion.process_group = dist.group.WORLD
        for ours, theirs in zip(trained(criterion, own, wrap), expected, strict=True):
            # Three steps of float64 in another order; parameters are of size 1.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        criterion.process_group = None

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, ignore_index=255)

    for wrap in wrappers:
        pairs = zip(trained(plain, own, wrap), trained(plain, slice(None)), strict=True)
        assert max((ours - theirs).abs().max() for ours, theirs in pairs) > 0.01


# ---- what goes wrong -------------------------------------------------------------------------------------


def check_mismatches(backend: str) -> None:
    """With IAL_CUDA_DEBUG=1 all ranks raise the error that names what differs, and the group still works."""
    os.environ["IAL_CUDA_DEBUG"] = "1"
    group, rank = dist.group.WORLD, dist.get_rank()
    logits, target, _ = make_input("cpu")
    logits.requires_grad_()
    same = dict(hierarchy=LEVELS["four"], process_group=group)
    check = partial(ial_cuda.importance_aware_loss, logits, target)
    three = Hierarchy([[3], [0, 4], [1, 2]])
    for ours, theirs, message in (
        (
            same,
            same | dict(alpha=0.5),
            "process_group: alpha is 0.5 on rank 1 of the group and 1.0 on rank 0",
        ),
        (
            same,
            same | dict(reduction="sum"),
            "reduction is 'sum' on rank 1 of the group and 'mean' on rank 0",
        ),
        (
            same,
            same | dict(hierarchy=three),
            "class_levels is (1, 2, 2, 0, 1) on rank 1 of the group and (1, 2, 3",
        ),
        (same, same | dict(divisor=2), "divisor is 2.0 on rank 1 of the group and None on rank 0"),
        (
            same,
            same | dict(weight=[1.0] * 5),
            "weight is [1.0, 1.0, 1.0, 1.0, 1.0] on rank 1 of the group and None",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message) + r".*, expected the same on all ranks"):
            check(**(ours, theirs)[rank])
    with (
        torch.set_grad_enabled(rank == 0),
        pytest.raises(ValueError, match="whether a gradient is computed is False on rank 1"),
    ):
        check(**same)
    images = slice(0, 5 - rank)
    with pytest.raises(
        ValueError, match="spatial_group: the number of images is 4 on rank 1 of the group and 5"
    ):
        ial_cuda.importance_aware_loss(logits[images], target[images], LEVELS["four"], spatial_group=group)
    check(**same).backward()
    # What concerns one process alone may differ.
    check(**same, backend=("cpu", "reference")[rank], lambdas=(0.5, (0.5,) * 3)[rank]).backward()
    result = check(**same, return_components=rank == 0)
    (result[0] if rank == 0 else result).backward()


def check_killed(backend: str) -> None:
    """Rank 1 is killed. Rank 0 gets an error of the process group before its timeout."""
    logits, target, _ = make_input("cpu")
    check = partial(ial_cuda.importance_aware_loss, logits, target, LEVELS["four"])
    check(process_group=dist.group.WORLD)
    sys.stdout.flush()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the other ranks
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection closed|connection reset|broken pipe"):
        check(process_group=dist.group.WORLD)
    assert time.monotonic() - start < TIMEOUT.total_seconds()
    print("rank 0 got the error", flush=True)
    os._exit(0)  # the group cannot be destroyed in order


CASES = dict(
    split=check_split,
    nccl=check_nccl,
    dtensors=check_dtensors,
    arguments=check_arguments,
    groups=check_groups,
    dtensor_arguments=check_dtensor_arguments,
    derivatives=check_derivatives,
    compiled=check_compiled,
    wire=check_wire,
    training=check_training,
    mismatches=check_mismatches,
    killed=check_killed,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [argument.split(".") for argument in sys.argv[1:]]
    dist.init_process_group("nccl" if cases[0][0] == "nccl" else "gloo", timeout=TIMEOUT)
    for name, backend in cases:
        CASES[name](backend)
    dist.destroy_process_group()
