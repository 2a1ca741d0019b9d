// RWKV-5, 6 and 7: a memory of K x V numbers per head. Equations: wkv/ops/wkv6 and wkv/ops/wkv7.
// Included once per instruction set, inside that set's namespace.
//
// A memory is kept in tiles of 32, 16 or 8 value channels, each (K, channels): value channels do not meet but
// in the gradients of r, w, k, kappa and a, which add up over the tiles. K and V are filled up with zeros to whole
// eights there, which neither read nor write anything. With c = kappa * a, and M = S^T:
//
//     RWKV-7   removed = kappa^T M    M' = w M - c removed^T + k v^T    y = M'^T r
//     RWKV-6                          M' = w M + k v^T                  y = M^T r + (r . u k) v
//
// Where r, w, k, v, kappa and c come from, and where y and the gradients go, is the matter of the two ends of a task:
// WkvEnds for the operators themselves, TimeMix7Ends (time_mix7.h) for all that stands between matrix products.

// A chunk of tokens of one head: (tokens, K), or (tokens, V) for values.
struct Chunk {
  float *r, *w, *k, *kappa, *c;
  float *v, *y;  // y, or backward its gradient
  float *dr, *dw, *dk, *dkappa, *dc, *dv;
  float* removed;  // (tokens, 32) of the tile at hand
};

constexpr int kTileWidth = 4 * kLanes;

