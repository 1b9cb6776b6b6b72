// reduce and gradient of coarse logits on the CPU, over some rows of cells of one image; included beside
// ial_cpu_kernels.h, once per instruction set.
//
// The lanes of a block are B cells side by side, and it goes through their pixels in sweeps: in sweep k each
// lane is at the k-th pixel of its cell. So what a class needs of its coarse logits lies side by side, as in
// memory, for any ratio, and so does what it adds to their gradient: to the logit at the left of a cell and
// to the one at its right, which are other lanes' in none of these two additions.

namespace ial {
namespace IAL_ISA {

// Where the rows of a block are kept: numbers of the arithmetic type for each of C classes.
template <typename T>
struct CellBuffer {
    using A = typename Problem<T>::A;
    static constexpr int B = kCells, kRow = kCells + kCellPad;  // one logit more than cells, aligned

    A* x;           // [C, B], first, as Block has it: the pixels of a sweep
    A *above, *dy;  // [C, kRow]: the coarse logits above the cells, and how much larger those below are
    A *left, *dx;   // [C, B]: the logits at the left of the cells on a line of pixels; how much larger at
                    // the right
    A* to_both;     // [C, B]: the gradient of the line, which the logits at the left and the right share
    A* to_right;    // [C, kRow]: what the right gets of it, after a 0 that is not a cell's

    IAL_INLINE CellBuffer(A* buffer, int64_t classes) : x(buffer) {
        above = x + classes * B;
        dy = above + classes * kRow;
        left = dy + classes * kRow;
        dx = left + classes * B;
        to_both = dx + classes * B;
        to_right = to_both + classes * B + kCellPad;
        for (int64_t c = 0; c < classes; ++c) to_right[c * kRow - 1] = 0;
    }
};

// Where the gradient of a row of cells goes: to the coarse logits above and below it.
template <typename A>
struct CellGradient {
    const A* rows;     // [3, C]
    int64_t width;     // of what follows: logits, and room for those that a block has too many
    A *above, *below;  // [C, width]
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

    IAL_INLINE Cells(const Problem<T>& problem, const Coarse<T>& coarse, A* buffer)
        : problem(problem),
          coarse(coarse),
          classes(static_cast<int>(problem.layout.classes)),
          at(buffer, classes),
          block(problem, buffer) {}

    // The coarse logits around the cells from `first` of row j. Beyond the last logit, it repeats itself.
    IAL_INLINE void load_corners(int64_t n, int64_t j, int64_t first) {
        const Image& view = coarse.up.logits;
        const int64_t last = coarse.up.x.coarse - 1, step = j + 1 < coarse.up.y.coarse ? view.row : 0;
        const int there = static_cast<int>(last - first < B ? last - first : B);
        for (int c = 0; c < classes; ++c) {
            const T* from = problem.logits + view.offset(n, j, first) + c * view.channel;
            A *above = at.above + c * kRow, *below = at.dy + c * kRow;
            if (view.pixel == 1) {
                IAL_SIMD for (int i = 0; i <= there; ++i) above[i] = widen(from[i]);
                IAL_SIMD for (int i = 0; i <= there; ++i) below[i] = widen(from[step + i]);
            } else {
                for (int i = 0; i <= there; ++i) {
                    above[i] = widen(from[i * view.pixel]);
                    below[i] = widen(from[step + i * view.pixel]);
                }
            }
            for (int i = there + 1; i <= B; ++i) {
                above[i] = above[there];
                below[i] = below[there];
            }
            IAL_SIMD for (int i = 0; i <= B; ++i) below[i] -= above[i];
        }
    }

    // A line of pixels, beyond the logits above by the fraction f.
    IAL_INLINE void load_line(A f) {
        for (int c = 0; c < classes; ++c) {
            const A *above = at.above + c * kRow, *dy = at.dy + c * kRow;
            A *left = at.left + c * B, *dx = at.dx + c * B;
            IAL_SIMD for (int i = 0; i < B; ++i) {
                left[i] = above[i] + f * dy[i];
                dx[i] = (above[i + 1] + f * dy[i + 1]) - left[i];
            }
        }
    }

