// The codecs that are not sparse, block by block, as src/kernels.cc has them for a CPU.
//
// encode_block(plan, n, padded, key, block, v, codes, scales, out) -> finite: v holds the numbers, then zeros to `padded`.
// decode_block(plan, in, n, key, block, scales, weight, z, add) -> good codes: calls add(k, i, x) for this thread's numbers i.
// place(i) is where number i lies in v; it is called by all threads of a group, and what it returns is alike on all but `good codes`.
#pragma once
#include <cfloat>
#include <cmath>

#include "group.h"

namespace pqasgd {
namespace gpu {

#define PQ_TABLE static __device__
#include "lloyd_max.inc"  // written by the build: kLloydMax[8][128], of b bits in row b - 1

__device__ inline int fraction_bits(int bits) { return bits == 8 ? 15 : 16; }

// (rint(scaled) + u + offset) >> F for |scaled| <= 2^22.
__device__ inline uint8_t level(float scaled, uint32_t u, int32_t offset, int F) {
  const int32_t t = (int32_t)to_bits(scaled + 12582912.0f);  // 1.5 * 2^23 leaves the integer, rounded to even, in the low bits
  return (uint8_t)((t + ((int32_t)(u >> (16 - F)) + (offset - 0x4B400000))) >> F);
}

struct InPlace {
  static __device__ int padded(const Plan&, int n) { return (n + 63) / 64 * 64; }
  static __device__ int place(int i) { return i; }
};

struct AddsItself {
  static __device__ float own(const Plan&, float x, float weight) { return x * weight; }
};

struct Uniform : InPlace, AddsItself {
  static __device__ bool encode_block(const Plan& plan, int n, int padded, uint64_t key, uint32_t block, float* v, uint8_t* codes,
                                      float* scales, uint8_t* out) {
    const bool ternary = plan.codec.kind == PQ_TERNGRAD, l2 = plan.codec.kind == PQ_QSGD;
    const int bits = ternary ? 2 : plan.codec.bits, F = fraction_bits(bits);
    const int32_t s = (1 << (bits - 1)) - 1;
    float size;
    if (l2) {
      size = sum64(padded, [&](int i) { return v[i] * v[i]; });
    } else {
      uint32_t top = 0;
      for (int i = threadIdx.x; i < padded; i += blockDim.x) top = magnitude(v[i]) > top ? magnitude(v[i]) : top;
      size = from_bits(group_max(top));
    }
    if (!(size <= (l2 ? FLT_MAX : 0x1p127f))) return false;
    const bool zero = size < 0x1p-100f;
    if (l2) size = sqrtf(size);
    scales[0] = zero ? 0.0f : size;
    const float limit = (float)(s << F), inv = limit / size;
    each_uniform16(padded, key, block, [&](int i, uint32_t u) {
      float scaled = v[i] * inv;
      if (l2) scaled = fmaxf(fminf(scaled, limit), -limit);
      codes[i] = i >= n ? 0 : zero ? (uint8_t)s : level(scaled, u, s << F, F);
    });
    __syncthreads();
    if (!ternary) {
      pack(codes, n, bits, out);
    } else {
      const int stride = (n + 4) / 5;
      for (int j = threadIdx.x; j < stride; j += blockDim.x) {
        uint32_t byte = 0, power = 1;
        for (int i = j; i < n; i += stride, power *= 3) byte += power * codes[i];
        out[j] = (uint8_t)byte;
      }
    }
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t, uint32_t, const float* scales, float weight,
                                      float*, F add) {
    const bool ternary = plan.codec.kind == PQ_TERNGRAD;
    const int bits = ternary ? 2 : plan.codec.bits, stride = (n + 4) / 5;
    const int32_t s = (1 << (bits - 1)) - 1;
    const float gw = scales[0] / (float)s * weight;
    bool good = true;
    each_own(n, [&](int k, int i) {
      int32_t code;
      if (ternary) {
        int digit = 0, at = i;
        for (; at >= stride; at -= stride) ++digit;
        uint32_t byte = in[at];
        good &= byte <= 242;
        for (; digit > 0; --digit) byte /= 3;
        code = (int32_t)(byte % 3);
      } else {
        code = (int32_t)code_at(in, i, bits);
        good &= code <= 2 * s;
      }
      add(k, i, (float)(code - s) * gw);
    });
    return good;
  }
};

// ---- EDEN ----

struct Eden : AddsItself {
  static __device__ int padded(const Plan& plan, int n) { return (int)eden_padded(n, plan.codec.block_size); }
  static __device__ int place(int i) { return i + (i >> 4); }  // so that 16 neighbours of every thread lie in other banks

