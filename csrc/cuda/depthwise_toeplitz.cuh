// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of bfloat16 and float16 by the tensor cores: stride 1, dilation 1, zeros,
// NCDHW, lines of 3 to 41 taps. They are one correlation, as in depthwise_planes.cuh.
//
// Along W, 8 outputs are a product of the cells that they read with a banded (Toeplitz) matrix of
// the taps of a line, T[i, n] = tap[i - n]; its 8 + kw - 1 rows fill up S steps of 16. 16 lines are
// the rows of a product. A piece of 8 lines x 8 cells in shared memory is so part of the operands
// of 2 S tiles of outputs, and of all planes that read it.
//
// A warp owns 16 lines of J tiles, as two halves of 8 lines, which may lie in different groups of
// planes: 8 lines are no waste then. It keeps sums of G planes of each, and multiplies each plane
// of the source, line by line (kh), for all of these that read it. A block shares out the planes of
// the source, each of which is copied while the one before it is worked on.
//   If G is KD, a group is a slab that the warp walks along: the next plane takes the place of one
//   that is done.
//   Else a group has G planes at most, and their (G + KD - 1) planes of the source are read for
//   them alone, mostly from the second cache; only the taps for the current one are kept.
// Taps are kept as the pairs that a lane needs, (tap[i], tap[i + 1]) for each i from -7 on, so that
// a register is one load.
//
// Per output KD KH S / 128 products (of 4096 operations) and, for each, 2/J + 4 (J + 2S - 1) /
// (G J 2S) wavefronts of shared memory where all of the G planes read a plane. On an H200 a
// multiprocessor makes a product in 1.6 clocks (60 % of its peak) and a wavefront in one: with 7
// taps and J = 3 that is 0.61 clocks against 0.40, where 343 FMAs take 2.7. With 21 it is 11
// against 7.4, for 72.
//
// A zero of T times infinity is no zero. An output that is NaN at the end may have got it from a
// cell in its tile that it does not read: it is summed up once more without T.
#pragma once
#include "depthwise_toeplitz_plan.h"
#include "mma.cuh"

