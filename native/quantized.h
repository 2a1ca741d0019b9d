// Products with weights of 8 or 4 bits. A group of 64 inputs shares a scale (bfloat16) for each output, and x is rounded
// to 8 bits, each group with a scale of its own. So the sum of a group is an integer, the same in any order. The groups
// g, g + 8, g + 16, ... of an output are one sum of float32, and the eight sums are added at the end: bits depend neither
// on the layout nor on how many rows share the call. Included once per instruction set.
//
//     by output   (outputs, groups, 64): 64 bytes, or 32 whose low halves are the first 32 inputs of the group
//     by input    (inputs, outputs rounded up to 64): 64 bytes, or 32 whose low halves are the first 32 outputs
//
// A number of 4 bits is stored with 8 added to it.

typedef int16_t s16 __attribute__((vector_size(32)));  // sixteen of them
typedef int16_t s16_unaligned __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t s8 __attribute__((vector_size(32)));
typedef uint8_t u8_bytes __attribute__((vector_size(32)));
typedef u8_bytes u8_bytes_unaligned __attribute__((aligned(1), may_alias));
typedef int8_t s8_half __attribute__((vector_size(16)));
typedef int8_t s8_half_unaligned __attribute__((vector_size(16), aligned(1), may_alias));
typedef int32_t i8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int kGroup = 64;
constexpr int kHalf = kGroup / 2;    // a group is two vectors of bytes
constexpr int kSums = 8;             // of float32 for each output
constexpr int kQuantizedRows = 96;   // rows of x that are rounded at a time
constexpr int kMaxRowsOfDots = 32;   // so many are multiplied by output without packing the weights
constexpr int kMaxRowsOfStrips = 15; // the same by input: what meets a zero is skipped
constexpr float kSteps = 127;

inline i8 load(const int32_t* p) { return *reinterpret_cast<const i8_unaligned*>(p); }
inline void store(int32_t* p, i8 x) { *reinterpret_cast<i8_unaligned*>(p) = x; }
inline s8 load(const int8_t* p) { return reinterpret_cast<s8>(*reinterpret_cast<const u8_bytes_unaligned*>(p)); }
inline u8_bytes load(const uint8_t* p) { return *reinterpret_cast<const u8_bytes_unaligned*>(p); }