    IAL_INLINE void load_sweep(const A* f) {
        A* const max = block.max;
        IAL_SIMD for (int i = 0; i < B; ++i) max[i] = -__builtin_inf();
        for (int c = 0; c < classes; ++c) {
            const A *left = at.left + c * B, *dx = at.dx + c * B;
            A* x = at.x + c * B;
            IAL_SIMD for (int i = 0; i < B; ++i) {
                x[i] = left[i] + f[i] * dx[i];
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

    // pixel: [B], their places on line y, -1 where a lane has none
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
        block.list_labels();
    }

    // As Block has it.
    IAL_INLINE void weigh(const A* by_class, int64_t n, int64_t y, const int32_t* pixel) {
        block.template select<1>(by_class, block.w);
        if (!problem.pixel_weight) return;
        const Image& weights = coarse.up.pixel_weight;
        const A* from = problem.pixel_weight + weights.offset(n, y, 0);
        for (int i = 0; i < B; ++i)
            if (block.label[i] >= 0) block.w[i] *= from[pixel[i] * weights.pixel];
    }

    // Labels that are neither a class nor ignore_index.
    IAL_INLINE void report(int64_t n, int64_t y, const int32_t* pixel, BadLabels* bad) const {
        if (!block.bad_labels) return;
        const Image& labels = coarse.up.target;
        for (int i = 0; i < B; ++i) {
            if (pixel[i] < 0) continue;
            const int64_t label = load_label(problem.target, problem.label, labels.offset(n, y, pixel[i]));
            if (block.label[i] < 0 && label != problem.ignore_index)
                bad->add(label, n, y * coarse.up.x.fine + pixel[i]);
        }
    }

    // Does `sweep(y, pixel, f)` for the pixels of the row of cells j, in blocks of cells, in lines; and
    // `line(first, f)` after each line, for the block's first cell.
    template <typename Kernel>
    IAL_INLINE void for_row(int64_t n, int64_t j, const Kernel& kernel) {
        const Axis& axis = coarse.up.y;
        const int64_t begin = axis.first(j), end = axis.first(j + 1);
        if (begin == end) return;
        for (int64_t first = 0; first < coarse.lanes; first += B) {
            load_corners(n, j, first);
            for (int64_t y = begin; y < end; ++y) {
                const A f = axis.fraction<A>(j, y);
                load_line(f);
                for (int k = 0; k < coarse.sweeps[first / B]; ++k) {
                    const int32_t* const pixel = coarse.pixel + k * coarse.lanes + first;
                    const A* const fraction = coarse.fraction + k * coarse.lanes + first;
                    load_sweep(fraction);
                    load_target(n, y, pixel);
                    kernel.sweep(*this, n, y, k, pixel, fraction);
                }
                kernel.line(*this, first, f);
            }
        }
    }
};

struct ReduceCells {
    double* sums;  // [levels, kStats, kLanes]
    BadLabels* bad;

    template <typename T, typename A>
    IAL_INLINE void sweep(Cells<T>& cells, int64_t n, int64_t y, int, const int32_t* pixel, const A*) const {
        cells.report(n, y, pixel, bad);
        cells.weigh(cells.problem.weight, n, y, pixel);
        cells.block.template softmax<false>(nullptr);
        cells.block.accumulate(sums);
    }
    template <typename T, typename A>
    IAL_INLINE void line(Cells<T>&, int64_t, A) const {}
};

template <typename A>
struct GradientCells {
    CellGradient<A> to;

    template <typename T>
    IAL_INLINE void sweep(Cells<T>& cells, int64_t n, int64_t y, int k, const int32_t* pixel,
                          const A* f) const {
        constexpr int B = Cells<T>::B, kRow = Cells<T>::kRow;
        auto& block = cells.block;
        alignas(64) A scale[B], extra[B];
        cells.weigh(to.rows + kS * cells.classes, n, y, pixel);
        block.template softmax<true>(nullptr);
        block.differentiate(to.rows, scale, extra);
        const auto* const label = block.label;
        for (typename Problem<T>::I c = 0; c < cells.classes; ++c) {
            const A* e = cells.at.x + c * B;
            A *to_both = cells.at.to_both + c * B, *to_right = cells.at.to_right + c * kRow;
            if (k == 0) {
                IAL_SIMD for (int i = 0; i < B; ++i) {
                    const A g = e[i] * scale[i] + (label[i] == c ? extra[i] : A(0));
                    to_both[i] = g;
                    to_right[i] = f[i] * g;
                }
            } else {
                IAL_SIMD for (int i = 0; i < B; ++i) {
                    const A g = e[i] * scale[i] + (label[i] == c ? extra[i] : A(0));
                    to_both[i] += g;
                    to_right[i] += f[i] * g;
                }
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
                below[i] += f * g;
            }
            above[B] += (1 - f) * right[B - 1];
            below[B] += f * right[B - 1];
        }
    }
};

// stats[levels, kStats] of the rows of cells [begin, end) of image n; sums: [levels, kStats, kLanes], zeros.
template <typename T>
IAL_TARGET void reduce_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n, int64_t begin,
                             int64_t end, typename Problem<T>::A* buffer, double* sums, double* stats,
                             BadLabels* bad) {
    Cells<T> cells(problem, coarse, buffer);
    for (int64_t j = begin; j < end; ++j) cells.for_row(n, j, ReduceCells{sums, bad});
    add_lanes(sums, int64_t(problem.levels) * kStats, stats);
}

// The gradient of the coarse logits of the rows of cells [begin, end) of image n. That of the first row lacks
// what the cells above add to it, and stays in `head`; `tail` is what the last cells add to the row below.
// head, tail, work: [C, coarse.width]
template <typename T, typename A>
IAL_TARGET void gradient_cells(const Problem<T>& problem, const Coarse<T>& coarse, int64_t n, int64_t begin,
                               int64_t end, A* buffer, const A* rows, A* head, A* tail, A* work) {
    Cells<T> cells(problem, coarse, buffer);
    const int64_t size = problem.layout.classes * coarse.width;
    const Image& view = coarse.up.grad;
    A *carried = work, *below = tail;
    for (int64_t j = begin; j < end; ++j) {
        A* const above = j == begin ? head : carried;
        if (j == begin) memset(above, 0, size * sizeof(A));
        memset(below, 0, size * sizeof(A));
        cells.for_row(n, j, GradientCells<A>{{rows, coarse.width, above, below}});
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

}  // namespace IAL_ISA
}  // namespace ial
