// One bucket of an exchange, from numbers to messages and back: headers, keys, order of summation, and what is wrong if something is.
// exchange/wire.py documents the header; exchange/allgather.py and two_phase.py what is computed.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "keys.h"

namespace pqasgd {
namespace {

// ---- headers ----

constexpr char kMagic[4] = {'P', 'Q', 'A', '1'};
constexpr uint16_t kVersion = 1;
constexpr uint16_t kAllFlags = 15;
constexpr uint32_t kValues = 0, kMeans = 1;  // phases

uint32_t crc32(const uint8_t* bytes, size_t n) {  // that of zlib
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t c = 0xFFFFFFFFu;
  for (size_t i = 0; i < n; ++i) c = table[(c ^ bytes[i]) & 0xFF] ^ (c >> 8);
  return c ^ 0xFFFFFFFFu;
}

struct Header {
  char magic[4];
  uint16_t flags, version;
  uint64_t digest, round, step;
  uint32_t bucket, rank;
  uint64_t payload_nbytes, num_elements;
  uint32_t phase, checksum;
};
static_assert(sizeof(Header) == PQ_HEADER_NBYTES, "the header is packed without gaps");

void write_header(const pq_bucket& b, int32_t flags, uint32_t phase, int64_t payload_nbytes, uint8_t* out) {
  Header h{{kMagic[0], kMagic[1], kMagic[2], kMagic[3]},
           (uint16_t)flags,
           kVersion,
           b.digest,
           b.round,
           b.step,
           b.bucket,
           (uint32_t)b.rank,
           (uint64_t)payload_nbytes,
           (uint64_t)b.num_elements,
           phase,
           0};
  std::memcpy(out, &h, sizeof h);
  h.checksum = crc32(out, offsetof(Header, checksum));
  std::memcpy(out, &h, sizeof h);
}

// What has arrived in one phase, cut apart; `flags` is what is wrong with it, and what the senders say is wrong.
struct Opened {
  int32_t flags = 0;
  std::vector<const uint8_t*> payloads;  // by sender
};

// `judge` is given each sender's position and header; it sets whether they differ from what they should be, and misfit.
template <class Judge>
Opened open(const pq_bucket& b, uint32_t phase, const std::vector<int32_t>& senders, const uint8_t* received, int64_t nbytes,
            Judge judge) {
  Opened result;
  bool differs = false, misfits = false;
  int64_t at = 0;
  for (size_t i = 0; i < senders.size(); ++i) {
    Header h;
    if (nbytes - at < (int64_t)sizeof h) return {PQ_MALFORMED, {}};
    std::memcpy(&h, received + at, sizeof h);
    const uint32_t checksum = crc32(received + at, offsetof(Header, checksum));
    at += sizeof h;
    if (std::memcmp(h.magic, kMagic, sizeof kMagic) || h.version != kVersion || h.checksum != checksum || h.flags & ~kAllFlags ||
        h.rank != (uint32_t)senders[i] || h.payload_nbytes > (uint64_t)(nbytes - at))
      return {PQ_MALFORMED, {}};
    differs |= h.digest != b.digest || h.round != b.round || h.step != b.step || h.bucket != b.bucket || h.phase != phase;
    judge(i, h, &differs, &misfits);
    result.flags |= h.flags;
    result.payloads.push_back(received + at);
    at += (int64_t)h.payload_nbytes;
  }
  if (at != nbytes) return {PQ_MALFORMED, {}};
  if (differs) return {PQ_DESYNCHRONIZED, {}};
  if (misfits) return {PQ_MALFORMED, {}};
  return result;
}

Opened open(const pq_bucket& b, uint32_t phase, const std::vector<int32_t>& senders, const std::vector<int64_t>& payload_nbytes,
            const uint8_t* received, int64_t nbytes) {
  return open(b, phase, senders, received, nbytes, [&](size_t i, const Header& h, bool* differs, bool* misfits) {
    *differs |= h.num_elements != (uint64_t)b.num_elements;
    *misfits |= h.payload_nbytes != (uint64_t)payload_nbytes[i];
  });
}

// A payload that no encoder writes; the status of the codec is kept for the one who explains.
int32_t malformed(int32_t status) { return PQ_MALFORMED | -status << 8; }

bool good_bucket(const pq_bucket* b) {
  return b && b->size >= 1 && b->size < PQ_SHARED_RANK && b->rank >= 0 && b->rank < b->size && b->num_elements >= 0;
}

bool good_shards(const pq_bucket& b, const int64_t* shards) {
  if (!shards || shards[0] != 0 || shards[b.size] != b.num_elements) return false;
  for (int32_t r = 0; r < b.size; ++r)
    if (shards[r + 1] < shards[r]) return false;
  return true;
}

pq_keys keys_of(const pq_bucket& b, int32_t sender, uint32_t tensor, uint32_t phase) {
  return {pq_derive_key(b.seed, (uint32_t)sender, b.step, tensor, phase),
          pq_derive_key(b.seed, PQ_SHARED_RANK, b.step, tensor, kValues)};
}

uint32_t shard_tensor(const pq_bucket& b, int32_t owner) { return b.bucket * (uint32_t)b.size + (uint32_t)owner; }

std::vector<int32_t> all_ranks(const pq_bucket& b, bool without_own) {
  std::vector<int32_t> ranks;
  for (int32_t r = 0; r < b.size; ++r)
    if (!(without_own && r == b.rank)) ranks.push_back(r);
  return ranks;
}

// ---- rows of a table ----

int row_bits(const pq_table& table) {
  int bits = 1;
  while (bits < 48 && int64_t{1} << bits < table.num_rows) ++bits;
  return bits;
}

bool good_table(const pq_table* table) {
  return table && table->num_rows >= 1 && table->num_rows <= int64_t{1} << 48 && table->row_size >= 1 &&
         table->row_size <= int64_t{1} << 40;
}

int64_t rows_nbytes(const pq_table& table, int64_t count) { return (count * row_bits(table) + 7) / 8; }

// The rows of one payload; empty, with `good` false, unless they rise and are rows of the table.
std::vector<int64_t> read_rows(const pq_table& table, const uint8_t* packed, int64_t count, bool* good) {
  const int bits = row_bits(table);
  std::vector<int64_t> rows((size_t)count);
  int64_t at = 0;
  for (int64_t& row : rows) {
    uint64_t value = 0;
    for (int done = 0; done < bits;) {
      const int offset = (int)(at % 8), taken = std::min(8 - offset, bits - done);
      value |= (uint64_t)(packed[at / 8] >> offset & ((1 << taken) - 1)) << done;
      done += taken;
      at += taken;
    }
    row = (int64_t)value;
  }
  for (size_t i = 0; i < rows.size(); ++i)
    if (rows[i] >= table.num_rows || (i && rows[i] <= rows[i - 1])) *good = false;
  return *good ? rows : std::vector<int64_t>{};
}

struct OpenedRows {
  Opened opened;
  std::vector<int64_t> counts;  // by sender
};

OpenedRows open_rows(const pq_codec* codec, const pq_bucket& b, const pq_table& table, const uint8_t* received, int64_t nbytes) {
  OpenedRows result;
  result.opened = open(b, kValues, all_ranks(b, false), received, nbytes, [&](size_t, const Header& h, bool* differs, bool* misfits) {
    const int64_t count = (int64_t)(h.num_elements / (uint64_t)table.row_size);
    *differs |= h.num_elements % (uint64_t)table.row_size != 0 || count > table.num_rows;
    *misfits |= *differs || h.payload_nbytes != (uint64_t)pq_rows_nbytes(codec, &table, count);
    result.counts.push_back(count);
  });
  return result;
}

void fill_nan(float* mean, int64_t n) { std::fill(mean, mean + n, std::numeric_limits<float>::quiet_NaN()); }

}  // namespace
}  // namespace pqasgd