inline s16 widen(s8_half x) {
#if defined(__AVX2__)
  return reinterpret_cast<s16>(_mm256_cvtepi8_epi16(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, s16);
#endif
}

// a[2i] b[2i] + a[2i + 1] b[2i + 1]
inline i8 multiply_pairs(s16 a, s16 b) {
#if defined(__AVX2__)
  return reinterpret_cast<i8>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  i8 sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = int32_t{a[2 * i]} * b[2 * i] + int32_t{a[2 * i + 1]} * b[2 * i + 1];
  return sums;
#endif
}

// The sums of a[4i] b[4i] to a[4i + 3] b[4i + 3]. No pair of products leaves 16 bits: |b| <= 127.
inline i8 multiply_fours(s8 a, s8 b) {
#if defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
  return reinterpret_cast<i8>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  i8 sums{};
  for (int i = 0; i < 4 * kLanes; ++i) sums[i / 4] += int32_t{a[i]} * b[i];
  return sums;
#endif
}

// The same for a from 0 to 15, over two vectors each.
inline i8 multiply_small_fours(u8_bytes a0, s8 b0, u8_bytes a1, s8 b1) {
#if defined(__AVX2__)
  const auto pairs = [](u8_bytes a, s8 b) {
    return _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  };
  return reinterpret_cast<i8>(_mm256_madd_epi16(_mm256_add_epi16(pairs(a0, b0), pairs(a1, b1)), _mm256_set1_epi16(1)));
#else
  return multiply_fours(reinterpret_cast<s8>(a0), b0) + multiply_fours(reinterpret_cast<s8>(a1), b1);
#endif
}

inline u8_bytes low_halves(u8_bytes x) { return x & 15; }
inline u8_bytes high_halves(u8_bytes x) {
  typedef uint16_t u16 __attribute__((vector_size(32)));  // there is no shift of bytes
  return reinterpret_cast<u8_bytes>(reinterpret_cast<u16>(x) >> 4) & 15;
}

// What is stored is the number plus kOffset.
struct Bits8 {
  static constexpr int kBytes = kGroup, kOffset = 0;
  static void unpack(const uint8_t* from, s8 (&to)[2]) {
    for (int i = 0; i < 2; ++i) to[i] = reinterpret_cast<s8>(load(from + i * kHalf));
  }
  // The products of a group with R rows of x, in eight sums each.
  template <int R>
  [[gnu::always_inline]] static void multiply(const uint8_t* group, const int8_t* x, int64_t ldx, i8 (&sums)[R]) {
    s8 w[2];
    unpack(group, w);
    for (int r = 0; r < R; ++r) {
      sums[r] = multiply_fours(w[0], load(x + r * ldx)) + multiply_fours(w[1], load(x + r * ldx + kHalf));
    }
  }
};

struct Bits4 {
  static constexpr int kBytes = kGroup / 2, kOffset = 8;
  static void unpack(const uint8_t* from, s8 (&to)[2]) {
    const u8_bytes both = load(from);
    to[0] = reinterpret_cast<s8>(low_halves(both));
    to[1] = reinterpret_cast<s8>(high_halves(both));
  }
  template <int R>
  [[gnu::always_inline]] static void multiply(const uint8_t* group, const int8_t* x, int64_t ldx, i8 (&sums)[R]) {
    const u8_bytes both = load(group), low = low_halves(both), high = high_halves(both);
    for (int r = 0; r < R; ++r) {
      sums[r] = multiply_small_fours(low, load(x + r * ldx), high, load(x + r * ldx + kHalf));
    }
  }
};

inline int groups(int n) { return (n + kGroup - 1) / kGroup; }
inline int groups_of_sums(int n) { return (groups(n) + kSums - 1) / kSums * kSums; }

// Rows of x, rounded. `stride` numbers and `n` groups to a row, with zeros behind those that there are.
struct Rounded {
  int8_t* numbers;
  float* scales;     // a group with an infinity or a NaN is zeros and the scale NaN, so that every product is NaN too
  int32_t* offsets;  // what the offset adds to the sum of a group
  int64_t stride;
  int n;

  Rounded row(int r) const { return {numbers + r * stride, scales + r * n, offsets + r * n, stride, n}; }
};

inline float round_group(const float* x, int n, int8_t* to) {
  f8 largest{}, excess{};  // of what is not finite: NaN; else 0
  for_eights(0, n, [&](int i, auto count) {
    const f8 y = load(x + i, count);
    largest = max(largest, max(y, -y));
    excess += y - y;
  });
  std::memset(to, 0, kGroup);
  if (const float nan = sum(excess); nan != 0) return nan;
  float most = 0;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, largest[i]);
  if (most < 1e-36f) return 0;  // as good as nothing, and its reciprocal may be infinite
  const float times = kSteps / most;
  const f8 magic = splat(0x1.8p23f);  // adding it rounds to an integer
  for_eights(0, n, [&](int i, auto count) {
    const i8 whole = __builtin_convertvector((load(x + i, count) * times + magic) - magic, i8);
#if defined(__AVX2__)
    const __m256i words = _mm256_packs_epi32(reinterpret_cast<__m256i>(whole), reinterpret_cast<__m256i>(whole));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, words), _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), _mm256_castsi256_si128(bytes));
#else
    for (int j = 0; j < kLanes; ++j) to[i + j] = static_cast<int8_t>(whole[j]);
#endif
  });
  return most / kSteps;
}

inline void round_row(const float* x, int inputs, int offset, const Rounded& to) {
  const int n = groups(inputs);
  std::fill(to.scales + n, to.scales + to.n, 0.0f);
  std::fill(to.offsets + n, to.offsets + to.n, 0);
  for (int g = 0; g < n; ++g) {
    const int begin = g * kGroup;
    int8_t* at = to.numbers + begin;
    to.scales[g] = round_group(x + begin, std::min(kGroup, inputs - begin), at);
    int all = 0;
    for (int i = 0; i < kGroup && offset; ++i) all += at[i];
    to.offsets[g] = offset * all;
  }
}

