/* The C ABI of the codecs on a GPU: what pqasgd.h has for numbers in host memory, for numbers in the memory of the current device.
 *
 * Functions put work on `stream` and return: they wait for nothing, allocate nothing and keep no pointer. Payloads, anchors, residuals,
 * means and workspaces are device memory. A pq_source, and arrays of payloads and keys, are read before the call returns; what a source's
 * `segments` and `offsets` point to is device memory, and `length` is the last of those offsets, which only the caller knows here.
 *
 * The bytes and the floats are those of pqasgd.h, whatever the device: docs/architecture.md defines them.
 *
 * What a kernel finds is added to *status, an int32_t in device memory that is 0 to begin with. pq_cuda_status says what it means. */
#ifndef PQASGD_CUDA_H
#define PQASGD_CUDA_H

#include "pqasgd.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PQ_CUDA_ABI_VERSION 3
typedef void* pq_stream; /* a cudaStream_t */

PQ_EXPORT int32_t pq_cuda_abi_version(void);
PQ_EXPORT const char* pq_cuda_architectures(void); /* what it was compiled for, as in "75 80 90 121+PTX" */
PQ_EXPORT const char* pq_cuda_error(void);         /* of this thread's last PQ_DEVICE_ERROR */

/* PQ_OK if the kernels run on the current device, or on this one. */
PQ_EXPORT int32_t pq_cuda_check(void);
PQ_EXPORT int32_t pq_device_check(int32_t device);

/* The status of pqasgd.h that a status word stands for; of several the one that comes first there. */
PQ_EXPORT int32_t pq_cuda_status(int32_t found);

/* Bytes of workspace that encode, decode_add and reduce need; 0 for codecs that are not sparse. */
PQ_EXPORT int64_t pq_cuda_workspace_nbytes(const pq_codec* codec, int64_t count);

PQ_EXPORT int32_t pq_cuda_encode(const pq_codec* codec, const pq_source* source, int64_t length, int64_t start, int64_t count,
                                 pq_keys keys, uint8_t* payload, int64_t payload_nbytes, void* workspace, int32_t* status,
                                 pq_stream stream);
PQ_EXPORT int32_t pq_cuda_decode_add(const pq_codec* codec, const uint8_t* payload, int64_t payload_nbytes, int64_t count, pq_keys keys,
                                     float weight, float* destination, void* workspace, int32_t* status, pq_stream stream);
PQ_EXPORT int32_t pq_cuda_reduce(const pq_codec* codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t payload_nbytes,
                                 const pq_keys* keys, float weight, const pq_source* own, int64_t own_length, int64_t own_start,
                                 int64_t count, const float* base, float* destination, void* workspace, int32_t* status,
                                 pq_stream stream);

/* next_residual = what the owner of a shard, who does not code it, leaves to the next round. */
PQ_EXPORT int32_t pq_cuda_own_rest(const pq_codec* codec, const pq_source* source, int64_t length, int64_t start, int64_t count,
                                   pq_keys keys, pq_stream stream);

PQ_EXPORT int32_t pq_cuda_apply(const float* mean, int64_t start, int64_t count, const pq_source* target, int64_t length,
                                pq_stream stream);
PQ_EXPORT int32_t pq_cuda_rebase(const void* base, int64_t start, int64_t count, const pq_source* target, int64_t length,
                                 pq_stream stream);
PQ_EXPORT int32_t pq_cuda_gather(const pq_source* source, int64_t length, int64_t start, int64_t count, void* destination,
                                 int32_t dtype, pq_stream stream);
PQ_EXPORT int32_t pq_cuda_capture(const pq_source* source, int64_t length, int64_t start, int64_t count, pq_stream stream);
PQ_EXPORT int32_t pq_cuda_outer(float decay, float a, float b, int64_t count, float* momentum, float* delta, pq_stream stream);

/* numbers = value, of all of them. */
PQ_EXPORT int32_t pq_cuda_fill(float value, int64_t count, float* numbers, pq_stream stream);

/* mean = base + scale * mean, rounded twice; without a base: scale * mean. */
PQ_EXPORT int32_t pq_cuda_scale(float scale, const float* base, int64_t count, float* mean, pq_stream stream);

/* ---- numbers on a device, messages in host memory ----
 *
 * What pqasgd.h has, with the same meaning, for a pq_source of host memory whose segments, anchor and residuals are memory that the
 * device reaches. Functions wait until it is done, on `stream`, and keep memory of their own on the device, which grows to what the
 * largest call needs and then stays. They can be called from several threads: one call of a device at a time.
 *
 * All numbers may be memory that the host does not reach. Messages, and what was received, are host memory or the device's own:
 * their addresses tell. */
