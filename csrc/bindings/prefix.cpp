// The calls of kvmem._core.Allocator about cached content; and TokenBlocks, in which the content index stores token
// ids, for tests without an allocator.

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "allocator/allocator.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {}  // namespace

nb::tuple to_python(const std::function<std::shared_ptr<EventBatch>()>& drain) {
  std::shared_ptr<EventBatch> batch;
  {
    const WithoutGil free;
    batch = drain();
  }
  nb::dict roots;
  for (const auto& [number, key] : batch->roots) {
    roots[nb::int_(number)] = nb::make_tuple(nb::bytes(key.salt.data(), key.salt.size()),
                                             nb::bytes(key.extra_key.data(), key.extra_key.size()));
  }
  return nb::make_tuple(batch->number, std::shared_ptr<EventRecords>(batch, &batch->records), roots);
}

namespace {

// Returns the key, and the empty key for None, because sequences opened without a key have the empty one.
std::string none_is_empty(const char* encoded, std::size_t bytes) {
  return bytes > 0 && encoded[0] == 'n' ? std::string() : std::string(encoded, bytes);
}

}  // namespace

PrefixKey key_of(const nb::bytes& salt, const nb::bytes& extra_key) {
  const char* const given = extra_key.c_str();
  const std::size_t bytes = extra_key.size(), adapter = bytes == 0 ? 0 : key_bytes(given, bytes);
  return {none_is_empty(salt.c_str(), salt.size()), none_is_empty(given, adapter),
          decode_marks(given + adapter, bytes - adapter)};
}

namespace {

// Throws SpecError for a prompt that is longer than a sequence can be.
void check_prompt(const Allocator& c, i64 n) {
  const GroupGeometry& group = c.groups()[c.groups().token_group()];
  if (group.growth != Growth::token || n <= group.max_tokens) return;
  throw SpecError("tokens: got a prompt of " + std::to_string(n) + "; a sequence can hold " +
                  std::to_string(group.max_tokens) +
                  " (max_tokens): cut the prompt, or make the allocator with a larger max_tokens");
}

// Returns what a call has made and how many tokens it has, and stores both in the object that stands for it.
std::pair<i64, i64> stored(nb::handle object, i64 id, const char* count, i64 tokens) {
  store_in(object, "_id", id), store_in(object, count, tokens);
  return {id, tokens};
}

// Opens a sequence with open(ids, key, &cached), which returns its handle.
template <class Open>
std::pair<i64, i64> open_with(Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key,
                              nb::handle sequence, const Open& open) {
  const TokenIds ids(tokens, false, a.shares());
  check_prompt(a, ids.size());
  i64 cached = 0;
  const i64 handle = open(ids, key_of(salt, extra_key), &cached);
  return stored(sequence, handle, "num_cached_tokens", cached);
}

// The values of MatchEnd have these names, in order.
const char* const kEnds[] = {"complete",      "shorter than a block", "other salt", "evicted",    "no snapshot",
                             "window passed", "never seen",           "off",        "block sizes"};

}  // namespace

void bind_prefix_options(nb::module_& m) {
  nb::class_<PrefixOptions>(m, "PrefixOptions")
      .def("__init__", &construct<PrefixOptions, bool, bool, bool, std::string, int, i64, i64>, nb::kw_only(), "on"_a,
           "partial"_a, "append_only"_a, "policy"_a, "hash_bits"_a = 64, "event_capacity"_a = 0, "move_capacity"_a = 0);
}

void bind_token_blocks(nb::module_& m) {
  m.def(
      "keyed_hash",
      [](std::uint64_t first, std::uint64_t second, const nb::bytes& bytes) {
        return KeyedHash(first, second)(std::string(bytes.c_str(), bytes.size()));
      },
      "first"_a, "second"_a, "bytes"_a);
  const auto check = [](const TokenBlocks& blocks, i32 block, size_t count, i64 least) {
    const i64 n = static_cast<i64>(count);
    if (block < 0 || block >= blocks.blocks() || n < least || n > blocks.block_tokens()) {
      throw SpecError("got " + std::to_string(n) + " tokens of block " + std::to_string(block) + "; there are " +
                      std::to_string(blocks.blocks()) + " blocks of " + std::to_string(blocks.block_tokens()));
    }
  };
  nb::class_<TokenBlocks>(m, "TokenBlocks")
      .def(nb::init<i64>(), "block_tokens"_a)
      .def("reserve", &TokenBlocks::reserve, "blocks"_a)
      .def(
          "put",
          [check](TokenBlocks& self, i32 block, nb::handle given) {
            const Counts tokens("tokens", given);
            check(self, block, tokens.size(), self.block_tokens());
            self.put(block, tokens.data());
          },
          "block"_a, "tokens"_a)
      .def(
          "common",
          [check](const TokenBlocks& self, i32 block, nb::handle given) {
            const Counts tokens("tokens", given);
            check(self, block, tokens.size(), 0);
            return self.common(block, tokens.data(), tokens.size());
          },
          "block"_a, "tokens"_a)
      .def(
          "copy",
          [check](const TokenBlocks& self, i32 block, Out<i32> out) {
            check(self, block, out.shape(0), 0);
            self.copy(block, static_cast<i64>(out.shape(0)), out.data());
          },
          "block"_a, "out"_a.noconvert())
      .def_prop_ro("bits", &TokenBlocks::bits);
}

