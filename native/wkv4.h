// RWKV-4: the fading sums aa e^pp and bb e^pp of every channel. Equations: wkv/ops/wkv4.
// Included once per instruction set, inside that set's namespace.

constexpr int kChannels = 256;  // of a task

// x e^p and x' e^p' over a common e^q, q = max(p, p'): the factors that x and x' take.
struct Shares {
  f8 old, fresh;

  Shares(f8 p, f8 p_fresh) {
    const f8 difference = p - p_fresh;
    const i8 keeps = difference >= 0.0f;
    const f8 less = exp(keeps ? -difference : difference);
    old = keeps ? splat(1.0f) : less;
    fresh = keeps ? less : splat(1.0f);
  }
};

struct Sums4 {
  float *aa, *bb, *pp;  // of a task's channels

  template <class Count>
  void step(int i, Count count, f8 log_w, f8 k, f8 v, const Sums4& after) const {
    const f8 faded = load(pp + i, count) + log_w;
    const Shares shares(faded, k);
    store(after.aa + i, multiply_add(shares.old, load(aa + i, count), shares.fresh * v), count);
    store(after.bb + i, multiply_add(shares.old, load(bb + i, count), shares.fresh), count);
    store(after.pp + i, max(faded, k), count);
  }
};

struct Task4 {
  int row, begin, width;  // channels begin .. begin + width of a row

  Task4(const Tokens& tokens, int task) {
    const int pieces = (tokens.K + kChannels - 1) / kChannels;
    row = task / pieces, begin = task % pieces * kChannels;
    width = std::min(kChannels, tokens.K - begin);
  }
};

int tasks4(const Tokens& tokens) { return tokens.B * ((tokens.K + kChannels - 1) / kChannels); }

Sums4 sums_at(float* base, int64_t i) {
  float* at = base + i * 3 * kChannels;
  return {at, at + kChannels, at + 2 * kChannels};
}

void copy_state(const float* state, const Tokens& tokens, const Task4& task, const Sums4& sums) {
  const float* from = state + int64_t{task.row} * 3 * tokens.K + task.begin;
  float* const to[] = {sums.aa, sums.bb, sums.pp};
  for (int i = 0; i < 3; ++i) std::memcpy(to[i], from + int64_t{i} * tokens.K, task.width * sizeof(float));
}

void wkv4(const Tokens& tokens, const Wkv4& in, float* y, float* state, float*, int threads) {
  Tasks tasks(tasks4(tokens));
  Pool::shared().run(threads, [&](Team&) {
    tasks.work([&](int i) {
      const Task4 task(tokens, i);
      alignas(64) float buffer[3 * kChannels];
      const Sums4 sums = sums_at(buffer, 0);
      copy_state(in.state, tokens, task, sums);
      const int T = tokens.length(task.row);
      for (int t = 0; t < T; ++t) {
        const int64_t at = (int64_t{task.row} * tokens.T + t) * tokens.K + task.begin;
        for_eights(0, task.width, [&](int c, auto count) {
          const f8 k = load(in.k + at + c, count), v = load(in.v + at + c, count);
          const Shares own(load(sums.pp + c, count), load(in.u + task.begin + c, count) + k);
          const f8 above = multiply_add(own.old, load(sums.aa + c, count), own.fresh * v);
          store(y + at + c, above / multiply_add(own.old, load(sums.bb + c, count), own.fresh), count);
          sums.step(c, count, load(in.log_w + task.begin + c, count), k, v, sums);
        });
      }
      for (int t = T; t < tokens.T; ++t) {
        const int64_t at = (int64_t{task.row} * tokens.T + t) * tokens.K + task.begin;
        std::memset(y + at, 0, task.width * sizeof(float));
      }
      float* end = state + int64_t{task.row} * 3 * tokens.K + task.begin;
      const float* const from[] = {sums.aa, sums.bb, sums.pp};
      for (int s = 0; s < 3; ++s) std::memcpy(end + int64_t{s} * tokens.K, from[s], task.width * sizeof(float));
    });
  });
}

size_t wkv4_floats(const Tokens& tokens) {  // that a thread needs
  const int chunk = chunk_of(tokens.T), chunks = (tokens.T + chunk - 1) / chunk;
  return size_t{3} * kChannels * (chunks + chunk + 2) + 2 * kChannels;
}

