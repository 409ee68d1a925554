// SPDX-License-Identifier: Apache-2.0
// grad_weight of stride 1, dilation 1 and zeros, K taps along every axis, one filter a channel,
// channels_last_3d:
//   grad_weight[c, kd, kh, kw] = sum of grad[n, c, d, h, w] * x[n, c, d + kd - before, ...].
//
// A block owns P lines (8 for K = 5, else 16) and some columns of a slab of planes of grad, of up
// to 16 channels. It walks along D over the planes of x, which are copied to shared memory, with
// the halo of the tile and zeros beyond the volume, while the one before is worked on; the K planes
// of grad that meet one stay there. A thread owns a cell of a line, and holds the sums of the taps
// of all kd and kh, and of all kw (K = 3, 5) or of one (K = 7: K groups of threads share the
// planes). A plane of x costs it a wavefront for each of P K cells of grad and, for every kw, of
// P + K - 1 of x: 102 for 432 multiply-adds (K = 3), 100 for 1000 (5), 134 for 784 (7). Of a tile
// of h x w, x is read (1 + (K-1)/h)(1 + (K-1)/w) times, mostly from the second cache, and grad
// once.
//
// The sums of the threads of a block are added in a fixed order and left for sum_partials. Planes
// and lines of grad that do not exist are left out, not multiplied as zeros: a tap may only meet
// the cells of x that are its own.
#pragma once
#include "channels_last_tile.cuh"
#include "sum_partials.cuh"

namespace voxconv {
namespace device {

struct ChannelsWeightShape {
  Channels channels;
  Tiles tiles;
  int x[3], grad[3], before[3];  // sizes; grad cell o reads x from o - before on
};

// Lines of a tile. Groups of threads that share out the kw, and cells of a line of a tile, at most.
template <int K>
constexpr int kGradLines = K == 5 ? 8 : 16;
template <int K>
constexpr int kColumnGroups = K > 5 ? K : 1;
template <int K>
constexpr int kGradCells = K > 5 ? 64 : 128;
template <int K>
constexpr int kWeightThreads = kColumnGroups<K> * kGradCells<K>;
// Blocks that an SM holds at least.
template <int K>
constexpr int kWeightBlocks = K == 3   ? 3
                              : K == 5 ? 2
                                       : 1;

// Planes of grad in shared memory: those that meet a plane of x, and the next.
template <int K>
constexpr int kGradPlanes = K + 1;
template <int K>
constexpr int kXPlane = (kGradLines<K> + K - 1) * line_pitch<K>(kGradCells<K>);
template <int K>
constexpr int kGradPlane = kGradLines<K> * kGradCells<K>;
// Bytes: planes, or sums of K taps of all threads.
template <int K, class T>
constexpr int kWeightShared = [] {
  const int planes = (2 * kXPlane<K> + kGradPlanes<K> * kGradPlane<K>)*static_cast<int>(sizeof(T));
  const int sums = K * kWeightThreads<K> * static_cast<int>(sizeof(Sum<T>));
  return planes > sums ? planes : sums;
}();

// What the cells of x from `x` on, and those of grad that meet them, add to the sums of a thread:
// plane `step` of x meets plane step - kd of grad with tap kd. All lines and planes of grad exist,
// or `lines` and `planes` of them.
template <int K, bool kAll, class T, class S>
__device__ __forceinline__ void add_products(const T* x, int own, const T* grad, int step,
                                             int lines, int planes,
                                             S (&sum)[K / kColumnGroups<K>][K][K]) {
  constexpr int kColumns = K / kColumnGroups<K>;
  S columns[kColumns][kGradLines<K> + K - 1];
  VOXCONV_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    VOXCONV_UNROLL
    for (int line = 0; line < kGradLines<K> + K - 1; ++line)
      columns[i][line] = widen(x[line * line_pitch<K>(kGradCells<K>) + i * own]);
  }
  VOXCONV_UNROLL
  for (int kd = 0; kd < K; ++kd) {
    if (!kAll && (step < kd || step - kd >= planes)) continue;
    const T* cells = grad + (step - kd) % kGradPlanes<K> * kGradPlane<K>;
    VOXCONV_UNROLL
    for (int h = 0; h < kGradLines<K>; ++h) {
      if (!kAll && h >= lines) break;
      const S g = widen(cells[h * kGradCells<K>]);
      VOXCONV_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        VOXCONV_UNROLL
        for (int kh = 0; kh < K; ++kh) sum[i][kd][kh] += g * columns[i][h + kh];
      }
    }
  }
}

