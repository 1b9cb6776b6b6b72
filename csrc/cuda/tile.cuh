// A tile: a few neighbouring pixels of a CUDA thread, with their classes in registers. Also the labels of a
// tile, the staging of channels-last logits in shared memory, and the grid-stride loop over the tiles.
#pragma once

#include "../layout.h"
#include "../loss.h"
#include "arithmetic.cuh"

namespace ial::gpu {

// Threads of a warp, and of a block of most kernels. kMaxClasses and kMaxLevels are limited by the size of
// kernel parameters.
constexpr int kWarp = 32, kThreads = 128, kMaxClasses = 1024, kMaxLevels = 256;

// The shared memory of a block that does not request more.
constexpr size_t kSharedBytes = 48 << 10;

IAL_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The operands of a kernel, for any layout of the pixels.
template <typename T>
struct Operands {
    using A = typename Arithmetic<T>::A;

    const T* logits;
    const void* target;
    const A* weight;        // [C], or null for ones
    const A* pixel_weight;  // or null for ones
    int64_t ignore_index;
    Label label;
    int classes, levels;
    int blocks;  // blocks per image
    // Label smoothing: the shares of a pixel's cross-entropy that the target and each class have, 1 - eps and
    // eps / C. Used if Tile::kSmooth or Chunk::kSmooth is set.
    A target_share, class_share;
    uint8_t class_levels[kMaxClasses];

    IAL_D A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }

    // Calls body(target) with a pointer to the type of the labels.
    template <typename Body>
    IAL_D void with_target(const Body& body) const {
        switch (label) {
            case Label::kUInt8:
                body(static_cast<const uint8_t*>(target));
                break;
            case Label::kInt32:
                body(static_cast<const int32_t*>(target));
                break;
            default:
                body(static_cast<const int64_t*>(target));
        }
    }
};

template <typename T>
struct Problem : Operands<T> {
    Layout layout;
    bool dense_labels;  // the labels of a tile are one aligned vector
    bool staged;        // channels and pixels are contiguous; see Staging
};

// Returns the class of label y, or -1. Sets `bad` if y is neither a class nor ignore_index.
IAL_D int class_of(int64_t y, int64_t classes, int64_t ignore, bool* bad) {
    const bool is_class = static_cast<uint64_t>(y) < static_cast<uint64_t>(classes) && y != ignore;
    *bad |= !is_class && y != ignore;
    return is_class ? static_cast<int>(y) : -1;
}

// Sets label[j] to the class of pixel j, or to -1. Returns whether a label is neither a class nor
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
    for (int j = 0; j < V; ++j) label[j] = class_of(pack.lane[j], classes, ignore, &bad);
    return bad;
}

template <typename A, int V>
struct LabelsBase {
    int label[V];  // the class of pixel j, or -1
    bool bad;      // a label is neither a class nor ignore_index
    const A* weight;

    IAL_D bool has(int j) const { return label[j] >= 0; }

    // The class of pixel j, or class 0 if the pixel has none.
    IAL_D int class_or_any(int j) const { return label[j] < 0 ? 0 : label[j]; }
};

// The labels and pixel weights of the V pixels of a tile.
template <typename T, int V, typename A = typename Arithmetic<T>::A>
struct Labels : LabelsBase<A, V> {
    int64_t weight_stride;

    IAL_D void read(const Problem<T>& problem, int64_t image, int64_t pixel) {
        const Layout& layout = problem.layout;
        const int64_t first = layout.offset(layout.target, image, pixel), stride = layout.target.pixel;
        const auto load = [&](auto* labels) {
            this->bad = classify<V>(labels + first, stride, problem.dense_labels, layout.classes,
                                    problem.ignore_index, this->label);
        };
        problem.with_target(load);
        weight_stride = layout.pixel_weight.pixel;
        this->weight = problem.pixel_weight
                           ? problem.pixel_weight + layout.offset(layout.pixel_weight, image, pixel)
                           : nullptr;
    }

    IAL_D A pixel_weight(int j) const { return this->weight ? this->weight[j * weight_stride] : A(1); }
};

// The largest number of classes that a tile holds in registers. More classes take several passes over the
// logits.
constexpr int kRegisterClasses = 32;

// V pixels and up to B classes in registers. A row of a tile is V neighbouring pixels of a class: 16 or 8
// bytes. V is 1 if the logits cannot be split into aligned vectors. Pixels may then have any strides.
//
// The number of classes is never a compile-time constant. With a constant, the compiler widens all classes at
// once and runs out of registers.
template <typename T_, int V_, int B_, bool Smooth = false>
struct Tile {
    using T = T_;
    using A = typename Arithmetic<T>::A;
    static constexpr int V = V_, B = B_;
    static constexpr bool kSmooth = Smooth;  // with label smoothing
    static constexpr bool kHasPasses = B == kRegisterClasses;