  // The random signs of a block: word (i / 512) * 16 + i % 16 has that of number i in bit i / 16 % 32.
  static __device__ uint32_t* draw_signs(uint64_t key, uint32_t block, int P) {
    __shared__ uint32_t words[kMaxBlock / 32];
    for (int w = threadIdx.x; w < (P + 1023) / 1024 * 16; w += blockDim.x) {
      const Pair drawn = threefry<kStreamRounds>(key, 0x80000000u + (uint32_t)w, block);
      words[w / 16 * 32 + w % 16] = drawn.x0;
      words[w / 16 * 32 + 16 + w % 16] = drawn.x1;
    }
    __syncthreads();
    return words;
  }
  static __device__ float with_sign(float x, const uint32_t* signs, int i) {
    return from_bits(to_bits(x) ^ signs[i / 512 * 16 + i % 16] >> (i / 16 % 32) << 31);
  }

  // Stages of strides stride, 2 stride, .., R / 2 stride.
  template <int R>
  static __device__ void transform_pass(float* z, int P, int stride) {
    for (int w = threadIdx.x; w < P / R; w += blockDim.x) {
      const int j = w & (stride - 1), base = (w - j) * R + j;
      float x[R];
#pragma unroll
      for (int r = 0; r < R; ++r) x[r] = z[place(base + r * stride)];
#pragma unroll
      for (int h = 1; h < R; h *= 2) {
#pragma unroll
        for (int r = 0; r < R; ++r)
          if (!(r & h)) {
            const float a = x[r], b = x[r + h];
            x[r] = a + b;
            x[r + h] = a - b;
          }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) z[place(base + r * stride)] = x[r];
    }
    __syncthreads();
  }

  // Fast Walsh-Hadamard transform, unnormalised, strides in rising order.
  static __device__ void hadamard(float* z, int P) {
    int stride = 1;
    for (; P / stride >= 16; stride *= 16) transform_pass<16>(z, P, stride);
    switch (P / stride) {
      case 8: transform_pass<8>(z, P, stride); break;
      case 4: transform_pass<4>(z, P, stride); break;
      case 2: transform_pass<2>(z, P, stride); break;
    }
  }

  static __device__ bool encode_block(const Plan& plan, int n, int P, uint64_t key, uint32_t block, float* z, uint8_t* codes,
                                      float* scales, uint8_t* out) {
    (void)n;
    const int bits = plan.codec.bits;
    const uint32_t* signs = draw_signs(key, block, P);
    for (int i = threadIdx.x; i < P; i += blockDim.x) z[place(i)] = with_sign(z[place(i)], signs, i);
    __syncthreads();
    hadamard(z, P);
    const float n2 = sum64(P, [&](int i) { return z[place(i)] * z[place(i)]; });
    if (!(n2 < INFINITY)) return false;
    if (n2 < 0x1p-80f) {
      scales[0] = 0.0f;
      for (int i = threadIdx.x; i < P * bits / 8; i += blockDim.x) out[i] = 0;
      return true;
    }
    if (plan.codec.flags & PQ_STOCHASTIC) {
      const int F = fraction_bits(bits);
      const int32_t top = (1 << bits) - 1;
      uint32_t most = 0;
      for (int i = threadIdx.x; i < P; i += blockDim.x) most = magnitude(z[place(i)]) > most ? magnitude(z[place(i)]) : most;
      const float peak = from_bits(group_max(most)), inv = (float)top * (float)(1 << (F - 1)) / peak;
      scales[0] = peak / ((float)top * (float)P);
      each_uniform16(P, key, block, [&](int i, uint32_t u) { codes[i] = level(z[place(i)] * inv, u, top << (F - 1), F); });
    } else {
      const float energy = n2 / (float)P;
      scales[0] = energy / quantize(bits, z, P, sqrtf(energy), codes);
    }
    __syncthreads();
    pack(codes, P, bits, out);
    return true;
  }