using namespace pqasgd;

extern "C" {

uint64_t pq_derive_key(uint64_t seed, uint32_t rank, uint64_t step, uint32_t tensor, uint32_t phase) {
  return derive_key(seed, rank, step, tensor, phase);
}

int32_t pq_allgather_pack(const pq_codec* codec, const pq_bucket* bucket, const pq_source* source, int64_t start, uint8_t* message,
                          int64_t message_nbytes) {
  if (!good_bucket(bucket) || !message) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t nbytes = pq_payload_nbytes(codec, b.num_elements);
  if (nbytes < 0) return PQ_BAD_ARGUMENT;
  if (message_nbytes != PQ_HEADER_NBYTES + nbytes) return PQ_BAD_LENGTH;
  const int32_t status = pq_encode(codec, source, start, b.num_elements, keys_of(b, b.rank, b.bucket, kValues),
                                   message + PQ_HEADER_NBYTES, nbytes);
  if (status < 0) return status;
  const int32_t flags = b.flags | (status == PQ_NONFINITE ? PQ_SENDER_NONFINITE : 0);
  write_header(b, flags, kValues, nbytes, message);
  return flags;
}

int32_t pq_allgather_land(const pq_codec* codec, const pq_bucket* bucket, const uint8_t* received, int64_t received_nbytes,
                          const float* base, float* mean) {
  if (!good_bucket(bucket) || received_nbytes < 0 || (received_nbytes && !received)) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t nbytes = pq_payload_nbytes(codec, b.num_elements);
  if (nbytes < 0 || (b.num_elements && !mean)) return PQ_BAD_ARGUMENT;
  const std::vector<int32_t> senders = all_ranks(b, false);
  const Opened opened = open(b, kValues, senders, std::vector<int64_t>((size_t)b.size, nbytes), received, received_nbytes);
  int32_t verdict = opened.flags;
  if (!verdict) {
    std::vector<pq_keys> keys;
    for (int32_t sender : senders) keys.push_back(keys_of(b, sender, b.bucket, kValues));
    const int32_t status = pq_reduce(codec, b.size, opened.payloads.data(), nbytes, keys.data(), (float)(1.0 / b.size), nullptr, 0,
                                     b.num_elements, base, mean);
    if (status == PQ_BAD_ARGUMENT) return status;
    if (status < 0) verdict = malformed(status);
  }
  if (verdict) fill_nan(mean, b.num_elements);
  return verdict;
}

int64_t pq_rows_nbytes(const pq_codec* codec, const pq_table* table, int64_t count) {
  if (!good_table(table) || count < 0 || count > table->num_rows) return PQ_BAD_ARGUMENT;
  const int64_t of_values = pq_payload_nbytes(codec, count * table->row_size);
  return of_values < 0 ? of_values : rows_nbytes(*table, count) + of_values;
}

int32_t pq_rows_pack(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, int64_t count, const int64_t* rows,
                     const pq_source* source, uint8_t* message, int64_t message_nbytes) {
  if (!good_bucket(bucket) || !message || (count && !rows)) return PQ_BAD_ARGUMENT;
  const int64_t nbytes = pq_rows_nbytes(codec, table, count);
  if (nbytes < 0 || bucket->num_elements != count * table->row_size) return PQ_BAD_ARGUMENT;
  if (message_nbytes != PQ_HEADER_NBYTES + nbytes) return PQ_BAD_LENGTH;
  const pq_bucket& b = *bucket;
  uint8_t* out = message + PQ_HEADER_NBYTES;
  const int64_t of_rows = rows_nbytes(*table, count);
  const int bits = row_bits(*table);
  std::fill(out, out + of_rows, uint8_t{0});
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= table->num_rows || (i && rows[i] <= rows[i - 1])) return PQ_BAD_ARGUMENT;
    for (int done = 0; done < bits;) {
      const int offset = (int)(at % 8), taken = std::min(8 - offset, bits - done);
      out[at / 8] |= (uint8_t)((rows[i] >> done & ((1 << taken) - 1)) << offset);
      done += taken;
      at += taken;
    }
  }
  const int32_t status =
      pq_encode(codec, source, 0, b.num_elements, keys_of(b, b.rank, b.bucket, kValues), out + of_rows, nbytes - of_rows);
  if (status < 0) return status;
  const int32_t flags = b.flags | (status == PQ_NONFINITE ? PQ_SENDER_NONFINITE : 0);
  write_header(b, flags, kValues, nbytes, message);
  return flags;
}

