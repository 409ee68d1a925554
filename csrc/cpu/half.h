// SPDX-License-Identifier: Apache-2.0
// The two half types as bits, and their scalar conversions (round to nearest, ties to even).
#pragma once
#include <cstdint>
#include <cstring>

namespace voxconv {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t bits) { return float_from_bits(uint32_t(bits) << 16); }
constexpr uint16_t kBf16Nan = 0x7fc0;  // torch makes this one of every NaN
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return kBf16Nan;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity or NaN
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // The exponent is rebased by a multiplication with 2^112, which also normalises subnormals.
  return float_from_bits(sign | bits_of_float(float_from_bits(magnitude << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds past the largest half
  if (magnitude < 0x38800000u)  // subnormal: the addition rounds at bit 2^-24
    return uint16_t(sign | (bits_of_float(float_from_bits(magnitude) + 0.5f) & 0xffffu));
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

}  // namespace voxconv
