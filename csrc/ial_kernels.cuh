// The CUDA kernels. They see plain structs, never a tensor; who launches them, and on what, is not their
// business (ial_launch.h).
//
// A thread owns a tile: V pixels that lie side by side, 16 bytes of a row or, of many classes, 8, and all
// their classes in registers, B at a time. Where rows cannot be cut into aligned vectors, V is 1 and a pixel
// lies wherever its strides say. Block b of the `blocks` of an image takes its tiles b, b + blocks, ... in
// units of kThreads. Which thread adds what depends on the grid alone, and sums are added in a fixed order
// without atomics, so a result is bitwise the same from run to run.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// 2^x within 2 ulp, 0 where that is subnormal: PTX that CUDA C++ has no word for.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
#endif

#include <type_traits>

#include "ial_math.h"

namespace ial {
namespace gpu {

// Threads of a block and of a warp, and what fits into a kernel's parameters beside the rest of them.
constexpr int kThreads = 128, kWarp = 32, kMaxClasses = 1024, kMaxLevels = 256;

// Blocks of reduce and gradient that a multiprocessor must hold: it leaves a thread all 255 registers.
// Without a number the compiler aims at more blocks, at the price of a few spills.
constexpr int kLeastBlocks = 2;

// -------------------------------------------------------------------------------------------------
// Numbers: half precision is computed in float

template <typename T>
struct Arithmetic {
    using A = float;
};
template <>
struct Arithmetic<double> {
    using A = double;
};

#define IAL_D __device__ __forceinline__

IAL_D float widen(float x) { return x; }
IAL_D double widen(double x) { return x; }
IAL_D float widen(__half x) { return __half2float(x); }
IAL_D float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

IAL_D void narrow(float x, float* to) { *to = x; }
IAL_D void narrow(double x, double* to) { *to = x; }
IAL_D void narrow(float x, __half* to) { *to = __float2half_rn(x); }
IAL_D void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// Of a number and a NaN, the number.
IAL_D float larger(float a, float b) { return fmaxf(a, b); }
IAL_D double larger(double a, double b) { return fmax(a, b); }
IAL_D float smaller(float a, float b) { return fminf(a, b); }
IAL_D double smaller(double a, double b) { return fmin(a, b); }

// For x <= 0. The rounding of the product is an error of |x| half ulp, but then e^x is small beside the 1
// that the softmax of a pixel always has. expf would cost four times the instructions, and more than the
// memory.
IAL_D float exponential(float x) { return ex2_approx_ftz(x * 1.44269504f); }
IAL_D double exponential(double x) { return exp(x); }
IAL_D float logarithm(float x) { return logf(x); }
IAL_D double logarithm(double x) { return log(x); }

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T lane[V];
};

// The machine's word for a pack of 8 or 16 bytes, which it reads and writes in one go.
template <typename P>
using Word = std::conditional_t<sizeof(P) == 16, uint4, uint2>;

template <typename T, int V>
IAL_D Pack<T, V> load_pack(const T* from) {
    Pack<T, V> pack;
    if constexpr (sizeof(pack) == 8 || sizeof(pack) == 16) {
        const auto word = *reinterpret_cast<const Word<Pack<T, V>>*>(from);
        __builtin_memcpy(&pack, &word, sizeof(word));
    } else {
        pack = *reinterpret_cast<const Pack<T, V>*>(from);
    }
    return pack;
}

// Past what the caches keep: nobody reads it again soon.
template <typename T, int V>
IAL_D void store_pack(T* to, const Pack<T, V>& pack) {
    if constexpr (sizeof(pack) == 8 || sizeof(pack) == 16) {
        Word<Pack<T, V>> word;
        __builtin_memcpy(&word, &pack, sizeof(word));
        __stcs(reinterpret_cast<Word<Pack<T, V>>*>(to), word);
    } else {
        *reinterpret_cast<Pack<T, V>*>(to) = pack;
    }
}

// Lets the compiler forget that it has widened the lanes of `pack`: it would keep them, in twice the
// registers that the half-precision lanes take, from one pass over the classes to the next.
template <typename T, int V>
IAL_D void forget_widened(Pack<T, V>& pack) {
    if constexpr (sizeof(T) == 2 && V > 1) {
        Word<Pack<T, V>> word;
        __builtin_memcpy(&word, &pack, sizeof(pack));
        if constexpr (sizeof(pack) == 16)
            asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
        else
            asm volatile("" : "+r"(word.x), "+r"(word.y));
        __builtin_memcpy(&pack, &word, sizeof(pack));
    }
}

IAL_D double warp_sum(double value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// -------------------------------------------------------------------------------------------------
// A tile

template <typename T>
struct Problem {
    using A = typename Arithmetic<T>::A;

    Layout layout;
    const T* logits;
    const void* target;
    const A* weight;        // [C], or null for ones
    const A* pixel_weight;  // or null for ones
    int64_t ignore_index;
    Label label;
    bool dense_labels;  // a tile's labels are one aligned vector
    int levels;
    int blocks;   // of an image
    bool staged;  // channels lie side by side, and pixels too: see Slab
    uint8_t class_levels[kMaxClasses];

    IAL_D A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }
};

// label[j]: the class of pixel j, -1 where it has none. Returns whether a label is neither a class nor
// ignore_index.
template <int V, typename L>
IAL_D bool classify(const L* from, int64_t stride, bool dense, int64_t classes, int64_t ignore, int* label) {
    Pack<L, V> pack;
    if (dense) {
        pack = load_pack<L, V>(from);
    } else {
        for (int j = 0; j < V; ++j) pack.lane[j] = from[j * stride];
    }
    bool bad = false;
    for (int j = 0; j < V; ++j) {
        const int64_t y = pack.lane[j];
        const bool is_class = y >= 0 && y < classes && y != ignore;
        label[j] = is_class ? static_cast<int>(y) : -1;
        bad |= !is_class && y != ignore;
    }
    return bad;
}

// V pixels x up to B classes in registers; more classes take turns. The number of classes is never a constant
// to the compiler: given one, it widens all of them at once and runs out of registers.
template <typename T_, int V_, int B>
struct Tile {
    using T = T_;
    using A = typename Arithmetic<T>::A;
    static constexpr int V = V_;

