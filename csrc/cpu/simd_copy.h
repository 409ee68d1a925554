// SPDX-License-Identifier: Apache-2.0
// Elements from memory to memory, converted if need be: part of simd.h.

// Copies fewer elements than a vector has.
template <class T, class A, class B>
VOXCONV_INLINE void copy_few(A* to, const B* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(to + i, widen(from[i]));
}
template <class T>
VOXCONV_INLINE void copy_few(T* to, const T* from, int64_t count) {
  int64_t i = 0;
  unroll<3>([&](auto n) {
    constexpr int half = kLanes<T> >> (decltype(n)::value + 1);
    if (count & half) __builtin_memcpy(to + i, from + i, half * sizeof(T)), i += half;
  });
  for (; i < count; ++i) to[i] = from[i];
}

// The first `count` elements of a vector; the others are zero, and not touched in memory.
template <class T, class E>
VOXCONV_INLINE Vec<T> load_few(const E* p, int64_t count) {
  E cell[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) cell[i] = p[i];
  return load(cell);
}
template <class T, class E>
VOXCONV_INLINE void store_few(E* p, Vec<T> v, int64_t count) {
  E cell[kLanes<T>];
  store(cell, v);
  for (int64_t i = 0; i < count; ++i) p[i] = cell[i];
}
#if VOXCONV_VECTOR_BYTES == 64
template <>
VOXCONV_INLINE Vec<float> load_few<float, float>(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
template <>
VOXCONV_INLINE Vec<double> load_few<double, double>(const double* p, int64_t count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
}
template <>
VOXCONV_INLINE void store_few<float, float>(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
template <>
VOXCONV_INLINE Vec<float> load_few<float, Bf16>(const Bf16* p, int64_t count) {
  return widen_bfloat16((HalfVecU16)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
template <>
VOXCONV_INLINE Vec<float> load_few<float, F16>(const F16* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
template <class E>
VOXCONV_INLINE void store_few_halves(E* p, Vec<float> v, int64_t count) {
  E cell[kLanes<float>];
  store(cell, v);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), _mm256_loadu_si256((__m256i*)cell));
}
template <>
VOXCONV_INLINE void store_few<float, Bf16>(Bf16* p, Vec<float> v, int64_t count) {
  store_few_halves(p, v, count);
}
template <>
VOXCONV_INLINE void store_few<float, F16>(F16* p, Vec<float> v, int64_t count) {
  store_few_halves(p, v, count);
}
#elif VOXCONV_VECTOR_BYTES == 32
VOXCONV_INLINE __m256i first_few(int64_t count) {
  const VecI32 index = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(index < int32_t(count));
}
template <>
VOXCONV_INLINE Vec<float> load_few<float, float>(const float* p, int64_t count) {
  return (Vec<float>)_mm256_maskload_ps(p, first_few(count));
}
// A masked store is many instructions on some processors.
template <>
VOXCONV_INLINE void store_few<float, float>(float* p, Vec<float> v, int64_t count) {
  float cell[kLanes<float>];
  store(cell, v);
  copy_few(p, cell, count);
}
#endif

// The two halves of a vector.
template <class T>
VOXCONV_INLINE void store_halves(T* low, T* high, Vec<T> v) {
#if VOXCONV_VECTOR_BYTES == 64
  _mm256_storeu_pd((double*)low, _mm512_castpd512_pd256((__m512d)v));
  _mm256_storeu_pd((double*)high, _mm512_extractf64x4_pd((__m512d)v, 1));
#else
  __builtin_memcpy(low, &v, sizeof v / 2);
  __builtin_memcpy(high, reinterpret_cast<const char*>(&v) + sizeof v / 2, sizeof v / 2);
#endif
}

// Copies `lines` lines of `count` <= kLanes elements, converted if need be.
template <class T, class A, class B>
void copy_short_lines(A* to, int64_t to_step, const B* from, int64_t from_step, int64_t lines,
                      int64_t count) {
#if VOXCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4 && sizeof(B) == 4) {
    if (count <= kLanes<T> / 2) {  // half a vector seldom crosses a cache line
      const __mmask8 few = __mmask8((1u << count) - 1);
      for (; lines > 0; --lines, to += to_step, from += from_step)
        _mm256_mask_storeu_ps(to, few, _mm256_maskz_loadu_ps(few, from));
      return;
    }
  }
#endif
  for (; lines > 0; --lines, to += to_step, from += from_step)
    store_few<T>(to, load_few<T>(from, count), count);
}

// Copies two vectors, converted if need be.
template <class T, class A, class B>
VOXCONV_INLINE void copy_two(A* to, const B* from) {
  store(to, load(from));
  store(to + kLanes<T>, load(from + kLanes<T>));
}
#if VOXCONV_VECTOR_BYTES == 32
// A bfloat16 is the upper half of a float.
template <>
VOXCONV_INLINE void copy_two<float, float, Bf16>(float* to, const Bf16* from) {
  const __m256i bits = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)from), 0xd8);
  store(to, (Vec<float>)_mm256_unpacklo_epi16(__m256i{}, bits));
  store(to + kLanes<float>, (Vec<float>)_mm256_unpackhi_epi16(__m256i{}, bits));
}
template <>
VOXCONV_INLINE void copy_two<float, Bf16, float>(Bf16* to, const float* from) {
  const Vec<float> a = load(from), b = load(from + kLanes<float>);
  VecU32 low = rounded_bfloat16(a), high = rounded_bfloat16(b);
  if (_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)))
    low = with_bfloat16_nans(low, a), high = with_bfloat16_nans(high, b);
  const __m256i both = _mm256_packus_epi32((__m256i)low, (__m256i)high);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(both, 0xd8));
}
#endif

// Copies `lines` lines of `count` elements, converted if need be; the last vector of a line may
// overlap the one before.
template <class T, class A, class B>
void copy_lines(A* to, int64_t to_step, const B* from, int64_t from_step, int64_t lines,
                int64_t count) {
  constexpr int64_t L = kLanes<T>;
  if (count < L) return copy_short_lines<T>(to, to_step, from, from_step, lines, count);
  for (; lines > 0; --lines, to += to_step, from += from_step) {
    int64_t i = 0;
    for (; i + 2 * L <= count; i += 2 * L) copy_two<T>(to + i, from + i);
    if (i + L <= count) store(to + i, load(from + i));
    if (count % L != 0) store(to + count - L, load(from + count - L));
  }
}
