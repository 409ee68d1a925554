// SPDX-License-Identifier: Apache-2.0
// The second stage of the passes that sum up over the volume: their blocks each leave a partial sum
// of every result, and these are added in an order that depends on the shape alone.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

// A block owns 32 neighbours of the results; 8 threads share out the partial sums of each.
constexpr int kPartialResults = 32, kPartialThreads = 8;

// results[i] = the sum of partials[p * count + i] over p < parts.
template <class T>
__global__ void __launch_bounds__(kPartialResults* kPartialThreads)
    sum_partials(const Sum<T>* partials, int64_t parts, int64_t count, T* results) {
  using S = Sum<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPartialResults + threadIdx.x;
  const int thread = static_cast<int>(threadIdx.y);
  S sum = 0;
  if (i < count)
    for (int64_t p = thread; p < parts; p += kPartialThreads) sum += partials[p * count + i];
  S* place = shared_memory<S>();
  place[thread * kPartialResults + threadIdx.x] = sum;
  __syncthreads();
  if (thread > 0 || i >= count) return;
  for (int t = 1; t < kPartialThreads; ++t) sum += place[t * kPartialResults + threadIdx.x];
  narrow(results[i], sum);
}

// The sums of Count numbers of the threads of each group of a block, groups along z, Round of them
// at a time: of(group, number, sum) is called once for each, by any thread. `place` has
// fold_size<Round>(groups, threads of a group) sums.
VOXCONV_HD constexpr int fold_pitch(int threads) { return threads | 1; }
template <int Round>
VOXCONV_HD constexpr int fold_size(int groups, int threads) {
  return groups * Round * fold_pitch(threads);
}
template <int Count, int Round, class S, class F>
__device__ __forceinline__ void fold_sums(S* place, const S* sums, int group, int groups,
                                          const F& of) {
  const int group_threads = static_cast<int>(blockDim.x * blockDim.y);
  const int in_group = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int pitch = fold_pitch(group_threads), threads = groups * group_threads;
  VOXCONV_UNROLL
  for (int first = 0; first < Count; first += Round) {
    __syncthreads();  // nobody reads what was there
    VOXCONV_UNROLL
    for (int i = 0; i < Round; ++i) place[(group * Round + i) * pitch + in_group] = sums[first + i];
    __syncthreads();
    for (int i = group * group_threads + in_group; i < groups * Round; i += threads) {
      S total[4] = {};
      for (int t = 0; t < group_threads; t += 4) {
        VOXCONV_UNROLL
        for (int j = 0; j < 4; ++j)
          if (t + j < group_threads) total[j] += place[i * pitch + t + j];
      }
      of(i / Round, first + i % Round, total[0] + total[1] + (total[2] + total[3]));
    }
  }
}

// Memory for the partial sums: that of the results, if they need not be added nor rounded.
template <class T, class Launch>
Sum<T>* take_partials(const Launch& launch, int64_t parts, int64_t count, T* results) {
  if constexpr (std::is_same_v<T, Sum<T>>)
    if (parts == 1) return results;
  return static_cast<Sum<T>*>(launch.scratch(parts * count * sizeof(Sum<T>)));
}

template <class T, class Launch>
void launch_sum_partials(const Launch& launch, const Sum<T>* partials, int64_t parts, int64_t count,
                         T* results) {
  if (static_cast<const void*>(partials) == results) return;
  launch(sum_partials<T>, grid_of(ceil_div(count, kPartialResults)),
         dim3(kPartialResults, kPartialThreads), kPartialResults * kPartialThreads * sizeof(Sum<T>),
         partials, parts, count, results);
}

}  // namespace device
}  // namespace voxconv