void bind_prefix(nb::class_<Allocator>& allocator) {
  allocator
      .def(
          "admit",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key, nb::handle sequence) {
            return open_with(a, tokens, salt, extra_key, sequence,
                             [&](const TokenIds& ids, const PrefixKey& key, i64* cached) {
                               return a.admit(ids.data(), ids.size(), key, cached);
                             });
          },
          "tokens"_a.none(), "salt"_a, "extra_key"_a, "sequence"_a = nb::none())
      .def(
          "begin",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key, i64 count,
             nb::handle sequence) {
            return open_with(a, tokens, salt, extra_key, sequence,
                             [&](const TokenIds& ids, const PrefixKey& key, i64* cached) {
                               return a.begin(ids.data(), ids.size(), key, count, cached);
                             });
          },
          "tokens"_a.none(), "salt"_a, "extra_key"_a, "count"_a, "sequence"_a = nb::none())
      .def(
          "admit_batch",
          [](Allocator& a, nb::handle tokens, nb::handle counts, const nb::bytes& salt, const nb::bytes& extra_key,
             const WritableInt32s& handles, const WritableInt32s& cached) {
            const TokenIds ids(tokens, false, a.shares());
            const Counts lengths("counts", counts, true);
            if (lengths) check_tokens(lengths, ids);
            const i32 all = static_cast<i32>(ids.size());
            const i64 n = lengths ? lengths.size() : 1;
            if (handles.size() < n || cached.size() < n) {
              throw SpecError("handles and cached need an entry for each prompt");
            }
            std::vector<i32> opened(n, -1), found(n);
            handles.write(opened.data(), n);  // -1, for a caller that is interrupted
            const i64 done = a.admit_batch(ids.data(), lengths ? lengths.data() : &all, n, key_of(salt, extra_key),
                                           opened.data(), found.data());
            handles.write(opened.data(), done);
            cached.write(found.data(), done);
            return done;
          },
          "tokens"_a.none(), "counts"_a.none(), "salt"_a, "extra_key"_a, "handles"_a.noconvert(),
          "cached"_a.noconvert())
      .def(
          "match",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key) {
            const TokenIds ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            const WithoutGil free;
            const Match match = a.match(ids.data(), ids.size(), key);
            return std::make_pair(match.tokens, std::string(kEnds[static_cast<int>(match.end)]));
          },
          "tokens"_a.none(), "salt"_a, "extra_key"_a)
      .def(
          "pin",
          [](Allocator& a, i64 handle, i64 tokens, nb::handle pin) {
            const Pins::Pinned made = a.pin(handle, tokens);
            return stored(pin, made.pin, "num_tokens", made.tokens);
          },
          "handle"_a, "tokens"_a, "pin"_a = nb::none())
      .def(
          "pin_tokens",
          [](Allocator& a, nb::handle tokens, const nb::bytes& salt, const nb::bytes& extra_key, nb::handle pin) {
            const TokenIds ids(tokens);
            const Pins::Pinned made = a.pin(ids.data(), ids.size(), key_of(salt, extra_key));
            return stored(pin, made.pin, "num_tokens", made.tokens);
          },
          "tokens"_a.none(), "salt"_a, "extra_key"_a, "pin"_a = nb::none())
      .def("pins",
           [](Allocator& a) {
             std::vector<std::pair<i64, i64>> found;
             for (const Pins::Pinned& p : a.pins()) found.emplace_back(p.pin, p.tokens);
             return found;
           })
      .def("unpin", &Allocator::unpin, "pin"_a)
      .def("snapshot", &Allocator::snapshot, "handle"_a)
      .def("retain", &Allocator::retain, "handle"_a, "start"_a, "end"_a, "priority"_a, "seconds"_a)
      .def(
          "retained",
          [](Allocator& c, i64 handle) {
            std::vector<std::tuple<i64, i64, int, double>> ranges;
            for (const Retention& r : c.retained(handle)) {
              ranges.emplace_back(r.first, r.end, r.priority, r.seconds);
            }
            return ranges;
          },
          "handle"_a)
      .def("clear_cache", &Allocator::clear_cache)
      .def(
          "drain_events",
          [](Allocator& c, i64 taken, i64 max, bool restart) {
            return to_python([&] { return c.drain_events(taken, max, restart); });
          },
          "taken"_a, "max"_a, "restart"_a,
          nb::sig("def drain_events(self, taken: int, max: int, restart: bool) -> tuple[int, EventRecords, dict[int, "
                  "tuple[bytes, bytes]]]"));
}

}  // namespace kvmem
