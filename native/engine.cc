// Compiled once for each instruction set: WKV_ISA is its name, WKV_ENGINE the function that gives it away.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace wkv::WKV_ISA {
namespace {

#include "vec.h"
#include "matrix.h"
#include "quantized.h"
#include "multiply.h"

constexpr int kLargestHead = 256;
constexpr int kSequences = 256;  // that go through a block together

#include "block.h"

int64_t thread_floats(const Model& model) {
  const Block& block = model.blocks[0];
  const int largest = std::max({block.width, block.attention, block.hidden});
  return thread_floats(largest, largest);  // the head, by output, keeps no sums
}

int64_t block_floats(const Block& block, int rows, int threads) {
  const TimeMix7& att = block.att7;
  const int64_t D = block.width, A = block.attention, F = block.hidden;
  const int64_t low = block.generation == 7 ? att.w1.outputs + att.a1.outputs + att.v1.outputs + att.g1.outputs : 0;
  const int64_t time = 8 * D + 8 * A + low, channel = 5 * D + F;
  const int64_t rounding = 32 * 16;  // every piece begins on a cache line
  return rows * std::max(time, channel) + F * threads + rounding;
}

size_t model_floats(const Model& model, int rows, int threads) {
  int64_t largest = 0;
  for (int i = 0; i < model.n_blocks; ++i) largest = std::max(largest, block_floats(model.blocks[i], rows, threads));
  const int64_t D = model.blocks[0].width, A = model.blocks[0].attention;
  return threads * thread_floats(model) + rows * (2 * D + A) + largest + 64;
}

size_t bytes(Format format) { return format == Format::kFloat32 ? 4 : 2; }

// ln_out and the head, for rows of x that end in rows of y.
void read_out(Team& team, const Model& model, const float* x, int rows, float* normed, float* y, float* packed) {
  const int D = model.blocks[0].width;
  const Range mine = team.share(rows, 1);
  for (int64_t row = mine.begin; row < mine.end; ++row) normalize_row(model.ln_out, x + row * D, D, normed + row * D);
  team.sync();
  multiply(model.head, normed, rows, y, team.share(model.head.outputs, grain(model.head)), packed);
  team.sync();
}

void run_model(const Model& model, const ModelIO& io, int rows_at_once, float* scratch, int threads) {
  const Block& first = model.blocks[0];
  const int D = first.width, A = first.attention;
  const int T_at_once = std::max(1, rows_at_once / io.n);
  const size_t shift_bytes = bytes(io.shift_format) * D;
  const int64_t memory_size = first.generation == 7 ? int64_t{A} * first.att7.head_size : int64_t{3} * A;
  Pool::shared().run(threads, [&](Team& team) {
    float* packed = scratch + team.index() * thread_floats(model);
    Scratch rest{scratch + team.count() * thread_floats(model)};
    const int most = io.n * std::min(io.T, T_at_once);
    float* x = rest.take(int64_t{most} * D);
    float* normed = rest.take(int64_t{most} * D);
    float* v_first = rest.take(int64_t{most} * A);
    Sequence sequences[kSequences];
    for (int begin = 0; begin < io.T; begin += T_at_once) {
      const int T = std::min(T_at_once, io.T - begin), rows = io.n * T;
      const Range mine = team.share(rows, 1);
      for (int64_t row = mine.begin; row < mine.end; ++row) {
        const int64_t token = io.tokens[row / T * io.T + begin + row % T];
        for_eights(0, D, [&](int i, auto count) { store(x + row * D + i, load(model.emb, token * D + i, count), count); });
      }
      team.sync();
      for (int i = 0; i < model.n_blocks; ++i) {
        // Sequences go through a block together; of very many, a part after the other.
        for (int s = 0; s < io.n; s += kSequences) {
          const int n = std::min(kSequences, io.n - s);
          for (int j = 0; j < n; ++j) {
            const int64_t from = io.from ? io.from[s + j] : s + j, to = io.to ? io.to[s + j] : s + j;
            sequences[j] = {j * T, (j + 1) * T, begin == 0 ? from : to, to};
          }
          const auto shift = [&](const void* base, int64_t layer_rows) {
            return Array{static_cast<const char*>(base) + i * layer_rows * shift_bytes, io.shift_format};
          };
          const auto new_shift = [&](void* base) {
            return MutableArray{static_cast<char*>(base) + i * io.out.rows * shift_bytes, io.shift_format};
          };
          const bool goes_on = begin > 0;  // from what this call has written
          const int64_t in_rows = goes_on ? io.out.rows : io.in.rows;
          const void* memory = goes_on ? io.out.memory : io.in.memory;
          const BlockIO block_io{{n * T, n, sequences},
                                 x + int64_t{s} * T * D,
                                 v_first + int64_t{s} * T * A,
                                 shift(goes_on ? io.out.att_shift : io.in.att_shift, in_rows),
                                 shift(goes_on ? io.out.ffn_shift : io.in.ffn_shift, in_rows),
                                 new_shift(io.out.att_shift),
                                 new_shift(io.out.ffn_shift),
                                 static_cast<const float*>(memory) + i * in_rows * memory_size,
                                 static_cast<float*>(io.out.memory) + i * io.out.rows * memory_size,
                                 io.skips};
          run_block(team, model.blocks[i], block_io, rest, packed);
          team.sync();
        }
      }
      const int V = model.head.outputs;
      if (io.output == Output::kLast) {
        if (begin + T < io.T) continue;
        for (int64_t j = team.index(); j < io.n; j += team.count()) {
          const float* last = x + (j * T + T - 1) * D;
          normalize_row(model.ln_out, last, D, normed + j * D);
        }
        team.sync();
        multiply(model.head, normed, io.n, io.y, team.share(V, grain(model.head)), packed);
      } else if (io.output == Output::kHidden) {
        for (int64_t row = mine.begin; row < mine.end; ++row) {
          normalize_row(model.ln_out, x + row * D, D, io.y + (row / T * io.T + begin + row % T) * D);
        }
      } else if (T == io.T) {
        read_out(team, model, x, rows, normed, io.y, packed);
      } else {
        for (int64_t j = 0; j < io.n; ++j) {
          read_out(team, model, x + j * T * D, T, normed, io.y + (j * io.T + begin) * V, packed);
        }
      }
      team.sync();
    }
  });
}

size_t multiply_floats(const Matrix& W, int threads) { return threads * thread_floats(W.inputs, W.outputs); }

void multiply_all(const Matrix& W, const float* x, int rows, float* y, float* scratch, int threads) {
  Pool::shared().run(threads, [&](Team& team) {
    multiply(W, x, rows, y, team.share(W.outputs, grain(W)), scratch + team.index() * thread_floats(W.inputs, W.outputs));
  });
}

float read(const float* data, int64_t n, int threads) {
  constexpr int kSums = 8, kStep = kSums * kLanes;
  std::atomic<float> all{0};
  Pool::shared().run(threads, [&](Team& team) {
    const int64_t steps = n / kStep, end = steps * (team.index() + 1) / team.count();
    f8 sums[kSums] = {};
    for (int64_t i = steps * team.index() / team.count(); i < end; ++i) {
      for (int j = 0; j < kSums; ++j) sums[j] += load(data + i * kStep + j * kLanes);
    }
    for (int j = 1; j < kSums; ++j) sums[0] += sums[j];
    all.fetch_add(sum(sums[0]));
  });
  return all.load();
}

void convert(const float* from, const MutableArray& to, int64_t n, int threads) {
  constexpr int64_t kChunk = 4096;
  Pool::shared().run(n < 4 * kChunk ? 1 : threads, [&](Team& team) {
    const Range mine = team.share(static_cast<int>((n + kChunk - 1) / kChunk), 1);
    const int64_t begin = mine.begin * kChunk, end = std::min(n, mine.end * kChunk);
    for (int64_t at = begin; at < end; at += kChunk) {
      for_eights(0, static_cast<int>(std::min(kChunk, end - at)), [&](int i, auto count) {
        store(to, at + i, load(from + at + i, count), count);
      });
    }
  });
}

void normalize(const Norm& norm, const float* x, int rows, int width, float* y, int threads) {
  Pool::shared().run(rows < 2 * threads ? 1 : threads, [&](Team& team) {
    const Range mine = team.share(rows, 1);
    for (int64_t row = mine.begin; row < mine.end; ++row) normalize_row(norm, x + row * width, width, y + row * width);
  });
}

}  // namespace

extern const Engine engine;
const Engine engine = {WKV_ISA_NAME, model_floats, run_model, multiply_floats, multiply_all, read, convert, normalize};

}  // namespace wkv::WKV_ISA
