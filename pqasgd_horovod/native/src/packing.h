// Codes to bits and back: code i of a block occupies bits [i * bits, (i + 1) * bits), lowest first.
#pragma once
#include "simd.h"

namespace pqasgd {
namespace PQ_ISA {

PQ_INLINE uint64_t byte_mask(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

// Eight codes, one a byte, to 8 * bits bits.
PQ_INLINE uint64_t pack8(uint64_t codes, int bits, uint64_t mask) {
#if defined(__BMI2__)
  (void)bits;
  return _pext_u64(codes, mask);
#else
  (void)mask;
  uint64_t packed = 0;
  for (int k = 0; k < 8; ++k) packed |= (codes >> (8 * k) & 0xff) << (k * bits);
  return packed;
#endif
}
PQ_INLINE uint64_t unpack8(uint64_t packed, int bits, uint64_t mask) {
#if defined(__BMI2__)
  (void)bits;
  return _pdep_u64(packed, mask);
#else
  uint64_t codes = 0;
  for (int k = 0; k < 8; ++k) codes |= (packed >> (k * bits) & 0xff) << (8 * k);
  return codes & mask;
#endif
}

#if defined(__AVX512BW__)
// Shuffles that bring the lowest `bits` bytes of eight 64-bit numbers together, and back: bytes in each quarter, and
// words.
struct Shuffles {
  uint8_t gather_bytes[64], spread_bytes[64];
  uint16_t gather_words[32], spread_words[32];
  constexpr explicit Shuffles(int bits) : gather_bytes{}, spread_bytes{}, gather_words{}, spread_words{} {
    for (int k = 0; k < 64; ++k) {
      gather_bytes[k] = (uint8_t)(k % 16 < bits ? k % 16 : k % 16 + 8 - bits);
      spread_bytes[k] = (uint8_t)(k % 8 + k / 8 % 2 * bits);
    }
    for (int k = 0; k < 32; ++k) {
      gather_words[k] = (uint16_t)(k / bits * 8 + k % bits);
      spread_words[k] = (uint16_t)(k / 8 * bits + k % 8);
    }
  }
};
alignas(64) constexpr Shuffles kShuffles[] = {Shuffles(3), Shuffles(4), Shuffles(5), Shuffles(6), Shuffles(7)};

// Bits of a where mask has ones, of b elsewhere.
PQ_INLINE __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xCA); }
#endif

// n codes to ceil(n * bits / 8) bytes. `codes` is readable, and zero, up to the next multiple of 64.
PQ_INLINE void pack(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
  int64_t i = 0;
  const int64_t nbytes = (n * bits + 7) / 8;
  if (bits == 8) {
    std::memcpy(out, codes, (size_t)n);
    return;
  }
#if defined(__AVX512BW__)
  if (bits == 4) {
    const __m512i weights = _mm512_set1_epi16(0x1001);
    for (; i + 64 <= n; i += 64) {
      const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + i), weights);
      _mm256_storeu_si256((__m256i*)(out + i / 2), _mm512_cvtepi16_epi8(pairs));
    }
  } else if (bits == 2) {
    const __m512i weights = _mm512_set1_epi16(0x0401), weights2 = _mm512_set1_epi32(0x00100001);
    for (; i + 64 <= n; i += 64) {
      const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + i), weights);
      _mm_storeu_si128((__m128i*)(out + i / 4), _mm512_cvtepi32_epi8(_mm512_madd_epi16(pairs, weights2)));
    }
  } else if (bits == 1) {
    for (; i + 64 <= n; i += 64) {
      const __m512i x = _mm512_loadu_si512(codes + i);
      const uint64_t word = _mm512_test_epi8_mask(x, x);
      std::memcpy(out + i / 8, &word, 8);
    }
  } else {
    const Shuffles& to = kShuffles[bits - 3];
    const __m512i bytes = _mm512_load_si512(to.gather_bytes), words = _mm512_load_si512(to.gather_words);
    const __m512i pairs = _mm512_set1_epi16((short)(1 | 1 << (8 + bits)));
    const __m512i fours = _mm512_set1_epi32(1 | 1 << (16 + 2 * bits));
    const __m512i low = _mm512_set1_epi64((1ll << 4 * bits) - 1);
    const __m128i gap = _mm_cvtsi32_si128(32 - 4 * bits);
    for (; i + 64 <= n && i / 8 * bits + 64 <= nbytes; i += 64) {
      // Two codes to a word, four to 32 bits, eight to 64; then the gaps between those are closed.
      const __m512i x = _mm512_madd_epi16(_mm512_maddubs_epi16(pairs, _mm512_loadu_si512(codes + i)), fours);
      const __m512i eights = select(low, x, _mm512_srl_epi64(x, gap));
      const __m512i packed = _mm512_permutexvar_epi16(words, _mm512_shuffle_epi8(eights, bytes));
      _mm512_storeu_si512(out + i / 8 * bits, packed);  // the surplus is overwritten by what comes next
    }
  }
