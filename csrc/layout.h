// Memory layout: maps a pixel of tensors (N, C, *spatial) and (N, *spatial) with any strides to its offset.
// All sizes and strides are in elements.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace ial {

enum class Label : int { kUInt8, kInt32, kInt64 };  // the dtype of labels

constexpr int kMaxOuter = 6;

// The strides of one tensor. `pixel` is the stride between neighbouring pixels of a row.
struct View {
    int64_t batch, channel, pixel, outer[kMaxOuter];
};

// Spatial dimensions that are contiguous to each other in every tensor are merged. For contiguous and
// channels_last tensors `outer_rank` is therefore 0. Pixel indices count along rows of `row` pixels.
struct Layout {
    int64_t batch, classes, pixels, row;
    int outer_rank;
    int64_t outer[kMaxOuter];  // sizes of the dimensions around a row, outermost first
    View logits, grad, target, pixel_weight;

    IAL_HD int64_t offset(const View& view, int64_t n, int64_t p) const {
        if (outer_rank == 0) return n * view.batch + p * view.pixel;
        int64_t offset = n * view.batch + p % row * view.pixel;
        int64_t r = p / row;
        IAL_ROLLED
        for (int d = outer_rank - 1; d >= 0; --d) {
            offset += r % outer[d] * view.outer[d];
            r /= outer[d];
        }
        return offset;
    }
};

IAL_HD int64_t load_label(const void* target, Label type, int64_t i) {
    switch (type) {
        case Label::kUInt8:
            return static_cast<const uint8_t*>(target)[i];
        case Label::kInt32:
            return static_cast<const int32_t*>(target)[i];
        default:
            return static_cast<const int64_t*>(target)[i];
    }
}

}  // namespace ial
