// reduce, reduce_backward, the one pass and pixel_nll for coarse logits, over a range of the rows of cells of
// one image. Compiled once per instruction set by dispatch.h.
//
// The lanes of a block are B neighbouring cells. The block visits their pixels in sweeps: sweep k visits the
// k-th pixel of each cell. The coarse logits of a class are therefore loaded contiguously, for any ratio of
// the sizes. Their gradient is added in the same order, in two additions: first for the logits to the left of
// the cells, then for those to the right. In each addition, every lane has its own logit.
//
// a + f (b - a) interpolates in the fewest instructions. But a logit with weight 0 still affects the result,
// and the difference may overflow. This matters if a logit is infinite, NaN or huge. Such a block is
// `careful`.
#include "pixels.h"

namespace ial {
namespace IAL_ISA {

// The value at fraction f between a and b. A value with weight 0 is ignored, even if it is infinite or NaN.
template <typename A>
IAL_INLINE A between(A a, A b, A f) {
    return f == 0 ? a : f == 1 ? b : (1 - f) * a + f * b;
}

// The buffer of a block: rows of the arithmetic type, one for each of C classes.
template <typename T>
struct CellBuffer {
    using A = typename Problem<T>::A;
    static constexpr int B = kCells, kRow = kCells + kCellPad;  // kRow: one logit more than cells, aligned

    A* x;              // [C, B]: the pixels of a sweep; first in the buffer, as in Block
    A *above, *below;  // [C, kRow]: the coarse logits above and below the cells
    A *left, *right;   // [C, B]: interpolated on a line of pixels, to the left and right of the cells
    A* to_both;        // [C, B]: the gradient of the line, for the logits to the left and right together
    A* to_right;       // [C, kRow]: the part for the logits to the right, with a 0 before the first cell
    // In a block that is not careful, `below` holds below - above, and `right` holds right - left.

    IAL_INLINE CellBuffer(A* buffer, int64_t classes) : x(buffer) {
        above = x + classes * B;
        below = above + classes * kRow;
        left = below + classes * kRow;
        right = left + classes * B;
        to_both = right + classes * B;
        to_right = to_both + classes * B + kCellPad;
        for (int64_t c = 0; c < classes; ++c) to_right[c * kRow - 1] = 0;
    }
};

// The gradient of a row of cells, for the coarse logits above and below it.
template <typename A>
struct CellGradient {
    const A* class_grads;  // [4, C]; see load_class_grads()
    int64_t width;         // of a row, with padding for the last block
    A *above, *below;      // [C, width]
};

// Where a sweep of a block is: one pixel, or none, for each of its cells.
template <typename A>
struct Sweep {
    int64_t image, line;
    int index;             // 0 for the first sweep of the line
    const int32_t* pixel;  // [kCells]: the pixel on the line, -1 for none
    const A* fraction;     // [kCells]
};

template <typename T>
struct Cells {
    using A = typename Problem<T>::A;
    static constexpr int B = kCells, kRow = CellBuffer<T>::kRow;

    const Problem<T>& problem;
    const Coarse<T>& coarse;
    const int classes;
    const CellBuffer<T> at;
    Block<T, B> block;
    bool careful = false;

    IAL_INLINE Cells(const Problem<T>& problem, const Coarse<T>& coarse, A* buffer)
        : problem(problem),
          coarse(coarse),
          classes(static_cast<int>(problem.layout.classes)),
          at(buffer, classes),
          block(problem, buffer) {}

    // Loads the coarse logits around the cells of row j, starting at cell `first`.
    IAL_INLINE void load_corners(int64_t n, int64_t j, int64_t first) {
        const Image& view = coarse.up.logits;
        const T* const logits = problem.logits + view.offset(n, j, first);
        const int64_t last = coarse.up.x.coarse - 1, step = j + 1 < coarse.up.y.coarse ? view.row : 0;
        const int last_inside = static_cast<int>(last - first < B ? last - first : B);
        alignas(64) A extent[kRow];  // not finite if a logit is not, or if a difference might overflow
        IAL_SIMD for (int i = 0; i <= B; ++i) extent[i] = 0;
        for (int c = 0; c < classes; ++c) {
            A *above = at.above + c * kRow, *below = at.below + c * kRow;
            load_row(logits + c * view.channel, view.pixel, last_inside, above);
            load_row(logits + c * view.channel + step, view.pixel, last_inside, below);
            IAL_SIMD for (int i = 0; i <= B; ++i) {
                below[i] -= above[i];
                extent[i] += above[i] * above[i] + below[i] * below[i];
            }
        }
        careful = false;
        for (int i = 0; i <= B; ++i) careful |= !(extent[i] <= std::numeric_limits<A>::max());
        for (int c = 0; careful && c < classes; ++c)
            load_row(logits + c * view.channel + step, view.pixel, last_inside, at.below + c * kRow);
    }

