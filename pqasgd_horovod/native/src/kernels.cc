// The codecs on one instruction set. Compiled once per set with PQ_ISA defined; docs/architecture.md is the specification.
#include "kernels.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "low_rank.h"
#include "packing.h"
#include "simd.h"
#include "sparse.h"

namespace pqasgd {
namespace PQ_ISA {
namespace {

constexpr int H = 16 / W;
constexpr int32_t kInfBits = 0x7f800000;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- reading and writing the caller's tensors ----

int64_t find_segment(const pq_source& s, int64_t position) {
  return std::upper_bound(s.offsets, s.offsets + s.num_segments + 1, position) - s.offsets - 1;
}

// Calls f(segment, offset in it, offset in the range, length) for the pieces of [start, start + n).
template <class F>
void for_pieces(const pq_source& s, int64_t start, int64_t n, F f) {
  int64_t done = 0;
  for (int64_t i = find_segment(s, start); done < n; ++i) {
    const int64_t inside = start + done - s.offsets[i];
    const int64_t length = std::min(s.segments[i].numel - inside, n - done);
    if (length > 0) f(s.segments[i], inside, done, length);
    done += std::max<int64_t>(length, 0);
  }
}

void to_floats(const pq_segment& segment, int64_t at, int64_t n, float* out) {
  switch (segment.dtype) {
    case PQ_F32: std::memcpy(out, (const float*)segment.data + at, (size_t)n * 4); break;
    case PQ_F64: {
      const double* x = (const double*)segment.data + at;
      for (int64_t i = 0; i < n; ++i) out[i] = (float)x[i];
      break;
    }
    case PQ_F16: halves_to_floats((const uint16_t*)segment.data + at, n, out); break;
    default: bfloats_to_floats((const uint16_t*)segment.data + at, n, out);
  }
}

template <class T, class Out>
void subtract_anchor(const T* x, const double* anchor, int64_t n, Out* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (Out)((double)x[i] - anchor[i]);
}

// Values of [start, start + n) minus the anchor, plus the residual, as float32.
void load_values(const pq_source& s, int64_t start, int64_t n, float* out) {
  for_pieces(s, start, n, [&](const pq_segment& segment, int64_t at, int64_t to, int64_t length) {
    float* o = out + to;
    if (!s.anchor) {
      to_floats(segment, at, length, o);
    } else if (s.anchor_dtype == PQ_F32) {
      const float* a = (const float*)s.anchor + start + to;
      if (segment.dtype == PQ_F32) {
        const float* x = (const float*)segment.data + at;
        for (int64_t i = 0; i < length; ++i) o[i] = x[i] - a[i];
      } else {
        to_floats(segment, at, length, o);
        for (int64_t i = 0; i < length; ++i) o[i] = o[i] - a[i];
      }
    } else {
      const double* a = (const double*)s.anchor + start + to;
      if (segment.dtype == PQ_F64) {
        subtract_anchor((const double*)segment.data + at, a, length, o);
      } else {
        to_floats(segment, at, length, o);
        subtract_anchor(o, a, length, o);
      }
    }
  });
  if (s.residual)
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] + s.residual[start + i];
}

// A block as floats, zero-padded to `padded`: in place where the caller's memory already is that.
const float* load_block(const pq_source& s, int64_t start, int64_t n, int64_t padded, float* scratch) {
  if (!s.anchor && !s.residual && n == padded) {
    const int64_t i = find_segment(s, start);
    if (s.segments[i].dtype == PQ_F32 && start + n <= s.offsets[i + 1])
      return (const float*)s.segments[i].data + (start - s.offsets[i]);
  }
  load_values(s, start, n, scratch);
  std::fill(scratch + n, scratch + padded, 0.0f);
  return scratch;
}

void store_values(const float* values, int64_t n, const pq_segment& segment, int64_t at) {
  switch (segment.dtype) {
    case PQ_F32: std::memcpy((float*)segment.data + at, values, (size_t)n * 4); break;
    case PQ_F64: {
      double* x = (double*)segment.data + at;
      for (int64_t i = 0; i < n; ++i) x[i] = values[i];
      break;
    }
    case PQ_F16: floats_to_halves(values, n, (uint16_t*)segment.data + at); break;
    default: floats_to_bfloats(values, n, (uint16_t*)segment.data + at);
  }
}

// ---- stochastic rounding to uniform levels, in fixed point ----

int fraction_bits(int bits) { return bits == 8 ? 15 : 16; }

// codes = (rint(v * inv) + u + offset) >> F over a padded block; |v * inv| <= 2^22.
template <bool kClamp>
PQ_INLINE void round_to_levels(const float* v, int64_t padded, float inv, float limit, int32_t offset, int F, uint64_t key,
                               uint32_t block, uint8_t* codes) {
  // Adding 1.5 * 2^23 leaves the integer, rounded to even, in the low bits of the float.
  const float magic = 12582912.0f;
  const int32_t rest = offset - 0x4B400000;
  for (int64_t i = 0; i < padded; i += 64) {
    vi u[4 * H];
    uniform16(key, (uint32_t)(i / 64), block, u);
    for (int k = 0; k < 4 * H; ++k) {
      vf x = load<vf>(v + i + k * W) * inv;
      if (kClamp) x = clamp(x, limit);
      const vi t = bits(x + magic);
      store_bytes(codes + i + k * W, (t + ((u[k] >> (16 - F)) + rest)) >> F);
    }
  }
}

int32_t largest_lane(vi x) {
  int32_t top = x[0];
  for (int k = 1; k < W; ++k) top = std::max(top, x[k]);
  return top;
}

float max_abs(const float* v, int64_t padded) {
  vi m[4] = {};
  for (int64_t i = 0; i < padded; i += 4 * W)
    for (int k = 0; k < 4; ++k) m[k] = max(m[k], bits(load<vf>(v + i + k * W)) & 0x7fffffff);
  const int32_t top = largest_lane(max(max(m[0], m[1]), max(m[2], m[3])));
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

float sum_of_squares(const float* v, int64_t padded) {
  Sum64 sum;
  for (int64_t i = 0; i < padded; i += 64)
    for (int k = 0; k < Sum64::N; ++k) {
      const vf x = load<vf>(v + i + k * W);
      sum.lane[k] = sum.lane[k] + x * x;
    }
  return sum.fold();
}

// Each codec's block functions share this shape: encode_block(v, n, padded, ..) -> finite, codes and the block's scales;
// decode_block adds n decoded numbers; add_own adds what the numbers of a shard's owner count as, who does not code them.

struct AddsItself {
  static PQ_INLINE void add_own(const Plan&, const float* v, int64_t n, float weight, float* sum) {
    for (int64_t i = 0; i < n; ++i) {
      const float x = v[i] * weight;
      sum[i] = sum[i] + x;
    }
  }
};

struct Uniform : AddsItself {
  static int64_t padded(const Plan&, int64_t n) { return round_up(n, 64); }

  static bool encode_block(const Plan& plan, const float* v, int64_t n, int64_t padded, uint64_t key, uint32_t block,
                           float* scale, uint8_t* out) {
    const bool ternary = plan.codec.kind == PQ_TERNGRAD, l2 = plan.codec.kind == PQ_QSGD;
    const int bits = ternary ? 2 : plan.codec.bits, F = fraction_bits(bits);
    const int32_t s = (1 << (bits - 1)) - 1;
    alignas(64) uint8_t codes[kMaxBlock + 64];
    float size = l2 ? sum_of_squares(v, padded) : max_abs(v, padded);
    if (!(size <= (l2 ? FLT_MAX : 0x1p127f))) return false;
    const bool zero = size < 0x1p-100f;
    if (l2) size = std::sqrt(size);
    *scale = zero ? 0.0f : size;
    if (zero) {
      std::memset(codes, s, (size_t)padded);
    } else {
      const float limit = (float)(s << F), inv = limit / size;
      if (l2) round_to_levels<true>(v, padded, inv, limit, s << F, F, key, block, codes);
      else round_to_levels<false>(v, padded, inv, limit, s << F, F, key, block, codes);
    }
    if (ternary) {
      pack_ternary(codes, n, out);
    } else {
      std::fill(codes + n, codes + padded, 0);
      pack(codes, n, bits, out);
    }
    return true;
  }

  static int32_t decode_block(const Plan& plan, const uint8_t* in, int64_t n, uint64_t, uint32_t, const float* scale,
                              float weight, float* destination) {
    const bool ternary = plan.codec.kind == PQ_TERNGRAD;
    const int bits = ternary ? 2 : plan.codec.bits;
    const int32_t s = (1 << (bits - 1)) - 1;
    alignas(64) uint8_t codes[kMaxBlock + 64];
    if (ternary) {
      if (!unpack_ternary(in, n, codes)) return PQ_BAD_CODE;
    } else {
      unpack(in, n, bits, codes);
      uint8_t top = 0;
      for (int64_t i = 0; i < n; ++i) top = top > codes[i] ? top : codes[i];
      if (top > 2 * s) return PQ_BAD_CODE;
    }
    const float gw = *scale / (float)s * weight;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const vf x = to_float(load_bytes(codes + i) - s);
      add_to(destination + i, x * gw);
    }
    for (; i < n; ++i) {
      const float x = (float)((int32_t)codes[i] - s) * gw;
      destination[i] = destination[i] + x;
    }
    return PQ_OK;
  }
};

// ---- EDEN ----

struct Signs {  // sign masks of the 16-lane vectors of a block, made 64 vectors at a time
  Words words;
  uint64_t key;
  uint32_t block;
  int64_t ready = -1;
  PQ_INLINE vi mask(int64_t vector, int h) {  // 0x80000000 where the sign is negative
    if (vector / 64 != ready) {
      ready = vector / 64;
      words = threefry16(key, 0x80000000u + 16u * (uint32_t)ready, block);
    }
    const vu w = (vector & 32) ? words.w1[h] : words.w0[h];
    return (vi)((w << (int)(31 - (vector & 31))) & 0x80000000u);
  }
};

// Stages inside a vector and across R consecutive ones: strides 1 .. R * W / 2.
template <int R>
PQ_INLINE void transform_registers(vf (&x)[R]) {
  for (int r = 0; r < R; ++r) {
    x[r] = butterfly_lanes<1>(x[r]);
    x[r] = butterfly_lanes<2>(x[r]);
    if constexpr (W > 4) x[r] = butterfly_lanes<4>(x[r]);
    if constexpr (W > 8) x[r] = butterfly_lanes<8>(x[r]);
  }
  for (int h = 1; h < R; h *= 2)
    for (int r = 0; r < R; ++r)
      if (!(r & h)) {
        const vf a = x[r], b = x[r + h];
        x[r] = a + b;
        x[r + h] = a - b;
      }
}

// Stages of strides stride, 2 stride, .., R / 2 stride, in memory.
template <int R>
PQ_INLINE void transform_pass(float* z, int64_t size, int64_t stride) {
  for (int64_t base = 0; base < size; base += R * stride)
    for (int64_t j = 0; j < stride; j += W) {
      vf x[R];
      for (int r = 0; r < R; ++r) x[r] = load<vf>(z + base + j + r * stride);
#pragma GCC unroll 3
      for (int h = 1; h < R; h *= 2)
        for (int r = 0; r < R; ++r)
          if (!(r & h)) {
            const vf a = x[r], b = x[r + h];
            x[r] = a + b;
            x[r + h] = a - b;
          }
      for (int r = 0; r < R; ++r) store(z + base + j + r * stride, x[r]);
    }
}

// Fast Walsh-Hadamard transform, unnormalised, strides in rising order. get(i) gives the W inputs from i on.
template <class Get>
PQ_INLINE void hadamard(float* z, int64_t size, Get get) {
  constexpr int kMost = 8;
  int64_t stride;
  if (size >= kMost * W) {
    for (int64_t i = 0; i < size; i += kMost * W) {
      vf x[kMost];
      for (int r = 0; r < kMost; ++r) x[r] = get(i + r * W);
      transform_registers(x);
      for (int r = 0; r < kMost; ++r) store(z + i + r * W, x[r]);
    }
    stride = kMost * W;
  } else {  // 64 elements in four vectors of 16
    vf x[4];
    for (int r = 0; r < 4; ++r) x[r] = get(r * W);
    transform_registers(x);
    for (int r = 0; r < 4; ++r) store(z + r * W, x[r]);
    stride = 4 * W;
  }
  while (size / stride >= 8) {
    transform_pass<8>(z, size, stride);
    stride *= 8;
  }
  if (size / stride == 4) transform_pass<4>(z, size, stride);
  else if (size / stride == 2) transform_pass<2>(z, size, stride);
}

// For some vectors at once, m = number of scaled thresholds that a reaches: by a chain of comparisons,
template <int kChain>
struct ChainSearch {
  vf scaled[kChain > 0 ? kChain : 1];
  ChainSearch(const LloydMax& table, float sigma) {
    for (int k = 0; k < kChain; ++k) scaled[k] = set1(table.threshold[k] * sigma);
  }
  template <int N>
  PQ_INLINE void operator()(const vf (&a)[N], vi (&m)[N]) const {
    for (int r = 0; r < N; ++r) {
      m[r] = vi{};
      for (int k = 0; k < kChain; ++k) m[r] = count_if_at_least(m[r], a[r], scaled[k]);
    }
  }
};
#if defined(__AVX512F__)
// by binary search in a tree that stays in registers. The vectors step in turn: a step waits for the one before.
template <int kLevels>
struct TreeSearch {
  alignas(64) float scaled[1 << kLevels];  // as integers, less 1: minus a it is negative where the threshold is reached
  TreeSearch(const LloydMax& table, float sigma) {
    for (int i = 0; i < 1 << kLevels; i += W) store(scaled + i, bits(load<vf>(table.tree + i) * sigma) - 1);
  }
  PQ_INLINE static vi step(vi node, vf a, vf threshold) {
    return node + node + (vi)((vu)(bits(threshold) - bits(a)) >> 31);
  }
  template <int kLevel, int N>
  PQ_INLINE void descend(const vf (&a)[N], vi (&node)[N]) const {
    if constexpr (kLevel < kLevels) {
      for (int r = 0; r < N; ++r)
        node[r] = step(node[r], a[r], kLevel < 4 ? lookup<4>(scaled, node[r])
                                                 : lookup<kLevel>(scaled + (1 << kLevel), node[r]));
      descend<kLevel + 1>(a, node);
    }
  }
  template <int N>
  PQ_INLINE void operator()(const vf (&a)[N], vi (&m)[N]) const {
    for (int r = 0; r < N; ++r) m[r] = step(set1(1), a[r], set1(scaled[1]));
    descend<1>(a, m);
    for (int r = 0; r < N; ++r) m[r] = m[r] - (1 << kLevels);
  }
};
#else
// or in a table of narrow cells with one threshold each.
struct CellSearch {
  const LloydMax& table;
  float sigma, cells_per_unit;
  CellSearch(const LloydMax& t, float s) : table(t), sigma(s), cells_per_unit(t.cells_per_sigma / s) {}
  template <int N>
  PQ_INLINE void operator()(const vf (&a)[N], vi (&m)[N]) const {
    for (int r = 0; r < N; ++r) {
      // |z| <= sigma sqrt(P): no overflow
      const vi cell = min(truncate(a[r] * cells_per_unit), set1(table.num_cells - 1));
      m[r] = count_if_at_least(gather(table.cell_base, cell), a[r], gather(table.cell_threshold, cell) * sigma);
    }
  }
};
#endif

// f(bits), with bits a constant, so that tables stay in registers.
template <class F>
PQ_INLINE auto with_bits(int bits, F f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

struct Eden : AddsItself {
  static int64_t padded(const Plan& plan, int64_t n) { return eden_padded(n, plan.codec.block_size); }

#if defined(__AVX512F__)
  template <int kBits>
  using Search = std::conditional_t<kBits <= 4, ChainSearch<(1 << kBits) / 2 - 1>, TreeSearch<kBits - 1>>;
#else
  template <int kBits>
  using Search = std::conditional_t<kBits <= 5, ChainSearch<(1 << kBits) / 2 - 1>, CellSearch>;
#endif

  template <int kBits>
  static PQ_INLINE float quantize(const LloydMax& table, const float* z, int64_t P, float sigma, uint8_t* codes) {
    constexpr int kTogether = 4;
    const Search<kBits> search(table, sigma);
    Sum64 dot;
    for (int64_t i = 0; i < P; i += 64)
      for (int k = 0; k < Sum64::N; k += kTogether) {
        vf a[kTogether];
        vi m[kTogether];
        for (int r = 0; r < kTogether; ++r) a[r] = abs(load<vf>(z + i + (k + r) * W));
        search(a, m);
        for (int r = 0; r < kTogether; ++r) {
          const vi sign = (vi)(load<vu>(z + i + (k + r) * W) >> 31 << (kBits - 1));
          dot.lane[k + r] = dot.lane[k + r] + a[r] * lookup<kBits - 1>(table.centroid, m[r]);
          store_bytes(codes + i + (k + r) * W, m[r] | sign);
        }
      }
    return dot.fold();
  }

  template <int kBits>
  static PQ_INLINE vf dequantize(const LloydMax& table, vi code) {
    if constexpr (kBits == kRegisterBits + 1) {  // half the table fits registers
      const vi sign = (vi)((vu)code >> (kBits - 1) << 31);
      return from_bits(bits(lookup<kBits - 1>(table.centroid, code)) | sign);
    } else {
      return lookup<kBits>(table.decode, code);
    }
  }

  static bool encode_block(const Plan& plan, const float* v, int64_t n, int64_t P, uint64_t key, uint32_t block, float* scale,
                           uint8_t* out) {
    (void)n;
    const int bits_ = plan.codec.bits;
    alignas(64) float z[kMaxBlock];
    alignas(64) uint8_t codes[kMaxBlock];
    Signs signs{{}, key, block};
    hadamard(z, P, [&](int64_t i) { return from_bits(bits(load<vf>(v + i)) ^ signs.mask(i / 16, (int)(i % 16) / W)); });
    const float n2 = sum_of_squares(z, P);
    if (!(n2 < INFINITY)) return false;
    if (n2 < 0x1p-80f) {
      *scale = 0.0f;
      std::memset(out, 0, (size_t)(P * bits_ / 8));
      return true;
    }
    if (plan.codec.flags & PQ_STOCHASTIC) {
      const int F = fraction_bits(bits_);
      const int32_t top = (1 << bits_) - 1;
      const float peak = max_abs(z, P), inv = (float)top * (float)(1 << (F - 1)) / peak;
      *scale = peak / ((float)top * (float)P);
      round_to_levels<false>(z, P, inv, 0.0f, top << (F - 1), F, key, block, codes);
    } else {
      const LloydMax& table = lloyd_max(bits_);
      const float energy = n2 / (float)P, sigma = std::sqrt(energy);
      const float dot =
          with_bits(bits_, [&](auto b) { return quantize<decltype(b)::value>(table, z, P, sigma, codes); });
      *scale = energy / dot;
    }
    pack(codes, P, bits_, out);
    return true;
  }

  static int32_t decode_block(const Plan& plan, const uint8_t* in, int64_t n, uint64_t key, uint32_t block, const float* scale,
                              float weight, float* destination) {
    const int bits_ = plan.codec.bits;
    const int64_t P = eden_padded(n, plan.codec.block_size);
    alignas(64) float u[kMaxBlock];
    alignas(64) uint8_t codes[kMaxBlock];
    unpack(in, P, bits_, codes);
    if (plan.codec.flags & PQ_STOCHASTIC) {
      const int32_t top = (1 << bits_) - 1;
      hadamard(u, P, [&](int64_t i) { return to_float(load_bytes(codes + i) * 2 - top); });
    } else {
      const LloydMax& table = lloyd_max(bits_);
      with_bits(bits_, [&](auto b) {
        hadamard(u, P, [&](int64_t i) { return dequantize<decltype(b)::value>(table, load_bytes(codes + i)); });
      });
    }
    const float gw = *scale * weight;
    Signs signs{{}, key, block};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const vf x = from_bits(bits(load<vf>(u + i)) ^ signs.mask(i / 16, (int)(i % 16) / W));
      add_to(destination + i, x * gw);
    }
    if (i < n) {
      alignas(64) float last[W];
      store(last, from_bits(bits(load<vf>(u + i)) ^ signs.mask(i / 16, (int)(i % 16) / W)) * gw);
      for (int k = 0; i < n; ++i, ++k) destination[i] = destination[i] + last[k];
    }
    return PQ_OK;
  }
};

// ---- one bit for each number, and what else there may be ----

// word(i) gives the bits of v[i, i + 64); those past n are 0. A block ahead is asked for: the arithmetic waits for memory only.
template <class F>
PQ_INLINE void store_words(const float* v, int64_t n, uint8_t* out, F word) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    prefetch(v + i + 1024, 256);
    const uint64_t w = word(i);
    std::memcpy(out + i / 8, &w, 8);
  }
  if (i < n) {
    const uint64_t w = word(i);
    std::memcpy(out + i / 8, &w, (size_t)(n - i + 7) / 8);
  }
}

