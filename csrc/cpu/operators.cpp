// The operators on CPU tensors: the work is cut into chunks that depend on the shapes alone, each chunk's
// sums go into its own row, and the rows are added in order. So the result is bitwise the same for any number
// of threads.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <type_traits>

#include "../inputs.h"
#include "../parallel.h"
#include "gradient_memory.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define IAL_X86 1
#endif

namespace ial {

// The pixels of a block, and of the blocks that take a short rest; how many rows of a block are fetched ahead
// of the one being read; the lanes in which sums are kept; what a streaming store writes; how many classes of
// a block are few; the pixels and classes that are transposed at once.
constexpr int kWide = 64, kNarrow = 16, kRowsAhead = 14, kLanes = 16, kStreamBytes = 32, kFew = 4, kTile = 8;

// The cells of a block of coarse logits, and what its rows have besides, to hold the logit at the last one's
// right.
constexpr int kCells = 32, kCellPad = 16;

// The pixels of a cell on a line whose places are kept for all rows: more than usual, so that these tables
// take little memory however wide the image is.
constexpr int kSweeps = 64;

// Half precision is computed in float. Labels are held in integers of the same width, to be compared lane by
// lane.
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
    const void* target;
    Label label;
    const A* weight;              // [C]
    const A* pixel_weight;        // or null for ones
    const int32_t* class_levels;  // [C]
    int levels;
    int64_t ignore_index;
    bool stream;  // store past the caches
    A cross;      // 1 for the exact gradient, 0 for the paper's
};

// Coarse logits: which pixels the cells of a row have, each row the same ones. Cells are counted up to
// `lanes`, a whole number of blocks; those beyond the last have none.
template <typename T>
struct Coarse {
    using A = typename Problem<T>::A;

    Upsampling up;
    int64_t lanes, width;   // width: of a row of gradients, those at the right of the last lane included
    const int32_t* sweeps;  // [lanes / kCells]: the most pixels that a cell of the block has on a line
    const int32_t* pixel;  // [kSweeps or fewer, lanes]: a cell's pixel of each sweep, -1 where it has no more
    const A* fraction;     // [same, lanes]: how far that is beyond the logit at the left
};

// pixel and fraction [sweeps, stride] for the cells [cell, cell + cells) from sweep `first` on.
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

// Labels of an image that are neither a class nor ignore_index: how many, and the first.
struct BadLabels {
    int64_t count = 0, label = 0, image = 0, pixel = 0;

    void add(int64_t y, int64_t n, int64_t p) {
        if (count++ > 0 && pixel < p) return;
        label = y;
        image = n;
        pixel = p;
    }
};

}  // namespace ial

#define IAL_INLINE IAL_TARGET inline __attribute__((always_inline))
#define IAL_SIMD _Pragma("omp simd")
#define IAL_UNROLL _Pragma("GCC unroll 8")

#define IAL_ISA baseline
#define IAL_TARGET
#define IAL_X86_VECTORS 0
#include "pixels.h"
#include "upsample.h"
#undef IAL_ISA
#undef IAL_TARGET
#undef IAL_X86_VECTORS

#ifdef IAL_X86
#define IAL_X86_VECTORS 1
#define IAL_ISA avx2
#define IAL_TARGET __attribute__((target("avx2,fma,f16c")))
#include "pixels.h"
#include "upsample.h"
#undef IAL_ISA
#undef IAL_TARGET

#define IAL_ISA avx512
#ifdef __clang__
#define IAL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#else
#define IAL_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#endif
#include "pixels.h"
#include "upsample.h"
#undef IAL_ISA
#undef IAL_TARGET
#undef IAL_X86_VECTORS
#endif  // IAL_X86