namespace voxconv {
namespace device {

// Stores two neighbours, of which the first `count` exist.
template <class T>
__device__ inline void store_two(T* to, const float (&from)[2], int count, bool aligned) {
  struct alignas(4) Two {
    T of[2];
  } two;
  narrow(two.of[0], from[0]);
  narrow(two.of[1], from[1]);
  if (aligned && count >= 2) {
    *reinterpret_cast<Two*>(to) = two;
    return;
  }
  if (count >= 1) to[0] = two.of[0];
  if (count >= 2) to[1] = two.of[1];
}

// One output, tap by tap.
template <class T>
__device__ float exact_output(const ToeplitzShape& a, const T* source, const T* taps, float start,
                              int d, int h, int w) {
  float sum = start;
  const int all = a.kernel[0] * a.kernel[1] * a.kernel[2];
  for (int tap = 0; tap < all; ++tap) {
    const int kw = tap % a.kernel[2], kh = tap / a.kernel[2] % a.kernel[1];
    const int from_d = d - a.before[0] + tap / a.kernel[2] / a.kernel[1];
    const int from_h = h - a.before[1] + kh, from_w = w - a.before[2] + kw;
    if (from_d < 0 || from_d >= a.source[0] || from_h < 0 || from_h >= a.source[1] || from_w < 0 ||
        from_w >= a.source[2])
      continue;
    sum += widen(taps[a.turned ? all - 1 - tap : tap]) *
           widen(source[(int64_t(from_d) * a.source[1] + from_h) * a.source[2] + from_w]);
  }
  return sum;
}

// blockDim is 32 * warps. Blocks are counted by their tiles along w, then h, then d, then by
// channels. Shared memory: a line of zeros, the taps, and for each of the two steps and each group
// a plane of the source.
template <class T, int S, int J, int G, bool Walk>
__global__ void __launch_bounds__(kToeplitzThreads, 2)
    depthwise_toeplitz(ToeplitzShape a, const T* source, const T* weight, const T* bias,
                       T* target) {
  constexpr ToeplitzKind kKind = {S, J, G, Walk};
  constexpr int kPieces = kKind.pieces(), kPairs = kKind.pairs(), kPlaces = kKind.places();
  int64_t rest = blockIdx.x;
  const int w = static_cast<int>(rest % a.blocks_w) * a.wide * 8 * J;
  rest /= a.blocks_w;
  const int h = static_cast<int>(rest % a.blocks_h) * a.high * 8;
  rest /= a.blocks_h;
  const int d = static_cast<int>(rest % a.blocks_d) * a.groups * a.planes;
  rest /= a.blocks_d;
  const int channel = static_cast<int>(rest % a.channels);
  const int KD = Walk ? G : a.kernel[0], KH = a.kernel[1], KW = a.kernel[2];
  const int64_t source_plane = int64_t(a.source[1]) * a.source[2];
  const T* from = source + rest / a.multiplier * (a.source[0] * source_plane);
  T* to = target + rest * (a.target[0] * (int64_t(a.target[1]) * a.target[2]));
  const T* own_taps = weight + channel * (int64_t(KD) * KH * KW);
  const float start = bias ? widen(bias[channel]) : 0.0f;

  const int pitch = kKind.pitch(a.wide), lines = a.lines();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int tap_place = KH * kPairs;
  uint32_t* zeros = shared_memory<uint32_t>();
  uint32_t* taps = zeros + 4 * kPieces;
  uint16_t* planes = reinterpret_cast<uint16_t*>(zeros + kKind.taps(KH));
  for (int i = thread; i < 4 * kPieces; i += threads) zeros[i] = 0;
  // What of a plane lies outside of the source stays zero.
  for (int i = thread; i < a.groups * lines * pitch; i += threads)
    reinterpret_cast<uint32_t*>(planes)[i] = 0;

  // The pairs of the taps of one kd.
  const auto copy_taps = [&](int kd) {
    uint32_t* place = taps + kd % kPlaces * tap_place;
    for (int i = thread; i < tap_place; i += threads) {
      const int kh = i / kPairs, kw = i % kPairs - 7;
      const auto bits = [&](int k) -> uint32_t {
        if (k < 0 || k >= KW) return 0;
        const int tap = (kd * KH + kh) * KW + k;
        return reinterpret_cast<const uint16_t*>(own_taps)[a.turned ? KD * KH * KW - 1 - tap : tap];
      };
      place[i] = bits(kw) | bits(kw + 1) << 16;
    }
  };

  // Lines and pieces of a plane in shared memory that have cells of the source. A thread copies the
  // same piece of some lines.
  const int first_h = h - a.before[1], first_w = w - a.before[2];
  const int line_begin = first_h < 0 ? -first_h : 0;
  const int line_end = a.source[1] - first_h < lines ? a.source[1] - first_h : lines;
  const int piece_begin = first_w < 0 ? -first_w / 8 : 0;
  const int piece_limit = (a.source[2] - first_w + 7) / 8;
  const int piece_end = piece_limit < pitch / 8 ? piece_limit : pitch / 8;
  const int pieces = piece_end > piece_begin ? piece_end - piece_begin : 0;
  const int copied_lines = pieces == 0 ? 0 : threads / pieces;
  const int own_line = copied_lines == 0 || thread >= copied_lines * pieces
                           ? line_end
                           : line_begin + thread / pieces;
  const int own_piece = pieces == 0 ? 0 : piece_begin + thread % pieces;
  const auto copy_plane = [&](const T* plane, uint16_t* place) {
    for (int line = own_line; line < line_end; line += copied_lines)
      *reinterpret_cast<Piece*>(place + line * pitch + 8 * own_piece) =
          load_cells<8>(plane + (first_h + line) * int64_t(a.source[2]), first_w + 8 * own_piece,
                        a.source[2], a.aligned)
              .whole();
  };

  // Where the lane reads pieces, and what its sums are for: two halves of 8 lines. The lines of
  // taps that meet lines of the source in one of them.
  const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);  // known to be shared
  const int column = warp % a.wide * 8 * J, halves = 2 * (warp / a.wide);
  const int reads = halves + lane / 8 % 2, group = reads / a.high;
  const int upper = first_h + halves % a.high * 8, lower = first_h + (halves + 1) % a.high * 8;
  const int top = upper < lower ? upper : lower, bottom = (upper < lower ? lower : upper) + 7;
  const int first_kh = bottom < 0 ? -bottom : 0;
  const int live_kh = (a.source[1] - top < KH ? a.source[1] - top : KH) - first_kh;
  const int line = reads % a.high * 8 + lane % 8 + first_kh;
  const uint32_t* own = taps + first_kh * kPairs + 2 * (lane % 4) - lane / 4 + 7;

  float sum[G][J][4];
  VOXCONV_UNROLL
  for (int i = 0; i < G * J * 4; ++i) sum[i / 4 / J][i / 4 % J][i % 4] = start;

