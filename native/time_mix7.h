// What stands between the matrix products of RWKV-7's time mix, around its memory. Equations: wkv/ops/time_mix7.
// Included once per instruction set, inside that set's namespace, after wkv67.h.

class TimeMix7Ends {
 public:
  static constexpr bool kDelta = true, kKeeps = true;
  using Inputs = TimeMix7Inputs;
  using Gradients = TimeMix7Gradients;

  static size_t floats(int K, int chunk) { return static_cast<size_t>(3 * K + 1) * chunk + kTimeMix7Parameters * K; }

  TimeMix7Ends(const Head& head, const Inputs& in, const Chunk& x, float* free)
      : head_(head), in_(in), x_(x), N(head.tokens.K), K(eights(N)), sums_(free), rate_(free + kTimeMix7Parameters * K) {
    const int64_t chunk = chunk_of(head.tokens.T) * int64_t{K};
    fade_ = rate_ + chunk, share_ = fade_ + chunk, scale_ = share_ + chunk;
    std::memset(sums_, 0, kTimeMix7Parameters * K * sizeof(float));
    for (const float** channels : {&in_.w0, &in_.a0, &in_.v0, &in_.k_k, &in_.k_a, &in_.r_k, &in_.weight, &in_.bias}) {
      if (*channels) *channels += head.head * N;
    }
  }

  void gather(int begin, int n) { gather<false>(begin, n, {}); }

  // After a first pass with `keep`.
  void gather_again(int begin, int n, const Gradients& kept) { gather<true>(begin, n, kept); }

