// The kernels for coarse logits, upsampled on their way into the loss: those of the pixels only ever exist in
// registers.
//
// A line of w coarse logits has w + 1 cells (bilinear.h), each of about as many pixels: the last one,
// beyond its last logit, is half a cell, and here the pixels before the first logit, which Axis counts among
// those of cell 0, are the other half: cell -1, in which the logit to the right has all the weight.
//
// A thread owns a chunk: up to S x S pixels of a cell, and what it knows of their softmax is in registers. It
// takes the classes one after another: of each, it interpolates the four logits around the cell to the
// pixels. So the number of classes costs no registers, and the gradient of the four logits is a sum over the
// chunk.
//
// Interpolated in the fewest instructions, a logit of weight 0 still counts, and a difference of two may
// overflow. Where that would show, because a logit is infinite, NaN or huge, the chunk starts again,
// carefully.
#pragma once

#include "../bilinear.h"
#include "kernels.cuh"

namespace ial {
namespace gpu {

// Of gradient: rows of cells of a tile, a warp each.
constexpr int kTileRows = 8, kTileThreads = kTileRows * kWarp;

template <typename T>
struct UpsampledProblem : Operands<T> {
    Upsampling upsampling;
    int parts_y, parts_x;  // chunks that a cell is cut into
};

IAL_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most pixels that a cell of an axis has, those before the first logit being one of their own.
IAL_HD int64_t most_pixels(const Axis& axis) {
    return axis.step > 0 ? divide_up(axis.unit, axis.step) : axis.fine;
}

// A chunk's extent along one axis. Pixel d is at (step d + origin) / unit, those of cell i in [i, i + 1).
template <typename A, int S>
struct Span {
    int64_t first;      // pixel
    int count;          // of pixels, 0 to S
    int64_t low, high;  // the coarse logits around them
    A fraction[S];      // of `high` in each pixel

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
            if (fraction[i] > 1)
                fraction[i] = 1;  // a pixel that the cell does not have stays between its logits
        }
    }
};

// Something of each of the four logits around a cell.
template <typename A>
struct Corners {
    A top_left, top_right, bottom_left, bottom_right;

    // That of the pixel at fractions y and x. Every use must round alike, so that a pixel's own logit equals
    // itself: no product is left for the compiler to merge with an addition.
    IAL_D A interpolate(A y, A x) const {
        const A left = multiply_add(y, bottom_left - top_left, top_left);
        const A right = multiply_add(y, bottom_right - top_right, top_right);
        return multiply_add(x, right - left, left);
    }

    // sum, or not a finite number if one of the differences in interpolate() is none for a y between these.
    IAL_D A add_differences(A sum, A first_y, A last_y) const {
        const auto across = [this](A y) {
            return multiply_add(y, bottom_right - top_right, top_right) -
                   multiply_add(y, bottom_left - top_left, top_left);
        };
        sum = multiply_add(bottom_left - top_left, bottom_right - top_right, sum);
        return multiply_add(across(first_y), across(last_y), sum);
    }

    // interpolate() for logits of any size, without those whose weight is 0.
    IAL_D A interpolate_carefully(A y, A x) const {
        return between(between(top_left, bottom_left, y), between(top_right, bottom_right, y), x);
    }
    IAL_D static A between(A a, A b, A f) {
        return f == 0 ? a : f == 1 ? b : multiply_add(f, b, (1 - f) * a);
    }
    IAL_D static A share(A f, A g) { return f == 0 ? A(0) : f * g; }
};

// The labels and weights of the pixels of a chunk: those that the cell does not have have no class.
template <typename T, int S>
struct ChunkLabels {
    using A = typename Arithmetic<T>::A;

