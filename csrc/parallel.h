// Loops on torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <set>
#include <vector>

namespace ial {

// Calls f(first, last) for parts of [0, count), in parallel. Not at::parallel_for: that is a header. Compiled
// without OpenMP it runs on one thread. Compiled with another OpenMP runtime than torch's (clang) it runs on
// threads that torch does not know. The loop of a TensorIterator is compiled into torch. Here it counts the
// bytes of a tensor, which are never read or written.
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

// The number of threads of such a loop.
inline size_t loop_threads() {
    std::vector<int> ran(at::get_num_threads());
    parallel_for(ran.size(), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) ran[i] = at::get_thread_num();
    });
    return std::set<int>(ran.begin(), ran.end()).size();
}

}  // namespace ial
