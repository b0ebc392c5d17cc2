// The two halves of an exchange, and what a node's owner tells others.
#include "messages.h"

namespace pqasgd_tensorflow {
namespace {

REGISTER_OP("PqasgdPack")
    .Input("step: int64")
    .Input("round: int64")
    .Input("known: num_known * int32")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Input("residuals: num_residuals * resource")
    .Output("messages: uint8")
    .Output("flags: int32")
    .PQ_BUCKET_ATTRS.PQ_SOURCE_ATTRS.Attr("num_residuals: int >= 0")
    .Attr("num_known: int >= 0")
    .SetIsStateful()
    .SetShapeFn(bytes_and_flags);

template <class Where>
class PackOp : public BucketOp {
 public:
  explicit PackOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("start", &start_));
    OP_REQUIRES_OK(context, context->GetAttr("anchor_offset", &anchor_offset_));
    OP_REQUIRES_OK(context, context->GetAttr("num_residuals", &num_residuals_));
    if (two_phase()) {
      for (int32_t owner = 0; owner < bucket_.size; ++owner)
        if (owner != bucket_.rank) nbytes_ += PQ_HEADER_NBYTES + pq_payload_nbytes(&codec_, shard_elements(owner));
    } else {
      nbytes_ = PQ_HEADER_NBYTES + pq_payload_nbytes(&codec_, bucket_.num_elements);
    }
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    Source source;
    Tensor *messages = nullptr, *flags = nullptr;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, source_from(context, anchor_offset_, &source));
    Residuals residuals;
    OP_REQUIRES_OK(context, residuals.open(context, context->num_inputs() - num_residuals_, num_residuals_, anchor_offset_,
                                           start_ + bucket.num_elements));
    source.feed_back(residuals.kept(), residuals.next());
    OpInputList known;
    OP_REQUIRES_OK(context, context->input_list("known", &known));
    for (const Tensor& flags_known : known) bucket.flags |= flags_known.flat<int32>()(0) & kHeaderFlags;
    OP_REQUIRES_OK(context, context->allocate_output("messages", {nbytes_}, &messages));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    uint8_t* out = messages->flat<uint8>().data();
    const int32_t status = two_phase()
                               ? where.two_phase_pack(&codec_, &bucket, shards_.data(), source.get(), start_, out, nbytes_)
                               : where.allgather_pack(&codec_, &bucket, source.get(), start_, out, nbytes_);
    OP_REQUIRES_OK(context, check(status, "encode"));
    flags->scalar<int32>()() = status;
  }

 private:
  int64_t start_ = 0, anchor_offset_ = 0, nbytes_ = 0;
  int num_residuals_ = 0;
};
PQ_REGISTER("PqasgdPack", PackOp,
           .HostMemory("step").HostMemory("round").HostMemory("known").HostMemory("residuals").HostMemory("messages")
              .HostMemory("flags"));

REGISTER_OP("PqasgdMean")
    .Input("step: int64")
    .Input("round: int64")
    .Input("flags: int32")
    .Input("received: uint8")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Input("residuals: num_residuals * resource")
    .Input("mean_residuals: num_mean_residuals * resource")
    .Output("message: uint8")
    .Output("new_flags: int32")
    .Output("mean: float")
    .PQ_BUCKET_ATTRS.PQ_SOURCE_ATTRS.Attr("num_residuals: int >= 0")
    .Attr("num_mean_residuals: int >= 0")
    .Attr("offset: int")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(2, c->Vector(InferenceContext::kUnknownDim));
      return bytes_and_flags(c);
    });

template <class Where>
class MeanOp : public BucketOp {
 public:
  explicit MeanOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("start", &start_));
    OP_REQUIRES_OK(context, context->GetAttr("anchor_offset", &anchor_offset_));
    OP_REQUIRES_OK(context, context->GetAttr("num_residuals", &num_residuals_));
    OP_REQUIRES_OK(context, context->GetAttr("num_mean_residuals", &num_mean_residuals_));
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES(context, two_phase(), InvalidArgument("shards is empty; a two-phase exchange has some"));
    count_ = shard_elements(bucket_.rank);
    nbytes_ = PQ_HEADER_NBYTES + pq_payload_nbytes(&second_codec_, count_);
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    Source source;
    Tensor *message = nullptr, *new_flags = nullptr, *mean = nullptr;
    const Tensor *flags, *received;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, source_from(context, anchor_offset_, &source));
    Residuals residuals, of_means;
    const int of_means_from = context->num_inputs() - num_mean_residuals_;
    OP_REQUIRES_OK(context, residuals.open(context, of_means_from - num_residuals_, num_residuals_, anchor_offset_,
                                           start_ + bucket.num_elements));
    OP_REQUIRES_OK(context, of_means.open(context, of_means_from, num_mean_residuals_, offset_ + shards_[(size_t)bucket.rank], count_));
    source.feed_back(residuals.kept(), residuals.next());
    OP_REQUIRES_OK(context, context->input("flags", &flags));
    OP_REQUIRES_OK(context, context->input("received", &received));
    OP_REQUIRES_OK(context, context->allocate_output("message", {nbytes_}, &message));
    OP_REQUIRES_OK(context, context->allocate_output("new_flags", {}, &new_flags));
    OP_REQUIRES_OK(context, context->allocate_output("mean", {count_}, &mean));
    const int32_t status = where.two_phase_mean(
        &codec_, &second_codec_, &bucket, shards_.data(), flags->flat<int32>()(0), received->flat<uint8>().data(),
        received->NumElements(), source.get(), start_, of_means.kept(), of_means.next(), mean->flat<float>().data(),
        message->flat<uint8>().data(), nbytes_);
    OP_REQUIRES_OK(context, check(status, "mean"));
    new_flags->scalar<int32>()() = status;
  }

 private:
  int64_t start_ = 0, anchor_offset_ = 0, offset_ = 0, count_ = 0, nbytes_ = 0;
  int num_residuals_ = 0, num_mean_residuals_ = 0;
};
PQ_REGISTER("PqasgdMean", MeanOp,
           .HostMemory("step").HostMemory("round").HostMemory("flags").HostMemory("received").HostMemory("residuals")
              .HostMemory("mean_residuals").HostMemory("message").HostMemory("new_flags"));