// destination[i] += number(i, bit), with vector(i, bits) giving the numbers of W elements at once.
template <class Vector, class Number>
PQ_INLINE void add_by_bits(const uint8_t* in, int64_t n, float* destination, Vector vector, Number number) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word;
    std::memcpy(&word, in + i / 8, 8);
    for (int k = 0; k < 4 * H; ++k) add_to(destination + i + k * W, vector(i + k * W, (uint32_t)(word >> (k * W))));
  }
  for (; i < n; ++i) destination[i] = destination[i] + number(i, (in[i / 8] >> (i % 8) & 1) != 0);
}

// destination += below where the bit is 1, above elsewhere.
PQ_INLINE void add_levels(const uint8_t* in, int64_t n, float above, float below, float* destination) {
  add_by_bits(
      in, n, destination, [&](int64_t, uint32_t bits) { return choose(bits, above, below); },
      [&](int64_t, bool bit) { return bit ? below : above; });
}

struct SignSgd {
  static int64_t padded(const Plan&, int64_t n) { return round_up(n, 64); }

  static bool encode_block(const Plan& plan, const float* v, int64_t n, int64_t, uint64_t, uint32_t, float* scale, uint8_t* out) {
    if (!plan.scales_per_block) {
      vi tops{};
      store_words(v, n, out, [&](int64_t i) {
        uint64_t word = 0;
        for (int k = 0; k < 4 * H; ++k) {
          const vf x = load<vf>(v + i + k * W);
          tops = max(tops, bits(x) & 0x7fffffff);
          word |= (uint64_t)sign_bits(bits(x + vf{})) << (k * W);  // -0 + 0 is 0
        }
        return word;
      });
      return largest_lane(tops) < kInfBits;
    }
    Sum64 sum;
    store_words(v, n, out, [&](int64_t i) {
      uint64_t word = 0;
      for (int k = 0; k < Sum64::N; ++k) {
        const vf x = load<vf>(v + i + k * W);
        sum.lane[k] = sum.lane[k] + abs(x);
        word |= (uint64_t)sign_bits(bits(x + vf{})) << (k * W);
      }
      return word;
    });
    *scale = sum.fold() / (float)n;
    return *scale < INFINITY;
  }

