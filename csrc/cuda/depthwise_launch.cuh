// SPDX-License-Identifier: Apache-2.0
// Which kernel runs a pass of the depthwise family, and on which grid. Kernels are started through
// `launch(kernel, grid, block, bytes of shared memory, arguments...)`: on a stream of CUDA's
// (depthwise.cu) or on the CPU (tests/cuda_on_cpu).
#pragma once
#include "depthwise_any.cuh"
#include "depthwise_planes.cuh"

namespace voxconv {
namespace device {

// Blocks of a grid whose threads take their cells in turn; enough to fill any GPU several times.
constexpr int64_t kMostBlocks = 1 << 16;

inline unsigned blocks_for(int64_t cells) {
  const int64_t blocks = (cells + kAnyThreads - 1) / kAnyThreads;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// A tensor without gaps, NCDHW or channels_last_3d.
template <class T>
View<T> dense(T* data, bool channels_last, int64_t channels, int64_t d, int64_t h, int64_t w) {
  const int64_t cells = d * h * w, step = channels_last ? channels : 1;
  return {data, channels * cells, channels_last ? 1 : cells, h * w * step, w * step, step};
}

// x or the output, and their gradients.
template <class T>
View<T> input_of(const Conv3dShape& shape, bool channels_last, T* data) {
  const Axis* axis = shape.axis;
  return dense(data, channels_last, shape.channels, axis[0].in, axis[1].in, axis[2].in);
}
template <class T>
View<T> output_of(const Conv3dShape& shape, bool channels_last, T* data) {
  const Axis* axis = shape.axis;
  return dense(data, channels_last, shape.channels * shape.multiplier, axis[0].out, axis[1].out,
               axis[2].out);
}

// Blocks of depthwise_planes have columns of so many threads at most, and as much shared memory as
// a block may have without asking for more. Slabs are cut until there are so many blocks, two waves
// of an H200's.
constexpr int kPlanesColumn = 16, kPlanesShared = 48 << 10;
constexpr int kPlanesBlocks = 2 * 132 * 4;
// Slabs are never shorter than that many times the kernel.
constexpr int kLeastSlab = 4;

// Whether depthwise_planes can do a pass, if it has as many taps.
inline bool planes_suit(const Conv3dShape& shape, bool channels_last, bool backwards) {
  const Axis* axis = shape.axis;
  if (channels_last || shape.mode != kZeros) return false;
  if (backwards && shape.multiplier != 1) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].kernel != axis[0].kernel || axis[i].stride != 1 || axis[i].dilation != 1 ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  return true;
}

template <int K, class T, class Launch>
void launch_planes(const Launch& launch, const Conv3dShape& shape, bool backwards, const T* source,
                   const T* weight, const T* bias, T* target) {
  PlanesShape a;
  a.multiplier = static_cast<int>(backwards ? 1 : shape.multiplier);
  a.channels = static_cast<int>(shape.channels * shape.multiplier);
  a.targets = shape.batch * a.channels;
  a.turned = backwards;
  for (int i = 0; i < 3; ++i) {
    const Axis& axis = shape.axis[i];
    a.source[i] = static_cast<int>(backwards ? axis.out : axis.in);
    a.target[i] = static_cast<int>(backwards ? axis.in : axis.out);
    a.before[i] = static_cast<int>(backwards ? K - 1 - axis.before : axis.before);
  }
  const auto parts = [](int64_t cells, int64_t part) { return (cells + part - 1) / part; };
  // Threads along w, then h, then over channels, until a block has all it may have.
  const auto along = [&](int64_t cells, int64_t own, int64_t most) {
    const int64_t threads = parts(cells, own);
    return static_cast<int>(threads < most ? threads : most);
  };
  const int wide = along(a.target[2], kColumns, kPlanesColumn);
  const int free = kPlanesThreads / wide;
  const int high = along(a.target[1], kLines<K>, free < kPlanesColumn ? free : kPlanesColumn);
  a.tile_w = wide * kColumns;
  a.tile_h = high * kLines<K>;
  const int shared = planes_shared<K>(a.tile_h, a.tile_w) * static_cast<int>(sizeof(Sum<T>));
  const int by_threads = free / high, by_shared = kPlanesShared / shared;
  const int most = by_threads < by_shared ? by_threads : by_shared;
  const int deep = static_cast<int>(most < a.targets ? most : a.targets);
  a.tiles_w = static_cast<int>(parts(a.target[2], a.tile_w));
  const int64_t tiles = a.tiles_w * parts(a.target[1], a.tile_h);
  const int64_t rows = parts(a.targets, deep), wanted = parts(kPlanesBlocks, tiles * rows);
  const int64_t slab = parts(a.target[0], wanted);
  a.slab = static_cast<int>(slab > kLeastSlab * K ? slab : kLeastSlab * K);
  a.slabs = static_cast<int>(parts(a.target[0], a.slab));
  launch(depthwise_planes<T, K>, static_cast<unsigned>(tiles * a.slabs * rows),
         dim3(wide, high, deep), deep * shared, a, source, weight, bias, target);
}

// By depthwise_planes, if it can.
template <class T, class Launch>
bool by_planes(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
               const T* source, const T* weight, const T* bias, T* target) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!planes_suit(shape, channels_last, backwards)) return false;
    const auto run = [&](auto k) {
      launch_planes<decltype(k)::value>(launch, shape, backwards, source, weight, bias, target);
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

template <class T, class Launch>
void launch_forward(const Launch& launch, const Conv3dShape& shape, bool channels_last, const T* x,
                    const T* weight, const T* bias, T* y) {
  const Axis* axis = shape.axis;
  const int64_t cells =
      shape.batch * shape.channels * shape.multiplier * axis[0].out * axis[1].out * axis[2].out;
  if (cells == 0 || by_planes(launch, shape, channels_last, false, x, weight, bias, y)) return;
  launch(depthwise_forward_any<T>, blocks_for(cells), kAnyThreads, 0, shape,
         input_of(shape, channels_last, x), weight, bias, output_of(shape, channels_last, y),
         channels_last);
}

template <class T, class Launch>
void launch_grad_input(const Launch& launch, const Conv3dShape& shape, bool channels_last,
                       const T* grad, const T* weight, const T* bias, T* grad_x) {
  const Axis* axis = shape.axis;
  const int64_t cells = shape.batch * shape.channels * axis[0].in * axis[1].in * axis[2].in;
  if (cells == 0 || by_planes(launch, shape, channels_last, true, grad, weight, bias, grad_x))
    return;
  launch(depthwise_grad_input_any<T>, blocks_for(cells), kAnyThreads, 0, shape,
         output_of(shape, channels_last, grad), weight, bias,
         input_of(shape, channels_last, grad_x), channels_last);
}

template <class T, class Launch>
void launch_grad_weight(const Launch& launch, const Conv3dShape& shape, bool channels_last,
                        const T* x, const T* grad, T* grad_weight) {
  const int64_t blocks = shape.channels * shape.multiplier * shape.taps();
  launch(depthwise_grad_weight_any<T>, static_cast<unsigned>(blocks), kAnyThreads,
         kAnyThreads * sizeof(Sum<T>), shape, input_of(shape, channels_last, x),
         output_of(shape, channels_last, grad), grad_weight);
}

template <class T, class Launch>
void launch_channel_sum(const Launch& launch, bool channels_last, const T* grad, int64_t batch,
                        int64_t channels, int64_t d, int64_t h, int64_t w, T* sums) {
  if (channels == 0) return;
  launch(channel_sum_any<T>, static_cast<unsigned>(channels), kAnyThreads,
         kAnyThreads * sizeof(Sum<T>), dense(grad, channels_last, channels, d, h, w), batch, d, h,
         w, sums);
}

}  // namespace device
}  // namespace voxconv
