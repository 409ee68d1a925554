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

// 8 neighbours.
struct alignas(16) Piece {
  uint32_t of[4];
};

// Some neighbours, two in a register.
struct Cells {
  uint32_t of[8] = {};

  __device__ Piece whole() const { return {{of[0], of[1], of[2], of[3]}}; }
  // Neighbours i and i + 1.
  __device__ uint32_t pair(int i) const {
    return i % 2 == 0 ? of[i / 2] : of[i / 2] >> 16 | of[i / 2 + 1] << 16;
  }
};

// Cells [first, first + N), N 8 or 9, of a line of `count`, zeros beyond its ends. Of `aligned`
// lines, which begin at multiples of 16 bytes, two pieces are loaded and moved by first % 8 cells.
template <int N, class T>
__device__ inline Cells load_cells(const T* line, int first, int count, bool aligned) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(line);
  Cells cells;
  if (!aligned) {
    VOXCONV_UNROLL
    for (int i = 0; i < N; ++i) {
      const int at = first + i;
      const uint32_t cell = at >= 0 && at < count ? bits[at] : 0;
      cells.of[i / 2] |= cell << i % 2 * 16;
    }
    return cells;
  }
  const int move = first & 7;
  VOXCONV_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int from = first - move + 8 * i;
    if (from < 0 || from >= count || (N == 8 && i == 1 && move == 0)) continue;
    const Piece piece = *reinterpret_cast<const Piece*>(bits + from);
    VOXCONV_UNROLL
    for (int j = 0; j < 4; ++j) cells.of[4 * i + j] = piece.of[j];
  }
  VOXCONV_UNROLL
  for (int i = 0; i < 6; ++i) cells.of[i] = move & 4 ? cells.of[i + 2] : cells.of[i];
  VOXCONV_UNROLL
  for (int i = 0; i < 6; ++i) cells.of[i] = move & 2 ? cells.of[i + 1] : cells.of[i];
  VOXCONV_UNROLL
  for (int i = 0; i < 5; ++i)
    cells.of[i] = move & 1 ? cells.of[i] >> 16 | cells.of[i + 1] << 16 : cells.of[i];
  return cells;
}

}  // namespace device
}  // namespace voxconv