  static int32_t decode_block(const Plan& plan, const uint8_t* in, int64_t n, uint64_t, uint32_t, const float* scale, float weight,
                              float* destination) {
    const float level = plan.scales_per_block ? *scale * weight : weight;
    add_levels(in, n, level, -level, destination);
    return PQ_OK;
  }

  static PQ_INLINE void add_own(const Plan& plan, const float* v, int64_t n, float weight, float* sum) {
    if (plan.scales_per_block) return AddsItself::add_own(plan, v, n, weight, sum);
    for (int64_t i = 0; i < n; ++i) {
      const float sign = v[i] < 0.0f ? -weight : weight;
      sum[i] = sum[i] + (sign + (v[i] - v[i]));  // NaN if v is not finite: that must not become a sign
    }
  }
};

struct OneBit : AddsItself {
  static int64_t padded(const Plan&, int64_t n) { return round_up(n, 64); }

  static bool encode_block(const Plan&, const float* v, int64_t n, int64_t, uint64_t, uint32_t, float* scales, uint8_t* out) {
    Sum64 above, below;
    int64_t num_below = 0;
    store_words(v, n, out, [&](int64_t i) {
      uint64_t word = 0;
      for (int k = 0; k < Sum64::N; ++k) {
        const vf x = load<vf>(v + i + k * W);
        const vi negative = (vi)(x < vf{});
        above.lane[k] = above.lane[k] + from_bits(bits(x) & ~negative);
        below.lane[k] = below.lane[k] + from_bits(bits(x) & negative & 0x7fffffff);
        word |= (uint64_t)sign_bits(negative) << (k * W);
      }
      num_below += __builtin_popcountll(word);
      return word;
    });
    scales[0] = above.fold() / (float)std::max<int64_t>(1, n - num_below);
    scales[1] = below.fold() / (float)std::max<int64_t>(1, num_below);
    return scales[0] < INFINITY && scales[1] < INFINITY;  // a NaN is above
  }

