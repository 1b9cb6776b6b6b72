// reduce, reduce_backward, the one pass and pixel_nll over a range of the pixels of one image.
// Compiled once per instruction set by dispatch.h. Lambdas are not used: they do not inherit the target
// attribute.
//
// Pixels are processed in blocks of B. The logits of a block are converted and copied once, into a buffer
// [C, B] that stays in L1. Without the copy they would evict each other, because the rows of a megapixel
// image are a power of two apart. Every loop over the B pixels has a constant length and no branch, so that
// the compiler vectorises it.
#include "simd.h"

namespace ial {
namespace IAL_ISA {

// B pixels of one row of one image, with the data that the kernels need. Lanes from `count` on hold stale
// values, and labels without a class.
template <typename T, int B>
struct Block {
    using A = typename Problem<T>::A;
    using I = typename Problem<T>::I;
    static constexpr I kNone = std::numeric_limits<I>::max();
    static constexpr bool kTiles = IAL_X86_VECTORS && std::is_same_v<A, float>;
    static constexpr bool kTables = IAL_X86_VECTORS == 512 && std::is_same_v<A, float>;

    const Problem<T>& problem;
    const int classes;
    A* x;        // [C, B]: the logits; after softmax() their exponentials
    A* x_ahead;  // [C, B]: the logits of the next block
    int count = 0;
    bool bad_labels = false;
    alignas(64) A max[B], max_ahead[B], sum[B], w[B];
    alignas(64) A pixel_weight[B];
    alignas(64) A smoothed[B];    // with label smoothing: sum_c s_c (x_c - max) with s_c = problem.smoothing
    alignas(64) I label[B];       // -1: no class
    alignas(64) I some_class[B];  // label[j], or 0 if that is -1; set only if !all_listed
    I listed[kMaxListed];         // the classes of the block
    int classes_listed = 0;
    bool all_listed = true;  // the block has at most kMaxListed classes

    IAL_INLINE Block(const Problem<T>& problem, A* buffer)
        : problem(problem),
          classes(static_cast<int>(problem.layout.classes)),
          x(buffer),
          x_ahead(buffer + problem.layout.classes * B) {
        IAL_SIMD for (int j = 0; j < B; ++j) pixel_weight[j] = 1;
    }

