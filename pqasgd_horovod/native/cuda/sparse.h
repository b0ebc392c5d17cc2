// Sparse codecs: which numbers of a block are kept, and how it is written where they were; src/sparse.h has the same for a CPU.
#pragma once
#include "group.h"

namespace pqasgd {
namespace gpu {

constexpr int kMostWords = kMaxBlock / 32;  // of a bit for every number of a block: no more than there are threads

// One bit for each number that is kept, and how many are kept before each word.
struct Kept {
  uint32_t* words;
  int* before;
};

// f(i, position) for the i-th number that is kept.
template <class F>
__device__ inline void each_kept(const Kept& kept, int num_words, F f) {
  if ((int)threadIdx.x < num_words) {
    int i = kept.before[threadIdx.x];
    for (uint32_t word = kept.words[threadIdx.x]; word; word &= word - 1) f(i++, 32 * (int)threadIdx.x + __ffs((int)word) - 1);
  }
  __syncthreads();
}

__device__ inline int count_ones(Kept& kept, int num_words) {
  int total;
  const int before = ones_before(kept.words, num_words, &total);
  if ((int)threadIdx.x < num_words) kept.before[threadIdx.x] = before;
  __syncthreads();
  return total;
}

// The k numbers of largest magnitude, of equal ones the first; v has zeros up to `padded`. False if one is NaN or Inf.
__device__ inline bool select_largest(const float* v, int padded, int k, Kept& kept) {
  const int num_words = padded / 32, lane = threadIdx.x % 32;
  uint32_t own[kPerThread], most = 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int i = (int)threadIdx.x + j * (int)blockDim.x;
    own[j] = i < padded ? magnitude(v[i]) : 0;
    most = own[j] > most ? own[j] : most;
  }
  most = group_max<Parts>(most);
  if (most >= kInfBits) return false;

  uint32_t low = 0, high = most + 1;  // at least k numbers reach low, fewer than k reach high
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    int count = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) count += own[j] >= middle;
    count = group_sum<Parts>(count);
    if (count >= k) low = middle;
    else high = middle;
    if (count == k) break;
  }

  __shared__ uint32_t equal[kMostWords];
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int i = (int)threadIdx.x + j * (int)blockDim.x;  // of the 32 threads of a warp all are below `padded`, or none
    const uint32_t above = __ballot_sync(kAllLanes, i < padded && own[j] > low);
    const uint32_t same = __ballot_sync(kAllLanes, i < padded && own[j] == low);
    if (lane == 0 && i < padded) {
      kept.words[i / 32] = above;
      equal[i / 32] = same;
    }
  }
  __syncthreads();
  int left = k - count_ones(kept, num_words), unused;
  left -= ones_before(equal, num_words, &unused);  // so many of those that equal the threshold are kept in this word
  if ((int)threadIdx.x < num_words) {
    uint32_t rest = equal[threadIdx.x], chosen = 0;
    for (; rest && left > 0; --left, rest &= rest - 1) chosen |= rest & (0u - rest);
    kept.words[threadIdx.x] |= chosen;
  }
  __syncthreads();
  count_ones(kept, num_words);
  return true;
}

// f(i, position) for the positions that randomk draws: one in each of k cells of n / k numbers, all turned by one random number.
template <class F>
__device__ inline void each_drawn(uint64_t key, uint32_t block, int n, int k, F f) {
  const auto drawn = [&](int w) {
    const Pair words = random_words(key, block, (uint32_t)w / 32, (uint32_t)w % 16);
    return w % 32 < 16 ? words.x0 : words.x1;
  };
  const auto limit = [&](int i) { return (uint32_t)(i * (n / k)) + (uint32_t)((int64_t)i * (n % k) / k); };
  const uint32_t turn = (uint32_t)((uint64_t)drawn(0) * (uint64_t)n >> 32);
  const auto position = [&](int i) {
    const uint32_t begin = limit(i), end = limit(i + 1);
    return begin + (uint32_t)((uint64_t)drawn(i + 1) * (end - begin) >> 32) + turn;
  };
  int turned = 0;  // past the end: in rising order they are the first
  for (int i = threadIdx.x; i < k; i += blockDim.x) turned += position(i) >= (uint32_t)n;
  turned = group_sum<Parts>(turned);
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const uint32_t at = position(i);
    if (at >= (uint32_t)n) f(i - (k - turned), (int)(at - n));
    else f(i + turned, (int)at);
  }
  __syncthreads();
}

__device__ inline void write_positions(const Kept& kept, int num_words, const IndexCode& code, uint8_t* out) {
  __shared__ uint32_t words[kMostWords + 1];
  const int low_bits = code.low_bits, begin = (int)code.kept * low_bits;
  for (int w = threadIdx.x; w <= kMostWords; w += blockDim.x) words[w] = 0;
  __syncthreads();
  each_kept(kept, num_words, [&](int i, int position) {
    if (low_bits) {
      const uint64_t low = (uint64_t)((uint32_t)position & ((1u << low_bits) - 1)) << (i * low_bits % 32);
      atomicOr(&words[i * low_bits / 32], (uint32_t)low);
      if (low >> 32) atomicOr(&words[i * low_bits / 32 + 1], (uint32_t)(low >> 32));
    }
    const int bit = begin + (position >> low_bits) + (low_bits ? i : 0);
    atomicOr(&words[bit / 32], 1u << (bit % 32));
  });
  for (int at = threadIdx.x; at < (int)code.nbytes; at += blockDim.x) out[at] = (uint8_t)(words[at / 4] >> (at % 4 * 8));
  __syncthreads();
}

// False for what write_positions never writes: another number of ones, positions that do not rise, or are beyond the block.
__device__ inline bool read_positions(const uint8_t* in, int n, const IndexCode& code, int* positions) {
  __shared__ uint32_t words[kMostWords + 2], ones[kMostWords + 1];
  __shared__ int before[kMostWords + 1];
  const int nbytes = (int)code.nbytes, num_words = (nbytes + 3) / 4, low_bits = code.low_bits, kept = (int)code.kept;
  const int begin = kept * low_bits;
  for (int w = threadIdx.x; w < num_words + 1; w += blockDim.x) {
    uint32_t word = 0;
    for (int k = 0; k < 4 && 4 * w + k < nbytes; ++k) word |= (uint32_t)in[4 * w + k] << (8 * k);
    words[w] = word;
    const int hidden = begin - 32 * w;  // bits before those that stand for positions
    ones[w] = hidden >= 32 ? 0 : hidden > 0 ? word >> hidden << hidden : word;
  }
  __syncthreads();
  Kept found{ones, before};
  const int total = count_ones(found, num_words);
  bool good = total == kept;
  each_kept(found, num_words, [&](int i, int one) {
    if (i >= kept) return;
    int position = one;
    if (low_bits) {
      const int at = i * low_bits;
      const uint64_t both = (uint64_t)words[at / 32 + 1] << 32 | words[at / 32];
      position = (one - begin - i) << low_bits | (int)((uint32_t)(both >> (at % 32)) & ((1u << low_bits) - 1));
    }
    positions[i] = position;
    good &= position < n;
  });
  if (total == kept)
    for (int i = (int)threadIdx.x + 1; i < kept; i += blockDim.x) good &= positions[i] > positions[i - 1];
  return !Parts::any(!good);
}

}  // namespace gpu
}  // namespace pqasgd
