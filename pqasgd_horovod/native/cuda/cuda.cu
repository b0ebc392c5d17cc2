// The kernels, and the C ABI of include/pqasgd_cuda.h: checks every argument, and puts the work on the caller's stream.
#include "pqasgd_cuda.h"

#include <algorithm>

#include "bytes.h"
#include "codecs.h"
#include "error.h"
#include "group.h"
#include "sparse.h"
#include "tensors.h"

namespace pqasgd {
namespace gpu {

enum Found : int32_t { kNonfinite = 1, kBadScale = 2, kBadCode = 4 };

// ---- kernels: each group of threads takes one block of the codec after the other ----

// 16 registers of a thread are numbers, as many what they are added to; with 80 there are 24 warps at work on a multiprocessor, and a
// thread block of 512 threads fits, which has to be said also to the driver that compiles PTX.
#if CUDART_VERSION >= 12040
#define PQ_REGISTERS __maxnreg__(80)
#else
#define PQ_REGISTERS __launch_bounds__(Parts::kMostThreads)
#endif

// kKeeps: what was not sent is kept, for which a block is decoded again.
template <class Codec, bool kKeeps>
__global__ void PQ_REGISTERS encode(Plan plan, const __grid_constant__ Vector source, int64_t start, uint64_t key, uint8_t* payload,
                                    int codes_at, int nbytes, int32_t* status) {
  typedef typename Codec::Group Group;
  PQ_SHARED_MEMORY(shared);
  float* const memory = (float*)(shared + Group::in_thread_block() * nbytes);
  uint8_t* const codes = (uint8_t*)memory + codes_at;
  Codec::prepare(plan);
  for (int64_t block = Group::index(); block < plan.num_blocks; block += Group::count()) {
    const int n = (int)plan.block_elements(block);
    const int64_t at = start + block * plan.codec.block_size;
    uint8_t* const out = payload + plan.scales_nbytes + block * plan.block_nbytes;
    float scales[kMaxScales] = {};
    Numbers x;
    load_own<Group>(source, at, n, x);
    if (!Codec::encode_block(plan, n, key, (uint32_t)block, x, memory, codes, scales, out)) {
      if (Group::thread() == 0) atomicOr(status, kNonfinite);
    } else {
      if (Group::thread() == 0)
        for (int k = 0; k < kMaxScales; ++k)
          if (k < plan.scales_per_block)
            store_bytes(payload + 4 * (block * plan.scales_per_block + k), to_bits(scales[k]), 4);
      if (kKeeps) {
        Numbers sent;
        Group::meet();  // the codes are written, and read again
        Codec::decode_block(plan, out, n, key, (uint32_t)block, scales, 1.0f, memory, [&](int k, float y) { sent[k] = 0.0f + y; });
        load_own<Group>(source, at, n, x);
        each_own([&](int k) { x[k] = x[k] - sent[k]; });
        write_own<Group>(x, n, source.tensors.next_residual + at);
      }
    }
    Group::meet();
  }
}

// So many payloads are added at once; more of them take more passes, which add to what the last one left.
constexpr int kMostPayloads = 32;
struct Payloads {
  int count;
  const uint8_t* payload[kMostPayloads];  // NULL: the own numbers
  uint64_t key[kMostPayloads];
};

template <class Codec>
__global__ void PQ_REGISTERS reduce(Plan plan, Payloads payloads, float weight, const __grid_constant__ Vector own, int64_t own_start,
                                    bool adds, const float* base, float* destination, int32_t* status) {
  typedef typename Codec::Group Group;
  PQ_SHARED_MEMORY(shared);
  float* const memory = (float*)(shared + Group::in_thread_block() * Codec::decode_nbytes(Group::threads() * kPerThread));
  Codec::prepare(plan);
  for (int64_t block = Group::index(); block < plan.num_blocks; block += Group::count()) {
    const int n = (int)plan.block_elements(block);
    const int64_t at = block * plan.codec.block_size;
    Numbers sum = {}, x;
    if (adds) read_own<Group>(destination + at, n, sum);
    for (int r = 0; r < payloads.count; ++r) {
      const uint8_t* const payload = payloads.payload[r];
      if (!payload) {
        load_own<Group>(own, own_start + at, n, x);
        each_own([&](int k) { sum[k] = sum[k] + Codec::own(plan, x[k], weight); });
        continue;
      }
      float scales[kMaxScales];
      bool good = true;
      for (int k = 0; k < kMaxScales; ++k) {
        if (k >= plan.scales_per_block) continue;
        scales[k] = from_bits(load_bytes(payload + 4 * (block * plan.scales_per_block + k), 4));
        good &= scales[k] >= 0.0f && scales[k] < INFINITY;
      }
      if (!good) {
        if (Group::thread() == 0) atomicOr(status, kBadScale);
        continue;
      }
      const uint8_t* const codes = payload + plan.scales_nbytes + block * plan.block_nbytes;
      if (!Codec::decode_block(plan, codes, n, payloads.key[r], (uint32_t)block, scales, weight, memory,
                               [&](int k, float y) { sum[k] = sum[k] + y; }))
        atomicOr(status, kBadCode);
    }
    if (base) {
      read_own<Group>(base + at, n, x);
      each_own([&](int k) { sum[k] = x[k] + sum[k]; });
    }
    write_own<Group>(sum, n, destination + at);
  }
}

// What a number that is kept is multiplied by.
__device__ inline float factor_of(const Plan& plan, int64_t block) {
  return plan.codec.flags & PQ_SCALED ? (float)plan.block_elements(block) / (float)plan.index_of(block).kept : 1.0f;
}

// The numbers of a block in shared memory, and zeros up to `padded`.
__device__ void load_block(const Vector& source, int64_t at, int n, int padded, float* v) {
  Numbers x;
  load_own<Parts>(source, at, n, x);
  write_own<Parts>(x, padded, v);
  __syncthreads();
}

__global__ void PQ_REGISTERS select_numbers(Plan plan, const __grid_constant__ Vector source, int64_t start, pq_keys keys, float* numbers,
                                            uint8_t* payload, int32_t* status) {
  PQ_SHARED_MEMORY(shared);
  float* const v = (float*)shared;
  __shared__ uint32_t words[kMostWords];
  __shared__ int before[kMostWords];
  Kept kept{words, before};
  for (int64_t block = blockIdx.x; block < plan.num_blocks; block += gridDim.x) {
    const IndexCode& index = plan.index_of(block);
    const int n = (int)plan.block_elements(block), padded = (n + 63) / 64 * 64;
    const int64_t at = start + block * plan.codec.block_size;
    const float factor = factor_of(plan, block);
    float* const out = numbers + block * plan.index.kept;
    bool finite = true;
    load_block(source, at, n, padded, v);
    const auto keep = [&](int i, int position) {
      const float x = v[position];
      if (plan.codec.flags & PQ_SCALED) finite &= fabsf(x * factor) <= 0x1p126f;
      out[i] = plan.codec.kind == PQ_THRESHOLD && magnitude(x) < (uint32_t)plan.codec.threshold ? 0.0f : x;
    };
    if (plan.codec.kind == PQ_RANDOMK) {
      uint32_t most = 0;
      for (int i = threadIdx.x; i < padded; i += blockDim.x) most = larger(magnitude(v[i]), most);
      finite = group_max<Parts>(most) < kInfBits;
      each_drawn(keys.shared, (uint32_t)block, n, (int)index.kept, keep);
    } else if (select_largest(v, padded, (int)index.kept, kept)) {
      write_positions(kept, padded / 32, index, payload + plan.positions_at + block * plan.index.nbytes);
      each_kept(kept, padded / 32, keep);
    } else {
      finite = false;
    }
    if (Parts::any(!finite)) {
      if (threadIdx.x == 0) atomicOr(status, kNonfinite);
    } else if (source.tensors.next_residual) {
      for (int i = threadIdx.x; i < n; i += blockDim.x) source.tensors.next_residual[at + i] = v[i];
    }
    __syncthreads();
  }
}

// destination = destination + sign * number * factor at the places of the numbers that were kept.
__global__ void PQ_REGISTERS scatter(Plan plan, const uint8_t* payload, pq_keys keys, const float* numbers, float sign, float* destination,
                        int32_t* status) {
  PQ_SHARED_MEMORY(shared);
  int* const positions = (int*)shared;
  for (int64_t block = blockIdx.x; block < plan.num_blocks; block += gridDim.x) {
    const IndexCode& index = plan.index_of(block);
    const int n = (int)plan.block_elements(block);
    const float factor = factor_of(plan, block);
    const float* const number = numbers + block * plan.index.kept;
    float* const to = destination + block * plan.codec.block_size;
    const auto add = [&](int i, int position) {
      const float x = factor == 1.0f ? number[i] : number[i] * factor;
      to[position] = sign < 0.0f ? to[position] - x : to[position] + x;
    };
    if (plan.codec.kind == PQ_RANDOMK) {
      each_drawn(keys.shared, (uint32_t)block, n, (int)index.kept, add);
    } else if (read_positions(plan.positions_of(payload, block), n, index, positions)) {
      for (int i = threadIdx.x; i < (int)index.kept; i += blockDim.x) add(i, positions[i]);
    } else if (threadIdx.x == 0) {
      atomicOr(status, kBadCode);
    }
    __syncthreads();
  }
}

// Of what the own numbers of a shard count as in a sparse codec: adds it, times weight, or takes it from the source.
__global__ void PQ_REGISTERS own_part(Plan plan, const __grid_constant__ Vector source, int64_t start, uint64_t shared_key, bool adds,
                                      float weight, float* destination) {
  PQ_SHARED_MEMORY(shared);
  float* const v = (float*)shared;
  __shared__ uint32_t drawn[kMostWords];
  for (int64_t block = blockIdx.x; block < plan.num_blocks; block += gridDim.x) {
    const int n = (int)plan.block_elements(block);
    const int64_t at = block * plan.codec.block_size;
    const bool random = plan.codec.kind == PQ_RANDOMK;
    const float factor = factor_of(plan, block);
    for (int w = threadIdx.x; w < kMostWords; w += blockDim.x) drawn[w] = random ? 0 : kAllLanes;
    load_block(source, start + at, n, n, v);
    if (random)
      each_drawn(shared_key, (uint32_t)block, n, (int)plan.index_of(block).kept,
                 [&](int, int position) { atomicOr(&drawn[position / 32], 1u << (position % 32)); });
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const bool counts = drawn[i / 32] >> (i % 32) & 1;
      const float x = !counts ? v[i] - v[i] : random ? v[i] * factor : v[i];
      if (adds) destination[at + i] = destination[at + i] + x * weight;
      else destination[at + i] = v[i] - x;
    }
    __syncthreads();
  }
}

// destination = base plus it, or 0 where there is no base.
__global__ void add_base(const float* base, int64_t count, float* destination) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
    destination[i] = base ? base[i] + destination[i] : 0.0f;
}

