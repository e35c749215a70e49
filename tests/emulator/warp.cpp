// Warp collectives: the lane that arrives last does the work for all. Asynchronous copies of a thread.
#include <cuda_fp16.h>

#include <cstring>

#include "emulator/machine.h"

namespace emulator {
namespace {

uint32_t lane_of(const Thread& thread) { return thread.index % 32; }
const Thread& thread_of(uint32_t lane) { return current->block->threads[current->index / 32 * 32 + lane]; }

// Delivers `data` and waits for the other lanes of `mask`; the last to arrive calls finish(data of all lanes, mask).
template <class F>
void meet(const char* name, uint32_t mask, void* data, Location at, F finish) {
  Block& block = *current->block;
  Warp& warp = block.warps[current->index / 32];
  const uint32_t me = 1u << lane_of(*current);
  mask &= warp.exist;  // the last warp of a block may be smaller
  if (!(mask & me)) fail("%s at %s: the mask %08x does not name the caller", name, text_of(at).c_str(), mask);
  if (mask & warp.exited) {
    fail("%s at %s: the mask %08x names lanes that have returned (%08x)", name, text_of(at).c_str(), mask,
         mask & warp.exited);
  }
  Rendezvous *meeting = nullptr, *unused = nullptr;
  for (Rendezvous& m : warp.meetings) {
    if (m.arrived == 0) {
      unused = &m;
    } else if (m.mask == mask) {
      meeting = &m;
    } else if (m.mask & mask) {
      fail("%s at %s with mask %08x, while lanes wait in %s at %s with mask %08x", name, text_of(at).c_str(), mask,
           m.name, text_of(m.at).c_str(), m.mask);
    }
  }
  if (meeting == nullptr) {
    if (unused == nullptr) fail("%s at %s: too many groups of one warp wait", name, text_of(at).c_str());
    meeting = unused;
    meeting->mask = mask;
    meeting->name = name;
    meeting->at = at;
  } else if (!(meeting->at == at) || std::strcmp(meeting->name, name) != 0) {
    fail("divergent collective: %s at %s, while others wait in %s at %s", name, text_of(at).c_str(), meeting->name,
         text_of(meeting->at).c_str());
  }
  meeting->data[lane_of(*current)] = data;
  meeting->arrived |= me;
  if (meeting->arrived == mask) {
    finish(meeting->data, mask);
    meeting->arrived = 0;
    grid.spins = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      Thread& thread = const_cast<Thread&>(thread_of(lane));
      if ((mask >> lane & 1) && &thread != current) wake(&thread);
    }
    if (settings.order != Order::random) return;
    wake(current);
  }
  wait(name, at);
}

template <class F>
void for_each_lane(uint32_t mask, F f) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) f(lane);
  }
}

// The lane that `lane` reads, or -1: its own value (PTX ISA, shfl).
int source_lane(Shuffle kind, int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1, shift = argument & 31;
  int source = first + (shift & (width - 1));
  if (kind == Shuffle::up) source = lane - shift;
  if (kind == Shuffle::down) source = lane + shift;
  if (kind == Shuffle::exchange) source = lane ^ shift;
  return (kind == Shuffle::up ? source < first : source > last) ? -1 : source;
}

float to_float(uint32_t bits, bool half) {
  if (half) {
    __half_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    return __half2float(__half(raw));
  }
  bits <<= 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

void read_row(const void* row, uint32_t lane, Location at) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix at %s: the row of lane %u is not aligned to 16 bytes", text_of(at).c_str(), lane);
  }
  if (kChecked) check(row, 16, Access::read, thread_of(lane), nullptr, &at);
}

}  // namespace

void warp_barrier(uint32_t mask, Location at) {
  meet("__syncwarp", mask, nullptr, at, [](void**, uint32_t named) {
    Block& block = *current->block;
    const uint32_t index = current->index / 32;
    Warp& warp = block.warps[index];
    if (!kChecked || named != block.thread_mask(index)) return;  // __syncwarp of a part orders nothing here
    warp.synced = ++now;
    for_each_lane(named, [&](uint32_t lane) { warp.acquired.learn(thread_of(lane).acquired); });
  });
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Location at) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s at %s: width %d is not a power of two up to 32", name, text_of(at).c_str(), width);
  }
  struct Lane {
    uint64_t in, out;
    Shuffle kind;
    int argument, width;
  } mine{value, value, kind, argument, width};
  meet(name, mask, &mine, at, [at](void** data, uint32_t named) {
    for_each_lane(named, [&](uint32_t lane) {
      auto& reader = *static_cast<Lane*>(data[lane]);
      const int source = source_lane(reader.kind, static_cast<int>(lane), reader.argument, reader.width);
      if (source < 0) return;
      if (!(named >> source & 1)) {
        fail("shuffle at %s: lane %u reads lane %d, which the mask %08x does not name", text_of(at).c_str(), lane,
             source, named);
      }
      reader.out = static_cast<Lane*>(data[source])->in;
    });
  });
  return mine.out;
}

