// SPDX-License-Identifier: Apache-2.0
// Scratch arrays for fitting. Unlike std::vector they leave new memory untouched (a fit over a
// whole matrix takes about a gigabyte of it), and no instance of them is visible outside the
// library.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

namespace qkern {
namespace {

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable<T>::value, "elements are never constructed");

 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Room for `capacity` elements, none of them there yet. Throws std::bad_alloc.
  void reset(size_t capacity) {
    size_ = 0;
    if (capacity <= capacity_) return;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    if (capacity > SIZE_MAX / 2 / sizeof(T)) throw std::bad_alloc();
    data_ = static_cast<T*>(std::malloc(capacity * sizeof(T)));
    if (!data_) throw std::bad_alloc();
    capacity_ = capacity;
  }

  // `size` elements with no values yet.
  void resize(size_t size) {
    reset(size);
    size_ = size;
  }

  void push(const T& value) { data_[size_++] = value; }  // within the capacity

  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace
}  // namespace qkern