  // What the heads read, and the sigmoids, are wanted again when the gradient comes back. Until then they lie where
  // gradients will.
  void keep(int begin, int n, const Gradients& out) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = head_.at(begin + t, N), row = int64_t{t} * K;
      const auto copy = [&](const float* from, float* to) { std::memcpy(to + at, from + row, N * sizeof(float)); };
      copy(x_.y, out.g);
      copy(rate_, out.a);
      copy(fade_, out.w);
      if (in_.first) copy(share_, out.s);
    }
  }

  void answer(int begin, int n, float* out) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = head_.at(begin + t, N), row = int64_t{t} * K;
      const Moments m = moments(x_.y + row, N, in_.eps, true);
      const float own = bonus(t);
      for_eights(0, N, [&](int i, auto count) {
        const f8 normed = (load(x_.y + row + i) - m.mean) * m.scale;
        store(out + at + i, answer(normed, own, load(x_.v + row + i), i, count) * load(in_.g + at + i, count), count);
      });
    }
  }

  void ask(int begin, int n, const float* dout, const Gradients& out) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = head_.at(begin + t, N), row = int64_t{t} * K;
      float* d = x_.y + row;  // the normed numbers, then the gradient of what was read
      const Moments m = moments(out.g + at, N, in_.eps, true);
      const float own = bonus(t);
      f8 sum_d{}, sum_dx{}, sum_v{};
      for_eights(0, N, [&](int i, auto count) {
        const f8 x = (load(out.g + at + i, count) - m.mean) * m.scale, v = load(x_.v + row + i);
        const f8 dg = load(dout + at + i, count), danswer = dg * load(in_.g + at + i, count);
        const f8 dx = danswer * load(in_.weight + i, count);
        store(out.g + at + i, dg * answer(x, own, v, i, count), count);
        store(d + i, x);
        store(x_.dv + row + i, danswer * own);
        add(kWeight, i, danswer * x);
        add(kBias, i, danswer);
        sum_d += dx;
        sum_dx = multiply_add(dx, x, sum_dx);
        sum_v = multiply_add(danswer, v, sum_v);
      });
      const float mean = sum(sum_d) / N, slope = sum(sum_dx) / N, down = sum(sum_v);
      for_eights(0, N, [&](int i, auto count) {
        const f8 danswer = load(dout + at + i, count) * load(in_.g + at + i, count);
        const f8 dx = danswer * load(in_.weight + i, count), r = load(x_.r + row + i), k = load(x_.k + row + i);
        const f8 r_k = load(in_.r_k + i, count) * down;
        store(d + i, only((dx - mean - load(d + i) * slope) * m.scale, count));
        store(x_.dr + row + i, k * r_k);
        store(x_.dk + row + i, r * r_k);
        add(kRK, i, r * k * down);
      });
    }
  }

  void hand_out(int begin, int n, const Gradients& out) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = head_.at(begin + t, N), row = int64_t{t} * K;
      f8 along{};  // the length of kappa
      for_eights(0, N, [&](int i, auto count) {
        const f8 kappa = load(x_.kappa + row + i), rate = load(rate_ + row + i), fade = load(fade_ + row + i);
        const f8 dc = -load(x_.dc + row + i), dkappa = multiply_add(rate, dc, load(x_.dkappa + row + i));
        const f8 key = load(in_.k + at + i, count), dk = load(x_.dk + row + i) * key, less = 1.0f - rate;
        const f8 drate = multiply_add(dk, load(in_.k_a + i, count), kappa * dc);
        const f8 da = drate * rate * less;
        const f8 dw = load(x_.dw + row + i) * load(x_.w + row + i) * kStrongest * fade * (1.0f - fade);
        store(x_.dkappa + row + i, dkappa);
        along = multiply_add(kappa, dkappa, along);
        add(kKA, i, -(dk * less));
        add(kA0, i, da);
        add(kW0, i, dw);
        store(out.r + at + i, load(x_.dr + row + i), count);
        store(out.w + at + i, dw, count);
        store(out.a + at + i, da, count);
        f8 dv = load(x_.dv + row + i);
        if (in_.first) {
          const f8 share = load(share_ + row + i), other = 1.0f - share;
          const f8 ds = dv * (load(in_.first + at + i, count) - load(in_.v + at + i, count)) * share * other;
          add(kV0, i, ds);
          store(out.s + at + i, ds, count);
          store(out.first + at + i, dv * share, count);
          dv = dv * other;
        }
        store(out.v + at + i, dv, count);
      });
      const float scale = scale_[t], of_length = scale * kShortest < 1 ? sum(along) : 0;
      for_eights(0, N, [&](int i, auto count) {
        const f8 key = load(in_.k + at + i, count), kept = (1.0f - load(rate_ + row + i)) * load(in_.k_a + i, count);
        const f8 dx = (load(x_.dkappa + row + i) - load(x_.kappa + row + i) * of_length) * scale;
        add(kKK, i, dx * key);
        store(out.k + at + i, multiply_add(dx, load(in_.k_k + i, count), load(x_.dk + row + i) * (1.0f - kept)), count);
      });
    }
  }

  void finish(const Gradients& out) {
    for (float* gradient : {out.r, out.w, out.k, out.v, out.a, out.g, out.first, out.s}) {
      if (gradient) head_.clear(gradient, N);
    }
    for (int i = 0; i < kTimeMix7Parameters; ++i) {
      float* to = out.parameters + ((int64_t{head_.row} * kTimeMix7Parameters + i) * head_.tokens.H + head_.head) * N;
      std::memcpy(to, sums_ + i * K, N * sizeof(float));
    }
  }

 private:
  enum Parameter { kW0, kA0, kV0, kKK, kKA, kRK, kWeight, kBias };
  static constexpr float kStrongest = -0.606530659712633423f;  // -e^(-1/2), log of the strongest decay
  static constexpr float kShortest = 1e-12f;                   // that a key is taken to be when it is normalised

  template <bool kAgain>
  void gather(int begin, int n, const Gradients& kept) {
    for (int t = 0; t < n; ++t) {
      const int64_t from = head_.at(begin + t, N), to = int64_t{t} * K;
      const float square = total(N, [&](int i, auto count) {
        const f8 x = load(in_.k + from + i, count) * load(in_.k_k + i, count);
        store(x_.kappa + to + i, x);
        return x * x;
      });
      const float scale = 1 / std::max(std::sqrt(square), kShortest);
      scale_[t] = scale;
      for_eights(0, N, [&](int i, auto count) {
        const f8 key = load(in_.k + from + i, count), kappa = load(x_.kappa + to + i) * scale;
        const auto sigmoid_of = [&](const float* x, const float* x0, const float* known) {
          return kAgain ? load(known + from + i, count) : sigmoid(load(x0 + i, count) + load(x + from + i, count));
        };
        const f8 rate = sigmoid_of(in_.a, in_.a0, kept.a), fade = sigmoid_of(in_.w, in_.w0, kept.w);
        f8 v = load(in_.v + from + i, count);
        if (in_.first) {
          const f8 share = sigmoid_of(in_.s, in_.v0, kept.s);
          v = multiply_add(load(in_.first + from + i, count) - v, share, v);
          store(share_ + to + i, share);
        }
        store(x_.r + to + i, load(in_.r + from + i, count));
        store(x_.w + to + i, exp(fade * kStrongest));
        store(x_.k + to + i, multiply_add(multiply_add(key, rate, -key), load(in_.k_a + i, count), key));
        store(x_.v + to + i, v);
        store(x_.kappa + to + i, kappa);
        store(x_.c + to + i, kappa * rate);
        store(rate_ + to + i, rate);
        store(fade_ + to + i, fade);
      });
    }
  }

  // Before the gate.
  template <class Count>
  f8 answer(f8 normed, float own, f8 v, int i, Count count) const {
    return multiply_add(v, own, multiply_add(normed, load(in_.weight + i, count), load(in_.bias + i, count)));
  }

  // r . r_k k, the weight of the current value.
  float bonus(int t) const {
    const int64_t row = int64_t{t} * K;
    return total(N, [&](int i, auto count) {
      return load(x_.r + row + i) * load(x_.k + row + i) * load(in_.r_k + i, count);
    });
  }

  void add(Parameter parameter, int i, f8 x) {
    float* to = sums_ + parameter * K + i;
    store(to, load(to) + x);
  }

  const Head& head_;
  Inputs in_;  // parameters: of this head
  const Chunk& x_;
  const int N, K;  // K filled up
  float* sums_;    // of the parameters' gradients
  float *rate_, *fade_, *share_;  // the three sigmoids: (tokens, K)
  float* scale_;                  // 1 / |k k_k|: (tokens,)
};

void time_mix7(const Tokens& tokens, const TimeMix7Inputs& in, float* y, float* state, float* scratch, int threads) {
  for_heads<TimeMix7Ends>(tokens, in, scratch, threads, [&](auto& task) { task.forward(y, state); });
}

void time_mix7_backward(const Tokens& tokens, const TimeMix7Inputs& in, const float* dy, const float* dstate,
                        const TimeMix7Gradients& out, float* scratch, int threads) {
  for_heads<TimeMix7Ends>(tokens, in, scratch, threads, [&](auto& task) { task.backward(dy, dstate, out); });
}