    const Problem<T>& problem;
    const int classes;
    Labels<T, V> labels;
    const T* from;    // the logit of class 0 at the first pixel
    int64_t channel;  // the stride from one class to the next
    Pack<T, V> x[B];
    A max[V], sum[V];  // max_c x_c, sum_c exp(x_c - max)
    A target[V];       // x_y - max
    A smooth[V];       // if kSmooth: sum_c w_c (x_c - max) with class weights w_c
    A weights;         // if kSmooth: sum_c w_c

    IAL_D explicit Tile(const Problem<T>& problem) : problem(problem), classes(problem.classes) {}

    // Reads the pixels from `pixel` of an image. Their logits are at `from_`. Logits are loaded first, so
    // that labels and weights are loaded while they arrive.
    template <typename Class>
    IAL_D void read(int64_t image, int64_t pixel, const T* from_, int64_t channel_, const Class* by_class) {
        from = from_;
        channel = channel_;
        load_logits(0);
        labels.read(problem, image, pixel);
        T x_y[V];
        for (int j = 0; j < V; ++j) x_y[j] = from[j + labels.class_or_any(j) * channel];
        softmax(by_class);
        for (int j = 0; j < V; ++j) target[j] = widen(x_y[j]) - max[j];
    }

    // e^(x_y - max)
    IAL_D A target_exp(int j) const { return exponential(target[j]); }

    // Calls body(first) for each pass, with its first class.
    template <typename Body>
    IAL_D void for_passes(const Body& body) {
        if constexpr (kHasPasses) {
#pragma unroll 1
            for (int first = 0; first < classes; first += B) body(first);
        } else {
            body(0);
        }
    }

    // Calls body(i) for each class first + i of a pass.
    template <typename Body>
    IAL_D void for_classes(int first, const Body& body) const {
#pragma unroll
        for (int i = 0; i < B; ++i)
            if (first + i < classes) body(i);
    }

    IAL_D void load_logits(int first) {
        const T* at = from + first * channel;
        for_classes(first, [&](int i) {
            x[i] = load_pack<T, V>(at);
            at += channel;
        });
    }

    // While all logits so far are -inf, the shift is 0 and their terms are exp(-inf - 0) = 0. With a shift of
    // -inf the terms would be NaN, although a finite logit may follow.
    template <typename Class>
    IAL_D void softmax(const Class* by_class) {
        Pack<T, V> running_max;
        for (int j = 0; j < V; ++j) {
            narrow(-HUGE_VALF, &running_max.lane[j]);
            sum[j] = smooth[j] = 0;
        }
        weights = 0;
        for_passes([&](int first) {
            if (first > 0) load_logits(first);
            A before[V], shift[V];
            for (int j = 0; j < V; ++j) before[j] = widen(running_max, j);
            for_classes(first, [&](int i) { update_max(running_max, x[i]); });
            for (int j = 0; j < V; ++j) {
                max[j] = widen(running_max, j);
                shift[j] = max[j] == -HUGE_VALF ? A(0) : max[j];
                if (first > 0) sum[j] *= exponential(before[j] - shift[j]);
                if (Smooth && first > 0)
                    smooth[j] = multiply_add(weights, (before[j] == -HUGE_VALF ? A(0) : before[j]) - shift[j],
                                             smooth[j]);
            }
            for_classes(first, [&](int i) {
                for (int j = 0; j < V; ++j) sum[j] += exponential(widen(x[i], j) - shift[j]);
            });
            if constexpr (Smooth)
                for_classes(first, [&](int i) {
                    const A w = by_class[first + i].weight;
                    for (int j = 0; j < V; ++j)
                        smooth[j] = multiply_add(w, widen(x[i], j) - shift[j], smooth[j]);
                    weights += w;
                });
        });
    }

    // Writes the logits of at most B classes to `to`, with a stride of `step` elements between packs.
    IAL_D void store_logits(T* to, int64_t step) const {
        for_classes(0, [&](int i) {
            store_pack(to, x[i]);
            to += step;
        });
    }

