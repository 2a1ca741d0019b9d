// A block of RWKV: the equations of models/rwkv*.py, for rows of tokens, without gradients. Between products a
// phase ends, and the team waits for each other. Included once per instruction set, in that set's namespace.

// Numbers in any format, as float32.
template <class Count>
inline f8 load(const Array& array, int64_t i, Count count) {
  switch (array.format) {
    case Format::kFloat32: return load(static_cast<const float*>(array.data) + i, count);
    case Format::kBFloat16: return load(static_cast<const BFloat16*>(array.data) + i, count);
    case Format::kFloat16: return load(static_cast<const Half*>(array.data) + i, count);
    default: __builtin_unreachable();  // vectors are never quantised
  }
}

template <class Count>
inline void store(const MutableArray& array, int64_t i, f8 x, Count count) {
  switch (array.format) {
    case Format::kFloat32: return store(static_cast<float*>(array.data) + i, x, count);
    case Format::kBFloat16: return store(static_cast<BFloat16*>(array.data) + i, x, count);
    case Format::kFloat16: return store(static_cast<Half*>(array.data) + i, x, count);
    default: __builtin_unreachable();
  }
}

// x as it is after it was stored in that format.
template <class Count>
inline f8 rounded(f8 x, Format format, Count count) {
  BFloat16 short_floats[kLanes];
  Half halves[kLanes];
  switch (format) {
    case Format::kFloat32: return x;
    case Format::kBFloat16: store(short_floats, x, count); return load(short_floats, count);
    case Format::kFloat16: store(halves, x, count); return load(halves, count);
    default: __builtin_unreachable();
  }
}

template <class Count>
inline f8 normalized(const Norm& norm, Moments m, const float* x, int i, Count count) {
  const f8 y = (load(x + i, count) - m.mean) * m.scale * load(norm.weight, i, count);
  return norm.bias.data ? y + load(norm.bias, i, count) : y;
}

inline void normalize_row(const Norm& norm, const float* x, int width, float* y) {
  const Moments m = moments(x, width, norm.eps, norm.bias.data != nullptr);
  for_eights(0, width, [&](int i, auto count) { store(y + i, normalized(norm, m, x, i, count), count); });
}

// Where a block keeps what it computes, `rows` rows each.
struct Scratch {
  float* next;
  float* take(int64_t n) {
    float* taken = next;
    next += (n + 15) / 16 * 16;
    return taken;
  }
};

// A tile of (rows, width): whole rows for each of the team where there are enough, else a part of every row.
struct Tile {
  bool by_rows;
  Range rows, columns;
};

inline Tile tile(const Team& team, int rows, int width) {
  if (rows >= 4 * team.count()) return {true, team.share(rows, 1), {0, width}};
  return {false, {0, rows}, team.share(width, kGrain)};
}

// --- before a mix: norm, token shift, the mixes -------------------------------------------------------------

struct Mixes {
  int n;
  const Array* weights;  // n of them, (D)
  bool from_before;      // generations 4 and 5 give the share of x itself, 6 and 7 that of the token before
};

// What the newest input of every sequence was, and is to be.
struct Shift {
  Array in;
  MutableArray out;
  Array before(const Sequence& sequence) const { return sequence.goes_on ? Array{out.data, out.format} : in; }
};

