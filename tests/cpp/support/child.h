// Runs a piece of a test in a forked child, for what ends a process or happens only in one that was forked.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>

#include "driver/vmm_driver.h"

namespace elastikv::testing {

// The exit code of a child that returned `body()`, or minus the signal that ended it.
template <typename Body>
int in_child(Body body) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        // The runner's and the sanitizers' handlers would report what is expected here.
        for (const int signal : {SIGSEGV, SIGBUS, SIGABRT}) std::signal(signal, SIG_DFL);
        alarm(300);  // only so that a child that hangs ends
        int code = 98;
        try {
            code = body();
        } catch (...) {
            code = 99;
        }
        _exit(code);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child) return -1000;
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

// Whether touching the byte raises a fault. It is touched in a child, so that only the child ends.
inline bool touch_faults(Address address) {
    return in_child([address] {
               *reinterpret_cast<volatile std::uint8_t*>(static_cast<std::uintptr_t>(address)) = 1;
               return 0;
           }) == -SIGSEGV;
}

}  // namespace elastikv::testing
