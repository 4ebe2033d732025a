// SPDX-License-Identifier: BSD-3-Clause
// How a packed struct lies in memory, told to Python in the codes of its module `struct`:
// "Q address, Q items, 6d p, 7x unused". Each struct lists its fields once, the compiler finds
// their types and offsets and refuses a list with a hole, and Python compares the text with its own
// when it is imported: a module built from other sources would write wrong bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace fastinit {
namespace layout {

struct Field {
  const char* name;
  char code;            // 's': bytes, a struct with a layout of its own; 'x': unused
  size_t offset, size;  // in bytes
  size_t item;          // bytes that a code stands for
};

template <class T>
constexpr Field scalar() {
  if constexpr (std::is_enum<T>::value) return scalar<std::underlying_type_t<T>>();
  const bool is_signed = std::is_signed<T>::value, is_real = std::is_floating_point<T>::value;
  const char* const codes = is_real ? "  fd" : is_signed ? "bhiq" : "BHIQ";
  const char code = codes[sizeof(T) == 8 ? 3 : sizeof(T) == 4 ? 2 : sizeof(T) == 2 ? 1 : 0];
  return {"", code, 0, sizeof(T), sizeof(T)};
}

// A struct whose fields are all of one type counts as an array of it.
template <class T>
constexpr Field structure() {
  Field whole = {"", 'x', 0, sizeof(T), 1};
  for (const Field& f : fields_of(static_cast<const T*>(nullptr))) {
    if (f.code == 'x' || f.code == whole.code) continue;
    if (whole.code != 'x') return {"", 's', 0, sizeof(T), 1};
    whole.code = f.code;
    whole.item = f.item;
  }
  return whole;
}

template <class Member>
constexpr Field field(const char* name, size_t offset) {
  using T = std::remove_all_extents_t<Member>;
  Field f = {};
  if constexpr (std::is_class<T>::value) {
    f = structure<T>();
  } else {
    f = scalar<T>();
  }
  f.name = name;
  f.offset = offset;
  f.size = sizeof(Member);
  return f;
}

constexpr Field as(char code, Field f) {
  f.code = code;
  f.item = 1;
  return f;
}

template <class Struct>
constexpr bool has_no_hole() {
  size_t end = 0;
  for (const Field& f : fields_of(static_cast<const Struct*>(nullptr))) {
    if (f.offset != end) return false;
    end += f.size;
  }
  return end == sizeof(Struct) && std::is_trivially_copyable<Struct>::value;
}

}  // namespace layout

// FI_LAYOUT(Point, FI_FIELD(x), FI_FIELD(y), FI_UNUSED(pad)). FI_BYTES: a union of different views.
#define FI_FIELD(name) ::fastinit::layout::field<decltype(Self::name)>(#name, offsetof(Self, name))
#define FI_BYTES(name) ::fastinit::layout::as('s', FI_FIELD(name))
#define FI_UNUSED(name) ::fastinit::layout::as('x', FI_FIELD(name))
#define FI_LAYOUT(Struct, ...)              \
  constexpr auto fields_of(const Struct*) { \
    using Self = Struct;                    \
    return std::array{__VA_ARGS__};         \
  }                                         \
  static_assert(::fastinit::layout::has_no_hole<Struct>(), "name every field, in order")

// The name of an enumerator, which Python uses, and its code.
struct Code {
  const char* name;
  int code;
};
#define FI_CODE(Enum, name) \
  ::fastinit::Code { #name, static_cast<int>(Enum::name) }

// The structs that are packed in some bytes, which may lie anywhere.
template <class Struct>
std::vector<Struct> unpacked(std::string_view packed) {
  if (packed.size() % sizeof(Struct) != 0) throw std::invalid_argument("not a packed plan");
  std::vector<Struct> all(packed.size() / sizeof(Struct));
  if (!all.empty()) memcpy(all.data(), packed.data(), packed.size());
  return all;
}

template <class Struct>
std::string layout_of() {
  std::string text;
  for (const layout::Field& f : fields_of(static_cast<const Struct*>(nullptr))) {
    const size_t count = f.size / f.item;
    text += (text.empty() ? "" : ", ") + (count == 1 && f.code != 's' ? "" : std::to_string(count));
    text += std::string(1, f.code) + " " + f.name;
  }
  return text;
}

}  // namespace fastinit
