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

#define PQ_CUDA_ABI_VERSION 1
#define PQ_CUDA_ERROR (-16) /* the CUDA runtime refused: pq_cuda_error says why */

typedef void* pq_stream; /* a cudaStream_t */

PQ_EXPORT int32_t pq_cuda_abi_version(void);
PQ_EXPORT const char* pq_cuda_architectures(void); /* what it was compiled for, as in "75 80 90 121+PTX" */
PQ_EXPORT const char* pq_cuda_error(void);         /* of this thread's last PQ_CUDA_ERROR */

/* PQ_OK if the kernels run on the current device. */
PQ_EXPORT int32_t pq_cuda_check(void);

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

#ifdef __cplusplus
}
#endif
#endif
