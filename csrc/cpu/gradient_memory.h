// Memory for the gradients of the CPU, kept from one step to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace ial {

// An uninitialised tensor with the layout of `like`. Where it takes a huge page or more, its memory is that
// of the gradient that was freed last, if it fits.
at::Tensor empty_gradient(const at::Tensor& like);

// Gives the memory that is kept, and that no tensor has, back to the system: how many bytes.
int64_t release_gradient();

// Whether memory is kept from now on; returns whether it was. What is kept is released where not.
bool keep_gradient(bool keep);

}  // namespace ial
