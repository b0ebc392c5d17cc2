// What all ranks have to say alike.
#include "numbers.h"

namespace pqasgd_tensorflow {
namespace {

REGISTER_OP("PqasgdVerdict")
    .Input("flags: n * int32")
    .Attr("n: int >= 0")
    .Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

class VerdictOp : public OpKernel {
 public:
  explicit VerdictOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }
  void Compute(OpKernelContext* context) override {
    OpInputList list;
    OP_REQUIRES_OK(context, context->input_list("flags", &list));
    int32_t all = 0;
    for (const Tensor& flags : list) all |= flags.flat<int32>()(0);
    if (all) OP_REQUIRES_OK(context, explain(explainer_, all, nullptr, 0));
  }

 private:
  int64_t explainer_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdVerdict").Device(DEVICE_CPU), VerdictOp);

// Raises unless the records that all ranks have sent are this rank's own, again and again.
REGISTER_OP("PqasgdAgree")
    .Input("own: int64")
    .Input("gathered: int64")
    .Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

class AgreeOp : public OpKernel {
 public:
  explicit AgreeOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }
  void Compute(OpKernelContext* context) override {
    const absl::string_view own = context->input(0).tensor_data(), all = context->input(1).tensor_data();
    bool same = !own.empty() && all.size() % own.size() == 0;
    for (size_t at = 0; same && at < all.size(); at += own.size()) same = !std::memcmp(own.data(), all.data() + at, own.size());
    if (!same) OP_REQUIRES_OK(context, explain(explainer_, 1, (const uint8_t*)all.data(), (int64_t)all.size()));
  }

 private:
  int64_t explainer_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdAgree").Device(DEVICE_CPU), AgreeOp);

// A 64-bit checksum of the bytes of each tensor: replicas that differ are to be found, not attackers.
REGISTER_OP("PqasgdDigest")
    .Input("tensors: dtypes")
    .Output("digests: int64")
    .Attr("dtypes: list(type) >= 1")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(c->num_inputs()));
      return OkStatus();
    });

class DigestOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    Tensor* digests = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {context->num_inputs()}, &digests));
    for (int i = 0; i < context->num_inputs(); ++i) {
      const absl::string_view bytes = context->input(i).tensor_data();
      uint64_t lanes[4] = {1, 2, 3, 4};
      size_t at = 0;
      for (; at + 32 <= bytes.size(); at += 32)
        for (int lane = 0; lane < 4; ++lane) lanes[lane] = mix(lanes[lane], bytes.data() + at + 8 * lane, 8);
      for (; at < bytes.size(); at += 8) lanes[0] = mix(lanes[0], bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
      uint64_t all = bytes.size();
      for (uint64_t lane : lanes) all = mix(all, (const char*)&lane, 8);
      digests->flat<int64_t>()(i) = (int64_t)all;
    }
  }

 private:
  static uint64_t mix(uint64_t hash, const char* bytes, size_t n) {
    uint64_t x = 0;
    std::memcpy(&x, bytes, n);
    hash = (hash ^ x) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdDigest").Device(DEVICE_CPU), DigestOp);

}  // namespace
}  // namespace pqasgd_tensorflow
