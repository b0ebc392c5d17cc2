// What a group of threads does together. One group, a CUDA thread block, works on one block of a codec at a time.
//
// Nothing here may depend on the device or on the number of threads: sums have the 64 lanes and the order of docs/architecture.md.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../src/keys.h"
#include "../src/numbers.h"
#include "../src/plan.h"
#include "runtime.h"

namespace pqasgd {
namespace gpu {

constexpr int kMostPerThread = 16;  // numbers of a block: they stay in registers
constexpr int kMostThreads = kMaxBlock / kMostPerThread;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kInfBits = 0x7f800000;

__device__ inline float from_bits(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
__device__ inline uint32_t to_bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
__device__ inline uint32_t magnitude(float x) { return to_bits(x) & 0x7fffffff; }

// f(k, i) for this thread's numbers i of [0, n): k counts them, and is known to the compiler.
template <class F>
__device__ inline void each_own(int n, F f) {
#pragma unroll
  for (int k = 0; k < kMostPerThread; ++k) {
    const int i = (int)threadIdx.x + k * (int)blockDim.x;
    if (i < n) f(k, i);
  }
}

// f(i, u) with the random number below 65536 of every i of [0, padded); one call of the generator serves four of them.
template <class F>
__device__ inline void each_uniform16(int padded, uint64_t key, uint32_t block, F f) {
  for (int w = threadIdx.x; w < padded / 4; w += blockDim.x) {
    const int i = w / 16 * 64 + w % 16;
    const Pair words = threefry<kStreamRounds>(key, (uint32_t)w, block);
    f(i, words.x0 & 0xffff);
    f(i + 16, words.x0 >> 16);
    f(i + 32, words.x1 & 0xffff);
    f(i + 48, words.x1 >> 16);
  }
}

// The sum of value(i), i < padded, a multiple of 64.
template <class F>
__device__ inline float sum64(int padded, F value) {
  __shared__ float sums[64];
  __shared__ float total;
  for (int lane = threadIdx.x; lane < 64; lane += blockDim.x) {
    float sum = 0.0f;
    for (int i = lane; i < padded; i += 64) sum = sum + value(i);
    sums[lane] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float x = sums[threadIdx.x] + sums[threadIdx.x + 32];
    for (int half = 16; half > 0; half /= 2) x = x + __shfl_down_sync(kAllLanes, x, half);
    if (threadIdx.x == 0) total = x;
  }
  __syncthreads();
  return total;  // the next one is written after all have met again
}

__device__ inline uint32_t group_max(uint32_t x) {
  __shared__ uint32_t largest;
  if (threadIdx.x == 0) largest = 0;
  for (int half = 16; half > 0; half /= 2) {
    const uint32_t other = __shfl_down_sync(kAllLanes, x, half);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMax(&largest, x);
  __syncthreads();
  const uint32_t result = largest;
  __syncthreads();  // only then may the next one begin
  return result;
}

__device__ inline int group_sum(int x) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(kAllLanes, x, half);
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicAdd(&sum, x);
  __syncthreads();
  const int result = sum;
  __syncthreads();
  return result;
}

__device__ inline bool group_any(bool x) { return __syncthreads_or(x) != 0; }

// How many ones there are before word `threadIdx.x` of num_words <= blockDim.x words in shared memory; *total: in all of them.
__device__ inline int ones_before(const uint32_t* words, int num_words, int* total) {
  __shared__ int sums[kMostThreads];
  const int t = threadIdx.x, own = t < num_words ? __popc(words[t]) : 0;
  int sum = own;
  sums[t] = sum;
  __syncthreads();
  for (int step = 1; step < (int)blockDim.x; step *= 2) {
    const int before = t >= step ? sums[t - step] : 0;
    __syncthreads();
    sums[t] = sum += before;
    __syncthreads();
  }
  *total = sums[blockDim.x - 1];
  __syncthreads();
  return sum - own;
}

// ---- the caller's tensors ----

// A pq_source, or in the place of its segments and its anchor `flat`: an array of numbers.
struct Vector {
  pq_source tensors;
  const float* flat;
};

// Calls f(segment, offset in it, offset in the range, length) for the pieces of [start, start + n), alike on all threads.
template <class F>
__device__ inline void for_pieces(const pq_source& s, int64_t start, int64_t n, F f) {
  int64_t low = 0, high = s.num_segments;  // offsets[low] <= start < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (s.offsets[middle] <= start) low = middle;
    else high = middle;
  }
  for (int64_t done = 0; done < n; ++low) {
    const int64_t inside = start + done - s.offsets[low], left = s.segments[low].numel - inside;
    const int64_t length = left < n - done ? left : n - done;
    if (length > 0) {
      f(s.segments[low], inside, done, length);
      done += length;
    }
  }
}

__device__ inline float widened(const pq_segment& segment, int64_t i) {
  switch (segment.dtype) {
    case PQ_F32: return ((const float*)segment.data)[i];
    case PQ_F64: return (float)((const double*)segment.data)[i];
    case PQ_F16: return half_to_float(((const uint16_t*)segment.data)[i]);
    default: return bfloat_to_float(((const uint16_t*)segment.data)[i]);
  }
}
__device__ inline double doubled(const pq_segment& segment, int64_t i) {
  return segment.dtype == PQ_F64 ? ((const double*)segment.data)[i] : (double)widened(segment, i);
}

__device__ inline void store(const pq_segment& segment, int64_t i, float x) {
  switch (segment.dtype) {
    case PQ_F32: ((float*)segment.data)[i] = x; break;
    case PQ_F64: ((double*)segment.data)[i] = (double)x; break;
    case PQ_F16: ((uint16_t*)segment.data)[i] = float_to_half(x); break;
    default: ((uint16_t*)segment.data)[i] = float_to_bfloat(x);
  }
}

// f(i, x) for all numbers x = source[start + i], i < n, minus the anchor, plus the residual; each thread has some of them.
template <class F>
__device__ inline void for_values(const Vector& vector, int64_t start, int n, F f) {
  const pq_source& s = vector.tensors;
  if (vector.flat) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const float x = vector.flat[start + i];
      f(i, s.residual ? x + s.residual[start + i] : x);
    }
    return;
  }
  for_pieces(s, start, n, [&](const pq_segment& segment, int64_t at, int64_t to, int64_t length) {
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      const int64_t position = start + to + i;
      float x;
      if (!s.anchor) x = widened(segment, at + i);
      else if (s.anchor_dtype == PQ_F32) x = widened(segment, at + i) - ((const float*)s.anchor)[position];
      else x = (float)(doubled(segment, at + i) - ((const double*)s.anchor)[position]);
      if (s.residual) x = x + s.residual[position];
      f((int)(to + i), x);
    }
  });
}

