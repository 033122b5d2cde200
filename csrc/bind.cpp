// The only file that knows Python. Addresses arrive as integers; fastadv/ops/_native.py has checked
// what lies behind them. Every kernel call releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "table.h"

namespace py = pybind11;
using namespace fastadv;

namespace {

const Table* active = nullptr;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<const Table*> available() {
  const Table* found[max_tables];
  return {found, found + tables(found)};
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Table* table : available()) names.emplace_back(table->isa);
  return names;
}

void use_isa(const std::string& isa) {
  for (const Table* table : available()) {
    if (isa == table->isa) {
      active = table;
      return;
    }
  }
  throw py::value_error("isa is '" + isa + "', which this build or machine does not have");
}

void pgd_step(uintptr_t out, uintptr_t x_adv, uintptr_t grad, uintptr_t x, uintptr_t eps_per_sample,
              int64_t batch, int64_t size, float eps, float step_size, int norm, float lo, float hi,
              int threads) {
  active->pgd_step(at<float>(out), at<const float>(x_adv), at<const float>(grad),
                   at<const float>(x), at<const float>(eps_per_sample), batch, size, eps, step_size,
                   static_cast<Norm>(norm), lo, hi, threads);
}

void apgd_step(uintptr_t x_adv, uintptr_t x_old, uintptr_t x_best, uintptr_t grad_best,
               uintptr_t x_found, uintptr_t bad_gradients, uintptr_t grad, uintptr_t x,
               uintptr_t step_size, uintptr_t better_best, uintptr_t better_found,
               uintptr_t restart, uintptr_t eps_per_sample, int64_t batch, int64_t size, float eps,
               double weight, int norm, float lo, float hi, int threads) {
  active->apgd_step({at<float>(x_adv),
                     at<float>(x_old),
                     at<float>(x_best),
                     at<float>(grad_best),
                     at<float>(x_found),
                     at<int64_t>(bad_gradients),
                     at<const float>(grad),
                     at<const float>(x),
                     at<const float>(step_size),
                     at<const bool>(better_best),
                     at<const bool>(better_found),
                     at<const bool>(restart),
                     at<const float>(eps_per_sample),
                     batch,
                     size,
                     eps,
                     weight,
                     static_cast<Norm>(norm),
                     lo,
                     hi},
                    threads);
}

void random_start(uintptr_t out, uintptr_t x, uintptr_t seed, uintptr_t index,
                  uintptr_t eps_per_sample, int64_t batch, int64_t channels, int64_t plane,
                  float eps, int init, int norm, float sigma, uint32_t step, uint32_t restart,
                  float lo, float hi, int threads) {
  active->random_start(at<float>(out), at<const float>(x), at<const int64_t>(seed),
                       at<const int64_t>(index), at<const float>(eps_per_sample), batch, channels,
                       plane, eps, static_cast<Init>(init), static_cast<Norm>(norm), sigma, step,
                       restart, lo, hi, threads);
}

void augment(uintptr_t out, uintptr_t images, uintptr_t dy, uintptr_t dx, uintptr_t flip,
             int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t padding,
             bool channels_last, int threads) {
  active->augment(at<float>(out), at<const uint8_t>(images), at<const int64_t>(dy),
                  at<const int64_t>(dx), at<const bool>(flip), batch, channels, height, width,
                  padding, channels_last, threads);
}

void batch_norm(uintptr_t y, uintptr_t mean, uintptr_t var, uintptr_t factors, uintptr_t sums,
                uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, int64_t pixels,
                int64_t channels, double eps, bool relu, int dtype, int threads) {
  active->batch_norm(
      {at<void>(y), at<float>(mean), at<float>(var), at<float>(factors), at<double>(sums),
       at<const void>(x), at<const void>(residual), at<const float>(weight), at<const float>(bias),
       pixels, channels, eps, relu, static_cast<DType>(dtype)},
      threads);
}

void batch_norm_backward(uintptr_t x_grad, uintptr_t residual_grad, uintptr_t weight_grad,
                         uintptr_t bias_grad, uintptr_t factors, uintptr_t sums, uintptr_t grad,
                         uintptr_t y, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t mean,
                         uintptr_t var, int64_t pixels, int64_t channels, double eps, int dtype,
                         int threads) {
  active->batch_norm_backward(
      {at<void>(x_grad), at<void>(residual_grad), at<float>(weight_grad), at<float>(bias_grad),
       at<float>(factors), at<double>(sums), at<const void>(grad), at<const void>(y),
       at<const void>(x), at<const float>(weight), at<const float>(bias), at<const float>(mean),
       at<const float>(var), pixels, channels, eps, static_cast<DType>(dtype)},
      threads);
}

template <Labelled Table::* kernel>
int64_t labelled(uintptr_t loss, uintptr_t grad, uintptr_t logits, uintptr_t y, int64_t batch,
                 int64_t classes, int dtype, int threads) {
  return (active->*kernel)(at<float>(loss), at<void>(grad), at<const void>(logits),
                           at<const int64_t>(y), batch, classes, static_cast<DType>(dtype),
                           threads);
}

