// SPDX-License-Identifier: Apache-2.0
// The passes for any geometry, layout and dtype: a thread sums up one cell of the result where it
// finds its taps, line by line, so that rounding does not add up over all taps. Each cell of the
// source is read from the first cache once for every tap that reads it, and index arithmetic takes
// longer than the sums: the other kernels are for speed.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

// Threads of a block. Three blocks are to fit on a multiprocessor: asked for nothing, the compiler
// would leave fewer registers to a thread than it needs.
constexpr int kAnyThreads = 256, kAnyResident = 3;

// Blocks of a grid whose threads take their cells in turn; enough to fill any GPU several times.
constexpr int64_t kMostBlocks = 1 << 16;

inline unsigned blocks_for(int64_t cells) {
  const int64_t blocks = ceil_div(cells, kAnyThreads);
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

struct Place {
  int64_t n, c, d, h, w;
};

// Place i of a tensor with these channels and sizes, in the order of its memory.
__device__ inline Place place_of(int64_t i, bool channels_last, int64_t channels, int64_t d,
                                 int64_t h, int64_t w) {
  Place at;
  if (channels_last) at.c = i % channels, i /= channels;
  at.w = i % w, i /= w;
  at.h = i % h, i /= h;
  at.d = i % d, i /= d;
  if (!channels_last) at.c = i % channels, i /= channels;
  at.n = i;
  return at;
}

// The cell of the source that tap k of destination o reads, or -1.
__device__ inline int64_t cell_read(const Axis& axis, int mode, int64_t o, int64_t k) {
  return source_index(o * axis.stride + k * axis.dilation - axis.before, axis.in, mode);
}

// Positions [begin, end) of the padded axis.
struct Positions {
  int64_t begin, end;
};

// Those that read cell i: its own (part 0), and what reads it instead of a cell of the padding
// before (1) and behind (2).
__device__ inline Positions reading(const Axis& axis, int mode, int64_t i, int part) {
  const int64_t n = axis.in, end = n + axis.after;
  if (part == 0) return {i, i + 1};
  if (mode == kZeros) return {0, 0};
  if (mode == kReplicate) {  // an end cell stands for all of its side
    if (part == 1) return {-axis.before, i == 0 ? 0 : -axis.before};
    return {n, i == n - 1 ? end : n};
  }
  const int64_t low = mode == kReflect ? -i : i - n;
  const int64_t high = mode == kReflect ? 2 * (n - 1) - i : i + n;
  if (part == 1) return {low, low < 0 && low >= -axis.before ? low + 1 : low};
  return {high, high >= n && high < end ? high + 1 : high};
}

// f(o, k) for every destination o that reads cell i with tap k, in a fixed order.
template <class F>
__device__ void for_each_reader(const Axis& axis, int mode, int64_t i, const F& f) {
  for (int part = 0; part < 3; ++part) {
    const Positions positions = reading(axis, mode, i, part);
    for (int64_t p = positions.begin; p < positions.end; ++p)
      for (int64_t k = 0; k < axis.kernel; ++k) {
        const int64_t from = p + axis.before - k * axis.dilation;
        if (from >= 0 && from % axis.stride == 0 && from / axis.stride < axis.out)
          f(from / axis.stride, k);
      }
  }
}

// y [n, C*m, o...] = activation(x [n, C, i...] * weight [C*m, 1, k...] + bias [C*m] or null). A
// thread owns every all_threads()-th cell of y.
template <class T>
__global__ void __launch_bounds__(kAnyThreads, kAnyResident)
    depthwise_forward_any(Conv3dShape shape, View<const T> x, const T* weight, const T* bias,
                          int activation, View<T> y, bool channels_last) {
  const Axis &d = shape.axis[0], &h = shape.axis[1], &w = shape.axis[2];
  const int64_t filters = shape.channels * shape.multiplier;
  const int64_t cells = shape.batch * filters * d.out * h.out * w.out;
  for (int64_t i = first_of_thread(); i < cells; i += all_threads()) {
    const Place o = place_of(i, channels_last, filters, d.out, h.out, w.out);
    const T* taps = weight + o.c * shape.taps();
    const T* source = x.at(o.n, o.c / shape.multiplier);
    Sum<T> sum = bias ? widen(bias[o.c]) : Sum<T>(0);
    for (int64_t kd = 0; kd < d.kernel; ++kd) {
      const int64_t i_d = cell_read(d, shape.mode, o.d, kd);
      if (i_d < 0) continue;
      for (int64_t kh = 0; kh < h.kernel; ++kh) {
        const int64_t i_h = cell_read(h, shape.mode, o.h, kh);
        if (i_h < 0) continue;
        const T* row = source + i_d * x.d + i_h * x.h;
        const T* tap = taps + (kd * h.kernel + kh) * w.kernel;
        Sum<T> line = 0;
        for (int64_t kw = 0; kw < w.kernel; ++kw)
          if (const int64_t i_w = cell_read(w, shape.mode, o.w, kw); i_w >= 0)
            line += widen(tap[kw]) * widen(row[i_w * x.w]);
        sum += line;
      }
    }
    narrow(*y.at(o.n, o.c, o.d, o.h, o.w), activate(sum, activation));
  }
}

// grad_x [n, C, i...] from grad [n, C*m, o...], weight [C, m, k...] and bias [C] or null. A thread
// owns every all_threads()-th cell of grad_x.
template <class T>
__global__ void __launch_bounds__(kAnyThreads, kAnyResident)
    depthwise_grad_input_any(Conv3dShape shape, View<const T> grad, const T* weight, const T* bias,
                             View<T> grad_x, bool channels_last) {
  const Axis &d = shape.axis[0], &h = shape.axis[1], &w = shape.axis[2];
  const int64_t cells = shape.batch * shape.channels * d.in * h.in * w.in;
  for (int64_t i = first_of_thread(); i < cells; i += all_threads()) {
    const Place at = place_of(i, channels_last, shape.channels, d.in, h.in, w.in);
    Sum<T> sum = bias ? widen(bias[at.c]) : Sum<T>(0);
    for (int64_t m = 0; m < shape.multiplier; ++m) {
      const int64_t filter = at.c * shape.multiplier + m;
      const T *taps = weight + filter * shape.taps(), *source = grad.at(at.n, filter);
      for_each_reader(d, shape.mode, at.d, [&](int64_t o_d, int64_t kd) {
        for_each_reader(h, shape.mode, at.h, [&](int64_t o_h, int64_t kh) {
          const T* row = source + o_d * grad.d + o_h * grad.h;
          const T* tap = taps + (kd * h.kernel + kh) * w.kernel;
          Sum<T> line = 0;
          for_each_reader(w, shape.mode, at.w, [&](int64_t o_w, int64_t kw) {
            line += widen(tap[kw]) * widen(row[o_w * grad.w]);
          });
          sum += line;
        });
      });
    }
    narrow(*grad_x.at(at.n, at.c, at.d, at.h, at.w), sum);
  }
}

// grad_weight [C*m, 1, k...] from grad [n, C*m, o...] and x [n, C, i...]. A block owns one tap of
// one filter; its threads share out the cells of grad, and their sums are added up in a tree.
template <class T>
__global__ void __launch_bounds__(kAnyThreads, kAnyResident)
    depthwise_grad_weight_any(Conv3dShape shape, View<const T> x, View<const T> grad,
                              T* grad_weight) {
  const Axis &d = shape.axis[0], &h = shape.axis[1], &w = shape.axis[2];
  const int64_t taps = shape.taps(), filter = blockIdx.x / taps, tap = blockIdx.x % taps;
  const int64_t kd = tap / (h.kernel * w.kernel), kh = tap / w.kernel % h.kernel;
  const int64_t kw = tap % w.kernel, cells = shape.batch * d.out * h.out * w.out;
  Sum<T> sum = 0;
  for (int64_t i = threadIdx.x; i < cells; i += blockDim.x) {
    const Place o = place_of(i, false, 1, d.out, h.out, w.out);
    const int64_t i_d = cell_read(d, shape.mode, o.d, kd);
    const int64_t i_h = cell_read(h, shape.mode, o.h, kh);
    const int64_t i_w = cell_read(w, shape.mode, o.w, kw);
    if (i_d < 0 || i_h < 0 || i_w < 0) continue;
    sum += widen(*grad.at(o.n, filter, o.d, o.h, o.w)) *
           widen(*x.at(o.n, filter / shape.multiplier, i_d, i_h, i_w));
  }
  sum = block_sum(sum, shared_memory<Sum<T>>());
  if (threadIdx.x == 0) narrow(grad_weight[blockIdx.x], sum);
}

}  // namespace device
}  // namespace voxconv
