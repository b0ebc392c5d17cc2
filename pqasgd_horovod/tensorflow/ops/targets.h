// Tensors and variables that are written.
#ifndef PQASGD_TENSORFLOW_TARGETS_H
#define PQASGD_TENSORFLOW_TARGETS_H

#include "numbers.h"

namespace pqasgd_tensorflow {

// A tensor to be overwritten in whole: the variable's own, or a new one where somebody still reads the old.
inline Status writable(OpKernelContext* context, Var* variable, Tensor** tensor) {
  *tensor = variable->tensor();
  if ((*tensor)->RefCountIsOne() || variable->copy_on_read_mode.load()) return OkStatus();
  Tensor fresh;
  TF_RETURN_IF_ERROR(context->allocate_temp((*tensor)->dtype(), (*tensor)->shape(), &fresh));
  **tensor = fresh;
  return OkStatus();
}

// A tensor to be changed in place: a copy where somebody still reads it.
template <class Where>
inline Status unshared(OpKernelContext* context, const Where& where, Tensor* tensor) {
  if (tensor->RefCountIsOne()) return OkStatus();
  Tensor copy;
  TF_RETURN_IF_ERROR(context->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
  TF_RETURN_IF_ERROR(check(where.copy(data_of(copy), data_of(*tensor), (int64_t)tensor->TotalBytes()), "copy"));
  *tensor = copy;
  return OkStatus();
}

// Somewhere a round ends: variables of the same place, which are written, or tensors of which new ones are made.
class TargetsOp : public NumbersOp {
 public:
  explicit TargetsOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("n", &num_variables_));
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }

 protected:
  // Calls act(target, at, count) for each, of `count` elements that begin at `at`. `whole`: all of them will be overwritten.
  // Variables begin at input `first`.
  template <class Where, class F>
  Status for_targets(OpKernelContext* context, const Where& where, int first, bool whole, F act) const {
    int64_t at = 0;
    for (int i = 0; i < num_variables_; ++i) {
      core::RefCountPtr<Var> variable;
      TF_RETURN_IF_ERROR(LookupResource(context, HandleFromInput(context, first + i), &variable));
      mutex_lock lock(*variable->mu());
      Tensor* tensor = variable->tensor();
      if (whole) TF_RETURN_IF_ERROR(writable(context, variable.get(), &tensor));
      else TF_RETURN_IF_ERROR(unshared(context, where, tensor));
      TF_RETURN_IF_ERROR(act(*tensor, at, tensor->NumElements()));
      at += tensor->NumElements();
    }
    for (int i = 0; i < context->num_outputs(); ++i) {
      const int input = first + num_variables_ + i;
      const Tensor given = context->input(input);
      Tensor* tensor = nullptr;
      TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output({input}, i, given.shape(), &tensor));
      if (!whole && !tensor->SharesBufferWith(given))
        TF_RETURN_IF_ERROR(check(where.copy(data_of(*tensor), data_of(given), (int64_t)given.TotalBytes()), "copy"));
      TF_RETURN_IF_ERROR(act(*tensor, at, tensor->NumElements()));
      at += tensor->NumElements();
    }
    return OkStatus();
  }

  // Calls act(begin, n) for what of `spans`, or of all if there are none, is in `count` elements from `at`.
  template <class F>
  Status for_spans(int64_t at, int64_t count, F act) const {
    const int64_t whole[2] = {at, at + count};
    const int64_t* spans = spans_.empty() ? whole : spans_.data();
    for (size_t k = 0; k < std::max<size_t>(2, spans_.size()); k += 2) {
      const int64_t begin = std::max(spans[k], at), n = std::min(spans[k + 1], at + count) - begin;
      if (n > 0) TF_RETURN_IF_ERROR(act(begin, n));
    }
    return OkStatus();
  }

  int num_variables_ = 0;
  std::vector<int64_t> spans_;
};

inline Status results_like_tensors(InferenceContext* c) {
  const int first = c->num_inputs() - c->num_outputs();
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->input(first + i));
  return OkStatus();
}

}  // namespace pqasgd_tensorflow

#endif
