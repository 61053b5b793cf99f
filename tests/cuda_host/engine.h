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
#include <vector>

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

// Holds the fiber that runs until it is resumed by its thread number.
void suspend(const Site& site);
void resume(unsigned thread);

// A product of a warpgroup, as far as the fiber that runs takes part in it: made as late as it may.
struct Product {
  void (*make)(Product);
  float (*sums)[4];
  uint64_t a, b;      // what describes operands in shared memory
  float left[2][16];  // rows of the first, where it is in registers
  bool add;
};
void begin_products();
void multiply_later(const Product& product);
void commit_products();
void wait_for_products(size_t batches_on_their_way);

// Waits until as many threads are at the barrier of this number.
void synchronize(int number, int threads);

// Dynamic shared memory of the block that runs.
void* dynamic_shared();
size_t dynamic_shared_bytes();

// Called when a block has ended, for what is wrong then, or an empty string.
void at_end_of_block(std::string (*check)());

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
  virtual void threads_synchronize(const std::vector<unsigned>&) {}
  // A barrier in shared memory takes on what the thread that runs knows, and lets it know.
  virtual void arrives(const void*) {}
  virtual void leaves(const void*) {}
  // Copies and products that go past the threads' own view of memory.
  virtual void fences_tiles() {}
  virtual size_t tile_departs() { return 0; }  // a number for what the thread that runs knows
  virtual void tile_accesses(size_t, const void*, size_t, bool) {}
  virtual void tile_lands(size_t, const void*) {}  // at a barrier
  virtual void product_reads(const void*, size_t) {}
  virtual ~Observer() = default;
};
void observe(Observer* observer);
Observer& observer();

}  // namespace cuda_host
