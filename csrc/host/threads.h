// A pool of threads. libtorch is not linked, so its pool cannot be used.
#pragma once

#include <functional>

#include "../core/structs.h"

namespace fusedopt {

// Calls task(i) once for each i in [0, count) on up to `threads` threads, the calling one included, and
// returns when all are done. Threads that wake up too late to find work are not waited for. Which thread runs which
// task is not fixed: tasks must not depend on it. Safe to call from several threads (one at a time is served) and after
// fork().
void parallel_for(int threads, int64 count, const std::function<void(int64)>& task);

// Wakes the threads that a `parallel_for` with so many will want in a moment. To wake one takes longer than a step may
// spend, so they wake while the caller gets ready; if nothing comes they go back to sleep.
void summon(int threads);

}  // namespace fusedopt
