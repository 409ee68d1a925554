// SPDX-License-Identifier: Apache-2.0
// Vectors of kVectorBytes with GCC vector extensions. Included once per instruction set, inside
// that set's namespace (foreach_target.h), so that everything here is compiled for that set. Only
// own templates and plain data: a std:: template instantiated here could be merged by the linker
// with the one of another instruction set.

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(kVectorBytes / 2)));

#define VOXCONV_INLINE inline __attribute__((always_inline))
#define VOXCONV_INLINE_LAMBDA __attribute__((always_inline))

// Calls f(constant<0>), ... f(constant<N - 1>): loops whose index must be a constant expression.
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <class F, int... I>
VOXCONV_INLINE constexpr void call_each(const F& f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}
template <int N, class F>
VOXCONV_INLINE constexpr void unroll(const F& f) {
  call_each(f, std::make_integer_sequence<int, N>{});
}

constexpr int clamp(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

// Partial sums of each of K taps beside N operands: as many as keep the multiply-adds of eight
// chains in flight, if there are registers for them.
constexpr int kChains = 8;
template <int K, int N>
constexpr int kPartial = clamp((kRegisters - N - 2) / K, 1, (kChains + K - 1) / K);

// Taps of a run that are held in registers at a time. The multiply-adds of one tile wait for each
// other, those of the next taps need not: with few registers for sums, short runs overlap better.
constexpr int kTapsHeld = kRegisters == 32 ? 32 : 4;
constexpr int taps_at_a_time(int taps) {
  const int parts = (taps + kTapsHeld - 1) / kTapsHeld;
  return (taps + parts - 1) / parts;
}

// Makes the compiler hold v in a register from here on. Without it GCC reads a cell from memory
// again for each multiply-add that uses it (one load each: the load port becomes the limit), and
// keeps sixteen store addresses alive across the loop.
template <class V>
VOXCONV_INLINE void pin(V& v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) > 8)
    asm("" : "+v"(v));
  else
    asm("" : "+r"(v));
#else
  (void)v;
#endif
}

