// A large tensor on the CPU is a fresh mapping each time, which goes back to the system when it is freed. So
// each step pays for every page anew: Linux clears it, which takes as long as the kernel that writes it, and
// a virtual machine whose host takes free memory back pays several times that. Here a gradient's mapping is
// parked when it is freed, and the next gradient that fits takes it, as torch keeps memory on a GPU. One is
// kept, the largest; its contents are given up (MADV_FREE), so that Linux may have its pages whenever it
// needs memory. Its addresses stay taken, so nothing is kept where those are limited.
#include "gradient_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string_view>

#include "../parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#endif

namespace ial {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE) && defined(MADV_WIPEONFORK)

namespace {

constexpr size_t kHuge = 2 << 20;

// The pages of a new mapping. In pages of 4 KiB its faults cost several times the kernel that writes it, and
// its readers and MADV_FREE take longer ever after. So huge pages are asked for, and since a kernel writes
// all classes at once, so that its threads would meet in every page, one thread touches each first. It is
// only advice: where the system refuses it, nothing is lost.
void prefault(char* begin, size_t size) {
    const auto pages = static_cast<int64_t>(size / kHuge);
    if (madvise(begin, pages * kHuge, MADV_HUGEPAGE) != 0) return;
    parallel_for(pages, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) *static_cast<volatile char*>(begin + i * kHuge) = 0;
    });
}

// A mapping that begins at a huge page.
struct Mapping {
    char* begin;
    size_t size;

    explicit Mapping(size_t bytes) : size((bytes + kSmall - 1) / kSmall * kSmall) {
        void* const found =
            mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) {
            c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
            TORCH_CHECK_WITH(OutOfMemoryError, false, "ial_cuda: there is no memory for a gradient of ",
                             bytes, " bytes");
        }
        char* const from = static_cast<char*>(found);
        const size_t skipped = -reinterpret_cast<uintptr_t>(from) % kHuge;
        begin = from + skipped;
        if (skipped) munmap(from, skipped);
        munmap(begin + size, kHuge - skipped);
        prefault(begin, size);
    }
    Mapping(const Mapping&) = delete;
    ~Mapping() { munmap(begin, size); }

    // The contents are nobody's, and Linux may have the pages. Nor does a fork share them, as those that load
    // data do: a page that is shared would be copied when it is written next, a huge one as 512 small ones.
    void give_up() {
        madvise(begin, size, MADV_FREE);
        madvise(begin, size, MADV_WIPEONFORK);
    }
    void take() { madvise(begin, size, MADV_KEEPONFORK); }

    static constexpr size_t kSmall = 64 << 10;  // a multiple of every usual page
};

// The mapping that no tensor has. Taken and left by exchange, without a lock that a fork could leave closed;
// never destroyed, since tensors may outlive whatever is destroyed at the end of a process.
std::atomic<Mapping*> parked{nullptr};

bool from_environment() {
    const char* const value = std::getenv("IAL_CUDA_KEEP_GRADIENT");
    return !value || std::string_view(value) != "0";
}

std::atomic<bool> keeps{from_environment()};

// Whether addresses that nobody uses are missing elsewhere: this process's are limited, or the system hands
// out no more than it has memory for.
bool addresses_are_scarce() {
    static const bool strict = [] {
        char mode = 0;
        return std::ifstream("/proc/sys/vm/overcommit_memory").get(mode) && mode == '2';
    }();
    const auto limited = [](auto resource) {
        rlimit limit;
        return getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
    };
    return strict || limited(RLIMIT_AS) || limited(RLIMIT_DATA);
}

void park(void* context) {
    std::unique_ptr<Mapping> freed(static_cast<Mapping*>(context));
    c10::profiledCPUMemoryReporter().Delete(freed->begin);
    if (!keeps || addresses_are_scarce()) return;
    freed->give_up();
    std::unique_ptr<Mapping> other(parked.exchange(nullptr));
    if (other && other->size > freed->size) freed.swap(other);
    other.reset(parked.exchange(freed.release()));  // what another thread left there meanwhile
}

struct GradientAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        std::unique_ptr<Mapping> mapping(parked.exchange(nullptr));
        if (mapping && mapping->size >= bytes) {
            mapping->take();
        } else {
            mapping.reset();  // first, so that both are never there at once
            mapping = std::make_unique<Mapping>(bytes);
        }
        c10::profiledCPUMemoryReporter().New(mapping->begin, bytes);
        char* const begin = mapping->begin;
        return {begin, mapping.release(), park, at::kCPU};
    }
    void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

at::Tensor empty_gradient(const at::Tensor& like) {
    if (like.nbytes() < kHuge) return at::empty_like(like);
    static GradientAllocator* const allocator = new GradientAllocator;
    const at::Tensor layout = at::empty_like(like, like.options().device(at::kMeta));
    at::Tensor gradient =
        at::detail::empty_strided_generic(layout.sizes(), layout.strides(), allocator,
                                          c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type());
    const at::Context& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
        at::native::fill_empty_deterministic_(gradient);
    return gradient;
}

int64_t release_gradient() {
    const std::unique_ptr<Mapping> mapping(parked.exchange(nullptr));
    return mapping ? static_cast<int64_t>(mapping->size) : 0;
}

bool keep_gradient(bool keep) {
    const bool before = keeps.exchange(keep);
    if (!keep) release_gradient();
    return before;
}

#else

at::Tensor empty_gradient(const at::Tensor& like) { return at::empty_like(like); }
int64_t release_gradient() { return 0; }
bool keep_gradient(bool) { return false; }

#endif

}  // namespace ial
