// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of stride 1, dilation 1 and zeros, K taps along every axis, one filter a
// channel, channels_last_3d. They are one correlation: grad_input is that of the gradient with the
// kernel turned round.
//
// A block owns a tile of lines and columns of up to 16 channels, and walks along D through a slab
// of destination planes. The planes of the source, with the halo of the tile and zeros beyond the
// volume, are copied to shared memory some steps before they are worked on. A thread owns P (8 or
// 16) lines of its cell, of K destination planes at a time, which the current plane of the source
// is the last, ..., the first to reach; the sums stay in registers.
//
// For every tap along W a thread reads K + P - 1 cells, a wavefront each, for P K^2 multiply-adds;
// its weights it holds (K = 3) or reads four by four. Of a tile of h x w the source is read (1 +
// (K-1)/h)(1 + (K-1)/w) times, mostly from the second cache; of a slab of n planes K-1 more than n
// are worked on.
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

// Lines of a thread, where there are many: all that leave registers for their sums.
template <int K>
constexpr int kTall = K > 5 ? 8 : 16;
// Threads of a block, at most, and blocks that an SM holds at least, where threads own P lines.
constexpr int kLineThreads = 128;
template <int K, int P>
constexpr int kChannelsBlocks = K == 3 || (K == 5 && P == 8) ? 4 : 3;
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
template <int K, int P>
constexpr int kPlaneSize = (P + K - 1) * kLinePitch<K>;
template <class T, int K, int P>
constexpr int kChannelsShared = kTapWords<K> * static_cast<int>(sizeof(Sum<T>)) +
                                kPlaneStages<K> * kPlaneSize<K, P> * static_cast<int>(sizeof(T));

