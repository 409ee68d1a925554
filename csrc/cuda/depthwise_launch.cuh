// SPDX-License-Identifier: Apache-2.0
// The passes of the depthwise family: which kernel runs one. The first that can do it does, in the
// order given here.
#pragma once
#include "channel_sum.cuh"
#include "depthwise_any.cuh"
#include "depthwise_channels_last.cuh"
#include "depthwise_channels_last_weight.cuh"
#include "depthwise_hankel.cuh"
#include "depthwise_lines.cuh"
#include "depthwise_planes.cuh"
#include "depthwise_planes_up.cuh"
#include "depthwise_toeplitz.cuh"
#include "depthwise_weight.cuh"
#include "depthwise_weight_lines.cuh"

namespace voxconv {
namespace device {

// By one of the fast kernels for both directions, if any can: `target` = activation(source * weight
// + bias), where `source` is x, or backwards the gradient.
template <class T, class Launch>
bool by_correlation(const Launch& launch, const Conv3dShape& shape, bool channels_last, Way way,
                    bool backwards, const T* source, const T* weight, const T* bias, int activation,
                    T* target) {
  const auto with = [&](Way own, auto by) {
    return allows(way, own) &&
           by(launch, shape, channels_last, backwards, source, weight, bias, activation, target);
  };
  return with(Way::toeplitz, by_toeplitz<T, Launch>) || with(Way::planes, by_planes<T, Launch>) ||
         with(Way::planes, by_planes_up<T, Launch>) ||
         with(Way::channels, by_channels<T, Launch>) || with(Way::lines, by_lines<T, Launch>);
}

template <class T, class Launch>
void launch_forward(const Launch& launch, const Conv3dShape& shape, bool channels_last, Way way,
                    const T* x, const T* weight, const T* bias, int activation, T* y) {
  const Axis* axis = shape.axis;
  const int64_t cells =
      shape.batch * shape.channels * shape.multiplier * axis[0].out * axis[1].out * axis[2].out;
  if (cells == 0 ||
      by_correlation(launch, shape, channels_last, way, false, x, weight, bias, activation, y))
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
  if (cells == 0 || by_correlation(launch, shape, channels_last, way, true, grad, weight, bias,
                                   kIdentity, grad_x))
    return;
  launch(depthwise_grad_input_any<T>, blocks_for(cells), kAnyThreads, 0, shape,
         output_of(shape, channels_last, grad), weight, bias,
         input_of(shape, channels_last, grad_x), channels_last);
}

template <class T, class Launch>
void launch_grad_weight(const Launch& launch, const Conv3dShape& shape, bool channels_last, Way way,
                        const T* x, const T* grad, T* grad_weight) {
  const auto with = [&](Way own, auto by) {
    return allows(way, own) && by(launch, shape, channels_last, x, grad, grad_weight);
  };
  if (with(Way::hankel, by_hankel<T, Launch>) || with(Way::slabs, by_slabs<T, Launch>) ||
      with(Way::channels, by_channels_weight<T, Launch>) ||
      with(Way::weight_lines, by_weight_lines<T, Launch>))
    return;
  const int64_t blocks = shape.channels * shape.multiplier * shape.taps();
  launch(depthwise_grad_weight_any<T>, grid_of(blocks), kAnyThreads, kAnyThreads * sizeof(Sum<T>),
         shape, input_of(shape, channels_last, x), output_of(shape, channels_last, grad),
         grad_weight);
}

}  // namespace device
}  // namespace voxconv