    int label[S * S];  // -1: none
    bool bad;          // one is neither a class nor ignore_index
    const A* weight;
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
                    label[i * S + j] = i < y.count && j < x.count
                                           ? class_of(*at, problem.classes, problem.ignore_index, &bad)
                                           : -1;
            }
        };
        bad = false;
        problem.with_target(load);
        weights = problem.upsampling.pixel_weight;
        weight =
            problem.pixel_weight ? problem.pixel_weight + weights.offset(image, y.first, x.first) : nullptr;
    }

    IAL_D bool any() const {
        bool found = false;
        for (int j = 0; j < S * S; ++j) found |= label[j] >= 0;
        return found;
    }

    IAL_D bool has(int j) const { return label[j] >= 0; }

    // The class of pixel j, or any where it has none.
    IAL_D int some_class(int j) const { return label[j] < 0 ? 0 : label[j]; }

    IAL_D A pixel_weight(int j) const {
        return weight && has(j) ? weight[j / S * weights.row + j % S * weights.pixel] : A(1);
    }
};

// A thread's pixels. Logits are in the unit of `power`, but those of a careful chunk, which may be too large
// for it.
template <typename T_, int S_>
struct Chunk {
    using T = T_;
    using A = typename Arithmetic<T>::A;
    static constexpr int S = S_, V = S * S;
    // How far a pixel's own logit may be below the largest.
    static constexpr float kFar = 44, kFarSum = 0x1p64f;  // e^44

    const UpsampledProblem<T>& problem;
    Span<A, S> y, x;
    const T *top, *bottom;  // logits of class 0 to the left of the cell
    int64_t channel, right;
    ChunkLabels<T, S> labels;
    A shift[V];    // a logit near the largest; infinite for pixels without a class
    A sum[V];      // sum_c e^(x_c - shift)
    A target[V];   // x_y - shift, natural
    unsigned far;  // bit j is set where that is not 0
    bool careful;  // shift is natural

    IAL_D explicit Chunk(const UpsampledProblem<T>& problem) : problem(problem) {}

    // The chunk that is these parts of a cell: where it is, and its labels.
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

    // Subtracts a pixel's own logit from the others: it is needed anyway, and mostly it is the largest, so
    // nobody has to look for that.
    IAL_D void softmax() {
        Corners<A> around{};
        int last = -1;  // labels come in patches
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int label = labels.label[j];
            if (label >= 0 && label != last) around = corners(last = label);
            shift[j] = label < 0 ? A(HUGE_VALF) : interpolate(around, j);
            sum[j] = target[j] = 0;
        }
        A differences = 0;
#pragma unroll 1
        for (int c = 0; c < problem.classes; ++c) {
            around = corners(c);
            differences = around.add_differences(differences, y.fraction[0], y.fraction[S - 1]);
            for (int j = 0; j < V; ++j) sum[j] += power(interpolate(around, j) - shift[j]);
        }
        far = 0;
        careful = !(differences - differences == 0);
#pragma unroll
        for (int j = 0; j < V; ++j) careful |= sum[j] > kFarSum;
        if (!careful) return;
#pragma unroll
        for (int i = 0; i < S; ++i) look_for_largest(i);
    }

    // Row i of a chunk of which a logit is not finite, or huge, or far larger than a pixel's own. All rows at
    // a time would not fit the registers.
    IAL_D void look_for_largest(int i) {
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
            const A own = interpolate_carefully(natural_corners(labels.some_class(j)), j);
            const bool near = sum[j] - own < kFar;
            if (!near) far |= 1u << j;
            shift[j] = near ? own : sum[j];
            target[j] = own - shift[j];
            sum[j] = 0;
        }
