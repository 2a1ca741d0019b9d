// Compiled once for each instruction set: WKV_ISA is its name.
//
// Every operator is its recurrence, token after token, with the memory in the first-level cache: that takes fewer
// operations than the chunked forms, which trade them for matrix products, and it is the definition itself. Rows,
// heads and channels are shared among the threads; what is computed for one never depends on the others.
//
// Backward, a first pass leaves the memory at the start of every chunk of about sqrt(T) tokens. Then, from the last
// chunk to the first, the memories within it are computed again and kept while the gradient walks back.
#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "pool.h"

namespace wkv::WKV_ISA {
namespace {

#include "vec.h"

int chunk_of(int T) { return std::clamp(static_cast<int>(std::sqrt(static_cast<float>(T))), 16, 64); }

// Gives out 0 .. n - 1, one after the other, to whoever asks next.
class Tasks {
 public:
  explicit Tasks(int n) : n_(n) {}

  template <class Do>
  void work(Do&& each) {
    for (int i = next_.fetch_add(1); i < n_; i = next_.fetch_add(1)) each(i);
  }

 private:
  const int n_;
  std::atomic<int> next_{0};
};

#include "elementwise.h"
#include "shift.h"
#include "wkv4.h"
#include "wkv67.h"
#include "time_mix7.h"

size_t wkv4_scratch(const Tokens& tokens, int threads) { return threads * (wkv4_floats(tokens) + 16); }

}  // namespace

extern const Operators operators;
const Operators operators = {
    wkv4_scratch,       heads_scratch<Ends6>, heads_scratch<Ends7>, heads_scratch<TimeMix7Ends>,
    token_mix_scratch,  wkv4,                 wkv4_backward,        wkv6,
    wkv6_backward,      wkv7,                 wkv7_backward,        time_mix7,
    time_mix7_backward, token_mix,            token_mix_backward,   squared_relu,
    squared_relu_backward,
};

}  // namespace wkv::WKV_ISA