  static int32_t decode_block(const Plan&, const uint8_t* in, int64_t n, uint64_t, uint32_t, const float* scales, float weight,
                              float* destination) {
    add_levels(in, n, scales[0] * weight, -scales[1] * weight, destination);
    return PQ_OK;
  }
};

struct Natural : AddsItself {
  static int64_t padded(const Plan&, int64_t n) { return round_up(n, 64); }

  static bool encode_block(const Plan&, const float* v, int64_t n, int64_t, uint64_t key, uint32_t block, float*, uint8_t* out) {
    alignas(64) uint8_t codes[kCastBlock];
    vi tops{};
    store_words(v, n, out, [&](int64_t i) {
      vi u[4 * H];
      uniform16(key, (uint32_t)(i / 64), block, u);
      uint64_t word = 0;
      for (int k = 0; k < 4 * H; ++k) {
        const vi x = load<vi>(v + i + k * W), magnitude = x & 0x7fffffff;
        tops = max(tops, magnitude);
        store_bytes(codes + i + k * W, ((vi)((vu)(magnitude + 64) >> 7) + u[k]) >> 16);
        word |= (uint64_t)sign_bits(x) << (k * W);
      }
      return word;
    });
    std::memcpy(out + (n + 7) / 8, codes, (size_t)n);
    return largest_lane(tops) <= 0x7f000000;
  }

