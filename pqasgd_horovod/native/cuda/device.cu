// Numbers on a device, messages there or in host memory: the second part of include/pqasgd_cuda.h, on top of the first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "../src/messages.h"
#include "error.h"
#include "pqasgd_cuda.h"
#include "runtime.h"

namespace pqasgd {
namespace gpu {
namespace {

constexpr int kMostDevices = 64;
constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t nbytes) { return (nbytes + kAlignment - 1) / kAlignment * kAlignment; }

// Memory of a device that grows and never shrinks.
class Buffer {
 public:
  // At least nbytes; what was in it is lost. NULL if there is no more to be had.
  uint8_t* get(int64_t nbytes) {
    if (nbytes <= size_) return memory_;
    void* memory;
    if (failed(cudaMalloc(&memory, (size_t)nbytes))) return nullptr;  // what others have reserved stays
    cudaFree(memory_);
    size_ = nbytes;
    return memory_ = (uint8_t*)memory;
  }

 private:
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

struct Scratch {
  std::mutex in_use;
  Buffer payloads, headers, workspace, table, status;
};

Scratch& scratch_of(int32_t device) {
  static Scratch all[kMostDevices];
  return all[device];
}

// Makes the device the current one, and keeps its scratch memory for one call.
class Call {
 public:
  Call(int32_t device, pq_stream stream)
      : good_(device >= 0 && device < kMostDevices), stream_((cudaStream_t)stream), scratch_(scratch_of(good_ ? device : 0)),
        lock_(scratch_.in_use) {
    good_ = good_ && !failed(cudaGetDevice(&before_)) && !failed(cudaSetDevice(device));
  }
  ~Call() {
    if (good_) cudaSetDevice(before_);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  bool good() const { return good_; }
  Scratch& scratch() const { return scratch_; }
  cudaStream_t stream() const { return stream_; }
  bool copy(void* to, const void* from, int64_t nbytes) const {
    return !failed(cudaMemcpyAsync(to, from, (size_t)nbytes, cudaMemcpyDefault, stream_));
  }
  bool wait() const { return !failed(cudaStreamSynchronize(stream_)); }

 private:
  bool good_;
  int before_ = 0;
  cudaStream_t stream_;
  Scratch& scratch_;
  std::lock_guard<std::mutex> lock_;
};

// A source whose tables the device has, too.
struct Uploaded {
  pq_source source;
  int64_t length;
};

int64_t table_nbytes(int64_t num_segments) { return num_segments * (int64_t)sizeof(pq_segment) + (num_segments + 1) * 8; }

// PQ_OK, or what is wrong.
int32_t upload(const Call& call, const pq_source* source, int64_t start, int64_t count, Uploaded* result) {
  if (!good_source(source, start, count)) return PQ_BAD_ARGUMENT;
  const int64_t segments = source->num_segments * (int64_t)sizeof(pq_segment), offsets = (source->num_segments + 1) * 8;
  uint8_t* const table = call.scratch().table.get(table_nbytes(source->num_segments));
  if (!table || (segments && !call.copy(table, source->segments, segments)) || !call.copy(table + segments, source->offsets, offsets))
    return PQ_DEVICE_ERROR;
  *result = {*source, source->offsets[source->num_segments]};
  result->source.segments = (const pq_segment*)table;
  result->source.offsets = (const int64_t*)(table + segments);
  return PQ_OK;
}

// Whether it is memory that the host does not reach.
bool is_of_device(const void* memory) {
  cudaPointerAttributes found;
  return !failed(cudaPointerGetAttributes(&found, memory)) && found.type == cudaMemoryTypeDevice;
}

// What kernels found, when all of them are done.
class Findings {
 public:
  explicit Findings(const Call& call) : call_(call), word_((int32_t*)call.scratch().status.get(sizeof(int32_t))) {
    good_ = word_ && !failed(cudaMemsetAsync(word_, 0, sizeof(int32_t), call.stream()));
  }
  bool good() const { return good_; }
  int32_t* word() const { return word_; }
  int32_t read() const {
    int32_t found = 0;
    return call_.copy(&found, word_, sizeof found) && call_.wait() ? pq_cuda_status(found) : int32_t{PQ_DEVICE_ERROR};
  }

