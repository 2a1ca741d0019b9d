#include "pool.h"

#include <pthread.h>

#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wkv {
namespace {

constexpr int kHot = 2000;         // spins before the core is offered to others: about 50 microseconds
constexpr int kUntilSleep = 8000;  // of a thread without a job, before it sleeps

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<Pool*> pool{nullptr};

}  // namespace

void Patience::wait() {
  if (++spins_ < kHot) {
    pause();
  } else {
    std::this_thread::yield();
  }
}

Pool& Pool::shared() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    static std::once_flag once;
    // The parent's threads do not exist in a child: what is left of their pool is left alone.
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
    auto* fresh = new Pool;  // never destroyed: its threads may outlive the statics
    if (pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;  // another thread was faster; this one has started nothing
  }
  return *current;
}

void Pool::run_erased(int count, Call call, void* self) {
  std::lock_guard lock(busy_);
  while (static_cast<int>(workers_.size()) < count - 1) {
    Worker& worker = workers_.emplace_back();
    const int index = static_cast<int>(workers_.size());
    try {
      std::thread([this, &worker, index] { work(worker, index); }).detach();
    } catch (const std::system_error&) {  // a limit of the system: whoever is there does it all
      workers_.pop_back();
      count = index;
    }
  }
  call_ = call, self_ = self, count_ = count;
  running_.store(count - 1, std::memory_order_relaxed);
  for (int i = 0; i < count - 1; ++i) {
    workers_[i].ticket.fetch_add(1, std::memory_order_release);
    workers_[i].ticket.notify_one();
  }
  Team team(0, count, barrier_);
  call(self, team);
  Patience patience;
  while (running_.load(std::memory_order_acquire) != 0) patience.wait();
}

void Pool::work(Worker& worker, int index) {
  for (uint32_t done = 0;; ++done) {
    for (int i = 0; i < kUntilSleep && worker.ticket.load(std::memory_order_acquire) == done; ++i) pause();
    while (worker.ticket.load(std::memory_order_acquire) == done) worker.ticket.wait(done);
    Team team(index, count_, barrier_);
    call_(self_, team);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace wkv
