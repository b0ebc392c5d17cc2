// The C ABI: checks every argument, picks the kernels, spreads blocks over threads.
#include "pqasgd.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"
#include "keys.h"
#include "plan.h"

#if defined(PQ_HAVE_X86)
#include <immintrin.h>
#endif

namespace pqasgd {
namespace {

// ---- which kernels ----

const Kernels* available(const char* isa) {
#if defined(PQ_HAVE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !std::strcmp(isa, kernels_avx512.isa)) return &kernels_avx512;
  if (avx2 && !std::strcmp(isa, kernels_avx2.isa)) return &kernels_avx2;
#endif
  return std::strcmp(isa, kernels_plain.isa) ? nullptr : &kernels_plain;
}

const Kernels* best() {
  for (const char* isa : {"avx512", "avx2"})
    if (const Kernels* k = available(isa)) return k;
  return &kernels_plain;
}

std::atomic<const Kernels*> g_kernels{nullptr};
std::atomic<int32_t> g_threads{1};

const Kernels& kernels() {
  const Kernels* k = g_kernels.load(std::memory_order_relaxed);
  if (!k) g_kernels.store(k = best(), std::memory_order_relaxed);
  return *k;
}

// Round to nearest with subnormals kept, whatever the caller's thread is set to: the bytes depend on it.
struct DefaultFloatEnvironment {
#if defined(PQ_HAVE_X86)
  const unsigned saved = _mm_getcsr();
  DefaultFloatEnvironment() { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved); }
#endif
};

// ---- threads ----

constexpr int64_t kElementsPerThread = 1 << 18;  // less is not worth a thread's start
constexpr int64_t kElementsPerTurn = 1 << 17;    // then whoever moves the bytes may have the core: see below

constexpr int64_t kPastCaches = 1 << 22;  // what is copied will have left the caches before it is used

// Calls f(begin, end) on consecutive ranges of [0, n). Threads are started for the call: the work is milliseconds, and a pool would not survive a fork.
template <class F>
void spread(int64_t n, int64_t elements_each, F f) {
  const int64_t useful = n * elements_each / kElementsPerThread;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({g_threads.load(), useful, n}));
  const int64_t turn = std::max<int64_t>(1, kElementsPerTurn / elements_each);
  auto part = [&](int64_t t) {
    DefaultFloatEnvironment guard;
    const int64_t end = n * (t + 1) / threads;
    for (int64_t begin = n * t / threads; begin < end; begin += turn) {
      f(begin, std::min(begin + turn, end));
      // Where cores are few the thread that moves what is already coded waits for this one, and the wire for it. Offering the core
      // about every 0.1 ms made an average of 25 M parameters over 1 Gbit/s a fifth to a quarter faster; elsewhere it costs nothing.
      if (begin + turn < end) std::this_thread::yield();
    }
  };
  std::vector<std::thread> others;
  int64_t started = 1;
  try {
    for (; started < threads; ++started) others.emplace_back(part, started);
  } catch (const std::system_error&) {  // no more threads to be had: do their share here
  }
  part(0);
  for (int64_t t = started; t < threads; ++t) part(t);
  for (auto& thread : others) thread.join();
}

// ---- what the caller may pass ----

// Whether there are such matrices; and how many elements they have.
bool good_matrices(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, int64_t* elements) {
  *elements = 0;
  if (num_matrices < 0 || (num_matrices && !matrices) || rank < 1 || rank > PQ_MAX_APPROXIMATION_RANK) return false;
  for (int64_t i = 0; i < num_matrices; ++i) {
    const int64_t rows = matrices[i].rows, cols = matrices[i].cols;
    if (rows < 1 || cols < 1 || rows > (int64_t{1} << 40) / cols || (*elements += rows * cols) > int64_t{1} << 40) return false;
  }
  return true;
}

// Calls f(matrix, element at which it begins, place of its left factor, place of its right one) for each.
template <class F>
void each_matrix(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, F f) {
  int64_t at = 0, left = 0, right = 0;
  for (int64_t i = 0; i < num_matrices; ++i) {
    f(matrices[i], at, left, right);
    at += matrices[i].rows * matrices[i].cols;
    left += rank * matrices[i].rows;
    right += rank * matrices[i].cols;
  }
}