 private:
  const Call& call_;
  int32_t* word_;
  bool good_;
};

// The numbers of a device, for the templates of messages.h.
class Device {
 public:
  explicit Device(const Call& call) : call_(call) {}

  int32_t encode(const pq_codec& codec, const pq_source* source, int64_t start, int64_t count, pq_keys keys, uint8_t* payload,
                 int64_t nbytes) const {
    Uploaded uploaded;
    const int32_t status = upload(call_, source, start, count, &uploaded);
    if (status != PQ_OK) return status;
    return encode_uploaded(codec, uploaded, start, count, keys, payload, nbytes);
  }

  int32_t encode_array(const pq_codec& codec, float* values, const float* residual, float* next_residual, int64_t count, pq_keys keys,
                       uint8_t* payload, int64_t nbytes) const {
    const pq_segment segment{values, count, PQ_F32, 0};
    const int64_t offsets[2] = {0, count};
    const pq_source source{&segment, offsets, 1, nullptr, PQ_F32, 0, residual, next_residual};
    return encode(codec, &source, 0, count, keys, payload, nbytes);
  }

  int32_t reduce(const pq_codec& codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t nbytes, const pq_keys* keys,
                 float weight, const pq_source* own, int64_t own_start, int64_t count, const float* base, float* mean) const {
    Uploaded uploaded{};
    if (own) {
      const int32_t status = upload(call_, own, own_start, count, &uploaded);
      if (status != PQ_OK) return status;
    }
    void* const workspace = workspace_of(codec, count);
    const Findings findings(call_);
    std::vector<const uint8_t*> near(payloads, payloads + num_payloads);
    if (!workspace || !findings.good() || !bring(near, nbytes)) return PQ_DEVICE_ERROR;
    const int32_t status =
        pq_cuda_reduce(&codec, num_payloads, near.data(), nbytes, keys, weight, own ? &uploaded.source : nullptr, uploaded.length,
                       own_start, count, base, mean, workspace, findings.word(), call_.stream());
    return status == PQ_OK ? findings.read() : status;
  }

  void keep_own_rest(const pq_codec& codec, const pq_source* source, int64_t start, int64_t count, pq_keys keys) const {
    Uploaded uploaded;
    if (upload(call_, source, start, count, &uploaded) == PQ_OK)
      pq_cuda_own_rest(&codec, &uploaded.source, uploaded.length, start, count, keys, call_.stream());
    call_.wait();
  }

  // Uses `scratch`, `count` numbers. To write them as they are finds out.
  bool all_finite(const pq_source* source, int64_t start, int64_t count, float* scratch) const {
    const pq_codec plain{PQ_NONE, 32, 1024, 0, 0, 0, 0, 0, 0, 0};
    Uploaded uploaded;
    const Findings findings(call_);
    if (upload(call_, source, start, count, &uploaded) != PQ_OK || !findings.good()) return false;
    uploaded.source.next_residual = nullptr;
    return pq_cuda_encode(&plain, &uploaded.source, uploaded.length, start, count, {}, (uint8_t*)scratch, count * 4, nullptr,
                          findings.word(), call_.stream()) == PQ_OK &&
           findings.read() == PQ_OK;
  }

  void fill_nan(float* mean, int64_t n) const {
    pq_cuda_fill(std::numeric_limits<float>::quiet_NaN(), n, mean, call_.stream());
    call_.wait();
  }

  bool put(uint8_t* to, const void* from, int64_t nbytes) const { return !nbytes || call_.copy(to, from, nbytes); }

  // Of a device they are packed before they cross the bus: that takes as long for many as for one.
  bool read_headers(const uint8_t* received, const std::vector<int64_t>& places, Header* to) const {
    if (places.empty()) return true;
    if (!is_of_device(received)) {
      for (int64_t at : places) std::memcpy(to++, received + at, sizeof(Header));
      return true;
    }
    const int64_t nbytes = (int64_t)(places.size() * sizeof(Header));
    uint8_t* const packed = call_.scratch().headers.get(nbytes);
    if (!packed) return false;
    for (size_t i = 0; i < places.size(); ++i)
      if (!call_.copy(packed + i * sizeof(Header), received + places[i], sizeof(Header))) return false;
    return call_.copy(to, packed, nbytes) && call_.wait();
  }