    // Loads logits [0, last_inside], then repeats the last one.
    IAL_INLINE static void load_row(const T* from, int64_t stride, int last_inside, A* to) {
        if (stride == 1) {
            IAL_SIMD for (int i = 0; i <= last_inside; ++i) to[i] = widen(from[i]);
        } else {
            for (int i = 0; i <= last_inside; ++i) to[i] = widen(from[i * stride]);
        }
        for (int i = last_inside + 1; i <= B; ++i) to[i] = to[last_inside];
    }

    // Interpolates the line of pixels at fraction f between the logits above and below.
    template <bool careful>
    IAL_INLINE void load_line(A f) {
        for (int c = 0; c < classes; ++c) {
            const A *above = at.above + c * kRow, *below = at.below + c * kRow;
            A *left = at.left + c * B, *right = at.right + c * B;
            IAL_SIMD for (int i = 0; i < B; ++i) {
                if constexpr (careful) {
                    left[i] = between(above[i], below[i], f);
                    right[i] = between(above[i + 1], below[i + 1], f);
                } else {
                    left[i] = above[i] + f * below[i];
                    right[i] = (above[i + 1] + f * below[i + 1]) - left[i];
                }
            }
        }
    }

    template <bool careful>
    IAL_INLINE void load_sweep(const A* f) {
        A* const max = block.max;
        IAL_SIMD for (int i = 0; i < B; ++i) max[i] = -__builtin_inf();
        for (int c = 0; c < classes; ++c) {
            const A *left = at.left + c * B, *right = at.right + c * B;
            A* x = at.x + c * B;
            IAL_SIMD for (int i = 0; i < B; ++i) {
                x[i] = careful ? between(left[i], right[i], f[i]) : left[i] + f[i] * right[i];
                max[i] = x[i] > max[i] ? x[i] : max[i];
            }
        }
    }

    template <typename L>
    IAL_INLINE void load_labels(const L* line, int64_t stride, const int32_t* pixel) {
        const int64_t ignore = problem.ignore_index;
        int bad = 0;
        for (int i = 0; i < B; ++i) {
            const int64_t y = pixel[i] < 0 ? ignore : line[pixel[i] * stride];
            const bool is_class = y >= 0 && y < classes && y != ignore;
            block.label[i] = is_class ? static_cast<typename Problem<T>::I>(y) : -1;
            bad |= !is_class && y != ignore;
        }
        block.bad_labels = bad != 0;
    }

    // pixel[B]: the positions of the pixels on line y, -1 for a lane without a pixel.
    IAL_INLINE void load_target(int64_t n, int64_t y, const int32_t* pixel) {
        const Image& labels = coarse.up.target;
        const int64_t line = labels.offset(n, y, 0);
        switch (problem.label) {
            case Label::kUInt8:
                load_labels(static_cast<const uint8_t*>(problem.target) + line, labels.pixel, pixel);
                break;
            case Label::kInt32:
                load_labels(static_cast<const int32_t*>(problem.target) + line, labels.pixel, pixel);
                break;
            default:
                load_labels(static_cast<const int64_t*>(problem.target) + line, labels.pixel, pixel);
        }
        if (!problem.pixel_weight) return;
        const Image& weights = coarse.up.pixel_weight;
        const A* from = problem.pixel_weight + weights.offset(n, y, 0);
        for (int i = 0; i < B; ++i)
            block.pixel_weight[i] = pixel[i] < 0 ? A(0) : from[pixel[i] * weights.pixel];
    }

