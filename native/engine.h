// What a step of a model is made of, for each instruction set once. Plain pointers: nothing here knows torch.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace wkv {

enum class Format : int { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };  // the last two of matrices alone

// Numbers in memory, read as float32 whatever their format.
struct Array {
  const void* data = nullptr;
  Format format = Format::kFloat32;
};

struct MutableArray {
  void* data = nullptr;
  Format format = Format::kFloat32;
};

// y = W x. By output, as checkpoints have it: the `inputs` numbers that make y[o] stand side by side. By input:
// the `outputs` numbers that x[k] is multiplied with do, so that those of a zero need not be read.
struct Matrix {
  Array weights;
  int inputs = 0, outputs = 0;
  bool by_input = false;
  const void* scales = nullptr;  // of kInt8 and kInt4: see quantized.h
};

// The tokens of one sequence are rows that follow each other; its state is one row of each state array.
struct Sequence {
  int begin, end;
  int64_t from, to;  // rows of the state that is read and of the one that is written; they may be equal
  bool goes_on;      // from what this call has written: an earlier part of it was in another batch
  bool is_over;      // no part of it follows
};

struct Batch {
  int rows;
  int n_sequences;
  const Sequence* sequences;
};

struct Norm {
  Array weight, bias;  // no bias: the root mean square alone is taken out
  float eps;
};

struct ChannelMix4 {  // and the receptance of generations 4 to 6
  Array mix_k, mix_r;
  Matrix key, receptance, value;
};

struct TimeMix4 {
  Array mix_k, mix_v, mix_r, decay, first;
  Matrix key, value, receptance, output;
};

struct TimeMix6 {  // and of generation 5
  Array mix_x, mixes[5];        // w k v r g; generation 5 has no x and no w, 5.0 no g
  Matrix mix_down, mix_up[5];   // generation 6
  Array decay, first;           // (A), before generation 5.2 (H)
  Matrix decay_down, decay_up;  // generation 6
  bool is_per_head, first_is_log;
  Matrix receptance, key, value, gate, output;  // no gate in generation 5.0
  Norm ln_x;
};

struct TimeMix7 {
  Array mixes[6];  // r w k v a g
  Array w0, a0, v0, k_k, k_a, r_k;
  Matrix w1, w2, a1, a2, v1, v2, g1, g2;  // no v1 in layer 0
  Matrix receptance, key, value, output;
  Norm ln_x;
};

struct Block {
  int generation;
  int width, attention, hidden;  // D, A, F
  int n_head, head_size;         // H, N; generations 5 to 7
  Norm ln0, ln1, ln2;            // no ln0 but in layer 0
  bool squares;                  // relu^2, else relu
  TimeMix4 att4;
  TimeMix6 att6;
  TimeMix7 att7;
  ChannelMix4 ffn;  // without receptance in generation 7
};

// What a block reads and writes besides its weights. Rows are tokens.
struct BlockIO {
  Batch batch;
  float* x;        // (rows, D), changed in place
  float* v_first;  // (rows, A): written by layer 0, read by the others; generation 7
  Array att_shift_in, ffn_shift_in;          // (states, D)
  MutableArray att_shift_out, ffn_shift_out;
  const float* memory_in;  // (states, 3, A) or (states, H, V, K)
  float* memory_out;
  bool skips;              // whether rows of ffn.value that meet a zero are left unread
};

struct Model {
  Array emb;  // (vocabulary, D)
  int vocabulary, n_blocks;
  const Block* blocks;
  Norm ln_out;
  Matrix head;
};

enum class Output : int { kLogits, kLast, kHidden };  // of every token, of the last of each sequence, before the head

// The states of all layers: layer after layer, `rows` rows each.
template <class Pointer>
struct States {
  Pointer att_shift, memory, ffn_shift;
  int64_t rows;
};

struct ModelIO {
  const int64_t* tokens;  // of all batches, one after the other, each below the vocabulary
  int n_batches;
  const Batch* batches;   // each goes through all blocks before the next; see plan.h
  States<const void*> in;
  States<void*> out;
  Format shift_format;
  Output output;
  float* y;  // (tokens or sequences, vocabulary or D)
  bool skips;
};

// Where a call stands that is not through: before that layer of that batch, after so many tokens and numbers of y.
struct Progress {
  int batch = 0, layer = 0;
  int64_t tokens = 0, y = 0;
};

using Clock = std::chrono::steady_clock;

struct Engine {
  const char* name;
  size_t (*model_floats)(const Model&, int rows, int threads);  // of scratch, for batches of up to so many rows
  // Goes on from `at`, and stops after the layer in which `until` passes: false, then; the next call gets the same
  // arguments, and the scratch as it was left.
  bool (*run_model)(const Model&, const ModelIO&, float* scratch, int threads, Progress& at, Clock::time_point until);
  // y (rows, outputs) = x (rows, inputs) W
  size_t (*multiply_floats)(const Matrix&, int threads);
  void (*multiply)(const Matrix&, const float* x, int rows, float* y, float* scratch, int threads);
  // The sum of n floats, read once: what the memory gives.
  float (*read)(const float* data, int64_t n, int threads);
  // to = from, rounded to another format
  void (*convert)(const float* from, const MutableArray& to, int64_t n, int threads);
  void (*normalize)(const Norm&, const float* x, int rows, int width, float* y, int threads);
};

namespace portable {
extern const Engine engine;
}
namespace avx2 {  // on x86 alone; wants AVX2, FMA and F16C
extern const Engine engine;
}

}  // namespace wkv
