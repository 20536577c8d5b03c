// SPDX-License-Identifier: Apache-2.0
// The best table of 8 float8 (e4m3) numbers for each tile of 8 rows x 64 columns, and its codes.
//
// Entries come from few candidates (a tile of usual weights spans 50 to 80 float8 numbers), so the
// best choice of 8 is found exactly: the error of all points between two neighbouring entries is
// computed for every pair of candidates, and the cheapest path through 8 of them is a dynamic
// program. No rounding of real-valued centres is better, and it costs less than finding those.
//
// With int8 activations all entries are integers of at most 120 times one power of two, 2^(E-6),
// where 2^E is the exponent of the largest. The program runs for each E from the one that holds all
// weights downwards, until clipping to the range of E alone costs as much as the best so far.
//
// Errors are sums of squares, never differences of prefix sums: a tile that consists of 8 float8
// numbers is kept exactly. The result of a tile depends on that tile alone, hence not on threads;
// of equal choices that with the lower entries wins.
#include <atomic>
#include <new>

#include "codes.h"
#include "fit_args.h"
#include "fit_nearest.h"
#include "fit_points.h"

namespace qkern {
namespace {

constexpr const char* kCall = "qk_fit_tiles";
constexpr int kBits = 3, kEntries = 8;
constexpr int64_t kRows = 8, kColumns = 64;
constexpr int kNumbers = 253;  // finite values of float8 e4m3, zero once
constexpr int kLargestExponent = 8, kSmallestExponent = -9;

struct Grid {
  float value[kNumbers];
  uint8_t byte[kNumbers];

  Grid() {
    int count = 0;
    for (int b = 0xfe; b > 0x80; --b) byte[count++] = (uint8_t)b;
    for (int b = 0; b < 0x7f; ++b) byte[count++] = (uint8_t)b;
    for (int i = 0; i < kNumbers; ++i) value[i] = e4m3_to_float(byte[i]);
  }
};

// Largest entry where the exponent of the largest is at most `exponent`.
float top_of(int exponent) {
  return exponent == kLargestExponent ? 448.f : ldexpf(1.875f, exponent);
}

class Worker {
 public:
  explicit Worker(const qk_fit_tiles_args& args)
      : a_(args), gatherer_({args.w, args.w_stride, args.importance, args.importance_row_stride}) {}

  void fit(int64_t tile_row, int64_t g, uint8_t* bytes, double* error) {
    const int64_t row = tile_row * kRows, column = g * kColumns;
    const Segment s = {row, min64(kRows, a_.n - row), column, min64(kColumns, a_.k - column)};
    points_ = gatherer_.points(s);
    best_error_ = INFINITY;
    if (a_.activations == QK_ACT_FLOAT)
      try_grid(kLargestExponent, false);
    else
      try_exponents();
    float table[kEntries];
    for (int i = 0; i < kEntries; ++i) {
      table[i] = grid_.value[best_[i]];
      bytes[i] = grid_.byte[best_[i]];
    }
    if (error) *error = best_error_;
    encode(s, table);
  }

 private:
  void try_exponents() {
    const float largest = std::max(-points_.value[0], points_.value[points_.count - 1]);
    // The exponent to which the candidate above the largest weight may round up.
    int exponent = kSmallestExponent;
    while (exponent < kLargestExponent && top_of(exponent) < largest) ++exponent;
    for (; exponent >= kSmallestExponent && clipping(top_of(exponent)) < best_error_; --exponent)
      try_grid(exponent, true);
  }

  double clipping(double top) const {
    double sum = 0;
    for (uint32_t p = 0; p < points_.count; ++p) {
      const double over = fabs((double)points_.value[p]) - top;
      if (over > 0) sum += points_.weight[p] * (over * over);
    }
    return sum;
  }

  // Keeps the best choice among the allowed candidates if it beats those before.
  void try_grid(int exponent, bool integers) {
    const float top = top_of(exponent);
    const float low = points_.value[0], high = points_.value[points_.count - 1];
    int count = 0;
    for (int i = 0; i < kNumbers; ++i) {
      const float v = grid_.value[i];
      if (fabsf(v) > top) continue;
      if (integers && ldexpf(v, 6 - exponent) != rintf(ldexpf(v, 6 - exponent))) continue;
      if (count > 0 && v <= low) count = 0;  // the candidates before are further away still
      candidates_[count++] = (uint8_t)i;
      if (v >= high) break;
    }
    count_ = count;
    if (count <= kEntries) {
      for (int i = 0; i < kEntries; ++i) choice_[i] = candidates_[std::min(i, count - 1)];
      keep(error_of_choice());
    } else {
      find_costs();
      keep(cheapest_path());
    }
  }

  void keep(double error) {
    if (!(error < best_error_)) return;
    best_error_ = error;
    std::copy(choice_, choice_ + kEntries, best_);
  }

  double error_of_choice() {
    float table[kEntries];
    for (int i = 0; i < kEntries; ++i) table[i] = grid_.value[choice_[i]];
    nearest_.build(table, kBits);
    double sum = 0;
    for (uint32_t p = 0; p < points_.count; ++p) {
      const double d = (double)points_.value[p] - table[nearest_.code(points_.value[p])];
      sum += points_.weight[p] * (d * d);
    }
    return sum;
  }

  double square(uint32_t p, double entry) const {
    const double d = points_.value[p] - entry;
    return points_.weight[p] * (d * d);
  }

