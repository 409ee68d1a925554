// SPDX-License-Identifier: Apache-2.0
// The CPU ops of convolutions whose outputs read many channels: forward, grad_input, grad_weight.
#include "dilated_plan.h"
#include "result_memory.h"
#include "scratch.h"

namespace voxconv {
namespace {

// Bytes of all partial sums of a weight gradient, at most, where one set is not as many.
constexpr int64_t kMostSums = 32 << 20;
constexpr int64_t kMostChunks = 16, kTasksWanted = 8;

DilatedShape checked_shape(const Tensor& x, int64_t in, int64_t filters, const int64_t* size,
                           const int64_t* kernel, const Ints& stride, const Ints& padding,
                           const Ints& dilation, int64_t mode, int64_t groups) {
  VOXCONV_CHECK(groups > 0 && in > 0 && filters > 0 && filters % groups == 0,
                "voxconv: channels and groups do not fit");
  return {make_shape(x.size(0), groups * in, 1, size, kernel, stride, padding, dilation, mode),
          groups, in, filters / groups};
}

// The bias in the type of the sums.
Memory widened(const std::optional<Tensor>& bias, const Tensor& like, int64_t channels) {
  const std::optional<Tensor> checked = checked_bias(bias, like, channels);
  if (!checked) return nullptr;
  Memory memory;
  dispatch_floating(checked->scalar_type(), "bias", [&](auto type) {
    using E = typename decltype(type)::type;
    memory = allocate(channels * sizeof(Accumulator<E>));
    const E* from = static_cast<const E*>(checked->data_ptr());
    std::copy(from, from + channels, static_cast<Accumulator<E>*>(memory.get()));
  });
  return memory;
}

void correlate(const DilatedShape& shape, Pass pass, const Tensor& source, const Tensor& weight,
               const std::optional<Tensor>& bias, Activation activation, const Tensor& target) {
  if (shape.conv.batch == 0) return;
  const DilatedKernels& kernels = dilated_kernels(element_of(source));
  DilatedArgs a;
  const DilatedPlan plan(shape, pass, kernels, a);
  const WinogradPlan winograd(shape, pass, kernels, a);
  const bool in_pairs = a.winograd.most_pairs > 0;
  const CorrelateKernels& run = in_pairs ? kernels.winograd : kernels.direct;
  a.source = strided(source);
  a.target = strided(target);
  a.activation = activation;
  const Memory wide_bias = widened(bias, source, a.groups * a.out);
  a.bias = wide_bias.get();
  const Tensor from = contiguous(weight);
  const int64_t taps = in_pairs ? 16 * a.kernel[2] : a.taps();
  const Memory packed = allocate(a.groups * a.out * a.in * taps * kernels.item_bytes);
  const int64_t blocks = block_count(a.out, kernels.most_out);
  parallel_for(
      a.groups * blocks, 1 + (1 << 14) / (a.in * a.taps()), [&](int64_t begin, int64_t end) {
        run.pack_weight(a, from.data_ptr(), pass == Pass::grad_input, begin, end, packed.get());
      });
  a.weight = packed.get();
  const size_t bytes = run.scratch(a);
  parallel_for(a.units(), 1,
               [&](int64_t begin, int64_t end) { run.run(a, begin, end, scratch(bytes)); });
}

Tensor dilated_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Ints& stride, const Ints& padding, const Ints& dilation, int64_t mode,
                       int64_t groups, int64_t activation) {
  const Activation then = checked_activation(activation);
  VOXCONV_CHECK(x.dim() == 5 && weight.dim() == 5 && x.size(1) == groups * weight.size(1),
                "voxconv: weight must be [filters, channels / groups, kd, kh, kw]");
  check_same(x, weight);
  const int64_t size[] = {x.size(2), x.size(3), x.size(4)};
  const int64_t kernel[] = {weight.size(2), weight.size(3), weight.size(4)};
  const DilatedShape shape = checked_shape(x, weight.size(1), weight.size(0), size, kernel, stride,
                                           padding, dilation, mode, groups);
  const Axis* axis = shape.conv.axis;
  Tensor y = empty_result(x, {x.size(0), weight.size(0), axis[0].out, axis[1].out, axis[2].out});
  correlate(shape, Pass::forward, x, weight, bias, then, y);
  return y;
}

Tensor dilated_grad_input(const Tensor& grad, const Tensor& weight, const Ints& size,
                          const Ints& stride, const Ints& padding, const Ints& dilation,
                          int64_t mode, int64_t groups, const std::optional<Tensor>& bias) {
  VOXCONV_CHECK(grad.dim() == 5 && weight.dim() == 5 && size.size() == 3 && mode == kZeros &&
                    grad.size(1) == weight.size(0),
                "voxconv: grad and weight must be 5-D, and padding zeros");
  check_same(grad, weight);
  const int64_t kernel[] = {weight.size(2), weight.size(3), weight.size(4)};
  const DilatedShape shape = checked_shape(grad, weight.size(1), weight.size(0), size.data(),
                                           kernel, stride, padding, dilation, mode, groups);
  check_output(shape.conv, grad);
  Tensor x = empty_result(grad, {grad.size(0), groups * weight.size(1), size[0], size[1], size[2]});
  correlate(shape, Pass::grad_input, grad, weight, bias, kIdentity, x);
  return x;
}

Tensor dilated_grad_weight(const Tensor& grad, const Tensor& x, const Ints& kernel,
                           const Ints& stride, const Ints& padding, const Ints& dilation,
                           int64_t mode, int64_t groups) {
  VOXCONV_CHECK(grad.dim() == 5 && x.dim() == 5 && kernel.size() == 3 && groups > 0 &&
                    x.size(1) % groups == 0 && grad.size(0) == x.size(0),
                "voxconv: grad and x must be 5-D, of one batch");
  check_same(grad, x);
  const int64_t size[] = {x.size(2), x.size(3), x.size(4)};
  const DilatedShape shape = checked_shape(x, x.size(1) / groups, grad.size(1), size, kernel.data(),
                                           stride, padding, dilation, mode, groups);
  check_output(shape.conv, grad);
  Tensor weight = empty_5d(x, {grad.size(1), shape.in, kernel[0], kernel[1], kernel[2]}, false);
  if (x.size(0) == 0) return torch::stable::zero_(weight);
  const DilatedKernels& kernels = dilated_kernels(element_of(x));
  DilatedWeightArgs a;
  const DilatedPlan plan(shape, Pass::grad_weight, kernels, a);
  a.source = strided(x);
  a.target = strided(grad);
  a.grad_pitch = round_up(a.target_size[2], kernels.lanes);
  const int64_t sums = a.groups * a.in * a.taps() * a.out;
  a.chunks = std::clamp<int64_t>(kMostSums / (sums * kernels.item_bytes), 1,
                                 std::min(kMostChunks, a.tiles()));
  const int64_t tasks = a.groups * a.chunks;
  a.parts =
      std::clamp<int64_t>(ceil_div(kTasksWanted, tasks), 1, ceil_div(a.out, kernels.most_out));
  a.part = ceil_div(a.out, a.parts);
  const Memory memory = allocate(a.chunks * sums * kernels.item_bytes);
  a.sums = memory.get();
  const size_t bytes = kernels.grad_weight_scratch(a);
  parallel_for(a.tasks(), 1, [&](int64_t begin, int64_t end) {
    kernels.grad_weight(a, begin, end, scratch(bytes));
  });
  dispatch_floating(weight.scalar_type(), "dilated_grad_weight", [&](auto type) {
    using E = typename decltype(type)::type;
    using T = Accumulator<E>;
    E* to = static_cast<E*>(weight.mutable_data_ptr());
    const int64_t places = a.in * a.taps();
    parallel_for(
        a.groups * a.out, 1 + (1 << 14) / (places * a.chunks), [&](int64_t begin, int64_t end) {
          for (int64_t filter = begin; filter < end; ++filter) {
            const T* from =
                static_cast<const T*>(a.sums) + filter / a.out * places * a.out + filter % a.out;
            for (int64_t i = 0; i < places; ++i) {
              T sum = 0;
              for (int64_t chunk = 0; chunk < a.chunks; ++chunk)
                sum += from[chunk * sums + i * a.out];
              to[filter * places + i] = static_cast<E>(sum);
            }
          }
        });
  });
  return weight;
}

}  // namespace
}  // namespace voxconv

STABLE_TORCH_LIBRARY_IMPL(voxconv, CPU, m) {
  m.impl("dilated_forward", TORCH_BOX(&voxconv::dilated_forward));
  m.impl("dilated_grad_input", TORCH_BOX(&voxconv::dilated_grad_input));
  m.impl("dilated_grad_weight", TORCH_BOX(&voxconv::dilated_grad_weight));
}
