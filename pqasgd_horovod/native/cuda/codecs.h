// The codecs that are not sparse, block by block, as src/kernels.cc has them for a CPU.
//
// encode_block(plan, n, key, block, x, memory, codes, scales, out) -> finite: x are the thread's own numbers, then zeros.
// decode_block(plan, in, n, key, block, scales, weight, memory, add) -> good codes: calls add(k, x) for the thread's own numbers.
// prepare(plan) is called once, before the first block. All threads of a group call these, and what they return is alike on all but
// `good codes`. `memory` is shared, and `codes`, of one byte for each number.
#pragma once
#include <cfloat>
#include <cmath>

#include "bytes.h"
#include "group.h"

namespace pqasgd {
namespace gpu {

#define PQ_TABLE static __constant__
#include "lloyd_max.inc"  // written by the build: kLloydMax[8][128], of b bits in row b - 1

__device__ inline int fraction_bits(int bits) { return bits == 8 ? 15 : 16; }

// (rint(scaled) + u + offset) >> F for |scaled| <= 2^22.
__device__ inline uint8_t level(float scaled, uint32_t u, int32_t offset, int F) {
  const int32_t t = (int32_t)to_bits(scaled + 12582912.0f);  // 1.5 * 2^23 leaves the integer, rounded to even, in the low bits
  return (uint8_t)((t + ((int32_t)(u >> (16 - F)) + (offset - 0x4B400000))) >> F);
}

// The codes of the own numbers, rounded up or down by chance; draws what decides it in `memory`, 2 bytes for each number.
template <class Group>
__device__ inline void round_own(const Numbers& scaled, int32_t offset, int F, uint64_t key, uint32_t block, float* memory, uint8_t* codes) {
  Pair* const words = (Pair*)memory;
  uint8_t* const own_codes = codes + Group::first();
  draw_uniform16<Group>(key, block, words);
  uint32_t u[kPerThread];  // all are read before a code is written
  each_own([&](int k) { u[k] = uniform16<Group>(words, k); });
  if (F == 16) each_own([&](int k) { own_codes[k * Group::kStep] = level(scaled[k], u[k], offset, 16); });
  else each_own([&](int k) { own_codes[k * Group::kStep] = level(scaled[k], u[k], offset, 15); });
}

// An integer below 2^23 as a number, plus an integer: exact, and faster than a conversion.
__device__ inline float plus(uint32_t code, float offset) { return from_bits(0x4B000000u | code) + (offset - 8388608.0f); }

template <class OfThreads>
struct Codec {
  typedef OfThreads Group;  // who works on a block
  // Shared memory for a block of so many numbers.
  static constexpr int encode_nbytes(int) { return 0; }
  static constexpr int decode_nbytes(int) { return 0; }

  static __device__ void prepare(const Plan&) {}
  static __device__ float own(const Plan&, float x, float weight) { return x * weight; }
};

template <class OfThreads>
struct Uniform : Codec<OfThreads> {
  typedef OfThreads Group;
  static constexpr int encode_nbytes(int numbers) { return 2 * numbers; }
  static constexpr int decode_nbytes(int numbers) { return numbers; }

