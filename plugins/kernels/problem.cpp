// Argument checks shared by all kernels: one place, host only.
#include <cinttypes>
#include <cstdio>

#include "esparse/es24.h"
#include "esparse/sparse_gemm.h"

namespace {

template <typename... Args>
esparse_status fail(esparse_message* message, esparse_status status, const char* format, Args... args) {
  if (message) std::snprintf(message->text, sizeof message->text, format, args...);
  return status;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

int64_t esparse_metadata_words(int64_t n, int64_t k) {
  return n > 0 && k > 0 && n % 8 == 0 && k % 32 == 0 ? esparse::metadata_words(n, k) : 0;
}

esparse_status esparse_check(const esparse_gemm* p, esparse_message* message) {
  if (!p) return fail(message, ESPARSE_INVALID_ARGUMENT, "problem is null");
  if (p->m < 1 || p->m > 65536)
    return fail(message, ESPARSE_INVALID_ARGUMENT, "m is %" PRId64 ", must be 1 .. 65536", p->m);
  if (p->n < 8 || p->n % 8 != 0)
    return fail(message, ESPARSE_NOT_SUPPORTED, "n is %" PRId64 ", must be a positive multiple of 8", p->n);
  if (p->k < 32 || p->k % 32 != 0)
    return fail(message, ESPARSE_NOT_SUPPORTED, "k is %" PRId64 ", must be a positive multiple of 32", p->k);
  if (p->dtype != ESPARSE_FP16 && p->dtype != ESPARSE_BF16)
    return fail(message, ESPARSE_INVALID_ARGUMENT, "dtype is %d, must be ESPARSE_FP16 or ESPARSE_BF16",
                static_cast<int>(p->dtype));
  if (p->activation < ESPARSE_NO_ACTIVATION || p->activation > ESPARSE_GEGLU)
    return fail(message, ESPARSE_INVALID_ARGUMENT, "activation is %d, must be 0 .. %d",
                static_cast<int>(p->activation), static_cast<int>(ESPARSE_GEGLU));
  if (p->activation && p->n % 16 != 0)
    return fail(message, ESPARSE_NOT_SUPPORTED, "n is %" PRId64 ", must be a multiple of 16 with an activation", p->n);

  const struct {
    const char* name;
    const void* pointer;
    bool required;
  } arguments[] = {{"x", p->x, true},
                   {"values", p->values, true},
                   {"metadata", p->metadata, true},
                   {"bias", p->bias, false},
                   {"permutation", p->permutation, false},
                   {"y", p->y, true}};
  for (const auto& argument : arguments) {
    if (argument.required && !argument.pointer)
      return fail(message, ESPARSE_INVALID_ARGUMENT, "%s is null", argument.name);
    if (!aligned(argument.pointer))
      return fail(message, ESPARSE_INVALID_ARGUMENT, "%s is %p, must be 16-byte aligned", argument.name,
                  argument.pointer);
  }
  return ESPARSE_SUCCESS;
}
