#include "engine.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

// Bounds of the section that holds static shared memory, where there is any.
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

// AddressSanitizer must know which stack is in use.
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

namespace cuda_host {

Coordinates here;

namespace {

// GCC's own setjmp: the one of the C library drags AddressSanitizer along at every change of stacks.
using Place = void*[5];

[[gnu::noinline]] void jump_to(Place& place) { __builtin_longjmp(place, 1); }

constexpr size_t stack_bytes = 256 * 1024;
constexpr unsigned warp_lanes = 32, warpgroup_threads = 128;

enum class State { ready, at_warp_operation, at_barrier, suspended, ended };

struct Fiber {
  void* stack = nullptr;
  bool started = false;
  Place place;
  void* asan = nullptr;
  unsigned number = 0;
  State state = State::ready;
  Site site = {};
  unsigned mask = 0;
  uint64_t value = 0;
  Exchange got = {};
  std::deque<std::vector<Copy>> copies = {{}};  // the last batch is open
  std::deque<std::vector<Product>> products = {{}};
  bool may_multiply = false;
  unsigned multiplied = 0;

  unsigned lane() const { return number % warp_lanes; }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  unsigned at_barrier = 0, ended = 0;
  int yes = 0, voted = 0;
  std::map<int, std::vector<unsigned>> synchronizing;  // threads by the number of their barrier
};

std::mt19937_64 order([] {
  const char* seed = std::getenv("CUDA_HOST_SEED");
  return seed ? std::strtoull(seed, nullptr, 10) : 1;
}());

Block block;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::unique_ptr<char[]> shared;
std::string failure;
Observer nobody;
Observer* observing = &nobody;
size_t shared_size = 0;
std::string (*check_at_end)() = nullptr;

Place scheduler;
ucontext_t scheduler_context;
void* scheduler_asan = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

void start_switch(void** leaving, const void* stack, size_t bytes) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(leaving, stack, bytes);
  }
}

void finish_switch(void* entered, const void** from, size_t* bytes) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(entered, from, bytes);
  }
}

Dim3 unravel(uint64_t number, const Dim3& shape) {
  return {
      static_cast<unsigned>(number % shape.x), static_cast<unsigned>(number / shape.x % shape.y),
      static_cast<unsigned>(number / shape.x / shape.y)};
}

// From a fiber to the scheduler, for good where the fiber has ended.
[[gnu::noinline]] void yield() {
  Fiber* volatile fiber = current;
  if (__builtin_setjmp(fiber->place) == 0) {
    start_switch(fiber->state == State::ended ? nullptr : &fiber->asan, scheduler_stack, scheduler_stack_bytes);
    jump_to(scheduler);
  }
  finish_switch(fiber->asan, nullptr, nullptr);
}

void fiber_main() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  current->state = State::ended;
  yield();
}

[[gnu::noinline]] void enter(Fiber& fiber) {
  current = &fiber;
  here.thread = unravel(fiber.number, here.block_dim);
  if (__builtin_setjmp(scheduler) == 0) {
    start_switch(&scheduler_asan, fiber.stack, stack_bytes);
    if (fiber.started) {
      jump_to(fiber.place);
    }
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  finish_switch(scheduler_asan, nullptr, nullptr);
  current = nullptr;
}

std::string words(const Fiber& fiber) {
  std::ostringstream text;
  text << "thread " << fiber.number;
  if (fiber.state == State::ended) {
    text << " has ended";
  } else {
    text << " is at " << fiber.site.operation;
    if (fiber.state == State::at_warp_operation) {
      text << " of lanes " << std::hex << fiber.mask << std::dec;
    }
    text << " (" << fiber.site.file << ":" << fiber.site.line << ")";
  }
  return text.str();
}

void make_ready(Fiber& fiber) {
  fiber.state = State::ready;
  block.ready.push_back(&fiber);
}

// Lets the lanes of a fiber's warp operation go on, if all of them are at it.
void complete_warp_operation(Fiber& fiber) {
  const unsigned first = fiber.number - fiber.lane();
  Exchange got = {};
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    if (!(fiber.mask >> lane & 1) || first + lane >= block.fibers.size()) {
      continue;
    }
    const Fiber& other = block.fibers[first + lane];
    if (other.state == State::ended) {
      continue;
    }
    if (other.state != State::at_warp_operation || other.mask != fiber.mask ||
        (other.site.operation != fiber.site.operation &&
         std::strcmp(other.site.operation, fiber.site.operation) != 0)) {
      return;
    }
    got.values[lane] = other.value;
    got.present |= 1u << lane;
  }
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    if (got.present >> lane & 1) {
      block.fibers[first + lane].got = got;
      make_ready(block.fibers[first + lane]);
    }
  }
  // Shuffles and votes order no accesses to memory.
  if (std::strcmp(fiber.site.operation, "__syncwarp") == 0) {
    observing->warp_synchronizes(first, got.present);
  }
}

