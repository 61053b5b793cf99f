// Runs CUDA kernels on the CPU: the threads of a block are fibers, which change places where one of
// them waits for others. Blocks, and the fibers that can go on, take turns in a random order.
//
// It ends a launch with a message for what a GPU would not tell: a barrier that not all threads
// reach, a warp operation whose lanes disagree, a shuffle from a lane that takes no part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_host {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

// Of the fiber that runs.
struct Coordinates {
  Dim3 thread, block, block_dim, grid_dim;
};
extern Coordinates here;

struct Site {
  const char* operation;
  const char* file;
  int line;
};

// What the lanes of a warp brought to an operation.
struct Exchange {
  uint64_t values[32];
  unsigned present;  // lanes of the mask that have not ended
};

// Waits until all lanes of the mask are at this operation.
Exchange exchange(const Site& site, unsigned mask, uint64_t value);

// Waits until all threads of the block are here; returns how many said yes.
int barrier(const Site& site, bool yes);

// Lane of the fiber that runs, and its thread number within the block.
unsigned lane();
unsigned thread_number();

// Ends the launch.
[[noreturn]] void fail(const std::string& message);

// An asynchronous copy of the fiber that runs, the last bytes of it zeros.
struct Copy {
  char* to;
  const char* from;
  size_t bytes, zeroed;
};
void copy_later(const Copy& copy);
void commit_copies();
// By value, so that what is watched reads it on the stack of the fiber, not where the next block may be.
void wait_for_copies(size_t still_on_their_way, void (*perform)(Copy));

// Dynamic shared memory of the block that runs.
void* dynamic_shared();

// Runs a kernel; returns what ended it, or an empty string.
std::string run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Whether a fiber runs, and the address is none of its own.
bool in_kernel(const void* address);

// Told by run() to whoever watches the accesses to memory.
struct Observer {
  virtual void launch_begins() {}
  virtual void block_begins(uint64_t) {}
  virtual void shared_memory_is(const void*, size_t) {}
  virtual void block_ends() {}
  virtual void warp_synchronizes(unsigned, unsigned) {}  // its first thread, the lanes that take part
  virtual void block_synchronizes() {}
  virtual ~Observer() = default;
};
void observe(Observer* observer);

}  // namespace cuda_host
