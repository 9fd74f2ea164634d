//! Cold pages leave dram: the hand goes round over all leaves of all regions.
//!
//! ```text
//! regions:  | leaf | leaf | leaf | leaf | ...      a page that was asked for cools down by half,
//!                      ^ hand                      one that is cold leaves
//! ```
//!
//! A page is compressed or written while its slot is held by a second token, with no lock; then the
//! place in the table is changed if it is still the same. So a page that is being sent or written
//! anew meanwhile is never torn.
//!
//! Pages that are to be kept in a slower tier leave as soon as they are cold, however much room there
//! is; those that are to be kept in dram leave when nothing else is left to move.

use std::collections::HashMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farmem_region::{PAGE_SIZE, PageIndex, SessionId};
use farmem_vmem::Slot;
use farmem_wire::{PAGES_PER_MESSAGE_MAX, Tier};

use super::pages::{HEAT_MAX, SPARE_SLOTS};
use super::{Engine, SharedSession, lock};
use crate::counters::count;
use crate::journal::Spot;
use crate::region::Region;
use crate::table::{self, Portion};
use crate::tiers::{Place, Stays};

/// Above this share of the memory, in 32nds, pages begin to leave it...
const FULL_32NDS: u64 = 30;
/// ...until it is down to this.
const ENOUGH_32NDS: u64 = 28;
/// With a file tier, compressed pages take at most this share of the memory, in 32nds.
const COMPRESSED_32NDS: u64 = 20;
/// Passes of the hand that find nothing to do before memory counts as not to be had: one more than
/// the hottest page needs to cool down.
const PASSES_MAX: u32 = 6;
/// Pages that are moved before the places in the table are changed, and their slots free.
const BATCH: usize = 64;
/// Slots that nobody else takes, at most: a batch compressed needs as many, for each of a few
/// threads.
const DEMOTION_SLOTS_MAX: u32 = 4 * BATCH as u32;
/// Slots that are left for reads, at most: the longest message for each of a few connections.
const READING_SLOTS_MAX: u32 = 4 * PAGES_PER_MESSAGE_MAX as u32;
/// Pages that are shared between leaves and have been moved, remembered at most.
const TWINS_MAX: usize = 1 << 16;
/// How long the keeper rests when nothing could be moved, and between passes for pages that are to
/// be kept in a slower tier: a page that was just written goes after two.
const REST: Duration = Duration::from_millis(20);
/// A pass for such pages is followed by a rest so many times longer than it took.
const REST_TIMES: u32 = 4;
/// After a pass that moved none of them the rest doubles, up to 64 times...
const REST_DOUBLINGS_MAX: u32 = 6;
/// ...and after so many passes, some 20 s, they stay until more is written.
const ORDER_PASSES_MAX: u32 = 20;
/// Passes of the hand that move nothing before pages that are to be kept in dram leave it.
const PASSES_BEFORE_PREFERRED: u32 = 2;

/// Where the hand is.
#[derive(Debug, Default)]
pub(super) struct Hand {
    session: SessionId,
    page: PageIndex,
    /// Passes that moved nothing, whoever made them.
    idle_rounds: u32,
}

/// What came of an attempt to make room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Demoted {
    pub(super) moved: usize,
    /// Whether as many passes moved nothing as it takes until memory counts as not to be had.
    pub(super) is_exhausted: bool,
}

/// What the keeper waits for, and what it remembers.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    hand: Mutex<Hand>,
    wanted: Mutex<Wanted>,
    woken: std::sync::Condvar,
    /// Threads that have a new place for pages, or write them to a disk: there will be room.
    movers: AtomicUsize,
    /// Since when nobody has found or made room, though somebody has tried.
    short_since: Mutex<Option<Instant>>,
    is_short: AtomicBool,
    /// Whether pages stay where they are as no move could be noted.
    lacks_journal: AtomicBool,
    /// Slots that copies share and that one of them has moved: the others follow to the same
    /// place. Each holds a token for the slot, so that its number means nothing else.
    twins: Mutex<HashMap<u32, (Slot, Place)>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    #[default]
    Nothing,
    /// Pages lie in a faster tier than they are to be kept in.
    Order,
    Room,
    Stop,
}

