// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "depthwise_launch.cuh"
#include "depthwise_passes.h"

namespace voxconv {

template <class T>
void DepthwisePasses<T>::forward(const CudaLaunch& launch, const Conv3dShape& shape, CudaPlan plan,
                                 const void* x, const void* weight, const void* bias,
                                 int activation, void* y) {
  device::launch_forward(launch, shape, plan.channels_last, plan.way, static_cast<const T*>(x),
                         static_cast<const T*>(weight), static_cast<const T*>(bias), activation,
                         static_cast<T*>(y));
}

template <class T>
void DepthwisePasses<T>::grad_input(const CudaLaunch& launch, const Conv3dShape& shape,
                                    CudaPlan plan, const void* grad, const void* weight,
                                    const void* bias, void* grad_x) {
  device::launch_grad_input(launch, shape, plan.channels_last, plan.way,
                            static_cast<const T*>(grad), static_cast<const T*>(weight),
                            static_cast<const T*>(bias), static_cast<T*>(grad_x));
}

template <class T>
void DepthwisePasses<T>::grad_weight(const CudaLaunch& launch, const Conv3dShape& shape,
                                     CudaPlan plan, const void* x, const void* grad,
                                     void* grad_weight) {
  device::launch_grad_weight(launch, shape, plan.channels_last, plan.way, static_cast<const T*>(x),
                             static_cast<const T*>(grad), static_cast<T*>(grad_weight));
}

template <class T>
void DepthwisePasses<T>::channel_sum(const CudaLaunch& launch, const Conv3dShape& shape,
                                     CudaPlan plan, const void* grad, void* sums) {
  const Axis* axis = shape.axis;
  device::launch_channel_sum(launch, plan.channels_last, static_cast<const T*>(grad), shape.batch,
                             shape.channels, axis[0].in, axis[1].in, axis[2].in,
                             static_cast<T*>(sums));
}

}  // namespace voxconv
