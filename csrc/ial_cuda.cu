// The operators on CUDA tensors: kernels go to the current stream of the tensors' device.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ial_launch.h"

namespace ial {
namespace {

class Cuda {
 public:
    explicit Cuda(const at::Tensor& tensor)
        : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {}

    int multiprocessors() const {
        int count;
        C10_CUDA_CHECK(
            cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, guard_.current_device().index()));
        return count;
    }

    template <typename Kernel>
    int resident(Kernel kernel, size_t shared) const {
        int blocks;
        C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, gpu::kThreads, shared));
        return blocks;
    }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                    const Arguments&... arguments) const {
        kernel<<<grid, threads, shared, stream_>>>(arguments...);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    }

 private:
    c10::cuda::CUDAGuard guard_;
    c10::cuda::CUDAStream stream_;
};

}  // namespace

TORCH_LIBRARY_IMPL(ial_cuda, CUDA, m) { gpu::Operators<Cuda>::implement(m); }

}  // namespace ial