 private:
  // Never NULL but for want of memory.
  void* workspace_of(const pq_codec& codec, int64_t count) const {
    return call_.scratch().workspace.get(std::max<int64_t>(kAlignment, pq_cuda_workspace_nbytes(&codec, count)));
  }

  // Puts copies of payloads that are in host memory in their places.
  bool bring(std::vector<const uint8_t*>& payloads, int64_t nbytes) const {
    uint8_t* to = nullptr;
    for (const uint8_t*& payload : payloads) {
      if (!payload || !nbytes || is_of_device(payload)) continue;
      if (!to) to = call_.scratch().payloads.get(aligned(nbytes) * (int64_t)payloads.size());
      if (!to || !call_.copy(to, payload, nbytes)) return false;
      payload = to;
      to += aligned(nbytes);
    }
    return true;
  }

  // By way of the device: residuals are made of what was written, and across the bus that would be read byte by byte.
  int32_t encode_uploaded(const pq_codec& codec, const Uploaded& uploaded, int64_t start, int64_t count, pq_keys keys, uint8_t* payload,
                          int64_t nbytes) const {
    const bool is_there = is_of_device(payload);
    uint8_t* const memory = is_there ? payload : call_.scratch().payloads.get(std::max<int64_t>(kAlignment, nbytes));
    void* const workspace = workspace_of(codec, count);
    const Findings findings(call_);
    if (!memory || !workspace || !findings.good()) return PQ_DEVICE_ERROR;
    const int32_t status = pq_cuda_encode(&codec, &uploaded.source, uploaded.length, start, count, keys, memory, nbytes, workspace,
                                          findings.word(), call_.stream());
    if (status != PQ_OK) return status;
    return is_there || call_.copy(payload, memory, nbytes) ? findings.read() : int32_t{PQ_DEVICE_ERROR};
  }

  const Call& call_;
};

// The status of what was put on the stream, when it is done.
int32_t done(const Call& call, int32_t status) { return call.wait() || status < 0 ? status : int32_t{PQ_DEVICE_ERROR}; }

template <class Work>
int32_t with_source(int32_t device, pq_stream stream, const pq_source* source, int64_t start, int64_t count, const Work& work) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  Uploaded uploaded;
  const int32_t status = upload(call, source, start, count, &uploaded);
  return done(call, status == PQ_OK ? work(uploaded) : status);
}

// Lets memory that both reach be at home on the device.
bool settle(int32_t device, void* memory, size_t nbytes) {
#if CUDART_VERSION >= 13000
  const cudaMemLocation here{cudaMemLocationTypeDevice, device};
#else
  const int here = device;
#endif
  return !failed(cudaMemAdvise(memory, nbytes, cudaMemAdviseSetPreferredLocation, here)) &&
         !failed(cudaMemAdvise(memory, nbytes, cudaMemAdviseSetAccessedBy, here));
}

}  // namespace
}  // namespace gpu
}  // namespace pqasgd

using namespace pqasgd;
using namespace pqasgd::gpu;

