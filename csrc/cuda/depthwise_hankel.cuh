// SPDX-License-Identifier: Apache-2.0
// grad_weight of bfloat16 and float16 by the tensor cores: stride 1, dilation 1, zeros, NCDHW,
// lines of 5 to 32 taps.
//
// Along W, what a line of the gradient and a line of x add to 8 neighbouring taps is a product of
// the first with the (Hankel) matrix of the second moved on by 0 to 7 cells, H[i, k] = x[i + k].
// Its terms are 16 columns. The rows of a product are two neighbouring lines of 8 planes of the
// gradient: a line of x in plane p meets them with 8 kd and, of the second, one kh less.
//
// A warp walks along the lines of 16 columns of a tile, two lines at a time, and multiplies them
// with up to 8 lines of x that meet them with kh of its group, of which 6 are in registers already;
// so 8 QW products need 2 (QW + 1) + 4 wavefronts of shared memory. QW is the number of 8 taps of a
// line. A block has a warp for each group of kh and each part of a tile, and walks along D through
// a slab of planes of x, with those of the gradient that meet it with 8 kd in shared memory. Both
// are copied once, but for halos, while the planes before are worked on; x as the pairs that a lane
// needs, (x[i], x[i + 1]) for each i.
//
// The sums of a warp go to memory, and a second kernel adds them up. For 7 taps, 8 products serve
// 32 cells of a plane: with 1.6 clocks each on an H200 that is 0.4 clocks per cell, where 343 FMAs
// take 2.7. For 21 it is 10.8, for 72.
//
// A zero of the padding times infinity is no zero. A sum that is NaN at the end may have got it so:
// it is taken once more over the cells that there are.
#pragma once
#include "launch.cuh"
#include "mma.cuh"

namespace voxconv {
namespace device {

struct HankelShape {
  int64_t batch;
  int filters, multiplier;                    // of the gradient, those that share a channel of x
  int x[3], grad[3];                          // sizes
  int kernel[3], before[3];                   // destination o reads from cell o - before of x on
  int wide, segments;                         // a block's parts of 16 columns, and of lines
  int lines;                                  // of the gradient in a part, an even number
  int taps_h, groups_h;                       // kh of a warp, warps that share them out
  int blocks_d, blocks_h, blocks_w, tiles_d;  // slabs, tiles, and parts of the kernel of 8 kd
  int slab;                                   // planes of x of a block
  bool x_aligned, grad_aligned;               // lines begin at multiples of 16 bytes

