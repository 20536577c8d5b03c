// SPDX-License-Identifier: Apache-2.0
// Buffers between two pages that may not be touched. A read or a write one byte outside, on the
// side the buffer lies flush against, is a fault; the few bytes on its other side are known bytes
// that must not change.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace sweep {

enum class Flush { kBegin, kEnd };  // against which of the two pages

class Guarded {
 public:
  Guarded() = default;
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { release(); }

  // Readable bytes that stay behind buffers at the end. None, but under an emulator that reads
  // whole vectors where an instruction masks lanes out (QEMU 7.2: vmaskmovps).
  static inline int64_t slack = 0;

  // Room for `bytes`, filled with `fill`. At the end the address is rounded down to `align`; at
  // the beginning it lies `offset` bytes behind the page.
  uint8_t* place(int64_t bytes, Flush flush, int64_t align = 1, int64_t offset = 0,
                 uint8_t fill = 0xa5) {
    open();
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t wanted = (bytes + offset + slack + page) / page * page;
    if (wanted > room_) {
      release();
      mapping_ = (uint8_t*)mmap(nullptr, (size_t)(wanted + 2 * page), PROT_NONE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapping_ == MAP_FAILED || mprotect(mapping_ + page, (size_t)wanted, kWrite) != 0) {
        std::perror("mmap of a guarded buffer");
        std::exit(2);
      }
      begin_ = mapping_ + page;
      room_ = wanted;
      page_ = page;
    }
    bytes_ = bytes;
    if (flush == Flush::kEnd)
      data_ = begin_ + (room_ - slack - bytes) / align * align;
    else
      data_ = begin_ + offset;
    std::memset(data_, fill, (size_t)bytes);
    for (uint8_t* p = low(); p < data_; ++p) *p = kCanary;
    for (uint8_t* p = data_ + bytes_; p < high(); ++p) *p = kCanary;
    return data_;
  }

  // Whether the known bytes on both sides are as they were.
  bool intact() const {
    for (const uint8_t* p = low(); p < data_; ++p)
      if (*p != kCanary) return false;
    for (const uint8_t* p = data_ + bytes_; p < high(); ++p)
      if (*p != kCanary) return false;
    return true;
  }

  void lock() {  // for operands that a call must not write
    mprotect(begin_, (size_t)room_, PROT_READ);
    locked_ = true;
  }
  void open() {
    if (locked_) mprotect(begin_, (size_t)room_, kWrite);
    locked_ = false;
  }

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int kWrite = PROT_READ | PROT_WRITE;
  static constexpr uint8_t kCanary = 0xc3;
  static constexpr int64_t kCanaries = 192;

  uint8_t* low() const { return data_ - begin_ > kCanaries ? data_ - kCanaries : begin_; }
  uint8_t* high() const {
    uint8_t *end = begin_ + room_, *last = data_ + bytes_;
    return end - last > kCanaries ? last + kCanaries : end;
  }
  void release() {
    if (room_) munmap(mapping_, (size_t)(room_ + 2 * page_));
    room_ = 0;
    locked_ = false;
  }

  uint8_t *mapping_ = nullptr, *begin_ = nullptr, *data_ = nullptr;
  int64_t room_ = 0, bytes_ = 0, page_ = 0;
  bool locked_ = false;
};

}  // namespace sweep
