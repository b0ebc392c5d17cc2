/* The C ABI of the codecs: everything that touches many numbers. docs/architecture.md defines every byte.
 *
 * No function allocates for the caller, throws, keeps a pointer, or reads past a length it was given.
 * Sizes are in elements unless the name says bytes. Results do not depend on the instruction set or on the number of threads.
 */
#ifndef PQASGD_H
#define PQASGD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PQ_ABI_VERSION 1
#define PQ_EXPORT __attribute__((visibility("default")))

enum pq_kind { PQ_NONE, PQ_FP16, PQ_BF16, PQ_MAXSCALE, PQ_QSGD, PQ_TERNGRAD, PQ_EDEN };
enum pq_flag { PQ_STOCHASTIC = 1 };
enum pq_dtype { PQ_F32, PQ_F64, PQ_F16, PQ_BF16_BITS };
enum pq_status {
  PQ_OK = 0,
  PQ_NONFINITE = 1,     /* encode: NaN, Inf or beyond the codec's range; the payload is unspecified */
  PQ_BAD_ARGUMENT = -1, /* unknown codec or dtype, range outside the source, null pointer */
  PQ_BAD_LENGTH = -2,   /* the payload has not the size that this codec gives this many elements */
  PQ_BAD_SCALE = -3,    /* a scale is negative, NaN or Inf */
  PQ_BAD_CODE = -4      /* a code that no encoder writes */
};

typedef struct {
  int32_t kind, bits, block_size, flags;
} pq_codec;

typedef struct {
  void* data;
  int64_t numel;
  int32_t dtype;
  int32_t reserved;
} pq_segment;

/* A flat vector made of segments, minus an anchor if there is one. offsets has num_segments + 1 entries, from 0 to the length. */
typedef struct {
  const pq_segment* segments;
  const int64_t* offsets;
  int64_t num_segments;
  void* anchor; /* NULL, or as long as the vector */
  int32_t anchor_dtype; /* PQ_F32 or PQ_F64 */
  int32_t reserved;
} pq_source;

PQ_EXPORT int32_t pq_abi_version(void);
PQ_EXPORT const char* pq_isa(void);                /* the instruction set in use */
PQ_EXPORT int32_t pq_has_isa(const char* name);    /* "avx512", "avx2", "neon", "plain" */
PQ_EXPORT int32_t pq_force_isa(const char* name);  /* for tests; NULL: the best one */
PQ_EXPORT void pq_set_num_threads(int32_t threads);
PQ_EXPORT int32_t pq_get_num_threads(void);

/* The exact size of a payload in bytes, or PQ_BAD_ARGUMENT. */
PQ_EXPORT int64_t pq_payload_nbytes(const pq_codec* codec, int64_t count);

/* Encode source[start, start + count). */
PQ_EXPORT int32_t pq_encode(const pq_codec* codec, const pq_source* source, int64_t start, int64_t count, uint64_t key,
                  uint8_t* payload, int64_t payload_nbytes);

/* destination += weight * decoded. */
PQ_EXPORT int32_t pq_decode_add(const pq_codec* codec, const uint8_t* payload, int64_t payload_nbytes, int64_t count, uint64_t key,
                      float weight, float* destination);

/* destination = sum over r, in order, of weight * decoded_r; a NULL payload stands for own[own_start, own_start + count).
 * With a base, which is another array of `count` numbers: destination = base + that sum. */
PQ_EXPORT int32_t pq_reduce(const pq_codec* codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t payload_nbytes,
                  const uint64_t* keys, float weight, const pq_source* own, int64_t own_start, int64_t count,
                  const float* base, float* destination);

/* With an anchor: anchor[start..] += mean, segments = anchor in their dtype. Without: segments = mean in their dtype. */
PQ_EXPORT int32_t pq_apply(const float* mean, int64_t start, int64_t count, const pq_source* target);

/* destination = source[start, start + count), minus the anchor; dtype PQ_F32 or PQ_F64. */
PQ_EXPORT int32_t pq_gather(const pq_source* source, int64_t start, int64_t count, void* destination, int32_t dtype);

/* anchor[start..] = source[start, start + count) (the anchor itself is not subtracted). */
PQ_EXPORT int32_t pq_capture(const pq_source* source, int64_t start, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
