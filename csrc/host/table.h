// A table: the tensors of one plan that share a device and a combination of dtypes, cut into chunks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/structs.h"

namespace fusedopt {

class Table {
 public:
  explicit Table(int64 chunk_size) : chunk_size_(chunk_size) {
    if (chunk_size < 1 || chunk_size > kMost)
      throw std::invalid_argument("Table: got chunk_size=" + std::to_string(chunk_size) +
                                  ", expected 1 to 2^31 - 1; pass a number of elements");
  }

  // Returns the tensor's index in this table. std::invalid_argument, with the table as it was, for numbers that cannot
  // be counted.
  int32 add(TensorEntry entry) {
    if (entry.numel < 0 || entry.numel / chunk_size_ >= kMost - int64(chunks_.size()))
      throw std::invalid_argument("Table.add: got numel=" + std::to_string(entry.numel) +
                                  ", expected >= 0 and fewer than 2^31 chunks in all; use several tables");
    if (entry.group < 0)
      throw std::invalid_argument("Table.add: got group=" + std::to_string(entry.group) +
                                  ", expected the index of a param group");
    checked_for = 0;
    num_groups_ = std::max(num_groups_, size_t(entry.group) + 1);
    const int32 index = int32(entries_.size());
    entry.chunks = 0;
    do {  // an empty tensor has a chunk too: somebody must count its step
      chunks_.push_back({index, uint32(entry.chunks++), entry.numel});
    } while (entry.chunks * chunk_size_ < entry.numel);
    entries_.push_back(entry);
    grads_.push_back(nullptr);
    return index;
  }

  const std::vector<TensorEntry>& entries() const { return entries_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  std::vector<const void*>& grads() { return grads_; }
  int64 chunk_size() const { return chunk_size_; }
  // That the tensors refer to.
  size_t num_groups() const { return num_groups_; }

  // Null: no gradient in this step. An empty tensor's address is never read, so any other even value does.
  void set_grad(int32 index, const void* grad, bool has_main = false) {
    grads_.at(index) = reinterpret_cast<const void*>(reinterpret_cast<uint64>(grad) | uint64(has_main));
  }
  // For tables that the host alone reads: where a tensor is changes while its chunks are gone through.
  void set_memory(int32 index, void* param, void* main_grad) {
    TensorEntry& entry = entries_.at(size_t(index));
    entry.param = param;
    entry.main_grad = main_grad;
    checked_for = 0;
  }
  // A word, as GradSource.
  const void* grad(int32 index) const { return grads_.at(index); }
  bool has_main(int32 index) const { return reinterpret_cast<uint64>(grads_.at(index)) & 1; }
  bool has_own(int32 index) const { return reinterpret_cast<uint64>(grads_[size_t(index)]) > 1; }

  // Writes down what changes from step to step, as the device reads it: Hyper rows, then gradient pointers.
  // Takes `capacity` bytes at least, because a kernel parameter is copied whole.
  void pack(const std::vector<Hyper>& hypers, size_t capacity) {
    check_capacity(capacity);
    const size_t hyper_bytes = hypers.size() * sizeof(Hyper);
    packed_.resize(std::max(capacity, packed_bytes(hypers.size())));
    const auto* rows = reinterpret_cast<const char*>(hypers.data());  // null where there are none
    const auto* grads = reinterpret_cast<const char*>(grads_.data());
    std::copy_n(rows, hyper_bytes, packed_.begin());
    std::copy_n(grads, grads_.size() * sizeof(void*), packed_.begin() + std::ptrdiff_t(hyper_bytes));
  }
  static void check_capacity(size_t capacity) {
    if (capacity > kMostParameters)
      throw std::invalid_argument("got a step table of " + std::to_string(capacity) + " bytes, expected " +
                                  std::to_string(kMostParameters) +
                                  " at most, which is what a kernel takes as parameters; put it into device memory");
  }
  char* packed() { return packed_.data(); }
  size_t packed_size() const { return packed_.size(); }
  size_t packed_bytes(size_t groups) const { return groups * sizeof(Hyper) + grads_.size() * sizeof(void*); }

  // What the rows have been looked at for, by whoever reads them; 0 for nothing.
  mutable int64 checked_for = 0;

 private:
  static constexpr int64 kMost = (int64(1) << 31) - 1;
  static constexpr size_t kMostParameters = 32768;

  int64 chunk_size_;
  size_t num_groups_ = 0;
  std::vector<TensorEntry> entries_;
  std::vector<Chunk> chunks_;
  std::vector<const void*> grads_;
  std::vector<char> packed_;
};

}  // namespace fusedopt