// --- by output: few rows ------------------------------------------------------------------------------------------

using Four = std::integral_constant<int, 4>;  // as in rows of 768: worth code of its own

constexpr int kAhead = 1024;  // bytes between what is multiplied and what is asked for

inline i8 add_neighbours(i8 a, i8 b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// The groups from this on, as far as there are: their eight sums each become one.
template <class Bits, class Count, int R>
[[gnu::always_inline]] inline void sum_groups(const uint8_t* group, Count count, const int8_t* x, int64_t ldx, i8 (&sums)[R]) {
  const auto two = [&](int i, i8 (&to)[R]) __attribute__((always_inline)) {
    i8 a[R] = {}, b[R] = {};
    if (i < count) Bits::multiply(group + i * Bits::kBytes, x + i * kGroup, ldx, a);
    if (i + 1 < count) Bits::multiply(group + (i + 1) * Bits::kBytes, x + (i + 1) * kGroup, ldx, b);
    for (int r = 0; r < R; ++r) to[r] = add_neighbours(a[r], b[r]);
  };
  const auto four = [&](int i, i8 (&to)[R]) __attribute__((always_inline)) {
    i8 a[R], b[R];
    two(i, a);
    two(i + 2, b);
    for (int r = 0; r < R; ++r) to[r] = add_neighbours(a[r], b[r]);
  };
  i8 first[R], second[R] = {};
  four(0, first);
  if (count > 4) four(4, second);
  for (int r = 0; r < R; ++r) {
    sums[r] = __builtin_shufflevector(first[r], second[r], 0, 1, 2, 3, 8, 9, 10, 11) +
              __builtin_shufflevector(first[r], second[r], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// One output after the other: a single stream through the memory is what it reads fastest.
template <class Bits, int R>
void quantized_dots(const Matrix& W, const Rounded& x, float* y, Range outputs) {
  const int n = groups(W.inputs), last = n % kSums;
  const auto* group = static_cast<const uint8_t*>(W.weights.data) + int64_t{outputs.begin} * n * Bits::kBytes;
  const i8 lanes = {0, 1, 2, 3, 4, 5, 6, 7}, valid = lanes < last;
  for (int o = outputs.begin; o < outputs.end; ++o) {
    const auto* scales = static_cast<const BFloat16*>(W.scales) + int64_t{o} * n;
    f8 total[R] = {};
    const auto eight = [&](int g, auto count, f8 of_weights) __attribute__((always_inline)) {
      for (int line = 0; line < count * Bits::kBytes; line += 64) __builtin_prefetch(group + line + kAhead);
      i8 whole[R];
      sum_groups<Bits>(group, count, x.numbers + g * kGroup, x.stride, whole);
      group += count * Bits::kBytes;
      for (int r = 0; r < R; ++r) {
        if constexpr (Bits::kOffset != 0) whole[r] -= load(x.offsets + r * x.n + g);
        const f8 scale = of_weights * load(x.scales + r * x.n + g);
        total[r] = multiply_add(__builtin_convertvector(whole[r], f8), scale, total[r]);
      }
    };
    for (int g = 0; g + kSums <= n; g += kSums) eight(g, Eight{}, load(scales + g));
    if (last) {  // what follows are scales of the next output, unless there is none
      const bool is_inside = o + 1 < W.outputs && n >= kSums;
      const f8 some = is_inside ? load(scales + n - last) : load(scales + n - last, last);
      const f8 masked = reinterpret_cast<f8>(reinterpret_cast<i8>(some) & valid);
      last == 4 ? eight(n - 4, Four{}, masked) : eight(n - last, last, masked);
    }
    for (int r = 0; r < R; ++r) y[int64_t{r} * W.outputs + o] = sum(total[r]);
  }
}

constexpr int kRowsOfStream = 8;    // of x, up to which the weights go past once for every four
constexpr int kOutputsOfDots = 16;  // else so many stay in the first-level cache for all rows

template <class Bits>
void quantized_dots(const Matrix& W, const Rounded& x, int rows, float* y, Range outputs) {
  const int64_t bytes = int64_t{groups(W.inputs)} * Bits::kBytes;  // of an output
  const auto* weights = static_cast<const char*>(W.weights.data);
  const bool is_stream = rows <= kRowsOfStream;
  const int width = is_stream ? outputs.end - outputs.begin : kOutputsOfDots;
  for (int o = outputs.begin; o < outputs.end; o += width) {
    const Range these{o, std::min(outputs.end, o + width)};
    for (int r = 0, step; r < rows; r += step) {
      step = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
      if (!is_stream) ask_for(weights + these.end * bytes, width * bytes, r, rows);
      float* to = y + int64_t{r} * W.outputs;
      switch (step) {
        case 4: quantized_dots<Bits, 4>(W, x.row(r), to, these); break;
        case 2: quantized_dots<Bits, 2>(W, x.row(r), to, these); break;
        default: quantized_dots<Bits, 1>(W, x.row(r), to, these);
      }
    }
  }
}

// --- many rows ----------------------------------------------------------------------------------------------------

// The eight sums of outputs, in the order in which `sum` adds those of one.
template <class Of>
inline f8 add_eight(Of&& of) {
  return ((of(0) + of(4)) + (of(2) + of(6))) + ((of(1) + of(5)) + (of(3) + of(7)));
}

// A panel of 16 outputs: (inputs / 2, 16) pairs of 16 bits, and (groups, 16) scales.
struct QuantizedPanel {
  int16_t* pairs;
  float* scales;
};

// Sixteen bytes of the group as words, from `begin` on.
template <class Bits>
inline s16 widened(const uint8_t* group, int begin) {
  s8 both[2];
  Bits::unpack(group, both);
  alignas(32) int8_t bytes[kGroup];
  *reinterpret_cast<s8*>(bytes) = both[0];
  *reinterpret_cast<s8*>(bytes + kHalf) = both[1];
  return widen(*reinterpret_cast<const s8_half_unaligned*>(bytes + begin)) - Bits::kOffset;
}

template <class Bits>
void pack_by_output(const Matrix& W, int begin, int count, const QuantizedPanel& panel) {
  const int n = groups(W.inputs);
  const auto* weights = static_cast<const uint8_t*>(W.weights.data);
  const auto* scales = static_cast<const BFloat16*>(W.scales);
  for (int g = 0; g < n; ++g) {
    for (int o = 0; o < kPanel; ++o) {
      panel.scales[g * kPanel + o] = o < count ? load1(scales + int64_t{begin + o} * n + g) : 0.0f;
    }
    for (int left = 0; left < kPanel; left += kLanes) {
      s8 bytes[kLanes][2] = {};
      for (int o = 0; o < kLanes && left + o < count; ++o) {
        Bits::unpack(weights + (int64_t{begin + left + o} * n + g) * Bits::kBytes, bytes[o]);
      }
      for (int quarter = 0; quarter < 4; ++quarter) {  // eight pairs of eight outputs
        i8 pairs[kLanes];
        for (int o = 0; o < kLanes; ++o) {
          const auto* from = reinterpret_cast<const int8_t*>(bytes[o]) + quarter * 2 * kLanes;
          const s16 wide = widen(*reinterpret_cast<const s8_half_unaligned*>(from)) - Bits::kOffset;
          pairs[o] = reinterpret_cast<i8>(wide);
        }
        transpose(pairs);
        auto* to = reinterpret_cast<int32_t*>(panel.pairs) + (g * kHalf + quarter * kLanes) * kPanel + left;
        for (int p = 0; p < kLanes; ++p) store(to + p * kPanel, pairs[p]);
      }
    }
  }
}

template <class Bits>
void pack_by_input(const Matrix& W, int begin, int count, const QuantizedPanel& panel) {
  const int n = groups(W.inputs);
  const int64_t stride = int64_t{groups(W.outputs)} * Bits::kBytes;
  const auto* from = static_cast<const uint8_t*>(W.weights.data) + begin / kGroup * Bits::kBytes;
  const auto* scales = static_cast<const BFloat16*>(W.scales);
  const auto words = [&](int k) { return k < W.inputs ? widened<Bits>(from + k * stride, begin % kGroup) : s16{}; };
  for (int g = 0; g < n; ++g) {
    for (int o = 0; o < kPanel; ++o) {
      panel.scales[g * kPanel + o] = o < count ? load1(scales + int64_t{g} * W.outputs + begin + o) : 0.0f;
    }
    for (int p = g * kHalf; p < (g + 1) * kHalf; ++p) {
      const s16 a = words(2 * p), b = words(2 * p + 1);
      const s16 low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const s16 high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      auto* to = reinterpret_cast<int32_t*>(panel.pairs) + p * kPanel;
      store(to, reinterpret_cast<i8>(low));
      store(to + kLanes, reinterpret_cast<i8>(high));
    }
  }
}

// y (R, 16) = x (R, inputs) panel
template <int R>
void quantized_tile(const int16_t* x, const Rounded& rounded, const QuantizedPanel& panel, int n, float* y, int64_t ldy,
                    int count) {
  f8 total[kSums][R][2] = {};
  for (int g = 0; g < n; ++g) {
    i8 whole[R][2] = {};
    const int16_t* at = x + g * kGroup;
    const auto* pairs = reinterpret_cast<const int32_t*>(panel.pairs) + g * kHalf * kPanel;
    for (int p = 0; p < kHalf; ++p) {
      const s16 left = reinterpret_cast<s16>(load(pairs + p * kPanel));
      const s16 right = reinterpret_cast<s16>(load(pairs + p * kPanel + kLanes));
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, at + r * rounded.stride + 2 * p, sizeof pair);
        const s16 times = reinterpret_cast<s16>(i8{} + pair);
        whole[r][0] += multiply_pairs(left, times);
        whole[r][1] += multiply_pairs(right, times);
      }
    }
    for (int v = 0; v < 2; ++v) {
      const f8 of_weights = load(panel.scales + g * kPanel + v * kLanes);
      for (int r = 0; r < R; ++r) {
        f8& sum = total[g % kSums][r][v];
        sum = multiply_add(__builtin_convertvector(whole[r][v], f8), of_weights * rounded.scales[r * rounded.n + g], sum);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) {
      const f8 all = add_eight([&](int i) { return total[i][r][v]; });
      store_some(y + r * ldy + v * kLanes, all, count - v * kLanes);
    }
  }
}

template <class Bits>
void quantized_panels(const Matrix& W, const Rounded& x, int rows, float* y, Range outputs, int16_t* wide,
                      const QuantizedPanel& panel) {
  const int n = groups(W.inputs);
  for (int64_t i = 0; i < rows * x.stride; i += 2 * kLanes) {
    *reinterpret_cast<s16_unaligned*>(wide + i) = widen(*reinterpret_cast<const s8_half_unaligned*>(x.numbers + i));
  }
  for (int begin = outputs.begin; begin < outputs.end; begin += kPanel) {
    const int count = std::min(kPanel, outputs.end - begin);
    W.by_input ? pack_by_input<Bits>(W, begin, count, panel) : pack_by_output<Bits>(W, begin, count, panel);
    constexpr void (*tiles[])(const int16_t*, const Rounded&, const QuantizedPanel&, int, float*, int64_t, int) = {
        quantized_tile<1>, quantized_tile<2>, quantized_tile<3>, quantized_tile<4>, quantized_tile<5>, quantized_tile<6>};
    for (int row = 0; row < rows; row += kRows) {
      tiles[std::min(kRows, rows - row) - 1](wide + row * x.stride, x.row(row), panel, n,
                                             y + int64_t{row} * W.outputs + begin, W.outputs, count);
    }
  }
}

// --- by input: one row --------------------------------------------------------------------------------------------

constexpr int kFours = 2;         // fours of inputs that one pass over the sums takes along
constexpr int kInputsAhead = 12;  // active inputs between what is multiplied and what is asked for

// Four outputs' bytes of the inputs a, b, c, d side by side, and so on. Of 32 outputs, first those of to[0]: 0 to 3 and
// 16 to 19, then the next four of both halves.
inline void interleave(const s8 (&x)[4], s8 (&to)[4]) {
  const auto bytes = [](s8 a, s8 b, s8& low, s8& high) {
    low = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16, 48, 17, 49, 18, 50, 19,
                                  51, 20, 52, 21, 53, 22, 54, 23, 55);
    high = __builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 24, 56, 25, 57, 26,
                                   58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  };
  const auto pairs = [](s8 a, s8 b, s8& low, s8& high) {
    const s16 x = reinterpret_cast<s16>(a), y = reinterpret_cast<s16>(b);
    low = reinterpret_cast<s8>(__builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27));
    high = reinterpret_cast<s8>(__builtin_shufflevector(x, y, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31));
  };
  s8 ab[2], cd[2];
  bytes(x[0], x[1], ab[0], ab[1]);
  bytes(x[2], x[3], cd[0], cd[1]);
  pairs(ab[0], cd[0], to[0], to[1]);
  pairs(ab[1], cd[1], to[2], to[3]);
}

// What the inputs of the groups that belong to the sums `of` add to the outputs of whole strips of 64. totals: (8,
// outputs of the strips), those of `of` are filled; whole: (outputs of the strips). Inputs whose x is zero are not read,
// where it skips.
template <class Bits>
void quantized_strips(const Matrix& W, const Rounded& x, Range of, Range strips, float* totals, int32_t* whole,
                      bool skips) {
  const int n = groups(W.inputs), first = strips.begin * kGroup, width = (strips.end - strips.begin) * kGroup;
  const auto* weights = static_cast<const uint8_t*>(W.weights.data) + strips.begin * Bits::kBytes;
  const auto* scales = static_cast<const BFloat16*>(W.scales);
  const int64_t stride = int64_t{groups(W.outputs)} * Bits::kBytes;
  std::fill(totals + int64_t{of.begin} * width, totals + int64_t{of.end} * width, 0.0f);
  for (int i = 0, each = of.end - of.begin; i < (n + kSums - 1) / kSums * each; ++i) {
    const int g = i / each * kSums + of.begin + i % each;
    if (g >= n) break;
    int active[kGroup + kInputsAhead], count = 0;
    for (int k = g * kGroup; k < std::min((g + 1) * kGroup, W.inputs); ++k) {
      active[count] = k;
      count += x.numbers[k] != 0 || !skips;
    }
    if (count == 0 && x.scales[g] == 0) continue;
    for (int i = 0; i < kInputsAhead; ++i) active[count + i] = count ? active[count - 1] : g * kGroup;
    std::fill(whole, whole + width, 0);
    for (int i = 0; i < count; i += 4 * kFours) {
      const uint8_t *from[4 * kFours], *soon[4 * kFours];
      s8 times[kFours];
      for (int f = 0; f < kFours; ++f) {
        uint32_t four = 0;
        for (int j = 0; j < 4; ++j) {
          const int at = i + 4 * f + j, k = active[std::min(at, count - 1)];
          if (at < count) four |= static_cast<uint32_t>(static_cast<uint8_t>(x.numbers[k])) << 8 * j;
          from[4 * f + j] = weights + k * stride;
          soon[4 * f + j] = weights + active[std::min(at + kInputsAhead, count + kInputsAhead - 1)] * stride;
        }
        times[f] = reinterpret_cast<s8>(u8{} + four);
      }
      for (int strip = 0; strip < strips.end - strips.begin; ++strip) {
        int32_t* at = whole + strip * kGroup;
        i8 sums[kLanes];
        for (int v = 0; v < kLanes; ++v) sums[v] = load(at + v * kLanes);
        for (int f = 0; f < kFours; ++f) {
          s8 w[4][2];
          for (int j = 0; j < 4; ++j) {
            __builtin_prefetch(soon[4 * f + j] + strip * Bits::kBytes);
            Bits::unpack(from[4 * f + j] + strip * Bits::kBytes, w[j]);
          }
          for (int half = 0; half < 2; ++half) {
            const s8 rows[4] = {w[0][half], w[1][half], w[2][half], w[3][half]};
            s8 fours[4];
            interleave(rows, fours);
            for (int v = 0; v < 4; ++v) sums[4 * half + v] += multiply_fours(times[f], fours[v]);
          }
        }
        for (int v = 0; v < kLanes; ++v) store(at + v * kLanes, sums[v]);
      }
    }
    float* total = totals + int64_t{g % kSums} * width;
    for (int o = 0; o < width && first + o < W.outputs; o += kHalf) {
      const int32_t* at = whole + o;
      const i8 a = load(at), b = load(at + kLanes), c = load(at + 2 * kLanes), d = load(at + 3 * kLanes);
      const i8 in_order[] = {__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11),
                             __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11),
                             __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15),
                             __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15)};
      for_eights(o, std::min(o + kHalf, W.outputs - first), [&](int to, auto some) {
        const f8 scale = load(scales + int64_t{g} * W.outputs + first + to, some) * x.scales[g];
        const i8 sum = in_order[(to - o) / kLanes] - x.offsets[g];
        store(total + to, multiply_add(__builtin_convertvector(sum, f8), scale, load(total + to)));
      });
    }
  }
}