// normed (rows, D) = norm(x) in the format of the state; mixed (n, rows, D); step (rows, D), if wanted: the token
// before less x. Ends with everything in place.
inline void shift_and_mix(Team& team, const Norm& norm, const Mixes& mixes, const BlockIO& io, int D,
                          const Shift& shift, float* normed, float* mixed, float* step = nullptr) {
  const Batch& batch = io.batch;
  const Tile part = tile(team, batch.rows, D);
  for (int row = part.rows.begin; row < part.rows.end; ++row) {
    const float* x = io.x + int64_t{row} * D;
    const Moments m = moments(x, D, norm.eps, norm.bias.data != nullptr);
    for_eights(part.columns.begin, part.columns.end, [&](int i, auto count) {
      store(normed + int64_t{row} * D + i, rounded(normalized(norm, m, x, i, count), shift.in.format, count), count);
    });
  }
  if (part.by_rows) team.sync();  // the row before may be another's
  for (int s = 0; s < batch.n_sequences; ++s) {
    const Sequence& sequence = batch.sequences[s];
    const Array shifted = shift.before(sequence);
    const int end = std::min(sequence.end, part.rows.end);
    for (int row = std::max(sequence.begin, part.rows.begin); row < end; ++row) {
      const float* now = normed + int64_t{row} * D;
      for_eights(part.columns.begin, part.columns.end, [&](int i, auto count) {
        const f8 x = load(now + i, count);
        const f8 before = row > sequence.begin ? load(now - D + i, count) : load(shifted, sequence.from * D + i, count);
        const f8 a = mixes.from_before ? x : before, b = mixes.from_before ? before : x;
        for (int use = 0; use < mixes.n; ++use) {
          const f8 y = a + (b - a) * load(mixes.weights[use], i, count);
          store(mixed + (int64_t{use} * batch.rows + row) * D + i, y, count);
        }
        if (step) store(step + int64_t{row} * D + i, before - x, count);
      });
    }
  }
  team.sync();
}

// The newest input of every sequence, for the next call. Not before everybody has read what the last call left.
inline void keep_last(const Team& team, const BlockIO& io, int D, const float* normed, const Shift& shift) {
  const Range columns = team.share(D, kGrain);
  for (int s = 0; s < io.batch.n_sequences; ++s) {
    const Sequence& sequence = io.batch.sequences[s];
    for_eights(columns.begin, columns.end, [&](int i, auto count) {
      store(shift.out, sequence.to * D + i, load(normed + int64_t{sequence.end - 1} * D + i, count), count);
    });
  }
}

// y (rows, width)[:, columns] = f(y)
template <class F>
inline void for_each(float* y, int rows, int width, Range columns, F&& f) {
  for (int row = 0; row < rows; ++row) {
    float* at = y + int64_t{row} * width;
    for_eights(columns.begin, columns.end, [&](int i, auto count) { store(at + i, f(load(at + i, count)), count); });
  }
}

// x (rows, D)[:, columns] += y
inline void add(float* x, const float* y, int rows, int D, Range columns) {
  for (int row = 0; row < rows; ++row) {
    float* to = x + int64_t{row} * D;
    for_eights(columns.begin, columns.end, [&](int i, auto count) {
      store(to + i, load(to + i, count) + load(y + int64_t{row} * D + i, count), count);
    });
  }
}

// y = x W
struct Product {
  const Matrix& W;
  const float* x;
  float* y;
};

inline int64_t bits_of_output(const Matrix& W) {
  constexpr int bits[] = {32, 16, 16, 8, 4};
  return int64_t{W.inputs} * bits[static_cast<int>(W.weights.format)];
}

// Products that do not wait for each other, as one row of work in which everybody takes an equal share: whole
// matrices where it can be, since memory is read fastest in one piece. done(i, outputs): these are computed.
template <size_t n, class Done>
inline void multiply_together(const Team& team, const Product (&products)[n], int rows, float* packed, Done&& done) {
  int64_t all = 0, before = 0;
  for (const Product& product : products) all += bits_of_output(product.W) * product.W.outputs;
  for (size_t i = 0; i < n; ++i) {
    const auto& [W, x, y] = products[i];
    if (W.outputs == 0) continue;
    const auto border = [&](int member) {
      const int64_t bits = std::max<int64_t>(0, all * member / team.count() - before);
      const int64_t grains = (bits / bits_of_output(W) + kGrain / 2) / kGrain;
      return static_cast<int>(std::min<int64_t>(W.outputs, grains * kGrain));
    };
    const Range mine{border(team.index()), team.index() + 1 == team.count() ? W.outputs : border(team.index() + 1)};
    multiply(W, x, rows, y, mine, packed);
    done(i, mine);
    before += bits_of_output(W) * W.outputs;
  }
}