  static __device__ bool encode_block(const Plan& plan, int n, uint64_t key, uint32_t block, const Numbers& x, float* memory,
                                      uint8_t* codes, float* scales, uint8_t* out) {
    const bool ternary = plan.codec.kind == PQ_TERNGRAD, l2 = plan.codec.kind == PQ_QSGD;
    const int bits = ternary ? 2 : plan.codec.bits, F = fraction_bits(bits);
    const int32_t s = (1 << (bits - 1)) - 1;
    float size;
    if (l2) {
      size = Group::sum64([&](int k) { return x[k] * x[k]; });
    } else {
      uint32_t top = 0;
      each_own([&](int k) { top = larger(magnitude(x[k]), top); });
      size = from_bits(group_max<Group>(top));
    }
    if (!(size <= (l2 ? FLT_MAX : 0x1p127f))) return false;
    const bool zero = size < 0x1p-100f;
    if (l2) size = sqrtf(size);
    scales[0] = zero ? 0.0f : size;
    const float limit = (float)(s << F), inv = zero ? 0.0f : limit / size;
    Numbers scaled;
    each_own([&](int k) { scaled[k] = x[k] * inv; });
    if (l2) each_own([&](int k) { scaled[k] = fmaxf(fminf(scaled[k], limit), -limit); });
    round_own<Group>(scaled, s << F, F, key, block, memory, codes);
    Group::meet();
    if (n % 8) {  // those past the end, with which a byte is filled up, are 0
      if (Group::thread() < 8 - n % 8) codes[n + Group::thread()] = 0;
      Group::meet();
    }
    if (!ternary) {
      with_bits(bits, [&](auto width) { pack<Group>(codes, n, width, out); });
    } else {
      const int stride = (n + 4) / 5;
      for (int j = Group::thread(); j < stride; j += Group::threads()) {
        uint32_t byte = 0;
#pragma unroll
        for (int digit = 4; digit >= 0; --digit) byte = byte * 3 + (j + digit * stride < n ? codes[j + digit * stride] : 0);
        out[j] = (uint8_t)byte;
      }
    }
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t, uint32_t, const float* scales, float weight,
                                      float* memory, F add) {
    const bool ternary = plan.codec.kind == PQ_TERNGRAD;
    const int bits = ternary ? 2 : plan.codec.bits;
    const int32_t s = (1 << (bits - 1)) - 1;
    const float gw = scales[0] / (float)s * weight;
    bool good = true;
    if (ternary) {
      uint8_t* const codes = (uint8_t*)memory;
      const int stride = (n + 4) / 5;
      constexpr int kBytes = (kPerThread + 4) / 5;  // of a thread
      uint32_t bytes[kBytes];
#pragma unroll
      for (int k = 0; k < kBytes; ++k) {
        const int j = Group::thread() + k * Group::threads();
        bytes[k] = j < stride ? in[j] : 0;
      }
#pragma unroll
      for (int k = 0; k < kBytes; ++k) {
        const int j = Group::thread() + k * Group::threads();
        good &= bytes[k] <= 242;
        if (j >= stride) continue;
#pragma unroll
        for (int digit = 0; digit < 5; ++digit, bytes[k] /= 3)
          if (j + digit * stride < n) codes[j + digit * stride] = (uint8_t)(bytes[k] % 3);
      }
      Group::meet();
      uint32_t own_codes[kPerThread];
      read_own<Group>(codes, n, own_codes);
      each_own([&](int k) { add(k, plus(own_codes[k], -1.0f) * gw); });
      Group::meet();
    } else {
      with_bits(bits, [&](auto width) {
        each_code<Group>(in, n, width, [&](int k, uint32_t code) {
          good &= code <= 2 * (uint32_t)s;
          add(k, plus(code, (float)-s) * gw);
        });
      });
    }
    return good;
  }
};

// ---- EDEN ----

struct Eden : Codec<Parts> {
  static __device__ int padded(const Plan& plan, int n) { return (int)eden_padded(n, plan.codec.block_size); }

  // Where number i of a block is in shared memory: none of the ways in which a warp reads or writes below comes to a bank twice.
  static PQ_BOTH constexpr int place(int i) { return i + i / 32 * 4 + i / 256 * 16; }
  static constexpr int encode_nbytes(int numbers) { return 4 * place(numbers); }
  static constexpr int decode_nbytes(int numbers) { return 4 * place(numbers); }
  static __device__ float& own_place(float* z, int k) { return z[place(Group::first()) + place(k * Group::kStep)]; }

