// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of stride 1, dilation 1 and zeros, K taps along every axis, one filter a
// channel, channels_last_3d. They are one correlation: grad_input is that of the gradient with the
// kernel turned round.
//
// A block owns a tile of lines and columns of up to 16 channels, and walks along D through a slab
// of destination planes. The planes of the source, with the halo of the tile and zeros beyond the
// volume, are copied to shared memory as they are some steps before they are worked on. A line
// there is [column, channel], and neighbouring threads own neighbouring cells of it: whatever the
// count of channels, a warp reads 32 cells in one wavefront and no lane idles. A thread owns 8
// lines of its cell, of K destination planes at a time, which the current plane of the source is
// the last, ..., the first to reach. Its sums stay in registers.
//
// For every tap along W a thread reads K + 7 cells, for 8 K^2 multiply-adds; its weights it holds
// (K = 3) or reads four by four. Of a tile of h x w the source is read (1 + (K-1)/h)(1 + (K-1)/w)
// times, mostly from the second cache; of a slab of n planes K-1 more than n are worked on.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

struct ChannelsShape {
  int channels, own;             // channels, and how many of them a block owns
  int source[3], target[3];      // sizes
  int before[3];                 // destination o reads from source cell o - before on
  int tile_w, tiles_w, tiles_h;  // columns of a tile; tiles
  int slab, slabs;               // destination planes of a slab; slabs
  int unit;                      // elements that are copied at once
  bool turned;                   // the kernel is turned round
  int activation;
};

// Lines of a thread. Cells of a line of a tile, and channels of a block, at most: short runs of
// channels leave shared memory for wide tiles, and 16 are still whole sectors of the memory.
constexpr int kOwnLines = 8;
constexpr int kFlatCells = 128, kMostChannels = 16;
// Threads of a block along H, at most.
template <int K>
constexpr int kThreadRows = K > 5 ? 1 : 2;
template <int K>
constexpr int kChannelsThreads = kThreadRows<K> * kFlatCells;
// Blocks that an SM holds at least, and that keep it busy.
template <int K>
constexpr int kBlocksHeld = 4 / kThreadRows<K>;
template <int K>
constexpr int kBusyBlocks = 2 / kThreadRows<K>;
// Planes of the source in shared memory. Those of K = 3 are done with before the next one comes.
template <int K>
constexpr int kPlaneStages = K > 3 ? 2 : 4;

// The weights of all taps along H and D, in whole vectors of 4: [kw, kh and kd / 4, channel, 4].
template <int K>
constexpr int kColumnTaps = (K * K + 3) / 4 * 4;
template <int K>
constexpr int kHoldsTaps = K == 3;
template <int K>
constexpr int kTapWords = K * kColumnTaps<K> * kMostChannels;

template <int K>
constexpr int kLinePitch = kFlatCells + (K - 1) * kMostChannels;
template <int K>
VOXCONV_HD constexpr int channels_lines(int thread_rows) {
  return thread_rows * kOwnLines + K - 1;
}
template <int K, class T>
VOXCONV_HD constexpr int channels_shared(int thread_rows) {
  return kTapWords<K> * static_cast<int>(sizeof(Sum<T>)) +
         kPlaneStages<K> * channels_lines<K>(thread_rows) * kLinePitch<K> *
             static_cast<int>(sizeof(T));
}

// What a thread copies of every plane: `part` of the cells cell, cell + cells, ... of the lines
// line, line + lines, ....
struct Share {
  int part, cell, cells, line, lines;
};
template <int K>
__device__ Share share_of_thread(const ChannelsShape& a) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y), parts = a.own / a.unit;
  const int most = threads / parts, wide = a.tile_w + K - 1;
  Share share;
  share.cells = most < wide ? most : wide;
  share.lines = most / share.cells;
  share.part = thread % parts;
  share.cell = thread / parts % share.cells;
  const int line = thread / parts / share.cells;
  share.line = line < share.lines ? line : INT32_MAX / 2;
  return share;
}

// Copies a plane of the source with what lies around the tile that begins at destination (h, w), of
// the channels from `channel` on, in units of type Unit.
template <int K, class Unit, class T>
__device__ void copy_units(const ChannelsShape& a, const Share& share, const T* plane, int h, int w,
                           int channel, T* to) {
  const int lines = channels_lines<K>(static_cast<int>(blockDim.y));
  const int c = channel + share.part * a.unit, row_size = a.source[2] * a.channels;
  for (int cell = share.cell; cell < a.tile_w + K - 1; cell += share.cells) {
    const int column = w - a.before[2] + cell;
    const bool live = column >= 0 && column < a.source[2] && c < a.channels;
    int row = h - a.before[1] + share.line, from = row * row_size + column * a.channels + c;
    T* place = to + share.line * kLinePitch<K> + cell * a.own + share.part * a.unit;
    for (int line = share.line; line < lines; line += share.lines) {
      const bool exists = live && static_cast<unsigned>(row) < static_cast<unsigned>(a.source[1]);
      copy_unit(reinterpret_cast<Unit*>(place),
                reinterpret_cast<const Unit*>(plane + (exists ? static_cast<unsigned>(from) : 0u)),
                exists);
      row += share.lines;
      from += share.lines * row_size;
      place += share.lines * kLinePitch<K>;
    }
  }
}

