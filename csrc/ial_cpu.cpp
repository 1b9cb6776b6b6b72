// The operators on CPU tensors: the work is cut into chunks that depend on the shapes alone, each chunk's
// sums go into its own row, and the rows are added in order. So the result is bitwise the same for any number
// of threads.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <sstream>

#include "ial_ops.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define IAL_X86 1
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ial {

// The pixels of a block, and of the blocks that take a short rest; how many rows of a block are fetched ahead
// of the one being read; the lanes in which sums are kept; what a streaming store writes.
constexpr int kWide = 64, kNarrow = 16, kRowsAhead = 14, kLanes = 16, kStreamBytes = 32;

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

// Labels that are neither a class nor ignore_index: how many, and the first.
struct BadLabels {
    int64_t count = 0, label = 0, image = 0, pixel = 0;

    void add(int64_t y, int64_t n, int64_t p) {
        if (count++ == 0) {
            label = y;
            image = n;
            pixel = p;
        }
    }
};

}  // namespace ial

#define IAL_ISA baseline
#define IAL_TARGET
#define IAL_X86_VECTORS 0
#include "ial_cpu_kernels.h"
#undef IAL_ISA
#undef IAL_TARGET
#undef IAL_X86_VECTORS

#ifdef IAL_X86
#define IAL_X86_VECTORS 1
#define IAL_ISA avx2
#define IAL_TARGET __attribute__((target("avx2,fma,f16c")))
#include "ial_cpu_kernels.h"
#undef IAL_ISA
#undef IAL_TARGET

#define IAL_ISA avx512
#ifdef __clang__
#define IAL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#else
#define IAL_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#endif
#include "ial_cpu_kernels.h"
#undef IAL_ISA
#undef IAL_TARGET
#undef IAL_X86_VECTORS
#endif  // IAL_X86

namespace ial {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// Equal chunks of the pixels of each image: large enough to pay for their start, and few enough that their
// sums take little memory beside the logits.
struct Chunks {
    int64_t pixels, per_image, count;

    Chunks(const Layout& layout, int levels) {
        constexpr int64_t kElements = 1 << 15, kSumBytes = 1 << 18;
        const int64_t most = std::max<int64_t>(1, kSumBytes / (levels * kStats * int64_t(sizeof(double))));
        const int64_t least = (layout.batch * layout.pixels + most - 1) / most;
        pixels = std::max(kElements / layout.classes, least);
        pixels = (pixels / kWide + 1) * kWide;
        per_image = (layout.pixels + pixels - 1) / pixels;
        count = layout.batch * per_image;
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

    Call(const Inputs& inputs, const Tensor& grad)
        : weight(inputs.class_levels.size(), A(1)),
          class_levels(inputs.class_levels.begin(), inputs.class_levels.end()) {
        constexpr at::ScalarType arithmetic = c10::CppTypeToScalarType<A>::value;
        if (inputs.weight) {
            const Tensor given = inputs.weight->to(arithmetic).contiguous();
            std::copy_n(given.const_data_ptr<A>(), weight.size(), weight.begin());
        }
        if (inputs.pixel_weight) pixel_weight = inputs.pixel_weight->to(arithmetic);

        const Inputs converted{inputs.logits, inputs.target,       inputs.weight,
                               pixel_weight,  inputs.class_levels, inputs.ignore_index};
        problem.layout = converted.layout(grad);
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
    TORCH_CHECK_VALUE(false, "target has label ", bad.label, " at (", bad.image, position, "), the first of ",
                      bad.count, " bad pixels, expected labels 0 to ", inputs.logits.size(1) - 1,
                      " or ignore_index=", inputs.ignore_index);
}

template <typename T>
Tensor reduce_typed(const Inputs& inputs) {
    Call<T> call(inputs, inputs.logits);
    const Problem<T>& problem = call.problem;
    const Layout& layout = problem.layout;
    const Chunks chunks(layout, problem.levels);
    const int64_t row = problem.levels * kStats;
    std::vector<double> sums(chunks.count * row);
    std::vector<BadLabels> bad(chunks.count);
    at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
        Buffer<typename Call<T>::A> buffer(2 * layout.classes * kWide);
        Buffer<double> lanes(row * kLanes);
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = i % chunks.per_image * chunks.pixels;
            const int64_t end = std::min(begin + chunks.pixels, layout.pixels);
            IAL_DISPATCH(reduce, problem, i / chunks.per_image, begin, end, buffer.aligned(), lanes.aligned(),
                         &sums[i * row], &bad[i]);
        }
    });

    BadLabels all;
    for (const BadLabels& some : bad) {
        if (some.count && !all.count) all = BadLabels{0, some.label, some.image, some.pixel};
        all.count += some.count;
    }
    if (all.count) throw_bad_labels(all, inputs);

    Tensor stats =
        at::empty({layout.batch, problem.levels, kStats}, inputs.logits.options().dtype(at::kDouble));
    double* to = stats.mutable_data_ptr<double>();
    for (int64_t n = 0; n < layout.batch; ++n)
        for (int64_t s = 0; s < problem.levels * kStats; ++s, ++to) {
            *to = 0;
            for (int64_t i = 0; i < chunks.per_image; ++i) *to += sums[(n * chunks.per_image + i) * row + s];
        }
    return stats;
}

// Half of a usual last-level cache: a gradient of this size leaves little of itself there.
constexpr size_t kStreamFrom = 16 << 20;

