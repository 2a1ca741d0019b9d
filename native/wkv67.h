// RWKV-5, 6 and 7: a memory of K x V numbers per head. Equations: wkv/ops/wkv6 and wkv/ops/wkv7.
// Included once per instruction set, inside that set's namespace.
//
// A memory is kept in tiles of 32, 16 or 8 value channels, each (K, channels): value channels do not meet but
// in the gradients of r, w, k, kappa and a, which add up over the tiles. K and V are filled up with zeros to whole
// eights there, which neither read nor write anything. With c = kappa * a, and M = S^T:
//
//     RWKV-7   removed = kappa^T M    M' = w M - c removed^T + k v^T    y = M'^T r
//     RWKV-6                          M' = w M + k v^T                  y = M^T r + (r . u k) v

// What both have; null what one has not.
struct Heads {
  const float *r, *log_w, *k, *v, *kappa, *a, *u, *state;
  bool constant_decay;
};

struct HeadGradients {
  float *r, *log_w, *k, *v, *kappa, *a, *u, *state;
};

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

size_t heads_floats(const Tokens& tokens) {  // that a thread needs
  const int chunk = chunk_of(tokens.T), chunks = (tokens.T + chunk - 1) / chunk;
  const size_t K = eights(tokens.K), memory = K * eights(tokens.V);
  return chunk_floats(tokens, chunk) + memory * (chunks + 2) + K * (kTileWidth * (chunk + 1) + 2);
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
    for (int j = 0; j < W; ++j) {
      removed[j] = multiply_add(load(memory + (k * W + j) * kLanes), kappa[k], removed[j]);
      odd[j] = multiply_add(load(memory + ((k + 1) * W + j) * kLanes), kappa[k + 1], odd[j]);
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
    for (int j = 0; j < W; ++j) {
      const int at = (k * W + j) * kLanes;
      const f8 old = load(before + at);
      f8 fresh = old * w[k];
      if constexpr (kDelta) fresh = multiply_add(removed[j], -c[k], fresh);
      fresh = multiply_add(v[j], key[k], fresh);
      store(after + at, fresh);
      if constexpr (kReads) y[j] = multiply_add(kDelta ? fresh : old, r[k], y[j]);
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
      f8 read{}, decay{}, written{}, removal{};
      for (int j = 0; j < W; ++j) {
        const int at = (k * W + j) * kLanes;
        const f8 old = load(before + at);
        f8 g = load(G + at);
        read = multiply_add(kDelta ? load(after + at) : old, dy[j], read);
        if constexpr (kDelta) {
          g = multiply_add(dy[j], r[k], g);
          store(G + at, g);
          removal = multiply_add(g, removed[j], removal);
          dremoved[j] = multiply_add(g, -c[k], dremoved[j]);
        } else {
          store(G + at, multiply_add(g, w[k], dy[j] * r[k]));
        }
        decay = multiply_add(g, old, decay);
        written = multiply_add(g, v[j], written);
        dv[j] = multiply_add(g, key[k], dv[j]);
      }
      from_read[i] = read, from_decay[i] = decay, from_key[i] = written, from_removal[i] = removal;
    }
    add(x.dr, k0, from_read);
    add(x.dw, k0, from_decay);
    add(x.dk, k0, from_key);
    if constexpr (kDelta) add(x.dc, k0, from_removal);
  }
  store(x.dv + t * V + v0, dv);
  if constexpr (!kDelta) return;
  for (int k0 = 0; k0 < K; k0 += kLanes) {
    f8 from_kappa[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int k = k0 + i;
      f8 kept{};
      for (int j = 0; j < W; ++j) {
        const int at = (k * W + j) * kLanes;
        kept = multiply_add(load(before + at), dremoved[j], kept);
        store(G + at, multiply_add(dremoved[j], kappa[k], load(G + at) * w[k]));
      }
      from_kappa[i] = kept;
    }
    add(x.dkappa, k0, from_kappa);
  }
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

// One head of one row.
template <bool kDelta>
class HeadTask {
 public:
  HeadTask(const Tokens& tokens, const Heads& in, int task, float* scratch)
      : tokens_(tokens), in_(in), K(eights(tokens.K)), V(eights(tokens.V)), row_(task / tokens.H),
        head_(task % tokens.H), T_(tokens.length(task / tokens.H)), chunk_(chunk_of(tokens.T)) {
    x_ = chunk_at(scratch, tokens, chunk_);
    free_ = scratch;
  }

  void forward(float* y, float* state) {
    float* memory = free_;
    load_memory(in_.state, memory);
    for (int begin = 0; begin < T_; begin += chunk_) {
      const int n = gather(begin);
      for_tiles(V, [&](int v0, auto tile) {
        float* M = memory + int64_t{v0} * K;
        for (int t = 0; t < n; ++t) forward_token<kDelta, true, decltype(tile)::value>(x_, t, K, V, v0, M, M);
      });
      for (int t = 0; t < n; ++t) {
        if constexpr (!kDelta) add_own(x_.y + t * V, bonus(t), x_.v + t * V);
        std::memcpy(y + values(begin + t), x_.y + t * V, tokens_.V * sizeof(float));
      }
    }
    clear(y, tokens_.V);
    store_memory(memory, state);
  }

  void backward(const float* dy, const float* dstate, const HeadGradients& out) {
    const int chunks = (T_ + chunk_ - 1) / chunk_;
    const int64_t size = int64_t{K} * V;
    float *borders = free_, *G = borders + size * (chunks + 1), *within = G + size;
    float *du = within + int64_t{K} * kTileWidth * (chunk_ + 1), *dlog_w = du + K;
    std::memset(du, 0, 2 * K * sizeof(float));

    load_memory(in_.state, borders);
    for (int i = 0; i + 1 < chunks; ++i) {  // the last chunk's end is not needed
      const int n = gather(i * chunk_);
      for_tiles(V, [&](int v0, auto tile) {
        const float* M = borders + i * size + int64_t{v0} * K;
        float* next = borders + (i + 1) * size + int64_t{v0} * K;
        for (int t = 0; t < n; ++t) {
          forward_token<kDelta, false, decltype(tile)::value>(x_, t, K, V, v0, t ? next : M, next);
        }
      });
    }
    load_memory(dstate, G);
    for (int i = chunks - 1; i >= 0; --i) {
      const int n = gather(i * chunk_);
      for (int t = 0; t < n; ++t) fetch(dy + values(i * chunk_ + t), tokens_.V, x_.y + t * V);
      for (float* gradient : {x_.dr, x_.dw, x_.dk, x_.dkappa, x_.dc}) std::memset(gradient, 0, n * K * sizeof(float));
      std::memset(x_.dv, 0, n * V * sizeof(float));
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
      for (int t = 0; t < n; ++t) hand_out(i * chunk_ + t, t, out, du, dlog_w);
    }

    for (float* gradient : {out.r, out.k, out.kappa, out.a, in_.constant_decay ? nullptr : out.log_w}) {
      if (gradient) clear(gradient, tokens_.K);
    }
    clear(out.v, tokens_.V);
    if (out.u) std::memcpy(out.u + head() * tokens_.K, du, tokens_.K * sizeof(float));
    if (in_.constant_decay) std::memcpy(out.log_w + head() * tokens_.K, dlog_w, tokens_.K * sizeof(float));
    store_memory(G, out.state);
  }

 private:
  int64_t head() const { return int64_t{row_} * tokens_.H + head_; }
  int64_t place(int t) const { return (int64_t{row_} * tokens_.T + t) * tokens_.H + head_; }
  int64_t keys(int t) const { return place(t) * tokens_.K; }
  int64_t values(int t) const { return place(t) * tokens_.V; }

  void load_memory(const float* state, float* memory) const {
    const float* S = state + head() * tokens_.K * tokens_.V;
    for_memory(K, V, [&](int64_t i, int v, int k) {
      memory[i] = v < tokens_.V && k < tokens_.K ? S[int64_t{v} * tokens_.K + k] : 0.0f;
    });
  }

  void store_memory(const float* memory, float* state) const {
    float* S = state + head() * tokens_.K * tokens_.V;
    for_memory(K, V, [&](int64_t i, int v, int k) {
      if (v < tokens_.V && k < tokens_.K) S[int64_t{v} * tokens_.K + k] = memory[i];
    });
  }

  // `width` numbers, filled up with zeros.
  static void fetch(const float* from, int width, float* to) {
    for_eights(0, width, [&](int i, auto count) { store(to + i, load(from + i, count)); });
  }

  // Zeros for the tokens beyond the row's length.
  void clear(float* of, int width) const {
    for (int t = T_; t < tokens_.T; ++t) std::memset(of + place(t) * width, 0, width * sizeof(float));
  }

  // The tokens from `begin` on into the chunk; returns how many.
  int gather(int begin) {
    const int n = std::min(chunk_, T_ - begin);
    for (int t = 0; t < n; ++t) {
      const int64_t at = keys(begin + t), to = int64_t{t} * K;
      fetch(in_.r + at, tokens_.K, x_.r + to);
      fetch(in_.k + at, tokens_.K, x_.k + to);
      fetch(in_.v + values(begin + t), tokens_.V, x_.v + int64_t{t} * V);
      const float* log_w = in_.constant_decay ? in_.log_w + int64_t{head_} * tokens_.K : in_.log_w + at;
      for_eights(0, tokens_.K, [&](int k, auto count) {
        store(x_.w + to + k, exp(load(log_w + k, count)));
        if constexpr (kDelta) {
          const f8 kappa = load(in_.kappa + at + k, count);
          store(x_.kappa + to + k, kappa);
          store(x_.c + to + k, kappa * load(in_.a + at + k, count));
        }
      });
    }
    return n;
  }

  f8 bonus_at(int k, auto count) const { return load(in_.u + int64_t{head_} * tokens_.K + k, count); }

  // r . u k, the weight of the current value.
  float bonus(int t) const {
    f8 all{};
    for_eights(0, tokens_.K, [&](int k, auto count) {
      const int64_t at = int64_t{t} * K + k;
      all = multiply_add(load(x_.r + at) * bonus_at(k, count), load(x_.k + at), all);
    });
    return sum(all);
  }

  void add_own(float* to, float weight, const float* values) const {
    for (int v = 0; v < V; v += kLanes) store(to + v, multiply_add(load(values + v), weight, load(to + v)));
  }

  // The gradients of token t of the chunk, which is token `at` of the row, from those of M's equation.
  void hand_out(int at, int t, const HeadGradients& out, float* du, float* dlog_w) {
    float own = 0;  // v . dy
    if constexpr (!kDelta) {
      f8 dot{};
      for (int v = 0; v < V; v += kLanes) dot = multiply_add(load(x_.v + t * V + v), load(x_.y + t * V + v), dot);
      own = sum(dot);
      add_own(x_.dv + t * V, bonus(t), x_.y + t * V);
    }
    for_eights(0, tokens_.K, [&](int k, auto count) {
      const int64_t from = int64_t{t} * K + k, to = keys(at) + k;
      const f8 decay = load(x_.w + from) * load(x_.dw + from);
      f8 dr = load(x_.dr + from), dk = load(x_.dk + from);
      if constexpr (kDelta) {
        const f8 dc = -load(x_.dc + from), kappa = load(x_.kappa + from);
        store(out.kappa + to, multiply_add(load(in_.a + to, count), dc, load(x_.dkappa + from)), count);
        store(out.a + to, kappa * dc, count);
      } else {
        const f8 u = bonus_at(k, count), r = load(x_.r + from), key = load(x_.k + from);
        dr = multiply_add(u * key, own, dr);
        dk = multiply_add(u * r, own, dk);
        store(du + k, multiply_add(r * key, own, load(du + k)));
      }
      store(out.r + to, dr, count);
      store(out.k + to, dk, count);
      if (in_.constant_decay) {
        store(dlog_w + k, load(dlog_w + k) + decay);
      } else {
        store(out.log_w + to, decay, count);
      }
    });
    std::memcpy(out.v + values(at), x_.dv + t * V, tokens_.V * sizeof(float));
  }

  const Tokens& tokens_;
  const Heads& in_;
  const int K, V;  // filled up
  const int row_, head_, T_, chunk_;
  Chunk x_;
  float* free_;
};

template <bool kDelta, class Do>
void for_heads(const Tokens& tokens, const Heads& in, float* scratch, int threads, Do&& each) {
  const size_t floats = heads_floats(tokens);
  Tasks tasks(tokens.B * tokens.H);
  Pool::shared().run(threads, [&](Team& team) {
    float* mine = scratch + team.index() * (floats + 16);
    tasks.work([&](int i) { each(HeadTask<kDelta>(tokens, in, i, mine)); });
  });
}

void wkv6(const Tokens& tokens, const Wkv6& in, float* y, float* state, float* scratch, int threads) {
  const Heads heads{in.r, in.log_w, in.k, in.v, nullptr, nullptr, in.u, in.state, in.constant_decay};
  for_heads<false>(tokens, heads, scratch, threads, [&](auto task) { task.forward(y, state); });
}

void wkv6_backward(const Tokens& tokens, const Wkv6& in, const float* dy, const float* dstate,
                   const Wkv6Gradients& out, float* scratch, int threads) {
  const Heads heads{in.r, in.log_w, in.k, in.v, nullptr, nullptr, in.u, in.state, in.constant_decay};
  const HeadGradients gradients{out.r, out.log_w, out.k, out.v, nullptr, nullptr, out.u, out.state};
  for_heads<false>(tokens, heads, scratch, threads, [&](auto task) { task.backward(dy, dstate, gradients); });
}

void wkv7(const Tokens& tokens, const Wkv7& in, float* y, float* state, float* scratch, int threads) {
  const Heads heads{in.r, in.log_w, in.k, in.v, in.kappa, in.a, nullptr, in.state, false};
  for_heads<true>(tokens, heads, scratch, threads, [&](auto task) { task.forward(y, state); });
}

void wkv7_backward(const Tokens& tokens, const Wkv7& in, const float* dy, const float* dstate,
                   const Wkv7Gradients& out, float* scratch, int threads) {
  const Heads heads{in.r, in.log_w, in.k, in.v, in.kappa, in.a, nullptr, in.state, false};
  const HeadGradients gradients{out.r, out.log_w, out.k, out.v, out.kappa, out.a, nullptr, out.state};
  for_heads<true>(tokens, heads, scratch, threads, [&](auto task) { task.backward(dy, dstate, gradients); });
}
