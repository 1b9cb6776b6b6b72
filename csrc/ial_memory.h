// Memory for the gradients of the CPU, kept from one step to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace ial {

// An uninitialised tensor with the layout of `like`. Where it takes a huge page or more, its memory is that
// of the gradient that was freed last, if it fits.
at::Tensor empty_gradient(const at::Tensor& like);

}  // namespace ial
