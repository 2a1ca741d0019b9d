#include "pool.h"

#include <dlfcn.h>
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

// What a compiler makes of `#pragma omp parallel`, as far as it is needed here; found when the program runs, so that
// there is one OpenMP in the process, torch's. Null members where there is none.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned count, unsigned flags);
  int (*index)();
  int (*count)();

  static OpenMP find() {
#if defined(WKV_OWN_THREADS)  // whose locks a sanitizer sees
    return {};
#else
    OpenMP found{};
    found.parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.index = reinterpret_cast<decltype(index)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    found.count = reinterpret_cast<decltype(count)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    return found.parallel && found.index && found.count ? found : OpenMP{};
#endif
  }
};

const OpenMP openmp = OpenMP::find();
bool is_child = false;

// A child has none of the threads that its parent had: what is left of their pool is left alone, and OpenMP, which does
// not know, too.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool.store(nullptr);
  is_child = true;
});

}  // namespace

bool Pool::borrows() { return openmp.parallel != nullptr && !is_child; }

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
    auto* fresh = new Pool;  // never destroyed: its threads may outlive the statics
    if (pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;  // another thread was faster; this one has started nothing
  }
  return *current;
}

void Pool::run_erased(int count, Call call, void* self) {
  std::lock_guard lock(busy_);
  if (count == 1 || !borrows()) return run_on_own(count, call, self);
  call_ = call, self_ = self;
  const auto member = [](void* pool) {
    auto* const me = static_cast<Pool*>(pool);
    Team team(openmp.index(), openmp.count(), me->barrier_);  // as many as it gives, which may be fewer
    me->call_(me->self_, team);
  };
  openmp.parallel(member, this, static_cast<unsigned>(count), 0);
}

void Pool::run_on_own(int count, Call call, void* self) {
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
