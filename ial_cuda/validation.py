"""Checks of tensors and labels. Every error has the argument, its value and what was expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta

from .arguments import as_finite, as_float, as_int
from .hierarchy import resolve_ignore_index

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LABELS = (torch.int64, torch.int32, torch.uint8)
_LARGEST = torch.finfo(torch.float32).max
#: The dtypes in which labels are compared. torch cannot compare some unsigned ones.
_COMPARED_AS = {
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.int16: torch.int16,
    torch.int8: torch.int8,
    torch.uint8: torch.uint8,
    torch.bool: torch.uint8,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
#: The usual labels of void pixels.
_COMMON_VOID_LABELS = (-100, -1, 255)

#: The largest side of coarse logits and of their target: kMaxSide of csrc/bilinear.h.
MAX_SIDE = 2**30 - 1

#: What ``weight`` accepts.
ClassWeights: TypeAlias = Tensor | Sequence[float] | npt.NDArray[Any]
#: What ``divisor`` accepts.
Divisor: TypeAlias = SupportsFloat | Tensor


# ---- tensors --------------------------------------------------------------------------------------------


def check_logits(logits: object, name: str = "logits") -> None:
    """Checks type and dtype only."""
    _check_tensor(name, logits, _FLOATING)


def is_dtensor(tensor: object) -> bool:
    """Whether ``tensor`` is a `torch.distributed.tensor.DTensor`. Importing that module takes seconds."""
    if type(tensor) is Tensor or not isinstance(tensor, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def class_weight(weight: object, num_classes: int | None, name: str = "weight") -> Tensor | None:
    """``weight`` as a tensor (C,), on the CPU if it is a list or an array. ``num_classes`` None: any C."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        weight = _as_tensor(weight, name)
    _check_tensor(name, weight, _FLOATING)
    check_constant(name, weight)
    if weight.dim() != 1 or num_classes not in (None, len(weight)):
        expected = "C" if num_classes is None else num_classes
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({expected},), one per class")
    return weight


def _as_tensor(weight: object, name: str) -> Tensor:
    if isinstance(weight, Sequence) and not isinstance(weight, str | bytes):
        numbers = [as_float(value, f"{name}[{c}]") for c, value in enumerate(weight)]
        for c, number in enumerate(numbers):
            if _LARGEST < abs(number) < math.inf:
                raise ValueError(f"{name}[{c}] is {number!r}, expected a number that float32 can hold")
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")
    if isinstance(weight, np.ma.MaskedArray):
        raise TypeError(f"{name} is a MaskedArray, expected a torch.Tensor, an array or a list of numbers")
    if not hasattr(weight, "__array__"):
        raise TypeError(
            f"{name} is a {type(weight).__name__}, expected a torch.Tensor, an array or a list of numbers"
        )
    array = np.asarray(weight)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} has dtype {array.dtype}, expected numbers")
    size = min(array.itemsize, 8) if array.dtype.kind == "f" else 4
    return torch.tensor(array.astype(f"f{size}"), device="cpu")


