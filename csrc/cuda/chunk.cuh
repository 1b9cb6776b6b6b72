// A chunk: up to S x S pixels of a cell, the square between four coarse logits, processed by one CUDA thread.
// The upsampled logits exist in registers only.
#pragma once

#include "../bilinear.h"
#include "backward.cuh"

namespace ial::gpu {

// Backward: a block has this many rows of cells, with one warp per row.
constexpr int kCellRows = 8, kCellThreads = kCellRows * kWarp;

template <typename T>
struct UpsampledProblem : Operands<T> {
    Upsampling upsampling;
    int parts_y, parts_x;  // chunks of a cell along each axis
};

// The largest number of pixels of a cell along an axis. Here a line of w coarse logits has w + 1 cells,
// unlike in bilinear.h. All have about the same number of pixels, except the first and the last, which have
// half. The last cell is beyond the last logit. Cell -1 has the pixels before the first logit, which Axis
// counts as cell 0. Only the logit to its right has a weight.
IAL_HD int64_t most_pixels(const Axis& axis) {
    return axis.step > 0 ? divide_up(axis.unit, axis.step) : axis.fine;
}

// A chunk's extent along one axis. The position of pixel d is (step d + origin) / unit. Pixels of cell i have
// positions in [i, i + 1).
template <typename A, int S>
struct Span {
    int64_t first;      // the first pixel
    int count;          // pixels, 0 to S
    int64_t low, high;  // the coarse logits around them
    A fraction[S];      // the weight of `high` for each pixel

    IAL_D void read(const Axis& axis, int64_t cell, int part) {
        const int64_t before = cell * axis.unit - axis.origin;
        const bool from_start = cell < 0 || before <= 0 || axis.step == 0;
        first = (from_start ? 0 : divide_up(before, axis.step)) + int64_t(part) * S;
        low = cell < 0 ? 0 : cell;
        high = cell + 1 < axis.coarse ? cell + 1 : cell;
        const int64_t beyond = axis.step * first - before;
        const A unit = A(1) / static_cast<A>(axis.unit), step = static_cast<A>(axis.step) * unit;
        count = 0;
#pragma unroll
        for (int i = 0; i < S; ++i) {
            count += first + i < axis.fine && beyond + i * axis.step < axis.unit;
            fraction[i] = cell < 0 ? A(1) : high == low ? A(0) : static_cast<A>(beyond) * unit + step * i;
            if (fraction[i] > 1) fraction[i] = 1;  // a pixel outside the cell gets a value between its logits
        }
    }
};

// The values of the four logits around a cell.
template <typename A>
struct Corners {
    A top_left, top_right, bottom_left, bottom_right;

    // The value at fractions y and x, in the fewest instructions. A logit with weight 0 still affects the
    // result, and the difference of two logits may overflow. Every call must round the same way, so that a
    // pixel's target logit equals itself: no product is left for the compiler to contract with an addition.
    IAL_D A interpolate(A y, A x) const {
        const A left = multiply_add(y, bottom_left - top_left, top_left);
        const A right = multiply_add(y, bottom_right - top_right, top_right);
        return multiply_add(x, right - left, left);
    }

    // Returns `sum`, or a non-finite number if a difference in interpolate() is not finite for a y in this
    // range.
    IAL_D A add_differences(A sum, A first_y, A last_y) const {
        const auto across = [this](A y) {
            return multiply_add(y, bottom_right - top_right, top_right) -
                   multiply_add(y, bottom_left - top_left, top_left);
        };
        sum = multiply_add(bottom_left - top_left, bottom_right - top_right, sum);
        return multiply_add(across(first_y), across(last_y), sum);
    }

    // interpolate() for logits of any size. Logits with weight 0 are ignored.
    IAL_D A interpolate_carefully(A y, A x) const {
        return between(between(top_left, bottom_left, y), between(top_right, bottom_right, y), x);
    }
    IAL_D static A between(A a, A b, A f) {
        return f == 0 ? a : f == 1 ? b : multiply_add(f, b, (1 - f) * a);
    }
    IAL_D static A share(A f, A g) { return f == 0 ? A(0) : f * g; }
};

// The labels and weights of the pixels of a chunk. Pixels outside the cell have no class.
template <typename T, int S, typename A = typename Arithmetic<T>::A>
struct ChunkLabels : LabelsBase<A, S * S> {
    Image weights;

