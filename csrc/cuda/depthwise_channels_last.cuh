// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of stride 1, dilation 1 and zeros, K taps along every axis, one filter a
// channel, channels_last_3d. They are one correlation: grad_input is that of the gradient with the
// kernel turned round.
//
// A block owns a tile of lines and columns of up to 16 channels, and walks along D through a slab
// of destination planes. The planes of the source, with the halo of the tile and zeros beyond the
// volume, are copied to shared memory some steps before they are worked on. A thread owns 8 lines
// of its cell, of K destination planes at a time, which the current plane of the source is the
// last, ..., the first to reach; the sums stay in registers.
//
// For every tap along W a thread reads K + 7 cells, a wavefront each, for 8 K^2 multiply-adds; its
// weights it holds (K = 3) or reads four by four. Of a tile of h x w the source is read
// (1 + (K-1)/h)(1 + (K-1)/w) times, mostly from the second cache; of a slab of n planes K-1 more
// than n are worked on.
#pragma once
#include "channels_last_tile.cuh"

namespace voxconv {
namespace device {

struct ChannelsShape {
  Channels channels;
  Tiles tiles;
  int source[3], target[3];  // sizes
  int before[3];             // destination o reads from source cell o - before on
  bool turned;               // the kernel is turned round
  int activation;
};

// Threads of a block: along a line, and along H, at most.
constexpr int kLineThreads = 128;
template <int K>
constexpr int kThreadRows = K > 5 ? 1 : 2;
template <int K>
constexpr int kChannelsThreads = kThreadRows<K> * kLineThreads;
// Blocks that an SM holds at least.
template <int K>
constexpr int kChannelsBlocks = 4 / kThreadRows<K>;
// Planes of the source in shared memory. Those of K = 3 are done with before the next one comes.
template <int K>
constexpr int kPlaneStages = K > 3 ? 2 : 4;

// The weights of all taps along H and D, in whole vectors of 4: [kw, kh and kd / 4, channel, 4].
template <int K>
constexpr int kColumnTaps = (K * K + 3) / 4 * 4;
template <int K>
constexpr bool kHoldsTaps = K == 3;
template <int K>
constexpr int kTapWords = K * kColumnTaps<K> * kMostChannels;

template <int K>
constexpr int kLinePitch = line_pitch<K>(kLineThreads);
template <int K, class T>
VOXCONV_HD constexpr int channels_shared(int thread_rows) {
  return kTapWords<K> * static_cast<int>(sizeof(Sum<T>)) +
         kPlaneStages<K> * (thread_rows * kOwnLines + K - 1) * kLinePitch<K> *
             static_cast<int>(sizeof(T));
}

// Copies the weights of the channels from `first` on to shared memory, in the order of their use.
template <int K, class T>
__device__ void copy_taps(const ChannelsShape& a, const T* weight, int first, Sum<T>* to) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < kTapWords<K>;
       i += threads) {
    const int own = i / 4 % kMostChannels, c = first + own;
    const int use = i / (4 * kMostChannels) * 4 + i % 4;
    const int kw = use / kColumnTaps<K>, kh = use % kColumnTaps<K> / K;
    const int kd = K - 1 - use % kColumnTaps<K> % K, tap = (kd * K + kh) * K + kw;
    const bool live = kh < K && own < a.channels.own && c < a.channels.all;
    const int64_t from = int64_t(c) * (K * K * K) + (a.turned ? K * K * K - 1 - tap : tap);
    to[i] = live ? widen(weight[from]) : Sum<T>(0);
  }
}

// The weights of a thread's channel, four by four.
template <int K, class S>
class Taps {
 public:
  __device__ explicit Taps(const S* own) : own_(own) {
    if constexpr (kHoldsTaps<K>) {
      VOXCONV_UNROLL
      for (int i = 0; i < K * kColumnTaps<K>; i += 4) load_four(own + i * kMostChannels, held_ + i);
    }
  }
  __device__ void four(int i, S* to) const {
    if constexpr (kHoldsTaps<K>) {
      VOXCONV_UNROLL
      for (int j = 0; j < 4; ++j) to[j] = held_[i + j];
    } else {
      load_four(own_ + i * kMostChannels, to);
    }
  }

