// The CUDA operators on CPU tensors: the kernels and what launches them, unchanged, in the library ial_simt.
#include "simt.h"

#include <torch/library.h>

#include "ial_launch.h"

namespace ial {
namespace gpu {

alignas(16) unsigned char ial_shared[simt::kMostSharedBytes];

}  // namespace gpu

namespace {

// A device so small that blocks take several rounds, images several blocks and batches several waves.
class Simt {
 public:
    explicit Simt(const at::Tensor&) {}

    int multiprocessors() const { return 3; }
    int l2_bytes() const { return 16 << 10; }
    int shared_bytes() const { return simt::kMostSharedBytes; }
    bool cooperative() const { return true; }

    template <typename Kernel>
    int resident(Kernel, size_t) const {
        return 2;
    }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                    const Arguments&... arguments) const {
        simt::launch(false, kernel, grid, threads, shared, arguments...);
    }

    template <typename... Parameters, typename... Arguments>
    void cooperate(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   const Arguments&... arguments) const {
        simt::launch(true, kernel, grid, threads, shared, arguments...);
    }
};

void disturb(std::string_view skipped, bool descending) {
    simt::skipped = skipped;
    simt::turn = descending;
}

}  // namespace

const char* cpu_instruction_set() { return "simt"; }

TORCH_LIBRARY_IMPL(ial_simt, CPU, m) { gpu::Operators<Simt>::implement(m); }
TORCH_LIBRARY_FRAGMENT(ial_simt, m) { m.def("disturb(str skipped, bool descending) -> ()", disturb); }

}  // namespace ial