int64_t cross_entropy(uintptr_t loss, uintptr_t grad, uintptr_t logits, uintptr_t y,
                      uintptr_t target, int64_t batch, int64_t classes, double smoothing,
                      int64_t ignored, int reduction, int dtype, int threads) {
  return active->cross_entropy(at<float>(loss), at<void>(grad), at<const void>(logits),
                               at<const int64_t>(y), at<const float>(target), batch, classes,
                               smoothing, ignored, static_cast<Reduction>(reduction),
                               static_cast<DType>(dtype), threads);
}

void feature_distance(uintptr_t loss, uintptr_t student_grad, uintptr_t teacher_grad,
                      uintptr_t student, uintptr_t teacher, int64_t batch, int64_t size,
                      int distance, int dtype, int threads) {
  active->feature_distance(at<float>(loss), at<void>(student_grad), at<void>(teacher_grad),
                           at<const void>(student), at<const void>(teacher), batch, size,
                           static_cast<Distance>(distance), static_cast<DType>(dtype), threads);
}

void softmax_entropy(uintptr_t loss, uintptr_t grad, uintptr_t logits, int64_t batch,
                     int64_t classes, double temperature, double offset, int dtype, int threads) {
  active->softmax_entropy(at<float>(loss), at<void>(grad), at<const void>(logits), batch, classes,
                          temperature, offset, static_cast<DType>(dtype), threads);
}

void softmax_kl(uintptr_t loss, uintptr_t grad_student, uintptr_t grad_teacher,
                uintptr_t grad_weight, uintptr_t student, uintptr_t teacher, uintptr_t weight,
                int64_t batch, int64_t classes, int64_t student_stride, int64_t teacher_stride,
                double temperature, double factor, bool reduced, int dtype, int threads) {
  active->softmax_kl(
      {at<float>(loss), at<void>(grad_student), at<void>(grad_teacher), at<float>(grad_weight),
       at<const void>(student), at<const void>(teacher), at<const float>(weight), batch, classes,
       student_stride, teacher_stride, temperature, factor, reduced, static_cast<DType>(dtype)},
      threads);
}

template <void (*Table::*kernel)(const Convolution&, int) noexcept>
void convolution(uintptr_t in, uintptr_t weight, uintptr_t start, uintptr_t taps, int64_t images,
                 int64_t in_pixels, int64_t out_pixels, int64_t in_blocks, int64_t out_blocks,
                 int64_t kernel_size, int dtype, bool backward, int activation, float cap,
                 uintptr_t out, uintptr_t active, uintptr_t slope, uintptr_t before,
                 uintptr_t after, uintptr_t bias, uintptr_t scale, uintptr_t shift, int threads) {
  const Finish finish = {backward,
                         static_cast<Activation>(activation),
                         cap,
                         at<void>(out),
                         at<void>(active),
                         at<void>(slope),
                         at<const void>(before),
                         at<const void>(after),
                         at<const float>(bias),
                         at<const float>(scale),
                         at<const float>(shift)};
  (::active->*kernel)({at<const void>(in), at<const void>(weight), at<const int32_t>(start),
                       at<const int32_t>(taps), images, in_pixels, out_pixels, in_blocks,
                       out_blocks, kernel_size, static_cast<DType>(dtype), finish},
                      threads);
}

void fold(uintptr_t forward, uintptr_t backward, uintptr_t weight, uintptr_t scale,
          int64_t out_channels, int64_t in_channels, int64_t taps, int64_t out_stride,
          int64_t in_stride, int64_t tap_stride, int dtype, int threads) {
  active->fold(at<void>(forward), at<void>(backward), at<const float>(weight),
               at<const float>(scale), out_channels, in_channels, taps, out_stride, in_stride,
               tap_stride, static_cast<DType>(dtype), threads);
}

void patches(uintptr_t out, uintptr_t x, uintptr_t offsets, uintptr_t scale, uintptr_t shift,
             int64_t batch, int64_t pixels, int64_t size, int64_t image_stride, int dtype,
             int threads) {
  active->patches(at<void>(out), at<const float>(x), at<const int32_t>(offsets),
                  at<const float>(scale), at<const float>(shift), batch, pixels, size, image_stride,
                  static_cast<DType>(dtype), threads);
}

void patches_backward(uintptr_t grad, uintptr_t patches, uintptr_t offsets, int64_t batch,
                      int64_t elements, int64_t terms, int64_t image_size, uintptr_t scale,
                      int dtype, int threads) {
  active->patches_backward(at<float>(grad), at<const void>(patches), at<const int32_t>(offsets),
                           batch, elements, terms, image_size, at<const float>(scale),
                           static_cast<DType>(dtype), threads);
}