// The memories among which is the one that the sequence goes on from.
inline const float* memory_before(const BlockIO& io, const Sequence& sequence) {
  return sequence.goes_on ? io.memory_out : io.memory_in;
}

// --- time mix of generation 4 -------------------------------------------------------------------------------

inline void time_mix4(Team& team, const Block& block, const BlockIO& io, Scratch scratch, float* packed) {
  const TimeMix4& att = block.att4;
  const int D = block.width, A = block.attention, rows = io.batch.rows;
  float* normed = scratch.take(int64_t{rows} * D);
  float* mixed = scratch.take(int64_t{3} * rows * D);
  float* k = scratch.take(int64_t{rows} * A);
  float* v = scratch.take(int64_t{rows} * A);
  float* r = scratch.take(int64_t{rows} * A);
  float* out = scratch.take(int64_t{rows} * D);
  const Array weights[] = {att.mix_k, att.mix_v, att.mix_r};
  const Shift shift{io.att_shift_in, io.att_shift_out};
  shift_and_mix(team, block.ln1, {3, weights, false}, io, D, shift, normed, mixed);

  keep_last(team, io, D, normed, shift);
  const Range mine = team.share(A, kGrain);
  const int64_t size = int64_t{rows} * D;
  multiply(att.key, mixed, rows, k, mine, packed);
  multiply(att.value, mixed + size, rows, v, mine, packed);
  multiply(att.receptance, mixed + 2 * size, rows, r, mine, packed);
  // The sums are kept as aa e^pp and bb e^pp, so that no exponential overflows.
  for (int s = 0; s < io.batch.n_sequences; ++s) {
    const Sequence& sequence = io.batch.sequences[s];
    const float* from = memory_before(io, sequence) + sequence.from * 3 * A;
    float* to = io.memory_out + sequence.to * 3 * A;
    for_eights(mine.begin, mine.end, [&](int i, auto count) {
      f8 aa = load(from + i, count), bb = load(from + A + i, count), pp = load(from + 2 * A + i, count);
      const f8 w = -exp(load(att.decay, i, count)), u = load(att.first, i, count);
      for (int row = sequence.begin; row < sequence.end; ++row) {
        const int64_t at = int64_t{row} * A + i;
        const f8 key = load(k + at, count), value = load(v + at, count);
        const f8 now = u + key, top = max(pp, now), old = exp(pp - top), fresh = exp(now - top);
        const f8 wkv = (old * aa + fresh * value) / (old * bb + fresh);
        store(r + at, sigmoid(load(r + at, count)) * wkv, count);
        const f8 faded = pp + w, next = max(faded, key), keep = exp(faded - next), take = exp(key - next);
        aa = keep * aa + take * value;
        bb = keep * bb + take;
        pp = next;
      }
      store(to + i, aa, count);
      store(to + A + i, bb, count);
      store(to + 2 * A + i, pp, count);
    });
  }
  team.sync();

  const Range columns = team.share(D, kGrain);
  multiply(att.output, r, rows, out, columns, packed);
  add(io.x, out, rows, D, columns);
  team.sync();
}

// --- time mix of generations 5 and 6 --------------------------------------------------------------------------

// One token of one head: y = S r + own v; S <- S diag(w) + v k^T. S is (V, K).
inline void recall(const float* from, float* to, int N, const float* r, const float* w, const float* k, const float* v,
                   float own, float* y) {
  for (int row = 0; row < N; ++row) {
    const float* S = from + row * N;
    float* S_new = to + row * N;
    const float found = total(N, [&](int i, auto count) {
      const f8 old = load(S + i, count);
      store(S_new + i, old * load(w + i, count) + v[row] * load(k + i, count), count);
      return old * load(r + i, count);
    });
    y[row] = found + own * v[row];
  }
}