extern "C" {

int32_t pq_device_alloc(int32_t device, int64_t nbytes, int32_t kind, void** memory) {
  const Call call(device, nullptr);
  if (!call.good()) return PQ_DEVICE_ERROR;
  if (nbytes < 0 || !memory || kind < PQ_ON_DEVICE || kind > PQ_DEVICE_MESSAGES) return PQ_BAD_ARGUMENT;
  const size_t size = (size_t)std::max<int64_t>(nbytes, 1);
  if (kind == PQ_DEVICE_MESSAGES) {
    if (failed(cudaMalloc(memory, size))) return PQ_DEVICE_ERROR;
    if (!failed(cudaMemsetAsync(*memory, 0, size, call.stream())) && call.wait()) return PQ_OK;
    cudaFree(*memory);
    *memory = nullptr;
    return PQ_DEVICE_ERROR;
  }
  if (kind != PQ_ON_DEVICE) {
    if (failed(cudaHostAlloc(memory, size, cudaHostAllocPortable))) return PQ_DEVICE_ERROR;
    std::memset(*memory, 0, size);
    return PQ_OK;
  }
  int shared = 0;
  if (failed(cudaDeviceGetAttribute(&shared, cudaDevAttrConcurrentManagedAccess, device))) return PQ_DEVICE_ERROR;
  if (!shared) return set_error("the device and the host cannot use the same memory at a time (concurrentManagedAccess is 0)");
  if (failed(cudaMallocManaged(memory, size, cudaMemAttachGlobal))) return PQ_DEVICE_ERROR;
  if (settle(device, *memory, size) && !failed(cudaMemsetAsync(*memory, 0, size, call.stream())) && call.wait()) return PQ_OK;
  cudaFree(*memory);
  *memory = nullptr;
  return PQ_DEVICE_ERROR;
}

int32_t pq_device_check(int32_t device) {
  const Call call(device, nullptr);
  return call.good() ? pq_cuda_check() : int32_t{PQ_DEVICE_ERROR};
}

int32_t pq_device_free(int32_t device, void* memory, int32_t kind) {
  const Call call(device, nullptr);
  const bool is_of_host = kind == PQ_ON_HOST || kind == PQ_MESSAGES;
  if (!call.good() || failed(is_of_host ? cudaFreeHost(memory) : cudaFree(memory))) return PQ_DEVICE_ERROR;
  return PQ_OK;
}

int32_t pq_device_reserve_tables(int32_t device, int64_t num_segments) {
  const Call call(device, nullptr);
  if (num_segments < 0) return PQ_BAD_ARGUMENT;
  return call.good() && call.scratch().table.get(table_nbytes(num_segments)) ? int32_t{PQ_OK} : int32_t{PQ_DEVICE_ERROR};
}

int32_t pq_device_reserve(int32_t device, const pq_codec* codec, const pq_codec* second_codec, const pq_bucket* bucket,
                          const int64_t* shards, int32_t device_messages) {
  const Call call(device, nullptr);
  if (!call.good()) return PQ_DEVICE_ERROR;
  if (!good_bucket(bucket) || (shards && !good_shards(*bucket, shards))) return PQ_BAD_ARGUMENT;
  const int64_t size = bucket->size, whole[2] = {0, bucket->num_elements};
  int64_t payloads = 0, workspace = 0;
  // Of all that a round codes: each part, as one payload and as one of every rank.
  for (int64_t part = 0; part < (shards ? size : 1); ++part) {
    const int64_t* const limits = shards ? shards + part : whole;
    for (const pq_codec* of : {codec, shards ? second_codec : codec}) {
      const int64_t nbytes = payload_nbytes(of, limits[1] - limits[0]), values = pq_cuda_workspace_nbytes(of, limits[1] - limits[0]);
      if (nbytes < 0 || values < 0) return PQ_BAD_ARGUMENT;
      payloads = std::max(payloads, aligned(std::max<int64_t>(nbytes, 1)) * size);
      workspace = std::max(workspace, values);
    }
  }
  Scratch& scratch = call.scratch();
  const bool enough = (device_messages || scratch.payloads.get(payloads)) && scratch.workspace.get(std::max(kAlignment, workspace)) &&
                      scratch.headers.get(size * (int64_t)sizeof(Header)) && scratch.table.get(table_nbytes(1)) &&
                      scratch.status.get(sizeof(int32_t));
  return enough ? int32_t{PQ_OK} : int32_t{PQ_DEVICE_ERROR};
}

int32_t pq_device_identity(int32_t device, uint8_t* identity) {
  const Call call(device, nullptr);
  if (!identity) return PQ_BAD_ARGUMENT;
  cudaDeviceProp properties;
  if (!call.good() || failed(cudaGetDeviceProperties(&properties, device))) return PQ_DEVICE_ERROR;
  static_assert(sizeof properties.uuid == 16, "as pqasgd_cuda.h says");
  std::memcpy(identity, &properties.uuid, sizeof properties.uuid);
  return PQ_OK;
}

int32_t pq_device_copy(int32_t device, pq_stream stream, void* to, const void* from, int64_t nbytes) {
  const Call call(device, stream);
  if (nbytes < 0 || (nbytes && (!to || !from))) return PQ_BAD_ARGUMENT;
  return call.good() && (!nbytes || call.copy(to, from, nbytes)) && call.wait() ? int32_t{PQ_OK} : int32_t{PQ_DEVICE_ERROR};
}

int32_t pq_device_encode(int32_t device, pq_stream stream, const pq_codec* codec, const pq_source* source, int64_t start, int64_t count,
                         pq_keys keys, uint8_t* payload, int64_t nbytes) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  const int64_t expected = payload_nbytes(codec, count);
  if (expected < 0 || (nbytes && !payload)) return PQ_BAD_ARGUMENT;
  if (nbytes != expected) return PQ_BAD_LENGTH;
  return Device(call).encode(*codec, source, start, count, keys, payload, nbytes);
}