 private:
  const S* own_;
  S held_[kHoldsTaps<K> ? K * kColumnTaps<K> : 1];
};

// What the cells that tap kw reads add to the sums of a thread: sum[kd] is of the plane that reads
// them with tap kd. The first column of a plane moves every sum on to its next kd, which costs
// nothing: a multiply-add may put its result anywhere.
template <int K, bool kFirst, class S, class T>
__device__ __forceinline__ void add_column(const T* cells, const Taps<K, S>& taps, int kw, S start,
                                           S (&sum)[K][kOwnLines]) {
  S x[kOwnLines + K - 1];
  VOXCONV_UNROLL
  for (int line = 0; line < kOwnLines + K - 1; ++line) x[line] = widen(cells[line * kLinePitch<K>]);
  S tap[4];
  VOXCONV_UNROLL
  for (int kh = 0; kh < K; ++kh) {
    VOXCONV_UNROLL
    for (int kd = K - 1; kd >= 0; --kd) {
      const int i = kh * K + K - 1 - kd;
      if (i % 4 == 0) taps.four(kw * kColumnTaps<K> + i, tap);
      VOXCONV_UNROLL
      for (int h = 0; h < kOwnLines; ++h) {
        const S so_far = !kFirst || kh > 0 ? sum[kd][h] : kd > 0 ? sum[kd - 1][h] : start;
        sum[kd][h] = so_far + x[h + kh] * tap[i % 4];
      }
    }
  }
}

// Stores a cell of each of the lines that exist.
template <class T>
__device__ __forceinline__ void store_lines(Sum<T> (&sum)[kOwnLines], int activation, int lines,
                                            int64_t pitch, T* to) {
  if (activation != kIdentity) {
    VOXCONV_UNROLL
    for (int i = 0; i < kOwnLines; ++i) sum[i] = activate(sum[i], activation);
  }
  VOXCONV_UNROLL
  for (int i = 0; i < kOwnLines; ++i) {
    if (i < lines) narrow(*to, sum[i]);
    to += pitch;
  }
}

