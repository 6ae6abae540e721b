// Sixteen numbers at a time: fp32 or bf16 in memory, fp32 in between.
//
// No torch header is included: the library speaks in pointers and sizes, so it compiles in seconds, with any torch. The
// vectors are those of GCC, which every processor can run; it cuts them to the width that there is. Sixteen lanes on every
// machine, so sums are added up in the same order on all of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using i64 = std::int64_t;
constexpr i64 LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
  std::uint16_t bits;
};

// How many lanes of a vector are in memory: all, or those that are left at the end of a row.
struct All {
  static constexpr i64 count = LANES;
};
struct Some {
  i64 count;
};

// f(i, width) for i = 0, 16, 32, ... below n
template <class F>
static inline void each(i64 n, F f) {
  i64 i = 0;
  for (; i + LANES <= n; i += LANES) f(i, All{});
  if (i < n) f(i, Some{n - i});
}

template <class W>
static inline Floats load(const float* from, W width) {
  Floats x = {};
  std::memcpy(&x, from, width.count * sizeof(float));
  return x;
}

template <class W>
static inline Floats load(const bf16* from, W width) {
  Halves x = {};
  std::memcpy(&x, from, width.count * sizeof(bf16));
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

template <class W>
static inline void store(float* to, Floats x, W width) {
  std::memcpy(to, &x, width.count * sizeof(float));
}

// Rounds to nearest, ties to even. A NaN stays one: adding to its bits could make it an infinity.
template <class W>
static inline void store(bf16* to, Floats x, W width) {
#ifdef __AVX512BF16__
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
#else
  Words bits = (Words)x;
  Words numbers = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Halves rounded = __builtin_convertvector((x == x) ? numbers : ((bits >> 16) | 0x40u), Halves);
#endif
  std::memcpy(to, &rounded, width.count * sizeof(bf16));
}

// Asks for all of some rows at once, before they are gone through piece by piece: the processor would not see them coming.
template <class T>
static inline void fetch(const T* from, i64 stride, i64 rows, i64 width) {
  constexpr i64 line = 64 / sizeof(T);
  for (i64 row = 0; row < rows; row++)
    for (i64 i = 0; i < width; i += line) __builtin_prefetch(from + row * stride + i);
}

static inline Floats all(float x) { return x - Floats{}; }

static inline float sum(Floats x) {
  x += __builtin_shuffle(x, Ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  x += __builtin_shuffle(x, Ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  x += __builtin_shuffle(x, Ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  return x[0] + x[1];
}

// The numbers first, first + 1, ...
static inline Ints count_from(i64 first) {
  return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + std::int32_t(first);
}

// e^x, to 2e-7 of it; below e^-87 and above e^88 it stays at these.
static inline Floats exponential(Floats x) {
  const Floats magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  x = x < all(-87.f) ? all(-87.f) : x;
  x = x > all(88.f) ? all(88.f) : x;
  Floats shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;  // ln 2 in two parts, and the polynomial for e^r with |r| <= ln(2) / 2, of Cephes
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return p * (Floats)(((Ints)shifted + 127) << 23);
}

static inline float exponential(float x) { return exponential(all(x))[0]; }

// 1 / x for x >= 1, to 1e-7 of it
static inline Floats reciprocal(Floats x) {
#ifdef __AVX512F__
  Floats r = (Floats)_mm512_rcp14_ps((__m512)x);
  return r * (2.f - x * r);  // a step of Newton's method; a division takes three times as long
#else
  return 1.f / x;
#endif
}

static inline Floats sigmoid(Floats x) { return reciprocal(1.f + exponential(-x)); }

// Calls f<float> or f<bf16>: every exported function takes `is_bf16` first.
#define FOR_TYPE(is_bf16, ...) \
  do {                          \
    if (is_bf16) {              \
      using T = bf16;           \
      __VA_ARGS__;              \
    } else {                    \
      using T = float;          \
      __VA_ARGS__;              \
    }                           \
  } while (0)
