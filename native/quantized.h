// Products with weights of 8 or 4 bits. A group of 64 inputs shares a scale (bfloat16) for each output; x is rounded
// to 16-bit integers, 65 535 steps over its range, so that all that is lost is in the weights. Only with 4 bits by
// output x is rounded to 8 bits, each group with a scale of its own, or arithmetic would take longer than memory.
// Sums within a group are integers, hence exact in any order; groups follow each other in order. Included once per
// instruction set.
//
//     by output   (outputs, groups, 64): 64 bytes, or 32 whose low halves are the first 32 inputs of the group
//     by input    (inputs, outputs rounded up to 64): 64 bytes, or 32 whose low halves are the first 32 outputs
//
// A number of 4 bits is stored with 8 added to it.

typedef int16_t s16 __attribute__((vector_size(32)));  // sixteen of them
typedef int16_t s16_unaligned __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t s8_half __attribute__((vector_size(16)));
typedef int8_t s8_half_unaligned __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t u8_half __attribute__((vector_size(16)));
typedef uint8_t u8_half_unaligned __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int kGroup = 64;
constexpr int kQuarter = 16;         // a group is four vectors
constexpr int kQuantizedRows = 32;   // rows of x that are rounded at a time
constexpr float kLargest = 32767.0f;

inline s16 load(const int16_t* p) { return *reinterpret_cast<const s16_unaligned*>(p); }
inline void store(int16_t* p, s16 x) { *reinterpret_cast<s16_unaligned*>(p) = x; }

typedef int32_t i8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
inline i8 load(const int32_t* p) { return *reinterpret_cast<const i8_unaligned*>(p); }
inline void store(int32_t* p, i8 x) { *reinterpret_cast<i8_unaligned*>(p) = x; }

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

// The pairs (a[i], b[i]): first of 0 .. 7, then of 8 .. 15.
inline void interleave(s16 a, s16 b, s16& left, s16& right) {
#if defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
  const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
  left = reinterpret_cast<s16>(_mm256_permute2x128_si256(low, high, 0x20));
  right = reinterpret_cast<s16>(_mm256_permute2x128_si256(low, high, 0x31));
#else
  for (int i = 0; i < kLanes; ++i) {
    left[2 * i] = a[i], left[2 * i + 1] = b[i];
    right[2 * i] = a[i + kLanes], right[2 * i + 1] = b[i + kLanes];
  }
#endif
}

inline s16 widen(u8_half x) {
#if defined(__AVX2__)
  return reinterpret_cast<s16>(_mm256_cvtepu8_epi16(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, s16);
#endif
}

// What is stored is the number plus kOffset.
struct Bits8 {
  static constexpr int kBytes = kGroup, kOffset = 0;
  static constexpr bool kShortX = false;
  static void unpack(const uint8_t* from, s16 (&to)[4]) {
    for (int q = 0; q < 4; ++q) to[q] = widen(*reinterpret_cast<const s8_half_unaligned*>(from + q * kQuarter));
  }
};

struct Bits4 {
  static constexpr int kBytes = kGroup / 2, kOffset = 8;
  static constexpr bool kShortX = true;
  static void unpack(const uint8_t* from, s16 (&to)[4]) {
    for (int q = 0; q < 2; ++q) {
      const u8_half both = *reinterpret_cast<const u8_half_unaligned*>(from + q * kQuarter);
      to[q] = widen(both & 15);
      to[q + 2] = widen(both >> 4);
    }
  }
};

inline int groups(int n) { return (n + kGroup - 1) / kGroup; }

// The sixteen-bit integers x / scale.
inline void store_rounded(int16_t* p, f8 x, float times) {
  const f8 magic = f8{} + 0x1.8p23f;  // adding it rounds to an integer
  const i8 whole = __builtin_convertvector((x * times + magic) - magic, i8);
#if defined(__AVX2__)
  const __m256i words = _mm256_packs_epi32(reinterpret_cast<__m256i>(whole), reinterpret_cast<__m256i>(whole));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
#else
  for (int j = 0; j < kLanes; ++j) p[j] = static_cast<int16_t>(whole[j]);
#endif
}

// to[i] = x[i] / scale, rounded, where the largest becomes `steps`; the returned scale gives x back. Zeros follow up to
// whole groups. A row with an infinity or a NaN becomes zeros and the scale NaN, so that every product is NaN too.
inline float round_row(const float* x, int n, int16_t* to, float steps = kLargest) {
  f8 largest{}, excess{};  // of what is not finite: NaN; else 0
  for_eights(0, n, [&](int i, auto count) {
    const f8 y = load(x + i, count);
    largest = max(largest, max(y, -y));
    excess += y - y;
  });
  if (const float nan = sum(excess); nan != 0) {
    std::fill(to, to + groups(n) * kGroup, int16_t{0});
    return nan;
  }
  float most = 0;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, largest[i]);
  const float times = most > 0 ? steps / most : 0;
  for_eights(0, n, [&](int i, auto count) { store_rounded(to + i, load(x + i, count), times); });
  for (int i = (n + kLanes - 1) / kLanes * kLanes; i % kGroup; ++i) to[i] = 0;
  return most / steps;
}