// The weights of a thread's channel, four by four in the order of their use.
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

// blockDim is [tile_w * own to the next 32, lines of a tile / kOwnLines]; blocks are counted by
// channels, then by tiles, slabs and the batch.
template <class T, int K>
__global__ void __launch_bounds__(kChannelsThreads<K>, kBlocksHeld<K>)
    depthwise_channels_last(ChannelsShape a, const T* source, const T* weight, const T* bias,
                            T* target) {
  using S = Sum<T>;
  constexpr int kStages = kPlaneStages<K>;
  int block = static_cast<int>(blockIdx.x);
  const auto next = [&](int count) {
    const int i = block % count;
    block /= count;
    return i;
  };
  const int lines = static_cast<int>(blockDim.y) * kOwnLines;
  const int first_channel = next((a.channels + a.own - 1) / a.own) * a.own;
  const int w = next(a.tiles_w) * a.tile_w, h = next(a.tiles_h) * lines;
  const int first = next(a.slabs) * a.slab, n = block;  // destination plane
  const int last = first + a.slab < a.target[0] ? first + a.slab : a.target[0];
  const int64_t source_plane = int64_t(a.source[1]) * a.source[2] * a.channels;
  const int64_t target_plane = int64_t(a.target[1]) * a.target[2] * a.channels;

  // Threads behind the end of the line work in vain on its first cell.
  const int flat = static_cast<int>(threadIdx.x) < a.tile_w * a.own ? threadIdx.x : 0;
  const int own = flat % a.own, column = w + flat / a.own, channel = first_channel + own;
  const int row = h + static_cast<int>(threadIdx.y) * kOwnLines;
  const bool exists =
      flat == static_cast<int>(threadIdx.x) && column < a.target[2] && channel < a.channels;

  S* const weights = shared_memory<S>();
  T* const planes = reinterpret_cast<T*>(weights + kTapWords<K>);
  const int plane_size = channels_lines<K>(static_cast<int>(blockDim.y)) * kLinePitch<K>;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < kTapWords<K>;
       i += threads) {
    const int c = first_channel + i / 4 % kMostChannels;
    const int place = i / (4 * kMostChannels) * 4 + i % 4;
    const int kw = place / kColumnTaps<K>, kh = place % kColumnTaps<K> / K;
    const int tap = ((K - 1 - place % kColumnTaps<K> % K) * K + kh) * K + kw;
    const bool live = kh < K && i / 4 % kMostChannels < a.own && c < a.channels;
    const int from = a.turned ? K * K * K - 1 - tap : tap;
    weights[i] = live ? widen(weight[int64_t(c) * (K * K * K) + from]) : S(0);
  }

  const Share share = share_of_thread<K>(a);
  const T* const from = source + n * (a.source[0] * source_plane);
  const int steps = last - first + K - 1;
  const auto copy = [&](int step) {
    const int plane = first - a.before[0] + step;
    if (step < steps && plane >= 0 && plane < a.source[0]) {
      const T* const cells = from + plane * source_plane;
      T* const to = planes + step % kStages * plane_size;
      if (a.unit * sizeof(T) == 16)
        copy_units<K, Four<float>>(a, share, cells, h, w, first_channel, to);
      else if (a.unit * sizeof(T) == 4)
        copy_units<K, float>(a, share, cells, h, w, first_channel, to);
      else
        copy_units<K, T>(a, share, cells, h, w, first_channel, to);
    }
    commit_copies();
  };
  VOXCONV_UNROLL
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  __syncthreads();
  const Taps<K, S> taps(weights + own * 4);

  const S start = bias && exists ? widen(bias[channel]) : S(0);
  S sum[K][kOwnLines];
  VOXCONV_UNROLL
  for (int i = 0; i < K * kOwnLines; ++i) sum[i / kOwnLines][i % kOwnLines] = start;
  const int target_row = a.target[2] * a.channels;
  T* to = target + (int64_t(n) * a.target[0] + first) * target_plane + row * int64_t(target_row) +
          column * a.channels + channel;
  const T* const cells = planes + static_cast<int>(threadIdx.y) * kOwnLines * kLinePitch<K> + flat;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the plane before
    copy(step + kStages - 1);
    const int plane = first - a.before[0] + step;
    if (plane >= 0 && plane < a.source[0]) {
      const T* at = cells + step % kStages * plane_size;
      add_column<K, true>(at, taps, 0, start, sum);
      VOXCONV_UNROLL_IF(kHoldsTaps<K>)
      for (int kw = 1; kw < K; ++kw) add_column<K, false>(at += a.own, taps, kw, start, sum);
    } else {
      VOXCONV_UNROLL
      for (int h = 0; h < kOwnLines; ++h) {
        VOXCONV_UNROLL
        for (int kd = K - 1; kd > 0; --kd) sum[kd][h] = sum[kd - 1][h];
        sum[0][h] = start;
      }
    }
    // The plane that reads this one with its last tap has all it needs.
    if (step < K - 1) continue;
    if (exists) store_lines(sum[K - 1], a.activation, a.target[1] - row, target_row, to);
    to += target_plane;
  }
  wait_for_copies<0>();
}