  // What the codes stand for, up to the scale.
  static __device__ float* values() {
    __shared__ float table[256];
    return table;
  }
  static __device__ void prepare(const Plan& plan) {
    const int bits = plan.codec.bits, levels = 1 << (bits - 1), top = (1 << bits) - 1;
    for (int code = Group::thread(); code <= top; code += Group::threads())
      values()[code] = plan.codec.flags & PQ_STOCHASTIC
                           ? (float)(2 * code - top)
                           : from_bits(to_bits(kLloydMax[bits - 1][code & (levels - 1)]) | (uint32_t)(code >= levels) << 31);
    Group::meet();
  }

  // The random signs of a block, word (i / 512) * 16 + i % 16 has that of number i in bit i / 16 % 32: those of the own numbers.
  struct Signs {
    uint32_t words[2];
    __device__ Signs(uint64_t key, uint32_t block) {
      const Pair drawn = threefry<kStreamRounds>(key, 0x80000000u + (uint32_t)(Group::part() * 16 + Group::lane() % 16), block);
      words[0] = drawn.x0 >> (Group::lane() / 16);
      words[1] = drawn.x1 >> (Group::lane() / 16);
    }
    __device__ float times(float x, int k) const { return from_bits(to_bits(x) ^ (words[k / 8] << (31 - k % 8 * 4) & 0x80000000u)); }
  };

  // One stage of the transform: of numbers h apart in x their sum and their difference.
  template <int h, int R>
  static __device__ void butterfly(float (&x)[R]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (!(r & h)) {
        const float a = x[r], b = x[r + h];
        x[r] = a + b;
        x[r + h] = a - b;
      }
  }

  struct alignas(16) Four {
    float x[4];
  };
  static __device__ float* sixteen(float* z) { return z + place(16 * Group::thread()); }

  // Fast Walsh-Hadamard transform, unnormalised, strides in rising order. Before, x are the numbers 16 threadIdx.x + r of a block
  // of P, after it the thread's own; those past P are what z has there. Every thread calls it; all may write to z when it returns.
  static __device__ void transform(float* z, int P, Numbers& x) {
    const int t = Group::thread(), begin = t / 16 * 256 + t % 16;
    butterfly<1>(x), butterfly<2>(x), butterfly<4>(x), butterfly<8>(x);
    if (16 * t < P) {
#pragma unroll
      for (int r = 0; r < kPerThread; r += 4) *(Four*)(sixteen(z) + r) = {{x[r], x[r + 1], x[r + 2], x[r + 3]}};
    }
    Group::meet();
    if (begin < P) {  // numbers begin + 16 r; past P there is no sense in them, and no harm
#pragma unroll
      for (int r = 0; r < kPerThread; ++r) x[r] = z[place(begin) + place(16 * r)];
      butterfly<1>(x), butterfly<2>(x);
      if (P > 128) butterfly<4>(x), butterfly<8>(x);
      else if (P > 64) butterfly<4>(x);
#pragma unroll
      for (int r = 0; r < kPerThread; ++r) z[place(begin) + place(16 * r)] = x[r];
    }
    Group::meet();
    each_own([&](int k) { x[k] = own_place(z, k); });
    if (P > 512) butterfly<4>(x), butterfly<8>(x);
    else if (P > 256) butterfly<4>(x);
    if (P > Parts::kPart) {
      each_own([&](int k) { own_place(z, k) = x[k]; });
      Group::meet();
      switch (P / Parts::kPart) {
        case 2: between_parts<2>(z); break;
        case 4: between_parts<4>(z); break;
        case 8: between_parts<8>(z); break;
      }
      Group::meet();
      each_own([&](int k) { x[k] = own_place(z, k); });
    }
    Group::meet();
  }

  // The stages of strides 1024 and more, in a block of R parts.
  template <int R>
  static __device__ void between_parts(float* z) {
    for (int i = Group::thread(); i < Parts::kPart; i += Group::threads()) {
      float x[R];
#pragma unroll
      for (int r = 0; r < R; ++r) x[r] = z[place(i + r * Parts::kPart)];
      butterfly<1>(x);
      if constexpr (R > 2) butterfly<2>(x);
      if constexpr (R > 4) butterfly<4>(x);
#pragma unroll
      for (int r = 0; r < R; ++r) z[place(i + r * Parts::kPart)] = x[r];
    }
  }

