// Functions of libraries that are found at run time, on every system.
#pragma once

#include <string>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace fusedopt {

// Loads a library, for ever. Null if that fails; then `problem` says why.
inline void* load_library(const char* name, std::string& problem) {
#if defined(_WIN32)
  void* const library = reinterpret_cast<void*>(LoadLibraryA(name));
  if (!library) problem = std::string(name) + ": Windows error " + std::to_string(GetLastError());
#else
  void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) problem = dlerror();
#endif
  return library;
}

// A function of a loaded library, or null.
inline void* find_symbol(void* library, const char* name) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

// A function of a library that somebody else has loaded and keeps; null if nobody has.
inline void* find_loaded_symbol(const char* library, const char* name) {
#if defined(_WIN32)
  const HMODULE module = GetModuleHandleA(library);
  return module ? find_symbol(reinterpret_cast<void*>(module), name) : nullptr;
#else
  void* const handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return nullptr;
  void* const found = dlsym(handle, name);
  dlclose(handle);
  return found;
#endif
}

}  // namespace fusedopt