    const Problem<T>& problem;
    const int64_t image, pixel;  // the first of the tile
    const int classes;
    const T* const from;    // its logit of class 0
    const int64_t channel;  // from there to the next class
    const A* const weight;  // its pixel weight, or null
    Pack<T, V> x[B];
    A max[V], sum[V];
    int label[V];
    bool bad_label;

    IAL_D Tile(const Problem<T>& problem, int64_t image, int64_t pixel, const T* from, int64_t channel)
        : problem(problem),
          image(image),
          pixel(pixel),
          classes(static_cast<int>(problem.layout.classes)),
          from(from),
          channel(channel),
          weight(problem.pixel_weight
                     ? problem.pixel_weight + problem.layout.offset(problem.layout.pixel_weight, image, pixel)
                     : nullptr) {
        load_labels();
        softmax();
    }

    IAL_D void load_labels() {
        const View& view = problem.layout.target;
        const int64_t first = problem.layout.offset(view, image, pixel), ignore = problem.ignore_index;
        const bool dense = problem.dense_labels;
        const void* const target = problem.target;
        switch (problem.label) {
            case Label::kUInt8:
                bad_label = classify<V>(static_cast<const uint8_t*>(target) + first, view.pixel, dense,
                                        classes, ignore, label);
                break;
            case Label::kInt32:
                bad_label = classify<V>(static_cast<const int32_t*>(target) + first, view.pixel, dense,
                                        classes, ignore, label);
                break;
            default:
                bad_label = classify<V>(static_cast<const int64_t*>(target) + first, view.pixel, dense,
                                        classes, ignore, label);
        }
    }

