#include "kernels.h"
#include "stream.h"

template struct ial::gpu::Kernels<__nv_bfloat16, ial::gpu::Cuda>;
