// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, and the same without: what runs device code on the CPU must tell.
#include <string>

#include "../../csrc/cuda/device.cuh"
#include "guarded.h"

namespace {

namespace device = voxconv::device;
using device::shared_memory;

constexpr int kThreads = 64;

// Each reads, writes or waits right if `right`.
__global__ void read_behind(const float* x, float* y, bool right) {
  y[threadIdx.x] = x[threadIdx.x + (right ? 0 : 1)];
}
__global__ void write_before(const float* x, float* y, bool right) {
  y[static_cast<int>(threadIdx.x) - (right || threadIdx.x ? 0 : 1024)] = x[threadIdx.x];
}
__global__ void read_behind_shared(const float* x, float* y, bool right) {
  float* place = shared_memory<float>();
  place[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = place[right ? kThreads - 1 - threadIdx.x : 2 * kThreads + threadIdx.x];
}
__global__ void no_barrier(const float* x, float* y, bool right) {
  float* place = shared_memory<float>();
  place[threadIdx.x] = x[threadIdx.x];
  if (right) __syncthreads();
  y[threadIdx.x] = place[kThreads - 1 - threadIdx.x];
}
__global__ void barrier_of_some(const float* x, float* y, bool right) {
  if (right || threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void unwritten(const float* x, float* y, bool right) {
  if (right || threadIdx.x > 0) y[threadIdx.x] = x[threadIdx.x];
}
__global__ void not_waited_for(const float* x, float* y, bool right) {
  float* place = shared_memory<float>();
  device::copy_later<4>(place + threadIdx.x, x + threadIdx.x, true);
  device::commit_copies();
  right ? device::wait_for_copies<0>() : device::wait_for_copies<1>();
  y[threadIdx.x] = place[threadIdx.x];
}
__global__ void sum_of_warp(const float* x, float* y, bool right) {
  float sum = x[threadIdx.x];
  for (int by = 16; by > (right ? 0 : 1); by /= 2) sum += __shfl_down_sync(~0u, sum, by);
  y[threadIdx.x] = __shfl_sync(~0u, sum, 0);
}

}  // namespace

// Kernel `number` on x, 64 floats; what went wrong, or an empty string.
extern "C" const char* run_fault(int number, const float* x, float* y, bool right, bool falling) {
  constexpr decltype(&no_barrier) kKernels[] = {read_behind,    write_before,    read_behind_shared,
                                                no_barrier,     barrier_of_some, unwritten,
                                                not_waited_for, sum_of_warp};
  static std::string error;
  const size_t bytes = kThreads * sizeof(float);
  const cuda_on_cpu::Guarded source(x, bytes), target(nullptr, bytes);
  const float* from = source.as<float>();
  float* to = target.as<float>();
  error = cuda_on_cpu::run_grid(1, kThreads, bytes, falling,
                                [=] { kKernels[number](from, to, right); });
  std::memcpy(y, to, bytes);
  return error.c_str();
}