int eights(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

int64_t chunk_floats(const Tokens& tokens, int chunk) {
  return int64_t{chunk} * (10 * eights(tokens.K) + 3 * eights(tokens.V) + kTileWidth);
}

template <class Ends>
size_t heads_floats(const Tokens& tokens) {  // that a thread needs
  const int chunk = chunk_of(tokens.T), chunks = (tokens.T + chunk - 1) / chunk;
  const size_t K = eights(tokens.K), memory = K * eights(tokens.V);
  return chunk_floats(tokens, chunk) + Ends::floats(K, chunk) + memory * (chunks + 2) + K * kTileWidth * (chunk + 1);
}

Chunk chunk_at(float*& at, const Tokens& tokens, int chunk) {
  const auto take = [&](int width) {
    float* taken = at;
    at += int64_t{chunk} * width;
    return taken;
  };
  Chunk x;
  for (float** keys : {&x.r, &x.w, &x.k, &x.kappa, &x.c, &x.dr, &x.dw, &x.dk, &x.dkappa, &x.dc}) *keys = take(eights(tokens.K));
  for (float** values : {&x.v, &x.y, &x.dv}) *values = take(eights(tokens.V));
  x.removed = take(kTileWidth);
  return x;
}

template <int W>
using Tile = std::integral_constant<int, W>;

// each(v0, Tile<W>): W eights of value channels from v0 on.
template <class Each>
void for_tiles(int V, Each&& each) {
  int v0 = 0;
  for (; v0 + 4 * kLanes <= V; v0 += 4 * kLanes) each(v0, Tile<4>{});
  if (v0 + 2 * kLanes <= V) each(v0, Tile<2>{}), v0 += 2 * kLanes;
  if (v0 < V) each(v0, Tile<1>{});
}

template <int W>
inline void load(const float* p, f8 (&x)[W]) {
  for (int j = 0; j < W; ++j) x[j] = load(p + j * kLanes);
}

template <int W>
inline void store(float* p, const f8 (&x)[W]) {
  for (int j = 0; j < W; ++j) store(p + j * kLanes, x[j]);
}

// kappa^T M of a tile. Even and odd keys have sums of their own, or each addition would wait for the one before.
template <int W>
void remove(const float* kappa, int K, const float* memory, f8 (&removed)[W]) {
  f8 odd[W] = {};
  for (int j = 0; j < W; ++j) removed[j] = f8{};
  for (int k = 0; k < K; k += 2) {
    const f8 one = splat(kappa[k]), other = splat(kappa[k + 1]);
    for (int j = 0; j < W; ++j) {
      removed[j] = multiply_add(load(memory + (k * W + j) * kLanes), one, removed[j]);
      odd[j] = multiply_add(load(memory + ((k + 1) * W + j) * kLanes), other, odd[j]);
    }
  }
  for (int j = 0; j < W; ++j) removed[j] += odd[j];
}

// Token t of the chunk in the tile at v0: the memory after it, which may lie where it was before. Reads y where
// kReads; RWKV-7 leaves what it removed in x.removed.
template <bool kDelta, bool kReads, int W>
void forward_token(const Chunk& x, int t, int K, int V, int v0, const float* before, float* after) {
  const float *r = x.r + t * K, *w = x.w + t * K, *key = x.k + t * K, *c = x.c + t * K;
  f8 v[W], y[W] = {}, removed[W];
  load(x.v + t * V + v0, v);
  if constexpr (kDelta) {
    remove(x.kappa + t * K, K, before, removed);
    store(x.removed + t * kTileWidth, removed);
  }
  for (int k = 0; k < K; ++k) {
    // Read here, once: for all that the compiler knows, the stores below could change them.
    const f8 fade = splat(w[k]), erase = splat(-c[k]), write = splat(key[k]), read = splat(r[k]);
    for (int j = 0; j < W; ++j) {
      const int at = (k * W + j) * kLanes;
      const f8 old = load(before + at);
      f8 fresh = old * fade;
      if constexpr (kDelta) fresh = multiply_add(removed[j], erase, fresh);
      fresh = multiply_add(v[j], write, fresh);
      store(after + at, fresh);
      if constexpr (kReads) y[j] = multiply_add(kDelta ? fresh : old, read, y[j]);
    }
  }
  if constexpr (kReads) store(x.y + t * V + v0, y);
}

// The gradient G of the memory after token t becomes that of the memory before it; x's gradients grow.
template <bool kDelta, int W>
void backward_token(const Chunk& x, int t, int K, int V, int v0, const float* before, const float* after, float* G) {
  const float *r = x.r + t * K, *w = x.w + t * K, *key = x.k + t * K, *kappa = x.kappa + t * K, *c = x.c + t * K;
  f8 v[W], dy[W], removed[W], dv[W], dremoved[W] = {};
  load(x.v + t * V + v0, v);
  load(x.y + t * V + v0, dy);
  load(x.dv + t * V + v0, dv);
  if constexpr (kDelta) load(x.removed + t * kTileWidth, removed);
  const auto add = [&](float* to, int k, const f8(&eight)[kLanes]) {
    float* at = to + t * K + k;
    store(at, load(at) + sums(eight));
  };
  for (int k0 = 0; k0 < K; k0 += kLanes) {
    f8 from_read[kLanes], from_decay[kLanes], from_key[kLanes], from_removal[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int k = k0 + i;
      const f8 r_k = splat(r[k]), w_k = splat(w[k]), c_k = splat(-c[k]), key_k = splat(key[k]);
      f8 read{}, decay{}, written{}, removal{};
      for (int j = 0; j < W; ++j) {
        const int at = (k * W + j) * kLanes;
        const f8 old = load(before + at);
        f8 g = load(G + at);
        read = multiply_add(kDelta ? load(after + at) : old, dy[j], read);
        if constexpr (kDelta) {
          g = multiply_add(dy[j], r_k, g);
          store(G + at, g);
          removal = multiply_add(g, removed[j], removal);
          dremoved[j] = multiply_add(g, c_k, dremoved[j]);
        } else {
          store(G + at, multiply_add(g, w_k, dy[j] * r_k));
        }
        decay = multiply_add(g, old, decay);
        written = multiply_add(g, v[j], written);
        if constexpr (!kDelta) dv[j] = multiply_add(g, key_k, dv[j]);
      }
      from_read[i] = read, from_decay[i] = decay, from_key[i] = written, from_removal[i] = removal;
    }
    add(x.dr, k0, from_read);
    add(x.dw, k0, from_decay);
    add(x.dk, k0, from_key);
    if constexpr (kDelta) add(x.dc, k0, from_removal);
  }
  if constexpr (!kDelta) return store(x.dv + t * V + v0, dv);
  for (int k0 = 0; k0 < K; k0 += kLanes) {
    f8 from_kappa[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int k = k0 + i;
      const f8 kappa_k = splat(kappa[k]), w_k = splat(w[k]), key_k = splat(key[k]);
      f8 kept{};
      for (int j = 0; j < W; ++j) {
        const int at = (k * W + j) * kLanes;
        const f8 g = load(G + at);
        kept = multiply_add(load(before + at), dremoved[j], kept);
        dv[j] = multiply_add(g, key_k, dv[j]);  // above, all registers are taken
        store(G + at, multiply_add(dremoved[j], kappa_k, g * w_k));
      }
      from_kappa[i] = kept;
    }
    add(x.dkappa, k0, from_kappa);
  }
  store(x.dv + t * V + v0, dv);
}

// copy(i, v, k): the number for channels v and k is the i-th of the tiles.
template <class Copy>
void for_memory(int K, int V, Copy&& copy) {
  for_tiles(V, [&](int v0, auto tile) {
    constexpr int width = decltype(tile)::value * kLanes;
    for (int v = 0; v < width; ++v) {
      for (int k = 0; k < K; ++k) copy(int64_t{v0} * K + k * width + v, v0 + v, k);
    }
  });
}

// One head of one row of tokens.
struct Head {
  const Tokens& tokens;
  const int row, head, T;

  Head(const Tokens& tokens, int task)
      : tokens(tokens), row(task / tokens.H), head(task % tokens.H), T(tokens.length(task / tokens.H)) {}

  // Where its numbers are: in (B, H, ...), and those of token t in (B, T, H, width).
  int64_t index() const { return int64_t{row} * tokens.H + head; }
  int64_t at(int t, int width) const { return ((int64_t{row} * tokens.T + t) * tokens.H + head) * width; }

  // Zeros for the tokens beyond the row's length.
  void clear(float* of, int width) const {
    for (int t = T; t < tokens.T; ++t) std::memset(of + at(t, width), 0, width * sizeof(float));
  }
};

// `width` numbers, filled up with zeros.
inline void fetch(const float* from, int width, float* to) {
  for_eights(0, width, [&](int i, auto count) { store(to + i, load(from + i, count)); });
}

// The arrays of wkv6 and wkv7; null what one of them has not.
struct WkvInputs {
  const float *r, *log_w, *k, *v, *kappa, *a, *u, *state;
  bool constant_decay;
};

struct WkvGradients {
  float *r, *log_w, *k, *v, *kappa, *a, *u, *state;
};

template <bool kHasDelta>
class WkvEnds {
 public:
  static constexpr bool kDelta = kHasDelta, kKeeps = false;
  using Inputs = WkvInputs;
  using Gradients = WkvGradients;

  static size_t floats(int K, int) { return size_t{2} * K; }

  WkvEnds(const Head& head, const Inputs& in, const Chunk& x, float* free)
      : head_(head), in_(in), x_(x), N(head.tokens.K), K(eights(N)), V(eights(head.tokens.V)), du_(free), dlog_w_(free + K) {
    std::memset(free, 0, 2 * K * sizeof(float));
  }

  // The tokens begin .. begin + n into the chunk.
  void gather(int begin, int n) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = head_.at(begin + t, N), to = int64_t{t} * K;
      fetch(in_.r + at, N, x_.r + to);
      fetch(in_.k + at, N, x_.k + to);
      fetch(in_.v + values(begin + t), head_.tokens.V, x_.v + int64_t{t} * V);
      const float* log_w = in_.constant_decay ? in_.log_w + int64_t{head_.head} * N : in_.log_w + at;
      for_eights(0, N, [&](int k, auto count) {
        store(x_.w + to + k, exp(load(log_w + k, count)));
        if constexpr (kDelta) {
          const f8 kappa = load(in_.kappa + at + k, count);
          store(x_.kappa + to + k, kappa);
          store(x_.c + to + k, kappa * load(in_.a + at + k, count));
        }
      });
    }
  }

  void gather_again(int begin, int n, const Gradients&) { gather(begin, n); }

  // What the chunk has read, out to y.
  void answer(int begin, int n, float* y) {
    for (int t = 0; t < n; ++t) {
      if constexpr (!kDelta) add(x_.y + t * V, bonus(t), x_.v + t * V);
      std::memcpy(y + values(begin + t), x_.y + t * V, head_.tokens.V * sizeof(float));
    }
  }

  // Backward: the gradient of what was read, and where the others start.
  void ask(int begin, int n, const float* dy, const Gradients&) {
    for (int t = 0; t < n; ++t) {
      float* d = x_.y + t * V;
      fetch(dy + values(begin + t), head_.tokens.V, d);
      if constexpr (kDelta) continue;
      f8 dot{};
      for (int v = 0; v < V; v += kLanes) dot = multiply_add(load(x_.v + t * V + v), load(d + v), dot);
      const float own = sum(dot);
      add(x_.dv + t * V, bonus(t), d);
      for_eights(0, N, [&](int k, auto count) {
        const int64_t at = int64_t{t} * K + k;
        const f8 u = bonus_at(k, count), r = load(x_.r + at), key = load(x_.k + at);
        store(x_.dr + at, u * key * own);
        store(x_.dk + at, u * r * own);
        store(du_ + k, multiply_add(r * key, own, load(du_ + k)));
      });
    }
  }

  void hand_out(int begin, int n, const Gradients& out) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = head_.at(begin + t, N);
      for_eights(0, N, [&](int k, auto count) {
        const int64_t from = int64_t{t} * K + k, to = at + k;
        const f8 decay = load(x_.w + from) * load(x_.dw + from);
        if constexpr (kDelta) {
          const f8 dc = -load(x_.dc + from), kappa = load(x_.kappa + from);
          store(out.kappa + to, multiply_add(load(in_.a + to, count), dc, load(x_.dkappa + from)), count);
          store(out.a + to, kappa * dc, count);
        }
        store(out.r + to, load(x_.dr + from), count);
        store(out.k + to, load(x_.dk + from), count);
        if (in_.constant_decay) {
          store(dlog_w_ + k, load(dlog_w_ + k) + decay);
        } else {
          store(out.log_w + to, decay, count);
        }
      });
      std::memcpy(out.v + values(begin + t), x_.dv + t * V, head_.tokens.V * sizeof(float));
    }
  }

  void finish(const Gradients& out) {
    for (float* gradient : {out.r, out.k, out.kappa, out.a, in_.constant_decay ? nullptr : out.log_w}) {
      if (gradient) head_.clear(gradient, N);
    }
    head_.clear(out.v, head_.tokens.V);
    if (out.u) std::memcpy(out.u + head_.index() * N, du_, N * sizeof(float));
    if (in_.constant_decay) std::memcpy(out.log_w + head_.index() * N, dlog_w_, N * sizeof(float));
  }

 private:
  int64_t values(int t) const { return head_.at(t, head_.tokens.V); }

  f8 bonus_at(int k, auto count) const { return load(in_.u + int64_t{head_.head} * N + k, count); }

  // r . u k, the weight of the current value.
  float bonus(int t) const {
    f8 all{};
    for_eights(0, N, [&](int k, auto count) {
      const int64_t at = int64_t{t} * K + k;
      all = multiply_add(load(x_.r + at) * bonus_at(k, count), load(x_.k + at), all);
    });
    return sum(all);
  }

  void add(float* to, float weight, const float* values) const {
    for (int v = 0; v < V; v += kLanes) store(to + v, multiply_add(load(values + v), weight, load(to + v)));
  }

  const Head& head_;
  const Inputs& in_;
  const Chunk& x_;
  const int N, K, V;  // K and V filled up
  float *du_, *dlog_w_;
};