  static int32_t decode_block(const Plan&, const uint8_t* in, int64_t n, uint64_t, uint32_t, const float*, float weight,
                              float* destination) {
    const uint8_t* codes = in + (n + 7) / 8;
    uint8_t top = 0;
    for (int64_t i = 0; i < n; ++i) top = top > codes[i] ? top : codes[i];
    if (top == 255) return PQ_BAD_CODE;
    add_by_bits(
        in, n, destination,
        [&](int64_t i, uint32_t bits) {
          return from_bits(load_bytes(codes + i) << 23 | (vi)choose(bits, 0.0f, -0.0f)) * weight;
        },
        [&](int64_t i, bool bit) {
          const uint32_t word = (uint32_t)codes[i] << 23 | (uint32_t)bit << 31;
          float x;
          std::memcpy(&x, &word, 4);
          return x * weight;
        });
    return PQ_OK;
  }
};

// ---- casts ----

struct Cast : AddsItself {
  // Memory takes the time, and stands still while several passes over a block take place: so they are short.
  static constexpr int64_t kPiece = 64;

  static int64_t padded(const Plan&, int64_t n) { return n; }

  static PQ_INLINE void narrow(int kind, const float* v, int64_t n, uint8_t* out) {
    uint16_t halves[kPiece];
    if (kind == PQ_NONE) {
      std::memcpy(out, v, (size_t)n * 4);
    } else {
      if (kind == PQ_FP16) floats_to_halves(v, n, halves);
      else floats_to_bfloats(v, n, halves);
      std::memcpy(out, halves, (size_t)n * 2);
    }
  }

  static bool encode_block(const Plan& plan, const float* v, int64_t n, int64_t, uint64_t, uint32_t, float*, uint8_t* out) {
    const int kind = plan.codec.kind, width = kind == PQ_NONE ? 4 : 2;
    vi tops{};
    int64_t i = 0;
    for (; i + kPiece <= n; i += kPiece) {
      for (int64_t k = 0; k < kPiece; k += W) tops = max(tops, bits(load<vf>(v + i + k)) & 0x7fffffff);
      narrow(kind, v + i, kPiece, out + i * width);
    }
    narrow(kind, v + i, n - i, out + i * width);
    int32_t top = largest_lane(tops);
    for (; i < n; ++i) {
      int32_t b;
      std::memcpy(&b, v + i, 4);
      top = std::max(top, b & 0x7fffffff);
    }
    // A value that rounds to Inf is as lost as one that is Inf.
    return top < (kind == PQ_FP16 ? 0x477ff000 : kind == PQ_BF16 ? 0x7f7f8000 : kInfBits);
  }

  static PQ_INLINE void add(int kind, const uint8_t* in, int64_t n, float weight, float* destination) {
    float values[kPiece];
    uint16_t halves[kPiece];
    if (kind == PQ_NONE) {
      std::memcpy(values, in, (size_t)n * 4);
    } else {
      std::memcpy(halves, in, (size_t)n * 2);
      if (kind == PQ_FP16) halves_to_floats(halves, n, values);
      else bfloats_to_floats(halves, n, values);
    }
    for (int64_t i = 0; i < n; ++i) {
      const float x = values[i] * weight;
      destination[i] = destination[i] + x;
    }
  }

  static int32_t decode_block(const Plan& plan, const uint8_t* in, int64_t n, uint64_t, uint32_t, const float*, float weight,
                              float* destination) {
    const int kind = plan.codec.kind, width = kind == PQ_NONE ? 4 : 2;
    int64_t i = 0;
    for (; i + kPiece <= n; i += kPiece) add(kind, in + i * width, kPiece, weight, destination + i);
    add(kind, in + i * width, n - i, weight, destination + i);
    return PQ_OK;
  }
};

// ---- loops over blocks ----

template <class Codec>
bool encode_blocks(const Plan& plan, const pq_source& source, int64_t start, uint64_t key, uint8_t* payload, int64_t begin,
                   int64_t end) {
  alignas(64) float scratch[kMaxBlock];
  bool finite = true;
  for (int64_t block = begin; block < end && finite; ++block) {
    const int64_t n = plan.block_elements(block), padded = Codec::padded(plan, n), at = start + block * plan.codec.block_size;
    const float* v = load_block(source, at, n, padded, scratch);
    uint8_t* codes = payload + plan.scales_nbytes + block * plan.block_nbytes;
    float scales[kMaxScales];
    finite = Codec::encode_block(plan, v, n, padded, key, (uint32_t)block, scales, codes);
    const int64_t scales_nbytes = 4 * plan.scales_per_block;
    if (finite) std::memcpy(payload + block * scales_nbytes, scales, (size_t)scales_nbytes);
    if (source.next_residual && finite) {  // the block and its codes are in the first cache
      float* rest = source.next_residual + at;
      std::fill(rest, rest + n, 0.0f);
      Codec::decode_block(plan, codes, n, key, (uint32_t)block, scales, 1.0f, rest);
      for (int64_t i = 0; i < n; ++i) rest[i] = v[i] - rest[i];
    }
  }
  return finite;
}