def check_inputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    num_classes: int,
    *,
    upsample: bool,
    name: str = "logits",
) -> None:
    """Checks types, dtypes, shapes and devices.

    ``upsample``: whether the logits are coarse. ``name``: of the logits in errors.
    """
    check_logits(logits, name)
    _check_tensor("target", target, _LABELS)
    if logits.dim() < 2 or logits.shape[1] != num_classes:
        binary = num_classes == 2 and logits.dim() >= 2 and logits.shape[1] == 1
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}, expected (N, C, *spatial) with the C = {num_classes} "
            "classes of hierarchy" + (_TWO_CHANNELS if binary else "")
        )
    expected = tuple(logits.shape[:1] + logits.shape[2:])
    if upsample:
        if (
            logits.dim() != 4
            or target.dim() != 3
            or target.shape[0] != logits.shape[0]
            or 0 in target.shape[1:] + logits.shape[2:]
        ):
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)} and target {tuple(target.shape)}, expected "
                f"(N, C, h, w) and (N, H, W) with h, w, H and W above 0, for upsample='bilinear'"
                + _target_hint(logits, target)
            )
        if any(side > MAX_SIDE for side in target.shape[1:] + logits.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)} and target {tuple(target.shape)}, expected "
                f"h, w, H and W up to {MAX_SIDE}, for upsample='bilinear'"
            )
        expected = tuple(target.shape)
    if target.shape != expected:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected (N, *spatial) = {expected} "
            f"for {name} {tuple(logits.shape)}" + _target_hint(logits, target)
        )
    if pixel_weight is not None:
        _check_tensor("pixel_weight", pixel_weight, _FLOATING)
        check_constant("pixel_weight", pixel_weight)
        if pixel_weight.shape != expected:
            raise ValueError(
                f"pixel_weight has shape {tuple(pixel_weight.shape)}, expected (N, *spatial) = {expected}"
            )
    device, sharded = logits.device, is_dtensor(logits)
    for other, tensor in (("target", target), ("weight", weight), ("pixel_weight", pixel_weight)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{other} is on {tensor.device}, expected {device} like {name}")
        if is_dtensor(tensor) != sharded and not (sharded and other == "weight"):  # each rank has all weights
            got, wanted = ("plain tensor", "DTensor") if sharded else ("DTensor", "plain tensor")
            raise TypeError(f"{other} is a {got}, expected a {wanted} like {name}")


def check_one_image(input: Tensor, target: Tensor, pixel_weight: Tensor | None, *, upsample: bool) -> None:
    """Checks types, dtypes and shapes of target and pixel_weight, for logits (C,) or (C, *spatial)."""
    _check_tensor("target", target, _LABELS)
    pixels = tuple(target.shape if upsample else input.shape[1:])
    if target.shape != pixels:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {pixels} for input {tuple(input.shape)}"
        )
    if pixel_weight is not None:
        _check_tensor("pixel_weight", pixel_weight, _FLOATING)
        if pixel_weight.shape != pixels:
            raise ValueError(
                f"pixel_weight has shape {tuple(pixel_weight.shape)}, expected {pixels} "
                f"for input {tuple(input.shape)}"
            )


def mean_divisor(divisor: object, reduction: str, device: torch.device, name: str) -> Tensor:
    """``divisor`` as a () float64 tensor on ``device``, the device of the logits, without a synchronisation.

    ``name``: of the logits in errors.
    """
    if reduction != "mean":
        raise ValueError(f"divisor is given, expected None: reduction is {reduction!r}, not 'mean'")
    if is_dtensor(divisor):
        raise TypeError(f"divisor is a DTensor, expected a plain tensor or a number like {name}")
    if isinstance(divisor, Tensor) and (
        divisor.dim() > 0 or divisor.device.type != "cpu" or device.type == "cpu"
    ):
        _check_tensor("divisor", divisor, (*_FLOATING, *_COMPARED_AS.keys() - {torch.bool}))
        check_constant("divisor", divisor)
        if divisor.dim() > 0:
            raise ValueError(f"divisor has shape {tuple(divisor.shape)}, expected () or a number")
        if divisor.device != device:
            raise ValueError(f"divisor is on {divisor.device}, expected {device} like {name}, or the CPU")
        return divisor.to(torch.float64)
    number = as_finite(divisor, "divisor")  # type: ignore[arg-type]
    if number < 0:
        raise ValueError(f"divisor is {divisor!r}, expected a non-negative number")
    return torch.full((), number, dtype=torch.float64, device=device)


def check_inplace(logits: Tensor, *others: Tensor | None, name: str = "logits") -> None:
    """Raises in the forward pass for logits that the backward pass could not overwrite.

    ``name``: of the logits in errors.
    """
    problem = None
    if torch._debug_has_internal_overlap(logits) == 1:
        problem = f"elements of {name} share memory; clone() them"
    elif any(other is not None and _share_memory(other, logits) for other in others):
        problem = f"{name} shares memory with target, weight or pixel_weight"
    elif logits.requires_grad and torch.is_grad_enabled():
        base = logits._base
        if logits.is_leaf:
            problem = f"{name} is a leaf that requires a gradient"
        elif base is not None and base.is_leaf and base.requires_grad:
            problem = f"{name} is a view of a leaf that requires a gradient"
        elif base is not None and _get_creation_meta(logits) != CreationMeta.DEFAULT:
            problem = (
                f"{name} is one of several views of a result, or a view made in a hook, in an "
                "autograd.Function or under no_grad"
            )
    if problem:
        raise ValueError(f"inplace is True, expected False: {problem}")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


