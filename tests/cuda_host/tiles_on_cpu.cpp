// Barriers in shared memory, and the tiles that come in to them: as late as they may, when they are
// waited for.
#include <cstring>
#include <map>
#include <vector>

#include "cuda.h"

namespace cuda_host {
namespace {

struct Tile {
  unsigned to;  // in shared memory
  CUtensorMap map;
  int column, head, row;
  size_t departed;  // what the thread that asked for it knew, to the observer

  size_t bytes() const { return map.rows_of_tile * size_t{128}; }
};

struct Barrier {
  unsigned arrivals = 0, missing = 0, phase = 0;
  int64_t expected = 0, fetched = 0;  // bytes
  std::vector<Tile> tiles;
  std::vector<std::pair<unsigned, unsigned>> waiting;  // threads, and the parity that they wait for

  bool is_due() const { return missing == 0 && expected == fetched; }
};

std::map<void*, Barrier> barriers;

void land(const Tile& tile) {
  char* shared = static_cast<char*>(dynamic_shared());
  const CUtensorMap& map = tile.map;
  for (unsigned i = 0; i < map.rows_of_tile; ++i) {
    const int64_t row = static_cast<int64_t>(tile.row) + i;
    const bool there = 0 <= row && row < static_cast<int64_t>(map.sizes[2]);
    const char* from = map.data + row * map.strides[2] + tile.head * map.strides[1];
    for (int word = 0; word < 8; ++word) {
      char* to = shared + swizzled(tile.to + i * 128 + word * 16);
      for (int x = 0; x < 8; ++x) {
        const int column = tile.column + word * 8 + x;
        if (there && 0 <= column && column < static_cast<int>(map.sizes[0])) {
          observer().tile_accesses(tile.departed, from + column * 2, 2, false);
          std::memcpy(to + x * 2, from + column * 2, 2);
        } else {
          std::memset(to + x * 2, 0, 2);
        }
      }
      observer().tile_accesses(tile.departed, to, 16, true);
    }
  }
}

void complete(void* address, Barrier& barrier) {
  for (const Tile& tile : barrier.tiles) {
    land(tile);
    observer().tile_lands(tile.departed, address);
  }
  const unsigned ended = barrier.phase & 1;
  barrier = {barrier.arrivals, barrier.arrivals, barrier.phase + 1, 0, 0, {}, std::move(barrier.waiting)};
  std::vector<std::pair<unsigned, unsigned>> others;
  for (const auto& waiting : barrier.waiting) {
    if (waiting.second == ended) {
      resume(waiting.first);
    } else {
      others.push_back(waiting);
    }
  }
  barrier.waiting = std::move(others);
}

Barrier& at(void* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) {
    fail("a barrier in shared memory that nobody began");
  }
  return found->second;
}

std::string end_of_block() {
  bool on_their_way = false;
  for (const auto& [address, barrier] : barriers) {
    on_their_way = on_their_way || !barrier.tiles.empty();
  }
  barriers.clear();
  return on_their_way ? "tiles were fetched that nobody waited for" : "";
}

const bool checking = (at_end_of_block(end_of_block), true);

}  // namespace

void barrier_begin(void* address, int arrivals) {
  barriers[address] = {static_cast<unsigned>(arrivals), static_cast<unsigned>(arrivals), 0, 0, 0, {}, {}};
}

void barrier_arrive(void* address, int bytes) {
  Barrier& barrier = at(address);
  if (barrier.is_due()) {
    complete(address, barrier);
  }
  if (barrier.missing == 0) {
    fail("more threads arrive at a barrier in shared memory than it expects");
  }
  observer().arrives(address);
  --barrier.missing;
  barrier.expected += bytes;
  if (barrier.is_due() && (barrier.tiles.empty() || !barrier.waiting.empty())) {
    complete(address, barrier);
  }
}

void barrier_wait(void* address, unsigned parity) {
  Barrier& barrier = at(address);
  if ((barrier.phase & 1) == parity && barrier.is_due()) {
    complete(address, barrier);
  }
  if ((barrier.phase & 1) == parity) {
    barrier.waiting.emplace_back(thread_number(), parity);
    suspend({"mbarrier.try_wait", "phase ", static_cast<int>(barrier.phase)});
  }
  observer().leaves(address);
}

void fetch_tile(void* address, void* tile, const CUtensorMap& map, int column, int head, int row) {
  Barrier& barrier = at(address);
  const Tile fetched = {shared_offset(tile), map, column, head, row, observer().tile_departs()};
  if (fetched.to % 128 != 0) {
    fail("a tile that is not aligned to 128 bytes");
  }
  if (fetched.to + fetched.bytes() > dynamic_shared_bytes()) {
    fail("a tile past the end of shared memory");
  }
  if (head < 0 || head >= static_cast<int64_t>(map.sizes[1])) {
    fail("a tile of a head that there is not");
  }
  barrier.tiles.push_back(fetched);
  barrier.fetched += static_cast<int64_t>(fetched.bytes());
  if (barrier.is_due() && !barrier.waiting.empty()) {
    complete(address, barrier);
  }
}

void fence_tiles() { observer().fences_tiles(); }

}  // namespace cuda_host

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* tile, const cuuint32_t* steps, CUtensorMapInterleave,
    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool good = rank == 3 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && tile[0] == 64 && tile[1] == 1 &&
              1 <= tile[2] && tile[2] <= 256;
  for (int i = 0; i < 3; ++i) {
    good = good && 1 <= sizes[i] && sizes[i] <= uint64_t{1} << 32 && steps[i] == 1;
  }
  for (int i = 0; i < 2; ++i) {
    good = good && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
  }
  if (!good) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {static_cast<const char*>(data), {sizes[0], sizes[1], sizes[2]}, {2, strides[0], strides[1]}, tile[2], {}};
  return CUDA_SUCCESS;
}
