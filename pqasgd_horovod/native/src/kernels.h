// What each instruction set provides; kernels.cc is compiled once per set and fills one of these tables.
#pragma once
#include <cstdint>

#include "plan.h"

namespace pqasgd {

struct Kernels {
  const char* isa;
  // Blocks [begin, end) of source[start, start + plan.count); false if something is not finite.
  bool (*encode)(const Plan&, const pq_source&, int64_t start, pq_keys, uint8_t* payload, int64_t begin, int64_t end);
  // destination += weight * decoded, for blocks [begin, end); destination is the whole vector.
  int32_t (*decode_add)(const Plan&, const uint8_t* payload, pq_keys, float weight, float* destination, int64_t begin,
                        int64_t end);
  int32_t (*reduce)(const Plan&, int32_t num_payloads, const uint8_t* const* payloads, const pq_keys* keys, float weight,
                    const pq_source* own, int64_t own_start, const float* base, float* destination, int64_t begin, int64_t end);
  // Sparse codecs: the numbers that are kept to `numbers`, which is as long as all of them, and their positions to the payload; and to
  // next_residual, if there is one, the block as it is. False if something is not finite. Then, of that, minus what was sent.
  bool (*select)(const Plan&, const pq_source&, int64_t start, pq_keys, float* numbers, uint8_t* payload, int64_t begin, int64_t end);
  int32_t (*subtract)(const Plan&, const uint8_t* payload, pq_keys, float* rest, int64_t begin, int64_t end);
  // next_residual = source minus what it counts as uncoded.
  void (*own_rest)(const Plan&, const pq_source&, int64_t start, pq_keys, int64_t begin, int64_t end);
  void (*apply)(const float* mean, int64_t start, int64_t count, const pq_source& target, bool past_caches);
  void (*rebase)(const void* base, int64_t start, int64_t count, const pq_source& target);
  void (*gather)(const pq_source&, int64_t start, int64_t count, void* destination, int32_t dtype);
  void (*outer)(float decay, float a, float b, int64_t count, float* momentum, float* delta);
  double (*distance)(const pq_source&, int64_t start, int64_t count, const float* center);
  void (*capture)(const pq_source&, int64_t start, int64_t count);
  // Low rank, of one matrix: rows, columns (`begin` a multiple of 64), or rows [begin, end).
  void (*project)(const pq_matrix&, int32_t rank, const pq_source&, int64_t at, const float* right, float* left, int64_t begin,
                  int64_t end);
  void (*backproject)(const pq_matrix&, int32_t rank, const float* values, const float* left, float* right, int64_t begin,
                      int64_t end);
  void (*reconstruct)(const pq_matrix&, int32_t rank, const float* left, const float* own_right, const float* right,
                      const float* base, float* mean, float* rest, int64_t begin, int64_t end);
  void (*orthogonalize)(int64_t length, int32_t rank, float* vectors);
};

extern const Kernels kernels_plain;
#if defined(PQ_HAVE_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Tables for the Lloyd-Max quantizer, made once; see quantizer_tables.cc.
struct LloydMax {
  static constexpr int kMaxCells = 1024;
  int num_cells;                 // |u| / cell width, clipped, selects a cell with at most one threshold in it
  float cells_per_sigma;
  alignas(64) float centroid[128];          // by magnitude index, repeated
  alignas(64) float threshold[128];         // threshold[m] separates m and m + 1; the last is +inf
  alignas(64) float decode[256];            // by code
  alignas(64) float tree[128];              // thresholds: node i has children 2 i and 2 i + 1; the root is node 1
  alignas(64) int32_t cell_base[kMaxCells];
  alignas(64) float cell_threshold[kMaxCells];
};
const LloydMax& lloyd_max(int bits);

// What the owner of a shard, who does not code it, leaves to the next round; the arguments are those of pq_encode, and checked.
void keep_own_rest(const pq_codec& codec, const pq_source& source, int64_t start, int64_t count, pq_keys keys);

}  // namespace pqasgd
