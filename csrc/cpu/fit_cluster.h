// SPDX-License-Identifier: Apache-2.0
// Optimal one-dimensional k-means of sorted, distinct, weighted points.
//
// Optimal clusters are intervals of the sorted points (Wang & Song, "Ckmeans.1d.dp", 2011), and the
// cost of an interval obeys the quadrangle inequality. So the least cost F(k) with k clusters is
// convex in k, and a penalty per cluster turns "exactly k" into a single-layer problem
// (Gronlund et al., "Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in 1D", 2017):
//
//   best(t) = min over s < t of best(s) + cost(s, t) + penalty          (`penalized`)
//
// solved with a queue of candidates s, each best for one range of t; where a new candidate takes
// over from the last is found by doubling steps, then bisection (the answer is nearly always close
// by). The search (`cluster`) is for a penalty whose solution has k clusters.
//   - Its start comes from the same problem with cuts allowed at every 8th point only.
//   - F falls roughly as k^-2, so penalty *= (count / k)^3 nearly always hits within two steps.
//   - Where it does not, the chord between the best solutions with fewer and with more clusters
//     takes over. It either finds a solution between them, or shows that both are optimal for the
//     same penalty. Then F is straight between them and no penalty needs to give exactly k (evenly
//     spaced points do this); cutting the two paths where one cluster holds another and joining
//     them crosswise gives an optimal path with exactly k (`splice`; Aggarwal, Schieber &
//     Tokuyama, "Finding a minimum-weight k-link path in graphs with the concave Monge property",
//     1994). So no table of k layers is ever needed and memory is O(n).
//
// Precision: costs are differences of prefix sums. `Narrow` keeps them in float64, counted outwards
// from the middle point, so that the many points near the middle are not drowned by distant ones.
// The error that this can make is bounded on the result; where it may exceed kTolerance of the
// total (tight clusters far apart), the search is done again on `Wide` sums of two float64 each.
//
// Tried and slower: k layers with divide and conquer (3 to 4 times at 16 clusters of 4096 points).
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>

#include "fit_buffer.h"

namespace qkern {
namespace {

constexpr double kTolerance = 1e-8;  // of the total cost; the float32 centres alone cost as much
constexpr uint32_t kCoarsen = 8;     // points between cuts, next coarser level over this one
constexpr uint32_t kLeastPerCluster = 8;  // points per cluster that a coarser level must keep

// Ascending distinct values with weights above 0.
struct Points {
  const float* value;
  const double* weight;
  uint32_t count;
};

// A running sum with the rounding errors kept beside it.
struct Sum {
  double high = 0, low = 0;
  void add(double x) {
    const double s = high + x, from_x = s - high;
    low += (high - (s - from_x)) + (x - from_x);
    high = s;
  }
  void add_product(double a, double b) {
    const double p = a * b;
    low += fma(a, b, -p);
    add(p);
  }
};

struct Double2 {
  double high, low;
};

inline Double2 exact_sum(double a, double b) {
  const double s = a + b, from_b = s - a;
  return {s, (a - (s - from_b)) + (b - from_b)};
}

inline Double2 operator-(const Double2& a, const Double2& b) {
  const Double2 s = exact_sum(a.high, -b.high);
  return exact_sum(s.high, s.low + (a.low - b.low));
}

// A cut before point t: prefix sums of w, w y and w y^2 over the points before it, and the least
// penalized cost of those points.
struct Narrow {
  double best, w, wy, wyy;

  static double cost(const Narrow& from, const Narrow& to) {
    const double y = to.wy - from.wy;
    const double c = (to.wyy - from.wyy) - y * y / (to.w - from.w);
    return c > 0 ? c : 0;  // also where weights vanished beside far larger ones: 0 / 0
  }

  // Bound of the rounding error in cost(from, to), from half a unit in the last place per sum.
  static double error(const Narrow& from, const Narrow& to) {
    const double mean = fabs((to.wy - from.wy) / (to.w - from.w));
    return 1.2e-16 *
           (2 * (fabs(from.wyy) + fabs(to.wyy)) + 2 * mean * (fabs(from.wy) + fabs(to.wy)) +
            mean * mean * (fabs(from.w) + fabs(to.w)));
  }

  static void sum(const Points& points, Buffer<Narrow>& nodes) {
    const uint32_t middle = points.count / 2;
    const double anchor = points.value[middle];
    nodes[middle] = {};
    Sum w, wy, wyy;
    const auto include = [&](uint32_t i) {
      const double y = points.value[i] - anchor, weighted = points.weight[i] * y;
      w.add(points.weight[i]);
      wy.add(weighted);
      wyy.add(weighted * y);
    };
    for (uint32_t i = middle; i < points.count; ++i) {
      include(i);
      nodes[i + 1] = {0, w.high + w.low, wy.high + wy.low, wyy.high + wyy.low};
    }
    w = wy = wyy = Sum();
    for (uint32_t i = middle; i-- > 0;) {
      include(i);
      nodes[i] = {0, -(w.high + w.low), -(wy.high + wy.low), -(wyy.high + wyy.low)};
    }
  }
};

struct Wide {
  double best;
  Double2 w, wy, wyy;

