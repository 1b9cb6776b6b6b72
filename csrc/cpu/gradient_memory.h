// Memory for the gradients of the CPU, kept from one step to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace ial {

// An uninitialised tensor with the layout of `like`. From the size of a huge page on, it reuses the memory
// that is kept, if that is large enough.
at::Tensor empty_gradient(const at::Tensor& like);

// Returns the kept memory to the system; returns how many bytes.
int64_t release_gradient();

// Whether to keep memory from now on. `false` also releases what is kept. Returns the setting before.
bool keep_gradient(bool keep);

}  // namespace ial
