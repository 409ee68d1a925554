// SPDX-License-Identifier: Apache-2.0
// grad_input of zeros, NCDHW, of stride 2 along H and W, and 1 or 2 along D: the forward pass of a
// transposed convolution that doubles a volume.
//
// Target cell i of an axis of stride 2, j = i + before, is the sum of w[k] * source[(j - k) / 2] of
// the taps k of the parity of j: the target falls into pairs of neighbours j = 2 q, 2 q + 1, and q
// reads the source's cells q - (K-1)/2, ..., q. As in depthwise_planes, a block walks along D
// through planes of the source, in shared memory one after the other; here a plane o meets the KD
// target planes j = SD * o, ..., SD * o + KD - 1, of which the first SD then have all they need. A
// thread owns kUpLines pairs of lines and 8 columns of each of them. A window of a line of the
// source, at most 7 cells, is worth up to 4 K^2 KD multiply-adds.
//
// Along W the first column of a thread is the first or the second of a pair, as it is with as much
// padding as is usual, K / 2; with padding of the other parity depthwise_lines does the pass.
#pragma once
#include "source_tile.cuh"

namespace voxconv {
namespace device {

struct UpShape {
  int64_t targets;  // batch * channels
  int channels;
  int planes;     // of the source
  int target[3];  // sizes
  int before[3];
  int first[3];  // pair q of the first destination along D and H; along W, its source cell
  int pairs_d;   // along D, that have destinations; of SD planes
  int tile_h;    // pairs of lines
  int tile_w;    // columns
  int tiles_h, tiles_w;
  int slab, slabs;  // pairs of planes of a slab; slabs
  int activation;
  SourceTile tile;
  int plane, shared;  // bytes of shared memory: of a plane; of all that is a channel's
};

constexpr int kUpColumns = 8;  // of a thread
template <class Form>
constexpr int kUpLines = Form::K == 3 ? 2 : 1;
constexpr int kUpResident = 3;  // blocks that a multiprocessor is to hold

// The columns of a thread begin with the kUpSecond-th of a pair; they read kUpWindow cells of the
// source, from kUpBack in front of the cell q of the first one on; and in front of the cells of a
// tile, lines in shared memory have so many that they begin with a whole copy, see kLead.
template <class Form>
constexpr int kUpSecond = Form::K / 2 % 2;
template <class Form>
constexpr int kUpBack = (Form::K - 1 - kUpSecond<Form>) / 2;
template <class Form>
constexpr int kUpWindow = kUpBack<Form> + kUpColumns / 2 + kUpSecond<Form>;
template <class Form, class T>
constexpr int kUpLead =
    (kCopyCells<T> + (Form::K / 2 - kUpSecond<Form>) / 2 - kUpBack<Form>) % kCopyCells<T>;

// What a plane of the source in shared memory adds to the sums of a thread: sum[kd] is of the plane
// that reads it with tap kd. Unless kWhole, the block only has those with first <= kd <= last.
template <class Form, bool kWhole, class T>
__device__ __forceinline__ void add_plane_up(
    const T* cells, int pitch, const Sum<T>* taps, int first, int last,
    Sum<T> (&sum)[Form::KD][2 * kUpLines<Form>][kUpColumns]) {
  using S = Sum<T>;
  constexpr int K = Form::K, kBack = (K - 1) / 2, kTapVectors = kTapPitch<K> / 4;
  constexpr int kFirst = kUpLead<Form, T> % 4, kVectors = (kFirst + kUpWindow<Form> + 3) / 4;
  VOXCONV_UNROLL
  for (int line = 0; line < kUpLines<Form> + kBack; ++line) {
    S x[kVectors][4];
    VOXCONV_UNROLL
    for (int i = 0; i < kVectors; ++i) load_four(cells + line * pitch + 4 * i, x[i]);
    VOXCONV_UNROLL
    for (int h = 0; h < 2 * kUpLines<Form>; ++h) {
      const int kh = 2 * (h / 2 + kBack - line) + h % 2;
      if (kh < 0 || kh >= K) continue;
      VOXCONV_UNROLL
      for (int kd = 0; kd < Form::KD; ++kd) {
        if (!kWhole && (kd < first || kd > last)) continue;
        S tap[kTapVectors][4];
        VOXCONV_UNROLL
        for (int i = 0; i < kTapVectors; ++i)
          load_four(taps + (kd * K + kh) * kTapPitch<K> + 4 * i, tap[i]);
        VOXCONV_UNROLL
        for (int w = 0; w < kUpColumns; ++w) {
          constexpr int kSecond = kUpSecond<Form>;
          VOXCONV_UNROLL
          for (int kw = (kSecond + w) % 2; kw < K; kw += 2) {
            const int cell = kFirst + kUpBack<Form> + (kSecond + w - kw) / 2;
            sum[kd][h][w] += x[cell / 4][cell % 4] * tap[kw / 4][kw % 4];
          }
        }
      }
    }
  }
}

// blockDim is [tile_w / kUpColumns, tile_h / kUpLines, channels of a block]; blocks are counted by
// tiles, then by slabs, then by channels.
template <class T, int KD, int K, int SD>
__global__ void __launch_bounds__(kWalkThreads, kUpResident)
    depthwise_planes_up(UpShape a, const T* source, const T* weight, const T* bias, T* target) {
  using S = Sum<T>;
  using Form = Stencil<KD, K, SD, 2>;
  constexpr int kHigh = kUpLines<Form>, kThreadCells = 2 * kHigh * kUpColumns;
  constexpr int kBehind = (KD - 1) / SD;  // planes of the source that q reads in front of its own
  int rest = static_cast<int>(blockIdx.x);
  const auto part = [&](int parts) {
    const int i = rest % parts;
    rest /= parts;
    return i;
  };
  const int w = part(a.tiles_w) * a.tile_w, h = part(a.tiles_h) * a.tile_h;
  const int first = part(a.slabs) * a.slab;
  const int last = first + a.slab < a.pairs_d ? first + a.slab : a.pairs_d;
  const int64_t number = static_cast<int64_t>(rest) * blockDim.z + threadIdx.z;
  const bool exists = number < a.targets;
  const int64_t at = exists ? number : a.targets - 1;  // of the last block: works in vain
  const int64_t source_plane = int64_t(a.tile.size[0]) * a.tile.size[1];
  const int64_t target_plane = int64_t(a.target[1]) * a.target[2];
  const int channel = static_cast<int>(at % a.channels);
  const T* from = source + at * (a.planes * source_plane);
  T* to = target + at * (a.target[0] * target_plane);

  auto* own = shared_memory<char>() + threadIdx.z * a.shared;
  S* taps = reinterpret_cast<S*>(own);
  T* planes = reinterpret_cast<T*>(taps + KD * K * kTapPitch<K>);
  copy_taps<Form>(weight + channel * int64_t(KD * K * K), false, taps);

  const S start = bias ? widen(bias[channel]) : S(0);
  S sum[KD][2 * kHigh][kUpColumns];
  VOXCONV_UNROLL
  for (int i = 0; i < KD * kThreadCells; ++i)
    sum[i / kThreadCells][i / kUpColumns % (2 * kHigh)][i % kUpColumns] = start;

  const int first_cell = static_cast<int>(threadIdx.y) * kHigh * a.tile.pitch +
                         static_cast<int>(threadIdx.x) * (kUpColumns / 2) +
                         kUpLead<Form, T> / 4 * 4;
  const int steps = last - first + kBehind;
  const auto plane_at = [&](int step) { return a.first[0] + first - kBehind + step; };
  const auto copy = [&](int step) {
    const int plane = plane_at(step);
    if (step < steps && plane >= 0 && plane < a.planes)
      copy_tile<false>(a.tile, from + plane * source_plane, a.first[1] + h - (K - 1) / 2,
                       a.first[2] + w / 2 - kUpLead<Form, T>, planes + step % 2 * a.plane);
    commit_copies();
  };
  copy(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    copy(step + 1);
    const int plane = plane_at(step);
    const int own_pair = first + step - kBehind;  // that reads this plane last
    if (plane >= 0 && plane < a.planes) {
      const T* cells = planes + step % 2 * a.plane + first_cell;
      // Taps along D of the first pair of the slab, and of the last.
      const int least = SD * (first - own_pair), most = SD * (last - own_pair) - 1;
      if (least <= 0 && most >= KD - 1)
        add_plane_up<Form, true>(cells, a.tile.pitch, taps, 0, 0, sum);
      else
        add_plane_up<Form, false>(cells, a.tile.pitch, taps, least, most, sum);
    }
    VOXCONV_UNROLL
    for (int i = 0; i < SD * 2 * kHigh; ++i) {
      const int p = i / (2 * kHigh), line = i % (2 * kHigh);
      const int d = SD * (a.first[0] + own_pair) + p - a.before[0];
      const int row =
          2 * (a.first[1] + h + static_cast<int>(threadIdx.y) * kHigh) + line - a.before[1];
      const int column = w + static_cast<int>(threadIdx.x) * kUpColumns;
      if (own_pair < first || !exists || d < 0 || d >= a.target[0] || row < 0 || row >= a.target[1])
        continue;
      VOXCONV_UNROLL
      for (int j = 0; j < kUpColumns; j += 4) {
        S four[4];
        VOXCONV_UNROLL
        for (int c = 0; c < 4; ++c) four[c] = sum[p][line][j + c];
        store_four(to + d * target_plane + row * int64_t(a.target[2]) + column + j, four,
                   a.activation, a.target[2] - column - j, a.target[2] % 4 == 0);
      }
    }
    VOXCONV_UNROLL
    for (int kd = 0; kd < KD; ++kd) {
      VOXCONV_UNROLL
      for (int i = 0; i < kThreadCells; ++i)
        sum[kd][i / kUpColumns][i % kUpColumns] =
            kd + SD < KD ? sum[kd + SD < KD ? kd + SD : 0][i / kUpColumns][i % kUpColumns] : start;
    }
  }
  wait_for_copies<0>();
}

// A plane of the source that a slab shares with the next takes this part of one of its own.
constexpr double kUpEnds = 0.5;

// Whether depthwise_planes_up can do a pass, if it has its stencil.
inline bool planes_up_suit(const Conv3dShape& shape, bool channels_last, bool backwards) {
  if (!backwards || channels_last || shape.mode != kZeros || shape.multiplier != 1) return false;
  const Axis* axis = shape.axis;
  for (int i = 0; i < 3; ++i)
    if (axis[i].dilation > 1 || axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  if (axis[1].in * axis[2].in > INT32_MAX || axis[1].out * axis[2].out > INT32_MAX) return false;
  return (axis[2].before - axis[2].kernel / 2) % 2 == 0;
}

template <class Form, class T, class Launch>
void launch_planes_up(const Launch& launch, const Conv3dShape& shape, const T* source,
                      const T* weight, const T* bias, int activation, T* target) {
  constexpr int KD = Form::KD, K = Form::K, SD = Form::SD, kHigh = kUpLines<Form>;
  UpShape a;
  a.channels = static_cast<int>(shape.channels);
  a.targets = shape.batch * a.channels;
  a.activation = activation;
  const Axis* axis = shape.axis;
  int pairs[3];  // from the first destination to the last
  for (int i = 0; i < 3; ++i) {
    const int step = i == 0 ? SD : 2;
    a.target[i] = static_cast<int>(axis[i].in);
    a.before[i] = static_cast<int>(axis[i].before);
    a.first[i] = a.before[i] / step;
    pairs[i] = (a.before[i] + a.target[i] - 1) / step - a.first[i] + 1;
  }
  a.first[2] = (a.before[2] - kUpSecond<Form>) / 2 - kUpBack<Form>;
  a.planes = static_cast<int>(axis[0].out);
  a.pairs_d = pairs[0];
  a.tile = SourceTile{{static_cast<int>(axis[1].out), static_cast<int>(axis[2].out)}, {1, 1}};
  const auto shared = [&](int64_t wide, int64_t high) -> size_t {
    constexpr int kCells = kCopyCells<T>;
    const int read =
        kUpLead<Form, T> + (static_cast<int>(wide) - 1) * (kUpColumns / 2) + kUpWindow<Form>;
    a.tile.lines = static_cast<int>(high) * kHigh + (K - 1) / 2;
    a.tile.cells = a.tile.pitch = (read + kCells - 1) / kCells * kCells;
    a.plane = a.tile.lines * a.tile.pitch;
    a.shared = KD * K * kTapPitch<K> * int(sizeof(Sum<T>)) + 2 * a.plane * int(sizeof(T));
    return a.shared;
  };
  const int64_t columns = ceil_div(a.target[2], kUpColumns), lines = ceil_div(pairs[1], kHigh);
  const Walk walk = best_walk(a.pairs_d, kUpEnds * ((KD - 1) / SD), columns, lines, a.targets, 1,
                              double(K - 1) / 2 / kHigh, shared);
  const Tile& tile = walk.tile;
  a.slab = walk.slab;
  a.slabs = walk.slabs;
  a.tile_w = tile.wide * kUpColumns;
  a.tile_h = tile.high * kHigh;
  a.tiles_w = static_cast<int>(ceil_div(columns, tile.wide));
  a.tiles_h = static_cast<int>(ceil_div(lines, tile.high));
  const size_t bytes = tile.deep * shared(tile.wide, tile.high);
  a.tile.copy_bytes = bytes_of_copy(a.tile, a.tile_w / 2, a.first[2] - kUpLead<Form, T>, source);
  const int64_t blocks = int64_t(a.tiles_w) * a.tiles_h * a.slabs * ceil_div(a.targets, tile.deep);
  launch(depthwise_planes_up<T, KD, K, SD>, grid_of(blocks), dim3(tile.wide, tile.high, tile.deep),
         bytes, a, source, weight, bias, target);
}

// What there is a kernel for: taps along D, along H and W, and the strides of these.
using UpStencils = StencilList<Stencil<3, 3, 2, 2>, Stencil<5, 5, 2, 2>, Stencil<7, 7, 2, 2>,
                               Stencil<3, 3, 1, 2>, Stencil<5, 5, 1, 2>>;

// By depthwise_planes_up, if it can: `target` = activation(source * weight + bias).
template <class T, class Launch>
bool by_planes_up(const Launch& launch, const Conv3dShape& shape, bool channels_last,
                  bool backwards, const T* source, const T* weight, const T* bias, int activation,
                  T* target) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    return planes_up_suit(shape, channels_last, backwards) &&
           with_stencil(UpStencils{}, shape, [&](auto form) {
             launch_planes_up<decltype(form)>(launch, shape, source, weight, bias, activation,
                                              target);
           });
  }
}

}  // namespace device
}  // namespace voxconv
