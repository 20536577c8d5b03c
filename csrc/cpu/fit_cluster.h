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

#include "fit_points.h"

namespace qkern {
namespace {

constexpr double kTolerance = 1e-8;  // of the total cost; the float32 centres alone cost as much
constexpr uint32_t kCoarsen = 8;     // points between cuts, next coarser level over this one
constexpr uint32_t kLeastPerCluster = 8;  // points per cluster that a coarser level must keep

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

inline Double2 operator*(const Double2& a, const Double2& b) {
  const double p = a.high * b.high;
  return exact_sum(p, fma(a.high, b.high, -p) + (a.high * b.low + a.low * b.high));
}

// A cut before point t: prefix sums of w, w y and w y^2 over the points before it, and the least
// penalized cost of those points. Weights may vanish beside far larger ones: differences can be 0.
struct Narrow {
  double best, w, wy, wyy;

  static double cost(const Narrow& from, const Narrow& to) {
    const double y = to.wy - from.wy;
    const double c = (to.wyy - from.wyy) - y * y / (to.w - from.w);
    return c > 0 ? c : 0;  // also for 0 / 0
  }

  // cost(from, to) - cost(from, middle) - cost(middle, to), without their cancellation.
  static double joining(const Narrow& from, const Narrow& middle, const Narrow& to) {
    const double w = middle.w - from.w, y = middle.wy - from.wy;
    const double w_next = to.w - middle.w, y_next = to.wy - middle.wy;
    const double d = y * w_next - y_next * w;
    const double weights = w * w_next * (w + w_next);
    return weights > 0 ? d * d / weights : 0;
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

  static double joining(const Wide& from, const Wide& middle, const Wide& to) {
    const Double2 w = middle.w - from.w, y = middle.wy - from.wy;
    const Double2 w_next = to.w - middle.w, y_next = to.wy - middle.wy;
    const double d = (y * w_next - y_next * w).high;
    const double weights = w.high * w_next.high * (w.high + w_next.high);
    return weights > 0 ? d * d / weights : 0;
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

// The cuts between all points, or between every few of them.
template <class Node>
struct Level {
  Buffer<Node> nodes;
  uint32_t single = 1;  // steps from cut to cut round a single point; 0 where none are so short

  uint32_t last() const { return (uint32_t)nodes.size() - 1; }
  // A single point costs nothing; that must not be left to a difference of sums.
  double cost(uint32_t from, uint32_t to) const {
    return to - from == single ? 0 : Node::cost(nodes[from], nodes[to]);
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
  void add_up(const Level<Node>& level) {
    cost = 0;
    for (uint32_t i = 0; i < count(); ++i) cost += level.cost(cuts[i], cuts[i + 1]);
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
    if (!(narrow_error() <= kTolerance * result_.cost)) {
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
  void prepare(Level<Node>& level) {
    level.nodes.resize((size_t)points_.count + 1);
    Node::sum(points_, level.nodes);
  }

  double narrow_error() const {
    double error = 0;
    for (uint32_t i = 0; i < result_.count(); ++i)
      error += Narrow::error(narrow_.nodes[result_.cuts[i]], narrow_.nodes[result_.cuts[i + 1]]);
    return error;
  }

  // Fills parent_, the start of the last cluster of the best path to each cut.
  template <class Node>
  void penalized(Level<Node>& level, double penalty) {
    const uint32_t last = level.last();
    Node* nodes = level.nodes.data();
    nodes[0].best = 0;
    Candidate* queue = queue_.data();
    uint32_t head = 0, tail = 1;
    queue[0] = {0, 1};
    for (uint32_t t = 1;; ++t) {
      while (head + 1 < tail && queue[head + 1].first <= t) ++head;
      const uint32_t from = queue[head].from;
      nodes[t].best = nodes[from].best + level.cost(from, t) + penalty;
      parent_[t] = from;
      if (t == last) return;
      tail = enter(level, t, head, tail);
    }
  }

  // Puts candidate t where it is better than the queue's; returns the new tail. Once better than an
  // earlier candidate, a later one stays better: what joining [rival, t) to the points that follow
  // costs only grows.
  template <class Node>
  uint32_t enter(const Level<Node>& level, uint32_t t, uint32_t head, uint32_t tail) {
    const Node* nodes = level.nodes.data();
    Candidate* queue = queue_.data();
    const uint32_t last = level.last();
    uint32_t rival = 0;
    double lead = 0;  // of the rival, before it pays for joining
    const auto better = [&](uint32_t at) {
      return Node::joining(nodes[rival], nodes[t], nodes[at]) > lead;
    };
    uint32_t low = last;
    for (;;) {
      rival = queue[tail - 1].from;
      lead = nodes[t].best - (nodes[rival].best + level.cost(rival, t));
      if (low == last && !better(last)) return tail;
      low = std::max(queue[tail - 1].first, t + 1);
      if (!better(low)) break;
      if (--tail == head) {
        queue[tail] = {t, t + 1};
        return tail + 1;
      }
    }
    uint32_t high = last;  // better there, not better at `low`
    for (uint32_t step = 1; step < high - low; step *= 2) {
      if (better(low + step)) {
        high = low + step;
        break;
      }
      low += step;
    }
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (better(middle) ? high : low) = middle;
    }
    queue[tail] = {t, high};
    return tail + 1;
  }

  template <class Node>
  void solve(Level<Node>& level, double penalty, Path& path) {
    penalized(level, penalty);
    const uint32_t last = level.last();
    uint32_t count = 0;
    for (uint32_t t = last; t > 0; t = parent_[t]) ++count;
    path.cuts.resize((size_t)count + 1);
    uint32_t t = last;
    for (; count > 0; t = parent_[t]) path.cuts[count--] = t;
    path.cuts[0] = 0;
    path.add_up(level);
  }

  // Where to begin: from a coarser level, else from the penalty of a Gaussian with many clusters
  // (the cost of k clusters is close to 2.72 / k^2 of that of one).
  template <class Node>
  double first_penalty(const Level<Node>& level, uint32_t k) {
    const uint32_t count = level.last();
    if (count / kCoarsen / kLeastPerCluster < k) return 5.44 * level.cost(0, count) / k / k / k;
    Level<Node> coarse;
    coarse.single = 0;
    coarse.nodes.reset(count / kCoarsen + 1);
    for (uint32_t i = 0; i <= count - kCoarsen; i += kCoarsen) coarse.nodes.push(level.nodes[i]);
    coarse.nodes.push(level.nodes[count]);
    Path path;
    return search(coarse, k, first_penalty(coarse, k), path);
  }

  // The best k clusters of `level`, searched for from `penalty` on. Returns the penalty that gives
  // them.
  template <class Node>
  double search(Level<Node>& level, uint32_t k, double penalty, Path& path) {
    const uint32_t last = level.last();
    Path fewer, more;
    fewer.cuts.resize(2);
    fewer.cuts[0] = 0;
    fewer.cuts[1] = last;
    fewer.add_up(level);
    more.cuts.resize(level.nodes.size());
    for (uint32_t i = 0; i <= last; ++i) more.cuts[i] = i;
    double low = 0, high = fewer.cost;  // penalties that gave `more` and `fewer`
    bool on_chord = false;
    for (int round = 0;; ++round) {
      solve(level, penalty, path);
      const uint32_t count = path.count();
      if (count == k) break;
      if (on_chord && (count <= fewer.count() || count >= more.count())) {
        splice(level, fewer, more, k, path);
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
      solve(level, path.cost, finer);
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
  static void splice(const Level<Node>& level, const Path& fewer, const Path& more, uint32_t k,
                     Path& path) {
    const uint32_t shift = k - fewer.count();
    uint32_t i = 0;
    while (more.cuts[i + 1 + shift] > fewer.cuts[i + 1]) ++i;
    path.cuts.reset((size_t)k + 1);
    for (uint32_t c = 0; c <= i + shift; ++c) path.cuts.push(more.cuts[c]);
    for (uint32_t c = i + 1; c <= fewer.count(); ++c) path.cuts.push(fewer.cuts[c]);
    path.add_up(level);
  }

  Points points_ = {};
  Path result_;
  Level<Narrow> narrow_;
  Level<Wide> wide_;
  Buffer<uint32_t> parent_;
  Buffer<Candidate> queue_;
};

}  // namespace
}  // namespace qkern