constexpr int64_t kPiece = 1024;  // elements that a group takes at a time where there are no blocks

// Calls f(segment, offset in it, offset in the range) for every element of [start, start + count).
template <class F>
__device__ void each_element(const pq_source& s, int64_t start, int64_t count, F f) {
  for (int64_t from = blockIdx.x * kPiece; from < count; from += gridDim.x * kPiece)
    for_pieces(s, start + from, count - from < kPiece ? count - from : kPiece,
               [&](const pq_segment& segment, int64_t at, int64_t to, int64_t length) {
                 for (int64_t i = threadIdx.x; i < length; i += blockDim.x) f(segment, at + i, from + to + i);
               });
}

__global__ void apply(const float* mean, int64_t start, int64_t count, pq_source target) {
  each_element(target, start, count, [&](const pq_segment& segment, int64_t at, int64_t i) {
    if (!target.anchor) {
      store(segment, at, mean[i]);
    } else if (target.anchor_dtype == PQ_F64) {
      double* const anchor = (double*)target.anchor + start + i;
      *anchor = *anchor + (double)mean[i];
      if (segment.dtype == PQ_F64) ((double*)segment.data)[at] = *anchor;
      else store(segment, at, (float)*anchor);
    } else {
      float* const anchor = (float*)target.anchor + start + i;
      *anchor = *anchor + mean[i];
      store(segment, at, *anchor);
    }
  });
}