#pragma unroll 1
        for (int c = 0; c < problem.classes; ++c) {
            const Corners<A> around = natural_corners(c);
#pragma unroll
            for (int j = i * S; j < (i + 1) * S; ++j)
                sum[j] += exponential(interpolate_carefully(around, j) - shift[j]);
        }
    }

    // e^target, which is nothing where that is not 0.
    IAL_D A own(int j) const { return far >> j & 1 ? A(0) : A(1); }

    // dL/dX_c = scale e^(x_c - shift) + [c = y] extra. The latter, of few classes, stay in shared memory: in
    // a column [V, kTileThreads] of the thread's.
    A scale[V];
    A* extra;
    unsigned present;  // bit c % 32 is set where pixels have class c

    IAL_D void weigh(const GradientClass<A>* by_class, bool exact, A* column) {
        extra = column;
        present = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const PixelGradient<A> pixel = differentiate(*this, j, by_class, exact);
            scale[j] = pixel.scale;
            extra[j * kTileThreads] = pixel.extra;
            if (labels.has(j)) present |= 1u << labels.label[j] % 32;
        }
    }

    // What row i of a careful chunk adds to the gradient of the logits of class c around it.
    IAL_D Corners<A> gradient_carefully(int i, int c) const {
        const Corners<A> around = natural_corners(c);
        A left = 0, right = 0;
#pragma unroll
        for (int j = i * S; j < (i + 1) * S; ++j) {
            A g = exponential(interpolate_carefully(around, j) - shift[j]) * scale[j];
            if (labels.label[j] == c) g += extra[j * kTileThreads];
            if (!labels.has(j)) continue;
            left += Corners<A>::share(1 - x.fraction[j % S], g);
            right += Corners<A>::share(x.fraction[j % S], g);
        }
        const A above = 1 - y.fraction[i], below = y.fraction[i];
        return {Corners<A>::share(above, left), Corners<A>::share(above, right),
                Corners<A>::share(below, left), Corners<A>::share(below, right)};
    }

    // What another chunk adds.
    IAL_D Corners<A> gradient(int c) const {
        const Corners<A> around = corners(c);
        A g[V];
        for (int j = 0; j < V; ++j) g[j] = power(interpolate(around, j) - shift[j]) * scale[j];
        if (present >> c % 32 & 1)
            for (int j = 0; j < V; ++j)
                if (labels.label[j] == c) g[j] += extra[j * kTileThreads];
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

// -------------------------------------------------------------------------------------------------
// reduce, with sum_levels' grid and `partial`: the chunks of an image are counted along their rows

// Blocks that a multiprocessor must hold.
constexpr int kReduceBlocks = 4;

template <typename Chunk>
__global__ void __launch_bounds__(kThreads, kReduceBlocks)
    reduce_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                            int block_levels, double* partial) {
    extern __shared__ __align__(16) unsigned char ial_shared[];
    sum_levels(problem, ial_shared, block_levels, partial, [&](int64_t image, int block, const auto& add) {
        Chunk chunk(problem);
        const int parts_y = problem.parts_y, parts_x = problem.parts_x;
        const int64_t columns = (problem.upsampling.x.coarse + 1) * parts_x;
        const int64_t chunks = (problem.upsampling.y.coarse + 1) * parts_y * columns;
        const int64_t step = int64_t(problem.blocks) * kThreads;
        for (int64_t i = int64_t(block) * kThreads + threadIdx.x; i < chunks; i += step) {
            const int64_t row = i / columns, column = i % columns;
            chunk.read(image, row / parts_y - 1, row % parts_y, column / parts_x - 1, column % parts_x);
            chunk.softmax();
            add(chunk);
        }
    });
}

// -------------------------------------------------------------------------------------------------
// gradient: a block has a tile of cells, a warp for each row of them, and writes the gradient of the logits
// whose four cells are in the tile. So the first row and column of cells are the last ones of the tiles
// before. In its turn, a class is summed over each cell, and then over the cells around each logit.

struct Tiles {
    int lanes;          // of a cell, which share its chunks
    int turn;           // classes that there is shared memory for at a time
    int rows, columns;  // of tiles

    IAL_HD int cells() const { return kWarp / lanes; }  // of a row
};

// What the threads of a tile add to the corners of their cells, for the classes of a turn: [4, turn,
// kTileThreads].
template <typename A>
struct CornerSums {
    A* const sums;
    const int turn;