// Copies the weights of the channels from `first` on to shared memory, in the order of their use.
template <int K, class T>
__device__ void copy_taps(const ChannelsShape& a, const T* weight, int first, Sum<T>* to) {
  for (int i = static_cast<int>(threadIdx.x); i < kTapWords<K>; i += static_cast<int>(blockDim.x)) {
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
template <bool kFirst, int K, int P, class S, class T>
__device__ __forceinline__ void add_column(const T* cells, const Taps<K, S>& taps, int kw, S start,
                                           S (&sum)[K][P]) {
  S x[P + K - 1];
  VOXCONV_UNROLL
  for (int line = 0; line < P + K - 1; ++line) x[line] = widen(cells[line * kLinePitch<K>]);
  S tap[4];
  VOXCONV_UNROLL
  for (int kh = 0; kh < K; ++kh) {
    VOXCONV_UNROLL
    for (int kd = K - 1; kd >= 0; --kd) {
      const int i = kh * K + K - 1 - kd;
      if (i % 4 == 0) taps.four(kw * kColumnTaps<K> + i, tap);
      VOXCONV_UNROLL
      for (int h = 0; h < P; ++h) {
        const S so_far = !kFirst || kh > 0 ? sum[kd][h] : kd > 0 ? sum[kd - 1][h] : start;
        sum[kd][h] = so_far + x[h + kh] * tap[i % 4];
      }
    }
  }
}

// Stores a cell of each of the lines that exist.
template <class T, int P>
__device__ __forceinline__ void store_lines(Sum<T> (&sum)[P], int activation, int lines,
                                            int64_t pitch, T* to) {
  if (activation != kIdentity) {
    VOXCONV_UNROLL
    for (int i = 0; i < P; ++i) sum[i] = activate(sum[i], activation);
  }
  VOXCONV_UNROLL
  for (int i = 0; i < P; ++i) {
    if (i < lines) narrow(*to, sum[i]);
    to += pitch;
  }
}

// A block has a thread for every cell of a line of its tile, to the next 32.
template <class T, int K, int P>
__global__ void __launch_bounds__(kLineThreads, kChannelsBlocks<K, P>)
    depthwise_channels_last(ChannelsShape a, const T* source, const T* weight, const T* bias,
                            T* target) {
  using S = Sum<T>;
  constexpr int kStages = kPlaneStages<K>;
  const ChannelsTile tile = tile_of_block(a.channels, a.tiles, P, a.target[0]);
  const int64_t source_plane = int64_t(a.source[1]) * a.source[2] * a.channels.all;
  const int64_t target_line = int64_t(a.target[2]) * a.channels.all;

  // Threads behind the end of the line work in vain on its first cell.
  const int thread = static_cast<int>(threadIdx.x);
  const int flat = thread < a.tiles.columns * a.channels.own ? thread : 0;
  const int own = flat % a.channels.own, c = tile.c + own, w = tile.w + flat / a.channels.own;
  const bool exists = flat == thread && w < a.target[2] && c < a.channels.all;

  S* const weights = shared_memory<S>();
  T* const planes = reinterpret_cast<T*>(weights + kTapWords<K>);
  const WindowCopy<T, kLinePitch<K>> copy_window(
      a.channels, a.source[1], a.source[2],
      {tile.h - a.before[1], tile.w - a.before[2], tile.c, P + K - 1, a.tiles.columns + K - 1},
      thread, static_cast<int>(blockDim.x));
  const T* const volume = source + tile.n * a.source[0] * source_plane;
  const int steps = tile.last - tile.first + K - 1, first = tile.first - a.before[0];
  const auto meets = [&](int step) { return first + step >= 0 && first + step < a.source[0]; };
  const auto place = [&](int step) { return step % kStages * kPlaneSize<K, P>; };
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
  S sum[K][P];
  VOXCONV_UNROLL
  for (int i = 0; i < K * P; ++i) sum[i / P][i % P] = start;
  T* to = target + ((tile.n * a.target[0] + tile.first) * a.target[1] + tile.h) * target_line +
          int64_t(w) * a.channels.all + c;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the plane before
    copy(step + kStages - 1);
    if (meets(step)) {
      const T* at = planes + place(step) + flat;
      add_column<true>(at, taps, 0, start, sum);
      VOXCONV_UNROLL_IF(kHoldsTaps<K>)
      for (int kw = 1; kw < K; ++kw) add_column<false>(at += a.channels.own, taps, kw, start, sum);
    } else {
      VOXCONV_UNROLL
      for (int i = 0; i < P; ++i) {
        VOXCONV_UNROLL
        for (int kd = K - 1; kd > 0; --kd) sum[kd][i] = sum[kd - 1][i];
        sum[0][i] = start;
      }
    }
    // The plane that reads this one with its last tap has all it needs.
    if (step < K - 1) continue;
    if (exists) store_lines(sum[K - 1], a.activation, a.target[1] - tile.h, target_line, to);
    to += a.target[1] * target_line;
  }
  wait_for_copies<0>();
}

template <int K, int P, class T, class Launch>
void launch_channels(const Launch& launch, const ChannelsShape& a, int64_t batch, const T* source,
                     const T* weight, const T* bias, T* target) {
  const int64_t blocks = blocks_of(a.tiles, a.channels, batch);
  const auto threads = static_cast<unsigned>(ceil_div(a.tiles.columns * a.channels.own, 32) * 32);
  launch(depthwise_channels_last<T, K, P>, grid_of(blocks), threads, kChannelsShared<T, K, P>, a,
         source, weight, bias, target);
}

// How long the multiprocessors take with tiles of P lines, which are written to `tiles`. A line
// costs as much again every few lines, for what a thread does once for all of them.
template <int K, int P>
int64_t channels_time(const ChannelsShape& a, int64_t batch, Tiles& tiles) {
  constexpr int kOnce = 3;
  constexpr Residents kResidents{kChannelsBlocks<K, P>, 2};
  tiles = tiles_over(a.target, a.channels, kLineThreads, P);
  const int64_t blocks = blocks_of(tiles, a.channels, batch);
  const Slab slab = best_slab(a.target[0], blocks, K - 1, a.target[0], kResidents);
  tiles.slab = slab.planes;
  tiles.slabs = static_cast<int>(ceil_div(a.target[0], slab.planes));
  return slab.time * (P + kOnce);
}

template <int K, class T, class Launch>
void choose_channels(const Launch& launch, const Conv3dShape& shape, bool backwards,
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
  Tiles tall;
  const bool is_tall = channels_time<K, kTall<K>>(a, shape.batch, tall) <
                       channels_time<K, 8>(a, shape.batch, a.tiles);
  if (is_tall) a.tiles = tall;
  const auto start =
      is_tall ? launch_channels<K, kTall<K>, T, Launch> : launch_channels<K, 8, T, Launch>;
  start(launch, a, shape.batch, source, weight, bias, target);
}

// By depthwise_channels_last, if it can: `target` = activation(source * weight + bias).
template <class T, class Launch>
bool by_channels(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
                 const T* source, const T* weight, const T* bias, int activation, T* target) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!channels_suit(shape, channels_last)) return false;
    const auto run = [&](auto k) {
      choose_channels<decltype(k)::value>(launch, shape, backwards, source, weight, bias,
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
