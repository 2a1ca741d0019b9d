// y = W x, for one row of x or many. The order in which an output is summed up depends on the matrix alone, not on
// how many rows share the call nor on who computes it: so a row's result is the same, bit for bit, alone and in
// company. Included once per instruction set, inside that set's namespace.
//
//     by output   sixteen sums, of the inputs k = 0, 16, 32, ..., of k = 1, 17, ..., and so on, added at the end
//     by input    one sum, in the order of the inputs

constexpr int kGrain = 16;     // outputs that stay with one thread
constexpr int kTile = 1024;    // outputs of one row that are summed up in the first-level cache
constexpr int kTogether = 8;   // inputs that one pass over the sums takes along: as many streams are read
constexpr int kDepth = 256;    // inputs of a packed panel
constexpr int kPanel = 16;     // outputs of a packed panel
constexpr int kPanels = 16;    // panels in the second-level cache at a time
constexpr int kRows = 6;       // rows of x in registers at a time
constexpr int kRowBlock = 96;  // rows of x in the second-level cache at a time

constexpr size_t kPackedFloats = size_t{kDepth} * kPanel * kPanels;

// Calls use(pointer) with the pointer that the format says.
template <class Use>
inline void with_format(const Array& array, Use&& use) {
  switch (array.format) {
    case Format::kFloat32: return use(static_cast<const float*>(array.data));
    case Format::kBFloat16: return use(static_cast<const BFloat16*>(array.data));
    case Format::kFloat16: return use(static_cast<const Half*>(array.data));
    default: return;  // quantised: see multiply
  }
}

// --- by output: few rows -----------------------------------------------------------------------------------------

constexpr int kChains = 2;         // vectors of sums: with one, each addition would wait for the one before
constexpr int kPrefetch = 1024;    // bytes between what is multiplied and what is asked for
constexpr int kRowsOfDot = 3;      // at a time
constexpr int kMaxRowsOfDot = 48;  // so many rows are multiplied without packing the weights

inline float sum(const f8 (&chains)[kChains]) { return sum(chains[0] + chains[1]); }

// y (R, O) = x (R, inputs) w (O, inputs)^T
template <int R, int O, bool asks, class T>
void dot(const T* w, int inputs, const float* x, float* y, int64_t ldy) {
  f8 sums[R][O][kChains] = {};
  const auto add = [&](int k, int chain, auto count) {
    f8 weights[O];
    for (int o = 0; o < O; ++o) {
      const T* from = w + int64_t{o} * inputs + k;
      if (asks && k * sizeof(T) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetch);
      weights[o] = load(from, count);
      if constexpr (R > 1) keep_in_register(weights[o]);  // else the compiler loads them again and again
    }
    for (int r = 0; r < R; ++r) {
      f8 input = load(x + int64_t{r} * inputs + k, count);
      if constexpr (O > 1) keep_in_register(input);
      for (int o = 0; o < O; ++o) sums[r][o][chain] = multiply_add(weights[o], input, sums[r][o][chain]);
    }
  };
  int k = 0;
  for (; k + kChains * kLanes <= inputs; k += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) add(k + chain * kLanes, chain, Eight{});
  }
  if (k + kLanes <= inputs) {
    add(k, 0, Eight{});
    if (k + kLanes < inputs) add(k + kLanes, 1, inputs - k - kLanes);
  } else if (k < inputs) {
    add(k, 0, inputs - k);
  }
  for (int i = 0; i < R * O; ++i) y[i / O * ldy + i % O] = sum(sums[i / O][i % O]);
}

// Asks for part i of n equal parts of these bytes.
inline void ask_for(const void* from, int64_t bytes, int i, int n) {
  const auto* p = static_cast<const char*>(from);
  for (int64_t at = bytes * i / n / 64 * 64; at < bytes * (i + 1) / n; at += 64) __builtin_prefetch(p + at);
}

// Each tile asks for what it reads soon, or, where there are many, for its part of the next outputs.
template <bool asks, class T>
void dot_rows(const T* w, int inputs, const float* x, int rows, float* y, int64_t ldy, Range outputs) {
  constexpr int R = kRowsOfDot, O = 2;
  constexpr void (*tiles[R][O])(const T*, int, const float*, float*, int64_t) = {
      {dot<1, 1, asks>, dot<1, 2, asks>},
      {dot<2, 1, asks>, dot<2, 2, asks>},
      {dot<3, 1, asks>, dot<3, 2, asks>}};
  // One output after the other for a single row: one stream through the memory is what it reads fastest.
  const int width = rows == 1 ? 1 : O;
  const int64_t bytes = int64_t{width} * inputs * sizeof(T);
  for (int o = outputs.begin; o < outputs.end; o += width) {
    const T* from = w + int64_t{o} * inputs;
    for (int row = 0; row < rows; row += R) {
      if (!asks) ask_for(from + width * inputs, bytes, row, rows);
      tiles[std::min(R, rows - row) - 1][std::min(width, outputs.end - o) - 1](from, inputs, x + int64_t{row} * inputs,
                                                                               y + row * ldy + o, ldy);
    }
  }
}

