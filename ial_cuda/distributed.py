"""Losses of images, or of pixels of an image, that are split over processes.

The kernels of each process compute five sums for each image and level. Here the sums of all processes are
added, and combine computes the loss from them. Only the sums cross the network, whatever the image size. All
processes get the same sums, and so the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: What ``process_group`` and ``spatial_group`` accept.
Group: TypeAlias = "ProcessGroup | DeviceMesh"

#: combine of a backend: stats (N, g, 5), divisor, lambdas, alpha, reduction, factor_normalization,
#: factor_scope, dtype -> the loss and the factors f_t.
CombineOperator: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def as_group(group: object, argument: str) -> ProcessGroup:
    """The process group, or that of a one-dimensional DeviceMesh, of which this process is a member."""
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh):
            names = group.mesh_dim_names
            if group.ndim != 1:
                some = names[0] if names else "NAME"
                raise ValueError(
                    f"{argument} is a DeviceMesh with {group.ndim} dimensions{f' {names}' if names else ''}, "
                    f"expected one: pass one of its dimensions, such as mesh[{some!r}]"
                )
            # A mesh has no group on a process outside it.
            group = group.get_group() if group.get_coordinate() else dist.GroupMember.NON_GROUP_MEMBER
        if isinstance(group, dist.ProcessGroup):
            return group
        if type(group) is int and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{argument} is a group without this process, expected one of its own groups")
    raise TypeError(
        f"{argument} is {group!r} ({type(group).__name__}), expected a ProcessGroup or a DeviceMesh of one "
        "dimension"
    )


@dataclass(frozen=True)
class Split:
    """How the input of a loss is split over processes.

    Attributes:
        images: the groups over which the images are split.
        pixels: the groups over which the pixels of each image are split.
        one_loss: whether the losses that the processes return are replicas of one loss, and its gradient is
            computed. Otherwise it is the gradient of the sum of the returned losses.
    """

    images: tuple[ProcessGroup, ...] = ()
    pixels: tuple[ProcessGroup, ...] = ()
    one_loss: bool = False

    def __bool__(self) -> bool:
        return bool(self.images or self.pixels)


_WHOLE = Split()


def split_of(process_group: Group | None, spatial_group: Group | None) -> Split:
    """The split that these arguments describe."""
    if process_group is None and spatial_group is None:
        return _WHOLE
    images, pixels = (
        () if group is None else (as_group(group, argument),)
        for argument, group in (("process_group", process_group), ("spatial_group", spatial_group))
    )
    if images and pixels:
        ranks = [set(dist.get_process_group_ranks(group)) for group in (*images, *pixels)]
        if len(shared := ranks[0] & ranks[1]) > 1:
            raise ValueError(
                f"process_group and spatial_group share the ranks {sorted(shared)}, expected this process "
                "alone: they are different dimensions of a mesh"
            )
    return Split(images, pixels)


class _AllReduce(torch.autograd.Function):
    """The sum over a group.

    The derivative of the sum of the losses of all processes sums the incoming gradients. That of one loss, of
    which each process has a replica, is the incoming gradient.
    """

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup, one_loss: bool) -> Tensor:
        from torch.distributed import _functional_collectives as collectives  # torch.compile traces these

        total: Tensor = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProcessGroup, bool], output: Tensor) -> None:
        _, ctx.group, ctx.one_loss = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.one_loss:
            return _Replica.apply(gradient, ctx.group), None, None
        return _AllReduce.apply(gradient, ctx.group, False), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, group: ProcessGroup, one_loss: bool
    ) -> tuple[Tensor, int | None]:
        return _AllReduce.apply(x, group, one_loss), in_dims[0]


class _Replica(torch.autograd.Function):
    """A process's replica of a tensor of one loss. Its derivative sums what all processes compute from it.

    A gradient of the gradient needs this.
    """

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProcessGroup], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(gradient, ctx.group, True), None


def _sum(x: Tensor, groups: Sequence[ProcessGroup], one_loss: bool) -> Tensor:
    for group in groups:
        x = _AllReduce.apply(x, group, one_loss)
    return x


def combine(
    operator: CombineOperator,
    stats: Tensor,
    divisor: Tensor | None,
    options: tuple[tuple[float, ...], float, str, str, str],
    dtype: torch.dtype,
    split: Split,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of all processes' pixels, its factors, and the sums of this process's images.

    Args:
        operator: the operator combine.
        stats: (N, g, 5) float64, the sums of this process's pixels.
        divisor: as for ``operator``.
        options: `Options.combine_arguments`.
        dtype: of the loss.
        split: how the input is split over processes. Nothing is sent if it is not.

    Returns:
        The loss, (), or (N,) of this process's images with ``reduction="none"``; f_t (N or 1, g-1); and the
            sums of whole images, (N, g, 5).
    """
    lambdas, alpha, reduction, _, factor_scope = options
    stats = _sum(stats, split.pixels, split.one_loss)  # of whole images from here on
    if not split.images or (reduction == "none" and factor_scope == "image"):
        loss, f = operator(stats, divisor, *options, dtype)
        return loss, f, stats

    if factor_scope == "batch":
        own = stats.sum(0, keepdim=True)
        # With "none" the losses of other images depend on the sums, too, and are nobody's replicas.
        total = _sum(own, split.images, split.one_loss and reduction != "none")
        if reduction != "none":  # images that share their factors can be added
            loss, f = operator(total, divisor, *options, dtype)
            return loss, f, stats
        losses, f = operator(torch.cat([stats, total - own]), divisor, *options, dtype)
        return losses[:-1], f, stats

    # Each image has its own factors. Its loss becomes the first sum of a single level.
    own_loss, f = operator(stats, None, lambdas, alpha, "sum", *options[3:], torch.float64)
    weight = stats.detach()[..., 4].sum()
    zero = torch.zeros_like(weight)
    row = torch.stack([own_loss, zero, zero, zero, weight]).view(1, 1, 5)
    loss, _ = operator(_sum(row, split.images, split.one_loss), divisor, (), *options[1:], dtype)
    return loss, f, stats


def check_alike(description: Mapping[str, object], group: ProcessGroup, argument: str) -> None:
    """Raises the same ValueError on all ranks of a group if their descriptions differ. It synchronises."""
    require_alike(gather(dict(description), group), argument)


def gather(value: object, group: ProcessGroup) -> list[Any]:
    """The values of all ranks of a group, in their order, on every rank. It synchronises."""
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, value, group)
    return of_ranks


def require_alike(of_ranks: Sequence[dict[str, object]], argument: str) -> None:
    """Raises a ValueError if the descriptions of the ranks of a group differ."""
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks):
        for name in first | other:
            ours, theirs = first.get(name), other.get(name)
            if repr(ours) != repr(theirs):  # NaN is not equal to itself
                raise ValueError(
                    f"{argument}: {name} is {theirs!r} on rank {rank} of the group and {ours!r} on rank 0, "
                    "expected the same on all ranks"
                )
