// What all messages of a rank have in common.
#ifndef PQASGD_TENSORFLOW_MESSAGES_H
#define PQASGD_TENSORFLOW_MESSAGES_H

#include "numbers.h"

namespace pqasgd_tensorflow {

// What all messages of a rank have in common; `number` is the attribute that counts what they are about.
class MessageOp : public NumbersOp {
 public:
  MessageOp(OpKernelConstruction* context, const char* number) : NumbersOp(context) {
    std::vector<int64_t> codec;
    int64_t bucket = 0, rank = 0, size = 0, digest = 0, seed = 0;
    OP_REQUIRES_OK(context, context->GetAttr("codec", &codec));
    OP_REQUIRES_OK(context, context->GetAttr(number, &bucket));
    OP_REQUIRES_OK(context, context->GetAttr("rank", &rank));
    OP_REQUIRES_OK(context, context->GetAttr("size", &size));
    OP_REQUIRES_OK(context, context->GetAttr("digest", &digest));
    OP_REQUIRES_OK(context, context->GetAttr("seed", &seed));
    OP_REQUIRES_OK(context, codec_from(codec, &codec_));
    OP_REQUIRES(context, size > 0 && rank >= 0 && rank < size, InvalidArgument("rank is ", rank, " of ", size));
    bucket_.bucket = (uint32_t)bucket;
    bucket_.rank = (int32_t)rank;
    bucket_.size = (int32_t)size;
    bucket_.digest = (uint64_t)digest;
    bucket_.seed = (uint64_t)seed;
  }

 protected:
  Status begin(OpKernelContext* context, pq_bucket* bucket) const {
    *bucket = bucket_;
    int64_t step = 0, round = 0;
    TF_RETURN_IF_ERROR(scalar_from(context, "step", &step));
    TF_RETURN_IF_ERROR(scalar_from(context, "round", &round));
    bucket->step = (uint64_t)step;
    bucket->round = (uint64_t)round;
    return OkStatus();
  }

  pq_codec codec_{};
  pq_bucket bucket_{};
};

class BucketOp : public MessageOp {
 public:
  explicit BucketOp(OpKernelConstruction* context) : MessageOp(context, "bucket") {
    std::vector<int64_t> second;
    OP_REQUIRES_OK(context, context->GetAttr("second_codec", &second));
    OP_REQUIRES_OK(context, context->GetAttr("num_elements", &bucket_.num_elements));
    OP_REQUIRES_OK(context, context->GetAttr("shards", &shards_));
    OP_REQUIRES_OK(context, codec_from(second, &second_codec_));
    OP_REQUIRES(context, shards_.empty() || (int64_t)shards_.size() == bucket_.size + 1,
                InvalidArgument("shards has ", shards_.size(), " limits; it must have ", bucket_.size + 1));
  }

 protected:
  bool two_phase() const { return !shards_.empty(); }
  int64_t shard_elements(int64_t rank) const { return shards_[(size_t)rank + 1] - shards_[(size_t)rank]; }

  pq_codec second_codec_{};
  std::vector<int64_t> shards_;
};

#define PQ_BUCKET_ATTRS                                                                                        \
  Attr("codec: list(int)").Attr("second_codec: list(int)").Attr("bucket: int").Attr("num_elements: int").Attr( \
      "rank: int").Attr("size: int").Attr("digest: int").Attr("seed: int").Attr("shards: list(int)")
#define PQ_SOURCE_ATTRS                                                                                                   \
  Attr("dtypes: list({float, double, half, bfloat16}) >= 1").Attr("anchor_dtypes: list({float, double}) >= 0").Attr("start: int") \
      .Attr("anchor_offset: int")

inline Status bytes_and_flags(InferenceContext* c) {
  c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
  c->set_output(1, c->Scalar());
  return OkStatus();
}

}  // namespace pqasgd_tensorflow

#endif
