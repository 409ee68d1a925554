// SPDX-License-Identifier: Apache-2.0
// What device code takes from its surroundings: from CUDA, or from tests/cuda_on_cpu, which
// compiles it with a C++ compiler and runs it on the CPU. Device code includes no other header of
// CUDA's, and none of torch's.
#pragma once
#include "../common/conv3d.h"

#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VOXCONV_PRAGMA(text) _Pragma(#text)
#define VOXCONV_UNROLL _Pragma("unroll")
#define VOXCONV_UNROLL_IF(condition) VOXCONV_PRAGMA(unroll((condition) ? 1024 : 1))
#else
#include <cmath>

#include "../cpu/half.h"
#include "cuda_on_cpu.h"
#define VOXCONV_UNROLL
#define VOXCONV_UNROLL_IF(condition)
#endif

namespace voxconv {
namespace device {

// What elements of a tensor are summed in.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float& to, float x) { to = x; }
__device__ inline void narrow(double& to, double x) { to = x; }

#if defined(__CUDACC__)
using Bf16 = __nv_bfloat16;
using F16 = __half;
__device__ inline float widen(Bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(F16 x) { return __half2float(x); }
__device__ inline void narrow(Bf16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(F16& to, float x) { to = __float2half_rn(x); }

// The block's shared memory, of the size it was launched with.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char voxconv_shared_memory[];
  return reinterpret_cast<T*>(voxconv_shared_memory);
}

// Copies 4, 8 or 16 aligned bytes to shared memory while the thread goes on, or zeros.
template <int Bytes>
__device__ inline void copy_later(void* to, const void* from, bool exists) {
  const auto place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const unsigned bytes = exists ? Bytes : 0;
  if constexpr (Bytes == 16)  // past the first cache, which has nothing to do with them
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from),
                 "n"(Bytes), "r"(bytes)
                 : "memory");
}
// Loads four aligned neighbours from shared memory here and now: the compiler neither loads them
// earlier nor keeps them for the next time that they are asked for, which would take all registers.
__device__ inline void load_four(const float* from, float* to) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from)))
               : "memory");
}
__device__ inline void load_four(const double* from, double* to) {
  asm volatile(
      "ld.shared.v2.f64 {%0, %1}, [%4];\n"
      "ld.shared.v2.f64 {%2, %3}, [%4 + 16];"
      : "=d"(to[0]), "=d"(to[1]), "=d"(to[2]), "=d"(to[3])
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from)))
      : "memory");
}
__device__ inline void load_two_words(const void* from, unsigned& low, unsigned& high) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(low), "=r"(high)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from)))
               : "memory");
}
__device__ inline void load_four(const Bf16* from, float* to) {
  unsigned low, high;
  load_two_words(from, low, high);
  to[0] = __uint_as_float(low << 16), to[1] = __uint_as_float(low & 0xffff0000u);
  to[2] = __uint_as_float(high << 16), to[3] = __uint_as_float(high & 0xffff0000u);
}
__device__ inline void load_four(const F16* from, float* to) {
  unsigned low, high;
  load_two_words(from, low, high);
  VOXCONV_UNROLL
  for (int i = 0; i < 4; ++i)
    to[i] =
        widen(__ushort_as_half(static_cast<unsigned short>((i < 2 ? low : high) >> i % 2 * 16)));
}

// The copies of the thread since the last call are a group; waits for all but the last N groups.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
using voxconv::Bf16;
using voxconv::F16;
inline float widen(Bf16 x) { return bfloat16_to_float(x.bits); }
inline float widen(F16 x) { return half_to_float(x.bits); }
inline void narrow(Bf16& to, float x) { to.bits = float_to_bfloat16(x); }
inline void narrow(F16& to, float x) { to.bits = float_to_half(x); }

template <class T>
T* shared_memory() {
  return static_cast<T*>(cuda_on_cpu::shared_memory());
}
template <int Bytes>
void copy_later(void* to, const void* from, bool exists) {
  static constexpr char kZeros[Bytes] = {};
  cuda_on_cpu::copy_later(to, exists ? from : kZeros, Bytes);
}
template <class T>
void load_four(const T* from, Sum<T>* to) {
  for (int i = 0; i < 4; ++i) to[i] = widen(from[i]);
}
inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int N>
void wait_for_copies() {
  cuda_on_cpu::wait_for_copies(N);
}
#endif

