// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the depthwise family on the CPU, for cuda_kernels.py: a pass on copies of its
// tensors in guarded memory, where an access outside of them is an error; or only how it would be
// launched.
#include "../../csrc/cuda/depthwise_launch.cuh"

#include <dlfcn.h>

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

// Writes down what would be launched, a line for each kernel: its symbol, grid, block, bytes of
// shared memory, and of the scratch that the pass has asked for.
class Plan {
 public:
  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments...) const {
    Dl_info found{};
    dladdr(reinterpret_cast<const void*>(kernel), &found);
    text_ += found.dli_sname ? found.dli_sname : "?";
    for (const dim3& size : {grid, block})
      for (unsigned n : {size.x, size.y, size.z}) text_ += " " + std::to_string(n);
    text_ += " " + std::to_string(shared) + " " + std::to_string(scratch_) + "\n";
  }
  void* scratch(size_t bytes) const {
    scratch_ = bytes;
    return &scratch_;  // some address: nothing runs
  }
  int multiprocessors() const { return 132; }  // an H200's
  const std::string& text() const { return text_; }

 private:
  mutable std::string text_;
  mutable size_t scratch_ = 0;
};

enum PassNumber { kForward, kGradInput, kGradWeight, kChannelSum };

// How a pass is to be run.
struct How {
  int pass;
  bool channels_last;
  device::Way way;
  int activation;
};

template <class T, class Launch>
void start(const Launch& launch, const How& how, const Conv3dShape& shape, const T* a, const T* b,
           const T* c, T* to) {
  const bool last = how.channels_last;
  const Axis* axis = shape.axis;
  switch (how.pass) {
    case kForward:
      return device::launch_forward(launch, shape, last, how.way, a, b, c, how.activation, to);
    case kGradInput: return device::launch_grad_input(launch, shape, last, how.way, a, b, c, to);
    case kGradWeight: return device::launch_grad_weight(launch, shape, last, how.way, a, b, to);
    default:
      return device::launch_channel_sum(launch, last, a, shape.batch, shape.channels, axis[0].in,
                                        axis[1].in, axis[2].in, to);
  }
}

template <class T>
std::string run(const How& how, const Conv3dShape& shape, const Work& work, bool falling) {
  const Guarded source(work.source, work.source_bytes), other(work.other, work.other_bytes);
  const Guarded bias(work.bias, work.bias_bytes), target(nullptr, work.target_bytes);
  const Launch launch(falling);
  start<T>(launch, how, shape, source.as<T>(), other.as<T>(), work.bias ? bias.as<T>() : nullptr,
           target.as<T>());
  std::memcpy(work.target, target.as<char>(), work.target_bytes);
  return launch.error();
}

template <class T>
std::string plan(const How& how, const Conv3dShape& shape) {
  const Plan launch;
  start<T>(launch, how, shape, nullptr, nullptr, nullptr, nullptr);
  return launch.text();
}

}  // namespace

// Returns what went wrong, or an empty string. `dtype` counts float32, float64, bfloat16, float16.
extern "C" const char* run_depthwise(const How* how, int dtype, const Conv3dShape* shape,
                                     const Work* work, bool falling) {
  constexpr decltype(&run<float>) kRun[] = {run<float>, run<double>, run<device::Bf16>,
                                            run<device::F16>};
  static std::string error;
  error = kRun[dtype](*how, *shape, *work, falling);
  return error.c_str();
}

extern "C" const char* plan_depthwise(const How* how, int dtype, const Conv3dShape* shape) {
  constexpr decltype(&plan<float>) kPlan[] = {plan<float>, plan<double>, plan<device::Bf16>,
                                              plan<device::F16>};
  static std::string text;
  text = kPlan[dtype](*how, *shape);
  return text.c_str();
}
