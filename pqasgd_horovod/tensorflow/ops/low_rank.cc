// Low rank: between the exchanges of the two factors; see exchange/low_rank.py.
#include "messages.h"

namespace pqasgd_tensorflow {
namespace {

class LowRankOp : public OpKernel {
 public:
  explicit LowRankOp(OpKernelConstruction* context) : OpKernel(context) {
    std::vector<int64_t> shapes;
    int64_t rank = 0;
    OP_REQUIRES_OK(context, context->GetAttr("matrices", &shapes));
    OP_REQUIRES_OK(context, context->GetAttr("approximation_rank", &rank));
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES_OK(context, context->GetAttr("left_offset", &left_offset_));
    OP_REQUIRES_OK(context, context->GetAttr("right_offset", &right_offset_));
    OP_REQUIRES(context, shapes.size() % 2 == 0, InvalidArgument("matrices has ", shapes.size(), " numbers; it must have pairs"));
    OP_REQUIRES(context, rank >= 1 && rank <= PQ_MAX_APPROXIMATION_RANK, InvalidArgument("approximation_rank is ", rank));
    rank_ = (int32_t)rank;
    for (size_t i = 0; i < shapes.size(); i += 2) {
      matrices_.push_back({shapes[i], shapes[i + 1]});
      rows_.push_back(shapes[i]);
      cols_.push_back(shapes[i + 1]);
      elements_ += shapes[i] * shapes[i + 1];
      left_elements_ += rank * shapes[i];
      right_elements_ += rank * shapes[i + 1];
    }
    count_ = (int64_t)matrices_.size();
  }

 protected:
  std::vector<pq_matrix> matrices_;
  std::vector<int64_t> rows_, cols_;
  int32_t rank_ = 0;
  int64_t count_ = 0, elements_ = 0, left_elements_ = 0, right_elements_ = 0;
  int64_t offset_ = 0, left_offset_ = 0, right_offset_ = 0;  // of the bucket in vector, left factors and right factors
};

#define PQ_LOW_RANK_ATTRS \
  Attr("matrices: list(int)").Attr("approximation_rank: int").Attr("offset: int").Attr("left_offset: int").Attr("right_offset: int")

REGISTER_OP("PqasgdProject")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Input("starts: resource")
    .Input("residuals: num_residuals * resource")
    .Output("own_left: float")
    .PQ_LOW_RANK_ATTRS.PQ_SOURCE_ATTRS.Attr("num_residuals: int >= 2")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

class ProjectOp : public LowRankOp {
 public:
  explicit ProjectOp(OpKernelConstruction* context) : LowRankOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("start", &start_));
    OP_REQUIRES_OK(context, context->GetAttr("anchor_offset", &anchor_offset_));
  }
  void Compute(OpKernelContext* context) override {
    Source source;
    Residuals residuals;
    Part starts;
    Tensor* own_left = nullptr;
    OP_REQUIRES_OK(context, source_from(context, anchor_offset_, &source));
    const int first = context->num_inputs() - 2;
    OP_REQUIRES_OK(context, residuals.open(context, first, 2, anchor_offset_, start_ + elements_));
    OP_REQUIRES_OK(context, starts.open(context, first - 1, right_offset_, right_elements_, "starts"));
    source.feed_back(residuals.kept(), residuals.next());
    OP_REQUIRES_OK(context, context->allocate_output(0, {left_elements_}, &own_left));
    OP_REQUIRES_OK(context, check(pq_low_rank_project(matrices_.data(), count_, rank_, source.get(), start_, starts.data(),
                                                      own_left->flat<float>().data()),
                                  "project"));
  }

