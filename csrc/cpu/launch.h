// Runs the kernels on checked tensors. The work is split into chunks, which torch's threads process.
// Each type's kernels are compiled in a file of their own, since they take half a minute.
//
// The split depends on the shapes alone. Each chunk writes its partial sums to its own row, and the rows are
// added in order. Results are therefore bitwise the same for any number of threads.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "../inputs.h"
#include "../parallel.h"
#include "dispatch.h"

namespace ial {

// Equal parts of each image: of its pixels, or of its rows of cells. A chunk is large enough to amortise its
// setup. There are few enough chunks that their partial sums take little memory compared with the logits.
struct Chunks {
    static constexpr int64_t kElements = 1 << 15, kSumBytes = 1 << 18;
    int64_t length, size, per_image, count;  // length: pixels or rows of an image

    Chunks(int64_t images, int64_t length, int64_t size)
        : length(length), size(size), per_image((length + size - 1) / size), count(images * per_image) {}

    int64_t image(int64_t i) const { return i / per_image; }
    int64_t begin(int64_t i) const { return i % per_image * size; }
    int64_t end(int64_t i) const { return std::min(begin(i) + size, length); }

    // Chunks of about `elements` logits, for `classes` classes.
    static Chunks of_pixels(const Layout& layout, int levels, int64_t classes, int64_t elements) {
        const int64_t max_chunks =
            std::max<int64_t>(1, kSumBytes / (levels * kStats * int64_t(sizeof(double))));
        const int64_t min_pixels = (layout.batch * layout.pixels + max_chunks - 1) / max_chunks;
        const int64_t pixels = std::max(elements / classes, min_pixels);
        return {layout.batch, layout.pixels, (pixels / kWide + 1) * kWide};
    }
    static Chunks of_pixels(const Layout& layout, int levels) {
        return of_pixels(layout, levels, layout.classes, kElements);
    }
    // Small enough that the chunks of a small image keep two threads busy.
    static Chunks of_one_pass(const Layout& layout) {
        return of_pixels(layout, 1, layout.classes, kElements / 4);
    }
    static Chunks of_labels(const Layout& layout) { return of_pixels(layout, 1, 1, kElements); }

    // The backward pass stores two rows of each chunk separately, since their sums need the neighbouring
    // chunks.
    static Chunks of_rows(const Upsampling& up) {
        constexpr int64_t kMinRows = 8;
        const int64_t pixels = std::max<int64_t>(1, up.y.fine * up.x.fine / up.y.coarse);
        return {up.batch, up.y.coarse, std::max(kMinRows, kElements / (up.classes * pixels))};
    }
};

// Memory aligned to 64 bytes, the widest vector.
template <typename A>
struct Buffer {
    explicit Buffer(int64_t size) : storage(size + 64 / sizeof(A)) {}
    A* aligned() {
        const auto address = reinterpret_cast<uintptr_t>(storage.data());
        return reinterpret_cast<A*>((address + 63) / 64 * 64);
    }
    std::vector<A> storage;
};

// Gradients of this size or larger are written with streaming stores, past the caches. An ordinary store
// reads each line first. No cache would still hold the lines when the next step of the network uses them.
constexpr size_t kStreamFrom = 2 << 20;

// Permutes the spatial dimensions of tensors (N, C, *spatial) or (N, *spatial) into the order of the logits'
// strides, so that the pixels of a row are neighbours in memory. The order of the other dimensions does not
// matter.
struct Spatial {
    at::DimVector order;  // of the logits' dimensions
    bool moved;

    explicit Spatial(const Tensor& logits) : order(logits.dim()) {
        std::iota(order.begin(), order.end(), 0);
        const auto stride = [&](int64_t d) {  // a stride of 0 is the outermost
            return logits.stride(d) ? logits.stride(d) : std::numeric_limits<int64_t>::max();
        };
        if (logits.dim() > 2)
            std::stable_sort(order.begin() + 2, order.end(),
                             [&](int64_t a, int64_t b) { return stride(a) > stride(b); });
        moved = !std::is_sorted(order.begin(), order.end());
    }
    Tensor operator()(const Tensor& tensor) const {
        if (!moved) return tensor;
        at::DimVector dims(order);
        if (tensor.dim() < static_cast<int64_t>(order.size())) {  // no class dimension
            dims.erase(dims.begin() + 1);
            for (int64_t& d : dims) d -= d > 0;
        }
        return tensor.permute(dims);
    }
};

// Problem<T> and the memory that it points to.
template <typename T>
struct Call {
    using A = typename Problem<T>::A;