// What every token of a head reads, normalised and behind its gate: over r. decay (rows, A), what a token adds to
// the decay's parameter, is changed; null: nothing. gate null: none.
inline void read_head(const Block& block, const BlockIO& io, int head, float* r, const float* k, const float* v,
                      float* decay, const float* gate) {
  const TimeMix6& att = block.att6;
  const int A = block.attention, N = block.head_size, channel = head * N;
  const int64_t head_size = int64_t{N} * N, memory_size = block.n_head * head_size;
  const auto parameter = [&](const Array& array, int i, auto count) {
    return att.is_per_head ? splat(load(array, head, 1)[0]) : load(array, channel + i, count);
  };
  float u[kLargestHead], w[kLargestHead], y[kLargestHead];
  for_eights(0, N, [&](int i, auto count) {
    const f8 first = parameter(att.first, i, count);
    store(u + i, att.first_is_log ? exp(first) : first, count);
    store(w + i, exp(-exp(parameter(att.decay, i, count))), count);
  });
  for (int s = 0; s < io.batch.n_sequences; ++s) {
    const Sequence& sequence = io.batch.sequences[s];
    const float* from = memory_before(io, sequence) + sequence.from * memory_size + head * head_size;
    float* to = io.memory_out + sequence.to * memory_size + head * head_size;
    for (int row = sequence.begin; row < sequence.end; ++row) {
      const int64_t at = int64_t{row} * A + channel;
      const float own = total(N, [&](int i, auto count) {
        if (decay) {
          const f8 omega = load(att.decay, channel + i, count) + load(decay + at + i, count);
          store(w + i, exp(-exp(omega)), count);
        }
        return load(r + at + i, count) * load(u + i, count) * load(k + at + i, count);
      });
      recall(row == sequence.begin ? from : to, to, N, r + at, w, k + at, v + at, own, y);
      const Moments m = moments(y, N, att.ln_x.eps, true);
      for_eights(0, N, [&](int i, auto count) {
        const f8 spread = (load(y + i, count) - m.mean) * m.scale;
        f8 answer = spread * load(att.ln_x.weight, channel + i, count) + load(att.ln_x.bias, channel + i, count);
        if (gate) {
          const f8 g = load(gate + at + i, count);
          answer = answer * (g * sigmoid(g));
        }
        store(r + at + i, answer, count);
      });
    }
  }
}

// Generation 6: the five mixes, each with a low-rank correction that the token decides. mixed (6, rows, D), of which
// the last is the input of the corrections. Ends with everything in place.
inline void mix_by_data(Team& team, const TimeMix6& att, int rows, int D, const float* normed, const float* step,
                        float* mixed, Scratch& scratch, float* packed) {
  const int all = att.mix_down.outputs, rank = all / 5;
  const int64_t size = int64_t{rows} * D, size_low = int64_t{rows} * rank;
  float* low = scratch.take(int64_t{rows} * all);
  float* apart = scratch.take(int64_t{rows} * all);  // (5, rows, rank)
  const Range mine = team.share(all, kGrain);
  multiply(att.mix_down, mixed + 5 * size, rows, low, mine, packed);
  for (int row = 0; row < rows; ++row) {
    for (int use = mine.begin / rank; use * rank < mine.end; ++use) {
      const int begin = std::max(mine.begin, use * rank), end = std::min(mine.end, (use + 1) * rank);
      for_eights(begin, end, [&](int i, auto count) {
        store(apart + use * size_low + int64_t{row} * rank + i - use * rank, tanh(load(low + int64_t{row} * all + i, count)), count);
      });
    }
  }
  team.sync();
  const Range columns = team.share(D, kGrain);
  for (int use = 0; use < 5; ++use) {
    float* y = mixed + use * size;
    multiply(att.mix_up[use], apart + use * size_low, rows, y, columns, packed);
    for (int row = 0; row < rows; ++row) {
      for_eights(columns.begin, columns.end, [&](int i, auto count) {
        const int64_t at = int64_t{row} * D + i;
        const f8 share = load(att.mixes[use], i, count) + load(y + at, count);
        store(y + at, load(normed + at, count) + load(step + at, count) * share, count);
      });
    }
  }
  team.sync();
}

