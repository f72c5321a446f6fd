// A world's operations on sequences: they come, grow, fork and go.

#include <algorithm>

#include "soak_world.h"

namespace kvmem_soak {

using namespace kvmem;

namespace {

std::string text(i64 value) { return std::to_string(value); }

}  // namespace

void World::open(Random& random) {
  const i64 count = random.between(1, 2), room = params_.max_sequences - static_cast<i64>(side_->live.size());
  std::vector<i32> handles(count);
  note(text(count));
  if (call(random, false, [&] { side_->cache->open(count, handles.data()); }) != Outcome::done) {
    if (room >= count && !driver_) throw Failure("refusal: open() with places left");
    return after_refusal(random, Outcome::short_of_memory);
  }
  for (i32 handle : handles) side_->add(handle, 0);
}

void World::admit(Random& random) {
  const std::vector<i32> ids = prompt(random);
  const i64 key = any_key(random), n = static_cast<i64>(ids.size());
  const i64 foretold = side_->cache->match(ids.data(), n, key_of(key)).tokens;
  i64 cached = 0, handle = 0;
  note(text(n) + " tokens, key " + text(key) + ", " + text(foretold) + " cached");
  const bool full = static_cast<i64>(side_->live.size()) == params_.max_sequences, spare = has_memory_to_spare();
  const Outcome outcome =
      call(random, false, [&] { handle = side_->cache->admit(ids.data(), n, key_of(key), &cached); });
  if (outcome != Outcome::done) {
    if (!full && outcome == Outcome::short_of_memory && !driver_) throw Failure("refusal: admit() with places left");
    return after_refusal(random, Outcome::short_of_memory);
  }
  if (cached > foretold || (spare && cached < foretold)) {
    throw Failure("match: it says " + text(foretold) + " tokens, admit() finds " + text(cached));
  }
  admitted(random, static_cast<i32>(handle), key, ids, cached, foretold);
}

void World::admitted(Random& random, i32 handle, i64 key, const std::vector<i32>& ids, i64 cached, i64) {
  Live& l = side_->add(handle, key);
  side_->take_cached(l, ids, cached);
  progress_.hits += cached > 0;
  side_->follow();
  side_->verify(l);
  if (random.one_in(2) && !ids.empty()) return;
  // What follows the prompt may be what followed it before.
  const std::vector<i32>& other = random.pick(prompts_);
  if (other.size() > ids.size() && std::equal(ids.begin(), ids.end(), other.begin())) l.script = other;
}

void World::admit_batch(Random& random) {
  const i64 n = random.between(1, 4), key = any_key(random);
  std::vector<std::vector<i32>> prompts;
  std::vector<i32> tokens, counts, handles(n), cached(n);
  for (i64 i = 0; i < n; ++i) {
    prompts.push_back(prompt(random));
    tokens.insert(tokens.end(), prompts.back().begin(), prompts.back().end());
    counts.push_back(static_cast<i32>(prompts.back().size()));
    note(text(counts.back()));
  }
  i64 done = 0;
  const Outcome outcome = call(random, false, [&] {
    done = side_->cache->admit_batch(tokens.data(), counts.data(), n, key_of(key), handles.data(), cached.data());
  });
  if (outcome != Outcome::done) return;
  note("done " + text(done));
  for (i64 i = 0; i < done; ++i) {
    Live& l = side_->add(handles[i], key);
    side_->take_cached(l, prompts[i], cached[i]);
    side_->follow();
    side_->write_next(l, counts[i] - cached[i], random);
    side_->verify(l);
    progress_.hits += cached[i] > 0;
  }
  // One that there was no room for was looked up all the same today; it is no admission.
  if (done < n) after_refusal(random, Outcome::short_of_memory);
}

void World::extend(Random& random) {
  Live* l = any(random);
  if (!l) return;
  const i32 count = static_cast<i32>(draw_count(random, *l));
  note(text(l->handle) + " by " + text(count));
  const Outcome outcome = call(random, false, [&] { side_->cache->extend(&l->handle, &count, 1, -1); });
  if (outcome != Outcome::done) return after_refusal(random, outcome);
  side_->follow();
  side_->write_next(*l, count, random);
  side_->verify_lengths(*l);
}

void World::extend_one(Random& random) {
  Live* l = any(random);
  if (!l) return;
  const i64 count = draw_count(random, *l);
  note(text(l->handle) + " by " + text(count));
  const Outcome outcome = call(random, false, [&] { side_->cache->extend(l->handle, count, -1); });
  if (outcome != Outcome::done) return after_refusal(random, outcome);
  side_->follow();
  side_->write_next(*l, count, random);
}

// Now and then with a member that makes it fail, anywhere among the others.
void World::extend_batch(Random& random) {
  const std::vector<Live*> rows = some(random);
  std::vector<i32> handles, counts;
  for (Live* l : rows) {
    handles.push_back(l->handle);
    counts.push_back(static_cast<i32>(draw_count(random, *l)));
    note(text(l->handle) + "+" + text(counts.back()));
  }
  bool bad = false;
  if (!rows.empty() && random.one_in(4)) {
    const i64 at = random.below(static_cast<i64>(rows.size()));
    bad = true;
    if (random.one_in(3)) {
      counts[at] = static_cast<i32>(params_.max_tokens - rows[at]->tokens() + 1);
    } else if (random.one_in(2)) {
      counts[at] = -1;
    } else {
      handles.push_back(handles[at]), counts.push_back(0);
    }
    note("(bad)");
  }
  const i64 n = static_cast<i64>(handles.size());
  const Outcome outcome = call(random, bad, [&] { side_->cache->extend(handles.data(), counts.data(), n, -1); });
  if (bad && outcome == Outcome::done) throw Failure("refusal: a bad extend() of a batch was taken");
  if (outcome != Outcome::done) return after_refusal(random, outcome);
  side_->follow();
  for (i64 i = 0; i < n; ++i) side_->write_next(*rows[i], counts[i], random);
  for (Live* l : rows) side_->verify(*l);
}

void World::check_batch(const std::vector<Live*>& rows, const std::vector<i32>& counts) {
  const i64 g = side_->token_group(), block = side_->block_tokens();
  std::size_t slot = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Live& l = *rows[i];
    const Placement at = side_->cache->place(l.handle, g);
    const auto entry = [&at](i64 ordinal) { return at.blocks ? at.blocks[ordinal] : at.first_block + ordinal; };
    if (lengths_[i] != l.tokens()) throw Failure("batch: seq_lens");
    for (i64 b = 0; b < out_.max_blocks; ++b) {
      const bool there = b >= l.fronts[g] / block && b < ceil_div(l.tokens(), block);
      const i64 is = table_[i * static_cast<std::size_t>(out_.max_blocks) + static_cast<std::size_t>(b)];
      if (is != (there ? entry(b) : 0)) throw Failure("batch: block_table");
    }
    for (i64 token = l.tokens() - counts[i]; token < l.tokens(); ++token, ++slot) {
      if (slots_[slot] != entry(token / block) * block + token % block) throw Failure("batch: slot_mapping");
    }
  }
}