// ---- bytes ----

__device__ inline bool is_aligned(const void* p, int nbytes) { return ((uintptr_t)p & (uintptr_t)(nbytes - 1)) == 0; }

// The low `nbytes` of a word, in one store where the address allows it.
__device__ inline void store_bytes(uint8_t* out, uint64_t word, int nbytes) {
  if (nbytes == 8 && is_aligned(out, 8)) {
    *(uint64_t*)out = word;
  } else if (nbytes == 4 && is_aligned(out, 4)) {
    *(uint32_t*)out = (uint32_t)word;
  } else if (nbytes == 2 && is_aligned(out, 2)) {
    *(uint16_t*)out = (uint16_t)word;
  } else {
    for (int k = 0; k < nbytes; ++k) out[k] = (uint8_t)(word >> (8 * k));
  }
}
__device__ inline uint32_t load_bytes(const uint8_t* in, int nbytes) {
  if (nbytes == 4 && is_aligned(in, 4)) return *(const uint32_t*)in;
  if (nbytes == 2 && is_aligned(in, 2)) return *(const uint16_t*)in;
  uint32_t word = 0;
  for (int k = 0; k < nbytes; ++k) word |= (uint32_t)in[k] << (8 * k);
  return word;
}

// n codes, one a byte in shared memory, to ceil(n * bits / 8) bytes; those from n to the next multiple of 8 are 0.
__device__ inline void pack(const uint8_t* codes, int n, int bits, uint8_t* out) {
  const int nbytes = (n * bits + 7) / 8;
  for (int eight = threadIdx.x; eight * 8 < n; eight += blockDim.x) {
    uint64_t unpacked, packed = 0;
    std::memcpy(&unpacked, codes + 8 * eight, 8);
    for (int k = 0; k < 8; ++k) packed |= (unpacked >> (8 * k) & 0xff) << (k * bits);
    const int at = eight * bits, room = nbytes - at;
    store_bytes(out + at, packed, bits < room ? bits : room);
  }
}
__device__ inline uint32_t code_at(const uint8_t* in, int i, int bits) {
  const int at = i * bits, shift = at % 8;
  uint32_t word = in[at / 8];
  if (shift + bits > 8) word |= (uint32_t)in[at / 8 + 1] << 8;
  return word >> shift & ((1u << bits) - 1);
}

}  // namespace gpu
}  // namespace pqasgd
