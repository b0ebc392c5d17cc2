// One bucket of an exchange, from numbers to messages and back: headers, keys, order of summation, and what is wrong if something is.
// exchange/wire.py documents the header; exchange/allgather.py and two_phase.py what is computed.
//
// Where numbers and messages lie is the business of a Numbers, which codes the numbers, adds them and looks at them, copies to messages
// and reads headers: Host in exchange.cc, or Device in cuda/device.cu.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <vector>

#include "keys.h"
#include "plan.h"

namespace pqasgd {

// ---- headers ----

constexpr char kMagic[4] = {'P', 'Q', 'A', '1'};
constexpr uint16_t kVersion = 1;
constexpr uint16_t kAllFlags = 15;
constexpr uint32_t kValues = 0, kMeans = 1;  // phases

inline uint32_t crc32(const uint8_t* bytes, size_t n) {  // that of zlib
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

// False if the memory of messages refuses.
template <class Numbers>
bool write_header(const Numbers& numbers, const pq_bucket& b, int32_t flags, uint32_t phase, int64_t payload_nbytes, uint8_t* out) {
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
  h.checksum = crc32((const uint8_t*)&h, offsetof(Header, checksum));
  return numbers.put(out, &h, sizeof h);
}

// The headers of what has arrived. Those that are where they should be are read all at once: messages may be far away.
template <class Numbers>
class Headers {
 public:
  Headers(const Numbers& numbers, const uint8_t* received, int64_t nbytes, const std::vector<int64_t>& payload_nbytes)
      : numbers_(numbers), received_(received) {
    int64_t at = 0;
    for (int64_t payload : payload_nbytes) {
      if (nbytes - at < (int64_t)sizeof(Header)) break;
      places_.push_back(at);
      at += (int64_t)sizeof(Header) + payload;
    }
    headers_.resize(places_.size());
    good_ = numbers_.read_headers(received_, places_, headers_.data());
  }

  // The one of sender i, which begins at `at`; false if the memory of messages refuses.
  bool get(size_t i, int64_t at, Header* header) const {
    if (i >= places_.size() || places_[i] != at) return numbers_.read_headers(received_, {at}, header);
    *header = headers_[i];
    return good_;
  }

 private:
  const Numbers& numbers_;
  const uint8_t* received_;
  std::vector<int64_t> places_;
  std::vector<Header> headers_;
  bool good_;
};

// What has arrived in one phase, cut apart; `flags` is what is wrong with it, and what the senders say is wrong, or PQ_DEVICE_ERROR.
struct Opened {
  int32_t flags = 0;
  std::vector<const uint8_t*> payloads;  // by sender
};

// `judge` is given each sender's position and header; it sets whether they differ from what they should be, and misfit.
// `payload_nbytes` is where headers are looked for first; it may be empty.
template <class Numbers, class Judge>
Opened open(const Numbers& numbers, const pq_bucket& b, uint32_t phase, const std::vector<int32_t>& senders,
            const std::vector<int64_t>& payload_nbytes, const uint8_t* received, int64_t nbytes, Judge judge) {
  const Headers<Numbers> headers(numbers, received, nbytes, payload_nbytes);
  Opened result;
  bool differs = false, misfits = false;
  int64_t at = 0;
  for (size_t i = 0; i < senders.size(); ++i) {
    Header h;
    if (nbytes - at < (int64_t)sizeof h) return {PQ_MALFORMED, {}};
    if (!headers.get(i, at, &h)) return {PQ_DEVICE_ERROR, {}};
    const uint32_t checksum = crc32((const uint8_t*)&h, offsetof(Header, checksum));
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

template <class Numbers>
Opened open(const Numbers& numbers, const pq_bucket& b, uint32_t phase, const std::vector<int32_t>& senders,
            const std::vector<int64_t>& payload_nbytes, const uint8_t* received, int64_t nbytes) {
  const auto judge = [&](size_t i, const Header& h, bool* differs, bool* misfits) {
    *differs |= h.num_elements != (uint64_t)b.num_elements;
    *misfits |= h.payload_nbytes != (uint64_t)payload_nbytes[i];
  };
  return open(numbers, b, phase, senders, payload_nbytes, received, nbytes, judge);
}

// A payload that no encoder writes; the status of the codec is kept for the one who explains.
inline int32_t malformed(int32_t status) { return PQ_MALFORMED | -status << 8; }

// What is no fault of a message's, but of the call or of the machine.
inline bool is_callers(int32_t status) { return status == PQ_BAD_ARGUMENT || status == PQ_DEVICE_ERROR; }

inline bool good_bucket(const pq_bucket* b) {
  return b && b->size >= 1 && b->size < PQ_SHARED_RANK && b->rank >= 0 && b->rank < b->size && b->num_elements >= 0;
}

inline bool good_shards(const pq_bucket& b, const int64_t* shards) {
  if (!shards || shards[0] != 0 || shards[b.size] != b.num_elements) return false;
  for (int32_t r = 0; r < b.size; ++r)
    if (shards[r + 1] < shards[r]) return false;
  return true;
}

inline pq_keys keys_of(const pq_bucket& b, int32_t sender, uint32_t tensor, uint32_t phase) {
  return {derive_key(b.seed, (uint32_t)sender, b.step, tensor, phase),
          derive_key(b.seed, PQ_SHARED_RANK, b.step, tensor, kValues)};
}

inline uint32_t shard_tensor(const pq_bucket& b, int32_t owner) { return b.bucket * (uint32_t)b.size + (uint32_t)owner; }

inline std::vector<int32_t> all_ranks(const pq_bucket& b, bool without_own) {
  std::vector<int32_t> ranks;
  for (int32_t r = 0; r < b.size; ++r)
    if (!(without_own && r == b.rank)) ranks.push_back(r);
  return ranks;
}

// ---- allgather ----

template <class Numbers>
int32_t allgather_pack(const Numbers& numbers, const pq_codec* codec, const pq_bucket* bucket, const pq_source* source, int64_t start, uint8_t* message,
                          int64_t message_nbytes) {
  if (!good_bucket(bucket) || !message) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t nbytes = payload_nbytes(codec, b.num_elements);
  if (nbytes < 0) return PQ_BAD_ARGUMENT;
  if (message_nbytes != PQ_HEADER_NBYTES + nbytes) return PQ_BAD_LENGTH;
  const int32_t status = numbers.encode(*codec, source, start, b.num_elements, keys_of(b, b.rank, b.bucket, kValues),
                                   message + PQ_HEADER_NBYTES, nbytes);
  if (status < 0) return status;
  const int32_t flags = b.flags | (status == PQ_NONFINITE ? PQ_SENDER_NONFINITE : 0);
  return write_header(numbers, b, flags, kValues, nbytes, message) ? flags : int32_t{PQ_DEVICE_ERROR};
}

template <class Numbers>
int32_t allgather_land(const Numbers& numbers, const pq_codec* codec, const pq_bucket* bucket, const uint8_t* received, int64_t received_nbytes,
                          const float* base, float* mean) {
  if (!good_bucket(bucket) || received_nbytes < 0 || (received_nbytes && !received)) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t nbytes = payload_nbytes(codec, b.num_elements);
  if (nbytes < 0 || (b.num_elements && !mean)) return PQ_BAD_ARGUMENT;
  const std::vector<int32_t> senders = all_ranks(b, false);
  const Opened opened = open(numbers, b, kValues, senders, std::vector<int64_t>((size_t)b.size, nbytes), received, received_nbytes);
  if (is_callers(opened.flags)) return opened.flags;
  int32_t verdict = opened.flags;
  if (!verdict) {
    std::vector<pq_keys> keys;
    for (int32_t sender : senders) keys.push_back(keys_of(b, sender, b.bucket, kValues));
    const int32_t status = numbers.reduce(*codec, b.size, opened.payloads.data(), nbytes, keys.data(), (float)(1.0 / b.size), nullptr, 0,
                                     b.num_elements, base, mean);
    if (is_callers(status)) return status;
    if (status < 0) verdict = malformed(status);
  }
  if (verdict) numbers.fill_nan(mean, b.num_elements);
  return verdict;
}

// ---- two-phase ----

template <class Numbers>
int32_t two_phase_pack(const Numbers& numbers, const pq_codec* codec, const pq_bucket* bucket, const int64_t* shards, const pq_source* source,
                          int64_t start, uint8_t* messages, int64_t messages_nbytes) {
  if (!good_bucket(bucket) || !good_shards(*bucket, shards) || !messages) return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const std::vector<int32_t> owners = all_ranks(b, true);
  std::vector<int64_t> at{0};
  for (int32_t owner : owners) {
    const int64_t nbytes = payload_nbytes(codec, shards[owner + 1] - shards[owner]);
    if (nbytes < 0) return PQ_BAD_ARGUMENT;
    at.push_back(at.back() + PQ_HEADER_NBYTES + nbytes);
  }
  if (messages_nbytes != at.back()) return PQ_BAD_LENGTH;
  int32_t flags = b.flags;
  for (size_t i = 0; i < owners.size(); ++i) {
    const int32_t owner = owners[i];
    const int64_t count = shards[owner + 1] - shards[owner];
    const int32_t status =
        numbers.encode(*codec, source, start + shards[owner], count, keys_of(b, b.rank, shard_tensor(b, owner), kValues),
                  messages + at[i] + PQ_HEADER_NBYTES, at[i + 1] - at[i] - PQ_HEADER_NBYTES);
    if (status < 0) return status;
    if (status == PQ_NONFINITE) flags |= PQ_SENDER_NONFINITE;
  }
  if (source->next_residual)
    numbers.keep_own_rest(*codec, source, start + shards[b.rank], shards[b.rank + 1] - shards[b.rank],
                  keys_of(b, b.rank, shard_tensor(b, b.rank), kValues));
  for (size_t i = 0; i < owners.size(); ++i)  // only now is it known what the headers have to say
    if (!write_header(numbers, b, flags, kValues, at[i + 1] - at[i] - PQ_HEADER_NBYTES, messages + at[i])) return PQ_DEVICE_ERROR;
  return flags;
}

template <class Numbers>
int32_t two_phase_mean(const Numbers& numbers, const pq_codec* codec, const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards,
                          int32_t flags, const uint8_t* received, int64_t received_nbytes, const pq_source* source, int64_t start,
                          const float* residual, float* next_residual, float* mean, uint8_t* message, int64_t message_nbytes) {
  if (!good_bucket(bucket) || !good_shards(*bucket, shards) || received_nbytes < 0 || (received_nbytes && !received) || !message)
    return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  const int64_t first = start + shards[b.rank], count = shards[b.rank + 1] - shards[b.rank];
  const int64_t nbytes = payload_nbytes(codec, count), mean_nbytes = payload_nbytes(second_codec, count);
  if (nbytes < 0 || mean_nbytes < 0 || (count && !mean)) return PQ_BAD_ARGUMENT;
  if (message_nbytes != PQ_HEADER_NBYTES + mean_nbytes) return PQ_BAD_LENGTH;

  const std::vector<int32_t> senders = all_ranks(b, true);
  const Opened opened = open(numbers, b, kValues, senders, std::vector<int64_t>(senders.size(), nbytes), received, received_nbytes);
  if (is_callers(opened.flags)) return opened.flags;
  // Nobody has encoded the owner's own part, so nobody has seen whether it is finite.
  auto own_is_finite = [&] { return numbers.all_finite(source, first, count, mean); };
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
        numbers.reduce(*codec, b.size, payloads.data(), nbytes, keys.data(), weight, source, first, count, nullptr, mean);
    if (is_callers(status)) return status;
    if (status < 0) {
      flags |= malformed(status);
    } else {
      status = numbers.encode_array(*second_codec, mean, residual, next_residual, count,
                                    keys_of(b, b.rank, shard_tensor(b, b.rank), kMeans), message + PQ_HEADER_NBYTES, mean_nbytes);
      if (status < 0) return status;
      if (status == PQ_NONFINITE) flags |= own_is_finite() ? PQ_MEAN_OVERFLOW : PQ_SENDER_NONFINITE;
    }
  }
  // Whatever has happened, phase two takes place: the others wait for it, and learn from its header.
  if (!write_header(numbers, b, flags & kAllFlags, kMeans, mean_nbytes, message)) return PQ_DEVICE_ERROR;
  return flags | opened.flags;
}

// Puts numbers as they are where second phase messages have the owner's mean.
template <class Numbers>
int32_t two_phase_relay(const Numbers& numbers, const pq_bucket* bucket, int32_t flags, const float* mean, int64_t count, uint8_t* message,
                        int64_t message_nbytes) {
  if (!good_bucket(bucket) || count < 0 || (count && !mean) || !message) return PQ_BAD_ARGUMENT;
  const int64_t nbytes = count * (int64_t)sizeof(float);
  if (message_nbytes != PQ_HEADER_NBYTES + nbytes) return PQ_BAD_LENGTH;
  const int32_t worst = flags & PQ_DESYNCHRONIZED ? PQ_DESYNCHRONIZED : flags & PQ_MALFORMED ? PQ_MALFORMED : PQ_SENDER_NONFINITE;
  const bool done =
      numbers.put(message + PQ_HEADER_NBYTES, mean, nbytes) && write_header(numbers, *bucket, flags ? worst : 0, kMeans, nbytes, message);
  return done ? PQ_OK : PQ_DEVICE_ERROR;
}

template <class Numbers>
int32_t two_phase_land(const Numbers& numbers, const pq_codec* second_codec, const pq_bucket* bucket, const int64_t* shards, const uint8_t* received,
                          int64_t received_nbytes, const float* base, float* mean) {
  if (!good_bucket(bucket) || !good_shards(*bucket, shards) || received_nbytes < 0 || (received_nbytes && !received))
    return PQ_BAD_ARGUMENT;
  const pq_bucket& b = *bucket;
  std::vector<int64_t> nbytes;
  for (int32_t owner = 0; owner < b.size; ++owner) {
    nbytes.push_back(payload_nbytes(second_codec, shards[owner + 1] - shards[owner]));
    if (nbytes.back() < 0) return PQ_BAD_ARGUMENT;
  }
  if (b.num_elements && !mean) return PQ_BAD_ARGUMENT;
  const Opened opened = open(numbers, b, kMeans, all_ranks(b, false), nbytes, received, received_nbytes);
  if (is_callers(opened.flags)) return opened.flags;
  int32_t verdict = opened.flags;
  for (int32_t owner = 0; owner < b.size && !verdict; ++owner) {
    const int64_t at = shards[owner], count = shards[owner + 1] - at;
    const pq_keys keys = keys_of(b, owner, shard_tensor(b, owner), kMeans);
    const int32_t status = numbers.reduce(*second_codec, 1, &opened.payloads[(size_t)owner], nbytes[(size_t)owner], &keys, 1.0f, nullptr, 0,
                                     count, base ? base + at : nullptr, mean + at);
    if (is_callers(status)) return status;
    if (status < 0) verdict = malformed(status);
  }
  if (verdict) numbers.fill_nan(mean, b.num_elements);
  return verdict;
}

}  // namespace pqasgd