int32_t pq_rows_total(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, const uint8_t* received,
                      int64_t received_nbytes, int64_t* total) {
  if (!good_bucket(bucket) || !good_table(table) || received_nbytes < 0 || (received_nbytes && !received) || !total)
    return PQ_BAD_ARGUMENT;
  const OpenedRows all = open_rows(codec, *bucket, *table, received, received_nbytes);
  if (all.opened.payloads.empty()) return all.opened.flags;
  *total = 0;
  for (int64_t count : all.counts) *total += count;
  return 0;
}

int32_t pq_rows_union(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, const uint8_t* received,
                      int64_t received_nbytes, int64_t* rows, int64_t* count) {
  int64_t total = 0;
  const int32_t flags = pq_rows_total(codec, bucket, table, received, received_nbytes, &total);
  if (flags) return flags;
  if (!count || (total && !rows)) return PQ_BAD_ARGUMENT;
  const OpenedRows all = open_rows(codec, *bucket, *table, received, received_nbytes);
  int64_t* end = rows;
  for (size_t sender = 0; sender < all.counts.size(); ++sender) {
    bool good = true;
    const std::vector<int64_t> own = read_rows(*table, all.opened.payloads[sender], all.counts[sender], &good);
    if (!good) return malformed(PQ_BAD_CODE);
    int64_t* middle = end;
    end = std::copy(own.begin(), own.end(), end);
    std::inplace_merge(rows, middle, end);
    end = std::unique(rows, end);
  }
  *count = end - rows;
  return 0;
}

