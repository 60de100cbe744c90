// Where torch's objects keep what every step asks of them: address, shape, strides, dtype, device.
//
// To ask torch's C functions takes a third of the time that a step spends on looking at tensors whose memory is in the
// cache, so the few words are read where they stand. Which those are is found out from tensors of known contents; where
// torch has moved them, nothing is found, and torch is asked as before. Words are only compared with what torch has
// said of the same tensor, or of one in the same place, before: whatever differs is asked for again.
#pragma once

#include "../core/structs.h"

namespace fusedopt {

struct TensorLayout {
  int impl;  // of a Python object of type torch.Tensor, in words: pointer to its c10::TensorImpl; 0 if unknown
  // Of a c10::TensorImpl, in words of 8 bytes.
  int storage;         // pointer to its c10::StorageImpl
  int object;          // pointer to its Python object, with marks in the lowest bits
  int sizes;           // up to kInlineDims of them; before them their number, behind them as many strides
  int storage_offset;  // in elements
  int type;            // two words: dtype, device and flags; dispatch keys, which tell dense from other tensors
  uint64 noise[2];     // bits of those that nobody sets: they are what was in the memory before
  // Of a c10::StorageImpl.
  int data;     // the memory, then who owns it
  uint64 lazy;  // the dispatch keys of tensors whose elements are the negatives or the conjugates of what memory holds
};

constexpr int kInlineDims = 5;

// What the two words say of a tensor.
inline uint64 type_word(const TensorLayout& layout, const void* impl, int word) {
  return static_cast<const uint64*>(impl)[layout.type + word] & ~layout.noise[word];
}

// Null where it is not known.
const TensorLayout* tensor_layout();
// Whether it is found now, by looking anew.
bool finds_tensor_layout();

}  // namespace fusedopt