inline void time_mix6(Team& team, const Block& block, const BlockIO& io, Scratch scratch, float* packed) {
  const TimeMix6& att = block.att6;
  const int D = block.width, A = block.attention, N = block.head_size, rows = io.batch.rows;
  const int64_t size = int64_t{rows} * D, size_A = int64_t{rows} * A;
  const bool by_data = block.generation == 6, has_gate = att.gate.outputs != 0;
  float* normed = scratch.take(size);
  float* step = scratch.take(by_data * size);
  float* mixed = scratch.take(6 * size);
  float* r = scratch.take(size_A);
  float* k = scratch.take(size_A);
  float* v = scratch.take(size_A);
  float* g = scratch.take(has_gate * size_A);
  float* w = scratch.take(by_data * size_A);
  float* w_low = scratch.take(int64_t{rows} * att.decay_down.outputs);
  float* out = scratch.take(size);
  const Shift shift{io.att_shift_in, io.att_shift_out};
  if (by_data) {
    shift_and_mix(team, block.ln1, {1, &att.mix_x, true}, io, D, shift, normed, mixed + 5 * size, step);
    mix_by_data(team, att, rows, D, normed, step, mixed, scratch, packed);
  } else {
    shift_and_mix(team, block.ln1, {3 + has_gate, att.mixes + 1, false}, io, D, shift, normed, mixed);
  }

  keep_last(team, io, D, normed, shift);
  const float *xw = mixed, *xk = by_data ? mixed + size : mixed, *xv = xk + size, *xr = xv + size, *xg = xr + size;
  const Product products[] = {
      {att.decay_down, xw, w_low}, {att.receptance, xr, r}, {att.key, xk, k}, {att.value, xv, v}, {att.gate, xg, g}};
  multiply_together(team, products, rows, packed, [&](size_t i, Range mine) {
    if (i == 0) for_each(w_low, rows, att.decay_down.outputs, mine, [](f8 x) { return tanh(x); });
  });
  team.sync();

  const Range heads = team.share(block.n_head, 1), mine = {heads.begin * N, heads.end * N};
  if (by_data) multiply(att.decay_up, w_low, rows, w, mine, packed);
  for (int head = heads.begin; head < heads.end; ++head) {
    read_head(block, io, head, r, k, v, by_data ? w : nullptr, has_gate ? g : nullptr);
  }
  team.sync();

  const Range of_x = team.share(D, kGrain);
  multiply(att.output, r, rows, out, of_x, packed);
  add(io.x, out, rows, D, of_x);
  team.sync();
}

// --- time mix of generation 7 -------------------------------------------------------------------------------

// One token of one head: S <- S (diag(w) - kappa (a kappa)^T) + v k^T; y = S r. S is (V, K).
inline void remember(const float* from, float* to, int N, const float* r, const float* w, const float* k, const float* v,
                     const float* kappa, const float* a_kappa, float* y) {
  for (int row = 0; row < N; ++row) {
    const float* S = from + row * N;
    float* S_new = to + row * N;
    const float erased = total(N, [&](int i, auto count) { return load(S + i, count) * load(kappa + i, count); });
    y[row] = total(N, [&](int i, auto count) {
      const f8 kept = load(S + i, count) * load(w + i, count) - erased * load(a_kappa + i, count);
      const f8 now = kept + v[row] * load(k + i, count);
      store(S_new + i, now, count);
      return now * load(r + i, count);
    });
  }
}

