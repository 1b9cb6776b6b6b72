// Keeps the memory of a freed CPU gradient for the next gradient.
// At most one mapping is kept: the largest.
//
// A large CPU tensor is allocated as a new mapping, and freeing it returns the mapping to the system. Each
// training step then pays for every page again: Linux clears the page, which takes as long as the kernel that
// writes it. On a virtual machine whose host reclaims free memory, this takes several times longer. torch
// caches GPU memory for the same reason.
//
// The contents of a kept mapping are discarded (MADV_FREE), so Linux may take its pages whenever it needs
// memory. Its addresses stay reserved. Nothing is kept if addresses are limited.
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

// Gives a new mapping huge pages. With pages of 4 KiB, the page faults cost several times as much as the
// kernel that writes the gradient. Reading the gradient and MADV_FREE stay slower too. One thread touches
// each page first, because a kernel writes all classes at once and its threads would fault on the same pages.
// If the system refuses huge pages, nothing is touched.
void prefault(char* begin, size_t size) {
    const auto pages = static_cast<int64_t>(size / kHuge);
    if (madvise(begin, pages * kHuge, MADV_HUGEPAGE) != 0) return;
    parallel_for(pages, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) *static_cast<volatile char*>(begin + i * kHuge) = 0;
    });
}

// A mapping that starts at a huge-page boundary.
struct Mapping {
    char* begin;
    size_t size;

    explicit Mapping(size_t bytes) : size((bytes + kSmall - 1) / kSmall * kSmall) {
        void* const found =
            mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (found == MAP_FAILED) {
            c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
            TORCH_CHECK_WITH(OutOfMemoryError, false, "ial_cuda: no memory for a gradient of ", bytes,
                             " bytes");
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

    // Lets Linux take the pages. Forks, such as the workers of a DataLoader, do not share them. The next
    // write would otherwise copy each shared page, and copy a huge page as 512 small ones.
    void discard() {
        madvise(begin, size, MADV_FREE);
        madvise(begin, size, MADV_WIPEONFORK);
    }
    void reuse() { madvise(begin, size, MADV_KEEPONFORK); }

    static constexpr size_t kSmall = 64 << 10;  // a multiple of every common page size
};

// The kept mapping. No tensor uses it. It is exchanged atomically, because after a fork a lock might stay
// locked. It is never destroyed, because tensors may outlive the objects that are destroyed when a process
// ends.
std::atomic<Mapping*> kept{nullptr};

bool from_environment() {
    const char* const value = std::getenv("IAL_CUDA_KEEP_GRADIENT");
    return !value || std::string_view(value) != "0";
}

std::atomic<bool> enabled{from_environment()};

// Whether reserved addresses reduce what others can allocate: this process has a limit, or the system does
// not overcommit memory.
bool addresses_are_limited() {
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

void keep_or_free(void* context) {
    std::unique_ptr<Mapping> freed(static_cast<Mapping*>(context));
    c10::profiledCPUMemoryReporter().Delete(freed->begin);
    if (!enabled || addresses_are_limited()) return;
    freed->discard();
    std::unique_ptr<Mapping> other(kept.exchange(nullptr));
    if (other && other->size > freed->size) freed.swap(other);
    other.reset(kept.exchange(freed.release()));  // frees what another thread has kept in the meantime
}

struct GradientAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        std::unique_ptr<Mapping> mapping(kept.exchange(nullptr));
        if (mapping && mapping->size >= bytes) {
            mapping->reuse();
        } else {
            mapping.reset();  // before the new one, so that there are never two
            mapping = std::make_unique<Mapping>(bytes);
        }
        c10::profiledCPUMemoryReporter().New(mapping->begin, bytes);
        char* const begin = mapping->begin;
        return {begin, mapping.release(), keep_or_free, at::kCPU};
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
    const std::unique_ptr<Mapping> mapping(kept.exchange(nullptr));
    return mapping ? static_cast<int64_t>(mapping->size) : 0;
}

bool keep_gradient(bool keep) {
    const bool before = enabled.exchange(keep);
    if (!keep) release_gradient();
    return before;
}

#else

at::Tensor empty_gradient(const at::Tensor& like) { return at::empty_like(like); }
int64_t release_gradient() { return 0; }
bool keep_gradient(bool) { return false; }

#endif

}  // namespace ial
