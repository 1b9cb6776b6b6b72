// The CUDA operators on CPU tensors: the kernels and what launches them, unchanged, in the library ial_simt.
#include "simt.h"

#include <torch/library.h>

#include "ial_launch.h"

namespace ial {
namespace gpu {

alignas(16) unsigned char ial_shared[simt::kSharedBytes];

}  // namespace gpu

namespace {

// A device so small that blocks take several rounds and images several blocks.
class Simt {
 public:
    explicit Simt(const at::Tensor&) {}

    int multiprocessors() const { return 2; }

    template <typename Kernel>
    int resident(Kernel, size_t) const {
        return 3;
    }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                    const Arguments&... arguments) const {
        simt::launch(kernel, grid, threads, shared, arguments...);
    }
};

void disturb(int64_t skipped_line, bool descending) {
    simt::skipped_line = static_cast<int>(skipped_line);
    simt::turn = descending;
}

}  // namespace

const char* cpu_instruction_set() { return "simt"; }

TORCH_LIBRARY_IMPL(ial_simt, CPU, m) { gpu::Operators<Simt>::implement(m); }
TORCH_LIBRARY_FRAGMENT(ial_simt, m) { m.def("disturb(int skipped_line, bool descending) -> ()", disturb); }

}  // namespace ial