template <class T>
void dot_rows(const T* w, int inputs, const float* x, int rows, float* y, int64_t ldy, Range outputs) {
  if (rows <= 2 * kRowsOfDot) return dot_rows<true>(w, inputs, x, rows, y, ldy, outputs);
  dot_rows<false>(w, inputs, x, rows, y, ldy, outputs);
}

// --- by output: many rows ----------------------------------------------------------------------------------------

// Inputs are packed sum by sum, those of k = 0, 16, 32, ... first, and the sums in the order 0, 8, 4, 12, 2, 10, ...: bits
// reversed, so that what is added in the end lies side by side: neighbours, then neighbouring pairs, and so on.
constexpr int kSumsOfOutput = kChains * kLanes;
constexpr int kPlaces[kSumsOfOutput] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
constexpr int kPackedRows = 192;         // of x at a time, fewer where they are long
constexpr int kPackedNumbers = 3 << 18;  // of x at a time

// Inputs of a sum, rounded up to eights.
inline int terms(int inputs) { return (inputs + kSumsOfOutput * kLanes - 1) / (kSumsOfOutput * kLanes) * kLanes; }
inline int64_t packed_row(int inputs) { return kSumsOfOutput * terms(inputs) + 16; }  // rows do not share cache sets

inline int packed_rows(int inputs) {
  return std::clamp<int>(kPackedNumbers / packed_row(inputs) / kRows * kRows, 2 * kRows, kPackedRows);
}

inline size_t packed_floats(int inputs) { return packed_row(inputs) * (packed_rows(inputs) + kPanel + 1); }

// 8 x 8 numbers of 32 bits.
template <class V>
inline void transpose(V (&x)[kLanes]) {
  V a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Eight of n numbers from i on; zeros where there are none.
template <class T>
inline f8 load_within(const T* p, int i, int n) {
  return i + kLanes <= n ? load(p + i) : load(p + std::min(i, n), std::max(n - i, 0));
}

inline void pack_row(const float* x, int inputs, float* to) {
  const int n = terms(inputs);
  for (int term = 0; term < n; term += kLanes) {
    for (int chain = 0; chain < kChains; ++chain) {
      f8 some[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        some[i] = load_within(x, (term + i) * kSumsOfOutput + chain * kLanes, inputs);
      }
      transpose(some);
      for (int i = 0; i < kLanes; ++i) store(to + kPlaces[chain * kLanes + i] * n + term, some[i]);
    }
  }
}

// Numbers of a panel from one sum's inputs to the next's: a cache line more than they are, or all would meet in few sets.
inline int64_t panel_sum(int n) { return int64_t{n} * kPanel + 16; }

// `count` outputs, and zeros, as (inputs in their order, 16).
template <class T>
void pack_panel(const T* w, int inputs, int count, float* to) {
  const int n = terms(inputs);
  for (int term = 0; term < n; ++term) {
    const int k = term * kSumsOfOutput;
    for (int left = 0; left < kPanel; left += kLanes) {
      for (int chain = 0; chain < kChains; ++chain) {
        const T* from = w + int64_t{left} * inputs;
        const int at = k + chain * kLanes;
        f8 some[kLanes] = {};
        if (at + kLanes <= inputs && left + kLanes <= count) {
          for (int o = 0; o < kLanes; ++o) some[o] = load(from + int64_t{o} * inputs + at);
        } else {
          for (int o = 0; o < std::min(kLanes, count - left); ++o) {
            some[o] = load_within(from + int64_t{o} * inputs, at, inputs);
          }
        }
        transpose(some);
        float* place = to + term * kPanel + left;
        for (int i = 0; i < kLanes; ++i) store(place + kPlaces[chain * kLanes + i] * panel_sum(n), some[i]);
      }
    }
  }
}

template <int R>
void packed_tile(const float* x, int64_t ldx, const float* panel, int n, float* y, int64_t ldy, int count) {
  f8 waiting[4][R][2];  // of pairs, fours, ...: the first, which waits for the second
  for (int i = 0; i < kSumsOfOutput; ++i, x += n, panel += panel_sum(n)) {
    f8 sums[R][2] = {};
    for (int term = 0; term < n; ++term) {
      const f8 left = load(panel + term * kPanel), right = load(panel + term * kPanel + kLanes);
      for (int r = 0; r < R; ++r) {
        const float times = x[r * ldx + term];
        sums[r][0] = multiply_add(left, times, sums[r][0]);
        sums[r][1] = multiply_add(right, times, sums[r][1]);
      }
    }
    int level = 0;
    for (; i >> level & 1; ++level) {
      for (int r = 0; r < R; ++r) sums[r][0] += waiting[level][r][0], sums[r][1] += waiting[level][r][1];
    }
    if (level < 4) {
      for (int r = 0; r < R; ++r) waiting[level][r][0] = sums[r][0], waiting[level][r][1] = sums[r][1];
      continue;
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) store_some(y + r * ldy + v * kLanes, sums[r][v], count - v * kLanes);
    }
  }
}

