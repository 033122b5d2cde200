// Runs every kernel for CPUs on arguments that are the same on every machine and prints all that it
// writes: test_aarch64.py compares the lines of two machines. A line is a name, torch's name of the
// type, and the bytes in hexadecimal.
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/table.h"

using namespace fastadv;

static Table table;
static const DType all_types[] = {DType::f32, DType::bf16, DType::f16};
static const DType engine_types[] = {DType::f32, DType::bf16};  // of the engine and batch_norm

// Memory that is passed wherever a kernel takes a pointer.
struct Array {
  const char* type;
  std::vector<uint8_t> bytes;

  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(const_cast<uint8_t*>(bytes.data()));
  }
};

static const char* torch_name(DType type) {
  return type == DType::f32 ? "float32" : type == DType::bf16 ? "bfloat16" : "float16";
}

static int size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Room for n numbers, and a few more that must stay as they are.
static Array room(int64_t n, DType type = DType::f32) {
  return {torch_name(type), std::vector<uint8_t>((n + 8) * size_of(type), 0xab)};
}

template <typename T>
static Array array(const char* type, const std::vector<T>& values) {
  Array made = {type, std::vector<uint8_t>(values.size() * sizeof(T))};
  std::memcpy(made.bytes.data(), values.data(), made.bytes.size());
  return made;
}

static uint32_t word() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

static void put(Array& to, DType type, int64_t i, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (type == DType::f32) return static_cast<void>(static_cast<float*>(to)[i] = v);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  const uint32_t exponent = size >> 23, normal = (size - (112u << 23)) >> 13;
  const uint32_t special = 0x7c00 | (size > 0x7f800000 ? 0x200 : 0);
  const uint32_t half = sign | (exponent < 113 ? 0 : exponent > 142 ? special : normal);
  static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(type == DType::f16 ? half : bits >> 16);
}

// n numbers within scale of shift. Both are powers of two or 0, so that nothing is rounded twice
// here, whether or not the compiler contracts it.
static Array numbers(int64_t n, float scale = 1, float shift = 0, DType type = DType::f32) {
  Array made = {torch_name(type), std::vector<uint8_t>(n * size_of(type))};
  for (int64_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(static_cast<int32_t>(word()) - (1 << 23)) * 0x1p-23f;
    put(made, type, i, v * scale + shift);
  }
  return made;
}

// Pixels or variances, in [0, 1).
static Array positive(int64_t n) { return numbers(n, 0.5f, 0.5f); }

// Numbers of which some are zeros of both signs, infinite, denormal or NaN.
static Array with_edges(Array made, DType type = DType::f32) {
  const float inf = __builtin_inff();
  const float edges[] = {0.0f, -0.0f, 0x1p-149f, -0x1p-130f, inf, -inf, __builtin_nanf("")};
  for (int i = 0; i < 7; ++i) put(made, type, 3 + 5 * i, edges[i]);
  return made;
}

static Array integers(int64_t n, int32_t least, int32_t end) {
  std::vector<int64_t> values(n);
  for (int64_t& v : values) v = least + static_cast<int32_t>(word() % (end - least));
  return array("int64", values);
}

static Array offsets(int64_t n, int32_t end) {
  std::vector<int32_t> values(n);
  for (int32_t& v : values) v = static_cast<int32_t>(word() % (end + 1)) - 1;
  return array("int32", values);
}

static void print(const std::string& name, const Array& a) {
  std::printf("%s %s ", name.c_str(), a.type);
  for (const uint8_t byte : a.bytes) std::printf("%02x", byte);
  std::printf("\n");
}

template <typename Result, typename Arguments>
static void run(const std::string& name, Result (*kernel)(const Arguments&, int) noexcept,
                const Arguments& arguments, const std::vector<const Array*>& outputs) {
  constexpr int threads = 2;
  if constexpr (std::is_void_v<Result>) {
    kernel(arguments, threads);
  } else {
    print(name + "/returned", array("int64", std::vector<Result>{kernel(arguments, threads)}));
  }
  int i = 0;
  for (const Array* output : outputs) print(name + "/" + std::to_string(i++), *output);
}

