// SPDX-License-Identifier: Apache-2.0
// Stress: many host threads, settings that change under running calls, fork, repeats, and sizes
// beyond 2^31. Everything is compared bit for bit with serial results of the scalar kernels.
//
//   stress [--calls N] [--light] [--only threads|settings|fork|repeats|strides|indices]
//
// The `indices` part packs 2^31 codes of 8 bits (2 GiB); --light leaves it out.

#include <sys/wait.h>

#include <atomic>
#include <csignal>
#include <memory>
#include <thread>

#include "weights.h"

namespace sweep {
namespace {

std::atomic<int64_t> failures{0};

void expect(bool good, const char* what, int64_t number) {
  if (good || failures.fetch_add(1) > 9) return;
  std::fprintf(stderr, "FAILED: %s (number %lld): %s\n", what, (long long)number, qk_last_error());
}

// A weight, activations, and the result that every call must give.
class Job {
 public:
  Job(const Class& c, const Shape& shape, int64_t m, int64_t number) : m_(m) {
    Random random((uint64_t)number + 1);
    weight_.draw(c, shape, number, random, false);
    expect(weight_.pack(random) == QK_OK, "packing", number);
    x_.resize((size_t)(m * shape.k));
    for (float& v : x_) v = (float)random.symmetric();
    expected_.resize((size_t)(m * shape.n));
    qk_set_isa(QK_ISA_SCALAR);
    qk_set_threads(1);
    expect(run(expected_.data()) == QK_OK, "the serial call", number);
    qk_set_threads(0);
    qk_set_isa(QK_ISA_AUTO);
  }

  qk_status run(float* y) const {
    qk_linear_args args = {};
    args.struct_size = sizeof args;
    args.packed = weight_.packed().data();
    args.packed_bytes = weight_.packed().bytes();
    args.x = x_.data();
    args.m = m_;
    args.x_row_stride = weight_.k();
    args.x_col_stride = 1;
    args.y = y;
    args.y_row_stride = weight_.n();
    return qk_linear(&args);
  }

  bool repeats() const {
    std::vector<float> y(expected_.size(), NAN);
    if (run(y.data()) != QK_OK) return false;
    return std::memcmp(y.data(), expected_.data(), 4 * y.size()) == 0;
  }

 private:
  Weight weight_;
  int64_t m_;
  std::vector<float> x_, expected_;
};

using Jobs = std::vector<std::unique_ptr<Job>>;

// Every activation mode and both layouts; large enough that a call uses several threads.
Jobs make_jobs(int64_t n, int64_t k, int64_t m) {
  static const Class classes[] = {
      {Class::kInt, 4, QK_ACT_INT8},       {Class::kInt, 4, QK_ACT_FLOAT},
      {Class::kInt, 8, QK_ACT_INT8_GROUP}, {Class::kTable, 4, QK_ACT_INT8},
      {Class::kRowTable, 4, QK_ACT_FLOAT}, {Class::kGroupTable, 3, QK_ACT_INT8_GROUP},
      {Class::kInt, 3, QK_ACT_FLOAT},      {Class::kTable, 2, QK_ACT_FLOAT}};
  Jobs jobs;
  for (const Class& c : classes) {
    const int64_t number = (int64_t)jobs.size();
    jobs.push_back(
        std::make_unique<Job>(c, Shape{n + 7 * number, k + number, 64}, m + number % 3, number));
  }
  return jobs;
}

void from_threads(const Jobs& jobs, int threads, int64_t calls, bool same) {
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      for (int64_t i = 0; i < calls; ++i) {
        const size_t job = same ? (size_t)i : (size_t)t;
        expect(jobs[job % jobs.size()]->repeats(), "a call from one of several threads", i);
      }
    });
  for (std::thread& t : team) t.join();
}

void threads(int64_t calls) {
  const Jobs jobs = make_jobs(150, 400, 3);
  from_threads(jobs, 8, calls / 2, true);
  from_threads(jobs, 8, calls / 2, false);
}

int32_t three(void*) { return 3; }
int32_t five(void*) { return 5; }
void in_order(void*, int64_t tasks, qk_task fn, void* arg) {
  for (int64_t t = 0; t < tasks; ++t) fn(arg, t);
}