    // Does `body(i, c)` for each class c that is in x[i] when x holds the classes from `first`.
    template <typename Body>
    IAL_D void for_classes(int first, const Body& body) const {
#pragma unroll
        for (int i = 0; i < B; ++i)
            if (first + i < classes) body(i, first + i);
    }

    IAL_D void load_logits(int first) {
        for_classes(first, [&](int i, int c) { x[i] = load_pack<T, V>(from + c * channel); });
    }

    // max_c x_c and sum_c exp(x_c - max). While all logits are -inf, exp(x_c - 0) = 0 stands for their terms:
    // -inf - -inf would be NaN though a finite logit may follow.
    IAL_D void softmax() {
        for (int j = 0; j < V; ++j) {
            max[j] = -HUGE_VALF;
            sum[j] = 0;
        }
        for (int first = 0; first < classes; first += B) {
            load_logits(first);
            A seen[V], shift[V];
            for (int j = 0; j < V; ++j) seen[j] = max[j];
            for_classes(first, [&](int i, int) {
                for (int j = 0; j < V; ++j) max[j] = larger(max[j], widen(x[i].lane[j]));
            });
            for (int j = 0; j < V; ++j) {
                shift[j] = max[j] == -HUGE_VALF ? A(0) : max[j];
                if (first > 0) sum[j] *= exponential(seen[j] - shift[j]);
            }
            for_classes(first, [&](int i, int) {
                forget_widened(x[i]);
                for (int j = 0; j < V; ++j) sum[j] += exponential(widen(x[i].lane[j]) - shift[j]);
            });
        }
    }

    // The class of pixel j, or any where it has none.
    IAL_D int some_class(int j) const { return label[j] < 0 ? 0 : label[j]; }

    // x_y - max. x[y] would take the registers' address; the caches still have it.
    IAL_D A shifted_target(int j) const { return widen(from[j + some_class(j) * channel]) - max[j]; }

    IAL_D A pixel_weight(int j) const {
        return weight ? weight[j * problem.layout.pixel_weight.pixel] : A(1);
    }

    // dL/dX_c = scale p_c + [c = y] extra, with scale = extra = 0 for pixels without a class. An exponential
    // is never above 1, and bounded by it is never NaN either: where a logit is not finite, the gradient of
    // such a pixel is still 0, and that of the others is NaN by their scale.
    IAL_D void store_gradient(T* to, int64_t to_channel, const A* scale, const A* extra) {
        for (int first = 0; first < classes; first += B) {
            if (classes > B) load_logits(first);
            for_classes(first, [&](int i, int c) {
                Pack<T, V> g;
                forget_widened(x[i]);
                for (int j = 0; j < V; ++j) {
                    const A e = smaller(exponential(widen(x[i].lane[j]) - max[j]), A(1));
                    narrow(e * scale[j] + (label[j] == c ? extra[j] : A(0)), &g.lane[j]);
                }
                store_pack<T, V>(to + c * to_channel, g);
            });
        }
    }
};

// Channels-last logits: the 32 pixels of a warp lie in one piece, which its lanes carry to and from shared
// memory, element by element in order. Straight from global memory each lane would read and write a line of
// its own. slab: [kWarp, classes], one of those of the block's warps
template <typename T>
struct Slab {
    T* const slab;
    const int classes, lane;

    IAL_D Slab(unsigned char* shared, int64_t classes)
        : slab(reinterpret_cast<T*>(shared) + threadIdx.x / kWarp * kWarp * classes),
          classes(static_cast<int>(classes)),
          lane(threadIdx.x % kWarp) {}

    IAL_D T* own() const { return slab + lane * classes; }

    // Elements of the warp's pixels that are in the image; `pixel` is the lane's own.
    IAL_D int64_t first(int64_t pixel) const { return (pixel - lane) * classes; }
    IAL_D int count(int64_t pixel, int64_t pixels) const {
        const int64_t rest = pixels - (pixel - lane);
        return classes * static_cast<int>(rest < 0 ? 0 : rest < kWarp ? rest : kWarp);
    }