  static double cost(const Wide& from, const Wide& to) {
    const Double2 w = to.w - from.w, y = to.wy - from.wy, yy = to.wyy - from.wyy;
    const double square = y.high * y.high;
    const double square_low = fma(y.high, y.high, -square) + 2 * y.high * y.low;
    const double part = square / w.high;
    const double rest = (fma(-part, w.high, square) + (square_low - part * w.low)) / w.high;
    const double c = (yy.high - part) + (yy.low - rest);
    return c > 0 ? c : 0;
  }

  static void sum(const Points& points, Buffer<Wide>& nodes) {
    Sum w, wy, wyy;
    nodes[0] = {};
    for (uint32_t i = 0; i < points.count; ++i) {
      const double x = points.value[i], weight = points.weight[i];
      w.add(weight);
      wy.add_product(weight, x);
      wyy.add_product(weight, x * x);  // the square of a float is exact
      nodes[i + 1] = {0, exact_sum(w.high, w.low), exact_sum(wy.high, wy.low),
                      exact_sum(wyy.high, wyy.low)};
    }
  }
};

// Cuts 0 = c[0] < c[1] < ... < c[k] = number of points.
struct Path {
  Buffer<uint32_t> cuts;
  double cost = 0;

  uint32_t count() const { return (uint32_t)cuts.size() - 1; }
  void swap(Path& other) {
    cuts.swap(other.cuts);
    std::swap(cost, other.cost);
  }
  template <class Node>
  void add_up(const Buffer<Node>& nodes) {
    cost = 0;
    for (uint32_t i = 0; i < count(); ++i) cost += Node::cost(nodes[cuts[i]], nodes[cuts[i + 1]]);
  }
};

// Fewer distinct values than 2^32 exist, so 32 bits number any set of points.
class Clusters {
 public:
  // The cuts of the best `k` clusters; 1 <= k < points.count.
  const Path& fit(const Points& points, uint32_t k) {
    points_ = points;
    parent_.resize((size_t)points.count + 1);
    queue_.resize((size_t)points.count + 1);
    prepare(narrow_);
    const double penalty = search(narrow_, k, first_penalty(narrow_, k), result_);
    double error = 0;
    for (uint32_t i = 0; i < k; ++i)
      error += Narrow::error(narrow_[result_.cuts[i]], narrow_[result_.cuts[i + 1]]);
    if (!(error <= kTolerance * result_.cost)) {
      prepare(wide_);
      search(wide_, k, penalty, result_);
    }
    return result_;
  }

 private:
  struct Candidate {
    uint32_t from, first;  // best for targets first .. the next candidate's first - 1
  };

  template <class Node>
  void prepare(Buffer<Node>& nodes) {
    nodes.resize((size_t)points_.count + 1);
    Node::sum(points_, nodes);
  }

  // Fills parent_, the start of the last cluster of the best path to each cut.
  template <class Node>
  void penalized(Buffer<Node>& nodes, double penalty) {
    const uint32_t last = (uint32_t)nodes.size() - 1;
    const auto better = [&nodes](uint32_t a, uint32_t b, uint32_t at) {
      return nodes[a].best + Node::cost(nodes[a], nodes[at]) <
             nodes[b].best + Node::cost(nodes[b], nodes[at]);
    };
    nodes[0].best = 0;
    Candidate* queue = queue_.data();
    uint32_t head = 0, tail = 1;
    queue[0] = {0, 1};
    for (uint32_t t = 1;; ++t) {
      while (head + 1 < tail && queue[head + 1].first <= t) ++head;
      const uint32_t from = queue[head].from;
      nodes[t].best = nodes[from].best + Node::cost(nodes[from], nodes[t]) + penalty;
      parent_[t] = from;
      if (t == last) return;
      // Once better than an earlier candidate, a later one stays better.
      if (!better(t, queue[tail - 1].from, last)) continue;
      uint32_t low = t + 1;
      while (tail > head) {
        low = std::max(queue[tail - 1].first, t + 1);
        if (!better(t, queue[tail - 1].from, low)) break;
        --tail;
      }
      if (tail == head) {
        queue[tail++] = {t, t + 1};
        continue;
      }
      const uint32_t rival = queue[tail - 1].from;
      uint32_t high = last;  // better there, not better at `low`
      for (uint32_t step = 1; step < high - low; step *= 2) {
        if (better(t, rival, low + step)) {
          high = low + step;
          break;
        }
        low += step;
      }
      while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        (better(t, rival, middle) ? high : low) = middle;
      }
      queue[tail++] = {t, high};
    }
  }