  // Codes of the nearest centroids; returns the sum of |z| times centroid.
  static __device__ float quantize(int bits, float* z, int P, float sigma, uint8_t* codes) {
    __shared__ float centroids[128], thresholds[128];
    const int levels = 1 << (bits - 1);
    for (int m = threadIdx.x; m < levels; m += blockDim.x) {
      centroids[m] = kLloydMax[bits - 1][m];
      if (m + 1 < levels) thresholds[m] = (kLloydMax[bits - 1][m] + kLloydMax[bits - 1][m + 1]) * 0.5f * sigma;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < P; i += blockDim.x) {
      const float x = z[place(i)], a = from_bits(magnitude(x));
      int m = 0;  // how many thresholds a reaches
      if (levels <= 8) {
        for (int k = 0; k + 1 < levels; ++k) m += a >= thresholds[k];
      } else {
        for (int step = levels / 2; step > 0; step /= 2)
          if (a >= thresholds[m + step - 1]) m += step;
      }
      codes[i] = (uint8_t)((uint32_t)m | to_bits(x) >> 31 << (bits - 1));
      z[place(i)] = a * centroids[m];
    }
    __syncthreads();
    return sum64(P, [&](int i) { return z[place(i)]; });
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t key, uint32_t block, const float* scales,
                                      float weight, float* z, F add) {
    const int bits = plan.codec.bits, P = padded(plan, n), levels = 1 << (bits - 1);
    const int32_t top = (1 << bits) - 1;
    const bool stochastic = plan.codec.flags & PQ_STOCHASTIC;
    const uint32_t* signs = draw_signs(key, block, P);
    for (int i = threadIdx.x; i < P; i += blockDim.x) {
      const int code = (int)code_at(in, i, bits);
      z[place(i)] = stochastic ? (float)(2 * code - top)
                               : from_bits(to_bits(kLloydMax[bits - 1][code & (levels - 1)]) | (uint32_t)(code >= levels) << 31);
    }
    __syncthreads();
    hadamard(z, P);
    const float gw = scales[0] * weight;
    each_own(n, [&](int k, int i) { add(k, i, with_sign(z[place(i)], signs, i) * gw); });
    __syncthreads();  // before z and the signs are those of the next block
    return true;
  }
};

// ---- one bit for each number, and what else there may be ----

struct SignSgd : InPlace {
  static __device__ bool encode_block(const Plan& plan, int n, int padded, uint64_t, uint32_t, float* v, uint8_t* codes, float* scales,
                                      uint8_t* out) {
    bool finite = true;
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
      codes[i] = (uint8_t)(to_bits(v[i] + 0.0f) >> 31);  // -0 + 0 is 0
      finite &= magnitude(v[i]) < kInfBits;
    }
    if (plan.scales_per_block) {
      scales[0] = sum64(padded, [&](int i) { return from_bits(magnitude(v[i])); }) / (float)n;
      if (!(scales[0] < INFINITY)) return false;
    } else if (group_any(!finite)) {
      return false;
    }
    __syncthreads();
    pack(codes, n, 1, out);
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t, uint32_t, const float* scales, float weight,
                                      float*, F add) {
    const float level = plan.scales_per_block ? scales[0] * weight : weight;
    each_own(n, [&](int k, int i) { add(k, i, code_at(in, i, 1) ? -level : level); });
    return true;
  }

