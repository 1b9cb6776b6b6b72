// The operators on CUDA tensors. The kernels are compiled type by type, next door.
#include "operators.h"
#include "stream.h"

namespace ial {
namespace gpu {

extern template struct Kernels<double, Cuda>;
extern template struct Kernels<float, Cuda>;
extern template struct Kernels<__half, Cuda>;
extern template struct Kernels<__nv_bfloat16, Cuda>;

}  // namespace gpu

TORCH_LIBRARY_IMPL(ial_cuda, CUDA, m) { gpu::Operators<gpu::Cuda>::implement(m); }

}  // namespace ial