 private:
  int64_t start_ = 0, anchor_offset_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdProject").Device(DEVICE_CPU), ProjectOp);

// Where the left factor's mean is wrong there is no right factor: zeros are sent, and nobody uses what arrives.
REGISTER_OP("PqasgdBackproject")
    .Input("flags: int32")
    .Input("left: resource")
    .Input("next_residual: resource")
    .Output("own_right: float")
    .PQ_LOW_RANK_ATTRS.SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

class BackprojectOp : public LowRankOp {
 public:
  using LowRankOp::LowRankOp;
  void Compute(OpKernelContext* context) override {
    Part left, matrices;
    Tensor* own_right = nullptr;
    OP_REQUIRES_OK(context, left.open(context, 1, left_offset_, left_elements_, "left"));
    OP_REQUIRES_OK(context, matrices.open(context, 2, offset_, elements_, "next_residual"));
    OP_REQUIRES_OK(context, context->allocate_output(0, {right_elements_}, &own_right));
    float* right = own_right->flat<float>().data();
    if (context->input(0).flat<int32>()(0)) {
      std::fill(right, right + right_elements_, 0.0f);
      return;
    }
    OP_REQUIRES_OK(context, check(pq_orthogonalize(rows_.data(), count_, rank_, left.data()), "orthogonalize"));
    OP_REQUIRES_OK(context, check(pq_low_rank_backproject(matrices_.data(), count_, rank_, matrices.data(), left.data(), right),
                                  "backproject"));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdBackproject").Device(DEVICE_CPU), BackprojectOp);

REGISTER_OP("PqasgdReconstruct")
    .Input("step: int64")
    .Input("scale: float")
    .Input("left_flags: int32")
    .Input("right_flags: int32")
    .Input("own_right: float")
    .Input("bases: base_dtypes")
    .Input("left: resource")
    .Input("right: resource")
    .Input("arriving: resource")
    .Input("next_residual: resource")
    .Input("next_starts: resource")
    .Output("flags: int32")
    .PQ_LOW_RANK_ATTRS.Attr("base_dtypes: list({float}) >= 0")
    .Attr("seed: int")
    .Attr("first: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::ScalarShape);

class ReconstructOp : public LowRankOp {
 public:
  explicit ReconstructOp(OpKernelConstruction* context) : LowRankOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("seed", &seed_));
    OP_REQUIRES_OK(context, context->GetAttr("first", &first_));
  }
  void Compute(OpKernelContext* context) override {
    Part left, right, arriving, rest, next;
    OpInputList bases;
    const Tensor* own_right = nullptr;
    Tensor* flags = nullptr;
    int64_t step = 0;
    int32_t of_left = 0, of_right = 0;
    float scale = 1;
    OP_REQUIRES_OK(context, scalar_from(context, "step", &step));
    OP_REQUIRES_OK(context, scalar_from(context, "scale", &scale));
    OP_REQUIRES_OK(context, scalar_from(context, "left_flags", &of_left));
    OP_REQUIRES_OK(context, scalar_from(context, "right_flags", &of_right));
    OP_REQUIRES_OK(context, context->input("own_right", &own_right));
    OP_REQUIRES_OK(context, context->input_list("bases", &bases));
    const int handles = context->num_inputs() - 5;
    OP_REQUIRES_OK(context, left.open(context, handles, left_offset_, left_elements_, "left"));
    OP_REQUIRES_OK(context, right.open(context, handles + 1, right_offset_, right_elements_, "right"));
    OP_REQUIRES_OK(context, arriving.open(context, handles + 2, offset_, elements_, "arriving"));
    OP_REQUIRES_OK(context, rest.open(context, handles + 3, offset_, elements_, "next_residual"));
    OP_REQUIRES_OK(context, next.open(context, handles + 4, right_offset_, right_elements_, "next_starts"));
    OP_REQUIRES(context, own_right->NumElements() == right_elements_ && (bases.size() == 0 || bases[0].NumElements() >= offset_ + elements_),
                InvalidArgument("own_right and base do not fit the matrices"));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    flags->scalar<int32>()() = of_left | of_right;
    if (of_left | of_right) {
      std::fill(arriving.data(), arriving.data() + elements_, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const float* base = bases.size() ? bases[0].flat<float>().data() + offset_ : nullptr;
    OP_REQUIRES_OK(context, check(pq_low_rank_reconstruct(matrices_.data(), count_, rank_, left.data(), own_right->flat<float>().data(),
                                                          right.data(), scale == 1 ? base : nullptr, arriving.data(), rest.data()),
                                  "reconstruct"));
    if (scale != 1) scale_mean(scale, base, elements_, arriving.data());
    std::copy(right.data(), right.data() + right_elements_, next.data());
    OP_REQUIRES_OK(context, check(pq_orthogonalize(cols_.data(), count_, rank_, next.data()), "orthogonalize"));
    OP_REQUIRES_OK(context, check(pq_low_rank_redraw(matrices_.data(), count_, rank_, (uint64_t)seed_, (uint64_t)step, (uint32_t)first_,
                                                     next.data()),
                                  "redraw"));
  }

 private:
  int64_t seed_ = 0, first_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdReconstruct").Device(DEVICE_CPU), ReconstructOp);

}  // namespace
}  // namespace pqasgd_tensorflow
