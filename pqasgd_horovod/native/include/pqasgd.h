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

#define PQ_ABI_VERSION 6
#define PQ_EXPORT __attribute__((visibility("default")))

enum pq_kind { PQ_NONE, PQ_FP16, PQ_BF16, PQ_MAXSCALE, PQ_QSGD, PQ_TERNGRAD, PQ_EDEN, PQ_SIGNSGD, PQ_NATURAL,
               PQ_TOPK, PQ_RANDOMK, PQ_THRESHOLD, PQ_ONEBIT };
enum pq_flag { PQ_STOCHASTIC = 1, PQ_UNSCALED = 2, PQ_SCALED = 4 };
enum pq_dtype { PQ_F32, PQ_F64, PQ_F16, PQ_BF16_BITS };
enum pq_status {
  PQ_OK = 0,
  PQ_NONFINITE = 1,     /* encode: NaN, Inf or beyond the codec's range; the payload is unspecified */
  PQ_BAD_ARGUMENT = -1, /* unknown codec or dtype, range outside the source, null pointer */
  PQ_BAD_LENGTH = -2,   /* the payload has not the size that this codec gives this many elements */
  PQ_BAD_SCALE = -3,    /* a scale is negative, NaN or Inf */
  PQ_BAD_CODE = -4,     /* a code that no encoder writes */
  PQ_DEVICE_ERROR = -16 /* pqasgd_cuda.h only: CUDA refuses, and pq_cuda_error says why */
};

/* The last six are those of sparse codecs: the part of a block that is kept, in units of 2^-30; the bits of the least magnitude that
 * PQ_THRESHOLD sends; and the codec of the numbers that are kept, which is not sparse. */
typedef struct {
  int32_t kind, bits, block_size, flags;
  int32_t density, threshold;
  int32_t values_kind, values_bits, values_block_size, values_flags;
} pq_codec;

typedef struct {
  void* data;
  int64_t numel;
  int32_t dtype;
  int32_t reserved;
} pq_segment;

/* A flat vector made of segments, minus an anchor if there is one. offsets has num_segments + 1 entries, from 0 to the length.
 *
 * Error feedback: with a residual the vector is u = float32(segments - anchor) + residual. Where there is a next_residual, encode
 * writes u - decoded there, with what the payload stands for. Neither is touched where a payload is unspecified or not asked for. */
typedef struct {
  const pq_segment* segments;
  const int64_t* offsets;
  int64_t num_segments;
  void* anchor; /* NULL, or as long as the vector */
  int32_t anchor_dtype; /* PQ_F32 or PQ_F64 */
  int32_t reserved;
  const float* residual; /* NULL, or as long as the vector */
  float* next_residual;  /* NULL, or as long as the vector, and another array */
} pq_source;

/* The keys of all random numbers of a payload: the sender's own, and one that is the same on every rank and in both phases of an
 * exchange. keys.py is the specification. */
typedef struct {
  uint64_t own, shared;
} pq_keys;

PQ_EXPORT int32_t pq_abi_version(void);
PQ_EXPORT const char* pq_isa(void);                /* the instruction set in use */
PQ_EXPORT int32_t pq_has_isa(const char* name);    /* "avx512", "avx2", "neon", "plain" */
PQ_EXPORT int32_t pq_force_isa(const char* name);  /* for tests; NULL: the best one */
PQ_EXPORT void pq_set_num_threads(int32_t threads);
PQ_EXPORT int32_t pq_get_num_threads(void);

/* The exact size of a payload in bytes, or PQ_BAD_ARGUMENT. */
PQ_EXPORT int64_t pq_payload_nbytes(const pq_codec* codec, int64_t count);

/* Encode source[start, start + count). */
PQ_EXPORT int32_t pq_encode(const pq_codec* codec, const pq_source* source, int64_t start, int64_t count, pq_keys keys,
                  uint8_t* payload, int64_t payload_nbytes);

/* destination += weight * decoded. */
PQ_EXPORT int32_t pq_decode_add(const pq_codec* codec, const uint8_t* payload, int64_t payload_nbytes, int64_t count, pq_keys keys,
                      float weight, float* destination);

/* destination = sum over r, in order, of weight * decoded_r; a NULL payload stands for own[own_start, own_start + count).
 * With a base, which is another array of `count` numbers: destination = base + that sum. Where the codec is PQ_UNSCALED the own
 * numbers, too, count as their signs; where it is PQ_RANDOMK only those count that it sends. */