int32_t pq_rows_land(const pq_codec* codec, const pq_bucket* bucket, const pq_table* table, const uint8_t* received,
                     int64_t received_nbytes, int64_t count, const int64_t* rows, float* values) {
  int64_t total = 0;
  int32_t verdict = pq_rows_total(codec, bucket, table, received, received_nbytes, &total);
  if (verdict) return verdict;
  if (count < 0 || count > total || (count && (!rows || !values))) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t width = table->row_size;
  const OpenedRows all = open_rows(codec, b, *table, received, received_nbytes);
  verdict = all.opened.flags;
  std::fill(values, values + count * width, 0.0f);
  std::vector<float> decoded;
  for (int32_t sender = 0; sender < b.size && !verdict; ++sender) {
    bool good = true;
    const uint8_t* payload = all.opened.payloads[(size_t)sender];
    const int64_t own_count = all.counts[(size_t)sender], of_rows = rows_nbytes(*table, own_count);
    const std::vector<int64_t> own = read_rows(*table, payload, own_count, &good);
    decoded.assign((size_t)(own_count * width), 0.0f);
    const int32_t status = pq_decode_add(codec, payload + of_rows, pq_payload_nbytes(codec, own_count * width), own_count * width,
                                         keys_of(b, sender, b.bucket, kValues), (float)(1.0 / b.size), decoded.data());
    if (status == PQ_BAD_ARGUMENT) return status;
    if (status < 0 || !good) verdict = malformed(status < 0 ? status : PQ_BAD_CODE);
    const int64_t* place = rows;
    for (size_t i = 0; i < own.size() && !verdict; ++i) {
      place = std::lower_bound(place, rows + count, own[i]);
      if (place == rows + count || *place != own[i]) return PQ_BAD_ARGUMENT;
      float* to = values + (place - rows) * width;
      const float* from = decoded.data() + (int64_t)i * width;
      for (int64_t j = 0; j < width; ++j) to[j] += from[j];
    }
  }
  if (verdict) fill_nan(values, count * width);
  return verdict;
}