uint32_t ballot(uint32_t mask, bool predicate, Location at) {
  struct Lane {
    bool in;
    uint32_t out;
  } mine{predicate, 0};
  meet("vote", mask, &mine, at, [](void** data, uint32_t named) {
    uint32_t bits = 0;
    for_each_lane(named, [&](uint32_t lane) { bits |= uint32_t{static_cast<Lane*>(data[lane])->in} << lane; });
    for_each_lane(named, [&](uint32_t lane) { static_cast<Lane*>(data[lane])->out = bits; });
  });
  return mine.out;
}

int64_t reduce(Reduce kind, uint32_t mask, int64_t value, Location at) {
  struct Lane {
    Reduce kind;
    int64_t in, out;
  } mine{kind, value, 0};
  meet("__reduce_sync", mask, &mine, at, [](void** data, uint32_t named) {
    bool first = true;
    int64_t result = 0;
    for_each_lane(named, [&](uint32_t lane) {
      const auto& l = *static_cast<Lane*>(data[lane]);
      if (first) {
        result = l.in;
      } else if (l.kind == Reduce::add) {
        result += l.in;
      } else {
        result = l.kind == Reduce::min ? std::min(result, l.in) : std::max(result, l.in);
      }
      first = false;
    });
    for_each_lane(named, [&](uint32_t lane) { static_cast<Lane*>(data[lane])->out = result; });
  });
  return mine.out;
}

void mma_m16n8k16(bool half, float* d, const uint32_t* a, const uint32_t* b, const float* c, Location at) {
  struct Lane {
    bool half;
    float* d;
    const uint32_t *a, *b;
    const float* c;
  } mine{half, d, a, b, c};
  meet("mma_m16n8k16", ~0u, &mine, at, [](void** data, uint32_t) {
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& l = *static_cast<Lane*>(data[lane]);
      const int row = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        left[row + i % 2 * 8][column + i / 2 * 8] = to_float(l.a[i] & 0xffff, l.half);
        left[row + i % 2 * 8][column + i / 2 * 8 + 1] = to_float(l.a[i] >> 16, l.half);
        sum[row + i / 2 * 8][column + i % 2] = l.c[i];
      }
      for (int i = 0; i < 2; ++i) {
        right[column + i * 8][row] = to_float(l.b[i] & 0xffff, l.half);
        right[column + i * 8 + 1][row] = to_float(l.b[i] >> 16, l.half);
      }
    }
    for (auto& row : sum) {
      const float* factors = left[&row - sum];
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) row[n] += factors[k] * right[k][n];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& l = *static_cast<Lane*>(data[lane]);
      for (int i = 0; i < 4; ++i) l.d[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  });
}

void ldmatrix(int count, bool transposed, uint32_t* r, const void* row, Location at) {
  struct Lane {
    int count;
    bool transposed;
    uint32_t* r;
    const void* row;
  } mine{count, transposed, r, row};
  meet("ldmatrix", ~0u, &mine, at, [at](void** data, uint32_t) {
    const Lane first = *static_cast<Lane*>(data[0]);
    uint16_t matrix[4][8][8];
    for (int i = 0; i < first.count * 8; ++i) {
      const void* source = static_cast<Lane*>(data[i])->row;
      read_row(source, static_cast<uint32_t>(i), at);
      std::memcpy(matrix[i / 8][i % 8], source, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int m = 0; m < first.count; ++m) {
        const auto& x = matrix[m];
        static_cast<Lane*>(data[lane])->r[m] = first.transposed ? x[j][i] | static_cast<uint32_t>(x[j + 1][i]) << 16
                                                                : x[i][j] | static_cast<uint32_t>(x[i][j + 1]) << 16;
      }
    }
  });
}

// --- asynchronous copies ----------------------------------------------------------------------------------------

static void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  if (copy.read) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

void copy_async(void* to, const void* from, bool read, Location at) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("cp_async at %s: not aligned to 16 bytes", text_of(at).c_str());
  }
  if (kChecked) {
    if (read) check(from, 16, Access::read, *current, nullptr, &at);
    check(to, 16, Access::copy_issued, *current, nullptr, &at);
  }
  current->copies.push_back({to, from, read, false, at});
  if (settings.copy_async == CopyAsync::eager || (settings.copy_async == CopyAsync::random && random_number() % 2)) {
    land(current->copies.back());
  }
}

void copy_commit() { current->groups.push_back(current->copies.size()); }

void copy_wait(size_t pending) {
  auto& groups = current->groups;
  auto& copies = current->copies;
  if (groups.size() <= pending) return;
  const size_t finished = groups.size() - pending, count = groups[finished - 1];
  for (size_t i = 0; i < count; ++i) {
    Copy& copy = copies[i];
    land(copy);
    if (!kChecked) continue;
    if (copy.read) check(copy.from, 16, Access::read, *current, nullptr, &copy.at);  // it may have been read this late
    check(copy.to, 16, Access::copy_landed, *current, nullptr, &copy.at);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(count));
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(finished));
  for (size_t& end : groups) end -= count;
}

}  // namespace emulator