static void attacks() {
  constexpr int64_t batch = 3, size = 37, n = batch * size;
  const Array radii = array<float>("float32", {0.03125f, 0.1f, 0.0f});
  const bool first[] = {true, false, true}, second[] = {false, true, true};
  for (const Norm norm : {Norm::linf, Norm::l2}) {
    for (const float* eps_per_sample : {static_cast<const float*>(nullptr), (const float*)radii}) {
      const std::string name = norm == Norm::l2 ? "l2" : "linf";
      const float eps = norm == Norm::l2 ? 0.5f : 0.03f, step = eps / 4;
      // The first sample has gradients that are not finite.
      const Array x = positive(n), x_adv = positive(n), grad = with_edges(numbers(n));
      Array out = room(n);
      run("pgd_step/" + name, table.pgd_step,
          PgdStep{out, x_adv, grad, x, eps_per_sample, batch, size, eps, step, norm, 0, 1}, {&out});

      const Array old = positive(n), best = positive(n), grad_best = numbers(n), found = room(n);
      const Array steps = array<float>("float32", {0.1f, 0.02f, 0.3f});
      const Array bad = array<int64_t>("int64", {5});
      run("apgd_step/" + name, table.apgd_step,
          ApgdStep{x_adv,          old,   best,   grad_best, found, grad,  x,    steps,
                   eps_per_sample, first, second, second,    bad,   batch, size, eps,
                   0.75,           norm,  0,      1},
          {&x_adv, &old, &best, &grad_best, &found, &bad});

      for (const Init init : {Init::uniform, Init::gaussian}) {
        for (const int64_t channels : {1, 3}) {
          constexpr int64_t pixels = 51;
          const Array images = positive(batch * channels * pixels);
          const Array index = array<int64_t>("int64", {7, 1ll << 40, -3});
          Array start = room(batch * channels * pixels);
          run("random_start/" + std::string(init == Init::uniform ? "uniform/" : "gaussian/") +
                  name,
              table.random_start,
              RandomStart{start, images, eps_per_sample, channels == 1 ? nullptr : (int64_t*)index,
                          -(1ll << 62) - 12345, batch, channels, pixels, eps, init, norm, 0.25f,
                          0xffffffffu, 5, 0, 1},
              {&start});
        }
      }
    }
  }
}

static void augmentation() {
  constexpr int64_t batch = 4, channels = 3, height = 5, width = 7;
  constexpr int64_t n = batch * channels * height * width;
  std::vector<uint8_t> pixels(n);
  for (uint8_t& pixel : pixels) pixel = static_cast<uint8_t>(word() >> 16);
  const Array images = array("uint8", pixels);
  const Array down = array<int64_t>("int64", {0, 8, 4, 1ll << 62});
  const Array right = array<int64_t>("int64", {3, 1, 8, -5});
  const bool flip[] = {false, true, true, false};
  for (const bool last : {false, true}) {
    Array out = room(n);
    run("augment", table.augment,
        Augment{out, images, down, right, flip, batch, channels, height, width, 4, last}, {&out});
  }
}

static void losses() {
  constexpr int64_t batch = 523, classes = 37, n = batch * classes;  // two chunks of rows
  const Array y = integers(batch, -1, classes + 1), target = positive(n), weight = positive(batch);
  for (const DType type : all_types) {
    const Array student = with_edges(numbers(n, 8, 0, type), type),
                teacher = numbers(n, 8, 0, type);
    const std::string name = std::string("/") + torch_name(type);
    Array loss = room(batch), grad = room(n, type), other_grad = room(n, type);
    Array weight_grad = room(batch);

    for (const bool reduced : {false, true}) {
      run("softmax_kl" + name, table.softmax_kl,
          SoftmaxKL{loss, grad, other_grad, weight_grad, student, teacher, weight, batch, classes,
                    classes, classes, 3.0, 9.0, reduced, type},
          {&loss, &grad, &other_grad, &weight_grad});
    }
    const Array clean = numbers(n, 8, 0, type), by_class = positive(n);
    for (const Array* adv : {&student, &teacher}) {
      run("ikl" + name, table.ikl,
          IKL{loss, grad, other_grad, *adv, clean, adv == &student ? nullptr : (float*)by_class,
              batch, classes, classes, classes, classes, 4.0, 20.0, type},
          {&loss, &grad, &other_grad});
    }
    for (const Reduction reduction : {Reduction::none, Reduction::sum, Reduction::mean}) {
      for (const double smoothing : {0.0, 0.1}) {
        run("cross_entropy/labels" + name, table.cross_entropy,
            CrossEntropy{loss, grad, teacher, y, nullptr, batch, classes, smoothing, -1, reduction,
                         type},
            {&loss, &grad});
        run("cross_entropy/probabilities" + name, table.cross_entropy,
            CrossEntropy{loss, grad, teacher, nullptr, target, batch, classes, smoothing, -1,
                         reduction, type},
            {&loss, &grad});
      }
    }
    for (const Array* logits : {&student, &teacher}) {
      const Labelled labelled = {loss, grad, *logits, y, batch, classes, type};
      run("margin" + name, table.margin, labelled, {&loss, &grad});
      run("dlr" + name, table.dlr, labelled, {&loss, &grad});
      run("mart_bce" + name, table.mart_bce, labelled, {&loss, &grad});
    }
    run("softmax_entropy" + name, table.softmax_entropy,
        SoftmaxEntropy{loss, grad, student, batch, classes, 2.0, 0.5, type}, {&loss, &grad});
    for (const Distance distance : {Distance::mse, Distance::l2, Distance::cosine}) {
      run("feature_distance" + name, table.feature_distance,
          FeatureDistance{loss, grad, other_grad, student, teacher, batch, classes, distance, type},
          {&loss, &grad, &other_grad});
    }
  }
}

