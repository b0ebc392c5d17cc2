// Keys and single random words; keys.py is the specification. Streams of many words are in simd.h.
#pragma once
#include <cstdint>

#include "on_device.h"

namespace pqasgd {

struct alignas(8) Pair {
  uint32_t x0, x1;
};

constexpr uint32_t kKeyRounds = 20, kStreamRounds = 13, kWordCounter = 0x40000000u;

template <uint32_t kRounds>
PQ_BOTH inline Pair threefry(uint64_t key, uint32_t c0, uint32_t c1) {
  constexpr int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  const uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32), k[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  uint32_t x0 = c0 + k[0], x1 = c1 + k[1];
  for (uint32_t r = 0; r < kRounds; ++r) {
    const int turn = rotations[r % 8];
    x0 += x1;
    x1 = ((x1 << turn) | (x1 >> (32 - turn))) ^ x0;
    if (r % 4 == 3) {
      const uint32_t injection = r / 4 + 1;
      x0 += k[injection % 3];
      x1 += k[(injection + 1) % 3] + injection;
    }
  }
  return {x0, x1};
}

inline uint64_t derive_key(uint64_t seed, uint32_t rank, uint64_t step, uint32_t tensor, uint32_t phase) {
  const auto word = [](Pair p) { return p.x0 | (uint64_t)p.x1 << 32; };
  const uint64_t key = word(threefry<kKeyRounds>(seed, (uint32_t)step, (uint32_t)(step >> 32)));
  return word(threefry<kKeyRounds>(key, tensor, rank | phase << 24));
}

// Words 32 g + i and 32 g + 16 + i, i < 16, of a block.
PQ_BOTH inline Pair random_words(uint64_t key, uint32_t block, uint32_t g, uint32_t i) {
  return threefry<kStreamRounds>(key, kWordCounter + 16 * g + i, block);
}

}  // namespace pqasgd