PQ_EXPORT int32_t pq_reduce(const pq_codec* codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t payload_nbytes,
                  const pq_keys* keys, float weight, const pq_source* own, int64_t own_start, int64_t count,
                  const float* base, float* destination);

/* With an anchor: anchor[start..] += mean, segments = anchor in their dtype. Without: segments = mean in their dtype. */
PQ_EXPORT int32_t pq_apply(const float* mean, int64_t start, int64_t count, const pq_source* target);

/* segments = base + (segments - anchor), in the anchor's type, then in theirs: what they have changed by since the anchor was taken is
 * carried over to a new base, of `count` numbers of the anchor's type. */
PQ_EXPORT int32_t pq_rebase(const void* base, int64_t start, int64_t count, const pq_source* target);

/* destination = source[start, start + count), minus the anchor; dtype PQ_F32, or PQ_F64 where there is no residual. */
PQ_EXPORT int32_t pq_gather(const pq_source* source, int64_t start, int64_t count, void* destination, int32_t dtype);

/* distance = sum of (source[start + i] - center[i])^2 over i < count, of float32 numbers in float64: what a replica is away from
 * the mean. */
PQ_EXPORT int32_t pq_distance(const pq_source* source, int64_t start, int64_t count, const float* center, double* distance);

/* anchor[start..] = source[start, start + count) (the anchor itself is not subtracted). */
PQ_EXPORT int32_t pq_capture(const pq_source* source, int64_t start, int64_t count);

/* An outer step on the mean of changes, elementwise: momentum = decay * momentum + delta; delta = a * momentum + b * delta. */
PQ_EXPORT int32_t pq_outer(float decay, float a, float b, int64_t count, float* momentum, float* delta);

/* ---- low rank: matrices as products of thin factors; codecs/low_rank.py is the specification ----
 *
 * Matrices lie one after the other, each row by row. Of each a left factor has `rank` vectors of `rows` numbers and a right one
 * `rank` vectors of `cols`, one vector after the other, and one matrix after the other. */
typedef struct {
  int64_t rows, cols;
} pq_matrix;

#define PQ_MAX_APPROXIMATION_RANK 1024

/* next_residual[start..] = the matrices, which begin at `start` of the source; left = matrix * right. The source has a next_residual. */
PQ_EXPORT int32_t pq_low_rank_project(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, const pq_source* source,
                                      int64_t start, const float* right, float* left);

/* right = matrix' * left. */
PQ_EXPORT int32_t pq_low_rank_backproject(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, const float* values,
                                          const float* left, float* right);

/* mean = base (or 0) + left * right'; rest -= left * own_right'. */
PQ_EXPORT int32_t pq_low_rank_reconstruct(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, const float* left,
                                          const float* own_right, const float* right, const float* base, float* mean, float* rest);

/* Where a vector of a right factor is 0 it becomes random numbers of [-1, 1), of the shared key of (seed, step, first + number of
 * the matrix). */
PQ_EXPORT int32_t pq_low_rank_redraw(const pq_matrix* matrices, int64_t num_matrices, int32_t rank, uint64_t seed, uint64_t step,
                                     uint32_t first, float* right);

/* Makes the `rank` vectors of each of num_groups groups orthonormal; one that is all but in the span of those before it becomes 0. */
PQ_EXPORT int32_t pq_orthogonalize(const int64_t* lengths, int64_t num_groups, int32_t rank, float* vectors);

/* ---- messages: one bucket of an exchange, from numbers to bytes and back ----
 *
 * A message is a header of PQ_HEADER_NBYTES, which exchange/wire.py documents, and a payload. Functions return an error
 * of pq_status, which means that the call itself was wrong, or else flags: 0, or what is wrong with this bucket. */
#define PQ_HEADER_NBYTES 64
enum pq_flags {
  PQ_SENDER_NONFINITE = 1,  /* the sender's own values hold NaN, Inf or a number beyond the codec's range */
  PQ_MEAN_OVERFLOW = 2,     /* the mean that the sender made is beyond the range of the second codec */
  PQ_DESYNCHRONIZED = 4,    /* a message of another step, round, bucket or configuration has arrived */
  PQ_MALFORMED = 8          /* what has arrived is no message, or no payload; then bits 8 and up are minus a pq_status, or 0 */
};