inline void time_mix7(Team& team, const Block& block, const BlockIO& io, Scratch scratch, float* packed) {
  const TimeMix7& att = block.att7;
  const int D = block.width, A = block.attention, N = block.head_size, rows = io.batch.rows;
  const int64_t size = int64_t{rows} * D, size_A = int64_t{rows} * A;
  const bool is_first = att.v1.outputs == 0;
  float* normed = scratch.take(size);
  float* mixed = scratch.take(6 * size);
  float* r = scratch.take(size_A);
  float* k = scratch.take(size_A);
  float* v = scratch.take(size_A);
  float* w = scratch.take(size_A);
  float* a = scratch.take(size_A);
  float* g = scratch.take(size_A);
  float* mix_v = scratch.take(size_A);
  float* w_low = scratch.take(int64_t{rows} * att.w1.outputs);
  float* a_low = scratch.take(int64_t{rows} * att.a1.outputs);
  float* v_low = scratch.take(int64_t{rows} * att.v1.outputs);
  float* g_low = scratch.take(int64_t{rows} * att.g1.outputs);
  float* y = scratch.take(size_A);
  float* out = scratch.take(size);
  const Shift shift{io.att_shift_in, io.att_shift_out};
  shift_and_mix(team, block.ln1, {6, att.mixes, true}, io, D, shift, normed, mixed);
  const float *xr = mixed, *xw = mixed + size, *xk = mixed + 2 * size, *xv = mixed + 3 * size, *xa = mixed + 4 * size,
              *xg = mixed + 5 * size;

  keep_last(team, io, D, normed, shift);
  if (is_first) v = io.v_first;
  const Product products[] = {{att.w1, xw, w_low},      {att.g1, xg, g_low}, {att.a1, xa, a_low},  {att.v1, xv, v_low},
                              {att.receptance, xr, r}, {att.key, xk, k},    {att.value, xv, v}};
  multiply_together(team, products, rows, packed, [&](size_t i, Range mine) {
    if (i == 0) for_each(w_low, rows, att.w1.outputs, mine, [](f8 x) { return tanh(x); });
    if (i == 1) for_each(g_low, rows, att.g1.outputs, mine, [](f8 x) { return sigmoid(x); });
  });
  team.sync();

  const Range heads = team.share(block.n_head, 1), mine = {heads.begin * N, heads.end * N};
  multiply(att.w2, w_low, rows, w, mine, packed);
  multiply(att.a2, a_low, rows, a, mine, packed);
  multiply(att.g2, g_low, rows, g, mine, packed);
  if (!is_first) multiply(att.v2, v_low, rows, mix_v, mine, packed);
  float kappa[kLargestHead], a_kappa[kLargestHead];
  for (int head = heads.begin; head < heads.end; ++head) {
    const int channel = head * N;
    for (int s = 0; s < io.batch.n_sequences; ++s) {
      const Sequence& sequence = io.batch.sequences[s];
      const int64_t head_size = int64_t{N} * N, memory_size = block.n_head * head_size;
      const float* from = memory_before(io, sequence) + sequence.from * memory_size + head * head_size;
      float* to = io.memory_out + sequence.to * memory_size + head * head_size;
      for (int row = sequence.begin; row < sequence.end; ++row) {
        const int64_t at = int64_t{row} * A + channel;
        const float square = total(N, [&](int i, auto count) {
          const f8 x = load(k + at + i, count) * load(att.k_k, channel + i, count);
          store(kappa + i, x, count);
          return x * x;
        });
        const float scale = 1 / std::max(std::sqrt(square), 1e-12f);
        const float bonus = total(N, [&](int i, auto count) {
          const f8 rate = sigmoid(load(att.a0, channel + i, count) + load(a + at + i, count));
          const f8 d = load(att.w0, channel + i, count) + load(w + at + i, count);
          const f8 direction = load(kappa + i, count) * scale;
          const f8 key = load(k + at + i, count);
          const f8 written = key + (key * rate - key) * load(att.k_a, channel + i, count);
          store(w + at + i, exp(-0.606530659712633423f * sigmoid(d)), count);
          store(kappa + i, direction, count);
          store(a_kappa + i, rate * direction, count);
          store(k + at + i, written, count);
          if (!is_first) {
            const f8 value = load(v + at + i, count), first = load(io.v_first + at + i, count);
            const f8 share = sigmoid(load(att.v0, channel + i, count) + load(mix_v + at + i, count));
            store(v + at + i, value + (first - value) * share, count);
          }
          return load(r + at + i, count) * written * load(att.r_k, channel + i, count);
        });
        remember(row == sequence.begin ? from : to, to, N, r + at, w + at, k + at, v + at, kappa, a_kappa, y + at);
        const Moments m = moments(y + at, N, att.ln_x.eps, true);
        for_eights(0, N, [&](int i, auto count) {
          const f8 spread = (load(y + at + i, count) - m.mean) * m.scale;
          const f8 weight = load(att.ln_x.weight, channel + i, count), bias = load(att.ln_x.bias, channel + i, count);
          const f8 answer = spread * weight + bias + bonus * load(v + at + i, count);
          store(y + at + i, answer * load(g + at + i, count), count);
        });
      }
    }
  }
  team.sync();

  const Range of_x = team.share(D, kGrain);
  multiply(att.output, y, rows, out, of_x, packed);
  add(io.x, out, rows, D, of_x);
  team.sync();
}