namespace ial {

const char* cpu_instruction_set();

namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest instruction set that this machine has and ATEN_CPU_CAPABILITY allows.
Isa isa() {
#ifdef IAL_X86
    static const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Isa::kAvx512;
    if (capability == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kBaseline;
}

#ifdef IAL_X86
#define IAL_DISPATCH(function, ...)                        \
    (isa() == Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
     : isa() == Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                           : baseline::function(__VA_ARGS__))
#else
#define IAL_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif

// Equal chunks of each image: of its pixels, or of its rows of cells. Large enough to pay for their start,
// and few enough that their sums take little memory beside the logits.
struct Chunks {
    static constexpr int64_t kElements = 1 << 15, kSumBytes = 1 << 18;
    int64_t length, size, per_image, count;  // length: of an image

    Chunks(int64_t images, int64_t length, int64_t size)
        : length(length), size(size), per_image((length + size - 1) / size), count(images * per_image) {}

    int64_t image(int64_t i) const { return i / per_image; }
    int64_t begin(int64_t i) const { return i % per_image * size; }
    int64_t end(int64_t i) const { return std::min(begin(i) + size, length); }

    static Chunks of_pixels(const Layout& layout, int levels) {
        const int64_t most = std::max<int64_t>(1, kSumBytes / (levels * kStats * int64_t(sizeof(double))));
        const int64_t least = (layout.batch * layout.pixels + most - 1) / most;
        const int64_t pixels = std::max(kElements / layout.classes, least);
        return {layout.batch, layout.pixels, (pixels / kWide + 1) * kWide};
    }

    // Two rows of each chunk are kept apart until their neighbours are there.
    static Chunks of_rows(const Upsampling& up) {
        constexpr int64_t kLeast = 8;
        const int64_t pixels = std::max<int64_t>(1, up.y.fine * up.x.fine / up.y.coarse);
        return {up.batch, up.y.coarse, std::max(kLeast, kElements / (up.classes * pixels))};
    }
};

template <typename A>
struct Buffer {
    explicit Buffer(int64_t size) : storage(size + 64 / sizeof(A)) {}
    A* aligned() {  // to a vector of 64 bytes
        const auto address = reinterpret_cast<uintptr_t>(storage.data());
        return reinterpret_cast<A*>((address + 63) / 64 * 64);
    }
    std::vector<A> storage;
};

// The tensors of a call behind plain pointers, for logits of type T; copies of the class weights and levels.
template <typename T>
struct Call {
    using A = typename Problem<T>::A;

    std::vector<A> weight;
    OptionalTensor pixel_weight;
    std::vector<int32_t> class_levels;
    Problem<T> problem{};
    Upsampling upsampling{};  // of coarse logits, in place of problem.layout

    Call(const Inputs& inputs, const Tensor& grad)
        : weight(inputs.class_levels.size(), A(1)),
          class_levels(inputs.class_levels.begin(), inputs.class_levels.end()) {
        constexpr at::ScalarType arithmetic = c10::CppTypeToScalarType<A>::value;
        if (inputs.weight) {
            const Tensor given = inputs.weight->to(arithmetic).contiguous();
            std::copy_n(given.const_data_ptr<A>(), weight.size(), weight.begin());
        }
        if (inputs.pixel_weight) pixel_weight = inputs.pixel_weight->to(arithmetic);

        const Inputs converted{inputs.logits,   inputs.target,       inputs.weight,
                               pixel_weight,    inputs.class_levels, inputs.ignore_index,
                               inputs.gradient, inputs.align_corners};
        if (inputs.align_corners) {
            upsampling = converted.upsampling(grad);
            problem.layout.batch = upsampling.batch;
            problem.layout.classes = upsampling.classes;
        } else {
            problem.layout = converted.layout(grad);
        }
        problem.logits = inputs.logits.const_data_ptr<T>();
        problem.target = inputs.target.const_data_ptr();
        problem.label = inputs.label();
        problem.weight = weight.data();
        problem.pixel_weight = pixel_weight ? pixel_weight->const_data_ptr<A>() : nullptr;
        problem.class_levels = class_levels.data();
        problem.levels = inputs.levels();
        problem.ignore_index = inputs.ignore_index;
    }
};

// The message of ial_cuda.validate_target.
[[noreturn]] void throw_bad_labels(const BadLabels& bad, const Inputs& inputs) {
    std::string position;
    int64_t pixel = bad.pixel;
    for (int64_t d = inputs.target.dim() - 1; d > 0; --d) {
        position = ", " + std::to_string(pixel % inputs.target.size(d)) + position;
        pixel /= inputs.target.size(d);
    }
    if (position.empty()) position = ",";
    const int64_t classes = inputs.logits.size(1);
    std::string hint;
    if (bad.label == -100 || bad.label == -1 || bad.label == 255)
        hint = ": pass ignore_index=" + std::to_string(bad.label) + " where that is the label of void";
    else if (classes == 1)
        hint = ": binary logits x need two channels, torch.cat([torch.zeros_like(x), x], 1)";
    TORCH_CHECK_VALUE(false, "target has label ", bad.label, " at (", bad.image, position, "), the first of ",
                      bad.count, " bad pixels, expected labels 0 to ", classes - 1,
                      " or ignore_index=", inputs.ignore_index, hint);
}

// Coarse<T>, with the places that it points to.
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

    // What a thread needs; CellBuffer has the parts.
    int64_t buffer() const { return coarse.up.classes * (4 * kCells + 3 * (kCells + kCellPad)); }
};

// stats (N, g, kStats) of images that go in chunks: `reduce(i, buffer, lanes, sums, bad)` leaves the
// sums[g, kStats] of chunk i.
template <typename A, typename Reduce>
Tensor reduce_chunks(const Inputs& inputs, const Chunks& chunks, int64_t size, const Reduce& reduce) {
    const int64_t row = inputs.levels() * kStats;
    std::vector<double> sums(chunks.count * row);
    std::vector<BadLabels> bad(chunks.count);
    parallel_for(chunks.count, [&](int64_t first, int64_t last) {
        Buffer<A> buffer(size);
        Buffer<double> lanes(row * kLanes);
        for (int64_t i = first; i < last; ++i) {
            std::fill_n(lanes.aligned(), row * kLanes, 0.0);
            reduce(i, buffer.aligned(), lanes.aligned(), &sums[i * row], &bad[i]);
        }
    });

    BadLabels all;
    for (const BadLabels& some : bad) {
        if (some.count && !all.count) all = BadLabels{0, some.label, some.image, some.pixel};
        all.count += some.count;
    }
    if (all.count) throw_bad_labels(all, inputs);

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
Tensor reduce_typed(const Inputs& inputs) {
    using A = typename Call<T>::A;
    Call<T> call(inputs, inputs.logits);
    const Problem<T>& problem = call.problem;
    if (inputs.align_corners) {
        const CoarseCall<T> coarse(call.upsampling);
        const Chunks chunks = Chunks::of_rows(call.upsampling);
        return reduce_chunks<A>(inputs, chunks, coarse.buffer(),
                                [&](int64_t i, A* buffer, double* lanes, double* sums, BadLabels* bad) {
                                    IAL_DISPATCH(reduce_cells, problem, coarse.coarse, chunks.image(i),
                                                 chunks.begin(i), chunks.end(i), buffer, lanes, sums, bad);
                                });
    }
    const Chunks chunks = Chunks::of_pixels(problem.layout, problem.levels);
    return reduce_chunks<A>(inputs, chunks, 2 * problem.layout.classes * kWide,
                            [&](int64_t i, A* buffer, double* lanes, double* sums, BadLabels* bad) {
                                IAL_DISPATCH(reduce, problem, chunks.image(i), chunks.begin(i), chunks.end(i),
                                             buffer, lanes, sums, bad);
                            });
}

// From here on a gradient is written past the caches: through them each line is first read, and by the time
// that a network's next step writes there again it is in none.
constexpr size_t kStreamFrom = 2 << 20;

// rows[3, C]: of each class in image n, its weight times dL/dS, dL/dP2 and dL/dQ2.
template <typename T, typename A>
void load_rows(const Problem<T>& problem, const Tensor& table, int64_t n, A* rows) {
    const int64_t classes = problem.layout.classes;
    const double* const of_image = table.const_data_ptr<double>() + n * problem.levels * kStats;
    for (int64_t c = 0; c < classes; ++c) {
        const double* from = of_image + problem.class_levels[c] * kStats;
        for (const Stat s : {kS, kP2, kQ2})
            rows[s * classes + c] = static_cast<A>(s == kS ? problem.weight[c] * from[s] : from[s]);
    }
}

template <typename T>
void gradient_of_pixels(const Problem<T>& problem, const Tensor& table) {
    using A = typename Problem<T>::A;
    const Chunks chunks = Chunks::of_pixels(problem.layout, problem.levels);
    // Backwards, since the caches hold the end of what reduce has read.
    parallel_for(chunks.count, [&](int64_t first, int64_t last) {
        Buffer<A> buffer(2 * problem.layout.classes * kWide), rows(3 * problem.layout.classes);
        int64_t image = -1;
        for (int64_t i = last - 1; i >= first; --i) {
            if (chunks.image(i) != image) load_rows(problem, table, image = chunks.image(i), rows.aligned());
            IAL_DISPATCH(gradient, problem, image, chunks.begin(i), chunks.end(i), buffer.aligned(),
                         rows.aligned());
        }
    });
}

// A chunk's first row of logits gets a share from the cells above it, which another thread may be at.
template <typename T>
void gradient_of_cells(const Problem<T>& problem, const Upsampling& up, const Tensor& table) {
    using A = typename Problem<T>::A;
    const CoarseCall<T> call(up);
    const Coarse<T>& coarse = call.coarse;
    const Chunks chunks = Chunks::of_rows(up);
    const int64_t row = up.classes * coarse.width;
    const Tensor kept = at::empty({2 * chunks.count, row}, c10::CppTypeToScalarType<A>::value);
    A* const heads = kept.mutable_data_ptr<A>();
    A* const tails = heads + chunks.count * row;
    parallel_for(chunks.count, [&](int64_t first, int64_t last) {
        Buffer<A> buffer(call.buffer()), rows(3 * up.classes), work(row);
        for (int64_t i = first; i < last; ++i) {
            load_rows(problem, table, chunks.image(i), rows.aligned());
            IAL_DISPATCH(gradient_cells, problem, coarse, chunks.image(i), chunks.begin(i), chunks.end(i),
                         buffer.aligned(), rows.aligned(), heads + i * row, tails + i * row, work.aligned());
        }
    });
    for (int64_t i = 0; i < chunks.count; ++i) {
        const int64_t y = chunks.begin(i);
        for (int64_t c = 0; c < up.classes; ++c) {
            T* const to = problem.grad + up.grad.offset(chunks.image(i), y, 0) + c * up.grad.channel;
            const A* const head = heads + i * row + c * coarse.width;
            const A* const above = y > 0 ? tails + (i - 1) * row + c * coarse.width : nullptr;
            for (int64_t x = 0; x < up.x.coarse; ++x)
                to[x * up.grad.pixel] = static_cast<T>(above ? head[x] + above[x] : head[x]);
        }
    }
}

template <typename T>
void gradient_typed(const Inputs& inputs, const Tensor& table, const Tensor& grad, bool fresh) {
    Call<T> call(inputs, grad);
    Problem<T>& problem = call.problem;
    problem.grad = grad.mutable_data_ptr<T>();
    problem.cross = inputs.exact() ? 1 : 0;
    problem.stream = fresh && grad.nbytes() >= kStreamFrom;
    if (inputs.align_corners)
        gradient_of_cells(problem, call.upsampling, table);
    else
        gradient_of_pixels(problem, table);
}

Tensor reduce_cpu(const Tensor& logits, IAL_PIXEL_PARAMETERS, bool, std::optional<bool> align_corners) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
    inputs.check();
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::reduce",
                                           [&] { return reduce_typed<scalar_t>(inputs); });
}