template <class Ends>
class HeadTask {
 public:
  HeadTask(const Tokens& tokens, const typename Ends::Inputs& in, int task, float* scratch)
      : head_(tokens, task), state_(in.state), K(eights(tokens.K)), V(eights(tokens.V)), chunk_(chunk_of(tokens.T)),
        x_(chunk_at(scratch, tokens, chunk_)), ends_(head_, in, x_, scratch), free_(scratch + Ends::floats(K, chunk_)) {}

  void forward(float* y, float* state) {
    float* memory = free_;
    load_memory(state_, memory);
    for (int begin = 0; begin < head_.T; begin += chunk_) {
      const int n = tokens_from(begin);
      ends_.gather(begin, n);
      for_tiles(V, [&](int v0, auto tile) {
        float* M = memory + int64_t{v0} * K;
        for (int t = 0; t < n; ++t) forward_token<kDelta, true, decltype(tile)::value>(x_, t, K, V, v0, M, M);
      });
      ends_.answer(begin, n, y);
    }
    head_.clear(y, head_.tokens.V);
    store_memory(memory, state);
  }

  void backward(const float* dy, const float* dstate, const typename Ends::Gradients& out) {
    const int chunks = (head_.T + chunk_ - 1) / chunk_;
    const int64_t size = int64_t{K} * V;
    float *borders = free_, *G = borders + size * (chunks + 1), *within = G + size;

    load_memory(state_, borders);
    const int chunks_to_read = Ends::kKeeps ? chunks : chunks - 1;  // the memory at the end is not needed
    for (int i = 0; i < chunks_to_read; ++i) {
      const int begin = i * chunk_, n = tokens_from(begin);
      ends_.gather(begin, n);
      for_tiles(V, [&](int v0, auto tile) {
        const float* M = borders + i * size + int64_t{v0} * K;
        float* next = borders + (i + 1) * size + int64_t{v0} * K;
        for (int t = 0; t < n; ++t) {
          forward_token<kDelta, Ends::kKeeps, decltype(tile)::value>(x_, t, K, V, v0, t ? next : M, next);
        }
      });
      if constexpr (Ends::kKeeps) ends_.keep(begin, n, out);
    }
    load_memory(dstate, G);
    for (int i = chunks - 1; i >= 0; --i) {
      const int begin = i * chunk_, n = tokens_from(begin);
      ends_.gather_again(begin, n, out);
      for (float* gradient : {x_.dr, x_.dw, x_.dk, x_.dkappa, x_.dc}) std::memset(gradient, 0, n * K * sizeof(float));
      std::memset(x_.dv, 0, n * V * sizeof(float));
      ends_.ask(begin, n, dy, out);
      for_tiles(V, [&](int v0, auto tile) {
        constexpr int W = decltype(tile)::value;
        const int64_t tile_size = int64_t{K} * W * kLanes;
        const float* start = borders + i * size + int64_t{v0} * K;
        const auto before = [&](int t) { return t ? within + (t - 1) * tile_size : start; };
        for (int t = 0; t < n; ++t) {
          forward_token<kDelta, false, W>(x_, t, K, V, v0, before(t), within + t * tile_size);
        }
        for (int t = n - 1; t >= 0; --t) {
          backward_token<kDelta, W>(x_, t, K, V, v0, before(t), within + t * tile_size, G + int64_t{v0} * K);
        }
      });
      ends_.hand_out(begin, n, out);
    }
    ends_.finish(out);
    store_memory(G, out.state);
  }

