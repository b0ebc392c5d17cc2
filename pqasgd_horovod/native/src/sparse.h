// Which numbers of a block are kept, and how it is written where they were: positions are in rising order, and the same on every
// instruction set. docs/architecture.md is the specification.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace pqasgd {
namespace PQ_ISA {

constexpr int kMostPositions = kMaxBlock + W;  // room for a whole vector after the last one

// ---- the largest ----

// How many of a[0, W * vectors) are at least t.
PQ_INLINE int64_t count_at_least(const int32_t* a, int64_t vectors, int32_t t) {
  vi n[2] = {};
  int64_t i = 0;
  for (; i + 2 <= vectors; i += 2)
    for (int k = 0; k < 2; ++k) n[k] = n[k] - (vi)(load<vi>(a + (i + k) * W) >= set1(t));
  if (i < vectors) n[0] = n[0] - (vi)(load<vi>(a + i * W) >= set1(t));
  const vi all = n[0] + n[1];
  int64_t count = 0;
  for (int k = 0; k < W; ++k) count += all[k];
  return count;
}

// A range of thresholds: `at_least` >= k numbers reach low, fewer than k reach high.
struct Bound {
  int32_t low, high;
  int64_t at_least;
  // Halves the range until exactly k numbers reach low, or until it is no wider than asked for.
  void tighten(const int32_t* a, int64_t vectors, int64_t k, int32_t width) {
    while (at_least > k && high - low > width) {
      const int32_t middle = low + (high - low) / 2;
      const int64_t count = count_at_least(a, vectors, middle);
      if (count >= k) {
        low = middle;
        at_least = count;
      } else {
        high = middle;
      }
    }
  }
};

// The magnitudes of v[0, padded) that are at least t, as integers, and where they are; returns how many.
PQ_INLINE int64_t collect(const float* v, int64_t padded, int32_t t, int32_t* magnitudes, int32_t* positions) {
  int64_t count = 0;
#if defined(__AVX512F__)
  vi lanes;
  for (int k = 0; k < W; ++k) lanes[k] = k;
  for (int64_t i = 0; i < padded; i += W) {
    const __m512i magnitude = (__m512i)(bits(load<vf>(v + i)) & 0x7fffffff);
    const __mmask16 mask = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(t));
    if (!mask) continue;
    _mm512_storeu_si512(magnitudes + count, _mm512_maskz_compress_epi32(mask, magnitude));
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(mask, (__m512i)(lanes + (int32_t)i)));
    count += __builtin_popcount(mask);
  }
#elif defined(__AVX2__)
  for (int64_t i = 0; i < padded; i += W) {
    const vi magnitude = bits(load<vf>(v + i)) & 0x7fffffff;
    const uint32_t mask = (uint32_t)_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32((__m256i)magnitude, _mm256_set1_epi32(t - 1)));
    if (!mask) continue;
    const uint64_t bytes = _pext_u64(0x0706050403020100, _pdep_u64(mask, 0x0101010101010101) * 0xff);
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
    store(magnitudes + count, (vi)_mm256_permutevar8x32_epi32((__m256i)magnitude, order));
    store(positions + count, (vi)order + (int32_t)i);
    count += __builtin_popcount(mask);
  }
#else
  for (int64_t i = 0; i < padded; ++i) {
    int32_t magnitude;
    std::memcpy(&magnitude, v + i, 4);
    magnitudes[count] = magnitude &= 0x7fffffff;
    positions[count] = (int32_t)i;
    count += magnitude >= t;
  }
#endif
  return count;
}

// The k numbers of largest magnitude, of equal ones the first; `v` is padded with zeros to a multiple of 64. False if one is NaN or Inf.
//
// The k-th largest of the maxima of small groups is a bound: k numbers at least reach it, and not many more. Those alone are looked at
// further. The elements of a group lie apart, so that neither rows nor columns of large numbers fall into one.
inline bool select_largest(const float* v, int64_t padded, int64_t k, int32_t* positions) {
  alignas(64) int32_t magnitudes[kMostPositions];
  const int64_t vectors = padded / W, groups = std::min(vectors, (4 * k + W - 1) / W);
  std::fill(magnitudes, magnitudes + groups * W, 0);
  for (int64_t i = 0, row = 0; i < vectors; ++row)
    for (int64_t j = 0, group = row % groups; j < groups && i < vectors; ++i, ++j, group = group + 1 < groups ? group + 1 : 0)
      store(magnitudes + group * W, max(load<vi>(magnitudes + group * W), bits(load<vf>(v + i * W)) & 0x7fffffff));
  vi top = load<vi>(magnitudes), bottom = top;
  for (int64_t i = 1; i < groups; ++i) {
    top = max(top, load<vi>(magnitudes + i * W));
    bottom = min(bottom, load<vi>(magnitudes + i * W));
  }
  int32_t largest = 0, smallest = INT32_MAX;
  for (int j = 0; j < W; ++j) {
    largest = std::max(largest, top[j]);
    smallest = std::min(smallest, bottom[j]);
  }
  if (largest >= 0x7f800000) return false;

  Bound bound{smallest, largest + 1, groups * W};
  bound.tighten(magnitudes, groups, k, groups == vectors ? 1 : 1 << 15);
  const int64_t count = collect(v, padded, bound.low, magnitudes, positions);
  const int64_t filled = (count + W - 1) / W;
  std::fill(magnitudes + count, magnitudes + filled * W, -1);
  bound = {bound.low, largest + 1, count};
  bound.tighten(magnitudes, filled, k, 1);

  int64_t kept = 0;
  if (bound.at_least > k) {  // of those that equal the threshold the last ones are left out
    int64_t equal = k - count_at_least(magnitudes, filled, bound.low + 1);
    for (int64_t i = 0; i < count; ++i)
      if (magnitudes[i] == bound.low && equal-- <= 0) magnitudes[i] = -1;
  }
  for (int64_t i = 0; i < count; ++i) {
    positions[kept] = positions[i];
    kept += magnitudes[i] >= bound.low;
  }
  return true;
}

