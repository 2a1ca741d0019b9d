// Eight numbers at a time, in the compiler's vector extension: one source becomes AVX2, SSE2 or NEON.
// Included once per instruction set, inside that set's namespace.

typedef float f8 __attribute__((vector_size(32)));
typedef float f8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h8_unaligned __attribute__((vector_size(16), aligned(2), may_alias));

constexpr int kLanes = 8;

// Stored formats. A weight or a state is read in the format that it has; sums are float32.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline f8 load(const float* p) { return *reinterpret_cast<const f8_unaligned*>(p); }

inline f8 load(const BFloat16* p) {
#if defined(__AVX2__)  // what the compiler makes of the line below takes six instructions
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#else
  const h8 bits = *reinterpret_cast<const h8_unaligned*>(p);
  return reinterpret_cast<f8>(__builtin_convertvector(bits, u8) << 16);
#endif
}

inline f8 load(const Half* p) {
  const h8 bits = *reinterpret_cast<const h8_unaligned*>(p);
#if defined(__F16C__)
  return reinterpret_cast<f8>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  const u8 wide = __builtin_convertvector(bits, u8);
  const u8 magnitude = (wide & 0x7fff) << 13;
  const u8 scaled = reinterpret_cast<u8>(reinterpret_cast<f8>(magnitude) * 0x1p112f);  // subnormals too
  const u8 special = reinterpret_cast<u8>(magnitude >= 0x7c00u << 13);                 // infinity, NaN
  return reinterpret_cast<f8>((special ? (magnitude | 0x7f800000u) : scaled) | (wide & 0x8000u) << 16);
#endif
}

inline float load1(const float* p) { return *p; }
inline float load1(const BFloat16* p) { return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16); }
inline float load1(const Half* p) {
  const Half eight[kLanes] = {*p};
  return load(eight)[0];
}

inline void store(float* p, f8 x) { *reinterpret_cast<f8_unaligned*>(p) = x; }
inline void store1(float* p, float x) { *p = x; }

// To the nearest, ties to even. Not-a-numbers stay what they are.
inline void store1(BFloat16* p, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store1(Half* p, float x) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    magnitude = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to more than the largest
    magnitude = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the addition round
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    magnitude = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000;
  } else {
    magnitude = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | magnitude);
#endif
}

// x in every lane. (f8{} + x is an addition, since x may be -0.)
inline f8 splat(float x) { return f8{x, x, x, x, x, x, x, x}; }

// a b + c, rounded once where the processor can, and the same wherever it is written: whether the compiler joins
// a product and a sum depends on the code around them.
inline f8 multiply_add(f8 a, f8 b, f8 c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline f8 multiply_add(f8 a, float b, f8 c) { return multiply_add(a, splat(b), c); }

inline void keep_in_register(f8& x) {
#if defined(__AVX2__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

inline f8 min(f8 a, f8 b) { return a < b ? a : b; }
inline f8 max(f8 a, f8 b) { return a > b ? a : b; }

// In a fixed order, so that a sum never depends on who computes it.
inline float sum(f8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// The sums of eight vectors, in one such order for each.
inline f8 sums(const f8 (&x)[kLanes]) {
#if defined(__AVX2__)
  const auto pairs = [](f8 a, f8 b) { return _mm256_hadd_ps(a, b); };
  const f8 low = pairs(pairs(x[0], x[1]), pairs(x[2], x[3])), high = pairs(pairs(x[4], x[5]), pairs(x[6], x[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
#else
  f8 all;
  for (int i = 0; i < kLanes; ++i) {
    all[i] = ((x[i][0] + x[i][1]) + (x[i][2] + x[i][3])) + ((x[i][4] + x[i][5]) + (x[i][6] + x[i][7]));
  }
  return all;
#endif
}

// e^x to 1.5 units in the last place; 0 below -87.3, e^88.7 above 88.7.
inline f8 exp(f8 x) {
  const f8 clamped = min(max(x, splat(-87.3f)), splat(88.7f));
  const f8 magic = splat(0x1.8p23f);  // adding it rounds to an integer
  const f8 n = (clamped * 1.44269504088896341f + magic) - magic;
  const f8 r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  f8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const i8 exponent = __builtin_convertvector(n, i8) << 23;
  const f8 result = reinterpret_cast<f8>(reinterpret_cast<i8>(p) + exponent);
  return x == x ? (x < -87.3f ? f8{} : result) : x;
}

inline f8 sigmoid(f8 x) { return 1.0f / (1.0f + exp(-x)); }

inline f8 tanh(f8 x) {
  const f8 square = x * x;
  // Near zero the quotient would lose the digits of x: there, x - x^3/3 + 2x^5/15 - 17x^7/315.
  const f8 series = x - x * square * (1.0f / 3 - square * (2.0f / 15 - square * (17.0f / 315)));
  const f8 quotient = 1.0f - 2.0f / (1.0f + exp(2.0f * x));
  return square < 0.02f ? series : quotient;
}

// What is done to the elements begin .. end, eight at a time: at(i, count) does it to i .. i + count. For whole
// eights the count is a constant of the program; the rest goes through the same arithmetic in a vector of its own.
using Eight = std::integral_constant<int, kLanes>;

template <class At>
inline void for_eights(int begin, int end, At&& at) {
  int i = begin;
  for (; i + kLanes <= end; i += kLanes) at(i, Eight{});
  if (i < end) at(i, end - i);
}

template <class T>
inline f8 load(const T* p, Eight) {
  return load(p);
}

template <class T>
inline f8 load(const T* p, int count) {
  f8 x{};
  for (int i = 0; i < count; ++i) x[i] = load1(p + i);
  return x;
}

inline void store(float* p, f8 x, Eight) { store(p, x); }

#if defined(__AVX2__)
inline void store(BFloat16* p, f8 x, Eight) {
  const i8 bits = reinterpret_cast<i8>(x);
  const i8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  const __m256i words = reinterpret_cast<__m256i>(x == x ? rounded : quiet) & _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

inline void store(Half* p, f8 x, Eight) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
}
#endif

template <class T>
inline void store(T* p, f8 x, int count) {
  for (int i = 0; i < count; ++i) store1(p + i, x[i]);
}

// The first `count` of eight, all of them, or none.
inline void store_some(float* p, f8 x, int count) {
  if (count >= kLanes) {
    store(p, x);
  } else {
    store(p, x, count);
  }
}

inline f8 positive(f8 x) { return x < 0.0f ? f8{} : x; }  // what is not a number stays so

// The first `count` of eight numbers, and zeros.
template <class Count>
inline f8 only(f8 x, Count count) {
  for (int i = count; i < kLanes; ++i) x[i] = 0;
  return x;
}

// The sum of term(i, count) over 0 .. n, the same whoever asks.
template <class Term>
inline float total(int n, Term&& term) {
  f8 sums{};
  for_eights(0, n, [&](int i, auto count) {
    sums += only(term(i, count), count);
  });
  return sum(sums);
}

struct Moments {
  float mean, scale;
};

inline Moments moments(const float* x, int n, float eps, bool has_mean) {
  const float mean = has_mean ? total(n, [&](int i, auto count) { return load(x + i, count); }) / n : 0;
  const float square = total(n, [&](int i, auto count) {
    const f8 away = load(x + i, count) - mean;
    return away * away;
  });
  return {mean, 1 / std::sqrt(square / n + eps)};
}