void World::step_batch(Random& random) {
  const std::vector<Live*> rows = some(random);
  std::vector<i32> handles, counts, ids;
  bool told = !random.one_in(6);
  for (Live* l : rows) told = told && side_->can_tell(*l, l->due());
  for (Live* l : rows) {
    handles.push_back(l->handle);
    counts.push_back(static_cast<i32>(random.one_in(4) ? draw_count(random, *l)
                                                       : std::min<i64>(1, params_.max_tokens - l->tokens())));
    const std::vector<i32> due = side_->changed_ids(*l, l->due());
    ids.insert(ids.end(), due.begin(), due.end());
    note(text(l->handle) + "+" + text(counts.back()));
    side_->answer_for_state(*l, l->tokens());
  }
  if (told) note("told");
  const i64 n = static_cast<i64>(rows.size());
  const i64 padded = random.one_in(4) ? random.between(n, params_.max_sequences) : 0;
  const Outcome outcome = call(random, false, [&] {
    GroupBuffers group{side_->token_group(), &out_, marks_.get(), {}};
    side_->cache->step(handles.data(), counts.data(), n, told ? ids.data() : nullptr,
                       told ? static_cast<i64>(ids.size()) : 0, padded, &group, 1);
  });
  if (outcome != Outcome::done) return after_refusal(random, outcome);
  side_->follow();
  for (i64 i = 0; i < n; ++i) {
    side_->note_committed(*rows[i], rows[i]->due(), told);
    side_->write_next(*rows[i], counts[i], random);
  }
  for (Live* l : rows) side_->verify(*l);
  check_batch(rows, counts);
}

