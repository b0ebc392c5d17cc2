// Payloads, which begin at any address: numbers and codes from their bytes, and back.
#pragma once
#include "group.h"

namespace pqasgd {
namespace gpu {

__device__ inline bool is_aligned(const void* p, int nbytes) { return ((uintptr_t)p & (uintptr_t)(nbytes - 1)) == 0; }

// The low `nbytes` of a word, in few stores where the address allows it.
__device__ inline void store_bytes(uint8_t* out, uint64_t word, int nbytes) {
  if (nbytes % 4 == 0 && is_aligned(out, 4)) {
    *(uint32_t*)out = (uint32_t)word;
    if (nbytes == 8) *(uint32_t*)(out + 4) = (uint32_t)(word >> 32);
  } else if (nbytes % 2 == 0 && is_aligned(out, 2)) {
    for (int k = 0; k < nbytes; k += 2) *(uint16_t*)(out + k) = (uint16_t)(word >> (8 * k));
  } else {
    for (int k = 0; k < nbytes; ++k) out[k] = (uint8_t)(word >> (8 * k));
  }
}
// The next `nbytes`, 8 at most.
__device__ inline uint64_t load_bytes(const uint8_t* in, int nbytes) {
  if (nbytes % 4 == 0 && is_aligned(in, 4)) {
    const uint64_t word = *(const uint32_t*)in;
    return nbytes == 8 ? word | (uint64_t)*(const uint32_t*)(in + 4) << 32 : word;
  }
  uint64_t word = 0;
  if (nbytes % 2 == 0 && is_aligned(in, 2)) {
    for (int k = 0; k < nbytes; k += 2) word |= (uint64_t)*(const uint16_t*)(in + k) << (8 * k);
  } else {
    for (int k = 0; k < nbytes; ++k) word |= (uint64_t)in[k] << (8 * k);
  }
  return word;
}

// The own words of an array at any address, 2 bytes each or 4.
template <class Group, class Word>
__device__ inline void read_words(const uint8_t* in, int n, uint32_t (&words)[kPerThread]) {
  if (is_aligned(in, sizeof(Word))) return read_own<Group>((const Word*)in, n, words);
  const uint8_t* const own = in + Group::first() * sizeof(Word);
  each_own([&](int k) { words[k] = 0; });
  each_within<Group>(n, [&](int k, int step) { words[k] = (uint32_t)load_bytes(own + step * sizeof(Word), sizeof(Word)); });
}
template <class Group, class Word>
__device__ inline void write_words(const uint32_t (&words)[kPerThread], int n, uint8_t* out) {
  if (is_aligned(out, sizeof(Word))) return write_own<Group>(words, n, (Word*)out);
  uint8_t* const own = out + Group::first() * sizeof(Word);
  each_within<Group>(n, [&](int k, int step) { store_bytes(own + step * sizeof(Word), words[k], sizeof(Word)); });
}

// f(bits): widths that divide a byte are known to the compiler in it, so that loops over codes have no shifts to work out.
template <int kBits>
struct Bits {
  PQ_BOTH constexpr operator int() const { return kBits; }
};
template <class F>
__device__ inline void with_bits(int bits, F f) {
  switch (bits) {
    case 1: return f(Bits<1>());
    case 2: return f(Bits<2>());
    case 4: return f(Bits<4>());
    case 8: return f(Bits<8>());
    default: return f(bits);
  }
}

struct alignas(8) Eight {
  uint32_t words[2];
};

// n codes, one a byte in shared memory, to ceil(n * bits / 8) bytes; those from n to the next multiple of 8 are 0.
template <class Group, class Width>
__device__ inline void pack(const uint8_t* codes, int n, Width bits, uint8_t* out) {
  const int nbytes = (n * bits + 7) / 8;
  for (int eight = Group::thread(); eight * 8 < n; eight += Group::threads()) {
    Eight codes_of = *(const Eight*)(codes + 8 * eight);  // one access, which memcpy would not be
    for (uint32_t& word : codes_of.words) {
      word = (word & 0x00ff00ff) | (word & 0xff00ff00) >> (8 - bits);
      word = (word & 0xffff) | word >> 16 << (2 * bits);
    }
    const int at = eight * bits;
    const uint64_t packed = codes_of.words[0] | (uint64_t)codes_of.words[1] << (4 * bits);
    if (at + bits <= nbytes) store_bytes(out + at, packed, bits);
    else
#pragma unroll 1
      for (int k = 0; k < nbytes - at; ++k) out[at + k] = (uint8_t)(packed >> (8 * k));
  }
}

// One bit for each number: bit(k) of the thread's own, 0 for those past the end, to ceil(n / 8) bytes.
template <class Group, class F>
__device__ inline void pack_bits(int n, uint8_t* out, F bit) {
  const int in_warp = Group::thread() % kWarp, first = Group::first() - in_warp;
  uint32_t mine = 0;
  each_own([&](int k) {
    const uint32_t word = __ballot_sync(kAllLanes, bit(k));
    if (in_warp == k) mine = word;
  });
  const int at = (first + in_warp * Group::kStep) / 8, room = (n + 7) / 8 - at;
  if (in_warp < kPerThread && room > 0) store_bytes(out + at, mine, room < 4 ? room : 4);
}

// f(k, code) for the thread's own numbers of [0, n), and with 0 for those past the end. In the bytes that codes begin in they are
// equally far from the first bit.
template <class Group, class Width, class F>
__device__ inline void each_code(const uint8_t* in, int n, Width bits, F f) {
  const int first = Group::first() * bits, shift = first % 8;
  const uint32_t mask = (1u << bits) - 1;
  uint32_t words[kPerThread] = {};
  in += first / 8;
  if (8 % bits == 0) {
    each_within<Group>(n, [&](int k, int step) { words[k] = in[step / 8 * bits]; });
  } else {  // codes that lie in two bytes; the address goes on, for sixteen take too many registers
    const int left = n - Group::first();
    each_own([&](int k) {
      if (k * Group::kStep < left) {
        words[k] = in[0];
        if (shift + bits > 8) words[k] |= (uint32_t)in[1] << 8;
      }
      in += Group::kStep / 8 * bits;
    });
  }
  each_own([&](int k) { f(k, words[k] >> shift & mask); });
}

}  // namespace gpu
}  // namespace pqasgd