    IAL_INLINE void load_logits(int64_t n, int64_t p, int pixels) {
        const View& view = problem.layout.logits;
        const T* from = problem.logits + problem.layout.offset(view, n, p);
        count = pixels;
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = -__builtin_inf();
        if (count == B && view.pixel == 1) {
            for (int c = 0; c < classes; ++c) load_row(from + c * view.channel, x + c * B, max);
            return;
        }
        int j = 0;
        if constexpr (kTiles)
            for (; in_tiles(view) && j + kTile <= count; j += kTile)
                for (int i = 0; i < classes; i += kTile) {
                    const int c = last_tile(i);
                    transpose(from + j * view.pixel + c, view.pixel, x + c * B + j, B);
                }
        if (view.pixel == 1) {
            for (int c = 0; c < classes; ++c) widen_some(from + c * view.channel, x + c * B, count);
        } else if (view.channel < view.pixel) {
            for (; j < count; ++j)
                for (int c = 0; c < classes; ++c)
                    x[c * B + j] = widen(from[j * view.pixel + c * view.channel]);
        } else {
            for (int c = 0; c < classes; ++c)
                for (int k = 0; k < count; ++k) x[c * B + k] = widen(from[k * view.pixel + c * view.channel]);
        }
        for (int c = 0; c < classes; ++c) {
            A* row = x + c * B;
            IAL_SIMD for (int j = 0; j < B; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
        }
    }

    // Whether the pixels can be transposed in tiles.
    IAL_INLINE bool in_tiles(const View& view) const { return view.channel == 1 && classes >= kTile; }

    // The first class of the tile at c. The last tile is moved back to end at the last class, so two tiles
    // may overlap.
    IAL_INLINE int last_tile(int c) const { return c < classes - kTile ? c : classes - kTile; }

    IAL_INLINE void load_row(const T* from, A* row, A* max) {
        widen_lanes(from, row, B);
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = row[j] > max[j] ? row[j] : max[j];
    }

    // For a row with fewer pixels than B.
    IAL_INLINE static void widen_some(const T* from, A* to, int lanes) {
        IAL_SIMD for (int j = 0; j < B; ++j) to[j] = j < lanes ? widen(from[j]) : A(0);
    }

    IAL_INLINE static void narrow_some(const A* from, T* to, int lanes) {
        IAL_SIMD for (int j = 0; j < B; ++j) if (j < lanes) narrow(from[j], to + j);
    }

    template <typename U>
    IAL_INLINE static void prefetch(const U* lanes) {
        for (int line = 0; line < B * int(sizeof(U)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(lanes) + line);
    }

    // Makes the next block, which softmax() has loaded, the current block.
    IAL_INLINE void advance() {
        A* const done = x;
        x = x_ahead;
        x_ahead = done;
        IAL_SIMD for (int j = 0; j < B; ++j) max[j] = max_ahead[j];
    }

    // Sets bad_labels if a label is neither a class nor ignore_index. Labels are compared as I if all labels
    // of the block fit. Otherwise they are compared as int64_t, which is slower and rare.
    template <typename L>
    IAL_INLINE void load_labels(const L* from, int64_t stride) {
        const int64_t ignore = problem.ignore_index;
        const bool dense = count == B && stride == 1;
        if (dense) prefetch(from + B);
        if (dense && ignore == static_cast<I>(ignore) && copy_labels(from)) {
            bad_labels = check_labels(label, static_cast<I>(ignore));
        } else {
            alignas(64) int64_t labels[B];
            for (int j = 0; j < B; ++j) labels[j] = j < count ? from[j * stride] : ignore;
            bad_labels = check_labels(labels, ignore);
        }
    }

    // Sets label[j] = from[j]. Returns whether all labels fit.
    template <typename L>
    IAL_INLINE bool copy_labels(const L* from) {
        int64_t lost = 0;
        _Pragma("omp simd reduction(| : lost)") for (int j = 0; j < B; ++j) {
            label[j] = static_cast<I>(from[j]);
            lost |= int64_t(from[j]) ^ int64_t(label[j]);
        }
        return lost == 0;
    }

    // Sets label[j] = from[j], or -1 if that is no class. Returns whether a label is neither a class nor
    // ignore_index.
    template <typename L>
    IAL_INLINE bool check_labels(const L* from, L ignore) {
        const L most = static_cast<L>(classes - 1);
        int bad = 0;
        _Pragma("omp simd reduction(| : bad)") for (int j = 0; j < B; ++j) {
            const L y = from[j];
            const bool is_class = y >= 0 && y <= most && y != ignore;
            label[j] = is_class ? static_cast<I>(y) : I(-1);
            bad |= !is_class && y != ignore;
        }
        return bad != 0;
    }

    // The smallest key above `last`, or kNone. Keys and `last` are at least -1. Keys that are not above
    // `last` wrap around to large unsigned numbers.
    IAL_INLINE static I next_above(I last, const I* keys) {
        using U = std::make_unsigned_t<I>;
        const U first = U(last) + 1;
        U least = U(-1);
        _Pragma("omp simd reduction(min : least)") for (int j = 0; j < B; ++j) {
            const U beyond = U(keys[j]) - first;
            least = beyond < least ? beyond : least;
        }
        return least < U(kNone) ? I(first + least) : kNone;
    }

    // Bit c is set if the block has class c < 32.
    IAL_INLINE uint32_t labels_present() const {
        uint32_t present = 0;
        _Pragma("omp simd reduction(| : present)") for (int j = 0; j < B; ++j) present |=
            label[j] < 0 ? 0u : 1u << (label[j] & 31);
        return present;
    }

    // Lists the classes of the block. Neighbouring pixels mostly have one to three classes. Their values are
    // then broadcast instead of looked up for each pixel.
    IAL_INLINE void list_labels() {
        listed[0] = 0;
        classes_listed = 0;
        all_listed = true;
        if (kTiles && classes <= kMaxTable) {  // the variable shifts need vector instructions
            uint32_t left = labels_present();
            all_listed = __builtin_popcount(left) <= kMaxListed;
            for (; all_listed && left; left &= left - 1) listed[classes_listed++] = __builtin_ctz(left);
        } else {
            for (I y = next_above(-1, label); all_listed && y != kNone; y = next_above(y, label)) {
                all_listed = classes_listed < kMaxListed;
                if (all_listed) listed[classes_listed++] = y;
            }
        }
        if (!all_listed) find_some_class();
    }

    // select() for one value per class, if the values fit a table. Returns whether they do.
    template <int lanes, typename V, typename U>
    IAL_INLINE bool look_up_in_table(const V* values, U* to) const {
        if constexpr (kTables && lanes == 1) {
            if (classes <= kMaxTable) look_up_table(values, classes, label, to, B);
            return classes <= kMaxTable;
        }
        return false;
    }

    // to[j] = the value for the class of pixel j, from values[C, lanes] with 1 or B lanes. Arbitrary if pixel
    // j has no class.
    template <int lanes, typename V, typename U>
    IAL_INLINE void select(const V* values, U* to) const {
        if (look_up_in_table<lanes>(values, to)) return;
        if (all_listed) {
            const V* row = values + listed[0] * lanes;
            IAL_SIMD for (int j = 0; j < B; ++j) to[j] = row[j % lanes];
            for (int i = 1; i < classes_listed; ++i) {
                const I y = listed[i];
                row = values + y * lanes;
                IAL_SIMD for (int j = 0; j < B; ++j) {
                    const U value = row[j % lanes];
                    to[j] = label[j] == y ? value : to[j];
                }
            }
        } else {
            look_up_each<lanes>(values, to);
        }
    }

    // select() without the list of classes.
    template <int lanes, typename V, typename U>
    IAL_INLINE void look_up(const V* values, U* to) {
        if (look_up_in_table<lanes>(values, to)) return;
        if (classes <= kMaxCompared) {
            IAL_SIMD for (int j = 0; j < B; ++j) to[j] = values[j % lanes];
            for (I c = 1; c < classes; ++c) {
                const V* row = values + c * lanes;
                IAL_SIMD for (int j = 0; j < B; ++j) {
                    const U value = row[j % lanes];
                    to[j] = label[j] == c ? value : to[j];
                }
            }
            return;
        }
        find_some_class();
        look_up_each<lanes>(values, to);
    }

    IAL_INLINE void find_some_class() {
        IAL_SIMD for (int j = 0; j < B; ++j) some_class[j] = label[j] < 0 ? I(0) : label[j];
    }

    template <int lanes, typename V, typename U>
    IAL_INLINE void look_up_each(const V* values, U* to) const {
        for (int j = 0; j < B; ++j) to[j] = values[some_class[j] * lanes + j % lanes];
    }

    IAL_INLINE void load_target(int64_t n, int64_t p) {
        const View& labels = problem.layout.target;
        const int64_t first = problem.layout.offset(labels, n, p);
        switch (problem.label) {
            case Label::kUInt8:
                load_labels(static_cast<const uint8_t*>(problem.target) + first, labels.pixel);
                break;
            case Label::kInt32:
                load_labels(static_cast<const int32_t*>(problem.target) + first, labels.pixel);
                break;
            default:
                load_labels(static_cast<const int64_t*>(problem.target) + first, labels.pixel);
        }
        if (!problem.pixel_weight) return;
        const View& weights = problem.layout.pixel_weight;
        const A* from = problem.pixel_weight + problem.layout.offset(weights, n, p);
        if (count == B && weights.pixel == 1)
            memcpy(pixel_weight, from, sizeof pixel_weight);
        else
            for (int j = 0; j < count; ++j) pixel_weight[j] = from[j * weights.pixel];
    }

    // w[j] = by_class[class of pixel j] times the pixel weight. Arbitrary if pixel j has no class.
    IAL_INLINE void load_weights(const A* by_class) {
        select<1>(by_class, w);
        apply_pixel_weights();
    }

    // load_weights() without the list of classes.
    IAL_INLINE void look_up_weights(const A* by_class) {
        if (problem.weighted)
            look_up<1>(by_class, w);
        else
            IAL_SIMD for (int j = 0; j < B; ++j) w[j] = by_class[0];
        apply_pixel_weights();
    }

    IAL_INLINE void apply_pixel_weights() {
        if (!problem.pixel_weight) return;
        IAL_SIMD for (int j = 0; j < B; ++j) w[j] *= pixel_weight[j];
    }

    // sum[j] = sum_c exp(x_c - max). With `keep`, the exponentials replace the logits in x.
    // `ahead` points to the logits of the next block, or is null. They are loaded at the same time, so that
    // memory accesses and arithmetic overlap. Each cache line is used as soon as it arrives: if the rows of
    // an image are a power of two apart, other rows would evict it.
    template <bool keep>
    IAL_INLINE void softmax(const T* ahead) {
        if (problem.smoothing) smooth();
        IAL_SIMD for (int j = 0; j < B; ++j) {
            sum[j] = 0;
            max_ahead[j] = -__builtin_inf();
        }
        if (ahead) {
            const int64_t channel = problem.layout.logits.channel;
            for (int c = 0; c < classes; ++c) {
                const int row = c + (kRowsAhead < classes ? kRowsAhead : classes);
                prefetch(row < classes ? ahead + row * channel : ahead + B + (row - classes) * channel);
                exponentials<keep>(x + c * B);
                load_row(ahead + c * channel, x_ahead + c * B, max_ahead);
            }
        } else {
            for (int c = 0; c < classes; ++c) exponentials<keep>(x + c * B);
        }
    }

    IAL_INLINE void smooth() {
        IAL_SIMD for (int j = 0; j < B; ++j) smoothed[j] = 0;
        for (int c = 0; c < classes; ++c) {
            const A* row = x + c * B;
            const A share = problem.smoothing[c];
            IAL_SIMD for (int j = 0; j < B; ++j) smoothed[j] += share * (row[j] - max[j]);
        }
    }

    template <bool keep>
    IAL_INLINE void exponentials(A* row) {
        IAL_SIMD for (int j = 0; j < B; ++j) {
            const A e = exp_nonpositive(row[j] - max[j]);
            sum[j] += e;
            if (keep) row[j] = e;
        }
    }

    // sums[levels, kStats, kLanes] += the block's pixels. Makes one pass for each listed class, or one for
    // each level of the block if not all classes are listed.
    IAL_INLINE void accumulate(double* sums) {
        alignas(64) A logit[B], s[B], p2[B], q2[B];
        select<B>(x, logit);
        IAL_SIMD for (int j = 0; j < B; ++j) {
            const A shifted = logit[j] - max[j];
            const A pi = exp_nonpositive(shifted) / sum[j];
            s[j] = w[j] * (log_above_one(sum[j]) - shifted);
            p2[j] = pi * pi;
            q2[j] = (1 - pi) * (1 - pi);
        }
        if (problem.smoothing) smooth_loss(s);
        if (all_listed) {
            for (int i = 0; i < classes_listed; ++i)
                add(s, p2, q2, label, listed[i], sums + problem.class_levels[listed[i]] * kStats * kLanes);
        } else {
            alignas(64) I level[B];
            select<1>(problem.class_levels, level);
            IAL_SIMD for (int j = 0; j < B; ++j) level[j] = label[j] < 0 ? I(-1) : level[j];
            for (I k = next_above(-1, level); k != kNone; k = next_above(k, level))
                add(s, p2, q2, level, k, sums + k * kStats * kLanes);
        }
    }

    // Turns s, the weighted cross-entropy of each pixel, into that with label smoothing.
    IAL_INLINE void smooth_loss(A* s) const {
        const A target_share = static_cast<A>(problem.target_share), all = problem.smoothing_sum;
        IAL_SIMD for (int j = 0; j < B; ++j) s[j] =
            target_share * s[j] + pixel_weight[j] * (all * log_above_one(sum[j]) - smoothed[j]);
    }

    // s[j] = the weighted cross-entropy of pixel j, after softmax(). Arbitrary if pixel j has no class.
    // logit[j] is the logit of its class.
    IAL_INLINE void cross_entropy(const A* logit, A* s) const {
        IAL_SIMD for (int j = 0; j < B; ++j) s[j] = w[j] * (log_above_one(sum[j]) - (logit[j] - max[j]));
        if (problem.smoothing) smooth_loss(s);
    }

    // accumulate() for one level. P2 and Q2 are left out.
    IAL_INLINE void accumulate_one_level(const A* logit, double* sums) const {
        alignas(64) A s[B], one[B];
        cross_entropy(logit, s);
        IAL_SIMD for (int j = 0; j < B; ++j) one[j] = 1;
        add_valid(s, sums + kS * kLanes);
        add_valid(one, sums + kCount * kLanes);
        add_valid(w, sums + kWeight * kLanes);
    }

    // cross_entropy(), and 0 for a pixel without a class.
    IAL_INLINE void valid_cross_entropy(const A* logit, A* s) const {
        cross_entropy(logit, s);
        IAL_SIMD for (int j = 0; j < B; ++j) s[j] = label[j] < 0 ? A(0) : s[j];
    }

    // to[kLanes] += the values of the pixels that have a class.
    IAL_INLINE void add_valid(const A* values, double* to) const {
        IAL_SIMD for (int l = 0; l < kLanes; ++l) {
            A total = 0;
            IAL_UNROLL for (int i = 0; i < B; i += kLanes) total += label[i + l] < 0 ? A(0) : values[i + l];
            to[l] += total;
        }
    }

    // to[kStats, kLanes] += the pixels whose key is `key`.
    IAL_INLINE void add(const A* s, const A* p2, const A* q2, const I* keys, I key, double* to) const {
        alignas(64) A one[B];
        IAL_SIMD for (int j = 0; j < B; ++j) one[j] = 1;
        add(s, keys, key, to + kS * kLanes);
        add(p2, keys, key, to + kP2 * kLanes);
        add(q2, keys, key, to + kQ2 * kLanes);
        add(one, keys, key, to + kCount * kLanes);
        add(w, keys, key, to + kWeight * kLanes);
    }

    IAL_INLINE static void add(const A* values, const I* keys, I key, double* to) {
        IAL_SIMD for (int l = 0; l < kLanes; ++l) {
            A total = 0;
            IAL_UNROLL for (int i = 0; i < B; i += kLanes) total += keys[i + l] == key ? values[i + l] : A(0);
            to[l] += total;
        }
    }

    // Computes dL/dx_c = scale x_c + [c = y] extra, after softmax<true>(). The weights w must contain dL/dS.
    // class_grads: see load_class_grads(). one_level: dL/dP2 and dL/dQ2 are 0.
    template <bool one_level>
    IAL_INLINE void differentiate(const A* class_grads, A* scale, A* extra) {
        alignas(64) A e[B], dp2[B], dq2[B];
        if constexpr (!one_level) {
            select<B>(x, e);
            select<1>(class_grads + kP2 * classes, dp2);
            select<1>(class_grads + kQ2 * classes, dq2);
        }
        const A cross = problem.cross;
        int ignored_nan = 0;
        _Pragma("omp simd reduction(| : ignored_nan)") for (int j = 0; j < B; ++j) {
            const A inverse = 1 / sum[j];
            if constexpr (one_level) {
                scale[j] = label[j] < 0 ? 0 : w[j] * inverse;
                extra[j] = label[j] < 0 ? 0 : -w[j];
            } else {
                const PixelGradient<A> pixel(w[j], dp2[j], dq2[j], e[j] * inverse, cross);
                scale[j] = label[j] < 0 ? 0 : pixel.scale * inverse;
                extra[j] = label[j] < 0 ? 0 : pixel.extra;
            }
            ignored_nan |= label[j] < 0 && sum[j] != sum[j];
        }
        // Ignored pixels have a gradient of 0 for any logits, but 0 * NaN is NaN.
        if (ignored_nan)
            for (int j = 0; j < B; ++j)
                for (int c = 0; label[j] < 0 && c < classes; ++c) x[c * B + j] = 0;
        if (problem.smoothing) smooth_gradient<one_level>(class_grads + kSoft * classes, scale);
    }

    // dL/dx_c = (scale + soft sum_c s_c / sum) x_c + [c = y] extra - soft s_c. `soft` is the pixel weight
    // times dL/dS of the pixel's class, from by_class[C]. x_c becomes the gradient without `extra`, and
    // `scale` becomes 1.
    template <bool one_level>
    IAL_INLINE void smooth_gradient(const A* by_class, A* scale) {
        alignas(64) A soft[B];
        if constexpr (one_level)
            IAL_SIMD for (int j = 0; j < B; ++j) soft[j] = by_class[0];
        else
            select<1>(by_class, soft);
        const A all = problem.smoothing_sum;
        IAL_SIMD for (int j = 0; j < B; ++j) {
            soft[j] = label[j] < 0 ? 0 : soft[j] * pixel_weight[j];
            scale[j] = label[j] < 0 ? 0 : scale[j] + soft[j] * all / sum[j];
        }
        for (int c = 0; c < classes; ++c) {
            A* row = x + c * B;
            const A share = problem.smoothing[c];
            IAL_SIMD for (int j = 0; j < B; ++j) row[j] = row[j] * scale[j] - soft[j] * share;
        }
        IAL_SIMD for (int j = 0; j < B; ++j) scale[j] = 1;
    }

    template <bool one_level>
    IAL_INLINE void store_gradient(int64_t n, int64_t p, const A* class_grads) {
        alignas(64) A scale[B], extra[B];
        differentiate<one_level>(class_grads, scale, extra);
        const View& view = problem.layout.grad;
        T* to = problem.grad + problem.layout.offset(view, n, p);
        const bool dense = count == B && view.pixel == 1;
        const bool stream =
            dense && problem.stream && aligned(to) && view.channel * sizeof(T) % kStreamBytes == 0;
        for (I c = 0; c < classes; ++c) {
            A* row = x + c * B;
            if (dense) {
                alignas(64) A g[B];
                IAL_SIMD for (int j = 0; j < B; ++j) g[j] =
                    row[j] * scale[j] + (label[j] == c ? extra[j] : A(0));
                stream ? stream_lanes(g, to + c * view.channel, B)
                       : narrow_lanes(g, to + c * view.channel, B);
            } else {
                IAL_SIMD for (int j = 0; j < B; ++j) row[j] =
                    row[j] * scale[j] + (label[j] == c ? extra[j] : A(0));
            }
        }
        if (dense) return;
        int j = 0;
        if constexpr (kTiles)
            for (; in_tiles(view) && j + kTile <= count; j += kTile)
                for (int i = 0; i < classes; i += kTile) {
                    const int c = last_tile(i);
                    transpose(x + c * B + j, B, to + j * view.pixel + c, view.pixel);
                }
        if (view.pixel == 1) {
            for (int c = 0; c < classes; ++c) narrow_some(x + c * B, to + c * view.channel, count);
        } else if (view.channel < view.pixel) {
            for (; j < count; ++j)
                for (int c = 0; c < classes; ++c)
                    narrow(x[c * B + j], to + j * view.pixel + c * view.channel);
        } else {
            for (int c = 0; c < classes; ++c)
                for (int k = 0; k < count; ++k) narrow(x[c * B + k], to + k * view.pixel + c * view.channel);
        }
    }
};

// The kernels: what to do with a block after load_logits(). `ahead`: see softmax().
struct Reduce {
    double* sums;  // [levels, kStats, kLanes]
    bool* bad;

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p, const T* ahead) const {
        block.load_target(n, p);
        block.list_labels();
        *bad |= block.bad_labels;
        block.load_weights(block.problem.weight);
        block.template softmax<false>(ahead);
        block.accumulate(sums);
    }
};

// one_level: see Block::differentiate().
template <typename A, bool one_level>
struct ReduceBackward {
    const A* class_grads;

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p, const T* ahead) const {
        const A* const by_class = class_grads + kS * block.classes;
        block.load_target(n, p);
        if constexpr (one_level) {
            block.look_up_weights(by_class);
        } else {
            block.list_labels();
            block.load_weights(by_class);
        }
        block.template softmax<true>(ahead);
        block.template store_gradient<one_level>(n, p, class_grads);
    }
};

struct PixelNll {
    bool* bad;

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p, const T* ahead) const {
        using A = typename Problem<T>::A;
        alignas(64) A logit[B], nll[B];
        block.load_target(n, p);
        *bad |= block.bad_labels;
        block.template look_up<B>(block.x, logit);
        block.template softmax<false>(ahead);
        block.look_up_weights(block.problem.weight);
        block.valid_cross_entropy(logit, nll);
        const View& view = block.problem.layout.grad;
        A* const to = block.problem.nll + block.problem.layout.offset(view, n, p);
        if (block.count == B && view.pixel == 1)
            memcpy(to, nll, sizeof nll);
        else
            for (int j = 0; j < block.count; ++j) to[j * view.pixel] = nll[j];
    }
};

// Reduce and ReduceBackward together, for one level.
template <typename A>
struct OnePass {
    const A* class_grads;
    double* sums;  // [kStats, kLanes]
    bool* bad;