__device__ inline float error_function(float x) { return erff(x); }
__device__ inline double error_function(double x) { return erf(x); }
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// What an output is, given its sum. NaN stays NaN.
template <class S>
__device__ __forceinline__ S activate(S x, int activation) {
  switch (activation) {
    case kRelu: return x < S(0) ? S(0) : x;
    case kLeakyRelu: return x < S(0) ? x * S(kLeakySlope) : x;
    case kGelu: return S(0.5) * x * (S(1) + error_function(x * S(0.70710678118654752440)));
    case kSilu: return x / (S(1) + exponential(-x));
    default: return x;
  }
}

// Copies an element to shared memory, widened, or a zero; later, if it need not be widened.
template <class T>
__device__ inline void copy_async(Sum<T>* to, const T* from, bool exists) {
  if constexpr (std::is_same_v<T, Sum<T>>)
    copy_later<sizeof(T)>(to, from, exists);
  else
    *to = exists ? widen(*from) : Sum<T>(0);
}

// Copies every `by`-th of `count` cells of a column, from the `first` on. Cell i is of line
// `line` + `step` * i of the source, a zero if that is none of its `lines`. Those that are widened
// are loaded a few at a time: they wait for memory together.
template <class T>
__device__ __forceinline__ void copy_column(const T* from, int64_t pitch, int line, int step,
                                            int lines, int first, int by, int count, Sum<T>* to,
                                            int to_pitch) {
  constexpr int kTogether = std::is_same_v<T, Sum<T>> ? 1 : 4;
  line += step * first;
  step *= by;
  from += line * pitch;
  to += first * to_pitch;
  for (int i = first; i < count; i += kTogether * by) {
    T cell[kTogether];
    VOXCONV_UNROLL
    for (int n = 0; n < kTogether; ++n) {
      const bool exists = line >= 0 && line < lines;
      if constexpr (kTogether == 1)
        copy_async(to, from, exists);
      else if (exists && i + n * by < count)
        cell[n] = *from;
      else
        narrow(cell[n], 0);
      line += step, from += step * pitch;
    }
    VOXCONV_UNROLL
    for (int n = 0; n < kTogether; ++n, to += by * to_pitch)
      if (kTogether > 1 && i + n * by < count) *to = widen(cell[n]);
  }
}

// Copies a unit to shared memory as it is, or zeros; later, if it has 4 bytes at least.
template <class Unit>
__device__ inline void copy_unit(Unit* to, const Unit* from, bool exists) {
  if constexpr (sizeof(Unit) >= 4) {
    copy_later<sizeof(Unit)>(to, from, exists);
  } else {
    const Unit zero{};
    *to = exists ? *from : zero;
  }
}

// Four neighbours, at an address that is a multiple of all four or of 16 bytes.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T of[4];
};
// Stores four outputs, or only the first `count`, one by one, if they are fewer or may lie
// anywhere; then also with gaps.
template <class T>
__device__ inline void store_four(T* to, const Sum<T> (&sums)[4], int activation, int count,
                                  bool aligned, int step = 1) {
  Sum<T> from[4];
  VOXCONV_UNROLL
  for (int i = 0; i < 4; ++i) from[i] = sums[i];
  if (activation != kIdentity) {
    VOXCONV_UNROLL
    for (int i = 0; i < 4; ++i) from[i] = activate(sums[i], activation);
  }
  if (aligned && count >= 4) {
    Four<T> four;
    VOXCONV_UNROLL
    for (int i = 0; i < 4; ++i) narrow(four.of[i], from[i]);
    *reinterpret_cast<Four<T>*>(to) = four;
    return;
  }
  VOXCONV_UNROLL
  for (int i = 0; i < 4; ++i)
    if (i < count) narrow(to[i * step], from[i]);
}

// A tensor [n, c, d, h, w] of any strides, in elements.
template <class T>
struct View {
  T* data;
  int64_t n, c, d, h, w;

  __device__ T* at(int64_t i_n, int64_t i_c) const { return data + i_n * n + i_c * c; }
  __device__ T* at(int64_t i_n, int64_t i_c, int64_t i_d, int64_t i_h, int64_t i_w) const {
    return at(i_n, i_c) + i_d * d + i_h * h + i_w * w;
  }
};

// The first thing of a thread of the grid, and from one of its things to the next.
__device__ inline int64_t first_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The sum of what the threads of a block have, in an order of its own, in thread 0. blockDim.x is a
// power of 2; `place` has as many sums.
template <class S>
__device__ S block_sum(S mine, S* place) {
  const int thread = static_cast<int>(threadIdx.x);
  place[thread] = mine;
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) place[thread] += place[thread + half];
  }
  return place[0];
}

}  // namespace device
}  // namespace voxconv
