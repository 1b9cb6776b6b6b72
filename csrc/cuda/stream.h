// A Launcher (cuda/launch.h) for the current CUDA stream of a tensor's device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "tile.cuh"

namespace ial::gpu {

class Cuda {
 public:
    explicit Cuda(const at::Tensor& tensor)
        : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {}

    int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
    int l2_bytes() const { return attribute(cudaDevAttrL2CacheSize); }
    int shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
    bool cooperative() const { return attribute(cudaDevAttrCooperativeLaunch); }

    template <typename Kernel>
    int resident(Kernel kernel, size_t shared) const {
        int blocks;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared));
        return blocks;
    }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                    const Arguments&... arguments) const {
        launch(kernel, grid, threads, shared, false, arguments...);
    }

    template <typename... Parameters, typename... Arguments>
    void cooperate(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   const Arguments&... arguments) const {
        launch(kernel, grid, threads, shared, true, arguments...);
    }

 private:
    static void check(cudaError_t error) {
        // These errors mean that the kernel was not compiled for this GPU.
        if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
            cudaGetLastError();
            TORCH_CHECK(false,
                        "ial_cuda's CUDA kernels are not built for this GPU: "
                        "`python -m ial_cuda info` says for which, and how to build them for it");
        }
        C10_CUDA_CHECK(error);
    }

    int attribute(cudaDeviceAttr name) const {
        int value;
        check(cudaDeviceGetAttribute(&value, name, guard_.current_device().index()));
        return value;
    }

    template <typename... Parameters, typename... Arguments>
    void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, bool cooperative,
                const Arguments&... arguments) const {
        // The attribute belongs to the kernel, not to the launch. Other threads may launch it with other
        // sizes, so it is set to the maximum.
        if (shared > kSharedBytes)
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes()));
        cudaLaunchAttribute kind;
        kind.id = cudaLaunchAttributeCooperative;
        kind.val.cooperative = cooperative;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = stream_;
        config.attrs = &kind;
        config.numAttrs = 1;
        check(cudaLaunchKernelEx(&config, kernel, arguments...));
    }

    c10::cuda::CUDAGuard guard_;
    c10::cuda::CUDAStream stream_;
};

}  // namespace ial::gpu