template <class Number>
__global__ void rebase(const Number* base, int64_t start, int64_t count, pq_source target) {
  each_element(target, start, count, [&](const pq_segment& segment, int64_t at, int64_t i) {
    const Number anchor = ((const Number*)target.anchor)[start + i];
    if (sizeof(Number) == 8 && segment.dtype == PQ_F64) {
      double* const x = (double*)segment.data + at;
      *x = base[i] + (*x - anchor);
    } else {
      store(segment, at, (float)(base[i] + ((Number)widened(segment, at) - anchor)));
    }
  });
}

__global__ void gather(pq_source source, int64_t start, int64_t count, float* floats, double* doubles) {
  each_element(source, start, count, [&](const pq_segment& segment, int64_t at, int64_t i) {
    const int64_t position = start + i;
    if (doubles) {
      double x = doubled(segment, at);
      if (source.anchor)
        x -= source.anchor_dtype == PQ_F64 ? ((const double*)source.anchor)[position] : (double)((const float*)source.anchor)[position];
      doubles[i] = x;
      return;
    }
    float x;
    if (!source.anchor) x = widened(segment, at);
    else if (source.anchor_dtype == PQ_F32) x = widened(segment, at) - ((const float*)source.anchor)[position];
    else x = (float)(doubled(segment, at) - ((const double*)source.anchor)[position]);
    floats[i] = source.residual ? x + source.residual[position] : x;
  });
}