constexpr int kMultiprocessors = 132;  // of an H200

// How many of `planes` are best walked through by a block: of fewer, more blocks are made, which
// share out the work better, but each works on K - 1 planes more.
template <int K>
int64_t best_slab(int64_t planes, int64_t blocks) {
  int64_t best = planes, least = INT64_MAX;
  for (int64_t slabs = 1; slabs <= planes; ++slabs) {
    const int64_t slab = ceil_div(planes, slabs);
    const int64_t busiest = ceil_div(blocks * ceil_div(planes, slab), kMultiprocessors);
    const int64_t rest = busiest % kBlocksHeld<K>;
    const int64_t time = busiest + (rest > 0 && rest < kBusyBlocks<K> ? kBusyBlocks<K> - rest : 0);
    if (time * (slab + K - 1) < least) {
      least = time * (slab + K - 1);
      best = slab;
    }
    if (busiest > 4 * kBlocksHeld<K>) break;  // shared out well
  }
  return best;
}

// Whether depthwise_channels_last can do a pass, if it has as many taps.
inline bool channels_suit(const Conv3dShape& shape, bool channels_last) {
  const Axis* axis = shape.axis;
  if (!channels_last || shape.mode != kZeros || shape.multiplier != 1) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].kernel != axis[0].kernel || axis[i].stride != 1 || axis[i].dilation != 1 ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  return axis[1].in * axis[2].in <= INT32_MAX / shape.channels &&
         axis[1].out * axis[2].out <= INT32_MAX / shape.channels;
}

template <int K, class T, class Launch>
void launch_channels(const Launch& launch, const Conv3dShape& shape, bool backwards,
                     const T* source, const T* weight, const T* bias, int activation, T* target) {
  ChannelsShape a;
  a.channels = static_cast<int>(shape.channels);
  a.turned = backwards;
  a.activation = activation;
  for (int i = 0; i < 3; ++i) {
    const Axis& axis = shape.axis[i];
    a.source[i] = static_cast<int>(backwards ? axis.out : axis.in);
    a.target[i] = static_cast<int>(backwards ? axis.in : axis.out);
    a.before[i] = static_cast<int>(backwards ? K - 1 - axis.before : axis.before);
  }
  // As many bytes at once as the places of all cells allow, of 16, 4, or one element.
  constexpr int kBytes = static_cast<int>(sizeof(T));
  const auto at = reinterpret_cast<uintptr_t>(source) | (shape.channels * kBytes);
  a.unit = at % 16 == 0 ? 16 / kBytes : at % 4 == 0 ? 4 / kBytes : 1;
  const int64_t groups = ceil_div(shape.channels, kMostChannels);
  a.own = static_cast<int>(ceil_div(ceil_div(shape.channels, groups), a.unit)) * a.unit;
  const int most = kFlatCells / a.own;
  a.tile_w = a.target[2] < most ? a.target[2] : most;
  a.tiles_w = static_cast<int>(ceil_div(a.target[2], a.tile_w));
  const int64_t rows = ceil_div(a.target[1], kOwnLines);
  const int high = rows < kThreadRows<K> ? static_cast<int>(rows) : kThreadRows<K>;
  a.tiles_h = static_cast<int>(ceil_div(rows, high));
  const int64_t blocks = shape.batch * ceil_div(a.channels, a.own) * a.tiles_h * int64_t(a.tiles_w);
  a.slab = static_cast<int>(best_slab<K>(a.target[0], blocks));
  a.slabs = static_cast<int>(ceil_div(a.target[0], a.slab));
  const auto wide = static_cast<unsigned>(ceil_div(a.tile_w * a.own, 32) * 32);
  launch(depthwise_channels_last<T, K>, static_cast<unsigned>(blocks * a.slabs), dim3(wide, high),
         channels_shared<K, T>(high), a, source, weight, bias, target);
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