    std::vector<A> weight, smoothing;
    OptionalTensor pixel_weight;
    std::vector<int32_t> class_levels;
    Problem<T> problem{};
    Upsampling upsampling{};  // for coarse logits; problem.layout is then that of the target and pixel_weight

    Call(const Inputs& inputs, const Tensor& grad)
        : weight(inputs.class_levels.size(), A(1)),
          class_levels(inputs.class_levels.begin(), inputs.class_levels.end()) {
        constexpr at::ScalarType arithmetic = c10::CppTypeToScalarType<A>::value;
        if (inputs.weight) {
            const Tensor given = inputs.weight->to(arithmetic).contiguous();
            std::copy_n(given.const_data_ptr<A>(), weight.size(), weight.begin());
        }
        if (inputs.pixel_weight) pixel_weight = inputs.pixel_weight->to(arithmetic);

        const auto with = [&](const Tensor& logits, const Tensor& target, const OptionalTensor& weights) {
            return Inputs{logits,
                          target,
                          inputs.weight,
                          weights,
                          inputs.class_levels,
                          inputs.ignore_index,
                          inputs.gradient,
                          inputs.label_smoothing,
                          inputs.align_corners};
        };
        if (inputs.align_corners) {
            upsampling = with(inputs.logits, inputs.target, pixel_weight).upsampling(grad);
            const Tensor pixels = inputs.target.unsqueeze(1);
            problem.layout = with(pixels, inputs.target, pixel_weight).layout(pixels);
            problem.layout.classes = upsampling.classes;
        } else {
            const Spatial spatial(inputs.logits);
            const Tensor logits = spatial(inputs.logits), target = spatial(inputs.target);
            OptionalTensor weights;
            if (pixel_weight) weights = spatial(*pixel_weight);
            problem.layout = with(logits, target, weights).layout(spatial(grad));
        }
        problem.logits = inputs.logits.const_data_ptr<T>();
        problem.target = inputs.target.const_data_ptr();
        problem.label = inputs.label();
        problem.weight = weight.data();
        problem.weighted = inputs.weight.has_value();
        if (inputs.label_smoothing > 0) {
            const double share = inputs.label_smoothing / static_cast<double>(weight.size());
            double all = 0;
            for (const A w : weight) {
                smoothing.push_back(static_cast<A>(share * w));
                all += share * w;
            }
            problem.smoothing = smoothing.data();
            problem.smoothing_sum = static_cast<A>(all);
        }
        problem.target_share = 1 - inputs.label_smoothing;
        problem.pixel_weight = pixel_weight ? pixel_weight->const_data_ptr<A>() : nullptr;
        problem.class_levels = class_levels.data();
        problem.levels = inputs.levels();
        problem.ignore_index = inputs.ignore_index;
    }
    Call(const Call&) = delete;

    // fresh: grad is a new tensor, not the logits.
    void set_gradient(const Inputs& inputs, const Tensor& grad, bool fresh) {
        problem.grad = grad.mutable_data_ptr<T>();
        problem.cross = inputs.exact() ? 1 : 0;
        problem.stream = fresh && grad.nbytes() >= kStreamFrom;
    }
};

// Coarse<T> and the memory that it points to.
template <typename T>
struct CoarseCall {
    using A = typename Problem<T>::A;

    std::vector<int32_t> sweeps, pixel;
    std::vector<A> fraction;
    Coarse<T> coarse{};