void complete_barrier() {
  if (block.at_barrier == 0 || block.at_barrier + block.ended < block.fibers.size()) {
    return;
  }
  const Fiber* one = nullptr;
  for (const Fiber& fiber : block.fibers) {
    one = fiber.state == State::at_barrier ? &fiber : one;
  }
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::ended || fiber.site.line != one->site.line || fiber.site.file != one->site.file) {
      failure = "divergent barrier: " + words(*one) + ", " + words(fiber);
      return;
    }
  }
  block.at_barrier = 0;
  block.voted = block.yes;
  block.yes = 0;
  for (Fiber& fiber : block.fibers) {
    make_ready(fiber);
  }
  observing->block_synchronizes();
}

void* new_stack() {
  char* memory = static_cast<char*>(
      mmap(nullptr, stack_bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) {
    std::abort();
  }
  mprotect(memory, 4096, PROT_NONE);
  return memory + 4096;
}

// What shared memory holds before anyone writes to it: NaN half of the time, else noise.
void scramble(char* memory, size_t bytes) {
  const bool noise = order() % 2;
  for (size_t i = 0; i < bytes; ++i) {
    memory[i] = static_cast<char>(noise ? order() : 0xff);
  }
}

std::vector<void*> stacks;

// Fibers that were left in the middle leave marks of their frames.
void clear_stacks() {
  for (void* stack : stacks) {
    if (__asan_unpoison_memory_region) {
      __asan_unpoison_memory_region(stack, stack_bytes);
    }
  }
}

void run_block(uint64_t number, unsigned threads, size_t shared_bytes) {
  while (stacks.size() < threads) {
    stacks.push_back(new_stack());
  }
  here.block = unravel(number, here.grid_dim);
  shared.reset(new char[shared_bytes]);
  shared_size = shared_bytes;
  scramble(shared.get(), shared_bytes);
  observing->block_begins(number);
  observing->shared_memory_is(shared.get(), shared_bytes);
  if (__start_cuda_shared) {
    const size_t bytes = __stop_cuda_shared - __start_cuda_shared;
    scramble(__start_cuda_shared, bytes);
    observing->shared_memory_is(__start_cuda_shared, bytes);
  }
  block.fibers.assign(threads, {});
  block.ready.clear();
  block.at_barrier = block.ended = 0;
  block.yes = 0;
  block.synchronizing.clear();
  for (unsigned i = 0; i < threads; ++i) {
    block.fibers[i].number = i;
    block.fibers[i].stack = stacks[i];
    block.ready.push_back(&block.fibers[i]);
  }
  while (!block.ready.empty() && failure.empty()) {
    const size_t pick = order() % block.ready.size();
    std::swap(block.ready[pick], block.ready.back());
    Fiber& fiber = *block.ready.back();
    block.ready.pop_back();
    enter(fiber);
    if (!failure.empty()) {
      break;
    }
    if (fiber.state == State::ended) {
      ++block.ended;
      // Those who wait for it in their mask wait no longer.
      const unsigned first = fiber.number - fiber.lane();
      for (unsigned i = first; i < first + warp_lanes && i < threads; ++i) {
        if (block.fibers[i].state == State::at_warp_operation) {
          complete_warp_operation(block.fibers[i]);
        }
      }
    } else if (fiber.state == State::at_warp_operation) {
      complete_warp_operation(fiber);
    }
    complete_barrier();
  }
  for (const Fiber& fiber : block.fibers) {
    if (failure.empty() && fiber.state != State::ended) {
      std::string others;
      for (const Fiber& other : block.fibers) {
        const bool in_mask =
            other.number / warp_lanes == fiber.number / warp_lanes && fiber.mask >> other.lane() & 1;
        if (others.empty() && (fiber.state == State::at_barrier || in_mask) &&
            (other.state != fiber.state || other.site.line != fiber.site.line || other.mask != fiber.mask)) {
          others = ", " + words(other);
        }
      }
      const bool waits = fiber.state == State::suspended;
      failure = waits ? "a wait without end: " : "divergent ";
      failure += waits ? "" : fiber.state == State::at_barrier ? "barrier: " : "warp operation: ";
      failure += words(fiber) + others;
    }
  }
  for (const Fiber& fiber : block.fibers) {
    const Fiber& first = block.fibers[fiber.number / warpgroup_threads * warpgroup_threads];
    if (failure.empty() && fiber.multiplied != first.multiplied) {
      failure = "products that not all of a warpgroup take part in: " + words(fiber) + ", " + words(first);
    }
  }
  if (check_at_end) {
    const std::string found = check_at_end();
    failure = failure.empty() ? found : failure;
  }
  observing->block_ends();
}

}  // namespace

