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
  unsigned time = 0;      // of the thread, which every barrier that is not the block's advances
  bool any = false;
  bool by_thread = true;  // not by what copies tiles
};

// What a thread knows of the times of each thread, its own being ahead of that.
using Times = std::vector<unsigned>;

constexpr unsigned most_threads = 1024;

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
    departures.clear();
    at_barriers.clear();
    threads = static_cast<unsigned>(here.block_dim.count());
    fenced.assign(threads, 0);
    for (unsigned thread = 0; thread < threads; ++thread) {
      times[thread].assign(threads, 0);
      times[thread][thread] = 1;
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
    std::vector<unsigned> together;
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
      if (lanes >> lane & 1) {
        together.push_back(first + lane);
      }
    }
    threads_synchronize(together);
  }

  void threads_synchronize(const std::vector<unsigned>& together) override {
    Times latest(threads, 0);
    for (unsigned thread : together) {
      learn(latest, times[thread]);
    }
    for (unsigned thread : together) {
      times[thread] = latest;
      ++times[thread][thread];
    }
  }

  void arrives(const void* barrier) override {
    Times& known = at_barriers.try_emplace(barrier, threads, 0).first->second;
    Times& own = times[thread_number()];
    learn(known, own);
    ++own[thread_number()];
  }

  void leaves(const void* barrier) override {
    const auto known = at_barriers.find(barrier);
    if (known != at_barriers.end()) {
      learn(times[thread_number()], known->second);
    }
  }

  void fences_tiles() override {
    unsigned& time = times[thread_number()][thread_number()];
    fenced[thread_number()] = time++;
  }

  size_t tile_departs() override {
    const unsigned thread = thread_number();
    departures.push_back({{block, thread, barriers, times[thread][thread], true, false}, times[thread]});
    ++times[thread][thread];
    return departures.size() - 1;
  }

  void tile_lands(size_t departure, const void* barrier) override {
    learn(at_barriers.at(barrier), departures[departure].second);
  }

  void tile_accesses(size_t departure, const void* address, size_t bytes, bool writes) override {
    const auto& [now, known] = departures[departure];
    check(address, bytes, writes, now, known, nullptr);
  }

  void product_reads(const void* address, size_t bytes) override {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    for (uintptr_t at = begin; at < begin + bytes; ++at) {
      check_fence(byte(at).write, nullptr);
    }
  }

  void access(const void* address, size_t bytes, bool writes, const void* caller) {
    if (!in_kernel(address)) {
      return;
    }
    const unsigned thread = thread_number();
    check(address, bytes, writes, {block, thread, barriers, times[thread][thread], true}, times[thread], caller);
  }

  // Bytes of global memory that launches have read and written, each once for a launch.
  uint64_t read = 0, written = 0;

 private:
  void check(
      const void* address, size_t bytes, bool writes, const Access& now, const Times& known, const void* caller) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const bool is_global = !is_shared(begin);
    for (uintptr_t at = begin; at < begin + bytes; ++at) {
      Byte& memory = byte(at);
      if (!is_before(memory.write, now, known)) {
        end(writes ? "writes" : "reads", "was written", memory.write, at, caller);
      }
      if (writes) {
        for (const Access& read : {memory.read, memory.earlier_read}) {
          if (!is_before(read, now, known)) {
            end("writes", "was read", read, at, caller);
          }
        }
        if (!now.by_thread) {
          check_fence(memory.write, caller);
        }
        written += is_global && !memory.write.any;
        memory.write = now;
        memory.written_in = run;
      } else {
        read += is_global && !memory.read.any;
        if (memory.written_in != run && !is_global) {
          fail("read of shared memory that nobody wrote" + place(caller));
        }
        if (memory.read.thread != now.thread || memory.read.block != block) {
          memory.earlier_read = memory.read;
        }
        memory.read = now;
      }
    }
  }

  bool is_before(const Access& then, const Access& now, const Times& known) const {
    if (!then.any || (then.block == now.block && (then.thread == now.thread || then.barriers < now.barriers))) {
      return true;
    }
    return then.block == now.block && then.time <= known[then.thread];
  }

  // Tiles see what threads wrote only after their fence.
  void check_fence(const Access& write, const void* caller) const {
    if (write.any && write.by_thread && write.block == block && write.time > fenced[write.thread]) {
      fail(
          "a tile where thread " + std::to_string(write.thread) + " wrote with no fence.proxy.async after it" +
          place(caller));
    }
  }

  static void learn(Times& known, const Times& other) {
    for (size_t i = 0; i < known.size(); ++i) {
      known[i] = std::max(known[i], other[i]);
    }
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
  unsigned threads = 0;  // of the block
  std::vector<Times> times = std::vector<Times>(most_threads);
  std::vector<unsigned> fenced;  // the time of each thread at its last fence
  std::vector<std::pair<Access, Times>> departures;
  std::unordered_map<const void*, Times> at_barriers;  // in shared memory
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
unsigned char __tsan_atomic8_load(const volatile unsigned char* from, int) { return *from; }  // of local statics
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, uint64_t bytes) {
  cuda_host::watcher.access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, uint64_t bytes) {
  cuda_host::watcher.access(address, bytes, true, __builtin_return_address(0));
}
}