_TWO_CHANNELS = ": binary logits x need two channels, torch.cat([torch.zeros_like(x), x], 1)"


def _target_hint(logits: Tensor, target: Tensor) -> str:
    """The remedy for a target with a channel of size 1, or a one-hot target."""
    if target.dim() == logits.dim() and target.shape[:2] == (logits.shape[0], 1):
        return ": pass target.squeeze(1)"
    if target.dim() == logits.dim() and target.shape[:2] == logits.shape[:2]:
        return ": class indices only, pass target.argmax(1)"
    return ""


def _check_tensor(name: str, tensor: object, dtypes: Collection[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided")
    if tensor.dtype not in dtypes:
        probabilities = name == "target" and tensor.is_floating_point()
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}"
            + (
                ": class indices only; torch.nn.functional.cross_entropy takes probabilities"
                if probabilities
                else ""
            )
        )


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, expected a constant: only logits are differentiated")


# ---- labels ---------------------------------------------------------------------------------------------


def validate_target(target: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Checks every label of ``target``, on any device.

    On CUDA this synchronises. Under torch.compile it breaks the graph. A meta or fake tensor has no labels
    and passes.

    Args:
        target: class indices of any shape, of any integer dtype or bool.
        num_classes: the number of classes C.
        ignore_index: the label of void pixels, which is allowed too. None means 255.

    Raises:
        TypeError: ``target`` is not a tensor of integers, or another argument is not an integer.
        ValueError: a label is outside [0, C) and is not ``ignore_index``. The message gives the first bad
            label, its position, and the number of bad pixels. Or ``num_classes`` is below 1, or
            ``ignore_index`` is outside int64, or None with more than 255 classes.

    Examples:
        >>> import ial_cuda, torch
        >>> ial_cuda.validate_target(torch.tensor([[0, 18], [255, 3]]), num_classes=19)
    """
    _check_tensor("target", target, _COMPARED_AS)
    num_classes = as_int(num_classes, "num_classes")
    if not 1 <= num_classes < 2**63:
        raise ValueError(f"num_classes is {num_classes}, expected a positive 64-bit integer")
    ignore_index = resolve_ignore_index(ignore_index, num_classes)
    if torch.compiler.is_compiling():
        # A compiler would drop the operator, since its result is not used.
        _check_labels(target, num_classes, ignore_index)
    else:
        checked_target(target, num_classes, ignore_index)


@torch.library.custom_op("ial_cuda::checked_target", mutates_args=())
def checked_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """A copy of ``target`` after its labels have been checked.

    This is an operator because labels cannot be read under a compiler, fake tensors or functorch transforms.
    The caller must use the result, else a compiler drops the call.
    """
    _check_labels(target, num_classes, ignore_index)
    return target.clone()


@checked_target.register_fake
def _(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target)


@checked_target.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, int | None]:
    return checked_target(target, num_classes, ignore_index), in_dims[0]


def _check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    labels = target.to(_COMPARED_AS[target.dtype])
    limits = torch.iinfo(labels.dtype)
    bad = labels < 0  # as are uint64 labels from 2**63 on
    # A number outside the range of the dtype would wrap in a comparison.
    if num_classes <= limits.max:
        bad |= labels >= num_classes
    if (0 if target.dtype == torch.uint64 else limits.min) <= ignore_index <= limits.max:
        bad &= labels != ignore_index
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        label = int(target[first].item())
        raise ValueError(
            f"target has label {label} at {first}, the first of {int(bad.sum())} bad pixels, "
            f"expected labels 0 to {num_classes - 1} or ignore_index={ignore_index}"
            + _label_hint(label, num_classes)
        )


def is_void(target: Tensor, ignore_index: int) -> Tensor:
    """Whether each pixel's label is ``ignore_index``."""
    limits = torch.iinfo(target.dtype)
    if limits.min <= ignore_index <= limits.max:
        return target == ignore_index
    return torch.zeros_like(target, dtype=torch.bool)  # the comparison would wrap around


def _label_hint(label: int, num_classes: int) -> str:
    if label in _COMMON_VOID_LABELS:
        return f": pass ignore_index={label} if it is the void label"
    return _TWO_CHANNELS if num_classes == 1 else ""
