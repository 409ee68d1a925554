// SPDX-License-Identifier: Apache-2.0
// Runs device code on the CPU: a stand-in for what csrc/cuda/*.cuh takes from CUDA.
//
// The threads of a block are fibres of one thread of the CPU, blocks run one after the other. A
// fibre runs until it waits for the others (a barrier of the block or of its warp): what lacks a
// barrier shows as a result that changes with the order of the threads. Shared memory is filled
// before every block, with NaNs in rising order of the threads and with large numbers in falling
// order, and a page that may not be touched lies behind it, as behind the tensors (guarded.h).
#pragma once
#include <array>
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
// The fibre's number in its warp, and a place of kLaneBytes for each lane of it.
constexpr size_t kLaneBytes = 32;
int lane();
char* lane_place(int lane);
// Keeps a copy back until the fibre waits for it, as the memory system may.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups);

// Runs a grid, the threads of each block in rising or in falling order; returns what went wrong, or
// nothing.
std::string run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool falling,
                     const std::function<void()>& thread);

// Leaves a value for the other lanes; they may ask for it until the next wait of the warp.
template <class T>
void leave_for_lanes(const T& value) {
  static_assert(sizeof(T) <= kLaneBytes);
  std::memcpy(lane_place(lane()), &value, sizeof value);
  wait_for_warp();
}
template <class T>
T left_by(int lane) {
  T value;
  std::memcpy(&value, lane_place(lane), sizeof value);
  return value;
}

// ldmatrix.x2 and mma.m16n8k16, whose fragments csrc/cuda/mma.cuh describes.
void load_pieces(const void* row, uint32_t (&to)[2]);
using Halves = std::array<uint16_t, 12>;  // of a lane: 8 of A, 4 of B
template <class Widen>
void multiply_add(float (&sum)[4], const uint32_t (&mine)[6], Widen widen) {
  leave_for_lanes(mine);
  const auto half = [&](int lane, int piece, int column) {
    return widen(left_by<Halves>(lane)[piece * 2 + column % 2]);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      sum[i] += half(row * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k) *
                half(column * 4 + k % 8 / 2, 4 + k / 8, k);
  }
  wait_for_warp();
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_cpu::wait_for_warp(); }

template <class T>
T __shfl_sync_to(T value, int from) {
  cuda_on_cpu::leave_for_lanes(value);
  if (from >= 0 && from < cuda_on_cpu::kWarp) value = cuda_on_cpu::left_by<T>(from);
  cuda_on_cpu::wait_for_warp();
  return value;
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
