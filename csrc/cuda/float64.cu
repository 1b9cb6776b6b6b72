#include "kernels.h"
#include "stream.h"

template struct ial::gpu::Kernels<double, ial::gpu::Cuda>;