template <class Codec>
PQ_INLINE int32_t decode_one(const Plan& plan, const uint8_t* payload, uint64_t key, float weight, int64_t block, int64_t n,
                             float* destination) {
  float scales[kMaxScales];
  for (int k = 0; k < plan.scales_per_block; ++k) {
    std::memcpy(scales + k, payload + 4 * (block * plan.scales_per_block + k), 4);
    if (!(scales[k] >= 0.0f && scales[k] < INFINITY)) return PQ_BAD_SCALE;
  }
  const uint8_t* const codes = payload + plan.scales_nbytes + block * plan.block_nbytes;
  prefetch(codes + plan.block_nbytes, plan.block_nbytes);
  return Codec::decode_block(plan, codes, n, key, (uint32_t)block, scales, weight, destination);
}

template <class Codec>
int32_t decode_blocks(const Plan& plan, const uint8_t* payload, uint64_t key, float weight, float* destination, int64_t begin,
                      int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int32_t status = decode_one<Codec>(plan, payload, key, weight, block, plan.block_elements(block),
                                             destination + block * plan.codec.block_size);
    if (status != PQ_OK) return status;
  }
  return PQ_OK;
}

template <class Codec>
int32_t reduce_blocks(const Plan& plan, int32_t num_payloads, const uint8_t* const* payloads, const pq_keys* keys, float weight,
                      const pq_source* own, int64_t own_start, const float* base, float* destination, int64_t begin,
                      int64_t end) {
  alignas(64) float scratch[kMaxBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = plan.block_elements(block), at = block * plan.codec.block_size;
    float* const sum = destination + at;  // a block: it stays in the first cache while the payloads are added
    std::fill(sum, sum + n, 0.0f);
    for (int32_t r = 0; r < num_payloads; ++r) {
      if (payloads[r]) {
        const int32_t status = decode_one<Codec>(plan, payloads[r], keys[r].own, weight, block, n, sum);
        if (status != PQ_OK) return status;
      } else {
        Codec::add_own(plan, load_block(*own, own_start + at, n, n, scratch), n, weight, sum);
      }
    }
    if (base)
      for (int64_t i = 0; i < n; ++i) sum[i] = base[at + i] + sum[i];
  }
  return PQ_OK;
}

template <class F>
auto with_codec(const Plan& plan, F f) {
  switch (plan.codec.kind) {
    case PQ_MAXSCALE:
    case PQ_QSGD:
    case PQ_TERNGRAD: return f(Uniform{});
    case PQ_EDEN: return f(Eden{});
    case PQ_SIGNSGD: return f(SignSgd{});
    case PQ_NATURAL: return f(Natural{});
    case PQ_ONEBIT: return f(OneBit{});
    default: return f(Cast{});
  }
}

bool encode(const Plan& plan, const pq_source& source, int64_t start, pq_keys keys, uint8_t* payload, int64_t begin,
            int64_t end) {
  return with_codec(plan, [&](auto codec) {
    return encode_blocks<decltype(codec)>(plan, source, start, keys.own, payload, begin, end);
  });
}

// ---- sparse: some numbers of each block, which another codec codes as one vector ----

// The positions of a block: drawn or read.
bool positions_of(const Plan& plan, const uint8_t* payload, pq_keys keys, int64_t block, int32_t* positions) {
  const IndexCode& index = plan.index_of(block);
  const int64_t n = plan.block_elements(block);
  if (plan.codec.kind != PQ_RANDOMK) return read_positions(plan.positions_of(payload, block), n, index, positions);
  draw(keys.shared, (uint32_t)block, n, index.kept, positions);
  return true;
}

// What a number that is kept is multiplied by.
float factor_of(const Plan& plan, int64_t block) {
  return plan.codec.flags & PQ_SCALED ? (float)plan.block_elements(block) / (float)plan.index_of(block).kept : 1.0f;
}

bool select_numbers(const Plan& plan, const pq_source& source, int64_t start, pq_keys keys, float* numbers, uint8_t* payload,
                    int64_t begin, int64_t end) {
  alignas(64) float scratch[kMaxBlock];
  alignas(64) int32_t positions[kMostPositions];
  for (int64_t block = begin; block < end; ++block) {
    const IndexCode& index = plan.index_of(block);
    const int64_t n = plan.block_elements(block), padded = round_up(n, 64), at = start + block * plan.codec.block_size;
    const float* v = load_block(source, at, n, padded, scratch);
    float* kept = numbers + block * plan.index.kept;
    if (plan.codec.kind == PQ_RANDOMK) {
      if (!(max_abs(v, padded) <= FLT_MAX)) return false;
      draw(keys.shared, (uint32_t)block, n, index.kept, positions);
    } else {
      if (!select_largest(v, padded, index.kept, positions)) return false;
      write_positions(positions, index, const_cast<uint8_t*>(plan.positions_of(payload, block)));
    }
    for (int64_t i = 0; i < index.kept; ++i) kept[i] = v[positions[i]];
    if (plan.codec.flags & PQ_SCALED) {
      const float factor = factor_of(plan, block);
      for (int64_t i = 0; i < index.kept; ++i)
        if (!(std::fabs(kept[i] * factor) <= 0x1p126f)) return false;
    }
    if (plan.codec.kind == PQ_THRESHOLD)
      for (int64_t i = 0; i < index.kept; ++i) {
        int32_t magnitude;
        std::memcpy(&magnitude, kept + i, 4);
        if ((magnitude & 0x7fffffff) < plan.codec.threshold) kept[i] = 0.0f;
      }
    if (source.next_residual) std::memcpy(source.next_residual + at, v, (size_t)n * 4);
  }
  return true;
}

// So many blocks at once that their numbers fill some blocks of the codec that codes them.
int64_t blocks_at_once(const Plan& plan) { return std::max<int64_t>(1, kMaxBlock / plan.index.kept); }

// The numbers that were kept of some blocks, times weight.
struct Numbers {
  const Plan& plan;
  int64_t first = 0;  // that of memory[0]
  alignas(64) float memory[3 * kMaxBlock];

  explicit Numbers(const Plan& p) : plan(p) {}

