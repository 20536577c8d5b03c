// SPDX-License-Identifier: Apache-2.0
// Reads a safetensors file whole: enough for files without escapes in their names.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Tensor {
  std::string dtype;  // "F32", "U8", ...
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
};

class Safetensors {
 public:
  explicit Safetensors(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    file_.assign(std::istreambuf_iterator<char>(file), {});
    uint64_t header = 0;
    if (file_.size() < 8) throw std::runtime_error(path + " is no safetensors file");
    std::memcpy(&header, file_.data(), 8);
    if (header > file_.size() - 8) throw std::runtime_error(path + " ends inside its header");
    text_.assign((const char*)file_.data() + 8, (size_t)header);
    data_ = file_.data() + 8 + header;
    size_ = file_.size() - 8 - (size_t)header;
    expect('{');
    while (peek() != '}') {
      const std::string name = word();
      expect(':');
      read_entry(name);
      if (peek() == ',') expect(',');
    }
  }

  const Tensor& at(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::runtime_error("the file has no tensor " + name);
    return found->second;
  }
  const Tensor* find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

 private:
  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    if (at_ == text_.size()) throw std::runtime_error("the header ends too early");
    return text_[at_];
  }
  void expect(char c) {
    if (peek() != c) throw std::runtime_error(std::string("expected ") + c + " in the header");
    ++at_;
  }
  std::string word() {
    expect('"');
    const size_t end = text_.find('"', at_);
    if (end == std::string::npos) throw std::runtime_error("the header ends in a name");
    const std::string result = text_.substr(at_, end - at_);
    at_ = end + 1;
    return result;
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> result;
    expect('[');
    while (peek() != ']') {
      size_t used = 0;
      result.push_back(std::stoll(text_.substr(at_), &used));
      at_ += used;
      if (peek() == ',') expect(',');
    }
    expect(']');
    return result;
  }
  void read_entry(const std::string& name) {
    Tensor tensor;
    expect('{');
    while (peek() != '}') {
      const std::string key = word();
      expect(':');
      if (key == "shape")
        tensor.shape = numbers();
      else if (key == "data_offsets") {
        const std::vector<int64_t> range = numbers();
        if (range.size() != 2 || range[0] < 0 || range[1] < range[0] || (uint64_t)range[1] > size_)
          throw std::runtime_error(name + " lies outside the file");
        tensor.data = data_ + range[0];
        tensor.bytes = (size_t)(range[1] - range[0]);
      } else {
        const std::string value = word();  // a dtype, or text under __metadata__
        if (key == "dtype") tensor.dtype = value;
      }
      if (peek() == ',') expect(',');
    }
    expect('}');
    tensors_[name] = tensor;
  }

  std::vector<uint8_t> file_;
  std::string text_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0, at_ = 0;
  std::map<std::string, Tensor> tensors_;
};
