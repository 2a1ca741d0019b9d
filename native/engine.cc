// Compiled once for each instruction set: WKV_ISA is its name, WKV_ENGINE the function that gives it away.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace wkv::WKV_ISA {
namespace {

#include "vec.h"
#include "matrix.h"

constexpr int kLargestHead = 256;

#include "block.h"

int64_t packed_floats(int threads) { return threads * static_cast<int64_t>(kScratchFloats); }

size_t scratch_floats(const Block& block, int rows, int threads) {
  const TimeMix7& att = block.att7;
  const int64_t D = block.width, A = block.attention, F = block.hidden;
  const int64_t low = block.generation == 7 ? att.w1.outputs + att.a1.outputs + att.v1.outputs + att.g1.outputs : 0;
  const int64_t time = 8 * D + 8 * A + low, channel = 5 * D + F;
  const int64_t rounding = 32 * 16;  // every piece begins on a cache line
  return packed_floats(threads) + rows * std::max(time, channel) + F * threads + rounding;
}

void run_block(const Block& block, const BlockIO& io, float* scratch, int threads) {
  Pool::shared().run(threads, [&](Team& team) {
    float* packed = scratch + packed_floats(team.index());
    const Scratch rest{scratch + packed_floats(team.count())};
    enter(team, block, io);
    if (block.generation == 7) {
      time_mix7(team, block, io, rest, packed);
    } else {
      time_mix4(team, block, io, rest, packed);
    }
    channel_mix(team, block, io, rest, packed);
  });
}

void multiply_all(const Matrix& W, const float* x, int rows, float* y, float* scratch, int threads) {
  Pool::shared().run(threads, [&](Team& team) {
    multiply(W, x, rows, y, team.share(W.outputs, kGrain), scratch + packed_floats(team.index()));
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
const Engine engine = {WKV_ISA_NAME, scratch_floats, run_block, multiply_all, normalize};

}  // namespace wkv::WKV_ISA
