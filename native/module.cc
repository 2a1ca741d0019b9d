// The door between Python and the engines. Addresses come as integers: `wkv.ops.native` alone calls this, has
// checked what they point to, and keeps it alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine.h"
#include "operators.h"
#include "plan.h"

namespace nb = nanobind;

namespace wkv {
namespace {

using Address = uintptr_t;

constexpr auto kUntilSignals = std::chrono::milliseconds(100);  // of a long call, before Python looks for Ctrl-C

// Floats on a cache line, kept by each thread from call to call. A call that comes while another is under way (a
// signal's handler may read tokens too) finds none, and has its own.
class Scratch {
 public:
  explicit Scratch(size_t n) : buffer_(std::exchange(kept_, {})) {
    if (n <= buffer_.size) return;
    buffer_ = {};
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, n * sizeof(float)) != 0) throw std::bad_alloc();
    buffer_ = {std::unique_ptr<float, Free>(static_cast<float*>(fresh)), n};
  }
  ~Scratch() {
    if (buffer_.size > kept_.size) kept_ = std::move(buffer_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* floats() const { return buffer_.floats.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> floats;
    size_t size = 0;
  };
  static thread_local Buffer kept_;
  Buffer buffer_;
};

thread_local Scratch::Buffer Scratch::kept_;

// Why this processor does not run it; null when it does.
const char* avx2_refuses() {
#if defined(WKV_HAS_AVX2)
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? nullptr : "this processor lacks AVX2, FMA or F16C";
#else
  return "it is for x86 processors";
#endif
}

// Best first: name -> None, or why it does not run here.
nb::dict engines() {
  const char* reason = avx2_refuses();
  nb::dict all;
  all["avx2"] = reason ? nb::object(nb::str(reason)) : nb::none();
  all["portable"] = nb::none();
  return all;
}

const Engine& engine(const std::string& name) {
#if defined(WKV_HAS_AVX2)
  if (name == avx2::engine.name && avx2_refuses() == nullptr) return avx2::engine;
#endif
  if (name == portable::engine.name) return portable::engine;
  throw nb::value_error(("no engine " + name + " on this processor").c_str());
}

int checked(int threads) {
  if (threads >= 1 && threads <= Pool::kMostThreads) return threads;
  throw nb::value_error(("threads is " + std::to_string(threads) + ", not from 1 to 256").c_str());
}

// The named tensors of a block, (address, format, whether it lies by input), and its sizes.
class Parts {
  using Place = std::tuple<Address, int, bool>;

 public:
  explicit Parts(nb::dict parts) : parts_(std::move(parts)) {}

  // "att.key.weight" -> "att.key.scales"
  static std::string scales_of(const std::string& name) { return name.substr(0, name.rfind('.')) + ".scales"; }

  bool has(const std::string& name) const { return parts_.contains(name.c_str()); }

  Array array(const std::string& name) const {
    if (!has(name)) return {};
    const auto [address, format, by_input] = nb::cast<Place>(parts_[name.c_str()]);
    return {reinterpret_cast<const void*>(address), static_cast<Format>(format)};
  }

  // W [out, in], as torch's Linear keeps it; `is_turned`: the tensor is [in, out].
  Matrix matrix(const char* name, int inputs, int outputs, bool is_turned = false) const {
    if (!has(name)) return {};
    const bool by_input = std::get<2>(nb::cast<Place>(parts_[name]));
    return {array(name), inputs, outputs, by_input != is_turned, array(scales_of(name)).data};
  }

  // Number i of the matrices in a tensor [n, in, out].
  Matrix slice(const char* name, int i, int inputs, int outputs) const {
    if (!has(name)) return {};
    const Array all = array(name);
    const int64_t skipped = int64_t{i} * inputs * outputs * (all.format == Format::kFloat32 ? 4 : 2);
    return {{static_cast<const char*>(all.data) + skipped, all.format}, inputs, outputs, true};
  }

  int number(const char* name) const { return has(name) ? nb::cast<int>(parts_[name]) : 0; }

  Norm norm(const std::string& name, float eps) const {
    return {array(name + ".weight"), array(name + ".bias"), eps};
  }

 private:
  nb::dict parts_;
};

Block make_block(nb::dict dict, float norm_eps, float head_eps) {
  const Parts parts(std::move(dict));
  Block block{};
  const int D = block.width = parts.number("width"), A = block.attention = parts.number("attention");
  const int F = block.hidden = parts.number("hidden");
  block.generation = parts.number("generation");
  block.n_head = parts.number("n_head");
  block.head_size = parts.number("head_size");
  block.squares = parts.number("squares") != 0;
  block.ln0 = parts.norm("ln0", norm_eps);
  block.ln1 = parts.norm("ln1", norm_eps);
  block.ln2 = parts.norm("ln2", norm_eps);
  if (block.generation == 7) {
    TimeMix7& att = block.att7;
    const char* mixes[] = {"att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g"};
    for (int i = 0; i < 6; ++i) att.mixes[i] = parts.array(mixes[i]);
    att.w0 = parts.array("att.w0");
    att.a0 = parts.array("att.a0");
    att.v0 = parts.array("att.v0");
    att.k_k = parts.array("att.k_k");
    att.k_a = parts.array("att.k_a");
    att.r_k = parts.array("att.r_k");
    const auto low = [&](const char* down, const char* up, int rank, Matrix& first, Matrix& second) {
      first = parts.matrix(down, D, rank, true);
      second = parts.matrix(up, rank, A, true);
    };
    low("att.w1", "att.w2", parts.number("decay_rank"), att.w1, att.w2);
    low("att.a1", "att.a2", parts.number("rate_rank"), att.a1, att.a2);
    low("att.v1", "att.v2", parts.number("value_rank"), att.v1, att.v2);
    low("att.g1", "att.g2", parts.number("gate_rank"), att.g1, att.g2);
    att.receptance = parts.matrix("att.receptance.weight", D, A);
    att.key = parts.matrix("att.key.weight", D, A);
    att.value = parts.matrix("att.value.weight", D, A);
    att.output = parts.matrix("att.output.weight", A, D);
    att.ln_x = parts.norm("att.ln_x", head_eps);
    block.ffn.mix_k = parts.array("ffn.x_k");
  } else if (block.generation >= 5) {
    TimeMix6& att = block.att6;
    const std::string mix = block.generation == 6 ? "time_maa_" : "time_mix_";
    const char* uses[] = {"w", "k", "v", "r", "g"};
    for (int i = 0; i < 5; ++i) att.mixes[i] = parts.array("att." + mix + uses[i]);
    att.mix_x = parts.array("att.time_maa_x");
    const int rank = parts.number("mix_rank"), decay_rank = parts.number("decay_rank");
    att.mix_down = parts.matrix("att.time_maa_w1", D, 5 * rank, true);
    for (int i = 0; i < 5; ++i) att.mix_up[i] = parts.slice("att.time_maa_w2", i, rank, D);
    att.decay = parts.array("att.time_decay");
    att.decay_down = parts.matrix("att.time_decay_w1", D, decay_rank, true);
    att.decay_up = parts.matrix("att.time_decay_w2", decay_rank, A, true);
    att.first_is_log = parts.has("att.time_first");
    att.first = parts.array(att.first_is_log ? "att.time_first" : "att.time_faaaa");
    att.is_per_head = parts.number("is_per_head") != 0;
    att.receptance = parts.matrix("att.receptance.weight", D, A);
    att.key = parts.matrix("att.key.weight", D, A);
    att.value = parts.matrix("att.value.weight", D, A);
    att.gate = parts.matrix("att.gate.weight", D, A);
    att.output = parts.matrix("att.output.weight", A, D);
    att.ln_x = parts.norm("att.ln_x", head_eps);
    block.ffn.mix_k = parts.array("ffn." + mix + "k");
    block.ffn.mix_r = parts.array("ffn." + mix + "r");
  } else {
    TimeMix4& att = block.att4;
    att.mix_k = parts.array("att.time_mix_k");
    att.mix_v = parts.array("att.time_mix_v");
    att.mix_r = parts.array("att.time_mix_r");
    att.decay = parts.array("att.time_decay");
    att.first = parts.array("att.time_first");
    att.key = parts.matrix("att.key.weight", D, A);
    att.value = parts.matrix("att.value.weight", D, A);
    att.receptance = parts.matrix("att.receptance.weight", D, A);
    att.output = parts.matrix("att.output.weight", A, D);
    block.ffn.mix_k = parts.array("ffn.time_mix_k");
    block.ffn.mix_r = parts.array("ffn.time_mix_r");
  }
  block.ffn.receptance = parts.matrix("ffn.receptance.weight", D, D);
  block.ffn.key = parts.matrix("ffn.key.weight", D, F);
  block.ffn.value = parts.matrix("ffn.value.weight", F, D);
  return block;
}

using Addresses = std::tuple<Address, Address, Address, int64_t>;  // shifts and memories of all layers, their rows

// A model's weights where they are; Python keeps them alive.
class CompiledModel {
 public:
  // `blocks` and `whole`: named tensors and sizes, see Parts; emb, ln_out and head are in `whole`.
  CompiledModel(nb::list blocks, nb::dict whole, float norm_eps, float head_eps, const std::string& name)
      : engine_(engine(name)) {
    for (nb::handle block : blocks) blocks_.push_back(make_block(nb::cast<nb::dict>(block), norm_eps, head_eps));
    const Parts parts(std::move(whole));
    const int D = blocks_.at(0).width, V = parts.number("vocabulary");
    model_ = {parts.array("emb.weight"), V, static_cast<int>(blocks_.size()), blocks_.data(),
              parts.norm("ln_out", norm_eps), parts.matrix("head.weight", D, V)};
  }

  // n sequences, one after the other: tokens int64 (n_tokens,); y float32, of the size that `output` says. False, and
  // nothing done, when a token is not below the vocabulary. int64 (n,) each: lengths, or 0: equal ones; from and to,
  // rows of the states, or 0: the n first. Every now and then the signals that have come get their handlers; what
  // these raise ends the call half-way.
  bool run(Address tokens, int64_t n_tokens, int n, Address lengths, int format, Addresses in, Addresses out,
           Address from, Address to, int output, Address y, bool skips, int rows_at_once, int threads) {
    checked(threads);
    nb::gil_scoped_release release;
    const auto numbers = [](Address a) { return reinterpret_cast<const int64_t*>(a); };
    const int64_t* ids = numbers(tokens);
    for (int64_t i = 0; i < n_tokens; ++i) {
      if (ids[i] < 0 || ids[i] >= model_.vocabulary) return false;
    }
    const Plan plan(n, n_tokens, numbers(lengths), numbers(from), numbers(to), rows_at_once);
    const auto pointer = [](Address a) { return reinterpret_cast<void*>(a); };
    const ModelIO io{ids,
                     plan.n_batches(),
                     plan.batches(),
                     {pointer(std::get<0>(in)), pointer(std::get<1>(in)), pointer(std::get<2>(in)), std::get<3>(in)},
                     {pointer(std::get<0>(out)), pointer(std::get<1>(out)), pointer(std::get<2>(out)), std::get<3>(out)},
                     static_cast<Format>(format),
                     static_cast<Output>(output),
                     reinterpret_cast<float*>(y),
                     skips};
    const int rows = static_cast<int>(std::min<int64_t>(n_tokens, rows_at_once));
    const Scratch scratch(engine_.model_floats(model_, rows, threads));
    Progress at;
    while (!engine_.run_model(model_, io, scratch.floats(), threads, at, Clock::now() + kUntilSignals)) {
      nb::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
    return true;
  }

 private:
  std::vector<Block> blocks_;
  Model model_;
  const Engine& engine_;
};

void multiply(const std::string& name, Address weights, int format, int inputs, int outputs, bool by_input,
              Address scales, Address x, int rows, Address y, int threads) {
  const Engine& chosen = engine(name);
  nb::gil_scoped_release release;
  const Matrix W{{reinterpret_cast<const void*>(weights), static_cast<Format>(format)}, inputs, outputs, by_input,
                 reinterpret_cast<const void*>(scales)};
  const Scratch scratch(chosen.multiply_floats(W, checked(threads)));
  chosen.multiply(W, reinterpret_cast<const float*>(x), rows, reinterpret_cast<float*>(y),
                  scratch.floats(), threads);
}

// y = norm(x), (rows, width) float32. Weight and bias in `format`; bias 0: the root mean square alone.
void normalize(const std::string& name, Address weight, Address bias, int format, float eps, Address x, int rows,
               int width, Address y, int threads) {
  const Engine& chosen = engine(name);
  nb::gil_scoped_release release;
  const auto array = [&](Address a) { return Array{reinterpret_cast<const void*>(a), static_cast<Format>(format)}; };
  chosen.normalize({array(weight), array(bias), eps}, reinterpret_cast<const float*>(x), rows, width,
                   reinterpret_cast<float*>(y), checked(threads));
}

void convert(const std::string& name, Address from, Address to, int format, int64_t n, int threads) {
  const Engine& chosen = engine(name);
  nb::gil_scoped_release release;
  chosen.convert(reinterpret_cast<const float*>(from), {reinterpret_cast<void*>(to), static_cast<Format>(format)}, n,
                 checked(threads));
}

float read(const std::string& name, Address data, int64_t n, int threads) {
  const Engine& chosen = engine(name);
  nb::gil_scoped_release release;
  return chosen.read(reinterpret_cast<const float*>(data), n, checked(threads));
}

// Seconds for a job that does nothing, from the call until all threads are through: the mean of n.
double handover(int n, int threads) {
  checked(threads);
  nb::gil_scoped_release release;
  const auto start = Clock::now();
  for (int i = 0; i < n; ++i) Pool::shared().run(threads, [](Team&) {});
  return std::chrono::duration<double>(Clock::now() - start).count() / n;
}

const Operators& operators(const std::string& name) {
  [[maybe_unused]] const Engine& chosen = engine(name);
#if defined(WKV_HAS_AVX2)
  if (&chosen == &avx2::engine) return avx2::operators;
#endif
  return portable::operators;
}

using Sizes = std::tuple<int, int, int, int, int>;  // B, T, H, K, V

// Runs use(operators, tokens, in, out, scratch), where in(i) and out(i) are the arrays at these addresses.
template <class Use>
void operate(const std::string& name, const Sizes& sizes, Address lengths, const std::vector<Address>& inputs,
             const std::vector<Address>& outputs, int threads, size_t (*Operators::*floats)(const Tokens&, int), Use&& use) {
  const Operators& chosen = operators(name);
  nb::gil_scoped_release release;
  const auto [B, T, H, K, V] = sizes;
  const Tokens tokens{B, T, H, K, V, reinterpret_cast<const int64_t*>(lengths)};
  const auto in = [&](size_t i) { return reinterpret_cast<const float*>(inputs.at(i)); };
  const auto out = [&](size_t i) { return reinterpret_cast<float*>(outputs.at(i)); };
  checked(threads);
  const Scratch scratch(floats ? (chosen.*floats)(tokens, threads) : 0);
  use(chosen, tokens, in, out, scratch.floats());
}

void wkv4(const std::string& name, Sizes sizes, Address lengths, const std::vector<Address>& inputs,
          const std::vector<Address>& outputs, bool backward, int threads) {
  operate(name, sizes, lengths, inputs, outputs, threads, &Operators::wkv4_scratch,
          [&](auto& chosen, auto& tokens, auto in, auto out, float* free) {
    const Wkv4 arrays{in(0), in(1), in(2), in(3), in(4)};
    if (!backward) return chosen.wkv4(tokens, arrays, out(0), out(1), free, threads);
    chosen.wkv4_backward(tokens, arrays, in(5), in(6), {out(0), out(1), out(2), out(3), out(4)}, free, threads);
  });
}

void wkv6(const std::string& name, Sizes sizes, Address lengths, const std::vector<Address>& inputs,
          const std::vector<Address>& outputs, bool backward, bool constant_decay, int threads) {
  operate(name, sizes, lengths, inputs, outputs, threads, &Operators::wkv6_scratch,
          [&](auto& chosen, auto& tokens, auto in, auto out, float* free) {
    const Wkv6 arrays{in(0), in(1), in(2), in(3), in(4), in(5), constant_decay};
    if (!backward) return chosen.wkv6(tokens, arrays, out(0), out(1), free, threads);
    chosen.wkv6_backward(tokens, arrays, in(6), in(7), {out(0), out(1), out(2), out(3), out(4), out(5)}, free, threads);
  });
}

void wkv7(const std::string& name, Sizes sizes, Address lengths, const std::vector<Address>& inputs,
          const std::vector<Address>& outputs, bool backward, int threads) {
  operate(name, sizes, lengths, inputs, outputs, threads, &Operators::wkv7_scratch,
          [&](auto& chosen, auto& tokens, auto in, auto out, float* free) {
    const Wkv7 arrays{in(0), in(1), in(2), in(3), in(4), in(5), in(6)};
    if (!backward) return chosen.wkv7(tokens, arrays, out(0), out(1), free, threads);
    const Wkv7Gradients gradients{out(0), out(1), out(2), out(3), out(4), out(5), out(6)};
    chosen.wkv7_backward(tokens, arrays, in(7), in(8), gradients, free, threads);
  });
}

void time_mix7(const std::string& name, Sizes sizes, Address lengths, const std::vector<Address>& inputs,
               const std::vector<Address>& outputs, bool backward, float eps, int threads) {
  operate(name, sizes, lengths, inputs, outputs, threads, &Operators::time_mix7_scratch,
          [&](auto& chosen, auto& tokens, auto in, auto out, float* free) {
    const TimeMix7Inputs arrays{in(0), in(1),  in(2),  in(3),  in(4),  in(5),  in(6),  in(7),  in(8),
                                in(9), in(10), in(11), in(12), in(13), in(14), in(15), in(16), eps};
    if (!backward) return chosen.time_mix7(tokens, arrays, out(0), out(1), free, threads);
    const TimeMix7Gradients gradients{out(0), out(1), out(2), out(3), out(4), out(5), out(6), out(7), out(8), out(9)};
    chosen.time_mix7_backward(tokens, arrays, in(17), in(18), gradients, free, threads);
  });
}

void token_mix(const std::string& name, Sizes sizes, Address lengths, const std::vector<Address>& inputs,
               const std::vector<Address>& outputs, bool backward, bool each_token, int threads) {
  operate(name, sizes, lengths, inputs, outputs, threads, &Operators::token_mix_scratch,
          [&](auto& chosen, auto& tokens, auto in, auto out, float* free) {
    const TokenMix arrays{in(0), in(1), in(2), reinterpret_cast<const bool*>(in(3)), each_token};
    const size_t n = static_cast<size_t>(tokens.H);
    if (!backward) {
      std::vector<float*> mixed(n);
      for (size_t s = 0; s < n; ++s) mixed[s] = out(s);
      return chosen.token_mix(tokens, arrays, mixed.data(), free, threads);
    }
    std::vector<const float*> grads(n);
    for (size_t s = 0; s < n; ++s) grads[s] = in(4 + s);
    chosen.token_mix_backward(tokens, arrays, grads.data(), {out(0), out(1), out(2)}, free, threads);
  });
}

void squared_relu(const std::string& name, Sizes sizes, Address lengths, const std::vector<Address>& inputs,
                  const std::vector<Address>& outputs, bool backward, int threads) {
  operate(name, sizes, lengths, inputs, outputs, threads, nullptr,
          [&](auto& chosen, auto& tokens, auto in, auto out, float*) {
    if (!backward) return chosen.squared_relu(tokens, in(0), out(0), threads);
    chosen.squared_relu_backward(tokens, in(1), in(0), out(0), threads);
  });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "RWKV's steps on the CPU, compiled; see wkv.ops.native.";
  m.def("engines", &engines, "Each engine, best first, and why this processor does not run it; None: it does.");
  m.def("multiply", &multiply);
  m.def("normalize", &normalize);
  m.def("read", &read);
  m.def("convert", &convert);
  m.def("wkv4", &wkv4);
  m.def("wkv6", &wkv6);
  m.def("wkv7", &wkv7);
  m.def("time_mix7", &time_mix7);
  m.def("token_mix", &token_mix);
  m.def("squared_relu", &squared_relu);
  m.def("handover", &handover);
  m.def("borrows", &Pool::borrows);
  nb::class_<CompiledModel>(m, "Model")
      .def(nb::init<nb::list, nb::dict, float, float, const std::string&>())
      .def("run", &CompiledModel::run);
}

}  // namespace wkv