int32_t pq_two_phase_pack(const pq_codec* codec, const pq_bucket* bucket, const int64_t* shards, const pq_source* source,
                          int64_t start, uint8_t* messages, int64_t messages_nbytes) {
  if (!good_bucket(bucket) || !good_shards(*bucket, shards) || !messages) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const std::vector<int32_t> owners = all_ranks(b, true);
  std::vector<int64_t> at{0};
  for (int32_t owner : owners) {
    const int64_t nbytes = pq_payload_nbytes(codec, shards[owner + 1] - shards[owner]);
    if (nbytes < 0) return PQ_BAD_ARGUMENT;
    at.push_back(at.back() + PQ_HEADER_NBYTES + nbytes);
  }
  if (messages_nbytes != at.back()) return PQ_BAD_LENGTH;
  int32_t flags = b.flags;
  for (size_t i = 0; i < owners.size(); ++i) {
    const int32_t owner = owners[i];
    const int64_t count = shards[owner + 1] - shards[owner];
    const int32_t status =
        pq_encode(codec, source, start + shards[owner], count, keys_of(b, b.rank, shard_tensor(b, owner), kValues),
                  messages + at[i] + PQ_HEADER_NBYTES, at[i + 1] - at[i] - PQ_HEADER_NBYTES);
    if (status < 0) return status;
    if (status == PQ_NONFINITE) flags |= PQ_SENDER_NONFINITE;
  }
  if (source->next_residual)
    keep_own_rest(*codec, *source, start + shards[b.rank], shards[b.rank + 1] - shards[b.rank],
                  keys_of(b, b.rank, shard_tensor(b, b.rank), kValues));
  for (size_t i = 0; i < owners.size(); ++i)  // only now is it known what the headers have to say
    write_header(b, flags, kValues, at[i + 1] - at[i] - PQ_HEADER_NBYTES, messages + at[i]);
  return flags;
}

int32_t pq_two_phase_mean(const pq_codec* codec, const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards,
                          int32_t flags, const uint8_t* received, int64_t received_nbytes, const pq_source* source, int64_t start,
                          const float* residual, float* next_residual, float* mean, uint8_t* message, int64_t message_nbytes) {
  if (!good_bucket(bucket) || !good_shards(*bucket, shards) || received_nbytes < 0 || (received_nbytes && !received) || !message)
    return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t first = start + shards[b.rank], count = shards[b.rank + 1] - shards[b.rank];
  const int64_t nbytes = pq_payload_nbytes(codec, count), mean_nbytes = pq_payload_nbytes(second_codec, count);
  if (nbytes < 0 || mean_nbytes < 0 || (count && !mean)) return PQ_BAD_ARGUMENT;
  if (message_nbytes != PQ_HEADER_NBYTES + mean_nbytes) return PQ_BAD_LENGTH;

  const std::vector<int32_t> senders = all_ranks(b, true);
  const Opened opened = open(b, kValues, senders, std::vector<int64_t>(senders.size(), nbytes), received, received_nbytes);
  // Nobody has encoded the owner's own part, so nobody has seen whether it is finite.
  auto own_is_finite = [&] {
    return pq_gather(source, first, count, mean, PQ_F32) == PQ_OK &&
           std::all_of(mean, mean + count, [](float x) { return std::isfinite(x); });
  };
  // A fault of the messages themselves comes without their payloads; what their senders flag comes with them.
  const bool unreadable = opened.payloads.size() != senders.size();
  if (unreadable) {
    flags |= opened.flags;
  } else if (count && (flags || opened.flags)) {
    // Some sender's codes mean nothing, so there is no mean; only the verdict has to be complete.
    if (!own_is_finite()) flags |= PQ_SENDER_NONFINITE;
  } else if (count) {
    std::vector<const uint8_t*> payloads = opened.payloads;
    payloads.insert(payloads.begin() + b.rank, nullptr);
    std::vector<pq_keys> keys;
    for (int32_t sender = 0; sender < b.size; ++sender) keys.push_back(keys_of(b, sender, shard_tensor(b, b.rank), kValues));
    // Of a sum only the sign is sent: as it is a whole number, a tie is 0 exactly.
    const float weight = second_codec->flags & PQ_UNSCALED ? 1.0f : (float)(1.0 / b.size);
    int32_t status =
        pq_reduce(codec, b.size, payloads.data(), nbytes, keys.data(), weight, source, first, count, nullptr, mean);
    if (status == PQ_BAD_ARGUMENT) return status;
    if (status < 0) {
      flags |= malformed(status);
    } else {
      const pq_segment segment{mean, count, PQ_F32, 0};
      const int64_t offsets[2] = {0, count};
      const pq_source means{&segment, offsets, 1, nullptr, PQ_F32, 0, residual, next_residual};
      status = pq_encode(second_codec, &means, 0, count, keys_of(b, b.rank, shard_tensor(b, b.rank), kMeans),
                         message + PQ_HEADER_NBYTES, mean_nbytes);
      if (status < 0) return status;
      if (status == PQ_NONFINITE) flags |= own_is_finite() ? PQ_MEAN_OVERFLOW : PQ_SENDER_NONFINITE;
    }
  }
  // Whatever has happened, phase two takes place: the others wait for it, and learn from its header.
  write_header(b, flags & kAllFlags, kMeans, mean_nbytes, message);
  return flags | opened.flags;
}

