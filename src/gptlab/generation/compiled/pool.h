// The threads that compute a step together. They wait for each other by spinning: a step has some fifty meetings, and
// waking a sleeping thread takes longer than the work between two of them.
#pragma once
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
        threads.reserve(wanted);
        try {
            for (; size < wanted; size++) threads.emplace_back([this, i = size] { wait_and_work(i); });
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

    void run(const std::function<void(int)>& work) {
        task = &work;
        arrived = 0;
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

    int size = 1;  // threads that compute, the caller's among them

   private:
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

    const int wanted;
    const pid_t process;
    std::vector<std::thread> threads;
    const std::function<void(int)>* task = nullptr;
    std::atomic<unsigned> round{0}, phase{0};
    std::atomic<int> arrived{0};
    std::atomic<bool> stopping{false};
    std::mutex mutex;
    std::condition_variable sleeping;
};
