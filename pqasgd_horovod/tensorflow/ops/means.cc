// Where means go.
#include "targets.h"

namespace pqasgd_tensorflow {
namespace {

// After a round: of each bucket that has a mean, limits[i] to limits[i + 1] of which flags[i] is 0, the next residual is kept.
REGISTER_OP("PqasgdKeep")
    .Input("kept: resource")
    .Input("next: resource")
    .Input("flags: n * int32")
    .Attr("n: int >= 1")
    .Attr("limits: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <class Where>
class KeepOp : public NumbersOp {
 public:
  explicit KeepOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("limits", &limits_));
    OP_REQUIRES(context, (int)limits_.size() == 2 * (context->num_inputs() - 2), InvalidArgument("limits must be two for each bucket"));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> kept, next;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &kept));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &next));
    mutex_lock kept_lock(*kept->mu());
    mutex_lock next_lock(*next->mu());
    bool all = limits_.front() == 0 && limits_.back() == kept->tensor()->NumElements();
    for (size_t i = 0; 2 * i < limits_.size(); ++i)
      all &= !context->input((int)i + 2).flat<int32>()(0) && (i == 0 || limits_[2 * i] == limits_[2 * i - 1]);
    if (all) {  // as is usual: no walk over memory
      std::swap(*kept->tensor(), *next->tensor());
      Tensor* unused;
      OP_REQUIRES_OK(context, writable(context, next.get(), &unused));
      return;
    }
    OP_REQUIRES_OK(context, unshared(context, where, kept->tensor()));
    float* to = kept->tensor()->flat<float>().data();
    const float* from = next->tensor()->flat<float>().data();
    for (size_t i = 0; 2 * i < limits_.size(); ++i)
      if (!context->input((int)i + 2).flat<int32>()(0))
        OP_REQUIRES_OK(context, check(where.copy(to + limits_[2 * i], from + limits_[2 * i],
                                                 (limits_[2 * i + 1] - limits_[2 * i]) * (int64_t)sizeof(float)),
                                      "copy"));
  }

 private:
  std::vector<int64_t> limits_;
};
PQ_REGISTER("PqasgdKeep", KeepOp, .HostMemory("kept").HostMemory("next").HostMemory("flags"));

// How far `tensors`, minus an anchor if there is one, are from what has arrived in `spans`; see pq_distance.
REGISTER_OP("PqasgdDistance")
    .Input("arriving: resource")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Output("distance: double")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 1")
    .Attr("anchor_dtypes: list({float, double}) >= 0")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::ScalarShape);

template <class Where>
class DistanceOp : public NumbersOp {
 public:
  explicit DistanceOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving;
    OpInputList tensors, anchors;
    Tensor* result = nullptr;
    Source source;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    OP_REQUIRES_OK(context, context->input_list("tensors", &tensors));
    OP_REQUIRES_OK(context, context->input_list("anchors", &anchors));
    OP_REQUIRES_OK(context, context->allocate_output("distance", {}, &result));
    for (const Tensor& tensor : tensors) OP_REQUIRES_OK(context, source.add(tensor));
    if (anchors.size()) OP_REQUIRES_OK(context, source.subtract(anchors[0], 0));
    tf_shared_lock lock(*arriving->mu());
    const float* center = arriving->tensor()->flat<float>().data();
    double total = 0, part = 0;
    for (size_t i = 0; i + 1 < spans_.size(); i += 2) {
      if (spans_[i + 1] <= spans_[i]) continue;
      OP_REQUIRES(context, spans_[i + 1] <= arriving->tensor()->NumElements(), InvalidArgument("spans go beyond what arrives"));
      OP_REQUIRES_OK(context, where.distance(context, source.get(), spans_[i], spans_[i + 1] - spans_[i], center + spans_[i], &part));
      total += part;
    }
    result->scalar<double>()() = total;
  }

 private:
  std::vector<int64_t> spans_;
};
PQ_REGISTER("PqasgdDistance", DistanceOp, .HostMemory("arriving").HostMemory("distance"));

// An outer step on what has arrived in `spans`, a beginning and an end each, before it is committed; see pq_outer.
REGISTER_OP("PqasgdOuter")
    .Input("arriving: resource")
    .Input("momentum: resource")
    .Input("coefficients: float")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <class Where>
class OuterOp : public NumbersOp {
 public:
  explicit OuterOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving, momentum;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &momentum));
    const Tensor& coefficients = context->input(2);
    OP_REQUIRES(context, coefficients.NumElements() == 3, InvalidArgument("coefficients must be 3 numbers"));
    mutex_lock arriving_lock(*arriving->mu());
    mutex_lock momentum_lock(*momentum->mu());
    Tensor* own = momentum->tensor();
    OP_REQUIRES(context, own->NumElements() <= arriving->tensor()->NumElements(),
                InvalidArgument("momentum has more elements than what has arrived"));
    OP_REQUIRES_OK(context, unshared(context, where, own));
    const auto c = coefficients.flat<float>();
    for (size_t i = 0; i + 1 < spans_.size(); i += 2) {
      const int64_t begin = spans_[i], count = std::min(spans_[i + 1], own->NumElements()) - begin;
      if (count <= 0) continue;
      OP_REQUIRES_OK(context, check(where.outer(c(0), c(1), c(2), count, own->flat<float>().data() + begin,
                                             arriving->tensor()->flat<float>().data() + begin),
                                    "outer"));
    }
  }

 private:
  std::vector<int64_t> spans_;
};
PQ_REGISTER("PqasgdOuter", OuterOp, .HostMemory("arriving").HostMemory("momentum").HostMemory("coefficients"));