// The same for each group by itself.
inline void round_groups(const float* x, int n, int16_t* to, float* scales) {
  for (int g = 0; g < groups(n); ++g) {
    const int begin = g * kGroup;
    scales[g] = round_row(x + begin, std::min(kGroup, n - begin), to + begin, 127.0f);
  }
}

// The eight sums of multiply_pairs over a group of four-bit weights, with 8 added to each, and x in eight bits.
inline i8 multiply_nibbles(const uint8_t* group, const int8_t* x) {
#if defined(__AVX2__)
  const auto bytes = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
  const __m256i both = bytes(group), mask = _mm256_set1_epi8(15);
  const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(both, mask), bytes(x));
  const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), bytes(x + kGroup / 2));
  const __m256i all = _mm256_add_epi16(low, high);
  const __m128i words = _mm_add_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  return reinterpret_cast<i8>(_mm256_cvtepi16_epi32(words));
#else
  s16 w[4];
  Bits4::unpack(group, w);
  i8 sums{};
  for (int q = 0; q < 4; ++q) {
    sums += multiply_pairs(w[q], widen(*reinterpret_cast<const s8_half_unaligned*>(x + q * kQuarter)));
  }
  return sums;
#endif
}

// What a thread needs to multiply by matrices of up to that many inputs and outputs, in floats.
inline size_t quantized_floats(int inputs, int outputs) {
  const size_t whole = size_t{kGroup} * groups(inputs), sums = size_t{kGroup} * groups(outputs);
  const size_t rounded = kQuantizedRows * whole / 2, of_groups = size_t(kQuantizedRows) * groups(inputs);
  return std::max<size_t>(kQuantizedRows, of_groups) + 2 * whole + rounded + std::max(whole, sums);
}

// --- by output ----------------------------------------------------------------------------------------------

constexpr int kAhead = 1024;  // bytes between what is multiplied and what is asked for
constexpr int kScales = 4;    // outputs whose scales are widened together

// x_scales: one of the row, or with short x one of each group.
template <class Bits>
void quantized_dot_row(const Matrix& W, const int16_t* x, const float* x_scales, float* y, Range outputs, float* scales,
                       int32_t* excess) {
  const int n = groups(W.inputs);
  auto* bytes = reinterpret_cast<int8_t*>(excess + n * kLanes);  // of short x
  for (int g = 0; g < n && Bits::kOffset != 0; ++g) {  // what the offset adds to each group
    const s16 offset = s16{} + Bits::kOffset;
    i8 sums{};
    for (int q = 0; q < 4; ++q) sums += multiply_pairs(offset, load(x + g * kGroup + q * kQuarter));
    store(excess + g * kLanes, sums);
  }
  float* of_x = scales + kScales * n;  // those of short x, for as many outputs
  for (int i = 0; i < n * kGroup && Bits::kShortX; ++i) bytes[i] = static_cast<int8_t>(x[i]);
  for (int o = 0; o < kScales && Bits::kShortX; ++o) std::copy(x_scales, x_scales + n, of_x + o * n);
  const auto* group = static_cast<const uint8_t*>(W.weights.data) + int64_t{outputs.begin} * n * Bits::kBytes;
  for (int begin = outputs.begin; begin < outputs.end; begin += kScales) {
    const int end = std::min(begin + kScales, outputs.end);
    const auto* short_scales = static_cast<const BFloat16*>(W.scales) + int64_t{begin} * n;
    for_eights(0, (end - begin) * n, [&](int i, auto count) {
      const f8 of_weights = load(short_scales + i, count);
      store(scales + i, Bits::kShortX ? of_weights * load(of_x + i, count) : of_weights, count);
    });
    // One output after the other: a single stream through the memory is what it reads fastest.
    for (int o = begin; o < end; ++o) {
      const float* of_group = scales + (o - begin) * n;
      f8 total{};
      for (int g = 0; g < n; ++g, group += Bits::kBytes) {
        __builtin_prefetch(group + kAhead);
        i8 whole;
        if constexpr (Bits::kShortX) {
          whole = multiply_nibbles(group, bytes + g * kGroup);
        } else {
          s16 w[4];
          Bits::unpack(group, w);
          const int16_t* input = x + g * kGroup;
          whole = (multiply_pairs(w[0], load(input)) + multiply_pairs(w[1], load(input + kQuarter))) +
                  (multiply_pairs(w[2], load(input + 2 * kQuarter)) + multiply_pairs(w[3], load(input + 3 * kQuarter)));
        }
        if constexpr (Bits::kOffset != 0) whole -= load(excess + g * kLanes);
        total = multiply_add(__builtin_convertvector(whole, f8), of_group[g], total);
      }
      y[o] = sum(total) * (Bits::kShortX ? 1.0f : x_scales[0]);
    }
  }
}