    IAL_D void read(const UpsampledProblem<T>& problem, int64_t image, const Span<A, S>& y,
                    const Span<A, S>& x) {
        const Image& target = problem.upsampling.target;
        const int64_t first = target.offset(image, y.first, x.first);
        const auto load = [&](auto* row) {
            row += first;
#pragma unroll
            for (int i = 0; i < S; ++i, row += target.row) {
                auto* at = row;
#pragma unroll
                for (int j = 0; j < S; ++j, at += target.pixel)
                    this->label[i * S + j] =
                        i < y.count && j < x.count
                            ? class_of(*at, problem.classes, problem.ignore_index, &this->bad)
                            : -1;
            }
        };
        this->bad = false;
        problem.with_target(load);
        weights = problem.upsampling.pixel_weight;
        this->weight =
            problem.pixel_weight ? problem.pixel_weight + weights.offset(image, y.first, x.first) : nullptr;
    }

    // Whether the chunk has anything to add. A bad label adds NaN.
    IAL_D bool any() const {
        bool found = this->bad;
        for (int j = 0; j < S * S; ++j) found |= this->has(j);
        return found;
    }

    IAL_D A pixel_weight(int j) const {
        return this->weight && this->has(j) ? this->weight[j / S * weights.row + j % S * weights.pixel]
                                            : A(1);
    }
};

// The thread processes one class after another: it interpolates the four logits around the cell to the
// pixels. The number of classes therefore costs no registers, and the gradient of the four logits is a sum
// over the chunk.
//
// If a logit is infinite, NaN or huge, interpolate() may be wrong. The chunk is then `careful`: it starts
// again with interpolate_carefully(). Logits are in units of to_unit(). In a careful chunk they are in
// natural units, because they may be too large to be scaled.
template <typename T_, int S_, bool Smooth = false>
struct Chunk {
    using T = T_;
    using A = typename Arithmetic<T>::A;
    static constexpr int S = S_, V = S * S;
    static constexpr bool kSmooth = Smooth;  // with label smoothing
    // How far a pixel's target logit may be below the largest logit.
    static constexpr float kFar = 44, kFarSum = 0x1p64f;  // e^44

    const UpsampledProblem<T>& problem;
    Span<A, S> y, x;
    const T *top, *bottom;  // the logits of class 0 to the left of the cell, above and below
    int64_t channel, right;
    ChunkLabels<T, S> labels;
    A shift[V];    // a logit close to the largest; infinite for a pixel without a class
    A sum[V];      // sum_c e^(x_c - shift)
    A target[V];   // x_y - shift, in natural units
    unsigned far;  // bit j is set if target[j] is not 0
    bool careful;  // shift is in natural units
    A smooth[V];   // if kSmooth: sum_c w_c (x_c - shift), in natural units, with class weights w_c
    A weights;     // if kSmooth: sum_c w_c

    IAL_D explicit Chunk(const UpsampledProblem<T>& problem) : problem(problem) {}

    // Sets the position of the chunk, given by its cell and its part of that cell, and reads its labels.
    IAL_D void read(int64_t image, int64_t cell_y, int part_y, int64_t cell_x, int part_x) {
        y.read(problem.upsampling.y, cell_y, part_y);
        x.read(problem.upsampling.x, cell_x, part_x);
        const Image& logits = problem.upsampling.logits;
        top = problem.logits + logits.offset(image, y.low, x.low);
        bottom = problem.logits + logits.offset(image, y.high, x.low);
        channel = logits.channel;
        right = (x.high - x.low) * logits.pixel;
        labels.read(problem, image, y, x);
    }