    // `image`: the first element of an image. Whatever the lanes did in the slab before is done.
    IAL_D void load(const T* image, int64_t pixel, int64_t pixels) const {
        __syncwarp();
        const int elements = count(pixel, pixels);
        for (int i = lane; i < elements; i += kWarp) slab[i] = image[first(pixel) + i];
        __syncwarp();
    }
    IAL_D void store(T* image, int64_t pixel, int64_t pixels) const {
        __syncwarp();
        const int elements = count(pixel, pixels);
        for (int i = lane; i < elements; i += kWarp) image[first(pixel) + i] = slab[i];
    }
};

template <typename T>
constexpr size_t slab_bytes(int64_t classes) {
    return kThreads * classes * sizeof(T);
}

// The rounds of a block, and the first pixel of its thread's tile in each: beyond the image in some threads
// of the last round.
template <int V>
struct Rounds {
    int64_t count, first, step;

    IAL_D Rounds(const Layout& layout, int blocks, int block) {
        first = (int64_t(block) * kThreads + threadIdx.x) * V;
        step = int64_t(blocks) * kThreads * V;
        count = (layout.pixels + step - 1) / step;
    }
    IAL_D int64_t pixel(int64_t round) const { return first + round * step; }
};

// -------------------------------------------------------------------------------------------------
// reduce

template <typename A>
struct ReduceClass {
    A weight;
    int level;  // counted from the first one that the block sums
};

// Sums of pixels of one level in a row, in registers until the level changes: labels come in patches. Then
// they join the thread's own column of columns[levels, kStats, kThreads] in shared memory.
template <typename A>
struct Run {
    A* const column;
    int level = -1;
    A sums[kStats] = {};

    IAL_D explicit Run(A* column) : column(column) {}

    IAL_D void add(int to, A s, A pi, A w) {
        if (to != level) {
            flush();
            level = to;
        }
        sums[kS] += s;
        sums[kP2] += pi * pi;
        sums[kQ2] += (1 - pi) * (1 - pi);
        sums[kCount] += 1;
        sums[kWeight] += w;
    }

    IAL_D void flush() {
        for (int s = 0; s < kStats; ++s) {
            if (level >= 0) column[(level * kStats + s) * kThreads] += sums[s];
            sums[s] = 0;
        }
    }
};

template <typename A>
constexpr size_t reduce_shared_bytes(int64_t classes, int levels) {
    return classes * sizeof(ReduceClass<A>) + size_t(levels) * kStats * kThreads * sizeof(A);
}

// Grid (images x blocks, groups of levels): what a block has shared memory for are `block_levels` levels, and
// further groups read the logits again. partial: [images, levels, kStats, blocks]. A label that is neither a
// class nor ignore_index makes its image's S_0, which no gradient depends on, NaN.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    reduce_kernel(const __grid_constant__ Problem<typename Tile::T> problem, int block_levels,
                  double* partial) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const int first_level = blockIdx.y * block_levels;
    const int levels =
        block_levels < problem.levels - first_level ? block_levels : problem.levels - first_level;
    const int64_t image = blockIdx.x / problem.blocks;
    const int block = blockIdx.x % problem.blocks;

    const size_t slabs = problem.staged ? slab_bytes<T>(problem.layout.classes) : 0;
    const Slab<T> slab(ial_shared, problem.layout.classes);
    auto* const by_class = reinterpret_cast<ReduceClass<A>*>(ial_shared + slabs);
    for (int c = threadIdx.x; c < problem.layout.classes; c += kThreads)
        by_class[c] = {problem.weight_of(c), problem.class_levels[c] - first_level};
    A* const columns = reinterpret_cast<A*>(by_class + problem.layout.classes);
    A* const column = columns + threadIdx.x;
    for (int slot = 0; slot < levels * kStats; ++slot) column[slot * kThreads] = 0;
    __syncthreads();

    Run<A> run(column);
    bool bad_label = false;
    const Rounds<Tile::V> rounds(problem.layout, problem.blocks, block);
    const View& view = problem.layout.logits;
    for (int64_t round = 0; round < rounds.count; ++round) {
        const int64_t pixel = rounds.pixel(round);
        const bool staged = Tile::V == 1 && problem.staged;
        if (staged) slab.load(problem.logits + image * view.batch, pixel, problem.layout.pixels);
        if (pixel >= problem.layout.pixels) continue;
        const T* const from =
            staged ? slab.own() : problem.logits + problem.layout.offset(view, image, pixel);
        const Tile tile(problem, image, pixel, from, view.channel);
        bad_label |= tile.bad_label;
#pragma unroll
        for (int j = 0; j < Tile::V; ++j) {
            const ReduceClass<A> its = by_class[tile.some_class(j)];
            const A shifted = tile.shifted_target(j), w = its.weight * tile.pixel_weight(j);
            const A s = w * (logarithm(tile.sum[j]) - shifted), pi = exponential(shifted) / tile.sum[j];
            if (tile.label[j] >= 0 && its.level >= 0 && its.level < levels) run.add(its.level, s, pi, w);
        }
    }
    run.flush();
    if (bad_label && first_level == 0) column[kS * kThreads] = NAN;
    __syncthreads();

    const int lane = threadIdx.x % kWarp;
    for (int slot = threadIdx.x / kWarp; slot < levels * kStats; slot += kThreads / kWarp) {
        double total = 0;
        for (int i = lane; i < kThreads; i += kWarp) total += columns[slot * kThreads + i];
        total = warp_sum(total);
        const int64_t row = (image * problem.levels + first_level) * kStats + slot;
        if (lane == 0) partial[row * problem.blocks + block] = total;
    }
}