int32_t encode_blocks(const Plan& plan, const pq_source& source, int64_t start, pq_keys keys, uint8_t* payload) {
  std::atomic<bool> finite{true};
  spread(plan.num_blocks, plan.codec.block_size, [&](int64_t begin, int64_t end) {
    if (!kernels().encode(plan, source, start, keys, payload, begin, end)) finite = false;
  });
  return finite ? PQ_OK : PQ_NONFINITE;
}

int32_t encode_sparse(const Plan& plan, const pq_source& source, int64_t start, pq_keys keys, uint8_t* payload) {
  const int64_t kept = plan.values->count;
  thread_local std::vector<float> numbers;  // kept from call to call, so that none but the first asks for memory
  if ((int64_t)numbers.size() < kept) numbers.resize((size_t)kept);
  float* const memory = numbers.data();  // other threads have vectors of their own
  std::atomic<bool> finite{true};
  spread(plan.num_blocks, plan.codec.block_size, [&](int64_t begin, int64_t end) {
    if (!kernels().select(plan, source, start, keys, memory, payload, begin, end)) finite = false;
  });
  if (!finite) return PQ_NONFINITE;
  const pq_segment segment{memory, kept, PQ_F32, 0};
  const int64_t offsets[2] = {0, kept};
  const pq_source values{&segment, offsets, 1, nullptr, PQ_F32, 0, nullptr, nullptr};
  const int32_t status = encode_blocks(*plan.values, values, 0, keys, payload);
  if (status != PQ_OK || !source.next_residual) return status;
  spread(plan.num_blocks, plan.codec.block_size, [&](int64_t begin, int64_t end) {
    kernels().subtract(plan, payload, keys, source.next_residual + start, begin, end);
  });
  return PQ_OK;
}

}  // namespace

void keep_own_rest(const pq_codec& codec, const pq_source& source, int64_t start, int64_t count, pq_keys keys) {
  Plans plans;
  float* const rest = source.next_residual + start;
  if (codec.kind != PQ_RANDOMK || !make_plan(&codec, count, &plans)) {  // the own part is added as it is: nothing of it is left
    std::fill(rest, rest + count, 0.0f);
    return;
  }
  const Plan& plan = plans.plan;
  spread(plan.num_blocks, codec.block_size, [&](int64_t begin, int64_t end) {
    kernels().own_rest(plan, source, start, keys, begin, end);
  });
}

}  // namespace pqasgd

using namespace pqasgd;

