// Bilinear upsampling of coarse logits to the size of the target: maps each pixel to the logits around it.
// Pixel positions are those of F.interpolate(mode="bilinear").
//
// A line has `coarse` logits and `fine` pixels. Pixel d is at position
//   align_corners = false   (d + 1/2) coarse / fine - 1/2, clamped below at 0
//   align_corners = true    d (coarse - 1) / (fine - 1)
// A cell is the interval between two neighbouring logits. Its pixels are consecutive. A pixel of cell i at
// fraction f beyond logit i has the value (1 - f) x_i + f x_{i+1}. Beyond the last logit, f = 0. Positions
// are computed as fractions of integers, so they are exact.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace ial {

// The longest line, coarse or fine. The kernels hold up to twice this number in 32 bits, and a product of two
// such numbers in 64 bits.
constexpr int64_t kMaxSide = (int64_t(1) << 30) - 1;

struct Axis {
    int64_t coarse, fine;
    int64_t step, origin, unit;  // the position of pixel d is (step d + origin) / unit

    Axis() = default;
    IAL_HD Axis(int64_t coarse, int64_t fine, bool align_corners)
        : coarse(coarse),
          fine(fine),
          step(align_corners ? coarse - 1 : 2 * coarse),
          origin(align_corners ? 0 : coarse - fine),
          unit(!align_corners ? 2 * fine
               : fine > 1     ? fine - 1
                              : 1) {}

    // The first pixel of cell i. For i = coarse, the number of pixels.
    IAL_HD int64_t first(int64_t i) const {
        if (i <= 0) return 0;
        if (i >= coarse || step == 0) return fine;
        const int64_t d = (i * unit - origin + step - 1) / step;  // i * unit > origin
        return d < fine ? d : fine;
    }

    IAL_HD int64_t cell(int64_t d) const {
        const int64_t at = step * d + origin, i = at < 0 ? 0 : at / unit;
        return i < coarse ? i : coarse - 1;
    }

    // The fraction by which pixel d of cell i lies beyond logit i.
    template <typename A>
    IAL_HD A fraction(int64_t i, int64_t d) const {
        const int64_t beyond = step * d + origin - i * unit;
        return beyond < 0 || i == coarse - 1 ? A(0) : static_cast<A>(beyond) / static_cast<A>(unit);
    }
};

// Strides of a tensor (N, C, y, x) or (N, y, x).
struct Image {
    int64_t batch, channel, row, pixel;

    IAL_HD int64_t offset(int64_t n, int64_t y, int64_t x) const { return n * batch + y * row + x * pixel; }
};

struct Upsampling {
    int64_t batch, classes;
    Axis y, x;
    Image logits, grad;          // coarse
    Image target, pixel_weight;  // fine
};

}  // namespace ial
