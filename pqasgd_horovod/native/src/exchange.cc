// Messages of numbers in host memory; and those of rows of tables.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "messages.h"

namespace pqasgd {
namespace {

void fill_nan(float* mean, int64_t n) { std::fill(mean, mean + n, std::numeric_limits<float>::quiet_NaN()); }

struct Host {
  int32_t encode(const pq_codec& codec, const pq_source* source, int64_t start, int64_t count, pq_keys keys, uint8_t* payload,
                 int64_t nbytes) const {
    return pq_encode(&codec, source, start, count, keys, payload, nbytes);
  }
  int32_t encode_array(const pq_codec& codec, float* values, const float* residual, float* next_residual, int64_t count, pq_keys keys,
                       uint8_t* payload, int64_t nbytes) const {
    const pq_segment segment{values, count, PQ_F32, 0};
    const int64_t offsets[2] = {0, count};
    const pq_source source{&segment, offsets, 1, nullptr, PQ_F32, 0, residual, next_residual};
    return pq_encode(&codec, &source, 0, count, keys, payload, nbytes);
  }
  int32_t reduce(const pq_codec& codec, int32_t num_payloads, const uint8_t* const* payloads, int64_t nbytes, const pq_keys* keys,
                 float weight, const pq_source* own, int64_t own_start, int64_t count, const float* base, float* mean) const {
    return pq_reduce(&codec, num_payloads, payloads, nbytes, keys, weight, own, own_start, count, base, mean);
  }
  void keep_own_rest(const pq_codec& codec, const pq_source* source, int64_t start, int64_t count, pq_keys keys) const {
    pqasgd::keep_own_rest(codec, *source, start, count, keys);
  }
  // Uses `scratch`, `count` numbers.
  bool all_finite(const pq_source* source, int64_t start, int64_t count, float* scratch) const {
    return pq_gather(source, start, count, scratch, PQ_F32) == PQ_OK &&
           std::all_of(scratch, scratch + count, [](float x) { return std::isfinite(x); });
  }
  void fill_nan(float* mean, int64_t n) const { pqasgd::fill_nan(mean, n); }
  bool put(uint8_t* to, const void* from, int64_t nbytes) const {
    if (nbytes) std::memcpy(to, from, (size_t)nbytes);
    return true;
  }
  bool read_headers(const uint8_t* received, const std::vector<int64_t>& places, Header* to) const {
    for (int64_t at : places) std::memcpy(to++, received + at, sizeof(Header));
    return true;
  }
};

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
  const auto judge = [&](size_t, const Header& h, bool* differs, bool* misfits) {
    const int64_t count = (int64_t)(h.num_elements / (uint64_t)table.row_size);
    *differs |= h.num_elements % (uint64_t)table.row_size != 0 || count > table.num_rows;
    *misfits |= *differs || h.payload_nbytes != (uint64_t)pq_rows_nbytes(codec, &table, count);
    result.counts.push_back(count);
  };
  result.opened = open(Host{}, b, kValues, all_ranks(b, false), {}, received, nbytes, judge);
  return result;
}

}  // namespace
}  // namespace pqasgd

using namespace pqasgd;

extern "C" {

uint64_t pq_derive_key(uint64_t seed, uint32_t rank, uint64_t step, uint32_t tensor, uint32_t phase) {
  return derive_key(seed, rank, step, tensor, phase);
}

int32_t pq_allgather_pack(const pq_codec* codec, const pq_bucket* bucket, const pq_source* source, int64_t start, uint8_t* message,
                          int64_t message_nbytes) {
  return allgather_pack(Host{}, codec, bucket, source, start, message, message_nbytes);
}

int32_t pq_allgather_land(const pq_codec* codec, const pq_bucket* bucket, const uint8_t* received, int64_t received_nbytes,
                          const float* base, float* mean) {
  return allgather_land(Host{}, codec, bucket, received, received_nbytes, base, mean);
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
  write_header(Host{}, b, flags, kValues, nbytes, message);
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
  return two_phase_pack(Host{}, codec, bucket, shards, source, start, messages, messages_nbytes);
}

int32_t pq_two_phase_mean(const pq_codec* codec, const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards,
                          int32_t flags, const uint8_t* received, int64_t received_nbytes, const pq_source* source, int64_t start,
                          const float* residual, float* next_residual, float* mean, uint8_t* message, int64_t message_nbytes) {
  return two_phase_mean(Host{}, codec, second_codec, bucket, shards, flags, received, received_nbytes, source, start, residual,
                        next_residual, mean, message, message_nbytes);
}

int32_t pq_two_phase_relay(const pq_bucket* bucket, int32_t flags, const float* mean, int64_t count, uint8_t* message,
                           int64_t message_nbytes) {
  return two_phase_relay(Host{}, bucket, flags, mean, count, message, message_nbytes);
}

int32_t pq_two_phase_land(const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards, const uint8_t* received,
                          int64_t received_nbytes, const float* base, float* mean) {
  return two_phase_land(Host{}, second_codec, bucket, shards, received, received_nbytes, base, mean);
}

}  // extern "C"
