// A codec by itself.
#include "targets.h"

namespace pqasgd_tensorflow {
namespace {

Status keys_from(OpKernelContext* context, pq_keys* keys) {
  uint64 own = 0, shared = 0;
  TF_RETURN_IF_ERROR(scalar_from(context, "key", &own));
  TF_RETURN_IF_ERROR(scalar_from(context, "shared_key", &shared));
  *keys = {own, shared};
  return OkStatus();
}

REGISTER_OP("PqasgdEncode")
    .Input("values: T")
    .Input("key: uint64")
    .Input("shared_key: uint64")
    .Output("payload: uint8")
    .Attr("T: {float, double, half, bfloat16}")
    .Attr("codec: list(int)")
    .SetShapeFn([](InferenceContext* c) {
      std::vector<int64_t> spec;
      TF_RETURN_IF_ERROR(c->GetAttr("codec", &spec));
      pq_codec codec;
      TF_RETURN_IF_ERROR(codec_from(spec, &codec));
      const auto count = c->NumElements(c->input(0));
      c->set_output(0, c->ValueKnown(count) ? c->Vector(pq_payload_nbytes(&codec, c->Value(count)))
                                            : c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

class EncodeOp : public OpKernel {
 public:
  explicit EncodeOp(OpKernelConstruction* context) : OpKernel(context) {
    std::vector<int64_t> spec;
    OP_REQUIRES_OK(context, context->GetAttr("codec", &spec));
    OP_REQUIRES_OK(context, codec_from(spec, &codec_));
  }
  void Compute(OpKernelContext* context) override {
    const Tensor& values = context->input(0);
    Source source;
    pq_keys keys{};
    OP_REQUIRES_OK(context, source.add(values));
    OP_REQUIRES_OK(context, keys_from(context, &keys));
    const int64_t nbytes = pq_payload_nbytes(&codec_, values.NumElements());
    OP_REQUIRES_OK(context, check(nbytes < 0 ? PQ_BAD_ARGUMENT : PQ_OK, "encode"));
    Tensor* payload = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {nbytes}, &payload));
    const int32_t status =
        pq_encode(&codec_, source.get(), 0, values.NumElements(), keys, payload->flat<uint8>().data(), nbytes);
    OP_REQUIRES_OK(context, check(status, "encode"));
    OP_REQUIRES(context, status != PQ_NONFINITE,
                InvalidArgument("values hold NaN, Inf or a number beyond the codec's range, which it cannot encode: look for a "
                                        "diverging loss, or lower the learning rate"));
  }

 private:
  pq_codec codec_{};
};
REGISTER_KERNEL_BUILDER(Name("PqasgdEncode").Device(DEVICE_CPU), EncodeOp);

class DecodeAddBase : public OpKernel {
 public:
  explicit DecodeAddBase(OpKernelConstruction* context) : OpKernel(context) {
    std::vector<int64_t> spec;
    OP_REQUIRES_OK(context, context->GetAttr("codec", &spec));
    OP_REQUIRES_OK(context, codec_from(spec, &codec_));
  }

 protected:
  Status add(OpKernelContext* context, Tensor* destination) const {
    const Tensor& payload = context->input(1);
    pq_keys keys{};
    float weight = 0;
    TF_RETURN_IF_ERROR(keys_from(context, &keys));
    TF_RETURN_IF_ERROR(scalar_from(context, "weight", &weight));
    return check(pq_decode_add(&codec_, payload.flat<uint8>().data(), payload.NumElements(), destination->NumElements(), keys,
                               weight, destination->flat<float>().data()),
                 "decode");
  }
  pq_codec codec_{};
};

REGISTER_OP("PqasgdDecodeAdd")
    .Input("destination: float")
    .Input("payload: uint8")
    .Input("key: uint64")
    .Input("shared_key: uint64")
    .Input("weight: float")
    .Output("sum: float")
    .Attr("codec: list(int)")
    .SetShapeFn(shape_inference::UnchangedShape);

class DecodeAddOp : public DecodeAddBase {
 public:
  using DecodeAddBase::DecodeAddBase;
  void Compute(OpKernelContext* context) override {
    const Tensor& destination = context->input(0);
    Tensor* sum = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, destination.shape(), &sum));
    if (!sum->SharesBufferWith(destination)) std::memcpy(data_of(*sum), data_of(destination), destination.TotalBytes());
    OP_REQUIRES_OK(context, add(context, sum));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdDecodeAdd").Device(DEVICE_CPU), DecodeAddOp);

REGISTER_OP("PqasgdDecodeAddVariable")
    .Input("destination: resource")
    .Input("payload: uint8")
    .Input("key: uint64")
    .Input("shared_key: uint64")
    .Input("weight: float")
    .Attr("codec: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

class DecodeAddVariableOp : public DecodeAddBase {
 public:
  using DecodeAddBase::DecodeAddBase;
  void Compute(OpKernelContext* context) override {
    core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &variable));
    mutex_lock lock(*variable->mu());
    Tensor* tensor = variable->tensor();
    OP_REQUIRES(context, tensor->dtype() == DT_FLOAT, InvalidArgument("destination is not float32"));
    OP_REQUIRES_OK(context, unshared(context, Host(), tensor));
    OP_REQUIRES_OK(context, add(context, tensor));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdDecodeAddVariable").Device(DEVICE_CPU), DecodeAddVariableOp);

}  // namespace
}  // namespace pqasgd_tensorflow