// blockDim is [cells of a line of a tile, to the next 32, groups].
template <class T, int K>
__global__ void __launch_bounds__(kWeightThreads<K>, kWeightBlocks<K>)
    depthwise_channels_last_weight(ChannelsWeightShape a, const T* x, const T* grad,
                                   Sum<T>* partials) {
  using S = Sum<T>;
  constexpr int kColumns = K / kColumnGroups<K>;
  const ChannelsTile tile = tile_of_block(a.channels, a.tiles, kGradLines<K>, a.grad[0]);
  const int planes = tile.last - tile.first, first = tile.first - a.before[0];
  const int lines = a.grad[1] - tile.h < kGradLines<K> ? a.grad[1] - tile.h : kGradLines<K>;
  const int64_t x_plane = int64_t(a.x[1]) * a.x[2] * a.channels.all;
  const int64_t grad_plane = int64_t(a.grad[1]) * a.grad[2] * a.channels.all;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y);

  T* const x_planes = shared_memory<T>();
  T* const grad_planes = x_planes + 2 * kXPlane<K>;
  const WindowCopy<T, line_pitch<K>(kGradCells<K>)> copy_x(
      a.channels, a.x[1], a.x[2],
      {tile.h - a.before[1], tile.w - a.before[2], tile.c, kGradLines<K> + K - 1,
       a.tiles.columns + K - 1},
      thread, threads);
  const WindowCopy<T, kGradCells<K>> copy_grad(
      a.channels, a.grad[1], a.grad[2], {tile.h, tile.w, tile.c, kGradLines<K>, a.tiles.columns},
      thread, threads);
  const T* const x_volume = x + tile.n * a.x[0] * x_plane;
  const T* const grad_slab = grad + (tile.n * a.grad[0] + tile.first) * grad_plane;
  const int steps = planes + K - 1;
  const auto meets = [&](int step) { return first + step >= 0 && first + step < a.x[0]; };
  const auto copy = [&](int step) {
    if (step < steps && meets(step))
      copy_x(x_volume + (first + step) * x_plane, x_planes + step % 2 * kXPlane<K>);
    if (step < planes)
      copy_grad(grad_slab + step * grad_plane, grad_planes + step % kGradPlanes<K> * kGradPlane<K>);
    commit_copies();
  };

  // Threads behind the end of the line work in vain on its first cell.
  const int flat =
      static_cast<int>(threadIdx.x) < a.tiles.columns * a.channels.own ? threadIdx.x : 0;
  const T* const own_x =
      x_planes + flat + static_cast<int>(threadIdx.y) * kColumns * a.channels.own;
  S sum[kColumns][K][K];
  VOXCONV_UNROLL
  for (int i = 0; i < kColumns * K * K; ++i) sum[i / K / K][i / K % K][i % K] = 0;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the planes before
    copy(step + 1);
    if (!meets(step)) continue;
    const T* const at = own_x + step % 2 * kXPlane<K>;
    if (lines == kGradLines<K> && step >= K - 1 && step < planes)
      add_products<K, true>(at, a.channels.own, grad_planes + flat, step, lines, planes, sum);
    else
      add_products<K, false>(at, a.channels.own, grad_planes + flat, step, lines, planes, sum);
  }
  wait_for_copies<0>();

  // The taps of one kd and one kw of a thread at a time.
  S* const place = shared_memory<S>();
  S* const results = partials + (tile.number * a.channels.all + tile.c) * (K * K * K);
  const int left = a.grad[2] - tile.w, wide = a.tiles.columns < left ? a.tiles.columns : left;
  VOXCONV_UNROLL
  for (int i = 0; i < kColumns * K; ++i) {
    const int kd = i / kColumns, column = i % kColumns;
    __syncthreads();  // nobody reads what was there
    VOXCONV_UNROLL
    for (int kh = 0; kh < K; ++kh) place[kh * threads + thread] = sum[column][kd][kh];
    __syncthreads();
    for (int j = thread; j < K * kColumnGroups<K> * a.channels.own; j += threads) {
      const int c = j % a.channels.own, line = j / a.channels.own, kh = line / kColumnGroups<K>;
      const int group = line % kColumnGroups<K>, kw = group * kColumns + column;
      const S* from = place + kh * threads + group * static_cast<int>(blockDim.x) + c;
      S total = 0;
      for (int w = 0; w < wide; ++w) total += from[w * a.channels.own];
      if (tile.c + c < a.channels.all) results[((c * K + kd) * K + kh) * K + kw] = total;
    }
  }
}