  // Stores plane `plane` of the groups, whose sums are the first, and moves the others up.
  const int o_w = w + column + 2 * (lane % 4);
  bool bad = false;
  const auto finish = [&](int plane) {
    VOXCONV_UNROLL
    for (int i = 0; i < 2 * J; ++i) {
      const int half = halves + i % 2, j = i / 2, count = a.target[2] - o_w - 8 * j;
      const int o_d = d + half / a.high * a.planes + plane;
      const int o_h = h + half % a.high * 8 + lane / 4;
      if (o_d >= a.target[0] || o_h >= a.target[1]) continue;
      float two[2] = {sum[0][j][i % 2 * 2], sum[0][j][i % 2 * 2 + 1]};
      bad = bad || two[0] != two[0] || two[1] != two[1];
      if (a.activation != kIdentity) {
        two[0] = activate(two[0], a.activation);
        two[1] = activate(two[1], a.activation);
      }
      store_two(to + (int64_t(o_d) * a.target[1] + o_h) * a.target[2] + o_w + 8 * j, two, count,
                a.target[2] % 2 == 0);
    }
  };
  const auto move_up = [&] {
    VOXCONV_UNROLL
    for (int g = 0; g < G; ++g) {
      VOXCONV_UNROLL
      for (int i = 0; i < 4 * J; ++i)
        sum[g][i / 4][i % 4] = g + 1 < G ? sum[g + 1 < G ? g + 1 : g][i / 4][i % 4] : start;
    }
  };

  // In step s, a group with destination planes p, p + 1, ... has plane p + s - before of the
  // source. Steps without any are left out, but not of a walk.
  const int now = d + a.planes <= a.target[0] ? a.planes : a.target[0] - d;
  const int before = a.before[0] - d - (a.groups - 1) * a.planes;
  const int after = a.source[0] + a.before[0] - d, most = now + KD - 1;
  const int begin = !Walk && before > 0 ? before : 0;
  const int end = !Walk && after < most ? after : most;
  const auto source_of = [&](int step, int group) {
    const int plane = d + group * a.planes + step - a.before[0];
    return plane >= 0 && plane < a.source[0] ? plane : -1;
  };
  int next_kd = Walk || begin < G ? 0 : begin - G + 1;
  for (int step = begin - 1; step < end; ++step) {
    __syncthreads();  // this step's copies are there, and nobody reads those of the last one
    if (step + 1 < end) {
      for (; next_kd < KD && (Walk || next_kd <= step + 1); ++next_kd) copy_taps(next_kd);
      for (int i = 0; i < a.groups; ++i)
        if (const int plane = source_of(step + 1, i); plane >= 0)
          copy_plane(from + plane * source_plane,
                     planes + ((step + 1) % 2 * a.groups + i) * lines * pitch);
    }
    if (step < begin) continue;
    // A half whose group has no plane of the source reads zeros.
    const bool exists = source_of(step, group) >= 0;
    const uint16_t* cells =
        exists ? planes + ((step % 2 * a.groups + group) * lines + line) * pitch + column
               : reinterpret_cast<const uint16_t*>(zeros);
    const int next_line = exists ? pitch : 0;
    // Sums g are of a plane that reads this one with tap step - g, or on a walk KD - 1 - g: bit g
    // of `live`. And where the pairs of that are.
    const int oldest = Walk ? KD - 1 - step : step - KD + 1,
              newest = Walk ? oldest + now - 1 : step;
    const int last = Walk ? G - 1 : now - 1;
    const uint32_t live =
        (2u << (newest < last ? newest : last)) - (1u << (oldest > 0 ? oldest : 0));
    int places[G];
    VOXCONV_UNROLL
    for (int g = 0; g < G; ++g) {
      const int place = Walk ? KD - 1 - g : step % kPlaces - g;
      places[g] = (place < 0 ? place + kPlaces : place) * tap_place;
    }
    const uint32_t* pairs = own;
    for (int kh = 0; kh < live_kh; ++kh, cells += next_line, pairs += kPairs) {
      uint32_t x[kPieces][2], tap[2][2 * S];
      const auto load_taps = [&](int g) {
        if (!(live >> g & 1)) return;
        VOXCONV_UNROLL
        for (int i = 0; i < 2 * S; ++i) tap[g % 2][i] = pairs[places[g] + 8 * i];
      };
      load_taps(0);
      VOXCONV_UNROLL
      for (int i = 0; i < kPieces; ++i) load_pieces(cells + 8 * i, x[i]);
      VOXCONV_UNROLL
      for (int g = 0; g < G; ++g) {
        if (g + 1 < G) load_taps(g + 1);
        if (!(live >> g & 1)) continue;
        VOXCONV_UNROLL
        for (int j = 0; j < J; ++j) {
          VOXCONV_UNROLL
          for (int s = 0; s < S; ++s)
            multiply_add<T>(sum[g][j], x[j + 2 * s], x[j + 2 * s + 1], tap[g % 2] + 2 * s);
        }
      }
    }
    if (Walk) {
      if (step >= KD - 1) finish(step - KD + 1);
      move_up();
    }
  }
  for (int plane = 0; !Walk && plane < now; ++plane) {
    finish(plane);
    move_up();
  }