// y = the eight sums added, for these outputs.
inline void add_sums(const float* totals, int64_t width, int first, Range outputs, float* y) {
  for_eights(outputs.begin, outputs.end, [&](int o, auto some) {
    store(y + o, add_eight([&](int i) { return load(totals + i * width + o - first); }), some);
  });
}

// --- all ----------------------------------------------------------------------------------------------------------

// What a thread needs to multiply by matrices of up to that many inputs and outputs, in floats.
inline size_t quantized_floats(int inputs, int outputs) {
  const size_t whole = size_t{kGroup} * groups_of_sums(inputs), rows = kQuantizedRows;
  const size_t rounded = rows * (whole / 4 + 2 * whole / kGroup);
  const size_t panels = rows * whole / 2 + kPanel * whole / 2 + kPanel * whole / kGroup;
  const size_t strips = size_t{kSums + 1} * kGroup * groups(outputs);
  return rounded + std::max(panels, strips) + 64;
}

inline Rounded take_rounded(int inputs, int rows, float*& scratch) {
  const int n = groups_of_sums(inputs);
  const Rounded x{reinterpret_cast<int8_t*>(scratch), scratch + int64_t{rows} * n * kGroup / 4,
                  reinterpret_cast<int32_t*>(scratch + int64_t{rows} * n * (kGroup / 4 + 1)), int64_t{n} * kGroup, n};
  scratch += int64_t{rows} * n * (kGroup / 4 + 2);
  return x;
}

