// The caller's tensors: reading the numbers of a block where they are, and writing them.
#pragma once
#include "group.h"

namespace pqasgd {
namespace gpu {

// A pq_source, or in the place of its segments and its anchor `flat`: an array of numbers.
struct Vector {
  pq_source tensors;
  const float* flat;
};

__device__ inline int64_t segment_of(const pq_source& s, int64_t position) {
  int64_t low = 0, high = s.num_segments;  // offsets[low] <= position < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (s.offsets[middle] <= position) low = middle;
    else high = middle;
  }
  return low;
}

// Calls f(segment, offset in it, offset in the range, length) for the pieces of [start, start + n), alike on all threads.
template <class F>
__device__ inline void for_pieces(const pq_source& s, int64_t start, int64_t n, F f) {
  int64_t low = segment_of(s, start);
  for (int64_t done = 0; done < n; ++low) {
    const int64_t inside = start + done - s.offsets[low], left = s.segments[low].numel - inside;
    const int64_t length = left < n - done ? left : n - done;
    if (length > 0) {
      f(s.segments[low], inside, done, length);
      done += length;
    }
  }
}

__device__ inline float widened(const pq_segment& segment, int64_t i) {
  switch (segment.dtype) {
    case PQ_F32: return ((const float*)segment.data)[i];
    case PQ_F64: return (float)((const double*)segment.data)[i];
    case PQ_F16: return half_to_float(((const uint16_t*)segment.data)[i]);
    default: return bfloat_to_float(((const uint16_t*)segment.data)[i]);
  }
}
__device__ inline double doubled(const pq_segment& segment, int64_t i) {
  return segment.dtype == PQ_F64 ? ((const double*)segment.data)[i] : (double)widened(segment, i);
}

__device__ inline void store(const pq_segment& segment, int64_t i, float x) {
  switch (segment.dtype) {
    case PQ_F32: ((float*)segment.data)[i] = x; break;
    case PQ_F64: ((double*)segment.data)[i] = (double)x; break;
    case PQ_F16: ((uint16_t*)segment.data)[i] = float_to_half(x); break;
    default: ((uint16_t*)segment.data)[i] = float_to_bfloat(x);
  }
}

// The own numbers of [start, start + n) where they are of several tensors, or in float64: rare, so that it may be slow.
template <class Group>
__device__ PQ_NOINLINE void load_pieces(const pq_source& s, int64_t start, int n, float* x) {
  for_pieces(s, start, n, [&](const pq_segment& segment, int64_t at, int64_t to, int64_t length) {
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = Group::first() + k * Group::kStep;
      if (i < to || i >= to + length) continue;
      if (s.anchor && s.anchor_dtype == PQ_F64)
        x[k] = (float)(doubled(segment, at + i - to) - ((const double*)s.anchor)[start + i]);
      else x[k] = widened(segment, at + i - to);
    }
  });
}

// The thread's own numbers of source[start, start + n), minus the anchor, plus the residual; those past the end are 0.
template <class Group>
__device__ inline void load_own(const Vector& vector, int64_t start, int n, Numbers& x) {
  const pq_source& s = vector.tensors;
  const bool wide = s.anchor && s.anchor_dtype == PQ_F64;
  Numbers other;
  if (vector.flat) {
    read_own<Group>(vector.flat + start, n, x);
  } else {
    const int64_t at = segment_of(s, start), inside = start - s.offsets[at];
    const pq_segment segment = s.segments[at];
    PQ_IS_GLOBAL(segment.data);
    if (wide || segment.dtype == PQ_F64 || segment.numel - inside < n) {
      Numbers slowly = {};
      load_pieces<Group>(s, start, n, slowly);
      each_own([&](int k) { x[k] = slowly[k]; });
    } else if (segment.dtype == PQ_F32) {
      read_own<Group>((const float*)segment.data + inside, n, x);
    } else {
      uint32_t words[kPerThread];
      read_own<Group>((const uint16_t*)segment.data + inside, n, words);
      if (segment.dtype == PQ_F16) each_own([&](int k) { x[k] = half_to_float((uint16_t)words[k]); });
      else each_own([&](int k) { x[k] = bfloat_to_float((uint16_t)words[k]); });
    }
    if (s.anchor && !wide) {
      read_own<Group>((const float*)s.anchor + start, n, other);
      each_own([&](int k) { x[k] = x[k] - other[k]; });
    }
  }
  if (s.residual) {
    read_own<Group>(s.residual + start, n, other);
    each_own([&](int k) { x[k] = x[k] + other[k]; });
  }
}

}  // namespace gpu
}  // namespace pqasgd