extern "C" {

int32_t pq_abi_version(void) { return PQ_ABI_VERSION; }
const char* pq_isa(void) { return kernels().isa; }
int32_t pq_has_isa(const char* name) { return name && available(name) != nullptr; }

int32_t pq_force_isa(const char* name) {
  const Kernels* k = name ? available(name) : best();
  if (!k) return PQ_BAD_ARGUMENT;
  g_kernels = k;
  return PQ_OK;
}

void pq_set_num_threads(int32_t threads) { g_threads = std::max(1, threads); }
int32_t pq_get_num_threads(void) { return g_threads; }

int64_t pq_payload_nbytes(const pq_codec* codec, int64_t count) { return payload_nbytes(codec, count); }

int32_t pq_encode(const pq_codec* codec, const pq_source* source, int64_t start, int64_t count, pq_keys keys, uint8_t* payload,
                  int64_t payload_nbytes) {
  Plans plans;
  const Plan& plan = plans.plan;
  if (!make_plan(codec, count, &plans) || !good_source(source, start, count) || (!payload && payload_nbytes))
    return PQ_BAD_ARGUMENT;
  if (payload_nbytes != plan.payload_nbytes) return PQ_BAD_LENGTH;
  return (plan.values ? encode_sparse : encode_blocks)(plan, *source, start, keys, payload);
}

int32_t pq_decode_add(const pq_codec* codec, const uint8_t* payload, int64_t payload_nbytes, int64_t count, pq_keys keys,
                      float weight, float* destination) {
  Plans plans;
  const Plan& plan = plans.plan;
  if (!make_plan(codec, count, &plans) || (count && (!payload || !destination))) return PQ_BAD_ARGUMENT;
  if (payload_nbytes != plan.payload_nbytes) return PQ_BAD_LENGTH;
  std::atomic<int32_t> status{PQ_OK};
  spread(plan.num_blocks, codec->block_size, [&](int64_t begin, int64_t end) {
    const int32_t s = kernels().decode_add(plan, payload, keys, weight, destination, begin, end);
    if (s != PQ_OK) status = s;
  });
  return status;
}

int32_t pq_reduce(const pq_codec* codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t payload_nbytes,
                  const pq_keys* keys, float weight, const pq_source* own, int64_t own_start, int64_t count,
                  const float* base, float* destination) {
  Plans plans;
  const Plan& plan = plans.plan;
  if (!make_plan(codec, count, &plans) || num_payloads < 0 || (num_payloads && (!payloads || !keys)) || (count && !destination))
    return PQ_BAD_ARGUMENT;
  if (payload_nbytes != plan.payload_nbytes) return PQ_BAD_LENGTH;
  for (int32_t r = 0; r < num_payloads; ++r)
    if (!payloads[r] && !good_source(own, own_start, count)) return PQ_BAD_ARGUMENT;
  std::atomic<int32_t> status{PQ_OK};
  // A number that is kept is decoded, found its place, and added: it costs about as much as eight of a dense payload.
  const int64_t work = plan.values ? codec->block_size + 8 * plan.index.kept * num_payloads
                                   : (int64_t)codec->block_size * std::max(1, num_payloads);
  spread(plan.num_blocks, work, [&](int64_t begin, int64_t end) {
    const int32_t s = kernels().reduce(plan, num_payloads, payloads, keys, weight, own, own_start, base, destination, begin, end);
    if (s != PQ_OK) status = s;
  });
  return status;
}

int32_t pq_apply(const float* mean, int64_t start, int64_t count, const pq_source* target) {
  if (!good_source(target, start, count) || (count && !mean)) return PQ_BAD_ARGUMENT;
  const bool past_caches = count >= kPastCaches;
  spread(count, 1, [&](int64_t begin, int64_t end) {
    kernels().apply(mean + begin, start + begin, end - begin, *target, past_caches);
  });
  return PQ_OK;
}

int32_t pq_rebase(const void* base, int64_t start, int64_t count, const pq_source* target) {
  if (!good_source(target, start, count) || !target->anchor || (count && !base)) return PQ_BAD_ARGUMENT;
  const int64_t width = target->anchor_dtype == PQ_F32 ? 4 : 8;
  spread(count, 1, [&](int64_t begin, int64_t end) {
    kernels().rebase((const char*)base + begin * width, start + begin, end - begin, *target);
  });
  return PQ_OK;
}

int32_t pq_gather(const pq_source* source, int64_t start, int64_t count, void* destination, int32_t dtype) {
  if (!good_source(source, start, count) || (count && !destination) || (dtype != PQ_F32 && dtype != PQ_F64) ||
      (source->residual && dtype != PQ_F32))
    return PQ_BAD_ARGUMENT;
  const int64_t width = dtype == PQ_F32 ? 4 : 8;
  spread(count, 1, [&](int64_t begin, int64_t end) {
    kernels().gather(*source, start + begin, end - begin, (char*)destination + begin * width, dtype);
  });
  return PQ_OK;
}

int32_t pq_outer(float decay, float a, float b, int64_t count, float* momentum, float* delta) {
  if (count < 0 || (count && (!momentum || !delta))) return PQ_BAD_ARGUMENT;
  spread(count, 1, [&](int64_t begin, int64_t end) { kernels().outer(decay, a, b, end - begin, momentum + begin, delta + begin); });
  return PQ_OK;
}

int32_t pq_distance(const pq_source* source, int64_t start, int64_t count, const float* center, double* distance) {
  if (!good_source(source, start, count) || (count && !center) || !distance) return PQ_BAD_ARGUMENT;
  const int64_t blocks = (count + kCastBlock - 1) / kCastBlock;
  std::vector<double> parts((size_t)blocks);  // added up in one order, however many threads there are
  spread(blocks, kCastBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kCastBlock;
      parts[(size_t)block] = kernels().distance(*source, start + at, std::min<int64_t>(kCastBlock, count - at), center + at);
    }
  });
  *distance = 0;
  for (double part : parts) *distance += part;
  return PQ_OK;
}

int32_t pq_capture(const pq_source* source, int64_t start, int64_t count) {
  if (!good_source(source, start, count) || !source->anchor) return PQ_BAD_ARGUMENT;
  spread(count, 1, [&](int64_t begin, int64_t end) { kernels().capture(*source, start + begin, end - begin); });
  return PQ_OK;
}