template <class Bits>
void multiply_quantized(const Matrix& W, const float* x, int rows, float* y, Range outputs, float* scratch) {
  const Rounded rounded = take_rounded(W.inputs, kQuantizedRows, scratch);
  auto* wide = reinterpret_cast<int16_t*>(scratch);
  int16_t* pairs = wide + kQuantizedRows * rounded.stride;
  const QuantizedPanel panel{pairs, reinterpret_cast<float*>(pairs + kPanel * rounded.stride)};
  const Range strips{outputs.begin / kGroup, groups(outputs.end)};
  const int64_t width = int64_t{kGroup} * (strips.end - strips.begin);
  for (int begin = 0; begin < rows; begin += kQuantizedRows) {
    const int some = std::min(kQuantizedRows, rows - begin);
    for (int r = 0; r < some; ++r) round_row(x + int64_t{begin + r} * W.inputs, W.inputs, Bits::kOffset, rounded.row(r));
    float* to = y + int64_t{begin} * W.outputs;
    if (some > (W.by_input ? kMaxRowsOfStrips : kMaxRowsOfDots)) {
      quantized_panels<Bits>(W, rounded, some, to, outputs, wide, panel);
    } else if (W.by_input) {
      for (int r = 0; r < some; ++r) {
        quantized_strips<Bits>(W, rounded.row(r), {0, kSums}, strips, scratch,
                               reinterpret_cast<int32_t*>(scratch + kSums * width), true);
        add_sums(scratch, width, strips.begin * kGroup, outputs, to + int64_t{r} * W.outputs);
      }
    } else {
      quantized_dots<Bits>(W, rounded, some, to, outputs);
    }
  }
}
