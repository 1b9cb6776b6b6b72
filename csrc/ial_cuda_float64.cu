#include "ial_cuda.h"

template struct ial::gpu::Kernels<double, ial::gpu::Cuda>;
