// The plain structs that the CPU kernels take instead of tensors.
#pragma once

#include <cstdint>

#include "../bilinear.h"
#include "../layout.h"
#include "../loss.h"

namespace ial {

constexpr int kWide = 64, kNarrow = 16;  // pixels of a block; kNarrow at the end of a row
constexpr int kFew = 32;                 // at most this many pixels at the end of a row take narrow blocks
constexpr int kRowsAhead = 14;           // rows of a block to prefetch ahead of the row being read
constexpr int kLanes = 16;               // lanes that sums are kept in
constexpr int kStreamBytes = 32;         // bytes that a streaming store writes
constexpr int kMaxListed = 4;            // classes of a block that are processed one by one, without look-ups
constexpr int kMaxCompared = 8;          // classes up to which comparing labels is faster than look-ups
constexpr int kMaxTable = 32;  // classes whose values fit two vectors, and whose set fits an integer
constexpr int kSoft = 3;       // the row of class_grads for label smoothing
constexpr int kTile = 8;       // pixels and classes of a tile that is transposed at once
constexpr int kCells = 32;     // cells of a block of coarse logits
constexpr int kCellPad = 16;   // padding of its rows, for the logit to the right of the last cell

// Sweeps whose pixels are computed once for all rows. Usual images need fewer. The limit bounds the memory.
constexpr int kSweeps = 64;

// Half precision is computed in float. Labels are held in integers of the same width, so that they can be
// compared lane by lane.
template <typename T>
struct Arithmetic {
    using A = float;
    using I = int32_t;
};
template <>
struct Arithmetic<double> {
    using A = double;
    using I = int64_t;
};

template <typename T>
struct Problem {
    using A = typename Arithmetic<T>::A;
    using I = typename Arithmetic<T>::I;

    Layout layout;
    const T* logits;
    T* grad;
    A* nll;  // the result of pixel_nll; layout.grad is its view
    const void* target;
    Label label;
    const A* weight;              // [C]
    bool weighted;                // class weights are given; otherwise all are 1
    const A* pixel_weight;        // null: all are 1
    const int32_t* class_levels;  // [C]
    int levels;
    int64_t ignore_index;
    bool stream;          // whether to use streaming stores
    const A* smoothing;   // [C]: s_c = label_smoothing / C * weight; null without label smoothing
    A smoothing_sum;      // their sum
    double target_share;  // 1 - label_smoothing
    A cross;              // 1 for the exact gradient, 0 for the paper's; see PixelGradient
};

// The cells of a row of coarse logits, which are the same for all rows. Cells are padded to `lanes`, a
// multiple of kCells. The padding has no pixels. Sweep k visits the k-th pixel of each cell.
template <typename T>
struct Coarse {
    using A = typename Problem<T>::A;

    Upsampling up;
    int64_t lanes;
    int64_t width;          // of a row of gradients, with the logits to the right of the last lane
    const int32_t* sweeps;  // [lanes / kCells]: sweeps of a block, the largest number of pixels of its cells
    const int32_t* pixel;   // [at most kSweeps, lanes]: the pixel of each sweep and cell, -1 for none
    const A* fraction;      // [same, lanes]: the fraction by which it lies beyond the logit to its left
};

// Fills pixel and fraction [sweeps, stride] of the cells [cell, cell + cells), starting at sweep `first`.
template <typename A>
void place_pixels(const Axis& axis, int64_t cell, int64_t cells, int64_t first, int64_t sweeps,
                  int64_t stride, int32_t* pixel, A* fraction) {
    for (int64_t i = 0; i < cells; ++i) {
        const int64_t begin = axis.first(cell + i) + first;
        const int64_t end = cell + i < axis.coarse ? axis.first(cell + i + 1) : begin;
        for (int64_t k = 0; k < sweeps; ++k) {
            const bool inside = begin + k < end;
            pixel[k * stride + i] = inside ? static_cast<int32_t>(begin + k) : -1;
            fraction[k * stride + i] = inside ? axis.fraction<A>(cell + i, begin + k) : A(0);
        }
    }
}

}  // namespace ial