static void normalisation() {
  constexpr int64_t pixels = 150, channels = 37, n = pixels * channels;
  const Array weight = numbers(channels), bias = numbers(channels), factors = room(3 * channels);
  const Array sums = room(batch_norm_chunks * 2 * 48 * 2);
  for (const DType type : engine_types) {
    const Array x = numbers(n, 2, 1, type), residual = numbers(n, 1, 0, type);
    const Array grad = numbers(n, 1, 0, type);
    for (const bool added : {false, true}) {
      Array y = room(n, type), mean = room(channels), var = room(channels);
      const std::string name = std::string("/") + torch_name(type);
      run("batch_norm" + name, table.batch_norm,
          BatchNorm{y, x, added ? (void*)residual : nullptr, mean, var, factors, weight, bias, sums,
                    pixels, channels, 1e-5, true, type},
          {&y, &mean, &var});
      Array x_grad = room(n, type), residual_grad = room(n, type);
      Array weight_grad = room(channels), bias_grad = room(channels);
      run("batch_norm_backward" + name, table.batch_norm_backward,
          BatchNormBackward{x_grad, added ? (void*)residual_grad : nullptr, grad,
                            added ? (void*)y : nullptr, x, weight_grad, bias_grad, factors, weight,
                            added ? nullptr : (float*)bias, mean, var, sums, pixels, channels, 1e-5,
                            type},
          {&x_grad, &residual_grad, &weight_grad, &bias_grad});
    }
  }
}

// The taps of a 3x3 convolution with a padding of 1.
static void make_taps(int side, std::vector<int32_t>* start, std::vector<int32_t>* taps) {
  *start = {0};
  for (int p = 0; p < side * side; ++p) {
    for (int tap = 0; tap < 9; ++tap) {
      const int y = p / side + tap / 3 - 1, x = p % side + tap % 3 - 1;
      if (y < 0 || y >= side || x < 0 || x >= side) continue;
      taps->push_back(y * side + x);
      taps->push_back(tap);
    }
    start->push_back(static_cast<int32_t>(taps->size() / 2));
  }
}

static void convolutions(DType type, bool dense) {
  constexpr int64_t images = 19, side = 3, pixels = side * side, blocks = 2, kernel = 9;
  constexpr int64_t channels = blocks * channels_per_block, n = 2 * pixels * blocks * block_size;
  std::vector<int32_t> start, taps;
  make_taps(side, &start, &taps);
  const Array weight =
      dense ? numbers(kernel * channels * channels, 0.125f, 0, type) : numbers(kernel * channels);
  const Array in = numbers(n, 1, 0, type), before = numbers(n, 1, 0, type);
  const Array after = numbers(n, 1, 0, type), bias = numbers(channels), scale = numbers(channels);
  const Array shift = numbers(channels);
  const auto kernel_of = dense ? table.convolution : table.depthwise;
  const std::string name =
      std::string(dense ? "convolution/" : "depthwise/") + torch_name(type) + "/";
  for (const Activation activation : {Activation::none, Activation::relu, Activation::silu}) {
    Array out = room(n, type), active = room(n, type);
    Array slope = activation == Activation::relu ? room(n / 32) : room(n, type);
    if (activation == Activation::relu) slope.type = "int32";
    Convolution c = {in,     weight, start.data(), taps.data(), images, pixels,
                     pixels, blocks, blocks,       kernel,      type,   {}};
    c.finish = {false, activation, 0.5f, out, active, slope, before, nullptr, bias, scale, shift};
    run(name + "forward", kernel_of, c, {&out, &active, &slope});
    Array grad = room(n, type);
    c.finish = {true,   activation, 0.5f,    grad,  nullptr, slope,
                before, after,      nullptr, scale, nullptr};
    run(name + "backward", kernel_of, c, {&grad});
  }
}