int32_t pq_low_rank_project(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, const pq_source* source, int64_t start,
                            const float* right, float* left) {
  int64_t elements;
  if (!good_matrices(matrices, num_matrices, rank, &elements) || !good_source(source, start, elements) || !source->next_residual ||
      (elements && (!right || !left)))
    return PQ_BAD_ARGUMENT;
  each_matrix(matrices, num_matrices, rank, [&](const pq_matrix& m, int64_t at, int64_t l, int64_t r) {
    spread(m.rows, m.cols, [&](int64_t begin, int64_t end) {
      kernels().project(m, rank, *source, start + at, right + r, left + l, begin, end);
    });
  });
  return PQ_OK;
}

int32_t pq_low_rank_backproject(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, const float* values, const float* left,
                                float* right) {
  int64_t elements;
  if (!good_matrices(matrices, num_matrices, rank, &elements) || (elements && (!values || !left || !right))) return PQ_BAD_ARGUMENT;
  constexpr int64_t kColumns = 512;  // neighbours in a row, so that memory comes in long pieces
  each_matrix(matrices, num_matrices, rank, [&](const pq_matrix& m, int64_t at, int64_t l, int64_t r) {
    spread((m.cols + kColumns - 1) / kColumns, kColumns * m.rows, [&](int64_t begin, int64_t end) {
      kernels().backproject(m, rank, values + at, left + l, right + r, begin * kColumns, std::min(end * kColumns, m.cols));
    });
  });
  return PQ_OK;
}

int32_t pq_low_rank_reconstruct(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, const float* left,
                                const float* own_right, const float* right, const float* base, float* mean, float* rest) {
  int64_t elements;
  if (!good_matrices(matrices, num_matrices, rank, &elements) ||
      (elements && (!left || !own_right || !right || !mean || !rest)))
    return PQ_BAD_ARGUMENT;
  each_matrix(matrices, num_matrices, rank, [&](const pq_matrix& m, int64_t at, int64_t l, int64_t r) {
    spread(m.rows, m.cols, [&](int64_t begin, int64_t end) {
      kernels().reconstruct(m, rank, left + l, own_right + r, right + r, base ? base + at : nullptr, mean + at, rest + at, begin, end);
    });
  });
  return PQ_OK;
}

int32_t pq_low_rank_redraw(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, uint64_t seed, uint64_t step, uint32_t first,
                           float* right) {
  int64_t elements;
  if (!good_matrices(matrices, num_matrices, rank, &elements) || (elements && !right)) return PQ_BAD_ARGUMENT;
  uint32_t number = first;
  each_matrix(matrices, num_matrices, rank, [&](const pq_matrix& m, int64_t, int64_t, int64_t r) {
    const uint64_t key = derive_key(seed, PQ_SHARED_RANK, step, number++, 0);
    for (int32_t k = 0; k < rank; ++k) {
      float* vector = right + r + k * m.cols;
      if (std::any_of(vector, vector + m.cols, [](float x) { return x != 0; })) continue;
      for (int64_t j = 0; j < m.cols; ++j) {
        const Pair both = random_words(key, (uint32_t)k, (uint32_t)(j / 32), (uint32_t)(j % 16));
        vector[j] = (float)((j % 32 < 16 ? both.x0 : both.x1) >> 8) * 0x1p-23f - 1;
      }
    }
  });
  return PQ_OK;
}

int32_t pq_orthogonalize(const int64_t* lengths, int64_t num_groups, int32_t rank, float* vectors) {
  if (num_groups < 0 || (num_groups && (!lengths || !vectors)) || rank < 1 || rank > PQ_MAX_APPROXIMATION_RANK) return PQ_BAD_ARGUMENT;
  std::vector<int64_t> places{0};
  for (int64_t i = 0; i < num_groups; ++i) {
    if (lengths[i] < 0 || lengths[i] > int64_t{1} << 40) return PQ_BAD_ARGUMENT;
    places.push_back(places.back() + rank * lengths[i]);
  }
  if (!num_groups) return PQ_OK;
  spread(num_groups, std::max<int64_t>(1, rank * places.back() / num_groups), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().orthogonalize(lengths[i], rank, vectors + places[(size_t)i]);
  });
  return PQ_OK;
}

}  // extern "C"