__global__ void outer(float decay, float a, float b, int64_t count, float* momentum, float* delta) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    const float d = delta[i], m = decay * momentum[i] + d;
    momentum[i] = m;
    delta[i] = a * m + b * d;
  }
}

__global__ void fill(float value, int64_t count, float* numbers) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) numbers[i] = value;
}

__global__ void scale_numbers(float scale, const float* base, int64_t count, float* mean) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    const float scaled = mean[i] * scale;
    mean[i] = base ? scaled + base[i] : scaled;
  }
}

// ---- launches ----

// PQ_OK, or what is wrong with the launches that have been made.
int32_t launched() { return failed(cudaGetLastError()) ? PQ_DEVICE_ERROR : PQ_OK; }

constexpr int64_t kMostGroups = 1 << 14;

struct Shape {
  unsigned groups, threads;  // thread blocks, of so many threads
  int numbers;               // that the threads of a group have

  template <class Group>
  static Shape of(const Plan& plan) {
    const int threads = Group::threads_for(plan.codec.block_size);
    return {(unsigned)std::min((plan.num_blocks + Group::kInThreadBlock - 1) / Group::kInThreadBlock, kMostGroups),
            (unsigned)(threads * Group::kInThreadBlock), threads * kPerThread};
  }
};

static_assert(Uniform<Warp>::encode_nbytes(Warp::kMostNumbers) % 16 == 0 && Eden::encode_nbytes(Parts::kPart) % 16 == 0,
              "for Eight and Four");
static_assert(Eden::encode_nbytes(kMaxBlock) + kMaxBlock <= 46 * 1024, "48 KB are what any GPU gives, and 2 are taken by what is static");

unsigned groups_for(int64_t count) { return (unsigned)std::min((count + kPiece - 1) / kPiece, kMostGroups); }
constexpr unsigned kThreads = 256;  // where there are no blocks

template <class F>
void with_codec(const Plan& plan, F f) {
  switch (plan.codec.kind) {
    case PQ_MAXSCALE:
    case PQ_QSGD:
    case PQ_TERNGRAD: return plan.codec.block_size <= Warp::kMostNumbers ? f(Uniform<Warp>{}) : f(Uniform<Parts>{});
    case PQ_EDEN: return f(Eden{});
    case PQ_SIGNSGD: return f(SignSgd{});
    case PQ_NATURAL: return f(Natural{});
    case PQ_ONEBIT: return f(OneBit{});
    default: return f(Cast{});
  }
}