void World::advance(Random& random) {
  Live* l = any(random);
  if (!l) return;
  const i64 count = draw_count(random, *l), due = l->due();
  const bool told = side_->can_tell(*l, due) && !random.one_in(6);
  const std::vector<i32> ids = side_->changed_ids(*l, due);
  side_->answer_for_state(*l, l->tokens());
  note(text(l->handle) + " commits " + text(due) + (told ? " told" : "") + ", by " + text(count));
  kvmem::TableChanges changes;
  kvmem::TableChanges* const asked = random.one_in(2) ? &changes : nullptr;
  const Outcome outcome = call(
      random, false, [&] { side_->cache->step(l->handle, count, told ? ids.data() : nullptr, told ? due : 0, asked); });
  if (outcome != Outcome::done) return after_refusal(random, outcome);
  side_->follow();
  side_->note_committed(*l, due, told);
  side_->write_next(*l, count, random);
  side_->verify(*l);
}

void World::committed(Live& l, i64 count, bool told) {
  side_->follow();
  side_->note_committed(l, count, told);
  side_->verify_lengths(l);
}

void World::commit(Random& random) {
  Live* l = any(random);
  if (!l) return;
  const i64 due = l->due();
  const i32 count = static_cast<i32>(random.one_in(3) ? random.below(due + 1) : due);
  const bool told = side_->can_tell(*l, count) && !random.one_in(12);
  const std::vector<i32> ids = side_->changed_ids(*l, count);
  side_->answer_for_state(*l, l->committed + count);
  note(text(l->handle) + " by " + text(count) + (told ? " told" : ""));
  const Outcome outcome = call(random, false, [&] {
    const i32* const known = told ? ids.data() : nullptr;
    if (random.one_in(4)) return side_->cache->commit(l->handle, count, -1, known);
    side_->cache->commit(&l->handle, &count, 1, -1, known);
  });
  if (outcome == Outcome::short_of_memory && !driver_) throw Failure("refusal: commit() is short of memory");
  if (outcome != Outcome::done) return;
  committed(*l, count, told);
  if (random.one_in(4)) side_->verify(*l);
  side_->verify_found(*l);
}

void World::commit_batch(Random& random) {
  const std::vector<Live*> rows = some(random);
  std::vector<i32> handles, counts, ids;
  bool told = !random.one_in(6);
  for (Live* l : rows) {
    handles.push_back(l->handle);
    counts.push_back(static_cast<i32>(random.one_in(3) ? random.below(l->due() + 1) : l->due()));
    told = told && side_->can_tell(*l, counts.back());
    const std::vector<i32> due = side_->changed_ids(*l, counts.back());
    ids.insert(ids.end(), due.begin(), due.end());
    side_->answer_for_state(*l, l->committed + counts.back());
    note(text(l->handle) + "+" + text(counts.back()));
  }
  if (told) note("told");
  const Outcome outcome = call(random, false, [&] {
    side_->cache->commit(handles.data(), counts.data(), static_cast<i64>(rows.size()), -1, told ? ids.data() : nullptr);
  });
  if (outcome != Outcome::done) return;
  for (std::size_t i = 0; i < rows.size(); ++i) committed(*rows[i], counts[i], told);
  for (Live* l : rows) side_->verify(*l);
}

