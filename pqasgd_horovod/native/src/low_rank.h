// Matrices as products of two thin factors. Sums have the order that codecs/low_rank.py gives them, on every instruction set and in any
// number of threads. docs/architecture.md is the specification.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace pqasgd {
namespace PQ_ISA {

namespace {
void gather_values(const pq_source& source, int64_t start, int64_t count, void* destination, int32_t dtype);  // in kernels.cc

constexpr int kSumRows = 64;                    // rows that are added up before their sum is added to the result
constexpr int64_t kGatheredElements = 1 << 14;  // stay in the cache until they are multiplied
constexpr int kVectors = 64 / W;

// How many columns of a factor are worked on at once: as many as their sums fit in registers.
#if defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;
#endif

// At most 64 numbers, zeros after them.
struct Padded {
  alignas(64) float numbers[64] = {};
  PQ_INLINE Padded(const float* from, int64_t count) { std::copy(from, from + count, numbers); }
};

// Calls f(integral constant, first) for columns [first, first + constant) of `rank`.
template <class F>
PQ_INLINE void in_groups(int32_t rank, F f) {
  int32_t k = 0;
  for (; k + kTogether <= rank; k += kTogether) f(std::integral_constant<int, kTogether>{}, k);
  for (; k < rank; ++k) f(std::integral_constant<int, 1>{}, k);
}

// out[g * stride] = sum64 of row * right[g].
template <int G>
PQ_INLINE void dots(const float* row, const float* right, int64_t cols, float* out, int64_t stride) {
  Sum64 sums[G];
  int64_t j = 0;
  for (; j + 64 <= cols; j += 64)
    for (int v = 0; v < kVectors; ++v) {
      const vf x = load<vf>(row + j + v * W);
      for (int g = 0; g < G; ++g) sums[g].lane[v] = sums[g].lane[v] + x * load<vf>(right + g * cols + j + v * W);
    }
  if (j < cols) {
    const Padded x(row + j, cols - j);
    for (int g = 0; g < G; ++g) {
      const Padded y(right + g * cols + j, cols - j);
      for (int v = 0; v < kVectors; ++v)
        sums[g].lane[v] = sums[g].lane[v] + load<vf>(x.numbers + v * W) * load<vf>(y.numbers + v * W);
    }
  }
  for (int g = 0; g < G; ++g) out[g * stride] = sums[g].fold();
}

// Rows [begin, end) of the matrix that begins at element `at` of the source: to next_residual, and times right to left.
void project(const pq_matrix& m, int32_t rank, const pq_source& source, int64_t at, const float* right, float* left, int64_t begin,
             int64_t end) {
  const int64_t rows_each = std::max<int64_t>(1, kGatheredElements / m.cols);
  for (int64_t first = begin; first < end; first += rows_each) {
    const int64_t last = std::min(first + rows_each, end);
    float* const values = source.next_residual + at;
    gather_values(source, at + first * m.cols, (last - first) * m.cols, values + first * m.cols, PQ_F32);
    for (int64_t i = first; i < last; ++i)
      in_groups(rank, [&](auto together, int32_t k) {
        dots<together>(values + i * m.cols, right + k * m.cols, m.cols, left + k * m.rows + i, m.rows);
      });
  }
}

// right[g][0, count) += the sum over rows [0, rows) of left[g] * values, count at most 64.
template <int G>
PQ_INLINE void add_rows(const float* values, int64_t cols, int64_t rows, int64_t count, const float* left, int64_t left_stride,
                        float* right) {
  vf sums[G][kVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    auto add = [&](const float* row) {
      for (int v = 0; v < kVectors; ++v) {
        const vf x = load<vf>(row + v * W);
        for (int g = 0; g < G; ++g) sums[g][v] = sums[g][v] + x * set1(left[g * left_stride + i]);
      }
    };
    if (count == 64) add(values + i * cols);
    else add(Padded(values + i * cols, count).numbers);
  }
  for (int g = 0; g < G; ++g) {
    Padded total(right + g * cols, count);
    for (int v = 0; v < kVectors; ++v) store(total.numbers + v * W, load<vf>(total.numbers + v * W) + sums[g][v]);
    std::copy(total.numbers, total.numbers + count, right + g * cols);
  }
}

// Columns [begin, end) of the matrix, transposed, times left, to right; begin is a multiple of 64.
void backproject(const pq_matrix& m, int32_t rank, const float* values, const float* left, float* right, int64_t begin, int64_t end) {
  for (int32_t k = 0; k < rank; ++k) std::fill(right + k * m.cols + begin, right + k * m.cols + end, 0.0f);
  for (int64_t i = 0; i < m.rows; i += kSumRows)
    for (int64_t j = begin; j < end; j += 64)
      in_groups(rank, [&](auto together, int32_t k) {
        add_rows<together>(values + i * m.cols + j, m.cols, std::min<int64_t>(kSumRows, m.rows - i), std::min<int64_t>(64, end - j),
                           left + k * m.rows + i, m.rows, right + k * m.cols + j);
      });
}

// Rows [begin, end): mean = base (or nothing) + left right'; rest -= left own_right'.
void reconstruct(const pq_matrix& m, int32_t rank, const float* left, const float* own_right, const float* right, const float* base,
                 float* mean, float* rest, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i * m.cols;
    auto product = [&](auto zero, const float* factor, int64_t j, auto read) {
      auto sum = zero;
      for (int32_t k = 0; k < rank; ++k) sum = sum + read(factor + k * m.cols + j) * left[k * m.rows + i];
      return sum;
    };
    auto vectors = [](const float* p) { return load<vf>(p); };
    auto numbers = [](const float* p) { return *p; };
    int64_t j = 0;
    for (; j + W <= m.cols; j += W) {
      const vf x = product(vf{}, right, j, vectors);
      store(rest + row + j, load<vf>(rest + row + j) - product(vf{}, own_right, j, vectors));
      store(mean + row + j, base ? load<vf>(base + row + j) + x : x);
    }
    for (; j < m.cols; ++j) {
      const float x = product(0.0f, right, j, numbers);
      rest[row + j] = rest[row + j] - product(0.0f, own_right, j, numbers);
      mean[row + j] = base ? base[row + j] + x : x;
    }
  }
}

// sum64 of a * b, in float64.
PQ_INLINE double dot(const float* a, const float* b, int64_t n) {
  double sums[64] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int k = 0; k < 64; ++k) sums[k] += (double)a[i + k] * (double)b[i + k];
  for (int k = 0; i < n; ++i, ++k) sums[k] += (double)a[i] * (double)b[i];
  for (int half = 32; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] = sums[k] + sums[k + half];
  return sums[0];
}

// Modified Gram-Schmidt, each vector twice. A vector that is all but in the span of those before it becomes 0.
void orthogonalize(int64_t length, int32_t rank, float* vectors) {
  for (int32_t k = 0; k < rank; ++k) {
    float* const v = vectors + k * length;
    const double before = dot(v, v, length);
    for (int pass = 0; pass < 2; ++pass)
      for (int32_t j = 0; j < k; ++j) {
        const float* const u = vectors + j * length;
        const double along = dot(u, v, length);
        for (int64_t i = 0; i < length; ++i) v[i] = (float)((double)v[i] - along * (double)u[i]);
      }
    const double after = dot(v, v, length);
    if (after > before * 0x1p-40) {
      const double scale = 1.0 / std::sqrt(after);
      for (int64_t i = 0; i < length; ++i) v[i] = (float)((double)v[i] * scale);
    } else {
      std::fill(v, v + length, 0.0f);
    }
  }
}

}  // namespace
}  // namespace PQ_ISA
}  // namespace pqasgd