void reduce_backward_into(const Inputs& inputs, const Tensor& grad_stats, const Tensor& grad, bool fresh) {
    inputs.check_grad_stats(grad_stats);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::reduce_backward",
                                    [&] { gradient_typed<scalar_t>(inputs, grad_stats, grad, fresh); });
}

Tensor reduce_backward_cpu(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS,
                           std::optional<bool> align_corners) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS, align_corners};
    inputs.check();
    const Tensor grad = empty_gradient(logits);
    reduce_backward_into(inputs, grad_stats, grad, /*fresh=*/true);
    return grad;
}

void reduce_backward_inplace_cpu(const Tensor& logits, const Tensor& grad_stats, IAL_PIXEL_PARAMETERS) {
    const Inputs inputs{logits, IAL_PIXEL_ARGUMENTS};
    inputs.check();
    inputs.check_grad(logits);
    reduce_backward_into(inputs, grad_stats, logits, /*fresh=*/false);
}

std::tuple<Tensor, Tensor> combine_cpu(const Tensor& stats, IAL_COMBINE_PARAMETERS, at::ScalarType dtype) {
    const Combine c = make_combine(stats, IAL_COMBINE_ARGUMENTS);
    const bool none = c.reduction == Reduction::kNone;
    Tensor shared = at::empty({c.pool_batch ? 1 : c.batch, c.levels - 1}, stats.options());
    Tensor losses = at::empty({none ? c.batch : 1}, stats.options());
    double* f = shared.mutable_data_ptr<double>();
    double* loss = losses.mutable_data_ptr<double>();
    if (c.pool_batch) factors(c, 0, c.batch, f);
    if (!none) *loss = 0;
    for (int64_t n = 0; n < c.batch; ++n) {
        if (!c.pool_batch) factors(c, n, n + 1, f + n * (c.levels - 1));
        const double image = image_loss(c, n, f + (c.pool_batch ? 0 : n * (c.levels - 1)));
        if (none)
            loss[n] = image;
        else
            *loss += image;
    }
    if (c.reduction == Reduction::kMean) {
        const double weight = c.weight();
        *loss = weight != 0 ? *loss / weight : 0;
    }
    losses = losses.to(dtype);
    return {none ? losses : losses.squeeze(0), shared};
}