template <class T>
void packed_rows(const T* w, int inputs, const float* x, int rows, float* y, int64_t ldy, Range outputs, float* scratch) {
  constexpr void (*tiles[])(const float*, int64_t, const float*, int, float*, int64_t, int) = {
      packed_tile<1>, packed_tile<2>, packed_tile<3>, packed_tile<4>, packed_tile<5>, packed_tile<6>};
  const int most = packed_rows(inputs), n = terms(inputs);
  const int times = (rows + most - 1) / most, at_once = ((rows + times - 1) / times + kRows - 1) / kRows * kRows;
  const int64_t ldx = packed_row(inputs);
  float* panel = scratch + most * ldx;
  for (int first = 0; first < rows; first += at_once) {
    const int some = std::min(at_once, rows - first);
    for (int row = 0; row < some; ++row) pack_row(x + int64_t{first + row} * inputs, inputs, scratch + row * ldx);
    for (int begin = outputs.begin; begin < outputs.end; begin += kPanel) {
      const int count = std::min(kPanel, outputs.end - begin);
      pack_panel(w + int64_t{begin} * inputs, inputs, count, panel);
      for (int row = 0; row < some; row += kRows) {
        tiles[std::min(kRows, some - row) - 1](scratch + row * ldx, ldx, panel, n,
                                               y + (first + row) * ldy + begin, ldy, count);
      }
    }
  }
}

// --- by input: one row ----------------------------------------------------------------------------------------------

// sums[0 .. n) += w[k] x[k] for `count` inputs k = ks[0], ks[1], ... (ks null: 0, 1, ...).
template <class T>
void add_inputs(const T* w, int64_t stride, const float* x, const int* ks, int count, float* sums, int n) {
  constexpr int kWide = 4;                                                 // vectors of sums in registers
  constexpr int kLines = kWide * kLanes * static_cast<int>(sizeof(T)) / 64;  // cache lines that they meet
  int j = 0;
  for (; j + kTogether <= count; j += kTogether) {
    const T *from[kTogether], *soon[kTogether];  // the inputs after these are asked for in time
    f8 times[kTogether];
    for (int u = 0; u < kTogether; ++u) {
      const int k = ks ? ks[j + u] : j + u;
      const int next = std::min(j + u + kTogether, count - 1);
      from[u] = w + k * stride, times[u] = splat(x[k]);
      soon[u] = w + (ks ? ks[next] : next) * stride;
    }
    int i = 0;
    for (; i + kWide * kLanes <= n; i += kWide * kLanes) {
      f8 total[kWide];
      for (int t = 0; t < kWide; ++t) total[t] = load(sums + i + t * kLanes);
      for (int u = 0; u < kTogether; ++u) {
        for (int line = 0; line < kLines; ++line) __builtin_prefetch(soon[u] + i + line * (64 / sizeof(T)));
        for (int t = 0; t < kWide; ++t) total[t] = multiply_add(load(from[u] + i + t * kLanes), times[u], total[t]);
      }
      for (int t = 0; t < kWide; ++t) store(sums + i + t * kLanes, total[t]);
    }
    for_eights(i, n, [&](int at, auto some) {
      f8 total = load(sums + at, some);
      for (int u = 0; u < kTogether; ++u) total = multiply_add(load(from[u] + at, some), times[u], total);
      store(sums + at, total, some);
    });
  }
  for (; j < count; ++j) {
    const int k = ks ? ks[j] : j;
    const T* from = w + k * stride;
    for_eights(0, n, [&](int i, auto some) {
      store(sums + i, multiply_add(load(from + i, some), x[k], load(sums + i, some)), some);
    });
  }
}