// ---- at random ----

// One position in each of k cells of n / k elements, all of them turned by one random number.
inline void draw(uint64_t key, uint32_t block, int64_t n, int64_t k, int32_t* positions) {
  const uint32_t size = (uint32_t)(n / k), rest = (uint32_t)(n % k);
  uint32_t begin = 0, error = 0, turn = 0;
  int64_t first = k;  // the first one that was turned past the end
  for (int64_t i = -1; i < k;) {
    alignas(64) uint32_t words[32];
    const Words drawn = threefry16(key, 0x40000000u + 16 * (uint32_t)((i + 1) / 32), block);
    for (int h = 0; h < 16 / W; ++h) {
      store(words + h * W, drawn.w0[h]);
      store(words + 16 + h * W, drawn.w1[h]);
    }
    for (int w = 0; w < 32 && i < k; ++w, ++i) {
      if (i < 0) {
        turn = (uint32_t)((uint64_t)words[w] * (uint64_t)n >> 32);
        continue;
      }
      error += rest;
      const uint32_t end = begin + size + (error >= (uint32_t)k);
      error -= error >= (uint32_t)k ? (uint32_t)k : 0;
      const uint32_t at = begin + (uint32_t)((uint64_t)words[w] * (end - begin) >> 32) + turn;
      begin = end;
      if (at >= n && first == k) first = i;
      positions[i] = (int32_t)(at >= n ? at - n : at);
    }
  }
  std::rotate(positions, positions + first, positions + k);
}

// ---- positions to bits and back ----

// Words of 64 bits that hold every block's positions, and one more.
constexpr int kIndexWords = kMaxBlock / 64 + 1;

inline void write_positions(const int32_t* positions, const IndexCode& code, uint8_t* out) {
  uint64_t words[kIndexWords] = {};
  const int low_bits = code.low_bits;
  if (low_bits) {
    uint64_t filled = 0;
    int bits = 0, word = 0;
    for (int64_t i = 0; i < code.kept; ++i) {
      const uint64_t low = (uint64_t)positions[i] & ((1u << low_bits) - 1);
      filled |= low << bits;
      bits += low_bits;
      if (bits >= 64) {
        words[word++] = filled;
        bits -= 64;
        filled = low >> (low_bits - bits);
      }
    }
    words[word] = filled;
  }
  const int64_t begin = code.kept * low_bits, step = low_bits != 0;
  int64_t word = begin / 64;
  uint64_t ones = words[word];
  for (int64_t i = 0; i < code.kept; ++i) {
    const int64_t bit = begin + (positions[i] >> low_bits) + step * i;
    if (bit / 64 != word) {
      words[word] = ones;
      word = bit / 64;
      ones = 0;
    }
    ones |= uint64_t{1} << (bit % 64);
  }
  words[word] = ones;
  std::memcpy(out, words, (size_t)code.nbytes);
}

// False for what write_positions never writes: another number of ones, positions that do not rise, or are beyond the block.
inline bool read_positions(const uint8_t* in, int64_t n, const IndexCode& code, int32_t* positions) {
  uint64_t words[kIndexWords];
  const int64_t num_words = (code.nbytes + 7) / 8, begin = code.kept * code.low_bits;
  words[num_words - 1] = words[num_words] = 0;
  std::memcpy(words, in, (size_t)code.nbytes);
  const uint32_t mask = (1u << code.low_bits) - 1;
  int64_t i = 0, before = -1;
  for (int64_t word = begin / 64; word < num_words; ++word) {
    uint64_t ones = words[word];
    if (word == begin / 64) ones = ones >> (begin % 64) << (begin % 64);
    for (; ones; ones &= ones - 1, ++i) {
      if (i == code.kept) return false;
      const int64_t one = 64 * word + __builtin_ctzll(ones);
      int64_t position = one;
      if (code.low_bits) {
        const int64_t at = i * code.low_bits;
        uint32_t low;
        std::memcpy(&low, (const char*)words + at / 8, 4);
        position = (one - begin - i) << code.low_bits | (low >> (at % 8) & mask);
      }
      if (position <= before || position >= n) return false;
      positions[i] = (int32_t)(before = position);
    }
  }
  return i == code.kept;
}

}  // namespace PQ_ISA
}  // namespace pqasgd
