// What every number goes through on its own. Included once per instruction set, inside that set's namespace.

// Of Tokens, T are the rows and K the numbers of a row.
template <class Do>
void for_numbers(const Tokens& tokens, int threads, Do&& each) {
  Pool::shared().run(threads, [&](Team& team) {
    const auto [begin, end] = team.share(tokens.T, 1);
    for (int64_t row = begin; row < end; ++row) {
      for_eights(0, tokens.K, [&](int i, auto count) { each(row * tokens.K + i, count); });
    }
  });
}

void squared_relu(const Tokens& tokens, const float* x, float* y, int threads) {
  for_numbers(tokens, threads, [&](int64_t i, auto count) {
    const f8 relu = positive(load(x + i, count));
    store(y + i, relu * relu, count);
  });
}

void squared_relu_backward(const Tokens& tokens, const float* x, const float* grad, float* dx, int threads) {
  for_numbers(tokens, threads, [&](int64_t i, auto count) {
    store(dx + i, 2.0f * positive(load(x + i, count)) * load(grad + i, count), count);
  });
}