    template <typename T, int B>
    IAL_INLINE void run(Block<T, B>& block, int64_t n, int64_t p, const T* ahead) const {
        block.load_target(n, p);
        *bad |= block.bad_labels;
        alignas(64) A logit[B];
        block.template look_up<B>(block.x, logit);
        block.template softmax<true>(ahead);
        block.look_up_weights(block.problem.weight);
        block.accumulate_one_level(logit, sums);
        block.look_up_weights(class_grads + kS * block.classes);
        block.template store_gradient<true>(n, p, class_grads);
    }
};

// Runs `kernel` on the pixels [begin, end) of image n. A block ends at the end of a row and of the range. The
// remaining pixels of a row form one wide block, or narrow blocks if there are few. The lane of a pixel
// therefore depends on the shapes alone, not on the number of threads. buffer: [2, C, kWide].
template <typename T, typename Kernel>
IAL_INLINE void for_blocks(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                           typename Problem<T>::A* buffer, const Kernel& kernel) {
    const Layout& layout = problem.layout;
    for (int64_t p = begin; p < end;) {
        const int64_t in_row = layout.row - p % layout.row;
        const int64_t stop = p + (end - p < in_row ? end - p : in_row);
        if (stop - p > kFew) {
            Block<T, kWide> block(problem, buffer);
            for (bool loaded = false; stop - p > kFew; p += block.count) {
                if (!loaded) block.load_logits(n, p, static_cast<int>(stop - p < kWide ? stop - p : kWide));
                loaded = layout.logits.pixel == 1 && stop - p >= 2 * kWide;
                kernel.run(block, n, p,
                           loaded ? problem.logits + layout.offset(layout.logits, n, p + kWide) : nullptr);
                if (loaded) block.advance();
            }
        }
        for (Block<T, kNarrow> block(problem, buffer); p < stop; p += block.count) {
            block.load_logits(n, p, static_cast<int>(stop - p < kNarrow ? stop - p : kNarrow));
            kernel.run(block, n, p, static_cast<const T*>(nullptr));
        }
    }
}

// stats[i] = the sum of row i of sums[rows, kLanes].
IAL_INLINE void add_lanes(const double* sums, int64_t rows, double* stats) {
    for (int64_t i = 0; i < rows; ++i) {
        stats[i] = 0;
        for (int l = 0; l < kLanes; ++l) stats[i] += sums[i * kLanes + l];
    }
}

// Writes stats[levels, kStats] of the range. sums[levels, kStats, kLanes]: an accumulator, set to zero.
template <typename T>
IAL_TARGET void reduce(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                       typename Problem<T>::A* buffer, double* sums, double* stats, bool* bad) {
    for_blocks(problem, n, begin, end, buffer, Reduce{sums, bad});
    add_lanes(sums, int64_t(problem.levels) * kStats, stats);
}

template <bool one_level, typename T>
IAL_TARGET void reduce_backward(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                                typename Problem<T>::A* buffer, const typename Problem<T>::A* class_grads) {
    for_blocks(problem, n, begin, end, buffer,
               ReduceBackward<typename Problem<T>::A, one_level>{class_grads});
#if IAL_X86_VECTORS
    _mm_sfence();  // nothing else orders streaming stores
#endif
}

// reduce() and reduce_backward() together, for one level. P2 and Q2 in stats are 0.
template <typename T>
IAL_TARGET void one_pass(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                         typename Problem<T>::A* buffer, const typename Problem<T>::A* class_grads,
                         double* sums, double* stats, bool* bad) {
    for_blocks(problem, n, begin, end, buffer, OnePass<typename Problem<T>::A>{class_grads, sums, bad});
    add_lanes(sums, kStats, stats);
#if IAL_X86_VECTORS
    _mm_sfence();
#endif
}

// Writes the nll of the pixels [begin, end) of image n.
template <typename T>
IAL_TARGET void pixel_nll(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end,
                          typename Problem<T>::A* buffer, bool* bad) {
    for_blocks(problem, n, begin, end, buffer, PixelNll{bad});
}

// The sum of the weights of the pixels [begin, end) of image n. sums[kLanes]: an accumulator, set to zero.
template <typename T>
IAL_TARGET void sum_weights(const Problem<T>& problem, int64_t n, int64_t begin, int64_t end, double* sums,
                            double* weight, bool* bad) {
    const Layout& layout = problem.layout;
    Block<T, kWide> block(problem, nullptr);
    for (int64_t p = begin; p < end; p += block.count) {
        const int64_t in_row = layout.row - p % layout.row;
        const int64_t left = end - p < in_row ? end - p : in_row;
        block.count = static_cast<int>(left < kWide ? left : kWide);
        block.load_target(n, p);
        *bad |= block.bad_labels;
        block.look_up_weights(problem.weight);
        block.add_valid(block.w, sums);
    }
    add_lanes(sums, 1, weight);
}

}  // namespace IAL_ISA
}  // namespace ial