    explicit CoarseCall(const Upsampling& up) {
        coarse.up = up;
        const Axis& axis = up.x;
        coarse.lanes = (axis.coarse + kCells - 1) / kCells * kCells;
        coarse.width = coarse.lanes + kCellPad;
        sweeps.resize(coarse.lanes / kCells);
        for (int64_t i = 0; i < axis.coarse; ++i) {
            const auto pixels = static_cast<int32_t>(axis.first(i + 1) - axis.first(i));
            sweeps[i / kCells] = std::max(sweeps[i / kCells], pixels);
        }
        const int rows = std::min(kSweeps, *std::max_element(sweeps.begin(), sweeps.end()));
        pixel.resize(rows * coarse.lanes);
        fraction.resize(rows * coarse.lanes);
        place_pixels(axis, 0, coarse.lanes, 0, rows, coarse.lanes, pixel.data(), fraction.data());
        coarse.sweeps = sweeps.data();
        coarse.pixel = pixel.data();
        coarse.fraction = fraction.data();
    }
    CoarseCall(const CoarseCall&) = delete;

    // The size of a thread's buffer. See CellBuffer.
    int64_t buffer() const { return coarse.up.classes * (4 * kCells + 3 * (kCells + kCellPad)); }
};

// Reports a target with labels that are neither a class nor ignore_index. The message is that of
// ial_cuda.validate_target.
[[noreturn]] inline void throw_bad_labels(const Inputs& inputs) {
    const Tensor target = inputs.target.to(at::kLong).contiguous();
    const int64_t* const labels = target.const_data_ptr<int64_t>();
    const int64_t classes = inputs.logits.size(1), pixels = target.numel();
    const auto is_bad = [&](int64_t y) { return (y < 0 || y >= classes) && y != inputs.ignore_index; };
    const int64_t* const found = std::find_if(labels, labels + pixels, is_bad);
    const int64_t label = *found, count = std::count_if(found, labels + pixels, is_bad);
    std::string position;
    int64_t pixel = found - labels;
    for (int64_t d = target.dim() - 1; d >= 0; --d) {
        position = std::to_string(pixel % target.size(d)) + (position.empty() ? "" : ", " + position);
        pixel /= target.size(d);
    }
    if (target.dim() == 1) position += ",";
    std::string hint;
    if (label == -100 || label == -1 || label == 255)
        hint = ": pass ignore_index=" + std::to_string(label) + " if it is the void label";
    else if (classes == 1)
        hint = ": binary logits x need two channels, torch.cat([torch.zeros_like(x), x], 1)";
    TORCH_CHECK_VALUE(false, "target has label ", label, " at (", position, "), the first of ", count,
                      " bad pixels, expected labels 0 to ", classes - 1,
                      " or ignore_index=", inputs.ignore_index, hint);
}

// -------------------------------------------------------------------------------------------------
// reduce

// Calls body(first, last, &bad) for parts of the chunks, in parallel. Throws if a call has set `bad`.
template <typename Body>
void run_chunks(const Inputs& inputs, const Chunks& chunks, const Body& body) {
    std::atomic<bool> any_bad{false};
    parallel_for(chunks.count, [&](int64_t first, int64_t last) {
        bool bad = false;
        body(first, last, &bad);
        if (bad) any_bad = true;
    });
    if (any_bad) throw_bad_labels(inputs);
}

// Returns stats (N, g, kStats). `reduce(i, buffer, lanes, sums, bad)` writes the sums [g, kStats] of chunk i.
template <typename A, typename Reduce>
Tensor reduce_chunks(const Inputs& inputs, const Chunks& chunks, int64_t buffer_size, const Reduce& reduce) {
    const int64_t row = inputs.levels() * kStats;
    std::vector<double> sums(chunks.count * row);
    run_chunks(inputs, chunks, [&](int64_t first, int64_t last, bool* bad) {
        Buffer<A> buffer(buffer_size);
        Buffer<double> lanes(row * kLanes);
        for (int64_t i = first; i < last; ++i) {
            std::fill_n(lanes.aligned(), row * kLanes, 0.0);
            reduce(i, buffer.aligned(), lanes.aligned(), &sums[i * row], bad);
        }
    });

    const int64_t images = inputs.logits.size(0);
    Tensor stats = at::empty({images, inputs.levels(), kStats}, inputs.logits.options().dtype(at::kDouble));
    double* to = stats.mutable_data_ptr<double>();
    for (int64_t n = 0; n < images; ++n)
        for (int64_t s = 0; s < row; ++s, ++to) {
            *to = 0;
            for (int64_t i = 0; i < chunks.per_image; ++i) *to += sums[(n * chunks.per_image + i) * row + s];
        }
    return stats;
}

template <typename T>
Tensor launch_reduce(const Inputs& inputs) {
    using A = typename Call<T>::A;
    const Call<T> call(inputs, inputs.logits);
    const Problem<T>& problem = call.problem;
    if (inputs.align_corners) {
        const CoarseCall<T> coarse(call.upsampling);
        const Chunks chunks = Chunks::of_rows(call.upsampling);
        return reduce_chunks<A>(inputs, chunks, coarse.buffer(),
                                [&](int64_t i, A* buffer, double* lanes, double* sums, bool* bad) {
                                    IAL_DISPATCH(reduce_cells, problem, coarse.coarse, chunks.image(i),
                                                 chunks.begin(i), chunks.end(i), buffer, lanes, sums, bad);
                                });
    }
    const Chunks chunks = Chunks::of_pixels(problem.layout, problem.levels);
    return reduce_chunks<A>(inputs, chunks, 2 * problem.layout.classes * kWide,
                            [&](int64_t i, A* buffer, double* lanes, double* sums, bool* bad) {
                                IAL_DISPATCH(reduce, problem, chunks.image(i), chunks.begin(i), chunks.end(i),
                                             buffer, lanes, sums, bad);
                            });
}

// -------------------------------------------------------------------------------------------------
// reduce_backward

// Fills class_grads[4, C] from dL/dstats [g, kStats] of an image, times `incoming`. Rows kS, kP2 and kQ2 are
// dL/dS, dL/dP2 and dL/dQ2 of each class. Row kS is also multiplied by the class weight and by
// target_share. Row kSoft is dL/dS for label smoothing.
template <typename T, typename A>
void load_class_grads(const Problem<T>& problem, const double* grad_stats, double incoming, A* class_grads) {
    const int64_t classes = problem.layout.classes;
    for (int64_t c = 0; c < classes; ++c) {
        const double* from = grad_stats + problem.class_levels[c] * kStats;
        class_grads[kS * classes + c] =
            static_cast<A>(problem.target_share * problem.weight[c] * (from[kS] * incoming));
        for (const Stat s : {kP2, kQ2}) class_grads[s * classes + c] = static_cast<A>(from[s] * incoming);
        class_grads[kSoft * classes + c] = static_cast<A>(from[kS] * incoming);
    }
}

// The gradient of one level's S. In place of grad_stats it saves the arithmetic of the factors.
constexpr double kUnitGrad[kStats] = {1};

// Fills class_grads for image n, with an incoming gradient of 1. grad_stats: kUnitGrad if undefined.
template <typename T, typename A>
void load_class_grads(const Problem<T>& problem, const Tensor& grad_stats, int64_t n, A* class_grads) {
    const double* const of_image =
        grad_stats.defined() ? grad_stats.const_data_ptr<double>() + n * problem.levels * kStats : kUnitGrad;
    load_class_grads(problem, of_image, 1, class_grads);
}

template <typename T>
void reduce_backward_pixels(const Problem<T>& problem, const Tensor& grad_stats) {
    using A = typename Problem<T>::A;
    const Chunks chunks = Chunks::of_pixels(problem.layout, problem.levels);
    // Starts with the last chunk: the caches still hold what reduce read last.
    parallel_for(chunks.count, [&](int64_t first, int64_t last) {
        Buffer<A> buffer(2 * problem.layout.classes * kWide), class_grads(4 * problem.layout.classes);
        int64_t image = -1;
        for (int64_t i = last - 1; i >= first; --i) {
            if (chunks.image(i) != image)
                load_class_grads(problem, grad_stats, image = chunks.image(i), class_grads.aligned());
            if (grad_stats.defined())
                IAL_DISPATCH(reduce_backward<false>, problem, image, chunks.begin(i), chunks.end(i),
                             buffer.aligned(), class_grads.aligned());
            else
                IAL_DISPATCH(reduce_backward<true>, problem, image, chunks.begin(i), chunks.end(i),
                             buffer.aligned(), class_grads.aligned());
        }
    });
}

// The first row of logits of a chunk gets gradients from the cells of two chunks, which may run on two
// threads. Each chunk therefore stores its contributions to its own first row (head) and to the next chunk's
// first row (tail). They are added at the end.
template <typename A>
struct SharedRows {
    const Upsampling& up;
    const Chunks chunks;
    const int64_t width, row;  // width: a row of one class with padding
    const Tensor kept;