// Limits, levels and hosts that come and go while calls run.
void settings(int64_t calls) {
  const Jobs jobs = make_jobs(150, 400, 3);
  std::atomic<bool> done{false};
  std::thread changer([&] {
    const qk_parallel hosts[] = {{sizeof(qk_parallel), three, in_order, nullptr},
                                 {sizeof(qk_parallel), five, in_order, nullptr}};
    for (int i = 0; !done; ++i) {
      qk_set_threads(i % 5);
      qk_set_isa(i % 3 ? QK_ISA_AUTO : QK_ISA_SCALAR);
      qk_set_parallel(i % 3 == 2 ? nullptr : &hosts[i % 2]);
      std::this_thread::yield();
    }
  });
  from_threads(jobs, 4, calls / 4, true);
  done = true;
  changer.join();
  qk_set_parallel(nullptr);
  qk_set_threads(0);
  qk_set_isa(QK_ISA_AUTO);
}

// A child of a process whose pool is in use: it must compute, not wait for threads it lacks.
void fork_once(const Jobs& jobs, int64_t number) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    for (const auto& job : jobs)
      if (!job->repeats()) std::_Exit(1);
    std::_Exit(0);
  }
  int status = -1;
  expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a forked child", number);
}

void forks(int64_t calls) {
  const Jobs jobs = make_jobs(150, 400, 3);
  for (const auto& job : jobs) expect(job->repeats(), "a call before fork", 0);
  fork_once(jobs, -1);
  std::atomic<bool> done{false};
  std::thread busy([&] {
    while (!done) expect(jobs[0]->repeats(), "a call beside forks", 0);
  });
  for (int64_t i = 0; i < calls / 40 + 1; ++i) {
    std::thread forking([&] { fork_once(jobs, i); });
    forking.join();
  }
  done = true;
  busy.join();
}

void repeats(int64_t calls) {
  for (const Jobs& jobs : {make_jobs(33, 70, 1), make_jobs(5, 200, 4), make_jobs(64, 64, 6)})
    for (int64_t i = 0; i < calls * 10; ++i)
      expect(jobs[(size_t)i % jobs.size()]->repeats(), "a repeated call", i);
}

