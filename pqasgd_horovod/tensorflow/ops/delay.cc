// An average that goes on beside the next steps; python.cc lets a graph wait for it.
#include "targets.h"

namespace pqasgd_tensorflow {
namespace {

// snapshot[spans] = tensors, as one flat vector.
REGISTER_OP("PqasgdSnapshot")
    .Input("snapshot: resource")
    .Input("tensors: dtypes")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 1")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <class Where>
class SnapshotOp : public NumbersOp {
 public:
  explicit SnapshotOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> snapshot;
    OpInputList tensors;
    Source source;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &snapshot));
    OP_REQUIRES_OK(context, context->input_list("tensors", &tensors));
    for (const Tensor& tensor : tensors) OP_REQUIRES_OK(context, source.add(tensor));
    mutex_lock lock(*snapshot->mu());
    Tensor* to = snapshot->tensor();
    OP_REQUIRES_OK(context, unshared(context, where, to));
    int32_t dtype = 0;
    OP_REQUIRES_OK(context, dtype_from(to->dtype(), &dtype));
    for (size_t i = 0; i + 1 < spans_.size(); i += 2) {
      OP_REQUIRES(context, spans_[i + 1] <= to->NumElements(), InvalidArgument("spans go beyond the snapshot"));
      char* at = (char*)data_of(*to) + spans_[i] * DataTypeSize(to->dtype());
      OP_REQUIRES_OK(context, check(where.gather(source.get(), spans_[i], spans_[i + 1] - spans_[i], at, dtype), "snapshot"));
    }
  }

 private:
  std::vector<int64_t> spans_;
};
PQ_REGISTER("PqasgdSnapshot", SnapshotOp, .HostMemory("snapshot"));

// In spans: variables = anchor + (variables - snapshot); what follows the parameters, buffers, becomes the anchor.
// Variables that are elsewhere are given as tensors, and get the results.
REGISTER_OP("PqasgdRebase")
    .Input("anchor: resource")
    .Input("snapshot: resource")
    .Input("variables: n * resource")
    .Input("tensors: dtypes")
    .Output("results: dtypes")
    .Attr("n: int >= 0")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 0")
    .Attr("num_parameters: int")
    .Attr("spans: list(int) >= 2")
    .SetIsStateful()
    .SetShapeFn(results_like_tensors);

template <class Where>
class RebaseOp : public TargetsOp {
 public:
  explicit RebaseOp(OpKernelConstruction* context) : TargetsOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("num_parameters", &num_parameters_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> anchor, snapshot;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &anchor));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &snapshot));
    tf_shared_lock anchor_lock(*anchor->mu());
    mutex_lock snapshot_lock(*snapshot->mu());
    const Tensor& base = *anchor->tensor();
    Tensor* before = snapshot->tensor();
    OP_REQUIRES_OK(context, unshared(context, where, before));
    OP_REQUIRES(context, base.dtype() == before->dtype() && base.shape() == before->shape(),
                InvalidArgument("anchor and snapshot differ in type or shape"));
    const int64_t width = DataTypeSize(base.dtype());
    int32_t dtype = 0;
    OP_REQUIRES_OK(context, dtype_from(base.dtype(), &dtype));
    OP_REQUIRES_OK(context, for_targets(context, where, 2, false, [&](const Tensor& tensor, int64_t at, int64_t count) {
      if (at + count > base.NumElements()) return InvalidArgument("more variables than anchors");
      Source target;
      TF_RETURN_IF_ERROR(target.add(tensor));
      return for_spans(at, count, [&](int64_t begin, int64_t n) {
        if (at >= num_parameters_) {
          target.source.anchor = nullptr;
          TF_RETURN_IF_ERROR(check(where.gather(target.get(), begin - at, n, (char*)data_of(*before) + begin * width, dtype), "rebase"));
        }
        TF_RETURN_IF_ERROR(target.subtract(*before, at));
        return check(where.rebase((const char*)data_of(base) + begin * width, begin - at, n, target.get()), "rebase");
      });
    }));
  }

 private:
  int64_t num_parameters_ = 0;
};
PQ_REGISTER("PqasgdRebase", RebaseOp, .HostMemory("anchor").HostMemory("snapshot").HostMemory("variables"));

}  // namespace
}  // namespace pqasgd_tensorflow
