// Registers the operators for CUDA tensors. The kernels of each dtype are compiled in their own file.
#include "operators.h"
#include "stream.h"

namespace ial::gpu {

extern template struct Kernels<double, Cuda>;
extern template struct Kernels<float, Cuda>;
extern template struct Kernels<__half, Cuda>;
extern template struct Kernels<__nv_bfloat16, Cuda>;

}  // namespace ial::gpu

TORCH_LIBRARY_IMPL(ial_cuda, CUDA, m) { ial::gpu::Operators<ial::gpu::Cuda>::implement(m); }
