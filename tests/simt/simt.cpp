// The CUDA operators on CPU tensors, in the library ial_simt. The kernels and their launches are unchanged.
#include "simt.h"

#include "../../csrc/cuda/operators.h"

namespace ial {
namespace gpu {

alignas(16) unsigned char ial_shared[simt::kMaxSharedBytes];

}  // namespace gpu

namespace {

// Small enough that blocks take several iterations, images several blocks and batches several waves.
struct Device {
    int64_t multiprocessors = 3, l2_bytes = 16 << 10, shared_bytes = simt::kMaxSharedBytes;
};
Device device;

int64_t launches = 0;  // since the last call of ial_simt::launches

class Simt {
 public:
    explicit Simt(const at::Tensor&) {}

    int multiprocessors() const { return device.multiprocessors; }
    int l2_bytes() const { return device.l2_bytes; }
    int shared_bytes() const { return device.shared_bytes; }
    bool cooperative() const { return true; }

    template <typename Kernel>
    int resident(Kernel, size_t) const {
        return 2;
    }

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                    const Arguments&... arguments) const {
        ++launches;
        simt::launch(false, kernel, grid, threads, shared, arguments...);
    }

    template <typename... Parameters, typename... Arguments>
    void cooperate(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   const Arguments&... arguments) const {
        if (grid.x > device.multiprocessors || shared > static_cast<size_t>(device.shared_bytes))
            throw std::logic_error(simt::kRefused);
        ++launches;
        simt::launch(true, kernel, grid, threads, shared, arguments...);
    }
};

// Sets the device. Returns the previous device.
std::tuple<int64_t, int64_t, int64_t> set_device(int64_t multiprocessors, int64_t l2_bytes,
                                                 int64_t shared_bytes) {
    TORCH_CHECK_VALUE(shared_bytes <= static_cast<int64_t>(simt::kMaxSharedBytes), "shared_bytes is ",
                      shared_bytes, ", expected at most ", simt::kMaxSharedBytes);
    const Device before = std::exchange(device, {multiprocessors, l2_bytes, shared_bytes});
    return {before.multiprocessors, before.l2_bytes, before.shared_bytes};
}

// Executes an instruction for one address space on an address in `space`.
void touch_kernel(std::string_view instruction, simt::Space space, double* global) {
    double local = 0;
    double* const places[] = {global, reinterpret_cast<double*>(gpu::ial_shared), &local};
    double* const at = places[space];
    if (instruction == "__stcs")
        __stcs(at, 1.0);
    else if (instruction == "__ldcg")
        *at = __ldcg(at);
    else
        *at = static_cast<double>(__cvta_generic_to_shared(at));
}

void touch(std::string_view instruction, int64_t space) {
    double global = 0;
    simt::launch(false, touch_kernel, dim3(1), simt::kWarp, sizeof(double), instruction,
                 static_cast<simt::Space>(space), &global);
}

void disturb(std::string_view skipped, bool descending) {
    simt::skipped = skipped;
    simt::started = descending;
}

}  // namespace

const char* cpu_instruction_set() { return "simt"; }
int64_t release_gradient() { return 0; }
bool keep_gradient(bool) { return false; }

TORCH_LIBRARY_IMPL(ial_simt, CPU, m) { gpu::Operators<Simt>::implement(m); }
TORCH_LIBRARY_FRAGMENT(ial_simt, m) {
    m.def("disturb(str skipped, bool descending) -> ()", disturb);
    m.def("launches() -> int", [] { return std::exchange(launches, 0); });
    m.def("set_device(int multiprocessors, int l2_bytes, int shared_bytes) -> (int, int, int)", set_device);
    m.def("touch(str instruction, int space) -> ()", touch);
}

}  // namespace ial
