// SPDX-License-Identifier: Apache-2.0
// The CUDA ops of the depthwise family: tensors checked, brought into one of two layouts, results
// allocated, and the pass for their dtype called.
#include <cstdlib>
#include <cstring>

#include "../common/depthwise_checks.h"
#include "depthwise_passes.h"

namespace voxconv {
namespace {

template <class T>
struct OnDevice {
  using type = T;
};
template <>
struct OnDevice<BFloat16> {
  using type = device::Bf16;
};
template <>
struct OnDevice<Half> {
  using type = device::F16;
};

// f(DepthwisePasses<T>{}) for the dtype of a tensor.
template <class F>
void with_passes(const Tensor& tensor, const char* op, const F& f) {
  dispatch_floating(tensor.scalar_type(), op, [&](auto type) {
    f(DepthwisePasses<typename OnDevice<typename decltype(type)::type>::type>{});
  });
}

device::Way asked_way() {
  static const device::Way asked = [] {
    const char* name = std::getenv("VOXCONV_CUDA_WAY");
    for (int i = 0; name && i < device::kWays; ++i)
      if (std::strcmp(name, device::kWayNames[i]) == 0) return static_cast<device::Way>(i);
    return device::Way::choose;
  }();
  return asked;
}

// The tensor without gaps.
Tensor dense(const Tensor& tensor, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return contiguous(tensor,
                    channels_last ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

Tensor depthwise_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Ints& stride, const Ints& padding, const Ints& dilation,
                         int64_t mode, int64_t activation) {
  const Conv3dShape shape = forward_shape(x, weight, stride, padding, dilation, mode);
  const Axis* axis = shape.axis;
  const int64_t filters = weight.size(0);
  const CudaPlan plan{is_channels_last_3d(x), asked_way()};
  const CudaLaunch launch(x);
  const Tensor from = dense(x, plan.channels_last), taps = contiguous(weight);
  const std::optional<Tensor> start = checked_bias(bias, x, filters);
  Tensor y = empty_5d(x, {shape.batch, filters, axis[0].out, axis[1].out, axis[2].out},
                      plan.channels_last);
  with_passes(x, "depthwise_forward", [&](auto passes) {
    passes.forward(launch, shape, plan, from.data_ptr(), taps.data_ptr(), data_of(start),
                   static_cast<int>(checked_activation(activation)), y.mutable_data_ptr());
  });
  return y;
}

Tensor depthwise_grad_input(const Tensor& grad, const Tensor& weight, const Ints& size,
                            const Ints& stride, const Ints& padding, const Ints& dilation,
                            int64_t mode, const std::optional<Tensor>& bias) {
  const Conv3dShape shape = grad_input_shape(grad, weight, size, stride, padding, dilation, mode);
  const CudaPlan plan{is_channels_last_3d(grad), asked_way()};
  const CudaLaunch launch(grad);
  const Tensor from = dense(grad, plan.channels_last), taps = contiguous(weight);
  const std::optional<Tensor> start = checked_bias(bias, grad, shape.channels);
  Tensor x =
      empty_5d(grad, {shape.batch, shape.channels, size[0], size[1], size[2]}, plan.channels_last);
  with_passes(grad, "depthwise_grad_input", [&](auto passes) {
    passes.grad_input(launch, shape, plan, from.data_ptr(), taps.data_ptr(), data_of(start),
                      x.mutable_data_ptr());
  });
  return x;
}

Tensor depthwise_grad_weight(const Tensor& grad, const Tensor& x, const Ints& kernel,
                             const Ints& stride, const Ints& padding, const Ints& dilation,
                             int64_t mode) {
  const Conv3dShape shape = grad_weight_shape(grad, x, kernel, stride, padding, dilation, mode);
  const CudaPlan plan{is_channels_last_3d(grad), asked_way()};
  const CudaLaunch launch(grad);
  const Tensor left = dense(grad, plan.channels_last), right = dense(x, plan.channels_last);
  Tensor weight = empty_5d(grad, {grad.size(1), 1, kernel[0], kernel[1], kernel[2]}, false);
  with_passes(grad, "depthwise_grad_weight", [&](auto passes) {
    passes.grad_weight(launch, shape, plan, right.data_ptr(), left.data_ptr(),
                       weight.mutable_data_ptr());
  });
  return weight;
}

Tensor channel_sum(const Tensor& grad) {
  VOXCONV_CHECK(grad.dim() == 5, "channel_sum takes a 5-D tensor, got ", grad.dim(), " axes");
  const CudaPlan plan{is_channels_last_3d(grad), asked_way()};
  const CudaLaunch launch(grad);
  const Tensor from = dense(grad, plan.channels_last);
  Conv3dShape shape{grad.size(0), grad.size(1), 1, {}, kZeros};
  for (int i = 0; i < 3; ++i) shape.axis[i].in = grad.size(2 + i);
  Tensor sums = torch::stable::new_empty(grad, {shape.channels});
  with_passes(grad, "channel_sum", [&](auto passes) {
    passes.channel_sum(launch, shape, plan, from.data_ptr(), sums.mutable_data_ptr());
  });
  return sums;
}

}  // namespace
}  // namespace voxconv

STABLE_TORCH_LIBRARY_IMPL(voxconv, CUDA, m) {
  m.impl("depthwise_forward", TORCH_BOX(&voxconv::depthwise_forward));
  m.impl("depthwise_grad_input", TORCH_BOX(&voxconv::depthwise_grad_input));
  m.impl("depthwise_grad_weight", TORCH_BOX(&voxconv::depthwise_grad_weight));
  m.impl("channel_sum", TORCH_BOX(&voxconv::channel_sum));
}
