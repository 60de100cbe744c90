// A table: the tensors of one plan that share a device and a combination of dtypes, cut into chunks.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/structs.h"

namespace fusedopt {

class Table {
 public:
  explicit Table(int64 chunk_size) : chunk_size_(chunk_size) {}

  // Returns the tensor's index in this table.
  int32 add(TensorEntry entry) {
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

  // Null: no gradient in this step. An empty tensor's address is never read, so any other even value does.
  void set_grad(int32 index, const void* grad, bool has_main = false) {
    grads_.at(index) = reinterpret_cast<const void*>(reinterpret_cast<uint64>(grad) | uint64(has_main));
  }
  // A word, as GradSource.
  const void* grad(int32 index) const { return grads_.at(index); }
  bool has_main(int32 index) const { return reinterpret_cast<uint64>(grads_.at(index)) & 1; }
  bool has_own(int32 index) const { return reinterpret_cast<uint64>(grads_[size_t(index)]) > 1; }

  // Writes down what changes from step to step, as the device reads it: Hyper rows, then gradient pointers.
  // Takes `capacity` bytes at least, because a kernel parameter is copied whole.
  void pack(const std::vector<Hyper>& hypers, size_t capacity) {
    const size_t hyper_bytes = hypers.size() * sizeof(Hyper);
    packed_.resize(std::max(capacity, packed_bytes(hypers.size())));
    std::memcpy(packed_.data(), hypers.data(), hyper_bytes);
    std::memcpy(packed_.data() + hyper_bytes, grads_.data(), grads_.size() * sizeof(void*));
  }
  char* packed() { return packed_.data(); }
  size_t packed_bytes(size_t groups) const { return groups * sizeof(Hyper) + grads_.size() * sizeof(void*); }

 private:
  int64 chunk_size_;
  std::vector<TensorEntry> entries_;
  std::vector<Chunk> chunks_;
  std::vector<const void*> grads_;
  std::vector<char> packed_;
};

}  // namespace fusedopt
