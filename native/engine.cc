// Compiled once for each instruction set: WKV_ISA is its name, WKV_ENGINE the function that gives it away.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
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

#include "block.h"

int64_t thread_floats(const Model& model) {
  const Block& block = model.blocks[0];
  const int largest = std::max({block.width, block.attention, block.hidden});
  return thread_floats(largest, largest);  // the head, by output, keeps no sums
}

int64_t block_floats(const Block& block, int rows, int threads) {
  const TimeMix6& six = block.att6;
  const TimeMix7& seven = block.att7;
  const int64_t D = block.width, A = block.attention, F = block.hidden;
  const int64_t low6 = 2 * six.mix_down.outputs + six.decay_down.outputs;
  const int64_t low7 = seven.w1.outputs + seven.a1.outputs + seven.v1.outputs + seven.g1.outputs;
  const int64_t time = 9 * D + 8 * A + low6 + low7, channel = 5 * D + F;
  const int64_t rounding = 32 * 16;  // every piece begins on a cache line
  return rows * std::max(time, channel) + totals_floats(block.width) + F * threads + rounding;
}

size_t model_floats(const Model& model, int rows, int threads) {
  int64_t largest = 0;
  for (int i = 0; i < model.n_blocks; ++i) largest = std::max(largest, block_floats(model.blocks[i], rows, threads));
  const int64_t D = model.blocks[0].width, A = model.blocks[0].attention;
  return threads * thread_floats(model) + rows * (2 * D + A) + largest + 64;
}

size_t bytes(Format format) { return format == Format::kFloat32 ? 4 : 2; }

// The head, for every row of x.
void read_out(Team& team, const Model& model, const float* x, int rows, float* normed, float* y, float* packed) {
  const int D = model.blocks[0].width;
  const Range mine = team.share(rows, 1);
  for (int64_t row = mine.begin; row < mine.end; ++row) normalize_row(model.ln_out, x + row * D, D, normed + row * D);
  team.sync();
  multiply(model.head, normed, rows, y, team.share(model.head.outputs, grain(model.head)), packed);
}

// The same for the last token of each sequence that is over; returns how many those are.
int read_out_ends(Team& team, const Model& model, const Batch& batch, const float* x, float* normed, float* y,
                  float* packed) {
  const int D = model.blocks[0].width;
  int n = 0;
  for (int s = 0; s < batch.n_sequences; ++s) {
    const Sequence& sequence = batch.sequences[s];
    if (!sequence.is_over) continue;
    if (n % team.count() == team.index()) {
      normalize_row(model.ln_out, x + int64_t{sequence.end - 1} * D, D, normed + int64_t{n} * D);
    }
    ++n;
  }
  if (n == 0) return 0;
  team.sync();
  multiply(model.head, normed, n, y, team.share(model.head.outputs, grain(model.head)), packed);
  return n;
}

bool run_model(const Model& model, const ModelIO& io, float* scratch, int threads, Progress& at,
               Clock::time_point until) {
  const Block& first = model.blocks[0];
  const int D = first.width, A = first.attention, V = model.head.outputs;
  const size_t shift_bytes = bytes(io.shift_format) * D;
  const int64_t memory_size = int64_t{A} * (first.generation == 4 ? 3 : first.head_size);
  bool is_late = false;  // the first of the team says so before a barrier, the others read it after
  int most = 0;
  for (int b = 0; b < io.n_batches; ++b) most = std::max(most, io.batches[b].rows);
  Pool::shared().run(threads, [&](Team& team) {
    float* packed = scratch + team.index() * thread_floats(model);
    Scratch rest{scratch + threads * thread_floats(model)};
    float* x = rest.take(int64_t{most} * D);
    float* normed = rest.take(int64_t{most} * D);
    float* v_first = rest.take(int64_t{most} * A);
    const int64_t* tokens = io.tokens + at.tokens;
    float* y = io.y + at.y;
    int layer = at.layer;
    for (int b = at.batch; b < io.n_batches; ++b, layer = 0) {
      const Batch& batch = io.batches[b];
      const Range mine = team.share(batch.rows, 1);
      for (int64_t row = mine.begin; row < mine.end && layer == 0; ++row) {
        for_eights(0, D, [&](int i, auto count) {
          store(x + row * D + i, load(model.emb, tokens[row] * D + i, count), count);
        });
      }
      team.sync();
      while (layer < model.n_blocks) {
        const auto shift = [&](const void* base) {
          return Array{static_cast<const char*>(base) + layer * io.in.rows * shift_bytes, io.shift_format};
        };
        const auto new_shift = [&](void* base) {
          return MutableArray{static_cast<char*>(base) + layer * io.out.rows * shift_bytes, io.shift_format};
        };
        const BlockIO block_io{batch,
                               x,
                               v_first,
                               shift(io.in.att_shift),
                               shift(io.in.ffn_shift),
                               new_shift(io.out.att_shift),
                               new_shift(io.out.ffn_shift),
                               static_cast<const float*>(io.in.memory) + layer * io.in.rows * memory_size,
                               static_cast<float*>(io.out.memory) + layer * io.out.rows * memory_size,
                               io.skips};
        run_block(team, model.blocks[layer++], block_io, rest, packed);
        if (team.index() == 0) is_late = Clock::now() >= until;
        team.sync();
        if (is_late) {
          if (team.index() == 0) at = {b, layer, tokens - io.tokens, y - io.y};
          return;
        }
      }
      if (io.output == Output::kLogits) {
        read_out(team, model, x, batch.rows, normed, y, packed);
        y += int64_t{batch.rows} * V;
      } else if (io.output == Output::kHidden) {
        for (int64_t row = mine.begin; row < mine.end; ++row) normalize_row(model.ln_out, x + row * D, D, y + row * D);
        y += int64_t{batch.rows} * D;
      } else {
        y += int64_t{read_out_ends(team, model, batch, x, normed, y, packed)} * V;
      }
      tokens += batch.rows;
      team.sync();
    }
  });
  return !is_late;
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