// Writes base + scale * mean, or scale * mean, to a part of `arriving`, which nothing but these ops ever reads or writes.
REGISTER_OP("PqasgdLand")
    .Input("step: int64")
    .Input("round: int64")
    .Input("received: uint8")
    .Input("scale: float")
    .Input("bases: base_dtypes")
    .Input("arriving: resource")
    .Output("flags: int32")
    .PQ_BUCKET_ATTRS.Attr("base_dtypes: list({float}) >= 0")
    .Attr("offset: int")
    .Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::ScalarShape);

template <class Where>
class LandOp : public BucketOp {
 public:
  explicit LandOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    OpInputList bases;
    const Tensor* received;
    Tensor* flags = nullptr;
    core::RefCountPtr<Var> arriving;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, context->input("received", &received));
    OP_REQUIRES_OK(context, context->input_list("bases", &bases));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, context->num_inputs() - 1), &arriving));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    float scale = 1;
    OP_REQUIRES_OK(context, scalar_from(context, "scale", &scale));
    const int64_t end = offset_ + bucket.num_elements;
    const uint8_t* bytes = received->flat<uint8>().data();
    int32_t status = 0;
    {
      tf_shared_lock lock(*arriving->mu());  // buckets land beside each other
      Tensor* destination = arriving->tensor();
      OP_REQUIRES(context,
                  destination->dtype() == DT_FLOAT && destination->NumElements() >= end &&
                      (bases.size() == 0 || bases[0].NumElements() >= end),
                  InvalidArgument("arriving and base must have at least ", end, " float32 elements"));
      float* mean = floats_of(*destination) + offset_;
      const float* base = bases.size() ? bases[0].flat<float>().data() + offset_ : nullptr;
      const float* added = scale == 1 ? base : nullptr;
      status = two_phase() ? where.two_phase_land(&second_codec_, &bucket, shards_.data(), bytes, received->NumElements(), added, mean)
                           : where.allgather_land(&codec_, &bucket, bytes, received->NumElements(), added, mean);
      if (status == 0 && scale != 1) status = where.scale(scale, base, bucket.num_elements, mean);
    }
    OP_REQUIRES_OK(context, check(status, "decode"));
    if (status) OP_REQUIRES_OK(context, explain(explainer_, status, bytes, received->NumElements()));
    flags->scalar<int32>()() = status;
  }

 private:
  int64_t offset_ = 0, explainer_ = 0;
};
PQ_REGISTER("PqasgdLand", LandOp,
           .HostMemory("step").HostMemory("round").HostMemory("received").HostMemory("scale").HostMemory("arriving")
              .HostMemory("flags"));

// The message of an owner that has taken its node's mean to other nodes; `flags` and a part of `arriving` are what came of it.
REGISTER_OP("PqasgdRelay")
    .Input("step: int64")
    .Input("round: int64")
    .Input("flags: int32")
    .Input("arriving: resource")
    .Output("message: uint8")
    .PQ_BUCKET_ATTRS.Attr("offset: int")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

template <class Where>
class RelayOp : public BucketOp {
 public:
  explicit RelayOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    const Tensor* flags;
    Tensor* message = nullptr;
    core::RefCountPtr<Var> arriving;
    const int64_t count = bucket_.num_elements, nbytes = PQ_HEADER_NBYTES + count * (int64_t)sizeof(float);
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, context->input("flags", &flags));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, context->num_inputs() - 1), &arriving));
    OP_REQUIRES_OK(context, context->allocate_output("message", {nbytes}, &message));
    tf_shared_lock lock(*arriving->mu());
    const Tensor* mean = arriving->tensor();
    OP_REQUIRES(context, mean->dtype() == DT_FLOAT && mean->NumElements() >= offset_ + count,
                InvalidArgument("arriving must have at least ", offset_ + count, " float32 elements"));
    OP_REQUIRES_OK(context, check(where.two_phase_relay(&bucket, flags->flat<int32>()(0), floats_of(*mean) + offset_, count,
                                                        message->flat<uint8>().data(), nbytes),
                                  "relay"));
  }

 private:
  int64_t offset_ = 0;
};
PQ_REGISTER("PqasgdRelay", RelayOp,
           .HostMemory("step").HostMemory("round").HostMemory("flags").HostMemory("arriving").HostMemory("message"));

}  // namespace
}  // namespace pqasgd_tensorflow