  VOXCONV_HD int64_t taps() const { return int64_t(kernel[0]) * kernel[1] * kernel[2]; }
  // Warps that share out a sum.
  VOXCONV_HD int parts() const { return blocks_d * blocks_h * blocks_w * wide * segments; }
  // Planes of the gradient in shared memory, and their lines and cells; lines of x and pairs.
  VOXCONV_HD int planes() const { return (kernel[0] < 8 ? kernel[0] : 8) + 1; }
  VOXCONV_HD int grad_lines() const { return segments * lines; }
  VOXCONV_HD int grad_plane() const { return ((grad_lines() * wide * 2) | 1) * 8; }
  VOXCONV_HD int x_lines() const { return grad_lines() + (groups_h - 1) * taps_h + 6; }
  VOXCONV_HD int x_pitch(int tiles_w) const { return wide * 16 + tiles_w * 8; }
  VOXCONV_HD int64_t shared(int tiles_w) const {
    return 32 + 2 * int64_t(planes()) * grad_plane() + 8 * int64_t(x_lines()) * x_pitch(tiles_w);
  }
};

constexpr int kHankelLines = 8;  // of x, in registers
template <int QW>
constexpr int kHankelThreads = QW < 3 ? 384 : 256;

// What a thread of a block copies of lines of `pieces`: the same piece of every `step`th line.
struct Share {
  int piece, line, step;
};
__device__ inline Share share_of(int thread, int threads, int pieces) {
  const int step = threads / pieces;
  const bool idle = thread >= step * pieces;
  return {thread % pieces, idle ? INT32_MAX / 2 : thread / pieces, step};
}

// blockDim is 32 * warps; warps are counted by groups of kh, parts along w, parts along h; blocks
// by tiles along w, then h, then slabs, then by kd, then by filters. sums [filters, taps, parts].
template <class T, int QW>
__global__ void __launch_bounds__(kHankelThreads<QW>)
    depthwise_hankel(HankelShape a, const T* x, const T* grad, float* sums) {
  int64_t rest = blockIdx.x;
  const int block_w = static_cast<int>(rest % a.blocks_w);
  rest /= a.blocks_w;
  const int block_h = static_cast<int>(rest % a.blocks_h);
  rest /= a.blocks_h;
  const int block_d = static_cast<int>(rest % a.blocks_d);
  rest /= a.blocks_d;
  const int first_kd = static_cast<int>(rest % a.tiles_d) * 8;
  rest /= a.tiles_d;
  const int filter = static_cast<int>(rest % a.filters);
  const int64_t x_size = int64_t(a.x[1]) * a.x[2], grad_size = int64_t(a.grad[1]) * a.grad[2];
  const T* from_x = x + rest / a.multiplier * (a.x[0] * x_size);
  const T* from_grad = grad + rest * (a.grad[0] * grad_size);
  const int h = block_h * a.grad_lines(), w = block_w * a.wide * 16;
  const int first = block_d * a.slab;  // plane of x
  const int last = first + a.slab < a.x[0] ? first + a.slab : a.x[0];

  // Shared memory: 16 zeros, planes of the gradient, two of x.
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int pitch = a.wide * 16, plane_size = a.grad_plane();
  const int x_pitch = a.x_pitch(QW), x_lines = a.x_lines();
  uint16_t* zeros = shared_memory<uint16_t>();
  uint16_t* planes = zeros + 16;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(planes + a.planes() * plane_size);
  const int words = static_cast<int>(a.shared(QW) / 4);
  for (int i = thread; i < words; i += threads) reinterpret_cast<uint32_t*>(zeros)[i] = 0;

  // What of a plane lies outside of the tensor stays zero.
  const Share grad_share = share_of(thread, threads, a.wide * 2);
  const int lines = a.grad[1] - h < a.grad_lines() ? a.grad[1] - h : a.grad_lines();
  const auto copy_grad = [&](int plane) {
    const int piece = 8 * grad_share.piece;
    uint16_t* place = planes + plane % a.planes() * plane_size + piece;
    for (int i = grad_share.line; i < lines; i += grad_share.step) {
      const T* from = from_grad + plane * grad_size + (h + i) * int64_t(a.grad[2]);
      *reinterpret_cast<Piece*>(place + i * pitch) =
          load_cells<8>(from, w + piece, a.grad[2], a.grad_aligned).whole();
    }
  };
  const Share x_share = share_of(thread, threads, x_pitch / 8);
  const int first_h = h - a.before[1];
  const auto copy_x = [&](int plane) {
    const int piece = 8 * x_share.piece;
    uint32_t* place = pairs + plane % 2 * x_lines * x_pitch + piece;
    for (int i = x_share.line; i < x_lines; i += x_share.step) {
      if (first_h + i < 0 || first_h + i >= a.x[1]) continue;
      const T* from = from_x + plane * x_size + (first_h + i) * int64_t(a.x[2]);
      const Cells cells = load_cells<9>(from, w - a.before[2] + piece, a.x[2], a.x_aligned);
      Piece* to = reinterpret_cast<Piece*>(place + i * x_pitch);
      to[0] = {{cells.pair(0), cells.pair(1), cells.pair(2), cells.pair(3)}};
      to[1] = {{cells.pair(4), cells.pair(5), cells.pair(6), cells.pair(7)}};
    }
  };

  const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);  // known to be shared
  const int first_kh = warp % a.groups_h * a.taps_h, part = warp / a.groups_h;
  const int column = part % a.wide * 16, line = part / a.wide * a.lines;
  const int own_taps = a.kernel[1] - first_kh < a.taps_h ? a.kernel[1] - first_kh : a.taps_h;

