// How the tokens of a call become batches: which sequences go through the blocks together, and in what pieces.
#pragma once

#include <algorithm>
#include <vector>

#include "engine.h"

namespace wkv {

// Sequences one after the other, without a gap, cut where a batch is full.
class Plan {
 public:
  // n sequences of `lengths` tokens each, or of equal length where that is null; batches of up to `most` rows.
  // from, to: (n,) rows of the states, or null: 0 .. n - 1.
  Plan(int n, int64_t tokens, const int64_t* lengths, const int64_t* from, const int64_t* to, int most) {
    const size_t full = tokens / most;
    sequences_.reserve(n + full);  // the batches point into it
    batches_.reserve(full + 1);
    for (int j = 0, rows = 0; j < n; ++j) {
      const int64_t length = lengths ? lengths[j] : tokens / n;
      for (int64_t t = 0; t < length;) {
        const int some = static_cast<int>(std::min<int64_t>(length - t, most - rows));
        if (rows == 0) batches_.push_back({0, 0, sequences_.data() + sequences_.size()});
        const int64_t target = to ? to[j] : j, source = t > 0 ? target : from ? from[j] : j;
        sequences_.push_back({rows, rows + some, source, target, t > 0, t + some == length});
        rows += some, t += some;
        batches_.back().rows = rows;
        ++batches_.back().n_sequences;
        if (rows == most) rows = 0;
      }
    }
  }

  int n_batches() const { return static_cast<int>(batches_.size()); }
  const Batch* batches() const { return batches_.data(); }

 private:
  std::vector<Sequence> sequences_;
  std::vector<Batch> batches_;
};

}  // namespace wkv