    IAL_D A& at(int corner, int i, int thread) const {
        return sums[(corner * turn + i) * kTileThreads + thread];
    }
    IAL_D void clear(int i) const {
        for (int corner = 0; corner < 4; ++corner) at(corner, i, threadIdx.x) = 0;
    }
    IAL_D void add(int i, const Corners<A>& by) const {
        at(0, i, threadIdx.x) += by.top_left;
        at(1, i, threadIdx.x) += by.top_right;
        at(2, i, threadIdx.x) += by.bottom_left;
        at(3, i, threadIdx.x) += by.bottom_right;
    }

    // The sum at the logit that is at the top left of the cell whose threads are those from `first` on.
    IAL_D A total(int i, int first, int lanes) const {
        A total = 0;
        for (int t = first; t < first + lanes; ++t)
            total += at(0, i, t) + at(1, i, t - lanes) + at(2, i, t - kWarp) + at(3, i, t - kWarp - lanes);
        return total;
    }

    static constexpr size_t bytes(int turn) { return sizeof(A) * 4 * turn * kTileThreads; }
};

// Grid (images x tiles). table: [images, levels, kStats]
template <typename Chunk>
__global__ void __launch_bounds__(kTileThreads, 2)
    gradient_upsampled_kernel(const __grid_constant__ UpsampledProblem<typename Chunk::T> problem,
                              const __grid_constant__ Tiles tiles, const double* table, bool exact,
                              typename Chunk::T* grad) {
    using A = typename Chunk::A;
    extern __shared__ __align__(16) unsigned char ial_shared[];
    const int image = blockIdx.x / (tiles.rows * tiles.columns);
    const int tile = blockIdx.x % (tiles.rows * tiles.columns);
    const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int cell = lane / tiles.lanes, lane_of_cell = lane % tiles.lanes;
    const int y = tile / tiles.columns * (kTileRows - 1) + row - 1;
    const int x = tile % tiles.columns * (tiles.cells() - 1) + cell - 1;
    const bool is_cell =
        cell < tiles.cells() && y < problem.upsampling.y.coarse && x < problem.upsampling.x.coarse;

    auto* const by_class = reinterpret_cast<GradientClass<A>*>(ial_shared);
    load_classes<kTileThreads>(problem, table + int64_t(image) * problem.levels * kStats, 1, by_class);
    A* const extra = reinterpret_cast<A*>(by_class + problem.classes) + threadIdx.x;
    const CornerSums<A> sums{reinterpret_cast<A*>(by_class + problem.classes) + Chunk::V * kTileThreads,
                             tiles.turn};
    __syncthreads();

    Chunk chunk(problem);
    const int parts = problem.parts_y * problem.parts_x;
    for (int first = 0; first < problem.classes; first += tiles.turn) {
        const int count = tiles.turn < problem.classes - first ? tiles.turn : problem.classes - first;
        if (is_cell) {
            for (int i = 0; i < count; ++i) sums.clear(i);
            for (int part = lane_of_cell; part < parts; part += tiles.lanes) {
                const bool is_new = first == 0 || parts > tiles.lanes;
                if (is_new) chunk.read(image, y, part / problem.parts_x, x, part % problem.parts_x);
                if (!chunk.labels.any()) continue;
                if (is_new) {
                    chunk.softmax();
                    chunk.weigh(by_class, exact, extra);
                }
                if (chunk.careful) {
#pragma unroll
                    for (int j = 0; j < Chunk::S; ++j)
#pragma unroll 1
                        for (int i = 0; i < count; ++i) sums.add(i, chunk.gradient_carefully(j, first + i));
                    continue;
                }
#pragma unroll 1
                for (int i = 0; i < count; ++i) sums.add(i, chunk.gradient(first + i));
            }
        }
        __syncthreads();
        if (is_cell && row > 0 && cell > 0) {
            const Image& view = problem.upsampling.grad;
            typename Chunk::T* const to = grad + view.offset(image, y, x);
            for (int i = lane_of_cell; i < count; i += tiles.lanes)
                narrow(sums.total(i, threadIdx.x - lane_of_cell, tiles.lanes),
                       to + (first + i) * view.channel);
        }
        __syncthreads();
    }
}

#undef IAL_D

}  // namespace gpu
}  // namespace ial