    // Calls kernel.sweep for the pixels of row j of cells: block by block, line by line, sweep by sweep.
    // After each line, or after every kSweeps sweeps of it, calls kernel.line with the first cell of the
    // block.
    template <typename Kernel>
    IAL_INLINE void for_row(int64_t n, int64_t j, const Kernel& kernel) {
        const Axis& axis = coarse.up.y;
        const int64_t begin = axis.first(j), end = axis.first(j + 1);
        if (begin == end) return;
        alignas(64) A own_fraction[kSweeps * B];  // for a block with more sweeps than coarse.pixel holds
        alignas(64) int32_t own_pixel[kSweeps * B];
        for (int64_t first = 0; first < coarse.lanes; first += B) {
            load_corners(n, j, first);
            const int sweeps = coarse.sweeps[first / B];
            const bool placed = sweeps <= kSweeps;
            const int32_t* const pixel = placed ? coarse.pixel + first : own_pixel;
            const A* const fraction = placed ? coarse.fraction + first : own_fraction;
            const int64_t step = placed ? coarse.lanes : B;
            for (int done = 0; done < sweeps; done += kSweeps) {
                const int count = sweeps - done < kSweeps ? sweeps - done : kSweeps;
                if (!placed) place_pixels(coarse.up.x, first, B, done, count, B, own_pixel, own_fraction);
                for (int64_t y = begin; y < end; ++y) {
                    const A f = axis.fraction<A>(j, y);
                    careful ? load_line<true>(f) : load_line<false>(f);
                    for (int k = 0; k < count; ++k) {
                        careful ? load_sweep<true>(fraction + k * step)
                                : load_sweep<false>(fraction + k * step);
                        load_target(n, y, pixel + k * step);
                        kernel.sweep(*this, Sweep<A>{n, y, k, pixel + k * step, fraction + k * step});
                    }
                    kernel.line(*this, first, f);
                }
            }
        }
    }
};

struct ReduceCells {
    double* sums;  // [levels, kStats, kLanes]
    bool* bad;

    template <typename T, typename A>
    IAL_INLINE void sweep(Cells<T>& cells, const Sweep<A>&) const {
        cells.block.list_labels();
        *bad |= cells.block.bad_labels;
        cells.block.load_weights(cells.problem.weight);
        cells.block.template softmax<false>(nullptr);
        cells.block.accumulate(sums);
    }
    template <typename T, typename A>
    IAL_INLINE void line(Cells<T>&, int64_t, A) const {}
};

struct PixelNllCells {
    bool* bad;

    template <typename T, typename A>
    IAL_INLINE void sweep(Cells<T>& cells, const Sweep<A>& at) const {
        constexpr int B = Cells<T>::B;
        auto& block = cells.block;
        alignas(64) A logit[B], nll[B];
        *bad |= block.bad_labels;
        block.template look_up<B>(block.x, logit);
        block.template softmax<false>(nullptr);
        block.look_up_weights(cells.problem.weight);
        block.valid_cross_entropy(logit, nll);
        const Image& view = cells.coarse.up.grad;
        A* const line = cells.problem.nll + view.offset(at.image, at.line, 0);
        for (int i = 0; i < B; ++i)
            if (at.pixel[i] >= 0) line[at.pixel[i] * view.pixel] = nll[i];
    }
    template <typename T, typename A>
    IAL_INLINE void line(Cells<T>&, int64_t, A) const {}
};

// The gradient. With one_level, also the sums.
template <typename A, bool one_level>
struct GradientCells {
    CellGradient<A> to;
    double* sums;  // [kStats, kLanes]
    bool* bad;

    template <typename T>
    IAL_INLINE void sweep(Cells<T>& cells, const Sweep<A>& at) const {
        constexpr int B = Cells<T>::B;
        auto& block = cells.block;
        alignas(64) A logit[B], scale[B], extra[B];
        const A* const by_class = to.class_grads + kS * cells.classes;
        if constexpr (one_level) {
            *bad |= block.bad_labels;
            block.template look_up<B>(block.x, logit);
            block.template softmax<true>(nullptr);
            block.look_up_weights(cells.problem.weight);
            block.accumulate_one_level(logit, sums);
            block.look_up_weights(by_class);
        } else {
            block.list_labels();
            block.load_weights(by_class);
            block.template softmax<true>(nullptr);
        }
        block.template differentiate<one_level>(to.class_grads, scale, extra);
        const A* const f = at.fraction;
        if (cells.careful)
            at.index == 0 ? add<true, true>(cells, f, scale, extra)
                          : add<true, false>(cells, f, scale, extra);
        else
            at.index == 0 ? add<false, true>(cells, f, scale, extra)
                          : add<false, false>(cells, f, scale, extra);
    }

    template <bool careful, bool first, typename T>
    IAL_INLINE static void add(Cells<T>& cells, const A* f, const A* scale, const A* extra) {
        constexpr int B = Cells<T>::B, kRow = Cells<T>::kRow;
        const auto* const label = cells.block.label;
        for (typename Problem<T>::I c = 0; c < cells.classes; ++c) {
            const A* e = cells.at.x + c * B;
            A *to_both = cells.at.to_both + c * B, *to_right = cells.at.to_right + c * kRow;
            IAL_SIMD for (int i = 0; i < B; ++i) {
                const A g = e[i] * scale[i] + (label[i] == c ? extra[i] : A(0));
                const A right = careful && f[i] == 0 ? A(0) : f[i] * g;
                to_both[i] = first ? g : to_both[i] + g;
                to_right[i] = first ? right : to_right[i] + right;
            }
        }
    }

