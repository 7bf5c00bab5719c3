// Threads of our own, for work that waits: XLA's pool has as many as cores, and a read that waits would hold one of them.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace effjax {

class Pool {
 public:
  // Throws std::bad_alloc where the system gives no more threads.
  explicit Pool(int64_t threads) {
    threads_.reserve(static_cast<size_t>(threads));
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStack);
    bool all = true;
    for (int64_t i = 0; all && i < threads; ++i) {
      pthread_t thread;
      all = pthread_create(&thread, &attributes, Serve, this) == 0;
      if (all) threads_.push_back(thread);
    }
    pthread_attr_destroy(&attributes);
    if (all) return;
    Close();
    throw std::bad_alloc();
  }

  ~Pool() { Close(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Runs `task(i)` for 0 <= i < n on the caller and at most `helpers` threads; several callers may be inside at once.
  // One task alone never waits for a thread to wake.
  void Run(int64_t n, int64_t helpers, const std::function<void(int64_t)>& task) {
    auto job = std::make_shared<Job>();
    job->n = n;
    job->task = &task;
    const int64_t tickets = std::min<int64_t>({helpers, n - 1, static_cast<int64_t>(threads_.size())});
    if (tickets > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t i = 0; i < tickets; ++i) queue_.push_back(job);
    }
    for (int64_t i = 0; i < tickets; ++i) wake_.notify_one();
    job->Work();
    std::unique_lock<std::mutex> lock(job->mutex);
    job->finished.wait(lock, [&] { return job->done == n; });
  }

 private:
  struct Job {
    int64_t n = 0;
    const std::function<void(int64_t)>* task = nullptr;  // the caller's, alive until `done` is `n`
    std::atomic<int64_t> next{0};
    int64_t done = 0;  // behind the mutex
    std::mutex mutex;
    std::condition_variable finished;

    // A helper that comes late finds no number left and touches nothing of the caller's.
    void Work() {
      int64_t mine = 0;
      for (int64_t i; (i = next.fetch_add(1)) < n; ++mine) (*task)(i);
      if (mine == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      done += mine;
      if (done == n) finished.notify_all();
    }
  };

  static constexpr size_t kStack = 512 << 10;  // by default 8 MB of each thread would count as this process's memory

  static void* Serve(void* self) {
    Pool& pool = *static_cast<Pool*>(self);
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(pool.mutex_);
        pool.wake_.wait(lock, [&] { return pool.closing_ || !pool.queue_.empty(); });
        if (pool.queue_.empty()) return nullptr;
        job = std::move(pool.queue_.front());
        pool.queue_.pop_front();
      }
      job->Work();
    }
  }

  void Close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> queue_;
  bool closing_ = false;
  std::vector<pthread_t> threads_;
};

}  // namespace effjax
