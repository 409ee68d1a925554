// SPDX-License-Identifier: Apache-2.0
// How fast mma.sync goes: every warp multiplies 16 x 8 x 16 tiles in registers, eight sums side by
// side. gpu_probe.py compiles this by itself, without torch.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kSums = 8, kThreads = 256, kRounds = 2048;

__global__ void multiply(float* out, uint32_t seed) {
  float sum[kSums][4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = seed + threadIdx.x * 4 + i;
  for (int i = 0; i < 2; ++i) b[i] = seed + threadIdx.x * 2 + i;
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

}  // namespace

// TFLOP/s, or the negative number of a CUDA error.
extern "C" double mma_rate() {
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  const int blocks = processors * 8;
  float* out = nullptr;
  cudaMalloc(&out, sizeof(float) * blocks * kThreads);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float best = 1e30f;
  for (int i = 0; i < 10; ++i) {
    cudaEventRecord(begin);
    multiply<<<blocks, kThreads>>>(out, i);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    best = ms < best ? ms : best;
  }
  cudaFree(out);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return -double(error);
  const double flops = 2.0 * 16 * 8 * 16 * kSums * kRounds * (kThreads / 32) * blocks;
  return flops / best / 1e9;
}