template <int R, int O, bool kShortX>
void quantized_tile(const int16_t* x, int64_t ldx, const int16_t* w, int64_t ldw, int n_groups, const float* scales,
                    int64_t ld_scales, const float* x_scales, float* y, int64_t ldy) {
  f8 total[R][O] = {};
  for (int g = 0; g < n_groups; ++g) {
    i8 whole[R][O] = {};
    for (int q = 0; q < 4; ++q) {
      const int k = g * kGroup + q * kQuarter;
      s16 weights[O];
      for (int o = 0; o < O; ++o) weights[o] = load(w + o * ldw + k);
      for (int r = 0; r < R; ++r) {
        const s16 input = load(x + r * ldx + k);
        for (int o = 0; o < O; ++o) whole[r][o] += multiply_pairs(weights[o], input);
      }
    }
    for (int o = 0; o < O; ++o) {
      for (int r = 0; r < R; ++r) {
        const float scale = scales[o * ld_scales + g] * (kShortX ? x_scales[r * n_groups + g] : 1.0f);
        total[r][o] = multiply_add(__builtin_convertvector(whole[r][o], f8), scale, total[r][o]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < O; ++o) y[r * ldy + o] = sum(total[r][o]) * (kShortX ? 1.0f : x_scales[r]);
  }
}

template <class Bits>
void quantized_dot_rows(const Matrix& W, const int16_t* x, int rows, const float* x_scales, float* y, Range outputs,
                        int16_t* wide, float* scales) {
  constexpr int R = 3, O = 2;
  const int n = groups(W.inputs), depth = n * kGroup;
  const auto* weights = static_cast<const uint8_t*>(W.weights.data);
  const auto* short_scales = static_cast<const BFloat16*>(W.scales);
  for (int begin = outputs.begin; begin < outputs.end; begin += O) {
    const int some = std::min(O, outputs.end - begin);
    for (int o = 0; o < some; ++o) {
      const int64_t at = int64_t{begin + o} * n;
      for (int g = 0; g < n; ++g) {
        s16 w[4];
        Bits::unpack(weights + (at + g) * Bits::kBytes, w);
        for (int q = 0; q < 4; ++q) store(wide + o * depth + g * kGroup + q * kQuarter, w[q] - Bits::kOffset);
      }
      for_eights(0, n, [&](int g, auto count) { store(scales + o * depth + g, load(short_scales + at + g, count), count); });
    }
    const auto tile = [&](auto R_, auto O_, int row) {
      const float* of_x = x_scales + row * (Bits::kShortX ? n : 1);
      quantized_tile<R_, O_, Bits::kShortX>(x + int64_t{row} * depth, depth, wide, depth, n, scales, depth, of_x,
                                            y + int64_t{row} * W.outputs + begin, W.outputs);
    };
    using One = std::integral_constant<int, 1>;
    int row = 0;
    for (; row + R <= rows; row += R) {
      some == O ? tile(std::integral_constant<int, R>{}, std::integral_constant<int, O>{}, row)
                : tile(std::integral_constant<int, R>{}, One{}, row);
    }
    for (; row < rows; ++row) some == O ? tile(One{}, std::integral_constant<int, O>{}, row) : tile(One{}, One{}, row);
  }
}

// --- by input -----------------------------------------------------------------------------------------------

constexpr int kPairs = 2;         // pairs of inputs that one pass over the sums takes along
constexpr int kInputsAhead = 12;  // active inputs between what is multiplied and what is asked for

// For one row of x: group after group, what its inputs that are not zero add to the outputs. `sums`: whole strips.
// active: room for the inputs.
template <class Bits>
void quantized_strips(const Matrix& W, const int16_t* x, float scale, float* y, Range outputs, int32_t* sums,
                      int* active) {
  const int n = groups(W.inputs);
  const auto* weights = static_cast<const uint8_t*>(W.weights.data);
  const auto* short_scales = static_cast<const BFloat16*>(W.scales);
  const int64_t stride = int64_t{groups(W.outputs)} * Bits::kBytes;
  const int first = outputs.begin / kGroup, strips = groups(outputs.end) - first;
  std::fill(y + outputs.begin, y + outputs.end, 0.0f);
  int n_active = 0;
  for (int k = 0; k < W.inputs; ++k) {
    active[n_active] = k;
    n_active += x[k] != 0;
  }
  const int* now = active;
  for (int g = 0; g < n; ++g) {
    int count = 0;
    while (now + count < active + n_active && now[count] < (g + 1) * kGroup) ++count;
    for (int i = 0; i < count; i += 2 * kPairs) {
      const uint8_t *from[2 * kPairs], *soon[2 * kPairs];
      s16 times[kPairs];
      for (int j = 0; j < 2 * kPairs; ++j) {
        const int k = i + j < count ? now[i + j] : now[i];
        const int* later = std::min<const int*>(now + i + j + kInputsAhead, active + n_active - 1);
        from[j] = weights + k * stride + first * Bits::kBytes;
        soon[j] = weights + *later * stride + first * Bits::kBytes;
      }
      for (int p = 0; p < kPairs; ++p) {
        const auto value = [&](int j) { return static_cast<uint16_t>(j < count ? x[now[j]] : 0); };
        times[p] = reinterpret_cast<s16>(u8{} + (value(i + 2 * p) | static_cast<uint32_t>(value(i + 2 * p + 1)) << 16));
      }
      for (int strip = 0; strip < strips; ++strip) {
        int32_t* at = sums + strip * kGroup;
        i8 whole[8];
        for (int v = 0; v < 8; ++v) whole[v] = i == 0 ? i8{} : load(at + v * kLanes);
        for (int p = 0; p < kPairs; ++p) {
          s16 a[4], b[4];
          for (int j = 2 * p; j < 2 * p + 2; ++j) __builtin_prefetch(soon[j] + strip * Bits::kBytes);
          Bits::unpack(from[2 * p] + strip * Bits::kBytes, a);
          Bits::unpack(from[2 * p + 1] + strip * Bits::kBytes, b);
          for (int q = 0; q < 4; ++q) {
            s16 left, right;
            interleave(a[q] - Bits::kOffset, b[q] - Bits::kOffset, left, right);
            whole[2 * q] += multiply_pairs(left, times[p]);
            whole[2 * q + 1] += multiply_pairs(right, times[p]);
          }
        }
        for (int v = 0; v < 8; ++v) store(at + v * kLanes, whole[v]);
      }
    }
    now += count;
    if (count == 0) continue;
    const int begin = first * kGroup;
    for_eights(outputs.begin, outputs.end, [&](int o, auto some) {
      const f8 scales = load(short_scales + int64_t{g} * W.outputs + o, some);
      store(y + o, multiply_add(__builtin_convertvector(load(sums + o - begin), f8), scales, load(y + o, some)), some);
    });
  }
  for_eights(outputs.begin, outputs.end, [&](int i, auto some) { store(y + i, load(y + i, some) * scale, some); });
}

// --- both ---------------------------------------------------------------------------------------------------

template <class Bits>
void multiply_quantized(const Matrix& W, const float* x, int rows, float* y, Range outputs, float* scratch) {
  const int n = groups(W.inputs), whole = n * kGroup;
  float* x_scales = scratch;  // of each row, or with short x of each group of each row
  float* scales = x_scales + kQuantizedRows * std::max(1, n);
  auto* rounded = reinterpret_cast<int16_t*>(scales + 2 * whole);
  int16_t* wide = rounded + int64_t{kQuantizedRows} * whole;
  for (int begin = 0; begin < rows; begin += kQuantizedRows) {
    const int some = std::min(kQuantizedRows, rows - begin);
    for (int r = 0; r < some; ++r) {
      const float* row = x + int64_t{begin + r} * W.inputs;
      int16_t* at = rounded + int64_t{r} * whole;
      if (Bits::kShortX && !W.by_input) {
        round_groups(row, W.inputs, at, x_scales + r * n);
      } else {
        x_scales[r] = round_row(row, W.inputs, at);
      }
    }
    float* to = y + int64_t{begin} * W.outputs;
    if (W.by_input) {
      auto* sums = reinterpret_cast<int32_t*>(rounded + int64_t{kQuantizedRows} * whole);
      for (int r = 0; r < some; ++r) {
        quantized_strips<Bits>(W, rounded + int64_t{r} * whole, x_scales[r], to + int64_t{r} * W.outputs, outputs, sums,
                               reinterpret_cast<int*>(scales));
      }
    } else if (some == 1) {
      quantized_dot_row<Bits>(W, rounded, x_scales, to, outputs, scales, reinterpret_cast<int32_t*>(wide));
    } else {
      quantized_dot_rows<Bits>(W, rounded, some, x_scales, to, outputs, wide, scales);
    }
  }
}
