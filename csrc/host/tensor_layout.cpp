#include "tensor_layout.h"

#include <cstdlib>
#include <vector>

#include "tensor_ref.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Sizes begin at word 8 in torch 2.13; before, counts and Python object took a word more each.
constexpr int kLastSizes = 10;

using Words = const uint64*;

Words words_of(const py::object& tensor) { return static_cast<Words>(TensorRef(tensor).impl()); }

// shape (3, 5, 7, 11), contiguous, `offset` elements into its storage.
py::object sample(const char* dtype, const char* device, int offset) {
  const py::module_ torch = py::module_::import("torch");
  const py::object flat = torch.attr("empty")(2048, py::arg("dtype") = torch.attr(dtype), py::arg("device") = device);
  return flat.attr("narrow")(0, offset, 3 * 5 * 7 * 11).attr("view")(3, 5, 7, 11);
}

int find_sizes(Words words, uint64 offset) {
  const uint64 expected[] = {4, 3, 5, 7, 11};
  const uint64 strides[] = {5 * 7 * 11, 7 * 11, 11, 1};
  for (int at = 4; at <= kLastSizes; ++at) {
    bool found = words[at + 2 * kInlineDims] == offset && words[at + 2 * kInlineDims + 1] == 3 * 5 * 7 * 11;
    for (int i = 0; i < 5; ++i) found = found && words[at - 1 + i] == expected[i];
    for (int i = 0; i < 4; ++i) found = found && words[at + kInlineDims + i] == strides[i];
    if (found) return at;
  }
  return -1;
}

bool find_storage(TensorLayout& layout, const py::object& tensor, const py::object& other) {
  const py::object sharing = tensor.attr("data");  // the same storage, and nothing else in common
  const auto address = tensor.attr("untyped_storage")().attr("data_ptr")().cast<uint64>();
  for (layout.storage = 2; layout.storage < 4; ++layout.storage) {
    const uint64 pointer = words_of(tensor)[layout.storage];
    if (pointer != words_of(sharing)[layout.storage] || pointer == words_of(other)[layout.storage]) continue;
    for (layout.data = 2; layout.data < 4; ++layout.data)
      if (reinterpret_cast<Words>(pointer)[layout.data] == address) return true;
  }
  return false;
}

// 0 where it is not found: nothing else depends on it.
int find_impl(const py::object& tensor, const py::object& other) {
  const int end = int(Py_TYPE(tensor.ptr())->tp_basicsize / Py_ssize_t(sizeof(void*)));
  for (int at = 2; at < end; ++at) {  // after Python's count and type, perhaps a mark
    const auto points_to = [&](const py::object& each) {
      return reinterpret_cast<const void* const*>(each.ptr())[at] == words_of(each);
    };
    if (points_to(tensor) && points_to(other)) return at;
  }
  return 0;
}

bool find_object(TensorLayout& layout, const py::object& tensor, const py::object& other) {
  const auto points_to = [&](const py::object& each) {
    return words_of(each)[layout.object] / 8 == reinterpret_cast<uint64>(each.ptr()) / 8;
  };
  for (layout.object = layout.sizes - 2; layout.object > layout.storage; --layout.object)
    if (points_to(tensor) && points_to(other)) return true;
  return false;
}

// The next objects of these sizes are made, as a rule, of memory that is full of `byte`.
void leave_behind(int byte) {
  constexpr size_t kSmallest = 128, kLargest = 512, kStep = 16;
  constexpr int kEach = 16;
  for (size_t size = kSmallest; size <= kLargest; size += kStep) {
    void* blocks[kEach];
    for (void*& block : blocks) {
      block = std::malloc(size);
      auto* const bytes = static_cast<volatile unsigned char*>(block);  // stores that are of no use would be left out
      for (size_t i = 0; block && i < size; ++i) bytes[i] = static_cast<unsigned char>(byte);
    }
    for (void* block : blocks) std::free(block);
  }
}

// Flags do not fill their words: the rest of them differs between tensors that are alike.
void find_noise(TensorLayout& layout, const py::object& tensor) {
  for (const int byte : {0x00, 0xff, 0x00, 0xff}) {
    leave_behind(byte);
    const py::object alike = sample("float32", "cpu", 0);
    for (int word : {0, 1})
      layout.noise[word] |= type_word(layout, words_of(alike), word) ^ type_word(layout, words_of(tensor), word);
  }
}

// Tensors that are alike have the same words, those of another dtype, device or layout have others.
bool tells_apart(const TensorLayout& layout, const py::object& tensor) {
  const auto type = [&](const py::object& each) {
    const Words words = words_of(each);
    return std::pair(type_word(layout, words, 0), type_word(layout, words, 1));
  };
  if (type(sample("float32", "cpu", 0)) != type(tensor)) return false;
  std::vector<py::object> others = {tensor.attr("to_sparse")()};
  for (const char* dtype : {"float64", "bfloat16", "float16", "int32", "complex64"})
    others.push_back(sample(dtype, "cpu", 0));
  others.push_back(sample("float32", "meta", 0));
  for (size_t i = 0; i < others.size(); ++i) {
    if (!words_of(others[i]) || type(others[i]) == type(tensor)) return false;
    for (size_t j = 0; j < i; ++j)
      if (type(others[i]) == type(others[j])) return false;
  }
  return true;
}

// By which a view of the tensor, made by this function of torch, differs from it.
uint64 lazy_key(const TensorLayout& layout, const py::object& tensor, const char* view_function) {
  const py::object view = py::module_::import("torch").attr(view_function)(tensor);
  return type_word(layout, words_of(view), 1) & ~type_word(layout, words_of(tensor), 1);
}

bool find_layout(TensorLayout& layout) {
  try {
    const py::object tensor = sample("float32", "cpu", 5), other = sample("float32", "cpu", 6);
    if (!words_of(tensor) || !words_of(other)) return false;
    layout.sizes = find_sizes(words_of(tensor), 5);
    if (layout.sizes < 0 || layout.sizes != find_sizes(words_of(other), 6)) return false;
    layout.storage_offset = layout.sizes + 2 * kInlineDims;
    layout.type = layout.storage_offset + 2;
    if (!find_storage(layout, tensor, other) || !find_object(layout, tensor, other)) return false;
    layout.impl = find_impl(tensor, other);
    constexpr int kAttempts = 16;  // more is seen of the noise in each: where memory comes from is not ours to say
    bool told_apart = false;
    for (int i = 0; i < kAttempts && !told_apart; ++i) {
      find_noise(layout, tensor);
      told_apart = tells_apart(layout, tensor);
    }
    if (!told_apart) return false;
    const uint64 negative = lazy_key(layout, tensor, "_neg_view");
    const uint64 conjugate = lazy_key(layout, sample("complex64", "cpu", 0), "_conj");
    layout.lazy = negative | conjugate;
    return negative != 0 && conjugate != 0;
  } catch (py::error_already_set& error) {
    pass_interrupts(error);
    return false;
  }
}

}  // namespace

bool finds_tensor_layout() {
  TensorLayout found = {};
  return has_torch_functions() && find_layout(found);
}

const TensorLayout* tensor_layout() {
  static Once<TensorLayout> layout;
  return layout.get([]() -> const TensorLayout* {
    TensorLayout found = {};
    const char* off = std::getenv("FUSEDOPT_NO_TENSOR_LAYOUT");  // for tests of the other way
    if ((off && *off) || !has_torch_functions()) return nullptr;
    return find_layout(found) ? new TensorLayout(found) : nullptr;
  });
}

}  // namespace fusedopt
