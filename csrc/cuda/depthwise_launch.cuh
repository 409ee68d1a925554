// SPDX-License-Identifier: Apache-2.0
// The passes of the depthwise family: which kernel runs one. The first that can do it does, in the
// order given here.
#pragma once
#include "depthwise_any.cuh"
#include "depthwise_hankel.cuh"
#include "depthwise_planes.cuh"
#include "depthwise_toeplitz.cuh"

namespace voxconv {
namespace device {

template <class T, class Launch>
void launch_forward(const Launch& launch, const Conv3dShape& shape, bool channels_last, Way way,
                    const T* x, const T* weight, const T* bias, int activation, T* y) {
  const Axis* axis = shape.axis;
  const int64_t cells =
      shape.batch * shape.channels * shape.multiplier * axis[0].out * axis[1].out * axis[2].out;
  if (cells == 0) return;
  if (allows(way, Way::toeplitz) &&
      by_toeplitz(launch, shape, channels_last, false, x, weight, bias, activation, y))
    return;
  if (allows(way, Way::planes) &&
      by_planes(launch, shape, channels_last, false, x, weight, bias, activation, y))
    return;
  launch(depthwise_forward_any<T>, blocks_for(cells), kAnyThreads, 0, shape,
         input_of(shape, channels_last, x), weight, bias, activation,
         output_of(shape, channels_last, y), channels_last);
}

template <class T, class Launch>
void launch_grad_input(const Launch& launch, const Conv3dShape& shape, bool channels_last, Way way,
                       const T* grad, const T* weight, const T* bias, T* grad_x) {
  const Axis* axis = shape.axis;
  const int64_t cells = shape.batch * shape.channels * axis[0].in * axis[1].in * axis[2].in;
  if (cells == 0) return;
  if (allows(way, Way::toeplitz) &&
      by_toeplitz(launch, shape, channels_last, true, grad, weight, bias, kIdentity, grad_x))
    return;
  if (allows(way, Way::planes) &&
      by_planes(launch, shape, channels_last, true, grad, weight, bias, kIdentity, grad_x))
    return;
  launch(depthwise_grad_input_any<T>, blocks_for(cells), kAnyThreads, 0, shape,
         output_of(shape, channels_last, grad), weight, bias,
         input_of(shape, channels_last, grad_x), channels_last);
}

template <class T, class Launch>
void launch_grad_weight(const Launch& launch, const Conv3dShape& shape, bool channels_last, Way way,
                        const T* x, const T* grad, T* grad_weight) {
  if (allows(way, Way::hankel) && by_hankel(launch, shape, channels_last, x, grad, grad_weight))
    return;
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