// sum + a * b from registers, in place of the sum. GCC left to itself overwrites a factor that is
// needed again and copies it beforehand.
template <class V>
VOXCONV_INLINE V multiply_add(V sum, V a, V b) {
#if VOXCONV_VECTOR_BYTES > 16
  if constexpr (sizeof(sum[0]) == sizeof(float))
    asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  else
    asm volatile("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return sum + a * b;
#endif
}

VOXCONV_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
VOXCONV_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
VOXCONV_INLINE Vec<float> widen_bfloat16(HalfVecU16 bits) {
  return (Vec<float>)(__builtin_convertvector(bits, VecU32) << 16);
}
VOXCONV_INLINE Vec<float> load(const Bf16* p) {
  HalfVecU16 half;
  __builtin_memcpy(&half, p, sizeof half);
  return widen_bfloat16(half);
}
VOXCONV_INLINE Vec<float> load(const F16* p) {
#if VOXCONV_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif VOXCONV_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

VOXCONV_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
VOXCONV_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
// Past the caches, to aligned memory; finish_streams makes it seen by other threads.
#if VOXCONV_VECTOR_BYTES == 64
VOXCONV_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
VOXCONV_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
VOXCONV_INLINE void finish_streams() { _mm_sfence(); }
#elif VOXCONV_VECTOR_BYTES == 32
VOXCONV_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
VOXCONV_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
VOXCONV_INLINE void finish_streams() { _mm_sfence(); }
#else
VOXCONV_INLINE void stream(float* p, Vec<float> v) { store(p, v); }
VOXCONV_INLINE void stream(double* p, Vec<double> v) { store(p, v); }
VOXCONV_INLINE void finish_streams() {}
#endif
// To nearest, ties to even; NaNs come out wrong.
VOXCONV_INLINE VecU32 rounded_bfloat16(Vec<float> v) {
  const VecU32 bits = (VecU32)v;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
VOXCONV_INLINE VecU32 with_bfloat16_nans(VecU32 rounded, Vec<float> v) {
  return v != v ? VecU32{} + kBf16Nan : rounded;
}
VOXCONV_INLINE void store(Bf16* p, Vec<float> v) {
  const HalfVecU16 half =
      __builtin_convertvector(with_bfloat16_nans(rounded_bfloat16(v), v), HalfVecU16);
  __builtin_memcpy(p, &half, sizeof half);
}
VOXCONV_INLINE void store(F16* p, Vec<float> v) {
#if VOXCONV_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif VOXCONV_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

VOXCONV_INLINE float widen(float v) { return v; }
VOXCONV_INLINE double widen(double v) { return v; }
VOXCONV_INLINE float widen(Bf16 v) { return bfloat16_to_float(v.bits); }
VOXCONV_INLINE float widen(F16 v) { return half_to_float(v.bits); }
VOXCONV_INLINE void narrow(float* p, float v) { *p = v; }
VOXCONV_INLINE void narrow(double* p, double v) { *p = v; }
VOXCONV_INLINE void narrow(Bf16* p, float v) { p->bits = float_to_bfloat16(v); }
VOXCONV_INLINE void narrow(F16* p, float v) { p->bits = float_to_half(v); }

// x - 0 is x whatever it is, and compiles to a broadcast.
VOXCONV_INLINE Vec<float> broadcast(float x) { return x - Vec<float>{}; }
VOXCONV_INLINE Vec<double> broadcast(double x) { return x - Vec<double>{}; }

// p[0] in the even lanes, p[1] in the odd ones.
VOXCONV_INLINE Vec<float> broadcast_two(const float* p) {
  typedef int64_t Pairs __attribute__((vector_size(kVectorBytes)));
  int64_t both;
  __builtin_memcpy(&both, p, sizeof both);
  return (Vec<float>)(Pairs{} + both);
}
VOXCONV_INLINE Vec<double> broadcast_two(const double* p) {
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = p[i % 2];
  return v;
}

template <class T>
struct IndexOf {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IndexOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

// Lane l takes part if bit l is set. Multiply-adds leave the others' sums alone where the processor
// can do that, and add zeros to them where it cannot: then cells are `masked` before.
#if VOXCONV_VECTOR_BYTES == 64
template <class T>
using LaneMask = uint16_t;
template <class T>
VOXCONV_INLINE LaneMask<T> lane_mask(uint16_t bits) {
  return bits;
}
constexpr bool kFreeMasks = true;
template <class V>
VOXCONV_INLINE V masked(uint16_t, V v) {
  return v;
}
template <class V>
VOXCONV_INLINE V multiply_add_where(uint16_t mask, V sum, V a, V b) {
  if constexpr (sizeof(sum[0]) == sizeof(float))
    asm volatile("vfmadd231ps %2, %1, %0%{%3%}" : "+v"(sum) : "v"(a), "v"(b), "Yk"(mask));
  else
    asm volatile("vfmadd231pd %2, %1, %0%{%3%}" : "+v"(sum) : "v"(a), "v"(b), "Yk"(mask));
  return sum;
}
#else
template <class T>
using LaneMask = typename IndexOf<T>::type;
template <class T>
struct LaneMasks {
  decltype(LaneMask<T>{}[0] + 0) of[1 << kLanes<T>][kLanes<T>];
};
template <class T>
constexpr LaneMasks<T> make_lane_masks() {
  LaneMasks<T> masks{};
  for (int bits = 0; bits < 1 << kLanes<T>; ++bits)
    for (int l = 0; l < kLanes<T>; ++l) masks.of[bits][l] = bits & 1 << l ? -1 : 0;
  return masks;
}
template <class T>
alignas(kVectorBytes) constexpr LaneMasks<T> kLaneMasks = make_lane_masks<T>();
template <class T>
VOXCONV_INLINE LaneMask<T> lane_mask(uint16_t bits) {
  LaneMask<T> mask;
  __builtin_memcpy(&mask, kLaneMasks<T>.of[bits], sizeof mask);
  return mask;
}
constexpr bool kFreeMasks = false;
template <class M, class V>
VOXCONV_INLINE V masked(M mask, V v) {
  return (V)((M)v & mask);
}
template <class M, class V>
VOXCONV_INLINE V multiply_add_where(M, V sum, V a, V b) {
  return multiply_add(sum, a, b);
}
#endif

template <class T>
constexpr uint16_t kAllLanes = static_cast<uint16_t>((1 << kLanes<T>)-1);

#include "simd_copy.h"

template <class U>
void clear(U* cells, int64_t count) {
  for (int64_t i = 0; i < count; ++i) cells[i] = U{};
}

template <int S, int L, class I, class V>
VOXCONV_INLINE void exchange(V& a, V& b) {
  I low, high;
  for (int l = 0; l < L; ++l) {
    low[l] = (l & S) ? L + l - S : l;
    high[l] = (l & S) ? L + l : l + S;
  }
  const V lower = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = lower;
}

// rows[i][j] <-> rows[j][i] of a square of kLanes<T>, by log2(kLanes) rounds of block exchanges.
template <class T>
VOXCONV_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  using I = typename IndexOf<T>::type;
  auto round = [&](auto s) VOXCONV_INLINE_LAMBDA {
    constexpr int S = 1 << decltype(s)::value;
    if constexpr (S < L)
      unroll<L>([&](auto i) VOXCONV_INLINE_LAMBDA {
        constexpr int at = decltype(i)::value;
        if constexpr (!(at & S)) exchange<S, L, I>(rows[at], rows[at + S]);
      });
  };
  unroll<4>(round);
}
