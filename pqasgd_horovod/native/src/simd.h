// Vectors of the native width. Semantics never depend on the width: whatever is summed has 64 lanes, whatever is random has 16.
// Compiled once per instruction set inside namespace PQ_ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pqasgd {
namespace PQ_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

#define PQ_INLINE inline __attribute__((always_inline))

template <class V, class T>
PQ_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
PQ_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
PQ_INLINE vf set1(float x) { return x - vf{}; }  // x - (+0) keeps every x, -0 included
PQ_INLINE vi set1(int32_t x) { return x + vi{}; }
PQ_INLINE vu set1(uint32_t x) { return x + vu{}; }

PQ_INLINE vi bits(vf x) { return (vi)x; }
PQ_INLINE vf from_bits(vi x) { return (vf)x; }
PQ_INLINE vf abs(vf x) { return from_bits(bits(x) & 0x7fffffff); }

#if defined(__AVX512F__)
PQ_INLINE vi max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
PQ_INLINE vi min(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
PQ_INLINE vf to_float(vi a) { return (vf)_mm512_cvtepi32_ps((__m512i)a); }
PQ_INLINE vi truncate(vf a) { return (vi)_mm512_cvttps_epi32((__m512)a); }
PQ_INLINE vf clamp(vf x, float limit) {
  return (vf)_mm512_max_ps(_mm512_min_ps((__m512)x, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit));
}
PQ_INLINE void store_bytes(uint8_t* p, vi x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x)); }
PQ_INLINE vi load_bytes(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
PQ_INLINE uint32_t sign_bits(vi x) { return _mm512_movepi32_mask((__m512i)x); }
PQ_INLINE vi count_if_at_least(vi n, vf x, vf threshold) {  // n + (x >= threshold)
  return (vi)_mm512_mask_add_epi32((__m512i)n, _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_GE_OQ), (__m512i)n,
                                   _mm512_set1_epi32(1));
}
#elif defined(__AVX2__)
PQ_INLINE vi max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
PQ_INLINE vi min(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
PQ_INLINE vf to_float(vi a) { return (vf)_mm256_cvtepi32_ps((__m256i)a); }
PQ_INLINE vi truncate(vf a) { return (vi)_mm256_cvttps_epi32((__m256)a); }
PQ_INLINE vf clamp(vf x, float limit) {
  return (vf)_mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(limit)), _mm256_set1_ps(-limit));
}
PQ_INLINE void store_bytes(uint8_t* p, vi x) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
PQ_INLINE vi load_bytes(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
PQ_INLINE uint32_t sign_bits(vi x) { return (uint32_t)_mm256_movemask_ps((__m256)x); }
PQ_INLINE vf gather(const float* table, vi index) { return (vf)_mm256_i32gather_ps(table, (__m256i)index, 4); }
PQ_INLINE vi gather(const int32_t* table, vi index) { return (vi)_mm256_i32gather_epi32(table, (__m256i)index, 4); }
PQ_INLINE vi count_if_at_least(vi n, vf x, vf threshold) { return n - (vi)(x >= threshold); }
#else
PQ_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
PQ_INLINE vi min(vi a, vi b) { return a < b ? a : b; }
PQ_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
PQ_INLINE vi truncate(vf a) { return __builtin_convertvector(a, vi); }
PQ_INLINE vf clamp(vf x, float limit) {
  x = x < limit ? x : set1(limit);
  return x > -limit ? x : set1(-limit);
}
PQ_INLINE void store_bytes(uint8_t* p, vi x) {
  for (int k = 0; k < W; ++k) p[k] = (uint8_t)x[k];
}
PQ_INLINE vi load_bytes(const uint8_t* p) {
  vi x;
  for (int k = 0; k < W; ++k) x[k] = p[k];
  return x;
}
PQ_INLINE uint32_t sign_bits(vi x) {
  uint32_t bits = 0;
  for (int k = 0; k < W; ++k) bits |= (uint32_t)x[k] >> 31 << k;
  return bits;
}
template <class T>
PQ_INLINE auto gather(const T* table, vi index) {
  typename std::conditional<std::is_same<T, float>::value, vf, vi>::type x;
  for (int k = 0; k < W; ++k) x[k] = table[index[k]];
  return x;
}
PQ_INLINE vi count_if_at_least(vi n, vf x, vf threshold) { return n - (vi)(x >= threshold); }
#endif

// one in the lanes whose bit is 1, zero in the others; bits past the lanes are ignored.
PQ_INLINE vf choose(uint32_t bits, float zero, float one) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_blend_ps((__mmask16)bits, (__m512)set1(zero), (__m512)set1(one));
#else
  vi lane;
  for (int k = 0; k < W; ++k) lane[k] = 1 << k;
  return (set1((int32_t)bits) & lane) == lane ? set1(one) : set1(zero);
#endif
}

// Tables of up to 2^kRegisterBits numbers are looked up in registers: gathers cost several times that.
#if defined(__AVX512F__)
constexpr int kRegisterBits = 7;
#elif defined(__AVX2__)
constexpr int kRegisterBits = 3;
#else
constexpr int kRegisterBits = -1;
#endif

