// SPDX-License-Identifier: Apache-2.0
// The arguments of the depthwise ops, checked and put into shapes; on every device.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "conv3d.h"
#include "stable.h"

namespace voxconv {

using Ints = std::vector<int64_t>;

inline Conv3dShape make_shape(int64_t batch, int64_t channels, int64_t multiplier,
                              const int64_t* in, const int64_t* kernel, const Ints& stride,
                              const Ints& padding, const Ints& dilation, int64_t mode) {
  VOXCONV_CHECK(stride.size() == 3 && padding.size() == 6 && dilation.size() == 3,
                "voxconv: stride, padding and dilation take 3, 6 and 3 numbers");
  VOXCONV_CHECK(mode >= kZeros && mode <= kCircular, "voxconv: unknown padding mode ", mode);
  Conv3dShape shape{batch, channels, multiplier, {}, static_cast<int>(mode)};
  for (int i = 0; i < 3; ++i) {
    Axis& axis = shape.axis[i];
    axis = {in[i],
            0,
            kernel[i],
            stride[i],
            kernel[i] == 1 ? 1 : dilation[i],
            padding[2 * i],
            padding[2 * i + 1]};
    VOXCONV_CHECK(axis.in > 0 && axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 &&
                      axis.before >= 0 && axis.after >= 0,
                  "voxconv: size, kernel, stride and dilation must be positive");
    axis.out = axis.output_size();
    VOXCONV_CHECK(axis.out > 0, "voxconv: the output would be empty");
    const int64_t most = mode == kReflect ? axis.in - 1 : axis.in;
    VOXCONV_CHECK(
        mode == kZeros || mode == kReplicate || (axis.before <= most && axis.after <= most),
        "voxconv: padding is larger than the axis allows");
  }
  return shape;
}

inline void check_same(const Tensor& a, const Tensor& b) {
  VOXCONV_CHECK(a.scalar_type() == b.scalar_type(), "voxconv: mixed dtypes");
  VOXCONV_CHECK(a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index(),
                "voxconv: mixed devices");
}

inline void check_output(const Conv3dShape& shape, const Tensor& grad) {
  for (int i = 0; i < 3; ++i)
    VOXCONV_CHECK(grad.size(2 + i) == shape.axis[i].out,
                  "voxconv: grad does not have the size of the output");
}

// The shape of a pass, given what its op was called with.
inline Conv3dShape forward_shape(const Tensor& x, const Tensor& weight, const Ints& stride,
                                 const Ints& padding, const Ints& dilation, int64_t mode) {
  VOXCONV_CHECK(x.dim() == 5 && weight.dim() == 5, "voxconv: x and weight must be 5-D");
  const int64_t channels = x.size(1), filters = weight.size(0);
  VOXCONV_CHECK(weight.size(1) == 1 && channels > 0 && filters % channels == 0,
                "voxconv: weight must be [channels * multiplier, 1, kd, kh, kw]");
  check_same(x, weight);
  const int64_t in[] = {x.size(2), x.size(3), x.size(4)};
  const int64_t kernel[] = {weight.size(2), weight.size(3), weight.size(4)};
  return make_shape(x.size(0), channels, filters / channels, in, kernel, stride, padding, dilation,
                    mode);
}

inline Conv3dShape grad_input_shape(const Tensor& grad, const Tensor& weight, const Ints& size,
                                    const Ints& stride, const Ints& padding, const Ints& dilation,
                                    int64_t mode) {
  VOXCONV_CHECK(grad.dim() == 5 && weight.dim() == 5 && size.size() == 3,
                "voxconv: grad and weight must be 5-D and size take 3 numbers");
  const int64_t channels = weight.size(0), multiplier = weight.size(1);
  VOXCONV_CHECK(channels > 0 && multiplier > 0 && grad.size(1) == channels * multiplier,
                "voxconv: weight must be [channels, multiplier, kd, kh, kw]");
  check_same(grad, weight);
  const int64_t kernel[] = {weight.size(2), weight.size(3), weight.size(4)};
  const Conv3dShape shape = make_shape(grad.size(0), channels, multiplier, size.data(), kernel,
                                       stride, padding, dilation, mode);
  check_output(shape, grad);
  return shape;
}

inline Conv3dShape grad_weight_shape(const Tensor& grad, const Tensor& x, const Ints& kernel,
                                     const Ints& stride, const Ints& padding, const Ints& dilation,
                                     int64_t mode) {
  VOXCONV_CHECK(grad.dim() == 5 && x.dim() == 5 && kernel.size() == 3,
                "voxconv: grad and x must be 5-D and kernel take 3 numbers");
  const int64_t channels = x.size(1), filters = grad.size(1);
  VOXCONV_CHECK(channels > 0 && filters % channels == 0 && grad.size(0) == x.size(0),
                "voxconv: grad must be [batch, channels * multiplier, d, h, w]");
  check_same(grad, x);
  const int64_t in[] = {x.size(2), x.size(3), x.size(4)};
  const Conv3dShape shape = make_shape(x.size(0), channels, filters / channels, in, kernel.data(),
                                       stride, padding, dilation, mode);
  check_output(shape, grad);
  return shape;
}

inline std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, const Tensor& like,
                                          int64_t channels) {
  if (!bias) return bias;
  VOXCONV_CHECK(bias->dim() == 1 && bias->size(0) == channels, "voxconv: bias must be [", channels,
                "]");
  check_same(like, *bias);
  return contiguous(*bias);
}

inline Activation checked_activation(int64_t activation) {
  VOXCONV_CHECK(activation >= kIdentity && activation <= kSilu, "voxconv: unknown activation ",
                activation);
  return static_cast<Activation>(activation);
}

}  // namespace voxconv