int32_t pq_device_allgather_pack(int32_t device, pq_stream stream, const pq_codec* codec, const pq_bucket* bucket,
                                 const pq_source* source, int64_t start, uint8_t* message, int64_t message_nbytes) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  return done(call, allgather_pack(Device(call), codec, bucket, source, start, message, message_nbytes));
}

int32_t pq_device_allgather_land(int32_t device, pq_stream stream, const pq_codec* codec, const pq_bucket* bucket,
                                 const uint8_t* received, int64_t received_nbytes, const float* base, float* mean) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  return allgather_land(Device(call), codec, bucket, received, received_nbytes, base, mean);
}

int32_t pq_device_two_phase_pack(int32_t device, pq_stream stream, const pq_codec* codec, const pq_bucket* bucket,
                                 const int64_t* shards, const pq_source* source, int64_t start, uint8_t* messages,
                                 int64_t messages_nbytes) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  return done(call, two_phase_pack(Device(call), codec, bucket, shards, source, start, messages, messages_nbytes));
}

int32_t pq_device_two_phase_mean(int32_t device, pq_stream stream, const pq_codec* codec, const pq_codec* second_codec,
                                 const pq_bucket* bucket, const int64_t* shards, int32_t flags, const uint8_t* received,
                                 int64_t received_nbytes, const pq_source* source, int64_t start, const float* residual,
                                 float* next_residual, float* mean, uint8_t* message, int64_t message_nbytes) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  return done(call, two_phase_mean(Device(call), codec, second_codec, bucket, shards, flags, received, received_nbytes, source, start,
                                   residual, next_residual, mean, message, message_nbytes));
}

int32_t pq_device_two_phase_relay(int32_t device, pq_stream stream, const pq_bucket* bucket, int32_t flags, const float* mean,
                                  int64_t count, uint8_t* message, int64_t message_nbytes) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  return done(call, two_phase_relay(Device(call), bucket, flags, mean, count, message, message_nbytes));
}

int32_t pq_device_two_phase_land(int32_t device, pq_stream stream, const pq_codec* second_codec, const pq_bucket* bucket,
                                 const int64_t* shards, const uint8_t* received, int64_t received_nbytes, const float* base,
                                 float* mean) {
  const Call call(device, stream);
  if (!call.good()) return PQ_DEVICE_ERROR;
  return two_phase_land(Device(call), second_codec, bucket, shards, received, received_nbytes, base, mean);
}

int32_t pq_device_apply(int32_t device, pq_stream stream, const float* mean, int64_t start, int64_t count, const pq_source* target) {
  return with_source(device, stream, target, start, count,
                     [&](const Uploaded& to) { return pq_cuda_apply(mean, start, count, &to.source, to.length, stream); });
}

int32_t pq_device_rebase(int32_t device, pq_stream stream, const void* base, int64_t start, int64_t count, const pq_source* target) {
  return with_source(device, stream, target, start, count,
                     [&](const Uploaded& to) { return pq_cuda_rebase(base, start, count, &to.source, to.length, stream); });
}

int32_t pq_device_gather(int32_t device, pq_stream stream, const pq_source* source, int64_t start, int64_t count, void* destination,
                         int32_t dtype) {
  return with_source(device, stream, source, start, count, [&](const Uploaded& from) {
    return pq_cuda_gather(&from.source, from.length, start, count, destination, dtype, stream);
  });
}

int32_t pq_device_outer(int32_t device, pq_stream stream, float decay, float a, float b, int64_t count, float* momentum, float* delta) {
  const Call call(device, stream);
  return call.good() ? done(call, pq_cuda_outer(decay, a, b, count, momentum, delta, stream)) : int32_t{PQ_DEVICE_ERROR};
}

int32_t pq_device_scale(int32_t device, pq_stream stream, float scale, const float* base, int64_t count, float* mean) {
  const Call call(device, stream);
  return call.good() ? done(call, pq_cuda_scale(scale, base, count, mean, stream)) : int32_t{PQ_DEVICE_ERROR};
}

}  // extern "C"
