// Device memory that was declared, shared memory of blocks, and their shadow.
#include "emulator/memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>

#include "emulator/machine.h"
#include "emulator/shadow.h"

// First and last address of this library or program.
extern "C" {
extern const char __ehdr_start __attribute__((visibility("hidden")));
extern const char _end __attribute__((visibility("hidden")));
}

namespace emulator {
namespace {

struct Buffer {
  uintptr_t begin;
  size_t bytes;
  bool may_be_incomplete;  // there is nothing to write, or nobody asks
};
std::vector<Buffer> buffers;                 // as declared; they may overlap
std::map<uintptr_t, uintptr_t> covered;      // begin to end, disjoint
std::unordered_map<uintptr_t, Cell*> pages;  // by address / kPageBytes

// The last pages asked for; a null one has no cells.
struct Recent {
  uintptr_t page = ~uintptr_t{0};
  Cell* cells = nullptr;
};
Recent recent[256];

constexpr size_t kGapBytes = 256, kStaticLimit = 48 * 1024;  // of shared memory

uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

template <class F>
void for_each_gap(uintptr_t begin, uintptr_t end, F f) {
  auto next = covered.upper_bound(begin);
  if (next != covered.begin()) begin = std::max(begin, std::prev(next)->second);
  while (begin < end) {
    const uintptr_t stop = next == covered.end() ? end : std::min(end, next->first);
    if (begin < stop) f(begin, stop);
    if (next == covered.end()) return;
    begin = std::max(begin, next->second);
    ++next;
  }
}

void* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for the emulator");
  return p;
}

// "byte 12 of", "4 bytes past the end of", "4 bytes before", and how far that is.
std::string offset_text(uintptr_t p, uintptr_t begin, size_t bytes, size_t* distance) {
  const uintptr_t end = begin + bytes;
  if (p < begin) {
    *distance = begin - p;
    return std::to_string(*distance) + " bytes before ";
  }
  if (p < end) {
    *distance = 0;
    return "byte " + std::to_string(p - begin) + " of ";
  }
  *distance = p - end + 1;
  return std::to_string(p - end) + " bytes past the end of ";
}

}  // namespace

Cell* cells_at(uintptr_t address) {
  const uintptr_t page = address / kPageBytes;
  Recent& entry = recent[page % 256];
  if (entry.page != page) {
    const auto found = pages.find(page);
    entry = {page, found == pages.end() ? nullptr : found->second};
  }
  return entry.cells == nullptr ? nullptr : entry.cells + address % kPageBytes;
}

void mark(const void* p, size_t bytes, Time written) {
  if (!kChecked) return;
  for (uintptr_t begin = address_of(p), end = begin + bytes; begin < end;) {
    const uintptr_t page = begin / kPageBytes, stop = std::min(end, (page + 1) * kPageBytes);
    Cell*& cells = pages[page];
    if (cells == nullptr) {
      cells = static_cast<Cell*>(map_memory(kPageBytes * sizeof(Cell)));
      recent[page % 256] = {page, cells};
    }
    if (written == Cell::kNone && stop - begin == kPageBytes) {
      madvise(cells, kPageBytes * sizeof(Cell), MADV_DONTNEED);  // reads as zeros, kNone
    } else {
      const Cell cell{written, 0, {0, 0}, {0, 0}};
      std::fill(cells + begin % kPageBytes, cells + begin % kPageBytes + (stop - begin), cell);
    }
    begin = stop;
  }
}

void forget_memory() {
  for (const auto& [begin, end] : covered) mark(reinterpret_cast<void*>(begin), end - begin, Cell::kNone);
  covered.clear();
  buffers.clear();
}

void adopt(const void* p, size_t bytes, bool initialised, bool scratch) {
  if (bytes == 0) return;
  const uintptr_t begin = address_of(p);
  buffers.push_back({begin, bytes, initialised || scratch});
  std::vector<std::pair<uintptr_t, uintptr_t>> gaps;
  for_each_gap(begin, begin + bytes, [&](uintptr_t a, uintptr_t b) { gaps.push_back({a, b}); });
  for (const auto& [a, b] : gaps) {
    covered[a] = b;
    void* memory = reinterpret_cast<void*>(a);
    mark(memory, b - a, initialised ? Cell::kHost : Cell::kUninitialised);
    if (!initialised) std::memset(memory, 0xFF, b - a);
  }
}

void disown(const void* p) {
  const uintptr_t begin = address_of(p);
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (buffers[i].begin != begin) continue;
    mark(p, buffers[i].bytes, Cell::kNone);
    covered.erase(covered.lower_bound(begin), covered.lower_bound(begin + buffers[i].bytes));
    buffers.erase(buffers.begin() + static_cast<ptrdiff_t>(i));
    return;
  }
  throw Error("free of memory that was not allocated");
}