// One warp for each of the sums: stats[i] = sum over b of partial[i, b]
static __global__ void __launch_bounds__(kWarp) sum_kernel(const double* partial, int blocks, double* stats) {
    const double* const from = partial + int64_t(blockIdx.x) * blocks;
    double total = 0;
    for (int b = threadIdx.x; b < blocks; b += kWarp) total += from[b];
    total = warp_sum(total);
    if (threadIdx.x == 0) stats[blockIdx.x] = total;
}

// -------------------------------------------------------------------------------------------------
// gradient

template <typename A>
struct alignas(16) GradientClass {
    A ds, dp2, dq2;  // dL/dstats of its level
    A weight;
};

template <typename A>
constexpr size_t gradient_shared_bytes(int64_t classes) {
    return classes * sizeof(GradientClass<A>);
}

// The gradient of a tile, to its pixels' class 0 at `to` and the others `channel` apart.
template <typename Tile>
IAL_D void differentiate(Tile& tile, const GradientClass<typename Tile::A>* by_class, bool exact,
                         typename Tile::T* to, int64_t channel) {
    using A = typename Tile::A;
    A scale[Tile::V], extra[Tile::V];
#pragma unroll
    for (int j = 0; j < Tile::V; ++j) {
        const GradientClass<A> its = by_class[tile.some_class(j)];
        const A inverse = A(1) / tile.sum[j], pi = exponential(tile.shifted_target(j)) * inverse;
        const PixelGradient<A> pixel(its.ds, its.dp2, its.dq2, its.weight * tile.pixel_weight(j), pi,
                                     exact ? A(1) : A(0));
        scale[j] = tile.label[j] < 0 ? A(0) : pixel.scale * inverse;
        extra[j] = tile.label[j] < 0 ? A(0) : pixel.extra;
    }
    tile.store_gradient(to, channel, scale, extra);
}

