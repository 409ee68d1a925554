// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the depthwise family on the CPU, for test_cuda_on_cpu.py: a pass on copies of
// its tensors in guarded memory, where an access outside of them is an error.
#include "../../csrc/cuda/depthwise_launch.cuh"

#include <memory>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using namespace voxconv;
using cuda_on_cpu::Guarded;

// What one pass works on. `other` is the weight, or of grad_weight the gradient; `bias` may be
// null.
struct Work {
  const void *source, *other, *bias;
  void* target;
  size_t source_bytes, other_bytes, bias_bytes, target_bytes;
};

// Runs the kernels of a pass, each in the same order of threads, until one goes wrong.
class Launch {
 public:
  explicit Launch(bool falling) : falling_(falling) {}

  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, dim3 grid, dim3 block, size_t shared,
                  Arguments... arguments) const {
    if (error_.empty())
      error_ = cuda_on_cpu::run_grid(grid, block, shared, falling_, [=] { kernel(arguments...); });
  }
  void* scratch(size_t bytes) const {
    const int fill = falling_ ? cuda_on_cpu::kLarge : cuda_on_cpu::kNan;
    scratch_.push_back(std::make_unique<Guarded>(nullptr, bytes, fill));
    return scratch_.back()->as<void>();
  }
  // Few, so that small problems are as large for them as those of a model for a GPU.
  int multiprocessors() const { return 2; }
  const std::string& error() const { return error_; }

 private:
  bool falling_;
  mutable std::string error_;
  mutable std::vector<std::unique_ptr<Guarded>> scratch_;
};

enum PassNumber { kForward, kGradInput, kGradWeight, kChannelSum };

template <class T>
std::string run(int pass, const Conv3dShape& shape, bool channels_last, device::Way way,
                int activation, const Work& work, bool falling) {
  const Guarded source(work.source, work.source_bytes), other(work.other, work.other_bytes);
  const Guarded bias(work.bias, work.bias_bytes), target(nullptr, work.target_bytes);
  const T *a = source.as<T>(), *b = other.as<T>(), *c = work.bias ? bias.as<T>() : nullptr;
  T* to = target.as<T>();
  const Launch launch(falling);
  const Axis* axis = shape.axis;
  switch (pass) {
    case kForward:
      device::launch_forward(launch, shape, channels_last, way, a, b, c, activation, to);
      break;
    case kGradInput:
      device::launch_grad_input(launch, shape, channels_last, way, a, b, c, to);
      break;
    case kGradWeight:
      device::launch_grad_weight(launch, shape, channels_last, way, a, b, to);
      break;
    default:
      device::launch_channel_sum(launch, channels_last, a, shape.batch, shape.channels, axis[0].in,
                                 axis[1].in, axis[2].in, to);
  }
  std::memcpy(work.target, target.as<char>(), work.target_bytes);
  return launch.error();
}

}  // namespace

// Returns what went wrong, or an empty string. `dtype` counts float32, float64, bfloat16, float16.
extern "C" const char* run_depthwise(int pass, int dtype, const Conv3dShape* shape,
                                     bool channels_last, int way, int activation, const Work* work,
                                     bool falling) {
  constexpr decltype(&run<float>) kRun[] = {run<float>, run<double>, run<device::Bf16>,
                                            run<device::F16>};
  static std::string error;
  error = kRun[dtype](pass, *shape, channels_last, static_cast<device::Way>(way), activation, *work,
                      falling);
  return error.c_str();
}