    SharedRows(const Upsampling& up, int64_t width)
        : up(up),
          chunks(Chunks::of_rows(up)),
          width(width),
          row(up.classes * width),
          kept(at::empty({2, chunks.count, row}, c10::CppTypeToScalarType<A>::value)) {}

    A* head(int64_t i) const { return kept.mutable_data_ptr<A>() + i * row; }
    A* tail(int64_t i) const { return head(chunks.count + i); }

    template <typename T>
    void store(T* grad) const {
        for (int64_t i = 0; i < chunks.count; ++i) {
            const int64_t y = chunks.begin(i);
            for (int64_t c = 0; c < up.classes; ++c) {
                T* const to = grad + up.grad.offset(chunks.image(i), y, 0) + c * up.grad.channel;
                const A* const own = head(i) + c * width;
                const A* const above = y > 0 ? tail(i - 1) + c * width : nullptr;
                for (int64_t x = 0; x < up.x.coarse; ++x)
                    to[x * up.grad.pixel] = static_cast<T>(above ? own[x] + above[x] : own[x]);
            }
        }
    }
};

template <typename T>
void reduce_backward_coarse(const Problem<T>& problem, const Upsampling& up, const Tensor& grad_stats) {
    using A = typename Problem<T>::A;
    const CoarseCall<T> call(up);
    const SharedRows<A> shared(up, call.coarse.width);
    const Chunks& chunks = shared.chunks;
    parallel_for(chunks.count, [&](int64_t first, int64_t last) {
        Buffer<A> buffer(call.buffer()), class_grads(4 * up.classes), work(shared.row);
        for (int64_t i = first; i < last; ++i) {
            load_class_grads(problem, grad_stats, chunks.image(i), class_grads.aligned());
            IAL_DISPATCH(reduce_backward_cells, problem, call.coarse, chunks.image(i), chunks.begin(i),
                         chunks.end(i), buffer.aligned(), class_grads.aligned(), shared.head(i),
                         shared.tail(i), work.aligned());
        }
    });
    shared.store(problem.grad);
}

// grad_stats: see load_class_grads().
template <typename T>
void launch_reduce_backward(const Inputs& inputs, const Tensor& grad_stats, const Tensor& grad, bool fresh) {
    Call<T> call(inputs, grad);
    call.set_gradient(inputs, grad, fresh);
    if (inputs.align_corners)
        reduce_backward_coarse(call.problem, call.upsampling, grad_stats);
    else
        reduce_backward_pixels(call.problem, grad_stats);
}

// -------------------------------------------------------------------------------------------------
// One pass: reduce and reduce_backward together, for one level

template <typename T>
struct OnePass {
    const Inputs& inputs;
    Call<T> call;