// Grid (images x blocks). Images, and the tiles of a block, go backwards: L2 still has what reduce read last.
// grad may be the logits themselves: a thread reads all of its tile before it writes, or, where classes take
// turns, each turn before it is overwritten. table: [images, levels, kStats]
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    gradient_kernel(const __grid_constant__ Problem<typename Tile::T> problem, const double* table,
                    bool exact, typename Tile::T* grad) {
    using T = typename Tile::T;
    using A = typename Tile::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const unsigned index = gridDim.x - 1 - blockIdx.x;
    const int64_t image = index / problem.blocks;

    const size_t slabs = problem.staged ? slab_bytes<T>(problem.layout.classes) : 0;
    const Slab<T> slab(ial_shared, problem.layout.classes);
    auto* const by_class = reinterpret_cast<GradientClass<A>*>(ial_shared + slabs);
    for (int c = threadIdx.x; c < problem.layout.classes; c += kThreads) {
        const double* const row = table + (image * problem.levels + problem.class_levels[c]) * kStats;
        by_class[c] = {A(row[kS]), A(row[kP2]), A(row[kQ2]), problem.weight_of(c)};
    }
    __syncthreads();

    const Rounds<Tile::V> rounds(problem.layout, problem.blocks, index % problem.blocks);
    const View &logits = problem.layout.logits, &view = problem.layout.grad;
    for (int64_t round = rounds.count - 1; round >= 0; --round) {
        const int64_t pixel = rounds.pixel(round);
        const bool staged = Tile::V == 1 && problem.staged;
        if (staged) slab.load(problem.logits + image * logits.batch, pixel, problem.layout.pixels);
        if (pixel < problem.layout.pixels) {
            const T* const from =
                staged ? slab.own() : problem.logits + problem.layout.offset(logits, image, pixel);
            T* const to = staged ? slab.own() : grad + problem.layout.offset(view, image, pixel);
            Tile tile(problem, image, pixel, from, logits.channel);
            differentiate(tile, by_class, exact, to, view.channel);
        }
        if (staged) slab.store(grad + image * view.batch, pixel, problem.layout.pixels);
    }
}

// -------------------------------------------------------------------------------------------------
// combine and table: one block, a thread an image

struct Lambdas {
    double value[kMaxLevels - 1];
};

// The sums that every thread will read, brought nearer where there is room for them.
IAL_D const double* staged(const Combine& c, bool fits) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    if (!fits) return c.stats;
    double* const near = reinterpret_cast<double*>(ial_shared);
    for (int64_t i = threadIdx.x; i < c.batch * c.levels * kStats; i += kThreads) near[i] = c.stats[i];
    __syncthreads();
    return near;
}

// f: [N or 1, g - 1]; image_losses: [N]; loss: [N] or [1]
template <typename L>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Combine c, const __grid_constant__ Lambdas lambdas, bool fits, double* f,
                   double* image_losses, L* loss) {
    c.lambdas = lambdas.value;
    c.stats = staged(c, fits);
    if (c.pool_batch) {
        if (threadIdx.x == 0) factors(c, 0, c.batch, f);
        __syncthreads();
    }
    for (int64_t n = threadIdx.x; n < c.batch; n += kThreads) {
        double* const own = c.pool_batch ? f : f + n * (c.levels - 1);
        if (!c.pool_batch) factors(c, n, n + 1, own);
        image_losses[n] = image_loss(c, n, own);
        if (c.reduction == Reduction::kNone) loss[n] = static_cast<L>(image_losses[n]);
    }
    __syncthreads();
    if (c.reduction == Reduction::kNone || threadIdx.x > 0) return;
    double total = 0;
    for (int64_t n = 0; n < c.batch; ++n) total += image_losses[n];
    const double weight = c.reduction == Reduction::kMean ? c.weight() : 1;
    *loss = static_cast<L>(weight != 0 ? total / weight : 0);
}

template <typename G>
__global__ void __launch_bounds__(kThreads) table_kernel(Combine c, const __grid_constant__ Lambdas lambdas,
                                                         bool fits, const G* grad_loss, double* to) {
    c.lambdas = lambdas.value;
    c.stats = staged(c, fits);
    const double weight = c.weight();
    if (!c.pool_batch)
        for (int64_t n = threadIdx.x; n < c.batch; n += kThreads) table(c, n, n + 1, grad_loss, weight, to);
    else if (threadIdx.x == 0)
        table(c, 0, c.batch, grad_loss, weight, to);
}

#undef IAL_D

}  // namespace gpu
}  // namespace ial
