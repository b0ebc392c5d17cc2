// Rows of a table; see exchange/rows.py.
#include "messages.h"

namespace pqasgd_tensorflow {
namespace {

class RowsOp : public MessageOp {
 public:
  explicit RowsOp(OpKernelConstruction* context) : MessageOp(context, "table") {
    OP_REQUIRES_OK(context, context->GetAttr("num_rows", &table_.num_rows));
    OP_REQUIRES_OK(context, context->GetAttr("row_size", &table_.row_size));
  }

 protected:
  pq_table table_{};
};

#define PQ_ROWS_ATTRS                                                                                                    \
  Attr("codec: list(int)").Attr("table: int").Attr("num_rows: int").Attr("row_size: int").Attr("rank: int").Attr("size: int") \
      .Attr("digest: int").Attr("seed: int")

// `kept` is what was not sent of these rows before, or empty; then nothing is left either.
REGISTER_OP("PqasgdPackRows")
    .Input("step: int64")
    .Input("round: int64")
    .Input("rows: int64")
    .Input("values: dtype")
    .Input("kept: float")
    .Output("message: uint8")
    .Output("left: float")
    .PQ_ROWS_ATTRS.Attr("dtype: {float, double, half, bfloat16}")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      c->set_output(1, c->input(4));
      return OkStatus();
    });

class PackRowsOp : public RowsOp {
 public:
  using RowsOp::RowsOp;
  void Compute(OpKernelContext* context) override {
    pq_bucket bucket;
    Source source;
    const Tensor *rows, *values, *kept;
    Tensor *message = nullptr, *left = nullptr;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, context->input("rows", &rows));
    OP_REQUIRES_OK(context, context->input("values", &values));
    OP_REQUIRES_OK(context, context->input("kept", &kept));
    const int64_t count = rows->NumElements();
    bucket.num_elements = count * table_.row_size;
    OP_REQUIRES(context,
                values->NumElements() == bucket.num_elements && (kept->NumElements() == 0 || kept->NumElements() == bucket.num_elements),
                InvalidArgument("values have ", values->NumElements(), " elements; ", count, " rows have ", bucket.num_elements));
    OP_REQUIRES_OK(context, source.add(*values));
    OP_REQUIRES_OK(context, context->allocate_output("left", kept->shape(), &left));
    if (kept->NumElements()) source.feed_back(kept->flat<float>().data(), left->flat<float>().data());
    const int64_t nbytes = pq_rows_nbytes(&codec_, &table_, count);
    OP_REQUIRES_OK(context, check(nbytes < 0 ? PQ_BAD_ARGUMENT : PQ_OK, "rows"));
    OP_REQUIRES_OK(context, context->allocate_output("message", {PQ_HEADER_NBYTES + nbytes}, &message));
    OP_REQUIRES_OK(context, check(pq_rows_pack(&codec_, &bucket, &table_, count, rows->flat<int64_t>().data(), source.get(),
                                               message->flat<uint8>().data(), PQ_HEADER_NBYTES + nbytes),
                                  "encode"));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdPackRows").Device(DEVICE_CPU), PackRowsOp);

REGISTER_OP("PqasgdLandRows")
    .Input("step: int64")
    .Input("round: int64")
    .Input("received: uint8")
    .Input("scale: float")
    .Output("rows: int64")
    .Output("values: float")
    .Output("flags: int32")
    .PQ_ROWS_ATTRS.Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      int64_t row_size = 0;
      TF_RETURN_IF_ERROR(c->GetAttr("row_size", &row_size));
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      c->set_output(1, c->Matrix(InferenceContext::kUnknownDim, row_size));
      c->set_output(2, c->Scalar());
      return OkStatus();
    });

class LandRowsOp : public RowsOp {
 public:
  explicit LandRowsOp(OpKernelConstruction* context) : RowsOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }
  void Compute(OpKernelContext* context) override {
    pq_bucket bucket;
    const Tensor* received;
    Tensor *rows = nullptr, *values = nullptr, *flags = nullptr;
    float scale = 1;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, scalar_from(context, "scale", &scale));
    OP_REQUIRES_OK(context, context->input("received", &received));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    const uint8_t* bytes = received->flat<uint8>().data();
    const int64_t nbytes = received->NumElements();
    int64_t total = 0, count = 0;
    std::vector<int64_t> all;
    int32_t status = pq_rows_total(&codec_, &bucket, &table_, bytes, nbytes, &total);
    if (!status) {
      all.resize((size_t)total);
      status = pq_rows_union(&codec_, &bucket, &table_, bytes, nbytes, all.data(), &count);
    }
    OP_REQUIRES_OK(context, check(status, "rows"));
    OP_REQUIRES_OK(context, context->allocate_output("rows", {count}, &rows));
    OP_REQUIRES_OK(context, context->allocate_output("values", {count, table_.row_size}, &values));
    if (!status) {
      std::copy(all.begin(), all.begin() + count, rows->flat<int64_t>().data());
      status = pq_rows_land(&codec_, &bucket, &table_, bytes, nbytes, count, all.data(), values->flat<float>().data());
      OP_REQUIRES_OK(context, check(status, "rows"));
      if (status == 0 && scale != 1) scale_mean(scale, nullptr, values->NumElements(), values->flat<float>().data());
    }
    if (status) OP_REQUIRES_OK(context, explain(explainer_, status, bytes, nbytes));
    flags->scalar<int32>()() = status;
  }

 private:
  int64_t explainer_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdLandRows").Device(DEVICE_CPU), LandRowsOp);

}  // namespace
}  // namespace pqasgd_tensorflow