void launch_encode(const Plan& plan, const Vector& source, int64_t start, uint64_t key, uint8_t* payload, int32_t* status,
                   cudaStream_t stream) {
  if (!plan.num_blocks) return;
  with_codec(plan, [&](auto of_plan) {
    typedef decltype(of_plan) Codec;
    typedef typename Codec::Group Group;
    const Shape shape = Shape::of<Group>(plan);
    const int codes_at = Codec::encode_nbytes(shape.numbers), nbytes = codes_at + shape.numbers;
    const auto kernel = source.tensors.next_residual ? encode<Codec, true> : encode<Codec, false>;
    PQ_LAUNCH(kernel, shape.groups, shape.threads, nbytes * Group::kInThreadBlock, stream, plan, source, start, key, payload,
              codes_at, nbytes, status);
  });
}

void launch_reduce(const Plan& plan, const Payloads& payloads, float weight, const Vector& own, int64_t own_start, bool adds,
                   const float* base, float* destination, int32_t* status, cudaStream_t stream) {
  if (!plan.num_blocks) return;
  with_codec(plan, [&](auto of_plan) {
    typedef decltype(of_plan) Codec;
    const Shape shape = Shape::of<typename Codec::Group>(plan);
    const int nbytes = Codec::decode_nbytes(shape.numbers) * Codec::Group::kInThreadBlock;
    PQ_LAUNCH(reduce<Codec>, shape.groups, shape.threads, nbytes, stream, plan, payloads, weight, own, own_start, adds, base,
              destination, status);
  });
}

// numbers = those that were kept, times weight; destination plus or minus them.
void launch_scatter(const Plan& plan, const Plan& values, const uint8_t* payload, pq_keys keys, float weight, float sign,
                    float* numbers, float* destination, int32_t* status, cudaStream_t stream) {
  launch_reduce(values, {1, {payload}, {keys.own}}, weight, {}, 0, false, nullptr, numbers, status, stream);
  const Shape shape = Shape::of<Parts>(plan);
  PQ_LAUNCH(scatter, shape.groups, shape.threads, shape.numbers * 4, stream, plan, payload, keys, numbers, sign, destination, status);
}

void launch_add_base(const float* base, int64_t count, float* destination, cudaStream_t stream) {
  PQ_LAUNCH(add_base, groups_for(count), kThreads, 0, stream, base, count, destination);
}

// `segments` and `offsets` are on the device: what they hold cannot be looked at here.
bool good_source(const pq_source* s, int64_t length, int64_t start, int64_t count) {
  return s && start >= 0 && count >= 0 && start <= length && count <= length - start && s->num_segments >= 0 &&
         (!length || (s->num_segments && s->segments && s->offsets)) &&
         (!s->anchor || s->anchor_dtype == PQ_F32 || s->anchor_dtype == PQ_F64);
}

}  // namespace gpu
}  // namespace pqasgd

using namespace pqasgd;
using namespace pqasgd::gpu;

#ifndef PQ_CUDA_ARCHITECTURES  // the build says
#define PQ_CUDA_ARCHITECTURES "none"
#endif

extern "C" {

int32_t pq_cuda_abi_version(void) { return PQ_CUDA_ABI_VERSION; }
const char* pq_cuda_architectures(void) { return PQ_CUDA_ARCHITECTURES; }
const char* pq_cuda_error(void) { return last_error.c_str(); }

int32_t pq_cuda_check(void) {
  cudaFuncAttributes attributes;  // asks for the kernel's code for this device, and makes it from PTX where there is none
  return failed(cudaFuncGetAttributes(&attributes, outer)) ? PQ_DEVICE_ERROR : PQ_OK;
}

int32_t pq_cuda_status(int32_t found) {
  return found & kNonfinite ? PQ_NONFINITE : found & kBadScale ? PQ_BAD_SCALE : found & kBadCode ? PQ_BAD_CODE : PQ_OK;
}

int64_t pq_cuda_workspace_nbytes(const pq_codec* codec, int64_t count) {
  Plans plans;
  if (!make_plan(codec, count, &plans)) return PQ_BAD_ARGUMENT;
  return plans.plan.values ? plans.values.count * 4 : 0;
}

int32_t pq_cuda_encode(const pq_codec* codec, const pq_source* source, int64_t length, int64_t start, int64_t count, pq_keys keys,
                       uint8_t* payload, int64_t payload_nbytes, void* workspace, int32_t* status, pq_stream stream_) {
  Plans plans;
  const Plan& plan = plans.plan;
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!make_plan(codec, count, &plans) || !good_source(source, length, start, count) || (!payload && payload_nbytes) || !status ||
      (plan.values && count && !workspace))
    return PQ_BAD_ARGUMENT;
  if (payload_nbytes != plan.payload_nbytes) return PQ_BAD_LENGTH;
  if (!count) return PQ_OK;
  const Vector vector{*source, nullptr};
  if (!plan.values) {
    launch_encode(plan, vector, start, keys.own, payload, status, stream);
    return launched();
  }
  float* const numbers = (float*)workspace;
  const Shape shape = Shape::of<Parts>(plan);
  PQ_LAUNCH(select_numbers, shape.groups, shape.threads, shape.numbers * 4, stream, plan, vector, start, keys, numbers, payload, status);
  launch_encode(plans.values, {{}, numbers}, 0, keys.own, payload, status, stream);
  if (source->next_residual)
    launch_scatter(plan, plans.values, payload, keys, 1.0f, -1.0f, numbers, source->next_residual + start, status, stream);
  return launched();
}

