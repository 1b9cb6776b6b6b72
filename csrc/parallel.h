// Loops on torch's threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <set>
#include <vector>

namespace ial {

// Calls f(first, last) for parts of [0, count) side by side. at::parallel_for would do, but it is a header:
// compiled without OpenMP it runs on one thread, and compiled with another OpenMP runtime than torch's
// (clang) on threads that torch does not know. A TensorIterator's loop is compiled into torch. It counts the
// bytes of a tensor whose contents are never touched.
template <typename F>
void parallel_for(int64_t count, const F& f) {
    const at::Tensor bytes = at::empty({count}, at::kByte);
    const char* const begin = static_cast<const char*>(bytes.const_data_ptr());
    at::TensorIterator::borrowing_nullary_op(bytes).for_each(
        [&](char** data, const int64_t*, int64_t size, int64_t) {
            const int64_t first = data[0] - begin;
            f(first, first + size);
        },
        /*grain_size=*/1);
}

// On how many threads such a loop runs.
inline size_t loop_threads() {
    std::vector<int> ran(at::get_num_threads());
    parallel_for(ran.size(), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) ran[i] = at::get_thread_num();
    });
    return std::set<int>(ran.begin(), ran.end()).size();
}

}  // namespace ial