#endif
  const uint64_t mask = byte_mask(bits);
  for (; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, codes + i, 8);
    const uint64_t word = pack8(eight, bits, mask);
    const int64_t at = i / 8 * bits, room = nbytes - at;
    if (room >= 8) std::memcpy(out + at, &word, 8);  // the surplus is overwritten by the next eight
    else std::memcpy(out + at, &word, (size_t)room);
  }
}

// The inverse; writes codes up to the next multiple of 8.
PQ_INLINE void unpack(const uint8_t* in, int64_t n, int bits, uint8_t* codes) {
  int64_t i = 0;
  const int64_t nbytes = (n * bits + 7) / 8;
  if (bits == 8) {
    std::memcpy(codes, in, (size_t)n);
    return;
  }
#if defined(__AVX512BW__)
  if (bits == 4) {
    for (; i + 64 <= n; i += 64) {
      const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(in + i / 2)));
      _mm512_storeu_si512(codes + i, _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(15)));
    }
  } else if (bits == 2) {
    for (; i + 64 <= n; i += 64) {
      __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(in + i / 4)));
      x = _mm512_or_si512(x, _mm512_slli_epi32(x, 12));
      x = _mm512_or_si512(x, _mm512_slli_epi32(x, 6));
      _mm512_storeu_si512(codes + i, _mm512_and_si512(x, _mm512_set1_epi8(3)));
    }
  } else if (bits == 1) {
    for (; i + 64 <= n; i += 64) {
      uint64_t word;
      std::memcpy(&word, in + i / 8, 8);
      _mm512_storeu_si512(codes + i, _mm512_maskz_set1_epi8(word, 1));
    }
  } else {
    const Shuffles& to = kShuffles[bits - 3];
    const __m512i bytes = _mm512_load_si512(to.spread_bytes), words = _mm512_load_si512(to.spread_words);
    const __m128i four = _mm_cvtsi32_si128(32 - 4 * bits), two = _mm_cvtsi32_si128(16 - 2 * bits);
    const __m128i one = _mm_cvtsi32_si128(8 - bits);
    for (; i + 64 <= n && i / 8 * bits + 64 <= nbytes; i += 64) {
      __m512i x = _mm512_loadu_si512(in + i / 8 * bits);
      x = _mm512_shuffle_epi8(_mm512_permutexvar_epi16(words, x), bytes);
      x = select(_mm512_set1_epi64(0xffffffff), x, _mm512_sll_epi64(x, four));
      x = select(_mm512_set1_epi32(0xffff), x, _mm512_sll_epi32(x, two));
      x = select(_mm512_set1_epi16(0xff), x, _mm512_sll_epi16(x, one));
      _mm512_storeu_si512(codes + i, _mm512_and_si512(x, _mm512_set1_epi8((char)((1 << bits) - 1))));
    }
  }
#endif
  const uint64_t mask = byte_mask(bits);
  for (; i < n; i += 8) {
    const int64_t at = i / 8 * bits, room = nbytes - at;
    uint64_t word = 0;
    if (room >= 8) std::memcpy(&word, in + at, 8);
    else std::memcpy(&word, in + at, (size_t)room);
    const uint64_t eight = unpack8(word, bits, mask);
    std::memcpy(codes + i, &eight, 8);
  }
}

// Five ternary codes to a byte, planar: byte j holds codes j, j + L, .., j + 4 L, L = ceil(n / 5); codes past n are 0.
PQ_INLINE void pack_ternary(uint8_t* codes, int64_t n, uint8_t* out) {
  const int64_t stride = (n + 4) / 5;
  std::memset(codes + n, 0, (size_t)(5 * stride - n));
  for (int64_t j = 0; j < stride; ++j)
    out[j] = (uint8_t)(codes[j] + 3 * codes[j + stride] + 9 * codes[j + 2 * stride] + 27 * codes[j + 3 * stride] +
                       81 * codes[j + 4 * stride]);
}
PQ_INLINE bool unpack_ternary(const uint8_t* in, int64_t n, uint8_t* codes) {
  const int64_t stride = (n + 4) / 5;
  uint8_t top = 0;
  for (int64_t j = 0; j < stride; ++j) {
    uint32_t x = in[j];
    top = top > in[j] ? top : in[j];
    for (int k = 0; k < 5; ++k) {
      const uint32_t third = x * 171 >> 9;  // x / 3 for x < 256
      codes[j + k * stride] = (uint8_t)(x - 3 * third);
      x = third;
    }
  }
  return top <= 242;
}

}  // namespace PQ_ISA
}  // namespace pqasgd
