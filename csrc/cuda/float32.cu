#include "kernels.h"
#include "stream.h"

template struct ial::gpu::Kernels<float, ial::gpu::Cuda>;
