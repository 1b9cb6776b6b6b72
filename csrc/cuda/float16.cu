#include "kernels.h"
#include "stream.h"

template struct ial::gpu::Kernels<__half, ial::gpu::Cuda>;
