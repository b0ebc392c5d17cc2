// What a codec makes of so many elements: sizes, places, and whether there is such a codec.
#include "plan.h"

#include <algorithm>

namespace pqasgd {
namespace {

bool is_sparse(const pq_codec& codec) { return codec.kind >= PQ_TOPK && codec.kind <= PQ_THRESHOLD; }

// The fewest bits: a bitmap takes n, Elias-Fano k l + k + floor((n - 1) / 2^l).
IndexCode index_code(int64_t n, int64_t kept) {
  IndexCode code{kept, 0, 0};
  int64_t least = n;
  for (int32_t low_bits = 1; low_bits <= 13; ++low_bits) {
    const int64_t bits = kept * (low_bits + 1) + ((n - 1) >> low_bits);
    if (bits < least) {
      least = bits;
      code.low_bits = low_bits;
    }
  }
  code.nbytes = (least + 7) / 8;
  return code;
}

// Of a codec that is not sparse.
bool make_block_plan(const pq_codec* codec, int64_t count, Plan* plan) {
  if (!codec || count < 0 || count > (int64_t{1} << 40)) return false;
  Plan p{};
  p.codec = *codec;
  p.count = count;
  const int bits = codec->bits, size = codec->block_size;
  int64_t last_nbytes = 0;
  p.scales_per_block = 1;
  const bool uniform_size = size >= 64 && size <= kMaxBlock && size % 64 == 0;
  auto layout = [&](auto nbytes) {
    p.num_blocks = (count + p.codec.block_size - 1) / p.codec.block_size;
    p.block_nbytes = nbytes(p.codec.block_size);
    if (p.num_blocks) last_nbytes = nbytes(p.block_elements(p.num_blocks - 1));
  };
  switch (codec->kind) {
    case PQ_NONE:
    case PQ_FP16:
    case PQ_BF16: {
      if (size != kCastBlock) return false;
      p.scales_per_block = 0;
      const int64_t width = codec->kind == PQ_NONE ? 4 : 2;
      layout([&](int64_t n) { return n * width; });
      break;
    }
    case PQ_MAXSCALE:
    case PQ_QSGD:
      if (bits < 2 || bits > 8 || !uniform_size) return false;
      layout([&](int64_t n) { return (n * bits + 7) / 8; });
      break;
    case PQ_TERNGRAD:
      if (!uniform_size) return false;
      layout([&](int64_t n) { return (n + 4) / 5; });
      break;
    case PQ_EDEN:
      if (bits < 1 || bits > 8 || !uniform_size || (size & (size - 1))) return false;
      layout([&](int64_t n) { return eden_padded(n, size) * bits / 8; });
      break;
    case PQ_NATURAL:
      if (size != kCastBlock) return false;
      p.scales_per_block = 0;
      layout([&](int64_t n) { return (n + 7) / 8 + n; });
      break;
    case PQ_SIGNSGD:
    case PQ_ONEBIT:
      if (!uniform_size) return false;
      p.scales_per_block = codec->kind == PQ_ONEBIT ? 2 : codec->flags & PQ_UNSCALED ? 0 : 1;
      layout([&](int64_t n) { return (n + 7) / 8; });
      break;
    default: return false;
  }
  if (p.num_blocks > int64_t{UINT32_MAX}) return false;  // the block index is half of the random counter
  p.scales_nbytes = 4 * p.scales_per_block * p.num_blocks;
  p.payload_nbytes = p.scales_nbytes + (p.num_blocks ? (p.num_blocks - 1) * p.block_nbytes + last_nbytes : 0);
  *plan = p;
  return true;
}

}  // namespace

bool make_plan(const pq_codec* codec, int64_t count, Plans* plans) {
  if (!codec || !is_sparse(*codec)) return make_block_plan(codec, count, &plans->plan);
  const int64_t size = codec->block_size, density = codec->density;
  if (count < 0 || count > (int64_t{1} << 40) || size < 64 || size > kMaxBlock || size % 64 || density < 0 || density > 1 << 30 ||
      codec->threshold < 0)
    return false;
  const bool written = codec->kind != PQ_RANDOMK;
  auto index = [&](int64_t n) {
    IndexCode code = index_code(n, std::max<int64_t>(1, (n * density + (1 << 29)) >> 30));
    if (!written) code.nbytes = 0;
    return code;
  };
  Plan p{};
  p.codec = *codec;
  p.count = count;
  p.num_blocks = (count + size - 1) / size;
  p.index = p.last_index = index(size);
  if (count % size) p.last_index = index(count % size);
  p.block_nbytes = p.index.nbytes;
  p.values = &plans->values;
  const int64_t kept = p.num_blocks ? (p.num_blocks - 1) * p.index.kept + p.last_index.kept : 0;
  const pq_codec values{codec->values_kind, codec->values_bits, codec->values_block_size, codec->values_flags, 0, 0, 0, 0, 0, 0};
  if (p.num_blocks > int64_t{UINT32_MAX} || !make_block_plan(&values, kept, &plans->values)) return false;
  p.positions_at = plans->values.payload_nbytes;
  p.payload_nbytes = p.positions_at +
                     (p.num_blocks ? (p.num_blocks - 1) * p.index.nbytes + p.last_index.nbytes : 0);
  plans->plan = p;
  return true;
}

int64_t payload_nbytes(const pq_codec* codec, int64_t count) {
  Plans plans;
  return make_plan(codec, count, &plans) ? plans.plan.payload_nbytes : int64_t{PQ_BAD_ARGUMENT};
}

bool good_source(const pq_source* s, int64_t start, int64_t count) {
  if (!s || start < 0 || count < 0 || s->num_segments < 0 || !s->offsets || (s->num_segments && !s->segments)) return false;
  if (s->offsets[0] != 0 || (s->anchor && s->anchor_dtype != PQ_F32 && s->anchor_dtype != PQ_F64)) return false;
  for (int64_t i = 0; i < s->num_segments; ++i) {
    const pq_segment& segment = s->segments[i];
    if (segment.numel < 0 || s->offsets[i + 1] - s->offsets[i] != segment.numel || (segment.numel && !segment.data) ||
        segment.dtype < PQ_F32 || segment.dtype > PQ_BF16_BITS)
      return false;
  }
  return start <= s->offsets[s->num_segments] && count <= s->offsets[s->num_segments] - start;
}

}  // namespace pqasgd
