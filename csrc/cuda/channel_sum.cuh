// SPDX-License-Identifier: Apache-2.0
// The gradient of the bias: the sums of the channels of a tensor [n, c, d, h, w]. Every element is
// read once, by 16 bytes where that is possible, a block some 64 KB; the sums of the blocks go to
// sum_partials. A chain of additions has at most 64 elements, before these.
#pragma once
#include "launch.cuh"
#include "sum_partials.cuh"

namespace voxconv {
namespace device {

constexpr int kSumThreads = 256;  // of a block
constexpr int kSumUnits = 16;     // units of a thread, loaded by fours
constexpr int kSumFlight = 4;

// What is loaded at a time.
template <class T, int Elements>
struct alignas(sizeof(T) * Elements) SumUnit {
  T of[Elements];

  __device__ void add_to(Sum<T> (&sums)[Elements]) const {
    VOXCONV_UNROLL
    for (int i = 0; i < Elements; ++i) sums[i] += widen(of[i]);
  }
};
template <class T>
constexpr int kSumVector = 16 / static_cast<int>(sizeof(T));

// Adds units first, first + step, ... before `end`.
template <class T, int Elements>
__device__ void add_units(const SumUnit<T, Elements>* from, int64_t first, int64_t end,
                          int64_t step, Sum<T> (&sums)[Elements]) {
  for (int64_t i = first; i < end; i += kSumFlight * step) {
    SumUnit<T, Elements> units[kSumFlight];
    VOXCONV_UNROLL
    for (int u = 0; u < kSumFlight; ++u)
      if (i + u * step < end) units[u] = from[i + u * step];
    VOXCONV_UNROLL
    for (int u = 0; u < kSumFlight; ++u)
      if (i + u * step < end) units[u].add_to(sums);
  }
}

// NCDHW. A block owns a piece of a channel of a sample; blocks are counted by channels, then by
// pieces.
template <class T, int Elements>
__global__ void __launch_bounds__(kSumThreads)
    channel_sum_ncdhw(const T* grad, int64_t channels, int64_t units, int64_t pieces,
                      Sum<T>* partials) {
  const int64_t piece = blockIdx.x / channels % pieces, c = blockIdx.x % channels;
  const int64_t n = blockIdx.x / channels / pieces, size = blockDim.x * kSumUnits;
  const int64_t end = (piece + 1) * size < units ? (piece + 1) * size : units;
  const auto* from =
      reinterpret_cast<const SumUnit<T, Elements>*>(grad) + (n * channels + c) * units;
  Sum<T> sums[Elements] = {};
  add_units(from, piece * size + threadIdx.x, end, blockDim.x, sums);
  VOXCONV_UNROLL
  for (int i = 1; i < Elements; ++i) sums[0] += sums[i];
  const Sum<T> sum = block_sum(sums[0], shared_memory<Sum<T>>());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// channels_last. A block owns blockDim.x units of channels of a piece of the cells, its rows of
// threads take cells in turn; blocks are counted by channels, then by pieces.
template <class T, int Elements>
__global__ void __launch_bounds__(kSumThreads)
    channel_sum_last(const T* grad, int64_t units, int64_t cells, Sum<T>* partials) {
  using S = Sum<T>;
  const int64_t tiles = (units + blockDim.x - 1) / blockDim.x, piece = blockIdx.x / tiles;
  const int64_t unit = blockIdx.x % tiles * blockDim.x + threadIdx.x;
  const int64_t size = kSumUnits * blockDim.y;
  const int64_t first = piece * size + threadIdx.y;
  const int64_t end = (piece + 1) * size < cells ? (piece + 1) * size : cells;
  S sums[Elements] = {};
  if (unit < units)
    add_units(reinterpret_cast<const SumUnit<T, Elements>*>(grad), first * units + unit,
              end * units, blockDim.y * units, sums);
  S* place = shared_memory<S>();
  const int wide = static_cast<int>(blockDim.x) * Elements, row = static_cast<int>(threadIdx.y);
  S* own = place + row * wide + threadIdx.x;
  VOXCONV_UNROLL
  for (int i = 0; i < Elements; ++i) own[i * blockDim.x] = sums[i];
  for (int rows = static_cast<int>(blockDim.y), half; rows > 1; rows = half) {
    half = (rows + 1) / 2;
    __syncthreads();
    VOXCONV_UNROLL
    for (int i = 0; i < Elements; ++i)
      if (row + half < rows) own[i * blockDim.x] += own[half * wide + i * blockDim.x];
  }
  if (row > 0 || unit >= units) return;
  VOXCONV_UNROLL
  for (int i = 0; i < Elements; ++i)
    partials[(piece * units + unit) * Elements + i] = own[i * blockDim.x];
}

template <int Elements, class T, class Launch>
void launch_channel_sum_of(const Launch& launch, bool channels_last, const T* grad, int64_t batch,
                           int64_t channels, int64_t cells, T* sums) {
  using S = Sum<T>;
  if (!channels_last) {
    const int64_t units = cells / Elements;
    int threads = 32;
    while (threads < kSumThreads && threads * kSumUnits < units) threads *= 2;
    const int64_t pieces = ceil_div(units, threads * kSumUnits);
    const int64_t parts = batch * pieces;
    S* partials = take_partials(launch, parts, channels, sums);
    if (parts > 0)
      launch(channel_sum_ncdhw<T, Elements>, grid_of(parts * channels), threads,
             threads * sizeof(S), grad, channels, units, pieces, partials);
    return launch_sum_partials(launch, partials, parts, channels, sums);
  }
  const int64_t units = channels / Elements;
  const int wide = even_tile(units, kSumThreads / 4), high = kSumThreads / wide;
  const int64_t parts = ceil_div(batch * cells, kSumUnits * high);
  S* partials = take_partials(launch, parts, channels, sums);
  if (parts > 0)
    launch(channel_sum_last<T, Elements>, grid_of(parts * ceil_div(units, wide)), dim3(wide, high),
           wide * high * Elements * sizeof(S), grad, units, batch * cells, partials);
  launch_sum_partials(launch, partials, parts, channels, sums);
}

template <class T, class Launch>
void launch_channel_sum(const Launch& launch, bool channels_last, const T* grad, int64_t batch,
                        int64_t channels, int64_t d, int64_t h, int64_t w, T* sums) {
  constexpr int kVector = kSumVector<T>;
  if (channels == 0) return;
  const int64_t cells = d * h * w;
  if ((channels_last ? channels : cells) % kVector == 0 &&
      reinterpret_cast<uintptr_t>(grad) % (kVector * sizeof(T)) == 0)
    launch_channel_sum_of<kVector>(launch, channels_last, grad, batch, channels, cells, sums);
  else
    launch_channel_sum_of<1>(launch, channels_last, grad, batch, channels, cells, sums);
}

}  // namespace device
}  // namespace voxconv
