// y = W x, for one row of x or many. The order in which an output is summed up depends on the matrix alone, not on
// how many rows share the call nor on who computes it: so a row's result is the same, bit for bit, alone and in
// company. Included once per instruction set, inside that set's namespace.
//
//     by output   eight sums, of the inputs k = 0, 8, 16, ..., of k = 1, 9, ..., and so on, added at the end
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

// --- by output ----------------------------------------------------------------------------------------------

constexpr int kDeep = 1024;     // inputs that are multiplied before the sums are put aside
constexpr int kOutputs = 24;    // outputs whose weights stay in the second-level cache
constexpr int kRowsDeep = 48;   // rows of x that stay there too
constexpr int kPrefetch = 1024; // bytes between what a single row multiplies and what is asked for

// sums (R, O) += x (R, inputs) w (O, inputs)^T, eight sums each
template <int R, int O, bool kPrefetches, class T>
inline void dot(const float* x, int64_t ldx, const T* w, int64_t ldw, int inputs, f8 (&sums)[R][O]) {
  for_eights(0, inputs, [&](int k, auto count) {
    f8 weights[O];
    for (int o = 0; o < O; ++o) {
      const T* from = w + o * ldw + k;
      if (kPrefetches && k * sizeof(T) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetch);
      weights[o] = load(from, count);
      if constexpr (R > 1) keep_in_register(weights[o]);  // else the compiler loads them again and again
    }
    for (int r = 0; r < R; ++r) {
      f8 input = load(x + r * ldx + k, count);
      if constexpr (O > 1) keep_in_register(input);
      for (int o = 0; o < O; ++o) sums[r][o] = multiply_add(weights[o], input, sums[r][o]);
    }
  });
}

// One output after the other: a single stream through the memory is what it reads fastest.
template <class T>
void dot_row(const T* w, int inputs, const float* x, float* y, Range outputs) {
  for (int o = outputs.begin; o < outputs.end; ++o) {
    f8 sums[1][1] = {};
    dot<1, 1, true>(x, 0, w + int64_t{o} * inputs, inputs, inputs, sums);
    y[o] = sum(sums[0][0]);
  }
}

// A tile of dot_rows: the sums begin and end in `aside` (R, O), or begin with zero and end in y, where it is the
// first or the last part of the inputs.
template <int R, int O>
void dot_tile(const float* x, int64_t ldx, const float* w, int64_t ldw, int inputs, float* aside, bool is_first,
              bool is_last, float* y, int64_t ldy) {
  f8 sums[R][O] = {};
  for (int i = 0; i < R * O && !is_first; ++i) sums[i / O][i % O] = load(aside + i * kLanes);
  dot<R, O, false>(x, ldx, w, ldw, inputs, sums);
  for (int i = 0; i < R * O; ++i) {
    if (is_last) {
      y[i / O * ldy + i % O] = sum(sums[i / O][i % O]);
    } else {
      store(aside + i * kLanes, sums[i / O][i % O]);
    }
  }
}

constexpr int kTileRows = 6, kTileOutputs = 2;
using DotTile = void (*)(const float*, int64_t, const float*, int64_t, int, float*, bool, bool, float*, int64_t);
constexpr DotTile kDotTiles[kTileRows][kTileOutputs] = {
    {dot_tile<1, 1>, dot_tile<1, 2>}, {dot_tile<2, 1>, dot_tile<2, 2>}, {dot_tile<3, 1>, dot_tile<3, 2>},
    {dot_tile<4, 1>, dot_tile<4, 2>}, {dot_tile<5, 1>, dot_tile<5, 2>}, {dot_tile<6, 1>, dot_tile<6, 2>},
};
constexpr size_t kDotFloats = size_t{kOutputs} * kDeep + size_t{kRowsDeep} * kOutputs * kLanes;

template <class T>
void dot_rows(const T* w, int inputs, const float* x, int rows, float* y, int64_t ldy, Range outputs, float* scratch) {
  float* wide = scratch;  // the weights at hand as float32
  float* aside = scratch + size_t{kOutputs} * kDeep;
  for (int row_block = 0; row_block < rows; row_block += kRowsDeep) {
    const int row_end = std::min(rows, row_block + kRowsDeep);
    for (int begin = outputs.begin; begin < outputs.end; begin += kOutputs) {
      const int n = std::min(kOutputs, outputs.end - begin);
      for (int first = 0; first < inputs; first += kDeep) {
        const int depth = std::min(kDeep, inputs - first);
        const T* from = w + int64_t{begin} * inputs + first;
        const float* near = wide;
        int64_t ldw = kDeep;
        if constexpr (std::is_same_v<T, float>) {
          near = from, ldw = inputs;
        } else {
          for (int o = 0; o < n; ++o) {
            for_eights(0, depth, [&](int k, auto some) {
              store(wide + o * kDeep + k, load(from + int64_t{o} * inputs + k, some), some);
            });
          }
        }
        float* put = aside;
        for (int row = row_block; row < row_end; row += kTileRows) {
          const int R = std::min(kTileRows, row_end - row);
          for (int o = 0; o < n; o += kTileOutputs) {
            const int O = std::min(kTileOutputs, n - o);
            kDotTiles[R - 1][O - 1](x + int64_t{row} * inputs + first, inputs, near + o * ldw, ldw, depth, put,
                                    first == 0, first + depth == inputs, y + row * ldy + begin + o, ldy);
            put += R * O * kLanes;
          }
        }
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
      from[u] = w + k * stride, times[u] = f8{} + x[k];
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