  static __device__ float own(const Plan& plan, float x, float weight) {
    if (plan.scales_per_block) return x * weight;
    return (x < 0.0f ? -weight : weight) + (x - x);  // NaN if x is not finite: that must not become a sign
  }
};

struct OneBit : InPlace, AddsItself {
  static __device__ bool encode_block(const Plan&, int n, int padded, uint64_t, uint32_t, float* v, uint8_t* codes, float* scales,
                                      uint8_t* out) {
    int below = 0;
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
      codes[i] = v[i] < 0.0f;
      below += codes[i];
    }
    below = group_sum(below);
    const int above = n - below;
    scales[0] = sum64(padded, [&](int i) { return v[i] < 0.0f ? 0.0f : v[i]; }) / (float)(above > 1 ? above : 1);
    scales[1] = sum64(padded, [&](int i) { return v[i] < 0.0f ? -v[i] : 0.0f; }) / (float)(below > 1 ? below : 1);
    if (!(scales[0] < INFINITY && scales[1] < INFINITY)) return false;  // a NaN is above
    pack(codes, n, 1, out);
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan&, const uint8_t* in, int n, uint64_t, uint32_t, const float* scales, float weight, float*,
                                      F add) {
    const float above = scales[0] * weight, below = -scales[1] * weight;
    each_own(n, [&](int k, int i) { add(k, i, code_at(in, i, 1) ? below : above); });
    return true;
  }
};

struct Natural : InPlace, AddsItself {
  static __device__ bool encode_block(const Plan&, int n, int padded, uint64_t key, uint32_t block, float* v, uint8_t* codes, float*,
                                      uint8_t* out) {
    uint8_t* const exponents = out + (n + 7) / 8;
    bool finite = true;
    each_uniform16(padded, key, block, [&](int i, uint32_t u) {
      const uint32_t m = magnitude(v[i]);
      finite &= m <= 0x7f000000;
      codes[i] = (uint8_t)(to_bits(v[i]) >> 31);
      if (i < n) exponents[i] = (uint8_t)((((m + 64) >> 7) + u) >> 16);
    });
    if (group_any(!finite)) return false;
    pack(codes, n, 1, out);
    return true;
  }

  template <class F>
  static __device__ bool decode_block(const Plan&, const uint8_t* in, int n, uint64_t, uint32_t, const float*, float weight, float*,
                                      F add) {
    const uint8_t* const exponents = in + (n + 7) / 8;
    bool good = true;
    each_own(n, [&](int k, int i) {
      good &= exponents[i] != 255;
      add(k, i, from_bits((uint32_t)exponents[i] << 23 | code_at(in, i, 1) << 31) * weight);
    });
    return good;
  }
};

// ---- casts ----

struct Cast : AddsItself {
  static __device__ int padded(const Plan&, int n) { return n; }
  static __device__ int place(int i) { return i; }

  static __device__ bool encode_block(const Plan& plan, int n, int, uint64_t, uint32_t, float* v, uint8_t*, float*, uint8_t* out) {
    const int kind = plan.codec.kind;
    // A value that rounds to Inf is as lost as one that is Inf.
    const uint32_t limit = kind == PQ_FP16 ? 0x477ff000 : kind == PQ_BF16 ? 0x7f7f8000 : kInfBits;
    bool finite = true;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      finite &= magnitude(v[i]) < limit;
      if (kind == PQ_NONE) store_bytes(out + 4 * i, to_bits(v[i]), 4);
      else store_bytes(out + 2 * i, kind == PQ_FP16 ? float_to_half(v[i]) : float_to_bfloat(v[i]), 2);
    }
    return !group_any(!finite);
  }

  template <class F>
  static __device__ bool decode_block(const Plan& plan, const uint8_t* in, int n, uint64_t, uint32_t, const float*, float weight, float*,
                                      F add) {
    const int kind = plan.codec.kind;
    each_own(n, [&](int k, int i) {
      float x;
      if (kind == PQ_NONE) x = from_bits(load_bytes(in + 4 * i, 4));
      else if (kind == PQ_FP16) x = half_to_float((uint16_t)load_bytes(in + 2 * i, 2));
      else x = bfloat_to_float((uint16_t)load_bytes(in + 2 * i, 2));
      add(k, i, x * weight);
    });
    return true;
  }
};

}  // namespace gpu
}  // namespace pqasgd