static void winograd(DType type) {
  constexpr int64_t images = 19, height = 5, width = 6, blocks = 2, threads = 2;
  constexpr int64_t channels = blocks * channels_per_block, taps = 9;
  constexpr int64_t n = 2 * height * width * blocks * block_size;
  constexpr int64_t folded = winograd_points * channels * channels;
  const Array weight = numbers(channels * channels * taps, 0.125f), by = numbers(channels);
  Array forward = room(folded), backward = room(folded);
  const std::string name = torch_name(type);
  run("fold_points/" + name, table.fold_points,
      Fold{forward, backward, weight, by, channels, channels, taps, channels * taps, taps, 1,
           DType::f32},
      {&forward, &backward});
  const Array in = numbers(n, 1, 0, type), bias = numbers(channels);
  Array memory = room(threads * winograd_points * 2 * blocks * winograd_rows * channels_per_block);
  Array out = room(n, type), active = room(n, type), slope = room(n / 32);
  slope.type = "int32";
  Winograd w = {in, forward, memory, images, height, width, 1,
                1,  height,  width,  blocks, blocks, type,  {}};
  w.finish = {false,   Activation::relu, 0.5f, out,     active, slope,
              nullptr, nullptr,          bias, nullptr, nullptr};
  run("winograd/" + name, table.winograd, w, {&out, &active, &slope});
}

static void layouts() {
  constexpr int64_t outs = 40, ins = 35, taps = 9, folded = 2 * taps * 2 * 1024;
  constexpr int64_t batch = 19, pixels = 16, size = 32, elements = 47, terms = 4;
  const Array weight = numbers(outs * ins * taps), by = numbers(outs),
              x = numbers(batch * elements);
  const Array scale = numbers(64), shift = numbers(64);
  const Array from = offsets(pixels * size, elements);
  const Array to = offsets(terms * elements, pixels * block_size);
  for (const DType type : engine_types) {
    const std::string name = std::string("/") + torch_name(type);
    const Array maps = numbers(batch * pixels * ins, 1, 0, type);
    Array in_blocks = room(2 * pixels * 2 * block_size, type);
    Array back = room(batch * pixels * ins, type);
    run("to_blocks" + name, table.to_blocks, Maps{maps, in_blocks, batch, pixels, ins, type},
        {&in_blocks});
    run("from_blocks" + name, table.from_blocks, Maps{back, in_blocks, batch, pixels, ins, type},
        {&back});
    Array forward = room(folded, type), backward = room(folded, type);
    run("fold" + name, table.fold,
        Fold{forward, backward, weight, by, outs, ins, taps, ins * taps, taps, 1, type},
        {&forward, &backward});
    Array patches = room(2 * pixels * block_size, type), grad = room(batch * elements);
    run("patches" + name, table.patches,
        Patches{patches, x, scale, shift, from, batch, pixels, size, elements, type}, {&patches});
    // An offset is of image 0 of a block, so its row is 0.
    std::vector<int32_t> rows(terms * elements);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int32_t at = static_cast<int32_t*>(to)[i];
      rows[i] = at < 0 ? at : at / block_size * block_size + at % channels_per_block;
    }
    run("patches_backward" + name, table.patches_backward,
        PatchesBackward{grad, scale, patches, rows.data(), batch, elements, terms, pixels * size,
                        type},
        {&grad});
  }
}

int main() {
  const Table* found[max_tables];
  const int count = tables(found);
  table = *found[0];
  std::printf("%d %s\n", count, table.isa);
#define NAME(result, name, arguments) #name " "
  std::printf("%s\n", FASTADV_KERNELS(NAME));
  attacks();
  augmentation();
  losses();
  normalisation();
  for (const DType type : engine_types) {
    convolutions(type, true);
    convolutions(type, false);
    winograd(type);
  }
  layouts();
}