void wrote(const void* p, size_t bytes) {
  for_each_gap(address_of(p), address_of(p) + bytes,
               [](uintptr_t, uintptr_t) { throw Error("the host writes memory that is not device memory"); });
  mark(p, bytes, Cell::kHost);
}

void check_written() {
  if (!kChecked) return;
  for (const Buffer& buffer : buffers) {
    if (buffer.may_be_incomplete) continue;
    size_t missing = 0;
    uintptr_t first = 0;
    for (uintptr_t p = buffer.begin; p < buffer.begin + buffer.bytes; ++p) {
      if (cells_at(p)->written != Cell::kUninitialised) continue;
      if (missing++ == 0) first = p;
    }
    if (missing == 0) continue;
    throw Error("output not written: " + std::to_string(missing) + " bytes, the first is " +
                memory_text(reinterpret_cast<void*>(first)) + "; the last launch was " + kernel_text());
  }
}

void require_alignment(const void* p, size_t bytes) {
  if (address_of(p) % bytes == 0) return;
  fail("misaligned access: %zu bytes at %s", bytes, source_of(__builtin_return_address(0)).c_str());
}

bool is_exempt(const void* p) {
  const auto within = [p](const void* begin, const void* end) { return p >= begin && p < end; };
  return within(&__ehdr_start, &_end) || on_a_stack(p) ||
         within(grid.launch.call, static_cast<const char*>(grid.launch.call) + grid.launch.call_bytes);
}

std::string memory_text(const void* p) {
  size_t nearest = kPageBytes, distance = 0;
  std::string text = "memory that the launch was not given";
  const auto consider = [&](uintptr_t begin, size_t bytes, const std::string& name) {
    const std::string offset = offset_text(address_of(p), begin, bytes, &distance);
    if (distance >= nearest) return;
    nearest = distance;
    text = offset + name + " (" + std::to_string(bytes) + " bytes)";
  };
  if (current != nullptr && current->block != nullptr) {
    for (const auto& block : grid.blocks) {
      if (address_of(p) - address_of(block->shared) >= kRoomBytes) continue;
      for (const auto& v : block->variables) {
        consider(address_of(v.address), v.bytes, std::string("shared memory ") + v.name);
      }
      return block.get() == current->block ? text : text + " of another block";
    }
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    consider(buffers[i].begin, buffers[i].bytes, "buffer " + std::to_string(i + 1));
  }
  return text;
}

// --- shared memory ----------------------------------------------------------------------------------------------

static unsigned char* place(Block& block, const void* key, const char* name, size_t bytes, size_t alignment) {
  const size_t begin = (block.shared_used + kGapBytes + alignment - 1) / alignment * alignment;
  unsigned char* address = block.shared + begin;
  block.shared_used = begin + bytes;
  block.variables.push_back({key, name, address, bytes});
  std::memset(address, 0xFF, bytes);
  return address;
}

void begin_shared(Block& block, size_t dynamic) {
  // aligned to whole pages of the shadow, which other memory then does not share
  if (block.shared == nullptr) {
    const uintptr_t room = address_of(map_memory(kRoomBytes + kPageBytes));
    block.shared = reinterpret_cast<unsigned char*>((room + kPageBytes - 1) / kPageBytes * kPageBytes);
  }
  for (auto v = block.variables.begin(); v != block.variables.end(); ++v) {
    // the dynamic memory of the block that was here before often serves again, and then needs no marks: the checker
    // takes what was written before Block::started for not initialised
    if (v != block.variables.begin() || v->bytes != dynamic) mark(v->address, v->bytes, Cell::kNone);
  }
  const bool marked = !block.variables.empty() && block.variables.front().bytes == dynamic;
  block.variables.clear();
  block.shared_used = block.static_bytes = 0;
  block.started = now;
  unsigned char* address = place(block, nullptr, "(dynamic)", dynamic, 1024);
  if (!marked) mark(address, dynamic, Cell::kUninitialised);
}

unsigned char* dynamic_shared(Location at) {
  const Block::Variable& dynamic = current->block->variables.front();
  if (dynamic.bytes == 0) fail("dynamic shared memory at %s, but the launch has none", text_of(at).c_str());
  return dynamic.address;
}

void* shared_variable(const void* key, size_t bytes, size_t alignment, const char* name, Location at) {
  Block& block = *current->block;
  for (const Block::Variable& v : block.variables) {
    if (v.key == key) return v.address;
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kStaticLimit || block.static_bytes + grid.launch.shared > kSharedLimit) {
    fail("too much shared memory: %zu static bytes with %s at %s, %zu dynamic", block.static_bytes, name,
         text_of(at).c_str(), grid.launch.shared);
  }
  unsigned char* address = place(block, key, name, bytes, std::max<size_t>(alignment, 16));
  mark(address, bytes, Cell::kUninitialised);
  return address;
}

}  // namespace emulator