Tensor combine_backward_cpu(const Tensor& stats, const Tensor& grad_loss, IAL_COMBINE_PARAMETERS) {
    const Combine c = make_combine(stats, IAL_COMBINE_ARGUMENTS);
    check_grad_loss(grad_loss, stats, c.reduction == Reduction::kNone ? c.batch : 1);
    const Tensor grad = grad_loss.to(at::kDouble).contiguous();
    Tensor result = at::empty_like(stats);
    const double* g = grad.const_data_ptr<double>();
    double* to = result.mutable_data_ptr<double>();
    const double weight = c.weight();
    if (c.pool_batch)
        combine_backward(c, 0, c.batch, g, weight, to);
    else
        for (int64_t n = 0; n < c.batch; ++n) combine_backward(c, n, n + 1, g, weight, to);
    return result;
}

}  // namespace

const char* cpu_instruction_set() {
    switch (isa()) {
        case Isa::kAvx512:
            return "AVX-512";
        case Isa::kAvx2:
            return "AVX2";
        default:
            return "baseline";
    }
}

TORCH_LIBRARY_IMPL(ial_cuda, CPU, m) {
    m.impl("reduce", reduce_cpu);
    m.impl("reduce_backward", reduce_backward_cpu);
    m.impl("reduce_backward_", reduce_backward_inplace_cpu);
    m.impl("combine", combine_cpu);
    m.impl("combine_backward", combine_backward_cpu);
}

}  // namespace ial
