// SPDX-License-Identifier: Apache-2.0
// A C++ program without Python: opens weights that qkern saved, runs their linear layers on a
// thread pool of its own, and compares with the results that Python computed, bit for bit.
//
//   run_saved WEIGHTS.safetensors CASES.safetensors LAYER KIND BITS GROUP ACTIVATIONS
//
// KIND is int or table, GROUP 0 for one scale per row, ACTIVATIONS float, int8 or int8_group.
// CASES holds LAYER.x [m, k] and LAYER.y [m, n], float32.

#include <qkern/qkern.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "safetensors.h"

namespace {

// The host's own threads: a fixed number of workers that take tasks from a counter.
class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  qk_parallel hooks() {
    qk_parallel parallel = {};
    parallel.struct_size = sizeof parallel;
    parallel.threads = [](void* self) { return (int32_t)((Pool*)self)->workers_.size(); };
    parallel.run = [](void* self, int64_t tasks, qk_task fn, void* arg) {
      ((Pool*)self)->run(tasks, fn, arg);
    };
    parallel.context = this;
    return parallel;
  }
  int64_t tasks_run() const { return tasks_run_; }

 private:
  void run(int64_t tasks, qk_task fn, void* arg) {
    std::unique_lock<std::mutex> lock(mutex_);
    fn_ = fn;
    arg_ = arg;
    next_ = 0;
    tasks_ = left_ = tasks;
    wake_.notify_all();
    done_.wait(lock, [this] { return left_ == 0; });
    tasks_ = 0;
  }
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || next_ < tasks_; });
      if (stop_) return;
      const int64_t task = next_++;
      lock.unlock();
      fn_(arg_, task);
      ++tasks_run_;
      lock.lock();
      if (--left_ == 0) done_.notify_all();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stop_ = false;
  qk_task fn_ = nullptr;
  void* arg_ = nullptr;
  int64_t next_ = 0, tasks_ = 0, left_ = 0;
  std::atomic<int64_t> tasks_run_{0};
};

void require(qk_status status) {
  if (status != QK_OK) throw std::runtime_error(qk_last_error());
}

qk_dtype dtype_of(const Tensor& tensor) {
  if (tensor.dtype == "F32") return QK_F32;
  if (tensor.dtype == "F16") return QK_F16;
  if (tensor.dtype == "BF16") return QK_BF16;
  if (tensor.dtype == "U8") return QK_U8;
  throw std::runtime_error("no qk_dtype is known for " + tensor.dtype);
}

qk_weight describe(const Safetensors& file, char** arg, int64_t k) {
  const std::string layer = arg[0], kind = arg[1], activations = arg[4];
  const Tensor& codes = file.at(layer + ".codes");
  qk_weight w = {};
  w.struct_size = sizeof w;
  w.kind = kind == "int" ? QK_KIND_INT : QK_KIND_TABLE;
  w.bits = std::atoi(arg[2]);
  w.group = std::atoi(arg[3]);
  w.activations = activations == "float"  ? QK_ACT_FLOAT
                  : activations == "int8" ? QK_ACT_INT8
                                          : QK_ACT_INT8_GROUP;
  w.n = codes.shape[0];
  w.k = k;
  w.codes = codes.data;
  w.codes_stride_bytes = codes.shape[1];
  if (const Tensor* scales = file.find(layer + ".scales")) {
    w.scales = scales->data;
    w.scale_dtype = dtype_of(*scales);
    w.scales_stride = scales->shape[1];
  }
  if (const Tensor* zeros = file.find(layer + ".zeros")) {
    w.zeros = zeros->data;
    w.zero_dtype = dtype_of(*zeros);
    w.zeros_stride = zeros->shape[1];
  }
  if (const Tensor* table = file.find(layer + ".codebook")) {
    w.codebook = (const float*)table->data;
    w.table_per = table->shape[0] == 1     ? QK_TABLE_PER_TENSOR
                  : table->shape[0] == w.n ? QK_TABLE_PER_ROW
                                           : QK_TABLE_PER_GROUP;
  }
  w.table_scale = 1;
  return w;
}

// Memory at a multiple of 64, as packed weights and workspaces ask for.
struct Block {
  explicit Block(int64_t size) : bytes(size), data(std::aligned_alloc(64, (size + 63) / 64 * 64)) {}
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  int64_t bytes;
  void* data;
};

int run(char** arg) {
  const Safetensors weights(arg[1]), cases(arg[2]);
  const std::string layer = arg[3];
  const Tensor &x = cases.at(layer + ".x"), &expected = cases.at(layer + ".y");
  const qk_weight w = describe(weights, arg + 3, x.shape[1]);

  int64_t bytes = 0;
  require(qk_packed_bytes(&w, &bytes));
  const Block packed(bytes);
  require(qk_pack(&w, packed.data, packed.bytes));

  Pool pool(3);
  const qk_parallel hooks = pool.hooks();
  std::vector<float> y((size_t)(x.shape[0] * w.n));
  qk_linear_args args = {};
  args.struct_size = sizeof args;
  args.packed = packed.data;
  args.packed_bytes = packed.bytes;
  args.x = x.data;
  args.x_dtype = QK_F32;
  args.m = x.shape[0];
  args.x_row_stride = x.shape[1];
  args.x_col_stride = 1;
  args.y = y.data();
  args.y_dtype = QK_F32;
  args.y_row_stride = w.n;
  args.parallel = &hooks;
  require(qk_linear_workspace(&args, &bytes));
  const Block workspace(bytes);
  args.workspace = workspace.data;
  args.workspace_bytes = workspace.bytes;
  require(qk_linear(&args));

  const bool same =
      expected.bytes == y.size() * 4 && std::memcmp(expected.data, y.data(), expected.bytes) == 0;
  std::printf("%s %s %lld tasks on the caller's pool: %s\n", layer.c_str(), qk_last_kernel(),
              (long long)pool.tasks_run(), same ? "same bits" : "OTHER BITS");
  return same && pool.tasks_run() > 1 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "expected 7 arguments, see the head of run_saved.cpp\n");
    return 2;
  }
  if (qk_abi_version() != QK_ABI_VERSION) {
    std::fprintf(stderr, "built for another interface of qkern\n");
    return 1;
  }
  try {
    return run(argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_saved: %s\n", error.what());
    return 1;
  }
}
