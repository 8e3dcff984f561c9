// The threads that compute together. They wait for each other by spinning: a step has some fifty meetings, and waking a
// sleeping thread takes longer than the work between two of them.
//
// Where PyTorch computes with OpenMP, its threads do the work. Threads of another kind beside them would spin too, and take
// the cores from those that compute.
#pragma once
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
// GCC's runtime and LLVM's both have these. They are found where PyTorch has loaded one of the two, else they are null.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned n_threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}
#endif
inline const pid_t loaded_by = getpid();

static inline void pause_briefly(int& turns) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    // Where another process has the core of the thread that is waited for, give it this one.
    if (++turns % 2048 == 0) std::this_thread::yield();
}

class Pool {
   public:
    explicit Pool(int wanted) : wanted(wanted), process(getpid()) {
        if (open_mp()) return;
        threads.reserve(wanted);
        try {
            for (int n = 1; n < wanted; n++, size++) threads.emplace_back([this, n] { wait_and_work(n); });
        } catch (const std::system_error&) {  // a limit on processes: those that there are do all the work
        }
    }

    ~Pool() {
        stopping = true;
        wake();
        for (auto& thread : threads) thread.join();
    }

    // A pool of this size, made once. A fork has none of its parent's threads, so it makes a pool of its own.
    static Pool& of(int wanted) {
        static Pool* pool = nullptr;
        if (pool && pool->process == getpid() && pool->wanted != wanted) {
            delete pool;
            pool = nullptr;
        }
        if (!pool || pool->process != getpid()) pool = new Pool(wanted);
        return *pool;
    }

    // Call work(thread) in every thread, thread from 0 to size - 1.
    void run(const std::function<void(int)>& work) {
        task = &work;
        arrived = 0;
#if defined(__linux__)
        if (open_mp()) {
            auto mine = [](void* pool) {
                static_cast<Pool*>(pool)->size = omp_get_num_threads();  // fewer than wanted where a limit says so
                (*static_cast<Pool*>(pool)->task)(omp_get_thread_num());
            };
            return GOMP_parallel(mine, this, wanted, 0);
        }
#endif
        wake();
        work(0);
        meet();  // all have finished
    }

    // Wait until every thread is here.
    void meet() {
        unsigned mine = phase.load(std::memory_order_relaxed);
        int turns = 0;
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(mine + 1, std::memory_order_release);
        } else {
            while (phase.load(std::memory_order_acquire) == mine) pause_briefly(turns);
        }
    }

    const int wanted;
    std::atomic<int> size{1};  // threads that compute, the caller's among them

   private:
    // OpenMP's threads do not survive a fork, and its runtime does not notice.
    bool open_mp() const {
#if defined(__linux__)
        return wanted > 1 && process == loaded_by && GOMP_parallel && omp_get_thread_num && omp_get_num_threads;
#else
        return false;
#endif
    }

    void wake() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            round.fetch_add(1, std::memory_order_release);
        }
        sleeping.notify_all();
    }

    void wait_and_work(int index) {
        for (unsigned done = 0;; done++) {
            // The next step mostly follows within a millisecond; after that the thread sleeps.
            auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
            for (int turns = 0; round.load(std::memory_order_acquire) == done;) {
                pause_briefly(turns);
                if (turns % 256 == 0 && std::chrono::steady_clock::now() > until) {
                    std::unique_lock<std::mutex> lock(mutex);
                    sleeping.wait(lock, [&] { return round.load(std::memory_order_acquire) != done; });
                }
            }
            if (stopping) return;
            (*task)(index);
            meet();
        }
    }

    const pid_t process;
    std::vector<std::thread> threads;
    const std::function<void(int)>* task = nullptr;
    std::atomic<unsigned> round{0}, phase{0};
    std::atomic<int> arrived{0};
    std::atomic<bool> stopping{false};
    std::mutex mutex;
    std::condition_variable sleeping;
};

// One caller at a time. Never destroyed: a thread may still compute when the process ends.
inline std::mutex& one_at_a_time() {
    static std::mutex& mutex = *new std::mutex;
    // A fork in the middle of another thread's step would leave the child a mutex that nobody unlocks.
    static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
    static_cast<void>(registered);
    return mutex;
}