enum pq_memory {
  PQ_ON_DEVICE = 0, /* numbers, which the host reaches too: they move to whoever uses them, and are at home on the device */
  PQ_ON_HOST = 1,   /* numbers that stay in host memory, pinned, where the device reaches them across its bus */
  PQ_MESSAGES = 2,  /* bytes in host memory that the device copies to and from at full speed */
  PQ_DEVICE_MESSAGES = 3 /* bytes in the device's own memory, which the host does not reach */
};
PQ_EXPORT int32_t pq_device_alloc(int32_t device, int64_t nbytes, int32_t kind, void** memory); /* zeros */
PQ_EXPORT int32_t pq_device_free(int32_t device, void* memory, int32_t kind);

/* Memory of their own, as much as calls with this bucket need, and with sources of so many segments: they ask for no more then.
 * Without shards it is that of an allgather, and the second codec is not looked at. `device_messages`: messages are the device's. */
PQ_EXPORT int32_t pq_device_reserve(int32_t device, const pq_codec* codec, const pq_codec* second_codec, const pq_bucket* bucket,
                                    const int64_t* shards, int32_t device_messages);
PQ_EXPORT int32_t pq_device_reserve_tables(int32_t device, int64_t num_segments);

/* 16 bytes that no other device has, on this machine or another. */
PQ_EXPORT int32_t pq_device_identity(int32_t device, uint8_t* identity);

/* Whatever memory it is. */
PQ_EXPORT int32_t pq_device_copy(int32_t device, pq_stream stream, void* to, const void* from, int64_t nbytes);

PQ_EXPORT int32_t pq_device_encode(int32_t device, pq_stream stream, const pq_codec* codec, const pq_source* source, int64_t start,
                                   int64_t count, pq_keys keys, uint8_t* payload, int64_t payload_nbytes);
PQ_EXPORT int32_t pq_device_allgather_pack(int32_t device, pq_stream stream, const pq_codec* codec, const pq_bucket* bucket,
                                           const pq_source* source, int64_t start, uint8_t* message, int64_t message_nbytes);
PQ_EXPORT int32_t pq_device_allgather_land(int32_t device, pq_stream stream, const pq_codec* codec, const pq_bucket* bucket,
                                           const uint8_t* received, int64_t received_nbytes, const float* base, float* mean);
PQ_EXPORT int32_t pq_device_two_phase_pack(int32_t device, pq_stream stream, const pq_codec* codec, const pq_bucket* bucket,
                                           const int64_t* shards, const pq_source* source, int64_t start, uint8_t* messages,
                                           int64_t messages_nbytes);
PQ_EXPORT int32_t pq_device_two_phase_mean(int32_t device, pq_stream stream, const pq_codec* codec, const pq_codec* second_codec,
                                           const pq_bucket* bucket, const int64_t* shards, int32_t flags, const uint8_t* received,
                                           int64_t received_nbytes, const pq_source* source, int64_t start, const float* residual,
                                           float* next_residual, float* mean, uint8_t* message, int64_t message_nbytes);
PQ_EXPORT int32_t pq_device_two_phase_relay(int32_t device, pq_stream stream, const pq_bucket* bucket, int32_t flags, const float* mean,
                                            int64_t count, uint8_t* message, int64_t message_nbytes);
PQ_EXPORT int32_t pq_device_two_phase_land(int32_t device, pq_stream stream, const pq_codec* second_codec, const pq_bucket* bucket,
                                           const int64_t* shards, const uint8_t* received, int64_t received_nbytes, const float* base,
                                           float* mean);
PQ_EXPORT int32_t pq_device_apply(int32_t device, pq_stream stream, const float* mean, int64_t start, int64_t count,
                                  const pq_source* target);
PQ_EXPORT int32_t pq_device_rebase(int32_t device, pq_stream stream, const void* base, int64_t start, int64_t count,
                                   const pq_source* target);
PQ_EXPORT int32_t pq_device_gather(int32_t device, pq_stream stream, const pq_source* source, int64_t start, int64_t count,
                                   void* destination, int32_t dtype);
PQ_EXPORT int32_t pq_device_outer(int32_t device, pq_stream stream, float decay, float a, float b, int64_t count, float* momentum,
                                  float* delta);
PQ_EXPORT int32_t pq_device_scale(int32_t device, pq_stream stream, float scale, const float* base, int64_t count, float* mean);

#ifdef __cplusplus
}
#endif
#endif