void World::truncate(Random& random) {
  Live* l = any(random);
  if (!l) return;
  const i64 back = random.one_in(3) ? random.below(l->tokens() + 1)
                                    : random.below(std::min<i64>(l->tokens(), 2 * side_->block_tokens()) + 1);
  const i64 keep = l->tokens() - back;
  bool may_refuse = !side_->pins.empty();
  for (i64 g = 0; g < side_->groups(); ++g) {
    const i64 window = side_->geometry.groups[g].window_tokens, front = l->fronts[g];
    may_refuse = may_refuse || (front > 0 && keep - window + 1 < front);
  }
  note(text(l->handle) + " to " + text(keep));
  const Outcome outcome = call(random, may_refuse, [&] { side_->cache->truncate(l->handle, keep); });
  if (outcome == Outcome::short_of_memory && !driver_) throw Failure("refusal: truncate() is short of memory");
  if (outcome != Outcome::done) return;
  if (keep < l->known) side_->remember(*l);
  l->state_ahead = l->state_ahead || keep < l->tokens();
  l->cut = std::max(l->cut, l->tokens());
  l->ids.resize(keep), l->writers.resize(keep);
  l->committed = std::min(l->committed, keep), l->known = std::min(l->known, keep);
  l->script.clear(), l->script_at = 0;
  side_->follow();
  side_->verify(*l);
}

void World::fork(Random& random) {
  Live* parent = any(random);
  if (!parent) return;
  i64 child = 0;
  note(text(parent->handle));
  const Outcome outcome = call(random, false, [&] { child = side_->cache->fork(parent->handle); });
  if (outcome != Outcome::done) return after_refusal(random, Outcome::short_of_memory);
  note("as " + text(child));
  Live copy = *parent;
  copy.handle = static_cast<i32>(child), copy.cut = 0;
  copy.state_ahead = copy.state_ahead || copy.due() > 0;
  copy.ids.resize(copy.committed), copy.writers.resize(copy.committed);
  if (random.one_in(2)) copy.script.clear(), copy.script_at = 0;
  copy.script_at = std::min(copy.script_at, copy.script.size());
  side_->live.push_back(copy);
  side_->follow();
  side_->verify(side_->live.back());
}

void World::release(Random& random, Live& l) {
  note("frees " + text(l.handle));
  if (random.one_in(4)) side_->verify(l);
  side_->remember(l);
  if (random.one_in(4) && l.known > 0 && !prompts_.empty())
    prompts_[random.below(static_cast<i64>(prompts_.size()))].assign(l.ids.begin(), l.ids.begin() + l.known);
  const i32 handle = l.handle;
  if (call(random, false, [&] { side_->cache->free(&handle, 1); }) != Outcome::done) return;
  side_->remove(static_cast<std::size_t>(&l - side_->live.data()));
}

void World::free_one(Random& random) {
  if (Live* l = any(random)) release(random, *l);
}

void World::free_batch(Random& random) {
  const std::vector<Live*> rows = some(random);
  std::vector<i32> handles;
  for (Live* l : rows) handles.push_back(l->handle), side_->remember(*l), note(text(l->handle));
  const i64 n = static_cast<i64>(rows.size());
  if (call(random, false, [&] { side_->cache->free(handles.data(), n); }) != Outcome::done) return;
  for (i32 handle : handles) {
    const auto at =
        std::find_if(side_->live.begin(), side_->live.end(), [handle](const Live& l) { return l.handle == handle; });
    side_->remove(static_cast<std::size_t>(at - side_->live.begin()));
  }
}

}  // namespace kvmem_soak
