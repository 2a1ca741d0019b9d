// A team of threads that works on one job at a time, in step.
//
//     Pool::shared().run(threads, [&](Team& team) {
//       auto [begin, end] = team.share(n, 16);   // this thread's part of 0 .. n
//       ...
//       team.sync();                              // nobody goes on before all are here
//     });
//
// The caller is one of the team. The others are the threads of the OpenMP that torch has loaded, where it is GNU's or
// speaks its language: they spin for a moment after each job, and two teams that spin would take each other's cores.
// Elsewhere, and in the child of a fork, the pool has threads of its own, which spin for a moment too, because a token's
// layers follow each other within microseconds, and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>

namespace wkv {

struct Range {
  int begin, end;
};

// Every waiting loop: first hot, then kind to others who want the core.
class Patience {
 public:
  void wait();

 private:
  int spins_ = 0;
};

class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      epoch_.store(epoch + 1, std::memory_order_release);
    } else {
      Patience patience;
      while (epoch_.load(std::memory_order_acquire) == epoch) patience.wait();
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
};

// One thread's view of the job: who it is, how many there are.
class Team {
 public:
  Team(int index, int count, Barrier& barrier) : index_(index), count_(count), barrier_(barrier) {}

  int index() const { return index_; }
  int count() const { return count_; }
  void sync() { barrier_.wait(count_); }

  // This thread's part of 0 .. n: whole grains, as equal as they can be. What is computed for an element never
  // depends on the part that it falls in, so results do not depend on the number of threads.
  Range share(int n, int grain) const {
    const int64_t grains = (n + grain - 1) / grain;
    const auto border = [&](int i) {
      const int64_t end = grains * i / count_ * grain;
      return static_cast<int>(end < n ? end : n);
    };
    return {border(index_), border(index_ + 1)};
  }

 private:
  int index_, count_;
  Barrier& barrier_;
};

class Pool {
 public:
  static constexpr int kMostThreads = 256;

  static Pool& shared();

  // Whether the team is OpenMP's.
  static bool borrows();

  // Runs job(team) on `count` threads (1 .. kMostThreads), or on those that the system gives, and returns when all
  // are through. Jobs of several callers run one after the other. The job must not throw, nor call `run`.
  template <class Job>
  void run(int count, Job&& job) {
    using Plain = std::remove_reference_t<Job>;
    run_erased(count, [](void* self, Team& team) { (*static_cast<Plain*>(self))(team); },
               const_cast<std::remove_const_t<Plain>*>(&job));
  }

 private:
  using Call = void (*)(void*, Team&);

  struct Worker {
    alignas(64) std::atomic<uint32_t> ticket{0};
  };

  void run_erased(int count, Call call, void* self);
  void run_on_own(int count, Call call, void* self);
  void work(Worker& worker, int index);

  std::mutex busy_;
  std::deque<Worker> workers_;  // worker i has the index i + 1; a deque, because they never move
  Call call_ = nullptr;
  void* self_ = nullptr;
  int count_ = 1;
  Barrier barrier_;
  alignas(64) std::atomic<int> running_{0};
};

}  // namespace wkv