// What later tokens want of the sums, alpha e^rho and beta e^rho, walks from the end to the start: the same
// recurrence, with leaves dy / Z and -y dy / Z whose exponent is that of 1 / Z.
void wkv4_backward(const Tokens& tokens, const Wkv4& in, const float* dy, const float* dstate,
                   const Wkv4Gradients& out, float* scratch, int threads) {
  const int chunk = chunk_of(tokens.T);
  const size_t floats = wkv4_floats(tokens);
  Tasks tasks(tasks4(tokens));
  Pool::shared().run(threads, [&](Team& team) {
    float* mine = scratch + team.index() * (floats + 16);
    tasks.work([&](int i) {
      const Task4 task(tokens, i);
      const int T = tokens.length(task.row), width = task.width, chunks = (T + chunk - 1) / chunk;
      const float *log_w = in.log_w + task.begin, *u = in.u + task.begin;
      const auto place = [&](int t) { return (int64_t{task.row} * tokens.T + t) * tokens.K + task.begin; };
      float *borders = mine, *within = sums_at(borders, chunks + 1).aa, *dw = sums_at(within, chunk).aa;
      float* du = dw + kChannels;
      std::memset(dw, 0, 2 * kChannels * sizeof(float));
      const auto step = [&](int t, const Sums4& before, const Sums4& after) {
        const int64_t at = place(t);
        for_eights(0, width, [&](int c, auto count) {
          before.step(c, count, load(log_w + c, count), load(in.k + at + c, count), load(in.v + at + c, count), after);
        });
      };

      copy_state(in.state, tokens, task, sums_at(borders, 0));
      for (int t = 0; t < T; ++t) {
        const int border = t / chunk;
        step(t, sums_at(borders, t % chunk ? border + 1 : border), sums_at(borders, border + 1));
      }
      const Sums4 wanted = sums_at(borders, chunks);  // the end, from here on in place: alpha, beta, rho
      const float* wants = dstate + int64_t{task.row} * 3 * tokens.K + task.begin;
      for_eights(0, width, [&](int c, auto count) {
        store(wanted.aa + c, load(wants + c, count), count);
        store(wanted.bb + c, load(wants + tokens.K + c, count), count);
        store(wanted.pp + c, -load(wanted.pp + c, count), count);
      });

      for (int j = chunks - 1; j >= 0; --j) {
        const int begin = j * chunk, end = std::min(T, begin + chunk);
        const auto before = [&](int t) { return t == begin ? sums_at(borders, j) : sums_at(within, t - begin); };
        for (int t = begin; t + 1 < end; ++t) step(t, before(t), before(t + 1));
        for (int t = end - 1; t >= begin; --t) {
          const int64_t at = place(t);
          const Sums4 sums = before(t);
          for_eights(0, width, [&](int c, auto count) {
            const f8 k = load(in.k + at + c, count), v = load(in.v + at + c, count), w = load(log_w + c, count);
            const f8 aa = load(sums.aa + c, count), bb = load(sums.bb + c, count), pp = load(sums.pp + c, count);
            const f8 alpha = load(wanted.aa + c, count), beta = load(wanted.bb + c, count);
            const f8 rho = load(wanted.pp + c, count), own = load(u + c, count) + k;
            const Shares shares(pp, own);
            const f8 Z = multiply_add(shares.old, bb, shares.fresh);
            const f8 y = multiply_add(shares.old, aa, shares.fresh * v) / Z;
            const f8 leaf = load(dy + at + c, count) / Z, d_own = shares.fresh * leaf * (v - y);
            const f8 later = exp(k + rho), fade = exp(w + pp + rho);
            store(out.v + at + c, multiply_add(later, alpha, shares.fresh * leaf), count);
            store(out.k + at + c, multiply_add(later, multiply_add(alpha, v, beta), d_own), count);
            store(du + c, load(du + c, count) + d_own, count);
            store(dw + c, multiply_add(fade, multiply_add(alpha, aa, beta * bb), load(dw + c, count)), count);
            const f8 q = -max(pp, own);
            const Shares next(rho + w, q);
            store(wanted.aa + c, multiply_add(next.old, alpha, next.fresh * leaf), count);
            store(wanted.bb + c, multiply_add(next.old, beta, -(next.fresh * leaf * y)), count);
            store(wanted.pp + c, max(rho + w, q), count);
          });
        }
      }

      for (int t = T; t < tokens.T; ++t) {
        std::memset(out.k + place(t), 0, width * sizeof(float));
        std::memset(out.v + place(t), 0, width * sizeof(float));
      }
      const int64_t channel = int64_t{task.row} * tokens.K + task.begin;
      float* start = out.state + int64_t{task.row} * 3 * tokens.K + task.begin;
      for_eights(0, width, [&](int c, auto count) {
        store(out.log_w + channel + c, load(dw + c, count), count);
        store(out.u + channel + c, load(du + c, count), count);
        const f8 scale = exp(load(wanted.pp + c, count) + load(in.state + (start - out.state) + 2 * tokens.K + c, count));
        store(start + c, scale * load(wanted.aa + c, count), count);
        store(start + tokens.K + c, scale * load(wanted.bb + c, count), count);
        store(start + 2 * tokens.K + c, f8{}, count);
      });
    });
  });
}
