// One product for every kind of matrix. Included once per instruction set, inside that set's namespace.

// Outputs that stay with one thread.
inline int grain(const Matrix& W) { return W.scales ? kGroup : kGrain; }

// What a thread needs to multiply by matrices of up to so many inputs and outputs, in floats.
inline int64_t thread_floats(int inputs, int outputs) {
  return static_cast<int64_t>(std::max({kPackedFloats, packed_floats(inputs), quantized_floats(inputs, outputs)}) + 15) / 16 * 16;
}

// These outputs of y (rows, W.outputs) = x (rows, W.inputs) W; `scratch` holds thread_floats. ks: of a matrix by
// input, the `count` inputs of a single row that are not zero; null: look at all. (Quantised ones look themselves.)
inline void multiply(const Matrix& W, const float* x, int rows, float* y, Range outputs, float* scratch,
                     const int* ks = nullptr, int count = 0) {
  if (outputs.begin == outputs.end) return;
  if (W.weights.format == Format::kInt8) return multiply_quantized<Bits8>(W, x, rows, y, outputs, scratch);
  if (W.weights.format == Format::kInt4) return multiply_quantized<Bits4>(W, x, rows, y, outputs, scratch);
  with_format(W.weights, [&](auto* w) {
    if (!W.by_input && rows <= kMaxRowsOfDot) {
      dot_rows(w, W.inputs, x, rows, y, W.outputs, outputs);
    } else if (!W.by_input) {
      packed_rows(w, W.inputs, x, rows, y, W.outputs, outputs, scratch);
    } else if (rows == 1) {
      multiply_row(w, W.outputs, x, ks, ks ? count : W.inputs, y, outputs);
    } else {
      multiply_rows(w, W.outputs, W.inputs, x, rows, y, W.outputs, outputs, scratch);
    }
  });
}

// The same for one row and a quantised matrix by input, by the whole team, which shares the inputs: each reads whole rows,
// for of half a row each the processor would fetch the other half too. `totals` holds totals_floats for all. Returns the
// outputs that are this thread's, and in place.
inline int64_t totals_floats(int outputs) { return int64_t{kSums} * kGroup * groups(outputs); }

inline Range multiply_one_row(Team& team, const Matrix& W, const float* x, float* y, float* totals, float* scratch,
                              bool skips) {
  const auto add = [&](auto bits) {
    using Bits = decltype(bits);
    const Rounded rounded = take_rounded(W.inputs, 1, scratch);
    round_row(x, W.inputs, Bits::kOffset, rounded);
    quantized_strips<Bits>(W, rounded, team.share(kSums, 1), {0, groups(W.outputs)}, totals,
                           reinterpret_cast<int32_t*>(scratch), skips);
  };
  W.weights.format == Format::kInt8 ? add(Bits8{}) : add(Bits4{});
  team.sync();
  const Range mine = team.share(W.outputs, kGrain);
  add_sums(totals, int64_t{kGroup} * groups(W.outputs), 0, mine, y);
  return mine;
}
