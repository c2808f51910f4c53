// Python's lock, as seen by code that knows nothing of Python.
#pragma once

#include "shared/model.h"

namespace elastikv::torch {

// Calls body(context) without Python's lock where this thread holds it, and has it again when it returns.
using WithoutInterpreter = void (*)(void (*body)(void*), void* context);

// Set by the bindings, once; until then a body is just called.
void set_without_interpreter(WithoutInterpreter hook) noexcept;

// For deleters, which torch calls with or without that lock: calls deleter(object), which gives memory of `model` back.
// While a pause or a resume copies the memory that waits for the copy, so where the model sleeps it is without the
// lock.
void delete_memory_of(const Model& model, void (*deleter)(void*), void* object);

}  // namespace elastikv::torch