// What has arrived is the next anchor: the two change places; or, if it is to be added, the mean, which the anchor moves by.
// Then the variables become the anchor; without one they become the mean. With `spans`, a beginning and an end each, that is done
// for these elements only. Variables that are elsewhere are given as tensors, and get the results.
REGISTER_OP("PqasgdCommit")
    .Input("arriving: resource")
    .Input("anchors: num_anchors * resource")
    .Input("variables: n * resource")
    .Input("tensors: dtypes")
    .Output("results: dtypes")
    .Attr("num_anchors: int >= 0")
    .Attr("n: int >= 0")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 0")
    .Attr("add: bool")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(results_like_tensors);

template <class Where>
class CommitOp : public TargetsOp {
 public:
  explicit CommitOp(OpKernelConstruction* context) : TargetsOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("num_anchors", &num_anchors_));
    OP_REQUIRES_OK(context, context->GetAttr("add", &add_));
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving, anchor;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    mutex_lock arriving_lock(*arriving->mu());
    if (num_anchors_ == 0) {
      OP_REQUIRES_OK(context, write(context, where, *arriving->tensor(), nullptr));
      return;
    }
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &anchor));
    mutex_lock anchor_lock(*anchor->mu());
    Tensor* old = anchor->tensor();
    if (!add_) {
      OP_REQUIRES(context, old->dtype() == DT_FLOAT && old->shape() == arriving->tensor()->shape(), InvalidArgument("anchor and arriving differ in shape"));
      if (!spans_.empty()) {
        OP_REQUIRES_OK(context, unshared(context, where, old));
        const float* from = arriving->tensor()->flat<float>().data();
        float* to = old->flat<float>().data();
        OP_REQUIRES_OK(context, for_spans(0, old->NumElements(), [&](int64_t begin, int64_t n) {
                         return check(where.copy(to + begin, from + begin, n * (int64_t)sizeof(float)), "copy");
                       }));
        OP_REQUIRES_OK(context, write(context, where, *old, nullptr));
        return;
      }
      std::swap(*old, *arriving->tensor());
      Tensor* unused;
      OP_REQUIRES_OK(context, writable(context, arriving.get(), &unused));
      OP_REQUIRES_OK(context, write(context, where, *anchor->tensor(), nullptr));
      return;
    }
    OP_REQUIRES_OK(context, unshared(context, where, old));
    if (num_variables_ || context->num_outputs()) {
      OP_REQUIRES_OK(context, write(context, where, *arriving->tensor(), old));
      return;
    }
    const float* mean = arriving->tensor()->flat<float>().data();
    OP_REQUIRES(context, old->NumElements() <= arriving->tensor()->NumElements(), InvalidArgument("anchor and arriving differ in shape"));
    OP_REQUIRES_OK(context, for_spans(0, old->NumElements(), [&](int64_t begin, int64_t n) { return where.move(mean, begin, n, *old); }));
  }

 private:
  // Targets = mean, or with an anchor: anchor += mean, targets = anchor.
  Status write(OpKernelContext* context, const Where& where, const Tensor& mean, Tensor* anchor) const {
    if (!num_variables_ && !context->num_outputs()) return OkStatus();
    const float* means = mean.flat<float>().data();
    int64_t total = 0;
    const auto put = [&](const Tensor& tensor, int64_t at, int64_t count) {
      Source target;
      TF_RETURN_IF_ERROR(target.add(tensor));
      if (anchor) TF_RETURN_IF_ERROR(target.subtract(*anchor, at));
      if (at + count > mean.NumElements()) return InvalidArgument("more variables than means");
      total = at + count;
      return for_spans(at, count, [&](int64_t begin, int64_t n) {
        return check(where.apply(means + begin, begin - at, n, target.get()), "apply");
      });
    };
    TF_RETURN_IF_ERROR(for_targets(context, where, 1 + num_anchors_, spans_.empty(), put));
    return total == mean.NumElements() ? OkStatus() : InvalidArgument("fewer variables than means");
  }

  int num_anchors_ = 0;
  bool add_ = false;
};
PQ_REGISTER("PqasgdCommit", CommitOp, .HostMemory("arriving").HostMemory("anchors").HostMemory("variables"));

// The means as tensors like `tensors`, in their memory where nobody else needs them; times `factor`.
REGISTER_OP("PqasgdScatter")
    .Input("arriving: resource")
    .Input("tensors: dtypes")
    .Output("means: dtypes")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 1")
    .Attr("factor: float = 1.0")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->input(i + 1));
      return OkStatus();
    });

template <class Where>
class ScatterOp : public NumbersOp {
 public:
  explicit ScatterOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("factor", &factor_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    mutex_lock lock(*arriving->mu());
    Tensor* means = arriving->tensor();
    Source target;
    for (int i = 0; i < context->num_outputs(); ++i) {
      Tensor* output = nullptr;
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({i + 1}, i, context->input(i + 1).shape(), &output));
      OP_REQUIRES_OK(context, target.add(*output));
    }
    OP_REQUIRES(context, target.offsets.back() == means->NumElements(), InvalidArgument("tensors and means differ in size"));
    float* mean = means->flat<float>().data();
    if (factor_ != 1.0f) OP_REQUIRES_OK(context, check(where.scale(factor_, (const float*)nullptr, means->NumElements(), mean), "scale"));
    OP_REQUIRES_OK(context, check(where.apply(mean, 0, means->NumElements(), target.get()), "apply"));
  }

 private:
  float factor_ = 1;
};
PQ_REGISTER("PqasgdScatter", ScatterOp, .HostMemory("arriving"));

}  // namespace
}  // namespace pqasgd_tensorflow