template <class T>
void multiply_row(const T* w, int64_t stride, const float* x, const int* ks, int count, float* y, Range outputs) {
  alignas(32) float sums[kTile];
  for (int begin = outputs.begin; begin < outputs.end; begin += kTile) {
    const int n = std::min(kTile, outputs.end - begin);
    std::fill(sums, sums + n, 0.0f);
    add_inputs(w + begin, stride, x, ks, count, sums, n);
    std::copy(sums, sums + n, y + begin);
  }
}

// --- by input: many rows --------------------------------------------------------------------------------------------

// y (R, 16) [+]= x (R, depth) panel (depth, 16)
template <int R>
inline void multiply_panel(const float* x, int64_t ldx, const float* panel, int depth, float* y, int64_t ldy,
                           bool is_first) {
  f8 sums[R][2];
  for (int r = 0; r < R; ++r) {
    sums[r][0] = is_first ? f8{} : load(y + r * ldy);
    sums[r][1] = is_first ? f8{} : load(y + r * ldy + kLanes);
  }
  for (int k = 0; k < depth; ++k) {
    const f8 left = load(panel + k * kPanel), right = load(panel + k * kPanel + kLanes);
    for (int r = 0; r < R; ++r) {
      const float times = x[r * ldx + k];
      sums[r][0] = multiply_add(left, times, sums[r][0]);
      sums[r][1] = multiply_add(right, times, sums[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    store(y + r * ldy, sums[r][0]);
    store(y + r * ldy + kLanes, sums[r][1]);
  }
}

inline void multiply_panel(int rows, const float* x, int64_t ldx, const float* panel, int depth, float* y,
                           int64_t ldy, bool is_first) {
  switch (rows) {
    case 1: return multiply_panel<1>(x, ldx, panel, depth, y, ldy, is_first);
    case 2: return multiply_panel<2>(x, ldx, panel, depth, y, ldy, is_first);
    case 3: return multiply_panel<3>(x, ldx, panel, depth, y, ldy, is_first);
    case 4: return multiply_panel<4>(x, ldx, panel, depth, y, ldy, is_first);
    case 5: return multiply_panel<5>(x, ldx, panel, depth, y, ldy, is_first);
    default: return multiply_panel<6>(x, ldx, panel, depth, y, ldy, is_first);
  }
}

template <class T>
void multiply_rows(const T* w, int64_t stride, int inputs, const float* x, int rows, float* y, int64_t ldy,
                   Range outputs, float* packed) {
  for (int begin = outputs.begin; begin < outputs.end; begin += kPanel * kPanels) {
    const int n = std::min(kPanel * kPanels, outputs.end - begin);
    const int whole = n / kPanel, rest = n % kPanel;
    for (int first = 0; first < inputs; first += kDepth) {
      const int depth = std::min(kDepth, inputs - first);
      for (int k = 0; k < depth; ++k) {
        const T* from = w + (first + k) * stride + begin;
        float* to = packed + k * kPanel;
        for (int p = 0; p < whole; ++p, to += kDepth * kPanel) {
          store(to, load(from + p * kPanel));
          store(to + kLanes, load(from + p * kPanel + kLanes));
        }
        if (rest) {
          const T* last = from + whole * kPanel;
          store(to, load(last, std::min(rest, kLanes)));
          store(to + kLanes, load(last + kLanes, std::max(rest - kLanes, 0)));
        }
      }
      for (int row_block = 0; row_block < rows; row_block += kRowBlock) {
        const int row_end = std::min(rows, row_block + kRowBlock);
        for (int p = 0; p < whole + (rest > 0); ++p) {
          const float* panel = packed + p * kDepth * kPanel;
          for (int row = row_block; row < row_end; row += kRows) {
            const int some = std::min(kRows, row_end - row);
            const float* from = x + static_cast<int64_t>(row) * inputs + first;
            float* to = y + row * ldy + begin + p * kPanel;
            if (p < whole) {
              multiply_panel(some, from, inputs, panel, depth, to, ldy, first == 0);
            } else {
              float edge[kRows][kPanel] = {};
              for (int r = 0; r < some && first; ++r) std::copy(to + r * ldy, to + r * ldy + rest, edge[r]);
              multiply_panel(some, from, inputs, panel, depth, edge[0], kPanel, first == 0);
              for (int r = 0; r < some; ++r) std::copy(edge[r], edge[r] + rest, to + r * ldy);
            }
          }
        }
      }
    }
  }
}