  static __device__ bool encode_block(const Plan& plan, int n, uint64_t key, uint32_t block, Numbers& x, float* z,
                                      uint8_t* codes, float* scales, uint8_t* out) {
    const int bits = plan.codec.bits, P = padded(plan, n);
    const Signs signs(key, block);
    each_own([&](int k) { own_place(z, k) = signs.times(x[k], k); });  // and zeros past P, which stay
    Group::meet();
#pragma unroll
    for (int r = 0; r < kPerThread; r += 4) {
      if (16 * Group::thread() >= P) break;
      const Four four = *(const Four*)(sixteen(z) + r);
      for (int q = 0; q < 4; ++q) x[r + q] = four.x[q];
    }
    transform(z, P, x);
    const float n2 = Group::sum64([&](int k) { return x[k] * x[k]; });
    if (!(n2 < INFINITY)) return false;
    if (n2 < 0x1p-80f) {
      scales[0] = 0.0f;
      for (int i = Group::thread(); i < P * bits / 8; i += Group::threads()) out[i] = 0;
      return true;
    }
    if (plan.codec.flags & PQ_STOCHASTIC) {
      const int F = fraction_bits(bits);
      const int32_t top = (1 << bits) - 1;
      uint32_t most = 0;
      each_own([&](int k) { most = larger(magnitude(x[k]), most); });
      const float peak = from_bits(group_max<Group>(most)), inv = (float)top * (float)(1 << (F - 1)) / peak;
      scales[0] = peak / ((float)top * (float)P);
      each_own([&](int k) { x[k] = x[k] * inv; });
      round_own<Group>(x, top << (F - 1), F, key, block, z, codes);
    } else {
      const float energy = n2 / (float)P, sigma = sqrtf(energy);
      switch (bits) {
        case 1: {
          const float only = values()[0];
          scales[0] = energy / Group::sum64([&](int k) { return from_bits(magnitude(x[k])) * only; });
          pack_bits<Group>(P, out, [&](int k) { return to_bits(x[k]) >> 31; });
          return true;
        }
        case 2: scales[0] = energy / quantize<2>(x, sigma, codes); break;
        case 3: scales[0] = energy / quantize<3>(x, sigma, codes); break;
        case 4: scales[0] = energy / quantize<4>(x, sigma, codes); break;
        default: scales[0] = energy / quantize_finely(bits, x, sigma, z, codes);
      }
    }
    Group::meet();
    with_bits(bits, [&](auto width) { pack<Group>(codes, P, width, out); });
    return true;
  }

  // The threshold between levels m and m + 1.
  static __device__ float threshold(int bits, int m, float sigma) {
    return (kLloydMax[bits - 1][m] + kLloydMax[bits - 1][m + 1]) * 0.5f * sigma;
  }

