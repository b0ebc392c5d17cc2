// How the bytes of a payload are laid out; every kind of kernel goes by it.
#pragma once
#include <cstdint>

#include "on_device.h"
#include "pqasgd.h"

namespace pqasgd {

constexpr int kMaxBlock = 8192;
constexpr int kCastBlock = 1024;
constexpr int kMaxScales = 2;  // of a block

// A block of a sparse codec: how many numbers are kept, and how it is written where they were.
struct IndexCode {
  int64_t kept;
  int32_t low_bits;  // of Elias-Fano; 0: a bitmap
  int64_t nbytes;    // 0: it is not written
};

// A codec with its block layout worked out; block sizes are checked before a Plan is made.
struct Plan {
  pq_codec codec;
  int64_t count;           // elements
  int64_t num_blocks;
  int32_t scales_per_block;
  int64_t scales_nbytes;   // of all blocks
  int64_t block_nbytes;    // code bytes of a full block
  int64_t payload_nbytes;
  // Of sparse codecs: the payload is that of the numbers that are kept, then the positions of each block.
  const Plan* values;      // NULL: not sparse
  int64_t positions_at;    // where those begin
  IndexCode index, last_index;

  PQ_BOTH const IndexCode& index_of(int64_t block) const { return (block + 1) * codec.block_size > count ? last_index : index; }
  PQ_BOTH const uint8_t* positions_of(const uint8_t* payload, int64_t block) const {
    return payload + positions_at + block * index.nbytes;
  }
  PQ_BOTH int64_t block_elements(int64_t block) const {
    const int64_t left = count - block * codec.block_size;
    return left < codec.block_size ? left : codec.block_size;
  }
};

// A plan, and that of the numbers which are kept if the codec is sparse.
struct Plans {
  Plan plan, values;
};

// False for a codec or a count that are not allowed.
bool make_plan(const pq_codec* codec, int64_t count, Plans* plans);

// Whether a source in host memory has these elements.
bool good_source(const pq_source* s, int64_t start, int64_t count);

// Or PQ_BAD_ARGUMENT.
int64_t payload_nbytes(const pq_codec* codec, int64_t count);

// The length to which EDEN pads a block.
PQ_BOTH inline int64_t eden_padded(int64_t elements, int64_t block_size) {
  if (elements >= block_size) return block_size;
  int64_t P = 64;
  while (P < elements) P *= 2;
  return P;
}

}  // namespace pqasgd