// Zeroed address space; only what is touched takes memory.
class Sparse {
 public:
  explicit Sparse(int64_t bytes) : bytes_(bytes) {
    data_ = (uint8_t*)mmap(nullptr, (size_t)bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ != MAP_FAILED) return;
    std::perror("mmap of sparse memory");
    std::exit(2);
  }
  ~Sparse() { munmap(data_, (size_t)bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  int64_t bytes_;
};

// Rows of x and y, and then columns of x, more than 2^31 elements apart.
void strides(int64_t) {
  const int64_t n = 21, k = 6, m = 3, apart = ((int64_t)1 << 31) + 12345;
  const Sparse x(4 * apart * (k > m ? k : m) + 4096), y(4 * apart * m);
  for (qk_activations mode : {QK_ACT_FLOAT, QK_ACT_INT8}) {
    Weight weight;
    Random random(5);
    weight.draw({Class::kInt, 4, mode}, {n, k, 0}, 0, random, false);
    expect(weight.pack(random) == QK_OK, "packing", 0);
    for (const bool far_columns : {false, true}) {
      const int64_t rows = far_columns ? k : apart, columns = far_columns ? apart : 1;
      std::vector<float> dense((size_t)(m * k)), expected((size_t)(m * n));
      for (int64_t i = 0; i < m * k; ++i) {
        dense[(size_t)i] = (float)random.symmetric();
        encode(QK_F32, x.data(), i / k * rows + i % k * columns, dense[(size_t)i]);
      }
      qk_linear_args args = {};
      args.struct_size = sizeof args;
      args.packed = weight.packed().data();
      args.packed_bytes = weight.packed().bytes();
      args.m = m;
      args.x = dense.data();
      args.x_row_stride = k;
      args.x_col_stride = 1;
      args.y = expected.data();
      args.y_row_stride = n;
      expect(qk_linear(&args) == QK_OK, "dense rows", 0);
      args.x = x.data();
      args.x_row_stride = rows;
      args.x_col_stride = columns;
      args.y = y.data();
      args.y_row_stride = apart;
      expect(qk_linear(&args) == QK_OK, "rows far apart", 0);
      for (int64_t r = 0; r < m; ++r)
        expect(std::memcmp(y.data() + 4 * r * apart, &expected[(size_t)(r * n)], 4 * n) == 0,
               "rows far apart differ", r);
    }
  }
}

// A weight of more than 2^31 codes and bytes. Its first and last rows are those of a small one, so
// that all results are known; what lies between is zero.
void indices(int64_t) {
  const int64_t k = 32768, n = 65536 + 48, edge = 40;
  const Sparse codes(n * k);
  std::vector<uint8_t> small((size_t)(2 * edge * k));
  Random random(11);
  for (uint8_t& c : small) c = (uint8_t)random.next();
  std::memcpy(codes.data(), small.data(), (size_t)(edge * k));
  std::memcpy(codes.data() + (n - edge) * k, small.data() + edge * k, (size_t)(edge * k));
  std::vector<float> x((size_t)(2 * k)), rows((size_t)(2 * k));
  for (float& v : x) v = (float)random.symmetric();
  qk_weight w = {};
  w.struct_size = sizeof w;
  w.bits = 8;
  w.activations = QK_ACT_INT8;
  w.k = k;
  w.codes_stride_bytes = k;
  const auto run = [&](int64_t outputs, const uint8_t* from, std::vector<float>* y) {
    w.n = outputs;
    w.codes = from;
    int64_t bytes = 0;
    expect(qk_packed_bytes(&w, &bytes) == QK_OK, "qk_packed_bytes", outputs);
    const Sparse packed(bytes);
    expect(qk_pack(&w, packed.data(), bytes) == QK_OK, "qk_pack", outputs);
    y->resize((size_t)(2 * outputs));
    qk_linear_args args = {};
    args.struct_size = sizeof args;
    args.packed = packed.data();
    args.packed_bytes = bytes;
    args.x = x.data();
    args.m = 2;
    args.x_row_stride = k;
    args.x_col_stride = 1;
    args.y = y->data();
    args.y_row_stride = outputs;
    expect(qk_linear(&args) == QK_OK, "qk_linear", outputs);
    qk_dequantize_args last = {};
    last.struct_size = sizeof last;
    last.packed = packed.data();
    last.packed_bytes = bytes;
    last.row_begin = outputs - 1;
    last.row_count = 1;
    last.out = rows.data() + (outputs == n ? k : 0);
    last.out_row_stride = k;
    expect(qk_dequantize(&last) == QK_OK, "qk_dequantize", outputs);
  };
  std::vector<float> expected, y;
  run(2 * edge, small.data(), &expected);
  run(n, codes.data(), &y);
  expect(std::memcmp(rows.data(), rows.data() + k, (size_t)(4 * k)) == 0, "the last row", n);
  for (int64_t m = 0; m < 2; ++m) {
    const float *all = &y[(size_t)(m * n)], *some = &expected[(size_t)(2 * m * edge)];
    expect(std::memcmp(all, some, 4 * edge) == 0, "the first outputs", m);
    expect(std::memcmp(all + n - edge, some + edge, 4 * edge) == 0, "the last outputs", m);
    for (int64_t i = edge; i + 1 < n - edge; ++i)
      expect(all[i] == all[i + 1] && all[i] != 0, "equal rows", i);
  }
}

struct Part {
  const char* name;
  void (*run)(int64_t calls);
  bool heavy;
};

constexpr Part kParts[] = {{"threads", threads, false}, {"settings", settings, false},
                           {"fork", forks, false},      {"repeats", repeats, false},
                           {"strides", strides, false}, {"indices", indices, true}};

}  // namespace
}  // namespace sweep

int main(int argc, char** argv) {
  int64_t calls = 1000;
  bool light = false;
  const char* only = nullptr;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--light") {
      light = true;
    } else if (flag == "--calls" && i + 1 < argc) {
      calls = std::atoll(argv[++i]);
    } else if (flag == "--only" && i + 1 < argc) {
      only = argv[++i];
    } else {
      std::fprintf(stderr, "usage: stress [--calls N] [--light] [--only PART]\n");
      return 2;
    }
  }
  int ran = 0;
  for (const sweep::Part& part : sweep::kParts) {
    if (only ? std::strcmp(only, part.name) != 0 : light && part.heavy) continue;
    const int64_t before = sweep::failures;
    part.run(light ? calls / 20 + 1 : calls);
    std::printf("%-10s %s\n", part.name, sweep::failures == before ? "ok" : "BAD");
    ++ran;
  }
  return sweep::failures != 0 || ran == 0;
}
