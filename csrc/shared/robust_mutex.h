// A mutex that processes may share, which the kernel hands on when its holder dies.
#pragma once

#include <pthread.h>

#include <cerrno>

namespace elastikv {

// Shared ones are robust: a process that is killed while it holds one leaves it to the next, who is told. Returns
// whether the system could make it.
inline bool make_mutex(pthread_mutex_t& mutex, bool shared) noexcept {
    pthread_mutexattr_t attributes;
    if (pthread_mutexattr_init(&attributes) != 0) return false;
    bool made = true;
    if (shared) {
        made = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED) == 0 &&
               pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST) == 0;
    }
    made = made && pthread_mutex_init(&mutex, &attributes) == 0;
    pthread_mutexattr_destroy(&attributes);
    return made;
}

// Holds the mutex while it lives. Where the last holder died, `recover` runs first; if this process dies in it, the
// next holder runs it again.
class RobustLock {
  public:
    template <typename Recover>
    RobustLock(pthread_mutex_t& mutex, Recover recover) noexcept : mutex_(mutex) {
        if (pthread_mutex_lock(&mutex_) != EOWNERDEAD) return;
        recover();
        pthread_mutex_consistent(&mutex_);
    }
    ~RobustLock() { pthread_mutex_unlock(&mutex_); }
    RobustLock(const RobustLock&) = delete;
    RobustLock& operator=(const RobustLock&) = delete;

  private:
    pthread_mutex_t& mutex_;
};

}  // namespace elastikv
