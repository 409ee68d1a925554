// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of bfloat16 and float16 by the tensor cores: stride 1, dilation 1, zeros,
// NCDHW, lines of 5 to 41 taps. They are one correlation, as in depthwise_planes.cuh.
//
// Along W, 8 outputs are a product of the cells that they read with a banded (Toeplitz) matrix of
// the taps of a line, T[i, n] = tap[i - n]; its 8 + kw - 1 rows fill up S steps of 16. 16 lines are
// the rows of a product. A piece of 8 lines x 8 cells in shared memory is so part of the operands
// of 2 S tiles of outputs, and of all planes that read it.
//
// A warp owns 16 lines of J tiles of G planes, as two halves of 8 lines, which may lie in different
// groups of planes: 8 lines are no waste then. For a plane of the source, each line of taps (kh)
// and each of the planes it is for, it multiplies; the sums stay in registers. A block owns some
// groups of G planes, each with a plane of the source at a time, and the next one on its way;
// planes are read (G + KD - 1) / G times, mostly from the second cache. Taps are kept as the pairs
// that a lane needs, (tap[i], tap[i + 1]) for each i from -7 on, so that a register is one load,
// for the G kd that a plane is multiplied with, and the next.
//
// Per output KD KH S / 128 products (of 4096 operations) and, for each, 2/J + 4 (J + 2S - 1) /
// (G J 2S) (G + KD - 1) / KD wavefronts of shared memory. On an H200 a multiprocessor makes a
// product in 1.6 clocks (60 % of its peak) and a wavefront in one: with 7 taps, J = 3 and G = 6
// that is 0.61 clocks against 0.54, where 343 FMAs take 2.7. With 21 it is 11 against 7.4, for 72.
//
// A zero of T times infinity is no zero. An output that is NaN at the end may have got it from a
// cell in its tile that it does not read: it is summed up once more without T.
#pragma once
#include "launch.cuh"
#include "mma.cuh"

namespace voxconv {
namespace device {

struct ToeplitzShape {
  int64_t targets;           // batch * channels of the target
  int channels, multiplier;  // of the target, targets that share a source
  int source[3], target[3];  // sizes
  int kernel[3], before[3];  // destination o reads from source cell o - before on
  int wide, high, groups;    // a block's warps along w, halves along h, groups of planes
  int planes;                // of a group
  int blocks_d, blocks_h, blocks_w;
  bool turned;   // the kernel is turned round
  bool aligned;  // lines of the source begin at multiples of 16 bytes
  int activation;

