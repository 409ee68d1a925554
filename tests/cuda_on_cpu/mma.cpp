// SPDX-License-Identifier: Apache-2.0
// One product of the tensor cores, for test_cuda_toeplitz.py: lane l's registers are row l of each.
#include "../../csrc/cuda/mma.cuh"

#include <string>

#include "guarded.h"

namespace {

using namespace voxconv::device;

template <class T>
__global__ void product(const uint32_t* a, const uint32_t* b, float* sum) {
  const int lane = static_cast<int>(threadIdx.x);
  float mine[4];
  std::memcpy(mine, sum + 4 * lane, sizeof mine);
  const uint32_t left[2] = {a[4 * lane], a[4 * lane + 1]};
  const uint32_t right[2] = {a[4 * lane + 2], a[4 * lane + 3]};
  multiply_add<T>(mine, left, right, b + 2 * lane);
  std::memcpy(sum + 4 * lane, mine, sizeof mine);
}

// 16 rows of 8 halves into two registers of a lane.
__global__ void pieces(const uint16_t* rows, uint32_t* to) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t mine[2];
  load_pieces(rows + lane % 16 * 8, mine);
  std::memcpy(to + 2 * lane, mine, sizeof mine);
}

}  // namespace

extern "C" const char* run_product(bool bf16, const uint32_t* a, const uint32_t* b, float* sum) {
  static std::string error;
  const auto kernel = bf16 ? product<Bf16> : product<F16>;
  error = cuda_on_cpu::run_grid(1, 32, 0, false, [=] { kernel(a, b, sum); });
  return error.c_str();
}
extern "C" const char* run_pieces(const uint16_t* rows, uint32_t* to) {
  static std::string error;
  const cuda_on_cpu::Guarded source(rows, 16 * 16);
  const uint16_t* from = source.as<uint16_t>();
  error = cuda_on_cpu::run_grid(1, 32, 0, true, [=] { pieces(from, to); });
  return error.c_str();
}
