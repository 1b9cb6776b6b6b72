// Memory for CPU gradients, kept from one training step to the next.
#pragma once

#include <ATen/core/Tensor.h>

namespace ial {

// An uninitialised tensor with the layout of `like`. A tensor of at least one huge page reuses the kept
// memory if that is large enough.
at::Tensor empty_gradient(const at::Tensor& like);

// Returns the kept memory to the system. Returns its size in bytes.
int64_t release_gradient();

// Sets whether memory is kept from now on. `false` also releases what is kept. Returns the previous setting.
bool keep_gradient(bool keep);

}  // namespace ial
