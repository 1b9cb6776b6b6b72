// Emulates on a CPU the parts of CUDA that this project's kernels use.
// Blocks run one after another. Their threads are fibres, which switch at barriers and shuffles only.
//
// The blocks of a cooperative launch take turns, from one grid barrier to the next. A missing barrier shows
// in the results, because the data that it waits for is not written yet. Wrong memory ordering does not show,
// because there is one real thread. Instructions for one address space reject addresses of another.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
struct __half2 {
    __half x, y;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
template <typename Pair>
Pair __hmax2(Pair a, Pair b) {
    return {std::fmax(float(a.x), float(b.x)), std::fmax(float(a.y), float(b.y))};
}
inline unsigned __heq2_mask(__half2 a, __half2 b) {
    return (a.x == b.x ? 0xffffu : 0) | (a.y == b.y ? 0xffff0000u : 0);
}
// y with the largest error that PTX allows. The bits of x determine its sign.
inline float approximate(float y, float x, float error) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(x));
    y *= bits % 2 ? 1 + error : 1 - error;
    return std::fabs(y) < 0x1p-126f ? 0 : y;
}
inline float ex2_approx_ftz(float x) { return x == 0 ? 1 : approximate(std::exp2(x), x, 0x1p-22f); }
inline float rcp_approx_ftz(float x) { return approximate(1 / x, x, 0x1p-23f); }
// The product goes through memory, so that g++ cannot contract it with an addition.
inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ial::gpu {
// The dynamic shared memory of the running block.
extern unsigned char ial_shared[];
}  // namespace ial::gpu

namespace simt {

constexpr int kWarp = 32;
// Bytes of a fibre's stack, and of the most shared memory that a block can request. Stacks that are a power
// of two apart would share the same few lines of the cache.
constexpr size_t kStack = (256 << 10) + 320, kMaxSharedBytes = 128 << 10;

struct Barrier {
    int arrived = 0, generation = 0;
};

struct Fibre {
    ucontext_t context;
    bool done;
};

struct Block {
    dim3 index;
    std::vector<Fibre> fibres;
    std::unique_ptr<char[]> stacks;  // of all fibres
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> lanes[2];     // the value of each thread in a shuffle, and in the next one
    std::vector<unsigned char> shared;  // saved while another block runs
    bool descending = false, done = true;

    char* stack(unsigned thread) const { return stacks.get() + thread * kStack; }
};
inline std::function<void()> kernel;
inline std::vector<Block> blocks;  // at least all blocks of a cooperative launch, otherwise one
inline Block* block;               // the running block
inline Barrier grid;
inline ucontext_t scheduler;
inline bool progress;
inline std::exception_ptr failure;  // thrown in a thread

inline std::string skipped;   // "file:line" of a barrier to leave out; a test must fail then
inline unsigned started = 0;  // blocks; every second block runs its threads in descending order

// The last thread to arrive also yields, so that the threads continue in the block's order.
inline void wait(Barrier& barrier, int threads) {
    const int generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
    }
    do swapcontext(&block->fibres[threadIdx.x].context, &scheduler);
    while (barrier.generation == generation);
}

inline bool is_skipped(std::string_view file, int line) {
    if (skipped.empty()) return false;
    const std::string here = "/" + std::string(file) + ":" + std::to_string(line);
    const std::string name = "/" + skipped;
    return here.size() >= name.size() && here.compare(here.size() - name.size(), name.size(), name) == 0;
}

inline void syncthreads(const char* file, int line) {
    if (!is_skipped(file, line)) wait(block->all, blockDim.x);
}

inline void syncwarp(const char* file, int line) {
    if (!is_skipped(file, line)) wait(block->warps[threadIdx.x / kWarp], kWarp);
}

inline void syncgrid(const char* file, int line) {
    if (!is_skipped(file, line)) wait(grid, gridDim.x * blockDim.x);
}

template <typename T>
T shuffle_xor(T value, int mask) {
    Barrier& warp = block->warps[threadIdx.x / kWarp];
    std::vector<uint64_t>& lanes = block->lanes[warp.generation % 2];
    std::memcpy(&lanes[threadIdx.x], &value, sizeof(T));
    wait(warp, kWarp);
    std::memcpy(&value, &lanes[threadIdx.x ^ mask], sizeof(T));
    return value;
}

// A thread's stack is its local memory. It also holds the kernel's parameters. If AddressSanitizer detects
// uses after return, it keeps variables elsewhere, and they count as global memory.
enum Space { kGlobal, kShared, kLocal };

inline Space space_of(const void* address) {
    const auto is_in = [&](const void* from, size_t bytes) {
        return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(from) < bytes;
    };
    if (is_in(ial::gpu::ial_shared, kMaxSharedBytes)) return kShared;
    return is_in(block->stack(0), block->fibres.size() * kStack) ? kLocal : kGlobal;
}

// Checks the address of an instruction that works in one address space only.
inline void expect(Space expected, const void* address, const std::string& instruction) {
    constexpr const char* kNames[] = {"global", "shared", "local"};
    const Space space = space_of(address);
    if (space != expected)
        throw std::logic_error("simt: " + instruction + " on an address in " + kNames[space] + " memory");
}