 private:
  static constexpr bool kDelta = Ends::kDelta;

  int tokens_from(int begin) const { return std::min(chunk_, head_.T - begin); }

  void load_memory(const float* state, float* memory) const {
    const int n_keys = head_.tokens.K, n_values = head_.tokens.V;
    const float* S = state + head_.index() * n_keys * n_values;
    for_memory(K, V, [&](int64_t i, int v, int k) {
      memory[i] = v < n_values && k < n_keys ? S[int64_t{v} * n_keys + k] : 0.0f;
    });
  }

  void store_memory(const float* memory, float* state) const {
    const int n_keys = head_.tokens.K, n_values = head_.tokens.V;
    float* S = state + head_.index() * n_keys * n_values;
    for_memory(K, V, [&](int64_t i, int v, int k) {
      if (v < n_values && k < n_keys) S[int64_t{v} * n_keys + k] = memory[i];
    });
  }

  const Head head_;
  const float* state_;
  const int K, V;  // filled up
  const int chunk_;
  const Chunk x_;
  Ends ends_;
  float* free_;
};

// each(HeadTask): every head of every row.
template <class Ends, class Do>
void for_heads(const Tokens& tokens, const typename Ends::Inputs& in, float* scratch, int threads, Do&& each) {
  const size_t floats = heads_floats<Ends>(tokens);
  Tasks tasks(tokens.B * tokens.H);
  Pool::shared().run(threads, [&](Team& team) {
    float* mine = scratch + team.index() * (floats + 16);
    tasks.work([&](int i) {
      HeadTask<Ends> task(tokens, in, i, mine);
      each(task);
    });
  });
}