// table[index] of 2^kBits numbers. In registers higher bits of the index are ignored; for that a table shorter than
// a register has to repeat itself.
template <int kBits>
PQ_INLINE vf lookup(const float* table, vi index) {
#if defined(__AVX512F__)
  static_assert(kBits <= kRegisterBits);
  if constexpr (kBits <= 4) {
    return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
  } else if constexpr (kBits == 5) {
    return (vf)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index, _mm512_load_ps(table + 16));
  } else {
    const vf low = lookup<kBits - 1>(table, index), high = lookup<kBits - 1>(table + (1 << (kBits - 1)), index);
    const __mmask16 upper = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(1 << (kBits - 1)));
    return (vf)_mm512_mask_blend_ps(upper, (__m512)low, (__m512)high);
  }
#elif defined(__AVX2__)
  if constexpr (kBits <= kRegisterBits) return (vf)_mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
  else return gather(table, index);
#else
  return gather(table, index);
#endif
}

// In each pair of lanes that differ in bit S of their index: (a, b) -> (a + b, a - b).
template <int S>
PQ_INLINE vf butterfly_lanes(vf x) {
#if defined(__AVX512F__)
  __m512 swapped;
  if constexpr (S == 1) swapped = _mm512_permute_ps((__m512)x, 0xB1);
  else if constexpr (S == 2) swapped = _mm512_permute_ps((__m512)x, 0x4E);
  else if constexpr (S == 4) swapped = _mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xB1);
  else swapped = _mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4E);
  vf sign;
  for (int k = 0; k < W; ++k) sign[k] = (k & S) ? -1.0f : 1.0f;
  return (vf)_mm512_fmadd_ps((__m512)x, (__m512)sign, swapped);  // the product is exact: one rounding, as written
#else
  vi index, flip;
  for (int k = 0; k < W; ++k) {
    index[k] = k ^ S;
    flip[k] = (k & S) ? INT32_MIN : 0;
  }
  return __builtin_shuffle(x, index) + from_bits(bits(x) ^ flip);
#endif
}

// sum64 of docs/architecture.md: 64 running sums, then halves are folded.
struct Sum64 {
  static constexpr int N = 64 / W;
  vf lane[N];
  PQ_INLINE Sum64() {
    for (auto& v : lane) v = vf{};
  }
  PQ_INLINE float fold() const {
    alignas(64) float s[64];
    for (int k = 0; k < N; ++k) store(s + k * W, lane[k]);
    for (int half = 32; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) s[k] = s[k] + s[k + half];
    return s[0];
  }
};

// Sixteen lanes of Threefry-2x32-13 at once: counters (c0 + lane, c1).
struct Words {
  vu w0[16 / W], w1[16 / W];
};
PQ_INLINE Words threefry16(uint64_t key, uint32_t c0, uint32_t c1) {
  constexpr int kRotation[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  const uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  const uint32_t schedule[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  Words out;
  for (int h = 0; h < 16 / W; ++h) {
    vu lane;
    for (int k = 0; k < W; ++k) lane[k] = (uint32_t)(h * W + k);
    vu x0 = lane + (c0 + schedule[0]), x1 = set1(c1 + schedule[1]);
#pragma GCC unroll 13
    for (int r = 0; r < 13; ++r) {
      x0 = x0 + x1;
      x1 = ((x1 << kRotation[r % 8]) | (x1 >> (32 - kRotation[r % 8]))) ^ x0;
      if (r % 4 == 3) {
        const int i = r / 4 + 1;
        x0 = x0 + schedule[i % 3];
        x1 = x1 + (schedule[(i + 1) % 3] + (uint32_t)i);
      }
    }
    out.w0[h] = x0;
    out.w1[h] = x1;
  }
  return out;
}

// uniform16 of one group of 64 elements, as integers below 65536; u[v * (16 / W) + h].
PQ_INLINE void uniform16(uint64_t key, uint32_t group, uint32_t block, vi* u) {
  constexpr int H = 16 / W;
  const Words w = threefry16(key, 16 * group, block);
  for (int h = 0; h < H; ++h) {
    u[0 * H + h] = (vi)(w.w0[h] & 0xffffu);
    u[1 * H + h] = (vi)(w.w0[h] >> 16);
    u[2 * H + h] = (vi)(w.w1[h] & 0xffffu);
    u[3 * H + h] = (vi)(w.w1[h] >> 16);
  }
}

// Asks for memory that is read soon, so that it comes while arithmetic goes on. It may lie past the caller's.
PQ_INLINE void prefetch(const void* p, int64_t nbytes) {
  for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch((const char*)p + i);
}
// destination += x, and the numbers about a block ahead are asked for.
PQ_INLINE void add_to(float* destination, vf x) {
  prefetch(destination + 1024, 1);
  store(destination, load<vf>(destination) + x);
}

// memcpy past the caches, for what is larger than they are: the destination is not read first.
PQ_INLINE void stream_copy(float* to, const float* from, int64_t n) {
#if defined(__AVX2__)
  int64_t i = 0;
  for (; i < n && ((uintptr_t)(to + i) & (4 * W - 1)); ++i) to[i] = from[i];
  for (; i + W <= n; i += W) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#else
    _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
#endif
  }
  for (; i < n; ++i) to[i] = from[i];
  _mm_sfence();
#else
  std::memcpy(to, from, (size_t)n * 4);
#endif
}

// n numbers, any n; the vector loops handle whole vectors and the scalar ones the rest.
PQ_INLINE void halves_to_floats(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(in[i]);
}
PQ_INLINE void floats_to_halves(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256((__m256i*)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) out[i] = float_to_half(in[i]);
}
PQ_INLINE void bfloats_to_floats(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat_to_float(in[i]);
}
PQ_INLINE void floats_to_bfloats(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat(in[i]);
}

}  // namespace PQ_ISA
}  // namespace pqasgd
