// SPDX-License-Identifier: Apache-2.0
// Products of small matrices of bfloat16 or float16 by the tensor cores (sm_80 on). A warp holds a
// matrix in fragments: registers with two halves each, or sums. Lane 4 g + t, 0 <= g < 8 and
// 0 <= t < 4, has of
//   an 8 x 8 piece           row g, columns 2t and 2t+1, the first in the low half of a register
//   A, 16 rows x 16          4 pieces: [rows 0-7 | rows 8-15] of columns 0-7, then of columns 8-15
//   B, 16 x 8 columns        2 pieces of its transpose: column g, rows 2t and 2t+1, then 8 more
//   the sums, 16 x 8         row g, columns 2t and 2t+1, then row g+8, the same columns
// as the PTX manual draws them for mma.m16n8k16 and ldmatrix.
#pragma once
#include "device.cuh"

namespace voxconv {
namespace device {

#if defined(__CUDACC__)
// Loads two pieces from shared memory. `row`, at 16 bytes, is that of 8 halves of this lane: lanes
// 0-7 name the rows of the first piece, 8-15 of the second; those of the other lanes go unread.
__device__ inline void load_pieces(const void* row, uint32_t (&to)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// sum += A B, added in float32. A is [left | right], two pieces each.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&left)[2],
                                    const uint32_t (&right)[2], const uint32_t* b) {
  if constexpr (std::is_same_v<T, Bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(right[0]), "r"(right[1]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(right[0]), "r"(right[1]), "r"(b[0]), "r"(b[1]));
}
#else
inline void load_pieces(const void* row, uint32_t (&to)[2]) { cuda_on_cpu::load_pieces(row, to); }
template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&left)[2], const uint32_t (&right)[2],
                  const uint32_t* b) {
  const uint32_t mine[6] = {left[0], left[1], right[0], right[1], b[0], b[1]};
  cuda_on_cpu::multiply_add(sum, mine, [](uint16_t bits) { return widen(T{bits}); });
}
#endif

}  // namespace device
}  // namespace voxconv