#ifdef FASTADV_HAS_CUDA
constexpr const char* no_kernel = "no CUDA kernel takes this norm or init";

// The arguments of the CPU kernels, but for the last two in place of the threads. Each returns what
// went wrong, or None.
const char* cuda_pgd_step(uintptr_t out, uintptr_t x_adv, uintptr_t grad, uintptr_t x,
                          uintptr_t eps_per_sample, int64_t batch, int64_t size, float eps,
                          float step_size, int norm, float lo, float hi, int device,
                          uintptr_t stream) {
  if (static_cast<Norm>(norm) != Norm::linf) return no_kernel;
  return cuda::pgd_step(
      {at<float>(out), at<const float>(x_adv), at<const float>(grad), at<const float>(x),
       at<const float>(eps_per_sample), batch, size, eps, step_size, lo, hi},
      {device, stream});
}

const char* cuda_random_start(uintptr_t out, uintptr_t x, uintptr_t seed, uintptr_t index,
                              uintptr_t eps_per_sample, int64_t batch, int64_t channels,
                              int64_t plane, float eps, int init, int norm, float, uint32_t step,
                              uint32_t restart, float lo, float hi, int device, uintptr_t stream) {
  if (static_cast<Init>(init) != Init::uniform || static_cast<Norm>(norm) != Norm::linf) {
    return no_kernel;
  }
  return cuda::random_start(
      {at<float>(out), at<const float>(x), *at<const uint64_t>(seed), at<const int64_t>(index),
       at<const float>(eps_per_sample), batch, channels, plane, eps, step, restart, lo, hi},
      {device, stream});
}

const char* cuda_augment(uintptr_t out, uintptr_t images, uintptr_t dy, uintptr_t dx,
                         uintptr_t flip, int64_t batch, int64_t channels, int64_t height,
                         int64_t width, int64_t padding, bool channels_last, int device,
                         uintptr_t stream) {
  return cuda::augment(
      {at<float>(out), at<const uint8_t>(images), at<const int64_t>(dy), at<const int64_t>(dx),
       at<const bool>(flip), batch, channels, height, width, padding, channels_last},
      {device, stream});
}

const char* cuda_softmax_kl(uintptr_t loss, uintptr_t grad_student, uintptr_t grad_teacher,
                            uintptr_t grad_weight, uintptr_t student, uintptr_t teacher,
                            uintptr_t weight, int64_t batch, int64_t classes,
                            int64_t student_stride, int64_t teacher_stride, double temperature,
                            double factor, bool reduced, int dtype, int device, uintptr_t stream) {
  return cuda::softmax_kl(
      {at<float>(loss), at<void>(grad_student), at<void>(grad_teacher), at<float>(grad_weight),
       at<const void>(student), at<const void>(teacher), at<const float>(weight), batch, classes,
       student_stride, teacher_stride, temperature, factor, reduced, static_cast<DType>(dtype)},
      {device, stream});
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  active = available().front();
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("isas", isas, "Instruction sets this build and machine can run, fastest first.");
  module.def("isa", [] { return std::string(active->isa); }, "The instruction set in use.");
  module.def("use_isa", use_isa, "Use this instruction set from now on.");
  module.def("pgd_step", pgd_step, unlocked);
  module.def("apgd_step", apgd_step, unlocked);
  module.def("random_start", random_start, unlocked);
  module.def("augment", augment, unlocked);
  module.attr("batch_norm_chunks") = batch_norm_chunks;
  module.def("batch_norm", batch_norm, unlocked);
  module.def("batch_norm_backward", batch_norm_backward, unlocked);
  module.def("margin", labelled<&Table::margin>, unlocked);
  module.def("dlr", labelled<&Table::dlr>, unlocked);
  module.def("mart_bce", labelled<&Table::mart_bce>, unlocked);
  module.def("cross_entropy", cross_entropy, unlocked);
  module.def("feature_distance", feature_distance, unlocked);
  module.def("softmax_entropy", softmax_entropy, unlocked);
  module.def("softmax_kl", softmax_kl, unlocked);
  module.def("convolution", convolution<&Table::convolution>, unlocked);
  module.def("depthwise", convolution<&Table::depthwise>, unlocked);
  module.def("fold", fold, unlocked);
  module.def("patches", patches, unlocked);
  module.def("patches_backward", patches_backward, unlocked);
#ifdef FASTADV_HAS_CUDA
  module.attr("cuda_built") = cuda::built_version();
  module.def("cuda_driver", cuda::driver_version,
             "The newest CUDA that the driver supports, 1000 major + 10 minor; 0: no driver.");
  module.def("cuda_pgd_step", cuda_pgd_step, unlocked);
  module.def("cuda_random_start", cuda_random_start, unlocked);
  module.def("cuda_augment", cuda_augment, unlocked);
  module.def("cuda_softmax_kl", cuda_softmax_kl, unlocked);
#endif
}