/* What the messages of a bucket have in common in one round. */
typedef struct {
  uint64_t digest, seed, step, round;
  int64_t num_elements;
  uint32_t bucket;
  int32_t rank, size;
  int32_t flags; /* what is known to be wrong before anything is packed: the headers say it */
} pq_bucket;

/* A 64-bit key; keys.py is the specification. A shared key has the rank PQ_SHARED_RANK and phase 0. */
#define PQ_SHARED_RANK 0xFFFFFF
PQ_EXPORT uint64_t pq_derive_key(uint64_t seed, uint32_t rank, uint64_t step, uint32_t tensor, uint32_t phase);

/* Rows of a table, which each rank has others of, by allgather. A payload is the numbers of the rows, rising, in the fewest bits that
 * hold num_rows - 1, and then the codec's payload of all their values. A bucket's num_elements are those of this rank's own rows. */
typedef struct {
  int64_t num_rows, row_size;
} pq_table;

/* Bytes of a payload of `count` rows; negative for arguments that are not valid. */
PQ_EXPORT int64_t pq_rows_nbytes(const pq_codec* codec, const pq_table* table, int64_t count);
/* Encode the values source[0, count * row_size) of `rows` into a message. */
PQ_EXPORT int32_t pq_rows_pack(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, int64_t count, const int64_t* rows,
                               const pq_source* source, uint8_t* message, int64_t message_nbytes);
/* *total = how many rows all ranks have sent. Here and below what senders flag is not looked at. */
PQ_EXPORT int32_t pq_rows_total(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, const uint8_t* received,
                                int64_t received_nbytes, int64_t* total);
/* rows[0, *count) = the rows that any rank has sent, rising; there is room for the total. */
PQ_EXPORT int32_t pq_rows_union(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, const uint8_t* received,
                                int64_t received_nbytes, int64_t* rows, int64_t* count);
/* values[i] = the mean of row rows[i], which is 0 on ranks that have not sent it; `rows` are their union. NaN if there are flags. */
PQ_EXPORT int32_t pq_rows_land(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, const uint8_t* received,
                               int64_t received_nbytes, int64_t count, const int64_t* rows, float* values);

/* Allgather: encode source[start, start + num_elements) into a message; mean = base (or 0) + the mean of all ranks' messages.
 * A bucket with flags has a mean of NaN. */
PQ_EXPORT int32_t pq_allgather_pack(const pq_codec* codec, const pq_bucket* bucket, const pq_source* source, int64_t start,
                                    uint8_t* message, int64_t message_nbytes);
PQ_EXPORT int32_t pq_allgather_land(const pq_codec* codec, const pq_bucket* bucket, const uint8_t* received,
                                    int64_t received_nbytes, const float* base, float* mean);

/* Two-phase: rank r owns [shards[r], shards[r + 1]) of the bucket; shards has size + 1 entries, from 0 to num_elements.
 * pack: one message to each other rank, in rank order; the own shard is not coded, its next residual is what of it
 * does not count. mean: the mean of the
 * own shard, in `mean`, as a message to all; `flags` are those of pack. residual and next_residual are those of the own shard's
 * mean, or NULL; where second_codec is PQ_UNSCALED `mean` is the sum: a vote; the flags that it returns are also those of the
 * messages that have arrived. land: as for allgather. relay: in the place of mean the message of an owner that has taken its
 * node's mean to other nodes, uncoded; `flags` is what was wrong there. */
PQ_EXPORT int32_t pq_two_phase_pack(const pq_codec* codec, const pq_bucket* bucket, const int64_t* shards, const pq_source* source,
                                    int64_t start, uint8_t* messages, int64_t messages_nbytes);
PQ_EXPORT int32_t pq_two_phase_mean(const pq_codec* codec, const pq_codec* second_codec, const pq_bucket* bucket,
                                    const int64_t* shards, int32_t flags, const uint8_t* received, int64_t received_nbytes,
                                    const pq_source* source, int64_t start, const float* residual, float* next_residual,
                                    float* mean, uint8_t* message, int64_t message_nbytes);
PQ_EXPORT int32_t pq_two_phase_relay(const pq_bucket* bucket, int32_t flags, const float* mean, int64_t count, uint8_t* message,
                                     int64_t message_nbytes);
PQ_EXPORT int32_t pq_two_phase_land(const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards,
                                    const uint8_t* received, int64_t received_nbytes, const float* base, float* mean);

#ifdef __cplusplus
}
#endif
#endif