  // Codes of the nearest centroids; returns the sum of |x| times centroid.
  template <int bits>
  static __device__ float quantize(const Numbers& x, float sigma, uint8_t* codes) {
    constexpr int levels = 1 << (bits - 1);
    float thresholds[levels - 1];
#pragma unroll
    for (int m = 0; m + 1 < levels; ++m) thresholds[m] = threshold(bits, m, sigma);
    uint32_t own_codes[kPerThread];
    Numbers products;
    each_own([&](int k) {
      const float a = from_bits(magnitude(x[k]));
      float left[levels - 1];  // of the thresholds, those between which a may be
#pragma unroll
      for (int m = 0; m + 1 < levels; ++m) left[m] = thresholds[m];
      uint32_t reached = 0;
#pragma unroll
      for (int half = levels / 2; half > 0; half /= 2) {
        const bool upper = a >= left[half - 1];
        reached += upper ? half : 0;
#pragma unroll
        for (int m = 0; m + 1 < half; ++m) left[m] = upper ? left[half + m] : left[m];
      }
      own_codes[k] = reached | to_bits(x[k]) >> 31 << (bits - 1);
      products[k] = a * values()[reached];
    });
    each_own([&](int k) { codes[Group::first() + k * Group::kStep] = (uint8_t)own_codes[k]; });
    return Group::sum64([&](int k) { return products[k]; });
  }
  static __device__ float quantize_finely(int bits, const Numbers& x, float sigma, float* thresholds, uint8_t* codes) {
    const int levels = 1 << (bits - 1);
    for (int m = Group::thread(); m + 1 < levels; m += Group::threads()) thresholds[m] = threshold(bits, m, sigma);
    Group::meet();
    uint8_t* const own_codes = codes + Group::first();
    return Group::sum64([&](int k) {
      const float a = from_bits(magnitude(x[k]));
      int m = 0;
      for (int step = levels / 2; step > 0; step /= 2)
        if (a >= thresholds[m + step - 1]) m += step;
      own_codes[k * Group::kStep] = (uint8_t)((uint32_t)m | to_bits(x[k]) >> 31 << (bits - 1));
      return a * values()[m];
    });
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t key, uint32_t block, const float* scales,
                                      float weight, float* z, F add) {
    const int P = padded(plan, n);
    Numbers x = {};
    if (16 * Group::thread() < P)
      with_bits(plan.codec.bits, [&](auto bits) {
        const uint8_t* const at = in + 2 * bits * Group::thread();
        const uint64_t words[2] = {load_bytes(at, bits), load_bytes(at + bits, bits)};
#pragma unroll
        for (int r = 0; r < kPerThread; ++r) {
          const uint32_t four = (uint32_t)(r % 8 < 4 ? words[r / 8] : words[r / 8] >> (4 * bits));
          x[r] = values()[four >> (r % 4 * bits) & ((1u << bits) - 1)];
        }
      });
    transform(z, P, x);
    const float gw = scales[0] * weight;
    const Signs signs(key, block);
    each_own([&](int k) { add(k, signs.times(x[k], k) * gw); });
    return true;
  }
};

// ---- one bit for each number, and what else there may be ----

struct SignSgd : Codec<Parts> {
  static __device__ bool encode_block(const Plan& plan, int n, uint64_t, uint32_t, const Numbers& x, float*, uint8_t*,
                                      float* scales, uint8_t* out) {
    if (plan.scales_per_block) {
      scales[0] = Group::sum64([&](int k) { return from_bits(magnitude(x[k])); }) / (float)n;
      if (!(scales[0] < INFINITY)) return false;
    } else {
      bool finite = true;
      each_own([&](int k) { finite &= magnitude(x[k]) < kInfBits; });
      if (Group::any(!finite)) return false;
    }
    pack_bits<Group>(n, out, [&](int k) { return to_bits(x[k] + 0.0f) >> 31; });  // -0 + 0 is 0
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t, uint32_t, const float* scales, float weight,
                                      float*, F add) {
    const float level = plan.scales_per_block ? scales[0] * weight : weight;
    each_code<Group>(in, n, Bits<1>(), [&](int k, uint32_t code) { add(k, code ? -level : level); });
    return true;
  }