/// Where a cold page may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Compressed, or if it gains nothing by that, to the file.
    Down,
    Compressed,
    File,
}

/// What the hand takes.
#[derive(Debug, Clone, Copy)]
struct Grip {
    sinks_compressed: bool,
    /// Passes that moved nothing.
    idle_rounds: u32,
}

/// A cold page, held by a token of its own.
struct Cold {
    page: PageIndex,
    place: Place,
    /// Where it goes, once it is there.
    to: Option<Place>,
    way: Way,
    /// Whether it cannot be compressed.
    gains_nothing: bool,
    /// Whether it is the first one of its portion.
    is_first: bool,
}

/// Pages are on their way to a slower tier.
struct Mover<'a>(&'a AtomicUsize);

impl<'a> Mover<'a> {
    fn new(movers: &'a AtomicUsize) -> Self {
        movers.fetch_add(1, Ordering::Relaxed);
        Self(movers)
    }
}

impl Drop for Mover<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the hand found.
enum Step {
    Leaf(SharedSession, Vec<Cold>),
    /// It has come round, for the last time before memory counts as not to be had.
    Round {
        is_last: bool,
    },
}

impl Engine {
    /// Wakes the keeper if memory gets short.
    pub(super) fn note_pressure(&self) {
        if !self.tiers.has_slower() || u64::from(self.arena.taken()) <= self.slots_at(FULL_32NDS) {
            return;
        }
        self.wake_keeper(Wanted::Room);
    }

    /// Wakes the keeper if pages of a region may lie in a faster tier than they are to be kept in.
    pub(super) fn note_preference(&self, region: &Region) {
        if self.tiers.has_slower() && region.prefers.has_slower() {
            self.wake_keeper(Wanted::Order);
        }
    }

    fn wake_keeper(&self, why: Wanted) {
        let mut wanted = self.wanted();
        if *wanted == Wanted::Nothing || (*wanted == Wanted::Order && why == Wanted::Room) {
            *wanted = why;
            self.keeper.woken.notify_one();
        }
    }