// Slabs have at most so many planes, because a thread adds up a product for each line of a plane,
// one after the other.
constexpr int kMostProducts = 256;

template <int K, class T, class Launch>
void launch_channels_weight(const Launch& launch, const Conv3dShape& shape, const T* x,
                            const T* grad, T* grad_weight) {
  ChannelsWeightShape a;
  for (int i = 0; i < 3; ++i) {
    a.x[i] = static_cast<int>(shape.axis[i].in);
    a.grad[i] = static_cast<int>(shape.axis[i].out);
    a.before[i] = static_cast<int>(shape.axis[i].before);
  }
  a.channels = share_channels<T>(
      shape.channels, reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(grad));
  a.tiles = tiles_over(a.grad, a.channels, kGradCells<K>, kGradLines<K>);
  a.tiles.slab =
      best_slab(a.grad[0], blocks_of(a.tiles, a.channels, shape.batch), K - 1,
                kMostProducts / kGradLines<K>, {kWeightBlocks<K>, (kWeightBlocks<K> + 1) / 2})
          .planes;
  a.tiles.slabs = static_cast<int>(ceil_div(a.grad[0], a.tiles.slab));
  const int64_t parts = shape.batch * a.tiles.along_h * int64_t(a.tiles.along_w) * a.tiles.slabs;
  const int64_t count = shape.channels * shape.taps();
  Sum<T>* partials = take_partials(launch, parts, count, grad_weight);
  const auto wide = ceil_div(a.tiles.columns * a.channels.own, 32) * 32;
  launch(depthwise_channels_last_weight<T, K>, grid_of(blocks_of(a.tiles, a.channels, shape.batch)),
         dim3(static_cast<unsigned>(wide), kColumnGroups<K>), kWeightShared<K, T>, a, x, grad,
         partials);
  launch_sum_partials(launch, partials, parts, count, grad_weight);
}

// By depthwise_channels_last_weight, if it can.
template <class T, class Launch>
bool by_channels_weight(const Launch& launch, const Conv3dShape& shape, bool channels_last,
                        const T* x, const T* grad, T* grad_weight) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!channels_suit(shape, channels_last)) return false;
    const auto run = [&](auto k) {
      launch_channels_weight<decltype(k)::value>(launch, shape, x, grad, grad_weight);
    };
    switch (shape.axis[0].kernel) {
      case 3: run(std::integral_constant<int, 3>{}); return true;
      case 5: run(std::integral_constant<int, 5>{}); return true;
      case 7: run(std::integral_constant<int, 7>{}); return true;
      default: break;
    }
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