// blockDim is [cells of a line of a tile, to the next 32, lines / kOwnLines].
template <class T, int K>
__global__ void __launch_bounds__(kChannelsThreads<K>, kChannelsBlocks<K>)
    depthwise_channels_last(ChannelsShape a, const T* source, const T* weight, const T* bias,
                            T* target) {
  using S = Sum<T>;
  constexpr int kStages = kPlaneStages<K>;
  const int lines = static_cast<int>(blockDim.y) * kOwnLines, halo_lines = lines + K - 1;
  const Tile tile = tile_of_block(a.channels, a.tiles, lines, a.target[0]);
  const int64_t source_plane = int64_t(a.source[1]) * a.source[2] * a.channels.all;
  const int64_t target_line = int64_t(a.target[2]) * a.channels.all;

  // Threads behind the end of the line work in vain on its first cell.
  const int own_cells = a.tiles.columns * a.channels.own;
  const int flat = static_cast<int>(threadIdx.x) < own_cells ? threadIdx.x : 0;
  const int own = flat % a.channels.own, c = tile.c + own, w = tile.w + flat / a.channels.own;
  const int h = tile.h + static_cast<int>(threadIdx.y) * kOwnLines;
  const bool exists =
      static_cast<int>(threadIdx.x) < own_cells && w < a.target[2] && c < a.channels.all;

  S* const weights = shared_memory<S>();
  T* const planes = reinterpret_cast<T*>(weights + kTapWords<K>);
  const WindowCopy<T, kLinePitch<K>> copy_window(
      a.channels, a.source[1], a.source[2],
      {tile.h - a.before[1], tile.w - a.before[2], tile.c, halo_lines, a.tiles.columns + K - 1},
      static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x),
      static_cast<int>(blockDim.x * blockDim.y));
  const T* const volume = source + tile.n * a.source[0] * source_plane;
  const int steps = tile.last - tile.first + K - 1, first = tile.first - a.before[0];
  const auto meets = [&](int step) { return first + step >= 0 && first + step < a.source[0]; };
  const auto place = [&](int step) { return step % kStages * (halo_lines * kLinePitch<K>); };
  const auto copy = [&](int step) {
    if (step < steps && meets(step))
      copy_window(volume + (first + step) * source_plane, planes + place(step));
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  copy_taps<K>(a, weight, tile.c, weights);
  __syncthreads();
  const Taps<K, S> taps(weights + own * 4);

  const S start = bias && exists ? widen(bias[c]) : S(0);
  S sum[K][kOwnLines];
  VOXCONV_UNROLL
  for (int i = 0; i < K * kOwnLines; ++i) sum[i / kOwnLines][i % kOwnLines] = start;
  T* to = target + ((tile.n * a.target[0] + tile.first) * a.target[1] + h) * target_line +
          int64_t(w) * a.channels.all + c;
  const T* const cells = planes + static_cast<int>(threadIdx.y) * kOwnLines * kLinePitch<K> + flat;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the plane before
    copy(step + kStages - 1);
    if (meets(step)) {
      const T* at = cells + place(step);
      add_column<K, true>(at, taps, 0, start, sum);
      VOXCONV_UNROLL_IF(kHoldsTaps<K>)
      for (int kw = 1; kw < K; ++kw)
        add_column<K, false>(at += a.channels.own, taps, kw, start, sum);
    } else {
      VOXCONV_UNROLL
      for (int i = 0; i < kOwnLines; ++i) {
        VOXCONV_UNROLL
        for (int kd = K - 1; kd > 0; --kd) sum[kd][i] = sum[kd - 1][i];
        sum[0][i] = start;
      }
    }
    // The plane that reads this one with its last tap has all it needs.
    if (step < K - 1) continue;
    if (exists) store_lines(sum[K - 1], a.activation, a.target[1] - h, target_line, to);
    to += a.target[1] * target_line;
  }
  wait_for_copies<0>();
}

template <int K, class T, class Launch>
void launch_channels(const Launch& launch, const Conv3dShape& shape, bool backwards,
                     const T* source, const T* weight, const T* bias, int activation, T* target) {
  ChannelsShape a;
  a.turned = backwards;
  a.activation = activation;
  for (int i = 0; i < 3; ++i) {
    const Axis& axis = shape.axis[i];
    a.source[i] = static_cast<int>(backwards ? axis.out : axis.in);
    a.target[i] = static_cast<int>(backwards ? axis.in : axis.out);
    a.before[i] = static_cast<int>(backwards ? K - 1 - axis.before : axis.before);
  }
  a.channels = share_channels<T>(shape.channels, reinterpret_cast<uintptr_t>(source));
  const int64_t all_rows = ceil_div(a.target[1], kOwnLines);
  const int rows = all_rows < kThreadRows<K> ? static_cast<int>(all_rows) : kThreadRows<K>;
  a.tiles = tiles_over(a.target, a.channels, kLineThreads, rows * kOwnLines);
  a.tiles.slab = best_slab(a.target[0], blocks_of(a.tiles, a.channels, shape.batch), K - 1,
                           a.target[0], {kChannelsBlocks<K>, kChannelsBlocks<K> / 2});
  a.tiles.slabs = static_cast<int>(ceil_div(a.target[0], a.tiles.slab));
  const auto wide = ceil_div(a.tiles.columns * a.channels.own, 32) * 32;
  launch(depthwise_channels_last<T, K>,
         static_cast<unsigned>(blocks_of(a.tiles, a.channels, shape.batch)),
         dim3(static_cast<unsigned>(wide), rows), channels_shared<K, T>(rows), a, source, weight,
         bias, target);
}

// By depthwise_channels_last, if it can: `target` = activation(source * weight + bias).
template <class T, class Launch>
bool by_channels(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
                 const T* source, const T* weight, const T* bias, int activation, T* target) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!channels_suit(shape, channels_last)) return false;
    const auto run = [&](auto k) {
      launch_channels<decltype(k)::value>(launch, shape, backwards, source, weight, bias,
                                          activation, target);
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