  // Blocks [begin, end), at most blocks_at_once; the codec's blocks that they lie in are decoded in whole.
  int32_t decode(const uint8_t* payload, uint64_t key, float weight, int64_t begin, int64_t end) {
    const Plan& values = *plan.values;
    const int64_t size = values.codec.block_size, stop = std::min(end * plan.index.kept, values.count);
    const int64_t from = begin * plan.index.kept / size, to = (stop + size - 1) / size;
    first = from * size;
    std::fill(memory, memory + (to - from) * size, 0.0f);
    return with_codec(values, [&](auto codec) {
      for (int64_t b = from; b < to; ++b) {
        const int32_t status = decode_one<decltype(codec)>(values, payload, key, weight, b, values.block_elements(b),
                                                           memory + (b - from) * size);
        if (status != PQ_OK) return status;
      }
      return int32_t{PQ_OK};
    });
  }
  const float* of(int64_t block) const { return memory + block * plan.index.kept - first; }
};

// f(destination, number) at the place of every number that was kept of the block.
template <class F>
PQ_INLINE int32_t scatter(const Plan& plan, const Numbers& numbers, const uint8_t* payload, pq_keys keys, int64_t block,
                          float* destination, F f) {
  alignas(64) int32_t positions[kMostPositions];
  if (!positions_of(plan, payload, keys, block, positions)) return PQ_BAD_CODE;
  const float* number = numbers.of(block);
  const float factor = factor_of(plan, block);
  const int64_t kept = plan.index_of(block).kept;
  if (factor == 1.0f)
    for (int64_t i = 0; i < kept; ++i) f(destination[positions[i]], number[i]);
  else
    for (int64_t i = 0; i < kept; ++i) f(destination[positions[i]], number[i] * factor);
  return PQ_OK;
}

PQ_INLINE void add_number(float& to, float x) { to = to + x; }
PQ_INLINE void subtract_number(float& to, float x) { to = to - x; }

template <class F>
int32_t scatter_blocks(const Plan& plan, const uint8_t* payload, pq_keys keys, float weight, float* destination, int64_t begin,
                       int64_t end, F f) {
  Numbers numbers(plan);
  for (int64_t next, some = begin; some < end; some = next) {
    next = std::min(some + blocks_at_once(plan), end);
    int32_t status = numbers.decode(payload, keys.own, weight, some, next);
    for (int64_t block = some; block < next && status == PQ_OK; ++block)
      status = scatter(plan, numbers, payload, keys, block, destination + block * plan.codec.block_size, f);
    if (status != PQ_OK) return status;
  }
  return PQ_OK;
}

int32_t subtract(const Plan& plan, const uint8_t* payload, pq_keys keys, float* rest, int64_t begin, int64_t end) {
  return scatter_blocks(plan, payload, keys, 1.0f, rest, begin, end, subtract_number);
}

// What the numbers of a shard's owner count as: those that were drawn, and nothing elsewhere; NaN where they are not finite.
void own_part(const Plan& plan, const float* v, pq_keys keys, int64_t block, float* own) {
  alignas(64) int32_t positions[kMostPositions];
  const int64_t n = plan.block_elements(block), kept = plan.index_of(block).kept;
  const float factor = factor_of(plan, block);
  draw(keys.shared, (uint32_t)block, n, kept, positions);
  for (int64_t i = 0; i < n; ++i) own[i] = v[i] - v[i];
  for (int64_t i = 0; i < kept; ++i) own[positions[i]] = v[positions[i]] * factor;
}

void own_rest(const Plan& plan, const pq_source& source, int64_t start, pq_keys keys, int64_t begin, int64_t end) {
  alignas(64) float scratch[kMaxBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = plan.block_elements(block), at = start + block * plan.codec.block_size;
    const float* v = load_block(source, at, n, n, scratch);
    float* rest = source.next_residual + at;
    own_part(plan, v, keys, block, rest);
    for (int64_t i = 0; i < n; ++i) rest[i] = v[i] - rest[i];
  }
}

int32_t reduce_sparse(const Plan& plan, int32_t num_payloads, const uint8_t* const* payloads, const pq_keys* keys, float weight,
                      const pq_source* own, int64_t own_start, const float* base, float* destination, int64_t begin, int64_t end) {
  alignas(64) float scratch[kMaxBlock], part[kMaxBlock];
  Numbers numbers(plan);
  for (int64_t next, some = begin; some < end; some = next) {
    next = std::min(some + blocks_at_once(plan), end);
    const int64_t at = some * plan.codec.block_size, stop = std::min(next * plan.codec.block_size, plan.count);
    std::fill(destination + at, destination + stop, 0.0f);
    for (int32_t r = 0; r < num_payloads; ++r) {
      int32_t status = payloads[r] ? numbers.decode(payloads[r], keys[r].own, weight, some, next) : int32_t{PQ_OK};
      for (int64_t block = some; block < next && status == PQ_OK; ++block) {
        const int64_t n = plan.block_elements(block), offset = block * plan.codec.block_size;
        if (payloads[r]) {
          status = scatter(plan, numbers, payloads[r], keys[r], block, destination + offset, add_number);
          continue;
        }
        const float* v = load_block(*own, own_start + offset, n, n, scratch);
        if (plan.codec.kind == PQ_RANDOMK) {
          own_part(plan, v, keys[r], block, part);
          v = part;
        }
        AddsItself::add_own(plan, v, n, weight, destination + offset);
      }
      if (status != PQ_OK) return status;
    }
    if (base)
      for (int64_t i = at; i < stop; ++i) destination[i] = base[i] + destination[i];
  }
  return PQ_OK;
}

int32_t decode_add(const Plan& plan, const uint8_t* payload, pq_keys keys, float weight, float* destination, int64_t begin,
                   int64_t end) {
  if (plan.values) return scatter_blocks(plan, payload, keys, weight, destination, begin, end, add_number);
  return with_codec(plan, [&](auto codec) {
    return decode_blocks<decltype(codec)>(plan, payload, keys.own, weight, destination, begin, end);
  });
}

int32_t reduce(const Plan& plan, int32_t num_payloads, const uint8_t* const* payloads, const pq_keys* keys, float weight,
               const pq_source* own, int64_t own_start, const float* base, float* destination, int64_t begin, int64_t end) {
  if (plan.values)
    return reduce_sparse(plan, num_payloads, payloads, keys, weight, own, own_start, base, destination, begin, end);
  return with_codec(plan, [&](auto codec) {
    return reduce_blocks<decltype(codec)>(plan, num_payloads, payloads, keys, weight, own, own_start, base, destination, begin,
                                            end);
  });
}