  static __device__ float own(const Plan& plan, float x, float weight) {
    if (plan.scales_per_block) return x * weight;
    return (x < 0.0f ? -weight : weight) + (x - x);  // NaN if x is not finite: that must not become a sign
  }
};

struct OneBit : Codec<Parts> {
  static __device__ bool encode_block(const Plan&, int n, uint64_t, uint32_t, const Numbers& x, float*, uint8_t*, float* scales,
                                      uint8_t* out) {
    int below = 0;
    each_own([&](int k) { below += x[k] < 0.0f; });
    below = group_sum<Group>(below);
    const int above = n - below;
    scales[0] = Group::sum64([&](int k) { return x[k] < 0.0f ? 0.0f : x[k]; }) / (float)(above > 1 ? above : 1);
    scales[1] = Group::sum64([&](int k) { return x[k] < 0.0f ? -x[k] : 0.0f; }) / (float)(below > 1 ? below : 1);
    if (!(scales[0] < INFINITY && scales[1] < INFINITY)) return false;  // a NaN is above
    pack_bits<Group>(n, out, [&](int k) { return x[k] < 0.0f; });
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan&, const uint8_t* in, int n, uint64_t, uint32_t, const float* scales, float weight, float*,
                                      F add) {
    const float above = scales[0] * weight, below = -scales[1] * weight;
    each_code<Group>(in, n, Bits<1>(), [&](int k, uint32_t code) { add(k, code ? below : above); });
    return true;
  }
};

struct Natural : Codec<Parts> {
  static constexpr int encode_nbytes(int numbers) { return 2 * numbers; }
  static __device__ bool encode_block(const Plan&, int n, uint64_t key, uint32_t block, const Numbers& x, float* memory, uint8_t*,
                                      float*, uint8_t* out) {
    Pair* const words = (Pair*)memory;
    uint8_t* const exponents = out + (n + 7) / 8;
    bool finite = true;
    draw_uniform16<Group>(key, block, words);
    uint32_t exponent[kPerThread];
    each_own([&](int k) {
      const uint32_t m = magnitude(x[k]);
      finite &= m <= 0x7f000000;
      exponent[k] = (((m + 64) >> 7) + uniform16<Group>(words, k)) >> 16;
    });
    write_own<Group>(exponent, n, exponents);
    if (Group::any(!finite)) return false;
    pack_bits<Group>(n, out, [&](int k) { return to_bits(x[k]) >> 31; });
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan&, const uint8_t* in, int n, uint64_t, uint32_t, const float*, float weight, float*,
                                      F add) {
    const uint8_t* const exponents = in + (n + 7) / 8;
    bool good = true;
    uint32_t exponent[kPerThread];
    read_own<Group>(exponents, n, exponent);
    each_code<Group>(in, n, Bits<1>(), [&](int k, uint32_t sign) {
      good &= exponent[k] != 255;
      add(k, from_bits(exponent[k] << 23 | sign << 31) * weight);
    });
    return good;
  }
};

// ---- casts ----

struct Cast : Codec<Parts> {
  static __device__ bool encode_block(const Plan& plan, int n, uint64_t, uint32_t, const Numbers& x, float*, uint8_t*, float*,
                                      uint8_t* out) {
    const int kind = plan.codec.kind;
    // A value that rounds to Inf is as lost as one that is Inf.
    const uint32_t limit = kind == PQ_FP16 ? 0x477ff000 : kind == PQ_BF16 ? 0x7f7f8000 : kInfBits;
    bool finite = true;
    uint32_t words[kPerThread];
    each_own([&](int k) {
      finite &= magnitude(x[k]) < limit;
      words[k] = kind == PQ_NONE ? to_bits(x[k]) : kind == PQ_FP16 ? float_to_half(x[k]) : float_to_bfloat(x[k]);
    });
    if (kind == PQ_NONE) write_words<Group, uint32_t>(words, n, out);
    else write_words<Group, uint16_t>(words, n, out);
    return !Group::any(!finite);
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t, uint32_t, const float*, float weight, float*,
                                      F add) {
    const int kind = plan.codec.kind;
    uint32_t words[kPerThread];
    if (kind == PQ_NONE) read_words<Group, uint32_t>(in, n, words);
    else read_words<Group, uint16_t>(in, n, words);
    each_own([&](int k) {
      const uint32_t word = words[k];
      const float x = kind == PQ_NONE   ? from_bits(word)
                      : kind == PQ_FP16 ? half_to_float((uint16_t)word)
                                        : bfloat_to_float((uint16_t)word);
      add(k, x * weight);
    });
    return true;
  }
};

}  // namespace gpu
}  // namespace pqasgd