  // cost(b, a) of the points between candidates a < b; below_[b] and above_[a] of those beyond.
  void find_costs() {
    cost_.resize((size_t)count_ * (size_t)count_);
    uint32_t first = 0;  // point that is not below the candidate
    for (int i = 0; i < count_; ++i) {
      const double entry = grid_.value[candidates_[i]];
      while (first < points_.count && points_.value[first] < entry) ++first;
      double sum = 0;
      uint32_t p = first;
      for (int b = i + 1; b < count_; ++b) {
        const double middle = (entry + grid_.value[candidates_[b]]) / 2;
        for (; p < points_.count && points_.value[p] <= middle; ++p) sum += square(p, entry);
        cost(b, i) = sum;
      }
      for (; p < points_.count; ++p) sum += square(p, entry);
      above_[i] = sum;
      sum = 0;
      p = first;
      for (int a = i - 1; a >= 0; --a) {
        const double middle = (entry + grid_.value[candidates_[a]]) / 2;
        for (; p > 0 && points_.value[p - 1] > middle; --p) sum += square(p - 1, entry);
        cost(i, a) += sum;
      }
      for (; p > 0; --p) sum += square(p - 1, entry);
      below_[i] = sum;
    }
  }

  double& cost(int b, int a) { return cost_[(size_t)b * (size_t)count_ + (size_t)a]; }

  double cheapest_path() {
    double least[kNumbers];  // of paths whose last entry so far is a candidate
    std::copy(below_, below_ + count_, least);
    for (int entry = 1; entry < kEntries; ++entry)
      for (int b = count_ - 1; b >= entry; --b) {
        const double* costs = &cost(b, 0);
        double best = INFINITY;
        int from = 0;
        for (int a = entry - 1; a < b; ++a) {
          const double total = least[a] + costs[a];
          from = total < best ? a : from;
          best = total < best ? total : best;
        }
        least[b] = best;
        from_[entry][b] = (uint8_t)from;
      }
    int last = kEntries - 1;
    for (int b = last; b < count_; ++b)
      if (least[b] + above_[b] < least[last] + above_[last]) last = b;
    const double error = least[last] + above_[last];
    for (int entry = kEntries - 1; entry > 0; --entry) {
      choice_[entry] = candidates_[last];
      last = from_[entry][last];
    }
    choice_[0] = candidates_[last];
    return error;
  }

  void encode(const Segment& s, const float* table) {
    nearest_.build(table, kBits);
    for (int64_t r = s.row; r < s.row + s.rows; ++r) {
      const float* w = a_.w + r * a_.w_stride + s.column;
      uint8_t codes[kColumns];
      for (int64_t c = 0; c < s.columns; ++c) codes[c] = nearest_.code(w[c]);
      pack_codes<kBits>(codes, s.columns,
                        a_.codes + r * a_.codes_stride_bytes + stream_bytes(s.column, kBits));
    }
  }

  const qk_fit_tiles_args& a_;
  const Grid grid_;
  Gatherer gatherer_;
  Nearest nearest_;
  Points points_ = {};
  int count_ = 0;                 // of candidates
  uint8_t candidates_[kNumbers];  // numbers of the grid, ascending
  double below_[kNumbers], above_[kNumbers];
  Buffer<double> cost_;
  uint8_t from_[kEntries][kNumbers];
  uint8_t choice_[kEntries], best_[kEntries];
  double best_error_ = 0;
};

qk_status check(const qk_fit_tiles_args& a, int64_t tiles) {
  if (qk_status s = check_rows(kCall, "w", a.w, a.n, a.k, a.w_stride)) return s;
  if (a.activations < QK_ACT_FLOAT || a.activations > QK_ACT_INT8_GROUP)
    return fail(QK_INVALID_ARGUMENT, "%s: activations must be 0, 1 or 2, got %d", kCall,
                a.activations);
  if (a.importance && a.importance_row_stride != 0)
    if (qk_status s =
            check_rows(kCall, "importance", a.importance, a.n, a.k, a.importance_row_stride))
      return s;
  if (qk_status s = check_rows(kCall, "codebook", a.codebook, tiles, kEntries, kEntries)) return s;
  return check_rows(kCall, "codes", a.codes, a.n, stream_bytes(a.k, kBits), a.codes_stride_bytes);
}

// False where memory ran out.
bool fit_tiles(const qk_fit_tiles_args& a, int64_t tiles, int64_t groups) {
  const int64_t workers = min64(tiles, parallel_threads(a.parallel));
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel_for(a.parallel, workers, [&](int64_t) {
    try {
      Worker worker(a);
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
        if (out_of_memory.load(std::memory_order_relaxed)) return;
        worker.fit(t / groups, t % groups, a.codebook + t * kEntries,
                   a.errors ? a.errors + t : nullptr);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory.store(true);
    }
  });
  return !out_of_memory.load();
}

}  // namespace
}  // namespace qkern

using namespace qkern;

extern "C" qk_status qk_fit_tiles(const qk_fit_tiles_args* args) {
  qk_fit_tiles_args a;
  if (qk_status s = read_struct("qk_fit_tiles_args", args, &a)) return s;
  if (qk_status s = check_parallel(a.parallel)) return s;
  const int64_t groups = a.k > 0 ? ceil_div(a.k, kColumns) : 0;
  const int64_t tiles = a.n > 0 ? ceil_div(a.n, kRows) * groups : 0;
  if (qk_status s = check(a, tiles)) return s;
  if (tiles == 0) return QK_OK;
  if (qk_status s = check_numbers(kCall, "w", a.parallel, a.w, a.n, a.k, a.w_stride, true))
    return s;
  if (a.importance) {
    const int64_t rows = a.importance_row_stride == 0 ? 1 : a.n;
    if (qk_status s = check_numbers(kCall, "importance", a.parallel, a.importance, rows, a.k,
                                    a.importance_row_stride, false))
      return s;
  }
  if (!fit_tiles(a, tiles, groups)) return fail(QK_OUT_OF_MEMORY, "%s: out of memory", kCall);
  return QK_OK;
}
