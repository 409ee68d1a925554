// SPDX-License-Identifier: Apache-2.0
// Runs device code on the CPU: a stand-in for what csrc/cuda/*.cuh takes from CUDA.
//
// The threads of a block are fibres of one thread of the CPU, blocks run one after the other. A
// fibre runs until it waits for the others (a barrier of the block or of its warp): what lacks a
// barrier shows as a result that changes with the order of the threads. Shared memory is filled
// with NaNs before every block, and a page that may not be touched lies behind it, as behind the
// tensors (guarded.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __grid_constant__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fibre that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int kWarp = 32;

// Waits for all threads of the block, or of the warp.
void wait_for_block();
void wait_for_warp();
// The shared memory of the block.
void* shared_memory();
// A place for each lane of the fibre's warp, and the fibre's own number in it.
uint64_t* lane_slots();
int lane();
// Keeps a copy back until the fibre waits for it, as the memory system may.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups);

// Runs a grid, the threads of each block in rising or in falling order; returns what went wrong, or
// nothing.
std::string run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool falling,
                     const std::function<void()>& thread);

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_cpu::wait_for_warp(); }

template <class T>
T __shfl_sync_to(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t* slots = cuda_on_cpu::lane_slots();
  std::memcpy(slots + cuda_on_cpu::lane(), &value, sizeof value);
  cuda_on_cpu::wait_for_warp();
  T result = value;
  if (from >= 0 && from < cuda_on_cpu::kWarp) std::memcpy(&result, slots + from, sizeof result);
  cuda_on_cpu::wait_for_warp();
  return result;
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return __shfl_sync_to(value, from % cuda_on_cpu::kWarp);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
  return __shfl_sync_to(value, cuda_on_cpu::lane() + by);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return __shfl_sync_to(value, cuda_on_cpu::lane() ^ mask);
}