// --- channel mix --------------------------------------------------------------------------------------------

inline void channel_mix(Team& team, const Block& block, const BlockIO& io, Scratch scratch, float* packed) {
  const ChannelMix4& ffn = block.ffn;
  const int D = block.width, F = block.hidden, rows = io.batch.rows;
  const int64_t size = int64_t{rows} * D;
  const bool has_gate = ffn.receptance.outputs != 0;
  float* normed = scratch.take(size);
  float* mixed = scratch.take((1 + has_gate) * size);
  float* hidden = scratch.take(int64_t{rows} * F);
  float* gate = scratch.take(has_gate * size);
  float* out = scratch.take(size);
  float* totals = scratch.take(totals_floats(D));
  int* active = reinterpret_cast<int*>(scratch.take(int64_t{F} * team.count())) + int64_t{F} * team.index();
  const Array weights[] = {ffn.mix_k, ffn.mix_r};
  const Shift shift{io.ffn_shift_in, io.ffn_shift_out};
  shift_and_mix(team, block.ln2, {1 + has_gate, weights, block.generation >= 6}, io, D, shift, normed, mixed);

  keep_last(team, io, D, normed, shift);
  const Product products[] = {{ffn.key, mixed, hidden}, {ffn.receptance, mixed + size, gate}};
  multiply_together(team, products, rows, packed, [&](size_t i, Range mine) {
    if (i == 1) return for_each(gate, rows, D, mine, [](f8 x) { return sigmoid(x); });
    for_each(hidden, rows, F, mine, [&](f8 x) {
      const f8 relu = positive(x);
      return block.squares ? relu * relu : relu;
    });
  });
  team.sync();

  Range columns;
  if (rows == 1 && ffn.value.by_input && ffn.value.scales) {
    columns = multiply_one_row(team, ffn.value, hidden, out, totals, packed, io.skips);
  } else {
    columns = team.share(D, grain(ffn.value));
    const bool skips = io.skips && rows == 1 && ffn.value.by_input;
    int n_active = 0;
    for (int k = 0; skips && k < F; ++k) {
      active[n_active] = k;
      n_active += hidden[k] != 0;
    }
    multiply(ffn.value, hidden, rows, out, columns, packed, skips ? active : nullptr, n_active);
  }
  for (int row = 0; row < rows && has_gate; ++row) {
    for_eights(columns.begin, columns.end, [&](int i, auto count) {
      const int64_t at = int64_t{row} * D + i;
      store(out + at, load(out + at, count) * load(gate + at, count), count);
    });
  }
  add(io.x, out, rows, D, columns);
}

inline void run_block(Team& team, const Block& block, const BlockIO& io, Scratch scratch, float* packed) {
  if (block.ln0.weight.data != nullptr) {
    const Range rows = team.share(io.batch.rows, 1);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* x = io.x + row * block.width;
      normalize_row(block.ln0, x, block.width, x);
    }
    team.sync();
  }
  switch (block.generation) {
    case 7: time_mix7(team, block, io, scratch, packed); break;
    case 6:
    case 5: time_mix6(team, block, io, scratch, packed); break;
    default: time_mix4(team, block, io, scratch, packed);
  }
  channel_mix(team, block, io, scratch, packed);
}
