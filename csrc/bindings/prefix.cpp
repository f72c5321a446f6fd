// The part of kvmem._core.Allocator that is about shared content; and TokenBlocks, which its index keeps token ids in:
// bound by itself so that what it promises can be tested without a cache.

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
namespace {

using Free = nb::call_guard<WithoutGil>;

// What stands for None is the empty key, which sequences have that were opened without any.
std::string none_is_empty(const char* encoded, std::size_t bytes) {
  return bytes > 0 && encoded[0] == 'n' ? std::string() : std::string(encoded, bytes);
}

// `extra_key`: the adapter's key, then what else of the prompt is keyed (kvmem.allocator.prefix.encode_keys).
PrefixKey key_of(const nb::bytes& salt, const nb::bytes& extra_key) {
  const char* const given = extra_key.c_str();
  const std::size_t bytes = extra_key.size(), adapter = bytes == 0 ? 0 : key_bytes(given, bytes);
  return {none_is_empty(salt.c_str(), salt.size()), none_is_empty(given, adapter),
          decode_marks(given + adapter, bytes - adapter)};
}

// It could not be computed to its end: said before anything is opened for it.
void check_prompt(const Allocator& c, i64 n) {
  const GroupGeometry& group = c.groups()[c.groups().token_group()];
  if (group.growth != Growth::token || n <= group.max_tokens) return;
  throw SpecError("tokens: got a prompt of " + std::to_string(n) + "; a sequence can hold " +
                  std::to_string(group.max_tokens) +
                  " (max_tokens): cut the prompt, or make the allocator with a larger max_tokens");
}

// In the order of MatchEnd.
const char* const kEnds[] = {"complete",      "shorter than a block", "other salt", "evicted",    "no snapshot",
                             "window passed", "never seen",           "off",        "block sizes"};

}  // namespace

void bind_prefix_options(nb::module_& m) {
  nb::class_<PrefixOptions>(m, "PrefixOptions", "What kvmem.Allocator says about prefix sharing.")
      .def(
          "__init__",
          [](PrefixOptions* self, bool on, bool partial, std::string policy, int hash_bits, i64 event_capacity) {
            new (self) PrefixOptions{on, partial, std::move(policy), hash_bits, event_capacity};
          },
          nb::kw_only(), "on"_a, "partial"_a, "policy"_a, "hash_bits"_a = 64, "event_capacity"_a = 0);
}

void bind_token_blocks(nb::module_& m) {
  m.def(
      "keyed_hash",
      [](std::uint64_t first, std::uint64_t second, const nb::bytes& bytes) {
        return KeyedHash(first, second)(std::string(bytes.c_str(), bytes.size()));
      },
      "first"_a, "second"_a, "bytes"_a, "What salts are found by; see csrc/base/keyed_hash.h.");
  const auto check = [](const TokenBlocks& blocks, i32 block, size_t count, i64 least) {
    const i64 n = static_cast<i64>(count);
    if (block < 0 || block >= blocks.blocks() || n < least || n > blocks.block_tokens()) {
      throw SpecError("got " + std::to_string(n) + " tokens of block " + std::to_string(block) + "; there are " +
                      std::to_string(blocks.blocks()) + " blocks of " + std::to_string(blocks.block_tokens()));
    }
  };
  nb::class_<TokenBlocks>(m, "TokenBlocks", "Blocks of token ids, packed; see csrc/index/token_blocks.h.")
      .def(nb::init<i64>(), "block_tokens"_a)
      .def("reserve", &TokenBlocks::reserve, "blocks"_a)
      .def(
          "put",
          [check](TokenBlocks& self, i32 block, const Int32s& tokens) {
            check(self, block, tokens.size(), self.block_tokens());
            self.put(block, tokens.data());
          },
          "block"_a, "tokens"_a.noconvert())
      .def(
          "common",
          [check](const TokenBlocks& self, i32 block, const Int32s& tokens) {
            check(self, block, tokens.size(), 0);
            return self.common(block, tokens.data(), tokens.size());
          },
          "block"_a, "tokens"_a.noconvert(), "How many of these tokens the block begins with.")
      .def(
          "copy",
          [check](const TokenBlocks& self, i32 block, Out<i32> out) {
            check(self, block, out.shape(0), 0);
            self.copy(block, static_cast<i64>(out.shape(0)), out.data());
          },
          "block"_a, "out"_a.noconvert(), "Fills `out` with the first ids of the block.")
      .def_prop_ro("bits", &TokenBlocks::bits, "Of one id.");
}