template <typename T>
void gradient_typed(const Inputs& inputs, const Tensor& table, bool exact, const Tensor& grad, bool fresh) {
    using A = typename Call<T>::A;
    Call<T> call(inputs, grad);
    Problem<T>& problem = call.problem;
    problem.grad = grad.mutable_data_ptr<T>();
    problem.cross = exact ? 1 : 0;
    problem.stream = fresh && grad.nbytes() >= kStreamFrom;
    const Layout& layout = problem.layout;
    const Chunks chunks(layout, problem.levels);
    const double* by_level = table.const_data_ptr<double>();
    // Backwards, since the caches hold the end of what reduce has read.
    at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
        Buffer<A> buffer(2 * layout.classes * kWide), rows(3 * problem.levels);
        int64_t image = -1;
        for (int64_t i = last - 1; i >= first; --i) {
            const int64_t n = i / chunks.per_image;
            const int64_t begin = i % chunks.per_image * chunks.pixels;
            const int64_t end = std::min(begin + chunks.pixels, layout.pixels);
            if (n != image) {
                image = n;
                for (int64_t k = 0; k < problem.levels; ++k)
                    for (const Stat s : {kS, kP2, kQ2})
                        rows.aligned()[k * 3 + s] =
                            static_cast<A>(by_level[(n * problem.levels + k) * kStats + s]);
            }
            IAL_DISPATCH(gradient, problem, n, begin, end, buffer.aligned(), rows.aligned());
        }
    });
}

// A large gradient is a fresh mapping each time. In pages of 4 KiB its page faults cost several times the
// kernel that writes it, and since that writes all classes at once, its threads would meet in every page: so
// huge pages are asked for, and touched first by one thread each. It is only advice: where the system refuses
// it, nothing is lost.
void prefault(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = 2 << 20;
    const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
    const int64_t pages = (int64_t(address + tensor.nbytes()) - int64_t(begin)) / int64_t(kHuge);
    if (pages < 1 || madvise(reinterpret_cast<void*>(begin), pages * kHuge, MADV_HUGEPAGE) != 0) return;
    at::parallel_for(0, pages, 1, [begin](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) *reinterpret_cast<volatile char*>(begin + i * kHuge) = 0;
    });
#endif
}

Tensor reduce_cpu(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                  const OptionalTensor& pixel_weight, at::IntArrayRef class_levels, int64_t ignore_index,
                  std::string_view gradient, bool, std::optional<bool> align_corners) {
    const Inputs inputs{logits, target, weight, pixel_weight, class_levels, ignore_index, align_corners};
    inputs.check();
    is_exact(gradient);  // meant for the backward pass, which is late for a complaint
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "ial_cuda::reduce",
                                           [&] { return reduce_typed<scalar_t>(inputs); });
}

void gradient_into(const Inputs& inputs, const Tensor& table, std::string_view gradient, const Tensor& grad,
                   bool fresh) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "ial_cuda::gradient", [&] {
        gradient_typed<scalar_t>(inputs, table, is_exact(gradient), grad, fresh);
    });
}

Tensor gradient_cpu(const Tensor& logits, const Tensor& table, const Tensor& target,
                    const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                    at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient,
                    std::optional<bool> align_corners) {
    const Inputs inputs{logits, target, weight, pixel_weight, class_levels, ignore_index, align_corners};
    inputs.check();
    inputs.check_table(table);
    Tensor grad = at::empty_like(logits);
    prefault(grad);
    gradient_into(inputs, table, gradient, grad, /*fresh=*/true);
    return grad;
}

void gradient_inplace_cpu(const Tensor& logits, const Tensor& table, const Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& pixel_weight,
                          at::IntArrayRef class_levels, int64_t ignore_index, std::string_view gradient) {
    const Inputs inputs{logits, target, weight, pixel_weight, class_levels, ignore_index};
    inputs.check();
    inputs.check_table(table);
    at::assert_no_internal_overlap(logits);
    gradient_into(inputs, table, gradient, logits, /*fresh=*/false);
}

std::tuple<Tensor, Tensor> combine_cpu(const Tensor& stats, at::ArrayRef<double> lambdas, double alpha,
                                       std::string_view reduction, std::string_view factor_normalization,
                                       std::string_view factor_scope, at::ScalarType dtype) {
    const Combine c = make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope);
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

Tensor table_cpu(const Tensor& stats, const Tensor& grad_loss, at::ArrayRef<double> lambdas, double alpha,
                 std::string_view reduction, std::string_view factor_normalization,
                 std::string_view factor_scope) {
    const Combine c = make_combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope);
    check_grad_loss(grad_loss, stats, c.reduction == Reduction::kNone ? c.batch : 1);
    const Tensor grad = grad_loss.to(at::kDouble).contiguous();
    Tensor result = at::empty_like(stats);
    const double* g = grad.const_data_ptr<double>();
    double* to = result.mutable_data_ptr<double>();
    const double weight = c.weight();
    if (c.pool_batch)
        table(c, 0, c.batch, g, weight, to);
    else
        for (int64_t n = 0; n < c.batch; ++n) table(c, n, n + 1, g, weight, to);
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
    m.impl("gradient", gradient_cpu);
    m.impl("gradient_", gradient_inplace_cpu);
    m.impl("combine", combine_cpu);
    m.impl("table", table_cpu);
}

}  // namespace ial