// An exception must not leave the fibre's stack. The functions that it ends do not clear their marks for
// AddressSanitizer.
inline void run_fibre() {
    try {
        kernel();
    } catch (...) {
        ASAN_UNPOISON_MEMORY_REGION(block->stack(threadIdx.x), kStack);
        failure = std::current_exception();
    }
    block->fibres[threadIdx.x].done = true;
    progress = true;
}

inline void start(Block& block, dim3 index, size_t shared) {
    const unsigned threads = blockDim.x;
    block.index = index;
    block.done = false;
    block.descending = started++ % 2;
    block.shared.assign(shared, 0xff);  // NaN until written
    block.all = {};
    block.warps.assign(threads / kWarp, {});
    for (auto& lanes : block.lanes) lanes.assign(threads, 0);
    if (block.fibres.size() < threads) {
        block.fibres.resize(threads);
        block.stacks.reset(new char[threads * kStack]);
        for (Fibre& fibre : block.fibres) getcontext(&fibre.context);  // a system call
    }
    for (unsigned t = 0; t < threads; ++t) {
        Fibre& fibre = block.fibres[t];
        fibre.done = false;
        fibre.context.uc_stack.ss_sp = block.stack(t);
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = &scheduler;
        makecontext(&fibre.context, run_fibre, 0);
        // At each switch AddressSanitizer would forget what it knows about a stack of this size.
        fibre.context.uc_stack.ss_size = 0;
    }
}

// Runs a block until it is done or all its threads wait for other blocks. Returns whether it made progress.
inline bool run(Block& next) {
    using ial::gpu::ial_shared;
    const unsigned threads = blockDim.x;
    block = &next;
    blockIdx = next.index;
    ASAN_UNPOISON_MEMORY_REGION(ial_shared, kMaxSharedBytes);
    std::copy(next.shared.begin(), next.shared.end(), ial_shared);
    ASAN_POISON_MEMORY_REGION(ial_shared + next.shared.size(), kMaxSharedBytes - next.shared.size());
    bool advanced = false;
    do {
        progress = false;
        next.done = true;
        for (unsigned i = 0; i < threads; ++i) {
            threadIdx.x = next.descending ? threads - 1 - i : i;
            if (next.fibres[threadIdx.x].done) continue;
            next.done = false;
            swapcontext(&scheduler, &next.fibres[threadIdx.x].context);
            if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
        }
        advanced |= progress;
    } while (progress);
    std::copy_n(ial_shared, next.shared.size(), next.shared.begin());
    return advanced;
}

constexpr const char* kRefused = "simt: CUDA would reject this launch";

template <typename... Parameters, typename... Arguments>
void launch(bool cooperative, void (*function)(Parameters...), dim3 size, int threads, size_t shared,
            const Arguments&... arguments) {
    if (size.x == 0 || size.y == 0 || threads % kWarp != 0 || shared > kMaxSharedBytes ||
        (cooperative && size.y > 1))
        throw std::logic_error(kRefused);
    kernel = [&] { function(arguments...); };
    gridDim = size;
    blockDim = dim3(threads);
    grid = {};
    // A launch that failed left some fibres in the middle of a kernel.
    if (!std::all_of(blocks.begin(), blocks.end(), [](const Block& each) { return each.done; }))
        blocks.clear();
    if (const size_t count = cooperative ? size.x : 1; blocks.size() < count) blocks.resize(count);
    constexpr const char* kStuck = "simt: not all threads arrive at a barrier";
    if (!cooperative) {
        for (unsigned y = 0; y < size.y; ++y)
            for (unsigned x = 0; x < size.x; ++x) {
                start(blocks[0], dim3(x, y), shared);
                run(blocks[0]);
                if (!blocks[0].done) throw std::logic_error(kStuck);
            }
        return;
    }
    for (unsigned x = 0; x < size.x; ++x) start(blocks[x], dim3(x), shared);
    for (bool alive = true; alive;) {
        bool advanced = false;
        alive = false;
        for (Block& each : blocks) {
            if (each.done) continue;  // or of an earlier launch
            advanced |= run(each);
            alive |= !each.done;
        }
        if (alive && !advanced) throw std::logic_error(kStuck);
    }
}

}  // namespace simt

template <typename T>
void __stcs(T* to, T value) {
    simt::expect(simt::kGlobal, to, "__stcs");
    *to = value;
}
template <typename T>
T __ldcg(const T* from) {
    simt::expect(simt::kGlobal, from, "__ldcg");
    return *from;
}
// Every PTX instruction for shared memory needs this conversion. No kernel uses one yet.
inline size_t __cvta_generic_to_shared(const void* address) {
    simt::expect(simt::kShared, address, "__cvta_generic_to_shared");
    return reinterpret_cast<size_t>(address);
}

#define __syncthreads() simt::syncthreads(__FILE__, __LINE__)
#define __syncwarp() simt::syncwarp(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) simt::shuffle_xor(value, lanes)
#define grid_barrier() simt::syncgrid(__FILE__, __LINE__)
