// Watches every access of a kernel to memory that its threads share, through the calls that the
// compiler makes for ThreadSanitizer. Two accesses to a byte, at least one of them a write, by
// different threads with no barrier between, end the launch; so does a read of shared memory that
// nobody has written. Atomics are exempt.
#include <algorithm>
#include <array>
#include <memory>
#include <sstream>
#include <unordered_map>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include "engine.h"

namespace cuda_host {
namespace {

constexpr unsigned warp_lanes = 32;
constexpr size_t page_bytes = 1024;

struct Access {
  uint64_t block = 0;
  unsigned thread = 0;
  unsigned barriers = 0;  // of the block so far
  unsigned time = 0;      // of the thread, which every barrier of its warp advances
  bool any = false;
};

struct Byte {
  Access write, read, earlier_read;  // the reads are by different threads
  uint64_t written_in = 0;           // number of a block's run
};

using Page = std::array<Byte, page_bytes>;

class Watcher : public Observer {
 public:
  void launch_begins() override {
    pages.clear();
    last_page = nullptr;
  }

  void block_begins(uint64_t number) override {
    block = number;
    ++run;
    barriers = 0;
    shared.clear();
    for (unsigned thread = 0; thread < times.size(); ++thread) {
      times[thread].fill(0);
      times[thread][thread % warp_lanes] = 1;
    }
  }

  void shared_memory_is(const void* begin, size_t bytes) override {
    shared.emplace_back(reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes);
  }

  void block_ends() override {
    // The next block has this memory to itself.
    for (const auto& [begin, end] : shared) {
      for (uintptr_t at = begin; at < end; ++at) {
        byte(at) = {};
      }
    }
  }

  void block_synchronizes() override { ++barriers; }

  void warp_synchronizes(unsigned first, unsigned lanes) override {
    std::array<unsigned, warp_lanes> latest = {};
    for_lanes(lanes, [&](unsigned lane) {
      for (unsigned other = 0; other < warp_lanes; ++other) {
        latest[other] = std::max(latest[other], times[first + lane][other]);
      }
    });
    for_lanes(lanes, [&](unsigned lane) {
      times[first + lane] = latest;
      ++times[first + lane][lane];
    });
  }

  void access(const void* address, size_t bytes, bool writes, const void* caller) {
    if (!in_kernel(address)) {
      return;
    }
    const unsigned thread = thread_number();
    const Access now = {block, thread, barriers, times[thread][thread % warp_lanes], true};
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const bool is_global = !is_shared(begin);
    for (uintptr_t at = begin; at < begin + bytes; ++at) {
      Byte& memory = byte(at);
      if (!is_before(memory.write, now)) {
        end(writes ? "writes" : "reads", "was written", memory.write, at, caller);
      }
      if (writes) {
        for (const Access& read : {memory.read, memory.earlier_read}) {
          if (!is_before(read, now)) {
            end("writes", "was read", read, at, caller);
          }
        }
        written += is_global && !memory.write.any;
        memory.write = now;
        memory.written_in = run;
      } else {
        read += is_global && !memory.read.any;
        if (memory.written_in != run && !is_global) {
          fail("read of shared memory that nobody wrote" + place(caller));
        }
        if (memory.read.thread != thread || memory.read.block != block) {
          memory.earlier_read = memory.read;
        }
        memory.read = now;
      }
    }
  }

  // Bytes of global memory that launches have read and written, each once for a launch.
  uint64_t read = 0, written = 0;

 private:
  bool is_before(const Access& then, const Access& now) const {
    if (!then.any || (then.block == now.block && (then.thread == now.thread || then.barriers < now.barriers))) {
      return true;
    }
    return then.block == now.block && then.thread / warp_lanes == now.thread / warp_lanes &&
           then.time <= times[now.thread][then.thread % warp_lanes];
  }

  bool is_shared(uintptr_t at) const {
    const auto holds = [&](const auto& range) { return range.first <= at && at < range.second; };
    return std::any_of(shared.begin(), shared.end(), holds);
  }

  [[noreturn]] void end(const char* does, const char* was, const Access& other, uintptr_t at, const void* caller) {
    std::ostringstream text;
    text << "race: " << does << " a byte of " << (is_shared(at) ? "shared" : "global") << " memory that " << was
         << " by thread " << other.thread << " of block " << other.block << ", with no barrier between"
         << place(caller);
    fail(text.str());
  }

  // For addr2line.
  static std::string place(const void* caller) {
    Dl_info info;
    std::ostringstream text;
    if (dladdr(caller, &info)) {
      text << " (at " << std::hex << static_cast<const char*>(caller) - static_cast<const char*>(info.dli_fbase)
           << " of " << info.dli_fname << ")";
    }
    return text.str();
  }

  template <class F>
  static void for_lanes(unsigned lanes, const F& f) {
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
      if (lanes >> lane & 1) {
        f(lane);
      }
    }
  }

  Byte& byte(uintptr_t at) {
    if (at / page_bytes != last_number || !last_page) {
      std::unique_ptr<Page>& page = pages[at / page_bytes];
      if (!page) {
        page = std::make_unique<Page>();
      }
      last_number = at / page_bytes;
      last_page = page.get();
    }
    return (*last_page)[at % page_bytes];
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_number = 0;
  Page* last_page = nullptr;
  std::vector<std::pair<uintptr_t, uintptr_t>> shared;
  // What each thread knows of the times of the lanes of its warp, its own being ahead of that.
  std::vector<std::array<unsigned, warp_lanes>> times = std::vector<std::array<unsigned, warp_lanes>>(1024);
  uint64_t block = 0, run = 0;
  unsigned barriers = 0;
};

Watcher watcher;
const bool watching = (observe(&watcher), true);

}  // namespace
}  // namespace cuda_host

#define ACCESS(NAME, BYTES, WRITES)                                                       \
  extern "C" void NAME(void* address) {                                                   \
    cuda_host::watcher.access(address, BYTES, WRITES, __builtin_return_address(0)); \
  }
#define ACCESSES(BYTES)                             \
  ACCESS(__tsan_read##BYTES, BYTES, false)          \
  ACCESS(__tsan_write##BYTES, BYTES, true)          \
  ACCESS(__tsan_unaligned_read##BYTES, BYTES, false) \
  ACCESS(__tsan_unaligned_write##BYTES, BYTES, true)

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

extern "C" __attribute__((visibility("default"))) void cuda_host_take_traffic(uint64_t* read, uint64_t* written) {
  *read = std::exchange(cuda_host::watcher.read, 0);
  *written = std::exchange(cuda_host::watcher.written, 0);
}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, uint64_t bytes) {
  cuda_host::watcher.access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, uint64_t bytes) {
  cuda_host::watcher.access(address, bytes, true, __builtin_return_address(0));
}
}