    OnePass(const Inputs& given, const Tensor& grad) : inputs(given), call(given, grad) {
        call.set_gradient(inputs, grad, /*fresh=*/true);
    }

    // The weight of the valid pixels, from one read of the labels and pixel weights.
    double sum_weights() const;

    // Returns stats (N, 1, kStats) with P2 and Q2 = 0, and writes the gradient for the incoming gradient
    // `incoming`. grad_stats is for an incoming gradient of 1 and is the same for all images.
    Tensor run(const Tensor& grad_stats, double incoming) const;
};

template <typename T>
double OnePass<T>::sum_weights() const {
    const Problem<T>& problem = call.problem;
    const Chunks chunks = Chunks::of_labels(problem.layout);
    std::vector<double> sums(chunks.count);
    run_chunks(inputs, chunks, [&](int64_t first, int64_t last, bool* bad) {
        for (int64_t i = first; i < last; ++i) {
            alignas(64) double lanes[kLanes] = {};
            IAL_DISPATCH(sum_weights, problem, chunks.image(i), chunks.begin(i), chunks.end(i), lanes,
                         &sums[i], bad);
        }
    });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
}

template <typename T>
Tensor OnePass<T>::run(const Tensor& grad_stats, double incoming) const {
    using A = typename Problem<T>::A;
    const Problem<T>& problem = call.problem;
    const int64_t classes = problem.layout.classes;
    std::vector<A> class_grads(4 * classes);
    load_class_grads(problem, grad_stats.const_data_ptr<double>(), incoming, class_grads.data());
    if (inputs.align_corners) {
        const CoarseCall<T> coarse(call.upsampling);
        const SharedRows<A> shared(call.upsampling, coarse.coarse.width);
        const Chunks& chunks = shared.chunks;
        const Tensor stats = reduce_chunks<A>(
            inputs, chunks, coarse.buffer() + shared.row,
            [&](int64_t i, A* buffer, double* lanes, double* sums, bool* bad) {
                IAL_DISPATCH(one_pass_cells, problem, coarse.coarse, chunks.image(i), chunks.begin(i),
                             chunks.end(i), buffer, class_grads.data(), shared.head(i), shared.tail(i),
                             buffer + coarse.buffer(), lanes, sums, bad);
            });
        shared.store(problem.grad);
        return stats;
    }
    const Chunks chunks = Chunks::of_one_pass(problem.layout);
    return reduce_chunks<A>(inputs, chunks, 2 * classes * kWide,
                            [&](int64_t i, A* buffer, double* lanes, double* sums, bool* bad) {
                                IAL_DISPATCH(one_pass, problem, chunks.image(i), chunks.begin(i),
                                             chunks.end(i), buffer, class_grads.data(), lanes, sums, bad);
                            });
}

// -------------------------------------------------------------------------------------------------
// pixel_nll

template <typename T>
void launch_pixel_nll(const Inputs& inputs, const Tensor& map) {
    using A = typename Problem<T>::A;
    Call<T> call(inputs, map.unsqueeze(1));
    Problem<T>& problem = call.problem;
    problem.nll = map.mutable_data_ptr<A>();
    if (inputs.align_corners) {
        const CoarseCall<T> coarse(call.upsampling);
        const Chunks chunks = Chunks::of_rows(call.upsampling);
        return run_chunks(inputs, chunks, [&](int64_t first, int64_t last, bool* bad) {
            Buffer<A> buffer(coarse.buffer());
            for (int64_t i = first; i < last; ++i)
                IAL_DISPATCH(pixel_nll_cells, problem, coarse.coarse, chunks.image(i), chunks.begin(i),
                             chunks.end(i), buffer.aligned(), bad);
        });
    }
    const Chunks chunks = Chunks::of_one_pass(problem.layout);
    run_chunks(inputs, chunks, [&](int64_t first, int64_t last, bool* bad) {
        Buffer<A> buffer(2 * problem.layout.classes * kWide);
        for (int64_t i = first; i < last; ++i)
            IAL_DISPATCH(pixel_nll, problem, chunks.image(i), chunks.begin(i), chunks.end(i),
                         buffer.aligned(), bad);
    });
}

// The file of a type has the definitions: IAL_KERNELS(, T). Other files refer to them:
// IAL_KERNELS(extern, T).
#define IAL_KERNELS(storage, T)                                                                         \
    storage template Tensor launch_reduce<T>(const Inputs&);                                            \
    storage template void launch_reduce_backward<T>(const Inputs&, const Tensor&, const Tensor&, bool); \
    storage template struct OnePass<T>;                                                                 \
    storage template void launch_pixel_nll<T>(const Inputs&, const Tensor&);

}  // namespace ial