template <class Ends>
size_t heads_scratch(const Tokens& tokens, int threads) {
  return threads * (heads_floats<Ends>(tokens) + 16);
}

using Ends6 = WkvEnds<false>;
using Ends7 = WkvEnds<true>;

void wkv6(const Tokens& tokens, const Wkv6& in, float* y, float* state, float* scratch, int threads) {
  const WkvInputs heads{in.r, in.log_w, in.k, in.v, nullptr, nullptr, in.u, in.state, in.constant_decay};
  for_heads<Ends6>(tokens, heads, scratch, threads, [&](auto& task) { task.forward(y, state); });
}

void wkv6_backward(const Tokens& tokens, const Wkv6& in, const float* dy, const float* dstate,
                   const Wkv6Gradients& out, float* scratch, int threads) {
  const WkvInputs heads{in.r, in.log_w, in.k, in.v, nullptr, nullptr, in.u, in.state, in.constant_decay};
  const WkvGradients gradients{out.r, out.log_w, out.k, out.v, nullptr, nullptr, out.u, out.state};
  for_heads<Ends6>(tokens, heads, scratch, threads, [&](auto& task) { task.backward(dy, dstate, gradients); });
}

void wkv7(const Tokens& tokens, const Wkv7& in, float* y, float* state, float* scratch, int threads) {
  const WkvInputs heads{in.r, in.log_w, in.k, in.v, in.kappa, in.a, nullptr, in.state, false};
  for_heads<Ends7>(tokens, heads, scratch, threads, [&](auto& task) { task.forward(y, state); });
}

void wkv7_backward(const Tokens& tokens, const Wkv7& in, const float* dy, const float* dstate,
                   const Wkv7Gradients& out, float* scratch, int threads) {
  const WkvInputs heads{in.r, in.log_w, in.k, in.v, in.kappa, in.a, nullptr, in.state, false};
  const WkvGradients gradients{out.r, out.log_w, out.k, out.v, out.kappa, out.a, nullptr, out.state};
  for_heads<Ends7>(tokens, heads, scratch, threads, [&](auto& task) { task.backward(dy, dstate, gradients); });
}