  if (!bad) return;
  for (int i = 0; i < 4 * J * a.planes; ++i) {
    const int half = halves + i % 2, column = o_w + i / 4 % J * 8 + i / 2 % 2;
    const int o_d = d + half / a.high * a.planes + i / 4 / J;
    const int o_h = h + half % a.high * 8 + lane / 4;
    if (o_d >= a.target[0] || o_h >= a.target[1] || column >= a.target[2]) continue;
    T& output = to[(int64_t(o_d) * a.target[1] + o_h) * a.target[2] + column];
    if (const float value = widen(output); value != value)
      narrow(output,
             activate(exact_output(a, from, own_taps, start, o_d, o_h, column), a.activation));
  }
}

// By depthwise_toeplitz, if it can and if it is quicker than FMAs, which make a product of 16 cells
// with 8 columns in the time of 12 taps of it, at what both reach of their peaks: `target` =
// activation(source * weight + bias).
template <class T, class Launch>
bool by_toeplitz(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
                 const T* source, const T* weight, const T* bias, int activation, T* target) {
  if constexpr (sizeof(T) == 2) {
    const Axis* axis = shape.axis;
    if (channels_last || shape.mode != kZeros || (backwards && shape.multiplier != 1)) return false;
    ToeplitzShape a;
    a.multiplier = static_cast<int>(backwards ? 1 : shape.multiplier);
    a.channels = static_cast<int>(shape.channels * shape.multiplier);
    a.targets = shape.batch * a.channels;
    a.turned = backwards;
    a.activation = activation;
    for (int i = 0; i < 3; ++i) {
      if (axis[i].stride != 1 || axis[i].dilation != 1 || axis[i].kernel > INT16_MAX ||
          axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
        return false;
      const int64_t before = backwards ? axis[i].kernel - 1 - axis[i].before : axis[i].before;
      a.source[i] = static_cast<int>(backwards ? axis[i].out : axis[i].in);
      a.target[i] = static_cast<int>(backwards ? axis[i].in : axis[i].out);
      a.kernel[i] = static_cast<int>(axis[i].kernel);
      a.before[i] = static_cast<int>(before);
    }
    // Of narrow volumes with 3 taps too much of the products would be zeros.
    if (a.kernel[2] < (a.target[2] < 32 ? 5 : 3) || a.kernel[2] > 41) return false;
    a.aligned = a.source[2] % 8 == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0;
    const ToeplitzKind kind = toeplitz_kind(a);
    const int64_t made = ceil_div(a.target[2], 8 * kind.tiles) * 8 * kind.tiles *
                         ceil_div(a.target[1], 8) * 8 * kind.steps;
    if (made * 4 > int64_t(a.target[2]) * a.target[1] * a.kernel[2] * 3) return false;
    if (!cut_toeplitz(a, kind, launch.multiprocessors())) return false;

    const auto run = [&](auto steps, auto tiles, auto planes, auto walk) {
      launch(depthwise_toeplitz<T, decltype(steps)::value, decltype(tiles)::value,
                                decltype(planes)::value, decltype(walk)::value>,
             grid_of(a.blocks()), static_cast<unsigned>(32 * a.warps()),
             static_cast<size_t>(a.shared(kind)), a, source, weight, bias, target);
    };
    using std::integral_constant;
    const auto with = [&](auto tiles, auto planes) {
      const integral_constant<int, 1> one;
      if (kind.walk && kind.planes == 3)
        run(one, tiles, integral_constant<int, 3>{}, std::true_type{});
      else if (kind.walk && kind.planes == 5)
        run(one, tiles, integral_constant<int, 5>{}, std::true_type{});
      else if (kind.walk)
        run(one, tiles, integral_constant<int, 7>{}, std::true_type{});
      else if (kind.steps == 1)
        run(one, tiles, planes, std::false_type{});
      else if (kind.steps == 2)
        run(integral_constant<int, 2>{}, tiles, planes, std::false_type{});
      else
        run(integral_constant<int, 3>{}, tiles, planes, std::false_type{});
    };
    if (kind.tiles == 2)
      with(integral_constant<int, 2>{}, integral_constant<int, planes_of(2)>{});
    else if (kind.tiles == 3)
      with(integral_constant<int, 3>{}, integral_constant<int, planes_of(3)>{});
    else
      with(integral_constant<int, 4>{}, integral_constant<int, planes_of(4)>{});
    return true;
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