  VOXCONV_HD int64_t lines() const { return high * 8 + kernel[1] - 1; }
};

constexpr int kToeplitzThreads = 256;  // of a block, at most

// A warp's tiles along w, and planes; with these, sums, cells and taps fit 128 registers.
template <int J>
constexpr int kPlanesOf = J == 2   ? 8
                          : J == 3 ? 6
                                   : 4;

// Pairs of taps of a line, and pieces of 8 cells that a warp reads of one.
template <int S>
constexpr int kTapPairs = 16 * S + 6;
template <int S, int J>
constexpr int kPieces = J + 2 * S - 1;

// Cells from a line to the next in shared memory: an odd number of pieces, so that 8 lines of a
// piece lie in different banks.
template <int S, int J>
VOXCONV_HD int toeplitz_pitch(int wide) {
  return 8 * ((wide * J + 2 * S - 1) | 1);
}
// Pairs of taps, with a line of zeros before them, in whole 16 bytes.
template <int S, int J>
VOXCONV_HD int toeplitz_taps(int kh) {
  return (4 * kPieces<S, J> + (kPlanesOf<J> + 1) * kh * kTapPairs<S> + 3) / 4 * 4;
}

// Stores two neighbours, of which the first `count` exist.
template <class T>
__device__ inline void store_two(T* to, float first, float second, int count, bool aligned) {
  struct alignas(4) Two {
    T of[2];
  } two;
  narrow(two.of[0], first);
  narrow(two.of[1], second);
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
template <class T, int S, int J>
__global__ void __launch_bounds__(kToeplitzThreads, 2)
    depthwise_toeplitz(ToeplitzShape a, const T* source, const T* weight, const T* bias,
                       T* target) {
  constexpr int G = kPlanesOf<J>, kSlots = G + 1;
  int64_t rest = blockIdx.x;
  const int w = static_cast<int>(rest % a.blocks_w) * a.wide * 8 * J;
  rest /= a.blocks_w;
  const int h = static_cast<int>(rest % a.blocks_h) * a.high * 8;
  rest /= a.blocks_h;
  const int d = static_cast<int>(rest % a.blocks_d) * a.groups * a.planes;
  rest /= a.blocks_d;
  const int channel = static_cast<int>(rest % a.channels);
  const int KD = a.kernel[0], KH = a.kernel[1], KW = a.kernel[2];
  const int64_t source_plane = int64_t(a.source[1]) * a.source[2];
  const T* from = source + rest / a.multiplier * (a.source[0] * source_plane);
  T* to = target + rest * (a.target[0] * (int64_t(a.target[1]) * a.target[2]));
  const T* own_taps = weight + channel * (int64_t(KD) * KH * KW);
  const float start = bias ? widen(bias[channel]) : 0.0f;

  const int pitch = toeplitz_pitch<S, J>(a.wide), lines = static_cast<int>(a.lines());
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int tap_slot = KH * kTapPairs<S>, all_taps = toeplitz_taps<S, J>(KH);
  uint32_t* zeros = shared_memory<uint32_t>();
  uint32_t* taps = zeros + 4 * kPieces<S, J>;
  uint16_t* planes = reinterpret_cast<uint16_t*>(zeros + all_taps);
  for (int i = thread; i < 4 * kPieces<S, J>; i += threads) zeros[i] = 0;
  // What of a plane lies outside of the source stays zero.
  for (int i = thread; i < a.groups * lines * pitch; i += threads)
    reinterpret_cast<uint32_t*>(planes)[i] = 0;

  // The pairs of the taps of one kd.
  const auto copy_taps = [&](int kd) {
    uint32_t* slot = taps + kd % kSlots * tap_slot;
    for (int i = thread; i < tap_slot; i += threads) {
      const int kh = i / kTapPairs<S>, kw = i % kTapPairs<S> - 7;
      const auto bits = [&](int k) -> uint32_t {
        if (k < 0 || k >= KW) return 0;
        const int tap = (kd * KH + kh) * KW + k;
        return reinterpret_cast<const uint16_t*>(own_taps)[a.turned ? KD * KH * KW - 1 - tap : tap];
      };
      slot[i] = bits(kw) | bits(kw + 1) << 16;
    }
  };

  // Lines and pieces of a plane in shared memory that have cells of the source, and where they are.
  const int first_h = h - a.before[1], first_w = w - a.before[2];
  const int line_begin = first_h < 0 ? -first_h : 0;
  const int line_end = a.source[1] - first_h < lines ? a.source[1] - first_h : lines;
  const int piece_begin = first_w < 0 ? -first_w / 8 : 0;
  const int piece_limit = (a.source[2] - first_w + 7) / 8;
  const int piece_end = piece_limit < pitch / 8 ? piece_limit : pitch / 8;
  const int pieces = piece_end > piece_begin ? piece_end - piece_begin : 0;
  const auto copy_plane = [&](const T* plane, uint16_t* place) {
    for (int i = thread; i < (line_end - line_begin) * pieces; i += threads) {
      const int line = line_begin + i / pieces, piece = piece_begin + i % pieces;
      const T* cells = plane + (first_h + line) * int64_t(a.source[2]);
      *reinterpret_cast<Piece*>(place + line * pitch + 8 * piece) =
          load_cells<8>(cells, first_w + 8 * piece, a.source[2], a.aligned).whole();
    }
  };

  // Where the lane reads pieces, and what its sums are for: two halves of 8 lines.
  const int lane = thread % 32, warp = thread / 32;
  const int column = warp % a.wide * 8 * J, halves = 2 * (warp / a.wide);
  const int reads = halves + lane / 8 % 2, group = reads / a.high;
  const int line = reads % a.high * 8 + lane % 8;
  const uint32_t* own = taps + 2 * (lane % 4) - lane / 4 + 7;

  float sum[G][J][4];
  VOXCONV_UNROLL
  for (int i = 0; i < G * J * 4; ++i) sum[i / 4 / J][i / 4 % J][i % 4] = start;

  // In step s, a group with destination planes p, p + 1, ... has plane p + s - before of the
  // source; the steps without any are left out.
  const int now = d + a.planes <= a.target[0] ? a.planes : a.target[0] - d;
  const int before = a.before[0] - d - (a.groups - 1) * a.planes;
  const int after = a.source[0] + a.before[0] - d;
  const int begin = before > 0 ? before : 0, most = now + KD - 1;
  const int end = after < most ? after : most;
  const auto source_of = [&](int step, int group) {
    const int plane = d + group * a.planes + step - a.before[0];
    return plane >= 0 && plane < a.source[0] ? plane : -1;
  };
  int next_kd = begin - G + 1 > 0 ? begin - G + 1 : 0;
  for (int step = begin - 1; step < end; ++step) {
    __syncthreads();  // this step's copies are there, and nobody reads those of the last one
    if (step + 1 < end) {
      for (; next_kd <= step + 1 && next_kd < KD; ++next_kd) copy_taps(next_kd);
      for (int i = 0; i < a.groups; ++i)
        if (const int plane = source_of(step + 1, i); plane >= 0)
          copy_plane(from + plane * source_plane,
                     planes + ((step + 1) % 2 * a.groups + i) * lines * pitch);
    }
    if (step < begin) continue;
    // A half whose group has no plane of the source reads zeros.
    const bool exists = group < a.groups && source_of(step, group) >= 0;
    const uint16_t* cells =
        exists ? planes + ((step % 2 * a.groups + group) * lines + line) * pitch + column
               : reinterpret_cast<const uint16_t*>(zeros);
    const int next_line = exists ? pitch : 0;
    const int slot = step % kSlots;
    // Bit g: the plane is read by plane g of the group; and where the taps for that are.
    const int oldest = step < KD ? 0 : step - KD + 1, newest = step < now ? step : now - 1;
    const uint32_t live = (2u << newest) - (1u << oldest);
    int places[G];
    VOXCONV_UNROLL
    for (int g = 0; g < G; ++g) places[g] = (slot < g ? slot - g + kSlots : slot - g) * tap_slot;
    const uint32_t* pairs = own;
    for (int kh = 0; kh < KH; ++kh, cells += next_line, pairs += kTapPairs<S>) {
      uint32_t x[kPieces<S, J>][2], tap[2][2 * S];
      const auto load_taps = [&](int g) {
        if (!(live >> g & 1)) return;
        VOXCONV_UNROLL
        for (int i = 0; i < 2 * S; ++i) tap[g % 2][i] = pairs[places[g] + 8 * i];
      };
      load_taps(0);
      VOXCONV_UNROLL
      for (int i = 0; i < kPieces<S, J>; ++i) load_pieces(cells + 8 * i, x[i]);
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
  }

  if (a.activation != kIdentity) {
    VOXCONV_UNROLL
    for (int i = 0; i < G * J * 4; ++i)
      sum[i / 4 / J][i / 4 % J][i % 4] = activate(sum[i / 4 / J][i / 4 % J][i % 4], a.activation);
  }
  const int o_w = w + column + 2 * (lane % 4);
  bool bad = false;
  VOXCONV_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int o_h = h + (halves + half) % a.high * 8 + lane / 4;
    const int first = d + (halves + half) / a.high * a.planes;
    if ((halves + half) / a.high >= a.groups || o_h >= a.target[1]) continue;
    VOXCONV_UNROLL
    for (int g = 0; g < G; ++g) {
      if (g >= a.planes || first + g >= a.target[0]) continue;
      T* row = to + (int64_t(first + g) * a.target[1] + o_h) * a.target[2];
      VOXCONV_UNROLL
      for (int j = 0; j < J; ++j) {
        const float (&own_sum)[4] = sum[g][j];
        bad = bad || own_sum[2 * half] != own_sum[2 * half] ||
              own_sum[2 * half + 1] != own_sum[2 * half + 1];
        store_two(row + o_w + 8 * j, own_sum[2 * half], own_sum[2 * half + 1],
                  a.target[2] - o_w - 8 * j, a.target[2] % 2 == 0);
      }
    }
  }
  if (!bad) return;
  for (int i = 0; i < 2 * a.planes * J * 2; ++i) {
    const int half = halves + i % 2, column = o_w + i / 4 % J * 8 + i / 2 % 2;
    const int o_d = d + half / a.high * a.planes + i / 4 / J;
    const int o_h = h + half % a.high * 8 + lane / 4;
    if (half / a.high >= a.groups || o_d >= a.target[0] || o_h >= a.target[1] ||
        column >= a.target[2])
      continue;
    T& output = to[(int64_t(o_d) * a.target[1] + o_h) * a.target[2] + column];
    if (const float value = widen(output); value != value)
      narrow(output,
             activate(exact_output(a, from, own_taps, start, o_d, o_h, column), a.activation));
  }
}

// Bytes of shared memory that a block may have on any GPU since sm_80, but for a kilobyte.
constexpr int kToeplitzShared = 98 << 10;
constexpr int kMultiprocessors = 132;  // of an H200

// The tiles along w of a warp: those that leave the fewest columns without an output; with 2, taps
// are loaded more often than products are made.
inline int toeplitz_tiles(int64_t width) {
  int best = 4;
  const auto cost = [&](int tiles) {
    return ceil_div(width, 8 * tiles) * 8 * tiles * (tiles == 2 ? 8 : 7);
  };
  for (const int tiles : {3, 2})
    if (cost(tiles) < cost(best)) best = tiles;
  return best;
}

template <int S, int J, class T, class Launch>
bool launch_toeplitz(const Launch& launch, ToeplitzShape a, const T* source, const T* weight,
                     const T* bias, T* target) {
  // Warps along w, then halves along h. Where these are odd in number, a warp's are in two groups
  // of planes if a block can have as many warps.
  const int64_t units = ceil_div(a.target[2], 8 * J), most_wide = 8 / J;
  a.blocks_w = static_cast<int>(ceil_div(units, most_wide));
  a.wide = static_cast<int>(ceil_div(units, a.blocks_w));
  const int64_t halves = ceil_div(a.target[1], 8), most_high = kToeplitzThreads / 32 / a.wide * 2;
  a.blocks_h = static_cast<int>(ceil_div(halves, most_high));
  a.high = static_cast<int>(ceil_div(halves, a.blocks_h));
  a.groups = a.high % 2 != 0 && a.target[0] > 1 && 2 * a.high <= most_high ? 2 : 1;
  if (a.groups == 1) a.high += a.high % 2;
  // Fewer planes in a group than it may have, where that shares out the work better.
  const int64_t columns = a.targets * a.blocks_h * a.blocks_w;
  int64_t least = INT64_MAX;
  for (int planes = kPlanesOf<J>; planes > 0; --planes) {
    const int64_t slabs = ceil_div(a.target[0], planes * a.groups);
    const int64_t work = planes * (a.kernel[0] + 1) + a.kernel[0] - 1;  // products, and copies
    const int64_t time = ceil_div(columns * slabs, kMultiprocessors) * work;
    if (time >= least) continue;
    least = time;
    a.planes = planes;
    a.blocks_d = static_cast<int>(slabs);
  }
  const int64_t shared = 4 * int64_t(toeplitz_taps<S, J>(a.kernel[1])) +
                         4 * a.groups * a.lines() * toeplitz_pitch<S, J>(a.wide);
  if (shared > kToeplitzShared) return false;
  launch(depthwise_toeplitz<T, S, J>, static_cast<unsigned>(columns * a.blocks_d),
         static_cast<unsigned>(16 * a.wide * a.high * a.groups), static_cast<size_t>(shared), a,
         source, weight, bias, target);
  return true;
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
    if (a.kernel[2] < 5 || a.kernel[2] > 41) return false;
    a.aligned = a.source[2] % 8 == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0;
    const int tiles = toeplitz_tiles(a.target[2]), steps = (a.kernel[2] + 22) / 16;
    const int64_t made =
        ceil_div(a.target[2], 8 * tiles) * 8 * tiles * ceil_div(a.target[1], 8) * 8;
    if (made * steps * 4 > int64_t(a.target[2]) * a.target[1] * a.kernel[2] * 3) return false;
    const auto run = [&](auto s, auto j) {
      return launch_toeplitz<decltype(s)::value, decltype(j)::value>(launch, a, source, weight,
                                                                     bias, target);
    };
    const auto with_tiles = [&](auto s) {
      switch (tiles) {
        case 2: return run(s, std::integral_constant<int, 2>{});
        case 3: return run(s, std::integral_constant<int, 3>{});
        default: return run(s, std::integral_constant<int, 4>{});
      }
    };
    switch (steps) {
      case 1: return with_tiles(std::integral_constant<int, 1>{});
      case 2: return with_tiles(std::integral_constant<int, 2>{});
      default: return with_tiles(std::integral_constant<int, 3>{});
    }
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