int32_t pq_cuda_decode_add(const pq_codec* codec, const uint8_t* payload, int64_t payload_nbytes, int64_t count, pq_keys keys,
                           float weight, float* destination, void* workspace, int32_t* status, pq_stream stream_) {
  Plans plans;
  const Plan& plan = plans.plan;
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!make_plan(codec, count, &plans) || !status || (count && (!payload || !destination || (plan.values && !workspace))))
    return PQ_BAD_ARGUMENT;
  if (payload_nbytes != plan.payload_nbytes) return PQ_BAD_LENGTH;
  if (!count) return PQ_OK;
  if (plan.values)
    launch_scatter(plan, plans.values, payload, keys, weight, 1.0f, (float*)workspace, destination, status, stream);
  else
    launch_reduce(plan, {1, {payload}, {keys.own}}, weight, {}, 0, true, nullptr, destination, status, stream);
  return launched();
}

int32_t pq_cuda_reduce(const pq_codec* codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t payload_nbytes,
                       const pq_keys* keys, float weight, const pq_source* own, int64_t own_length, int64_t own_start, int64_t count,
                       const float* base, float* destination, void* workspace, int32_t* status, pq_stream stream_) {
  Plans plans;
  const Plan& plan = plans.plan;
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!make_plan(codec, count, &plans) || num_payloads < 0 || (num_payloads && (!payloads || !keys)) || !status ||
      (count && (!destination || (plan.values && !workspace))))
    return PQ_BAD_ARGUMENT;
  if (payload_nbytes != plan.payload_nbytes) return PQ_BAD_LENGTH;
  for (int32_t r = 0; r < num_payloads; ++r)
    if (!payloads[r] && !good_source(own, own_length, own_start, count)) return PQ_BAD_ARGUMENT;
  if (!count) return PQ_OK;
  const Vector vector{own ? *own : pq_source{}, nullptr};
  if (!plan.values) {
    for (int32_t first = 0; first == 0 || first < num_payloads; first += kMostPayloads) {
      Payloads some{std::min(num_payloads - first, kMostPayloads), {}, {}};
      for (int r = 0; r < some.count; ++r) {
        some.payload[r] = payloads[first + r];
        some.key[r] = keys[first + r].own;
      }
      const bool last = first + kMostPayloads >= num_payloads;
      launch_reduce(plan, some, weight, vector, own_start, first > 0, last ? base : nullptr, destination, status, stream);
    }
    return launched();
  }
  launch_add_base(nullptr, count, destination, stream);
  const Shape shape = Shape::of<Parts>(plan);
  for (int32_t r = 0; r < num_payloads; ++r) {
    if (payloads[r])
      launch_scatter(plan, plans.values, payloads[r], keys[r], weight, 1.0f, (float*)workspace, destination, status, stream);
    else
      PQ_LAUNCH(own_part, shape.groups, shape.threads, shape.numbers * 4, stream, plan, vector, own_start, keys[r].shared, true, weight,
                destination);
  }
  if (base) launch_add_base(base, count, destination, stream);
  return launched();
}