int32_t pq_two_phase_relay(const pq_bucket* bucket, int32_t flags, const float* mean, int64_t count, uint8_t* message,
                           int64_t message_nbytes) {
  if (!good_bucket(bucket) || count < 0 || (count && !mean) || !message) return PQ_BAD_ARGUMENT;
  const int64_t nbytes = count * (int64_t)sizeof(float);
  if (message_nbytes != PQ_HEADER_NBYTES + nbytes) return PQ_BAD_LENGTH;
  const int32_t worst = flags & PQ_DESYNCHRONIZED ? PQ_DESYNCHRONIZED : flags & PQ_MALFORMED ? PQ_MALFORMED : PQ_SENDER_NONFINITE;
  std::memcpy(message + PQ_HEADER_NBYTES, mean, (size_t)nbytes);
  write_header(*bucket, flags ? worst : 0, kMeans, nbytes, message);
  return PQ_OK;
}

int32_t pq_two_phase_land(const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards, const uint8_t* received,
                          int64_t received_nbytes, const float* base, float* mean) {
  if (!good_bucket(bucket) || !good_shards(*bucket, shards) || received_nbytes < 0 || (received_nbytes && !received))
    return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  std::vector<int64_t> nbytes;
  for (int32_t owner = 0; owner < b.size; ++owner) {
    nbytes.push_back(pq_payload_nbytes(second_codec, shards[owner + 1] - shards[owner]));
    if (nbytes.back() < 0) return PQ_BAD_ARGUMENT;
  }
  if (b.num_elements && !mean) return PQ_BAD_ARGUMENT;
  const Opened opened = open(b, kMeans, all_ranks(b, false), nbytes, received, received_nbytes);
  int32_t verdict = opened.flags;
  for (int32_t owner = 0; owner < b.size && !verdict; ++owner) {
    const int64_t at = shards[owner], count = shards[owner + 1] - at;
    const pq_keys keys = keys_of(b, owner, shard_tensor(b, owner), kMeans);
    const int32_t status = pq_reduce(second_codec, 1, &opened.payloads[(size_t)owner], nbytes[(size_t)owner], &keys, 1.0f, nullptr, 0,
                                     count, base ? base + at : nullptr, mean + at);
    if (status == PQ_BAD_ARGUMENT) return status;
    if (status < 0) verdict = malformed(status);
  }
  if (verdict) fill_nan(mean, b.num_elements);
  return verdict;
}

}  // extern "C"
