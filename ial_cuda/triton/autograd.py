"""The derivatives of the operators. They are operators too, without derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction

from ..validation import check_constant
from .operators import (
    combine,
    combine_backward,
    loss_and_grad,
    pixel_nll,
    pixel_nll_backward,
    reduce,
    reduce_backward,
    reduce_backward_,
    rescale_,
)

# csrc/library.cpp has the same messages.
_DOUBLE_BACKWARD = (
    'ial_cuda: double backward is not implemented; use backend="reference" where gradients of gradients '
    "are needed"
)
_JVP = "ial_cuda: forward-mode derivatives (jvp) are not implemented; backend='reference' has them"


def _save_pixels(ctx: Any, logits: Tensor, pixels: tuple[Any, ...], *others: Tensor) -> None:
    """Saves the arguments of reduce_backward. ``pixels``: the arguments from target to label_smoothing."""
    *tensors, ctx.class_levels, ctx.ignore_index, ctx.gradient, ctx.label_smoothing = pixels
    ctx.save_for_backward(logits, *tensors, *others)


def _saved(ctx: Any) -> tuple[Tensor, tuple[Any, ...], tuple[Tensor, ...]]:
    """The arguments of `_save_pixels`. Call it once: torch.utils.checkpoint unpacks a tensor only once."""
    logits, target, weight, pixel_weight, *others = ctx.saved_tensors
    options = (ctx.class_levels, ctx.ignore_index, ctx.gradient, ctx.label_smoothing)
    return logits, (target, weight, pixel_weight, *options), tuple(others)


def _save_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_pixels(ctx, inputs[0], inputs[1:8])
    # torch omits arguments that have their default
    ctx.inplace, ctx.align_corners = (*inputs[8:], None)[:2]


def _differentiate_reduce(ctx: Any, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
    logits, pixels, _ = _saved(ctx)
    arguments = (logits, grad_stats.contiguous(), *pixels)
    # With create_graph the gradient has a history that needs the logits.
    if ctx.inplace and not torch.is_grad_enabled():
        reduce_backward_(*arguments)
        grad = logits.detach()
    else:
        grad = reduce_backward(*arguments, ctx.align_corners)
    return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    stats, divisor, *ctx.options, _ = inputs
    ctx.save_for_backward(stats, divisor)
    ctx.mark_non_differentiable(output[1])


def _differentiate_combine(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    stats, divisor = ctx.saved_tensors
    grad = combine_backward(stats, grad_loss, divisor, *ctx.options)
    return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _save_loss_and_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, stats, grad_stats, grad, computed_for = output
    divisor, *ctx.options = inputs[8:14]
    ctx.align_corners, ctx.expected = (*inputs[14:], None, None)[:2]
    ctx.has_grad = grad.dim() > 1
    # Attributes, not saved tensors: the gradient is handed out and `expected` is overwritten.
    ctx.grad = grad if ctx.has_grad else None
    _save_pixels(
        ctx, inputs[0], inputs[1:8], *(grad_stats, computed_for) if ctx.has_grad else (stats, divisor)
    )
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_loss_and_grad(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The first backward pass returns the gradient of the forward pass, if there is one.

    A second backward pass, or one with create_graph, computes a new gradient.
    """
    logits, pixels, others = _saved(ctx)
    if not ctx.has_grad:
        stats, divisor = others
        grad_stats = combine_backward(stats, grad_loss, divisor, *ctx.options)
        grad = reduce_backward(logits, grad_stats, *pixels, ctx.align_corners)
    elif ctx.grad is None or torch.is_grad_enabled() or _is_traced(grad_loss):
        of_one = others[0]
        grad_stats = torch.where(of_one == 0, of_one, of_one * grad_loss)
        grad = reduce_backward(logits, grad_stats, *pixels, ctx.align_corners)
    else:
        of_one, computed_for = others
        grad, ctx.grad = ctx.grad, None
        rescale_(grad, grad_loss, computed_for, logits, of_one, *pixels, ctx.align_corners, ctx.expected)
    return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _is_traced(grad_loss: Tensor) -> bool:
    """Whether a mode traces the calls or vmap batches them. Nothing may be overwritten then."""
    functorch = torch._C._functorch  # autograd.grad(is_grads_batched=True) uses the older vmap
    wrapped = functorch.is_functorch_wrapped_tensor(grad_loss) or functorch.is_legacy_batchedtensor(grad_loss)
    return wrapped or torch._C._len_torch_dispatch_stack() > 0


def _save_pixel_nll(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, target, weight)


def _differentiate_pixel_nll(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
    logits, *others = ctx.saved_tensors
    grad = pixel_nll_backward(logits, grad_nll, *others, *ctx.options)
    return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _save_written(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_dirty(output)


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(_DOUBLE_BACKWARD)


def _no_jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
    raise NotImplementedError(_JVP)


_library = torch.library.Library("ial_triton", "FRAGMENT")


def _register(
    op: Any, save: Callable[..., None] = _save_nothing, backward: Callable[..., Any] = _no_double_backward
) -> None:
    """`op.register_autograd` with support for torch.func.

    torch calls an Autograd kernel at each level of its transforms. The autograd.Function of register_autograd
    raises there or ignores the tangent.
    """

    def forward(*args: Any) -> Any:
        # Autograd disables gradients here, but the transforms below need them.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        return args[0] if result is None else result

    members = {"forward": forward, "setup_context": save, "backward": backward, "jvp": _no_jvp}
    members["_compiled_autograd_key"] = Function._compiled_autograd_key
    function: Any = type(
        f"{op._name}_autograd", (_SingleLevelFunction,), {k: staticmethod(v) for k, v in members.items()}
    )
    schema = op._opoverload._schema
    weights = [(i, a.name) for i, a in enumerate(schema.arguments) if a.name in ("weight", "pixel_weight")]

    def apply(*args: Any) -> Any:
        for i, name in weights:
            if args[i] is not None:
                check_constant(name, args[i])
        with enable_single_level_autograd_function():
            result = function.apply(*args)
        return None if schema.is_mutable else result

    _library.impl(op._name, apply, "Autograd", allow_override=True)


_register(reduce, _save_reduce, _differentiate_reduce)
_register(combine, _save_combine, _differentiate_combine)
_register(reduce_backward)
_register(reduce_backward_, _save_written)
_register(combine_backward)
_register(loss_and_grad, _save_loss_and_grad, _differentiate_loss_and_grad)
_register(rescale_, _save_written)
_register(pixel_nll, _save_pixel_nll, _differentiate_pixel_nll)
_register(pixel_nll_backward)


def _bump_versions(keyset: Any, *args: Any) -> None:
    """Marks what an operator writes, as torch does. torch 2.11 fails if `expected` is omitted."""
    for written in (args[0], *args[13:]):
        torch.autograd.graph.increment_version(written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        rescale_._opoverload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


_library.impl("rescale_", _bump_versions, "ADInplaceOrView", with_keyset=True, allow_override=True)