    // Writes dL/dX_c = scale e^(x_c - max) - soft w_c, and `target_grad` for the target class. For a pixel
    // without a class, scale and soft are 0. If its logits are not finite, they are replaced by 0, because 0
    // times e^x would be NaN. soft is used if kSmooth.
    template <typename Class>
    IAL_D void store_gradient(T* to, int64_t step, const A* scale, const A* soft, const A* target_grad,
                              const Class* by_class) {
        Pack<T, V> at_target;
        bool non_finite = false;
        for (int j = 0; j < V; ++j) {
            narrow(target_grad[j], &at_target.lane[j]);
            non_finite |= labels.label[j] < 0 && !(sum[j] > 0 && sum[j] < HUGE_VALF);
        }
        for_passes([&](int first) {
            if (kHasPasses && classes > B) load_logits(first);  // x holds the logits of the last pass
            if (non_finite) clear_ignored(first);
            const TargetClass<T, V> target_class(labels.label, first, B);
            for_classes(first, [&](int i) {
                Pack<T, V> g;
                forget_widened(x[i]);
                for (int j = 0; j < V; ++j) {
                    const A e = exponential(widen(x[i], j) - max[j]);
                    if constexpr (Smooth)
                        narrow(multiply_add(e, scale[j], -soft[j] * by_class[first + i].weight), &g.lane[j]);
                    else
                        narrow(e * scale[j], &g.lane[j]);
                }
                target_class.replace(g, at_target, i);
                stream_pack(to, g);
                to += step;
            });
        });
    }

    // Sets the logits of pixels without a class to 0.
    IAL_D void clear_ignored(int first) {
        for (int j = 0; j < V; ++j) {
            if (labels.label[j] >= 0) continue;
            max[j] = 0;
            for_classes(first, [&](int i) { narrow(A(0), &x[i].lane[j]); });
        }
    }
};

// Staging of channels-last logits. The logits of the 32 pixels of a warp are contiguous in memory. The lanes
// copy them between global and shared memory in order, one element per lane. Otherwise each lane would access
// a cache line of its own. rows: [kWarp, classes], this warp's part of the block's shared memory.
template <typename T>
struct Staging {
    T* const rows;
    const int classes, lane;

    IAL_D Staging(unsigned char* shared, int64_t classes)
        : rows(reinterpret_cast<T*>(shared) + threadIdx.x / kWarp * kWarp * classes),
          classes(static_cast<int>(classes)),
          lane(threadIdx.x % kWarp) {}

    // The row of this lane's pixel.
    IAL_D T* row() const { return rows + lane * classes; }

    // The offset of the warp's first element in the image, and the number of its elements in the image.
    // `pixel` is this lane's pixel.
    IAL_D int64_t first(int64_t pixel) const { return (pixel - lane) * classes; }
    IAL_D int count(int64_t pixel, int64_t pixels) const {
        const int64_t rest = pixels - (pixel - lane);
        return classes * static_cast<int>(rest < 0 ? 0 : rest < kWarp ? rest : kWarp);
    }

    // `image` points to the image's first element. The first barrier waits until all lanes have finished with
    // the rows.
    IAL_D void load(const T* image, int64_t pixel, int64_t pixels) const {
        __syncwarp();
        const int elements = count(pixel, pixels);
        for (int i = lane; i < elements; i += kWarp) rows[i] = image[first(pixel) + i];
        __syncwarp();
    }
    IAL_D void store(T* image, int64_t pixel, int64_t pixels) const {
        __syncwarp();
        const int elements = count(pixel, pixels);
        for (int i = lane; i < elements; i += kWarp) image[first(pixel) + i] = rows[i];
    }
};

template <typename T>
constexpr size_t staging_bytes(int64_t classes) {
    return kThreads * classes * sizeof(T);
}

// Whether tiles are read from and written to shared memory instead of global memory.
template <typename Tile>
IAL_D bool is_staged(const Tile& tile) {
    return Tile::V == 1 && tile.problem.staged;
}

// Calls body() with the tile at `pixel` of an image, unless `pixel` is beyond the image. All lanes of a warp
// must call this function.
template <typename Tile, typename Class, typename Body>
IAL_D void read_tile(Tile& tile, const Staging<typename Tile::T>& staging, int64_t image, int64_t pixel,
                     const Class* by_class, const Body& body) {
    const auto& problem = tile.problem;
    const Layout& layout = problem.layout;
    const View& view = layout.logits;
    const bool staged = is_staged(tile);
    if (staged) staging.load(problem.logits + image * view.batch, pixel, layout.pixels);
    if (pixel >= layout.pixels) return;
    tile.read(image, pixel, staged ? staging.row() : problem.logits + layout.offset(view, image, pixel),
              view.channel, by_class);
    body();
}

// A grid-stride loop over the tiles of an image. In each iteration, block b of `blocks` takes the next
// `Threads` tiles after those of block b - 1. In the last iteration, pixel() may be beyond the image.
template <int V, int Threads>
struct GridStride {
    int64_t count, first, step;

    IAL_D GridStride(const Layout& layout, int blocks, int block) {
        first = (int64_t(block) * Threads + threadIdx.x) * V;
        step = int64_t(blocks) * Threads * V;
        count = (layout.pixels - int64_t(block) * Threads * V + step - 1) / step;
    }
    IAL_D int64_t pixel(int64_t iteration) const { return first + iteration * step; }
};

}  // namespace ial::gpu