    template <typename T>
    IAL_INLINE void line(Cells<T>& cells, int64_t first, A f) const {
        constexpr int B = Cells<T>::B, kRow = Cells<T>::kRow;
        for (int c = 0; c < cells.classes; ++c) {
            const A *both = cells.at.to_both + c * B, *right = cells.at.to_right + c * kRow;
            A *above = to.above + c * to.width + first, *below = to.below + c * to.width + first;
            IAL_SIMD for (int i = 0; i < B; ++i) {
                const A g = both[i] - right[i] + right[i - 1];
                above[i] += (1 - f) * g;
                below[i] += f == 0 ? A(0) : f * g;
            }
            above[B] += (1 - f) * right[B - 1];
            below[B] += f == 0 ? A(0) : f * right[B - 1];
        }
    }
};

// Writes stats[levels, kStats] of the rows of cells [begin, end) of image n. sums: see reduce().
template <typename T>
IAL_TARGET void reduce_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n, int64_t begin,
                             int64_t end, typename Problem<T>::A* buffer, double* sums, double* stats,
                             bool* bad) {
    Cells<T> cells(problem, coarse, buffer);
    for (int64_t j = begin; j < end; ++j) cells.for_row(n, j, ReduceCells{sums, bad});
    add_lanes(sums, int64_t(problem.levels) * kStats, stats);
}

// Writes the nll of the pixels of the rows of cells [begin, end) of image n.
template <typename T>
IAL_TARGET void pixel_nll_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n, int64_t begin,
                                int64_t end, typename Problem<T>::A* buffer, bool* bad) {
    Cells<T> cells(problem, coarse, buffer);
    for (int64_t j = begin; j < end; ++j) cells.for_row(n, j, PixelNllCells{bad});
}

// The gradient of the coarse logits of the rows of cells [begin, end) of image n. The first row of logits
// also depends on the cells above it, so its part goes to `head`. The part of the row after the last cells
// goes to `tail`. head, tail, work: [C, coarse.width].
template <bool one_level, typename T, typename A>
IAL_INLINE void gradient_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n, int64_t begin,
                               int64_t end, A* buffer, const A* class_grads, A* head, A* tail, A* work,
                               double* sums, bool* bad) {
    Cells<T> cells(problem, coarse, buffer);
    const int64_t size = problem.layout.classes * coarse.width;
    const Image& view = coarse.up.grad;
    A *carried = work, *below = tail;
    for (int64_t j = begin; j < end; ++j) {
        A* const above = j == begin ? head : carried;
        if (j == begin) memset(above, 0, size * sizeof(A));
        memset(below, 0, size * sizeof(A));
        cells.for_row(n, j,
                      GradientCells<A, one_level>{{class_grads, coarse.width, above, below}, sums, bad});
        if (j > begin) {
            for (int64_t c = 0; c < problem.layout.classes; ++c) {
                T* const to = problem.grad + view.offset(n, j, 0) + c * view.channel;
                const A* const from = above + c * coarse.width;
                for (int64_t i = 0; i < coarse.up.x.coarse; ++i) narrow(from[i], to + i * view.pixel);
            }
        }
        A* const free = j == begin ? work : above;
        carried = below;
        below = free;
    }
    if (carried != tail) memcpy(tail, carried, size * sizeof(A));
}

template <typename T, typename A>
IAL_TARGET void reduce_backward_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n,
                                      int64_t begin, int64_t end, A* buffer, const A* class_grads, A* head,
                                      A* tail, A* work) {
    gradient_cells<false>(problem, coarse, n, begin, end, buffer, class_grads, head, tail, work, nullptr,
                          nullptr);
}

// The gradient and the sums for one level. See one_pass().
template <typename T, typename A>
IAL_TARGET void one_pass_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n, int64_t begin,
                               int64_t end, A* buffer, const A* class_grads, A* head, A* tail, A* work,
                               double* sums, double* stats, bool* bad) {
    gradient_cells<true>(problem, coarse, n, begin, end, buffer, class_grads, head, tail, work, sums, bad);
    add_lanes(sums, kStats, stats);
}

}  // namespace IAL_ISA
}  // namespace ial
