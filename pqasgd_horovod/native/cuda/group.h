// What a group of threads does together. One group works on one block of a codec at a time.
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

constexpr int kPerThread = 16;  // numbers of a block that a thread has: they stay in registers
typedef float Numbers[kPerThread];
constexpr int kWarp = 32;
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

// A group that is one warp, for blocks of up to 512 numbers. A CUDA thread block has some of them, which know nothing of each other.
// A thread's own numbers are every 32nd of the block, so that they are of two lanes of sum64.
struct Warp {
  static constexpr int kStep = 32, kMostNumbers = kStep * kPerThread, kInThreadBlock = 4;

  static int threads_for(int) { return kWarp; }
  static __device__ int thread() { return (int)threadIdx.x % kWarp; }
  static __device__ int threads() { return kWarp; }
  static __device__ int first() { return thread(); }  // of the own numbers
  static __device__ int in_thread_block() { return (int)threadIdx.x / kWarp; }
  static __device__ int64_t index() { return (int64_t)blockIdx.x * kInThreadBlock + in_thread_block(); }
  static __device__ int64_t count() { return (int64_t)gridDim.x * kInThreadBlock; }
  static __device__ void meet() { __syncwarp(); }
  static __device__ bool any(bool x) { return __ballot_sync(kAllLanes, x) != 0; }

  // Of value(k) of all threads' own numbers; it is 0 for those past the end.
  template <class F>
  static __device__ float sum64(F value) {
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) sums[k % 2] = sums[k % 2] + value(k);
    return sum_of_warp(sums[0] + sums[1]);
  }
  // The x of all threads, in any order.
  template <class T, class F>
  static __device__ T join(T x, F both) {
    for (int half = kWarp / 2; half > 0; half /= 2) x = both(x, __shfl_xor_sync(kAllLanes, x, half));
    return x;
  }
  // The upper half added to the lower, and so on: what is right for thread 0 all threads have.
  static __device__ float sum_of_warp(float x) {
    return join(x, [](float a, float b) { return a + b; });
  }
};

// A group that is a CUDA thread block of up to 512 threads, 64 for each part of 1024 numbers. A thread's own numbers are every 64th of
// a part, so that they are of one lane of sum64.
struct Parts {
  static constexpr int kStep = 64, kPart = kStep * kPerThread, kMostThreads = kMaxBlock / kPerThread, kInThreadBlock = 1;

  static int threads_for(int block_size) { return (block_size + kPart - 1) / kPart * kStep; }
  static __device__ int thread() { return (int)threadIdx.x; }
  static __device__ int threads() { return (int)blockDim.x; }
  static __device__ int part() { return thread() / kStep; }
  static __device__ int lane() { return thread() % kStep; }
  static __device__ int first() { return part() * kPart + lane(); }
  static __device__ int in_thread_block() { return 0; }
  static __device__ int64_t index() { return blockIdx.x; }
  static __device__ int64_t count() { return gridDim.x; }
  static __device__ void meet() { __syncthreads(); }
  static __device__ bool any(bool x) { return __syncthreads_or(x) != 0; }

  template <class T>
  static __device__ T* shared() {  // the same for all that is asked of all threads
    __shared__ T x[kStep];
    return x;
  }

  template <class F>
  static __device__ float sum64(F value) {
    float* const sums = shared<float>();
    float sum = 0.0f;
    for (int p = 0; p < threads() / kStep; ++p) {  // part by part, for the order
      if (p == part()) {
        if (p > 0) sum = sums[lane()];
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) sum = sum + value(k);
        sums[lane()] = sum;
      }
      meet();
    }
    const float total = Warp::sum_of_warp(sums[thread() % kWarp] + sums[thread() % kWarp + kWarp]);
    meet();  // only then may the next one begin
    return total;
  }
  template <class T, class F>
  static __device__ T join(T x, F both) {
    T* const of_warp = shared<T>();
    x = Warp::join(x, both);
    if (thread() % kWarp == 0) of_warp[thread() / kWarp] = x;
    meet();
    x = of_warp[0];
    for (int warp = 1; warp < threads() / kWarp; ++warp) x = both(x, of_warp[warp]);
    meet();  // only then may the next one begin
    return x;
  }
};

__device__ inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
template <class Group>
__device__ inline uint32_t group_max(uint32_t x) {
  return Group::join(x, larger);
}
template <class Group>
__device__ inline int group_sum(int x) {
  return Group::join(x, [](int a, int b) { return a + b; });
}

// f(k) for the thread's own numbers; those past the end of a block are 0.
template <class F>
__device__ inline void each_own(F f) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) f(k);
}

// Whether a group has as many numbers as it can have: then nobody asks of each one whether it is there.
template <class Group>
__device__ inline bool is_whole(int n) {
  return n == Group::threads() * kPerThread;
}

// f(k, step) for the thread's own numbers of [0, n): how far they are from the first, known to the compiler too. For reading and
// writing: nothing else should have to ask where the end is.
template <class Group, class F>
__device__ inline void each_within(int n, F f) {
  const int left = n - Group::first();
  if (is_whole<Group>(n)) return each_own([&](int k) { f(k, k * Group::kStep); });
  each_own([&](int k) {
    if (k * Group::kStep < left) f(k, k * Group::kStep);
  });
}

// All are read before any is needed: a thread waits for memory once.
template <class Group, class T, class X>
__device__ inline void read_own(const T* from, int n, X (&x)[kPerThread]) {
  const T* const own = from + Group::first();
  if (is_whole<Group>(n)) return each_own([&](int k) { x[k] = own[k * Group::kStep]; });
  each_own([&](int k) { x[k] = X(); });
  each_within<Group>(n, [&](int k, int step) { x[k] = own[step]; });
}
template <class Group, class T, class X>
__device__ inline void write_own(const X (&x)[kPerThread], int n, T* to) {
  T* const own = to + Group::first();
  each_within<Group>(n, [&](int k, int step) { own[step] = (T)x[k]; });
}

// Draws the random numbers below 65536 of a block; one call of the generator serves four of them. `words` are in shared memory, which
// has room for those of a whole group.
template <class Group>
__device__ inline void draw_uniform16(uint64_t key, uint32_t block, Pair* words) {
#pragma unroll
  for (int k = 0; k < kPerThread / 4; ++k) {
    const int w = Group::thread() + k * Group::threads();
    words[w] = threefry<kStreamRounds>(key, (uint32_t)w, block);
  }
  Group::meet();
}
// That of the own number k: of number i it is the i / 16 % 4th quarter of word i / 64 * 16 + i % 16.
template <class Group>
__device__ inline uint32_t uniform16(const Pair* words, int k) {
  const auto at = [](int i) { return i / 64 * 64 + i % 16 * 4 + i / 16 % 4; };
  return ((const uint16_t*)words)[at(Group::first()) + at(k * Group::kStep)];
}

// How many ones there are before word `threadIdx.x` of num_words <= blockDim.x words in shared memory; *total: in all of them.
__device__ inline int ones_before(const uint32_t* words, int num_words, int* total) {
  __shared__ int sums[Parts::kMostThreads];
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

}  // namespace gpu
}  // namespace pqasgd
