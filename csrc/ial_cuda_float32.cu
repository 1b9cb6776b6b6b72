#include "ial_cuda.h"

template struct ial::gpu::Kernels<float, ial::gpu::Cuda>;
