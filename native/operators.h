// The recurrences over whole sequences, forward and backward, for each instruction set: what training runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wkv {

// B rows of T tokens, contiguous. Of wkv4 H = V = 1, and K are the channels; of token_mix too, and H are the mixes.
struct Tokens {
  int B, T, H, K, V;
  const int64_t* lengths;  // (B,) valid tokens of each row, or null: all T

  int length(int row) const { return lengths ? static_cast<int>(lengths[row]) : T; }
};

// Arrays of float, as the docstrings of wkv.ops name and shape them. A gradient has the shape of what it is of.
struct Wkv4 {
  const float *log_w, *u, *k, *v, *state;
};
struct Wkv4Gradients {
  float *log_w, *u;  // (B, A): of each row
  float *k, *v, *state;
};

struct Wkv6 {
  const float *r, *log_w, *k, *v, *u, *state;
  bool constant_decay;  // log_w is (H, K), as in RWKV-5
};
struct Wkv6Gradients {
  float *r, *log_w, *k, *v;  // log_w is (B, H, K) where the decay is constant: of each row
  float* u;                  // (B, H, K): of each row
  float* state;
};

struct Wkv7 {
  const float *r, *log_w, *k, *v, *kappa, *a, *state;
};
struct Wkv7Gradients {
  float *r, *log_w, *k, *v, *kappa, *a, *state;
};

// K = V. Layer 0 has no first, s and v0: null.
struct TimeMix7Inputs {
  const float *r, *w, *k, *v, *a, *g, *first, *s, *state;
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *weight, *bias;
  float eps;
};
struct TimeMix7Gradients {
  float *r, *w, *k, *v, *a, *g, *first, *s, *state;
  float* parameters;  // (B, 8, A), in the order above: of each row
};
constexpr int kTimeMix7Parameters = 8;

struct TokenMix {
  const float *x, *last, *weights;
  const bool* starts;  // (B, T), or null: before such a token is zero
  bool each_token;     // the weights are (H, B, T, K), not (H, K)
};
struct TokenMixGradients {
  float *x, *last, *weights;
};

struct Operators {
  size_t (*wkv4_scratch)(const Tokens&, int threads);  // in floats
  size_t (*wkv6_scratch)(const Tokens&, int threads);
  size_t (*wkv7_scratch)(const Tokens&, int threads);
  size_t (*time_mix7_scratch)(const Tokens&, int threads);
  size_t (*token_mix_scratch)(const Tokens&, int threads);
  void (*wkv4)(const Tokens&, const Wkv4&, float* y, float* state, float* scratch, int threads);
  void (*wkv4_backward)(const Tokens&, const Wkv4&, const float* dy, const float* dstate, const Wkv4Gradients&,
                        float* scratch, int threads);
  void (*wkv6)(const Tokens&, const Wkv6&, float* y, float* state, float* scratch, int threads);
  void (*wkv6_backward)(const Tokens&, const Wkv6&, const float* dy, const float* dstate, const Wkv6Gradients&,
                        float* scratch, int threads);
  void (*wkv7)(const Tokens&, const Wkv7&, float* y, float* state, float* scratch, int threads);
  void (*wkv7_backward)(const Tokens&, const Wkv7&, const float* dy, const float* dstate, const Wkv7Gradients&,
                        float* scratch, int threads);
  void (*time_mix7)(const Tokens&, const TimeMix7Inputs&, float* y, float* state, float* scratch, int threads);
  void (*time_mix7_backward)(const Tokens&, const TimeMix7Inputs&, const float* dy, const float* dstate,
                             const TimeMix7Gradients&, float* scratch, int threads);
  void (*token_mix)(const Tokens&, const TokenMix&, float* const* mixed, float* scratch, int threads);
  void (*token_mix_backward)(const Tokens&, const TokenMix&, const float* const* grads, const TokenMixGradients&,
                             float* scratch, int threads);
  // (T, K) numbers each
  void (*squared_relu)(const Tokens&, const float* x, float* y, int threads);
  void (*squared_relu_backward)(const Tokens&, const float* x, const float* grad, float* dx, int threads);
};

namespace portable {
extern const Operators operators;
}
namespace avx2 {
extern const Operators operators;
}

}  // namespace wkv
