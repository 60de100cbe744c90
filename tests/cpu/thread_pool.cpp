// Drives the thread pool of csrc/host/threads.cpp from several threads at once, for ThreadSanitizer: steps of different
// widths, summoned helpers that find work and that find none, tasks that are over before a helper wakes.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "host/threads.h"

using fusedopt::int64;

namespace {

constexpr int64 kRounds = 300, kElements = 257;
std::atomic<int> helped{0};  // tasks that another thread ran than the caller

int64 count_of(int64 round) { return round % 10 == 0 ? 8 : round % 3 == 0 ? 2 : kElements; }

// Each element is written by exactly one task, and read after the pass by the caller.
bool passes(int caller) {
  std::vector<int64> elements(kElements);
  int64 sum = 0, expected = 0;
  for (int64 round = 0; round < kRounds; ++round) {
    const int threads = 1 + int((round + caller) % 4);
    if (round % 2) fusedopt::summon(threads);
    const auto here = std::this_thread::get_id();
    fusedopt::parallel_for(threads, count_of(round), [&](int64 i) {
      elements[size_t(i)] += i + round;
      if (std::this_thread::get_id() != here) ++helped;
      if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));  // so that helpers come
    });
    for (int64 i = 0; i < count_of(round); ++i) expected += i + round;
    if (round % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(400));  // helpers fall asleep
  }
  for (const int64 each : elements) sum += each;
  return sum == expected;
}

}  // namespace

int main() {
  std::vector<std::thread> callers;
  std::vector<char> good(3, false);
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&good, caller] { good[size_t(caller)] = passes(caller); });
  for (std::thread& each : callers) each.join();
  for (const char each : good)
    if (!each) return 1;
  if (helped == 0) return 2;
  std::puts("done");
  return 0;
}
