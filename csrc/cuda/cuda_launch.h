// SPDX-License-Identifier: Apache-2.0
// Starts kernels for a tensor: on its device, and on the stream that torch uses there.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <vector>

#include "../common/stable.h"

// A CPU-only torch lacks it, and never gets here.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace voxconv {

class CudaLaunch {
 public:
  explicit CudaLaunch(const Tensor& tensor) : guard_(tensor.get_device_index()), like_(tensor) {
    VOXCONV_CHECK(aoti_torch_get_current_cuda_stream, "voxconv: this torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  CudaLaunch(const CudaLaunch&) = delete;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                  const Arguments&... arguments) const {
    VOXCONV_CHECK(grid.x > 0,
                  "voxconv: a pass of more blocks than a GPU counts, 2^31 - 1: run it in "
                  "parts, or under voxconv.use_backend(\"torch\")");
    constexpr size_t kUnasked = 48 << 10;  // bytes of shared memory that every kernel may have
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (shared > kUnasked)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)));
    start(function, grid, block, shared, Parameters(arguments)...);
  }

  // Device memory for the kernels of this object. What comes later on the stream may reuse it.
  void* scratch(size_t bytes) const {
    scratch_.push_back(
        torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return scratch_.back().mutable_data_ptr();
  }

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like_.get_device_index()));
    return count;
  }

 private:
  template <class... Parameters>
  void start(const void* function, dim3 grid, dim3 block, size_t shared,
             Parameters... parameters) const {
    void* places[] = {&parameters...};
    check(cudaLaunchKernel(function, grid, block, places, shared, stream_));
  }
  static void check(cudaError_t error) {
    VOXCONV_CHECK(error == cudaSuccess, "voxconv: ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  Tensor like_;
  cudaStream_t stream_ = nullptr;
  mutable std::vector<Tensor> scratch_;
};

}  // namespace voxconv