    /// Keeps some memory free, on a thread of its own, until [`Engine::stop_keeping`].
    pub(crate) fn keep_room(&self) {
        loop {
            let mut wanted = self.wanted();
            while *wanted == Wanted::Nothing {
                wanted = self.keeper.woken.wait(wanted).unwrap_or_else(PoisonError::into_inner);
            }
            match *wanted {
                Wanted::Stop => return,
                Wanted::Order => {
                    drop(wanted);
                    self.keep_order();
                    continue;
                }
                Wanted::Nothing | Wanted::Room => {}
            }
            drop(wanted);
            let above = u64::from(self.arena.taken()).saturating_sub(self.slots_at(ENOUGH_32NDS));
            let moved = if above > 0 { self.demote(above as usize) } else { 0 };
            let mut wanted = self.wanted();
            if moved == 0 && *wanted == Wanted::Room {
                // What waits for order did not say so while room was wanted.
                *wanted = Wanted::Order;
                if above > 0 {
                    let rested = self.keeper.woken.wait_timeout(wanted, REST);
                    drop(rested.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// Moves pages to the tiers that they are to be kept in, pass by pass, until none is left that
    /// can be moved, or something else is wanted.
    fn keep_order(&self) {
        let mut idle_rounds = 0;
        while idle_rounds < ORDER_PASSES_MAX {
            let began = Instant::now();
            let is_over = || *self.wanted() != Wanted::Order;
            let Some(moved) = self.order_pass(&is_over) else {
                break;
            };
            idle_rounds = if moved == 0 { idle_rounds + 1 } else { 0 };
            let rest = REST * (1 << idle_rounds.min(REST_DOUBLINGS_MAX));
            let rest = rest.max(began.elapsed() * REST_TIMES);
            let wanted = self.wanted();
            if *wanted != Wanted::Order {
                return;
            }
            let (wanted, _) = self
                .keeper
                .woken
                .wait_timeout_while(wanted, rest, |wanted| *wanted == Wanted::Order)
                .unwrap_or_else(PoisonError::into_inner);
            if *wanted != Wanted::Order {
                return;
            }
        }
        let mut wanted = self.wanted();
        if *wanted == Wanted::Order {
            *wanted = Wanted::Nothing;
        }
    }

    /// Looks once at every page that has a preference for a slower tier. Returns how many were moved,
    /// or `None` if all lie where they are to be kept, or no move can be noted until [`Engine::go_on_moving`]. Ends
    /// before the next batch once `is_over` says so.
    fn order_pass(&self, is_over: &impl Fn() -> bool) -> Option<usize> {
        if self.check_journal().is_err() {
            self.keeper.lacks_journal.store(true, Ordering::Relaxed);
            return None;
        }
        let sessions: Vec<_> = self.sessions().by_id.values().cloned().collect();
        let (mut moved, mut in_place) = (0, true);
        for shared in sessions {
            let mut from = PageIndex::new(0);
            loop {
                if is_over() {
                    return Some(moved);
                }
                let mut cold = Vec::new();
                {
                    let session = lock(&shared);
                    if !session.region.prefers.has_slower() {
                        break;
                    }
                    let Some((first, leaf)) = session.region.table.leaf_from(from) else {
                        break;
                    };
                    from = PageIndex::new(first.get() + table::LEAF_PAGES as u64);
                    let mut leaf = table::lock(leaf);
                    leaf.portions.each(|pages, heat| {
                        let mut is_out_of_place = false;
                        for (at, portion) in pages {
                            let page = PageIndex::new(first.get() + *at as u64);
                            let way = self.preferred_way(&session.region, page, portion);
                            let Some(way) = way else { continue };
                            is_out_of_place = true;
                            if heat == 0 {
                                cold.push(self.hold(page, portion, way));
                            }
                        }
                        in_place &= !is_out_of_place;
                        if is_out_of_place { heat / 2 } else { heat }
                    });
                }
                while !cold.is_empty() && !is_over() {
                    let batch = cold.drain(..cold.len().min(BATCH)).collect();
                    moved += self.move_out(&shared, batch);
                }
                self.let_go(cold);
            }
        }
        (!in_place).then_some(moved)
    }

    /// A cold page, held while it moves.
    fn hold(&self, page: PageIndex, portion: &Portion, way: Way) -> Cold {
        let place = self.tiers.share(&portion.place);
        Cold { page, place, to: None, way, gains_nothing: false, is_first: true }
    }

    /// How a page goes to the tier that it is to be kept in, unless it lies there or lower.
    fn preferred_way(&self, region: &Region, page: PageIndex, portion: &Portion) -> Option<Way> {
        let way = match (region.prefers.of(page)?, &portion.place) {
            (Tier::Compressed, Place::Dram(_)) if self.tiers.has_compressed() => Way::Compressed,
            (Tier::File, Place::Dram(_) | Place::Compressed(_)) if self.tiers.has_file() => {
                Way::File
            }
            _ => return None,
        };
        (!region.pins.contains(page)).then_some(way)
    }

    /// Ends [`Engine::keep_room`].
    pub(crate) fn stop_keeping(&self) {
        *self.wanted() = Wanted::Stop;
        self.keeper.woken.notify_one();
    }

    /// Wakes the keeper if it has stopped because no move could be noted, and moves can be by now.
    pub(crate) fn go_on_moving(&self) {
        let has_stopped = self.keeper.lacks_journal.load(Ordering::Relaxed);
        if has_stopped && self.check_journal().is_ok() {
            self.keeper.lacks_journal.store(false, Ordering::Relaxed);
            self.found_room();
            self.wake_keeper(Wanted::Room);
        }
    }

    /// Lets [`Engine::keep_room`] begin anew.
    pub(crate) fn keep_again(&self) {
        *self.wanted() = Wanted::Room;
    }

    /// Moves about `wanted` cold pages to slower tiers, or as many as can be moved. Returns how many
    /// were. The caller holds no lock.
    pub(crate) fn demote(&self, wanted: usize) -> usize {
        self.demote_until(wanted, &|| self.is_stopping()).moved
    }

    /// As [`Engine::demote`], but ends before the next leaf, or batch of one, once `is_over` says so. Whoever
    /// comes next goes on where this one has ended.
    pub(super) fn demote_until(&self, wanted: usize, is_over: &impl Fn() -> bool) -> Demoted {
        let mut demoted = Demoted { moved: 0, is_exhausted: false };
        // Nothing is taken on, so that nothing needs the room, where no move can be noted.
        while demoted.moved < wanted && !is_over() && self.check_journal().is_ok() {
            match self.step() {
                Step::Leaf(session, mut cold) => {
                    // A portion leaves as a whole, if there is time.
                    while cold.first().is_some_and(|next| demoted.moved < wanted || !next.is_first)
                        && !is_over()
                    {
                        let batch = cold.drain(..cold.len().min(BATCH)).collect();
                        let count = self.move_out(&session, batch);
                        if count > 0 {
                            self.hand().idle_rounds = 0;
                        }
                        demoted.moved += count;
                    }
                    self.let_go(cold);
                }
                Step::Round { is_last } => {
                    self.forget_twins();
                    if is_last {
                        demoted.is_exhausted = true;
                        break;
                    }
                }
            }
        }
        demoted
    }

    fn hand(&self) -> MutexGuard<'_, Hand> {
        self.keeper.hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages are on their way until this is dropped.
    fn mover(&self) -> Mover<'_> {
        Mover::new(&self.keeper.movers)
    }

    /// Somebody has found room.
    pub(super) fn found_room(&self) {
        if self.keeper.is_short.load(Ordering::Relaxed) {
            *self.short_since() = None;
            self.keeper.is_short.store(false, Ordering::Relaxed);
        }
    }

    /// Somebody has tried in vain to make room. Returns for how long nobody has found any.
    pub(super) fn found_no_room(&self) -> Duration {
        let since = *self.short_since().get_or_insert_with(Instant::now);
        self.keeper.is_short.store(true, Ordering::Relaxed);
        since.elapsed()
    }

    fn short_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.keeper.short_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether pages are on their way: there may be room soon.
    pub(super) fn is_moving(&self) -> bool {
        self.keeper.movers.load(Ordering::Relaxed) > 0
    }

    /// Leaves pages where they are until the hand comes again.
    fn let_go(&self, cold: Vec<Cold>) {
        let mut slots = Vec::new();
        for page in cold {
            self.tiers.give_up(page.place, &mut slots);
        }
        self.arena.release(slots);
    }

    /// Takes the hand one leaf on.
    fn step(&self) -> Step {
        let mut hand = self.hand();
        let from = (Bound::Included(hand.session), Bound::Unbounded);
        let next = {
            let sessions = self.sessions();
            let mut range = sessions.by_id.range::<SessionId, _>(from);
            range.next().map(|(id, shared)| (*id, shared.clone()))
        };
        let Some((id, shared)) = next else {
            let rounds = hand.idle_rounds + 1;
            let is_last = rounds >= PASSES_MAX;
            *hand = Hand { idle_rounds: if is_last { 0 } else { rounds }, ..Hand::default() };
            return Step::Round { is_last };
        };
        if id != hand.session {
            *hand = Hand { session: id, page: PageIndex::new(0), ..*hand };
        }
        let mut cold = Vec::new();
        let (idle_rounds, sinks_compressed) = (hand.idle_rounds, self.sinks_compressed());
        let grip = Grip { sinks_compressed, idle_rounds };
        {
            let session = lock(&shared);
            let Some((first, leaf)) = session.region.table.leaf_from(hand.page) else {
                let next = SessionId::new(id.get() + 1);
                *hand = Hand { session: next, page: PageIndex::new(0), ..*hand };
                drop(session);
                return Step::Leaf(shared, cold);
            };
            hand.page = PageIndex::new(first.get() + table::LEAF_PAGES as u64);
            let (pins, prefers) = (&session.region.pins, &session.region.prefers);
            let fill = session.region.fill_page.as_ref().map(Slot::number);
            let mut leaf = table::lock(leaf);
            leaf.portions.each(|pages, heat| {
                let (mut may_leave, first_cold) = (false, cold.len());
                for (at, portion) in pages {
                    let page = PageIndex::new(first.get() + *at as u64);
                    if pins.contains(page) {
                        continue;
                    }
                    may_leave = true;
                    if fill.is_some_and(|fill| portion.place.spot() == Spot::Dram(fill)) {
                        // However many of them leave, nothing is free by that.
                        continue;
                    }
                    let preference = prefers.of(page);
                    if heat == 0 && may_sink(portion, preference, grip) {
                        let way = match preference {
                            Some(Tier::File) if self.tiers.has_file() => Way::File,
                            _ => Way::Down,
                        };
                        let is_first = cold.len() == first_cold;
                        cold.push(Cold { is_first, ..self.hold(page, portion, way) });
                    }
                }
                if may_leave { heat / 2 } else { heat }
            });
        }
        Step::Leaf(shared, cold)
    }

    /// Moves pages of one leaf; returns how many.
    fn move_out(&self, shared: &SharedSession, mut cold: Vec<Cold>) -> usize {
        let mut mover = None;
        for page in cold.iter_mut().filter(|page| page.way != Way::File) {
            match self.compressed(&page.place) {
                Ok(place) => {
                    page.to = Some(place);
                    mover.get_or_insert_with(|| self.mover());
                }
                Err(stays) => page.gains_nothing = stays == Stays::GainsNothing,
            }
        }
        if self.write_out(&mut cold) {
            mover.get_or_insert_with(|| self.mover());
        }
        let session = lock(shared);
        let (mut moved, mut unused) = (0, Vec::new());
        for Cold { page, place, to, gains_nothing, way: _, is_first: _ } in cold {
            let Some(to) = to else {
                if gains_nothing {
                    session.region.table.with(page, |portion| cannot_move(portion, &place));
                }
                self.tiers.give_up(place, &mut unused);
                continue;
            };
            let mut to = Some(to);
            // It may have been pinned meanwhile.
            let is_pinned = session.region.pins.contains(page);
            session.region.table.with(page, |portion| {
                if portion.place.is(&place)
                    && !is_pinned
                    && let Some(to) = to.take()
                {
                    session.region.table.note_move(&self.tiers, page, &to);
                    let former = std::mem::replace(&mut portion.place, to);
                    self.tiers.give_up(former, &mut unused);
                    moved += 1;
                }
            });
            to.into_iter().for_each(|to| self.tiers.give_up(to, &mut unused));
            self.tiers.give_up(place, &mut unused);
        }
        drop(session);
        count(&self.counters.demoted_pages, moved);
        self.arena.release(unused);
        self.surplus.store(true, Ordering::Relaxed);
        moved
    }

    /// A page compressed, or where its twin lies.
    fn compressed(&self, place: &Place) -> Result<Place, Stays> {
        let Place::Dram(slot) = place else {
            return Err(Stays::NoRoom);
        };
        // Ours, and the table's.
        if self.arena.tokens(slot) <= 2 {
            return self.tiers.compress(slot);
        }
        if let Some((_, twin)) = self.twins().get(&slot.number()) {
            return Ok(self.tiers.share(twin));
        }
        let place = self.tiers.compress(slot)?;
        self.remember_twin(slot, &place);
        Ok(place)
    }

    fn remember_twin(&self, slot: &Slot, place: &Place) {
        let mut twins = self.twins();
        if twins.len() < TWINS_MAX {
            let entry = twins.entry(slot.number());
            entry.or_insert_with(|| (self.arena.share(slot), self.tiers.share(place)));
        }
    }

    /// Forgets those that nobody else holds any more.
    pub(super) fn forget_twins(&self) {
        let mut unused = Vec::new();
        let mut twins = self.twins();
        let over = |_: &u32, twin: &mut (Slot, Place)| self.arena.tokens(&twin.0) == 1;
        for (_, (slot, place)) in twins.extract_if(over) {
            unused.push(slot);
            self.tiers.give_up(place, &mut unused);
        }
        drop(twins);
        self.arena.release(unused);
    }

    /// Writes what could not be compressed, or is to leave memory altogether, to the file. Returns whether
    /// anything was written.
    fn write_out(&self, cold: &mut [Cold]) -> bool {
        if !self.tiers.has_file() {
            return false;
        }
        let mut slots = Vec::new();
        let mut whose = Vec::new();
        let stays = |page: &Cold| page.to.is_none() && page.way != Way::Compressed;
        for (at, page) in cold.iter_mut().enumerate().filter(|(_, page)| stays(page)) {
            let Some(slot) = self.in_a_slot(&page.place) else {
                continue;
            };
            slots.push(slot);
            whose.push(at);
        }
        let mut is_written = false;
        match self.tiers.write_out(&slots, || self.mover()) {
            Ok(places) => {
                is_written = !places.is_empty();
                for (at, place) in whose.into_iter().zip(places) {
                    if let Place::Dram(slot) = &cold[at].place
                        && self.arena.tokens(slot) > 3
                    {
                        self.remember_twin(slot, &place);
                    }
                    cold[at].to = Some(place);
                }
            }
            Err(error) => {
                count(&self.counters.tier_failures, 1);
                self.tell("tier_failed", format_args!("cannot write to the file tier: {error}"));
            }
        }
        self.arena.release(slots);
        is_written
    }

    /// The page in a slot.
    fn in_a_slot(&self, place: &Place) -> Option<Slot> {
        match place {
            Place::Dram(slot) => Some(self.arena.share(slot)),
            Place::Compressed(_) => {
                let mut slots = Vec::new();
                if !self.arena.take(1, &mut slots) {
                    return None;
                }
                let mut slot = slots.pop()?;
                if self.tiers.unpack(place, &mut slot).is_ok() {
                    return Some(slot);
                }
                self.arena.release([slot]);
                None
            }
            Place::File(_) => None,
        }
    }

    /// Slots that only demotion may take.
    pub(super) fn demotion_slots(&self) -> u32 {
        if self.tiers.has_slower() { DEMOTION_SLOTS_MAX.min(self.arena.slots() / 8) } else { 0 }
    }

    /// Slots that only reads may take, for as long as it takes to send what is copied there.
    pub(super) fn reading_slots(&self) -> u32 {
        if self.tiers.has_slower() { READING_SLOTS_MAX.min(self.arena.slots() / 8) } else { 0 }
    }

    /// Whether a page that is asked for often may stay in memory.
    pub(super) fn may_promote(&self) -> bool {
        let free = self.arena.slots() - self.arena.taken();
        free > self.demotion_slots() + self.reading_slots() && self.check_journal().is_ok()
    }

    /// Whether compressed pages are to leave memory: they take more of it than they should, or
    /// there is none left.
    fn sinks_compressed(&self) -> bool {
        let free = self.arena.slots() - self.arena.taken();
        self.tiers.has_file()
            && (self.headroom.is_short()
                || free < self.demotion_slots() + self.reading_slots() + SPARE_SLOTS
                || self.tiers.usage().compressed_slots > self.slots_at(COMPRESSED_32NDS))
    }

    /// Whether [`Engine::keep_room`] is to end, or has.
    pub(super) fn is_stopping(&self) -> bool {
        *self.wanted() == Wanted::Stop
    }

    /// Slots that are so many 32nds of the memory.
    pub(super) fn slots_at(&self, share: u64) -> u64 {
        self.config.memory.get() / PAGE_SIZE as u64 * share / 32
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.keeper.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn twins(&self) -> MutexGuard<'_, HashMap<u32, (Slot, Place)>> {
        self.keeper.twins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a cold page may leave its tier.
fn may_sink(portion: &Portion, preference: Option<Tier>, grip: Grip) -> bool {
    let may = match &portion.place {
        Place::Dram(_) => true,
        Place::Compressed(_) => grip.sinks_compressed,
        Place::File(_) => false,
    };
    let is_next = match (preference, &portion.place) {
        (Some(Tier::Dram), _) | (Some(Tier::Compressed), Place::Compressed(_)) => {
            grip.idle_rounds >= PASSES_BEFORE_PREFERRED
        }
        _ => true,
    };
    may && is_next
}

/// A page that nothing can be done about is left alone for some passes.
fn cannot_move(portion: &mut Portion, place: &Place) {
    if portion.place.is(place) {
        portion.heat = HEAT_MAX;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use farmem_region::PageCount;
    use farmem_wire::{Create, RefusalCode};

    use super::*;
    use crate::config::ServerConfig;
    use crate::engine::supply::Purpose;

    /// More is promised than there is memory for, and nothing is there that could leave.
    #[test]
    fn cap_90_who_waits_for_pages_on_their_way_is_not_told_that_the_server_is_full() {
        let mut config = ServerConfig::new(Vec::new(), PageCount::new(64).bytes());
        config.tiers.compressed = PageCount::new(64).bytes();
        config.promise_percent = 1000;
        let engine = Engine::new(config).unwrap();
        let mut slots = Vec::new();
        let mut take = || loop {
            if let Err(refusal) = engine.take_slots(Purpose::Keep, true, 1, &mut slots) {
                return refusal.code;
            }
        };
        let mover = engine.mover();
        assert_eq!(take(), RefusalCode::Busy);
        drop(mover);
        assert_eq!(take(), RefusalCode::Full);
        // Known from the attempts before.
        let began = Instant::now();
        assert_eq!(take(), RefusalCode::Full);
        assert!(engine.found_no_room() >= began.elapsed());
        engine.arena.release(vec![slots.pop().unwrap()]);
        engine.take_slots(Purpose::Keep, true, 1, &mut slots).unwrap();
        assert!(engine.short_since().is_none(), "there was room");
    }

    /// A server with a region whose pages lie in dram.
    fn with_pages(count: u64, prefers: Option<Tier>, fill: impl Fn(u64, &mut [u8])) -> Engine {
        let mut config = ServerConfig::new(Vec::new(), PageCount::new(4096).bytes());
        config.tiers.compressed = PageCount::new(4096).bytes();
        let engine = Engine::new(config).unwrap();
        let (size, source) = (PageCount::new(count).bytes(), farmem_wire::Source::Nothing);
        let create = Create { name: "r", size, page_bytes: 4096, source, prefers };
        engine.create(&create).unwrap();
        let shared = engine.sessions().by_id.values().next().unwrap().clone();
        let mut slots = Vec::new();
        engine.take_slots(Purpose::Keep, true, count as u32, &mut slots).unwrap();
        for (page, mut slot) in (0..).zip(slots) {
            fill(page, engine.arena.bytes_mut(&mut slot));
            engine.put_made(&mut lock(&shared).region, PageIndex::new(page), slot, 0);
        }
        engine
    }

    /// Over after so many looks.
    fn after(looks: u32) -> impl Fn() -> bool {
        let left = Cell::new(looks);
        move || left.replace(left.get().saturating_sub(1)) == 0
    }

    /// Whoever stops a server does not wait for a pass over all pages.
    #[test]
    fn the_keeper_ends_in_the_midst_of_a_pass() {
        let engine = with_pages(1500, Some(Tier::Compressed), |page, bytes| bytes.fill(page as u8));
        assert_eq!(engine.order_pass(&|| false), Some(0), "they cool down");
        assert_eq!(engine.order_pass(&after(0)), Some(0));
        assert_eq!(engine.order_pass(&after(2)), Some(BATCH));
        assert_eq!(engine.demote_until(1500, &after(2)).moved, BATCH);
        engine.stop_keeping();
        assert_eq!(engine.demote(1500), 0);
        engine.keep_again();
        assert_eq!(engine.demote(1500), 1500 - 2 * BATCH);
    }

    /// Many requests, each of which has time for a part of a leaf, find together that nothing can leave.
    #[test]
    fn passes_that_move_nothing_are_counted_whoever_makes_them() {
        let engine = with_pages(1500, None, |page, bytes| {
            let mut word = page;
            for chunk in bytes.chunks_mut(8) {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1 << 60 | 1);
                chunk.copy_from_slice(&(word ^ word >> 29).to_le_bytes());
            }
        });
        let attempts = (1..100).find(|_| engine.demote_until(1, &after(2)).is_exhausted);
        assert!(attempts.is_some_and(|attempts| attempts > PASSES_MAX), "{attempts:?}");
        assert_eq!(engine.demote_until(1, &after(2)).moved, 0);
    }
}
