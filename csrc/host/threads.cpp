#include "threads.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace fusedopt {
namespace {

class Pool {
 public:
  void run(int threads, int64 count, const std::function<void(int64)>& task) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    int helpers = int(std::min<int64>({threads, count, kMostThreads})) - 1;
    int asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      hire(helpers);
      helpers = std::min(helpers, workers_);
      asleep = helpers - awake_;
      summoned_ = 0;
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      places_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    for (int i = 0; i < asleep; ++i) start_.notify_one();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void summon(int helpers) {
    std::lock_guard<std::mutex> lock(mutex_);
    hire(std::min(helpers, kMostThreads - 1));
    summoned_ = std::max(std::min(helpers, workers_) - awake_, 0);
    if (summoned_ > 0) start_.notify_one();  // who wakes the next one
  }

 private:
  // Where the system gives no more threads, those that are there do the work.
  void hire(int helpers) {
    try {
      for (; workers_ < helpers; ++workers_) std::thread(&Pool::work, this, generation_.load()).detach();
    } catch (const std::system_error&) {
    }
  }

  void drain() {
    for (int64 i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
  }

  void work(unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen || summoned_ > 0; });
      if (generation_ == seen) {
        if (--summoned_ > 0) start_.notify_one();
        ++awake_;
        lock.unlock();
        await(seen);
        lock.lock();
        --awake_;
        if (generation_ == seen) continue;
      }
      seen = generation_;
      if (places_ == 0) continue;
      --places_;
      ++busy_;
      lock.unlock();
      drain();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  // Awake, for some time.
  void await(unsigned long seen) const {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < deadline) {
    }
  }

  static constexpr std::chrono::microseconds kPatience{200};
  static constexpr int kMostThreads = 1024;

  std::mutex run_mutex_, mutex_;
  std::condition_variable start_, done_;
  std::atomic<unsigned long> generation_{0};  // of tasks; written under mutex_
  int workers_ = 0;
  int summoned_ = 0;  // helpers that are to wake without a task
  int awake_ = 0;     // helpers that wait for one awake
  int places_ = 0;    // for helpers that have not come yet
  int busy_ = 0;      // helpers that have
  const std::function<void(int64)>* task_ = nullptr;
  int64 count_ = 0;
  std::atomic<int64> next_{0};
};

std::atomic<Pool*> pool{nullptr};

// Never destroyed: its threads may outlive static destructors. A forked child has none of the threads and
// perhaps a held mutex, so it forgets the pool and makes its own.
Pool& get_pool() {
  static const bool registered = [] {
    pool.store(new Pool);
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
#endif
    return true;
  }();
  (void)registered;
  return *pool.load();
}

}  // namespace

void parallel_for(int threads, int64 count, const std::function<void(int64)>& task) {
  if (threads <= 1 || count <= 1) {
    for (int64 i = 0; i < count; ++i) task(i);
    return;
  }
  get_pool().run(threads, count, task);
}

void summon(int threads) {
  if (threads > 1) get_pool().summon(threads - 1);
}

}  // namespace fusedopt