void apply(const float* mean, int64_t start, int64_t count, const pq_source& target, bool past_caches) {
  alignas(64) float scratch[kCastBlock];
  for_pieces(target, start, count, [&](const pq_segment& segment, int64_t at, int64_t from, int64_t length) {
    if (!target.anchor) {
      if (past_caches && segment.dtype == PQ_F32) stream_copy((float*)segment.data + at, mean + from, length);
      else store_values(mean + from, length, segment, at);
      return;
    }
    if (target.anchor_dtype == PQ_F64) {
      double* anchor = (double*)target.anchor + start + from;
      for (int64_t i = 0; i < length; ++i) anchor[i] = anchor[i] + (double)mean[from + i];
      if (segment.dtype == PQ_F64) {
        std::memcpy((double*)segment.data + at, anchor, (size_t)length * 8);
        return;
      }
      for (int64_t done = 0; done < length; done += kCastBlock) {
        const int64_t n = std::min<int64_t>(kCastBlock, length - done);
        for (int64_t i = 0; i < n; ++i) scratch[i] = (float)anchor[done + i];
        store_values(scratch, n, segment, at + done);
      }
      return;
    }
    float* anchor = (float*)target.anchor + start + from;
    const float* m = mean + from;
    if (segment.dtype == PQ_F32) {
      float* x = (float*)segment.data + at;
      for (int64_t i = 0; i < length; ++i) x[i] = anchor[i] = anchor[i] + m[i];
    } else {
      for (int64_t i = 0; i < length; ++i) anchor[i] = anchor[i] + m[i];
      store_values(anchor, length, segment, at);
    }
  });
}

template <class Number>
void rebase_from(const Number* base, int64_t start, int64_t count, const pq_source& target) {
  alignas(64) float scratch[kCastBlock];
  for_pieces(target, start, count, [&](const pq_segment& segment, int64_t at, int64_t from, int64_t length) {
    const Number* anchor = (const Number*)target.anchor + start + from;
    const Number* b = base + from;
    if (segment.dtype == (sizeof(Number) == 8 ? PQ_F64 : PQ_F32)) {
      Number* x = (Number*)segment.data + at;
      for (int64_t i = 0; i < length; ++i) x[i] = b[i] + (x[i] - anchor[i]);
      return;
    }
    for (int64_t done = 0; done < length; done += kCastBlock) {
      const int64_t n = std::min<int64_t>(kCastBlock, length - done);
      to_floats(segment, at + done, n, scratch);
      for (int64_t i = 0; i < n; ++i) scratch[i] = (float)(b[done + i] + ((Number)scratch[i] - anchor[done + i]));
      store_values(scratch, n, segment, at + done);
    }
  });
}

void rebase(const void* base, int64_t start, int64_t count, const pq_source& target) {
  if (target.anchor_dtype == PQ_F64) rebase_from((const double*)base, start, count, target);
  else rebase_from((const float*)base, start, count, target);
}

void gather_values(const pq_source& source, int64_t start, int64_t count, void* destination, int32_t dtype) {
  if (dtype == PQ_F32) {
    load_values(source, start, count, (float*)destination);
    return;
  }
  double* out = (double*)destination;
  alignas(64) float scratch[kCastBlock];
  for_pieces(source, start, count, [&](const pq_segment& segment, int64_t at, int64_t to, int64_t length) {
    for (int64_t done = 0; done < length; done += kCastBlock) {
      const int64_t n = std::min<int64_t>(kCastBlock, length - done);
      double* o = out + to + done;
      if (segment.dtype == PQ_F64) {
        std::memcpy(o, (const double*)segment.data + at + done, (size_t)n * 8);
      } else {
        to_floats(segment, at + done, n, scratch);
        std::copy(scratch, scratch + n, o);
      }
      if (!source.anchor) continue;
      const int64_t where = start + to + done;
      if (source.anchor_dtype == PQ_F64)
        for (int64_t i = 0; i < n; ++i) o[i] -= ((const double*)source.anchor)[where + i];
      else
        for (int64_t i = 0; i < n; ++i) o[i] -= (double)((const float*)source.anchor)[where + i];
    }
  });
}

void outer(float decay, float a, float b, int64_t count, float* momentum, float* delta) {
  for (int64_t i = 0; i < count; ++i) {
    const float d = delta[i], m = decay * momentum[i] + d;
    momentum[i] = m;
    delta[i] = a * m + b * d;
  }
}

// At most kCastBlock elements.
double distance(const pq_source& source, int64_t start, int64_t count, const float* center) {
  alignas(64) float values[kCastBlock];
  load_values(source, start, count, values);
  double sums[8] = {};
  for (int64_t i = 0; i < count; ++i) {
    const double away = (double)values[i] - (double)center[i];
    sums[i % 8] += away * away;
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

void capture(const pq_source& source, int64_t start, int64_t count) {
  pq_source values = source;
  values.anchor = nullptr;
  values.residual = nullptr;
  if (source.anchor_dtype == PQ_F64) gather_values(values, start, count, (double*)source.anchor + start, PQ_F64);
  else gather_values(values, start, count, (float*)source.anchor + start, PQ_F32);
}

}  // namespace
}  // namespace PQ_ISA

#define PQ_JOIN_(a, b) a##b
#define PQ_JOIN(a, b) PQ_JOIN_(a, b)
#define PQ_TEXT_(a) #a
#define PQ_TEXT(a) PQ_TEXT_(a)
extern const Kernels PQ_JOIN(kernels_, PQ_ISA) = {
#if defined(__aarch64__)
    "neon",
#else
    PQ_TEXT(PQ_ISA),
#endif
    PQ_ISA::encode,   PQ_ISA::decode_add, PQ_ISA::reduce,        PQ_ISA::select_numbers, PQ_ISA::subtract,
    PQ_ISA::own_rest, PQ_ISA::apply,      PQ_ISA::rebase,        PQ_ISA::gather_values,  PQ_ISA::outer,
    PQ_ISA::distance, PQ_ISA::capture,    PQ_ISA::project,       PQ_ISA::backproject,    PQ_ISA::reconstruct,
    PQ_ISA::orthogonalize};

}  // namespace pqasgd