unsigned thread_number() { return current->number; }
unsigned lane() { return current->lane(); }
void* dynamic_shared() { return shared.get(); }
size_t dynamic_shared_bytes() { return shared_size; }

void copy_later(const Copy& copy) { current->copies.back().push_back(copy); }
void commit_copies() { current->copies.emplace_back(); }
void wait_for_copies(size_t still_on_their_way, void (*perform)(Copy)) {
  while (current->copies.size() > still_on_their_way + 1) {
    for (const Copy& copy : current->copies.front()) {
      perform(copy);
    }
    current->copies.pop_front();
  }
}

void suspend(const Site& site) {
  current->site = site;
  current->state = State::suspended;
  yield();
}

void resume(unsigned thread) { make_ready(block.fibers[thread]); }

void synchronize(int number, int threads) {
  std::vector<unsigned>& waiting = block.synchronizing[number];
  waiting.push_back(current->number);
  if (waiting.size() < static_cast<size_t>(threads)) {
    suspend({"bar.sync", "number ", number});
    return;
  }
  observing->threads_synchronize(waiting);
  for (unsigned thread : waiting) {
    if (thread != current->number) {
      resume(thread);
    }
  }
  waiting.clear();
}

void begin_products() { current->may_multiply = true; }

void multiply_later(const Product& product) {
  if (!current->may_multiply) {
    fail("a product without wgmma.fence after registers were waited for");
  }
  ++current->multiplied;
  current->products.back().push_back(product);
}

void commit_products() { current->products.emplace_back(); }

void wait_for_products(size_t batches_on_their_way) {
  while (current->products.size() > batches_on_their_way + 1) {
    for (const Product& product : current->products.front()) {
      product.make(product);
    }
    current->products.pop_front();
  }
  current->may_multiply = false;
}

void at_end_of_block(std::string (*check)()) { check_at_end = check; }

bool in_kernel(const void* address) {
  return current && (address < current->stack || address >= static_cast<char*>(current->stack) + stack_bytes) &&
         (address < &here || address >= &here + 1);
}

void observe(Observer* who) { observing = who; }
Observer& observer() { return *observing; }

void fail(const std::string& message) {
  std::ostringstream text;
  text << message << " [block " << here.block.x << ", thread " << current->number << "]";
  failure = text.str();
  yield();
  std::abort();
}

Exchange exchange(const Site& site, unsigned mask, uint64_t value) {
  current->site = site;
  current->mask = mask;
  current->value = value;
  current->state = State::at_warp_operation;
  if (!(mask >> current->lane() & 1)) {
    fail("lane outside of its own mask: " + words(*current));
  }
  yield();
  return current->got;
}

int barrier(const Site& site, bool yes) {
  current->site = site;
  current->state = State::at_barrier;
  ++block.at_barrier;
  block.yes += yes;
  yield();
  return block.voted;
}

std::string run(Dim3 grid, Dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  failure.clear();
  if (grid.count() == 0 || threads.count() == 0 || threads.count() > 1024) {
    return "a launch of " + std::to_string(grid.count()) + " blocks of " + std::to_string(threads.count()) +
           " threads: expected at least 1, and at most 1024 threads";
  }
  body = &kernel;
  here.grid_dim = grid;
  here.block_dim = threads;
  std::vector<uint64_t> blocks(grid.count());
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), order);
  observing->launch_begins();
  for (uint64_t number : blocks) {
    run_block(number, static_cast<unsigned>(threads.count()), shared_bytes);
    if (!failure.empty()) {
      clear_stacks();
      break;
    }
  }
  shared.reset();
  return failure;
}

}  // namespace cuda_host