  // sum[o]: of the first of two lines tap first_kh + o, of the second the one before.
  float sum[kHankelLines][QW][4] = {};
  const int newest = a.before[0] - first_kd;  // plane of the gradient, from that of x
  int next = first + newest - (a.planes() - 2);
  for (int plane = first - 1; plane < last; ++plane) {
    __syncthreads();  // this step's copies are there, and nobody reads those of the last one
    if (plane + 1 < last) {
      for (; next <= plane + 1 + newest; ++next)
        if (next >= 0 && next < a.grad[0]) copy_grad(next);
      copy_x(plane + 1);
    }
    if (plane < first) continue;
    // The lane's row of the gradient, and of x its first pair.
    const int row = lane % 8, from = plane + newest - row;
    const bool exists = from >= 0 && from < a.grad[0];
    const uint16_t* rows =
        exists ? planes + from % a.planes() * plane_size + (line + lane / 8 % 2) * pitch + column
               : zeros;
    const int next_rows = exists ? 2 * pitch : 0;
    const uint32_t* own = pairs + (plane % 2 * x_lines + line + first_kh) * x_pitch + column +
                          2 * (lane % 4) + lane / 4;
    uint32_t cells[kHankelLines][QW + 1];
    const auto load_line = [&](int i) {
      VOXCONV_UNROLL
      for (int q = 0; q <= QW; ++q) cells[i % kHankelLines][q] = own[8 * q];
      own += x_pitch;
    };
    VOXCONV_UNROLL
    for (int i = 0; i < kHankelLines - 2; ++i) load_line(i);
    for (int begin = 0; begin < a.lines; begin += kHankelLines) {
      VOXCONV_UNROLL
      for (int i = 0; i < kHankelLines; i += 2) {
        if (begin + i >= a.lines) continue;
        load_line(i + 6);
        load_line(i + 7);
        uint32_t left[2], right[2];
        load_pieces(rows, left);
        load_pieces(rows + 8, right);
        rows += next_rows;
        VOXCONV_UNROLL
        for (int o = 0; o < kHankelLines; ++o) {
          if (o > a.taps_h) continue;
          VOXCONV_UNROLL
          for (int q = 0; q < QW; ++q)
            multiply_add<T>(sum[o][q], left, right, &cells[(i + o) % kHankelLines][q]);
        }
      }
    }
  }