void bind_prefix(nb::class_<Allocator>& cache) {
  cache
      .def(
          "admit",
          [](Allocator& c, const TokenIds& tokens, const nb::bytes& salt, const nb::bytes& extra_key,
             nb::handle sequence) {
            check_prompt(c, tokens.size());
            if (c.shares()) check_ids(tokens);  // else they are not read at all
            const PrefixKey key = key_of(salt, extra_key);
            i64 cached = 0, handle = 0;
            {
              const WithoutGil free;
              handle = c.admit(tokens.data(), tokens.size(), key, &cached);
            }
            keep_in(sequence, "_id", handle), keep_in(sequence, "num_cached_tokens", cached);
            return std::make_pair(handle, cached);
          },
          "tokens"_a.noconvert(), "salt"_a, "extra_key"_a, "sequence"_a = nb::none(),
          "A new sequence: its handle, and how many tokens it has; also told to the object that stands for it.")
      .def(
          "begin",
          [](Allocator& c, const TokenIds& tokens, const nb::bytes& salt, const nb::bytes& extra_key, i64 count,
             nb::handle sequence) {
            check_prompt(c, tokens.size());
            if (c.shares()) check_ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            i64 cached = 0, handle = 0;
            {
              const WithoutGil free;
              handle = c.begin(tokens.data(), tokens.size(), key, count, &cached);
            }
            keep_in(sequence, "_id", handle), keep_in(sequence, "num_cached_tokens", cached);
            return std::make_pair(handle, cached);
          },
          "tokens"_a.noconvert(), "salt"_a, "extra_key"_a, "count"_a, "sequence"_a = nb::none(),
          "admit() with room for `count` more tokens, or (-1) for the rest of them; else OutOfMemory.")
      .def(
          "admit_batch",
          [](Allocator& c, const TokenIds& tokens, const std::optional<Int32s>& counts, const nb::bytes& salt,
             const nb::bytes& extra_key, const WritableInt32s& handles, const WritableInt32s& cached) {
            if (c.shares()) check_ids(tokens);
            if (counts) check_tokens(*counts, tokens);
            const i32 all = to_int32(tokens.size(), "tokens");
            const i32* lengths = counts ? counts->data() : &all;
            const i64 n = counts ? counts->size() : 1;
            if (handles.size() < n || cached.size() < n)
              throw SpecError("handles and cached need an entry for each prompt");
            const PrefixKey key = key_of(salt, extra_key);
            std::vector<i32> opened(n, -1), found(n);
            handles.write(opened.data(), n);  // none yet, for whoever is interrupted
            i64 done = 0;
            {
              const WithoutGil free;
              done = c.admit_batch(tokens.data(), lengths, n, key, opened.data(), found.data());
            }
            handles.write(opened.data(), done);
            cached.write(found.data(), done);
            return done;
          },
          "tokens"_a.noconvert(), "counts"_a.noconvert().none(), "salt"_a, "extra_key"_a, "handles"_a.noconvert(),
          "cached"_a.noconvert(), "How many prompts got room.")
      .def(
          "match",
          [](Allocator& c, const TokenIds& tokens, const nb::bytes& salt, const nb::bytes& extra_key) {
            check_ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            const WithoutGil free;
            const Match match = c.match(tokens.data(), tokens.size(), key);
            return std::make_pair(match.tokens, std::string(kEnds[static_cast<int>(match.end)]));
          },
          "tokens"_a.noconvert(), "salt"_a, "extra_key"_a, "How many tokens are cached, and why not more.")
      .def(
          "commit_tokens",
          [](Allocator& c, i32 handle, const TokenIds& tokens) {
            check_ids(tokens);
            const i32 count = to_int32(tokens.size(), "tokens");
            if (c.commit_at_hand(handle, count, tokens.data())) return;
            const WithoutGil free;
            c.commit(&handle, &count, 1, -1, tokens.data());
          },
          "handle"_a, "tokens"_a.noconvert())
      .def(
          "commit_tokens_batch",
          [](Allocator& c, const Int32s& handles, const Int32s& counts, const Int32s& tokens) {
            same_length(handles, counts);
            check_tokens(counts, tokens);
            check_ids(tokens);
            const WithoutGil free;
            c.commit(handles.data(), counts.data(), handles.size(), -1, tokens.data());
          },
          "handles"_a.noconvert(), "counts"_a.noconvert(), "tokens"_a.noconvert())
      .def(
          "pin",
          [](Allocator& c, i64 handle, i64 tokens, nb::handle kept) {
            Pins::Pinned made{};
            {
              const WithoutGil free;
              made = c.pin(handle, tokens);
            }
            keep_in(kept, "_id", made.pin), keep_in(kept, "num_tokens", made.tokens);
            return std::make_pair(made.pin, made.tokens);
          },
          "handle"_a, "tokens"_a, "pin"_a = nb::none(),
          "The first tokens of a sequence (-1: all known): a pin, and how many it keeps.")
      .def(
          "pin_tokens",
          [](Allocator& c, const TokenIds& tokens, const nb::bytes& salt, const nb::bytes& extra_key, nb::handle kept) {
            check_ids(tokens);
            const PrefixKey key = key_of(salt, extra_key);
            Pins::Pinned made{};
            {
              const WithoutGil free;
              made = c.pin(tokens.data(), tokens.size(), key);
            }
            keep_in(kept, "_id", made.pin), keep_in(kept, "num_tokens", made.tokens);
            return std::make_pair(made.pin, made.tokens);
          },
          "tokens"_a.noconvert(), "salt"_a, "extra_key"_a, "pin"_a = nb::none())
      .def(
          "pins",
          [](Allocator& c) {
            std::vector<std::pair<i64, i64>> found;
            for (const Pins::Pinned& p : c.pins()) found.emplace_back(p.pin, p.tokens);
            return found;
          },
          "Every pin that keeps something, and how many tokens it keeps; in the order in which they were made.")
      .def("unpin", &Allocator::unpin, "pin"_a, Free())
      .def("snapshot", &Allocator::snapshot, "handle"_a, Free())
      .def("retain", &Allocator::retain, "handle"_a, "start"_a, "end"_a, "priority"_a, "seconds"_a, Free())
      .def(
          "retained",
          [](Allocator& c, i64 handle) {
            std::vector<std::tuple<i64, i64, int, double>> ranges;
            for (const Retention& r : c.retained(handle)) {
              ranges.emplace_back(r.first, r.end, r.priority, r.seconds);
            }
            return ranges;
          },
          "handle"_a, "What holds of which blocks: (first, end, priority, seconds), ascending, no block twice.")
      .def("clear_cache", &Allocator::clear_cache, Free())
      .def(
          "drain_events",
          [](Allocator& c, i64 taken, i64 max, bool restart) {
            std::shared_ptr<EventBatch> batch;
            {
              const WithoutGil free;
              batch = c.drain_events(taken, max, restart);
            }
            nb::dict roots;
            for (const auto& [number, key] : batch->roots) {
              roots[nb::int_(number)] = nb::make_tuple(nb::bytes(key.salt.data(), key.salt.size()),
                                                       nb::bytes(key.extra_key.data(), key.extra_key.size()));
            }
            return nb::make_tuple(batch->number, std::shared_ptr<EventRecords>(batch, &batch->records), roots);
          },
          "taken"_a, "max"_a, "restart"_a,
          nb::sig("def drain_events(self, taken: int, max: int, restart: bool) -> tuple[int, EventRecords, dict[int, "
                  "tuple[bytes, bytes]]]"),
          "The number of a batch, its records, and the (salt, extra key) of the roots that they name. The batch after "
          "number ``taken``: given again until a call says that it was taken.");
}

}  // namespace kvmem
