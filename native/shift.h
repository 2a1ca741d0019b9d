// Every token mixed with its predecessor, n times, in one pass over memory: x + (before - x) m_s.
// Included once per instruction set, inside that set's namespace.

constexpr int kTokens = 64;  // of a task

int pieces_of_row(const Tokens& tokens) { return (tokens.T + kTokens - 1) / kTokens; }

// What is read, and how it lies. Of Tokens, H is the number of mixes and K are the channels.
struct Shift {
  const Tokens& tokens;
  const TokenMix& in;
  const float* zeros;  // (K,)

  int64_t place(int row, int t) const { return (int64_t{row} * tokens.T + t) * tokens.K; }

  bool is_first(int row, int t) const { return in.starts && in.starts[int64_t{row} * tokens.T + t]; }

  const float* before(int row, int t) const {
    if (is_first(row, t)) return zeros;
    return t ? in.x + place(row, t - 1) : in.last + int64_t{row} * tokens.K;
  }

  int64_t mix(int s) const { return s * int64_t{tokens.B} * tokens.T * tokens.K; }

  const float* weights(int s, int64_t at) const {  // of the token at this place
    return in.weights + (in.each_token ? mix(s) + at : int64_t{s} * tokens.K);
  }

  // each(i, row, begin, end) for the i-th piece of consecutive tokens.
  template <class Each>
  void for_pieces(Tasks& tasks, Each&& each) const {
    const int pieces = pieces_of_row(tokens);
    tasks.work([&](int i) {
      const int begin = i % pieces * kTokens;
      each(i, i / pieces, begin, std::min(tokens.T, begin + kTokens));
    });
  }
};

size_t token_mix_scratch(const Tokens& tokens, int threads) {
  const size_t K = tokens.K, pieces = size_t(tokens.B) * pieces_of_row(tokens);
  return K + threads * 2 * (K + 16) + pieces * tokens.H * K;
}

void token_mix(const Tokens& tokens, const TokenMix& in, float* const* mixed, float* scratch, int threads) {
  std::memset(scratch, 0, tokens.K * sizeof(float));
  const Shift shift{tokens, in, scratch};
  Tasks tasks(tokens.B * pieces_of_row(tokens));
  Pool::shared().run(threads, [&](Team&) {
    shift.for_pieces(tasks, [&](int, int row, int begin, int end) {
      for (int t = begin; t < end; ++t) {
        const int64_t at = shift.place(row, t);
        const float* before = shift.before(row, t);
        const float* x = in.x + at;
        for (int s = 0; s < tokens.H; ++s) {
          const float* m = shift.weights(s, at);
          float* y = mixed[s] + at;
          for_eights(0, tokens.K, [=](int c, auto count) {
            const f8 from = load(x + c, count);
            store(y + c, multiply_add(load(before + c, count) - from, load(m + c, count), from), count);
          });
        }
      }
    });
  });
}

// A piece walks from its last token to its first and carries what a token's mixes want of its predecessor. The
// gradients of the weights are summed up piece by piece, and then over the pieces, both in a fixed order.
void token_mix_backward(const Tokens& tokens, const TokenMix& in, const float* const* grads,
                        const TokenMixGradients& out, float* scratch, int threads) {
  const int K = tokens.K, n = tokens.H, pieces = tokens.B * pieces_of_row(tokens);
  std::memset(scratch, 0, K * sizeof(float));
  const Shift shift{tokens, in, scratch};
  float *carries = scratch + K, *partial = carries + threads * 2 * int64_t{K + 16};
  Tasks tasks(pieces);
  Pool::shared().run(threads, [&](Team& team) {
    float *carry = carries + team.index() * 2 * int64_t{K + 16}, *wanted = carry + K + 16;
    shift.for_pieces(tasks, [&](int i, int row, int begin, int end) {
      float* sums = partial + int64_t{i} * n * K;
      std::memset(sums, 0, int64_t{n} * K * sizeof(float));
      std::memset(carry, 0, K * sizeof(float));
      if (end < tokens.T && !shift.is_first(row, end)) {
        const int64_t at = shift.place(row, end);
        for (int s = 0; s < n; ++s) {
          const float *grad = grads[s] + at, *m = shift.weights(s, at);
          for_eights(0, K, [=](int c, auto count) {
            store(carry + c, multiply_add(load(grad + c, count), load(m + c, count), load(carry + c, count)), count);
          });
        }
      }
      for (int t = end - 1; t >= begin; --t) {
        const int64_t at = shift.place(row, t);
        const float *x = in.x + at, *before = shift.before(row, t);
        std::memset(wanted, 0, K * sizeof(float));
        float* dx = out.x + at;
        std::memcpy(dx, carry, K * sizeof(float));
        for (int s = 0; s < n; ++s) {
          const float *grad = grads[s] + at, *m = shift.weights(s, at);
          float* sum = sums + int64_t{s} * K;
          float* dm = in.each_token ? out.weights + shift.mix(s) + at : sum;
          for_eights(0, K, [=](int c, auto count) {
            const f8 g = load(grad + c, count), back = g * load(m + c, count);
            const f8 d = g * (load(before + c, count) - load(x + c, count));
            store(wanted + c, load(wanted + c, count) + back, count);
            store(dx + c, load(dx + c, count) + (g - back), count);
            store(dm + c, d + load(sum + c, count), count);
          });
        }
        if (shift.is_first(row, t)) {
          std::memset(carry, 0, K * sizeof(float));
        } else {
          std::swap(carry, wanted);
        }
      }
      if (begin == 0) std::memcpy(out.last + int64_t{row} * K, carry, K * sizeof(float));
    });
    if (in.each_token) return;
    team.sync();
    const auto [first, end] = team.share(n * K, 16);
    for_eights(first, end, [&](int c, auto count) {
      f8 sum{};
      for (int i = 0; i < pieces; ++i) sum += load(partial + int64_t{i} * n * K + c, count);
      store(out.weights + c, sum, count);
    });
  });
}
