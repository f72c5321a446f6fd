// Threads that share the tasks of one call. They are started on first use and sleep between calls.
//
// Thread safety: calls run one after the other. A forked child starts threads of its own.
#pragma once

#include <functional>

#include "base/types.h"

namespace kvmem {

// Calls work(task) once for each task of [0, tasks), on at most `threads` threads, the caller included. The first
// exception is thrown again here, after all threads have stopped; some tasks are left out then. REQUIRES: work calls no
// run_tasks(). Cost: two switches of a sleeping thread for each thread but one.
void run_tasks(i64 tasks, i64 threads, const std::function<void(i64 task)>& work);

}  // namespace kvmem