  const int64_t n = rest / a.filters;
  const int64_t own_part =
      ((n * a.blocks_d + block_d) * a.blocks_h + block_h) * a.blocks_w + block_w;
  const int64_t all = a.filters * a.taps();
  float* to = sums + (own_part * a.wide * a.segments + part) * all + filter * a.taps();
  const int kd = first_kd + lane / 4;
  if (kd >= a.kernel[0]) return;
  VOXCONV_UNROLL
  for (int o = 0; o + 1 < kHankelLines; ++o) {
    VOXCONV_UNROLL
    for (int i = 0; i < 2 * QW; ++i) {
      const int q = i / 2, kw = 8 * q + 2 * (lane % 4) + i % 2;
      if (o < own_taps && kw < a.kernel[2])
        to[(int64_t(kd) * a.kernel[1] + first_kh + o) * a.kernel[2] + kw] =
            sum[o][q][i % 2] + sum[o + 1][q][2 + i % 2];
    }
  }
}

// One weight's gradient, cell by cell, in every `step`th plane from `first` on.
template <class T>
__device__ float exact_weight(const HankelShape& a, const T* x, const T* grad, int filter,
                              const int (&tap)[3], int first, int step) {
  int begin[3], end[3];  // destinations that read a cell of x with the tap
  for (int i = 0; i < 3; ++i) {
    const int low = a.before[i] - tap[i], high = low + a.x[i];
    begin[i] = low > 0 ? low : 0;
    end[i] = high < a.grad[i] ? high : a.grad[i];
  }
  float sum = 0;
  for (int64_t n = 0; n < a.batch; ++n) {
    const int64_t number = n * a.filters + filter;
    for (int d = begin[0] + first; d < end[0]; d += step) {
      for (int h = begin[1]; h < end[1]; ++h) {
        const int x_d = d + tap[0] - a.before[0], x_h = h + tap[1] - a.before[1];
        const T* g = grad + ((number * a.grad[0] + d) * a.grad[1] + h) * a.grad[2];
        const T* cells = x + ((number / a.multiplier * a.x[0] + x_d) * a.x[1] + x_h) * a.x[2];
        float line = 0;
        for (int w = begin[2]; w < end[2]; ++w)
          line += widen(g[w]) * widen(cells[w + tap[2] - a.before[2]]);
        sum += line;
      }
    }
  }
  return sum;
}

// Threads of a block of sum_hankel, and how many share out the parts of a weight, at most.
constexpr int kHankelSums = 256, kHankelSharers = 8;

// grad_weight [filters, taps] from its parts [parts, filters, taps]. blockDim is [weights of a
// block, threads that share out the parts of each].
template <class T>
__global__ void __launch_bounds__(kHankelSums)
    sum_hankel(HankelShape a, const T* x, const T* grad, const float* sums, T* grad_weight) {
  const int64_t all = a.filters * a.taps(), parts = a.batch * a.parts();
  const int weights = static_cast<int>(blockDim.x), sharers = static_cast<int>(blockDim.y);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * weights + threadIdx.x;
  const int own = static_cast<int>(threadIdx.y);
  float* place = shared_memory<float>() + threadIdx.x;
  const auto shared_out = [&](float sum) {
    __syncthreads();
    place[own * weights] = sum;
    __syncthreads();
    float total = 0;
    for (int t = 0; t < sharers; ++t) total += place[t * weights];
    return total;
  };
  float sum = 0;
  if (i < all)
    for (int64_t part = own; part < parts; part += sharers) sum += sums[part * all + i];
  sum = shared_out(sum);
  if (sum != sum) {
    const int at = static_cast<int>(i % a.taps()), lines = at / a.kernel[2];
    const int tap[3] = {lines / a.kernel[1], lines % a.kernel[1], at % a.kernel[2]};
    const int filter = static_cast<int>(i / a.taps());
    sum = exact_weight(a, x, grad, filter, tap, own, sharers);
  } else if (own > 0) {
    sum = 0;
  }
  sum = shared_out(sum);
  if (i < all && own == 0) narrow(grad_weight[i], sum);
}

// Bytes of shared memory of a block: 3 of them have what a multiprocessor of an H200 has.
constexpr int kHankelShared = 74 << 10;

// Cuts the lines of the gradient for blocks of some warps, so that the fewest are worked on;
// whether that can be done.
template <int QW>
bool cut_lines(HankelShape& a) {
  const int units = kHankelThreads<QW> / 32 / a.groups_h;  // parts of a block, at most
  if (units == 0) return false;
  const int64_t columns = ceil_div(a.grad[2], 16), most_wide = units < 4 ? units : 4;
  a.blocks_w = static_cast<int>(ceil_div(columns, most_wide));
  a.wide = static_cast<int>(ceil_div(columns, a.blocks_w));
  // Warps that are wanted, of 8 lines or more; lines of work before the first of a part.
  constexpr int kWarps = 6, kAhead = 4;
  const int64_t enough = ceil_div(kWarps, a.wide * a.groups_h), full = ceil_div(a.grad[1], 8);
  const int64_t wanted = enough < full ? enough : full;
  int64_t least = INT64_MAX;
  HankelShape best = a;
  for (a.segments = units / a.wide; a.segments > 0; --a.segments) {
    if (least < INT64_MAX && a.segments < wanted) break;
    a.blocks_h = 0;
    do {
      ++a.blocks_h;
      a.lines = static_cast<int>(ceil_div(a.grad[1], 2 * a.blocks_h * a.segments)) * 2;
    } while (a.shared(QW) > kHankelShared && a.lines > 2);
    const int64_t work = int64_t(a.blocks_h) * a.segments * (a.lines + kAhead);
    if (a.shared(QW) > kHankelShared || work >= least) continue;
    least = work;
    best = a;
  }
  a = best;
  return least < INT64_MAX;
}

template <int QW, class T, class Launch>
bool launch_hankel(const Launch& launch, HankelShape a, const T* x, const T* grad, T* grad_weight) {
  if (!cut_lines<QW>(a)) return false;
  const int64_t columns = a.batch * a.filters * a.tiles_d * a.blocks_h * a.blocks_w;
  const int multiprocessors = launch.multiprocessors();
  int64_t least = INT64_MAX;
  for (int slabs = 1; slabs <= a.x[0]; ++slabs) {
    const int64_t slab = ceil_div(a.x[0], slabs), ahead = 2;  // planes of work before the first
    const int64_t time = ceil_div(columns * slabs, multiprocessors) * (slab + ahead);
    if (time >= least) continue;
    least = time;
    a.slab = static_cast<int>(slab);
    a.blocks_d = static_cast<int>(ceil_div(a.x[0], slab));
  }
  const int64_t all = a.filters * a.taps();
  float* sums =
      static_cast<float*>(launch.scratch(a.batch * a.parts() * all * int64_t(sizeof(float))));
  launch(depthwise_hankel<T, QW>, grid_of(columns * a.blocks_d),
         static_cast<unsigned>(32 * a.groups_h * a.wide * a.segments),
         static_cast<size_t>(a.shared(QW)), a, x, grad, sums);
  unsigned sharers = kHankelSharers;
  while (sharers > a.batch * a.parts()) sharers /= 2;
  const unsigned weights = kHankelSums / sharers;
  launch(sum_hankel<T>, grid_of(ceil_div(all, weights)), dim3(weights, sharers),
         kHankelSums * sizeof(float), a, x, grad, sums, grad_weight);
  return true;
}

// By depthwise_hankel, if it can and if it is quicker than FMAs, of which ten take as long as those
// of a product do, in vain or not, at what both reach of their peaks.
template <class T, class Launch>
bool by_hankel(const Launch& launch, const Conv3dShape& shape, bool channels_last, const T* x,
               const T* grad, T* grad_weight) {
  if constexpr (sizeof(T) == 2) {
    const Axis* axis = shape.axis;
    if (channels_last || shape.mode != kZeros || shape.batch == 0) return false;
    HankelShape a;
    a.batch = shape.batch;
    a.filters = static_cast<int>(shape.channels * shape.multiplier);
    a.multiplier = static_cast<int>(shape.multiplier);
    for (int i = 0; i < 3; ++i) {
      if (axis[i].stride != 1 || axis[i].dilation != 1 || axis[i].kernel > INT16_MAX ||
          axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
        return false;
      a.x[i] = static_cast<int>(axis[i].in);
      a.grad[i] = static_cast<int>(axis[i].out);
      a.kernel[i] = static_cast<int>(axis[i].kernel);
      a.before[i] = static_cast<int>(axis[i].before);
    }
    a.x_aligned = a.x[2] % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    a.grad_aligned = a.grad[2] % 8 == 0 && reinterpret_cast<uintptr_t>(grad) % 16 == 0;
    a.groups_h = static_cast<int>(ceil_div(a.kernel[1], kHankelLines - 1));
    a.taps_h = static_cast<int>(ceil_div(a.kernel[1], a.groups_h));
    a.tiles_d = static_cast<int>(ceil_div(a.kernel[0], 8));
    const int64_t tiles = ceil_div(a.kernel[2], 8);
    const int64_t made = ceil_div(a.grad[2], 16) * 16 * ceil_div(a.grad[1], 2) * 2 * tiles * 8 *
                         a.tiles_d * 8 * a.groups_h * (a.taps_h + 1);
    if (a.kernel[2] < 5 || made > 10 * a.taps() * a.grad[1] * a.grad[2]) return false;
    const auto run = [&](auto q) {
      return launch_hankel<decltype(q)::value>(launch, a, x, grad, grad_weight);
    };
    switch (tiles) {
      case 1: return run(std::integral_constant<int, 1>{});
      case 2: return run(std::integral_constant<int, 2>{});
      case 3: return run(std::integral_constant<int, 3>{});
      case 4: return run(std::integral_constant<int, 4>{});
      default: break;
    }
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
