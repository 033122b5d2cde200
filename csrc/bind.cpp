// The only file that knows Python. Every kernel of the tables becomes a function of the module: its
// arguments are the members of the kernel's struct in their order, addresses as integers and
// choices by name, and then the number of threads. fastadv/ops/_native.py has checked the
// tensors behind the addresses. Every call releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "table.h"

namespace py = pybind11;
using namespace fastadv;

namespace {

const Table* active = nullptr;

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

// Which of the comma-separated names this one is; -1: none.
int code_of(std::string_view name, std::string_view names) {
  for (int code = 0; !names.empty(); ++code) {
    const size_t end = names.find(", ");
    if (names.substr(0, end) == name) return code;
    names = end == names.npos ? "" : names.substr(end + 2);
  }
  return -1;
}

// What an argument for a member of this type must be, in words.
template <typename T>
std::string wanted() {
  if constexpr (std::is_pointer_v<T>) return "an address";
  if constexpr (std::is_enum_v<T>) return std::string("one of ") + names_of(T{});
  if constexpr (std::is_same_v<T, bool>) return "true or false";
  return std::is_integral_v<T> ? "a whole number" : "a number";
}

// An argument from Python, which turns into whatever member of a struct it initialises.
struct Argument {
  const char* kernel;
  size_t position;
  py::handle value;

  template <typename T>
  std::string refusal() const {
    return "argument " + std::to_string(position) + " of " + kernel + " is " +
           std::string(py::repr(value)) + ", must be " + wanted<T>();
  }

  template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const {
    try {
      if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(py::cast<uintptr_t>(value));
      } else if constexpr (std::is_enum_v<T>) {
        const int code = code_of(py::cast<std::string_view>(value), names_of(T{}));
        if (code < 0) throw py::value_error(refusal<T>());
        return static_cast<T>(code);
      } else {
        return py::cast<T>(value);
      }
    } catch (const py::cast_error&) {
      throw py::type_error(refusal<T>());
    }
  }
};

template <typename T, typename... Arguments>
auto takes(int) -> decltype(T{std::declval<Arguments>()...}, std::true_type{});
template <typename T, typename... Arguments>
std::false_type takes(...);

// How many members a struct has, those of a struct within it counted one by one: as many arguments
// as its initialiser takes.
template <typename T, typename... Arguments>
constexpr size_t members_of() {
  if constexpr (decltype(takes<T, Arguments..., Argument>(0))::value) {
    return members_of<T, Arguments..., Argument>();
  } else {
    return sizeof...(Arguments);
  }
}

template <typename T, size_t... Member>
T initialised(const char* name, const py::args& args, size_t first,
              std::index_sequence<Member...>) {
  return T{Argument{name, first + Member + 1, PyTuple_GET_ITEM(args.ptr(), first + Member)}...};
}

// Calls run(struct, Last) with the struct made of all arguments but those that make Last.
template <typename Struct, typename Last, typename Run>
auto call(const char* name, const py::args& args, const Run& run) {
  constexpr size_t members = members_of<Struct>(), rest = members_of<Last>();
  if (args.size() != members + rest) {
    throw py::type_error(std::string(name) + " takes " + std::to_string(members + rest) +
                         " arguments, not " + std::to_string(args.size()));
  }
  const auto all = initialised<Struct>(name, args, 0, std::make_index_sequence<members>{});
  const auto last = initialised<Last>(name, args, members, std::make_index_sequence<rest>{});
  const py::gil_scoped_release unlocked;
  return run(all, last);
}

template <typename Result, typename Struct>
void bind(py::module_& module, const char* name,
          Result (*Table::*kernel)(const Struct&, int) noexcept) {
  module.def(name, [=](const py::args& args) {
    return call<Struct, int>(name, args, [=](const Struct& all, int threads) {
      return (active->*kernel)(all, threads);
    });
  });
}

// The same of a kernel for GPUs, whose last two arguments are the device and its stream in place of
// the threads. Returns an error message, or None.
template <typename Struct>
[[maybe_unused]] void bind(py::module_& module, const char* name,
                           const char* (*launch)(const Struct&, cuda::Place) noexcept) {
  module.def(name,
             [=](const py::args& args) { return call<Struct, cuda::Place>(name, args, launch); });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  active = available().front();
  module.def("isas", isas, "Instruction sets this build and machine can run, fastest first.");
  module.def("isa", [] { return std::string(active->isa); }, "The instruction set in use.");
  module.def("use_isa", use_isa, "Use this instruction set from now on.");
  module.attr("headers") = FASTADV_HEADERS;
  module.attr("batch_norm_chunks") = batch_norm_chunks;
  module.attr("images_per_block") = images_per_block;
  module.attr("channels_per_block") = channels_per_block;
  module.attr("winograd_points") = winograd_points;
  module.attr("winograd_rows") = winograd_rows;
#define FASTADV_BIND(result, name, arguments) bind(module, #name, &Table::name);
  FASTADV_KERNELS(FASTADV_BIND)
#ifdef FASTADV_HAS_CUDA
  module.attr("cuda_built") = cuda::built_version();
  module.def("cuda_driver", cuda::driver_version,
             "The newest CUDA that the driver supports, 1000 major + 10 minor; 0: no driver.");
#define FASTADV_BIND_CUDA(name, arguments) bind(module, "cuda_" #name, cuda::name);
  FASTADV_CUDA_KERNELS(FASTADV_BIND_CUDA)
#endif
}
