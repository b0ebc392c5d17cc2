// Tables for the Lloyd-Max quantizer, from the centroids that pqasgd_horovod/codecs/lloyd_max.py defines.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace pqasgd {
namespace {

#define PQ_TABLE static
#include "lloyd_max.inc"  // written by the build: kLloydMax[8][128], of b bits in row b - 1

// Cells of equal width over |u|, so narrow that each holds at most one threshold, which lies well inside it: then
// (thresholds below the cell) + (is the one inside reached?) counts exactly, whatever the rounding of |u| / width does.
bool try_cells(LloydMax& t, int num_thresholds, int num_cells) {
  const double last = num_thresholds ? t.threshold[num_thresholds - 1] : 1.0;
  t.num_cells = num_cells;
  t.cells_per_sigma = (float)((num_cells - 0.5) / last);
  int next = 0;
  for (int cell = 0; cell < num_cells; ++cell) {
    t.cell_base[cell] = next;
    t.cell_threshold[cell] = std::numeric_limits<float>::infinity();
    const int first = next;
    for (; next < num_thresholds; ++next) {
      const double position = (double)t.threshold[next] * t.cells_per_sigma;
      if (position >= cell + 1) break;
      const double margin = 1e-5 * num_cells;
      if (next > first || position < cell + margin || position > cell + 1 - margin) return false;
      t.cell_threshold[cell] = t.threshold[next];
    }
  }
  return next == num_thresholds;
}

LloydMax make_table(int bits) {
  LloydMax t{};
  const int levels = 1 << (bits - 1);
  for (int m = 0; m < 128; ++m) {
    t.centroid[m] = kLloydMax[bits - 1][m % levels];
    t.threshold[m] = std::numeric_limits<float>::infinity();
  }
  for (int m = 0; m + 1 < levels; ++m) t.threshold[m] = (t.centroid[m] + t.centroid[m + 1]) * 0.5f;
  for (int code = 0; code < 256; ++code) {
    const int inside = code & (2 * levels - 1);
    t.decode[code] = inside < levels ? t.centroid[inside] : -t.centroid[inside - levels];
  }
  for (int width = levels, first = 1; width > 1; width /= 2, first *= 2)
    for (int i = 0; i < first; ++i) t.tree[first + i] = t.threshold[i * width + width / 2 - 1];
  for (int cells = levels; cells <= LloydMax::kMaxCells; ++cells)
    if (try_cells(t, levels - 1, cells)) return t;
  t.num_cells = 0;  // tests/native would show it: no width separates the thresholds
  return t;
}

}  // namespace

const LloydMax& lloyd_max(int bits) {
  static const std::array<LloydMax, 8> tables = [] {
    std::array<LloydMax, 8> all;
    for (int b = 1; b <= 8; ++b) all[b - 1] = make_table(b);
    return all;
  }();
  return tables[bits - 1];
}

}  // namespace pqasgd