int32_t pq_cuda_own_rest(const pq_codec* codec, const pq_source* source, int64_t length, int64_t start, int64_t count, pq_keys keys,
                         pq_stream stream_) {
  Plans plans;
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!make_plan(codec, count, &plans) || !good_source(source, length, start, count) || !source->next_residual) return PQ_BAD_ARGUMENT;
  if (!count) return PQ_OK;
  float* const rest = source->next_residual + start;
  if (codec->kind != PQ_RANDOMK) {  // the own part is added as it is: nothing of it is left
    launch_add_base(nullptr, count, rest, stream);
    return launched();
  }
  const Shape shape = Shape::of<Parts>(plans.plan);
  PQ_LAUNCH(own_part, shape.groups, shape.threads, shape.numbers * 4, stream, plans.plan, Vector{*source, nullptr}, start, keys.shared,
            false, 1.0f, rest);
  return launched();
}

int32_t pq_cuda_apply(const float* mean, int64_t start, int64_t count, const pq_source* target, int64_t length, pq_stream stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!good_source(target, length, start, count) || (count && !mean)) return PQ_BAD_ARGUMENT;
  if (count) PQ_LAUNCH(apply, groups_for(count), kThreads, 0, stream, mean, start, count, *target);
  return launched();
}

int32_t pq_cuda_rebase(const void* base, int64_t start, int64_t count, const pq_source* target, int64_t length, pq_stream stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!good_source(target, length, start, count) || !target->anchor || (count && !base)) return PQ_BAD_ARGUMENT;
  if (count && target->anchor_dtype == PQ_F64)
    PQ_LAUNCH(rebase<double>, groups_for(count), kThreads, 0, stream, (const double*)base, start, count, *target);
  else if (count)
    PQ_LAUNCH(rebase<float>, groups_for(count), kThreads, 0, stream, (const float*)base, start, count, *target);
  return launched();
}

int32_t pq_cuda_gather(const pq_source* source, int64_t length, int64_t start, int64_t count, void* destination, int32_t dtype,
                       pq_stream stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (!good_source(source, length, start, count) || (count && !destination) || (dtype != PQ_F32 && dtype != PQ_F64) ||
      (source->residual && dtype != PQ_F32))
    return PQ_BAD_ARGUMENT;
  if (count)
    PQ_LAUNCH(gather, groups_for(count), kThreads, 0, stream, *source, start, count, dtype == PQ_F32 ? (float*)destination : nullptr,
              dtype == PQ_F64 ? (double*)destination : nullptr);
  return launched();
}

int32_t pq_cuda_capture(const pq_source* source, int64_t length, int64_t start, int64_t count, pq_stream stream) {
  if (!source || !source->anchor) return PQ_BAD_ARGUMENT;
  pq_source values = *source;
  values.anchor = nullptr;
  values.residual = nullptr;
  const int64_t width = source->anchor_dtype == PQ_F64 ? 8 : 4;
  return pq_cuda_gather(&values, length, start, count, (char*)source->anchor + start * width, source->anchor_dtype, stream);
}

int32_t pq_cuda_outer(float decay, float a, float b, int64_t count, float* momentum, float* delta, pq_stream stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (count < 0 || (count && (!momentum || !delta))) return PQ_BAD_ARGUMENT;
  if (count) PQ_LAUNCH(outer, groups_for(count), kThreads, 0, stream, decay, a, b, count, momentum, delta);
  return launched();
}

int32_t pq_cuda_fill(float value, int64_t count, float* numbers, pq_stream stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (count < 0 || (count && !numbers)) return PQ_BAD_ARGUMENT;
  if (count) PQ_LAUNCH(fill, groups_for(count), kThreads, 0, stream, value, count, numbers);
  return launched();
}

int32_t pq_cuda_scale(float scale, const float* base, int64_t count, float* mean, pq_stream stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  if (count < 0 || (count && !mean)) return PQ_BAD_ARGUMENT;
  if (count) PQ_LAUNCH(scale_numbers, groups_for(count), kThreads, 0, stream, scale, base, count, mean);
  return launched();
}

}  // extern "C"
