#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace fusedopt {
namespace {

class Pool {
 public:
  void run(int threads, int64 count, const std::function<void(int64)>& task) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    const int helpers = int(std::min<int64>(threads, count)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < helpers) {
        std::thread(&Pool::work, this, generation_).detach();
        ++workers_;
      }
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      places_ = helpers;
      ++generation_;
    }
    for (int i = 0; i < helpers; ++i) start_.notify_one();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void drain() {
    for (int64 i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
  }

  void work(unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
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

  std::mutex run_mutex_, mutex_;
  std::condition_variable start_, done_;
  unsigned long generation_ = 0;
  int workers_ = 0;
  int places_ = 0;  // for helpers that have not come yet
  int busy_ = 0;    // helpers that have
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
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
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

}  // namespace fusedopt
