// Loops on torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <set>
#include <vector>

namespace ial {

// Calls f(first, last) for parts of [0, count), in parallel.
//
// at::parallel_for is compiled into this extension, from a header. Without OpenMP it would run on one thread.
// With another OpenMP runtime than torch's (clang) it would use threads that torch does not know. The loop of
// a TensorIterator is compiled into torch. Here it iterates over the bytes of a tensor to count; the bytes
// are never read or written.
template <typename F>
void parallel_for(int64_t count, const F& f) {
    if (count <= 1 || at::get_num_threads() == 1) return f(0, count);
    const at::Tensor bytes = at::empty({count}, at::kByte);
    const char* const begin = static_cast<const char*>(bytes.const_data_ptr());
    at::TensorIterator::borrowing_nullary_op(bytes).for_each(
        [&](char** data, const int64_t*, int64_t size, int64_t) {
            const int64_t first = data[0] - begin;
            f(first, first + size);
        },
        /*grain_size=*/1);
}

// The number of threads that parallel_for uses.
inline size_t loop_threads() {
    std::vector<int> ran(at::get_num_threads());
    parallel_for(ran.size(), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) ran[i] = at::get_thread_num();
    });
    return std::set<int>(ran.begin(), ran.end()).size();
}

}  // namespace ial