    IAL_D Corners<A> natural_corners(int c) const {
        const T *const above = top + c * channel, *const below = bottom + c * channel;
        return {widen(above[0]), widen(above[right]), widen(below[0]), widen(below[right])};
    }
    IAL_D Corners<A> corners(int c) const {
        const Corners<A> x = natural_corners(c);
        return {to_unit(x.top_left), to_unit(x.top_right), to_unit(x.bottom_left), to_unit(x.bottom_right)};
    }

    IAL_D A interpolate(const Corners<A>& around, int j) const {
        return around.interpolate(y.fraction[j / S], x.fraction[j % S]);
    }
    IAL_D A interpolate_carefully(const Corners<A>& around, int j) const {
        return around.interpolate_carefully(y.fraction[j / S], x.fraction[j % S]);
    }

    // The shift is the pixel's target logit. It is needed anyway and is usually the largest, so no pass is
    // needed to find the largest.
    template <typename Class>
    IAL_D void softmax(const Class* by_class) {
        Corners<A> around{};
        int last = -1;  // neighbouring pixels tend to have the same class
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int label = labels.label[j];
            if (label >= 0 && label != last) around = corners(last = label);
            shift[j] = label < 0 ? A(HUGE_VALF) : interpolate(around, j);
            sum[j] = target[j] = smooth[j] = 0;
        }
        weights = 0;
        A differences = 0;
#pragma unroll 1
        for (int c = 0; c < problem.classes; ++c) {
            around = corners(c);
            differences = around.add_differences(differences, y.fraction[0], y.fraction[S - 1]);
            for (int j = 0; j < V; ++j) {
                const A x = interpolate(around, j) - shift[j];
                sum[j] += power(x);
                if (Smooth) smooth[j] = multiply_add(by_class[c].weight, x, smooth[j]);
            }
            if (Smooth) weights += by_class[c].weight;
        }
        far = 0;
        careful = !(differences - differences == 0);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            careful |= sum[j] > kFarSum;
            if (Smooth) smooth[j] = from_unit(smooth[j]);
        }
        if (!careful) return;
#pragma unroll
        for (int i = 0; i < S; ++i) careful_softmax(i, by_class);
    }

    // The softmax of row i of a careful chunk: a logit is not finite, or huge, or far larger than a pixel's
    // target logit. All rows at once would not fit the registers.
    template <typename Class>
    IAL_D void careful_softmax(int i, const Class* by_class) {
#pragma unroll
        for (int j = i * S; j < (i + 1) * S; ++j) sum[j] = -HUGE_VALF;
#pragma unroll 1
        for (int c = 0; c < problem.classes; ++c) {
            const Corners<A> around = natural_corners(c);
#pragma unroll
            for (int j = i * S; j < (i + 1) * S; ++j)
                sum[j] = larger(sum[j], interpolate_carefully(around, j));
        }
#pragma unroll
        for (int j = i * S; j < (i + 1) * S; ++j) {
            const A x_y = interpolate_carefully(natural_corners(labels.class_or_any(j)), j);
            const bool near = sum[j] - x_y < kFar;
            if (!near) far |= 1u << j;
            shift[j] = near ? x_y : sum[j];
            target[j] = x_y - shift[j];
            sum[j] = smooth[j] = 0;
        }
#pragma unroll 1
        for (int c = 0; c < problem.classes; ++c) {
            const Corners<A> around = natural_corners(c);
#pragma unroll
            for (int j = i * S; j < (i + 1) * S; ++j) {
                const A x = interpolate_carefully(around, j) - shift[j];
                sum[j] += exponential(x);
                if (Smooth) smooth[j] = multiply_add(by_class[c].weight, x, smooth[j]);
            }
        }
    }

    // e^target. It is 1, or less than e^-44 and then rounded to 0.
    IAL_D A target_exp(int j) const { return far >> j & 1 ? A(0) : A(1); }

    // dL/dX_c = scale e^(x_c - shift) + [c = y] extra - soft w_c. Few classes need `extra`, so it is kept in
    // shared memory, in the thread's column of [V, kCellThreads].
    A scale[V], soft[V];
    A* extra;
    const BackwardClass<A>* by_class;
    unsigned present;  // bit c % 32 is set if a pixel has class c

    // Calls each(j) for each pixel j.
    template <typename Each>
    IAL_D void start_backward(const BackwardClass<A>* classes, bool exact, A* column, const Each& each) {
        by_class = classes;
        extra = column;
        present = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            each(j);
            const TileGradient<A> pixel = differentiate(*this, j, by_class, exact);
            scale[j] = pixel.scale;
            soft[j] = pixel.soft;
            extra[j * kCellThreads] = pixel.extra;
            if (labels.has(j)) present |= 1u << labels.label[j] % 32;
        }
    }

    // The gradient of pixel j and class c without `extra`. e is e^(x_c - shift).
    IAL_D A gradient_of(A e, int j, int c) const {
        if constexpr (Smooth) return multiply_add(e, scale[j], -soft[j] * by_class[c].weight);
        return e * scale[j];
    }

    // The contribution of row i of a careful chunk to the gradient of class c's logits around the cell.
    IAL_D Corners<A> careful_gradient(int i, int c) const {
        const Corners<A> around = natural_corners(c);
        A left = 0, right = 0;
#pragma unroll
        for (int j = i * S; j < (i + 1) * S; ++j) {
            A g = gradient_of(exponential(interpolate_carefully(around, j) - shift[j]), j, c);
            if (labels.label[j] == c) g += extra[j * kCellThreads];
            if (!labels.has(j)) continue;
            left += Corners<A>::share(1 - x.fraction[j % S], g);
            right += Corners<A>::share(x.fraction[j % S], g);
        }
        const A above = 1 - y.fraction[i], below = y.fraction[i];
        return {Corners<A>::share(above, left), Corners<A>::share(above, right),
                Corners<A>::share(below, left), Corners<A>::share(below, right)};
    }

    // The contribution of a whole chunk that is not careful.
    IAL_D Corners<A> gradient(int c) const {
        const Corners<A> around = corners(c);
        A g[V];
        for (int j = 0; j < V; ++j) g[j] = gradient_of(power(interpolate(around, j) - shift[j]), j, c);
        if (present >> c % 32 & 1)
            for (int j = 0; j < V; ++j)
                if (labels.label[j] == c) g[j] += extra[j * kCellThreads];
        A all = 0, right = 0, lower = 0, lower_right = 0;
#pragma unroll
        for (int i = 0; i < S; ++i) {
            A row = 0, row_right = 0;
            for (int j = 0; j < S; ++j) {
                row += g[i * S + j];
                row_right = multiply_add(x.fraction[j], g[i * S + j], row_right);
            }
            all += row;
            right += row_right;
            lower = multiply_add(y.fraction[i], row, lower);
            lower_right = multiply_add(y.fraction[i], row_right, lower_right);
        }
        const A lower_left = lower - lower_right;
        return {all - right - lower_left, right - lower_right, lower_left, lower_right};
    }
};

// Minimum blocks per multiprocessor of the kernels that take one chunk after another.
template <typename Chunk>
constexpr int kReduceBlocks = Chunk::kSmooth ? 3 : 4;

// Calls body(chunk) for each chunk of the thread, in a grid-stride loop over the chunks of an image. They are
// numbered row by row.
template <typename Chunk, typename Class, typename Body>
IAL_D void for_chunks(const UpsampledProblem<typename Chunk::T>& problem, int64_t image, int block,
                      const Class* by_class, const Body& body) {
    Chunk chunk(problem);
    const int parts_y = problem.parts_y, parts_x = problem.parts_x;
    const int64_t columns = (problem.upsampling.x.coarse + 1) * parts_x;
    const int64_t chunks = (problem.upsampling.y.coarse + 1) * parts_y * columns;
    const int64_t step = int64_t(problem.blocks) * kThreads;
    for (int64_t i = int64_t(block) * kThreads + threadIdx.x; i < chunks; i += step) {
        const int64_t row = i / columns, column = i % columns;
        chunk.read(image, row / parts_y - 1, row % parts_y, column / parts_x - 1, column % parts_x);
        chunk.softmax(by_class);
        body(chunk);
    }
}

}  // namespace ial::gpu
