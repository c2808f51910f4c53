#include "torch/interpreter.h"

#include <atomic>

namespace elastikv::torch {
namespace {

std::atomic<WithoutInterpreter> without_interpreter{nullptr};

bool may_wait(const Model& model) noexcept {
    try {
        return model.paused();
    } catch (const VmmError&) {
        return false;  // of a process that this one was forked from
    }
}

}  // namespace

void set_without_interpreter(WithoutInterpreter hook) noexcept {
    without_interpreter.store(hook, std::memory_order_release);
}

void delete_memory_of(const Model& model, void (*deleter)(void*), void* object) {
    const WithoutInterpreter hook = without_interpreter.load(std::memory_order_acquire);
    if (hook != nullptr && may_wait(model)) {
        hook(deleter, object);
    } else {
        deleter(object);
    }
}

}  // namespace elastikv::torch