  template <class Node>
  void solve(Buffer<Node>& nodes, double penalty, Path& path) {
    penalized(nodes, penalty);
    const uint32_t last = (uint32_t)nodes.size() - 1;
    uint32_t count = 0;
    for (uint32_t t = last; t > 0; t = parent_[t]) ++count;
    path.cuts.resize((size_t)count + 1);
    uint32_t t = last;
    for (; count > 0; t = parent_[t]) path.cuts[count--] = t;
    path.cuts[0] = 0;
    path.add_up(nodes);
  }

  // Where to begin: from a coarser level, else from the penalty of a Gaussian with many clusters
  // (the cost of k clusters is close to 2.72 / k^2 of that of one).
  template <class Node>
  double first_penalty(const Buffer<Node>& nodes, uint32_t k) {
    const uint32_t count = (uint32_t)nodes.size() - 1;
    if (count / kCoarsen / kLeastPerCluster < k)
      return 5.44 * Node::cost(nodes[0], nodes[count]) / k / k / k;
    Buffer<Node> coarse;
    coarse.reset(count / kCoarsen + 1);
    for (uint32_t i = 0; i <= count - kCoarsen; i += kCoarsen) coarse.push(nodes[i]);
    coarse.push(nodes[count]);
    Path path;
    return search(coarse, k, first_penalty(coarse, k), path);
  }

  // The best k clusters of `nodes`, searched for from `penalty` on. Returns the penalty that gives
  // them.
  template <class Node>
  double search(Buffer<Node>& nodes, uint32_t k, double penalty, Path& path) {
    const uint32_t last = (uint32_t)nodes.size() - 1;
    Path fewer, more;
    fewer.cuts.resize(2);
    fewer.cuts[0] = 0;
    fewer.cuts[1] = last;
    fewer.add_up(nodes);
    more.cuts.resize(nodes.size());
    for (uint32_t i = 0; i <= last; ++i) more.cuts[i] = i;
    double low = 0, high = fewer.cost;  // penalties that gave `more` and `fewer`
    bool on_chord = false;
    for (int round = 0;; ++round) {
      solve(nodes, penalty, path);
      const uint32_t count = path.count();
      if (count == k) break;
      if (on_chord && (count <= fewer.count() || count >= more.count())) {
        splice(nodes, fewer, more, k, path);
        return penalty;
      }
      (count < k ? high : low) = penalty;
      path.swap(count < k ? fewer : more);
      // With long tails F falls faster than k^-2: steps grow while they keep falling short.
      const double ratio = (double)count / k;
      for (int power = 0; power <= round; power += 2) penalty *= ratio * ratio * ratio;
      on_chord = !(penalty > low && penalty < high) || (round > 6 && round % 2);
      if (on_chord) penalty = (fewer.cost - more.cost) / (more.count() - fewer.count());
    }
    // A penalty far above the cost rounds the cost away. One as low as the cost itself cannot give
    // more than k clusters: the cost cannot fall by more than itself.
    Path finer;
    while (penalty > 16 * path.cost && path.cost > 0) {
      solve(nodes, path.cost, finer);
      if (finer.count() != k || !(finer.cost < path.cost)) break;
      penalty = path.cost;
      path.swap(finer);
    }
    return penalty;
  }

  // Both paths are optimal for one penalty, with fewer and more than k clusters. The first cluster
  // of `fewer` that ends no earlier than the cluster `shift` further on in `more` holds that
  // cluster; going along `more` up to its start and on along `fewer` makes k.
  template <class Node>
  static void splice(const Buffer<Node>& nodes, const Path& fewer, const Path& more, uint32_t k,
                     Path& path) {
    const uint32_t shift = k - fewer.count();
    uint32_t i = 0;
    while (more.cuts[i + 1 + shift] > fewer.cuts[i + 1]) ++i;
    path.cuts.reset((size_t)k + 1);
    for (uint32_t c = 0; c <= i + shift; ++c) path.cuts.push(more.cuts[c]);
    for (uint32_t c = i + 1; c <= fewer.count(); ++c) path.cuts.push(fewer.cuts[c]);
    path.add_up(nodes);
  }

  Points points_ = {};
  Path result_;
  Buffer<Narrow> narrow_;
  Buffer<Wide> wide_;
  Buffer<uint32_t> parent_;
  Buffer<Candidate> queue_;
};

}  // namespace
}  // namespace qkern
